//! What does not depend on the machine's mood: system calls per request (strace) and instructions in user space per request (callgrind), in row 1a.

use std::{
    collections::BTreeMap,
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    Stage, drive,
    load::{Mode, Plan, Seen},
    peers::{self, Peer, Setup},
    rows,
    support::children,
};

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// System calls for each request, by name, those of at least one in a hundred requests.
    pub calls: BTreeMap<String, f64>,
    pub all_calls: f64,
    /// None: the profiler cannot run it.
    pub instructions: Option<f64>,
}

pub fn measure(stage: &mut Stage) -> BTreeMap<Peer, Counts> {
    let row = rows::all().into_iter().find(|row| row.id == "1a").expect("it is there");
    let setup = super::setup(stage, &row, None);
    let mut found = BTreeMap::new();
    for peer in peers::ALL.into_iter().filter(|peer| row.has(*peer)) {
        let (calls, all_calls) = calls(stage, peer, &setup, row.head());
        let counts = Counts { calls, all_calls, instructions: Some(instructions(stage, peer, &setup, row.head())) };
        println!("  {}: {:.2} system calls, {:.0} instructions", peer.name(), counts.all_calls, counts.instructions.unwrap_or(0.0));
        found.insert(peer, counts);
    }
    found
}

fn plan(address: std::net::SocketAddr, head: String, clients: usize, seconds: f64) -> Plan {
    Plan { address, head, body: 0, clients, seconds, mode: Mode::Kept, certificate: None, resume: false, idle: 0 }
}

fn calls(stage: &Stage, peer: Peer, setup: &Setup, head: String) -> (BTreeMap<String, f64>, f64) {
    let proxy = peers::start(peer, setup, &stage.certificate, &[]);
    let summary = proxy.folder().join("strace");
    let mut strace = Command::new("strace");
    strace.args(["-c", "-f", "-q", "-o"]).arg(&summary);
    for pid in proxy.pids() {
        strace.args(["-p", &pid.to_string()]);
    }
    strace.stdout(Stdio::null()).stderr(Stdio::null());
    // Attached before the first connection and until the last answer: all requests count.
    let plan = plan(proxy.address, head, 64, 2.0);
    let mut tracer = children::spawn(strace, libc::SIGINT).expect("strace starts");
    std::thread::sleep(Duration::from_millis(500));
    let seen: Seen = drive(&plan, Some(1), |_| {}, || {});
    children::signal(tracer.id(), libc::SIGINT);
    let _ = tracer.wait();
    let mut found = BTreeMap::new();
    let mut all = 0.0;
    for line in fs::read_to_string(&summary).unwrap_or_default().lines() {
        // % time, seconds, usecs/call, calls, errors or nothing, name.
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (Some(count), Some(name)) = (fields.get(3).and_then(|n| n.parse::<f64>().ok()), fields.last()) else { continue };
        if *name == "total" {
            continue;
        }
        let each = count / seen.all.max(1) as f64;
        all += each;
        if each >= 0.01 {
            found.insert((*name).to_owned(), each);
        }
    }
    (found, all)
}

/// Two runs of different length, so that what a start costs falls out.
fn instructions(stage: &Stage, peer: Peer, setup: &Setup, head: String) -> f64 {
    let run = |seconds: f64| {
        let before = ["valgrind", "-q", "--tool=callgrind", "--callgrind-out-file=callgrind.out"].map(str::to_owned);
        let proxy = peers::start(peer, setup, &stage.certificate, &before);
        let seen = drive(&plan(proxy.address, head.clone(), 8, seconds), Some(1), |_| {}, || {});
        let folder = proxy.stop();
        let text = fs::read_to_string(folder.path().join("callgrind.out")).unwrap_or_default();
        let total = text.lines().rev().find_map(|line| line.strip_prefix("totals:").or(line.strip_prefix("summary:")));
        (total.and_then(|n| n.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0), seen.all as f64)
    };
    let (short, few) = run(1.0);
    let (long, many) = run(4.0);
    (long - short) / (many - few)
}
