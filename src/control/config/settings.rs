//! The process-wide tables: the top of the file, `[listen]`, `[buffer]`, `[log]`, `[tracing]`, `[drain]`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{
    Folder,
    document::Place,
    reader::{Reader, Value},
    sites, texts, unit,
};
use crate::{
    control::template,
    model::settings::{AccessFormat, Buffer, Drain, Kubernetes, Listen, Log, LogFormat, ReloadMode, Settings, Tracing},
    model::tls::CertificateFiles,
};

/// `drain.grace` where the file does not have it: the same placeholder as in the pod's spec.
pub const DEFAULT_GRACE: &str = "{{GRACE:-30}}s";

/// The folder that bodies spill into, as warnings name it.
pub const SPILL: &str = "buffer.dir";

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

pub fn read(top: &mut Reader<'_>, env: &dyn Fn(&str) -> Option<String>, folders: &mut Vec<Folder>) -> Settings {
    let settings = Settings {
        workers: top.read("workers", None, |v| v.count_or("auto", 1, 1024).map(as_usize)),
        reload: top
            .read("reload", ReloadMode::Signal, |v| v.one_of(&[("signal", ReloadMode::Signal), ("watch", ReloadMode::Watch)])),
        sandbox: top.read("sandbox", false, |v| v.one_of(&[("off", false), ("on", true)])),
        state: top.read("state", None, path_or_none),
        listen: listen(top.section("listen", "listen")),
        certificates: certificates(top),
        tls: None,
        buffer: buffer(top.section("buffer", "buffer"), folders),
        log: log(top.section("log", "log")),
        tracing: tracing(top.section("tracing", "tracing")),
        drain: drain(top.section("drain", "drain"), env),
        kubernetes: {
            let present = top.has("kubernetes");
            let read = kubernetes(top.section("kubernetes", "kubernetes"), env);
            present.then_some(read)
        },
    };
    if let Some(folder) = settings.state.as_deref().and_then(Path::parent) {
        folders.push(Folder::new(top.report, top.place("state"), "state", folder));
    }
    if !settings.listen.https.is_empty() && settings.certificates.is_empty() && !top.has("tls") {
        let help = "add [[tls]] with hosts, certificate and key".to_owned();
        top.report.problem(top.place("listen"), "`listen.https`, and no certificate", Some(help));
    }
    if settings.listen.https.is_empty() && !settings.certificates.is_empty() {
        top.report.warn(top.place("tls"), "`[[tls]]`, and no address in `listen.https`: nobody is served with it".to_owned());
    }
    // Whoever uses it needs it read already, in `config::parse`: it says which files there are.
    top.ask("include");
    settings
}

fn listen(mut t: Reader<'_>) -> Listen {
    let before = t.report.count();
    let mut bound: Vec<(SocketAddr, Place, &str)> = Vec::new();
    let mut claim =
        |v: &Value<'_>, address: SocketAddr, key: &'static str| match bound.iter().find(|(other, ..)| collide(*other, address)) {
            Some((other, at, whose)) => {
                let first = format!("`listen.{whose}` has \"{other}\" at {}", v.report.place(*at));
                v.refuse(format!("\"{address}\" is taken already"), first)
            }
            None => {
                bound.push((address, v.node.at, key));
                Some(address)
            }
        };
    let http = t.read("http", vec![SocketAddr::from(([0, 0, 0, 0], 8080))], |v| {
        v.list(|v| socket(v).and_then(|address| claim(v, address, "http")))
    });
    let ops = t.read("ops", Some(SocketAddr::from(([0, 0, 0, 0], 9901))), |v| match v.text()? {
        "off" => Some(None),
        "" => v.refuse("is empty", "write \"off\" for none"),
        _ => socket(v).and_then(|address| claim(v, address, "ops")).map(Some),
    });
    let https = t.read("https", Vec::new(), |v| v.list(|v| socket(v).and_then(|address| claim(v, address, "https"))));
    if http.is_empty() && https.is_empty() && t.report.count() == before {
        let help = "write http = [\"0.0.0.0:8080\"], or an address in https".to_owned();
        t.report.problem(t.place("http"), "without an address nothing is served", Some(help));
    }
    let proxy_protocol = t.read("proxy_protocol", false, |v| v.one_of(&[("off", false), ("required", true)]));
    let listen = Listen {
        http,
        https,
        proxy_protocol,
        tls_ticket_keys: t.read("tls_ticket_keys", Vec::new(), |v| v.list(|v| v.folder()?.map(PathBuf::from))),
        ops,
        ops_allow: t.read("ops_allow", loopback(), |v| v.list(Value::networks).map(|all| all.concat())),
        admin: t.read("admin", PathBuf::from(super::DEFAULT_ADMIN), |v| {
            let text = v.filled_text()?;
            if let Some(path) = text.strip_prefix("unix:") {
                return v.refuse("is always a unix socket", format!("write \"{path}\""));
            }
            // sun_path holds 108 bytes with the closing NUL (unix(7)).
            if text.len() > 107 {
                return v.refuse("the path of a unix socket is longer than 107 bytes", "choose a shorter one");
            }
            Some(PathBuf::from(text))
        }),
        health_path: t.read("health_path", String::new(), |v| v.url_path_or_none().map(Option::unwrap_or_default)),
        trusted_proxies: t.read("trusted_proxies", Vec::new(), |v| v.list(Value::networks).map(|all| all.concat())),
        idle_timeout: t.read("idle_timeout", Duration::from_secs(75), Value::timeout),
        header_timeout: t.read("header_timeout", Duration::from_secs(10), Value::timeout),
        // http::Uri holds no more than 65,534 bytes, and FPM no parameter above 65,535.
        max_uri_bytes: t.read("max_uri_bytes", 16 << 10, |v| v.bytes(64, 64 * KIB)),
        // hyper panics on a read buffer below 8 KiB.
        max_header_bytes: t.read("max_header_bytes", 64 << 10, |v| v.bytes(8 * KIB, 16 * MIB)),
        stall_timeout: t.read("stall_timeout", Duration::from_secs(30), Value::timeout),
        min_rate: t.read("min_rate", KIB, |v| v.size(0, u64::MAX)),
        max_connections: t.read("max_connections", None, |v| v.count_or("auto", 1, 100_000_000).map(as_usize)),
        max_connections_per_address: t
            .read("max_connections_per_address", None, |v| v.count_or("unlimited", 1, 100_000_000).map(as_usize)),
        max_requests_per_connection: t.read("max_requests_per_connection", None, |v| v.count_or("unlimited", 1, u64::MAX)),
    };
    if listen.max_uri_bytes > listen.max_header_bytes {
        let message =
            "`listen.max_uri_bytes` is above `listen.max_header_bytes`, which counts the request line too and so comes first";
        t.report.warn(t.place("max_uri_bytes").max(t.place("max_header_bytes")), message);
    }
    t.finish();
    listen
}

fn loopback() -> Vec<ipnet::IpNet> {
    let v4 = ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(127, 0, 0, 0), 8);
    vec![v4.into(), ipnet::IpNet::from(std::net::IpAddr::V6(std::net::Ipv6Addr::LOCALHOST))]
}

fn socket(v: &Value<'_>) -> Option<SocketAddr> {
    let text = v.text()?;
    match text.parse() {
        Ok(address) => Some(address),
        Err(_) => {
            let help = match text.strip_prefix(':').unwrap_or(text).parse::<u16>() {
                Ok(port) => format!("write \"0.0.0.0:{port}\""),
                Err(_) => "write an address and a port, as in \"0.0.0.0:8080\" or \"[::]:8080\"".to_owned(),
            };
            v.refuse(format!("{text:?} is not an address to listen on"), help)
        }
    }
}

/// Whether the second bind() would fail. Port 0 is a new port each time; `[::]` beside `0.0.0.0` depends on the socket.
fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    let same_family = a.is_ipv4() == b.is_ipv4();
    let same_ip = a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified();
    a.port() == b.port() && a.port() != 0 && same_family && same_ip
}

fn buffer(mut t: Reader<'_>, folders: &mut Vec<Folder>) -> Buffer {
    let before = t.report.count();
    let buffer = Buffer {
        memory: t.read("memory", 64 << 10, |v| v.bytes(KIB, 1024 * MIB)),
        total: t.read("total", 256 * MIB, |v| v.size(KIB, u64::MAX)),
        dir: t.read("dir", PathBuf::from("/var/tmp"), |v| match v.folder()? {
            Some(dir) => Some(PathBuf::from(dir)),
            None => v.refuse("is empty", "write a folder, or disk = \"0B\" to spill nothing"),
        }),
        disk: t.read("disk", 4096 * MIB, |v| v.size(0, u64::MAX)),
        files: t.read("files", 32 * MIB, |v| v.size(0, u64::MAX)),
    };
    folders.push(Folder::new(t.report, t.place("dir"), SPILL, &buffer.dir));
    // Only real values are compared: a default that stands in for a wrong one would be blamed on the user.
    if t.report.count() == before && u64::try_from(buffer.memory).is_ok_and(|memory| memory > buffer.total) {
        let help = "raise `total`, or lower `memory`".to_owned();
        let message = format!(
            "`buffer.memory` of one body ({}) is above `buffer.total` of all ({})",
            unit::show_size(buffer.memory as u64),
            unit::show_size(buffer.total)
        );
        t.report.problem(t.place("memory").max(t.place("total")), message, Some(help));
    }
    t.finish();
    buffer
}

fn certificates(top: &mut Reader<'_>) -> Vec<CertificateFiles> {
    let mut all = Vec::new();
    for mut t in top.sections("tls", "tls") {
        let hosts = t.read("hosts", Vec::new(), |v| v.list(sites::host));
        for key in ["certificate", "key"] {
            if !t.has(key) {
                let help = "write certificate = \"/etc/tls/tls.crt\" and key = \"/etc/tls/tls.key\"".to_owned();
                t.report.problem(t.at, format!("a [[tls]] without `{key}`"), Some(help));
            }
        }
        let at = t.report.locate(t.place("certificate"));
        let certificate = t.read("certificate", None, |v| v.folder()).map(PathBuf::from);
        let key = t.read("key", None, |v| v.folder()).map(PathBuf::from);
        t.finish();
        if let (Some(certificate), Some(key)) = (certificate, key) {
            all.push(CertificateFiles { hosts, certificate, key, at });
        }
    }
    all
}

fn log(mut t: Reader<'_>) -> Log {
    let log = Log {
        format: t.read("format", LogFormat::Auto, |v| {
            v.one_of(&[("auto", LogFormat::Auto), ("text", LogFormat::Text), ("json", LogFormat::Json)])
        }),
        level: t.read("level", "info".to_owned(), level),
        access: t.read("access", AccessFormat::Json, |v| {
            if v.text()?.contains('$') {
                return texts::log_text(v).map(|text| AccessFormat::Custom(Arc::new(text)));
            }
            match v.text()? {
                "json" => Some(AccessFormat::Json),
                "combined" => Some(AccessFormat::Combined),
                "off" => Some(AccessFormat::Off),
                text if text.starts_with('/') => v.refuse(format!("{text:?} is a path"), "write it in `access_file`"),
                text => v.refuse(
                    format!("{text:?} is not known"),
                    "write \"json\", \"combined\", \"off\", or the text of a log_format: '$remote_addr \"$request\" $status'",
                ),
            }
        }),
        access_sample: t.read("access_sample", 100, Value::percent),
        access_file: t.read("access_file", "stdout".to_owned(), |v| {
            let text = v.filled_text()?;
            if text != "stdout" && text != "stderr" && !text.starts_with('/') {
                return v.refuse(format!("{text:?} is not known"), "write \"stdout\", \"stderr\" or an absolute path");
            }
            Some(text.to_owned())
        }),
    };
    t.finish();
    log
}

fn tracing(mut t: Reader<'_>) -> Tracing {
    let tracing = Tracing {
        endpoint: t.read("endpoint", String::new(), |v| {
            let text = v.text()?.trim_end_matches('/');
            if text.is_empty() {
                return Some(String::new());
            }
            let host = text.strip_prefix("http://").filter(|host| host.parse::<http::uri::Authority>().is_ok());
            if host.is_none() {
                return v.refuse(
                    format!("{text:?} is not known"),
                    "write \"http://HOST:4318\": OTLP over HTTP, without TLS and without a path",
                );
            }
            if !cfg!(feature = "otlp") {
                return v.refuse("this binary has no traces in it", "build it with  cargo build --release --features otlp");
            }
            Some(text.to_owned())
        }),
        sample: t.read("sample", 1, Value::percent),
        service: t.read("service", "slackwater".to_owned(), |v| v.filled_text().map(str::to_owned)),
    };
    t.finish();
    tracing
}

/// `EnvFilter` takes a bare word that is no level for the name of a module, and then says nothing more at all.
fn level(v: &Value<'_>) -> Option<String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let text = v.filled_text()?;
    if !text.contains('[') {
        for directive in text.split(',') {
            let level = directive.rsplit('=').next().unwrap_or(directive).trim();
            if !LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
                let help = "write error, warn, info, debug, trace or off, or by module: \"info,slackwater::upstream=debug\"";
                return v.refuse(format!("{level:?} is not a level"), help);
            }
        }
    }
    // Here, where the place in the file is known: a reload has no other reason to fail half done.
    if let Err(why) = crate::telemetry::tracing::check(text) {
        return v.refuse(why, "write a level, or by module: \"info,slackwater::upstream=debug\"");
    }
    Some(text.to_owned())
}

fn drain(mut t: Reader<'_>, env: &dyn Fn(&str) -> Option<String>) -> Drain {
    let before = t.report.count();
    let standard = default_grace(env);
    let grace = match t.ask("grace") {
        Some(value) => value.timeout().unwrap_or(Duration::from_secs(30)),
        None => match standard.as_deref().map(unit::parse_duration) {
            Some(Some(grace)) if !grace.is_zero() => grace,
            _ => {
                let value = env("GRACE").unwrap_or_default();
                let help = "GRACE is a number of seconds above 0, as the pod's terminationGracePeriodSeconds".to_owned();
                let message = format!("`drain.grace` is not in the file, and GRACE={value:?} of the environment is no duration");
                t.report.problem(t.at, message, Some(help));
                Duration::from_secs(30)
            }
        },
    };
    let drain = Drain {
        grace,
        lame_duck: t.read("lame_duck", Duration::from_secs(10), Value::duration),
        health_fail_delay: t.read("health_fail_delay", Duration::ZERO, Value::duration),
        quiet: t.read("quiet", Duration::from_secs(2), Value::duration),
        margin: t.read("margin", Duration::from_secs(2), Value::duration),
        receipt: t.read("receipt", None, path_or_none),
    };
    if t.report.count() == before && drain.lame_duck + drain.margin > drain.grace {
        let at = t.place("grace").max(t.place("lame_duck")).max(t.place("margin"));
        let message = format!(
            "`drain.lame_duck` ({}) and `drain.margin` ({}) together are longer than `drain.grace` ({})",
            unit::show_duration(drain.lame_duck),
            unit::show_duration(drain.margin),
            unit::show_duration(drain.grace)
        );
        let help = "raise grace with the pod's terminationGracePeriodSeconds, or shorten lame_duck".to_owned();
        t.report.problem(at, message, Some(help));
    }
    if drain.health_fail_delay > drain.lame_duck {
        let message = "`drain.health_fail_delay` is longer than `drain.lame_duck`: health never fails while requests still come";
        t.report.warn(t.place("health_fail_delay").max(t.place("lame_duck")), message);
    }
    t.finish();
    drain
}

fn kubernetes(mut t: Reader<'_>, env: &dyn Fn(&str) -> Option<String>) -> Kubernetes {
    let standard = env("NAMESPACE").unwrap_or_else(|| "default".to_owned());
    let kubernetes = Kubernetes {
        namespace: t.read("namespace", standard, |v| dns_label(v).map(str::to_owned)),
        kubeconfig: t.read("kubeconfig", None, path_or_none),
        self_service: t.read("self_service", None, |v| match v.text()? {
            "" => Some(None),
            name => dns_name(v, name).map(|name| Some(Arc::from(name))),
        }),
    };
    t.finish();
    kubernetes
}

/// A name of Kubernetes (RFC 1123 label).
pub fn dns_label<'a>(v: &Value<'a>) -> Option<&'a str> {
    dns_name(v, v.filled_text()?)
}

/// As `dns_label`, of a part of the value.
pub fn dns_name<'a>(v: &Value<'_>, text: &'a str) -> Option<&'a str> {
    let fine = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if text.is_empty() || text.len() > 63 || !text.bytes().all(fine) || text.starts_with('-') || text.ends_with('-') {
        return v.refuse(format!("{text:?} is not a name of Kubernetes"), "write up to 63 of a-z, 0-9 and -, as in \"php-blue\"");
    }
    Some(text)
}

/// `None` where GRACE cannot be put into a file either.
pub fn default_grace(env: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    template::fill_config(DEFAULT_GRACE, env).ok().map(|filled| filled.text)
}

fn path_or_none(v: &Value<'_>) -> Option<Option<PathBuf>> {
    v.text().map(|text| (!text.is_empty()).then(|| PathBuf::from(text)))
}

fn as_usize(count: Option<u64>) -> Option<usize> {
    count.and_then(|count| usize::try_from(count).ok())
}
