//! The answer on its way to the client: FPM is read as fast as it writes, into memory and then an unlinked file, so that a slow reader
//! does not hold one of its workers.
//!
//! ```text
//!   FPM ──▶ pump (a local task) ──▶ memory queue ──▶ PipeBody ──▶ hyper
//!                              └──▶ spill file ──┘   in order: to the queue only while the file has nothing unread
//! ```

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    path::PathBuf,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::{task::JoinHandle, time::Instant};

use super::{
    pieces::Pieces,
    spill::{Buffers, READ_BYTES, Share, SpillFile},
};
use crate::{
    error::{Error, Kind},
    fastcgi::exchange::{Event, Exchange},
};

/// As Nginx: the told length is sent, and the log says what PHP did.
pub const TOO_LONG: &str = "PHP has written more than its Content-Length says; the rest is left out";

/// Written to a spill file at once.
const BATCH_BYTES: usize = 256 * 1024;
/// So much of an answer may be in memory beyond the budget.
const LITTLE: usize = 8 * 1024;
/// So long FPM waits for a reader that keeps up before a file is begun, as often as that one has moved, but no longer in all than PATIENCE: a client that
/// takes the answer as it comes needs no file, and a worker is not held for one that does not.
const PATIENCE_AT_ONCE: Duration = Duration::from_millis(2);
const PATIENCE: Duration = Duration::from_millis(20);
/// An unbuffered answer waits for its client beyond this.
const UNBUFFERED_BYTES: usize = 64 * 1024;

/// What of an answer the pump needs to know.
pub struct Plan {
    /// As it comes, at the client's pace.
    pub unbuffered: bool,
    pub memory: usize,
    pub dir: PathBuf,
    pub read_timeout: Duration,
}

/// How the pump's work ended.
pub enum Outcome {
    /// END_REQUEST came.
    Whole(Exchange),
    /// FPM may go on.
    Failed(Exchange, Error),
    /// The client left; FPM may go on.
    ClientLeft(Exchange),
}

struct Pipe {
    queue: Pieces,
    memory: Share,
    spill: Option<Spill>,
    /// The disk has refused: what memory does not hold waits for the client.
    no_disk: bool,
    ended: Option<Result<(), String>>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    reader_gone: bool,
}

struct Spill {
    file: SpillFile,
    read: u64,
    written: u64,
    /// How far the file has ever been written: that is what it takes of the disk.
    high: u64,
    disk: Share,
}

impl Pipe {
    fn new(queue: Pieces, memory: Share) -> Self {
        Pipe { queue, memory, spill: None, no_disk: false, ended: None, reader: None, writer: None, reader_gone: false }
    }
}

impl Spill {
    fn is_read(&self) -> bool {
        self.read == self.written
    }

    /// Room for `bytes` more at `written`; false where the disk budget has none.
    fn grow(&mut self, bytes: usize) -> bool {
        let end = self.written + bytes as u64;
        let more = usize::try_from(end.saturating_sub(self.high)).unwrap_or(usize::MAX);
        let granted = more == 0 || self.disk.grow(more);
        if granted {
            self.high = self.high.max(end);
        }
        granted
    }
}

/// Where a batch goes.
enum Place {
    Memory,
    /// Nowhere has room: a little of it, beyond the budget, for otherwise nothing would go on.
    Little,
    NewFile,
    File(SpillFile, u64),
    /// When the reader has taken something.
    Later,
    /// Nobody reads it.
    Nowhere,
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

/// The two ends. `first` is what has been read already.
pub fn pipe(first: Pieces, length: Option<u64>, buffers: &Buffers) -> (Pump, PipeBody) {
    let mut memory = buffers.memory.share();
    let (queue, rest) = if memory.grow(first.bytes()) { (first, None) } else { (Pieces::of_answer(), Some(first)) };
    let pipe = Rc::new(RefCell::new(Pipe::new(queue, memory)));
    let body = PipeBody { pipe: pipe.clone(), buffers: buffers.clone(), reading: None, left: length, told: length.unwrap_or(0) };
    (Pump { pipe, buffers: buffers.clone(), first: rest }, body)
}

/// An answer that is all here, and for which memory has no room.
///
/// # Errors
/// The disk has none either.
pub async fn spilt(bytes: Bytes, buffers: &Buffers, dir: PathBuf) -> io::Result<PipeBody> {
    let length = bytes.len();
    let mut disk = buffers.disk.share();
    if !disk.grow(length) {
        return Err(io::Error::other("so is buffer.disk"));
    }
    let file = SpillFile::create(buffers, dir).await?;
    file.write(&buffers.pool, vec![bytes], 0).await?;
    let length = length as u64;
    let spill = Some(Spill { file, read: 0, written: length, high: length, disk });
    let pipe = Pipe { spill, ended: Some(Ok(())), ..Pipe::new(Pieces::of_answer(), buffers.memory.share()) };
    Ok(PipeBody { pipe: Rc::new(RefCell::new(pipe)), buffers: buffers.clone(), reading: None, left: Some(length), told: length })
}

/// The end that FPM's answer goes into.
pub struct Pump {
    pipe: Rc<RefCell<Pipe>>,
    buffers: Buffers,
    /// What had been read already and the budget has no room for.
    first: Option<Pieces>,
}

impl Pump {
    /// Moves the rest of the answer, to its end or until the client has left.
    pub async fn run(mut self, mut exchange: Exchange, plan: Plan, mut on_stderr: impl FnMut(Bytes)) -> Outcome {
        let mut patience = PATIENCE;
        if let Some(first) = self.first.take() {
            self.deliver(first, &plan, &mut patience).await;
        }
        loop {
            let gathered = tokio::time::timeout(plan.read_timeout, self.gather(&mut exchange, &mut on_stderr)).await;
            let (batch, end) = match gathered {
                Err(_) => {
                    let error = Error::new(Kind::ReadTimeout, format!("no byte of the answer in {:?}", plan.read_timeout));
                    self.end(Err(error.to_string()));
                    return Outcome::Failed(exchange, error);
                }
                Ok(gathered) => gathered,
            };
            if !batch.is_empty() {
                self.deliver(batch, &plan, &mut patience).await;
            }
            match end {
                None => {}
                Some(Err(error)) => {
                    self.end(Err(error.to_string()));
                    return Outcome::Failed(exchange, error);
                }
                Some(Ok(())) => {
                    self.end(Ok(()));
                    return Outcome::Whole(exchange);
                }
            }
            if self.pipe.borrow().reader_gone {
                return Outcome::ClientLeft(exchange);
            }
        }
    }

    /// What FPM has written since, and how it ended if it did. Returns as soon as there is a sign of life, or nobody to read it.
    async fn gather(&self, exchange: &mut Exchange, on_stderr: &mut impl FnMut(Bytes)) -> (Pieces, Option<Result<(), Error>>) {
        let mut batch = Pieces::of_answer();
        // Where the budget is used up, what is read is beyond it.
        let most = if self.buffers.memory.has_room(BATCH_BYTES) { BATCH_BYTES } else { LITTLE };
        let end = poll_fn(|cx| {
            loop {
                if self.pipe.borrow().reader_gone {
                    return Poll::Ready(None);
                }
                match exchange.poll_event(cx) {
                    Poll::Ready(Ok(Event::Stdout(data))) => {
                        batch.push_first(data);
                        if batch.bytes() >= most {
                            return Poll::Ready(None);
                        }
                    }
                    // A script that only complains is not silent.
                    Poll::Ready(Ok(Event::Stderr(data))) => {
                        on_stderr(data);
                        return Poll::Ready(None);
                    }
                    Poll::Ready(Ok(Event::End)) => return Poll::Ready(Some(Ok(()))),
                    Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(error))),
                    Poll::Pending if batch.is_empty() => {
                        self.pipe.borrow_mut().writer = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                    Poll::Pending => return Poll::Ready(None),
                }
            }
        })
        .await;
        (batch, end)
    }

    /// To memory while there is room, then to the file; where neither has any, at the client's pace: what has begun is not cut for that.
    async fn deliver(&self, batch: Pieces, plan: &Plan, patience: &mut Duration) {
        let mut batch = batch.whole();
        loop {
            let bytes = batch.bytes();
            match self.place(bytes, plan) {
                Place::Nowhere => return,
                Place::Little => {
                    let mut pipe = self.pipe.borrow_mut();
                    batch.move_to(&mut pipe.queue, LITTLE);
                    wake(&mut pipe.reader);
                    if batch.is_empty() {
                        return;
                    }
                }
                Place::Memory => {
                    let mut pipe = self.pipe.borrow_mut();
                    batch.move_to(&mut pipe.queue, usize::MAX);
                    wake(&mut pipe.reader);
                    return;
                }
                Place::NewFile if !patience.is_zero() => {
                    let began = Instant::now();
                    let moved = tokio::time::timeout(PATIENCE_AT_ONCE.min(*patience), self.reader_moved()).await.is_ok();
                    *patience = if moved { patience.saturating_sub(began.elapsed()) } else { Duration::ZERO };
                }
                Place::NewFile => match SpillFile::create(&self.buffers, plan.dir.clone()).await {
                    Ok(file) => {
                        self.pipe.borrow_mut().spill =
                            Some(Spill { file, read: 0, written: 0, high: 0, disk: self.buffers.disk.share() });
                    }
                    Err(error) => self.without_disk(plan, &error),
                },
                Place::File(file, offset) => {
                    if let Err(error) = file.write(&self.buffers.pool, batch.iter().cloned().collect(), offset).await {
                        self.without_disk(plan, &error);
                        continue;
                    }
                    let mut pipe = self.pipe.borrow_mut();
                    if let Some(spill) = &mut pipe.spill {
                        spill.written = offset + bytes as u64;
                    }
                    wake(&mut pipe.reader);
                    return;
                }
                Place::Later => self.reader_moved().await,
            }
        }
    }

    fn without_disk(&self, plan: &Plan, error: &io::Error) {
        tracing::warn!(%error, dir = %plan.dir.display(), "buffer.dir takes no more of an answer; it goes on at its client's pace");
        self.pipe.borrow_mut().no_disk = true;
    }

    /// Where `bytes` more can go now; room there is taken by that.
    fn place(&self, bytes: usize, plan: &Plan) -> Place {
        let mut pipe = self.pipe.borrow_mut();
        if pipe.reader_gone {
            return Place::Nowhere;
        }
        // Only the pump rewinds: it knows that no write is under way.
        if let Some(spill) = pipe.spill.as_mut().filter(|s| s.is_read()) {
            (spill.read, spill.written) = (0, 0);
        }
        let unread = pipe.spill.as_ref().is_some_and(|s| !s.is_read());
        let room = if plan.unbuffered { UNBUFFERED_BYTES } else { plan.memory };
        let fits = pipe.queue.is_empty() || pipe.queue.bytes() + bytes <= room;
        if !unread && fits && pipe.memory.grow(bytes) {
            return Place::Memory;
        }
        if !plan.unbuffered && !pipe.no_disk {
            let Some(spill) = &mut pipe.spill else { return Place::NewFile };
            if spill.grow(bytes) {
                return Place::File(spill.file.clone(), spill.written);
            }
        }
        if !unread && pipe.queue.is_empty() { Place::Little } else { Place::Later }
    }

    /// Until the reader has taken something, or left.
    async fn reader_moved(&self) {
        let mut waited = false;
        poll_fn(|cx| {
            let mut pipe = self.pipe.borrow_mut();
            if waited || pipe.reader_gone {
                return Poll::Ready(());
            }
            waited = true;
            pipe.writer = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn end(&self, result: Result<(), String>) {
        let mut pipe = self.pipe.borrow_mut();
        pipe.ended = Some(result);
        wake(&mut pipe.reader);
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        let mut pipe = self.pipe.borrow_mut();
        if pipe.ended.is_none() {
            pipe.ended = Some(Err("the answer was given up".to_owned()));
            wake(&mut pipe.reader);
        }
    }
}

/// The end that hyper reads from. An answer that was cut is an error, never an end.
pub struct PipeBody {
    pipe: Rc<RefCell<Pipe>>,
    buffers: Buffers,
    reading: Option<JoinHandle<io::Result<Bytes>>>,
    /// Of a told Content-Length.
    left: Option<u64>,
    told: u64,
}

impl PipeBody {
    fn give(&mut self, mut bytes: Bytes) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if let Some(left) = &mut self.left {
            match left.checked_sub(bytes.len() as u64) {
                Some(rest) => *left = rest,
                None => {
                    tracing::warn!(told = self.told, "{TOO_LONG}");
                    bytes.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left = 0;
                }
            }
        }
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }
}

impl Body for PipeBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if let Some(reading) = &mut self.reading {
            let read = ready!(Pin::new(reading).poll(cx));
            self.reading = None;
            let bytes = read.map_err(io::Error::other)??;
            // hyper keeps it until the client has taken it.
            let bytes = self.buffers.memory.counted(bytes).unwrap_or_else(|bytes| bytes);
            {
                let pipe = &mut *self.pipe.borrow_mut();
                if let Some(spill) = &mut pipe.spill {
                    spill.read += bytes.len() as u64;
                }
                wake(&mut pipe.writer);
            }
            return self.give(bytes);
        }
        let next = {
            let shared = self.pipe.clone();
            let pipe = &mut *shared.borrow_mut();
            if let Some(bytes) = pipe.queue.pop() {
                pipe.memory.shrink(bytes.len());
                wake(&mut pipe.writer);
                // hyper keeps it until the client has taken it.
                let counts = bytes.len() > LITTLE;
                Some(if counts { self.buffers.memory.counted(bytes).unwrap_or_else(|bytes| bytes) } else { bytes })
            } else if let Some(spill) = pipe.spill.as_ref().filter(|s| !s.is_read()) {
                let most = if self.buffers.memory.has_room(READ_BYTES) { READ_BYTES } else { LITTLE };
                self.reading = Some(spill.file.read(&self.buffers.pool, spill.read, spill.written, most));
                None
            } else {
                match &pipe.ended {
                    Some(Ok(())) if self.left.is_some_and(|left| left > 0) => {
                        return Poll::Ready(Some(Err(io::Error::other("fewer bytes than Content-Length told"))));
                    }
                    Some(Ok(())) => return Poll::Ready(None),
                    Some(Err(error)) => return Poll::Ready(Some(Err(io::Error::other(error.clone())))),
                    None => {
                        pipe.reader = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                }
            }
        };
        match next {
            Some(bytes) => self.give(bytes),
            None => self.as_mut().poll_frame(cx),
        }
    }

    /// What PHP writes beyond the told length is nobody's.
    fn is_end_stream(&self) -> bool {
        self.left == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map(SizeHint::with_exact).unwrap_or_default()
    }
}

impl Drop for PipeBody {
    fn drop(&mut self) {
        let mut pipe = self.pipe.borrow_mut();
        pipe.reader_gone = true;
        pipe.queue = Pieces::of_answer();
        pipe.memory.clear();
        wake(&mut pipe.writer);
    }
}
