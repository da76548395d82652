//! Static files: from a [`Lookup`] to an answer. No call to the file system runs on a worker: opening, checking and
//! reading what is small is one task of the blocking pool, and what is large is read in chunks, a task each.
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
    header::{ACCEPT_RANGES, ALLOW, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, LAST_MODIFIED, LOCATION},
};
use tokio::{runtime::Handle, sync::Semaphore};

use super::route::{Lookup, Otherwise, Script, Step, encode};
use crate::{
    error::{Error, Kind},
    model::site::Symlinks,
};

mod body;
mod conditions;
mod lookup;
mod range;

pub use body::FileBody;
use body::{Segment, Source};
use conditions::{Conditions, Decision, Validators};
use lookup::Found;

/// A file up to this size is read whole by the task that opened it.
pub const WHOLE_BYTES: u64 = 64 << 10;

#[derive(Clone, Copy, Debug)]
pub struct FileLimits {
    /// Tasks in the blocking pool at a time; the rest wait. At most the pool's threads.
    pub tasks: usize,
    /// Memory of large chunks on their way to clients; beyond it chunks are small.
    pub chunk_bytes: usize,
}

impl Default for FileLimits {
    fn default() -> Self {
        FileLimits { tasks: 32, chunk_bytes: 32 << 20 }
    }
}

/// One for the process.
#[derive(Clone)]
pub struct Files {
    source: Source,
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
        Files { source: Source { pool, tasks: Arc::new(Semaphore::new(tasks)), chunks: Arc::new(Semaphore::new(chunks)) } }
    }

    /// Looks the steps up below `root` and answers. Errors: `Forbidden` for a file we may not read, `Internal` for
    /// what the file system cannot do, as when no descriptor is left.
    pub async fn serve<'a>(
        &self,
        request: FileRequest<'_>,
        root: &Path,
        symlinks: &Symlinks,
        lookup: Lookup<'a>,
    ) -> Result<Served<'a>, Error> {
        let Lookup { steps, otherwise } = lookup;
        let (root, symlinks) = (root.to_owned(), symlinks.clone());
        let wanted = Wanted::of(&request);
        let source = self.source.clone();
        let done = self.source.run(move || answer(&root, &symlinks, &steps, &wanted, source)).await;
        match done.map_err(|error| Error::new(Kind::Internal, format!("a static file: {error}")))? {
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
}

impl Wanted {
    fn of(request: &FileRequest<'_>) -> Wanted {
        Wanted { method: request.method.clone(), conditions: Conditions::of(request.headers) }
    }
}

/// Runs in the pool.
fn answer(root: &Path, symlinks: &Symlinks, steps: &[Step], wanted: &Wanted, source: Source) -> std::io::Result<Answer> {
    // A file that shrinks between fstat and read is looked at again, but not for ever.
    for _ in 0..3 {
        let (file, path) = match lookup::find(root, symlinks, steps)? {
            Found::File { file, path } => (file, path),
            Found::Redirect => return Ok(Answer::Redirect),
            Found::Script(name) => return Ok(Answer::Script(name)),
            Found::Missing => return Ok(Answer::Missing),
            Found::Forbidden => return Ok(Answer::Forbidden),
        };
        match respond(file, &path, wanted, source.clone()) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {}
            other => return other.map(Answer::Response),
        }
    }
    Err(std::io::ErrorKind::UnexpectedEof.into())
}

fn respond(file: lookup::Opened, path: &[u8], wanted: &Wanted, source: Source) -> std::io::Result<Response<FileBody>> {
    let lookup::Opened { file, size, modified } = file;
    let mut response = Response::new(FileBody::Empty);
    let is_head = wanted.method == Method::HEAD;
    if !is_head && wanted.method != Method::GET {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(0));
        return Ok(response);
    }
    let validators = Validators { etag: etag(size, modified), modified, size };
    let decision = wanted.conditions.decide(&validators, !is_head);
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&validators.etag) {
        headers.insert(ETAG, value);
    }
    if let Ok(value) = HeaderValue::from_str(&http_date(modified)) {
        headers.insert(LAST_MODIFIED, value);
    }
    let (status, segments) = match decision {
        Decision::Whole => {
            headers.insert(CONTENT_TYPE, content_type(path));
            headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
            (StatusCode::OK, vec![Segment::File { offset: 0, len: size }])
        }
        Decision::Ranges(ranges) => {
            let (segments, part_headers) = range::partial(&ranges, size, content_type(path));
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
    let length: u64 = segments.iter().map(Segment::len).sum();
    // A 304 has no length: it would be that of a body it does not have (RFC 9110, section 8.6).
    if status != StatusCode::NOT_MODIFIED {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    *response.status_mut() = status;
    if !is_head && length > 0 {
        *response.body_mut() = if length <= WHOLE_BYTES {
            FileBody::Whole(body::read_segments(&file, segments)?)
        } else {
            FileBody::stream(source, file, segments)
        };
    }
    Ok(response)
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
    let Some(kind) = mime_guess::from_ext(extension).first_raw() else {
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

/// Bytes of a small thing that is already in memory.
impl From<Bytes> for FileBody {
    fn from(bytes: Bytes) -> Self {
        if bytes.is_empty() { FileBody::Empty } else { FileBody::Whole(bytes) }
    }
}

#[cfg(test)]
mod tests;
