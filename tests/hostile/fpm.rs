//! An FPM that lies, or has been taken over: whatever it says, the client gets an honest answer or a connection that visibly breaks, and the next client
//! gets its own.

use std::time::{Duration, Instant};

use crate::{
    case::{PATIENCE, toml},
    support::{
        fastcgi::{self, STDERR, STDOUT},
        gate::{eventually, within},
        http::{self, Connection, HttpError, Response, request},
        process::Slackwater,
        real_fpm::RealFpm,
        scripted_fpm::{Behaviour, ScriptedFpm},
        usage::Usage,
    },
};

const OK: &[u8] = b"Content-Type: text/plain\r\n\r\nhello";

fn end() -> Vec<u8> {
    fastcgi::end_request(1, 0, 0)
}

fn stdout(content: &[u8]) -> Vec<u8> {
    fastcgi::records(STDOUT, 1, content)
}

/// A record whose header says what it likes of its content and padding.
fn lying(length: u16, padding: u8, content: &[u8]) -> Vec<u8> {
    let [high, low] = length.to_be_bytes();
    [&[1, STDOUT, 0, 1, high, low, padding, 0], content].concat()
}

/// What a client may see.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// This status; with 200 the body is "hello".
    Status(u16),
    /// 502, or a connection that ends in the middle.
    Broken,
}

#[tokio::test(flavor = "multi_thread")]
async fn no_lie_of_fpm_becomes_an_answer_that_looks_whole() {
    use Seen::{Broken, Status};
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), "", "workers_per_endpoint = 4\nread_timeout = \"2s\"")).await;
    let header = |line: &str| [&stdout(format!("{line}\r\n\r\nhello").as_bytes())[..], &end()].concat();
    let cases: Vec<(&str, Vec<u8>, Seen)> = vec![
        ("as it should be", [stdout(OK), end()].concat(), Status(200)),
        ("padding of 255", [lying(OK.len() as u16, 255, OK), vec![0; 255], end()].concat(), Status(200)),
        ("padding that is not there", lying(OK.len() as u16, 255, OK), Broken),
        ("a record that is longer than what comes", lying(1000, 0, OK), Broken),
        ("a record that is shorter than what comes", [lying(10, 0, OK), end()].concat(), Broken),
        ("an empty answer", end(), Status(502)),
        ("nothing", Vec::new(), Status(502)),
        ("only STDERR", [fastcgi::records(STDERR, 1, b"Oops"), end()].concat(), Status(502)),
        (
            "records without content, ten thousand",
            [fastcgi::record(STDOUT, 1, b"").repeat(10_000), stdout(OK), end()].concat(),
            Status(200),
        ),
        ("a wrong id in the second record", [stdout(OK), fastcgi::record(STDOUT, 2, b" more"), end()].concat(), Broken),
        ("END_REQUEST of another id", [stdout(OK), fastcgi::end_request(2, 0, 0)].concat(), Broken),
        ("END_REQUEST of 4 bytes", [stdout(OK), fastcgi::record(3, 1, &[0; 4])].concat(), Broken),
        ("a type for managers", [stdout(OK), fastcgi::record(10, 0, b""), end()].concat(), Broken),
        ("version 0", [fastcgi::record_of(0, STDOUT, 1, OK), end()].concat(), Status(502)),
        ("HTTP", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello".to_vec(), Status(502)),
        ("random bytes", (0..4096_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect(), Status(502)),
        ("CR in a header", header("X-A: b\rc"), Status(502)),
        ("NUL in a header", header("X-A: b\0c"), Status(502)),
        ("a name with a space", header("X A: b"), Status(502)),
        ("a line without a colon", header("oops"), Status(502)),
        ("Status: 99", header("Status: 99"), Status(502)),
        ("Status: 1000", header("Status: 1000"), Status(502)),
        ("Status: 100", header("Status: 100 Continue"), Status(502)),
        ("Status in words", header("Status: fine"), Status(502)),
        ("Content-Length in words", header("Content-Length: five"), Status(502)),
        ("two different Content-Lengths", header("Content-Length: 5\r\nContent-Length: 6"), Status(502)),
        ("Content-Length beyond the body", header("Content-Length: 6"), Broken),
        ("Content-Length below the body", header("Content-Length: 3"), Status(200)),
        ("Transfer-Encoding: chunked", header("Transfer-Encoding: chunked"), Status(200)),
        ("Connection and Upgrade", header("Connection: Upgrade\r\nUpgrade: h2c"), Status(200)),
        ("40,000 headers", header(&"X-A: b\r\n".repeat(40_000)), Status(502)),
        ("a header of 1 MiB", header(&format!("X-A: {}", "b".repeat(1 << 20))), Status(502)),
        ("X-Accel-Redirect to nowhere", header("X-Accel-Redirect: /nowhere"), Status(404)),
        ("X-Accel-Redirect that leads up", header("X-Accel-Redirect: /../../etc/passwd"), Status(404)),
        ("X-Accel-Redirect to the script itself", header("X-Accel-Redirect: /a.php"), Status(404)),
        ("X-Accel-Redirect to a script that leads back", header("X-Accel-Redirect: /b.php?a=/a.php"), Status(404)),
    ];
    for (name, bytes, seen) in &cases {
        for method in ["POST", "GET"] {
            fpm.set(Behaviour::raw(bytes.clone()));
            let before = fpm.requests().len();
            let body: &[u8] = if method == "POST" { b"x" } else { b"" };
            let answer = within(PATIENCE, name, http::send(proxy.http(), method, "/a.php", &[], body)).await;
            let fits = match (seen, &answer) {
                (Status(200), Ok(Response { status: 200, body, .. })) => {
                    &body[..] == b"hello" || name.contains("below") && &body[..] == b"hel"
                }
                (Status(404), Ok(answer)) => matches!(answer.status, 404 | 502 | 500 | 400),
                (Status(status), Ok(answer)) => answer.status == *status,
                (Broken, Ok(answer)) => answer.status == 502,
                (Broken, Err(_)) => true,
                (_, Err(_)) => false,
            };
            assert!(fits, "{name}, {method}: {answer:?} instead of {seen:?}");
            // A GET may be tried once more; nothing that PHP says makes it run in a circle.
            let runs = fpm.requests().len() - before;
            assert!(runs <= if method == "GET" { 2 } else { 1 }, "{name}, {method}: {runs} runs");
            if let Ok(answer) = &answer {
                for name in ["Transfer-Encoding", "Upgrade"] {
                    let said = answer.header(name).unwrap_or("chunked");
                    assert!(said == "chunked", "PHP has set {name}: {said}");
                }
            }
        }
        fpm.set(Behaviour::hello("blue"));
        let next = within(PATIENCE, "the next client", http::get(proxy.http(), "/next.php")).await;
        assert_eq!(next.as_ref().map(Response::text).ok().as_deref(), Some("blue hello\n"), "behind {name}: {next:?}");
    }
    println!("{} lies, each behind a GET and a POST", cases.len());
}

/// A record behind END_REQUEST on a kept connection is nobody's: the next client on it does not get it.
#[tokio::test(flavor = "multi_thread")]
async fn what_comes_behind_an_answer_is_not_the_next_clients() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").data_after_end()).await;
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), "", "workers_per_endpoint = 1")).await;
    let mut client = Connection::open(proxy.http()).await.unwrap();
    for nth in 0..50 {
        let answer = within(PATIENCE, "an answer", client.get("/a.php")).await.unwrap();
        assert_eq!((answer.status, answer.text().as_str()), (200, "blue hello\n"), "{nth}");
    }
}

/// A pool whose scripts these are, and the proxy before it.
async fn real(workers: usize, scripts: &[(&str, &str)], upstream: &str, rest: &str) -> (RealFpm, Slackwater) {
    let fpm = RealFpm::builder("blue").workers(workers).start().await;
    for (name, script) in scripts {
        std::fs::write(fpm.docroot().join(name), format!("<?php while (ob_get_level()) ob_end_flush(); {script}")).unwrap();
    }
    let config = toml(&fpm.tcp_address().to_string(), "", upstream).replace("/app", &fpm.docroot().display().to_string()) + rest;
    let proxy = Slackwater::start(&config).await;
    (fpm, proxy)
}

/// While FPM works on a request its worker is busy: the slot is not given to the next one, whatever has become of the first.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_stays_taken_as_long_as_fpm_is_at_work() {
    let scripts = [
        ("stops.php", "echo str_repeat('x', 200000); flush(); usleep(1800000);"),
        ("heads.php", "for ($n = 0; $n < 300; $n++) header(\"X-$n: b\"); echo 'x'; flush(); usleep(800000);"),
    ];
    let upstream = "workers_per_endpoint = 1\nread_timeout = \"1s\"\nqueue = { timeout = \"10s\" }";
    let (_fpm, proxy) = real(1, &scripts, upstream, "").await;
    for (script, status) in [("/stops.php", None), ("/heads.php", Some(502))] {
        let answer = within(PATIENCE, script, http::get(proxy.http(), script)).await;
        assert_eq!(answer.as_ref().map(|answer| answer.status).ok(), status, "{script}");
        let skip = proxy.log().len();
        let next = within(PATIENCE, "the next one", http::get(proxy.http(), "/hello.php")).await.unwrap();
        assert_eq!(next.status, 200, "behind {script}");
        let line = proxy.wait_for_log_after(skip, "/hello.php", PATIENCE).await;
        let waited = serde_json::from_str::<serde_json::Value>(&line).unwrap()["queue_seconds"].as_f64().unwrap();
        assert!(waited > 0.3, "behind {script} it waited {waited} s, and FPM was at work for longer");
    }
}

/// A script that says nothing but complaints is at work: it is neither cut nor forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn complaints_are_a_sign_of_life() {
    let script = "echo str_repeat('x', 100000); flush(); for ($n = 0; $n < 8; $n++) { error_log('still here'); flush(); usleep(400000); } echo 'end';";
    let (_fpm, proxy) = real(2, &[("complains.php", script)], "read_timeout = \"1500ms\"", "").await;
    let answer = within(PATIENCE, "the whole answer", http::get(proxy.http(), "/complains.php")).await.unwrap();
    assert_eq!((answer.status, answer.body.len()), (200, 100_003));
}

/// A script may write byte by byte, and its client not read: what waits takes about as much memory as it has bytes.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_by_the_byte_takes_no_more_memory_than_it_has_bytes() {
    const BYTES: usize = (8 << 20) + 5000;
    // More than the sockets take, and then byte by byte.
    let script = "echo str_repeat('x', 8 << 20); flush(); for ($n = 0; $n < 5000; $n++) { echo 'x'; flush(); usleep(100); }";
    let (_fpm, proxy) = real(4, &[("bytes.php", script)], "workers_per_endpoint = 4", "[buffer]\nmemory = \"64MiB\"\n").await;
    let before = Usage::of(proxy.pid());
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut client = Connection::open(proxy.http()).await.unwrap();
        client.send(&request("GET", "/bytes.php", &[], b"")).await.unwrap();
        clients.push(client);
    }
    eventually("PHP has written everything", async || {
        let endpoint = proxy.status().await["upstreams"]["php"]["sets"]["blue"]["endpoints"][0].clone();
        if endpoint["busy"] == 0 { Ok(()) } else { Err(endpoint.to_string()) }
    })
    .await;
    let grown = before.grown(proxy.pid());
    for client in &mut clients {
        let answer = within(PATIENCE, "the answer", client.read_response("GET")).await.unwrap();
        assert_eq!(answer.body.len(), BYTES);
    }
    println!("4 answers of 8 MiB and 5,000 bytes one by one: {} KiB of memory", grown >> 10);
    assert!(grown < 80 << 20, "{grown} bytes for {}", 4 * BYTES);
}

/// A head by the byte costs what it costs once, not once for each of its bytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_by_the_byte_is_read_in_linear_time() {
    let long = "b".repeat(60_000);
    let fpm = ScriptedFpm::start(Behaviour::answers(200, &[("X-Long", &long)], "hello").record_size(1)).await;
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), "", "workers_per_endpoint = 4")).await;
    let began = Instant::now();
    let answer = within(PATIENCE, "an answer", http::get(proxy.http(), "/a.php")).await.unwrap();
    assert_eq!((answer.status, answer.header("X-Long").map(str::len)), (200, Some(60_000)));
    let took = began.elapsed();
    println!("60,000 records of a head: {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}

/// The disk is full in the middle of an answer: it goes on at its client's pace.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_cuts_no_answer() {
    let fpm = ScriptedFpm::start(Behaviour::big_body(24 << 20)).await;
    let full = FullDisk::new();
    let config =
        toml(&fpm.address().to_string(), "", "workers_per_endpoint = 4") + &format!("[buffer]\ndir = \"{}\"\n", full.path());
    let proxy = Slackwater::start(&config).await;
    let mut client = Connection::open(proxy.http()).await.unwrap();
    client.send(&request("GET", "/big.php", &[], b"")).await.unwrap();
    proxy.wait_for_log("buffer.dir takes no more of an answer", PATIENCE).await;
    let answer = within(PATIENCE, "the whole answer", client.read_response("GET")).await;
    let whole = match answer {
        Ok(answer) => (answer.status, answer.body.len()),
        Err(HttpError::EndedEarly { got } | HttpError::Broken { got, .. }) => (0, got.len()),
        Err(error) => panic!("{error}"),
    };
    assert_eq!(whole, (200, 24 << 20));
    // A body that is to be buffered there is refused, and PHP is not bothered with it.
    let before = fpm.requests().len();
    let refused = within(PATIENCE, "a refusal", http::send(proxy.http(), "POST", "/a.php", &[], &vec![7; 4 << 20])).await;
    assert_eq!(refused.as_ref().map(|answer| answer.status).ok(), Some(503), "{refused:?}");
    assert_eq!(fpm.requests().len(), before);
}

/// A file system of one MiB.
struct FullDisk(tempfile::TempDir);

impl FullDisk {
    fn new() -> FullDisk {
        let folder = tempfile::tempdir().unwrap();
        let status =
            std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(folder.path()).status();
        assert!(status.is_ok_and(|status| status.success()), "mount(8) of a tmpfs: this test wants root, as tests/run does");
        FullDisk(folder)
    }

    fn path(&self) -> std::path::Display<'_> {
        self.0.path().display()
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}
