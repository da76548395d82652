//! The connections of one worker: to wake them when the phase changes, to close idle ones for want of places, and to cut them at the end.

use std::{cell::RefCell, rc::Rc, time::Duration};

use slab::Slab;
use tokio::time::Instant;

use super::io::{Progress, Stage};

/// Who has just had an answer, or has just come, is about to ask.
const IDLE_FOR: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct Registry {
    connections: RefCell<Slab<Rc<Progress>>>,
}

/// A connection's place; its drop takes it out.
pub struct Entry {
    registry: Rc<Registry>,
    key: usize,
}

impl Registry {
    pub fn add(self: &Rc<Self>, progress: Rc<Progress>) -> Entry {
        Entry { registry: self.clone(), key: self.connections.borrow_mut().insert(progress) }
    }

    /// Each looks at its deadlines anew.
    pub fn wake_all(&self) {
        for (_, connection) in self.connections.borrow().iter() {
            connection.wake();
        }
    }

    /// Ends where they stand those that have begun a request; the others have their whole answer, and are looked at anew.
    pub fn abort_busy(&self) {
        for (_, connection) in self.connections.borrow().iter() {
            connection.abort.set(connection.in_flight.get() > 0 || connection.stage.get() == Stage::Head);
            connection.wake();
        }
    }

    /// Closes at most so many of those that wait for nothing, the longest idle ones; gives how many. Not those of trusted proxies: a load balancer would
    /// send a request on one at the same moment, and have no client to tell.
    pub fn close_idle(&self, most: usize) -> usize {
        let since = Instant::now().checked_sub(IDLE_FOR);
        let connections = self.connections.borrow();
        let may_go = |progress: &&Rc<Progress>| {
            progress.stage.get() == Stage::Idle
                && !progress.is_trusted.get()
                && !progress.unwanted.get()
                && !progress.delivering.get()
                && !progress.stall.is_blocked()
                && Some(progress.since.get()) < since
        };
        let mut idle: Vec<_> = connections.iter().map(|(_, progress)| progress).filter(may_go).collect();
        if idle.len() > most {
            idle.select_nth_unstable_by_key(most, |progress| progress.since.get());
            idle.truncate(most);
        }
        for progress in &idle {
            progress.unwanted.set(true);
            progress.wake();
        }
        idle.len()
    }

    pub fn len(&self) -> usize {
        self.connections.borrow().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.registry.connections.borrow_mut().try_remove(self.key);
    }
}
