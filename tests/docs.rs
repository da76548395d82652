//! What the documentation says is so: every command in it is run, every link leads somewhere, what is made of the code is as the code has it.

mod support;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Output,
};

use slackwater::telemetry::metrics::{Kind, METRICS};
use support::{
    http,
    markdown::anchors,
    process::Slackwater,
    scripted_fpm::{Behaviour, ScriptedFpm},
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README, CONTRIBUTING, SECURITY and everything in docs/ but what is a record of its day.
fn pages() -> Vec<(String, String)> {
    let mut names: Vec<PathBuf> = ["README.md", "CONTRIBUTING.md", "SECURITY.md"].iter().map(PathBuf::from).collect();
    for folder in ["docs", "docs/from-nginx"] {
        let entries =
            fs::read_dir(root().join(folder)).unwrap().map(|entry| PathBuf::from(folder).join(entry.unwrap().file_name()));
        names.extend(entries.filter(|name| name.extension().is_some_and(|extension| extension == "md")));
    }
    names.sort();
    names.into_iter().map(|name| (name.display().to_string(), fs::read_to_string(root().join(&name)).unwrap())).collect()
}

/// `WRITE_DOCS=1 cargo test --test docs` writes it.
#[test]
fn the_table_of_metrics_is_what_the_code_has() {
    let mut table = String::from("<!-- metrics -->\n| name | type | labels | meaning |\n|---|---|---|---|\n");
    for metric in METRICS {
        let kind = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        table += &format!("| `{}` | {kind} | {} | {} |\n", metric.name, labels.join(", "), metric.help);
    }
    let file = root().join("docs/metrics.md");
    let page = fs::read_to_string(&file).unwrap();
    let (before, rest) = page.split_once("<!-- metrics -->\n").unwrap();
    let (_, after) = rest.split_once("<!-- /metrics -->").unwrap();
    let wanted = format!("{before}{table}<!-- /metrics -->{after}");
    if std::env::var_os("WRITE_DOCS").is_some() {
        fs::write(&file, &wanted).unwrap();
        return;
    }
    assert_eq!(page, wanted, "run  WRITE_DOCS=1 cargo test --test docs");
}

/// Prometheus' conventions for names and units (<https://prometheus.io/docs/practices/naming/>).
#[test]
fn the_names_of_metrics_keep_to_the_conventions() {
    for metric in METRICS {
        let name = metric.name;
        assert!(name.starts_with("slackwater_") || name.starts_with("process_"), "{name}");
        assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
        assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}: counters alone end in _total");
        for unit in ["milliseconds", "_ms", "minutes", "kilobytes", "megabytes", "percent"] {
            assert!(!name.contains(unit), "{name}: seconds, bytes and ratios are the base units");
        }
        if metric.kind == Kind::Histogram {
            assert!(name.ends_with("_seconds"), "{name}");
        }
        assert!(metric.help.ends_with('.') && !metric.help.contains('|'), "{name}: {}", metric.help);
    }
}

#[test]
fn every_link_leads_somewhere() {
    let mut wrong = Vec::new();
    let mut links = 0;
    for (name, page) in pages() {
        let folder = Path::new(&name).parent().unwrap().to_owned();
        for part in page.split("](").skip(1) {
            let Some((target, _)) = part.split_once(')') else { continue };
            if target.contains("://") || target.contains(' ') || target.is_empty() {
                continue;
            }
            links += 1;
            let (file, section) = target.split_once('#').map_or((target, None), |(file, section)| (file, Some(section)));
            let path = if file.is_empty() { root().join(&name) } else { root().join(&folder).join(file) };
            if !path.exists() {
                wrong.push(format!("{name}: {target}: no such file"));
            } else if let Some(section) = section
                && path.extension().is_some_and(|extension| extension == "md")
                && !anchors(&fs::read_to_string(&path).unwrap()).contains(section)
            {
                wrong.push(format!("{name}: {target}: no such heading"));
            }
        }
    }
    assert!(wrong.is_empty() && links > 100, "{links} links\n{}", wrong.join("\n"));
}

/// A command, or a block of them that belong together.
#[derive(Clone, Debug)]
struct Command {
    place: String,
    text: String,
}

/// What stands in blocks without a language (a picture of characters is `text`), and what stands within a line and begins with the name of a program.
fn commands(name: &str, page: &str) -> Vec<Command> {
    let mut found = Vec::new();
    let mut block: Option<(usize, bool, String)> = None;
    for (at, line) in page.lines().enumerate() {
        let line_number = at + 1;
        if let Some(language) = line.trim_start().strip_prefix("```") {
            block = match block.take() {
                None => Some((line_number + 1, matches!(language, "" | "sh" | "console"), String::new())),
                Some((begun, true, text)) => {
                    found.push(Command { place: format!("{name}:{begun}"), text });
                    None
                }
                Some(_) => None,
            };
        } else if let Some((_, _, text)) = &mut block {
            *text += line.trim();
            text.push('\n');
        } else {
            for span in line.split('`').skip(1).step_by(2) {
                let program = span.split([' ', '/']).next().unwrap_or_default();
                if PROGRAMS.contains(&program) && span.contains(' ') {
                    found.push(Command { place: format!("{name}:{line_number}"), text: format!("{span}\n") });
                }
            }
        }
    }
    found
}

const PROGRAMS: [&str; 18] = [
    "slackwater",
    "cargo",
    "tests",
    "benches",
    "docker",
    "fuzz",
    "kubectl",
    "curl",
    "systemctl",
    "journalctl",
    "openssl",
    "promtool",
    "jq",
    "ss",
    "kill",
    "useradd",
    "grep",
    "install",
];

/// Lines that are not run here, by how they begin: why, and what runs the same.
const ELSEWHERE: &[(&str, &str)] = &[
    ("cargo run --release -- demo", "tests/swap.rs and tests/life_cycle.rs: minutes of a release build"),
    ("cargo build", "every run of the tests builds it"),
    ("cargo bench", "names a bench that Cargo.toml has: looked up"),
    ("cargo test", "names a test, or a feature, that Cargo.toml has: looked up"),
    ("cargo deny", "tests/run"),
    ("PAGE=", "the file is looked up"),
    ("WRITE_DOCS=1 cargo test", "the_table_of_metrics_is_what_the_code_has"),
    ("GREP=", "the file is looked up"),
    ("SLACKWATER_TEST_KUBECONFIG=", "wants a real API server; tests/cluster.rs before the fake one"),
    ("tests/", "the file, and what it is told, are looked up"),
    ("benches/", "the file is looked up"),
    ("docker/", "the file is looked up; tests/long image"),
    ("docker build", "no engine here: tests/long image builds the same file"),
    ("docker compose", "no engine here; compose.toml is loaded by the tests of the configuration"),
    ("docker run", "no engine here: tests/long image runs it by podman"),
    ("docker exec", "no engine here"),
    ("docker stop", "no engine here"),
    ("useradd", "would change this machine"),
    ("install ", "would change this machine"),
    ("slackwater completions bash >", "would change this machine: the_manual_and_the_completions_know_every_command"),
    ("systemctl", "would change this machine: tests/systemd.rs"),
    ("kill ", "tests/life_cycle.rs"),
    ("openssl passwd", "asks at the terminal: tests/rules.rs makes one"),
    ("slackwater serve", "every test starts it"),
    ("slackwater drain", "ends the process: tests/life_cycle.rs"),
    ("slackwater swap php green --wait --timeout 60s --config config/kubernetes/ci.toml", "wants a cluster: tests/fleet.rs"),
    ("slackwater swap php green --wait --config config/kubernetes/ci.toml", "wants a cluster: tests/fleet.rs"),
    ("export KUBECONFIG=", "for the line behind it"),
];

/// A stand-in: its own arguments are not looked at, but what it would give comes from the process.
const KUBECTL: &str = r#"#!/bin/bash
while (($#)); do
    case $1 in
        --) shift; exec "$@" ;;
        logs) exec cat "$LOG" ;;
        apply) if [[ " $* " == *" -f - "* ]]; then grep '^kind: ' >/dev/null; exit; fi ;;
    esac
    shift
done
"#;

struct World {
    folder: tempfile::TempDir,
    proxy: Slackwater,
    endpoint: String,
    _fpm: Vec<ScriptedFpm>,
}

impl World {
    async fn new() -> World {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["config", "docker", "tests", "docs"] {
            std::os::unix::fs::symlink(root().join(name), at(name)).unwrap();
        }
        fs::create_dir_all(at("bin")).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_slackwater"), at("bin/slackwater")).unwrap();
        for (name, script) in [("kubectl", KUBECTL), ("journalctl", "#!/bin/sh\nexec cat \"$LOG\"\n")] {
            fs::write(at("bin").join(name), script).unwrap();
            fs::set_permissions(at("bin").join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let public = at("public");
        fs::create_dir_all(&public).unwrap();
        fs::write(public.join("index.php"), "<?php").unwrap();
        let certified = rcgen::generate_simple_self_signed(["example.com".to_owned()]).unwrap();
        fs::write(at("tls.crt"), certified.cert.pem()).unwrap();
        fs::write(at("tls.key"), certified.signing_key.serialize_pem()).unwrap();
        let fpm = [ScriptedFpm::start(Behaviour::hello("blue")).await, ScriptedFpm::start(Behaviour::hello("green")).await];
        let toml = format!(
            "[listen]\nhttp = [\"{{HTTP}}\"]\nhttps = [\"{{HTTPS}}\"]\nops = \"{{OPS}}\"\nadmin = \"{{ADMIN}}\"\n[[tls]]\ncertificate = \"{}\"\nkey = \"{}\"\n\
             [drain]\ngrace = \"90s\"\n[upstream.php]\nactive = \"blue\"\nworkers_per_endpoint = 4\n[upstream.php.set.blue]\nendpoints = [\"{}\"]\n\
             [upstream.php.set.green]\nendpoints = [\"{}\"]\n[[site]]\nhosts = [\"example.com\", \"127.0.0.1\"]\nroot = \"{}\"\nupstream = \"php\"\n",
            at("tls.crt").display(),
            at("tls.key").display(),
            fpm[0].address(),
            fpm[1].address(),
            public.display()
        );
        let proxy = Slackwater::start(&toml).await;
        // README's smallest configuration, with a folder that is there.
        let readme = fs::read_to_string(root().join("README.md")).unwrap();
        let smallest = readme.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
        fs::write(at("site.toml"), smallest.replace("/var/www/html/public", &public.display().to_string())).unwrap();
        let endpoint = fpm[0].address().to_string();
        World { folder, proxy, endpoint, _fpm: fpm.into() }
    }

    /// Names that stand for something, and addresses of the documentation's machines.
    fn fill(&self, text: &str) -> String {
        let word = |text: &str, name: &str, value: &str| -> String {
            let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let mut filled = String::new();
            let mut rest = text;
            while let Some(at) = rest.find(name) {
                let (before, after) = (&rest[..at], &rest[at + name.len()..]);
                filled += before;
                let whole = !before.ends_with(is_part) && !after.starts_with(is_part);
                filled += if whole { value } else { name };
                rest = after;
            }
            filled + rest
        };
        let mut text = text.replace('…', "php green");
        // Orders to the process that would have been started with it.
        let socket = format!("--admin {}", self.proxy.admin().display());
        for order in ["slackwater reload", "slackwater swap php green --wait", "slackwater swap php blue --wait"] {
            text = text.replace(&format!("{order} --config site.toml"), &format!("{order} {socket}"));
        }
        let (ops, http, https) =
            (self.proxy.ops().to_string(), self.proxy.http().port().to_string(), self.proxy.https().to_string());
        for (name, value) in [
            ("127.0.0.1:9901", &*ops),
            ("127.0.0.1:8443", &https),
            ("sport = :8080", &format!("sport = :{http}")),
            ("10.0.0.11:9000", &self.endpoint),
            ("10.0.0.21:9000", &self.endpoint),
            ("/run/slackwater/admin.sock", &self.proxy.admin().display().to_string()),
            ("/etc/slackwater/slackwater.toml", &self.proxy.config().display().to_string()),
            ("/usr/local/share/man/man1", &self.folder.path().join("man").display().to_string()),
        ] {
            text = text.replace(name, value);
        }
        for (name, value) in
            [("PID", self.proxy.pid().to_string()), ("ADDRESS", self.endpoint.clone()), ("POD", "slackwater-0".to_owned())]
        {
            text = word(&text, name, &value);
        }
        text
    }

    async fn run(&self, script: &str) -> Output {
        fs::write(self.folder.path().join("log"), self.proxy.log_text()).unwrap();
        let path = format!("{}:{}", self.folder.path().join("bin").display(), std::env::var("PATH").unwrap());
        let mut command = tokio::process::Command::new("bash");
        command.args(["-euo", "pipefail", "-c", script]).current_dir(self.folder.path()).env("PATH", path);
        // What the shell that runs the tests happens to have in it is not an operator's.
        command
            .env("SLACKWATER_CONFIG", self.proxy.config())
            .env("LOG", self.folder.path().join("log"))
            .stdin(std::process::Stdio::null());
        command.output().await.unwrap()
    }
}

/// The line without what is said of it.
fn bare(line: &str) -> &str {
    line.split_once("  #").map_or(line, |(command, _)| command).trim()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_is_run() {
    let world = World::new().await;
    // Something to be found in the logs, and in /status.
    for path in ["/", "/%00", "/no.php"] {
        http::send(world.proxy.http(), "GET", path, &[("Host", "example.com")], b"").await.unwrap();
    }
    let mut wrong = Vec::new();
    let mut used = BTreeSet::new();
    let mut ran = 0;
    for (name, page) in pages() {
        for command in commands(&name, &page) {
            let mut script = String::new();
            let mut is_continued = false;
            for line in command.text.lines().map(bare).filter(|line| !line.is_empty() && !line.starts_with('#')) {
                let elsewhere = ELSEWHERE.iter().find(|(begins, _)| !is_continued && line.starts_with(begins));
                is_continued = line.ends_with(['|', '\\']);
                match elsewhere {
                    Some((begins, _)) => {
                        used.insert(*begins);
                        if let Err(why) = look_up(line) {
                            wrong.push(format!("{}: {line}: {why}", command.place));
                        }
                    }
                    None => script += &(world.fill(line) + "\n"),
                }
            }
            if script.is_empty() {
                continue;
            }
            ran += 1;
            // As an operator finds it.
            world.proxy.cli_ok(&["endpoint", "enable", "php", &world.endpoint]).await;
            world.proxy.cli_ok(&["swap", "php", "blue"]).await;
            let with_names = script.contains("slackwater render") && !script.contains("set -a");
            let names = if with_names { "set -a; . config/kubernetes/example.env; set +a\n" } else { "" };
            let output = world.run(&format!("{names}{script}")).await;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let is_a_name = said.contains("the following required arguments were not provided");
            // The name of a command, not the whole of it: then it and its flags are there.
            if is_a_name && world.run(&format!("{} --help", script.trim())).await.status.success() {
                continue;
            }
            if !output.status.success() {
                wrong.push(format!(
                    "{}: {}\n{script}{said}{}",
                    command.place,
                    output.status,
                    String::from_utf8_lossy(&output.stdout)
                ));
            }
        }
    }
    let unused: Vec<_> = ELSEWHERE.iter().filter(|(begins, _)| !used.contains(begins)).collect();
    assert!(wrong.is_empty(), "{} do not do what the documentation says:\n\n{}", wrong.len(), wrong.join("\n"));
    assert!(unused.is_empty(), "nothing in the documentation begins like this any more: {unused:?}");
    println!("{ran} commands and blocks were run, {} kinds are run elsewhere", used.len());
}

/// Made from the arguments themselves, so that they cannot be forgotten: here they are whole, and a shell takes them.
#[test]
fn the_manual_and_the_completions_know_every_command() {
    let run = |args: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_slackwater")).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let commands: Vec<String> = run(&["--help"])
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .map(|line| line.split_whitespace().next().unwrap().to_owned())
        .filter(|command| command != "help")
        .collect();
    assert!(commands.len() >= 11, "{commands:?}");
    let folder = tempfile::tempdir().unwrap();
    run(&["man", &folder.path().display().to_string()]);
    let main = fs::read_to_string(folder.path().join("slackwater.1")).unwrap();
    assert!(main.contains(".TH slackwater 1") && main.contains("Exit codes") && main.contains("HUP reloads"), "{main}");
    for command in &commands {
        let page = fs::read_to_string(folder.path().join(format!("slackwater-{command}.1")))
            .unwrap_or_else(|_| panic!("no page of {command}"));
        assert!(page.contains(".SH SYNOPSIS") && main.contains(&format!("slackwater\\-{command}(1)")), "{command}: {page}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completions", shell]);
        for command in &commands {
            assert!(script.contains(command.as_str()), "{shell} does not know {command}");
        }
    }
    let bash = folder.path().join("bash");
    fs::write(&bash, run(&["completions", "bash"])).unwrap();
    let asked = format!(
        ". {}; COMP_WORDS=(slackwater sw); COMP_CWORD=1; _slackwater slackwater sw slackwater; echo \"${{COMPREPLY[@]}}\"",
        bash.display()
    );
    let output = std::process::Command::new("bash").args(["-euc", &asked]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "swap", "{}", String::from_utf8_lossy(&output.stderr));
}

/// What of a line that is not run can be known: that there is such a file, such a test, such a round.
fn look_up(line: &str) -> Result<(), String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let behind = |flag: &str| words.iter().position(|word| *word == flag).and_then(|at| words.get(at + 1)).copied();
    let program = words.iter().find(|word| !word.contains('=')).copied().unwrap_or_default();
    if ["tests/", "benches/", "fuzz/", "docker/"].iter().any(|folder| program.starts_with(folder)) && !root().join(program).exists()
    {
        return Err("there is no such file".to_owned());
    }
    if let Some(test) = behind("--test")
        && !root().join(format!("tests/{test}.rs")).exists()
        && !root().join(format!("tests/{test}/main.rs")).exists()
    {
        return Err(format!("there is no test {test}"));
    }
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    if let Some(bench) = behind("--bench")
        && !manifest.contains(&format!("[[bench]]\nname = \"{bench}\""))
    {
        return Err(format!("there is no bench {bench}"));
    }
    if let Some(feature) = behind("--features")
        && !manifest.contains(&format!("\n{feature} = ["))
    {
        return Err(format!("there is no feature {feature}"));
    }
    if program == "tests/long" {
        let rounds = fs::read_to_string(root().join("tests/long")).unwrap();
        let name = words.get(1).ok_or("which round?")?;
        if !rounds.lines().any(|line| line.trim_start().starts_with(&format!("{name})"))) && *name != "NAME" {
            return Err(format!("there is no round {name}"));
        }
    }
    Ok(())
}
