//! Lanes: how many of a set's workers the requests of a lane may have at once (`limit`), and how many are kept for them (`reserve`).
//!
//! Counted for one Activation: requests that still run on the set before a swap do not take room from those on the set after it. All counters are
//! atomics; who need not wait takes no lock here. A count that is read while another thread changes it may be off by one for that
//! moment: a reserve may be short by one request, a limit never is.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    admission::Queue,
    dispatch::now_ms,
    sync::{AtomicU32, AtomicU64, AtomicUsize, Ordering, update},
};
use crate::model::{clock, upstream::LanePolicy};

/// No capacity known: no limits.
const UNLIMITED: u32 = u32::MAX;

/// What a lane has used at once within this time stays free for it, up to its reserve; the rest is lent.
pub const LENT_AFTER: Duration = Duration::from_secs(60);

/// No request counts for more.
const LONGEST: Duration = Duration::from_secs(10);

/// The lanes of an upstream. The first is that of requests that name none.
#[derive(Debug)]
pub struct Lanes {
    lanes: Box<[Lane]>,
    /// Requests at work, of all lanes.
    total: Arc<AtomicU32>,
    /// Slots of the usable endpoints of the active set, as dispatch has seen them last.
    capacity: AtomicU32,
}

#[derive(Debug)]
pub struct Lane {
    pub policy: LanePolicy,
    counts: Arc<Counts>,
    /// The queue's, so that a newcomer sees whether anybody waits without its lock.
    waiting: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct Counts {
    busy: AtomicU32,
    /// The most that was busy at once: half a LENT_AFTER's number (32 bits), that of the half before (16) and of this one (16).
    recent: AtomicU64,
    finished: AtomicU64,
    /// Microseconds that the finished ones held their workers.
    spent_us: AtomicU64,
}

/// What a lane has done since it is there: to be compared with what it had done before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    pub finished: u64,
    pub spent_us: u64,
}

impl Lanes {
    /// The lanes of `policies`, with the counts that `before` has of them if that is of the same Activation.
    pub fn new(policies: &[LanePolicy], queue: &Queue, before: Option<&Lanes>) -> Arc<Lanes> {
        let lanes = std::iter::once(&LanePolicy::default())
            .chain(policies)
            .map(|policy| {
                let same = before.and_then(|b| b.lanes.iter().find(|lane| lane.policy.name == policy.name));
                let counts = same.map_or_else(Arc::default, |lane| lane.counts.clone());
                Lane { policy: policy.clone(), counts, waiting: queue.counter(&policy.name) }
            })
            .collect();
        let capacity = before.map_or(UNLIMITED, |b| b.capacity.load(Ordering::Relaxed));
        Arc::new(Lanes { lanes, total: before.map_or_else(Arc::default, |b| b.total.clone()), capacity: AtomicU32::new(capacity) })
    }

    /// Whether the configuration names none.
    pub fn is_plain(&self) -> bool {
        self.lanes.len() == 1
    }

    /// Those that the configuration names, and their places.
    pub fn named(&self) -> impl Iterator<Item = (usize, &Lane)> {
        self.lanes.iter().enumerate().skip(1)
    }

    /// The place of a lane; a name that is not there (a reload has removed it) counts as none.
    pub fn find(&self, name: Option<&str>) -> usize {
        name.and_then(|name| self.lanes.iter().position(|lane| &*lane.policy.name == name)).unwrap_or(0)
    }

    pub fn lane(&self, at: usize) -> &Lane {
        &self.lanes[at]
    }

    /// Told by each dispatch: slots of the usable endpoints; `None`: not known.
    pub fn tell_capacity(&self, slots: Option<u32>) {
        let slots = slots.unwrap_or(UNLIMITED);
        if self.capacity.load(Ordering::Relaxed) != slots {
            self.capacity.store(slots, Ordering::SeqCst);
        }
    }

    /// `None`: not known.
    pub fn capacity(&self) -> Option<u32> {
        Some(self.capacity.load(Ordering::Relaxed)).filter(|slots| *slots != UNLIMITED)
    }

    /// The workers that are a lane's own: its percentage rounded up, and of all reserves together at most all slots but one, so that the others
    /// are never left with nothing. Who stands first in the file has the first of it.
    pub fn reserve(&self, at: usize, slots: u32) -> u32 {
        if slots == UNLIMITED {
            return 0;
        }
        let mut left = slots.saturating_sub(1);
        let mut reserve = 0;
        for lane in &self.lanes[..=at] {
            reserve = share(slots, lane.policy.reserve, true).min(lane.limit(slots)).min(left);
            left -= reserve;
        }
        reserve
    }

    /// What of its reserve is not to be lent now.
    pub fn kept(&self, at: usize, slots: u32) -> u32 {
        let lane = &self.lanes[at];
        match self.reserve(at, slots) {
            0 => 0,
            reserve => reserve.min(lane.counts.recent(now_ms())).saturating_sub(lane.busy()),
        }
    }

    /// What the reserves of the other lanes leave to this one. Somebody runs, or may; when that ends whoever waits is looked at again.
    fn room(&self, at: usize, slots: u32) -> u32 {
        if slots == UNLIMITED {
            return UNLIMITED;
        }
        let others = (0..self.lanes.len()).filter(|other| *other != at);
        slots.saturating_sub(others.map(|other| self.kept(other, slots)).fold(0, u32::saturating_add)).max(1)
    }

    /// Whether a request of this lane may have a free slot. A look: `enter` decides.
    pub fn may_enter(&self, at: usize) -> bool {
        if self.is_plain() {
            return true;
        }
        let (slots, lane) = (self.capacity.load(Ordering::SeqCst), &self.lanes[at]);
        let busy = lane.busy();
        busy < lane.limit(slots) && (busy < self.reserve(at, slots) || self.total.load(Ordering::SeqCst) < self.room(at, slots))
    }

    /// One request more at work, if its lane has room. It has no slot by that yet.
    pub fn enter(self: &Arc<Self>, at: usize) -> Option<Work> {
        let work = || Work { began: clock::now(), lanes: self.clone(), lane: at, counted: true };
        if self.is_plain() {
            return Some(work());
        }
        let (slots, lane) = (self.capacity.load(Ordering::SeqCst), &self.lanes[at]);
        let limit = lane.limit(slots);
        let before = update(&lane.counts.busy, |busy| (busy < limit).then(|| busy + 1))?;
        // What is its own it has whatever the others do.
        let room = if before < self.reserve(at, slots) { u32::MAX } else { self.room(at, slots) };
        if update(&self.total, |total| (total < room).then(|| total.saturating_add(1))).is_none() {
            lane.counts.busy.fetch_sub(1, Ordering::SeqCst);
            return None;
        }
        if lane.policy.reserve > 0 {
            lane.counts.note(before + 1, now_ms());
        }
        Some(work())
    }

    /// A newcomer may not overtake those of its own lane, nor those of another one that could go.
    pub fn must_wait(&self, at: usize) -> bool {
        self.lanes
            .iter()
            .enumerate()
            .any(|(other, lane)| lane.waiting.load(Ordering::SeqCst) > 0 && (other == at || self.may_enter(other)))
    }
}

impl Lane {
    pub fn name(&self) -> &Arc<str> {
        &self.policy.name
    }

    pub fn busy(&self) -> u32 {
        self.counts.busy.load(Ordering::SeqCst)
    }

    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// The most workers at once: at least one, else its requests could never run.
    pub fn limit(&self, slots: u32) -> u32 {
        match self.policy.limit {
            100.. => UNLIMITED,
            _ if slots == UNLIMITED => UNLIMITED,
            percent => share(slots, percent, false).max(1),
        }
    }

    pub fn done(&self) -> Done {
        let counts = &self.counts;
        Done { finished: counts.finished.load(Ordering::Relaxed), spent_us: counts.spent_us.load(Ordering::Relaxed) }
    }
}

fn share(slots: u32, percent: u8, up: bool) -> u32 {
    let hundredths = u64::from(slots) * u64::from(percent);
    let whole = if up { hundredths.div_ceil(100) } else { hundredths / 100 };
    u32::try_from(whole).unwrap_or(UNLIMITED)
}

impl Counts {
    fn half(now_ms: u64) -> u64 {
        (now_ms / (LENT_AFTER.as_millis() as u64 / 2)) & 0xffff_ffff
    }

    /// The numbers of this half and the one before, as of now.
    fn halves(word: u64, now: u64) -> (u64, u64) {
        match now.wrapping_sub(word >> 32) {
            0 => (word >> 16 & 0xffff, word & 0xffff),
            1 => (word & 0xffff, 0),
            _ => (0, 0),
        }
    }

    fn note(&self, busy: u32, now_ms: u64) {
        let word = self.recent.load(Ordering::Relaxed);
        // Another worker's turn of the loop may have begun later.
        let now = Self::half(now_ms).max(word >> 32);
        let (before, most) = Self::halves(word, now);
        let most = most.max(u64::from(busy.min(0xffff)));
        let next = now << 32 | before << 16 | most;
        if next != word {
            // Lost where another thread notes at the same time: the next request notes again.
            let _ = self.recent.compare_exchange(word, next, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    fn recent(&self, now_ms: u64) -> u32 {
        let word = self.recent.load(Ordering::Relaxed);
        let (before, most) = Self::halves(word, Self::half(now_ms).max(word >> 32));
        u32::try_from(before.max(most)).unwrap_or(UNLIMITED)
    }
}

/// A request at work. Its drop gives back its place in the lane and counts the time that it held a worker.
#[derive(Debug)]
pub struct Work {
    began: Instant,
    lanes: Arc<Lanes>,
    lane: usize,
    counted: bool,
}

impl Work {
    /// Whether its time is counted: not as long as nothing has been sent.
    pub fn is_counted(&mut self, counted: bool) {
        self.counted = counted;
    }

    /// It has come to nothing: no time is counted.
    pub fn undone(mut self) {
        self.counted = false;
    }

    fn leave(&self) {
        if !self.lanes.is_plain() {
            self.lanes.lanes[self.lane].counts.busy.fetch_sub(1, Ordering::SeqCst);
            self.lanes.total.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if self.counted {
            let counts = &self.lanes.lanes[self.lane].counts;
            counts.finished.fetch_add(1, Ordering::Relaxed);
            // A stream that was open for hours says nothing about the next request.
            let spent =
                u64::try_from(clock::now().saturating_duration_since(self.began).min(LONGEST).as_micros()).unwrap_or(u64::MAX);
            counts.spent_us.fetch_add(spent, Ordering::Relaxed);
        }
        self.leave();
    }
}
