//! A path as text for expressions, and back again: bytes that are no UTF-8 are characters of a private plane meanwhile.

use std::borrow::Cow;

/// U+10FF80 to U+10FFFF, the end of Supplementary Private Use Area B, stand for the bytes 0x80 to 0xff.
const PRIVATE: u32 = 0x10_ff00;

fn to_byte(c: char) -> Option<u8> {
    u32::from(c).checked_sub(PRIVATE).and_then(|byte| u8::try_from(byte).ok()).filter(|byte| *byte >= 0x80)
}

fn to_char(byte: &u8) -> Option<char> {
    char::from_u32(PRIVATE + u32::from(*byte))
}

pub fn to_text(path: &[u8]) -> Cow<'_, str> {
    // Their first two bytes, which nothing else that is likely begins with.
    let is_plain = memchr::memmem::find(path, b"\xf4\x8f").is_none();
    if let (true, Ok(text)) = (is_plain, str::from_utf8(path)) {
        return Cow::Borrowed(text);
    }
    let mut text = String::with_capacity(path.len() + 8);
    for chunk in path.utf8_chunks() {
        for c in chunk.valid().chars() {
            match to_byte(c) {
                None => text.push(c),
                // One that a client has sent is its bytes, like any others.
                Some(_) => text.extend(c.encode_utf8(&mut [0; 4]).as_bytes().iter().filter_map(to_char)),
            }
        }
        text.extend(chunk.invalid().iter().filter_map(to_char));
    }
    Cow::Owned(text)
}

pub fn to_bytes(text: &str) -> Cow<'_, [u8]> {
    if !text.chars().any(|c| to_byte(c).is_some()) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut bytes = Vec::with_capacity(text.len());
    for c in text.chars() {
        match to_byte(c) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Cow::Owned(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nothing_is_lost(bytes in prop::collection::vec(any::<u8>(), 0..32), private in 0x10_ff00_u32..0x10_ffff) {
            let c = char::from_u32(private).unwrap().to_string();
            for path in [bytes.clone(), [bytes.as_slice(), c.as_bytes()].concat()] {
                let text = to_text(&path).into_owned();
                let back = to_bytes(&text).into_owned();
                prop_assert_eq!(back, path);
            }
        }
    }
}
