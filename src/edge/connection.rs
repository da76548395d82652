//! One hyper connection: its deadlines, its drain, and what hyper refuses by itself.

use std::{
    cell::Cell,
    convert::Infallible,
    future::Future,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, Version, header};
use http_body::{Body, Frame, SizeHint};
use hyper::{body::Incoming, server::conn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::Instant};
use tokio_rustls::TlsAcceptor;
use tower::Service;

use super::{
    batch::Batch,
    io::{ASK_EVERY, Delivery, Io, Progress, Stage, Stream, Watched},
    listener::Counts,
    proxy_protocol,
    registry::Registry,
    sniff::{self, Protocol},
    stall::Stall,
    streams::{self, Streams},
};
use crate::{
    error::{Error, Kind},
    lifecycle::{Phase, PhaseCell},
    model::{Peer, Settings, clock, peer::is_within},
};

/// h2 resets what goes beyond; its own default is 200.
const MAX_STREAMS: u32 = 128;
/// How often it is looked whether an answer has been delivered, while nothing else depends on it.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// So many requests of an HTTP/2 connection may be taken back before there is an answer, in so long: each may cost a run of PHP, which its worker does not give
/// up (CVE-2023-44487, CVE-2025-8671). A browser whose user moves on takes back a few; a trusted proxy speaks for many.
const MAX_TAKEN_BACK: u64 = 100;
const TAKEN_BACK_WINDOW: Duration = Duration::from_secs(10);
/// hyper's floor for its read buffer.
const MIN_BUFFER: usize = 8 * 1024;
const MAX_HEADERS: usize = 256;
/// An HTTP/2 answer is handed over in pieces of a frame's default size, so that taking one is progress however small the window.
const MAX_PIECE: usize = 16 * 1024;
/// hyper keeps some 20 KiB for an idle connection, and a new one costs a microsecond.
const PARK_AFTER: Duration = Duration::from_millis(25);

/// Told of what was refused before it was a request.
pub type Refused = Box<dyn Fn(&Peer, &Error)>;

/// What every connection of a worker shares.
pub struct Shared {
    pub phase: Arc<PhaseCell>,
    pub registry: Rc<Registry>,
    pub settings: Box<dyn Fn() -> Arc<Settings>>,
    /// Told of each request that was refused before it reached the service.
    pub refused: Refused,
    pub counts: Arc<Counts>,
}

/// Serves one accepted connection to its end. `service` is told who the peer is, once a PROXY header has said so.
pub async fn serve<S, B>(context: Rc<Shared>, stream: TcpStream, peer: Peer, service: impl FnOnce(Peer) -> S)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + 'static,
    S::Future: 'static,
    B: Body<Data = Bytes> + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let settings = (context.settings)();
    let progress = Progress::new(settings.listen.max_uri_bytes);
    progress.slowest.set((settings.listen.stall_timeout, settings.listen.min_rate));
    progress.is_trusted.set(is_within(peer.remote.ip(), &settings.listen.trusted_proxies));
    let _entry = context.registry.add(progress.clone());
    let stream = Watched::new(stream, progress.clone());
    let opened = if peer.tls || settings.listen.proxy_protocol {
        // Before the first byte of HTTP a client has no more time than for a head.
        progress.enter(Stage::Head);
        let mut opening = Box::pin(open(stream, peer, &settings));
        under_deadlines(&context, &settings, &progress, |cx| opening.as_mut().poll(cx)).await
    } else {
        Ok(Ok((Stream::Plain(stream), peer)))
    };
    let (stream, peer) = match opened {
        Ok(Ok(opened)) => opened,
        Ok(Err(None)) => return,
        Ok(Err(Some(error))) => return (context.refused)(&peer, &error),
        Err(end) => return tracing::debug!(peer = %peer.remote, ?end, "a connection ended before it was one"),
    };
    progress.enter(Stage::Idle);
    // Who connects was a trusted proxy, and exempt: the cap is for whom it has told.
    let _counted = match settings.listen.max_connections_per_address.filter(|_| settings.listen.proxy_protocol && !peer.is_untold) {
        None => None,
        Some(max) => match context.counts.take_address(peer.remote.ip().to_canonical(), max) {
            Some(counted) => Some(counted),
            None => return tracing::info!(peer = %peer.remote, "max_connections_per_address reached; connection closed"),
        },
    };
    let chosen = match &stream {
        Stream::Plain(_) => None,
        Stream::Tls(tls) => {
            tls.get_ref().1.alpn_protocol().map(|name| if name == b"h2" { Protocol::Http2 } else { Protocol::Http1 })
        }
    };
    let service = service(peer);
    let mut io = Io::new(stream, progress.clone());

    // Where TLS has agreed on a protocol there is nothing to find out.
    let sniffed = if let Some(protocol) = chosen {
        Ok(Ok(Some(protocol)))
    } else {
        loop {
            // An idle client that has sent nothing yet has idle_timeout; one that has begun, header_timeout.
            let sniffed = {
                let sniffing = sniff::sniff(&mut io);
                tokio::pin!(sniffing);
                under_deadlines(&context, &settings, &progress, |cx| sniffing.as_mut().poll(cx)).await
            };
            if !matches!(sniffed, Err(End::Idle)) || !io.has_input() {
                break sniffed;
            }
            progress.stays();
        }
    };
    let protocol = match sniffed {
        Ok(Ok(Some(protocol))) => protocol,
        Ok(_) => return,
        Err(end) => return finish(&context, &peer, &progress, end, io).await,
    };

    let streams = {
        let limits = streams::Limits { stall: settings.listen.stall_timeout, min_rate: settings.listen.min_rate };
        Streams::new(limits, move || tracing::info!(peer = %peer.remote, "client reads too slowly; stream reset"))
    };
    let service = {
        let (context, settings, progress, streams) = (context.clone(), settings.clone(), progress.clone(), streams.clone());
        Rc::new(hyper::service::service_fn(move |request: Request<Incoming>| {
            let mut started = Started::new(progress.clone(), !request.body().is_end_stream());
            // HTTP/1 has one answer at a time: the connection's own look at the socket is enough.
            let stall = progress.multiplexed.get().then(Rc::<Stall>::default);
            if let Some(stall) = &stall {
                streams.begin(stall);
            }
            let version = request.version();
            let last = settings.listen.max_requests_per_connection.is_some_and(|max| progress.served.get() >= max);
            let context = context.clone();
            // On the heap from the beginning: hyper would copy it, and keep room for it in each idle connection.
            let answered = Box::pin(service.clone().call(request));
            async move {
                let mut response = answered.await?;
                started.answered = true;
                if version < Version::HTTP_2 && (last || context.phase.get().is_leaving()) {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response.map(|inner| CountedBody { inner, rest: None, given: 0, stall, _started: started }))
            }
        }))
    };

    let way = Way { context: &context, settings: &settings, progress: &progress, peer: &peer };
    match protocol {
        Protocol::Http1 => way.http1(io, service).await,
        // On the heap: it takes more room than a connection of HTTP/1, of which there are more.
        Protocol::Http2 => Box::pin(way.http2(io, service, streams)).await,
    }
}

/// What the ways to speak HTTP have in common.
struct Way<'a> {
    context: &'a Shared,
    settings: &'a Settings,
    progress: &'a Progress,
    peer: &'a Peer,
}

impl Way<'_> {
    async fn under_deadlines<T>(&self, work: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Result<T, End> {
        under_deadlines(self.context, self.settings, self.progress, work).await
    }

    async fn http1<S, B>(&self, mut io: Io, service: S)
    where
        S: hyper::service::HttpService<Incoming, ResBody = B, Error = Infallible> + Clone,
        B: Body<Data = Bytes> + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let Way { context, settings, progress, peer } = *self;
        let listen = &settings.listen;
        loop {
            let mut connection = conn::http1::Builder::new()
                .max_headers(MAX_HEADERS)
                // Room for both; which of them is too large the service says (414 or 431).
                .max_buf_size((listen.max_uri_bytes + listen.max_header_bytes + 1024).max(MIN_BUFFER))
                .header_read_timeout(None)
                .serve_connection(TokioIo::new(io), service.clone());
            progress.may_park.set(true);
            let end = {
                let mut pinned = Pin::new(&mut connection);
                self.under_deadlines(|cx| {
                    progress.leaving.set(context.phase.get() >= Phase::Draining);
                    pinned.as_mut().poll(cx)
                })
                .await
            };
            progress.may_park.set(false);
            match end {
                Ok(Ok(())) => return,
                Ok(Err(_)) if progress.line_too_long.get() => {
                    return finish(context, peer, progress, End::LineTooLong, connection.into_parts().io.into_inner()).await;
                }
                Ok(Err(error)) => return refused_by_hyper(context, peer, &error),
                Err(end @ (End::Park | End::Idle)) => {
                    let parts = connection.into_parts();
                    io = parts.io.into_inner();
                    io.take_back(parts.read_buf);
                    if end == End::Idle {
                        if !io.has_input() {
                            return finish(context, peer, progress, end, io).await;
                        }
                        progress.stays();
                    }
                }
                Err(end) => return finish(context, peer, progress, end, connection.into_parts().io.into_inner()).await,
            }
            // hyper's buffers and state are gone; what is left of an idle connection is its socket.
            while let Err(end) = self.under_deadlines(|cx| io.poll_readable(cx)).await {
                // A request that has just come is not one that crosses our end.
                if end != End::Idle || !io.has_input() {
                    return finish(context, peer, progress, end, io).await;
                }
                progress.stays();
            }
        }
    }

    async fn http2<S, B>(&self, io: Io, service: S, streams: Streams)
    where
        S: hyper::service::HttpService<Incoming, ResBody = B, Error = Infallible>,
        S::Future: 'static,
        B: Body<Data = Bytes> + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let Way { context, settings, progress, peer } = *self;
        progress.multiplexed.set(true);
        progress.enter(Stage::Idle);
        let listen = &settings.listen;
        // Not by PING: it would lie behind what the kernel still delivers, and a slow reader would seem to have gone.
        io.watch_peer();
        let batch = Batch::new(io);
        let connection = conn::http2::Builder::new(streams)
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(u32::try_from(listen.max_uri_bytes + listen.max_header_bytes + 4096).unwrap_or(u32::MAX))
            .serve_connection(TokioIo::new(batch.clone()), service);
        tokio::pin!(connection);
        let leaving = Cell::new(false);
        let mut delivery = Delivery::default();
        let is_trusted = is_within(peer.remote.ip(), &listen.trusted_proxies);
        loop {
            let end = self
                .under_deadlines(|cx| {
                    progress.leaving.set(context.phase.get() >= Phase::Draining);
                    let worn = listen.max_requests_per_connection.is_some_and(|max| progress.served.get() >= max);
                    let taken_back = progress.taken_back.get();
                    let abused = taken_back > MAX_TAKEN_BACK && !is_trusted;
                    if abused && !leaving.get() {
                        let detail = format!("{taken_back} requests in {TAKEN_BACK_WINDOW:?}; the connection takes no more");
                        (context.refused)(peer, &Error::new(Kind::TakenBack, detail));
                    }
                    // Who does not hear GOAWAY does not wait for what runs either.
                    if abused && taken_back > 2 * MAX_TAKEN_BACK {
                        return Poll::Ready(Ok(()));
                    }
                    if !leaving.get() && (worn || abused || context.phase.get() >= Phase::Draining) {
                        leaving.set(true);
                        connection.as_mut().graceful_shutdown();
                        // From here on an idle one has its time: a request may cross.
                        if progress.stage.get() == Stage::Idle {
                            progress.since.set(clock::now());
                        }
                    }
                    let turn = connection.as_mut().poll(cx).map_err(Ended::from);
                    match batch.poll_send(cx) {
                        Poll::Ready(Err(error)) if turn.is_pending() => Poll::Ready(Err(error.into())),
                        _ => turn,
                    }
                })
                .await;
            match end {
                // What was handed to the kernel is not with the client yet, and would be lost with the next word of that client's.
                Err(End::Idle) if delivery.goes_on(batch.undelivered(), progress) => {
                    progress.unwanted.set(false);
                    progress.delivering.set(true);
                    ask_again(context, settings, progress);
                }
                // The client has its time to hear that no more is taken, also where it is to make room.
                Err(End::Idle) if !leaving.get() => {
                    leaving.set(true);
                    progress.unwanted.set(false);
                    progress.delivering.set(false);
                    connection.as_mut().graceful_shutdown();
                    progress.since.set(Instant::now());
                }
                Ok(Err(error)) => return ended(context, peer, &*error),
                _ => return,
            }
        }
    }
}

/// What h2 has refused by itself is said and counted; a client that has gone is not.
fn ended(context: &Shared, peer: &Peer, error: &(dyn std::error::Error + 'static)) {
    let causes: Vec<_> = std::iter::successors(Some(error), |error| error.source()).collect();
    let gone = causes.iter().any(|cause| {
        cause.is::<std::io::Error>()
            || cause.downcast_ref::<hyper::Error>().is_some_and(|error| error.is_closed() || error.is_timeout())
            || cause.downcast_ref::<h2::Error>().is_some_and(|error| error.is_remote() || error.is_io())
    });
    let why = causes.iter().map(ToString::to_string).collect::<Vec<_>>().join(": ");
    match gone {
        true => tracing::debug!(peer = %peer.remote, error = why, "HTTP/2 connection ended"),
        false => (context.refused)(peer, &Error::new(Kind::BadRequest, why)),
    }
}

/// What stands before HTTP: a PROXY header, TLS.
async fn open(mut stream: Watched, mut peer: Peer, settings: &Settings) -> Result<(Stream, Peer), Option<Error>> {
    // Who leaves without a word has asked for nothing: a load balancer that looks whether the port is open.
    let refused = |kind, error: std::io::Error| {
        (error.kind() != std::io::ErrorKind::UnexpectedEof).then(|| Error::new(kind, error.to_string()))
    };
    if settings.listen.proxy_protocol {
        if !is_within(peer.remote.ip(), &settings.listen.trusted_proxies) {
            let why = std::io::Error::other("proxy_protocol is required, and this peer is no trusted proxy");
            return Err(refused(Kind::ProxyHeader, why));
        }
        match proxy_protocol::read(stream.tcp()).await.map_err(|error| refused(Kind::ProxyHeader, error))? {
            Some((remote, local)) => peer = Peer { remote, local, tls_before: local.port() == 443, ..peer },
            // What follows is nobody's word, whatever it says of a client.
            None => peer.is_untold = true,
        }
    }
    if !peer.tls {
        return Ok((Stream::Plain(stream), peer));
    }
    let Some(tls) = &settings.tls else { return Err(Some(Error::new(Kind::Handshake, "there is no certificate"))) };
    let accepted = TlsAcceptor::from(tls.server.clone()).accept(stream).await;
    let stream = accepted.map_err(|error| refused(Kind::Handshake, error))?;
    Ok((Stream::Tls(Box::new(stream)), peer))
}

/// Why an HTTP/2 connection has ended.
type Ended = Box<dyn std::error::Error>;

/// Why a connection ends before its peer or hyper wants it to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Idle,
    HeadTimeout,
    LineTooLong,
    /// The client reads too slowly or not at all.
    WriteStalled,
    Cut,
    /// Not the connection's end: it has been idle for so long that hyper's state is not worth its memory.
    Park,
}

/// Polls `work` until it is done or a deadline of the connection has passed. One timer a connection, moved only when a
/// deadline comes nearer: between requests nothing is armed or disarmed.
async fn under_deadlines<T>(
    context: &Shared,
    settings: &Settings,
    progress: &Progress,
    mut work: impl FnMut(&mut Context<'_>) -> Poll<T>,
) -> Result<T, End> {
    let mut armed = Instant::now() + clock::NEVER;
    let sleep = tokio::time::sleep_until(armed);
    tokio::pin!(sleep);
    let mut look = |cx: &mut Context<'_>| {
        if progress.waker.borrow().is_none() {
            *progress.waker.borrow_mut() = Some(cx.waker().clone());
        }
        if progress.abort.get() {
            return Poll::Ready(Err(End::Cut));
        }
        if let Poll::Ready(done) = work(cx) {
            return Poll::Ready(Ok(done));
        }
        let wanted = clock::wanted();
        loop {
            let deadline = next_deadline(context, settings, progress);
            let Some(due) = deadline.map(|(at, _)| at).into_iter().chain(wanted).min() else { return Poll::Pending };
            if due < armed {
                armed = due;
                sleep.as_mut().reset(due);
            }
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            if let Some((_, end)) = deadline.filter(|(at, _)| now >= *at) {
                return Poll::Ready(Err(end));
            }
            if wanted.is_some_and(|wanted| now >= wanted) {
                // Whoever wants it finds that its time has come.
                armed = now + clock::NEVER;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            // It was armed for something that is over.
            armed = due;
            sleep.as_mut().reset(due);
        }
    };
    std::future::poll_fn(|cx| clock::once(|| look(cx))).await
}

/// Looks at an idle connection again soon, whatever its time is counted from.
fn ask_again(context: &Shared, settings: &Settings, progress: &Progress) {
    let time = match context.phase.get() {
        phase if phase >= Phase::Aborting => Duration::ZERO,
        Phase::Draining => settings.drain.quiet,
        _ => settings.listen.idle_timeout,
    };
    let now = Instant::now();
    let again = if context.phase.get() < Phase::Draining { LOOK_EVERY } else { ASK_EVERY };
    progress.since.set(now.checked_sub(time).unwrap_or(now) + again);
}

fn next_deadline(context: &Shared, settings: &Settings, progress: &Progress) -> Option<(Instant, End)> {
    let since = progress.since.get();
    let stage = match progress.stage.get() {
        Stage::Busy => None,
        Stage::Head => Some((since + settings.listen.header_timeout, End::HeadTimeout)),
        Stage::Idle if context.phase.get() >= Phase::Aborting => Some((since, End::Idle)),
        // Not while an answer is still on its way.
        Stage::Idle if progress.unwanted.get() && !progress.stall.is_blocked() => Some((since, End::Idle)),
        Stage::Idle if context.phase.get() >= Phase::Draining => Some((since + settings.drain.quiet, End::Idle)),
        // Not while an answer is still on its way.
        Stage::Idle if progress.may_park.get() && PARK_AFTER < settings.listen.idle_timeout && !progress.stall.is_blocked() => {
            Some((since + PARK_AFTER, End::Park))
        }
        Stage::Idle => Some((since + settings.listen.idle_timeout, End::Idle)),
    };
    let write = progress
        .stall
        .deadline(settings.listen.stall_timeout, settings.listen.min_rate)
        .map(|deadline| (deadline, End::WriteStalled));
    match (stage, write) {
        (Some(a), Some(b)) => Some(if a.0 <= b.0 { a } else { b }),
        (a, b) => a.or(b),
    }
}

/// Says a last word where HTTP has one, and closes.
async fn finish(context: &Shared, peer: &Peer, progress: &Progress, end: End, mut io: Io) {
    let kind = match end {
        End::HeadTimeout => Kind::HeadTimeout,
        End::LineTooLong => Kind::UriTooLong,
        End::WriteStalled => {
            tracing::info!(peer = %peer.remote, "client reads too slowly; connection closed");
            return;
        }
        End::Idle => {
            // A request that crosses our FIN is read and not reset; the peer sees an orderly end.
            progress.leaving.set(context.phase.get() >= Phase::Draining);
            // TLS may still hold what the client does not take.
            let _ = tokio::time::timeout((context.settings)().listen.stall_timeout, io.shutdown()).await;
            return;
        }
        End::Cut | End::Park => return,
    };
    let error = Error::new(kind, format!("refused by deadline or limit: {end:?}"));
    (context.refused)(peer, &error);
    let status = kind.status();
    let answer = format!(
        "HTTP/1.1 {} {}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
        status.as_u16(),
        status.canonical_reason().unwrap_or("Error")
    );
    progress.line_too_long.set(false);
    progress.linger.set(true);
    let last_word = async {
        io.write_all(answer.as_bytes()).await?;
        io.shutdown().await
    };
    // The lingering has its own bound; this one is for a peer that does not read.
    let _ = tokio::time::timeout(2 * Io::LINGER, last_word).await;
}

/// hyper has answered by itself, without the service: said and counted here.
fn refused_by_hyper(context: &Shared, peer: &Peer, error: &hyper::Error) {
    if !error.is_parse() {
        tracing::debug!(peer = %peer.remote, %error, "connection ended");
        return;
    }
    let text = error.to_string();
    let kind = if !error.is_parse_too_large() {
        Kind::BadRequest
    } else if text.contains("URI") {
        Kind::UriTooLong
    } else {
        Kind::HeadersTooLarge
    };
    (context.refused)(peer, &Error::new(kind, text));
}

/// From the call of the service to the end of the answer's body.
struct Started {
    progress: Rc<Progress>,
    answered: bool,
}

impl Started {
    fn new(progress: Rc<Progress>, has_body: bool) -> Self {
        progress.in_flight.set(progress.in_flight.get() + 1);
        progress.served.set(progress.served.get() + 1);
        progress.linger.set(has_body);
        progress.stage.set(Stage::Busy);
        progress.unwanted.set(false);
        progress.delivering.set(false);
        Started { progress, answered: false }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let progress = &self.progress;
        let left = progress.in_flight.get().saturating_sub(1);
        progress.in_flight.set(left);
        if !self.answered {
            progress.took_back(TAKEN_BACK_WINDOW);
        }
        if left == 0 {
            progress.enter(Stage::Idle);
            // The connection future looks at its deadlines when it is next polled; an HTTP/2 one may not be.
            if progress.multiplexed.get() {
                progress.wake();
            }
        }
    }
}

pin_project_lite::pin_project! {
    /// The body of an answer: counts as in flight until it is dropped, and on HTTP/2 says whether its client keeps it waiting.
    struct CountedBody<B> {
        #[pin]
        inner: B,
        // Of a piece that is larger than MAX_PIECE.
        rest: Option<Bytes>,
        given: usize,
        stall: Option<Rc<Stall>>,
        _started: Started,
    }
}

impl<B: Body<Data = Bytes>> Body for CountedBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.project();
        let Some(stall) = this.stall else { return this.inner.poll_frame(cx) };
        // Being asked means that the client has taken what came before.
        stall.took(std::mem::take(this.given));
        let mut frame = match this.rest.take() {
            Some(rest) => Frame::data(rest),
            None => match this.inner.poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                other => {
                    stall.over();
                    return other;
                }
            },
        };
        if let Some(data) = frame.data_mut() {
            if data.len() > MAX_PIECE {
                *this.rest = Some(data.split_off(MAX_PIECE));
            }
            *this.given = data.len();
            stall.blocked();
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self.inner.size_hint();
        if let Some(rest) = &self.rest {
            let rest = rest.len() as u64;
            let (lower, upper) = (hint.lower() + rest, hint.upper().map(|upper| upper + rest));
            hint.set_lower(lower);
            if let Some(upper) = upper {
                hint.set_upper(upper);
            }
        }
        hint
    }
}
