//! The other end of the admin socket, for the command line.

use std::{io, path::Path};

use http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// One order and its answer's body. Errors name the socket.
pub async fn call(socket: &Path, method: Method, path: &str, body: Vec<u8>) -> io::Result<Vec<u8>> {
    let named = |e: io::Error| {
        let hint = match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => " (is Slackwater running, with this listen.admin?)",
            io::ErrorKind::PermissionDenied => " (run as the user that Slackwater runs as)",
            _ => "",
        };
        io::Error::new(e.kind(), format!("admin socket {}: {e}{hint}", socket.display()))
    };
    let stream = UnixStream::connect(socket).await.map_err(named)?;
    let broken = |e: hyper::Error| named(io::Error::other(e));
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let driver = tokio::task::spawn_local(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "slackwater")
        .body(Full::<bytes::Bytes>::from(body))
        .map_err(io::Error::other)?;
    let response = sender.send_request(request).await.map_err(broken)?;
    let bytes = response.into_body().collect().await.map_err(broken)?.to_bytes();
    driver.abort();
    Ok(bytes.to_vec())
}
