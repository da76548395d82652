//! The tests' own tools do what they say: a ledger that cannot see a lost request would prove anything.

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use support::fastcgi::{self, FpmAddress};
use support::gate::{Gate, within};
use support::http::{self, Connection, Framing, HttpError};
use support::ledger::{Expect, Ledger, LedgerClient, Outcome, Shape};
use support::load_balancer::{LoadBalancer, Service};
use support::real_fpm::{Pm, RealFpm};
use support::relay::Relay;
use support::scripted_fpm::{Behaviour, Ending, ScriptedFpm};
use support::{pattern, sha1};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);

// ---------------------------------------------------------------- FastCGI, scripted

fn params(uri: &str) -> Vec<(&str, &str)> {
    vec![("REQUEST_METHOD", "GET"), ("SCRIPT_NAME", uri), ("REQUEST_URI", uri), ("HTTP_X_LEDGER_ID", "an-id")]
}

async fn ask(fpm: &ScriptedFpm, uri: &str, body: &[u8]) -> std::io::Result<fastcgi::Answer> {
    fastcgi::ask(&FpmAddress::Tcp(fpm.address()), &params(uri), body).await
}

#[tokio::test]
async fn scripted_fpm_answers_and_keeps_the_request() {
    let fpm = ScriptedFpm::start(Behaviour::digests_body("blue")).await;
    let body = pattern::pattern(200_000);
    let answer = ask(&fpm, "/upload.php", &body).await.unwrap();
    let json: serde_json::Value = serde_json::from_slice(answer.body()).unwrap();
    assert_eq!(json["length"], 200_000);
    assert_eq!(json["sha1"], sha1::hex(&body));
    assert_eq!(answer.header("x-ledger-id").as_deref(), Some("an-id"));
    let [request] = &fpm.requests()[..] else { panic!("one request") };
    assert_eq!(request.body, body);
    assert!(request.whole && request.completed && !request.reused() && !request.keep_conn);
    assert_eq!(request.param("CONTENT_LENGTH").as_deref(), Some("200000"));
    assert_eq!(fpm.violations(), Vec::<String>::new());
    fpm.wait_endings(1).await;
    assert_eq!(fpm.endings(), [(0, Ending::PeerClosed)]);
}

#[tokio::test]
async fn scripted_fpm_refuses_a_pair_across_two_records() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let pair = fastcgi::pair(b"REQUEST_URI", b"/straddles");
    let mut stream = TcpStream::connect(fpm.address()).await.unwrap();
    let mut bytes = fastcgi::begin_request(1, 0);
    bytes.extend(fastcgi::record(fastcgi::PARAMS, 1, &pair[..9]));
    bytes.extend(fastcgi::record(fastcgi::PARAMS, 1, &pair[9..]));
    bytes.extend(fastcgi::record(fastcgi::PARAMS, 1, &[]));
    stream.write_all(&bytes).await.unwrap();
    assert!(fastcgi::read_answer(&mut stream).await.is_err());
    fpm.wait_endings(1).await;
    assert_eq!(fpm.endings(), [(0, Ending::Refused)]);
    assert!(fpm.violations()[0].contains("not whole pairs"), "{:?}", fpm.violations());
    assert!(fpm.requests().is_empty());
}

#[tokio::test]
async fn scripted_fpm_misbehaves_as_named() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let hello = |answer: fastcgi::Answer| assert_eq!(answer.text(), "blue hello\n");

    fpm.next(Behaviour::hello("blue").splits_every_byte());
    hello(ask(&fpm, "/", b"").await.unwrap());
    fpm.next(Behaviour::hello("blue").record_size(1));
    hello(ask(&fpm, "/", b"").await.unwrap());
    fpm.next(Behaviour::hello("blue").slow_body(3, Duration::from_millis(1)));
    hello(ask(&fpm, "/", b"").await.unwrap());
    fpm.next(Behaviour::hello("blue").floods_stderr(300_000));
    let answer = ask(&fpm, "/", b"").await.unwrap();
    assert_eq!(answer.stderr.len(), 300_000);
    hello(answer);
    fpm.next(Behaviour::hello("blue").answers_before_reading_body());
    hello(ask(&fpm, "/", &pattern::pattern(100_000)).await.unwrap());

    fpm.next(Behaviour::big_body(5_000_000));
    pattern::check(ask(&fpm, "/", b"").await.unwrap().body(), 5_000_000).unwrap();
    fpm.next(Behaviour::overloaded());
    assert_eq!(ask(&fpm, "/", b"").await.unwrap().protocol_status, fastcgi::OVERLOADED);
    fpm.next(Behaviour::cant_multiplex());
    assert_eq!(ask(&fpm, "/", b"").await.unwrap().protocol_status, fastcgi::CANT_MPX_CONN);
    fpm.next(Behaviour::answers(404, &[("X-A", "b")], "gone"));
    let answer = ask(&fpm, "/", b"").await.unwrap();
    assert_eq!((answer.status(), answer.text().as_str()), (404, "gone"));

    for n in [0, 7, 30] {
        fpm.next(Behaviour::hello("blue").dies_after(n));
        assert_eq!(ask(&fpm, "/", b"").await.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof, "{n}");
    }
    fpm.next(Behaviour::hello("blue").resets_after(30));
    assert_eq!(ask(&fpm, "/", b"").await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    fpm.next(Behaviour::hello("blue").wrong_type());
    assert!(ask(&fpm, "/", b"").await.unwrap_err().to_string().contains("type 42"));
    fpm.next(Behaviour::raw("HTTP/1.1 200 OK\r\n\r\n"));
    assert!(ask(&fpm, "/", b"").await.is_err());

    for (behaviour, at, wrong) in
        [(Behaviour::hello("blue").wrong_version(), 0, 2), (Behaviour::hello("blue").wrong_request_id(), 3, 2)]
    {
        fpm.next(behaviour);
        let mut stream = TcpStream::connect(fpm.address()).await.unwrap();
        stream.write_all(&fastcgi::request(&params("/"), b"", 0)).await.unwrap();
        let mut header = [0; 8];
        stream.read_exact(&mut header).await.unwrap();
        assert_eq!(header[at], wrong);
    }
    fpm.next(Behaviour::hello("blue").data_after_end());
    let mut stream = TcpStream::connect(fpm.address()).await.unwrap();
    stream.write_all(&fastcgi::request(&params("/"), b"", fastcgi::KEEP_CONN)).await.unwrap();
    fastcgi::read_answer(&mut stream).await.unwrap();
    let mut header = [0; 8];
    stream.read_exact(&mut header).await.unwrap();
    assert_eq!(header[1], fastcgi::STDOUT);

    fpm.next(Behaviour::hello("blue").endless_headers());
    let mut stream = TcpStream::connect(fpm.address()).await.unwrap();
    stream.write_all(&fastcgi::request(&params("/"), b"", 0)).await.unwrap();
    let mut much = vec![0; 1 << 20];
    stream.read_exact(&mut much).await.unwrap();
    let open = fpm.endings().len();
    drop(stream);
    fpm.wait_endings(open + 1).await;
    assert_eq!(fpm.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn scripted_fpm_ends_kept_connections_as_named() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let once = fastcgi::request(&params("/"), b"", fastcgi::KEEP_CONN);
    let mut end = [0; 1];

    let mut stream = TcpStream::connect(fpm.address()).await.unwrap();
    for _ in 0..3 {
        stream.write_all(&once).await.unwrap();
        fastcgi::read_answer(&mut stream).await.unwrap();
    }
    assert_eq!(fpm.requests().iter().map(|request| request.nth_on_connection).collect::<Vec<_>>(), [0, 1, 2]);
    drop(stream);

    fpm.set(Behaviour::hello("blue").resets_on_reuse());
    let mut stream = TcpStream::connect(fpm.address()).await.unwrap();
    stream.write_all(&once).await.unwrap();
    fastcgi::read_answer(&mut stream).await.unwrap();
    stream.write_all(&once).await.unwrap();
    assert_eq!(stream.read(&mut end).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);

    fpm.set(Behaviour::hello("blue").closes_idle(Duration::ZERO));
    let mut stream = TcpStream::connect(fpm.address()).await.unwrap();
    stream.write_all(&once).await.unwrap();
    fastcgi::read_answer(&mut stream).await.unwrap();
    assert_eq!(stream.read(&mut end).await.unwrap(), 0);

    fpm.set(Behaviour::hello("blue").closes_after_request());
    let mut stream = TcpStream::connect(fpm.address()).await.unwrap();
    stream.write_all(&once).await.unwrap();
    fastcgi::read_answer(&mut stream).await.unwrap();
    stream.write_all(&once).await.unwrap();
    assert_eq!(stream.read(&mut end).await.unwrap(), 0);
    drop(stream);
    fpm.wait_endings(4).await;
    assert_eq!(fpm.requests().len(), 6, "the last one was read away, not executed");
    assert!(fpm.read_away() >= once.len());
    assert_eq!(fpm.violations().len(), 1);
}

#[tokio::test]
async fn scripted_fpm_holds_at_gates_and_counts_workers() {
    let gate = Gate::closed();
    let fpm = ScriptedFpm::builder(Behaviour::hello("blue"))
        .on("/held", Behaviour::hello("green").holds_answer(&gate))
        .workers(1)
        .start()
        .await;
    let address = FpmAddress::Tcp(fpm.address());
    // One after the other: a connection closed by its peer holds no worker.
    for _ in 0..50 {
        ask(&fpm, "/", b"").await.unwrap();
    }
    assert_eq!((fpm.most_connected(), fpm.backlog_violations()), (1, 0));
    // A connection that is only kept holds its worker too.
    let kept = TcpStream::connect(fpm.address()).await.unwrap();
    fpm.wait_connections(51).await;
    let behind = TcpStream::connect(fpm.address()).await.unwrap();
    fpm.wait_connections(52).await;
    within(SECOND, "the kept connection to be counted", async {
        while fpm.backlog_violations() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert_eq!((fpm.most_connected(), fpm.backlog_violations()), (2, 1));
    drop((kept, behind));
    fpm.wait_open(0).await;
    let held = tokio::spawn({
        let address = address.clone();
        async move { fastcgi::ask(&address, &params("/held"), b"").await }
    });
    gate.wait_reached(1).await;
    let waits = tokio::spawn(async move { fastcgi::ask(&address, &params("/"), b"").await });
    fpm.wait_connections(54).await;
    assert_eq!((fpm.most_connected(), fpm.backlog_violations()), (2, 2));
    assert_eq!(fpm.requests().len(), 51, "the second waits for the worker");
    gate.open();
    assert_eq!(held.await.unwrap().unwrap().text(), "green hello\n");
    assert_eq!(waits.await.unwrap().unwrap().text(), "blue hello\n");
}

#[tokio::test]
async fn scripted_fpm_stalls_until_the_peer_has_left() {
    for behaviour in [
        Behaviour::accepts_and_never_reads(),
        Behaviour::hello("blue").stalls_before_headers(),
        Behaviour::hello("blue").stalls_after_headers(),
        Behaviour::hello("blue").stalls_before_end(),
    ] {
        let fpm = ScriptedFpm::start(behaviour).await;
        let mut stream = TcpStream::connect(fpm.address()).await.unwrap();
        stream.write_all(&fastcgi::request(&params("/"), b"", 0)).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_millis(50), fastcgi::read_answer(&mut stream)).await;
        assert!(answer.is_err());
        assert_eq!(fpm.open_connections(), 1);
        drop(stream);
        fpm.wait_endings(1).await;
    }
}

#[tokio::test]
async fn scripted_fpm_stops_listening_and_dies() {
    let gate = Gate::closed();
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&gate)).await;
    let address = fpm.address();
    let on_its_way = tokio::spawn(async move { fastcgi::ask(&FpmAddress::Tcp(address), &params("/"), b"").await });
    fpm.wait_requests(1).await;
    fpm.stops_listening().await;
    assert_eq!(TcpStream::connect(address).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    gate.open();
    assert_eq!(on_its_way.await.unwrap().unwrap().text(), "blue hello\n");

    let fpm = ScriptedFpm::builder(Behaviour::hello("blue").stalls_before_headers()).at(address).start().await;
    let cut = tokio::spawn(async move { fastcgi::ask(&FpmAddress::Tcp(address), &params("/"), b"").await });
    fpm.wait_requests(1).await;
    fpm.dies().await;
    assert!(cut.await.unwrap().is_err());
}

// ---------------------------------------------------------------- FPM, real

#[tokio::test]
async fn real_fpm_runs_the_scripts() {
    let mut fpm = RealFpm::builder("blue").workers(2).start().await;
    assert_eq!(fpm.pids().len(), 2);
    assert_eq!(fpm.ask("/hello.php", "").await.unwrap().text(), "blue hello\n");
    assert_eq!(fpm.status().await.unwrap()["total processes"], 2);
    let big = fpm.ask("/big.php", "mib=3").await.unwrap();
    pattern::check(big.body(), 3 << 20).unwrap();
    let front: serde_json::Value = serde_json::from_slice(fpm.ask("/index.php", "a=b").await.unwrap().body()).unwrap();
    assert_eq!((front["colour"].as_str(), front["query"].as_str(), front["length"].as_u64()), (Some("blue"), Some("a=b"), Some(0)));
    for (script, query, text) in [
        ("/burn.php", "ms=5", "blue burned some\n"),
        ("/socket.php", "ms=5", "blue waited\n"),
        ("/flush.php", "ms=5", "first\nsecond\n"),
        ("/finish.php", "ms=5", "blue finished\n"),
        ("/sse.php", "n=2&ms=1", "id: 0\ndata: blue\n\nid: 1\ndata: blue\n\n"),
        ("/stderr.php", "lines=3&bytes=2000", "first\nsecond\n"),
        ("/headers.php", "status=404", "status 404\n"),
    ] {
        let answer = fpm.ask(script, query).await.unwrap();
        assert_eq!(answer.text(), text, "{script}");
        assert_eq!(answer.header("X-Colour").as_deref(), Some("blue"), "{script}");
        assert_eq!(answer.stderr.is_empty(), script != "/stderr.php", "{script}: {}", String::from_utf8_lossy(&answer.stderr));
    }
    for status in [204, 304] {
        let answer = fpm.ask("/headers.php", &format!("status={status}")).await.unwrap();
        assert_eq!((answer.status(), answer.body()), (status, &b""[..]));
    }
    let params = [
        ("REQUEST_METHOD", "POST"),
        ("SCRIPT_FILENAME", &format!("{}/upload.php", fpm.docroot().display())),
        ("CONTENT_TYPE", "application/octet-stream"),
        ("HTTP_X_LEDGER_ID", "once"),
    ];
    let body = pattern::pattern(300_001);
    let answer = fastcgi::ask(fpm.address(), &params, &body).await.unwrap();
    let json: serde_json::Value = serde_json::from_slice(answer.body()).unwrap();
    assert_eq!(json, serde_json::json!({"colour": "blue", "ledger_id": "once", "length": 300_001, "sha1": sha1::hex(&body)}));
    assert_eq!(fpm.executions("once"), 1);
    for when in ["before", "after"] {
        let error = fpm.ask("/crash.php", &format!("when={when}")).await.unwrap_err();
        assert!(matches!(error.kind(), std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset), "{error}");
    }
    assert_eq!(fpm.ask("/crash.php", "when=exit").await.unwrap().body().len(), 2048);

    fpm.restart().await;
    let before = fpm.pids();
    fpm.kill_worker(0);
    fpm.wait_ready().await;
    assert_ne!(fpm.pids(), before);
    // A running request is finished after QUIT, and only then does FPM end.
    let docroot = fpm.docroot().display().to_string();
    let address = fpm.address().clone();
    let running = tokio::spawn(async move {
        let params = fastcgi::script_params(&docroot, "/socket.php", "ms=300");
        let params: Vec<(&str, &str)> = params.iter().map(|(name, value)| (*name, value.as_str())).collect();
        fastcgi::ask(&address, &params, b"").await
    });
    let begun = fpm.journal().len();
    within(10 * SECOND, "the script to begin", async {
        while fpm.journal().len() == begun {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    fpm.quit();
    assert_eq!(running.await.unwrap().unwrap().text(), "blue waited\n");
    assert_eq!(fpm.wait_exit().await, 0);
    assert!(fpm.ask("/hello.php", "").await.is_err());
    fpm.restart().await;
    assert_eq!(fpm.ask("/hello.php", "").await.unwrap().text(), "blue hello\n");
}

#[tokio::test]
async fn real_fpm_listens_on_a_unix_socket_and_dies_with_its_handle() {
    let fpm = RealFpm::builder("green").pm(Pm::OnDemand(3)).unix().status_listen().start().await;
    assert!(fpm.address().to_string().starts_with("unix:/"));
    assert_eq!(fpm.ask("/hello.php", "").await.unwrap().text(), "green hello\n");
    assert_eq!(fpm.status().await.unwrap()["process manager"], "ondemand");
    let pids = fpm.pids();
    drop(fpm);
    for pid in pids {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
    }
}

// ---------------------------------------------------------------- HTTP, and a toy that is as wrong as it is told

/// How the toy ends an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Toy {
    Right,
    CutsBodies,
    ResetsInstead,
    WrongByte,
    AnswersTheOther,
    ClosesIdle,
    SaysClose,
    Silent,
    Fails,
    TalksUnasked,
}

struct ToyServer {
    address: SocketAddr,
    mood: watch::Sender<Toy>,
}

impl ToyServer {
    async fn start(mood: Toy) -> ToyServer {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mood = watch::Sender::new(mood);
        let moods = mood.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                tokio::spawn(toy(stream, moods.clone()));
            }
        });
        ToyServer { address, mood }
    }
}

async fn toy(mut stream: TcpStream, moods: watch::Sender<Toy>) {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            match stream.read_buf(&mut buffer).await {
                Ok(1..) => {}
                _ => return,
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
        let value = |name: &str| {
            let found = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            found.unwrap_or_default().to_owned()
        };
        let length: usize = value("Content-Length").parse().unwrap_or(0);
        while buffer.len() < end + length {
            match stream.read_buf(&mut buffer).await {
                Ok(1..) => {}
                _ => return,
            }
        }
        let body = buffer[end..end + length].to_vec();
        buffer.drain(..end + length);
        let mut id = value("X-Ledger-ID");
        let mut text = match head.split(' ').nth(1) {
            Some("/hello.php") => "blue hello\n".to_owned(),
            Some("/healthz") => "ok\n".to_owned(),
            _ => serde_json::json!({"colour": "blue", "ledger_id": id, "length": length, "sha1": sha1::hex(&body)}).to_string(),
        };
        let said = text.len();
        let mood = *moods.borrow();
        let (mut status, mut more) = ("200 OK", "");
        match mood {
            Toy::CutsBodies => text.truncate(said - 1),
            Toy::WrongByte => text = text.replace("lo\n", "l0\n").replace("length\":", "length\":1"),
            Toy::AnswersTheOther => id += "0",
            Toy::SaysClose => more = "Connection: close\r\n",
            Toy::Fails => status = "503 Service Unavailable",
            Toy::ResetsInstead => {
                let _ = stream.set_zero_linger();
                return;
            }
            Toy::Silent => return std::future::pending().await,
            Toy::Right | Toy::ClosesIdle | Toy::TalksUnasked => {}
        }
        let said = if mood == Toy::WrongByte { text.len() } else { said };
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {said}\r\nX-Colour: blue\r\nX-Ledger-ID: {id}\r\n{more}\r\n");
        if stream.write_all(format!("{head}{text}").as_bytes()).await.is_err() {
            return;
        }
        if mood == Toy::TalksUnasked {
            let _ = stream.write_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n").await;
        }
        if matches!(mood, Toy::CutsBodies | Toy::ClosesIdle | Toy::SaysClose) {
            return;
        }
    }
}

async fn one_each(mood: Toy) -> Ledger {
    let toy = ToyServer::start(mood).await;
    let ledger = Ledger::new();
    let mut held = None;
    for shape in Shape::mix() {
        ledger.send(toy.address, &mut held, &shape, Duration::from_millis(200)).await;
        tokio::time::sleep(Duration::from_millis(5)).await; // What the toy does unasked gets here.
    }
    ledger
}

#[tokio::test]
async fn ledger_tells_every_way_to_fail() {
    let figures = async |mood| {
        let summary = one_each(mood).await.summary();
        [
            summary.failed,
            summary.resets,
            summary.early_ends,
            summary.bad_bodies,
            summary.timeouts,
            summary.reconnects,
            summary.unasked,
        ]
    };
    assert_eq!(figures(Toy::Right).await, [0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(figures(Toy::CutsBodies).await, [3, 0, 3, 0, 0, 0, 0]);
    assert_eq!(figures(Toy::ResetsInstead).await, [3, 3, 0, 0, 0, 0, 0]);
    assert_eq!(figures(Toy::WrongByte).await, [3, 0, 0, 3, 0, 0, 0]);
    assert_eq!(figures(Toy::AnswersTheOther).await, [3, 0, 0, 3, 0, 0, 0]);
    assert_eq!(figures(Toy::ClosesIdle).await, [0, 0, 0, 0, 0, 2, 0]);
    assert_eq!(figures(Toy::SaysClose).await, [0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(figures(Toy::Silent).await, [3, 0, 0, 0, 3, 0, 0]);
    assert_eq!(figures(Toy::Fails).await, [3, 0, 0, 0, 0, 0, 0]);
    assert_eq!(figures(Toy::TalksUnasked).await, [0, 0, 0, 0, 0, 0, 2]);
    let refused = Ledger::new();
    let nobody = support::ports::refused_address();
    assert_eq!(refused.send(nobody, &mut None, &Shape::get("/", Expect::Anything), SECOND).await, Outcome::Refused);
}

#[tokio::test]
async fn ledger_client_runs_until_it_is_stopped() {
    let toy = ToyServer::start(Toy::Right).await;
    let client = LedgerClient::builder(toy.address).connections(4).start();
    client.ledger().wait_entries(200).await;
    let ledger = client.stop().await;
    ledger.assert_clean();
    let summary = ledger.summary();
    assert_eq!(summary.colours["blue"], summary.requests);
    assert_eq!(ledger.entries().iter().filter(|entry| !entry.reused).count(), 4);
    assert_eq!(ledger.wrong_colour_since(ledger.entries()[0].started, "green").len(), summary.requests);
    let ids: std::collections::BTreeSet<String> = ledger.entries().into_iter().map(|entry| entry.id).collect();
    assert_eq!(ids.len(), summary.requests);
}

#[tokio::test]
async fn relay_delays_and_passes_resets_on() {
    let toy = ToyServer::start(Toy::Right).await;
    let relay = Relay::start(toy.address).await;
    let mut connection = Connection::open(relay.address()).await.unwrap();
    let begun = Instant::now();
    assert_eq!(connection.get("/hello.php").await.unwrap().text(), "blue hello\n");
    assert!(begun.elapsed() >= Duration::from_millis(45), "SYN, request and answer: {:?}", begun.elapsed());
    let body = pattern::pattern(3_000_000);
    let answer = connection.exchange("POST", &http::request("POST", "/upload.php", &[], &body)).await.unwrap();
    assert_eq!(answer.json()["sha1"], sha1::hex(&body));

    let ledger = Ledger::new();
    toy.mood.send_replace(Toy::ResetsInstead);
    assert_eq!(ledger.send(relay.address(), &mut None, &Shape::get("/", Expect::Anything), SECOND).await, Outcome::Reset);
    let nobody = Relay::start(support::ports::refused_address()).await;
    let outcome = ledger.send(nobody.address(), &mut None, &Shape::get("/", Expect::Anything), SECOND).await;
    assert_eq!(outcome, Outcome::Reset);
}

#[tokio::test]
async fn relay_loses_the_request_that_crosses_an_idle_close() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let relay = Relay::start(listener.local_addr().unwrap()).await;
    let mut client = Connection::open(relay.address()).await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    client.send(http::request("GET", "/", &[], &[])).await.unwrap();
    let mut request = vec![0; 1024];
    server.read(&mut request).await.map(|n| assert!(n > 0)).unwrap();
    server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    client.read_response("GET").await.unwrap();
    drop(server); // Its FIN is under way for 15 ms.
    assert!(!client.peer_has_closed());
    let lost = client.get("/").await.unwrap_err();
    assert!(lost.is_unanswered() || lost.is_reset(), "{lost}");
}

#[tokio::test]
async fn load_balancer_notices_late_and_goes_on_sending() {
    let toy = ToyServer::start(Toy::Right).await;
    let every = Duration::from_millis(50);
    let lag = Duration::from_millis(300);
    let balancer = LoadBalancer::builder(toy.address)
        .checks(every, 2, 2)
        .lag(lag)
        .clients(4)
        .pause(Duration::from_millis(5))
        .shapes(vec![Shape::get("/hello.php", Expect::Hello)])
        .start();
    balancer.ledger().wait_entries(20).await;
    assert_eq!(balancer.service(0), Service::Serving);
    balancer.ledger().assert_clean();
    let failing = balancer.checks(0).len();
    toy.mood.send_replace(Toy::Fails);
    balancer.wait_leaving(0).await;
    let Service::Leaving(since) = balancer.service(0) else { panic!("{:?}", balancer.service(0)) };
    let failed = balancer.checks(0)[failing..].iter().filter(|(_, status)| *status == Some(503)).count();
    assert!(failed >= 2, "{:?}", balancer.checks(0));
    balancer.wait_out(0).await;
    assert!(since.elapsed() >= lag, "{:?}", since.elapsed());
    let late = balancer.ledger().entries().into_iter().filter(|entry| entry.started > since + lag / 3).count();
    assert!(late > 0, "it went on sending");
    toy.mood.send_replace(Toy::Right);
    balancer.ledger().wait_more(5).await;
    assert_eq!(balancer.service(0), Service::Serving, "two good checks bring it back");
    let ledger = balancer.stop().await;
    assert!(ledger.summary().statuses.contains_key(&503));
}

#[tokio::test]
async fn http_reads_every_framing_and_sees_early_ends() {
    let serve = async |bytes: &'static str| {
        let (client, mut server) = tokio::io::duplex(1 << 16);
        server.write_all(bytes.as_bytes()).await.unwrap();
        Connection::over(client)
    };
    let mut pipelined = serve(
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabHTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n\
         HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nX-T: 1\r\n\r\nHTTP/1.1 200 OK\r\nSet-Cookie: a\r\nset-cookie: b\r\n\r\nrest",
    )
    .await;
    let answers = pipelined.read_pipelined(&["GET", "GET", "GET", "GET"]).await.unwrap();
    assert_eq!(answers[0].interim, [100]);
    assert_eq!(answers.iter().map(|answer| answer.body.clone()).collect::<Vec<Bytes>>(), ["ab", "", "abcde", "rest"]);
    assert_eq!(
        answers.iter().map(|answer| answer.framing).collect::<Vec<_>>(),
        [Framing::ContentLength, Framing::None, Framing::Chunked, Framing::Eof]
    );
    assert_eq!(answers[2].trailers, [("X-T".to_owned(), "1".to_owned())]);
    assert_eq!(answers[3].header_all("Set-Cookie"), ["a", "b"]);
    assert!(answers[2].keeps_alive() && !answers[3].keeps_alive());
    for early in [
        "",
        "HTTP/1.1 200 OK\r\nContent-",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ] {
        match serve(early).await.read_response("GET").await {
            Err(error @ HttpError::EndedEarly { .. }) => {
                assert_eq!(error.is_unanswered(), early.is_empty())
            }
            other => panic!("{early:?}: {other:?}"),
        }
    }
    for wrong in [
        "SSH-2.0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n",
    ] {
        assert!(matches!(serve(wrong).await.read_response("GET").await, Err(HttpError::Malformed(_))), "{wrong:?}");
    }
}

#[tokio::test]
async fn http_sees_an_early_answer_to_a_body_nobody_reads() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = Connection::open(listener.local_addr().unwrap()).await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    server.write_all(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    let request = http::request("POST", "/", &[], &pattern::pattern(12 << 20));
    let answer = within(10 * SECOND, "the early answer", client.exchange("POST", &request)).await.unwrap();
    assert_eq!((answer.status, answer.sent_whole, answer.keeps_alive()), (413, false, false));
}

#[test]
fn digests_and_patterns_are_right() {
    assert_eq!(sha1::hex(b"abc"), "a9993e364706816aba3e25717850c26c9cd0d89d");
    assert_eq!(sha1::hex(b""), "da39a3ee5e6b4b0d3255bfef95601890afd80709");
    assert_eq!(sha1::hex("a".repeat(1_000_000).as_bytes()), "34aa973cd4c4daa4f61eeb2bdbad27316534016f", "of FIPS 180");
    let bytes = pattern::pattern(10_000);
    pattern::check(&bytes, 10_000).unwrap();
    assert!(pattern::check(&bytes[1..], 9_999).is_err());
    assert!(pattern::check(&bytes[..9_999], 10_000).is_err());
    let mut swapped = bytes.to_vec();
    swapped[..8192].rotate_left(4096);
    assert!(pattern::check(&swapped, 10_000).is_err());
}
