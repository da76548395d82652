//! What Kubernetes tells, put in force: endpoints that come, leave and go, and the annotation that turns traffic.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::sync::mpsc;

use super::{Change, FILE_TURN_BUDGET, Reconciler, vote};
use crate::{
    control::{
        build,
        config::Config,
        kubernetes::{ACTIVE, AllKnown, Asked, events::Said},
        replicas::{self, Way},
        slices::{self, AllFound},
        state::{Remembered, State},
    },
    lifecycle::Phase,
    model::upstream::ServicePort,
    upstream::{Endpoint, Set, Snapshot, dispatch::now_ms, health::Health, store::Task},
};

/// How often what is known is written to the state file, where it has changed or to renew its age.
const REMEMBER_EVERY: Duration = Duration::from_secs(1);
const RENEW_EVERY: u32 = 60;

const ASK_AGAIN: u32 = 5;
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// What the other replicas serve: asked once, by a process that starts and cannot follow the annotation.
#[derive(Debug, Default)]
pub(super) enum Peers {
    #[default]
    NotAsked,
    Asked,
    Told(BTreeMap<String, String>),
}

/// A refusal without what is volatile in it.
fn kind(reason: &str) -> &str {
    reason.split(" (").next().unwrap_or(reason)
}

/// Turns whose old set has not drained: beyond so many the annotation waits.
const UNDRAINED: usize = 16;

/// Who turned, in logs and receipts.
pub(super) const ANNOTATION: &str = "annotation";

enum PeersServe {
    NotKnown,
    /// There are none, or none has answered, or they serve a set that this one does not have.
    Nothing,
    Usable(Arc<str>),
    /// Not yet, at least.
    NotUsable(Arc<str>),
}

/// Reminds the reconciler of the state file.
pub(super) async fn remember(changes: mpsc::Sender<Change>) {
    loop {
        tokio::time::sleep(REMEMBER_EVERY).await;
        if changes.send(Change::Remember).await.is_err() {
            return;
        }
    }
}

impl Reconciler {
    pub(super) fn to_remember(&self) -> Option<Remembered> {
        let kubernetes = self.config.settings.kubernetes.as_ref()?;
        let age = self.services().iter().filter_map(|service| self.control.contacts.age(service)).max().unwrap_or_default();
        Some(Remembered::of(&kubernetes.namespace, &self.known, &self.found, age))
    }

    /// Writes the state file, if there is something to be written.
    pub(super) fn remember(&mut self) {
        self.since_written += 1;
        // Before the first answer the file knows more than we do.
        let listed = self.known.values().any(|known| known.slices.is_some());
        if !listed || !(self.unwritten || self.since_written >= RENEW_EVERY) {
            return;
        }
        let Some(path) = self.config.settings.state.clone() else { return };
        let state = State { switch: self.switch.clone(), kubernetes: self.to_remember() };
        let saved = state.save(&path);
        (self.unwritten, self.since_written) = (false, 0);
        let unsaved = saved.err().map(|error| format!("the state file {} cannot be written: {error}", path.display()));
        let mut told = self.control.told();
        if let Some(why) = &unsaved
            && told.unsaved.is_none()
        {
            tracing::error!(why, "what Kubernetes has told would not survive a restart");
        }
        if unsaved.is_none() && told.unsaved.is_some() {
            tracing::info!(path = %path.display(), "the state file can be written again");
        }
        told.unsaved = unsaved;
    }

    /// Says why the process waits for its peers, and asks them where that has not been done.
    pub(super) fn asks_peers(&mut self) -> Option<String> {
        if self.control.phase.get() != Phase::Starting || self.waits_for_peers.is_empty() {
            return None;
        }
        let waits = self.waits_for_peers.clone();
        let names = waits.iter().map(|name| &**name).collect::<Vec<_>>().join(", ");
        if let (Peers::NotAsked, Some(kubernetes)) = (&self.peers, &self.config.settings.kubernetes)
            && let Some(service) = &kubernetes.self_service
            && let Some(slices) = self.known.get(service).and_then(|known| known.listed())
        {
            let replicas = replicas::ready(slices, self.ops_port());
            let (changes, own) = (self.control.changes.clone(), self.control.instance.clone());
            tokio::task::spawn_local(async move {
                let mut answers = Way::Direct.get_all(&replicas, "/status").await;
                // Where some are there and none answers it is not known that nobody serves.
                for _ in 0..ASK_AGAIN {
                    if answers.is_empty() || answers.values().any(Result::is_ok) {
                        break;
                    }
                    tokio::time::sleep(ASK_AGAIN_AFTER).await;
                    answers = Way::Direct.get_all(&replicas, "/status").await;
                }
                // After a crash the slice still has this pod as ready.
                answers.retain(|_, answer| answer.as_ref().map_or(true, |(_, status)| status["instance"] != *own));
                for (replica, why) in answers.iter().filter_map(|(r, a)| Some((r, a.as_ref().err()?))) {
                    tracing::warn!(replica = replica.name, why, "a replica did not say which set it serves");
                }
                let _ = changes.send(Change::Peers(replicas::served(&answers))).await;
            });
            self.peers = Peers::Asked;
        }
        let unknown = self.config.settings.kubernetes.as_ref().and_then(|kubernetes| {
            let service = kubernetes.self_service.as_ref().filter(|_| matches!(self.peers, Peers::NotAsked))?;
            let why = self.control.contacts.reason(service, Asked::Slices).unwrap_or_else(|| "not listed yet".to_owned());
            Some(format!("the other replicas are not known: service {service}: {why}"))
        });
        let what = unknown.unwrap_or_else(|| "asking the other replicas which they serve".to_owned());
        Some(format!("the annotated set of upstream {names} cannot be used; {what}"))
    }

    /// Every Service that is to be watched.
    pub(super) fn services(&self) -> BTreeSet<Arc<str>> {
        let upstreams = self.config.upstreams.values();
        let pods = upstreams.clone().flat_map(|u| &u.sets).filter_map(|set| set.kubernetes.as_ref()).map(|source| &source.service);
        let ours = self.config.settings.kubernetes.as_ref().and_then(|k| k.self_service.as_ref());
        pods.chain(upstreams.filter_map(|u| u.active_from.as_ref())).chain(ours).cloned().collect()
    }

    fn ops_port(&self) -> u16 {
        self.config.settings.listen.ops.map_or(0, |ops| ops.port())
    }

    /// What Kubernetes tells of all Services now; also sent where only the API server's failing is news.
    pub(super) fn discovered(&mut self, known: AllKnown) {
        let mut is_news = false;
        // What was known of a Service before, be it from the state file, counts until it has told something else.
        for (name, told) in known {
            let before = self.known.entry(name).or_default();
            if let Some(slices) = told.slices.filter(|slices| before.slices.as_ref().is_none_or(|old| !Arc::ptr_eq(old, slices))) {
                before.slices = Some(slices);
                is_news = true;
            }
            if let Some(service) = told.service.filter(|service| before.service.as_ref() != Some(service)) {
                before.service = Some(service);
                is_news = true;
            }
        }
        if is_news {
            let followed = self.services();
            self.known.retain(|name, _| followed.contains(name));
            self.unwritten = true;
            self.put_found_in_force();
        }
    }

    /// Another snapshot where addresses have come or gone; what else a Service tells goes to the endpoints themselves.
    pub(super) fn put_found_in_force(&mut self) {
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
                let but = |of: &[Arc<Endpoint>], other: &Set| of.iter().filter(|e| other.endpoint(e.id).is_none()).count();
                let came = old.map_or(set.endpoints.len(), |old| but(&set.endpoints, old));
                let went = old.map_or(0, |old| but(&old.endpoints, set));
                tracing::info!(upstream = &**name, set = &**set_name, endpoints = set.endpoints.len(), came, went, "endpoints");
                if set.endpoints.is_empty() && *set_name == upstream.activation.set {
                    self.control.metrics.emptied(name, set_name);
                    let now = now_ms();
                    let others = upstream.sets.values().filter(|other| other.usable(now) > 0);
                    let usable: Vec<String> = others.map(|other| format!("{} has {}", other.name(), other.usable(now))).collect();
                    tracing::error!(
                        upstream = &**name,
                        set = &**set_name,
                        why = self.why_empty(set).map(|empty| empty.why),
                        usable_elsewhere = usable.join(", "),
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
        let found = |source: &ServicePort| match self.known.get(&source.service).and_then(|known| known.listed()) {
            Some(slices) => Some(slices::merge(slices, &source.port)),
            None => self.remembered.get(source).cloned(),
        };
        sources.filter_map(|source| Some((source.clone(), found(source)?))).collect()
    }

    /// Turns each upstream with `active_from` to what its annotation says, or says why not. Asked after every change, so that what was refused
    /// is tried again as soon as it can be.
    pub(super) fn follow_annotations(&mut self) {
        let names: Vec<(Arc<str>, Arc<str>)> =
            self.config.upstreams.iter().filter_map(|(name, u)| Some((name.clone(), u.active_from.clone()?))).collect();
        self.refused.retain(|name, _| names.iter().any(|(n, _)| n == name));
        self.waits_for_peers.clear();
        let mut annotated = BTreeMap::new();
        for (name, service) in names {
            let wanted = self.annotated(&service);
            if let Some(wanted) = &wanted {
                annotated.insert(name.clone(), wanted.clone());
            }
            match self.follow_annotation(&name, &service, wanted) {
                Ok(()) => drop(self.refused.remove(&name)),
                // Behind the parenthesis stands how a pod is doing just now, which changes all the time.
                Err(reason) if self.refused.get(&name).is_some_and(|before| kind(before) == kind(&reason)) => {
                    self.refused.insert(name, reason);
                }
                Err(reason) => {
                    self.control.metrics.swap("refused");
                    let message = format!("upstream {name} does not follow {ACTIVE}: {reason}");
                    self.say(Said { service: service.clone(), warning: true, reason: "ActiveSetRefused", message });
                    tracing::warn!(upstream = &*name, service = &*service, reason, "the annotation {ACTIVE} is not followed");
                    self.refused.insert(name, reason);
                }
            }
        }
        let mut told = self.control.told();
        told.refused.clone_from(&self.refused);
        told.annotated = annotated;
    }

    fn say(&self, said: Said) {
        if let Some(discovery) = &self.discovery {
            discovery.say(said);
        }
    }

    pub(super) fn annotated(&self, service: &Arc<str>) -> Option<Arc<str>> {
        self.known.get(service)?.service.as_ref()?.active.clone()
    }

    fn follow_annotation(&mut self, name: &Arc<str>, service: &Arc<str>, wanted: Option<Arc<str>>) -> Result<(), String> {
        let snapshot = self.control.store.load_full();
        let Some(upstream) = snapshot.upstreams.get(name) else { return Ok(()) };
        if self.switch.annotated.get(name) == wanted.as_ref() && wanted.is_some() {
            return Ok(());
        }
        let Some(wanted) = wanted else {
            // A Service that is deleted by mistake must not turn traffic.
            let Some(set) = self.switch.annotated.get(name) else { return Ok(()) };
            let is_gone = self.known.get(service).and_then(|known| known.service.as_ref()).is_some_and(|told| told.missing);
            let what = if is_gone { "is gone".to_owned() } else { format!("has no annotation {ACTIVE} any more") };
            return Err(format!(
                "service {service} {what}; set {set} stays active; to say so: kubectl annotate --overwrite service {service} {ACTIVE}={set}"
            ));
        };
        let undrained = self.control.told().turning.values().filter(|turn| turn.upstream == *name).count();
        if undrained >= UNDRAINED && *upstream.active.name() != wanted {
            return Err(format!("{undrained} turns before have not drained yet"));
        }
        let mut switch = self.switch.clone();
        let usable = vote(&snapshot, name, &wanted, false);
        let starting = self.control.phase.get() == Phase::Starting;
        match self.peers_serve(name, &snapshot) {
            _ if usable.is_ok() => drop(switch.annotated.insert(name.clone(), wanted)),
            // Turned to what the others serve already, or about to be.
            PeersServe::Usable(set) if starting && *set != *wanted => drop(switch.peers.insert(name.clone(), set)),
            PeersServe::NotUsable(set) if starting && *set != *wanted => {
                self.waits_for_peers.push(name.clone());
                return usable;
            }
            PeersServe::NotKnown if starting => {
                self.waits_for_peers.push(name.clone());
                return Ok(());
            }
            // Nothing is served yet, and nobody serves another: nothing is lost by waiting for the right set.
            _ if starting => {
                vote(&snapshot, name, &wanted, true)?;
                switch.annotated.insert(name.clone(), wanted);
            }
            _ if *upstream.active.name() == wanted => drop(switch.annotated.insert(name.clone(), wanted)),
            _ => return usable,
        }
        if switch == self.switch {
            return usable;
        }
        switch.peers.retain(|upstream, _| !switch.annotated.contains_key(upstream));
        let next = self.build(&self.config, &switch)?;
        self.switch = switch;
        let turns = self.put_in_force(next, ANNOTATION, FILE_TURN_BUDGET);
        let active = self.control.store.load().upstreams.get(name).map(|u| u.active.name().clone());
        if starting && active.is_some() {
            tracing::info!(
                upstream = &**name,
                set = active.as_deref(),
                "starts on the set that the annotation, or the other replicas, say"
            );
        }
        if let (false, Some(set)) = (turns.is_empty(), active) {
            self.control.metrics.swap("applied");
            tracing::info!(upstream = &**name, set = &*set, by = ANNOTATION, "swap");
            let message = format!("upstream {name} has turned to set {set}");
            self.say(Said { service: service.clone(), warning: false, reason: "ActiveSetTurned", message });
        }
        if self.switch.annotated.contains_key(name) { Ok(()) } else { usable }
    }

    /// What the other replicas serve, as far as this process has to care.
    fn peers_serve(&self, name: &Arc<str>, snapshot: &Snapshot) -> PeersServe {
        let has_peers = self.config.settings.kubernetes.as_ref().is_some_and(|k| k.self_service.is_some());
        match &self.peers {
            _ if !has_peers => PeersServe::Nothing,
            Peers::NotAsked | Peers::Asked => PeersServe::NotKnown,
            Peers::Told(served) => match served.get(&**name) {
                Some(set) if vote(snapshot, name, set, false).is_ok() => PeersServe::Usable(set.as_str().into()),
                Some(set) if vote(snapshot, name, set, true).is_ok() => PeersServe::NotUsable(set.as_str().into()),
                _ => PeersServe::Nothing,
            },
        }
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
        let mut pods: BTreeMap<u64, (Arc<str>, Health)> = BTreeMap::new();
        for upstream in snapshot.upstreams.values() {
            for set in upstream.sets.values() {
                let source = set.config.kubernetes.as_ref();
                let ready = source.and_then(|source| self.found.get(source));
                let annotated = source.and_then(|source| self.known.get(&source.service)?.service.as_ref()?.workers);
                let workers = upstream.policy.workers_per_endpoint.or(annotated);
                for endpoint in &set.endpoints {
                    let pod = ready.and_then(|found| found.get(&endpoint.address));
                    let leaving = pod.is_some_and(|pod| !pod.ready);
                    if let Some(uid) = pod.and_then(|pod| pod.uid.clone()) {
                        let (_, fresh) = pods.entry(endpoint.id).or_insert_with(|| (uid, Health::default()));
                        build::asked(fresh, &set.config);
                    }
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
            if let Some((uid, fresh)) = pods.remove(&endpoint.id)
                && endpoint.set_pod(&uid, fresh)
            {
                tracing::info!(endpoint = %endpoint.address, "another pod has this address now");
                endpoint.tell_capacity(None);
                self.close_leases(endpoint);
            }
            endpoint.tell_capacity(workers);
            if endpoint.set_leaving(leaving) && leaving {
                tracing::info!(endpoint = %endpoint.address, "leaving: no new requests");
                self.close_leases(endpoint);
            }
        }
    }
}
