//! `[[site.route]]`, and the same keys at the site's level, which are the default for its routes.

use std::{collections::HashMap, sync::Arc, time::Duration};

use http::Method;
use regex::Regex;

use super::{
    document::{Kind, Place},
    reader::{Reader, Value, nearest},
    rules,
    sites::Around,
    upstreams::warn_of_cuts,
};
use crate::model::{
    Route,
    rules::{Access, Action, BasicAuth, Coding, Compress, Cors, ErrorPages, Expires, HeaderEdits, Limit, Maintenance, When},
    site::{Files, Origin, Pattern},
    text::{Part, Text, parts},
};

/// The parameters that say what runs and how much there is to read. They follow from the request and from `root`,
/// `php_root` and `script`; HTTP_PROXY is never set at all (httpoxy, CVE-2016-5385).
const RESERVED: [&str; 11] = [
    "SCRIPT_FILENAME",
    "SCRIPT_NAME",
    "DOCUMENT_ROOT",
    "DOCUMENT_URI",
    "REQUEST_URI",
    "REQUEST_METHOD",
    "PATH_INFO",
    "QUERY_STRING",
    "CONTENT_LENGTH",
    "REDIRECT_STATUS",
    "HTTP_PROXY",
];

/// The keys that a site and a route share.
pub struct Keys {
    upstream: Option<Arc<str>>,
    files: Files,
    try_files: Option<Vec<String>>,
    script: Option<String>,
    body_limit: u64,
    read_timeout: Option<Duration>,
    params: Vec<(String, String)>,
    access_log: bool,
    lane: Option<Arc<str>>,
    access: Access,
    rewrite: Option<Text>,
    internal: bool,
    limit: Option<Limit>,
    basic_auth: Option<BasicAuth>,
    action: Option<Action>,
    error_pages: ErrorPages,
    headers: HeaderEdits,
    request_headers: HeaderEdits,
    expires: Option<Expires>,
    cors: Option<Arc<Cors>>,
    maintenance: Option<Arc<Maintenance>>,
    precompressed: Vec<Coding>,
    compress: Option<Arc<Compress>>,
}

impl Keys {
    pub fn standard() -> Self {
        Keys {
            upstream: None,
            files: Files::OrFront,
            try_files: None,
            script: None,
            body_limit: 8 << 20,
            read_timeout: None,
            params: Vec::new(),
            access_log: true,
            lane: None,
            access: Access::default(),
            rewrite: None,
            internal: false,
            limit: None,
            basic_auth: None,
            action: None,
            error_pages: Vec::new(),
            headers: HeaderEdits::default(),
            request_headers: HeaderEdits::default(),
            expires: None,
            cors: None,
            maintenance: None,
            precompressed: Vec::new(),
            compress: None,
        }
    }

    /// `tried` gets what `try_files` ends in here: the site knows later what may run. `captures`: the groups of the route's path.
    pub fn read(t: &mut Reader<'_>, above: &Keys, around: &Around<'_>, captures: &[String], tried: &mut Vec<Tried>) -> Self {
        let keys = Keys {
            upstream: t.read("upstream", above.upstream.clone(), |v| upstream(v, around)),
            files: t.read("files", above.files, |v| v.one_of(&[("or-front", Files::OrFront), ("or-404", Files::Or404)])),
            // The nearer word counts: `files` of a route is not for nothing where its site has a list.
            try_files: t
                .read("try_files", above.try_files.clone().filter(|_| !t.has("files")), |v| try_files(v, captures).map(Some)),
            script: t.read("script", above.script.clone(), script),
            body_limit: t.read("body_limit", above.body_limit, |v| match v.node.kind {
                Kind::Text(ref word) if word == "unlimited" => Some(u64::MAX),
                _ => v.size(0, u64::MAX),
            }),
            read_timeout: t.read("read_timeout", above.read_timeout, |v| v.timeout().map(Some)),
            params: t.read("params", above.params.clone(), |v| params(v, &above.params)),
            access_log: t.read("access_log", above.access_log, |v| v.one_of(&[("on", true), ("off", false)])),
            lane: t.read("lane", above.lane.clone(), |v| Some(v.text()?).map(|lane| (!lane.is_empty()).then(|| Arc::from(lane)))),
            access: Access {
                allow: t.read("allow", above.access.allow.clone(), rules::networks),
                deny: t.read("deny", above.access.deny.clone(), rules::networks),
            },
            rewrite: t.read("rewrite", None, |v| rules::rewrite(v, captures).map(Some)),
            internal: t.read("internal", above.internal, Value::boolean),
            limit: t.read("limit", above.limit.clone(), |v| rules::limit(v, captures).map(Some)),
            basic_auth: t.read("basic_auth", above.basic_auth.clone(), rules::basic_auth),
            action: action(t, above, captures),
            error_pages: t.read("error_page", above.error_pages.clone(), |v| rules::error_pages(v, &above.error_pages)),
            headers: rules::headers(t.section("headers", "headers"), &above.headers, captures),
            request_headers: rules::headers(t.section("request_headers", "request_headers"), &above.request_headers, captures),
            expires: t.read("expires", above.expires, rules::expires),
            cors: t.read("cors", above.cors.clone(), rules::cors),
            maintenance: t.read("maintenance", above.maintenance.clone(), rules::maintenance),
            compress: t.read("compress", above.compress.clone(), rules::compress),
            precompressed: t.read("precompressed", above.precompressed.clone(), rules::precompressed),
        };
        keys.check_lane(t, around);
        let guards = [
            ("allow", !keys.access.allow.is_empty()),
            ("deny", !keys.access.deny.is_empty()),
            ("limit", keys.limit.is_some()),
            ("basic_auth", keys.basic_auth.is_some()),
        ];
        for (key, guards) in guards {
            if keys.rewrite.is_some() && guards && t.has(key) {
                let help = "write it on the route that the path leads to".to_owned();
                t.report.problem(t.place(key), format!("`{key}` on a route with `rewrite` guards nothing"), Some(help));
            }
        }
        if let Some(read_timeout) = keys.read_timeout
            && t.has("read_timeout")
        {
            warn_of_cuts(t, "read_timeout", read_timeout, around.drain);
        }
        if let Some(last) = keys.try_files.as_ref().and_then(|files| files.last())
            && t.has("try_files")
            && keys.upstream.is_some()
            && last.starts_with('/')
        {
            let path = last.split(['?', '$']).next().unwrap_or_default();
            tried.push(Tried { at: t.place("try_files"), last: path.to_owned() });
        }
        keys
    }

    /// A lane is its upstream's. One that is inherited beside another upstream is a mistake as well: its requests would be in no lane.
    fn check_lane(&self, t: &Reader<'_>, around: &Around<'_>) {
        let Some(lane) = self.lane.as_deref() else { return };
        let at = t.place(if t.has("lane") { "lane" } else { "upstream" });
        let Some((name, upstream)) = self.upstream.as_ref().and_then(|name| around.upstreams.get_key_value(name)) else {
            // Where there is no upstream at all another message says so, or there is no PHP here.
            if t.has("lane") && self.upstream.is_none() {
                let help = "write `upstream` before it, or leave the lane out".to_owned();
                t.report.problem(at, format!("lane {lane:?}, and no upstream that could have it"), Some(help));
            }
            return;
        };
        let lanes = &upstream.policy.lanes;
        if lanes.iter().any(|known| &*known.name == lane) {
            return;
        }
        let help = match nearest(lane, lanes.iter().map(|known| &*known.name)) {
            Some(near) => format!("did you mean \"{near}\"?"),
            None => format!("add [upstream.{name}.lane.{lane}], or lane = \"\" here"),
        };
        t.report.problem(at, format!("upstream `{name}` has no lane {lane:?}"), Some(help));
    }

    pub fn route(&self, path: String, at: String, pattern: Pattern, methods: Vec<Method>, when: When) -> Route {
        Route {
            path,
            at,
            origin: Origin::Site,
            pattern,
            methods,
            when,
            // Guards are those of the route that a rewrite leads to.
            access: if self.rewrite.is_some() { Access::default() } else { self.access.clone() },
            rewrite: self.rewrite.clone(),
            internal: self.internal,
            limit: self.limit.clone().filter(|_| self.rewrite.is_none()),
            basic_auth: self.basic_auth.clone().filter(|_| self.rewrite.is_none()),
            action: self.action.clone(),
            error_pages: self.error_pages.clone(),
            headers: self.headers.clone(),
            request_headers: self.request_headers.clone(),
            expires: self.expires,
            cors: self.cors.clone(),
            maintenance: self.maintenance.clone(),
            precompressed: self.precompressed.clone(),
            compress: self.compress.clone(),
            upstream: self.upstream.clone(),
            files: self.files,
            try_files: self.try_files.clone(),
            script: self.script.clone(),
            body_limit: self.body_limit,
            read_timeout: self.read_timeout,
            params: self.params.clone(),
            access_log: self.access_log,
            lane: self.lane.clone(),
        }
    }
}

/// The path that a `try_files` ends in where there is PHP, and its place.
pub struct Tried {
    pub at: Place,
    pub last: String,
}

/// Exact paths apart; prefixes and expressions in the file's order.
#[derive(Default)]
pub struct Routes {
    pub exact: HashMap<String, Vec<Arc<Route>>>,
    pub ordered: Vec<Arc<Route>>,
}

impl Routes {
    /// Those of a preset come after the site's own; but up to its last refusal before them, or a prefix of the site would open by the way what the preset closes. The
    /// exceptions among them give way to the site's own. An exact path of the site comes before all that.
    pub fn extend(&mut self, preset: Routes, site: &Route) {
        // Only the site's own exact paths go first.
        let exact = preset.exact.into_values().flatten().filter_map(|route| Arc::into_inner(route)?.into_expression());
        let mut ordered: Vec<Route> = exact.collect();
        ordered.sort_by(|a, b| a.path.cmp(&b.path));
        ordered.extend(preset.ordered.into_iter().filter_map(Arc::into_inner));
        let closed = ordered.iter().rposition(|route| route.closes(site)).map_or(0, |last| last + 1);
        for (nth, route) in ordered.iter_mut().enumerate() {
            let is_exception = nth < closed && !route.closes(site);
            route.origin = if is_exception { Origin::Exception } else { Origin::Preset };
        }
        let open = ordered.split_off(closed);
        self.ordered.splice(0..0, ordered.into_iter().map(Arc::new));
        self.ordered.extend(open.into_iter().map(Arc::new));
    }
}

pub fn read(t: &mut Reader<'_>, site: &Keys, around: &Around<'_>, tried: &mut Vec<Tried>) -> Routes {
    let mut routes = Routes::default();
    let mut seen: HashMap<String, Vec<(Vec<Method>, Place)>> = HashMap::new();
    let mut prefixes: Vec<(String, Vec<Method>, Place)> = Vec::new();
    for mut route in t.sections("route", "route") {
        let path = match route.ask("path") {
            Some(value) => pattern(&value),
            None => {
                let help = "write path = \"/exact\", \"/prefix/*\" or '~expression'".to_owned();
                route.report.problem(route.at, "a route without `path`", Some(help));
                None
            }
        };
        let (methods, when) = rules::when(route.section("when", "when"));
        if when.scheme.is_some() && !around.has_trusted && !around.has_tls {
            let message = "`when.scheme` is always \"http\": `listen.trusted_proxies` is empty, so that nobody's X-Forwarded-Proto counts, and there is no `listen.https`";
            route.report.warn(route.place("when"), message);
        }
        let captures = path.as_ref().map_or_else(Vec::new, |(_, pattern)| captures(pattern));
        let keys = Keys::read(&mut route, site, around, &captures, tried);
        if let Some((path, pattern)) = path {
            let earlier = seen.entry(path.clone()).or_default();
            // One that takes only some of the requests leaves the others to those behind it.
            let covers = |old: &Vec<Method>| old.is_empty() || (!methods.is_empty() && methods.iter().all(|m| old.contains(m)));
            if let Some((_, first)) = earlier.iter().find(|(old, _)| covers(old)) {
                let message = format!(
                    "the route `{path}` is never reached: the one at {} takes all its requests",
                    route.report.place(*first)
                );
                route.report.warn(route.place("path"), message);
            }
            // Nginx takes the longest prefix; here the first in the file.
            else if let Pattern::Prefix(prefix) = &pattern
                && let Some((_, _, first)) = prefixes.iter().find(|(short, old, _)| prefix.starts_with(short) && covers(old))
            {
                let message = format!(
                    "the route `{path}` is never reached: the one at {}, whose prefix is shorter, takes all its requests; write this one before it",
                    route.report.place(*first)
                );
                route.report.warn(route.place("path"), message);
            }
            if when.is_always() {
                earlier.push((methods.clone(), route.place("path")));
                if let Pattern::Prefix(prefix) = &pattern {
                    prefixes.push((prefix.clone(), methods.clone(), route.place("path")));
                }
            }
            let is_exact = matches!(pattern, Pattern::Exact(_));
            let at = route.report.place(route.at);
            let made = Arc::new(keys.route(path.clone(), at, pattern, methods, when));
            match is_exact {
                true => routes.exact.entry(path).or_default().push(made),
                false => routes.ordered.push(made),
            }
        }
        route.finish();
    }
    routes
}

fn pattern(v: &Value<'_>) -> Option<(String, Pattern)> {
    let text = v.text()?;
    if let Some(expression) = text.strip_prefix('~') {
        let plain = expression.trim_start();
        if expression.starts_with(' ') {
            return v.refuse(
                format!("{text:?} has a space behind its ~, which belongs to the expression"),
                format!("write '~{plain}'"),
            );
        }
        if let Some(inner) = expression.strip_prefix('/').and_then(|inner| inner.strip_suffix("/i")) {
            return v.refuse(format!("{text:?} is written between slashes"), format!("write '~(?i){inner}'"));
        }
        return match Regex::new(expression) {
            Ok(regex) => Some((text.to_owned(), Pattern::Regex(regex))),
            Err(error) => {
                let help = match expression.strip_prefix('*') {
                    Some(rest) => format!("for a match in either case write '~(?i){}'", rest.trim_start()),
                    None => "expressions are those of Rust's regex crate: no look-around, no back-references".to_owned(),
                };
                v.refuse(format!("{text:?} is not an expression: {}", summary(&error)), help)
            }
        };
    }
    if !text.starts_with('/') {
        let help = match text {
            "" | "*" => "write \"/*\" for every path".to_owned(),
            _ if text.starts_with("^~") => {
                format!("write \"{}*\", and before it in the file what is to go first", text[2..].trim())
            }
            _ if text.starts_with('=') => format!("write \"{}\": a path without * is exact", text[1..].trim()),
            _ if text.starts_with('@') => "there are no named locations: write the script in `try_files` or `script`".to_owned(),
            _ if text.starts_with('!') => {
                "there is no \"not\": write the route for what matches before the one for all others".to_owned()
            }
            _ if text.starts_with("*.") => format!("for an ending write '~\\.{}$'", regex::escape(&text[2..])),
            _ => format!("write \"/{text}\", or '~…' for an expression"),
        };
        return v.refuse(format!("{text:?} does not begin with a slash"), help);
    }
    let path = v.url_path()?;
    let (pattern, literal) = match path.strip_suffix('*') {
        Some(prefix) => (Pattern::Prefix(prefix.to_owned()), prefix),
        None => (Pattern::Exact(path.to_owned()), path),
    };
    if literal.contains('*') {
        let expression = regex::escape(path).replace("\\*", "[^/]*");
        return v
            .refuse(format!("{path:?} has a * before its end"), format!("only a closing * is a prefix; write '~^{expression}$'"));
    }
    Some((path.to_owned(), pattern))
}

/// The crate's message is a drawing of several lines; its last says what is wrong, its caret where.
pub fn summary(error: &regex::Error) -> String {
    let text = error.to_string();
    let what = text.lines().last().unwrap_or_default().trim().trim_start_matches("error: ").to_owned();
    // The drawing is indented by four; an expression of several lines is drawn otherwise, without a caret of its own line.
    let caret = text.lines().find(|line| line.trim_start().starts_with('^')).and_then(|line| line.find('^')?.checked_sub(4));
    match caret {
        Some(before) => format!("{what}, at its character {}", before + 1),
        None => what,
    }
}

/// The numbers and names of an expression's groups.
fn captures(pattern: &Pattern) -> Vec<String> {
    let Pattern::Regex(regex) = pattern else { return Vec::new() };
    let names = regex.capture_names().flatten().map(str::to_owned);
    (1..regex.captures_len()).map(|number| number.to_string()).chain(names).collect()
}

/// A route has one answer at most.
fn action(t: &mut Reader<'_>, above: &Keys, captures: &[String]) -> Option<Action> {
    let redirect = t.read("redirect", None, |v| rules::redirect(v, captures).map(Some));
    let respond = t.read("respond", None, |v| rules::respond(v, captures).map(Some));
    if t.has("redirect") && t.has("respond") {
        let help = "keep one of them".to_owned();
        t.report.problem(t.place("respond"), "a route cannot have `redirect` and `respond`", Some(help));
    }
    redirect.or(respond).or_else(|| above.action.clone())
}

fn upstream(v: &Value<'_>, around: &Around<'_>) -> Option<Option<Arc<str>>> {
    let text = v.text()?;
    if text.is_empty() {
        return Some(None);
    }
    if let Some((name, _)) = around.upstreams.get_key_value(text) {
        return Some(Some(name.clone()));
    }
    let help = match nearest(text, around.upstreams.keys().map(|name| &**name)) {
        Some(near) => format!("did you mean \"{near}\"?"),
        None => format!("add [upstream.{text}.set.blue] with its endpoints"),
    };
    v.refuse(format!("there is no upstream {text:?}"), help)
}

/// The last item is special, as in Nginx: it answers without being looked for, and may have a query or be `=CODE`.
fn try_files(v: &Value<'_>, captures: &[String]) -> Option<Vec<String>> {
    if let Kind::Text(text) = &v.node.kind
        && text.contains(' ')
    {
        let items: Vec<&str> = text.split_ascii_whitespace().collect();
        return v.refuse(format!("{text:?} is a string, not a list"), format!("write {items:?}"));
    }
    let Kind::List(items) = &v.node.kind else { return v.list(Value::text).map(|_| Vec::new()) };
    if items.is_empty() {
        return v.refuse("the list is empty", "write [\"$uri\", \"$uri/\", \"/index.php\"], or leave the key out");
    }
    let mut left = items.len();
    v.list(|v| {
        left -= 1;
        let text = v.filled_text()?;
        try_file(v, text, left == 0, captures).then(|| text.to_owned())
    })
}

fn try_file(v: &Value<'_>, text: &str, is_last: bool, captures: &[String]) -> bool {
    let wrong = |why: &str, help: &str| v.refuse::<()>(format!("{text:?} {why}"), help).is_some();
    if let Some(code) = text.strip_prefix('=') {
        return match code.parse::<u16>() {
            _ if !is_last => wrong("is not the last", "an answer by code ends the list"),
            Ok(200..=599) => true,
            _ => wrong("is not a status", "write \"=404\", or another code from 200 to 599"),
        };
    }
    if text.starts_with('@') {
        return wrong("is a named location, of which there are none", "write the script's path, as in \"/index.php\"");
    }
    // $uri and the groups of the route's path name a file; the words for queries do not.
    let names_file =
        |part: &Part<'_>| matches!(part, Part::Name(name) if *name == "uri" || captures.iter().any(|known| known == name));
    let (path, query) = text.split_at(text.find('?').unwrap_or(text.len()));
    let in_path = parts(path);
    if !text.starts_with('/') && !in_path.first().is_some_and(names_file) {
        let help = match text {
            _ if text.starts_with("$document_root") || text.starts_with("$request_filename") => {
                "write \"$uri\": files are looked for below `root`".to_owned()
            }
            _ if text.bytes().all(|b| b.is_ascii_digit()) => format!("write \"={text}\" for that status"),
            _ => format!("write \"/{}\"", text.trim_start_matches('$')),
        };
        return wrong("does not begin with $uri or a slash", &help);
    }
    let is_looked_for = !is_last || in_path.iter().any(names_file);
    if is_looked_for {
        let is_plain = |part: &Part<'_>| matches!(part, Part::Literal(_)) || names_file(part);
        let no_group = in_path.iter().find_map(|part| match part {
            Part::Name(name) if !captures.iter().any(|known| known == name) => name.parse::<u32>().ok(),
            _ => None,
        });
        if let Some(number) = no_group {
            let help = "groups are those of the route's own path, written as '~^/old/(.*)$'";
            return wrong(&format!("has ${number}, and the path has no group of that number"), help);
        }
        return match in_path.iter().all(is_plain) {
            false => {
                wrong("has a variable other than $uri", "a file is named by $uri, groups of the route's path as $1, and plain text")
            }
            true if !query.is_empty() => wrong("has a query", &format!("write \"{path}\": a file has none")),
            true => true,
        };
    }
    let tail = text.get(text.find(['?', '$']).unwrap_or(text.len())..).unwrap_or_default();
    if !tail.is_empty() && !tail.starts_with('?') && !tail.starts_with("$is_args") {
        return wrong("has a variable in its path", "only $uri and groups of the route's path may stand there");
    }
    let in_tail = parts(tail.strip_prefix("$is_args").unwrap_or(tail));
    let is_known = |part: &Part<'_>| match part {
        Part::Literal(_) => true,
        Part::Name(name) => ["args", "query_string"].contains(name) || names_file(part),
        Part::Unclosed => false,
    };
    match in_tail.iter().all(is_known) {
        true => true,
        false => {
            wrong("has an unknown variable in its query", "known are $args, $query_string, $uri and groups of the route's path")
        }
    }
}

fn script(v: &Value<'_>) -> Option<Option<String>> {
    let path = v.url_path_or_none()?;
    match &path {
        Some(text) if text.contains('*') => v.refuse(format!("{text:?} is a pattern"), "write the path of one script"),
        Some(text) if text.ends_with('/') => v.refuse(format!("{text:?} is a folder"), "write the path of one script"),
        Some(text) if text.split('/').any(|part| part == "..") => {
            v.refuse(format!("{text:?} has a `..` in it"), "write the path without it")
        }
        _ => Some(path),
    }
}

/// The site's params and this route's: a name that both have takes the route's value.
fn params(v: &Value<'_>, above: &[(String, String)]) -> Option<Vec<(String, String)>> {
    let mut all = above.to_vec();
    for (name, at, value) in v.entries()? {
        let first = name.bytes().next().unwrap_or_default();
        let fine = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') && !first.is_ascii_digit() && !name.is_empty();
        if !fine {
            let help = "a parameter's name is of letters, digits and `_`, as in APP_ENV".to_owned();
            v.report.problem(at, format!("`{}`: {name:?} is not a parameter's name", v.path), Some(help));
        }
        if RESERVED.contains(&name) {
            let help = "it follows from the request and from `root`, `php_root` and `script`".to_owned();
            v.report.problem(at, format!("`{}`: {name} cannot be set", v.path), Some(help));
        }
        let Some(text) = value.text() else { continue };
        // A pair that does not fit into one FastCGI record cannot be sent (FPM.md).
        if name.len() + text.len() > 65_535 - 8 {
            value.refuse::<()>("is longer than a FastCGI record", "shorten it to less than 64 KiB");
        }
        match all.iter_mut().find(|(other, _)| other == name) {
            Some((_, old)) => text.clone_into(old),
            None => all.push((name.to_owned(), text.to_owned())),
        }
    }
    Some(all)
}
