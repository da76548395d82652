//! `try_files`: what to look for, until something is certain without looking.

use std::borrow::Cow;

use http::StatusCode;

use super::{
    Index, Lookup, Otherwise, Refusal, Script, Step, Target, declared_script, has_dotfile, looks_like_php,
    scripts::is_declared_exactly,
};
use crate::model::{Route, Site};

/// Steps so far. Once `certain` is set the rest of the list is out of reach.
pub(super) struct Plan<'a, 'q> {
    site: &'a Site,
    runs_php: bool,
    path: &'a [u8],
    query: &'q str,
    has_root: bool,
    steps: Vec<Step>,
    certain: Option<Otherwise<'a>>,
}

impl<'a, 'q> Plan<'a, 'q> {
    pub(super) fn new(site: &'a Site, route: &Route, path: &'a [u8], query: &'q str, has_root: bool) -> Self {
        Plan { site, runs_php: route.upstream.is_some(), path, query, has_root, steps: Vec::new(), certain: None }
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
            Some(path) if path.contains("$uri") => self.item(path),
            _ => self.fallback(last),
        }
    }

    fn item(&mut self, item: &str) {
        let path = self.expand_path(item);
        // "$uri.html" of "/" is a dot file that nobody wrote; one in the item itself is the operator's wish.
        if has_dotfile(&path) && !item.contains("/.") {
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

    fn expand_path(&self, item: &str) -> Vec<u8> {
        let mut parts = item.split("$uri");
        let mut path = parts.next().unwrap_or_default().as_bytes().to_vec();
        for part in parts {
            path.extend_from_slice(self.path);
            path.extend_from_slice(part.as_bytes());
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
        let mut query = String::new();
        let mut rest = match template.strip_prefix('?') {
            Some(rest) => rest,
            None => template.strip_prefix("$is_args").filter(|_| !self.query.is_empty())?,
        };
        while let Some((before, after)) = rest.split_once('$') {
            query.push_str(before);
            rest = after;
            if let Some(after) = rest.strip_prefix("args").or_else(|| rest.strip_prefix("query_string")) {
                query.push_str(self.query);
                rest = after;
            } else if let Some(after) = rest.strip_prefix("uri") {
                // Encoded, where Nginx is not: a decoded `&` in a path must not become a parameter.
                encode(&mut query, self.path);
                rest = after;
            } else {
                query.push('$');
            }
        }
        query.push_str(rest);
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
