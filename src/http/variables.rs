//! What the variables of a [`Text`] stand for in a request. Pure.

use std::borrow::Cow;

use http::{HeaderMap, header, request::Parts};

use super::route::{encode, lossless};
use crate::model::{
    Peer, Route, Site,
    peer::{ClientInfo, without_port},
    site::Pattern,
    text::{Piece, Text, Variable, argument},
};

/// The request as variables see it.
pub struct Variables<'a> {
    pub parts: &'a Parts,
    pub client: &'a ClientInfo,
    pub peer: &'a Peer,
    pub site: &'a Site,
    pub route: &'a Route,
    /// Decoded and normalized, and rewritten where a route has done that.
    pub path: &'a [u8],
    /// The same of the query.
    pub query: Option<&'a str>,
    pub id: &'a str,
}

/// Where the text goes: what a client has sent must not end a header line, nor become another part of a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Header,
    Location,
    /// Before its own `?` the path that a rewrite leads to.
    Rewrite,
    Body,
}

impl Variables<'_> {
    pub fn fill(&self, text: &Text, place: Place) -> String {
        let mut out = String::with_capacity(text.source.len());
        for piece in &text.pieces {
            match piece {
                Piece::Literal(literal) => out.push_str(literal),
                Piece::Variable(variable) => self.put(&mut out, variable, place),
            }
        }
        out
    }

    fn put(&self, out: &mut String, variable: &Variable, place: Place) {
        // The bytes themselves, where they are no text too.
        if *variable == Variable::Uri && matches!(place, Place::Location | Place::Rewrite) {
            return encode(out, self.path);
        }
        let value = self.value(variable);
        match place {
            // Decoded parts of the path are percent-encoded again; the query and the target are as they were sent, which hyper has checked.
            Place::Location | Place::Rewrite if matches!(variable, Variable::Capture(_)) => {
                encode(out, &lossless::to_bytes(&value));
            }
            // What a client chooses must not end the path, nor be decoded once more.
            Place::Rewrite
                if !out.contains('?') && matches!(variable, Variable::Arg(_) | Variable::Cookie(_) | Variable::Header(_)) =>
            {
                encode(out, value.as_bytes());
            }
            // No text: they show as U+FFFD.
            Place::Header | Place::Body if matches!(variable, Variable::Capture(_)) => {
                let shown = String::from_utf8_lossy(&lossless::to_bytes(&value)).into_owned();
                out.extend(shown.chars().filter(|c| place == Place::Body || !c.is_control()));
            }
            Place::Location | Place::Rewrite | Place::Header => out.extend(value.chars().filter(|c| !c.is_control())),
            Place::Body => out.push_str(&value),
        }
    }

    fn value(&self, variable: &Variable) -> Cow<'_, str> {
        let query = self.query;
        match variable {
            Variable::Uri => String::from_utf8_lossy(self.path),
            Variable::RequestUri => self.parts.uri.path_and_query().map_or("/", |target| target.as_str()).into(),
            Variable::Args => query.unwrap_or_default().into(),
            Variable::IsArgs => if query.is_some_and(|query| !query.is_empty()) { "?" } else { "" }.into(),
            Variable::Host => without_port(&self.client.host).to_ascii_lowercase().into(),
            Variable::Scheme => if self.client.https { "https" } else { "http" }.into(),
            Variable::RemoteAddr => self.client.address.to_string().into(),
            Variable::RemotePort => self.client.port.to_string().into(),
            Variable::ServerAddr => self.peer.local.ip().to_canonical().to_string().into(),
            Variable::ServerPort => self.client.server_port.to_string().into(),
            Variable::ServerName => (&*self.site.name).into(),
            Variable::ServerProtocol => format!("{:?}", self.parts.version).into(),
            Variable::RequestMethod => self.parts.method.as_str().into(),
            Variable::RequestId => self.id.into(),
            Variable::Arg(name) => argument(query.unwrap_or_default(), name).unwrap_or_default().into(),
            Variable::Cookie(name) => cookie(&self.parts.headers, name).unwrap_or_default().into(),
            Variable::Header(name) => {
                let values = self.parts.headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
                values.collect::<Vec<_>>().join(", ").into()
            }
            Variable::Capture(group) => self.captured(group).unwrap_or_default().into(),
        }
    }

    fn captured(&self, group: &str) -> Option<String> {
        let Pattern::Regex(regex) = &self.route.pattern else { return None };
        let path = lossless::to_text(self.path);
        let captures = regex.captures(&path)?;
        let found = match group.parse::<usize>() {
            Ok(number) => captures.get(number),
            Err(_) => captures.name(group),
        };
        found.map(|found| found.as_str().to_owned())
    }
}

/// The first of that name. Bytes that are no UTF-8, anywhere in the line, hide no other cookie: PHP sees them all.
pub fn cookie(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get_all(header::COOKIE).iter().find_map(|line| {
        let line = String::from_utf8_lossy(line.as_bytes());
        line.split(';').find_map(|pair| {
            let (key, value) = pair.trim().split_once('=').unwrap_or((pair.trim(), ""));
            (key == name).then(|| value.to_owned())
        })
    })
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;
    use crate::http::route::tests::{a_route, site_with};

    fn filled(pieces: Vec<Piece>, place: Place) -> String {
        let expression = "^/old/(?<rest>.*)$";
        let route = a_route(expression, Pattern::Regex(regex::Regex::new(expression).unwrap()));
        let (parts, ()) = Request::get("/old/a%20b?x=1&y=%0d%0a")
            .header("Cookie", "a=1; preview=yes")
            .header("X-Tenant", "one")
            .header("X-Tenant", "two")
            .body(())
            .unwrap()
            .into_parts();
        let peer = Peer {
            remote: ([192, 0, 2, 1], 40_000).into(),
            local: ([10, 0, 0, 1], 8080).into(),
            tls: false,
            tls_before: false,
            is_untold: false,
        };
        let client = ClientInfo {
            address: [192, 0, 2, 7].into(),
            port: 0,
            https: true,
            server_port: 443,
            host: "Example.com:8443".to_owned(),
        };
        let site = site_with(&[]);
        let variables = Variables {
            parts: &parts,
            client: &client,
            peer: &peer,
            site: &site,
            route: &route,
            path: b"/old/a b",
            query: parts.uri.query(),
            id: "id",
        };
        variables.fill(&Text { source: String::new(), pieces }, place)
    }

    fn of(variable: Variable) -> String {
        filled(vec![Piece::Variable(variable)], Place::Body)
    }

    #[test]
    fn each_stands_for_what_nginx_has_it_for() {
        assert_eq!(of(Variable::Uri), "/old/a b");
        assert_eq!(of(Variable::RequestUri), "/old/a%20b?x=1&y=%0d%0a");
        assert_eq!([of(Variable::Args), of(Variable::IsArgs)], ["x=1&y=%0d%0a", "?"]);
        assert_eq!([of(Variable::Host), of(Variable::Scheme), of(Variable::ServerPort)], ["example.com", "https", "443"]);
        assert_eq!([of(Variable::RemoteAddr), of(Variable::ServerAddr)], ["192.0.2.7", "10.0.0.1"]);
        assert_eq!([of(Variable::Arg("x".into())), of(Variable::Arg("z".into()))], ["1", ""]);
        assert_eq!(of(Variable::Cookie("preview".into())), "yes");
        assert_eq!(of(Variable::Header("x-tenant".parse().unwrap())), "one, two");
        assert_eq!([of(Variable::Capture("1".into())), of(Variable::Capture("rest".into()))], ["a b", "a b"]);
        assert_eq!(of(Variable::ServerProtocol), "HTTP/1.1");
    }

    /// What was decoded is encoded again before it is part of a URL.
    #[test]
    fn a_location_is_one() {
        let pieces = vec![Piece::Literal("https://new/".into()), Piece::Variable(Variable::Capture("1".into()))];
        assert_eq!(filled(pieces, Place::Location), "https://new/a%20b");
    }
}
