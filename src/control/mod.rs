//! What the snapshot should be: the configuration, who chose which set, and the one task that turns changes into snapshots.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use tokio::sync::{mpsc, watch};

use crate::{
    http_spill_budgets::Budgets,
    lifecycle::{PhaseCell, drain::Receipt},
    telemetry::metrics::Metrics,
    upstream::{Store, dispatch::now_ms, store::Workers},
};

pub mod api;
pub mod build;
pub mod config;
pub mod expand;
pub mod reconcile;
pub mod status;
pub mod switch;
pub mod template;
pub mod terminate;

/// Receipts of the last swaps and drains, for `/status`.
const RECEIPTS: usize = 32;
/// A worker whose heartbeat is older fails `/livez`.
const HEARTBEAT_LIMIT_MS: u64 = 5_000;

/// What all of the control plane shares.
pub struct Control {
    pub store: Arc<Store>,
    pub phase: Arc<PhaseCell>,
    pub workers: Workers,
    pub metrics: Arc<Metrics>,
    pub changes: mpsc::Sender<reconcile::Change>,
    pub terminate: watch::Sender<terminate::Request>,
    pub heartbeats: Arc<[AtomicU64]>,
    pub connections: Box<dyn Fn() -> usize + Send + Sync>,
    told: Mutex<Told>,
}

/// What was said last, for `/status`.
#[derive(Default)]
struct Told {
    receipts: VecDeque<Receipt>,
    reload: Option<reconcile::ReloadOutcome>,
    warnings: Vec<String>,
    /// Why the process is not ready yet.
    waiting_for: Vec<String>,
    fails_health_since: Option<SystemTime>,
}
