//! The wall clock of one process, which a test may set: libfaketime, told by a file.

use std::fs;
use std::path::PathBuf;

use tempfile::NamedTempFile;

use super::process::Builder;

pub struct FakeClock {
    offset: NamedTempFile,
}

impl FakeClock {
    /// As the machine's, for now.
    pub fn new() -> FakeClock {
        let clock = FakeClock { offset: NamedTempFile::new().expect("a temporary file") };
        clock.jump("+0d");
        clock
    }

    /// So far from the machine's time, as faketime(1) writes it: "+366d".
    pub fn jump(&self, offset: &str) {
        fs::write(self.offset.path(), offset).expect("the file is written");
    }

    /// The process is to live by it; its monotonic clock stays the machine's.
    pub fn env(&self, builder: Builder) -> Builder {
        builder
            .env("LD_PRELOAD", &library().display().to_string())
            .env("FAKETIME_TIMESTAMP_FILE", &self.offset.path().display().to_string())
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    }
}

fn library() -> PathBuf {
    let folders = fs::read_dir("/usr/lib").expect("a folder").filter_map(Result::ok);
    let mut found = folders.map(|folder| folder.path().join("faketime/libfaketime.so.1")).filter(|path| path.exists());
    found.next().expect("no libfaketime on this machine: apt-get install faketime (tests/run does it)")
}

/// A date as 2026-11-26T... in days, on the day or two.
pub fn days(date: &str) -> f64 {
    let part = |at: std::ops::Range<usize>| {
        date.get(at).and_then(|part| part.parse::<f64>().ok()).unwrap_or_else(|| panic!("{date:?} is no date"))
    };
    part(0..4) * 365.25 + part(5..7) * 30.44 + part(8..10)
}
