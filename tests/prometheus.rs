//! `config/prometheus`, `config/grafana` and `docs/runbook.md`: promtool takes them, they ask for nothing that is not there, and each leads to what is to be done.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use serde_json::{Value, json};
use slackwater::{
    error::Kind,
    telemetry::metrics::{self, METRICS},
};
use support::markdown::anchors;

fn read(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn alerts() -> Value {
    serde_saphyr::from_str(&read("config/prometheus/alerts.yaml")).unwrap()
}

/// Every rule: of an alert, or a recording.
fn rules(file: &Value) -> Vec<&Value> {
    file["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap()).collect()
}

fn dashboard() -> Value {
    serde_json::from_str(&read("config/grafana/slackwater.json")).unwrap()
}

fn panels(dashboard: &Value) -> Vec<&Value> {
    dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row").collect()
}

fn promtool(args: &[&str]) {
    let output = Command::new("promtool").args(args).output().expect("promtool (tests/run installs it)");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "promtool {args:?}: {said}");
}

fn folder() -> String {
    format!("{}/config/prometheus", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_alert_fires_when_it_must_and_only_then() {
    promtool(&["check", "rules", &format!("{}/alerts.yaml", folder())]);
    promtool(&["test", "rules", &format!("{}/alerts_test.yaml", folder())]);
    let tests = read("config/prometheus/alerts_test.yaml");
    let alerts = alerts();
    let names: Vec<&str> = rules(&alerts).iter().filter_map(|rule| rule["alert"].as_str()).collect();
    assert!(names.len() > 30, "{names:?}");
    for name in names {
        let of_it = tests
            .split("\n  - name: ")
            .find(|test| test.lines().next() == Some(name))
            .unwrap_or_else(|| panic!("{name} has no test"));
        // For "bad" it fires, for "good" it does not: there the query would give one more. Or it does at one time, and not at another.
        let on_two = of_it.contains("job=\"bad\"") && of_it.contains("job=\"good\"");
        assert!(of_it.contains(&format!("alertname=\"{name}\"")) && (on_two || of_it.contains("exp_samples: []")), "{name}");
    }
}

/// What a query may ask for: each series, with its labels and those of the scrape.
fn series() -> BTreeMap<String, BTreeSet<&'static str>> {
    let mut series = BTreeMap::new();
    for metric in METRICS {
        let labels: BTreeSet<&str> = metric.labels.iter().copied().chain(["namespace", "job", "instance"]).collect();
        if metric.kind == metrics::Kind::Histogram {
            for suffix in ["_bucket", "_count", "_sum"] {
                series.insert(format!("{}{suffix}", metric.name), labels.iter().copied().chain(["le"]).collect());
            }
        } else {
            series.insert(metric.name.to_owned(), labels);
        }
    }
    series
}

/// What of `query` is not there: a metric, or a label of one in braces.
fn unknown(query: &str, series: &BTreeMap<String, BTreeSet<&'static str>>, recorded: &BTreeSet<&str>) -> Vec<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
    let mut wrong = Vec::new();
    let mut rest = query;
    while let Some(at) = rest.find(|c: char| c.is_ascii_alphabetic()) {
        rest = &rest[at..];
        let end = rest.find(|c: char| !is_name(c)).unwrap_or(rest.len());
        let (name, behind) = rest.split_at(end);
        rest = behind;
        if !(name.starts_with("slackwater_") || name.starts_with("process_")) {
            if name.contains(':') && !recorded.contains(name) {
                wrong.push(format!("nothing records {name}"));
            }
            continue;
        }
        let Some(labels) = series.get(name) else {
            wrong.push(format!("no metric {name}"));
            continue;
        };
        let Some(selector) = behind.strip_prefix('{').and_then(|inner| inner.split_once('}')) else { continue };
        for matcher in selector.0.split(',').filter(|matcher| !matcher.trim().is_empty()) {
            let label = matcher.trim().split(['=', '!']).next().unwrap_or_default().trim();
            // A value may have a comma in it.
            if label.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') && !labels.contains(label) {
                wrong.push(format!("{name} has no label {label}"));
            }
        }
    }
    wrong
}

#[test]
fn nothing_is_asked_for_that_is_not_there() {
    let (alerts, dashboard, series) = (alerts(), dashboard(), series());
    let recorded: BTreeSet<&str> = rules(&alerts).iter().filter_map(|rule| rule["record"].as_str()).collect();
    let mut wrong = Vec::new();
    for rule in rules(&alerts) {
        let name = rule["alert"].as_str().or(rule["record"].as_str()).unwrap();
        wrong.extend(unknown(rule["expr"].as_str().unwrap(), &series, &recorded).into_iter().map(|why| format!("{name}: {why}")));
    }
    let mut queries = Vec::new();
    for panel in panels(&dashboard) {
        for target in panel["targets"].as_array().into_iter().flatten() {
            queries.push((panel["title"].as_str().unwrap(), target["expr"].as_str().unwrap()));
        }
    }
    for (panel, query) in &queries {
        wrong.extend(unknown(query, &series, &recorded).into_iter().map(|why| format!("panel {panel}: {why}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(queries.len() > 50, "{}", queries.len());
    // Each is a query to Prometheus: as rules of a file it reads them all.
    let fill = |query: &str| {
        let query = query.replace("$__rate_interval", "5m").replace("$__range", "1h").replace("$__interval", "1m");
        ["namespace", "job", "instance", "site", "upstream"]
            .iter()
            .fold(query, |query, name| query.replace(&format!("${name}"), ".*"))
    };
    let rules: Vec<Value> = queries
        .iter()
        .enumerate()
        .map(|(n, (_, query))| json!({ "record": "panel", "labels": { "n": n.to_string() }, "expr": fill(query) }))
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), json!({ "groups": [{ "name": "dashboard", "rules": rules }] }).to_string()).unwrap();
    promtool(&["check", "rules", &file.path().display().to_string()]);
}

#[test]
fn each_panel_and_each_alert_says_what_to_do() {
    let dashboard = dashboard();
    for panel in panels(&dashboard) {
        for key in ["/title", "/description", "/fieldConfig/defaults/unit"] {
            assert!(
                panel.pointer(key).is_some_and(|said| said.as_str().is_some_and(|text| !text.is_empty())),
                "{key} of {}",
                panel["title"]
            );
        }
    }
    let runbook = read("docs/runbook.md");
    let headings = anchors(&runbook);
    let alerts = alerts();
    for alert in rules(&alerts).into_iter().filter(|rule| rule["alert"].is_string()) {
        let name = &alert["alert"];
        assert!(matches!(alert["labels"]["severity"].as_str(), Some("page" | "ticket")), "{name}");
        for key in ["summary", "description"] {
            assert!(alert["annotations"][key].as_str().is_some_and(|text| !text.is_empty()), "{name}: {key}");
        }
        let link = alert["annotations"]["runbook_url"].as_str().unwrap_or_default();
        let section = link.strip_prefix("docs/runbook.md#").unwrap_or_else(|| panic!("{name}: {link}"));
        assert!(headings.contains(section), "{name}: the runbook has no {section}");
    }
}

/// A row for each cause, with the status that its client sees and a line of the log that is in the code.
#[test]
fn the_runbook_has_every_cause() {
    let runbook = read("docs/runbook.md");
    let mut sources = String::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            match entry.is_dir() {
                true => folders.push(entry),
                false if entry.extension().is_some_and(|extension| extension == "rs") => {
                    sources += &fs::read_to_string(entry).unwrap()
                }
                false => {}
            }
        }
    }
    for kind in Kind::ALL {
        let begins = format!("| `{}` | {}", kind.cause(), kind.status().as_u16());
        let row = runbook.lines().find(|line| line.starts_with(&begins)).unwrap_or_else(|| panic!("no row that begins {begins:?}"));
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        assert_eq!(cells.len(), 6, "{row}");
        assert!(cells[4].len() > 3 && cells[5].len() > 3, "{row}");
        for said in cells[2].split('`').skip(1).step_by(2) {
            assert!(said == "file" || sources.contains(said), "{}: nothing in the log says {said:?}", kind.cause());
        }
        for metric in cells[3].split('`').skip(1).step_by(2).filter(|text| text.starts_with("slackwater_")) {
            assert!(METRICS.iter().any(|known| known.name == metric), "{}: no metric {metric}", kind.cause());
        }
    }
}

/// `docs/prometheus.md`, as it is to be written into a file.
#[test]
fn the_scrape_of_the_documentation_is_good() {
    let page = read("docs/prometheus.md");
    let config = page
        .split("```yaml\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap())
        .find(|block| block.contains("scrape_configs:"));
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("slackwater")).unwrap();
    fs::write(folder.path().join("slackwater/alerts.yaml"), read("config/prometheus/alerts.yaml")).unwrap();
    let file = folder.path().join("prometheus.yml");
    fs::write(&file, config.expect("a block with scrape_configs")).unwrap();
    promtool(&["check", "config", &file.display().to_string()]);
}
