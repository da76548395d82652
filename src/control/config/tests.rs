use std::time::Duration;

use proptest::prelude::*;

use super::{keys::KEYS, *};
use crate::{
    control::expand::expand,
    model::{
        Address, Route,
        settings::{AccessFormat, ReloadMode},
        site::{Files, Pattern, PhpRoot, Symlinks},
        upstream::{Balance, LeasePolicy, QueuePolicy},
    },
};

const UPSTREAM: &str = "upstream.php.set.blue.endpoints = [\"127.0.0.1:9000\"]\n";
const SITE: &str = "[[site]]\nroot = \"/r\"\nupstream = \"php\"\n";

fn env(name: &str) -> Option<String> {
    match name {
        "PORT" => Some("8081".into()),
        "BREAK" => Some("x\ny".into()),
        _ => None,
    }
}

fn no_include(pattern: &str) -> Result<Vec<Source>, String> {
    Err(format!("{pattern}: no such file"))
}

fn try_parse(text: &str) -> Result<Config, Vec<Problem>> {
    parse(Source { file: "s.toml".into(), text: text.into() }, &mut no_include, &env)
}

#[track_caller]
fn good(text: &str) -> Config {
    try_parse(text).unwrap_or_else(|all| panic!("{text}\n{}", shown(&all)))
}

fn shown(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

/// Everything wrong with a text, without the file's name.
#[track_caller]
fn wrong(text: &str) -> String {
    match try_parse(text) {
        Ok(_) => panic!("taken: {text}"),
        Err(all) => shown(&all).replace("s.toml:", ""),
    }
}

/// The line before what makes a whole configuration, so that it is line 1.
fn top(line: &str) -> String {
    format!("{line}\n{UPSTREAM}{SITE}")
}

/// Lines within the only site: they begin at line 5.
fn site(lines: &str) -> String {
    format!("{UPSTREAM}{SITE}{lines}\n")
}

fn only(config: &Config) -> &Arc<Site> {
    config.all_sites()[0]
}

#[test]
fn each_error_of_the_process_wide_tables_has_its_place_and_says_what_is_right() {
    for (line, expected) in [
        ("workers = 0", "1:11: `workers`: 0 is out of range\n  help: write a number of at least 1, or \"auto\""),
        ("workers = 9999", "1:11: `workers`: 9999 is out of range\n  help: write a number from 1 to 1024"),
        ("workers = -1", "1:11: `workers`: -1 is out of range\n  help: write a number from 1 to 1024"),
        (
            "workers = 99999999999999999999",
            "1:11: `workers`: 99999999999999999999 is out of range\n  help: write a number from 1 to 1024",
        ),
        ("workers = \"4\"", "1:11: `workers` is a string, not a number\n  help: write 4, without quotes"),
        ("workers = \"fast\"", "1:11: `workers`: \"fast\" is not known\n  help: write a whole number, or \"auto\""),
        ("workers = 1.5", "1:11: `workers` is a number with a fraction, not a whole number"),
        ("wrokers = 4", "1:1: unknown key `wrokers` at the top of the file\n  help: did you mean `workers`?"),
        (
            "idle_timeout = \"3s\"",
            "1:1: unknown key `idle_timeout` at the top of the file\n  help: `idle_timeout` belongs in [listen]",
        ),
        (
            "listen.workers = 4",
            "1:8: unknown key `workers` in `listen`\n  help: `workers` belongs at the top of the file, before the first [table]",
        ),
        ("listen.speed = 4", "1:8: unknown key `speed` in `listen`"),
        ("reload = \"wach\"", "1:10: `reload`: \"wach\" is not known\n  help: write \"signal\" or \"watch\""),
        ("listen = 1", "1:10: `listen` is a number, not a table"),
        ("upstreem = {}", "1:1: unknown key `upstreem` at the top of the file\n  help: did you mean `upstream`?"),
        (
            "include = [\"x.toml\"]",
            "1:12: `include`: x.toml: no such file\n  help: patterns are relative to this file; * does not cross a slash",
        ),
        (
            "listen.http = []",
            "1:15: without an address nothing is served\n  help: write http = [\"0.0.0.0:8080\"], or an address in https",
        ),
        ("listen.http = \"0.0.0.0:80\"", "1:15: `listen.http` is a string, not a list\n  help: write [\"0.0.0.0:80\"]"),
        ("listen.http = [\":80\"]", "1:16: `listen.http`: \":80\" is not an address to listen on\n  help: write \"0.0.0.0:80\""),
        (
            "listen.http = [\"a\", \"0.0.0.0:80\", \"127.0.0.1:80\"]",
            "1:16: `listen.http`: \"a\" is not an address to listen on\n  help: write an address and a port, as in \"0.0.0.0:8080\" or \"[::]:8080\"\n1:35: `listen.http`: \"127.0.0.1:80\" is taken already\n  help: `listen.http` has \"0.0.0.0:80\" at 1:21",
        ),
        (
            "listen = { http = [\"[::]:80\"], ops = \"[::]:80\" }",
            "1:38: `listen.ops`: \"[::]:80\" is taken already\n  help: `listen.http` has \"[::]:80\" at 1:20",
        ),
        ("listen.ops = \"\"", "1:14: `listen.ops`: is empty\n  help: write \"off\" for none"),
        (
            "listen.ops_allow = [\"ten\"]",
            "1:21: `listen.ops_allow`: \"ten\" is not a network\n  help: write \"10.0.0.0/8\", \"fd00::/8\" or a single address",
        ),
        ("listen.admin = \"\"", "1:16: `listen.admin` is empty"),
        ("listen.admin = \"unix:/a\"", "1:16: `listen.admin`: is always a unix socket\n  help: write \"/a\""),
        (
            "listen.health_path = \"healthz\"",
            "1:22: `listen.health_path`: \"healthz\" does not begin with a slash\n  help: write \"/healthz\"",
        ),
        (
            "listen.health_path = \"/h?x\"",
            "1:22: `listen.health_path`: \"/h?x\" is more than a path\n  help: write the path alone, without query, fragment or line break",
        ),
        (
            "listen.idle_timeout = \"75\"",
            "1:23: `listen.idle_timeout`: \"75\" has no unit\n  help: write \"75s\", if seconds are meant",
        ),
        (
            "listen.idle_timeout = 75",
            "1:23: `listen.idle_timeout`: a duration needs a unit\n  help: write \"75s\", if seconds are meant",
        ),
        (
            "listen.idle_timeout = true",
            "1:23: `listen.idle_timeout` is a boolean, not a duration\n  help: write a whole number and ms, s, m, h or d, as in \"30s\"",
        ),
        (
            "listen.idle_timeout = \"soon\"",
            "1:23: `listen.idle_timeout`: \"soon\" is not a duration\n  help: write a whole number and ms, s, m, h or d, as in \"30s\"",
        ),
        (
            "listen.idle_timeout = \"0s\"",
            "1:23: `listen.idle_timeout`: zero is no time at all\n  help: write a duration longer than zero, as in \"30s\"",
        ),
        ("listen.idle_timeout = \"9999d\"", "1:23: `listen.idle_timeout`: \"9999d\" is too long\n  help: the longest is \"365d\""),
        (
            "listen.max_uri_bytes = 16384",
            "1:24: `listen.max_uri_bytes`: a size needs a unit\n  help: write \"16KiB\", if bytes are meant",
        ),
        (
            "listen.max_uri_bytes = \"16384\"",
            "1:24: `listen.max_uri_bytes`: \"16384\" has no unit\n  help: write \"16KiB\", if bytes are meant",
        ),
        ("listen.max_uri_bytes = \"16kb\"", "1:24: `listen.max_uri_bytes`: \"16kb\" is not a size\n  help: write \"16KiB\""),
        (
            "listen.max_uri_bytes = \"much\"",
            "1:24: `listen.max_uri_bytes`: \"much\" is not a size\n  help: write a whole number and B, KiB, MiB, GiB or TiB, as in \"8MiB\"",
        ),
        (
            "listen.max_header_bytes = \"4KiB\"",
            "1:27: `listen.max_header_bytes`: \"4KiB\" is out of range\n  help: write a size between \"8KiB\" and \"16MiB\"",
        ),
        (
            "listen.max_connections = 0",
            "1:26: `listen.max_connections`: 0 is out of range\n  help: write a number of at least 1, or \"auto\"",
        ),
        (
            "listen.max_connections_per_address = \"unlimted\"",
            "1:38: `listen.max_connections_per_address`: \"unlimted\" is not known\n  help: write a whole number, or \"unlimited\"",
        ),
        (
            "buffer.dir = \"tmp\"",
            "1:14: `buffer.dir`: \"tmp\" is not an absolute path\n  help: write the whole path, beginning with a slash",
        ),
        (
            "buffer = { memory = \"2MiB\", total = \"1MiB\" }",
            "1:37: `buffer.memory` of one body (2MiB) is above `buffer.total` of all (1MiB)\n  help: raise `total`, or lower `memory`",
        ),
        ("log.format = \"xml\"", "1:14: `log.format`: \"xml\" is not known\n  help: write \"auto\" or \"text\" or \"json\""),
        (
            "log.level = \"inof\"",
            "1:13: `log.level`: \"inof\" is not a level\n  help: write error, warn, info, debug, trace or off, or by module: \"info,slackwater::upstream=debug\"",
        ),
        (
            "log.access = \"common\"",
            "1:14: `log.access`: \"common\" is not known\n  help: write \"json\", \"combined\", \"off\", or the text of a log_format: '$remote_addr \"$request\" $status'",
        ),
        (
            "log.access_file = \"log\"",
            "1:19: `log.access_file`: \"log\" is not known\n  help: write \"stdout\", \"stderr\" or an absolute path",
        ),
        (
            "drain.grace = \"0s\"",
            "1:15: `drain.grace`: zero is no time at all\n  help: write a duration longer than zero, as in \"30s\"",
        ),
        (
            "drain = { grace = \"11s\", lame_duck = \"10s\" }",
            "1:38: `drain.lame_duck` (10s) and `drain.margin` (2s) together are longer than `drain.grace` (11s)\n  help: raise grace with the pod's terminationGracePeriodSeconds, or shorten lame_duck",
        ),
    ] {
        assert_eq!(wrong(&top(line)), expected, "{line}");
    }
}

#[test]
fn each_error_of_upstreams_has_its_place_and_says_what_is_right() {
    for (line, expected) in [
        ("upstream.php.retries = \"2\"", "1:24: `upstream.php.retries` is a string, not a number\n  help: write 2, without quotes"),
        ("upstream.php.actve = \"blue\"", "1:14: unknown key `actve` in `upstream.php`\n  help: did you mean `active`?"),
        (
            "upstream.php.active = \"bleu\"",
            "1:23: `upstream.php.active`: upstream `php` has no set \"bleu\"\n  help: did you mean \"blue\"?",
        ),
        (
            "upstream.php.active = \"green\"",
            "1:23: `upstream.php.active`: upstream `php` has no set \"green\"\n  help: write \"blue\"",
        ),
        (
            "upstream.php.keepalive = \"on\"",
            "1:26: `upstream.php.keepalive`: \"on\" is not known\n  help: write \"lease\" or \"off\"",
        ),
        ("upstream.php.lease = \"off\"", "1:22: `upstream.php.lease` is a string, not a table"),
        (
            "upstream.php.lease = { requests = 0 }",
            "1:35: `upstream.php.lease.requests`: 0 is out of range\n  help: write a number from 1 to 4294967295",
        ),
        ("upstream.php.lease = { agee = \"1s\" }", "1:24: unknown key `agee` in `upstream.php.lease`\n  help: did you mean `age`?"),
        (
            "upstream.php.workers_per_endpoint = 0",
            "1:37: `upstream.php.workers_per_endpoint`: 0 is out of range\n  help: write a number of at least 1, or \"auto\"",
        ),
        (
            "upstream.php.connect_timeout = \"0ms\"",
            "1:32: `upstream.php.connect_timeout`: zero is no time at all\n  help: write a duration longer than zero, as in \"30s\"",
        ),
        (
            "upstream.php.balance = \"random\"",
            "1:24: `upstream.php.balance`: \"random\" is not known\n  help: write \"least-busy\", \"round-robin\", \"hash:$remote_addr\" or \"hash:$cookie_NAME\"",
        ),
        (
            "upstream.php.balance = \"hash:$cookie_\"",
            "1:24: `upstream.php.balance`: the cookie has no name\n  help: write \"least-busy\", \"round-robin\", \"hash:$remote_addr\" or \"hash:$cookie_NAME\"",
        ),
        (
            "upstream.php.queue = { max = 0 }",
            "1:30: `upstream.php.queue.max`: 0 is out of range\n  help: write a number of at least 1, or \"off\"",
        ),
        (
            "upstream.php.queue.timeout = \"0s\"",
            "1:30: `upstream.php.queue.timeout`: zero is no time at all\n  help: write a duration longer than zero, as in \"30s\"",
        ),
        (
            "upstream.php.slow_start = 10",
            "1:27: `upstream.php.slow_start`: a duration needs a unit\n  help: write \"10s\", if seconds are meant",
        ),
        (
            "upstream.php.lane.slow.limit = 50",
            "1:32: `upstream.php.lane.slow.limit`: a share is in percent\n  help: write \"50%\", if percent are meant",
        ),
        (
            "upstream.php.lane.slow.limit = \"101%\"",
            "1:32: `upstream.php.lane.slow.limit`: \"101%\" is not a share\n  help: write a whole number from \"0%\" to \"100%\"",
        ),
        (
            "upstream.php.lane.slow.limit = \"0%\"",
            "1:32: lane `slow` of upstream `php` has a limit of nothing\n  help: write at least limit = \"1%\"; a lane always has one worker",
        ),
        (
            "upstream.php.lane.buy = { reserve = \"30%\", limit = \"20%\" }",
            "1:52: lane `buy` of upstream `php` has a reserve of 30% and a limit of 20%\n  help: a lane never has more than its limit: reserve at most as much",
        ),
        (
            "upstream.php.lane = { a = { reserve = \"60%\" }, b = { reserve = \"50%\" } }",
            "1:21: the lanes of upstream `php` reserve 110% of its workers\n  help: reserve at most \"100%\" in all",
        ),
        ("upstream.php.lane.slow.priority = \"high\"", "1:35: `upstream.php.lane.slow.priority` is a string, not a whole number"),
        (
            "upstream.php.set.green = {}",
            "1:10: upstream `php` has 2 sets, and nothing says which is active\n  help: write active = \"green\" or \"blue\"",
        ),
        (
            "upstream.new = {}",
            "1:10: upstream `new` has no set\n  help: add [upstream.new.set.blue] with endpoints = [\"127.0.0.1:9000\"]",
        ),
        ("upstream.new = 1", "1:16: `upstream.new` is a number, not a table"),
        (
            "upstream.\"a b\".set.x = {}",
            "1:10: `upstream.a b`: \"a b\" is not a name\n  help: a name is of letters, digits, `-` and `_`",
        ),
        (
            "upstream.php.set.blue.ping = \"ping\"",
            "1:30: `upstream.php.set.blue.ping`: \"ping\" does not begin with a slash\n  help: write \"/ping\"",
        ),
        (
            "upstream.php.set.blue.ping = { every = \"1s\" }",
            "1:30: `upstream.php.set.blue.ping`: `path` is missing\n  help: write { path = \"/ping\" }, FPM's ping.path",
        ),
        (
            "upstream.php.set.blue.ping = 1",
            "1:30: `upstream.php.set.blue.ping` is a number, neither a path nor a table\n  help: write \"/ping\" or { path = \"/ping\", every = \"2s\", fall = 2, rise = 2 }",
        ),
        (
            "upstream.php.set.blue.status_listen = \"127.0.0.1:9001\"",
            "1:39: set `blue` of upstream `php` has status_listen, but no status_path to ask for there\n  help: add status_path = \"/status\", FPM's pm.status_path",
        ),
        (
            "upstream.php.set.blue.preflight = \"/\"",
            "1:35: `upstream.php.set.blue.preflight` is a string, not a table\n  help: write { path = \"/index.php\" }; host, https, requests, expect, timeout and give_up have defaults",
        ),
        (
            "upstream.php.set.blue.preflight = { host = \"a\" }",
            "1:35: `upstream.php.set.blue.preflight`: `path` is missing\n  help: write { path = \"/index.php\" }; host, https, requests, expect, timeout and give_up have defaults",
        ),
        (
            "upstream.php.set.blue.preflight = { path = \"/a b\" }",
            "1:44: `upstream.php.set.blue.preflight.path`: \"/a b\" cannot be asked for\n  help: write path and query as a browser sends them, percent-encoded",
        ),
        (
            "upstream.php.set.blue.preflight = { path = \"/\", expect = \"399-200\" }",
            "1:58: `upstream.php.set.blue.preflight.expect`: \"399-200\" is no range of status codes\n  help: write \"200-399\", or one code as \"200\"",
        ),
        (
            "upstream.php.set.blue.preflight = { path = \"/\", https = 1 }",
            "1:57: `upstream.php.set.blue.preflight.https` is a number, not a boolean\n  help: write true or false",
        ),
        (
            "upstream.php.set.blue.min_ready = -1",
            "1:35: `upstream.php.set.blue.min_ready`: -1 is out of range\n  help: write a number from 0 to 1000000",
        ),
        (
            "upstream.php.set.blue.php_root = \"srv\"",
            "1:34: `upstream.php.set.blue.php_root`: \"srv\" is not an absolute path\n  help: write the whole path, beginning with a slash",
        ),
        (
            "upstream.o.set.a.endpoints = [\"php:9000\"]",
            "1:31: `upstream.o.set.a.endpoints`: `php:9000` is not an address; write \"10.0.0.1:9000\", \"[::1]:9000\" or \"unix:/run/php/php-fpm.sock\"",
        ),
        (
            "upstream.o.set.a.endpoints = [\"1.1.1.1:0\"]",
            "1:31: `upstream.o.set.a.endpoints`: \"1.1.1.1:0\" has no port\n  help: write FPM's, often 9000",
        ),
        (
            "upstream.o.set.a.endpoints = [\"[::1]:1\", \"[0::1]:1\"]",
            "1:42: `upstream.o.set.a.endpoints`: \"[::1]:1\" is twice in this set\n  help: it stands at 1:31 already; name an endpoint once",
        ),
    ] {
        assert_eq!(wrong(&top(line)), expected, "{line}");
    }
}

#[test]
fn each_error_of_kubernetes_has_its_place_and_says_what_is_right() {
    let set = |rest: &str| format!("[kubernetes]\n[upstream.php.set.blue]\n{rest}\n[[site]]\nroot = \"/r\"\nupstream = \"php\"\n");
    for (text, want) in [
        (set("kubernetes = 1"), "3:14: `upstream.php.set.blue.kubernetes` is a number, not a table"),
        (set("kubernetes = { service = \"php\" }"), "`port` is missing"),
        (set("kubernetes = { port = 1 }"), "`service` is missing"),
        (set("kubernetes = { service = \"PHP\", port = 1 }"), "\"PHP\" is not a name of Kubernetes"),
        (set("kubernetes = { service = \"php\", port = \"9000\" }"), "write port = 9000"),
        (set("kubernetes = { service = \"php\", port = 0 }"), "3:40: `upstream.php.set.blue.kubernetes.port`: 0 is out of range"),
        (set("endpoints = [\"1.2.3.4:1\"]\nkubernetes = { service = \"php\", port = 1 }"), "has `endpoints` and `kubernetes`"),
        (set("kubernetes = { service = \"php\", port = 1 }").replace("[kubernetes]\n", ""), "add [kubernetes]"),
        (set("").replace("[kubernetes]\n", "upstream.php.active_from = \"service/php\"\n"), "add [kubernetes]"),
        ("upstream.php.active_from = \"php\"\n".to_owned() + &set(""), "write \"service/NAME\""),
        ("upstream.php.active_from = \"service/\"\n".to_owned() + &set(""), "\"\" is not a name of Kubernetes"),
        ("kubernetes.namespace = \"a b\"\n".to_owned() + &set("").replace("[kubernetes]\n", ""), "1:24: `kubernetes.namespace`"),
    ] {
        let wrong = wrong(&text);
        assert!(wrong.contains(want), "{text}\n{wrong}");
    }
    let config = good(&set("kubernetes = { service = \"php-blue\", port = \"fpm\" }"));
    assert_eq!(config.settings.kubernetes.as_ref().unwrap().namespace, "default");
}

#[test]
fn each_error_of_sites_and_routes_has_its_place_and_says_what_is_right() {
    let route = |lines: &str| format!("[[site.route]]\npath = \"/x\"\n{lines}");
    for (lines, expected) in [
        ("hosts = [\"a\", \"A.\"]".to_owned(), "5:15: `site.hosts`: the host \"a\" is taken already\n  help: it stands at 5:10; a host belongs to one site".to_owned()),
        ("hosts = [\"a:80\"]".into(), "5:10: `site.hosts`: \"a:80\" is not a host\n  help: write \"a\": a host matches on every port".into()),
        ("hosts = [\"*\"]".into(), "5:10: `site.hosts`: \"*\" is not a host\n  help: leave `hosts` empty for the default site, which takes all other hosts".into()),
        ("hosts = [\"https://a/\"]".into(), "5:10: `site.hosts`: \"https://a/\" is not a host\n  help: write the host alone, as in \"example.com\"".into()),
        ("hosts = [\"a.*\"]".into(), "5:10: `site.hosts`: \"a.*\" is not a host\n  help: a * stands only for what is before the first dot: \"*.example.com\"".into()),
        ("hosts = [\"::1\"]".into(), "5:10: `site.hosts`: \"::1\" is not a host\n  help: write \"[::1]\", in brackets".into()),
        ("hosts = [\"a..b\"]".into(), "5:10: `site.hosts`: \"a..b\" is not a host\n  help: a host is of letters, digits, dots and `-`".into()),
        ("[[site]]\nroot = \"/b\"".into(), "5:1: a second site without `hosts`: only one can be the default\n  help: the other is at 2:1; give one of them hosts = [\"example.com\"]".into()),
        ("[[site]]\nhosts = [\"b\"]\nupstream = \"pph\"".into(), "7:12: `site.upstream`: there is no upstream \"pph\"\n  help: did you mean \"php\"?".into()),
        ("[[site]]\nhosts = [\"b\"]\nupstream = \"node\"".into(), "7:12: `site.upstream`: there is no upstream \"node\"\n  help: add [upstream.node.set.blue] with its endpoints".into()),
        ("[[site]]\nhosts = [\"b\"]\nroot = \"public\"".into(), "7:8: `site.root`: \"public\" is not an absolute path\n  help: write the whole path, beginning with a slash".into()),
        ("[[site]]\nhosts = [\"b\"]\nupstream = \"php\"".into(), "7:12: site `b`: nothing says where upstream `php` finds its scripts\n  help: write `root`, or `php_root` where the files are only on FPM's side".into()),
        ("index = [\"a/b\"]".into(), "5:10: `site.index`: \"a/b\" is not a file's name\n  help: write a name without a slash, as in \"index.html\"".into()),
        ("scripts = [\"index.php\"]".into(), "5:12: `site.scripts`: \"index.php\" does not begin with a slash\n  help: write \"/index.php\"".into()),
        ("scripts = [\"/a/\"]".into(), "5:12: `site.scripts`: \"/a/\" is a folder\n  help: write \"/a/*.php\" for the scripts in it".into()),
        ("scripts = [\"/app.php\"]".into(), "5:11: `site.front` is \"/index.php\" (its default), which `scripts` does not declare\n  help: write front = \"/app.php\", or add \"/index.php\" to `scripts`".into()),
        ("front = \"/app.php\"".into(), "5:9: `site.front` is \"/app.php\", which `scripts` does not declare\n  help: write front = \"/index.php\", or add \"/app.php\" to `scripts`".into()),
        ("symlinks = \"no\"".into(), "5:12: `site.symlinks`: \"no\" is not known\n  help: write \"follow\", \"within\" or a list of folders".into()),
        ("symlinks = []".into(), "5:12: `site.symlinks`: the list is empty\n  help: write \"within\" for links that stay in the root".into()),
        ("body_limit = 8".into(), "5:14: `site.body_limit`: a size needs a unit\n  help: write \"8B\", if bytes are meant".into()),
        ("params = { A = 1 }".into(), "5:16: `site.params.A` is a number, not a string\n  help: write \"1\", in quotes".into()),
        ("params = { \"b c\" = \"\" }".into(), "5:12: `site.params`: \"b c\" is not a parameter's name\n  help: a parameter's name is of letters, digits and `_`, as in APP_ENV".into()),
        ("params = { HTTP_PROXY = \"\" }".into(), "5:12: `site.params`: HTTP_PROXY cannot be set\n  help: it follows from the request and from `root`, `php_root` and `script`".into()),
        ("script = \"/*.php\"".into(), "5:10: `site.script`: \"/*.php\" is a pattern\n  help: write the path of one script".into()),
        ("front = \"\"\ntry_files = [\"$uri\", \"/a.php\"]".into(), "6:13: `try_files` ends in \"/a.php\", which `scripts` does not declare\n  help: add \"/a.php\" to the site's `scripts`".into()),
        ("path = \"/x\"".into(), "5:1: unknown key `path` in `site`\n  help: `path` belongs in `ping = { … }` or in `preflight = { … }` or in [[site.route]]".into()),
        ("[site.route]\npath = \"/x\"".into(), "5:7: `site.route` is a single table\n  help: write [[site.route]], in double brackets: there can be several".into()),
        ("[[site.route]]\nfiles = \"or-404\"".into(), "5:1: a route without `path`\n  help: write path = \"/exact\", \"/prefix/*\" or '~expression'".into()),
        ("[[site.route]]\npath = \"~a(\"".into(), "6:8: `site.route.path`: \"~a(\" is not an expression: unclosed group, at its character 2\n  help: expressions are those of Rust's regex crate: no look-around, no back-references".into()),
        ("[[site.route]]\npath = '~*\\.php$'".into(), "6:8: `site.route.path`: \"~*\\\\.php$\" is not an expression: repetition operator missing expression, at its character 1\n  help: for a match in either case write '~(?i)\\.php$'".into()),
        ("[[site.route]]\npath = \"*.css\"".into(), "6:8: `site.route.path`: \"*.css\" does not begin with a slash\n  help: for an ending write '~\\.css$'".into()),
        ("[[site.route]]\npath = \"/a*/b\"".into(), "6:8: `site.route.path`: \"/a*/b\" has a * before its end\n  help: only a closing * is a prefix; write '~^/a[^/]*/b$'".into()),
        (route("fils = 1"), "7:1: unknown key `fils` in `site.route`\n  help: did you mean `files`?".into()),
        (route("files = \"or-403\""), "7:9: `site.route.files`: \"or-403\" is not known\n  help: write \"or-front\" or \"or-404\"".into()),
        (route("access_log = false"), "7:14: `site.route.access_log` is a boolean, not a word\n  help: write \"on\" or \"off\"".into()),
        (route("read_timeout = \"0s\""), "7:16: `site.route.read_timeout`: zero is no time at all\n  help: write a duration longer than zero, as in \"30s\"".into()),
        (route("when = { method = [\"get\"] }"), "7:20: `site.route.when.method`: \"get\" is not in capitals\n  help: write \"GET\"".into()),
        (route("when = { method = \"GET\" }"), "7:19: `site.route.when.method` is a string, not a list\n  help: write [\"GET\"]".into()),
        (route("when = { methods = [] }"), "7:10: unknown key `methods` in `site.route.when`\n  help: did you mean `method`?".into()),
        (route("lane = \"buy\""), "7:8: upstream `php` has no lane \"buy\"\n  help: add [upstream.php.lane.buy], or lane = \"\" here".into()),
        (route("upstream = \"\"\nlane = \"buy\""), "8:8: lane \"buy\", and no upstream that could have it\n  help: write `upstream` before it, or leave the lane out".into()),
        (route("rewrite = \"new\""), "7:11: `site.route.rewrite`: \"new\" does not begin with a slash\n  help: write the new path, as in \"/new/$1\"; to another host leads `redirect`".into()),
        (route("error_page = { \"200\" = \"/x\" }"), "7:16: `site.route.error_page`: \"200\" is no status of an error\n  help: write \"404\", or a range as \"502-504\", from 400 to 599".into()),
        (route("error_page = { \"404\" = \"x\" }"), "7:24: `site.route.error_page.404`: \"x\" is no page\n  help: write the path of a page of this site, or a URL for a redirect".into()),
        (route("basic_auth = { realm = \"a\" }"), "7:14: `site.route.basic_auth`: `file` is missing\n  help: write { realm = \"members\", file = \"/etc/htpasswd\" }, or \"off\"".into()),
        (route("rewrite = \"/a\"\nallow = [\"10.0.0.0/8\"]"), "8:9: `allow` on a route with `rewrite` guards nothing\n  help: write it on the route that the path leads to".into()),
        (route("limit = { rate = \"10/s\" }"), "7:9: `site.route.limit`: `by` is missing\n  help: write { by = \"$remote_addr\", rate = \"10/s\", burst = 20, concurrent = 5 }".into()),
        (route("limit = { by = \"$remote_addr\" }"), "7:9: `site.route.limit`: limits nothing\n  help: write { by = \"$remote_addr\", rate = \"10/s\", burst = 20, concurrent = 5 }".into()),
        (route("limit = { by = \"x\", rate = \"10 a second\" }"), "7:28: `site.route.limit.rate`: \"10 a second\" is no rate\n  help: write \"10/s\", \"100/m\" or \"1000/h\"".into()),
        (route("redirect = { status = 301 }"), "7:12: `site.route.redirect`: `to` is missing\n  help: write { to = \"https://$host$request_uri\", status = 301 }".into()),
        (route("redirect = { to = \"/\", status = 300 }"), "7:33: `site.route.redirect.status`: 300 is no redirect\n  help: write 301, 302, 303, 307 or 308".into()),
        (route("redirect = { to = \"/$hots\" }"), "7:19: `site.route.redirect.to`: there is no variable $hots\n  help: did you mean $host?".into()),
        (route("redirect = { to = \"/$1\" }"), "7:19: `site.route.redirect.to`: $1, and the path has no group of that number\n  help: groups are those of the route's own path, written as '~^/old/(.*)$'".into()),
        (route("redirect = { to = \"/${uri\" }"), "7:19: `site.route.redirect.to`: ${ without its }\n  help: write ${name}".into()),
        (route("redirect = { to = \"/\" }\nrespond = {}"), "8:11: a route cannot have `redirect` and `respond`\n  help: keep one of them".into()),
        (route("headers = { set = { \"X A\" = \"1\" } }"), "7:29: `site.route.headers.set.X A`: \"X A\" cannot be a header's name\n  help: a name is of letters, digits and `-`".into()),
        (route("headers = { remove = [\"Content-Length\"] }"), "7:23: `site.route.headers.remove`: content-length belongs to the message itself\n  help: it follows from the body and the connection".into()),
        (route("headers = { set = { A = \"1\\n2\" } }"), "7:25: `site.route.headers.set.A`: has a line break or another control character\n  help: write it in one line".into()),
        ("[[site.route]]\npath = '~ \\.css$'".into(), "6:8: `site.route.path`: \"~ \\\\.css$\" has a space behind its ~, which belongs to the expression\n  help: write '~\\.css$'".into()),
        ("[[site.route]]\npath = '~/\\.css$/i'".into(), "6:8: `site.route.path`: \"~/\\\\.css$/i\" is written between slashes\n  help: write '~(?i)\\.css$'".into()),
        ("[[site.route]]\npath = \"^~ /x/\"".into(), "6:8: `site.route.path`: \"^~ /x/\" does not begin with a slash\n  help: write \"/x/*\", and before it in the file what is to go first".into()),
        ("location = 1".into(), "5:1: unknown key `location` in `site`\n  help: Nginx's `location` is [[site.route]] with `path`".into()),
        ("scripts = ['~\\.php$']".into(), "5:12: `site.scripts`: scripts are no expressions\n  help: write exact paths, or \"/*.php\" for those of one folder".into()),
        (route("try_files = \"$uri /index.php\""), "7:13: `site.route.try_files`: \"$uri /index.php\" is a string, not a list\n  help: write [\"$uri\", \"/index.php\"]".into()),
        (route("try_files = [\"$request_filename\", \"404\"]"), "7:14: `site.route.try_files`: \"$request_filename\" does not begin with $uri or a slash\n  help: write \"$uri\": files are looked for below `root`\n7:35: `site.route.try_files`: \"404\" does not begin with $uri or a slash\n  help: write \"=404\" for that status".into()),
        (route("try_files = [\"/a/$2\", \"=404\"]"), "7:14: `site.route.try_files`: \"/a/$2\" has $2, and the path has no group of that number\n  help: groups are those of the route's own path, written as '~^/old/(.*)$'".into()),
        (route("maintenance = { page = \"/m.php\" }"), "7:24: `site.route.maintenance.page`: \"/m.php\" is a script\n  help: write the path of a static file: PHP is not asked in a maintenance".into()),
        (route("expires = \"30d for_ever\""), "7:11: `site.route.expires`: \"for_ever\" is not known\n  help: write \"30d\", or \"30d public immutable\"".into()),
        (route("cors = {}"), "7:8: `site.route.cors`: `origins` is missing or empty\n  help: write { origins = [\"https://app.example.com\"] }, or \"off\"".into()),
        (route("cors = { origins = [\"app.example.com\"] }"), "7:21: `site.route.cors.origins`: \"app.example.com\" is no origin\n  help: write it with its scheme, as in \"https://app.example.com\", or \"*\" for any".into()),
        (route("cors = { origins = [\"https://a.example/\", \"https://b.example:443\", \"https://c.example\"] }"), "7:21: `site.route.cors.origins`: \"https://a.example/\" is no origin\n  help: write scheme, host and port alone: no path, no wildcard\n7:43: `site.route.cors.origins`: \"https://b.example:443\" is no origin\n  help: browsers leave out the scheme's own port".into()),
        (route("cors = { origins = [\"*\"], credentials = true }"), "7:20: `origins` is \"*\", which browsers refuse with `credentials`\n  help: name them one by one, or leave out `credentials`".into()),
        (route("cors = { origins = [\"*\"], methods = [\"get\"], headers = [\"*\", \"A\"] }"), "7:38: `site.route.cors.methods`: \"get\" is not a method\n  help: write \"GET\", \"PUT\" or another of HTTP's methods in capitals\n7:56: `headers` has \"*\" beside others\n  help: \"*\" stands alone".into()),
        (route("compress = \"on\""), "7:12: `site.route.compress`: \"on\" is not known\n  help: write [\"br\", \"zstd\", \"gzip\"], { codings = [\"gzip\"], min = \"1KiB\" }, or \"off\"".into()),
        (route("compress = { types = [\"html\"] }"), "7:23: `site.route.compress.types`: \"html\" is not a media type\n  help: write \"application/json\", or \"text/*\" for all of a kind".into()),
        (route("maintenance = \"on\""), "7:15: `site.route.maintenance`: \"on\" is not known\n  help: write { page = \"/maintenance.html\", from = [\"10.0.0.0/8\"] }, {} for a line of text, or \"off\"".into()),
        (route("precompressed = [\"deflate\"]"), "7:18: `site.route.precompressed`: \"deflate\" is not known\n  help: write \"br\" or \"zstd\" or \"gzip\"".into()),
        (route("when = { scheme = \"ftp\" }"), "7:19: `site.route.when.scheme`: \"ftp\" is not known\n  help: write \"http\" or \"https\"".into()),
        ("preset = \"larval\"".into(), "5:10: `site.preset`: there is no preset \"larval\"\n  help: did you mean \"laravel\"?".into()),
        ("preset = \"typo3\"".into(), "5:10: `site.preset`: there is no preset \"typo3\"\n  help: there are \"laravel\", \"symfony\", \"wordpress\", \"drupal\", \"magento\", \"nextcloud\"".into()),
        (route("expires = 30"), "7:11: `site.route.expires` is a number, not a string\n  help: write \"30\", in quotes".into()),
        (route("when = { header = \"X-Debug\" }"), "7:19: `site.route.when.header`: \"X-Debug\" has no colon\n  help: write \"X-Debug: *\" for any value, \"X-Debug: 1\", or \"User-Agent: ~(?i)bot\" for an expression".into()),
        (route("when = { from = [\"10.0.0.0/33\"] }"), "7:18: `site.route.when.from`: \"10.0.0.0/33\" is not a network\n  help: write \"10.0.0.0/8\", \"fd00::/8\" or a single address".into()),
        (route("try_files = []"), "7:13: `site.route.try_files`: the list is empty\n  help: write [\"$uri\", \"$uri/\", \"/index.php\"], or leave the key out".into()),
        (route("try_files = [\"/x?y\", \"$uri\"]"), "7:14: `site.route.try_files`: \"/x?y\" has a query\n  help: write \"/x\": a file has none".into()),
        (route("try_files = [\"=404\", \"=99\"]"), "7:14: `site.route.try_files`: \"=404\" is not the last\n  help: an answer by code ends the list\n7:22: `site.route.try_files`: \"=99\" is not a status\n  help: write \"=404\", or another code from 200 to 599".into()),
        (route("try_files = [\"$uri$args\", \"@php\"]"), "7:14: `site.route.try_files`: \"$uri$args\" has a variable other than $uri\n  help: a file is named by $uri, groups of the route's path as $1, and plain text\n7:27: `site.route.try_files`: \"@php\" is a named location, of which there are none\n  help: write the script's path, as in \"/index.php\"".into()),
        (route("try_files = [\"x\", \"/index.php?h=$host\"]"), "7:14: `site.route.try_files`: \"x\" does not begin with $uri or a slash\n  help: write \"/x\"\n7:19: `site.route.try_files`: \"/index.php?h=$host\" has an unknown variable in its query\n  help: known are $args, $query_string, $uri and groups of the route's path".into()),
        (route("try_files = [\"/a$x\"]"), "7:14: `site.route.try_files`: \"/a$x\" has a variable in its path\n  help: only $uri and groups of the route's path may stand there".into()),
        (route("try_files = \"$uri\""), "7:13: `site.route.try_files` is a string, not a list\n  help: write [\"$uri\"]".into()),
        (route("try_files = [\"/a.PHP?q=$uri\"]"), "7:13: `try_files` ends in \"/a.PHP\", which `scripts` does not declare\n  help: add \"/a.PHP\" to the site's `scripts`".into()),
    ] {
        assert_eq!(wrong(&site(&lines)), expected, "{lines}");
    }
    for list in [
        "[\"$uri\", \"$uri/\", \"/index.php?$query_string\"]",
        "[\"$uri\", \"/index.php$is_args$args\"]",
        "[\"/cache/$uri.html\", \"/index.php?q=$uri&$args\"]",
        "[\"$uri\", \"=404\"]",
        "[\"$uri.html\"]",
    ] {
        good(&site(&format!("try_files = {list}")));
    }
    assert_eq!(
        wrong(""),
        "1:1: there is no site: every request would be answered 421\n  help: add [[site]] with root and upstream"
    );
    assert_eq!(
        wrong("[site]\n"),
        "1:2: `site` is a single table\n  help: write [[site]], in double brackets: there can be several"
    );
}

#[test]
fn no_https_and_no_proxy_protocol_can_be_written() {
    good(&top("listen = { https = [], proxy_protocol = \"off\" }"));
}

#[test]
fn every_error_is_reported_at_once_and_in_order() {
    let text = "workers = 0\nspeed = 1\n[listen]\nidle_timeout = \"x\"\nmin_rate = 1\n[upstream.php]\nretries = 1.5\n[[site]]\nroot = 7\nupstream = \"none\"\n[[tls]]\n";
    let wrong = wrong(text);
    let heads: Vec<&str> = wrong.lines().filter(|line| !line.starts_with("  help")).collect();
    assert_eq!(
        heads,
        [
            "1:11: `workers`: 0 is out of range",
            "2:1: unknown key `speed` at the top of the file",
            "4:16: `listen.idle_timeout`: \"x\" is not a duration",
            "5:12: `listen.min_rate`: a size needs a unit",
            "6:11: upstream `php` has no set",
            "7:11: `upstream.php.retries` is a number with a fraction, not a whole number",
            "9:8: `site.root` is a number, not a string",
            "10:12: `site.upstream`: there is no upstream \"none\"",
            "11:1: a [[tls]] without `certificate`",
            "11:1: a [[tls]] without `key`",
        ]
    );
}

#[test]
fn a_syntax_error_stands_alone() {
    assert_eq!(wrong("workers = 0\nspeed = = 1\n").lines().count(), 1);
    assert!(wrong("workers = 0\nspeed = = 1\n").starts_with("2:9: not valid TOML: "));
    assert!(wrong("a = \"~\\.php$\"\n").ends_with("\n  help: in single quotes a backslash stands for itself: '~\\.php$'"));
    assert!(wrong("workers = 1\nworkers = 2\n").starts_with("2:1: not valid TOML: duplicate key"));
    // Nested without end: the parser's own limit, not our stack.
    assert!(wrong(&format!("a = {}", "[".repeat(100_000))).contains("not valid TOML"));
}

#[test]
fn placeholders_are_filled_and_places_are_those_of_the_file_as_written() {
    let config = good(&top("listen.http = [\"0.0.0.0:{{PORT}}\"]"));
    assert_eq!(config.settings.listen.http, ["0.0.0.0:8081".parse().unwrap()]);
    assert_eq!(
        wrong(&top("listen = { http = [\"0.0.0.0:{{PORT:-12345}}\"], idle_timeout = \"{{NONE:-1}}\" }")),
        "1:63: `listen.idle_timeout`: \"1\" has no unit\n  help: write \"1s\", if seconds are meant"
    );
    assert_eq!(
        wrong("a = \"{{ONE}}\"\n# {{TWO}}\nb = \"{{BREAK}}\""),
        "1:6: ONE is not set in the environment\n  help: set it, or give it a default: {{ONE:-value}}\n\
         2:3: TWO is not set in the environment\n  help: set it, or give it a default: {{TWO:-value}}\n\
         3:6: the environment's BREAK holds a quote, a backslash or a line break\n  help: such a value could change the lines around it; write it into the file itself"
    );
}

#[test]
fn grace_comes_from_the_environment_where_the_file_has_none() {
    let with = |grace: &str| {
        let grace = grace.to_owned();
        let env = move |name: &str| (name == "GRACE").then(|| grace.clone());
        parse(Source { file: "s.toml".into(), text: site("") }, &mut no_include, &env)
    };
    assert_eq!(good(&site("")).settings.drain.grace, Duration::from_secs(30));
    let sixty = with("60").unwrap();
    assert_eq!(sixty.settings.drain.grace, Duration::from_secs(60));
    assert_ne!(sixty.hash, good(&site("")).hash);
    for bad in ["x", "0", "5\"", "60s"] {
        let all = with(bad).unwrap_err();
        assert!(all[0].message.starts_with("`drain.grace` is not in the file, and GRACE="), "{bad}: {}", shown(&all));
    }
    assert_eq!(
        with("11").unwrap_err()[0].message,
        "`drain.lame_duck` (10s) and `drain.margin` (2s) together are longer than `drain.grace` (11s)"
    );
}

#[test]
fn includes_are_merged_and_what_is_twice_is_refused() {
    let read = |main: &str, more: &[(&str, &str)]| {
        let mut include = |pattern: &str| {
            assert_eq!(pattern, "conf.d/*.toml");
            Ok(more.iter().map(|(file, text)| Source { file: (*file).into(), text: (*text).into() }).collect())
        };
        let main = format!("include = [\"conf.d/*.toml\"]\n{main}");
        parse(Source { file: "s.toml".into(), text: main }, &mut include, &env)
    };
    let config = read(
        &format!("listen.ops = \"off\"\nupstream.php.active = \"green\"\n{UPSTREAM}"),
        &[
            (
                "a.toml",
                "listen.health_path = \"/h\"\nupstream.php.set.green.endpoints = [\"127.0.0.1:9001\"]\n[[site]]\nroot = \"/a\"\n",
            ),
            ("b.toml", "[[site]]\nhosts = [\"b\"]\nupstream = \"php\"\nroot = \"/b\"\n"),
        ],
    )
    .unwrap();
    assert_eq!(config.settings.listen.health_path, "/h");
    assert_eq!(config.settings.listen.ops, None);
    assert_eq!(config.upstreams["php"].sets.iter().map(|set| &*set.name).collect::<Vec<_>>(), ["blue", "green"]);
    assert_eq!(config.all_sites().len(), 2);
    assert_eq!(config.files, [PathBuf::from("s.toml"), "a.toml".into(), "b.toml".into()]);

    let all = read(
        &format!("listen.ops = \"off\"\n{UPSTREAM}{SITE}"),
        &[
            ("a.toml", "include = [\"x\"]\nlisten.ops = \"127.0.0.1:1\"\nworkers = 0\n"),
            ("b.toml", "workers = 1\nupstream.php.set.blue.root = \"/b\"\n[[site]]\nrooot = \"/r\"\n"),
        ],
    )
    .unwrap_err();
    assert_eq!(
        shown(&all),
        "a.toml:1:1: `include` stands in the main file only\n  help: list every file in the main file's `include`\n\
               a.toml:2:8: `listen.ops` is set a second time\n  help: it stands at s.toml:2:8 already; keep one of them\n\
               a.toml:3:11: `workers`: 0 is out of range\n  help: write a number of at least 1, or \"auto\"\n\
               b.toml:1:1: `workers` is set a second time\n  help: it stands at a.toml:3:1 already; keep one of them\n\
               b.toml:2:18: `upstream.php.set.blue` is set a second time\n  help: it stands at s.toml:3:18 already; keep one of them\n\
               b.toml:3:1: a second site without `hosts`: only one can be the default\n  help: the other is at s.toml:4:1; give one of them hosts = [\"example.com\"]\n\
               b.toml:4:1: unknown key `rooot` in `site`\n  help: did you mean `root`?"
    );

    let all = read("x = = 1", &[]).unwrap_err();
    assert_eq!(all.len(), 1);
    let all = read("", &[("a.toml", "x = "), ("b.toml", "{{NONE}}")]).unwrap_err();
    assert_eq!(all.iter().map(|p| p.file.display().to_string()).collect::<Vec<_>>(), ["a.toml", "b.toml"]);
}

#[test]
fn load_reads_what_is_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let file = dir.path().join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text).unwrap();
    };
    write("s.toml", "include = [\"*.toml\", \"conf.d/*.toml\", \"conf.d/a.toml\"]\nbuffer.dir = \"/dev/shm\"\n");
    write("conf.d/b.toml", &format!("{SITE}hosts = [\"b\"]\n"));
    write("conf.d/a.toml", UPSTREAM);
    write("conf.d/..hidden.toml", "nonsense = 1");
    write("conf.d/other.txt", "nonsense = 1");
    let config = load(&dir.path().join("s.toml"), &env).unwrap_or_else(|all| panic!("{}", shown(&all)));
    let names: Vec<_> = config.files.iter().filter_map(|file| file.file_name()).collect();
    assert_eq!(names, ["s.toml", "a.toml", "b.toml"]);
    let warnings = config.warnings.join("\n");
    assert!(warnings.contains("b.toml:2:8: `site.root`: /r is not a folder on this machine"), "{warnings}");
    if std::fs::read_to_string("/proc/self/mounts").is_ok_and(|mounts| mounts.contains(" /dev/shm tmpfs")) {
        assert!(warnings.contains("s.toml:2:14: `buffer.dir`: /dev/shm is a memory file system"), "{warnings}");
    }

    write("bad.toml", "include = [\"none.toml\", \"none/*.toml\", \"empty*.toml\"]\n");
    let all = load(&dir.path().join("bad.toml"), &env).unwrap_err();
    assert_eq!(all.iter().filter(|p| p.message.contains("No such file")).count(), 2, "{}", shown(&all));
    let all = load(&dir.path().join("none.toml"), &env).unwrap_err();
    assert!(shown(&all).contains("none.toml: cannot be read: No such file"));
}

#[test]
fn warnings_name_their_place() {
    let warned = |text: &str| {
        good(text).warnings.iter().map(|w| w.replace("s.toml:", "")).filter(|w| !w.contains("(60s) is longer")).collect::<Vec<_>>()
    };
    assert_eq!(
        good(&top("drain.margin = \"2s\"")).warnings,
        [
            "s.toml:2:10: `upstream.php.read_timeout` (60s) is longer than the 18s that `drain` leaves a request (grace - lame_duck - margin): what takes longer is cut when the proxy stops"
        ]
    );
    assert_eq!(
        warned(&site("error_page = { \"400-404\" = \"/e.php\" }")),
        ["5:16: `site.error_page`: a script is never the page of 401, 403 or 429: they show a line of text"]
    );
    assert_eq!(good(&top("drain.grace = \"72s\"")).warnings, [""; 0]);
    assert_eq!(
        warned(&site("read_timeout = \"20s\"\n[[site.route]]\npath = \"/x\"")),
        [
            "5:16: `read_timeout` (20s) is longer than the 18s that `drain` leaves a request (grace - lame_duck - margin): what takes longer is cut when the proxy stops"
        ]
    );
    assert_eq!(
        warned(&top("drain.health_fail_delay = \"11s\"")),
        ["1:27: `drain.health_fail_delay` is longer than `drain.lame_duck`: health never fails while requests still come"]
    );
    assert_eq!(
        warned(&top("listen.trusted_proxies = [\"10.1.2.3/8\"]")),
        ["1:27: `listen.trusted_proxies`: \"10.1.2.3/8\" is taken as \"10.0.0.0/8\""]
    );
    assert_eq!(
        warned(&top("upstream.php.set.blue.min_ready = 2")),
        ["1:35: `upstream.php.set.blue.min_ready` is 2, and the set has 1 endpoints: a swap to it is always refused"]
    );
    assert_eq!(warned(&top("upstream.o.set.a = {}")), ["1:16: set `a` of upstream `o` has no endpoints"]);
    assert_eq!(
        warned(&site("scripts = [\"/index.php\", \"/up/*\"]")),
        ["5:26: `site.scripts`: \"/up/*\" runs every file there as PHP, uploads too; \"/up/*.php\" runs scripts only"]
    );
    assert_eq!(warned(&site("[[site]]\nhosts = [\"b\"]")), ["5:1: site `b` has no `root`: no static files"]);
    assert_eq!(
        warned(&site(
            "[[site.route]]\npath = \"/x\"\n[[site.route]]\npath = \"/x\"\nwhen.method = [\"GET\"]\n[[site.route]]\npath = \"/x/*\""
        )),
        ["8:8: the route `/x` is never reached: the one at 6:8 takes all its requests"]
    );
    assert_eq!(
        warned(&site("[[site.route]]\npath = \"/a/*\"\n[[site.route]]\npath = \"/a/b/*\"\n[[site.route]]\npath = \"/a/c\"")),
        [
            "8:8: the route `/a/b/*` is never reached: the one at 6:8, whose prefix is shorter, takes all its requests; write this one before it"
        ]
    );
    assert_eq!(
        warned(&site(
            "[[site.route]]\npath = \"/*\"\nwhen = { scheme = \"http\" }\nredirect = { to = \"https://$host$request_uri\" }"
        )),
        [
            "7:8: `when.scheme` is always \"http\": `listen.trusted_proxies` is empty, so that nobody's X-Forwarded-Proto counts, and there is no `listen.https`"
        ]
    );
    assert_eq!(good(&site("")).warnings.iter().filter(|warning| warning.contains("read_timeout")).count(), 0, "nobody's mistake");
}

#[test]
fn sites_are_found_by_host_and_routes_kept_in_order() {
    let config = good(&site(
        "hosts = [\"Example.COM\", \"*.example.com\", \"*.a.example.com\", \"[0::1]\"]\nbody_limit = \"1MiB\"\nparams = { A = \"1\", B = \"2\" }\n\
         [[site.route]]\npath = \"/b*\"\nparams = { B = \"3\", C = \"4\" }\n[[site.route]]\npath = \"/exact\"\nwhen = { method = [\"GET\", \"PURGE\"] }\nupstream = \"\"\n\
         [[site.route]]\npath = '~\\.css$'\nbody_limit = \"unlimited\"\n[[site.route]]\npath = \"/exact\"\n[[site]]\nroot = \"/d\"\n",
    ));
    let exact = &config.sites.exact;
    let mut hosts: Vec<&String> = exact.keys().collect();
    hosts.sort();
    assert_eq!(hosts, ["[::1]", "example.com"]);
    assert_eq!(
        config.sites.wildcard.iter().map(|(suffix, _)| suffix.as_str()).collect::<Vec<_>>(),
        [".a.example.com", ".example.com"]
    );
    let first = &exact["example.com"];
    assert_eq!(&*first.name, "example.com");
    assert!(Arc::ptr_eq(first, &exact["[::1]"]));
    let default = config.sites.default.as_ref().unwrap();
    assert_eq!(&*default.name, "default");
    assert_eq!(default.default_route.upstream, None);

    assert_eq!(first.ordered.iter().map(|route| route.path.as_str()).collect::<Vec<_>>(), ["/b*", "~\\.css$"]);
    assert!(matches!(&first.ordered[0].pattern, Pattern::Prefix(prefix) if prefix == "/b"));
    assert!(matches!(&first.ordered[1].pattern, Pattern::Regex(regex) if regex.is_match("/a.css")));
    let pairs = |route: &crate::model::Route| route.params.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(" ");
    assert_eq!(pairs(&first.ordered[0]), "A=1 B=3 C=4");
    assert_eq!(pairs(&first.ordered[1]), "A=1 B=2");
    assert_eq!((first.ordered[0].body_limit, first.ordered[1].body_limit), (1 << 20, u64::MAX));
    let both = &first.exact["/exact"];
    assert_eq!(both[0].methods, [http::Method::GET, http::Method::from_bytes(b"PURGE").unwrap()]);
    assert_eq!((both[0].upstream.as_deref(), both[1].upstream.as_deref()), (None, Some("php")));
}

#[test]
fn values_arrive_as_they_are_meant() {
    let text = format!(
        "{UPSTREAM}upstream.php.active = \"blue\"\nupstream.php.keepalive = \"off\"\nupstream.php.balance = \"hash:$cookie_SID\"\nupstream.php.queue.max = \"off\"\n\
         upstream.php.set.green = {{ endpoints = [\"unix:/a.sock\"], ping = \"/ping\", php_root = \"/srv/\" }}\nreload = \"watch\"\nlog.access = \"off\"\n\
         {SITE}php_root = \"realpath\"\nsymlinks = [\"/data/\"]\nfront = \"\"\nfiles = \"or-404\"\n"
    );
    let config = good(&text);
    let php = &config.upstreams["php"];
    assert_eq!(php.active_set().map(|name| &**name), Some("blue"));
    assert_eq!((php.policy.lease, &php.policy.balance), (None, &Balance::HashCookie("SID".into())));
    assert_eq!(php.policy.queue, QueuePolicy { max: None, timeout: Duration::from_secs(10) });
    let green = &php.sets[1];
    assert_eq!(green.endpoints, [Address::Unix("/a.sock".into())]);
    assert_eq!((green.ping.as_ref().unwrap().path.as_str(), green.php_root.as_deref()), ("/ping", Some("/srv")));
    assert_eq!((config.settings.reload, &config.settings.log.access), (ReloadMode::Watch, &AccessFormat::Off));
    let site = only(&config);
    assert_eq!((&site.php_root, &site.front, site.default_route.files), (&PhpRoot::RealPath, &None, Files::Or404));
    assert_eq!(site.symlinks, Symlinks::Folders(vec!["/data".into()]));
    let config = good(&self::site(""));
    let php = &config.upstreams["php"];
    assert_eq!((php.active.as_ref(), php.active_set().map(|name| &**name)), (None, Some("blue")));
    assert_eq!(
        php.policy.lease,
        Some(LeasePolicy { requests: 64, age: Duration::from_secs(1), idle: Duration::from_millis(50), non_idempotent: false })
    );
}

#[test]
fn an_address_has_one_number_of_workers() {
    let two = |first: &str, second: &str| {
        format!(
            "upstream.a = {{ workers_per_endpoint = {first}, set.x.endpoints = [\"127.0.0.1:1\"] }}\n\
             upstream.b = {{ workers_per_endpoint = {second}, set.x.endpoints = [\"127.0.0.1:1\"] }}\n[[site]]\nroot = \"/r\"\n"
        )
    };
    good(&two("4", "4"));
    good(&two("4", "\"auto\""));
    assert_eq!(
        wrong(&two("4", "8")),
        "2:61: `upstream.b.set.x.endpoints`: \"127.0.0.1:1\" is said to have 8 workers here\n  help: `upstream.a.workers_per_endpoint` says 4; an address is one endpoint with one number of workers"
    );
}

#[test]
fn the_hash_is_of_the_filled_text() {
    let hash = |text: &str| good(text).hash;
    assert_eq!(hash(&site("")), hash(&site("")));
    assert_eq!(hash(&top("workers = {{N:-2}}")), hash(&top("workers = 2")));
    assert_ne!(hash(&top("workers = 2")), hash(&top("workers = 3")));
    // It is compared between replicas, so it must not change from one build to the next.
    assert_eq!(hash(&site("")), "c89deaac7eae52cc");
    assert_eq!(hash(&site("")).len(), 16);
}

/// For each key a value that is not its default, and what else must stand for it to count.
const SAMPLES: &[(&str, &str, &str)] = &[
    ("", "workers", "3"),
    ("", "reload", "\"watch\""),
    ("", "sandbox", "\"on\""),
    ("", "state", "\"/s.json\""),
    ("listen", "http", "[\"127.0.0.1:1\"]"),
    ("listen", "https", "[\"127.0.0.1:3\"]"),
    ("listen", "proxy_protocol", "\"required\""),
    ("listen", "tls_ticket_keys", "[\"/t\"]"),
    ("tls", "hosts", "[\"a.example\"]"),
    ("tls", "certificate", "\"/other.crt\""),
    ("tls", "key", "\"/other.key\""),
    ("", "tls", "[{ certificate = \"/c\", key = \"/k\" }]"),
    ("site", "https_only", "true"),
    ("listen", "ops", "\"127.0.0.1:2\""),
    ("listen", "ops_allow", "[\"10.0.0.0/8\"]"),
    ("listen", "admin", "\"/a.sock\""),
    ("listen", "health_path", "\"/h\""),
    ("listen", "trusted_proxies", "[\"10.0.0.1\"]"),
    ("listen", "idle_timeout", "\"76s\""),
    ("listen", "header_timeout", "\"11s\""),
    ("listen", "max_uri_bytes", "\"512B\""),
    ("listen", "max_header_bytes", "\"8KiB\""),
    ("listen", "stall_timeout", "\"31s\""),
    ("listen", "min_rate", "\"2KiB\""),
    ("listen", "max_connections", "7"),
    ("listen", "max_connections_per_address", "7"),
    ("listen", "max_requests_per_connection", "7"),
    ("buffer", "memory", "\"1KiB\""),
    ("buffer", "total", "\"1GiB\""),
    ("buffer", "dir", "\"/tmp\""),
    ("buffer", "disk", "\"0B\""),
    ("buffer", "files", "\"0B\""),
    ("log", "format", "\"text\""),
    ("log", "level", "\"info,slackwater=debug\""),
    ("log", "access", "\"combined\""),
    ("log", "access_sample", "\"10%\""),
    ("log", "access_file", "\"/a.log\""),
    ("tracing", "sample", "\"10%\""),
    ("tracing", "service", "\"edge\""),
    ("drain", "grace", "\"60s\""),
    ("drain", "lame_duck", "\"11s\""),
    ("drain", "health_fail_delay", "\"1s\""),
    ("drain", "quiet", "\"3s\""),
    ("drain", "margin", "\"3s\""),
    ("drain", "receipt", "\"/r.json\""),
    ("upstream", "active", "\"blue\""),
    ("upstream", "active_from", "\"service/php\""),
    ("upstream", "keepalive", "\"off\""),
    ("upstream", "workers_per_endpoint", "4"),
    ("upstream", "connect_timeout", "\"2s\""),
    ("upstream", "read_timeout", "\"2m\""),
    ("upstream", "retries", "0"),
    ("upstream", "balance", "\"round-robin\""),
    ("lease", "requests", "1"),
    ("lease", "age", "\"2s\""),
    ("lease", "idle", "\"51ms\""),
    ("lease", "non_idempotent", "true"),
    ("queue", "max", "\"off\""),
    ("queue", "timeout", "\"1s\""),
    ("upstream", "slow_start", "\"off\""),
    ("upstream", "lane", "{ checkout = {} }"),
    ("lane", "reserve", "\"20%\""),
    ("lane", "priority", "10"),
    ("lane", "limit", "\"50%\""),
    ("set", "endpoints", "[\"[::1]:9000\"]"),
    ("set", "root", "\"/release\""),
    ("set", "php_root", "\"/srv\""),
    ("set", "min_ready", "0"),
    ("set", "status_path", "\"/other\""),
    ("set", "status_listen", "\"127.0.0.1:9001\""),
    ("set", "ping", "\"/p\""),
    ("ping", "path", "\"/p\""),
    ("ping", "every", "\"3s\""),
    ("ping", "fall", "3"),
    ("ping", "rise", "3"),
    ("set", "preflight", "{ path = \"/p\" }"),
    ("preflight", "path", "\"/p\""),
    ("preflight", "host", "\"a.example\""),
    ("preflight", "https", "false"),
    ("preflight", "requests", "4"),
    ("preflight", "expect", "\"200\""),
    ("preflight", "timeout", "\"6s\""),
    ("preflight", "give_up", "\"61s\""),
    ("upstream", "assets_fallback", "true"),
    ("kubernetes", "self_service", "\"edge\""),
    ("set", "kubernetes", "{ service = \"php\", port = 9000 }"),
    ("kubernetes", "namespace", "\"learning\""),
    ("kubernetes", "kubeconfig", "\"/k\""),
    ("service", "service", "\"php-green\""),
    ("service", "port", "9001"),
    ("site", "hosts", "[\"a\"]"),
    ("site", "root", "\"/other\""),
    ("site", "php_root", "\"realpath\""),
    ("site", "index", "[]"),
    ("site", "scripts", "[\"/index.php\", \"/a/*.php\"]"),
    ("site", "front", "\"\""),
    ("site", "symlinks", "\"within\""),
    ("site", "files", "\"or-404\""),
    ("site", "try_files", "[\"$uri\", \"/index.php\"]"),
    ("site", "script", "\"/s.php\""),
    ("site", "upstream", "\"\""),
    ("site", "read_timeout", "\"1s\""),
    ("site", "body_limit", "\"9MiB\""),
    ("site", "params", "{ A = \"\" }"),
    ("site", "access_log", "\"off\""),
    ("route", "path", "\"/y\""),
    ("route", "files", "\"or-404\""),
    ("route", "try_files", "[\"$uri/\"]"),
    ("route", "script", "\"/s.php\""),
    ("route", "upstream", "\"\""),
    ("route", "read_timeout", "\"1s\""),
    ("route", "body_limit", "\"0B\""),
    ("route", "params", "{ A = \"\\u0007\\\"{{\" }"),
    ("route", "access_log", "\"off\""),
    ("site", "lane", "\"checkout\""),
    ("route", "lane", "\"checkout\""),
    ("when", "method", "[\"GET\"]"),
    ("when", "header", "\"X-Debug: *\""),
    ("when", "cookie", "[\"preview\", \"a=1\"]"),
    ("when", "from", "[\"10.0.0.0/8\"]"),
    ("site", "allow", "[\"10.0.0.0/8\"]"),
    ("site", "deny", "[\"192.0.2.1\"]"),
    ("site", "redirect", "{ to = \"https://$host$request_uri\" }"),
    ("site", "respond", "{ status = 410 }"),
    ("site", "headers", "{ set = { X-A = \"1\" } }"),
    ("site", "request_headers", "{ remove = [\"X-A\"] }"),
    ("site", "expires", "\"30d\""),
    ("route", "allow", "[\"10.0.0.0/8, ::1\"]"),
    ("route", "deny", "[\"192.0.2.1\"]"),
    ("route", "redirect", "{ to = \"/new?$args\", status = 301 }"),
    ("route", "respond", "{ body = \"hello $remote_addr\", type = \"text/html\" }"),
    ("route", "headers", "{ add = { Link = \"</a.css>\" }, remove = [\"X-Powered-By\"] }"),
    ("route", "request_headers", "{ set = { X-Scheme = \"$scheme\" } }"),
    ("route", "expires", "\"max\""),
    ("site", "preset", "\"laravel\""),
    ("when", "arg", "[\"debug\", \"v=~^[0-9]+$\"]"),
    ("headers", "default", "{ A = \"b\" }"),
    ("request_headers", "default", "{ A = \"b\" }"),
    ("when", "scheme", "\"http\""),
    ("site", "cors", "{ origins = [\"*\"] }"),
    ("route", "cors", "{ origins = [\"https://a.example\", \"null\"], credentials = true }"),
    ("cors", "origins", "[\"https://a.example:8443\"]"),
    ("cors", "methods", "[\"*\"]"),
    ("cors", "headers", "[\"Authorization\"]"),
    ("cors", "expose", "[\"X-Total\"]"),
    ("cors", "credentials", "true"),
    ("cors", "max_age", "\"1h\""),
    ("site", "maintenance", "{}"),
    ("route", "maintenance", "{ page = \"/m.html\" }"),
    ("maintenance", "page", "\"/m.html\""),
    ("maintenance", "from", "[\"10.0.0.0/8\"]"),
    ("maintenance", "cookie", "\"a=1\""),
    ("maintenance", "header", "\"X-A: 1\""),
    ("maintenance", "retry_after", "\"10m\""),
    ("maintenance", "file", "\"/on\""),
    ("site", "compress", "[\"gzip\"]"),
    ("route", "compress", "{ min = \"2KiB\" }"),
    ("compress", "codings", "[\"zstd\"]"),
    ("compress", "types", "[\"text/*\", \"application/json\"]"),
    ("compress", "min", "\"0B\""),
    ("compress", "private", "true"),
    ("site", "precompressed", "[\"br\", \"gzip\"]"),
    ("route", "precompressed", "[\"zstd\"]"),
    ("site", "rewrite", "\"/x\""),
    ("site", "internal", "true"),
    ("site", "limit", "{ by = \"$remote_addr\", rate = \"10/s\" }"),
    ("route", "limit", "{ by = \"$remote_addr\", concurrent = 3 }"),
    ("site", "basic_auth", "{ file = \"/etc/passwd\" }"),
    ("route", "basic_auth", "{ file = \"/etc/passwd\" }"),
    ("basic_auth", "realm", "\"members\""),
    ("basic_auth", "file", "\"/etc/group\""),
    ("limit", "by", "\"$cookie_session\""),
    ("limit", "rate", "\"100/m\""),
    ("limit", "burst", "20"),
    ("limit", "concurrent", "2"),
    ("site", "error_page", "{ \"404\" = \"/404.html\" }"),
    ("route", "error_page", "{ \"502-504\" = \"https://status.example.com/\" }"),
    ("route", "rewrite", "\"/new$uri\""),
    ("route", "internal", "true"),
    ("redirect", "to", "\"/x\""),
    ("redirect", "status", "308"),
    ("respond", "status", "404"),
    ("respond", "body", "\"x\""),
    ("respond", "type", "\"text/html\""),
    ("headers", "set", "{ A = \"b\" }"),
    ("headers", "add", "{ A = \"b\" }"),
    ("headers", "remove", "[\"a\"]"),
    ("request_headers", "set", "{ A = \"b\" }"),
    ("request_headers", "add", "{ A = \"b\" }"),
    ("request_headers", "remove", "[\"a\"]"),
];

/// A configuration that has every table, with one key set.
fn with(section: &str, key: &str, value: &str) -> String {
    let mut keys: Vec<(&str, &str, &str)> = vec![
        ("set", "endpoints", "[\"127.0.0.1:9000\"]"),
        ("set", "status_path", "\"/status\""),
        ("ping", "path", "\"/ping\""),
        ("site", "root", "\"/r\""),
        ("site", "upstream", "\"php\""),
        ("route", "path", "\"/x\""),
    ];
    if section == "basic_auth" && key != "file" {
        keys.push(("basic_auth", "file", "\"/etc/passwd\""));
    }
    if section == "limit" {
        keys.extend([("limit", "by", "\"$remote_addr\""), ("limit", "rate", "\"10/s\"")]);
    }
    if section == "redirect" && key != "to" {
        keys.push(("redirect", "to", "\"/y\""));
    }
    if section == "cors" && key != "origins" {
        keys.push(("cors", "origins", "[\"https://a.example\"]"));
    }
    // Without a key it would be the same as none.
    if section == "maintenance" && key.is_empty() {
        keys.push(("maintenance", "file", "\"\""));
    }
    if key == "lane" && section != "upstream" {
        keys.push(("upstream", "lane", "{ checkout = {} }"));
    }
    if key == "active_from" {
        keys.push(("kubernetes", "namespace", "\"default\""));
    }
    // The pods of a Service stand instead of endpoints, and need a cluster.
    if section == "service" || (section, key) == ("set", "kubernetes") {
        keys.retain(|(_, k, _)| *k != "endpoints");
        keys.push(("kubernetes", "namespace", "\"default\""));
    }
    if section == "service" {
        keys.extend([("service", "service", "\"php-blue\""), ("service", "port", "\"fpm\"")]);
    }
    if section == "preflight" && key != "path" {
        keys.push(("preflight", "path", "\"/p\""));
    }
    keys.retain(|(s, k, _)| (*s, *k) != (section, key) && !(*s == "ping" && (section, key) == ("set", "ping")));
    keys.push((section, key, value));
    if section == "tls" || (section, key) == ("listen", "https") {
        let others = [("tls", "certificate", "\"/c.crt\""), ("tls", "key", "\"/k.key\"")];
        keys.extend(others.into_iter().filter(|(_, other, _)| (section, key) != ("tls", *other)));
    }
    let mut text = [String::new(), String::new(), String::new()];
    let tls: Vec<String> = keys
        .iter()
        .filter(|(table, key, _)| *table == "tls" && !key.is_empty())
        .map(|(_, key, value)| format!("{key} = {value}"))
        .collect();
    if !tls.is_empty() {
        text[0] += &format!("tls = [{{ {} }}]\n", tls.join(", "));
    }
    keys.retain(|(table, ..)| *table != "tls");
    for (section, key, value) in keys.into_iter().filter(|(_, key, _)| !key.is_empty()) {
        let (part, prefix) = match section {
            "" => (0, ""),
            "listen" => (0, "listen."),
            "buffer" => (0, "buffer."),
            "log" => (0, "log."),
            "tracing" => (0, "tracing."),
            "drain" => (0, "drain."),
            "upstream" => (0, "upstream.php."),
            "lease" => (0, "upstream.php.lease."),
            "queue" => (0, "upstream.php.queue."),
            "lane" => (0, "upstream.php.lane.checkout."),
            "set" => (0, "upstream.php.set.blue."),
            "ping" => (0, "upstream.php.set.blue.ping."),
            "preflight" => (0, "upstream.php.set.blue.preflight."),
            "service" => (0, "upstream.php.set.blue.kubernetes."),
            "kubernetes" => (0, "kubernetes."),
            "site" => (1, ""),
            "when" => (2, "when."),
            "compress" => (2, "compress."),
            "cors" => (2, "cors."),
            "maintenance" => (2, "maintenance."),
            "limit" => (2, "limit."),
            "basic_auth" => (2, "basic_auth."),
            "redirect" => (2, "redirect."),
            "respond" => (2, "respond."),
            "headers" => (2, "headers."),
            "request_headers" => (2, "request_headers."),
            _ => (2, ""),
        };
        text[part] += &format!("{prefix}{key} = {value}\n");
    }
    format!("{}[[site]]\n{}[[site.route]]\n{}", text[0], text[1], text[2])
}

/// What is in force, without the line that names file and hash, and those that say which preset it is from.
fn in_force(text: &str) -> String {
    body(&expand(&good(text)))
}

fn body(expanded: &str) -> String {
    let kept = |line: &&str| !line.starts_with("# |") && !line.starts_with("# preset = ");
    expanded.lines().skip(1).filter(kept).fold(String::new(), |all, line| all + line + "\n")
}

#[test]
fn every_key_changes_something_and_the_expansion_says_it_again() {
    let plain = in_force(&with("", "", ""));
    assert_eq!(in_force(&plain), plain);
    for (section, key, value) in SAMPLES {
        let changed = in_force(&with(section, key, value));
        assert_ne!(changed, plain, "{section} {key}");
        assert_eq!(in_force(&changed), changed, "{section} {key}");
    }
    // `include` has tests of its own; https and proxy_protocol have only one value; the others are tables.
    let others = [
        "include",
        "https",
        "proxy_protocol",
        "listen",
        "buffer",
        "log",
        // Only a binary with the feature takes an endpoint: `tests/otlp.rs`.
        "tracing",
        "endpoint",
        "drain",
        "kubernetes",
        "upstream",
        "lease",
        "queue",
        "set",
        "site",
        "route",
        "when",
    ];
    for (section, keys) in KEYS {
        for key in *keys {
            let sampled = SAMPLES.iter().any(|(s, k, _)| s == section && k == key);
            assert!(sampled || others.contains(key), "no sample of {section} {key}");
        }
    }
}

fn shipped(name: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

#[test]
fn the_files_we_ship_load_and_say_the_defaults() {
    for name in ["config/minimal.toml", "config/slackwater.toml"] {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        let config = load(&file, &|_| None).unwrap_or_else(|all| panic!("{}", shown(&all)));
        for warning in &config.warnings {
            assert!(
                warning.contains("is not a folder on this machine")
                    || warning.contains("read_timeout")
                    || warning.contains("memory file system"),
                "{warning}"
            );
        }
    }
    assert_eq!(in_force(&shipped("config/slackwater.toml")), in_force(&shipped("config/minimal.toml")));
}

#[test]
fn every_key_is_in_the_shipped_file_and_in_the_documentation() {
    let (file, docs) = (shipped("config/slackwater.toml"), shipped("docs/configuration.md"));
    for (section, keys) in KEYS {
        for key in *keys {
            let headers =
                [format!("[{key}]"), format!("[{key}."), format!("[[{key}]]"), format!("[[{section}.{key}]]"), format!(".{key}.")];
            let in_file = file.contains(&format!("{key} = ")) || headers.iter().any(|header| file.contains(header));
            assert!(in_file, "config/slackwater.toml does not have {section} {key}");
            let in_docs = docs.contains(&format!("`{key}`")) || headers.iter().any(|header| docs.contains(header));
            assert!(in_docs, "docs/configuration.md does not have {section} {key}");
        }
    }
}

/// Each is right by itself, and whatever it stands for is there in words that load again.
#[test]
fn presets_are_whole_and_say_what_they_stand_for() {
    for (name, text) in presets::ALL {
        let config = good(&site(&format!("preset = {name:?}")));
        let stands = config.warnings.iter().filter(|warning| !warning.contains("read_timeout")).count();
        assert_eq!(stands, 0, "{:?}", config.warnings);
        let expanded = expand(&config);
        let text_of = site(&format!("preset = {name:?}"));
        assert_eq!(in_force(&expanded), in_force(&text_of), "{name}");
        assert!(expanded.contains(&format!("# preset = {name:?}")) && expanded.contains("https://"), "{name}");
        // Where it is from stands at its beginning.
        assert!(text.lines().take_while(|line| line.starts_with('#')).any(|line| line.contains("https://")), "{name}");
        assert!(!config.sites.default.as_ref().unwrap().scripts.is_empty());
        for (source, problem) in [("hash", good(&site("")).hash), ("another preset's", good(&site("preset = \"laravel\"")).hash)] {
            assert!(name == "laravel" || config.hash != problem, "{name} has the hash of {source}");
        }
    }
}

#[test]
fn a_sites_own_words_go_before_its_presets_but_open_nothing_by_the_way() {
    let config = good(&site(
        "preset = \"wordpress\"\nbody_limit = \"1GiB\"\nheaders = { set = { X-A = \"1\" } }\n\
         [[site.route]]\npath = \"/wp-content/*\"\nexpires = \"1d\"\n[[site.route]]\npath = \"/favicon.ico\"\nscript = \"/index.php\"",
    ));
    let own = only(&config);
    assert_eq!((own.preset, own.default_route.body_limit), (Some("wordpress"), 1 << 30));
    assert!(own.scripts.iter().any(|script| script.0 == "/wp-login.php"));
    assert!(own.exact["/favicon.ico"].len() == 1 && own.exact["/favicon.ico"][0].script.is_some());
    let place = |path: &str| own.ordered.iter().position(|route| route.path == path).unwrap();
    let assets = own.ordered.iter().position(|route| route.path.contains("jpeg")).unwrap();
    assert!(place("/wp-content/*") < assets);
    // What a preset says of one path is no more than the site's own exact path.
    assert!(good(&site("preset = \"nextcloud\"")).sites.default.as_ref().unwrap().exact.is_empty());
    // What a preset closes comes first: a broad route of the site's own would have opened it.
    let config = good(&site("preset = \"drupal\"\nallow = [\"10.0.0.0/8\"]\n[[site.route]]\npath = \"/*\"\naccess_log = \"off\""));
    let own = only(&config);
    let broad = own.ordered.iter().position(|route| route.path == "/*").unwrap();
    let closes = |route: &Arc<Route>| route.closes(&own.default_route);
    assert!(broad > 0 && closes(&own.ordered[broad - 1]), "{:?}", own.ordered.iter().map(|r| &r.path).collect::<Vec<_>>());
    assert!(!own.ordered[broad..].iter().any(closes));
}

#[test]
fn the_nearer_of_files_and_try_files_counts() {
    let config = good(&site("try_files = [\"$uri\", \"/index.php\"]\n[[site.route]]\npath = \"/assets/*\"\nfiles = \"or-404\""));
    let own = only(&config);
    assert!(own.default_route.try_files.is_some() && own.ordered[0].try_files.is_none());
}

#[test]
fn the_expansion_gives_routes_in_the_order_of_the_match() {
    let text = site(
        "[[site.route]]\npath = \"/a*\"\n[[site.route]]\npath = \"/x\"\n[[site.route]]\npath = \"~^/b\"\n[[site.route]]\npath = \"/x/long\"\n",
    );
    let expanded = expand(&good(&text));
    let paths: Vec<&str> = expanded.lines().filter(|line| line.starts_with("path = ")).collect();
    assert_eq!(paths, ["path = \"/x/long\"", "path = \"/x\"", "path = \"/a*\"", "path = \"~^/b\""]);
}

fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("\"auto\"".to_owned()),
        "\"[a-z/*~$()0-9.:=]{0,8}\"",
        "[0-9]{1,22}",
        "\"[0-9]{1,20}(s|ms|d|KiB|GiB|B)\"",
        Just("[]".to_owned()),
        "\\[(\"[a-z/*.:0-9]{0,6}\", ){0,3}\\]",
        Just("{}".to_owned()),
        "\\{ [a-z]{1,4} = \"[a-z/]{0,3}\" \\}",
        Just("true".to_owned()),
        Just("1.5".to_owned()),
        Just("1979-05-27".to_owned()),
        Just("\"{{NONE:-é}}\"".to_owned()),
    ]
}

proptest! {
    #[test]
    fn any_text_is_taken_or_refused_without_a_panic(text in ".{0,200}") {
        let _ = try_parse(&text);
    }

    #[test]
    fn any_value_of_any_key_is_taken_or_refused_at_a_place_in_the_file(
        picks in proptest::collection::vec((0..KEYS.len(), any::<prop::sample::Index>(), value()), 1..6)
    ) {
        for (section, key, value) in picks {
            let (section, keys) = KEYS[section];
            let text = with(section, keys[key.index(keys.len())], &value);
            match try_parse(&text) {
                Ok(config) => {
                    let expanded = expand(&config);
                    let again = try_parse(&expanded).map_err(|all| TestCaseError::fail(format!("{expanded}\n{}", shown(&all))))?;
                    let again = expand(&again);
                    prop_assert_eq!(body(&again), body(&expanded));
                }
                Err(all) => for problem in all {
                    let line = text.lines().nth(problem.line - 1);
                    prop_assert!(line.is_some_and(|line| problem.column <= line.chars().count() + 1), "{}", problem);
                },
            }
        }
    }
}
