//! A pod takes users' requests only after so many good answers of its own: OPcache is warm before the first user.

mod support;

use std::time::Duration;

use support::{
    gate::{self, Gate},
    http,
    ledger::{Expect, LedgerClient, Shape},
    process::{Slackwater, Wait},
    scripted_fpm::{Behaviour, ScriptedFpm},
};

const PATIENCE: Duration = Duration::from_secs(20);

fn toml(blue: &[&ScriptedFpm], green: &[&ScriptedFpm], preflight: &str) -> String {
    let set = |name: &str, of: &[&ScriptedFpm]| {
        let addresses: Vec<String> = of.iter().map(|fpm| fpm.address().to_string()).collect();
        format!("[upstream.php.set.{name}]\nendpoints = {addresses:?}\n{preflight}\n")
    };
    let green = if green.is_empty() { String::new() } else { set("green", green) };
    format!(
        r#"
        workers = 1
        [upstream.php]
        active = "blue"
        {}
        {green}
        [[site]]
        php_root = "/default"
        upstream = "php"
        [[site]]
        hosts = ["shop.example"]
        php_root = "/app"
        upstream = "php"
        params = {{ APP_ENV = "production" }}
        scripts = ["/index.php", "/warm.php"]
        "#,
        set("blue", blue)
    )
}

async fn state(proxy: &Slackwater, set: &str, nth: usize) -> (String, String) {
    let endpoint = &proxy.status().await["upstreams"]["php"]["sets"][set]["endpoints"][nth];
    (endpoint["state"].as_str().unwrap().to_owned(), endpoint["reason"].as_str().unwrap().to_owned())
}

async fn until(proxy: &Slackwater, set: &str, nth: usize, wanted: &str) -> String {
    gate::eventually(wanted, async || {
        let (state, reason) = state(proxy, set, nth).await;
        if state == wanted { Ok(reason) } else { Err(format!("{state}: {reason}\n{}", proxy.log_text())) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_pod_gets_no_user_before_its_preflight_and_old_pods_are_not_asked() {
    let (old, new) = (ScriptedFpm::start(Behaviour::hello("old")).await, ScriptedFpm::start(Behaviour::hello("new")).await);
    // Not there when the process starts: this pod has served already.
    let proxy = Slackwater::start(&toml(&[&old], &[], "")).await;
    let client = LedgerClient::builder(proxy.http()).shapes(vec![Shape::get("/index.php", Expect::Hello)]).start();
    client.ledger().wait_more(50).await;

    // Good, bad, good, good, good: only what is good in a row counts.
    let gate = Gate::closed();
    new.on("/warm.php", Behaviour::hello("new").holds_answer(&gate));
    let preflight = "preflight = { path = \"/warm.php?a=1\", host = \"shop.example\", https = true, requests = 3, expect = \"200-299\", timeout = \"15s\" }";
    proxy.rewrite(&toml(&[&old, &new], &[], preflight));
    proxy.cli_ok(&["reload"]).await;
    assert_eq!(state(&proxy, "blue", 0).await.0, "usable");
    for (nth, code) in [(1, 200), (2, 302), (3, 200), (4, 200)] {
        new.wait_begun(nth).await;
        let (state, reason) = state(&proxy, "blue", 1).await;
        assert_eq!(state, "preflight", "{reason}");
        client.ledger().wait_more(20).await;
        new.on("/warm.php", Behaviour::hello("new").holds_answer(&gate));
        if nth == 1 {
            // The next one is not as told.
            new.on("/warm.php", Behaviour::answers(302, &[("Location", "/")], "").holds_answer(&gate));
        }
        gate.let_pass(1);
        println!("{nth}: {code}; {reason}");
    }
    new.wait_begun(5).await;
    assert_eq!(state(&proxy, "blue", 1).await.1, "in preflight: 2 of 3 good answers; the last was 200; asked for at most 60s");
    gate.open();
    until(&proxy, "blue", 1, "usable").await;
    new.wait_begun(10).await;
    client.stop().await.assert_clean();

    let asked = new.requests();
    let first_user = asked.iter().position(|r| r.param("SCRIPT_NAME").as_deref() != Some("/warm.php")).unwrap();
    assert_eq!(first_user, 5, "good, bad, three good ones");
    for (name, value) in [
        ("HTTP_HOST", "shop.example"),
        ("HTTPS", "on"),
        ("SERVER_PORT", "443"),
        ("QUERY_STRING", "a=1"),
        ("SCRIPT_FILENAME", "/app/warm.php"),
        ("APP_ENV", "production"),
        ("REQUEST_METHOD", "GET"),
    ] {
        assert_eq!(asked[0].param(name).as_deref(), Some(value), "{name}");
    }
    assert!(old.requests().iter().all(|r| r.param("SCRIPT_NAME").as_deref() == Some("/index.php")), "an old pod was asked");

    // A reload that changes something else asks nobody again.
    let before = new.requests().len();
    proxy.rewrite(&toml(&[&new, &old], &[], preflight));
    proxy.cli_ok(&["reload"]).await;
    assert_eq!((state(&proxy, "blue", 0).await.0, state(&proxy, "blue", 1).await.0), ("usable".to_owned(), "usable".to_owned()));
    http::get(proxy.http(), "/index.php").await.unwrap();
    assert!(new.requests()[before..].iter().all(|r| r.param("SCRIPT_NAME").as_deref() == Some("/index.php")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swap_waits_for_the_preflight_and_one_that_gives_up_says_why() {
    let (blue, green) = (ScriptedFpm::start(Behaviour::hello("blue")).await, ScriptedFpm::start(Behaviour::hello("green")).await);
    green.on("/index.php/warm", Behaviour::answers(500, &[], "no database"));
    let preflight =
        "preflight = { path = \"/index.php/warm\", https = false, requests = 2, give_up = \"1200ms\", timeout = \"1s\" }";
    let proxy = Slackwater::start(&toml(&[&blue], &[&green], preflight)).await;
    let said = proxy.cli(&["swap", "php", "green"]).await;
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("min_ready is 1") && said.contains("preflight"), "{said}");
    let reason = until(&proxy, "green", 0, "unusable").await;
    assert_eq!(reason, "preflight gave up: 0 of 2 good answers after 1.2s; the last was 500");
    proxy.wait_for_log("preflight gave up", PATIENCE).await;
    assert_eq!(green.requests()[0].param("PATH_INFO").as_deref(), Some("/warm"));
    assert_eq!(green.requests()[0].param("HTTPS"), None);
    let said = proxy.cli(&["swap", "php", "green"]).await;
    assert!(String::from_utf8_lossy(&said.stderr).contains("the last was 500"), "{said:?}");
    // Whom it concerns may overrule it.
    proxy.cli_ok(&["endpoint", "enable", "php", &green.address().to_string()]).await;
    assert_eq!(state(&proxy, "green", 0).await.0, "usable");
    proxy.cli_ok(&["swap", "php", "green", "--wait"]).await;
    assert_eq!(http::get(proxy.http(), "/index.php").await.unwrap().text(), "green hello\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_upstreams_with_sets_of_one_name_both_ask() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let preflight = "preflight = { path = \"/index.php/warm\", requests = 2 }";
    let other = format!(
        "[upstream.slow]\n[upstream.slow.set.blue]\nendpoints = [\"{}\"]\nping = {{ path = \"/ping\", every = \"50ms\" }}\n[[site]]",
        fpm.address()
    );
    let proxy = Slackwater::start(&toml(&[&fpm], &[], preflight).replacen("[[site]]", &other, 1)).await;
    let asked = |name: &str| fpm.requests().iter().filter(|r| r.uri().starts_with(name)).count();
    assert_eq!(asked("/index.php/warm"), 2);
    assert!(asked("/ping") >= 1);
    drop(proxy);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_for_a_cold_pod_and_one_that_gave_up_is_the_last_resort() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let gate = Gate::closed();
    fpm.on("/warm", Behaviour::hello("blue").holds_answer(&gate));
    // The front controller answers what no file does.
    let preflight = "preflight = { path = \"/warm\", requests = 1, give_up = \"30s\", timeout = \"30s\" }";
    let mut proxy = Slackwater::builder(&toml(&[&fpm], &[], preflight)).wait(Wait::Live).start().await;
    fpm.wait_begun(1).await;
    assert_eq!(fpm.requests()[0].param("SCRIPT_FILENAME").as_deref(), Some("/default/index.php"));
    let ready = http::get(proxy.ops(), "/readyz").await.unwrap();
    assert_eq!(ready.status, 503);
    assert_eq!(http::get(proxy.http(), "/index.php").await.unwrap().status, 503);
    gate.open();
    proxy.wait_status("/readyz", 200).await;
    assert_eq!(http::get(proxy.http(), "/index.php").await.unwrap().text(), "blue hello\n");
    drop(proxy);

    // A preflight that nobody can pass does not keep the site down: the process becomes ready, and the pod is used.
    let preflight = "preflight = { path = \"/assets.txt.php\", requests = 1, give_up = \"1s\" }";
    let mut proxy = Slackwater::builder(&toml(&[&fpm], &[], preflight)).wait(Wait::Live).start().await;
    proxy.wait_for_log("/assets.txt.php on site default is not answered by PHP", PATIENCE).await;
    proxy.wait_status("/readyz", 200).await;
    assert_eq!(http::get(proxy.http(), "/index.php").await.unwrap().text(), "blue hello\n");
}
