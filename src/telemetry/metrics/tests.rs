use std::time::Duration;

use super::*;

fn with_everything() -> Arc<Metrics> {
    let metrics = Metrics::new(2);
    for worker in 0..2 {
        let shard = metrics.shard(worker);
        shard.request("example.com", 200, "php", "blue", 0.004);
        shard.request("example.com", 304, "", "", 0.0001);
        shard.request("example.com", 777, "php", "blue", 100.0);
        shard.attempt("php", "blue", "ok");
        shard.queue_wait("php", Duration::from_millis(20));
        shard.expired("php", "client_left");
        shard.error("queue_full");
        shard.shed("queue_full");
        let connection = shard.connection();
        if worker == 0 {
            std::mem::forget(connection);
        }
    }
    metrics.reload("applied");
    metrics.swap("done");
    metrics.emptied(&"php".into(), &"blue".into());
    metrics.set_source(Box::new(|| Gauges {
        phase: "Running",
        generation: 7,
        access_log_lost: 3,
        traces_lost: 2,
        certificates: vec![("/tls.crt".into(), 1_800_000_000)],
        upstreams: vec![UpstreamGauge {
            name: "php".into(),
            queued: 4,
            sets: vec![
                SetGauge {
                    name: "blue".into(),
                    active: true,
                    capacity: Some(8),
                    busy: 6,
                    parked: 1,
                    usable: 2,
                    share: Some(4),
                    saturation: Some(0.75),
                    known_age: Some(1.5),
                    states: [("usable", 2), ("disabled", 0), ("leaving", 1), ("preflight", 0), ("unusable", 0)],
                },
                SetGauge {
                    name: "green".into(),
                    active: false,
                    capacity: None,
                    busy: 0,
                    parked: 0,
                    usable: 0,
                    share: None,
                    saturation: None,
                    known_age: None,
                    states: [("usable", 0), ("disabled", 0), ("leaving", 0), ("preflight", 0), ("unusable", 0)],
                },
            ],
            lanes: vec![("checkout".into(), 2, 1)],
            refused: true,
            overloaded: true,
        }],
        buffer_memory_bytes: 65_536,
        buffer_disk_bytes: 1,
        connections_max: 16,
        buffer_memory_limit_bytes: 1 << 20,
        buffer_disk_limit_bytes: 1 << 30,
        log_lost: 5,
        reload_refused: true,
        reloaded: Some(1_700_000_000),
        ready: true,
    }));
    metrics
}

fn has(text: &str, line: &str) {
    assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
}

#[test]
fn shards_are_folded() {
    let text = with_everything().encode();
    has(&text, r#"slackwater_requests_total{site="example.com",code="200",upstream="php",set="blue"} 2"#);
    has(&text, r#"slackwater_requests_total{site="example.com",code="304",upstream="",set=""} 2"#);
    has(&text, r#"slackwater_requests_total{site="example.com",code="other",upstream="php",set="blue"} 2"#);
    has(&text, r#"slackwater_request_duration_seconds_bucket{le="0.001",site="example.com"} 2"#);
    has(&text, r#"slackwater_request_duration_seconds_bucket{le="0.005",site="example.com"} 4"#);
    has(&text, r#"slackwater_request_duration_seconds_bucket{le="+Inf",site="example.com"} 6"#);
    has(&text, r#"slackwater_request_duration_seconds_count{site="example.com"} 6"#);
    has(&text, r#"slackwater_upstream_attempts_total{upstream="php",set="blue",result="ok"} 2"#);
    has(&text, r#"slackwater_upstream_queue_wait_seconds_count{upstream="php"} 2"#);
    has(&text, r#"slackwater_upstream_expired_total{upstream="php",reason="client_left"} 2"#);
    has(&text, r#"slackwater_errors_total{cause="queue_full"} 2"#);
    has(&text, r#"slackwater_shed_total{reason="queue_full"} 2"#);
    has(&text, "slackwater_connections 1");
    has(&text, "slackwater_connections_accepted_total 2");
    has(&text, r#"slackwater_config_reloads_total{outcome="applied"} 1"#);
    has(&text, r#"slackwater_swaps_total{outcome="done"} 1"#);
    has(&text, "slackwater_access_log_lost_total 3");
}

#[test]
fn gauges_are_asked_for_at_the_scrape() {
    let text = with_everything().encode();
    has(&text, r#"slackwater_phase{phase="Running"} 1"#);
    has(&text, r#"slackwater_phase{phase="LameDuck"} 0"#);
    has(&text, "slackwater_config_generation 7");
    has(&text, r#"slackwater_upstream_queue_depth{upstream="php"} 4"#);
    has(&text, r#"slackwater_upstream_capacity{upstream="php",set="blue"} 8"#);
    assert!(!text.contains(r#"slackwater_upstream_capacity{upstream="php",set="green"}"#));
    has(&text, r#"slackwater_upstream_saturation{upstream="php",set="blue"} 0.75"#);
    has(&text, r#"slackwater_upstream_share{upstream="php",set="blue"} 4"#);
    assert!(!text.contains(r#"slackwater_upstream_share{upstream="php",set="green"}"#));
    has(&text, r#"slackwater_upstream_overloaded{upstream="php"} 1"#);
    has(&text, r#"slackwater_upstream_lane_busy{upstream="php",lane="checkout"} 2"#);
    has(&text, r#"slackwater_upstream_lane_waiting{upstream="php",lane="checkout"} 1"#);
    has(&text, r#"slackwater_upstream_active_set{upstream="php",set="green"} 0"#);
    has(&text, r#"slackwater_upstream_endpoints_usable{upstream="php",set="blue"} 2"#);
    has(&text, "slackwater_buffer_memory_bytes 65536");
    has(&text, &format!("slackwater_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")));
    assert!(text.ends_with("# EOF\n"));
}

/// A definition that `rows` forgets, or a row without its definition, fails here.
#[test]
fn every_definition_has_a_row() {
    let text = with_everything().encode();
    for definition in METRICS {
        let name = definition.name;
        let row = text.lines().any(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ', '_'])));
        assert!(row, "no row for {name}");
        assert_eq!(name.ends_with("_total"), definition.kind == Kind::Counter, "{name}");
        assert!(definition.help.ends_with('.') && !definition.help.contains('\n'), "{name}");
    }
    let rows = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .all(|line| METRICS.iter().any(|definition| line.starts_with(definition.name)));
    assert!(rows);
}

#[test]
fn a_label_value_is_escaped() {
    let metrics = Metrics::new(1);
    metrics.shard(0).request("a\"b\nc", 200, "", "", 0.1);
    assert!(metrics.encode().contains(r#"site="a\"b\nc""#));
}

#[test]
fn names_that_never_end_share_a_row() {
    let metrics = Metrics::new(1);
    let shard = metrics.shard(0);
    for i in 0..5_000 {
        shard.request(&format!("site{i}"), 200, "", "", 0.1);
        shard.request("one", 200, &format!("upstream{i}"), "blue", 0.1);
    }
    let text = metrics.encode();
    assert!(text.contains(r#"slackwater_requests_total{site="other""#));
    assert!(text.contains(r#"site="one",code="other",upstream="other""#));
    assert!(text.lines().filter(|line| line.starts_with("slackwater_requests_total")).count() <= 2 * 1024 + 4);
}

#[test]
fn a_shard_that_no_worker_has_is_shared() {
    let metrics = Metrics::new(0);
    metrics.shard(9).error("internal");
    has(&metrics.encode(), r#"slackwater_errors_total{cause="internal"} 1"#);
}
