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

/// Whether read(2) or accept(2) would give something now.
fn is_readable(socket: impl std::os::fd::AsFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}
