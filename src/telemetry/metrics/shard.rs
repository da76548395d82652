//! What one worker counts: plain values behind a mutex that only a scrape ever contends for.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{BUCKETS, OTHER};

/// Names a shard remembers. Reloads that keep inventing names end up under [`OTHER`].
const MAX_NAMES: usize = 1024;
/// Rows below one name: codes times sets, or sets times results.
const MAX_ROWS: usize = 1024;
/// Of the names, before their index is asked.
const LOOKED_THROUGH: usize = 4;

/// What one worker counts.
#[derive(Default)]
pub struct Shard {
    pub(super) counts: Mutex<Counts>,
    pub(super) opened: AtomicU64,
    pub(super) closed: AtomicU64,
}

#[derive(Default)]
pub(super) struct Counts {
    pub(super) sites: Named<SiteCounts>,
    pub(super) upstreams: Named<UpstreamCounts>,
    pub(super) errors: Vec<(&'static str, u64)>,
    pub(super) shed: Vec<(&'static str, u64)>,
}

/// Code (0: any other), upstream and set.
pub(super) type RequestRow = (u16, Arc<str>, Arc<str>);

#[derive(Default)]
pub(super) struct SiteCounts {
    pub(super) duration: Histogram,
    /// Few enough to look through.
    pub(super) requests: Vec<(RequestRow, u64)>,
}

#[derive(Default)]
pub(super) struct UpstreamCounts {
    pub(super) queue_wait: Histogram,
    pub(super) expired: Vec<(&'static str, u64)>,
    pub(super) attempts: Vec<((Arc<str>, &'static str), u64)>,
    /// By set; there are few.
    pub(super) ejections: Vec<(Arc<str>, u64)>,
}

impl Shard {
    /// A request has ended. `upstream` and `set` are empty where PHP was not asked. Allocates only for a new row.
    pub fn request(&self, site: &str, code: u16, upstream: &str, set: &str, seconds: f64) {
        let mut counts = lock(&self.counts);
        let cell = counts.sites.get(site);
        cell.duration.observe(seconds);
        // PHP chooses the code: whatever it invents beyond the registered classes shares one row.
        let code = if (100..600).contains(&code) { code } else { 0 };
        let known = |(row, _): &(RequestRow, u64)| row.0 == code && *row.1 == *upstream && *row.2 == *set;
        let other = |(row, _): &(RequestRow, u64)| row.0 == 0 && *row.1 == *OTHER;
        let rows = &mut cell.requests;
        let full = rows.len() >= MAX_ROWS;
        match rows.iter().position(known).or_else(|| rows.iter().position(other).filter(|_| full)) {
            Some(at) => rows[at].1 += 1,
            None if full => rows.push(((0, OTHER.into(), OTHER.into()), 1)),
            None => rows.push(((code, upstream.into(), set.into()), 1)),
        }
    }

    /// PHP has been tried once.
    pub fn attempt(&self, upstream: &str, set: &str, result: &'static str) {
        let mut counts = lock(&self.counts);
        let rows = &mut counts.upstreams.get(upstream).attempts;
        match rows.iter().position(|((s, r), _)| **s == *set && *r == result) {
            Some(at) => rows[at].1 += 1,
            None if rows.len() < MAX_ROWS => rows.push(((set.into(), result), 1)),
            None => {}
        }
    }

    /// A request has left the queue, granted or not.
    pub fn queue_wait(&self, upstream: &str, waited: Duration) {
        lock(&self.counts).upstreams.get(upstream).queue_wait.observe(waited.as_secs_f64());
    }

    /// A request has ended in the queue without having reached PHP.
    pub fn expired(&self, upstream: &str, reason: &'static str) {
        add(&mut lock(&self.counts).upstreams.get(upstream).expired, reason);
    }

    /// An endpoint was left alone after failures. The names are those of the configuration.
    pub fn ejection(&self, upstream: &str, set: &Arc<str>) {
        let mut counts = lock(&self.counts);
        let ejections = &mut counts.upstreams.get(upstream).ejections;
        let has_room = ejections.len() < MAX_ROWS;
        match ejections.iter_mut().find(|(known, _)| known == set) {
            Some((_, n)) => *n += 1,
            None if has_room => ejections.push((set.clone(), 1)),
            None => {}
        }
    }

    /// `cause` is `error::Kind::cause`.
    pub fn error(&self, cause: &'static str) {
        add(&mut lock(&self.counts).errors, cause);
    }

    pub fn shed(&self, reason: &'static str) {
        add(&mut lock(&self.counts).shed, reason);
    }

    /// A connection has been accepted; it is open until what this gives is dropped.
    pub fn connection(self: &Arc<Self>) -> OpenConnection {
        self.opened.fetch_add(1, Ordering::Release);
        OpenConnection(self.clone())
    }
}

/// One of `slackwater_connections`, also where its task panics.
pub struct OpenConnection(Arc<Shard>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.closed.fetch_add(1, Ordering::Release);
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keys are words of the program, so their number is fixed.
pub(super) fn add(rows: &mut Vec<(&'static str, u64)>, key: &'static str) {
    match rows.iter_mut().find(|(known, _)| *known == key) {
        Some((_, n)) => *n += 1,
        None => rows.push((key, 1)),
    }
}

/// Values by a name of the configuration.
#[derive(Default)]
pub(super) struct Named<V> {
    pub(super) index: HashMap<Arc<str>, usize>,
    pub(super) values: Vec<(Arc<str>, V)>,
}

impl<V: Default> Named<V> {
    fn get(&mut self, name: &str) -> &mut V {
        // Most have one site and one upstream: looking costs less than hashing.
        let among_first = self.values.iter().take(LOOKED_THROUGH).position(|(known, _)| **known == *name);
        let at = match among_first.or_else(|| self.index.get(name).copied()) {
            Some(at) => at,
            None if self.values.len() > MAX_NAMES => MAX_NAMES,
            None => {
                let name = if self.values.len() == MAX_NAMES { OTHER } else { name };
                let name: Arc<str> = name.into();
                self.values.push((Arc::clone(&name), V::default()));
                self.index.insert(name, self.values.len() - 1);
                self.values.len() - 1
            }
        };
        &mut self.values[at].1
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct Histogram {
    /// One more than [`BUCKETS`], for `+Inf`.
    pub(super) counts: [u64; BUCKETS.len() + 1],
    pub(super) sum: f64,
}

impl Histogram {
    fn observe(&mut self, seconds: f64) {
        self.counts[BUCKETS.partition_point(|bound| *bound < seconds)] += 1;
        self.sum += seconds;
    }

    pub(super) fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts) {
            *mine += theirs;
        }
        self.sum += other.sum;
    }
}
