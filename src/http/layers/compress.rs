//! Answers compressed on their way, by tower-http: what shrinks, is no secret, and is not compressed already.

use std::{
    convert::Infallible,
    future::{Ready, ready},
};

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header, request::Parts};
use http_body::Body;
use tower::{Layer, ServiceExt, service_fn};

use crate::{
    http::{
        answer::{AsItComes, Content},
        files::chosen,
    },
    model::rules::Compress,
};

/// The answer, compressed where it may be. `is_phps`: PHP has had a part in it.
pub async fn shrunk(compress: &Compress, parts: &Parts, is_phps: bool, mut response: Response<Content>) -> Response<Content> {
    if !may_shrink(compress, &parts.headers, is_phps, &response) {
        return response;
    }
    // Also where this client takes none: the next one may.
    vary(response.headers_mut());
    let Some(coding) = chosen(&parts.headers, &compress.codings) else { return response };
    let mut request = Request::new(());
    request.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static(coding.name()));
    let mut response = Some(response);
    let inner = service_fn(move |_: Request<()>| -> Ready<Result<Response<Content>, Infallible>> {
        ready(Ok(response.take().unwrap_or_default()))
    });
    let mut response = match compress.layer.layer(inner).oneshot(request).await {
        Ok(response) => response.map(|body| Content::Compressed(Box::pin(body))),
        Err(never) => match never {},
    };
    // Two codings of one thing are not the same bytes (RFC 9110, section 8.8.3.3).
    if response.headers().contains_key(header::CONTENT_ENCODING)
        && let Some(tag) = response.headers().get(header::ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/"))
        && let Ok(weak) = HeaderValue::from_bytes(&[b"W/", tag.as_bytes()].concat())
    {
        response.headers_mut().insert(header::ETAG, weak);
    }
    response
}

fn may_shrink(compress: &Compress, asked: &HeaderMap, is_phps: bool, response: &Response<Content>) -> bool {
    let headers = response.headers();
    let is_whole = !matches!(response.status(), StatusCode::PARTIAL_CONTENT | StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if !is_whole || response.body().is_over() || headers.contains_key(header::CONTENT_ENCODING) {
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
