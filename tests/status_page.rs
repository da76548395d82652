//! The status page of the ops port and its stream of events; in a browser by `tests/long status-page`.

mod support;

use std::{
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use support::{
    gate::{Gate, eventually, within},
    http::{self, Connection},
    process::Slackwater,
    real_fpm::RealFpm,
    scripted_fpm::{Behaviour, ScriptedFpm},
};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};

const PATIENCE: Duration = Duration::from_secs(20);

fn toml(blue: &str, green: &str, listen: &str) -> String {
    format!(
        "workers = 1\n[listen]\nhttp = [\"{{HTTP}}\"]\nops = \"{{OPS}}\"\nadmin = \"{{ADMIN}}\"\n{listen}\n[drain]\nlame_duck = \"0s\"\ngrace = \"30s\"\n\
         [upstream.php]\nactive = \"blue\"\nworkers_per_endpoint = 4\n[upstream.php.set.blue]\nendpoints = [{blue}]\n[upstream.php.set.green]\nendpoints = [{green}]\n\
         [[site]]\nphp_root = \"/app\"\nscripts = [\"/*.php\"]\nupstream = \"php\"\n"
    )
}

async fn start(listen: &str) -> (ScriptedFpm, ScriptedFpm, Slackwater) {
    let blue = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let green = ScriptedFpm::start(Behaviour::hello("green")).await;
    let proxy = Slackwater::start(&toml(&format!("\"{}\"", blue.address()), &format!("\"{}\"", green.address()), listen)).await;
    (blue, green, proxy)
}

/// A reader of `/events`.
struct Reader(Connection<tokio::net::TcpStream>, Vec<u8>);

impl Reader {
    async fn open(proxy: &Slackwater) -> Result<Reader, u16> {
        let mut connection = Connection::open(proxy.ops()).await.unwrap();
        connection.send(http::request("GET", "/events", &[], b"")).await.unwrap();
        let head = within(PATIENCE, "a head", connection.read_head()).await.unwrap();
        if head.status != 200 {
            return Err(head.status);
        }
        assert_eq!(head.header("Content-Type"), Some("text/event-stream"));
        assert_eq!(head.header("Cache-Control"), Some("no-store"));
        Ok(Reader(connection, Vec::new()))
    }

    /// The next document; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(at) = self.1.windows(2).position(|two| two == b"\n\n") {
                let message: Vec<u8> = self.1.drain(..at + 2).collect();
                let message = String::from_utf8(message).unwrap();
                if let Some(data) = message.strip_prefix("event: status\ndata: ") {
                    return Some(serde_json::from_str(data).unwrap_or_else(|error| panic!("{error} in {data:?}")));
                }
                assert_eq!(message, "retry: 2000\n\n");
                continue;
            }
            match within(PATIENCE, "an event", self.0.read_chunk()).await {
                Ok(chunk) if !chunk.is_empty() => self.1.extend_from_slice(&chunk),
                _ => return None,
            }
        }
    }

    async fn until(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let document = self.next().await.unwrap_or_else(|| panic!("{what}: the stream has ended"));
            if wanted(&document) {
                return document;
            }
            assert!(begun.elapsed() < PATIENCE, "not {what}: {document}");
        }
    }
}

/// Everything that the page has stands in it, and its policy lets nothing else run: not even what a name in the configuration smuggles in.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_whole_and_nothing_else_may_run_on_it() {
    let (_blue, _green, proxy) = start("").await;
    let page = http::get(proxy.ops(), "/").await.unwrap();
    assert_eq!((page.status, page.header("Content-Type")), (200, Some("text/html; charset=utf-8")));
    let policy = page.header("Content-Security-Policy").unwrap();
    assert!(policy.starts_with("default-src 'none'; style-src 'sha256-") && policy.contains("script-src 'sha256-"), "{policy}");
    assert!(!policy.contains("unsafe"), "{policy}");
    let text = page.text();
    for outside in ["http://", "https://", "src=", "@import", "url(", "innerHTML", "insertAdjacentHTML", "document.write", "eval("]
    {
        let where_it_is = text.lines().find(|line| line.contains(outside) && !line.contains("http://www.w3.org/2000/svg"));
        assert_eq!(where_it_is, None, "{outside}");
    }
    assert!(!text.contains(" style=\"") && !text.contains(" onclick"), "the policy would refuse them");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_for_those_who_may_see_the_status() {
    let (_blue, _green, proxy) = start("ops_allow = [\"10.0.0.0/8\"]").await;
    for path in ["/", "/events", "/status"] {
        let answer = http::get(proxy.ops(), path).await.unwrap();
        assert_eq!((answer.status, answer.text().as_str()), (403, "127.0.0.1 is not in listen.ops_allow\n"), "{path}");
    }
    assert_eq!(http::get(proxy.ops(), "/livez").await.unwrap().status, 200);
}

/// What goes on is told within a second: how much of it, a swap while its old set drains, its receipt, and the way out.
#[tokio::test(flavor = "multi_thread")]
async fn the_stream_shows_a_swap_and_the_way_out_as_they_happen() {
    let gate = Gate::closed();
    let (blue, green, mut proxy) = start("").await;
    blue.on("/held", Behaviour::hello("blue").holds_answer(&gate));
    let mut reader = Reader::open(&proxy).await.unwrap();
    let first = reader.next().await.unwrap();
    assert_eq!((&first["phase"], &first["version"]), (&json!("Running"), &json!(env!("CARGO_PKG_VERSION"))));
    assert_eq!(first["upstreams"]["php"]["queue_max"], json!(1000));
    let mut client = Connection::open(proxy.http()).await.unwrap();
    for _ in 0..200 {
        assert_eq!(client.get("/a.php").await.unwrap().status, 200);
    }
    assert_eq!(http::get(proxy.http(), "/%00").await.unwrap().status, 400);
    let busy =
        reader.until("200 requests", |document| document["live"]["sites"][0]["requests_per_second"].as_f64() > Some(10.0)).await;
    let live = &busy["live"];
    let requests = live["sites"][0]["requests_per_second"].as_f64().unwrap() * live["window_seconds"].as_f64().unwrap();
    assert!((199.0..=201.5).contains(&requests.round()), "{live}");
    assert!(live["sites"][0]["p99_ms"].as_f64().unwrap() > 0.0 && live["sites"][0]["server_errors_per_second"] == 0.0, "{live}");
    let address = proxy.http();
    let held = tokio::spawn(async move { http::get(address, "/held.php").await });
    blue.wait_begun(201).await;
    proxy.cli_ok(&["swap", "php", "green"]).await;
    let turned = reader.until("the swap", |document| document["upstreams"]["php"]["active"] == "green").await;
    assert_eq!(turned["upstreams"]["php"]["draining"][0]["from"], "blue", "{turned}");
    gate.open();
    let drained = reader.until("the receipt", |document| document["drains"][0]["kind"] == "swap").await;
    assert_eq!(drained["drains"][0]["completed"], 1, "{drained}");
    assert_eq!(held.await.unwrap().unwrap().status, 200);
    // The stream does not keep the process: it shows the drain, and ends with it.
    let slow = Gate::closed();
    green.on("/held", Behaviour::hello("green").holds_answer(&slow));
    let last = tokio::spawn(async move { http::get(address, "/held.php").await });
    green.wait_begun(1).await;
    proxy.terminate();
    let leaving = reader.until("the drain", |document| document["phase"] == "Draining").await;
    assert_eq!(leaving["leaving"]["by"], "SIGTERM");
    assert!((1.0..30.0).contains(&leaving["leaving"]["next_phase_seconds"].as_f64().unwrap()), "{leaving}");
    slow.open();
    assert_eq!(last.await.unwrap().unwrap().status, 200);
    assert_eq!(proxy.wait_exit(PATIENCE).await, 0);
    while reader.next().await.is_some() {}
}

/// Those who look do not take the port from the kubelet's checks, and a place is free again when one leaves.
#[tokio::test(flavor = "multi_thread")]
async fn readers_are_few_and_leave_room() {
    let (_blue, _green, proxy) = start("").await;
    let mut readers = Vec::new();
    for _ in 0..8 {
        readers.push(Reader::open(&proxy).await.unwrap());
    }
    assert_eq!(Reader::open(&proxy).await.err(), Some(503));
    assert_eq!(http::get(proxy.ops(), "/livez").await.unwrap().status, 200);
    // Longer than any other connection to this port is kept.
    let last = readers.last_mut().unwrap();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(12) {
        assert!(last.next().await.is_some(), "ended after {:?}", begun.elapsed());
    }
    drop(readers);
    eventually("there is room again", async || Reader::open(&proxy).await.map_err(|status| status.to_string())).await;
}

/// `tests/browser/drive.py`.
struct Browser {
    lines: Lines<BufReader<tokio::process::ChildStdout>>,
    stdin: tokio::process::ChildStdin,
    child: tokio::process::Child,
}

impl Browser {
    fn start() -> Browser {
        let mut command = tokio::process::Command::new("/usr/bin/python3");
        command.arg("tests/browser/drive.py").stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("python3 (tests/browser/install)");
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Browser { lines: BufReader::new(stdout).lines(), stdin, child }
    }

    async fn tell(&mut self, what: &str, how: impl Into<Value>) -> Value {
        let line = json!({ what: how.into() }).to_string() + "\n";
        self.stdin.write_all(line.as_bytes()).await.unwrap();
        let answer = within(Duration::from_secs(90), what, self.lines.next_line()).await.unwrap().expect("Chromium goes on");
        let mut answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer.get("error"), None, "{line}: {answer}");
        answer["ok"].take()
    }

    async fn until(&mut self, javascript: &str) {
        self.tell("until", javascript).await;
    }

    /// With all of Chromium's processes, which nobody else would end.
    async fn close(self) {
        let Browser { lines, stdin, mut child } = self;
        drop((lines, stdin));
        within(Duration::from_secs(60), "Chromium ends", child.wait()).await.unwrap();
    }
}

const VERDICT: &str = "document.querySelector('#verdict').textContent";

/// A person at 3 a.m.: opens the page, sees that all is well, a swap as it happens with the requests that are left on the old set, a reload that is refused and why, and the
/// end of the process; with the keyboard, in the dark, on a telephone. `SCREENSHOT=docs/img/status-page.png` keeps the picture of the swap.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "wants Chromium: tests/long status-page"]
async fn long_status_page() {
    let blue = [RealFpm::builder("blue").workers(4).start().await, RealFpm::builder("blue").workers(4).start().await];
    let green = [RealFpm::builder("green").workers(4).start().await, RealFpm::builder("green").workers(4).start().await];
    let endpoints = |pools: &[RealFpm]| pools.iter().map(|fpm| format!("\"{}\"", fpm.tcp_address())).collect::<Vec<_>>().join(", ");
    let config = toml(&endpoints(&blue), &endpoints(&green), "")
        .replace("php_root = \"/app\"", &format!("root = \"{}\"", blue[0].docroot().display()))
        .replace("grace = \"30s\"", "grace = \"90s\"");
    // Each pool has a copy of the scripts of its own, which are the same.
    let config = config
        .replace("[upstream.php.set.green]", &format!("[upstream.php.set.green]\nphp_root = \"{}\"", green[0].docroot().display()));
    let mut proxy = Slackwater::start(&config).await;
    let mut browser = Browser::start();
    browser.tell("look", json!([1280, "light"])).await;
    browser.tell("open", format!("http://{}/", proxy.ops())).await;
    browser.until(&format!("{VERDICT}.includes('Serving. All 2 pods of the active sets are usable.')")).await;
    browser.tell("key", "TAB").await;
    assert_eq!(
        browser.tell("ask", "document.activeElement.className").await,
        "skip",
        "the keyboard finds the way past the head first"
    );
    browser
        .tell("ask", "document.querySelector('#pause').focus() ?? (window.pod = document.querySelector('tr.pod')).isConnected")
        .await;
    // Load that goes on through the swap; three requests that take longer than it.
    let address = proxy.http();
    let load = tokio::spawn(async move {
        let mut client = Connection::open(address).await.unwrap();
        let mut failed = 0;
        let end = Instant::now() + Duration::from_secs(14);
        while Instant::now() < end {
            let answer = client.get("/hello.php").await;
            failed += usize::from(answer.map(|answer| answer.status).ok() != Some(200));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        failed
    });
    let slow: Vec<_> = (0..3).map(|_| tokio::spawn(async move { http::get(address, "/socket.php?ms=7000").await })).collect();
    eventually("the slow ones run", async || match proxy.metric(&["slackwater_upstream_busy", "blue"]).await {
        Some(busy) if busy >= 3.0 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    browser.until("Number(document.querySelector('#sites tr .number')?.textContent.replaceAll(/[^0-9.]/g, '')) > 10").await;
    let asked = Instant::now();
    proxy.cli_ok(&["swap", "php", "green"]).await;
    browser.until(&format!("{VERDICT}.includes('turns from blue to green')")).await;
    println!("the page showed the swap {:?} after it was ordered (promised: a second)", asked.elapsed());
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    browser.until("document.querySelector('tbody[data-colour=blue] .tag').textContent.includes('draining,')").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    for (name, width, scheme) in
        [("status-page-phone", 360, "dark"), ("status-page-dark", 1280, "dark"), ("status-page", 1280, "light")]
    {
        browser.tell("look", json!([width, scheme])).await;
        let wide = browser.tell("ask", "document.documentElement.scrollWidth - document.documentElement.clientWidth").await;
        assert_eq!(wide, 0, "{name} scrolls sideways");
        if let Ok(file) = std::env::var("SCREENSHOT")
            && width > 360
        {
            let file = Path::new(&file).with_file_name(format!("{name}.png"));
            browser.tell("shot", file.display().to_string()).await;
        }
    }
    browser.tell("look", json!([1280, "light"])).await;
    for answer in slow {
        assert_eq!(answer.await.unwrap().unwrap().status, 200);
    }
    browser.until("/3 completed/.test(document.querySelector('#receipt-rows tr').textContent)").await;
    assert_eq!(
        browser.tell("ask", "document.activeElement.id === 'pause' && window.pod.isConnected").await,
        true,
        "focus and rows stay"
    );
    assert_eq!(load.await.unwrap(), 0, "requests of the load have failed");
    proxy.rewrite(&config.replace("active = \"blue\"", "active = \"bleu\""));
    proxy.signal(libc::SIGHUP);
    browser.until(&format!("{VERDICT}.includes('reload was refused')")).await;
    browser.until("document.querySelector('#reload-reason').textContent.includes('bleu')").await;
    let console = browser.tell("console", true).await;
    assert_eq!(console, json!([]), "nothing is refused by the policy, and no script has an error");
    let held = tokio::spawn(async move { http::get(address, "/socket.php?ms=3000").await });
    eventually("it runs", async || match proxy.metric(&["slackwater_upstream_busy", "green"]).await {
        Some(1.0) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    proxy.terminate();
    browser.until(&format!("{VERDICT}.includes('Draining (SIGTERM)')")).await;
    assert_eq!(held.await.unwrap().unwrap().status, 200);
    assert_eq!(proxy.wait_exit(PATIENCE).await, 0);
    browser
        .until(
            "!document.querySelector('#banner').hidden && document.querySelector('#banner').textContent.includes('No news since')",
        )
        .await;
    browser.close().await;
}
