//! Open-loop load: requests come when they come, whatever became of those before; a client that waits for its answer would hide the overload. Each has a
//! connection of its own and gives up after its patience, by closing it.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

pub const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Clone, Debug)]
pub struct Plan {
    pub address: SocketAddr,
    pub path: String,
    /// A second.
    pub rate: f64,
    pub time: Duration,
    pub seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Answered,
    /// 503.
    Refused,
    /// Any other status, a reset, an answer that is not whole.
    Failed,
    GaveUp,
}

/// What one client saw.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub id: u64,
    /// Since the load began.
    pub ended: Duration,
    pub took: Duration,
    pub end: End,
}

/// Poisson arrivals: the same for everybody who has the same seed. Returns when the last client has its answer or has given up.
pub async fn offer(plan: &Plan, first_id: u64) -> Vec<Seen> {
    let mut dice = StdRng::seed_from_u64(plan.seed);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let began = Instant::now();
    let mut next = Duration::ZERO;
    let mut clients = tokio::task::JoinSet::new();
    let mut id = first_id;
    loop {
        let uniform: f64 = dice.random();
        next += Duration::from_secs_f64(-(1.0 - uniform).ln() / plan.rate);
        if next >= plan.time {
            break;
        }
        tokio::time::sleep_until((began + next).into()).await;
        let (plan, seen, now) = (plan.clone(), seen.clone(), id);
        id += 1;
        clients.spawn(async move {
            let start = Instant::now();
            let end = tokio::time::timeout(PATIENCE, client(&plan, now)).await.unwrap_or(End::GaveUp);
            seen.lock().unwrap().push(Seen { id: now, ended: began.elapsed(), took: start.elapsed(), end });
        });
        while clients.try_join_next().is_some() {}
    }
    while clients.join_next().await.is_some() {}
    let mut seen = seen.lock().unwrap().clone();
    seen.sort_by_key(|one| one.id);
    seen
}

async fn client(plan: &Plan, id: u64) -> End {
    let deadline = (SystemTime::now() + PATIENCE).duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let asked = async {
        let mut stream = TcpStream::connect(plan.address).await?;
        stream.set_nodelay(true)?;
        let (path, join) = (&plan.path, if plan.path.contains('?') { '&' } else { '?' });
        let head =
            format!("GET {path}{join}id={id}&deadline={deadline:.6} HTTP/1.1\r\nHost: example.com\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let Ok(answer) = asked.await else { return End::Failed };
    match answer.get(9..12) {
        Some(b"200") if answer.ends_with(b"ed\n") || answer.ends_with(b"0\r\n\r\n") => End::Answered,
        Some(b"503") => End::Refused,
        _ => End::Failed,
    }
}
