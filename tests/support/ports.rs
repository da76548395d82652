//! Free ports for processes that must be told theirs beforehand.
//!
//! Below the ephemeral range, so that no outgoing connection takes the port between the choice and the bind, and
//! held by a lock file as long as this process lives, so that no other test process chooses it too.

use std::fs::{self, File, OpenOptions};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

const FIRST: u32 = 10_240;
const COUNT: u32 = 20_000;

/// A loopback address nobody listens on and no other test will be given.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let folder = std::env::temp_dir().join("slackwater-test-ports");
    fs::create_dir_all(&folder).expect("a folder for the port locks");
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970");
    for _ in 0..COUNT {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + std::process::id().wrapping_mul(7919).wrapping_add(clock.subsec_micros()).wrapping_add(step) % COUNT;
        let lock = OpenOptions::new().create(true).append(true).open(folder.join(port.to_string())).expect("a port lock file");
        if !locked(&lock) {
            continue;
        }
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, u16::try_from(port).expect("below 65,536")));
        if TcpListener::bind(address).is_ok() {
            std::mem::forget(lock); // Held until the process ends.
            return address;
        }
    }
    panic!("no free port between {FIRST} and {}", FIRST + COUNT);
}

/// A loopback address where connections are refused.
pub fn refused_address() -> SocketAddr {
    free_address()
}

fn locked(file: &File) -> bool {
    // SAFETY: flock on a descriptor that `file` keeps open.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}
