//! Slackwater beside Nginx, HAProxy and Caddy, row by row (DESIGN.md, section 8), in turns, one worker each on core 0, clients and responder on core 1.
//!
//!   benches/compare/run [--rounds 5] [--seconds 1] [--rows 1a,1b] [--again]
//!
//! What has been measured is kept, so that an interrupted run goes on where it stopped; `--again` forgets it.

#[allow(unused, reason = "the bench uses a part of what the tests stand on")]
#[path = "../../tests/support/mod.rs"]
mod support;

mod counts;
mod load;
mod peers;
mod report;
mod rows;
mod tables;

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use load::{Mode, Plan, Seen};
use peers::{Certificate, Peer, Running, Setup};
use rows::{Clients, Judged, Row};
use serde::{Deserialize, Serialize};
use support::{children, ports, real_fpm::RealFpm};

/// Of FPM, in the rows with a real one.
const FPM_WORKERS: usize = 8;
/// The p99 of one second is an accident: its rounds differ by a factor of fifty.
const OPEN_TIMES_LONGER: f64 = 5.0;

/// One proxy in one round of one row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    pub row: String,
    pub peer: Peer,
    pub round: usize,
    /// Microseconds per request.
    pub cpu_us: f64,
    pub rate: f64,
    pub seen: Seen,
    /// Of the whole proxy.
    pub rss: u64,
    /// Bytes for each idle connection, and CPU in percent of a core while nothing happens.
    pub idle: Option<(f64, f64)>,
}

/// Everything that was measured.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// What was measured: `git describe`, and the day, at the first sample.
    #[serde(default)]
    pub measured: String,
    pub samples: Vec<Sample>,
    /// System calls and instructions per request, by proxy.
    pub counts: BTreeMap<Peer, counts::Counts>,
    pub tables: Vec<tables::Point>,
}

pub struct Options {
    pub rounds: usize,
    pub seconds: f64,
    rows: Vec<String>,
    state: PathBuf,
    page: PathBuf,
    plot: PathBuf,
}

/// What all rows share.
pub struct Stage {
    pub certificate: Certificate,
    pub files: tempfile::TempDir,
    responders: BTreeMap<String, Responder>,
    folder: tempfile::TempDir,
}

struct Responder {
    child: Option<Child>,
    address: String,
}

impl Drop for Responder {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            children::kill_family(child);
        }
    }
}

impl Stage {
    fn new() -> Stage {
        let [files, folder] = [(); 2].map(|()| tempfile::tempdir().expect("a temporary folder"));
        for folder in [files.path(), folder.path()] {
            fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("our folder");
        }
        let page: String = (0..600).map(|n| format!("<p>A line of a page, number {n}, and some more of it.\n")).collect();
        for (name, bytes) in
            [("10k.bin", vec![b'x'; 10 * 1024]), ("10m.bin", vec![b'x'; 10 * 1024 * 1024]), ("page.html", page.into())]
        {
            fs::write(files.path().join(name), bytes).expect("it is written");
        }
        let gzip = Command::new("gzip").arg("-k").arg(files.path().join("page.html")).status().expect("gzip runs");
        assert!(gzip.success());
        Stage { certificate: Certificate::new(), files, responders: BTreeMap::new(), folder }
    }

    /// A null responder, started once, on core 1.
    pub fn responder(&mut self, bytes: usize, headers: usize, unix: bool) -> String {
        let key = format!("{bytes}-{headers}-{unix}");
        if let Some(running) = self.responders.get(&key) {
            return running.address.clone();
        }
        let (told, address) = match unix {
            true => {
                let path = self.folder.path().join(format!("{key}.sock")).display().to_string();
                (path.clone(), format!("unix:{path}"))
            }
            false => {
                // On every loopback address: one row has thousands of endpoints.
                let port = ports::free_address().port();
                (format!("0.0.0.0:{port}"), format!("127.0.0.1:{port}"))
            }
        };
        let program = Path::new(env!("CARGO_BIN_EXE_slackwater")).parent().expect("a folder").join("examples/null_responder");
        let mut command = Command::new("taskset");
        command.args(["-c", "1"]).arg(program).args([&told, &bytes.to_string(), "4096", &headers.to_string()]);
        let child = children::spawn(command, libc::SIGTERM).expect("the responder starts");
        self.responders.insert(key, Responder { child: Some(child), address: address.clone() });
        std::thread::sleep(Duration::from_millis(200));
        if let Some(path) = address.strip_prefix("unix:") {
            fs::set_permissions(path, fs::Permissions::from_mode(0o777)).expect("the socket is there");
        }
        address
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [word, plan] = &arguments[..]
        && word == "load"
    {
        return load::run(serde_json::from_str(plan).expect("the plan is ours"));
    }
    let options = options(&arguments);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    runtime.block_on(compare(&options));
}

fn options(arguments: &[String]) -> Options {
    let mut options = Options {
        rounds: 5,
        seconds: 1.0,
        rows: Vec::new(),
        state: PathBuf::from("target/compare.json"),
        page: PathBuf::from("target/benchmarks.md"),
        plot: PathBuf::from("target/benchmarks.svg"),
    };
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        match word.as_str() {
            "--rounds" => options.rounds = value.parse().expect("--rounds NUMBER"),
            "--seconds" => options.seconds = value.parse().expect("--seconds NUMBER"),
            "--rows" => options.rows = value.split(',').map(str::to_owned).collect(),
            "--state" => options.state = value.into(),
            "--page" => options.page = value.into(),
            "--plot" => options.plot = value.into(),
            _ => panic!("unknown argument {word}"),
        }
    }
    options
}

impl Options {
    fn wants(&self, id: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|row| id == row || (row.len() == 1 && id.starts_with(row.as_str())))
    }
}

async fn compare(options: &Options) {
    let mut state: State = fs::read(&options.state).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    let save = |state: &State| {
        fs::write(&options.state, serde_json::to_vec(state).expect("plain data")).expect("what was measured is kept");
    };
    if state.measured.is_empty() {
        state.measured = format!(
            "{} at {}",
            report::command("date", &["-u", "+%F"]),
            report::command("git", &["describe", "--always", "--dirty"])
        );
    }
    let mut stage = Stage::new();
    // After each row, so that an interrupted run has told what it knows.
    let tell = |state: &State| {
        fs::write(&options.page, report::page(state, &rows::all(), options)).expect("the page is written");
        fs::write(&options.plot, report::plot(state, &rows::all())).expect("the plot is written");
    };
    // The rates of the open loop are parts of it.
    let all = rows::all();
    for row in all.iter().filter(|row| options.wants(row.id)) {
        // Memory is the same each time, and making the connections takes long.
        let rounds = if row.idle > 0 { 1 } else { options.rounds };
        let has = |state: &State, peer: Peer, round: usize| {
            state.samples.iter().any(|s| s.row == row.id && s.peer == peer && s.round == round)
        };
        let mine: Vec<Peer> = peers::ALL.into_iter().filter(|peer| row.has(*peer)).collect();
        if mine.iter().all(|peer| (0..rounds).all(|round| has(&state, *peer, round))) {
            continue;
        }
        tell(&state);
        println!("\n{} {}", row.id, row.title);
        let fpm = match row.fpm {
            Some(_) => Some(RealFpm::builder("blue").workers(FPM_WORKERS).docroot(&support::real_fpm::php_folder()).start().await),
            None => None,
        };
        let setup = setup(&mut stage, row, fpm.as_ref());
        let rate = top_rate(&state);
        let mut running: BTreeMap<Peer, Running> = BTreeMap::new();
        for round in 0..rounds {
            for peer in &mine {
                if has(&state, *peer, round) {
                    continue;
                }
                // Each begins anew where its memory is measured.
                if row.idle > 0 {
                    running.clear();
                }
                let proxy = running.entry(*peer).or_insert_with(|| peers::start(*peer, &setup, &stage.certificate, &[]));
                let sample = measure(options, &stage, row, *peer, proxy, round, rate);
                println!("  {}", report::line(&sample));
                state.samples.push(sample);
                save(&state);
            }
        }
    }
    if options.wants("8") && state.tables.is_empty() {
        state.tables = tables::measure(&mut stage, options);
        save(&state);
    }
    if options.wants("1a") && state.counts.is_empty() {
        state.counts = counts::measure(&mut stage);
        save(&state);
    }
    tell(&state);
}

/// Nginx's, in the same row in closed loop.
fn top_rate(state: &State) -> f64 {
    report::median(state.samples.iter().filter(|s| s.row == "1a" && s.peer == Peer::Nginx).map(|s| s.rate)).unwrap_or(20_000.0)
}

fn setup(stage: &mut Stage, row: &Row, fpm: Option<&RealFpm>) -> Setup {
    let backends = match fpm {
        Some(fpm) => vec![fpm.tcp_address().to_string()],
        None => vec![stage.responder(row.bytes, if row.headers { 30 } else { 0 }, row.unix)],
    };
    Setup {
        backends,
        // As many as ask at once: the others know no such limit.
        capacity: if fpm.is_some() { FPM_WORKERS } else { 4096 },
        reuse: row.reuse,
        full: row.full,
        tls: row.tls,
        files: row.file.map(|_| stage.files.path().to_owned()),
        docroot: fpm.map_or_else(|| PathBuf::from("/app"), |fpm| fpm.docroot().to_owned()),
        workers: row.workers,
        // PHP has the whole machine, as far as the proxy leaves it.
        core: (fpm.is_none() && row.workers == 1).then_some(0),
        memory: row.post > 64 * 1024,
        routes: 0,
    }
}

fn measure(options: &Options, stage: &Stage, row: &Row, peer: Peer, proxy: &Running, round: usize, top: f64) -> Sample {
    let mut sample =
        Sample { row: row.id.to_owned(), peer, round, cpu_us: 0.0, rate: 0.0, seen: Seen::default(), rss: 0, idle: None };
    if let Clients::Http2(streams) = row.clients {
        let (seen, cpu) = h2load(options, proxy, streams);
        sample.cpu_us = cpu.as_secs_f64() * 1e6 / seen.requests.max(1) as f64;
        (sample.rate, sample.rss, sample.seen) = (seen.requests as f64 / seen.seconds, proxy.rss(), seen);
        return sample;
    }
    let plan = Plan {
        address: proxy.address,
        head: row.head(),
        body: row.post,
        clients: row.connections,
        seconds: options.seconds * if matches!(row.clients, Clients::Open(_)) { OPEN_TIMES_LONGER } else { 1.0 },
        mode: match row.clients {
            Clients::Open(part) => Mode::Open(part * top),
            Clients::Anew => Mode::Anew,
            _ => Mode::Kept,
        },
        certificate: row.tls.then(|| stage.certificate.der.clone()),
        resume: row.resume,
        idle: row.idle,
    };
    let core = (row.fpm.is_none() && row.workers == 1).then_some(1);
    if row.judged == Judged::Memory {
        // What it needs once, whoever asks, is there already.
        drive(&Plan { idle: 0, seconds: 0.5, ..plan.clone() }, core, |_| {}, || {});
        let before = proxy.rss();
        let mut found = (0.0, 0.0);
        let held = drive(
            &Plan { mode: Mode::Hold, ..plan },
            core,
            |child| {
                std::thread::sleep(Duration::from_secs(1));
                let bytes = proxy.rss().saturating_sub(before) as f64 / row.idle as f64;
                let (cpu, began) = (proxy.cpu(), Instant::now());
                std::thread::sleep(Duration::from_secs(5));
                found = (bytes, 100.0 * (proxy.cpu() - cpu).as_secs_f64() / began.elapsed().as_secs_f64());
                drop(child.stdin.take());
            },
            || {},
        );
        sample.idle = Some(found);
        sample.rss = proxy.rss();
        sample.seen = held;
        return sample;
    }
    let (cpu, used) = (Cell::new(Duration::ZERO), Cell::new(Duration::ZERO));
    let seen = drive(&plan, core, |_| cpu.set(proxy.cpu()), || used.set(proxy.cpu() - cpu.get()));
    sample.cpu_us = used.get().as_secs_f64() * 1e6 / seen.requests.max(1) as f64;
    (sample.rate, sample.rss, sample.seen) = (seen.requests as f64 / seen.seconds, proxy.rss(), seen);
    sample
}

/// Runs the clients; `begun` is called when they begin to count, `ended` when they have stopped. Gives what they have seen.
pub fn drive(plan: &Plan, core: Option<usize>, begun: impl FnOnce(&mut Child), ended: impl FnOnce()) -> Seen {
    let program = std::env::current_exe().expect("its own path");
    let mut command = match core {
        Some(core) => {
            let mut command = Command::new("taskset");
            command.args(["-c", &core.to_string()]).arg(program);
            command
        }
        None => Command::new(program),
    };
    command.arg("load").arg(serde_json::to_string(plan).expect("plain data"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = children::spawn(command, libc::SIGKILL).expect("the clients start");
    let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines().map_while(Result::ok);
    assert_eq!(lines.next().as_deref(), Some("begin"), "the clients begin");
    begun(&mut child);
    let mut next = lines.next();
    if next.as_deref() == Some("end") {
        ended();
        next = lines.next();
    }
    let seen = serde_json::from_str(&next.expect("the clients have seen something")).expect("the clients' own words");
    let _ = child.wait();
    seen
}

/// h2load's own log has the time of each request.
fn h2load(options: &Options, proxy: &Running, streams: u32) -> (Seen, Duration) {
    let log = proxy.folder().join("h2load.log");
    let _ = fs::remove_file(&log);
    let cpu = proxy.cpu();
    let began = Instant::now();
    let output = Command::new("taskset")
        .args(["-c", "1", "h2load", "-t", "1", "-c", "32", "-m", &streams.to_string(), "-D"])
        .arg(options.seconds.ceil().to_string())
        .arg("--log-file")
        .arg(&log)
        .arg(format!("--connect-to={}", proxy.address))
        .arg(format!("https://localhost:{}/index.php", proxy.address.port()))
        .output()
        .expect("h2load runs");
    let used = proxy.cpu() - cpu;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with("requests:")).unwrap_or_default();
        let field = line.trim_start_matches("requests:").split(',').find(|field| field.trim().ends_with(name));
        field.and_then(|field| field.trim().split(' ').next()?.parse().ok()).unwrap_or(0)
    };
    let mut times = hdrhistogram::Histogram::<u64>::new_with_bounds(1, 60_000_000, 3).expect("its bounds are right");
    for line in fs::read_to_string(&log).unwrap_or_default().lines() {
        if let Some(micros) = line.split('\t').nth(2).and_then(|field| field.parse().ok()) {
            times.saturating_record(micros);
        }
    }
    let seen = Seen {
        requests: number("succeeded"),
        all: number("done"),
        errors: number("failed") + number("errored") + number("timeout"),
        seconds: began.elapsed().as_secs_f64(),
        p50_us: times.value_at_quantile(0.5),
        p99_us: times.value_at_quantile(0.99),
        p999_us: times.value_at_quantile(0.999),
        max_us: times.max(),
        ..Seen::default()
    };
    assert!(seen.requests > 0, "h2load has got no answer: {text}{}", String::from_utf8_lossy(&output.stderr));
    (seen, used)
}
