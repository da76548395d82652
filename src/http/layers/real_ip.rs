//! Who the client is, from the connection and what trusted proxies say of it. Pure.
//!
//! Of a peer that is not in `trusted_proxies` nothing counts. `Forwarded` (RFC 7239) is read only where no
//! `X-Forwarded-*` of ours to read is there: load balancers set the latter, and most pass a client's own `Forwarded` on.

use std::{
    borrow::Cow,
    net::{IpAddr, SocketAddr},
};

use http::{HeaderMap, HeaderName, header::FORWARDED};
use ipnet::IpNet;

use super::guards::{port_of, valid_host};
use crate::model::{
    names::{X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PORT, X_FORWARDED_PROTO},
    peer::{ClientInfo, Peer, is_within},
};

/// Hops that are looked at; a chain longer than that is nobody's.
const MAX_HOPS: usize = 64;

/// `tls`: the peer speaks TLS with us. `host`: the effective authority, from `guards::effective_host`.
///
/// From a trusted peer:
/// - address: `X-Forwarded-For` from the right, the first that is not trusted; where all are, the leftmost. Something
///   that is no address ends the walk at the hop before it.
/// - https, host, port: the last value of `X-Forwarded-Proto`, `-Host` and `-Port`, which the nearest proxy has set.
///   A host that is not valid is ignored. Without a port: the one in a forwarded host or, where the scheme was
///   forwarded, in Host, else the scheme's.
pub fn client(peer: &Peer, tls: bool, headers: &HeaderMap, host: &str, trusted_proxies: &[IpNet]) -> ClientInfo {
    let direct = ClientInfo {
        address: peer.remote.ip().to_canonical(),
        port: peer.remote.port(),
        https: tls,
        server_port: peer.local.port(),
        host: host.to_owned(),
    };
    if peer.is_untold || !is_within(direct.address, trusted_proxies) {
        return direct;
    }
    let x_forwarded = [X_FORWARDED_FOR, X_FORWARDED_PROTO, X_FORWARDED_HOST, X_FORWARDED_PORT];
    let told = if x_forwarded.iter().any(|name| headers.contains_key(name)) {
        x_forwarded_headers(headers, trusted_proxies)
    } else if headers.contains_key(FORWARDED) {
        forwarded_header(headers, trusted_proxies)
    } else {
        return direct;
    };
    let https = told.https.unwrap_or(tls);
    let scheme_port = if https { 443 } else { 80 };
    let server_port = told.port.unwrap_or_else(|| match (&told.host, told.https) {
        (Some(host), _) => port_of(host).unwrap_or(scheme_port),
        (None, Some(_)) => port_of(host).unwrap_or(scheme_port),
        (None, None) => direct.server_port,
    });
    let (address, port) = told.client.unwrap_or((direct.address, direct.port));
    ClientInfo { address, port, https, server_port, host: told.host.unwrap_or(direct.host) }
}

#[derive(Default)]
struct Told {
    client: Option<(IpAddr, u16)>,
    https: Option<bool>,
    host: Option<String>,
    port: Option<u16>,
}

fn x_forwarded_headers(headers: &HeaderMap, trusted_proxies: &[IpNet]) -> Told {
    let hops = headers.get_all(X_FORWARDED_FOR).iter().rev().flat_map(|line| line.as_bytes().rsplit(|byte| *byte == b','));
    let mut client = None;
    for hop in hops.take(MAX_HOPS) {
        let Some(found) = str::from_utf8(hop).ok().and_then(|text| node(text.trim())) else { break };
        client = Some(found);
        if !is_within(found.0, trusted_proxies) {
            break;
        }
    }
    Told {
        client,
        https: last_value(headers, &X_FORWARDED_PROTO).and_then(scheme),
        host: last_value(headers, &X_FORWARDED_HOST).filter(|host| valid_host(host)).map(str::to_owned),
        port: last_value(headers, &X_FORWARDED_PORT).and_then(|port| port.parse().ok()).filter(|port| *port != 0),
    }
}

fn last_value<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let line = headers.get_all(name).iter().next_back()?.to_str().ok()?;
    line.rsplit(',').next().map(str::trim).filter(|value| !value.is_empty())
}

fn scheme(text: &str) -> Option<bool> {
    match text {
        _ if text.eq_ignore_ascii_case("https") => Some(true),
        _ if text.eq_ignore_ascii_case("http") => Some(false),
        _ => None,
    }
}

/// An address as `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]` or `[2001:db8::1]:80`. RFC 7239's
/// `unknown` and `_hidden` are none.
fn node(text: &str) -> Option<(IpAddr, u16)> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some((address.to_canonical(), 0));
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some((address.ip().to_canonical(), address.port()));
    }
    let inner = text.strip_prefix('[')?;
    let (address, port) = inner.split_once(']')?;
    let address: IpAddr = address.parse().ok()?;
    // An obfuscated port, `_name`, is no port and no reason to doubt the address.
    (port.is_empty() || port.starts_with(":_")).then(|| (address.to_canonical(), 0))
}

/// Each element was added by the hop to its right and describes that hop's client, so `proto` and `host` of the
/// leftmost element that a trusted hop added are what the client itself said.
fn forwarded_header(headers: &HeaderMap, trusted_proxies: &[IpNet]) -> Told {
    let mut told = Told::default();
    let Some(elements) = forwarded_elements(headers) else { return told };
    for element in elements.iter().rev().take(MAX_HOPS) {
        if let Some(https) = element.proto.as_deref().and_then(scheme) {
            told.https = Some(https);
        }
        if let Some(host) = element.host.as_deref().filter(|host| valid_host(host)) {
            told.host = Some(host.to_owned());
        }
        let Some(found) = element.node.as_deref().and_then(node) else { break };
        told.client = Some(found);
        if !is_within(found.0, trusted_proxies) {
            break;
        }
    }
    told
}

#[derive(Default)]
struct Element<'a> {
    node: Option<Cow<'a, str>>,
    proto: Option<Cow<'a, str>>,
    host: Option<Cow<'a, str>>,
}

impl Element<'_> {
    fn is_empty(&self) -> bool {
        self.node.is_none() && self.proto.is_none() && self.host.is_none()
    }
}

/// RFC 7239, section 4. `None` where any part is malformed: what stands left of a broken quote could be anything.
fn forwarded_elements(headers: &HeaderMap) -> Option<Vec<Element<'_>>> {
    let mut elements = Vec::new();
    for line in headers.get_all(FORWARDED) {
        let mut rest = line.to_str().ok()?;
        let mut element = Element::default();
        loop {
            rest = rest.trim_start();
            let mut other = None;
            // Empty elements and pairs are allowed (RFC 9110, section 5.6.1).
            if !rest.starts_with([',', ';']) && !rest.is_empty() {
                let (name, after) = rest.split_once('=')?;
                let (value, after) = value(after)?;
                rest = after.trim_start();
                let field = match name {
                    _ if name.eq_ignore_ascii_case("for") => &mut element.node,
                    _ if name.eq_ignore_ascii_case("proto") => &mut element.proto,
                    _ if name.eq_ignore_ascii_case("host") => &mut element.host,
                    _ => &mut other,
                };
                // A name twice in one element is an error, or an attempt.
                if field.replace(value).is_some() {
                    return None;
                }
            }
            if let Some(after) = rest.strip_prefix(';') {
                rest = after;
                continue;
            }
            if !element.is_empty() {
                elements.push(std::mem::take(&mut element));
            }
            match rest.strip_prefix(',') {
                Some(after) => rest = after,
                None if rest.is_empty() => break,
                None => return None,
            }
        }
    }
    Some(elements)
}

/// A token or a quoted string, and what follows.
fn value(text: &str) -> Option<(Cow<'_, str>, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ';', ' ', '\t']).unwrap_or(text.len());
        let (token, rest) = text.split_at(end);
        return (!token.is_empty() && !token.contains('"')).then_some((Cow::Borrowed(token), rest));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return Some((Cow::Owned(value), quoted.get(at + 1..).unwrap_or_default())),
            '\\' => value.push(chars.next()?.1),
            _ => value.push(char),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ask(remote: &str, headers: &[(&str, &str)]) -> ClientInfo {
        let peer = Peer {
            remote: remote.parse().unwrap(),
            local: "10.0.0.2:8080".parse().unwrap(),
            tls: false,
            tls_before: false,
            is_untold: false,
        };
        let map = headers.iter().map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap())).collect();
        let trusted = ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
        client(&peer, false, &map, "site.test", &trusted)
    }

    fn address(headers: &[(&str, &str)]) -> String {
        ask("10.0.0.1:5", headers).address.to_string()
    }

    #[test]
    fn nothing_counts_from_a_stranger() {
        let info = ask(
            "192.0.2.1:5",
            &[
                ("x-forwarded-for", "1.1.1.1"),
                ("x-forwarded-proto", "https"),
                ("x-forwarded-host", "evil"),
                ("x-forwarded-port", "1"),
                ("forwarded", "for=1.1.1.1;proto=https"),
            ],
        );
        assert_eq!(info.address.to_string(), "192.0.2.1");
        assert_eq!((info.port, info.https, info.server_port, &*info.host), (5, false, 8080, "site.test"));
    }

    #[test]
    fn the_walk_is_from_the_right() {
        assert_eq!(address(&[("x-forwarded-for", "6.6.6.6, 192.0.2.9, 10.1.1.1")]), "192.0.2.9");
        assert_eq!(address(&[("x-forwarded-for", "6.6.6.6, 192.0.2.9"), ("x-forwarded-for", "10.1.1.1")]), "192.0.2.9");
        assert_eq!(address(&[("x-forwarded-for", "10.3.3.3,10.2.2.2")]), "10.3.3.3");
        assert_eq!(address(&[("x-forwarded-for", "6.6.6.6, unknown, 10.2.2.2")]), "10.2.2.2");
        assert_eq!(address(&[("x-forwarded-for", "6.6.6.6, \"x\"")]), "10.0.0.1");
        assert_eq!(address(&[("x-forwarded-for", "")]), "10.0.0.1");
        assert_eq!(address(&[("x-forwarded-for", "[2001:db8::1]:77")]), "2001:db8::1");
        assert_eq!(address(&[("x-forwarded-for", "2001:db8::1, fd00::1")]), "2001:db8::1");
        assert_eq!(address(&[("x-forwarded-for", "::ffff:192.0.2.1")]), "192.0.2.1");
        let info = ask("[::ffff:10.0.0.1]:5", &[("x-forwarded-for", "192.0.2.1:77")]);
        assert_eq!((info.address.to_string(), info.port), ("192.0.2.1".into(), 77));
        assert_eq!(ask("10.0.0.1:5", &[]).port, 5);
        assert_eq!(ask("10.0.0.1:5", &[("x-forwarded-for", "192.0.2.1")]).port, 0);
    }

    #[test]
    fn scheme_host_and_port() {
        let told = |headers: &[(&str, &str)]| {
            let info = ask("10.0.0.1:5", headers);
            (info.https, info.server_port, info.host)
        };
        assert_eq!(told(&[("x-forwarded-proto", "http, HTTPS")]), (true, 443, "site.test".into()));
        assert_eq!(told(&[("x-forwarded-proto", "ftp")]), (false, 8080, "site.test".into()));
        assert_eq!(told(&[("x-forwarded-proto", "https"), ("x-forwarded-port", "8443")]).1, 8443);
        assert_eq!(told(&[("x-forwarded-host", "a.test, b.test:81")]), (false, 81, "b.test:81".into()));
        assert_eq!(told(&[("x-forwarded-host", "b test")]).2, "site.test");
        assert_eq!(told(&[("x-forwarded-port", "0")]).1, 8080);
    }

    #[test]
    fn forwarded_is_read_where_there_is_nothing_else() {
        let header = r#"for=6.6.6.6;proto=http, For="[2001:db8::7]:4711";Proto=https;host="a.test:444", for=10.9.9.9;proto=http"#;
        let info = ask("10.0.0.1:5", &[("forwarded", header)]);
        assert_eq!(info.address.to_string(), "2001:db8::7");
        assert_eq!((info.port, info.https, info.server_port, &*info.host), (4711, true, 444, "a.test:444"));
        assert_eq!(address(&[("forwarded", "for=1.1.1.1"), ("x-forwarded-for", "192.0.2.1")]), "192.0.2.1");
        assert_eq!(address(&[("forwarded", "for=6.6.6.6, for=_hidden, for=10.1.1.1")]), "10.1.1.1");
        assert_eq!(address(&[("forwarded", "for=unknown")]), "10.0.0.1");
        assert_eq!(address(&[("forwarded", r#"for="6.6.6.6, for=192.0.2.1"#)]), "10.0.0.1");
        assert_eq!(address(&[("forwarded", r#"for="a\"b, for=6.6.6.6", for=192.0.2.1"#)]), "192.0.2.1");
        assert_eq!(address(&[("forwarded", "for=1.1.1.1;for=2.2.2.2")]), "10.0.0.1");
        assert_eq!(address(&[("forwarded", "for=192.0.2.1 ; proto=https ,, ")]), "192.0.2.1");
    }

    proptest! {
        #[test]
        fn a_stranger_left_of_a_real_client_is_never_believed(noise in "[ -~]{0,40}") {
            prop_assert_eq!(address(&[("x-forwarded-for", &format!("{noise}, 192.0.2.1"))]), "192.0.2.1");
            let found = address(&[("forwarded", &format!("{noise}, for=192.0.2.1"))]);
            prop_assert!(found == "192.0.2.1" || found == "10.0.0.1", "{}", found);
        }
    }
}
