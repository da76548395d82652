//! The time of a worker. What one poll of a connection does takes microseconds, asks for the time a dozen times and arms a timer for each thing it waits
//! for: within [`once`] the time is read once, and the connection's one timer serves for all.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use tokio::time::{Instant, Sleep};

/// So far away that nobody waits for it.
pub const NEVER: Duration = Duration::from_secs(365 * 24 * 3600);

#[derive(Clone, Copy)]
struct Turn {
    now: Instant,
    /// When something in it wants to be polled again.
    wanted: Option<Instant>,
}

thread_local! {
    static TURN: Cell<Option<Turn>> = const { Cell::new(None) };
}

/// When the [`once`] around it began; outside of one, now.
pub fn now() -> Instant {
    TURN.get().map_or_else(Instant::now, |turn| turn.now)
}

/// Time stands still in `work`: for what never waits. Whoever calls it asks [`wanted`] at its end, and polls again at that time.
pub fn once<T>(work: impl FnOnce() -> T) -> T {
    /// Also where `work` panics.
    struct Reset(Option<Turn>);
    impl Drop for Reset {
        fn drop(&mut self) {
            TURN.set(self.0);
        }
    }
    let _reset = Reset(TURN.replace(Some(Turn { now: Instant::now(), wanted: None })));
    work()
}

/// When something in the [`once`] around it wants to be polled again, at the latest.
pub fn wanted() -> Option<Instant> {
    TURN.get().and_then(|turn| turn.wanted)
}

/// False where nobody is around who would poll again.
fn want(at: Instant) -> bool {
    let Some(mut turn) = TURN.get() else { return false };
    turn.wanted = Some(turn.wanted.map_or(at, |wanted| wanted.min(at)));
    TURN.set(Some(turn));
    true
}

/// `work`, or `None` after `limit`. Within [`once`] it arms no timer of its own.
pub async fn timeout<F: Future>(limit: Duration, work: F) -> Option<F::Output> {
    let began = now();
    let deadline = began.checked_add(limit).unwrap_or(began + NEVER);
    let mut work = pin!(work);
    let mut own: Option<Pin<Box<Sleep>>> = None;
    poll_fn(|cx| {
        if let Poll::Ready(output) = work.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        if now() >= deadline {
            return Poll::Ready(None);
        }
        if want(deadline) {
            return Poll::Pending;
        }
        own.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline))).as_mut().poll(cx).map(|()| None)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_stands_still_within_and_goes_on_outside_also_after_a_panic() {
        let before = Instant::now();
        assert_eq!(once(now), before);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(now(), before + Duration::from_secs(1));
        let _ = std::panic::catch_unwind(|| once(|| panic!("in the middle")));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!((now(), wanted()), (before + Duration::from_secs(2), None), "it goes on");
    }

    #[tokio::test(start_paused = true)]
    async fn a_time_out_says_when_it_wants_to_be_polled_and_outside_wakes_by_itself() {
        let limit = Duration::from_secs(5);
        let began = Instant::now();
        assert_eq!(timeout(limit, std::future::pending::<()>()).await, None);
        assert_eq!(began.elapsed(), limit);
        assert_eq!(timeout(limit, async { 7 }).await, Some(7));

        let began = Instant::now();
        let mut within = pin!(timeout(limit, std::future::pending::<()>()));
        let mut longer = pin!(timeout(2 * limit, std::future::pending::<()>()));
        let mut poll = async || {
            poll_fn(|cx| {
                Poll::Ready(once(|| ((longer.as_mut().poll(cx).is_ready(), within.as_mut().poll(cx).is_ready()), wanted())))
            })
            .await
        };
        assert_eq!(poll().await, ((false, false), Some(began + limit)), "the earlier of two");
        tokio::time::advance(limit).await;
        assert_eq!(poll().await, ((false, true), Some(began + 2 * limit)));
    }
}
