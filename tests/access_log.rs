//! The access log's file: rotated, full, or read by nobody. Lines may be lost and are counted; requests never.

mod support;

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    time::Duration,
};

use support::{
    gate::eventually,
    http::Connection,
    process::Slackwater,
    scripted_fpm::{Behaviour, ScriptedFpm},
};
use tokio::net::TcpStream;

async fn proxy(fpm: &ScriptedFpm, access_file: &str) -> Slackwater {
    let toml = format!(
        r#"
        [log]
        access_file = "{access_file}"
        [upstream.php.set.blue]
        endpoints = ["{}"]
        [[site]]
        php_root = "/app"
        upstream = "php"
        "#,
        fpm.address()
    );
    Slackwater::start(&toml).await
}

/// So many requests, each answered with 200.
async fn ask(proxy: &Slackwater, count: usize, target: &str) {
    let mut connection = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    for nth in 0..count {
        assert_eq!(connection.get(&format!("{target}&{nth}")).await.unwrap().status, 200, "{nth}");
    }
}

async fn lost(proxy: &Slackwater) -> f64 {
    proxy.metric(&["slackwater_access_log_lost_total"]).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_file_loses_no_line() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = proxy(&fpm, "{DIR}/access.log").await;
    let (path, old) = (proxy.folder().join("access.log"), proxy.folder().join("access.log.1"));
    let lines = |path: &std::path::Path| fs::read_to_string(path).unwrap_or_default().lines().count();
    ask(&proxy, 100, "/a?before").await;
    fs::rename(&path, &old).unwrap();
    proxy.signal(libc::SIGUSR1);
    eventually("the file is there again", async || path.exists().then_some(()).ok_or("not yet".to_owned())).await;
    ask(&proxy, 100, "/a?behind").await;
    eventually("every request has its line", async || match (lines(&old), lines(&path)) {
        (a, b) if a + b == 200 && b >= 100 => Ok(()),
        seen => Err(format!("{seen:?}")),
    })
    .await;
    assert!(!fs::read_to_string(&old).unwrap().contains("behind"));
    assert_eq!(lost(&proxy).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_loses_lines_and_no_request() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = proxy(&fpm, "/dev/full").await;
    ask(&proxy, 200, "/a?b").await;
    eventually("each is counted", async || match lost(&proxy).await {
        200.0 => Ok(()),
        seen => Err(seen.to_string()),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_loses_lines_and_no_request() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    // For writing too: else opening it would wait for the other side.
    let reader = File::options().read(true).write(true).open(&path).unwrap();
    let proxy = proxy(&fpm, path.to_str().unwrap()).await;
    let count = 3000;
    ask(&proxy, count, &format!("/a?{}", "x".repeat(8000))).await;
    eventually("what there is no room for is counted", async || match lost(&proxy).await {
        0.0 => Err("none".to_owned()),
        _ => Ok(()),
    })
    .await;
    // Once it reads again, what is kept comes whole.
    let kept = count - lost(&proxy).await as usize;
    let read = tokio::task::spawn_blocking(move || {
        let mut lines = BufReader::new(reader).lines();
        for nth in 0..kept {
            let line: serde_json::Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
            assert_eq!(line["status"], 200, "{nth}");
        }
    });
    tokio::time::timeout(Duration::from_secs(60), read).await.expect("every line that was not lost").unwrap();
    println!("{count} requests, {kept} lines of 8 KB kept");
}
