//! The way of one request, step by step, each with a line on why it stands where it does.

use std::{cell::RefCell, collections::HashMap, path::Path, path::PathBuf, rc::Rc, sync::Arc, time::Duration};

use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::{
    answer::{Answer, Content},
    files::{FileRequest, Files, Served},
    forward::{self, Php},
    inflight::{Finish, Record, Sinks},
    layers::{
        deadline,
        guards::{self, Passed},
        real_ip,
        request_id::RequestId,
    },
    route::{self, Lookup, Otherwise, Refusal, Script, Step, Target},
    spill::Buffers,
};
use crate::{
    error::{Error, Kind},
    lifecycle::PhaseCell,
    model::{Peer, Settings, names::X_REQUEST_ID, site::Symlinks},
    upstream::Dispatcher,
};

/// A resolved `php_root = "realpath"` is believed for so long.
const REAL_PATH_AGE: Duration = Duration::from_secs(1);

/// What the requests of one worker share.
pub struct Worker {
    pub dispatcher: Rc<Dispatcher>,
    pub phase: Arc<PhaseCell>,
    pub buffers: Buffers,
    pub files: Files,
    pub sinks: Rc<Sinks>,
    /// Keyed by the roots of sites.
    real_paths: RefCell<HashMap<PathBuf, (String, Instant)>>,
}

impl Worker {
    pub fn new(dispatcher: Rc<Dispatcher>, phase: Arc<PhaseCell>, buffers: Buffers, files: Files, sinks: Rc<Sinks>) -> Rc<Self> {
        Rc::new(Worker { dispatcher, phase, buffers, files, sinks, real_paths: RefCell::default() })
    }

    /// `root` with its links resolved, off the worker, at most once a second.
    pub async fn real_path(&self, root: &Path) -> String {
        if let Some((path, at)) = self.real_paths.borrow().get(root)
            && at.elapsed() < REAL_PATH_AGE
        {
            return path.clone();
        }
        let link = root.to_owned();
        let resolved = self.buffers.pool.spawn_blocking(move || std::fs::canonicalize(&link).unwrap_or(link)).await;
        let path = resolved.map_or_else(|_| root.to_string_lossy().into_owned(), |p| p.to_string_lossy().into_owned());
        self.real_paths.borrow_mut().insert(root.to_owned(), (path.clone(), Instant::now()));
        path
    }
}

/// Answers one request, whatever it is.
pub async fn serve(worker: Rc<Worker>, peer: Peer, request: Request<Incoming>) -> Response<Answer> {
    let (parts, body) = request.into_parts();
    let (settings, sites) = {
        let snapshot = worker.dispatcher.store.load();
        (snapshot.settings.clone(), snapshot.sites.clone())
    };
    let trusted = real_ip::is_trusted(peer.remote.ip(), &settings.listen.trusted_proxies);

    // First of all, so that everything that follows can be told apart in the log.
    let id = RequestId::of(&parts.headers, trusted);
    let record = Record::new(id, &parts, peer.remote.ip().to_canonical());
    // From here on it is in flight: whatever happens, its end is logged and counted.
    let mut finish = Finish::new(record.clone(), worker.sinks.clone());

    let result = answer(&worker, &settings, &sites, &peer, &parts, body, &record).await;
    drop(sites);
    let mut response = result.unwrap_or_else(|error| {
        finish.failed(&error);
        tracing::debug!(id = record.id.as_str(), cause = error.kind.cause(), detail = error.detail, "answered by an error");
        let mut response = error.response::<Content>();
        if response.status() == StatusCode::METHOD_NOT_ALLOWED {
            response.headers_mut().entry(header::ALLOW).or_insert(HeaderValue::from_static(guards::ALLOW));
        }
        // Where a request is malformed nobody can be sure where the next one begins.
        if error.kind == Kind::BadRequest && parts.version < Version::HTTP_2 {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if parts.method == Method::HEAD {
            *response.body_mut() = Content::Empty;
        }
        response
    });
    record.status.set(response.status().as_u16());
    if let Ok(value) = HeaderValue::from_str(record.id.as_str()) {
        response.headers_mut().insert(X_REQUEST_ID, value);
    }
    if matches!(response.body(), Content::Empty) {
        finish.whole();
    }
    response.map(|content| Answer::new(content, finish))
}

async fn answer(
    worker: &Rc<Worker>,
    settings: &Settings,
    sites: &crate::model::SiteTable,
    peer: &Peer,
    parts: &http::request::Parts,
    body: Incoming,
    record: &Rc<Record>,
) -> Result<Response<Content>, Error> {
    // Before Host is judged: load balancers check health with any Host.
    if !settings.listen.health_path.is_empty() && parts.uri.path() == settings.listen.health_path {
        return Ok(health(worker));
    }
    // Before anything looks at the contents of a request that is malformed or too large.
    let limits =
        guards::Limits { max_uri_bytes: settings.listen.max_uri_bytes, max_header_bytes: settings.listen.max_header_bytes };
    let host = match guards::check(parts, &limits)? {
        Passed::OptionsStar => return Ok(status(StatusCode::NO_CONTENT, &[(header::ALLOW, guards::ALLOW)])),
        Passed::Request { host } => host,
    };
    // Before the site is chosen: a trusted proxy may tell another host.
    let client = real_ip::client(peer, false, &parts.headers, &host, &settings.listen.trusted_proxies);
    let site = route::site(sites, &client.host)
        .ok_or_else(|| Error::new(Kind::NoSite, format!("no site for host {:?}", client.host)))?
        .clone();
    record.way.borrow_mut().site = Some(site.name.clone());
    // Once, and before routing: routes, files and scripts see the same path.
    let path = route::normalize(parts.uri.path()).map_err(|kind| Error::new(kind, "the path cannot be used".to_owned()))?;
    let route = route::route(&site, &parts.method, &path).clone();
    record.access_log.set(route.access_log);

    // The root of the request's set, where that has one of its own (DESIGN.md, section 5).
    let (set_root, elsewhere) = roots(worker, route.upstream.as_deref());
    let root = set_root.or_else(|| site.root.clone());
    let target = route::target(&site, &route, &path, parts.uri.query(), root.is_some());
    let script = match (target, &root) {
        (Target::Script(script), _) => script,
        (Target::Status(code), _) => return Ok(status(code, &[])),
        (Target::NotFound(why), root) => return Err(refused(worker, &site, root.as_deref(), &path, why).await),
        (Target::Lookup(_), None) => return Err(Error::new(Kind::NotFound, "no root".to_owned())),
        (Target::Lookup(lookup), Some(root)) => {
            let request = FileRequest { method: &parts.method, headers: &parts.headers, path: &path, query: parts.uri.query() };
            let served = if elsewhere.is_empty() {
                worker.files.serve(request, root, &site.symlinks, lookup).await?
            } else {
                serve_from_any(worker, &site, request, root, &elsewhere, lookup).await?
            };
            match served {
                Served::Response(response) => return Ok(response.map(Content::File)),
                Served::Script(script) => script,
                Served::Status(code) => return Ok(status(code, &[])),
                Served::NotFound => return Err(Error::new(Kind::NotFound, "no such file".to_owned())),
            }
        }
    };
    let Script { name, path_info, query } = script;
    let Ok(path_info) = std::str::from_utf8(path_info) else {
        return Err(Error::new(Kind::BadPath, "PATH_INFO is not UTF-8".to_owned()));
    };
    // Until when somebody waits for the answer: whoever is not trusted would only shorten its own time, and fill the log with it.
    let trusted = real_ip::is_trusted(peer.remote.ip(), &settings.listen.trusted_proxies);
    let deadline = deadline::patience(&parts.headers).filter(|_| trusted).map(|patience| record.started + patience);
    let php = Php {
        settings,
        deadline,
        site: &site,
        route: &route,
        script_name: &name,
        path_info,
        query: query.as_deref().unwrap_or(parts.uri.query().unwrap_or("")),
        parts,
        peer,
        client: &client,
        record,
    };
    forward::forward(worker, &php, body).await
}

/// As on the ops port, for load balancers that check the traffic port.
fn health(worker: &Worker) -> Response<Content> {
    let phase = worker.phase.get();
    let code = if worker.phase.is_healthy() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut response = Response::new(Content::from(format!("{}\n", phase.name())));
    *response.status_mut() = code;
    response
}

fn status(code: StatusCode, headers: &[(header::HeaderName, &'static str)]) -> Response<Content> {
    let mut response = Response::new(Content::Empty);
    *response.status_mut() = code;
    for (name, value) in headers {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// The root of the active set, if it has one of its own; with `assets_fallback` also those of the others. One look: a swap in between could
/// leave one out.
fn roots(worker: &Worker, upstream: Option<&str>) -> (Option<PathBuf>, Vec<PathBuf>) {
    let snapshot = worker.dispatcher.store.load();
    let Some(upstream) = upstream.and_then(|name| snapshot.upstreams.get(name)) else { return (None, Vec::new()) };
    let others = upstream.sets.values().filter(|set| upstream.policy.assets_fallback && set.name() != upstream.active.name());
    (upstream.active.config.root.clone(), others.filter_map(|set| set.config.root.clone()).collect())
}

/// The request's own root has the first word; files alone, not scripts and indices, are looked for in the others; then what answers where
/// nothing is there.
async fn serve_from_any<'a>(
    worker: &Worker,
    site: &crate::model::Site,
    request: FileRequest<'_>,
    own: &Path,
    others: &[PathBuf],
    lookup: Lookup<'a>,
) -> Result<Served<'a>, Error> {
    let Lookup { steps, otherwise } = lookup;
    let files = steps.iter().filter(|step| matches!(step, Step::File(_))).cloned().collect::<Vec<_>>();
    let served = worker.files.serve(request, own, &site.symlinks, Lookup { steps, otherwise: Otherwise::NotFound }).await?;
    if !matches!(served, Served::NotFound) {
        return Ok(served);
    }
    if matches!(*request.method, Method::GET | Method::HEAD) {
        for root in others {
            let lookup = Lookup { steps: files.clone(), otherwise: Otherwise::NotFound };
            // Whatever the site's own rule: a link of another release leads nowhere but into that release. And what is wrong there is not an answer here.
            if let Ok(response @ Served::Response(_)) = worker.files.serve(request, root, &Symlinks::Within, lookup).await {
                return Ok(response);
            }
        }
    }
    Ok(otherwise.into())
}

/// 404, and for a script that is there but not declared the line that would declare it.
async fn refused(worker: &Worker, site: &crate::model::Site, root: Option<&Path>, path: &[u8], why: Refusal) -> Error {
    if let (Refusal::UndeclaredScript, Some(root)) = (&why, root)
        && worker.files.exists(root, &site.symlinks, path).await
    {
        let script = String::from_utf8_lossy(path);
        tracing::warn!(
            site = &*site.name,
            script = &*script,
            declare = format!("scripts = [{script:?}]"),
            "a script that is not declared was asked for"
        );
    }
    Error::new(Kind::NotFound, format!("{why:?}"))
}
