//! Row 8, Slackwater alone: what a request costs its worker beside large tables of routes and endpoints, and while snapshots are swapped.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    Options, Stage, drive,
    load::{Mode, Plan},
    peers::{self, Peer, Setup},
    report, rows,
};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Point {
    pub what: String,
    pub round: usize,
    /// Microseconds of the worker per request.
    pub cpu_us: f64,
    pub errors: u64,
}

const SWAP_EVERY: Duration = Duration::from_millis(10);

pub fn measure(stage: &mut Stage, options: &Options) -> Vec<Point> {
    println!("\n8 tables, endpoints, swaps");
    let row = rows::all().into_iter().find(|row| row.id == "1a").expect("it is there");
    let plain = super::setup(stage, &row, None);
    let port = plain.backends[0].rsplit_once(':').expect("an address").1.to_owned();
    let endpoints = |n: usize| (0..n).map(|i| format!("127.1.{}.{}:{port}", i / 250, i % 250 + 1)).collect::<Vec<_>>();
    let cases: Vec<(String, Setup, bool)> = [1, 100, 10_000]
        .map(|routes| (format!("{routes} routes"), Setup { routes, full: false, ..plain.clone() }, false))
        .into_iter()
        .chain(
            [1, 100, 5_000]
                .map(|n| (format!("{n} endpoints"), Setup { backends: endpoints(n), capacity: 64, ..plain.clone() }, false)),
        )
        .chain([(format!("a swap every {} ms", SWAP_EVERY.as_millis()), plain.clone(), true)])
        .collect();
    let proxies: Vec<_> =
        cases.iter().map(|(_, setup, _)| peers::start(Peer::Slackwater, setup, &stage.certificate, &[])).collect();
    let mut points = Vec::new();
    for round in 0..options.rounds {
        for ((what, _, swaps), proxy) in cases.iter().zip(&proxies) {
            let plan = Plan {
                address: proxy.address,
                head: row.head(),
                body: 0,
                clients: row.connections,
                seconds: options.seconds,
                mode: Mode::Kept,
                certificate: None,
                resume: false,
                idle: 0,
            };
            let (before, used, over, turns) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false), AtomicU64::new(0));
            let cpu = || u64::try_from(proxy.cpu_of_threads("worker").as_nanos()).unwrap_or(u64::MAX);
            let seen = std::thread::scope(|scope| {
                if *swaps {
                    scope.spawn(|| {
                        while !over.load(Ordering::Relaxed) {
                            swap(&proxy.admin, if turns.fetch_add(1, Ordering::Relaxed) % 2 == 0 { "green" } else { "blue" });
                            std::thread::sleep(SWAP_EVERY);
                        }
                    });
                }
                let begun = |_: &mut std::process::Child| before.store(cpu(), Ordering::Relaxed);
                let seen = drive(&plan, Some(1), begun, || used.store(cpu() - before.load(Ordering::Relaxed), Ordering::Relaxed));
                over.store(true, Ordering::Relaxed);
                seen
            });
            let cpu_us = used.into_inner() as f64 / 1e3 / seen.requests.max(1) as f64;
            let turns = turns.into_inner();
            println!(
                "  {what}: {cpu_us:.2} us of the worker, {} errors{}",
                seen.errors,
                if *swaps { format!(", {turns} swaps") } else { String::new() }
            );
            points.push(Point { what: what.clone(), round, cpu_us, errors: seen.errors });
        }
    }
    points
}

/// As `slackwater swap` does, without its process.
fn swap(admin: &Path, set: &str) {
    let body = format!("{{\"upstream\":\"php\",\"set\":\"{set}\"}}");
    let mut stream = UnixStream::connect(admin).expect("the admin socket is there");
    write!(stream, "POST /swap HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .expect("it is taken");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it is answered");
    assert!(answer.contains(" 200 "), "the swap is refused: {answer}");
}

/// Each case by its median, beside the first of its kind.
pub fn table(points: &[Point]) -> String {
    let mut out = "| | CPU of the worker per request, us | errors |\n|---|---|---|\n".to_owned();
    let mut seen: Vec<&str> = Vec::new();
    for point in points {
        if !seen.contains(&point.what.as_str()) {
            seen.push(&point.what);
        }
    }
    for what in seen {
        let mine = || points.iter().filter(|point| point.what == what);
        let median = report::median(mine().map(|point| point.cpu_us)).unwrap_or(f64::NAN);
        out += &format!("| {what} | {median:.2} | {} |\n", mine().map(|point| point.errors).sum::<u64>());
    }
    out
}
