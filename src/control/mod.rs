//! What the snapshot should be: the configuration, who chose which set, and the one task that turns changes into snapshots.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};

use crate::{
    lifecycle::{
        PhaseCell,
        drain::{Done, Open, Receipt, Tally},
    },
    telemetry::{access_log::civil, metrics::Metrics},
    upstream::{Store, dispatch::now_ms, store::Workers},
};

pub mod alarm;
pub mod api;
pub mod build;
pub mod client;
pub mod config;
pub mod expand;
pub mod kubernetes;
mod page;
pub mod reconcile;
pub mod renewal;
pub mod replicas;
pub mod sandbox;
pub mod slices;
pub mod state;
pub mod status;
pub mod switch;
pub mod systemd;
pub mod template;
pub mod terminate;
pub mod tickets;
pub mod tls;

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
    pub terminate: watch::Sender<terminate::Requested>,
    /// Milliseconds of each worker's last sign of life.
    pub heartbeats: Arc<[AtomicU64]>,
    /// Client connections, and how many there may be.
    pub connections: Arc<Open>,
    pub connections_max: AtomicUsize,
    /// The ends of requests from Draining on.
    pub drained: Arc<Tally>,
    /// Tells this process from others: random.
    pub instance: Arc<str>,
    /// How fresh what Kubernetes has told is.
    pub contacts: Arc<kubernetes::Contacts>,
    /// What the process may read and write; `None`: it is not sandboxed.
    pub sandbox: Option<sandbox::Folders>,
    pub told: Mutex<Told>,
    /// The receipt of the drain, once the process is about to end.
    pub left: watch::Sender<Option<Receipt>>,
    /// Who waits for it, and must be answered before the process ends.
    pub asking: Arc<Open>,
    /// Something has changed that whoever is looking wants to see at once.
    pub news: Notify,
}

/// What was said last.
#[derive(Default)]
pub struct Told {
    pub receipts: VecDeque<Receipt>,
    pub reload: Option<reconcile::ReloadOutcome>,
    /// When the file was last found good.
    pub reloaded: Option<SystemTime>,
    /// What is wrong with the files of certificates, which are read without being asked.
    pub certificates: Option<String>,
    pub warnings: Vec<String>,
    /// Upstreams whose annotation is not followed, and why.
    pub refused: BTreeMap<Arc<str>, String>,
    /// What of the cluster is not as the configuration has it, or is not answered.
    pub cluster: Vec<String>,
    /// What the annotation says, by upstream.
    pub annotated: BTreeMap<Arc<str>, Arc<str>>,
    /// Turns whose old set has not drained yet, by the Activation's serial.
    pub turning: BTreeMap<u64, Turning>,
    /// What keeps the state file from being written.
    pub unsaved: Option<String>,
    /// Which replica this is; `None` where nobody says.
    pub replicas: Option<replicas::Place>,
    /// Why the process is not ready yet.
    pub waiting_for: Vec<String>,
    /// `None`: nobody has asked it to end.
    pub leaving: Option<Leaving>,
}

/// The way out, as far as it has come.
#[derive(Clone, Debug)]
pub struct Leaving {
    pub by: String,
    pub since: Instant,
    /// When the next phase begins at the latest.
    pub next_phase: Option<Instant>,
}

/// A turn under way.
#[derive(Clone, Debug)]
pub struct Turning {
    pub upstream: Arc<str>,
    pub from: Arc<str>,
    pub to: Arc<str>,
    pub since: Instant,
    pub drained: Done,
}

impl Control {
    pub fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held by who waits for the end.
    pub fn waits(&self) -> Waits {
        self.asking.add();
        Waits(self.asking.clone())
    }

    pub fn add_receipt(&self, receipt: Receipt) {
        let mut told = self.told();
        if told.receipts.len() == RECEIPTS {
            told.receipts.pop_front();
        }
        told.receipts.push_back(receipt);
        drop(told);
        self.news.notify_one();
    }

    /// Workers that have given no sign of life for 5 s.
    pub fn hung_workers(&self) -> Vec<usize> {
        let now = now_ms();
        let late = |at: &AtomicU64| now.saturating_sub(at.load(Ordering::Relaxed)) > HEARTBEAT_LIMIT_MS;
        self.heartbeats.iter().enumerate().filter(|(_, at)| late(at)).map(|(worker, _)| worker).collect()
    }
}

pub struct Waits(Arc<Open>);

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.remove();
    }
}

/// RFC 3339 in UTC with milliseconds.
pub fn rfc3339(time: std::time::SystemTime) -> String {
    let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        since.subsec_millis()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn dates_are_right_on_leap_days_and_year_ends() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_798_761_599, "2026-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
