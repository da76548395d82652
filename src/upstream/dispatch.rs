//! From "this request is for upstream X" to a slot of one endpoint, in one synchronous step on the current snapshot.
//!
//! The order: a parked lease of this worker, a free slot, a parked lease of another worker (closed for us), the queue.
//! A request that need not wait takes no lock that workers share.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::{
    admission::{Arrival, Next, Refused, Waiter, Wake},
    balance::{self, Load},
    endpoint::{Endpoint, Slot},
    snapshot::{Hold, Set, Upstream},
    store::{Store, Task, Workers},
};
use crate::{
    error::{Error, Kind},
    fastcgi::{
        exchange::Conn,
        pool::{Pool, Terms},
        reaper::Reaper,
    },
    lifecycle::drain::End,
    model::{
        clock,
        upstream::{Balance, LeasePolicy},
    },
};

/// Expired leases are closed at most so often.
const SWEEP_RESOLUTION: Duration = Duration::from_millis(5);

/// Milliseconds since the process began to ask: the clock of health.
pub fn now_ms() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = *START.get_or_init(Instant::now);
    u64::try_from(clock::now().saturating_duration_since(start).as_millis()).unwrap_or(u64::MAX)
}

/// What a request wants of dispatch.
pub struct Want<'a> {
    pub upstream: &'a str,
    /// Must not be lost or run twice: a kept connection will not do, since FPM may be ending behind it (see `lease_of`), unless the lease says otherwise.
    pub once: bool,
    /// It has failed once, perhaps on a kept connection: not another one.
    pub again: bool,
    /// For `balance = "hash:..."`.
    pub key: &'a [u8],
    /// Endpoints that have failed this request already: others are tried before them.
    pub tried: &'a [u64],
    /// Endpoints that did not take a connection for this request: not tried again.
    pub refused: &'a [u64],
    /// When the request began to want a slot: `queue.timeout` counts from here, retries included.
    pub since: Instant,
    /// Until when anybody waits for its answer, where that is known (X-Request-Timeout).
    pub deadline: Option<Instant>,
    pub lane: Option<&'a str>,
}

/// A dispatched request: its slot, and through its upstream the Activation that it holds.
#[derive(Debug)]
pub struct Ticket {
    /// A kept connection, where there was one. Before the slot: closed first, given back then.
    pub conn: Option<Conn>,
    pub slot: Slot,
    pub set: Arc<Set>,
    pub upstream: Hold,
    pub waited: Duration,
}

impl Ticket {
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.slot.endpoint
    }

    /// How it counts if it is dropped now: as a client that has left before anything was sent for it, or as a failure that took its time.
    pub fn is_begun(&mut self, begun: bool) {
        self.upstream.end(if begun { End::Failed } else { End::ClientLeft });
        if let Some(work) = &mut self.slot.work {
            work.is_counted(begun);
        }
    }
}

enum NoTicket {
    NoUpstream,
    /// Every usable endpoint is full, or others wait already.
    Full(Arc<Upstream>),
    /// There is no endpoint that this request may try.
    NoEndpoint(Arc<Upstream>),
}

/// The way to upstreams of one worker.
pub struct Dispatcher {
    pub worker: usize,
    pub store: Arc<Store>,
    pub reaper: Reaper,
    workers: Workers,
    pool: RefCell<Pool<Slot>>,
    parked: Notify,
    turn: Cell<usize>,
}

impl Dispatcher {
    pub fn new(worker: usize, store: Arc<Store>, workers: Workers) -> Self {
        Dispatcher {
            worker,
            store,
            workers,
            pool: RefCell::default(),
            reaper: Reaper::default(),
            parked: Notify::new(),
            turn: Cell::new(worker),
        }
    }

    /// A slot, after waiting in the queue if need be. The error says why there is none: 503.
    pub async fn acquire(&self, want: &Want<'_>) -> Result<Ticket, Error> {
        // Nothing is begun for somebody who does not wait any more.
        if want.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(late(want));
        }
        let (upstream, none) = match self.dispatch(want, true) {
            Ok(ticket) => return Ok(ticket),
            Err(NoTicket::NoUpstream) => {
                return Err(Error::new(Kind::NoUpstream, format!("upstream {} is not there", want.upstream)));
            }
            Err(NoTicket::Full(upstream)) => (upstream, false),
            Err(NoTicket::NoEndpoint(upstream)) => (upstream, true),
        };
        let came = Instant::now();
        let exhausted = |kind| {
            let what = if kind == Kind::NoEndpoint { "no usable endpoint" } else { "no worker is free for it" };
            Error::new(kind, format!("upstream {}{}: {what}", want.upstream, of_lane(want)))
        };
        let policy = upstream.policy.queue;
        let Some(max) = policy.max else { return Err(exhausted(if none { Kind::NoEndpoint } else { Kind::QueueFull })) };
        // Nobody comes back for a request that everybody has refused.
        if none && !want.refused.is_empty() {
            return Err(exhausted(Kind::NoEndpoint));
        }
        let (queue, timeout) = (upstream.queue.clone(), want.since + policy.timeout);
        let deadline = want.deadline.map_or(timeout, |deadline| deadline.min(timeout));
        let lane = upstream.lanes.find(want.lane);
        let name = upstream.lanes.lane(lane).name().clone();
        let refused = |kind, why: String| {
            let wait = queue.expected_wait(&name).unwrap_or_default();
            Error::new(kind, format!("upstream {}{}: {why}", want.upstream, of_lane(want))).retry_after(wait)
        };
        // Of one lane nobody has asked so far.
        upstream.tell_lanes(now_ms());
        let waiter = match queue.join(&upstream.lanes, lane, Arrival { worker: self.worker, max, deadline }) {
            Ok(waiter) => waiter,
            Err(Refused::Full { waiting }) => return Err(refused(Kind::QueueFull, format!("{waiting} requests wait already"))),
            Err(Refused::TooLate { wait }) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let why = format!("its turn would come after about {wait:.1?}, its deadline in {left:.1?}");
                return Err(refused(Kind::QueueTooLong, why));
            }
        };
        self.ask_for_leases(&upstream.active);
        let is_next = waiter.is_next();
        if !is_next {
            // Joined, then looked: whoever is at the head takes what became free in between.
            upstream.wake_for_free_slots();
        }
        // An Arc<Upstream> held while waiting would keep a set from draining.
        drop(upstream);

        if is_next && let Ok(ticket) = self.dispatch(want, false) {
            return Ok(self.settle(waiter, ticket, came));
        }
        // Pods come and go meanwhile.
        let expired = || match self.has_endpoint(want) {
            false => exhausted(Kind::NoEndpoint),
            true if deadline < timeout => late(want),
            true => refused(Kind::QueueTimeout, format!("no worker became free for it in {:?}", policy.timeout)),
        };
        let sleep = tokio::time::sleep_until(deadline);
        tokio::pin!(sleep);
        loop {
            let told = tokio::select! {
                biased;
                told = waiter.told() => told,
                () = &mut sleep => return Err(expired()),
            };
            match told {
                Wake::Granted => {}
                Wake::Evicted => return Err(refused(Kind::QueueFull, "newer requests have taken its place".to_owned())),
                Wake::TooLate => {
                    return Err(refused(Kind::QueueTooLong, "its turn would come after its deadline".to_owned()));
                }
                Wake::Impatient => {
                    let why = "it has waited for nearly as long as clients do before they leave".to_owned();
                    return Err(refused(Kind::QueueTooLong, why));
                }
            }
            // Woken late: nobody waits for it any more.
            if deadline <= Instant::now() {
                return Err(expired());
            }
            if let Ok(ticket) = self.dispatch(want, false) {
                return Ok(self.settle(waiter, ticket, came));
            }
            waiter.again();
            // A slot given back between the look and `again` woke nobody.
            match self.dispatch(want, false) {
                Ok(ticket) => return Ok(self.settle(waiter, ticket, came)),
                Err(NoTicket::NoEndpoint(_)) if !want.refused.is_empty() => {
                    waiter.pass_on();
                    return Err(exhausted(Kind::NoEndpoint));
                }
                // A wake-up that is kept by one who cannot use it stops everybody behind.
                Err(NoTicket::Full(upstream)) if upstream.has_free_slot() => waiter.pass_on(),
                // It may have been for one that is parked elsewhere.
                Err(NoTicket::Full(upstream)) => self.ask_for_leases(&upstream.active),
                Err(_) => {}
            }
        }
    }

    /// Whether there is one that it might have, busy or not.
    fn has_endpoint(&self, want: &Want<'_>) -> bool {
        let snapshot = self.store.load();
        let of = snapshot.upstreams.get(want.upstream).map(|upstream| &upstream.active.endpoints);
        of.is_some_and(|all| all.iter().any(|e| e.is_allowed() && !want.refused.contains(&e.id)))
    }

    fn settle(&self, waiter: Waiter, mut ticket: Ticket, came: Instant) -> Ticket {
        ticket.waited = came.elapsed();
        waiter.settle();
        // A wake-up may have come for another slot than the one taken.
        ticket.upstream.wake_for_free_slots();
        ticket
    }

    /// One look at the current snapshot.
    fn dispatch(&self, want: &Want<'_>, newcomer: bool) -> Result<Ticket, NoTicket> {
        let snapshot = self.store.load();
        let upstream = snapshot.upstreams.get(want.upstream).ok_or(NoTicket::NoUpstream)?;
        let set = &upstream.active;
        let now = now_ms();
        let allowed = |e: &Endpoint| e.is_allowed() && !want.refused.contains(&e.id);
        // Those that have failed this request only where there is nobody else: one worker that died says nothing about the pod's others.
        let fresh = !want.tried.is_empty() && set.endpoints.iter().any(|e| allowed(e) && !want.tried.contains(&e.id));
        let may_try = |e: &Endpoint| allowed(e) && !(fresh && want.tried.contains(&e.id));
        // Ejection never empties a set: where nobody is usable everybody is tried, and those that are leaving where nobody else is there.
        let staying = set.endpoints.iter().any(|e| may_try(e) && !e.is_leaving());
        let may_try = |e: &Endpoint| may_try(e) && !(staying && e.is_leaving());
        let all = !set.endpoints.iter().any(|e| may_try(e) && e.is_usable(now));
        if all && !set.endpoints.iter().any(|e| may_try(e)) {
            return Err(NoTicket::NoEndpoint(upstream.clone()));
        }
        let usable = |e: &Endpoint| may_try(e) && (all || e.is_usable(now));
        let lanes = &upstream.lanes;
        let lane = lanes.find(want.lane);
        if !lanes.is_plain() {
            upstream.tell_lanes(now);
        }
        if newcomer && upstream.queue.waiting() > 0 && lanes.must_wait(lane) {
            return Err(NoTicket::Full(upstream.clone()));
        }
        // Of one lane all have room.
        let work = match lanes.is_plain() {
            true => None,
            false => Some(lanes.enter(lane).ok_or_else(|| NoTicket::Full(upstream.clone()))?),
        };
        let turn = self.turn.get();
        self.turn.set(turn.wrapping_add(1));

        let load = |index: usize| match set.endpoints.get(index) {
            Some(e) => {
                let weight = balance::weight(e.limit(), e.warmth(now, upstream.policy.slow_start));
                Load { used: e.used(), weight, usable: usable(e), free: e.has_free_slot() }
            }
            None => Load { used: 0, weight: 1.0, usable: false, free: false },
        };
        let count = set.endpoints.len();
        let taken = match &upstream.policy.balance {
            Balance::LeastBusy => self
                .lease_of_any(set, want, upstream.policy.may_risk(), usable)
                .map(|found| move_to_least_busy(found, set, turn, load, upstream))
                .or_else(|| {
                    // Another worker may take the slot between the look and the taking.
                    (0..count).find_map(|_| self.slot_of(set, balance::least_busy(count, turn, load)?, want, upstream))
                }),
            Balance::RoundRobin => (0..count).find_map(|k| {
                let index = turn.wrapping_add(k) % count;
                load(index).usable.then(|| self.slot_of(set, index, want, upstream))?
            }),
            Balance::HashAddress | Balance::HashCookie(_) => set.ring.as_ref().and_then(|ring| {
                // The ring repeats itself, so that some part of it may be one endpoint's alone: then the others in their order.
                let order = ring.order(want.key).take(count * 4).chain(0..count);
                order.into_iter().filter(|i| load(*i).usable).find_map(|i| self.slot_of(set, i, want, upstream))
            }),
        };
        let Some((mut slot, conn)) = taken else {
            if let Some(work) = work {
                work.undone();
            }
            return Err(NoTicket::Full(upstream.clone()));
        };
        // Where nobody waits the time that it takes tells nothing.
        slot.work = work.or_else(|| slot.endpoint.limit().and_then(|_| lanes.enter(lane)));
        Ok(Ticket { slot, upstream: Hold::new(upstream.clone()), set: set.clone(), conn, waited: Duration::ZERO })
    }

    /// The warmest lease of this worker to an endpoint of the set.
    fn lease_of_any(
        &self,
        set: &Set,
        want: &Want<'_>,
        may_risk: bool,
        usable: impl Fn(&Endpoint) -> bool,
    ) -> Option<(Slot, Option<Conn>)> {
        let id = {
            let pool = self.pool.borrow();
            if pool.is_empty() {
                return None;
            }
            pool.warmest(|id| set.endpoint(id).is_some_and(|endpoint| usable(endpoint)))?
        };
        self.lease_of(id, want, may_risk)
    }

    /// `may_risk`: by `lease.non_idempotent`.
    fn lease_of(&self, endpoint: u64, want: &Want<'_>, may_risk: bool) -> Option<(Slot, Option<Conn>)> {
        let (conn, slot) = self.pool.borrow_mut().take(endpoint)?;
        slot.endpoint.count_parked(self.worker, false);
        // At `pm.max_requests` FPM ends a connection after END_REQUEST, and on a busy machine so late that no wait is long enough (seen:
        // 1 of 408 posts lost after 1 ms of quiet and a peek). So what must not be lost gets a new connection, on the same slot.
        let fit = match (want.again, want.once) {
            (true, _) => false,
            (false, true) => may_risk && conn.is_quiet(),
            (false, false) => conn.looks_quiet(),
        };
        Some((slot, fit.then_some(conn)))
    }

    /// A lease or a free slot of the endpoint at `index`.
    fn slot_of(&self, set: &Set, index: usize, want: &Want<'_>, upstream: &Upstream) -> Option<(Slot, Option<Conn>)> {
        let endpoint = set.endpoints.get(index)?;
        if upstream.policy.lease.is_some()
            && let Some(found) = self.lease_of(endpoint.id, want, upstream.policy.may_risk())
        {
            return Some(found);
        }
        endpoint.try_take(&upstream.queue).map(|slot| (slot, None))
    }

    /// Asks one other worker for each endpoint where it keeps a connection to close one.
    fn ask_for_leases(&self, set: &Set) {
        for endpoint in &set.endpoints {
            if let Some(worker) = endpoint.parked_elsewhere(self.worker) {
                // Lost where its channel is full: leases end by themselves within `lease.idle`.
                self.workers.try_post(worker, Task::Unpark(endpoint.id));
            }
        }
    }

    /// The request is over: the connection is kept if it may be and nobody waits for the slot, else both end here.
    pub fn finish(&self, ticket: Ticket, conn: Option<Conn>) {
        let Ticket { mut slot, upstream, .. } = ticket;
        upstream.end(End::Completed);
        // Before it is decided who is next: that may be one of the same lane.
        slot.work = None;
        let (Some(conn), Some(policy)) = (conn, &upstream.policy.lease) else { return };
        let endpoint = slot.endpoint.clone();
        let terms = terms(policy, endpoint.is_shared_by_replicas());
        if !endpoint.may_lease() || !Pool::<Slot>::fits(&conn, &terms, clock::now()) {
            return;
        }
        let queue = &upstream.queue;
        let next = queue.next_for(self.worker);
        // Somebody on another worker is next: the slot goes there, the connection cannot.
        if matches!(next, Next::Elsewhere) {
            return;
        }
        self.pool.borrow_mut().park(endpoint.id, conn, slot, &terms);
        endpoint.count_parked(self.worker, true);
        self.parked.notify_one();
        match next {
            // It finds the connection here.
            Next::Here(chosen) => chosen.wake(),
            // Somebody joined between the look and the parking.
            _ if queue.waiting() > 0 => {
                self.unpark(endpoint.id);
            }
            _ => {}
        }
    }

    /// Closes every lease to `endpoint`: it is about to go.
    pub fn unpark_all(&self, endpoint: u64) {
        while self.unpark(endpoint) {}
    }

    /// Closes the oldest lease to `endpoint`: somebody waits for its slot. False if there is none.
    pub fn unpark(&self, endpoint: u64) -> bool {
        let Some((conn, slot)) = self.pool.borrow_mut().take_oldest(endpoint) else { return false };
        slot.endpoint.count_parked(self.worker, false);
        drop(conn);
        drop(slot);
        true
    }

    /// Closes leases as they end. Runs as long as the worker does.
    pub async fn sweep(self: Rc<Self>) {
        loop {
            if self.pool.borrow().is_empty() {
                self.parked.notified().await;
            }
            let mut over = Vec::new();
            let next = self.pool.borrow_mut().sweep(Instant::now(), |conn, slot| over.push((conn, slot)));
            for (conn, slot) in over {
                slot.endpoint.count_parked(self.worker, false);
                drop(conn);
                drop(slot);
            }
            let earliest = Instant::now() + SWEEP_RESOLUTION;
            tokio::time::sleep_until(next.map_or(earliest, |n| n.max(earliest))).await;
        }
    }
}

/// A slot that comes without its connection may as well be another endpoint's: where every request needs a new connection, slots would
/// otherwise stay for ever where they are, and a new pod get none (seen: 7 s under posts). The lease that is given up for it closes.
fn move_to_least_busy(
    (slot, conn): (Slot, Option<Conn>),
    set: &Set,
    turn: usize,
    load: impl Fn(usize) -> Load,
    upstream: &Upstream,
) -> (Slot, Option<Conn>) {
    if conn.is_some() {
        return (slot, conn);
    }
    // As if it had been given back.
    let own = slot.endpoint.id;
    let without = |index: usize| match set.endpoints.get(index) {
        Some(e) if e.id == own => Load { used: load(index).used.saturating_sub(1), free: true, ..load(index) },
        _ => load(index),
    };
    let better = balance::least_busy(set.endpoints.len(), turn, without).and_then(|index| set.endpoints.get(index));
    match better.filter(|endpoint| endpoint.id != own).and_then(|endpoint| endpoint.try_take(&upstream.queue)) {
        Some(better) => (better, None),
        None => (slot, None),
    }
}

fn of_lane(want: &Want<'_>) -> String {
    want.lane.map_or_else(String::new, |lane| format!(", lane {lane}"))
}

fn late(want: &Want<'_>) -> Error {
    Error::new(Kind::DeadlinePassed, format!("upstream {}: the deadline of X-Request-Timeout has passed", want.upstream))
}

/// An idle connection holds a worker that another replica may want, and nobody here can know that.
const IDLE_AMONG_REPLICAS: Duration = Duration::from_millis(5);

fn terms(policy: &LeasePolicy, shared: bool) -> Terms {
    let idle = if shared { policy.idle.min(IDLE_AMONG_REPLICAS) } else { policy.idle };
    Terms { requests: policy.requests, age: policy.age, idle }
}
