//! Lines to a file descriptor by a thread of their own. Shared by the access log and the log.
//!
//! A pipe whose reader is slow makes write(2) block, so no worker ever writes: batches go through a bounded queue, and
//! where that is full they are dropped and counted. Losing lines is the choice; holding requests for a log is not.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Write},
    os::fd::AsFd,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

/// Batches that may wait for the writer.
const QUEUE_BATCHES: usize = 1024;
/// Bytes that may wait for the writer; whichever bound is met first.
const QUEUE_BYTES: usize = 4 << 20;
/// How long to wait for a descriptor that somebody else made non-blocking, and between tries to stop.
const RETRY_PAUSE: Duration = Duration::from_millis(2);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Stdout,
    Stderr,
    File(PathBuf),
}

impl From<&str> for Target {
    fn from(text: &str) -> Self {
        match text {
            "stdout" => Target::Stdout,
            "stderr" => Target::Stderr,
            path => Target::File(PathBuf::from(path)),
        }
    }
}

impl Target {
    fn open(&self) -> io::Result<File> {
        // A duplicate instead of std's handle: no lock shared with println!, no buffer that is lost at exit.
        match self {
            Target::Stdout => Ok(io::stdout().as_fd().try_clone_to_owned()?.into()),
            Target::Stderr => Ok(io::stderr().as_fd().try_clone_to_owned()?.into()),
            Target::File(path) => OpenOptions::new().append(true).create(true).open(path),
        }
    }
}

enum Message {
    Batch {
        bytes: Vec<u8>,
        lines: u64,
    },
    /// Look at `Shared::replacement`.
    Wake,
    Stop,
}

struct Shared {
    /// Nothing is taken any more.
    stopped: AtomicBool,
    queue: SyncSender<Message>,
    queued_bytes: AtomicUsize,
    queued_lines: AtomicU64,
    lost: AtomicU64,
    target: Mutex<Target>,
    /// A slot and not a message, so that a reopen gets through a full queue.
    replacement: Mutex<Option<File>>,
    /// Disconnected when the writer has ended.
    ended: Mutex<Receiver<()>>,
}

/// A handle on one writer thread; clones share it.
#[derive(Clone)]
pub struct LineSink(Arc<Shared>);

impl LineSink {
    /// Opens the target and starts the writer. Errors: the target cannot be opened, or no thread can be had.
    pub fn start(name: &str, target: Target) -> io::Result<LineSink> {
        let file = target.open()?;
        LineSink::over(name, target, file)
    }

    fn over(name: &str, target: Target, file: File) -> io::Result<LineSink> {
        let (queue, messages) = sync_channel(QUEUE_BATCHES);
        let (alive, ended) = sync_channel::<()>(0);
        let shared = Arc::new(Shared {
            stopped: AtomicBool::new(false),
            queue,
            queued_bytes: AtomicUsize::new(0),
            queued_lines: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            target: Mutex::new(target),
            replacement: Mutex::new(None),
            ended: Mutex::new(ended),
        });
        let writer = Arc::clone(&shared);
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _alive = alive;
            write_until_stopped(&writer, &messages, file);
        })?;
        Ok(LineSink(shared))
    }

    /// Hands a batch of whole lines over. Never blocks; false and counted where there is no room.
    pub fn push(&self, bytes: Vec<u8>, lines: u64) -> bool {
        let shared = &self.0;
        if shared.stopped.load(Ordering::Relaxed) {
            shared.lost.fetch_add(lines, Ordering::Relaxed);
            return false;
        }
        let size = bytes.len();
        // Counted before the send: the writer takes it off again, and must not see less than zero.
        let before = shared.queued_bytes.fetch_add(size, Ordering::Relaxed);
        shared.queued_lines.fetch_add(lines, Ordering::Relaxed);
        if before.saturating_add(size) <= QUEUE_BYTES && shared.queue.try_send(Message::Batch { bytes, lines }).is_ok() {
            return true;
        }
        shared.queued_bytes.fetch_sub(size, Ordering::Relaxed);
        shared.queued_lines.fetch_sub(lines, Ordering::Relaxed);
        shared.lost.fetch_add(lines, Ordering::Relaxed);
        false
    }

    /// Lines lost so far.
    pub fn lost(&self) -> u64 {
        self.0.lost.load(Ordering::Relaxed)
    }

    /// Opens the same target again (USR1, after a rotation). Touches the file system: not for a worker.
    pub fn reopen(&self) -> io::Result<()> {
        let target = lock(&self.0.target).clone();
        if matches!(target, Target::File(_)) { self.set_target(target) } else { Ok(()) }
    }

    /// Turns to another target; on an error the old one stays. Touches the file system: not for a worker.
    pub fn set_target(&self, target: Target) -> io::Result<()> {
        let file = target.open()?;
        *lock(&self.0.target) = target;
        *lock(&self.0.replacement) = Some(file);
        // Full means busy, and a busy writer looks at the slot with its next batch.
        let _ = self.0.queue.try_send(Message::Wake);
        Ok(())
    }

    /// Writes what is queued and ends the writer. False if the deadline came first: what was left then counts as
    /// lost. Blocks: for the end of the process only.
    pub fn flush_and_stop(&self, deadline: Duration) -> bool {
        let until = Instant::now() + deadline;
        self.0.stopped.store(true, Ordering::Relaxed);
        let done = loop {
            match self.0.queue.try_send(Message::Stop) {
                Ok(()) => {
                    let left = until.saturating_duration_since(Instant::now());
                    break !matches!(lock(&self.0.ended).recv_timeout(left), Err(RecvTimeoutError::Timeout));
                }
                Err(TrySendError::Disconnected(_)) => break true,
                Err(TrySendError::Full(_)) if Instant::now() >= until => break false,
                Err(TrySendError::Full(_)) => thread::sleep(RETRY_PAUSE),
            }
        };
        if !done {
            self.0.lost.fetch_add(self.0.queued_lines.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        done
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_until_stopped(shared: &Shared, messages: &Receiver<Message>, mut file: File) {
    // A write that failed half-way leaves a torn line; the next batch must not be glued to it.
    let mut torn = false;
    while let Ok(message) = messages.recv() {
        if let Some(new) = lock(&shared.replacement).take() {
            file = new;
            torn = false;
        }
        match message {
            Message::Batch { bytes, lines } => {
                let result = if torn { write_all(&mut file, b"\n") } else { Ok(()) };
                let result = result.and_then(|()| {
                    torn = false;
                    write_all(&mut file, &bytes)
                });
                if let Err(written) = result {
                    torn |= written > 0;
                    // A full disk or a closed pipe: nowhere to tell it but in the counter.
                    shared.lost.fetch_add(lines, Ordering::Relaxed);
                }
                shared.queued_bytes.fetch_sub(bytes.len(), Ordering::Relaxed);
                shared.queued_lines.fetch_sub(lines, Ordering::Relaxed);
            }
            Message::Wake => {}
            Message::Stop => return,
        }
    }
}

/// As `Write::write_all`, but knows how much had been written when it failed, and waits for a descriptor that shares a
/// terminal or pipe which another process made non-blocking.
fn write_all(file: &mut File, mut bytes: &[u8]) -> Result<(), usize> {
    let mut written = 0;
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(written),
            Ok(n) => {
                written += n;
                bytes = bytes.get(n..).unwrap_or_default();
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY_PAUSE),
            Err(_) => return Err(written),
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(5);

    /// A sink into a pipe that nobody reads until the test does.
    pub fn stuck_pipe(name: &str) -> (LineSink, File) {
        let (reader, writer) = io::pipe().unwrap();
        let writer = File::from(std::os::fd::OwnedFd::from(writer));
        (LineSink::over(name, Target::Stdout, writer).unwrap(), File::from(std::os::fd::OwnedFd::from(reader)))
    }

    #[test]
    fn lines_arrive_in_order_and_stop_waits_for_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let sink = LineSink::start("test", Target::File(path.clone())).unwrap();
        for i in 0..500 {
            assert!(sink.push(format!("{i}\n").into_bytes(), 1));
        }
        assert!(sink.flush_and_stop(SECOND));
        let want: String = (0..500).map(|i| format!("{i}\n")).collect();
        assert_eq!(std::fs::read_to_string(path).unwrap(), want);
        assert_eq!(sink.lost(), 0);
        assert!(!sink.push(b"late\n".to_vec(), 1));
        assert_eq!(sink.lost(), 1);
    }

    #[test]
    fn a_reader_that_stalls_loses_lines_and_nobody_waits() {
        let (sink, reader) = stuck_pipe("stalls");
        let line = vec![b'x'; 16 << 10];
        let began = Instant::now();
        for _ in 0..2_000 {
            sink.push(line.clone(), 10);
        }
        assert!(began.elapsed() < SECOND);
        assert!(sink.lost() > 10_000, "{}", sink.lost());
        let lost = sink.lost();
        assert!(!sink.flush_and_stop(Duration::from_millis(20)));
        assert!(sink.lost() > lost);
        drop(reader);
    }

    #[test]
    fn reopen_after_a_rotation_writes_to_the_new_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let sink = LineSink::start("test", Target::File(path.clone())).unwrap();
        sink.push(b"old\n".to_vec(), 1);
        while sink.0.queued_lines.load(Ordering::Relaxed) > 0 {
            thread::sleep(RETRY_PAUSE);
        }
        std::fs::rename(&path, dir.path().join("log.1")).unwrap();
        sink.reopen().unwrap();
        sink.push(b"new\n".to_vec(), 1);
        assert!(sink.set_target(Target::File(dir.path().join("no/such/folder"))).is_err());
        assert!(sink.flush_and_stop(SECOND));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new\n");
        assert_eq!(std::fs::read_to_string(dir.path().join("log.1")).unwrap(), "old\n");
    }

    #[test]
    fn a_closed_pipe_counts_and_does_not_end_the_writer() {
        let (sink, reader) = stuck_pipe("closed");
        drop(reader);
        sink.push(b"a\n".to_vec(), 1);
        sink.push(b"b\nc\n".to_vec(), 2);
        assert!(sink.flush_and_stop(SECOND));
        assert_eq!(sink.lost(), 3);
    }
}
