//! Where one HTTP/1.1 message ends and the next begins (RFC 9112): who gets that wrong lets a stranger speak for another client.

use std::time::Duration;

use tokio::io::AsyncWriteExt;

use crate::{
    case::{Case, Expect, PATIENCE, Php, run, toml},
    support::{
        gate::within,
        http::{Connection, request},
        process::Slackwater,
        scripted_fpm::{Behaviour, ScriptedFpm},
    },
};

/// A POST with these header lines and what stands behind the head.
fn post(headers: &str, rest: &str) -> Vec<u8> {
    format!("POST /a.php HTTP/1.1\r\nHost: example.com\r\n{headers}\r\n{rest}").into_bytes()
}

fn get(headers: &str) -> Vec<u8> {
    format!("GET /a.php HTTP/1.1\r\nHost: example.com\r\n{headers}\r\n").into_bytes()
}

const SMUGGLED: &str = "GET /smuggled.php HTTP/1.1\r\nHost: example.com\r\n\r\n";

pub fn cases() -> Vec<Case> {
    use Expect::{OneOf, Status, StatusAndClose};
    let chunked = "Transfer-Encoding: chunked\r\n";
    let mut cases = vec![
        Case::new(
            "CL and TE, a request behind",
            "RFC 9112, 6.1: TE counts, and the connection ends",
            post(&format!("Content-Length: 6\r\n{chunked}"), &format!("0\r\n\r\n{SMUGGLED}")),
            StatusAndClose(200),
            Php::One(b""),
        ),
        Case::new(
            "TE and CL, a request behind",
            "RFC 9112, 6.1",
            post(&format!("{chunked}Content-Length: 4\r\n"), &format!("3\r\nabc\r\n0\r\n\r\n{SMUGGLED}")),
            StatusAndClose(200),
            Php::One(b"abc"),
        ),
        Case::new(
            "two different CLs",
            "RFC 9112, 6.3",
            post("Content-Length: 3\r\nContent-Length: 4\r\n", "abcd"),
            StatusAndClose(400),
            Php::Nothing,
        ),
        Case::new("a list of CLs", "RFC 9110, 8.6", post("Content-Length: 3, 3\r\n", "abc"), Status(400), Php::Nothing),
        Case::new("CL with a sign", "RFC 9110, 8.6", post("Content-Length: +3\r\n", "abc"), Status(400), Php::Nothing),
        Case::new("CL below zero", "RFC 9110, 8.6", post("Content-Length: -3\r\n", "abc"), Status(400), Php::Nothing),
        Case::new("CL in hex", "RFC 9110, 8.6", post("Content-Length: 0x3\r\n", "abc"), Status(400), Php::Nothing),
        Case::new("CL that is empty", "RFC 9110, 8.6", post("Content-Length: \r\n", "abc"), Status(400), Php::Nothing),
        Case::new(
            "CL beyond 2^64",
            "RFC 9110, 8.6",
            post("Content-Length: 99999999999999999999999\r\n", "abc"),
            Status(400),
            Php::Nothing,
        ),
        Case::new(
            "CL of 2^64 - 1",
            "RFC 9110, 8.6: refused, by whichever limit",
            post("Content-Length: 18446744073709551615\r\n", "abc"),
            OneOf(&[400, 413, 431]),
            Php::Nothing,
        ),
        Case::new(
            "TE behind HTTP/1.0",
            "RFC 9112, 6.1",
            b"POST /a.php HTTP/1.0\r\nHost: example.com\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n".to_vec(),
            StatusAndClose(400),
            Php::Nothing,
        ),
        Case::new(
            "chunked twice in two lines",
            "RFC 9112, 6.1",
            post(&format!("{chunked}{chunked}"), "3\r\nabc\r\n0\r\n\r\n"),
            StatusAndClose(400),
            Php::Nothing,
        ),
        Case::new(
            "Transfer_Encoding is another header",
            "RFC 9110, 5.1",
            post("Transfer_Encoding: chunked\r\nContent-Length: 3\r\n", "abc"),
            Status(200),
            Php::One(b"abc"),
        ),
        Case::new(
            "a chunk size beyond 2^64",
            "RFC 9112, 7.1",
            post(chunked, "10000000000000000\r\nabc"),
            Status(400),
            Php::Nothing,
        ),
        Case::new("a chunk size with a sign", "RFC 9112, 7.1", post(chunked, "+3\r\nabc\r\n0\r\n\r\n"), Status(400), Php::Nothing),
        Case::new("a chunk size with 0x", "RFC 9112, 7.1", post(chunked, "0x3\r\nabc\r\n0\r\n\r\n"), Status(400), Php::Nothing),
        Case::new("no chunk size", "RFC 9112, 7.1", post(chunked, "\r\nabc\r\n0\r\n\r\n"), Status(400), Php::Nothing),
        Case::new(
            "a chunk size with a space behind it",
            "RFC 9112, 7.1",
            post(chunked, "3 \r\nabc\r\n0\r\n\r\n"),
            OneOf(&[200, 400]),
            Php::NothingOr(b"abc"),
        ),
        Case::new(
            "a chunk longer than its size",
            "RFC 9112, 7.1",
            post(chunked, "2\r\nabc\r\n0\r\n\r\n"),
            Status(400),
            Php::Nothing,
        ),
        Case::new("a bare LF behind a chunk", "RFC 9112, 7.1", post(chunked, "3\r\nabc\n0\r\n\r\n"), Status(400), Php::Nothing),
        Case::new(
            "a bare LF behind a chunk size",
            "RFC 9112, 7.1",
            post(chunked, "3\nabc\r\n0\r\n\r\n"),
            Status(400),
            Php::Nothing,
        ),
        Case::new("a bare CR in a chunk size", "RFC 9112, 2.2", post(chunked, "3\rabc\r\n0\r\n\r\n"), Status(400), Php::Nothing),
        Case::new(
            "a bare LF in a chunk extension",
            "RFC 9112, 7.1.1",
            post(chunked, "3;a=\nb\r\nabc\r\n0\r\n\r\n"),
            Status(400),
            Php::Nothing,
        ),
        Case::new(
            "a chunk extension",
            "RFC 9112, 7.1.1: ignored",
            post(chunked, "3;a=\"b\"\r\nabc\r\n0\r\n\r\n"),
            Status(200),
            Php::One(b"abc"),
        ),
        Case::new(
            "a chunk extension of 100 KiB",
            "RFC 9112, 7.1.1: limited",
            post(chunked, &format!("3;a={}\r\nabc\r\n0\r\n\r\n", "x".repeat(100 * 1024))),
            Status(400),
            Php::Nothing,
        ),
        Case::new(
            "trailers that would be a head",
            "RFC 9110, 6.5.1: dropped",
            post(chunked, "3\r\nabc\r\n0\r\nContent-Length: 99\r\nHost: evil\r\n\r\n"),
            Status(200),
            Php::One(b"abc"),
        ),
        Case::new(
            "trailers of 1 MiB",
            "RFC 9110, 6.5: limited",
            post(chunked, &format!("3\r\nabc\r\n0\r\nX: {}\r\n\r\n", "x".repeat(1 << 20))),
            Status(400),
            Php::Nothing,
        ),
        Case::new(
            "a body with less than its CL, and silence",
            "RFC 9110, 15.5.9",
            post("Content-Length: 9\r\n", "abc"),
            Status(408),
            Php::Nothing,
        ),
        Case::new(
            "a refused request with a body, and a stray byte behind",
            "RFC 9112, 9.6: nobody reads on",
            [b"POST /a.php HTTP/1.1\r\nHost: ex\xf6ample.com\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n\xcf"
                .to_vec()]
            .concat(),
            StatusAndClose(400),
            Php::Nothing,
        ),
        Case::new("obs-fold", "RFC 9112, 5.2", get("X-A: b\r\n c\r\n"), Status(400), Php::Nothing),
        Case::new("a space before the colon", "RFC 9112, 5.1", get("X-A : b\r\n"), Status(400), Php::Nothing),
        Case::new("a header without a colon", "RFC 9112, 5", get("X-A\r\n"), Status(400), Php::Nothing),
        Case::new("a bare CR in a value", "RFC 9112, 2.2", get("X-A: b\rX-B: c\r\n"), Status(400), Php::Nothing),
        Case::new("a NUL in a value", "RFC 9110, 5.5", get("X-A: b\0c\r\n"), Status(400), Php::Nothing),
        Case::new(
            "a bare LF as a line's end",
            "RFC 9112, 2.2: may be one",
            get("X-A: b\nX-B: c\r\n"),
            OneOf(&[200, 400]),
            Php::NothingOr(b""),
        ),
        Case::new("no Host", "RFC 9112, 3.2", b"GET /a.php HTTP/1.1\r\n\r\n".to_vec(), Status(400), Php::Nothing),
        Case::new("two Hosts", "RFC 9112, 3.2", get("Host: evil\r\n"), Status(400), Php::Nothing),
        Case::new(
            "a word too many",
            "RFC 9112, 3",
            b"GET /a.php HTTP/1.1 x\r\nHost: a\r\n\r\n".to_vec(),
            Status(400),
            Php::Nothing,
        ),
        Case::new(
            "HTTP/9.9",
            "RFC 9110, 2.5",
            b"GET /a.php HTTP/9.9\r\nHost: a\r\n\r\n".to_vec(),
            OneOf(&[400, 505]),
            Php::Nothing,
        ),
        Case::new("no version", "RFC 9112, 2.3", b"GET /a.php\r\nHost: a\r\n\r\n".to_vec(), Status(400), Php::Nothing),
        Case::new(
            "a NUL in the target",
            "RFC 3986",
            b"GET /a\0.php HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
            Status(400),
            Php::Nothing,
        ),
        Case::new(
            "CONNECT",
            "RFC 9110, 9.3.6",
            b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n".to_vec(),
            OneOf(&[400, 405, 501]),
            Php::Nothing,
        ),
        Case::new(
            "empty lines before a request with much in its head",
            "RFC 9112, 2.2",
            [b"\r\n\r\n".to_vec(), get(&format!("X-A: {}\r\n", "b".repeat(20_000)))].concat(),
            Status(200),
            Php::One(b""),
        ),
        Case::new(
            "Upgrade, and another request behind it",
            "RFC 9110, 7.8: may be ignored; both are requests",
            [get("Upgrade: h2c\r\nConnection: Upgrade\r\n"), get("")].concat(),
            Status(200),
            Php::Count(2),
        ),
        Case::new(
            "Upgrade, and HTTP/2 behind it all the same",
            "RFC 9110, 7.8: nobody has agreed",
            [get("Upgrade: h2c\r\nConnection: Upgrade\r\n"), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()].concat(),
            Status(200),
            Php::One(b""),
        ),
        Case::new(
            "10^6 arguments",
            "RFC 9110, 15.5.15",
            format!("GET /a.php?{} HTTP/1.1\r\nHost: a\r\n\r\n", "a=1&".repeat(1_000_000)).into_bytes(),
            Status(414),
            Php::Nothing,
        ),
        Case::new("a header of 1 MiB", "RFC 6585, 5", get(&format!("X-A: {}\r\n", "b".repeat(1 << 20))), Status(431), Php::Nothing),
        Case::new("10,000 headers", "RFC 6585, 5", get(&"X-A: b\r\n".repeat(10_000)), OneOf(&[400, 431]), Php::Nothing),
    ];
    for (name, value) in [
        ("TE: xchunked", "xchunked"),
        ("TE: identity", "identity"),
        ("TE: gzip, chunked", "gzip, chunked"),
        ("TE: chunked, identity", "chunked, identity"),
        ("TE: chunked, chunked", "chunked, chunked"),
        ("TE with a vertical tab", "\x0bchunked"),
        ("TE with a parameter", "chunked;x"),
        ("TE in quotes", "\"chunked\""),
        ("TE with a NUL", "chunked\0"),
    ] {
        let send = post(&format!("Transfer-Encoding: {value}\r\n"), "3\r\nabc\r\n0\r\n\r\n");
        cases.push(Case::new(name, "RFC 9112, 6.1 and 11.2", send, OneOf(&[400, 501]), Php::Nothing));
    }
    cases
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_ends_where_the_rfc_says_or_is_refused() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let listen = "header_timeout = \"2s\"\nstall_timeout = \"2s\"";
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), listen, "workers_per_endpoint = 4")).await;
    let count = run(&proxy, &fpm, &cases()).await;
    assert_eq!(fpm.violations(), Vec::<String>::new());
    println!("{count} cases of framing");
}

/// hyper ends a connection on which another protocol was asked for in another way than others: not before its socket has taken everything.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_one_who_asks_for_another_protocol_and_reads_late_is_whole() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), "", "workers_per_endpoint = 4")).await;
    let ask = request("GET", "/big.php", &[("Upgrade", "h2c"), ("Connection", "close, Upgrade")], b"");
    // How much the sockets take nobody knows; some of these sizes are a little more, so that the rest waits in hyper.
    for bytes in (128 * 1024..6 << 20).step_by(60_000) {
        fpm.set(Behaviour::big_body(bytes));
        let mut client = Connection::open(proxy.http()).await.unwrap();
        client.send(&ask).await.unwrap();
        tokio::time::sleep(Duration::from_millis(25)).await;
        let answer = within(PATIENCE, "the whole answer", client.read_response("GET")).await;
        let answer = answer.unwrap_or_else(|error| panic!("of {bytes} bytes: {error}"));
        assert_eq!((answer.status, answer.body.len()), (200, bytes));
    }
}

/// The refusal is read, however much of the request is still on its way: no reset overtakes it.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_refused_in_the_middle_of_a_head_still_reads_why() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), "", "workers_per_endpoint = 4")).await;
    for (send, status) in [
        ("GET /a.php HTTP/1.1\r\nBad Name: x\r\n".to_owned(), 400),
        (format!("GET /a.php HTTP/1.1\r\nHost: a\r\nX-A: {}", "b".repeat(100_000)), 431),
    ] {
        let mut client = Connection::open(proxy.http()).await.unwrap();
        client.send(&send).await.unwrap();
        // As much again, while the answer is on its way.
        for _ in 0..20 {
            if client.stream().write_all(&[b'x'; 10_000]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let answer = within(PATIENCE, "the refusal", client.read_response("GET")).await;
        assert_eq!(answer.as_ref().map(|answer| answer.status).ok(), Some(status), "{answer:?}");
    }
}

/// What is no request behind one whose answer has not been taken yet: its refusal comes behind that answer, or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_does_not_overtake_the_answer_before_it() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), "", "workers_per_endpoint = 4")).await;
    let skip = proxy.log().len();
    // How much the sockets take nobody knows; some of these sizes are a little more, so that the rest waits in hyper.
    for bytes in (128 * 1024..6 << 20).step_by(60_000) {
        fpm.set(Behaviour::big_body(bytes));
        let mut client = Connection::open(proxy.http()).await.unwrap();
        client.send(&[request("GET", "/a.php", &[], b""), b"\xcf\0 no request\r\n\r\n".to_vec()].concat()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(25)).await;
        let answer =
            within(PATIENCE, "the answer", client.read_response("GET")).await.unwrap_or_else(|error| panic!("{bytes}: {error}"));
        assert_eq!((answer.status, answer.body.len()), (200, bytes));
        assert!(answer.body == crate::support::pattern::pattern(bytes), "{bytes}: other bytes");
        let end = within(PATIENCE, "an end", client.read_response("GET")).await;
        assert!(end.as_ref().map_or(true, |answer| answer.status == 400), "{bytes}: {end:?}");
    }
    assert!(!proxy.log().iter().skip(skip).any(|line| line.text.contains("panicked")), "{}", proxy.log_text());
}
