//! The atomics and locks of slots, lanes and the queue; with the feature `shuttle` those of the model checker, which tries the orders in
//! which threads may meet.

#[cfg(feature = "shuttle")]
pub use shuttle::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering},
};
#[cfg(not(feature = "shuttle"))]
pub use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering},
};

/// Puts `change(value)` in place of the value, again for as long as another thread comes in between; the value before, or `None` where there is nothing to change.
pub fn update(cell: &AtomicU32, mut change: impl FnMut(u32) -> Option<u32>) -> Option<u32> {
    let mut before = cell.load(Ordering::SeqCst);
    loop {
        match cell.compare_exchange(before, change(before)?, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => return Some(before),
            Err(other) => before = other,
        }
    }
}
