//! The queue of an upstream: who waits, who goes next, and who is told at once that it would wait in vain. It is the upstream's, not a set's or
//! a pod's; each lane has a row of its own in it.
//!
//! A row is first in, first out in ordinary times. Under lasting overload it goes newest first: whoever is served then is served in time, where first in, first
//! out would serve everybody just as they give up. That is adaptive LIFO (B. Maurer, "Fail at Scale", ACM Queue 13(8), 2015). The signs of overload are
//! CoDel's (RFC 8289) rather than a length: somebody has waited for [`LASTING`], and meanwhile the queue has not been served, has grown, or has been left. A
//! queue that is long and patient, such as that of a load test with a fixed number of connections, stays in order: newest first would starve the
//! oldest of them for ever. After a second without these signs it is ordinary again. Who cannot be reached before its deadline at the rate at which workers have become free is
//! shed: a newcomer in ordinary times, the oldest under overload; and then also who has waited for nearly as long as clients do before they leave.
//!
//! A grant is a wake-up, not a slot: the waiter dispatches on the snapshot that is current then. So that no wake-up is lost a waiter joins
//! first and looks for a slot afterwards, while a slot is given back first and the queue looked at afterwards; both
//! with sequentially consistent atomics. A waiter that was woken and has left passes its wake-up on.
//!
//! Bounded in number by `queue.max`, in time by each deadline, and in bytes by `buffer.total` and `buffer.disk`, where the bodies of those who
//! wait are counted.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

mod signs;

pub use signs::LASTING;
use signs::{Flow, LONG, Patience, Speed, Trouble};

use super::{
    lanes::Lanes,
    sync::{AtomicU8, AtomicU64, AtomicUsize, Mutex, MutexGuard, Ordering},
};

/// However long requests take.
const LASTING_AT_MOST: Duration = Duration::from_secs(5);

/// Of two that came within so long of each other the one goes first whose worker has the kept connection.
const SKEW: Duration = Duration::from_millis(10);

#[derive(Debug, Default)]
pub struct Queue {
    /// The upstream's, for the log.
    name: Arc<str>,
    /// Everybody between join and settle, woken or not: while it is above 0 a newcomer joins.
    waiting: AtomicUsize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The next place; places are in order of arrival.
    next: u64,
    /// Counts grants, so that rows of one priority take turns.
    turn: u64,
    /// Counts slots that became free: who has passed this one on is not asked for it again.
    round: u64,
    rows: Vec<Row>,
    lanes: Option<Arc<Lanes>>,
}

/// Those who wait in one lane.
#[derive(Debug)]
struct Row {
    lane: Arc<str>,
    /// Its members; read without the lock.
    counter: Arc<AtomicUsize>,
    /// In order of arrival; those that are woken are still here until they settle.
    members: BTreeMap<u64, Arc<Entry>>,
    lasting: Duration,
    flow: Flow,
    /// Since when it goes newest first.
    overloaded: Option<Instant>,
    trouble: Trouble,
    patience: Patience,
    served: u64,
    speed: Speed,
}

#[derive(Debug)]
struct Entry {
    worker: usize,
    arrived: Instant,
    deadline: Instant,
    state: AtomicU8,
    /// The round in which it has let the others go before it.
    passed: AtomicU64,
    wake: Notify,
}

const ASLEEP: u8 = 0;
const GRANTED: u8 = 1;
const EVICTED: u8 = 2;
const TOO_LATE: u8 = 3;
const IMPATIENT: u8 = 4;

impl Entry {
    fn is_asleep(&self) -> bool {
        self.state.load(Ordering::Relaxed) == ASLEEP
    }

    /// Under the queue's lock, by one who has taken it out of its row.
    fn tell(&self, state: u8) {
        self.state.store(state, Ordering::Relaxed);
        self.wake.notify_one();
    }
}

/// Who comes.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    pub worker: usize,
    /// `queue.max`.
    pub max: usize,
    pub deadline: Instant,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// So many wait already.
    Full { waiting: usize },
    /// Its turn would come after about so long, which is after its deadline.
    TooLate { wait: Duration },
}

/// What a waiter is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Look for a slot.
    Granted,
    /// Its place was needed for somebody who can still be served.
    Evicted,
    /// Its turn cannot come before its deadline.
    TooLate,
    /// It has waited for nearly as long as clients do.
    Impatient,
}

/// What a request that has ended does with its kept connection.
#[derive(Debug)]
pub enum Next {
    Nobody,
    /// The next one is of another worker, where the connection cannot go.
    Elsewhere,
    /// One of this worker, chosen already: to be woken when the connection is parked.
    Here(Chosen),
}

/// A waiter that is to be woken.
#[derive(Debug)]
pub struct Chosen(Arc<Entry>);

impl Chosen {
    pub fn wake(self) {
        self.0.wake.notify_one();
    }
}

/// Who is looked for.
#[derive(Clone, Copy, Debug)]
enum Whom {
    Anybody,
    /// Of those that came at nearly the same time one of this worker, which has the connection.
    RatherOf(usize),
    /// Who has not passed this round's slot on.
    NotPassed(u64),
}

impl Row {
    fn new(lane: Arc<str>) -> Self {
        Row {
            lane,
            counter: Arc::default(),
            members: BTreeMap::new(),
            lasting: LASTING,
            flow: Flow::default(),
            overloaded: None,
            trouble: Trouble::default(),
            patience: Patience::default(),
            served: 0,
            speed: Speed::default(),
        }
    }

    fn is_overloaded(&self) -> bool {
        self.overloaded.is_some()
    }

    /// Whether the signs of overload are there, or have gone. Where nobody is usable (`slots` 0) there is nothing to be in time for.
    fn look(&mut self, now: Instant, slots: u32, upstream: &str) {
        self.flow.turn(now);
        let oldest = self.members.values().next().map(|entry| now.saturating_duration_since(entry.arrived));
        match (self.overloaded, oldest) {
            (None, Some(oldest)) if slots > 0 && oldest >= self.lasting && self.flow.is_overload(slots) => {
                self.overloaded = Some(now);
                self.trouble.begins(now, upstream, &self.lane, self.members.len(), "newest first from now on");
            }
            (Some(_), None) => self.overloaded = None,
            (Some(since), _) if now.saturating_duration_since(since) >= self.flow.span && !self.flow.is_overload(slots) => {
                self.overloaded = None;
            }
            _ => {}
        }
        if self.overloaded.is_none() {
            self.trouble.may_end(now, upstream, &self.lane);
        }
    }

    fn count_shed(&mut self, now: Instant, upstream: &str) {
        self.trouble.begins(now, upstream, &self.lane, self.members.len(), "who cannot be served in time gets 503");
        self.trouble.shed += 1;
        self.trouble.last = Some(now);
    }

    /// Those who sleep, in the order in which they go.
    fn order(&self) -> impl Iterator<Item = (&u64, &Arc<Entry>)> {
        let (oldest, newest) =
            if self.is_overloaded() { (None, Some(self.members.iter().rev())) } else { (Some(self.members.iter()), None) };
        oldest.into_iter().flatten().chain(newest.into_iter().flatten()).filter(|(_, entry)| entry.is_asleep())
    }

    /// Who goes next.
    fn next(&self, whom: Whom) -> Option<&Arc<Entry>> {
        let has_passed = |entry: &Entry| matches!(whom, Whom::NotPassed(round) if entry.passed.load(Ordering::Relaxed) == round);
        let mut order = self.order().map(|(_, entry)| entry).filter(|entry| !has_passed(entry));
        let first = order.next()?;
        let Whom::RatherOf(worker) = whom else { return Some(first) };
        if worker == first.worker {
            return Some(first);
        }
        let near = |entry: &&Arc<Entry>| {
            let (a, b) = (first.arrived, entry.arrived);
            a.saturating_duration_since(b).max(b.saturating_duration_since(a)) <= SKEW
        };
        Some(order.take_while(near).find(|entry| entry.worker == worker).unwrap_or(first))
    }

    fn insert(&mut self, place: u64, entry: Arc<Entry>) {
        self.flow.now.arrived += 1;
        self.members.insert(place, entry);
        self.counter.fetch_add(1, Ordering::SeqCst);
    }

    fn remove(&mut self, place: u64) -> Option<Arc<Entry>> {
        let entry = self.members.remove(&place)?;
        self.counter.fetch_sub(1, Ordering::SeqCst);
        Some(entry)
    }

    /// After how long the one with `ahead` others before it gets a slot; `None`: not known.
    fn wait(&mut self, ahead: usize, now: Instant, lanes: &Lanes) -> Option<Duration> {
        let lane = lanes.lane(lanes.find(Some(&self.lane)));
        // Where nobody is usable it is not known when somebody will be.
        let all = lanes.capacity().filter(|slots| *slots > 0)?;
        let slots = f64::from(lane.limit(all).min(all));
        let time = self.speed.service_time(now, lane.done())?;
        self.lasting = (time * 2).clamp(LASTING, LASTING_AT_MOST);
        self.flow.span = time.mul_f64(4.0 / slots).clamp(LASTING, LONG);
        // Half of one is left of those that run.
        Some(time.mul_f64((ahead as f64 + 0.5) / slots))
    }
}

impl Inner {
    fn row(&mut self, lane: &Arc<str>) -> &mut Row {
        let at = self.rows.iter().position(|row| row.lane == *lane).unwrap_or_else(|| {
            self.rows.push(Row::new(lane.clone()));
            self.rows.len() - 1
        });
        &mut self.rows[at]
    }

    /// Rows of lanes that are gone end when they are empty.
    fn follow(&mut self, lanes: &Arc<Lanes>) {
        if self.lanes.as_ref().is_some_and(|known| Arc::ptr_eq(known, lanes)) {
            return;
        }
        self.lanes = Some(lanes.clone());
        self.rows.retain(|row| !row.members.is_empty() || Arc::strong_count(&row.counter) > 1);
    }

    /// The row whose turn it is: one whose reserve is lent, then by priority, then in turn. And who goes there.
    fn next(&self, whom: Whom) -> Option<(usize, &Arc<Entry>)> {
        let lanes = self.lanes.as_deref();
        let candidates = self.rows.iter().enumerate().filter_map(|(at, row)| {
            if row.members.is_empty() {
                return None;
            }
            let lane = lanes.map_or(0, |lanes| lanes.find(Some(&row.lane)));
            if lanes.is_some_and(|lanes| !lanes.may_enter(lane)) {
                return None;
            }
            let entry = row.next(whom)?;
            let rank = lanes.map(|lanes| {
                let reserve = lanes.reserve(lane, lanes.capacity().unwrap_or(0));
                let lane = lanes.lane(lane);
                (lane.busy() < reserve, lane.policy.priority)
            });
            Some(((rank, Reverse(row.served)), at, entry))
        });
        candidates.max_by_key(|(rank, at, _)| (*rank, Reverse(*at))).map(|(_, at, entry)| (at, entry))
    }

    /// Marks the next one as chosen; it is to be notified.
    fn choose(&mut self, whom: Whom) -> Option<Arc<Entry>> {
        let (at, entry) = self.next(whom)?;
        let entry = entry.clone();
        self.grant(at, &entry);
        Some(entry)
    }

    fn grant(&mut self, at: usize, entry: &Entry) {
        entry.state.store(GRANTED, Ordering::Relaxed);
        self.turn += 1;
        self.rows[at].served = self.turn;
    }

    /// Before it is decided who goes next.
    fn look(&mut self, now: Instant, upstream: &str) {
        let slots = self.lanes.as_ref().and_then(|lanes| lanes.capacity()).unwrap_or(0);
        for row in &mut self.rows {
            row.look(now, slots, upstream);
        }
    }

    fn waiting(&self) -> usize {
        self.rows.iter().map(|row| row.members.len()).sum()
    }
}

impl Queue {
    pub fn new(upstream: Arc<str>) -> Self {
        Queue { name: upstream, ..Queue::default() }
    }

    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many wait in a lane: kept by the queue, to be read without its lock.
    pub(super) fn counter(&self, lane: &Arc<str>) -> Arc<AtomicUsize> {
        self.lock().row(lane).counter.clone()
    }

    /// The lanes of the snapshot in force: who goes next depends on them.
    pub fn follow(&self, lanes: &Arc<Lanes>) {
        self.lock().follow(lanes);
    }

    /// So many slots are there for its lanes.
    pub(super) fn tell_capacity(&self, slots: Option<u32>) {
        if let Some(lanes) = &self.lock().lanes {
            lanes.tell_capacity(slots);
        }
    }

    /// Takes a place in the lane's row, or says why there is none. Under overload it may be that of the one who has waited longest.
    pub fn join(self: &Arc<Self>, lanes: &Arc<Lanes>, lane: usize, arrival: Arrival) -> Result<Waiter, Refused> {
        let Arrival { worker, max, deadline } = arrival;
        let now = Instant::now();
        let mut guard = self.lock();
        let inner = &mut *guard;
        // Later ones come with their snapshot: a worker may still have an older one in its hands.
        if inner.lanes.is_none() {
            inner.follow(lanes);
        }
        inner.look(now, &self.name);
        let (name, waiting, rows) = (lanes.lane(lane).name().clone(), inner.waiting(), inner.rows.len());
        let row = inner.row(&name);
        let overloaded = row.is_overloaded();
        let wait = row.wait(row.members.len(), now, lanes);
        if !overloaded && let Some(wait) = wait.filter(|wait| *wait > deadline.saturating_duration_since(now)) {
            row.count_shed(now, &self.name);
            return Err(Refused::TooLate { wait });
        }
        if waiting >= max {
            // Its own row's oldest, or one of a row that has more than its part.
            let own = row.members.len();
            let from = if own * rows <= max {
                (0..inner.rows.len())
                    .max_by_key(|at| inner.rows[*at].members.len())
                    .filter(|at| inner.rows[*at].members.len() > own)
            } else {
                None
            };
            let from = from.or_else(|| inner.rows.iter().position(|row| row.lane == name && overloaded));
            if !from.is_some_and(|at| self.evict(&mut inner.rows[at], now, EVICTED)) {
                inner.row(&name).count_shed(now, &self.name);
                return Err(Refused::Full { waiting });
            }
        }
        let entry = Arc::new(Entry {
            worker,
            arrived: now,
            deadline,
            state: AtomicU8::new(ASLEEP),
            passed: AtomicU64::new(u64::MAX),
            wake: Notify::new(),
        });
        let place = inner.next;
        inner.next += 1;
        inner.row(&name).insert(place, entry.clone());
        // Under the lock, so that nobody sees the entry without the count.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.shed(inner, now);
        drop(guard);
        Ok(Waiter { queue: self.clone(), lane: name, entry, place, settled: false })
    }

    /// The one who would go last is told that its turn does not come.
    fn evict(&self, row: &mut Row, now: Instant, state: u8) -> bool {
        let mut asleep = row.members.iter().filter(|(_, entry)| entry.is_asleep());
        let last = if row.is_overloaded() { asleep.next() } else { asleep.next_back() };
        let Some(place) = last.map(|(place, _)| *place) else { return false };
        if let Some(entry) = row.remove(place) {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            row.count_shed(now, &self.name);
            entry.tell(state);
        }
        true
    }

    /// Under overload: those who have fallen so far behind that their deadline comes first.
    fn shed(&self, inner: &mut Inner, now: Instant) {
        let Some(lanes) = inner.lanes.clone() else { return };
        for row in inner.rows.iter_mut().filter(|row| row.is_overloaded()) {
            // Where clients leave, whoever has waited for two fifths of that time gets an answer instead: it would hardly see the one that it waits for. Never
            // much earlier than a row takes to be overloaded, whatever some clients pretend.
            let longest = row.patience.known(now).map(|mean| mean.mul_f64(0.4).max(row.lasting.mul_f64(0.8)));
            while let Some(oldest) = row.members.values().find(|entry| entry.is_asleep()) {
                let left = oldest.deadline.saturating_duration_since(now);
                let waited = now.saturating_duration_since(oldest.arrived);
                let ahead = row.members.len() - 1;
                let why = match row.wait(ahead, now, &lanes) {
                    Some(wait) if wait > left => TOO_LATE,
                    _ if longest.is_some_and(|longest| waited >= longest) => IMPATIENT,
                    _ => break,
                };
                if !self.evict(row, now, why) {
                    break;
                }
            }
        }
    }

    /// Wakes the one whose turn it is.
    pub fn wake_one(&self) {
        if self.waiting() > 0 {
            let now = Instant::now();
            let mut inner = self.lock();
            inner.look(now, &self.name);
            inner.round += 1;
            let chosen = inner.choose(Whom::Anybody);
            self.shed(&mut inner, now);
            drop(inner);
            if let Some(entry) = chosen {
                entry.wake.notify_one();
            }
        }
    }

    /// After a new snapshot, capacity or recovery.
    pub fn wake(&self, slots: usize) {
        for _ in 0..slots.min(self.waiting()) {
            self.wake_one();
        }
    }

    /// Who is to have what `worker` has just done with.
    pub fn next_for(&self, worker: usize) -> Next {
        if self.waiting() == 0 {
            return Next::Nobody;
        }
        let mut inner = self.lock();
        inner.look(Instant::now(), &self.name);
        let Some((at, entry)) = inner.next(Whom::RatherOf(worker)) else { return Next::Nobody };
        if entry.worker != worker {
            return Next::Elsewhere;
        }
        let entry = entry.clone();
        inner.grant(at, &entry);
        Next::Here(Chosen(entry))
    }

    /// Whether any lane goes newest first, or has refused requests within the last seconds.
    pub fn is_overloaded(&self) -> bool {
        let mut inner = self.lock();
        // Who has left the queue empty has not looked.
        inner.look(Instant::now(), &self.name);
        inner.rows.iter().any(|row| row.trouble.since.is_some())
    }

    /// After how long a newcomer would have its turn, for Retry-After; `None`: not known.
    pub fn expected_wait(&self, lane: &Arc<str>) -> Option<Duration> {
        let mut inner = self.lock();
        let lanes = inner.lanes.clone()?;
        let row = inner.row(lane);
        row.wait(row.members.len(), Instant::now(), &lanes)
    }
}

/// A place in the queue. Dropped unsettled, it passes on a wake-up that it had.
#[derive(Debug)]
pub struct Waiter {
    queue: Arc<Queue>,
    lane: Arc<str>,
    entry: Arc<Entry>,
    place: u64,
    settled: bool,
}

impl Waiter {
    /// Waits to be told.
    pub async fn told(&self) -> Wake {
        loop {
            self.entry.wake.notified().await;
            // Told under the lock, before the notification.
            match self.entry.state.load(Ordering::Relaxed) {
                ASLEEP => {}
                GRANTED => return Wake::Granted,
                EVICTED => return Wake::Evicted,
                IMPATIENT => return Wake::Impatient,
                _ => return Wake::TooLate,
            }
        }
    }

    /// A wake-up came to nothing: back to the same place, to be woken again.
    pub fn again(&self) {
        let _inner = self.queue.lock();
        if self.entry.state.load(Ordering::Relaxed) == GRANTED {
            self.entry.state.store(ASLEEP, Ordering::Relaxed);
        }
    }

    /// There is a slot that this waiter may not have (its endpoint has failed it): the next one may.
    pub fn pass_on(&self) {
        let mut inner = self.queue.lock();
        let round = inner.round;
        self.entry.passed.store(round, Ordering::Relaxed);
        if let Some(entry) = inner.choose(Whom::NotPassed(round)) {
            entry.wake.notify_one();
        }
    }

    /// Nobody who sleeps would go before it.
    pub fn is_next(&self) -> bool {
        let inner = self.queue.lock();
        inner.next(Whom::Anybody).is_some_and(|(_, entry)| Arc::ptr_eq(entry, &self.entry))
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
            let row = inner.row(&self.lane);
            if row.remove(self.place).is_some() {
                self.queue.waiting.fetch_sub(1, Ordering::SeqCst);
                let now = Instant::now();
                if self.settled {
                    row.flow.now.served += 1;
                } else {
                    row.flow.now.left += 1;
                    let waited = now.saturating_duration_since(self.entry.arrived);
                    // Who leaves early says nothing about those who wait for longer.
                    if now < self.entry.deadline && waited >= row.lasting && row.flow.is_left() {
                        row.patience.left(now, waited);
                    }
                }
                if row.members.is_empty() {
                    row.overloaded = None;
                }
            }
            self.entry.state.load(Ordering::Relaxed) == GRANTED
        };
        if woken && !self.settled {
            self.queue.wake_one();
        }
    }
}

#[cfg(test)]
mod tests;
