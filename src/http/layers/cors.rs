//! Pages of other origins: the CORS protocol of the Fetch standard, by tower-http.

use http::{HeaderMap, HeaderName, Method, Request, Response, header, request::Parts};

use super::through::through;
use crate::{http::answer::Content, model::rules::Cors};

/// A browser's question whether it may ask. Any other OPTIONS is the application's.
pub fn is_preflight(parts: &Parts) -> bool {
    parts.method == Method::OPTIONS
        && parts.headers.contains_key(header::ORIGIN)
        && parts.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// The answer with its headers for the browser: theirs take the place of PHP's. `is_preflight`: instead of the answer the one that a browser asked for.
pub async fn told(cors: &Cors, parts: &Parts, is_preflight: bool, mut response: Response<Content>) -> Response<Content> {
    let mut request = Request::new(());
    if is_preflight {
        *request.method_mut() = Method::OPTIONS;
    }
    *request.headers_mut() = asked(&parts.headers);
    // What PHP says of it: it might let in who is not named, or with credentials.
    let theirs: Vec<HeaderName> =
        response.headers().keys().filter(|name| name.as_str().starts_with("access-control-")).cloned().collect();
    for name in theirs {
        response.headers_mut().remove(name);
    }
    through(&cors.layer, request, response).await
}

/// The part of the request that matters here.
fn asked(headers: &HeaderMap) -> HeaderMap {
    let names = [header::ORIGIN, header::ACCESS_CONTROL_REQUEST_METHOD, header::ACCESS_CONTROL_REQUEST_HEADERS];
    names.into_iter().filter_map(|name| Some((name.clone(), headers.get(name)?.clone()))).collect()
}
