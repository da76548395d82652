//! What is refused before a route is looked for, and which host the request is for. Pure.

use std::borrow::Cow;

use http::{
    HeaderMap, Method, Version,
    header::{HOST, TRANSFER_ENCODING},
    request::Parts,
};

use crate::error::{Error, Kind};

/// What `OPTIONS *` is answered with (RFC 9110, section 9.3.7), and what a 405 of ours names.
pub const ALLOW: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

/// The longest authority: 253 of a name, and a port.
const MAX_HOST_LEN: usize = 259;

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub max_uri_bytes: usize,
    pub max_header_bytes: usize,
}

/// A request that passed.
#[derive(Debug, PartialEq, Eq)]
pub enum Passed<'a> {
    /// The effective authority with its port; empty only for HTTP/1.0 without Host.
    Request { host: Cow<'a, str> },
    /// `OPTIONS *`: answered by us, 204 with [`ALLOW`].
    OptionsStar,
}

/// All checks, in the order in which their answers make sense. Methods nobody knows pass: PHP decides. `Upgrade` is
/// ignored, as RFC 9110, section 7.8, allows.
pub fn check<'a>(parts: &'a Parts, limits: &Limits) -> Result<Passed<'a>, Error> {
    let length = target_length(&parts.uri);
    if length > limits.max_uri_bytes {
        return Err(Error::new(Kind::UriTooLong, format!("a target of {length} bytes")));
    }
    let bytes = header_bytes(&parts.headers);
    if bytes > limits.max_header_bytes {
        return Err(Error::new(Kind::HeadersTooLarge, format!("{bytes} bytes of headers")));
    }
    framing(parts)?;
    // TRACE would show cookies to a script; CONNECT is for forward proxies.
    if parts.method == Method::TRACE || parts.method == Method::CONNECT {
        return Err(Error::new(Kind::MethodNotAllowed, parts.method.as_str()));
    }
    // "GET example.com": a target without its slash is the form of CONNECT alone (RFC 9112, section 3.2.3).
    if parts.version < Version::HTTP_2 && parts.uri.scheme().is_none() && parts.uri.authority().is_some() {
        return Err(Error::new(Kind::BadRequest, "a target that is neither a path nor a URL"));
    }
    if parts.uri.path() == "*" {
        if parts.method != Method::OPTIONS {
            return Err(Error::new(Kind::BadRequest, "`*` as the target of another method than OPTIONS"));
        }
        if host_header(&parts.headers)?.is_none() && parts.version == Version::HTTP_11 {
            return Err(Error::new(Kind::BadRequest, "no Host"));
        }
        return Ok(Passed::OptionsStar);
    }
    Ok(Passed::Request { host: effective_host(parts)? })
}

/// The authority the request is for, with its port where the client gave one: that of an absolute target wins over
/// Host (RFC 9112, section 3.2.2); on HTTP/2 the two must agree (RFC 9113, section 8.3.1). A missing Host, more than
/// one, or one with other characters than a name or an address has, is `BadRequest`. HTTP/1.0 may do without: "".
pub fn effective_host(parts: &Parts) -> Result<Cow<'_, str>, Error> {
    let header = host_header(&parts.headers)?;
    let authority = parts.uri.authority().map(|authority| authority.as_str());
    let host = match (authority, header) {
        (Some(authority), Some(header)) if parts.version == Version::HTTP_2 && !authority.eq_ignore_ascii_case(header) => {
            return Err(Error::new(Kind::BadRequest, ":authority and Host differ"));
        }
        // HTTP/1.1 wants Host also beside an absolute target.
        (Some(_), None) if parts.version == Version::HTTP_11 => return Err(Error::new(Kind::BadRequest, "no Host")),
        (Some(authority), _) => authority,
        (None, Some(header)) => header,
        (None, None) if parts.version <= Version::HTTP_10 => return Ok(Cow::Borrowed("")),
        (None, None) => return Err(Error::new(Kind::BadRequest, "no Host")),
    };
    if valid_host(host) { Ok(Cow::Borrowed(host)) } else { Err(Error::new(Kind::BadRequest, "an invalid Host")) }
}

/// hyper reads any body whose last coding is chunked. A proxy before us may have read "chunked, chunked" differently, and what the
/// two disagree about is a second request (RFC 9112, section 6.1: chunked at most once; section 11.2).
fn framing(parts: &Parts) -> Result<(), Error> {
    let mut codings = parts.headers.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(()),
        _ => Err(Error::new(Kind::BadRequest, "Transfer-Encoding is other than one `chunked`")),
    }
}

fn host_header(headers: &HeaderMap) -> Result<Option<&str>, Error> {
    let mut values = headers.get_all(HOST).iter();
    let Some(first) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        // Also where both are the same: another server on the way may have read the other one.
        return Err(Error::new(Kind::BadRequest, "more than one Host"));
    }
    first.to_str().map(Some).map_err(|_| Error::new(Kind::BadRequest, "an invalid Host"))
}

/// A name, an IPv4 address or an IPv6 address in brackets, and perhaps a port. Stricter than RFC 3986: no userinfo,
/// no percent-encoding, no sub-delims, since applications paste Host into links and mails.
pub fn valid_host(host: &str) -> bool {
    if host.len() > MAX_HOST_LEN {
        return false;
    }
    let (name, port) = if let Some(rest) = host.strip_prefix('[') {
        let Some((address, rest)) = rest.split_once(']') else { return false };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        match rest.strip_prefix(':') {
            Some(port) => (None, Some(port)),
            None if rest.is_empty() => (None, None),
            None => return false,
        }
    } else {
        match memchr::memchr(b':', host.as_bytes()).and_then(|at| host.split_at_checked(at)) {
            Some((name, port)) => (Some(name), port.get(1..)),
            None => (Some(host), None),
        }
    };
    let name_is_valid = name.is_none_or(|name| {
        let name = name.strip_suffix('.').unwrap_or(name);
        // Labels, none of them empty.
        let mut before = b'.';
        name.bytes().all(|byte| {
            let fits = match byte {
                b'.' => before != b'.',
                byte => byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_',
            };
            before = byte;
            fits
        }) && before != b'.'
    });
    // "host:" with an empty port is what RFC 3986 allows.
    let port_is_valid =
        port.is_none_or(|port| port.is_empty() || port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok());
    name_is_valid && port_is_valid
}

/// The port that an authority names.
pub fn port_of(host: &str) -> Option<u16> {
    let after_address = host.rfind(']').map_or(host, |at| host.get(at + 1..).unwrap_or_default());
    after_address.rsplit_once(':').and_then(|(_, port)| port.parse().ok())
}

fn target_length(uri: &http::Uri) -> usize {
    let path = uri.path_and_query().map_or(0, |target| target.as_str().len());
    let scheme = uri.scheme_str().map_or(0, |scheme| scheme.len() + "://".len());
    path + scheme + uri.authority().map_or(0, |authority| authority.as_str().len())
}

/// As the fields would stand in HTTP/1: name, ": ", value, CRLF. The same for HTTP/2.
fn header_bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { max_uri_bytes: 64, max_header_bytes: 256 };

    fn parts(method: &str, uri: &str, version: Version, headers: &[(&str, &str)]) -> Parts {
        let mut request = http::Request::builder().method(method).uri(uri).version(version);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn kind(parts: &Parts) -> Option<Kind> {
        check(parts, &LIMITS).err().map(|error| error.kind)
    }

    fn host(uri: &str, version: Version, headers: &[(&str, &str)]) -> Result<String, Kind> {
        let parts = parts("GET", uri, version, headers);
        effective_host(&parts).map(Cow::into_owned).map_err(|error| error.kind)
    }

    const V11: Version = Version::HTTP_11;

    #[test]
    fn sizes_have_their_own_answers() {
        let ok = ("host", "a");
        assert_eq!(kind(&parts("GET", &format!("/{}", "x".repeat(63)), V11, &[ok])), None);
        assert_eq!(kind(&parts("GET", &format!("/{}", "x".repeat(64)), V11, &[ok])), Some(Kind::UriTooLong));
        assert_eq!(kind(&parts("GET", &format!("/?{}", "x".repeat(63)), V11, &[ok])), Some(Kind::UriTooLong));
        assert_eq!(kind(&parts("GET", "/", V11, &[ok, ("x", &"y".repeat(250))])), Some(Kind::HeadersTooLarge));
        assert_eq!(kind(&parts("GET", "/", V11, &[ok, ("x", &"y".repeat(200))])), None);
    }

    #[test]
    fn methods() {
        for (method, want) in [("TRACE", Some(Kind::MethodNotAllowed)), ("PURGE", None), ("DELETE", None)] {
            assert_eq!(kind(&parts(method, "/", V11, &[("host", "a")])), want, "{method}");
        }
        assert_eq!(kind(&parts("CONNECT", "a:443", V11, &[("host", "a")])), Some(Kind::MethodNotAllowed));
        let star = parts("OPTIONS", "*", V11, &[("host", "a")]);
        assert_eq!(check(&star, &LIMITS).unwrap(), Passed::OptionsStar);
        assert_eq!(kind(&parts("GET", "*", V11, &[("host", "a")])), Some(Kind::BadRequest));
        assert_eq!(kind(&parts("OPTIONS", "*", V11, &[])), Some(Kind::BadRequest));
    }

    #[test]
    fn host_rules() {
        assert_eq!(host("/", V11, &[("host", "Example.com:8080")]), Ok("Example.com:8080".into()));
        assert_eq!(host("/", V11, &[]), Err(Kind::BadRequest));
        assert_eq!(host("/", Version::HTTP_10, &[]), Ok(String::new()));
        assert_eq!(host("/", V11, &[("host", "a"), ("host", "a")]), Err(Kind::BadRequest));
        assert_eq!(host("/", V11, &[("host", "")]), Err(Kind::BadRequest));
        assert_eq!(host("http://b:81/", V11, &[("host", "a")]), Ok("b:81".into()));
        assert_eq!(host("http://b/", V11, &[]), Err(Kind::BadRequest));
        assert_eq!(host("http://user@b/", V11, &[("host", "b")]), Err(Kind::BadRequest));
        assert_eq!(host("http://a/", Version::HTTP_2, &[]), Ok("a".into()));
        assert_eq!(host("http://a/", Version::HTTP_2, &[("host", "A")]), Ok("a".into()));
        assert_eq!(host("http://a/", Version::HTTP_2, &[("host", "b")]), Err(Kind::BadRequest));
        assert_eq!(host("/", Version::HTTP_2, &[]), Err(Kind::BadRequest));
    }

    #[test]
    fn hosts() {
        for good in ["a", "example.com", "example.com.", "a_b.c:1", "127.0.0.1:80", "[::1]", "[::1]:8443", "a:", "xn--bcher-kva.de"]
        {
            assert!(valid_host(good), "{good}");
        }
        for bad in [
            "", ".", "a..b", ".a", "a b", "a/b", "a@b", "a:b", "a:99999", "a:1:2", "[::1", "[::1]x", "[nope]", "::1", "a%20b",
            "a,b", "a\"", "a<b", "a?b", "a#b", "a\\b", "a:+1", ":80", "é",
        ] {
            assert!(!valid_host(bad), "{bad}");
        }
        assert!(!valid_host(&"a".repeat(260)));
        assert_eq!(port_of("a:81"), Some(81));
        assert_eq!(port_of("[::1]:81"), Some(81));
        assert_eq!(port_of("[::1]"), None);
        assert_eq!(port_of("a"), None);
    }

    proptest! {
        #[test]
        fn no_host_panics(host in any::<String>()) {
            if valid_host(&host) {
                let harmless = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte);
                prop_assert!(host.bytes().all(harmless));
            }
            port_of(&host);
        }
    }
}
