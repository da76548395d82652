//! What in the cluster is not as the configuration has it: names that nobody has, questions that are not answered, sets that are empty.

use std::collections::BTreeSet;

use super::Reconciler;
use crate::{
    control::{
        kubernetes::{ACTIVE, Asked},
        slices,
    },
    lifecycle::Phase,
    model::upstream::{Port, ServicePort},
    upstream::{Set, Snapshot, dispatch::now_ms},
};

/// Since the process began. The kubelet's probe and the endpoint controller take their time.
const LISTED_WITHIN_MS: u64 = 60_000;

/// Why a set of Kubernetes has no endpoints.
pub(super) struct Empty {
    pub why: String,
    /// The cluster has no such name: pods that come will not change it.
    pub is_name: bool,
}

impl Reconciler {
    /// Why a set of Kubernetes has no endpoints, as far as that is known.
    pub(super) fn why_empty(&self, set: &Set) -> Option<Empty> {
        let source = set.config.kubernetes.as_ref().filter(|_| set.endpoints.is_empty())?;
        let ServicePort { service, port } = source;
        let known = self.known.get(service);
        let Some(slices) = known.and_then(|known| known.listed()) else {
            let why = match self.control.contacts.reason(service, Asked::Slices) {
                None => "not listed yet".to_owned(),
                Some(why) => format!("the Kubernetes API cannot be asked: {why}"),
            };
            return Some(Empty { why: format!("nothing is known of service {service}: {why}"), is_name: false });
        };
        let is_missing = known.and_then(|known| known.service.as_ref()).is_some_and(|told| told.missing);
        let (ready, ports) = slices::ports(slices);
        let port = match port {
            Port::Name(name) => format!("named \"{name}\""),
            Port::Number(number) => number.to_string(),
        };
        let why = match ready {
            0 if is_missing => format!("there is no service {service} in namespace {}", self.namespace()),
            0 => format!("service {service} has no ready pods"),
            ready => format!(
                "service {service} has {ready} ready pods, but no slice has a TCP port {port}; there is {}",
                ports.into_iter().collect::<Vec<_>>().join(", ")
            ),
        };
        Some(Empty { why, is_name: is_missing || ready > 0 })
    }

    fn namespace(&self) -> &str {
        self.config.settings.kubernetes.as_ref().map_or("", |kubernetes| &kubernetes.namespace)
    }

    /// What is not as the configuration has it in the cluster: names that nobody has, questions that are not answered. Each is logged when it
    /// comes up; for as long as it lasts it stands in `/status`.
    pub(super) fn tell_of_cluster(&mut self, snapshot: &Snapshot) {
        let (mut told, mut unanswered) = (BTreeSet::new(), Vec::new());
        for service in self.services() {
            for asked in [Asked::Slices, Asked::Annotations] {
                // The watch has logged that.
                if let Some(why) = self.control.contacts.reason(&service, asked) {
                    let age = self.control.contacts.age(&service).map_or_else(
                        || "nothing is known".to_owned(),
                        |age| format!("what is known is {} s old and stays in force", age.as_secs()),
                    );
                    unanswered.push(format!("service {service}: the Kubernetes API cannot be asked: {why}; {age}"));
                }
            }
        }
        for upstream in snapshot.upstreams.values().filter(|u| !u.retired) {
            for set in upstream.sets.values() {
                if let Some(Empty { why, is_name: true }) = self.why_empty(set) {
                    told.insert(format!("set {} of upstream {}: {why}", set.name(), upstream.name));
                }
            }
        }
        for (name, upstream) in &self.config.upstreams {
            let Some(service) = &upstream.active_from else { continue };
            let Some(annotations) = self.known.get(service).and_then(|known| known.service.as_ref()) else { continue };
            if annotations.active.is_none() && !self.switch.annotated.contains_key(name) {
                let active = snapshot.upstreams.get(name).map_or_else(String::new, |u| format!("; active is {}", u.active.name()));
                told.insert(if annotations.missing {
                    format!(
                        "upstream {name}: there is no service {service} (active_from) in namespace {}{active}",
                        self.namespace()
                    )
                } else {
                    format!("upstream {name}: service {service} (active_from) has no annotation {ACTIVE}{active}")
                });
            }
        }
        let ours = self.config.settings.kubernetes.as_ref().and_then(|kubernetes| kubernetes.self_service.as_ref());
        if let Some(service) = ours
            && self.control.phase.get() == Phase::Running
            && now_ms() > LISTED_WITHIN_MS
            && self.place().is_some_and(|place| !place.is_listed)
        {
            told.insert(format!(
                "service {service} (kubernetes.self_service) does not have this replica, which counts itself as one more: does the Service select it, and is it ready?"
            ));
        }
        if let Some(service) = ours
            && self.known.get(service).is_some_and(|known| known.slices.as_ref().is_some_and(|slices| slices.is_empty()))
        {
            told.insert(format!(
                "service {service} (kubernetes.self_service) has no slices in namespace {}: is that its name?",
                self.namespace()
            ));
        }
        for new in told.difference(&self.odd) {
            tracing::warn!(what = new, "not as the configuration has it");
        }
        self.odd = told;
        self.control.told().cluster = unanswered.into_iter().chain(self.odd.iter().cloned()).collect();
    }
}
