//! The request of a preflight, as the site would send a user's request for that path: site, script and root on the pod. Asks the
//! file system only for `php_root = "realpath"`.

use std::borrow::Cow;

use super::{
    forward,
    route::{self, Asked, Index, Otherwise, Script, Step, Target},
};
use crate::{
    model::{
        SiteTable,
        upstream::{Preflight, SetConfig},
    },
    upstream::probe::Question,
};

/// Where nothing is said of the host: what a browser on this machine would say.
const HOST: &str = "localhost";

/// # Errors
/// Why that path is never answered by PHP of this upstream.
pub fn question(sites: &SiteTable, upstream: &str, set: &SetConfig, preflight: &Preflight) -> Result<Question, String> {
    let host = preflight.host.as_deref();
    let site = match host {
        Some(host) => route::site(sites, host).ok_or_else(|| format!("no site has the host {host}"))?,
        None => sites.default.as_ref().ok_or("there is no default site; give preflight a host")?,
    };
    let (path, query) = preflight.path.split_once('?').unwrap_or((&preflight.path, ""));
    let normal = route::normalize(path).map_err(|_| format!("the path {path} is malformed"))?;
    let asked = Asked {
        method: &http::Method::GET,
        headers: &http::HeaderMap::new(),
        preflight: None,
        query: Some(query),
        from: std::net::Ipv4Addr::LOCALHOST.into(),
        https: preflight.https,
    };
    let route = route::route(site, &asked, &normal);
    if route.upstream.as_deref() != Some(upstream) {
        return Err(format!("{path} on site {} is not answered by upstream {upstream}", site.name));
    }
    let script = script(route::target(site, route, &normal, Some(query), site.root.is_some()))
        .ok_or_else(|| format!("{path} on site {} is not answered by PHP", site.name))?;
    let site_root = forward::php_root(site)
        .unwrap_or_else(|root| std::fs::canonicalize(root).as_deref().unwrap_or(root).to_string_lossy().into_owned().into());
    let document_root = forward::document_root(set, &site_root).to_owned();
    Ok(Question {
        uri: preflight.path.clone(),
        query: script.query.unwrap_or_else(|| query.to_owned()),
        host: host.unwrap_or(HOST).to_owned(),
        https: preflight.https,
        params: route.params.clone(),
        script_name: script.name.into_owned(),
        path_info: String::from_utf8_lossy(script.path_info).into_owned(),
        document_root,
    })
}

/// What PHP would run where no file of that name is there.
fn script(target: Target<'_>) -> Option<Script<'_>> {
    match target {
        Target::Script(script) => Some(script),
        Target::Lookup(lookup) => {
            let index = lookup.steps.into_iter().find_map(|step| match step {
                Step::Directory { path, index } if path.ends_with(b"/") => index.into_iter().find_map(|index| match index {
                    Index::Script { name, must_exist: false } => Some(name),
                    _ => None,
                }),
                _ => None,
            });
            match (index, lookup.otherwise) {
                (Some(name), _) => Some(Script { name: Cow::Owned(name), path_info: b"", query: None }),
                (None, Otherwise::Script(script)) => Some(script),
                (None, _) => None,
            }
        }
        Target::Status(_) | Target::NotFound(_) => None,
    }
}
