//! A small FastCGI server with the manners of PHP-FPM, for the demo, tests and benches: where there is no PHP.
//!
//! Like FPM it gives a worker to a connection and not to a request, leaves what it has no worker for in the backlog, and
//! keeps the worker until the other side has closed. It reads as php-src `fcgi_read_request` does, not as the
//! specification would let it. In the benches it must cost nothing next to a proxy: a request is one read and one
//! write, and no buffer is allocated twice on a connection.

use std::{fmt::Write, io, ops::Range, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, UnixListener},
    sync::{mpsc, watch},
    task::spawn_local,
    time::{sleep, timeout},
};

use super::record::{ALIGNED_CONTENT, HEADER_LEN, KEEP_CONN, MAX_CONTENT, header, kind};

/// A larger body closes its connection.
pub const BODY_LIMIT_BYTES: usize = 64 * 1024 * 1024;
/// All PARAMS of a request.
pub const PARAMS_LIMIT_BYTES: usize = 1024 * 1024;
/// A connection that says nothing for so long is closed (php-src `fcgi_accept_request`).
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(5);
/// After accept() failed, as it does when there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A whole record fits, so that a request takes one read.
const READ_BYTES: usize = MAX_CONTENT + HEADER_LEN;
/// `?sleep_ms=` of the demo.
const LONGEST_SLEEP_MS: u64 = 60_000;

#[derive(Debug)]
pub enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// What a handler is asked. Parameters lie in one buffer that the next request on the connection uses again.
#[derive(Debug, Default)]
pub struct Request {
    block: Vec<u8>,
    pairs: Vec<(Range<usize>, Range<usize>)>,
    /// As long as CONTENT_LENGTH says and no longer: PHP does not see the rest, nor anything without it.
    pub body: Bytes,
    /// Which worker runs it, from 1.
    pub worker: usize,
}

impl Request {
    /// The value of a parameter; the last one where it came twice (php-src `fcgi_hash_set`).
    pub fn param(&self, name: &str) -> Option<&[u8]> {
        self.pairs.iter().rev().find(|(n, _)| self.block[n.clone()] == *name.as_bytes()).map(|(_, v)| &self.block[v.clone()])
    }

    /// In the order they came.
    pub fn params(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.pairs.iter().map(|(name, value)| (&self.block[name.clone()], &self.block[value.clone()]))
    }

    fn text(&self, name: &str) -> &str {
        self.param(name).and_then(|value| str::from_utf8(value).ok()).unwrap_or_default()
    }
}

/// What a handler answers.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    /// CGI headers, an empty line, and the body.
    pub output: Bytes,
    /// How long the script takes before; its worker is busy meanwhile.
    pub delay: Duration,
}

/// What stands where PHP would: called once for a request, on the thread that serves all of them.
pub trait Handler: Fn(&Request) -> Reply + Clone + 'static {}
impl<H: Fn(&Request) -> Reply + Clone + 'static> Handler for H {}

trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

/// Answers as a page of a release would: which one, by which worker, to what. `?sleep_ms=3000` is a slow script.
pub fn demo_handler(colour: &str) -> impl Handler + use<> {
    // It stands in a header, in HTML and in CSS.
    let colour: String = colour.chars().filter(char::is_ascii_alphanumeric).collect();
    move |request| {
        let page = format!(
            "X-Powered-By: slackwater demo\r\nX-Release: {colour}\r\nCache-Control: no-store\r\n\
             Content-Type: text/html; charset=UTF-8\r\n\r\n\
             <!doctype html><title>{colour}</title><body style=\"font:2em sans-serif;color:#fff;background:{colour}\">\
             <h1>{colour}</h1><p>worker {worker}<p>{method} with a body of {length} bytes<p>request {id}\n",
            worker = request.worker,
            method = escape(request.text("REQUEST_METHOD")),
            length = request.body.len(),
            id = escape(request.text("HTTP_X_REQUEST_ID")),
        );
        let asked = request.text("QUERY_STRING").split('&').find_map(|pair| pair.strip_prefix("sleep_ms="));
        let delay = asked.and_then(|value| value.parse().ok()).unwrap_or(0).min(LONGEST_SLEEP_MS);
        Reply { output: page.into(), delay: Duration::from_millis(delay) }
    }
}

/// The null responder: always the same `size` bytes, under the headers of a PHP that says nothing itself, and so many more.
pub fn fixed(size: usize, headers: usize) -> impl Handler {
    let mut output = BytesMut::from(&b"X-Powered-By: PHP/8.2\r\nContent-type: text/html; charset=UTF-8\r\n"[..]);
    for n in 0..headers {
        output.extend_from_slice(format!("X-Header-{n}: the value of header {n}\r\n").as_bytes());
    }
    output.extend_from_slice(b"\r\n");
    output.put_bytes(b'x', size);
    let reply = Reply { output: output.freeze(), delay: Duration::ZERO };
    move |_| reply.clone()
}

fn escape(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut html, char| {
        match char {
            // Writing to a String cannot fail.
            '<' | '>' | '&' | '"' | '\'' => drop(write!(html, "&#{};", u32::from(char))),
            char => html.push(char),
        }
        html
    })
}

/// Serves `workers` connections at a time until `shutdown`; then requests that run are finished, and connections closed.
/// Must run where `spawn_local` may be used.
pub async fn serve(socket: Socket, workers: usize, handler: impl Handler, shutdown: impl Future) {
    let workers = workers.max(1);
    let (free, mut idle) = mpsc::channel(workers);
    for number in 1..=workers {
        drop(Worker { number, free: free.clone() });
    }
    let (stop, stopped) = watch::channel(false);
    let accept = async {
        while let Some(number) = idle.recv().await {
            let worker = Worker { number, free: free.clone() };
            let (handler, stopped) = (handler.clone(), stopped.clone());
            let accepted = match &socket {
                Socket::Tcp(listener) => listener.accept().await.and_then(|(stream, _)| {
                    stream.set_nodelay(true)?;
                    Ok(spawn_local(connection(stream, worker, handler, stopped)))
                }),
                Socket::Unix(listener) => {
                    listener.accept().await.map(|(stream, _)| spawn_local(connection(stream, worker, handler, stopped)))
                }
            };
            if let Err(error) = accepted {
                tracing::warn!(%error, "responder: accept");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    };
    tokio::select! {
        _ = shutdown => {}
        () = accept => {}
    }
    drop(socket);
    stop.send_replace(true);
    // Drop means done: every worker has come back.
    for _ in 0..workers {
        idle.recv().await;
    }
}

/// A worker while a connection has it; dropping it gives it back.
struct Worker {
    number: usize,
    free: mpsc::Sender<usize>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        // There is room for every number.
        let _ = self.free.try_send(self.number);
    }
}

async fn connection<S: Stream>(mut stream: S, worker: Worker, handler: impl Handler, mut stopped: watch::Receiver<bool>) {
    if let Err(error) = exchange(&mut stream, worker.number, handler, &mut stopped).await {
        tracing::debug!(%error, worker = worker.number, "responder: connection closed");
    }
}

async fn exchange<S: Stream>(
    stream: &mut S,
    worker: usize,
    handler: impl Handler,
    stopped: &mut watch::Receiver<bool>,
) -> io::Result<()> {
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    let mut intake = Intake { request: Request { worker, ..Request::default() }, ..Intake::default() };
    let mut served = false;
    loop {
        while !intake.take(&mut input)? {
            input.reserve(READ_BYTES);
            let between_requests = input.is_empty() && intake.stage == Stage::Begin;
            let read = async {
                let read = stream.read_buf(&mut input);
                if served { read.await } else { timeout(FIRST_BYTE_TIMEOUT, read).await? }
            };
            let size = tokio::select! {
                biased;
                size = read => size?,
                _ = stopped.wait_for(|stopped| *stopped), if between_requests => 0,
            };
            if size == 0 {
                return Ok(());
            }
        }
        let reply = handler(&intake.request);
        if !reply.delay.is_zero() {
            sleep(reply.delay).await;
        }
        output.clear();
        put_answer(&mut output, intake.id, &reply.output);
        stream.write_all(&output).await?;
        served = true;
        if !intake.keep || *stopped.borrow() {
            break;
        }
    }
    // php-src `fcgi_close`: the worker waits in recv() until the other side has closed as well.
    stream.shutdown().await?;
    let drain = async {
        while matches!(stream.read_buf(&mut input).await, Ok(size) if size > 0) {
            input.clear();
        }
    };
    tokio::select! {
        () = drain => {}
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
    Ok(())
}

/// STDOUT records for `output`, padded to eight bytes as php-src `fcgi_make_header` does, and END_REQUEST. FPM sends no
/// empty STDOUT record at the end.
pub fn put_answer(out: &mut BytesMut, id: u16, output: &[u8]) {
    out.reserve(output.len() + output.len() / ALIGNED_CONTENT * HEADER_LEN + 4 * HEADER_LEN);
    for piece in output.chunks(ALIGNED_CONTENT) {
        // Neither can fail: a chunk is at most ALIGNED_CONTENT, and padding less than 8.
        if let Ok(len) = u16::try_from(piece.len())
            && let Ok(padding) = u8::try_from(len.wrapping_neg() % 8)
        {
            out.put_slice(&header(kind::STDOUT, id, len, padding));
            out.put_slice(piece);
            out.put_bytes(0, usize::from(padding));
        }
    }
    out.put_slice(&header(kind::END_REQUEST, id, 8, 0));
    out.put_bytes(0, 8);
}

/// The pairs of one PARAMS record, as php-src `fcgi_get_params` reads them; `None` where FPM closes the connection.
pub fn parse_params(mut record: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut pairs = Vec::new();
    while !record.is_empty() {
        let (name, value, rest) = next_pair(record)?;
        pairs.push((name.to_vec(), value.to_vec()));
        record = rest;
    }
    Some(pairs)
}

/// The first pair of `record` and what follows it.
fn next_pair(record: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (name, rest) = take_len(record)?;
    let (value, rest) = take_len(rest)?;
    let (name, rest) = rest.split_at_checked(name)?;
    let (value, rest) = rest.split_at_checked(value)?;
    Some((name, value, rest))
}

fn take_len(record: &[u8]) -> Option<(usize, &[u8])> {
    match *record {
        [short @ 0..0x80, ref rest @ ..] => Some((usize::from(short), rest)),
        // fcgi_get_params wants a byte behind a long length, be it the last of the record: `p + 3 >= end`.
        [a, b, c, d, ref rest @ ..] if !rest.is_empty() => {
            Some((usize::try_from(u32::from_be_bytes([a & 0x7f, b, c, d])).ok()?, rest))
        }
        _ => None,
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Begin,
    Params,
    Stdin,
}

/// One request after the other, from the bytes of a connection.
#[derive(Debug, Default)]
struct Intake {
    stage: Stage,
    /// Echoed: HAProxy counts its requests up on a connection.
    id: u16,
    keep: bool,
    stdin: BytesMut,
    request: Request,
}

impl Intake {
    /// Takes whole records from `input`; true once `request` is whole as well.
    fn take(&mut self, input: &mut BytesMut) -> io::Result<bool> {
        while let Some(&[version, kind, i1, i0, c1, c0, padding, _]) = input.first_chunk::<HEADER_LEN>() {
            let (content, padding) = (usize::from(u16::from_be_bytes([c1, c0])), usize::from(padding));
            if version < 1 || content + padding > MAX_CONTENT {
                return Err(refused("not a FastCGI record"));
            }
            let Some(record) = input[HEADER_LEN..].get(..content + padding) else { return Ok(false) };
            let whole = self.record(kind, u16::from_be_bytes([i1, i0]), &record[..content])?;
            input.advance(HEADER_LEN + content + padding);
            if whole {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn record(&mut self, kind: u8, id: u16, content: &[u8]) -> io::Result<bool> {
        match (self.stage, kind) {
            // What may be left of the request before.
            (Stage::Begin, kind::STDIN) if content.is_empty() => {}
            (Stage::Begin, kind::BEGIN_REQUEST) => {
                let &[0, 1, flags, ..] = content else { return Err(refused("not in the role of a responder")) };
                (self.id, self.keep, self.stage) = (id, flags & KEEP_CONN != 0, Stage::Params);
                self.request.block.clear();
                self.request.pairs.clear();
                self.request.body = Bytes::new();
            }
            (Stage::Params, kind::PARAMS) if content.is_empty() => self.stage = Stage::Stdin,
            (Stage::Params, kind::PARAMS) => self.params(content)?,
            (Stage::Stdin, kind::STDIN) if content.is_empty() => {
                self.stage = Stage::Begin;
                let length = self.request.text("CONTENT_LENGTH").parse().unwrap_or(0);
                self.request.body = self.stdin.split().freeze();
                self.request.body.truncate(length);
                return Ok(true);
            }
            (Stage::Stdin, kind::STDIN) if self.stdin.len() + content.len() <= BODY_LIMIT_BYTES => {
                self.stdin.extend_from_slice(content);
            }
            (Stage::Stdin, kind::STDIN) => return Err(refused("the body is too large")),
            _ => return Err(refused("a record out of place")),
        }
        Ok(false)
    }

    fn params(&mut self, content: &[u8]) -> io::Result<()> {
        let Request { block, pairs, .. } = &mut self.request;
        if block.len() + content.len() > PARAMS_LIMIT_BYTES {
            return Err(refused("the parameters are too large"));
        }
        let mut rest = content;
        while !rest.is_empty() {
            let (name, value, after) = next_pair(rest).ok_or_else(|| refused("a pair does not end in its record"))?;
            let start = block.len();
            let middle = start + name.len();
            block.extend_from_slice(name);
            block.extend_from_slice(value);
            pairs.push((start..middle, middle..block.len()));
            rest = after;
        }
        Ok(())
    }
}

fn refused(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use std::{future::pending, net::SocketAddr};

    use proptest::{collection::vec, prelude::*};
    use tokio::{net::TcpStream, sync::oneshot, task::LocalSet, time::Instant};

    use super::*;
    use crate::fastcgi::record::{Decoder, Frame, ParamsWriter, put_begin_request, put_stdin, put_stdin_end};

    const SHORT: Duration = Duration::from_millis(50);

    fn request(keep: bool, params: &[(&str, &str)], body: &[u8]) -> BytesMut {
        let mut out = BytesMut::new();
        put_begin_request(&mut out, keep);
        let mut writer = ParamsWriter::new(&mut out);
        for (name, value) in params {
            writer.pair(name.as_bytes(), value.as_bytes()).unwrap();
        }
        writer.finish();
        put_stdin(&mut out, body);
        put_stdin_end(&mut out);
        out
    }

    /// Sends `bytes` and reads up to END_REQUEST; `None`: closed without an answer.
    async fn ask(stream: &mut TcpStream, bytes: &[u8]) -> Option<String> {
        stream.write_all(bytes).await.unwrap();
        let (mut decoder, mut buf, mut answer) = (Decoder::default(), BytesMut::new(), Vec::new());
        loop {
            match decoder.decode(&mut buf).unwrap() {
                Some(Frame::Stdout(piece)) => answer.extend_from_slice(&piece),
                Some(Frame::End { app_status: 0, protocol_status: 0 }) => return String::from_utf8(answer).ok(),
                Some(frame) => panic!("{frame:?}"),
                None if stream.read_buf(&mut buf).await.unwrap_or(0) == 0 => return None,
                None => {}
            }
        }
    }

    /// Runs `client` against a responder that is then shut down, and does not return before it is.
    fn with_responder(workers: usize, handler: impl Handler, client: impl AsyncFnOnce(SocketAddr, oneshot::Sender<()>)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (stop, stopped) = oneshot::channel();
            let server = spawn_local(serve(Socket::Tcp(listener), workers, handler, stopped));
            client(address, stop).await;
            timeout(Duration::from_secs(5), server).await.expect("the responder did not stop").unwrap();
        });
    }

    fn echo(request: &Request) -> Reply {
        let output = format!("\r\n{} {:?}", request.text("X"), request.body);
        Reply { output: output.into(), delay: SHORT * request.text("DELAY").parse().unwrap_or(0) }
    }

    #[test]
    fn a_kept_connection_is_answered_again_and_a_single_one_ends() {
        with_responder(1, echo, async |address, _stop| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            for (params, answer) in [(&[("X", "a"), ("CONTENT_LENGTH", "2")][..], "\r\na b\"hi\""), (&[("X", "b")], "\r\nb b\"\"")]
            {
                assert_eq!(ask(&mut stream, &request(true, params, b"hi there")).await.unwrap(), answer);
            }
            assert_eq!(ask(&mut stream, &request(false, &[("X", "c")], b"")).await.unwrap(), "\r\nc b\"\"");
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
            // It waits for our close as FPM does: its only worker is not free before.
            let mut next = TcpStream::connect(address).await.unwrap();
            assert!(timeout(SHORT, ask(&mut next, &request(false, &[], b""))).await.is_err());
            drop(stream);
            let mut buf = [0; 8];
            next.read_exact(&mut buf).await.unwrap();
            assert_eq!(buf[1], kind::STDOUT);
        });
    }

    #[test]
    fn a_connection_holds_its_worker() {
        with_responder(2, fixed(1, 0), async |address, _stop| {
            let mut held = Vec::new();
            for _ in 0..2 {
                let mut stream = TcpStream::connect(address).await.unwrap();
                ask(&mut stream, &request(true, &[], b"")).await.unwrap();
                held.push(stream);
            }
            let mut third = TcpStream::connect(address).await.unwrap();
            assert!(timeout(SHORT, ask(&mut third, &request(true, &[], b""))).await.is_err());
            held.pop();
            assert_eq!(third.read(&mut [0]).await.unwrap(), 1);
        });
    }

    #[test]
    fn stopping_finishes_what_runs_and_closes_what_does_not() {
        with_responder(2, echo, async |address, stop| {
            let mut idle = TcpStream::connect(address).await.unwrap();
            ask(&mut idle, &request(true, &[], b"")).await.unwrap();
            let mut running = TcpStream::connect(address).await.unwrap();
            let started = Instant::now();
            let request = request(true, &[("X", "late"), ("DELAY", "4")], b"");
            let (answer, ()) = tokio::join!(ask(&mut running, &request), async {
                sleep(SHORT).await;
                drop(stop);
                assert_eq!(idle.read(&mut [0]).await.unwrap(), 0);
                assert!(started.elapsed() < 4 * SHORT);
            });
            assert_eq!(answer.unwrap(), "\r\nlate b\"\"");
        });
    }

    #[test]
    fn what_fpm_would_not_read_is_closed_without_an_answer() {
        with_responder(1, fixed(1, 0), async |address, _stop| {
            let begin = [1, 1, 0, 1, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            let straddling = [&begin[..], &[1, 4, 0, 1, 0, 3, 0, 0, 1, 1, b'N', 1, 4, 0, 1, 0, 1, 0, 0, b'V']].concat();
            let too_long = [&begin[..], &[1, 4, 0, 1, 0xff, 0xff, 1, 0]].concat();
            for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &straddling, &too_long, &[1, 9, 0, 0, 0, 0, 0, 0]] {
                let mut stream = TcpStream::connect(address).await.unwrap();
                assert_eq!(ask(&mut stream, bytes).await, None);
            }
        });
    }

    #[test]
    fn a_unix_socket_serves_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("php.sock");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, async {
            spawn_local(serve(Socket::Unix(UnixListener::bind(&path).unwrap()), 0, fixed(70_000, 0), pending::<()>()));
            let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
            stream.write_all(&request(false, &[], b"")).await.unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap();
            assert_eq!(answer[..8], [1, 6, 0, 1, 0xff, 0xf8, 0, 0]);
            assert!(answer.ends_with(&[1, 3, 0, 1, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
        });
    }

    #[test]
    fn a_body_and_parameters_have_limits() {
        let mut intake = Intake::default();
        let feed = |intake: &mut Intake, record: &[u8]| intake.take(&mut BytesMut::from(record));
        assert!(!feed(&mut intake, &[1, 1, 0, 7, 0, 8, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]).unwrap());
        assert_eq!((intake.id, intake.keep), (7, true));
        let pair = [&[1, 4, 0, 7, 0x80, 0, 0, 0, 0, 0x80, 0, 0x7f, 0xfb][..], &[0; 0x7ffb]].concat();
        let taken = (0..100).take_while(|_| feed(&mut intake, &pair).is_ok()).count();
        assert_eq!(taken, PARAMS_LIMIT_BYTES / 0x8000);
        assert!(!feed(&mut intake, &[1, 4, 0, 7, 0, 0, 0, 0]).unwrap());
        let stdin = [&[1, 5, 0, 7, 0x80, 0, 0, 0][..], &[0; 0x8000]].concat();
        let taken = (0..3000).take_while(|_| feed(&mut intake, &stdin).is_ok()).count();
        assert_eq!(taken, BODY_LIMIT_BYTES / 0x8000);
    }

    #[test]
    fn the_demo_page_says_who_answered_and_escapes_what_it_was_told() {
        let mut intake = Intake { request: Request { worker: 3, ..Request::default() }, ..Intake::default() };
        let params =
            [("REQUEST_METHOD", "<b>"), ("HTTP_X_REQUEST_ID", "id-1"), ("QUERY_STRING", "a&sleep_ms=20"), ("CONTENT_LENGTH", "2")];
        assert!(intake.take(&mut request(true, &params, b"hi")).unwrap());
        let reply = demo_handler("blue\r\n")(&intake.request);
        let page = str::from_utf8(&reply.output).unwrap();
        for part in ["X-Release: blue\r\n", "worker 3", "&#60;b&#62; with a body of 2 bytes", "request id-1"] {
            assert!(page.contains(part), "{part} in {page}");
        }
        assert_eq!(reply.delay, Duration::from_millis(20));
        assert_eq!(intake.request.params().count(), 4);
    }

    #[test]
    fn params_are_read_as_php_src_reads_them() {
        assert_eq!(parse_params(b""), Some(vec![]));
        assert_eq!(parse_params(b"\x80\0\0\x01\x01NV"), Some(vec![(b"N".to_vec(), b"V".to_vec())]));
        // Cut anywhere, a pair is malformed; and so is a long length with no byte behind it.
        for cut in [&b"\x01"[..], b"\x01\x01", b"\x01\x01N", b"\x80\0\0\x01", b"\x00\x80\0\0\0", b"\x01\xff\xff\xff\xffN"] {
            assert_eq!(parse_params(cut), None, "{cut:?}");
        }
    }

    proptest! {
        #[test]
        fn a_request_is_the_same_however_it_is_cut(name in "[A-Z]{1,200}", body in vec(any::<u8>(), 0..500), cut in 1_usize..100) {
            let bytes = request(true, &[(&name, "v"), ("CONTENT_LENGTH", &body.len().to_string())], &body).repeat(2);
            let (mut intake, mut input, mut whole) = (Intake::default(), BytesMut::new(), 0);
            for piece in bytes.chunks(cut) {
                input.extend_from_slice(piece);
                while intake.take(&mut input).unwrap() {
                    whole += 1;
                    prop_assert_eq!(intake.request.param(&name), Some(&b"v"[..]));
                    prop_assert_eq!(&intake.request.body[..], &body[..]);
                }
            }
            prop_assert_eq!((whole, input.len()), (2, 0));
        }

        #[test]
        fn garbage_never_panics(bytes in vec(any::<u8>(), 0..300)) {
            let _ = parse_params(&bytes);
            let _ = Intake::default().take(&mut BytesMut::from(&bytes[..]));
        }
    }
}
