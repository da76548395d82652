//! Answers that need neither file nor script: `redirect` and `respond`.

use http::{HeaderValue, Response, StatusCode, header};

use super::{
    answer::Content,
    variables::{Place, Variables},
};
use crate::{
    error::{Error, Kind},
    model::rules::Action,
};

/// # Errors
/// 500 where a redirect leads to what cannot be sent in a header: the configuration's fault.
pub fn answer(action: &Action, variables: &Variables<'_>) -> Result<Response<Content>, Error> {
    match action {
        Action::Redirect { to, status } => {
            let written = &to.source;
            let mut to = variables.fill(to, Place::Location);
            // A path that a variable has made to look like another host.
            if written.starts_with('/') && !written.starts_with("//") && to.starts_with("//") {
                to = format!("/{}", to.trim_start_matches('/'));
            }
            let location = HeaderValue::from_str(&to)
                .map_err(|_| Error::new(Kind::Internal, format!("the redirect leads to {to:?}, which is no URL")))?;
            let text = format!("{} {}\n", status.as_u16(), status.canonical_reason().unwrap_or("Redirect"));
            let mut response = response(*status, text, HeaderValue::from_static("text/plain; charset=utf-8"));
            response.headers_mut().insert(header::LOCATION, location);
            Ok(response)
        }
        Action::Respond { status, body, content_type } => {
            Ok(response(*status, variables.fill(body, Place::Body), content_type.clone()))
        }
    }
}

fn response(status: StatusCode, body: String, content_type: HeaderValue) -> Response<Content> {
    let bodiless = matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let is_empty = body.is_empty() || bodiless;
    let mut response = Response::new(if is_empty { Content::Empty } else { Content::from(body) });
    *response.status_mut() = status;
    if !is_empty {
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    }
    response
}
