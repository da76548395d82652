//! The body of an answer, whatever it comes from. Its end, or its drop, is the end of the request.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tower_http::compression::CompressionBody;

use super::{files::FileBody, inflight::Finish, pace::Pace, pipe::PipeBody};

#[derive(Default)]
pub enum Content {
    #[default]
    Empty,
    Whole(Option<Bytes>),
    Pipe(PipeBody),
    File(FileBody),
    Compressed(Pin<Box<CompressionBody<Content>>>),
}

/// An answer that is to reach its client as PHP writes it.
#[derive(Clone, Copy, Debug)]
pub struct AsItComes;

/// So many pieces of a compressed answer in one go, some KiB each; then the worker looks after others.
const PIECES_AT_ONCE: u8 = 1;

impl Content {
    /// All of it, where it is all here.
    pub fn in_memory(&self) -> Option<&Bytes> {
        match self {
            Content::Whole(Some(bytes)) | Content::File(FileBody::Whole(bytes)) => Some(bytes),
            _ => None,
        }
    }

    /// Nothing of it is left to be sent.
    pub fn is_over(&self) -> bool {
        match self {
            Content::Empty => true,
            Content::Whole(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Content::Pipe(pipe) => pipe.is_end_stream(),
            Content::File(file) => file.is_end_stream(),
            Content::Compressed(body) => body.is_end_stream(),
        }
    }
}

impl Body for Content {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match self.get_mut() {
            Content::Empty => Poll::Ready(None),
            Content::Whole(bytes) => Poll::Ready(bytes.take().filter(|b| !b.is_empty()).map(|b| Ok(Frame::data(b)))),
            Content::Pipe(pipe) => Pin::new(pipe).poll_frame(cx),
            Content::File(file) => Pin::new(file).poll_frame(cx),
            Content::Compressed(body) => body.as_mut().poll_frame(cx).map(|next| next.map(|frame| frame.map_err(io::Error::other))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_over()
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Content::Empty => SizeHint::with_exact(0),
            Content::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Content::Pipe(pipe) => pipe.size_hint(),
            Content::File(file) => file.size_hint(),
            Content::Compressed(body) => body.size_hint(),
        }
    }
}

impl From<String> for Content {
    fn from(text: String) -> Self {
        Content::Whole(Some(Bytes::from(text)))
    }
}

pub struct Answer {
    content: Content,
    /// `None`: as fast as the client takes it.
    pace: Option<Pace>,
    /// Of a compressed answer, since the worker has last looked after others.
    pieces: u8,
    finish: Finish,
}

impl Answer {
    pub fn new(content: Content, pace: Option<Pace>, finish: Finish) -> Self {
        Answer { content, pace, pieces: 0, finish }
    }

    fn kept(&self) -> u64 {
        self.pace.as_ref().map_or(0, |pace| pace.kept() as u64)
    }

    fn poll_content(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if matches!(self.content, Content::Compressed(_)) {
            self.pieces += 1;
            if self.pieces > PIECES_AT_ONCE {
                self.pieces = 0;
                // Not a plain wake: that would come before what the sockets have to say.
                let _ = std::pin::pin!(tokio::task::yield_now()).poll(cx);
                return Poll::Pending;
            }
        }
        Pin::new(&mut self.content).poll_frame(cx)
    }

    fn poll_paced(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if let Some(pace) = &mut self.pace
            && let Some(bytes) = ready!(pace.poll_due(cx))
        {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        let frame = ready!(self.poll_content(cx));
        Poll::Ready(match (frame, &mut self.pace) {
            (Some(Ok(frame)), Some(pace)) => Some(Ok(frame.map_data(|bytes| pace.part(bytes)))),
            (frame, _) => frame,
        })
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let frame = self.poll_paced(cx);
        match &frame {
            Poll::Ready(Some(Ok(frame))) => self.finish.sent(frame.data_ref().map_or(0, Bytes::len)),
            Poll::Ready(Some(Err(error))) => self.finish.broken(error),
            Poll::Ready(None) => self.finish.whole(),
            Poll::Pending => {}
        }
        // hyper does not ask again for what it knows to be over.
        if self.is_end_stream() {
            self.finish.whole();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.kept() == 0 && self.content.is_over()
    }

    fn size_hint(&self) -> SizeHint {
        let hint = self.content.size_hint();
        match (self.kept(), hint.exact()) {
            (0, _) => hint,
            (kept, Some(exact)) => SizeHint::with_exact(exact + kept),
            (_, None) => SizeHint::default(),
        }
    }
}
