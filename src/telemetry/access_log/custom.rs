//! A line in the operator's own format.

use std::io::Write as _;

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::{Clock, Entry, combined_escape, digits, json_escape, protocol};
use crate::model::{
    log_text::{LogText, LogVariable},
    text::{Piece, argument},
};

pub(super) fn line(out: &mut Vec<u8>, clock: &mut Clock, text: &LogText, entry: &Entry<'_>) {
    let mut value = Vec::new();
    for piece in &text.pieces {
        match piece {
            Piece::Literal(literal) => out.extend_from_slice(literal.as_bytes()),
            Piece::Variable(variable) => {
                value.clear();
                put(&mut value, clock, variable, entry);
                match (text.is_json, value.is_empty()) {
                    // Outside of quotes nothing would be no JSON.
                    (true, true) if out.last() != Some(&b'"') => out.extend_from_slice(b"null"),
                    (true, _) => json_escape(out, &String::from_utf8_lossy(&value)),
                    (false, true) => out.push(b'-'),
                    (false, false) => combined_escape(out, &value),
                }
            }
        }
    }
    out.push(b'\n');
}

/// The plain value; nothing where there is none. Writing to a Vec cannot fail.
fn put(out: &mut Vec<u8>, clock: &mut Clock, variable: &LogVariable, entry: &Entry<'_>) {
    let heads = entry.heads;
    let number = |out: &mut Vec<u8>, value: u64| out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    let seconds = |out: &mut Vec<u8>, value: Option<std::time::Duration>| {
        if let Some(value) = value {
            number(out, value.as_secs());
            out.push(b'.');
            digits::<3>(out, value.subsec_millis());
        }
    };
    let is_request = !entry.method.is_empty();
    match variable {
        LogVariable::RemoteAddr => drop(write!(out, "{}", entry.remote_addr)),
        LogVariable::RemotePort => {
            heads.iter().filter(|heads| heads.remote_port > 0).for_each(|heads| number(out, heads.remote_port.into()))
        }
        LogVariable::RemoteUser => out.extend_from_slice(entry.remote_user.as_bytes()),
        LogVariable::TimeLocal => clock.turn(entry.time).write_common(out),
        LogVariable::TimeIso8601 => clock.turn(entry.time).write_iso8601(out),
        LogVariable::Msec => seconds(out, entry.time.duration_since(std::time::UNIX_EPOCH).ok()),
        LogVariable::Request if is_request => {
            out.extend_from_slice(entry.method.as_bytes());
            out.push(b' ');
            target(out, entry);
            out.push(b' ');
            out.extend_from_slice(protocol(entry.version).as_bytes());
        }
        LogVariable::RequestMethod => out.extend_from_slice(entry.method.as_bytes()),
        LogVariable::RequestUri => target(out, entry),
        LogVariable::Uri => heads.iter().for_each(|heads| out.extend_from_slice(&heads.uri)),
        LogVariable::Args => out.extend_from_slice(entry.query.unwrap_or_default().as_bytes()),
        LogVariable::IsArgs if entry.query.is_some_and(|query| !query.is_empty()) => out.push(b'?'),
        LogVariable::ServerProtocol if is_request => out.extend_from_slice(protocol(entry.version).as_bytes()),
        LogVariable::Request | LogVariable::IsArgs | LogVariable::ServerProtocol | LogVariable::Nothing => {}
        LogVariable::ServerName => out.extend_from_slice(entry.site.as_bytes()),
        LogVariable::ServerAddr => heads.iter().for_each(|heads| drop(write!(out, "{}", heads.server_addr))),
        LogVariable::ServerPort => heads.iter().for_each(|heads| number(out, heads.server_port.into())),
        LogVariable::Host => heads.iter().for_each(|heads| out.extend_from_slice(heads.host.as_bytes())),
        LogVariable::Scheme => {
            heads.iter().for_each(|heads| out.extend_from_slice(if heads.https { b"https" } else { b"http" }));
        }
        LogVariable::Status => number(out, entry.status.into()),
        LogVariable::BodyBytesSent => number(out, entry.bytes_sent),
        LogVariable::RequestBytes => number(out, entry.request_bytes),
        LogVariable::RequestTime => seconds(out, Some(entry.duration)),
        LogVariable::RequestId => out.extend_from_slice(entry.id.as_bytes()),
        LogVariable::UpstreamAddr => entry.endpoint.iter().for_each(|endpoint| drop(write!(out, "{endpoint}"))),
        LogVariable::UpstreamResponseTime => seconds(out, entry.upstream_duration),
        LogVariable::Route => out.extend_from_slice(entry.route.as_bytes()),
        LogVariable::Upstream => out.extend_from_slice(entry.upstream.as_bytes()),
        LogVariable::Set => out.extend_from_slice(entry.set.as_bytes()),
        LogVariable::QueueTime => seconds(out, entry.queue_duration),
        LogVariable::Attempts => number(out, entry.attempts.into()),
        LogVariable::Cause => out.extend_from_slice(entry.cause.as_bytes()),
        LogVariable::Arg(name) => {
            let sent = argument(entry.query.unwrap_or_default(), name);
            out.extend_from_slice(sent.unwrap_or_default().as_bytes());
        }
        LogVariable::Cookie(name) => {
            let line = heads.map(|heads| all(&heads.request, &header::COOKIE, b"; ")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            let value = line.split(';').find_map(|pair| pair.trim().strip_prefix(name.as_str())?.strip_prefix('='));
            out.extend_from_slice(value.unwrap_or_default().as_bytes());
        }
        // Already apart, for every format.
        LogVariable::Header(name) if *name == header::USER_AGENT => out.extend_from_slice(entry.user_agent),
        LogVariable::Header(name) if *name == header::REFERER => out.extend_from_slice(entry.referer),
        LogVariable::Header(name) => heads.iter().for_each(|heads| out.extend_from_slice(&all(&heads.request, name, b", "))),
        LogVariable::Sent(name) => heads.iter().for_each(|heads| out.extend_from_slice(&all(&heads.response, name, b", "))),
    }
}

fn target(out: &mut Vec<u8>, entry: &Entry<'_>) {
    out.extend_from_slice(entry.path.as_bytes());
    if let Some(query) = entry.query {
        out.push(b'?');
        out.extend_from_slice(query.as_bytes());
    }
}

/// Every header of that name.
fn all(headers: &HeaderMap, name: &HeaderName, between: &[u8]) -> Vec<u8> {
    headers.get_all(name).iter().map(HeaderValue::as_bytes).collect::<Vec<_>>().join(between)
}
