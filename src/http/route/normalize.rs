//! The path as everything but REQUEST_URI sees it.

use std::borrow::Cow;

use crate::error::Kind;

/// Decodes the path of a request target once, merges slashes and resolves dot segments (RFC 3986, section 5.2.4).
///
/// As Nginx does with `merge_slashes`, and in its order: first decoded, so that `%2e%2e%2f` is what it looks like. A
/// `%25` becomes a plain `%` that nothing decodes again. Bytes that are no UTF-8 stay: PHP may want them. Nothing is
/// allocated where nothing changes.
///
/// Errors: `BadRequest` for what is no absolute path or broken percent-encoding; `BadPath` for NUL, a line break
/// (CVE-2019-11043 needed one before PATH_INFO) and a `..` that would leave the root.
pub fn normalize(raw: &str) -> Result<Cow<'_, [u8]>, Kind> {
    let bytes = raw.as_bytes();
    if bytes.is_empty() {
        return Ok(Cow::Borrowed(b"/"));
    }
    if bytes.first() != Some(&b'/') {
        return Err(Kind::BadRequest);
    }
    let mut previous = 0;
    let mut plain = true;
    for &byte in bytes {
        if matches!(byte, 0 | b'\r' | b'\n') {
            return Err(Kind::BadPath);
        }
        plain &= byte != b'%' && !(previous == b'/' && (byte == b'/' || byte == b'.'));
        previous = byte;
    }
    if plain {
        return Ok(Cow::Borrowed(bytes));
    }
    let decoded = decode(bytes)?;
    let mut path = Vec::with_capacity(decoded.len());
    let mut segments = decoded.split(|byte| *byte == b'/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        match segment {
            b"" | b"." => {}
            b".." => {
                let parent = path.iter().rposition(|byte| *byte == b'/').ok_or(Kind::BadPath)?;
                path.truncate(parent);
            }
            _ => {
                path.push(b'/');
                path.extend_from_slice(segment);
                continue;
            }
        }
        if is_last {
            path.push(b'/');
        }
    }
    Ok(if path == bytes { Cow::Borrowed(bytes) } else { Cow::Owned(path) })
}

fn decode(bytes: &[u8]) -> Result<Vec<u8>, Kind> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes.iter();
    while let Some(&byte) = rest.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || rest.next().copied().and_then(hex).ok_or(Kind::BadRequest);
        let byte = digit()? << 4 | digit()?;
        if matches!(byte, 0 | b'\r' | b'\n') {
            return Err(Kind::BadPath);
        }
        out.push(byte);
    }
    Ok(out)
}

fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ok(raw: &str) -> String {
        String::from_utf8(normalize(raw).unwrap().into_owned()).unwrap()
    }

    #[test]
    fn paths() {
        for (raw, want) in [
            ("", "/"),
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/a/b/", "/a/b/"),
            ("//a///b//", "/a/b/"),
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/a/..", "/"),
            ("/a/b/..", "/a/"),
            ("/a/b/.", "/a/b/"),
            ("/a//../b", "/b"),
            ("/a%2fb", "/a/b"),
            ("/a/%2e%2e/b", "/b"),
            ("/a%2F..%2fb", "/b"),
            ("/%25", "/%"),
            ("/%252e%252e/", "/%2e%2e/"),
            ("/.well-known/x", "/.well-known/x"),
            ("/...", "/..."),
            ("/a/..b", "/a/..b"),
            ("/%C3%A9", "/é"),
            ("/a%20b", "/a b"),
            ("/a\\..\\b", "/a\\..\\b"),
            ("/é", "/é"),
        ] {
            assert_eq!(ok(raw), want, "{raw}");
        }
        assert_eq!(normalize("/%ff").unwrap().as_ref(), b"/\xff");
    }

    #[test]
    fn refused() {
        for raw in ["/%", "/%4", "/%zz", "/%%41", "*", "a", "http://a/", "/%+1"] {
            assert_eq!(normalize(raw), Err(Kind::BadRequest), "{raw}");
        }
        for raw in ["/%00", "/a%0a.php", "/%0D", "/..", "/a/../..", "/%2e%2e/a", "/a/..//../b", "/\0", "/\n"] {
            assert_eq!(normalize(raw), Err(Kind::BadPath), "{raw}");
        }
    }

    #[test]
    fn nothing_is_allocated_where_nothing_changes() {
        for raw in ["/", "/a/b.css", "/.well-known/acme", "/a/..b"] {
            assert!(matches!(normalize(raw), Ok(Cow::Borrowed(_))), "{raw}");
        }
    }

    fn check(raw: &str) {
        let Ok(path) = normalize(raw) else { return };
        assert_eq!(path.first(), Some(&b'/'));
        assert!(!path.windows(2).any(|pair| pair == b"//"));
        assert!(!path.iter().any(|byte| matches!(byte, 0 | b'\n' | b'\r')));
        assert!(path.split(|byte| *byte == b'/').all(|segment| segment != b"." && segment != b".."));
        if let Ok(text) = str::from_utf8(&path)
            && !text.contains('%')
        {
            assert_eq!(normalize(text).unwrap(), path, "not idempotent");
        }
    }

    proptest! {
        #[test]
        fn any_text(raw in any::<String>()) {
            check(&raw);
            check(&format!("/{raw}"));
        }

        #[test]
        fn hostile_text(raw in "(/|\\.|\\.\\.|%2e|%2E|%2f|%5c|%00|%0a|%25|%|a|\\\\|%c0%af){0,12}") {
            check(&format!("/{raw}"));
        }
    }
}
