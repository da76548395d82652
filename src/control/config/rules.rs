//! What a route says beyond its file or script: `when`, `allow`, `limit`, `cors`, `redirect`, `headers` and the like.

use std::{path::PathBuf, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use ipnet::IpNet;
use regex::Regex;
use tower_http::{
    CompressionLevel,
    compression::{CompressionLayer, predicate::SizeAbove},
    cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer, ExposeHeaders},
};

use super::{
    document::Kind,
    reader::{Reader, Value},
    routes, texts, unit,
};
use crate::model::{
    rules::{
        Action, BasicAuth, Coding, Compress, Cors, ErrorPage, ErrorPages, Expires, Flag, HeaderEdits, Kept, Limit, Maintenance,
        Rate, Scheme, Wanted, When,
    },
    text::Text,
};

pub fn when(mut t: Reader<'_>) -> (Vec<Method>, When) {
    let methods = t.read("method", Vec::new(), |v| {
        v.list(|v| {
            let text = v.filled_text()?;
            let upper = text.to_ascii_uppercase();
            match Method::from_bytes(text.as_bytes()) {
                // Methods are case-sensitive (RFC 9110 section 9.1): "get" would match nothing that is ever sent.
                Ok(_) if upper != text => v.refuse(format!("{text:?} is not in capitals"), format!("write \"{upper}\"")),
                Ok(method) => Some(method),
                Err(_) => v.refuse(format!("{text:?} is not a method"), "write \"GET\", \"POST\" or another of HTTP's methods"),
            }
        })
    });
    let when = When {
        headers: t.read("header", Vec::new(), |v| one_or_more(v, header_match)),
        cookies: t.read("cookie", Vec::new(), |v| one_or_more(v, cookie_match)),
        args: t.read("arg", Vec::new(), |v| one_or_more(v, argument_match)),
        from: t.read("from", Vec::new(), networks),
        scheme: t.read("scheme", None, |v| v.one_of(&[("http", Some(Scheme::Http)), ("https", Some(Scheme::Https))])),
    };
    t.finish();
    (methods, when)
}

/// A text, or a list of them.
fn one_or_more<T>(v: &Value<'_>, mut read: impl FnMut(&Value<'_>) -> Option<T>) -> Option<Vec<T>> {
    match v.node.kind {
        Kind::List(_) => v.list(|v| read(v)),
        _ => read(v).map(|one| vec![one]),
    }
}

/// "X-Debug: *", with its value, or with an expression.
fn header_match(v: &Value<'_>) -> Option<(HeaderName, Wanted)> {
    const HELP: &str = "write \"X-Debug: *\" for any value, \"X-Debug: 1\", or \"User-Agent: ~(?i)bot\" for an expression";
    let text = v.text()?;
    let Some((name, value)) = text.split_once(':') else {
        return v.refuse(format!("{text:?} has no colon"), HELP);
    };
    match HeaderName::from_bytes(name.trim().as_bytes()) {
        Ok(name) => Some((name, wanted(v, value.trim())?)),
        Err(_) => v.refuse(format!("{text:?} does not begin with a header's name"), HELP),
    }
}

/// "preview", "preview=1" or "preview=~^[0-9]+$".
fn cookie_match(v: &Value<'_>) -> Option<(String, Wanted)> {
    let (name, wanted) = pair_match(v)?;
    // RFC 6265 section 4.1.1: a cookie's name is a token, as a header's is.
    match HeaderName::from_bytes(name.as_bytes()) {
        Ok(_) => Some((name, wanted)),
        Err(_) => v.refuse(format!("{name:?} cannot be a cookie's name"), "write \"preview\" for any value, or \"preview=1\""),
    }
}

/// An argument of the query, in the same manner.
fn argument_match(v: &Value<'_>) -> Option<(String, Wanted)> {
    let (name, wanted) = pair_match(v)?;
    match name.is_empty() || name.contains(['&', '?', '#']) {
        true => v.refuse(format!("{name:?} cannot be an argument's name"), "write \"debug\" for any value, or \"debug=1\""),
        false => Some((name, wanted)),
    }
}

fn pair_match(v: &Value<'_>) -> Option<(String, Wanted)> {
    let text = v.text()?;
    match text.split_once('=') {
        None => Some((text.to_owned(), Wanted::Any)),
        // The value that is a star is the star.
        Some((name, "*")) => Some((name.to_owned(), Wanted::Text("*".to_owned()))),
        Some((name, value)) => Some((name.to_owned(), wanted(v, value)?)),
    }
}

fn wanted(v: &Value<'_>, text: &str) -> Option<Wanted> {
    match text.strip_prefix('~') {
        _ if text == "*" => Some(Wanted::Any),
        None => Some(Wanted::Text(text.to_owned())),
        Some(expression) => match Regex::new(expression) {
            Ok(regex) => Some(Wanted::Pattern(regex)),
            Err(error) => v.refuse(
                format!("{text:?} is not an expression: {}", routes::summary(&error)),
                "expressions are those of Rust's regex crate: no look-around, no back-references",
            ),
        },
    }
}

/// Whether it is the word "off", the only one there is beside the value itself.
fn is_off(v: &Value<'_>, help: &str) -> Option<bool> {
    match &v.node.kind {
        Kind::Text(word) if word == "off" => Some(true),
        Kind::Text(word) => v.refuse(format!("{word:?} is not known"), help),
        _ => Some(false),
    }
}

/// As `trusted_proxies`: each may be several, separated by commas.
pub fn networks(v: &Value<'_>) -> Option<Vec<IpNet>> {
    v.list(Value::networks).map(|all| all.concat())
}

pub fn rewrite(v: &Value<'_>, captures: &[String]) -> Option<Text> {
    let to = texts::text(v, captures)?;
    match to.source.starts_with(['/', '$']) {
        true => Some(to),
        false => v.refuse(
            format!("{:?} does not begin with a slash", to.source),
            "write the new path, as in \"/new/$1\"; to another host leads `redirect`",
        ),
    }
}

/// "off" for a route of a site that has it.
pub fn basic_auth(v: &Value<'_>) -> Option<Option<BasicAuth>> {
    const HELP: &str = "write { realm = \"members\", file = \"/etc/htpasswd\" }, or \"off\"";
    if is_off(v, HELP)? {
        return Some(None);
    }
    let mut t = v.reader("basic_auth")?;
    if !t.has("file") {
        v.refuse::<()>("`file` is missing", HELP);
    }
    let realm = t.read("realm", String::new(), |v| match v.text()? {
        text if text.chars().any(char::is_control) => v.refuse("has a control character", "write it in one line"),
        text => Some(text.to_owned()),
    });
    let file = t.read("file", None, |v| v.folder()).map(PathBuf::from);
    if let Some(file) = &file
        && let Err(why) = std::fs::File::open(file)
    {
        t.report
            .warn(t.place("file"), format!("{} cannot be read: {why}: until it can every request is answered 500", file.display()));
    }
    t.finish();
    Some(Some(BasicAuth { realm, file: file? }))
}

/// "off" for a route of a site that has it.
pub fn cors(v: &Value<'_>) -> Option<Option<Arc<Cors>>> {
    const HELP: &str = "write { origins = [\"https://app.example.com\"] }, or \"off\"";
    if is_off(v, HELP)? {
        return Some(None);
    }
    let mut t = v.reader("cors")?;
    let before = t.report.count();
    let origins = t.read("origins", Vec::new(), |v| v.list(origin));
    if origins.is_empty() && t.report.count() == before {
        v.refuse::<()>("`origins` is missing or empty", HELP);
    }
    let methods = t.read("methods", vec!["GET".to_owned(), "HEAD".to_owned(), "POST".to_owned()], |v| v.list(method_or_any));
    let headers = t.read("headers", Vec::new(), |v| v.list(header_or_any));
    let expose = t.read("expose", Vec::new(), |v| v.list(header_or_any));
    let credentials = t.read("credentials", false, Value::boolean);
    let max_age = t.read("max_age", Duration::from_secs(600), Value::duration);
    for (key, list) in [("origins", &origins), ("methods", &methods), ("headers", &headers), ("expose", &expose)] {
        if list.len() > 1 && list.iter().any(|item| item == "*") {
            t.report.problem(t.place(key), format!("`{key}` has \"*\" beside others"), Some("\"*\" stands alone".to_owned()));
            return None;
        }
        // To a browser that sends credentials a "*" is no wildcard (Fetch standard, "CORS protocol and credentials").
        if credentials && list.iter().any(|item| item == "*") {
            let help = "name them one by one, or leave out `credentials`".to_owned();
            t.report.problem(t.place(key), format!("`{key}` is \"*\", which browsers refuse with `credentials`"), Some(help));
            return None;
        }
    }
    t.finish();
    let is_any = |list: &[String]| list.iter().any(|item| item == "*");
    let names = |list: &[String]| list.iter().filter_map(|name| name.parse::<HeaderName>().ok()).collect::<Vec<_>>();
    let layer = CorsLayer::new()
        .allow_origin(match is_any(&origins) {
            true => AllowOrigin::any(),
            false => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
        })
        .allow_methods(match is_any(&methods) {
            true => AllowMethods::any(),
            false => AllowMethods::list(methods.iter().filter_map(|method| method.parse::<Method>().ok())),
        })
        .allow_headers(if is_any(&headers) { AllowHeaders::any() } else { AllowHeaders::list(names(&headers)) })
        .expose_headers(if is_any(&expose) { ExposeHeaders::any() } else { ExposeHeaders::list(names(&expose)) })
        .allow_credentials(credentials)
        .max_age(max_age);
    Some(Some(Arc::new(Cors { origins, methods, headers, expose, credentials, max_age, layer })))
}

/// As browsers send it: scheme, host and a port that is not the scheme's own, compared byte by byte.
fn origin(v: &Value<'_>) -> Option<String> {
    let text = v.text()?;
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let help = match host {
        _ if matches!(text, "*" | "null") => return Some(text.to_owned()),
        _ if text.contains(['$', '~', '^', '(']) => {
            "origins are named one by one: no variables, no expressions; \"*\" is any".to_owned()
        }
        None => format!("write it with its scheme, as in \"https://{text}\", or \"*\" for any"),
        Some("") => "write its host, as in \"https://app.example.com\"".to_owned(),
        Some(host) if host.contains(['/', '?', '#', '@', '*', ' ']) => {
            "write scheme, host and port alone: no path, no wildcard".to_owned()
        }
        Some(_) if !text.is_ascii() || text.bytes().any(|b| b.is_ascii_uppercase() || b.is_ascii_control()) => {
            "write it in lower case, a host as browsers send it: \"xn--…\"".to_owned()
        }
        Some(host)
            if (text.starts_with("https:") && host.ends_with(":443")) || (text.starts_with("http:") && host.ends_with(":80")) =>
        {
            "browsers leave out the scheme's own port".to_owned()
        }
        Some(_) => return Some(text.to_owned()),
    };
    v.refuse(format!("{text:?} is no origin"), help)
}

fn method_or_any(v: &Value<'_>) -> Option<String> {
    let text = v.filled_text()?;
    match Method::from_bytes(text.as_bytes()) {
        _ if text == "*" => Some(text.to_owned()),
        Ok(_) if text.to_ascii_uppercase() == text => Some(text.to_owned()),
        _ => v.refuse(format!("{text:?} is not a method"), "write \"GET\", \"PUT\" or another of HTTP's methods in capitals"),
    }
}

fn header_or_any(v: &Value<'_>) -> Option<String> {
    let text = v.filled_text()?;
    match HeaderName::from_bytes(text.as_bytes()) {
        Ok(_) => Some(text.to_owned()),
        Err(_) => v.refuse(format!("{text:?} cannot be a header's name"), "a name is of letters, digits and `-`"),
    }
}

/// "off" for a route of a site that has it.
pub fn maintenance(v: &Value<'_>) -> Option<Option<Arc<Maintenance>>> {
    const HELP: &str = "write { page = \"/maintenance.html\", from = [\"10.0.0.0/8\"] }, {} for a line of text, or \"off\"";
    if is_off(v, HELP)? {
        return Some(None);
    }
    let mut t = v.reader("maintenance")?;
    let page = t.read("page", None, |v| match v.url_path_or_none()? {
        Some(page) if page.ends_with(".php") => {
            v.refuse(format!("{page:?} is a script"), "write the path of a static file: PHP is not asked in a maintenance")
        }
        page => Some(page),
    });
    let bypass = When {
        headers: t.read("header", Vec::new(), |v| one_or_more(v, header_match)),
        cookies: t.read("cookie", Vec::new(), |v| one_or_more(v, cookie_match)),
        from: t.read("from", Vec::new(), networks),
        ..When::default()
    };
    let retry_after = t.read("retry_after", None, |v| v.duration().map(Some));
    let at = t.report.place(t.place("file"));
    let flag = t.read("file", None, |v| v.folder()).map(|file| Flag::new(PathBuf::from(file), at));
    t.finish();
    Some(Some(Arc::new(Maintenance { page, bypass, retry_after, flag })))
}

/// What shrinks, and is not compressed already.
const COMPRESSIBLE: [&str; 12] = [
    "text/*",
    "application/javascript",
    "application/json",
    "application/ld+json",
    "application/manifest+json",
    "application/xml",
    "application/rss+xml",
    "application/atom+xml",
    "application/xhtml+xml",
    "application/wasm",
    "application/vnd.ms-fontobject",
    "image/svg+xml",
];

/// A list of codings, or a table with more.
pub fn compress(v: &Value<'_>) -> Option<Option<Arc<Compress>>> {
    const HELP: &str = "write [\"br\", \"zstd\", \"gzip\"], { codings = [\"gzip\"], min = \"1KiB\" }, or \"off\"";
    if is_off(v, HELP)? {
        return Some(None);
    }
    let all = || Coding::ALL.map(|(coding, ..)| coding).to_vec();
    let (codings, types, min, private) = match &v.node.kind {
        Kind::List(_) => (precompressed(v)?, None, 1024, false),
        _ => {
            let mut t = v.reader("compress")?;
            let codings = t.read("codings", all(), precompressed);
            let types = t.read("types", None, |v| v.list(media_type).map(Some));
            let min = t.read("min", 1024, |v| v.size(0, u64::MAX));
            let private = t.read("private", false, Value::boolean);
            t.finish();
            (codings, types, min, private)
        }
    };
    if codings.is_empty() {
        return v.refuse("names no coding", HELP);
    }
    let types = types.unwrap_or_else(|| COMPRESSIBLE.map(str::to_owned).to_vec());
    // Low: one that is twice as thorough takes several times as long, on a worker's time.
    let layer = CompressionLayer::new()
        .br(codings.contains(&Coding::Brotli))
        .zstd(codings.contains(&Coding::Zstd))
        .gzip(codings.contains(&Coding::Gzip))
        .quality(CompressionLevel::Precise(3))
        .compress_when(SizeAbove::new(0));
    Some(Some(Arc::new(Compress { codings, types, min, private, layer })))
}

fn media_type(v: &Value<'_>) -> Option<String> {
    let text = v.filled_text()?;
    match text.split_once('/') {
        Some((kind, sub)) if !kind.is_empty() && !sub.is_empty() && !text.contains([';', ' ']) && !text.ends_with("/*/") => {
            Some(text.to_ascii_lowercase())
        }
        _ => v.refuse(format!("{text:?} is not a media type"), "write \"application/json\", or \"text/*\" for all of a kind"),
    }
}

/// In the server's order of preference.
pub fn precompressed(v: &Value<'_>) -> Option<Vec<Coding>> {
    let choices = Coding::ALL.map(|(coding, name, _)| (name, coding));
    v.list(|v| v.one_of(&choices))
}

/// A site's is one for all its routes: they share what it counts.
pub fn limit(v: &Value<'_>, captures: &[String]) -> Option<Limit> {
    const HELP: &str = "write { by = \"$remote_addr\", rate = \"10/s\", burst = 20, concurrent = 5 }";
    let mut t = v.reader("limit")?;
    if !t.has("by") {
        v.refuse::<()>("`by` is missing", HELP);
    }
    if !t.has("rate") && !t.has("concurrent") {
        v.refuse::<()>("limits nothing", HELP);
    }
    let by = t.read("by", None, |v| texts::text(v, captures).map(Some));
    let rate = t.read("rate", None, |v| {
        let text = v.text()?;
        let parsed = text.split_once('/').and_then(|(count, per)| {
            let per = [("s", 1), ("m", 60), ("h", 3_600)].into_iter().find(|(unit, _)| *unit == per)?.1;
            Some(Rate { count: count.parse().ok().filter(|count| (1..=1_000_000).contains(count))?, per: Duration::from_secs(per) })
        });
        match parsed {
            Some(rate) => Some(Some(rate)),
            None => v.refuse(format!("{text:?} is no rate"), "write \"10/s\", \"100/m\" or \"1000/h\""),
        }
    });
    let burst = t.read("burst", 0, |v| v.count_u32(0, 1_000_000));
    let concurrent = t.read("concurrent", None, |v| v.count_u32(1, 1_000_000).map(Some));
    t.finish();
    Some(Limit::new(by?, rate, burst, concurrent))
}

pub fn redirect(v: &Value<'_>, captures: &[String]) -> Option<Action> {
    const HELP: &str = "write { to = \"https://$host$request_uri\", status = 301 }";
    let mut t = v.reader("redirect")?;
    if !t.has("to") {
        v.refuse::<()>("`to` is missing", HELP);
    }
    let to = t.read("to", None, |v| {
        let to = texts::text(v, captures)?;
        match to.source.as_str() {
            "" => v.refuse("is empty", HELP),
            _ => Some(Some(to)),
        }
    });
    let status = t.read("status", StatusCode::FOUND, |v| {
        let code = v.count(300, 399)?;
        match u16::try_from(code).ok().filter(|code| [301, 302, 303, 307, 308].contains(code)) {
            Some(code) => StatusCode::from_u16(code).ok(),
            None => v.refuse(format!("{code} is no redirect"), "write 301, 302, 303, 307 or 308"),
        }
    });
    t.finish();
    Some(Action::Redirect { to: to?, status })
}

pub fn respond(v: &Value<'_>, captures: &[String]) -> Option<Action> {
    let mut t = v.reader("respond")?;
    let status = t.read("status", StatusCode::OK, |v| StatusCode::from_u16(u16::try_from(v.count(200, 599)?).ok()?).ok());
    let body = t.read("body", Text::default(), |v| texts::text(v, captures));
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    let content_type = t.read("type", plain, |v| match HeaderValue::from_str(v.text()?) {
        Ok(value) if !value.is_empty() => Some(value),
        _ => v.refuse("is not a media type", "write \"text/html; charset=utf-8\""),
    });
    t.finish();
    Some(Action::Respond { status, body, content_type })
}

/// This route's before its site's.
pub fn error_pages(v: &Value<'_>, above: &ErrorPages) -> Option<ErrorPages> {
    let mut all = Vec::new();
    for (codes, at, value) in v.entries()? {
        let code = |text: &str| text.parse::<u16>().ok().filter(|code| (400..=599).contains(code));
        let range = match codes.split_once('-') {
            Some((from, to)) => code(from).zip(code(to)).filter(|(from, to)| from <= to),
            None => code(codes).map(|code| (code, code)),
        };
        if range.is_none() {
            let help = "write \"404\", or a range as \"502-504\", from 400 to 599".to_owned();
            v.report.problem(at, format!("`{}`: {codes:?} is no status of an error", v.path), Some(help));
        }
        let page = value.text().and_then(|text| match text {
            _ if text.starts_with('/') && !text.contains('?') => Some(ErrorPage::Path(value.url_path()?.to_owned())),
            _ if text.starts_with("https://") || text.starts_with("http://") => {
                HeaderValue::from_str(text).ok().map(ErrorPage::Url)
            }
            _ => value.refuse(format!("{text:?} is no page"), "write the path of a page of this site, or a URL for a redirect"),
        });
        if let (Some((from, to)), Some(ErrorPage::Path(path))) = (range, &page)
            && path.ends_with(".php")
            && [401, 403, 429].iter().any(|code| (from..=to).contains(code))
        {
            // It would see what was asked for, and might show it.
            v.report.warn(at, format!("`{}`: a script is never the page of 401, 403 or 429: they show a line of text", v.path));
        }
        all.extend(range.zip(page));
    }
    all.extend(above.iter().cloned());
    Some(all)
}

/// Those of the message itself: HTTP would not hold together with others.
const FRAMING: [HeaderName; 5] =
    [header::CONNECTION, header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::UPGRADE, header::TE];

pub fn headers(mut t: Reader<'_>, above: &HeaderEdits, captures: &[String]) -> HeaderEdits {
    let mut edits = above.clone();
    for name in t.read("remove", Vec::new(), |v| v.list(header_name)) {
        // A header that is removed here is not one that was set above.
        edits.set.retain(|(other, _)| *other != name);
        edits.add.retain(|(other, _)| *other != name);
        edits.default.retain(|(other, _)| *other != name);
        if !edits.remove.contains(&name) {
            edits.remove.push(name);
        }
    }
    for (name, text) in t.read("set", Vec::new(), |v| entries(v, captures)) {
        edits.set.retain(|(other, _)| *other != name);
        edits.set.push((name, text));
    }
    edits.add.extend(t.read("add", Vec::new(), |v| entries(v, captures)));
    for (name, text) in t.read("default", Vec::new(), |v| entries(v, captures)) {
        edits.default.retain(|(other, _)| *other != name);
        edits.default.push((name, text));
    }
    t.finish();
    edits
}

fn entries(v: &Value<'_>, captures: &[String]) -> Option<Vec<(HeaderName, Text)>> {
    let mut all = Vec::new();
    for (name, _, value) in v.entries()? {
        if let (Some(name), Some(text)) = (named(&value, name), texts::text(&value, captures)) {
            if HeaderValue::from_str(&text.source).is_err() {
                value.refuse::<()>("has a line break or another control character", "write it in one line");
            }
            all.push((name, text));
        }
    }
    Some(all)
}

fn header_name(v: &Value<'_>) -> Option<HeaderName> {
    named(v, v.text()?)
}

fn named(v: &Value<'_>, name: &str) -> Option<HeaderName> {
    match HeaderName::from_bytes(name.as_bytes()) {
        Ok(name) if FRAMING.contains(&name) => {
            v.refuse(format!("{name} belongs to the message itself"), "it follows from the body and the connection")
        }
        Ok(name) => Some(name),
        Err(_) => v.refuse(format!("{name:?} cannot be a header's name"), "a name is of letters, digits and `-`"),
    }
}

pub fn expires(v: &Value<'_>) -> Option<Option<Expires>> {
    match v.text()? {
        "off" => Some(None),
        "epoch" => Some(Some(Expires::Epoch)),
        "max" => Some(Some(Expires::Max)),
        text => {
            let mut words = text.split_ascii_whitespace();
            let mut kept = Kept::default();
            let time = words.next().unwrap_or_default();
            for word in words {
                match word {
                    "public" => kept.public = true,
                    "private" => kept.private = true,
                    "immutable" => kept.immutable = true,
                    _ => return v.refuse(format!("{word:?} is not known"), "write \"30d\", or \"30d public immutable\""),
                }
            }
            let time = match kept == Kept::default() {
                true => v.duration()?,
                false => match unit::parse_duration(time) {
                    Some(time) => time,
                    None => return v.refuse(format!("{time:?} is not a duration"), "write \"30d public immutable\""),
                },
            };
            Some(Some(Expires::After(time, kept)))
        }
    }
}

/// As it is written.
pub fn show_expires(expires: Option<Expires>) -> String {
    match expires {
        None => "off".to_owned(),
        Some(Expires::Epoch) => "epoch".to_owned(),
        Some(Expires::Max) => "max".to_owned(),
        Some(Expires::After(time, kept)) => {
            let words = [(kept.public, " public"), (kept.private, " private"), (kept.immutable, " immutable")];
            let words: String = words.into_iter().filter_map(|(is_said, word)| is_said.then_some(word)).collect();
            unit::show_duration(time) + &words
        }
    }
}
