//! Behaviours before a cluster that is seen through its API alone: the fake one, and the real one that SLACKWATER_TEST_KUBECONFIG names (its
//! API server of version 1.33 or later). Pods are real PHP-FPM pools with addresses of their own and one port, in a network namespace.

mod support;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use support::{
    apiserver::{ApiServer, Pod, slice},
    cluster::{Cluster, REAL},
    gate, http,
    ledger::LedgerClient,
    netns,
    process::{Slackwater, Wait},
    real_fpm::{self, RealFpm},
};

const PATIENCE: Duration = Duration::from_secs(20);
const ACTIVE: &str = "slackwater.dev/active";
const WORKERS: &str = "slackwater.dev/fpm-workers";
const FPM: u16 = 9000;
/// Of the manifests: between the slice that says "terminating" and QUIT.
const PRE_STOP: Duration = Duration::from_secs(5);

/// One test for each behaviour: before the fake cluster, and before the real one if there is one.
macro_rules! behaviours {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            netns::run(async || {
                let fake = Cluster::fake().await;
                behaviour::$name(&fake).await;
                match Cluster::real().await {
                    Some(real) => {
                        behaviour::$name(&real).await;
                        real.remove().await;
                        println!("{}: before the fake and the real API server", stringify!($name));
                    }
                    None => println!("{}: not before a real API server, {REAL} is not set", stringify!($name)),
                }
            });
        }
    )*};
}

behaviours! {
    endpoints_are_what_the_slices_say
    an_annotation_is_followed_or_refused_with_an_event
    a_rolling_replacement_of_all_pods_loses_nothing
    a_hundred_turns_lose_nothing_and_never_show_the_wrong_colour
}

/// The way to an API server that is outside of the pods' network, which a machine without a real one would never go: here to the fake one.
#[test]
fn the_way_to_an_api_server_of_the_machine_works() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    // Its threads were started before: it stays in the machine's own network.
    let (server, kubeconfig) = runtime.block_on(async {
        let server = ApiServer::start().await;
        let kubeconfig = server.kubeconfig(folder.path());
        (server, kubeconfig)
    });
    netns::run(async || {
        let cluster = Cluster::named(&kubeconfig).await;
        assert!(cluster.namespace.starts_with("slackwater-test-"));
        behaviour::endpoints_are_what_the_slices_say(&cluster).await;
        cluster.remove().await;
    });
    assert!(
        server.requests().iter().any(|request| request.contains("/namespaces/slackwater-test-") && request.contains("watch=true"))
    );
}

/// A pool of four workers at the nth pod's address.
async fn fpm(n: u8, colour: &str, docroot: Option<&std::path::Path>) -> RealFpm {
    let builder = RealFpm::builder(colour).workers(4).at((netns::pod(n), FPM).into());
    match docroot {
        Some(folder) => builder.docroot(folder).start().await,
        None => builder.start().await,
    }
}

fn ready(n: u8) -> Pod {
    Pod::ready(SocketAddr::from((netns::pod(n), FPM)))
}

fn leaving(n: u8) -> Pod {
    Pod::terminating(SocketAddr::from((netns::pod(n), FPM)))
}

fn toml(cluster: &Cluster, docroot: &std::path::Path, upstream: &str) -> String {
    format!(
        r#"
        [kubernetes]
        namespace = "{}"
        kubeconfig = "{}"
        [upstream.php]
        {upstream}
        [upstream.php.set.blue]
        kubernetes = {{ service = "php-blue", port = "fpm" }}
        [upstream.php.set.green]
        kubernetes = {{ service = "php-green", port = "fpm" }}
        [[site]]
        php_root = "{}"
        upstream = "php"
        scripts = ["/*.php"]
        "#,
        cluster.namespace,
        cluster.kubeconfig.display(),
        docroot.display()
    )
}

async fn php(proxy: &Slackwater) -> serde_json::Value {
    http::get(proxy.ops(), "/status").await.unwrap().json()["upstreams"]["php"].clone()
}

async fn until(proxy: &Slackwater, what: &str, wanted: impl Fn(&serde_json::Value) -> bool) {
    gate::eventually(what, async || {
        let seen = php(proxy).await;
        if wanted(&seen) { Ok(()) } else { Err(format!("{seen:#}\n{}", proxy.log_text())) }
    })
    .await;
}

/// "ADDRESS STATE" of each endpoint of the blue set.
fn blue(php: &serde_json::Value) -> Vec<String> {
    let endpoints = php["sets"]["blue"]["endpoints"].as_array().unwrap();
    endpoints.iter().map(|e| format!("{} {}", e["address"].as_str().unwrap(), e["state"].as_str().unwrap())).collect()
}

mod behaviour {
    use super::*;

    pub async fn endpoints_are_what_the_slices_say(cluster: &Cluster) {
        let pool = fpm(1, "blue", None).await;
        cluster.annotate("php-blue", &[(WORKERS, "4")]).await;
        cluster.annotate("php-green", &[]).await;
        cluster.slice("php-blue-a", "php-blue", FPM, &[ready(1)]).await;
        let proxy = Slackwater::start(&toml(cluster, pool.docroot(), "active = \"blue\"")).await;
        assert_eq!(http::get(proxy.http(), "/hello.php").await.unwrap().colour(), Some("blue"));
        until(&proxy, "the workers of the annotation", |php| php["sets"]["blue"]["endpoints"][0]["capacity"] == 4).await;
        // Two slices, the same pod in both; then one that has no port; then a pod that terminates before it is gone.
        cluster.slice("php-blue-b", "php-blue", FPM, &[ready(1), ready(2)]).await;
        until(&proxy, "two of two slices", |php| blue(php) == ["10.244.1.1:9000 usable", "10.244.1.2:9000 usable"]).await;
        let mut portless = slice("php-blue-b", "php-blue", FPM, "IPv4", &[ready(2)]);
        portless["ports"] = serde_json::Value::Null;
        cluster.put_slice("php-blue-b", portless).await;
        until(&proxy, "one, the other slice has no port", |php| blue(php) == ["10.244.1.1:9000 usable"]).await;
        cluster.slice("php-blue-b", "php-blue", FPM, &[leaving(2)]).await;
        until(&proxy, "leaving", |php| blue(php) == ["10.244.1.1:9000 usable", "10.244.1.2:9000 leaving"]).await;
        cluster.delete_slice("php-blue-b").await;
        until(&proxy, "gone", |php| blue(php) == ["10.244.1.1:9000 usable"]).await;
        assert_eq!(php(&proxy).await["sets"]["blue"]["known_age_seconds"], 0.0);
    }

    pub async fn an_annotation_is_followed_or_refused_with_an_event(cluster: &Cluster) {
        let pool = fpm(1, "blue", None).await;
        let other = fpm(2, "green", Some(pool.docroot())).await;
        cluster.slice("php-blue-a", "php-blue", FPM, &[ready(1)]).await;
        cluster.annotate("php", &[(ACTIVE, "blue")]).await;
        let proxy = Slackwater::start(&toml(cluster, pool.docroot(), "active_from = \"service/php\"")).await;
        let colour = async || http::get(proxy.http(), "/hello.php").await.unwrap().colour().map(str::to_owned);
        assert_eq!(colour().await.as_deref(), Some("blue"));
        cluster.annotate("php", &[(ACTIVE, "green")]).await;
        until(&proxy, "refused", |php| php["refused"].as_str().is_some_and(|why| why.contains("min_ready is 1"))).await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let events = cluster.events().await;
            if events.iter().any(|(reason, message)| reason == "ActiveSetRefused" && message.contains("min_ready is 1")) {
                break;
            }
            assert!(Instant::now() < deadline, "{events:?}");
        }
        assert_eq!(colour().await.as_deref(), Some("blue"));
        cluster.slice("php-green-a", "php-green", FPM, &[ready(2)]).await;
        until(&proxy, "green", |php| php["active"] == "green" && php["refused"].is_null()).await;
        assert_eq!(colour().await.as_deref(), Some("green"));
        drop(other);
    }

    pub async fn a_rolling_replacement_of_all_pods_loses_nothing(cluster: &Cluster) {
        const PODS: u8 = 3;
        // Not in the first pool's own folder, which goes with it.
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let docroot = folder.path().join("php");
        real_fpm::copy(&real_fpm::php_folder(), &docroot);
        let mut old = Vec::new();
        for n in 1..=PODS {
            old.push(fpm(n, "blue", Some(&docroot)).await);
        }
        cluster.annotate("php-blue", &[(WORKERS, "4")]).await;
        cluster.slice("php-blue-a", "php-blue", FPM, &[ready(1), ready(2), ready(3)]).await;
        let proxy = Slackwater::start(&toml(cluster, &docroot, "active = \"blue\"")).await;
        let client = LedgerClient::builder(proxy.http()).connections(8).start();
        client.ledger().wait_more(200).await;

        // As a Deployment does it with maxSurge 1 and maxUnavailable 0: a new pod is ready before an old one is told to end.
        let mut new = Vec::new();
        let (mut after, mut slowest) = (Vec::new(), Duration::ZERO);
        for n in 1..=PODS {
            let pool = fpm(10 + n, "blue", Some(&docroot)).await;
            after.push(ready(10 + n));
            let rest: Vec<Pod> = (n..=PODS).map(ready).collect();
            let event = Instant::now();
            cluster.slice("php-blue-a", "php-blue", FPM, &[after.clone(), rest.clone()].concat()).await;
            while pool.journal().is_empty() {
                if event.elapsed() > PATIENCE {
                    let (seen, entries) = (php(&proxy).await, client.ledger().len());
                    panic!("pod {} is not used after {entries} requests: {seen:#}\n{}", 10 + n, proxy.log_text());
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            slowest = slowest.max(event.elapsed());
            new.push(pool);
            let rest: Vec<Pod> = (n + 1..=PODS).map(ready).collect();
            let deleted = Instant::now();
            cluster.slice("php-blue-a", "php-blue", FPM, &[after.clone(), vec![leaving(n)], rest.clone()].concat()).await;
            // The kubelet runs preStop and sends QUIT behind it; traffic goes on meanwhile.
            while deleted.elapsed() < PRE_STOP {
                client.ledger().wait_more(20).await;
            }
            let mut pool = old.remove(0);
            pool.quit();
            pool.wait_exit().await;
            cluster.slice("php-blue-a", "php-blue", FPM, &[after.clone(), rest].concat()).await;
        }
        client.ledger().wait_more(200).await;
        let ledger = client.stop().await;
        println!("{}", ledger.summary());
        println!("from the event to the first request that a new pod has logged, slowest of {PODS}: {slowest:?}");
        ledger.assert_clean();
        // 100 ms are expected.
        assert!(slowest < Duration::from_secs(1), "{slowest:?}");
        until(&proxy, "the new pods alone", |php| blue(php).len() == usize::from(PODS) && blue(php)[0].starts_with("10.244.1.11:"))
            .await;
    }

    pub async fn a_hundred_turns_lose_nothing_and_never_show_the_wrong_colour(cluster: &Cluster) {
        let pool = fpm(1, "blue", None).await;
        let _green = fpm(2, "green", Some(pool.docroot())).await;
        for (service, n) in [("php-blue", 1), ("php-green", 2)] {
            cluster.annotate(service, &[(WORKERS, "4")]).await;
            cluster.slice(&format!("{service}-a"), service, FPM, &[ready(n)]).await;
        }
        cluster.annotate("php", &[(ACTIVE, "blue")]).await;
        let config = toml(cluster, pool.docroot(), "active_from = \"service/php\"");
        let mut proxy = Slackwater::builder(&config).wait(Wait::Live).start().await;
        proxy.wait_status("/readyz", 200).await;
        let client = LedgerClient::builder(proxy.http()).connections(8).start();
        let (mut wrong, mut slowest) = (Vec::new(), Duration::ZERO);
        for turn in 0..100 {
            let colour = if turn % 2 == 0 { "green" } else { "blue" };
            let at = Instant::now();
            cluster.annotate("php", &[(ACTIVE, colour)]).await;
            // Turned, and no request is dispatched to the old set any more: the barrier comes before the drain.
            until(&proxy, colour, |php| php["active"] == colour && php["draining"] == serde_json::json!([])).await;
            slowest = slowest.max(at.elapsed());
            let turned = Instant::now();
            client.ledger().wait_more(16).await;
            wrong.extend(client.ledger().wrong_colour_since(turned.into(), colour));
        }
        let ledger = client.stop().await;
        println!("{}", ledger.summary());
        println!("100 turns; from the annotation until the old set had drained, slowest: {slowest:?}");
        assert!(wrong.is_empty(), "{wrong:?}");
        ledger.assert_clean();
    }
}
