//! The queue of an upstream: first in, first out, bounded in number and time. It is the upstream's, not a set's or a pod's.
//!
//! A grant is a wake-up, not a slot: the waiter dispatches on the snapshot that is current then. So that no wake-up is lost a waiter joins
//! first and looks for a slot afterwards, while a slot is given back first and the queue looked at afterwards; both
//! with sequentially consistent atomics. A waiter that was woken and has left passes its wake-up on.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use tokio::sync::Notify;

#[derive(Debug, Default)]
pub struct Queue {
    /// Everybody between join and settle, woken or not: while it is above 0 a newcomer joins.
    waiting: AtomicUsize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    /// In order of arrival; those that are woken are still here until they settle.
    list: BTreeMap<u64, Arc<Entry>>,
}

#[derive(Debug)]
struct Entry {
    worker: usize,
    granted: AtomicBool,
    wake: Notify,
}

impl Entry {
    /// Under the queue's lock.
    fn grant(&self) {
        self.granted.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }
}

impl Queue {
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the last place, or says how many wait if that is `max` already.
    pub fn join(self: &Arc<Self>, worker: usize, max: usize) -> Result<Waiter, usize> {
        let mut inner = self.lock();
        if inner.list.len() >= max {
            return Err(inner.list.len());
        }
        let entry = Arc::new(Entry { worker, granted: AtomicBool::new(false), wake: Notify::new() });
        let place = inner.next;
        inner.next += 1;
        inner.list.insert(place, entry.clone());
        // Under the lock, so that nobody sees the entry without the count.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Ok(Waiter { queue: self.clone(), entry, place, settled: false })
    }

    /// Wakes the one who has waited longest and has not been woken.
    pub fn wake_one(&self) {
        if self.waiting() > 0
            && let Some(entry) = self.lock().list.values().find(|e| !e.granted.load(Ordering::Relaxed))
        {
            entry.grant();
        }
    }

    /// After a new snapshot, capacity or recovery.
    pub fn wake(&self, slots: usize) {
        for _ in 0..slots.min(self.waiting()) {
            self.wake_one();
        }
    }

    /// The worker of the one who would be woken next.
    pub fn next_worker(&self) -> Option<usize> {
        if self.waiting() == 0 {
            return None;
        }
        self.lock().list.values().find(|e| !e.granted.load(Ordering::Relaxed)).map(|e| e.worker)
    }
}

/// A place in the queue. Dropped unsettled, it passes on a wake-up that it had.
#[derive(Debug)]
pub struct Waiter {
    queue: Arc<Queue>,
    entry: Arc<Entry>,
    place: u64,
    settled: bool,
}

impl Waiter {
    /// Waits to be woken.
    pub async fn granted(&self) {
        self.entry.wake.notified().await;
    }

    /// A wake-up came to nothing: back to the same place, to be woken again.
    pub fn again(&self) {
        let _inner = self.queue.lock();
        self.entry.granted.store(false, Ordering::Relaxed);
    }

    /// There is a slot that this waiter may not have (its endpoint has failed it): the next behind it may.
    pub fn pass_on(&self) {
        let inner = self.queue.lock();
        let behind = inner.list.range((Bound::Excluded(self.place), Bound::Unbounded));
        if let Some((_, entry)) = behind.into_iter().find(|(_, e)| !e.granted.load(Ordering::Relaxed)) {
            entry.grant();
        }
    }

    /// Nobody came before who is still asleep.
    pub fn is_next(&self) -> bool {
        let inner = self.queue.lock();
        inner.list.range(..self.place).all(|(_, e)| e.granted.load(Ordering::Relaxed))
    }

    /// It has its slot: leaves the queue.
    pub fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let woken = {
            let mut inner = self.queue.lock();
            inner.list.remove(&self.place);
            self.queue.waiting.fetch_sub(1, Ordering::SeqCst);
            self.entry.granted.load(Ordering::Relaxed)
        };
        if woken && !self.settled {
            self.queue.wake_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_woken(waiter: &Waiter) -> bool {
        waiter.entry.granted.load(Ordering::Relaxed)
    }

    #[test]
    fn wakes_in_order_of_arrival() {
        let queue = Arc::new(Queue::default());
        let first = queue.join(0, 9).unwrap();
        let second = queue.join(1, 9).unwrap();
        assert!(first.is_next() && !second.is_next());
        queue.wake_one();
        assert!(is_woken(&first) && !is_woken(&second));
        assert!(second.is_next());
        assert_eq!(queue.next_worker(), Some(1));
    }

    #[test]
    fn a_woken_waiter_that_leaves_passes_its_wake_up_on() {
        let queue = Arc::new(Queue::default());
        let first = queue.join(0, 9).unwrap();
        let second = queue.join(0, 9).unwrap();
        queue.wake_one();
        drop(first);
        assert!(is_woken(&second));
        second.settle();
        assert_eq!(queue.waiting(), 0);
    }

    #[test]
    fn a_settled_waiter_keeps_its_wake_up() {
        let queue = Arc::new(Queue::default());
        let first = queue.join(0, 9).unwrap();
        let second = queue.join(0, 9).unwrap();
        queue.wake_one();
        first.settle();
        assert!(!is_woken(&second));
    }

    #[test]
    fn a_wake_up_that_came_to_nothing_keeps_its_place() {
        let queue = Arc::new(Queue::default());
        let first = queue.join(0, 9).unwrap();
        let second = queue.join(0, 9).unwrap();
        queue.wake(2);
        first.again();
        queue.wake_one();
        assert!(is_woken(&first) && is_woken(&second));
    }

    #[test]
    fn a_wake_up_passed_on_goes_to_the_next_behind_and_never_back() {
        let queue = Arc::new(Queue::default());
        let first = queue.join(0, 9).unwrap();
        let second = queue.join(0, 9).unwrap();
        second.pass_on();
        assert!(!is_woken(&first) && !is_woken(&second));
        first.pass_on();
        assert!(!is_woken(&first) && is_woken(&second));
    }

    #[test]
    fn is_bounded() {
        let queue = Arc::new(Queue::default());
        let _first = queue.join(0, 1).unwrap();
        assert_eq!(queue.join(0, 1).unwrap_err(), 1);
    }
}
