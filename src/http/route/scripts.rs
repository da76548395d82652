//! Which paths are PHP, and which PHP may run.

use crate::model::{Site, site::ScriptPattern};

/// Splits a path at the FIRST declared script: its name and PATH_INFO. On bytes, never on a lower-cased copy, whose
/// length may differ. A name that is no UTF-8 is not declared.
pub fn declared_script<'a>(site: &Site, path: &'a [u8]) -> Option<(&'a str, &'a [u8])> {
    let front = site.front.as_deref();
    let patterns = site.scripts.iter().map(|ScriptPattern(pattern)| pattern.as_str());
    patterns
        .chain(front)
        .filter_map(|pattern| matched_len(pattern.as_bytes(), path))
        .min()
        .and_then(|end| path.split_at_checked(end))
        .and_then(|(name, path_info)| Some((str::from_utf8(name).ok()?, path_info)))
}

/// The pattern that is the whole name, `front` among them, without a star.
pub(super) fn is_declared_exactly(site: &Site, name: &str) -> bool {
    site.front.as_deref() == Some(name) || site.scripts.iter().any(|pattern| super::is_exact(pattern) && pattern.0 == name)
}

/// How much of the path the pattern matches, up to a `/` or the end. A star never crosses a `/`, so the pattern's
/// number of slashes says which prefix there is to match.
fn matched_len(pattern: &[u8], path: &[u8]) -> Option<usize> {
    if !pattern.contains(&b'*') {
        let rest = path.strip_prefix(pattern)?;
        return (rest.is_empty() || rest.starts_with(b"/")).then_some(pattern.len());
    }
    let slashes = memchr::memchr_iter(b'/', pattern).count();
    let end = memchr::memchr_iter(b'/', path).nth(slashes).unwrap_or(path.len());
    let prefix = path.get(..end)?;
    let mut segments = prefix.split(|byte| *byte == b'/');
    let all = pattern.split(|byte| *byte == b'/').all(|part| segments.next().is_some_and(|segment| glob(part, segment)));
    (all && segments.next().is_none()).then_some(end)
}

/// `*` stands for any bytes; a leading one, as in a shell, for no dot file.
fn glob(pattern: &[u8], segment: &[u8]) -> bool {
    if pattern.starts_with(b"*") && segment.starts_with(b".") {
        return false;
    }
    let (mut p, mut s) = (0, 0);
    // Where the last star stood and how far it had eaten: one level of going back is enough, so the time is bounded
    // by the product of the lengths.
    let mut star = None;
    while s < segment.len() {
        if pattern.get(p) == Some(&b'*') {
            star = Some((p, s));
            p += 1;
        } else if pattern.get(p) == segment.get(s) {
            p += 1;
            s += 1;
        } else if let Some((at, eaten)) = star {
            star = Some((at, eaten + 1));
            p = at + 1;
            s = eaten + 1;
        } else {
            return false;
        }
    }
    pattern.get(p..).is_none_or(|rest| rest.iter().all(|byte| *byte == b'*'))
}

/// What editors, package managers and people put behind a file's name when they keep the old one.
const COPIES: [&[u8]; 10] = [b"bak", b"backup", b"old", b"orig", b"save", b"swp", b"swo", b"tmp", b"dist", b"dpkg-old"];

/// Whether any segment has, in any case, a suffix that somebody has PHP run for: `.php`, `.php5`, `.phtml`, `.phar`,
/// `.phps`, `.pht`. Also with what editors, file systems and `cgi.fix_pathinfo` forgive after it: dots, spaces, `~`,
/// further segments (`/upload.jpg/x.php`, `/x.php/y.jpg`); and the copies that are left beside a script, whose source nobody should read
/// (`/config.php.bak`).
pub fn looks_like_php(path: &[u8]) -> bool {
    path.split(|byte| *byte == b'/').any(|segment| {
        let end = segment.iter().rposition(u8::is_ascii_alphanumeric).map_or(0, |last| last + 1);
        let mut name = segment.get(..end).unwrap_or_default();
        if let Some(dot) = name.iter().rposition(|byte| *byte == b'.')
            && COPIES.iter().any(|copy| name.get(dot + 1..).is_some_and(|suffix| suffix.eq_ignore_ascii_case(copy)))
        {
            name = name.get(..dot).unwrap_or_default();
        }
        let Some(dot) = name.iter().rposition(|byte| *byte == b'.') else { return false };
        let suffix = name.get(dot + 1..).unwrap_or_default();
        let Some((ph, rest)) = suffix.split_at_checked(2) else { return false };
        if !ph.eq_ignore_ascii_case(b"ph") {
            return false;
        }
        let known: [&[u8]; 5] = [b"p", b"tml", b"ar", b"ps", b"t"];
        let numbered = |rest: &[u8]| {
            rest.split_first().is_some_and(|(p, digits)| p.eq_ignore_ascii_case(&b'p') && digits.iter().all(u8::is_ascii_digit))
        };
        known.iter().any(|known| rest.eq_ignore_ascii_case(known)) || numbered(rest)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::tests::site_with, *};

    #[test]
    fn the_first_declared_script_splits() {
        let site = site_with(&["/index.php", "/wp-admin/*.php", "/a.php/b.php"]);
        let split =
            |path: &'static str| declared_script(&site, path.as_bytes()).map(|(name, info)| (name, str::from_utf8(info).unwrap()));
        assert_eq!(split("/index.php"), Some(("/index.php", "")));
        assert_eq!(split("/index.php/foo"), Some(("/index.php", "/foo")));
        assert_eq!(split("/index.php/"), Some(("/index.php", "/")));
        assert_eq!(split("/index.php/index.php/x"), Some(("/index.php", "/index.php/x")));
        assert_eq!(split("/index.phpx"), None);
        assert_eq!(split("/INDEX.PHP"), None);
        assert_eq!(split("/wp-admin/post.php/x/y.php"), Some(("/wp-admin/post.php", "/x/y.php")));
        assert_eq!(split("/wp-admin/a/b.php"), None);
        assert_eq!(split("/wp-admin/.hidden.php"), None);
        assert_eq!(split("/wp-admin/a.php.b.php"), Some(("/wp-admin/a.php.b.php", "")));
        assert_eq!(split("/a.php/b.php/c"), Some(("/a.php/b.php", "/c")));
        assert_eq!(split("/upload.jpg/index.php"), None);
        assert_eq!(declared_script(&site, b"/wp-admin/\xff.php"), None);
        assert_eq!(declared_script(&site, b"/index.php/\xff").unwrap().1, b"/\xff");
    }

    #[test]
    fn globs() {
        for (pattern, segment, want) in [
            ("*.php", "a.php", true),
            ("*.php", ".php", false),
            ("*.php", "a.phpx", false),
            ("a*", "a", true),
            ("*a*b", "xaxxb", true),
            ("*a*b", "xaxxbx", false),
            ("**", "x", true),
            ("*", "", true),
            ("a*a", "a", false),
        ] {
            assert_eq!(glob(pattern.as_bytes(), segment.as_bytes()), want, "{pattern} {segment}");
        }
    }

    #[test]
    fn spellings_of_php() {
        for path in [
            "/x.php",
            "/x.PHP",
            "/x.pHp5",
            "/x.php7",
            "/x.phtml",
            "/x.PHAR",
            "/x.pht",
            "/x.phps",
            "/x.php.",
            "/x.php ",
            "/x.php. .",
            "/x.php/",
            "/x.php/y",
            "/upload.jpg/x.php",
            "/x.php\\",
            "/x.php~",
            "/.php",
            "/x.jpg.php",
            "/x.php::",
            "/x.php\u{a0}",
            "/wp-config.php.bak",
            "/x.PHP5.Old",
            "/x.phtml.swp~",
        ] {
            assert!(looks_like_php(path.as_bytes()), "{path}");
        }
        for path in [
            "/",
            "/x.css",
            "/php",
            "/x.php.jpg",
            "/x.phpx",
            "/photo.ph",
            "/x.phone",
            "/a.b/php",
            "/x.",
            "/php/x.js",
            "/x.css.bak",
            "/php.bak",
            "/x.old",
        ] {
            assert!(!looks_like_php(path.as_bytes()), "{path}");
        }
    }

    proptest! {
        #[test]
        fn a_split_loses_no_byte(path in prop::collection::vec(any::<u8>(), 0..40)) {
            let site = site_with(&["/*", "/a/*b*", "*"]);
            if let Some((name, info)) = declared_script(&site, &path) {
                prop_assert_eq!([name.as_bytes(), info].concat(), path.clone());
            }
            looks_like_php(&path);
        }
    }
}
