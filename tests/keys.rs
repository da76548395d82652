//! Every key of the configuration changes something that can be seen from outside. [`SEEN`] says which test sees it; a key that is not in
//! it, or whose test is gone, fails here.

mod support;

use std::time::{Duration, Instant};

use slackwater::control::config::keys::KEYS;
use support::{
    gate::Gate,
    http::{self, Connection},
    process::Slackwater,
    real_fpm::RealFpm,
    scripted_fpm::{Behaviour, ScriptedFpm},
};
use tokio::net::TcpStream;

/// "table key", and "file test" of the test that sees it change something.
const SEEN: &[(&str, &str)] = &[
    (" workers", "life_cycle reloads_under_load_lose_nothing_and_a_bad_file_changes_nothing"),
    (" include", "keys an_included_file_is_part_of_it"),
    (" reload", "pools a_watched_file_is_read_again_when_it_changes"),
    (" sandbox", "hostile/privilege in_the_sandbox_only_what_the_configuration_names_can_be_read"),
    (" state", "swap a_swap_survives_a_kill_where_there_is_a_state_file"),
    (" listen", "life_cycle toml"),
    (" buffer", "keys buffers_are_bounded_and_lie_where_they_are_told"),
    (" log", "keys logs_are_as_they_are_told"),
    (" tracing", "otlp toml"),
    (" drain", "life_cycle toml"),
    (" kubernetes", "kubernetes toml"),
    (" upstream", "life_cycle toml"),
    (" site", "life_cycle toml"),
    ("listen http", "life_cycle toml"),
    ("listen https", "tls the_name_chooses_the_certificate_and_alpn_the_protocol"),
    ("listen tls_ticket_keys", "tls replicas_with_the_same_ticket_keys_resume_each_others_sessions"),
    (" tls", "tls certificate"),
    ("tls hosts", "tls what_cannot_be_read_is_named_with_its_place"),
    ("tls certificate", "tls certificate"),
    ("tls key", "tls certificate"),
    ("site https_only", "tls a_handshake_has_a_deadline_and_a_site_may_be_for_https_alone"),
    ("listen ops", "life_cycle toml"),
    ("listen ops_allow", "keys the_ops_port_tells_only_those_who_are_allowed"),
    ("listen admin", "life_cycle toml"),
    ("listen health_path", "life_cycle lame_duck_serves_and_says_close_and_a_second_signal_skips_it"),
    ("listen proxy_protocol", "tls a_proxy_header_says_who_the_client_is"),
    ("listen trusted_proxies", "http_front behind_a_trusted_load_balancer_its_headers_count"),
    ("listen idle_timeout", "http_front deadlines_of_their_own_for_head_idle_and_body"),
    ("listen header_timeout", "http_front deadlines_of_their_own_for_head_idle_and_body"),
    ("listen max_uri_bytes", "keys limits_of_the_head_are_as_they_are_told"),
    ("listen max_header_bytes", "keys limits_of_the_head_are_as_they_are_told"),
    ("listen stall_timeout", "http_front a_reader_that_stalls_loses_its_connection_on_http1_and_its_stream_on_http2"),
    ("listen min_rate", "keys a_trickle_below_min_rate_is_cut"),
    ("listen max_connections", "http_front beyond_max_connections_new_ones_wait_and_are_served_when_there_is_room"),
    ("listen max_connections_per_address", "http_front connections_and_requests_have_caps"),
    ("listen max_requests_per_connection", "http_front connections_and_requests_have_caps"),
    ("buffer memory", "keys buffers_are_bounded_and_lie_where_they_are_told"),
    ("buffer total", "keys buffers_are_bounded_and_lie_where_they_are_told"),
    ("buffer dir", "keys buffers_are_bounded_and_lie_where_they_are_told"),
    ("buffer disk", "keys buffers_are_bounded_and_lie_where_they_are_told"),
    ("log format", "keys logs_are_as_they_are_told"),
    ("log level", "keys logs_are_as_they_are_told"),
    ("log access", "keys logs_are_as_they_are_told"),
    ("log access_sample", "keys an_access_log_has_the_operators_format_and_its_part_of_what_went_well"),
    ("log access_file", "keys logs_are_as_they_are_told"),
    ("tracing endpoint", "otlp each_step_has_a_span_and_php_the_parent"),
    ("tracing sample", "otlp each_step_has_a_span_and_php_the_parent"),
    ("tracing service", "otlp each_step_has_a_span_and_php_the_parent"),
    ("buffer files", "files what_changes_on_disk_is_seen_within_a_second"),
    ("drain grace", "life_cycle what_is_left_at_the_end_of_grace_is_cut_named_and_told_by_exit_3"),
    ("drain lame_duck", "life_cycle lame_duck_serves_and_says_close_and_a_second_signal_skips_it"),
    ("drain health_fail_delay", "keys health_fails_after_its_delay_and_idle_connections_end_when_quiet"),
    ("drain quiet", "keys health_fails_after_its_delay_and_idle_connections_end_when_quiet"),
    ("drain margin", "life_cycle what_is_left_at_the_end_of_grace_is_cut_named_and_told_by_exit_3"),
    ("drain receipt", "keys health_fails_after_its_delay_and_idle_connections_end_when_quiet"),
    ("upstream active", "swap toml"),
    ("upstream active_from", "kubernetes the_annotation_turns_traffic_and_is_refused_with_a_reason_until_it_can_be_followed"),
    ("upstream keepalive", "keys leases_end_as_they_are_told"),
    ("upstream lease", "keys leases_end_as_they_are_told"),
    ("upstream workers_per_endpoint", "slots a_told_capacity_is_never_exceeded"),
    ("upstream connect_timeout", "keys time_outs_and_retries_of_an_upstream"),
    ("upstream read_timeout", "keys time_outs_and_retries_of_an_upstream"),
    ("upstream retries", "keys time_outs_and_retries_of_an_upstream"),
    ("upstream balance", "pools a_hash_keeps_a_cookie_on_its_endpoint_and_disable_moves_it"),
    ("upstream queue", "slots the_queue_is_bounded_in_number_and_time_and_a_leaver_is_never_begun"),
    ("upstream slow_start", "dispatch an_endpoint_that_has_just_come_gets_less_at_first"),
    ("upstream lane", "overload a_slow_lane_has_no_more_than_its_limit_and_a_reserve_is_there"),
    ("lane reserve", "overload a_slow_lane_has_no_more_than_its_limit_and_a_reserve_is_there"),
    ("lane limit", "overload a_slow_lane_has_no_more_than_its_limit_and_a_reserve_is_there"),
    ("lane priority", "overload a_lane_with_priority_goes_before_those_that_came_earlier"),
    ("site lane", "overload a_lane_with_priority_goes_before_those_that_came_earlier"),
    ("route lane", "overload a_slow_lane_has_no_more_than_its_limit_and_a_reserve_is_there"),
    ("site rewrite", "rules a_rewrite_goes_on_with_another_path_and_internal_routes_are_for_it_alone"),
    ("route rewrite", "rules a_rewrite_goes_on_with_another_path_and_internal_routes_are_for_it_alone"),
    ("site internal", "rules a_rewrite_goes_on_with_another_path_and_internal_routes_are_for_it_alone"),
    ("route internal", "rules a_rewrite_goes_on_with_another_path_and_internal_routes_are_for_it_alone"),
    ("site error_page", "rules error_pages_are_files_scripts_or_redirects_and_phps_own_stay"),
    ("route error_page", "rules error_pages_are_files_scripts_or_redirects_and_phps_own_stay"),
    ("site limit", "rules who_asks_too_often_or_for_too_much_at_once_gets_429"),
    ("route limit", "rules who_asks_too_often_or_for_too_much_at_once_gets_429"),
    ("limit by", "rules who_asks_too_often_or_for_too_much_at_once_gets_429"),
    ("limit rate", "rules who_asks_too_often_or_for_too_much_at_once_gets_429"),
    ("limit burst", "rules who_asks_too_often_or_for_too_much_at_once_gets_429"),
    ("limit concurrent", "rules who_asks_too_often_or_for_too_much_at_once_gets_429"),
    ("site basic_auth", "rules a_password_is_asked_for_and_a_changed_file_is_seen"),
    ("route basic_auth", "rules a_password_is_asked_for_and_a_changed_file_is_seen"),
    ("basic_auth realm", "rules a_password_is_asked_for_and_a_changed_file_is_seen"),
    ("basic_auth file", "rules a_password_is_asked_for_and_a_changed_file_is_seen"),
    ("site allow", "rules keys_of_a_site_are_the_default_of_its_routes"),
    ("route allow", "rules plain_answers_and_who_may"),
    ("site deny", "rules keys_of_a_site_are_the_default_of_its_routes"),
    ("route deny", "rules plain_answers_and_who_may"),
    ("site redirect", "rules keys_of_a_site_are_the_default_of_its_routes"),
    ("route redirect", "rules redirects_keep_host_port_and_query_and_nothing_gets_into_the_header"),
    ("redirect to", "rules redirects_keep_host_port_and_query_and_nothing_gets_into_the_header"),
    ("redirect status", "rules redirects_keep_host_port_and_query_and_nothing_gets_into_the_header"),
    ("site respond", "rules keys_of_a_site_are_the_default_of_its_routes"),
    ("route respond", "rules plain_answers_and_who_may"),
    ("respond status", "rules plain_answers_and_who_may"),
    ("respond body", "rules plain_answers_and_who_may"),
    ("respond type", "rules plain_answers_and_who_may"),
    ("site headers", "rules headers_of_answers_and_of_what_php_sees"),
    ("route headers", "rules headers_of_answers_and_of_what_php_sees"),
    ("headers set", "rules headers_of_answers_and_of_what_php_sees"),
    ("headers add", "rules headers_of_answers_and_of_what_php_sees"),
    ("headers remove", "rules headers_of_answers_and_of_what_php_sees"),
    ("site request_headers", "rules headers_of_answers_and_of_what_php_sees"),
    ("route request_headers", "rules headers_of_answers_and_of_what_php_sees"),
    ("request_headers set", "rules headers_of_answers_and_of_what_php_sees"),
    ("request_headers add", "rules headers_of_answers_and_of_what_php_sees"),
    ("request_headers remove", "rules headers_of_answers_and_of_what_php_sees"),
    ("site expires", "rules keys_of_a_site_are_the_default_of_its_routes"),
    ("route expires", "rules headers_of_answers_and_of_what_php_sees"),
    ("headers default", "rules headers_of_answers_and_of_what_php_sees"),
    ("request_headers default", "rules headers_of_answers_and_of_what_php_sees"),
    ("site preset", "rules a_preset_is_the_default_of_a_site"),
    ("site precompressed", "files what_lies_beside_a_file_is_sent_to_who_takes_it"),
    ("route precompressed", "files what_lies_beside_a_file_is_sent_to_who_takes_it"),
    ("site compress", "compress answers_are_the_same_once_they_are_decoded"),
    ("route compress", "compress what_is_better_left_alone_is"),
    ("compress codings", "compress what_is_better_left_alone_is"),
    ("compress types", "compress what_is_better_left_alone_is"),
    ("compress min", "compress what_is_better_left_alone_is"),
    ("compress private", "compress what_is_better_left_alone_is"),
    ("site cors", "rules pages_of_other_origins_are_told_what_they_may"),
    ("route cors", "rules pages_of_other_origins_are_told_what_they_may"),
    ("cors origins", "rules pages_of_other_origins_are_told_what_they_may"),
    ("cors methods", "rules pages_of_other_origins_are_told_what_they_may"),
    ("cors headers", "rules pages_of_other_origins_are_told_what_they_may"),
    ("cors expose", "rules pages_of_other_origins_are_told_what_they_may"),
    ("cors credentials", "rules pages_of_other_origins_are_told_what_they_may"),
    ("cors max_age", "rules pages_of_other_origins_are_told_what_they_may"),
    ("site maintenance", "rules in_a_maintenance_all_but_a_few_get_its_page"),
    ("route maintenance", "rules in_a_maintenance_all_but_a_few_get_its_page"),
    ("maintenance page", "rules in_a_maintenance_all_but_a_few_get_its_page"),
    ("maintenance from", "rules in_a_maintenance_all_but_a_few_get_its_page"),
    ("maintenance cookie", "rules in_a_maintenance_all_but_a_few_get_its_page"),
    ("maintenance header", "rules in_a_maintenance_all_but_a_few_get_its_page"),
    ("maintenance retry_after", "rules in_a_maintenance_all_but_a_few_get_its_page"),
    ("maintenance file", "rules in_a_maintenance_all_but_a_few_get_its_page"),
    ("when arg", "rules what_a_request_carries_chooses_its_route"),
    ("when scheme", "rules what_a_request_carries_chooses_its_route"),
    ("when header", "rules what_a_request_carries_chooses_its_route"),
    ("when cookie", "rules what_a_request_carries_chooses_its_route"),
    ("when from", "rules what_a_request_carries_chooses_its_route"),
    ("upstream set", "swap toml"),
    ("kubernetes namespace", "kubernetes toml"),
    ("kubernetes kubeconfig", "kubernetes toml"),
    ("lease requests", "keys leases_end_as_they_are_told"),
    ("lease age", "keys leases_end_as_they_are_told"),
    ("lease idle", "keys leases_end_as_they_are_told"),
    ("lease non_idempotent", "keys leases_end_as_they_are_told"),
    ("queue max", "slots the_queue_is_bounded_in_number_and_time_and_a_leaver_is_never_begun"),
    ("queue timeout", "slots the_queue_is_bounded_in_number_and_time_and_a_leaver_is_never_begun"),
    ("set endpoints", "swap toml"),
    ("set kubernetes", "kubernetes toml"),
    ("service service", "kubernetes toml"),
    ("service port", "kubernetes toml"),
    ("set root", "keys a_set_has_its_own_files_and_tells_php_where_they_are"),
    ("set php_root", "keys a_set_has_its_own_files_and_tells_php_where_they_are"),
    ("set min_ready", "swap orders_that_cannot_be_are_refused_with_what_there_is"),
    ("set status_path", "slots sixty_four_clients_before_eight_workers_are_all_served"),
    ("set status_listen", "keys the_status_question_goes_where_it_is_told"),
    ("set ping", "keys a_ping_turns_an_endpoint_after_fall_and_rise"),
    ("ping path", "keys a_ping_turns_an_endpoint_after_fall_and_rise"),
    ("ping every", "keys a_ping_turns_an_endpoint_after_fall_and_rise"),
    ("ping fall", "keys a_ping_turns_an_endpoint_after_fall_and_rise"),
    ("ping rise", "keys a_ping_turns_an_endpoint_after_fall_and_rise"),
    ("upstream assets_fallback", "keys a_file_of_the_other_release_is_found_where_it_is_told_to_look"),
    ("kubernetes self_service", "fleet toml"),
    ("set preflight", "preflight a_new_pod_gets_no_user_before_its_preflight_and_old_pods_are_not_asked"),
    ("preflight path", "preflight a_new_pod_gets_no_user_before_its_preflight_and_old_pods_are_not_asked"),
    ("preflight host", "preflight a_new_pod_gets_no_user_before_its_preflight_and_old_pods_are_not_asked"),
    ("preflight https", "preflight a_new_pod_gets_no_user_before_its_preflight_and_old_pods_are_not_asked"),
    ("preflight requests", "preflight a_new_pod_gets_no_user_before_its_preflight_and_old_pods_are_not_asked"),
    ("preflight expect", "preflight a_new_pod_gets_no_user_before_its_preflight_and_old_pods_are_not_asked"),
    ("preflight timeout", "preflight a_swap_waits_for_the_preflight_and_one_that_gives_up_says_why"),
    ("preflight give_up", "preflight a_swap_waits_for_the_preflight_and_one_that_gives_up_says_why"),
    ("site hosts", "keys sites_and_routes_do_as_they_are_told"),
    ("site root", "files files_are_served_and_everything_else_goes_to_the_front"),
    ("site php_root", "files files_are_served_and_everything_else_goes_to_the_front"),
    ("site index", "keys files_of_a_site_are_looked_up_as_it_says"),
    ("site scripts", "life_cycle toml"),
    ("site front", "keys files_of_a_site_are_looked_up_as_it_says"),
    ("site symlinks", "keys files_of_a_site_are_looked_up_as_it_says"),
    ("site route", "keys sites_and_routes_do_as_they_are_told"),
    ("site files", "keys files_of_a_site_are_looked_up_as_it_says"),
    ("site try_files", "keys files_of_a_site_are_looked_up_as_it_says"),
    ("site script", "keys sites_and_routes_do_as_they_are_told"),
    ("site upstream", "life_cycle toml"),
    ("site read_timeout", "keys sites_and_routes_do_as_they_are_told"),
    ("site body_limit", "http_front what_is_too_large_is_told_and_the_client_sees_it"),
    ("site params", "keys sites_and_routes_do_as_they_are_told"),
    ("site access_log", "keys sites_and_routes_do_as_they_are_told"),
    ("route path", "keys sites_and_routes_do_as_they_are_told"),
    ("route when", "keys sites_and_routes_do_as_they_are_told"),
    ("route files", "files files_are_served_and_everything_else_goes_to_the_front"),
    ("route try_files", "keys sites_and_routes_do_as_they_are_told"),
    ("route script", "keys sites_and_routes_do_as_they_are_told"),
    ("route upstream", "keys sites_and_routes_do_as_they_are_told"),
    ("route read_timeout", "keys sites_and_routes_do_as_they_are_told"),
    ("route body_limit", "keys sites_and_routes_do_as_they_are_told"),
    ("route params", "keys sites_and_routes_do_as_they_are_told"),
    ("route access_log", "keys sites_and_routes_do_as_they_are_told"),
    ("when method", "keys sites_and_routes_do_as_they_are_told"),
];

#[test]
fn every_key_is_seen_to_change_something_by_a_test_that_is_there() {
    for (table, keys) in KEYS {
        for key in *keys {
            let name = format!("{table} {key}");
            let (_, test) = SEEN.iter().find(|(seen, _)| *seen == name).unwrap_or_else(|| panic!("no test sees `{name}`"));
            let (file, function) = test.split_once(' ').unwrap();
            let path = format!("{}/tests/{file}.rs", env!("CARGO_MANIFEST_DIR"));
            let text = std::fs::read_to_string(&path).unwrap();
            let body = |function: &str| {
                let start = text.find(&format!("fn {function}("))?;
                Some(&text[start..start + text[start..].find("\n}\n")?])
            };
            let test = body(function).unwrap_or_else(|| panic!("`{name}`: {path} has no {function}"));
            // Most files have the configuration of all their tests in one place.
            let sets = [Some(test), body("toml"), body("start")].into_iter().flatten().any(|text| text.contains(*key));
            assert!(sets, "`{name}`: neither {function} nor toml() or start() of {path} sets it");
        }
    }
    for (seen, _) in SEEN {
        let (table, key) = seen.split_once(' ').unwrap();
        assert!(KEYS.iter().any(|(t, keys)| *t == table && keys.contains(&key)), "`{seen}` is not a key");
    }
}

/// `top` stands before every table, `listen` in `[listen]`, `upstream` in `[upstream.php]`, `site` in `[[site]]` and behind it.
fn toml(fpm: &ScriptedFpm, top: &str, listen: &str, upstream: &str, site: &str) -> String {
    format!(
        r#"
        workers = 1
        {top}
        [listen]
        http = ["{{HTTP}}"]
        ops = "{{OPS}}"
        admin = "{{ADMIN}}"
        {listen}
        [upstream.php]
        {upstream}
        [upstream.php.set.blue]
        endpoints = ["{}"]
        [[site]]
        php_root = "/app"
        upstream = "php"
        {site}
        "#,
        fpm.address()
    )
}

async fn hello() -> ScriptedFpm {
    ScriptedFpm::start(Behaviour::hello("blue")).await
}

async fn status_of(proxy: &Slackwater, method: &str, path: &str, body: &[u8]) -> u16 {
    http::send(proxy.http(), method, path, &[], body).await.unwrap().status
}

#[tokio::test(flavor = "multi_thread")]
async fn an_included_file_is_part_of_it() {
    let fpm = hello().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("more.toml");
    std::fs::write(&path, "[[site]]\nhosts = [\"more.example\"]\nphp_root = \"/more\"\nupstream = \"php\"\n").unwrap();
    let include = format!("include = [\"{}\"]", path.display());
    let proxy = Slackwater::start(&toml(&fpm, &include, "", "", "")).await;
    http::send(proxy.http(), "GET", "/", &[("Host", "more.example")], b"").await.unwrap();
    assert_eq!(fpm.requests()[0].param("DOCUMENT_ROOT").as_deref(), Some("/more"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ops_port_tells_only_those_who_are_allowed() {
    let fpm = hello().await;
    let proxy = Slackwater::start(&toml(&fpm, "", "ops_allow = [\"10.0.0.0/8\"]", "", "")).await;
    for (path, status) in [("/status", 403), ("/vote?upstream=php&set=blue", 403), ("/metrics", 200), ("/livez", 200)] {
        assert_eq!(http::get(proxy.ops(), path).await.unwrap().status, status, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_the_head_are_as_they_are_told() {
    let limits = "max_uri_bytes = \"100B\"\nmax_header_bytes = \"8KiB\"";
    let fpm = hello().await;
    let proxy = Slackwater::start(&toml(&fpm, "", limits, "", "")).await;
    assert_eq!(status_of(&proxy, "GET", &format!("/{}", "a".repeat(90)), b"").await, 200);
    assert_eq!(status_of(&proxy, "GET", &format!("/{}", "a".repeat(110)), b"").await, 414);
    for (bytes, status) in [(7_000, 200), (9_000, 431)] {
        let answer = http::send(proxy.http(), "GET", "/", &[("X-A", &"b".repeat(bytes))], b"").await.unwrap();
        assert_eq!(answer.status, status, "{bytes} bytes of headers");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trickle_below_min_rate_is_cut() {
    let listen = "stall_timeout = \"1s\"\nmin_rate = \"1MiB\"";
    let fpm = hello().await;
    let proxy = Slackwater::start(&toml(&fpm, "", listen, "", "")).await;
    let mut upload = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    upload.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n").await.unwrap();
    let trickle = async {
        // Never still, and never fast enough.
        while upload.send("x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        () = trickle => {}
        line = proxy.wait_for_log("body_stalled", Duration::from_secs(20)) => assert!(line.contains("408"), "{line}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn buffers_are_bounded_and_lie_where_they_are_told() {
    let fpm = hello().await;
    let body = vec![b'x'; 300 << 10];
    // buffer.disk: nothing may spill, and memory holds no more than 64 KiB of a body.
    let proxy = Slackwater::start(&(toml(&fpm, "", "", "", "") + "\n[buffer]\ndisk = \"0B\"\n")).await;
    assert_eq!((status_of(&proxy, "POST", "/", &body).await, status_of(&proxy, "POST", "/", &body[..9999]).await), (503, 200));
    // buffer.memory: now it does.
    let proxy = Slackwater::start(&(toml(&fpm, "", "", "", "") + "\n[buffer]\nmemory = \"1MiB\"\ndisk = \"0B\"\n")).await;
    assert_eq!(status_of(&proxy, "POST", "/", &body).await, 200);
    // buffer.total: all bodies together.
    let small = "\n[buffer]\nmemory = \"16KiB\"\ntotal = \"16KiB\"\ndisk = \"0B\"\n";
    let proxy = Slackwater::start(&(toml(&fpm, "", "", "", "") + small)).await;
    let mut half = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    half.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 12000\r\n\r\n{}", "y".repeat(11_000))).await.unwrap();
    while proxy.metric(&["slackwater_buffer_memory_bytes "]).await.unwrap() < 11_000.0 {}
    assert_eq!(status_of(&proxy, "POST", "/", &body[..9999]).await, 503);
    half.send("y".repeat(1000)).await.unwrap();
    assert_eq!(half.read_response("POST").await.unwrap().status, 200);
    // buffer.dir: the unlinked file is there while a large body is being read.
    let dir = tempfile::tempdir().unwrap();
    let told = format!("\n[buffer]\ndir = \"{}\"\n", dir.path().display());
    let proxy = Slackwater::start(&(toml(&fpm, "", "", "", "") + &told)).await;
    let mut slow = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
    slow.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 400000\r\n\r\n{}", "y".repeat(300_000))).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let lies_there = || {
        let files = std::fs::read_dir(format!("/proc/{}/fd", proxy.pid())).unwrap().flatten();
        files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|link| link.starts_with(dir.path()))
    };
    while !lies_there() {
        assert!(Instant::now() < deadline, "nothing has spilled into buffer.dir");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_as_they_are_told() {
    let fpm = hello().await;
    let with = |log: &str| toml(&fpm, "", "", "", "") + "\n[log]\n" + log;
    let proxy = Slackwater::start(&with("format = \"text\"\naccess = \"combined\"")).await;
    let first = proxy.wait_for_log("listening", Duration::from_secs(20)).await;
    assert!(serde_json::from_str::<serde_json::Value>(&first).is_err(), "format: {first}");
    assert_eq!(status_of(&proxy, "GET", "/a?b", b"").await, 200);
    proxy.wait_for_log("\"GET /a?b HTTP/1.1\" 200 11", Duration::from_secs(20)).await;

    let proxy = Slackwater::start(&with("level = \"error\"\naccess_file = \"{DIR}/access.log\"")).await;
    assert_eq!(status_of(&proxy, "GET", "/a?b", b"").await, 200);
    let deadline = Instant::now() + Duration::from_secs(20);
    let line = loop {
        let text = std::fs::read_to_string(proxy.folder().join("access.log")).unwrap_or_default();
        if text.ends_with('\n') {
            break text;
        }
        assert!(Instant::now() < deadline, "no line in access_file");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap()["query"], "b");
    assert_eq!(proxy.log_text(), "", "level: nothing below an error");

    let proxy = Slackwater::start(&with("access = \"off\"")).await;
    assert_eq!(status_of(&proxy, "GET", "/off", b"").await, 200);
    proxy.cli_ok(&["reload"]).await;
    proxy.wait_for_log("\"reload\"", Duration::from_secs(20)).await;
    assert!(!proxy.log_text().contains("/off"), "{}", proxy.log_text());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_access_log_has_the_operators_format_and_its_part_of_what_went_well() {
    let fpm = hello().await;
    let with = |log: &str| toml(&fpm, "", "trusted_proxies = [\"127.0.0.1\"]", "", "") + "\n[log]\n" + log;
    let line = r##"access = '$remote_addr [$time_iso8601] "$request" $status $body_bytes_sent "$http_x_tenant" "$sent_http_content_type" $cookie_a $arg_b $host $scheme $uri $set $pipe'"##;
    let proxy = Slackwater::start(&with(line)).await;
    let headers = [("X-Tenant", "a\"b"), ("Cookie", "z=1; a=2"), ("Host", "Example.com:81"), ("X-Forwarded-Proto", "https")];
    http::send(proxy.http(), "GET", "/a%20b/../c?b=3", &headers, b"").await.unwrap();
    let line = proxy.wait_for_log("\"GET /a%20b", Duration::from_secs(20)).await;
    let (before, after) = line.split_once(" \"GET ").unwrap();
    assert!(before.starts_with("127.0.0.1 [2") && before.ends_with("+00:00]"), "{line}");
    assert_eq!(after, "/a%20b/../c?b=3 HTTP/1.1\" 200 11 \"a\\x22b\" \"text/plain\" 2 3 example.com https /c blue -");

    // JSON by the format's first character, and of 400 that went well none but a few.
    let json = r##"access = '{"r":"$request","a":"$http_user_agent","s":"$status","none":"$upstream_response_time"}'"##;
    let proxy = Slackwater::start(&with(&format!("{json}\naccess_sample = \"0%\""))).await;
    assert_eq!(status_of(&proxy, "GET", "/well", b"").await, 200);
    http::send(proxy.http(), "GET", "/%zz", &[("User-Agent", "a\"\\b")], b"").await.unwrap();
    let line = proxy.wait_for_log("/%zz", Duration::from_secs(20)).await;
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((line["a"].as_str(), line["s"].as_str(), line["none"].as_str()), (Some("a\"\\b"), Some("400"), Some("")));
    assert!(!proxy.log_text().contains("/well"), "{}", proxy.log_text());
}

#[tokio::test(flavor = "multi_thread")]
async fn health_fails_after_its_delay_and_idle_connections_end_when_quiet() {
    let fpm = hello().await;
    let leave = async |quiet: &str| {
        let drain = format!(
            "\n[drain]\ngrace = \"60s\"\nlame_duck = \"1s\"\nhealth_fail_delay = \"700ms\"\nquiet = \"{quiet}\"\n\
             receipt = \"{{DIR}}/drain.json\"\n"
        );
        let mut proxy = Slackwater::start(&(toml(&fpm, "", "", "", "") + &drain)).await;
        let mut idle = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
        assert_eq!(idle.get("/").await.unwrap().status, 200);
        proxy.terminate();
        proxy.wait_for_log("LameDuck", Duration::from_secs(20)).await;
        assert_eq!(http::get(proxy.ops(), "/readyz").await.unwrap().status, 200, "health fails before its delay");
        proxy.wait_status("/readyz", 503).await;
        proxy.wait_for_log("Draining", Duration::from_secs(20)).await;
        let draining = Instant::now();
        assert_eq!(idle.wait_closed(Duration::from_secs(40)).await, Ok(true));
        let closed = draining.elapsed();
        drop(idle);
        assert_eq!(proxy.wait_exit(Duration::from_secs(40)).await, 0);
        let receipt = std::fs::read_to_string(proxy.folder().join("drain.json")).unwrap();
        let receipt: serde_json::Value = serde_json::from_str(&receipt).unwrap();
        assert_eq!((&receipt["kind"], &receipt["cut"]), (&"drain".into(), &serde_json::json!([])));
        closed
    };
    let (short, long) = (leave("0s").await, leave("4s").await);
    println!("an idle connection ended {short:?} and {long:?} after the beginning of Draining");
    assert!(long > Duration::from_secs(2) && long > short, "{short:?} {long:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_end_as_they_are_told() {
    // Requests one after the other on one worker: how many connections does FPM see?
    let connections_of = async |request: &str, upstream: &str, pause: Duration| {
        let fpm = hello().await;
        let upstream = format!("workers_per_endpoint = 4\n{upstream}");
        let proxy = Slackwater::start(&toml(&fpm, "", "", &upstream, "")).await;
        let mut client = Connection::<TcpStream>::open(proxy.http()).await.unwrap();
        for _ in 0..6 {
            let method = request.split(' ').next().unwrap();
            assert_eq!(client.exchange(method, request.as_bytes()).await.unwrap().status, 200);
            tokio::time::sleep(pause).await;
        }
        fpm.connections()
    };
    let connections =
        async |upstream: &str, pause: Duration| connections_of("GET / HTTP/1.1\r\nHost: a\r\n\r\n", upstream, pause).await;
    let none = Duration::ZERO;
    let long = "age = \"60s\", idle = \"60s\"";
    assert_eq!(connections(&format!("lease = {{ requests = 100, {long} }}"), none).await, 1);
    assert_eq!(connections(&format!("lease = {{ requests = 2, {long} }}"), none).await, 3);
    assert_eq!(connections("keepalive = \"off\"", none).await, 6);
    let pause = Duration::from_millis(60);
    assert_eq!(connections("lease = { requests = 100, age = \"60s\", idle = \"1ms\" }", pause).await, 6);
    assert_eq!(connections("lease = { requests = 100, age = \"1ms\", idle = \"60s\" }", pause).await, 6);
    assert_eq!(connections(&format!("lease = {{ requests = 100, {long} }}"), pause).await, 1);
    // What must not run twice has a connection of its own, unless FPM is said never to end one by itself.
    let post = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi";
    assert_eq!(connections_of(post, &format!("lease = {{ requests = 100, {long} }}"), none).await, 6);
    assert_eq!(connections_of(post, &format!("lease = {{ requests = 100, {long}, non_idempotent = true }}"), none).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn time_outs_and_retries_of_an_upstream() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue").stalls_before_headers()).await;
    let proxy = Slackwater::start(&toml(&fpm, "", "", "read_timeout = \"300ms\"", "")).await;
    assert_eq!(status_of(&proxy, "POST", "/", b"x").await, 504);

    for (retries, attempts) in [(0, 1), (2, 3)] {
        let fpm = ScriptedFpm::start(Behaviour::overloaded()).await;
        let proxy = Slackwater::start(&toml(&fpm, "", "", &format!("retries = {retries}"), "")).await;
        assert_eq!(status_of(&proxy, "GET", "/", b"").await, 503);
        assert_eq!(fpm.requests().len(), attempts, "retries = {retries}");
    }

    // A full backlog: the kernel drops the SYN, and nobody answers.
    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    full.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    full.listen(0).unwrap();
    let address = full.local_addr().unwrap().as_socket().unwrap();
    let mut held = Vec::new();
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        held.push(stream);
    }
    let text = toml(&fpm, "", "", "connect_timeout = \"200ms\"\nretries = 0", "");
    let proxy = Slackwater::start(&text.replace(&fpm.address().to_string(), &address.to_string())).await;
    let started = Instant::now();
    assert_eq!(status_of(&proxy, "GET", "/", b"").await, 504);
    println!("connect_timeout of 200ms: answered after {:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_has_its_own_files_and_tells_php_where_they_are() {
    let fpm = hello().await;
    let release = tempfile::tempdir().unwrap();
    std::fs::write(release.path().join("app.js"), "release 2").unwrap();
    let set = format!("[upstream.php.set.blue]\nroot = \"{}\"\nphp_root = \"/releases/2\"", release.path().display());
    let text = toml(&fpm, "", "", "", "").replace("[upstream.php.set.blue]", &set);
    let proxy = Slackwater::start(&text).await;
    assert_eq!(http::get(proxy.http(), "/app.js").await.unwrap().text(), "release 2");
    assert_eq!(status_of(&proxy, "GET", "/", b"").await, 200);
    assert_eq!(fpm.requests()[0].param("SCRIPT_FILENAME").as_deref(), Some("/releases/2/index.php"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_question_goes_where_it_is_told() {
    let fpm = RealFpm::builder("blue").workers(3).status_listen().start().await;
    let own = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let listen = fpm.status_address().unwrap();
    let set = format!("[upstream.php.set.blue]\nstatus_path = \"/status\"\nstatus_listen = \"{listen}\"");
    let text = toml(&own, "", "", "", "").replace("[upstream.php.set.blue]", &set);
    let proxy = Slackwater::start(&text).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    while proxy.status().await["upstreams"]["php"]["sets"]["blue"]["endpoints"][0]["capacity"] != 3 {
        assert!(Instant::now() < deadline, "{}", proxy.status().await);
    }
    assert!(own.requests().is_empty(), "the endpoint itself was asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ping_turns_an_endpoint_after_fall_and_rise() {
    let fpm = hello().await;
    let ping = "[upstream.php.set.blue]\nping = { path = \"/alive\", every = \"50ms\", fall = 3, rise = 2 }";
    let proxy = Slackwater::start(&toml(&fpm, "", "", "", "").replace("[upstream.php.set.blue]", ping)).await;
    let state = async || proxy.status().await["upstreams"]["php"]["sets"]["blue"]["endpoints"][0]["state"].clone();
    assert_eq!(state().await, "usable");
    let pings = || fpm.requests().iter().filter(|r| r.param("SCRIPT_NAME").as_deref() == Some("/alive")).count();
    let until = async |wanted: &str| {
        let before = pings();
        let deadline = Instant::now() + Duration::from_secs(20);
        while state().await != wanted {
            assert!(Instant::now() < deadline, "not {wanted}");
        }
        pings() - before
    };
    fpm.on("/alive", Behaviour::raw(""));
    let fell = until("unusable").await;
    fpm.on("/alive", Behaviour::hello("blue"));
    let rose = until("usable").await;
    println!("fell after {fell} pings, rose after {rose}");
    assert!(fell >= 2 && rose >= 1, "one ping alone turned it: {fell} {rose}");
}

/// 64 connections that read nothing would else be all there are, and the kubelet would kill the process.
#[tokio::test(flavor = "multi_thread")]
async fn one_peer_cannot_take_the_ops_port_from_the_others() {
    let fpm = hello().await;
    let proxy = Slackwater::start(&toml(&fpm, "", "", "", "")).await;
    let mut held = Vec::new();
    for _ in 0..80 {
        // From another address of loopback than the checks.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
        let mut stream = socket.connect(proxy.ops()).await.unwrap();
        let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n").await;
        held.push(stream);
    }
    for _ in 0..5 {
        let answer = tokio::time::timeout(Duration::from_secs(5), http::get(proxy.ops(), "/livez")).await;
        assert_eq!(answer.expect("the ops port answers").unwrap().status, 200);
    }
    drop(held);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_the_other_release_is_found_where_it_is_told_to_look() {
    let (blue, green) = (hello().await, ScriptedFpm::start(Behaviour::hello("green")).await);
    let folder = tempfile::tempdir().unwrap();
    // Two releases, whose assets carry a hash in their names as bundlers write them; one file is in both.
    for (release, hash, text) in [("blue", "1f3c", "old"), ("green", "9a0b", "new")] {
        let assets = folder.path().join(release).join("assets");
        std::fs::create_dir_all(&assets).unwrap();
        std::fs::write(assets.join(format!("app-{hash}.css")), text).unwrap();
        std::fs::write(assets.join("logo.svg"), text).unwrap();
        std::fs::write(assets.join("only.php"), text).unwrap();
        std::fs::create_dir(assets.join(text)).unwrap();
    }
    // Out of the other release, and within it.
    std::fs::write(folder.path().join("secret"), "secret").unwrap();
    let links = folder.path().join("green/assets");
    std::os::unix::fs::symlink(folder.path().join("secret"), links.join("out.css")).unwrap();
    std::os::unix::fs::symlink("app-9a0b.css", links.join("in.css")).unwrap();
    let text = |fallback: bool| {
        let set = |name: &str, fpm: &ScriptedFpm| {
            format!(
                "[upstream.php.set.{name}]\nroot = \"{}\"\nendpoints = [\"{}\"]\n",
                folder.path().join(name).display(),
                fpm.address()
            )
        };
        let sets = format!("{}{}[[site]]", set("blue", &blue), set("green", &green));
        toml(&blue, "", "", &format!("active = \"blue\"\nassets_fallback = {fallback}"), "")
            .replace(&format!("[upstream.php.set.blue]\n        endpoints = [\"{}\"]", blue.address()), "")
            .replace("[[site]]", &sets)
            + "[[site.route]]\npath = \"/assets/*\"\nfiles = \"or-404\"\n"
    };
    let proxy = Slackwater::start(&text(true)).await;
    let get = async |path: &str| {
        let answer = http::get(proxy.http(), path).await.unwrap();
        (answer.status, answer.text())
    };
    for (set, own) in [("blue", "old"), ("green", "new")] {
        if set == "green" {
            proxy.cli_ok(&["swap", "php", "green", "--wait"]).await;
        }
        assert_eq!(get("/assets/app-1f3c.css").await, (200, "old".to_owned()), "{set}");
        assert_eq!(get("/assets/app-9a0b.css").await, (200, "new".to_owned()), "{set}");
        assert_eq!(get("/assets/logo.svg").await, (200, own.to_owned()), "its own goes first");
        assert_eq!(get("/assets/app-0000.css").await.0, 404);
        assert_eq!(get("/assets/in.css").await, (200, "new".to_owned()));
        if set == "blue" {
            assert_ne!(get("/assets/out.css").await.1, "secret");
            // Only what is read.
            let posted = http::send(proxy.http(), "POST", "/assets/app-9a0b.css", &[], b"").await.unwrap();
            assert_eq!(posted.status, 404);
        }
        assert_eq!(get("/assets/only.php").await.0, 404, "no script runs, and none is sent");
        let other = if own == "old" { "new" } else { "old" };
        assert_eq!(get(&format!("/assets/{other}")).await.0, 404, "folders are not looked for elsewhere");
        assert_eq!(get("/page").await, (200, format!("{set} hello\n")));
    }
    proxy.rewrite(&text(false));
    proxy.cli_ok(&["reload"]).await;
    assert_eq!(get("/assets/app-1f3c.css").await.0, 404);
    assert_eq!(get("/assets/app-9a0b.css").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_a_site_are_looked_up_as_it_says() {
    let fpm = hello().await;
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("public");
    std::fs::create_dir_all(root.join("docs")).unwrap();
    std::fs::write(root.join("docs/start.htm"), "start").unwrap();
    std::fs::write(root.join("found.txt"), "found").unwrap();
    std::fs::write(folder.path().join("outside.txt"), "outside").unwrap();
    std::os::unix::fs::symlink(folder.path().join("outside.txt"), root.join("link.txt")).unwrap();
    let root = format!("root = \"{}\"\n", root.display());
    let start = async |site: &str| Slackwater::start(&toml(&fpm, "", "", "", &format!("{root}{site}"))).await;

    let proxy = start("index = [\"start.htm\"]").await;
    assert_eq!(http::get(proxy.http(), "/docs/").await.unwrap().text(), "start");
    assert_eq!(http::get(proxy.http(), "/link.txt").await.unwrap().text(), "outside");
    assert_eq!(http::get(proxy.http(), "/missing").await.unwrap().text(), "blue hello\n");
    let proxy = start("symlinks = \"within\"").await;
    assert_ne!(http::get(proxy.http(), "/link.txt").await.unwrap().text(), "outside");
    let proxy = start("front = \"\"").await;
    assert_eq!(status_of(&proxy, "GET", "/missing", b"").await, 404);
    let proxy = start("files = \"or-404\"").await;
    assert_eq!(status_of(&proxy, "GET", "/missing", b"").await, 404);
    let proxy = start("try_files = [\"$uri.txt\", \"=410\"]").await;
    assert_eq!(http::get(proxy.http(), "/found").await.unwrap().text(), "found");
    assert_eq!(status_of(&proxy, "GET", "/missing", b"").await, 410);
}

#[tokio::test(flavor = "multi_thread")]
async fn sites_and_routes_do_as_they_are_told() {
    let (fpm, other) = (hello().await, ScriptedFpm::start(Behaviour::hello("other")).await);
    let site = format!(
        r#"
        hosts = ["a.example"]
        scripts = ["/index.php", "/whole.php", "/one.php"]
        script = "/whole.php"
        read_timeout = "250ms"
        params = {{ PLACE = "site" }}
        access_log = "off"

        [[site.route]]
        path = "/one/*"
        when = {{ method = ["GET", "POST"] }}
        script = "/one.php"
        body_limit = "10B"
        params = {{ PLACE = "route" }}
        access_log = "on"
        read_timeout = "20s"

        [[site.route]]
        path = "/other"
        upstream = "other"

        [[site.route]]
        path = "/tried"
        script = ""
        try_files = ["/index.php"]

        [upstream.other.set.only]
        endpoints = ["{}"]
        "#,
        other.address()
    );
    let proxy = Slackwater::start(&toml(&fpm, "", "", "", &site)).await;
    let ask = async |method: &str, path: &str, body: &[u8]| {
        http::send(proxy.http(), method, path, &[("Host", "a.example")], body).await.unwrap()
    };
    let last = || {
        let received = fpm.requests().pop().unwrap();
        (received.param("SCRIPT_NAME").unwrap(), received.param("PLACE").unwrap())
    };
    assert_eq!(http::send(proxy.http(), "GET", "/", &[("Host", "b.example")], b"").await.unwrap().status, 421);
    ask("GET", "/anything", b"").await;
    assert_eq!(last(), ("/whole.php".into(), "site".into()));
    ask("GET", "/one/x", b"").await;
    assert_eq!(last(), ("/one.php".into(), "route".into()));
    // `when`: another method is not the route's.
    ask("PUT", "/one/x", b"").await;
    assert_eq!(last(), ("/whole.php".into(), "site".into()));
    assert_eq!(ask("POST", "/one/x", b"more than ten bytes").await.status, 413);
    assert_eq!(ask("GET", "/other", b"").await.text(), "other hello\n");
    ask("GET", "/tried", b"").await;
    assert_eq!(last().0, "/index.php");
    proxy.wait_for_log("\"path\":\"/one/x\"", Duration::from_secs(20)).await;
    assert!(!proxy.log_text().contains("\"path\":\"/anything\""), "access_log = \"off\"");
    // The site's read_timeout is short, the route's is not.
    let gate = Gate::closed();
    fpm.set(Behaviour::hello("blue").holds_answer(&gate));
    assert_eq!(ask("POST", "/anything", b"").await.status, 504);
    let address = proxy.http();
    let slow = tokio::spawn(async move { http::send(address, "GET", "/one/slow", &[("Host", "a.example")], b"").await });
    gate.wait_reached(2).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    gate.open();
    assert_eq!(slow.await.unwrap().unwrap().status, 200);
}
