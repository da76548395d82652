//! The HTTP side: limits with a status that the client really sees, framing by the RFCs, and what PHP receives.

mod support;

use std::{process::Command, time::Duration};

use support::{
    http::{self, Connection},
    process::Slackwater,
    scripted_fpm::{Behaviour, ScriptedFpm},
};
use tokio::net::TcpStream;

async fn start(listen: &str) -> (ScriptedFpm, Slackwater) {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let toml = format!(
        r#"
        workers = 1
        [listen]
        http = ["{{HTTP}}"]
        ops = "{{OPS}}"
        admin = "{{ADMIN}}"
        {listen}
        [upstream.php]
        workers_per_endpoint = 4
        [upstream.php.set.blue]
        endpoints = ["{}"]
        [[site]]
        php_root = "/app"
        upstream = "php"
        body_limit = "1MiB"
        "#,
        fpm.address()
    );
    let proxy = Slackwater::start(&toml).await;
    (fpm, proxy)
}

async fn raw(proxy: &Slackwater, request: impl AsRef<[u8]>) -> http::Response {
    let mut connection = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    // The server may answer and close before all of it is sent.
    let _ = connection.send(request).await;
    connection.read_response("GET").await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_is_told_and_the_client_sees_it() {
    let (fpm, proxy) = start("").await;
    let long = "a".repeat(20_000);
    let endless = "a".repeat(400_000);
    let big_header = format!("GET / HTTP/1.1\r\nHost: a\r\nX-Long: {}\r\n\r\n", "b".repeat(70_000));
    let many = (0..3000).map(|i| format!("X-{i}: {}\r\n", "c".repeat(40))).collect::<String>();
    let declared = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n\r\n{}", "d".repeat(3_000_000));
    for (request, status) in [
        (format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n"), 414),
        (format!("GET /{endless} HTTP/1.1\r\nHost: a\r\n\r\n"), 414),
        (big_header, 431),
        (format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n"), 431),
        (declared, 413),
    ] {
        assert_eq!(raw(&proxy, &request).await.status, status, "{}...", &request[..40]);
    }
    assert!(fpm.requests().is_empty(), "none of it may reach PHP");
    let metrics = proxy.metrics().await;
    for cause in ["uri_too_long", "headers_too_large", "body_too_large"] {
        assert!(metrics.contains(&format!("slackwater_errors_total{{cause=\"{cause}\"}}")), "{cause} is not counted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_of_their_own_for_head_idle_and_body() {
    let (_fpm, proxy) = start("header_timeout = \"500ms\"\nidle_timeout = \"1s\"\nstall_timeout = \"700ms\"").await;
    assert_eq!(raw(&proxy, "GET / HTTP/1.1\r\nHost: ").await.status, 408);
    assert_eq!(raw(&proxy, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc").await.status, 408);
    let mut idle = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    assert_eq!(idle.get("/index.php").await.unwrap().status, 200);
    assert_eq!(idle.wait_closed(Duration::from_secs(15)).await, Ok(true), "an idle connection ends by FIN");
    let mut silent = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    assert_eq!(silent.wait_closed(Duration::from_secs(15)).await, Ok(true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_was_parked_goes_on() {
    let (fpm, proxy) = start("idle_timeout = \"2s\"").await;
    let mut client = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    // Longer than it takes to be parked: before its first request, and between requests.
    let pause = Duration::from_millis(300);
    for _ in 0..3 {
        tokio::time::sleep(pause).await;
        assert_eq!(client.get("/index.php").await.unwrap().status, 200);
        // Two at once, and a body behind a head that came alone.
        client.send("GET /index.php HTTP/1.1\r\nHost: a\r\n\r\nGET /index.php HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        for answer in client.read_pipelined(&["GET", "GET"]).await.unwrap() {
            assert_eq!(answer.status, 200);
        }
        client.send("POST /index.php HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n").await.unwrap();
        tokio::time::sleep(pause).await;
        client.send("hi").await.unwrap();
        assert_eq!(client.read_response("POST").await.unwrap().status, 200);
    }
    // A byte at a time, across the time after which an idle one is parked.
    tokio::time::sleep(pause).await;
    client.send("G").await.unwrap();
    tokio::time::sleep(pause).await;
    assert_eq!(client.exchange("GET", b"ET /index.php HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap().status, 200);
    assert_eq!(fpm.requests().len(), 13);
    // Parked, it still ends after idle_timeout.
    assert_eq!(client.wait_closed(Duration::from_secs(20)).await, Ok(true));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_with_a_request_before_a_pause_is_the_beginning_of_the_next_one() {
    let (fpm, proxy) = start("header_timeout = \"1s\"\nidle_timeout = \"60s\"").await;
    let get = "GET /index.php HTTP/1.1\r\nHost: a\r\n\r\n";
    let pause = Duration::from_millis(300);
    // A stray line behind a body is nobody's request.
    let mut stray = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    let post = "POST /index.php HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi\r\n";
    assert_eq!(stray.exchange("POST", post.as_bytes()).await.unwrap().status, 200);
    // Part of a head is: it has the deadline of one.
    let mut begun = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    assert_eq!(begun.exchange("GET", format!("{get}G").as_bytes()).await.unwrap().status, 200);
    let mut goes_on = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    assert_eq!(goes_on.exchange("GET", format!("{get}G").as_bytes()).await.unwrap().status, 200);
    tokio::time::sleep(pause).await;
    assert_eq!(goes_on.exchange("GET", &get.as_bytes()[1..]).await.unwrap().status, 200);
    assert_eq!(begun.read_response("GET").await.unwrap().status, 408);
    assert_eq!(stray.exchange("GET", get.as_bytes()).await.unwrap().status, 200);
    assert_eq!(fpm.requests().len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_follows_the_last_answer_is_not_a_request() {
    let (fpm, proxy) = start("").await;
    let post = "POST /index.php HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n";
    for rest in [format!("{post}\r\nhi"), "GET /index.php HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()] {
        let mut client = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
        let last = format!("{post}Connection: close\r\n\r\nhi");
        assert_eq!(client.exchange("POST", last.as_bytes()).await.unwrap().status, 200);
        let before = fpm.requests().len();
        // It lingers for what is on its way, and throws it away.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let _ = client.send(&rest).await;
        let _ = client.wait_closed(Duration::from_secs(20)).await;
        // A request on another connection comes after whatever was made of it.
        assert_eq!(http::get(proxy.http(), "/index.php").await.unwrap().status, 200);
        assert_eq!(fpm.requests().len(), before + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_get_the_status_of_the_rfc() {
    let (fpm, proxy) = start("").await;
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nhello", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
        ("GET /config.php.bak HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        ("GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /index.php%0a/x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        ("GET /x.php HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        ("GET /upload.jpg/x.php HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        ("GET /.env HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        ("nonsense\r\n\r\n", 400),
    ] {
        let answer = raw(&proxy, request).await;
        assert_eq!(answer.status, status, "{request:?}");
        // What comes behind something malformed is not read as a request.
        assert!(status != 400 || !answer.keeps_alive() || !request.starts_with("POST"), "{request:?}");
    }
    assert!(
        fpm.requests().is_empty(),
        "none of it may reach PHP: {:?}",
        fpm.requests().iter().map(|r| r.uri()).collect::<Vec<_>>()
    );
    assert_eq!(raw(&proxy, "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n").await.status, 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn php_receives_what_the_request_says_and_nothing_that_it_forges() {
    let (fpm, proxy) = start("").await;
    let request = "POST http://real.example:81/a/b?q=1 HTTP/1.1\r\nHost: other\r\nTransfer-Encoding: chunked\r\nProxy: http://evil\r\n\
                   X_Forwarded_For: 9.9.9.9\r\nX-Forwarded-Proto: https\r\nAuthorization: Basic eDp5\r\nCookie: a=1\r\nCookie: b=2\r\n\r\n\
                   3\r\nabc\r\n2\r\nde\r\n0\r\nTrailer-A: x\r\n\r\n";
    assert_eq!(raw(&proxy, request).await.status, 200);
    let received = &fpm.requests()[0];
    let param = |name: &str| received.param(name);
    assert_eq!(&received.body[..], b"abcde");
    for (name, want) in [
        ("CONTENT_LENGTH", "5"),
        ("SCRIPT_FILENAME", "/app/index.php"),
        ("SCRIPT_NAME", "/index.php"),
        ("DOCUMENT_ROOT", "/app"),
        ("REQUEST_URI", "/a/b?q=1"),
        ("QUERY_STRING", "q=1"),
        ("HTTP_HOST", "real.example:81"),
        ("HTTP_AUTHORIZATION", "Basic eDp5"),
        ("HTTP_COOKIE", "a=1; b=2"),
        ("REDIRECT_STATUS", "200"),
        ("REMOTE_ADDR", "127.0.0.1"),
    ] {
        assert_eq!(param(name).as_deref(), Some(want), "{name}");
    }
    for name in ["HTTP_PROXY", "HTTPS", "HTTP_TRANSFER_ENCODING", "HTTP_TRAILER_A"] {
        assert_eq!(param(name), None, "{name}");
    }
    // Both lengths: the chunks count, and the connection ends (RFC 9112, section 6.3).
    let both = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    let answer = raw(&proxy, both).await;
    assert_eq!((answer.status, answer.keeps_alive()), (200, false));
    assert_eq!(&fpm.requests()[1].body[..], b"abc");
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_trusted_load_balancer_its_headers_count() {
    let (fpm, proxy) = start("trusted_proxies = [\"127.0.0.0/8\", \"10.0.0.0/8\"]").await;
    let headers = [
        ("X-Forwarded-For", "1.1.1.1, 203.0.113.7, 10.1.2.3"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Port", "443"),
        ("X-Request-ID", "lb-42"),
    ];
    let answer = http::send(proxy.http(), "GET", "/", &headers, b"").await.unwrap();
    assert_eq!(answer.header("x-request-id"), Some("lb-42"));
    let received = &fpm.requests()[0];
    for (name, want) in [
        ("REMOTE_ADDR", "203.0.113.7"),
        ("HTTPS", "on"),
        ("SERVER_PORT", "443"),
        ("HTTP_X_REQUEST_ID", "lb-42"),
        ("REQUEST_SCHEME", "https"),
    ] {
        assert_eq!(received.param(name).as_deref(), Some(want), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keep_alive_pipelining_head_and_continue() {
    let (fpm, proxy) = start("").await;
    let mut connection = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    connection
        .send("GET /1 HTTP/1.1\r\nHost: a\r\n\r\nHEAD /2 HTTP/1.1\r\nHost: a\r\n\r\nGET /3 HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    let answers = connection.read_pipelined(&["GET", "HEAD", "GET"]).await.unwrap();
    assert_eq!(
        answers.iter().map(|a| (a.status, a.text())).collect::<Vec<_>>(),
        [(200, "blue hello\n".to_owned()), (200, String::new()), (200, "blue hello\n".to_owned())]
    );
    connection.send("POST /4 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n").await.unwrap();
    connection.send("ok").await.unwrap();
    let answer = connection.read_response("POST").await.unwrap();
    assert_eq!((answer.status, answer.interim.len()), (200, 1), "100 Continue comes first");
    assert_eq!(fpm.requests().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_by_prior_knowledge() {
    let (fpm, proxy) = start("max_header_bytes = \"16KiB\"").await;
    let url = |path: &str| format!("http://{}{path}", proxy.http());
    let curl =
        |args: &[&str]| Command::new("curl").args(["-s", "--http2-prior-knowledge", "-m", "20"]).args(args).output().unwrap();
    let answer = curl(&["-w", " %{http_code} %{http_version}", "-d", "hello", &url("/index.php")]);
    assert_eq!(String::from_utf8_lossy(&answer.stdout), "blue hello\n 200 2");
    assert_eq!(&fpm.requests()[0].body[..], b"hello");
    for (path, header, status) in [
        (format!("/{}", "a".repeat(20_000)), "X-A: b".to_owned(), "414"),
        ("/".to_owned(), format!("X-A: {}", "b".repeat(30_000)), "431"),
    ] {
        let answer = curl(&["-o", "/dev/null", "-w", "%{http_code}", "-H", &header, &url(&path)]);
        assert_eq!(String::from_utf8_lossy(&answer.stdout), status);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_and_requests_have_caps() {
    let (_fpm, proxy) = start("max_connections_per_address = 2\nmax_requests_per_connection = 2").await;
    let mut first = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    let mut second = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    assert!(first.get("/index.php").await.unwrap().keeps_alive());
    assert!(second.get("/index.php").await.unwrap().keeps_alive());
    let mut third = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    assert!(third.get("/index.php").await.is_err(), "a third connection of one address was served");
    assert!(!first.get("/index.php").await.unwrap().keeps_alive(), "the second request is the last");
    drop(first);
    // Its place is free once the proxy has seen it close.
    let mut again = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    while again.get("/index.php").await.is_err() {
        again = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    }

    // A trusted proxy is exempt: it stands for many.
    let (_fpm, proxy) = start("max_connections_per_address = 1\ntrusted_proxies = [\"127.0.0.0/8\"]").await;
    let mut many = Vec::new();
    for _ in 0..3 {
        let mut connection = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
        assert_eq!(connection.get("/index.php").await.unwrap().status, 200);
        many.push(connection);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_max_connections_new_ones_wait_and_are_served_when_there_is_room() {
    let (_fpm, proxy) = start("max_connections = 2").await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut connection = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
        assert_eq!(connection.get("/index.php").await.unwrap().status, 200);
        held.push(connection);
    }
    let mut waiting = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    waiting.send("GET /index.php HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    proxy.wait_for_log("max_connections reached", Duration::from_secs(20)).await;
    assert_eq!(proxy.metric(&["slackwater_connections "]).await, Some(2.0));
    drop(held);
    assert_eq!(waiting.read_response("GET").await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_hyper_refuses_is_logged_and_counted_as_a_request_is() {
    let (_fpm, proxy) = start("header_timeout = \"300ms\"").await;
    for (request, status, cause) in [
        ("nonsense\r\n\r\n", 400, "bad_request"),
        ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400, "bad_request"),
        ("GET / HTTP/1.1\r\nHost: ", 408, "head_timeout"),
    ] {
        let before = proxy.metric(&["slackwater_errors_total", cause]).await.unwrap_or(0.0);
        let skip = proxy.log().len();
        assert_eq!(raw(&proxy, request).await.status, status);
        let line = proxy.wait_for_log_after(skip, &format!("\"cause\":\"{cause}\""), Duration::from_secs(20)).await;
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert!(line["method"].is_null() && line["id"].is_string(), "{line}");
        assert_eq!((&line["status"], &line["remote_addr"]), (&status.into(), &"127.0.0.1".into()));
        assert_eq!(proxy.metric(&["slackwater_errors_total", cause]).await, Some(before + 1.0));
    }
}

/// An HTTP/2 client with so small a window for each stream.
async fn h2(proxy: &Slackwater, window: u32) -> h2::client::SendRequest<bytes::Bytes> {
    let stream = TcpStream::connect(proxy.http()).await.unwrap();
    let (client, connection) = h2::client::Builder::new().initial_window_size(window).handshake(stream).await.unwrap();
    tokio::spawn(connection);
    client
}

fn h2_get(path: &str) -> ::http::Request<()> {
    ::http::Request::get(format!("http://example.com{path}")).body(()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stalls_loses_its_connection_on_http1_and_its_stream_on_http2() {
    let (fpm, proxy) = start("stall_timeout = \"700ms\"\nmin_rate = \"0B\"").await;
    fpm.on("/big", Behaviour::big_body(32 << 20));
    let mut reader = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    reader.send("GET /big HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    proxy.wait_for_log("reads too slowly; connection closed", Duration::from_secs(20)).await;
    let error = reader.read_response("GET").await.unwrap_err();
    assert!(!error.to_string().contains("malformed"), "{error}");

    let mut client = h2(&proxy, 1000).await;
    let (stalled, _) = client.send_request(h2_get("/big"), true).unwrap();
    let mut stalled = stalled.await.unwrap().into_body();
    proxy.wait_for_log("reads too slowly; stream reset", Duration::from_secs(20)).await;
    let end = loop {
        match stalled.data().await.expect("the answer looked whole") {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(end.is_reset(), "{end}");
    // The connection goes on.
    let (answer, _) = client.send_request(h2_get("/index.php"), true).unwrap();
    let mut body = answer.await.unwrap().into_body();
    assert_eq!(body.data().await.unwrap().unwrap(), "blue hello\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_http2_reader_that_goes_on_gets_every_byte() {
    let (fpm, proxy) = start("stall_timeout = \"2s\"").await;
    fpm.on("/big", Behaviour::big_body(3 << 20));
    let mut client = h2(&proxy, 64 << 10).await;
    let (answer, _) = client.send_request(h2_get("/big"), true).unwrap();
    let mut body = answer.await.unwrap().into_body();
    let (mut got, mut taken) = (Vec::new(), 0);
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        got.extend_from_slice(&data);
        taken += data.len();
        // Slower than the stall time-out in all, never in one piece.
        if taken >= 32 << 10 {
            tokio::time::sleep(Duration::from_millis(40)).await;
            body.flow_control().release_capacity(std::mem::take(&mut taken)).unwrap();
        }
    }
    support::pattern::check(&got, 3 << 20).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_connection_ends_in_order_after_its_last_request_and_when_idle() {
    let (_fpm, proxy) = start("max_requests_per_connection = 2\nidle_timeout = \"500ms\"").await;
    let mut client = h2(&proxy, 1 << 16).await;
    for _ in 0..2 {
        let (answer, _) = client.send_request(h2_get("/index.php"), true).unwrap();
        assert_eq!(answer.await.unwrap().status(), 200);
    }
    // GOAWAY: the client is told, nothing is cut.
    let refused = loop {
        match client.clone().ready().await {
            Ok(mut ready) => match ready.send_request(h2_get("/index.php"), true) {
                Ok((answer, _)) => match answer.await {
                    Ok(answer) => assert_eq!(answer.status(), 200),
                    Err(error) => break error,
                },
                Err(error) => break error,
            },
            Err(error) => break error,
        }
    };
    assert!(refused.is_go_away() || refused.is_io() || refused.reason() == Some(h2::Reason::NO_ERROR), "{refused:?}");

    let stream = TcpStream::connect(proxy.http()).await.unwrap();
    let (_client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), connection).await.expect("an idle connection stays open").unwrap();
}
