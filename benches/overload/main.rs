//! Overload, side by side: two real FPM pods of four workers, one of them half as fast, behind each proxy in turn, with arrivals that do not wait for
//! answers and clients that give up after two seconds. Writes a table, and a plot.
//!
//!   benches/overload/run [--seconds 8] [--again]
//!
//! What has been measured is kept, so that an interrupted run goes on where it stopped; `--again` forgets it.

#[allow(unused, reason = "the bench uses a part of what the tests stand on")]
#[path = "../../tests/support/mod.rs"]
mod support;

mod load;
mod peers;
mod report;

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use load::{End, Plan, Seen};
use peers::Peer;
use serde::{Deserialize, Serialize};
use support::{process::Slackwater, real_fpm::RealFpm};

/// Percent of what the two pods can do.
pub const LOADS: [u32; 6] = [50, 100, 150, 200, 300, 500];
pub const WORKERS: usize = 4;
/// Not counted into goodput and latency: until then the queues fill.
const WARM_UP: Duration = Duration::from_secs(2);

/// What the scripts do with their time.
#[derive(Clone, Copy, Debug)]
pub struct Script {
    pub name: &'static str,
    pub path: &'static str,
    pub what: &'static str,
}

pub const SCRIPTS: [Script; 2] = [
    Script { name: "wait", path: "/wait.php?ms=50", what: "scripts that wait on a socket for 50 ms (100 ms on the slow pod)" },
    Script { name: "burn", path: "/burn.php?ms=10", what: "scripts that burn 10 ms of CPU (20 ms on the slow pod)" },
];

/// One proxy at one load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    pub script: String,
    pub peer: String,
    pub percent: u32,
    /// Requests a second.
    pub capacity: f64,
    pub offered: usize,
    /// Answers a second after the warm-up.
    pub goodput: f64,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub refused: usize,
    pub failed: usize,
    pub gave_up: usize,
    pub executions: usize,
    /// Executions whose answer nobody got.
    pub dead: usize,
    /// Executions that began after their client had left.
    pub late: usize,
    pub listen_queue: u64,
}

/// A lane beside a route that is saturated.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LaneStep {
    pub peer: String,
    pub saturated: bool,
    pub answered: usize,
    pub not_answered: usize,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
}

struct Pools {
    pods: [RealFpm; 2],
    docroot: tempfile::TempDir,
    journal: tempfile::TempDir,
}

impl Pools {
    async fn start() -> Pools {
        let [docroot, journal] = [(); 2].map(|()| tempfile::tempdir().expect("a temporary folder"));
        support::real_fpm::copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/overload/php"), &docroot.path().join("php"));
        for (folder, mode) in [(docroot.path(), 0o755), (journal.path(), 0o777)] {
            fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("our folder");
        }
        let pod = async |slowness: &str| {
            RealFpm::builder("blue")
                .workers(WORKERS)
                .status_listen()
                .docroot(&docroot.path().join("php"))
                .env("SLOWNESS", slowness)
                .env("EXECUTIONS", &journal.path().join("j").display().to_string())
                .start()
                .await
        };
        let pods = [pod("1").await, pod("2").await];
        Pools { pods, docroot, journal }
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.pods.iter().map(RealFpm::tcp_address).collect()
    }

    fn docroot(&self) -> PathBuf {
        self.docroot.path().join("php")
    }

    /// Until nobody works and nothing waits; whatever a proxy has sent goes on after its clients have left.
    async fn idle(&self) {
        let began = Instant::now();
        loop {
            let mut busy = false;
            for pod in &self.pods {
                // Seen: now and then an answer that is no JSON. It is asked again.
                let Ok(status) = pod.status().await else {
                    busy = true;
                    continue;
                };
                let at_work = status["processes"].as_array().expect("full").iter().any(|p| p["state"] == "Running");
                busy |= at_work || status["listen queue"] != 0;
            }
            if !busy {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "FPM is still busy a minute after the load");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Id, deadline, begin and end of every execution since the last time.
    fn executions(&self) -> Vec<(u64, f64, f64)> {
        let mut all = Vec::new();
        for file in fs::read_dir(self.journal.path()).expect("our folder").map(|entry| entry.expect("an entry").path()) {
            for line in fs::read_to_string(&file).expect("a journal").lines() {
                let fields: Vec<&str> = line.split(' ').collect();
                let number = |at: usize| fields[at].parse::<f64>().expect("a number");
                all.push((fields[0].parse().expect("an id"), number(1), number(2)));
            }
            fs::remove_file(file).expect("our file");
        }
        all
    }

    /// What both pods do in a second, each of their workers asked without a pause.
    async fn capacity(&self, script: Script) -> f64 {
        let (time, mut clients) = (Duration::from_secs(4), tokio::task::JoinSet::new());
        let (path, query) = script.path.split_once('?').expect("a query");
        for pod in &self.pods {
            for _ in 0..WORKERS {
                let (address, docroot, path) = (pod.address().clone(), self.docroot(), path.to_owned());
                let query = format!("{query}&id=0&deadline=0");
                clients.spawn(async move {
                    let (began, mut n) = (Instant::now(), 0_u32);
                    while began.elapsed() < time {
                        let params = support::fastcgi::script_params(&docroot.display().to_string(), &path, &query);
                        let params: Vec<(&str, &str)> = params.iter().map(|(name, value)| (*name, value.as_str())).collect();
                        support::fastcgi::ask(&address, &params, &[]).await.expect("FPM answers");
                        n += 1;
                    }
                    f64::from(n) / began.elapsed().as_secs_f64()
                });
            }
        }
        let capacity = clients.join_all().await.into_iter().sum();
        self.executions();
        capacity
    }
}

/// `None`: there is none.
fn percentile(sorted: &[Duration], part: f64) -> Option<f64> {
    let at = ((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).map(|took| took.as_secs_f64() * 1e3)
}

fn answered(seen: &[Seen]) -> Vec<Duration> {
    let mut took: Vec<Duration> = seen.iter().filter(|one| one.end == End::Answered).map(|one| one.took).collect();
    took.sort();
    took
}

async fn step(pools: &Pools, script: Script, peer: Peer, percent: u32, capacity: f64, time: Duration) -> Step {
    let proxy = peers::start(peer, &pools.addresses(), &pools.docroot()).await;
    // What a proxy learns it may learn before; and its first connections are made.
    let warm = Plan { address: proxy.address(), path: script.path.into(), rate: 20.0, time: Duration::from_secs(1), seed: 7 };
    load::offer(&warm, 0).await;
    // The last line is written after the answer.
    tokio::time::sleep(Duration::from_millis(200)).await;
    pools.executions();

    let stop = Arc::new(AtomicBool::new(false));
    let watched = async {
        let mut most = 0;
        while !stop.load(Ordering::Relaxed) {
            for pod in &pools.pods {
                let Ok(status) = pod.status().await else { continue };
                most = most.max(status["listen queue"].as_u64().unwrap_or(0));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        most
    };
    let plan = Plan { rate: capacity * f64::from(percent) / 100.0, time, seed: 42, ..warm };
    let offered = async {
        let seen = load::offer(&plan, 1).await;
        stop.store(true, Ordering::Relaxed);
        seen
    };
    let (seen, listen_queue) = tokio::join!(offered, watched);
    // Kept connections end with it; what FPM has in its backlog is worked off all the same.
    drop(proxy);
    pools.idle().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let executions = pools.executions();

    let count = |end: End| seen.iter().filter(|one| one.end == end).count();
    // While the load lasts: neither its first moments, in which the queues fill, nor what is worked off behind it.
    let in_window: Vec<Seen> = seen.iter().copied().filter(|one| (WARM_UP..time).contains(&one.ended)).collect();
    let took = answered(&in_window);
    Step {
        script: script.name.into(),
        peer: peer.name().into(),
        percent,
        capacity,
        offered: seen.len(),
        goodput: took.len() as f64 / (time - WARM_UP).as_secs_f64(),
        p50_ms: percentile(&took, 0.5),
        p99_ms: percentile(&took, 0.99),
        refused: count(End::Refused),
        failed: count(End::Failed),
        gave_up: count(End::GaveUp),
        executions: executions.len(),
        dead: executions.len().saturating_sub(count(End::Answered)),
        late: executions.iter().filter(|(_, deadline, began)| began > deadline).count(),
        listen_queue,
    }
}

const LANES: &str = "[upstream.php.lane.checkout]\nreserve = \"25%\"\n";
const ROUTES: &str = "[[site.route]]\npath = \"/checkout.php\"\nscript = \"/wait.php\"\nlane = \"checkout\"\n";

/// Ten checkouts a second, alone and beside three times as many slow requests as the pods can do.
async fn lane_step(pools: &Pools, with_lanes: bool, saturated: bool, time: Duration) -> LaneStep {
    let (lanes, routes) =
        if with_lanes { (LANES, ROUTES) } else { ("", "[[site.route]]\npath = \"/checkout.php\"\nscript = \"/wait.php\"\n") };
    let proxy = Slackwater::start(&peers::ours(&pools.addresses(), &pools.docroot(), lanes, routes)).await;
    let slow = Plan { address: proxy.http(), path: "/wait.php?ms=400".into(), rate: 45.0, time: time + WARM_UP, seed: 1 };
    let checkout = Plan { address: proxy.http(), path: "/checkout.php?ms=50".into(), rate: 10.0, time: time + WARM_UP, seed: 2 };
    let seen = if saturated {
        tokio::join!(load::offer(&checkout, 1), load::offer(&slow, 1_000_000)).0
    } else {
        load::offer(&checkout, 1).await
    };
    pools.idle().await;
    // In the first moments the lane has not been used yet, and all is lent.
    let seen: Vec<Seen> = seen.into_iter().filter(|one| one.ended > WARM_UP).collect();
    let took = answered(&seen);
    LaneStep {
        peer: if with_lanes { "with the lane" } else { "without" }.into(),
        saturated,
        answered: took.len(),
        not_answered: seen.len() - took.len(),
        p50_ms: percentile(&took, 0.5),
        p99_ms: percentile(&took, 0.99),
    }
}

/// Lines of JSON: what has been measured already.
struct Kept<T> {
    file: PathBuf,
    pub steps: Vec<T>,
}

impl<T: Serialize + for<'a> Deserialize<'a>> Kept<T> {
    fn open(file: PathBuf) -> Kept<T> {
        let text = fs::read_to_string(&file).unwrap_or_default();
        Kept { file, steps: text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect() }
    }

    fn add(&mut self, step: T) {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(&self.file).expect("the state file");
        writeln!(file, "{}", serde_json::to_string(&step).expect("numbers and words")).expect("the state file");
        self.steps.push(step);
    }
}

fn argument(name: &str) -> Option<String> {
    let all: Vec<String> = std::env::args().collect();
    all.iter().position(|arg| arg == name).and_then(|at| all.get(at + 1).cloned())
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let time = Duration::from_secs(argument("--seconds").map_or(8, |text| text.parse().expect("--seconds N")));
    let state = PathBuf::from(argument("--state").expect("--state FOLDER, as benches/overload/run gives it"));
    fs::create_dir_all(&state).expect("the state folder");
    let mut steps: Kept<Step> = Kept::open(state.join("steps"));
    let mut lanes: Kept<LaneStep> = Kept::open(state.join("lanes"));
    let pools = Pools::start().await;
    for script in SCRIPTS {
        let known = steps.steps.iter().find(|step| step.script == script.name).map(|step| step.capacity);
        let capacity = match known {
            Some(capacity) => capacity,
            None => pools.capacity(script).await,
        };
        println!("{}: {capacity:.1} requests a second", script.what);
        for percent in LOADS {
            // In turns, so that what changes on the machine meets all of them.
            for peer in peers::ALL {
                let same = |s: &&Step| s.script == script.name && s.peer == peer.name() && s.percent == percent;
                if steps.steps.iter().find(same).is_none() {
                    steps.add(step(&pools, script, peer, percent, capacity, time).await);
                }
                if let Some(step) = steps.steps.iter().find(same) {
                    println!("{}", report::line(step));
                }
            }
        }
    }
    for (with_lanes, saturated) in [(true, false), (true, true), (false, true)] {
        if lanes.steps.len() < 3 {
            let step = lane_step(&pools, with_lanes, saturated, time * 2).await;
            println!("{step:?}");
            lanes.add(step);
        }
    }
    if let Some(table) = argument("--table") {
        fs::write(table, report::table(&steps.steps, &lanes.steps, time)).expect("the table");
    }
    if let Some(plot) = argument("--plot") {
        fs::write(plot, report::plot(&steps.steps)).expect("the plot");
    }
}
