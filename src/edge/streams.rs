//! The streams of an HTTP/2 connection, each a task on the worker of its connection. A stream whose client opens no window for it is reset by
//! itself: hyper waits for the window before it asks for more of an answer, so nothing inside the answer could end it.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::{Rc, Weak},
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep};

use super::stall::Stall;
use crate::model::clock;

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

/// Runs `stream` to its end; `None` if its client has had its time. Only a stream that waits has a timer.
async fn unless_stalled<F: Future>(stream: F, stall: &Weak<Stall>, limits: Limits) -> Option<F::Output> {
    let mut stream = pin!(stream);
    let mut timer: Option<Pin<Box<Sleep>>> = None;
    let mut look = |cx: &mut Context<'_>| {
        if let Poll::Ready(output) = stream.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        let wanted = clock::wanted();
        loop {
            // Armed only by polling the stream. An answer that is gone has been handed on whole: the rest is the connection's affair.
            let stalled = stall.upgrade().and_then(|stall| stall.deadline(limits.stall, limits.min_rate));
            if stalled.is_some_and(|deadline| deadline <= Instant::now()) {
                return Poll::Ready(None);
            }
            let Some(due) = stalled.into_iter().chain(wanted).min() else { return Poll::Pending };
            let timer = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
            if timer.deadline() != due {
                timer.as_mut().reset(due);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if wanted.is_some_and(|wanted| wanted <= Instant::now()) {
                // Whoever wants it finds that its time has come.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    };
    poll_fn(|cx| clock::once(|| look(cx))).await
}
