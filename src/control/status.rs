//! `/status` as one JSON object (DESIGN.md, section 6), and the gauges of `/metrics`. Query strings are never in it.

use std::{
    sync::atomic::Ordering,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::{Control, Leaving, replicas::Place, rfc3339, tls};
use crate::{
    telemetry::metrics::{Gauges, SetGauge, UpstreamGauge},
    upstream::{Endpoint, Set, dispatch::now_ms, lanes::Lanes, shares},
};

pub fn status(control: &Control) -> Value {
    let snapshot = control.store.load();
    let told = control.told();
    let upstreams: Map<String, Value> = snapshot
        .upstreams
        .iter()
        .map(|(name, upstream)| {
            let queued = upstream.queue.waiting();
            let sets: Map<String, Value> = upstream
                .sets
                .iter()
                .map(|(set_name, set)| {
                    let queued = if *set_name == upstream.activation.set { queued } else { 0 };
                    let endpoints: Vec<Value> = set.endpoints.iter().map(|e| endpoint(e)).collect();
                    let value = json!({
                        "saturation": saturation(set, queued),
                        "usable": set.usable(now_ms()),
                        "capacity": set.capacity(now_ms()),
                        "share": set.share(now_ms()),
                        "replicas": told.replicas.map(|place| place.all),
                        "oversubscribed": oversubscribed(set, told.replicas),
                        "known_age_seconds": known_age(control, set),
                        "endpoints": endpoints,
                    });
                    (set_name.to_string(), value)
                })
                .collect();
            let draining: Vec<Value> = told
                .turning
                .values()
                .filter(|turn| turn.upstream == *name)
                .map(|turn| json!({ "from": &*turn.from, "to": &*turn.to, "seconds": turn.since.elapsed().as_secs_f64() }))
                .collect();
            let value = json!({
                "active": &*upstream.activation.set,
                "active_by": upstream.active_by.to_string(),
                "annotation": told.annotated.get(name),
                "refused": told.refused.get(name),
                "draining": draining,
                "queued": queued,
                "queue_max": upstream.policy.queue.max,
                "retired": upstream.retired,
                "overloaded": upstream.queue.is_overloaded(),
                "lanes": lanes(&upstream.lanes),
                "sets": sets,
            });
            (name.to_string(), value)
        })
        .collect();
    let refused = told.refused.iter().map(|(name, reason)| format!("upstream {name}: annotation not followed: {reason}"));
    let several = told.replicas.is_some_and(|place| place.all > 1);
    let idle_lanes =
        snapshot.upstreams.values().filter(|u| !u.retired && (several || !u.lanes.is_plain())).filter_map(|upstream| {
            let unknown = upstream.active.endpoints.iter().find(|endpoint| endpoint.capacity().is_none())?;
            let what =
                if upstream.lanes.is_plain() { "they are not shared with the other replicas" } else { "lanes have no effect" };
            Some(format!(
                "upstream {}: the workers of {} are not known: nothing is queued, and {what}",
                upstream.name, unknown.address
            ))
        });
    let endpoints = snapshot.upstreams.values().filter(|u| !u.retired).flat_map(|u| u.sets.values()).flat_map(|s| &s.endpoints);
    let not_asked = endpoints.filter_map(|endpoint| match endpoint.status_problem() {
        why if why.is_empty() => None,
        why => Some(format!("FPM's status cannot be asked at {}: {why}", endpoint.address)),
    });
    // What has just come up before what the file has said from the start.
    let warnings: Vec<String> = refused
        .chain(idle_lanes)
        .chain(not_asked)
        .chain(told.cluster.iter().cloned())
        .chain(told.unsaved.clone())
        .chain(told.certificates.clone())
        .chain(snapshot.settings.tls.iter().flat_map(|tls| tls::warnings(&tls.certificates, SystemTime::now())))
        .chain(told.warnings.iter().cloned())
        .collect();
    json!({
        "instance": *control.instance,
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": now_ms() as f64 / 1000.0,
        "now": rfc3339(SystemTime::now()),
        "hung_workers": control.hung_workers(),
        "leaving": told.leaving.as_ref().map(leaving),
        "phase": control.phase.get().name(),
        "generation": snapshot.generation,
        "config_hash": &*snapshot.config_hash,
        "connections": control.connections.count(),
        "connections_max": control.connections_max.load(Ordering::Relaxed),
        "certificates_refused": told.certificates,
        "last_reload": told.reload,
        "upstreams": upstreams,
        "drains": told.receipts,
        "warnings": warnings,
        "waiting_for": told.waiting_for,
    })
}

fn leaving(leaving: &Leaving) -> Value {
    json!({
        "by": leaving.by,
        "seconds": leaving.since.elapsed().as_secs_f64(),
        "next_phase_seconds": leaving.next_phase.map(|at| at.saturating_duration_since(Instant::now()).as_secs_f64()),
    })
}

const STATES: [&str; 5] = ["usable", "disabled", "leaving", "preflight", "unusable"];

fn state(endpoint: &Endpoint) -> &'static str {
    if endpoint.is_disabled() {
        "disabled"
    } else if endpoint.is_leaving() {
        "leaving"
    } else if endpoint.is_usable(now_ms()) {
        "usable"
    } else if endpoint.is_cold() {
        "preflight"
    } else {
        "unusable"
    }
}

fn endpoint(endpoint: &Endpoint) -> Value {
    json!({
        "address": endpoint.address.to_string(),
        "state": state(endpoint),
        "capacity": endpoint.capacity(),
        "share": endpoint.capacity().map(|capacity| endpoint.share().min(capacity)),
        "borrowed": endpoint.borrowed(),
        "busy": endpoint.busy(),
        "parked": endpoint.parked(),
        "reason": endpoint.reason(now_ms()),
    })
}

fn lanes(lanes: &Lanes) -> Value {
    let slots = lanes.capacity();
    let of = |workers: u32| slots.map(|slots| workers.min(slots));
    let named = lanes.named().map(|(at, lane)| {
        let all = slots.unwrap_or(u32::MAX);
        let value = json!({
            "busy": lane.busy(), "waiting": lane.waiting(), "priority": lane.policy.priority,
            "limit": of(lane.limit(all)), "reserve": of(lanes.reserve(at, all)), "kept_free": of(lanes.kept(at, all)),
        });
        (lane.name().to_string(), value)
    });
    Value::Object(named.collect())
}

/// By how many requests at once the replicas together may overrun the set, because each keeps one slot; 0 where there is one for each.
fn oversubscribed(set: &Set, replicas: Option<Place>) -> Option<u32> {
    let capacity = set.capacity(now_ms()).filter(|c| *c > 0)?;
    Some(shares::oversubscribed(capacity, replicas.map_or(1, |place| place.all)))
}

/// 0 for what stands in the file or is being watched; `None`: Kubernetes has told nothing yet.
fn known_age(control: &Control, set: &Set) -> Option<f64> {
    match &set.config.kubernetes {
        None => Some(0.0),
        Some(source) => control.contacts.age(&source.service).map(|age| age.as_secs_f64()),
    }
}

/// Busy and queued over capacity; `None` where a capacity is not known.
fn saturation(set: &Set, queued: usize) -> Option<f64> {
    let capacity = set.capacity(now_ms()).filter(|c| *c > 0)?;
    let busy: u32 = set.endpoints.iter().map(|e| e.busy()).sum();
    let queued = u32::try_from(queued).unwrap_or(u32::MAX);
    Some((f64::from(busy) + f64::from(queued)) / f64::from(capacity))
}

pub fn gauges(control: &Control) -> Gauges {
    let snapshot = control.store.load();
    let (refused, reload_refused, reloaded) = {
        let told = control.told();
        let reload_refused = told.certificates.is_some() || told.reload.as_ref().is_some_and(|reload| reload.outcome == "refused");
        (told.refused.clone(), reload_refused, told.reloaded)
    };
    let upstreams = snapshot
        .upstreams
        .values()
        .map(|upstream| {
            let queued = upstream.queue.waiting();
            let sets = upstream
                .sets
                .values()
                .map(|set| {
                    let active = *set.name() == upstream.activation.set;
                    SetGauge {
                        name: set.name().clone(),
                        active,
                        capacity: set.capacity(now_ms()).map(u64::from),
                        share: set.share(now_ms()).map(u64::from),
                        busy: set.endpoints.iter().map(|e| u64::from(e.busy())).sum(),
                        parked: set.endpoints.iter().map(|e| u64::from(e.parked())).sum(),
                        usable: set.usable(now_ms()) as u64,
                        saturation: saturation(set, if active { queued } else { 0 }),
                        known_age: set.config.kubernetes.as_ref().and_then(|_| known_age(control, set)),
                        states: STATES
                            .map(|state| (state, set.endpoints.iter().filter(|e| self::state(e) == state).count() as u64)),
                    }
                })
                .collect();
            UpstreamGauge {
                name: upstream.name.clone(),
                queued: queued as u64,
                overloaded: upstream.queue.is_overloaded(),
                lanes: upstream.lanes.named().map(|(_, l)| (l.name().clone(), u64::from(l.busy()), l.waiting() as u64)).collect(),
                sets,
                refused: refused.contains_key(&upstream.name),
            }
        })
        .collect();
    let seconds = |at: SystemTime| at.duration_since(UNIX_EPOCH).map_or(0, |at| at.as_secs());
    let certificates = snapshot.settings.tls.iter().flat_map(|tls| &tls.certificates);
    Gauges {
        certificates: certificates.map(|known| (known.file.display().to_string(), seconds(known.not_after))).collect(),
        phase: control.phase.get().name(),
        generation: snapshot.generation,
        upstreams,
        reload_refused,
        reloaded: reloaded.map(seconds),
        ready: control.phase.is_healthy(),
        connections_max: control.connections_max.load(Ordering::Relaxed) as u64,
        ..Gauges::default()
    }
}
