//! The request body, read whole before a slot is taken: in memory, then in an unlinked file. Without CONTENT_LENGTH PHP-FPM sees
//! an empty body, and a slow upload must not hold one of its workers.

use std::{
    io,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::Body;
use http_body_util::BodyExt;
use tokio::{task::JoinHandle, time::Instant};

use super::{
    pieces::Pieces,
    spill::{Buffers, READ_BYTES, Share, SpillFile},
};
use crate::{
    error::{Error, Kind},
    fastcgi::{
        exchange::{Stdin, StdinSource},
        record,
    },
    model::clock,
};

/// A whole request body.
#[derive(Debug)]
pub enum Buffered {
    None,
    Memory(Pieces, Share),
    Spilled { file: SpillFile, length: u64, share: Share },
}

/// The limits under which a body is read.
pub struct Limits {
    /// 413 beyond.
    pub body: u64,
    pub memory: usize,
    pub stall: Duration,
    /// Bytes a second, after the first `stall`.
    pub min_rate: u64,
    pub dir: PathBuf,
}

impl Buffered {
    /// `None`: the request had none.
    pub fn length(&self) -> Option<u64> {
        match self {
            Buffered::None => None,
            Buffered::Memory(pieces, _) => Some(pieces.bytes() as u64),
            Buffered::Spilled { length, .. } => Some(*length),
        }
    }

    /// For one attempt; a retry asks again.
    pub fn stdin(&self, buffers: &Buffers) -> Stdin {
        match self {
            Buffered::None => Stdin::Done,
            Buffered::Memory(pieces, _) => Stdin::Memory(pieces.iter().cloned().collect()),
            Buffered::Spilled { file, length, .. } => Stdin::Source(Box::new(SpillSource {
                file: file.clone(),
                pool: buffers.pool.clone(),
                offset: 0,
                length: *length,
                reading: None,
                chunk: Bytes::new(),
            })),
        }
    }
}

/// Reads `body` to its end. `declared` is its Content-Length.
pub async fn buffer<B>(mut body: B, declared: Option<u64>, limits: &Limits, buffers: &Buffers) -> Result<Buffered, Error>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    if body.is_end_stream() {
        return Ok(if declared == Some(0) { Buffered::Memory(Pieces::of_body(), buffers.memory.share()) } else { Buffered::None });
    }
    let too_large = || Error::new(Kind::BodyTooLarge, format!("body larger than body_limit of {} bytes", limits.body));
    if declared.is_some_and(|n| n > limits.body) {
        return Err(too_large());
    }
    let started = Instant::now();
    let mut memory = buffers.memory.share();
    let mut held = Pieces::of_body();
    let mut spill: Option<(SpillFile, u64, Share)> = None;
    let mut total = 0u64;
    loop {
        let frame = match clock::timeout(limits.stall, body.frame()).await {
            None => return Err(Error::new(Kind::BodyStalled, format!("no byte of the body in {:?}", limits.stall))),
            Some(None) => break,
            Some(Some(Err(error))) => return Err(Error::new(Kind::BodyBroken, format!("reading the body: {error}"))),
            Some(Some(Ok(frame))) => frame,
        };
        // Trailers have no place in CGI.
        let Ok(data) = frame.into_data() else { continue };
        if data.is_empty() {
            continue;
        }
        total += data.len() as u64;
        if total > limits.body {
            return Err(too_large());
        }
        let elapsed = started.elapsed();
        if elapsed > limits.stall && total < limits.min_rate.saturating_mul(elapsed.as_secs()) {
            return Err(Error::new(Kind::BodyStalled, format!("{total} bytes in {elapsed:?} are below min_rate")));
        }
        if !memory.grow(data.len()) {
            return Err(Error::new(Kind::BufferFull, "buffer.total is used up".to_owned()));
        }
        held.push(data);
        if held.bytes() > limits.memory {
            let (file, written, disk) = match &mut spill {
                Some(spill) => spill,
                None => {
                    let file = SpillFile::create(buffers, limits.dir.clone())
                        .await
                        .map_err(|e| Error::new(Kind::DiskFull, format!("creating a file in buffer.dir: {e}")))?;
                    spill.insert((file, 0, buffers.disk.share()))
                }
            };
            let full = std::mem::replace(&mut held, Pieces::of_body()).whole();
            append(file, *written, disk, &full, buffers).await?;
            *written += full.bytes() as u64;
            memory.shrink(full.bytes());
        }
    }
    if declared.is_some_and(|n| n != total) {
        return Err(Error::new(Kind::BodyBroken, format!("{total} bytes of a body of {}", declared.unwrap_or(0))));
    }
    let held = held.whole();
    if let Some((file, written, mut disk)) = spill {
        if !held.is_empty() {
            append(&file, written, &mut disk, &held, buffers).await?;
        }
        return Ok(Buffered::Spilled { file, length: total, share: disk });
    }
    Ok(Buffered::Memory(held, memory))
}

/// Writes what is `whole` at the end of `file`.
async fn append(file: &SpillFile, written: u64, disk: &mut Share, pieces: &Pieces, buffers: &Buffers) -> Result<(), Error> {
    if !disk.grow(pieces.bytes()) {
        return Err(Error::new(Kind::DiskFull, "buffer.disk is used up".to_owned()));
    }
    let write = file.write(&buffers.pool, pieces.iter().cloned().collect(), written);
    write.await.map_err(|e| Error::new(Kind::DiskFull, format!("writing to buffer.dir: {e}")))
}

/// Reads a spilled body back, a piece at a time.
struct SpillSource {
    file: SpillFile,
    pool: tokio::runtime::Handle,
    offset: u64,
    length: u64,
    reading: Option<JoinHandle<io::Result<Bytes>>>,
    chunk: Bytes,
}

impl StdinSource for SpillSource {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        loop {
            if !self.chunk.is_empty() {
                return Poll::Ready(Ok(Some(self.chunk.split_to(self.chunk.len().min(record::MAX_CONTENT)))));
            }
            if let Some(reading) = &mut self.reading {
                let read = ready!(Pin::new(reading).poll(cx));
                self.reading = None;
                self.chunk = read.map_err(io::Error::other)??;
                self.offset += self.chunk.len() as u64;
            } else if self.offset == self.length {
                return Poll::Ready(Ok(None));
            } else {
                self.reading = Some(self.file.read(&self.pool, self.offset, self.length, READ_BYTES));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::spill::Budget;
    use http_body_util::{Full, StreamBody};

    fn buffers(memory: u64, disk: u64) -> Buffers {
        Buffers {
            memory: Budget::new(memory),
            disk: Budget::new(disk),
            files: Budget::new(9),
            pool: tokio::runtime::Handle::current(),
        }
    }

    fn limits(body: u64, memory: usize) -> Limits {
        Limits { body, memory, stall: Duration::from_secs(30), min_rate: 1024, dir: std::env::temp_dir() }
    }

    async fn read_back(buffered: &Buffered, buffers: &Buffers) -> Vec<u8> {
        match buffered.stdin(buffers) {
            Stdin::Done => Vec::new(),
            Stdin::Memory(pieces) => pieces.into_iter().flatten().collect(),
            Stdin::Source(mut source) => {
                let mut whole = Vec::new();
                while let Some(chunk) = std::future::poll_fn(|cx| source.poll_chunk(cx)).await.unwrap() {
                    assert!(!chunk.is_empty() && chunk.len() <= record::MAX_CONTENT);
                    whole.extend_from_slice(&chunk);
                }
                whole
            }
        }
    }

    #[tokio::test]
    async fn a_large_body_goes_to_disk_whole_and_can_be_read_twice() {
        let body: Vec<u8> = (0..700_000u32).map(|i| (i % 251) as u8).collect();
        let buffers = buffers(1 << 20, 1 << 20);
        let got = buffer(Full::new(Bytes::from(body.clone())), None, &limits(1 << 20, 1000), &buffers).await.unwrap();
        assert!(matches!(got, Buffered::Spilled { .. }));
        assert_eq!(got.length(), Some(700_000));
        assert_eq!(read_back(&got, &buffers).await, body);
        assert_eq!(read_back(&got, &buffers).await, body);
        assert_eq!((buffers.memory.used(), buffers.disk.used()), (0, 700_000));
        drop(got);
        assert_eq!(buffers.disk.used(), 0);
    }

    #[tokio::test]
    async fn limits_have_a_status_of_their_own() {
        let body = || Full::new(Bytes::from(vec![7; 5000]));
        let kind = |r: Result<Buffered, Error>| r.unwrap_err().kind;
        let plenty = buffers(1 << 20, 1 << 20);
        assert_eq!(kind(buffer(body(), Some(5000), &limits(4999, 100), &plenty).await), Kind::BodyTooLarge);
        assert_eq!(kind(buffer(body(), None, &limits(4999, 100), &plenty).await), Kind::BodyTooLarge);
        assert_eq!(kind(buffer(body(), None, &limits(5000, 100), &buffers(4999, 1 << 20)).await), Kind::BufferFull);
        assert_eq!(kind(buffer(body(), None, &limits(5000, 100), &buffers(1 << 20, 4999)).await), Kind::DiskFull);
        assert_eq!(kind(buffer(body(), Some(6000), &limits(9000, 9000), &plenty).await), Kind::BodyBroken);
        assert_eq!((plenty.memory.used(), plenty.disk.used()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stalls_is_408() {
        let stalled = StreamBody::new(PendingStream);
        let error = buffer(stalled, Some(10), &limits(100, 100), &buffers(1000, 1000)).await.unwrap_err();
        assert_eq!(error.kind, Kind::BodyStalled);
    }

    struct PendingStream;

    impl futures_core::Stream for PendingStream {
        type Item = Result<http_body::Frame<Bytes>, io::Error>;
        fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            Poll::Pending
        }
    }
}
