//! A request for PHP: its body is read whole, it is dispatched, perhaps tried once more, and held on to until FPM has finished.

use std::{borrow::Cow, path::Path, rc::Rc, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{Method, Response, StatusCode, header, request::Parts};
use http_body::Body;
use tokio::time::Instant;

use super::{
    accel,
    answer::{AsItComes, Content},
    body::{self, Buffered},
    inflight::Record,
    pieces::Pieces,
    pipe::{self, Outcome, Plan},
    stack::Worker,
    variables::cookie,
};
use crate::{
    error::{Error, Kind, Retry},
    fastcgi::{
        exchange::{Conn, Event, Exchange, Stdin},
        params, record,
        response::{self, Head},
    },
    lifecycle::{Phase, drain::End},
    model::{
        Peer, Route, Settings, Site, clock,
        peer::ClientInfo,
        site::PhpRoot,
        upstream::{Balance, Policy, SetConfig},
    },
    telemetry::{metrics::Shard, php_log::PhpLog},
    upstream::{Dispatcher, Ticket, Want, dispatch::now_ms, health::Health, snapshot::Hold},
};

/// From so many requests of a worker on, what they send to FPM is sent together: after the worker has looked at everything that has come. A peer that
/// sleeps is then woken once, not for each of them (5% of a request's CPU on loopback, `benches/compare`).
const TOGETHER: usize = 8;

/// A body up to this size is sent in one write with the parameters.
const SMALL_BODY: usize = 16 * 1024;

/// Answers up to this size are not counted against `buffer.total`: connections and their streams bound those.
const UNCOUNTED: usize = 16 * 1024;

/// Everything about a request that PHP is to answer.
pub struct Php<'a> {
    pub settings: &'a Settings,
    pub site: &'a Site,
    pub route: &'a Route,
    pub script_name: &'a str,
    pub path_info: &'a str,
    /// The client's, or what a `try_files` item says.
    pub query: &'a str,
    pub parts: &'a Parts,
    pub peer: &'a Peer,
    pub client: &'a ClientInfo,
    pub record: &'a Rc<Record>,
    /// Until when somebody waits for the answer, where that is known.
    pub deadline: Option<Instant>,
}

/// PHP's answer, or why there is none.
pub async fn forward<B>(worker: &Rc<Worker>, php: &Php<'_>, incoming: B) -> Result<Response<Content>, Error>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    if worker.phase.get() == Phase::Starting {
        return Err(Error::new(Kind::Starting, "no upstream is known to be usable yet".to_owned()));
    }
    let Some(upstream) = &php.route.upstream else {
        return Err(Error::new(Kind::NotFound, "a script, but the route names no upstream".to_owned()));
    };
    let limits = body::Limits {
        body: php.route.body_limit,
        memory: php.settings.buffer.memory,
        stall: php.settings.listen.stall_timeout,
        min_rate: php.settings.listen.min_rate,
        dir: php.settings.buffer.dir.clone(),
    };
    let declared = php.parts.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    let began = clock::now();
    let body = body::buffer(incoming, declared, &limits, &worker.buffers).await;
    php.record.step("buffer", began);
    let body = body?;
    php.record.request_bytes.set(body.length().unwrap_or(0));
    php.record.is_read.set(true);
    let site_root = site_root(worker, php.site).await;

    let idempotent = is_idempotent(&php.parts.method);
    let since = clock::now();
    let (mut tried, mut refused): (Vec<u64>, Vec<u64>) = (Vec::new(), Vec::new());
    let mut failed: Option<Error> = None;
    let mut attempts = 0;
    let mut resent = false;
    loop {
        let key = hash_key(worker, upstream, php);
        let want = Want {
            upstream,
            once: !idempotent,
            again: attempts > 0,
            key: key.as_bytes(),
            tried: &tried,
            refused: &refused,
            since,
            deadline: php.deadline,
            lane: php.route.lane.as_deref(),
        };
        let mut waiting =
            Waiting { metrics: &worker.sinks.metrics, record: php.record, upstream, since: clock::now(), ended: None };
        let acquired = worker.dispatcher.acquire(&want).await;
        waiting.ended = Some(acquired.as_ref().map(|ticket| ticket.waited).map_err(|none| none.kind));
        php.record.step("queue", waiting.since);
        drop(waiting);
        let ticket = match acquired {
            Ok(ticket) => ticket,
            // What an attempt met says more than that there was nobody else to try.
            Err(none) => return Err(failed.unwrap_or(none)),
        };
        attempts += 1;
        php.record.dispatched(&ticket);
        let (policy, set) = (ticket.upstream.policy.clone(), ticket.set.clone());
        let (endpoint, leased) = (ticket.endpoint().clone(), ticket.conn.is_some());
        let Failed { error, hold } = match attempt(worker, php, &site_root, &body, ticket, &policy).await {
            Ok(response) => {
                endpoint.answered(now_ms());
                worker.sinks.metrics.attempt(upstream, set.name(), "ok");
                return Ok(response);
            }
            Err(failed) => failed,
        };
        php.record.undispatched();
        worker.sinks.metrics.attempt(upstream, set.name(), error.kind.cause());
        // A kept connection that had ended says nothing about the pod; neither does a slow script.
        let blames = !leased && matches!(error.kind, Kind::ConnectFailed | Kind::ConnectTimeout | Kind::UpstreamClosed);
        if blames {
            let was_usable = endpoint.is_usable(now_ms());
            endpoint.update_health(now_ms(), |health| Health::failed(health, now_ms()));
            if was_usable && !endpoint.is_usable(now_ms()) {
                worker.sinks.metrics.ejection(upstream, set.name());
                let reason = endpoint.reason(now_ms());
                tracing::warn!(upstream = &**upstream, set = &**set.name(), endpoint = %endpoint.address, reason, "endpoint ejected");
            }
        }
        let again = match error.retry {
            Retry::Free => true,
            Retry::IfIdempotent => idempotent && !std::mem::replace(&mut resent, true),
            Retry::Never => false,
        };
        // With every request the same would be said again, and nobody would find anything else.
        if let Some(unsaid) = worker.seldom.may_say((endpoint.id, error.kind)) {
            tracing::warn!(
                id = php.record.id.as_str(), upstream = &**upstream, set = &**set.name(), endpoint = %endpoint.address,
                cause = error.kind.cause(), detail = error.detail, may_retry = again && attempts <= policy.retries, unsaid,
                "an attempt failed"
            );
        }
        if !again || attempts > policy.retries {
            return Err(error);
        }
        if let Some(hold) = hold {
            hold.moved_on();
        }
        // Others first, also after a kept connection that had ended: its pod may be stopping, and an idempotent request is sent only once more.
        tried.push(endpoint.id);
        if matches!(error.kind, Kind::ConnectFailed | Kind::ConnectTimeout) {
            refused.push(endpoint.id);
        }
        failed = Some(error);
    }
}

/// Counts how long a request has waited and why it has waited in vain, also where its client has left.
struct Waiting<'a> {
    metrics: &'a Shard,
    record: &'a Record,
    upstream: &'a Arc<str>,
    since: Instant,
    /// `None`: the client has left.
    ended: Option<Result<Duration, Kind>>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // Who was refused at once has not waited.
        let waited = match self.ended {
            Some(Ok(waited)) => waited,
            _ => Some(clock::now().saturating_duration_since(self.since))
                .filter(|waited| *waited >= Duration::from_millis(1))
                .unwrap_or_default(),
        };
        match self.ended {
            None => self.metrics.expired(self.upstream, Kind::ClientLeft.cause()),
            Some(Err(kind @ (Kind::QueueTimeout | Kind::DeadlinePassed))) => self.metrics.expired(self.upstream, kind.cause()),
            Some(Err(Kind::NoEndpoint)) if !waited.is_zero() => self.metrics.expired(self.upstream, Kind::NoEndpoint.cause()),
            _ => {}
        }
        if !matches!(self.ended, Some(Ok(_))) {
            self.record.not_dispatched(self.upstream, waited);
        }
        if !waited.is_zero() {
            self.metrics.queue_wait(self.upstream, waited);
        }
    }
}

/// RFC 9110, section 9.2.2.
fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE)
}

/// What the consistent hash is taken over; empty unless the upstream balances by it.
fn hash_key(worker: &Worker, upstream: &str, php: &Php<'_>) -> String {
    let snapshot = worker.dispatcher.store.load();
    match snapshot.upstreams.get(upstream).map(|u| &u.policy.balance) {
        Some(Balance::HashAddress) => php.client.address.to_string(),
        Some(Balance::HashCookie(name)) => cookie(&php.parts.headers, name).unwrap_or_default(),
        _ => String::new(),
    }
}

async fn site_root<'a>(worker: &Worker, site: &'a Site) -> Cow<'a, str> {
    match php_root(site) {
        Ok(root) => root,
        Err(root) => worker.real_path(root).await.into(),
    }
}

/// The site's public folder as FPM sees it; `Err`: this one with its links resolved.
pub(super) fn php_root(site: &Site) -> Result<Cow<'_, str>, &Path> {
    match (&site.php_root, &site.root) {
        (PhpRoot::Path(path), _) => Ok(path.into()),
        (PhpRoot::SameAsRoot, Some(root)) => Ok(root.to_string_lossy()),
        (PhpRoot::RealPath, Some(root)) => Err(root),
        (_, None) => Ok("".into()),
    }
}

/// The release's own folder as its pods see it, else the site's.
pub(super) fn document_root<'a>(set: &'a SetConfig, site_root: &'a str) -> &'a str {
    let of_set = set.php_root.as_deref().or_else(|| set.root.as_ref().and_then(|p| p.to_str()));
    of_set.unwrap_or(site_root).trim_end_matches('/')
}

/// One exchange with one endpoint. Dropped before its end (the client has left), it goes on in the reaper.
struct Guard<'a> {
    dispatcher: &'a Dispatcher,
    held: Option<(Exchange, Ticket)>,
    /// For the reaper: at most so long in all.
    limit: Duration,
    record: &'a Record,
}

impl Guard<'_> {
    /// FPM goes on with what it was given: read to the end elsewhere.
    fn reap(&mut self, end: End) {
        if let Some((exchange, ticket)) = self.held.take() {
            reap(self.dispatcher, exchange, ticket, self.record, self.limit, end);
        }
    }

    /// While FPM may still work on it, its worker is busy and the slot is taken. Else the connection is closed before the slot is given back, and the set is held
    /// until it is known whether the request goes on elsewhere.
    fn fail(&mut self, error: Error) -> Failed {
        if self.held.as_ref().is_some_and(|(exchange, _)| exchange.may_go_on()) {
            self.reap(End::Failed);
        }
        let hold = self.held.take().map(|(exchange, ticket)| {
            drop(exchange);
            ticket.upstream
        });
        Failed { error, hold }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.reap(End::ClientLeft);
    }
}

fn no_exchange() -> Error {
    Error::new(Kind::Internal, "no exchange".to_owned())
}

fn reap(dispatcher: &Dispatcher, exchange: Exchange, ticket: Ticket, record: &Record, limit: Duration, end: End) {
    ticket.upstream.end(end);
    let bounded = ticket.endpoint().capacity().is_some();
    // Under a `limit` it counts as long as FPM works on it, not as long as its client waits.
    dispatcher.reaper.reap(exchange, (ticket, record.held.take()), limit, bounded);
}

/// What a failed attempt leaves.
struct Failed {
    error: Error,
    /// Its hold on the set, unless FPM still works on it.
    hold: Option<Hold>,
}

impl Failed {
    /// The slot is given back; the set is held until it is known whether the request goes on elsewhere.
    fn with(ticket: Ticket, error: Error) -> Self {
        Failed { error, hold: Some(ticket.upstream) }
    }
}

async fn attempt(
    worker: &Rc<Worker>,
    php: &Php<'_>,
    site_root: &str,
    body: &Buffered,
    mut ticket: Ticket,
    policy: &Policy,
) -> Result<Response<Content>, Failed> {
    // Until something has been sent a client that leaves is no failure, and its worker has spent no time.
    ticket.is_begun(false);
    if ticket.conn.is_some() && worker.sinks.registry.len() >= TOGETHER {
        tokio::task::yield_now().await;
        // What was quiet may have ended meanwhile.
        let idempotent = is_idempotent(&php.parts.method);
        ticket.conn = ticket.conn.take().filter(|conn| if idempotent { conn.looks_quiet() } else { conn.is_quiet() });
    }
    let connected = match ticket.conn.take() {
        Some(conn) => Ok(conn),
        None => {
            let began = clock::now();
            let connected = Conn::connect(&ticket.endpoint().address, policy.connect_timeout).await;
            php.record.step("connect", began);
            connected
        }
    };
    ticket.is_begun(true);
    let mut conn = match connected {
        Ok(conn) => conn,
        Err(error) => return Err(Failed::with(ticket, error)),
    };
    let (stdin, stdin_ended) = match encode(worker, &mut conn.output, php, site_root, body, &ticket) {
        Ok(stdin) => stdin,
        Err(error) => return Err(Failed::with(ticket, error)),
    };
    let read_timeout = php.route.read_timeout.unwrap_or(policy.read_timeout);
    let mut log = PhpLog::new(php.record.id.as_str());
    let began = clock::now();
    let exchange = Exchange::start(conn, stdin, stdin_ended);
    let mut guard =
        Guard { dispatcher: &worker.dispatcher, held: Some((exchange, ticket)), limit: read_timeout, record: php.record };

    let (head, rest) = {
        let reading = async {
            let Some((exchange, _)) = &mut guard.held else { return Err(no_exchange()) };
            let head = read_head(exchange, read_timeout, &mut log).await;
            if let Some(trace) = &php.record.trace {
                let sent = exchange.sent_at().unwrap_or_else(clock::now);
                trace.step("send", began, sent);
                trace.step("first byte", sent, clock::now());
            }
            head
        };
        match reading.await {
            Ok(head) => head,
            Err(error) => return Err(guard.fail(error)),
        }
    };
    let Some((mut exchange, ticket)) = guard.held.take() else {
        return Err(Failed { error: no_exchange(), hold: None });
    };
    let bodiless = php.parts.method == Method::HEAD || matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);

    let mut pieces = Pieces::of_answer();
    pieces.push_first(rest);
    match take_ready(&mut exchange, &mut pieces, php.settings.buffer.memory, &mut log).await {
        Some(Err(error)) => {
            guard.held = Some((exchange, ticket));
            Err(guard.fail(error))
        }
        Some(Ok(())) => {
            let bytes = pieces.bytes();
            worker.dispatcher.finish(ticket, exchange.into_conn());
            php.record.undispatched();
            // Applications tell the length of the file that is to be sent instead.
            if bodiless || accel::is_in(&head.headers) {
                return Ok(respond(head, Content::Empty, bodiless));
            }
            let mut body = pieces.join();
            match head.content_length {
                Some(told) if told > bytes as u64 => {
                    let error = Error::new(Kind::UpstreamHeaders, format!("Content-Length {told}, but {bytes} bytes of body"));
                    return Err(Failed { error, hold: None });
                }
                // A blank line behind `?>`: what was told is whole.
                Some(told) if told < bytes as u64 => {
                    tracing::warn!(id = php.record.id.as_str(), told, bytes, "{}", pipe::TOO_LONG);
                    body.truncate(usize::try_from(told).unwrap_or(bytes));
                }
                _ => {}
            }
            if body.len() > UNCOUNTED {
                // It has been run, so it is not refused for want of memory alone.
                body = match worker.buffers.memory.counted(body) {
                    Ok(counted) => counted,
                    Err(body) => {
                        let dir = php.settings.buffer.dir.clone();
                        let spilt = Box::pin(pipe::spilt(body, &worker.buffers, dir)).await.map_err(|error| {
                            let detail = format!("an answer of {bytes} bytes has no place: buffer.total is used up; {error}");
                            Failed { error: Error::new(Kind::BufferFull, detail), hold: None }
                        })?;
                        return Ok(respond(head, Content::Pipe(spilt), bodiless));
                    }
                };
            }
            Ok(respond(head, Content::Whole(Some(body)), bodiless))
        }
        None => {
            let plan = Plan {
                unbuffered: head.unbuffered,
                memory: php.settings.buffer.memory,
                dir: php.settings.buffer.dir.clone(),
                read_timeout,
            };
            let (pump, pipe) = pipe::pipe(pieces, head.content_length, &worker.buffers);
            let (worker, record) = (worker.clone(), php.record.clone());
            tokio::task::spawn_local(async move {
                let unbuffered = plan.unbuffered;
                match pump.run(exchange, plan, |bytes| log.push(&bytes)).await {
                    Outcome::Whole(exchange) => worker.dispatcher.finish(ticket, exchange.into_conn()),
                    Outcome::Failed(exchange, error) => {
                        tracing::warn!(
                            id = record.id.as_str(), endpoint = %ticket.endpoint().address, cause = error.kind.cause(),
                            detail = error.detail, "the answer ended early"
                        );
                        record.cause.set(Some(error.kind));
                        // Its worker works on, and its slot is taken as long.
                        if exchange.may_go_on() {
                            reap(&worker.dispatcher, exchange, ticket, &record, read_timeout, End::Failed);
                        }
                    }
                    // Only a failed write ends an endless script.
                    Outcome::ClientLeft(exchange) if unbuffered => {
                        ticket.upstream.end(End::ClientLeft);
                        drop(exchange);
                    }
                    Outcome::ClientLeft(exchange) => {
                        reap(&worker.dispatcher, exchange, ticket, &record, read_timeout, End::ClientLeft)
                    }
                }
                record.undispatched();
            });
            let content = if bodiless { Content::Empty } else { Content::Pipe(pipe) };
            let unbuffered = head.unbuffered;
            let mut response = respond(head, content, bodiless);
            if unbuffered {
                response.extensions_mut().insert(AsItComes);
            }
            Ok(response)
        }
    }
}

/// Writes the request's records; a small body goes with them.
fn encode(
    worker: &Worker,
    out: &mut BytesMut,
    php: &Php<'_>,
    site_root: &str,
    body: &Buffered,
    ticket: &Ticket,
) -> Result<(Stdin, bool), Error> {
    let document_root = document_root(&ticket.set.config, site_root);
    let keep = ticket.upstream.policy.lease.is_some() && ticket.endpoint().capacity().is_some();
    out.clear();
    record::put_begin_request(out, keep);
    params::write(
        out,
        &params::Input {
            method: &php.parts.method,
            request_uri: php.parts.uri.path_and_query().map_or("/", |p| p.as_str()),
            query: php.query,
            version: php.parts.version,
            headers: &php.parts.headers,
            host: &php.client.host,
            content_length: body.length(),
            remote_addr: php.client.address,
            remote_port: php.client.port,
            server_addr: php.peer.local,
            server_port: php.client.server_port,
            https: php.client.https,
            remote_user: php.record.user.borrow().as_deref().unwrap_or_default(),
            request_id: php.record.id.as_str(),
            extra: &php.route.params,
            script: params::Script { script_name: php.script_name, path_info: php.path_info, document_root },
        },
    )
    .map_err(Error::from)?;
    Ok(match body {
        Buffered::None => {
            record::put_stdin_end(out);
            (Stdin::Done, true)
        }
        Buffered::Memory(pieces, _) if pieces.bytes() <= SMALL_BODY => {
            pieces.iter().for_each(|piece| record::put_stdin(out, piece));
            record::put_stdin_end(out);
            (Stdin::Done, true)
        }
        large => (large.stdin(&worker.buffers), false),
    })
}

/// Reads to the end of PHP's header block; gives what of the body came with it.
async fn read_head(exchange: &mut Exchange, read_timeout: Duration, log: &mut PhpLog) -> Result<(Head, Bytes), Error> {
    let limits = response::Limits::default();
    let mut partial = BytesMut::new();
    let mut lines = 0;
    loop {
        let event = clock::timeout(read_timeout, exchange.event()).await.ok_or_else(|| {
            let what = if exchange.is_sent() { "no answer" } else { "the request body was not taken" };
            Error::new(Kind::ReadTimeout, format!("{what} in {read_timeout:?}"))
        })??;
        let bytes = match event {
            Event::Stdout(bytes) => bytes,
            Event::Stderr(bytes) => {
                log.push(&bytes);
                continue;
            }
            Event::End => {
                return Err(Error::new(Kind::UpstreamHeaders, format!("END_REQUEST after {} bytes of headers", partial.len())));
            }
        };
        let mut whole = bytes;
        let ended = memchr::memchr_iter(b'\n', &whole).count();
        lines += ended;
        if !partial.is_empty() {
            partial.extend_from_slice(&whole);
            // Looked through again only where a line has ended: a head may come byte by byte.
            if ended == 0 && partial.len() <= limits.max_bytes {
                continue;
            }
            whole = std::mem::take(&mut partial).freeze();
        }
        match response::parse_head(&whole, &limits) {
            Err(error) => return Err(Error::new(Kind::UpstreamHeaders, error.to_string())),
            // And so as many times as it may have lines at most.
            Ok(None) if lines > limits.max_headers => {
                return Err(Error::new(Kind::UpstreamHeaders, format!("more than {} lines of headers", limits.max_headers)));
            }
            // Without a copy: it is its only owner.
            Ok(None) => partial = whole.into(),
            Ok(Some((head, used))) => return Ok((head, whole.slice(used..))),
        }
    }
}

/// What of the answer is there already, up to `memory`. `None`: more is to come.
async fn take_ready(exchange: &mut Exchange, pieces: &mut Pieces, memory: usize, log: &mut PhpLog) -> Option<Result<(), Error>> {
    std::future::poll_fn(|cx| {
        while pieces.bytes() <= memory {
            match exchange.poll_event(cx) {
                std::task::Poll::Ready(Ok(Event::Stdout(data))) => pieces.push_first(data),
                std::task::Poll::Ready(Ok(Event::Stderr(data))) => log.push(&data),
                std::task::Poll::Ready(Ok(Event::End)) => return std::task::Poll::Ready(Some(Ok(()))),
                std::task::Poll::Ready(Err(error)) => return std::task::Poll::Ready(Some(Err(error))),
                std::task::Poll::Pending => break,
            }
        }
        std::task::Poll::Ready(None)
    })
    .await
}

fn respond(head: Head, content: Content, bodiless: bool) -> Response<Content> {
    let mut response = Response::new(content);
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    if bodiless && head.status == StatusCode::NO_CONTENT {
        // RFC 9110, section 8.6.
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    response
}
