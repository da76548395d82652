//! Raw HTTP/1.1: bytes out, and an answer in which nothing is smoothed over.
//!
//! [`Connection`] serves anything that reads and writes: TCP, the admin socket, a TLS stream.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// The longest head that is read.
const HEAD_LIMIT: usize = 1 << 20;

/// An answer that arrived whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub version: String,
    pub status: u16,
    pub reason: String,
    /// In the order and the spelling in which they came.
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
    pub framing: Framing,
    pub trailers: Vec<(String, String)>,
    /// Interim answers (1xx) that came before.
    pub interim: Vec<u16>,
    /// False: the answer came before the request's body was out, so the connection is of no further use.
    pub sent_whole: bool,
}

/// How the end of the body was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// 204, 304, or the answer to HEAD.
    None,
    ContentLength,
    Chunked,
    Eof,
}

/// Why there is no whole answer.
#[derive(Debug)]
pub enum HttpError {
    /// FIN before the end. `got`: what had come of this answer, head and body as they stood on the wire.
    EndedEarly { got: Bytes },
    /// RST, or another failure of the socket. `got` as above.
    Broken { error: io::Error, got: Bytes },
    /// Not HTTP/1.1.
    Malformed(String),
}

impl HttpError {
    pub fn is_reset(&self) -> bool {
        matches!(self, HttpError::Broken { error, .. }
            if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted))
    }

    /// FIN before a single byte of the answer.
    pub fn is_unanswered(&self) -> bool {
        matches!(self, HttpError::EndedEarly { got } if got.is_empty())
    }
}

impl fmt::Display for HttpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HttpError::EndedEarly { got } => write!(f, "ended early, after {} bytes", got.len()),
            HttpError::Broken { error, got } => write!(f, "{error}, after {} bytes", got.len()),
            HttpError::Malformed(what) => write!(f, "malformed: {what}"),
        }
    }
}

impl std::error::Error for HttpError {}

impl Response {
    /// The first header of that name, in whatever case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// All headers of that name, in order.
    pub fn header_all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON; panics with the answer if it is none.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {} {:?}", self.status, self.text()))
    }

    pub fn colour(&self) -> Option<&str> {
        self.header("X-Colour")
    }

    /// Whether the connection may carry another request.
    pub fn keeps_alive(&self) -> bool {
        let has = |word: &str| {
            let values = self.header_all("Connection");
            values.iter().flat_map(|value| value.split(',')).any(|token| token.trim().eq_ignore_ascii_case(word))
        };
        self.sent_whole && self.framing != Framing::Eof && !has("close") && (self.version == "HTTP/1.1" || has("keep-alive"))
    }
}

/// The bytes of a request. Host and, for a body, Content-Length are added unless `headers` has them.
pub fn request(method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let has = |name: &str| headers.iter().any(|(found, _)| found.eq_ignore_ascii_case(name));
    let mut head = format!("{method} {target} HTTP/1.1\r\n");
    if !has("Host") {
        head += "Host: example.com\r\n";
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !has("Content-Length") && !has("Transfer-Encoding") && (!body.is_empty() || ["POST", "PUT", "PATCH"].contains(&method)) {
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

/// The bytes of a request whose body goes in these chunks.
pub fn chunked_request(method: &str, target: &str, headers: &[(&str, &str)], chunks: &[&[u8]]) -> Vec<u8> {
    let headers = [headers, &[("Transfer-Encoding", "chunked")]].concat();
    let mut bytes = request(method, target, &headers, &[]);
    for chunk in chunks {
        bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        bytes.extend_from_slice(chunk);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}

/// One request on a connection of its own.
pub async fn send(
    address: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Response, HttpError> {
    let mut connection = Connection::open(address).await.map_err(|error| HttpError::Broken { error, got: Bytes::new() })?;
    connection.exchange(method, &request(method, target, headers, body)).await
}

/// GET on a connection of its own.
pub async fn get(address: SocketAddr, target: &str) -> Result<Response, HttpError> {
    send(address, "GET", target, &[("Connection", "close")], &[]).await
}

/// A client connection with what has been read beyond the last answer.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    buffer: BytesMut,
    /// What of the current answer has been taken out of the buffer.
    taken: BytesMut,
}

impl Connection<TcpStream> {
    pub async fn open(address: SocketAddr) -> io::Result<Connection<TcpStream>> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Connection::over(stream))
    }

    /// Whether the peer's FIN or RST has arrived, asked of the kernel and not of what was polled last.
    pub fn peer_has_closed(&self) -> bool {
        let mut byte = 0_u8;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: one byte of our own stack, on a socket that is open.
        let got = unsafe { libc::recv(self.stream.as_raw_fd(), (&raw mut byte).cast(), 1, flags) };
        got == 0 || (got < 0 && io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock)
    }

    /// Whether bytes are there that belong to no answer asked for.
    pub fn has_unasked_bytes(&self) -> bool {
        let mut byte = 0_u8;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: as above.
        let got = unsafe { libc::recv(self.stream.as_raw_fd(), (&raw mut byte).cast(), 1, flags) };
        !self.buffer.is_empty() || got > 0
    }

    /// Closes with a reset, as a client that vanished.
    pub fn reset(self) {
        let _ = self.stream.set_zero_linger();
    }
}

impl Connection<UnixStream> {
    pub async fn open_unix(path: &Path) -> io::Result<Connection<UnixStream>> {
        Ok(Connection::over(UnixStream::connect(path).await?))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub fn over(stream: S) -> Connection<S> {
        Connection { stream, buffer: BytesMut::new(), taken: BytesMut::new() }
    }

    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// Writes exactly these bytes.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(bytes.as_ref()).await?;
        self.stream.flush().await
    }

    /// Sends FIN; the answer can still be read.
    pub async fn finish(&mut self) -> io::Result<()> {
        self.stream.shutdown().await
    }

    /// GET and its answer, on this connection.
    pub async fn get(&mut self, target: &str) -> Result<Response, HttpError> {
        self.exchange("GET", &request("GET", target, &[], &[])).await
    }

    /// Writes a request while it already reads the answer, so that an early answer to a large body is seen.
    pub async fn exchange(&mut self, method: &str, request: &[u8]) -> Result<Response, HttpError> {
        // A small request cannot block; writing it whole first spares the split.
        if request.len() <= 16 * 1024 {
            let sent = self.send(request).await;
            let answer = self.read_response(method).await;
            return match (sent, answer) {
                (Err(error), Err(failed)) if failed.is_unanswered() => Err(HttpError::Broken { error, got: Bytes::new() }),
                (_, answer) => answer,
            };
        }
        let (reader, mut writer) = tokio::io::split(&mut self.stream);
        let buffer = std::mem::take(&mut self.buffer);
        let mut answers = Connection { stream: tokio::io::join(reader, tokio::io::sink()), buffer, taken: BytesMut::new() };
        let (sent, answer) = {
            let read = answers.read_response(method);
            let write = async {
                writer.write_all(request).await?;
                writer.flush().await
            };
            let mut sent = None;
            tokio::pin!(read, write);
            let answer = loop {
                tokio::select! {
                    answer = &mut read => break answer,
                    done = &mut write, if sent.is_none() => sent = Some(done),
                }
            };
            (sent, answer)
        };
        self.buffer = answers.buffer;
        match (sent, answer) {
            (sent, Ok(answer)) => Ok(Response { sent_whole: matches!(sent, Some(Ok(()))), ..answer }),
            (Some(Err(error)), Err(failed)) if failed.is_unanswered() => Err(HttpError::Broken { error, got: Bytes::new() }),
            (_, failed) => failed,
        }
    }

    /// The next answer, whole; `method` is that of its request (HEAD has no body).
    pub async fn read_response(&mut self, method: &str) -> Result<Response, HttpError> {
        self.taken.clear();
        let mut interim = Vec::new();
        let mut response = loop {
            let response = self.read_head().await?;
            if (100..200).contains(&response.status) && response.status != 101 {
                interim.push(response.status);
                self.taken.clear();
                continue;
            }
            break response;
        };
        response.interim = interim;
        let te = response.header("Transfer-Encoding").map(str::to_owned);
        let length = response.header("Content-Length").map(str::to_owned);
        if method == "HEAD" || matches!(response.status, 101 | 204 | 304) {
            response.framing = Framing::None;
        } else if let Some(te) = te {
            if !te.eq_ignore_ascii_case("chunked") || length.is_some() {
                return Err(HttpError::Malformed(format!("Transfer-Encoding {te:?} with Content-Length {length:?}")));
            }
            response.framing = Framing::Chunked;
            (response.body, response.trailers) = self.read_chunked().await?;
        } else if let Some(length) = length {
            if response.header_all("Content-Length").len() > 1 {
                return Err(HttpError::Malformed("Content-Length twice".to_owned()));
            }
            let length = length.parse().map_err(|_| HttpError::Malformed(format!("Content-Length {length:?}")))?;
            response.framing = Framing::ContentLength;
            response.body = self.take(length).await?;
        } else {
            response.framing = Framing::Eof;
            response.body = self.read_to_end().await?;
        }
        Ok(response)
    }

    /// As many answers as there are methods, in order.
    pub async fn read_pipelined(&mut self, methods: &[&str]) -> Result<Vec<Response>, HttpError> {
        let mut answers = Vec::new();
        for method in methods {
            answers.push(self.read_response(method).await?);
        }
        Ok(answers)
    }

    /// The head of the next answer only, its body left unread: for streams and slow readers.
    pub async fn read_head(&mut self) -> Result<Response, HttpError> {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            if self.buffer.len() > HEAD_LIMIT {
                return Err(HttpError::Malformed("a head without an end".to_owned()));
            }
            self.more().await?;
        };
        let head = self.buffer.split_to(end);
        self.taken.extend_from_slice(&head);
        parse_head(&head)
    }

    /// The next chunk of a chunked body; empty: the last one, its trailers skipped.
    pub async fn read_chunk(&mut self) -> Result<Bytes, HttpError> {
        let (chunk, _) = self.chunk().await?;
        Ok(chunk)
    }

    /// Exactly `n` bytes as they stand on the wire.
    pub async fn take(&mut self, n: usize) -> Result<Bytes, HttpError> {
        while self.buffer.len() < n {
            self.more().await?;
        }
        let bytes = self.buffer.split_to(n).freeze();
        Ok(bytes)
    }

    /// All up to FIN, which must come: a reset is an error.
    pub async fn read_to_end(&mut self) -> Result<Bytes, HttpError> {
        loop {
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) => return Ok(self.buffer.split().freeze()),
                Ok(_) => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
    }

    /// Until the peer closes: `Ok(true)` by FIN, `Ok(false)` by reset, `Err` if `deadline` passes or bytes come.
    pub async fn wait_closed(&mut self, deadline: Duration) -> Result<bool, String> {
        match tokio::time::timeout(deadline, self.read_to_end()).await {
            Ok(Ok(rest)) if rest.is_empty() => Ok(true),
            Ok(Ok(rest)) => Err(format!("{:?} before the close", String::from_utf8_lossy(&rest))),
            Ok(Err(_)) => Ok(false),
            Err(_) => Err(format!("still open after {deadline:?}")),
        }
    }

    async fn read_chunked(&mut self) -> Result<(Bytes, Vec<(String, String)>), HttpError> {
        let mut body = BytesMut::new();
        loop {
            let (chunk, trailers) = self.chunk().await?;
            if chunk.is_empty() {
                return Ok((body.freeze(), trailers));
            }
            body.extend_from_slice(&chunk);
        }
    }

    async fn chunk(&mut self) -> Result<(Bytes, Vec<(String, String)>), HttpError> {
        let line = self.line().await?;
        let digits = line.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(digits, 16).map_err(|_| HttpError::Malformed(format!("chunk size {line:?}")))?;
        let mut trailers = Vec::new();
        if size == 0 {
            loop {
                let line = self.line().await?;
                if line.is_empty() {
                    return Ok((Bytes::new(), trailers));
                }
                trailers.push(split_header(&line)?);
            }
        }
        let mut bytes = self.take(size + 2).await?;
        if bytes[size..] != *b"\r\n" {
            return Err(HttpError::Malformed("a chunk longer than it says".to_owned()));
        }
        bytes.truncate(size);
        self.taken.extend_from_slice(&bytes);
        Ok((bytes, trailers))
    }

    async fn line(&mut self) -> Result<String, HttpError> {
        loop {
            if let Some(at) = self.buffer.windows(2).position(|two| two == b"\r\n") {
                let line = self.buffer.split_to(at);
                self.buffer.advance(2);
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            self.more().await?;
        }
    }

    async fn more(&mut self) -> Result<(), HttpError> {
        match self.stream.read_buf(&mut self.buffer).await {
            Ok(0) => Err(HttpError::EndedEarly { got: self.got() }),
            Ok(_) => Ok(()),
            Err(error) => Err(self.broken(error)),
        }
    }

    fn broken(&self, error: io::Error) -> HttpError {
        HttpError::Broken { error, got: self.got() }
    }

    fn got(&self) -> Bytes {
        [&self.taken[..], &self.buffer[..]].concat().into()
    }
}

fn parse_head(head: &[u8]) -> Result<Response, HttpError> {
    let text = String::from_utf8_lossy(head);
    let mut lines = text.trim_end_matches("\r\n").split("\r\n");
    let first = lines.next().unwrap_or_default();
    let malformed = || HttpError::Malformed(format!("status line {first:?}"));
    let mut parts = first.splitn(3, ' ');
    let version = parts.next().filter(|version| version.starts_with("HTTP/1.")).ok_or_else(malformed)?.to_owned();
    let status = parts.next().and_then(|status| status.parse().ok()).ok_or_else(malformed)?;
    let reason = parts.next().unwrap_or_default().to_owned();
    let headers = lines.map(split_header).collect::<Result<_, _>>()?;
    let framing = Framing::None;
    let (trailers, interim) = (Vec::new(), Vec::new());
    Ok(Response { version, status, reason, headers, body: Bytes::new(), framing, trailers, interim, sent_whole: true })
}

fn split_header(line: impl AsRef<str>) -> Result<(String, String), HttpError> {
    let line = line.as_ref();
    match line.split_once(':') {
        Some((name, value)) if !name.is_empty() && !name.contains([' ', '\t']) => Ok((name.to_owned(), value.trim().to_owned())),
        _ => Err(HttpError::Malformed(format!("header line {line:?}"))),
    }
}
