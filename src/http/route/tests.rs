use std::collections::HashMap;

use proptest::prelude::*;
use regex::Regex;

use super::*;
use crate::model::{
    ordered::Ordered,
    site::{PhpRoot, Symlinks},
};

fn asked<'a>(method: &'a Method, headers: &'a HeaderMap) -> Asked<'a> {
    Asked { method, headers, preflight: None, query: None, from: [192, 0, 2, 1].into(), https: false }
}

pub(in crate::http) fn a_route(path: &str, pattern: Pattern) -> Route {
    Route {
        path: path.into(),
        at: "test".into(),
        origin: Default::default(),
        pattern,
        methods: Vec::new(),
        when: When::default(),
        access: Default::default(),
        rewrite: None,
        limit: None,
        basic_auth: None,
        internal: false,
        action: None,
        error_pages: Vec::new(),
        headers: Default::default(),
        request_headers: Default::default(),
        expires: None,
        cors: None,
        maintenance: None,
        precompressed: Vec::new(),
        compress: None,
        upstream: Some("php".into()),
        files: Files::OrFront,
        try_files: None,
        script: None,
        body_limit: 0,
        read_timeout: None,
        params: Vec::new(),
        access_log: true,
        lane: None,
    }
}

#[test]
fn a_rewrite_keeps_the_query_puts_its_own_before_it_or_drops_it() {
    let to = |target: &str, query| rewritten(target, query).map(|(path, query)| (String::from_utf8(path).unwrap(), query));
    let is = |path: &str, query: Option<&str>| Ok((path.to_owned(), query.map(str::to_owned)));
    assert_eq!(to("/new/a%20b", Some("x=1")), is("/new/a b", Some("x=1")));
    assert_eq!(to("/new", None), is("/new", None));
    assert_eq!(to("/new?p=2", Some("x=1")), is("/new", Some("p=2&x=1")));
    assert_eq!(to("/new?p=2", None), is("/new", Some("p=2")));
    assert_eq!(to("/new?", Some("x=1")), is("/new", None));
    assert_eq!(to("/new?p=2?", Some("x=1")), is("/new", Some("p=2")));
    assert_eq!(to("/a/../../etc", None), Err(Kind::BadPath));
    assert_eq!(to("new", None), Err(Kind::BadRequest));
    // What a group or an argument has brought in.
    for path in ["/pages/../private/a", "/pages/%2e%2e/private", "/pages/a%2f..%2fprivate", "/pages/.."] {
        assert_eq!(to(path, None), Err(Kind::BadPath), "{path}");
    }
}

#[test]
fn a_route_may_ask_for_headers_cookies_and_addresses() {
    let mut site = site_with(&[]);
    let when = |when: When| Route { when, ..a_route("/x", Pattern::Exact("/x".into())) };
    let cases = [
        ("header", When { headers: vec![("x-debug".parse().unwrap(), Wanted::Any)], ..When::default() }),
        ("value", When { headers: vec![("x-tenant".parse().unwrap(), Wanted::Text("b".into()))], ..When::default() }),
        ("cookie", When { cookies: vec![("preview".into(), Wanted::Any)], ..When::default() }),
        (
            "cookie value",
            When { cookies: vec![("variant".into(), Wanted::Pattern(Regex::new("^2$").unwrap()))], ..When::default() },
        ),
        ("argument", When { args: vec![("debug".into(), Wanted::Text("1".into()))], ..When::default() }),
        ("address", When { from: vec!["10.0.0.0/8".parse().unwrap()], ..When::default() }),
    ];
    let routes = cases.iter().map(|(name, w)| Arc::new(Route { path: (*name).into(), ..when(w.clone()) }));
    let last = Route { path: "none".into(), ..when(When::default()) };
    site.exact.insert("/x".into(), routes.chain([Arc::new(last)]).collect());
    let chosen_with = |headers: &[(&str, &str)], from: [u8; 4], query: Option<&str>| {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        let asked = Asked { method: &Method::GET, headers: &map, preflight: None, query, from: from.into(), https: false };
        route(&site, &asked, b"/x").path.clone()
    };
    let chosen = |headers: &[(&str, &str)], from: [u8; 4]| chosen_with(headers, from, None);
    assert_eq!(chosen_with(&[], [192, 0, 2, 1], Some("a=2&debug=1")), "argument");
    assert_eq!(chosen_with(&[], [192, 0, 2, 1], Some("xdebug=1&debug=12")), "none");
    let stranger = [192, 0, 2, 1];
    assert_eq!(chosen(&[], stranger), "none");
    assert_eq!(chosen(&[("X-Debug", "")], stranger), "header");
    assert_eq!(chosen(&[("X-Tenant", "a"), ("X-Tenant", "b")], stranger), "value");
    assert_eq!(chosen(&[("X-Tenant", "c")], stranger), "none");
    assert_eq!(chosen(&[("Cookie", "a=1; preview=")], stranger), "cookie");
    assert_eq!(chosen(&[("Cookie", "variant=2")], stranger), "cookie value");
    assert_eq!(chosen(&[("Cookie", "variant=22; xpreview=1")], stranger), "none");
    assert_eq!(chosen(&[], [10, 1, 2, 3]), "address");
}

fn any_route() -> Route {
    a_route("", Pattern::Any)
}

/// A site as by default, but for its scripts.
pub(in crate::http) fn site_with(scripts: &[&str]) -> Site {
    Site {
        name: "default".into(),
        preset: None,
        root: None,
        php_root: PhpRoot::SameAsRoot,
        index: vec!["index.php".into(), "index.html".into()],
        scripts: scripts.iter().map(|script| ScriptPattern((*script).into())).collect(),
        front: Some("/index.php".into()),
        symlinks: Symlinks::Follow,
        https_only: false,
        exact: HashMap::new(),
        ordered: Ordered::default(),
        default_route: Arc::new(any_route()),
    }
}

#[test]
fn hosts() {
    let named = |name: &str| {
        let mut site = site_with(&[]);
        site.name = name.into();
        Arc::new(site)
    };
    let mut table = SiteTable {
        exact: HashMap::from([("example.com".into(), named("exact")), ("[::1]".into(), named("v6"))]),
        wildcard: vec![(".a.example.com".into(), named("long")), (".example.com".into(), named("short"))],
        default: None,
    };
    let name = |table: &SiteTable, host: &str| site(table, host).map(|site| site.name.to_string());
    for (host, want) in [
        ("example.com", Some("exact")),
        ("EXAMPLE.com:8080", Some("exact")),
        ("example.com.", Some("exact")),
        ("example.com.:80", Some("exact")),
        ("x.example.com", Some("short")),
        ("x.y.example.com", Some("short")),
        ("a.example.com", Some("short")),
        ("x.A.example.com", Some("long")),
        (".example.com", None),
        ("[::1]:80", Some("v6")),
        ("[::1", None),
        ("other", None),
        ("", None),
        ("xexample.com", None),
    ] {
        assert_eq!(name(&table, host).as_deref(), want, "{host}");
    }
    table.default = Some(named("default"));
    assert_eq!(name(&table, "other").as_deref(), Some("default"));
    assert_eq!(name(&table, "").as_deref(), Some("default"));
}

#[test]
fn routes() {
    let mut site = site_with(&[]);
    let ordered = [
        a_route("/a/*", Pattern::Prefix("/a/".into())),
        a_route("~^/private", Pattern::Regex(Regex::new("^/private/.$").unwrap())),
        a_route("/a/b/*", Pattern::Prefix("/a/b/".into())),
    ];
    site.ordered = ordered.into_iter().map(Arc::new).collect::<Vec<_>>().into();
    let mut post = a_route("/a/x", Pattern::Exact("/a/x".into()));
    post.methods = vec![Method::POST];
    let mut get = a_route("/a/x get", Pattern::Exact("/a/x".into()));
    get.methods = vec![Method::GET];
    site.exact.insert("/a/x".into(), vec![Arc::new(post), Arc::new(get)]);
    let path = |method: Method, path: &[u8]| route(&site, &asked(&method, &HeaderMap::new()), path).path.clone();
    assert_eq!(path(Method::POST, b"/a/x"), "/a/x");
    assert_eq!(path(Method::GET, b"/a/x"), "/a/x get");
    assert_eq!(path(Method::HEAD, b"/a/x"), "/a/x get");
    assert_eq!(path(Method::PUT, b"/a/x"), "/a/*");
    assert_eq!(path(Method::GET, b"/a/b/c"), "/a/*");
    assert_eq!(path(Method::GET, b"/a"), "");
    assert_eq!(path(Method::GET, b"/private/\xff"), "~^/private");
    assert_eq!(path(Method::GET, b"/"), "");
}

proptest! {
    /// Over paths of two letters, where prefixes nest and repeat.
    #[test]
    fn candidates_are_what_looking_at_every_route_finds(prefixes in prop::collection::vec("[ab/]{0,4}", 0..24), path in "[ab/]{0,6}") {
        let routes = prefixes.iter().enumerate().map(|(nth, prefix)| {
            let pattern = match nth % 5 {
                4 => Pattern::Regex(Regex::new(prefix).unwrap()),
                _ => Pattern::Prefix(prefix.clone()),
            };
            Arc::new(a_route(&nth.to_string(), pattern))
        });
        let ordered = Ordered::from(routes.collect::<Vec<_>>());
        let names = |routes: Vec<&Arc<Route>>| routes.iter().map(|route| route.path.clone()).collect::<Vec<_>>();
        let fits = |route: &&Arc<Route>| match &route.pattern {
            Pattern::Prefix(prefix) => path.starts_with(prefix.as_str()),
            _ => true,
        };
        prop_assert_eq!(names(ordered.candidates(path.as_bytes()).collect()), names(ordered.iter().filter(fits).collect()));
    }
}

fn script(name: &str) -> Target<'_> {
    Target::Script(Script::named(name))
}

/// The decision in words, for tables.
fn words(target: &Target<'_>) -> String {
    let script = |script: &Script<'_>| {
        let info = String::from_utf8_lossy(script.path_info).into_owned();
        let query = script.query.as_ref().map(|query| format!("?{query}")).unwrap_or_default();
        format!("run {}{}{query}", script.name, if info.is_empty() { String::new() } else { format!("|{info}") })
    };
    match target {
        Target::Script(found) => script(found),
        Target::Status(status) => format!("={}", status.as_u16()),
        Target::NotFound(refusal) => format!("{refusal:?}"),
        Target::Lookup(lookup) => {
            let mut words = Vec::new();
            for step in &lookup.steps {
                words.push(match step {
                    Step::File(path) => format!("file {}", String::from_utf8_lossy(path)),
                    Step::Script(name) => format!("script {name}"),
                    Step::Directory { path, index } => {
                        let names: Vec<_> = index
                            .iter()
                            .map(|index| match index {
                                Index::File(name) => name.clone(),
                                Index::Script { name, must_exist } => format!("{name}{}", if *must_exist { "?" } else { "" }),
                            })
                            .collect();
                        format!("dir {} [{}]", String::from_utf8_lossy(path), names.join(" "))
                    }
                });
            }
            words.push(match &lookup.otherwise {
                Otherwise::Script(found) => script(found),
                Otherwise::Status(status) => format!("={}", status.as_u16()),
                Otherwise::NotFound => "=404".into(),
            });
            words.join(", ")
        }
    }
}

#[test]
fn a_framework_by_default() {
    let site = site_with(&["/index.php"]);
    let route = any_route();
    let ask = |path: &str, root| words(&target(&site, &route, path.as_bytes(), None, root));
    // The home page of a PHP application costs no look at the file system.
    assert_eq!(ask("/", true), "run /index.php");
    assert_eq!(ask("/posts", true), "file /posts, dir /posts [index.html], run /index.php");
    assert_eq!(ask("/posts/", true), "dir /posts/ [index.html], run /index.php");
    assert_eq!(ask("/posts", false), "run /index.php");
    assert_eq!(ask("/app.css", false), "run /index.php");
    assert_eq!(ask("/index.php/a/b", true), "run /index.php|/a/b");
    assert_eq!(ask("/.env", true), "Dotfile");
    assert_eq!(ask("/a/.git/config", true), "Dotfile");
    assert_eq!(ask("/.well-known/acme", true), "file /.well-known/acme, dir /.well-known/acme [index.html], run /index.php");
    assert_eq!(ask("/.well-known/.htpasswd", true), "Dotfile");
    assert_eq!(ask("/.well-knownx", true), "Dotfile");
    assert_eq!(ask("/index.php/.x", true), "run /index.php|/.x");
    assert_eq!(ask("/evil.php", true), "UndeclaredScript");
    assert_eq!(ask("/upload.jpg/x.PHP", true), "UndeclaredScript");
    assert_eq!(ask("/a\\b", true), "run /index.php");
}

#[test]
fn or_404_has_no_front() {
    let site = site_with(&["/index.php"]);
    let mut route = any_route();
    route.files = Files::Or404;
    let ask = |path: &str, root| words(&target(&site, &route, path.as_bytes(), None, root));
    assert_eq!(ask("/a.css", true), "file /a.css, dir /a.css [index.html], =404");
    assert_eq!(ask("/a.css", false), "Missing");
    assert_eq!(ask("/a\\b", true), "Missing");
}

#[test]
fn wordpress_folders() {
    let site = site_with(&["/index.php", "/wp-login.php", "/wp-admin/*.php", "/shop/index.php"]);
    let route = any_route();
    let ask = |path: &str, root| words(&target(&site, &route, path.as_bytes(), None, root));
    // By a glob: only if it is there.
    assert_eq!(ask("/wp-admin/", true), "dir /wp-admin/ [/wp-admin/index.php? index.html], run /index.php");
    assert_eq!(ask("/wp-admin", true), "file /wp-admin, dir /wp-admin [/wp-admin/index.php? index.html], run /index.php");
    assert_eq!(ask("/wp-admin/", false), "run /wp-admin/index.php");
    // By its name: the operator's word is enough.
    assert_eq!(ask("/shop/", true), "run /shop/index.php");
    assert_eq!(ask("/shop", true), "file /shop, dir /shop [/shop/index.php index.html], run /index.php");
    assert_eq!(ask("/shop", false), "run /index.php");
    assert_eq!(ask("/wp-login.php", true), "run /wp-login.php");
    assert_eq!(ask("/xmlrpc.php", true), "UndeclaredScript");
}

#[test]
fn an_index_before_php_is_looked_for_first() {
    let mut site = site_with(&["/index.php"]);
    site.index = vec!["index.html".into(), "index.php".into(), "never.html".into()];
    assert_eq!(words(&target(&site, &any_route(), b"/", None, true)), "dir / [index.html], run /index.php");
    assert_eq!(words(&target(&site, &any_route(), b"/", None, false)), "run /index.php");
}

#[test]
fn no_upstream_runs_nothing_and_shows_no_source() {
    let site = site_with(&["/index.php"]);
    let mut route = any_route();
    route.upstream = None;
    let ask = |path: &str| words(&target(&site, &route, path.as_bytes(), None, true));
    assert_eq!(ask("/index.php"), "NoUpstream");
    assert_eq!(ask("/"), "dir / [index.html], =404");
    assert_eq!(ask("/x"), "file /x, dir /x [index.html], =404");
}

#[test]
fn a_routes_own_script() {
    let site = site_with(&["/index.php"]);
    let mut route = any_route();
    route.script = Some("/api.php".into());
    let ask = |path: &'static str| target(&site, &route, path.as_bytes(), None, true);
    assert_eq!(ask("/v1/x"), script("/api.php"));
    assert_eq!(words(&ask("/api.php/x")), "run /api.php|/x");
    assert_eq!(ask("/.x"), script("/api.php"));
}

#[test]
fn try_files_lists() {
    let site = site_with(&["/index.php", "/lib/*.php"]);
    let ask = |list: &[&str], path: &str| {
        let mut route = any_route();
        route.try_files = Some(list.iter().map(|item| (*item).to_owned()).collect());
        words(&target(&site, &route, path.as_bytes(), Some("a=1"), true))
    };
    assert_eq!(ask(&["$uri", "$uri/", "/index.php"], "/x"), "file /x, dir /x [index.html], run /index.php");
    assert_eq!(ask(&["$uri", "/index.php?$query_string"], "/x"), "file /x, run /index.php?a=1");
    assert_eq!(ask(&["$uri", "/index.php?q=$uri&$args"], "/x&y=\"2"), "file /x&y=\"2, run /index.php?q=/x%26y%3D%222&a=1");
    assert_eq!(ask(&["$uri", "/index.php$is_args$args"], "/x"), "file /x, run /index.php?a=1");
    assert_eq!(ask(&["$uri", "/index.php?price=$5"], "/x"), "file /x, run /index.php?price=$5");
    assert_eq!(ask(&["$uri", "=410"], "/x"), "file /x, =410");
    assert_eq!(ask(&["=403"], "/x"), "=403");
    assert_eq!(ask(&["=nonsense"], "/x"), "=404");
    assert_eq!(ask(&["$uri.html", "/static$uri", "/offline.html"], "/x"), "file /x.html, file /static/x, file /offline.html, =404");
    assert_eq!(ask(&["$uri", "$uri/"], "/x/"), "dir /x/ [index.html], =404");
    assert_eq!(ask(&["$uri.html", "=404"], "/"), "=404");
    // A list must not serve the source of a script, nor run an undeclared one.
    assert_eq!(ask(&["$uri.php", "/evil.php"], "/x"), "Missing");
    assert_eq!(ask(&["$uri.php", "=404"], "/lib/a"), "script /lib/a.php, =404");
    assert_eq!(ask(&["$uri", "/lib/a.php/info"], "/x"), "file /x, run /lib/a.php|/info");
    assert_eq!(ask(&["$uri", "@php"], "/x"), "file /x, =404");
    assert_eq!(ask(&[], "/x"), "Missing");
}

proptest! {
    /// Whatever the path, no step names a script or leaves the root.
    #[test]
    fn no_step_is_dangerous(raw in "(/|a|\\.|\\.\\.|\\.php|\\.PhP5|%2e|%2f|index|%ff| |\\\\|wp-admin){0,10}", list in any::<bool>()) {
        let site = site_with(&["/index.php", "/wp-admin/*.php"]);
        let mut route = any_route();
        if list {
            let items = ["$uri", "$uri.php", "/x$uri/", "$uri/index.php", "/index.php?$uri"];
            route.try_files = Some(items.iter().map(|item| (*item).to_owned()).collect());
        }
        let raw = format!("/{raw}");
        let Ok(path) = normalize(&raw) else { return Ok(()) };
        let Target::Lookup(lookup) = target(&site, &route, &path, Some("a"), true) else { return Ok(()) };
        for step in lookup.steps {
            if let Step::File(path) | Step::Directory { path, .. } = step {
                prop_assert!(path.starts_with(b"/") && !looks_like_php(&path), "{}", path.escape_ascii());
                prop_assert!(path.split(|byte| *byte == b'/').all(|segment| segment != b".."));
                prop_assert!(!path.contains(&b'\\') && !path.windows(2).any(|pair| pair == b"//" || pair == b"/."));
            }
        }
    }
}
