//! What a route says beyond which file or script answers: whose requests it takes, who may, what is said instead, and which headers go along.

use std::time::Duration;

use http::{HeaderName, HeaderValue, StatusCode};
use ipnet::IpNet;

use super::text::Text;

/// Beyond path and method, which requests a route takes. All that is named must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct When {
    /// `None`: any value.
    pub headers: Vec<(HeaderName, Option<HeaderValue>)>,
    pub cookies: Vec<(String, Option<String>)>,
    /// Empty: from anywhere.
    pub from: Vec<IpNet>,
}

impl When {
    pub fn is_always(&self) -> bool {
        *self == When::default()
    }
}

/// Whose requests are answered at all, by the client's address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Empty: everybody's.
    pub allow: Vec<IpNet>,
    /// Before `allow`.
    pub deny: Vec<IpNet>,
}

/// What is shown instead of our own text for a status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ErrorPage {
    /// A path of the site: a file, or a script.
    Path(String),
    /// A redirect.
    Url(HeaderValue),
}

/// Status codes from and to, and their page.
pub type ErrorPages = Vec<((u16, u16), ErrorPage)>;

/// An answer that needs neither file nor script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Redirect { to: Text, status: StatusCode },
    Respond { status: StatusCode, body: Text, content_type: HeaderValue },
}

/// Changes of headers, in this order: removed, set, added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    pub remove: Vec<HeaderName>,
    /// Instead of what is there.
    pub set: Vec<(HeaderName, Text)>,
    /// Beside what is there.
    pub add: Vec<(HeaderName, Text)>,
}

impl HeaderEdits {
    pub fn is_empty(&self) -> bool {
        *self == HeaderEdits::default()
    }
}

/// `Cache-Control` and `Expires` of answers that may be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expires {
    /// For so long.
    After(Duration),
    /// "epoch": not at all.
    Epoch,
    /// "max": for ever.
    Max,
}
