//! Text with variables of a request in it, compiled: `https://$host$request_uri`. The names are Nginx's.

use http::HeaderName;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Text {
    /// As written.
    pub source: String,
    pub pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Literal(String),
    Variable(Variable),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Variable {
    /// The path, decoded and normalized.
    Uri,
    /// The target as the client sent it, with its query.
    RequestUri,
    /// The query without its `?`; `$query_string` is the same.
    Args,
    /// `?` where there is a query.
    IsArgs,
    /// Lower case, without port.
    Host,
    /// "http" or "https", as the client sees it.
    Scheme,
    RemoteAddr,
    RemotePort,
    ServerAddr,
    ServerPort,
    ServerName,
    ServerProtocol,
    RequestMethod,
    RequestId,
    /// `$arg_NAME`
    Arg(String),
    /// `$cookie_NAME`
    Cookie(String),
    /// `$http_NAME`: a request header, `_` for `-`.
    Header(HeaderName),
    /// `$1`, or a named group of the route's expression.
    Capture(String),
}

/// Those without a part of their own, and their names.
pub const NAMES: [(&str, Variable); 16] = [
    ("uri", Variable::Uri),
    ("document_uri", Variable::Uri),
    ("request_uri", Variable::RequestUri),
    ("args", Variable::Args),
    ("query_string", Variable::Args),
    ("is_args", Variable::IsArgs),
    ("host", Variable::Host),
    ("scheme", Variable::Scheme),
    ("remote_addr", Variable::RemoteAddr),
    ("remote_port", Variable::RemotePort),
    ("server_addr", Variable::ServerAddr),
    ("server_port", Variable::ServerPort),
    ("server_name", Variable::ServerName),
    ("server_protocol", Variable::ServerProtocol),
    ("request_method", Variable::RequestMethod),
    ("request_id", Variable::RequestId),
];
