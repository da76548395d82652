//! A request as CGI parameters (RFC 3875, section 4.1, and what Nginx's `fastcgi_params` adds). No I/O, no allocation.
//!
//! What a client may decide is the value of `HTTP_*`, never the name of another parameter: nothing it sends can
//! set SCRIPT_FILENAME, PHP_VALUE, PHP_ADMIN_VALUE, DOCUMENT_ROOT or REDIRECT_STATUS.

use std::{
    fmt,
    io::Write,
    iter,
    net::{IpAddr, SocketAddr},
};

use bytes::BytesMut;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version, header};

use super::record::{PairTooLong, ParamsWriter};
use crate::{
    error::{Error, Kind},
    model::peer::without_port,
};

/// What PHP is to run. The two file names are FPM's, which may see other folders than the proxy.
#[derive(Clone, Copy, Debug)]
pub struct Script<'a> {
    /// The URI path of the script, as `/index.php`.
    pub script_name: &'a str,
    /// What follows it in the path; may be empty.
    pub path_info: &'a str,
    /// Before `script_name` it makes SCRIPT_FILENAME.
    pub document_root: &'a str,
}

/// All that parameters are made of.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    pub method: &'a Method,
    /// Path and query as the client sent them.
    pub request_uri: &'a str,
    pub query: &'a str,
    pub version: Version,
    pub headers: &'a HeaderMap,
    /// The effective authority with its port, also of an absolute-form target. Empty where there is none.
    pub host: &'a str,
    /// The length of a body that has been read whole; FPM takes a body without one for empty.
    pub content_length: Option<u64>,
    pub remote_addr: IpAddr,
    pub remote_port: u16,
    pub server_addr: SocketAddr,
    pub server_port: u16,
    pub https: bool,
    /// Whoever `basic_auth` has let through; "": nobody was asked.
    pub remote_user: &'a str,
    /// Ours: a client's X-Request-ID counts only where a trusted proxy sent it.
    pub request_id: &'a str,
    /// The configuration's `params`. Each replaces what has its name.
    pub extra: &'a [(String, String)],
    pub script: Script<'a>,
}

/// A parameter that does not fit into a record, and so cannot reach FPM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParamsError {
    /// The request target, in one of its forms: 414.
    TargetTooLong { name: String, bytes: usize },
    /// 431.
    HeaderTooLong { name: String, bytes: usize },
}

impl fmt::Display for ParamsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ParamsError::TargetTooLong { name, bytes } | ParamsError::HeaderTooLong { name, bytes }) = self;
        write!(f, "{name} takes {bytes} bytes; a FastCGI record holds 65535")
    }
}

impl std::error::Error for ParamsError {}

impl From<PairTooLong> for ParamsError {
    fn from(PairTooLong { name, bytes }: PairTooLong) -> Self {
        let name = String::from_utf8_lossy(&name).into_owned();
        match name.as_str() {
            "REQUEST_URI" | "QUERY_STRING" | "DOCUMENT_URI" | "SCRIPT_NAME" | "SCRIPT_FILENAME" | "PATH_INFO"
            | "PATH_TRANSLATED" => ParamsError::TargetTooLong { name, bytes },
            _ => ParamsError::HeaderTooLong { name, bytes },
        }
    }
}

impl From<ParamsError> for Error {
    fn from(error: ParamsError) -> Self {
        let kind = match error {
            ParamsError::TargetTooLong { .. } => Kind::UriTooLong,
            ParamsError::HeaderTooLong { .. } => Kind::ParamTooLong,
        };
        Error::new(kind, error.to_string())
    }
}

/// Appends the whole PARAMS stream with its empty record. After an error `out` is as it was.
pub fn write(out: &mut BytesMut, input: &Input) -> Result<(), ParamsError> {
    let start = out.len();
    let mut writer = Writer { params: ParamsWriter::new(out), extra: input.extra };
    match writer.request(input).and_then(|()| writer.headers(input.headers)).and_then(|()| writer.extra()) {
        Ok(()) => {
            writer.params.finish();
            Ok(())
        }
        Err(error) => {
            out.truncate(start);
            Err(error.into())
        }
    }
}

struct Writer<'a> {
    params: ParamsWriter<'a>,
    extra: &'a [(String, String)],
}

impl Writer<'_> {
    fn request(&mut self, input: &Input) -> Result<(), PairTooLong> {
        let script = &input.script;
        let mut number = itoa::Buffer::new();
        let mut text = [0; ADDRESS_LEN];

        self.set("GATEWAY_INTERFACE", "CGI/1.1")?;
        self.set("SERVER_SOFTWARE", "slackwater")?;
        // cgi.force_redirect refuses to run without it.
        self.set("REDIRECT_STATUS", "200")?;
        self.set("REQUEST_METHOD", input.method.as_str())?;
        self.set("REQUEST_URI", input.request_uri)?;
        self.set("REQUEST_SCHEME", if input.https { "https" } else { "http" })?;
        if input.https {
            self.set("HTTPS", "on")?;
        }
        self.set("QUERY_STRING", input.query)?;
        self.set("SERVER_PROTOCOL", protocol(input.version))?;
        self.set("DOCUMENT_ROOT", script.document_root)?;
        self.set_both("DOCUMENT_URI", script.script_name, script.path_info)?;
        self.set("SCRIPT_NAME", script.script_name)?;
        self.set_both("SCRIPT_FILENAME", script.document_root, script.script_name)?;
        if !script.path_info.is_empty() {
            self.set("PATH_INFO", script.path_info)?;
            self.set_both("PATH_TRANSLATED", script.document_root, script.path_info)?;
        }
        // Both are set to nothing where there is nothing, as Nginx does: applications read them without asking.
        self.set("CONTENT_TYPE", input.headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes))?;
        self.set("CONTENT_LENGTH", input.content_length.map_or("", |length| number.format(length)))?;
        self.set("REMOTE_ADDR", address(input.remote_addr, &mut text))?;
        // RFC 3875, sections 4.1.1 and 4.1.11. Not what a client claims and nobody has looked at.
        if !input.remote_user.is_empty() {
            self.set("AUTH_TYPE", "Basic")?;
            self.set("REMOTE_USER", input.remote_user)?;
        }
        self.set("REMOTE_PORT", number.format(input.remote_port))?;
        let server_address = address(input.server_addr.ip(), &mut text);
        self.set("SERVER_ADDR", server_address)?;
        self.set("SERVER_PORT", number.format(input.server_port))?;
        match input.host {
            "" => self.set("SERVER_NAME", server_address)?,
            host => {
                self.set("SERVER_NAME", without_port(host))?;
                self.set("HTTP_HOST", host)?;
            }
        }
        match input.request_id {
            "" => Ok(()),
            id => self.set("HTTP_X_REQUEST_ID", id),
        }
    }

    fn headers(&mut self, headers: &HeaderMap) -> Result<(), PairTooLong> {
        // The values of one name follow one another, so the map need not be asked where there is only one.
        let mut fields = headers.iter().peekable();
        while let Some((name, value)) = fields.next() {
            let mut repeated = false;
            while fields.next_if(|(next, _)| *next == name).is_some() {
                repeated = true;
            }
            if !passes(name) || self.extra.iter().any(|(extra, _)| is_parameter_of(extra, name)) {
                continue;
            }
            let (prefix, field) = (b"HTTP_", name.as_str().as_bytes());
            if repeated {
                let separator: &[u8] = if *name == header::COOKIE { b"; " } else { b", " };
                let values = || headers.get_all(name).iter().map(HeaderValue::as_bytes);
                self.params.pair_joined(prefix, field, fold, values, separator)?;
            } else {
                self.params.pair_joined(prefix, field, fold, || iter::once(value.as_bytes()), b"")?;
            }
        }
        Ok(())
    }

    fn extra(&mut self) -> Result<(), PairTooLong> {
        for (name, value) in self.extra {
            // Also the operator cannot point PHP's HTTP clients at a proxy by this name (CVE-2016-5385).
            if name != "HTTP_PROXY" {
                self.params.pair(name.as_bytes(), value.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Whether the configuration has a value of its own. One name is never sent twice: php-src `fcgi_hash_set` would
    /// take the last one, another FastCGI server perhaps the first.
    fn is_replaced(&self, name: &str) -> bool {
        self.extra.iter().any(|(extra, _)| extra == name)
    }

    fn set(&mut self, name: &'static str, value: impl AsRef<[u8]>) -> Result<(), PairTooLong> {
        if self.is_replaced(name) { Ok(()) } else { self.params.pair(name.as_bytes(), value.as_ref()) }
    }

    fn set_both(&mut self, name: &'static str, first: &str, second: &str) -> Result<(), PairTooLong> {
        if self.is_replaced(name) {
            return Ok(());
        }
        let parts = || [first.as_bytes(), second.as_bytes()].into_iter();
        self.params.pair_joined(b"", name.as_bytes(), |_| {}, parts, b"")
    }
}

/// Whether a header becomes `HTTP_*`.
fn passes(name: &HeaderName) -> bool {
    match name.as_str() {
        // Said by parameters of their own, which need not be what the header says.
        "host" | "x-request-id" | "content-type" | "content-length" => false,
        // The client's connection is not PHP's (RFC 9110, section 7.6.1), and the body has been read whole.
        "connection" | "keep-alive" | "proxy-connection" | "te" | "trailer" | "transfer-encoding" | "upgrade" => false,
        // httpoxy, CVE-2016-5385.
        "proxy" => false,
        // PHP folds `_`, `.` and more onto names that a trusted proxy sets: X_Forwarded_For onto X-Forwarded-For.
        name => name.bytes().all(|byte| folded(byte) != 0),
    }
}

fn fold(name: &mut [u8]) {
    for byte in name {
        *byte = folded(*byte);
    }
}

/// The character of a header's name as one of a parameter's (RFC 3875, section 4.1.18); 0 where there is none.
fn folded(byte: u8) -> u8 {
    FOLDED[usize::from(byte)]
}

/// A table, as this is done for every byte of every header's name.
static FOLDED: [u8; 256] = {
    let mut table = [0; 256];
    let (from, to) = (b"-0123456789abcdefghijklmnopqrstuvwxyz", b"_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ");
    let mut i = 0;
    while i < from.len() {
        table[from[i] as usize] = to[i];
        i += 1;
    }
    table
};

/// Whether `parameter` is what the header `name` would be called.
fn is_parameter_of(parameter: &str, name: &HeaderName) -> bool {
    parameter.strip_prefix("HTTP_").is_some_and(|rest| rest.bytes().eq(name.as_str().bytes().map(folded)))
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_09 | Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2.0",
        Version::HTTP_3 => "HTTP/3.0",
        _ => "HTTP/1.1",
    }
}

/// The longest text of an address (INET6_ADDRSTRLEN without its NUL).
const ADDRESS_LEN: usize = 45;

/// The text of an address; an IPv4 client of a dual-stack socket is an IPv4 client to PHP.
fn address(ip: IpAddr, text: &mut [u8; ADDRESS_LEN]) -> &[u8] {
    let mut rest = &mut text[..];
    // It fits, and so cannot fail.
    let _ = match ip.to_canonical() {
        // Not by its Display, which is a tenth of the cost of all parameters.
        IpAddr::V4(ip) => ip.octets().iter().enumerate().try_for_each(|(nth, octet)| {
            rest.write_all(if nth == 0 { b"" } else { b"." })?;
            rest.write_all(itoa::Buffer::new().format(*octet).as_bytes())
        }),
        IpAddr::V6(ip) => write!(rest, "{ip}"),
    };
    let len = ADDRESS_LEN - rest.len();
    &text[..len]
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::fastcgi::{record::HEADER_LEN, responder::parse_params};

    const SCRIPT: Script = Script { script_name: "/index.php", path_info: "", document_root: "/app" };

    fn input<'a>(headers: &'a HeaderMap, extra: &'a [(String, String)]) -> Input<'a> {
        Input {
            method: &Method::GET,
            request_uri: "/a%20b?x=1",
            query: "x=1",
            version: Version::HTTP_11,
            headers,
            host: "example.com:8080",
            content_length: None,
            remote_addr: "::ffff:192.0.2.7".parse().unwrap(),
            remote_port: 50_000,
            server_addr: "[2001:db8::1]:8080".parse().unwrap(),
            server_port: 443,
            https: true,
            remote_user: "",
            request_id: "id-1",
            extra,
            script: SCRIPT,
        }
    }

    fn map(fields: &[(&str, &str)]) -> HeaderMap {
        fields.iter().map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse::<HeaderValue>().unwrap())).fold(
            HeaderMap::new(),
            |mut map, (name, value)| {
                map.append(name, value);
                map
            },
        )
    }

    fn extra(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    /// As FPM reads them, in the order sent.
    fn sent(input: &Input) -> Vec<(String, String)> {
        let mut out = BytesMut::new();
        write(&mut out, input).unwrap();
        let (mut rest, mut all) = (&out[..], Vec::new());
        while let Some((&[1, 4, 0, 1, c1, c0, 0, 0], after)) = rest.split_first_chunk::<HEADER_LEN>() {
            let (content, after) = after.split_at(usize::from(u16::from_be_bytes([c1, c0])));
            all.extend(parse_params(content).unwrap());
            rest = after;
        }
        assert!(rest.is_empty() && out.ends_with(&[1, 4, 0, 1, 0, 0, 0, 0]));
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let all: Vec<_> = all.into_iter().map(|(name, value)| (text(name), text(value))).collect();
        assert_eq!(all.iter().map(|(name, _)| name).collect::<HashSet<_>>().len(), all.len(), "twice: {all:?}");
        all
    }

    fn get(pairs: &[(String, String)], name: &str) -> Option<String> {
        pairs.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone())
    }

    fn value(input: &Input, name: &str) -> Option<String> {
        get(&sent(input), name)
    }

    #[test]
    fn a_get_is_these_parameters() {
        let headers = map(&[("accept", "*/*"), ("authorization", "Basic QQ=="), ("host", "evil"), ("x-request-id", "evil")]);
        let expected = extra(&[
            ("GATEWAY_INTERFACE", "CGI/1.1"),
            ("SERVER_SOFTWARE", "slackwater"),
            ("REDIRECT_STATUS", "200"),
            ("REQUEST_METHOD", "GET"),
            ("REQUEST_URI", "/a%20b?x=1"),
            ("REQUEST_SCHEME", "https"),
            ("HTTPS", "on"),
            ("QUERY_STRING", "x=1"),
            ("SERVER_PROTOCOL", "HTTP/1.1"),
            ("DOCUMENT_ROOT", "/app"),
            ("DOCUMENT_URI", "/index.php"),
            ("SCRIPT_NAME", "/index.php"),
            ("SCRIPT_FILENAME", "/app/index.php"),
            ("CONTENT_TYPE", ""),
            ("CONTENT_LENGTH", ""),
            ("REMOTE_ADDR", "192.0.2.7"),
            ("REMOTE_PORT", "50000"),
            ("SERVER_ADDR", "2001:db8::1"),
            ("SERVER_PORT", "443"),
            ("SERVER_NAME", "example.com"),
            ("HTTP_HOST", "example.com:8080"),
            ("HTTP_X_REQUEST_ID", "id-1"),
            ("HTTP_ACCEPT", "*/*"),
            ("HTTP_AUTHORIZATION", "Basic QQ=="),
            ("APP_ENV", "production"),
        ]);
        let extra = extra(&[("APP_ENV", "production")]);
        assert_eq!(sent(&input(&headers, &extra)), expected);

        // And byte for byte, with what stood in the buffer before.
        let mut out = BytesMut::from(&b"before"[..]);
        write(&mut out, &input(&headers, &extra)).unwrap();
        let content: Vec<u8> = expected
            .iter()
            .flat_map(|(name, value)| {
                let lens = [u8::try_from(name.len()).unwrap(), u8::try_from(value.len()).unwrap()];
                [&lens[..], name.as_bytes(), value.as_bytes()].concat()
            })
            .collect();
        let [c1, c0] = u16::try_from(content.len()).unwrap().to_be_bytes();
        let records = [&b"before"[..], &[1, 4, 0, 1, c1, c0, 0, 0], &content, &[1, 4, 0, 1, 0, 0, 0, 0]];
        assert_eq!(out, records.concat());
    }

    #[test]
    fn a_post_with_path_info() {
        let headers = map(&[("content-type", "text/plain"), ("content-length", "999"), ("transfer-encoding", "chunked")]);
        let pairs = sent(&Input {
            method: &Method::POST,
            version: Version::HTTP_2,
            content_length: Some(u64::MAX),
            https: false,
            script: Script { path_info: "/a/b", ..SCRIPT },
            ..input(&headers, &[])
        });
        for (name, value) in [
            ("REQUEST_METHOD", Some("POST")),
            ("SERVER_PROTOCOL", Some("HTTP/2.0")),
            ("CONTENT_TYPE", Some("text/plain")),
            ("CONTENT_LENGTH", Some("18446744073709551615")),
            ("DOCUMENT_URI", Some("/index.php/a/b")),
            ("PATH_INFO", Some("/a/b")),
            ("PATH_TRANSLATED", Some("/app/a/b")),
            ("REQUEST_SCHEME", Some("http")),
            ("HTTPS", None),
            ("HTTP_CONTENT_TYPE", None),
            ("HTTP_CONTENT_LENGTH", None),
            ("HTTP_TRANSFER_ENCODING", None),
        ] {
            assert_eq!(get(&pairs, name).as_deref(), value, "{name}");
        }
    }

    #[test]
    fn a_header_cannot_pass_for_another_parameter() {
        let hostile = map(&[
            ("proxy", "http://evil"),
            ("Proxy", "http://evil"),
            ("script_filename", "/etc/passwd"),
            ("x_forwarded_for", "127.0.0.1"),
            ("x.forwarded.for", "127.0.0.1"),
            ("x~y", "1"),
            ("connection", "close"),
            ("keep-alive", "1"),
            ("te", "trailers"),
            ("trailer", "x"),
            ("upgrade", "h2c"),
            ("proxy-connection", "close"),
            ("x-request-id", "forged"),
        ]);
        assert_eq!(sent(&input(&hostile, &[])), sent(&input(&HeaderMap::new(), &[])));
        // A name that is a parameter's ends up under HTTP_ as any other.
        let pairs = sent(&input(&map(&[("php-value", "x"), ("redirect-status", "500")]), &[]));
        assert_eq!(get(&pairs, "HTTP_PHP_VALUE").as_deref(), Some("x"));
        assert_eq!(get(&pairs, "REDIRECT_STATUS").as_deref(), Some("200"));
    }

    #[test]
    fn repeated_headers_are_joined() {
        let headers = map(&[
            ("cookie", "a=1"),
            ("accept", "x"),
            ("cookie", "b=2"),
            ("x-forwarded-for", "1"),
            ("accept", "y"),
            ("accept", "z"),
        ]);
        let pairs = sent(&input(&headers, &[]));
        assert_eq!(get(&pairs, "HTTP_COOKIE").as_deref(), Some("a=1; b=2"));
        assert_eq!(get(&pairs, "HTTP_ACCEPT").as_deref(), Some("x, y, z"));
        assert_eq!(get(&pairs, "HTTP_X_FORWARDED_FOR").as_deref(), Some("1"));
    }

    #[test]
    fn the_configuration_replaces_what_has_its_name() {
        let extra =
            extra(&[("SERVER_NAME", "shop"), ("HTTP_X_ROLE", "guest"), ("HTTP_PROXY", "http://proxy"), ("PATH_TRANSLATED", "/x")]);
        let headers = map(&[("x-role", "admin"), ("x-role", "root")]);
        let pairs = sent(&Input { script: Script { path_info: "/p", ..SCRIPT }, ..input(&headers, &extra) });
        assert_eq!(pairs[pairs.len() - 3..], [extra[0].clone(), extra[1].clone(), extra[3].clone()]);
        assert_eq!(get(&pairs, "HTTP_PROXY"), None);
    }

    #[test]
    fn the_server_has_a_name() {
        for (host, name) in [
            ("example.com", "example.com"),
            ("example.com:80", "example.com"),
            ("[::1]", "[::1]"),
            ("[::1]:80", "[::1]"),
            ("[::1", "["),
            ("", "2001:db8::1"),
            (":80", ""),
        ] {
            let headers = HeaderMap::new();
            let input = Input { host, ..input(&headers, &[]) };
            assert_eq!(value(&input, "SERVER_NAME").as_deref(), Some(name), "{host}");
            assert_eq!(value(&input, "HTTP_HOST").as_deref(), (!host.is_empty()).then_some(host));
        }
    }

    #[test]
    fn the_longest_address_fits() {
        for ip in ["ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "255.255.255.255", "::"] {
            assert_eq!(address(ip.parse().unwrap(), &mut [0; ADDRESS_LEN]), ip.as_bytes());
        }
    }

    #[test]
    fn what_fits_into_no_record_is_431_or_414_and_leaves_nothing() {
        let long = "x".repeat(65_536);
        let headers = map(&[("x-long", &long)]);
        let none = HeaderMap::new();
        for (input, kind, name) in [
            (input(&headers, &[]), Kind::ParamTooLong, "HTTP_X_LONG"),
            (Input { request_uri: &long, ..input(&none, &[]) }, Kind::UriTooLong, "REQUEST_URI"),
            (Input { script: Script { path_info: &long, ..SCRIPT }, ..input(&none, &[]) }, Kind::UriTooLong, "DOCUMENT_URI"),
        ] {
            let mut out = BytesMut::from(&b"before"[..]);
            let error = Error::from(write(&mut out, &input).unwrap_err());
            assert_eq!((error.kind, error.detail.starts_with(name)), (kind, true), "{error}");
            assert_eq!(out, b"before"[..]);
        }
    }

    proptest! {
        /// Whatever the headers: no name twice, no name but ours and HTTP_*, no trusted value touched.
        #[test]
        fn headers_only_add(fields in vec(("[a-zA-Z0-9_.~-]{1,12}|Proxy|Host|Script-Filename|Cookie", "[ -~]{0,150}"), 0..20)) {
            let headers = map(&fields.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect::<Vec<_>>());
            let (with, without) = (sent(&input(&headers, &[])), sent(&input(&HeaderMap::new(), &[])));
            prop_assert_eq!(&with[..without.len()], &without[..]);
            prop_assert!(with[without.len()..].iter().all(|(name, _)| name.starts_with("HTTP_") && name != "HTTP_PROXY"));
        }
    }
}
