//! `slackwater demo`: a blue and a green PHP-FPM pool and the proxy before them, on loopback, in a folder that goes away again.
//!
//! `pools` starts PHP, this file the proxy as a child of the same executable; then either a person tries it out, or `rehearse`
//! puts it under load, and `ledger` says whether a request was lost.

mod ledger;
mod plot;
mod pools;
mod rehearse;

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::{
        fs::{DirBuilderExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    signal::unix::{SignalKind, signal},
    time::{sleep, timeout},
};

use pools::Pools;

/// Until the proxy is ready.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// Until it has gone after SIGINT; a slow page takes 1.5 s, an idle connection `quiet`.
const GONE_WITHIN: Duration = Duration::from_secs(8);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Lines of a log that are shown where something went wrong.
const LOG_TAIL: usize = 20;

#[derive(clap::Args)]
pub struct Options {
    /// Needs no hands: load, a reload, four swaps and a drain, and a ledger of every request; exit code 0 only if none was lost
    #[arg(long)]
    pub rehearse: bool,
    /// Breaks something on purpose: the rehearsal must notice it and fail
    #[arg(long, requires = "rehearse", value_enum)]
    pub sabotage: Option<Sabotage>,
    /// Draws what it saw, over time, as SVG
    #[arg(long, requires = "rehearse", value_name = "FILE")]
    pub plot: Option<PathBuf>,
    /// The built-in FastCGI responder, even where there is a php-fpm
    #[arg(long)]
    pub built_in: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sabotage {
    /// The proxy has to end in the middle of a slow request
    Cut,
    /// A swap back that the ledger does not know of
    Stale,
}

pub fn run(options: &Options) -> ExitCode {
    super::block_on(show(options)).unwrap_or_else(|reason| super::fail(&format!("demo: {reason}")))
}

/// Fields are dropped in this order: the proxy ends before PHP, and the folder goes last.
struct Demo {
    proxy: Proxy,
    _pools: Pools,
    folder: Folder,
    http: SocketAddr,
    ops: SocketAddr,
}

impl Demo {
    fn admin(&self) -> PathBuf {
        self.folder.0.join("admin.sock")
    }

    fn config(&self) -> PathBuf {
        self.folder.0.join("slackwater.toml")
    }

    fn drain_receipt(&self) -> PathBuf {
        self.folder.0.join("drain.json")
    }

    fn log_tail(&self) -> String {
        tail(&self.folder.0.join("proxy.log"))
    }
}

async fn show(options: &Options) -> Result<ExitCode, String> {
    // Before the first child, so that none is left behind whenever the signal comes.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| e.to_string())?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
    let asked_to_end = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let work = async {
        let mut demo = start(options).await?;
        if options.rehearse {
            let passed = rehearse::rehearse(&mut demo, options.sabotage, options.plot.as_deref()).await?;
            return Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        instructions(&demo);
        let status = demo.proxy.exited().await?;
        Err(format!("the proxy has ended by itself ({status}):\n{}", demo.log_tail()))
    };
    tokio::select! {
        outcome = work => outcome,
        () = asked_to_end => {
            say("stopped");
            Ok(if options.rehearse { ExitCode::FAILURE } else { ExitCode::SUCCESS })
        }
    }
}

async fn start(options: &Options) -> Result<Demo, String> {
    let php = if options.built_in { None } else { pools::find_php() };
    say(&match &php {
        Some(php) => format!("PHP pools: {} (for the built-in responder: slackwater demo --built-in)", php.display()),
        None if options.built_in => "built-in FastCGI responder (for real PHP: without --built-in)".to_owned(),
        None => "built-in FastCGI responder (for real PHP: apt-get install php8.2-fpm)".to_owned(),
    });
    let folder = Folder::make(php.is_some()).map_err(|e| format!("a temporary folder: {e}"))?;
    let public = folder.0.join("public");
    fs::create_dir(&public)
        .and_then(|()| fs::set_permissions(&public, Permissions::from_mode(0o755)))
        .and_then(|()| write_readable(&public.join("index.php"), pools::INDEX_PHP))
        .map_err(|e| format!("{}: {e}", public.display()))?;
    let pools = Pools::start(php.as_deref(), &folder.0).await?;
    let http = free_port().map_err(|e| format!("a free port: {e}"))?;
    let ops = free_port().map_err(|e| format!("a free port: {e}"))?;
    let config = folder.0.join("slackwater.toml");
    let text = configuration(&folder.0, http, ops, &pools, options.sabotage);
    fs::write(&config, text).map_err(|e| format!("{}: {e}", config.display()))?;
    let proxy = Proxy::start(&config, &folder.0.join("proxy.log")).map_err(|e| format!("slackwater serve: {e}"))?;
    let mut demo = Demo { proxy, _pools: pools, folder, http, ops };
    let deadline = Instant::now() + READY_WITHIN;
    while ready(demo.ops).await != Some(200) {
        if let Some(status) = demo.proxy.has_exited()? {
            return Err(format!("the proxy has ended ({status}):\n{}", demo.log_tail()));
        }
        if Instant::now() > deadline {
            return Err(format!("the proxy is not ready after {READY_WITHIN:?}:\n{}", demo.log_tail()));
        }
        sleep(LOOK_EVERY).await;
    }
    Ok(demo)
}

fn instructions(demo: &Demo) {
    let itself = std::env::current_exe().map_or_else(|_| "slackwater".to_owned(), |path| path.display().to_string());
    let admin = demo.admin();
    say(&format!(
        "page:   http://{http}/ (and /slow, which takes 1.5 s: begin it, then swap)\n\
         status: http://{ops}/ in a browser, or {itself} status --admin {admin}\n\
         swap:   {itself} swap php green --wait --admin {admin}\n\
         back:   {itself} swap php blue --wait --admin {admin}\n\
         files:  {folder} (removed at the end)\n\
         Ctrl-C ends it",
        http = demo.http,
        ops = demo.ops,
        admin = admin.display(),
        folder = demo.folder.0.display(),
    ));
}

fn configuration(folder: &Path, http: SocketAddr, ops: SocketAddr, pools: &Pools, sabotage: Option<Sabotage>) -> String {
    let path = |name: &str| quoted(&folder.join(name));
    // A slow page takes 1.5 s: with this it cannot end in time.
    let drain = if sabotage == Some(Sabotage::Cut) {
        "grace = \"500ms\"\nlame_duck = \"0s\"\nmargin = \"200ms\""
    } else {
        "grace = \"15s\"\nlame_duck = \"3s\""
    };
    let (workers, status) = match pools {
        Pools::Real(_) => ("\"auto\"".to_owned(), "status_path = \"/status\"\n"),
        Pools::BuiltIn(_) => (pools::WORKERS.to_string(), ""),
    };
    let [blue, green] = pools.addresses();
    format!(
        "[listen]\nhttp = [\"{http}\"]\nops = \"{ops}\"\nadmin = {admin}\ntrusted_proxies = [\"127.0.0.0/8\"]\n\
         max_uri_bytes = \"16KiB\"\n\n\
         [buffer]\ndir = {folder}\n\n[log]\nformat = \"text\"\naccess_file = {access}\n\n\
         [drain]\n{drain}\nreceipt = {receipt}\n\n\
         [upstream.php]\nactive = \"blue\"\nworkers_per_endpoint = {workers}\nread_timeout = \"10s\"\n\n\
         [upstream.php.set.blue]\nendpoints = [\"{blue}\"]\n{status}\n\
         [upstream.php.set.green]\nendpoints = [\"{green}\"]\n{status}\n\
         [[site]]\nroot = {public}\nupstream = \"php\"\n",
        admin = path("admin.sock"),
        folder = quoted(folder),
        access = path("access.log"),
        receipt = path("drain.json"),
        public = path("public"),
    )
}

fn quoted(path: &Path) -> String {
    toml::Value::String(path.display().to_string()).to_string()
}

/// The status of /readyz; `None` where nobody answers.
async fn ready(ops: SocketAddr) -> Option<u16> {
    let ask = async {
        let mut stream = TcpStream::connect(ops).await?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        io::Result::Ok(answer)
    };
    let answer = timeout(Duration::from_secs(2), ask).await.ok()?.ok()?;
    str::from_utf8(answer.get(9..12)?).ok()?.parse().ok()
}

/// Its reader may have left; that must not keep the children alive.
fn say(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

fn tail(log: &Path) -> String {
    let text =
        fs::read(log).map_or_else(|e| format!("{}: {e}", log.display()), |bytes| String::from_utf8_lossy(&bytes).into_owned());
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL)..].join("\n")
}

/// A port that was free just now.
fn free_port() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

fn write_readable(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, Permissions::from_mode(0o644))
}

struct Folder(PathBuf);

impl Folder {
    /// FPM started by root changes its user, who must get through.
    fn make(for_others: bool) -> io::Result<Folder> {
        let path = std::env::temp_dir().join(format!("slackwater-demo-{:016x}", rand::random::<u64>()));
        // Fails where there is one already: nobody can have prepared it for us.
        DirBuilder::new().mode(0o700).create(&path)?;
        let folder = Folder(path);
        if for_others && rustix::process::geteuid().is_root() {
            fs::set_permissions(&folder.0, Permissions::from_mode(0o755))?;
        }
        Ok(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("slackwater: demo: {} is left: {error}", self.0.display());
        }
    }
}

/// A process of ours in a group of its own: Ctrl-C reaches only this one, which then ends them in order.
fn spawn(command: &mut Command) -> io::Result<Child> {
    command.stdin(Stdio::null()).process_group(0).spawn()
}

fn send(child: &Child, signal: Signal) {
    // Not yet waited for, so the pid is still its own.
    let _ = kill_process(Pid::from_child(child), signal);
}

/// Asks with `first`, then ends the whole group. Blocks: nothing else goes on any more.
fn end(child: &mut Child, first: Signal, within: Duration) {
    if matches!(child.try_wait(), Ok(Some(_))) {
        return;
    }
    send(child, first);
    let deadline = Instant::now() + within;
    while Instant::now() < deadline {
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
    let _ = child.wait();
}

struct Proxy(Child);

impl Proxy {
    fn start(config: &Path, log: &Path) -> io::Result<Proxy> {
        let log = File::create(log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve").arg("--config").arg(config).stdout(log.try_clone()?).stderr(log);
        spawn(&mut command).map(Proxy)
    }

    fn signal(&self, signal: Signal) {
        send(&self.0, signal);
    }

    fn has_exited(&mut self) -> Result<Option<ExitStatus>, String> {
        self.0.try_wait().map_err(|e| format!("waiting for the proxy: {e}"))
    }

    async fn exited(&mut self) -> Result<ExitStatus, String> {
        loop {
            if let Some(status) = self.has_exited()? {
                return Ok(status);
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        end(&mut self.0, Signal::INT, GONE_WITHIN);
    }
}
