//! The headers by which PHP tells the web server what to do with an answer; no client sees them. `X-Accel-Redirect`: which file is to be sent in its
//! place, after PHP has looked whether the client may have it. `X-Accel-Buffering` is `fastcgi::response`'s.

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::route;
use crate::error::{Error, Kind};

const REDIRECT: HeaderName = HeaderName::from_static("x-accel-redirect");
const LIMIT_RATE: HeaderName = HeaderName::from_static("x-accel-limit-rate");
const CHARSET: HeaderName = HeaderName::from_static("x-accel-charset");
/// For Nginx's cache, which there is none of here.
const EXPIRES: HeaderName = HeaderName::from_static("x-accel-expires");

/// Those of PHP's headers that stay, as in Nginx; all others are those of the file.
const KEPT: [HeaderName; 6] = [
    header::CONTENT_TYPE,
    header::CONTENT_DISPOSITION,
    header::ACCEPT_RANGES,
    header::SET_COOKIE,
    header::CACHE_CONTROL,
    header::EXPIRES,
];

/// Where the answer leads: a path, normalized, and a query.
#[derive(Debug, PartialEq, Eq)]
pub struct Redirect {
    pub path: Vec<u8>,
    pub query: Option<String>,
}

/// What PHP has said.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// `None`: PHP answers itself.
    pub redirect: Option<Redirect>,
    /// Bytes a second; `None`: as fast as may be.
    pub limit_rate: Option<u64>,
    /// For a Content-Type that has none.
    pub charset: Option<String>,
}

/// Takes it out of PHP's headers.
///
/// # Errors
/// 500 where the redirect is no path of this site.
pub fn take(headers: &mut HeaderMap) -> Result<Told, Error> {
    // Looking for one name costs as much as looking at a dozen.
    if !headers.keys().any(|name| name.as_str().starts_with("x-accel-")) {
        return Ok(Told::default());
    }
    headers.remove(EXPIRES);
    let text = |value: Option<HeaderValue>| Some(value?.to_str().ok()?.trim().to_owned());
    // As in Nginx what is no number limits nothing, and neither does 0.
    let limit_rate = text(headers.remove(LIMIT_RATE)).and_then(|rate| rate.parse().ok()).filter(|rate| *rate > 0);
    let charset = text(headers.remove(CHARSET)).filter(|charset| !charset.is_empty() && charset != "off");
    Ok(Told { redirect: redirect(headers)?, limit_rate, charset })
}

fn redirect(headers: &mut HeaderMap) -> Result<Option<Redirect>, Error> {
    let Some(value) = headers.remove(REDIRECT) else { return Ok(None) };
    let odd = || Error::new(Kind::Internal, format!("X-Accel-Redirect is no path: {value:?}"));
    // Applications send names of files as they are: bytes beyond ASCII stand for themselves.
    let mut target = String::with_capacity(value.len());
    for byte in value.as_bytes() {
        match byte.is_ascii() {
            true => target.push(char::from(*byte)),
            false => target.push_str(&format!("%{byte:02X}")),
        }
    }
    // Symfony encodes the whole path, its slashes too.
    if let Some((slash, rest)) = target.split_at_checked(3)
        && slash.eq_ignore_ascii_case("%2F")
    {
        target = format!("/{rest}");
    }
    let (path, query) = target.split_once('?').map_or((target.as_str(), None), |(path, query)| (path, Some(query.to_owned())));
    let path = route::normalize(path).map_err(|_| odd())?.into_owned();
    Ok(Some(Redirect { path, query }))
}

pub fn is_in(headers: &HeaderMap) -> bool {
    headers.contains_key(REDIRECT)
}

/// Says `charset` of a type that has none.
pub fn say_charset(charset: &str, headers: &mut HeaderMap) {
    let Some(kind) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return };
    if kind.to_ascii_lowercase().contains("charset=") || kind.starts_with("multipart/") {
        return;
    }
    if let Ok(value) = HeaderValue::from_str(&format!("{kind}; charset={charset}")) {
        headers.insert(header::CONTENT_TYPE, value);
    }
}

/// What of PHP's headers goes with the file.
pub fn keep(php: &HeaderMap, file: &mut HeaderMap) {
    // Several ranges have a type of their own, with the boundary between them.
    let is_parts = file.get(header::CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"multipart/byteranges"));
    for name in KEPT.iter().filter(|name| !is_parts || **name != header::CONTENT_TYPE) {
        let values: Vec<HeaderValue> = php.get_all(name).iter().cloned().collect();
        if !values.is_empty() {
            file.remove(name);
        }
        for value in values {
            file.append(name.clone(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(value: &str) -> Result<Option<Redirect>, Kind> {
        let mut headers = HeaderMap::from_iter([(REDIRECT, HeaderValue::from_str(value).unwrap())]);
        let taken = take(&mut headers).map(|told| told.redirect).map_err(|error| error.kind);
        assert!(headers.is_empty());
        taken
    }

    #[test]
    fn a_path_is_normalized_and_nothing_leads_out() {
        let to = |path: &str, query: Option<&str>| Ok(Some(Redirect { path: path.into(), query: query.map(str::to_owned) }));
        assert_eq!(take(&mut HeaderMap::new()).unwrap(), Told::default());
        assert_eq!(taken("/private/a%20b.txt?x=1"), to("/private/a b.txt", Some("x=1")));
        assert_eq!(taken("/private/../public/a"), to("/public/a", None));
        assert_eq!(taken("%2Fprivate%2fa%20b"), to("/private/a b", None));
        assert_eq!(taken("/private/\u{e4}.txt?\u{e4}"), to("/private/\u{e4}.txt", Some("%C3%A4")));
        for odd in ["/../etc/passwd", "/%2e%2e/etc/passwd", "private/a", "https://example.com/", "/a%00", "@named"] {
            assert_eq!(taken(odd), Err(Kind::Internal), "{odd}");
        }
    }

    #[test]
    fn a_rate_is_a_number_and_a_charset_is_said_once() {
        let told = |name: HeaderName, value: &'static str| {
            let mut headers = HeaderMap::from_iter([(name, HeaderValue::from_static(value)), (EXPIRES, HeaderValue::from(60))]);
            let told = take(&mut headers).unwrap();
            assert!(headers.is_empty());
            told
        };
        let rate = |value| told(LIMIT_RATE, value).limit_rate;
        assert_eq!([rate("1024"), rate("0"), rate("off"), rate("-1"), rate("1k")], [Some(1024), None, None, None, None]);
        let charset = |value| told(CHARSET, value).charset;
        assert_eq!([charset("koi8-r"), charset("off"), charset("")], [Some("koi8-r".to_owned()), None, None]);
        for (kind, said) in [
            ("text/html", "text/html; charset=koi8-r"),
            ("text/html; Charset=utf-8", "text/html; Charset=utf-8"),
            ("multipart/byteranges; boundary=x", "multipart/byteranges; boundary=x"),
        ] {
            let mut headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]);
            say_charset("koi8-r", &mut headers);
            assert_eq!(headers[header::CONTENT_TYPE], said);
        }
    }

    #[test]
    fn what_php_says_of_the_file_stays() {
        let map = |all: &[(&'static str, &'static str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in all {
                map.append(*name, HeaderValue::from_static(value));
            }
            map
        };
        let php = map(&[
            ("content-type", "application/pdf"),
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
            ("content-length", "0"),
            ("etag", "\"php\""),
        ]);
        let mut file = map(&[("content-type", "text/plain"), ("content-length", "9"), ("etag", "\"file\"")]);
        keep(&php, &mut file);
        let expected = map(&[
            ("content-length", "9"),
            ("etag", "\"file\""),
            ("content-type", "application/pdf"),
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
        ]);
        assert_eq!(file, expected);
    }
}
