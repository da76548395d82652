//! What a process has taken of its machine.

use std::fs;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that are resident.
    pub rss: u64,
    /// Open descriptors.
    pub descriptors: usize,
    pub threads: usize,
}

/// What of `pid` is resident, in bytes; `None` where it is gone.
pub fn resident(pid: u32) -> Option<u64> {
    Some(number(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "VmRSS:")? * 1024)
}

fn number(status: &str, name: &str) -> Option<u64> {
    status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

impl Usage {
    /// How many bytes more than then are resident now.
    pub fn grown(&self, pid: u32) -> u64 {
        Usage::of(pid).rss.saturating_sub(self.rss)
    }

    pub fn of(pid: u32) -> Usage {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let of = |name| number(&status, name).expect("every process has it");
        Usage {
            rss: of("VmRSS:") * 1024,
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).expect("it is ours").count(),
            threads: of("Threads:") as usize,
        }
    }
}

/// The lowest number that no descriptor of `pid` has: where the limit is that, it cannot open another one.
pub fn first_free_descriptor(pid: u32) -> u64 {
    let numbers: std::collections::BTreeSet<u64> = fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("it is ours")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    (0..).find(|number| !numbers.contains(number)).expect("there are not so many")
}

/// Lets `pid` have so many descriptors from now on; gives what it was allowed before.
pub fn allow_descriptors(pid: u32, most: u64) -> u64 {
    let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let pid = libc::pid_t::try_from(pid).expect("a process id");
    // SAFETY: reads one structure of our own, or writes to one.
    unsafe { assert_eq!(libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut before), 0) };
    let after = libc::rlimit { rlim_cur: most, ..before };
    // SAFETY: as above.
    unsafe { assert_eq!(libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const after, std::ptr::null_mut()), 0) };
    before.rlim_cur
}
