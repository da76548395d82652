//! The bytes of a file on their way out.

use std::{
    collections::VecDeque,
    fmt,
    fs::File,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
};

/// What is read at a time while the budget lasts, and beyond it: then many slow readers hold little each.
const CHUNK_BYTES: usize = 256 << 10;
const SMALL_CHUNK_BYTES: usize = 16 << 10;
/// One permit of the budget.
pub(super) const PERMIT_BYTES: usize = 1 << 10;
const CHUNK_PERMITS: u32 = 256;

/// Where the blocking work is done, and how much of it at a time.
#[derive(Clone)]
pub(super) struct Source {
    pub pool: Handle,
    pub tasks: Arc<Semaphore>,
    pub chunks: Arc<Semaphore>,
}

impl Source {
    /// Runs `task` in the pool once there is room. The permit is the task's and not the waiter's: a task whose client
    /// has left still takes a thread.
    pub async fn run<T: Send + 'static>(&self, task: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        let permit = Arc::clone(&self.tasks).acquire_owned().await.map_err(io::Error::other)?;
        let run = move || {
            let _permit = permit;
            task()
        };
        self.pool.spawn_blocking(run).await.map_err(io::Error::other)?
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    Bytes(Bytes),
    File { offset: u64, len: u64 },
}

impl Segment {
    pub fn len(&self) -> u64 {
        match self {
            // A usize has at most 64 bits.
            Segment::Bytes(bytes) => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            Segment::File { len, .. } => *len,
        }
    }
}

/// Exactly as many bytes as the response's Content-Length says, or an error: a file that was cut while it was sent
/// must end the connection, not look like a whole one.
#[derive(Default)]
pub enum FileBody {
    #[default]
    Empty,
    Whole(Bytes),
    Stream(Box<Stream>),
}

type Read = Pin<Box<dyn Future<Output = io::Result<Bytes>> + Send>>;

/// A file that is read as the client takes it, one chunk ahead of nothing.
pub struct Stream {
    source: Source,
    file: Arc<File>,
    segments: VecDeque<Segment>,
    remaining: u64,
    reading: Option<Read>,
}

impl FileBody {
    pub(super) fn stream(source: Source, file: File, segments: Vec<Segment>) -> FileBody {
        let remaining = segments.iter().map(Segment::len).sum();
        let segments = segments.into();
        FileBody::Stream(Box::new(Stream { source, file: Arc::new(file), segments, remaining, reading: None }))
    }
}

impl fmt::Debug for FileBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileBody({} bytes)", self.size_hint().lower())
    }
}

impl Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        let bytes = match this {
            FileBody::Empty => return Poll::Ready(None),
            FileBody::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                *this = FileBody::Empty;
                Some(Ok(bytes))
            }
            FileBody::Stream(stream) => match stream.poll_next(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(next) => {
                    if stream.remaining == 0 || !matches!(next, Some(Ok(_))) {
                        // Gives the descriptor back with the last chunk, not when a slow reader has taken it.
                        *this = FileBody::Empty;
                    }
                    next
                }
            },
        };
        Poll::Ready(bytes.map(|bytes| bytes.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, FileBody::Empty)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            FileBody::Empty => 0,
            FileBody::Whole(bytes) => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            FileBody::Stream(stream) => stream.remaining,
        })
    }
}

impl Stream {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        let reading = match &mut self.reading {
            Some(reading) => reading,
            None => match self.segments.pop_front() {
                None => return Poll::Ready(None),
                Some(Segment::Bytes(bytes)) => {
                    self.remaining = self.remaining.saturating_sub(Segment::Bytes(bytes.clone()).len());
                    return Poll::Ready(Some(Ok(bytes)));
                }
                Some(Segment::File { offset, len }) => {
                    let (read, taken) = self.read(offset, len);
                    if taken < len {
                        self.segments.push_front(Segment::File { offset: offset + taken, len: len - taken });
                    }
                    self.reading.insert(read)
                }
            },
        };
        let Poll::Ready(result) = reading.as_mut().poll(cx) else { return Poll::Pending };
        self.reading = None;
        if let Ok(bytes) = &result {
            self.remaining = self.remaining.saturating_sub(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        }
        Poll::Ready(Some(result))
    }

    /// Starts to read the next chunk; says how much of `len` it takes.
    fn read(&self, offset: u64, len: u64) -> (Read, u64) {
        let budget = Arc::clone(&self.source.chunks).try_acquire_many_owned(CHUNK_PERMITS).ok();
        let most = if budget.is_some() { CHUNK_BYTES } else { SMALL_CHUNK_BYTES };
        let size = usize::try_from(len).map_or(most, |len| len.min(most));
        let (source, file) = (self.source.clone(), Arc::clone(&self.file));
        let read = async move {
            let data = source.run(move || read_exactly(&file, offset, size)).await?;
            Ok(Bytes::from_owner(Chunk { data, _budget: budget }))
        };
        (Box::pin(read), u64::try_from(size).unwrap_or(len))
    }
}

/// The budget is given back when hyper has written the bytes and drops them.
struct Chunk {
    data: Vec<u8>,
    _budget: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

/// `size` bytes from `offset` on, or UnexpectedEof.
fn read_exactly(file: &File, offset: u64, size: usize) -> io::Result<Vec<u8>> {
    let mut data = Vec::with_capacity(size);
    append_exactly(file, offset, size, &mut data)?;
    Ok(data)
}

fn append_exactly(file: &File, mut offset: u64, mut size: usize, data: &mut Vec<u8>) -> io::Result<()> {
    while size > 0 {
        // `data` may have more room than asked for; what is beyond `size` is cut off again.
        let before = data.len();
        data.reserve(size);
        let read = match rustix::io::pread(file, rustix::buffer::spare_capacity(data), offset) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result?,
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let read = read.min(size);
        data.truncate(before + read);
        size -= read;
        offset += u64::try_from(read).unwrap_or_default();
    }
    Ok(())
}

/// Where the bytes of a small answer come from.
#[derive(Clone, Copy)]
pub(super) enum Contents<'a> {
    File(&'a File),
    Memory(&'a Bytes),
}

/// All of it, for what is small.
pub(super) fn read_segments(contents: Contents<'_>, segments: Vec<Segment>) -> io::Result<Bytes> {
    let bounds = |offset: u64, len: u64| Some((usize::try_from(offset).ok()?, usize::try_from(offset.checked_add(len)?).ok()?));
    if let (Contents::Memory(bytes), [Segment::File { offset, len }]) = (contents, segments.as_slice()) {
        let (from, to) = bounds(*offset, *len).filter(|(_, to)| *to <= bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        return Ok(bytes.slice(from..to));
    }
    let mut data = Vec::new();
    for segment in segments {
        match (segment, contents) {
            (Segment::Bytes(bytes), _) => data.extend_from_slice(&bytes),
            (Segment::File { offset, len }, Contents::File(file)) => {
                append_exactly(file, offset, usize::try_from(len).map_err(io::Error::other)?, &mut data)?;
            }
            (Segment::File { offset, len }, Contents::Memory(bytes)) => {
                let part = bounds(offset, len).and_then(|(from, to)| bytes.get(from..to));
                data.extend_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
            }
        }
    }
    Ok(data.into())
}
