//! Text with variables, from a value of the file.

use http::HeaderName;

use super::reader::{Value, nearest};
use crate::model::{
    log_text::{LogText, LogVariable, NAMES as LOG_NAMES},
    text::{NAMES, Part, Piece, Text, Variable, parts},
};

/// `captures`: the names of the groups that the route's expression has, besides their numbers.
pub fn text(v: &Value<'_>, captures: &[String]) -> Option<Text> {
    let source = v.text()?;
    Some(Text { source: source.to_owned(), pieces: pieces(v, source, |name| variable(v, name, captures))? })
}

/// The format of a line of the access log.
pub fn log_text(v: &Value<'_>) -> Option<LogText> {
    let source = v.text()?;
    if source.chars().any(char::is_control) {
        return v.refuse("has a line break or another control character", "write it in one line");
    }
    let pieces = pieces(v, source, |name| log_variable(v, name))?;
    if source.starts_with('{') {
        let mut in_quotes = false;
        for piece in &pieces {
            match piece {
                Piece::Literal(literal) => in_quotes ^= literal.matches('"').count() % 2 == 1,
                Piece::Variable(variable) if !in_quotes && !variable.is_number() => {
                    return v.refuse(
                        "has a variable outside of quotes that is no number",
                        "write it as in '{\"uri\":\"$request_uri\"}'",
                    );
                }
                Piece::Variable(_) => {}
            }
        }
    }
    let needs_heads = pieces.iter().any(|piece| matches!(piece, Piece::Variable(variable) if variable.needs_heads()));
    Some(LogText { source: source.to_owned(), pieces, is_json: source.starts_with('{'), needs_heads })
}

fn pieces<V>(v: &Value<'_>, source: &str, mut variable: impl FnMut(&str) -> Option<V>) -> Option<Vec<Piece<V>>> {
    let piece = |part| match part {
        Part::Literal(literal) => Some(Piece::Literal(literal.to_owned())),
        Part::Name(name) => variable(name).map(Piece::Variable),
        Part::Unclosed => v.refuse("${ without its }", "write ${name}"),
    };
    parts(source).into_iter().map(piece).collect()
}

fn log_variable(v: &Value<'_>, name: &str) -> Option<LogVariable> {
    if let Some((_, variable)) = LOG_NAMES.iter().find(|(known, _)| *known == name) {
        return Some(variable.clone());
    }
    // The longest first: "sent_http_" has the other's name in it.
    if let Some(header) = name.strip_prefix("sent_http_").and_then(header) {
        return Some(LogVariable::Sent(header));
    }
    if let Some(header) = name.strip_prefix("http_").and_then(header) {
        return Some(LogVariable::Header(header));
    }
    if let Some(cookie) = name.strip_prefix("cookie_").filter(|cookie| !cookie.is_empty()) {
        return Some(LogVariable::Cookie(cookie.to_owned()));
    }
    if let Some(arg) = name.strip_prefix("arg_").filter(|arg| !arg.is_empty()) {
        return Some(LogVariable::Arg(arg.to_owned()));
    }
    let help = match nearest(name, LOG_NAMES.iter().map(|(name, _)| *name)) {
        Some(near) => format!("did you mean ${near}?"),
        None => "known are $remote_addr, $remote_user, $time_local, $time_iso8601, $request, $status, $body_bytes_sent, $request_time, $http_NAME, $sent_http_NAME, $cookie_NAME, $upstream_addr, $upstream_response_time and others: docs/configuration.md".to_owned(),
    };
    v.refuse(format!("there is no variable ${name} in a log"), help)
}

/// `_` for `-`.
fn header(name: &str) -> Option<HeaderName> {
    HeaderName::from_bytes(name.replace('_', "-").as_bytes()).ok()
}

fn variable(v: &Value<'_>, name: &str, captures: &[String]) -> Option<Variable> {
    if let Some((_, variable)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Some(variable.clone());
    }
    if captures.iter().any(|known| known == name) {
        return Some(Variable::Capture(name.to_owned()));
    }
    if !name.is_empty() && name.bytes().all(|b| b.is_ascii_digit()) {
        return v.refuse(
            format!("${name}, and the path has no group of that number"),
            "groups are those of the route's own path, written as '~^/old/(.*)$'",
        );
    }
    if let Some(arg) = name.strip_prefix("arg_").filter(|arg| !arg.is_empty()) {
        return Some(Variable::Arg(arg.to_owned()));
    }
    if let Some(cookie) = name.strip_prefix("cookie_").filter(|cookie| !cookie.is_empty()) {
        return Some(Variable::Cookie(cookie.to_owned()));
    }
    if let Some(header) = name.strip_prefix("http_").and_then(header) {
        return Some(Variable::Header(header));
    }
    if ["document_root", "request_filename", "realpath_root"].contains(&name) {
        return v.refuse(format!("there is no variable ${name}"), "files are looked for below `root`, as $uri");
    }
    let known = NAMES.iter().map(|(name, _)| *name).chain(captures.iter().map(String::as_str));
    let help = match nearest(name, known) {
        Some(near) => format!("did you mean ${near}?"),
        None => "known are $uri, $request_uri, $args, $is_args, $host, $scheme, $remote_addr, $server_port, $request_method, $request_id, $arg_NAME, $cookie_NAME, $http_NAME and the groups of the route's path".to_owned(),
    };
    v.refuse(format!("there is no variable ${name}"), help)
}
