//! Text with variables, from a value of the file.

use http::HeaderName;

use super::reader::{Value, nearest};
use crate::model::text::{NAMES, Piece, Text, Variable};

/// `captures`: the names of the groups that the route's expression has, besides their numbers.
pub fn text(v: &Value<'_>, captures: &[String]) -> Option<Text> {
    let source = v.text()?;
    let mut pieces = Vec::new();
    let mut rest = source;
    while let Some(at) = rest.find('$') {
        let (before, after) = rest.split_at(at);
        if !before.is_empty() {
            pieces.push(Piece::Literal(before.to_owned()));
        }
        let after = &after[1..];
        let (name, next) = match after.strip_prefix('{') {
            Some(inner) => match inner.split_once('}') {
                Some(found) => found,
                None => return v.refuse("${ without its }", "write ${name}"),
            },
            None => {
                let digits = after.bytes().next().is_some_and(|b| b.is_ascii_digit());
                let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
                let length = if digits { 1 } else { after.bytes().take_while(|b| fits(*b)).count() };
                after.split_at(length)
            }
        };
        pieces.push(Piece::Variable(variable(v, name, captures)?));
        rest = next;
    }
    if !rest.is_empty() {
        pieces.push(Piece::Literal(rest.to_owned()));
    }
    Some(Text { source: source.to_owned(), pieces })
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
    if let Some(header) = name.strip_prefix("http_").filter(|header| !header.is_empty())
        && let Ok(header) = HeaderName::from_bytes(header.replace('_', "-").as_bytes())
    {
        return Some(Variable::Header(header));
    }
    let known = NAMES.iter().map(|(name, _)| *name).chain(captures.iter().map(String::as_str));
    let help = match nearest(name, known) {
        Some(near) => format!("did you mean ${near}?"),
        None => "known are $uri, $request_uri, $args, $is_args, $host, $scheme, $remote_addr, $server_port, $request_method, $request_id, $arg_NAME, $cookie_NAME, $http_NAME and the groups of the route's path".to_owned(),
    };
    v.refuse(format!("there is no variable ${name}"), help)
}
