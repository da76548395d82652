//! A peer that does not take what is sent to it: since when, how much it has taken meanwhile, and when it has had its time.

use std::{cell::Cell, time::Duration};

use tokio::time::Instant;

/// Armed by a write that could not go on, disarmed once everything has been taken.
#[derive(Debug, Default)]
pub struct Stall(Cell<Option<Blocked>>);

#[derive(Clone, Copy, Debug)]
struct Blocked {
    window: Instant,
    bytes: u64,
    last: Instant,
}

impl Stall {
    /// The peer must take something before it can go on.
    pub fn blocked(&self) {
        if self.0.get().is_none() {
            let now = Instant::now();
            self.0.set(Some(Blocked { window: now, bytes: 0, last: now }));
        }
    }

    /// It has taken so many bytes, and must take more.
    pub fn took(&self, bytes: usize) {
        if let Some(mut blocked) = self.0.get() {
            blocked.bytes += bytes as u64;
            blocked.last = Instant::now();
            self.0.set(Some(blocked));
        }
    }

    /// It has taken everything.
    pub fn over(&self) {
        self.0.set(None);
    }

    pub fn is_blocked(&self) -> bool {
        self.0.get().is_some()
    }

    /// When it has had its time: `stall` without any progress, or, after the first `stall`, less than `min_rate` bytes a second.
    pub fn deadline(&self, stall: Duration, min_rate: u64) -> Option<Instant> {
        let mut blocked = self.0.get()?;
        let window_end = blocked.window + stall;
        if Instant::now() >= window_end {
            if blocked.bytes < min_rate.saturating_mul(stall.as_secs().max(1)) {
                return Some(window_end);
            }
            blocked.window = window_end;
            blocked.bytes = 0;
            self.0.set(Some(blocked));
        }
        Some((blocked.last + stall).min(blocked.window + stall))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn nothing_taken_ends_after_one_stall() {
        let stall = Stall::default();
        assert_eq!(stall.deadline(STALL, 0), None);
        let begun = Instant::now();
        stall.blocked();
        stall.blocked();
        assert_eq!(stall.deadline(STALL, 0), Some(begun + STALL));
        stall.over();
        assert_eq!(stall.deadline(STALL, 0), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_trickle_below_the_rate_ends_and_one_above_it_goes_on() {
        for (bytes, ends) in [(29 * 1024, true), (31 * 1024, false)] {
            let stall = Stall::default();
            let begun = Instant::now();
            stall.blocked();
            tokio::time::advance(STALL - Duration::from_secs(1)).await;
            stall.took(bytes);
            assert_eq!(stall.deadline(STALL, 1024), Some(begun + STALL), "the window is not over yet");
            tokio::time::advance(Duration::from_secs(1)).await;
            let deadline = stall.deadline(STALL, 1024).unwrap();
            assert_eq!(deadline <= Instant::now(), ends, "{bytes} bytes in {STALL:?}");
        }
    }
}
