//! Several replicas before one pool, who do not speak with each other: each has its part of the workers, lends what it does not use, and gets it back.

mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use support::{
    apiserver::Pod,
    cluster::Cluster,
    gate::eventually,
    http::{self, Connection},
    netns,
    process::Slackwater,
    real_fpm::RealFpm,
};
use tokio::net::TcpStream;

const FPM: u16 = 9000;
const STATUS: u16 = 9001;
const EDGE: u8 = 100;

/// Pods of four workers each, and replicas that know each other by the slices of their Service.
struct Pool {
    cluster: Cluster,
    pods: Vec<RealFpm>,
    replicas: Vec<Slackwater>,
}

impl Pool {
    async fn start(pods: u8, workers: usize) -> Pool {
        let cluster = Cluster::fake().await;
        let mut all = Vec::new();
        for n in 1..=pods {
            let pod = RealFpm::builder("blue").workers(workers);
            all.push(pod.at((netns::pod(n), FPM).into()).status_at((netns::pod(n), STATUS).into()).start().await);
        }
        let ready: Vec<Pod> = all.iter().map(|pod| Pod::ready(pod.tcp_address())).collect();
        cluster.slice("php-blue-a", "php-blue", FPM, &ready).await;
        Pool { cluster, pods: all, replicas: Vec::new() }
    }

    fn toml(&self) -> String {
        // All pods have the scripts of their own; one folder will do for the name.
        let root = self.pods[0].docroot().display();
        format!(
            r#"
            workers = 1
            [listen]
            http = ["{{HTTP}}"]
            ops = "{{OPS}}"
            admin = "{{ADMIN}}"
            [kubernetes]
            namespace = "{}"
            kubeconfig = "{}"
            self_service = "edge"
            [upstream.php.set.blue]
            kubernetes = {{ service = "php-blue", port = "fpm" }}
            status_path = "/status"
            status_listen = "0.0.0.0:{STATUS}"
            [[site]]
            php_root = "{root}"
            upstream = "php"
            scripts = ["/*.php"]
            "#,
            self.cluster.namespace,
            self.cluster.kubeconfig.display()
        )
    }

    async fn joins(&mut self) {
        let n = EDGE + u8::try_from(self.replicas.len()).unwrap();
        let replica = Slackwater::builder(&self.toml()).at(netns::pod(n)).start().await;
        self.replicas.push(replica);
        self.enlist(&[], &[]).await;
    }

    /// All that run stand in the slice, but for those that are gone; some are terminating.
    async fn enlist(&self, terminating: &[usize], gone: &[usize]) {
        let listed = self.replicas.iter().enumerate().filter(|(n, _)| !gone.contains(n));
        let pod = |(n, replica): (usize, &Slackwater)| match terminating.contains(&n) {
            true => Pod::terminating(replica.http()),
            false => Pod::ready(replica.http()),
        };
        let pods: Vec<Pod> = listed.map(pod).collect();
        self.cluster.slice("edge-a", "edge", 8080, &pods).await;
    }

    async fn set(&self, replica: usize) -> serde_json::Value {
        self.replicas[replica].status().await["upstreams"]["php"]["sets"]["blue"].clone()
    }

    /// Until each replica has so many slots of its own.
    async fn shares(&self, wanted: &[u64]) {
        eventually("each has its share", async || {
            let mut found = Vec::new();
            for n in 0..self.replicas.len() {
                found.push(self.set(n).await["share"].as_u64().unwrap_or(99));
            }
            if found == wanted { Ok(()) } else { Err(format!("{found:?}, not {wanted:?}")) }
        })
        .await;
    }
}

/// A replica whose part is of a pod that is not usable has a slot of one that is.
#[test]
fn nobody_is_left_without_a_slot_while_any_pod_is_usable() {
    netns::run(async || {
        let mut pool = Pool::start(3, 2).await;
        for _ in 0..4 {
            pool.joins().await;
        }
        pool.shares(&[2, 2, 1, 1]).await;
        // The second pod has all that the third and the fourth replica have.
        let address = pool.pods[1].tcp_address().to_string();
        for replica in &pool.replicas {
            replica.cli_ok(&["endpoint", "disable", "php", &address]).await;
        }
        for replica in &pool.replicas {
            assert_eq!(http::get(replica.http(), "/hello.php").await.unwrap().status, 200);
        }
        pool.shares(&[2, 2, 1, 1]).await;
        // What that costs is told.
        assert_eq!(pool.set(2).await["capacity"], 4);
    });
}

/// Requests at a rate, whatever becomes of those before; clients leave after two seconds. How many a second were answered after the first two seconds, and how long
/// the slowest of them took.
async fn offer(address: SocketAddr, rate: f64, seconds: f64, path: &'static str) -> (f64, Duration) {
    let (began, seen) = (Instant::now(), Arc::new(Mutex::new(Vec::new())));
    let mut clients = tokio::task::JoinSet::new();
    for n in 0..(rate * seconds) as u32 {
        tokio::time::sleep_until((began + Duration::from_secs_f64(f64::from(n) / rate)).into()).await;
        let seen = seen.clone();
        clients.spawn(async move {
            let start = Instant::now();
            let answer = tokio::time::timeout(Duration::from_secs(2), http::get(address, path)).await;
            if answer.is_ok_and(|response| response.is_ok_and(|r| r.status == 200)) {
                seen.lock().unwrap().push((began.elapsed(), start.elapsed()));
            }
        });
    }
    clients.join_all().await;
    let seen = seen.lock().unwrap();
    let counted: Vec<_> = seen.iter().filter(|(at, _)| (2.0..seconds).contains(&at.as_secs_f64())).collect();
    let slowest = counted.iter().map(|(_, took)| *took).max().unwrap_or_default();
    (counted.len() as f64 / (seconds - 2.0), slowest)
}

#[test]
fn parts_follow_who_is_there_and_one_that_is_terminating_counts_while_it_serves() {
    netns::run(async || {
        let mut pool = Pool::start(2, 4).await;
        pool.joins().await;
        pool.shares(&[8]).await;
        pool.joins().await;
        pool.shares(&[4, 4]).await;
        pool.joins().await;
        pool.shares(&[3, 3, 2]).await;
        assert_eq!(pool.set(0).await["replicas"], 3);
        // The second is gone and the third is terminating: two are left, and who is not listed counts itself as one more.
        pool.enlist(&[2], &[1]).await;
        pool.shares(&[4, 2, 4]).await;
        // Gone: the others have its part, which each of them knows by itself.
        pool.replicas.pop();
        pool.enlist(&[], &[]).await;
        pool.shares(&[4, 4]).await;
    });
}

/// Nine tenths of the load come to one of two replicas: it borrows what the other does not use, and both together do nearly what one alone would.
#[test]
fn two_replicas_loaded_ninety_to_ten_use_the_whole_pool() {
    netns::run(async || {
        const PATH: &str = "/socket.php?ms=50";
        const SECONDS: f64 = 8.0;
        let mut pool = Pool::start(2, 4).await;
        pool.joins().await;
        pool.shares(&[8]).await;
        let all = 1.5 * 8.0 / 0.05;
        let (alone, _) = offer(pool.replicas[0].http(), all, SECONDS, PATH).await;
        pool.joins().await;
        pool.shares(&[4, 4]).await;
        let [one, two] = [0, 1].map(|n| pool.replicas[n].http());
        let ((much, _), (little, slowest)) =
            tokio::join!(offer(one, all * 0.9, SECONDS, PATH), offer(two, all * 0.1, SECONDS, PATH));
        let part = (much + little) / alone;
        println!(
            "alone {alone:.0} a second; 90:10 {much:.0} and {little:.0}, {part:.2} of that; the slowest of the few took {slowest:?}"
        );
        // Promised are 0.95; without borrowing it would be 0.6.
        assert!(part > 0.85, "{part:.2}");
        assert!(little > all * 0.1 * 0.9, "the one with little load lost some of it: {little:.0} of {:.0}", all * 0.1);
    });
}

/// What was borrowed is given back when its owner wants it.
#[test]
fn what_was_borrowed_comes_back_within_a_second() {
    netns::run(async || {
        let mut pool = Pool::start(1, 4).await;
        pool.joins().await;
        pool.joins().await;
        pool.shares(&[2, 2]).await;
        let [one, two] = [0, 1].map(|n| pool.replicas[n].http());
        // Six clients of the first replica keep all four workers busy.
        let load: Vec<_> = (0..6).map(|_| tokio::spawn(async move { keep_asking(one, "/socket.php?ms=30").await })).collect();
        pool.shares(&[4, 2]).await;
        let began = Instant::now();
        let owners: Vec<_> = (0..4).map(|_| tokio::spawn(async move { keep_asking(two, "/socket.php?ms=30").await })).collect();
        eventually("it is given back", async || match pool.set(0).await["share"].as_u64() {
            Some(2) => Ok(()),
            other => Err(format!("{other:?} slots")),
        })
        .await;
        println!("given back after {:?}; promised within a second", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(10));
        for client in load.into_iter().chain(owners) {
            client.abort();
        }
    });
}

async fn keep_asking(address: SocketAddr, path: &str) {
    let mut client = Connection::<TcpStream>::open(address).await.unwrap();
    while client.get(path).await.is_ok() {}
}

/// More replicas than workers: each has one slot, none keeps a connection, and everybody is served.
#[test]
fn six_replicas_before_four_workers_starve_nobody() {
    netns::run(async || {
        const CLIENTS: usize = 18;
        let mut pool = Pool::start(1, 4).await;
        for _ in 0..6 {
            pool.joins().await;
        }
        pool.shares(&[1; 6]).await;
        // With five it would be one slot each as well.
        for replica in 0..6 {
            eventually("it knows all six", async || match pool.set(replica).await["replicas"].as_u64() {
                Some(6) => Ok(()),
                other => Err(format!("{other:?}")),
            })
            .await;
        }
        assert_eq!(pool.set(3).await["oversubscribed"], 2);
        let answered: Arc<Vec<AtomicUsize>> = Arc::new((0..CLIENTS).map(|_| AtomicUsize::new(0)).collect());
        let slowest = Arc::new(Mutex::new(Duration::ZERO));
        let clients: Vec<_> = (0..CLIENTS)
            .map(|n| {
                let (address, answered, slowest) = (pool.replicas[n % 6].http(), answered.clone(), slowest.clone());
                tokio::spawn(async move {
                    let mut client = Connection::<TcpStream>::open(address).await.unwrap();
                    loop {
                        let start = Instant::now();
                        let response = client.get("/socket.php?ms=20").await.unwrap();
                        assert_eq!(response.status, 200);
                        let mut slowest = slowest.lock().unwrap();
                        *slowest = start.elapsed().max(*slowest);
                        answered[n].fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        eventually("everybody has had twenty answers", async || {
            let counts: Vec<_> = answered.iter().map(|n| n.load(Ordering::Relaxed)).collect();
            if counts.iter().all(|n| *n >= 20) { Ok(()) } else { Err(format!("{counts:?}")) }
        })
        .await;
        for replica in 0..6 {
            assert_eq!(pool.set(replica).await["endpoints"][0]["parked"], 0, "a lease where others wait for a worker");
        }
        for client in &clients {
            assert!(!client.is_finished(), "a client was not answered");
            client.abort();
        }
        println!(
            "the slowest of {} requests took {:?}",
            answered.iter().map(|n| n.load(Ordering::Relaxed)).sum::<usize>(),
            slowest.lock().unwrap()
        );
        assert!(*slowest.lock().unwrap() < Duration::from_secs(5));
    });
}
