//! The admin protocol (HTTP over the unix socket: everything that changes something) and the ops endpoints (everything that tells).

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, hash_map::Entry},
    convert::Infallible,
    net::IpAddr,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Either, Full, Limited};
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{Semaphore, oneshot},
    time::Instant,
};

use super::{
    Control, page,
    reconcile::{self, Change, Swap, SwapOrder},
    status,
};
use crate::{
    lifecycle::{
        Phase,
        drain::{CutRequest, Receipt},
    },
    model::peer::is_within,
    telemetry::{metrics, seldom::Seldom},
    upstream::dispatch::now_ms,
};

type Answer = Response<Either<Full<bytes::Bytes>, page::Events>>;

/// An order to the admin socket is small.
const MAX_BODY: usize = 64 * 1024;
/// Connections served at once on each of the two; more wait in the backlog.
const MAX_CONNECTIONS: usize = 64;
/// Of those on the ops port from one address: one that takes them all must not fail the checks of the others.
const MAX_OF_ONE_PEER: usize = 16;
/// A connection to the ops port in all, whatever is done on it. Scrapers and probes open new ones.
const OPS_CONNECTION: Duration = Duration::from_secs(10);
/// And where it is the status page's stream; the page opens a new one.
const OPS_STREAM: Duration = Duration::from_secs(600);
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// For the body of an order, which is small.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Of `timeout_seconds`.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 3600);

/// `POST /swap`.
#[derive(Debug, Serialize, Deserialize)]
pub struct SwapRequest {
    pub upstream: String,
    pub set: String,
    #[serde(default)]
    pub wait: bool,
    #[serde(default = "default_timeout")]
    pub timeout_seconds: f64,
    #[serde(default)]
    pub dry_run: bool,
    #[serde(default)]
    pub force: bool,
}

fn default_timeout() -> f64 {
    60.0
}

/// `POST /endpoint`.
#[derive(Debug, Serialize, Deserialize)]
pub struct EndpointRequest {
    pub upstream: String,
    pub address: String,
    pub disabled: bool,
}

/// What every order is answered with; `ok` is the exit code.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    pub ok: bool,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<serde_json::Value>,
    /// Requests that are still there after the time-out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<serde_json::Value>,
}

impl Outcome {
    fn new(ok: bool, message: impl Into<String>) -> Self {
        Outcome { ok, message: message.into(), receipt: None, left: Vec::new() }
    }
}

/// Serves the admin socket until its task is dropped. Only the process's own user can open it (mode 0600).
pub async fn serve_admin(control: Arc<Control>, listener: UnixListener) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let failures = Seldom::default();
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                // The mode says so already; a folder that others may write to, or a mode that somebody has changed, does not.
                let by = match stream.peer_cred() {
                    Ok(peer) if may_order(peer.uid()) => format!("uid {}", peer.uid()),
                    Ok(peer) => {
                        tracing::warn!(uid = peer.uid(), "refused on the admin socket: neither root nor this process's user");
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "refused on the admin socket: its peer cannot be told");
                        continue;
                    }
                };
                let control = control.clone();
                tokio::task::spawn_local(async move {
                    serve(stream, |request| admin(control.clone(), by.clone(), request)).await;
                    drop(permit);
                });
            }
            Err(error) => {
                if let Some(unsaid) = failures.may_say() {
                    tracing::error!(%error, unsaid, "accept on the admin socket failed; trying again");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

fn may_order(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// Serves the ops port until its task is dropped.
pub async fn serve_ops(control: Arc<Control>, listener: TcpListener) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let failures = Seldom::default();
    // By peer; an entry goes with its last connection.
    let open: Rc<RefCell<HashMap<IpAddr, usize>>> = Rc::default();
    let feed = page::Feed::new(control.clone());
    tokio::task::spawn_local(feed.clone().run());
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let (control, feed, open, peer) = (control.clone(), feed.clone(), open.clone(), peer.ip().to_canonical());
                if *open.borrow().get(&peer).unwrap_or(&0) >= MAX_OF_ONE_PEER {
                    continue;
                }
                *open.borrow_mut().entry(peer).or_default() += 1;
                tokio::task::spawn_local(async move {
                    let streams = Cell::new(false);
                    let serving = serve(stream, |request| {
                        let answer = ops(&control, &feed, peer, &request);
                        streams.set(streams.get() || matches!(answer.body(), Either::Right(_)));
                        std::future::ready(answer)
                    });
                    tokio::pin!(serving);
                    // Whoever keeps one open longer takes it from the kubelet's checks.
                    if tokio::time::timeout(OPS_CONNECTION, &mut serving).await.is_err() && streams.get() {
                        let _ = tokio::time::timeout(OPS_STREAM, serving).await;
                    }
                    if let Entry::Occupied(mut count) = open.borrow_mut().entry(peer) {
                        *count.get_mut() -= 1;
                        if *count.get() == 0 {
                            count.remove();
                        }
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                if let Some(unsaid) = failures.may_say() {
                    tracing::error!(%error, unsaid, "accept on the ops port failed; trying again");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn serve<S, F>(stream: S, handle: impl Fn(Request<Incoming>) -> F)
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
    F: Future<Output = Answer>,
{
    let handle = Rc::new(handle);
    let service = hyper::service::service_fn(|request| {
        let handle = handle.clone();
        async move { Ok::<_, Infallible>(handle(request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "an ops or admin connection ended");
    }
}

fn text(code: StatusCode, text: impl Into<String>) -> Answer {
    let mut response = Response::new(Either::Left(Full::from(bytes::Bytes::from(text.into()))));
    *response.status_mut() = code;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

fn json(code: StatusCode, value: &impl Serialize) -> Answer {
    let mut response = text(code, serde_json::to_string_pretty(value).unwrap_or_default() + "\n");
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

fn ops(control: &Control, feed: &page::Feed, peer: IpAddr, request: &Request<Incoming>) -> Answer {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
    }
    let path = request.uri().path();
    match path {
        "/livez" => {
            let hung = control.hung_workers();
            if hung.is_empty() {
                text(StatusCode::OK, "ok\n")
            } else {
                text(StatusCode::SERVICE_UNAVAILABLE, format!("no sign of life from workers {hung:?} for 5 s\n"))
            }
        }
        "/readyz" | "/healthz" => ready(control),
        "/metrics" => {
            let mut response = text(StatusCode::OK, control.metrics.encode());
            response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(metrics::CONTENT_TYPE));
            response
        }
        "/" | "/events" | "/status" | "/vote" if !is_within(peer, &control.store.load().settings.listen.ops_allow) => {
            text(StatusCode::FORBIDDEN, format!("{peer} is not in listen.ops_allow\n"))
        }
        // A page of somebody else's, in the browser of one who may: it would see nothing of the answer, but could take the readers' places.
        "/" | "/events" | "/status" | "/vote" if is_of_another_site(request) => {
            text(StatusCode::FORBIDDEN, "not for pages of other sites\n")
        }
        "/" => status_page(),
        "/events" => events(feed, request.method()),
        "/status" => json(StatusCode::OK, &status::status(control)),
        "/vote" => vote(control, request.uri().query().unwrap_or("")),
        _ => text(StatusCode::NOT_FOUND, "one of / /livez /readyz /healthz /metrics /status /events /vote?upstream=&set=\n"),
    }
}

/// Fetch Metadata: browsers say so themselves, others need not.
fn is_of_another_site(request: &Request<Incoming>) -> bool {
    let from = request.headers().get("sec-fetch-site").map(header::HeaderValue::as_bytes);
    // A link that is followed is not a page that asks.
    let followed = request.headers().get("sec-fetch-mode").is_some_and(|mode| mode == "navigate") && request.uri().path() == "/";
    matches!(from, Some(b"cross-site" | b"same-site")) && !followed
}

fn status_page() -> Answer {
    let mut response = text(StatusCode::OK, page::PAGE);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, header::HeaderValue::from_static("no-referrer"));
    if let Ok(policy) = header::HeaderValue::from_str(&page::POLICY) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    response
}

fn events(feed: &page::Feed, method: &Method) -> Answer {
    if *method == Method::HEAD {
        return text(StatusCode::OK, "");
    }
    let Some(events) = feed.subscribe() else {
        return text(StatusCode::SERVICE_UNAVAILABLE, "too many are looking at the status page\n");
    };
    let mut response = Response::new(Either::Right(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("close"));
    response
}

fn ready(control: &Control) -> Answer {
    let phase = control.phase.get();
    match phase {
        _ if control.phase.is_healthy() => text(StatusCode::OK, "ok\n"),
        Phase::Starting => text(StatusCode::SERVICE_UNAVAILABLE, format!("Starting: {}\n", control.told().waiting_for.join("; "))),
        leaving => text(StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", leaving.name())),
    }
}

fn vote(control: &Control, query: &str) -> Answer {
    let parameter = |name: &str| query.split('&').find_map(|p| p.strip_prefix(name)?.strip_prefix('=')).unwrap_or("");
    match reconcile::vote(&control.store.load(), parameter("upstream"), parameter("set"), false) {
        Ok(()) => json(StatusCode::OK, &serde_json::json!({ "vote": "yes" })),
        Err(reason) => json(StatusCode::CONFLICT, &serde_json::json!({ "vote": "no", "reason": reason })),
    }
}

async fn admin(control: Arc<Control>, by: String, request: Request<Incoming>) -> Answer {
    let (parts, body) = request.into_parts();
    let body = match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Err(_) => {
            let why = format!("the order has not come whole in {BODY_TIMEOUT:?}");
            return json(StatusCode::REQUEST_TIMEOUT, &Outcome::new(false, why));
        }
        Ok(Err(error)) => return json(StatusCode::BAD_REQUEST, &Outcome::new(false, error.to_string())),
    };
    let outcome = match (parts.method, parts.uri.path()) {
        (Method::GET, "/status") => return json(StatusCode::OK, &status::status(&control)),
        (Method::POST, "/reload") => reload(&control).await,
        (Method::POST, "/swap") => match serde_json::from_slice(&body) {
            Ok(order) => swap(&control, by, order).await,
            Err(error) => Outcome::new(false, format!("not a swap order: {error}")),
        },
        (Method::POST, "/endpoint") => match serde_json::from_slice(&body) {
            Ok(order) => endpoint(&control, order).await,
            Err(error) => Outcome::new(false, format!("not an endpoint order: {error}")),
        },
        (Method::POST, "/drain") => {
            let mut left = control.left.subscribe();
            control.terminate.send_modify(|r| {
                r.times += 1;
                r.by = by;
            });
            if parts.uri.query() == Some("wait") {
                let _waits = control.waits();
                let receipt = left.wait_for(Option::is_some).await.ok().and_then(|receipt| receipt.clone());
                drained(receipt)
            } else {
                Outcome::new(true, "draining")
            }
        }
        (_, path) => return json(StatusCode::NOT_FOUND, &Outcome::new(false, format!("no such order: {path}"))),
    };
    json(if outcome.ok { StatusCode::OK } else { StatusCode::CONFLICT }, &outcome)
}

/// What has become of the requests that were in flight when the process was asked to end.
fn drained(receipt: Option<Receipt>) -> Outcome {
    let Some(receipt) = receipt else { return Outcome::new(false, "the control plane has ended") };
    let mut outcome = match receipt.cut.len() {
        0 => Outcome::new(true, "drained"),
        1 => Outcome::new(false, "drained, but 1 request was cut"),
        cut => Outcome::new(false, format!("drained, but {cut} requests were cut")),
    };
    outcome.receipt = serde_json::to_value(&receipt).ok();
    outcome
}

/// Sends a change and waits for its answer.
async fn ask<T>(control: &Control, change: impl FnOnce(oneshot::Sender<T>) -> Change) -> Result<T, String> {
    let (answer, receiver) = oneshot::channel();
    let gone = |_| "the control plane has ended".to_owned();
    control.changes.send(change(answer)).await.map_err(|_| gone(()))?;
    receiver.await.map_err(|_| gone(()))
}

async fn reload(control: &Control) -> Outcome {
    match ask(control, |answer| Change::Reload { by: "reload", answer: Some(answer) }).await {
        Ok(done) if done.outcome == "refused" => Outcome::new(false, format!("refused:\n{}", done.reason)),
        Ok(done) => Outcome::new(true, format!("{} (generation {})", done.outcome, done.generation)),
        Err(reason) => Outcome::new(false, reason),
    }
}

async fn endpoint(control: &Control, order: EndpointRequest) -> Outcome {
    let EndpointRequest { upstream, address, disabled } = order;
    match ask(control, |answer| Change::Endpoint { upstream, address, disabled, answer }).await {
        Ok(Ok(message)) => Outcome::new(true, message),
        Ok(Err(reason)) | Err(reason) => Outcome::new(false, reason),
    }
}

async fn swap(control: &Control, by: String, order: SwapRequest) -> Outcome {
    let Ok(budget) = Duration::try_from_secs_f64(order.timeout_seconds) else {
        return Outcome::new(false, "timeout_seconds must be a number from 0".to_owned());
    };
    let budget = budget.min(LONGEST_WAIT);
    let change = SwapOrder {
        upstream: order.upstream.clone(),
        set: order.set.clone(),
        dry_run: order.dry_run,
        force: order.force,
        by,
        budget,
    };
    let turn = match ask(control, |answer| Change::Swap(change, answer)).await {
        Ok(Ok(Swap::Turned(turn))) => turn,
        Ok(Ok(Swap::Nothing(message))) if order.wait && !order.dry_run => {
            return still_draining(control, &order.upstream, message, budget).await;
        }
        Ok(Ok(Swap::Nothing(message))) => return Outcome::new(true, message),
        Ok(Err(reason)) | Err(reason) => return Outcome::new(false, reason),
    };
    let turned = format!(
        "upstream {} has turned to set {}{}",
        order.upstream,
        order.set,
        if order.force { usable(control, &order) } else { String::new() }
    );
    match turn.barrier.await {
        Ok(Ok(())) => {}
        Ok(Err(workers)) => return Outcome::new(false, format!("{turned}, but workers {workers:?} have not passed the barrier")),
        Err(_) => return Outcome::new(false, "the control plane has ended"),
    }
    if !order.wait {
        return Outcome::new(true, turned);
    }
    match tokio::time::timeout(budget, turn.receipt).await {
        Ok(Ok(receipt)) => {
            let mut outcome = Outcome::new(true, format!("{turned}; the old set has drained"));
            outcome.receipt = serde_json::to_value(&receipt).ok();
            outcome
        }
        Ok(Err(_)) => Outcome::new(false, "the control plane has ended"),
        Err(_) => left_behind(control, &turned, turn.old_serial, budget).await,
    }
}

/// What somebody who has not asked for `min_ready` may have got.
fn usable(control: &Control, order: &SwapRequest) -> String {
    let snapshot = control.store.load();
    let set = snapshot.upstreams.get(&*order.upstream).and_then(|upstream| upstream.sets.get(&*order.set));
    set.map_or_else(String::new, |set| {
        format!(" (forced: {} of {} endpoints are usable)", set.usable(now_ms()), set.endpoints.len())
    })
}

/// Asked once more, after a time-out: code 0 is only for who has nothing left on the old set.
async fn still_draining(control: &Control, upstream: &str, message: String, budget: Duration) -> Outcome {
    let until = Instant::now() + budget;
    let mut message = message;
    loop {
        let first = control
            .told()
            .turning
            .iter()
            .find(|(_, turn)| *turn.upstream == *upstream)
            .map(|(serial, turn)| (*serial, turn.clone()));
        let Some((serial, mut turn)) = first else { return Outcome::new(true, message) };
        if tokio::time::timeout_at(until, turn.drained.wait()).await.is_err() {
            return left_behind(control, &message, serial, budget).await;
        }
        // Its receipt is written by another task of this thread.
        control.told().turning.remove(&serial);
        message = format!("{message}; set {} has drained", turn.from);
    }
}

async fn left_behind(control: &Control, what: &str, serial: u64, budget: Duration) -> Outcome {
    let left = reconcile::in_flight(control, serial).await;
    let number = if left.len() == 1 { "1 request is".to_owned() } else { format!("{} requests are", left.len()) };
    let mut outcome = Outcome::new(false, format!("{what}; after {budget:?} {number} left on the old set"));
    outcome.left = left.into_iter().filter_map(|r| serde_json::to_value(CutRequest::from(r)).ok()).collect();
    outcome
}
