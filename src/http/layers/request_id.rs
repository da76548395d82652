//! The id that a request carries through logs, receipts and PHP.

use std::{fmt, sync::Arc};

use http::HeaderMap;

use crate::model::names::X_REQUEST_ID;

/// An id taken over from a trusted proxy may be this long.
pub const MAX_LEN: usize = 128;

/// Cheap to clone. Ours are 128 random bits in lower-case hex: as unique as a UUID, and without its dashes a valid W3C trace id.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// A new one, from the thread's own generator: no lock, no system call.
    pub fn random() -> RequestId {
        let mut hex = [0; 32];
        for (pair, byte) in hex.chunks_exact_mut(2).zip(rand::random::<[u8; 16]>()) {
            pair.copy_from_slice(&[digit(byte >> 4), digit(byte & 15)]);
        }
        // Hex is always UTF-8.
        RequestId(str::from_utf8(&hex).unwrap_or_default().into())
    }

    /// `X-Request-ID` of a trusted proxy if there is exactly one and it is 1 to 128 of `A-Za-z0-9._-:/+=@`; else a
    /// new one. The charset keeps ids harmless in logs, shells and headers.
    pub fn of(headers: &HeaderMap, peer_is_trusted: bool) -> RequestId {
        if peer_is_trusted {
            let mut values = headers.get_all(X_REQUEST_ID).iter();
            if let (Some(value), None) = (values.next(), values.next())
                && let Ok(text) = value.to_str()
                && (1..=MAX_LEN).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:/+=@".contains(&byte))
            {
                return RequestId(text.into());
            }
        }
        RequestId::random()
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn digit(nibble: u8) -> u8 {
    if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(ids: &[&str]) -> HeaderMap {
        ids.iter().map(|id| (X_REQUEST_ID, http::HeaderValue::from_bytes(id.as_bytes()).unwrap())).collect()
    }

    #[test]
    fn a_trusted_id_is_kept() {
        let id = RequestId::of(&headers(&["Root=1-67891233-abc/def"]), true);
        assert_eq!(id.as_str(), "Root=1-67891233-abc/def");
        assert_eq!(RequestId::of(&headers(&[&"x".repeat(128)]), true).as_str().len(), 128);
    }

    #[test]
    fn anything_else_is_replaced() {
        let long = "x".repeat(129);
        for (ids, trusted) in [
            (&["abc"][..], false),
            (&[], true),
            (&["a", "b"], true),
            (&[""], true),
            (&["a b"], true),
            (&[&long], true),
            (&["é"], true),
            (&["a\"b"], true),
        ] {
            let id = RequestId::of(&headers(ids), trusted);
            assert_eq!(id.as_str().len(), 32, "{ids:?}");
            assert!(id.as_str().bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)));
        }
        assert_ne!(RequestId::random(), RequestId::random());
    }
}
