//! A line that anybody may cause is said once a second at most: a flood of it would push other lines out of the log.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    hash::Hash,
    time::Duration,
};

use tokio::time::Instant;

const EVERY: Duration = Duration::from_secs(1);

/// When such a line was said last. For one thread.
#[derive(Debug, Default)]
pub struct Seldom {
    last: Cell<Option<Instant>>,
    unsaid: Cell<u64>,
}

impl Seldom {
    /// `Some` where it is to be said now, with how often it was not said since the last time.
    pub fn may_say(&self) -> Option<u64> {
        let now = Instant::now();
        if self.last.get().is_some_and(|last| now < last + EVERY) {
            self.unsaid.set(self.unsaid.get() + 1);
            return None;
        }
        self.last.set(Some(now));
        Some(self.unsaid.take())
    }
}

/// The same for lines of many kinds, each once a second.
#[derive(Debug)]
pub struct SeldomOf<K>(RefCell<HashMap<K, Seldom>>);

/// Kinds that are remembered; one more forgets all.
const KINDS: usize = 256;

impl<K: Eq + Hash> SeldomOf<K> {
    pub fn may_say(&self, kind: K) -> Option<u64> {
        let mut kinds = self.0.borrow_mut();
        if kinds.len() >= KINDS && !kinds.contains_key(&kind) {
            kinds.clear();
        }
        kinds.entry(kind).or_default().may_say()
    }
}

impl<K> Default for SeldomOf<K> {
    fn default() -> Self {
        SeldomOf(RefCell::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn once_a_second_and_with_the_number_of_what_was_left_out() {
        let seldom = Seldom::default();
        let said: Vec<_> = (0..5).map(|_| seldom.may_say()).collect();
        assert_eq!(said, [Some(0), None, None, None, None]);
        tokio::time::advance(EVERY).await;
        assert_eq!((seldom.may_say(), seldom.may_say()), (Some(4), None));
    }
}
