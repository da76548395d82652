//! The streams of an HTTP/2 connection, each a task on the worker of its connection. A stream whose client opens no window for it is reset by
//! itself: hyper waits for the window before it asks for more of an answer, so nothing inside the answer could end it.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::{Rc, Weak},
    task::Poll,
    time::Duration,
};

use tokio::time::{Instant, Sleep};

use super::stall::Stall;

/// How long a client may take over its answers.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub stall: Duration,
    /// Bytes a second, after the first `stall`.
    pub min_rate: u64,
}

/// hyper's executor for one connection. hyper calls the service and then, in the same breath, hands over the task of that stream: so the
/// service says with [`Streams::begin`] whose task comes next.
#[derive(Clone)]
pub struct Streams {
    limits: Limits,
    next: Rc<RefCell<Option<Weak<Stall>>>>,
    /// Told of each stream that is reset.
    stalled: Rc<dyn Fn()>,
}

impl Streams {
    pub fn new(limits: Limits, stalled: impl Fn() + 'static) -> Self {
        Streams { limits, next: Rc::default(), stalled: Rc::new(stalled) }
    }

    /// The answer to come is watched by `stall`, as long as there is one.
    pub fn begin(&self, stall: &Rc<Stall>) {
        *self.next.borrow_mut() = Some(Rc::downgrade(stall));
    }
}

impl<F: Future + 'static> hyper::rt::Executor<F> for Streams
where
    F::Output: 'static,
{
    fn execute(&self, stream: F) {
        let Some(stall) = self.next.borrow_mut().take() else {
            tokio::task::spawn_local(stream);
            return;
        };
        let (limits, stalled) = (self.limits, self.stalled.clone());
        tokio::task::spawn_local(async move {
            if unless_stalled(stream, &stall, limits).await.is_none() {
                stalled();
            }
        });
    }
}

/// Runs `stream` to its end; `None` if its client has had its time. Only a stream that is kept waiting has a timer.
async fn unless_stalled<F: Future>(stream: F, stall: &Weak<Stall>, limits: Limits) -> Option<F::Output> {
    let mut stream = pin!(stream);
    let mut timer: Option<Pin<Box<Sleep>>> = None;
    poll_fn(|cx| {
        if let Poll::Ready(output) = stream.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        loop {
            // Armed only by polling the stream. An answer that is gone has been handed on whole: the rest is the connection's affair.
            let Some(deadline) = stall.upgrade().and_then(|stall| stall.deadline(limits.stall, limits.min_rate)) else {
                return Poll::Pending;
            };
            if deadline <= Instant::now() {
                return Poll::Ready(None);
            }
            let timer = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
            if timer.deadline() != deadline {
                timer.as_mut().reset(deadline);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    })
    .await
}
