//! `slackwater check --url`: which site and route take a request, and what would answer it. Nothing is sent, and no file looked for.

use http::{HeaderMap, Method, Request, Uri};

use crate::{
    control::config::Config,
    http::{
        route::{self, Asked, Index, Lookup, Otherwise, Script, Step, Target},
        variables::{Place, Variables},
    },
    model::{
        Peer, Route, Site,
        peer::{ClientInfo, without_port},
        rules::Action,
    },
};

/// A GET without headers, from this machine.
///
/// # Errors
/// Why there is no such request.
pub fn explain(config: &Config, url: &str) -> Result<String, String> {
    let uri: Uri = url.parse().map_err(|error| format!("{url:?} is no URL: {error}"))?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(format!("{url:?} has no scheme and host: write http://example.com/path"));
    };
    let (https, host) = (scheme == "https", authority.as_str());
    let mut lines = Vec::new();
    let Some(site) = route::site(&config.sites, host) else {
        return Ok(format!("421: no site has the host {}, and none is without `hosts`\n", without_port(host)));
    };
    lines.push(format!("site    {}", site.name));
    let request = Request::get(&uri).body(()).map_err(|error| error.to_string())?;
    let (parts, ()) = request.into_parts();
    let mut path = match route::normalize(uri.path()) {
        Ok(path) => path.into_owned(),
        Err(kind) => return Ok(format!("{}: {}\n", kind.status().as_u16(), kind.cause())),
    };
    let mut query = uri.query().map(str::to_owned);
    let from = std::net::Ipv4Addr::LOCALHOST.into();
    let client = ClientInfo { address: from, port: 0, https, server_port: if https { 443 } else { 80 }, host: host.to_owned() };
    let peer = Peer {
        remote: (from, 0).into(),
        local: (from, client.server_port).into(),
        tls: https,
        tls_before: false,
        is_untold: false,
    };
    for _ in 0..10 {
        let headers = HeaderMap::new();
        let asked = Asked { method: &Method::GET, headers: &headers, preflight: None, query: query.as_deref(), from, https };
        let route = route::route(site, &asked, &path);
        lines.push(format!("path    {}", String::from_utf8_lossy(&path)));
        lines.push(match route.path.as_str() {
            "" => format!("route   none: the site's own keys, {}", route.at),
            written => format!("route   {written}  ({})", route.at),
        });
        let Some(rewrite) = &route.rewrite else {
            lines.extend(guards(route));
            lines.push(format!("answer  {}", answer(site, route, &path, query.as_deref())));
            return Ok(lines.join("\n") + "\n");
        };
        let variables =
            Variables { parts: &parts, client: &client, peer: &peer, site, route, path: &path, query: query.as_deref(), id: "" };
        let target = variables.fill(rewrite, Place::Rewrite);
        lines.push(format!("rewrite {target}"));
        match route::rewritten(&target, query.as_deref()) {
            Ok((next, next_query)) => (path, query) = (next, next_query),
            Err(kind) => return Ok(format!("{}\nanswer  {}\n", lines.join("\n"), kind.status().as_u16())),
        }
    }
    Ok(lines.join("\n") + "\nanswer  500: more than ten rewrites\n")
}

/// What may refuse it before anything answers.
fn guards(route: &Route) -> Vec<String> {
    let mut all = Vec::new();
    if let Some(maintenance) = &route.maintenance {
        all.push(match &maintenance.flag {
            None => "503 for all but a few: maintenance".to_owned(),
            Some(flag) => format!("503 for all but a few while {} is there: maintenance", flag.file.display()),
        });
    }
    if !route.access.deny.is_empty() || !route.access.allow.is_empty() {
        all.push("403 for some addresses: allow, deny".to_owned());
    }
    if route.limit.is_some() {
        all.push("429 for who asks too often or for too much: limit".to_owned());
    }
    if let Some(auth) = &route.basic_auth {
        all.push(format!("401 without a password of {}: basic_auth", auth.file.display()));
    }
    all.into_iter().map(|guard| format!("guard   {guard}")).collect()
}

fn answer(site: &Site, route: &Route, path: &[u8], query: Option<&str>) -> String {
    if route.internal {
        return "404: the route is internal".to_owned();
    }
    match &route.action {
        Some(Action::Redirect { to, status }) => return format!("{} to {}", status.as_u16(), to.source),
        Some(Action::Respond { status, .. }) => return format!("{}: respond", status.as_u16()),
        None => {}
    }
    match route::target(site, route, path, query, site.root.is_some()) {
        Target::Script(script) => say(&script),
        Target::Status(status) => format!("{}: try_files", status.as_u16()),
        Target::NotFound(why) => format!("404: {}", why.say()),
        Target::Lookup(Lookup { steps, otherwise }) => {
            let mut all: Vec<String> = steps.iter().map(step).collect();
            all.push(match otherwise {
                Otherwise::Script(script) => say(&script),
                Otherwise::Status(status) => format!("{}: try_files", status.as_u16()),
                Otherwise::NotFound => "404".to_owned(),
            });
            all.join(", else ")
        }
    }
}

fn step(step: &Step) -> String {
    match step {
        Step::File(path) => format!("the file {}", String::from_utf8_lossy(path)),
        Step::Script(name) => format!("the script {name} if it is there"),
        Step::Directory { path, index } => {
            let index = index.iter().map(|index| match index {
                Index::File(name) => name.clone(),
                Index::Script { name, .. } => format!("the script {name}"),
            });
            format!("the index of {}: {}", String::from_utf8_lossy(path), index.collect::<Vec<_>>().join(" or "))
        }
    }
}

fn say(script: &Script<'_>) -> String {
    let mut said = format!("the script {}", script.name);
    if !script.path_info.is_empty() {
        said += &format!(" with PATH_INFO {}", String::from_utf8_lossy(script.path_info));
    }
    if let Some(query) = &script.query {
        said += &format!(" and the query {query:?}");
    }
    said
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::control::config::{Source, parse};

    fn explained(url: &str) -> String {
        let text = "upstream.php.set.blue.endpoints = [\"127.0.0.1:9000\"]\n[[site]]\nhosts = [\"a.example\"]\nroot = \"/r\"\nupstream = \"php\"\npreset = \"drupal\"\n\
                    [[site.route]]\npath = \"/old/*\"\nrewrite = \"/new?x=1\"\n[[site.route]]\npath = \"/admin/*\"\nallow = [\"10.0.0.0/8\"]\n";
        let source = Source { file: PathBuf::from("s.toml"), text: text.to_owned() };
        let config = parse(source, &mut |_| Ok(Vec::new()), &|_| None).unwrap();
        explain(&config, url).unwrap_or_else(|why| why)
    }

    #[test]
    fn a_url_is_explained() {
        assert!(explained("http://b.example/").starts_with("421: no site has the host b.example"));
        assert_eq!(
            explained("https://a.example/index.php/x"),
            "site    a.example\npath    /index.php/x\nroute   none: the site's own keys, s.toml:2:1\nanswer  the script /index.php with PATH_INFO /x\n"
        );
        let closed = explained("http://a.example/core/a.yml");
        assert!(closed.contains("(preset drupal:") && closed.ends_with("answer  404: the route is internal\n"), "{closed}");
        let rewritten = explained("http://a.example/old/1?y=2");
        assert!(rewritten.contains("rewrite /new?x=1\npath    /new\n"), "{rewritten}");
        assert!(
            explained("http://a.example/admin/x")
                .contains("guard   403 for some addresses: allow, deny\nanswer  the file /admin/x, else ")
        );
        assert!(explained("http://a.example/.env").ends_with("404: a name in it begins with a dot\n"));
        assert!(explained("/x").contains("no scheme and host"));
    }
}
