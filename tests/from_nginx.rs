//! The pages of `docs/from-nginx/`: each one's configuration is loaded as it stands there, and each row of its table is driven, with a real FPM.
//!
//! `PAGE=laravel cargo test --test from_nginx` drives one page.

mod support;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use support::{
    http::{self, Response},
    process::Slackwater,
    real_fpm::RealFpm,
};

/// The stacks that a page is promised for.
const PAGES: [&str; 12] = [
    "drupal",
    "lagoon",
    "laravel",
    "magento",
    "matomo",
    "nextcloud",
    "perusio",
    "serversideup",
    "symfony",
    "trafex",
    "wodby",
    "wordpress",
];

/// What every script answers: the parameters that it sees.
const PROBE: &str = r#"<?php
header('Content-Type: application/json');
header('X-Powered-By: probe');
echo json_encode($_SERVER, JSON_INVALID_UTF8_SUBSTITUTE);
"#;

struct Page {
    name: String,
    toml: String,
    files: Vec<String>,
    rows: Vec<Row>,
}

struct Row {
    line: usize,
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    /// As written.
    answer: String,
    parts: Vec<Part>,
}

#[derive(Debug)]
enum Part {
    Status(u16),
    Script(String),
    File(String),
    PathInfo(String),
    Query(String),
    Param(String, String),
    Header(String, String),
    NoHeader(String),
    Body(String),
}

impl Page {
    fn read(name: &str) -> Result<Page, String> {
        let path = folder().join(format!("{name}.md"));
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let toml = text.split_once("```toml\n").and_then(|(_, rest)| rest.split_once("\n```")).ok_or("no toml block")?.0;
        let mut page = Page { name: name.to_owned(), toml: toml.to_owned(), files: Vec::new(), rows: Vec::new() };
        let answers = text.find("\n## What it answers").ok_or("no \"What it answers\"")?;
        let before = text[..answers].lines().count();
        let mut in_files = false;
        for (number, line) in text[answers..].lines().enumerate().skip(2) {
            if line.starts_with("## ") {
                break;
            }
            in_files |= line.starts_with("With these files:");
            in_files &= !line.is_empty() && !line.starts_with('|');
            if in_files {
                page.files.extend(quoted(line));
            }
            if let Some(row) = line.strip_prefix("| `") {
                page.rows.push(Row::read(row, before + number).map_err(|why| format!("{line}: {why}"))?);
            }
        }
        match (page.files.is_empty(), page.rows.len()) {
            (true, _) => Err("no files".to_owned()),
            (_, 0..10) => Err("fewer than ten rows".to_owned()),
            _ => Ok(page),
        }
    }
}

impl Row {
    /// A row without its first two characters and backtick.
    fn read(row: &str, line: usize) -> Result<Row, String> {
        let (request, answer) = row.split_once(" | ").ok_or("no second column")?;
        let answer = answer.trim_end_matches(['|', ' ']).replace("\\|", "|");
        let (request, with) = request.split_once('`').ok_or("no closing backtick")?;
        let (method, target) = request.split_once(' ').ok_or("no method")?;
        let header = |text: String| text.split_once(": ").map(|(name, value)| (name.to_owned(), value.to_owned()));
        let headers = quoted(with).into_iter().map(|text| header(text.clone()).ok_or(format!("{text:?} is no header")));
        let headers = headers.collect::<Result<_, _>>()?;
        let parts = answer.split("; ").map(Part::read).collect::<Result<Vec<_>, _>>()?;
        let (method, target) = (method.to_owned(), target.replace("\\|", "|"));
        Ok(Row { line, method, target, headers, answer, parts })
    }

    fn status(&self) -> u16 {
        self.parts.iter().find_map(|part| if let Part::Status(status) = part { Some(*status) } else { None }).unwrap_or(200)
    }
}

impl Part {
    fn read(text: &str) -> Result<Part, String> {
        if let Ok(status) = text.trim().parse() {
            return Ok(Part::Status(status));
        }
        let (word, value) = match text.split_once('`') {
            Some((word, rest)) => (word.trim(), rest.trim_end().strip_suffix('`').ok_or(format!("{text:?}: no closing backtick"))?),
            None => return Err(format!("{text:?} is not known")),
        };
        let pair = |between: &str| value.split_once(between).map(|(a, b)| (a.to_owned(), b.to_owned()));
        let value = value.to_owned();
        match word {
            "script" => Ok(Part::Script(value)),
            "file" => Ok(Part::File(value)),
            "path_info" => Ok(Part::PathInfo(value)),
            "query" => Ok(Part::Query(value)),
            "param" => pair("=").map(|(name, value)| Part::Param(name, value)).ok_or(format!("{text:?}: no =")),
            "no" => Ok(Part::NoHeader(value)),
            "body" => Ok(Part::Body(value)),
            "" => pair(": ").map(|(name, value)| Part::Header(name, value)).ok_or(format!("{text:?}: no header")),
            _ => Err(format!("{text:?} is not known")),
        }
    }

    /// `None`: as it should be.
    fn wrong(&self, response: &Response, root: &Path) -> Option<String> {
        let param = |name: &str, wanted: &str| {
            let seen = serde_json::from_slice::<serde_json::Value>(&response.body).unwrap_or_default();
            let seen = seen[name].as_str().map(str::to_owned);
            // What is not set is as good as empty.
            (seen.as_deref().unwrap_or_default() != wanted).then(|| format!("{name} is {seen:?}"))
        };
        match self {
            Part::Status(_) => None,
            Part::Script(name) => {
                param("SCRIPT_NAME", name).or_else(|| param("SCRIPT_FILENAME", &format!("{}{name}", root.display())))
            }
            Part::File(path) => {
                let is_it = response.body == content(path).as_bytes();
                (!is_it).then(|| format!("another body: {:?}", response.text().chars().take(80).collect::<String>()))
            }
            Part::PathInfo(wanted) => param("PATH_INFO", wanted),
            Part::Query(wanted) => param("QUERY_STRING", wanted),
            Part::Param(name, wanted) => param(name, wanted),
            Part::Header(name, wanted) => {
                let seen = response.header_all(name);
                (!seen.iter().any(|value| value.starts_with(wanted.as_str()))).then(|| format!("{name} is {seen:?}"))
            }
            Part::NoHeader(name) => response.header(name).map(|value| format!("{name} is {value:?}")),
            Part::Body(wanted) => (!response.text().contains(wanted.as_str())).then(|| format!("body {:?}", response.text())),
        }
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/from-nginx")
}

/// What stands between backticks.
fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn content(path: &str) -> String {
    if path.ends_with(".php") { PROBE.to_owned() } else { format!("file {path}") }
}

/// With the ports of a test; the page's own keys of [listen], if any, stay.
fn with_ports(toml: &str) -> String {
    let ports = "[listen]\nhttp = [\"{HTTP}\"]\nops = \"{OPS}\"\nadmin = \"{ADMIN}\"\n";
    match toml.contains("[listen]\n") {
        true => toml.replace("[listen]\n", ports),
        // Behind all else: keys of the top must stay there.
        false => format!("{toml}\n{ports}"),
    }
}

/// What is wrong with the page, a line each.
async fn drive(page: &Page) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    // As FPM and the proxy both name it.
    let root = fs::canonicalize(folder.path()).unwrap().join("root");
    // The workers run as www-data and must get through.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for path in &page.files {
        let file = root.join(path.trim_start_matches('/'));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, content(path)).unwrap();
    }
    let fpm = RealFpm::builder("blue").workers(2).docroot(&root).start().await;
    let started = Slackwater::builder(&with_ports(&page.toml)).env("FPM", &fpm.address().to_string());
    let proxy = started.env("ROOT", root.to_str().unwrap()).start().await;
    let mut wrong = Vec::new();
    for row in &page.rows {
        let headers: Vec<(&str, &str)> = row.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let at = format!("docs/from-nginx/{}.md:{}: {} {}", page.name, row.line, row.method, row.target);
        let response = match http::send(proxy.http(), &row.method, &row.target, &headers, b"").await {
            Ok(response) => response,
            Err(error) => {
                wrong.push(format!("{at}: {error:?}"));
                continue;
            }
        };
        let status = (response.status != row.status()).then(|| format!("status {}", response.status));
        let all: Vec<String> = status.into_iter().chain(row.parts.iter().filter_map(|part| part.wrong(&response, &root))).collect();
        if !all.is_empty() {
            wrong.push(format!("{at}: {}, not {}", all.join(", "), row.answer));
        }
    }
    wrong
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_pages_say_is_so() {
    let chosen = std::env::var("PAGE").ok();
    let mut wrong = Vec::new();
    for name in PAGES.into_iter().filter(|name| chosen.as_deref().is_none_or(|chosen| chosen == *name)) {
        match Page::read(name) {
            Err(why) => wrong.push(format!("docs/from-nginx/{name}.md: {why}")),
            Ok(page) => {
                let found = drive(&page).await;
                println!("{name}: {} rows, {} wrong", page.rows.len(), found.len());
                wrong.extend(found);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A page that is not driven would say what it likes.
#[test]
fn every_page_is_driven() {
    let mut there: Vec<String> =
        fs::read_dir(folder()).unwrap().filter_map(|entry| Some(entry.unwrap().path().file_stem()?.to_str()?.to_owned())).collect();
    there.sort();
    assert_eq!(there, PAGES);
}
