//! Drop means done: a guard that is held by what must finish, and the receipt that says what became of it.

use serde::Serialize;
use tokio::sync::watch;

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

/// What a drain or a swap did, one JSON object (DESIGN.md, section 6).
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
    pub completed: u64,
    /// Of those, sent once more to another endpoint.
    pub retried: u64,
    pub cut: Vec<CutRequest>,
    pub by: String,
    /// False while it is still going on (in `/status`).
    pub finished: bool,
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
