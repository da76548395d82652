//! What becomes of a request when FPM misbehaves: the status at the client, and the cause in the log.

mod support;

use std::time::Duration;

use support::{
    http,
    process::Slackwater,
    scripted_fpm::{Behaviour, ScriptedFpm},
};

fn toml(fpm: &ScriptedFpm) -> String {
    format!(
        r#"
        workers = 1
        [upstream.php]
        workers_per_endpoint = 4
        read_timeout = "1s"
        [upstream.php.set.blue]
        endpoints = ["{}"]
        [[site]]
        php_root = "/app"
        upstream = "php"
        "#,
        fpm.address()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn each_misbehaviour_has_its_answer_and_its_cause() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = Slackwater::start(&toml(&fpm)).await;
    let hello = || Behaviour::hello("blue");
    // Name, behaviour, method, status, cause.
    let cases: Vec<(&str, Behaviour, &str, u16, &str)> = vec![
        ("a wrong version", hello().wrong_version(), "POST", 502, "upstream_protocol"),
        ("a wrong id", hello().wrong_request_id(), "POST", 502, "upstream_protocol"),
        ("a wrong type", hello().wrong_type(), "POST", 502, "upstream_protocol"),
        ("no FastCGI at all", Behaviour::raw("HTTP/1.1 200 OK\r\n\r\n"), "POST", 502, "upstream_protocol"),
        ("death before an answer", hello().dies_after(0), "POST", 502, "upstream_closed"),
        ("death in a record header", hello().dies_after(7), "POST", 502, "upstream_closed"),
        ("endless headers", hello().endless_headers(), "POST", 502, "upstream_headers"),
        ("silence", hello().stalls_before_headers(), "POST", 504, "read_timeout"),
        ("Status: 99", Behaviour::answers(99, &[], "x"), "POST", 502, "upstream_headers"),
    ];
    for (name, behaviour, method, status, cause) in cases {
        let skip = proxy.log().len();
        fpm.set(behaviour);
        let answer = http::send(proxy.http(), method, "/index.php", &[("X-Case", "1")], b"body").await;
        assert_eq!(answer.as_ref().map(|a| a.status).ok(), Some(status), "{name}: {answer:?}");
        proxy.wait_for_log_after(skip, cause, Duration::from_secs(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_odd_but_legal_passes_whole() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = Slackwater::start(&toml(&fpm)).await;
    let hello = || Behaviour::hello("blue");
    for (name, behaviour) in [
        ("bytes one by one", hello().splits_every_byte()),
        ("records of one byte", hello().record_size(1)),
        ("a flood of STDERR", hello().floods_stderr(300_000)),
        ("an answer before the body is read", hello().answers_before_reading_body()),
        ("a worker that ends after its request", hello().closes_after_request()),
    ] {
        fpm.set(behaviour);
        let body = vec![7; 100_000];
        let answer = http::send(proxy.http(), "POST", "/index.php", &[], &body).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!((answer.status, answer.text().as_str()), (200, "blue hello\n"), "{name}");
    }
    assert_eq!(fpm.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_cut_after_its_head_never_looks_whole() {
    let fpm = ScriptedFpm::start(Behaviour::big_body(1_000_000).dies_after(400_000)).await;
    let proxy = Slackwater::start(&toml(&fpm)).await;
    let answer = http::get(proxy.http(), "/index.php").await;
    assert!(answer.is_err(), "a cut answer was taken for whole: {:?}", answer.map(|a| a.status));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_is_never_sent_twice_and_a_get_once_more() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").dies_after(0)).await;
    let proxy = Slackwater::start(&toml(&fpm)).await;
    assert_eq!(http::send(proxy.http(), "POST", "/index.php", &[], b"x").await.unwrap().status, 502);
    assert_eq!(fpm.requests().len(), 1);
    assert_eq!(http::get(proxy.http(), "/index.php").await.unwrap().status, 502);
    let methods: Vec<String> = fpm.requests().iter().map(|r| r.method()).collect();
    assert_eq!(methods, ["POST", "GET", "GET"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_endpoint_costs_no_request_that_another_can_take() {
    let (alive, dead) = (ScriptedFpm::start(Behaviour::hello("blue")).await, ScriptedFpm::start(Behaviour::hello("blue")).await);
    let toml =
        toml(&alive).replace(&format!("\"{}\"", alive.address()), &format!("\"{}\", \"{}\"", alive.address(), dead.address()));
    let proxy = Slackwater::start(&toml).await;
    dead.dies().await;
    for method in ["GET", "POST", "GET", "POST", "POST", "GET"] {
        assert_eq!(http::send(proxy.http(), method, "/index.php", &[], b"").await.unwrap().status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn overloaded_is_tried_elsewhere() {
    let (idle, full) = (ScriptedFpm::start(Behaviour::hello("blue")).await, ScriptedFpm::start(Behaviour::overloaded()).await);
    let toml = toml(&idle).replace(&format!("\"{}\"", idle.address()), &format!("\"{}\", \"{}\"", idle.address(), full.address()));
    let proxy = Slackwater::start(&toml.replace("workers_per_endpoint = 4", "keepalive = \"off\"")).await;
    for _ in 0..6 {
        assert_eq!(http::send(proxy.http(), "POST", "/index.php", &[], b"x").await.unwrap().status, 200);
    }
    assert!(!full.requests().is_empty(), "the overloaded one was never asked");
}

/// The answer is cut behind each of its bytes in turn. The client may see an error or a broken connection, never something that looks whole.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_cut_at_any_byte_never_looks_whole() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = Slackwater::start(&toml(&fpm)).await;
    let mut cuts = 0;
    for resets in [false, true] {
        let mut whole_after = None;
        for bytes in 0..400 {
            let hello = Behaviour::hello("blue");
            fpm.set(if resets { hello.resets_after(bytes) } else { hello.dies_after(bytes) });
            match http::send(proxy.http(), "POST", "/index.php", &[], b"body").await {
                Ok(answer) if answer.status == 200 => {
                    assert_eq!(answer.text(), "blue hello\n", "after {bytes} bytes");
                    whole_after = whole_after.or(Some(bytes));
                }
                Ok(answer) => {
                    assert_eq!(answer.status, 502, "after {bytes} bytes");
                    // A reset may overtake what was sent before it; a FIN does not.
                    assert!(resets || whole_after.is_none(), "{bytes} bytes are a whole answer, and were not taken for one");
                    cuts += 1;
                }
                Err(error) => assert!(whole_after.is_none(), "after {bytes} bytes: {error}"),
            }
        }
        assert!(resets || whole_after.is_some(), "400 bytes hold the answer, and it never got through");
    }
    println!("{cuts} cut answers told by 502");
}
