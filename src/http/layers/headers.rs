//! The headers that a route changes: of the answer, and of the request before PHP sees it.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use crate::{
    http::variables::{Place, Variables},
    model::rules::{Expires, HeaderEdits},
};

/// Ten years, as Nginx has it.
const FOR_EVER: Duration = Duration::from_secs(315_360_000);

/// The changes for one request, its variables filled in.
#[derive(Debug, Default)]
pub struct Filled {
    remove: Vec<HeaderName>,
    set: Vec<(HeaderName, HeaderValue)>,
    add: Vec<(HeaderName, HeaderValue)>,
    default: Vec<(HeaderName, HeaderValue)>,
    expires: Option<Expires>,
}

impl Filled {
    /// `None`: nothing changes. One that is to be set and comes out empty once its variables are filled in is removed: else what the other side has sent
    /// would stand in its place. One that is to be added is left out.
    pub fn new(edits: &HeaderEdits, expires: Option<Expires>, variables: &Variables<'_>) -> Option<Self> {
        if edits.is_empty() && expires.is_none() {
            return None;
        }
        let fill = |all: &[(HeaderName, crate::model::text::Text)]| {
            let filled = all.iter().filter_map(|(name, text)| {
                let value = variables.fill(text, Place::Header);
                (!value.is_empty()).then(|| Some((name.clone(), HeaderValue::from_str(&value).ok()?)))?
            });
            filled.collect()
        };
        let set: Vec<(HeaderName, HeaderValue)> = fill(&edits.set);
        let mut remove = edits.remove.clone();
        remove.extend(edits.set.iter().map(|(name, _)| name).filter(|name| !set.iter().any(|(other, _)| other == *name)).cloned());
        Some(Filled { remove, set, add: fill(&edits.add), default: fill(&edits.default), expires })
    }

    pub fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name.clone(), value.clone());
        }
        for (name, value) in &self.default {
            headers.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }

    /// The same for an answer, and how long it may be kept. `is_phps`: PHP has had a part in it, and alone knows whether it is one client's.
    pub fn apply_to_answer(&self, status: StatusCode, is_phps: bool, headers: &mut HeaderMap, now: SystemTime) {
        // Those that Nginx lets caches keep; an error page for a month would outlive its error.
        let kept = [200, 201, 204, 206, 301, 302, 303, 304, 307, 308].contains(&status.as_u16());
        if let Some(expires) = self.expires.filter(|_| kept && !is_phps) {
            let (control, until) = match expires {
                Expires::Epoch => ("no-cache".to_owned(), SystemTime::UNIX_EPOCH),
                Expires::Max => (format!("max-age={}", FOR_EVER.as_secs()), now + FOR_EVER),
                Expires::After(time, who) => {
                    let words = [(who.public, ", public"), (who.private, ", private"), (who.immutable, ", immutable")];
                    let words: String = words.into_iter().filter_map(|(is_said, word)| is_said.then_some(word)).collect();
                    (format!("max-age={}{words}", time.as_secs()), now + time)
                }
            };
            if let (Ok(control), Ok(until)) =
                (HeaderValue::from_str(&control), HeaderValue::from_str(&httpdate::fmt_http_date(until)))
            {
                headers.insert(header::CACHE_CONTROL, control);
                headers.insert(header::EXPIRES, until);
            }
        }
        self.apply(headers);
    }
}
