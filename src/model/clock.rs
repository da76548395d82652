//! The time of a worker. What one poll of a connection does takes microseconds, and asks for the time a dozen times: within [`once`] it is read once.

use std::cell::Cell;

use tokio::time::Instant;

thread_local! {
    static NOW: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// When the [`once`] around it began; outside of one, now.
pub fn now() -> Instant {
    NOW.get().unwrap_or_else(Instant::now)
}

/// Time stands still in `work`: for what never waits.
pub fn once<T>(work: impl FnOnce() -> T) -> T {
    /// Also where `work` panics.
    struct Reset(Option<Instant>);
    impl Drop for Reset {
        fn drop(&mut self) {
            NOW.set(self.0);
        }
    }
    let _reset = Reset(NOW.replace(Some(Instant::now())));
    work()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_stands_still_within_and_goes_on_outside_also_after_a_panic() {
        let before = Instant::now();
        let turned = once(|| {
            let first = now();
            // As if it had taken so long.
            NOW.with(|_| assert_eq!(now(), first));
            once(|| assert_eq!(now(), first));
            first
        });
        assert_eq!(turned, before);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(now(), before + Duration::from_secs(1));
        let _ = std::panic::catch_unwind(|| once(|| panic!("in the middle")));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(now(), before + Duration::from_secs(2), "it goes on");
    }
}
