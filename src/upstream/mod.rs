//! Where requests can go: the snapshot both planes meet in, the endpoints with their slots, the queue, and dispatch.

pub mod admission;
pub mod balance;
pub mod dispatch;
pub mod endpoint;
pub mod health;
pub mod lanes;
#[cfg(all(test, feature = "shuttle"))]
mod models;
pub mod probe;
pub mod shares;
pub mod snapshot;
pub mod store;
mod sync;

pub use dispatch::{Dispatcher, Ticket, Want};
pub use endpoint::{Endpoint, Slot};
pub use snapshot::{Activation, Set, Snapshot, Upstream};
pub use store::Store;
