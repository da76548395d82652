//! Text with variables of a request in it, compiled: `https://$host$request_uri`. The names are Nginx's.

use http::HeaderName;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Text {
    /// As written.
    pub source: String,
    pub pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece<V = Variable> {
    Literal(String),
    Variable(V),
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

/// A text as its writer sees it: plain parts, and the names in `$name` and `${name}`. A name that begins with a digit is that digit alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    Literal(&'a str),
    Name(&'a str),
    /// `${` without its `}`.
    Unclosed,
}

pub fn parts(text: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        if !before.is_empty() {
            parts.push(Part::Literal(before));
        }
        let (name, next) = match after.strip_prefix('{') {
            Some(inner) => match inner.split_once('}') {
                Some(found) => found,
                None => {
                    parts.push(Part::Unclosed);
                    return parts;
                }
            },
            None => {
                let digits = after.bytes().next().is_some_and(|b| b.is_ascii_digit());
                let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
                after.split_at(if digits { 1 } else { after.bytes().take_while(|b| fits(*b)).count() })
            }
        };
        parts.push(Part::Name(name));
        rest = next;
    }
    if !rest.is_empty() {
        parts.push(Part::Literal(rest));
    }
    parts
}

/// The first argument of that name in a query, as it was sent.
pub fn argument<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

#[cfg(test)]
mod tests {
    use super::{Part::*, *};

    #[test]
    fn names_end_where_they_can_be_no_longer() {
        assert_eq!(parts("/a$uri.html"), [Literal("/a"), Name("uri"), Literal(".html")]);
        assert_eq!(
            parts("$1a${b}c$is_args$args"),
            [Name("1"), Literal("a"), Name("b"), Literal("c"), Name("is_args"), Name("args")]
        );
        assert_eq!(parts("a$"), [Literal("a"), Name("")]);
        assert_eq!(parts("a${b"), [Literal("a"), Unclosed]);
    }
}
