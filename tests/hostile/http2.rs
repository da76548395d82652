//! HTTP/2 as no well-meaning client speaks it (RFC 9113 and the advisories since).

use std::time::{Duration, Instant};

use crate::{
    case::{PATIENCE, toml},
    support::{
        gate::{Gate, eventually, within},
        h2wire::{
            ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, Verdict, WINDOW_UPDATE,
            Wire, block, frame, get, integer, request, text,
        },
        http,
        process::Slackwater,
        scripted_fpm::{Behaviour, ScriptedFpm},
        usage::Usage,
    },
};

const OK: Verdict = Verdict::Answered(0x88);

async fn start(fpm: &ScriptedFpm, listen: &str) -> Slackwater {
    Slackwater::start(&toml(&fpm.address().to_string(), listen, "workers_per_endpoint = 8")).await
}

async fn still_answers(proxy: &Slackwater) {
    let answer = within(PATIENCE, "an answer to the next client", http::get(proxy.http(), "/after.php")).await;
    assert_eq!(answer.unwrap().status, 200);
}

/// A request's fields, these instead of those that are named, and these besides.
fn with(replaced: &[(&'static str, Option<&'static str>)], added: &[(&'static [u8], &'static [u8])]) -> Vec<u8> {
    let usual = [(":method", "GET"), (":scheme", "http"), (":path", "/a.php"), (":authority", "example.com")];
    let mut fields: Vec<(&[u8], &[u8])> = Vec::new();
    for (name, value) in usual {
        match replaced.iter().find(|(replaced, _)| *replaced == name) {
            Some((_, None)) => {}
            Some((_, Some(other))) => fields.push((name.as_bytes(), other.as_bytes())),
            None => fields.push((name.as_bytes(), value.as_bytes())),
        }
    }
    fields.extend_from_slice(added);
    block(&fields)
}

/// RFC 9113, sections 8.1 to 8.3: what makes a request malformed never reaches PHP.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_malformed_is_refused_and_not_run() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = start(&fpm, "").await;
    let whole = END_STREAM | END_HEADERS;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("CR in a value", with(&[], &[(b"x-a", b"b\rc")])),
        ("LF in a value", with(&[], &[(b"x-a", b"b\nc")])),
        ("NUL in a value", with(&[], &[(b"x-a", b"b\0c")])),
        ("CRLF and a header in a value", with(&[], &[(b"x-a", b"b\r\nx-b: c")])),
        ("a name in upper case", with(&[], &[(b"X-A", b"b")])),
        ("a name with a space", with(&[], &[(b"x a", b"b")])),
        ("a name with a colon", with(&[], &[(b"x:a", b"b")])),
        ("a name with CRLF", with(&[], &[(b"x\r\na", b"b")])),
        ("an empty name", with(&[], &[(b"", b"b")])),
        ("connection", with(&[], &[(b"connection", b"close")])),
        ("transfer-encoding", with(&[], &[(b"transfer-encoding", b"chunked")])),
        ("upgrade", with(&[], &[(b"upgrade", b"websocket")])),
        ("keep-alive", with(&[], &[(b"keep-alive", b"1")])),
        ("proxy-connection", with(&[], &[(b"proxy-connection", b"close")])),
        ("te: gzip", with(&[], &[(b"te", b"gzip")])),
        (":method twice", with(&[], &[(b":method", b"POST")])),
        (":path twice", with(&[], &[(b":path", b"/b.php")])),
        (":status", with(&[], &[(b":status", b"200")])),
        ("an unknown pseudo-header", with(&[], &[(b":evil", b"1")])),
        (
            "a pseudo-header behind a header",
            block(&[
                (b":method", b"GET"),
                (b":scheme", b"http"),
                (b"x-a", b"b"),
                (b":path", b"/a.php"),
                (b":authority", b"example.com"),
            ]),
        ),
        ("no :method", with(&[(":method", None)], &[])),
        ("no :scheme", with(&[(":scheme", None)], &[])),
        ("no :path", with(&[(":path", None)], &[])),
        ("an empty :path", with(&[(":path", Some(""))], &[])),
        ("content-length beside the end of the stream", with(&[(":method", Some("POST"))], &[(b"content-length", b"3")])),
        ("two content-lengths", with(&[(":method", Some("POST"))], &[(b"content-length", b"0"), (b"content-length", b"1")])),
        ("a block cut short", request("GET", "/a.php")[..20].to_vec()),
        ("an index that nobody has set", vec![0xff, 0xff, 0x7f]),
        ("a table size beyond what was agreed", [vec![0x3f, 0xe1, 0xff, 0x7f], request("GET", "/a.php")].concat()),
    ];
    for (name, headers) in &cases {
        let mut wire = Wire::open(proxy.http(), &[]).await;
        wire.send(&frame(HEADERS, whole, 1, headers)).await;
        let verdict = wire.verdict(1).await;
        // 400 (0x8c) is an answer too.
        assert!(verdict.is_refusal() || verdict == Verdict::Answered(0x8c), "{name}: {verdict:?}");
    }
    // Whose authority and host differ, and a target that is none: refused as on HTTP/1.1.
    for (name, headers) in [
        (":authority and host differ", with(&[], &[(b"host", b"evil.example")])),
        (":path without a slash", with(&[(":path", Some("a.php"))], &[])),
        ("a name and a password in :authority", with(&[(":authority", Some("a:b@example.com"))], &[])),
    ] {
        let mut wire = Wire::open(proxy.http(), &[]).await;
        wire.send(&frame(HEADERS, whole, 1, &headers)).await;
        let verdict = wire.verdict(1).await;
        assert!(verdict == Verdict::Answered(0x8c) || verdict.is_refusal(), "{name}: {verdict:?}");
    }
    // Data that does not fit what was told.
    for (name, data) in [("more than content-length", &b"abcd"[..]), ("less than content-length", b"ab")] {
        let mut wire = Wire::open(proxy.http(), &[]).await;
        let head = with(&[(":method", Some("POST"))], &[(b"content-length", b"3")]);
        wire.send(&[frame(HEADERS, END_HEADERS, 1, &head), frame(DATA, END_STREAM, 1, data)].concat()).await;
        let verdict = wire.verdict(1).await;
        assert!(verdict.is_refusal() || verdict == Verdict::Answered(0x8c), "{name}: {verdict:?}");
    }
    assert_eq!(fpm.requests().iter().map(|request| request.uri()).collect::<Vec<_>>(), Vec::<String>::new());
    still_answers(&proxy).await;
    println!("{} malformed requests", cases.len() + 5);
}

/// Begins 5,000 requests, each with this frame behind it: the connection ends before that costs much.
async fn begun_and_undone(undo: impl Fn(u32) -> Vec<u8>) {
    let gate = Gate::closed();
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&gate)).await;
    let proxy = start(&fpm, "").await;
    let mut wire = Wire::open(proxy.http(), &[]).await;
    let mut sent = 0;
    for n in 0..5000_u32 {
        let stream = 2 * n + 1;
        if !wire.send(&[get(stream, "/a.php"), undo(stream)].concat()).await {
            break;
        }
        sent += 1;
        tokio::task::yield_now().await;
    }
    let verdict = wire.verdict(0).await;
    assert!(matches!(verdict, Verdict::GoAway(_) | Verdict::Closed), "{verdict:?} after {sent}");
    let ran = fpm.requests().len();
    assert!(ran <= 8, "{ran} were run by eight workers");
    gate.open();
    still_answers(&proxy).await;
    println!("{sent} of 5,000 were taken, {ran} run");
}

/// CVE-2023-44487: each may cost a run of PHP.
#[tokio::test(flavor = "multi_thread")]
async fn a_rapid_reset_ends_the_connection_before_it_costs_much() {
    begun_and_undone(|stream| frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())).await;
}

/// CVE-2025-8671: the client has the server take its own streams back. A window that grows by nothing is the stream's error (RFC 9113, section 6.9).
#[tokio::test(flavor = "multi_thread")]
async fn made_you_reset_ends_the_connection() {
    begun_and_undone(|stream| frame(WINDOW_UPDATE, 0, stream, &[0; 4])).await;
}

/// The same at the pace of a client that waits until each of its requests runs: only the count of what was taken back tells.
#[tokio::test(flavor = "multi_thread")]
async fn a_patient_reset_ends_the_connection_too_and_is_counted() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").stalls_before_headers()).await;
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), "", "read_timeout = \"1s\"\nkeepalive = \"off\"")).await;
    let mut wire = Wire::open(proxy.http(), &[]).await;
    let mut begun = 0;
    for n in 0..400_u32 {
        let stream = 2 * n + 1;
        if !wire.send(&get(stream, "/a.php")).await {
            break;
        }
        let seen = tokio::time::timeout(Duration::from_secs(5), fpm.wait_begun(n as usize + 1)).await;
        if seen.is_err() {
            break;
        }
        begun = n + 1;
        wire.send(&frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())).await;
    }
    assert!((100..400).contains(&begun), "{begun} were begun");
    let cause = ["slackwater_errors_total", "taken_back"];
    eventually("it is counted", async || match proxy.metric(&cause).await {
        Some(count) if count >= 1.0 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    fpm.set(Behaviour::hello("blue"));
    still_answers(&proxy).await;
    println!("{begun} begun and taken back, then closed");
}

/// VU#421644: a head that never ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_continuation_ends_the_connection_and_takes_no_memory() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = start(&fpm, "").await;
    let before = Usage::of(proxy.pid());
    let mut wire = Wire::open(proxy.http(), &[]).await;
    wire.send(&frame(HEADERS, END_STREAM, 1, &request("GET", "/a.php"))).await;
    let mut sent = 0;
    for n in 0..20_000_u32 {
        let field = block(&[(format!("x-{n}").as_bytes(), &[b'v'; 1000])]);
        if !wire.send(&frame(CONTINUATION, 0, 1, &field)).await {
            break;
        }
        sent += 1;
    }
    let verdict = wire.verdict(1).await;
    assert!(verdict.is_refusal(), "{verdict:?} after {sent}");
    let grown = before.grown(proxy.pid());
    assert!(grown < 64 << 20, "{grown} bytes");
    assert!(fpm.requests().is_empty());
    still_answers(&proxy).await;
    println!("{sent} CONTINUATION frames were taken, {} KiB of memory", grown >> 10);
}

/// RFC 7541, section 7.3: a few bytes that stand for many.
#[tokio::test(flavor = "multi_thread")]
async fn an_hpack_bomb_is_refused_and_takes_no_memory() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = start(&fpm, "").await;
    let before = Usage::of(proxy.pid());
    let mut wire = Wire::open(proxy.http(), &[]).await;
    let mut bomb = request("GET", "/a.php");
    // A literal that is put into the table, and references to it: each a byte on the wire, 4,000 in memory.
    bomb.push(0x40);
    text(&mut bomb, b"x-bomb");
    text(&mut bomb, &[b'v'; 3900]);
    for _ in 0..12_000 {
        integer(&mut bomb, 0x80, 7, 62);
    }
    wire.send(&frame(HEADERS, END_STREAM | END_HEADERS, 1, &bomb[..16_000.min(bomb.len())])).await;
    let verdict = wire.verdict(1).await;
    // 431 is no status of the static table.
    assert!(verdict.is_refusal() || matches!(verdict, Verdict::Answered(first) if first != 0x88), "{verdict:?}");
    let grown = before.grown(proxy.pid());
    assert!(grown < 64 << 20, "{grown} bytes");
    assert!(fpm.requests().is_empty());
    still_answers(&proxy).await;
}

/// CVE-2019-9512, -9515, -9518: frames that cost the sender next to nothing and each want an answer, or do nothing at all.
#[tokio::test(flavor = "multi_thread")]
async fn floods_of_small_frames_take_no_memory_and_stop_nobody() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = start(&fpm, "stall_timeout = \"2s\"\nidle_timeout = \"5s\"").await;
    let post = frame(HEADERS, END_HEADERS, 1, &request("POST", "/a.php"));
    for (name, first, each) in [
        ("SETTINGS", Vec::new(), frame(SETTINGS, 0, 0, b"")),
        ("PING", Vec::new(), frame(PING, 0, 0, &[7; 8])),
        ("empty DATA", post.clone(), frame(DATA, 0, 1, b"")),
        ("empty HEADERS", Vec::new(), frame(HEADERS, 0, 1, b"")),
        ("WINDOW_UPDATE", Vec::new(), frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes())),
        ("PRIORITY", Vec::new(), frame(2, 0, 1, &[0, 0, 0, 0, 1])),
    ] {
        let before = Usage::of(proxy.pid());
        let mut wire = Wire::open(proxy.http(), &[]).await;
        wire.send(&first).await;
        let many = each.repeat(1000);
        let mut sent = 0;
        // Nothing is read meanwhile.
        for _ in 0..200 {
            if !matches!(tokio::time::timeout(Duration::from_secs(1), wire.send(&many)).await, Ok(true)) {
                break;
            }
            sent += 1000;
        }
        let asked = Instant::now();
        still_answers(&proxy).await;
        let took = asked.elapsed();
        let grown = before.grown(proxy.pid());
        assert!(grown < 64 << 20, "{name}: {grown} bytes");
        println!("{name}: {sent} frames, {} KiB, the next client waited {took:?}", grown >> 10);
    }
}

/// CVE-2019-9511, -9517: who asks for much and opens no window.
#[tokio::test(flavor = "multi_thread")]
async fn a_window_that_stays_shut_holds_its_stream_no_longer_than_stall_timeout() {
    let fpm = ScriptedFpm::start(Behaviour::big_body(1 << 20)).await;
    let proxy = start(&fpm, "stall_timeout = \"1s\"").await;
    let mut wire = Wire::open(proxy.http(), &[(4, 0)]).await;
    let asked = Instant::now();
    wire.send(&get(1, "/big.php")).await;
    assert_eq!(wire.verdict(1).await, OK);
    let verdict = wire.verdict(1).await;
    let took = asked.elapsed();
    assert!(verdict.is_refusal(), "{verdict:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    println!("stall_timeout of 1 s: ended after {took:?}");
    fpm.set(Behaviour::hello("blue"));
    still_answers(&proxy).await;
}

/// Nobody holds a connection by beginning and not going on.
#[tokio::test(flavor = "multi_thread")]
async fn a_preface_or_a_head_that_does_not_end_has_its_deadline() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = start(&fpm, "header_timeout = \"1s\"\nidle_timeout = \"2s\"").await;
    let unended = frame(HEADERS, END_STREAM, 1, &request("GET", "/a.php"));
    for (name, bytes) in [
        ("half a preface", PREFACE[..10].to_vec()),
        ("a preface without SETTINGS", PREFACE.to_vec()),
        ("half a SETTINGS", [PREFACE, &frame(SETTINGS, 0, 0, &[0; 60])[..20]].concat()),
        ("a head without its end", [PREFACE, &frame(SETTINGS, 0, 0, b""), &frame(SETTINGS, ACK, 0, b""), &unended].concat()),
    ] {
        let mut client = http::Connection::open(proxy.http()).await.unwrap();
        client.send(&bytes).await.unwrap();
        let began = Instant::now();
        let rest = within(Duration::from_secs(60), name, client.read_to_end()).await;
        let took = began.elapsed();
        assert!(took < Duration::from_secs(20), "{name}: {took:?}");
        println!("{name}: ended after {took:?}, {rest:?}");
    }
    still_answers(&proxy).await;
}

/// A client with a large window that reads slowly: megabytes of its answer are with the kernel when the proxy has nothing more to do with it. It goes on talking of
/// windows, as clients do, so that closing the socket would reset what is still on its way. Gives how many bytes of the answer came.
async fn reads_slowly(mut wire: Wire, pace: Duration) -> usize {
    wire.send(&frame(WINDOW_UPDATE, 0, 0, &(6_u32 << 20).to_be_bytes())).await;
    wire.send(&get(1, "/big.php")).await;
    let mut bytes = 0;
    while let Ok(Some(next)) = wire.next().await {
        if next.kind == PING && next.flags & ACK == 0 {
            wire.send(&frame(PING, ACK, 0, &next.payload)).await;
        }
        if next.kind == DATA {
            bytes += next.payload.len();
            if next.flags & END_STREAM != 0 {
                break;
            }
            wire.send(&frame(WINDOW_UPDATE, 0, 0, &u32::try_from(next.payload.len()).unwrap().to_be_bytes())).await;
            tokio::time::sleep(pace).await;
        }
    }
    bytes
}

async fn with_a_large_window(proxy: &Slackwater) -> Wire {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 << 10).unwrap();
    Wire::over(socket.connect(proxy.http()).await.unwrap(), &[(4, 6 << 20)]).await
}

/// An answer that the kernel has taken is not with its client yet: neither the drain nor another client that wants the place cuts it.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_on_its_way_is_not_cut() {
    const ANSWER: usize = 3_000_000;
    let fpm = ScriptedFpm::start(Behaviour::big_body(ANSWER)).await;
    fpm.on("/after", Behaviour::hello("blue"));
    for drained in [true, false] {
        let config = toml(&fpm.address().to_string(), "max_connections = 2", "workers_per_endpoint = 8")
            + "[drain]\ngrace = \"60s\"\nlame_duck = \"0s\"\nquiet = \"200ms\"\n";
        let mut proxy = Slackwater::start(&config).await;
        let wire = with_a_large_window(&proxy).await;
        // Some six seconds in all.
        let reader = tokio::spawn(reads_slowly(wire, Duration::from_millis(30)));
        eventually("PHP is through with it", async || match proxy.metric(&["slackwater_requests_total", "200"]).await {
            Some(1.0) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        assert!(!reader.is_finished());
        if drained {
            proxy.terminate();
        } else {
            // One place more, and two that want it.
            for _ in 0..2 {
                still_answers(&proxy).await;
            }
            let _kept = crate::support::http::Connection::open(proxy.http()).await.unwrap();
            let address = proxy.http();
            let newcomer = tokio::spawn(async move { http::get(address, "/after.php").await });
            assert_eq!(within(PATIENCE, "a place", newcomer).await.unwrap().unwrap().status, 200);
        }
        let came = within(Duration::from_secs(60), "all of the answer", reader).await.unwrap();
        assert_eq!(came, ANSWER, "{}", if drained { "in the drain" } else { "for another client" });
        if drained {
            assert_eq!(proxy.wait_exit(PATIENCE).await, 0);
        }
    }
}

/// Whoever is to make room is told so and given the time to hear it: a request that crosses GOAWAY is answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_crosses_the_end_of_an_idle_connection_is_answered() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = start(&fpm, "max_connections = 1").await;
    for _ in 0..5 {
        let mut wire = Wire::open(proxy.http(), &[]).await;
        wire.send(&get(1, "/a.php")).await;
        assert_eq!(wire.verdict(1).await, OK);
        let address = proxy.http();
        let newcomer = tokio::spawn(async move { http::get(address, "/after.php").await });
        let goaway = loop {
            let frame = wire.next().await.unwrap().expect("GOAWAY comes before the end");
            if frame.kind == crate::support::h2wire::GOAWAY {
                break frame;
            }
        };
        // It may have run whatever was sent until now, so it must.
        assert_eq!(goaway.payload[..4], 0x7fff_ffff_u32.to_be_bytes());
        // The way there and back takes time.
        tokio::time::sleep(Duration::from_millis(50)).await;
        wire.send(&get(3, "/b.php")).await;
        assert_eq!(wire.verdict(3).await, OK);
        loop {
            match wire.next().await.unwrap() {
                Some(next) if next.kind == PING && next.flags & ACK == 0 => {
                    wire.send(&frame(PING, ACK, 0, &next.payload)).await;
                }
                Some(_) => {}
                None => break,
            }
        }
        assert_eq!(within(PATIENCE, "an answer", newcomer).await.unwrap().unwrap().status, 200);
    }
}

/// A connection that has been idle for long is told of the drain like any other: what crosses that is answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_crosses_the_drain_is_answered() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let config = toml(&fpm.address().to_string(), "", "workers_per_endpoint = 8")
        + "[drain]\ngrace = \"20s\"\nlame_duck = \"0s\"\nquiet = \"300ms\"\n";
    let mut proxy = Slackwater::start(&config).await;
    let mut wire = Wire::open(proxy.http(), &[]).await;
    wire.send(&get(1, "/a.php")).await;
    assert_eq!(wire.verdict(1).await, OK);
    tokio::time::sleep(Duration::from_millis(600)).await;
    proxy.terminate();
    loop {
        let next = wire.next().await.unwrap().expect("GOAWAY comes before the end");
        if next.kind == crate::support::h2wire::GOAWAY {
            break;
        }
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    wire.send(&get(3, "/b.php")).await;
    assert_eq!(wire.verdict(3).await, OK);
    assert_eq!(proxy.wait_exit(PATIENCE).await, 0);
}

/// Those to whom the kernel still delivers are not closed, and do not take the room that idle ones would make.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_read_nothing_keep_no_newcomer_out() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    fpm.on("/big", Behaviour::big_body(1_000_000));
    let proxy = start(&fpm, "max_connections = 12").await;
    let mut stuck = Vec::new();
    for _ in 0..10 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut wire = Wire::over(socket.connect(proxy.http()).await.unwrap(), &[(4, 6 << 20)]).await;
        wire.send(&frame(WINDOW_UPDATE, 0, 0, &(6_u32 << 20).to_be_bytes())).await;
        wire.send(&get(1, "/big.php")).await;
        stuck.push(wire);
    }
    let mut idle = Vec::new();
    for _ in 0..2 {
        let mut client = crate::support::http::Connection::open(proxy.http()).await.unwrap();
        assert_eq!(client.get("/a.php").await.unwrap().status, 200);
        idle.push(client);
    }
    eventually("PHP is through with all of them", async || match proxy.metric(&["slackwater_upstream_busy", "blue"]).await {
        Some(0.0) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let asked = Instant::now();
    still_answers(&proxy).await;
    println!("a newcomer was answered after {:?}", asked.elapsed());
    let closed = proxy.metric(&["slackwater_shed_total", "idle_connection"]).await.unwrap();
    assert!(closed <= 12.0, "{closed} of 12 connections were counted as closed");
}

/// What a client that has reset its connection will never take is not waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_resets_does_not_hold_the_drain() {
    let fpm = ScriptedFpm::start(Behaviour::big_body(4_000_000)).await;
    let config = toml(&fpm.address().to_string(), "", "workers_per_endpoint = 8")
        + "[drain]\ngrace = \"60s\"\nlame_duck = \"0s\"\nquiet = \"200ms\"\n";
    let mut proxy = Slackwater::start(&config).await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut client = crate::support::http::Connection::over(socket.connect(proxy.http()).await.unwrap());
    client.send(http::request("GET", "/big.php", &[], b"")).await.unwrap();
    client.read_head().await.unwrap();
    proxy.terminate();
    proxy.wait_for_log("Draining", PATIENCE).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let reset = Instant::now();
    client.reset();
    assert_eq!(proxy.wait_exit(PATIENCE).await, 0);
    println!("ended {:?} after the reset", reset.elapsed());
}
