//! The wrapper around a client's stream: it notes progress for the deadlines of its connection, finds an endless request line, and closes
//! so that the client still reads the last answer.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep},
};

use std::rc::Rc;

/// After the last answer so much is read and thrown away, so that the kernel does not reset the connection over unread bytes.
const LINGER_BYTES: usize = 1024 * 1024;
const LINGER_TIME: Duration = Duration::from_secs(2);

/// Where a connection stands between its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Nothing of a request has come.
    Idle,
    /// Some of a head has come.
    Head,
    /// A request is being answered.
    Busy,
}

/// What the stream and the connection future tell each other. One per connection, on its worker's thread.
#[derive(Debug)]
pub struct Progress {
    pub stage: Cell<Stage>,
    pub since: Cell<Instant>,
    pub in_flight: Cell<usize>,
    pub served: Cell<u64>,
    /// HTTP/2 has no stages: its head deadline is h2's own.
    pub multiplexed: Cell<bool>,
    /// The last request had a body, or could not be parsed: there may be unread bytes at the end.
    pub linger: Cell<Option<Duration>>,
    /// Of the request line so far; `None` once its end was seen.
    line_bytes: Cell<Option<usize>>,
    pub line_too_long: Cell<bool>,
    max_line_bytes: usize,
    /// A write could not go on: since when, how much since then, and when it last went on.
    blocked: Cell<Option<Blocked>>,
    /// Set from outside: end now.
    pub abort: Cell<bool>,
    pub waker: RefCell<Option<Waker>>,
}

#[derive(Clone, Copy, Debug)]
struct Blocked {
    window: Instant,
    bytes: u64,
    last: Instant,
}

impl Progress {
    pub fn new(max_uri_bytes: usize) -> Rc<Self> {
        Rc::new(Progress {
            stage: Cell::new(Stage::Idle),
            since: Cell::new(Instant::now()),
            in_flight: Cell::new(0),
            served: Cell::new(0),
            multiplexed: Cell::new(false),
            linger: Cell::new(None),
            line_bytes: Cell::new(Some(0)),
            line_too_long: Cell::new(false),
            // Method, spaces and version beside the target.
            max_line_bytes: max_uri_bytes.saturating_add(64),
            blocked: Cell::new(None),
            abort: Cell::new(false),
            waker: RefCell::new(None),
        })
    }

    pub fn enter(&self, stage: Stage) {
        self.stage.set(stage);
        self.since.set(Instant::now());
        self.line_bytes.set(Some(0));
    }

    pub fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// When a client that does not read what is sent to it has had its time: `stall` without any progress, or, after the first
    /// `stall`, less than `min_rate` bytes a second.
    pub fn write_deadline(&self, stall: Duration, min_rate: u64) -> Option<Instant> {
        let mut blocked = self.blocked.get()?;
        let window_end = blocked.window + stall;
        if Instant::now() >= window_end {
            if blocked.bytes < min_rate.saturating_mul(stall.as_secs().max(1)) {
                return Some(window_end);
            }
            blocked.window = window_end;
            blocked.bytes = 0;
            self.blocked.set(Some(blocked));
        }
        Some((blocked.last + stall).min(blocked.window + stall))
    }

    fn received(&self, bytes: &[u8]) {
        if self.multiplexed.get() || bytes.is_empty() {
            return;
        }
        if self.stage.get() == Stage::Idle {
            self.enter(Stage::Head);
        }
        if self.stage.get() == Stage::Head
            && let Some(before) = self.line_bytes.get()
        {
            match memchr::memchr(b'\n', bytes) {
                // Empty lines before a request are allowed (RFC 9112, section 2.2).
                Some(end) if before + end > 1 => {
                    self.line_too_long.set(before + end > self.max_line_bytes);
                    self.line_bytes.set(None);
                }
                _ => {
                    self.line_bytes.set(Some(before + bytes.len()));
                    self.line_too_long.set(before + bytes.len() > self.max_line_bytes);
                }
            }
        }
    }

    fn sent(&self, result: &Poll<io::Result<usize>>) {
        match result {
            Poll::Ready(Ok(n)) => {
                if let Some(mut blocked) = self.blocked.get() {
                    blocked.bytes += *n as u64;
                    blocked.last = Instant::now();
                    self.blocked.set(Some(blocked));
                }
            }
            Poll::Ready(Err(_)) => self.blocked.set(None),
            Poll::Pending if self.blocked.get().is_none() => {
                let now = Instant::now();
                self.blocked.set(Some(Blocked { window: now, bytes: 0, last: now }));
            }
            Poll::Pending => {}
        }
    }

    /// All that was to be sent has gone to the kernel.
    fn flushed(&self) {
        self.blocked.set(None);
    }
}

#[derive(Debug)]
pub struct Io {
    stream: TcpStream,
    /// Read while finding out the protocol.
    prefix: Bytes,
    progress: Rc<Progress>,
    lingering: Option<Lingering>,
}

#[derive(Debug)]
struct Lingering {
    timeout: Pin<Box<Sleep>>,
    discarded: usize,
}

impl Io {
    pub fn new(stream: TcpStream, progress: Rc<Progress>) -> Self {
        Io { stream, prefix: Bytes::new(), progress, lingering: None }
    }

    pub fn unread(&mut self, prefix: Bytes) {
        self.prefix = prefix;
    }

    /// Reads and throws away until the client closes, within bounds.
    fn poll_linger(&mut self, limit: Duration, cx: &mut Context<'_>) -> Poll<()> {
        let lingering =
            self.lingering.get_or_insert_with(|| Lingering { timeout: Box::pin(tokio::time::sleep(limit)), discarded: 0 });
        let mut scratch = [0u8; 8 * 1024];
        loop {
            let mut buf = ReadBuf::new(&mut scratch);
            match Pin::new(&mut self.stream).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if buf.filled().is_empty() => return Poll::Ready(()),
                Poll::Ready(Ok(())) => {
                    lingering.discarded += buf.filled().len();
                    if lingering.discarded > LINGER_BYTES {
                        return Poll::Ready(());
                    }
                }
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => return lingering.timeout.as_mut().poll(cx),
            }
        }
    }

    /// The default bound for a lingering close.
    pub const LINGER: Duration = LINGER_TIME;
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if self.prefix.has_remaining() {
            let n = self.prefix.len().min(buf.remaining());
            buf.put_slice(&self.prefix[..n]);
            self.prefix.advance(n);
            // Seen by `received` when it came.
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.progress.received(&buf.filled()[before..]);
        if self.progress.line_too_long.get() {
            return Poll::Ready(Err(io::Error::other("request line too long")));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.progress.sent(&result);
        if matches!(result, Poll::Ready(Ok(n)) if n == buf.len()) {
            self.progress.flushed();
        }
        result
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.progress.sent(&result);
        if matches!(result, Poll::Ready(Ok(n)) if n == bufs.iter().map(|b| b.len()).sum::<usize>()) {
            self.progress.flushed();
        }
        result
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
        match self.progress.linger.get() {
            None => Poll::Ready(Ok(())),
            Some(limit) => self.poll_linger(limit, cx).map(Ok),
        }
    }
}
