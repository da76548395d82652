//! Nginx and Slackwater side by side: the requests of `tests/differences/requests.txt`, configurations that mean the same, one FPM, one folder of files.
//! Each difference is in `expected.txt`, with the name that `docs/differences.md` explains; one that comes or goes fails.
//!
//! `GREP='^GET /static' cargo test --test differences -- --nocapture` shows every difference of some.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, UNIX_EPOCH},
};

use regex::Regex;
use support::{children, ports, process::Slackwater, real_fpm::RealFpm};

/// Tags in the requests depend on it: 2024-01-02 03:04:05 UTC.
const MODIFIED: Duration = Duration::from_secs(1_704_164_645);

/// Headers that are another's business, or of now.
const NOISE: [&str; 11] = [
    "date",
    "server",
    "connection",
    "keep-alive",
    "transfer-encoding",
    "content-length",
    "x-probe",
    "x-request-id",
    "x-powered-by",
    "expires",
    "etag",
];

fn given(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/differences").join(name)
}

/// Lines that are neither empty nor a comment.
fn lines(name: &str) -> Vec<Vec<u8>> {
    let text = fs::read(given(name)).unwrap();
    text.split(|b| *b == b'\n')
        .filter(|line| !line.trim_ascii().is_empty() && !line.starts_with(b"#"))
        .map(<[u8]>::to_vec)
        .collect()
}

/// `\xHH` stands for a byte.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let hex = rest.strip_prefix(b"\\x").and_then(|hex| str::from_utf8(hex.get(..2)?).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(value) => {
                out.push(value);
                rest = &rest[4..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    out
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from((i * 31 + 7) % 251).unwrap()).collect()
}

fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

fn split_once<'a>(text: &'a [u8], between: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let at = text.windows(between.len()).position(|window| window == between)?;
    Some((&text[..at], &text[at + between.len()..]))
}

/// "TEXT * N".
fn repeated(text: &[u8]) -> Option<(&[u8], usize)> {
    let at = text.windows(3).rposition(|window| window == b" * ")?;
    Some((&text[..at], str::from_utf8(&text[at + 3..]).ok()?.parse().ok()?))
}

/// The folder that both serve.
fn make_root(root: &Path) {
    fs::create_dir_all(root).unwrap();
    fs::copy(given("probe.php"), root.join("probe.php")).unwrap();
    for line in lines("files.txt") {
        let path = |name: &[u8]| root.join(std::ffi::OsStr::from_bytes(&unescape(name)));
        let write = |name: &[u8], content: &[u8]| {
            fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            fs::write(path(name), content).unwrap();
        };
        if let Some((name, target)) = split_once(&line, b" -> ") {
            fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(&unescape(target)), path(name)).unwrap();
        } else if let Some((name, length)) = repeated(&line) {
            write(name, &pattern(length));
        } else if let Some((name, text)) = split_once(&line, b" =") {
            write(name, &unescape(text.get(1..).unwrap_or_default()));
        } else {
            fs::create_dir_all(path(&line)).unwrap();
        }
    }
    set_times(root);
}

fn set_times(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            set_times(&entry.path());
        }
        if !kind.is_symlink() {
            fs::File::open(entry.path()).unwrap().set_modified(UNIX_EPOCH + MODIFIED).unwrap();
        }
    }
}

/// A line of requests.txt as the bytes to send, and whether it is a HEAD.
fn request(line: &[u8]) -> (Vec<u8>, bool) {
    let mut items = Vec::new();
    let mut rest = line;
    while let Some((item, after)) = split_once(rest, b" | ") {
        items.push(item);
        rest = after;
    }
    items.push(rest);
    let first = items.remove(0);
    let (method, target) = split_once(first, b" ").unwrap_or((first, b""));
    let (mut version, mut headers, mut body): (&[u8], Vec<Vec<u8>>, Vec<u8>) = (b"HTTP/1.1", Vec::new(), Vec::new());
    let mut dropped = BTreeSet::new();
    for item in items {
        if item.starts_with(b"HTTP/") || item == b"HTTP" {
            version = item;
        } else if let Some(text) = item.strip_prefix(b"body = ") {
            body = unescape(text);
        } else if let Some(count) = item.strip_prefix(b"body * ") {
            body = pattern(str::from_utf8(count).unwrap().parse().unwrap());
        } else if let Some(count) = item.strip_prefix(b"chunked * ") {
            let data = pattern(str::from_utf8(count).unwrap().parse().unwrap());
            body.clear();
            for piece in data.chunks(1000) {
                body.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                body.extend_from_slice(piece);
                body.extend_from_slice(b"\r\n");
            }
            body.extend_from_slice(b"0\r\n\r\n");
            headers.push(b"Transfer-Encoding: chunked".to_vec());
        } else if let Some(name) = item.strip_prefix(b"-") {
            dropped.insert(name.to_ascii_lowercase());
        } else {
            let long = split_once(item, b": ").and_then(|(name, value)| {
                let (text, count) = repeated(value).filter(|(text, _)| !text.contains(&b' '))?;
                Some([name, b": ", text.repeat(count).as_slice()].concat())
            });
            headers.push(unescape(&long.unwrap_or_else(|| item.to_vec())));
        }
    }
    // The last character so many times.
    let long = repeated(target).filter(|(text, _)| !text.is_empty()).map(|(text, count)| {
        let (before, last) = text.split_at(text.len() - 1);
        [before, last.repeat(count).as_slice()].concat()
    });
    let target = unescape(&long.unwrap_or_else(|| target.to_vec()));
    let names: Vec<Vec<u8>> =
        headers.iter().map(|header| header.split(|b| *b == b':').next().unwrap_or_default().to_ascii_lowercase()).collect();
    for (name, value) in [("Host", "main.test"), ("Connection", "close")] {
        let lower = name.to_ascii_lowercase().into_bytes();
        if !names.contains(&lower) && !dropped.contains(&lower) {
            headers.insert(0, format!("{name}: {value}").into_bytes());
        }
    }
    let mut bytes = unescape(method);
    if first.contains(&b' ') {
        bytes.push(b' ');
    }
    bytes.extend_from_slice(&target);
    if version != b"HTTP" {
        bytes.push(b' ');
        bytes.extend_from_slice(version);
    }
    bytes.extend_from_slice(b"\r\n");
    for header in &headers {
        bytes.extend_from_slice(header);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(&body);
    (bytes, method == b"HEAD")
}

/// All that comes back until the other side closes.
fn exchange(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // It may be refused before it is all sent.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let mut piece = [0; 65_536];
    while let Ok(length @ 1..) = stream.read(&mut piece) {
        answer.extend_from_slice(&piece[..length]);
    }
    answer
}

struct Answer {
    /// "junk": no answer of HTTP/1.
    status: String,
    headers: BTreeMap<String, Vec<String>>,
    body: Vec<u8>,
    /// The body has the length that was told.
    whole: bool,
    interim: usize,
}

impl Answer {
    /// `None`: nothing came.
    fn read(mut bytes: &[u8], is_head: bool) -> Option<Answer> {
        let mut interim = 0;
        let (head, mut body) = loop {
            let head = split_once(bytes, b"\r\n\r\n").filter(|(head, _)| head.starts_with(b"HTTP/1."));
            let Some((head, rest)) = head else {
                let junk =
                    || Answer { status: "junk".into(), headers: BTreeMap::new(), body: bytes.to_vec(), whole: true, interim };
                return (!bytes.is_empty()).then(junk);
            };
            if head.get(9) != Some(&b'1') {
                break (latin1(head), rest.to_vec());
            }
            interim += 1;
            bytes = rest;
        };
        let mut lines = head.split("\r\n");
        let status = lines.next()?.split(' ').nth(1)?.to_owned();
        let mut headers: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            headers.entry(name.trim().to_ascii_lowercase()).or_default().push(value.trim().to_owned());
        }
        let told = headers.get("content-length").map(|all| all[0].parse::<usize>().unwrap());
        let bodiless = is_head || status == "304" || status == "204";
        let whole = if headers.get("transfer-encoding").is_some_and(|all| all == &["chunked"]) {
            let decoded = unchunk(&body);
            let whole = decoded.is_some();
            body = decoded.unwrap_or_default();
            whole
        } else if bodiless {
            body.is_empty()
        } else {
            told.is_none_or(|told| told == body.len())
        };
        Some(Answer { status, headers, body, whole, interim })
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |all| all[0].as_str())
    }

    /// Boundaries of parts are made up.
    fn tidy(&mut self) {
        let kind = self.header("content-type").to_owned();
        if let Some(boundary) = kind.strip_prefix("multipart/byteranges; boundary=") {
            let body = latin1(&self.body).replace(boundary, "BOUNDARY");
            self.body = body.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect();
            self.headers.insert("content-type".into(), vec!["multipart/byteranges; boundary=BOUNDARY".into()]);
        }
    }

    fn seen(&self) -> BTreeMap<&str, String> {
        let mut seen: BTreeMap<&str, String> = self.headers.iter().map(|(name, all)| (name.as_str(), all.join(", "))).collect();
        seen.retain(|name, _| !NOISE.contains(name));
        // Of a time that goes on, and a tag of the server's own making, only whether they are there.
        let expires = self.header("expires");
        let is_epoch = expires.contains("1970");
        seen.insert(
            "expires",
            if expires.is_empty() {
                ""
            } else if is_epoch {
                "epoch"
            } else {
                "some"
            }
            .to_owned(),
        );
        let etag = self.header("etag");
        let is_weak = etag.starts_with("W/");
        seen.insert(
            "etag",
            if etag.is_empty() {
                ""
            } else if is_weak {
                "weak"
            } else {
                "strong"
            }
            .to_owned(),
        );
        seen
    }

    /// What PHP has seen, where PHP has answered.
    fn params(&self) -> Option<serde_json::Map<String, serde_json::Value>> {
        let text = match self.header("x-probe") {
            "" => return None,
            "body" => self.body.clone(),
            encoded => percent_decode(encoded),
        };
        serde_json::from_slice(&text).ok()
    }
}

fn unchunk(body: &[u8]) -> Option<Vec<u8>> {
    let (mut plain, mut rest) = (Vec::new(), body);
    loop {
        let (size, after) = split_once(rest, b"\r\n")?;
        let size = usize::from_str_radix(str::from_utf8(size).ok()?, 16).ok()?;
        if size == 0 {
            return (after == b"\r\n").then_some(plain);
        }
        plain.extend_from_slice(after.get(..size)?);
        rest = after.get(size + 2..)?;
    }
}

fn percent_decode(text: &str) -> Vec<u8> {
    unescape(text.replace('\\', "\\x5C").replace('%', "\\x").as_bytes())
}

/// Names of what differs, and what it is.
fn differences(nginx: Option<Answer>, ours: Option<Answer>) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let status = |answer: &Option<Answer>| answer.as_ref().map_or("none".to_owned(), |answer| answer.status.clone());
    let both = (status(&nginx), status(&ours));
    let (Some(mut nginx), Some(mut ours)) = (nginx, ours) else {
        if both.0 != both.1 {
            found.insert(format!("status:{}/{}", both.0, both.1), String::new());
        }
        return found;
    };
    nginx.tidy();
    ours.tidy();
    if both.0 != both.1 {
        found.insert(format!("status:{}/{}", both.0, both.1), String::new());
        return found;
    }
    // What is malformed is answered before a site is looked for.
    if ["400", "414", "junk"].contains(&both.0.as_str()) {
        return found;
    }
    let text = latin1(&nginx.body);
    let is_nginxs_page = text.contains("<hr><center>nginx") || text.contains("</center>\r\n</body>");
    let is_error = both.0.as_str() >= "300" && (is_nginxs_page || nginx.body.is_empty());
    let (theirs, seen) = (nginx.seen(), ours.seen());
    for name in theirs.keys().chain(seen.keys()).filter(|name| !(is_error && **name == "content-type")) {
        let (a, b) = (theirs.get(name).map_or("", String::as_str), seen.get(name).map_or("", String::as_str));
        if a != b {
            found.insert(format!("header:{name}"), format!("{a:?} | {b:?}"));
        }
    }
    if nginx.interim != ours.interim {
        found.insert("continue".into(), format!("{} | {}", nginx.interim, ours.interim));
    }
    if nginx.whole != ours.whole {
        found.insert("framing".into(), format!("{} | {}", nginx.whole, ours.whole));
    }
    match (nginx.params(), ours.params()) {
        (Some(a), Some(b)) => {
            for name in a.keys().chain(b.keys()).filter(|name| a.get(*name) != b.get(*name)) {
                found.insert(format!("param:{name}"), format!("{:?} | {:?}", a.get(name), b.get(name)));
            }
        }
        (None, None) if !is_error && nginx.body != ours.body => {
            let show = |body: &[u8]| format!("{} {:?}", body.len(), latin1(body).chars().take(60).collect::<String>());
            found.insert("body".into(), format!("{} | {}", show(&nginx.body), show(&ours.body)));
        }
        (None, None) => {}
        (a, b) => {
            found.insert("script".into(), format!("{} | {}", a.is_some(), b.is_some()));
        }
    }
    found
}

/// A line of expected.txt.
struct Expected {
    line: String,
    requests: Regex,
    fields: BTreeSet<String>,
    /// Of its fields, those that some request has shown.
    seen: BTreeSet<String>,
}

fn expected() -> Vec<Expected> {
    let read = |line: Vec<u8>| {
        let line = latin1(&line);
        let (rule, _class) = line.rsplit_once(" # ").unwrap_or_else(|| panic!("{line}: no class"));
        let (requests, fields) = rule.split_once(" => ").unwrap_or_else(|| panic!("{line}: no fields"));
        let requests = Regex::new(requests).unwrap_or_else(|error| panic!("{line}: {error}"));
        let fields = fields.split(',').map(|field| field.trim().to_owned()).collect();
        Expected { requests, fields, seen: BTreeSet::new(), line }
    };
    lines("expected.txt").into_iter().map(read).collect()
}

/// Ends with the test.
struct Nginx(Child);

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_nginx(folder: &Path, root: &Path, fpm: &str) -> (Nginx, SocketAddr) {
    let address = ports::free_address();
    let mut text = fs::read_to_string(given("nginx.conf")).unwrap();
    let auth = given("htpasswd");
    for (name, value) in [
        ("ROOT", root.to_str().unwrap()),
        ("FPM", fpm),
        ("HTTP", &address.to_string()),
        ("DIR", folder.to_str().unwrap()),
        ("AUTH", auth.to_str().unwrap()),
    ] {
        text = text.replace(&format!("{{{{{name}}}}}"), value);
    }
    let conf = folder.join("nginx.conf");
    fs::write(&conf, text).unwrap();
    let log = fs::File::create(folder.join("nginx.err")).unwrap();
    // It is in sbin, which not every PATH has.
    let mut command = Command::new("/usr/sbin/nginx");
    command
        .arg("-c")
        .arg(&conf)
        .arg("-e")
        .arg(folder.join("nginx-start.log"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    let nginx = Nginx(children::spawn(command, libc::SIGKILL).expect("nginx (tests/run installs it)"));
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < deadline, "{}", fs::read_to_string(folder.join("nginx.err")).unwrap());
        std::thread::sleep(Duration::from_millis(5));
    }
    (nginx, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_difference_from_nginx_is_one_that_is_meant() {
    let folder = tempfile::tempdir().unwrap();
    let dir = fs::canonicalize(folder.path()).unwrap();
    // Workers of FPM and Nginx run as another user.
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
    let root = dir.join("root");
    make_root(&root);
    let fpm = RealFpm::builder("blue").workers(2).unix().docroot(&root).ini("date.timezone", "UTC").start().await;
    let (_nginx, nginx) = start_nginx(&dir, &root, &fpm.address().to_string());
    let mut toml = fs::read_to_string(given("slackwater.toml")).unwrap();
    let auth = given("htpasswd");
    for (name, value) in [("ROOT", root.to_str().unwrap()), ("FPM", &fpm.address().to_string()), ("AUTH", auth.to_str().unwrap())] {
        toml = toml.replace(&format!("{{{{{name}}}}}"), value);
    }
    for name in ["HTTP", "OPS", "ADMIN", "DIR"] {
        toml = toml.replace(&format!("{{{{{name}}}}}"), &format!("{{{name}}}"));
    }
    let proxy = Slackwater::start(&toml).await;

    let grep = std::env::var("GREP").ok().map(|grep| Regex::new(&grep).unwrap());
    let mut expected = expected();
    let (mut asked, mut differ, mut wrong) = (0, 0, Vec::new());
    let ours = proxy.http();
    for line in lines("requests.txt") {
        let text = latin1(&line);
        if grep.as_ref().is_some_and(|grep| !grep.is_match(&text)) {
            continue;
        }
        let (bytes, is_head) = request(&line);
        let found = tokio::task::block_in_place(|| {
            let answer = |address| Answer::read(&exchange(address, &bytes), is_head);
            differences(answer(nginx), answer(ours))
        });
        asked += 1;
        differ += usize::from(!found.is_empty());
        let mut meant = BTreeSet::new();
        for each in expected.iter_mut().filter(|each| each.requests.is_match(&text)) {
            let hit: Vec<String> = each.fields.iter().filter(|field| found.contains_key(*field)).cloned().collect();
            each.seen.extend(hit.iter().cloned());
            meant.extend(hit);
        }
        for (field, what) in &found {
            if grep.is_some() {
                println!("{text}\n    {field}: {what}");
            }
            if !meant.contains(field) {
                wrong.push(format!("{text}\n    {field}: Nginx {what} Slackwater"));
            }
        }
    }
    println!("{asked} requests, {differ} with a difference, {} not meant", wrong.len());
    if grep.is_none() {
        assert!(asked > 300, "{asked}");
        for each in &expected {
            let gone: Vec<&String> = each.fields.difference(&each.seen).collect();
            if !gone.is_empty() {
                wrong.push(format!("{}\n    no request shows {gone:?}", each.line));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
