//! A snapshot put in force, and the sets that it leaves followed until they have drained.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{sync::oneshot, time::Instant};

use super::{Reconciler, all_endpoints, cluster::ANNOTATION};
use crate::{
    control::{Turning, rfc3339},
    lifecycle::{
        Phase,
        drain::{Receipt, Tally},
    },
    upstream::{Activation, Endpoint, Snapshot},
};

/// A turn under way.
pub struct Turn {
    /// When no request is dispatched to the old set any more; the error names workers that have not answered.
    pub barrier: oneshot::Receiver<Result<(), Vec<usize>>>,
    pub receipt: oneshot::Receiver<Receipt>,
    pub old_serial: u64,
}

impl Reconciler {
    /// The swap itself; every set that is not active any more is followed until it has drained.
    pub(super) fn put_in_force(&mut self, next: Snapshot, by: &str, budget: Duration) -> Vec<Turn> {
        let previous = self.control.store.load_full();
        let there: BTreeSet<u64> = all_endpoints(&next).map(|e| e.id).collect();
        self.dropped.retain(|e| e.strong_count() > 0);
        let gone: Vec<Arc<Endpoint>> = all_endpoints(&previous).filter(|e| !there.contains(&e.id)).cloned().collect();
        let mut left = Vec::new();
        for (name, old) in &previous.upstreams {
            if let Some(new) = next.upstreams.get(name)
                && !Arc::ptr_eq(&new.activation, &old.activation)
            {
                left.push((name.clone(), old.activation.clone(), new.active.name().clone()));
            }
        }
        drop(previous);
        // Before the swap: who ends between it and the barrier belongs to the turn too.
        let tallies: Vec<_> = left.iter().map(|(_, old, _)| old.leave()).collect();
        self.control.store.swap(Arc::new(next));
        for endpoint in gone {
            self.dropped.push(Arc::downgrade(&endpoint));
            self.close_leases(&endpoint);
        }
        // Nobody has been served yet: there is nothing to drain, and no swap to tell of.
        if by == ANNOTATION && self.control.phase.get() == Phase::Starting {
            return Vec::new();
        }
        left.into_iter()
            .zip(tallies)
            .map(|((name, old, to), tally)| self.follow(name, &old, tally, to, by.to_owned(), budget))
            .collect()
    }

    /// Watches an old set drain, in a task of its own.
    fn follow(&self, upstream: Arc<str>, old: &Activation, tally: Arc<Tally>, to: Arc<str>, by: String, budget: Duration) -> Turn {
        let (barrier_sender, barrier) = oneshot::channel();
        let (receipt_sender, receipt) = oneshot::channel();
        let (serial, from, mut drained) = (old.serial, old.set.clone(), old.drained());
        let (control, started, clock) = (self.control.clone(), SystemTime::now(), Instant::now());
        let turning =
            Turning { upstream: upstream.clone(), from: from.clone(), to: to.clone(), since: clock, drained: drained.clone() };
        control.told().turning.insert(serial, turning);
        control.news.notify_one();
        tokio::task::spawn_local(async move {
            let passed = control.workers.barrier().await;
            if let Err(workers) = &passed {
                tracing::error!(?workers, upstream = &*upstream, "workers have not passed the barrier in 5 s; the swap stands");
            }
            let is_confirmed = passed.is_ok();
            let _ = barrier_sender.send(passed);
            drained.wait().await;
            let mut receipt = Receipt {
                upstream: Some(upstream.to_string()),
                from: Some(from.to_string()),
                to: Some(to.to_string()),
                seconds: clock.elapsed().as_secs_f64(),
                finished: true,
                ..Receipt::begun("swap", by, rfc3339(started), budget)
            };
            tally.add_to(&mut receipt);
            let json = serde_json::to_string(&receipt).unwrap_or_default();
            if is_confirmed {
                tracing::info!(receipt = %json, "the old set has drained");
            } else {
                tracing::warn!(receipt = %json, "the old set has drained, as far as is known: not all workers have confirmed the swap");
            }
            control.add_receipt(receipt.clone());
            control.told().turning.remove(&serial);
            let _ = receipt_sender.send(receipt);
        });
        Turn { barrier, receipt, old_serial: serial }
    }
}
