//! Sites and routes, compiled.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};

use regex::Regex;

use super::{
    ordered::Ordered,
    rules::{
        Access, Action, BasicAuth, Coding, Compress, Cors, ErrorPage, ErrorPages, Expires, HeaderEdits, Limit, Maintenance, When,
    },
    text::Text,
};

/// Every site of a snapshot. Requests hold the `Arc<Site>` and `Arc<Route>` they were given, never the table.
#[derive(Debug, Default)]
pub struct SiteTable {
    /// Lower-case host without port.
    pub exact: HashMap<String, Arc<Site>>,
    /// `*.example.com` as `.example.com`, longest first.
    pub wildcard: Vec<(String, Arc<Site>)>,
    pub default: Option<Arc<Site>>,
}

#[derive(Debug)]
pub struct Site {
    /// The first host, or "default": the `site` label of metrics and logs.
    pub name: Arc<str>,
    /// Whose defaults it has, for `check --expand`.
    pub preset: Option<&'static str>,
    pub root: Option<PathBuf>,
    pub php_root: PhpRoot,
    pub index: Vec<String>,
    pub scripts: Vec<ScriptPattern>,
    /// `None`: `front = ""`.
    pub front: Option<String>,
    pub symlinks: Symlinks,
    /// What comes by http is sent to https.
    pub https_only: bool,
    /// Exact paths.
    pub exact: HashMap<String, Vec<Arc<Route>>>,
    /// Prefixes and expressions in the file's order.
    pub ordered: Ordered,
    /// The site's own keys: what applies where no route matches.
    pub default_route: Arc<Route>,
}

impl Site {
    /// Every route but the site's own, in no order that means anything.
    pub fn routes(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.exact.values().flatten().chain(self.ordered.iter())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PhpRoot {
    /// The same path as FPM's as here.
    SameAsRoot,
    Path(String),
    /// root with links resolved.
    RealPath,
}

/// A declared script: exact, or a glob in which `*` never crosses a `/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScriptPattern(pub String);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Symlinks {
    Follow,
    Within,
    Folders(Vec<PathBuf>),
}

#[derive(Debug)]
pub struct Route {
    /// As written; "" for a site's default.
    pub path: String,
    /// Where it is written: "site.toml:12:1", "preset drupal:30:1".
    pub at: String,
    pub origin: Origin,
    pub pattern: Pattern,
    /// Empty: any.
    pub methods: Vec<http::Method>,
    pub when: When,
    pub access: Access,
    /// The path, and perhaps query, to go on with instead; routes are looked through again.
    pub rewrite: Option<Text>,
    /// Only for what was rewritten to it.
    pub internal: bool,
    pub limit: Option<Limit>,
    pub basic_auth: Option<BasicAuth>,
    /// Instead of a file or a script.
    pub action: Option<Action>,
    /// The first that has the status.
    pub error_pages: ErrorPages,
    /// Of the answer.
    pub headers: HeaderEdits,
    /// Of the request, before PHP sees it.
    pub request_headers: HeaderEdits,
    pub expires: Option<Expires>,
    pub cors: Option<Arc<Cors>>,
    pub maintenance: Option<Arc<Maintenance>>,
    /// Of a static file, beside it: the first that the client takes.
    pub precompressed: Vec<Coding>,
    pub compress: Option<Arc<Compress>>,
    /// The upstream's name; `None`: no PHP here.
    pub upstream: Option<Arc<str>>,
    pub files: Files,
    /// `None`: what `files` says.
    pub try_files: Option<Vec<String>>,
    /// Always this script, whatever the path.
    pub script: Option<String>,
    pub body_limit: u64,
    /// `None`: the upstream's.
    pub read_timeout: Option<Duration>,
    pub params: Vec<(String, String)>,
    pub access_log: bool,
    /// Of its upstream; `None`: none.
    pub lane: Option<Arc<str>>,
}

impl Route {
    /// The same for an exact path, in its place among the others.
    pub fn into_expression(self) -> Option<Route> {
        let expression = format!("^{}$", regex::escape(&self.path));
        let pattern = Pattern::Regex(Regex::new(&expression).ok()?);
        Some(Route { path: format!("~{expression}"), pattern, ..self })
    }

    /// Whether it is there to refuse, beyond what its site does (`site`).
    pub fn closes(&self, site: &Route) -> bool {
        let refuses = matches!(&self.action, Some(Action::Respond { status, .. }) if status.is_client_error());
        refuses && self.action != site.action || self.internal && !site.internal || self.access != site.access
    }

    pub fn error_page(&self, status: u16) -> Option<&ErrorPage> {
        self.error_pages.iter().find(|((from, to), _)| (*from..=*to).contains(&status)).map(|(_, page)| page)
    }
}

/// Who has written a route.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    #[default]
    Site,
    Preset,
    /// A preset's exception from what it closes: it stands before the site's own routes, and gives way to them.
    Exception,
}

#[derive(Debug)]
pub enum Pattern {
    /// A site's default route.
    Any,
    Exact(String),
    /// Without the closing `*`.
    Prefix(String),
    Regex(Regex),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// A missing file goes to `front`.
    OrFront,
    /// A missing file is 404.
    Or404,
}
