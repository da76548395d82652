//! What a route says beyond which file or script answers: whose requests it takes, who may, what is said instead, and which headers go along.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::{Duration, Instant},
};

use http::{HeaderName, HeaderValue, StatusCode};
use ipnet::IpNet;
use regex::Regex;
use tower_http::{
    compression::{CompressionLayer, predicate::SizeAbove},
    cors::CorsLayer,
};

use super::text::Text;

/// Beyond path and method, which requests a route takes. All that is named must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct When {
    pub headers: Vec<(HeaderName, Wanted)>,
    pub cookies: Vec<(String, Wanted)>,
    /// Of the query, as they were sent.
    pub args: Vec<(String, Wanted)>,
    /// Empty: from anywhere.
    pub from: Vec<IpNet>,
    /// "http" or "https", as the client sees it; `None`: either.
    pub scheme: Option<Scheme>,
}

/// What a value must be.
#[derive(Clone, Debug)]
pub enum Wanted {
    Any,
    Text(String),
    /// Finds something in it.
    Pattern(Regex),
}

impl Wanted {
    pub fn is(&self, value: &str) -> bool {
        match self {
            Wanted::Any => true,
            Wanted::Text(text) => text == value,
            Wanted::Pattern(regex) => regex.is_match(value),
        }
    }
}

impl PartialEq for Wanted {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Wanted::Any, Wanted::Any) => true,
            (Wanted::Text(a), Wanted::Text(b)) => a == b,
            (Wanted::Pattern(a), Wanted::Pattern(b)) => a.as_str() == b.as_str(),
            _ => false,
        }
    }
}

impl Eq for Wanted {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    Http,
    Https,
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

/// Which pages of other origins may read the answers (Fetch standard, "CORS protocol").
#[derive(Clone, Debug)]
pub struct Cors {
    /// As written, for `check --expand`.
    pub origins: Vec<String>,
    pub methods: Vec<String>,
    pub headers: Vec<String>,
    pub expose: Vec<String>,
    pub credentials: bool,
    pub max_age: Duration,
    pub layer: CorsLayer,
}

/// 503 for all but a few, by the operator's word.
#[derive(Debug)]
pub struct Maintenance {
    /// A static file of the site; `None`: a line of text.
    pub page: Option<String>,
    /// Whoever has one of these goes on.
    pub bypass: When,
    /// For search engines and clients that come again by themselves; `None`: not told.
    pub retry_after: Option<Duration>,
    /// Only while this file exists; `None`: always.
    pub flag: Option<Flag>,
}

/// A file that says by being there, looked for once a second.
#[derive(Debug)]
pub struct Flag {
    pub file: PathBuf,
    /// Where the configuration has it, for the log.
    pub at: String,
    pub on: AtomicBool,
    /// When it was looked for, in ms since the configuration was read; 0: never.
    pub looked: AtomicU64,
    pub since: Instant,
}

impl Flag {
    pub fn new(file: PathBuf, at: String) -> Self {
        Flag { file, at, on: AtomicBool::new(false), looked: AtomicU64::new(0), since: Instant::now() }
    }
}

/// Answers compressed on their way.
#[derive(Clone, Debug)]
pub struct Compress {
    /// Of those that a client likes equally the first.
    pub codings: Vec<Coding>,
    /// Media types; "text/*" stands for all of its kind.
    pub types: Vec<String>,
    /// A body that is known to be smaller is sent as it is.
    pub min: u64,
    /// Also what PHP answers to who has a cookie or a password.
    pub private: bool,
    pub layer: CompressionLayer<SizeAbove>,
}

/// What a file beside another may hold: the same, compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Coding {
    Brotli,
    Zstd,
    Gzip,
}

impl Coding {
    /// Name in Accept-Encoding and Content-Encoding (IANA), and the ending of the file.
    pub const ALL: [(Coding, &str, &str); 3] =
        [(Coding::Brotli, "br", ".br"), (Coding::Zstd, "zstd", ".zst"), (Coding::Gzip, "gzip", ".gz")];

    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(coding, ..)| *coding == self).map_or("gzip", |(_, name, _)| name)
    }

    pub fn ending(self) -> &'static str {
        Self::ALL.iter().find(|(coding, ..)| *coding == self).map_or(".gz", |(.., ending)| ending)
    }
}

/// User and password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BasicAuth {
    pub realm: String,
    /// Of Apache's htpasswd.
    pub file: PathBuf,
}

/// How many requests of one key may come.
#[derive(Clone)]
pub struct Limit {
    pub by: Text,
    pub rate: Option<Rate>,
    /// So many more at once, and in the mean of four times as long as it takes to earn them again.
    pub burst: u32,
    pub concurrent: Option<u32>,
    pub counters: Arc<Counters>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub count: u32,
    pub per: Duration,
}

impl Rate {
    /// Intervals over which a burst is made up for: short ones alone would allow it in each.
    pub fn long(&self, burst: u32) -> u32 {
        burst.div_ceil(self.count.max(1)).saturating_mul(4).max(4)
    }
}

/// By key, for the whole process.
pub struct Counters {
    pub short: Option<pingora_limits::rate::Rate>,
    pub long: Option<pingora_limits::rate::Rate>,
    pub at_once: Option<pingora_limits::inflight::Inflight>,
}

/// Of a sketch, and its hashes: 2 MiB each of two.
const SLOTS: usize = 65_536;
const HASHES: usize = 4;

impl Limit {
    pub fn new(by: Text, rate: Option<Rate>, burst: u32, concurrent: Option<u32>) -> Self {
        use pingora_limits::{inflight::Inflight, rate};
        let counter = |intervals: u32| rate.map(|r| rate::Rate::new_with_estimator_config(r.per * intervals, HASHES, SLOTS));
        let counters = Counters {
            short: counter(1),
            long: counter(rate.map_or(1, |r| r.long(burst))),
            at_once: concurrent.map(|_| Inflight::new()),
        };
        Limit { by, rate, burst, concurrent, counters: Arc::new(counters) }
    }
}

impl std::fmt::Debug for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Limit {{ by: {:?}, rate: {:?}, burst: {}, concurrent: {:?} }}",
            self.by.source, self.rate, self.burst, self.concurrent
        )
    }
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

/// Changes of headers, in this order: removed, set, added, and what is still missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    pub remove: Vec<HeaderName>,
    /// Instead of what is there.
    pub set: Vec<(HeaderName, Text)>,
    /// Beside what is there.
    pub add: Vec<(HeaderName, Text)>,
    /// Where there is none of that name.
    pub default: Vec<(HeaderName, Text)>,
}

impl HeaderEdits {
    pub fn is_empty(&self) -> bool {
        *self == HeaderEdits::default()
    }
}

/// Who may keep an answer, and that it never changes (RFC 9111, section 5.2.2; RFC 8246).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    pub public: bool,
    pub private: bool,
    pub immutable: bool,
}

/// `Cache-Control` and `Expires` of answers that may be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expires {
    /// For so long.
    After(Duration, Kept),
    /// "epoch": not at all.
    Epoch,
    /// "max": for ever.
    Max,
}
