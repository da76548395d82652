//! What the configuration says about an upstream: plain policy, no state.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::Address;

/// `[upstream.NAME]` without its sets.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// `None`: one connection per request (`keepalive = "off"`).
    pub lease: Option<LeasePolicy>,
    /// `None` is "auto".
    pub workers_per_endpoint: Option<u32>,
    pub connect_timeout: Duration,
    /// To the first byte, and between bytes.
    pub read_timeout: Duration,
    pub retries: u32,
    pub balance: Balance,
    pub queue: QueuePolicy,
    /// Over how long an endpoint that has just come gets its full part of the load; zero: at once.
    pub slow_start: Duration,
    pub lanes: Vec<LanePolicy>,
    /// A static file that the active set's root lacks is looked for in those of the other sets.
    pub assets_fallback: bool,
}

impl Policy {
    /// Whether a request that must not run twice may be sent over a kept connection.
    pub fn may_risk(&self) -> bool {
        self.lease.is_some_and(|lease| lease.non_idempotent)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeasePolicy {
    /// Requests on one connection.
    pub requests: u32,
    pub age: Duration,
    pub idle: Duration,
    /// FPM does not end connections by itself, so that a request that must not run twice may have one.
    pub non_idempotent: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Balance {
    LeastBusy,
    RoundRobin,
    /// `hash:$remote_addr`
    HashAddress,
    /// `hash:$cookie_NAME`
    HashCookie(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePolicy {
    /// `None`: `max = "off"`, do not wait.
    pub max: Option<usize>,
    pub timeout: Duration,
}

/// `[upstream.NAME.lane.LANE]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LanePolicy {
    /// Empty for requests that name none.
    pub name: Arc<str>,
    /// Percent of the workers that are kept for it.
    pub reserve: u8,
    /// Who waits in the lane with the highest goes first.
    pub priority: u32,
    /// Percent of the workers that it may have at once.
    pub limit: u8,
}

impl Default for LanePolicy {
    fn default() -> Self {
        LanePolicy { name: Arc::from(""), reserve: 0, priority: 0, limit: 100 }
    }
}

/// `[upstream.NAME.set.SET]`.
#[derive(Clone, Debug, PartialEq)]
pub struct SetConfig {
    pub name: Arc<str>,
    /// Named in the file; empty where Kubernetes names them.
    pub endpoints: Vec<Address>,
    pub kubernetes: Option<ServicePort>,
    pub root: Option<PathBuf>,
    pub php_root: Option<String>,
    pub min_ready: usize,
    pub status_path: Option<String>,
    /// FPM's `pm.status_listen`: the status question goes there and takes no slot. An unspecified address stands for each endpoint's own.
    pub status_listen: Option<Address>,
    pub ping: Option<Ping>,
    pub preflight: Option<Preflight>,
}

/// The pods behind a port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServicePort {
    pub service: Arc<str>,
    pub port: Port,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Port {
    /// Its name in the Service and so in its EndpointSlices.
    Name(String),
    /// The pods' own number (the Service's targetPort).
    Number(u16),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Ping {
    pub path: String,
    pub every: Duration,
    pub fall: u32,
    pub rise: u32,
}

/// What a pod must answer well before its first user, so that its OPcache is warm.
#[derive(Clone, Debug, PartialEq)]
pub struct Preflight {
    pub path: String,
    /// Chooses the site, and is what PHP sees as HTTP_HOST; `None`: the default site.
    pub host: Option<String>,
    pub https: bool,
    /// Good answers in a row.
    pub requests: u32,
    /// Status codes from and to.
    pub expect: (u16, u16),
    /// Of one request, connecting included.
    pub timeout: Duration,
    /// Of all of them; time that it waits for a slot does not count.
    pub give_up: Duration,
}
