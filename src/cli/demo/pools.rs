//! The two pools: real PHP-FPM where there is one, else the built-in responder in threads of this process.

use std::{
    fmt::Write as _,
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::{BufMut, BytesMut};
use rustix::process::Signal;
use tokio::{net::TcpStream, sync::oneshot, time::sleep};

use crate::fastcgi::responder::{self, Reply, Request, Socket};

/// Of each pool.
pub const WORKERS: usize = 4;
const COLOURS: [&str; 2] = ["blue", "green"];
const SLOW: Duration = Duration::from_millis(1500);
/// Until a pool accepts, and until it has gone after QUIT.
const WITHIN: Duration = Duration::from_secs(5);

/// Waits on a socket and not in sleep(): a signal to the pool would end a sleep early.
pub const INDEX_PHP: &str = r#"<?php
$colour = getenv('COLOUR') ?: 'none';
$id = $_SERVER['HTTP_X_REQUEST_ID'] ?? '';
$body = file_get_contents('php://input');
if (strtok($_SERVER['REQUEST_URI'], '?') === '/slow') {
    $socket = stream_socket_server('udp://127.0.0.1:0', $code, $message, STREAM_SERVER_BIND);
    $until = hrtime(true) + 1500000000;
    while (($left = $until - hrtime(true)) > 0) {
        $read = [$socket];
        $write = $except = null;
        if (@stream_select($read, $write, $except, intdiv($left, 1000000000), intdiv($left % 1000000000, 1000))) {
            fread($socket, 65536);
        }
    }
}
header("X-Colour: $colour");
header('X-Body-Length: ' . strlen($body));
header('X-Body-Fnv1a64: ' . hash('fnv1a64', $body));
header('Cache-Control: no-store');
?>
<!doctype html><title><?= $colour ?></title><body style="font:2em sans-serif;color:#fff;background:<?= $colour ?>">
<h1><?= $colour ?></h1><p>pid <?= getmypid() ?><p><?= htmlspecialchars($_SERVER['REQUEST_METHOD']) ?> with a body of <?= strlen($body) ?> bytes<p>request <?= htmlspecialchars($id) ?>

"#;

/// In PATH, else where Debian puts it for root only.
pub fn find_php() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> =
        std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]).filter(|f| f.is_absolute()).collect();
    ["php-fpm", "php-fpm8.2"].iter().find_map(|name| folders.iter().map(|f| f.join(name)).find(|file| file.is_file()))
}

pub enum Pools {
    Real([Fpm; 2]),
    BuiltIn([BuiltIn; 2]),
}

impl Pools {
    pub async fn start(php: Option<&Path>, folder: &Path) -> Result<Pools, String> {
        let [blue, green] = COLOURS;
        match php {
            Some(php) => Ok(Pools::Real([Fpm::start(php, folder, blue).await?, Fpm::start(php, folder, green).await?])),
            None => {
                let start = |colour| BuiltIn::start(colour).map_err(|e| format!("pool {colour}: {e}"));
                Ok(Pools::BuiltIn([start(blue)?, start(green)?]))
            }
        }
    }

    /// Blue, green.
    pub fn addresses(&self) -> [SocketAddr; 2] {
        match self {
            Pools::Real(pools) => pools.each_ref().map(|pool| pool.address),
            Pools::BuiltIn(pools) => pools.each_ref().map(|pool| pool.address),
        }
    }
}

pub struct Fpm {
    master: Child,
    address: SocketAddr,
}

impl Fpm {
    async fn start(php: &Path, folder: &Path, colour: &str) -> Result<Fpm, String> {
        let named = |e: io::Error| format!("pool {colour}: {e}");
        let address = super::free_port().map_err(named)?;
        let (config, log) = (folder.join(format!("{colour}.conf")), folder.join(format!("{colour}.log")));
        fs::write(&config, pool_config(colour, address, &log)).map_err(named)?;
        let mut command = Command::new(php);
        command.arg("--nodaemonize").arg("--fpm-config").arg(&config).stdout(Stdio::null()).stderr(Stdio::null());
        let master = super::spawn(&mut command).map_err(named)?;
        let mut pool = Fpm { master, address };
        let deadline = Instant::now() + WITHIN;
        while TcpStream::connect(address).await.is_err() {
            if pool.master.try_wait().map_err(named)?.is_some() || Instant::now() > deadline {
                return Err(format!("pool {colour} ({}) does not start:\n{}", php.display(), super::tail(&log)));
            }
            sleep(super::LOOK_EVERY).await;
        }
        Ok(pool)
    }
}

impl Drop for Fpm {
    fn drop(&mut self) {
        super::end(&mut self.master, Signal::QUIT, WITHIN);
    }
}

fn pool_config(colour: &str, address: SocketAddr, log: &Path) -> String {
    let user = match rustix::process::geteuid().is_root().then(unprivileged).flatten() {
        Some(user) => format!("user = {user}\n"),
        None => String::new(),
    };
    format!(
        "[global]\nerror_log = \"{log}\"\ndaemonize = no\nprocess_control_timeout = 10s\n\n\
         [{colour}]\n{user}listen = {address}\npm = static\npm.max_children = {WORKERS}\npm.status_path = /status\n\
         env[COLOUR] = {colour}\n",
        log = log.display(),
    )
}

/// FPM refuses to run its pool as root.
fn unprivileged() -> Option<&'static str> {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    ["www-data", "nobody"].into_iter().find(|name| users.lines().any(|line| line.split(':').next() == Some(name)))
}

pub struct BuiltIn {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl BuiltIn {
    fn start(colour: &'static str) -> io::Result<BuiltIn> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name(format!("pool-{colour}")).spawn(move || {
            let mut runtime = runtime;
            let served = runtime.enable_all().build_local(Default::default()).and_then(|runtime| {
                runtime.block_on(async {
                    let socket = Socket::Tcp(tokio::net::TcpListener::from_std(listener)?);
                    responder::serve(socket, WORKERS, handler(colour), stopped).await;
                    Ok(())
                })
            });
            if let Err(error) = served {
                eprintln!("slackwater: demo: pool {colour}: {error}");
            }
        })?;
        Ok(BuiltIn { address, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for BuiltIn {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The responder's own page under the headers of `INDEX_PHP`.
fn handler(colour: &'static str) -> impl Fn(&Request) -> Reply + Clone {
    let page = responder::demo_handler(colour);
    move |request| {
        let reply = page(request);
        let uri = request.param("REQUEST_URI").unwrap_or_default();
        let slow = uri.split(|&byte| byte == b'?').next() == Some(&b"/slow"[..]);
        let mut head = String::new();
        // Writing to a String cannot fail.
        let _ = write!(
            head,
            "X-Colour: {colour}\r\nX-Body-Length: {}\r\nX-Body-Fnv1a64: {:016x}\r\n",
            request.body.len(),
            fnv1a64(&request.body)
        );
        let mut output = BytesMut::with_capacity(head.len() + reply.output.len());
        output.put_slice(head.as_bytes());
        output.put_slice(&reply.output);
        Reply { output: output.freeze(), delay: if slow { SLOW } else { reply.delay } }
    }
}

/// As PHP's `hash('fnv1a64', ..)`.
pub fn fnv1a64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fnv1a64_is_that_of_php() {
        assert_eq!((fnv1a64(b""), fnv1a64(b"a")), (0xcbf2_9ce4_8422_2325, 0xaf63_dc4c_8601_ec8c));
    }
}
