//! The image of docker/Dockerfile, built without a Docker engine and run as a cluster would: PID 1, no root, read-only, no capabilities, few
//! descriptors and processes. Takes some ten minutes and a folder of some GiB, so it is `tests/long image`.

mod support;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use support::{children, http, ledger::LedgerClient, ports, real_fpm::RealFpm};

const PATIENCE: Duration = Duration::from_secs(30);

/// Podman on the folder that docker/build-without-engine has filled.
struct Podman {
    folder: PathBuf,
}

impl Podman {
    fn run(&self, args: &[&str]) -> Output {
        let (store, run) = (self.folder.join("store"), self.folder.join("run"));
        let mut command = Command::new("podman");
        command.arg("--root").arg(store).arg("--runroot").arg(run).args(["--storage-driver", "vfs"]);
        command.args(["--cgroup-manager", "cgroupfs", "--runtime", "runc"]).args(args).output().expect("podman is installed")
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "podman {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

/// Removed with everything in it, however the test ends.
struct Container<'a>(&'a Podman, &'static str);

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = self.0.run(&["rm", "--force", self.1]);
    }
}

fn field(pid: u32, name: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the container's process");
    status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "builds an image, some ten minutes: tests/long image"]
async fn long_image() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = PathBuf::from(std::env::var_os("SLACKWATER_IMAGE_FOLDER").expect("tests/long sets it"));
    let built = Command::new(root.join("docker/build-without-engine")).arg(&folder).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    println!("{}", String::from_utf8_lossy(&built.stdout).lines().find(|line| line.contains("MiB")).unwrap_or_default());

    let (blue, green) = (RealFpm::start("blue").await, RealFpm::start("green").await);
    let [front, ops] = [ports::free_address(), ports::free_address()];
    let config = tempfile::tempdir().unwrap();
    std::fs::set_permissions(config.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let toml = |level: &str| {
        format!(
            r#"
            log.level = "{level}"
            [listen]
            http = ["{front}"]
            ops = "{ops}"
            [upstream.php]
            active = "blue"
            read_timeout = "10s"
            [upstream.php.set.blue]
            endpoints = ["{}"]
            php_root = "{}"
            status_path = "/status"
            [upstream.php.set.green]
            endpoints = ["{}"]
            php_root = "{}"
            status_path = "/status"
            [[site]]
            upstream = "php"
            scripts = ["/*.php"]
            "#,
            blue.address(),
            blue.docroot().display(),
            green.address(),
            green.docroot().display(),
        )
    };
    std::fs::write(config.path().join("slackwater.toml"), toml("info")).unwrap();
    let podman = Podman { folder };
    let container = Container(&podman, "slackwater-image-test");
    let _ = podman.run(&["rm", "--force", container.1]);
    let mount = format!("{}:/etc/slackwater:ro", config.path().display());
    podman.ok(&[
        "run",
        "--detach",
        "--name",
        container.1,
        "--network",
        "host",
        "--ulimit",
        "nofile=1024:1024",
        "--ulimit",
        "nproc=1024:1024",
        "--read-only",
        "--cap-drop",
        "all",
        "--security-opt",
        "no-new-privileges",
        "--env",
        "GRACE=30",
        "--volume",
        &mount,
        "localhost/slackwater",
    ]);
    let logs = || {
        let output = podman.run(&["logs", container.1]);
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };
    let began = Instant::now();
    while !http::get(ops, "/readyz").await.is_ok_and(|answer| answer.status == 200) {
        assert!(began.elapsed() < PATIENCE, "not ready:\n{}", logs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // Who it is.
    let pid: u32 = podman.ok(&["inspect", "--format", "{{.State.Pid}}", container.1]).parse().unwrap();
    assert_eq!(field(pid, "NSpid:").split_whitespace().last(), Some("1"));
    assert!(field(pid, "Uid:").split_whitespace().all(|uid| uid == "65532"));
    assert_eq!(field(pid, "CapEff:"), "0000000000000000");
    assert!(podman.run(&["exec", container.1, "sh", "-c", "true"]).status.code() != Some(0), "there is a shell");

    // It serves PHP, turns by `exec`, reloads on HUP.
    let client = LedgerClient::builder(front).connections(8).start();
    client.ledger().wait_more(200).await;
    let receipt = podman.ok(&["exec", container.1, "slackwater", "swap", "php", "green", "--wait"]);
    assert!(receipt.contains("\"to\":\"green\"") && receipt.contains("\"cut\":[]"), "{receipt}");
    let turned = tokio::time::Instant::now();
    client.ledger().wait_more(200).await;
    assert!(client.ledger().wrong_colour_since(turned, "green").is_empty());
    assert!(podman.ok(&["exec", container.1, "slackwater", "status"]).contains("active green"));
    std::fs::write(config.path().join("slackwater.toml"), toml("warn")).unwrap();
    podman.ok(&["kill", "--signal", "HUP", container.1]);
    while http::get(ops, "/status").await.unwrap().json()["last_reload"]["outcome"] != "applied" {
        assert!(began.elapsed() < PATIENCE, "not reloaded:\n{}", logs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(children::children_of(pid).is_empty(), "PID 1 has children");

    // TERM drains: what is under way ends, and the process with 0.
    let slow = tokio::spawn(async move { http::get(front, "/burn.php?ms=4000").await });
    let ledger = client.stop().await;
    println!("{}", ledger.summary());
    ledger.assert_clean();
    while http::get(ops, "/status").await.unwrap().json()["upstreams"]["php"]["sets"]["green"]["endpoints"][0]["busy"] != 1 {
        assert!(began.elapsed() < PATIENCE * 2, "the slow request has not begun");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for _ in 0..2 {
        // The second skips the lame-duck phase.
        podman.ok(&["kill", "--signal", "TERM", container.1]);
    }
    let answer = slow.await.unwrap().unwrap();
    assert_eq!((answer.status, answer.colour()), (200, Some("green")));
    assert_eq!(podman.ok(&["wait", container.1]), "0", "{}", logs());
}

/// docker/sbom names every crate of the binary with its version, checksum and licence, and none that only tests need.
#[test]
#[ignore = "builds cargo-cyclonedx, some minutes: tests/long image"]
fn long_image_sbom() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sbom.json");
    let made = Command::new("docker/sbom").arg(&file).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let sbom: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let components = sbom["components"].as_array().unwrap();
    let listed: Vec<(&str, &str)> =
        components.iter().map(|c| (c["name"].as_str().unwrap(), c["version"].as_str().unwrap())).collect();
    let tree = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}"])
        .output()
        .unwrap();
    for line in String::from_utf8(tree.stdout).unwrap().lines().filter(|line| !line.starts_with("slackwater ")) {
        let (name, rest) = line.split_once(" v").unwrap();
        let version = rest.split(' ').next().unwrap();
        assert!(listed.contains(&(name, version)), "{name} {version} is not in the list");
    }
    for name in ["criterion", "proptest", "rcgen"] {
        assert!(!listed.iter().any(|(listed, _)| *listed == name), "{name} is for tests alone");
    }
    for component in components {
        assert!(component["hashes"][0]["content"].is_string() && component["licenses"][0].is_object(), "{component}");
    }
    println!("{} crates, each with its checksum and licence", components.len());
}
