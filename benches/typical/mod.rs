//! A typical request and answer, for the benches.

use std::net::Ipv4Addr;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Version};
use slackwater::fastcgi::params::{Input, Script};

/// What a browser behind a load balancer sends.
const HEADERS: [(&str, &str); 15] = [
    ("host", "www.example.com"),
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"),
    ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"),
    ("accept-language", "en-US,en;q=0.5"),
    ("accept-encoding", "gzip, deflate, br, zstd"),
    ("referer", "https://www.example.com/catalogue/shoes?page=2"),
    ("cookie", "PHPSESSID=b2f6c1d4e8a94c0fb7d35e21a6c8f094; XSRF-TOKEN=eyJpdiI6Ik1rVm1hR0psYzNRPSJ9"),
    ("upgrade-insecure-requests", "1"),
    ("sec-fetch-dest", "document"),
    ("sec-fetch-mode", "navigate"),
    ("sec-fetch-site", "same-origin"),
    ("priority", "u=0, i"),
    ("cache-control", "max-age=0"),
    ("x-forwarded-for", "203.0.113.7"),
    ("x-forwarded-proto", "https"),
];

pub const HEAD: &[u8] = b"X-Powered-By: PHP/8.2.36\r\nSet-Cookie: PHPSESSID=b2f6c1d4e8a94c0fb7d35e21a6c8f094; path=/; HttpOnly\r\n\
    Expires: Thu, 19 Nov 1981 08:52:00 GMT\r\nCache-Control: no-store, no-cache, must-revalidate\r\nPragma: no-cache\r\n\
    Content-type: text/html; charset=UTF-8\r\n\r\n";

pub fn headers() -> HeaderMap {
    HEADERS.map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).into_iter().collect()
}

pub fn input(headers: &HeaderMap) -> Input<'_> {
    Input {
        method: &Method::GET,
        request_uri: "/catalogue/shoes/42?colour=red&size=9",
        query: "colour=red&size=9",
        version: Version::HTTP_11,
        headers,
        host: "www.example.com",
        content_length: None,
        remote_addr: Ipv4Addr::new(203, 0, 113, 7).into(),
        remote_port: 50_123,
        server_addr: (Ipv4Addr::new(10, 0, 0, 5), 8080).into(),
        server_port: 443,
        https: true,
        remote_user: "",
        request_id: "0190163d8694739b",
        extra: &[],
        script: Script { script_name: "/index.php", path_info: "", document_root: "/var/www/html/public" },
    }
}
