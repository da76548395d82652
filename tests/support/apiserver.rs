//! A Kubernetes API server as far as the proxy, its command line and the tests ask it: list and watch with streaming lists and bookmarks,
//! resource versions that expire, create, replace, merge patch and delete, tokens, Events, the pod proxy; and what goes wrong in real ones, by
//! name. Each scenario is a documented behaviour of the real one (Kubernetes' "API Concepts" and "EndpointSlices" pages).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use super::gate::Gate;

/// What a connection is: plain or TLS.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

const NAMESPACE: &str = "learning";

/// Where objects of a kind are in the one namespace that there is at the start.
pub fn collection(plural: &str) -> String {
    let group = if plural == "endpointslices" { "/apis/discovery.k8s.io/v1" } else { "/api/v1" };
    format!("{group}/namespaces/{NAMESPACE}/{plural}")
}

/// What every request is answered with, until it is set to something else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mood {
    Well,
    /// This status, with a Status object.
    Refuses(u16),
    /// 200, and bytes that are no JSON.
    AnswersGarbage,
    /// Accepts, and says nothing.
    Silent,
}

#[derive(Debug, Default)]
struct State {
    version: u64,
    /// Watches from before this version get 410.
    oldest: u64,
    /// By the path of their collection and name.
    objects: BTreeMap<(String, String), Value>,
    /// Version, collection, kind of event, object.
    history: Vec<(u64, String, &'static str, Value)>,
    /// The tokens that count, and what they may do.
    tokens: BTreeMap<String, Rights>,
    /// Where a pod's ports are, for the pod proxy.
    pods: BTreeMap<String, std::net::IpAddr>,
    generated: u64,
    holds_patches: Option<Gate>,
}

/// As by RBAC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    All,
    /// The edge's Role: list and watch, get, create Events.
    Edge,
}

struct Shared {
    state: Mutex<State>,
    version: watch::Sender<u64>,
    mood: watch::Sender<Mood>,
    /// Bumped to end every watch.
    dropped: watch::Sender<u64>,
    /// Bumped to make every open watch say nothing more.
    silenced: watch::Sender<u64>,
    requests: watch::Sender<Vec<String>>,
    tls: Option<TlsAcceptor>,
}

/// The running server. Dropped, it cuts its connections.
pub struct ApiServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: Mutex<JoinHandle<()>>,
}

/// One pod of a slice.
#[derive(Clone, Debug)]
pub struct Pod {
    pub ip: String,
    pub conditions: Value,
    /// Of `targetRef`.
    pub name: Option<String>,
}

fn terminating() -> Value {
    json!({ "ready": false, "serving": true, "terminating": true })
}

/// An EndpointSlice whose port is called "fpm".
pub fn slice(name: &str, service: &str, port: u16, family: &str, pods: &[Pod]) -> Value {
    let endpoint = |pod: &Pod| {
        let mut endpoint = json!({ "addresses": [pod.ip], "conditions": pod.conditions });
        if let Some(name) = &pod.name {
            endpoint["targetRef"] = json!({ "kind": "Pod", "name": name, "namespace": NAMESPACE, "uid": format!("uid-{name}") });
        }
        endpoint
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
        "metadata": { "name": name, "labels": { "kubernetes.io/service-name": service } },
        "ports": [{ "name": "fpm", "port": port, "protocol": "TCP" }],
        "endpoints": pods.iter().map(endpoint).collect::<Vec<_>>(),
    })
}

impl Pod {
    pub fn ready(address: SocketAddr) -> Pod {
        let conditions = json!({ "ready": true, "serving": true, "terminating": false });
        Pod { ip: address.ip().to_string(), conditions, name: None }
    }

    /// As the endpoint controller has a pod that was deleted and still answers.
    pub fn terminating(address: SocketAddr) -> Pod {
        Pod { ip: address.ip().to_string(), conditions: terminating(), name: None }
    }

    pub fn named(self, name: &str) -> Pod {
        Pod { name: Some(name.to_owned()), ..self }
    }
}

impl ApiServer {
    pub async fn start() -> ApiServer {
        ApiServer::start_as(None).await
    }

    /// Over TLS, with a certificate for 127.0.0.1; and that certificate, as the `ca.crt` of a service account.
    pub async fn start_with_tls() -> (ApiServer, String) {
        let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).expect("a certificate");
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.into())
            .expect("key and certificate belong together");
        (ApiServer::start_as(Some(TlsAcceptor::from(Arc::new(config)))).await, made.cert.pem())
    }

    async fn start_as(tls: Option<TlsAcceptor>) -> ApiServer {
        let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.expect("a port for the API server");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shared = Arc::new(Shared {
            state: Mutex::new(State { tokens: BTreeMap::from([("first".to_owned(), Rights::All)]), ..State::default() }),
            version: watch::Sender::new(0),
            mood: watch::Sender::new(Mood::Well),
            dropped: watch::Sender::new(0),
            silenced: watch::Sender::new(0),
            requests: watch::Sender::new(Vec::new()),
            tls,
        });
        let server = Mutex::new(tokio::spawn(serve(listener, Arc::clone(&shared))));
        ApiServer { address, shared, server }
    }

    /// Nobody listens, and all connections are gone.
    pub async fn stop(&self) {
        let server = std::mem::replace(&mut *self.server.lock().expect("no test panics with it"), tokio::spawn(async {}));
        server.abort();
        let _ = server.await;
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// After [`ApiServer::stop`], on the same address and with the same objects.
    pub async fn start_again(&self) {
        let listener = TcpListener::bind(self.address).await.expect("the port is free again");
        *self.server.lock().expect("no test panics with it") = tokio::spawn(serve(listener, Arc::clone(&self.shared)));
    }

    /// A kubeconfig for it in this folder, which the process reads its token from too: `folder/token`.
    pub fn kubeconfig(&self, folder: &Path) -> PathBuf {
        let (path, token) = (folder.join("kubeconfig"), folder.join("token"));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{ "name": "test", "cluster": { "server": format!("http://{}", self.address) } }],
            "users": [{ "name": "test", "user": { "tokenFile": token } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test", "namespace": NAMESPACE } }],
        });
        std::fs::write(&token, "first").expect("the token is written");
        std::fs::write(&path, config.to_string()).expect("the kubeconfig is written");
        path
    }

    /// Exactly this token counts from now on.
    pub fn accepts(&self, token: &str, rights: Rights) {
        self.state().tokens = BTreeMap::from([(token.to_owned(), rights)]);
    }

    /// Besides those that count already.
    pub fn accepts_also(&self, token: &str, rights: Rights) {
        self.state().tokens.insert(token.to_owned(), rights);
    }

    /// The token in the file is another one from now on, and the old one is refused, as bound service account tokens are that have expired.
    pub fn rotates_token(&self, folder: &Path) {
        std::fs::write(folder.join("token"), "second").expect("the token is written");
        self.accepts("second", Rights::All);
        self.drops_every_watch();
    }

    /// Patches wait there before they are done.
    pub fn holds_patches(&self, gate: &Gate) {
        self.state().holds_patches = Some(gate.clone());
    }

    /// Where the pod proxy finds a pod.
    pub fn pod(&self, name: &str, ip: std::net::IpAddr) {
        self.state().pods.insert(name.to_owned(), ip);
    }

    /// The objects of a kind.
    pub fn objects(&self, plural: &str) -> Vec<Value> {
        let collection = collection(plural);
        self.state().objects.iter().filter(|((c, _), _)| *c == collection).map(|(_, object)| object.clone()).collect()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.shared.state.lock().expect("no test panics with it")
    }

    /// Answers 200 with bytes that are no JSON, as a captive portal or a broken load balancer does.
    pub fn answers_garbage(&self) {
        self.set_mood(Mood::AnswersGarbage);
        self.drops_every_watch();
    }

    /// Open watches stay open and say nothing more, not even their end, as behind a firewall that has forgotten the connection; what is asked
    /// anew is answered.
    pub fn goes_silent(&self) {
        self.shared.silenced.send_modify(|n| *n += 1);
    }

    /// 1,000 changes of a slice in a second: between this pod and none.
    pub async fn flaps_1000_per_second(&self, name: &str, service: &str, port: u16, pod: &Pod) {
        let began = tokio::time::Instant::now();
        for turn in 0..1000_u32 {
            self.slice(name, service, port, if turn % 2 == 0 { &[] } else { std::slice::from_ref(pod) });
            tokio::time::sleep_until(began + std::time::Duration::from_millis(turn.into())).await;
        }
    }

    /// The endpoints of a Service are spread over slices, and one that moves stands in both for a while.
    pub fn two_slices_one_service(&self, service: &str, port: u16, one: &[Pod], other: &[Pod]) {
        self.slice(&format!("{service}-a"), service, port, one);
        self.slice(&format!("{service}-b"), service, port, other);
    }

    /// `ports` is optional: "may be nil, which is treated as no defined ports".
    pub fn slice_without_ports(&self, name: &str, service: &str, pods: &[Pod]) {
        let mut object = slice(name, service, 1, "IPv4", pods);
        object["ports"] = Value::Null;
        self.put("endpointslices", name, object);
    }

    /// A pod that is deleted is terminating while it still serves, before it is gone from its slice.
    pub fn terminating_before_removed(&self, name: &str, service: &str, port: u16, leaving: &Pod, others: &[Pod]) {
        let leaving = Pod { conditions: terminating(), ..leaving.clone() };
        self.slice(name, service, port, &[std::slice::from_ref(&leaving), others].concat());
    }

    /// A dual-stack Service has a slice for each family, with the same pods in both.
    pub fn dual_stack(&self, service: &str, port: u16, v4: &[Pod], v6: &[Pod]) {
        for (suffix, family, pods) in [("v4", "IPv4", v4), ("v6", "IPv6", v6)] {
            let name = format!("{service}-{suffix}");
            self.put("endpointslices", &name, slice(&name, service, port, family, pods));
        }
    }

    /// Creates or replaces a slice of a Service; the port is called "fpm".
    pub fn slice(&self, name: &str, service: &str, port: u16, pods: &[Pod]) {
        self.put("endpointslices", name, slice(name, service, port, "IPv4", pods));
    }

    /// Creates or replaces a Service with these annotations.
    pub fn service(&self, name: &str, annotations: &[(&str, &str)]) {
        let annotations: BTreeMap<&str, &str> = annotations.iter().copied().collect();
        let metadata = json!({ "name": name, "annotations": annotations });
        self.put("services", name, json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {} }));
    }

    pub fn put(&self, plural: &str, name: &str, object: Value) {
        self.shared.put(&collection(plural), name, object);
    }

    pub fn delete(&self, plural: &str, name: &str) {
        self.shared.delete(&collection(plural), name);
    }

    pub fn set_mood(&self, mood: Mood) {
        self.shared.mood.send_replace(mood);
    }

    /// Every watch ends, as behind a load balancer that restarts.
    pub fn drops_every_watch(&self) {
        self.shared.dropped.send_modify(|n| *n += 1);
    }

    /// Every watch ends, and its version is too old to go on from: 410.
    pub fn relists_after_410(&self) {
        {
            let mut state = self.shared.state.lock().expect("no test panics with it");
            state.version += 1;
            state.oldest = state.version;
        }
        self.drops_every_watch();
    }

    /// "PATH?QUERY" of each so far.
    pub fn requests(&self) -> Vec<String> {
        self.shared.requests.borrow().clone()
    }

    /// Until it has been asked `n` times in all.
    pub async fn wait_requests(&self, n: usize) {
        super::gate::wait_for(&self.shared.requests, &format!("{n} requests at the API server"), |all| all.len() >= n).await;
    }
}

impl Shared {
    fn put(&self, collection: &str, name: &str, mut object: Value) -> Value {
        let mut state = self.state.lock().expect("no test panics with it");
        state.version += 1;
        let version = state.version;
        object["metadata"]["name"] = name.into();
        object["metadata"]["resourceVersion"] = version.to_string().into();
        if let Some((_, rest)) = collection.split_once("/namespaces/")
            && let Some((namespace, _)) = rest.split_once('/')
        {
            object["metadata"]["namespace"] = namespace.into();
        }
        let known = state.objects.insert((collection.to_owned(), name.to_owned()), object.clone());
        let kind = if known.is_some() { "MODIFIED" } else { "ADDED" };
        state.history.push((version, collection.to_owned(), kind, object.clone()));
        drop(state);
        self.version.send_replace(version);
        object
    }

    fn delete(&self, collection: &str, name: &str) -> Option<Value> {
        let mut state = self.state.lock().expect("no test panics with it");
        let mut object = state.objects.remove(&(collection.to_owned(), name.to_owned()))?;
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        state.history.push((version, collection.to_owned(), "DELETED", object.clone()));
        drop(state);
        self.version.send_replace(version);
        Some(object)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.server.lock().expect("no test panics with it").abort();
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    let _ = match shared.tls.clone() {
                        None => connection(stream, &shared).await,
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => connection(stream, &shared).await,
                            Err(error) => Err(error),
                        },
                    };
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(mut stream: impl Stream, shared: &Shared) -> std::io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                break end + 4;
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
        buffer.drain(..end);
        let mut words = head.split(' ');
        let (method, target) = (words.next().unwrap_or("").to_owned(), words.next().unwrap_or("").to_owned());
        let header = |name: &str| {
            head.lines()
                .filter_map(|line| line.split_once(": "))
                .find(|(n, _)| n.eq_ignore_ascii_case(name))
                .map(|(_, v)| v.to_owned())
        };
        let length: usize = header("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
        while buffer.len() < length {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        let body: Vec<u8> = buffer.drain(..length).collect();
        let token = header("authorization").and_then(|value| value.strip_prefix("Bearer ").map(str::to_owned)).unwrap_or_default();
        shared.requests.send_modify(|all| all.push(target.clone()));
        let mood = shared.mood.borrow().clone();
        let rights = shared.state.lock().expect("no test panics with it").tokens.get(&token).copied();
        match mood {
            Mood::Well => match rights {
                None => status(&mut stream, 401).await?,
                Some(rights) => answer(&mut stream, shared, &method, &target, &body, rights).await?,
            },
            Mood::Refuses(code) => status(&mut stream, code).await?,
            Mood::AnswersGarbage => whole(&mut stream, 200, "}{ not JSON").await?,
            Mood::Silent => {
                let mut mood = shared.mood.subscribe();
                let _ = mood.wait_for(|mood| *mood != Mood::Silent).await;
                return Ok(());
            }
        }
    }
}

async fn whole(stream: &mut impl Stream, code: u16, body: &str) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 {code} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).await
}

fn refusal(code: u16) -> Value {
    let reason = match code {
        404 => "NotFound",
        409 => "Conflict",
        401 => "Unauthorized",
        403 => "Forbidden",
        410 => "Expired",
        429 => "TooManyRequests",
        _ => "InternalError",
    };
    let message = format!("told to say {code}");
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code })
}

async fn status(stream: &mut impl Stream, code: u16) -> std::io::Result<()> {
    whole(stream, code, &refusal(code).to_string()).await
}

/// Whether the object is one that was asked for.
fn selected(object: &Value, label: Option<&str>, field: Option<&str>) -> bool {
    let has_label = label.and_then(|l| l.split_once('=')).is_none_or(|(key, value)| object["metadata"]["labels"][key] == value);
    has_label && field.and_then(|f| f.strip_prefix("metadata.name=")).is_none_or(|name| object["metadata"]["name"] == name)
}

/// RFC 7386.
fn merge_patch(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else { return target.clone_from(patch) };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            target.as_object_mut().expect("an object").remove(key);
        } else {
            merge_patch(&mut target[key], value);
        }
    }
}

/// What is not a list or a watch.
async fn one(
    stream: &mut impl Stream,
    shared: &Shared,
    method: &str,
    path: &str,
    body: &[u8],
    rights: Rights,
) -> std::io::Result<()> {
    let given: Value = serde_json::from_slice(body).unwrap_or_default();
    let events = path.ends_with("/events");
    if rights == Rights::Edge && method != "GET" && !(method == "POST" && events) {
        return status(stream, 403).await;
    }
    if method == "POST" {
        let name = match given["metadata"]["name"].as_str() {
            Some(name) => name.to_owned(),
            None => {
                let mut state = shared.state.lock().expect("no test panics with it");
                state.generated += 1;
                format!("{}{}", given["metadata"]["generateName"].as_str().unwrap_or("x"), state.generated)
            }
        };
        let known = shared.state.lock().expect("no test panics with it").objects.contains_key(&(path.to_owned(), name.clone()));
        if known {
            return status(stream, 409).await;
        }
        return whole(stream, 201, &shared.put(path, &name, given).to_string()).await;
    }
    let Some((collection, name)) = path.rsplit_once('/') else { return status(stream, 404).await };
    let gate = shared.state.lock().expect("no test panics with it").holds_patches.clone();
    if let Some(gate) = gate.filter(|_| method == "PATCH") {
        gate.pass().await;
    }
    let key = (collection.to_owned(), name.to_owned());
    let found = shared.state.lock().expect("no test panics with it").objects.get(&key).cloned();
    let Some(mut object) = found else { return status(stream, 404).await };
    match method {
        "GET" => whole(stream, 200, &object.to_string()).await,
        "DELETE" => {
            shared.delete(collection, name);
            whole(stream, 200, &object.to_string()).await
        }
        "PUT" | "PATCH" => {
            let version = &given["metadata"]["resourceVersion"];
            if !version.is_null() && *version != object["metadata"]["resourceVersion"] {
                return status(stream, 409).await;
            }
            if method == "PUT" {
                object = given;
            } else {
                merge_patch(&mut object, &given);
            }
            whole(stream, 200, &shared.put(collection, name, object).to_string()).await
        }
        _ => status(stream, 405).await,
    }
}

/// `/api/v1/namespaces/NS/pods/POD:PORT/proxy/PATH`.
async fn pod_proxy(stream: &mut impl Stream, shared: &Shared, target: &str) -> std::io::Result<()> {
    let (pod, path) = target.split_once("/pods/").and_then(|(_, rest)| rest.split_once("/proxy")).unwrap_or(("", ""));
    let (name, port) = pod.split_once(':').unwrap_or((pod, "80"));
    let ip = shared.state.lock().expect("no test panics with it").pods.get(name).copied();
    let (Some(ip), Ok(port)) = (ip, port.parse::<u16>()) else { return status(stream, 404).await };
    match super::http::get((ip, port).into(), path).await {
        Ok(answer) => whole(stream, answer.status, &answer.text()).await,
        Err(_) => status(stream, 503).await,
    }
}

async fn answer(
    stream: &mut impl Stream,
    shared: &Shared,
    method: &str,
    target: &str,
    body: &[u8],
    rights: Rights,
) -> std::io::Result<()> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query: BTreeMap<String, String> = query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.replace("%2F", "/").replace("%3D", "=")))
        .collect();
    if path.contains("/proxy/") {
        return if rights == Rights::All { pod_proxy(stream, shared, target).await } else { status(stream, 403).await };
    }
    let plural = path;
    if method != "GET" || !["endpointslices", "services", "events"].iter().any(|plural| path.ends_with(&format!("/{plural}"))) {
        return one(stream, shared, method, path, body, rights).await;
    }
    let (label, field) = (query.get("labelSelector").map(String::as_str), query.get("fieldSelector").map(String::as_str));
    if query.get("watch").is_none_or(|watch| watch != "true") {
        let list = {
            let state = shared.state.lock().expect("no test panics with it");
            let items: Vec<&Value> =
                state.objects.iter().filter(|((p, _), o)| *p == *plural && selected(o, label, field)).map(|(_, o)| o).collect();
            json!({ "kind": "List", "apiVersion": "v1", "metadata": { "resourceVersion": state.version.to_string() }, "items": items })
        };
        return whole(stream, 200, &list.to_string()).await;
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
    let (mut versions, mut dropped) = (shared.version.subscribe(), shared.dropped.subscribe());
    let mut silenced = shared.silenced.subscribe();
    dropped.mark_unchanged();
    silenced.mark_unchanged();
    let mut since: u64 = query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
    let mut first = Vec::new();
    {
        let state = shared.state.lock().expect("no test panics with it");
        if query.get("sendInitialEvents").is_some_and(|send| send == "true") {
            let all = state.objects.iter().filter(|((p, _), o)| *p == *plural && selected(o, label, field));
            first.extend(all.map(|(_, object)| json!({ "type": "ADDED", "object": object })));
            let kind = if plural.ends_with("/services") { ("v1", "Service") } else { ("discovery.k8s.io/v1", "EndpointSlice") };
            let metadata = json!({
                "resourceVersion": state.version.to_string(), "annotations": { "k8s.io/initial-events-end": "true" }
            });
            let mut object = json!({ "apiVersion": kind.0, "kind": kind.1, "metadata": metadata });
            if plural.ends_with("/endpointslices") {
                (object["addressType"], object["endpoints"]) = ("".into(), json!([]));
            }
            first.push(json!({ "type": "BOOKMARK", "object": object }));
            since = state.version;
        } else if since < state.oldest {
            first.push(json!({ "type": "ERROR", "object": refusal(410) }));
        }
    }
    let expired = first.iter().any(|event| event["type"] == "ERROR");
    for event in first {
        chunk(stream, &event).await?;
    }
    if expired {
        return stream.write_all(b"0\r\n\r\n").await;
    }
    loop {
        let events: Vec<Value> = {
            let state = shared.state.lock().expect("no test panics with it");
            let later = state.history.iter().filter(|(v, p, _, o)| *v > since && *p == *plural && selected(o, label, field));
            let events = later.map(|(_, _, kind, object)| json!({ "type": kind, "object": object })).collect();
            since = since.max(state.version);
            events
        };
        for event in events {
            chunk(stream, &event).await?;
        }
        tokio::select! {
            changed = versions.changed() => if changed.is_err() { return Ok(()) },
            _ = dropped.changed() => break,
            _ = silenced.changed() => std::future::pending::<()>().await,
        }
    }
    stream.write_all(b"0\r\n\r\n").await
}

async fn chunk(stream: &mut impl Stream, event: &Value) -> std::io::Result<()> {
    let line = format!("{event}\n");
    stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await
}
