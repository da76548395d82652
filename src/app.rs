//! Wires the planes together: the only file that knows both.
//!
//! Threads: one per worker, one that accepts (with one worker it does that itself), one for the control plane, one for the ops
//! port, and the pool for everything that may block.

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    rc::Rc,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, UnixListener},
    runtime::{Builder, LocalOptions, LocalRuntime},
    sync::{Notify, mpsc, oneshot, watch},
};

use crate::{
    control::{
        Control, Told, api,
        build::{self, Before},
        config::{self, Config},
        reconcile::{Change, Listeners, Reconciler},
        sandbox,
        slices::AllFound,
        state::State,
        status, systemd,
        terminate::{self, Requested},
    },
    edge::{
        connection::{self, Shared},
        listener::{self, Accepted, Caps, Command, Counts, Permit, Sink},
        registry,
    },
    error::{Error, Kind},
    http::{
        files::{FileLimits, Files},
        inflight::{self, Sinks},
        preflight,
        spill::{Budget, Buffers},
        stack::{self, Worker},
    },
    lifecycle::{
        PhaseCell,
        drain::Open,
        signal::{Signal, Signals},
    },
    model::{
        Peer, Settings,
        settings::Tracing,
        upstream::{Preflight, SetConfig},
    },
    telemetry::{access_log::AccessLog, metrics::Metrics, sink::Target, trace::Traces, tracing::Log},
    upstream::{
        Dispatcher, Snapshot, Store,
        dispatch::now_ms,
        probe::Question,
        store::{Task, Workers},
    },
};

/// So many idle connections a worker closes at each beat while there are too many.
const CLOSED_AT_ONCE: usize = 64;
/// The reason in `slackwater_shed_total`.
const IDLE_CONNECTION: &str = "idle_connection";
const HEARTBEAT_EVERY: Duration = Duration::from_millis(100);
const WATCH_EVERY: Duration = Duration::from_secs(1);
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
const CHANNEL: usize = 1024;
/// Threads that may block at once in the process's pool.
const POOL_THREADS: usize = 64;
/// Kept for listeners, logs, FPM and files when "auto" shares out file descriptors.
const SPARE_DESCRIPTORS: usize = 64;
/// What "auto" gives at most: each connection may have a head of 81 KiB on its way.
const AUTO_CONNECTIONS: usize = 16 * 1024;
/// One in so many descriptors may be a spill file's.
const SPILL_PART: usize = 8;

/// Runs until asked to end. Exit code 0, or 3 if requests were cut.
pub fn run(path: &Path) -> Result<u8, String> {
    let began = Instant::now();
    // One for the whole process; fails only where there is one already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let config = config::load(path, &|name| std::env::var(name).ok())
        .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))?;
    let settings = config.settings.clone();
    // Before the first thread, so that it is for all of them.
    let sandboxed = settings.sandbox.then(|| sandbox::enter(&config)).transpose()?;
    let log = Arc::new(crate::telemetry::tracing::init(settings.log.format, &settings.log.level)?);
    let sandbox = sandboxed.map(|(folders, by)| {
        tracing::info!(by, "sandboxed");
        folders
    });
    raise_descriptors();
    for warning in config.warnings_now() {
        tracing::warn!("{warning}");
    }
    let mut state = match &settings.state {
        Some(path) => load_state(path, settings.kubernetes.is_some())?,
        None => State::default(),
    };
    state.switch.prune(&config.upstreams);
    let workers = settings.workers.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    let retired = BTreeSet::new();
    let before =
        Before { snapshot: None, switch: &state.switch, workers, retired: &retired, found: &AllFound::default(), alive: &[] };
    let snapshot = build::build(&config, &before)?;

    let pool = Builder::new_current_thread().max_blocking_threads(POOL_THREADS).build().map_err(|e| format!("pool: {e}"))?;
    let buffers = Buffers {
        memory: Budget::new(settings.buffer.total),
        disk: Budget::new(settings.buffer.disk),
        files: Budget::new((descriptors() / SPILL_PART) as u64),
        pool: pool.handle().clone(),
    };
    let access = AccessLog::start(&settings.log, Target::from(&*settings.log.access_file))
        .map_err(|e| format!("access_file {}: {e}", settings.log.access_file))?;
    let traces = start_traces(&settings.tracing)?;
    let store = Arc::new(Store::new(snapshot));
    let phase = Arc::new(PhaseCell::default());
    let metrics = Metrics::new(workers);
    let shed = Kind::ALL.into_iter().filter(|kind| kind.is_shed()).map(Kind::cause);
    metrics.expect(Kind::ALL.into_iter().map(Kind::cause), shed.chain([IDLE_CONNECTION]));
    let connections = Arc::new(Open::default());
    let counts = Counts::new(workers, connections.clone());
    let heartbeats: Arc<[AtomicU64]> = (0..workers).map(|_| AtomicU64::new(now_ms())).collect();
    let files = Files::new(buffers.pool.clone(), FileLimits { cache_bytes: settings.buffer.files, ..FileLimits::default() });

    let (task_senders, task_receivers): (Vec<_>, Vec<_>) = (0..workers).map(|_| mpsc::channel(CHANNEL)).unzip();
    let (changes_sender, changes) = mpsc::channel(CHANNEL);
    let (terminate_sender, _) = watch::channel(Requested::default());
    let control = Arc::new(Control {
        store: store.clone(),
        phase: phase.clone(),
        workers: Workers::new(task_senders),
        metrics: metrics.clone(),
        changes: changes_sender,
        terminate: terminate_sender,
        heartbeats: heartbeats.clone(),
        connections,
        drained: Arc::default(),
        instance: format!("{:016x}", rand::random::<u64>()).into(),
        contacts: Arc::default(),
        sandbox,
        told: Mutex::new(Told { warnings: config.warnings.clone(), ..Told::default() }),
        news: Notify::new(),
    });
    metrics.set_source({
        let (control, buffers, access) = (Arc::downgrade(&control), buffers.clone(), access.clone());
        let (log, traces) = (log.clone(), traces.clone());
        Box::new(move || match control.upgrade() {
            Some(control) => crate::telemetry::metrics::Gauges {
                buffer_memory_bytes: buffers.memory.used(),
                buffer_disk_bytes: buffers.disk.used(),
                access_log_lost: access.lost(),
                buffer_memory_limit_bytes: buffers.memory.limit(),
                buffer_disk_limit_bytes: buffers.disk.limit(),
                connections_max: caps(&control.store.load().settings).connections as u64,
                log_lost: log.lost(),
                traces_lost: traces.as_ref().map_or(0, Traces::lost),
                ..status::gauges(&control)
            },
            None => crate::telemetry::metrics::Gauges::default(),
        })
    });

    // Bound before anything runs: an address in use ends the start with one line.
    let listeners = settings.listen.addresses().map(listener::bind).collect::<io::Result<Vec<_>>>().map_err(|e| e.to_string())?;
    let ops = settings.listen.ops.map(listener::bind).transpose().map_err(|e| format!("listen.ops: {e}"))?;
    let admin = bind_admin(&settings.listen.admin)?;

    let shared = Arc::new(WorkerParts {
        store,
        phase,
        buffers: buffers.clone(),
        access: access.clone(),
        metrics,
        files,
        heartbeats,
        control: control.clone(),
        counts: counts.clone(),
        traces: traces.clone(),
    });
    let (command_sender, commands) = mpsc::channel(CHANNEL);
    let mut commands = Some(commands);
    let caps = caps(&settings);
    let mut connection_senders = Vec::new();
    for (index, tasks) in task_receivers.into_iter().enumerate() {
        let (sender, connections) = mpsc::channel(CHANNEL);
        connection_senders.push(sender);
        let accept = if workers == 1 { commands.take().map(|c| (c, counts.clone(), caps.clone())) } else { None };
        let shared = shared.clone();
        spawn(&format!("worker-{index}"), move || local(worker(index, shared, tasks, connections, accept)))?;
    }
    if let Some(commands) = commands {
        let (counts, caps) = (counts.clone(), caps.clone());
        spawn("acceptor", move || local(listener::accept(commands, counts, caps, Sink::Workers(connection_senders))))?;
    }
    if let Some(ops) = ops {
        let control = control.clone();
        spawn("ops", move || {
            local(async move {
                match TcpListener::from_std(ops) {
                    Ok(listener) => api::serve_ops(control, listener).await,
                    Err(error) => tracing::error!(%error, "the ops port cannot be used"),
                }
            });
        })?;
    }

    let listening = Listening {
        commands: command_sender.clone(),
        current: settings.listen.addresses().collect(),
        prepared: listeners,
        log: log.clone(),
        access: access.clone(),
        buffers,
    };
    let cut = local(control_plane(
        control,
        path.to_owned(),
        config,
        state,
        listening,
        changes,
        admin,
        access.clone(),
        command_sender,
        began,
    ));
    let _ = std::fs::remove_file(&settings.listen.admin);
    access.flush_and_stop(FLUSH_LIMIT);
    if let Some(traces) = traces {
        traces.flush(FLUSH_LIMIT);
    }
    log.flush_and_stop(FLUSH_LIMIT);
    Ok(if cut { 3 } else { 0 })
}

#[cfg(feature = "otlp")]
fn start_traces(settings: &Tracing) -> Result<Option<Traces>, String> {
    (!settings.endpoint.is_empty()).then(|| crate::telemetry::otlp::start(settings)).transpose()
}

/// The configuration has refused an endpoint.
#[cfg(not(feature = "otlp"))]
#[expect(clippy::unnecessary_wraps, reason = "as with the feature")]
fn start_traces(_: &Tracing) -> Result<Option<Traces>, String> {
    Ok(None)
}

/// The control plane's thread: signals, changes, probes, the admin socket, and the way out. Gives whether anything was cut.
#[expect(clippy::too_many_arguments, reason = "called once, right above")]
async fn control_plane(
    control: Arc<Control>,
    path: PathBuf,
    config: Config,
    state: State,
    mut listening: Listening,
    changes: mpsc::Receiver<Change>,
    admin: std::os::unix::net::UnixListener,
    access: AccessLog,
    commands: mpsc::Sender<Command>,
    began: Instant,
) -> bool {
    let settings = config.settings.clone();
    let mut signals = match Signals::install() {
        Ok(signals) => signals,
        Err(error) => {
            eprintln!("slackwater: signals cannot be handled: {error}");
            std::process::exit(4);
        }
    };
    match UnixListener::from_std(admin) {
        Ok(listener) => drop(tokio::task::spawn_local(api::serve_admin(control.clone(), listener))),
        Err(error) => tracing::error!(%error, "the admin socket cannot be used"),
    }
    listening.commit(&settings);
    tracing::info!(
        http = ?settings.listen.http, https = ?settings.listen.https, ops = settings.listen.ops.map_or_else(|| "off".to_owned(), |ops| ops.to_string()), workers = control.workers.len(),
        milliseconds = began.elapsed().as_millis() as u64, "listening"
    );
    tokio::task::spawn_local(systemd::run(control.clone()));
    tokio::task::spawn_local(watch_certificates(control.clone()));
    if settings.reload == crate::model::settings::ReloadMode::Watch {
        tokio::task::spawn_local(watch_files(control.clone(), path.clone(), config.files.clone()));
    }
    let reconciler = Reconciler::new(control.clone(), path, config, state, Box::new(listening), Rc::new(warm));
    let reconciling = tokio::task::spawn_local(reconciler.run(changes));

    let requested = control.terminate.subscribe();
    let handling = {
        let control = control.clone();
        tokio::task::spawn_local(async move {
            loop {
                let signal = signals.next().await;
                tracing::info!(signal = signal.name(), "signal");
                match signal {
                    // A storm of them needs no more than one more look at the file.
                    Signal::Hup => drop(control.changes.try_send(Change::Reload { by: signal.name(), answer: None })),
                    Signal::Usr1 => {
                        if let Err(error) = access.reopen() {
                            tracing::error!(%error, "the access log cannot be reopened");
                        }
                    }
                    // Nginx images stop with QUIT.
                    Signal::Term | Signal::Quit | Signal::Int => control.terminate.send_modify(|r| {
                        r.times += 1;
                        r.now |= signal == Signal::Int;
                        r.by = signal.name().to_owned();
                    }),
                }
            }
        })
    };
    let cut = terminate::terminate(control.clone(), requested, || async move {
        let (done, closed) = oneshot::channel();
        commands.send(Command::Close(done)).await.ok().map(|()| closed)
    })
    .await;
    // The last requests have just ended: their lines are still with the workers.
    let _ = tokio::time::timeout(FLUSH_LIMIT, control.workers.ask_all(Task::Flush)).await;
    handling.abort();
    reconciling.abort();
    cut
}

/// A file that cannot be read stops the start where nothing else knows which set an operator has chosen. In a cluster the annotation does, and a pod that
/// cannot start before somebody has mended a file helps nobody.
fn load_state(path: &Path, clustered: bool) -> Result<State, String> {
    let error = match State::load(path) {
        Ok(state) => return Ok(state),
        Err(error) => error,
    };
    let aside = path.with_extension("damaged");
    let lost = "an operator's swap and what Kubernetes had told last are lost";
    if clustered && std::fs::rename(path, &aside).is_ok() {
        tracing::error!(path = %path.display(), moved_to = %aside.display(), %error, "the state file is damaged; starting without it: {lost}");
        return Ok(State::default());
    }
    Err(format!("state file {}: {error}\nmove it away to start without it; then {lost}", path.display()))
}

/// The request of a preflight: of the sites that are in force when it begins.
fn warm(snapshot: &Snapshot, upstream: &str, set: &SetConfig, preflight: &Preflight) -> Result<Question, String> {
    preflight::question(&snapshot.sites, upstream, set, preflight)
}

/// What a file is, as far as it can be told without reading it; a ConfigMap or Secret changes it by a renamed link.
type Looks = Vec<Option<(u64, u64, i64, i64, u64)>>;

fn look(files: &[PathBuf]) -> Looks {
    use std::os::unix::fs::MetadataExt;
    files.iter().map(|f| std::fs::metadata(f).map(|m| (m.dev(), m.ino(), m.mtime(), m.mtime_nsec(), m.len())).ok()).collect()
}

/// `reload = "watch"`.
async fn watch_files(control: Arc<Control>, path: PathBuf, mut files: Vec<PathBuf>) {
    if !files.contains(&path) {
        files.push(path);
    }
    let mut before = look(&files);
    loop {
        tokio::time::sleep(WATCH_EVERY).await;
        let now = look(&files);
        if now != before {
            before = now;
            let _ = control.changes.send(Change::Reload { by: "watch", answer: None }).await;
        }
    }
}

/// Certificates, keys and ticket keys, in either mode: whoever renews them does not know of this process.
async fn watch_certificates(control: Arc<Control>) {
    let files = || -> Vec<PathBuf> {
        let settings = control.store.load().settings.clone();
        let certificates = settings.certificates.iter().flat_map(|files| [files.certificate.clone(), files.key.clone()]);
        certificates.chain(settings.listen.tls_ticket_keys.iter().cloned()).collect()
    };
    // What has changed between the first reading and this look is read once more; where nothing has, nothing comes of it.
    let mut before = None;
    loop {
        let files = files();
        let now = Some((look(&files), files));
        if now != before {
            before = now;
            let _ = control.changes.send(Change::Certificates).await;
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

/// What every worker is given.
struct WorkerParts {
    store: Arc<Store>,
    phase: Arc<PhaseCell>,
    buffers: Buffers,
    access: AccessLog,
    metrics: Arc<Metrics>,
    files: Files,
    heartbeats: Arc<[AtomicU64]>,
    control: Arc<Control>,
    counts: Arc<Counts>,
    traces: Option<Traces>,
}

type Acceptor = (mpsc::Receiver<Command>, Arc<Counts>, Caps);

async fn worker(
    index: usize,
    parts: Arc<WorkerParts>,
    tasks: mpsc::Receiver<Task>,
    mut connections: mpsc::Receiver<Accepted>,
    accept: Option<Acceptor>,
) {
    let dispatcher = Rc::new(Dispatcher::new(index, parts.store.clone(), parts.control.workers.clone()));
    let shard = parts.metrics.shard(index);
    let sinks = Rc::new(Sinks {
        registry: inflight::Registry::default(),
        access: parts.access.writer(),
        metrics: shard.clone(),
        phase: parts.phase.clone(),
        drained: parts.control.drained.clone(),
        traces: parts.traces.clone(),
    });
    let worker = Worker::new(dispatcher.clone(), parts.phase.clone(), parts.buffers.clone(), parts.files.clone(), sinks.clone());
    let registry = Rc::new(registry::Registry::default());
    let shared = Rc::new(Shared {
        phase: parts.phase.clone(),
        registry: registry.clone(),
        settings: {
            let store = parts.store.clone();
            Box::new(move || store.load().settings.clone())
        },
        refused: {
            let sinks = sinks.clone();
            Box::new(move |peer: &Peer, error: &Error| sinks.refused(peer, error))
        },
        counts: parts.counts.clone(),
    });
    tokio::task::spawn_local(dispatcher.clone().sweep());
    tokio::task::spawn_local(do_tasks(tasks, dispatcher, registry.clone(), sinks.clone()));
    tokio::task::spawn_local({
        let parts = parts.clone();
        async move {
            loop {
                if let Some(beat) = parts.heartbeats.get(index) {
                    beat.store(now_ms(), Ordering::Relaxed);
                }
                sinks.access.tick();
                if parts.counts.wants_a_place() {
                    (0..registry.close_idle(CLOSED_AT_ONCE)).for_each(|_| sinks.metrics.shed(IDLE_CONNECTION));
                }
                tokio::time::sleep(HEARTBEAT_EVERY).await;
            }
        }
    });

    let serve = Rc::new(move |stream, peer: Peer, permit: Permit| {
        let (worker, shared, shard) = (worker.clone(), shared.clone(), shard.clone());
        let service = move |peer: Peer| tower::service_fn(move |request| stack::serve(worker.clone(), peer, request));
        tokio::task::spawn_local(async move {
            let _counted = (permit, shard.connection());
            connection::serve(shared, stream, peer, service).await;
        });
    });
    if let Some((commands, counts, caps)) = accept {
        let serve = serve.clone();
        let here = Sink::Here(Box::new(move |stream, peer, permit| serve(stream, peer, permit)));
        tokio::task::spawn_local(listener::accept(commands, counts, caps, here));
    }
    while let Some(Accepted { stream, peer, permit }) = connections.recv().await {
        match tokio::net::TcpStream::from_std(stream) {
            Ok(stream) => serve(stream, peer, permit),
            Err(error) => tracing::error!(%error, "a connection cannot be taken over"),
        }
    }
    // Where the worker accepts by itself nobody sends here; it lives as long as the process.
    std::future::pending::<()>().await;
}

/// What other threads ask of this worker.
async fn do_tasks(
    mut tasks: mpsc::Receiver<Task>,
    dispatcher: Rc<Dispatcher>,
    connections: Rc<registry::Registry>,
    sinks: Rc<Sinks>,
) {
    while let Some(task) = tasks.recv().await {
        match task {
            Task::Barrier(answer) => drop(answer.send(())),
            Task::Unpark(endpoint) => drop(dispatcher.unpark(endpoint)),
            Task::UnparkAll(endpoint) => dispatcher.unpark_all(endpoint),
            Task::InFlight(activation, answer) => drop(answer.send(sinks.registry.list(activation))),
            Task::Phase => connections.wake_all(),
            Task::Flush(answer) => {
                sinks.access.tick();
                let _ = answer.send(());
            }
            Task::Cut(answer) => {
                let _ = answer.send(sinks.registry.list(None));
                sinks.registry.mark_cut();
                connections.abort_busy();
            }
        }
    }
}

/// The reconciler's hand on sockets, logs and budgets.
struct Listening {
    commands: mpsc::Sender<Command>,
    current: BTreeSet<SocketAddr>,
    prepared: Vec<std::net::TcpListener>,
    log: Arc<Log>,
    access: AccessLog,
    buffers: Buffers,
}

impl Listeners for Listening {
    fn prepare(&mut self, wanted: &[SocketAddr]) -> io::Result<()> {
        self.prepared =
            wanted.iter().filter(|a| !self.current.contains(a)).map(|a| listener::bind(*a)).collect::<io::Result<Vec<_>>>()?;
        Ok(())
    }

    fn commit(&mut self, settings: &Settings) {
        let keep: Vec<SocketAddr> = settings.listen.addresses().collect();
        self.current = keep.iter().copied().collect();
        let add = std::mem::take(&mut self.prepared);
        for command in [Command::Caps(caps(settings)), Command::Listen { keep, add }] {
            if self.commands.try_send(command).is_err() {
                tracing::error!("the acceptor does not take commands");
            }
        }
        self.buffers.memory.set_limit(settings.buffer.total);
        self.buffers.disk.set_limit(settings.buffer.disk);
    }

    fn abandon(&mut self) {
        self.prepared.clear();
    }

    fn apply(&mut self, settings: &Settings) -> Result<(), String> {
        self.access
            .set_target(Target::from(&*settings.log.access_file))
            .map_err(|e| format!("access_file {}: {e}", settings.log.access_file))?;
        self.access.set_format(&settings.log);
        self.log.set_level(&settings.log.level)
    }
}

fn caps(settings: &Settings) -> Caps {
    let listen = &settings.listen;
    Caps {
        connections: listen.max_connections.unwrap_or_else(connections_by_descriptors),
        per_address: listen.max_connections_per_address,
        trusted: listen.trusted_proxies.clone(),
        tls: listen.https.clone(),
    }
}

/// As many as the process may have.
fn descriptors() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.and_then(|n| usize::try_from(n).ok()).unwrap_or(1 << 20)
}

/// A shell's soft limit is there for programs that use select(2).
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// A client and a connection to FPM for each, and some to spare.
fn connections_by_descriptors() -> usize {
    let limit = descriptors();
    ((limit - limit / SPILL_PART).saturating_sub(SPARE_DESCRIPTORS) / 2).clamp(16, AUTO_CONNECTIONS)
}

/// Mode 0600 from its first moment: bound under a name of its own, then renamed. A socket that nobody answers on is replaced.
fn bind_admin(path: &Path) -> Result<std::os::unix::net::UnixListener, String> {
    let open = || -> io::Result<std::os::unix::net::UnixListener> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process answers there"));
        }
        let temporary = path.with_extension(format!("{}.new", std::process::id()));
        let _ = std::fs::remove_file(&temporary);
        let listener = std::os::unix::net::UnixListener::bind(&temporary)?;
        std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&temporary, path)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    open().map_err(|e| format!("listen.admin {}: {e}", path.display()))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let guarded = {
        let name = name.to_owned();
        move || {
            // A thread that dies ends the process: half a proxy is worse than one that is started anew.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
                eprintln!("slackwater: thread {name} has died; the process ends");
                std::process::exit(4);
            }
        }
    };
    thread::Builder::new().name(name.to_owned()).spawn(guarded).map(drop).map_err(|e| format!("thread {name}: {e}"))
}

/// Runs `work` on a single-threaded runtime of this thread.
fn local<T>(work: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread().enable_all().max_blocking_threads(1).build_local(LocalOptions::default());
    match runtime {
        Ok(runtime) => LocalRuntime::block_on(&runtime, work),
        Err(error) => {
            eprintln!("slackwater: no runtime: {error}");
            std::process::exit(4);
        }
    }
}
