//! The client that keeps books: it never retries, checks every byte of every body, and writes down how each request
//! ended. Kept connections, back to back or with pauses, until told to stop.
//!
//! What counts as a failure follows a load balancer: a FIN that has arrived before the next request is sent is only a
//! reason to reconnect; a request that crosses the FIN is lost, and stands in the ledger as such.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::gate::wait_for;
use super::http::{self, Connection, HttpError, Response};
use super::{pattern, sha1};

/// One kind of request, and what its answer must be.
#[derive(Clone, Debug)]
pub struct Shape {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub chunked: bool,
    pub expect: Expect,
    body: Bytes,
    /// Of the body: taken once, for in a debug build it costs more than the exchange.
    sha1: String,
}

/// What an answer of status 2xx must hold. In any case a `X-Ledger-ID` that comes back must be the one sent: an
/// answer to somebody else's request is a bad body whatever it says.
#[derive(Clone, Debug)]
pub enum Expect {
    /// A well-formed answer.
    Anything,
    /// `hello.php`: "COLOUR hello\n", the colour as in the header.
    Hello,
    /// JSON with the `length`, `sha1`, `colour` and `ledger_id` of this request: `upload.php`, `index.php`.
    Digest,
    /// The first so many bytes of the pattern: `big.php`.
    Pattern(usize),
    /// These bytes.
    Exactly(Bytes),
}

impl Shape {
    pub fn get(path: &str, expect: Expect) -> Shape {
        Shape {
            method: "GET".to_owned(),
            path: path.to_owned(),
            headers: Vec::new(),
            chunked: false,
            expect,
            body: Bytes::new(),
            sha1: sha1::hex(b""),
        }
    }

    /// A body of so many bytes of the pattern.
    pub fn post(path: &str, bytes: usize, expect: Expect) -> Shape {
        Shape::get(path, expect).method("POST").body(pattern::pattern(bytes))
    }

    pub fn method(mut self, method: &str) -> Shape {
        self.method = method.to_owned();
        self
    }

    pub fn body(mut self, body: impl Into<Bytes>) -> Shape {
        self.body = body.into();
        self.sha1 = sha1::hex(&self.body);
        self
    }

    /// The body in chunks of 8 KiB, without a Content-Length.
    pub fn chunked(mut self) -> Shape {
        self.chunked = true;
        self
    }

    pub fn header(mut self, name: &str, value: &str) -> Shape {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// `/hello.php`, and posts of 1 and 100 KiB to `/upload.php`, a third each.
    pub fn mix() -> Vec<Shape> {
        vec![
            Shape::get("/hello.php", Expect::Hello),
            Shape::post("/upload.php", 1 << 10, Expect::Digest),
            Shape::post("/upload.php", 100 << 10, Expect::Digest),
        ]
    }

    fn bytes(&self, id: &str) -> Vec<u8> {
        let mut headers: Vec<(&str, &str)> = self.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        headers.extend([("X-Request-ID", id), ("X-Ledger-ID", id)]);
        if self.chunked {
            let chunks: Vec<&[u8]> = self.body.chunks(8 << 10).collect();
            http::chunked_request(&self.method, &self.path, &headers, &chunks)
        } else {
            http::request(&self.method, &self.path, &headers, &self.body)
        }
    }

    /// `Err`: what is wrong with this answer.
    fn check(&self, id: &str, answer: &Response) -> Result<(), String> {
        if let Some(other) = answer.header("X-Ledger-ID").filter(|found| *found != id) {
            return Err(format!("the answer to {other}"));
        }
        if !(200..300).contains(&answer.status) {
            return Ok(());
        }
        let colour = answer.colour().unwrap_or_default();
        match &self.expect {
            Expect::Anything => Ok(()),
            Expect::Hello if answer.body == format!("{colour} hello\n") => Ok(()),
            Expect::Exactly(bytes) if answer.body == bytes => Ok(()),
            Expect::Hello | Expect::Exactly(_) => Err(format!("{:?}", answer.text())),
            Expect::Pattern(len) => pattern::check(&answer.body, *len),
            Expect::Digest => {
                let json: serde_json::Value = serde_json::from_slice(&answer.body).map_err(|error| error.to_string())?;
                let wanted = [
                    ("length", serde_json::json!(self.body.len())),
                    ("sha1", serde_json::json!(self.sha1)),
                    ("colour", serde_json::json!(colour)),
                    ("ledger_id", serde_json::json!(id)),
                ];
                match wanted.iter().find(|(name, value)| json[*name] != *value) {
                    None => Ok(()),
                    Some((name, value)) => Err(format!("{name} is {} and not {value}", json[*name])),
                }
            }
        }
    }
}

/// How one request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A whole, well-formed answer with the right bytes; also one of 4xx or 5xx.
    Ok {
        status: u16,
        colour: Option<String>,
    },
    /// RST, or a write to a connection that is gone.
    Reset,
    /// FIN before the end of the answer, or before its beginning.
    EarlyEnd,
    /// The answer is not what the shape expects, or not HTTP: in words.
    BadBody(String),
    Timeout,
    /// No connection.
    Refused,
}

impl Outcome {
    /// A whole answer below 500.
    pub fn succeeded(&self) -> bool {
        matches!(self, Outcome::Ok { status: ..500, .. })
    }
}

/// One line of the ledger.
#[derive(Clone, Debug)]
pub struct Entry {
    pub id: String,
    pub method: String,
    pub path: String,
    /// The request's first byte is about to be written; for a fresh connection, before connect.
    pub started: Instant,
    pub finished: Instant,
    pub outcome: Outcome,
    /// The connection had served before.
    pub reused: bool,
}

impl Entry {
    pub fn took(&self) -> Duration {
        self.finished - self.started
    }

    pub fn colour(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Ok { colour, .. } => colour.as_deref(),
            _ => None,
        }
    }

    pub fn status(&self) -> Option<u16> {
        match self.outcome {
            Outcome::Ok { status, .. } => Some(status),
            _ => None,
        }
    }
}

/// All requests of a run, in the order in which they ended. Clones are the same book.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    book: Arc<Book>,
}

#[derive(Debug)]
struct Book {
    entries: Mutex<Vec<Entry>>,
    written: watch::Sender<usize>,
    next_id: AtomicU64,
    run: u64,
    reconnects: AtomicUsize,
    unasked: AtomicUsize,
}

impl Default for Book {
    fn default() -> Book {
        static RUN: AtomicU64 = AtomicU64::new(0);
        Book {
            entries: Mutex::default(),
            written: watch::Sender::new(0),
            next_id: AtomicU64::new(0),
            run: u64::from(std::process::id()) << 16 | RUN.fetch_add(1, Ordering::Relaxed),
            reconnects: AtomicUsize::new(0),
            unasked: AtomicUsize::new(0),
        }
    }
}

impl Ledger {
    pub fn new() -> Ledger {
        Ledger::default()
    }

    pub fn entries(&self) -> Vec<Entry> {
        self.book.entries.lock().expect("no test panics while it writes the book").clone()
    }

    pub fn len(&self) -> usize {
        *self.book.written.borrow()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Until `n` requests have ended. Panics after [`super::gate::PATIENCE`].
    pub async fn wait_entries(&self, n: usize) {
        wait_for(&self.book.written, &format!("{n} entries in the ledger"), |written| *written >= n).await;
    }

    /// Until `n` more have ended than now.
    pub async fn wait_more(&self, n: usize) {
        self.wait_entries(self.len() + n).await;
    }

    pub fn failures(&self) -> Vec<Entry> {
        self.entries().into_iter().filter(|entry| !entry.outcome.succeeded()).collect()
    }

    /// Requests begun after `since` and answered by another colour than `colour`: none may be after a swap returned.
    pub fn wrong_colour_since(&self, since: Instant, colour: &str) -> Vec<Entry> {
        let wrong = |entry: &Entry| entry.started >= since && entry.colour().is_some_and(|found| found != colour);
        self.entries().into_iter().filter(wrong).collect()
    }

    pub fn summary(&self) -> Summary {
        let mut summary = Summary {
            reconnects: self.book.reconnects.load(Ordering::Relaxed),
            unasked: self.book.unasked.load(Ordering::Relaxed),
            ..Summary::default()
        };
        let mut took = Vec::new();
        for entry in self.entries() {
            summary.requests += 1;
            took.push(entry.took());
            match &entry.outcome {
                Outcome::Ok { status, colour } => {
                    *summary.statuses.entry(*status).or_default() += 1;
                    if let Some(colour) = colour {
                        *summary.colours.entry(colour.clone()).or_default() += 1;
                    }
                }
                Outcome::Reset => summary.resets += 1,
                Outcome::EarlyEnd => summary.early_ends += 1,
                Outcome::BadBody(_) => summary.bad_bodies += 1,
                Outcome::Timeout => summary.timeouts += 1,
                Outcome::Refused => summary.refused += 1,
            }
            if !entry.outcome.succeeded() {
                summary.failed += 1;
                if summary.first_failures.len() < 10 {
                    summary.first_failures.push(entry);
                }
            }
        }
        took.sort_unstable();
        summary.slowest = took.last().copied().unwrap_or_default();
        summary.p99 = took.get(took.len().saturating_sub(1) * 99 / 100).copied().unwrap_or_default();
        summary
    }

    /// Panics with the summary if there is a failure, an answer nobody asked for, or nothing at all.
    #[track_caller]
    pub fn assert_clean(&self) {
        let summary = self.summary();
        assert!(summary.requests > 0, "no request was made: that proves nothing");
        assert!(summary.failed == 0 && summary.unasked == 0, "{summary}");
    }

    /// A new id, of this book alone.
    fn id(&self) -> String {
        format!("{:x}-{:06}", self.book.run, self.book.next_id.fetch_add(1, Ordering::Relaxed))
    }

    fn write(&self, entry: Entry) {
        self.book.entries.lock().expect("no test panics while it writes the book").push(entry);
        self.book.written.send_modify(|written| *written += 1);
    }

    /// Sends one request on `held`, or on a new connection where that is none or has been closed, and writes down how it
    /// ended. `held` keeps the connection if it may be used again.
    pub async fn send(
        &self,
        address: SocketAddr,
        held: &mut Option<Connection<TcpStream>>,
        shape: &Shape,
        timeout: Duration,
    ) -> Outcome {
        if let Some(connection) = held.take() {
            if connection.has_unasked_bytes() {
                self.book.unasked.fetch_add(1, Ordering::Relaxed);
            } else if connection.peer_has_closed() {
                self.book.reconnects.fetch_add(1, Ordering::Relaxed);
            } else {
                *held = Some(connection);
            }
        }
        let id = self.id();
        let bytes = shape.bytes(&id);
        let reused = held.is_some();
        let started = Instant::now();
        let outcome = match tokio::time::timeout(timeout, attempt(address, held, shape, &id, &bytes)).await {
            Ok(outcome) => outcome,
            Err(_) => {
                *held = None;
                Outcome::Timeout
            }
        };
        let (method, path) = (shape.method.clone(), shape.path.clone());
        self.write(Entry { id, method, path, started, finished: Instant::now(), outcome: outcome.clone(), reused });
        outcome
    }
}

async fn attempt(address: SocketAddr, held: &mut Option<Connection<TcpStream>>, shape: &Shape, id: &str, bytes: &[u8]) -> Outcome {
    let mut connection = match held.take() {
        Some(connection) => connection,
        None => match Connection::open(address).await {
            Ok(connection) => connection,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Outcome::Reset,
            Err(_) => return Outcome::Refused,
        },
    };
    match connection.exchange(&shape.method, bytes).await {
        Ok(answer) => {
            if let Err(what) = shape.check(id, &answer) {
                return Outcome::BadBody(format!("{} {what}", answer.status));
            }
            if answer.keeps_alive() {
                *held = Some(connection);
            }
            Outcome::Ok { status: answer.status, colour: answer.colour().map(str::to_owned) }
        }
        Err(HttpError::EndedEarly { .. }) => Outcome::EarlyEnd,
        Err(HttpError::Broken { .. }) => Outcome::Reset,
        Err(HttpError::Malformed(what)) => Outcome::BadBody(what),
    }
}

/// The figures of a run; displayed with its first failures.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    pub requests: usize,
    /// Everything but whole, right answers below 500.
    pub failed: usize,
    pub resets: usize,
    pub early_ends: usize,
    pub bad_bodies: usize,
    pub timeouts: usize,
    pub refused: usize,
    pub statuses: BTreeMap<u16, usize>,
    pub colours: BTreeMap<String, usize>,
    /// Connections found closed before a request was sent on them: not a failure.
    pub reconnects: usize,
    /// Connections on which bytes came that nobody had asked for.
    pub unasked: usize,
    pub slowest: Duration,
    pub p99: Duration,
    pub first_failures: Vec<Entry>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { requests, failed, resets, early_ends, bad_bodies, timeouts, refused, statuses, .. } = self;
        writeln!(
            f,
            "{requests} requests, {failed} failed: {resets} reset, {early_ends} ended early, {bad_bodies} bad, {timeouts} timed out, {refused} refused"
        )?;
        writeln!(f, "statuses {statuses:?}, colours {:?}, {} reconnects, {} unasked", self.colours, self.reconnects, self.unasked)?;
        writeln!(f, "p99 {:?}, slowest {:?}", self.p99, self.slowest)?;
        for Entry { id, method, path, outcome, reused, started, finished } in &self.first_failures {
            writeln!(f, "  {id} {method} {path}: {outcome:?} after {:?}, connection reused: {reused}", *finished - *started)?;
        }
        Ok(())
    }
}

/// What [`LedgerClient::builder`] collects.
#[derive(Clone, Debug)]
pub struct Builder {
    address: SocketAddr,
    connections: usize,
    shapes: Vec<Shape>,
    pause: Duration,
    timeout: Duration,
    ledger: Ledger,
}

impl Builder {
    /// Default 8.
    pub fn connections(mut self, n: usize) -> Builder {
        self.connections = n;
        self
    }

    /// Sent in turn by each connection, which begin at different ones. Default [`Shape::mix`].
    pub fn shapes(mut self, shapes: Vec<Shape>) -> Builder {
        self.shapes = shapes;
        self
    }

    /// Between an answer and the next request, varied from half to one and a half of it. Default none.
    pub fn pause(mut self, pause: Duration) -> Builder {
        self.pause = pause;
        self
    }

    /// For one request. Default 10 s.
    pub fn timeout(mut self, timeout: Duration) -> Builder {
        self.timeout = timeout;
        self
    }

    /// Writes into this book, which several clients may share.
    pub fn ledger(mut self, ledger: &Ledger) -> Builder {
        self.ledger = ledger.clone();
        self
    }

    pub fn start(self) -> LedgerClient {
        assert!(!self.shapes.is_empty(), "a client needs something to ask");
        let (stop, stopping) = watch::channel(false);
        let ledger = self.ledger.clone();
        let mut connections = JoinSet::new();
        for nth in 0..self.connections {
            connections.spawn(drive(self.clone(), nth, stopping.clone()));
        }
        LedgerClient { ledger, stop, connections }
    }
}

/// Requests on their way until [`LedgerClient::stop`]. Dropped, it cuts them.
#[derive(Debug)]
pub struct LedgerClient {
    ledger: Ledger,
    stop: watch::Sender<bool>,
    connections: JoinSet<()>,
}

impl LedgerClient {
    /// Eight connections, [`Shape::mix`], back to back.
    pub fn start(address: SocketAddr) -> LedgerClient {
        LedgerClient::builder(address).start()
    }

    pub fn builder(address: SocketAddr) -> Builder {
        Builder {
            address,
            connections: 8,
            shapes: Shape::mix(),
            pause: Duration::ZERO,
            timeout: Duration::from_secs(10),
            ledger: Ledger::new(),
        }
    }

    /// The book as it is being written.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Begins no further request, waits for those on their way, and hands over the book.
    pub async fn stop(mut self) -> Ledger {
        self.stop.send_replace(true);
        while let Some(ended) = self.connections.join_next().await {
            ended.expect("a ledger connection does not panic");
        }
        self.ledger
    }
}

async fn drive(plan: Builder, nth: usize, mut stop: watch::Receiver<bool>) {
    let mut held = None;
    let mut dice = nth as u64;
    for shape in plan.shapes.iter().cycle().skip(nth % plan.shapes.len()) {
        if *stop.borrow() {
            return;
        }
        let outcome = plan.ledger.send(plan.address, &mut held, shape, plan.timeout).await;
        let pause = if plan.pause.is_zero() && matches!(outcome, Outcome::Refused) {
            Duration::from_millis(10) // Not to spin while nobody listens.
        } else {
            jitter(plan.pause, &mut dice)
        };
        if !pause.is_zero() {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stop.changed() => {}
            }
        } else {
            tokio::task::yield_now().await;
        }
    }
}

/// From half to one and a half of `pause`, by a fixed sequence: two runs differ only by what they test.
pub fn jitter(pause: Duration, dice: &mut u64) -> Duration {
    *dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let share = u32::try_from(*dice >> 54).expect("ten bits"); // 0 to 1,023
    pause / 2 + pause * share / 1024
}
