//! What in the cluster is not as the configuration has it: names that nobody has, questions that are not answered, sets that are empty.

use std::collections::BTreeSet;

use super::Reconciler;
use crate::{
    control::{
        kubernetes::{ACTIVE, Asked},
        slices,
    },
    model::upstream::{Port, ServicePort},
    upstream::{Set, Snapshot},
};

impl Reconciler {
    /// Why a set of Kubernetes has no endpoints, as far as that is known.
    pub(super) fn why_empty(&self, set: &Set) -> Option<String> {
        let source = set.config.kubernetes.as_ref().filter(|_| set.endpoints.is_empty())?;
        let ServicePort { service, port } = source;
        let known = self.known.get(service);
        let failing = self.control.contacts.reason(service, Asked::Slices);
        let Some(slices) = known.and_then(|known| known.slices.as_deref()) else {
            let why =
                failing.map_or_else(|| "not listed yet".to_owned(), |why| format!("the Kubernetes API cannot be asked: {why}"));
            return Some(format!("nothing is known of service {service}: {why}"));
        };
        let (ready, ports) = slices::ports(slices.iter().map(|slice| &**slice));
        let port = match port {
            Port::Name(name) => format!("named \"{name}\""),
            Port::Number(number) => number.to_string(),
        };
        Some(match (known.and_then(|known| known.service.as_ref()), ready) {
            (Some(told), 0) if told.missing => {
                format!("there is no service {service} in namespace {}", self.namespace())
            }
            (_, 0) => format!("service {service} has no ready pods"),
            (_, ready) => format!(
                "service {service} has {ready} ready pods, but no slice has a TCP port {port}; there is {}",
                ports.into_iter().collect::<Vec<_>>().join(", ")
            ),
        })
    }

    fn namespace(&self) -> &str {
        self.config.settings.kubernetes.as_ref().map_or("", |kubernetes| &kubernetes.namespace)
    }

    /// What is not as the configuration has it in the cluster: names that nobody has, questions that are not answered. Each is logged when it
    /// comes up; for as long as it lasts it stands in `/status`.
    pub(super) fn tell_of_cluster(&mut self, snapshot: &Snapshot) {
        let mut told = BTreeSet::new();
        for service in self.services() {
            for asked in [Asked::Slices, Asked::Annotations] {
                // The watch has logged that.
                if let Some(why) = self.control.contacts.reason(&service, asked) {
                    let age = self.control.contacts.age(&service).map_or_else(
                        || "nothing is known".to_owned(),
                        |age| format!("what is known is {} s old and stays in force", age.as_secs()),
                    );
                    self.unanswered.push(format!("service {service}: the Kubernetes API cannot be asked: {why}; {age}"));
                }
            }
        }
        for upstream in snapshot.upstreams.values().filter(|u| !u.retired) {
            for set in upstream.sets.values() {
                let names = |why: &String| why.starts_with("there is no service") || why.contains("no slice has a TCP port");
                if let Some(why) = self.why_empty(set).filter(names) {
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
        self.control.told().cluster = std::mem::take(&mut self.unanswered).into_iter().chain(self.odd.iter().cloned()).collect();
    }
}
