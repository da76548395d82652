//! An answer that there is already, through a layer of tower-http: those want a service to ask.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll},
};

use http::{Request, Response};
use tower::{Layer, Service, ServiceExt};

use crate::http::answer::Content;

/// Gives its answer once.
pub struct Given(Response<Content>);

impl Service<Request<()>> for Given {
    type Response = Response<Content>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Content>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<()>) -> Self::Future {
        ready(Ok(std::mem::take(&mut self.0)))
    }
}

/// `request`: the headers that the layer looks at.
pub async fn through<L, B>(layer: &L, request: Request<()>, response: Response<Content>) -> Response<B>
where
    L: Layer<Given, Service: Service<Request<()>, Response = Response<B>, Error = Infallible>>,
{
    match layer.layer(Given(response)).oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
