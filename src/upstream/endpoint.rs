//! One FPM pod: its slots, leases, counters and health. It outlives snapshots and is known by its address.
//!
//! A slot is a worker of the pod. It is taken before connect() and given back by our close(), or passes on with a kept
//! connection. `used` counts taken slots, `parked` those of them that idle in a lease; the rest is busy. Where several replicas of this proxy
//! share the pod, users' requests get its `share` of the workers and what it may borrow ([`super::shares`]).

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError, Weak, atomic::AtomicBool},
    time::Duration,
};

use tokio::sync::Notify;

use super::{
    admission::Queue,
    dispatch::now_ms,
    health::{Health, Preflight, Probe},
    lanes::Work,
    sync::{AtomicU32, AtomicU64, Mutex, MutexGuard, Ordering, update},
};
use crate::model::Address;

/// Capacity not told and not learned yet: nothing is parked, nothing queued.
const UNKNOWN: u32 = 0;
const WHOLE: u32 = u32::MAX;

#[derive(Debug)]
pub struct Endpoint {
    pub id: u64,
    pub address: Address,
    capacity: AtomicU32,
    used: AtomicU32,
    /// Of the capacity what this replica may use; `WHOLE` where it is alone.
    share: AtomicU32,
    borrowed: AtomicU32,
    /// What follows from the three: slots that requests may take at once.
    limit: AtomicU32,
    /// Kept connections are allowed: there are not more replicas than workers.
    leases: AtomicBool,
    /// When it became usable, in milliseconds.
    came_ms: AtomicU64,
    /// By worker; only that worker writes its own.
    parked: Box<[AtomicU32]>,
    disabled: AtomicBool,
    /// Its pod is terminating.
    leaving: AtomicBool,
    /// A mirror of `health` for the path of a request: 0 is usable, else not before this time.
    unusable_until_ms: AtomicU64,
    failures: AtomicU32,
    health: Mutex<Health>,
    /// An annotation tells the capacity: it is not learned.
    told_capacity: AtomicBool,
    /// The pod that has this address now, and how many had it.
    pod: Mutex<Option<Arc<str>>>,
    pods: AtomicU32,
    /// In preflight: a mirror of `health`.
    cold: AtomicBool,
    /// How its preflight stands, in words.
    preflight: Mutex<String>,
    /// What the last probe that failed has met.
    probe_problem: Mutex<String>,
    /// Why FPM's status cannot be asked; empty where it can or nobody does.
    status_problem: Mutex<String>,
    /// Probes that wait for the next slot that is given back, and how many.
    probes: Mutex<VecDeque<Arc<Notify>>>,
    probes_waiting: AtomicU32,
    /// Milliseconds of the last answer to a user: a ping is skipped while there are any.
    pub last_answer_ms: AtomicU64,
    /// Queues of further upstreams that name this address.
    shared_with: Mutex<Vec<Weak<Queue>>>,
    is_shared: AtomicBool,
}

impl Endpoint {
    pub fn new(id: u64, address: Address, workers: usize) -> Self {
        Endpoint {
            id,
            address,
            capacity: AtomicU32::new(UNKNOWN),
            used: AtomicU32::new(0),
            share: AtomicU32::new(WHOLE),
            borrowed: AtomicU32::new(0),
            limit: AtomicU32::new(WHOLE),
            leases: AtomicBool::new(true),
            came_ms: AtomicU64::new(now_ms()),
            parked: (0..workers).map(|_| AtomicU32::new(0)).collect(),
            disabled: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            unusable_until_ms: AtomicU64::new(0),
            failures: AtomicU32::new(0),
            health: Mutex::new(Health::default()),
            told_capacity: AtomicBool::new(false),
            pod: Mutex::default(),
            pods: AtomicU32::new(0),
            cold: AtomicBool::new(false),
            preflight: Mutex::default(),
            probe_problem: Mutex::default(),
            status_problem: Mutex::default(),
            probes_waiting: AtomicU32::new(0),
            probes: Mutex::default(),
            last_answer_ms: AtomicU64::new(0),
            shared_with: Mutex::new(Vec::new()),
            is_shared: AtomicBool::new(false),
        }
    }

    /// FPM's workers behind this address; `None`: not known.
    pub fn capacity(&self) -> Option<u32> {
        match self.capacity.load(Ordering::Relaxed) {
            UNKNOWN => None,
            n => Some(n),
        }
    }

    pub fn set_capacity(&self, capacity: Option<u32>) {
        self.capacity.store(capacity.unwrap_or(UNKNOWN), Ordering::SeqCst);
        self.limit_again();
    }

    /// On the control plane's thread, as everything that the limit follows from.
    fn limit_again(&self) {
        let limit = match self.capacity() {
            None => WHOLE,
            Some(capacity) => capacity.min(self.share().saturating_add(self.borrowed())),
        };
        self.limit.store(limit, Ordering::SeqCst);
    }

    /// Slots that requests may take at once; `None`: any number.
    pub fn limit(&self) -> Option<u32> {
        Some(self.limit.load(Ordering::Relaxed)).filter(|limit| *limit != WHOLE)
    }

    /// The workers that are this replica's; all, and more than there are, where it is alone.
    pub fn share(&self) -> u32 {
        self.share.load(Ordering::Relaxed)
    }

    pub fn is_shared_by_replicas(&self) -> bool {
        self.share() != WHOLE
    }

    /// `None`: all.
    pub fn set_share(&self, share: Option<u32>, leases: bool) {
        self.share.store(share.unwrap_or(WHOLE), Ordering::SeqCst);
        self.leases.store(leases, Ordering::SeqCst);
        if share.is_none() {
            self.borrowed.store(0, Ordering::SeqCst);
        }
        self.limit_again();
    }

    /// Workers of other replicas that it may use for the time being.
    pub fn borrowed(&self) -> u32 {
        self.borrowed.load(Ordering::Relaxed)
    }

    pub fn set_borrowed(&self, workers: u32) {
        self.borrowed.store(workers, Ordering::SeqCst);
        self.limit_again();
    }

    /// Whether a connection may be kept. Not one of a borrowed worker: its owner waits for that in FPM's backlog.
    pub fn may_lease(&self) -> bool {
        self.capacity().is_some()
            && self.leases.load(Ordering::Relaxed)
            && self.used() <= self.share()
            && !self.is_disabled()
            && !self.is_leaving()
    }

    /// By an annotation; `None`: no longer, so that it is unknown until it is learned.
    pub fn tell_capacity(&self, capacity: Option<u32>) {
        let was_told = self.told_capacity.swap(capacity.is_some(), Ordering::SeqCst);
        if capacity.is_some() || was_told {
            self.set_capacity(capacity);
        }
    }

    pub fn is_told_capacity(&self) -> bool {
        self.told_capacity.load(Ordering::Relaxed)
    }

    /// How many pods have had this address.
    pub fn pods(&self) -> u32 {
        self.pods.load(Ordering::Relaxed)
    }

    /// The pod that has this address. Where it is another than before, nothing that was known of that one counts: true. Its workers' slots stay
    /// taken until our requests there have ended.
    pub fn set_pod(&self, uid: &Arc<str>, fresh: Health) -> bool {
        let mut pod = self.pod.lock().unwrap_or_else(PoisonError::into_inner);
        let is_other = pod.as_ref().is_some_and(|before| before != uid);
        if pod.as_ref() != Some(uid) {
            *pod = Some(uid.clone());
        }
        if is_other {
            self.pods.fetch_add(1, Ordering::SeqCst);
            self.set_disabled(false);
            self.update_health(0, |health| *health = fresh);
            self.came(now_ms());
        }
        is_other
    }

    /// Slots taken: busy and parked.
    pub fn used(&self) -> u32 {
        self.used.load(Ordering::Relaxed)
    }

    pub fn parked(&self) -> u32 {
        self.parked.iter().map(|p| p.load(Ordering::Relaxed)).sum()
    }

    pub fn busy(&self) -> u32 {
        self.used().saturating_sub(self.parked())
    }

    pub fn has_free_slot(&self) -> bool {
        let limit = self.limit.load(Ordering::SeqCst);
        limit == WHOLE || self.used.load(Ordering::SeqCst) < limit
    }

    /// Slots that are free; `None`: any number.
    pub fn free_slots(&self) -> Option<u32> {
        self.limit().map(|limit| limit.saturating_sub(self.used()))
    }

    /// Takes one slot if one is free.
    pub fn try_take(self: &Arc<Self>, queue: &Arc<Queue>) -> Option<Slot> {
        self.take_below(self.limit.load(Ordering::SeqCst), queue)
    }

    /// The same for a probe, which asks also where this replica has no share.
    pub fn try_take_for_probe(self: &Arc<Self>, queue: &Arc<Queue>) -> Option<Slot> {
        self.take_below(self.capacity().unwrap_or(WHOLE), queue)
    }

    fn take_below(self: &Arc<Self>, limit: u32, queue: &Arc<Queue>) -> Option<Slot> {
        update(&self.used, |used| (limit == WHOLE || used < limit).then(|| used.saturating_add(1)))?;
        Some(Slot { work: None, endpoint: self.clone(), queue: queue.clone() })
    }

    /// From 0 to 1: how much of its part of the load it is to get, `slow_start` after it has come.
    pub fn warmth(&self, now_ms: u64, slow_start: Duration) -> f64 {
        let age = now_ms.saturating_sub(self.came_ms.load(Ordering::Relaxed));
        let whole = u64::try_from(slow_start.as_millis()).unwrap_or(u64::MAX);
        if age >= whole { 1.0 } else { age as f64 / whole as f64 }
    }

    /// It has just come.
    pub fn came(&self, now_ms: u64) {
        self.came_ms.store(now_ms, Ordering::Relaxed);
    }

    pub(super) fn count_parked(&self, worker: usize, up: bool) {
        if let Some(parked) = self.parked.get(worker) {
            if up {
                parked.fetch_add(1, Ordering::SeqCst);
            } else {
                parked.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// A worker other than `worker` that has a lease to this endpoint.
    pub(super) fn parked_elsewhere(&self, worker: usize) -> Option<usize> {
        self.parked.iter().enumerate().find(|(w, p)| *w != worker && p.load(Ordering::SeqCst) > 0).map(|(w, _)| w)
    }

    pub fn is_disabled(&self) -> bool {
        self.disabled.load(Ordering::Relaxed)
    }

    /// By an operator: no new requests until enabled again.
    pub fn set_disabled(&self, disabled: bool) {
        self.disabled.store(disabled, Ordering::SeqCst);
    }

    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Its pod is terminating: it finishes what it has, and is a last resort. True if that is news.
    pub fn set_leaving(&self, leaving: bool) -> bool {
        self.leaving.swap(leaving, Ordering::SeqCst) != leaving
    }

    /// On the path of a request.
    pub fn is_usable(&self, now_ms: u64) -> bool {
        !self.is_disabled() && !self.is_leaving() && self.unusable_until_ms.load(Ordering::Relaxed) <= now_ms
    }

    /// In preflight: no user's request goes there.
    pub fn is_cold(&self) -> bool {
        self.cold.load(Ordering::Relaxed)
    }

    /// A request may go there at all, usable or not.
    pub fn is_allowed(&self) -> bool {
        !self.is_disabled() && !self.is_cold()
    }

    /// How its preflight stands.
    pub fn set_preflight(&self, now_ms: u64, preflight: Preflight, why: String) {
        *self.preflight.lock().unwrap_or_else(PoisonError::into_inner) = why;
        self.update_health(now_ms, |health| health.preflight = preflight);
    }

    pub fn status_problem(&self) -> String {
        self.status_problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// True if that is news.
    pub(super) fn set_status_problem(&self, why: &str) -> bool {
        let mut known = self.status_problem.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = *known != why;
        if is_news {
            why.clone_into(&mut known);
        }
        is_news
    }

    /// Why it is not usable; empty where nothing is to be said.
    pub fn reason(&self, now_ms: u64) -> String {
        if self.is_disabled() {
            return "disabled by an operator".to_owned();
        }
        if self.is_leaving() {
            return "its pod is terminating".to_owned();
        }
        let health = self.health();
        let detail = self.preflight.lock().unwrap_or_else(PoisonError::into_inner);
        match health.reason(now_ms) {
            reason if matches!(health.probe, Probe::Down { .. }) && health.preflight == Preflight::Done => {
                // Where it has begun to answer there is none, until it has done so often enough.
                match self.probe_problem.lock().unwrap_or_else(PoisonError::into_inner).as_str() {
                    "" => format!("{reason}, and answers again"),
                    problem => format!("{reason}: {problem}"),
                }
            }
            reason if health.preflight != Preflight::Done && !detail.is_empty() => format!("{reason}: {detail}"),
            reason => reason.to_owned(),
        }
    }

    /// Why its probe has failed.
    pub fn set_probe_problem(&self, why: &str) {
        why.clone_into(&mut self.probe_problem.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn lock_health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn health(&self) -> Health {
        *self.lock_health()
    }

    /// Changes what is known of its health; true if it has become usable by that.
    pub fn update_health(&self, now_ms: u64, change: impl FnOnce(&mut Health)) -> bool {
        let mut health = self.lock_health();
        let before = health.is_usable(now_ms);
        change(&mut health);
        let after = health.is_usable(now_ms);
        let until = if after {
            0
        } else if health.ejected_until_ms > now_ms && health.probe == Probe::None && health.preflight == Preflight::Done {
            health.ejected_until_ms
        } else {
            u64::MAX
        };
        self.unusable_until_ms.store(until, Ordering::Relaxed);
        self.failures.store(health.failures, Ordering::Relaxed);
        self.cold.store(health.preflight == Preflight::Asking, Ordering::SeqCst);
        if after && !before {
            self.came(now_ms);
        }
        after && !before
    }

    /// An answer to a user came.
    pub fn answered(&self, now_ms: u64) {
        self.last_answer_ms.store(now_ms, Ordering::Relaxed);
        if self.failures.load(Ordering::Relaxed) != 0 {
            self.update_health(now_ms, Health::succeeded);
        }
    }

    /// Waiters of `queue` are woken by slots of this endpoint; several upstreams may name it.
    pub fn serve_queue(&self, queue: &Arc<Queue>) {
        let mut queues = self.shared_with.lock().unwrap_or_else(PoisonError::into_inner);
        queues.retain(|q| q.strong_count() > 0);
        if !queues.iter().any(|q| std::ptr::eq(q.as_ptr(), Arc::as_ptr(queue))) {
            queues.push(Arc::downgrade(queue));
        }
        self.is_shared.store(queues.len() > 1, Ordering::SeqCst);
    }

    /// A slot for a probe: a free one, else the next that is given back.
    pub(super) async fn take_for_probe(self: &Arc<Self>, queue: &Arc<Queue>) -> Slot {
        loop {
            if let Some(slot) = self.try_take_for_probe(queue) {
                return slot;
            }
            // Joined, then looked again, as a waiter of the queue does.
            let mut turn = ProbeTurn::join(self, queue);
            if let Some(slot) = self.try_take_for_probe(queue) {
                return slot;
            }
            turn.granted.notified().await;
            if let Some(slot) = self.try_take_for_probe(queue) {
                turn.taken = true;
                return slot;
            }
        }
    }

    fn lock_probes(&self) -> MutexGuard<'_, VecDeque<Arc<Notify>>> {
        self.probes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn release(&self, queue: &Queue) {
        self.used.fetch_sub(1, Ordering::SeqCst);
        self.offer(queue);
    }

    /// There is a slot: for a probe that waits, else for the queues.
    fn offer(&self, queue: &Queue) {
        if self.probes_waiting.load(Ordering::SeqCst) > 0
            && let Some(probe) = self.lock_probes().pop_front()
        {
            self.probes_waiting.fetch_sub(1, Ordering::SeqCst);
            probe.notify_one();
            return;
        }
        queue.wake_one();
        if self.is_shared.load(Ordering::Relaxed) {
            let queues = self.shared_with.lock().unwrap_or_else(PoisonError::into_inner).clone();
            for other in queues.iter().filter_map(Weak::upgrade) {
                if !std::ptr::eq(&*other, queue) {
                    other.wake_one();
                }
            }
        }
    }
}

/// A probe that waits. However it ends (a reload may abort it), a slot that was kept for it does not stay unoffered.
struct ProbeTurn<'a> {
    endpoint: &'a Endpoint,
    queue: &'a Queue,
    granted: Arc<Notify>,
    /// It has the slot that it was granted.
    taken: bool,
}

impl<'a> ProbeTurn<'a> {
    fn join(endpoint: &'a Endpoint, queue: &'a Queue) -> Self {
        let granted = Arc::new(Notify::new());
        endpoint.lock_probes().push_back(granted.clone());
        endpoint.probes_waiting.fetch_add(1, Ordering::SeqCst);
        ProbeTurn { endpoint, queue, granted, taken: false }
    }
}

impl Drop for ProbeTurn<'_> {
    fn drop(&mut self) {
        let mut waiting = self.endpoint.lock_probes();
        if let Some(at) = waiting.iter().position(|other| Arc::ptr_eq(other, &self.granted)) {
            waiting.remove(at);
            self.endpoint.probes_waiting.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        drop(waiting);
        // Granted, and not used: for the next one, if it is there still.
        if !self.taken && self.endpoint.used() < self.endpoint.capacity().unwrap_or(WHOLE) {
            self.endpoint.offer(self.queue);
        }
    }
}

/// One slot taken. Its drop gives it back and wakes whoever waits.
#[derive(Debug)]
pub struct Slot {
    /// The request that it is taken for; none in a lease or for a probe.
    pub work: Option<Work>,
    pub endpoint: Arc<Endpoint>,
    pub queue: Arc<Queue>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        // First: who is woken may be of the same lane.
        self.work = None;
        self.endpoint.release(&self.queue);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::{
        super::{admission::Arrival, lanes::Lanes},
        *,
    };

    fn endpoint(capacity: Option<u32>) -> (Arc<Endpoint>, Arc<Queue>) {
        let endpoint = Arc::new(Endpoint::new(1, "127.0.0.1:9000".parse().unwrap(), 1));
        endpoint.set_capacity(capacity);
        (endpoint, Arc::new(Queue::default()))
    }

    #[test]
    fn a_slot_is_taken_up_to_capacity_and_given_back_by_drop() {
        let (endpoint, queue) = endpoint(Some(2));
        let first = endpoint.try_take(&queue).unwrap();
        let _second = endpoint.try_take(&queue).unwrap();
        assert!(endpoint.try_take(&queue).is_none());
        drop(first);
        assert_eq!(endpoint.used(), 1);
        assert!(endpoint.try_take(&queue).is_some());
    }

    #[test]
    fn an_unknown_capacity_never_refuses() {
        let (endpoint, queue) = endpoint(None);
        let slots: Vec<_> = (0..100).map(|_| endpoint.try_take(&queue).unwrap()).collect();
        assert_eq!(endpoint.used(), 100);
        drop(slots);
        assert_eq!(endpoint.used(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_gets_the_next_slot_and_one_that_is_aborted_passes_it_to_the_queue() {
        let (endpoint, queue) = endpoint(Some(1));
        let taken = endpoint.try_take(&queue).unwrap();
        let lanes = Lanes::new(&[], &queue, None);
        let deadline = Instant::now() + Duration::from_secs(60);
        let waiter = queue.join(&lanes, 0, Arrival { worker: 0, max: 9, deadline }).unwrap();
        let mut aborted = Box::pin(endpoint.take_for_probe(&queue));
        let mut second = Box::pin(endpoint.take_for_probe(&queue));
        for probe in [&mut aborted, &mut second] {
            assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(probe.as_mut().poll(cx).is_pending())).await);
        }
        // The first is woken, and aborted before it runs: its turn goes to the second, that one's drop to the queue.
        drop(taken);
        drop(aborted);
        let slot = second.await;
        assert_eq!(endpoint.used(), 1);
        drop(slot);
        tokio::time::timeout(std::time::Duration::from_secs(1), waiter.told()).await.unwrap();

        let taken = endpoint.try_take(&queue).unwrap();
        waiter.again();
        let mut only = Box::pin(endpoint.take_for_probe(&queue));
        assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(only.as_mut().poll(cx).is_pending())).await);
        drop(taken);
        drop(only);
        tokio::time::timeout(std::time::Duration::from_secs(1), waiter.told()).await.unwrap();
    }

    #[test]
    fn ejection_is_seen_on_the_path_of_a_request_and_ends_by_itself() {
        let (endpoint, _) = endpoint(None);
        endpoint.update_health(0, |h| {
            h.failed(0);
            h.failed(0);
        });
        assert!(!endpoint.is_usable(500));
        assert!(endpoint.is_usable(1_000));
    }
}
