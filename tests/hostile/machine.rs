//! A machine that has run out of things, and an operator whose hand shakes.

use std::time::Duration;

use crate::{
    case::{PATIENCE, toml},
    support::{
        cgroup::MemoryLimit,
        clock::{FakeClock, days},
        gate::{Gate, eventually, within},
        h2wire::{self, Verdict, Wire},
        http::{self, Connection},
        hung::HungThread,
        process::{Slackwater, Wait},
        scripted_fpm::{Behaviour, ScriptedFpm},
        usage::{Usage, allow_descriptors, first_free_descriptor},
    },
};

/// No descriptor for a connection to FPM: 503, no pod is blamed, and it goes on when there are some again.
#[tokio::test(flavor = "multi_thread")]
async fn without_descriptors_no_pod_is_to_blame() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), "", "keepalive = \"off\"")).await;
    let mut client = Connection::open(proxy.http()).await.unwrap();
    assert_eq!(client.get("/a.php").await.unwrap().status, 200);
    let before = allow_descriptors(proxy.pid(), first_free_descriptor(proxy.pid()));
    let mut refused = 0;
    while refused < 5 {
        let answer = within(PATIENCE, "a refusal", client.get("/a.php")).await.unwrap();
        if answer.status == 200 {
            // What it had just closed is free again.
            allow_descriptors(proxy.pid(), first_free_descriptor(proxy.pid()));
            continue;
        }
        assert_eq!(answer.status, 503);
        assert!(answer.header("Retry-After").is_some());
        refused += 1;
    }
    allow_descriptors(proxy.pid(), before);
    assert_eq!(within(PATIENCE, "an answer", client.get("/a.php")).await.unwrap().status, 200);
    assert!(proxy.log_text().contains("local_limit"), "{}", proxy.log_text());
    let endpoint = &proxy.status().await["upstreams"]["php"]["sets"]["blue"]["endpoints"][0];
    assert_eq!(endpoint["state"], "usable", "{endpoint}");
    assert!(!proxy.log_text().contains("ejected"), "{}", proxy.log_text());
}

/// No descriptor for a client: it waits in the kernel, the log says why, not too often, and it is served when there are some again.
#[tokio::test(flavor = "multi_thread")]
async fn without_descriptors_clients_wait_and_are_served_later() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), "", "")).await;
    // Stays open: a descriptor that it gave back would let one client in, and none of that one's to FPM.
    let mut first = Connection::open(proxy.http()).await.unwrap();
    assert_eq!(first.get("/a.php").await.unwrap().status, 200);
    let skip = proxy.log().len();
    let before = allow_descriptors(proxy.pid(), first_free_descriptor(proxy.pid()));
    let address = proxy.http();
    let waiting: Vec<_> = (0..20).map(|_| tokio::spawn(async move { http::get(address, "/a.php").await })).collect();
    let line = proxy.wait_for_log_after(skip, "accept", PATIENCE).await;
    assert!(line.contains("Too many open files") || line.contains("os error 24"), "{line}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let lines = proxy.log().len() - skip;
    assert!(lines < 10, "{lines} lines in a second");
    allow_descriptors(proxy.pid(), before);
    for client in waiting {
        let answer = within(PATIENCE, "an answer", client).await.unwrap();
        assert_eq!(answer.map(|answer| answer.status).ok(), Some(200));
    }
}

/// However often it is asked to reload, and whatever stands in the file meanwhile: nothing grows and nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_reloads_take_no_memory_no_descriptor_and_no_thread() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let config = toml(&fpm.address().to_string(), "", "workers_per_endpoint = 4");
    let other = config.replace("workers_per_endpoint = 4", "workers_per_endpoint = 5");
    let proxy = Slackwater::start(&config).await;
    let reload = async |config: &str| {
        proxy.rewrite(config);
        let mut admin = Connection::open_unix(proxy.admin()).await.unwrap();
        let answer =
            within(PATIENCE, "the reload", admin.exchange("POST", &http::request("POST", "/reload", &[], b""))).await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(http::get(proxy.http(), "/a.php").await.unwrap().status, 200);
    };
    for _ in 0..50 {
        reload(&other).await;
        reload(&config).await;
    }
    let before = Usage::of(proxy.pid());
    for _ in 0..450 {
        reload(&other).await;
        reload(&config).await;
    }
    let after = Usage::of(proxy.pid());
    println!("900 more reloads: {before:?}, then {after:?}");
    assert!(after.rss < before.rss + (8 << 20), "{} more bytes", after.rss - before.rss);
    assert!(after.descriptors <= before.descriptors + 2 && after.threads <= before.threads + 1, "{before:?}, then {after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_hangups_ends_in_the_last_configuration() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let config = toml(&fpm.address().to_string(), "", "workers_per_endpoint = 4");
    let proxy = Slackwater::start(&config).await;
    let address = proxy.http();
    let load = tokio::spawn(async move {
        let mut client = Connection::open(address).await.unwrap();
        for _ in 0..300 {
            assert_eq!(client.get("/a.php").await.unwrap().status, 200);
        }
    });
    for nth in 0..200 {
        proxy.rewrite(&config.replace("workers_per_endpoint = 4", &format!("workers_per_endpoint = {}", 5 + nth)));
        proxy.signal(libc::SIGHUP);
    }
    eventually("the last one is in force", async || {
        let endpoint = proxy.status().await["upstreams"]["php"]["sets"]["blue"]["endpoints"][0].clone();
        if endpoint["capacity"] == 204 { Ok(()) } else { Err(endpoint.to_string()) }
    })
    .await;
    load.await.unwrap();
}

/// A hangup while it leaves neither brings it back nor ends it early.
#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_during_the_drain_changes_nothing() {
    let gate = Gate::closed();
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&gate)).await;
    let config = toml(&fpm.address().to_string(), "", "workers_per_endpoint = 4")
        + "[drain]\ngrace = \"20s\"\nlame_duck = \"0s\"\nmargin = \"1s\"\n";
    let mut proxy = Slackwater::start(&config).await;
    let address = proxy.http();
    let held = tokio::spawn(async move { http::get(address, "/held.php").await });
    fpm.wait_begun(1).await;
    proxy.terminate();
    proxy.wait_for_log("Draining", PATIENCE).await;
    for _ in 0..20 {
        proxy.signal(libc::SIGHUP);
    }
    proxy.wait_for_log("reload refused", PATIENCE).await;
    assert!(proxy.is_running());
    gate.open();
    assert_eq!(held.await.unwrap().unwrap().status, 200);
    assert_eq!(proxy.wait_exit(PATIENCE).await, 0);
}

/// Nobody is there yet, and it is told to go.
#[tokio::test(flavor = "multi_thread")]
async fn terminated_before_it_was_ready_it_ends_at_once_and_well() {
    let nobody = crate::support::ports::free_address();
    let config = toml(&nobody.to_string(), "", "workers_per_endpoint = 4")
        .replace("[upstream.php.set.blue]", "[upstream.php.set.blue]\nping = \"/ping\"")
        + "[drain]\ngrace = \"20s\"\nlame_duck = \"5s\"\nmargin = \"1s\"\n";
    let mut proxy = Slackwater::builder(&config).wait(Wait::Live).start().await;
    proxy.terminate();
    let began = std::time::Instant::now();
    assert_eq!(proxy.wait_exit(PATIENCE).await, 0);
    println!("ended {:?} after SIGTERM", began.elapsed());
}

/// All places are taken by clients that want nothing: the longest idle ones go, and whoever asks is answered. A load balancer's connections stay, for it may be
/// sending on one at the same moment.
#[tokio::test(flavor = "multi_thread")]
async fn idle_clients_make_room_and_a_load_balancers_connections_stay() {
    for (trusted, makes_room) in [("", true), ("trusted_proxies = [\"127.0.0.0/8\"]", false)] {
        let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
        let listen = format!("max_connections = 6\nidle_timeout = \"10m\"\n{trusted}");
        let proxy = Slackwater::start(&toml(&fpm.address().to_string(), &listen, "")).await;
        // Three that have said nothing, two that have had their answer, and one that speaks HTTP/2.
        let mut silent = Vec::new();
        let mut served = Vec::new();
        for _ in 0..3 {
            silent.push(Connection::open(proxy.http()).await.unwrap());
        }
        for _ in 0..2 {
            let mut client = Connection::open(proxy.http()).await.unwrap();
            assert_eq!(client.get("/a.php").await.unwrap().status, 200);
            served.push(client);
        }
        let mut wire = Wire::open(proxy.http(), &[]).await;
        wire.send(&h2wire::get(1, "/a.php")).await;
        assert_eq!(wire.verdict(1).await, Verdict::Answered(0x88));
        let address = proxy.http();
        let newcomer = tokio::spawn(async move { http::get(address, "/a.php").await });
        proxy.wait_for_log("max_connections reached", PATIENCE).await;
        if makes_room {
            let began = std::time::Instant::now();
            assert_eq!(within(PATIENCE, "an answer", newcomer).await.unwrap().unwrap().status, 200);
            println!("a newcomer was served {:?} after all places were seen to be taken", began.elapsed());
            let closed = proxy.metric(&["slackwater_shed_total", "idle_connection"]).await.unwrap();
            assert!((1.0..=6.0).contains(&closed), "{closed}");
        } else {
            // As long as the others would have had to wait, ten times over.
            tokio::time::sleep(Duration::from_secs(2)).await;
            assert_eq!(proxy.metric(&["slackwater_shed_total", "idle_connection"]).await, Some(0.0));
            assert!(!newcomer.is_finished());
            for client in &mut served {
                assert_eq!(client.get("/a.php").await.unwrap().status, 200);
            }
            drop(silent.pop());
            assert_eq!(within(PATIENCE, "an answer", newcomer).await.unwrap().unwrap().status, 200);
        }
    }
}

/// A worker's thread that does not come back from a call: `/livez` says which one, so that the kubelet starts the container anew; it takes that back when
/// the worker does. The others go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_hangs_fails_livez() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let config = toml(&fpm.address().to_string(), "", "").replace("workers = 1", "workers = 2");
    let proxy = Slackwater::start(&config).await;
    assert_eq!(http::get(proxy.ops(), "/livez").await.unwrap().status, 200);
    let mut hung = HungThread::of(proxy.pid(), "worker-1").await;
    let began = std::time::Instant::now();
    let said = eventually("/livez says so", async || match http::get(proxy.ops(), "/livez").await.unwrap() {
        answer if answer.status == 503 => Ok(answer.text()),
        answer => Err(answer.text()),
    })
    .await;
    println!("/livez failed {:?} after the worker hung (promised: after 5 s)", began.elapsed());
    assert_eq!(said, "no sign of life from workers [1] for 5 s\n");
    proxy.wait_for_log("no sign of life from workers for 5 s", PATIENCE).await;
    assert!(proxy.cli_ok(&["status"]).await.contains("NO SIGN OF LIFE for 5 s from workers [1]"));
    let mut client = Connection::open(proxy.http()).await.unwrap();
    // The worker with the fewest connections is the first one of those that have none.
    assert_eq!(within(PATIENCE, "an answer of the other worker", client.get("/a.php")).await.unwrap().status, 200);
    hung.let_go().await;
    eventually("/livez takes it back", async || match http::get(proxy.ops(), "/livez").await.unwrap() {
        answer if answer.status == 200 => Ok(()),
        answer => Err(answer.text()),
    })
    .await;
    proxy.wait_for_log("give signs of life again", PATIENCE).await;
}

/// The machine's time jumps a year ahead and then two back, while a request runs, one waits in the queue and a swap drains: no deadline moves.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_moves_no_deadline() {
    let (blue_gate, green_gate) = (Gate::closed(), Gate::closed());
    let blue = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&blue_gate)).await;
    let green = ScriptedFpm::start(Behaviour::hello("green").holds_answer(&green_gate)).await;
    let upstream = "active = \"blue\"\nworkers_per_endpoint = 1\nqueue = { timeout = \"20s\" }";
    let config = toml(&blue.address().to_string(), "", upstream)
        .replace("[[site]]", &format!("[upstream.php.set.green]\nendpoints = [\"{}\"]\n[[site]]", green.address()));
    let clock = FakeClock::new();
    let proxy = clock.env(Slackwater::builder(&config)).start().await;
    let address = proxy.http();
    let get = |path: &'static str| tokio::spawn(async move { http::get(address, path).await });
    let held = get("/held.php");
    blue.wait_begun(1).await;
    proxy.cli_ok(&["swap", "php", "green"]).await;
    let on_green = get("/green.php");
    green.wait_begun(1).await;
    let queued = get("/queued.php");
    eventually("it waits", async || match proxy.metric(&["slackwater_upstream_queue_depth"]).await {
        Some(1.0) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    let today = async || {
        let lines = proxy.log().len();
        assert_eq!(http::get(proxy.http(), "/%00").await.unwrap().status, 400);
        let line = proxy.wait_for_log_after(lines, "%00", PATIENCE).await;
        let entry: serde_json::Value = serde_json::from_str(&line).unwrap();
        days(entry["time"].as_str().expect("a time"))
    };
    let now = today().await;
    for (jump, difference) in [("+366d", 366.0), ("-731d", -731.0)] {
        clock.jump(jump);
        let then = eventually("the process sees another time", async || match today().await - now {
            days if (days - difference).abs() < 4.0 => Ok(days),
            days => Err(format!("{days} days")),
        })
        .await;
        println!("the clock has jumped by {then:.0} days");
        // Time enough for what would have been due.
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!held.is_finished() && !on_green.is_finished() && !queued.is_finished(), "{}", proxy.log_text());
        assert_eq!(http::get(proxy.ops(), "/livez").await.unwrap().status, 200);
    }
    blue_gate.open();
    green_gate.open();
    for request in [held, on_green, queued] {
        assert_eq!(within(PATIENCE, "an answer", request).await.unwrap().unwrap().status, 200);
    }
    let receipt = eventually("the swap's receipt", async || {
        let status = proxy.status().await;
        status["drains"].as_array().and_then(|all| all.first().cloned()).ok_or_else(|| status["drains"].to_string())
    })
    .await;
    assert!((0.0..60.0).contains(&receipt["seconds"].as_f64().unwrap()), "{receipt}");
}

/// Told to go while a swap still drains: what runs on the old set is finished, who waits for the swap is told how it ended, and both receipts are there.
#[tokio::test(flavor = "multi_thread")]
async fn terminated_during_a_swap_both_come_to_their_end() {
    let gate = Gate::closed();
    let blue = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&gate)).await;
    let green = ScriptedFpm::start(Behaviour::hello("green")).await;
    let config = toml(&blue.address().to_string(), "", "active = \"blue\"\nworkers_per_endpoint = 4")
        .replace("[[site]]", &format!("[upstream.php.set.green]\nendpoints = [\"{}\"]\n[[site]]", green.address()))
        + "[drain]\ngrace = \"30s\"\nlame_duck = \"0s\"\nmargin = \"1s\"\n";
    let mut proxy = Slackwater::start(&config).await;
    let address = proxy.http();
    let held = tokio::spawn(async move { http::get(address, "/held.php").await });
    blue.wait_begun(1).await;
    let mut swap = Connection::open_unix(proxy.admin()).await.unwrap();
    let order = br#"{"upstream":"php","set":"green","wait":true,"timeout_seconds":25}"#;
    swap.send(http::request("POST", "/swap", &[("Content-Length", &order.len().to_string())], order)).await.unwrap();
    eventually("it has turned", async || match proxy.status().await["upstreams"]["php"]["active"].clone() {
        active if active == "green" => Ok(()),
        active => Err(active.to_string()),
    })
    .await;
    proxy.terminate();
    proxy.wait_for_log("Draining", PATIENCE).await;
    gate.open();
    assert_eq!(held.await.unwrap().unwrap().text(), "blue hello\n");
    let told = within(PATIENCE, "the swap's outcome", swap.read_response("POST")).await.expect("an answer before the process ends");
    assert_eq!(told.json()["ok"], true, "{}", told.text());
    assert_eq!(told.json()["receipt"]["cut"].as_array().map(Vec::len), Some(0), "{}", told.text());
    assert_eq!(proxy.wait_exit(PATIENCE).await, 0);
    assert!(proxy.log_text().contains("drained"), "{}", proxy.log_text());
}

/// Clients that ask for much and read nothing, on both versions of HTTP, and such that send much: beyond `buffer.total` they get 503 or wait, and the
/// process is not killed for want of memory.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the round of `tests/long memory`: wants root and a memory controller"]
async fn long_memory() {
    const LIMIT: u64 = 384 << 20;
    let page = Behaviour::answers(200, &[("Content-Type", "text/plain")], vec![b'x'; 120_000]);
    let fpm = ScriptedFpm::start(page).await;
    let listen = "max_connections = 20000\nstall_timeout = \"20s\"";
    let config = toml(&fpm.address().to_string(), listen, "workers_per_endpoint = 64\nqueue = { max = 5000, timeout = \"20s\" }")
        + "[buffer]\ntotal = \"64MiB\"\n";
    let group = MemoryLimit::new(LIMIT);
    let mut proxy = Slackwater::builder(&config).start().await;
    group.add(proxy.pid());
    // In each of these memory that nobody takes back: the kernel's buffers are not the process's, so they are small.
    let mut readers = Vec::new();
    for _ in 0..1500 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut client = Connection::over(socket.connect(proxy.http()).await.unwrap());
        client.send(http::request("GET", "/a.php", &[], b"")).await.unwrap();
        readers.push(client);
    }
    let mut wires = Vec::new();
    for _ in 0..45 {
        // No window: h2 keeps what it is given.
        let mut wire = Wire::open(proxy.http(), &[(4, 0)]).await;
        for n in 0..128_u32 {
            wire.send(&h2wire::get(2 * n + 1, "/a.php")).await;
        }
        wires.push(wire);
    }
    let mut senders = Vec::new();
    for _ in 0..300 {
        let mut client = Connection::open(proxy.http()).await.unwrap();
        let head = http::request("POST", "/a.php", &[("Content-Length", "2000000")], b"");
        client.send([head, vec![7; 900_000]].concat()).await.unwrap();
        senders.push(client);
    }
    let mut most = 0;
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        most = most.max(Usage::of(proxy.pid()).rss);
    }
    assert!(proxy.is_running(), "killed: {}", proxy.log_text().lines().last().unwrap_or_default());
    println!(
        "1,500 readers, 45 times 128 streams and 300 senders of 1.4 GB in all, 64 MiB of buffers: {} MiB resident at most, {} MiB with the kernel's, of {} MiB",
        most >> 20,
        group.peak() >> 20,
        LIMIT >> 20
    );
    drop((readers, wires, senders));
    eventually("there is room again", async || match http::get(proxy.http(), "/after.php").await {
        Ok(answer) if answer.status == 200 => Ok(()),
        other => Err(format!("{:?}", other.map(|answer| answer.status))),
    })
    .await;
    assert!(most < LIMIT, "{most} bytes");
}
