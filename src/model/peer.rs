//! Who is at the other end of a connection, and who the request says it is for.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

/// The two ends of an accepted TCP connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub remote: SocketAddr,
    pub local: SocketAddr,
    /// It speaks TLS with us.
    pub tls: bool,
    /// A PROXY header says that its client came to port 443: TLS has ended at the proxy.
    pub tls_before: bool,
    /// It had to say who its client is, and did not: neither do headers.
    pub is_untold: bool,
}

/// What PHP and the access log are told about the client, after `trusted_proxies` has been applied.
#[derive(Clone, Debug)]
pub struct ClientInfo {
    /// REMOTE_ADDR.
    pub address: IpAddr,
    /// REMOTE_PORT; 0 where a trusted proxy did not tell it.
    pub port: u16,
    /// Whether the client spoke https to the outermost trusted proxy.
    pub https: bool,
    /// SERVER_PORT as the client sees it.
    pub server_port: u16,
    /// The effective authority with its port where the client gave one: HTTP_HOST. Empty for HTTP/1.0 without Host.
    pub host: String,
}

/// Whether `address` is in one of the networks; an IPv4 address mapped into IPv6 counts as IPv4.
pub fn is_within(address: IpAddr, networks: &[IpNet]) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|net| net.contains(&address))
}

/// An authority's name alone: `example.com:8080` is `example.com`, `[::1]:8080` is `[::1]` (RFC 3875, section 4.1.14).
pub fn without_port(host: &str) -> &str {
    let end = match host.strip_prefix('[').and_then(|rest| memchr::memchr(b']', rest.as_bytes())) {
        Some(end) => Some(end + 2),
        None => memchr::memchr(b':', host.as_bytes()),
    };
    end.and_then(|end| host.get(..end)).unwrap_or(host)
}
