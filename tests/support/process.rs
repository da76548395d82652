//! The real `slackwater` as a process of its own, with free ports and everything it logs at hand.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{children, http, ports};

/// Until a started proxy is ready.
const READY: Duration = Duration::from_secs(15);

/// Until a command of the command line has ended by itself.
const CLI: Duration = Duration::from_secs(120);

/// What is asked before `start` returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// `/readyz` says 200.
    Ready,
    /// `/livez` says 200: PHP may be away.
    Live,
    /// Nothing.
    No,
}

/// What [`Slackwater::builder`] collects.
#[derive(Clone, Debug)]
pub struct Builder {
    binary: PathBuf,
    toml: String,
    wait: Wait,
    env: Vec<(String, String)>,
    args: Vec<String>,
    at: Option<std::net::IpAddr>,
}

impl Builder {
    /// On this address, with the ports that a pod has: 8080, 8443 and 9901. For tests in a network of their own.
    pub fn at(mut self, address: std::net::IpAddr) -> Builder {
        self.at = Some(address);
        self
    }

    pub fn wait(mut self, wait: Wait) -> Builder {
        self.wait = wait;
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Builder {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Another argument behind `serve --config FILE`.
    pub fn arg(mut self, arg: &str) -> Builder {
        self.args.push(arg.to_owned());
        self
    }

    pub fn binary(mut self, binary: impl Into<PathBuf>) -> Builder {
        self.binary = binary.into();
        self
    }

    /// Panics with everything it logged if it ends, or is not ready in time.
    pub async fn start(self) -> Slackwater {
        let folder = tempfile::Builder::new().prefix("slackwater-").tempdir().expect("a temporary folder");
        let [http, ops, https] = match self.at {
            Some(address) => [8080, 9901, 8443].map(|port| (address, port).into()),
            None => std::array::from_fn(|_| ports::free_address()),
        };
        let places = Places { http, ops, https, admin: folder.path().join("admin.sock"), folder: folder.path().to_owned() };
        let config = folder.path().join("slackwater.toml");
        fs::write(&config, places.fill(&self.toml)).expect("the configuration is written");
        let mut command = Command::new(&self.binary);
        command.arg("serve").arg("--config").arg(&config).args(&self.args);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            children::spawn(command, libc::SIGKILL).unwrap_or_else(|error| panic!("{}: {error}", self.binary.display()));
        let log = watch::Sender::new(Vec::new());
        follow(child.stdout.take().expect("stdout is piped"), Stream::Stdout, log.clone());
        follow(child.stderr.take().expect("stderr is piped"), Stream::Stderr, log.clone());
        let mut slackwater = Slackwater { binary: self.binary, folder, config, places, child, exit: None, log };
        match self.wait {
            Wait::Ready => slackwater.wait_status("/readyz", 200).await,
            Wait::Live => slackwater.wait_status("/livez", 200).await,
            Wait::No => {}
        }
        slackwater
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// One line that it wrote.
#[derive(Clone, Debug)]
pub struct Line {
    pub stream: Stream,
    pub at: Instant,
    pub text: String,
}

/// The running proxy. Dropped, it is killed.
#[derive(Debug)]
pub struct Slackwater {
    binary: PathBuf,
    folder: TempDir,
    config: PathBuf,
    places: Places,
    child: Child,
    exit: Option<i32>,
    log: watch::Sender<Vec<Line>>,
}

#[derive(Clone, Debug)]
struct Places {
    http: SocketAddr,
    https: SocketAddr,
    ops: SocketAddr,
    admin: PathBuf,
    folder: PathBuf,
}

impl Places {
    /// {HTTP}, {HTTPS}, {OPS}: addresses with port; {ADMIN}: the socket's path; {DIR}: the temporary folder. A file
    /// without a `[listen]` gets one at its end.
    fn fill(&self, toml: &str) -> String {
        let mut toml = toml.to_owned();
        if !toml.lines().any(|line| line.trim() == "[listen]") {
            toml += "\n[listen]\nhttp = [\"{HTTP}\"]\nops = \"{OPS}\"\nadmin = \"{ADMIN}\"\n";
        }
        toml.replace("{HTTP}", &self.http.to_string())
            .replace("{HTTPS}", &self.https.to_string())
            .replace("{OPS}", &self.ops.to_string())
            .replace("{ADMIN}", &self.admin.display().to_string())
            .replace("{DIR}", &self.folder.display().to_string())
    }
}

impl Slackwater {
    /// The binary of this crate, ready. For placeholders in the configuration see [`Slackwater::rewrite`].
    pub async fn start(toml: &str) -> Slackwater {
        Slackwater::builder(toml).start().await
    }

    /// Without [`Builder::binary`] this crate's own binary, which cargo builds for integration tests.
    pub fn builder(toml: &str) -> Builder {
        let binary = option_env!("CARGO_BIN_EXE_slackwater").unwrap_or("slackwater").into();
        Builder { binary, toml: toml.to_owned(), wait: Wait::Ready, env: Vec::new(), args: Vec::new(), at: None }
    }

    /// Where requests go: `{HTTP}`.
    pub fn http(&self) -> SocketAddr {
        self.places.http
    }

    /// `{HTTPS}`: only if the configuration names it.
    pub fn https(&self) -> SocketAddr {
        self.places.https
    }

    /// `{OPS}`.
    pub fn ops(&self) -> SocketAddr {
        self.places.ops
    }

    /// `{ADMIN}`.
    pub fn admin(&self) -> &Path {
        &self.places.admin
    }

    /// `{DIR}`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn config(&self) -> &Path {
        &self.config
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes the configuration anew, with {HTTP}, {HTTPS}, {OPS}, {ADMIN} and {DIR} filled as at start; a reload is up
    /// to the caller. The file is replaced, not rewritten, so that nobody reads half of it.
    pub fn rewrite(&self, toml: &str) {
        let new = self.folder.path().join("slackwater.toml.new");
        fs::write(&new, self.places.fill(toml)).expect("the configuration is written");
        fs::rename(&new, &self.config).expect("the configuration is replaced");
    }

    /// For example `libc::SIGHUP`.
    pub fn signal(&self, signal: libc::c_int) {
        assert!(self.exit.is_none(), "it has already ended");
        children::signal(self.child.id(), signal);
    }

    pub fn terminate(&self) {
        self.signal(libc::SIGTERM);
    }

    pub fn is_running(&mut self) -> bool {
        self.poll_exit().is_none()
    }

    /// Its exit code; 128 and the signal's number if it died of one, as a shell has it. Panics with the log.
    pub async fn wait_exit(&mut self, deadline: Duration) -> i32 {
        let end = Instant::now() + deadline;
        loop {
            if let Some(code) = self.poll_exit() {
                return code;
            }
            assert!(Instant::now() < end, "still running after {deadline:?}:\n{}", self.log_text());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Runs the same binary with these arguments and `--admin`, to its end.
    pub async fn cli(&self, args: &[&str]) -> Output {
        let mut args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        args.extend(["--admin".to_owned(), self.places.admin.display().to_string()]);
        run(&self.binary, args, Vec::new()).await
    }

    /// As [`Slackwater::cli`]; panics unless it exits with 0. What it printed.
    pub async fn cli_ok(&self, args: &[&str]) -> String {
        let output = self.cli(args).await;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{args:?}: {}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
        text
    }

    /// `status --json`.
    pub async fn status(&self) -> serde_json::Value {
        let text = self.cli_ok(&["status", "--json"]).await;
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text:?}"))
    }

    /// `/metrics`.
    pub async fn metrics(&self) -> String {
        http::get(self.ops(), "/metrics").await.expect("the ops port answers").text()
    }

    /// The value of the first sample in `/metrics` whose name and labels contain all of these.
    pub async fn metric(&self, parts: &[&str]) -> Option<f64> {
        let metrics = self.metrics().await;
        let mut samples = metrics.lines().filter(|line| !line.starts_with('#'));
        let found = samples.find(|line| parts.iter().all(|part| line.contains(part)))?;
        found.rsplit_once(' ')?.1.parse().ok()
    }

    /// Until an ops path answers with this status. Panics with the log after 15 s, or if the process ends.
    pub async fn wait_status(&mut self, path: &str, status: u16) {
        let end = Instant::now() + READY;
        loop {
            let answer = tokio::time::timeout(READY, http::get(self.ops(), path)).await;
            let seen = match answer {
                Ok(Ok(answer)) if answer.status == status => return,
                Ok(Ok(answer)) => format!("{} {}", answer.status, answer.text()),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer".to_owned(),
            };
            if let Some(code) = self.poll_exit() {
                panic!("it ended with {code}:\n{}", self.log_text());
            }
            assert!(Instant::now() < end, "{path} is not {status} but: {seen}\n{}", self.log_text());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// All lines so far.
    pub fn log(&self) -> Vec<Line> {
        self.log.borrow().clone()
    }

    pub fn log_text(&self) -> String {
        self.log.borrow().iter().map(|line| format!("{}\n", line.text)).collect()
    }

    /// Lines that are JSON objects.
    pub fn log_json(&self) -> Vec<serde_json::Value> {
        self.log.borrow().iter().filter_map(|line| serde_json::from_str(&line.text).ok()).collect()
    }

    /// The first line that contains `text`, from the beginning of the log on. Panics with the log.
    pub async fn wait_for_log(&self, text: &str, deadline: Duration) -> String {
        self.wait_for_log_after(0, text, deadline).await
    }

    /// As [`Slackwater::wait_for_log`], the first `skip` lines left out: take `log().len()` before the deed.
    pub async fn wait_for_log_after(&self, skip: usize, text: &str, deadline: Duration) -> String {
        let find = |lines: &Vec<Line>| lines.iter().skip(skip).find(|line| line.text.contains(text)).map(|line| line.text.clone());
        let mut lines = self.log.subscribe();
        let found = tokio::time::timeout(deadline, lines.wait_for(|lines| find(lines).is_some())).await;
        match found {
            Ok(Ok(lines)) => find(&lines).expect("just seen"),
            _ => panic!("no line with {text:?} within {deadline:?}:\n{}", self.log_text()),
        }
    }

    /// SIGKILL; when it returns the process is gone.
    pub fn kill(&mut self) {
        if self.poll_exit().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    fn poll_exit(&mut self) -> Option<i32> {
        use std::os::unix::process::ExitStatusExt;
        if self.exit.is_none()
            && let Some(status) = self.child.try_wait().expect("the child is ours")
        {
            self.exit = Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()));
        }
        self.exit
    }
}

impl Drop for Slackwater {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- slackwater's log ---\n{}", self.log_text());
        }
    }
}

/// Runs this crate's binary without a running proxy (check, render), with these variables set.
pub async fn slackwater(args: &[&str], env: &[(&str, &str)]) -> Output {
    let binary = option_env!("CARGO_BIN_EXE_slackwater").unwrap_or("slackwater");
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    run(Path::new(binary), args.iter().map(|arg| (*arg).to_owned()).collect(), env).await
}

/// On a thread of its own: the fakes that the command may be waiting for live on this one.
async fn run(binary: &Path, args: Vec<String>, env: Vec<(String, String)>) -> Output {
    let mut command = Command::new(binary);
    command.args(&args).envs(env).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = children::spawn(command, libc::SIGKILL).unwrap_or_else(|error| panic!("{}: {error}", binary.display()));
    let pid = child.id();
    let mut ended = tokio::task::spawn_blocking(move || child.wait_with_output());
    match tokio::time::timeout(CLI, &mut ended).await {
        Ok(output) => output.expect("the thread does not panic").expect("the output is read"),
        Err(_) => {
            children::signal(pid, libc::SIGKILL);
            panic!("{args:?} did not end within {CLI:?}");
        }
    }
}

fn follow(pipe: impl Read + Send + 'static, stream: Stream, log: watch::Sender<Vec<Line>>) {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n') {
            let Ok(line) = line else { return };
            let text = String::from_utf8_lossy(&line).into_owned();
            log.send_modify(|lines| lines.push(Line { stream, at: Instant::now(), text }));
        }
    });
}
