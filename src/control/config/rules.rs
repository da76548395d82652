//! `when`, `allow`, `deny`, `redirect`, `respond`, `headers`, `request_headers` and `expires` of a route.

use std::{path::PathBuf, time::Duration};

use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use ipnet::IpNet;

use super::{
    document::Kind,
    reader::{Reader, Value},
    texts, unit,
};
use crate::model::{
    rules::{Action, BasicAuth, ErrorPage, ErrorPages, Expires, HeaderEdits, Limit, Rate, When},
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
        from: t.read("from", Vec::new(), networks),
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

/// "X-Debug: *", or with its value.
fn header_match(v: &Value<'_>) -> Option<(HeaderName, Option<HeaderValue>)> {
    const HELP: &str = "write \"X-Debug: *\" for any value, or \"X-Debug: 1\"";
    let text = v.text()?;
    let Some((name, value)) = text.split_once(':') else {
        return v.refuse(format!("{text:?} has no colon"), HELP);
    };
    let (name, value) = (HeaderName::from_bytes(name.trim().as_bytes()), value.trim());
    match (name, value) {
        (Ok(name), "*") => Some((name, None)),
        (Ok(name), _) => match HeaderValue::from_str(value) {
            Ok(value) => Some((name, Some(value))),
            Err(_) => v.refuse(format!("{value:?} cannot be a header's value"), HELP),
        },
        (Err(_), _) => v.refuse(format!("{text:?} does not begin with a header's name"), HELP),
    }
}

/// "preview", or "preview=1".
fn cookie_match(v: &Value<'_>) -> Option<(String, Option<String>)> {
    let text = v.text()?;
    let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value.to_owned())));
    // RFC 6265 section 4.1.1: a cookie's name is a token, as a header's is.
    match HeaderName::from_bytes(name.as_bytes()) {
        Ok(_) => Some((name.to_owned(), value)),
        Err(_) => v.refuse(format!("{name:?} cannot be a cookie's name"), "write \"preview\" for any value, or \"preview=1\""),
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
    if let Kind::Text(word) = &v.node.kind {
        return if word == "off" { Some(None) } else { v.refuse(format!("{word:?} is not known"), HELP) };
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
        if !edits.remove.contains(&name) {
            edits.remove.push(name);
        }
    }
    for (name, text) in t.read("set", Vec::new(), |v| entries(v, captures)) {
        edits.set.retain(|(other, _)| *other != name);
        edits.set.push((name, text));
    }
    edits.add.extend(t.read("add", Vec::new(), |v| entries(v, captures)));
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
        _ => v.duration().map(|time| Some(Expires::After(time))),
    }
}

/// As it is written.
pub fn show_expires(expires: Option<Expires>) -> String {
    match expires {
        None => "off".to_owned(),
        Some(Expires::Epoch) => "epoch".to_owned(),
        Some(Expires::Max) => "max".to_owned(),
        Some(Expires::After(time)) => unit::show_duration(time),
    }
}
