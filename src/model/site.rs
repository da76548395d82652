//! Sites and routes, compiled.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};

use regex::Regex;

use super::{
    rules::{Access, Action, BasicAuth, ErrorPage, ErrorPages, Expires, HeaderEdits, Limit, When},
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
    pub root: Option<PathBuf>,
    pub php_root: PhpRoot,
    pub index: Vec<String>,
    pub scripts: Vec<ScriptPattern>,
    /// `None`: `front = ""`.
    pub front: Option<String>,
    pub symlinks: Symlinks,
    /// Exact paths.
    pub exact: HashMap<String, Vec<Arc<Route>>>,
    /// Prefixes and expressions in the file's order.
    pub ordered: Vec<Arc<Route>>,
    /// The site's own keys: what applies where no route matches.
    pub default_route: Arc<Route>,
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

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Symlinks {
    Follow,
    Within,
    Folders(Vec<PathBuf>),
}

#[derive(Debug)]
pub struct Route {
    /// As written; "" for a site's default.
    pub path: String,
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
    pub fn error_page(&self, status: u16) -> Option<&ErrorPage> {
        self.error_pages.iter().find(|((from, to), _)| (*from..=*to).contains(&status)).map(|(_, page)| page)
    }
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
