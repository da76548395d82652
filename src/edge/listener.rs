//! Listening sockets and the acceptor: one socket per address, connections handed to the worker that has the fewest.
//!
//! Not SO_REUSEPORT: it spreads a load balancer's few long connections unevenly, and closing a member of the group resets
//! what waits in its backlog.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use ipnet::IpNet;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::is_readable;
use crate::{
    lifecycle::drain::Open,
    model::{Peer, peer::is_within},
    telemetry::seldom::Seldom,
};

const BACKLOG: i32 = 4096;
/// After an error that only time mends (no file descriptors).
const BACK_OFF: Duration = Duration::from_millis(50);
/// So many idle connections are to go for clients that wait, each time that it is looked.
const PLACES: usize = 8;
/// At its end a listener is emptied until no connection came for this long ...
const BACKLOG_QUIET: Duration = Duration::from_millis(100);
/// ... and for at most this long.
const BACKLOG_LIMIT: Duration = Duration::from_secs(1);

/// Binds and listens, with a message that names the address.
pub fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let open = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(std::net::TcpListener::from(socket))
    };
    open().map_err(|e: io::Error| io::Error::new(e.kind(), format!("cannot listen on {address}: {e}")))
}

/// A connection on its way to a worker; the permit counts it until it is dropped.
pub struct Accepted {
    pub stream: std::net::TcpStream,
    pub peer: Peer,
    pub permit: Permit,
}

/// Who takes connections: the worker itself where there is one, else a channel for each.
pub enum Sink {
    Here(Box<dyn Fn(TcpStream, Peer, Permit)>),
    Workers(Vec<mpsc::Sender<Accepted>>),
}

/// Caps; the acceptor reads them for each connection.
#[derive(Clone, Debug)]
pub struct Caps {
    pub connections: usize,
    pub per_address: Option<usize>,
    /// Exempt from `per_address`.
    pub trusted: Vec<IpNet>,
    /// Whose connections speak TLS. Read for each connection, so that an address may turn without being closed.
    pub tls: Vec<SocketAddr>,
}

/// Connections by worker and by address.
#[derive(Debug)]
pub struct Counts {
    workers: Vec<AtomicUsize>,
    open: Arc<Open>,
    /// There are `max_connections`, and other clients wait: so many are to make room.
    wanted: AtomicUsize,
    /// Only addresses that have a connection are in it, so it is bounded by their number.
    by_address: Mutex<HashMap<IpAddr, usize>>,
}

impl Counts {
    /// `open` counts them all.
    pub fn new(workers: usize, open: Arc<Open>) -> Arc<Self> {
        let workers = (0..workers).map(|_| AtomicUsize::new(0)).collect();
        Arc::new(Counts { workers, open, wanted: AtomicUsize::new(0), by_address: Mutex::default() })
    }

    pub fn total(&self) -> usize {
        self.open.count()
    }

    /// How many places others wait for; whoever gives up some says so.
    pub fn wanted(&self) -> usize {
        self.wanted.load(Ordering::Relaxed)
    }

    pub fn gave_up(&self, places: usize) {
        let _ = self.wanted.try_update(Ordering::Relaxed, Ordering::Relaxed, |wanted| Some(wanted.saturating_sub(places)));
    }

    fn fewest(&self) -> usize {
        self.workers.iter().enumerate().min_by_key(|(_, n)| n.load(Ordering::Relaxed)).map_or(0, |(worker, _)| worker)
    }

    fn take(self: &Arc<Self>, address: IpAddr, caps: &Caps) -> Option<Permit> {
        let counted = match caps.per_address {
            Some(max) if !is_within(address, &caps.trusted) => Some(self.take_address(address, max)?),
            _ => None,
        };
        let worker = self.fewest();
        if let Some(count) = self.workers.get(worker) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.open.add();
        Some(Permit { counts: self.clone(), worker, _address: counted })
    }

    /// One more of this address; `None` where it has `max` already. Also for an address that a PROXY header has told.
    pub fn take_address(self: &Arc<Self>, address: IpAddr, max: usize) -> Option<AddressPermit> {
        let mut map = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let count = map.entry(address).or_default();
        if *count >= max {
            return None;
        }
        *count += 1;
        Some(AddressPermit { counts: self.clone(), address })
    }
}

/// One connection of an address.
#[derive(Debug)]
pub struct AddressPermit {
    counts: Arc<Counts>,
    address: IpAddr,
}

impl Drop for AddressPermit {
    fn drop(&mut self) {
        let mut map = self.counts.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = map.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                map.remove(&self.address);
            }
        }
    }
}

/// One connection in the counts.
#[derive(Debug)]
pub struct Permit {
    counts: Arc<Counts>,
    pub worker: usize,
    _address: Option<AddressPermit>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(count) = self.counts.workers.get(self.worker) {
            count.fetch_sub(1, Ordering::Relaxed);
        }
        self.counts.open.remove();
    }
}

/// What the control plane asks of the acceptor.
pub enum Command {
    /// Exactly these addresses from now on: new ones are bound already, missing ones are emptied and closed.
    Listen {
        keep: Vec<SocketAddr>,
        add: Vec<std::net::TcpListener>,
    },
    Caps(Caps),
    /// Empties every backlog and closes; answered when all are closed.
    Close(oneshot::Sender<()>),
}

/// Runs on the thread that accepts, until the channel of commands closes.
pub async fn accept(mut commands: mpsc::Receiver<Command>, counts: Arc<Counts>, caps: Caps, sink: Sink) {
    let shared = Rc::new(Acceptor {
        counts,
        caps: std::cell::RefCell::new(caps),
        sink,
        failures: Seldom::default(),
        refusals: Seldom::default(),
        fullness: Seldom::default(),
    });
    let mut running: BTreeMap<SocketAddr, (oneshot::Sender<()>, tokio::task::JoinHandle<()>)> = BTreeMap::new();
    while let Some(command) = commands.recv().await {
        match command {
            Command::Caps(caps) => *shared.caps.borrow_mut() = caps,
            Command::Listen { keep, add } => {
                running.retain(|address, _| keep.contains(address));
                for listener in add {
                    match listener.local_addr().and_then(|a| Ok((a, TcpListener::from_std(listener)?))) {
                        Ok((address, listener)) => {
                            let (stop, stopped) = oneshot::channel();
                            let task = tokio::task::spawn_local(shared.clone().run(listener, address, stopped));
                            running.insert(address, (stop, task));
                        }
                        Err(error) => tracing::error!(%error, "a listening socket cannot be used"),
                    }
                }
            }
            Command::Close(done) => {
                for (_, (stop, task)) in std::mem::take(&mut running) {
                    drop(stop);
                    let _ = task.await;
                }
                let _ = done.send(());
            }
        }
    }
}

struct Acceptor {
    counts: Arc<Counts>,
    caps: std::cell::RefCell<Caps>,
    failures: Seldom,
    refusals: Seldom,
    fullness: Seldom,
    sink: Sink,
}

impl Acceptor {
    async fn run(self: Rc<Self>, listener: TcpListener, address: SocketAddr, mut stopped: oneshot::Receiver<()>) {
        loop {
            if self.counts.total() >= self.caps.borrow().connections {
                // Somebody waits.
                if is_readable(&listener) {
                    self.counts.wanted.store(PLACES, Ordering::Relaxed);
                    if let Some(unsaid) = self.fullness.may_say() {
                        let connections = self.counts.total();
                        tracing::warn!(%address, connections, unsaid, "max_connections reached; new ones wait in the backlog, and the longest idle ones that are no trusted proxy's are closed");
                    }
                }
                tokio::select! {
                    () = tokio::time::sleep(BACK_OFF) => continue,
                    _ = &mut stopped => break,
                }
            }
            self.counts.wanted.store(0, Ordering::Relaxed);
            tokio::select! {
                biased;
                accepted = listener.accept() => self.on_accept(accepted, address).await,
                _ = &mut stopped => break,
            }
        }
        self.counts.wanted.store(0, Ordering::Relaxed);
        let limit = Instant::now() + BACKLOG_LIMIT;
        while let Ok(accepted) = tokio::time::timeout_at(limit.min(Instant::now() + BACKLOG_QUIET), listener.accept()).await {
            self.on_accept(accepted, address).await;
        }
    }

    async fn on_accept(&self, accepted: io::Result<(TcpStream, SocketAddr)>, address: SocketAddr) {
        match accepted {
            Ok((stream, remote)) => self.hand_over(stream, remote, address).await,
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                if let Some(unsaid) = self.failures.may_say() {
                    tracing::error!(%address, %error, unsaid, "accept failed; trying again");
                }
                tokio::time::sleep(BACK_OFF).await;
            }
        }
    }

    async fn hand_over(&self, stream: TcpStream, remote: SocketAddr, address: SocketAddr) {
        let Some(permit) = self.counts.take(remote.ip().to_canonical(), &self.caps.borrow()) else {
            if let Some(unsaid) = self.refusals.may_say() {
                tracing::info!(peer = %remote, unsaid, "max_connections_per_address reached; connection closed");
            }
            return;
        };
        let Ok(local) = stream.local_addr() else { return };
        let _ = stream.set_nodelay(true);
        let peer = Peer { remote, local, tls: self.caps.borrow().tls.contains(&address), tls_before: false, is_untold: false };
        match &self.sink {
            Sink::Here(take) => take(stream, peer, permit),
            Sink::Workers(workers) => {
                let Ok(stream) = stream.into_std() else { return };
                if let Some(worker) = workers.get(permit.worker) {
                    // A worker that does not take them makes the acceptor wait: the backlog is the bound.
                    let _ = worker.send(Accepted { stream, peer, permit }).await;
                }
            }
        }
    }
}

/// Errors of the connection that was to be accepted, not of the listener (accept(2)).
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}
