//! What Kubernetes tells, put in force: endpoints that come, leave and go, and the annotation that turns traffic.

use std::{collections::BTreeMap, sync::Arc};

use super::{FILE_TURN_BUDGET, Reconciler, vote};
use crate::{
    control::{
        config::Config,
        kubernetes::AllKnown,
        slices::{self, AllFound},
    },
    lifecycle::Phase,
    model::upstream::ServicePort,
    upstream::{Endpoint, Set, Snapshot, store::Task},
};

impl Reconciler {
    /// Another snapshot where addresses have come or gone; what else a Service tells goes to the endpoints themselves.
    pub(super) fn discovered(&mut self, known: AllKnown) {
        self.known = known;
        self.found = self.find(&self.config);
        let next = match self.build(&self.config, &self.switch) {
            Ok(next) => next,
            Err(reason) => return tracing::error!(reason, "what Kubernetes tells cannot be put in force"),
        };
        let previous = self.control.store.load_full();
        let mut changed = false;
        for (name, upstream) in &next.upstreams {
            for (set_name, set) in &upstream.sets {
                let old = previous.upstreams.get(name).and_then(|u| u.sets.get(set_name));
                if old.is_some_and(|old| Arc::ptr_eq(old, set)) {
                    continue;
                }
                changed = true;
                let but = |of: &[Arc<Endpoint>], other: &Set| of.iter().filter(|e| !other.has(e.id)).count();
                let came = old.map_or(set.endpoints.len(), |old| but(&set.endpoints, old));
                let went = old.map_or(0, |old| but(&old.endpoints, set));
                tracing::info!(upstream = &**name, set = &**set_name, endpoints = set.endpoints.len(), came, went, "endpoints");
                if set.endpoints.is_empty() && *set_name == upstream.activation.set {
                    tracing::error!(
                        upstream = &**name,
                        set = &**set_name,
                        "the active set has lost its last endpoint; requests wait in the queue"
                    );
                }
            }
        }
        if changed {
            self.put_in_force(next, "kubernetes", FILE_TURN_BUDGET);
        }
    }

    /// What the sets of `config` find in what is known.
    pub(super) fn find(&self, config: &Config) -> AllFound {
        let sources = config.upstreams.values().flat_map(|u| &u.sets).filter_map(|set| set.kubernetes.as_ref());
        let found = |source: &ServicePort| Some(slices::merge(self.known.get(&source.service)?.slices.as_deref()?, &source.port));
        sources.filter_map(|source| Some((source.clone(), found(source)?))).collect()
    }

    /// Turns each upstream with `active_from` to what its annotation says, or says why not. Asked after every change, so that what was refused
    /// is tried again as soon as it can be.
    pub(super) fn follow_annotations(&mut self) {
        let names: Vec<(Arc<str>, Arc<str>)> =
            self.config.upstreams.iter().filter_map(|(name, u)| Some((name.clone(), u.active_from.clone()?))).collect();
        self.refused.retain(|name, _| names.iter().any(|(n, _)| n == name));
        for (name, service) in names {
            let wanted = self.annotated(&service);
            match self.follow_annotation(&name, wanted) {
                Ok(()) => drop(self.refused.remove(&name)),
                Err(reason) if self.refused.get(&name) == Some(&reason) => {}
                Err(reason) => {
                    self.control.metrics.swap("refused");
                    tracing::warn!(
                        upstream = &*name,
                        service = &*service,
                        reason,
                        "the annotation slackwater.dev/active is not followed"
                    );
                    self.refused.insert(name, reason);
                }
            }
        }
        self.control.told().refused =
            self.refused.iter().map(|(name, reason)| format!("upstream {name}: annotation not followed: {reason}")).collect();
    }

    pub(super) fn annotated(&self, service: &Arc<str>) -> Option<Arc<str>> {
        self.known.get(service)?.service.as_ref()?.active.clone()
    }

    fn follow_annotation(&mut self, name: &Arc<str>, wanted: Option<Arc<str>>) -> Result<(), String> {
        let snapshot = self.control.store.load_full();
        let Some(upstream) = snapshot.upstreams.get(name) else { return Ok(()) };
        if self.switch.annotated.get(name) == wanted.as_ref() && wanted.is_some() {
            return Ok(());
        }
        let Some(wanted) = wanted else {
            // A Service that is deleted by mistake must not turn traffic.
            return match self.switch.annotated.get(name) {
                Some(set) => Err(format!("it is gone; set {set} stays active")),
                None => Ok(()),
            };
        };
        // Nothing is served yet: then there is nothing to lose by waiting for the right set.
        let starting = self.control.phase.get() == Phase::Starting;
        if *upstream.active.name() != wanted {
            vote(&snapshot, name, &wanted, starting)?;
        }
        let mut switch = self.switch.clone();
        switch.annotated.insert(name.clone(), wanted);
        let next = self.build(&self.config, &switch)?;
        self.switch = switch;
        let turns = self.put_in_force(next, "annotation", FILE_TURN_BUDGET);
        if !turns.is_empty() {
            self.control.metrics.swap("applied");
            let active = self.control.store.load().upstreams.get(name).map(|u| u.active.name().to_string());
            tracing::info!(upstream = &**name, set = active, by = "annotation", "swap");
        }
        Ok(())
    }

    pub(super) fn close_leases(&self, endpoint: &Endpoint) {
        for worker in 0..self.control.workers.len() {
            // Lost where its channel is full: leases end by themselves within `lease.idle`.
            self.control.workers.try_post(worker, Task::UnparkAll(endpoint.id));
        }
    }

    /// Which pods are leaving, and how many workers each has by its Service's annotation.
    pub(super) fn tell_endpoints(&self, snapshot: &Snapshot) {
        let mut told: BTreeMap<u64, (&Arc<Endpoint>, bool, Option<u32>)> = BTreeMap::new();
        for upstream in snapshot.upstreams.values() {
            for set in upstream.sets.values() {
                let source = set.config.kubernetes.as_ref();
                let ready = source.and_then(|source| self.found.get(source));
                let annotated = source.and_then(|source| self.known.get(&source.service)?.service.as_ref()?.workers);
                let workers = upstream.policy.workers_per_endpoint.or(annotated);
                for endpoint in &set.endpoints {
                    let leaving = ready.is_some_and(|found| found.get(&endpoint.address) == Some(&false));
                    let (_, all_leaving, told_workers) = told.entry(endpoint.id).or_insert((endpoint, true, None));
                    *all_leaving &= leaving;
                    *told_workers = match (*told_workers, workers) {
                        (Some(one), Some(other)) => Some(one.min(other)),
                        (one, other) => one.or(other),
                    };
                }
            }
        }
        for (endpoint, leaving, workers) in told.into_values() {
            if let Some(workers) = workers {
                endpoint.set_capacity(Some(workers));
            }
            if endpoint.set_leaving(leaving) && leaving {
                tracing::info!(endpoint = %endpoint.address, "leaving: no new requests");
                self.close_leases(endpoint);
            }
        }
    }

    /// Why a set of Kubernetes has no endpoints, as far as that is known.
    pub(super) fn why_empty(&self, set: &Set) -> String {
        match &set.config.kubernetes {
            Some(source) if set.endpoints.is_empty() => match self.control.contacts.reason(&source.service) {
                Some(why) => format!(" (service {}: {why})", source.service),
                None => format!(" (service {} has no ready pods with this port)", source.service),
            },
            _ => String::new(),
        }
    }
}
