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

    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The same bytes, counted to their end; as they are where the budget does not have them.
    pub fn counted(self: &Arc<Self>, bytes: Bytes) -> Result<Bytes, Bytes> {
        let mut share = self.share();
        if share.grow(bytes.len()) { Ok(Bytes::from_owner(Counted { bytes, _share: share })) } else { Err(bytes) }
    }

    /// Whether there is room for so many bytes more, as it looks now.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.used().saturating_add(bytes as u64) <= self.limit.load(Ordering::Relaxed)
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

/// Bytes that count against a budget as long as anybody has them: hyper keeps what its client does not take.
struct Counted {
    bytes: Bytes,
    _share: Share,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
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
    /// How many spill files there may be: each takes a descriptor, of which clients and FPM need theirs.
    pub files: Arc<Budget>,
    /// The pool for everything that may block.
    pub pool: Handle,
}

/// An unlinked file, readable by nobody else.
#[derive(Clone, Debug)]
pub struct SpillFile(Arc<(File, Share)>);

impl SpillFile {
    pub async fn create(buffers: &Buffers, dir: PathBuf) -> io::Result<SpillFile> {
        let mut one = buffers.files.share();
        if !one.grow(1) {
            return Err(io::Error::other("there are as many spill files as descriptors allow"));
        }
        let file = buffers.pool.spawn_blocking(move || create(&dir)).await.map_err(io::Error::other)??;
        Ok(SpillFile(Arc::new((file, one))))
    }

    pub async fn write(&self, pool: &Handle, chunks: Vec<Bytes>, mut offset: u64) -> io::Result<()> {
        let file = self.0.clone();
        pool.spawn_blocking(move || {
            for chunk in chunks {
                file.0.write_all_at(&chunk, offset)?;
                offset += chunk.len() as u64;
            }
            Ok(())
        })
        .await
        .map_err(io::Error::other)?
    }

    /// Up to `most` of what lies between `offset` and `end`.
    pub fn read(&self, pool: &Handle, offset: u64, end: u64, most: usize) -> tokio::task::JoinHandle<io::Result<Bytes>> {
        let file = self.0.clone();
        let length = usize::try_from(end.saturating_sub(offset)).unwrap_or(most).min(most);
        pool.spawn_blocking(move || {
            let mut buffer = vec![0; length];
            file.0.read_exact_at(&mut buffer, offset)?;
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

    #[test]
    fn counted_bytes_count_until_the_last_of_them_is_gone() {
        let budget = Budget::new(10);
        let bytes = budget.counted(Bytes::from_static(b"12345678")).unwrap();
        assert_eq!(budget.counted(Bytes::from_static(b"123")).unwrap_err(), "123");
        let part = bytes.slice(2..4);
        drop(bytes);
        assert_eq!((&part[..], budget.used()), (&b"34"[..], 8));
        drop(part);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn a_spill_file_has_no_name_and_keeps_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let pool = Handle::current();
        let buffers = Buffers { memory: Budget::new(0), disk: Budget::new(0), files: Budget::new(1), pool: pool.clone() };
        let file = SpillFile::create(&buffers, dir.path().to_owned()).await.unwrap();
        assert!(SpillFile::create(&buffers, dir.path().to_owned()).await.is_err(), "one descriptor is all there is");
        file.write(&pool, vec![Bytes::from_static(b"hello "), Bytes::from_static(b"world")], 0).await.unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(file.read(&pool, 6, 11, READ_BYTES).await.unwrap().unwrap(), "world");
    }
}
