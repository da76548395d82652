//! What the operator sees: metrics, the access log and the log. Nothing here may make a request wait: counters are
//! plain values of one worker, and lines go through a [`sink::LineSink`] that loses them rather than block.

pub mod access_log;
pub mod metrics;
#[cfg(feature = "otlp")]
pub mod otlp;
pub mod php_log;
pub mod seldom;
pub mod sink;
pub mod trace;
pub mod tracing;
