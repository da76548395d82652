//! The body of an answer, whatever it comes from. Its end, or its drop, is the end of the request.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::{files::FileBody, inflight::Finish, pipe::PipeBody};

pub enum Content {
    Empty,
    Whole(Option<Bytes>),
    Pipe(PipeBody),
    File(FileBody),
}

impl From<String> for Content {
    fn from(text: String) -> Self {
        Content::Whole(Some(Bytes::from(text)))
    }
}

pub struct Answer {
    content: Content,
    finish: Finish,
}

impl Answer {
    pub fn new(content: Content, finish: Finish) -> Self {
        Answer { content, finish }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let frame = match &mut self.content {
            Content::Empty => Poll::Ready(None),
            Content::Whole(bytes) => Poll::Ready(bytes.take().filter(|b| !b.is_empty()).map(|b| Ok(Frame::data(b)))),
            Content::Pipe(pipe) => Pin::new(pipe).poll_frame(cx),
            Content::File(file) => Pin::new(file).poll_frame(cx),
        };
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
        match &self.content {
            Content::Empty => true,
            Content::Whole(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Content::Pipe(pipe) => pipe.is_end_stream(),
            Content::File(file) => file.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Empty => SizeHint::with_exact(0),
            Content::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Content::Pipe(pipe) => pipe.size_hint(),
            Content::File(file) => file.size_hint(),
        }
    }
}
