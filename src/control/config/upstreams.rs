//! `[upstream.NAME]` and `[upstream.NAME.set.SET]`.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use super::{
    Folder, UpstreamConfig,
    document::{Kind, Place},
    reader::{Reader, Value, nearest},
    settings::{dns_label, dns_name},
    sites::host,
    unit,
};
use crate::model::{
    Address,
    settings::Drain,
    upstream::{Balance, LanePolicy, LeasePolicy, Ping, Policy, Port, Preflight, QueuePolicy, ServicePort, SetConfig},
};

const DAY: u32 = 86_400;

pub type Upstreams = BTreeMap<Arc<str>, UpstreamConfig>;

/// `clustered`: there is a `[kubernetes]`.
pub fn read(top: &mut Reader<'_>, drain: &Drain, has_drain: bool, clustered: bool, folders: &mut Vec<Folder>) -> Upstreams {
    let mut all = Upstreams::new();
    let mut told = Told { workers: HashMap::new(), clustered, has_drain };
    for (name, reader) in top.named("upstream", "upstream") {
        all.insert(Arc::from(name), upstream(name, reader, drain, &mut told, folders));
    }
    all
}

/// What sets must know of others.
struct Told {
    /// What each address was said to hold, by whom: an endpoint of two upstreams is one endpoint with one capacity.
    workers: HashMap<Address, (u32, String)>,
    clustered: bool,
    /// `[drain]` is written.
    has_drain: bool,
}

fn upstream(name: &str, mut t: Reader<'_>, drain: &Drain, told: &mut Told, folders: &mut Vec<Folder>) -> UpstreamConfig {
    let lease = lease(t.section("lease", "lease"));
    let leased = t.read("keepalive", true, |v| v.one_of(&[("lease", true), ("off", false)]));
    let policy = Policy {
        lease: leased.then_some(lease),
        workers_per_endpoint: t
            .read("workers_per_endpoint", None, |v| v.count_or("auto", 1, u64::from(u32::MAX)))
            .and_then(|count| u32::try_from(count).ok()),
        connect_timeout: t.read("connect_timeout", Duration::from_secs(1), Value::timeout),
        read_timeout: t.read("read_timeout", Duration::from_secs(60), Value::timeout),
        retries: t.read("retries", 2, |v| v.count_u32(0, 100)),
        balance: t.read("balance", Balance::LeastBusy, balance),
        queue: queue(t.section("queue", "queue")),
        slow_start: t.read("slow_start", Duration::from_secs(10), |v| v.duration_or_zero("off")),
        lanes: lanes(name, &mut t),
        assets_fallback: t.read("assets_fallback", false, Value::boolean),
    };
    // Two defaults are nobody's mistake; docs/drain.md says what they come to.
    if t.has("read_timeout") || told.has_drain {
        warn_of_cuts(&t, &format!("upstream.{name}.read_timeout"), policy.read_timeout, drain);
    }

    let sets: Vec<SetConfig> =
        t.named("set", "set").into_iter().map(|(set, reader)| read_set(name, set, reader, &policy, told, folders)).collect();
    let names = || sets.iter().map(|set| format!("\"{}\"", set.name)).collect::<Vec<_>>().join(" or ");
    let active = t.read("active", None, |v| match v.text()? {
        "" => Some(None),
        text => match sets.iter().find(|set| &*set.name == text) {
            Some(set) => Some(Some(set.name.clone())),
            None if sets.is_empty() => Some(None),
            None => {
                let near = nearest(text, sets.iter().map(|set| &*set.name));
                let help = near.map_or_else(|| format!("write {}", names()), |near| format!("did you mean \"{near}\"?"));
                v.refuse(format!("upstream `{name}` has no set {text:?}"), help)
            }
        },
    });
    let active_from = t.read("active_from", None, |v| match v.text()? {
        "" => Some(None),
        text => match text.strip_prefix("service/") {
            Some(service) => dns_name(v, service).map(|service| Some(Arc::from(service))),
            None => v.refuse(
                format!("{text:?} is not known"),
                "write \"service/NAME\", the Service with the annotation slackwater.dev/active",
            ),
        },
    });
    if active_from.is_some() && !told.clustered {
        let message = format!("upstream `{name}` has `active_from`, and nothing says in which namespace that Service is");
        t.report.problem(t.place("active_from"), message, Some("add [kubernetes], which may be empty".to_owned()));
    }
    let written = t.ask("active").is_some_and(|v| !matches!(&v.node.kind, Kind::Text(text) if text.is_empty()));
    if sets.is_empty() {
        let help = format!("add [upstream.{name}.set.blue] with endpoints = [\"127.0.0.1:9000\"]");
        t.report.problem(t.place("set"), format!("upstream `{name}` has no set"), Some(help));
    } else if sets.len() > 1 && !written && active_from.is_none() {
        let message = format!("upstream `{name}` has {} sets, and nothing says which is active", sets.len());
        t.report.problem(t.place("active"), message, Some(format!("write active = {}", names())));
    }
    t.finish();
    UpstreamConfig { policy, active, active_from, sets }
}

/// A request may take longer than the drain waits for it.
pub fn warn_of_cuts(t: &Reader<'_>, key: &str, read_timeout: Duration, drain: &Drain) {
    let left = drain.grace.saturating_sub(drain.lame_duck).saturating_sub(drain.margin);
    if read_timeout > left {
        let message = format!(
            "`{key}` ({}) is longer than the {} that `drain` leaves a request (grace - lame_duck - margin): what takes longer is cut when the proxy stops",
            unit::show_duration(read_timeout),
            unit::show_duration(left)
        );
        t.report.warn(t.place("read_timeout"), message);
    }
}

fn lease(mut t: Reader<'_>) -> LeasePolicy {
    let lease = LeasePolicy {
        requests: t.read("requests", 64, |v| v.count_u32(1, u32::MAX)),
        age: t.read("age", Duration::from_secs(1), Value::timeout),
        idle: t.read("idle", Duration::from_millis(50), Value::timeout),
        non_idempotent: t.read("non_idempotent", false, Value::boolean),
    };
    t.finish();
    lease
}

fn queue(mut t: Reader<'_>) -> QueuePolicy {
    let queue = QueuePolicy {
        max: t.read("max", Some(1000), |v| v.count_or("off", 1, 10_000_000)).and_then(|max| usize::try_from(max).ok()),
        timeout: t.read("timeout", Duration::from_secs(10), Value::timeout),
    };
    t.finish();
    queue
}

/// Lanes and their shares are looked at for each request.
const MOST_LANES: usize = 16;

fn lanes(upstream: &str, t: &mut Reader<'_>) -> Vec<LanePolicy> {
    let at = t.place("lane");
    let mut kept = 0_u32;
    let mut lanes = Vec::new();
    for (name, mut t) in t.named("lane", "lane") {
        let reserve = t.read("reserve", 0, Value::percent);
        let limit = t.read("limit", 100, Value::percent);
        let at = t.place(if t.has("limit") { "limit" } else { "reserve" });
        if limit == 0 {
            let help = "write at least limit = \"1%\"; a lane always has one worker".to_owned();
            t.report.problem(at, format!("lane `{name}` of upstream `{upstream}` has a limit of nothing"), Some(help));
        } else if reserve > limit {
            let message = format!("lane `{name}` of upstream `{upstream}` has a reserve of {reserve}% and a limit of {limit}%");
            t.report.problem(at, message, Some("a lane never has more than its limit: reserve at most as much".to_owned()));
        }
        kept += u32::from(reserve);
        let priority = t.read("priority", 0, |v| v.count_u32(0, 1_000));
        t.finish();
        lanes.push(LanePolicy { name: Arc::from(name), reserve, priority, limit });
    }
    if kept > 100 {
        let message = format!("the lanes of upstream `{upstream}` reserve {kept}% of its workers");
        t.report.problem(at, message, Some("reserve at most \"100%\" in all".to_owned()));
    }
    if lanes.len() > MOST_LANES {
        let message = format!("upstream `{upstream}` has {} lanes", lanes.len());
        t.report.problem(at, message, Some(format!("have at most {MOST_LANES}")));
    }
    lanes
}

fn balance(v: &Value<'_>) -> Option<Balance> {
    const HELP: &str = "write \"least-busy\", \"round-robin\", \"hash:$remote_addr\" or \"hash:$cookie_NAME\"";
    let text = v.text()?;
    match text {
        "least-busy" => Some(Balance::LeastBusy),
        "round-robin" => Some(Balance::RoundRobin),
        "hash:$remote_addr" => Some(Balance::HashAddress),
        _ => match text.strip_prefix("hash:$cookie_") {
            Some("") => v.refuse("the cookie has no name", HELP),
            // RFC 6265 section 4.1.1: a cookie's name is a token, as a header's is.
            Some(cookie) if http::HeaderName::from_bytes(cookie.as_bytes()).is_ok() => Some(Balance::HashCookie(cookie.to_owned())),
            Some(cookie) => v.refuse(format!("{cookie:?} cannot be a cookie's name"), HELP),
            None => v.refuse(format!("{text:?} is not known"), HELP),
        },
    }
}

fn read_set(
    upstream: &str,
    name: &str,
    mut t: Reader<'_>,
    policy: &Policy,
    told: &mut Told,
    folders: &mut Vec<Folder>,
) -> SetConfig {
    let before = t.report.count();
    let mut seen: Vec<(Address, Place)> = Vec::new();
    let endpoints = t.read("endpoints", Vec::new(), |v| {
        v.list(|v| {
            let address = address(v)?;
            if let Some((_, first)) = seen.iter().find(|(other, _)| *other == address) {
                let first = format!("it stands at {} already; name an endpoint once", v.report.place(*first));
                return v.refuse(format!("\"{address}\" is twice in this set"), first);
            }
            seen.push((address.clone(), v.node.at));
            if let Some(workers) = policy.workers_per_endpoint {
                match told.workers.get(&address) {
                    Some((other, whose)) if *other != workers => {
                        let help = format!("`{whose}` says {other}; an address is one endpoint with one number of workers");
                        return v.refuse(format!("\"{address}\" is said to have {workers} workers here"), help);
                    }
                    _ => {
                        told.workers.insert(address.clone(), (workers, format!("upstream.{upstream}.workers_per_endpoint")));
                    }
                }
            }
            Some(address)
        })
    });
    let kubernetes = t.read("kubernetes", None, |v| service_port(v).map(Some));
    if kubernetes.is_some() && !endpoints.is_empty() {
        let message = format!("set `{name}` of upstream `{upstream}` has `endpoints` and `kubernetes`");
        t.report.problem(
            t.place("kubernetes"),
            message,
            Some("keep one: addresses in the file, or the pods of a Service".to_owned()),
        );
    }
    if kubernetes.is_some() && !told.clustered {
        let message = format!("set `{name}` of upstream `{upstream}` is in Kubernetes, and nothing says in which namespace");
        t.report.problem(t.place("kubernetes"), message, Some("add [kubernetes], which may be empty".to_owned()));
    }
    let root = t.read("root", None, Value::folder).map(PathBuf::from);
    if let Some(root) = &root {
        folders.push(Folder::new(t.report, t.place("root"), &format!("upstream.{upstream}.set.{name}.root"), root));
    }
    let set = SetConfig {
        name: Arc::from(name),
        endpoints,
        kubernetes,
        root,
        php_root: t.read("php_root", None, |v| match v.text()? {
            "realpath" => Some(Some("realpath".to_owned())),
            _ => v.folder(),
        }),
        min_ready: t.read("min_ready", 1, |v| v.count(0, 1_000_000)).try_into().unwrap_or(usize::MAX),
        status_path: t.read("status_path", None, Value::url_path_or_none),
        status_listen: t.read("status_listen", None, |v| match v.text()? {
            "" => Some(None),
            _ => address(v).map(Some),
        }),
        ping: t.read("ping", None, ping),
        preflight: t.read("preflight", None, preflight),
    };
    if set.status_listen.is_some() && !t.has("status_path") {
        let help = "add status_path = \"/status\", FPM's pm.status_path".to_owned();
        let message = format!("set `{name}` of upstream `{upstream}` has status_listen, but no status_path to ask for there");
        t.report.problem(t.place("status_listen"), message, Some(help));
    }
    if set.kubernetes.is_some() {
        // How many there are the cluster says.
    } else if set.endpoints.is_empty() {
        if t.report.count() == before {
            t.report.warn(t.place("endpoints"), format!("set `{name}` of upstream `{upstream}` has no endpoints"));
        }
    } else if set.min_ready > set.endpoints.len() {
        let message = format!(
            "`upstream.{upstream}.set.{name}.min_ready` is {}, and the set has {} endpoints: a swap to it is always refused",
            set.min_ready,
            set.endpoints.len()
        );
        t.report.warn(t.place("min_ready"), message);
    }
    t.finish();
    set
}

fn service_port(v: &Value<'_>) -> Option<ServicePort> {
    const HELP: &str = "write { service = \"php-blue\", port = \"fpm\" }";
    if !matches!(v.node.kind, Kind::Table(_)) {
        return v.wrong(format!("`{}` is {}, not a table", v.path, v.node.kind.name()), HELP.to_owned());
    }
    let mut t = v.reader("service")?;
    for key in ["service", "port"] {
        if !t.has(key) {
            v.refuse::<()>(format!("`{key}` is missing"), HELP);
        }
    }
    let service = t.ask("service").and_then(|v| dns_label(&v).map(Arc::from));
    let port = t.ask("port").and_then(|v| match &v.node.kind {
        Kind::Text(text) if text.parse::<u16>().is_ok() => {
            v.refuse(format!("{text:?} is a number"), format!("write port = {text}"))
        }
        Kind::Text(_) => dns_label(&v).map(|name| Port::Name(name.to_owned())),
        _ => u16::try_from(v.count(1, 65_535)?).ok().map(Port::Number),
    });
    t.finish();
    Some(ServicePort { service: service?, port: port? })
}

fn address(v: &Value<'_>) -> Option<Address> {
    match v.text()?.parse::<Address>() {
        Ok(Address::Tcp(socket)) if socket.port() == 0 => v.refuse(format!("\"{socket}\" has no port"), "write FPM's, often 9000"),
        Ok(address) => Some(address),
        Err(message) => v.wrong(format!("`{}`: {message}", v.path), None),
    }
}

fn ping(v: &Value<'_>) -> Option<Option<Ping>> {
    let standard = |path: String| Ping { path, every: Duration::from_secs(2), fall: 2, rise: 2 };
    match &v.node.kind {
        Kind::Text(_) => Some(v.url_path_or_none()?.map(standard)),
        Kind::Table(_) => {
            let mut t = v.reader("ping")?;
            let path = t.ask("path");
            if path.is_none() {
                v.refuse::<()>("`path` is missing", "write { path = \"/ping\" }, FPM's ping.path");
            }
            let path = path.and_then(|v| v.url_path());
            let ping = Ping {
                path: path.unwrap_or_default().to_owned(),
                every: t.read("every", Duration::from_secs(2), |v| {
                    v.timeout().filter(|every| {
                        let fine = every.as_secs() < u64::from(DAY);
                        if !fine {
                            v.refuse::<()>("is a day or more", "write a duration of seconds, as in \"2s\"");
                        }
                        fine
                    })
                }),
                fall: t.read("fall", 2, |v| v.count_u32(1, 1000)),
                rise: t.read("rise", 2, |v| v.count_u32(1, 1000)),
            };
            t.finish();
            Some(path.map(|_| ping))
        }
        kind => v.wrong(
            format!("`{}` is {}, neither a path nor a table", v.path, kind.name()),
            "write \"/ping\" or { path = \"/ping\", every = \"2s\", fall = 2, rise = 2 }".to_owned(),
        ),
    }
}

fn preflight(v: &Value<'_>) -> Option<Option<Preflight>> {
    const HELP: &str = "write { path = \"/index.php\" }; host, https, requests, expect, timeout and give_up have defaults";
    if !matches!(v.node.kind, Kind::Table(_)) {
        return v.wrong(format!("`{}` is {}, not a table", v.path, v.node.kind.name()), HELP.to_owned());
    }
    let mut t = v.reader("preflight")?;
    let path = t.ask("path");
    if path.is_none() {
        v.refuse::<()>("`path` is missing", HELP);
    }
    let path = path.and_then(|v| match v.filled_text()? {
        text if !text.starts_with('/') => v.refuse(format!("{text:?} does not begin with a slash"), format!("write \"/{text}\"")),
        text if text.bytes().any(|byte| byte <= b' ' || byte == b'#' || byte == 0x7f) => {
            v.refuse(format!("{text:?} cannot be asked for"), "write path and query as a browser sends them, percent-encoded")
        }
        text => Some(text.to_owned()),
    });
    let preflight = Preflight {
        path: path.clone().unwrap_or_default(),
        host: t.read("host", None, |v| match v.text()? {
            "" => Some(None),
            _ => host(v).map(Some),
        }),
        https: t.read("https", true, Value::boolean),
        requests: t.read("requests", 3, |v| v.count_u32(1, 1000)),
        expect: t.read("expect", (200, 399), status_range),
        timeout: t.read("timeout", Duration::from_secs(5), Value::timeout),
        give_up: t.read("give_up", Duration::from_secs(60), Value::timeout),
    };
    t.finish();
    path.map(|_| Some(preflight))
}

/// "200" or "200-399".
fn status_range(v: &Value<'_>) -> Option<(u16, u16)> {
    let text = v.text()?;
    let code = |text: &str| text.parse::<u16>().ok().filter(|code| (100..=599).contains(code));
    let range = match text.split_once('-') {
        Some((from, to)) => code(from).zip(code(to)),
        None => code(text).map(|code| (code, code)),
    };
    match range {
        Some((from, to)) if from <= to => Some((from, to)),
        _ => v.refuse(format!("{text:?} is no range of status codes"), "write \"200-399\", or one code as \"200\""),
    }
}
