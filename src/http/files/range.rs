//! `Range: bytes=...` and the answers to it: RFC 9110, section 14. Pure.

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue,
    header::{CONTENT_RANGE, CONTENT_TYPE},
};

use super::body::Segment;

/// More ranges than any client needs are answered with the whole file (CVE-2011-3192).
const MAX_RANGES: usize = 8;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ranges {
    /// Not understood, or not worth it: the whole file.
    Ignored,
    Unsatisfiable,
    /// Offset and length of each, in the order asked for.
    Satisfiable(Vec<(u64, u64)>),
}

pub(super) fn parse(header: &str, size: u64) -> Ranges {
    let Some((unit, specs)) = header.split_once('=') else { return Ranges::Ignored };
    if !unit.eq_ignore_ascii_case("bytes") {
        return Ranges::Ignored;
    }
    let mut ranges = Vec::new();
    let mut number = 0;
    for spec in specs.split(',').map(|spec| spec.trim_matches([' ', '\t'])) {
        // Empty list elements are allowed (RFC 9110, section 5.6.1).
        if spec.is_empty() {
            continue;
        }
        number += 1;
        if number > MAX_RANGES {
            return Ranges::Ignored;
        }
        match one(spec, size) {
            None => return Ranges::Ignored,
            Some(None) => {}
            Some(Some(range)) => ranges.push(range),
        }
    }
    if number == 0 {
        return Ranges::Ignored;
    }
    if ranges.is_empty() {
        return Ranges::Unsatisfiable;
    }
    // Overlaps that add up to more than the file, as Nginx has it: the file is cheaper.
    let total = ranges.iter().fold(0_u64, |sum, (_, len)| sum.saturating_add(*len));
    if total > size { Ranges::Ignored } else { Ranges::Satisfiable(ranges) }
}

/// `None`: not a range. `Some(None)`: one that the file does not have.
fn one(spec: &str, size: u64) -> Option<Option<(u64, u64)>> {
    let (first, last) = spec.split_once('-')?;
    if first.is_empty() {
        let suffix = digits(last)?;
        // The last bytes of an empty file are there, all none of them (RFC 9110, section 14.1.2): no range, the whole of it.
        if suffix > 0 && size == 0 {
            return None;
        }
        let suffix = suffix.min(size);
        return Some((suffix > 0).then_some((size - suffix, suffix)));
    }
    let first = digits(first)?;
    let last = if last.is_empty() { u64::MAX } else { digits(last)? };
    if last < first {
        return None;
    }
    Some((first < size).then(|| (first, last.min(size - 1) - first + 1)))
}

/// Digits alone: `parse` would take a sign. A number too large for 64 bits is beyond any file.
fn digits(text: &str) -> Option<u64> {
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().unwrap_or(u64::MAX))
}

/// Body and headers of a 206. One range is sent plain, several as multipart/byteranges.
pub(super) fn partial(ranges: &[(u64, u64)], size: u64, content_type: HeaderValue) -> (Vec<Segment>, HeaderMap) {
    let mut headers = HeaderMap::new();
    let content_range = |(offset, len): (u64, u64)| format!("bytes {offset}-{}/{size}", (offset + len).saturating_sub(1));
    let file = |(offset, len): (u64, u64)| Segment::File { offset, len };
    if let [range] = ranges {
        headers.insert(CONTENT_TYPE, content_type);
        if let Ok(value) = HeaderValue::from_str(&content_range(*range)) {
            headers.insert(CONTENT_RANGE, value);
        }
        return (vec![file(*range)], headers);
    }
    // Not to be guessed, or a file could hold it.
    let boundary = format!("{:032x}", rand::random::<u128>());
    let part_type = content_type.to_str().unwrap_or("application/octet-stream");
    let mut segments = Vec::with_capacity(ranges.len() * 2 + 1);
    for range in ranges {
        let head = format!("\r\n--{boundary}\r\nContent-Type: {part_type}\r\nContent-Range: {}\r\n\r\n", content_range(*range));
        segments.push(Segment::Bytes(Bytes::from(head)));
        segments.push(file(*range));
    }
    segments.push(Segment::Bytes(Bytes::from(format!("\r\n--{boundary}--\r\n"))));
    if let Ok(value) = HeaderValue::from_str(&format!("multipart/byteranges; boundary={boundary}")) {
        headers.insert(CONTENT_TYPE, value);
    }
    (segments, headers)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges() {
        let some = |ranges: &[(u64, u64)]| Ranges::Satisfiable(ranges.to_vec());
        for (header, want) in [
            ("bytes=0-0", some(&[(0, 1)])),
            ("BYTES=0-99", some(&[(0, 100)])),
            ("bytes=90-", some(&[(90, 10)])),
            ("bytes=90-1000", some(&[(90, 10)])),
            ("bytes=-10", some(&[(90, 10)])),
            ("bytes=-1000", some(&[(0, 100)])),
            ("bytes=-0", Ranges::Unsatisfiable),
            ("bytes=100-", Ranges::Unsatisfiable),
            ("bytes=99999999999999999999999-", Ranges::Unsatisfiable),
            ("bytes=0-99999999999999999999999", some(&[(0, 100)])),
            ("bytes=0-1, 5-6 ,,-1", some(&[(0, 2), (5, 2), (99, 1)])),
            ("bytes=0-1,200-", some(&[(0, 2)])),
            ("bytes=5-4", Ranges::Ignored),
            ("bytes=", Ranges::Ignored),
            ("bytes=,", Ranges::Ignored),
            ("bytes=a-b", Ranges::Ignored),
            ("bytes=+1-2", Ranges::Ignored),
            ("bytes=-", Ranges::Ignored),
            ("bytes=1", Ranges::Ignored),
            ("lines=0-1", Ranges::Ignored),
            ("bytes 0-1", Ranges::Ignored),
            ("bytes=0-,0-", Ranges::Ignored),
            ("bytes=0-0,1-1,2-2,3-3,4-4,5-5,6-6,7-7", some(&[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1)])),
            ("bytes=0-0,1-1,2-2,3-3,4-4,5-5,6-6,7-7,8-8", Ranges::Ignored),
        ] {
            assert_eq!(parse(header, 100), want, "{header}");
        }
        assert_eq!(parse("bytes=0-", 0), Ranges::Unsatisfiable);
        assert_eq!(parse("bytes=-5", 0), Ranges::Ignored);
    }

    proptest! {
        #[test]
        fn every_range_lies_in_the_file(header in "bytes=[0-9,-]{0,30}", size in prop_oneof![0..200_u64, Just(u64::MAX)]) {
            if let Ranges::Satisfiable(ranges) = parse(&header, size) {
                prop_assert!(!ranges.is_empty() && ranges.len() <= MAX_RANGES);
                for (offset, len) in ranges {
                    prop_assert!(len > 0 && offset.checked_add(len).is_some_and(|end| end <= size));
                }
            }
        }
    }
}
