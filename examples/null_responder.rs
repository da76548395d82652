//! The FastCGI responder that the benches measure against: `null_responder ADDRESS BYTES WORKERS [HEADERS]`; an address with a slash is a unix socket.

use slackwater::fastcgi::responder::{self, Socket};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next =
        |what: &str| arguments.next().ok_or_else(|| format!("{what} is missing: null_responder ADDRESS BYTES WORKERS [HEADERS]"));
    let (address, bytes, workers) = (next("ADDRESS")?, next("BYTES")?.parse()?, next("WORKERS")?.parse()?);
    let headers = next("HEADERS").map_or(Ok(0), |headers| headers.parse())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    runtime.block_on(async {
        let socket = match address.contains('/') {
            true => Socket::Unix(tokio::net::UnixListener::bind(&address)?),
            false => Socket::Tcp(tokio::net::TcpListener::bind(&address).await?),
        };
        responder::serve(socket, workers, responder::fixed(bytes, headers), std::future::pending::<()>()).await;
        Ok(())
    })
}
