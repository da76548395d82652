//! A network namespace of the test's own, in which every address of pods (10.244.0.0/16) is local: a real API server refuses 127.0.0.0/8 in
//! slices, and pods all have the same port. Needs root (or CAP_SYS_ADMIN) and iproute2, which tests/run installs.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::OnceLock;

use tokio::net::{TcpListener, TcpStream};

/// Runs the test there. The runtime's threads and all processes they start are in it, for they inherit it from this thread.
pub fn run<F: Future>(test: impl FnOnce() -> F) -> F::Output {
    enter();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(test())
}

/// Where this process was before.
static MACHINE: OnceLock<File> = OnceLock::new();

fn enter() {
    MACHINE.get_or_init(|| File::open("/proc/thread-self/ns/net").expect("the namespace of this thread"));
    // SAFETY: unshare has no memory effects.
    let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(done, 0, "a network namespace needs root: {}", io::Error::last_os_error());
    for line in ["link set lo up", "route add local 10.244.0.0/16 dev lo"] {
        let run = Command::new("ip").args(line.split(' ')).output().expect("no `ip` on this machine: apt-get install iproute2");
        assert!(run.status.success(), "ip {line}: {}", String::from_utf8_lossy(&run.stderr));
    }
}

/// A mount namespace in which /run is empty and nobody else's, as it is in a pod; from inside [`run`], before anything is started.
pub fn own_run_folder() {
    // The thread that runs this is not the one that starts children: both must be in it.
    super::children::on_the_starter(|| {
        // SAFETY: unshare has no memory effects.
        let done = unsafe { libc::unshare(libc::CLONE_NEWNS) };
        assert_eq!(done, 0, "a mount namespace needs root: {}", io::Error::last_os_error());
        for line in ["--make-rprivate /", "-t tmpfs tmpfs /run"] {
            let run = Command::new("mount").args(line.split(' ')).output().expect("mount is there");
            assert!(run.status.success(), "mount {line}: {}", String::from_utf8_lossy(&run.stderr));
        }
    });
}

/// The nth pod.
pub fn pod(n: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 244, 1, n))
}

/// A way from this namespace to an address of the machine's own: a listener here whose connections are opened there.
pub async fn door(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let address = listener.local_addr().expect("a bound listener has an address");
    tokio::spawn(async move {
        while let Ok((mut here, _)) = listener.accept().await {
            tokio::spawn(async move {
                let there = tokio::task::spawn_blocking(move || outside(to)).await.expect("no panic");
                if let Ok(mut there) = there.and_then(TcpStream::from_std) {
                    let _ = tokio::io::copy_bidirectional(&mut here, &mut there).await;
                }
            });
        }
    });
    address
}

/// A socket stays in the namespace in which it was made, so only this thread has to go there and back.
fn outside(to: SocketAddr) -> io::Result<std::net::TcpStream> {
    let own = File::open("/proc/thread-self/ns/net")?;
    let machine = MACHINE.get().expect("this namespace was entered from another");
    // SAFETY: setns has no memory effects.
    let go = |namespace: &File| match unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    go(machine)?;
    let stream = std::net::TcpStream::connect(to);
    go(&own)?;
    let stream = stream?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}
