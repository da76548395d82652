//! The CGI header block that PHP writes first (RFC 3875, section 6.3) as the head of an HTTP answer. No I/O.

use std::{borrow::Cow, fmt};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use memchr::memchr_iter;

use crate::error::{Error, Kind};

/// Headers that whoever answers adds: room for them from the start.
const SPARE_HEADERS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of the whole block with the empty line that ends it.
    pub max_bytes: usize,
    /// Of its lines, also of those that are not passed on.
    pub max_headers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { max_bytes: 64 * 1024, max_headers: 256 }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// 200 to 599.
    pub status: StatusCode,
    /// Without Status, X-Accel-Buffering and what belongs to one connection. At most one Content-Length.
    pub headers: HeaderMap,
    pub content_length: Option<u64>,
    /// `X-Accel-Buffering: no` or an event stream: to be passed on as it comes.
    pub unbuffered: bool,
}

/// Why a header block cannot be passed on. The text is for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeadError {
    TooLong {
        limit: usize,
    },
    TooMany {
        limit: usize,
    },
    /// Neither `name: value` nor a continuation of one.
    Line(String),
    /// A control character in the value of this header.
    Value(HeaderName),
    /// Not a final status, or two of them.
    Status(String),
    /// Not a number, or two of them.
    ContentLength(String),
}

impl fmt::Display for HeadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HeadError::TooLong { limit } => write!(f, "PHP's headers are longer than {limit} bytes"),
            HeadError::TooMany { limit } => write!(f, "PHP sent more than {limit} headers"),
            HeadError::Line(line) => write!(f, "PHP sent `{line}` where a header should be"),
            HeadError::Value(name) => write!(f, "PHP's header `{name}` has a control character in its value"),
            HeadError::Status(status) => write!(f, "PHP's status `{status}` is not one of 200 to 599, or not the only one"),
            HeadError::ContentLength(length) => write!(f, "PHP's Content-Length `{length}` is not a number, or not the only one"),
        }
    }
}

impl std::error::Error for HeadError {}

impl From<HeadError> for Error {
    fn from(error: HeadError) -> Self {
        Error::new(Kind::UpstreamHeaders, error.to_string())
    }
}

/// Reads the head at the beginning of `buf` and says how many bytes it took with its empty line; `None`: more is needed.
/// What it says does not depend on where `buf` ends: a block is too long whether or not it is whole.
pub fn parse_head(buf: &[u8], limits: &Limits) -> Result<Option<(Head, usize)>, HeadError> {
    let Some(block) = Block::find(buf, limits.max_bytes) else {
        return if buf.len() < limits.max_bytes { Ok(None) } else { Err(HeadError::TooLong { limit: limits.max_bytes }) };
    };
    if block.lines > limits.max_headers {
        return Err(HeadError::TooMany { limit: limits.max_headers });
    }
    let mut builder = Builder::new(block.lines);
    for (nth, line) in Lines(&buf[..block.len]).enumerate() {
        match line.strip_prefix(b"HTTP/") {
            // cgi.rfc2616_headers = 1 makes PHP begin as an HTTP server would (php-src `sapi_cgi_send_headers`).
            Some(rest) if nth == 0 => builder.status(rest.split(|&byte| byte == b' ').nth(1).unwrap_or_default())?,
            _ => builder.line(&line)?,
        }
    }
    Ok(Some((builder.finish(), block.used)))
}

/// Where a header block lies.
struct Block {
    /// Up to the empty line.
    len: usize,
    /// With the empty line.
    used: usize,
    lines: usize,
}

impl Block {
    fn find(buf: &[u8], max_bytes: usize) -> Option<Block> {
        let mut len = 0;
        for (lines, end) in memchr_iter(b'\n', &buf[..buf.len().min(max_bytes)]).enumerate() {
            if matches!(buf[len..end], [] | [b'\r']) {
                return Some(Block { len, used: end + 1, lines });
            }
            len = end + 1;
        }
        None
    }
}

/// The lines of a block without their ends, those that continue another joined to it by a space (RFC 9112, section 5.2).
struct Lines<'a>(&'a [u8]);

impl<'a> Lines<'a> {
    fn line(&mut self) -> Option<&'a [u8]> {
        let end = memchr::memchr(b'\n', self.0)?;
        let line = &self.0[..end];
        self.0 = &self.0[end + 1..];
        Some(line.strip_suffix(b"\r").unwrap_or(line))
    }
}

impl<'a> Iterator for Lines<'a> {
    type Item = Cow<'a, [u8]>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Cow::Borrowed(self.line()?);
        while let [b' ' | b'\t', ..] = self.0
            && let Some(more) = self.line()
        {
            let joined = line.to_mut();
            joined.push(b' ');
            joined.extend_from_slice(trim(more));
        }
        Some(line)
    }
}

struct Builder {
    status: Option<StatusCode>,
    headers: HeaderMap,
    content_length: Option<u64>,
    unbuffered: bool,
}

impl Builder {
    fn new(lines: usize) -> Self {
        Builder {
            status: None,
            // Only a hint; what does not fit into a map at all fails where it is added.
            headers: HeaderMap::try_with_capacity(lines + SPARE_HEADERS).unwrap_or_default(),
            content_length: None,
            unbuffered: false,
        }
    }

    fn line(&mut self, line: &[u8]) -> Result<(), HeadError> {
        let (name, value) = memchr::memchr(b':', line)
            .and_then(|colon| Some((HeaderName::from_bytes(&line[..colon]).ok()?, trim(&line[colon + 1..]))))
            .ok_or_else(|| HeadError::Line(excerpt(line)))?;
        let value = HeaderValue::from_bytes(value).map_err(|_| HeadError::Value(name.clone()))?;
        match name.as_str() {
            "status" => return self.status(value.as_bytes()),
            "x-accel-buffering" => {
                self.unbuffered |= value.as_bytes().eq_ignore_ascii_case(b"no");
                return Ok(());
            }
            // They speak of one connection, and that is not the client's (RFC 9110, section 7.6.1).
            "connection" | "keep-alive" | "proxy-connection" | "te" | "trailer" | "transfer-encoding" | "upgrade" => {
                return Ok(());
            }
            "content-length" => {
                let length = decimal(value.as_bytes()).ok_or_else(|| HeadError::ContentLength(excerpt(value.as_bytes())))?;
                match self.content_length.replace(length) {
                    // The same again says nothing new; another one is how answers are smuggled (RFC 9110, section 8.6).
                    Some(first) if first == length => return Ok(()),
                    Some(first) => return Err(HeadError::ContentLength(format!("{first}, {length}"))),
                    None => {}
                }
            }
            "content-type" => self.unbuffered |= is_event_stream(value.as_bytes()),
            _ => {}
        }
        match self.headers.try_append(name, value) {
            Ok(_) => Ok(()),
            Err(_) => Err(HeadError::TooMany { limit: self.headers.len() }),
        }
    }

    /// `404 Not Found` or `404`. 1xx is not an answer, and 101 would hand PHP the client's connection.
    fn status(&mut self, text: &[u8]) -> Result<(), HeadError> {
        let (code, rest) = text.split_at_checked(3).unwrap_or((text, b""));
        match StatusCode::from_bytes(code) {
            Ok(status)
                if matches!(status.as_u16(), 200..=599)
                    && matches!(rest, [] | [b' ', ..])
                    && self.status.replace(status).is_none_or(|first| first == status) =>
            {
                Ok(())
            }
            _ => Err(HeadError::Status(excerpt(text))),
        }
    }

    fn finish(self) -> Head {
        let status = self.status.unwrap_or(match self.headers.contains_key(header::LOCATION) {
            // RFC 3875, section 6.2.3.
            true => StatusCode::FOUND,
            false => StatusCode::OK,
        });
        Head { status, headers: self.headers, content_length: self.content_length, unbuffered: self.unbuffered }
    }
}

fn is_event_stream(content_type: &[u8]) -> bool {
    let media = content_type.split(|&byte| byte == b';').next().unwrap_or_default();
    trim(media).eq_ignore_ascii_case(b"text/event-stream")
}

/// Digits and nothing else: no sign, no list.
fn decimal(text: &[u8]) -> Option<u64> {
    let text = str::from_utf8(text).ok()?;
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Without spaces and tabs at either end; `trim_ascii` would take a stray CR as well.
fn trim(mut text: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = text {
        text = rest;
    }
    text
}

/// So much of outside bytes as a log line bears.
fn excerpt(bytes: &[u8]) -> String {
    bytes[..bytes.len().min(80)].escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// A block of these lines, read whole and at every cut: incomplete up to its last byte, and then the same with
    /// whatever follows.
    fn parse(lines: &[&[u8]]) -> Result<Head, HeadError> {
        let results = [&b"\n"[..], b"\r\n"].map(|end| {
            let block = lines.iter().chain(&[&b""[..]]).flat_map(|line| [line, end].concat()).collect::<Vec<_>>();
            for cut in 0..block.len() {
                assert_eq!(parse_head(&block[..cut], &Limits::default()), Ok(None), "cut at {cut}");
            }
            let whole = parse_head(&block, &Limits::default());
            assert_eq!(parse_head(&[&block[..], b"body\n\n"].concat(), &Limits::default()), whole);
            whole.map(|head| {
                let (head, used) = head.unwrap();
                assert_eq!(used, block.len());
                head
            })
        });
        assert_eq!(results[0], results[1]);
        let [result, _] = results;
        result
    }

    fn status(lines: &[&[u8]]) -> u16 {
        parse(lines).unwrap().status.as_u16()
    }

    fn get<'a>(head: &'a Head, name: &str) -> Vec<&'a [u8]> {
        head.headers.get_all(name).iter().map(HeaderValue::as_bytes).collect()
    }

    #[test]
    fn what_php_sends() {
        let lines: &[&[u8]] = &[
            b"Status: 404 Not Found",
            b"X-Powered-By: PHP/8.2.36",
            b"Set-Cookie: a=1; path=/",
            b"Set-Cookie: b=2",
            b"Content-type: text/html; charset=UTF-8",
            b"Content-Length: 12",
            b"X-Latin: caf\xe9",
            b"X-Empty:",
        ];
        let head = parse(lines).unwrap();
        assert_eq!((head.status.as_u16(), head.content_length, head.unbuffered), (404, Some(12), false));
        assert_eq!(get(&head, "set-cookie"), [&b"a=1; path=/"[..], b"b=2"]);
        assert_eq!(get(&head, "x-latin"), [b"caf\xe9"]);
        assert_eq!(get(&head, "x-empty"), [b""]);
        assert_eq!(get(&head, "x-powered-by"), [b"PHP/8.2.36"]);
        assert_eq!(head.headers.len(), 7, "Status is not passed on");
    }

    #[test]
    fn a_status_is_said_or_follows() {
        assert_eq!(status(&[]), 200);
        assert_eq!(status(&[b"Content-Type: text/plain"]), 200);
        assert_eq!(status(&[b"Location: /elsewhere"]), 302);
        assert_eq!(status(&[b"Status: 201", b"Location: /made"]), 201);
        assert_eq!(status(&[b"status:599  Odd"]), 599);
        assert_eq!(status(&[b"HTTP/1.1 418 I'm a teapot", b"X: y"]), 418);
        assert_eq!(status(&[b"HTTP/1.0 404 Not Found", b"Status: 404 Not Found"]), 404);
        for bad in ["100 Continue", "101 Switching Protocols", "199", "600", "20", "2000", "abc", "", "-20", "200x", "OK 200"] {
            assert_eq!(parse(&[format!("Status: {bad}").as_bytes()]), Err(HeadError::Status(bad.to_owned())));
        }
        assert!(matches!(parse(&[b"Status: 200", b"Status: 404"]), Err(HeadError::Status(_))));
        assert!(matches!(parse(&[b"HTTP/1.1"]), Err(HeadError::Status(_))));
        assert!(matches!(parse(&[b"X: y", b"HTTP/1.1 200 OK"]), Err(HeadError::Line(_))));
    }

    #[test]
    fn continuation_lines_are_joined() {
        let head = parse(&[b"X-Long: a,  ", b"  b,", b"\t c", b" ", b"X: y"]).unwrap();
        assert_eq!(get(&head, "x-long"), [b"a,   b, c"]);
        assert_eq!(get(&head, "x"), [b"y"]);
        assert!(matches!(parse(&[b" X: y"]), Err(HeadError::Line(_))));
    }

    #[test]
    fn what_belongs_to_one_connection_stays() {
        let head = parse(&[
            b"Connection: close",
            b"Keep-Alive: 1",
            b"Proxy-Connection: x",
            b"TE: x",
            b"Trailer: x",
            b"Transfer-Encoding: chunked",
            b"Upgrade: h2c",
            b"X: y",
        ]);
        assert_eq!(head.unwrap().headers.len(), 1);
    }

    #[test]
    fn one_content_length_or_none() {
        let head = parse(&[b"Content-Length: 5", b"Content-Length: 005"]).unwrap();
        assert_eq!((head.content_length, get(&head, "content-length")), (Some(5), vec![&b"5"[..]]));
        for bad in ["", "-1", "+1", "5, 5", "0x5", "1 2", "18446744073709551616"] {
            assert_eq!(parse(&[format!("Content-Length: {bad}").as_bytes()]), Err(HeadError::ContentLength(bad.to_owned())));
        }
        assert!(matches!(parse(&[b"Content-Length: 5", b"Content-Length: 6"]), Err(HeadError::ContentLength(_))));
    }

    #[test]
    fn who_is_not_buffered() {
        let unbuffered = |line: &[u8]| parse(&[line]).unwrap().unbuffered;
        assert!(unbuffered(b"X-Accel-Buffering: No") && unbuffered(b"Content-Type: Text/Event-Stream ; charset=utf-8"));
        assert!(!unbuffered(b"X-Accel-Buffering: yes") && !unbuffered(b"Content-Type: text/event-streams"));
        assert!(parse(&[b"X-Accel-Buffering: no"]).unwrap().headers.is_empty());
    }

    #[test]
    fn garbage_is_refused() {
        for line in [&b"no colon"[..], b": no name", b"Na me: x", b"Name : x", b"N\0: x", b"N\xe9: x", b"N\r: x", b"(x): y"] {
            assert_eq!(parse(&[line]), Err(HeadError::Line(excerpt(line))));
        }
        for value in [&b"a\0b"[..], b"a\rb", b"a\r\r", b"\x7f", b"\x1b[31m"] {
            assert_eq!(parse(&[&[b"X: ", value].concat()]), Err(HeadError::Value(HeaderName::from_static("x"))));
        }
        assert_eq!(parse(&[b"\0\xff\""]).unwrap_err().to_string(), r#"PHP sent `\x00\xff\"` where a header should be"#);
    }

    #[test]
    fn limits_hold_to_the_byte() {
        let block = b"A: 1\nB: 2\n\nbody";
        let limits = |max_bytes, max_headers| Limits { max_bytes, max_headers };
        assert!(matches!(parse_head(block, &limits(11, 2)), Ok(Some((_, 11)))));
        for cut in 0..block.len() {
            let result = parse_head(&block[..cut], &limits(10, 2));
            assert_eq!(result, if cut < 10 { Ok(None) } else { Err(HeadError::TooLong { limit: 10 }) });
        }
        assert_eq!(parse_head(block, &limits(11, 1)), Err(HeadError::TooMany { limit: 1 }));
        // A map cannot hold more than 32,768 names, whatever the limits say; it must not panic.
        let many: String = (0..40_000).map(|n| format!("h{n}: \n")).chain(["\n".to_owned()]).collect();
        let result = parse_head(many.as_bytes(), &limits(usize::MAX, usize::MAX));
        assert!(matches!(result, Err(HeadError::TooMany { .. })));
    }

    #[test]
    fn an_error_is_the_upstreams() {
        assert_eq!(Error::from(HeadError::TooLong { limit: 1 }).kind, Kind::UpstreamHeaders);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b':'), Just(b' '), Just(b'a'), any::<u8>()], 0..200)) {
            if let Ok(Some((head, used))) = parse_head(&bytes, &Limits::default()) {
                prop_assert!(used <= bytes.len() && (200..=599).contains(&head.status.as_u16()));
            }
        }

        /// A token is a name and nothing else is; a value comes out as it went in.
        #[test]
        fn headers_pass(fields in vec(("x-[!#$%&'*+.^_`|~a-z0-9-]{1,9}", "([!-~]([ -~\t]{0,30}[!-~])?)?"), 0..6)) {
            let lines: Vec<_> = fields.iter().map(|(name, value)| format!("{name}: {value} ")).collect();
            let lines: Vec<_> = lines.iter().map(String::as_bytes).collect();
            let head = parse(&lines).unwrap();
            for (name, value) in &fields {
                prop_assert!(get(&head, name).contains(&value.as_bytes()));
            }
        }
    }
}
