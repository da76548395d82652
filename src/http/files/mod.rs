//! Static files: from a [`Lookup`] to an answer. No call to the file system runs on a worker: opening, checking and
//! reading what is small is one task of the blocking pool, and what is large is read in chunks, a task each. What is small is
//! kept for a second, and so is what there is not.
//!
//! Not sendfile, which hyper's body cannot, and not mmap, which turns a truncated file into SIGBUS.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Response, StatusCode,
    header::{
        ACCEPT_RANGES, ALLOW, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, LAST_MODIFIED, LOCATION, VARY,
    },
};
use tokio::{runtime::Handle, sync::Semaphore, time::Instant};

use super::route::{Lookup, Otherwise, Script, Step, encode};
use crate::{
    error::{Error, Kind},
    model::{rules::Coding, site::Symlinks},
};

mod body;
mod cache;
mod coding;
mod conditions;
mod lookup;
mod range;

pub use body::FileBody;
use body::{Contents, Segment, Source};
use cache::{Known, Question, Small, Stats};
pub use coding::chosen;
use conditions::{Conditions, Decision, Validators};
use lookup::{Found, Identity};

/// A file up to this size is read whole by the task that opened it.
pub const WHOLE_BYTES: u64 = 64 << 10;

#[derive(Clone, Copy, Debug)]
pub struct FileLimits {
    /// Tasks in the blocking pool at a time; the rest wait. At most the pool's threads.
    pub tasks: usize,
    /// Memory of large chunks on their way to clients; beyond it chunks are small.
    pub chunk_bytes: usize,
    /// Memory of small files and of what is known of paths; 0: none.
    pub cache_bytes: u64,
}

impl Default for FileLimits {
    fn default() -> Self {
        FileLimits { tasks: 32, chunk_bytes: 32 << 20, cache_bytes: 32 << 20 }
    }
}

/// One for the process.
#[derive(Clone)]
pub struct Files {
    source: Source,
    stats: Arc<Stats>,
}

/// Where to look, and what may be sent instead of what is found.
#[derive(Clone, Copy, Debug)]
pub struct Around<'a> {
    pub root: &'a Path,
    pub symlinks: &'a Symlinks,
    /// Codings that may lie beside a file.
    pub precompressed: &'a [Coding],
    /// What was so a second ago is good enough. Not for a file that PHP has perhaps just written for this one client.
    pub may_be_old: bool,
}

/// What of the request matters to a file.
#[derive(Clone, Copy, Debug)]
pub struct FileRequest<'r> {
    pub method: &'r Method,
    pub headers: &'r HeaderMap,
    /// Normalized.
    pub path: &'r [u8],
    pub query: Option<&'r str>,
}

/// What came of a [`Lookup`].
#[derive(Debug)]
pub enum Served<'a> {
    /// A file, a redirect to a directory, 304, 405, 412 or 416.
    Response(Response<FileBody>),
    Script(Script<'a>),
    /// `=CODE` of `try_files`.
    Status(StatusCode),
    NotFound,
}

impl<'a> From<Otherwise<'a>> for Served<'a> {
    fn from(otherwise: Otherwise<'a>) -> Self {
        match otherwise {
            Otherwise::Script(script) => Served::Script(script),
            Otherwise::Status(status) => Served::Status(status),
            Otherwise::NotFound => Served::NotFound,
        }
    }
}

impl Files {
    /// `pool`: a runtime whose `spawn_blocking` is the process's pool.
    pub fn new(pool: Handle, limits: FileLimits) -> Files {
        let tasks = limits.tasks.clamp(1, Semaphore::MAX_PERMITS);
        let chunks = (limits.chunk_bytes / body::PERMIT_BYTES).min(Semaphore::MAX_PERMITS);
        let source = Source { pool, tasks: Arc::new(Semaphore::new(tasks)), chunks: Arc::new(Semaphore::new(chunks)) };
        Files { source, stats: Arc::new(Stats::new(limits.cache_bytes)) }
    }

    /// Looks the steps up below the root and answers. Errors: `Forbidden` for a file we may not read, `Internal` for
    /// what the file system cannot do, as when no descriptor is left.
    pub async fn serve<'a>(&self, request: FileRequest<'_>, around: Around<'_>, lookup: Lookup<'a>) -> Result<Served<'a>, Error> {
        let Lookup { steps, otherwise } = lookup;
        let wanted = Wanted::of(&request, around.precompressed);
        let Around { root, symlinks, .. } = around;
        let question = Question { root, symlinks, codings: &wanted.codings, steps: &steps };
        let internal = |error: std::io::Error| Error::new(Kind::Internal, format!("a static file: {error}"));
        let known = match self.stats.get(&question) {
            Ok(Known::File(file)) if !around.may_be_old => Err(Some(file)),
            Ok(_) if !around.may_be_old => Err(None),
            known => known,
        };
        let answer = match known {
            Ok(Known::File(file)) => Answer::Response(respond_from(&file, &wanted).map_err(internal)?),
            Ok(Known::Redirect) => Answer::Redirect,
            Ok(Known::Script(name)) => Answer::Script(name),
            Ok(Known::Missing) => Answer::Missing,
            Err(old) => {
                let (key, source, stats) = (question.to_key(), self.source.clone(), self.stats.clone());
                let (root, symlinks) = (root.to_owned(), symlinks.clone());
                let look = move || {
                    let looked = Instant::now();
                    let (answer, known) = look(&root, &symlinks, &steps, &wanted, old, source)?;
                    if let Some(known) = known {
                        stats.put(key, known, looked);
                    }
                    Ok(answer)
                };
                self.source.run(look).await.map_err(internal)?
            }
        };
        match answer {
            Answer::Response(response) => Ok(Served::Response(response)),
            Answer::Redirect => Ok(Served::Response(redirect(&request))),
            Answer::Script(name) => Ok(Served::Script(Script { name: name.into(), path_info: b"", query: None })),
            Answer::Forbidden => Err(Error::new(Kind::Forbidden, "a static file that may not be read")),
            Answer::Missing => Ok(otherwise.into()),
        }
    }

    /// Whether a regular file is there: for the hint on an undeclared script.
    pub async fn exists(&self, root: &Path, symlinks: &Symlinks, path: &[u8]) -> bool {
        let (root, symlinks, path) = (root.to_owned(), symlinks.clone(), path.to_vec());
        self.source.run(move || lookup::is_file(&root, &symlinks, &path)).await.unwrap_or(false)
    }
}

enum Answer {
    Response(Response<FileBody>),
    Redirect,
    Script(String),
    Missing,
    Forbidden,
}

/// The request as the pool's task needs it.
struct Wanted {
    method: Method,
    conditions: Conditions,
    /// Those of `precompressed` that the client takes, in the server's order.
    codings: Vec<Coding>,
    /// Another client may get another coding.
    varies: bool,
}

impl Wanted {
    fn of(request: &FileRequest<'_>, precompressed: &[Coding]) -> Wanted {
        Wanted {
            method: request.method.clone(),
            conditions: Conditions::of(request.headers),
            codings: precompressed.iter().filter(|coding| coding::takes(request.headers, coding.name())).copied().collect(),
            varies: !precompressed.is_empty(),
        }
    }
}

/// Runs in the pool. `old`: contents that may still be right. Also what is to be remembered.
fn look(
    root: &Path,
    symlinks: &Symlinks,
    steps: &[Step],
    wanted: &Wanted,
    old: Option<Arc<Small>>,
    source: Source,
) -> std::io::Result<(Answer, Option<Known>)> {
    // A file that shrinks between fstat and read is looked at again, but not for ever.
    for _ in 0..3 {
        let (file, path, coding) = match lookup::find(root, symlinks, steps, &wanted.codings)? {
            Found::File { file, path, coding } => (file, path, coding),
            Found::Redirect => return Ok((Answer::Redirect, Some(Known::Redirect))),
            Found::Script(name) => return Ok((Answer::Script(name.clone()), Some(Known::Script(name)))),
            Found::Missing => return Ok((Answer::Missing, Some(Known::Missing))),
            Found::Forbidden => return Ok((Answer::Forbidden, None)),
        };
        let lookup::Opened { file, identity } = file;
        if identity.size > WHOLE_BYTES {
            let (mut response, segments) = head(&Labels::of(&identity, &path), coding, wanted);
            if segments.iter().map(Segment::len).sum::<u64>() > WHOLE_BYTES {
                *response.body_mut() = FileBody::stream(source, file, segments);
                return Ok((Answer::Response(response), None));
            }
            match body::read_segments(Contents::File(&file), segments) {
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => continue,
                read => *response.body_mut() = read?.into(),
            }
            return Ok((Answer::Response(response), None));
        }
        let unchanged =
            old.as_ref().filter(|old| old.identity == identity && old.path == path && old.coding == coding && !old.is_racy);
        let small = match unchanged {
            Some(old) => old.clone(),
            None => match body::read_segments(Contents::File(&file), vec![Segment::File { offset: 0, len: identity.size }]) {
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => continue,
                read => {
                    let (is_racy, labels) = (identity.is_racy(SystemTime::now()), Labels::of(&identity, &path));
                    Arc::new(Small { is_racy, labels, identity, path, coding, contents: read? })
                }
            },
        };
        return Ok((Answer::Response(respond_from(&small, wanted)?), Some(Known::File(small))));
    }
    Err(std::io::ErrorKind::UnexpectedEof.into())
}

/// From memory.
fn respond_from(file: &Small, wanted: &Wanted) -> std::io::Result<Response<FileBody>> {
    let (mut response, segments) = head(&file.labels, file.coding, wanted);
    *response.body_mut() = body::read_segments(Contents::Memory(&file.contents), segments)?.into();
    Ok(response)
}

/// What every answer about a file says of it.
#[derive(Debug)]
struct Labels {
    validators: Validators,
    etag: Option<HeaderValue>,
    last_modified: Option<HeaderValue>,
    content_type: HeaderValue,
}

impl Labels {
    /// `path`: what names its type.
    fn of(identity: &Identity, path: &[u8]) -> Labels {
        let Identity { size, modified, .. } = *identity;
        let validators = Validators { etag: etag(size, modified), modified, size };
        Labels {
            etag: HeaderValue::from_str(&validators.etag).ok(),
            last_modified: HeaderValue::from_str(&http_date(modified)).ok(),
            content_type: content_type(path),
            validators,
        }
    }
}

/// Headers of an answer, and those that whoever sends it adds.
const HEADERS: usize = 10;

/// The head of the answer, and which parts of the file make its body.
fn head(labels: &Labels, coding: Option<Coding>, wanted: &Wanted) -> (Response<FileBody>, Vec<Segment>) {
    let size = labels.validators.size;
    let mut response = Response::new(FileBody::Empty);
    *response.headers_mut() = HeaderMap::with_capacity(HEADERS);
    let is_head = wanted.method == Method::HEAD;
    if !is_head && wanted.method != Method::GET {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(0));
        return (response, Vec::new());
    }
    let decision = wanted.conditions.decide(&labels.validators, !is_head);
    let headers = response.headers_mut();
    if let Some(value) = &labels.etag {
        headers.insert(ETAG, value.clone());
    }
    if let Some(value) = &labels.last_modified {
        headers.insert(LAST_MODIFIED, value.clone());
    }
    // On a 304 too (RFC 9110, section 15.4.5).
    if wanted.varies {
        headers.insert(VARY, HeaderValue::from_static("Accept-Encoding"));
    }
    let (status, segments) = match decision {
        Decision::Whole => {
            headers.insert(CONTENT_TYPE, labels.content_type.clone());
            headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
            (StatusCode::OK, vec![Segment::File { offset: 0, len: size }])
        }
        Decision::Ranges(ranges) => {
            let (segments, part_headers) = range::partial(&ranges, size, labels.content_type.clone());
            headers.extend(part_headers);
            headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
            (StatusCode::PARTIAL_CONTENT, segments)
        }
        Decision::NotModified => (StatusCode::NOT_MODIFIED, Vec::new()),
        Decision::PreconditionFailed => (StatusCode::PRECONDITION_FAILED, Vec::new()),
        Decision::Unsatisfiable => {
            if let Ok(value) = HeaderValue::from_str(&format!("bytes */{size}")) {
                headers.insert(CONTENT_RANGE, value);
            }
            (StatusCode::RANGE_NOT_SATISFIABLE, Vec::new())
        }
    };
    if let (Some(coding), StatusCode::OK | StatusCode::PARTIAL_CONTENT) = (coding, status) {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static(coding.name()));
    }
    let length: u64 = segments.iter().map(Segment::len).sum();
    // A 304 has no length: it would be that of a body it does not have (RFC 9110, section 8.6).
    if status != StatusCode::NOT_MODIFIED {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    *response.status_mut() = status;
    (response, if is_head { Vec::new() } else { segments })
}

/// 301 to the path with its `/`. A reference without scheme and host keeps whatever port and scheme the client used.
/// The path is written anew from its normalized form, or `//evil.test` and `/\evil.test` would be other hosts.
fn redirect(request: &FileRequest<'_>) -> Response<FileBody> {
    let mut location = String::with_capacity(request.path.len() + 16);
    encode(&mut location, request.path);
    location.push('/');
    if let Some(query) = request.query {
        location.push('?');
        location.push_str(query);
    }
    let mut response = Response::new(FileBody::Empty);
    *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(LOCATION, location);
    }
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(0));
    response
}

/// As Nginx's: the same on every replica that holds the same file.
fn etag(size: u64, modified: i64) -> String {
    format!("\"{modified:x}-{size:x}\"")
}

/// Seconds since 1970 as an HTTP date; httpdate panics outside the years 1970 to 9999, and a file may claim any.
fn http_date(seconds: i64) -> String {
    const YEAR_9999: u64 = 253_402_300_799;
    let seconds = u64::try_from(seconds).unwrap_or(0).min(YEAR_9999);
    let time: SystemTime = UNIX_EPOCH + Duration::from_secs(seconds);
    httpdate::fmt_http_date(time)
}

/// By the name's extension; text and the text-like kinds of the web are UTF-8.
fn content_type(path: &[u8]) -> HeaderValue {
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let extension = name.iter().rposition(|byte| *byte == b'.').and_then(|dot| name.get(dot + 1..));
    let extension = extension.and_then(|extension| str::from_utf8(extension).ok()).unwrap_or_default();
    let Some(kind) = today(extension).or_else(|| mime_guess::from_ext(extension).first_raw()) else {
        return HeaderValue::from_static("application/octet-stream");
    };
    let is_text = kind.starts_with("text/")
        || kind.ends_with("+xml")
        || kind.ends_with("+json")
        || matches!(kind, "application/javascript" | "application/json" | "application/xml");
    if !is_text {
        return HeaderValue::from_static(kind);
    }
    HeaderValue::from_str(&format!("{kind}; charset=utf-8")).unwrap_or(HeaderValue::from_static("text/plain"))
}

/// What the table knows by an older name, or another file's (IANA media types; WHATWG MIME Sniffing standard).
fn today(extension: &str) -> Option<&'static str> {
    const TODAY: [(&str, &str); 9] = [
        ("js", "text/javascript"),
        ("mjs", "text/javascript"),
        ("woff", "font/woff"),
        ("otf", "font/otf"),
        ("ttf", "font/ttf"),
        ("ts", "video/mp2t"),
        ("m3u8", "application/vnd.apple.mpegurl"),
        ("rpm", "application/x-redhat-package-manager"),
        ("mid", "audio/midi"),
    ];
    TODAY.iter().find(|(known, _)| extension.eq_ignore_ascii_case(known)).map(|(_, kind)| *kind)
}

/// Bytes of a small thing that is already in memory.
impl From<Bytes> for FileBody {
    fn from(bytes: Bytes) -> Self {
        if bytes.is_empty() { FileBody::Empty } else { FileBody::Whole(bytes) }
    }
}

#[cfg(test)]
mod tests;
