//! The other replicas of this proxy, found through `kubernetes.self_service`, and how they are asked: on their ops ports, or through the API
//! server's pod proxy from outside the cluster.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use http::{Method, Request};
use http_body_util::{BodyExt, Limited};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use serde_json::Value;
use tokio::{net::TcpStream, task::JoinSet};

use super::{client, slices};
use crate::model::{Address, upstream::Port};

/// Of one question to one replica, connecting included.
const LIMIT: Duration = Duration::from_secs(5);
/// `/status` of a hundred endpoints is some 20 KiB.
const MAX_ANSWER: usize = 1024 * 1024;
/// Replicas that are asked; whoever writes slices must not make us ask the whole cluster.
const MOST: usize = 64;
/// The name that the ops port may have in the Service; else the number that this process has.
const OPS: &str = "ops";

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Replica {
    /// Its pod, or its address where the slice names none.
    pub name: String,
    pub ops: SocketAddr,
}

/// Those that are ready: a replica that starts takes the annotated set by itself, and one that is terminating is on its way out.
pub fn ready<'a>(slices: impl IntoIterator<Item = &'a EndpointSlice>, ops_port: u16) -> Vec<Replica> {
    let slices: Vec<&EndpointSlice> = slices.into_iter().collect();
    // The pods and their names.
    let pods: BTreeMap<&str, &str> = slices
        .iter()
        .flat_map(|slice| &slice.endpoints)
        .filter_map(|endpoint| {
            let target = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"))?;
            // It becomes part of a path.
            let name = target.name.as_deref().filter(|name| is_pod_name(name))?;
            Some((endpoint.addresses.first()?.as_str(), name))
        })
        .collect();
    let named = slices::merge(slices.iter().copied(), &Port::Name(OPS.to_owned()));
    let found = if named.is_empty() { slices::merge_any(slices.iter().copied(), ops_port) } else { named };
    let ready = found.into_iter().filter(|(_, pod)| pod.ready).take(MOST);
    let mut all: Vec<Replica> = ready
        .filter_map(|(address, _)| match address {
            Address::Tcp(ops) => {
                let ip = ops.ip().to_string();
                Some(Replica { name: pods.get(ip.as_str()).map_or(ip, |name| (*name).to_owned()), ops })
            }
            Address::Unix(_) => None,
        })
        .collect();
    all.sort();
    all
}

/// Which replica this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// From 0.
    pub own: usize,
    pub all: usize,
    pub is_listed: bool,
}

/// The number of this replica among all that serve, those that are terminating included, and how many these are. One that does not stand in the slices yet
/// counts itself as the last.
pub fn place<'a>(slices: impl IntoIterator<Item = &'a EndpointSlice>, is_own: impl Fn(IpAddr) -> bool) -> Place {
    // Whatever its ports: a pod is one replica.
    let found = slices::merge_any(slices, 1);
    let mut ips: Vec<IpAddr> = found.keys().filter_map(|address| address.ip()).collect();
    ips.sort_unstable();
    match ips.iter().position(|ip| is_own(*ip)) {
        Some(own) => Place { own, all: ips.len(), is_listed: true },
        None => Place { own: ips.len(), all: ips.len() + 1, is_listed: false },
    }
}

/// RFC 1123 subdomain, as the API server has it for pods.
fn is_pod_name(name: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    name.len() <= 253 && name.bytes().all(fine) && !name.starts_with(['-', '.']) && !name.contains("..")
}

/// Status code and JSON, or in words why there are none.
pub type Answer = Result<(u16, Value), String>;

pub type Answers = BTreeMap<Replica, Answer>;

/// How they are reached.
#[derive(Clone)]
pub enum Way {
    /// By their addresses: from a pod.
    Direct,
    /// Through the API server, which needs `get` on `pods/proxy`.
    Proxy(Client, String),
}

impl Way {
    /// Status code and JSON of a GET.
    ///
    /// # Errors
    /// In words, without the replica's name.
    pub async fn get(&self, replica: &Replica, path: &str) -> Answer {
        let asked = async {
            match self {
                Way::Direct => direct(replica.ops, path).await,
                Way::Proxy(client, namespace) => proxied(client, namespace, replica, path).await,
            }
        };
        let (code, body) = tokio::time::timeout(LIMIT, asked).await.unwrap_or_else(|_| Err(format!("no answer in {LIMIT:?}")))?;
        match serde_json::from_slice(&body) {
            Ok(value) => Ok((code, value)),
            Err(_) => {
                let said: String = String::from_utf8_lossy(&body).trim().chars().take(200).collect();
                Err(format!("answers {code}: {said}"))
            }
        }
    }

    /// All at once.
    pub async fn get_all(&self, replicas: &[Replica], path: &str) -> Answers {
        let mut asking = JoinSet::new();
        for replica in replicas.iter().cloned() {
            let (way, path) = (self.clone(), path.to_owned());
            asking.spawn_local(async move {
                let answer = way.get(&replica, &path).await;
                (replica, answer)
            });
        }
        asking.join_all().await.into_iter().collect()
    }
}

async fn direct(address: SocketAddr, path: &str) -> Result<(u16, bytes::Bytes), String> {
    let asked = async {
        let stream = TcpStream::connect(address).await?;
        client::exchange(stream, &address.to_string(), Method::GET, path, Vec::new(), MAX_ANSWER).await
    };
    asked.await.map_err(|e| format!("{address}: {e}"))
}

async fn proxied(client: &Client, namespace: &str, replica: &Replica, path: &str) -> Result<(u16, bytes::Bytes), String> {
    let uri = format!("/api/v1/namespaces/{namespace}/pods/{}:{}/proxy{path}", replica.name, replica.ops.port());
    let request = Request::get(uri).body(kube::client::Body::empty()).map_err(|e| e.to_string())?;
    let response = client.send(request).await.map_err(|e| super::kubernetes::client::said(&e))?;
    let code = response.status().as_u16();
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| e.to_string())?.to_bytes();
    // What the API server itself refuses is a Status object, not an answer of the replica.
    match serde_json::from_slice::<Value>(&body) {
        Ok(status) if status["kind"] == "Status" => {
            let message = status["message"].as_str().unwrap_or_default();
            let hint = match code {
                403 => "`get` on pods/proxy is needed",
                _ => "is listen.ops on, and does a NetworkPolicy let the API server in?",
            };
            Err(format!("not reached through the API server, which answers {code}: {message} ({hint})"))
        }
        _ => Ok((code, body)),
    }
}

/// The set that most of them serve, by upstream.
pub fn served(answers: &Answers) -> BTreeMap<String, String> {
    let mut votes: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
    for status in answers.values().filter_map(|answer| answer.as_ref().ok().map(|(_, status)| status)) {
        for (name, upstream) in status["upstreams"].as_object().into_iter().flatten() {
            if let Some(active) = upstream["active"].as_str() {
                *votes.entry(name).or_default().entry(active).or_default() += 1;
            }
        }
    }
    // Two that are equal say nothing.
    let most = |sets: BTreeMap<&str, usize>| {
        let (set, n) = sets.iter().max_by_key(|(_, n)| **n)?;
        (sets.values().filter(|other| *other == n).count() == 1).then(|| (*set).to_owned())
    };
    votes.into_iter().filter_map(|(name, sets)| Some((name.to_owned(), most(sets)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(ports: Value) -> EndpointSlice {
        serde_json::from_value(serde_json::json!({
            "metadata": { "name": "a" }, "addressType": "IPv4", "ports": ports,
            "endpoints": [
                { "addresses": ["10.0.0.2"], "targetRef": { "kind": "Pod", "name": "edge-b", "uid": "b" } },
                { "addresses": ["10.0.0.1"], "conditions": { "ready": true }, "targetRef": { "kind": "Pod", "name": "../x:1/proxy/y?" } },
                { "addresses": ["10.0.0.3"], "conditions": { "ready": false } },
                { "addresses": ["10.0.0.4"], "conditions": { "ready": false, "serving": true, "terminating": true } },
            ],
        }))
        .unwrap()
    }

    #[test]
    fn only_ready_replicas_are_asked_on_the_port_that_is_theirs() {
        for (ports, port) in [
            (serde_json::json!([{ "name": "http", "port": 8080 }, { "name": "ops", "port": 9999 }]), 9999),
            (serde_json::json!([{ "name": "http", "port": 8080 }]), 9901),
        ] {
            let found = ready(&[slice(ports)], 9901);
            let seen: Vec<String> = found.iter().map(|r| format!("{} {}", r.name, r.ops)).collect();
            assert_eq!(seen, [format!("10.0.0.1 10.0.0.1:{port}"), format!("edge-b 10.0.0.2:{port}")]);
        }
    }

    /// Ready or terminating while it serves; one that is not ready serves nobody.
    #[test]
    fn each_replica_has_a_number_and_one_that_is_not_listed_is_the_last() {
        let slices = [slice(serde_json::json!([{ "name": "http", "port": 8080 }]))];
        let own = |n: u8| {
            let Place { own, all, is_listed } = place(&slices, |ip| ip == IpAddr::from([10, 0, 0, n]));
            (own, all, is_listed)
        };
        assert_eq!([1, 2, 4, 3].map(own), [(0, 3, true), (1, 3, true), (2, 3, true), (3, 4, false)]);
    }

    #[test]
    fn what_most_serve_counts_and_who_does_not_answer_does_not() {
        let replica = |n: u8| Replica { name: format!("{n}"), ops: SocketAddr::from(([10, 0, 0, n], 9901)) };
        let serves = |set: &str| Ok((200, serde_json::json!({ "upstreams": { "php": { "active": set } } })));
        let answers = BTreeMap::from([
            (replica(1), serves("blue")),
            (replica(2), serves("green")),
            (replica(3), serves("blue")),
            (replica(4), Err("gone".to_owned())),
        ]);
        assert_eq!(served(&answers), BTreeMap::from([("php".to_owned(), "blue".to_owned())]));
    }
}
