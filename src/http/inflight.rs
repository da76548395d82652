//! What is known of each request while it is in flight: for the access log and the metrics at its end, and for receipts that name what is left.

use std::{
    cell::{Cell, RefCell},
    io,
    net::IpAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderValue, Method, Uri, Version};
use slab::Slab;
use tokio::time::Instant;

use super::layers::{headers::Filled, limits::Held, request_id::RequestId};
use crate::{
    error::{Error, Kind},
    lifecycle::{
        Phase, PhaseCell,
        drain::{End, Tally},
    },
    model::{Peer, Route, clock, rules::Cors},
    telemetry::{
        access_log::{Entry, Heads, Writer},
        metrics::Shard,
        trace::{Trace, Traces, Value},
    },
    upstream::{Endpoint, Ticket, store::InFlight},
};

/// One request. On its worker's thread only.
pub struct Record {
    pub id: RequestId,
    pub method: Method,
    pub uri: Uri,
    pub version: Version,
    pub started: Instant,
    pub client: IpAddr,
    pub user_agent: Option<HeaderValue>,
    pub referer: Option<HeaderValue>,
    pub access_log: Cell<bool>,
    pub status: Cell<u16>,
    pub request_bytes: Cell<u64>,
    pub cause: Cell<Option<Kind>>,
    /// The Activation it holds; 0: none.
    activation: Cell<u64>,
    pub way: RefCell<Way>,
    /// What its route changes of the answer's headers.
    pub edits: RefCell<Option<Filled>>,
    /// Who it is, by `basic_auth`.
    pub user: RefCell<Option<String>>,
    /// Its body has been read whole: the next request begins behind it.
    pub is_read: Cell<bool>,
    /// Where the access log's format asks for more than is here.
    pub heads: RefCell<Option<Box<Heads>>>,
    /// Bytes a second at most, by X-Accel-Limit-Rate.
    pub pace: Cell<Option<u64>>,
    /// What its route says to pages of other origins.
    pub cors: RefCell<Option<Arc<Cors>>>,
    /// Its place under a `limit`.
    pub held: Cell<Option<Held>>,
    /// Where there is a collector.
    pub trace: Option<Trace>,
    /// When its head was whole, or an error became the answer.
    answered: Cell<Option<Instant>>,
}

/// Where it went.
#[derive(Default)]
pub struct Way {
    pub site: Option<Arc<str>>,
    pub route: Option<Arc<Route>>,
    pub upstream: Option<Arc<str>>,
    pub set: Option<Arc<str>>,
    pub endpoint: Option<Arc<Endpoint>>,
    pub attempts: u32,
    pub queued: Option<Duration>,
    pub dispatched: Option<Instant>,
}

impl Record {
    pub fn new(id: RequestId, parts: &http::request::Parts, client: IpAddr, trace: Option<Trace>) -> Rc<Self> {
        Rc::new(Record {
            id,
            method: parts.method.clone(),
            uri: parts.uri.clone(),
            version: parts.version,
            started: clock::now(),
            client,
            user_agent: parts.headers.get(http::header::USER_AGENT).cloned(),
            referer: parts.headers.get(http::header::REFERER).cloned(),
            access_log: Cell::new(true),
            status: Cell::new(0),
            request_bytes: Cell::new(0),
            cause: Cell::new(None),
            activation: Cell::new(0),
            way: RefCell::default(),
            edits: RefCell::default(),
            user: RefCell::default(),
            is_read: Cell::new(false),
            heads: RefCell::default(),
            pace: Cell::default(),
            cors: RefCell::default(),
            held: Cell::default(),
            trace,
            answered: Cell::default(),
        })
    }

    /// A step of it has ended now.
    pub fn step(&self, name: &'static str, began: Instant) {
        if let Some(trace) = &self.trace {
            trace.step(name, began, clock::now());
        }
    }

    /// What the client is told is decided; what follows is the body.
    pub fn answered(&self, status: u16) {
        self.status.set(status);
        self.answered.set(Some(clock::now()));
    }

    pub fn dispatched(&self, ticket: &Ticket) {
        self.activation.set(ticket.upstream.activation.serial);
        let way = &mut *self.way.borrow_mut();
        way.upstream = Some(ticket.upstream.name.clone());
        way.set = Some(ticket.set.name().clone());
        way.endpoint = Some(ticket.endpoint().clone());
        way.attempts += 1;
        way.queued = Some(ticket.waited);
        way.dispatched = Some(clock::now());
    }

    /// It has got no worker after so long.
    pub fn not_dispatched(&self, upstream: &Arc<str>, waited: Duration) {
        let way = &mut *self.way.borrow_mut();
        way.upstream = Some(upstream.clone());
        way.queued = Some(waited);
    }

    /// Between two attempts it holds nothing.
    pub fn undispatched(&self) {
        self.activation.set(0);
    }

    fn in_flight(&self) -> InFlight {
        InFlight {
            id: self.id.as_str().to_owned(),
            method: self.method.as_str().to_owned(),
            path: plain(self.uri.path()),
            age: self.started.elapsed(),
        }
    }
}

/// A path as it can be shown to a person: what is not printable ASCII, of which hyper lets some through, could look like something else.
fn plain(path: &str) -> String {
    let mut shown = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'!'..=b'~' => shown.push(char::from(byte)),
            _ => shown.push_str(&format!("%{byte:02X}")),
        }
    }
    shown
}

/// So much of a text goes into a trace: many wait for a collector that hangs.
const TRACED: usize = 1024;

fn short(text: &str) -> &str {
    &text[..text.floor_char_boundary(TRACED)]
}

/// The requests of one worker.
#[derive(Default)]
pub struct Registry(RefCell<Slab<Rc<Record>>>);

impl Registry {
    /// Of one Activation, or all.
    pub fn list(&self, activation: Option<u64>) -> Vec<InFlight> {
        let records = self.0.borrow();
        records.iter().filter(|(_, r)| activation.is_none_or(|a| a == r.activation.get())).map(|(_, r)| r.in_flight()).collect()
    }

    pub fn len(&self) -> usize {
        self.0.borrow().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is in flight now is being cut: its log line says so.
    pub fn mark_cut(&self) {
        for (_, record) in self.0.borrow().iter() {
            record.cause.set(Some(Kind::Cut));
        }
    }
}

/// What a request's end is told to.
pub struct Sinks {
    pub registry: Registry,
    pub access: Writer,
    pub metrics: Arc<Shard>,
    pub phase: Arc<PhaseCell>,
    /// Told of each end from Draining on.
    pub drained: Arc<Tally>,
    /// Where there is a collector.
    pub traces: Option<Traces>,
}

impl Sinks {
    /// What hyper, or a deadline, refused before there was a request: logged and counted as one.
    pub fn refused(&self, peer: &Peer, error: &Error) {
        let (id, status, cause) = (RequestId::random(), error.kind.status().as_u16(), error.kind.cause());
        tracing::debug!(id = id.as_str(), peer = %peer.remote, cause, detail = error.detail, "refused before it was a request");
        self.metrics.error(cause);
        self.metrics.request("", status, "", "", 0.0);
        self.access.log(&Entry {
            time: SystemTime::now(),
            id: id.as_str(),
            site: "",
            route: "",
            remote_addr: peer.remote.ip().to_canonical(),
            remote_user: "",
            method: "",
            path: "",
            query: None,
            version: Version::HTTP_11,
            status,
            bytes_sent: 0,
            request_bytes: 0,
            duration: Duration::ZERO,
            upstream: "",
            set: "",
            endpoint: None,
            upstream_duration: None,
            queue_duration: None,
            attempts: 0,
            cause,
            user_agent: b"",
            referer: b"",
            heads: None,
        });
    }
}

/// Held from the head of a request to the end of its answer's body. Its drop writes the access log.
pub struct Finish {
    record: Rc<Record>,
    sinks: Rc<Sinks>,
    key: usize,
    bytes: u64,
    whole: bool,
}

impl Finish {
    pub fn new(record: Rc<Record>, sinks: Rc<Sinks>) -> Self {
        let key = sinks.registry.0.borrow_mut().insert(record.clone());
        Finish { record, sinks, key, bytes: 0, whole: false }
    }

    pub fn record(&self) -> &Rc<Record> {
        &self.record
    }

    pub fn sent(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    pub fn whole(&mut self) {
        self.whole = true;
    }

    pub fn broken(&mut self, error: &io::Error) {
        if self.record.cause.get().is_none() {
            self.record.cause.set(Some(Kind::UpstreamClosed));
        }
        tracing::warn!(id = self.record.id.as_str(), path = self.record.uri.path(), %error, "the answer was cut short");
    }

    /// An error became the answer.
    pub fn failed(&self, error: &Error) {
        self.record.cause.set(Some(error.kind));
    }
}

/// As the semantic conventions want it: a client may invent methods without end.
fn known_method(method: &Method) -> &'static str {
    const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"];
    KNOWN.into_iter().find(|known| *known == method.as_str()).unwrap_or("_OTHER")
}

impl Finish {
    fn trace(&self, traces: &Traces, status: u16, way: &Way, now: Instant) {
        let record = &self.record;
        let Some(trace) = record.trace.as_ref().filter(|trace| trace.place.is_sampled) else { return };
        if let Some(answered) = record.answered.get() {
            trace.step("body", answered, now);
        }
        let route = way.route.as_ref().map_or("", |route| &*route.path);
        // By the semantic conventions of HTTP: never a path as it came, of which there are too many.
        let method = known_method(&record.method);
        let name = match (method, route) {
            ("_OTHER", _) => "HTTP".to_owned(),
            (method, "") => method.to_owned(),
            (method, route) => format!("{method} {}", short(route)),
        };
        let mut attributes = vec![
            ("http.response.status_code", Value::Number(status.into())),
            ("http.request.body.size", Value::Number(record.request_bytes.get() as i64)),
            ("http.response.body.size", Value::Number(self.bytes as i64)),
            ("slackwater.attempts", Value::Number(way.attempts.into())),
        ];
        let endpoint = way.endpoint.as_ref().map(|endpoint| endpoint.address.to_string());
        let texts = [
            ("http.request.method", method),
            ("url.path", record.uri.path()),
            ("http.route", route),
            ("client.address", &record.client.to_string()),
            (
                "user_agent.original",
                &record
                    .user_agent
                    .as_ref()
                    .map_or_else(String::new, |agent| String::from_utf8_lossy(agent.as_bytes()).into_owned()),
            ),
            ("error.type", record.cause.get().map_or("", Kind::cause)),
            ("slackwater.request_id", record.id.as_str()),
            ("slackwater.site", way.site.as_deref().unwrap_or_default()),
            ("slackwater.upstream", way.upstream.as_deref().unwrap_or_default()),
            ("slackwater.set", way.set.as_deref().unwrap_or_default()),
            ("slackwater.endpoint", endpoint.as_deref().unwrap_or_default()),
        ];
        attributes.extend(
            texts.into_iter().filter(|(_, text)| !text.is_empty()).map(|(name, text)| (name, Value::Text(short(text).to_owned()))),
        );
        if let Some(finished) = trace.finished(record.started, now, attributes, name, status >= 500) {
            traces.send(finished);
        }
    }
}

impl Drop for Finish {
    fn drop(&mut self) {
        let record = &self.record;
        record.held.take();
        self.sinks.registry.0.borrow_mut().try_remove(self.key);
        if !self.whole && record.cause.get().is_none() {
            record.cause.set(Some(Kind::ClientLeft));
        }
        let cause = record.cause.get();
        let attempts = record.way.borrow().attempts;
        if cause != Some(Kind::Cut) && self.sinks.phase.get() >= Phase::Draining {
            self.sinks.drained.ended(match cause {
                _ if self.whole => End::Completed,
                Some(Kind::ClientLeft) => End::ClientLeft,
                _ => End::Failed,
            });
            if self.whole && attempts > 1 {
                self.sinks.drained.retried();
            }
        }
        if let Some(kind) = cause {
            self.sinks.metrics.error(kind.cause());
            if kind.is_shed() {
                self.sinks.metrics.shed(kind.cause());
            }
        }
        // No head was sent: the client left before, as Nginx logs it, or it was cut.
        let unsent = if cause == Some(Kind::Cut) { Kind::Cut } else { Kind::ClientLeft };
        let status = if record.status.get() == 0 { unsent.status().as_u16() } else { record.status.get() };
        let way = record.way.borrow();
        let [site, upstream, set] = [&way.site, &way.upstream, &way.set].map(|name| name.as_deref().unwrap_or_default());
        let now = clock::now();
        let duration = now.saturating_duration_since(record.started);
        self.sinks.metrics.request(site, status, upstream, set, duration.as_secs_f64());
        if let Some(traces) = &self.sinks.traces {
            self.trace(traces, status, &way, now);
        }
        if record.access_log.get() && self.sinks.access.is_on() {
            self.sinks.access.log(&Entry {
                // That of its beginning.
                time: SystemTime::now().checked_sub(duration).unwrap_or(SystemTime::UNIX_EPOCH),
                id: record.id.as_str(),
                site,
                route: way.route.as_ref().map_or("", |route| &route.path),
                remote_addr: record.client,
                remote_user: record.user.borrow().as_deref().unwrap_or_default(),
                method: record.method.as_str(),
                path: record.uri.path(),
                query: record.uri.query(),
                version: record.version,
                status,
                bytes_sent: self.bytes,
                request_bytes: record.request_bytes.get(),
                duration,
                upstream,
                set,
                endpoint: way.endpoint.as_ref().map(|e| &e.address),
                upstream_duration: way.dispatched.map(|at| now.saturating_duration_since(at)),
                queue_duration: way.queued,
                attempts: way.attempts,
                cause: cause.map_or("", Kind::cause),
                user_agent: record.user_agent.as_ref().map_or(b"", HeaderValue::as_bytes),
                referer: record.referer.as_ref().map_or(b"", HeaderValue::as_bytes),
                heads: record.heads.borrow().as_deref(),
            });
        }
    }
}
