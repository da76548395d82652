//! A Kubernetes API server as far as the proxy asks it: list and watch of EndpointSlices and Services in a namespace, streaming lists with
//! bookmarks, resource versions that expire, tokens, and what goes wrong in real ones, by name.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

const NAMESPACE: &str = "learning";

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
    /// By plural and name.
    objects: BTreeMap<(String, String), Value>,
    /// Version, plural, kind of event, object.
    history: Vec<(u64, String, &'static str, Value)>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    version: watch::Sender<u64>,
    mood: watch::Sender<Mood>,
    /// Bumped to end every watch.
    dropped: watch::Sender<u64>,
    requests: watch::Sender<Vec<String>>,
}

/// The running server. Dropped, it cuts its connections.
#[derive(Debug)]
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
}

impl Pod {
    pub fn ready(address: SocketAddr) -> Pod {
        Pod { ip: address.ip().to_string(), conditions: json!({ "ready": true, "serving": true, "terminating": false }) }
    }

    /// As the endpoint controller has a pod that was deleted and still answers.
    pub fn terminating(address: SocketAddr) -> Pod {
        Pod { ip: address.ip().to_string(), conditions: json!({ "ready": false, "serving": true, "terminating": true }) }
    }
}

impl ApiServer {
    pub async fn start() -> ApiServer {
        let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.expect("a port for the API server");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            version: watch::Sender::new(0),
            mood: watch::Sender::new(Mood::Well),
            dropped: watch::Sender::new(0),
            requests: watch::Sender::new(Vec::new()),
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

    /// After [`ApiServer::stop`], on the same address and with the same objects.
    pub async fn start_again(&self) {
        let listener = TcpListener::bind(self.address).await.expect("the port is free again");
        *self.server.lock().expect("no test panics with it") = tokio::spawn(serve(listener, Arc::clone(&self.shared)));
    }

    /// A kubeconfig for it in this folder.
    pub fn kubeconfig(&self, folder: &Path) -> PathBuf {
        let path = folder.join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{ "name": "test", "cluster": { "server": format!("http://{}", self.address) } }],
            "users": [{ "name": "test", "user": { "token": "first" } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test", "namespace": NAMESPACE } }],
        });
        std::fs::write(&path, config.to_string()).expect("the kubeconfig is written");
        path
    }

    /// Creates or replaces a slice of a Service; the port is called "fpm".
    pub fn slice(&self, name: &str, service: &str, port: u16, pods: &[Pod]) {
        let endpoints: Vec<Value> = pods.iter().map(|pod| json!({ "addresses": [pod.ip], "conditions": pod.conditions })).collect();
        let object = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": { "name": name, "namespace": NAMESPACE, "labels": { "kubernetes.io/service-name": service } },
            "ports": [{ "name": "fpm", "port": port, "protocol": "TCP" }],
            "endpoints": endpoints,
        });
        self.put("endpointslices", name, object);
    }

    /// Creates or replaces a Service with these annotations.
    pub fn service(&self, name: &str, annotations: &[(&str, &str)]) {
        let annotations: BTreeMap<&str, &str> = annotations.iter().copied().collect();
        let metadata = json!({ "name": name, "namespace": NAMESPACE, "annotations": annotations });
        self.put("services", name, json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {} }));
    }

    pub fn put(&self, plural: &str, name: &str, mut object: Value) {
        let mut state = self.shared.state.lock().expect("no test panics with it");
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let known = state.objects.insert((plural.to_owned(), name.to_owned()), object.clone());
        state.history.push((version, plural.to_owned(), if known.is_some() { "MODIFIED" } else { "ADDED" }, object));
        drop(state);
        self.shared.version.send_replace(version);
    }

    pub fn delete(&self, plural: &str, name: &str) {
        let mut state = self.shared.state.lock().expect("no test panics with it");
        let Some(mut object) = state.objects.remove(&(plural.to_owned(), name.to_owned())) else { return };
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        state.history.push((version, plural.to_owned(), "DELETED", object));
        drop(state);
        self.shared.version.send_replace(version);
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
                connections.spawn(async move { drop(connection(stream, &shared).await) });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(mut stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
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
        let target = head.split(' ').nth(1).unwrap_or("").to_owned();
        shared.requests.send_modify(|all| all.push(target.clone()));
        let mood = shared.mood.borrow().clone();
        match mood {
            Mood::Well => answer(&mut stream, shared, &target).await?,
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

async fn whole(stream: &mut TcpStream, code: u16, body: &str) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 {code} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).await
}

fn refusal(code: u16) -> Value {
    let reason = match code {
        401 => "Unauthorized",
        403 => "Forbidden",
        410 => "Expired",
        429 => "TooManyRequests",
        _ => "InternalError",
    };
    let message = format!("told to say {code}");
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code })
}

async fn status(stream: &mut TcpStream, code: u16) -> std::io::Result<()> {
    whole(stream, code, &refusal(code).to_string()).await
}

/// Whether the object is one that was asked for.
fn selected(object: &Value, label: Option<&str>, field: Option<&str>) -> bool {
    let has_label = label.and_then(|l| l.split_once('=')).is_none_or(|(key, value)| object["metadata"]["labels"][key] == value);
    has_label && field.and_then(|f| f.strip_prefix("metadata.name=")).is_none_or(|name| object["metadata"]["name"] == name)
}

async fn answer(stream: &mut TcpStream, shared: &Shared, target: &str) -> std::io::Result<()> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query: BTreeMap<String, String> = query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.replace("%2F", "/").replace("%3D", "=")))
        .collect();
    let plural = match path {
        p if p == format!("/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices") => "endpointslices",
        p if p == format!("/api/v1/namespaces/{NAMESPACE}/services") => "services",
        _ => return status(stream, 404).await,
    };
    let (label, field) = (query.get("labelSelector").map(String::as_str), query.get("fieldSelector").map(String::as_str));
    if query.get("watch").is_none_or(|watch| watch != "true") {
        let list = {
            let state = shared.state.lock().expect("no test panics with it");
            let items: Vec<&Value> =
                state.objects.iter().filter(|((p, _), o)| p == plural && selected(o, label, field)).map(|(_, o)| o).collect();
            json!({ "kind": "List", "apiVersion": "v1", "metadata": { "resourceVersion": state.version.to_string() }, "items": items })
        };
        return whole(stream, 200, &list.to_string()).await;
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
    let (mut versions, mut dropped) = (shared.version.subscribe(), shared.dropped.subscribe());
    dropped.mark_unchanged();
    let mut since: u64 = query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
    let mut first = Vec::new();
    {
        let state = shared.state.lock().expect("no test panics with it");
        if query.get("sendInitialEvents").is_some_and(|send| send == "true") {
            let all = state.objects.iter().filter(|((p, _), o)| p == plural && selected(o, label, field));
            first.extend(all.map(|(_, object)| json!({ "type": "ADDED", "object": object })));
            let kind = if plural == "services" { ("v1", "Service") } else { ("discovery.k8s.io/v1", "EndpointSlice") };
            let metadata = json!({
                "resourceVersion": state.version.to_string(), "annotations": { "k8s.io/initial-events-end": "true" }
            });
            let mut object = json!({ "apiVersion": kind.0, "kind": kind.1, "metadata": metadata });
            if plural == "endpointslices" {
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
            let later = state.history.iter().filter(|(v, p, _, o)| *v > since && p == plural && selected(o, label, field));
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
        }
    }
    stream.write_all(b"0\r\n\r\n").await
}

async fn chunk(stream: &mut TcpStream, event: &Value) -> std::io::Result<()> {
    let line = format!("{event}\n");
    stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await
}
