//! The way of one request, step by step, each with a line on why it stands where it does.

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::HashMap,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header, request::Parts};
use http_body::Body;
use http_body_util::Empty;
use hyper::body::Incoming;
use tokio::time::Instant;

use super::{
    accel, actions,
    answer::{Answer, Content},
    files::{FileRequest, Files, Served},
    forward::{self, Php},
    inflight::{Finish, Record, Sinks},
    layers::{
        access, auth, deadline,
        guards::{self, Passed},
        headers::Filled,
        limits, real_ip,
        request_id::RequestId,
    },
    route::{self, Asked, Lookup, Otherwise, Refusal, Script, Step, Target},
    spill::Buffers,
    variables::{Place, Variables},
};
use crate::{
    error::{Error, Kind},
    lifecycle::PhaseCell,
    model::{
        Peer, Route, Settings, Site,
        names::X_REQUEST_ID,
        peer::ClientInfo,
        rules::{BasicAuth, ErrorPage},
        site::Symlinks,
    },
    upstream::Dispatcher,
};

/// A resolved `php_root = "realpath"` is believed for so long.
const REAL_PATH_AGE: Duration = Duration::from_secs(1);

/// As many as Nginx allows in one request.
const MAX_REWRITES: usize = 10;

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
    if let Some(edits) = record.edits.take() {
        edits.apply_to_answer(response.status(), response.headers_mut(), SystemTime::now());
    }
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
    parts: &Parts,
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
    let mut path = route::normalize(parts.uri.path()).map_err(|kind| Error::new(kind, "the path cannot be used".to_owned()))?;
    let mut query = parts.uri.query().map(Cow::Borrowed);
    let asks = Asks { worker, settings, site: &site, peer, client: &client, record };
    let mut rewrites = 0;
    let (route, is_hidden) = loop {
        let route = asks.route(parts, &path).clone();
        // Nobody may ask for it by its own path, nor learn that it is there.
        if route.internal && rewrites == 0 {
            break (route, true);
        }
        let Some(rewrite) = &route.rewrite else { break (route, false) };
        rewrites += 1;
        if rewrites > MAX_REWRITES {
            return Err(Error::new(Kind::Internal, format!("more than {MAX_REWRITES} rewrites, the last by route {}", route.path)));
        }
        let query_now = query.as_deref();
        let target = asks.variables(&route, parts, &path, query_now).fill(rewrite, Place::Rewrite);
        let (next_path, next_query) = route::rewritten(&target, query_now)
            .map_err(|kind| Error::new(kind, format!("route {} rewrites to what is no path", route.path)))?;
        (path, query) = (Cow::Owned(next_path), next_query.map(Cow::Owned));
    };
    let query = query.as_deref();
    record.access_log.set(route.access_log);
    // Whatever becomes of it, errors included.
    *record.edits.borrow_mut() = Filled::new(&route.headers, route.expires, &asks.variables(&route, parts, &path, query));
    let result = match is_hidden {
        true => Err(Error::new(Kind::NotFound, format!("route {} is internal", route.path))),
        false => asks.answer(&route, parts, &path, query, body).await,
    };
    match asks.error_page(&route, parts, &result).await {
        Some(page) => {
            if let Err(error) = &result {
                record.cause.set(Some(error.kind));
            }
            Ok(page)
        }
        None => result,
    }
}

/// What all that a request comes to have in common: the request itself, and the page that stands for its error.
struct Asks<'a> {
    worker: &'a Rc<Worker>,
    settings: &'a Settings,
    site: &'a Arc<Site>,
    peer: &'a Peer,
    client: &'a ClientInfo,
    record: &'a Rc<Record>,
}

/// An answer of ours that is nothing but its status.
#[derive(Clone, Copy)]
struct Bare;

/// The same request as a GET, or HEAD, of something else: whoever posted has posted nothing to that.
fn as_get(parts: &Parts) -> Parts {
    let mut parts = parts.clone();
    if parts.method != Method::HEAD {
        parts.method = Method::GET;
    }
    parts
}

impl Asks<'_> {
    fn route(&self, parts: &Parts, path: &[u8]) -> &Arc<Route> {
        let asked = Asked { method: &parts.method, headers: &parts.headers, from: self.client.address };
        route::route(self.site, &asked, path)
    }

    fn variables<'a>(&'a self, route: &'a Route, parts: &'a Parts, path: &'a [u8], query: Option<&'a str>) -> Variables<'a> {
        let Asks { site, peer, client, record, .. } = self;
        Variables { parts, client, peer, site, route, path, query, id: record.id.as_str() }
    }

    async fn answer(
        &self,
        route: &Arc<Route>,
        parts: &Parts,
        path: &[u8],
        query: Option<&str>,
        body: Incoming,
    ) -> Result<Response<Content>, Error> {
        // Before anything is done for a client that may not, or asks too often. What guards /admin guards /index.php/admin: to many front controllers that is the same.
        let behind = route::declared_script(self.site, path).map(|(_, info)| info).filter(|info| !info.is_empty());
        let behind = behind.map(|info| self.route(parts, info)).filter(|other| !Arc::ptr_eq(other, route));
        for (nth, guard) in std::iter::once(route).chain(behind).enumerate() {
            access::check(&guard.access, self.client.address)?;
            // One that is the site's is the same for both.
            if let Some(limit) = &guard.limit
                && (nth == 0 || !route.limit.as_ref().is_some_and(|own| Arc::ptr_eq(&own.counters, &limit.counters)))
            {
                let held = limits::check(limit, &self.variables(guard, parts, path, query))?;
                if nth == 0 || held.is_some() {
                    self.record.held.set(held);
                }
            }
            if let Some(asked) = &guard.basic_auth
                && !self.is_known(asked, parts).await?
            {
                self.record.cause.set(Some(Kind::Unauthorized));
                let mut response = status(StatusCode::UNAUTHORIZED, &[]);
                if let Some(challenge) = auth::challenge(&asked.realm) {
                    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
                }
                return Ok(response);
            }
        }
        let response = self.by_route(route, parts, path, query, Some(body)).await?;
        self.follow(parts, response).await
    }

    async fn is_known(&self, asked: &BasicAuth, parts: &Parts) -> Result<bool, Error> {
        let Some((user, password)) = auth::credentials(&parts.headers) else { return Ok(false) };
        let right = auth::is_right(&self.worker.buffers.pool, &asked.file, user.clone(), password).await?;
        if right {
            *self.record.user.borrow_mut() = Some(user);
        }
        Ok(right)
    }

    /// Where PHP says that a file is to be sent instead of its answer: that file, by an internal route, for what could be asked for by its own path would not need PHP's word.
    async fn follow(&self, parts: &Parts, mut response: Response<Content>) -> Result<Response<Content>, Error> {
        let Some(accel::Redirect { path, query }) = accel::take(response.headers_mut())? else { return Ok(response) };
        let php = response.into_parts().0;
        let parts = as_get(parts);
        let route = self.route(&parts, &path);
        let shown = String::from_utf8_lossy(&path).into_owned();
        if !route.internal {
            let why = format!("X-Accel-Redirect leads to {shown}, whose route is not internal");
            return Err(Error::new(Kind::Internal, why));
        }
        let mut response = self.by_route(route, &parts, &path, query.as_deref(), Some(Empty::<Bytes>::new())).await?;
        if accel::take(response.headers_mut())?.is_some() {
            return Err(Error::new(Kind::Internal, format!("X-Accel-Redirect leads to {shown}, which leads further")));
        }
        accel::keep(&php.headers, response.headers_mut());
        Ok(response)
    }

    /// The page that the route has for this outcome. PHP's own pages, whatever their status, are PHP's.
    async fn error_page(
        &self,
        route: &Route,
        parts: &Parts,
        result: &Result<Response<Content>, Error>,
    ) -> Option<Response<Content>> {
        let status = match result {
            Err(error) => error.kind.status(),
            Ok(response) if response.extensions().get::<Bare>().is_some() => response.status(),
            Ok(_) => return None,
        };
        let page = route.error_page(status.as_u16())?;
        let mut response = match page {
            ErrorPage::Url(url) => {
                let mut response = self::status(StatusCode::FOUND, &[]);
                response.headers_mut().insert(header::LOCATION, url.clone());
                return Some(response);
            }
            ErrorPage::Path(path) => {
                // A page, not a part of one, nor "not modified".
                let mut parts = as_get(parts);
                for name in [
                    header::RANGE,
                    header::IF_RANGE,
                    header::IF_MATCH,
                    header::IF_NONE_MATCH,
                    header::IF_MODIFIED_SINCE,
                    header::IF_UNMODIFIED_SINCE,
                    header::CONTENT_LENGTH,
                    header::CONTENT_TYPE,
                ] {
                    parts.headers.remove(name);
                }
                let route = self.route(&parts, path.as_bytes());
                // A script would see what was asked for, and might show it; and who asks too often would still be PHP's work.
                let body = (![401, 403, 429].contains(&status.as_u16())).then(Empty::<Bytes>::new);
                match self.by_route(route, &parts, path.as_bytes(), None, body).await {
                    Ok(response) if response.status().is_success() && !accel::is_in(response.headers()) => response,
                    other => {
                        let why = other.map_or_else(|error| error.to_string(), |response| response.status().to_string());
                        tracing::warn!(id = self.record.id.as_str(), page = path, why, "the error page cannot be shown");
                        return None;
                    }
                }
            }
        };
        *response.status_mut() = status;
        match result {
            Err(error) => error.say_when(response.headers_mut()),
            Ok(bare) => {
                if let Some(challenge) = bare.headers().get(header::WWW_AUTHENTICATE) {
                    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge.clone());
                }
            }
        }
        // They are those of the page, which is not what was asked for.
        for name in [header::ETAG, header::LAST_MODIFIED, header::ACCEPT_RANGES] {
            response.headers_mut().remove(name);
        }
        Some(response)
    }

    /// `body`: of a script's request; `None`: no script may run for it.
    async fn by_route<B>(
        &self,
        route: &Arc<Route>,
        parts: &Parts,
        path: &[u8],
        query: Option<&str>,
        body: Option<B>,
    ) -> Result<Response<Content>, Error>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let Asks { worker, settings, site, peer, client, record } = *self;
        let variables = self.variables(route, parts, path, query);
        // Again: something else may have led here.
        access::check(&route.access, client.address)?;
        if let Some(action) = &route.action {
            let mut response = actions::answer(action, &variables)?;
            if parts.method == Method::HEAD {
                *response.body_mut() = Content::Empty;
            }
            return Ok(response);
        }

        // The root of the request's set, where that has one of its own (DESIGN.md, section 5).
        let (set_root, elsewhere) = roots(worker, route.upstream.as_deref());
        let root = set_root.or_else(|| site.root.clone());
        let target = route::target(site, route, path, query, root.is_some());
        let script = match (target, &root) {
            (Target::Script(script), _) => script,
            (Target::Status(code), _) => return Ok(status(code, &[])),
            (Target::NotFound(why), root) => return Err(refused(worker, site, root.as_deref(), path, why).await),
            (Target::Lookup(_), None) => return Err(Error::new(Kind::NotFound, "no root".to_owned())),
            (Target::Lookup(lookup), Some(root)) => {
                let request = FileRequest { method: &parts.method, headers: &parts.headers, path, query };
                let served = if elsewhere.is_empty() {
                    worker.files.serve(request, root, &site.symlinks, lookup).await?
                } else {
                    serve_from_any(worker, site, request, root, &elsewhere, lookup).await?
                };
                match served {
                    Served::Response(response) => return Ok(response.map(Content::File)),
                    Served::Script(script) => script,
                    Served::Status(code) => return Ok(status(code, &[])),
                    Served::NotFound => return Err(Error::new(Kind::NotFound, "no such file".to_owned())),
                }
            }
        };
        let Some(body) = body else {
            return Err(Error::new(Kind::Internal, "a script cannot be the page of 401, 403 or 429".to_owned()));
        };
        let Script { name, path_info, query: script_query } = script;
        let Ok(path_info) = std::str::from_utf8(path_info) else {
            return Err(Error::new(Kind::BadPath, "PATH_INFO is not UTF-8".to_owned()));
        };
        // Until when somebody waits for the answer: whoever is not trusted would only shorten its own time, and fill the log with it.
        let is_trusted = || real_ip::is_trusted(peer.remote.ip(), &settings.listen.trusted_proxies);
        let deadline = deadline::patience(&parts.headers).filter(|_| is_trusted()).map(|patience| record.started + patience);
        // Only PHP sees them: what chose the route and the file is what the client has sent.
        let edited = Filled::new(&route.request_headers, None, &variables).map(|edits| {
            let mut parts = parts.clone();
            edits.apply(&mut parts.headers);
            parts
        });
        let parts = edited.as_ref().unwrap_or(parts);
        let php = Php {
            settings,
            deadline,
            site,
            route,
            script_name: &name,
            path_info,
            query: script_query.as_deref().or(query).unwrap_or_default(),
            parts,
            peer,
            client,
            record,
        };
        forward::forward(worker, &php, body).await
    }
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
    response.extensions_mut().insert(Bare);
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
