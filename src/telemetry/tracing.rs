//! The log: text or JSON lines on stderr, with a level that a reload can change. The access log owns stdout.
//!
//! Lines go through a [`LineSink`]: a stderr that nobody reads loses lines, it never stops a worker.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use tracing::Subscriber;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt::MakeWriter, layer::SubscriberExt, registry::LookupSpan, reload};

use super::sink::{LineSink, Target};
use crate::model::settings::LogFormat;

/// Words that stand for a level; anything else without `=` is a typing error, though `EnvFilter` would take it for the
/// name of a module and turn that to trace.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// A started log.
pub struct Log {
    sink: LineSink,
    filter: reload::Handle<EnvFilter, Registry>,
}

/// Starts the log on stderr for the whole process. `level` is a level or a filter: "info",
/// "slackwater=debug,info". Errors: the filter does not parse, or there already is a subscriber.
pub fn init(format: LogFormat, level: &str) -> Result<Log, String> {
    let json = match format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !io::stderr().is_terminal(),
    };
    let filter = filter(level)?;
    let sink = LineSink::start("log", Target::Stderr).map_err(|error| format!("cannot start the log: {error}"))?;
    let (subscriber, handle) = subscriber(json, !json && io::stderr().is_terminal(), filter, sink.clone());
    tracing::subscriber::set_global_default(subscriber).map_err(|error| error.to_string())?;
    Ok(Log { sink, filter: handle })
}

/// Whether `level` would be accepted by [`init`] and [`Log::set_level`].
pub fn check_level(level: &str) -> Result<(), String> {
    filter(level).map(drop)
}

impl Log {
    /// Changes what is logged, from the next event on. On an error the old filter stays.
    pub fn set_level(&self, level: &str) -> Result<(), String> {
        self.filter.reload(filter(level)?).map_err(|error| error.to_string())
    }

    /// Lines lost because stderr was not read.
    pub fn lost(&self) -> u64 {
        self.sink.lost()
    }

    /// Writes what is queued; false if the deadline came first. The last thing before exit: later events are lost.
    pub fn flush_and_stop(&self, deadline: Duration) -> bool {
        self.sink.flush_and_stop(deadline)
    }
}

/// Whether [`Log::set_level`] would take it.
pub fn check(level: &str) -> Result<(), String> {
    filter(level).map(drop)
}

fn filter(level: &str) -> Result<EnvFilter, String> {
    for part in level.split(',').map(str::trim) {
        let is_level = LEVELS.iter().any(|known| known.eq_ignore_ascii_case(part));
        if !is_level && !part.contains('=') {
            return Err(format!(
                "`{part}` is not a level; write one of {}, or a filter as in \"slackwater=debug,info\"",
                LEVELS.join(", ")
            ));
        }
    }
    // What the Kubernetes client says by itself of a lost connection we say once, with what follows from it; unless it is asked for.
    let level = if level.contains("kube_") { level.to_owned() } else { format!("{level},kube_client=off,kube_runtime=off") };
    EnvFilter::try_new(&level).map_err(|error| format!("`{level}` is not a filter: {error}"))
}

fn subscriber(
    json: bool,
    colour: bool,
    filter: EnvFilter,
    sink: LineSink,
) -> (impl Subscriber + for<'a> LookupSpan<'a> + Send + Sync, reload::Handle<EnvFilter, Registry>) {
    let (filter, handle) = reload::Layer::new(filter);
    let fmt = tracing_subscriber::fmt::layer().with_writer(ToSink { sink, one_line: !json });
    let fmt = if json {
        fmt.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
    } else {
        fmt.with_ansi(colour).boxed()
    };
    (Registry::default().with(filter).with(fmt), handle)
}

#[derive(Clone)]
struct ToSink {
    sink: LineSink,
    one_line: bool,
}

impl<'a> MakeWriter<'a> for ToSink {
    type Writer = ToSink;

    fn make_writer(&'a self) -> ToSink {
        self.clone()
    }
}

impl io::Write for ToSink {
    /// The formatter hands over one event a call.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = if self.one_line { one_line(event) } else { event.to_vec() };
        self.sink.push(line, 1);
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A line break inside a text event would let whoever wrote it (FPM's stderr, a header) forge log lines. JSON escapes
/// by itself.
fn one_line(event: &[u8]) -> Vec<u8> {
    let body = event.strip_suffix(b"\n").unwrap_or(event);
    let mut line = Vec::with_capacity(event.len() + 8);
    for &byte in body {
        match byte {
            b'\n' => line.extend_from_slice(b"\\n"),
            b'\r' => line.extend_from_slice(b"\\r"),
            _ => line.push(byte),
        }
    }
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(json: bool, level: &str, run: impl FnOnce(&reload::Handle<EnvFilter, Registry>)) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let sink = LineSink::start("log", Target::File(path.clone())).unwrap();
        let (subscriber, handle) = subscriber(json, false, filter(level).unwrap(), sink.clone());
        tracing::subscriber::with_default(subscriber, || run(&handle));
        assert!(sink.flush_and_stop(Duration::from_secs(5)));
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn json_has_the_named_fields_and_one_line_an_event() {
        let text = logged(true, "info", |_| {
            tracing::info!(upstream = "php", "two\nlines \"quoted\"");
            tracing::debug!("not seen");
        });
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 1, "{text}");
        let value: serde_json::Value = serde_json::from_str(lines[0]).unwrap();
        assert_eq!(value["level"], "INFO");
        assert_eq!(value["message"], "two\nlines \"quoted\"");
        assert_eq!(value["upstream"], "php");
        assert!(value["target"].is_string() && value["timestamp"].is_string());
    }

    #[test]
    fn a_text_event_cannot_forge_a_line() {
        let text = logged(false, "info", |_| tracing::warn!("said: {}", "x\r\n2026 ERROR forged"));
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("WARN"), "{text}");
    }

    #[test]
    fn the_level_changes_while_running() {
        let text = logged(false, "warn", |handle| {
            tracing::info!("before");
            handle.reload(filter("debug").unwrap()).unwrap();
            tracing::debug!("after");
        });
        assert!(!text.contains("before") && text.contains("after"), "{text}");
    }

    #[test]
    fn a_misspelt_level_is_refused() {
        assert!(check_level("inof").unwrap_err().contains("`inof`"));
        assert!(check_level("").is_err());
        assert!(check_level("slackwater=debug,inof").is_err());
        assert!(check_level("slackwater=loud").is_err());
        for good in ["info", "OFF", "slackwater=debug,info", "hyper=warn, trace"] {
            assert_eq!(check_level(good), Ok(()), "{good}");
        }
    }
}
