//! Static files beside scripts, and the commands that need no running process.

mod support;

use std::{
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use support::{
    gate::eventually,
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

async fn proxy_of(fpm: &ScriptedFpm, top: &str, root: &Path, site: &str) -> Slackwater {
    let (address, root) = (fpm.address(), root.display());
    let toml = format!(
        "{top}\n[upstream.php.set.blue]\nendpoints = [\"{address}\"]\n[[site]]\nroot = \"{root}\"\nphp_root = \"/app\"\nupstream = \"php\"\n{site}"
    );
    Slackwater::start(&toml).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_beside_a_file_is_sent_to_who_takes_it() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in [
        ("a.css", "plain text"),
        ("a.css.br", "BROTLI"),
        ("a.css.gz", "GZIPPED"),
        ("b.css", "b"),
        ("old.css", "new"),
        ("old.css.gz", "OLD"),
    ] {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let old = std::fs::File::options().write(true).open(folder.path().join("old.css.gz")).unwrap();
    old.set_modified(std::time::SystemTime::now() - Duration::from_secs(3600)).unwrap();
    let site = "precompressed = [\"br\", \"gzip\"]\n[[site.route]]\npath = '~^/b\\.css'\nprecompressed = []";
    let proxy = proxy_of(&fpm, "", folder.path(), site).await;
    let get = async |path: &str, headers: &[(&str, &str)]| http::send(proxy.http(), "GET", path, headers, b"").await.unwrap();
    for (takes, body, coding) in [
        ("gzip, br", "BROTLI", Some("br")),
        ("gzip", "GZIPPED", Some("gzip")),
        ("br;q=0, *", "GZIPPED", Some("gzip")),
        ("identity", "plain text", None),
    ] {
        // The second is from memory.
        for _ in 0..2 {
            let css = get("/a.css", &[("Accept-Encoding", takes)]).await;
            assert_eq!((css.text().as_str(), css.header("content-encoding")), (body, coding), "{takes}");
            assert_eq!(
                (css.header("content-type"), css.header("vary")),
                (Some("text/css; charset=utf-8"), Some("Accept-Encoding"))
            );
        }
    }
    let br = ("Accept-Encoding", "br");
    let part = get("/a.css", &[br, ("Range", "bytes=1-2")]).await;
    assert_eq!((part.status, part.text().as_str(), part.header("content-range")), (206, "RO", Some("bytes 1-2/6")));
    let etag = get("/a.css", &[br]).await.header("etag").unwrap().to_owned();
    let unchanged = get("/a.css", &[br, ("If-None-Match", &etag)]).await;
    assert_eq!(
        (unchanged.status, unchanged.header("vary"), unchanged.header("content-encoding")),
        (304, Some("Accept-Encoding"), None)
    );
    assert_eq!(get("/a.css", &[("If-None-Match", &etag)]).await.status, 200, "it is another's");
    // One that is older than its file was made of another; and a route may do without.
    assert_eq!(get("/old.css", &[("Accept-Encoding", "gzip")]).await.text(), "new");
    let plain = get("/b.css", &[br]).await;
    assert_eq!((plain.text().as_str(), plain.header("vary")), ("b", None));
}

/// Contents, what was not there, and what has gone. With `buffer.files = "0B"` at once.
#[tokio::test(flavor = "multi_thread")]
async fn what_changes_on_disk_is_seen_within_a_second() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        // Another file in its place, as a deploy does it; same length, and perhaps the same second.
        std::fs::write(folder.path().join("new"), text).unwrap();
        std::fs::rename(folder.path().join("new"), folder.path().join(name)).unwrap();
    };
    for (top, promised) in [("", Duration::from_secs(1)), ("[buffer]\nfiles = \"0B\"", Duration::ZERO)] {
        write("a.css", "one");
        let proxy = proxy_of(&fpm, top, folder.path(), "").await;
        let get = async |path: &str| http::get(proxy.http(), path).await.unwrap().text();
        let seen = async |path: &str, wanted: &str| {
            let since = Instant::now();
            if promised.is_zero() {
                assert_eq!(get(path).await, wanted, "{path}");
                return;
            }
            eventually(wanted, async || match get(path).await {
                text if text == wanted => Ok(()),
                text => Err(text),
            })
            .await;
            println!("{path} is {wanted:?} after {:?} (promised: {promised:?})", since.elapsed());
            assert!(since.elapsed() < promised * 10);
        };
        assert_eq!((get("/a.css").await.as_str(), get("/b.css").await.as_str()), ("one", "blue hello\n"));
        write("a.css", "two");
        write("b.css", "here");
        seen("/a.css", "two").await;
        seen("/b.css", "here").await;
        std::fs::remove_file(folder.path().join("b.css")).unwrap();
        seen("/b.css", "blue hello\n").await;
        // Written over in place.
        std::fs::write(folder.path().join("a.css"), "six").unwrap();
        seen("/a.css", "six").await;
    }
}

/// strace holds each look at one folder for two seconds, as a network's file system does that stalls. What needs no file there does not wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_stalls_holds_up_its_own_files_alone() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let slow: Vec<_> = (0..8).map(|nth| folder.path().join(format!("slow{nth}.css"))).collect();
    for path in &slow {
        std::fs::write(path, "slow").unwrap();
    }
    std::fs::write(folder.path().join("fast.css"), "fast").unwrap();
    // Both workers' threads are in it.
    let proxy = proxy_of(&fpm, "workers = 2", folder.path(), "").await;
    let mut strace = std::process::Command::new("strace");
    strace.args(["-f", "-q", "-e", "trace=open,openat,openat2", "-e", "inject=open,openat,openat2:delay_enter=2000000"]);
    for path in &slow {
        strace.arg("-P").arg(path);
    }
    let log = folder.path().join("strace.log");
    strace.arg("-o").arg(&log).arg("-p").arg(proxy.pid().to_string());
    strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut strace = tokio::process::Command::from(strace).kill_on_drop(true).spawn().expect("strace (tests/run installs it)");
    let tracer = format!("TracerPid:\t{}", strace.id().unwrap());
    eventually("strace holds the process", async || {
        let threads = std::fs::read_dir(format!("/proc/{}/task", proxy.pid())).unwrap().flatten();
        let free = threads.map(|thread| std::fs::read_to_string(thread.path().join("status")).unwrap_or_default());
        free.into_iter().find(|status| !status.contains(&tracer)).map_or(Ok(()), Err)
    })
    .await;
    let address = proxy.http();
    let begun = Instant::now();
    let held: Vec<_> = (0..slow.len())
        .map(|nth| {
            tokio::spawn(async move {
                let css = http::get(address, &format!("/slow{nth}.css")).await.unwrap();
                (css.text(), begun.elapsed())
            })
        })
        .collect();
    // As long as they are held.
    let (mut worst, mut answered) = (Duration::ZERO, 0);
    while begun.elapsed() < Duration::from_millis(1500) {
        for path in ["/index.php", "/fast.css"] {
            let since = Instant::now();
            assert_eq!(http::get(address, path).await.unwrap().status, 200);
            worst = worst.max(since.elapsed());
            answered += 1;
        }
    }
    for task in held {
        let (text, took) = task.await.unwrap();
        assert_eq!(text, "slow");
        assert!(took >= Duration::from_secs(2), "it was not held: {took:?}");
    }
    println!("{answered} requests beside 8 that were held for 2 s: the slowest took {worst:?}");
    assert!(answered > 20 && worst < Duration::from_secs(1), "{answered}, {worst:?}");
    strace.start_kill().unwrap();
    strace.wait().await.unwrap();
}
