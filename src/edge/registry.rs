//! The connections of one worker: to wake them when the phase changes, and to cut them at the end.

use std::{cell::RefCell, rc::Rc};

use slab::Slab;

use super::io::{Progress, Stage};

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
