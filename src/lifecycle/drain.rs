//! Drop means done: a guard that is held by what must finish, a count of what is open, and the receipt that says what became of it.

use std::{
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::Duration,
};

use serde::Serialize;
use tokio::sync::{Notify, watch};

/// Held (inside an `Arc`) by everything that must end first. Its drop is the end.
#[derive(Debug)]
pub struct Guard(watch::Sender<()>);

/// Resolves when the guard has been dropped.
#[derive(Clone, Debug)]
pub struct Done(watch::Receiver<()>);

pub fn guard() -> (Guard, Done) {
    let (sender, receiver) = watch::channel(());
    (Guard(sender), Done(receiver))
}

impl Guard {
    pub fn done(&self) -> Done {
        Done(self.0.subscribe())
    }
}

impl Done {
    pub async fn wait(&mut self) {
        // The sender never sends: an error is its drop.
        while self.0.changed().await.is_ok() {}
    }

    pub fn is_done(&self) -> bool {
        self.0.has_changed().is_err()
    }
}

/// How many of something are open, for one who waits until there are none.
#[derive(Debug, Default)]
pub struct Open {
    count: AtomicUsize,
    none: Notify,
}

impl Open {
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    pub fn add(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
    }

    pub fn remove(&self) {
        if self.count.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.none.notify_waiters();
        }
    }

    /// Until there are none; those that come while it waits are waited for too.
    pub async fn none(&self) {
        loop {
            let none = self.none.notified();
            tokio::pin!(none);
            // Registered before the look, so that the last one is not missed.
            none.as_mut().enable();
            if self.count.load(Ordering::SeqCst) == 0 {
                return;
            }
            none.await;
        }
    }
}

/// How a request that a drain or a swap had to wait for has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It had its whole answer.
    Completed,
    /// Its client left before that.
    ClientLeft,
    /// PHP or the proxy failed it, and it was told so.
    Failed,
}

/// The ends of the requests that a drain or a swap waits for, each counted once, when it ends.
#[derive(Debug, Default)]
pub struct Tally {
    completed: AtomicU64,
    client_left: AtomicU64,
    failed: AtomicU64,
    retried: AtomicU64,
}

impl Tally {
    pub fn ended(&self, end: End) {
        let count = match end {
            End::Completed => &self.completed,
            End::ClientLeft => &self.client_left,
            End::Failed => &self.failed,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// One that has been counted as completed was sent once more to another endpoint.
    pub fn retried(&self) {
        self.retried.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds these counts to a receipt.
    pub fn add_to(&self, receipt: &mut Receipt) {
        let [completed, client_left, failed, retried] =
            [&self.completed, &self.client_left, &self.failed, &self.retried].map(|count| count.load(Ordering::Relaxed));
        receipt.in_flight += completed + client_left + failed;
        receipt.completed += completed;
        receipt.client_left += client_left;
        receipt.failed += failed;
        receipt.retried += retried;
    }
}

/// What a drain or a swap did, one JSON object (DESIGN.md, section 6): `in_flight = completed + client_left + failed + cut`.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct Receipt {
    pub kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// RFC 3339, UTC.
    pub started: String,
    pub seconds: f64,
    pub budget_seconds: f64,
    /// Requests in flight at the start, and for a drain those that still came.
    pub in_flight: u64,
    /// Had their whole answer; for a swap also those that went on elsewhere.
    pub completed: u64,
    /// Of the completed, sent once more to another endpoint.
    pub retried: u64,
    pub client_left: u64,
    /// Answered with an error, or broken off by PHP.
    pub failed: u64,
    pub cut: Vec<CutRequest>,
    pub by: String,
    /// False while it is still going on (in `/status`).
    pub finished: bool,
}

impl Receipt {
    /// Nothing has been counted yet.
    pub fn begun(kind: &'static str, by: String, started: String, budget: Duration) -> Self {
        Receipt {
            kind,
            upstream: None,
            from: None,
            to: None,
            started,
            seconds: 0.0,
            budget_seconds: budget.as_secs_f64(),
            in_flight: 0,
            completed: 0,
            retried: 0,
            client_left: 0,
            failed: 0,
            cut: Vec::new(),
            by,
            finished: false,
        }
    }
}

#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct CutRequest {
    pub id: String,
    pub method: String,
    /// Without its query string.
    pub path: String,
    pub age_seconds: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test(start_paused = true)]
    async fn none_waits_for_the_last_one() {
        let open = Arc::new(Open::default());
        open.none().await;
        open.add();
        open.add();
        let waiting = tokio::spawn({
            let open = open.clone();
            async move { open.none().await }
        });
        tokio::task::yield_now().await;
        open.remove();
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        open.remove();
        waiting.await.unwrap();
    }

    #[tokio::test]
    async fn done_is_the_drop_of_the_last_holder() {
        let (guard, mut done) = guard();
        let first = Arc::new(guard);
        let second = first.clone();
        drop(first);
        assert!(!done.is_done());
        drop(second);
        done.wait().await;
        assert!(done.is_done());
    }
}
