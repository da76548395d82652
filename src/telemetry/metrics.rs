//! Every metric: its name, labels and help. `shard` counts, `scrape` tells.
//!
//! What requests count goes into a [`Shard`] of their own worker, so counting costs no shared cache line. A scrape folds the shards. Gauges are asked for at the scrape.
//! Labels come from the configuration or from fixed words, never from a client.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use prometheus_client::{encoding::text, registry::Registry};

mod live;
mod process;
mod scrape;
mod shard;
pub use live::SiteTotals;
pub use shard::{OpenConnection, Shard};
use shard::{add, lock};

/// For the `Content-Type` of `/metrics`.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The values of the `phase` label, as in `lifecycle::Phase::name`.
pub const PHASES: [&str; 6] = ["Starting", "Running", "LameDuck", "Draining", "Aborting", "Exited"];

/// Upper bounds of the buckets of every histogram, in seconds; `+Inf` follows.
pub const BUCKETS: [f64; 17] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

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
}

#[cfg(test)]
mod tests;
