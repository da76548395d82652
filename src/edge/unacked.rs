//! How much of what was sent the peer has not acknowledged yet: the one question for which there is no safe wrapper.

use std::{ffi::c_int, os::fd::AsFd};

/// Bytes in the kernel's send queue, sent or not, a FIN counting as one (tcp(7), SIOCOUTQ); 0 where it cannot be told.
pub fn unacked(socket: impl AsFd) -> usize {
    #[expect(unsafe_code, reason = "SIOCOUTQ, which is TIOCOUTQ, writes one int and touches nothing else (tcp(7))")]
    let answer =
        unsafe { rustix::ioctl::ioctl(socket, rustix::ioctl::Getter::<{ libc::TIOCOUTQ as rustix::ioctl::Opcode }, c_int>::new()) };
    answer.ok().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn what_the_peer_does_not_read_stays_unacknowledged() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut reader, _) = listener.accept().unwrap();
        assert_eq!(unacked(&sender), 0);
        sender.set_nonblocking(true).unwrap();
        let chunk = [0; 65536];
        let mut sent = 0;
        while let Ok(n) = sender.write(&chunk) {
            sent += n;
        }
        assert!(unacked(&sender) > 0);
        let mut buffer = vec![0; sent];
        reader.read_exact(&mut buffer).unwrap();
        // Loopback acknowledges what has been read; the last of it with a delayed ACK.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while unacked(&sender) > 0 {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
    }
}
