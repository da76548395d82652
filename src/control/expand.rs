//! What is in force, as a configuration that says everything: `check --expand`. Routes stand in the order in which
//! they are matched. The text parses to the same configuration again, which a test holds it to.

use std::{
    fmt::{Display, Write as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use http::HeaderName;

use super::config::{
    Config, UpstreamConfig, presets,
    rules::show_expires,
    unit::{show_duration, show_size},
};
use crate::model::{
    Route, Site, SiteTable,
    rules::{Action, Compress, Cors, ErrorPage, Limit, Maintenance, Scheme, Wanted, When},
    settings::{AccessFormat, Buffer, Drain, Listen, Log, LogFormat, ReloadMode},
    site::{Files, Origin, Pattern, PhpRoot, Symlinks},
    text::Text,
    tls::CertificateFiles,
    upstream::{Balance, LeasePolicy, Ping, Port, ServicePort, SetConfig},
};

pub fn expand(config: &Config) -> String {
    let settings = &config.settings;
    let mut out = Out::default();
    let files: Vec<String> = config.files.iter().map(|file| file.display().to_string()).collect();
    out.comment(format_args!("configuration {}, from {}", config.hash, files.join(", ")));
    out.key("workers", or_word(settings.workers, "auto"));
    out.key(
        "reload",
        quote(match settings.reload {
            ReloadMode::Signal => "signal",
            ReloadMode::Watch => "watch",
        }),
    );
    out.key("sandbox", quote(if settings.sandbox { "on" } else { "off" }));
    out.key("state", path_or_empty(settings.state.as_deref()));
    listen(&mut out, &settings.listen);
    for CertificateFiles { hosts, certificate, key, .. } in &settings.certificates {
        out.table("[[tls]]");
        out.key("hosts", list(hosts));
        out.key("certificate", quote(certificate.display()));
        out.key("key", quote(key.display()));
    }
    buffer(&mut out, &settings.buffer);
    log(&mut out, &settings.log);
    out.table("[tracing]");
    out.key("endpoint", quote(&settings.tracing.endpoint));
    out.key("sample", quote(format_args!("{}%", settings.tracing.sample)));
    out.key("service", quote(&settings.tracing.service));
    drain(&mut out, &settings.drain);
    if let Some(kubernetes) = &settings.kubernetes {
        out.table("[kubernetes]");
        out.key("namespace", quote(&kubernetes.namespace));
        out.key("kubeconfig", path_or_empty(kubernetes.kubeconfig.as_deref()));
        out.key("self_service", quote(kubernetes.self_service.as_deref().unwrap_or_default()));
    }
    for (name, config) in &config.upstreams {
        upstream(&mut out, name, config);
    }
    for each in config.all_sites() {
        site(&mut out, config, each);
    }
    out.0
}

#[derive(Default)]
struct Out(String);

impl Out {
    fn table(&mut self, header: impl Display) {
        self.line(format_args!("\n{header}"));
    }

    fn key(&mut self, key: &str, value: impl Display) {
        self.line(format_args!("{key} = {value}"));
    }

    fn comment(&mut self, text: impl Display) {
        // A file's name may hold anything, also a line break.
        let text = text.to_string().replace(char::is_control, " ");
        self.line(format_args!("# {text}"));
    }

    fn line(&mut self, line: impl Display) {
        // Writing to a String does not fail.
        let _ = writeln!(self.0, "{line}");
    }
}

fn listen(out: &mut Out, listen: &Listen) {
    out.table("[listen]");
    out.key("http", list(&listen.http));
    out.key("https", list(&listen.https));
    out.key("proxy_protocol", quote(if listen.proxy_protocol { "required" } else { "off" }));
    out.key("tls_ticket_keys", list(listen.tls_ticket_keys.iter().map(|path| path.display())));
    out.key("ops", listen.ops.map_or_else(|| quote("off"), quote));
    out.key("ops_allow", list(&listen.ops_allow));
    out.key("admin", quote(listen.admin.display()));
    out.key("health_path", quote(&listen.health_path));
    out.key("trusted_proxies", list(&listen.trusted_proxies));
    out.key("idle_timeout", duration(listen.idle_timeout));
    out.key("header_timeout", duration(listen.header_timeout));
    out.key("max_uri_bytes", bytes(listen.max_uri_bytes));
    out.key("max_header_bytes", bytes(listen.max_header_bytes));
    out.key("stall_timeout", duration(listen.stall_timeout));
    out.key("min_rate", size(listen.min_rate));
    out.key("max_connections", or_word(listen.max_connections, "auto"));
    out.key("max_connections_per_address", or_word(listen.max_connections_per_address, "unlimited"));
    out.key("max_requests_per_connection", or_word(listen.max_requests_per_connection, "unlimited"));
}

fn buffer(out: &mut Out, buffer: &Buffer) {
    out.table("[buffer]");
    out.key("memory", bytes(buffer.memory));
    out.key("total", size(buffer.total));
    out.key("dir", quote(buffer.dir.display()));
    out.key("disk", size(buffer.disk));
    out.key("files", size(buffer.files));
}

fn log(out: &mut Out, log: &Log) {
    out.table("[log]");
    out.key(
        "format",
        quote(match log.format {
            LogFormat::Auto => "auto",
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        }),
    );
    out.key("level", quote(&log.level));
    out.key(
        "access",
        quote(match &log.access {
            AccessFormat::Json => "json",
            AccessFormat::Combined => "combined",
            AccessFormat::Off => "off",
            AccessFormat::Custom(text) => &text.source,
        }),
    );
    out.key("access_sample", quote(format_args!("{}%", log.access_sample)));
    out.key("access_file", quote(&log.access_file));
}

fn drain(out: &mut Out, drain: &Drain) {
    out.table("[drain]");
    out.key("grace", duration(drain.grace));
    out.key("lame_duck", duration(drain.lame_duck));
    out.key("health_fail_delay", duration(drain.health_fail_delay));
    out.key("quiet", duration(drain.quiet));
    out.key("margin", duration(drain.margin));
    out.key("receipt", path_or_empty(drain.receipt.as_deref()));
}

fn upstream(out: &mut Out, name: &str, upstream: &UpstreamConfig) {
    let policy = &upstream.policy;
    out.table(format_args!("[upstream.{name}]"));
    out.key("active", quote(upstream.active.as_deref().unwrap_or_default()));
    if upstream.active.is_none()
        && let Some(only) = upstream.active_set()
    {
        out.comment(format_args!("active: {only}, the only set"));
    }
    out.key(
        "active_from",
        upstream.active_from.as_ref().map_or_else(|| quote(""), |service| quote(format_args!("service/{service}"))),
    );
    match policy.lease {
        Some(lease) => {
            out.key("keepalive", quote("lease"));
            let (age, idle) = (duration(lease.age), duration(lease.idle));
            let LeasePolicy { requests, non_idempotent, .. } = lease;
            out.key(
                "lease",
                format_args!("{{ requests = {requests}, age = {age}, idle = {idle}, non_idempotent = {non_idempotent} }}"),
            );
        }
        None => out.key("keepalive", quote("off")),
    }
    out.key("workers_per_endpoint", or_word(policy.workers_per_endpoint, "auto"));
    out.key("connect_timeout", duration(policy.connect_timeout));
    out.key("read_timeout", duration(policy.read_timeout));
    out.key("retries", policy.retries);
    out.key(
        "balance",
        match &policy.balance {
            Balance::LeastBusy => quote("least-busy"),
            Balance::RoundRobin => quote("round-robin"),
            Balance::HashAddress => quote("hash:$remote_addr"),
            Balance::HashCookie(name) => quote(format_args!("hash:$cookie_{name}")),
        },
    );
    let (max, timeout) = (or_word(policy.queue.max, "off"), duration(policy.queue.timeout));
    out.key("queue", format_args!("{{ max = {max}, timeout = {timeout} }}"));
    out.key("slow_start", if policy.slow_start.is_zero() { quote("off") } else { duration(policy.slow_start) });
    out.key("assets_fallback", policy.assets_fallback);
    for lane in &policy.lanes {
        out.table(format_args!("[upstream.{name}.lane.{}]", lane.name));
        out.key("reserve", quote(format_args!("{}%", lane.reserve)));
        out.key("priority", lane.priority);
        out.key("limit", quote(format_args!("{}%", lane.limit)));
    }
    for each in &upstream.sets {
        set(out, name, each);
    }
}

fn set(out: &mut Out, upstream: &str, set: &SetConfig) {
    out.table(format_args!("[upstream.{upstream}.set.{}]", set.name));
    match &set.kubernetes {
        None => out.key("endpoints", list(&set.endpoints)),
        Some(ServicePort { service, port }) => {
            let port = match port {
                Port::Name(name) => quote(name),
                Port::Number(number) => number.to_string(),
            };
            out.key("kubernetes", format_args!("{{ service = {}, port = {port} }}", quote(service)));
        }
    }
    out.key("root", path_or_empty(set.root.as_deref()));
    out.key("php_root", quote(set.php_root.as_deref().unwrap_or_default()));
    out.key("min_ready", set.min_ready);
    out.key("status_path", quote(set.status_path.as_deref().unwrap_or_default()));
    out.key("status_listen", set.status_listen.as_ref().map_or_else(|| quote(""), quote));
    match &set.ping {
        None => out.key("ping", quote("")),
        Some(Ping { path, every, fall, rise }) => {
            let every = duration(*every);
            out.key("ping", format_args!("{{ path = {}, every = {every}, fall = {fall}, rise = {rise} }}", quote(path)));
        }
    }
    if let Some(p) = &set.preflight {
        let (timeout, give_up, host) = (duration(p.timeout), duration(p.give_up), quote(p.host.as_deref().unwrap_or_default()));
        let (path, https, requests, (from, to)) = (quote(&p.path), p.https, p.requests, p.expect);
        out.key(
            "preflight",
            format_args!(
                "{{ path = {path}, host = {host}, https = {https}, requests = {requests}, expect = \"{from}-{to}\", timeout = {timeout}, give_up = {give_up} }}"
            ),
        );
    }
}

fn site(out: &mut Out, config: &Config, site: &Arc<Site>) {
    out.table("[[site]]");
    out.key("hosts", list(hosts(&config.sites, site)));
    if let Some(preset) = site.preset {
        // Not as a key: what it stands for is all here.
        out.comment(format_args!("preset = {preset:?}: its keys and routes are among these"));
        let text = presets::ALL.iter().find(|(name, _)| *name == preset).map_or("", |(_, text)| text);
        for line in text.lines().map_while(|line| line.strip_prefix('#')) {
            out.comment(format_args!("| {}", line.trim()));
        }
    }
    out.key("root", path_or_empty(site.root.as_deref()));
    out.key(
        "php_root",
        match &site.php_root {
            PhpRoot::SameAsRoot => quote(""),
            PhpRoot::RealPath => quote("realpath"),
            PhpRoot::Path(path) => quote(path),
        },
    );
    out.key("index", list(&site.index));
    out.key("scripts", list(site.scripts.iter().map(|script| &script.0)));
    out.key("front", quote(site.front.as_deref().unwrap_or_default()));
    out.key(
        "symlinks",
        match &site.symlinks {
            Symlinks::Follow => quote("follow"),
            Symlinks::Within => quote("within"),
            Symlinks::Folders(folders) => list(folders.iter().map(|folder| folder.display())),
        },
    );
    out.key("https_only", site.https_only);
    route_keys(out, config, &site.default_route);
    for each in in_match_order(site) {
        route(out, config, each);
    }
}

/// The site's own name first: it is the label of metrics and logs.
fn hosts(table: &SiteTable, site: &Arc<Site>) -> Vec<String> {
    let exact = table.exact.iter().filter(|(_, other)| Arc::ptr_eq(other, site)).map(|(host, _)| host.clone());
    let wildcard = table.wildcard.iter().filter(|(_, other)| Arc::ptr_eq(other, site)).map(|(host, _)| format!("*{host}"));
    let mut hosts: Vec<String> = exact.chain(wildcard).collect();
    hosts.sort_by_key(|host| (**host != *site.name, host.clone()));
    hosts
}

/// Exact paths before all others, the longest first; then the file's order.
fn in_match_order(site: &Site) -> impl Iterator<Item = &Arc<Route>> {
    let mut exact: Vec<_> = site.exact.iter().collect();
    exact.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
    exact.into_iter().flat_map(|(_, routes)| routes).chain(site.ordered.iter())
}

fn route(out: &mut Out, config: &Config, route: &Route) {
    out.table("[[site.route]]");
    out.comment(match &route.pattern {
        Pattern::Any => "any path",
        Pattern::Exact(_) => "this path alone",
        Pattern::Prefix(_) => "every path that begins so",
        Pattern::Regex(_) => "every path that the expression finds something in",
    });
    out.comment(match route.origin {
        Origin::Exception => format!("| from {}; gives way to the site's own routes", route.at),
        Origin::Site | Origin::Preset => format!("| from {}", route.at),
    });
    out.key("path", quote(&route.path));
    out.key("when", format_args!("{{ {} }}", when(route).join(", ")));
    route_keys(out, config, route);
}

fn route_keys(out: &mut Out, config: &Config, route: &Route) {
    out.key("upstream", quote(route.upstream.as_deref().unwrap_or_default()));
    out.key(
        "files",
        quote(match route.files {
            Files::OrFront => "or-front",
            Files::Or404 => "or-404",
        }),
    );
    // No word stands for "what `files` says": an absent key does.
    match &route.try_files {
        Some(files) => out.key("try_files", list(files)),
        None => out.comment("try_files: as `files` says"),
    }
    out.key("script", quote(route.script.as_deref().unwrap_or_default()));
    out.key(
        "body_limit",
        match route.body_limit {
            u64::MAX => quote("unlimited"),
            limit => size(limit),
        },
    );
    match (route.read_timeout, route.upstream.as_ref().and_then(|name| Some((name, config.upstreams.get(name)?)))) {
        (Some(timeout), _) => out.key("read_timeout", duration(timeout)),
        (None, Some((name, upstream))) => {
            let timeout = duration(upstream.policy.read_timeout);
            out.comment(format_args!("read_timeout: {timeout}, of upstream {name}"));
        }
        (None, None) => out.comment("read_timeout: none, without an upstream"),
    }
    let params: Vec<String> = route.params.iter().map(|(name, value)| format!("{name} = {}", quote(value))).collect();
    out.key(
        "params",
        match params.is_empty() {
            true => "{}".to_owned(),
            false => format!("{{ {} }}", params.join(", ")),
        },
    );
    rules(out, route);
    out.key("lane", quote(route.lane.as_deref().unwrap_or_default()));
    out.key("access_log", quote(if route.access_log { "on" } else { "off" }));
}

fn when(route: &Route) -> Vec<String> {
    let mut all = Vec::new();
    if !route.methods.is_empty() {
        all.push(format!("method = {}", list(&route.methods)));
    }
    all.extend(named(&route.when));
    match route.when.scheme {
        None => {}
        Some(Scheme::Http) => all.push("scheme = \"http\"".to_owned()),
        Some(Scheme::Https) => all.push("scheme = \"https\"".to_owned()),
    }
    all
}

/// Headers, cookies and addresses.
fn named(when: &When) -> Vec<String> {
    let When { headers, cookies, args, from, .. } = when;
    let mut all = Vec::new();
    if !headers.is_empty() {
        let header = |(name, wanted): &(HeaderName, Wanted)| match wanted {
            Wanted::Any => format!("{name}: *"),
            Wanted::Text(text) => format!("{name}: {text}"),
            Wanted::Pattern(regex) => format!("{name}: ~{regex}"),
        };
        all.push(format!("header = {}", list(headers.iter().map(header))));
    }
    let pair = |(name, wanted): &(String, Wanted)| match wanted {
        Wanted::Any => name.clone(),
        Wanted::Text(text) => format!("{name}={text}"),
        Wanted::Pattern(regex) => format!("{name}=~{regex}"),
    };
    for (key, pairs) in [("cookie", cookies), ("arg", args)] {
        if !pairs.is_empty() {
            all.push(format!("{key} = {}", list(pairs.iter().map(pair))));
        }
    }
    if !from.is_empty() {
        all.push(format!("from = {}", list(from)));
    }
    all
}

fn rules(out: &mut Out, route: &Route) {
    out.key("allow", list(&route.access.allow));
    out.key("deny", list(&route.access.deny));
    if let Some(rewrite) = &route.rewrite {
        out.key("rewrite", quote(&rewrite.source));
    }
    out.key("internal", route.internal);
    match &route.basic_auth {
        None => out.key("basic_auth", quote("off")),
        Some(auth) => {
            let (realm, file) = (quote(&auth.realm), quote(auth.file.display()));
            out.key("basic_auth", format_args!("{{ realm = {realm}, file = {file} }}"));
        }
    }
    if let Some(Limit { by, rate, burst, concurrent, .. }) = &route.limit {
        let rate = rate.map_or_else(String::new, |rate| {
            let per = match rate.per.as_secs() {
                1 => "s",
                60 => "m",
                _ => "h",
            };
            format!(", rate = \"{}/{per}\"", rate.count)
        });
        let concurrent = concurrent.map_or_else(String::new, |most| format!(", concurrent = {most}"));
        out.key("limit", format_args!("{{ by = {}{rate}, burst = {burst}{concurrent} }}", quote(&by.source)));
    }
    match route.cors.as_deref() {
        None => out.key("cors", quote("off")),
        Some(Cors { origins, methods, headers, expose, credentials, max_age, .. }) => {
            let (origins, methods, headers, expose) = (list(origins), list(methods), list(headers), list(expose));
            let max_age = duration(*max_age);
            out.key(
                "cors",
                format_args!(
                    "{{ origins = {origins}, methods = {methods}, headers = {headers}, expose = {expose}, credentials = {credentials}, max_age = {max_age} }}"
                ),
            );
        }
    }
    match route.maintenance.as_deref() {
        None => out.key("maintenance", quote("off")),
        Some(Maintenance { page, bypass, retry_after, flag }) => {
            let mut all = named(bypass);
            all.insert(0, format!("page = {}", quote(page.as_deref().unwrap_or_default())));
            all.extend(retry_after.map(|after| format!("retry_after = {}", duration(after))));
            all.push(format!("file = {}", path_or_empty(flag.as_ref().map(|flag| flag.file.as_path()))));
            out.key("maintenance", format_args!("{{ {} }}", all.join(", ")));
        }
    }
    out.key("precompressed", list(route.precompressed.iter().map(|coding| coding.name())));
    match route.compress.as_deref() {
        None => out.key("compress", quote("off")),
        Some(Compress { codings, types, min, private, .. }) => {
            let (codings, types, min) = (list(codings.iter().map(|coding| coding.name())), list(types), size(*min));
            out.key("compress", format_args!("{{ codings = {codings}, types = {types}, min = {min}, private = {private} }}"));
        }
    }
    match &route.action {
        None => {}
        Some(Action::Redirect { to, status }) => {
            out.key("redirect", format_args!("{{ to = {}, status = {} }}", quote(&to.source), status.as_u16()));
        }
        Some(Action::Respond { status, body, content_type }) => {
            let content_type = quote(String::from_utf8_lossy(content_type.as_bytes()));
            let body = quote(&body.source);
            out.key("respond", format_args!("{{ status = {}, body = {body}, type = {content_type} }}", status.as_u16()));
        }
    }
    let pages = route.error_pages.iter().map(|((from, to), page)| {
        let codes = if from == to { from.to_string() } else { format!("{from}-{to}") };
        let page = match page {
            ErrorPage::Path(path) => path.clone(),
            ErrorPage::Url(url) => String::from_utf8_lossy(url.as_bytes()).into_owned(),
        };
        (codes, page)
    });
    // The first of a code is the one that counts, and TOML has each key once.
    let mut shown: Vec<(String, String)> = Vec::new();
    for (codes, page) in pages {
        if !shown.iter().any(|(known, _)| *known == codes) {
            shown.push((codes, page));
        }
    }
    let pages: Vec<String> = shown.iter().map(|(codes, page)| format!("{} = {}", quote(codes), quote(page))).collect();
    out.key("error_page", format_args!("{{ {} }}", pages.join(", ")));
    for (key, edits) in [("headers", &route.headers), ("request_headers", &route.request_headers)] {
        let entries = |all: &[(HeaderName, Text)]| {
            all.iter().map(|(name, text)| format!("{} = {}", quote(name), quote(&text.source))).collect::<Vec<_>>().join(", ")
        };
        let (set, add, default) = (entries(&edits.set), entries(&edits.add), entries(&edits.default));
        let remove = list(&edits.remove);
        out.key(key, format_args!("{{ set = {{ {set} }}, add = {{ {add} }}, default = {{ {default} }}, remove = {remove} }}"));
    }
    out.key("expires", quote(show_expires(route.expires)));
}

fn quote(text: impl Display) -> String {
    let mut quoted = String::from('"');
    for c in text.to_string().chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(quoted, "\\u{:04X}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    // What is no placeholder by now must not be taken for one when this is read.
    quoted.replace("{{", "{\\u007B")
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(quote).collect();
    format!("[{}]", items.join(", "))
}

fn or_word(count: Option<impl Display>, word: &str) -> String {
    count.map_or_else(|| quote(word), |count| count.to_string())
}

fn path_or_empty(path: Option<&Path>) -> String {
    path.map_or_else(|| quote(""), |path| quote(path.display()))
}

fn duration(duration: Duration) -> String {
    quote(show_duration(duration))
}

fn size(bytes: u64) -> String {
    quote(show_size(bytes))
}

fn bytes(bytes: usize) -> String {
    size(u64::try_from(bytes).unwrap_or(u64::MAX))
}
