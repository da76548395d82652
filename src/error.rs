//! What can go wrong with a request: whose fault it was, whether it may be tried again, and the one match that
//! turns it into an HTTP answer.

use std::{fmt, time::Duration};

use http::{HeaderValue, StatusCode, header::RETRY_AFTER};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Client,
    Upstream,
    Us,
}

/// Why a request got no answer of PHP's. `Kind::cause` is the label of `slackwater_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    BadRequest,
    BadPath,
    UriTooLong,
    HeadersTooLarge,
    BodyTooLarge,
    BodyStalled,
    BodyBroken,
    HeadTimeout,
    NoSite,
    NotFound,
    Forbidden,
    /// `basic_auth`.
    Unauthorized,
    MethodNotAllowed,
    ParamTooLong,
    /// `maintenance`.
    Maintenance,
    /// No PROXY header, or from one who is not trusted.
    ProxyHeader,
    /// TLS did not come about.
    Handshake,
    /// `limit`, by rate.
    TooOften,
    /// `limit`, by number at once.
    TooManyAtOnce,
    /// The client left before there was an answer.
    ClientLeft,
    /// On HTTP/2: it takes its requests back again and again, and its connection is closed (CVE-2023-44487).
    TakenBack,
    Starting,
    NoUpstream,
    NoEndpoint,
    QueueFull,
    QueueTimeout,
    /// Its turn would come after its deadline: told at once.
    QueueTooLong,
    /// That of a trusted X-Request-Timeout.
    DeadlinePassed,
    BufferFull,
    DiskFull,
    /// This machine has no descriptor, port or memory for another connection: no pod is to blame.
    LocalLimit,
    ConnectFailed,
    ConnectTimeout,
    /// EOF, reset or a malformed answer before PHP's headers.
    UpstreamClosed,
    UpstreamProtocol,
    UpstreamOverloaded,
    UpstreamHeaders,
    ReadTimeout,
    /// Cut at the end of the grace period.
    Cut,
    Internal,
}

impl Kind {
    pub const ALL: [Kind; 40] = [
        Kind::BadRequest,
        Kind::BadPath,
        Kind::UriTooLong,
        Kind::HeadersTooLarge,
        Kind::BodyTooLarge,
        Kind::BodyStalled,
        Kind::BodyBroken,
        Kind::HeadTimeout,
        Kind::NoSite,
        Kind::NotFound,
        Kind::Forbidden,
        Kind::Unauthorized,
        Kind::MethodNotAllowed,
        Kind::ParamTooLong,
        Kind::Maintenance,
        Kind::ProxyHeader,
        Kind::Handshake,
        Kind::TooOften,
        Kind::TooManyAtOnce,
        Kind::ClientLeft,
        Kind::TakenBack,
        Kind::Starting,
        Kind::NoUpstream,
        Kind::NoEndpoint,
        Kind::QueueFull,
        Kind::QueueTimeout,
        Kind::QueueTooLong,
        Kind::DeadlinePassed,
        Kind::BufferFull,
        Kind::DiskFull,
        Kind::LocalLimit,
        Kind::ConnectFailed,
        Kind::ConnectTimeout,
        Kind::UpstreamClosed,
        Kind::UpstreamProtocol,
        Kind::UpstreamOverloaded,
        Kind::UpstreamHeaders,
        Kind::ReadTimeout,
        Kind::Cut,
        Kind::Internal,
    ];

    /// Status, cause and fault: the one place where an error becomes an answer.
    fn answer(self) -> (u16, &'static str, Fault) {
        use Fault::*;
        match self {
            Kind::BadRequest => (400, "bad_request", Client),
            Kind::BadPath => (400, "bad_path", Client),
            Kind::UriTooLong => (414, "uri_too_long", Client),
            Kind::HeadersTooLarge => (431, "headers_too_large", Client),
            Kind::BodyTooLarge => (413, "body_too_large", Client),
            Kind::BodyStalled => (408, "body_stalled", Client),
            Kind::BodyBroken => (400, "body_broken", Client),
            Kind::HeadTimeout => (408, "head_timeout", Client),
            Kind::NoSite => (421, "no_site", Client),
            Kind::NotFound => (404, "not_found", Client),
            Kind::Forbidden => (403, "forbidden", Client),
            Kind::Unauthorized => (401, "unauthorized", Client),
            Kind::MethodNotAllowed => (405, "method_not_allowed", Client),
            Kind::ParamTooLong => (431, "param_too_long", Client),
            Kind::Maintenance => (503, "maintenance", Us),
            Kind::ProxyHeader => (400, "proxy_header", Client),
            Kind::Handshake => (400, "handshake", Client),
            Kind::TooOften => (429, "too_often", Client),
            Kind::TooManyAtOnce => (429, "too_many_at_once", Client),
            Kind::ClientLeft => (499, "client_left", Client),
            Kind::TakenBack => (499, "taken_back", Client),
            Kind::Starting => (503, "starting", Us),
            Kind::NoUpstream => (503, "no_upstream", Us),
            Kind::NoEndpoint => (503, "no_endpoint", Upstream),
            Kind::QueueFull => (503, "queue_full", Upstream),
            Kind::QueueTimeout => (503, "queue_timeout", Upstream),
            Kind::QueueTooLong => (503, "queue_too_long", Upstream),
            Kind::DeadlinePassed => (503, "deadline_passed", Upstream),
            Kind::BufferFull => (503, "buffer_full", Us),
            Kind::DiskFull => (503, "disk_full", Us),
            Kind::LocalLimit => (503, "local_limit", Us),
            Kind::ConnectFailed => (502, "connect_failed", Upstream),
            Kind::ConnectTimeout => (504, "connect_timeout", Upstream),
            Kind::UpstreamClosed => (502, "upstream_closed", Upstream),
            Kind::UpstreamProtocol => (502, "upstream_protocol", Upstream),
            Kind::UpstreamOverloaded => (503, "upstream_overloaded", Upstream),
            Kind::UpstreamHeaders => (502, "upstream_headers", Upstream),
            Kind::ReadTimeout => (504, "read_timeout", Upstream),
            Kind::Cut => (503, "cut", Us),
            Kind::Internal => (500, "internal", Us),
        }
    }

    /// The `cause` label of `slackwater_errors_total` and of the access log.
    pub fn cause(self) -> &'static str {
        self.answer().1
    }

    /// Refused to protect the rest, before anything was spent on it: the `reason` of `slackwater_shed_total` is the cause.
    pub fn is_shed(self) -> bool {
        matches!(self, Kind::QueueFull | Kind::QueueTooLong | Kind::BufferFull | Kind::DiskFull)
    }

    pub fn fault(self) -> Fault {
        self.answer().2
    }

    /// 499 stands for a client that has left, as in Nginx's logs; it is never sent.
    pub fn status(self) -> StatusCode {
        StatusCode::from_u16(self.answer().0).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

/// Whether the request may be sent to an endpoint once more (FPM.md, "a retry is free only if").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    Never,
    /// connect() failed, or not one byte was written: nothing can have run.
    Free,
    /// Sent, but not a byte came back: only an idempotent request, and only once.
    IfIdempotent,
}

/// One failed request or attempt.
#[derive(Clone, Debug)]
pub struct Error {
    pub kind: Kind,
    pub retry: Retry,
    /// For the log; never sent to a client.
    pub detail: String,
    /// On a 503 or 429: seconds after which it may be worth while to come again; 0: nobody knows.
    retry_after: u64,
}

/// A client that was told to stay away for longer would not come back for a spike that is long over.
const RETRY_AFTER_AT_MOST: u64 = 30;

impl Error {
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Error { kind, retry: Retry::Never, detail: detail.into(), retry_after: 1 }
    }

    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// It is known when there is room again: whole seconds, from 1 to 30.
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = (wait.as_secs() + 1).min(RETRY_AFTER_AT_MOST);
        self
    }

    /// The operator's own word for when to come again, where there is one.
    pub fn come_again(mut self, after: Option<Duration>) -> Self {
        self.retry_after = after.map_or(0, |after| after.as_secs());
        self
    }

    /// The answer that stands for this error, with a short plain body.
    pub fn response<B: From<String>>(&self) -> http::Response<B> {
        let status = self.kind.status();
        let text = format!("{} {}\n", status.as_u16(), status.canonical_reason().unwrap_or("Error"));
        let mut response = http::Response::new(B::from(text));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        self.say_when(headers);
        response
    }

    /// Retry-After, on every 503 and 429 for which there is one.
    pub fn say_when(&self, headers: &mut http::HeaderMap) {
        if self.retry_after > 0 && matches!(self.kind.status(), StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            headers.insert(RETRY_AFTER, HeaderValue::from(self.retry_after));
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.cause(), self.detail)
    }
}

impl std::error::Error for Error {}
