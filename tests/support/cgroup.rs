//! A memory limit as a container has it: whoever goes beyond is killed.

use std::fs;
use std::path::{Path, PathBuf};

/// A control group of its own; removed when it is dropped.
#[derive(Debug)]
pub struct MemoryLimit {
    folder: PathBuf,
    peak: &'static str,
}

impl MemoryLimit {
    /// Wants root and a memory controller, of either version.
    pub fn new(bytes: u64) -> MemoryLimit {
        let root = Path::new("/sys/fs/cgroup");
        let name = format!("slackwater-test-{}", std::process::id());
        let (folder, limit, peak) = if root.join("memory").is_dir() {
            (root.join("memory").join(name), "memory.limit_in_bytes", "memory.max_usage_in_bytes")
        } else {
            let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
            (root.join(name), "memory.max", "memory.peak")
        };
        fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}; this test wants root", folder.display()));
        fs::write(folder.join(limit), bytes.to_string()).unwrap_or_else(|error| panic!("{limit}: {error}; no memory controller?"));
        MemoryLimit { folder, peak }
    }

    /// `pid` and all its threads are under it from now on.
    pub fn add(&self, pid: u32) {
        fs::write(self.folder.join("cgroup.procs"), pid.to_string()).expect("a process of ours");
    }

    /// The most that was used, page cache included.
    pub fn peak(&self) -> u64 {
        let text = fs::read_to_string(self.folder.join(self.peak)).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}
