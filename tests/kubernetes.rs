//! FPM pods found through EndpointSlices, before an API server that behaves and one that does not.

mod support;

use std::{
    sync::Arc,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use support::{
    apiserver::{ApiServer, Mood, Pod, Rights},
    children,
    gate::{self, Gate},
    http,
    ledger::{Expect, LedgerClient, Shape},
    netns,
    process::{Slackwater, Wait},
    scripted_fpm::{Behaviour, ScriptedFpm},
};

const PATIENCE: Duration = Duration::from_secs(20);

fn toml(kubeconfig: &std::path::Path, upstream: &str) -> String {
    format!(
        r#"
        workers = 2
        [kubernetes]
        namespace = "learning"
        kubeconfig = "{}"
        [upstream.php]
        {upstream}
        [upstream.php.set.blue]
        kubernetes = {{ service = "php-blue", port = "fpm" }}
        [[site]]
        php_root = "/app"
        upstream = "php"
        "#,
        kubeconfig.display()
    )
}

/// Pods that answer with their own address, all on one port, as pods do.
async fn pods(count: u8) -> Vec<ScriptedFpm> {
    for _ in 0..100 {
        let port = support::ports::free_address().port();
        let mut all = Vec::new();
        for n in 1..=count {
            let address = std::net::SocketAddr::from(([127, 0, 66, n], port));
            // Another test may have the port on its own address of 127.0.0.0/8, never on these.
            let Ok(probe) = std::net::TcpListener::bind(address) else { break };
            drop(probe);
            all.push(ScriptedFpm::builder(Behaviour::hello(&format!("pod{n}"))).at(address).start().await);
        }
        if all.len() == usize::from(count) {
            return all;
        }
    }
    panic!("no port is free on {count} addresses");
}

fn port(pods: &[ScriptedFpm]) -> u16 {
    pods[0].address().port()
}

async fn endpoints(proxy: &Slackwater) -> Vec<String> {
    let status = proxy.status().await;
    let list = status["upstreams"]["php"]["sets"]["blue"]["endpoints"].as_array().unwrap().clone();
    list.iter().map(|e| format!("{} {}", e["address"].as_str().unwrap(), e["state"].as_str().unwrap())).collect()
}

async fn until(proxy: &Slackwater, what: &str, wanted: impl Fn(&[String]) -> bool) {
    gate::eventually(what, async || {
        let seen = endpoints(proxy).await;
        if wanted(&seen) { Ok(()) } else { Err(format!("{seen:?}\n{}", proxy.log_text())) }
    })
    .await;
}

async fn answered_by(proxy: &Slackwater) -> String {
    http::get(proxy.http(), "/index.php").await.unwrap().text()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_come_and_go_with_their_slices_and_no_request_fails() {
    let (api, pods, folder) = (ApiServer::start().await, pods(4).await, tempfile::tempdir().unwrap());
    let port = port(&pods);
    let ready = |nth: &[usize]| nth.iter().map(|n| Pod::ready(pods[*n].address())).collect::<Vec<_>>();
    api.slice("php-blue-a", "php-blue", port, &ready(&[0]));
    api.slice("php-green-a", "php-green", port, &ready(&[3]));
    let proxy = Slackwater::start(&toml(&api.kubeconfig(folder.path()), "")).await;
    assert_eq!(answered_by(&proxy).await, "pod1 hello\n");

    let client = LedgerClient::builder(proxy.http()).shapes(vec![Shape::get("/index.php", Expect::Hello)]).start();
    client.ledger().wait_more(50).await;
    // A second slice; the same pod in both is one endpoint.
    let event = Instant::now();
    api.slice("php-blue-b", "php-blue", port, &ready(&[0, 1, 2]));
    pods[2].wait_begun(1).await;
    println!("from the event to the first request on the new pod: {:?}", event.elapsed());
    until(&proxy, "three", |seen| seen.len() == 3).await;
    // The first leaves: terminating, then gone from both slices.
    api.slice("php-blue-a", "php-blue", port, &[Pod::terminating(pods[0].address())]);
    api.slice("php-blue-b", "php-blue", port, &[ready(&[1, 2]), vec![Pod::terminating(pods[0].address())]].concat());
    until(&proxy, "leaving", |seen| seen.iter().any(|e| e.starts_with("127.0.66.1:") && e.ends_with("leaving"))).await;
    let begun = pods[0].requests().len();
    client.ledger().wait_more(100).await;
    // One may have been dispatched before.
    assert!(pods[0].requests().len() <= begun + 8, "{} more on a pod that is leaving", pods[0].requests().len() - begun);
    api.delete("endpointslices", "php-blue-a");
    api.slice("php-blue-b", "php-blue", port, &ready(&[1, 2]));
    until(&proxy, "gone", |seen| seen.len() == 2).await;
    assert_eq!(pods[0].open_connections(), 0, "a lease to a pod that has gone");
    client.ledger().wait_more(50).await;
    let ledger = client.stop().await;
    println!("{}", ledger.summary());
    ledger.assert_clean();
    assert!(pods[3].requests().is_empty(), "a pod of another Service was asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_known_stays_in_force_whatever_the_api_server_does() {
    let (api, pods, folder) = (ApiServer::start().await, pods(2).await, tempfile::tempdir().unwrap());
    let port = port(&pods);
    api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address())]);
    let proxy = Slackwater::start(&toml(&api.kubeconfig(folder.path()), "")).await;
    let age = async || proxy.status().await["upstreams"]["php"]["sets"]["blue"]["known_age_seconds"].as_f64();
    assert_eq!(age().await, Some(0.0));
    // As answers_garbage, goes_silent's other half, and refusals.
    for mood in [Mood::Refuses(401), Mood::Refuses(403), Mood::Refuses(429), Mood::Refuses(500), Mood::AnswersGarbage, Mood::Silent]
    {
        let (asked, skip) = (api.requests().len(), proxy.log().len());
        api.set_mood(mood.clone());
        api.drops_every_watch();
        api.wait_requests(asked + 2).await;
        if mood != Mood::Silent {
            proxy.wait_for_log_after(skip, "what is known stays in force", PATIENCE).await;
        }
        assert_eq!(answered_by(&proxy).await, "pod1 hello\n", "{mood:?}");
        api.set_mood(Mood::Well);
        // It comes back by itself, and what has changed meanwhile counts.
        let pod = if endpoints(&proxy).await.len() == 1 {
            vec![Pod::ready(pods[0].address()), Pod::ready(pods[1].address())]
        } else {
            vec![Pod::ready(pods[0].address())]
        };
        api.slice("a", "php-blue", port, &pod);
        until(&proxy, &format!("as it is after {mood:?}"), |seen| seen.len() == pod.len()).await;
        api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address())]);
        until(&proxy, "one again", |seen| seen.len() == 1).await;
    }
    // Nobody there at all.
    let skip = proxy.log().len();
    api.stop().await;
    proxy.wait_for_log_after(skip, "what is known stays in force", PATIENCE).await;
    assert_eq!(answered_by(&proxy).await, "pod1 hello\n");
    let deadline = Instant::now() + PATIENCE;
    while age().await.unwrap() == 0.0 {
        assert!(Instant::now() < deadline, "the age of what is known is not told");
    }
    api.start_again().await;
    api.slice("a", "php-blue", port, &[Pod::ready(pods[1].address())]);
    until(&proxy, "the other", |seen| seen.len() == 1 && seen[0].starts_with("127.0.66.2:")).await;
    // The version that the watch goes on from has expired.
    api.relists_after_410();
    api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address())]);
    until(&proxy, "the first", |seen| seen.len() == 1 && seen[0].starts_with("127.0.66.1:")).await;
    while age().await.unwrap() > 0.0 {
        assert!(Instant::now() < deadline, "what is known does not get young again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_pods_it_starts_and_says_why_and_requests_wait_for_the_first() {
    let (api, pods, folder) = (ApiServer::start().await, pods(1).await, tempfile::tempdir().unwrap());
    api.set_mood(Mood::Refuses(403));
    let config = toml(&api.kubeconfig(folder.path()), "queue = { timeout = \"15s\" }");
    let mut proxy = Slackwater::builder(&config).wait(Wait::Live).start().await;
    proxy.wait_for_log("told to say 403", PATIENCE).await;
    // Not that pods are missing: nobody knows.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let ready = http::get(proxy.ops(), "/readyz").await.unwrap();
        assert_eq!(ready.status, 503);
        if ready.text().contains("nothing is known of service php-blue: the Kubernetes API cannot be asked: http://127.0.0.1:") {
            assert!(ready.text().contains("told to say 403 (403); does the Role have it"), "{}", ready.text());
            break;
        }
        assert!(Instant::now() < deadline, "{}", ready.text());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let answer = http::get(proxy.http(), "/index.php").await.unwrap();
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    api.set_mood(Mood::Well);
    api.slice("a", "php-blue", port(&pods), &[Pod::ready(pods[0].address())]);
    proxy.wait_status("/readyz", 200).await;
    proxy.wait_for_log("the Kubernetes API answers again", PATIENCE).await;
    // However often it is asked, each reason of each watch is said once.
    assert_eq!(proxy.log_text().matches("and nothing is known yet").count(), 2, "{}", proxy.log_text());
    assert_eq!(answered_by(&proxy).await, "pod1 hello\n");

    // All of them go: requests wait in the queue for the next one.
    let skip = proxy.log().len();
    api.delete("endpointslices", "a");
    proxy.wait_for_log_after(skip, "has lost its last endpoint", PATIENCE).await;
    assert_eq!(proxy.metric(&["slackwater_upstream_emptied_total", "set=\"blue\""]).await, Some(1.0));
    let address = proxy.http();
    let waiting = tokio::spawn(async move { http::get(address, "/index.php").await });
    let deadline = Instant::now() + PATIENCE;
    while proxy.status().await["upstreams"]["php"]["queued"] != 1 {
        assert!(Instant::now() < deadline, "nobody waits");
    }
    assert_eq!(http::get(proxy.ops(), "/readyz").await.unwrap().status, 200, "once ready it stays so");
    api.slice("a", "php-blue", port(&pods), &[Pod::ready(pods[0].address())]);
    assert_eq!(waiting.await.unwrap().unwrap().text(), "pod1 hello\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_vanishes_finishes_what_it_has_and_a_leaving_one_is_the_last_resort() {
    let (api, pods, folder) = (ApiServer::start().await, pods(2).await, tempfile::tempdir().unwrap());
    let (gate, port) = (Gate::closed(), port(&pods));
    pods[0].set(Behaviour::hello("pod1").holds_answer(&gate));
    api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address())]);
    let proxy = Slackwater::start(&toml(&api.kubeconfig(folder.path()), "")).await;
    let address = proxy.http();
    let slow = tokio::spawn(async move { http::get(address, "/index.php?slow").await });
    pods[0].wait_begun(1).await;
    api.slice("a", "php-blue", port, &[Pod::ready(pods[1].address())]);
    until(&proxy, "the other", |seen| seen.len() == 1 && seen[0].starts_with("127.0.66.2:")).await;
    assert_eq!(answered_by(&proxy).await, "pod2 hello\n");
    gate.open();
    assert_eq!(slow.await.unwrap().unwrap().text(), "pod1 hello\n");
    api.slice("a", "php-blue", port, &[Pod::terminating(pods[1].address())]);
    until(&proxy, "leaving", |seen| seen.iter().all(|e| e.ends_with("leaving"))).await;
    assert_eq!(answered_by(&proxy).await, "pod2 hello\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_annotation_of_its_service_tells_the_workers_of_each_pod() {
    let (api, pods, folder) = (ApiServer::start().await, pods(1).await, tempfile::tempdir().unwrap());
    api.slice("a", "php-blue", port(&pods), &[Pod::ready(pods[0].address())]);
    api.service("php-blue", &[("slackwater.dev/fpm-workers", "3")]);
    let proxy = Slackwater::start(&toml(&api.kubeconfig(folder.path()), "")).await;
    let until = async |wanted: u64| {
        let deadline = Instant::now() + PATIENCE;
        while proxy.status().await["upstreams"]["php"]["sets"]["blue"]["endpoints"][0]["capacity"] != wanted {
            assert!(Instant::now() < deadline, "not {wanted}: {}", proxy.status().await);
        }
    };
    until(3).await;
    api.service("php-blue", &[("slackwater.dev/fpm-workers", "5")]);
    until(5).await;
    api.service("php-blue", &[("slackwater.dev/fpm-workers", "many")]);
    proxy.wait_for_log("is not a number from 1 to 10000", PATIENCE).await;
    // What does not count is no number, and one that is taken away does not count any more.
    let unknown = async || {
        let deadline = Instant::now() + PATIENCE;
        while !proxy.status().await["upstreams"]["php"]["sets"]["blue"]["endpoints"][0]["capacity"].is_null() {
            assert!(Instant::now() < deadline, "still known: {}", proxy.status().await);
        }
    };
    unknown().await;
    api.service("php-blue", &[("slackwater.dev/fpm-workers", "9")]);
    until(9).await;
    api.service("php-blue", &[("slackwater.dev/fpm-workers", "4294967295")]);
    unknown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_nobody_in_the_cluster_has_are_told() {
    let (api, pods, folder) = (ApiServer::start().await, pods(1).await, tempfile::tempdir().unwrap());
    let port = port(&pods);
    api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address())]);
    api.service("php-blue", &[]);
    let green = "active = \"blue\"\n[upstream.php.set.green]\nkubernetes = { service = \"php-gren\", port = \"fpm\" }\n[upstream.php.set.red]\nkubernetes = { service = \"php-blue\", port = \"fmp\" }\n";
    // Found through the environment, as `kubectl` does.
    let config = toml(std::path::Path::new(""), &format!("active_from = \"service/phpp\"\n{green}"))
        .replace("[kubernetes]", "[kubernetes]\nself_service = \"slackwatr\"");
    let kubeconfig = api.kubeconfig(folder.path()).display().to_string();
    let proxy = Slackwater::builder(&config).env("KUBECONFIG", &kubeconfig).start().await;
    let wanted = [
        "set green of upstream php: there is no service php-gren in namespace learning".to_owned(),
        "upstream php: there is no service phpp (active_from) in namespace learning; active is blue".to_owned(),
        "service slackwatr (kubernetes.self_service) has no slices in namespace learning".to_owned(),
        format!(
            "set red of upstream php: service php-blue has 1 ready pods, but no slice has a TCP port named \\\"fmp\\\"; there is \\\"fpm\\\" {port}"
        ),
    ];
    let deadline = Instant::now() + PATIENCE;
    loop {
        let warnings = proxy.status().await["warnings"].to_string();
        let missing: Vec<&String> = wanted.iter().filter(|text| !warnings.contains(&***text)).collect();
        if missing.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "{missing:#?} not in {warnings}");
    }
    // Each once in the log, and gone from the warnings once it is right.
    api.service("phpp", &[("slackwater.dev/active", "blue")]);
    while proxy.status().await["warnings"].to_string().contains("phpp") {
        assert!(Instant::now() < deadline, "still told");
    }
    for text in ["there is no service php-gren", "there is no service phpp"] {
        assert_eq!(proxy.log_text().matches(text).count(), 1, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn flaps_1000_per_second_cost_ten_snapshots_a_second_at_most() {
    let (api, pods, folder) = (ApiServer::start().await, pods(2).await, tempfile::tempdir().unwrap());
    let port = port(&pods);
    let (one, two) = (Pod::ready(pods[0].address()), Pod::ready(pods[1].address()));
    api.slice("a", "php-blue", port, std::slice::from_ref(&one));
    let proxy = Slackwater::start(&toml(&api.kubeconfig(folder.path()), "")).await;
    let generation = async || proxy.status().await["generation"].as_u64().unwrap();
    let (before, started) = (generation().await, Instant::now());
    api.flaps_1000_per_second("a", "php-blue", port, &one).await;
    api.slice("a", "php-blue", port, &[two]);
    until(&proxy, "the last word", |seen| seen.len() == 1 && seen[0].starts_with("127.0.66.2:")).await;
    let (snapshots, seconds) = (generation().await - before, started.elapsed().as_secs_f64());
    println!("{snapshots} snapshots in {seconds:.1} s of 1,001 events");
    assert!(snapshots as f64 <= seconds * 10.0 + 2.0, "{snapshots} in {seconds} s");
    assert_eq!(answered_by(&proxy).await, "pod2 hello\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn slices_are_what_the_api_says_they_are() {
    let (api, pods, folder) = (ApiServer::start().await, pods(3).await, tempfile::tempdir().unwrap());
    let port = port(&pods);
    let pod = |n: usize| Pod::ready(pods[n].address()).named(&format!("pod{n}"));
    api.two_slices_one_service("php-blue", port, &[pod(0), pod(1)], &[pod(1), pod(2)]);
    let proxy = Slackwater::start(&toml(&api.kubeconfig(folder.path()), "")).await;
    until(&proxy, "three of two slices", |seen| seen.len() == 3).await;
    api.slice_without_ports("php-blue-b", "php-blue", &[pod(1), pod(2)]);
    until(&proxy, "two, the third has no port", |seen| seen.len() == 2).await;
    api.terminating_before_removed("php-blue-a", "php-blue", port, &pod(0), &[pod(1)]);
    until(&proxy, "leaving", |seen| seen.iter().any(|e| e.starts_with("127.0.66.1:") && e.ends_with("leaving"))).await;
    for _ in 0..8 {
        assert_eq!(answered_by(&proxy).await, "pod2 hello\n");
    }
    for name in ["php-blue-a", "php-blue-b"] {
        api.delete("endpointslices", name);
    }
    let v6 = |ip: &str, name: &str| Pod { ip: ip.to_owned(), ..pod(0) }.named(name);
    api.dual_stack("php-blue", port, &[pod(0)], &[v6("fd00::1", "pod0"), v6("fd00::9", "only-v6")]);
    until(&proxy, "a pod with both families once, by IPv4", |seen| {
        seen.len() == 2 && seen[0].starts_with("127.0.66.1:") && seen[1].starts_with("[fd00::9]:")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rotates_token_and_the_new_one_is_read_at_once() {
    let (api, pods, folder) = (ApiServer::start().await, pods(2).await, tempfile::tempdir().unwrap());
    let port = port(&pods);
    api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address())]);
    let proxy = Slackwater::start(&toml(&api.kubeconfig(folder.path()), "")).await;
    let rotated = Instant::now();
    api.rotates_token(folder.path());
    api.slice("a", "php-blue", port, &[Pod::ready(pods[1].address())]);
    until(&proxy, "the second pod", |seen| seen.len() == 1 && seen[0].starts_with("127.0.66.2:")).await;
    println!("from the rotation to the first pod that was seen with the new token: {:?}", rotated.elapsed());
    assert_eq!(answered_by(&proxy).await, "pod2 hello\n");
}

/// As in a pod: TLS with the cluster's own authority, the token of the service account, and nothing in the configuration.
#[test]
fn the_service_account_of_its_pod_is_what_it_uses_and_a_rotated_token_is_read_again() {
    const ACCOUNT: &str = "/run/secrets/kubernetes.io/serviceaccount";
    netns::run(async || {
        netns::own_run_folder();
        let (api, authority) = ApiServer::start_with_tls().await;
        let account = |token: &'static str| {
            let authority = authority.clone();
            children::on_the_starter(move || {
                std::fs::create_dir_all(ACCOUNT).unwrap();
                for (name, text) in [("ca.crt", &*authority), ("token", token), ("namespace", "learning")] {
                    std::fs::write(format!("{ACCOUNT}/{name}"), text).unwrap();
                }
            });
        };
        account("first");
        let pods = pods(2).await;
        let port = port(&pods);
        api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address())]);
        let config = toml(std::path::Path::new(""), "").replace("kubeconfig = \"\"", "");
        let address = api.address();
        let proxy = Slackwater::builder(&config)
            .env("KUBERNETES_SERVICE_HOST", &address.ip().to_string())
            .env("KUBERNETES_SERVICE_PORT", &address.port().to_string())
            .start()
            .await;
        assert_eq!(answered_by(&proxy).await, "pod1 hello\n");
        // The kubelet writes the new token, the old one expires.
        account("second");
        api.accepts("second", Rights::Edge);
        api.drops_every_watch();
        api.slice("a", "php-blue", port, &[Pod::ready(pods[1].address())]);
        until(&proxy, "the second pod", |seen| seen.len() == 1 && seen[0].starts_with("127.0.66.2:")).await;
        assert_eq!(answered_by(&proxy).await, "pod2 hello\n");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_annotation_waits_for_the_preflight_of_the_pods_it_turns_to() {
    let (api, pods, folder) = (ApiServer::start().await, pods(2).await, tempfile::tempdir().unwrap());
    let port = port(&pods);
    let gate = Gate::closed();
    pods[1].on("/index.php/warm", Behaviour::hello("pod2").holds_answer(&gate));
    api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address())]);
    api.service("php", &[("slackwater.dev/active", "blue")]);
    let green = "[upstream.php.set.green]\nkubernetes = { service = \"php-green\", port = \"fpm\" }\npreflight = { path = \"/index.php/warm\", requests = 2, timeout = \"20s\" }\n[[site]]";
    let config = toml(&api.kubeconfig(folder.path()), "active_from = \"service/php\"").replace("[[site]]", green);
    let proxy = Slackwater::start(&config).await;
    let client = LedgerClient::builder(proxy.http()).shapes(vec![Shape::get("/index.php", Expect::Hello)]).start();
    api.slice("b", "php-green", port, &[Pod::ready(pods[1].address())]);
    api.service("php", &[("slackwater.dev/active", "green")]);
    pods[1].wait_begun(1).await;
    let refused = async || proxy.status().await["upstreams"]["php"]["refused"].as_str().map(str::to_owned);
    let deadline = Instant::now() + PATIENCE;
    while !refused().await.is_some_and(|why| why.contains("in preflight")) {
        assert!(Instant::now() < deadline, "{:?}", refused().await);
    }
    client.ledger().wait_more(50).await;
    assert_eq!(pods[1].requests().len(), 1, "a cold pod was given a user's request");
    gate.open();
    let deadline = Instant::now() + PATIENCE;
    while answered_by(&proxy).await != "pod2 hello\n" {
        assert!(Instant::now() < deadline, "{:?}", refused().await);
    }
    assert_eq!(refused().await, None);
    client.stop().await.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_another_pod_has_now_is_warmed_again() {
    let (api, pods, folder) = (ApiServer::start().await, pods(2).await, tempfile::tempdir().unwrap());
    let port = port(&pods);
    let pod = |n: usize, name: &str| Pod::ready(pods[n].address()).named(name);
    api.slice("a", "php-blue", port, &[pod(0, "one"), pod(1, "two")]);
    let config = toml(&api.kubeconfig(folder.path()), "workers_per_endpoint = 4").replace(
        "[upstream.php.set.blue]",
        "[upstream.php.set.blue]\npreflight = { path = \"/index.php/warm\", requests = 2, timeout = \"20s\" }",
    );
    let proxy = Slackwater::start(&config).await;
    until(&proxy, "both warm", |seen| seen.iter().filter(|e| e.ends_with(" usable")).count() == 2).await;
    let client = LedgerClient::builder(proxy.http()).shapes(vec![Shape::get("/index.php", Expect::Hello)]).start();
    client.ledger().wait_more(50).await;
    // The same address in the next slice, and it is another pod: nothing of what was known counts.
    let gate = Gate::closed();
    pods[1].on("/index.php/warm", Behaviour::hello("pod2").holds_answer(&gate));
    api.slice("a", "php-blue", port, &[pod(0, "one"), pod(1, "three")]);
    proxy.wait_for_log("another pod has this address now", PATIENCE).await;
    until(&proxy, "cold again", |seen| seen.iter().any(|e| e.starts_with("127.0.66.2:") && e.ends_with(" preflight"))).await;
    let begun = pods[1].requests().len();
    client.ledger().wait_more(50).await;
    let users = pods[1].requests()[begun..].iter().filter(|r| !r.uri().contains("warm")).count();
    assert!(users <= 8, "{users} users on a cold pod");
    gate.open();
    until(&proxy, "warm", |seen| seen.iter().all(|e| e.ends_with(" usable"))).await;
    client.stop().await.assert_clean();
}

/// Takes as long as a watch may: a silent one is only told from a quiet one by the end that does not come.
#[tokio::test(flavor = "multi_thread")]
async fn goes_silent_in_mid_watch_and_is_asked_anew() {
    let (api, pods, folder) = (ApiServer::start().await, pods(2).await, tempfile::tempdir().unwrap());
    let port = port(&pods);
    api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address())]);
    let proxy = Slackwater::start(&toml(&api.kubeconfig(folder.path()), "")).await;
    api.goes_silent();
    let silent = Instant::now();
    api.slice("a", "php-blue", port, &[Pod::ready(pods[1].address())]);
    assert_eq!(answered_by(&proxy).await, "pod1 hello\n");
    let promised = Duration::from_secs(76);
    while !endpoints(&proxy).await[0].starts_with("127.0.66.2:") {
        assert!(silent.elapsed() < promised * 2, "still believed after {:?}\n{}", silent.elapsed(), proxy.log_text());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!("a silent watch was given up after {:?}, {promised:?} is promised", silent.elapsed());
    assert_eq!(answered_by(&proxy).await, "pod2 hello\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_state_file_what_was_known_survives_a_restart_while_the_api_server_is_down() {
    let (api, pods, folder) = (ApiServer::start().await, pods(2).await, tempfile::tempdir().unwrap());
    let port = port(&pods);
    api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address())]);
    api.slice("b", "php-green", port, &[Pod::ready(pods[1].address())]);
    api.service("php-green", &[("slackwater.dev/fpm-workers", "7")]);
    api.service("php", &[("slackwater.dev/active", "green")]);
    let state = folder.path().join("state.json");
    let green = "[upstream.php.set.green]\nkubernetes = { service = \"php-green\", port = \"fpm\" }\n[[site]]";
    let config = format!("state = \"{}\"\n", state.display())
        + &toml(&api.kubeconfig(folder.path()), "active_from = \"service/php\"").replace("[[site]]", green);
    let mut proxy = Slackwater::start(&config).await;
    assert_eq!(answered_by(&proxy).await, "pod2 hello\n");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = std::fs::read_to_string(&state).unwrap_or_default();
        if text.contains("127.0.66.1:") && text.contains("127.0.66.2:") && text.contains("green") && text.contains('7') {
            break;
        }
        assert!(Instant::now() < deadline, "not remembered: {text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    proxy.kill();
    api.stop().await;
    let proxy = Slackwater::start(&config).await;
    assert_eq!(answered_by(&proxy).await, "pod2 hello\n");
    let status = proxy.status().await;
    let green = &status["upstreams"]["php"]["sets"]["green"];
    assert_eq!(status["upstreams"]["php"]["active_by"], "annotation");
    assert_eq!(green["endpoints"][0]["capacity"], 7);
    let told = async || proxy.metric(&["slackwater_kubernetes_known_age_seconds", "set=\"green\""]).await.unwrap();
    while told().await < 1.0 {
        assert!(Instant::now() < deadline, "the age of what is remembered is not told");
    }
    // The Service has never been listed by this process: what it says now counts.
    api.slice("b", "php-green", port, &[Pod::ready(pods[0].address())]);
    api.start_again().await;
    let deadline = Instant::now() + PATIENCE;
    while answered_by(&proxy).await != "pod1 hello\n" {
        assert!(Instant::now() < deadline, "{}", proxy.log_text());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    while told().await > 0.0 {
        assert!(Instant::now() < deadline, "what is known does not get young again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relist_of_a_thousand_slices_delays_neither_a_request_nor_the_health_check() {
    let (pods, folder) = (pods(2).await, tempfile::tempdir().unwrap());
    // Some 20 MiB of JSON are work for it too, which must not be taken for the proxy's or the pods'.
    let apart = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let api = apart.spawn(ApiServer::start()).await.unwrap();
    let port = port(&pods);
    api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address())]);
    // A hundred endpoints each, as the slice controller fills them; of another port, so that nothing is sent to them.
    for n in 0..1000 {
        let many: Vec<Pod> =
            (0..100).map(|k| Pod { ip: format!("10.{}.{}.{k}", n / 250, n % 250), ..Pod::ready(pods[0].address()) }).collect();
        api.slice_without_ports(&format!("s{n}"), "php-blue", &many);
    }
    let proxy = Slackwater::start(&toml(&api.kubeconfig(folder.path()), "")).await;
    let (front, ops) = (proxy.http(), proxy.ops());
    // On threads of their own: the fake server's work and its locks must not be taken for the proxy's.
    let measure = |done: &Arc<AtomicBool>| {
        [(front, "/index.php"), (ops, "/healthz")].map(|(address, path)| {
            let done = done.clone();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let (mut worst, mut n) = (Duration::ZERO, 0);
                    while n < 100 || !done.load(Ordering::Relaxed) {
                        let at = Instant::now();
                        assert_eq!(http::get(address, path).await.unwrap().status, 200);
                        (worst, n) = (worst.max(at.elapsed()), n + 1);
                    }
                    (worst, n)
                })
            })
        })
    };
    let [(quiet, _), (quiet_ops, _)] = measure(&Arc::new(AtomicBool::new(true))).map(|thread| thread.join().unwrap());
    // Each list tells something new, so that its end can be seen.
    const RELISTS: usize = 4;
    let (before, done) = (api.requests().len(), Arc::new(AtomicBool::new(false)));
    let measuring = measure(&done);
    let relists = || {
        let asked = api.requests();
        asked[before..].iter().filter(|r| r.contains("sendInitialEvents=true") && r.contains("endpointslices")).count()
    };
    for relist in 1..=RELISTS {
        let count = 1 + relist % 2;
        api.relists_after_410();
        // It has asked for the slices again, and not only for the Service: what the old watch would still tell is not what is measured.
        gate::eventually("a list is asked for", async || match relists() {
            seen if seen >= relist => Ok(()),
            seen => Err(format!("{seen} of {relist}")),
        })
        .await;
        api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address()), Pod::ready(pods[1].address())][..count]);
        until(&proxy, "listed anew", |seen| seen.len() == count).await;
    }
    done.store(true, Ordering::Relaxed);
    let [(busy, n), (busy_ops, m)] = measuring.map(|thread| thread.join().unwrap());
    let relists = relists();
    println!(
        "worst of {n} requests {busy:?} and of {m} health checks {busy_ops:?} while 1,001 slices were listed {relists} times; without {quiet:?} and {quiet_ops:?}"
    );
    assert!(relists >= RELISTS, "{relists} relists only");
    // The list takes the control plane some 100 ms each time; behind it nothing may wait. Ten times what a busy two-core machine takes.
    assert!(busy < Duration::from_secs(1) && busy_ops < Duration::from_secs(1), "{busy:?} {busy_ops:?}");
    apart.shutdown_background();
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_selector_of_a_service_is_flipped_nothing_is_dropped() {
    // Argo Rollouts and Flagger turn so: one Service, all whose endpoints change at once.
    let (api, pods, folder) = (ApiServer::start().await, pods(4).await, tempfile::tempdir().unwrap());
    let port = port(&pods);
    let ready = |nth: [usize; 2]| nth.map(|n| Pod::ready(pods[n].address()));
    api.slice("a", "php-blue", port, &ready([0, 1]));
    api.service("php-blue", &[("slackwater.dev/fpm-workers", "4")]);
    let proxy = Slackwater::start(&toml(&api.kubeconfig(folder.path()), "")).await;
    let shapes = vec![Shape::get("/index.php", Expect::Hello), Shape::post("/index.php", 3_000, Expect::Hello)];
    let client = LedgerClient::builder(proxy.http()).connections(8).shapes(shapes).start();
    for turn in 0..20 {
        client.ledger().wait_more(50).await;
        let (now, before) = if turn % 2 == 0 { ([2, 3], [0, 1]) } else { ([0, 1], [2, 3]) };
        api.slice("a", "php-blue", port, &ready(now));
        until(&proxy, "flipped", |seen| {
            seen.iter()
                .all(|e| e.contains(&format!("127.0.66.{}:", now[0] + 1)) || e.contains(&format!("127.0.66.{}:", now[1] + 1)))
        })
        .await;
        // What is on its way to the old ones ends, and nothing new goes there.
        let settled: usize = before.iter().map(|n| pods[*n].requests().len()).sum();
        client.ledger().wait_more(50).await;
        let after: usize = before.iter().map(|n| pods[*n].requests().len()).sum();
        assert!(after - settled <= 8, "{} new requests on pods that are gone", after - settled);
    }
    let ledger = client.stop().await;
    println!("{}", ledger.summary());
    ledger.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_annotation_turns_traffic_and_is_refused_with_a_reason_until_it_can_be_followed() {
    let (api, pods, folder) = (ApiServer::start().await, pods(2).await, tempfile::tempdir().unwrap());
    let port = port(&pods);
    api.slice("a", "php-blue", port, &[Pod::ready(pods[0].address())]);
    api.slice("b", "php-green", port, &[Pod::ready(pods[1].address())]);
    let green = "[upstream.php.set.green]\nkubernetes = { service = \"php-green\", port = \"fpm\" }\nmin_ready = 2\n[[site]]";
    let config = toml(&api.kubeconfig(folder.path()), "active_from = \"service/php\"").replace("[[site]]", green);
    let mut proxy = Slackwater::builder(&config).wait(Wait::Live).start().await;
    // Nothing is served before it is known which set is the right one.
    api.wait_requests(6).await;
    assert_eq!(http::get(proxy.ops(), "/readyz").await.unwrap().status, 503);
    api.service("php", &[("slackwater.dev/active", "blue")]);
    proxy.wait_status("/readyz", 200).await;
    assert_eq!(answered_by(&proxy).await, "pod1 hello\n");
    assert_eq!(proxy.status().await["upstreams"]["php"]["active_by"], "annotation");

    let client = LedgerClient::builder(proxy.http()).shapes(vec![Shape::get("/index.php", Expect::Hello)]).start();
    // Too few pods, then no such set: it stays where it is, and says why once.
    api.service("php", &[("slackwater.dev/active", "green")]);
    proxy.wait_for_log("min_ready is 2", PATIENCE).await;
    let warnings = proxy.status().await["warnings"].to_string();
    assert!(warnings.contains("annotation not followed") && warnings.contains("min_ready is 2"), "{warnings}");
    assert_eq!(proxy.metric(&["slackwater_upstream_annotation_refused", "upstream=\"php\""]).await, Some(1.0));
    let deadline = Instant::now() + PATIENCE;
    while !api
        .objects("events")
        .iter()
        .any(|event| event["reason"] == "ActiveSetRefused" && event["message"].as_str().unwrap().contains("min_ready is 2"))
    {
        assert!(Instant::now() < deadline, "{:?}", api.objects("events"));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let event = &api.objects("events")[0];
    assert_eq!((&event["involvedObject"]["kind"], &event["involvedObject"]["name"]), (&"Service".into(), &"php".into()), "{event}");
    assert_eq!((&event["type"], &event["source"]["component"]), (&"Warning".into(), &"slackwater".into()));
    api.service("php", &[("slackwater.dev/active", "red")]);
    proxy.wait_for_log("there is no set red; there is blue, green", PATIENCE).await;
    assert_eq!(answered_by(&proxy).await, "pod1 hello\n");
    api.service("php", &[("slackwater.dev/active", "green")]);
    client.ledger().wait_more(50).await;
    // Tried again as soon as there are enough; the second pod need not answer for that, it is never asked.
    let more = Pod { ip: "127.0.66.9".to_owned(), conditions: serde_json::json!({}), name: None };
    let listener = std::net::TcpListener::bind(("127.0.66.9", port)).unwrap();
    drop(listener);
    let extra =
        ScriptedFpm::builder(Behaviour::hello("pod2")).at((std::net::Ipv4Addr::new(127, 0, 66, 9), port).into()).start().await;
    api.slice("b", "php-green", port, &[Pod::ready(pods[1].address()), more]);
    let receipt = proxy.wait_for_log("the old set has drained", PATIENCE).await;
    assert!(receipt.contains(r#"\"by\":\"annotation\""#) && receipt.contains(r#"\"cut\":[]"#), "{receipt}");
    let since = Instant::now();
    assert_eq!(answered_by(&proxy).await, "pod2 hello\n");
    assert!(!proxy.status().await["warnings"].to_string().contains("not followed"));
    // An operator on one replica cannot undo what all replicas are told.
    let refused = proxy.cli(&["swap", "php", "blue"]).await;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && text.contains("kubectl annotate"), "{text}");
    assert!(proxy.cli_ok(&["swap", "php", "blue", "--dry-run"]).await.contains("would be taken"));
    // A Service that is deleted turns nothing; then an operator may.
    api.delete("services", "php");
    proxy.wait_for_log("service php is gone; set green stays active", PATIENCE).await;
    client.ledger().wait_more(50).await;
    let ledger = client.stop().await;
    proxy.cli_ok(&["swap", "php", "blue"]).await;
    assert_eq!(answered_by(&proxy).await, "pod1 hello\n");
    assert!(ledger.wrong_colour_since(since.into(), "pod2").is_empty());
    ledger.assert_clean();
    drop(extra);
}
