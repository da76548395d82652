//! Exchanges whose client has left. FPM goes on until it has finished, and its worker is busy as long: so is our slot.

use std::{cell::RefCell, collections::VecDeque, rc::Rc, time::Duration};

use tokio::sync::Notify;

use super::exchange::{Event, Exchange};

/// Where slots do not bound them (capacity not known), so many a worker; the oldest is closed first.
pub const MAX_UNBOUNDED: usize = 1024;

/// The reaper of one worker.
#[derive(Default)]
pub struct Reaper {
    /// Close signals of those that no slot bounds, oldest first.
    unbounded: Rc<RefCell<VecDeque<Rc<Notify>>>>,
}

impl Reaper {
    /// Reads `exchange` to its end, for at most `limit` in all, then closes it and drops `held` (the slot).
    pub fn reap<T: 'static>(&self, mut exchange: Exchange, held: T, limit: Duration, bounded: bool) {
        let close = Rc::new(Notify::new());
        if !bounded {
            let mut queue = self.unbounded.borrow_mut();
            if queue.len() >= MAX_UNBOUNDED
                && let Some(oldest) = queue.pop_front()
            {
                oldest.notify_one();
            }
            queue.push_back(close.clone());
        }
        let unbounded = self.unbounded.clone();
        tokio::task::spawn_local(async move {
            tokio::select! {
                () = read_to_end(&mut exchange) => {}
                () = tokio::time::sleep(limit) => {}
                () = close.notified() => {}
            }
            drop(exchange);
            drop(held);
            if !bounded {
                unbounded.borrow_mut().retain(|other| !Rc::ptr_eq(other, &close));
            }
        });
    }
}

async fn read_to_end(exchange: &mut Exchange) {
    while let Ok(event) = exchange.event().await {
        if event == Event::End {
            return;
        }
    }
}
