//! One line a request: JSON, Nginx's `combined`, or a format of the operator's.
//!
//! Each worker formats into a buffer of its own and hands whole batches to the [`LineSink`]; what the sink has no room
//! for is lost and counted. Every value that a client chose is escaped, so that no request can forge a line.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use http::HeaderMap;

use super::sink::LineSink;
pub use super::sink::Target;
use crate::model::{
    Address,
    settings::{AccessFormat, Log},
};

mod custom;

/// A worker's buffer goes to the writer when it holds this much, or at the next [`Writer::tick`].
pub const FLUSH_BYTES: usize = 16 << 10;

/// One finished request; without a method, what was refused before it was one. Empty strings and `None` become `null` in JSON and `-` in `combined`.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    pub time: SystemTime,
    pub id: &'a str,
    pub site: &'a str,
    /// Its path as the configuration has it; "": the site's own keys.
    pub route: &'a str,
    pub remote_addr: IpAddr,
    /// The name of HTTP basic auth.
    pub remote_user: &'a str,
    pub method: &'a str,
    /// As the client sent it, without the query.
    pub path: &'a str,
    pub query: Option<&'a str>,
    pub version: http::Version,
    /// 499: the client left before the answer.
    pub status: u16,
    /// Of the response body.
    pub bytes_sent: u64,
    /// Of the request body.
    pub request_bytes: u64,
    pub duration: Duration,
    pub upstream: &'a str,
    pub set: &'a str,
    pub endpoint: Option<&'a Address>,
    /// From the dispatch to FPM's last byte; `None`: never dispatched.
    pub upstream_duration: Option<Duration>,
    pub queue_duration: Option<Duration>,
    pub attempts: u32,
    /// The `cause` of `slackwater_errors_total`.
    pub cause: &'a str,
    pub user_agent: &'a [u8],
    pub referer: &'a [u8],
    /// Where the format asks for it.
    pub heads: Option<&'a Heads>,
}

/// What a format of the operator's may ask for besides.
#[derive(Clone, Debug)]
pub struct Heads {
    /// As the client sees it.
    pub host: String,
    pub https: bool,
    pub server_addr: IpAddr,
    pub server_port: u16,
    /// 0: not known, behind a proxy.
    pub remote_port: u16,
    /// Normalized, and rewritten.
    pub uri: Vec<u8>,
    pub request: HeaderMap,
    pub response: HeaderMap,
}

struct Shared {
    sink: LineSink,
    format: ArcSwap<Format>,
}

struct Format {
    access: AccessFormat,
    /// Percent of what was answered below 400.
    sample: u8,
}

impl Format {
    fn of(log: &Log) -> ArcSwap<Self> {
        ArcSwap::from_pointee(Format { access: log.access.clone(), sample: log.access_sample })
    }

    /// What went wrong is always logged.
    fn takes(&self, entry: &Entry<'_>) -> bool {
        let is_well = entry.status < 400 && entry.cause.is_empty();
        !is_well || self.sample >= 100 || rand::random_range(0..100) < self.sample
    }
}

/// The access log of the process; clones share it.
#[derive(Clone)]
pub struct AccessLog(Arc<Shared>);

impl AccessLog {
    /// Opens the target and starts the writer thread. Errors: the file cannot be opened.
    pub fn start(log: &Log, target: Target) -> io::Result<AccessLog> {
        let sink = LineSink::start("access-log", target)?;
        Ok(AccessLog(Arc::new(Shared { sink, format: Format::of(log) })))
    }

    /// A buffer for one worker.
    pub fn writer(&self) -> Writer {
        Writer { shared: Arc::clone(&self.0), state: Mutex::default() }
    }

    /// Opens the file again after a rotation (USR1). Touches the file system: not for a worker.
    pub fn reopen(&self) -> io::Result<()> {
        self.0.sink.reopen()
    }

    pub fn set_format(&self, log: &Log) {
        self.0.format.store(Format::of(log).into_inner());
    }

    /// Turns to another file; on an error the old one stays. Touches the file system: not for a worker.
    pub fn set_target(&self, target: Target) -> io::Result<()> {
        self.0.sink.set_target(target)
    }

    /// Lines lost so far, for `slackwater_access_log_lost_total`.
    pub fn lost(&self) -> u64 {
        self.0.sink.lost()
    }

    /// Writes what the workers have handed over, and ends the writer; false if the deadline came first. The workers'
    /// writers must have been dropped or flushed before.
    pub fn flush_and_stop(&self, deadline: Duration) -> bool {
        self.0.sink.flush_and_stop(deadline)
    }
}

/// The access log of one worker. The mutex is there for `Sync` alone: nobody else takes it.
pub struct Writer {
    shared: Arc<Shared>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    buffer: Vec<u8>,
    lines: u64,
    clock: Clock,
}

impl Writer {
    /// Whether entries are to have their `heads`.
    pub fn needs_heads(&self) -> bool {
        matches!(&self.shared.format.load().access, AccessFormat::Custom(text) if text.needs_heads)
    }

    /// Whether lines are written at all.
    pub fn is_on(&self) -> bool {
        self.shared.format.load().access != AccessFormat::Off
    }

    /// Formats one line. Never blocks.
    pub fn log(&self, entry: &Entry<'_>) {
        let format = self.shared.format.load();
        if format.access == AccessFormat::Off || !format.takes(entry) {
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { buffer, lines, clock } = &mut *state;
        if buffer.capacity() == 0 {
            // Room for the line that goes over the mark.
            buffer.reserve(FLUSH_BYTES + 1024);
        }
        match &format.access {
            AccessFormat::Off => {}
            AccessFormat::Json => json(buffer, clock, entry),
            AccessFormat::Combined => combined(buffer, clock, entry),
            AccessFormat::Custom(text) => custom::line(buffer, clock, text, entry),
        }
        *lines += 1;
        if buffer.len() >= FLUSH_BYTES {
            self.flush(&mut state);
        }
    }

    /// Hands over what has been waiting; the worker calls it about every 100 ms.
    pub fn tick(&self) {
        self.flush(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn flush(&self, state: &mut State) {
        if state.lines > 0 {
            self.shared.sink.push(std::mem::take(&mut state.buffer), std::mem::take(&mut state.lines));
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.tick();
    }
}

fn json(out: &mut Vec<u8>, clock: &mut Clock, entry: &Entry<'_>) {
    out.extend_from_slice(b"{\"time\":\"");
    clock.turn(entry.time).write_rfc3339(out);
    out.push(b'"');
    json_text(out, "id", entry.id);
    json_text(out, "site", entry.site);
    json_text(out, "route", entry.route);
    // Writing to a Vec cannot fail.
    let _ = write!(out, ",\"remote_addr\":\"{}\"", entry.remote_addr);
    json_text(out, "remote_user", entry.remote_user);
    json_text(out, "method", entry.method);
    json_text(out, "path", entry.path);
    json_text(out, "query", entry.query.unwrap_or_default());
    json_text(out, "protocol", if entry.method.is_empty() { "" } else { protocol(entry.version) });
    json_number(out, "status", u64::from(entry.status));
    json_number(out, "bytes_sent", entry.bytes_sent);
    json_number(out, "request_bytes", entry.request_bytes);
    json_seconds(out, "seconds", Some(entry.duration));
    json_text(out, "upstream", entry.upstream);
    json_text(out, "set", entry.set);
    match entry.endpoint {
        Some(endpoint) => {
            out.extend_from_slice(b",\"endpoint\":\"");
            let _ = write!(JsonEscape(out), "{endpoint}");
            out.push(b'"');
        }
        None => json_text(out, "endpoint", ""),
    }
    json_seconds(out, "upstream_seconds", entry.upstream_duration);
    json_seconds(out, "queue_seconds", entry.queue_duration);
    json_number(out, "attempts", u64::from(entry.attempts));
    json_text(out, "cause", entry.cause);
    json_bytes(out, "user_agent", entry.user_agent);
    json_bytes(out, "referer", entry.referer);
    out.extend_from_slice(b"}\n");
}

fn json_key(out: &mut Vec<u8>, key: &str) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(key.as_bytes());
    out.extend_from_slice(b"\":");
}

fn json_text(out: &mut Vec<u8>, key: &str, value: &str) {
    json_key(out, key);
    if value.is_empty() {
        out.extend_from_slice(b"null");
        return;
    }
    out.push(b'"');
    json_escape(out, value);
    out.push(b'"');
}

/// Bytes that are no UTF-8 become U+FFFD: JSON has no other place for them.
fn json_bytes(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    if let Ok(text) = str::from_utf8(value) {
        return json_text(out, key, text);
    }
    json_key(out, key);
    out.push(b'"');
    for chunk in value.utf8_chunks() {
        json_escape(out, chunk.valid());
        if !chunk.invalid().is_empty() {
            out.extend_from_slice("\u{fffd}".as_bytes());
        }
    }
    out.push(b'"');
}

fn json_number(out: &mut Vec<u8>, key: &str, value: u64) {
    json_key(out, key);
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

fn json_seconds(out: &mut Vec<u8>, key: &str, value: Option<Duration>) {
    json_key(out, key);
    match value {
        Some(value) => {
            out.extend_from_slice(itoa::Buffer::new().format(value.as_secs()).as_bytes());
            out.push(b'.');
            digits::<6>(out, value.subsec_micros());
        }
        None => out.extend_from_slice(b"null"),
    }
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// RFC 8259, section 7. DEL, the C1 controls and the two line separators need no escape there, but terminals and JavaScript act on them.
fn json_escape(out: &mut Vec<u8>, text: &str) {
    let is_plain = |byte: u8| byte >= 0x20 && byte != b'"' && byte != b'\\' && byte != 0x7f;
    let mut plain = 0;
    for (at, c) in text.char_indices() {
        let is_fine = if c.is_ascii() { is_plain(c as u8) } else { !matches!(c, '\u{80}'..='\u{9f}' | '\u{2028}' | '\u{2029}') };
        if is_fine {
            continue;
        }
        out.extend_from_slice(&text.as_bytes()[plain..at]);
        plain = at + c.len_utf8();
        match c {
            '"' | '\\' => out.extend_from_slice(&[b'\\', c as u8]),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            c => {
                let code = u32::from(c);
                let digit = |shift: u32| HEX[usize::try_from(code >> shift & 15).unwrap_or_default()];
                out.extend_from_slice(&[b'\\', b'u', digit(12), digit(8), digit(4), digit(0)]);
            }
        }
    }
    out.extend_from_slice(&text.as_bytes()[plain..]);
}

struct JsonEscape<'a>(&'a mut Vec<u8>);

impl std::fmt::Write for JsonEscape<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        json_escape(self.0, text);
        Ok(())
    }
}

/// Nginx's `combined`; the time is UTC.
fn combined(out: &mut Vec<u8>, clock: &mut Clock, entry: &Entry<'_>) {
    let _ = write!(out, "{} - ", entry.remote_addr);
    combined_value(out, entry.remote_user.as_bytes());
    out.extend_from_slice(b" [");
    clock.turn(entry.time).write_common(out);
    out.extend_from_slice(b"] \"");
    if !entry.method.is_empty() {
        combined_escape(out, entry.method.as_bytes());
        out.push(b' ');
        combined_escape(out, entry.path.as_bytes());
        if let Some(query) = entry.query {
            out.push(b'?');
            combined_escape(out, query.as_bytes());
        }
        out.push(b' ');
        out.extend_from_slice(protocol(entry.version).as_bytes());
    }
    out.extend_from_slice(b"\" ");
    out.extend_from_slice(itoa::Buffer::new().format(entry.status).as_bytes());
    out.push(b' ');
    out.extend_from_slice(itoa::Buffer::new().format(entry.bytes_sent).as_bytes());
    out.extend_from_slice(b" \"");
    combined_value(out, entry.referer);
    out.extend_from_slice(b"\" \"");
    combined_value(out, entry.user_agent);
    out.extend_from_slice(b"\"\n");
}

fn combined_value(out: &mut Vec<u8>, value: &[u8]) {
    if value.is_empty() { out.push(b'-') } else { combined_escape(out, value) }
}

/// As `ngx_http_log_escape` does: `\xXX` for `"`, `\`, controls and everything from 0x7f on.
fn combined_escape(out: &mut Vec<u8>, value: &[u8]) {
    for &byte in value {
        if (0x20..0x7f).contains(&byte) && byte != b'"' && byte != b'\\' {
            out.push(byte);
        } else {
            let upper = |digit: u8| HEX[usize::from(digit)].to_ascii_uppercase();
            out.extend_from_slice(&[b'\\', b'x', upper(byte >> 4), upper(byte & 15)]);
        }
    }
}

fn protocol(version: http::Version) -> &'static str {
    match version {
        http::Version::HTTP_09 => "HTTP/0.9",
        http::Version::HTTP_10 => "HTTP/1.0",
        http::Version::HTTP_2 => "HTTP/2.0",
        http::Version::HTTP_3 => "HTTP/3.0",
        _ => "HTTP/1.1",
    }
}

/// `value` with N digits; what does not fit is cut at the front.
fn digits<const N: usize>(out: &mut Vec<u8>, mut value: u32) {
    let mut text = [b'0'; N];
    for digit in text.iter_mut().rev() {
        *digit = b'0' + u8::try_from(value % 10).unwrap_or_default();
        value /= 10;
    }
    out.extend_from_slice(&text);
}

/// The last second formatted: at thousands of lines a second the calendar is worked out once.
#[derive(Default)]
struct Clock {
    second: Option<u64>,
    millis: u32,
    /// `2026-11-02T12:34:56`
    iso: Vec<u8>,
    /// `02/Nov/2026:12:34:56 +0000`
    common: Vec<u8>,
}

impl Clock {
    fn turn(&mut self, time: SystemTime) -> &Self {
        // A clock before 1970 shows as 1970.
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.millis = since.subsec_millis();
        if self.second != Some(since.as_secs()) {
            self.second = Some(since.as_secs());
            self.format(since.as_secs());
        }
        self
    }

    fn format(&mut self, second: u64) {
        const MONTHS: [&[u8; 3]; 12] =
            [b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec"];
        let (year, month, day) = civil(second / 86_400);
        let small = |value: u64| u32::try_from(value).unwrap_or_default();
        let (hour, minute, rest) = (small(second / 3_600 % 24), small(second / 60 % 60), small(second % 60));
        let time = |out: &mut Vec<u8>| {
            digits::<2>(out, hour);
            out.push(b':');
            digits::<2>(out, minute);
            out.push(b':');
            digits::<2>(out, rest);
        };
        self.iso.clear();
        digits::<4>(&mut self.iso, year);
        self.iso.push(b'-');
        digits::<2>(&mut self.iso, month);
        self.iso.push(b'-');
        digits::<2>(&mut self.iso, day);
        self.iso.push(b'T');
        time(&mut self.iso);
        self.common.clear();
        digits::<2>(&mut self.common, day);
        self.common.push(b'/');
        let name = usize::try_from(month).ok().and_then(|month| MONTHS.get(month.wrapping_sub(1)));
        self.common.extend_from_slice(name.copied().unwrap_or(b"Jan"));
        self.common.push(b'/');
        digits::<4>(&mut self.common, year);
        self.common.push(b':');
        time(&mut self.common);
        self.common.extend_from_slice(b" +0000");
    }

    fn write_rfc3339(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.iso);
        out.push(b'.');
        digits::<3>(out, self.millis);
        out.push(b'Z');
    }

    fn write_iso8601(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.iso);
        out.extend_from_slice(b"+00:00");
    }

    fn write_common(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.common);
    }
}

/// Days since 1970 to year, month, day (Howard Hinnant, "chrono-compatible low-level date algorithms", civil_from_days).
pub fn civil(days: u64) -> (u32, u32, u32) {
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    (small(year), small(month), small(day))
}

#[cfg(test)]
mod tests;
