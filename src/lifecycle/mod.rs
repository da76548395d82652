//! The life of the process: what phase it is in, what still has to finish, and which signals move it on.

pub mod drain;
pub mod phase;
pub mod signal;

pub use phase::{Phase, PhaseCell};
