//! `[[site]]`: hosts, folders, what PHP may run. Routes are in `routes`.

use std::{collections::HashMap, net::Ipv6Addr, path::PathBuf, sync::Arc};

use super::{
    Folder,
    document::{Kind, Place},
    glob,
    presets::{self, Presets},
    reader::{Reader, Value},
    routes::{self, Keys, Tried},
    upstreams::Upstreams,
};
use crate::model::{
    Site, SiteTable,
    rules::When,
    settings::Drain,
    site::{Pattern, PhpRoot, ScriptPattern, Symlinks},
};

pub const DEFAULT_FRONT: &str = "/index.php";

/// What the reading of a site needs to know of the rest of the file.
pub struct Around<'a> {
    pub upstreams: &'a Upstreams,
    pub drain: &'a Drain,
    pub presets: &'a Presets,
    /// A trusted proxy may say that its client came by https.
    pub has_trusted: bool,
    pub has_tls: bool,
}

pub fn read(top: &mut Reader<'_>, around: &Around<'_>, folders: &mut Vec<Folder>) -> SiteTable {
    let mut table = SiteTable::default();
    let mut taken = Hosts::default();
    let sites = top.sections("site", "site");
    // A wrong [[site]] has been reported; that there is none is worth saying only where none was tried.
    if sites.is_empty() && !top.has("site") {
        let help = "add [[site]] with root and upstream".to_owned();
        top.report.problem(Place::default(), "there is no site: every request would be answered 421", Some(help));
    }
    for reader in sites {
        let (hosts, site) = read_site(reader, around, &mut taken, folders);
        let site = Arc::new(site);
        if hosts.is_empty() {
            table.default.get_or_insert(site);
            continue;
        }
        for host in hosts {
            match host.strip_prefix('*') {
                Some(suffix) => table.wildcard.push((suffix.to_owned(), site.clone())),
                None => {
                    table.exact.insert(host, site.clone());
                }
            }
        }
    }
    // The longest first: *.shop.example.com before *.example.com; the name breaks ties, so that the order is stable.
    table.wildcard.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
    table
}

/// The site's own keys that a preset may have too.
struct Own {
    index: Vec<String>,
    scripts: Vec<ScriptPattern>,
    front: Option<String>,
    symlinks: Symlinks,
}

impl Own {
    fn standard() -> Self {
        Own {
            index: vec!["index.php".to_owned(), "index.html".to_owned()],
            scripts: vec![ScriptPattern(DEFAULT_FRONT.to_owned())],
            front: Some(DEFAULT_FRONT.to_owned()),
            symlinks: Symlinks::Follow,
        }
    }

    fn read(t: &mut Reader<'_>, above: Own) -> Self {
        Own {
            index: t.read("index", above.index, |v| {
                v.list(|v| match v.filled_text()? {
                    text if text.contains('/') => {
                        v.refuse(format!("{text:?} is not a file's name"), "write a name without a slash, as in \"index.html\"")
                    }
                    text => Some(text.to_owned()),
                })
            }),
            scripts: t.read("scripts", above.scripts, |v| v.list(script)),
            front: t.read("front", above.front, Value::url_path_or_none),
            symlinks: t.read("symlinks", above.symlinks, symlinks),
        }
    }
}

#[derive(Default)]
struct Hosts {
    places: HashMap<String, Place>,
    default: Option<Place>,
}

fn read_site(mut t: Reader<'_>, around: &Around<'_>, taken: &mut Hosts, folders: &mut Vec<Folder>) -> (Vec<String>, Site) {
    let before = t.report.count();
    let hosts = hosts(&mut t, taken);
    let name: Arc<str> = Arc::from(hosts.first().map_or("default", String::as_str));

    let root = t.read("root", None, Value::folder).map(PathBuf::from);
    match &root {
        Some(root) => folders.push(Folder::new(t.report, t.place("root"), "site.root", root)),
        None => t.report.warn(t.place("root"), format!("site `{name}` has no `root`: no static files")),
    }
    let php_root = t.read("php_root", PhpRoot::SameAsRoot, |v| match v.text()? {
        "realpath" => Some(PhpRoot::RealPath),
        _ => Some(v.folder()?.map_or(PhpRoot::SameAsRoot, PhpRoot::Path)),
    });
    let preset = t.read("preset", None, |v| presets::chosen(v, around.presets).map(Some));
    let mut tried = Vec::new();
    // What the site writes itself wins; its routes are looked through first.
    let (own, keys, preset_reader) = match preset {
        None => (Own::standard(), Keys::standard(), None),
        Some((name, mut reader)) => {
            let own = Own::read(&mut reader, Own::standard());
            let keys = Keys::read(&mut reader, &Keys::standard(), around, &[], &mut tried);
            (own, keys, Some((name, reader)))
        }
    };
    let own = Own::read(&mut t, own);
    let keys = Keys::read(&mut t, &keys, around, &[], &mut tried);
    let mut routes = routes::read(&mut t, &keys, around, &mut tried);
    let default_route = Arc::new(keys.route(String::new(), t.report.place(t.at), Pattern::Any, Vec::new(), When::default()));
    let preset = preset_reader.map(|(name, mut reader)| {
        routes.extend(routes::read(&mut reader, &keys, around, &mut tried), &default_route);
        presets::finish(reader);
        name
    });
    let Own { index, scripts, front, symlinks } = own;
    let https_only = t.read("https_only", false, Value::boolean);
    if https_only && !around.has_trusted && !around.has_tls {
        let message = "`https_only`, but nobody comes by https: there is no `listen.https`, and `listen.trusted_proxies` is empty";
        t.report.warn(t.place("https_only"), message);
    }
    let site = Site {
        name,
        preset,
        root,
        php_root,
        index,
        scripts,
        front,
        symlinks,
        https_only,
        exact: routes.exact,
        ordered: routes.ordered.into(),
        default_route,
    };
    if t.report.count() == before {
        check_php(&t, &site, around.upstreams, &tried);
    }
    t.finish();
    (hosts, site)
}

fn hosts(t: &mut Reader<'_>, taken: &mut Hosts) -> Vec<String> {
    let mut wrong = false;
    let hosts = t.read("hosts", Vec::new(), |v| {
        let list = v.list(|v| {
            let Some(host) = host(v) else {
                wrong = true;
                return None;
            };
            if let Some(first) = taken.places.get(&host) {
                let message = format!("the host \"{host}\" is taken already");
                return v.refuse(message, format!("it stands at {}; a host belongs to one site", v.report.place(*first)));
            }
            taken.places.insert(host.clone(), v.node.at);
            Some(host)
        });
        wrong |= list.is_none();
        list
    });
    let none = t.ask("hosts").is_none_or(|v| matches!(&v.node.kind, Kind::List(items) if items.is_empty()));
    if none && !wrong {
        match taken.default {
            Some(first) => {
                let help = format!("the other is at {}; give one of them hosts = [\"example.com\"]", t.report.place(first));
                t.report.problem(t.place("hosts"), "a second site without `hosts`: only one can be the default", Some(help));
            }
            None => taken.default = Some(t.at),
        }
    }
    hosts
}

/// A host as requests are matched: lower-case, without port and closing dot.
pub fn host(v: &Value<'_>) -> Option<String> {
    let text = v.text()?;
    let host = text.to_ascii_lowercase();
    let host = host.strip_suffix('.').unwrap_or(&host);
    let help = match host {
        "" => "leave `hosts` itself empty for the default site".to_owned(),
        "*" | "_" => "leave `hosts` empty for the default site, which takes all other hosts".to_owned(),
        _ if host.contains('/') => "write the host alone, as in \"example.com\"".to_owned(),
        _ if !host.is_ascii() => "write it as browsers send it, in punycode: \"xn--…\"".to_owned(),
        _ if host.starts_with('[') && host.ends_with(']') => match host[1..host.len() - 1].parse::<Ipv6Addr>() {
            Ok(address) => return Some(format!("[{address}]")),
            Err(_) => "write an IPv6 address in brackets, as in \"[::1]\"".to_owned(),
        },
        _ if host.parse::<Ipv6Addr>().is_ok() => format!("write \"[{host}]\", in brackets"),
        _ if host.contains(':') => {
            format!("write \"{}\": a host matches on every port", host.split(':').next().unwrap_or_default())
        }
        _ if host.strip_prefix("*.").unwrap_or(host).contains('*') => {
            "a * stands only for what is before the first dot: \"*.example.com\"".to_owned()
        }
        _ if host.len() > 253 => "a host's name has at most 253 characters".to_owned(),
        _ => {
            let labels = host.strip_prefix("*.").unwrap_or(host);
            let fine =
                |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
            if labels.split('.').all(fine) {
                return Some(host.to_owned());
            }
            "a host is of letters, digits, dots and `-`".to_owned()
        }
    };
    v.refuse(format!("{text:?} is not a host"), help)
}

fn script(v: &Value<'_>) -> Option<ScriptPattern> {
    if v.text()?.starts_with('~') {
        return v.refuse("scripts are no expressions", "write exact paths, or \"/*.php\" for those of one folder");
    }
    let text = v.url_path()?;
    if text.ends_with('/') {
        return v.refuse(format!("{text:?} is a folder"), format!("write \"{text}*.php\" for the scripts in it"));
    }
    if text.split('/').any(|part| part == "." || part == "..") {
        return v.refuse(format!("{text:?} has a `.` or `..` in it"), "write the path as it is requested");
    }
    if text.ends_with('*') {
        // The classic hole: an upload folder in which a picture is run as PHP.
        v.report.warn(
            v.node.at,
            format!("`{}`: {text:?} runs every file there as PHP, uploads too; \"{text}.php\" runs scripts only", v.path),
        );
    }
    Some(ScriptPattern(text.to_owned()))
}

fn symlinks(v: &Value<'_>) -> Option<Symlinks> {
    match &v.node.kind {
        Kind::List(items) if items.is_empty() => v.refuse("the list is empty", "write \"within\" for links that stay in the root"),
        Kind::List(_) => {
            let folders = v.list(|v| match v.folder()? {
                Some(folder) => Some(PathBuf::from(folder)),
                None => v.refuse("a folder is empty", "write an absolute path"),
            })?;
            Some(Symlinks::Folders(folders))
        }
        Kind::Text(text) if text == "follow" => Some(Symlinks::Follow),
        Kind::Text(text) if text == "within" => Some(Symlinks::Within),
        Kind::Text(text) => v.refuse(format!("{text:?} is not known"), "write \"follow\", \"within\" or a list of folders"),
        kind => v.wrong(
            format!("`{}` is {}, neither a word nor a list", v.path, kind.name()),
            "write \"follow\", \"within\" or a list of folders".to_owned(),
        ),
    }
}

/// Whether everything that PHP is asked to run can be run.
fn check_php(t: &Reader<'_>, site: &Site, upstreams: &Upstreams, tried: &[Tried]) {
    let all = site.routes().chain(std::iter::once(&site.default_route));
    let mut used: Vec<&str> = all.filter_map(|route| route.upstream.as_deref()).collect();
    used.sort_unstable();
    used.dedup();
    if used.is_empty() {
        return;
    }
    for name in used {
        let has_place =
            |upstream: &super::UpstreamConfig| upstream.sets.iter().all(|set| set.root.is_some() || set.php_root.is_some());
        if site.root.is_none() && !matches!(site.php_root, PhpRoot::Path(_)) && !upstreams.get(name).is_some_and(has_place) {
            let help = "write `root`, or `php_root` where the files are only on FPM's side".to_owned();
            let message = format!("site `{}`: nothing says where upstream `{name}` finds its scripts", site.name);
            t.report.problem(t.place("upstream"), message, Some(help));
        }
    }
    if let Some(front) = &site.front
        && !may_answer(site, front)
    {
        let (at, which) = match t.has("front") {
            true => (t.place("front"), String::new()),
            false => (t.place("scripts"), " (its default)".to_owned()),
        };
        let help = match site.scripts.first() {
            Some(ScriptPattern(first)) if !first.contains('*') => {
                format!("write front = \"{first}\", or add \"{front}\" to `scripts`")
            }
            _ => format!("add \"{front}\" to `scripts`, or write front = \"\" for none"),
        };
        t.report.problem(at, format!("`site.front` is \"{front}\"{which}, which `scripts` does not declare"), Some(help));
    }
    for Tried { at, last } in tried {
        if !may_answer(site, last) {
            let help = format!("add \"{last}\" to the site's `scripts`");
            t.report.problem(*at, format!("`try_files` ends in \"{last}\", which `scripts` does not declare"), Some(help));
        }
    }
}

/// A declared script, or a file that is no PHP. The endings are those that http::route never serves as files.
fn may_answer(site: &Site, path: &str) -> bool {
    let ending = path.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    let is_php = match ending.strip_prefix("php") {
        Some(version) => version == "s" || version.bytes().all(|b| b.is_ascii_digit()),
        None => matches!(ending.as_str(), "phtml" | "phar" | "pht"),
    };
    !is_php || site.scripts.iter().any(|pattern| glob::matches(&pattern.0, path))
}
