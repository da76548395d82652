//! `X-Accel-Redirect`: PHP says which file is to be sent in its place, after it has looked whether the client may have it.

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::route;
use crate::error::{Error, Kind};

const REDIRECT: HeaderName = HeaderName::from_static("x-accel-redirect");

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

/// Takes it out of PHP's headers: no client sees it. `None`: PHP answers itself.
///
/// # Errors
/// 500 where it is no path of this site.
pub fn take(headers: &mut HeaderMap) -> Result<Option<Redirect>, Error> {
    let Some(value) = headers.remove(REDIRECT) else { return Ok(None) };
    let odd = || Error::new(Kind::Internal, format!("X-Accel-Redirect is no path: {value:?}"));
    let target = value.to_str().map_err(|_| odd())?;
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query.to_owned())));
    let path = route::normalize(path).map_err(|_| odd())?.into_owned();
    Ok(Some(Redirect { path, query }))
}

pub fn is_in(headers: &HeaderMap) -> bool {
    headers.contains_key(REDIRECT)
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
        let taken = take(&mut headers).map_err(|error| error.kind);
        assert!(headers.is_empty());
        taken
    }

    #[test]
    fn a_path_is_normalized_and_nothing_leads_out() {
        let to = |path: &str, query: Option<&str>| Ok(Some(Redirect { path: path.into(), query: query.map(str::to_owned) }));
        assert_eq!(take(&mut HeaderMap::new()).unwrap(), None);
        assert_eq!(taken("/private/a%20b.txt?x=1"), to("/private/a b.txt", Some("x=1")));
        assert_eq!(taken("/private/../public/a"), to("/public/a", None));
        for odd in ["/../etc/passwd", "/%2e%2e/etc/passwd", "private/a", "https://example.com/", "/a%00", "@named"] {
            assert_eq!(taken(odd), Err(Kind::Internal), "{odd}");
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
