//! Waiting without sleeping: a gate that requests wait at until the test opens it, and a deadline for everything a
//! test waits for, so that a failure is a message and not a hang.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

/// How long [`within`] and the `wait_*` methods of the fakes wait before they panic.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Closed when made. Clones are the same gate.
#[derive(Clone, Debug)]
pub struct Gate {
    permits: Arc<Semaphore>,
    reached: watch::Sender<usize>,
}

impl Gate {
    pub fn closed() -> Gate {
        Gate { permits: Arc::new(Semaphore::new(0)), reached: watch::Sender::new(0) }
    }

    /// Lets all pass, now and later.
    pub fn open(&self) {
        self.permits.close();
    }

    /// Lets `n` pass, now or later, in the order in which they came.
    pub fn let_pass(&self, n: usize) {
        self.permits.add_permits(n);
    }

    /// How many have come to the gate so far, whether they have passed or not.
    pub fn reached(&self) -> usize {
        *self.reached.borrow()
    }

    /// Until `n` in all have come to the gate. Panics after [`PATIENCE`].
    pub async fn wait_reached(&self, n: usize) {
        wait_for(&self.reached, &format!("{n} at the gate"), |count| *count >= n).await;
    }

    /// What a fake does at the gate.
    pub async fn pass(&self) {
        self.reached.send_modify(|count| *count += 1);
        if let Ok(permit) = self.permits.acquire().await {
            permit.forget();
        }
    }
}

/// The future's value, or a panic that says what was waited for in vain.
#[track_caller]
pub fn within<T>(deadline: Duration, what: &str, future: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        match tokio::time::timeout(deadline, future).await {
            Ok(value) => value,
            Err(_) => panic!("{caller}: waited {deadline:?} in vain for {what}"),
        }
    }
}

/// Until the watched value is as wanted. Panics after [`PATIENCE`].
pub async fn wait_for<T>(watched: &watch::Sender<T>, what: &str, wanted: impl FnMut(&T) -> bool) {
    let mut receiver = watched.subscribe();
    let waited = tokio::time::timeout(PATIENCE, receiver.wait_for(wanted)).await;
    match waited {
        Ok(seen) => drop(seen.expect("the sender is borrowed above")),
        Err(_) => panic!("waited {PATIENCE:?} in vain for {what}"),
    }
}

/// Asks again and again until it is as wanted: `Ok`. Panics after [`PATIENCE`] with the last `Err`, which says what it was instead. For what
/// can only be asked, not watched.
#[track_caller]
pub fn eventually<T>(what: &str, ask: impl AsyncFn() -> Result<T, String>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            match ask().await {
                Ok(found) => return found,
                Err(seen) => assert!(tokio::time::Instant::now() < deadline, "{caller}: not {what}: {seen}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
