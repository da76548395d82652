//! Several replicas that follow one annotation: one vote, one turn, one receipt; and what becomes of it when one refuses, joins or dies.

mod support;

use std::{
    process::Output,
    time::{Duration, Instant},
};

use support::{
    apiserver::{Pod, Rights},
    cluster::Cluster,
    gate::{self, Gate},
    http,
    ledger::{Expect, LedgerClient, Shape},
    netns,
    process::{Slackwater, Wait},
    scripted_fpm::{Behaviour, ScriptedFpm},
};

const PATIENCE: Duration = Duration::from_secs(20);
const ACTIVE: &str = "slackwater.dev/active";
const FPM: u16 = 9000;
/// The pods' and the API server's addresses, as the manifests have it.
const PODS: &str = "10.244.0.0/16";
/// The first replica's address; the next ones follow.
const EDGE: u8 = 100;

fn toml(cluster: &Cluster, ops_allow: &str) -> String {
    format!(
        r#"
        workers = 1
        [listen]
        http = ["{{HTTP}}"]
        ops = "{{OPS}}"
        admin = "{{ADMIN}}"
        ops_allow = ["{ops_allow}"]
        [kubernetes]
        namespace = "{}"
        kubeconfig = "{}"
        self_service = "edge"
        [upstream.php]
        active_from = "service/php"
        [upstream.php.set.blue]
        kubernetes = {{ service = "php-blue", port = "fpm" }}
        [upstream.php.set.green]
        kubernetes = {{ service = "php-green", port = "fpm" }}
        [[site]]
        php_root = "/app"
        upstream = "php"
        "#,
        cluster.namespace,
        cluster.kubeconfig.display()
    )
}

/// A cluster with a blue and a green pod, and so many replicas.
struct Fleet {
    cluster: Cluster,
    blue: ScriptedFpm,
    green: ScriptedFpm,
    replicas: Vec<Slackwater>,
}

impl Fleet {
    async fn start(replicas: u8) -> Fleet {
        let cluster = Cluster::fake().await;
        let pod = async |n: u8, colour: &str| {
            ScriptedFpm::builder(Behaviour::hello(colour)).at((netns::pod(n), FPM).into()).start().await
        };
        let (blue, green) = (pod(1, "blue").await, pod(2, "green").await);
        cluster.slice("php-blue-a", "php-blue", FPM, &[Pod::ready(blue.address())]).await;
        cluster.slice("php-green-a", "php-green", FPM, &[Pod::ready(green.address())]).await;
        for service in ["php-blue", "php-green"] {
            cluster.annotate(service, &[("slackwater.dev/fpm-workers", "8")]).await;
        }
        cluster.annotate("php", &[(ACTIVE, "blue")]).await;
        let mut fleet = Fleet { cluster, blue, green, replicas: Vec::new() };
        for _ in 0..replicas {
            fleet.joins().await;
        }
        fleet
    }

    /// One more, as the kubelet has it: first it is ready, then it stands in the slice.
    async fn joins(&mut self) {
        let n = EDGE + u8::try_from(self.replicas.len()).unwrap();
        let replica = Slackwater::builder(&toml(&self.cluster, PODS)).at(netns::pod(n)).start().await;
        self.replicas.push(replica);
        self.enlist().await;
    }

    async fn enlist(&self) {
        let mut pods = Vec::new();
        for replica in &self.replicas {
            let (ip, name) = (replica.ops().ip(), name(replica));
            self.cluster.fake.as_ref().unwrap().pod(&name, ip);
            pods.push(Pod::ready(replica.http()).named(&name));
        }
        self.cluster.slice("edge-a", "edge", 8080, &pods).await;
    }

    /// `slackwater swap` with a kubeconfig, from outside the cluster.
    async fn swap(&self, args: &[&str]) -> Output {
        self.swap_as(args, &[]).await
    }

    async fn swap_as(&self, args: &[&str], env: &[(&str, &str)]) -> Output {
        let config = self.replicas[0].config().display().to_string();
        let mut all = vec!["swap", "php"];
        all.extend(args);
        all.extend(["--config", &config]);
        support::process::slackwater(&all, env).await
    }

    async fn colours(&self) -> Vec<String> {
        let mut all = Vec::new();
        for replica in &self.replicas {
            all.push(http::get(replica.http(), "/index.php").await.unwrap().colour().unwrap_or_default().to_owned());
        }
        all
    }

    async fn until(&self, colour: &str) {
        gate::eventually(&format!("all {colour}"), async || {
            let seen = self.colours().await;
            if seen.iter().all(|seen| seen == colour) { Ok(()) } else { Err(format!("{seen:?}")) }
        })
        .await;
    }

    async fn annotation(&self) -> Option<String> {
        self.cluster.annotation("php", ACTIVE).await
    }
}

fn name(replica: &Slackwater) -> String {
    format!("edge-{}", replica.ops().ip().to_string().rsplit('.').next().unwrap())
}

fn said(output: &Output) -> (bool, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn all_are_asked_then_all_turn_and_one_receipt_tells_of_all() {
    netns::run(async || {
        let fleet = Fleet::start(3).await;
        assert_eq!(fleet.colours().await, ["blue", "blue", "blue"]);
        let (ok, out, err) = said(&fleet.swap(&["green", "--dry-run"]).await);
        assert!(ok && out.contains("would be taken by all 3 replicas"), "{out}{err}");
        assert_eq!(fleet.annotation().await.as_deref(), Some("blue"));

        // One request on the old set of each replica holds the drain up.
        let gate = Gate::closed();
        fleet.blue.on("/index.php/slow", Behaviour::hello("blue").holds_answer(&gate));
        let mut slow = Vec::new();
        for replica in &fleet.replicas {
            let address = replica.http();
            slow.push(tokio::spawn(async move { http::get(address, "/index.php/slow").await.unwrap().text() }));
        }
        fleet.blue.wait_begun(6).await;
        let swapping = fleet.swap(&["green", "--wait", "--timeout", "30s"]);
        let turned = async {
            fleet.until("green").await;
            gate.open();
        };
        let (output, ()) = tokio::join!(swapping, turned);
        let (ok, out, err) = said(&output);
        assert!(ok, "{out}{err}");
        let receipt: serde_json::Value = serde_json::from_str(out.lines().nth(1).unwrap()).unwrap();
        println!("{receipt}");
        assert_eq!((&receipt["from"], &receipt["to"], &receipt["kind"]), (&"blue".into(), &"green".into(), &"swap".into()));
        assert!(receipt["in_flight"].as_u64() >= Some(3) && receipt["completed"] == receipt["in_flight"], "{receipt}");
        assert_eq!(receipt["cut"], serde_json::json!([]));
        assert_eq!(receipt["replicas"].as_array().unwrap().len(), 3);
        for request in slow {
            assert_eq!(request.await.unwrap(), "blue hello\n");
        }
        assert_eq!(fleet.annotation().await.as_deref(), Some("green"));
        let (ok, out, _) = said(&fleet.swap(&["green"]).await);
        assert!(ok && out.contains("is active on all 3 replicas already"), "{out}");

        // kubectl annotate alone turns all.
        fleet.cluster.annotate("php", &[(ACTIVE, "blue")]).await;
        fleet.until("blue").await;
    });
}

#[test]
fn from_a_pod_the_others_are_asked_directly_and_a_role_that_may_not_patch_says_so() {
    netns::run(async || {
        let fleet = Fleet::start(2).await;
        let api = fleet.cluster.fake.as_ref().unwrap();
        // The edge's own service account: no pod proxy, no patch.
        api.accepts_also("edge", Rights::Edge);
        let folder = tempfile::tempdir().unwrap();
        let kubeconfig = api.kubeconfig(folder.path());
        std::fs::write(folder.path().join("token"), "edge").unwrap();
        let config = std::fs::read_to_string(fleet.replicas[0].config()).unwrap();
        let own = folder.path().join("slackwater.toml");
        std::fs::write(&own, config.replace(&fleet.cluster.kubeconfig.display().to_string(), &kubeconfig.display().to_string()))
            .unwrap();
        let own = own.display().to_string();
        let env = [("KUBERNETES_SERVICE_HOST", "10.96.0.1")];
        let swap = async |args: &[&str], env: &[(&str, &str)]| {
            let mut all = vec!["swap", "php", "green", "--config", &own];
            all.extend(args);
            said(&support::process::slackwater(&all, env).await)
        };
        // A replica that may not be asked says so.
        fleet.replicas[0].rewrite(&toml(&fleet.cluster, "127.0.0.0/8"));
        fleet.replicas[0].cli_ok(&["reload"]).await;
        let (ok, _, err) = swap(&["--dry-run"], &env).await;
        assert!(!ok && err.contains("edge-100: answers 403") && err.contains("is not in listen.ops_allow"), "{err}");
        fleet.replicas[0].rewrite(&toml(&fleet.cluster, PODS));
        fleet.replicas[0].cli_ok(&["reload"]).await;
        let (ok, out, err) = swap(&["--dry-run"], &env).await;
        assert!(ok && out.contains("would be taken by all 2 replicas"), "{out}{err}");
        let (ok, _, err) = swap(&["--wait"], &env).await;
        assert!(
            !ok && err.contains("may not patch service php") && err.contains("kubectl annotate --overwrite service php"),
            "{err}"
        );
        assert_eq!(fleet.annotation().await.as_deref(), Some("blue"));
        // From outside it needs the pod proxy.
        let (ok, _, err) = swap(&["--dry-run"], &[]).await;
        assert!(!ok && err.contains("pods/proxy"), "{err}");
        // One replica alone can be asked over its own socket.
        assert!(fleet.replicas[0].cli_ok(&["swap", "php", "green", "--dry-run"]).await.contains("would be taken"));
        let text = fleet.replicas[0].cli_ok(&["status"]).await;
        assert!(text.contains("active blue (by annotation)"), "{text}");
    });
}

#[test]
fn one_that_refuses_stops_it_before_and_puts_the_annotation_back_in_the_middle() {
    netns::run(async || {
        let fleet = Fleet::start(3).await;
        let green = fleet.green.address().to_string();
        fleet.replicas[1].cli_ok(&["endpoint", "disable", "php", &green]).await;
        let (ok, out, err) = said(&fleet.swap(&["green", "--wait"]).await);
        assert!(!ok && out.is_empty(), "{out}");
        assert!(
            err.contains("1 of 3 replicas would not take set green")
                && err.contains("edge-101: ")
                && err.contains("min_ready is 1"),
            "{err}"
        );
        assert_eq!(fleet.annotation().await.as_deref(), Some("blue"));
        for args in [["red", "--dry-run"], ["green", "--force"]] {
            let (ok, _, err) = said(&fleet.swap(&args).await);
            assert!(
                !ok && (err.contains("there is no set red of upstream php; there is blue, green") || err.contains("--force")),
                "{err}"
            );
        }

        // It has voted yes, and loses its pods before the annotation comes.
        fleet.replicas[1].cli_ok(&["endpoint", "enable", "php", &green]).await;
        let client = LedgerClient::builder(fleet.replicas[0].http()).shapes(vec![Shape::get("/index.php", Expect::Hello)]).start();
        let gate = Gate::closed();
        fleet.cluster.fake.as_ref().unwrap().holds_patches(&gate);
        let swapping = fleet.swap(&["green", "--wait", "--timeout", "15s"]);
        let disabling = async {
            gate.wait_reached(1).await;
            fleet.replicas[1].cli_ok(&["endpoint", "disable", "php", &green]).await;
            gate.open();
        };
        let (output, ()) = tokio::join!(swapping, disabling);
        let (ok, out, err) = said(&output);
        assert!(!ok && out.is_empty(), "{out}");
        assert!(err.contains("edge-101 does not take set green: set green of upstream php has 0 usable endpoints of 1"), "{err}");
        assert!(err.contains("the annotation is what it was: slackwater.dev/active=blue"), "{err}");
        assert_eq!(fleet.annotation().await.as_deref(), Some("blue"));
        fleet.until("blue").await;
        client.ledger().wait_more(20).await;
        client.stop().await.assert_clean();
    });
}

#[test]
fn one_that_joins_in_the_middle_counts_and_one_that_dies_does_not() {
    netns::run(async || {
        let mut fleet = Fleet::start(2).await;
        let gate = Gate::closed();
        fleet.blue.on("/index.php/slow", Behaviour::hello("blue").holds_answer(&gate));
        let address = fleet.replicas[0].http();
        let slow = tokio::spawn(async move { http::get(address, "/index.php/slow").await.unwrap().text() });
        fleet.blue.wait_begun(1).await;
        let config = fleet.replicas[0].config().display().to_string();
        let swapping = tokio::spawn(async move {
            support::process::slackwater(&["swap", "php", "green", "--wait", "--timeout", "30s", "--config", &config], &[]).await
        });
        fleet.until("green").await;
        fleet.joins().await;
        assert_eq!(fleet.colours().await, ["green", "green", "green"]);
        // The second is killed, and its pod stands in the slice until the node is found out.
        fleet.replicas[1].kill();
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert!(!swapping.is_finished(), "it waits for one that does not answer");
        fleet.replicas.remove(1);
        fleet.enlist().await;
        gate.open();
        let (ok, out, err) = said(&swapping.await.unwrap());
        assert!(ok && out.contains("on all 2 replicas; the old set has drained"), "{out}{err}");
        assert_eq!(slow.await.unwrap(), "blue hello\n");

        // One that cannot be reached at the vote stops it.
        fleet.replicas[1].kill();
        let (ok, _, err) = said(&fleet.swap(&["blue", "--wait"]).await);
        assert!(!ok && err.contains("1 of 2 replicas would not take set blue"), "{err}");
        assert_eq!(fleet.annotation().await.as_deref(), Some("green"));
    });
}

#[test]
fn somebody_who_puts_the_old_annotation_back_wins_at_once_and_nothing_flaps() {
    netns::run(async || {
        let fleet = Fleet::start(3).await;
        let client = LedgerClient::builder(fleet.replicas[2].http()).shapes(vec![Shape::get("/index.php", Expect::Hello)]).start();
        client.ledger().wait_more(20).await;
        // A request on blue keeps the swap waiting for the drain, while GitOps finds that the annotation is not what its repository says.
        let gate = Gate::closed();
        fleet.blue.on("/index.php/slow", Behaviour::hello("blue").holds_answer(&gate));
        let address = fleet.replicas[0].http();
        let slow = tokio::spawn(async move { http::get(address, "/index.php/slow").await.unwrap().text() });
        let deadline = Instant::now() + PATIENCE;
        while !fleet.blue.requests().iter().any(|r| r.uri().contains("slow")) {
            assert!(Instant::now() < deadline, "the slow request has not begun");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let swapping = fleet.swap(&["green", "--wait", "--timeout", "30s"]);
        let gitops = async {
            fleet.until("green").await;
            let at = Instant::now();
            fleet.cluster.annotate("php", &[(ACTIVE, "blue")]).await;
            fleet.until("blue").await;
            (at, Instant::now())
        };
        let (output, (at, back)) = tokio::join!(swapping, gitops);
        let (ok, _, err) = said(&output);
        assert!(
            !ok && err.contains("somebody else has set slackwater.dev/active of service php to blue meanwhile; it is left so"),
            "{err}"
        );
        println!("two colours for {:?} after the annotation was put back", back - at);
        gate.open();
        slow.await.unwrap();
        // It stays so: nobody turns it again.
        client.ledger().wait_more(200).await;
        assert_eq!(fleet.annotation().await.as_deref(), Some("blue"));
        for replica in &fleet.replicas {
            let turns = replica.log_text().lines().filter(|line| line.contains("\"message\":\"swap\"")).count();
            assert_eq!(turns, 2, "to green and back");
        }
        let ledger = client.stop().await;
        ledger.assert_clean();
        assert!(ledger.wrong_colour_since(back.into(), "blue").is_empty());
    });
}

#[test]
fn a_replica_that_starts_and_cannot_follow_takes_what_its_peers_serve() {
    netns::run(async || {
        let mut fleet = Fleet::start(1).await;
        // Somebody annotates a set that nobody can serve; who is there stays on blue.
        fleet.cluster.slice("php-green-a", "php-green", FPM, &[]).await;
        fleet.cluster.annotate("php", &[(ACTIVE, "green")]).await;
        fleet.replicas[0].wait_for_log("is not followed", PATIENCE).await;
        fleet.joins().await;
        assert_eq!(fleet.colours().await, ["blue", "blue"]);
        let text = fleet.replicas[1].cli_ok(&["status"]).await;
        assert!(text.contains("active blue (by peers)") && text.contains("annotation green NOT FOLLOWED: set green"), "{text}");
        let status = fleet.replicas[1].status().await;
        assert_eq!(status["upstreams"]["php"]["active_by"], "peers");
        assert!(status["upstreams"]["php"]["refused"].as_str().unwrap().contains("min_ready is 1"), "{status}");
        // As soon as there is a green pod both turn.
        fleet.cluster.slice("php-green-a", "php-green", FPM, &[Pod::ready(fleet.green.address())]).await;
        fleet.until("green").await;
        assert_eq!(fleet.replicas[1].status().await["upstreams"]["php"]["active_by"], "annotation");

        // Without anybody to ask the annotated set is waited for.
        fleet.cluster.slice("php-green-a", "php-green", FPM, &[]).await;
        fleet.cluster.slice("edge-a", "edge", 8080, &[]).await;
        let mut alone = Slackwater::builder(&toml(&fleet.cluster, PODS)).at(netns::pod(EDGE + 9)).wait(Wait::Live).start().await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ready = http::get(alone.ops(), "/readyz").await.unwrap();
            assert_eq!(ready.status, 503);
            if ready.text().contains("no usable endpoint in set green") {
                break;
            }
            assert!(Instant::now() < deadline, "{}", ready.text());
        }
        fleet.cluster.slice("php-green-a", "php-green", FPM, &[Pod::ready(fleet.green.address())]).await;
        alone.wait_status("/readyz", 200).await;
    });
}
