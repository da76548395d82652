//! Compression on the way: the same once it is decoded, and left alone where it is better so.

mod support;

use std::path::Path;

use support::{
    gate::Gate,
    http::{self, Connection},
    process::Slackwater,
    scripted_fpm::{Behaviour, ScriptedFpm},
};
use tokio::net::TcpStream;

async fn proxy(fpm: &ScriptedFpm, root: &Path, site: &str) -> Slackwater {
    let (address, root) = (fpm.address(), root.display());
    let toml = format!(
        "[upstream.php.set.blue]\nendpoints = [\"{address}\"]\n[[site]]\nroot = \"{root}\"\nphp_root = \"/app\"\nupstream = \"php\"\n{site}"
    );
    Slackwater::start(&toml).await
}

/// Text that shrinks, and is not the same everywhere.
fn text(bytes: usize) -> String {
    let mut text: String = (0..bytes / 8).map(|nth| format!("{nth:07} ")).collect();
    text.truncate(bytes);
    text
}

/// As curl decodes it, and the head as it came.
async fn curl(address: std::net::SocketAddr, path: &str, args: &[&str]) -> (String, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let head = folder.path().join("head");
    let mut command = tokio::process::Command::new("curl");
    command.args(["-sS", "--max-time", "30", "--compressed", "-D"]).arg(&head).args(args).arg(format!("http://{address}{path}"));
    let out = command.output().await.expect("curl (tests/run installs it)");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    (std::fs::read_to_string(head).unwrap().to_ascii_lowercase(), out.stdout)
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_the_same_once_they_are_decoded() {
    let (small, middle, large) = (text(5000), text(40_000), text(3_000_000));
    let html =
        |body: &str| Behaviour::answers(200, &[("Content-Type", "text/html; charset=UTF-8"), ("ETag", "\"php\"")], body.to_owned());
    let fpm = ScriptedFpm::builder(html(&small))
        .on("/index.php?middle", html(&middle))
        .on("/index.php?large", html(&large))
        .start()
        .await;
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in [("small.css", &small), ("middle.css", &middle), ("large.js", &large)] {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let proxy = proxy(&fpm, folder.path(), "compress = [\"br\", \"zstd\", \"gzip\"]").await;
    for (path, plain) in [
        ("/small.css", &small),
        ("/middle.css", &middle),
        ("/large.js", &large),
        ("/index.php", &small),
        ("/index.php?middle", &middle),
        ("/index.php?large", &large),
    ] {
        for coding in ["br", "zstd", "gzip"] {
            for version in ["--http1.1", "--http2-prior-knowledge"] {
                let (head, body) = curl(proxy.http(), path, &[version, "-H", &format!("Accept-Encoding: {coding}")]).await;
                assert!(body == plain.as_bytes(), "{path} {coding} {version}: {} of {} bytes", body.len(), plain.len());
                assert!(head.contains(&format!("content-encoding: {coding}")) && head.contains("vary: accept-encoding"), "{head}");
                assert!(head.contains("etag: w/\"") && !head.contains("accept-ranges"), "{head}");
                // What is whole in memory is done at once, and its length is known.
                assert_eq!(head.contains("content-length"), plain.len() == middle.len(), "{head}");
            }
        }
        let plain_answer = http::get(proxy.http(), path).await.unwrap();
        assert_eq!((plain_answer.header("content-encoding"), plain_answer.header("vary")), (None, Some("Accept-Encoding")));
        assert!(plain_answer.body == plain.as_bytes());
    }
    // What the client likes best, the log says what was sent.
    let liked = http::send(proxy.http(), "GET", "/small.css", &[("Accept-Encoding", "br;q=0.5, gzip")], b"").await.unwrap();
    assert_eq!(liked.header("content-encoding"), Some("gzip"));
    assert!(liked.body.len() < 3000, "{}", liked.body.len());
    // The weak tag is as good for a condition; a range is one of the file.
    let etag = liked.header("etag").unwrap().to_owned();
    let gzip = ("Accept-Encoding", "gzip");
    let unchanged = http::send(proxy.http(), "GET", "/small.css", &[gzip, ("If-None-Match", &etag)], b"").await.unwrap();
    assert_eq!(
        (unchanged.status, unchanged.header("etag"), unchanged.header("vary")),
        (304, Some(etag.as_str()), Some("Accept-Encoding"))
    );
    let strong = etag.trim_start_matches("W/").to_owned();
    let unchanged = http::send(proxy.http(), "GET", "/small.css", &[("If-None-Match", &strong)], b"").await.unwrap();
    assert_eq!((unchanged.status, unchanged.header("etag")), (304, Some(strong.as_str())));
    let part = http::send(proxy.http(), "GET", "/small.css", &[gzip, ("Range", "bytes=10-19")], b"").await.unwrap();
    assert_eq!((part.status, part.header("content-encoding")), (206, None));
    assert_eq!(part.text(), small[10..20]);
    let head = http::send(proxy.http(), "HEAD", "/small.css", &[gzip], b"").await.unwrap();
    assert_eq!((head.status, head.body.len()), (200, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_better_left_alone_is() {
    let body = text(5000);
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in [("a.css", 5000), ("tiny.css", 100), ("a.png", 5000), ("b.css", 5000), ("b.css.gz", 48)] {
        std::fs::write(folder.path().join(name), text(bytes)).unwrap();
    }
    let site = r#"
        precompressed = ["gzip"]
        compress = ["gzip"]
        [[site.route]]
        path = "/private/*"
        compress = { codings = ["gzip"], private = true, min = "10B", types = ["application/x-own"] }
        [[site.route]]
        path = "/off/*"
        compress = "off"
    "#;
    let proxy = proxy(&fpm, folder.path(), site).await;
    let coding = async |path: &str, headers: &[(&str, &str)]| {
        let all = [&[("Accept-Encoding", "gzip")], headers].concat();
        http::send(proxy.http(), "GET", path, &all, b"").await.unwrap().header("content-encoding").map(str::to_owned)
    };
    let gzip = Some("gzip".to_owned());
    assert_eq!(coding("/a.css", &[]).await, gzip);
    // Of a file nobody guesses anything.
    assert_eq!(coding("/a.css", &[("Cookie", "a=1")]).await, gzip);
    assert_eq!([coding("/tiny.css", &[]).await, coding("/a.png", &[]).await], [None, None]);
    // The one beside it, and not compressed once more.
    let beside = http::send(proxy.http(), "GET", "/b.css", &[("Accept-Encoding", "gzip")], b"").await.unwrap();
    assert_eq!((beside.header("content-encoding"), beside.body.len()), (Some("gzip"), 48));
    let php = async |path: &str, asked: &[(&str, &str)], told: &[(&str, &str)]| {
        fpm.next(Behaviour::answers(200, told, body.clone()));
        coding(path, asked).await
    };
    let html = ("Content-Type", "text/html");
    assert_eq!(php("/x", &[], &[html]).await, gzip);
    for told in [
        &[html, ("Set-Cookie", "a=1")][..],
        &[html, ("Content-Encoding", "br")],
        &[html, ("Cache-Control", "public, No-Transform")],
        &[("Content-Type", "text/event-stream")],
        &[("Content-Type", "image/png")],
    ] {
        assert_ne!(php("/x", &[], told).await, gzip, "{told:?}");
    }
    for asked in [("Cookie", "session=1"), ("Authorization", "Bearer x")] {
        assert_eq!(php("/x", &[asked], &[html]).await, None, "BREACH: {asked:?}");
        assert_eq!(php("/private/x", &[asked], &[("Content-Type", "application/x-own; a=b")]).await, gzip, "asked for: {asked:?}");
    }
    assert_eq!(php("/private/x", &[], &[html]).await, None, "other types are named");
    assert_eq!(php("/off/x", &[], &[html]).await, None);

    // What PHP sends as it comes does not wait in an encoder.
    let gate = Gate::closed();
    let told = [html, ("X-Accel-Buffering", "no")];
    fpm.next(Behaviour::answers(200, &told, body.clone()).holds_end(&gate));
    let mut stream = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    stream.send(http::request("GET", "/stream", &[("Accept-Encoding", "gzip")], b"")).await.unwrap();
    let head = stream.read_head().await.unwrap();
    assert_eq!(head.header("content-encoding"), None);
    let mut seen = 0;
    while seen < body.len() {
        seen += stream.read_chunk().await.unwrap().len();
    }
    gate.open();
}
