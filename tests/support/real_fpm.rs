//! A real php-fpm with a configuration of its own in a temporary folder, over `tests/php`.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::Instant;

use super::fastcgi::{self, Answer, FpmAddress};
use super::{children, ports};

/// Until a started FPM answers its ping, and until a stopped one is gone.
const DEADLINE: Duration = Duration::from_secs(15);

const BINARIES: [&str; 5] =
    ["/usr/sbin/php-fpm8.2", "/usr/sbin/php-fpm", "/usr/local/sbin/php-fpm", "/usr/sbin/php-fpm8.3", "/usr/sbin/php-fpm8.4"];

/// `pm`, with the children it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pm {
    Static(usize),
    Dynamic(usize),
    OnDemand(usize),
}

/// What [`RealFpm::builder`] collects.
#[derive(Clone, Debug)]
pub struct Builder {
    colour: String,
    pm: Pm,
    max_requests: usize,
    unix: bool,
    at: Option<std::net::SocketAddr>,
    status_listen: bool,
    status_at: Option<std::net::SocketAddr>,
    status: bool,
    ping: bool,
    process_control_timeout: Duration,
    request_terminate_timeout: Duration,
    docroot: Option<PathBuf>,
    env: Vec<(String, String)>,
    ini: Vec<(String, String)>,
    pool: Vec<String>,
}

impl Builder {
    pub fn pm(mut self, pm: Pm) -> Builder {
        self.pm = pm;
        self
    }

    /// `pm = static` with so many children.
    pub fn workers(self, n: usize) -> Builder {
        self.pm(Pm::Static(n))
    }

    pub fn max_requests(mut self, n: usize) -> Builder {
        self.max_requests = n;
        self
    }

    /// This address instead of a free one on loopback.
    pub fn at(mut self, address: std::net::SocketAddr) -> Builder {
        self.at = Some(address);
        self
    }

    /// Listens on a unix socket in its folder.
    pub fn unix(mut self) -> Builder {
        self.unix = true;
        self
    }

    /// `pm.status_listen` on a port of its own: [`RealFpm::status_address`].
    pub fn status_listen(mut self) -> Builder {
        self.status_listen = true;
        self
    }

    /// `pm.status_listen` there.
    pub fn status_at(mut self, address: std::net::SocketAddr) -> Builder {
        self.status_at = Some(address);
        self.status_listen()
    }

    /// Neither `pm.status_path` nor `ping.path`, as in stock FPM.
    pub fn without_probes(mut self) -> Builder {
        (self.status, self.ping) = (false, false);
        self
    }

    /// Default 10 s; zero is FPM's own default, at which QUIT cuts running requests.
    pub fn process_control_timeout(mut self, timeout: Duration) -> Builder {
        self.process_control_timeout = timeout;
        self
    }

    pub fn request_terminate_timeout(mut self, timeout: Duration) -> Builder {
        self.request_terminate_timeout = timeout;
        self
    }

    /// Serves this folder instead of a copy of `tests/php`; it must be readable by www-data.
    pub fn docroot(mut self, folder: &Path) -> Builder {
        self.docroot = Some(folder.to_owned());
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Builder {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// `php_admin_value`.
    pub fn ini(mut self, name: &str, value: &str) -> Builder {
        self.ini.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A line of the pool's section as it is.
    pub fn pool(mut self, line: &str) -> Builder {
        self.pool.push(line.to_owned());
        self
    }

    /// Starts it and waits until it answers. Panics with its log otherwise, or if there is none on this machine.
    pub async fn start(self) -> RealFpm {
        let binary = BINARIES.iter().map(Path::new).find(|path| path.exists());
        let binary = binary.expect("no php-fpm on this machine: apt-get install php8.2-fpm (tests/run does it)").to_owned();
        let folder = tempfile::Builder::new().prefix("fpm-").tempdir().expect("a temporary folder");
        // The workers run as www-data and must get through.
        open_to_all(folder.path(), 0o755);
        let docroot = match &self.docroot {
            Some(given) => given.clone(),
            None => {
                let docroot = folder.path().join("php");
                copy(&php_folder(), &docroot);
                docroot
            }
        };
        let journal = folder.path().join("journal");
        fs::write(&journal, "").expect("the journal is made");
        open_to_all(&journal, 0o666);
        let address = if self.unix {
            FpmAddress::Unix(folder.path().join("fpm.sock"))
        } else {
            FpmAddress::Tcp(self.at.unwrap_or_else(ports::free_address))
        };
        let status_address = self.status_listen.then(|| FpmAddress::Tcp(self.status_at.unwrap_or_else(ports::free_address)));
        let mut fpm = RealFpm { plan: self, binary, folder, docroot, journal, address, status_address, child: None };
        fs::write(fpm.folder.path().join("fpm.conf"), fpm.configuration()).expect("the configuration is written");
        fpm.launch().await;
        fpm
    }
}

/// The running pool. Dropped, it is killed with its workers.
#[derive(Debug)]
pub struct RealFpm {
    plan: Builder,
    binary: PathBuf,
    folder: TempDir,
    docroot: PathBuf,
    journal: PathBuf,
    address: FpmAddress,
    status_address: Option<FpmAddress>,
    child: Option<Child>,
}

impl RealFpm {
    /// Four static workers on TCP, with status and ping, `process_control_timeout` 10 s.
    pub async fn start(colour: &str) -> RealFpm {
        RealFpm::builder(colour).start().await
    }

    pub fn builder(colour: &str) -> Builder {
        Builder {
            colour: colour.to_owned(),
            pm: Pm::Static(4),
            max_requests: 0,
            unix: false,
            at: None,
            status_listen: false,
            status_at: None,
            status: true,
            ping: true,
            process_control_timeout: Duration::from_secs(10),
            request_terminate_timeout: Duration::ZERO,
            docroot: None,
            env: Vec::new(),
            ini: Vec::new(),
            pool: Vec::new(),
        }
    }

    /// As `endpoints` wants it when displayed.
    pub fn address(&self) -> &FpmAddress {
        &self.address
    }

    /// Panics on a unix socket.
    pub fn tcp_address(&self) -> std::net::SocketAddr {
        match &self.address {
            FpmAddress::Tcp(address) => *address,
            FpmAddress::Unix(path) => panic!("{} is no TCP address", path.display()),
        }
    }

    pub fn status_address(&self) -> Option<&FpmAddress> {
        self.status_address.as_ref()
    }

    /// The folder of the scripts, a copy that the test may change.
    pub fn docroot(&self) -> &Path {
        &self.docroot
    }

    /// FPM's error log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("fpm.log")).unwrap_or_default()
    }

    /// What the scripts noted, in order: "begin ID METHOD PID", "end ...", "worked ...". All but hello.php do.
    pub fn journal(&self) -> Vec<String> {
        fs::read_to_string(&self.journal).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// How often a script began for the request with this ledger or request id.
    pub fn executions(&self, id: &str) -> usize {
        let start = format!("begin {id} ");
        self.journal().iter().filter(|line| line.starts_with(&start)).count()
    }

    /// The master's process id; panics when it is not running.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("FPM is running").id()
    }

    /// The workers' process ids.
    pub fn pids(&self) -> Vec<u32> {
        self.child.as_ref().map(|child| children::children_of(child.id())).unwrap_or_default()
    }

    /// Asks for a script over FastCGI, past the proxy.
    pub async fn ask(&self, script: &str, query: &str) -> std::io::Result<Answer> {
        let params = fastcgi::script_params(&self.docroot.display().to_string(), script, query);
        let params: Vec<(&str, &str)> = params.iter().map(|(name, value)| (*name, value.as_str())).collect();
        fastcgi::ask(&self.address, &params, &[]).await
    }

    /// `pm.status_path?json&full`, past the proxy. It takes a worker unless there is a [`Builder::status_listen`].
    pub async fn status(&self) -> std::io::Result<serde_json::Value> {
        let params = fastcgi::script_params("", "/status", "json&full");
        let params: Vec<(&str, &str)> = params.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let address = self.status_address.as_ref().unwrap_or(&self.address);
        let answer = fastcgi::ask(address, &params, &[]).await?;
        serde_json::from_slice(answer.body()).map_err(std::io::Error::other)
    }

    /// SIGQUIT: finishes running requests within `process_control_timeout`, then ends. Returns at once.
    pub fn quit(&self) {
        children::signal(self.pid(), libc::SIGQUIT);
    }

    /// SIGUSR2: FPM's own reload.
    pub fn reload(&self) {
        children::signal(self.pid(), libc::SIGUSR2);
    }

    /// SIGKILL for master and workers together, as a node that dies; when it returns they are gone.
    pub fn kill(&mut self) {
        if let Some(child) = self.child.take() {
            children::kill_family(child);
        }
    }

    /// SIGKILL for one worker, the one with this place in [`RealFpm::pids`]; returns its pid. The master
    /// forks another: [`RealFpm::wait_ready`].
    pub fn kill_worker(&self, nth: usize) -> u32 {
        let pid = self.pids()[nth];
        children::kill(pid);
        pid
    }

    /// Waits until the master has ended; its exit code, or -1 for a signal.
    pub async fn wait_exit(&mut self) -> i32 {
        let deadline = Instant::now() + self.plan.process_control_timeout + DEADLINE;
        let child = self.child.as_mut().expect("FPM is running");
        loop {
            if let Some(status) = child.try_wait().expect("the child is ours") {
                self.child = None;
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < deadline, "FPM did not end: {}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Kills what runs, and starts anew on the same address with the same configuration.
    pub async fn restart(&mut self) {
        self.kill();
        self.launch().await;
    }

    /// As a deploy on a machine of its own does it: QUIT, and when the master has finished and gone, started anew.
    pub async fn quit_and_start(&mut self) {
        self.quit();
        assert_eq!(self.wait_exit().await, 0, "{}", self.log());
        self.launch().await;
    }

    /// Until it answers a ping (or, without one, a script) by FastCGI and, with `pm = static`, has all its workers.
    pub async fn wait_ready(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let asked = tokio::time::timeout(DEADLINE, async {
                if self.plan.ping {
                    let params = fastcgi::script_params("", "/ping", "");
                    let params: Vec<(&str, &str)> = params.iter().map(|(name, value)| (*name, value.as_str())).collect();
                    fastcgi::ask(&self.address, &params, &[]).await
                } else {
                    self.ask("/hello.php", "").await
                }
            });
            match asked.await {
                Ok(Ok(_)) if self.has_all_workers().await => return,
                Ok(Ok(_)) => assert!(Instant::now() < deadline, "FPM lacks workers:\n{}", self.log()),
                Ok(Err(error)) => assert!(Instant::now() < deadline, "FPM is not ready: {error}\n{}", self.log()),
                Err(_) => panic!("FPM takes the ping and does not answer:\n{}", self.log()),
            }
            let ended = self.child.as_mut().expect("FPM has been started").try_wait().expect("the child is ours");
            assert!(ended.is_none(), "FPM ended at once, {ended:?}:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Static workers count in FPM's status only once they have come to accept(), some milliseconds after the fork; the
    /// first of them answers before the last is there.
    async fn has_all_workers(&self) -> bool {
        match self.plan.pm {
            Pm::Static(n) if self.plan.status => self.status().await.is_ok_and(|status| status["total processes"] == n),
            Pm::Static(n) => self.pids().len() == n,
            Pm::Dynamic(_) | Pm::OnDemand(_) => true,
        }
    }

    async fn launch(&mut self) {
        if let FpmAddress::Unix(path) = &self.address {
            let _ = fs::remove_file(path);
        }
        let mut command = Command::new(&self.binary);
        command.arg("--nodaemonize").arg("--fpm-config").arg(self.folder.path().join("fpm.conf"));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // What it says before its log is open.
        command.stderr(fs::File::create(self.folder.path().join("stderr")).expect("a file in our folder"));
        // SIGTERM lets the master take its workers along.
        let child = children::spawn(command, libc::SIGTERM).expect("php-fpm starts");
        self.child = Some(child);
        self.wait_ready().await;
    }

    fn configuration(&self) -> String {
        let plan = &self.plan;
        let folder = self.folder.path().display();
        let listen = match &self.address {
            FpmAddress::Tcp(address) => address.to_string(),
            FpmAddress::Unix(path) => path.display().to_string(),
        };
        let mut text = format!(
            "[global]\ndaemonize = no\nerror_log = {folder}/fpm.log\nprocess_control_timeout = {}\n\n[www]\nlisten = {listen}\n\
             listen.mode = 0666\nlisten.backlog = 511\ncatch_workers_output = yes\ndecorate_workers_output = no\nclear_env = yes\n\
             pm.max_requests = {}\nrequest_terminate_timeout = {}\nenv[COLOUR] = {}\nenv[JOURNAL] = {}\n",
            plan.process_control_timeout.as_secs(),
            plan.max_requests,
            plan.request_terminate_timeout.as_secs(),
            plan.colour,
            self.journal.display(),
        );
        // SAFETY: geteuid cannot fail.
        if unsafe { libc::geteuid() } == 0 {
            text += &format!("user = {0}\ngroup = {1}\n", user().0, user().1);
        }
        text += &match plan.pm {
            Pm::Static(n) => format!("pm = static\npm.max_children = {n}\n"),
            Pm::Dynamic(n) => format!(
                "pm = dynamic\npm.max_children = {n}\npm.start_servers = 1\npm.min_spare_servers = 1\npm.max_spare_servers = {}\n",
                n.div_ceil(2)
            ),
            Pm::OnDemand(n) => {
                format!("pm = ondemand\npm.max_children = {n}\npm.process_idle_timeout = 10s\n")
            }
        };
        if plan.status {
            text += "pm.status_path = /status\n";
        }
        if plan.ping {
            text += "ping.path = /ping\nping.response = pong\n";
        }
        if let Some(address) = &self.status_address {
            let _ = writeln!(text, "pm.status_listen = {address}");
        }
        let limits = [
            ("post_max_size", "256M"),
            ("upload_max_filesize", "256M"),
            ("opcache.validate_timestamps", "1"),
            ("opcache.revalidate_freq", "0"),
        ];
        for (name, value) in limits {
            let _ = writeln!(text, "php_admin_value[{name}] = {value}");
        }
        for (name, value) in &plan.ini {
            let _ = writeln!(text, "php_admin_value[{name}] = {value}");
        }
        for (name, value) in &plan.env {
            let _ = writeln!(text, "env[{name}] = {value}");
        }
        for line in &plan.pool {
            let _ = writeln!(text, "{line}");
        }
        text
    }
}

impl Drop for RealFpm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The repository's `tests/php`.
pub fn php_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/php")
}

/// Copies a folder and what is in it, readable by all.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder for the copy");
    open_to_all(to, 0o755);
    let entries = fs::read_dir(from).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    for entry in entries.flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).expect("a file is copied");
            open_to_all(&target, 0o644);
        }
    }
}

fn open_to_all(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("the file is ours");
}

/// Debian's www-data, else nobody, and the group of each.
fn user() -> (&'static str, &'static str) {
    let known = fs::read_to_string("/etc/passwd").unwrap_or_default();
    if known.lines().any(|line| line.starts_with("www-data:")) { ("www-data", "www-data") } else { ("nobody", "nogroup") }
}
