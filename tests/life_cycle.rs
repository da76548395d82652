//! Starting, draining, cutting and reloading, as a load balancer and a client see them.

mod support;

use std::time::{Duration, Instant};

use support::{
    gate::Gate,
    http,
    ledger::{Ledger, LedgerClient, Shape},
    load_balancer::LoadBalancer,
    process::{Slackwater, Wait},
    real_fpm::RealFpm,
    relay::Relay,
    scripted_fpm::{Behaviour, ScriptedFpm},
};

fn toml(address: impl std::fmt::Display, root: &str, drain: &str) -> String {
    format!(
        r#"
        workers = 2
        [listen]
        http = ["{{HTTP}}"]
        ops = "{{OPS}}"
        admin = "{{ADMIN}}"
        health_path = "/healthz"
        trusted_proxies = ["127.0.0.0/8"]
        [drain]
        {drain}
        [upstream.php]
        workers_per_endpoint = 4
        read_timeout = "5s"
        [upstream.php.set.blue]
        endpoints = ["{address}"]
        [[site]]
        php_root = "{root}"
        upstream = "php"
        scripts = ["/*.php"]
        "#
    )
}

/// Terminates a proxy under a load balancer's traffic, behind a network of 30 ms, and holds the receipt against the ledger.
async fn terminate_under_load(busy: usize, mostly_idle: usize) {
    let fpm = RealFpm::builder("blue").workers(4).start().await;
    let root = fpm.docroot().display().to_string();
    let drain = "grace = \"20s\"\nlame_duck = \"8s\"\nquiet = \"1s\"\nreceipt = \"{DIR}/drain.json\"";
    let mut proxy = Slackwater::start(&toml(fpm.tcp_address(), &root, drain)).await;
    let relay = Relay::start(proxy.http()).await;
    let balancer = LoadBalancer::builder(relay.address()).health_path("/healthz").clients(busy).start();
    let ledger = balancer.ledger().clone();
    // They pause for seconds between two requests, so that many a connection is idle when its end comes.
    let idle = LoadBalancer::builder(relay.address())
        .health_path("/healthz")
        .clients(mostly_idle)
        .pause(Duration::from_secs(3))
        .ledger(&ledger)
        .start();
    ledger.wait_entries(100).await;
    proxy.terminate();
    balancer.wait_out(0).await;
    idle.wait_out(0).await;
    let code = proxy.wait_exit(Duration::from_secs(60)).await;
    balancer.stop().await;
    idle.stop().await;
    let summary = ledger.summary();
    let receipt = std::fs::read_to_string(proxy.folder().join("drain.json")).unwrap();
    println!("{summary}{receipt}");
    assert_eq!(code, 0);
    ledger.assert_clean();
    compare_receipt_with_ledger(&receipt, &proxy, &ledger);
}

/// The access log has each request of the ledger once, with the status that the client saw; and of those lines the receipt has all that
/// ended after Draining began.
fn compare_receipt_with_ledger(receipt: &str, proxy: &Slackwater, ledger: &Ledger) {
    let receipt: serde_json::Value = serde_json::from_str(receipt).unwrap();
    let lines: Vec<_> = proxy.log_json().into_iter().filter(|line| line["bytes_sent"].is_number()).collect();
    let mut seen: std::collections::HashMap<String, Vec<u64>> = Default::default();
    for line in lines.iter().filter(|line| line["path"] != "/healthz") {
        seen.entry(line["id"].as_str().unwrap().to_owned()).or_default().push(line["status"].as_u64().unwrap());
    }
    for entry in ledger.entries() {
        let status = u64::from(entry.status().unwrap());
        assert_eq!(seen.remove(&entry.id), Some(vec![status]), "{entry:?}");
    }
    assert!(seen.is_empty(), "requests that no client sent: {seen:?}");

    let began = millis(receipt["started"].as_str().unwrap());
    let ended_after = |at: f64| {
        let end = |line: &serde_json::Value| millis(line["time"].as_str().unwrap()) + line["seconds"].as_f64().unwrap() * 1000.0;
        lines.iter().filter(|line| end(line) >= at).count() as u64
    };
    let in_flight = receipt["in_flight"].as_u64().unwrap();
    // The log has whole milliseconds, and workers hear of the phase one after the other.
    let (fewest, most) = (ended_after(began + 20.0), ended_after(began - 5.0));
    assert!((fewest..=most).contains(&in_flight), "the receipt has {in_flight}, the log {fewest} to {most}: {receipt}");
    assert_eq!(receipt["completed"], receipt["in_flight"], "{receipt}");
    for nothing in ["client_left", "failed"] {
        assert_eq!(receipt[nothing], 0, "{receipt}");
    }
}

/// Of the day.
fn millis(time: &str) -> f64 {
    let clock = time.split_once('T').unwrap().1.trim_end_matches('Z');
    clock.split(':').fold(0.0, |sum, part| sum * 60.0 + part.parse::<f64>().unwrap()) * 1000.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_load_balancer_sees_no_failure_when_the_process_ends() {
    terminate_under_load(8, 16).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "one of the 20 terminations of `tests/long terminations`"]
async fn long_termination() {
    terminate_under_load(64, 200).await;
}

/// Ten reloads, each of which changes something, while clients are busy and many connections idle, behind a network of 30 ms.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "one of the 10 rounds of `tests/long reloads`"]
async fn long_reloads() {
    let fpm = RealFpm::builder("blue").workers(4).start().await;
    let root = fpm.docroot().display().to_string();
    let good = toml(fpm.tcp_address(), &root, "");
    let proxy = Slackwater::start(&good).await;
    let relay = Relay::start(proxy.http()).await;
    let busy = LedgerClient::builder(relay.address()).connections(64).start();
    let ledger = busy.ledger().clone();
    let idle = LedgerClient::builder(relay.address()).connections(200).pause(Duration::from_secs(2)).ledger(&ledger).start();
    ledger.wait_entries(500).await;
    for turn in 0..10 {
        proxy.rewrite(&format!("{good}\n[site.params]\nTURN = \"{turn}\"\n"));
        assert!(proxy.cli_ok(&["reload"]).await.contains("applied"));
        ledger.wait_more(200).await;
    }
    busy.stop().await;
    idle.stop().await;
    println!("{}", ledger.summary());
    ledger.assert_clean();
    assert_eq!(ledger.summary().reconnects, 0, "a reload has closed a connection");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_at_the_end_of_grace_is_cut_named_and_told_by_exit_3() {
    let gate = Gate::closed();
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&gate)).await;
    let mut proxy = Slackwater::start(&toml(fpm.address(), "/app", "grace = \"4s\"\nlame_duck = \"0s\"\nmargin = \"2s\"")).await;
    let address = proxy.http();
    let cut =
        tokio::spawn(async move { http::send(address, "GET", "/index.php?secret=1", &[("X-Request-ID", "the-one")], b"").await });
    fpm.wait_begun(1).await;
    proxy.terminate();
    assert_eq!(proxy.wait_exit(Duration::from_secs(40)).await, 3);
    assert!(cut.await.unwrap().is_err(), "a cut request looked answered");
    let log = proxy.log_text();
    assert!(log.contains("request cut") && log.contains("the-one"), "{log}");
    assert_eq!(access_lines(&log, "the-one"), 1, "the receipt can be held against the access log: {log}");
    let line = log.lines().find(|line| line.starts_with("{\"time\":") && line.contains("the-one")).unwrap();
    assert!(line.contains("\"status\":503") && line.contains("\"cause\":\"cut\""), "its client has not left: {line}");
    assert!(!log.lines().any(|l| l.contains("receipt") && l.contains("secret")), "a query string in a receipt");
}

/// From exec to the first 200 of /readyz, without Kubernetes: under 100 ms is promised.
#[tokio::test(flavor = "multi_thread")]
async fn it_is_ready_soon_after_its_start() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let ops = support::ports::free_address();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("slackwater.toml");
    let text = toml(fpm.address(), "/app", "")
        .replace("{HTTP}", &support::ports::free_address().to_string())
        .replace("{OPS}", &ops.to_string())
        .replace("{ADMIN}", &folder.path().join("admin.sock").display().to_string());
    std::fs::write(&file, text).unwrap();
    let mut took = Vec::new();
    for _ in 0..5 {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_slackwater"));
        command.args(["serve", "--config"]).arg(&file).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let began = Instant::now();
        let mut child = command.kill_on_drop(true).spawn().unwrap();
        loop {
            // Nobody listens at first; then it is ready or says what is missing.
            if http::get(ops, "/readyz").await.is_ok_and(|answer| answer.status == 200) {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "not ready after {:?}", began.elapsed());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        took.push(began.elapsed());
        child.kill().await.unwrap();
    }
    took.sort_unstable();
    println!("ready after {took:?} (promised: 100 ms)");
    assert!(took[2] < Duration::from_secs(1), "{took:?}");
}

/// Lines of the access log with this id.
fn access_lines(log: &str, id: &str) -> usize {
    log.lines().filter(|line| line.starts_with("{\"time\":") && line.contains(id)).count()
}

/// Whoever drains by command is told how it went, and finds it in the exit code.
#[tokio::test(flavor = "multi_thread")]
async fn the_order_to_drain_ends_as_the_process_does() {
    for cuts in [false, true] {
        let gate = Gate::closed();
        let fpm = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&gate)).await;
        let mut proxy =
            Slackwater::start(&toml(fpm.address(), "/app", "grace = \"4s\"\nlame_duck = \"0s\"\nmargin = \"2s\"")).await;
        let address = proxy.http();
        let last = tokio::spawn(async move { http::get(address, "/index.php").await });
        fpm.wait_begun(1).await;
        let (output, ()) = tokio::join!(proxy.cli(&["drain"]), async {
            proxy.wait_for_log("Draining", Duration::from_secs(20)).await;
            if !cuts {
                gate.open();
            }
        });
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        let (code, words) = if cuts { (3, "1 request was cut") } else { (0, "drained\n") };
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(words) && said.contains("\"in_flight\":1"), "{said}");
        assert_eq!(last.await.unwrap().is_ok(), !cuts);
        assert_eq!(proxy.wait_exit(Duration::from_secs(20)).await, code);
    }
}

/// The process ends right behind the last answer, and its line is there all the same.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_answers_before_the_end_are_in_the_access_log() {
    for nth in 0..3 {
        let gate = Gate::closed();
        let fpm = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&gate)).await;
        let mut proxy = Slackwater::start(&toml(fpm.address(), "/app", "grace = \"20s\"\nlame_duck = \"0s\"")).await;
        let address = proxy.http();
        let last =
            tokio::spawn(async move { http::send(address, "GET", "/index.php", &[("X-Request-ID", "last-one")], b"").await });
        fpm.wait_begun(1).await;
        proxy.terminate();
        proxy.wait_for_log("Draining", Duration::from_secs(20)).await;
        gate.open();
        assert_eq!(last.await.unwrap().unwrap().status, 200);
        assert_eq!(proxy.wait_exit(Duration::from_secs(40)).await, 0);
        assert_eq!(access_lines(&proxy.log_text(), "last-one"), 1, "{nth}: {}", proxy.log_text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lame_duck_serves_and_says_close_and_a_second_signal_skips_it() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let mut proxy = Slackwater::start(&toml(fpm.address(), "/app", "grace = \"60s\"\nlame_duck = \"50s\"")).await;
    let mut kept = http::Connection::<tokio::net::TcpStream>::open(proxy.http()).await.unwrap();
    assert!(kept.get("/index.php").await.unwrap().keeps_alive());
    let started = Instant::now();
    proxy.terminate();
    proxy.wait_for_log("LameDuck", Duration::from_secs(5)).await;
    let answer = kept.get("/index.php").await.unwrap();
    assert_eq!((answer.status, answer.keeps_alive()), (200, false));
    assert_eq!(http::get(proxy.ops(), "/readyz").await.unwrap().status, 503);
    assert_eq!(http::get(proxy.ops(), "/livez").await.unwrap().status, 200);
    assert_eq!(http::get(proxy.http(), "/healthz").await.unwrap().status, 503);
    proxy.terminate();
    assert_eq!(proxy.wait_exit(Duration::from_secs(30)).await, 0);
    println!("left after {:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn while_starting_php_gets_503_with_retry_after() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let toml = toml(port, "/app", "").replace("[upstream.php.set.blue]", "[upstream.php.set.blue]\nping = \"/ping\"");
    let mut proxy = Slackwater::builder(&toml).wait(Wait::Live).start().await;
    let answer = http::get(proxy.http(), "/index.php").await.unwrap();
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    let ready = http::get(proxy.ops(), "/readyz").await.unwrap();
    assert!(ready.status == 503 && ready.text().contains("no usable endpoint"), "{}", ready.text());
    let fpm = ScriptedFpm::builder(Behaviour::hello("blue")).at(port).start().await;
    proxy.wait_status("/readyz", 200).await;
    assert_eq!(http::get(proxy.http(), "/index.php").await.unwrap().status, 200);
    drop(fpm);
}

#[tokio::test(flavor = "multi_thread")]
async fn reloads_under_load_lose_nothing_and_a_bad_file_changes_nothing() {
    let fpm = RealFpm::builder("blue").workers(4).start().await;
    let root = fpm.docroot().display().to_string();
    let good = toml(fpm.tcp_address(), &root, "");
    let proxy = Slackwater::start(&good).await;
    let client = LedgerClient::builder(proxy.http()).connections(8).shapes(Shape::mix()).start();
    let ledger = client.ledger().clone();
    let mut idle = http::Connection::<tokio::net::TcpStream>::open(proxy.http()).await.unwrap();
    assert_eq!(idle.get("/hello.php").await.unwrap().status, 200);
    for turn in 0..10 {
        proxy.rewrite(&format!("{good}\n[site.params]\nTURN = \"{turn}\"\n"));
        assert!(proxy.cli_ok(&["reload"]).await.contains("applied"));
        ledger.wait_more(20).await;
    }
    let generation = proxy.status().await["generation"].clone();
    for (bad, want) in [
        ("", "refused"),
        ("[listen", "refused"),
        (&*format!("{good}\nbogus = 1\n"), "bogus"),
        (&*good.replace("workers = 2", "workers = 3"), "needs a restart"),
        (&*good.replace("{HTTP}", "{OPS}"), "refused"),
    ] {
        proxy.rewrite(bad);
        let output = proxy.cli(&["reload"]).await;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.contains(want), "{want}: {text}");
    }
    assert_eq!(proxy.status().await["generation"], generation);
    assert_eq!(idle.get("/hello.php").await.unwrap().status, 200, "the same connection, after all of it");
    let ledger = client.stop().await;
    println!("{:?}", ledger.summary());
    ledger.assert_clean();
}
