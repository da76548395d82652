//! One request on one connection, as an owned state machine driven by polling.
//!
//! It is not the inside of an async function, so that it can be taken out of a request whose client has left and be
//! read to its end elsewhere: the worker of FPM is busy until then.
//!
//! ```text
//!            start                 all of STDIN written         END_REQUEST
//!   Conn  ───────────▶  Sending  ────────────────────▶  Sent  ───────────────▶  Ended ──▶ Conn again (a lease)
//!                         │  answers are read in both                 any error ──▶ Failed (closed)
//! ```

use std::{
    collections::VecDeque,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    time::Instant,
};

use super::record::{self, Decoder, Frame};
use crate::{
    error::{Error, Kind, Retry},
    model::{Address, clock},
};

/// Pieces of a body that one write takes, headers of records among them: a MiB.
const SLICES: usize = 34;
/// The first read of an answer: most are smaller.
const READ_BYTES: usize = 8 * 1024;
/// Once an answer fills what was offered.
const READ_BYTES_LARGE: usize = 64 * 1024;
/// protocolStatus values of END_REQUEST (FastCGI 1.0, section 5.5).
const REQUEST_COMPLETE: u8 = 0;
const CANT_MPX_CONN: u8 = 1;
const OVERLOADED: u8 = 2;

#[derive(Debug)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Stream::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Stream::Unix(s) => Pin::new(s).poll_read(cx, buf),
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Stream::Tcp(s) => Pin::new(s).poll_write(cx, buf),
            Stream::Unix(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(&mut self, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match self {
            Stream::Tcp(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Stream::Unix(s) => Pin::new(s).poll_write_vectored(cx, bufs),
        }
    }

    fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.try_read(buf),
            Stream::Unix(s) => s.try_read(buf),
        }
    }
}

/// A connection to one FPM worker, with its buffers, between requests or before the first.
#[derive(Debug)]
pub struct Conn {
    stream: Stream,
    input: BytesMut,
    /// What is to be sent next; whoever starts an exchange writes the records here.
    pub output: BytesMut,
    /// Requests that have been started on it.
    pub requests: u32,
    pub opened: Instant,
    /// When it last became idle.
    pub idle_since: Instant,
}

impl Conn {
    /// Connects within `limit`. Nothing has been sent, so every failure may be tried elsewhere.
    pub async fn connect(address: &Address, limit: Duration) -> Result<Conn, Error> {
        let connecting = async {
            match address {
                Address::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Ok::<_, io::Error>(Stream::Tcp(stream))
                }
                Address::Unix(path) => Ok(Stream::Unix(connect_unix(path).await?)),
            }
        };
        let stream = match tokio::time::timeout(limit, connecting).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                let (kind, retry) = whose_failure(&error);
                return Err(Error::new(kind, format!("connect to {address}: {error}")).retry(retry));
            }
            Err(_) => {
                return Err(
                    Error::new(Kind::ConnectTimeout, format!("connect to {address}: no answer in {limit:?}")).retry(Retry::Free)
                );
            }
        };
        let now = Instant::now();
        Ok(Conn {
            stream,
            input: BytesMut::new(),
            output: BytesMut::with_capacity(2048),
            requests: 0,
            opened: now,
            idle_since: now,
        })
    }

    /// Whether an idle connection looks alive by what the runtime has seen so far: no FIN, no stray byte. Costs no system call, so
    /// it may miss what has just come: enough for a request that may be sent again.
    pub fn looks_quiet(&self) -> bool {
        let mut byte = [0u8; 1];
        self.input.is_empty() && matches!(self.stream.try_read(&mut byte), Err(e) if e.kind() == io::ErrorKind::WouldBlock)
    }

    /// The same by asking the kernel. (FPM closes at `pm.max_requests` right after END_REQUEST.)
    pub fn is_quiet(&self) -> bool {
        let mut byte = [std::mem::MaybeUninit::uninit()];
        let peeked = match &self.stream {
            Stream::Tcp(s) => socket2::SockRef::from(s).peek(&mut byte),
            Stream::Unix(s) => socket2::SockRef::from(s).peek(&mut byte),
        };
        self.input.is_empty() && matches!(peeked, Err(e) if e.kind() == io::ErrorKind::WouldBlock)
    }
}

/// The peer's, unless this machine has used up what a connection takes. Ports are counted for each address, so another endpoint may do.
fn whose_failure(error: &io::Error) -> (Kind, Retry) {
    use rustix::io::Errno;
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => (Kind::LocalLimit, Retry::Never),
        Some(Errno::ADDRNOTAVAIL) => (Kind::LocalLimit, Retry::Free),
        _ => (Kind::ConnectFailed, Retry::Free),
    }
}

/// A unix socket whose backlog is full answers EAGAIN at once instead of waiting as TCP does; wait a little and try again.
async fn connect_unix(path: &std::path::Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(Duration::from_millis(2)).await,
            other => return other,
        }
    }
}

/// More of a request body than fits in memory, read from elsewhere.
pub trait StdinSource {
    /// The next piece, at most 65,535 bytes; `None` at the end.
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>>;
}

/// The request body as the exchange sends it.
pub enum Stdin {
    /// Nothing but the empty record that ends the stream. Also where the body is already in `Conn::output`.
    Done,
    /// None is empty.
    Memory(VecDeque<Bytes>),
    Source(Box<dyn StdinSource>),
}

#[derive(Debug, PartialEq)]
pub enum Event {
    Stdout(Bytes),
    Stderr(Bytes),
    /// END_REQUEST with REQUEST_COMPLETE.
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Sending,
    Sent,
    Ended,
    Failed,
}

pub struct Exchange {
    conn: Conn,
    state: State,
    stdin: Stdin,
    stdin_ended: bool,
    /// Records of the body that are to follow `Conn::output`.
    queue: VecDeque<Bytes>,
    decoder: Decoder,
    read_size: usize,
    wrote: bool,
    read: bool,
    /// A write failed; what FPM may have answered before is still read.
    write_error: Option<io::Error>,
    sent_at: Option<Instant>,
}

impl Exchange {
    /// `conn.output` holds BEGIN_REQUEST, PARAMS and, for a small body, STDIN with its end (`stdin_ended`).
    pub fn start(mut conn: Conn, stdin: Stdin, stdin_ended: bool) -> Self {
        conn.requests = conn.requests.saturating_add(1);
        Exchange {
            conn,
            state: State::Sending,
            stdin,
            stdin_ended,
            queue: VecDeque::new(),
            decoder: Decoder::default(),
            read_size: READ_BYTES,
            wrote: false,
            read: false,
            write_error: None,
            sent_at: None,
        }
    }

    /// What of the exchange has happened decides whether it may be done again.
    fn fail(&mut self, kind: Kind, detail: String) -> Error {
        self.state = State::Failed;
        let retry = match (self.wrote, self.read) {
            (false, _) => Retry::Free,
            (true, false) => Retry::IfIdempotent,
            (true, true) => Retry::Never,
        };
        Error::new(kind, detail).retry(retry)
    }

    /// The next thing FPM says. Sends at the same time: PHP may answer before it has read the whole body.
    pub fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, Error>> {
        if self.state == State::Sending
            && self.write_error.is_none()
            && let Poll::Ready(Err(error)) = self.poll_send(cx)
        {
            self.write_error = Some(error);
        }
        loop {
            match self.decoder.decode(&mut self.conn.input) {
                Ok(Some(frame)) => return Poll::Ready(self.on_frame(frame)),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Err(self.fail(Kind::UpstreamProtocol, error.to_string()))),
            }
            match ready!(self.poll_fill(cx)) {
                Ok(0) => {
                    let detail = match &self.write_error {
                        Some(error) => format!("writing the request: {error}"),
                        None if self.read => "closed in the middle of its answer".to_owned(),
                        None => "closed without an answer".to_owned(),
                    };
                    return Poll::Ready(Err(self.fail(Kind::UpstreamClosed, detail)));
                }
                Ok(_) => self.read = true,
                Err(error) => return Poll::Ready(Err(self.fail(Kind::UpstreamClosed, format!("reading the answer: {error}")))),
            }
        }
    }

    pub async fn event(&mut self) -> Result<Event, Error> {
        poll_fn(|cx| self.poll_event(cx)).await
    }

    fn on_frame(&mut self, frame: Frame) -> Result<Event, Error> {
        match frame {
            Frame::Stdout(bytes) => Ok(Event::Stdout(bytes)),
            Frame::Stderr(bytes) => Ok(Event::Stderr(bytes)),
            Frame::End { protocol_status: REQUEST_COMPLETE, .. } => {
                self.state = if self.state == State::Sent && self.conn.input.is_empty() { State::Ended } else { State::Failed };
                Ok(Event::End)
            }
            Frame::End { protocol_status, .. } => {
                let what = match protocol_status {
                    CANT_MPX_CONN => "CANT_MPX_CONN",
                    OVERLOADED => "OVERLOADED",
                    _ => "an unknown protocolStatus",
                };
                // It says itself that it has not run the request.
                let mut error = self.fail(Kind::UpstreamOverloaded, format!("END_REQUEST with {what} ({protocol_status})"));
                if matches!(protocol_status, CANT_MPX_CONN | OVERLOADED) {
                    error.retry = Retry::Free;
                }
                Err(error)
            }
        }
    }

    /// Whether FPM may still be at work on it: then its worker is busy, whatever became of the request.
    pub fn may_go_on(&self) -> bool {
        self.wrote && matches!(self.state, State::Sending | State::Sent)
    }

    /// Whether the whole request has been handed to the kernel.
    pub fn is_sent(&self) -> bool {
        self.state != State::Sending
    }

    /// When it was; `None`: not yet.
    pub fn sent_at(&self) -> Option<Instant> {
        self.sent_at
    }

    /// The connection, fit for another request: END_REQUEST came, all was sent, and not a byte followed.
    pub fn into_conn(mut self) -> Option<Conn> {
        (self.state == State::Ended).then(|| {
            self.conn.output.clear();
            self.conn.idle_since = clock::now();
            self.conn
        })
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        // What is left of the buffer first: an answer in many small records would hold one for each of them, most of it empty.
        if self.conn.input.capacity() - self.conn.input.len() < self.read_size / 2 {
            self.conn.input.reserve(self.read_size);
        }
        let n = ready!(poll_read_into(&mut self.conn.stream, &mut self.conn.input, cx))?;
        if n >= self.read_size {
            self.read_size = READ_BYTES_LARGE;
        }
        Poll::Ready(Ok(n))
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            self.gather(cx)?;
            if self.conn.output.is_empty() && self.queue.is_empty() {
                if !self.stdin_ended {
                    // The source wakes.
                    return Poll::Pending;
                }
                // An advanced BytesMut does not give its front back by itself; an empty one does.
                self.conn.output.clear();
                self.state = State::Sent;
                self.sent_at = Some(clock::now());
                return Poll::Ready(Ok(()));
            }
            // write(2) costs less than writev(2).
            let mut n = if self.queue.is_empty() {
                ready!(self.conn.stream.poll_write(cx, &self.conn.output))?
            } else {
                let mut slices = [io::IoSlice::new(&[]); SLICES];
                let pieces = std::iter::once(&self.conn.output[..]).chain(self.queue.iter().map(|piece| &piece[..]));
                let filled = slices.iter_mut().zip(pieces).map(|(slice, piece)| *slice = io::IoSlice::new(piece)).count();
                ready!(self.conn.stream.poll_write_vectored(cx, &slices[..filled]))?
            };
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.wrote = true;
            let head = n.min(self.conn.output.len());
            self.conn.output.advance(head);
            n -= head;
            while let Some(piece) = self.queue.front_mut() {
                let part = n.min(piece.len());
                piece.advance(part);
                n -= part;
                if !piece.is_empty() {
                    break;
                }
                self.queue.pop_front();
            }
        }
    }

    /// As many records of the body as one write is to take. What is read from elsewhere is not read ahead: it would be more memory than is accounted for.
    fn gather(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let in_memory = !matches!(self.stdin, Stdin::Source(_));
        while !self.stdin_ended && self.queue.len() + 2 < SLICES && (in_memory || self.queue.is_empty()) {
            match self.poll_stdin(cx) {
                Poll::Pending => break,
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Ready(Ok(Some((length, chunk)))) => {
                    self.queue.push_back(Bytes::copy_from_slice(&record::stdin_header(length)));
                    self.queue.push_back(chunk);
                }
                Poll::Ready(Ok(None)) => {
                    let mut end = BytesMut::new();
                    record::put_stdin_end(&mut end);
                    self.queue.push_back(end.freeze());
                    self.stdin_ended = true;
                }
            }
        }
        Ok(())
    }

    /// The next piece of the body with its length as the wire has it.
    fn poll_stdin(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<(u16, Bytes)>>> {
        let chunk = match &mut self.stdin {
            Stdin::Done => None,
            Stdin::Memory(pieces) => match pieces.front_mut() {
                None => None,
                Some(piece) if piece.len() > record::MAX_CONTENT => Some(piece.split_to(record::MAX_CONTENT)),
                Some(_) => pieces.pop_front(),
            },
            Stdin::Source(source) => ready!(source.poll_chunk(cx))?,
        };
        Poll::Ready(match chunk {
            None => Ok(None),
            Some(chunk) => match u16::try_from(chunk.len()) {
                Ok(length) if length > 0 => Ok(Some((length, chunk))),
                _ => Err(io::Error::other("a body source gave a piece that is empty or larger than a record")),
            },
        })
    }
}

fn poll_read_into(stream: &mut Stream, buffer: &mut BytesMut, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    // tokio-util's poll_read_buf over an enum: `read_buf` borrows the spare capacity without initialising it.
    struct Reader<'a>(&'a mut Stream);
    impl AsyncRead for Reader<'_> {
        fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            self.get_mut().0.poll_read(cx, buf)
        }
    }
    tokio_util::io::poll_read_buf(Pin::new(&mut Reader(stream)), cx, buffer)
}
