//! FPM's workers are never overrun, nobody starves, and no POST is lost or runs twice.

mod support;

use std::time::{Duration, Instant};

use support::{
    gate::Gate,
    http,
    ledger::{Expect, LedgerClient, Shape},
    process::Slackwater,
    real_fpm::{Pm, RealFpm},
    scripted_fpm::{Behaviour, ScriptedFpm},
};

fn toml(address: impl std::fmt::Display, root: &str, upstream: &str) -> String {
    format!(
        r#"
        workers = 2
        [upstream.php]
        {upstream}
        [upstream.php.set.blue]
        endpoints = ["{address}"]
        status_path = "/status"
        [[site]]
        php_root = "{root}"
        upstream = "php"
        body_limit = "64MiB"
        scripts = ["/*.php"]
        "#
    )
}

/// The figure promised is 2 s; asserted at ten times that, and printed.
#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_clients_before_eight_workers_are_all_served() {
    let fpm = RealFpm::builder("blue").workers(8).start().await;
    let root = fpm.docroot().display().to_string();
    let proxy = Slackwater::start(&toml(fpm.tcp_address(), &root, "")).await;
    let client = LedgerClient::builder(proxy.http()).connections(64).shapes(vec![Shape::get("/hello.php", Expect::Hello)]).start();
    client.ledger().wait_entries(3000).await;
    let ledger = client.stop().await;
    println!("{}", ledger.summary());
    ledger.assert_clean();
    assert!(ledger.summary().slowest < Duration::from_secs(20));
    let status = proxy.status().await;
    assert_eq!(status["upstreams"]["php"]["sets"]["blue"]["endpoints"][0]["capacity"], 8, "from FPM's status page");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_proxies_share_a_pool() {
    let fpm = RealFpm::builder("blue").workers(4).start().await;
    let root = fpm.docroot().display().to_string();
    let (one, two) = (
        Slackwater::start(&toml(fpm.tcp_address(), &root, "")).await,
        Slackwater::start(&toml(fpm.tcp_address(), &root, "")).await,
    );
    let shapes = || vec![Shape::get("/hello.php", Expect::Hello)];
    let first = LedgerClient::builder(one.http()).connections(16).shapes(shapes()).start();
    let second = LedgerClient::builder(two.http()).connections(16).shapes(shapes()).start();
    first.ledger().wait_entries(1000).await;
    second.ledger().wait_entries(1000).await;
    for client in [first, second] {
        let ledger = client.stop().await;
        println!("{}", ledger.summary());
        ledger.assert_clean();
        assert!(ledger.summary().slowest < Duration::from_secs(20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn recycled_workers_lose_no_post_and_run_none_twice() {
    for pm in [Pm::Static(4), Pm::Dynamic(4), Pm::OnDemand(4)] {
        let fpm = RealFpm::builder("blue").pm(pm).max_requests(5).start().await;
        let root = fpm.docroot().display().to_string();
        let proxy = Slackwater::start(&toml(fpm.tcp_address(), &root, "workers_per_endpoint = 4")).await;
        let shapes = vec![Shape::post("/upload.php", 1 << 10, Expect::Digest)];
        let client = LedgerClient::builder(proxy.http()).connections(8).shapes(shapes).start();
        client.ledger().wait_entries(400).await;
        let ledger = client.stop().await;
        println!("{pm:?}: {}", ledger.summary());
        ledger.assert_clean();
        for entry in ledger.entries() {
            assert_eq!(fpm.executions(&entry.id), 1, "{pm:?}: {entry:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_told_capacity_is_never_exceeded() {
    let fpm = ScriptedFpm::builder(Behaviour::hello("blue")).workers(3).start().await;
    let toml = toml(fpm.address(), "/app", "workers_per_endpoint = 3").replace("status_path = \"/status\"", "");
    let proxy = Slackwater::start(&toml).await;
    let client =
        LedgerClient::builder(proxy.http()).connections(24).shapes(vec![Shape::get("/hello.php", Expect::Anything)]).start();
    client.ledger().wait_entries(2000).await;
    client.stop().await.assert_clean();
    assert_eq!((fpm.backlog_violations(), fpm.violations()), (0, vec![]));
    assert!(fpm.connections() < 2000, "leases were not used: {} connections", fpm.connections());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_bounded_in_number_and_time_and_a_leaver_is_never_begun() {
    let gate = Gate::closed();
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&gate)).await;
    let upstream = "workers_per_endpoint = 1\nqueue = { max = 2, timeout = \"600ms\" }";
    let toml = toml(fpm.address(), "/app", upstream).replace("status_path = \"/status\"", "");
    let proxy = Slackwater::start(&toml).await;
    let address = proxy.http();
    let first = tokio::spawn(async move { http::get(address, "/index.php?1").await });
    fpm.wait_begun(1).await;
    let mut leaver = http::Connection::<tokio::net::TcpStream>::open(address).await.unwrap();
    leaver.send("GET /index.php?leaver HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    while proxy.status().await["upstreams"]["php"]["queued"] != 1 {}
    drop(leaver);
    while proxy.status().await["upstreams"]["php"]["queued"] != 0 {}
    let waiting: Vec<_> = (0..2).map(|_| tokio::spawn(async move { http::get(address, "/index.php?waits").await })).collect();
    while proxy.status().await["upstreams"]["php"]["queued"] != 2 {}
    let refused = http::get(address, "/index.php?full").await.unwrap();
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    for waiter in waiting {
        assert_eq!(waiter.await.unwrap().unwrap().status, 503, "the time-out of the queue");
    }
    gate.open();
    assert_eq!(first.await.unwrap().unwrap().status, 200);
    assert_eq!(http::get(address, "/index.php?last").await.unwrap().status, 200);
    let begun: Vec<String> = fpm.requests().iter().map(|r| r.uri()).collect();
    assert_eq!(begun, ["/index.php?1", "/index.php?last"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_slot_of_a_client_that_has_left_stays_busy_until_fpm_has_finished() {
    let gate = Gate::closed();
    let fpm = ScriptedFpm::builder(Behaviour::hello("blue"))
        .on("/index.php?slow", Behaviour::hello("blue").holds_answer(&gate))
        .start()
        .await;
    let toml = toml(fpm.address(), "/app", "workers_per_endpoint = 1").replace("status_path = \"/status\"", "");
    let proxy = Slackwater::start(&toml).await;
    let mut leaver = http::Connection::<tokio::net::TcpStream>::open(proxy.http()).await.unwrap();
    leaver.send("GET /index.php?slow HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    fpm.wait_begun(1).await;
    drop(leaver);
    let address = proxy.http();
    let next = tokio::spawn(async move { http::get(address, "/index.php?next").await });
    while proxy.status().await["upstreams"]["php"]["queued"] != 1 {}
    assert_eq!(fpm.requests().len().max(1), 1, "the second was begun beside the first");
    gate.open();
    assert_eq!(next.await.unwrap().unwrap().status, 200);
}

/// With real FPM at `max_children = 2`: slow uploads and slow readers hold no worker.
#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_do_not_hold_workers() {
    let fpm = RealFpm::builder("blue").workers(2).start().await;
    let root = fpm.docroot().display().to_string();
    let proxy = Slackwater::start(&toml(fpm.tcp_address(), &root, "")).await;
    let address = proxy.http();
    let mut slow = tokio::task::JoinSet::new();
    for _ in 0..30 {
        slow.spawn(async move {
            let mut upload = http::Connection::<tokio::net::TcpStream>::open(address).await.unwrap();
            upload.send(format!("POST /upload.php HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", 1 << 20)).await.unwrap();
            let chunk = vec![1; 2 << 10];
            loop {
                upload.send(&chunk).await.unwrap();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
    }
    for _ in 0..12 {
        slow.spawn(async move {
            let mut reader = http::Connection::<tokio::net::TcpStream>::open(address).await.unwrap();
            reader.send("GET /big.php?mib=16 HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
            loop {
                reader.take(2 << 10).await.unwrap();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
    }
    // All 12 answers have been read from FPM although their clients have hardly begun: nothing is busy any more.
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let status = proxy.status().await;
        let endpoint = &status["upstreams"]["php"]["sets"]["blue"]["endpoints"][0];
        let served = proxy.metric(&["slackwater_upstream_attempts_total", "ok"]).await.unwrap_or(0.0);
        if served >= 12.0 && endpoint["busy"] == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{endpoint} after {served} answers");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut worst = Duration::ZERO;
    for _ in 0..50 {
        let started = Instant::now();
        assert_eq!(http::get(address, "/hello.php").await.unwrap().status, 200);
        worst = worst.max(started.elapsed());
    }
    println!("hello.php beside 42 slow clients: worst {worst:?}");
    assert!(worst < Duration::from_secs(5));
    slow.abort_all();
}
