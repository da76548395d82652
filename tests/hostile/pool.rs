//! After everything that clients can do wrong a real pool of four workers is free.

use std::time::{Duration, Instant};

use crate::{
    case::{PATIENCE, toml},
    framing,
    support::{
        gate::{eventually, within},
        h2wire::{RST_STREAM, Wire, frame, get},
        http::{self, Connection},
        process::Slackwater,
        real_fpm::RealFpm,
    },
};

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_of_four_is_free_again_after_the_whole_attack() {
    let fpm = RealFpm::builder("blue").workers(4).status_listen().start().await;
    let listen = "header_timeout = \"2s\"\nstall_timeout = \"2s\"\nidle_timeout = \"5s\"";
    let config = toml(&fpm.tcp_address().to_string(), listen, "").replace("/app", &fpm.docroot().display().to_string());
    let proxy = Slackwater::start(&config).await;
    let mut clients = Vec::new();
    for case in framing::cases() {
        // Sent to a script that works, and left as it is: nobody reads an answer, half of them are reset.
        let send = String::from_utf8_lossy(&case.send).replace("/a.php", "/hello.php").into_bytes();
        let mut client = Connection::open(proxy.http()).await.unwrap();
        let _ = tokio::time::timeout(Duration::from_secs(2), client.send(&send)).await;
        if clients.len() % 2 == 0 {
            client.reset();
        } else {
            clients.push(client);
        }
    }
    // Slow scripts, large answers and uploads, begun and left.
    for nth in 0..40 {
        let mut client = Connection::open(proxy.http()).await.unwrap();
        let target = ["/socket.php?ms=200", "/big.php?bytes=20000000", "/hello.php"][nth % 3];
        client.send(&http::request("GET", target, &[], b"")).await.unwrap();
        client.reset();
    }
    let mut wire = Wire::open(proxy.http(), &[]).await;
    for n in 0..500_u32 {
        let stream = 2 * n + 1;
        if !wire.send(&[get(stream, "/socket.php?ms=100"), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()).await {
            break;
        }
    }
    let asked = Instant::now();
    let answer = within(PATIENCE, "an answer of PHP", http::get(proxy.http(), "/hello.php")).await.unwrap();
    let took = asked.elapsed();
    assert_eq!(answer.status, 200);
    // Promised: a second.
    assert!(took < Duration::from_secs(10), "{took:?}");
    println!("PHP answered {took:?} after {} clients and 500 streams", framing::cases().len() + 41);
    drop((clients, wire));
    eventually("every slot is given back", async || {
        let set = proxy.status().await["upstreams"]["php"]["sets"]["blue"].clone();
        let busy: u64 = set["endpoints"].as_array().unwrap().iter().filter_map(|endpoint| endpoint["busy"].as_u64()).sum();
        if busy == 0 && proxy.status().await["upstreams"]["php"]["waiting"].as_u64().unwrap_or(0) == 0 {
            Ok(())
        } else {
            Err(set.to_string())
        }
    })
    .await;
    let status = fpm.status().await.unwrap();
    let at_work = status["processes"].as_array().unwrap().iter().filter(|process| process["state"] == "Running").count();
    assert!(at_work <= 1, "{status}");
}
