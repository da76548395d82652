//! Preconditions and ranges of a request: RFC 9110, sections 13 and 14. Pure.

use std::time::UNIX_EPOCH;

use http::{
    HeaderMap, HeaderName,
    header::{IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, RANGE},
};

use super::range::{self, Ranges};

/// What a file is compared by.
#[derive(Debug)]
pub(super) struct Validators {
    /// Strong, with its quotes.
    pub etag: String,
    /// Seconds since 1970.
    pub modified: i64,
    pub size: u64,
}

/// The conditional headers as sent; none costs anything where it is missing.
#[derive(Debug, Default)]
pub(super) struct Conditions {
    if_match: Option<String>,
    if_none_match: Option<String>,
    if_modified_since: Option<String>,
    if_unmodified_since: Option<String>,
    if_range: Option<String>,
    range: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Whole,
    /// Offset and length; at least one.
    Ranges(Vec<(u64, u64)>),
    NotModified,
    PreconditionFailed,
    Unsatisfiable,
}

impl Conditions {
    pub fn of(headers: &HeaderMap) -> Conditions {
        let single = |name: HeaderName| {
            let mut values = headers.get_all(name).iter();
            // Two of what may stand once: neither is to be trusted, and ignoring means the whole file.
            let first = values.next().filter(|_| values.next().is_none())?;
            first.to_str().ok().map(|text| text.trim().to_owned())
        };
        Conditions {
            if_match: list(headers, &IF_MATCH),
            if_none_match: list(headers, &IF_NONE_MATCH),
            if_modified_since: single(IF_MODIFIED_SINCE),
            if_unmodified_since: single(IF_UNMODIFIED_SINCE),
            if_range: headers.contains_key(IF_RANGE).then(|| single(IF_RANGE).unwrap_or_default()),
            range: single(RANGE),
        }
    }

    /// The order of RFC 9110, section 13.2.2. For GET and HEAD; a range counts for GET alone.
    pub fn decide(&self, file: &Validators, is_get: bool) -> Decision {
        if let Some(tags) = &self.if_match {
            if !any_tag(tags, &file.etag, false) {
                return Decision::PreconditionFailed;
            }
        } else if let Some(date) = self.if_unmodified_since.as_deref().and_then(seconds)
            && file.modified > date
        {
            return Decision::PreconditionFailed;
        }
        if let Some(tags) = &self.if_none_match {
            if any_tag(tags, &file.etag, true) {
                return Decision::NotModified;
            }
        } else if let Some(date) = self.if_modified_since.as_deref().and_then(seconds)
            && file.modified <= date
        {
            return Decision::NotModified;
        }
        let Some(range) = self.range.as_deref().filter(|_| is_get && self.range_is_current(file)) else {
            return Decision::Whole;
        };
        match range::parse(range, file.size) {
            Ranges::Ignored => Decision::Whole,
            Ranges::Unsatisfiable => Decision::Unsatisfiable,
            Ranges::Satisfiable(ranges) => Decision::Ranges(ranges),
        }
    }

    /// If-Range: a strong comparison of tags, or the very same date.
    fn range_is_current(&self, file: &Validators) -> bool {
        match self.if_range.as_deref() {
            None => true,
            Some(tag) if tag.starts_with('"') => tag == file.etag,
            Some(date) => seconds(date) == Some(file.modified),
        }
    }
}

/// A list may be spread over several lines. Text that is none shows as what no tag of ours contains.
fn list(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    let mut lines = headers.get_all(name).iter().map(|line| String::from_utf8_lossy(line.as_bytes()));
    let mut all = lines.next()?.into_owned();
    for line in lines {
        all.push(',');
        all.push_str(&line);
    }
    Some(all)
}

/// Whether a list of entity tags, or `*`, has this one. A weak tag never equals in the strong comparison.
fn any_tag(list: &str, etag: &str, weak: bool) -> bool {
    let mut rest = list.trim();
    if rest == "*" {
        return true;
    }
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let is_weak = rest.starts_with("W/");
        let tag = rest.strip_prefix("W/").unwrap_or(rest);
        // A tag may hold a comma, but no quote.
        let Some(end) = tag.strip_prefix('"').and_then(|inner| inner.find('"')) else { return false };
        let Some((tag, after)) = tag.split_at_checked(end + 2) else { return false };
        if tag == etag && (weak || !is_weak) {
            return true;
        }
        rest = after;
    }
}

/// A date that is none is ignored.
fn seconds(date: &str) -> Option<i64> {
    let since = httpdate::parse_http_date(date).ok()?.duration_since(UNIX_EPOCH).ok()?;
    i64::try_from(since.as_secs()).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    const EARLIER: &str = "Sun, 06 Nov 1994 08:49:36 GMT";
    const LATER: &str = "Sun, 06 Nov 1994 08:49:38 GMT";

    fn decide(headers: &[(HeaderName, &str)]) -> Decision {
        let headers: HeaderMap = headers.iter().fold(HeaderMap::new(), |mut map, (name, value)| {
            map.append(name, value.parse().unwrap());
            map
        });
        let file = Validators { etag: "\"1-64\"".into(), modified: 784_111_777, size: 100 };
        Conditions::of(&headers).decide(&file, true)
    }

    #[test]
    fn tags() {
        for (tags, want) in [
            ("\"1-64\"", Decision::NotModified),
            ("W/\"1-64\"", Decision::NotModified),
            ("*", Decision::NotModified),
            ("\"x\", \"a,b\" ,\"1-64\"", Decision::NotModified),
            ("\"x\"", Decision::Whole),
            ("1-64", Decision::Whole),
            ("", Decision::Whole),
            ("\"1-64", Decision::Whole),
            ("\"x\" \"", Decision::Whole),
        ] {
            assert_eq!(decide(&[(IF_NONE_MATCH, tags)]), want, "{tags}");
        }
        for (tags, want) in [
            ("\"1-64\"", Decision::Whole),
            ("*", Decision::Whole),
            ("W/\"1-64\"", Decision::PreconditionFailed),
            ("\"x\"", Decision::PreconditionFailed),
            ("\"x\",\"1-64\"", Decision::Whole),
        ] {
            assert_eq!(decide(&[(IF_MATCH, tags)]), want, "{tags}");
        }
        assert_eq!(decide(&[(IF_NONE_MATCH, "\"x\""), (IF_NONE_MATCH, "\"1-64\"")]), Decision::NotModified);
    }

    #[test]
    fn dates() {
        assert_eq!(decide(&[(IF_MODIFIED_SINCE, DATE)]), Decision::NotModified);
        assert_eq!(decide(&[(IF_MODIFIED_SINCE, LATER)]), Decision::NotModified);
        assert_eq!(decide(&[(IF_MODIFIED_SINCE, EARLIER)]), Decision::Whole);
        assert_eq!(decide(&[(IF_MODIFIED_SINCE, "yesterday")]), Decision::Whole);
        assert_eq!(decide(&[(IF_UNMODIFIED_SINCE, EARLIER)]), Decision::PreconditionFailed);
        assert_eq!(decide(&[(IF_UNMODIFIED_SINCE, DATE)]), Decision::Whole);
    }

    #[test]
    fn precedence() {
        let (other, same) = ("\"x\"", "\"1-64\"");
        // A tag overrides its date.
        assert_eq!(decide(&[(IF_NONE_MATCH, other), (IF_MODIFIED_SINCE, DATE)]), Decision::Whole);
        assert_eq!(decide(&[(IF_MATCH, same), (IF_UNMODIFIED_SINCE, EARLIER)]), Decision::Whole);
        assert_eq!(decide(&[(IF_MATCH, other), (IF_NONE_MATCH, same)]), Decision::PreconditionFailed);
        assert_eq!(decide(&[(IF_NONE_MATCH, same), (RANGE, "bytes=0-1")]), Decision::NotModified);
    }

    #[test]
    fn if_range() {
        let ranged = Decision::Ranges(vec![(0, 2)]);
        let range = (RANGE, "bytes=0-1");
        assert_eq!(decide(std::slice::from_ref(&range)), ranged);
        assert_eq!(decide(&[range.clone(), (IF_RANGE, "\"1-64\"")]), ranged);
        assert_eq!(decide(&[range.clone(), (IF_RANGE, DATE)]), ranged);
        for stale in ["W/\"1-64\"", "\"x\"", EARLIER, LATER, "nonsense", ""] {
            assert_eq!(decide(&[range.clone(), (IF_RANGE, stale)]), Decision::Whole, "{stale}");
        }
        assert_eq!(decide(&[range.clone(), range.clone()]), Decision::Whole);
        assert_eq!(decide(&[(RANGE, "bytes=100-")]), Decision::Unsatisfiable);
    }

    proptest! {
        #[test]
        fn no_header_panics(text in "[ -~]{0,40}", tags in "(W/|\"|,| |\\*|1-64){0,8}") {
            decide(&[(IF_MATCH, &tags), (IF_NONE_MATCH, &text), (RANGE, &text)]);
            decide(&[(IF_NONE_MATCH, &tags), (RANGE, &format!("bytes={text}"))]);
            decide(&[(IF_MODIFIED_SINCE, &text), (IF_RANGE, &tags), (RANGE, "bytes=0-")]);
        }
    }
}
