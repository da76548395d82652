//! What is known of those who wait in a row: how long requests take, whether more come than are served, how long clients wait before they leave. Pure, but for
//! the log lines that say when trouble begins and ends.

use std::time::Duration;

use tokio::time::Instant;

use super::super::lanes::Done;

/// A wait of so long, or of two service times where that is longer, is a sign of overload.
pub const LASTING: Duration = Duration::from_secs(1);
/// Finished requests before their time is evidence, and clients that have left before theirs is.
const ENOUGH: u64 = 8;
/// Service times are means over at least so long, and at most twice that.
pub(super) const LONG: Duration = Duration::from_secs(10);
const RECENT: Duration = Duration::from_secs(1);

/// How long requests hold a worker, in the mean.
#[derive(Debug, Default)]
pub(super) struct Speed {
    long: Window,
    recent: Window,
}

#[derive(Debug, Default)]
struct Window {
    turned: Option<Instant>,
    before: Done,
    at_turn: Done,
}

impl Window {
    fn mean(&mut self, now: Instant, span: Duration, done: Done) -> (u64, Duration) {
        match self.turned {
            Some(turned) if now.saturating_duration_since(turned) < span => {}
            Some(_) => (self.turned, self.before, self.at_turn) = (Some(now), self.at_turn, done),
            None => self.turned = Some(now),
        }
        // A new set begins to count anew.
        let (Some(finished), Some(spent)) =
            (done.finished.checked_sub(self.before.finished), done.spent_us.checked_sub(self.before.spent_us))
        else {
            *self = Window::default();
            return (0, Duration::ZERO);
        };
        (finished, Duration::from_micros(spent / finished.max(1)))
    }
}

impl Speed {
    /// The lower of a long and a short mean: what is slow while a pool warms up, or once, is not taken for what will be.
    pub(super) fn service_time(&mut self, now: Instant, done: Done) -> Option<Duration> {
        let (finished, long) = self.long.mean(now, LONG, done);
        let recent = match self.recent.mean(now, RECENT, done) {
            (0, _) => long,
            (_, recent) => recent,
        };
        (finished >= ENOUGH).then(|| long.min(recent))
    }
}

/// What has become of a row lately: within the last half of `span` to all of it, which is a second, or the time in which four are served where that is longer.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) span: Duration,
    turned: Option<Instant>,
    before: Counts,
    pub(super) now: Counts,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) arrived: u32,
    pub(super) served: u32,
    /// By their clients, or at their deadlines.
    pub(super) left: u32,
}

impl Default for Flow {
    fn default() -> Self {
        Flow { span: LASTING, turned: None, before: Counts::default(), now: Counts::default() }
    }
}

impl Flow {
    pub(super) fn turn(&mut self, now: Instant) {
        let age = self.turned.map_or(Duration::MAX, |turned| now.saturating_duration_since(turned));
        if age >= self.span / 2 {
            self.before = if age >= self.span { Counts::default() } else { self.now };
            (self.now, self.turned) = (Counts::default(), Some(now));
        }
    }

    fn lately(&self) -> Counts {
        Counts {
            arrived: self.before.arrived.saturating_add(self.now.arrived),
            served: self.before.served.saturating_add(self.now.served),
            left: self.before.left.saturating_add(self.now.left),
        }
    }

    /// A good part of those who wait does not wait to the end.
    pub(super) fn is_left(&self) -> bool {
        let Counts { served, left, .. } = self.lately();
        left >= 2 && left.saturating_mul(8) >= served
    }

    /// Nobody was served, more came than were (by more than those who come again when they are), or a good part has not waited for it.
    pub(super) fn is_overload(&self, slots: u32) -> bool {
        let Counts { arrived, served, .. } = self.lately();
        served == 0 || self.is_left() || arrived > served.saturating_add(served / 20).saturating_add(slots)
    }
}

/// Overload and shedding as the log tells them: when they begin, and when they are over.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    pub(super) since: Option<Instant>,
    pub(super) last: Option<Instant>,
    pub(super) shed: u64,
}

/// Nobody was shed for so long: it is over.
const QUIET: Duration = Duration::from_secs(5);

impl Trouble {
    pub(super) fn begins(&mut self, now: Instant, upstream: &str, lane: &str, waiting: usize, what: &str) {
        self.last = Some(now);
        if self.since.is_none() {
            self.since = Some(now);
            tracing::warn!(upstream, lane, waiting, what, "overload");
        }
    }

    pub(super) fn may_end(&mut self, now: Instant, upstream: &str, lane: &str) {
        if let (Some(since), Some(last)) = (self.since, self.last)
            && now.saturating_duration_since(last) >= QUIET
        {
            let lasted = last.saturating_duration_since(since);
            tracing::info!(upstream, lane, ?lasted, shed = self.shed, "overload is over");
            *self = Trouble::default();
        }
    }
}

/// After how long clients leave: nobody says, but it can be seen.
#[derive(Debug, Default)]
pub(super) struct Patience {
    mean: Duration,
    seen: u64,
    last: Option<Instant>,
}

/// What was seen is believed for so long.
const BELIEVED: Duration = Duration::from_secs(60);

impl Patience {
    pub(super) fn left(&mut self, now: Instant, waited: Duration) {
        if self.last.is_none_or(|last| now.saturating_duration_since(last) >= BELIEVED) {
            *self = Patience { mean: waited, ..Patience::default() };
        }
        self.mean = self.mean.mul_f64(0.875) + waited.mul_f64(0.125);
        (self.seen, self.last) = (self.seen + 1, Some(now));
    }

    pub(super) fn known(&self, now: Instant) -> Option<Duration> {
        let is_known = self.seen >= ENOUGH && now.saturating_duration_since(self.last?) < BELIEVED;
        is_known.then_some(self.mean)
    }
}
