//! A network in between: a TCP relay that delivers every byte, FIN and reset so much later, in order, each direction
//! by itself. On loopback nothing crosses; with this a request crosses the FIN, as it does in production.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

/// One direction's share of a round trip of 30 ms.
pub const ONE_WAY: Duration = Duration::from_millis(15);

/// Chunks on their way in one direction before the reader is held up: about 4 MiB.
const IN_FLIGHT: usize = 256;

/// The running relay. Dropped, it cuts what it carries.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    server: JoinHandle<()>,
}

impl Relay {
    /// To `target`, [`ONE_WAY`] each way.
    pub async fn start(target: SocketAddr) -> Relay {
        Relay::with_delay(target, ONE_WAY).await
    }

    pub async fn with_delay(target: SocketAddr, one_way: Duration) -> Relay {
        // TcpListener::bind has room for 128: hundreds of clients that come at once would lose SYNs here, and wait a second each.
        let socket = TcpSocket::new_v4().expect("the relay has a socket");
        socket.bind((std::net::Ipv4Addr::LOCALHOST, 0).into()).expect("the relay binds a port");
        let listener = socket.listen(4096).expect("the relay listens");
        let address = listener.local_addr().expect("a bound listener has an address");
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let (client, _) = accepted.expect("the relay accepts");
                        connections.spawn(carry(client, target, one_way));
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Relay { address, server }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// What arrives at one end, to be delivered at the other.
enum Arrival {
    Bytes(Vec<u8>),
    Fin,
    Reset,
}

async fn carry(client: TcpStream, target: SocketAddr, one_way: Duration) {
    tokio::time::sleep(one_way).await; // The SYN's way; the client's own handshake has already ended here.
    let Ok(server) = TcpStream::connect(target).await else {
        tokio::time::sleep(one_way).await;
        let _ = client.set_zero_linger();
        return;
    };
    for stream in [&client, &server] {
        let _ = stream.set_nodelay(true);
    }
    {
        let (upward, downward) = (direction(&client, &server, one_way), direction(&server, &client, one_way));
        tokio::pin!(upward, downward);
        // A reset ends both directions as soon as it has been delivered; a FIN only its own.
        let whole = tokio::select! {
            ended = &mut upward => ended && downward.await,
            ended = &mut downward => ended && upward.await,
        };
        if whole {
            return;
        }
    }
    for stream in [&client, &server] {
        let _ = stream.set_zero_linger();
    }
}

/// One direction to its FIN (true) or to a reset of either end, delivered (false).
async fn direction(from: &TcpStream, to: &TcpStream, delay: Duration) -> bool {
    let (sender, mut arrivals) = mpsc::channel::<(Instant, Arrival)>(IN_FLIGHT);
    let read = async move {
        loop {
            let mut chunk = vec![0; 16 << 10];
            let (arrival, last) = match read(from, &mut chunk).await {
                Ok(0) => (Arrival::Fin, true),
                Ok(n) => {
                    chunk.truncate(n);
                    (Arrival::Bytes(chunk), false)
                }
                Err(_) => (Arrival::Reset, true),
            };
            if sender.send((Instant::now() + delay, arrival)).await.is_err() || last {
                return;
            }
        }
    };
    let write = async move {
        while let Some((due, arrival)) = arrivals.recv().await {
            tokio::time::sleep_until(due).await;
            match arrival {
                Arrival::Bytes(bytes) => {
                    if write_all(to, &bytes).await.is_err() {
                        // The far end's reset, seen here: it has its own way back.
                        tokio::time::sleep(delay).await;
                        return false;
                    }
                }
                Arrival::Fin => {
                    // SAFETY: the socket is open while `to` is borrowed.
                    unsafe { libc::shutdown(to.as_raw_fd(), libc::SHUT_WR) };
                    return true;
                }
                Arrival::Reset => return false,
            }
        }
        true
    };
    tokio::join!(read, write).1
}

async fn read(stream: &TcpStream, chunk: &mut [u8]) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        match stream.try_read(chunk) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => return read,
        }
    }
}

async fn write_all(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
