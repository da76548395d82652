//! What an HTTP/2 connection writes in one turn goes to its client in one piece. h2 flushes behind nearly every frame of an answer, and each time
//! would be a TLS record and a system call of its own, although the answers of several streams are often ready together.

use std::{
    cell::RefCell,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::io::Io;

/// The most that is gathered, beside one frame; TLS makes one record of so much.
const BATCH: usize = 16 * 1024;

/// A handle for hyper, which writes, and one for the connection, which sends at the end of its turn.
#[derive(Clone)]
pub struct Batch(Rc<RefCell<Inner>>);

struct Inner {
    io: Io,
    unsent: BytesMut,
    /// Below, TLS may hold what its socket did not take.
    unflushed: bool,
}

impl Batch {
    pub fn new(io: Io) -> Self {
        Batch(Rc::new(RefCell::new(Inner { io, unsent: BytesMut::new(), unflushed: false })))
    }

    /// Bytes that the client has not acknowledged yet, and such that the kernel has not taken.
    pub fn undelivered(&self) -> usize {
        let inner = self.0.borrow();
        inner.unsent.len() + usize::from(inner.unflushed) + inner.io.undelivered()
    }

    /// Sends what was gathered.
    pub fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().poll_send(cx)
    }
}

impl Inner {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.unsent.has_remaining() {
            match ready!(Pin::new(&mut self.io).poll_write(cx, &self.unsent))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.unsent.advance(n),
            }
            self.unflushed = true;
        }
        // An idle connection holds no buffer.
        self.unsent = BytesMut::new();
        if self.unflushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.unsent.len() >= BATCH {
            ready!(self.poll_send(cx))?;
        }
        let wanted = bufs.iter().map(|buf| buf.len()).sum();
        if wanted >= BATCH && self.unsent.is_empty() {
            self.unflushed = true;
            return Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        }
        bufs.iter().for_each(|buf| self.unsent.extend_from_slice(buf));
        Poll::Ready(Ok(wanted))
    }
}

impl AsyncRead for Batch {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.borrow_mut().io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Batch {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// The connection sends when hyper's turn is over.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        ready!(inner.poll_send(cx))?;
        Pin::new(&mut inner.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, io::Read};

    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::edge::io::{Progress, Stream, Watched};

    async fn pair() -> (Batch, std::net::TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.set_nonblocking(true).unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let progress = Progress::new(1024);
        (Batch::new(Io::new(Stream::Plain(Watched::new(server, progress.clone())), progress)), client)
    }

    #[tokio::test]
    async fn what_is_written_and_flushed_in_a_turn_is_sent_at_its_end_in_one_piece() {
        let (mut batch, mut client) = pair().await;
        for frame in ["head", "data", "tail"] {
            batch.write_all(frame.as_bytes()).await.unwrap();
            batch.flush().await.unwrap();
        }
        let mut read = [0; 64];
        assert_eq!(client.read(&mut read).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        poll_fn(|cx| batch.poll_send(cx)).await.unwrap();
        assert_eq!(client.read(&mut read).unwrap(), 12);
        assert_eq!(&read[..12], b"headdatatail");
        assert_eq!(batch.0.borrow().unsent.capacity(), 0, "nothing is held between the turns");
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_holds_no_more_than_a_batch_and_a_frame() {
        let (mut batch, client) = pair().await;
        let frame = vec![7; BATCH - 1];
        let mut written = 0;
        while let Poll::Ready(n) = poll_fn(|cx| Poll::Ready(Pin::new(&mut batch).poll_write(cx, &frame))).await {
            written += n.unwrap();
            assert!(written < 1 << 30, "it takes everything");
        }
        assert!(batch.0.borrow().unsent.len() < 2 * BATCH);
        // Once read, all of it comes, and nothing twice.
        let reader = std::thread::spawn(move || {
            client.set_nonblocking(false).unwrap();
            let mut all = Vec::new();
            (&client).read_to_end(&mut all).unwrap();
            all
        });
        batch.shutdown().await.unwrap();
        drop(batch);
        let all = reader.join().unwrap();
        assert_eq!((all.len(), all.iter().all(|byte| *byte == 7)), (written, true));
    }
}
