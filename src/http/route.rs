//! Host and path to site, route and target. Pure: bytes in, a decision out; `files` asks the file system where the
//! decision needs it.
//!
//! The order of a request: [`site`], [`normalize()`], [`route`], [`target`].

use std::{borrow::Cow, net::IpAddr, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use ipnet::IpNet;

use super::variables::cookie;
use crate::{
    error::Kind,
    model::{
        Route, Site, SiteTable,
        peer::{is_within, without_port},
        rules::{Scheme, Wanted, When},
        site::{Files, Origin, Pattern, ScriptPattern},
        text::argument,
    },
};

pub mod lossless;
mod normalize;
mod scripts;
mod try_files;

pub use normalize::normalize;
pub use scripts::{declared_script, looks_like_php};
pub(crate) use try_files::encode;

/// The site for an authority: port and trailing dot do not count, nor does case. An exact host, else the longest
/// `*.example.com` (one label or more in place of the star), else the default site.
pub fn site<'a>(table: &'a SiteTable, host: &str) -> Option<&'a Arc<Site>> {
    let name = without_port(host);
    let name = name.strip_suffix('.').unwrap_or(name);
    let lower;
    let name = if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        lower = name.to_ascii_lowercase();
        &lower
    } else {
        name
    };
    let wildcard = |(suffix, _): &&(String, Arc<Site>)| name.len() > suffix.len() && name.ends_with(suffix.as_str());
    table.exact.get(name).or_else(|| table.wildcard.iter().find(wildcard).map(|(_, site)| site)).or(table.default.as_ref())
}

/// What of a request chooses its route, besides the path.
pub struct Asked<'a> {
    pub method: &'a Method,
    pub headers: &'a HeaderMap,
    /// The method that a browser asks about before it sends it (CORS).
    pub preflight: Option<&'a HeaderValue>,
    pub query: Option<&'a str>,
    /// The client's address.
    pub from: IpAddr,
    /// As the client sees it.
    pub https: bool,
}

impl Asked<'_> {
    /// A route for GET is one for HEAD too, as in Nginx.
    fn is_for(&self, route: &Route) -> bool {
        let asked_about = self.preflight.filter(|_| route.cors.is_some()).map(HeaderValue::as_bytes);
        let method = route.methods.is_empty()
            || route.methods.contains(self.method)
            || asked_about.is_some_and(|asked| route.methods.iter().any(|method| method.as_str().as_bytes() == asked))
            || *self.method == Method::HEAD && route.methods.contains(&Method::GET);
        method && (route.when.is_always() || self.fits(&route.when))
    }

    /// All of it.
    fn fits(&self, when: &When) -> bool {
        let scheme = if self.https { Scheme::Https } else { Scheme::Http };
        when.scheme.is_none_or(|wanted| wanted == scheme)
            && when.headers.iter().all(|wanted| self.has_header(wanted))
            && when.cookies.iter().all(|wanted| self.has_cookie(wanted))
            && when.args.iter().all(|wanted| self.has_argument(wanted))
            && (when.from.is_empty() || self.is_from(&when.from))
    }

    /// Any of it: whom a maintenance lets through.
    pub fn fits_any(&self, when: &When) -> bool {
        when.headers.iter().any(|wanted| self.has_header(wanted))
            || when.cookies.iter().any(|wanted| self.has_cookie(wanted))
            || self.is_from(&when.from)
    }

    fn has_header(&self, (name, wanted): &(HeaderName, Wanted)) -> bool {
        self.headers.get_all(name).iter().any(|sent| wanted.is(&String::from_utf8_lossy(sent.as_bytes())))
    }

    fn has_cookie(&self, (name, wanted): &(String, Wanted)) -> bool {
        cookie(self.headers, name).is_some_and(|sent| wanted.is(&sent))
    }

    fn has_argument(&self, (name, wanted): &(String, Wanted)) -> bool {
        self.query.and_then(|query| argument(query, name)).is_some_and(|sent| wanted.is(sent))
    }

    fn is_from(&self, networks: &[IpNet]) -> bool {
        is_within(self.from, networks)
    }
}

/// The longest exact path whose methods match, else in the file's order the first prefix or expression that does,
/// else the site's default. `path` is a normalized one.
pub fn route<'a>(site: &'a Site, asked: &Asked<'_>, path: &[u8]) -> &'a Arc<Route> {
    let takes = |route: &&Arc<Route>| asked.is_for(route);
    // Expressions are over text. Bytes that are none are characters too, so that such a path cannot slip past a
    // `~^/private/` that refuses it.
    let text = lossless::to_text(path);
    if let Some(route) = site.exact.get(text.as_ref()).and_then(|routes| routes.iter().find(takes)) {
        return route;
    }
    let fits = |route: &&Arc<Route>| match &route.pattern {
        Pattern::Any => true,
        Pattern::Exact(exact) => path == exact.as_bytes(),
        Pattern::Prefix(prefix) => path.starts_with(prefix.as_bytes()),
        Pattern::Regex(regex) => regex.is_match(&text),
    };
    let mut all = site.ordered.candidates(path).filter(|route| takes(route) && fits(route));
    match all.next() {
        None => &site.default_route,
        // The preset does not close it; what the site says of it, it says by its own routes.
        Some(exception) if exception.origin == Origin::Exception => {
            all.find(|route| route.origin == Origin::Site).unwrap_or(exception)
        }
        Some(route) => route,
    }
}

/// The path and the query that a `rewrite` leads to. As in Nginx the query stays as it is, one that the rewrite has goes before it, and a `?` at the end
/// drops it.
///
/// # Errors
/// As `normalize`; `BadPath` also where a variable has brought in a `..`, which would lead to what the route does not mean.
pub fn rewritten(target: &str, query: Option<&str>) -> Result<(Vec<u8>, Option<String>), Kind> {
    let (path, own) = target.split_once('?').map_or((target, None), |(path, own)| (path, Some(own)));
    let query = match (own, query) {
        (None, query) => query.map(str::to_owned),
        (Some(""), _) => None,
        (Some(own), None | Some("")) => Some(own.to_owned()),
        (Some(own), Some(query)) => Some(match own.strip_suffix('?') {
            Some(own) => own.to_owned(),
            None => format!("{own}&{query}"),
        }),
    };
    let shown = path.replace("%2e", ".").replace("%2E", ".").replace("%2f", "/").replace("%2F", "/");
    let leads_up = shown.split('/').any(|segment| segment == "..");
    let path = normalize(path)?.into_owned();
    if leads_up { Err(Kind::BadPath) } else { Ok((path, query)) }
}

/// A script to run and what it is told of the path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script<'a> {
    /// SCRIPT_NAME: from the root, with its leading `/`.
    pub name: Cow<'a, str>,
    /// What follows a declared script in the path; empty for `front`, an index and `try_files`, as Nginx's
    /// `try_files $uri $uri/ /index.php?$query_string` leaves it: those find the path in REQUEST_URI.
    pub path_info: &'a [u8],
    /// QUERY_STRING where `try_files` rewrites it; `None`: the client's.
    pub query: Option<String>,
}

impl<'a> Script<'a> {
    fn named(name: &'a str) -> Self {
        Script { name: Cow::Borrowed(name), path_info: b"", query: None }
    }
}

/// Why a path that might exist is answered with 404. For the log alone: the client sees no difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Nothing is there.
    Missing,
    /// A segment starts with a dot. 404 and not Nginx's customary 403, which tells that there is something.
    Dotfile,
    /// PHP that `scripts` does not declare. Where it exists on disk (`Files::exists`) the log should name the line
    /// that would declare it.
    UndeclaredScript,
    /// A declared script on a route without an upstream.
    NoUpstream,
}

impl Refusal {
    pub fn say(self) -> &'static str {
        match self {
            Refusal::Missing => "nothing is there",
            Refusal::Dotfile => "a name in it begins with a dot",
            Refusal::UndeclaredScript => "it looks like PHP, and `scripts` does not declare it",
            Refusal::NoUpstream => "a script, and no upstream",
        }
    }
}

/// What answers a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Target<'a> {
    Script(Script<'a>),
    /// The file system decides: `Files::serve`.
    Lookup(Lookup<'a>),
    /// `=CODE` of `try_files`.
    Status(StatusCode),
    NotFound(Refusal),
}

/// What to look for, in this order, and what answers if nothing is there.
#[derive(Clone, Debug, PartialEq)]
pub struct Lookup<'a> {
    pub steps: Vec<Step>,
    pub otherwise: Otherwise<'a>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Otherwise<'a> {
    Script(Script<'a>),
    Status(StatusCode),
    NotFound,
}

/// One look at the file system. Paths are normalized, start with `/` and lie under the root.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// A regular file is sent.
    File(Vec<u8>),
    /// A directory with one of these: without a closing `/` in the path a redirect adds it, else the index answers.
    Directory { path: Vec<u8>, index: Vec<Index> },
    /// A script that a glob declares: runs if the file is there.
    Script(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Index {
    /// A file's name.
    File(String),
    /// A script's full name. One that is declared by its exact path need not be here: the root on this machine may
    /// hold no PHP.
    Script { name: String, must_exist: bool },
}

/// Decides who answers. `path` is normalized, `query` the client's, `has_root` whether there is a root on this machine.
///
/// In order: the route's own `script`; a declared script; dot files and undeclared PHP, which are 404; then
/// `try_files`, by default the file, the directory's index and, with `files = "or-front"`, the front controller.
/// Unlike in Nginx a directory without any index falls through to what follows instead of being 403, so that an
/// application may own a path under which there also is a folder of assets.
pub fn target<'a>(site: &'a Site, route: &'a Route, path: &'a [u8], query: Option<&str>, has_root: bool) -> Target<'a> {
    let run = |script| if route.upstream.is_some() { Target::Script(script) } else { Target::NotFound(Refusal::NoUpstream) };
    if let Some(name) = &route.script {
        let rest = path.strip_prefix(name.as_bytes()).filter(|rest| rest.starts_with(b"/"));
        return run(Script { path_info: rest.unwrap_or_default(), ..Script::named(name) });
    }
    if let Some((name, path_info)) = declared_script(site, path) {
        return run(Script { path_info, ..Script::named(name) });
    }
    if has_dotfile(beyond_literal(route, path)) {
        return Target::NotFound(Refusal::Dotfile);
    }
    if looks_like_php(path) {
        return Target::NotFound(Refusal::UndeclaredScript);
    }
    let mut plan = try_files::Plan::new(site, route, path, query.unwrap_or_default(), has_root);
    match &route.try_files {
        Some(list) => plan.list(list),
        None => {
            plan.try_file(path.to_vec());
            plan.try_directory(path.to_vec(), path.ends_with(b"/"));
            if route.files == Files::OrFront {
                plan.front();
            }
        }
    }
    plan.target()
}

/// What a route says in so many words ("/media/.thumbs*") is its operator's wish; the rest of the path is the client's. "/." alone names nothing.
fn beyond_literal<'a>(route: &Route, path: &'a [u8]) -> &'a [u8] {
    let literal = match &route.pattern {
        Pattern::Exact(literal) | Pattern::Prefix(literal) => literal.as_bytes(),
        Pattern::Any | Pattern::Regex(_) => b"",
    };
    let names_one = has_dotfile(literal) && !literal.ends_with(b"/.");
    path.strip_prefix(literal).filter(|_| names_one).unwrap_or(path)
}

/// Any segment that starts with a dot, but for the registered `/.well-known/` (RFC 8615).
fn has_dotfile(path: &[u8]) -> bool {
    let rest = path.strip_prefix(b"/.well-known").filter(|rest| rest.is_empty() || rest.starts_with(b"/"));
    memchr::memmem::find(rest.unwrap_or(path), b"/.").is_some()
}

/// A declared name without a star.
fn is_exact(pattern: &ScriptPattern) -> bool {
    !pattern.0.contains('*')
}

#[cfg(test)]
pub(super) mod tests;
