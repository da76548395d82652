//! What is to be said when nobody asks: a worker that hangs, an active set that has nobody left, and the end of either. Looked at once a second.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::Control;
use crate::{lifecycle::Phase, upstream::dispatch::now_ms};

const EVERY: Duration = Duration::from_secs(1);
/// An endpoint that nothing asks is offered again after each ejection, until it fails again: only what lasts is the end of it.
const LASTS: Duration = Duration::from_secs(10);

pub async fn run(control: Arc<Control>) {
    let mut hung = Vec::new();
    let mut empty = BTreeMap::new();
    loop {
        tokio::time::sleep(EVERY).await;
        look_at_workers(&control, &mut hung);
        look_at_sets(&control, &mut empty);
    }
}

fn look_at_workers(control: &Control, before: &mut Vec<usize>) {
    let now = control.hung_workers();
    if now == *before {
        return;
    }
    if now.is_empty() {
        tracing::info!(workers = ?before, "the workers that hung give signs of life again");
    } else {
        tracing::error!(workers = ?now, "no sign of life from workers for 5 s: what they have accepted stands still, /livez fails");
    }
    *before = now;
    control.news.notify_one();
}

/// By upstream: since when its active set has had usable endpoints again; `None`: it has none.
type Empty = BTreeMap<Arc<str>, Option<Instant>>;

fn look_at_sets(control: &Control, empty: &mut Empty) {
    // Before, `waiting_for` says it.
    if control.phase.get() == Phase::Starting {
        return;
    }
    let snapshot = control.store.load();
    empty.retain(|name, _| snapshot.upstreams.get(name).is_some_and(|upstream| !upstream.retired));
    for (name, upstream) in snapshot.upstreams.iter().filter(|(_, upstream)| !upstream.retired) {
        let usable = upstream.active.usable(now_ms());
        match (empty.get_mut(name), usable) {
            // A Service that has nobody has a line of its own.
            (None, 0) if !upstream.active.endpoints.is_empty() => {
                let others = upstream.sets.values().filter(|set| *set.name() != upstream.activation.set);
                let usable_elsewhere: Vec<String> = others
                    .map(|set| (set.name(), set.usable(now_ms())))
                    .filter(|(_, usable)| *usable > 0)
                    .map(|(set, usable)| format!("{set}: {usable}"))
                    .collect();
                let reasons: Vec<String> =
                    upstream.active.endpoints.iter().map(|e| format!("{}: {}", e.address, e.reason(now_ms()))).take(4).collect();
                tracing::error!(
                    upstream = &**name,
                    set = &**upstream.active.name(),
                    ?reasons,
                    ?usable_elsewhere,
                    "no endpoint of the active set is usable; they are tried all the same"
                );
                empty.insert(name.clone(), None);
            }
            (Some(since @ Some(_)), 0) => *since = None,
            (Some(since @ None), 1..) => *since = Some(Instant::now()),
            (Some(Some(since)), 1..) if since.elapsed() >= LASTS => {
                tracing::info!(
                    upstream = &**name,
                    set = &**upstream.active.name(),
                    usable,
                    "the active set has usable endpoints again"
                );
                empty.remove(name);
            }
            _ => {}
        }
    }
}
