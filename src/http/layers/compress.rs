//! Answers compressed on their way: what shrinks, is no secret, and is not compressed already. What is whole in memory is done by the blocking pool,
//! off the worker; what streams by tower-http, a few pieces in one go.

use std::io::{self, Write};

use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, request::Parts};
use http_body::Body;
use tokio::runtime::Handle;

use super::through::through;
use crate::{
    http::{
        answer::{AsItComes, Content},
        files::chosen,
    },
    model::rules::{Coding, Compress},
};

/// Below that a task of the pool costs more than it saves.
const WORTH_A_TASK: usize = 8 << 10;

/// The answer, compressed where it may be. `is_phps`: PHP has had a part in it.
pub async fn shrunk(
    compress: &Compress,
    pool: &Handle,
    parts: &Parts,
    is_phps: bool,
    mut response: Response<Content>,
) -> Response<Content> {
    if !may_shrink(compress, &parts.headers, is_phps, &response) {
        // As it would be with the answer in full (RFC 9110, section 15.4.5).
        if response.status() == StatusCode::NOT_MODIFIED || parts.method == Method::HEAD {
            vary(response.headers_mut());
        }
        // Who has the compressed answer asks with its tag, and a cache renews what has that tag alone (RFC 9111, section 4.3.4).
        if response.status() == StatusCode::NOT_MODIFIED && asks_weakly(&parts.headers, response.headers()) {
            weaken(response.headers_mut());
        }
        return response;
    }
    // Also where this client takes none: the next one may.
    vary(response.headers_mut());
    let Some(coding) = chosen(&parts.headers, &compress.codings) else { return response };
    if let Some(bytes) = response.body().in_memory().filter(|bytes| bytes.len() >= WORTH_A_TASK).cloned() {
        let squeezed = pool.spawn_blocking(move || squeeze(coding, &bytes)).await;
        // Out of memory, or the process ends: it goes as it is.
        if let Ok(Ok(bytes)) = squeezed {
            let headers = response.headers_mut();
            headers.remove(header::ACCEPT_RANGES);
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(coding.name()));
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
            weaken(headers);
            *response.body_mut() = Content::Whole(Some(bytes.into()));
        }
        return response;
    }
    let mut request = Request::new(());
    request.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static(coding.name()));
    let mut response = through(&compress.layer, request, response).await.map(|body| Content::Compressed(Box::pin(body)));
    if response.headers().contains_key(header::CONTENT_ENCODING) {
        weaken(response.headers_mut());
    }
    response
}

/// Whether the answer's tag is asked for as a weak one.
fn asks_weakly(asked: &HeaderMap, headers: &HeaderMap) -> bool {
    let Some(tag) = headers.get(header::ETAG).map(HeaderValue::as_bytes).filter(|tag| !tag.starts_with(b"W/")) else {
        return false;
    };
    let weak = [b"W/", tag].concat();
    let mut lines = asked.get_all(header::IF_NONE_MATCH).iter();
    lines.any(|line| memchr::memmem::find(line.as_bytes(), &weak).is_some())
}

/// Two codings of one thing are not the same bytes (RFC 9110, section 8.8.3.3).
fn weaken(headers: &mut HeaderMap) {
    if let Some(tag) = headers.get(header::ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/"))
        && let Ok(weak) = HeaderValue::from_bytes(&[b"W/", tag.as_bytes()].concat())
    {
        headers.insert(header::ETAG, weak);
    }
}

/// All at once, at the same low levels.
fn squeeze(coding: Coding, bytes: &[u8]) -> io::Result<Vec<u8>> {
    match coding {
        Coding::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::with_capacity(bytes.len() / 3), flate2::Compression::new(3));
            encoder.write_all(bytes)?;
            encoder.finish()
        }
        Coding::Zstd => zstd::bulk::compress(bytes, 3),
        Coding::Brotli => {
            let params = brotli::enc::BrotliEncoderParams { quality: 3, size_hint: bytes.len(), ..Default::default() };
            let mut out = Vec::with_capacity(bytes.len() / 3);
            brotli::BrotliCompress(&mut &*bytes, &mut out, &params)?;
            Ok(out)
        }
    }
}

fn may_shrink(compress: &Compress, asked: &HeaderMap, is_phps: bool, response: &Response<Content>) -> bool {
    let headers = response.headers();
    let is_whole = !matches!(response.status(), StatusCode::PARTIAL_CONTENT | StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if !is_whole || response.body().is_over() || headers.contains_key(header::CONTENT_ENCODING) {
        return false;
    }
    // It would not be true any more.
    if ["content-md5", "digest", "content-digest", "repr-digest"].iter().any(|name| headers.contains_key(*name)) {
        return false;
    }
    // What is to come as it is written must not wait in an encoder.
    if response.extensions().get::<AsItComes>().is_some() {
        return false;
    }
    if response.body().size_hint().exact().is_some_and(|bytes| bytes < compress.min) {
        return false;
    }
    let says = |name, word: &str| {
        headers.get_all(name).iter().any(|value| String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase().contains(word))
    };
    // RFC 9111, section 5.2.2.6.
    if says(header::CACHE_CONTROL, "no-transform") {
        return false;
    }
    // BREACH: who can make a browser send requests, and sees the length of the answers, guesses a secret in them beside what he has sent himself.
    let is_secret =
        asked.contains_key(header::COOKIE) || asked.contains_key(header::AUTHORIZATION) || headers.contains_key(header::SET_COOKIE);
    if is_phps && is_secret && !compress.private {
        return false;
    }
    let Some(kind) = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()) else { return false };
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind != "text/event-stream"
        && compress.types.iter().any(|wanted| match wanted.strip_suffix("/*") {
            Some(prefix) => kind.split('/').next() == Some(prefix),
            None => *wanted == kind,
        })
}

fn vary(headers: &mut HeaderMap) {
    let is_said = headers
        .get_all(header::VARY)
        .iter()
        .any(|value| String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase().contains("accept-encoding"));
    if !is_said {
        headers.append(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    }
}
