//! One request's trace: under which number PHP is asked (W3C Trace Context), and how long each of its steps took. Sent to a collector by `otlp.rs`, where the feature is on.
//!
//! Its spans are made at the end, of the moments that were noted on the way: a request that is not sampled costs a number, and none a lock.

use std::{
    cell::RefCell,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::{sync::mpsc, time::Instant};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// Of one request; its retries have steps of their own.
const MOST_STEPS: usize = 64;

/// Which span of which trace, as `traceparent` says it (W3C Trace Context, section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub trace: u128,
    pub span: u64,
    pub is_sampled: bool,
}

impl Place {
    /// `None`: malformed, and to be treated as if it were not there (section 3.2.2).
    pub fn parse(value: &str) -> Option<Place> {
        let mut parts = value.split('-');
        let [version, trace, span, flags] = [parts.next()?, parts.next()?, parts.next()?, parts.next()?];
        let is_hex = |text: &str, length| text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !(is_hex(version, 2) && is_hex(trace, 32) && is_hex(span, 16) && is_hex(flags, 2)) || version == "ff" {
            return None;
        }
        // More may follow in versions to come.
        if version == "00" && parts.next().is_some() {
            return None;
        }
        let (trace, span) = (u128::from_str_radix(trace, 16).ok()?, u64::from_str_radix(span, 16).ok()?);
        let is_sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
        (trace != 0 && span != 0).then_some(Place { trace, span, is_sampled })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, u8::from(self.is_sampled))
    }
}

/// Of one request, on its worker's thread.
#[derive(Debug)]
pub struct Trace {
    /// This proxy's span: PHP's parent.
    pub place: Place,
    /// Who asked; `None`: it begins here.
    pub parent: Option<u64>,
    steps: RefCell<Vec<Step>>,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    name: &'static str,
    began: Instant,
    ended: Instant,
}

impl Trace {
    /// Goes on with what a trusted proxy began, whatever it decided; begins one else, of which `sample` percent are sampled. What a stranger says is
    /// nobody's parent. `headers` are then as PHP is to see them.
    pub fn begin(headers: &mut HeaderMap, is_trusted: bool, sample: u8) -> Trace {
        let told = headers.get(TRACEPARENT).filter(|_| is_trusted && headers.get_all(TRACEPARENT).iter().count() == 1);
        let parent = told.and_then(|value| Place::parse(value.to_str().ok()?));
        if parent.is_none() {
            headers.remove(TRACESTATE);
        }
        let place = Place {
            trace: parent.map_or_else(|| rand::random::<u128>().max(1), |parent| parent.trace),
            span: rand::random::<u64>().max(1),
            is_sampled: parent.map_or_else(|| rand::random_range(0..100) < sample, |parent| parent.is_sampled),
        };
        if let Ok(value) = HeaderValue::from_str(&place.to_string()) {
            headers.insert(TRACEPARENT, value);
        }
        Trace { place, parent: parent.map(|parent| parent.span), steps: RefCell::default() }
    }

    pub fn step(&self, name: &'static str, began: Instant, ended: Instant) {
        let mut steps = self.steps.borrow_mut();
        if self.place.is_sampled && steps.len() < MOST_STEPS {
            steps.push(Step { name, began, ended: ended.max(began) });
        }
    }

    /// Everything of it, now that it is over; `None` where it is not sampled.
    pub fn finished(
        &self,
        started: Instant,
        now: Instant,
        attributes: Vec<(&'static str, Value)>,
        name: String,
        failed: bool,
    ) -> Option<Finished> {
        if !self.place.is_sampled {
            return None;
        }
        let wall = SystemTime::now();
        let at = |moment: Instant| wall.checked_sub(now.saturating_duration_since(moment)).unwrap_or(wall);
        let steps = self.steps.take().into_iter().map(|step| (step.name, at(step.began), at(step.ended))).collect();
        Some(Finished { place: self.place, parent: self.parent, name, began: at(started), ended: wall, steps, attributes, failed })
    }
}

/// Of an attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Text(String),
    Number(i64),
}

/// A request that is over.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    pub place: Place,
    pub parent: Option<u64>,
    pub name: String,
    pub began: SystemTime,
    pub ended: SystemTime,
    /// Name, beginning and end.
    pub steps: Vec<(&'static str, SystemTime, SystemTime)>,
    /// By OpenTelemetry's semantic conventions where those have a name.
    pub attributes: Vec<(&'static str, Value)>,
    /// Of this proxy's doing, or PHP's: a status from 500.
    pub failed: bool,
}

pub enum Message {
    Trace(Box<Finished>),
    /// Answered when everything before it has been sent, or given up.
    Flush(std::sync::mpsc::SyncSender<()>),
}

/// The way to the exporter; clones share it. What it has no room for is lost and counted.
#[derive(Clone, Debug)]
pub struct Traces {
    sender: mpsc::Sender<Message>,
    lost: Arc<AtomicU64>,
}

impl Traces {
    pub fn new(sender: mpsc::Sender<Message>, lost: Arc<AtomicU64>) -> Traces {
        Traces { sender, lost }
    }

    pub fn send(&self, finished: Finished) {
        if self.sender.try_send(Message::Trace(Box::new(finished))).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Since the start.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits until what has been handed over is delivered, for at most so long. Not for a worker.
    pub fn flush(&self, limit: Duration) {
        let (done, waits) = std::sync::mpsc::sync_channel(1);
        if self.sender.try_send(Message::Flush(done)).is_ok() {
            let _ = waits.recv_timeout(limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn traceparent_is_read_as_the_recommendation_says() {
        let place = Place::parse(PARENT).unwrap();
        assert_eq!((place.trace, place.span), (0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736, 0x00f0_67aa_0ba9_02b7));
        assert!(place.is_sampled);
        assert_eq!(place.to_string(), PARENT);
        assert!(Place::parse("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-comes").is_some(), "a later version");
        for malformed in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(Place::parse(malformed), None, "{malformed}");
        }
    }

    fn told(is_trusted: bool, sample: u8) -> (Trace, HeaderMap) {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, HeaderValue::from_static(PARENT));
        headers.insert(TRACESTATE, HeaderValue::from_static("a=b"));
        (Trace::begin(&mut headers, is_trusted, sample), headers)
    }

    #[test]
    fn a_trusted_proxys_trace_goes_on_and_a_strangers_does_not() {
        let (trace, headers) = told(true, 0);
        assert_eq!((trace.parent, trace.place.is_sampled), (Some(0x00f0_67aa_0ba9_02b7), true));
        assert_eq!(trace.place.trace, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!(headers[TRACEPARENT], *trace.place.to_string());
        assert_eq!(headers[TRACESTATE], "a=b");
        let (trace, headers) = told(false, 0);
        assert_eq!((trace.parent, trace.place.is_sampled), (None, false));
        assert_ne!(trace.place.trace, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!(headers[TRACEPARENT], *trace.place.to_string());
        assert_eq!(headers.get(TRACESTATE), None);
        assert!(told(false, 100).0.place.is_sampled);
    }

    #[test]
    fn what_is_not_sampled_keeps_nothing_and_what_is_has_a_bound() {
        let now = Instant::now();
        for sample in [0, 100] {
            let (trace, _) = told(false, sample);
            (0..1000).for_each(|_| trace.step("send", now, now));
            let finished = trace.finished(now, now, Vec::new(), String::new(), false);
            assert_eq!(finished.map(|finished| finished.steps.len()), (sample == 100).then_some(MOST_STEPS));
        }
    }
}
