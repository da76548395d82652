//! An answer at no more than so many bytes a second: `X-Accel-Limit-Rate`.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use tokio::time::{Instant, Sleep, sleep_until};

pub struct Pace {
    /// Bytes a second, at least one.
    rate: u64,
    /// Read, and not yet due.
    rest: Bytes,
    /// When the next bytes are due.
    due: Instant,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Pace {
    pub fn new(rate: u64) -> Self {
        Pace { rate: rate.max(1), rest: Bytes::new(), due: Instant::now(), sleep: None }
    }

    /// Until more may be sent. `Some`: these, which are here already.
    pub fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.due > Instant::now() {
            let due = self.due;
            ready!(self.sleep.get_or_insert_with(|| Box::pin(sleep_until(due))).as_mut().poll(cx));
        }
        self.sleep = None;
        match self.rest.is_empty() {
            true => Poll::Ready(None),
            false => Poll::Ready(Some(self.part_of_rest())),
        }
    }

    /// What of these bytes may go now; the rest is kept for later.
    pub fn part(&mut self, bytes: Bytes) -> Bytes {
        self.rest = bytes;
        self.part_of_rest()
    }

    fn part_of_rest(&mut self) -> Bytes {
        // A second's worth at a time.
        let size = usize::try_from(self.rate).unwrap_or(usize::MAX).min(self.rest.len());
        let nanos = u128::try_from(size).unwrap_or(u128::MAX) * 1_000_000_000 / u128::from(self.rate);
        self.due = self.due.max(Instant::now()) + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.rest.split_to(size)
    }

    /// Bytes that are kept.
    pub fn kept(&self) -> usize {
        self.rest.len()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn no_second_has_more_than_its_rate() {
        let begun = Instant::now();
        let mut pace = Pace::new(1000);
        let mut sent = vec![(Duration::ZERO, pace.part(Bytes::from(vec![0; 2500])).len())];
        while let Some(bytes) = poll_fn(|cx| pace.poll_due(cx)).await {
            sent.push((begun.elapsed(), bytes.len()));
        }
        let second = Duration::from_secs(1);
        assert_eq!(sent.iter().map(|(_, size)| *size).collect::<Vec<_>>(), [1000, 1000, 500]);
        // The clock of tokio's tests has milliseconds.
        for (nth, (at, _)) in sent.iter().enumerate() {
            let wanted = second * u32::try_from(nth).unwrap();
            assert!(*at >= wanted && *at < wanted + Duration::from_millis(5), "{nth}: {at:?}");
        }
        assert_eq!(pace.kept(), 0);
    }
}
