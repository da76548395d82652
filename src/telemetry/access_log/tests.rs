use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;
use crate::model::settings::LogFormat;

const LIMIT: Duration = Duration::from_secs(5);

fn entry() -> Entry<'static> {
    Entry {
        time: UNIX_EPOCH + Duration::from_millis(1_793_622_896_007),
        id: "abc",
        site: "example.com",
        route: "/a*",
        remote_addr: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7)),
        remote_user: "",
        method: "GET",
        path: "/a",
        query: Some("b=1"),
        version: http::Version::HTTP_11,
        status: 200,
        bytes_sent: 1234,
        request_bytes: 0,
        duration: Duration::from_micros(1_002_003),
        upstream: "php",
        set: "blue",
        endpoint: None,
        upstream_duration: Some(Duration::from_millis(5)),
        queue_duration: None,
        attempts: 1,
        cause: "",
        user_agent: b"curl/8",
        referer: b"",
        heads: None,
    }
}

fn told(access: AccessFormat, access_sample: u8) -> Log {
    Log { format: LogFormat::Auto, level: String::new(), access, access_sample, access_file: String::new() }
}

fn json_line(entry: &Entry<'_>) -> String {
    let mut out = Vec::new();
    json(&mut out, &mut Clock::default(), entry);
    String::from_utf8(out).unwrap()
}

fn combined_line(entry: &Entry<'_>) -> String {
    let mut out = Vec::new();
    combined(&mut out, &mut Clock::default(), entry);
    String::from_utf8(out).unwrap()
}

#[test]
fn what_was_refused_before_it_was_a_request_has_a_line_too() {
    let refused = Entry { method: "", path: "", query: None, status: 400, cause: "bad_request", ..entry() };
    let value: serde_json::Value = serde_json::from_str(&json_line(&refused)).unwrap();
    for field in ["method", "path", "query", "protocol"] {
        assert!(value[field].is_null(), "{field}: {value}");
    }
    assert!(combined_line(&refused).contains("] \"\" 400 "), "{}", combined_line(&refused));
}

#[test]
fn json_has_every_field() {
    let endpoint: Address = "unix:/run/\"php\".sock".parse().unwrap();
    let line = json_line(&Entry { endpoint: Some(&endpoint), ..entry() });
    let value: serde_json::Value = serde_json::from_str(&line).unwrap();
    let want = serde_json::json!({
        "time": "2026-11-02T12:34:56.007Z", "id": "abc", "site": "example.com", "route": "/a*", "remote_addr": "192.0.2.7", "remote_user": null,
        "method": "GET", "path": "/a", "query": "b=1", "protocol": "HTTP/1.1", "status": 200, "bytes_sent": 1234,
        "request_bytes": 0, "seconds": 1.002003, "upstream": "php", "set": "blue",
        "endpoint": "unix:/run/\"php\".sock", "upstream_seconds": 0.005, "queue_seconds": null, "attempts": 1,
        "cause": null, "user_agent": "curl/8", "referer": null,
    });
    assert_eq!(value, want);
}

#[test]
fn combined_is_nginx_line() {
    assert_eq!(
        combined_line(&entry()),
        "192.0.2.7 - - [02/Nov/2026:12:34:56 +0000] \"GET /a?b=1 HTTP/1.1\" 200 1234 \"-\" \"curl/8\"\n"
    );
    let hostile = Entry { user_agent: b"a\"b\\c\n\xff", remote_user: "x] \"", ..entry() };
    assert!(combined_line(&hostile).ends_with(" \"a\\x22b\\x5Cc\\x0A\\xFF\"\n"));
    assert!(combined_line(&hostile).contains("- x] \\x22 ["));
}

#[test]
fn the_calendar_agrees_with_httpdate() {
    let mut clock = Clock::default();
    // Ends of months, a leap day, the year 2100 that is none, and steps that hit the cache.
    for second in [0, 68_169_599, 68_169_600, 951_782_400, 951_868_800, 4_107_542_399, 4_107_542_400, 4_107_542_401] {
        let time = UNIX_EPOCH + Duration::from_secs(second);
        let mut out = Vec::new();
        clock.turn(time).write_common(&mut out);
        let text = String::from_utf8(out).unwrap();
        // "Sun, 06 Nov 1994 08:49:37 GMT"
        let date = httpdate::fmt_http_date(time);
        let want = format!("{}/{}/{}:{} +0000", &date[5..7], &date[8..11], &date[12..16], &date[17..25]);
        assert_eq!(text, want);
    }
}

#[test]
fn lines_reach_the_file_by_size_by_tick_and_by_drop() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access");
    let log = AccessLog::start(&told(AccessFormat::Json, 100), Target::from(path.to_str().unwrap())).unwrap();
    let writer = log.writer();
    for _ in 0..200 {
        writer.log(&entry());
    }
    writer.tick();
    log.set_format(&told(AccessFormat::Combined, 100));
    writer.log(&entry());
    log.set_format(&told(AccessFormat::Off, 100));
    writer.log(&entry());
    drop(writer);
    assert!(log.flush_and_stop(LIMIT));
    let text = std::fs::read_to_string(path).unwrap();
    assert_eq!(text.lines().count(), 201);
    assert!(text.lines().take(200).all(|line| line.starts_with("{\"time\":\"2026-")));
    assert_eq!(text.lines().last().unwrap(), combined_line(&entry()).trim_end());
    assert_eq!(log.lost(), 0);
}

#[test]
fn a_slow_reader_loses_lines_and_never_holds_the_worker() {
    let (sink, reader) = super::super::sink::tests::stuck_pipe("slow");
    let log = AccessLog(Arc::new(Shared { sink, format: Format::of(&told(AccessFormat::Json, 100)) }));
    let writer = log.writer();
    let began = std::time::Instant::now();
    for _ in 0..50_000 {
        writer.log(&entry());
    }
    assert!(began.elapsed() < LIMIT);
    writer.tick();
    assert!(log.lost() > 0);
    drop(reader);
}

proptest! {
    #[test]
    fn nothing_a_client_sends_forges_a_line(
        agent in prop::collection::vec(any::<u8>(), 0..64), path in any::<String>(), query in any::<String>(),
    ) {
        let entry = Entry { user_agent: &agent, path: &path, query: Some(&query), referer: &agent, ..entry() };
        let line = json_line(&entry);
        prop_assert_eq!(line.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        prop_assert_eq!(value["path"].as_str().unwrap_or_default(), &path);
        prop_assert_eq!(value["user_agent"].as_str().unwrap_or_default(), String::from_utf8_lossy(&agent));
        let line = combined_line(&entry);
        prop_assert!(line.trim_end_matches('\n').bytes().all(|byte| (0x20..0x7f).contains(&byte)));
        prop_assert_eq!(line.matches('"').count(), 6);
    }
}

#[test]
fn what_terminals_act_on_is_escaped() {
    let mut out = Vec::new();
    json_escape(&mut out, "a\u{85}\u{9b}\u{2028}\u{e9}\u{7f}\"\\\n\u{1}");
    assert_eq!(String::from_utf8(out).unwrap(), "a\\u0085\\u009b\\u2028\u{e9}\\u007f\\\"\\\\\\n\\u0001");
}

#[test]
fn a_part_of_what_went_well_is_logged_and_all_that_did_not() {
    let format = Format { access: AccessFormat::Json, sample: 25 };
    let well = (0..4000).filter(|_| format.takes(&entry())).count();
    assert!((700..1300).contains(&well), "{well} of 4000");
    assert!(
        (0..100)
            .all(|_| format.takes(&Entry { status: 404, ..entry() }) && format.takes(&Entry { cause: "client_left", ..entry() }))
    );
}
