//! Wires the planes together: the only module that knows both.
//!
//! Threads: one per worker, one that accepts (with one worker it does that itself), one for the control plane, one for the ops
//! port, and the pool for everything that may block.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    rc::Rc,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize},
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
        Control, Told, alarm, api,
        build::{self, Before},
        config::{self, Config},
        reconcile::{Change, Listeners, Reconciler},
        renewal, sandbox,
        slices::AllFound,
        state::State,
        status, systemd,
        terminate::{self, Requested},
    },
    edge::listener::{self, Command, Counts, Sink},
    error::Kind,
    http::{
        files::{FileLimits, Files},
        preflight,
        spill::{Budget, Buffers},
    },
    lifecycle::{
        PhaseCell,
        drain::Open,
        signal::{Signal, Signals},
    },
    model::{
        settings::Tracing,
        upstream::{Preflight, SetConfig},
    },
    telemetry::{access_log::AccessLog, metrics::Metrics, sink::Target, trace::Traces},
    upstream::{
        Snapshot, Store,
        dispatch::now_ms,
        probe::Question,
        store::{Task, Workers},
    },
};

mod sockets;
mod worker;

use sockets::{Listening, SPILL_PART, bind_admin, caps, descriptors, raise_descriptors};

/// For the answer to who waits for the end of a drain to reach its socket.
const ANSWER: Duration = Duration::from_millis(10);
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
const CHANNEL: usize = 1024;
/// Threads that may block at once in the process's pool.
const POOL_THREADS: usize = 64;

/// Runs until asked to end. Exit code 0, or 3 if requests were cut.
pub fn run(path: &Path) -> Result<u8, String> {
    let began = Instant::now();
    // One for the whole process; fails only where there is one already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let config = config::load(path, &|name| std::env::var(name).ok())
        .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))?;
    let settings = config.settings.clone();
    // As the admin socket's; where it cannot be made, `check` and the log have warned, and a swap says so.
    if let Some(folder) = settings.state.as_deref().and_then(Path::parent) {
        let _ = std::fs::create_dir_all(folder);
    }
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
    metrics.expect(Kind::ALL.into_iter().map(Kind::cause), shed.chain([worker::IDLE_CONNECTION]));
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
        connections_max: AtomicUsize::new(caps(&settings).connections),
        drained: Arc::default(),
        instance: format!("{:016x}", rand::random::<u64>()).into(),
        contacts: Arc::default(),
        sandbox,
        told: Mutex::new(Told { warnings: config.warnings.clone(), ..Told::default() }),
        news: Notify::new(),
        left: watch::channel(None).0,
        asking: Arc::default(),
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

    let shared = Arc::new(worker::Parts {
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
        spawn(&format!("worker-{index}"), move || local(worker::run(index, shared, tasks, connections, accept)))?;
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
        control: control.clone(),
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
    // Where requests were cut the grace period is nearly over: one limit for all, and what is worth most comes first.
    let until = Instant::now() + if cut { terminate::EXIT_RESERVE / 2 } else { FLUSH_LIMIT };
    let left = || until.saturating_duration_since(Instant::now());
    access.flush_and_stop(left());
    log.flush_and_stop(left());
    if let Some(traces) = traces {
        traces.flush(left());
    }
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
    if let Err(error) = systemd::start(&control) {
        tracing::error!(%error, "systemd cannot be told");
    }
    tokio::task::spawn_local(alarm::run(control.clone()));
    tokio::task::spawn_local(renewal::certificates(control.clone()));
    if settings.reload == crate::model::settings::ReloadMode::Watch {
        tokio::task::spawn_local(renewal::files(control.clone(), path.clone(), config.files.clone()));
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
    let _ = tokio::time::timeout(terminate::EXIT_RESERVE / 2, control.workers.ask_all(Task::Flush)).await;
    // Who waits for the end is told how it was; the answer itself is written when its connection's task is next polled.
    let _ = tokio::time::timeout(terminate::EXIT_RESERVE / 4, async {
        control.asking.none().await;
        tokio::time::sleep(ANSWER).await;
    })
    .await;
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
