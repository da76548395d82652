//! The rows of the comparison: what is asked of the proxies, by whom, and how well Slackwater must do (DESIGN.md, section 8).

use super::peers::{Peer, Reuse};

/// What a row is judged by. Ratios are Slackwater's figure over the best peer's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Judged {
    /// CPU per request.
    Cpu,
    /// Requests a second.
    Rate,
    P99,
    /// Resident memory for each idle connection, in bytes; line and goal are bytes too.
    Memory,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clients {
    /// Each keeps its connection.
    Kept,
    /// A connection for each request.
    Anew,
    /// Requests come at this part of Nginx's highest rate.
    Open(f64),
    /// HTTP/2 by h2load, so many streams at a time on each of 32 connections.
    Http2(u32),
}

#[derive(Clone, Debug)]
pub struct Row {
    pub id: &'static str,
    pub title: &'static str,
    /// Of the null responder's answer.
    pub bytes: usize,
    /// Fifty headers and cookies in, thirty out.
    pub headers: bool,
    pub post: usize,
    pub reuse: Reuse,
    pub full: bool,
    pub unix: bool,
    pub tls: bool,
    pub resume: bool,
    pub clients: Clients,
    pub connections: usize,
    pub idle: usize,
    /// A script of a real FPM instead of the null responder.
    pub fpm: Option<&'static str>,
    /// A file instead of PHP.
    pub file: Option<&'static str>,
    pub more: &'static str,
    pub workers: usize,
    pub judged: Judged,
    /// Below this the work is not done.
    pub line: f64,
    pub goal: f64,
    /// Whom it is judged by; none: by the best.
    pub against: Option<Peer>,
}

/// DESIGN.md asks for 20,000; the machine that the published figures are from allows a process 20,000 descriptors, some of which are needed otherwise.
const MANY: usize = 19_000;

const ROW: Row = Row {
    id: "",
    title: "",
    bytes: 1024,
    headers: false,
    post: 0,
    reuse: Reuse::Kept,
    full: false,
    unix: false,
    tls: false,
    resume: true,
    clients: Clients::Kept,
    connections: 64,
    idle: 0,
    fpm: None,
    file: None,
    more: "",
    workers: 1,
    judged: Judged::Cpu,
    line: 1.0,
    goal: 1.0,
    against: None,
};

pub fn all() -> Vec<Row> {
    use Clients::{Anew, Http2, Open};
    let row = |id, title, line, goal| Row { id, title, line, goal, ..ROW };
    let nginx = Some(Peer::Nginx);
    let (gzip, unmodified) = ("Accept-Encoding: gzip\r\n", "If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT\r\n");
    vec![
        row("1a", "1 KiB, kept FastCGI connections", 0.90, 0.80),
        Row { reuse: Reuse::Default, ..row("1b", "1 KiB, everyone's defaults, capacity told", 0.35, 0.30) },
        Row { reuse: Reuse::Off, ..row("1c", "1 KiB, one FastCGI connection per request", 1.0, 0.95) },
        Row { unix: true, ..row("1d", "1 KiB, kept, unix socket", 0.90, 0.80) },
        Row { full: true, ..row("1e", "1 KiB, kept, access log, metrics and ten routes", 0.90, 0.80) },
        Row { full: true, reuse: Reuse::Default, ..row("1f", "1 KiB, defaults, access log, metrics and ten routes", 0.35, 0.30) },
        Row { bytes: 64 * 1024, ..row("2a", "64 KiB response", 1.1, 1.0) },
        Row { bytes: 1024 * 1024, connections: 16, ..row("2b", "1 MiB response", 1.1, 1.0) },
        Row { post: 16 * 1024, against: nginx, ..row("2c", "16 KiB post", 1.1, 1.0) },
        Row { post: 1024 * 1024, connections: 16, against: nginx, ..row("2d", "1 MiB post", 1.1, 1.0) },
        Row { headers: true, ..row("2e", "Laravel-like: 50 headers and cookies in, 30 out", 0.90, 0.80) },
        Row {
            fpm: Some("/hello.php"),
            reuse: Reuse::Default,
            judged: Judged::Rate,
            ..row("3a", "FPM hello.php, 8 workers, defaults", 1.3, 1.4)
        },
        Row {
            fpm: Some("/burn.php?ms=5"),
            reuse: Reuse::Default,
            judged: Judged::Rate,
            ..row("3b", "FPM, 5 ms of CPU a request, 8 workers, defaults", 1.0, 1.0)
        },
        Row { file: Some("/10k.bin"), against: nginx, ..row("4a", "static 10 KiB", 1.0, 0.65) },
        Row { file: Some("/10m.bin"), connections: 16, against: nginx, ..row("4b", "static 10 MiB", 1.3, 1.0) },
        Row { file: Some("/10k.bin"), more: unmodified, against: nginx, ..row("4c", "304", 1.0, 0.9) },
        Row { file: Some("/page.html"), more: gzip, against: nginx, ..row("4d", "precompressed file", 1.0, 0.9) },
        Row { tls: true, ..row("5a", "TLS 1.3, kept connections, 1 KiB", 1.0, 0.9) },
        Row { tls: true, resume: false, clients: Anew, ..row("5b", "TLS 1.3, full handshake and a request", 1.0, 0.9) },
        Row { tls: true, clients: Anew, ..row("5c", "TLS 1.3, resumed handshake and a request", 1.0, 0.9) },
        Row { tls: true, clients: Http2(10), ..row("5d", "HTTP/2 over TLS, 32 connections, 10 streams", 1.0, 0.9) },
        Row { tls: true, clients: Http2(100), ..row("5e", "HTTP/2 over TLS, 32 connections, 100 streams", 1.0, 0.9) },
        Row { idle: 5_000, judged: Judged::Memory, ..row("6a", "5,000 idle connections", 12_000.0, 1_700.0) },
        Row { idle: MANY, judged: Judged::Memory, ..row("6b", "19,000 idle connections", 12_000.0, 1_700.0) },
        Row { idle: 5_000, tls: true, judged: Judged::Memory, ..row("6c", "5,000 idle connections, TLS", 24_000.0, 16_800.0) },
        Row { idle: MANY, tls: true, judged: Judged::Memory, ..row("6d", "19,000 idle connections, TLS", 24_000.0, 16_800.0) },
        Row { idle: MANY, judged: Judged::P99, ..row("6e", "64 active of 19,000 connections", 1.0, 1.0) },
        Row { clients: Open(0.5), judged: Judged::P99, ..row("7a", "at 50% of Nginx's highest rate", 1.0, 1.0) },
        Row { clients: Open(0.7), judged: Judged::P99, ..row("7b", "at 70% of Nginx's highest rate", 1.0, 1.0) },
        Row { clients: Open(0.9), judged: Judged::P99, ..row("7c", "at 90% of Nginx's highest rate", 1.0, 1.0) },
        Row { workers: 2, judged: Judged::Rate, ..row("9", "two workers on two cores, 1 KiB, kept", 1.0, 1.1) },
    ]
}

impl Row {
    /// Who can take part.
    pub fn has(&self, peer: Peer) -> bool {
        match peer {
            // It has no file server; one small answer from memory is what it can do.
            Peer::Haproxy => self.file.is_none() || self.id == "4a",
            // It makes a connection for each request.
            Peer::Caddy => !(self.reuse == Reuse::Kept && self.file.is_none() && matches!(self.id, "1a" | "1d" | "1e" | "9")),
            _ => true,
        }
    }

    /// What a client sends, body aside.
    pub fn head(&self) -> String {
        let path = self.file.or(self.fpm).unwrap_or("/index.php");
        let mut head = match self.post {
            0 => format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{}", self.more),
            bytes => format!(
                "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\nContent-Length: {bytes}\r\n"
            ),
        };
        if self.headers {
            head += "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n\
                     Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8\r\n\
                     Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br, zstd\r\n\
                     Referer: https://www.example.com/catalogue/shoes?page=2\r\nUpgrade-Insecure-Requests: 1\r\n\
                     Sec-Fetch-Dest: document\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Site: same-origin\r\nPriority: u=0, i\r\n\
                     X-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Port: 443\r\n\
                     X-Amzn-Trace-Id: Root=1-67891233-abcdef012345678912345678\r\n";
            for n in 0..16 {
                head += &format!("X-App-Header-{n}: value-of-header-number-{n}\r\n");
            }
            head += "Cookie: laravel_session=eyJpdiI6Ik1rVm1hR0psYzNRPSJ9eyJpdiI6Ik1rVm1hR0psYzNRPSJ9; XSRF-TOKEN=eyJpdiI6Ik1rVm1hR0psYzNRPSJ9";
            for n in 0..18 {
                head += &format!("; cookie{n}=value{n}");
            }
            head += "\r\n";
        }
        if self.clients == Clients::Anew {
            head += "Connection: close\r\n";
        }
        head + "\r\n"
    }
}
