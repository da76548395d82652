//! The immutable Snapshot, and the Activation whose last holder's drop means that a set has drained.

use std::{
    cell::Cell,
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use pingora_ketama::{Bucket, Continuum};

use super::{admission::Queue, endpoint::Endpoint, health::Preflight, lanes::Lanes};
use crate::{
    lifecycle::drain,
    model::{
        Settings, SiteTable,
        upstream::{Policy, SetConfig},
    },
};

/// Everything a request may ask about where it can go. Complete and immutable.
#[derive(Debug)]
pub struct Snapshot {
    pub generation: u64,
    pub config_hash: Arc<str>,
    pub settings: Arc<Settings>,
    pub sites: Arc<SiteTable>,
    pub upstreams: BTreeMap<Arc<str>, Arc<Upstream>>,
}

#[derive(Debug)]
pub struct Upstream {
    pub name: Arc<str>,
    pub policy: Arc<Policy>,
    pub sets: BTreeMap<Arc<str>, Arc<Set>>,
    /// The set that `activation` names.
    pub active: Arc<Set>,
    pub active_by: ActiveBy,
    pub activation: Arc<Activation>,
    pub queue: Arc<Queue>,
    /// Of this activation.
    pub lanes: Arc<Lanes>,
    /// Removed from the configuration; here until no request holds a route to it.
    pub retired: bool,
}

/// Who made a set active.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ActiveBy {
    File,
    Operator(String),
    /// Of the Service that `active_from` names.
    Annotation,
    /// The set that the other replicas served when this one started and could not follow the annotation.
    Peers,
}

impl std::fmt::Display for ActiveBy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ActiveBy::File => f.write_str("file"),
            ActiveBy::Operator(who) => f.write_str(who),
            ActiveBy::Annotation => f.write_str("annotation"),
            ActiveBy::Peers => f.write_str("peers"),
        }
    }
}

#[derive(Debug)]
pub struct Set {
    pub config: SetConfig,
    pub endpoints: Vec<Arc<Endpoint>>,
    /// By id, sorted: of each its place in `endpoints`.
    places: Vec<(u64, usize)>,
    /// For `balance = "hash:..."`.
    pub ring: Option<Ring>,
}

impl Set {
    pub fn new(config: SetConfig, endpoints: Vec<Arc<Endpoint>>, hashed: bool) -> Self {
        let ring = hashed.then(|| Ring::new(&endpoints));
        let mut places: Vec<(u64, usize)> = endpoints.iter().enumerate().map(|(place, e)| (e.id, place)).collect();
        places.sort_unstable();
        Set { config, endpoints, places, ring }
    }

    pub fn name(&self) -> &Arc<str> {
        &self.config.name
    }

    pub fn usable(&self, now_ms: u64) -> usize {
        self.endpoints.iter().filter(|e| e.is_usable(now_ms)).count()
    }

    /// Has pods, and the preflight of each was given up.
    pub fn gave_up(&self) -> bool {
        !self.endpoints.is_empty() && self.endpoints.iter().all(|e| e.health().preflight == Preflight::GaveUp)
    }

    /// The endpoints whose workers count: those that are usable, and where none is all that are allowed, as dispatch has it.
    pub fn counted(&self, now_ms: u64) -> impl Iterator<Item = &Arc<Endpoint>> {
        let usable = self.endpoints.iter().any(|e| e.is_usable(now_ms) && e.is_allowed());
        let staying = self.endpoints.iter().any(|e| e.is_allowed() && !e.is_leaving());
        self.endpoints.iter().filter(move |e| e.is_allowed() && (!usable || e.is_usable(now_ms)) && !(staying && e.is_leaving()))
    }

    /// Their workers; `None` where a number is not known.
    pub fn capacity(&self, now_ms: u64) -> Option<u32> {
        self.counted(now_ms).try_fold(0_u32, |sum, endpoint| Some(sum.saturating_add(endpoint.capacity()?)))
    }

    /// The slots of them that this replica may use; `None` where a number is not known.
    pub fn share(&self, now_ms: u64) -> Option<u32> {
        self.counted(now_ms).try_fold(0_u32, |sum, endpoint| Some(sum.saturating_add(endpoint.limit()?)))
    }

    pub fn endpoint(&self, id: u64) -> Option<&Arc<Endpoint>> {
        let at = self.places.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        self.endpoints.get(self.places.get(at)?.1)
    }
}

/// Nginx's consistent hash over a set.
pub struct Ring {
    continuum: Continuum,
    by_address: Vec<(std::net::SocketAddr, usize)>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("endpoints", &self.by_address.len()).finish()
    }
}

impl Ring {
    fn new(endpoints: &[Arc<Endpoint>]) -> Self {
        // The ring knows socket addresses only: a unix socket stands in it under an address of the discard prefix (RFC 6666).
        let by_address: Vec<_> = endpoints
            .iter()
            .enumerate()
            .map(|(index, endpoint)| match &endpoint.address {
                crate::model::Address::Tcp(address) => (*address, index),
                crate::model::Address::Unix(path) => {
                    use std::hash::{DefaultHasher, Hash, Hasher};
                    let mut hasher = DefaultHasher::new();
                    path.hash(&mut hasher);
                    let bits = (0x0100_u128 << 112) | u128::from(hasher.finish());
                    (std::net::SocketAddr::from((std::net::Ipv6Addr::from(bits), 9000)), index)
                }
            })
            .collect();
        let buckets: Vec<_> = by_address.iter().map(|(address, _)| Bucket::new(*address, 1)).collect();
        Ring { continuum: Continuum::new(&buckets), by_address }
    }

    /// Endpoint indices for `key`, in the order to be tried.
    pub fn order<'a>(&'a self, key: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
        self.continuum
            .node_iter(key)
            .filter_map(|address| self.by_address.iter().find(|(a, _)| a == address).map(|(_, index)| *index))
    }
}

/// The turn that made a set active. Held by snapshots and by each request dispatched to that set.
#[derive(Debug)]
pub struct Activation {
    pub set: Arc<str>,
    pub serial: u64,
    /// Another set is active: who ends from now on is counted.
    left: AtomicBool,
    /// Outlives the Activation, for the receipt.
    tally: Arc<drain::Tally>,
    guard: drain::Guard,
}

static SERIAL: AtomicU64 = AtomicU64::new(1);

impl Activation {
    pub fn new(set: Arc<str>) -> Arc<Self> {
        let (guard, _) = drain::guard();
        Arc::new(Activation {
            set,
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            left: AtomicBool::new(false),
            tally: Arc::default(),
            guard,
        })
    }

    /// Resolves when the last holder has let go: the set has drained.
    pub fn drained(&self) -> drain::Done {
        self.guard.done()
    }

    /// From here on the ends of its requests are counted; to be called before another snapshot is in force.
    pub fn leave(&self) -> Arc<drain::Tally> {
        self.left.store(true, Ordering::SeqCst);
        self.tally.clone()
    }

    /// The counts, if this set is being left.
    pub fn leaving(&self) -> Option<&drain::Tally> {
        self.left.load(Ordering::Relaxed).then_some(&*self.tally)
    }
}

/// What a dispatched request holds of its upstream, and with it the Activation. Dropped, it says how the request has ended.
#[derive(Debug)]
pub struct Hold {
    upstream: Arc<Upstream>,
    end: Cell<drain::End>,
}

impl Hold {
    pub fn new(upstream: Arc<Upstream>) -> Self {
        Hold { upstream, end: Cell::new(drain::End::Failed) }
    }

    pub fn end(&self, end: drain::End) {
        self.end.set(end);
    }

    /// The request goes on with another endpoint.
    pub fn moved_on(self) {
        self.end(drain::End::Completed);
        if let Some(tally) = self.upstream.activation.leaving() {
            tally.retried();
        }
    }
}

impl std::ops::Deref for Hold {
    type Target = Upstream;

    fn deref(&self) -> &Upstream {
        &self.upstream
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(tally) = self.upstream.activation.leaving() {
            tally.ended(self.end.get());
        }
    }
}
