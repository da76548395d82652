//! (Config, what was there, who chose which set) -> the next Snapshot. Pure: nothing that is in force changes here.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{config::Config, slices::AllFound, switch::Switch};
use crate::{
    model::{
        Address,
        upstream::{Balance, SetConfig},
    },
    upstream::{
        Activation, Endpoint, Set, Snapshot, Upstream,
        admission::Queue,
        health::{Health, Preflight, Probe},
        lanes::Lanes,
        snapshot::ActiveBy,
    },
};

/// What a build needs besides the configuration.
pub struct Before<'a> {
    pub snapshot: Option<&'a Snapshot>,
    pub switch: &'a Switch,
    pub workers: usize,
    /// Upstreams that are gone from the file while a request still holds a route to them.
    pub retired: &'a BTreeSet<Arc<str>>,
    pub found: &'a AllFound,
    /// Endpoints that no snapshot names any more while a request still holds them.
    pub alive: &'a [Arc<Endpoint>],
}

/// The next snapshot, or why there can be none. Parts that did not change are shared with the one before.
pub fn build(config: &Config, before: &Before<'_>) -> Result<Snapshot, String> {
    let previous = before.snapshot;
    let mut endpoints = Endpoints::new(previous, before.alive, before.workers);
    let mut upstreams = BTreeMap::new();
    for (name, from_file) in &config.upstreams {
        let old = previous.and_then(|p| p.upstreams.get(name));
        let (active, active_by) = before
            .switch
            .active(name, from_file, old.map(|o| &**o))
            .ok_or_else(|| format!("upstream {name}: several sets, and `active` names none"))?;
        let hashed = matches!(from_file.policy.balance, Balance::HashAddress | Balance::HashCookie(_));
        let mut sets = BTreeMap::new();
        for set in &from_file.sets {
            let old_set = old.and_then(|o| o.sets.get(&set.name));
            let found = before.addresses(set);
            sets.insert(set.name.clone(), next_set(set, &found, old_set, hashed, &mut endpoints));
        }
        let Some(active_set) = sets.get(&active).cloned() else {
            return Err(format!("upstream {name}: the active set {active} is not there"));
        };
        let activation = match old {
            Some(old) if old.activation.set == active => old.activation.clone(),
            _ => Activation::new(active.clone()),
        };
        let policy = match old {
            Some(old) if *old.policy == from_file.policy => old.policy.clone(),
            _ => Arc::new(from_file.policy.clone()),
        };
        let queue = old.map_or_else(|| Arc::new(Queue::new(name.clone())), |o| o.queue.clone());
        let lanes = match old.filter(|old| Arc::ptr_eq(&old.activation, &activation)) {
            Some(old) if Arc::ptr_eq(&old.policy, &policy) => old.lanes.clone(),
            same => Lanes::new(&policy.lanes, &queue, same.map(|old| &*old.lanes)),
        };
        upstreams.insert(
            name.clone(),
            Arc::new(Upstream {
                name: name.clone(),
                policy,
                sets,
                active: active_set,
                active_by,
                activation,
                queue,
                lanes,
                retired: false,
            }),
        );
    }
    for name in before.retired {
        if let Some(old) = previous.and_then(|p| p.upstreams.get(name))
            && !upstreams.contains_key(name)
        {
            upstreams.insert(name.clone(), if old.retired { old.clone() } else { Arc::new(retire(old)) });
        }
    }
    Ok(Snapshot {
        generation: previous.map_or(1, |p| p.generation + 1),
        config_hash: config.hash.as_str().into(),
        settings: config.settings.clone(),
        sites: config.sites.clone(),
        upstreams,
    })
}

fn retire(old: &Upstream) -> Upstream {
    Upstream {
        name: old.name.clone(),
        policy: old.policy.clone(),
        sets: old.sets.clone(),
        active: old.active.clone(),
        active_by: ActiveBy::clone(&old.active_by),
        activation: old.activation.clone(),
        queue: old.queue.clone(),
        lanes: old.lanes.clone(),
        retired: true,
    }
}

impl Before<'_> {
    /// The addresses of a set: those of the file, or those that Kubernetes tells.
    fn addresses(&self, set: &SetConfig) -> Vec<Address> {
        match &set.kubernetes {
            None => set.endpoints.clone(),
            Some(source) => self.found.get(source).map_or_else(Vec::new, |found| found.keys().cloned().collect()),
        }
    }
}

fn next_set(config: &SetConfig, found: &[Address], old: Option<&Arc<Set>>, hashed: bool, endpoints: &mut Endpoints) -> Arc<Set> {
    if let Some(old) = old
        && old.config == *config
        && old.endpoints.iter().map(|e| &e.address).eq(found)
        && old.ring.is_some() == hashed
    {
        return old.clone();
    }
    let list = found.iter().map(|address| endpoints.get(address, config)).collect();
    Arc::new(Set::new(config.clone(), list, hashed))
}

/// What a pod that is new has to answer before its first user.
pub fn asked(health: &mut Health, set: &SetConfig) {
    if set.ping.is_some() || set.status_path.is_some() {
        health.probe = Probe::Pending;
    }
    if set.preflight.is_some() {
        health.preflight = Preflight::Asking;
    }
}

/// Endpoints outlive snapshots and are known by address.
struct Endpoints {
    known: HashMap<Address, Arc<Endpoint>>,
    next_id: u64,
    /// Those from here on nobody sees yet: to change them is not a change of anything in force.
    first_new: u64,
    workers: usize,
}

impl Endpoints {
    fn new(previous: Option<&Snapshot>, alive: &[Arc<Endpoint>], workers: usize) -> Self {
        let known: HashMap<_, _> = previous
            .iter()
            .flat_map(|p| p.upstreams.values())
            .flat_map(|u| u.sets.values())
            .flat_map(|s| s.endpoints.iter())
            .chain(alive)
            .map(|e| (e.address.clone(), e.clone()))
            .collect();
        let next_id = known.values().map(|e| e.id).max().unwrap_or(0) + 1;
        Endpoints { known, next_id, first_new: next_id, workers }
    }

    /// Pods that served before are not asked again: only new ones wait for an answer to a probe, or for their preflight.
    fn get(&mut self, address: &Address, set: &SetConfig) -> Arc<Endpoint> {
        let next_id = &mut self.next_id;
        let workers = self.workers;
        let endpoint = self.known.entry(address.clone()).or_insert_with(|| {
            *next_id += 1;
            Arc::new(Endpoint::new(*next_id - 1, address.clone(), workers))
        });
        if endpoint.id >= self.first_new {
            endpoint.update_health(0, |health| asked(health, set));
        }
        endpoint.clone()
    }
}
