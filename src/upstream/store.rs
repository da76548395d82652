//! The one ArcSwap: where both planes meet.

use std::{sync::Arc, time::Duration};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{mpsc, oneshot};

use super::{dispatch::now_ms, snapshot::Snapshot};

/// A barrier not passed within this time is an error that names the worker.
pub const BARRIER_TIMEOUT: Duration = Duration::from_secs(5);

/// What another thread may ask of a worker. Worker-local state is only ever touched on its own thread.
pub enum Task {
    /// Answered when reached: every dispatch begun before it is over.
    Barrier(oneshot::Sender<()>),
    /// Somebody waits for a slot of this endpoint: close the oldest lease to it.
    Unpark(u64),
    /// This endpoint is about to go: close every lease to it.
    UnparkAll(u64),
    /// What is in flight on this worker; of one Activation, or all.
    InFlight(Option<u64>, oneshot::Sender<Vec<InFlight>>),
    /// The phase has changed.
    Phase,
    /// Hand over what the access log still has here; answered when that is done.
    Flush(oneshot::Sender<()>),
    /// Cut what is in flight, and answer what that was.
    Cut(oneshot::Sender<Vec<InFlight>>),
}

/// A request in flight, as receipts tell it.
#[derive(Clone, Debug)]
pub struct InFlight {
    pub id: String,
    pub method: String,
    pub path: String,
    pub age: Duration,
}

/// Ways to speak to the workers.
#[derive(Clone, Debug)]
pub struct Workers {
    senders: Arc<[mpsc::Sender<Task>]>,
}

impl Workers {
    pub fn new(senders: Vec<mpsc::Sender<Task>>) -> Self {
        Workers { senders: senders.into() }
    }

    pub fn len(&self) -> usize {
        self.senders.len()
    }

    pub fn is_empty(&self) -> bool {
        self.senders.is_empty()
    }

    /// Without waiting; false where its channel is full. Only for what may be lost.
    pub fn try_post(&self, worker: usize, task: Task) -> bool {
        self.senders.get(worker).is_some_and(|s| s.try_send(task).is_ok())
    }

    /// Asks every worker and waits for all answers, at most BARRIER_TIMEOUT; the error names the workers that did not answer.
    pub async fn ask_all<T>(&self, make: impl Fn(oneshot::Sender<T>) -> Task) -> Result<Vec<T>, Vec<usize>> {
        let deadline = tokio::time::Instant::now() + BARRIER_TIMEOUT;
        let mut waiting = Vec::new();
        let mut late = Vec::new();
        for (worker, sender) in self.senders.iter().enumerate() {
            let (answer, receiver) = oneshot::channel();
            match tokio::time::timeout_at(deadline, sender.send(make(answer))).await {
                Ok(Ok(())) => waiting.push((worker, receiver)),
                _ => late.push(worker),
            }
        }
        let mut answers = Vec::new();
        for (worker, receiver) in waiting {
            match tokio::time::timeout_at(deadline, receiver).await {
                Ok(Ok(answer)) => answers.push(answer),
                _ => late.push(worker),
            }
        }
        if late.is_empty() { Ok(answers) } else { Err(late) }
    }

    /// Returns when no worker can still be dispatching on a snapshot that was replaced before the call.
    pub async fn barrier(&self) -> Result<(), Vec<usize>> {
        self.ask_all(Task::Barrier).await.map(|_| ())
    }
}

#[derive(Debug)]
pub struct Store {
    current: ArcSwap<Snapshot>,
}

impl Store {
    pub fn new(snapshot: Snapshot) -> Self {
        Store { current: ArcSwap::from_pointee(snapshot) }
    }

    /// For one synchronous step. Never held across an await: a set cannot drain while an old snapshot lives.
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.current.load()
    }

    /// For the control plane, which may keep it for longer than a step, never across a swap that must drain.
    pub fn load_full(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Puts `next` in force and wakes as many waiters of each upstream as it has free slots.
    pub fn swap(&self, next: Arc<Snapshot>) {
        self.current.store(next.clone());
        for upstream in next.upstreams.values() {
            upstream.queue.follow(&upstream.lanes);
            upstream.wake_for_free_slots();
        }
    }
}

impl super::snapshot::Upstream {
    /// After anything that may have made slots.
    pub fn wake_for_free_slots(&self) {
        if self.queue.waiting() == 0 {
            return;
        }
        let now = now_ms();
        self.tell_lanes(now);
        // Of those that nobody may use slots may be free for ever.
        let free = self
            .active
            .counted(now)
            .map(|e| e.free_slots().map_or(usize::MAX, |free| usize::try_from(free).unwrap_or(usize::MAX)))
            .fold(0, usize::saturating_add);
        self.queue.wake(free);
    }

    /// How many slots there are for the lanes to share: those of the usable endpoints, as dispatch takes them.
    pub fn tell_lanes(&self, now_ms: u64) {
        self.lanes.tell_capacity(self.active.share(now_ms));
    }

    pub fn has_free_slot(&self) -> bool {
        self.active.counted(now_ms()).any(|e| e.has_free_slot())
    }
}
