//! Blue to green under load: nothing fails, and from the moment `swap` returns nothing goes to the old set.

mod support;

use std::time::{Duration, Instant};

use support::{
    gate::Gate,
    http,
    ledger::{LedgerClient, Shape},
    process::Slackwater,
    real_fpm::RealFpm,
    scripted_fpm::{Behaviour, ScriptedFpm},
};

fn toml(blue: impl std::fmt::Display, green: impl std::fmt::Display, root: &str, extra: &str) -> String {
    format!(
        r#"
        workers = 2
        {extra}
        [upstream.php]
        active = "blue"
        workers_per_endpoint = 4
        [upstream.php.set.blue]
        endpoints = ["{blue}"]
        [upstream.php.set.green]
        endpoints = ["{green}"]
        [[site]]
        php_root = "{root}"
        upstream = "php"
        scripts = ["/*.php"]
        "#
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_swaps_under_load_lose_nothing_and_never_show_the_old_colour() {
    let (blue, green) = (RealFpm::builder("blue").workers(4).start().await, RealFpm::builder("green").workers(4).start().await);
    let root = blue.docroot().display().to_string();
    let proxy = Slackwater::start(&toml(blue.tcp_address(), green.tcp_address(), &root, "")).await;
    let client = LedgerClient::builder(proxy.http()).connections(8).shapes(Shape::mix()).start();
    let ledger = client.ledger().clone();
    ledger.wait_entries(50).await;
    for turn in 0..10 {
        let set = if turn % 2 == 0 { "green" } else { "blue" };
        let receipt = proxy.cli_ok(&["swap", "php", set, "--wait", "--timeout", "20s"]).await;
        let since = Instant::now();
        assert!(receipt.contains(r#""cut":[]"#), "{receipt}");
        ledger.wait_more(100).await;
        let wrong = ledger.wrong_colour_since(since.into(), set);
        assert!(wrong.is_empty(), "after the swap to {set}: {wrong:?}");
    }
    let ledger = client.stop().await;
    println!("{:?}", ledger.summary());
    ledger.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_upload_that_began_before_goes_to_the_new_set() {
    let (blue, green) = (ScriptedFpm::start(Behaviour::hello("blue")).await, ScriptedFpm::start(Behaviour::hello("green")).await);
    let proxy = Slackwater::start(&toml(blue.address(), green.address(), "/app", "")).await;
    let mut upload = http::Connection::<tokio::net::TcpStream>::open(proxy.http()).await.unwrap();
    upload.send("POST /index.php HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello").await.unwrap();
    // Another request over the same worker threads shows that the upload has been taken up before the swap.
    assert_eq!(http::get(proxy.http(), "/index.php").await.unwrap().text(), "blue hello\n");
    proxy.cli_ok(&["swap", "php", "green", "--wait"]).await;
    upload.send("world").await.unwrap();
    assert_eq!(upload.read_response("POST").await.unwrap().text(), "green hello\n");
    assert_eq!(blue.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn swap_waits_for_what_is_in_flight_and_names_what_is_left() {
    let gate = Gate::closed();
    let (blue, green) = (
        ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&gate)).await,
        ScriptedFpm::start(Behaviour::hello("green")).await,
    );
    let proxy = Slackwater::start(&toml(blue.address(), green.address(), "/app", "")).await;
    let address = proxy.http();
    let slow = tokio::spawn(async move { http::get(address, "/index.php?slow").await });
    blue.wait_begun(1).await;
    let late = proxy.cli(&["swap", "php", "green", "--wait", "--timeout", "300ms"]).await;
    assert_eq!(late.status.code(), Some(1));
    let text = String::from_utf8_lossy(&late.stderr).into_owned();
    assert!(text.contains("/index.php") && !text.contains("slow"), "names the path and not the query: {text}");
    assert_eq!(http::get(address, "/index.php").await.unwrap().text(), "green hello\n");
    // Whoever asks again is not told that nothing runs on blue.
    let again = proxy.cli(&["swap", "php", "green", "--wait", "--timeout", "300ms"]).await;
    let text = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(again.status.code() == Some(1) && text.contains("1 request is left") && text.contains("/index.php"), "{text}");
    let waits = ["swap", "php", "green", "--wait", "--timeout", "20s"];
    let (waited, ()) = tokio::join!(proxy.cli(&waits), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        gate.open();
    });
    let text = String::from_utf8_lossy(&waited.stdout).into_owned();
    assert!(waited.status.success() && text.contains("set blue has drained"), "{text}");
    assert_eq!(slow.await.unwrap().unwrap().text(), "blue hello\n");
    assert!(proxy.cli_ok(&waits).await.contains("is active already"));
    let receipt = proxy.wait_for_log("the old set has drained", Duration::from_secs(5)).await;
    assert!(receipt.contains(r#"\"in_flight\":1"#), "{receipt}");
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_answers_elsewhere_do_not_keep_a_set_from_draining() {
    let (end, slow) = (Gate::closed(), Gate::closed());
    let events = || Behaviour::answers(200, &[("Content-Type", "text/event-stream")], "data: one\n\n").holds_end(&end);
    let blue = ScriptedFpm::start(Behaviour::hello("blue").holds_answer(&slow)).await;
    let (green, other) = (ScriptedFpm::start(events()).await, ScriptedFpm::start(events()).await);
    let site = format!(
        "[upstream.other.set.only]\nendpoints = [\"{}\"]\n[[site]]\nhosts = [\"other\"]\nphp_root = \"/app\"\nupstream = \"other\"\n",
        other.address()
    );
    let proxy = Slackwater::start(&(toml(blue.address(), green.address(), "/app", "") + &site)).await;
    let address = proxy.http();
    // A stream is at its client before it ends: the first event comes while the script still runs.
    let open = async |host: &str| {
        let mut stream = http::Connection::<tokio::net::TcpStream>::open(address).await.unwrap();
        stream.send(format!("GET /index.php HTTP/1.1\r\nHost: {host}\r\n\r\n")).await.unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"data: one\n\n\r\n") {
            seen.extend_from_slice(&stream.take(1).await.unwrap());
        }
        stream
    };
    let _elsewhere = open("other").await;
    let in_flight = tokio::spawn(async move { http::get(address, "/index.php").await });
    blue.wait_begun(1).await;
    proxy.cli_ok(&["swap", "php", "green"]).await;
    let _on_the_new_set = open("a").await;
    assert_eq!(proxy.status().await["drains"], serde_json::json!([]), "one request is still on blue");
    slow.open();
    assert_eq!(in_flight.await.unwrap().unwrap().text(), "blue hello\n");
    let receipt = proxy.wait_for_log("the old set has drained", Duration::from_secs(20)).await;
    assert!(receipt.contains(r#"\"in_flight\":1,\"completed\":1"#), "{receipt}");
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_that_cannot_be_are_refused_with_what_there_is() {
    let (blue, green) = (ScriptedFpm::start(Behaviour::hello("blue")).await, ScriptedFpm::start(Behaviour::hello("green")).await);
    let toml = toml(blue.address(), green.address(), "/app", "")
        .replace("[upstream.php.set.green]", "[upstream.php.set.green]\nmin_ready = 2");
    let proxy = Slackwater::start(&toml).await;
    for (args, want) in [
        (vec!["swap", "php", "red"], "there is blue, green"),
        (vec!["swap", "java", "green"], "there is php"),
        (vec!["swap", "php", "green"], "min_ready is 2"),
        (vec!["endpoint", "disable", "php", "127.0.0.1:1"], "it has"),
    ] {
        let output = proxy.cli(&args).await;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.contains(want), "{args:?}: {text}");
    }
    assert!(proxy.cli_ok(&["swap", "php", "blue"]).await.contains("active already"));
    let forced = proxy.cli_ok(&["swap", "php", "green", "--force"]).await;
    assert!(forced.contains("(forced: 1 of 1 endpoints are usable)"), "{forced}");
    assert_eq!(http::get(proxy.http(), "/index.php").await.unwrap().text(), "green hello\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swap_survives_a_kill_where_there_is_a_state_file() {
    let (blue, green) = (ScriptedFpm::start(Behaviour::hello("blue")).await, ScriptedFpm::start(Behaviour::hello("green")).await);
    let folder = tempfile::tempdir().unwrap();
    let toml = toml(blue.address(), green.address(), "/app", &format!("state = \"{}/state.json\"", folder.path().display()));
    let mut proxy = Slackwater::start(&toml).await;
    proxy.cli_ok(&["swap", "php", "green"]).await;
    proxy.kill();
    let again = Slackwater::start(&toml).await;
    assert_eq!(http::get(again.http(), "/index.php").await.unwrap().text(), "green hello\n");
    // A reload keeps it, unless `active` itself has changed in the file.
    again.rewrite(&format!("{toml}\n[site.params]\nA = \"1\"\n"));
    again.cli_ok(&["reload"]).await;
    assert_eq!(http::get(again.http(), "/index.php").await.unwrap().text(), "green hello\n");
}
