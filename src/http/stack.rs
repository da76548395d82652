//! The way of one request, step by step, each with a line on why it stands where it does.

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::HashMap,
    convert::Infallible,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header, request::Parts};
use http_body::Body;
use http_body_util::Empty;
use hyper::body::Incoming;
use tokio::time::Instant;

use super::{
    accel, actions,
    answer::{Answer, Content},
    files::{Around, FileRequest, Files, Served},
    forward::{self, Php},
    inflight::{Finish, Record, Sinks},
    layers::{
        access, auth, compress, cors, deadline,
        guards::{self, Passed},
        headers::Filled,
        limits, maintenance, real_ip,
        request_id::RequestId,
    },
    pace::Pace,
    route::{self, Asked, Lookup, Otherwise, Refusal, Script, Step, Target},
    spill::Buffers,
    unread::Lent,
    variables::{Place, Variables},
};
use crate::{
    error::{Error, Kind},
    lifecycle::PhaseCell,
    model::{
        Peer, Route, Settings, Site,
        names::X_REQUEST_ID,
        peer::{ClientInfo, is_within, without_port},
        rules::{BasicAuth, ErrorPage, Maintenance},
        site::Symlinks,
    },
    telemetry::{access_log::Heads, seldom::SeldomOf, trace::Trace},
    upstream::Dispatcher,
};

/// A resolved `php_root = "realpath"` is believed for so long.
const REAL_PATH_AGE: Duration = Duration::from_secs(1);

/// What a certificate authority asks for by http (RFC 8555, section 8.3).
const ACME: &[u8] = b"/.well-known/acme-challenge/";

/// As many as Nginx allows in one request.
const MAX_REWRITES: usize = 10;

/// Roots that a worker remembers; reloads may name ever new ones.
const REAL_PATHS: usize = 16 * 1024;

/// What the requests of one worker share.
pub struct Worker {
    pub dispatcher: Rc<Dispatcher>,
    pub phase: Arc<PhaseCell>,
    pub buffers: Buffers,
    pub files: Files,
    pub sinks: Rc<Sinks>,
    /// Lines of what goes wrong with each request while something is: by what has failed where.
    pub seldom: SeldomOf<(u64, Kind)>,
    /// Keyed by the roots of sites.
    real_paths: RefCell<HashMap<PathBuf, (String, Instant)>>,
}

impl Worker {
    pub fn new(dispatcher: Rc<Dispatcher>, phase: Arc<PhaseCell>, buffers: Buffers, files: Files, sinks: Rc<Sinks>) -> Rc<Self> {
        Rc::new(Worker { dispatcher, phase, buffers, files, sinks, seldom: SeldomOf::default(), real_paths: RefCell::default() })
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
        let mut known = self.real_paths.borrow_mut();
        if known.len() >= REAL_PATHS {
            known.clear();
        }
        known.insert(root.to_owned(), (path.clone(), Instant::now()));
        path
    }
}

/// Answers one request, whatever it is.
pub async fn serve(worker: Rc<Worker>, peer: Peer, request: Request<Incoming>) -> Result<Response<Answer>, Infallible> {
    let (mut parts, body) = request.into_parts();
    let (body, unread) = Lent::new(body);
    let (settings, sites) = {
        let snapshot = worker.dispatcher.store.load();
        (snapshot.settings.clone(), snapshot.sites.clone())
    };
    let trusted = is_within(peer.remote.ip(), &settings.listen.trusted_proxies);

    // First of all, so that everything that follows can be told apart in the log.
    let id = RequestId::of(&parts.headers, trusted);
    let trace = worker.sinks.traces.is_some().then(|| Trace::begin(&mut parts.headers, trusted, settings.tracing.sample));
    let record = Record::new(id, &parts, peer.remote.ip().to_canonical(), trace);
    // From here on it is in flight: whatever happens, its end is logged and counted.
    let mut finish = Finish::new(record.clone(), worker.sinks.clone());

    let result = answer(&worker, &settings, &sites, &peer, &parts, body, &record).await;
    drop(sites);
    if parts.version >= Version::HTTP_2 {
        unread.read_away();
    }
    let mut response = result.unwrap_or_else(|error| {
        finish.failed(&error);
        explain(&worker, &record, &error);
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
    // Nobody reads the rest of it to find the next request behind it (RFC 9112, section 9.6).
    let has_body = parts.headers.contains_key(header::TRANSFER_ENCODING)
        || parts.headers.get(header::CONTENT_LENGTH).is_some_and(|length| length != "0");
    if has_body && !record.is_read.get() && parts.version < Version::HTTP_2 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    // Errors too: else a page sees no more of one than that there was one.
    if let Some(told) = record.cors.take() {
        let is_preflight = response.status() == StatusCode::NO_CONTENT && cors::is_preflight(&parts);
        response = Box::pin(cors::told(&told, &parts, is_preflight, response)).await;
    }
    record.answered(response.status().as_u16());
    let is_phps = record.way.borrow().attempts > 0;
    if let Some(edits) = record.edits.take() {
        edits.apply_to_answer(response.status(), is_phps, response.headers_mut(), SystemTime::now());
    }
    if let Ok(value) = HeaderValue::from_str(record.id.as_str()) {
        response.headers_mut().insert(X_REQUEST_ID, value);
    }
    // Last, when its type and all else is said.
    let compress = record.way.borrow().route.as_ref().and_then(|route| route.compress.clone());
    if let Some(compress) = compress {
        response = Box::pin(compress::shrunk(&compress, &worker.buffers.pool, &parts, is_phps, response)).await;
    }
    if let Some(heads) = record.heads.borrow_mut().as_mut() {
        heads.response.clone_from(response.headers());
    }
    // hyper never asks for a body that is over from the beginning: a 304, a redirect, the answer to HEAD.
    if response.body().is_over() {
        finish.whole();
    }
    let pace = record.pace.get().map(Pace::new);
    Ok(response.map(|content| Answer::new(content, pace, finish)))
}

fn explain(worker: &Worker, record: &Record, error: &Error) {
    let (id, cause, detail) = (record.id.as_str(), error.kind.cause(), &error.detail);
    // This machine's, and it will be the same with the next request.
    if matches!(error.kind, Kind::DiskFull | Kind::BufferFull) {
        if let Some(unsaid) = worker.seldom.may_say((0, error.kind)) {
            tracing::warn!(id, path = record.uri.path(), cause, detail, unsaid, "refused for want of room");
        }
        return;
    }
    // The configuration's fault, or the application's, and nobody else would say so.
    if error.kind == Kind::Internal {
        tracing::warn!(id, path = record.uri.path(), cause, detail, "answered by an error");
    } else {
        tracing::debug!(id, cause, detail, "answered by an error");
    }
}

async fn answer(
    worker: &Rc<Worker>,
    settings: &Settings,
    sites: &crate::model::SiteTable,
    peer: &Peer,
    parts: &Parts,
    body: Lent,
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
    let client = real_ip::client(peer, peer.tls || peer.tls_before, &parts.headers, &host, &settings.listen.trusted_proxies);
    let site = route::site(sites, &client.host)
        .ok_or_else(|| Error::new(Kind::NoSite, format!("no site for host {:?}", client.host)))?
        .clone();
    record.way.borrow_mut().site = Some(site.name.clone());
    // Once, and before routing: routes, files and scripts see the same path.
    let mut path = route::normalize(parts.uri.path()).map_err(|kind| Error::new(kind, "the path cannot be used".to_owned()))?;
    if site.https_only && !client.https && !path.starts_with(ACME) {
        return Ok(to_https(parts, &client.host));
    }
    let mut query = parts.uri.query().map(Cow::Borrowed);
    let asks = Asks { worker, settings, site: &site, peer, client: &client, record };
    let mut rewrites = 0;
    let (route, is_hidden) = loop {
        let route = asks.route(parts, &path, query.as_deref()).clone();
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
    record.way.borrow_mut().route = Some(route.clone());
    if route.access_log && worker.sinks.access.needs_heads() {
        *record.heads.borrow_mut() = Some(Box::new(heads(&asks, parts, &path)));
    }
    // Whatever becomes of it, errors included.
    record.cors.borrow_mut().clone_from(&route.cors);
    *record.edits.borrow_mut() = Filled::new(&route.headers, route.expires, &asks.variables(&route, parts, &path, query));
    let result = match is_hidden {
        true => Err(Error::new(Kind::NotFound, format!("route {} is internal", route.path))),
        false => asks.answer(&route, parts, &path, query, body).await,
    };
    let page = match Asks::may_have_page(&result) {
        Some(status) => Box::pin(asks.error_page(&route, parts, &result, status)).await,
        None => None,
    };
    match page {
        Some(page) => {
            if let Err(error) = &result {
                record.cause.set(Some(error.kind));
                explain(worker, record, error);
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

/// The same by https. A method other than GET stays what it is (RFC 9110, section 15.4.9).
fn to_https(parts: &Parts, host: &str) -> Response<Content> {
    let is_get = matches!(parts.method, Method::GET | Method::HEAD);
    let mut response = status(if is_get { StatusCode::MOVED_PERMANENTLY } else { StatusCode::PERMANENT_REDIRECT }, &[]);
    // The port was that of http.
    let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
    if let Ok(location) = HeaderValue::from_str(&format!("https://{}{target}", without_port(host))) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

fn heads(asks: &Asks<'_>, parts: &Parts, path: &[u8]) -> Heads {
    let Asks { client, peer, .. } = asks;
    Heads {
        host: without_port(&client.host).to_ascii_lowercase(),
        https: client.https,
        server_addr: peer.local.ip().to_canonical(),
        server_port: client.server_port,
        remote_port: client.port,
        uri: path.to_vec(),
        request: parts.headers.clone(),
        response: HeaderMap::new(),
    }
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
    fn asked<'a>(&self, parts: &'a Parts, query: Option<&'a str>) -> Asked<'a> {
        // A browser's question is about the request that it would send.
        let preflight = cors::is_preflight(parts).then(|| parts.headers.get(header::ACCESS_CONTROL_REQUEST_METHOD)).flatten();
        Asked {
            method: &parts.method,
            preflight,
            headers: &parts.headers,
            query,
            from: self.client.address,
            https: self.client.https,
        }
    }

    fn route(&self, parts: &Parts, path: &[u8], query: Option<&str>) -> &Arc<Route> {
        route::route(self.site, &self.asked(parts, query), path)
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
        body: Lent,
    ) -> Result<Response<Content>, Error> {
        // Before anything is done for a client that may not, or asks too often. What guards /admin guards /index.php/admin: to many front controllers that is the same.
        let behind = route::declared_script(self.site, path).map(|(_, info)| info).filter(|info| !info.is_empty());
        let behind = behind.map(|info| self.route(parts, info, query)).filter(|other| !Arc::ptr_eq(other, route));
        for (nth, guard) in std::iter::once(route).chain(behind).enumerate() {
            if let Some(maintenance) = &guard.maintenance
                && !self.asked(parts, query).fits_any(&maintenance.bypass)
                && self.is_on(maintenance).await
            {
                let why = format!("{} is in maintenance", guard.at);
                return Err(Error::new(Kind::Maintenance, why).come_again(maintenance.retry_after));
            }
            access::check(&guard.access, self.client.address)?;
            // A browser asks without its user's name.
            if nth == 0 && route.cors.is_some() && cors::is_preflight(parts) {
                return Ok(status(StatusCode::NO_CONTENT, &[]));
            }
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
                && !Box::pin(self.is_known(asked, parts)).await?
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

    /// Whether the file is there that turns a maintenance on, as of a second ago at most.
    async fn is_on(&self, maintenance: &Maintenance) -> bool {
        match &maintenance.flag {
            None => true,
            Some(flag) => maintenance::is_on(flag, &self.worker.buffers.pool).await,
        }
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
        let accel::Told { redirect, limit_rate, charset } = accel::take(response.headers_mut())?;
        self.record.pace.set(limit_rate);
        let (mut response, charset) = match redirect {
            None => (response, charset),
            Some(redirect) => {
                let (response, inner) = self.redirected(parts, redirect, response).await?;
                (response, inner.or(charset))
            }
        };
        if let Some(charset) = charset {
            accel::say_charset(&charset, response.headers_mut());
        }
        Ok(response)
    }

    async fn redirected(
        &self,
        parts: &Parts,
        redirect: accel::Redirect,
        response: Response<Content>,
    ) -> Result<(Response<Content>, Option<String>), Error> {
        let accel::Redirect { path, query } = redirect;
        let php = response.into_parts().0;
        let parts = as_get(parts);
        let route = self.route(&parts, &path, query.as_deref());
        let shown = String::from_utf8_lossy(&path).into_owned();
        if !route.internal {
            let why = format!("X-Accel-Redirect leads to {shown}, whose route is not internal");
            return Err(Error::new(Kind::Internal, why));
        }
        let body = Some(Empty::<Bytes>::new());
        // On the heap, as all that is rare: the way of every request would need room for it.
        let mut response = Box::pin(self.by_route(route, &parts, &path, query.as_deref(), body)).await?;
        // A script may have its own word.
        let accel::Told { redirect: further, limit_rate, charset } = accel::take(response.headers_mut())?;
        if limit_rate.is_some() {
            self.record.pace.set(limit_rate);
        }
        if further.is_some() {
            return Err(Error::new(Kind::Internal, format!("X-Accel-Redirect leads to {shown}, which leads further")));
        }
        accel::keep(&php.headers, response.headers_mut());
        Ok((response, charset))
    }

    /// The status that a page of the route may be shown for. PHP's own pages, whatever their status, are PHP's.
    fn may_have_page(result: &Result<Response<Content>, Error>) -> Option<StatusCode> {
        match result {
            Err(error) => Some(error.kind.status()),
            Ok(response) => response.extensions().get::<Bare>().map(|Bare| response.status()),
        }
    }

    /// The page that the route has for this outcome.
    async fn error_page(
        &self,
        route: &Route,
        parts: &Parts,
        result: &Result<Response<Content>, Error>,
        status: StatusCode,
    ) -> Option<Response<Content>> {
        let is_maintenance = matches!(result, Err(error) if error.kind == Kind::Maintenance);
        let own = route.maintenance.as_ref().filter(|_| is_maintenance).and_then(|maintenance| maintenance.page.clone());
        let own = own.map(ErrorPage::Path);
        let page = own.as_ref().or_else(|| route.error_page(status.as_u16()))?;
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
                let route = self.route(&parts, path.as_bytes(), None);
                // A script would see what was asked for, and might show it; and who asks too often would still be PHP's work, which in a maintenance is not to be
                // asked.
                let may_run = ![401, 403, 429].contains(&status.as_u16()) && !is_maintenance;
                let body = may_run.then(Empty::<Bytes>::new);
                match Box::pin(self.by_route(route, &parts, path.as_bytes(), None, body)).await {
                    // An application's own page may say the status itself.
                    Ok(mut response)
                        if (response.status().is_success() || response.status() == status)
                            && response.extensions().get::<Bare>().is_none()
                            && !accel::is_in(response.headers()) =>
                    {
                        if let Ok(told) = accel::take(response.headers_mut()) {
                            self.record.pace.set(told.limit_rate);
                        }
                        response
                    }
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
                for name in [header::WWW_AUTHENTICATE, header::ALLOW, header::CONTENT_RANGE] {
                    if let Some(value) = bare.headers().get(&name) {
                        response.headers_mut().insert(name, value.clone());
                    }
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
            // As Nginx's `return 404`.
            let is_bare = matches!(response.body(), Content::Empty);
            if is_bare && (response.status().is_client_error() || response.status().is_server_error()) {
                response.extensions_mut().insert(Bare);
            }
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
            (Target::NotFound(why), root) => return Err(Box::pin(refused(worker, site, root.as_deref(), path, why)).await),
            (Target::Lookup(_), None) => return Err(Error::new(Kind::NotFound, "no root".to_owned())),
            (Target::Lookup(lookup), Some(root)) => {
                let request = FileRequest { method: &parts.method, headers: &parts.headers, path, query };
                let around =
                    Around { root, symlinks: &site.symlinks, precompressed: &route.precompressed, may_be_old: !route.internal };
                let served = if elsewhere.is_empty() {
                    worker.files.serve(request, around, lookup).await?
                } else {
                    Box::pin(serve_from_any(worker, request, around, &elsewhere, lookup)).await?
                };
                match served {
                    Served::Response(mut response) => {
                        if response.status().is_client_error() {
                            response.extensions_mut().insert(Bare);
                            if response.status() == StatusCode::METHOD_NOT_ALLOWED {
                                record.cause.set(Some(Kind::MethodNotAllowed));
                            }
                        }
                        return Ok(response.map(Content::File));
                    }
                    Served::Script(script) => script,
                    Served::Status(code) => return Ok(status(code, &[])),
                    Served::NotFound => return Err(Error::new(Kind::NotFound, "no such file".to_owned())),
                }
            }
        };
        let Some(body) = body else {
            return Err(Error::new(
                Kind::Internal,
                format!(
                    "there is no file {}, and no script may be the page of 401, 403, 429 or a maintenance",
                    String::from_utf8_lossy(path)
                ),
            ));
        };
        let Script { name, path_info, query: script_query } = script;
        let Ok(path_info) = std::str::from_utf8(path_info) else {
            return Err(Error::new(Kind::BadPath, "PATH_INFO is not UTF-8".to_owned()));
        };
        // Until when somebody waits for the answer: whoever is not trusted would only shorten its own time, and fill the log with it.
        let is_trusted = || is_within(peer.remote.ip(), &settings.listen.trusted_proxies);
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
    request: FileRequest<'_>,
    own: Around<'_>,
    others: &[PathBuf],
    lookup: Lookup<'a>,
) -> Result<Served<'a>, Error> {
    let Lookup { steps, otherwise } = lookup;
    let files = steps.iter().filter(|step| matches!(step, Step::File(_))).cloned().collect::<Vec<_>>();
    let served = worker.files.serve(request, own, Lookup { steps, otherwise: Otherwise::NotFound }).await?;
    if !matches!(served, Served::NotFound) {
        return Ok(served);
    }
    if matches!(*request.method, Method::GET | Method::HEAD) {
        for root in others {
            let lookup = Lookup { steps: files.clone(), otherwise: Otherwise::NotFound };
            // Whatever the site's own rule: a link of another release leads nowhere but into that release. And what is wrong there is not an answer here.
            let around = Around { root, symlinks: &Symlinks::Within, ..own };
            if let Ok(response @ Served::Response(_)) = worker.files.serve(request, around, lookup).await {
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
    Error::new(Kind::NotFound, why.say())
}
