//! The other end of the admin socket, for the command line; and of an ops port, for other replicas.

use std::{io, path::Path};

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};

/// One order and its answer's body. Errors name the socket.
pub async fn call(socket: &Path, method: Method, path: &str, body: Vec<u8>) -> io::Result<Vec<u8>> {
    let named = |e: io::Error| {
        let hint = match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                " (is Slackwater running, with this listen.admin? another configuration: --config FILE; its socket: --admin PATH)"
            }
            io::ErrorKind::PermissionDenied => " (run as the user that Slackwater runs as)",
            _ => "",
        };
        io::Error::new(e.kind(), format!("admin socket {}: {e}{hint}", socket.display()))
    };
    let stream = UnixStream::connect(socket).await.map_err(named)?;
    exchange(stream, "slackwater", method, path, body, usize::MAX).await.map(|(_, bytes)| bytes.to_vec()).map_err(named)
}

/// One request and its whole answer, of at most so many bytes, on a connection of its own.
pub(super) async fn exchange<S>(
    stream: S,
    host: &str,
    method: Method,
    path: &str,
    body: Vec<u8>,
    limit: usize,
) -> io::Result<(u16, Bytes)>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    let driver = tokio::task::spawn_local(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, host)
        .body(Full::<Bytes>::from(body))
        .map_err(io::Error::other)?;
    let response = sender.send_request(request).await.map_err(io::Error::other)?;
    let code = response.status().as_u16();
    let bytes = Limited::new(response.into_body(), limit).collect().await.map_err(io::Error::other)?.to_bytes();
    driver.abort();
    Ok((code, bytes))
}
