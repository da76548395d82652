//! The clients, as a process of their own: closed loop (each client asks again as soon as it has its answer), open loop (requests come when they
//! come), clients that only hold a connection, and clients that make a new one for each request. Judges by the worst client, not by the mean.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{self, BufRead as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use hdrhistogram::Histogram;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustls::{ClientConfig, RootCertStore, client::Resumption, pki_types::ServerName};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::Notify,
    time::Instant,
};
use tokio_rustls::TlsConnector;

/// Not counted: until then buffers grow and connections are made.
const WARM_UP: Duration = Duration::from_millis(400);
/// An answer that has not come by then is an error.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    pub address: SocketAddr,
    pub head: String,
    pub body: usize,
    pub clients: usize,
    pub seconds: f64,
    pub mode: Mode,
    /// The certificate (DER) that the proxy must show; none: no TLS.
    pub certificate: Option<Vec<u8>>,
    /// Sessions are resumed.
    pub resume: bool,
    /// Connections that ask once and then hold still.
    pub idle: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Mode {
    Kept,
    /// A connection for each request.
    Anew,
    /// So many requests a second, whatever becomes of them.
    Open(f64),
    /// Holds the idle connections, and does nothing, until its stdin ends.
    Hold,
}

/// What the clients saw.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Seen {
    pub requests: u64,
    /// With those of the warm-up.
    pub all: u64,
    pub errors: u64,
    pub seconds: f64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub p999_us: u64,
    /// The longest that any client has waited.
    pub max_us: u64,
    /// Answers of the client that has got the fewest, over the mean of all.
    pub fewest: f64,
    pub resumed: u64,
    /// Why, of the first that failed.
    pub why: Option<String>,
}

trait Wire: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Wire for T {}

struct Load {
    plan: Plan,
    request: Vec<u8>,
    tls: Option<TlsConnector>,
    histogram: RefCell<Histogram<u64>>,
    seen: RefCell<Seen>,
    counts: RefCell<Vec<u64>>,
    arrivals: RefCell<VecDeque<Instant>>,
    came: Notify,
    from: Instant,
    to: Instant,
}

/// Runs the plan; says `begin` on stdout when it begins to count, then what it has seen.
pub fn run(plan: Plan) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default()).expect("a runtime");
    let seen = runtime.block_on(drive(plan));
    println!("{}", serde_json::to_string(&seen).expect("it is plain data"));
}

async fn drive(plan: Plan) -> Seen {
    let tls = plan.certificate.as_ref().map(|certificate| {
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone().into()).expect("the certificate is one");
        let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        if !plan.resume {
            config.resumption = Resumption::disabled();
        }
        TlsConnector::from(Arc::new(config))
    });
    let mut request = plan.head.clone().into_bytes();
    request.resize(request.len() + plan.body, b'x');
    let held = hold(&plan, tls.as_ref(), &request).await;
    let now = Instant::now();
    let load = Rc::new(Load {
        from: now + WARM_UP,
        to: now + WARM_UP + Duration::from_secs_f64(plan.seconds),
        request,
        tls,
        histogram: RefCell::new(Histogram::new_with_bounds(1, 60_000_000, 3).expect("its bounds are right")),
        seen: RefCell::default(),
        counts: RefCell::new(vec![0; plan.clients]),
        arrivals: RefCell::default(),
        came: Notify::new(),
        plan,
    });
    if load.plan.mode == Mode::Hold {
        say("begin");
        tokio::task::spawn_blocking(|| io::stdin().lock().lines().count()).await.expect("stdin ends");
        return Seen { requests: held.len() as u64, ..Seen::default() };
    }
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..load.plan.clients {
        clients.spawn_local(load.clone().client(client));
    }
    if let Mode::Open(rate) = load.plan.mode {
        tokio::task::spawn_local(load.clone().arrive(rate));
    }
    tokio::time::sleep_until(load.from).await;
    say("begin");
    tokio::time::sleep_until(load.to).await;
    say("end");
    load.came.notify_waiters();
    while clients.join_next().await.is_some() {}
    drop(held);
    let mut seen = load.seen.take();
    let histogram = load.histogram.borrow();
    seen.seconds = load.plan.seconds;
    let at = |quantile| histogram.value_at_quantile(quantile);
    (seen.p50_us, seen.p99_us, seen.p999_us, seen.max_us) = (at(0.5), at(0.99), at(0.999), histogram.max());
    let counts = load.counts.borrow();
    let mean = counts.iter().sum::<u64>() as f64 / counts.len().max(1) as f64;
    seen.fewest = counts.iter().copied().min().unwrap_or(0) as f64 / mean.max(1e-9);
    seen
}

fn say(what: &str) {
    println!("{what}");
    let _ = io::stdout().flush();
}

/// Opens the idle connections, each after one answered request.
async fn hold(plan: &Plan, tls: Option<&TlsConnector>, request: &[u8]) -> Vec<Box<dyn Wire>> {
    let mut held: Vec<Box<dyn Wire>> = Vec::with_capacity(plan.idle);
    let mut buffer = vec![0; 64 * 1024];
    while held.len() < plan.idle {
        // From several addresses, others for each process: one has not ports enough, and those of the round before are not free yet.
        let octet = |n: usize| u8::try_from(n % 250).unwrap_or(0) + 1;
        let process = usize::try_from(std::process::id()).unwrap_or(0);
        let from = Ipv4Addr::new(127, octet(process / 250), octet(process), octet(held.len() / 5_000));
        let mut wire = connect(plan.address, Some(from), tls).await.expect("an idle connection is accepted").0;
        ask(&mut wire, request, &mut buffer).await.expect("its one request is answered");
        held.push(wire);
    }
    held
}

async fn connect(address: SocketAddr, from: Option<Ipv4Addr>, tls: Option<&TlsConnector>) -> io::Result<(Box<dyn Wire>, bool)> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    if let Some(from) = from {
        socket.bind((from, 0).into())?;
    }
    let tcp: TcpStream = socket.connect(address).await?;
    tcp.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok((Box::new(tcp), false)) };
    let name = ServerName::try_from("localhost").expect("it is a name");
    let stream = tls.connect(name, tcp).await?;
    let resumed = stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
    Ok((Box::new(stream), resumed))
}

impl Load {
    async fn client(self: Rc<Self>, number: usize) {
        let mut buffer = vec![0; 256 * 1024];
        let mut wire: Option<Box<dyn Wire>> = None;
        while Instant::now() < self.to {
            let began = match self.plan.mode {
                Mode::Open(_) => match self.next_arrival().await {
                    Some(came) => came,
                    None => return,
                },
                _ => Instant::now(),
            };
            let answered = tokio::time::timeout(PATIENCE, async {
                if wire.is_none() {
                    let (fresh, resumed) = connect(self.plan.address, None, self.tls.as_ref()).await?;
                    self.seen.borrow_mut().resumed += u64::from(resumed && began >= self.from);
                    wire = Some(fresh);
                }
                let Some(wire) = &mut wire else { return Err(io::Error::other("no connection")) };
                ask(wire, &self.request, &mut buffer).await
            });
            let answered = answered.await.unwrap_or_else(|_| Err(io::Error::other("no answer in 20 s")));
            let kept = match &answered {
                Ok(kept) => *kept && self.plan.mode != Mode::Anew,
                Err(_) => false,
            };
            if !kept && let Some(mut done) = wire.take() {
                let _ = done.shutdown().await;
            }
            let now = Instant::now();
            let mut seen = self.seen.borrow_mut();
            match answered {
                // Errors of the warm-up are errors.
                Err(error) => {
                    seen.errors += 1;
                    seen.why.get_or_insert_with(|| error.to_string());
                    if seen.errors > 1_000 {
                        return;
                    }
                }
                Ok(_) if now >= self.from && now < self.to => {
                    (seen.requests, seen.all) = (seen.requests + 1, seen.all + 1);
                    if let Some(count) = self.counts.borrow_mut().get_mut(number) {
                        *count += 1;
                    }
                    let micros = u64::try_from((now - began).as_micros()).unwrap_or(u64::MAX);
                    self.histogram.borrow_mut().saturating_record(micros.max(1));
                }
                Ok(_) => seen.all += 1,
            }
        }
    }

    async fn next_arrival(&self) -> Option<Instant> {
        loop {
            if Instant::now() >= self.to {
                return None;
            }
            if let Some(came) = self.arrivals.borrow_mut().pop_front() {
                return Some(came);
            }
            self.came.notified().await;
        }
    }

    /// Poisson arrivals; a thread tells their times, for the runtime's timer knows milliseconds alone.
    async fn arrive(self: Rc<Self>, rate: f64) {
        let (tell, mut told) = tokio::sync::mpsc::channel(4096);
        let (began, to) = (std::time::Instant::now(), Duration::from_secs_f64(self.plan.seconds) + WARM_UP);
        std::thread::spawn(move || {
            let mut dice = StdRng::seed_from_u64(7);
            let mut next = Duration::ZERO;
            while next < to {
                let uniform: f64 = dice.random();
                next += Duration::from_secs_f64(-(1.0 - uniform).ln() / rate);
                if let Some(left) = next.checked_sub(began.elapsed()) {
                    std::thread::sleep(left);
                }
                if tell.blocking_send(began + next).is_err() {
                    return;
                }
            }
        });
        while let Some(at) = told.recv().await {
            self.arrivals.borrow_mut().push_back(at.into());
            self.came.notify_one();
        }
    }
}

/// One request, and its whole answer read and thrown away. True if the connection may be used again.
async fn ask(wire: &mut Box<dyn Wire>, request: &[u8], buffer: &mut [u8]) -> io::Result<bool> {
    wire.write_all(request).await?;
    wire.flush().await?;
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut filled = 0;
    let (head, length) = loop {
        let n = wire.read(&mut buffer[filled..]).await?;
        if n == 0 {
            return Err(bad("closed before the answer's head"));
        }
        filled += n;
        if let Some(head) = memchr::memmem::find(&buffer[..filled], b"\r\n\r\n") {
            break (head + 4, Length::of(&buffer[..head + 2])?);
        }
    };
    let keep = memchr::memmem::find(&buffer[..head], b"lose\r\n").is_none();
    match length {
        Length::Known(length) => {
            let mut left = (length + head).checked_sub(filled).ok_or_else(|| bad("more than its Content-Length"))?;
            while left > 0 {
                let n = wire.read(buffer).await?;
                if n == 0 {
                    return Err(bad("closed in the middle of the answer"));
                }
                left = left.checked_sub(n).ok_or_else(|| bad("more than its Content-Length"))?;
            }
        }
        Length::Chunked => {
            let mut chunks = Chunks::default();
            let mut over = chunks.push(&buffer[head..filled])?;
            while !over {
                let n = wire.read(buffer).await?;
                if n == 0 {
                    return Err(bad("closed in the middle of the answer"));
                }
                over = chunks.push(&buffer[..n])?;
            }
        }
    }
    Ok(keep)
}

enum Length {
    Known(usize),
    Chunked,
}

impl Length {
    fn of(head: &[u8]) -> io::Result<Length> {
        let text = std::str::from_utf8(head).map_err(io::Error::other)?;
        let status = text.get(9..12).unwrap_or_default();
        if status == "304" {
            return Ok(Length::Known(0));
        }
        if !status.starts_with('2') {
            return Err(io::Error::other(format!("status {status}")));
        }
        for line in text.split("\r\n") {
            let Some((name, value)) = line.split_once(':') else { continue };
            if name.eq_ignore_ascii_case("content-length") {
                return value.trim().parse().map(Length::Known).map_err(io::Error::other);
            }
            if name.eq_ignore_ascii_case("transfer-encoding") {
                return Ok(Length::Chunked);
            }
        }
        Err(io::Error::other("an answer without a length"))
    }
}

/// Finds the end of a chunked body.
#[derive(Default)]
struct Chunks {
    /// Of the current chunk with its line's end; 0: in a line that tells a size.
    left: usize,
    line: Vec<u8>,
    last: bool,
}

impl Chunks {
    fn push(&mut self, mut bytes: &[u8]) -> io::Result<bool> {
        while !bytes.is_empty() {
            if self.left > 0 {
                let n = self.left.min(bytes.len());
                self.left -= n;
                bytes = &bytes[n..];
                if self.last && self.left == 0 {
                    return Ok(true);
                }
                continue;
            }
            let Some(end) = memchr::memchr(b'\n', bytes) else {
                self.line.extend_from_slice(bytes);
                return Ok(false);
            };
            self.line.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end + 1..];
            let text = std::str::from_utf8(&self.line).map_err(io::Error::other)?.trim();
            let size = usize::from_str_radix(text, 16).map_err(io::Error::other)?;
            self.line.clear();
            self.last = size == 0;
            self.left = size + 2;
        }
        Ok(false)
    }
}
