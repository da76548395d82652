//! What a route says beyond its file or script: whose requests it takes, who may, redirects, plain answers, headers.

mod support;

use std::time::Duration;

use support::{
    gate::{Gate, eventually},
    http::{self, Response},
    process::Slackwater,
    scripted_fpm::{Behaviour, ScriptedFpm},
};

async fn proxy(fpm: &ScriptedFpm, site: &str) -> Slackwater {
    proxy_with(fpm, "", site).await
}

async fn proxy_with(fpm: &ScriptedFpm, upstreams: &str, site: &str) -> Slackwater {
    let toml = format!(
        r#"
        [listen]
        http = ["{{HTTP}}"]
        ops = "{{OPS}}"
        admin = "{{ADMIN}}"
        trusted_proxies = ["127.0.0.1"]
        {upstreams}
        [upstream.php.set.blue]
        endpoints = ["{}"]
        [[site]]
        root = "{{DIR}}"
        php_root = "/app"
        upstream = "php"
        {site}
        "#,
        fpm.address()
    );
    Slackwater::start(&toml).await
}

async fn get(proxy: &Slackwater, path: &str, headers: &[(&str, &str)]) -> Response {
    http::send(proxy.http(), "GET", path, headers, b"").await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_keep_host_port_and_query_and_nothing_gets_into_the_header() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = proxy(
        &fpm,
        r#"
        [[site.route]]
        path = "/old/*"
        redirect = { to = "https://$http_host$request_uri", status = 301 }
        [[site.route]]
        path = "~^/blog/(?<year>[0-9]+)/(.*)$"
        redirect = { to = "/archive/$year/$2?from=$remote_addr&$args", status = 308 }
        [[site.route]]
        path = "/query"
        redirect = { to = "/new?next=$arg_next" }
        "#,
    )
    .await;
    let moved = get(&proxy, "/old/a%20b?x=1", &[("Host", "example.com:8443")]).await;
    assert_eq!((moved.status, moved.header("location")), (301, Some("https://example.com:8443/old/a%20b?x=1")));
    let moved = get(&proxy, "/blog/2026/caf%C3%A9%20?p=2", &[("X-Forwarded-For", "192.0.2.9")]).await;
    assert_eq!((moved.status, moved.header("location")), (308, Some("/archive/2026/caf%C3%A9%20?from=192.0.2.9&p=2")));
    let moved = get(&proxy, "/query?next=a%0d%0aSet-Cookie:x=1", &[]).await;
    assert_eq!((moved.status, moved.header("location")), (302, Some("/new?next=a%0d%0aSet-Cookie:x=1")));
    assert_eq!(moved.header("set-cookie"), None);
    let head = http::send(proxy.http(), "HEAD", "/old/x", &[], b"").await.unwrap();
    assert_eq!((head.status, head.body.len()), (301, 0));
    assert!(fpm.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_answers_and_who_may() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let site = |more: &str| {
        format!(
            r#"
            [[site.route]]
            path = "/ping"
            respond = {{ body = "pong $remote_addr\n" }}
            [[site.route]]
            path = "/gone/*"
            respond = {{ status = 410, body = "<h1>gone</h1>", type = "text/html" }}
            [[site.route]]
            path = "/admin/*"
            allow = ["10.0.0.0/8"]
            deny = ["10.6.6.6"]
            {more}
            "#
        )
    };
    let proxy = proxy(&fpm, &site("")).await;
    let pong = get(&proxy, "/ping", &[]).await;
    assert_eq!(
        (pong.status, pong.text().as_str(), pong.header("content-type")),
        (200, "pong 127.0.0.1\n", Some("text/plain; charset=utf-8"))
    );
    let gone = get(&proxy, "/gone/x", &[]).await;
    assert_eq!((gone.status, gone.text().as_str(), gone.header("content-type")), (410, "<h1>gone</h1>", Some("text/html")));
    for (from, status) in [("10.1.2.3", 200), ("10.6.6.6", 403), ("192.0.2.1", 403)] {
        assert_eq!(get(&proxy, "/admin/x", &[("X-Forwarded-For", from)]).await.status, status, "{from}");
    }
    assert_eq!(fpm.requests().len(), 1);
    eventually("both are in the access log", async || {
        let lines = proxy.log_json();
        let refused = lines.iter().filter(|line| line["path"] == "/admin/x" && line["cause"] == "forbidden").count();
        if refused == 2 { Ok(()) } else { Err(format!("{refused} are")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_of_answers_and_of_what_php_sees() {
    let fpm =
        ScriptedFpm::start(Behaviour::hello("blue").header("X-Powered-By", "PHP/8.2").header("X-Frame-Options", "ALLOWALL")).await;
    let proxy = proxy(
        &fpm,
        r#"
        headers = { set = { X-Frame-Options = "DENY", X-Site = "$host" }, default = { X-Frame-Options = "NEVER", X-Content-Type-Options = "nosniff" }, remove = ["X-Powered-By"] }
        request_headers = { set = { X-Scheme = "$scheme" }, default = { X-Lang = "en" }, remove = ["X-Secret"] }
        [[site.route]]
        path = "/assets/*"
        files = "or-404"
        expires = "30d"
        headers = { add = { Link = "</a.css>; rel=preload", X-Empty = "$arg_none" }, remove = ["X-Site"] }
        "#,
    )
    .await;
    std::fs::create_dir(proxy.folder().join("assets")).unwrap();
    std::fs::write(proxy.folder().join("assets/a.css"), "a {}").unwrap();
    let php = get(&proxy, "/index.php", &[("Host", "Example.com:80"), ("X-Secret", "1"), ("X-Forwarded-Proto", "https")]).await;
    assert_eq!(
        (php.header_all("x-frame-options"), php.header("x-powered-by"), php.header("x-site")),
        (vec!["DENY"], None, Some("example.com"))
    );
    assert_eq!(php.header("x-content-type-options"), Some("nosniff"));
    let request = &fpm.requests()[0];
    assert_eq!((request.param("HTTP_X_SCHEME").as_deref(), request.param("HTTP_X_SECRET")), (Some("https"), None));
    assert_eq!(request.param("HTTP_X_LANG").as_deref(), Some("en"));
    let file = get(&proxy, "/assets/a.css", &[]).await;
    assert_eq!((file.status, file.header("cache-control"), file.header("x-site")), (200, Some("max-age=2592000"), None));
    assert_eq!((file.header("link"), file.header("x-empty")), (Some("</a.css>; rel=preload"), None));
    assert_eq!(file.header("x-frame-options"), Some("DENY"), "the site's stay");
    let until = httpdate::parse_http_date(file.header("expires").unwrap()).unwrap();
    let days = until.duration_since(std::time::SystemTime::now()).unwrap();
    assert!(days > Duration::from_secs(29 * 86_400) && days <= Duration::from_secs(30 * 86_400));
    let missing = get(&proxy, "/assets/b.css", &[]).await;
    assert_eq!((missing.status, missing.header("cache-control"), missing.header("x-frame-options")), (404, None, Some("DENY")));
}

/// Of routes with one path the first whose `when` holds.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_request_carries_chooses_its_route() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = proxy(
        &fpm,
        r#"
        [[site.route]]
        path = "/*"
        when = { cookie = "bypass=secret" }
        [[site.route]]
        path = "/*"
        when = { from = ["10.0.0.0/8"], header = "X-Debug: *" }
        respond = { body = "debug" }
        [[site.route]]
        path = "/*"
        when = { header = "User-Agent: ~(?i)(crawl|spider)er" }
        respond = { body = "for crawlers" }
        [[site.route]]
        path = "/*"
        when = { arg = ["v=~^[0-9]+$", "w"], scheme = "https" }
        respond = { body = "secret version" }
        [[site.route]]
        path = "/*"
        respond = { status = 503, body = "back soon" }
        "#,
    )
    .await;
    assert_eq!(get(&proxy, "/", &[("User-Agent", "a SPIDERER")]).await.text(), "for crawlers");
    let https = ("X-Forwarded-Proto", "https");
    assert_eq!(get(&proxy, "/?w&v=12", &[https]).await.text(), "secret version");
    for (target, header) in [("/?w&v=12", ("X-A", "1")), ("/?v=12", https), ("/?w&v=1x", https), ("/?w&xv=1", https)] {
        assert_eq!(get(&proxy, target, &[header]).await.status, 503, "{target}");
    }
    assert_eq!(get(&proxy, "/", &[]).await.status, 503);
    assert_eq!(get(&proxy, "/", &[("Cookie", "bypass=secret")]).await.status, 200);
    assert_eq!(get(&proxy, "/", &[("X-Debug", "1")]).await.status, 503);
    assert_eq!(get(&proxy, "/", &[("X-Debug", "1"), ("X-Forwarded-For", "10.0.0.9")]).await.text(), "debug");
}

/// What stands at the site is the default of its routes, and a route's own word wins.
#[tokio::test(flavor = "multi_thread")]
async fn keys_of_a_site_are_the_default_of_its_routes() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = proxy(
        &fpm,
        r#"
        expires = "1h"
        [[site]]
        hosts = ["old.example"]
        redirect = { to = "https://new.example$request_uri", status = 301 }
        [[site.route]]
        path = "/robots.txt"
        respond = { body = "User-agent: *\n" }
        [[site]]
        hosts = ["gone.example"]
        respond = { status = 410 }
        [[site]]
        hosts = ["closed.example"]
        php_root = "/app"
        upstream = "php"
        allow = ["10.0.0.0/8"]
        deny = ["10.6.6.6"]
        [[site.route]]
        path = "/open"
        allow = []
        "#,
    )
    .await;
    std::fs::write(proxy.folder().join("a.css"), "a {}").unwrap();
    assert_eq!(get(&proxy, "/a.css", &[]).await.header("cache-control"), Some("max-age=3600"));
    let old = get(&proxy, "/x?y", &[("Host", "old.example")]).await;
    assert_eq!((old.status, old.header("location")), (301, Some("https://new.example/x?y")));
    assert_eq!(get(&proxy, "/robots.txt", &[("Host", "old.example")]).await.text(), "User-agent: *\n");
    assert_eq!(get(&proxy, "/x", &[("Host", "gone.example")]).await.status, 410);
    for (path, from, status) in [
        ("/", "10.1.1.1", 200),
        ("/", "10.6.6.6", 403),
        ("/", "192.0.2.1", 403),
        ("/open", "192.0.2.1", 200),
        ("/open", "10.6.6.6", 403),
    ] {
        let response = get(&proxy, path, &[("Host", "closed.example"), ("X-Forwarded-For", from)]).await;
        assert_eq!(response.status, status, "{path} from {from}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewrite_goes_on_with_another_path_and_internal_routes_are_for_it_alone() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = proxy(
        &fpm,
        r#"
        [[site.route]]
        path = "~^/shop/(?<item>[^/]+)$"
        rewrite = "/index.php?item=$item"
        [[site.route]]
        path = "~^/files/(.*)$"
        rewrite = "/private/$1"
        [[site.route]]
        path = "/private/*"
        internal = true
        files = "or-404"
        [[site.route]]
        path = "/circle"
        rewrite = "/circle"
        [[site]]
        hosts = ["inner.example"]
        php_root = "/app"
        upstream = "php"
        rewrite = "/app.php"
        internal = true
        [[site.route]]
        path = "/app.php"
        script = "/app.php"
        internal = false
        "#,
    )
    .await;
    std::fs::create_dir(proxy.folder().join("private")).unwrap();
    std::fs::write(proxy.folder().join("private/a b.txt"), "inside").unwrap();
    assert_eq!(get(&proxy, "/shop/blue%26?page=2", &[]).await.status, 200);
    let request = &fpm.requests()[0];
    assert_eq!(request.param("QUERY_STRING").as_deref(), Some("item=blue%26&page=2"));
    assert_eq!(request.param("REQUEST_URI").as_deref(), Some("/shop/blue%26?page=2"), "as the client has sent it");
    assert_eq!(get(&proxy, "/files/a%20b.txt", &[]).await.text(), "inside");
    assert_eq!(get(&proxy, "/private/a%20b.txt", &[]).await.status, 404, "by its own path nobody gets it");
    assert_eq!(get(&proxy, "/files/../private/a%20b.txt", &[]).await.status, 404);
    assert_eq!(get(&proxy, "/files/%2e%2e/%2e%2e/etc/passwd", &[]).await.status, 400);
    assert_eq!(get(&proxy, "/circle", &[]).await.status, 500);
    assert_eq!(get(&proxy, "/x", &[("Host", "inner.example")]).await.status, 404, "internal from the start");
    assert_eq!(get(&proxy, "/app.php", &[("Host", "inner.example")]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn error_pages_are_files_scripts_or_redirects_and_phps_own_stay() {
    let own = Behaviour::answers(404, &[("Content-Type", "text/html")], "PHP says no");
    let page = Behaviour::answers(200, &[("Content-Type", "text/html"), ("X-Page", "1")], "sorry");
    let fpm = ScriptedFpm::builder(Behaviour::hello("blue")).on("/index.php?own", own).on("/error.php", page).start().await;
    let gone = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let dead = gone.address();
    gone.dies().await;
    let site = r#"
        scripts = ["/index.php", "/error.php"]
        error_page = { "404" = "/404.html", "502-504" = "/50x.html" }
        [[site.route]]
        path = "/404.html"
        internal = true
        [[site.route]]
        path = "/assets/*"
        files = "or-404"
        [[site.route]]
        path = "/closed/*"
        deny = ["0.0.0.0/0"]
        error_page = { "403" = "/closed.html", "401-429" = "/error.php" }
        [[site.route]]
        path = "/secret/*"
        deny = ["0.0.0.0/0"]
        error_page = { "403" = "/error.php" }
        [[site.route]]
        path = "/fronted/*"
        deny = ["0.0.0.0/0"]
        error_page = { "403" = "/no-such-page" }
        [[site.route]]
        path = "/odd"
        try_files = ["$uri", "=410"]
        error_page = { "410" = "/error.php" }
        [[site.route]]
        path = "/lost/*"
        files = "or-404"
        error_page = { "404" = "https://example.com/lost" }
        [[site.route]]
        path = "/missing/*"
        files = "or-404"
        error_page = { "404" = "/none.html" }
        [[site.route]]
        path = "/none.html"
        files = "or-404"
        [[site.route]]
        path = "/dead"
        script = "/index.php"
        upstream = "dead"
        [[site.route]]
        path = "/50x.html"
        [[site.route]]
        path = "/try/*"
        try_files = ["$uri", "=404"]
        "#;
    let toml_dead = format!("[upstream.dead.set.blue]\nendpoints = [\"{dead}\"]\n");
    let proxy = proxy_with(&fpm, &toml_dead, site).await;
    for (name, text) in [("404.html", "not here"), ("50x.html", "broken")] {
        std::fs::write(proxy.folder().join(name), text).unwrap();
    }
    let missing = get(&proxy, "/assets/x.css", &[("Range", "bytes=0-1"), ("If-None-Match", "*")]).await;
    assert_eq!((missing.status, missing.text().as_str(), missing.header("etag")), (404, "not here", None));
    assert_eq!(get(&proxy, "/try/x", &[]).await.text(), "not here", "also for =404");
    assert_eq!(get(&proxy, "/404.html", &[]).await.text(), "not here", "internal, and a page for that");
    let head = http::send(proxy.http(), "HEAD", "/assets/x.css", &[], b"").await.unwrap();
    assert_eq!((head.status, head.body.len()), (404, 0));
    assert_eq!(get(&proxy, "/index.php?own", &[]).await.text(), "PHP says no");
    std::fs::write(proxy.folder().join("closed.html"), "closed").unwrap();
    let closed = http::send(proxy.http(), "POST", "/closed/x", &[], b"secret=1").await.unwrap();
    assert_eq!((closed.status, closed.text().as_str()), (403, "closed"));
    // A script would see what was asked for, and show it.
    let secret = get(&proxy, "/secret/x", &[]).await;
    assert_eq!((secret.status, secret.text().as_str()), (403, "403 Forbidden\n"));
    let fronted = get(&proxy, "/fronted/x", &[]).await;
    assert_eq!((fronted.status, fronted.text().as_str()), (403, "403 Forbidden\n"), "nor the front controller");
    let odd = http::send(proxy.http(), "POST", "/odd", &[], b"x=1").await.unwrap();
    assert_eq!((odd.status, odd.text().as_str(), odd.header("x-page")), (410, "sorry", Some("1")));
    let asked = fpm.requests().into_iter().find(|r| r.param("SCRIPT_NAME").as_deref() == Some("/error.php")).unwrap();
    assert_eq!((asked.method().as_str(), asked.param("REQUEST_URI").as_deref()), ("GET", Some("/odd")));
    let lost = get(&proxy, "/lost/x", &[]).await;
    assert_eq!((lost.status, lost.header("location")), (302, Some("https://example.com/lost")));
    let plain = get(&proxy, "/missing/x", &[]).await;
    assert_eq!((plain.status, plain.text().as_str()), (404, "404 Not Found\n"));
    assert!(proxy.log_text().contains("the error page cannot be shown"));
    let broken = get(&proxy, "/dead", &[]).await;
    assert_eq!((broken.status, broken.text().as_str()), (502, "broken"));
    let line = eventually("it is in the access log", async || {
        proxy.log_json().into_iter().rfind(|line| line["path"] == "/dead").ok_or_else(|| proxy.log_text())
    })
    .await;
    assert_eq!((line["status"].as_u64(), line["cause"].as_str()), (Some(502), Some("connect_failed")));
}

/// PHP looks who may have a file, and Slackwater sends it.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_php_names_is_sent_and_no_other() {
    let leads = |to: &str| {
        Behaviour::answers(
            200,
            &[("X-Accel-Redirect", to), ("Content-Type", "application/pdf"), ("Set-Cookie", "seen=1")],
            "PHP's body",
        )
    };
    let fpm = ScriptedFpm::builder(Behaviour::hello("blue"))
        .on("/index.php?file", leads("/private/a%20b.pdf"))
        .on("/index.php?missing", leads("/private/none.pdf"))
        .on("/index.php?public", leads("/public/a.pdf"))
        .on("/index.php?out", leads("/private/../../etc/passwd"))
        .on("/index.php?circle", leads("/again"))
        .on("/again.php", leads("/again"))
        .start()
        .await;
    let proxy = proxy(
        &fpm,
        r#"
        error_page = { "404" = "/404.html" }
        [[site.route]]
        path = "/private/*"
        internal = true
        files = "or-404"
        [[site.route]]
        path = "/public/*"
        files = "or-404"
        [[site.route]]
        path = "/again"
        internal = true
        script = "/again.php"
        [[site.route]]
        path = "/404.html"
        internal = true
        "#,
    )
    .await;
    for folder in ["private", "public"] {
        std::fs::create_dir(proxy.folder().join(folder)).unwrap();
    }
    std::fs::write(proxy.folder().join("private/a b.pdf"), "0123456789").unwrap();
    std::fs::write(proxy.folder().join("public/a.pdf"), "public").unwrap();
    std::fs::write(proxy.folder().join("404.html"), "not here").unwrap();
    let file = http::send(proxy.http(), "POST", "/index.php?file", &[("Range", "bytes=2-3")], b"x").await.unwrap();
    assert_eq!((file.status, file.text().as_str(), file.header("content-range")), (206, "23", Some("bytes 2-3/10")));
    assert_eq!((file.header("content-type"), file.header("set-cookie")), (Some("application/pdf"), Some("seen=1")));
    assert_eq!(file.header("x-accel-redirect"), None);
    let missing = get(&proxy, "/index.php?missing", &[]).await;
    assert_eq!((missing.status, missing.text().as_str()), (404, "not here"));
    for query in ["public", "out", "circle"] {
        let response = get(&proxy, &format!("/index.php?{query}"), &[]).await;
        assert_eq!(
            (response.status, response.text().as_str(), response.header("x-accel-redirect")),
            (500, "500 Internal Server Error\n", None),
            "{query}"
        );
    }
    // Each with its reason, at the level that is on.
    for why in ["whose route is not internal", "is no path", "which leads further"] {
        proxy.wait_for_log(why, Duration::from_secs(20)).await;
    }
    assert_eq!(get(&proxy, "/private/a%20b.pdf", &[]).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_too_often_or_for_too_much_at_once_gets_429() {
    let gate = Gate::closed();
    let held = Behaviour::hello("blue").holds_answer(&gate);
    let fpm = ScriptedFpm::builder(Behaviour::hello("blue")).on("/slow.php", held).start().await;
    let proxy = proxy(
        &fpm,
        r#"
        scripts = ["/*.php"]
        limit = { by = "$remote_addr", rate = "5/h", burst = 2 }
        error_page = { "429" = "/slowly.html" }
        [[site.route]]
        path = "/slow.php"
        limit = { by = "$cookie_session", concurrent = 2 }
        [[site.route]]
        path = "/slowly.html"
        internal = true
        "#,
    )
    .await;
    std::fs::write(proxy.folder().join("slowly.html"), "slowly").unwrap();
    let from = async |address: &str| get(&proxy, "/index.php", &[("X-Forwarded-For", address)]).await;
    for n in 0..7 {
        assert_eq!(from("192.0.2.1").await.status, 200, "{n}");
    }
    for _ in 0..3 {
        let refused = from("192.0.2.1").await;
        assert_eq!((refused.status, refused.text().as_str()), (429, "slowly"));
        assert_eq!(refused.header("retry-after"), Some("30"), "one in 720 s, and 30 s at most");
    }
    assert_eq!(from("192.0.2.2").await.status, 200, "each address has its own");
    let address = proxy.http();
    let slow = |session: &'static str| {
        tokio::spawn(async move { http::send(address, "GET", "/slow.php", &[("Cookie", session)], b"").await.unwrap().status })
    };
    let running = [slow("session=a"), slow("session=a"), slow("session=b"), slow("other=1"), slow("other=1"), slow("other=1")];
    gate.wait_reached(6).await;
    assert_eq!(slow("session=a").await.unwrap(), 429);
    gate.open();
    for one in running {
        assert_eq!(one.await.unwrap(), 200, "without the cookie there is nothing to count by");
    }
    assert_eq!(slow("session=a").await.unwrap(), 200, "their places are free again");
    assert_eq!(proxy.metric(&["slackwater_errors_total", "too_often"]).await, Some(3.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_asked_for_and_a_changed_file_is_seen() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("htpasswd");
    // Of `openssl passwd -apr1`: "password".
    std::fs::write(&file, "ann:$apr1$lZL6V/ci$eIMz/iKDkbtys/uU7LEK00\n").unwrap();
    let site = format!(
        r#"
        basic_auth = {{ realm = "members", file = "{}" }}
        [[site.route]]
        path = "/open.php"
        script = "/index.php"
        basic_auth = "off"
        [[site.route]]
        path = "/lost/*"
        basic_auth = {{ file = "/nobody/has/this" }}
        "#,
        file.display()
    );
    let proxy = proxy(&fpm, &site).await;
    let basic = |user: &str| format!("Basic {}", base64::Engine::encode(&base64::engine::general_purpose::STANDARD, user));
    let status = async |path: &str, user: &str| get(&proxy, path, &[("Authorization", &basic(user))]).await.status;
    let asked = get(&proxy, "/", &[]).await;
    assert_eq!((asked.status, asked.header("www-authenticate")), (401, Some("Basic realm=\"members\", charset=\"UTF-8\"")));
    assert_eq!(get(&proxy, "/open.php", &[]).await.status, 200);
    assert_eq!(
        [status("/", "ann:password").await, status("/", "ann:Password").await, status("/", "bob:password").await],
        [200, 401, 401]
    );
    assert_eq!(status("/", "ann:password").await, 200, "remembered");
    assert_eq!(status("/lost/x", "ann:password").await, 500, "better nobody than everybody");
    // Her password is another one now, and the old one is forgotten at once when that is seen.
    std::fs::write(&file, "ann:$apr1$abcdefgh$L.PT565ESX4Tp2bqNs7Ie.:changed\n").unwrap();
    eventually("the file is read again", async || match status("/", "ann:password").await {
        401 => Ok(()),
        other => Err(other.to_string()),
    })
    .await;
    assert_eq!(status("/", "ann:").await, 200);
    eventually("the user is in the access log", async || {
        let known = proxy.log_json().iter().any(|line| line["remote_user"] == "ann" && line["status"] == 200);
        if known { Ok(()) } else { Err(proxy.log_text()) }
    })
    .await;
}

/// What a client chooses gets around no guard.
#[tokio::test(flavor = "multi_thread")]
async fn no_guard_is_passed_by_another_way_to_write_a_request() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = proxy(
        &fpm,
        r#"
        request_headers = { set = { X-Tenant = "$cookie_tenant" } }
        [[site.route]]
        path = "/admin/*"
        deny = ["0.0.0.0/0"]
        [[site.route]]
        path = "/help"
        rewrite = "/i18n/$arg_lang/help.html"
        [[site.route]]
        path = '~^/f(.*)$'
        rewrite = "/pages/$1"
        [[site.route]]
        path = "/private/*"
        internal = true
        files = "or-404"
        [[site.route]]
        path = '~^/to/(.*)$'
        redirect = { to = "/$1" }
        [[site.route]]
        path = "/counted"
        script = "/index.php"
        limit = { by = "$cookie_session", rate = "1/h" }
        "#,
    )
    .await;
    std::fs::create_dir(proxy.folder().join("private")).unwrap();
    std::fs::write(proxy.folder().join("private/a.txt"), "inside").unwrap();
    for path in ["/admin/x", "/index.php/admin/x", "/index.php/x/../admin/x"] {
        assert_eq!(get(&proxy, path, &[]).await.status, 403, "{path}");
    }
    assert_eq!(get(&proxy, "/index.php/blog/x", &[]).await.status, 200);
    for path in ["/help?lang=../private/a.txt?", "/help?lang=..%2fprivate%2fa.txt%3f", "/f../private/a.txt"] {
        let response = get(&proxy, path, &[]).await;
        assert!(response.status == 400 || response.status == 404, "{path}: {}", response.status);
        assert_ne!(response.text(), "inside");
    }
    assert_eq!(get(&proxy, "/to//evil.example", &[]).await.header("location"), Some("/evil.example"));
    get(&proxy, "/index.php?tenant", &[("X-Tenant", "admin")]).await;
    let seen = fpm.requests().into_iter().find(|r| r.uri() == "/index.php?tenant").unwrap();
    assert_eq!(seen.param("HTTP_X_TENANT"), None, "the client's own, where ours is empty");
    let mut counted = Vec::new();
    for _ in 0..2 {
        let mut client = http::Connection::<tokio::net::TcpStream>::open(proxy.http()).await.unwrap();
        client.send(b"GET /counted HTTP/1.1\r\nHost: a\r\nCookie: x=\xff; session=abc\r\n\r\n").await.unwrap();
        counted.push(client.read_response("GET").await.unwrap().status);
    }
    assert_eq!(counted, [200, 429], "a byte that is no UTF-8 hides no cookie");
}

/// Browsers ask before they send, and read only what they may.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_origins_are_told_what_they_may() {
    let fpm = ScriptedFpm::start(
        Behaviour::hello("blue").header("Access-Control-Allow-Origin", "*").header("Access-Control-Allow-Credentials", "true"),
    )
    .await;
    let proxy = proxy(
        &fpm,
        r#"
        cors = { origins = ["https://app.example", "http://localhost:3000"], methods = ["GET", "PUT"], headers = ["X-Token"], expose = ["X-Total"], credentials = true, max_age = "1h" }
        deny = ["10.6.6.6"]
        [[site.route]]
        path = "/open/*"
        cors = { origins = ["*"] }
        [[site.route]]
        path = "/own/*"
        cors = "off"
        [[site.route]]
        path = "/put"
        when = { method = ["PUT"] }
        cors = { origins = ["https://app.example"], methods = ["PUT"] }
        [[site.route]]
        path = "/files/*"
        files = "or-404"
        "#,
    )
    .await;
    let ask = async |method: &str, path: &str, headers: &[(&str, &str)]| {
        http::send(proxy.http(), method, path, headers, b"").await.unwrap()
    };
    let preflight = [
        ("Origin", "https://app.example"),
        ("Access-Control-Request-Method", "PUT"),
        ("Access-Control-Request-Headers", "x-token"),
    ];
    let told = ask("OPTIONS", "/api", &preflight).await;
    assert_eq!((told.status, told.body.len()), (200, 0));
    for (name, value) in [
        ("access-control-allow-origin", "https://app.example"),
        ("access-control-allow-methods", "GET,PUT"),
        ("access-control-allow-headers", "x-token"),
        ("access-control-allow-credentials", "true"),
        ("access-control-max-age", "3600"),
    ] {
        assert_eq!(told.header(name).map(str::to_ascii_lowercase), Some(value.to_ascii_lowercase()), "{name}");
    }
    assert!(fpm.requests().is_empty(), "PHP is not asked");
    // Another origin is told nothing, and the request itself is answered: it is the browser that refuses.
    let other = ask("OPTIONS", "/api", &[("Origin", "https://evil.example"), preflight[1]]).await;
    assert_eq!((other.status, other.header("access-control-allow-origin")), (200, None));
    let answer = ask("GET", "/api", &[("Origin", "http://localhost:3000")]).await;
    assert_eq!(answer.header_all("access-control-allow-origin"), ["http://localhost:3000"], "instead of PHP's");
    assert_eq!((answer.header("access-control-expose-headers"), answer.text().as_str()), (Some("x-total"), "blue hello\n"));
    assert!(answer.header_all("vary").join(",").to_ascii_lowercase().contains("origin"));
    // Errors too; a plain OPTIONS is the application's; who may not at all is not told more.
    let missing = ask("GET", "/files/none.js", &[("Origin", "https://app.example")]).await;
    assert_eq!((missing.status, missing.header("access-control-allow-origin")), (404, Some("https://app.example")));
    assert_eq!(ask("OPTIONS", "/api", &[("Origin", "https://app.example")]).await.text(), "blue hello\n");
    let denied = ask("OPTIONS", "/api", &[preflight[0], preflight[1], ("X-Forwarded-For", "10.6.6.6")]).await;
    assert_eq!((denied.status, denied.header("access-control-allow-methods")), (403, None));
    assert_eq!(ask("GET", "/open/x", &[("Origin", "https://evil.example")]).await.header("access-control-allow-origin"), Some("*"));
    // PHP's own word lets in nobody who is not named, nor with credentials.
    let evil = ask("GET", "/api", &[("Origin", "https://evil.example")]).await;
    assert_eq!((evil.header("access-control-allow-origin"), evil.header("access-control-allow-credentials")), (None, Some("true")));
    assert_eq!(ask("GET", "/open/x", &[("Origin", "https://evil.example")]).await.header("access-control-allow-credentials"), None);
    // A browser asks about the request that it would send: the route for PUT answers.
    let put = ask("OPTIONS", "/put", &[preflight[0], ("Access-Control-Request-Method", "PUT")]).await;
    assert_eq!((put.header("access-control-allow-methods"), put.header("access-control-allow-credentials")), (Some("PUT"), None));
    // Without the key PHP's own word stands.
    let own = ask("OPTIONS", "/own/x", &preflight).await;
    assert_eq!((own.header("access-control-allow-origin"), own.text().as_str()), (Some("*"), "blue hello\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_maintenance_all_but_a_few_get_its_page() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = proxy(
        &fpm,
        r#"
        maintenance = { page = "/maintenance.html", from = ["10.0.0.0/8"], cookie = "bypass=secret", header = "X-Bypass: *", retry_after = "10m" }
        [[site.route]]
        path = "/assets/*"
        files = "or-404"
        maintenance = "off"
        [[site.route]]
        path = "/later/*"
        maintenance = { file = "{DIR}/on" }
        [[site.route]]
        path = "/script/*"
        maintenance = { page = "/none.html" }
        [[site.route]]
        path = "/open/*"
        maintenance = "off"
        "#,
    )
    .await;
    std::fs::write(proxy.folder().join("maintenance.html"), "<p>back soon</p>").unwrap();
    std::fs::create_dir(proxy.folder().join("assets")).unwrap();
    std::fs::write(proxy.folder().join("assets/a.css"), "a {}").unwrap();
    let page = get(&proxy, "/anything?x=1", &[]).await;
    assert_eq!((page.status, page.text().as_str(), page.header("retry-after")), (503, "<p>back soon</p>", Some("600")));
    assert_eq!((page.header("content-type"), page.header("etag")), (Some("text/html; charset=utf-8"), None));
    for header in [("X-Forwarded-For", "10.1.2.3"), ("Cookie", "a=1; bypass=secret"), ("X-Bypass", "1")] {
        assert_eq!(get(&proxy, "/anything", &[header]).await.text(), "blue hello\n", "{header:?}");
    }
    assert_eq!(get(&proxy, "/anything", &[("Cookie", "bypass=wrong")]).await.status, 503);
    assert_eq!(get(&proxy, "/assets/a.css", &[]).await.status, 200);
    // What is behind a script's name is what a front controller sees.
    assert_eq!(get(&proxy, "/open/x", &[]).await.status, 200);
    assert_eq!(get(&proxy, "/index.php/open/x", &[]).await.status, 503);
    // PHP is not asked for the page either.
    let asked = fpm.requests().len();
    assert_eq!(get(&proxy, "/script/x", &[]).await.text(), "503 Service Unavailable\n");
    assert_eq!(fpm.requests().len(), asked);
    // By a file that comes and goes.
    assert_eq!(get(&proxy, "/later/x", &[]).await.status, 200);
    let wait = async |status: u16| {
        let since = std::time::Instant::now();
        eventually("the file is seen", async || match get(&proxy, "/later/x", &[]).await.status {
            seen if seen == status => Ok(()),
            seen => Err(seen.to_string()),
        })
        .await;
        let took = since.elapsed();
        println!("{status} after {took:?} (promised: 1 s)");
        assert!(took < Duration::from_secs(10));
    };
    std::fs::write(proxy.folder().join("on"), "").unwrap();
    wait(503).await;
    let plain = get(&proxy, "/later/x", &[]).await;
    assert_eq!((plain.header("retry-after"), plain.text().as_str()), (None, "503 Service Unavailable\n"));
    std::fs::remove_file(proxy.folder().join("on")).unwrap();
    wait(200).await;
    for word in ["maintenance on", "maintenance off"] {
        let line = proxy.wait_for_log(word, Duration::from_secs(20)).await;
        assert!(line.contains("/on\""), "{line}");
    }
    eventually("the log names the cause", async || {
        let lines = proxy.log_json();
        lines
            .iter()
            .any(|line| line["cause"] == "maintenance" && line["status"] == 503)
            .then_some(())
            .ok_or_else(|| proxy.log_text())
    })
    .await;
}

/// PHP's word on how an answer is sent; none of it reaches the client.
#[tokio::test(flavor = "multi_thread")]
async fn php_sets_the_rate_and_the_charset() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = proxy(&fpm, "[[site.route]]\npath = \"/private/*\"\ninternal = true\nfiles = \"or-404\"").await;
    let body = "x".repeat(90_000);
    std::fs::create_dir(proxy.folder().join("private")).unwrap();
    std::fs::write(proxy.folder().join("private/a.bin"), &body).unwrap();
    let headers = [("X-Accel-Charset", "koi8-r"), ("X-Accel-Expires", "60"), ("Content-Type", "text/plain")];
    fpm.next(Behaviour::answers(200, &headers, "text"));
    let told = get(&proxy, "/text", &[]).await;
    assert_eq!(told.header("content-type"), Some("text/plain; charset=koi8-r"));
    assert_eq!((told.header("x-accel-charset"), told.header("x-accel-expires")), (None, None));
    // 90,000 bytes at 30,000 a second: the last third begins after two seconds. Both a body of PHP's and a file.
    for headers in
        [&[("X-Accel-Limit-Rate", "30000")][..], &[("X-Accel-Limit-Rate", "30000"), ("X-Accel-Redirect", "/private/a.bin")][..]]
    {
        fpm.next(Behaviour::answers(200, headers, body.clone()));
        let since = std::time::Instant::now();
        let slow = get(&proxy, "/slow", &[]).await;
        let took = since.elapsed();
        assert_eq!((slow.body.len(), slow.header("x-accel-limit-rate")), (90_000, None));
        println!("{took:?} for three seconds' worth, of which the first goes at once");
        assert!(took >= Duration::from_millis(1990) && took < Duration::from_secs(20), "{took:?}");
    }
}

/// What PHP has just written for one client is not what it wrote a moment ago for another.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_php_has_just_written_is_sent_as_it_is() {
    let fpm = ScriptedFpm::start(Behaviour::answers(200, &[("X-Accel-Redirect", "/private/report.csv")], "")).await;
    let proxy = proxy(&fpm, "[[site.route]]\npath = \"/private/*\"\ninternal = true\nfiles = \"or-404\"").await;
    let folder = proxy.folder().join("private");
    std::fs::create_dir(&folder).unwrap();
    assert_eq!(get(&proxy, "/report", &[]).await.status, 404);
    for name in ["alice", "bob__", "carol", "d"] {
        std::fs::write(folder.join("report.csv"), name).unwrap();
        assert_eq!(get(&proxy, "/report", &[]).await.text(), name);
    }
    std::fs::remove_file(folder.join("report.csv")).unwrap();
    assert_eq!(get(&proxy, "/report", &[]).await.status, 404);
}

/// What was found beside Nginx.
#[tokio::test(flavor = "multi_thread")]
async fn error_pages_of_plain_answers_and_of_methods_and_remote_user() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = proxy(
        &fpm,
        r#"
        error_page = { "403" = "/403.html", "404" = "/404.php", "405" = "/405.html" }
        scripts = ["/index.php", "/404.php"]
        [[site.route]]
        path = "/closed/*"
        respond = { status = 403 }
        [[site.route]]
        path = "/said/*"
        respond = { status = 403, body = "no" }
        [[site.route]]
        path = "/files/*"
        files = "or-404"
        "#,
    )
    .await;
    for (name, text) in [("403.html", "closed"), ("405.html", "not so"), ("a.txt", "a")] {
        std::fs::write(proxy.folder().join(name), text).unwrap();
    }
    let closed = get(&proxy, "/closed/x", &[]).await;
    assert_eq!((closed.status, closed.text().as_str()), (403, "closed"));
    assert_eq!(get(&proxy, "/said/x", &[]).await.text(), "no");
    let posted = http::send(proxy.http(), "POST", "/a.txt", &[], b"x").await.unwrap();
    assert_eq!((posted.status, posted.text().as_str(), posted.header("allow")), (405, "not so", Some("GET, HEAD")));
    // An application's page may send the status of the error itself.
    fpm.next(Behaviour::answers(404, &[("X-Accel-Expires", "60"), ("X-Accel-Limit-Rate", "100000")], "ours"));
    let missing = get(&proxy, "/files/none", &[]).await;
    assert_eq!((missing.status, missing.text().as_str()), (404, "ours"));
    assert!(missing.header("x-accel-expires").is_none() && missing.header("x-accel-limit-rate").is_none());
    // An answer without a body is whole as well.
    eventually("each line has its cause", async || {
        let lines = proxy.log_json();
        let cause = |path: &str| lines.iter().find(|line| line["path"] == path).map(|line| line["cause"].clone());
        match (cause("/a.txt"), cause("/said/x")) {
            (Some(posted), Some(said)) if posted == "method_not_allowed" && said.is_null() => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

/// All of them are driven by `from_nginx`; here what a site says besides.
#[tokio::test(flavor = "multi_thread")]
async fn a_preset_is_the_default_of_a_site() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = proxy(
        &fpm,
        r#"
        preset = "drupal"
        headers = { set = { X-Own = "1" } }
        [[site.route]]
        path = "/themes/*"
        access_log = "off"
        [[site.route]]
        path = "/themes/a/open.yml"
        files = "or-404"
        [[site.route]]
        path = "/system/files/*"
        allow = ["10.0.0.0/8"]
        "#,
    )
    .await;
    std::fs::create_dir_all(proxy.folder().join("themes/a")).unwrap();
    for file in ["a.yml", "open.yml", "a.css"] {
        std::fs::write(proxy.folder().join("themes/a").join(file), "text").unwrap();
    }
    let css = get(&proxy, "/themes/a/a.css", &[]).await;
    assert_eq!((css.status, css.header("x-own"), css.header("x-content-type-options")), (200, Some("1"), Some("nosniff")));
    assert_eq!(get(&proxy, "/themes/a/a.yml", &[]).await.status, 404, "what a preset closes no prefix opens");
    assert_eq!(get(&proxy, "/themes/a/open.yml", &[]).await.status, 200, "an exact path does");
    assert_eq!(get(&proxy, "/core/install.php", &[]).await.text(), "blue hello\n");
    // The preset does not close these; who may is the site's to say.
    assert_eq!(get(&proxy, "/system/files/x.sql", &[]).await.status, 403);
    assert_eq!(get(&proxy, "/system/files/x.sql", &[("X-Forwarded-For", "10.0.0.1")]).await.text(), "blue hello\n");
    assert_eq!(get(&proxy, "/de/system/files/x.sql", &[]).await.text(), "blue hello\n");
}
