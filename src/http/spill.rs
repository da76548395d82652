//! Where bodies go that memory does not hold: budgets for both, and unlinked files on the pool for blocking work.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use tokio::runtime::Handle;

/// One read from a spill file.
pub const READ_BYTES: usize = 256 * 1024;

/// A bounded number of bytes that all workers share.
#[derive(Debug)]
pub struct Budget {
    used: AtomicU64,
    limit: AtomicU64,
}

impl Budget {
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Budget { used: AtomicU64::new(0), limit: AtomicU64::new(limit) })
    }

    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// An empty share that can grow.
    pub fn share(self: &Arc<Self>) -> Share {
        Share { budget: self.clone(), bytes: 0 }
    }
}

/// What one body has of a budget; its drop gives all of it back.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Share {
    /// `bytes` more; false where the budget does not have them.
    #[must_use]
    pub fn grow(&mut self, bytes: usize) -> bool {
        let bytes = bytes as u64;
        let limit = self.budget.limit.load(Ordering::Relaxed);
        let taken = self
            .budget
            .used
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |used| used.checked_add(bytes).filter(|sum| *sum <= limit))
            .is_ok();
        if taken {
            self.bytes += bytes;
        }
        taken
    }

    pub fn shrink(&mut self, bytes: usize) {
        let bytes = (bytes as u64).min(self.bytes);
        self.bytes -= bytes;
        self.budget.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub fn clear(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = 0;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.clear();
    }
}

/// What buffering needs of the process.
#[derive(Clone, Debug)]
pub struct Buffers {
    pub memory: Arc<Budget>,
    pub disk: Arc<Budget>,
    /// The pool for everything that may block.
    pub pool: Handle,
}

/// An unlinked file, readable by nobody else.
#[derive(Clone, Debug)]
pub struct SpillFile(Arc<File>);

impl SpillFile {
    pub async fn create(pool: &Handle, dir: PathBuf) -> io::Result<SpillFile> {
        pool.spawn_blocking(move || create(&dir)).await.map_err(io::Error::other)?.map(|file| SpillFile(Arc::new(file)))
    }

    pub async fn write(&self, pool: &Handle, chunks: Vec<Bytes>, mut offset: u64) -> io::Result<()> {
        let file = self.0.clone();
        pool.spawn_blocking(move || {
            for chunk in chunks {
                file.write_all_at(&chunk, offset)?;
                offset += chunk.len() as u64;
            }
            Ok(())
        })
        .await
        .map_err(io::Error::other)?
    }

    /// Up to READ_BYTES of what lies between `offset` and `end`.
    pub fn read(&self, pool: &Handle, offset: u64, end: u64) -> tokio::task::JoinHandle<io::Result<Bytes>> {
        let file = self.0.clone();
        let length = usize::try_from(end.saturating_sub(offset)).unwrap_or(READ_BYTES).min(READ_BYTES);
        pool.spawn_blocking(move || {
            let mut buffer = vec![0; length];
            file.read_exact_at(&mut buffer, offset)?;
            Ok(Bytes::from(buffer))
        })
    }
}

fn create(dir: &Path) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
        Ok(fd) => Ok(File::from(fd)),
        // Not every file system has O_TMPFILE (overlayfs before Linux 6.3).
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::NOENT) => {
            let name = dir.join(format!(".slackwater-{:032x}", rand::random::<u128>()));
            let fd = rustix::fs::open(&name, OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC, mode)?;
            std::fs::remove_file(&name)?;
            Ok(File::from(fd))
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_never_exceeded_and_comes_back() {
        let budget = Budget::new(100);
        let mut first = budget.share();
        assert!(first.grow(60));
        let mut second = budget.share();
        assert!(!second.grow(41));
        assert!(second.grow(40));
        drop(first);
        assert_eq!(budget.used(), 40);
        second.shrink(10);
        assert_eq!(budget.used(), 30);
    }

    #[tokio::test]
    async fn a_spill_file_has_no_name_and_keeps_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let pool = Handle::current();
        let file = SpillFile::create(&pool, dir.path().to_owned()).await.unwrap();
        file.write(&pool, vec![Bytes::from_static(b"hello "), Bytes::from_static(b"world")], 0).await.unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(file.read(&pool, 6, 11).await.unwrap().unwrap(), "world");
    }
}
