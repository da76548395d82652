//! `try_files`: what to look for, until something is certain without looking.

use std::borrow::Cow;

use http::StatusCode;
use regex::Regex;

use super::{
    Index, Lookup, Otherwise, Refusal, Script, Step, Target, declared_script, has_dotfile, looks_like_php, lossless,
    scripts::is_declared_exactly,
};
use crate::model::{
    Route, Site,
    site::Pattern,
    text::{Part, parts},
};

/// Steps so far. Once `certain` is set the rest of the list is out of reach.
pub(super) struct Plan<'a, 'q> {
    site: &'a Site,
    runs_php: bool,
    path: &'a [u8],
    query: &'q str,
    has_root: bool,
    /// Of the route's expression, and the text they are in; looked for where the list asks for one.
    groups: Option<(&'a Regex, Cow<'a, str>)>,
    steps: Vec<Step>,
    certain: Option<Otherwise<'a>>,
}

impl<'a, 'q> Plan<'a, 'q> {
    pub(super) fn new(site: &'a Site, route: &'a Route, path: &'a [u8], query: &'q str, has_root: bool) -> Self {
        let groups = match &route.pattern {
            Pattern::Regex(regex) if regex.captures_len() > 1 => Some((regex, lossless::to_text(path))),
            _ => None,
        };
        Plan { site, runs_php: route.upstream.is_some(), path, query, has_root, groups, steps: Vec::new(), certain: None }
    }

    pub(super) fn target(self) -> Target<'a> {
        let otherwise = self.certain.unwrap_or(Otherwise::NotFound);
        if !self.steps.is_empty() {
            return Target::Lookup(Lookup { steps: self.steps, otherwise });
        }
        match otherwise {
            Otherwise::Script(script) => Target::Script(script),
            Otherwise::Status(status) => Target::Status(status),
            Otherwise::NotFound => Target::NotFound(Refusal::Missing),
        }
    }

    fn settle(&mut self, otherwise: Otherwise<'a>) {
        self.certain.get_or_insert(otherwise);
    }

    fn step(&mut self, step: Step) {
        if self.certain.is_none() {
            self.steps.push(step);
        }
    }

    /// The route's list, in Nginx's words: each item is looked for, the last one answers without being looked for,
    /// unless it too contains `$uri`.
    pub(super) fn list(&mut self, list: &'a [String]) {
        let Some((last, rest)) = list.split_last() else { return };
        for item in rest {
            self.item(item);
        }
        if let Some(code) = last.strip_prefix('=') {
            let status = code.parse().ok().and_then(|code| StatusCode::from_u16(code).ok());
            self.settle(Otherwise::Status(status.unwrap_or(StatusCode::NOT_FOUND)));
            return;
        }
        match last.split('?').next() {
            Some(path) if parts(path).iter().any(|part| self.names_file(part)) => self.item(path),
            _ => self.fallback(last),
        }
    }

    fn item(&mut self, item: &str) {
        let path = self.expand_path(item);
        // "$uri.html" of "/" is a dot file that nobody wrote; one in the item itself is the operator's wish.
        // One in the client's path is the route's.
        if has_dotfile(&path) && !item.contains("/.") && !has_dotfile(self.path) {
            return;
        }
        if item.ends_with('/') {
            // "$uri/", and the client may have left the slash out.
            let with_slash = self.path.ends_with(b"/") || !item.contains("$uri");
            self.try_directory(path, with_slash);
        } else {
            self.try_file(path);
        }
    }

    /// `$uri`, or a group of the route's expression.
    fn names_file(&self, part: &Part<'_>) -> bool {
        matches!(part, Part::Name(name) if !["is_args", "args", "query_string"].contains(name))
    }

    /// `None`: there is none of that name. One that took no part is empty.
    fn group(&self, name: &str) -> Option<String> {
        let (regex, text) = self.groups.as_ref()?;
        let number = match name.parse::<usize>() {
            Ok(number) => number,
            Err(_) => regex.capture_names().position(|known| known == Some(name))?,
        };
        let found = (number < regex.captures_len()).then(|| regex.captures(text))?;
        Some(found.and_then(|found| found.get(number).map(|found| found.as_str().to_owned())).unwrap_or_default())
    }

    fn expand_path(&self, item: &str) -> Vec<u8> {
        let mut path = Vec::new();
        for part in parts(item) {
            match part {
                Part::Literal(literal) => path.extend_from_slice(literal.as_bytes()),
                Part::Name("uri") => path.extend_from_slice(self.path),
                Part::Name(name) => path.extend_from_slice(&lossless::to_bytes(&self.group(name).unwrap_or_default())),
                Part::Unclosed => {}
            }
        }
        if path.first() != Some(&b'/') {
            path.insert(0, b'/');
        }
        // "$uri/" of a path that has its slash, "/cache/$uri".
        path.dedup_by(|a, b| *a == b'/' && *b == b'/');
        path
    }

    /// A backslash never reaches the file system: what is a name here is a folder elsewhere, and root or cache may
    /// have been filled elsewhere.
    fn may_look(&self, path: &[u8]) -> bool {
        self.has_root && !path.contains(&b'\\')
    }

    pub(super) fn try_file(&mut self, path: Vec<u8>) {
        if path.ends_with(b"/") || !self.may_look(&path) {
            return;
        }
        match declared_script(self.site, &path) {
            Some((name, b"")) if self.runs_php => {
                let name = name.to_owned();
                self.step(Step::Script(name));
            }
            // Never the source of a script, however `try_files` comes by its name.
            Some(_) => {}
            None if looks_like_php(&path) => {}
            None => self.step(Step::File(path)),
        }
    }

    /// Not `with_slash`: the client asked without the closing `/`, and a redirect adds it.
    pub(super) fn try_directory(&mut self, mut path: Vec<u8>, with_slash: bool) {
        if !path.ends_with(b"/") {
            path.push(b'/');
        }
        let can_look = self.may_look(&path);
        let mut index = Vec::new();
        for name in &self.site.index {
            let mut full = path.clone();
            full.extend_from_slice(name.as_bytes());
            match declared_script(self.site, &full) {
                Some((script, b"")) => {
                    if !self.runs_php {
                        continue;
                    }
                    let must_exist = can_look && !is_declared_exactly(self.site, script);
                    if with_slash && !must_exist {
                        // Nothing behind it is ever reached.
                        let script = Script { name: Cow::Owned(script.to_owned()), path_info: b"", query: None };
                        if !index.is_empty() {
                            self.step(Step::Directory { path, index });
                        }
                        return self.settle(Otherwise::Script(script));
                    }
                    index.push(Index::Script { name: script.to_owned(), must_exist });
                }
                Some(_) => {}
                None if looks_like_php(name.as_bytes()) => {}
                None if can_look => index.push(Index::File(name.clone())),
                None => {}
            }
        }
        if can_look && !index.is_empty() {
            if !with_slash {
                path.pop();
            }
            self.step(Step::Directory { path, index });
        }
    }

    pub(super) fn front(&mut self) {
        if let Some(front) = &self.site.front
            && self.runs_php
        {
            self.settle(Otherwise::Script(Script::named(front)));
        }
    }

    /// `/index.php`, `/index.php?q=$uri&$args`, `/index.php$is_args$args`, `/offline.html`. Without a `?` the client's
    /// query stays, where Nginx would drop it: nobody means that.
    fn fallback(&mut self, text: &'a str) {
        let text_path = text.split(['?', '$']).next().unwrap_or_default();
        let query = text.get(text_path.len()..).filter(|rest| !rest.is_empty()).and_then(|rest| self.expand_query(rest));
        let path = text_path.as_bytes();
        if !path.starts_with(b"/") {
            return;
        }
        match declared_script(self.site, path) {
            Some((name, path_info)) if self.runs_php => {
                self.settle(Otherwise::Script(Script { name: Cow::Borrowed(name), path_info, query }));
            }
            Some(_) => {}
            None if looks_like_php(path) => {}
            None if path.ends_with(b"/") => self.try_directory(path.to_vec(), true),
            None if has_dotfile(path) => {}
            None => self.try_file(path.to_vec()),
        }
    }

    /// `None`: the client's query stays.
    fn expand_query(&self, template: &str) -> Option<String> {
        let rest = match template.strip_prefix('?') {
            Some(rest) => rest,
            None => template.strip_prefix("$is_args").filter(|_| !self.query.is_empty())?,
        };
        let mut query = String::new();
        for part in parts(rest) {
            match part {
                Part::Literal(literal) => query.push_str(literal),
                Part::Name("args" | "query_string") => query.push_str(self.query),
                // Encoded, where Nginx is not: a decoded `&` in a path must not become a parameter.
                Part::Name("uri") => encode(&mut query, self.path),
                Part::Name(name) => match self.group(name) {
                    Some(group) => encode(&mut query, &lossless::to_bytes(&group)),
                    None => query.extend(["$", name]),
                },
                Part::Unclosed => {}
            }
        }
        Some(query)
    }
}

/// Percent-encodes all but unreserved characters, `/`, `:`, `@` and `,`: safe in a path, a query and a Location.
pub(crate) fn encode(out: &mut String, bytes: &[u8]) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/:@,".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let (high, low) = (HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]);
            out.extend(['%', char::from(high), char::from(low)]);
        }
    }
}
