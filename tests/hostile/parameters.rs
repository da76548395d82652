//! What a client would like PHP to believe: names that PHP's environment has besides, and lengths at which FastCGI's encoding changes. On both versions of
//! HTTP, before a real FPM.

use crate::{
    case::{PATIENCE, toml},
    support::{
        gate::within,
        h2wire::{self, Wire},
        http::{self, Connection},
        process::Slackwater,
        real_fpm::RealFpm,
        scripted_fpm::{Behaviour, ScriptedFpm},
    },
};

/// What may not become another parameter, with the value that would tell.
const FORGED: &[(&str, &str)] = &[
    ("proxy", "http://evil.example/"),
    ("php-value", "auto_prepend_file=forged"),
    ("php-admin-value", "allow_url_include=forged"),
    ("script-filename", "/etc/forged"),
    ("document-root", "/forged"),
    ("remote-addr", "forged"),
    ("remote-user", "forged"),
    ("https", "forged"),
    ("redirect-status", "forged"),
    ("x_real_ip", "forged"),
    ("http_host", "forged"),
    ("x.forwarded.for", "forged"),
    ("content_length", "7"),
    ("fcgi-role", "forged"),
];

/// A header decides the value of `HTTP_*` and nothing else, and not of `HTTP_PROXY` (CVE-2016-5385); names that PHP would fold into others do not pass.
#[tokio::test(flavor = "multi_thread")]
async fn a_header_is_never_another_parameter() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), "", "")).await;
    let mut client = Connection::open(proxy.http()).await.unwrap();
    let answer = client.exchange("GET", &http::request("GET", "/a.php", FORGED, b"")).await.unwrap();
    assert_eq!(answer.status, 200);
    let mut wire = Wire::open(proxy.http(), &[]).await;
    let block = [
        h2wire::request("GET", "/a.php"),
        h2wire::block(&FORGED.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes())).collect::<Vec<_>>()),
    ];
    wire.send(&h2wire::frame(h2wire::HEADERS, h2wire::END_STREAM | h2wire::END_HEADERS, 1, &block.concat())).await;
    assert_eq!(wire.answer(1).await, Ok(200));
    let received = fpm.requests();
    assert_eq!(received.len(), 2);
    for request in received {
        let with_value: Vec<&str> = request
            .params
            .iter()
            .filter(|(_, value)| value.windows(6).any(|part| part == b"forged") || value.windows(4).any(|part| part == b"evil"))
            .map(|(name, _)| std::str::from_utf8(name).unwrap())
            .collect();
        let dashed = FORGED.iter().filter(|(name, _)| *name != "proxy" && !name.contains(['_', '.']));
        let allowed: Vec<String> = dashed.map(|(name, _)| format!("HTTP_{}", name.to_uppercase().replace('-', "_"))).collect();
        let mut with_value = with_value;
        with_value.sort_unstable();
        let mut allowed: Vec<&str> = allowed.iter().map(String::as_str).collect();
        allowed.sort_unstable();
        assert_eq!(with_value, allowed);
        assert_eq!(request.param("CONTENT_LENGTH").unwrap_or_default(), "", "a GET without a body");
    }
}

/// FastCGI's lengths have one byte up to 127 and four from 128, a record's content ends at 65,535: values of these lengths reach PHP whole, or are refused
/// (FastCGI 1.0, sections 3.3 and 3.4; FPM closes the connection of a pair that is split over two records).
#[tokio::test(flavor = "multi_thread")]
async fn every_length_at_which_the_wire_changes_reaches_php_whole() {
    let fpm = RealFpm::start("blue").await;
    std::fs::write(
        fpm.docroot().join("header.php"),
        "<?php header('X-Digest: '.strlen($_SERVER['HTTP_X_LONG'] ?? '').'-'.md5($_SERVER['HTTP_X_LONG'] ?? ''));",
    )
    .unwrap();
    let listen = "max_header_bytes = \"200KiB\"\nmax_uri_bytes = \"64KiB\"";
    let config = toml(&fpm.tcp_address().to_string(), listen, "").replace("/app", &fpm.docroot().display().to_string());
    let proxy = Slackwater::start(&config).await;
    // HTTP_X_LONG is 11 bytes, its lengths 1 and 4: the pair of 65,519 is what fills a record.
    let lengths = [1, 126, 127, 128, 129, 16_383, 65_518, 65_519, 65_520, 65_534, 65_535, 65_536, 65_537];
    let mut told = Vec::new();
    for length in lengths {
        let value: String = (0..length).map(|n| char::from(b'a' + (n % 23) as u8)).collect();
        let digest = format!("{length}-{}", md5(value.as_bytes()));
        let mut client = Connection::open(proxy.http()).await.unwrap();
        let asked = client.exchange("GET", &http::request("GET", "/header.php", &[("x-long", &value)], b"")).await;
        let answer = asked.unwrap_or_else(|error| panic!("{length}: {error}"));
        let over_h2 = {
            let mut wire = Wire::open(proxy.http(), &[]).await;
            let block = [h2wire::request("GET", "/header.php"), h2wire::block(&[(b"x-long", value.as_bytes())])].concat();
            let mut pieces = block.chunks(16_384).peekable();
            let (mut kind, mut flags) = (h2wire::HEADERS, h2wire::END_STREAM);
            while let Some(piece) = pieces.next() {
                flags |= if pieces.peek().is_none() { h2wire::END_HEADERS } else { 0 };
                wire.send(&h2wire::frame(kind, flags, 1, piece)).await;
                (kind, flags) = (h2wire::CONTINUATION, 0);
            }
            within(PATIENCE, "an answer", wire.answer(1)).await
        };
        let fits = length <= 65_519;
        assert_eq!(answer.status, if fits { 200 } else { 431 }, "{length}");
        assert_eq!(answer.header("X-Digest"), fits.then_some(&*digest), "{length}");
        assert_eq!(over_h2, Ok(answer.status), "{length}");
        told.push(format!("{length}: {}", answer.status));
    }
    println!("{}", told.join(", "));
    // A query string is a parameter too.
    for length in [127, 128, 65_000, 65_519, 65_520] {
        let target = format!("/hello.php?{}", "q".repeat(length));
        let answer = http::get(proxy.http(), &target).await.unwrap();
        assert!(matches!(answer.status, 200 | 414), "{length}: {}", answer.status);
        assert_eq!(answer.status == 200, length < 65_500, "{length}: {}", answer.status);
    }
    assert_eq!(http::get(proxy.http(), "/hello.php").await.unwrap().status, 200);
}

fn md5(bytes: &[u8]) -> String {
    use md5::{Digest, Md5};
    Md5::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
