//! The FastCGI responder that the benches measure against: `null_responder ADDRESS BYTES WORKERS`.

use slackwater::fastcgi::responder::{self, Socket};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |what: &str| arguments.next().ok_or_else(|| format!("{what} is missing: null_responder ADDRESS BYTES WORKERS"));
    let (address, bytes, workers) = (next("ADDRESS")?, next("BYTES")?.parse()?, next("WORKERS")?.parse()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(&address).await?;
        responder::serve(Socket::Tcp(listener), workers, responder::fixed(bytes), std::future::pending::<()>()).await;
        Ok(())
    })
}
