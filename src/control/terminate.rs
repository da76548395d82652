//! The way out: LameDuck, Draining, Aborting, Exited. From Draining on it leaves as soon as nothing is in flight.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};

use super::{Control, Leaving, rfc3339, systemd};
use crate::{
    lifecycle::{
        Phase,
        drain::{CutRequest, Receipt},
    },
    model::settings::Drain,
    upstream::store::{InFlight, Task},
};

/// Of `margin` this is left for the logs and the exit itself.
pub const EXIT_RESERVE: Duration = Duration::from_millis(250);

/// What has been asked for so far; each further one skips to the next phase.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requested {
    pub times: u32,
    /// INT: without the lame-duck phase.
    pub now: bool,
    pub by: String,
}

/// Waits for a request to end and carries it out; gives whether anything was cut.
pub async fn terminate<F>(
    control: Arc<Control>,
    mut requested: watch::Receiver<Requested>,
    close_listeners: impl FnOnce() -> F,
) -> bool
where
    F: Future<Output = Option<oneshot::Receiver<()>>>,
{
    // The sender lives in `control`.
    let first = match requested.wait_for(|r| r.times > 0).await {
        Ok(first) => first.clone(),
        Err(_) => return false,
    };
    let settings = control.store.load().settings.clone();
    let drain = &settings.drain;
    let deadline = Instant::now() + drain.grace.saturating_sub(drain.margin);
    let starting = control.phase.get() == Phase::Starting;
    tracing::info!(by = first.by, phase = control.phase.get().name(), "asked to end");
    let lame_duck_ends = Instant::now() + drain.lame_duck;
    control.told().leaving = Some(Leaving { by: first.by.clone(), since: Instant::now(), next_phase: Some(lame_duck_ends) });
    systemd::stopping();

    if !starting && !first.now && !drain.lame_duck.is_zero() {
        control.phase.set_healthy(!drain.health_fail_delay.is_zero());
        enter(&control, Phase::LameDuck).await;
        let lame_duck = async {
            tokio::time::sleep(drain.health_fail_delay.min(drain.lame_duck)).await;
            control.phase.set_healthy(false);
            tokio::time::sleep(drain.lame_duck.saturating_sub(drain.health_fail_delay)).await;
        };
        tokio::select! {
            () = lame_duck => {}
            _ = requested.wait_for(|r| r.times > 1) => tracing::info!("a second signal: the lame-duck phase is skipped"),
        }
    }
    let asked = requested.borrow().times;
    let (started, draining) = (SystemTime::now(), Instant::now());
    next_phase(&control, deadline);
    enter(&control, Phase::Draining).await;
    let mut receipt = Receipt::begun("drain", first.by, rfc3339(started), deadline.saturating_duration_since(draining));
    if let Some(closed) = close_listeners().await {
        let _ = closed.await;
    }
    let cut = tokio::select! {
        () = control.connections.none() => Vec::new(),
        () = tokio::time::sleep_until(deadline) => cut(&control, drain.margin).await,
        _ = requested.wait_for(|r| r.times > asked) => cut(&control, drain.margin).await,
    };
    control.drained.add_to(&mut receipt);
    receipt.in_flight += cut.len() as u64;
    receipt.cut = cut.into_iter().map(CutRequest::from).collect();
    receipt.seconds = draining.elapsed().as_secs_f64();
    receipt.finished = true;
    finish(&control, &receipt, drain);
    !receipt.cut.is_empty()
}

fn next_phase(control: &Control, at: Instant) {
    if let Some(leaving) = &mut control.told().leaving {
        leaving.next_phase = Some(at);
    }
}

async fn enter(control: &Control, phase: Phase) {
    if control.phase.advance(phase) {
        tracing::info!(phase = phase.name(), connections = control.connections.count(), "phase");
        control.news.notify_one();
        // A worker that does not answer is past listening; the deadline is for it.
        let _ = control
            .workers
            .ask_all(|answer| {
                let _ = answer.send(());
                Task::Phase
            })
            .await;
    }
}

/// Ends what is left, and names it; what has been answered gets the rest of `margin` to reach its client.
async fn cut(control: &Control, margin: Duration) -> Vec<InFlight> {
    next_phase(control, Instant::now() + margin.saturating_sub(EXIT_RESERVE));
    enter(control, Phase::Aborting).await;
    let cut = control.workers.ask_all(Task::Cut).await.map_or_else(|_| Vec::new(), |lists| lists.concat());
    for request in &cut {
        let age = request.age.as_secs_f64();
        tracing::error!(id = request.id, method = request.method, path = request.path, age_seconds = age, "request cut");
    }
    if tokio::time::timeout(margin.saturating_sub(EXIT_RESERVE), control.connections.none()).await.is_err() {
        tracing::warn!(connections = control.connections.count(), "clients have not taken their answers in time");
    }
    cut
}

fn finish(control: &Control, receipt: &Receipt, drain: &Drain) {
    let json = serde_json::to_string(receipt).unwrap_or_default();
    if receipt.cut.is_empty() {
        tracing::info!(receipt = %json, "drained");
    } else {
        tracing::warn!(receipt = %json, "drained, and requests were cut");
    }
    if let Some(path) = &drain.receipt
        && let Err(error) = std::fs::write(path, format!("{json}\n"))
    {
        tracing::error!(path = %path.display(), %error, "the receipt cannot be written");
    }
    control.add_receipt(receipt.clone());
    control.left.send_replace(Some(receipt.clone()));
    control.phase.advance(Phase::Exited);
}
