//! The format of an access log's line, compiled. The names are Nginx's where Nginx has one.

use http::HeaderName;

use super::text::Piece;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogText {
    /// As written.
    pub source: String,
    pub pieces: Vec<Piece<LogVariable>>,
    /// Values are escaped as JSON's: the format begins with `{`.
    pub is_json: bool,
    /// Some of it is known only where the heads of request and answer are kept.
    pub needs_heads: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogVariable {
    RemoteAddr,
    RemotePort,
    RemoteUser,
    TimeLocal,
    TimeIso8601,
    /// Seconds since 1970, with milliseconds.
    Msec,
    /// The request line.
    Request,
    RequestMethod,
    RequestUri,
    /// Decoded and normalized, and rewritten.
    Uri,
    Args,
    IsArgs,
    ServerProtocol,
    ServerName,
    ServerAddr,
    ServerPort,
    Host,
    Scheme,
    Status,
    /// Of the answer's body.
    BodyBytesSent,
    /// Of the request's body.
    RequestBytes,
    RequestTime,
    RequestId,
    UpstreamAddr,
    UpstreamResponseTime,
    Upstream,
    /// The route's path, as written.
    Route,
    Set,
    QueueTime,
    Attempts,
    Cause,
    /// What Nginx knows and there is not here: a format that is taken over loads as it is.
    Nothing,
    /// `$arg_NAME`
    Arg(String),
    /// `$cookie_NAME`
    Cookie(String),
    /// `$http_NAME`
    Header(HeaderName),
    /// `$sent_http_NAME`
    Sent(HeaderName),
}

impl LogVariable {
    /// Of our own making, or nothing.
    pub fn is_number(&self) -> bool {
        matches!(
            self,
            LogVariable::RemotePort
                | LogVariable::ServerPort
                | LogVariable::Msec
                | LogVariable::Status
                | LogVariable::BodyBytesSent
                | LogVariable::RequestBytes
                | LogVariable::RequestTime
                | LogVariable::UpstreamResponseTime
                | LogVariable::QueueTime
                | LogVariable::Attempts
                | LogVariable::Nothing
        )
    }

    pub fn needs_heads(&self) -> bool {
        matches!(
            self,
            LogVariable::RemotePort
                | LogVariable::Uri
                | LogVariable::ServerAddr
                | LogVariable::ServerPort
                | LogVariable::Host
                | LogVariable::Scheme
                | LogVariable::Cookie(_)
                | LogVariable::Header(_)
                | LogVariable::Sent(_)
        )
    }
}

/// Those without a part of their own.
pub const NAMES: [(&str, LogVariable); 37] = [
    ("remote_addr", LogVariable::RemoteAddr),
    ("remote_port", LogVariable::RemotePort),
    ("remote_user", LogVariable::RemoteUser),
    ("time_local", LogVariable::TimeLocal),
    ("time_iso8601", LogVariable::TimeIso8601),
    ("msec", LogVariable::Msec),
    ("request", LogVariable::Request),
    ("request_method", LogVariable::RequestMethod),
    ("request_uri", LogVariable::RequestUri),
    ("uri", LogVariable::Uri),
    ("document_uri", LogVariable::Uri),
    ("args", LogVariable::Args),
    ("query_string", LogVariable::Args),
    ("is_args", LogVariable::IsArgs),
    ("server_protocol", LogVariable::ServerProtocol),
    ("server_name", LogVariable::ServerName),
    ("server_addr", LogVariable::ServerAddr),
    ("server_port", LogVariable::ServerPort),
    ("host", LogVariable::Host),
    ("scheme", LogVariable::Scheme),
    ("status", LogVariable::Status),
    ("body_bytes_sent", LogVariable::BodyBytesSent),
    ("bytes_sent", LogVariable::BodyBytesSent),
    ("request_length", LogVariable::RequestBytes),
    ("request_time", LogVariable::RequestTime),
    ("request_id", LogVariable::RequestId),
    ("upstream_addr", LogVariable::UpstreamAddr),
    ("upstream_response_time", LogVariable::UpstreamResponseTime),
    ("upstream_name", LogVariable::Upstream),
    ("route", LogVariable::Route),
    ("set", LogVariable::Set),
    ("queue_time", LogVariable::QueueTime),
    ("attempts", LogVariable::Attempts),
    ("cause", LogVariable::Cause),
    ("pipe", LogVariable::Nothing),
    ("gzip_ratio", LogVariable::Nothing),
    ("upstream_cache_status", LogVariable::Nothing),
];
