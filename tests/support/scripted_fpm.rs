//! A FastCGI server that misbehaves by name.
//!
//! It reads as php-src's `fcgi_read_request` does, not as the specification allows: each PARAMS record is parsed by
//! itself, the body is what CONTENT_LENGTH says, and after END_REQUEST a connection without KEEP_CONN is shut down,
//! read empty and closed. Where php-src silently goes wrong (a second request id, a stray record among PARAMS) it refuses
//! instead. What a peer did wrong stands in [`ScriptedFpm::violations`].

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::fastcgi::{self, PARAMS, STDERR, STDIN, STDOUT};
use super::gate::{Gate, wait_for};
use super::{pattern, sha1};

/// php-src polls a new connection for so long before it closes it unread.
const FIRST_BYTE: Duration = Duration::from_secs(5);

/// How much later than a SYN the FIN sent before it may arrive, with all CPUs busy.
const REORDERED: Duration = Duration::from_millis(20);

/// How one request is answered. Start with a constructor, add what goes wrong: `Behaviour::hello("blue").splits_every_byte()`.
#[derive(Clone, Debug)]
pub struct Behaviour {
    status: u16,
    headers: Vec<(String, String)>,
    body: Body,
    colour: Option<String>,
    early: Early,
    hold: Holds,
    stall: Option<Stall>,
    slow: Option<(usize, Duration)>,
    splits_every_byte: bool,
    record_size: usize,
    stderr_bytes: usize,
    cut: Option<(usize, Cut)>,
    version: u8,
    id_offset: u16,
    kind: u8,
    protocol_status: u8,
    app_status: u32,
    endless_headers: bool,
    data_after_end: bool,
    after: After,
    raw: Option<Bytes>,
}

#[derive(Clone, Debug)]
enum Body {
    Bytes(Bytes),
    Pattern(usize),
    Digest,
}

/// When the answer is written, seen from the request's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Early {
    AfterTheBody,
    BeforeTheBody,
    InsteadOfTheBody,
    NeverReads,
}

#[derive(Clone, Debug, Default)]
struct Holds {
    body: Option<Gate>,
    headers: Option<Gate>,
    rest: Option<Gate>,
    end: Option<Gate>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stall {
    BeforeHeaders,
    AfterHeaders,
    BeforeEnd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    Fin,
    Reset,
}

#[derive(Clone, Copy, Debug)]
enum After {
    AsAsked,
    ClosesIdle(Duration),
    ResetsOnReuse,
    Recycles(usize),
}

impl Behaviour {
    /// Exactly this status (no `Status` line for 200, as PHP), these headers and this body.
    pub fn answers(status: u16, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Behaviour {
        Behaviour {
            status,
            headers: headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            body: Body::Bytes(body.into()),
            colour: None,
            early: Early::AfterTheBody,
            hold: Holds::default(),
            stall: None,
            slow: None,
            splits_every_byte: false,
            record_size: fastcgi::MOST,
            stderr_bytes: 0,
            cut: None,
            version: 1,
            id_offset: 0,
            kind: STDOUT,
            protocol_status: fastcgi::REQUEST_COMPLETE,
            app_status: 0,
            endless_headers: false,
            data_after_end: false,
            after: After::AsAsked,
            raw: None,
        }
    }

    /// As `hello.php`, and with the ledger's id handed back.
    pub fn hello(colour: &str) -> Behaviour {
        Behaviour::answers(200, &[("Content-Type", "text/plain")], format!("{colour} hello\n")).names_itself(colour)
    }

    /// As `upload.php`: JSON with colour, ledger_id, length and sha1 of the body.
    pub fn digests_body(colour: &str) -> Behaviour {
        let mut behaviour = Behaviour::answers(200, &[("Content-Type", "application/json")], Bytes::new());
        behaviour.body = Body::Digest;
        behaviour.names_itself(colour)
    }

    /// As `big.php`: the first `bytes` of [`pattern`], with a Content-Length.
    pub fn big_body(bytes: usize) -> Behaviour {
        let length = bytes.to_string();
        let headers = [("Content-Type", "application/octet-stream"), ("Content-Length", length.as_str())];
        let mut behaviour = Behaviour::answers(200, &headers, Bytes::new());
        behaviour.body = Body::Pattern(bytes);
        behaviour
    }

    /// These bytes instead of any records, then the connection is closed.
    pub fn raw(bytes: impl Into<Bytes>) -> Behaviour {
        let mut behaviour = Behaviour::answers(200, &[], Bytes::new());
        behaviour.raw = Some(bytes.into());
        behaviour
    }

    /// Never reads what is sent; holds the connection until the peer closes it. For the whole server or one
    /// connection, not by path.
    pub fn accepts_and_never_reads() -> Behaviour {
        let mut behaviour = Behaviour::answers(200, &[], Bytes::new());
        behaviour.early = Early::NeverReads;
        behaviour
    }

    /// END_REQUEST with OVERLOADED and nothing else.
    pub fn overloaded() -> Behaviour {
        Behaviour::answers(200, &[], Bytes::new()).ends_with(fastcgi::OVERLOADED)
    }

    /// END_REQUEST with CANT_MPX_CONN and nothing else.
    pub fn cant_multiplex() -> Behaviour {
        Behaviour::answers(200, &[], Bytes::new()).ends_with(fastcgi::CANT_MPX_CONN)
    }

    /// Adds `X-Colour` and hands `X-Ledger-ID` back, as `tests/php` does.
    pub fn names_itself(mut self, colour: &str) -> Behaviour {
        self.colour = Some(colour.to_owned());
        self
    }

    pub fn header(mut self, name: &str, value: &str) -> Behaviour {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Ends with this protocolStatus; anything but REQUEST_COMPLETE leaves the answer out.
    pub fn ends_with(mut self, protocol_status: u8) -> Behaviour {
        self.protocol_status = protocol_status;
        self
    }

    pub fn app_status(mut self, app_status: u32) -> Behaviour {
        self.app_status = app_status;
        self
    }

    /// After an answer closes the kept connection once it has been idle for so long.
    pub fn closes_idle(mut self, after: Duration) -> Behaviour {
        self.after = After::ClosesIdle(after);
        self
    }

    /// After an answer resets the kept connection, unread, as soon as another request comes on it.
    pub fn resets_on_reuse(mut self) -> Behaviour {
        self.after = After::ResetsOnReuse;
        self
    }

    /// `pm.max_requests = 1`: after END_REQUEST shuts down, and reads away what comes.
    pub fn closes_after_request(self) -> Behaviour {
        self.closes_after_requests(1)
    }

    /// `pm.max_requests = n`, counted for each connection.
    pub fn closes_after_requests(mut self, n: usize) -> Behaviour {
        self.after = After::Recycles(n);
        self
    }

    /// Each byte of the answer in a write of its own.
    pub fn splits_every_byte(mut self) -> Behaviour {
        self.splits_every_byte = true;
        self
    }

    /// STDOUT and STDERR records of at most so many bytes.
    pub fn record_size(mut self, bytes: usize) -> Behaviour {
        self.record_size = bytes.clamp(1, fastcgi::MOST);
        self
    }

    /// So many bytes of STDERR, a third each before, between and after headers and body.
    pub fn floods_stderr(mut self, bytes: usize) -> Behaviour {
        self.stderr_bytes = bytes;
        self
    }

    /// Says nothing; goes when the peer does.
    pub fn stalls_before_headers(mut self) -> Behaviour {
        self.stall = Some(Stall::BeforeHeaders);
        self
    }

    /// Headers, and then nothing; goes when the peer does.
    pub fn stalls_after_headers(mut self) -> Behaviour {
        self.stall = Some(Stall::AfterHeaders);
        self
    }

    /// The whole answer, but no END_REQUEST: `fastcgi_finish_request()`. Goes when the peer does.
    pub fn stalls_before_end(mut self) -> Behaviour {
        self.stall = Some(Stall::BeforeEnd);
        self
    }

    /// Waits at the gate before it reads the body.
    pub fn holds_body(mut self, gate: &Gate) -> Behaviour {
        self.hold.body = Some(gate.clone());
        self
    }

    /// Waits at the gate, the request read, before the answer.
    pub fn holds_answer(mut self, gate: &Gate) -> Behaviour {
        self.hold.headers = Some(gate.clone());
        self
    }

    /// Waits at the gate between headers and body.
    pub fn holds_after_headers(mut self, gate: &Gate) -> Behaviour {
        self.hold.rest = Some(gate.clone());
        self
    }

    /// Waits at the gate between body and END_REQUEST.
    pub fn holds_end(mut self, gate: &Gate) -> Behaviour {
        self.hold.end = Some(gate.clone());
        self
    }

    /// The body in records of `chunk` bytes with a pause after each.
    pub fn slow_body(mut self, chunk: usize, pause: Duration) -> Behaviour {
        self.slow = Some((chunk.max(1), pause));
        self
    }

    /// Closes after so many bytes of the answer on the wire, records and all.
    pub fn dies_after(mut self, bytes: usize) -> Behaviour {
        self.cut = Some((bytes, Cut::Fin));
        self
    }

    /// As [`Behaviour::dies_after`], but with a reset.
    pub fn resets_after(mut self, bytes: usize) -> Behaviour {
        self.cut = Some((bytes, Cut::Reset));
        self
    }

    /// STDOUT under the next request's id.
    pub fn wrong_request_id(mut self) -> Behaviour {
        self.id_offset = 1;
        self
    }

    /// STDOUT in records of version 2.
    pub fn wrong_version(mut self) -> Behaviour {
        self.version = 2;
        self
    }

    /// STDOUT in records of type 42.
    pub fn wrong_type(mut self) -> Behaviour {
        self.kind = 42;
        self
    }

    /// Another STDOUT record right behind END_REQUEST.
    pub fn data_after_end(mut self) -> Behaviour {
        self.data_after_end = true;
        self
    }

    /// Header lines until the peer has had enough.
    pub fn endless_headers(mut self) -> Behaviour {
        self.endless_headers = true;
        self
    }

    /// The answer first, then the body, then END_REQUEST: a script that does not look at its input.
    pub fn answers_before_reading_body(mut self) -> Behaviour {
        self.early = Early::BeforeTheBody;
        self
    }

    /// The answer and END_REQUEST without reading the body at all, then closes.
    pub fn ends_before_reading_body(mut self) -> Behaviour {
        self.early = Early::InsteadOfTheBody;
        self
    }
}

/// One request as it arrived.
#[derive(Clone, Debug)]
pub struct Received {
    /// Number of the connection, from 0, in the order of accept.
    pub connection: usize,
    /// From 0; above that the connection was reused.
    pub nth_on_connection: usize,
    pub keep_conn: bool,
    pub id: u16,
    /// In the order and the bytes in which they came; duplicates stay.
    pub params: Vec<(Bytes, Bytes)>,
    pub body: Bytes,
    /// PARAMS and then the body have been read. False while the body is on its way.
    pub whole: bool,
    /// END_REQUEST has been written.
    pub completed: bool,
    pub at: Instant,
    /// Each record of the request up to its last byte: type, content length, padding length.
    pub records: Vec<(u8, usize, usize)>,
}

impl Received {
    /// The value of a parameter; the last one where it came twice, as in PHP.
    pub fn param(&self, name: &str) -> Option<String> {
        let found = self.params.iter().rev().find(|(found, _)| found == name.as_bytes());
        found.map(|(_, value)| String::from_utf8_lossy(value).into_owned())
    }

    pub fn reused(&self) -> bool {
        self.nth_on_connection > 0
    }

    pub fn method(&self) -> String {
        self.param("REQUEST_METHOD").unwrap_or_default()
    }

    pub fn uri(&self) -> String {
        self.param("REQUEST_URI").unwrap_or_default()
    }

    /// The id the ledger sent.
    pub fn ledger_id(&self) -> Option<String> {
        self.param("HTTP_X_LEDGER_ID")
    }
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The peer's FIN came between requests, or after END_REQUEST.
    PeerClosed,
    /// The peer closed or reset while a request was being read or answered.
    PeerLeft,
    Closed,
    Reset,
    /// Closed without an answer because of what the peer sent: see the violations.
    Refused,
}

#[derive(Debug, Default)]
struct State {
    requests: Vec<Received>,
    connections: usize,
    open: BTreeMap<usize, Held>,
    most_connected: usize,
    backlog_violations: usize,
    violations: Vec<String>,
    endings: Vec<(usize, Ending)>,
    read_away: usize,
}

#[derive(Debug)]
struct Held {
    socket: RawFd,
    running: bool,
}

/// The connections that stood when another one came.
#[derive(Debug, Default)]
struct Suspects {
    held: usize,
    /// Nothing runs on them, and no FIN has been seen: kept by the peer, or its FIN is late.
    silent: Vec<usize>,
    /// A violation has been counted for the newcomer.
    counted: bool,
}

#[derive(Debug)]
struct Script {
    default: Behaviour,
    next: VecDeque<Behaviour>,
    by_path: Vec<(String, Behaviour)>,
    by_connection: BTreeMap<usize, Behaviour>,
}

#[derive(Debug)]
struct Shared {
    state: watch::Sender<State>,
    script: Mutex<Script>,
    workers: Option<(usize, Arc<Semaphore>)>,
}

/// The running server. Dropped, it closes everything.
#[derive(Debug)]
pub struct ScriptedFpm {
    address: SocketAddr,
    shared: Arc<Shared>,
    listening: watch::Sender<bool>,
    server: JoinHandle<()>,
}

/// What [`ScriptedFpm::builder`] collects.
#[derive(Debug)]
pub struct Builder {
    script: Script,
    workers: Option<usize>,
    address: Option<SocketAddr>,
}

impl Builder {
    /// For requests whose SCRIPT_NAME or REQUEST_URI begins with `prefix`; the longest wins.
    pub fn on(mut self, prefix: &str, behaviour: Behaviour) -> Builder {
        self.script.by_path.push((prefix.to_owned(), behaviour));
        self
    }

    /// For all requests on the nth connection, from 0.
    pub fn on_connection(mut self, nth: usize, behaviour: Behaviour) -> Builder {
        self.script.by_connection.insert(nth, behaviour);
        self
    }

    /// As FPM with `n` children: a connection holds one from accept to close, further ones wait unserved.
    pub fn workers(mut self, n: usize) -> Builder {
        self.workers = Some(n);
        self
    }

    /// Listens there, not on a port of the kernel's choice: comes back after [`ScriptedFpm::dies`].
    pub fn at(mut self, address: SocketAddr) -> Builder {
        self.address = Some(address);
        self
    }

    pub async fn start(self) -> ScriptedFpm {
        let address = self.address.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
        let listener = TcpListener::bind(address).await.expect("the scripted FPM binds its port");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shared = Arc::new(Shared {
            state: watch::Sender::new(State::default()),
            script: Mutex::new(self.script),
            workers: self.workers.map(|n| (n, Arc::new(Semaphore::new(n)))),
        });
        let (listening, stop) = watch::channel(true);
        let server = tokio::spawn(accept(listener, Arc::clone(&shared), stop));
        ScriptedFpm { address, shared, listening, server }
    }
}

impl ScriptedFpm {
    /// Any number of workers, all requests answered alike.
    pub async fn start(behaviour: Behaviour) -> ScriptedFpm {
        ScriptedFpm::builder(behaviour).start().await
    }

    pub fn builder(default: Behaviour) -> Builder {
        let script = Script { default, next: VecDeque::new(), by_path: Vec::new(), by_connection: BTreeMap::new() };
        Builder { script, workers: None, address: None }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From the next request on.
    pub fn set(&self, behaviour: Behaviour) {
        self.script(|script| script.default = behaviour);
    }

    /// As [`Builder::on`], while running; replaces what the prefix had.
    pub fn on(&self, prefix: &str, behaviour: Behaviour) {
        self.script(|script| {
            script.by_path.retain(|(known, _)| known != prefix);
            script.by_path.push((prefix.to_owned(), behaviour));
        });
    }

    /// For one request, whichever comes next; several calls make a queue. Goes before path and connection.
    pub fn next(&self, behaviour: Behaviour) {
        self.script(|script| script.next.push_back(behaviour));
    }

    /// All requests whose PARAMS have been read, in that order.
    pub fn requests(&self) -> Vec<Received> {
        self.shared.state.borrow().requests.clone()
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.shared.state.borrow().connections
    }

    /// Connections this side has not seen the end of.
    pub fn open_connections(&self) -> usize {
        self.shared.state.borrow().open.len()
    }

    /// The most connections that held, or waited for, a worker at once. One whose peer has closed and on which
    /// nothing runs no longer counts.
    pub fn most_connected(&self) -> usize {
        self.shared.state.borrow().most_connected
    }

    /// Connections that came while all workers were held, and so would have stood in FPM's listen backlog. Where a
    /// connection without a request stands in the way it is counted 20 ms later, unless that is closed meanwhile.
    pub fn backlog_violations(&self) -> usize {
        self.shared.state.borrow().backlog_violations
    }

    /// What peers sent that php-src would not take, in words.
    pub fn violations(&self) -> Vec<String> {
        self.shared.state.borrow().violations.clone()
    }

    /// Connections that have ended, in that order, with their number.
    pub fn endings(&self) -> Vec<(usize, Ending)> {
        self.shared.state.borrow().endings.clone()
    }

    /// Bytes that came after the shutdown of [`Behaviour::closes_after_request`] and were thrown away: requests lost.
    pub fn read_away(&self) -> usize {
        self.shared.state.borrow().read_away
    }

    /// Until the PARAMS of `n` requests have been read.
    pub async fn wait_begun(&self, n: usize) {
        wait_for(&self.shared.state, &format!("{n} requests begun"), |state| state.requests.len() >= n).await;
    }

    /// Until `n` requests have been read whole.
    pub async fn wait_requests(&self, n: usize) {
        let whole = |state: &State| state.requests.iter().filter(|request| request.whole).count() >= n;
        wait_for(&self.shared.state, &format!("{n} requests"), whole).await;
    }

    /// Until END_REQUEST has been written `n` times.
    pub async fn wait_completed(&self, n: usize) {
        let completed = |state: &State| state.requests.iter().filter(|request| request.completed).count() >= n;
        wait_for(&self.shared.state, &format!("{n} requests completed"), completed).await;
    }

    pub async fn wait_connections(&self, n: usize) {
        wait_for(&self.shared.state, &format!("{n} connections"), |state| state.connections >= n).await;
    }

    /// Until exactly `n` connections are open.
    pub async fn wait_open(&self, n: usize) {
        wait_for(&self.shared.state, &format!("{n} open connections"), |state| state.open.len() == n).await;
    }

    /// Until `n` connections have ended.
    pub async fn wait_endings(&self, n: usize) {
        wait_for(&self.shared.state, &format!("{n} ended connections"), |state| state.endings.len() >= n).await;
    }

    /// New connections are refused from the return on, those that stand go on.
    pub async fn stops_listening(&self) {
        self.listening.send_replace(false);
        // The accept loop drops its receiver together with the listener.
        self.listening.closed().await;
    }

    /// Closes the listener and every connection at once, as a pod that is killed.
    pub async fn dies(self) {
        self.server.abort();
        self.listening.closed().await;
        self.wait_open(0).await;
    }

    fn script(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.shared.script.lock().expect("no test panics while it holds the script"));
    }
}

impl Drop for ScriptedFpm {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, mut listening: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted.expect("the scripted FPM accepts");
                let _ = stream.set_nodelay(true);
                let (number, suspects) = shared.enter(stream.as_raw_fd());
                if !suspects.silent.is_empty() {
                    connections.spawn(Arc::clone(&shared).judge(suspects));
                }
                connections.spawn(serve(Arc::clone(&shared), number, stream));
            }
            _ = listening.changed() => break,
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    drop(listening);
    while connections.join_next().await.is_some() {}
}

impl Shared {
    /// Counts a connection in, and those surely held before it: on them a request runs.
    fn enter(&self, socket: RawFd) -> (usize, Suspects) {
        let mut number = 0;
        let mut suspects = Suspects::default();
        self.state.send_modify(|state| {
            suspects.held = state.open.values().filter(|held| held.running).count();
            let silent = state.open.iter().filter(|(_, held)| !held.running && !peer_has_left(held.socket));
            suspects.silent = silent.map(|(number, _)| *number).collect();
            suspects.counted = self.exceeds(suspects.held);
            number = state.connections;
            state.connections += 1;
            state.most_connected = state.most_connected.max(suspects.held + 1);
            state.backlog_violations += usize::from(suspects.counted);
            state.open.insert(number, Held { socket, running: false });
        });
        (number, suspects)
    }

    /// Whether a connection that comes while so many are held finds no worker.
    fn exceeds(&self, held: usize) -> bool {
        self.workers.as_ref().is_some_and(|(n, _)| held >= *n)
    }

    /// The kernel may deliver a SYN before the FIN sent ahead of it, from another CPU: the silent ones may have been
    /// closed. Those that begin a request instead, or stay, were held.
    async fn judge(self: Arc<Self>, mut suspects: Suspects) {
        for _ in 0..REORDERED.as_millis() {
            suspects.silent.retain(|number| match self.state.borrow().open.get(number) {
                Some(held) if held.running => {
                    suspects.held += 1;
                    false
                }
                Some(held) => !peer_has_left(held.socket),
                None => false,
            });
            if suspects.silent.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let held = suspects.held + suspects.silent.len();
        self.state.send_modify(|state| {
            state.most_connected = state.most_connected.max(held + 1);
            state.backlog_violations += usize::from(!suspects.counted && self.exceeds(held));
        });
    }

    fn running(&self, connection: usize, running: bool) {
        self.state.send_modify(|state| {
            if let Some(held) = state.open.get_mut(&connection) {
                held.running = running;
            }
        });
    }

    fn violation(&self, connection: usize, what: &str) {
        self.state.send_modify(|state| state.violations.push(format!("connection {connection}: {what}")));
    }

    fn change(&self, request: usize, change: impl FnOnce(&mut Received)) {
        self.state.send_modify(|state| change(&mut state.requests[request]));
    }

    fn behaviour(&self, connection: usize, request: Option<&Received>) -> Behaviour {
        let mut script = self.script.lock().expect("no test panics while it holds the script");
        if let Some(request) = request {
            if let Some(behaviour) = script.next.pop_front() {
                return behaviour;
            }
            let (uri, name) = (request.uri(), request.param("SCRIPT_NAME").unwrap_or_default());
            let matching = script.by_path.iter().filter(|(prefix, _)| uri.starts_with(prefix) || name.starts_with(prefix));
            if let Some((_, behaviour)) = matching.max_by_key(|(prefix, _)| prefix.len()) {
                return behaviour.clone();
            }
        }
        script.by_connection.get(&connection).unwrap_or(&script.default).clone()
    }
}

/// Takes the connection out of the books before its socket is closed and the number used again.
struct Seat {
    shared: Arc<Shared>,
    connection: usize,
    ending: Ending,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.state.send_modify(|state| {
            state.open.remove(&self.connection);
            state.endings.push((self.connection, self.ending));
        });
    }
}

async fn serve(shared: Arc<Shared>, connection: usize, stream: TcpStream) {
    let mut wire = Wire { stream, buffer: BytesMut::new(), records: Vec::new() };
    let mut seat = Seat { shared: Arc::clone(&shared), connection, ending: Ending::Closed };
    let _worker = match &shared.workers {
        Some((_, free)) => Some(Arc::clone(free).acquire_owned().await),
        None => None,
    };
    let stop = serve_requests(&shared, connection, &mut wire).await;
    seat.ending = match stop {
        Stop::PeerClosed => Ending::PeerClosed,
        Stop::PeerLeft => Ending::PeerLeft,
        Stop::Close => Ending::Closed,
        Stop::Reset => {
            let _ = wire.stream.set_zero_linger();
            Ending::Reset
        }
        Stop::Refuse(why) => {
            shared.violation(connection, &why);
            Ending::Refused
        }
    };
}

/// Why a connection is over.
#[derive(Debug)]
enum Stop {
    PeerClosed,
    PeerLeft,
    Close,
    Reset,
    Refuse(String),
}

async fn serve_requests(shared: &Shared, connection: usize, wire: &mut Wire) -> Stop {
    if shared.behaviour(connection, None).early == Early::NeverReads {
        peer_gone(&wire.stream).await;
        return Stop::PeerClosed;
    }
    let mut nth = 0;
    loop {
        if nth == 0 && tokio::time::timeout(FIRST_BYTE, wire.stream.readable()).await.is_err() {
            return Stop::Refuse(format!("sent nothing for {FIRST_BYTE:?}"));
        }
        match serve_one(shared, connection, nth, wire).await {
            Err(stop) => return stop,
            Ok(After::Recycles(most)) if nth + 1 >= most => {
                return read_away(shared, connection, wire).await;
            }
            Ok(After::AsAsked | After::Recycles(_)) => {}
            Ok(After::ClosesIdle(after)) => {
                if tokio::time::timeout(after, wire.next_request()).await.is_err() {
                    return Stop::Close;
                }
            }
            Ok(After::ResetsOnReuse) => {
                return if wire.next_request().await { Stop::Reset } else { Stop::PeerClosed };
            }
        }
        nth += 1;
    }
}

/// php-src `fcgi_close` without force: shut down, read until the peer closes too.
async fn read_away(shared: &Shared, connection: usize, wire: &mut Wire) -> Stop {
    let _ = wire.stream.shutdown().await;
    let mut lost = wire.buffer.len();
    let mut scratch = [0; 4096];
    while let Ok(n @ 1..) = wire.stream.read(&mut scratch).await {
        lost += n;
    }
    // The empty STDIN record that ends a request is read here too, and is no loss.
    if lost > 8 {
        shared.state.send_modify(|state| state.read_away += lost);
        shared.violation(connection, &format!("{lost} bytes of a request sent to a connection that was going away"));
    }
    Stop::PeerClosed
}

async fn serve_one(shared: &Shared, connection: usize, nth: usize, wire: &mut Wire) -> Result<After, Stop> {
    let received = wire.read_head(connection, nth).await?;
    shared.running(connection, true);
    let behaviour = shared.behaviour(connection, Some(&received));
    let (keep, id) = (received.keep_conn, received.id);
    let length = received.param("CONTENT_LENGTH").and_then(|value| value.parse().ok()).unwrap_or(0);
    let ledger_id = received.ledger_id();
    let mut index = 0;
    shared.state.send_modify(|state| {
        index = state.requests.len();
        state.requests.push(received);
    });
    let mut out = Out { behaviour: &behaviour, id, pending: Vec::new(), stdout: Vec::new(), written: 0 };

    let mut trouble = None;
    if behaviour.early == Early::AfterTheBody {
        trouble = read_body(shared, connection, index, length, &behaviour, wire).await?;
    }
    if let Some(raw) = &behaviour.raw {
        out.pending.extend_from_slice(raw);
        out.send(wire).await?;
        return Err(Stop::Close);
    }
    if let Some(gate) = &behaviour.hold.headers {
        gate.pass().await;
    }
    if behaviour.stall == Some(Stall::BeforeHeaders) {
        peer_gone(&wire.stream).await;
        return Err(Stop::PeerLeft);
    }
    if behaviour.protocol_status == fastcgi::REQUEST_COMPLETE {
        let body = shared.state.borrow().requests[index].body.clone();
        answer(&mut out, wire, &body, ledger_id.as_deref()).await?;
    }
    if behaviour.early == Early::BeforeTheBody {
        out.flush(wire).await?;
        trouble = read_body(shared, connection, index, length, &behaviour, wire).await?;
    }
    if let Some(gate) = &behaviour.hold.end {
        out.flush(wire).await?;
        gate.pass().await;
    }
    if behaviour.stall == Some(Stall::BeforeEnd) {
        out.flush(wire).await?;
        peer_gone(&wire.stream).await;
        return Err(Stop::PeerLeft);
    }
    out.close_stdout();
    out.pending.extend(fastcgi::end_request(id, behaviour.app_status, behaviour.protocol_status));
    if behaviour.data_after_end {
        out.pending.extend(fastcgi::record(STDOUT, id, b"after the end"));
    }
    // Before the bytes are out: whoever has read END_REQUEST may close and connect anew at once.
    shared.running(connection, false);
    out.send(wire).await?;
    shared.change(index, |request| request.completed = true);

    if behaviour.early == Early::InsteadOfTheBody && length > 0 {
        return Err(Stop::Close);
    }
    if let Some(what) = trouble {
        return Err(Stop::Refuse(what));
    }
    if !keep {
        return Err(read_away(shared, connection, wire).await);
    }
    Ok(behaviour.after)
}

/// The body as CONTENT_LENGTH has it. `Some`: what was wrong with it; the script runs nevertheless, as in FPM.
async fn read_body(
    shared: &Shared,
    connection: usize,
    index: usize,
    length: usize,
    behaviour: &Behaviour,
    wire: &mut Wire,
) -> Result<Option<String>, Stop> {
    if let Some(gate) = &behaviour.hold.body {
        gate.pass().await;
    }
    let mut body = BytesMut::new();
    let mut trouble = None;
    while body.len() < length && trouble.is_none() {
        let header = wire.header().await.map_err(|_| Stop::PeerLeft)?;
        if header.kind != STDIN {
            trouble = Some(format!("a record of type {} where the body should be", header.kind));
        } else if header.len == 0 {
            trouble = Some(format!("STDIN ended after {} of {length} bytes", body.len()));
        } else {
            body.extend_from_slice(&wire.content(&header).await.map_err(|_| Stop::PeerLeft)?);
        }
    }
    if body.len() > length {
        trouble = Some(format!("{} bytes of STDIN where CONTENT_LENGTH is {length}", body.len()));
        body.truncate(length);
    }
    if let Some(what) = &trouble {
        shared.violation(connection, what);
    }
    let records = std::mem::take(&mut wire.records);
    shared.change(index, |request| {
        request.body = body.freeze();
        request.whole = true;
        request.records.extend(records);
    });
    Ok(trouble.map(|_| "closed after the answer because of that body".to_owned()))
}

async fn answer(out: &mut Out<'_>, wire: &mut Wire, body: &Bytes, ledger_id: Option<&str>) -> Result<(), Stop> {
    let behaviour = out.behaviour;
    out.stderr(behaviour.stderr_bytes / 3);
    out.stdout.extend_from_slice(head(behaviour, ledger_id).as_bytes());
    if behaviour.endless_headers {
        for n in 0_u64.. {
            out.stdout.extend_from_slice(format!("X-Endless-{n}: {n}\r\n").as_bytes());
            if out.stdout.len() > 4096 {
                out.flush(wire).await?;
            }
        }
    }
    out.stdout.extend_from_slice(b"\r\n");
    if let Some(gate) = &behaviour.hold.rest {
        out.flush(wire).await?;
        gate.pass().await;
    }
    if behaviour.stall == Some(Stall::AfterHeaders) {
        out.flush(wire).await?;
        peer_gone(&wire.stream).await;
        return Err(Stop::PeerLeft);
    }
    if behaviour.stderr_bytes > 0 {
        out.close_stdout();
        out.stderr(behaviour.stderr_bytes / 3);
    }
    let body = match &behaviour.body {
        Body::Bytes(bytes) => bytes.clone(),
        Body::Pattern(bytes) => pattern::pattern(*bytes),
        Body::Digest => {
            let colour = behaviour.colour.as_deref().unwrap_or_default();
            let digest =
                serde_json::json!({"colour": colour, "ledger_id": ledger_id, "length": body.len(), "sha1": sha1::hex(body)});
            format!("{digest}\n").into()
        }
    };
    match behaviour.slow {
        Some((chunk, pause)) => {
            for piece in body.chunks(chunk) {
                out.stdout.extend_from_slice(piece);
                out.flush(wire).await?;
                tokio::time::sleep(pause).await;
            }
        }
        None => {
            for piece in body.chunks(1 << 20) {
                out.stdout.extend_from_slice(piece);
                if body.len() > 1 << 20 {
                    out.flush(wire).await?;
                }
            }
        }
    }
    if behaviour.stderr_bytes > 0 {
        out.close_stdout();
        out.stderr(behaviour.stderr_bytes - behaviour.stderr_bytes / 3 * 2);
    }
    Ok(())
}

fn head(behaviour: &Behaviour, ledger_id: Option<&str>) -> String {
    let mut head = String::new();
    if behaviour.status != 200 {
        let status = http::StatusCode::from_u16(behaviour.status).ok();
        let reason = status.and_then(|status| status.canonical_reason()).unwrap_or("Whatever");
        head += &format!("Status: {} {reason}\r\n", behaviour.status);
    }
    for (name, value) in &behaviour.headers {
        head += &format!("{name}: {value}\r\n");
    }
    if let Some(colour) = &behaviour.colour {
        head += &format!("X-Colour: {colour}\r\n");
        if let Some(id) = ledger_id {
            head += &format!("X-Ledger-ID: {id}\r\n");
        }
    }
    head
}

/// The answer on its way: STDOUT is gathered into records, as FPM does, until something must be seen by the peer.
struct Out<'a> {
    behaviour: &'a Behaviour,
    id: u16,
    stdout: Vec<u8>,
    pending: Vec<u8>,
    written: usize,
}

impl Out<'_> {
    fn close_stdout(&mut self) {
        let Behaviour { version, kind, id_offset, record_size, .. } = *self.behaviour;
        for piece in std::mem::take(&mut self.stdout).chunks(record_size) {
            self.pending.extend(fastcgi::record_of(version, kind, self.id.wrapping_add(id_offset), piece));
        }
    }

    fn stderr(&mut self, bytes: usize) {
        let text: Vec<u8> = b"PHP message: the flood rises\n".iter().copied().cycle().take(bytes).collect();
        for piece in text.chunks(self.behaviour.record_size) {
            self.pending.extend(fastcgi::record(STDERR, self.id, piece));
        }
    }

    async fn flush(&mut self, wire: &mut Wire) -> Result<(), Stop> {
        self.close_stdout();
        self.send(wire).await
    }

    async fn send(&mut self, wire: &mut Wire) -> Result<(), Stop> {
        let mut bytes = std::mem::take(&mut self.pending);
        let cut = self.behaviour.cut.filter(|(at, _)| self.written + bytes.len() > *at);
        if let Some((at, _)) = cut {
            bytes.truncate(at - self.written);
        }
        self.written += bytes.len();
        let step = if self.behaviour.splits_every_byte { 1 } else { bytes.len().max(1) };
        for piece in bytes.chunks(step) {
            wire.stream.write_all(piece).await.map_err(|_| Stop::PeerLeft)?;
            if self.behaviour.splits_every_byte {
                tokio::task::yield_now().await;
            }
        }
        match cut {
            None => Ok(()),
            Some((_, Cut::Fin)) => Err(Stop::Close),
            Some((_, Cut::Reset)) => Err(Stop::Reset),
        }
    }
}

/// The reading side, record by record.
struct Wire {
    stream: TcpStream,
    buffer: BytesMut,
    records: Vec<(u8, usize, usize)>,
}

struct Header {
    kind: u8,
    id: u16,
    len: usize,
    padding: usize,
}

impl Wire {
    async fn take(&mut self, n: usize) -> io::Result<BytesMut> {
        while self.buffer.len() < n {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(self.buffer.split_to(n))
    }

    async fn header(&mut self) -> io::Result<Header> {
        let bytes = self.take(8).await?;
        if bytes[0] < 1 {
            return Err(io::Error::other("a record of version 0"));
        }
        let len = usize::from(u16::from_be_bytes([bytes[4], bytes[5]]));
        let header = Header { kind: bytes[1], id: u16::from_be_bytes([bytes[2], bytes[3]]), len, padding: usize::from(bytes[6]) };
        if header.len + header.padding > 65_535 {
            return Err(io::Error::other("content and padding above 65,535 bytes"));
        }
        self.records.push((header.kind, header.len, header.padding));
        Ok(header)
    }

    async fn content(&mut self, header: &Header) -> io::Result<Bytes> {
        let mut content = self.take(header.len + header.padding).await?;
        content.truncate(header.len);
        Ok(content.freeze())
    }

    /// Until a record has come that does not belong to the request before; false if the peer closed instead.
    async fn next_request(&mut self) -> bool {
        loop {
            while let [_, STDIN, _, _, 0, 0, padding, _, ..] = self.buffer[..] {
                let whole = (8 + usize::from(padding)).min(self.buffer.len());
                let _ = self.buffer.split_to(whole);
            }
            if self.buffer.len() >= 8 {
                return true;
            }
            if !matches!(self.stream.read_buf(&mut self.buffer).await, Ok(1..)) {
                return false;
            }
        }
    }

    /// php-src `fcgi_read_request`: BEGIN_REQUEST and PARAMS.
    async fn read_head(&mut self, connection: usize, nth: usize) -> Result<Received, Stop> {
        self.records.clear();
        let mut header = match self.header().await {
            Ok(header) => header,
            Err(_) if self.buffer.is_empty() => return Err(Stop::PeerClosed),
            Err(error) => return Err(refuse(error)),
        };
        while header.kind == STDIN && header.len == 0 {
            self.take(header.padding).await.map_err(refuse)?;
            self.records.clear();
            header = match self.header().await {
                Ok(header) => header,
                Err(_) if self.buffer.is_empty() => return Err(Stop::PeerClosed),
                Err(error) => return Err(refuse(error)),
            };
        }
        if header.kind != fastcgi::BEGIN_REQUEST || header.len != 8 {
            return Err(Stop::Refuse(format!(
                "a record of type {} and {} bytes instead of BEGIN_REQUEST",
                header.kind, header.len
            )));
        }
        let begin = self.content(&header).await.map_err(refuse)?;
        if begin[..2] != [0, 1] {
            return Err(Stop::Refuse(format!("role {:?}, not responder", &begin[..2])));
        }
        let (id, keep_conn) = (header.id, begin[2] & fastcgi::KEEP_CONN != 0);
        let at = Instant::now();
        let mut params = Vec::new();
        loop {
            header = self.header().await.map_err(refuse)?;
            if header.kind != PARAMS {
                return Err(Stop::Refuse(format!("a record of type {} before PARAMS ended", header.kind)));
            }
            if header.id != id {
                return Err(Stop::Refuse(format!("request {} within request {id}", header.id)));
            }
            let content = self.content(&header).await.map_err(refuse)?;
            if content.is_empty() {
                break;
            }
            params.extend(get_params(&content).ok_or_else(|| {
                Stop::Refuse(
                    "a PARAMS record that is not whole pairs (php-src fcgi_get_params parses each record alone)".to_owned(),
                )
            })?);
        }
        let (body, records) = (Bytes::new(), std::mem::take(&mut self.records));
        let (whole, completed) = (false, false);
        Ok(Received { connection, nth_on_connection: nth, keep_conn, id, params, body, whole, completed, at, records })
    }
}

fn refuse(error: io::Error) -> Stop {
    match error.kind() {
        io::ErrorKind::Other => Stop::Refuse(error.to_string()),
        _ => Stop::PeerLeft,
    }
}

/// php-src `fcgi_get_params`: whole pairs, or nothing.
fn get_params(mut bytes: &[u8]) -> Option<Vec<(Bytes, Bytes)>> {
    fn len(bytes: &mut &[u8]) -> Option<usize> {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        if *first < 128 {
            return Some(usize::from(*first));
        }
        let (more, rest) = rest.split_at_checked(3)?;
        *bytes = rest;
        usize::try_from(u32::from_be_bytes([first & 0x7f, more[0], more[1], more[2]])).ok()
    }
    let mut pairs = Vec::new();
    while !bytes.is_empty() {
        let (name, value) = (len(&mut bytes)?, len(&mut bytes)?);
        let (name, rest) = bytes.split_at_checked(name)?;
        let (value, rest) = rest.split_at_checked(value)?;
        bytes = rest;
        pairs.push((Bytes::copy_from_slice(name), Bytes::copy_from_slice(value)));
    }
    Some(pairs)
}

/// Whether the peer's FIN or RST has arrived, read or not.
fn peer_has_left(socket: RawFd) -> bool {
    let mut poll = libc::pollfd { fd: socket, events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one valid pollfd, no waiting; the socket is open while it stands in the books.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready > 0 && poll.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
}

/// Until the peer closes, without reading a byte.
async fn peer_gone(stream: &TcpStream) {
    loop {
        match stream.ready(Interest::READABLE).await {
            Ok(ready) if !ready.is_read_closed() && !peer_has_left(stream.as_raw_fd()) => {
                // Forget this readiness and wait for the next event: unread bytes must not spin.
                let _ = stream.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
            }
            _ => return,
        }
    }
}
