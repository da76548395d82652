//! Where an FPM endpoint or an admin socket listens.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr};

/// A TCP address or the path of a unix socket, written `127.0.0.1:9000`, `[::1]:9000` or `unix:/run/php/php-fpm.sock`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Address {
    /// `None` for a unix socket.
    pub fn ip(&self) -> Option<std::net::IpAddr> {
        match self {
            Address::Tcp(address) => Some(address.ip()),
            Address::Unix(_) => None,
        }
    }

    /// An unspecified address (`0.0.0.0:9001`, `[::]:9001`) stands for that port of each endpoint.
    pub fn at(&self, endpoint: &Address) -> Address {
        match (self, endpoint.ip()) {
            (Address::Tcp(listen), Some(ip)) if listen.ip().is_unspecified() => Address::Tcp(SocketAddr::new(ip, listen.port())),
            _ => self.clone(),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            if !path.starts_with('/') {
                return Err(format!("`{text}`: the path of a unix socket must be absolute, as in \"unix:/run/php/php-fpm.sock\""));
            }
            // sun_path holds 108 bytes with the closing NUL (unix(7)).
            if path.len() > 107 {
                return Err(format!("`{text}`: the path of a unix socket is longer than 107 bytes"));
            }
            return Ok(Address::Unix(PathBuf::from(path)));
        }
        text.parse().map(Address::Tcp).map_err(|_| {
            format!("`{text}` is not an address; write \"10.0.0.1:9000\", \"[::1]:9000\" or \"unix:/run/php/php-fpm.sock\"")
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => address.fmt(f),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}
