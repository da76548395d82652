//! EndpointSlices of one Service -> the endpoints of a set. Pure.
//!
//! Kubernetes' API reference, `discovery.k8s.io/v1` EndpointSlice: a Service has several slices, and an endpoint may stand in two of them
//! while it moves; of the addresses of one endpoint any may be taken; conditions that are absent have the meanings below.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use crate::model::{
    Address,
    upstream::{Port, ServicePort},
};

/// Every endpoint once.
pub type Found = BTreeMap<Address, Pod>;

/// What the slices say of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Else it is leaving: it finishes what it has, and is a last resort.
    pub ready: bool,
    /// Addresses are used again; this is not. `None`: not told.
    pub uid: Option<Arc<str>>,
}

/// The endpoints of a Service that are looked at; each costs a probe and a line in every list.
pub const MOST: usize = 5_000;

/// What every set of Kubernetes finds; absent: its Service was never listed yet.
pub type AllFound = BTreeMap<ServicePort, Found>;

/// The endpoints that the slices name for `port`.
pub fn merge<'a>(slices: impl IntoIterator<Item = &'a EndpointSlice>, port: &Port) -> Found {
    merge_by(slices, |slice| port_of(slice, port))
}

/// The endpoints of the slices, on a port that the slices need not name.
pub fn merge_any<'a>(slices: impl IntoIterator<Item = &'a EndpointSlice>, port: u16) -> Found {
    merge_by(slices, |_| Some(port))
}

fn merge_by<'a>(slices: impl IntoIterator<Item = &'a EndpointSlice>, port: impl Fn(&EndpointSlice) -> Option<u16>) -> Found {
    // IPv4 first: of a pod that stands there with both families one address is taken, for its workers are there once.
    let mut slices: Vec<&EndpointSlice> = slices.into_iter().filter(|s| matches!(&*s.address_type, "IPv4" | "IPv6")).collect();
    slices.sort_by(|a, b| a.address_type.cmp(&b.address_type));
    let mut found = Found::new();
    let mut pods: BTreeSet<(&str, &str)> = BTreeSet::new();
    for slice in slices {
        let Some(port) = port(slice) else { continue };
        for endpoint in &slice.endpoints {
            let Some(ready) = condition(endpoint) else { continue };
            let Some(ip) = endpoint.addresses.first().and_then(|a| a.parse::<IpAddr>().ok()) else { continue };
            let other = if slice.address_type == "IPv4" { "IPv6" } else { "IPv4" };
            let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.as_deref());
            if let Some(uid) = uid {
                if pods.contains(&(uid, other)) {
                    continue;
                }
                pods.insert((uid, &slice.address_type));
            }
            let address = Address::Tcp(SocketAddr::new(ip, port));
            if found.len() >= MOST && !found.contains_key(&address) {
                continue;
            }
            let known = found.entry(address).or_default();
            // Of two pods that had this address the ready one has it now.
            if ready || known.uid.is_none() {
                known.uid = uid.map(Arc::from).or(known.uid.take());
            }
            known.ready |= ready;
        }
    }
    found
}

/// The ready pods of the slices, whatever their ports, and the names and numbers of these: for telling why `merge` finds none.
pub fn ports<'a>(slices: impl IntoIterator<Item = &'a EndpointSlice>) -> (usize, BTreeSet<String>) {
    let (mut ready, mut ports) = (0, BTreeSet::new());
    for slice in slices {
        ready += slice.endpoints.iter().filter(|endpoint| condition(endpoint) == Some(true)).count();
        for port in slice.ports.iter().flatten() {
            let name = port.name.as_deref().filter(|name| !name.is_empty()).map_or_else(String::new, |name| format!("\"{name}\" "));
            ports.insert(format!("{name}{}", port.port.unwrap_or_default()));
        }
    }
    (ready, ports)
}

/// A slice has all its ports for all its endpoints.
fn port_of(slice: &EndpointSlice, wanted: &Port) -> Option<u16> {
    slice.ports.iter().flatten().find_map(|port| {
        let number = port.port.and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0)?;
        let tcp = port.protocol.as_deref().unwrap_or("TCP") == "TCP";
        let named = match wanted {
            Port::Name(name) => port.name.as_deref().unwrap_or_default() == name,
            Port::Number(wanted) => number == *wanted,
        };
        (tcp && named).then_some(number)
    })
}

/// True: ready. False: no longer, but still serving. None: not to be sent anything.
fn condition(endpoint: &Endpoint) -> Option<bool> {
    let conditions = endpoint.conditions.as_ref();
    // "A nil value should be interpreted as true"; serving: "defer to the ready condition"; terminating: "not terminating".
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let serving = conditions.and_then(|c| c.serving).unwrap_or(ready);
    let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
    match (ready, serving, terminating) {
        (true, _, false) => Some(true),
        (_, true, true) => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(family: &str, ports: serde_json::Value, endpoints: serde_json::Value) -> EndpointSlice {
        serde_json::from_value(serde_json::json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": { "name": "a" },
            "addressType": family, "ports": ports, "endpoints": endpoints,
        }))
        .unwrap()
    }

    fn fpm() -> serde_json::Value {
        serde_json::json!([{ "name": "metrics", "port": 9100 }, { "name": "fpm", "port": 9000, "protocol": "TCP" }])
    }

    fn shown(found: &Found) -> Vec<String> {
        found.iter().map(|(address, pod)| format!("{address}{}", if pod.ready { "" } else { " leaving" })).collect()
    }

    fn named() -> Port {
        Port::Name("fpm".to_owned())
    }

    #[test]
    fn conditions_that_are_absent_mean_what_the_api_says() {
        let endpoints = serde_json::json!([
            { "addresses": ["10.0.0.1"] },
            { "addresses": ["10.0.0.2"], "conditions": {} },
            { "addresses": ["10.0.0.3"], "conditions": { "ready": false } },
            { "addresses": ["10.0.0.4"], "conditions": { "ready": true, "serving": true, "terminating": false } },
            { "addresses": ["10.0.0.5"], "conditions": { "ready": false, "serving": true, "terminating": true } },
            { "addresses": ["10.0.0.6"], "conditions": { "ready": false, "serving": false, "terminating": true } },
            { "addresses": ["10.0.0.7"], "conditions": { "ready": false, "terminating": true } },
        ]);
        let found = merge(&[slice("IPv4", fpm(), endpoints)], &named());
        assert_eq!(shown(&found), ["10.0.0.1:9000", "10.0.0.2:9000", "10.0.0.4:9000", "10.0.0.5:9000 leaving"]);
    }

    #[test]
    fn slices_are_merged_and_an_endpoint_that_moves_between_two_is_there_once() {
        let leaving = serde_json::json!([{ "addresses": ["10.0.0.1"], "conditions": { "ready": false, "serving": true, "terminating": true } }]);
        let ready = serde_json::json!([{ "addresses": ["10.0.0.1"] }, { "addresses": ["10.0.0.2"] }]);
        let found = merge(&[slice("IPv4", fpm(), leaving), slice("IPv4", fpm(), ready)], &named());
        assert_eq!(shown(&found), ["10.0.0.1:9000", "10.0.0.2:9000"]);
    }

    #[test]
    fn a_port_goes_by_name_or_number_and_a_slice_without_it_is_passed_over() {
        let one = || serde_json::json!([{ "addresses": ["10.0.0.1"] }]);
        for (port, ports, found) in [
            (named(), fpm(), 1),
            (Port::Number(9000), fpm(), 1),
            (Port::Number(9100), fpm(), 1),
            (Port::Name("http".to_owned()), fpm(), 0),
            (Port::Number(80), fpm(), 0),
            (named(), serde_json::json!([]), 0),
            (named(), serde_json::Value::Null, 0),
            (named(), serde_json::json!([{ "name": "fpm" }]), 0),
            (named(), serde_json::json!([{ "name": "fpm", "port": 9000, "protocol": "UDP" }]), 0),
            (named(), serde_json::json!([{ "name": "fpm", "port": 70000 }]), 0),
        ] {
            assert_eq!(merge(&[slice("IPv4", ports.clone(), one())], &port).len(), found, "{port:?} in {ports}");
        }
    }

    #[test]
    fn a_pod_with_both_families_is_one_endpoint_and_names_are_no_addresses() {
        let pod =
            |address: &str, uid: &str| serde_json::json!([{ "addresses": [address], "targetRef": { "kind": "Pod", "uid": uid } }]);
        let found = merge(
            &[
                slice("IPv6", fpm(), pod("fd00::1", "a")),
                slice("IPv4", fpm(), pod("10.0.0.1", "a")),
                slice("IPv6", fpm(), pod("fd00::2", "b")),
                slice("FQDN", fpm(), pod("php.example", "c")),
                slice("IPv4", fpm(), pod("nonsense", "d")),
                slice("IPv4", fpm(), serde_json::json!([{ "addresses": [] }])),
            ],
            &named(),
        );
        assert_eq!(shown(&found), ["10.0.0.1:9000", "[fd00::2]:9000"]);
    }
}
