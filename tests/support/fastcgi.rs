//! The FastCGI wire by hand, and a client that asks one question. Knows nothing of the crate's own codec.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

pub const BEGIN_REQUEST: u8 = 1;
pub const ABORT_REQUEST: u8 = 2;
pub const END_REQUEST: u8 = 3;
pub const PARAMS: u8 = 4;
pub const STDIN: u8 = 5;
pub const STDOUT: u8 = 6;
pub const STDERR: u8 = 7;

pub const KEEP_CONN: u8 = 1;

pub const REQUEST_COMPLETE: u8 = 0;
pub const CANT_MPX_CONN: u8 = 1;
pub const OVERLOADED: u8 = 2;
pub const UNKNOWN_ROLE: u8 = 3;

/// The most that one record carries here: a multiple of eight that leaves room for padding, as in php-src.
pub const MOST: usize = 65_528;

/// Where an FPM listens; displayed as `endpoints` in the configuration wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FpmAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl fmt::Display for FpmAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FpmAddress::Tcp(address) => write!(f, "{address}"),
            FpmAddress::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// One record with padding to eight bytes. Panics above 65,535 bytes of content.
pub fn record(kind: u8, id: u16, content: &[u8]) -> Vec<u8> {
    record_of(1, kind, id, content)
}

/// As [`record`], of any version.
pub fn record_of(version: u8, kind: u8, id: u16, content: &[u8]) -> Vec<u8> {
    let [id_high, id_low] = id.to_be_bytes();
    let [high, low] = u16::try_from(content.len()).expect("the content fits into one record").to_be_bytes();
    let padding = if content.len() > MOST { 0 } else { content.len().next_multiple_of(8) - content.len() };
    let mut bytes = vec![version, kind, id_high, id_low, high, low, u8::try_from(padding).expect("below eight"), 0];
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len() + padding, 0);
    bytes
}

/// `content` in as many records as it takes; none for nothing.
pub fn records(kind: u8, id: u16, content: &[u8]) -> Vec<u8> {
    content.chunks(MOST).flat_map(|piece| record(kind, id, piece)).collect()
}

pub fn begin_request(id: u16, flags: u8) -> Vec<u8> {
    record(BEGIN_REQUEST, id, &[0, 1, flags, 0, 0, 0, 0, 0])
}

pub fn end_request(id: u16, app_status: u32, protocol_status: u8) -> Vec<u8> {
    let [a, b, c, d] = app_status.to_be_bytes();
    record(END_REQUEST, id, &[a, b, c, d, protocol_status, 0, 0, 0])
}

/// One name-value pair: lengths of one byte up to 127, of four above.
pub fn pair(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(name.len() + value.len() + 8);
    for len in [name.len(), value.len()] {
        match u8::try_from(len) {
            Ok(short @ ..128) => bytes.push(short),
            _ => bytes.extend_from_slice(&(u32::try_from(len).expect("a sane length") | 0x8000_0000).to_be_bytes()),
        }
    }
    bytes.extend_from_slice(name);
    bytes.extend_from_slice(value);
    bytes
}

/// A whole request, id 1; CONTENT_LENGTH is added for a body. All pairs go into one record.
pub fn request(params: &[(&str, &str)], body: &[u8], flags: u8) -> Vec<u8> {
    let mut pairs: Vec<u8> = params.iter().flat_map(|(name, value)| pair(name.as_bytes(), value.as_bytes())).collect();
    if !body.is_empty() {
        pairs.extend(pair(b"CONTENT_LENGTH", body.len().to_string().as_bytes()));
    }
    let mut bytes = begin_request(1, flags);
    bytes.extend(record(PARAMS, 1, &pairs));
    bytes.extend(record(PARAMS, 1, &[]));
    bytes.extend(records(STDIN, 1, body));
    bytes.extend(record(STDIN, 1, &[]));
    bytes
}

/// What came back up to END_REQUEST.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub app_status: u32,
    pub protocol_status: u8,
}

impl Answer {
    /// `Status`, or 200 where there is none.
    pub fn status(&self) -> u16 {
        self.header("Status").and_then(|value| value.split(' ').next()?.parse().ok()).unwrap_or(200)
    }

    pub fn header(&self, name: &str) -> Option<String> {
        let (head, _) = self.parts();
        head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    }

    pub fn body(&self) -> &[u8] {
        self.parts().1
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(self.body()).into_owned()
    }

    fn parts(&self) -> (String, &[u8]) {
        let end = self.stdout.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or(self.stdout.len());
        let body = self.stdout.get(end + 4..).unwrap_or_default();
        (String::from_utf8_lossy(&self.stdout[..end]).into_owned(), body)
    }
}

/// Reads to END_REQUEST; EOF before it is `UnexpectedEof`.
pub async fn read_answer(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Answer> {
    let mut answer = Answer::default();
    loop {
        let mut header = [0; 8];
        stream.read_exact(&mut header).await?;
        let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let mut content = vec![0; len + usize::from(header[6])];
        stream.read_exact(&mut content).await?;
        content.truncate(len);
        match header[1] {
            STDOUT => answer.stdout.extend(content),
            STDERR => answer.stderr.extend(content),
            END_REQUEST if len == 8 => {
                answer.app_status = u32::from_be_bytes([content[0], content[1], content[2], content[3]]);
                answer.protocol_status = content[4];
                return Ok(answer);
            }
            kind => {
                return Err(io::Error::other(format!("a record of type {kind} and {len} bytes")));
            }
        }
    }
}

/// Asks once, on a connection of its own.
pub async fn ask(address: &FpmAddress, params: &[(&str, &str)], body: &[u8]) -> io::Result<Answer> {
    let bytes = request(params, body, 0);
    match address {
        FpmAddress::Tcp(address) => exchange(TcpStream::connect(address).await?, &bytes).await,
        FpmAddress::Unix(path) => exchange(UnixStream::connect(path).await?, &bytes).await,
    }
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) -> io::Result<Answer> {
    stream.write_all(bytes).await?;
    read_answer(&mut stream).await
}

/// The parameters of a GET of `script` under `docroot`.
pub fn script_params(docroot: &str, script: &str, query: &str) -> Vec<(&'static str, String)> {
    let uri = if query.is_empty() { script.to_owned() } else { format!("{script}?{query}") };
    vec![
        ("GATEWAY_INTERFACE", "CGI/1.1".to_owned()),
        ("SERVER_PROTOCOL", "HTTP/1.1".to_owned()),
        ("REDIRECT_STATUS", "200".to_owned()),
        ("REQUEST_METHOD", "GET".to_owned()),
        ("SCRIPT_FILENAME", format!("{docroot}{script}")),
        ("SCRIPT_NAME", script.to_owned()),
        ("REQUEST_URI", uri),
        ("QUERY_STRING", query.to_owned()),
    ]
}
