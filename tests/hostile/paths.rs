//! A path that says one thing and means another, on both versions of HTTP: judged by which file PHP is told to run.

use std::fs;

use crate::{
    case::PATIENCE,
    support::{
        gate::within,
        h2wire::{self, Wire},
        http::Connection,
        process::Slackwater,
        scripted_fpm::{Behaviour, ScriptedFpm},
    },
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// PHP runs this script with this PATH_INFO.
    Run(&'static str, &'static str),
    /// PHP is not asked.
    Status(u16),
}

use Expect::{Run, Status};

const FRONT: Expect = Run("/index.php", "");
const APP: Expect = Run("/app.php", "");

const CASES: &[(&str, &str, Expect)] = &[
    ("/app.php", "as it should be", APP),
    ("/app.php/x", "RFC 3875, 4.1.5", Run("/app.php", "/x")),
    ("/static.css", "a file", Status(200)),
    ("/a/../app.php", "RFC 3986, 5.2.4", APP),
    ("/a/./b/../../app.php", "RFC 3986, 5.2.4", APP),
    ("//app.php", "RFC 3986, 6.2.2", APP),
    ("/a/%2e%2e/app.php", "RFC 3986, 6.2.2.2: a dot is a dot", APP),
    ("/%2e/app.php", "RFC 3986, 6.2.2.2", APP),
    ("/a/.%2E/app.php", "RFC 3986, 6.2.2.2", APP),
    ("/../app.php", "CVE-2021-41773: above the root", Status(400)),
    ("/a/../../etc/passwd", "CVE-2021-41773", Status(400)),
    ("/%2e%2e/%2e%2e/etc/passwd", "CVE-2021-41773", Status(400)),
    ("/.%2e/etc/passwd", "CVE-2021-41773", Status(400)),
    ("/a%2f..%2fapp.php", "decoded once, before rules look at it", APP),
    ("/..%2f..%2fetc%2fpasswd", "decoded once, before rules look at it", Status(400)),
    ("/%252e%252e/app.php", "CVE-2021-42013: never decoded twice", Status(404)),
    ("/a/%252e%252e%252fapp.php", "CVE-2021-42013", Status(404)),
    ("/a%5c..%5capp.php", "a backslash separates nothing here", Status(404)),
    ("/a\\..\\app.php", "a backslash separates nothing here", Status(404)),
    ("/..%c0%af..%c0%afetc/passwd", "RFC 3629, 3: overlong UTF-8 is no slash", Status(404)),
    ("/%c0%ae%c0%ae/app.php", "RFC 3629, 3: nor a dot", Status(404)),
    ("/..%u2215..%u2215etc/passwd", "no escape of RFC 3986", Status(400)),
    ("/app.php%00.css", "a name ends at NUL for the kernel alone", Status(400)),
    ("/%00", "NUL", Status(400)),
    ("/app.php%0a", "CVE-2019-11043", Status(400)),
    ("/app.php%0a/x", "CVE-2019-11043", Status(400)),
    ("/app.php/x%0d%0ay", "CVE-2019-11043", Status(400)),
    ("/%0aapp.php", "CVE-2019-11043", Status(400)),
    ("/APP.PHP", "another name; not declared", Status(404)),
    ("/app.PhP", "another name; not declared", Status(404)),
    ("/other.php", "not declared", Status(404)),
    ("/other.php/app.php", "not declared", Status(404)),
    ("/upload/evil.jpg/x.php", "cgi.fix_pathinfo: a picture is no script", Status(404)),
    ("/upload/evil.jpg/app.php", "cgi.fix_pathinfo", Status(404)),
    ("/app.php.", "a trailing dot is part of a name", Status(404)),
    ("/app.php%20", "a trailing space is part of a name", Status(404)),
    ("/app.php::$DATA", "a stream of NTFS", FRONT),
    ("/app.php~", "a copy of a script", Status(404)),
    ("/app.php.bak", "a copy of a script", Status(404)),
    ("/.env", "a dot file", Status(404)),
    ("/%2eenv", "a dot file", Status(404)),
    ("/a/../.git/config", "a dot file", Status(404)),
    ("/link.txt", "a link that leaves the root", FRONT),
    ("/static.css/", "a file is no folder", FRONT),
    ("/static.css%2f..%2f.env", "a dot file", Status(404)),
    ("/static.css/app.php", "a file is no folder", Status(404)),
];

#[tokio::test(flavor = "multi_thread")]
async fn no_path_runs_or_sends_what_it_does_not_name() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let root = tempfile::tempdir().unwrap();
    for name in
        ["index.php", "app.php", "other.php", "app.php.bak", "app.php~", "static.css", ".env", "upload/evil.jpg", ".git/config"]
    {
        let path = root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "<?php echo 'what is in the file';").unwrap();
    }
    std::os::unix::fs::symlink("/etc/passwd", root.path().join("link.txt")).unwrap();
    let proxy = Slackwater::start(&format!(
        "workers = 1\n[listen]\nhttp = [\"{{HTTP}}\"]\nops = \"{{OPS}}\"\nadmin = \"{{ADMIN}}\"\n[upstream.php.set.blue]\nendpoints = [\"{}\"]\n\
         [[site]]\nroot = \"{}\"\nsymlinks = \"within\"\nscripts = [\"/index.php\", \"/app.php\"]\nupstream = \"php\"\n",
        fpm.address(),
        root.path().display()
    ))
    .await;
    let root = root.path().canonicalize().unwrap().display().to_string();
    let mut wrong = Vec::new();
    for (target, source, expect) in CASES {
        for version in [1, 2] {
            let before = fpm.requests().len();
            let status = if version == 1 {
                let mut client = Connection::open(proxy.http()).await.unwrap();
                within(PATIENCE, target, client.get(target)).await.map(|answer| answer.status).map_err(|error| error.to_string())
            } else {
                let mut wire = Wire::open(proxy.http(), &[]).await;
                wire.send(&h2wire::get(1, target)).await;
                wire.answer(1).await
            };
            let seen = match (fpm.requests().split_off(before).as_slice(), &status) {
                ([], Ok(status)) => Ok(Status(*status)),
                ([one], Ok(200)) => {
                    let param = |name| one.param(name).unwrap_or_default();
                    let script = param("SCRIPT_FILENAME").strip_prefix(&root).unwrap_or("outside the root").to_owned();
                    let as_it_came = one.uri() == *target;
                    let is = |wanted: &Expect| matches!(wanted, Run(name, info) if *name == script && *info == param("PATH_INFO") && as_it_came);
                    if is(expect) {
                        Ok(*expect)
                    } else {
                        Err(format!("PHP ran {script} with {:?} for {:?}", param("PATH_INFO"), one.uri()))
                    }
                }
                (received, status) => Err(format!("{status:?}, and PHP has received {received:?}")),
            };
            if seen.as_ref() != Ok(expect) {
                wrong.push(format!("{target} over HTTP/{version} ({source}): {seen:?}, not {expect:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}\n", wrong.len(), 2 * CASES.len(), wrong.join("\n"));
    println!("{} paths, each over HTTP/1.1 and HTTP/2", CASES.len());
}
