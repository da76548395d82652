//! From a socket to an HTTP request. Generic over the service that answers.

pub mod batch;
pub mod connection;
pub mod io;
pub mod listener;
pub mod proxy_protocol;
pub mod registry;
pub mod sniff;
pub mod stall;
pub mod streams;
pub mod unacked;
