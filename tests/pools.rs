//! How FPM is reached: unix sockets, several endpoints, an operator's hand, a file that is watched.

mod support;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use support::{
    gate::eventually,
    http,
    ledger::{Expect, Ledger, LedgerClient, Shape},
    process::Slackwater,
    real_fpm::RealFpm,
    scripted_fpm::{Behaviour, ScriptedFpm},
};

fn toml(endpoints: &[String], root: &str, upstream: &str) -> String {
    format!(
        r#"
        {upstream}
        [upstream.php.set.blue]
        endpoints = {endpoints:?}
        [[site]]
        php_root = "{root}"
        upstream = "php"
        scripts = ["/*.php"]
        "#
    )
}

async fn unix_pool() -> (RealFpm, Slackwater) {
    let fpm = RealFpm::builder("blue").workers(2).unix().start().await;
    let root = fpm.docroot().display().to_string();
    let proxy = Slackwater::start(&toml(&[fpm.address().to_string()], &root, "[upstream.php]\nworkers_per_endpoint = 2")).await;
    (fpm, proxy)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_serves() {
    let (_fpm, proxy) = unix_pool().await;
    let client = LedgerClient::builder(proxy.http()).connections(4).shapes(vec![Shape::get("/hello.php", Expect::Hello)]).start();
    client.ledger().wait_entries(300).await;
    client.stop().await.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_workers_cost_no_get() {
    let (fpm, proxy) = unix_pool().await;
    let client = LedgerClient::builder(proxy.http()).connections(4).shapes(vec![Shape::get("/hello.php", Expect::Hello)]).start();
    for nth in 0..2 {
        client.ledger().wait_more(100).await;
        fpm.kill_worker(nth);
    }
    client.ledger().wait_more(100).await;
    let ledger = client.stop().await;
    println!("{}", ledger.summary());
    for line in
        proxy.log_text().lines().filter(|line| line.contains("attempt failed") || line.contains("\"cause\":\"client_left\""))
    {
        println!("{line}");
    }
    // A GET that was cut before a byte of its answer is sent once more: none of these may fail.
    ledger.assert_clean();
}

/// Two pools, of which the first is stopped with QUIT and started again `times` under GETs and POSTs; before that it may be disabled.
async fn restart_a_master(times: usize, disables: bool) -> (Ledger, [RealFpm; 2]) {
    let mut first = RealFpm::builder("blue").workers(2).start().await;
    let second = RealFpm::builder("blue").workers(2).docroot(first.docroot()).start().await;
    let root = first.docroot().display().to_string();
    let addresses = [first.address().to_string(), second.address().to_string()];
    let proxy = Slackwater::start(&toml(&addresses, &root, "[upstream.php]\nworkers_per_endpoint = 2")).await;
    let client = LedgerClient::builder(proxy.http()).connections(8).start();
    for _ in 0..times {
        client.ledger().wait_more(100).await;
        if disables {
            proxy.cli_ok(&["endpoint", "disable", "php", &addresses[0]]).await;
            let deadline = Instant::now() + Duration::from_secs(20);
            let held = async || {
                let endpoint = &proxy.status().await["upstreams"]["php"]["sets"]["blue"]["endpoints"][0];
                endpoint["busy"].as_u64().unwrap() + endpoint["parked"].as_u64().unwrap()
            };
            while held().await > 0 {
                assert!(Instant::now() < deadline, "a disabled endpoint does not become free");
            }
        }
        first.quit_and_start().await;
        if disables {
            proxy.cli_ok(&["endpoint", "enable", "php", &addresses[0]]).await;
        }
    }
    client.ledger().wait_more(100).await;
    let ledger = client.stop().await;
    println!("{}", ledger.summary());
    (ledger, [first, second])
}

/// FPM goes on accepting for a moment after QUIT with nobody to serve: what of a POST it has taken cannot be sent again.
#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_is_restarted_costs_no_get_and_runs_no_post_twice() {
    let (ledger, pools) = restart_a_master(3, false).await;
    for failed in ledger.failures() {
        assert_eq!((failed.method.as_str(), failed.status()), ("POST", Some(502)), "{failed:?}");
    }
    for post in ledger.entries().iter().filter(|entry| entry.method == "POST") {
        let executions: usize = pools.iter().map(|pool| pool.executions(&post.id)).sum();
        assert!(executions <= 1, "run {executions} times: {post:?}");
        assert!(executions == 1 || post.status() != Some(200), "answered, and not run: {post:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_is_disabled_first_can_be_restarted_unnoticed() {
    restart_a_master(3, true).await.0.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hash_keeps_a_cookie_on_its_endpoint_and_disable_moves_it() {
    let pools = [
        ScriptedFpm::start(Behaviour::hello("one")).await,
        ScriptedFpm::start(Behaviour::hello("two")).await,
        ScriptedFpm::start(Behaviour::hello("three")).await,
    ];
    let addresses: Vec<String> = pools.iter().map(|p| p.address().to_string()).collect();
    let proxy = Slackwater::start(&toml(&addresses, "/app", "[upstream.php]\nbalance = \"hash:$cookie_user\"")).await;
    let address = proxy.http();
    let ask = async |user: usize| {
        let cookie = format!("a=b; user={user}");
        http::send(address, "GET", "/index.php", &[("Cookie", &cookie)], b"").await.unwrap().text()
    };
    let mut seen = BTreeSet::new();
    for user in 0..24 {
        let first = ask(user).await;
        for _ in 0..3 {
            assert_eq!(ask(user).await, first);
        }
        seen.insert(first);
    }
    assert_eq!(seen.len(), 3, "all endpoints have their share: {seen:?}");
    proxy.cli_ok(&["endpoint", "disable", "php", &addresses[0]]).await;
    for user in 0..24 {
        assert_ne!(ask(user).await, "one hello\n");
    }
    proxy.cli_ok(&["endpoint", "enable", "php", &addresses[0]]).await;
    let mut again = BTreeSet::new();
    for user in 0..24 {
        again.insert(ask(user).await);
    }
    assert_eq!(again, seen);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watched_file_is_read_again_when_it_changes() {
    let (blue, green) = (ScriptedFpm::start(Behaviour::hello("blue")).await, ScriptedFpm::start(Behaviour::hello("green")).await);
    let with = |fpm: &ScriptedFpm| format!("reload = \"watch\"\n{}", toml(&[fpm.address().to_string()], "/app", ""));
    let proxy = Slackwater::start(&with(&blue)).await;
    assert_eq!(http::get(proxy.http(), "/index.php").await.unwrap().text(), "blue hello\n");
    proxy.rewrite(&with(&green));
    proxy.wait_for_log("\"outcome\":\"applied\"", Duration::from_secs(20)).await;
    assert_eq!(http::get(proxy.http(), "/index.php").await.unwrap().text(), "green hello\n");
}

/// What a probe has said last goes with the probe: a pod that was ejected after a reload had dropped `ping` stayed unusable for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_reload_that_drops_its_probe_lets_an_endpoint_come_back() {
    let at = support::ports::free_address();
    let fpm = ScriptedFpm::builder(Behaviour::hello("blue")).at(at).start().await;
    let without = format!(
        "workers = 1\n[listen]\nhttp = [\"{{HTTP}}\"]\nops = \"{{OPS}}\"\nadmin = \"{{ADMIN}}\"\n[upstream.php]\nworkers_per_endpoint = 4\n\
         [upstream.php.set.blue]\nendpoints = [\"{at}\"]\n[[site]]\nphp_root = \"/app\"\nscripts = [\"/*.php\"]\nupstream = \"php\"\n"
    );
    let ping = "endpoints = [\"ENDPOINT\"]\nping = { path = \"/ping\", every = \"100ms\" }".replace("ENDPOINT", &at.to_string());
    let with = without.replace(&format!("endpoints = [\"{at}\"]"), &ping);
    let proxy = Slackwater::start(&with).await;
    let endpoint = async || proxy.status().await["upstreams"]["php"]["sets"]["blue"]["endpoints"][0].clone();
    let until = async |what: &str, wanted: &str| {
        eventually(what, async || match endpoint().await {
            endpoint if endpoint["state"] == wanted => Ok(endpoint),
            endpoint => Err(endpoint.to_string()),
        })
        .await
    };
    // First while the probe says that it is down, then while users' requests do.
    drop(fpm);
    let down = until("the probe fails", "unusable").await;
    assert!(down["reason"].as_str().unwrap().starts_with("probe failed: "), "{down}");
    proxy.wait_for_log("no endpoint of the active set is usable", Duration::from_secs(20)).await;
    proxy.rewrite(&without);
    proxy.cli_ok(&["reload"]).await;
    until("nothing says any more that it is down", "usable").await;
    for _ in 0..2 {
        assert_eq!(http::get(proxy.http(), "/a.php").await.unwrap().status, 502);
    }
    proxy.wait_for_log("endpoint ejected", Duration::from_secs(20)).await;
    let fpm = ScriptedFpm::builder(Behaviour::hello("blue")).at(at).start().await;
    until("it comes back", "usable").await;
    assert_eq!(http::get(proxy.http(), "/a.php").await.unwrap().status, 200);
    // A line for each of these would push everything else out of the log.
    drop(fpm);
    let (skip, begun) = (proxy.log().len(), Instant::now());
    for _ in 0..300 {
        assert_eq!(http::get(proxy.http(), "/a.php").await.unwrap().status, 502);
    }
    let lines = proxy.log()[skip..].iter().filter(|line| line.text.contains("an attempt failed")).count();
    let most = 3 * (1 + begun.elapsed().as_secs() as usize);
    assert!((1..=most).contains(&lines), "{lines} lines of 300 requests and their retries in {:?}", begun.elapsed());
}
