//! What is left to whoever has taken over the process: nothing that it does not need to serve (`sandbox = "on"`).

use std::{fs, os::unix::fs::symlink};

use crate::{
    case::{PATIENCE, toml},
    support::{
        gate::within,
        http,
        process::Slackwater,
        scripted_fpm::{Behaviour, ScriptedFpm},
    },
};

/// As the kernel says it of each thread.
fn threads(pid: u32, field: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = |task: fs::DirEntry| fs::read_to_string(task.path().join("status")).unwrap_or_default();
    let value = |text: String| text.lines().find_map(|line| line.strip_prefix(field).map(|rest| rest.trim().to_owned()));
    tasks.filter_map(|task| value(status(task.unwrap()))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_sandbox_only_what_the_configuration_names_can_be_read() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let folder = tempfile::tempdir().unwrap();
    let releases = folder.path().join("releases");
    for (release, text) in [("1", "one"), ("2", "two")] {
        fs::create_dir_all(releases.join(release).join("web")).unwrap();
        fs::write(releases.join(release).join("web/page.txt"), text).unwrap();
    }
    // What an intruder would look for, through a link in the root.
    let secrets = tempfile::tempdir().unwrap();
    fs::write(secrets.path().join("key.txt"), "secret").unwrap();
    symlink(secrets.path().join("key.txt"), releases.join("1/web/link.txt")).unwrap();
    symlink(releases.join("1"), folder.path().join("current")).unwrap();
    // The link is in the middle, as releases have it.
    let root = folder.path().join("current/web").display().to_string();
    let site = format!("[[site]]\nroot = \"{root}\"\nsymlinks = \"follow\"\n");
    let off = toml(&fpm.address().to_string(), "", "workers_per_endpoint = 4").replace("[[site]]\n", &site);
    let on = format!("sandbox = \"on\"\n{off}[buffer]\ndir = \"{{DIR}}\"\n");

    let open = Slackwater::start(&off).await;
    assert_eq!(http::get(open.http(), "/link.txt").await.unwrap().text(), "secret", "without it a link is followed");
    assert!(threads(open.pid(), "Seccomp:").iter().all(|mode| mode == "0"));

    let proxy = Slackwater::start(&on).await;
    let line = proxy.wait_for_log("sandboxed", PATIENCE).await;
    println!("{line}");
    assert_eq!(http::get(proxy.http(), "/index.php").await.unwrap().status, 200);
    assert_eq!(http::get(proxy.http(), "/page.txt").await.unwrap().text(), "one");
    let all = threads(proxy.pid(), "Seccomp:");
    assert!(all.len() > 2 && all.iter().all(|mode| mode == "2"), "a thread without its filter: {all:?}");
    assert!(threads(proxy.pid(), "NoNewPrivs:").iter().all(|set| set == "1"));
    // A kernel without Landlock says so in that line.
    if line.contains("no Landlock") {
        println!("this kernel has no Landlock: links are followed");
    } else {
        let answer = http::get(proxy.http(), "/link.txt").await.unwrap();
        assert!(matches!(answer.status, 403 | 404), "{} {}", answer.status, answer.text());
    }
    // A body spills, an operator orders, a release goes live, a reload is as before.
    let answer = within(PATIENCE, "a post", http::send(proxy.http(), "POST", "/index.php", &[], &vec![7; 1 << 20])).await.unwrap();
    assert_eq!(answer.status, 200);
    fs::remove_file(folder.path().join("current")).unwrap();
    symlink(releases.join("2"), folder.path().join("current")).unwrap();
    crate::support::gate::eventually("the next release is served", async || {
        match http::get(proxy.http(), "/page.txt").await.unwrap().text() {
            text if text == "two" => Ok(()),
            other => Err(other),
        }
    })
    .await;
    proxy.rewrite(&on.replace("workers_per_endpoint = 4", "workers_per_endpoint = 5"));
    assert!(proxy.cli_ok(&["reload"]).await.contains("applied"));
    // The next release beside this one, as the manifests have it: a root of its own, made after the start.
    let next = releases.join("3/web");
    fs::create_dir_all(&next).unwrap();
    fs::write(next.join("page.txt"), "three").unwrap();
    proxy.rewrite(&on.replace(&format!("root = \"{root}\""), &format!("root = \"{}\"", next.display())));
    assert!(proxy.cli_ok(&["reload"]).await.contains("applied"));
    assert_eq!(http::get(proxy.http(), "/page.txt").await.unwrap().text(), "three");
    // A folder beyond it is refused with the reason, not served as empty.
    proxy.rewrite(&on.replace(&format!("root = \"{root}\""), &format!("root = \"{}\"", secrets.path().display())));
    let refused = proxy.cli(&["reload"]).await;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("the sandbox was made without") && said.contains("needs a restart"),
        "{said}"
    );
}
