//! The commands that speak to a running process over its admin socket.

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use http::Method;
use serde_json::Value;

use super::fail;
use crate::control::{
    api::{EndpointRequest, Outcome, SwapRequest},
    client,
};

/// Shown in the table.
const RECEIPTS: usize = 5;
/// As the process that has cut requests.
const CUT: u8 = 3;

pub enum Order {
    Reload,
    Swap(SwapRequest),
    Endpoint(EndpointRequest),
    Status { json: bool },
    Drain,
}

pub fn run(socket: Result<PathBuf, String>, order: Order) -> ExitCode {
    let socket = match socket {
        Ok(socket) => socket,
        Err(reason) => return fail(&reason),
    };
    super::block_on(async { give(socket, order).await.map_err(|error| error.to_string()) }).unwrap_or_else(|reason| fail(&reason))
}

async fn give(socket: PathBuf, order: Order) -> io::Result<ExitCode> {
    let (path, body) = match &order {
        Order::Status { json } => {
            let status = client::call(&socket, Method::GET, "/status", Vec::new()).await?;
            if *json {
                print!("{}", String::from_utf8_lossy(&status));
            } else {
                print!("{}", table(&serde_json::from_slice(&status)?));
            }
            return Ok(ExitCode::SUCCESS);
        }
        Order::Reload => ("/reload", Vec::new()),
        Order::Drain => return drain(&socket).await,
        Order::Swap(order) => ("/swap", serde_json::to_vec(order)?),
        Order::Endpoint(order) => ("/endpoint", serde_json::to_vec(order)?),
    };
    let answer = client::call(&socket, Method::POST, path, body).await?;
    let outcome: Outcome = serde_json::from_slice(&answer)?;
    tell(&outcome);
    Ok(if outcome.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn tell(outcome: &Outcome) {
    if outcome.ok {
        println!("{}", outcome.message);
    } else {
        eprintln!("slackwater: {}", outcome.message);
    }
    if let Some(receipt) = &outcome.receipt {
        println!("{receipt}");
    }
    for left in &outcome.left {
        eprintln!("left: {left}");
    }
}

/// Shows how it goes, and ends with the exit code that the process has.
async fn drain(socket: &Path) -> io::Result<ExitCode> {
    let order = client::call(socket, Method::POST, "/drain?wait", Vec::new());
    tokio::pin!(order);
    println!("draining");
    let answer = tokio::select! {
        answer = &mut order => answer,
        () = follow_drain(socket) => order.await,
    };
    let outcome: Outcome = serde_json::from_slice(&answer?)?;
    tell(&outcome);
    Ok(match (outcome.ok, &outcome.receipt) {
        (true, _) => ExitCode::SUCCESS,
        (false, Some(_)) => ExitCode::from(CUT),
        (false, None) => ExitCode::FAILURE,
    })
}

/// A line whenever something has changed, until the process does not answer any more.
async fn follow_drain(socket: &Path) {
    let mut last = String::new();
    while let Ok(status) = client::call(socket, Method::GET, "/status", Vec::new()).await {
        let status: Value = serde_json::from_slice(&status).unwrap_or_default();
        let number = status["connections"].as_u64().unwrap_or_default();
        let line = format!(
            "{}: {number} {}",
            status["phase"].as_str().unwrap_or("?"),
            if number == 1 { "connection" } else { "connections" }
        );
        if line != last {
            println!("{line}");
            last = line;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn table(status: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    let mut out = format!(
        "phase {}, generation {}, configuration {}\n",
        text(&status["phase"]),
        status["generation"],
        text(&status["config_hash"])
    );
    if let Some(leaving) = status["leaving"].as_object() {
        let left =
            leaving["next_phase_seconds"].as_f64().map_or_else(String::new, |s| format!(", the next phase in {s:.0} s at most"));
        out += &format!("asked to end by {}{left}\n", text(&leaving["by"]));
    }
    if let Some(hung) = status["hung_workers"].as_array().filter(|hung| !hung.is_empty()) {
        out += &format!("NO SIGN OF LIFE for 5 s from workers {}: /livez fails\n", Value::Array(hung.clone()));
    }
    let reload = &status["last_reload"];
    if reload["outcome"] == "refused" {
        out += &format!("last reload REFUSED, {}: {}\n", text(&reload["at"]), text(&reload["reason"]));
    } else if reload["outcome"].is_string() {
        out += &format!("last reload {}, {}\n", text(&reload["outcome"]), text(&reload["at"]));
    }
    let empty = serde_json::Map::new();
    for (name, upstream) in status["upstreams"].as_object().unwrap_or(&empty) {
        let (active, by) = (text(&upstream["active"]), text(&upstream["active_by"]));
        let overloaded = if upstream["overloaded"] == true { ", OVERLOADED" } else { "" };
        out += &format!("\nupstream {name}: active {active} (by {by}), queued {}{overloaded}\n", upstream["queued"]);
        if let Some(why) = upstream["refused"].as_str() {
            out += &format!("  annotation {} NOT FOLLOWED: {why}\n", text(&upstream["annotation"]));
        }
        for turn in upstream["draining"].as_array().into_iter().flatten() {
            let seconds = turn["seconds"].as_f64().unwrap_or_default();
            out += &format!("  set {} drains since {seconds:.1} s\n", text(&turn["from"]));
        }
        for (lane, of) in upstream["lanes"].as_object().unwrap_or(&empty) {
            let limit = of["limit"].as_u64().map_or_else(String::new, |n| format!(" of {n}"));
            let kept = match of["reserve"].as_u64() {
                Some(reserve) if reserve > 0 => format!(", reserve {reserve}, kept free now {}", of["kept_free"]),
                _ => String::new(),
            };
            out += &format!("  lane {lane}: busy {}{limit}, waiting {}{kept}\n", of["busy"], of["waiting"]);
        }
        for (set_name, set) in upstream["sets"].as_object().unwrap_or(&empty) {
            let saturation = set["saturation"].as_f64().map_or_else(|| "not known".to_owned(), |s| format!("{:.0}%", s * 100.0));
            let age = match set["known_age_seconds"].as_f64() {
                None => ", nothing known from Kubernetes yet".to_owned(),
                Some(0.0) => String::new(),
                Some(age) => format!(", known {age:.0} s ago, see warnings"),
            };
            let share = match (set["replicas"].as_u64(), set["oversubscribed"].as_u64()) {
                (Some(all), Some(too_many)) if all > 1 => {
                    let over = if too_many > 0 { format!(", {too_many} requests more than its workers") } else { String::new() };
                    format!(" by this one of {all} replicas, which may use {} of {} workers{over}", set["share"], set["capacity"])
                }
                _ => String::new(),
            };
            out += &format!("  set {set_name}: usable {}, saturation {saturation}{share}{age}\n", set["usable"]);
            for e in set["endpoints"].as_array().into_iter().flatten() {
                let capacity = e["capacity"].as_u64().map_or_else(|| "?".to_owned(), |n| n.to_string());
                // Of several replicas each has its part.
                let part = match (e["share"].as_u64(), e["borrowed"].as_u64()) {
                    (Some(share), Some(borrowed)) if e["share"] != e["capacity"] => {
                        let borrowed = if borrowed > 0 { format!(" and {borrowed} borrowed") } else { String::new() };
                        format!("{share}{borrowed} of {capacity}")
                    }
                    _ => capacity,
                };
                let line = format!(
                    "    {:<28} {:<9} busy {} parked {} of {part} {}",
                    text(&e["address"]),
                    text(&e["state"]),
                    e["busy"],
                    e["parked"],
                    text(&e["reason"])
                );
                out += &format!("{}\n", line.trim_end());
            }
        }
    }
    for key in ["waiting_for", "warnings"] {
        for line in status[key].as_array().into_iter().flatten() {
            out += &format!("\n{key}: {}\n", text(line));
        }
    }
    // The newest, in short; --json has them whole.
    let receipts = status["drains"].as_array().map_or(&[][..], Vec::as_slice);
    for r in receipts.iter().skip(receipts.len().saturating_sub(RECEIPTS)) {
        let way = match r["kind"].as_str() {
            Some("swap") => format!("swap {} {} -> {}", text(&r["upstream"]), text(&r["from"]), text(&r["to"])),
            _ => "drain".to_owned(),
        };
        let cut = r["cut"].as_array().map_or(0, Vec::len);
        let seconds = r["seconds"].as_f64().unwrap_or_default();
        out += &format!(
            "\n{way}, {}, {seconds:.2} s, by {}: in flight {}, completed {}, failed {}, cut {cut}\n",
            text(&r["started"]),
            text(&r["by"]),
            r["in_flight"],
            r["completed"],
            r["failed"]
        );
    }
    out
}
