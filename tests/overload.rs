//! More requests than FPM has workers: who goes first, who is told at once, what a lane has, and what is said about it.

mod support;

use std::time::{Duration, Instant};

use support::{
    gate::{Gate, eventually},
    http::{self, Connection, Response},
    process::Slackwater,
    real_fpm::RealFpm,
    scripted_fpm::{Behaviour, ScriptedFpm},
};
use tokio::{net::TcpStream, task::JoinHandle};

fn toml(address: impl std::fmt::Display, root: &str, upstream: &str, site: &str) -> String {
    format!(
        r#"
        workers = 1
        [listen]
        http = ["{{HTTP}}"]
        ops = "{{OPS}}"
        admin = "{{ADMIN}}"
        trusted_proxies = ["127.0.0.1"]
        {upstream}
        [upstream.php.set.blue]
        endpoints = ["{address}"]
        [[site]]
        php_root = "{root}"
        upstream = "php"
        scripts = ["/*.php"]
        {site}
        "#
    )
}

fn one_worker(fpm: &ScriptedFpm, queue: &str) -> String {
    toml(fpm.address(), "/app", &format!("[upstream.php]\nworkers_per_endpoint = 1\nqueue = {queue}"), "")
}

fn get(address: std::net::SocketAddr, path: &str, headers: &'static [(&str, &str)]) -> JoinHandle<(Response, Duration)> {
    let path = path.to_owned();
    tokio::spawn(async move {
        let began = Instant::now();
        let response = http::send(address, "GET", &path, headers, b"").await.unwrap();
        (response, began.elapsed())
    })
}

async fn queued(proxy: &Slackwater, wanted: u64) {
    eventually("so many wait", async || {
        let queued = proxy.status().await["upstreams"]["php"]["queued"].as_u64().unwrap();
        if queued == wanted { Ok(()) } else { Err(format!("{queued} wait, not {wanted}")) }
    })
    .await;
}

/// In the order of arrival, until somebody has been waiting for a second without a break: then the newest goes first.
#[tokio::test(flavor = "multi_thread")]
async fn ordinary_queues_are_first_in_first_out_and_lasting_ones_newest_first() {
    let gate = Gate::closed();
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&gate)).await;
    let proxy = Slackwater::start(&one_worker(&fpm, "{ max = 10, timeout = \"60s\" }")).await;
    let address = proxy.http();
    let mut requests = vec![get(address, "/index.php?held", &[])];
    fpm.wait_begun(1).await;
    for (n, name) in ["a", "b", "c"].iter().enumerate() {
        requests.push(get(address, &format!("/index.php?{name}"), &[]));
        queued(&proxy, n as u64 + 1).await;
    }
    gate.let_pass(2);
    fpm.wait_completed(2).await;
    // The rest has been waiting all the time: after a second that is overload.
    let began = Instant::now();
    let mut n = 0;
    while began.elapsed() < Duration::from_millis(1_200) {
        n += 1;
        requests.push(get(address, &format!("/index.php?later{n}"), &[]));
        queued(&proxy, 1 + n).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    gate.open();
    for request in requests {
        assert_eq!(request.await.unwrap().0.status, 200);
    }
    proxy.wait_for_log("newest first from now on", Duration::from_secs(10)).await;
    let over = eventually("overload is over", async || {
        let upstream = proxy.status().await["upstreams"]["php"].clone();
        if upstream["overloaded"] == false { Ok(proxy.log_text()) } else { Err(upstream.to_string()) }
    })
    .await;
    assert!(over.contains("overload is over"), "{over}");
    let order: Vec<String> = fpm.requests().iter().map(|r| r.uri().replace("/index.php?", "")).collect();
    let mut expected = vec!["held".to_owned(), "a".into(), "b".into()];
    expected.extend((1..=n).rev().map(|n| format!("later{n}")));
    expected.push("c".into());
    assert_eq!(order, expected);
}

/// Its worker does five requests a second and a client waits for one: who would be the sixth to wait is told at once, and when to come again.
#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_be_served_in_time_is_told_at_once() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").slow_body(1, Duration::from_millis(30))).await;
    let proxy = Slackwater::start(&one_worker(&fpm, "{ max = 1000, timeout = \"1s\" }")).await;
    let address = proxy.http();
    for _ in 0..10 {
        assert_eq!(http::get(address, "/index.php").await.unwrap().status, 200);
    }
    let requests: Vec<_> = (0..60).map(|_| get(address, "/index.php", &[])).collect();
    let mut told = Vec::new();
    let (mut served, mut slowest) = (0, Duration::ZERO);
    for request in requests {
        let (response, took) = request.await.unwrap();
        match response.status {
            200 => {
                served += 1;
                slowest = slowest.max(took);
            }
            503 => {
                assert!(response.header("retry-after").unwrap().parse::<u32>().unwrap() >= 1);
                told.push(took);
            }
            other => panic!("{other}"),
        }
    }
    told.sort();
    println!("{served} served, the slowest after {slowest:?}; {} told, half of them within {:?}", told.len(), told[told.len() / 2]);
    assert!(served > 0);
    // Promised: at once. A tenth of the time-out is already ten times that.
    assert!(told[told.len() / 2] < Duration::from_millis(500), "{told:?}");
    let too_long = proxy.metric(&["slackwater_shed_total", "queue_too_long"]).await.unwrap_or(0.0);
    assert!(too_long >= (told.len() / 2) as f64, "{too_long} of {}", told.len());
}

/// `X-Request-Timeout` counts from a trusted proxy, and what is over when its turn comes is never begun.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_has_passed_is_never_begun() {
    let gate = Gate::closed();
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&gate)).await;
    let config = one_worker(&fpm, "{ max = 10, timeout = \"60s\" }");
    let proxy = Slackwater::start(&config).await;
    let address = proxy.http();
    let held = get(address, "/index.php?held", &[]);
    fpm.wait_begun(1).await;
    let waiting = get(address, "/index.php?waits", &[("X-Request-Timeout", "300ms")]);
    let (response, took) = waiting.await.unwrap();
    println!("answered {took:?} after it was sent, 300 ms were given");
    assert_eq!(response.status, 503);
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(3), "{took:?}");
    // Over before it is dispatched: its body took too long.
    gate.open();
    held.await.unwrap();
    let mut slow = Connection::<TcpStream>::open(address).await.unwrap();
    slow.send("POST /index.php?slow HTTP/1.1\r\nHost: a\r\nX-Request-Timeout: 0.1\r\nContent-Length: 2\r\n\r\n1").await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    slow.send("2").await.unwrap();
    assert_eq!(slow.read_response("POST").await.unwrap().status, 503);
    // What nobody trusted says does not count, and what cannot be read neither.
    assert_eq!(get(address, "/index.php?odd", &[("X-Request-Timeout", "soon")]).await.unwrap().0.status, 200);
    proxy.rewrite(&config.replace("trusted_proxies = [\"127.0.0.1\"]", "trusted_proxies = []"));
    proxy.cli_ok(&["reload"]).await;
    assert_eq!(get(address, "/index.php?stranger", &[("X-Request-Timeout", "0")]).await.unwrap().0.status, 200);
    let begun: Vec<String> = fpm.requests().iter().map(|r| r.uri()).collect();
    assert_eq!(begun, ["/index.php?held", "/index.php?odd", "/index.php?stranger"]);
    assert_eq!(proxy.metric(&["slackwater_upstream_expired_total", "deadline_passed"]).await, Some(2.0));
}

/// Two of four workers at most for the slow route, one kept for the checkout: the slow one never has more, and never stops the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_lane_has_no_more_than_its_limit_and_a_reserve_is_there() {
    let gate = Gate::closed();
    let fpm = ScriptedFpm::builder(Behaviour::hello("blue"))
        .on("/slow.php", Behaviour::hello("blue").holds_answer(&gate))
        .on("/index.php?held", Behaviour::hello("blue").holds_answer(&gate))
        .start()
        .await;
    let upstream = r#"
        [upstream.php]
        workers_per_endpoint = 4
        [upstream.php.lane.slow]
        limit = "50%"
        [upstream.php.lane.checkout]
        reserve = "25%"
        priority = 10
    "#;
    let site = r#"
        [[site.route]]
        path = "/slow.php"
        lane = "slow"
        [[site.route]]
        path = "/checkout.php"
        lane = "checkout"
    "#;
    let proxy = Slackwater::start(&toml(fpm.address(), "/app", upstream, site)).await;
    let address = proxy.http();
    assert_eq!(http::get(address, "/checkout.php").await.unwrap().status, 200);
    let slow: Vec<_> = (0..6).map(|_| get(address, "/slow.php", &[])).collect();
    fpm.wait_begun(3).await;
    queued(&proxy, 4).await;
    for path in ["/index.php", "/checkout.php"] {
        assert_eq!(http::get(address, path).await.unwrap().status, 200, "{path} beside a saturated lane");
    }
    // One more without a lane, and the last worker is the checkout's.
    let held: Vec<_> = (0..2).map(|_| get(address, "/index.php?held", &[])).collect();
    queued(&proxy, 5).await;
    assert_eq!(http::get(address, "/checkout.php").await.unwrap().status, 200);
    let lanes = proxy.status().await["upstreams"]["php"]["lanes"].clone();
    assert_eq!(
        lanes["slow"],
        serde_json::json!({ "busy": 2, "waiting": 4, "priority": 0, "limit": 2, "reserve": 0, "kept_free": 0 })
    );
    assert_eq!(
        lanes["checkout"],
        serde_json::json!({ "busy": 0, "waiting": 0, "priority": 10, "limit": 4, "reserve": 1, "kept_free": 1 })
    );
    assert_eq!(proxy.metric(&["slackwater_upstream_lane_waiting", "slow"]).await, Some(4.0));
    assert_eq!(proxy.metric(&["slackwater_upstream_lane_busy", "slow"]).await, Some(2.0));
    // busy 3, waiting 5, of 4.
    assert_eq!(proxy.metric(&["slackwater_upstream_saturation", "blue"]).await, Some(2.0));
    gate.open();
    for request in slow.into_iter().chain(held) {
        assert_eq!(request.await.unwrap().0.status, 200);
    }
    assert_eq!(fpm.backlog_violations(), 0);
}

/// The higher priority goes first, and a lane for a whole site is that of its routes.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_with_priority_goes_before_those_that_came_earlier() {
    let gate = Gate::closed();
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&gate)).await;
    let upstream = "[upstream.php]\nworkers_per_endpoint = 1\n[upstream.php.lane.checkout]\npriority = 10";
    let site = "lane = \"checkout\"\n[[site.route]]\npath = \"/report.php\"\nlane = \"\"";
    let proxy = Slackwater::start(&toml(fpm.address(), "/app", upstream, site)).await;
    let address = proxy.http();
    let mut requests = vec![get(address, "/index.php?held", &[])];
    fpm.wait_begun(1).await;
    for (n, path) in ["/report.php?1", "/report.php?2", "/pay.php"].iter().enumerate() {
        requests.push(get(address, path, &[]));
        queued(&proxy, n as u64 + 1).await;
    }
    gate.open();
    for request in requests {
        assert_eq!(request.await.unwrap().0.status, 200);
    }
    let order: Vec<String> = fpm.requests().iter().map(|r| r.uri()).collect();
    assert_eq!(order, ["/index.php?held", "/pay.php", "/report.php?1", "/report.php?2"]);
}

/// What we count is what FPM counts, from no load to three times what it can do.
#[tokio::test(flavor = "multi_thread")]
async fn busy_is_within_one_of_what_fpm_counts_and_its_own_queue_stays_empty() {
    let fpm = RealFpm::builder("blue").workers(4).status_listen().start().await;
    let root = fpm.docroot().display().to_string();
    let config = toml(fpm.tcp_address(), &root, "[upstream.php]", "").replace("workers = 1", "workers = 2").replace(
        "[[site]]",
        &format!("status_path = \"/status\"\nstatus_listen = \"{}\"\n[[site]]", fpm.status_address().unwrap()),
    );
    let proxy = Slackwater::start(&config).await;
    let address = proxy.http();
    for percent in [0_usize, 50, 100, 200, 300] {
        let clients = 4 * percent / 100;
        let load: Vec<_> = (0..clients)
            .map(|n| {
                tokio::spawn(async move {
                    let mut client = Connection::<TcpStream>::open(address).await.unwrap();
                    loop {
                        // No two alike, so that they do not end together.
                        client.get(&format!("/socket.php?ms={}", 60 + 7 * n)).await.unwrap();
                    }
                })
            })
            .collect();
        let (mut worst, mut worst_saturation) = (0.0_f64, 0.0_f64);
        for _ in 0..20 {
            // Both at one moment: what begins or ends in between is asked for again.
            let (ours, theirs, saturation) = loop {
                let before = proxy.status().await["upstreams"]["php"]["sets"]["blue"].clone();
                let fpm = fpm.status().await.unwrap();
                let after = proxy.status().await["upstreams"]["php"]["sets"]["blue"].clone();
                if before["endpoints"] == after["endpoints"] && before["saturation"] == after["saturation"] {
                    let processes = fpm["processes"].as_array().unwrap();
                    let in_state = |states: &[&str]| processes.iter().filter(|p| states.iter().any(|s| p["state"] == *s)).count();
                    // FPM counts a connection as queued until accept(2): one for each worker that is about to call it does not wait.
                    let about_to_accept = in_state(&["Idle", "Ending", "Finishing"]) as u64;
                    let queued = fpm["listen queue"].as_u64().unwrap();
                    assert!(queued <= about_to_accept, "{percent}%: {queued} queued, {about_to_accept} workers free: {fpm}");
                    let endpoint = &after["endpoints"][0];
                    let ours = endpoint["busy"].as_f64().unwrap() + endpoint["parked"].as_f64().unwrap();
                    let active = processes.len() - in_state(&["Idle"]);
                    break (ours, active as f64, after["saturation"].as_f64().unwrap());
                }
            };
            worst = worst.max((ours - theirs).abs());
            worst_saturation = worst_saturation.max((saturation - percent as f64 / 100.0).abs());
            tokio::time::sleep(Duration::from_millis(23)).await;
        }
        println!(
            "{percent}%: at most {worst} workers apart, saturation at most {worst_saturation:.2} from {}",
            percent as f64 / 100.0
        );
        assert!(worst <= 1.0, "{percent}%: {worst} apart");
        for client in load {
            client.abort();
        }
        eventually("nobody is left", async || {
            let set = proxy.status().await["upstreams"]["php"]["sets"]["blue"].clone();
            if set["saturation"] == 0.0 { Ok(()) } else { Err(set.to_string()) }
        })
        .await;
    }
}
