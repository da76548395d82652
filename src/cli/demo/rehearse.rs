//! The rehearsal: a load that never retries, a reload, four swaps and a drain; then the ledger is read.
//!
//! The load behaves as a load balancer does that keeps its connections: a connection that the proxy has closed with FIN before the next
//! request is opened again, everything else that goes wrong is a failure.

use std::{
    cell::{Cell, RefCell},
    fs, io,
    net::SocketAddr,
    path::Path,
    rc::Rc,
    time::{Duration, Instant},
};

use http::Method;
use rustix::process::Signal;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    Demo, Sabotage,
    ledger::{Colour, End, Entry, Kind, Ledger, Turn},
    plot::{self, Mark},
    pools::fnv1a64,
    say,
};
use crate::control::{
    api::{Outcome, SwapRequest},
    client,
};

const LONGEST: Duration = Duration::from_secs(40);
const GETS: usize = 8;
const POSTS: usize = 4;
/// Between an answer and the next request on its connection.
const PAUSE: Duration = Duration::from_millis(5);
const SWAPS: [Colour; 4] = [Colour::Green, Colour::Blue, Colour::Green, Colour::Blue];
const SWAP_WITHIN: Duration = Duration::from_secs(8);
/// Between two things that are done to the proxy.
const BETWEEN: Duration = Duration::from_secs(1);
/// An answer takes 1.5 s at most, and its turn in the queue.
const ANSWER_WITHIN: Duration = Duration::from_secs(12);
/// A load balancer asks so often, and needs so long to act on two bad answers.
const ASK_READY_EVERY: Duration = Duration::from_millis(200);
const BALANCER_REACTS: Duration = Duration::from_secs(1);
const HEAD_LIMIT: usize = 64 * 1024;
/// One byte, within memory, and beyond what is buffered in memory.
const BODY_SIZES: [usize; 4] = [1, 1_000, 60_000, 200_000];

/// Gives whether nothing was lost.
pub async fn rehearse(demo: &mut Demo, sabotage: Option<Sabotage>, plot: Option<&Path>) -> Result<bool, String> {
    let began = Instant::now();
    let load = Load::start(demo.http, began);
    let mut findings = Findings::new(began);
    match timeout(LONGEST, act(demo, sabotage, &load, &mut findings)).await {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => findings.bad(reason),
        Err(_) => findings.bad(format!("not through after {LONGEST:?}")),
    }
    load.abort();
    let ledger = load.shared.ledger.borrow();
    // Where it is cut there was no swap.
    if sabotage != Some(Sabotage::Cut) && [Colour::Blue, Colour::Green].iter().any(|colour| ledger.by(*colour) == 0) {
        findings.bad("not both colours have answered".to_owned());
    }
    if let Some(file) = plot {
        fs::write(file, plot::svg(&ledger, &findings.marks)).map_err(|e| format!("{}: {e}", file.display()))?;
    }
    Ok(report(demo, &ledger, &findings))
}

struct Findings {
    began: Instant,
    receipts: Vec<Value>,
    bad: Vec<String>,
    marks: Vec<Mark>,
}

impl Findings {
    fn new(began: Instant) -> Findings {
        Findings { began, receipts: Vec::new(), bad: Vec::new(), marks: Vec::new() }
    }

    fn step(&self, what: &str) {
        say(&format!("{:6.2} s  {what}", self.began.elapsed().as_secs_f64()));
    }

    fn mark(&mut self, what: &'static str) {
        self.marks.push(Mark { at: Instant::now(), what });
    }

    fn bad(&mut self, what: String) {
        self.bad.push(what);
    }

    fn receipt(&mut self, receipt: Value) {
        if receipt["cut"].as_array().is_none_or(|cut| !cut.is_empty()) {
            self.bad(format!("a receipt with cut requests: {receipt}"));
        }
        self.receipts.push(receipt);
    }
}

async fn act(demo: &mut Demo, sabotage: Option<Sabotage>, load: &Load, findings: &mut Findings) -> Result<(), String> {
    findings.step(&format!("load: {GETS} connections with GET, {POSTS} with POST, a slow request at all times"));
    sleep(2 * BETWEEN).await;
    if sabotage == Some(Sabotage::Cut) {
        return cut(demo, load, findings).await;
    }
    reload(demo, findings).await?;
    sleep(BETWEEN).await;
    for to in SWAPS {
        swap(demo, load, findings, to).await?;
        sleep(BETWEEN).await;
        if sabotage == Some(Sabotage::Stale) {
            findings.step("sabotage: back to blue, and the ledger is not told");
            order(demo, Colour::Blue).await?;
            sleep(BETWEEN).await;
            break;
        }
    }
    drain(demo, load, findings).await
}

async fn reload(demo: &Demo, findings: &mut Findings) -> Result<(), String> {
    let file = demo.config();
    let named = |e: io::Error| format!("{}: {e}", file.display());
    let text = fs::read_to_string(&file).map_err(named)?;
    let changed = text.replacen("max_uri_bytes = \"16KiB\"", "max_uri_bytes = \"17KiB\"", 1);
    if changed == text {
        return Err("the configuration has nothing to change".to_owned());
    }
    fs::write(&file, changed).map_err(named)?;
    findings.mark("reload");
    let outcome = call(demo, "/reload", Vec::new()).await?;
    findings.step(&format!("reload: {}", outcome.message));
    if outcome.ok && outcome.message.starts_with("applied") { Ok(()) } else { Err(format!("reload: {}", outcome.message)) }
}

async fn swap(demo: &Demo, load: &Load, findings: &mut Findings, to: Colour) -> Result<(), String> {
    // So that the old set always has something to finish.
    load.slow_in_flight().await;
    let ledger = &load.shared.ledger;
    ledger.borrow_mut().turns.push(Turn { to, started: Instant::now(), returned: None });
    let outcome = order(demo, to).await?;
    if let Some(turn) = ledger.borrow_mut().turns.last_mut() {
        turn.returned = Some(Instant::now());
    }
    findings.step(&format!("swap: {}", outcome.message));
    match outcome.receipt {
        Some(receipt) => {
            if receipt["completed"].as_u64().unwrap_or(0) == 0 {
                findings.bad(format!("a slow request was in flight, and the receipt knows of none: {receipt}"));
            }
            findings.receipt(receipt);
        }
        None => findings.bad(format!("no receipt for the swap to {}", to.name())),
    }
    Ok(())
}

async fn order(demo: &Demo, to: Colour) -> Result<Outcome, String> {
    let order = SwapRequest {
        upstream: "php".to_owned(),
        set: to.name().to_owned(),
        wait: true,
        timeout_seconds: SWAP_WITHIN.as_secs_f64(),
        dry_run: false,
        force: false,
    };
    let body = serde_json::to_vec(&order).map_err(|e| e.to_string())?;
    let outcome = call(demo, "/swap", body).await?;
    if outcome.ok { Ok(outcome) } else { Err(format!("swap: {} {:?}", outcome.message, outcome.left)) }
}

async fn call(demo: &Demo, path: &str, body: Vec<u8>) -> Result<Outcome, String> {
    let answer = client::call(&demo.admin(), Method::POST, path, body).await.map_err(|e| e.to_string())?;
    serde_json::from_slice(&answer).map_err(|e| format!("{path}: {e}"))
}

/// As a pod is ended: SIGTERM, and the load balancer notices by /readyz.
async fn drain(demo: &mut Demo, load: &Load, findings: &mut Findings) -> Result<(), String> {
    demo.proxy.signal(Signal::TERM);
    findings.step("drain: SIGTERM");
    findings.mark("SIGTERM");
    let mut unready = 0;
    while unready < 2 {
        sleep(ASK_READY_EVERY).await;
        match super::ready(demo.ops).await {
            Some(503) => unready += 1,
            Some(_) => unready = 0,
            None => return Err("/readyz does not answer during the lame-duck phase".to_owned()),
        }
    }
    findings.step("/readyz has been 503 twice");
    sleep(BALANCER_REACTS).await;
    load.shared.stop.set(true);
    load.shared.stop_slow.set(true);
    findings.step("the load sends no new requests");
    findings.mark("no new requests");
    load.ended().await;
    findings.step("every request has ended");
    exited(demo, findings).await
}

async fn cut(demo: &mut Demo, load: &Load, findings: &mut Findings) -> Result<(), String> {
    load.shared.stop.set(true);
    sleep(10 * PAUSE).await;
    load.slow_in_flight().await;
    load.shared.stop_slow.set(true);
    demo.proxy.signal(Signal::INT);
    findings.step("sabotage: SIGINT in the middle of a slow request, with 300 ms for it");
    load.ended().await;
    exited(demo, findings).await
}

async fn exited(demo: &mut Demo, findings: &mut Findings) -> Result<(), String> {
    let status = demo.proxy.exited().await?;
    findings.step(&format!("the proxy has ended: {status}"));
    findings.mark("ended");
    if status.code() != Some(0) {
        findings.bad(format!("the proxy has ended with {status}"));
    }
    let file = demo.drain_receipt();
    let text = fs::read(&file).map_err(|e| format!("no drain receipt: {}: {e}", file.display()))?;
    findings.receipt(serde_json::from_slice(&text).map_err(|e| format!("the drain receipt: {e}"))?);
    Ok(())
}

fn report(demo: &Demo, ledger: &Ledger, findings: &Findings) -> bool {
    let mut wrong = ledger.wrong();
    wrong.extend(findings.bad.iter().cloned());
    say(&format!("\n{}\nreceipts", ledger.table()));
    for receipt in &findings.receipts {
        say(&format!("  {receipt}"));
    }
    if wrong.is_empty() {
        say("\npassed: every request was answered, and by the right colour");
        return true;
    }
    say(&format!("\nFAILED: {} findings", wrong.len()));
    for line in &wrong {
        say(&format!("  {line}"));
    }
    say(&format!("\nthe end of the proxy's log\n{}", demo.log_tail()));
    false
}

struct Load {
    shared: Rc<Shared>,
    tasks: RefCell<Vec<JoinHandle<()>>>,
}

struct Shared {
    http: SocketAddr,
    ledger: RefCell<Ledger>,
    /// GET and POST send no more.
    stop: Cell<bool>,
    stop_slow: Cell<bool>,
    slow_since: Cell<Option<Instant>>,
}

impl Load {
    fn start(http: SocketAddr, began: Instant) -> Load {
        let shared = Rc::new(Shared {
            http,
            ledger: RefCell::new(Ledger::new(began)),
            stop: Cell::new(false),
            stop_slow: Cell::new(false),
            slow_since: Cell::new(None),
        });
        let kinds = [(Kind::Get, GETS), (Kind::Post, POSTS), (Kind::Slow, 1)];
        let tasks = kinds.into_iter().flat_map(|(kind, count)| (0..count).map(move |number| (kind, number)));
        let tasks = tasks.map(|(kind, number)| tokio::task::spawn_local(sender(shared.clone(), kind, number))).collect();
        Load { shared, tasks: RefCell::new(tasks) }
    }

    /// Returns while a slow request is in flight that is neither about to arrive nor about to end.
    async fn slow_in_flight(&self) {
        let young = |since: Instant| (100..500).contains(&since.elapsed().as_millis());
        while !self.shared.slow_since.get().is_some_and(young) {
            sleep(PAUSE).await;
        }
    }

    /// To be called once nothing more is to be sent.
    async fn ended(&self) {
        let tasks = self.tasks.take();
        for task in tasks {
            // One that panicked has left a request in the ledger that never ended.
            let _ = task.await;
        }
    }

    fn abort(&self) {
        for task in self.tasks.borrow().iter() {
            task.abort();
        }
    }
}

async fn sender(shared: Rc<Shared>, kind: Kind, number: usize) {
    let mut stream = None;
    for count in 0_usize.. {
        // Also lets the runtime learn of a FIN that has come meanwhile.
        if kind != Kind::Slow {
            sleep(PAUSE).await;
        } else {
            tokio::task::yield_now().await;
        }
        let stop = if kind == Kind::Slow { &shared.stop_slow } else { &shared.stop };
        if stop.get() {
            return;
        }
        let id = format!("{}{number}-{count}", kind.name().to_lowercase());
        let body = if kind == Kind::Post { body(number + count) } else { Vec::new() };
        let request = [head(kind, &id, body.len()).as_bytes(), &body].concat();
        let expected = fnv1a64(&body);
        shared.ledger.borrow_mut().sent(kind);
        // Not before there is a connection: a swap may return while one is made.
        let mut sent = Instant::now();
        let end = match open(&mut stream, shared.http).await {
            Err(error) => End::Failed(format!("no connection: {error}")),
            Ok(connection) => {
                sent = Instant::now();
                if kind == Kind::Slow {
                    shared.slow_since.set(Some(sent));
                }
                match timeout(ANSWER_WITHIN, exchange(connection, &request)).await {
                    Err(_) => End::Failed(format!("no answer within {ANSWER_WITHIN:?}")),
                    Ok(Err(error)) => End::Cut(error.to_string()),
                    Ok(Ok(answer)) => {
                        if answer.close {
                            stream = None;
                        }
                        answer.judge(&id, body.len(), expected)
                    }
                }
            }
        };
        if kind == Kind::Slow {
            shared.slow_since.set(None);
        }
        if !matches!(end, End::Answered(_)) {
            stream = None;
        }
        shared.ledger.borrow_mut().ended(Entry { id, kind, sent, ended: Instant::now(), end });
    }
}

fn head(kind: Kind, id: &str, length: usize) -> String {
    let (line, length) = match kind {
        Kind::Get => ("GET /page", String::new()),
        Kind::Post => ("POST /form", format!("Content-Type: application/octet-stream\r\nContent-Length: {length}\r\n")),
        Kind::Slow => ("GET /slow", String::new()),
    };
    format!("{line} HTTP/1.1\r\nHost: demo\r\nX-Request-ID: {id}\r\n{length}\r\n")
}

/// Differs from request to request, so that a mixed-up body is noticed.
fn body(seed: usize) -> Vec<u8> {
    let size = BODY_SIZES[seed % BODY_SIZES.len()];
    let mut state = seed as u64 | 1;
    let word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = std::iter::repeat_with(word).take(size / 8 + 1).flatten().collect();
    bytes.truncate(size);
    bytes
}

/// The kept connection; a new one where the proxy has closed it with FIN. A reset is an error.
async fn open(stream: &mut Option<TcpStream>, http: SocketAddr) -> io::Result<&mut TcpStream> {
    let usable = match stream {
        None => false,
        Some(kept) => match kept.try_read(&mut [0]) {
            Ok(0) => false,
            Ok(_) => return Err(io::Error::other("bytes that nobody asked for")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
            Err(error) => return Err(error),
        },
    };
    if !usable {
        let fresh = TcpStream::connect(http).await?;
        fresh.set_nodelay(true)?;
        *stream = Some(fresh);
    }
    stream.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
}

struct Answer {
    status: u16,
    /// Names in lower case.
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    close: bool,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(n, _)| n == name).map_or("", |(_, value)| value)
    }

    fn judge(&self, id: &str, length: usize, hash: u64) -> End {
        if self.status != 200 {
            let body = String::from_utf8_lossy(&self.body);
            return End::Failed(format!("status {}: {}", self.status, body.chars().take(100).collect::<String>().trim()));
        }
        let seen = (self.header("x-body-length"), self.header("x-body-fnv1a64"));
        if seen != (&*length.to_string(), &*format!("{hash:016x}")) {
            return End::Failed(format!("a body of {length} bytes with hash {hash:016x} was read as {seen:?}"));
        }
        if self.header("x-request-id") != id || !String::from_utf8_lossy(&self.body).contains(&format!("request {id}\n")) {
            return End::Failed(format!("the answer to another request: {}", self.header("x-request-id")));
        }
        match Colour::parse(self.header("x-colour")) {
            Some(colour) => End::Answered(colour),
            None => End::Failed(format!("no colour: `{}`", self.header("x-colour"))),
        }
    }
}

/// One request and its whole answer; any error means that it was cut.
async fn exchange(stream: &mut TcpStream, request: &[u8]) -> io::Result<Answer> {
    stream.write_all(request).await?;
    let mut buf = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = buf.windows(4).position(|w| w == b"\r\n\r\n") {
                break at;
            }
            if buf.len() > HEAD_LIMIT {
                return Err(broken("a head without an end"));
            }
            more(stream, &mut buf, "before the end of the head").await?;
        };
        let (status, headers) = parse_head(&buf[..end]).ok_or_else(|| broken("not an HTTP/1.1 answer"))?;
        buf.drain(..end + 4);
        if status >= 200 {
            return read_body(stream, buf, status, headers).await;
        }
    }
}

async fn read_body(stream: &mut TcpStream, mut buf: Vec<u8>, status: u16, headers: Vec<(String, String)>) -> io::Result<Answer> {
    let mut answer = Answer { status, headers, body: Vec::new(), close: false };
    answer.close = answer.header("connection").eq_ignore_ascii_case("close");
    if answer.header("transfer-encoding").eq_ignore_ascii_case("chunked") {
        loop {
            let line_end = loop {
                if let Some(at) = buf.windows(2).position(|w| w == b"\r\n") {
                    break at;
                }
                more(stream, &mut buf, "within a chunk's head").await?;
            };
            let size = str::from_utf8(&buf[..line_end]).ok().and_then(|line| usize::from_str_radix(line.trim(), 16).ok());
            let size = size.ok_or_else(|| broken("not a chunk"))?;
            let whole = size.checked_add(line_end + 4).ok_or_else(|| broken("not a chunk"))?;
            while buf.len() < whole {
                more(stream, &mut buf, "within a chunk").await?;
            }
            answer.body.extend_from_slice(&buf[line_end + 2..whole - 2]);
            buf.drain(..whole);
            if size == 0 {
                break;
            }
        }
    } else if !answer.header("content-length").is_empty() {
        let length: usize = answer.header("content-length").parse().map_err(|_| broken("not a Content-Length"))?;
        while buf.len() < length {
            more(stream, &mut buf, "within the body").await?;
        }
        answer.body = buf.drain(..length).collect();
    } else {
        return Err(broken("neither Content-Length nor chunked: its end cannot be told from a cut"));
    }
    if buf.is_empty() { Ok(answer) } else { Err(broken("more than the answer")) }
}

async fn more(stream: &mut TcpStream, buf: &mut Vec<u8>, place: &str) -> io::Result<()> {
    match stream.read_buf(buf).await? {
        0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("closed {place}"))),
        _ => Ok(()),
    }
}

fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn parse_head(head: &[u8]) -> Option<(u16, Vec<(String, String)>)> {
    let text = str::from_utf8(head).ok()?;
    let mut lines = text.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    let header = |line: &str| line.split_once(':').map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()));
    Some((status, lines.map(header).collect::<Option<_>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(colour: &str) -> Answer {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let hash = format!("{:016x}", fnv1a64(b"hi"));
        let headers = vec![
            header("x-colour", colour),
            header("x-request-id", "g1"),
            header("x-body-length", "2"),
            header("x-body-fnv1a64", &hash),
        ];
        Answer { status: 200, headers, body: b"<p>request g1\n".to_vec(), close: false }
    }

    #[test]
    fn only_the_right_answer_counts() {
        let hash = fnv1a64(b"hi");
        assert_eq!(answer("green").judge("g1", 2, hash), End::Answered(Colour::Green));
        for (answer, id, length, hash) in [
            (Answer { status: 503, ..answer("blue") }, "g1", 2, hash),
            (answer("red"), "g1", 2, hash),
            (answer("blue"), "g2", 2, hash),
            (answer("blue"), "g1", 3, hash),
            (answer("blue"), "g1", 2, 0),
        ] {
            assert!(matches!(answer.judge(id, length, hash), End::Failed(_)));
        }
    }

    #[test]
    fn heads_are_read_or_refused() {
        let (status, headers) = parse_head(b"HTTP/1.1 200 OK\r\nX-A:  b ").unwrap();
        assert_eq!((status, headers), (200, vec![("x-a".to_owned(), "b".to_owned())]));
        for bad in [&b"HTTP/1.0 200 OK"[..], b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nx", b"\xff"] {
            assert_eq!(parse_head(bad), None);
        }
    }
}
