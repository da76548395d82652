//! HTTP/1 or HTTP/2 by the client's first bytes (RFC 9113, section 3.4). The caller sets the deadline.

use std::io;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;

use super::io::Io;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    Http2,
}

/// `None` as long as both are possible.
fn decide(bytes: &[u8]) -> Option<Protocol> {
    let n = bytes.len().min(PREFACE.len());
    if bytes[..n] != PREFACE[..n] {
        Some(Protocol::Http1)
    } else if n == PREFACE.len() {
        Some(Protocol::Http2)
    } else {
        None
    }
}

/// `None`: the client closed without a byte.
pub async fn sniff(io: &mut Io) -> io::Result<Option<Protocol>> {
    // A connection that is opened ahead of its first request holds no buffer.
    std::future::poll_fn(|cx| io.poll_readable(cx)).await;
    let mut bytes = BytesMut::with_capacity(4 * 1024);
    loop {
        if io.read_buf(&mut bytes).await? == 0 {
            if bytes.is_empty() {
                return Ok(None);
            }
            // Less than a preface and no more to come: HTTP/1 says what is wrong with it.
            io.unread(bytes.freeze());
            return Ok(Some(Protocol::Http1));
        }
        if let Some(protocol) = decide(&bytes) {
            io.unread(bytes.freeze());
            return Ok(Some(protocol));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decides_as_soon_as_it_can() {
        assert_eq!(decide(b"G"), Some(Protocol::Http1));
        assert_eq!(decide(b"P"), None);
        assert_eq!(decide(b"PO"), Some(Protocol::Http1));
        assert_eq!(decide(&PREFACE[..23]), None);
        assert_eq!(decide(PREFACE), Some(Protocol::Http2));
        assert_eq!(decide(b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"), Some(Protocol::Http1));
    }
}
