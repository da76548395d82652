//! HTTP/2 by the frame (RFC 9113), apart from the crate that the proxy uses, so that it can say what that one never would.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A peer that says nothing for so long says nothing more.
const SILENCE: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// What the peer has answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The stream's header block began with this byte: 0x88 is `:status 200` (RFC 7541, appendix A).
    Answered(u8),
    Reset(u32),
    GoAway(u32),
    /// FIN or RST without a word.
    Closed,
    Silent,
}

impl Verdict {
    pub fn is_refusal(&self) -> bool {
        matches!(self, Verdict::Reset(_) | Verdict::GoAway(_) | Verdict::Closed)
    }
}

pub struct Wire {
    stream: TcpStream,
    read: BytesMut,
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a frame's length").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header block of literals that are not indexed, without Huffman coding (RFC 7541, section 6.2.2).
pub fn block(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.push(0);
        text(&mut bytes, name);
        text(&mut bytes, value);
    }
    bytes
}

/// A string with its length (RFC 7541, section 5.2).
pub fn text(bytes: &mut Vec<u8>, text: &[u8]) {
    integer(bytes, 0, 7, text.len());
    bytes.extend_from_slice(text);
}

/// RFC 7541, section 5.1.
pub fn integer(bytes: &mut Vec<u8>, pattern: u8, prefix: u32, value: usize) {
    let most = (1_usize << prefix) - 1;
    if value < most {
        bytes.push(pattern | u8::try_from(value).expect("below the prefix"));
        return;
    }
    bytes.push(pattern | u8::try_from(most).expect("the prefix"));
    let mut rest = value - most;
    while rest >= 128 {
        bytes.push(u8::try_from(rest % 128).expect("seven bits") | 128);
        rest /= 128;
    }
    bytes.push(u8::try_from(rest).expect("seven bits"));
}

/// GET of this path, whole.
pub fn get(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, END_STREAM | END_HEADERS, stream, &request("GET", path))
}

/// The block of a request as it should be.
pub fn request(method: &str, path: &str) -> Vec<u8> {
    block(&[(b":method", method.as_bytes()), (b":scheme", b"http"), (b":path", path.as_bytes()), (b":authority", b"example.com")])
}

/// `:status`, which an answer's header block begins with: indexed, or a literal of digits with or without Huffman coding (RFC 7541, appendices A and B).
pub fn status(block: &[u8]) -> Option<u16> {
    const INDEXED: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    match *block {
        [first @ 0x88..=0x8e, ..] => INDEXED.get(usize::from(first) - 0x88).copied(),
        [0x48 | 0x08 | 0x18, 3, a, b, c, ..] => std::str::from_utf8(&[a, b, c]).ok()?.parse().ok(),
        [0x48 | 0x08 | 0x18, length @ 0x82..=0x83, ref rest @ ..] => {
            let bits: Vec<u8> =
                rest.iter().take(usize::from(length & 0x7f)).flat_map(|byte| (0..8).rev().map(move |n| byte >> n & 1)).collect();
            let number = |bits: &[u8]| bits.iter().fold(0_u16, |number, bit| number << 1 | u16::from(*bit));
            let (mut at, mut status) = (0, 0);
            for _ in 0..3 {
                let short = number(bits.get(at..at + 5)?);
                // 0 to 2 have five bits, 3 to 9 six.
                let (digit, length) = if short < 3 { (short, 5) } else { (number(bits.get(at..at + 6)?).checked_sub(22)?, 6) };
                (at, status) = (at + length, status * 10 + digit);
            }
            Some(status)
        }
        _ => None,
    }
}

impl Wire {
    /// Connected, with the preface and these settings sent.
    pub async fn open(address: SocketAddr, settings: &[(u16, u32)]) -> Wire {
        Wire::over(TcpStream::connect(address).await.expect("it listens"), settings).await
    }

    pub async fn over(stream: TcpStream, settings: &[(u16, u32)]) -> Wire {
        stream.set_nodelay(true).expect("a socket");
        let mut wire = Wire { stream, read: BytesMut::new() };
        let settings: Vec<u8> =
            settings.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()).collect();
        wire.send(&[PREFACE, &frame(SETTINGS, 0, 0, &settings), &frame(SETTINGS, ACK, 0, b"")].concat()).await;
        wire
    }

    /// False once the peer takes no more.
    pub async fn send(&mut self, bytes: &[u8]) -> bool {
        matches!(tokio::time::timeout(SILENCE, self.stream.write_all(bytes)).await, Ok(Ok(())))
    }

    /// `Ok(None)` at its end, `Err` where it says nothing.
    pub async fn next(&mut self) -> Result<Option<Frame>, ()> {
        loop {
            if let Some(&[a, b, c, kind, flags, s0, s1, s2, s3]) = self.read.first_chunk::<9>() {
                let length = u32::from_be_bytes([0, a, b, c]) as usize;
                if self.read.len() >= 9 + length {
                    self.read.advance(9);
                    let payload = self.read.split_to(length).to_vec();
                    return Ok(Some(Frame { kind, flags, stream: u32::from_be_bytes([s0, s1, s2, s3]), payload }));
                }
            }
            match tokio::time::timeout(SILENCE, self.stream.read_buf(&mut self.read)).await {
                Err(_) => return Err(()),
                Ok(Ok(0) | Err(_)) => return Ok(None),
                Ok(Ok(_)) => {}
            }
        }
    }

    /// The status of `stream`'s answer, or what became of it instead.
    pub async fn answer(&mut self, stream: u32) -> Result<u16, String> {
        loop {
            match self.next().await {
                Ok(Some(frame)) if frame.kind == HEADERS && frame.stream == stream => {
                    return status(&frame.payload).ok_or_else(|| format!("no status in {:02x?}", frame.payload));
                }
                Ok(Some(frame)) if matches!(frame.kind, RST_STREAM | GOAWAY) => return Err(format!("{frame:?}")),
                Ok(Some(_)) => {}
                other => return Err(format!("{other:?}")),
            }
        }
    }

    /// What becomes of `stream`, or of the connection.
    pub async fn verdict(&mut self, stream: u32) -> Verdict {
        loop {
            let frame = match self.next().await {
                Err(()) => return Verdict::Silent,
                Ok(None) => return Verdict::Closed,
                Ok(Some(frame)) => frame,
            };
            let code = |at: usize| frame.payload.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
            match frame.kind {
                HEADERS if frame.stream == stream => return Verdict::Answered(frame.payload.first().copied().unwrap_or(0)),
                RST_STREAM if frame.stream == stream => return Verdict::Reset(code(0)),
                // NO_ERROR says that it is about to go, and goes on.
                GOAWAY if code(4) != 0 => return Verdict::GoAway(code(4)),
                _ => {}
            }
        }
    }
}
