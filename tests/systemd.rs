//! As systemd starts, watches and ends it: `config/systemd/slackwater.service`.

mod support;

use std::{
    os::unix::net::UnixDatagram,
    process::Command,
    time::{Duration, Instant},
};

use support::{
    gate::eventually,
    hung::HungThread,
    ports,
    process::{Slackwater, Wait},
    scripted_fpm::{Behaviour, ScriptedFpm},
};

fn toml(endpoint: std::net::SocketAddr) -> String {
    format!(
        "workers = 2\n[listen]\nhttp = [\"{{HTTP}}\"]\nops = \"{{OPS}}\"\nadmin = \"{{ADMIN}}\"\n[drain]\nlame_duck = \"0s\"\n\
         [upstream.php.set.blue]\nendpoints = [\"{endpoint}\"]\nping = \"/ping\"\n[[site]]\nphp_root = \"/app\"\nscripts = [\"/*.php\"]\nupstream = \"php\"\n"
    )
}

/// systemd's end of `NOTIFY_SOCKET`.
struct Systemd {
    folder: tempfile::TempDir,
    socket: UnixDatagram,
}

impl Systemd {
    fn new() -> Systemd {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Systemd { folder, socket }
    }

    fn path(&self) -> String {
        self.folder.path().join("notify").display().to_string()
    }

    fn next(&self) -> String {
        let mut buffer = [0; 4096];
        let n = self.socket.recv(&mut buffer).expect("systemd is told something");
        String::from_utf8(buffer[..n].to_vec()).unwrap()
    }

    /// Reads on to a message that has this in it.
    fn until(&self, wanted: &str) -> String {
        let begun = Instant::now();
        loop {
            let message = self.next();
            if message.contains(wanted) {
                return message;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "{wanted} is not said, but {message}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_that_it_listens_how_it_is_and_that_it_ends() {
    let systemd = Systemd::new();
    let nobody = ports::free_address();
    let mut proxy = Slackwater::builder(&toml(nobody)).env("NOTIFY_SOCKET", &systemd.path()).wait(Wait::Live).start().await;
    assert_eq!(systemd.next().trim(), "READY=1");
    let starting = systemd.until("no usable endpoint");
    assert!(starting.starts_with("STATUS=Starting: upstream php has no usable endpoint in set blue"), "{starting}");
    let fpm = ScriptedFpm::builder(Behaviour::hello("blue")).at(nobody).start().await;
    systemd.until("STATUS=Running, connections");
    drop(fpm);
    systemd.until("STATUS=Running, but upstream php has no usable endpoint in set blue");
    proxy.terminate();
    systemd.until("STOPPING=1");
    assert_eq!(proxy.wait_exit(Duration::from_secs(20)).await, 0);
}

/// A service manager that does not read holds up what it is told, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_waits_for_a_systemd_that_does_not_read() {
    let systemd = Systemd::new();
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let builder = Slackwater::builder(&toml(fpm.address())).env("NOTIFY_SOCKET", &systemd.path());
    let mut proxy = builder.env("WATCHDOG_USEC", "300000").start().await;
    // More than the socket holds (net.unix.max_dgram_qlen, 10 as a rule).
    let full = UnixDatagram::unbound().unwrap();
    full.set_nonblocking(true).unwrap();
    eventually("the socket takes no more", async || match full.send_to(b"X=1", systemd.path()) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    // From here on each word to systemd waits, and there is one every 100 ms.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(proxy.status().await["phase"], "Running");
    proxy.terminate();
    assert_eq!(proxy.wait_exit(Duration::from_secs(20)).await, 0);
    drop(systemd);
}

/// With `WatchdogSec` it says that it lives, but not while a worker hangs: systemd would end it then.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_hangs_is_no_sign_of_life() {
    let systemd = Systemd::new();
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let watchdog = ("WATCHDOG_USEC", "3000000");
    let proxy =
        Slackwater::builder(&toml(fpm.address())).env("NOTIFY_SOCKET", &systemd.path()).env(watchdog.0, watchdog.1).start().await;
    let begun = Instant::now();
    for _ in 0..3 {
        systemd.until("WATCHDOG=1");
    }
    assert!(begun.elapsed() < Duration::from_secs(9), "three signs of life within three limits: {:?}", begun.elapsed());
    let mut hung = HungThread::of(proxy.pid(), "worker-0").await;
    systemd.until("no sign of life from workers [0]");
    // A whole limit without one.
    systemd.socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let silence = Instant::now();
    let mut buffer = [0; 4096];
    while silence.elapsed() < Duration::from_secs(4) {
        if let Ok(n) = systemd.socket.recv(&mut buffer) {
            assert!(!buffer[..n].starts_with(b"WATCHDOG"), "a sign of life after {:?}", silence.elapsed());
        }
    }
    systemd.socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    hung.let_go().await;
    systemd.until("WATCHDOG=1");
}

/// The unit is one that systemd takes as it stands, with this binary in its place.
#[test]
fn the_unit_is_good() {
    let folder = tempfile::tempdir().unwrap();
    let unit = std::fs::read_to_string("config/systemd/slackwater.service").unwrap();
    let path = folder.path().join("slackwater.service");
    std::fs::write(&path, unit.replace("/usr/local/bin/slackwater", env!("CARGO_BIN_EXE_slackwater"))).unwrap();
    let output =
        Command::new("systemd-analyze").arg("verify").arg(&path).output().expect("systemd-analyze (tests/run installs it)");
    let said = String::from_utf8_lossy(&output.stderr);
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("slackwater.service")).collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");
    for line in [
        "Type=notify",
        "WatchdogSec=10",
        "Environment=GRACE=30",
        "TimeoutStopSec=30",
        "ExecReload=/usr/local/bin/slackwater reload",
    ] {
        assert!(unit.lines().any(|found| found == line), "{line}");
    }
}
