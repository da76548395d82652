//! A request body that nobody has read to its end. On HTTP/2 its stream would be reset the moment it is dropped, together with the answer that has just
//! been sent, and clients take that for a failure (curl 7.88 loses one answer in five so, whatever RFC 9113, section 8.1, says). So a small rest is read and
//! thrown away.

use std::{
    cell::RefCell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;

/// Whoever sends more is not waited for, nor is who takes longer.
const MOST_BYTES: usize = 64 << 10;
const LONGEST: Duration = Duration::from_secs(2);

/// Gives the body back when it is dropped before its end.
pub struct Lent {
    body: Option<Incoming>,
    back: Back,
}

#[derive(Clone, Default)]
pub struct Back(Rc<RefCell<Option<Incoming>>>);

impl Lent {
    pub fn new(body: Incoming) -> (Self, Back) {
        let back = Back::default();
        (Lent { body: Some(body), back: back.clone() }, back)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        *self.back.0.borrow_mut() = self.body.take().filter(|body| !body.is_end_stream());
    }
}

impl Back {
    /// Reads what is left of it, within bounds, beside whatever else is done.
    pub fn read_away(self) {
        let Some(mut body) = self.0.take() else { return };
        tokio::task::spawn_local(async move {
            let read = async {
                let mut left = MOST_BYTES;
                while let Some(Ok(frame)) = body.frame().await {
                    match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
                        Some(rest) => left = rest,
                        None => return,
                    }
                }
            };
            let _ = tokio::time::timeout(LONGEST, read).await;
        });
    }
}

impl Body for Lent {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}
