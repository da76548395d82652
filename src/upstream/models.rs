//! Slots, lanes and the queue under the model checker, which tries thousands of orders in which threads may meet. A wake-up that is lost is a thread that waits for
//! ever, which it reports. `cargo test --features shuttle model_` runs them.

use std::{sync::Arc, time::Duration};

use shuttle::{
    future::block_on,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};
use tokio::time::Instant;

use super::{
    admission::{Arrival, Queue, Wake},
    endpoint::{Endpoint, Slot},
    lanes::Lanes,
};
use crate::model::upstream::LanePolicy;

const TRIES: usize = 3_000;

struct Pool {
    endpoint: Arc<Endpoint>,
    queue: Arc<Queue>,
    lanes: Arc<Lanes>,
    at_work: AtomicU32,
    most: AtomicU32,
}

impl Pool {
    fn new(workers: u32, policies: &[LanePolicy]) -> Arc<Pool> {
        let endpoint = Arc::new(Endpoint::new(1, "127.0.0.1:9000".parse().unwrap(), 1));
        endpoint.set_capacity(Some(workers));
        let queue = Arc::new(Queue::default());
        let lanes = Lanes::new(policies, &queue, None);
        lanes.tell_capacity(Some(workers));
        Arc::new(Pool { endpoint, queue, lanes, at_work: AtomicU32::new(0), most: AtomicU32::new(0) })
    }

    fn take(&self, lane: usize) -> Option<Slot> {
        let work = self.lanes.enter(lane)?;
        match self.endpoint.try_take(&self.queue) {
            Some(mut slot) => {
                slot.work = Some(work);
                Some(slot)
            }
            None => {
                work.undone();
                None
            }
        }
    }

    /// As `Dispatcher::acquire` does it, without its clock.
    async fn acquire(&self, lane: usize) -> Slot {
        if !self.lanes.must_wait(lane)
            && let Some(slot) = self.take(lane)
        {
            return slot;
        }
        let deadline = Instant::now() + Duration::from_secs(3_600);
        let waiter = self.queue.join(&self.lanes, lane, Arrival { worker: lane, max: 99, deadline }).unwrap();
        if waiter.is_next() {
            if let Some(slot) = self.take(lane) {
                waiter.settle();
                return slot;
            }
        } else if self.endpoint.has_free_slot() {
            self.queue.wake_one();
        }
        loop {
            assert_eq!(waiter.told().await, Wake::Granted);
            if let Some(slot) = self.take(lane) {
                waiter.settle();
                return slot;
            }
            waiter.again();
            if let Some(slot) = self.take(lane) {
                waiter.settle();
                return slot;
            }
            if self.endpoint.has_free_slot() {
                waiter.pass_on();
            }
        }
    }

    fn work(&self, slot: Slot) {
        let at_work = self.at_work.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(at_work, Ordering::SeqCst);
        thread::yield_now();
        self.at_work.fetch_sub(1, Ordering::SeqCst);
        drop(slot);
    }

    fn is_idle(&self) {
        assert_eq!((self.endpoint.used(), self.queue.waiting()), (0, 0));
        assert!(self.lanes.named().all(|(_, lane)| lane.busy() == 0 && lane.waiting() == 0));
    }
}

fn run(pool: &Arc<Pool>, lanes: &'static [usize], times: usize) {
    let threads: Vec<_> = lanes
        .iter()
        .map(|lane| {
            let pool = pool.clone();
            thread::spawn(move || {
                for _ in 0..times {
                    let slot = block_on(pool.acquire(*lane));
                    pool.work(slot);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    pool.is_idle();
}

#[test]
fn model_nobody_waits_for_ever_and_no_worker_is_used_twice() {
    shuttle::check_random(
        || {
            let pool = Pool::new(1, &[]);
            run(&pool, &[0, 0, 0], 2);
            assert_eq!(pool.most.load(Ordering::SeqCst), 1);
        },
        TRIES,
    );
}

#[test]
fn model_two_workers_and_preemption_at_the_worst_places() {
    shuttle::check_pct(
        || {
            let pool = Pool::new(2, &[]);
            run(&pool, &[0, 0, 0], 1);
            assert!(pool.most.load(Ordering::SeqCst) <= 2);
        },
        TRIES,
        3,
    );
}

#[test]
fn model_lanes_with_limit_and_reserve() {
    let lane = |name: &str, reserve, limit| LanePolicy { name: name.into(), reserve, priority: 0, limit };
    shuttle::check_random(
        move || {
            let pool = Pool::new(2, &[lane("slow", 0, 50), lane("checkout", 50, 100)]);
            run(&pool, &[0, 1, 1, 2], 1);
            assert!(pool.most.load(Ordering::SeqCst) <= 2);
        },
        TRIES,
    );
}

/// One that was woken and leaves at that moment passes its wake-up on.
#[test]
fn model_who_leaves_takes_no_wake_up_away() {
    shuttle::check_random(
        || {
            let pool = Pool::new(1, &[]);
            let first = pool.take(0).unwrap();
            let leaver = {
                let pool = pool.clone();
                thread::spawn(move || {
                    let deadline = Instant::now() + Duration::from_secs(3_600);
                    let waiter = pool.queue.join(&pool.lanes, 0, Arrival { worker: 0, max: 99, deadline }).unwrap();
                    thread::yield_now();
                    drop(waiter);
                })
            };
            let stayer = {
                let pool = pool.clone();
                thread::spawn(move || {
                    let slot = block_on(pool.acquire(0));
                    pool.work(slot);
                })
            };
            pool.work(first);
            leaver.join().unwrap();
            stayer.join().unwrap();
            pool.is_idle();
        },
        TRIES,
    );
}

/// A pool that grows while somebody waits, as `reconcile` tells it.
#[test]
fn model_a_new_worker_is_used_by_who_waits() {
    shuttle::check_random(
        || {
            let pool = Pool::new(1, &[]);
            let first = pool.take(0).unwrap();
            let waits = {
                let pool = pool.clone();
                thread::spawn(move || {
                    let slot = block_on(pool.acquire(0));
                    pool.work(slot);
                })
            };
            pool.endpoint.set_capacity(Some(2));
            pool.queue.wake(1);
            waits.join().unwrap();
            drop(first);
            pool.is_idle();
        },
        TRIES,
    );
}
