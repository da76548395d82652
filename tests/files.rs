//! Static files beside scripts, and the commands that need no running process.

mod support;

use support::{
    http,
    process::{self, Slackwater},
    scripted_fpm::{Behaviour, ScriptedFpm},
};

#[tokio::test(flavor = "multi_thread")]
async fn files_are_served_and_everything_else_goes_to_the_front() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    put("a.css", "body { color: red }");
    put("docs/index.html", "<p>docs</p>");
    put("index.php", "<?php");
    put("other.php", "<?php");
    put(".env", "SECRET=1");
    let toml = format!(
        r#"
        [upstream.php.set.blue]
        endpoints = ["{}"]
        [[site]]
        root = "{}"
        php_root = "/app"
        upstream = "php"
        [[site.route]]
        path = "/assets/*"
        files = "or-404"
        "#,
        fpm.address(),
        folder.path().display()
    );
    let proxy = Slackwater::start(&toml).await;
    let address = proxy.http();
    let get = async |path: &str, headers: &[(&str, &str)]| http::send(address, "GET", path, headers, b"").await.unwrap();

    let css = get("/a.css", &[]).await;
    assert_eq!(
        (css.status, css.text().as_str(), css.header("content-type")),
        (200, "body { color: red }", Some("text/css; charset=utf-8"))
    );
    let etag = css.header("etag").unwrap().to_owned();
    assert_eq!(get("/a.css", &[("If-None-Match", &etag)]).await.status, 304);
    let part = get("/a.css", &[("Range", "bytes=0-3")]).await;
    assert_eq!((part.status, part.text().as_str(), part.header("content-range")), (206, "body", Some("bytes 0-3/19")));
    assert_eq!(get("/a.css", &[("Range", "bytes=90-")]).await.status, 416);
    let head = http::send(address, "HEAD", "/a.css", &[], b"").await.unwrap();
    assert_eq!((head.status, head.header("content-length"), head.text().as_str()), (200, Some("19"), ""));
    assert_eq!(http::send(address, "POST", "/a.css", &[], b"x").await.unwrap().status, 405);
    let moved = get("/docs?x=1", &[]).await;
    assert_eq!((moved.status, moved.header("location")), (301, Some("/docs/?x=1")));
    assert_eq!(get("/docs/", &[]).await.text(), "<p>docs</p>");
    assert!(fpm.requests().is_empty());

    assert_eq!(get("/nothing/here?q=1", &[]).await.text(), "blue hello\n");
    assert_eq!(fpm.requests()[0].param("SCRIPT_FILENAME").as_deref(), Some("/app/index.php"));
    assert_eq!(get("/assets/missing.js", &[]).await.status, 404);
    for hidden in ["/.env", "/other.php", "/a.css/x.php", "/%2e%65nv", "/docs/..%2f.env"] {
        assert_eq!(get(hidden, &[]).await.status, 404, "{hidden}");
    }
    proxy.wait_for_log(r#"scripts = [\"/other.php\"]"#, std::time::Duration::from_secs(5)).await;
    assert_eq!(fpm.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn check_and_render_say_what_is_wrong_and_where() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.toml");
    std::fs::write(&path, "workers = \"many\"\n[listen]\nhtttp = []\n").unwrap();
    let file = path.to_str().unwrap();
    let output = process::slackwater(&["check", "--config", file], &[]).await;
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1));
    for want in ["bad.toml:1:11", "bad.toml:3:1", "http"] {
        assert!(text.contains(want), "{want} is not in {text}");
    }
    let spec = folder.path().join("spec.yaml");
    std::fs::write(&spec, "name: {{NAME}}\nother: {{ left.alone }}\ngrace: {{GRACE:-30}}\n").unwrap();
    let spec = spec.to_str().unwrap();
    let filled = process::slackwater(&["render", spec], &[("NAME", "learning")]).await;
    let text = String::from_utf8_lossy(&filled.stdout).into_owned();
    assert!(text.contains("name: learning\nother: {{ left.alone }}\ngrace: 30\n"), "{text}");
    std::fs::write(spec, "a: {{ONE}}\nb: {{TWO}}\n").unwrap();
    let missing = process::slackwater(&["render", spec], &[]).await;
    let text = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(missing.status.code() == Some(1) && missing.stdout.is_empty());
    assert!(text.contains("spec.yaml:1:4") && text.contains("spec.yaml:2:4"), "{text}");
}
