//! Every metric: its name, labels and help, where it is counted, and how it is told.
//!
//! What requests count goes into a [`Shard`] of their own worker: plain values behind a mutex that only a scrape ever
//! contends for, so counting costs no shared cache line. A scrape folds the shards. Gauges are asked for at the scrape.
//! Labels come from the configuration or from fixed words, never from a client.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::Registry,
};

mod live;
mod process;
pub use live::SiteTotals;

/// For the `Content-Type` of `/metrics`.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The values of the `phase` label, as in `lifecycle::Phase::name`.
pub const PHASES: [&str; 6] = ["Starting", "Running", "LameDuck", "Draining", "Aborting", "Exited"];

/// Upper bounds of the buckets of every histogram, in seconds; `+Inf` follows.
pub const BUCKETS: [f64; 17] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

/// Names a shard remembers. Reloads that keep inventing names end up under [`OTHER`].
const MAX_NAMES: usize = 1024;
/// Rows below one name: codes times sets, or sets times results.
const MAX_ROWS: usize = 1024;
/// Of the names, before their index is asked.
const LOOKED_THROUGH: usize = 4;
const OTHER: &str = "other";
/// Of a reload, and of a swap.
const OUTCOMES: [&str; 3] = ["applied", "unchanged", "refused"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// One metric family. A counter's name ends in `_total`.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    pub name: &'static str,
    pub kind: Kind,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

macro_rules! metrics {
    ($($id:ident = $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(const $id: Definition =
            Definition { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help };)*
        /// Every metric there is, in the order of the exposition; `docs/` is generated from it.
        pub const METRICS: &[Definition] = &[$($id),*];
    };
}

metrics! {
    REQUESTS = Counter "slackwater_requests_total" ["site", "code", "upstream", "set"]
        "Requests answered; code 499 is a client that left, upstream and set are empty for what PHP was not asked for.";
    DURATION = Histogram "slackwater_request_duration_seconds" ["site"]
        "Time from the end of the request head to the last byte of the answer.";
    ERRORS = Counter "slackwater_errors_total" ["cause"] "Requests that got no answer of PHP's, by the cause that docs/runbook.md explains.";
    SHED = Counter "slackwater_shed_total" ["reason"] "What was refused or closed to protect the rest: the cause of a request, or `idle_connection` at max_connections.";
    CONNECTIONS = Gauge "slackwater_connections" [] "Client connections open now.";
    CONNECTIONS_MAX = Gauge "slackwater_connections_max" [] "Client connections that may be open: max_connections.";
    ACCEPTED = Counter "slackwater_connections_accepted_total" [] "Client connections accepted.";
    ATTEMPTS = Counter "slackwater_upstream_attempts_total" ["upstream", "set", "result"]
        "Tries to have PHP answer a request, retries too; result is `ok` or a cause.";
    QUEUE_WAIT = Histogram "slackwater_upstream_queue_wait_seconds" ["upstream"]
        "Time that requests which had to queue waited for a worker of PHP, whether they got one or not.";
    EXPIRED = Counter "slackwater_upstream_expired_total" ["upstream", "reason"]
        "Requests that ended in the queue and never reached PHP: queue_timeout, deadline_passed, client_left or no_endpoint.";
    QUEUE_DEPTH = Gauge "slackwater_upstream_queue_depth" ["upstream"] "Requests waiting for a worker of PHP now.";
    CAPACITY = Gauge "slackwater_upstream_capacity" ["upstream", "set"]
        "FPM workers of the set's usable endpoints; absent where it is not known.";
    BUSY = Gauge "slackwater_upstream_busy" ["upstream", "set"] "FPM workers that run a request of ours now.";
    PARKED = Gauge "slackwater_upstream_parked" ["upstream", "set"] "FPM workers held by a kept connection without a request.";
    SATURATION = Gauge "slackwater_upstream_saturation" ["upstream", "set"]
        "Requests of this replica, running and queued, over the set's workers: above 1 they wait. The sum over the replicas is the load of the set. Absent where the capacity is not known.";
    SHARE = Gauge "slackwater_upstream_share" ["upstream", "set"]
        "FPM workers of the set that this replica may use now: its own share and what it has borrowed; absent where the capacity is not known.";
    OVERLOADED = Gauge "slackwater_upstream_overloaded" ["upstream"]
        "1 while any of its lanes goes newest first or has shed requests within the last seconds, else 0.";
    LANE_BUSY = Gauge "slackwater_upstream_lane_busy" ["upstream", "lane"] "Requests of the lane that run now.";
    LANE_WAITING = Gauge "slackwater_upstream_lane_waiting" ["upstream", "lane"] "Requests of the lane that wait for a worker now.";
    USABLE = Gauge "slackwater_upstream_endpoints_usable" ["upstream", "set"] "Endpoints that may be given requests.";
    ENDPOINTS = Gauge "slackwater_upstream_endpoints" ["upstream", "set", "state"]
        "Endpoints by state: usable, disabled, leaving, preflight or unusable, as in /status.";
    EJECTIONS = Counter "slackwater_upstream_ejections_total" ["upstream", "set"] "Times that an endpoint was left alone after failures.";
    KNOWN_AGE = Gauge "slackwater_kubernetes_known_age_seconds" ["upstream", "set"]
        "Age of what Kubernetes has told of the set's Service; 0 while it is watched, absent before the first list.";
    REFUSED = Gauge "slackwater_upstream_annotation_refused" ["upstream"] "1 while slackwater.dev/active cannot be followed, else 0.";
    EMPTIED = Counter "slackwater_upstream_emptied_total" ["upstream", "set"] "Times that Kubernetes has left the active set without an endpoint.";
    ACTIVE = Gauge "slackwater_upstream_active_set" ["upstream", "set"] "1 for the set that gets the traffic, else 0.";
    READY = Gauge "slackwater_ready" [] "1 while /readyz and health_path say that requests are to be sent here, else 0.";
    PHASE = Gauge "slackwater_phase" ["phase"] "1 for the phase that the process is in, else 0.";
    GENERATION = Gauge "slackwater_config_generation" [] "Number of the snapshot in force.";
    RELOADS = Counter "slackwater_config_reloads_total" ["outcome"] "Reloads of the configuration: applied, unchanged or refused.";
    RELOAD_GOOD = Gauge "slackwater_config_last_reload_successful" []
        "0 while what is on disk, the configuration or a certificate, was refused when it was read last, else 1.";
    RELOADED = Gauge "slackwater_config_last_reload_success_timestamp_seconds" []
        "When a reload found the configuration good, in seconds since 1970; absent before the first.";
    SWAPS = Counter "slackwater_swaps_total" ["outcome"] "Turns of an upstream from one set to another: applied, unchanged or refused.";
    BUFFER_MEMORY = Gauge "slackwater_buffer_memory_bytes" [] "Memory that buffered bodies take now.";
    BUFFER_DISK = Gauge "slackwater_buffer_disk_bytes" [] "Disk that spilled bodies take now.";
    MEMORY_LIMIT = Gauge "slackwater_buffer_memory_limit_bytes" [] "Memory that buffered bodies may take: buffer.total.";
    DISK_LIMIT = Gauge "slackwater_buffer_disk_limit_bytes" [] "Disk that spilled bodies may take: buffer.disk.";
    LOG_LOST = Counter "slackwater_access_log_lost_total" [] "Access log lines lost because the log was not read or written fast enough.";
    OWN_LOG_LOST = Counter "slackwater_log_lost_total" [] "Lines of the log itself lost because stderr was not read fast enough.";
    TRACES_LOST = Counter "slackwater_traces_lost_total" [] "Sampled requests whose trace was lost because the collector took too long.";
    CERTIFICATE = Gauge "slackwater_certificate_expiry_timestamp_seconds" ["certificate"]
        "When a certificate expires, in seconds since 1970.";
    BUILD = Gauge "slackwater_build_info" ["version"] "Always 1.";
    STARTED = Gauge "process_start_time_seconds" [] "When the process began, in seconds since 1970.";
    CPU = Counter "process_cpu_seconds_total" [] "CPU time of all its threads, in user and system mode.";
    RESIDENT = Gauge "process_resident_memory_bytes" [] "Memory that is resident.";
    OPEN_FDS = Gauge "process_open_fds" [] "File descriptors that are open.";
    MAX_FDS = Gauge "process_max_fds" [] "File descriptors that may be open.";
}

/// What only the moment of the scrape can tell.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// One of [`PHASES`].
    pub phase: &'static str,
    pub generation: u64,
    pub upstreams: Vec<UpstreamGauge>,
    pub buffer_memory_bytes: u64,
    pub buffer_disk_bytes: u64,
    /// Lines, since the start.
    pub access_log_lost: u64,
    /// Lines, since the start.
    pub log_lost: u64,
    pub connections_max: u64,
    pub buffer_memory_limit_bytes: u64,
    pub buffer_disk_limit_bytes: u64,
    pub reload_refused: bool,
    /// Seconds since 1970.
    pub reloaded: Option<u64>,
    pub ready: bool,
    /// Requests, since the start.
    pub traces_lost: u64,
    /// File, and seconds since 1970.
    pub certificates: Vec<(String, u64)>,
}

#[derive(Clone, Debug)]
pub struct UpstreamGauge {
    pub name: Arc<str>,
    pub queued: u64,
    pub sets: Vec<SetGauge>,
    pub overloaded: bool,
    /// Name, running, waiting.
    pub lanes: Vec<(Arc<str>, u64, u64)>,
    /// Its annotation is not followed.
    pub refused: bool,
}

#[derive(Clone, Debug)]
pub struct SetGauge {
    pub name: Arc<str>,
    pub active: bool,
    pub capacity: Option<u64>,
    pub busy: u64,
    pub parked: u64,
    pub usable: u64,
    /// Slots that this replica may use; `None` where the capacity is not known.
    pub share: Option<u64>,
    /// `None` where the capacity is not known.
    pub saturation: Option<f64>,
    /// In seconds; `None` for what stands in the file, and where nothing is known.
    pub known_age: Option<f64>,
    /// How many endpoints are in each state.
    pub states: [(&'static str, u64); 5],
}

/// By upstream and set.
type BySet = BTreeMap<(Arc<str>, Arc<str>), u64>;

type Source = Box<dyn Fn() -> Gauges + Send + Sync>;

/// All counters of the process.
pub struct Metrics {
    shards: Vec<Arc<Shard>>,
    source: RwLock<Option<Source>>,
    reloads: Mutex<Vec<(&'static str, u64)>>,
    swaps: Mutex<Vec<(&'static str, u64)>>,
    emptied: Mutex<BySet>,
}

impl Metrics {
    /// One shard a worker, and at least one.
    pub fn new(workers: usize) -> Arc<Metrics> {
        Arc::new(Metrics {
            shards: (0..workers.max(1)).map(|_| Arc::default()).collect(),
            source: RwLock::new(None),
            reloads: Mutex::new(OUTCOMES.map(|outcome| (outcome, 0)).into()),
            swaps: Mutex::new(OUTCOMES.map(|outcome| (outcome, 0)).into()),
            emptied: Mutex::default(),
        })
    }

    /// There may be such errors, and such reasons to shed: told as 0 before the first, which no rate would see else.
    pub fn expect(&self, causes: impl Iterator<Item = &'static str>, reasons: impl Iterator<Item = &'static str>) {
        let mut counts = lock(&self.shards[0].counts);
        counts.errors.extend(causes.map(|cause| (cause, 0)));
        counts.shed.extend(reasons.map(|reason| (reason, 0)));
    }

    /// The shard of a worker. A number that no worker has shares another's shard: dearer, not wrong.
    pub fn shard(&self, worker: usize) -> Arc<Shard> {
        Arc::clone(&self.shards[worker % self.shards.len()])
    }

    /// Who is asked for the gauges at each scrape. It must not call back into this `Metrics`.
    pub fn set_source(&self, source: Source) {
        *self.source.write().unwrap_or_else(PoisonError::into_inner) = Some(source);
    }

    pub fn reload(&self, outcome: &'static str) {
        add(&mut lock(&self.reloads), outcome);
    }

    pub fn swap(&self, outcome: &'static str) {
        add(&mut lock(&self.swaps), outcome);
    }

    /// The active set has lost its last endpoint. The names are those of the configuration.
    pub fn emptied(&self, upstream: &Arc<str>, set: &Arc<str>) {
        *lock(&self.emptied).entry((Arc::clone(upstream), Arc::clone(set))).or_default() += 1;
    }

    /// The whole exposition, in OpenMetrics text; see [`CONTENT_TYPE`].
    pub fn encode(&self) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self.fold()));
        let mut out = String::with_capacity(16 << 10);
        // The only errors are those of the String, which has none.
        let _ = text::encode(&mut out, &registry);
        out
    }

    fn fold(&self) -> Scrape {
        let source = self.source.read().unwrap_or_else(PoisonError::into_inner);
        let mut scrape = Scrape {
            gauges: source.as_ref().map(|ask| ask()).unwrap_or_default(),
            reloads: lock(&self.reloads).clone(),
            swaps: lock(&self.swaps).clone(),
            emptied: lock(&self.emptied).clone(),
            process: process::Usage::now(),
            ..Scrape::default()
        };
        // What has never happened is told as 0: no rate would see the first time else.
        for upstream in &scrape.gauges.upstreams {
            for set in &upstream.sets {
                for by_set in [&mut scrape.emptied, &mut scrape.ejections] {
                    by_set.entry((Arc::clone(&upstream.name), Arc::clone(&set.name))).or_default();
                }
            }
        }
        for shard in &self.shards {
            // Closed first: the other order could show a connection as closed that was never opened.
            let closed = shard.closed.load(Ordering::Acquire);
            let opened = shard.opened.load(Ordering::Acquire);
            scrape.connections += opened.saturating_sub(closed);
            scrape.accepted += opened;
            let counts = lock(&shard.counts);
            for (site, cell) in &counts.sites.values {
                scrape.durations.entry(Arc::clone(site)).or_default().merge(&cell.duration);
                for (row, n) in &cell.requests {
                    *scrape.requests.entry((Arc::clone(site), row.clone())).or_default() += n;
                }
            }
            for (upstream, cell) in &counts.upstreams.values {
                for (set, n) in &cell.ejections {
                    *scrape.ejections.entry((Arc::clone(upstream), Arc::clone(set))).or_default() += n;
                }
                scrape.queue_waits.entry(Arc::clone(upstream)).or_default().merge(&cell.queue_wait);
                for (reason, n) in &cell.expired {
                    *scrape.expired.entry((Arc::clone(upstream), reason)).or_default() += n;
                }
                for ((set, result), n) in &cell.attempts {
                    *scrape.attempts.entry((Arc::clone(upstream), Arc::clone(set), result)).or_default() += n;
                }
            }
            for (cause, n) in &counts.errors {
                *scrape.errors.entry(cause).or_default() += n;
            }
            for (reason, n) in &counts.shed {
                *scrape.shed.entry(reason).or_default() += n;
            }
        }
        scrape
    }
}

/// What one worker counts.
#[derive(Default)]
pub struct Shard {
    counts: Mutex<Counts>,
    opened: AtomicU64,
    closed: AtomicU64,
}

#[derive(Default)]
struct Counts {
    sites: Named<SiteCounts>,
    upstreams: Named<UpstreamCounts>,
    errors: Vec<(&'static str, u64)>,
    shed: Vec<(&'static str, u64)>,
}

/// Code (0: any other), upstream and set.
type RequestRow = (u16, Arc<str>, Arc<str>);

#[derive(Default)]
struct SiteCounts {
    duration: Histogram,
    /// Few enough to look through.
    requests: Vec<(RequestRow, u64)>,
}

#[derive(Default)]
struct UpstreamCounts {
    queue_wait: Histogram,
    expired: Vec<(&'static str, u64)>,
    attempts: Vec<((Arc<str>, &'static str), u64)>,
    /// By set; there are few.
    ejections: Vec<(Arc<str>, u64)>,
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keys are words of the program, so their number is fixed.
fn add(rows: &mut Vec<(&'static str, u64)>, key: &'static str) {
    match rows.iter_mut().find(|(known, _)| *known == key) {
        Some((_, n)) => *n += 1,
        None => rows.push((key, 1)),
    }
}

/// Values by a name of the configuration.
#[derive(Default)]
struct Named<V> {
    index: HashMap<Arc<str>, usize>,
    values: Vec<(Arc<str>, V)>,
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
struct Histogram {
    /// One more than [`BUCKETS`], for `+Inf`.
    counts: [u64; BUCKETS.len() + 1],
    sum: f64,
}

impl Histogram {
    fn observe(&mut self, seconds: f64) {
        self.counts[BUCKETS.partition_point(|bound| *bound < seconds)] += 1;
        self.sum += seconds;
    }

    fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts) {
            *mine += theirs;
        }
        self.sum += other.sum;
    }
}

/// Everything at one moment, in the order it is told.
#[derive(Default)]
struct Scrape {
    requests: BTreeMap<(Arc<str>, RequestRow), u64>,
    durations: BTreeMap<Arc<str>, Histogram>,
    errors: BTreeMap<&'static str, u64>,
    shed: BTreeMap<&'static str, u64>,
    attempts: BTreeMap<(Arc<str>, Arc<str>, &'static str), u64>,
    queue_waits: BTreeMap<Arc<str>, Histogram>,
    expired: BTreeMap<(Arc<str>, &'static str), u64>,
    connections: u64,
    accepted: u64,
    reloads: Vec<(&'static str, u64)>,
    swaps: Vec<(&'static str, u64)>,
    emptied: BySet,
    ejections: BySet,
    gauges: Gauges,
    process: process::Usage,
}

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for definition in METRICS {
            // OpenMetrics names a counter's family without the suffix, and the encoder adds it.
            let (name, kind) = match definition.kind {
                Kind::Counter => (definition.name.trim_end_matches("_total"), MetricType::Counter),
                Kind::Gauge => (definition.name, MetricType::Gauge),
                Kind::Histogram => (definition.name, MetricType::Histogram),
            };
            let help = definition.help;
            let encoder = encoder.encode_descriptor(name, help, None, kind)?;
            self.rows(&mut Rows { definition, encoder })?;
        }
        Ok(())
    }
}

impl Scrape {
    fn rows(&self, out: &mut Rows<'_>) -> fmt::Result {
        match out.definition.name {
            name if name == REQUESTS.name => {
                for ((site, (code, upstream, set)), n) in &self.requests {
                    let mut digits = itoa::Buffer::new();
                    let code = if *code == 0 { OTHER } else { digits.format(*code) };
                    out.counter(&[site, code, upstream, set], *n)?;
                }
                Ok(())
            }
            name if name == DURATION.name => self.durations.iter().try_for_each(|(site, h)| out.histogram(&[site], h)),
            name if name == ERRORS.name => self.errors.iter().try_for_each(|(cause, n)| out.counter(&[cause], *n)),
            name if name == SHED.name => self.shed.iter().try_for_each(|(reason, n)| out.counter(&[reason], *n)),
            name if name == CONNECTIONS.name => out.gauge(&[], self.connections),
            name if name == ACCEPTED.name => out.counter(&[], self.accepted),
            name if name == ATTEMPTS.name => {
                self.attempts.iter().try_for_each(|((upstream, set, result), n)| out.counter(&[upstream, set, result], *n))
            }
            name if name == QUEUE_WAIT.name => self.queue_waits.iter().try_for_each(|(upstream, h)| out.histogram(&[upstream], h)),
            name if name == EXPIRED.name => {
                self.expired.iter().try_for_each(|((upstream, reason), n)| out.counter(&[&**upstream, reason], *n))
            }
            name if name == QUEUE_DEPTH.name => self.gauges.upstreams.iter().try_for_each(|u| out.gauge(&[&u.name], u.queued)),
            name if name == PHASE.name => {
                let phase = self.gauges.phase;
                PHASES.iter().try_for_each(|known| out.gauge(&[known], u64::from(*known == phase)))
            }
            name if name == GENERATION.name => out.gauge(&[], self.gauges.generation),
            name if name == RELOADS.name => self.reloads.iter().try_for_each(|(outcome, n)| out.counter(&[outcome], *n)),
            name if name == SWAPS.name => self.swaps.iter().try_for_each(|(outcome, n)| out.counter(&[outcome], *n)),
            name if name == EMPTIED.name => {
                self.emptied.iter().try_for_each(|((upstream, set), n)| out.counter(&[&**upstream, &**set], *n))
            }
            name if name == BUFFER_MEMORY.name => out.gauge(&[], self.gauges.buffer_memory_bytes),
            name if name == BUFFER_DISK.name => out.gauge(&[], self.gauges.buffer_disk_bytes),
            name if name == LOG_LOST.name => out.counter(&[], self.gauges.access_log_lost),
            name if name == OWN_LOG_LOST.name => out.counter(&[], self.gauges.log_lost),
            name if name == CONNECTIONS_MAX.name => out.gauge(&[], self.gauges.connections_max),
            name if name == MEMORY_LIMIT.name => out.gauge(&[], self.gauges.buffer_memory_limit_bytes),
            name if name == DISK_LIMIT.name => out.gauge(&[], self.gauges.buffer_disk_limit_bytes),
            name if name == RELOAD_GOOD.name => out.gauge(&[], u64::from(!self.gauges.reload_refused)),
            name if name == RELOADED.name => self.gauges.reloaded.map_or(Ok(()), |at| out.gauge(&[], at)),
            name if name == READY.name => out.gauge(&[], u64::from(self.gauges.ready)),
            name if name == EJECTIONS.name => {
                self.ejections.iter().try_for_each(|((upstream, set), n)| out.counter(&[&**upstream, &**set], *n))
            }
            name if name == STARTED.name => self.process.started.map_or(Ok(()), |at| out.fraction(&[], at)),
            name if name == CPU.name => self.process.cpu.map_or(Ok(()), |seconds| out.seconds(&[], seconds)),
            name if name == RESIDENT.name => self.process.resident.map_or(Ok(()), |bytes| out.gauge(&[], bytes)),
            name if name == OPEN_FDS.name => self.process.descriptors.map_or(Ok(()), |n| out.gauge(&[], n)),
            name if name == MAX_FDS.name => self.process.most_descriptors.map_or(Ok(()), |n| out.gauge(&[], n)),
            name if name == TRACES_LOST.name => out.counter(&[], self.gauges.traces_lost),
            name if name == CERTIFICATE.name => {
                for (file, expiry) in &self.gauges.certificates {
                    out.gauge(&[file], *expiry)?;
                }
                Ok(())
            }
            name if name == BUILD.name => out.gauge(&[env!("CARGO_PKG_VERSION")], 1),
            name => self.set_rows(name, out),
        }
    }

    fn set_rows(&self, name: &str, out: &mut Rows<'_>) -> fmt::Result {
        for upstream in &self.gauges.upstreams {
            match name {
                name if name == REFUSED.name => out.gauge(&[&*upstream.name], u64::from(upstream.refused))?,
                name if name == OVERLOADED.name => out.gauge(&[&*upstream.name], u64::from(upstream.overloaded))?,
                _ => {}
            }
            for (lane, busy, waiting) in &upstream.lanes {
                match name {
                    name if name == LANE_BUSY.name => out.gauge(&[&*upstream.name, lane], *busy)?,
                    name if name == LANE_WAITING.name => out.gauge(&[&*upstream.name, lane], *waiting)?,
                    _ => {}
                }
            }
            for set in &upstream.sets {
                let labels = [&*upstream.name, &*set.name];
                match name {
                    name if name == CAPACITY.name => set.capacity.map_or(Ok(()), |n| out.gauge(&labels, n))?,
                    name if name == BUSY.name => out.gauge(&labels, set.busy)?,
                    name if name == PARKED.name => out.gauge(&labels, set.parked)?,
                    name if name == SATURATION.name => set.saturation.map_or(Ok(()), |part| out.fraction(&labels, part))?,
                    name if name == SHARE.name => set.share.map_or(Ok(()), |n| out.gauge(&labels, n))?,
                    name if name == USABLE.name => out.gauge(&labels, set.usable)?,
                    name if name == ENDPOINTS.name => {
                        set.states.iter().try_for_each(|(state, n)| out.gauge(&[&upstream.name, &set.name, state], *n))?;
                    }
                    name if name == KNOWN_AGE.name => set.known_age.map_or(Ok(()), |age| out.fraction(&labels, age))?,
                    name if name == ACTIVE.name => out.gauge(&labels, u64::from(set.active))?,
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// The rows of one family; label values stand in the order of the definition.
struct Rows<'a> {
    definition: &'static Definition,
    encoder: MetricEncoder<'a>,
}

impl Rows<'_> {
    fn row(&mut self, values: &[&str], write: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result) -> fmt::Result {
        debug_assert_eq!(values.len(), self.definition.labels.len());
        if values.is_empty() {
            return write(&mut self.encoder);
        }
        let labels: Vec<(&str, &str)> = self.definition.labels.iter().copied().zip(values.iter().copied()).collect();
        write(&mut self.encoder.encode_family(&labels)?)
    }

    fn seconds(&mut self, labels: &[&str], value: f64) -> fmt::Result {
        self.row(labels, |row| row.encode_counter::<NoLabelSet, f64, f64>(&value, None))
    }

    fn counter(&mut self, labels: &[&str], value: u64) -> fmt::Result {
        self.row(labels, |row| row.encode_counter::<NoLabelSet, u64, f64>(&value, None))
    }

    fn gauge(&mut self, labels: &[&str], value: u64) -> fmt::Result {
        self.row(labels, |row| row.encode_gauge(&i64::try_from(value).unwrap_or(i64::MAX)))
    }

    fn fraction(&mut self, labels: &[&str], value: f64) -> fmt::Result {
        self.row(labels, |row| row.encode_gauge(&value))
    }

    fn histogram(&mut self, labels: &[&str], histogram: &Histogram) -> fmt::Result {
        let bounds = BUCKETS.into_iter().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(histogram.counts).collect();
        let count = histogram.counts.iter().sum();
        self.row(labels, |row| row.encode_histogram::<NoLabelSet>(histogram.sum, count, &buckets, None))
    }
}

#[cfg(test)]
mod tests;
