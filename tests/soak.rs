//! One process for an hour: mixed load, swaps, reloads, pods that are killed and clients that leave. Nothing is lost, and nothing grows.

mod support;

use std::time::{Duration, Instant};

use support::{
    gate::eventually,
    http::{self, Connection},
    ledger::{Expect, LedgerClient, Shape},
    process::Slackwater,
    real_fpm::RealFpm,
    usage::Usage,
};

/// Between two of an operator's or a cluster's deeds.
const PAUSE: Duration = Duration::from_secs(5);
/// What it takes once: from the fifth part of the hour on nothing may grow.
const WARM_UP: u32 = 5;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the hour of `tests/long soak`"]
async fn long_soak() {
    let minutes: u64 = std::env::var("SOAK_MINUTES").map_or(60, |minutes| minutes.parse().expect("SOAK_MINUTES: a number"));
    let hour = Duration::from_secs(60 * minutes);
    let mut pools = [RealFpm::builder("blue").workers(4).start().await, RealFpm::builder("green").workers(4).start().await];
    let root = pools[0].docroot().display().to_string();
    let config = format!(
        "workers = 2\n[upstream.php]\nactive = \"blue\"\nworkers_per_endpoint = 4\n\
         [upstream.php.set.blue]\nendpoints = [\"{}\"]\n[upstream.php.set.green]\nendpoints = [\"{}\"]\n\
         [[site]]\nphp_root = \"{root}\"\nupstream = \"php\"\nscripts = [\"/*.php\"]\n",
        pools[0].tcp_address(),
        pools[1].tcp_address()
    );
    let proxy = Slackwater::start(&config).await;
    let mut shapes = Shape::mix();
    shapes.push(Shape::get("/big.php?bytes=1000000", Expect::Pattern(1_000_000)));
    let client = LedgerClient::builder(proxy.http()).connections(16).shapes(shapes).pause(Duration::from_millis(60)).start();
    let ledger = client.ledger().clone();
    ledger.wait_entries(50).await;

    let began = Instant::now();
    let (mut turns, mut left, mut samples) = (0_usize, 0_usize, Vec::new());
    while began.elapsed() < hour {
        let (to, set) = [(1, "green"), (0, "blue")][turns % 2];
        // A pod that nobody uses is killed, comes back, and is turned to.
        pools[to].kill();
        pools[to].restart().await;
        tokio::time::sleep(PAUSE).await;
        let since = {
            proxy.cli_ok(&["swap", "php", set, "--wait", "--timeout", "30s"]).await;
            tokio::time::Instant::now()
        };
        proxy.rewrite(&format!("{config}\n[site.params]\nTURN = \"{turns}\"\n"));
        assert!(proxy.cli_ok(&["reload"]).await.contains("applied"));
        // Clients that ask and leave, at every point of an answer.
        for nth in 0..20 {
            let mut client = Connection::open(proxy.http()).await.expect("it listens");
            let target = ["/hello.php", "/big.php?bytes=3000000", "/socket.php?ms=50"][nth % 3];
            client.send(&http::request("GET", target, &[], b"")).await.expect("it is taken");
            tokio::time::sleep(Duration::from_millis(nth as u64)).await;
            client.reset();
            left += 1;
        }
        tokio::time::sleep(PAUSE).await;
        let wrong = ledger.wrong_colour_since(since, set);
        assert!(wrong.is_empty(), "after the swap to {set}: {wrong:?}");
        samples.push((began.elapsed(), Usage::of(proxy.pid())));
        turns += 1;
    }
    let ledger = client.stop().await;
    eventually("every slot is given back", async || {
        let status = proxy.status().await;
        let sets = status["upstreams"]["php"]["sets"].clone();
        let endpoints = ["blue", "green"].map(|set| sets[set]["endpoints"][0]["busy"].as_u64().unwrap_or(1));
        if endpoints == [0, 0] { Ok(()) } else { Err(sets.to_string()) }
    })
    .await;
    let summary = ledger.summary();
    print!("{summary}");
    println!("{turns} swaps, reloads and killed pods, {left} clients that left");
    let (warm, rest): (Vec<_>, Vec<_>) = samples.iter().partition(|(at, _)| *at < hour / WARM_UP);
    let most = |part: &[&(Duration, Usage)]| {
        let of = |what: fn(&Usage) -> u64| part.iter().map(|(_, usage)| what(usage)).max().unwrap_or_default();
        (of(|usage| usage.rss), of(|usage| usage.descriptors as u64), of(|usage| usage.threads as u64))
    };
    let (before, after) = (most(&warm), most(&rest));
    println!("at most, in the first fifth: {} KiB, {} descriptors, {} threads", before.0 >> 10, before.1, before.2);
    println!("at most, after that: {} KiB, {} descriptors, {} threads", after.0 >> 10, after.1, after.2);
    ledger.assert_clean();
    assert!(after.0 < before.0 + before.0 / 10 + (4 << 20), "memory has grown: {samples:?}");
    assert!(after.1 <= before.1 + 16 && after.2 <= before.2 + 2, "descriptors or threads have grown: {samples:?}");
}
