//! The status page of the ops port, and the stream of events that keeps it new: each second, and at each change of phase, what `/status` says and how much is going on.
//!
//! All readers get the same document, and nothing is counted for them while there are none.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    pin::Pin,
    rc::Rc,
    sync::{Arc, LazyLock},
    task::{Context, Poll},
    time::Duration,
};

use aws_lc_rs::digest;
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http_body::{Body, Frame};
use serde_json::{Value, json};
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};

use super::{Control, status};
use crate::telemetry::metrics::SiteTotals;

/// One file, and nothing from elsewhere.
pub const PAGE: &str = include_str!("page.html");

/// Whoever has found a way to put something into the page cannot make it run, nor send anything away.
pub static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |tag: &str| {
        let text = PAGE.split_once(&format!("<{tag}>")).and_then(|(_, rest)| rest.split_once(&format!("</{tag}>")));
        let digest = digest::digest(&digest::SHA256, text.map_or("", |(inner, _)| inner).as_bytes());
        format!("'sha256-{}'", STANDARD.encode(digest))
    };
    format!(
        "default-src 'none'; style-src {}; script-src {}; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash("style"),
        hash("script")
    )
});

const EVERY: Duration = Duration::from_secs(1);
/// Rates and percentiles are those of so long.
const WINDOW: Duration = Duration::from_secs(10);
/// Readers at once; the kubelet's checks need the port too.
const MOST_READERS: usize = 8;
/// A reader that has not taken so many documents has gone, and nobody has said so.
const MOST_MISSED: u32 = 30;
/// Documents that wait for one reader.
const WAITING: usize = 2;

struct Reader {
    sender: mpsc::Sender<Bytes>,
    missed: u32,
}

/// Of the ops port's thread.
pub struct Feed {
    control: Arc<Control>,
    readers: RefCell<Vec<Reader>>,
    wanted: Notify,
}

impl Feed {
    pub fn new(control: Arc<Control>) -> Rc<Feed> {
        Rc::new(Feed { control, readers: RefCell::default(), wanted: Notify::new() })
    }

    /// `None`: there are too many.
    pub fn subscribe(&self) -> Option<Events> {
        let mut readers = self.readers.borrow_mut();
        readers.retain(|reader| !reader.sender.is_closed());
        if readers.len() >= MOST_READERS {
            return None;
        }
        let (sender, receiver) = mpsc::channel(WAITING);
        // Sooner than a browser would by itself: a new process may be there already.
        let _ = sender.try_send(Bytes::from_static(b"retry: 2000\n\n"));
        readers.push(Reader { sender, missed: 0 });
        self.wanted.notify_one();
        Some(Events(receiver))
    }

    /// Until its task is dropped.
    pub async fn run(self: Rc<Self>) {
        let mut history = VecDeque::new();
        loop {
            self.readers.borrow_mut().retain(|reader| !reader.sender.is_closed() && reader.missed < MOST_MISSED);
            if self.readers.borrow().is_empty() {
                history.clear();
                self.wanted.notified().await;
            }
            let event = Bytes::from(format!("event: status\ndata: {}\n\n", self.document(&mut history)));
            for reader in &mut *self.readers.borrow_mut() {
                reader.missed = if reader.sender.try_send(event.clone()).is_ok() { 0 } else { reader.missed + 1 };
            }
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = self.wanted.notified() => {}
                () = self.control.news.notified() => {}
            }
        }
    }

    fn document(&self, history: &mut VecDeque<(Instant, BTreeMap<Arc<str>, SiteTotals>)>) -> Value {
        let (now, sites) = (Instant::now(), self.control.metrics.sites());
        let mut document = status::status(&self.control);
        if let Some((from, before)) = history.front() {
            let seconds = now.saturating_duration_since(*from).as_secs_f64();
            document["live"] =
                json!({ "window_seconds": (seconds * 10.0).round() / 10.0, "sites": rates(&sites, before, seconds) });
        }
        // One each half second, however many readers come: each has a map of all sites.
        if history.back().is_none_or(|(last, _)| now.saturating_duration_since(*last) >= EVERY / 2) {
            history.push_back((now, sites));
        }
        while history.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) >= WINDOW) {
            history.pop_front();
        }
        document
    }
}

fn rates(sites: &BTreeMap<Arc<str>, SiteTotals>, before: &BTreeMap<Arc<str>, SiteTotals>, seconds: f64) -> Vec<Value> {
    let none = SiteTotals::default();
    let of = |(site, totals): (&Arc<str>, &SiteTotals)| {
        let during = totals.since(before.get(site).unwrap_or(&none));
        let milliseconds = |part| during.quantile(part).map(|seconds| seconds * 1000.0);
        json!({
            "site": &**site,
            "requests_per_second": during.requests() as f64 / seconds,
            "server_errors_per_second": during.server_errors as f64 / seconds,
            "p50_ms": milliseconds(0.5),
            "p95_ms": milliseconds(0.95),
            "p99_ms": milliseconds(0.99),
        })
    };
    // What was refused before its site was known has none.
    sites.iter().filter(|(site, _)| !site.is_empty()).map(of).collect()
}

/// The body of `/events`, until its reader leaves.
pub struct Events(mpsc::Receiver<Bytes>);

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|event| event.map(|event| Ok(Frame::data(event))))
    }
}
