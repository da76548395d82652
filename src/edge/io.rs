//! The wrappers around a client's stream: they note progress for the deadlines of its connection, finds an endless request line, and closes
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
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep},
};
use tokio_rustls::server::TlsStream;

use std::rc::Rc;

use super::{stall::Stall, unacked::unacked};
use crate::model::clock;

/// After the last answer so much is read and thrown away, so that the kernel does not reset the connection over unread bytes.
const LINGER_BYTES: usize = 1024 * 1024;
const LINGER_TIME: Duration = Duration::from_secs(2);
/// Up to so many bytes the pieces of an answer are gathered before they are written.
const GATHERED: usize = 4 * 1024;

thread_local! {
    static GATHER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A peer that has said nothing for so long is asked whether it is there, three times.
const ASK_PEER_AFTER: Duration = Duration::from_secs(20);
const ASK_PEER_EVERY: Duration = Duration::from_secs(7);

/// How often the kernel is asked whether the client has acknowledged everything.
pub const ASK_EVERY: Duration = Duration::from_millis(20);
/// Less than that is no answer but what is said at the end of a connection, on its way to a client that may have gone.
const LAST_WORDS: usize = 1024;

/// What the kernel has yet to bring to the client, as it was seen to become less.
#[derive(Debug, Default)]
pub struct Delivery {
    stall: Stall,
    before: usize,
    /// Requests of the connection when it was looked first: another answer has its own time.
    served: u64,
}

impl Delivery {
    /// Whether so many bytes are to be waited for: as long as the client takes them as fast as it must take everything.
    pub fn goes_on(&mut self, undelivered: usize, progress: &Progress) -> bool {
        let served = progress.served.get();
        if undelivered == 0 || served != self.served {
            self.stall.over();
        }
        self.served = served;
        if undelivered > 0 {
            if self.stall.is_blocked() && undelivered < self.before {
                self.stall.took(self.before - undelivered);
            }
            self.stall.blocked();
        }
        self.before = undelivered;
        let (stall, min_rate) = progress.slowest.get();
        let stall = if undelivered <= LAST_WORDS { stall.min(LINGER_TIME) } else { stall };
        self.stall.deadline(stall, min_rate).is_some_and(|deadline| Instant::now() < deadline)
    }
}

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
    /// Requests that their client has taken back before there was an answer, since `counted_from`.
    pub taken_back: Cell<u64>,
    counted_from: Cell<Instant>,
    pub served: Cell<u64>,
    /// HTTP/2 has no stages: its head deadline is h2's own.
    pub multiplexed: Cell<bool>,
    /// Idle, it may be parked.
    pub may_park: Cell<bool>,
    /// The last request had a body, or could not be parsed: there may be unread bytes at the end.
    pub linger: Cell<bool>,
    /// The process is about to end: its connections close only when the client has all that was sent to it.
    pub leaving: Cell<bool>,
    /// Of the request line so far; `None` once its end was seen.
    line_bytes: Cell<Option<usize>>,
    pub line_too_long: Cell<bool>,
    max_line_bytes: usize,
    /// A client that does not read what is sent to it.
    pub stall: Stall,
    /// Set from outside: end now.
    pub abort: Cell<bool>,
    /// Set from outside: idle, it is to make room for another.
    pub unwanted: Cell<bool>,
    /// Idle, but the kernel still delivers its last answer.
    pub delivering: Cell<bool>,
    /// `stall_timeout` and `min_rate`.
    pub slowest: Cell<(Duration, u64)>,
    /// Its peer is a trusted proxy.
    pub is_trusted: Cell<bool>,
    pub waker: RefCell<Option<Waker>>,
}

impl Progress {
    pub fn new(max_uri_bytes: usize) -> Rc<Self> {
        Rc::new(Progress {
            stage: Cell::new(Stage::Idle),
            since: Cell::new(Instant::now()),
            in_flight: Cell::new(0),
            taken_back: Cell::new(0),
            counted_from: Cell::new(Instant::now()),
            served: Cell::new(0),
            multiplexed: Cell::new(false),
            may_park: Cell::new(false),
            linger: Cell::new(false),
            leaving: Cell::new(false),
            line_bytes: Cell::new(Some(0)),
            line_too_long: Cell::new(false),
            // Method, spaces and version beside the target.
            max_line_bytes: max_uri_bytes.saturating_add(64),
            stall: Stall::default(),
            abort: Cell::new(false),
            unwanted: Cell::new(false),
            delivering: Cell::new(false),
            slowest: Cell::new((Duration::from_secs(30), 0)),
            is_trusted: Cell::new(false),
            waker: RefCell::new(None),
        })
    }

    pub fn enter(&self, stage: Stage) {
        self.stage.set(stage);
        self.since.set(clock::now());
        self.line_bytes.set(Some(0));
    }

    /// A request was taken back before there was an answer.
    pub fn took_back(&self, window: Duration) {
        let now = clock::now();
        if now > self.counted_from.get() + window {
            self.counted_from.set(now);
            self.taken_back.set(0);
        }
        self.taken_back.set(self.taken_back.get() + 1);
    }

    /// Something has come just when it was to end for want of it.
    pub fn stays(&self) {
        self.unwanted.set(false);
        self.since.set(Instant::now());
    }

    pub fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    fn received(&self, bytes: &[u8]) {
        if self.multiplexed.get() || bytes.is_empty() {
            return;
        }
        if self.stage.get() == Stage::Idle {
            self.enter(Stage::Head);
            self.unwanted.set(false);
            // Where it is refused before it is a request, more of it may be on its way.
            self.linger.set(true);
        }
        if self.stage.get() == Stage::Head
            && let Some(before) = self.line_bytes.get()
        {
            let line = if before == 0 { &bytes[empty_lines(bytes)..] } else { bytes };
            let end = memchr::memchr(b'\n', line);
            let length = before + end.unwrap_or(line.len());
            self.line_too_long.set(length > self.max_line_bytes);
            self.line_bytes.set(end.is_none().then_some(length));
        }
    }

    fn sent(&self, wanted: usize, result: &Poll<io::Result<usize>>) {
        match result {
            // All that was to be sent has gone to the kernel.
            Poll::Ready(Ok(n)) if *n == wanted => self.stall.over(),
            Poll::Ready(Ok(n)) => self.stall.took(*n),
            Poll::Ready(Err(_)) => self.stall.over(),
            Poll::Pending => self.stall.blocked(),
        }
    }
}

/// How many bytes of empty lines there are at the beginning: they may stand before a request (RFC 9112, section 2.2).
fn empty_lines(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count()
}

/// The socket, and what its peer takes: below TLS, which has a buffer of its own and would take everything at once.
#[derive(Debug)]
pub struct Watched {
    tcp: TcpStream,
    progress: Rc<Progress>,
}

impl Watched {
    pub fn new(tcp: TcpStream, progress: Rc<Progress>) -> Self {
        Watched { tcp, progress }
    }

    /// For what stands before everything else.
    pub fn tcp(&mut self) -> &mut TcpStream {
        &mut self.tcp
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.tcp).poll_write(cx, buf);
        self.progress.sent(buf.len(), &result);
        result
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let wanted: usize = bufs.iter().map(|b| b.len()).sum();
        let result = if wanted <= GATHERED {
            // Copied into one piece a small answer costs less than writev(2) does to look at its pieces.
            GATHER.with_borrow_mut(|gathered| {
                gathered.clear();
                bufs.iter().for_each(|buf| gathered.extend_from_slice(buf));
                Pin::new(&mut self.tcp).poll_write(cx, gathered)
            })
        } else {
            Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs)
        };
        self.progress.sent(wanted, &result);
        result
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

/// What a client speaks through.
#[derive(Debug)]
pub enum Stream {
    Plain(Watched),
    Tls(Box<TlsStream<Watched>>),
}

impl Stream {
    fn tcp(&self) -> &TcpStream {
        match self {
            Stream::Plain(watched) => &watched.tcp,
            Stream::Tls(tls) => &tls.get_ref().0.tcp,
        }
    }
}

/// Calls the same method of either.
macro_rules! either {
    ($stream:expr, $inner:ident => $call:expr) => {
        match $stream {
            Stream::Plain($inner) => {
                let $inner = Pin::new($inner);
                $call
            }
            Stream::Tls($inner) => {
                let $inner = Pin::new(&mut **$inner);
                $call
            }
        }
    };
}

#[derive(Debug)]
pub struct Io {
    stream: Stream,
    /// Read while finding out the protocol.
    prefix: Bytes,
    progress: Rc<Progress>,
    lingering: Option<Lingering>,
}

#[derive(Debug)]
struct Lingering {
    timeout: Pin<Box<Sleep>>,
    discarded: usize,
    /// Nothing more is to be read.
    over: bool,
    delivery: Delivery,
}

impl Io {
    pub fn new(stream: Stream, progress: Rc<Progress>) -> Self {
        Io { stream, prefix: Bytes::new(), progress, lingering: None }
    }

    pub fn unread(&mut self, prefix: Bytes) {
        self.prefix = prefix;
    }

    /// What hyper had read of the next request when it was asked to end: of a request that has begun, but for empty lines.
    pub fn take_back(&mut self, mut read: Bytes) {
        read.advance(empty_lines(&read));
        self.progress.received(&read);
        self.prefix = read;
    }

    /// Bytes that the client has not acknowledged yet: what the kernel has taken is not there for long.
    pub fn undelivered(&self) -> usize {
        unacked(self.stream.tcp())
    }

    /// Whether the kernel has something for us: the runtime may not have heard of it yet.
    pub fn has_input(&self) -> bool {
        self.prefix.has_remaining() || super::is_readable(self.stream.tcp())
    }

    /// A client that vanishes without a word is found out by the kernel, however much of an answer lies before the question.
    pub fn watch_peer(&self) {
        let keepalive = TcpKeepalive::new().with_time(ASK_PEER_AFTER).with_interval(ASK_PEER_EVERY).with_retries(3);
        let _ = SockRef::from(self.stream.tcp()).set_tcp_keepalive(&keepalive);
    }

    /// Until there is something to read, an end among it. Takes no buffer.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let decrypted = match &self.stream {
            Stream::Plain(_) => false,
            // What has been decrypted already the socket knows nothing of.
            Stream::Tls(tls) => !tls.get_ref().1.wants_read(),
        };
        if decrypted || self.prefix.has_remaining() {
            return Poll::Ready(());
        }
        // An error is for the read to say.
        self.stream.tcp().poll_read_ready(cx).map(drop)
    }

    /// Reads and throws away until the client closes, within bounds. A process that is about to end waits for the client to have
    /// acknowledged everything instead: its network may go with it, and what the kernel has not delivered would be lost.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let lingering = self.lingering.get_or_insert_with(|| Lingering {
            timeout: Box::pin(tokio::time::sleep(LINGER_TIME)),
            discarded: 0,
            over: false,
            delivery: Delivery::default(),
        });
        let mut scratch = [0u8; 8 * 1024];
        while !lingering.over {
            let mut buf = ReadBuf::new(&mut scratch);
            match either!(&mut self.stream, inner => inner.poll_read(cx, &mut buf)) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
                    lingering.discarded += buf.filled().len();
                    lingering.over = lingering.discarded > LINGER_BYTES;
                }
                Poll::Ready(Ok(())) => lingering.over = true,
                // A reset: nothing is on its way any more, though the kernel goes on counting it.
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending if lingering.timeout.as_mut().poll(cx).is_pending() => return Poll::Pending,
                Poll::Pending => lingering.over = true,
            }
        }
        // A client of HTTP/2 goes on talking of windows: on a socket that is closed that would reset what is still on its way to it.
        let waits = self.progress.leaving.get() || self.progress.multiplexed.get();
        while waits && lingering.delivery.goes_on(unacked(self.stream.tcp()), &self.progress) {
            if !matches!(self.stream.tcp().take_error(), Ok(None)) {
                break;
            }
            // The kernel does not say when; a connection that is cut ends this.
            if lingering.timeout.is_elapsed() || lingering.timeout.deadline() > Instant::now() + ASK_EVERY {
                lingering.timeout.as_mut().reset(Instant::now() + ASK_EVERY);
            }
            ready!(lingering.timeout.as_mut().poll(cx));
        }
        Poll::Ready(())
    }

    /// The bound for a lingering close.
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
        ready!(either!(&mut self.stream, inner => inner.poll_read(cx, buf)))?;
        self.progress.received(&buf.filled()[before..]);
        if self.progress.line_too_long.get() {
            return Poll::Ready(Err(io::Error::other("request line too long")));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(&mut self.stream, inner => inner.poll_write(cx, buf))
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        either!(&mut self.stream, inner => inner.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(&mut self.stream, inner => inner.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // No other request comes after this, whatever its bytes look like.
        self.progress.may_park.set(false);
        ready!(either!(&mut self.stream, inner => inner.poll_shutdown(cx)))?;
        if self.progress.linger.get() || self.progress.leaving.get() || self.progress.multiplexed.get() {
            // No longer that of a head: what was to be said of it is said.
            self.progress.stage.set(Stage::Busy);
            ready!(self.poll_linger(cx));
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(30);

    fn progress() -> Rc<Progress> {
        let progress = Progress::new(1024);
        progress.slowest.set((STALL, 1024));
        progress
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_waited_for_as_long_as_any_other() {
        let (progress, mut delivery) = (progress(), Delivery::default());
        assert!(delivery.goes_on(100_000, &progress));
        tokio::time::advance(STALL - Duration::from_secs(1)).await;
        assert!(delivery.goes_on(100_000, &progress));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!delivery.goes_on(100_000, &progress));
        assert!(!delivery.goes_on(0, &progress));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_takes_less_than_the_rate_is_not_waited_for() {
        for (each_second, ends) in [(512, true), (2048, false)] {
            let (progress, mut delivery) = (progress(), Delivery::default());
            let mut left = 400_000;
            let mut seconds = 0;
            while delivery.goes_on(left, &progress) && seconds < 90 {
                tokio::time::advance(Duration::from_secs(1)).await;
                (left, seconds) = (left - each_second, seconds + 1);
            }
            assert_eq!(seconds < 90, ends, "{each_second} bytes a second: {seconds} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn another_answer_has_its_own_time_and_last_words_have_little() {
        let (progress, mut delivery) = (progress(), Delivery::default());
        assert!(delivery.goes_on(50_000, &progress));
        tokio::time::advance(STALL * 2).await;
        progress.served.set(1);
        assert!(delivery.goes_on(600_000, &progress), "it was looked at long ago, for another answer");
        let mut delivery = Delivery::default();
        assert!(delivery.goes_on(51, &progress));
        tokio::time::advance(LINGER_TIME).await;
        assert!(!delivery.goes_on(51, &progress), "GOAWAY, to a client that has gone");
    }
}
