//! Whatever comes, leaves, dies or changes, in any order: no wake-up is lost, no slot is used twice, none is leaked. Two workers' dispatchers on one store,
//! each future polled only when it was woken, against a model that counts what it sees.

mod support;

use std::{
    collections::BTreeMap,
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use proptest::prelude::*;
use slackwater::{
    error::{Error, Kind},
    upstream::{Dispatcher, Endpoint, Store, Ticket, Upstream, Want, lanes::LENT_AFTER, store::Workers},
};
use support::snapshot;
use tokio::time::Instant;

const LANES: [&str; 3] = ["", "slow", "checkout"];
const LIMIT: [u32; 3] = [100, 50, 100];
const RESERVE: [u32; 3] = [0, 0, 25];
const PATIENCE: Duration = Duration::from_secs(4);

#[derive(Clone, Debug)]
enum Event {
    Arrive {
        worker: usize,
        lane: usize,
        deadline_ms: Option<u64>,
    },
    /// The nth that waits leaves.
    Leave(usize),
    /// The nth that runs ends.
    End(usize),
    Disable(usize),
    Enable(usize),
    /// By an annotation, or an HPA that has other pods.
    Resize(usize, u32),
    Pass(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..2_usize, 0..3_usize, prop::option::weighted(0.3, 1..3_000_u64))
            .prop_map(|(worker, lane, deadline_ms)| Event::Arrive { worker, lane, deadline_ms }),
        1 => (0..20_usize).prop_map(Event::Leave),
        5 => (0..20_usize).prop_map(Event::End),
        1 => (0..3_usize).prop_map(Event::Disable),
        2 => (0..3_usize).prop_map(Event::Enable),
        1 => (0..3_usize, 1..5_u32).prop_map(|(e, n)| Event::Resize(e, n)),
        3 => (1..1_500_u64).prop_map(Event::Pass),
    ]
}

#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct Waiting {
    lane: usize,
    deadline: Instant,
    woken: Arc<Flag>,
    future: Pin<Box<dyn Future<Output = Result<Ticket, Error>>>>,
}

struct World {
    store: Arc<Store>,
    workers: [Rc<Dispatcher>; 2],
    waiting: Vec<Waiting>,
    running: Vec<(usize, Ticket)>,
    /// When so many of the lane that has a reserve were at work at once.
    used_reserve: Vec<(Instant, u32)>,
    refused: BTreeMap<&'static str, usize>,
}

impl World {
    fn new() -> World {
        let toml = r#"
            [upstream.php]
            workers_per_endpoint = 2
            queue = { max = 6, timeout = "4s" }
            [upstream.php.lane.slow]
            limit = "50%"
            [upstream.php.lane.checkout]
            reserve = "25%"
            priority = 5
            [upstream.php.set.blue]
            endpoints = ["127.0.0.1:9000", "127.0.0.1:9001", "127.0.0.1:9002"]
            [[site]]
            php_root = "/app"
            upstream = "php"
        "#;
        let store = Arc::new(Store::new(snapshot::of(toml, 2)));
        let workers = [0, 1].map(|worker| Rc::new(Dispatcher::new(worker, store.clone(), Workers::new(Vec::new()))));
        World { store, workers, waiting: Vec::new(), running: Vec::new(), used_reserve: Vec::new(), refused: BTreeMap::new() }
    }

    fn upstream(&self) -> Arc<Upstream> {
        self.store.load().upstreams["php"].clone()
    }

    fn endpoint(&self, nth: usize) -> Arc<Endpoint> {
        self.upstream().active.endpoints[nth].clone()
    }

    fn busy(&self, lane: usize) -> u32 {
        u32::try_from(self.running.iter().filter(|(l, _)| *l == lane).count()).unwrap()
    }

    /// Where nobody is usable everybody is tried; a disabled one never.
    fn slots(&self) -> u32 {
        self.upstream().active.endpoints.iter().filter(|e| !e.is_disabled()).map(|e| e.capacity().unwrap()).sum()
    }

    fn reserve(&self, lane: usize) -> u32 {
        (self.slots() * RESERVE[lane]).div_ceil(100)
    }

    /// What the model would let a lane have more.
    fn has_room(&self, lane: usize) -> bool {
        let (slots, busy) = (self.slots(), self.busy(lane));
        let recent = self.used_reserve.iter().filter(|(at, _)| at.elapsed() < LENT_AFTER / 2).map(|(_, n)| *n).max().unwrap_or(0);
        let kept = if lane == 2 { 0 } else { self.reserve(2).min(recent).saturating_sub(self.busy(2)) };
        let total = u32::try_from(self.running.len()).unwrap();
        let limit = if LIMIT[lane] == 100 { u32::MAX } else { (slots * LIMIT[lane] / 100).max(1) };
        busy < limit && (busy < self.reserve(lane) || total < slots.saturating_sub(kept).max(1))
    }

    fn arrive(&mut self, worker: usize, lane: usize, deadline_ms: Option<u64>) {
        let dispatcher = self.workers[worker].clone();
        let since = Instant::now();
        let told = deadline_ms.map(|ms| since + Duration::from_millis(ms));
        let future = Box::pin(async move {
            let want = Want {
                upstream: "php",
                once: true,
                again: false,
                key: b"",
                tried: &[],
                refused: &[],
                since,
                deadline: told,
                lane: (lane > 0).then(|| LANES[lane]),
            };
            dispatcher.acquire(&want).await
        });
        let woken = Arc::new(Flag::default());
        let deadline = told.map_or(since + PATIENCE, |told| told.min(since + PATIENCE));
        self.waiting.push(Waiting { lane, deadline, woken, future });
        // It asks as soon as it is there, whatever else is still to happen.
        self.look(self.waiting.len() - 1);
    }

    /// Polls whoever was woken, until nobody is.
    fn settle(&mut self) {
        while let Some(at) = self.waiting.iter().position(|w| w.woken.0.swap(false, Ordering::SeqCst)) {
            self.look(at);
        }
    }

    /// Polls one of those who wait.
    fn look(&mut self, at: usize) {
        let one = &mut self.waiting[at];
        let waker = Waker::from(one.woken.clone());
        if let Poll::Ready(result) = one.future.as_mut().poll(&mut Context::from_waker(&waker)) {
            let Waiting { lane, deadline, future, .. } = self.waiting.remove(at);
            drop(future);
            match result {
                Ok(ticket) => {
                    let endpoint = ticket.endpoint();
                    assert!(Instant::now() < deadline, "begun after its deadline");
                    assert!(!endpoint.is_disabled(), "begun on one that is disabled");
                    assert!(endpoint.used() <= endpoint.capacity().unwrap(), "a slot that is not there");
                    assert!(self.has_room(lane), "lane {:?} has more than its part", LANES[lane]);
                    self.running.push((lane, ticket));
                    if lane == 2 {
                        self.used_reserve.push((Instant::now(), self.busy(2)));
                    }
                }
                Err(error) => {
                    let known = matches!(
                        error.kind,
                        Kind::QueueFull | Kind::QueueTimeout | Kind::QueueTooLong | Kind::DeadlinePassed | Kind::NoEndpoint
                    );
                    assert!(known, "{error}");
                    *self.refused.entry(error.kind.cause()).or_default() += 1;
                }
            }
        }
    }

    fn check(&self) {
        let upstream = self.upstream();
        for (nth, endpoint) in upstream.active.endpoints.iter().enumerate() {
            let held = self.running.iter().filter(|(_, ticket)| ticket.endpoint().id == endpoint.id).count();
            assert_eq!(endpoint.used() as usize, held, "slots of endpoint {nth}");
        }
        assert_eq!(upstream.queue.waiting(), self.waiting.len(), "places in the queue");
        assert!(self.waiting.len() <= 6, "more wait than may");
        for (_, lane) in upstream.lanes.named() {
            let at = LANES.iter().position(|name| *name == &**lane.name()).unwrap();
            assert_eq!(lane.busy(), self.busy(at), "lane {:?}", LANES[at]);
            assert_eq!(lane.waiting(), self.waiting.iter().filter(|w| w.lane == at).count(), "lane {:?}", LANES[at]);
        }
        let free = upstream.active.endpoints.iter().any(|e| !e.is_disabled() && e.has_free_slot());
        for one in &self.waiting {
            assert!(one.deadline > Instant::now(), "waits after its deadline");
            let lanes = &upstream.lanes;
            let name = (one.lane > 0).then(|| LANES[one.lane]);
            assert!(
                !(free && lanes.may_enter(lanes.find(name))),
                "a wake-up was lost: lane {:?} waits, and a slot is free",
                LANES[one.lane]
            );
        }
    }

    async fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive { worker, lane, deadline_ms } => self.arrive(worker, lane, deadline_ms),
            Event::Leave(nth) if !self.waiting.is_empty() => {
                let nth = nth % self.waiting.len();
                drop(self.waiting.remove(nth));
            }
            Event::End(nth) if !self.running.is_empty() => {
                let nth = nth % self.running.len();
                drop(self.running.remove(nth));
            }
            Event::Leave(_) | Event::End(_) => {}
            Event::Disable(nth) => self.endpoint(nth).set_disabled(true),
            Event::Enable(nth) => self.endpoint(nth).set_disabled(false),
            Event::Resize(nth, workers) => self.endpoint(nth).set_capacity(Some(workers)),
            Event::Pass(ms) => tokio::time::advance(Duration::from_millis(ms)).await,
        }
        // As the control plane does after each change.
        if matches!(event, Event::Disable(_) | Event::Enable(_) | Event::Resize(..)) {
            self.upstream().wake_for_free_slots();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_no_wake_up_is_lost_and_no_slot_is_leaked(events in prop::collection::vec((event(), prop::bool::weighted(0.7)), 1..150)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut world = World::new();
            for (event, settles) in events {
                world.happen(event).await;
                // Else the workers are busy with others: what was woken meets what happens next.
                if settles {
                    world.settle();
                    world.check();
                }
            }
            world.settle();
            world.check();
            while let Some((_, ticket)) = world.running.pop() {
                drop(ticket);
                world.settle();
                world.check();
            }
            world.waiting.clear();
            let upstream = world.upstream();
            assert_eq!(upstream.queue.waiting(), 0);
            assert!(upstream.active.endpoints.iter().all(|e| e.used() == 0));
            assert!(upstream.lanes.named().all(|(_, lane)| lane.busy() == 0 && lane.waiting() == 0));
        });
    }
}
