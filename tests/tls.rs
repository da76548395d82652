//! TLS, and the PROXY protocol before it: who gets which certificate, what a renewal does to open connections, whose address counts.

mod support;

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{
    ClientConfig, HandshakeKind, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use support::{
    gate::eventually,
    http::{self, Connection},
    process::Slackwater,
    scripted_fpm::{Behaviour, ScriptedFpm},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// A certificate of its own authority, as `NAME.crt` and `NAME.key`.
fn make(folder: &Path, name: &str, hosts: &[&str]) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(hosts.iter().map(|host| (*host).to_owned()).collect::<Vec<_>>()).unwrap();
    // Under another name first: whoever looks sees the old file or the new one.
    for (ending, text) in [("key", made.signing_key.serialize_pem()), ("crt", made.cert.pem())] {
        let path = folder.join(format!("{name}.{ending}"));
        std::fs::write(path.with_extension("new"), text).unwrap();
        std::fs::rename(path.with_extension("new"), path).unwrap();
    }
    made.cert.der().clone()
}

fn client(trusted: &[&CertificateDer<'static>], alpn: &[&str]) -> Arc<ClientConfig> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut roots = RootCertStore::empty();
    for certificate in trusted {
        roots.add((*certificate).clone()).unwrap();
    }
    let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    // A session that goes on shows the certificate that it began with.
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}

async fn connect(address: std::net::SocketAddr, config: &Arc<ClientConfig>, name: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(address).await?;
    TlsConnector::from(config.clone()).connect(ServerName::try_from(name.to_owned()).unwrap(), tcp).await
}

fn shown(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

async fn get(stream: TlsStream<TcpStream>, host: &str, path: &str) -> http::Response {
    let mut connection = Connection::over(stream);
    connection.exchange("GET", &http::request("GET", path, &[("Host", host)], b"")).await.unwrap()
}

fn toml(fpm: &ScriptedFpm, listen: &str, more: &str) -> String {
    format!(
        r#"
        [listen]
        ops = "{{OPS}}"
        admin = "{{ADMIN}}"
        {listen}
        [upstream.php.set.blue]
        endpoints = ["{}"]
        [[site]]
        php_root = "/app"
        upstream = "php"
        {more}
        "#,
        fpm.address()
    )
}

const BOTH: &str = "http = [\"{HTTP}\"]\nhttps = [\"{HTTPS}\"]";

fn certificate(folder: &Path, name: &str) -> String {
    format!("[[tls]]\ncertificate = \"{0}/{name}.crt\"\nkey = \"{0}/{name}.key\"\n", folder.display())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_name_chooses_the_certificate_and_alpn_the_protocol() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let one = make(folder.path(), "one", &["one.example", "localhost"]);
    let wild = make(folder.path(), "wild", &["*.two.example"]);
    let tls = certificate(folder.path(), "one") + &certificate(folder.path(), "wild");
    let proxy = Slackwater::start(&toml(&fpm, BOTH, &tls)).await;
    let config = client(&[&one, &wild], &["http/1.1"]);
    for (name, wanted) in [("one.example", &one), ("a.two.example", &wild), ("A.TWO.example", &wild)] {
        let stream = connect(proxy.https(), &config, name).await.unwrap();
        assert!(shown(&stream) == *wanted, "{name}");
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"http/1.1".as_slice()));
        assert_eq!(get(stream, name, "/x").await.text(), "blue hello\n");
    }
    // PHP knows, and so does a redirect.
    let request = &fpm.requests()[0];
    assert_eq!((request.param("HTTPS").as_deref(), request.param("REQUEST_SCHEME").as_deref()), (Some("on"), Some("https")));
    // Who asks for another name gets the first, which it does not take.
    for name in ["b.c.two.example", "three.example"] {
        let refused = connect(proxy.https(), &config, name).await.unwrap_err();
        assert!(refused.to_string().contains("not valid for name"), "{refused}");
    }
    // HTTP/2 where the client offers it; a client without ALPN is taken for what it speaks.
    let h2 = connect(proxy.https(), &client(&[&one], &["h2", "http/1.1"]), "one.example").await.unwrap();
    assert_eq!(h2.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
    let (mut send, connection) = h2::client::handshake(h2).await.unwrap();
    tokio::spawn(connection);
    let request = ::http::Request::get("https://one.example/h2").body(()).unwrap();
    let answer = send.send_request(request, true).unwrap().0.await.unwrap();
    assert_eq!(answer.status(), 200);
    let plain = connect(proxy.https(), &client(&[&one], &[]), "one.example").await.unwrap();
    assert_eq!(get(plain, "one.example", "/x").await.status, 200);
    // In clear on that port: no answer that could be taken for one.
    let mut clear = TcpStream::connect(proxy.https()).await.unwrap();
    clear.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = clear.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP/"), "{}", answer.escape_ascii());
    assert!(proxy.metric(&["slackwater_certificate_expiry_timestamp_seconds", "one.crt"]).await.unwrap() > 1.7e9);

    // curl, with every version that there is, and none that there should not be.
    let curl = async |args: &[&str]| {
        let url = format!("https://localhost:{}/curl", proxy.https().port());
        let resolve = format!("localhost:{}:{}", proxy.https().port(), proxy.https().ip());
        let mut command = tokio::process::Command::new("curl");
        command.args(["-sS", "--max-time", "20", "--resolve", &resolve, "--cacert"]).arg(folder.path().join("one.crt"));
        command.args(["-w", "%{http_version} %{ssl_verify_result}"]).args(args).arg(&url);
        let out = command.output().await.expect("curl (tests/run installs it)");
        (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned())
    };
    for (args, version) in
        [(&["--http2"][..], "2"), (&["--http1.1"], "1.1"), (&["--tlsv1.2", "--tls-max", "1.2"], "2"), (&["--tlsv1.3"], "2")]
    {
        assert_eq!(curl(args).await, (true, format!("blue hello\n{version} 0")), "{args:?}");
    }
    for args in [&["--tls-max", "1.1"][..], &["--ciphers", "AES128-SHA:AES256-SHA:AES128-GCM-SHA256", "--tls-max", "1.2"]] {
        assert!(!curl(args).await.0, "{args:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_for_new_connections_and_a_wrong_one_for_none() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let first = make(folder.path(), "a", &["a.example"]);
    let proxy = Slackwater::start(&toml(&fpm, BOTH, &certificate(folder.path(), "a"))).await;
    let before = client(&[&first], &["http/1.1"]);
    let mut kept = Connection::over(connect(proxy.https(), &before, "a.example").await.unwrap());
    let request = http::request("GET", "/kept", &[("Host", "a.example")], b"");
    assert_eq!(kept.exchange("GET", &request).await.unwrap().status, 200);

    // A key of another certificate: said, with both files; what is there stays.
    let key = std::fs::read(folder.path().join("a.key")).unwrap();
    make(folder.path(), "b", &["a.example"]);
    std::fs::copy(folder.path().join("b.key"), folder.path().join("a.key")).unwrap();
    let line = proxy.wait_for_log("is not that of the certificate", Duration::from_secs(30)).await;
    assert!(line.contains("a.key") && line.contains("a.crt"), "{line}");
    let refused = proxy.cli(&["reload"]).await;
    assert!(!refused.status.success(), "a reload says so too");
    let good = async || proxy.metric(&["slackwater_config_last_reload_successful"]).await;
    assert_eq!(good().await, Some(0.0));
    let warnings = proxy.status().await["warnings"].to_string();
    assert!(warnings.contains("is not that of the certificate"), "{warnings}");
    assert!(shown(&connect(proxy.https(), &before, "a.example").await.unwrap()) == first);
    std::fs::write(folder.path().join("a.key"), key).unwrap();
    eventually("all is well again, and nobody had to reload", async || match good().await {
        Some(1.0) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    let warnings = proxy.status().await["warnings"].to_string();
    assert!(!warnings.contains("is not that of the certificate"), "{warnings}");

    // While clients come and go, none of them fails, whichever it is shown.
    let second = make(folder.path(), "c", &["a.example"]);
    let both = client(&[&first, &second], &["http/1.1"]);
    let since = Instant::now();
    for ending in ["key", "crt"] {
        std::fs::rename(folder.path().join(format!("c.{ending}")), folder.path().join(format!("a.{ending}"))).unwrap();
    }
    // Every second client comes back with the ticket that it was given.
    let mut back = (*both).clone();
    back.resumption = rustls::client::Resumption::in_memory_sessions(8);
    let back = Arc::new(back);
    let (mut asked, mut resumed, mut renewed) = (0, 0, None);
    while renewed.is_none_or(|at: Duration| since.elapsed() < at + Duration::from_millis(300)) {
        let stream = connect(proxy.https(), &both, "a.example").await.unwrap();
        if shown(&stream) == second {
            renewed.get_or_insert_with(|| since.elapsed());
        }
        assert_eq!(get(stream, "a.example", "/x").await.status, 200);
        let stream = connect(proxy.https(), &back, "a.example").await.unwrap();
        resumed += usize::from(stream.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed));
        assert_eq!(get(stream, "a.example", "/x").await.status, 200);
        asked += 2;
        assert!(since.elapsed() < Duration::from_secs(60), "it is never read");
    }
    println!("{asked} connections, {resumed} of them resumed, none failed; the new certificate after {renewed:?}");
    assert!(resumed > 10, "{resumed} of {asked}");
    assert_eq!(kept.exchange("GET", &request).await.unwrap().status, 200, "what is open goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_with_the_same_ticket_keys_resume_each_others_sessions() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let certificate_der = make(folder.path(), "a", &["a.example"]);
    std::fs::write(folder.path().join("tickets"), (0..80).collect::<Vec<u8>>()).unwrap();
    let shared = format!("{BOTH}\ntls_ticket_keys = [\"{}/tickets\"]", folder.path().display());
    let tls = certificate(folder.path(), "a");
    let (one, two) = (Slackwater::start(&toml(&fpm, &shared, &tls)).await, Slackwater::start(&toml(&fpm, &shared, &tls)).await);
    let alone = Slackwater::start(&toml(&fpm, BOTH, &tls)).await;
    let mut config = (*client(&[&certificate_der], &["http/1.1"])).clone();
    config.resumption = rustls::client::Resumption::in_memory_sessions(8);
    let config = Arc::new(config);
    let kind = async |proxy: &Slackwater| {
        let mut stream = connect(proxy.https(), &config, "a.example").await.unwrap();
        // Tickets of TLS 1.3 come with the first answer.
        stream.write_all(&http::request("GET", "/", &[("Host", "a.example"), ("Connection", "close")], b"")).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"));
        stream.get_ref().1.handshake_kind()
    };
    assert_eq!(kind(&one).await, Some(HandshakeKind::Full));
    assert_eq!(kind(&one).await, Some(HandshakeKind::Resumed));
    assert_eq!(kind(&two).await, Some(HandshakeKind::Resumed));
    assert_eq!(kind(&alone).await, Some(HandshakeKind::Full));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_has_a_deadline_and_a_site_may_be_for_https_alone() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), "a", &["a.example"]);
    let listen = format!("{BOTH}\nheader_timeout = \"500ms\"");
    let proxy = Slackwater::start(&toml(&fpm, &listen, &format!("https_only = true\n{}", certificate(folder.path(), "a")))).await;
    let mut silent = Connection::<TcpStream>::open(proxy.https()).await.unwrap();
    let since = Instant::now();
    assert!(silent.wait_closed(Duration::from_secs(20)).await.unwrap());
    println!("closed after {:?} (promised: 500 ms)", since.elapsed());
    assert!(since.elapsed() >= Duration::from_millis(450) && since.elapsed() < Duration::from_secs(5));
    let moved = http::send(proxy.http(), "GET", "/a%20b?c", &[("Host", "a.example:8080")], b"").await.unwrap();
    assert_eq!((moved.status, moved.header("location")), (301, Some("https://a.example/a%20b?c")));
    let posted = http::send(proxy.http(), "POST", "/a", &[("Host", "a.example")], b"x").await.unwrap();
    assert_eq!((posted.status, posted.header("location")), (308, Some("https://a.example/a")));
    let acme = http::send(proxy.http(), "GET", "/.well-known/acme-challenge/t", &[("Host", "a.example")], b"").await.unwrap();
    assert_eq!(acme.status, 200);
    assert_eq!(fpm.requests().len(), 1);
}

/// An address that turns from http to https, and one that comes: open connections go on.
#[tokio::test(flavor = "multi_thread")]
async fn listeners_turn_without_closing_a_connection() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let der = make(folder.path(), "a", &["a.example"]);
    let proxy = Slackwater::start(&toml(&fpm, "http = [\"{HTTP}\"]", "")).await;
    let mut kept = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    assert_eq!(kept.get("/a").await.unwrap().status, 200);
    proxy.rewrite(&toml(&fpm, "http = [\"{HTTPS}\"]\nhttps = [\"{HTTP}\"]", &certificate(folder.path(), "a")));
    proxy.cli_ok(&["reload"]).await;
    let config = client(&[&der], &["http/1.1"]);
    eventually("the address speaks TLS", async || match connect(proxy.http(), &config, "a.example").await {
        Ok(stream) => match get(stream, "a.example", "/x").await.status {
            200 => Ok(()),
            other => Err(other.to_string()),
        },
        Err(error) => Err(error.to_string()),
    })
    .await;
    assert_eq!(http::get(proxy.https(), "/x").await.unwrap().status, 200);
    assert_eq!(kept.get("/a").await.unwrap().status, 200);
    // PROXY headers come and go in the same way.
    let told = "http = [\"{HTTP}\"]\nproxy_protocol = \"required\"\ntrusted_proxies = [\"127.0.0.1\"]";
    proxy.rewrite(&toml(&fpm, told, ""));
    proxy.cli_ok(&["reload"]).await;
    let mut stream = TcpStream::connect(proxy.http()).await.unwrap();
    stream
        .write_all(b"PROXY TCP4 192.0.2.7 203.0.113.1 50000 80\r\nGET /proxied HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", answer.escape_ascii());
    assert_eq!(kept.get("/a").await.unwrap().status, 200);
    proxy.rewrite(&toml(&fpm, "http = [\"{HTTP}\"]", ""));
    proxy.cli_ok(&["reload"]).await;
    assert_eq!(http::get(proxy.http(), "/x").await.unwrap().status, 200);
    assert_eq!(kept.get("/a").await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_header_says_who_the_client_is() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let der = make(folder.path(), "a", &["localhost"]);
    let listen = format!("{BOTH}\nproxy_protocol = \"required\"\ntrusted_proxies = [\"127.0.0.1\"]\nheader_timeout = \"1s\"");
    let proxy = Slackwater::start(&toml(&fpm, &listen, &certificate(folder.path(), "a"))).await;
    let v1 = b"PROXY TCP4 192.0.2.7 203.0.113.1 50000 443\r\n".as_slice();
    let request = b"GET /x HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 10.0.0.1\r\nConnection: close\r\n\r\n".as_slice();
    let v2 = [b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0f".as_slice(), &[192, 0, 2, 8, 203, 0, 113, 1, 0xc3, 0x50, 1, 0xbb, 0x04, 0, 0]]
        .concat();
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".as_slice();
    let ask = async |header: &[u8]| {
        let mut stream = TcpStream::connect(proxy.http()).await.unwrap();
        stream.write_all(&[header, request].concat()).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        answer
    };
    for (header, address, port) in [(v1, "192.0.2.7", "50000"), (&v2, "192.0.2.8", "50000"), (local, "127.0.0.1", "")] {
        assert!(ask(header).await.starts_with(b"HTTP/1.1 200"), "{}", header.escape_ascii());
        let all = fpm.requests();
        let seen = all.last().unwrap();
        // The client's own X-Forwarded-For counts for nothing, and neither does one where the header names nobody.
        assert_eq!(seen.param("REMOTE_ADDR").as_deref(), Some(address));
        assert!(port.is_empty() || seen.param("REMOTE_PORT").as_deref() == Some(port));
    }
    let first = &fpm.requests()[0];
    assert_eq!(
        (first.param("SERVER_PORT").as_deref(), first.param("HTTPS").as_deref()),
        (Some("443"), Some("on")),
        "TLS ended at the proxy"
    );
    assert!(ask(b"PROXY TCP4 192.0.2.7 203.0.113.1 50000 80\r\n").await.starts_with(b"HTTP/1.1 200"));
    assert_eq!(fpm.requests().last().unwrap().param("HTTPS"), None);
    let asked = fpm.requests().len();
    for wrong in [b"".as_slice(), b"PROXY TCP4 nonsense\r\n", b"PROXY", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff"] {
        let answer = ask(wrong).await;
        assert!(answer.is_empty(), "{}: {}", wrong.escape_ascii(), answer.escape_ascii());
    }
    assert_eq!(fpm.requests().len(), asked);
    // Nobody else may come, not even without a header; probes have the ops port.
    let stranger = tokio::net::TcpSocket::new_v4().unwrap();
    stranger.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut stranger = stranger.connect(proxy.http()).await.unwrap();
    let _ = stranger.write_all(&[v1, request].concat()).await;
    let mut answer = Vec::new();
    let _ = stranger.read_to_end(&mut answer).await;
    assert!(answer.is_empty());
    assert_eq!(http::get(proxy.ops(), "/readyz").await.unwrap().status, 200);
    // The cap is for whom the header names.
    let capped = format!("{listen}\nmax_connections_per_address = 2");
    let limited = Slackwater::start(&toml(&fpm, &capped, &certificate(folder.path(), "a"))).await;
    let mut open = Vec::new();
    for (from, answered) in [("192.0.2.1", true), ("192.0.2.1", true), ("192.0.2.1", false), ("192.0.2.2", true)] {
        let mut connection = Connection::<TcpStream>::open(limited.http()).await.unwrap();
        connection.send(format!("PROXY TCP4 {from} 203.0.113.1 50000 80\r\n")).await.unwrap();
        assert_eq!(connection.get("/capped").await.is_ok(), answered, "{from}");
        open.push(connection);
    }
    drop(open);
    assert!(proxy.metric(&["slackwater_errors_total", "proxy_header"]).await.unwrap() >= 3.0);

    // Before TLS, and by curl.
    let mut tcp = TcpStream::connect(proxy.https()).await.unwrap();
    tcp.write_all(v1).await.unwrap();
    let config = client(&[&der], &["http/1.1"]);
    let stream = TlsConnector::from(config).connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap();
    assert_eq!(get(stream, "localhost", "/tls").await.status, 200);
    assert_eq!(fpm.requests().last().unwrap().param("REMOTE_ADDR").as_deref(), Some("192.0.2.7"));
    let mut curl = tokio::process::Command::new("curl");
    curl.args(["-sS", "--max-time", "20", "--haproxy-protocol", &format!("http://{}/curl", proxy.http())]);
    assert_eq!(String::from_utf8_lossy(&curl.output().await.unwrap().stdout), "blue hello\n");
}

/// The key is read at once, so that a start that cannot serve says so.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_named_with_its_place() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), "a", &["a.example"]);
    make(folder.path(), "b", &["b.example"]);
    std::fs::write(folder.path().join("empty.crt"), "").unwrap();
    let config = folder.path().join("s.toml");
    let check = async |tls: &str| {
        let listen = "http = []\nhttps = [\"127.0.0.1:1\"]";
        let text = toml(&fpm, listen, tls).replace("{OPS}", "127.0.0.1:2").replace("{ADMIN}", "/tmp/a.sock");
        std::fs::write(&config, text).unwrap();
        let out = support::process::slackwater(&["check", "--config", config.to_str().unwrap()], &[]).await;
        (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let pair = |certificate: &str, key: &str, more: &str| {
        format!("[[tls]]\n{more}\ncertificate = \"{0}/{certificate}\"\nkey = \"{0}/{key}\"\n", folder.path().display())
    };
    assert!(check(&pair("a.crt", "a.key", "hosts = [\"a.example\"]")).await.0);
    for (tls, wanted) in [
        (pair("none.crt", "a.key", ""), "none.crt cannot be read: No such file"),
        (pair("empty.crt", "a.key", ""), "empty.crt holds no certificate"),
        (pair("a.crt", "a.crt", ""), "a.crt holds no private key"),
        (pair("a.crt", "b.key", ""), "b.key is not that of the certificate"),
    ] {
        let (good, err) = check(&tls).await;
        assert!(!good && err.contains(wanted) && err.contains("s.toml:1"), "{wanted}: {err}");
    }
    // Somebody may know better.
    let (good, err) = check(&pair("a.crt", "a.key", "hosts = [\"a.example\", \"c.example\"]")).await;
    assert!(good && err.contains("a.crt is not for c.example: browsers refuse it there"), "{err}");
    assert!(check("").await.1.contains("`listen.https`, and no certificate"));
    assert!(CertificateDer::from_pem_file(folder.path().join("a.crt")).is_ok());
}

/// TLS has a buffer of its own: what it holds for a client that does not read is no progress.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_loses_its_connection_over_tls_too() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let der = make(folder.path(), "a", &["a.example"]);
    std::fs::write(folder.path().join("large.bin"), vec![b'x'; 8 << 20]).unwrap();
    let listen = format!("{BOTH}\nidle_timeout = \"1s\"\nstall_timeout = \"1s\"");
    let site = format!("root = \"{}\"\n{}", folder.path().display(), certificate(folder.path(), "a"));
    let proxy = Slackwater::start(&toml(&fpm, &listen, &site)).await;
    let config = client(&[&der], &["http/1.1"]);
    // Sizes around that at which the kernel takes everything but what TLS still holds.
    let mut held = Vec::new();
    for size in (2_400_000..3_200_000).step_by(40_000) {
        let tcp = tokio::net::TcpSocket::new_v4().unwrap();
        tcp.set_recv_buffer_size(4096).unwrap();
        let tcp = tcp.connect(proxy.https()).await.unwrap();
        let mut stream = TlsConnector::from(config.clone()).connect(ServerName::try_from("a.example").unwrap(), tcp).await.unwrap();
        let range = format!("bytes=0-{size}");
        stream.write_all(&http::request("GET", "/large.bin", &[("Host", "a.example"), ("Range", &range)], b"")).await.unwrap();
        held.push(stream);
    }
    let since = Instant::now();
    eventually("all are closed", async || match proxy.metric(&["slackwater_connections "]).await.unwrap() {
        0.0 => Ok(()),
        open => Err(format!("{open} are open")),
    })
    .await;
    println!("closed after {:?} (promised: some 2 s)", since.elapsed());
    drop(held);
}

/// What is answered before its body has come: a real client sees the answer.
#[tokio::test(flavor = "multi_thread")]
async fn an_early_answer_is_not_lost_on_http2() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), "a", &["a.example"]);
    std::fs::write(folder.path().join("a.css"), "a {}").unwrap();
    let site = format!("root = \"{}\"\nbody_limit = \"1KiB\"\n{}", folder.path().display(), certificate(folder.path(), "a"));
    let proxy = Slackwater::start(&toml(&fpm, BOTH, &site)).await;
    let large = "x".repeat(20_000);
    for (path, body, status) in [("/a.css", "x", "405"), ("/none.php", "x", "404"), ("/index.php", large.as_str(), "413")] {
        for nth in 0..40 {
            let mut curl = tokio::process::Command::new("curl");
            curl.args(["-skS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "20", "--http2", "-d", body]);
            let out = curl.arg(format!("https://{}{path}", proxy.https())).output().await.expect("curl (tests/run installs it)");
            assert_eq!(
                String::from_utf8_lossy(&out.stdout),
                status,
                "{path}, the {nth}th: {}",
                String::from_utf8_lossy(&out.stderr)
            );
        }
    }
}

/// Ends with the test.
struct Haproxy(std::process::Child);

impl Drop for Haproxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// HAProxy as the load balancer: both versions, before HTTP and before TLS, and its health checks, of which the second version says LOCAL.
#[tokio::test(flavor = "multi_thread")]
async fn haproxy_tells_its_clients_and_checks_health() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let der = make(folder.path(), "a", &["a.example"]);
    let listen = format!("{BOTH}\nproxy_protocol = \"required\"\ntrusted_proxies = [\"127.0.0.1\"]\nhealth_path = \"/healthz\"");
    let proxy = Slackwater::start(&toml(&fpm, &listen, &certificate(folder.path(), "a"))).await;
    let [v1, v2, tls] = std::array::from_fn(|_| support::ports::free_address());
    let (http_address, https_address) = (proxy.http(), proxy.https());
    let conf = format!(
        "defaults\n mode tcp\n timeout connect 5s\n timeout client 20s\n timeout server 20s\n\
         listen v1\n bind {v1}\n option httpchk GET /healthz\n server a {http_address} send-proxy check check-send-proxy inter 200ms fall 1\n\
         listen v2\n bind {v2}\n option httpchk GET /healthz\n server a {http_address} send-proxy-v2 check check-send-proxy inter 200ms fall 1\n\
         listen tls\n bind {tls}\n server a {https_address} send-proxy-v2 check inter 200ms fall 1\n"
    );
    let path = folder.path().join("haproxy.cfg");
    std::fs::write(&path, conf).unwrap();
    let mut command = std::process::Command::new("/usr/sbin/haproxy");
    command.arg("-db").arg("-f").arg(&path).stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
    command.stderr(std::process::Stdio::null());
    let _haproxy = Haproxy(support::children::spawn(command, libc::SIGKILL).expect("haproxy (tests/run installs it)"));
    eventually("it listens", async || match TcpStream::connect(tls).await {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    })
    .await;
    // From an address that is not the proxy's own, several times: a failed check would take the server away.
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(2) {
        for (address, host) in [(v1, "127.0.0.7"), (v2, "127.0.0.8")] {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind(format!("{host}:0").parse().unwrap()).unwrap();
            let mut connection = Connection::over(socket.connect(address).await.unwrap());
            assert_eq!(connection.get("/who").await.unwrap().text(), "blue hello\n");
            assert_eq!(fpm.requests().last().unwrap().param("REMOTE_ADDR").as_deref(), Some(host));
        }
    }
    let config = client(&[&der], &["http/1.1"]);
    let stream = TlsConnector::from(config);
    let tcp = TcpStream::connect(tls).await.unwrap();
    let stream = stream.connect(ServerName::try_from("a.example").unwrap(), tcp).await.unwrap();
    assert_eq!(get(stream, "a.example", "/tls").await.status, 200);
    assert_eq!(fpm.requests().last().unwrap().param("HTTPS").as_deref(), Some("on"));

    // h2load, without a header: straight to a proxy of its own.
    let proxy = Slackwater::start(&toml(&fpm, BOTH, &certificate(folder.path(), "a"))).await;
    // Without --h1 it takes h2 where the server has it.
    for protocol in [&[][..], &["--h1"]] {
        let mut h2load = tokio::process::Command::new("h2load");
        h2load.args(["-n", "500", "-c", "10", "-m", "10"]).args(protocol).arg(format!("https://{}/load", proxy.https()));
        let out = h2load.output().await.expect("h2load (tests/run installs it)");
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(text.contains("500 succeeded, 0 failed, 0 errored, 0 timeout") && text.contains("500 2xx"), "{protocol:?}: {text}");
    }
}
