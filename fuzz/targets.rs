//! What is fuzzed: each function takes any bytes and panics where something is not as it must be. `cargo fuzz run NAME` drives them (`tests/long fuzz`),
//! and so does `tests/fuzz.rs` in the quick tier, without instrumentation.

#![allow(dead_code, reason = "each binary uses one of them")]

use std::{
    cell::Cell,
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    rc::Rc,
    sync::OnceLock,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Version, request::Parts};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use slackwater::{
    control::{
        config::{self, Source},
        template,
    },
    edge::proxy_protocol,
    fastcgi::{
        params,
        record::{self, Decoder, Frame},
        responder::parse_params,
        response,
    },
    http::{
        layers::guards::{self, Passed},
        route::{self, Asked, Otherwise, Script, Target},
    },
    model::{Site, SiteTable},
};

type Fuzzed = (&'static str, fn(&[u8]));

pub const ALL: [Fuzzed; 8] = [
    ("config", config),
    ("params", params),
    ("path", path),
    ("proxy", proxy),
    ("record", record),
    ("response", response),
    ("route", route),
    ("template", template),
];

/// What was decoded: content by kind, appStatus and protocolStatus where it ended, whether it was FastCGI.
type Decoded = (Vec<u8>, Vec<u8>, Option<(u32, u8)>, bool);

fn decoded(data: &[u8], piece: usize) -> Decoded {
    let (mut decoder, mut input) = (Decoder::default(), BytesMut::new());
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    for piece in data.chunks(piece.max(1)) {
        input.extend_from_slice(piece);
        loop {
            match decoder.decode(&mut input) {
                Ok(Some(Frame::Stdout(bytes))) => stdout.extend_from_slice(&bytes),
                Ok(Some(Frame::Stderr(bytes))) => stderr.extend_from_slice(&bytes),
                Ok(Some(Frame::End { app_status, protocol_status })) => {
                    return (stdout, stderr, Some((app_status, protocol_status)), true);
                }
                Ok(None) => break,
                Err(_) => return (stdout, stderr, None, false),
            }
        }
    }
    (stdout, stderr, None, true)
}

/// What FPM says is the same wherever the network cuts it.
pub fn record(data: &[u8]) {
    let Some((piece, data)) = data.split_first() else { return };
    let whole = decoded(data, data.len());
    assert_eq!(decoded(data, usize::from(*piece)), whole);
    assert_eq!(decoded(data, 1), whole);
    assert!(whole.0.len() + whole.1.len() <= data.len());
}

/// A head is refused, or not whole yet, or one that may go to a client; and the same however much follows it.
pub fn response(data: &[u8]) {
    let limits = response::Limits::default();
    let Ok(Some((head, used))) = response::parse_head(data, &limits) else { return };
    assert!(used <= data.len() && (200..600).contains(&head.status.as_u16()));
    for (name, value) in &head.headers {
        assert!(!value.as_bytes().iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)));
        assert!(!matches!(name.as_str(), "transfer-encoding" | "connection" | "upgrade" | "keep-alive"));
    }
    let again = response::parse_head(&data[..used], &limits).expect("it was one").expect("it was whole");
    assert_eq!((again.0.status, again.0.headers, again.1), (head.status, head.headers, used));
    for cut in [used / 2, used - 1] {
        assert!(matches!(response::parse_head(&data[..cut], &limits), Ok(None) | Err(_)), "a part of a head is whole");
    }
}

/// The pairs of a whole PARAMS stream.
fn pairs(mut wire: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut all = Vec::new();
    loop {
        let (header, rest) = wire.split_at(record::HEADER_LEN);
        let (length, padding) = (usize::from(u16::from_be_bytes([header[4], header[5]])), usize::from(header[6]));
        assert_eq!((header[0], header[1]), (1, 4), "a PARAMS record");
        if length == 0 {
            assert_eq!(rest.len(), padding, "nothing follows the end of PARAMS");
            return all;
        }
        // As php-src does: each record by itself.
        all.extend(parse_params(&rest[..length]).expect("whole pairs"));
        wire = &rest[length + padding..];
    }
}

fn is_safe(pairs: &[(Vec<u8>, Vec<u8>)], document_root: &str, script: &str) {
    let value = |name: &str| pairs.iter().filter(|(n, _)| n == name.as_bytes()).map(|(_, v)| v.clone()).collect::<Vec<_>>();
    assert_eq!(value("SCRIPT_FILENAME"), [format!("{document_root}{script}").into_bytes()]);
    assert_eq!(value("DOCUMENT_ROOT"), [document_root.as_bytes().to_vec()]);
    for never in ["HTTP_PROXY", "PHP_VALUE", "PHP_ADMIN_VALUE", "HTTP_CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING"] {
        assert!(value(never).is_empty(), "{never}");
    }
    let mut names: Vec<&[u8]> = pairs.iter().map(|(name, _)| &name[..]).collect();
    names.sort_unstable();
    assert!(names.windows(2).all(|two| two[0] != two[1]), "a name twice");
    assert!(names.iter().all(|name| name.iter().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || *byte == b'_')));
}

fn written(input: &params::Input<'_>) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut out = BytesMut::new();
    params::write(&mut out, input).ok().map(|()| pairs(&out))
}

const HERE: ([u8; 4], u16) = ([10, 0, 0, 5], 8080);

/// Whatever a client's headers are, FPM gets whole pairs, and no parameter that is ours.
pub fn params(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n') {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(&line[..colon]), HeaderValue::from_bytes(&line[colon + 1..])) {
            headers.append(name, value);
        }
    }
    let uri = String::from_utf8_lossy(data.split(|byte| *byte == b'\n').next().unwrap_or_default()).into_owned();
    let input = params::Input {
        method: &Method::POST,
        request_uri: &uri,
        query: &uri,
        version: Version::HTTP_11,
        headers: &headers,
        host: "example.com",
        content_length: Some(data.len() as u64),
        remote_addr: IpAddr::from([192, 0, 2, 1]),
        remote_port: 1,
        server_addr: SocketAddr::from(HERE),
        server_port: 80,
        https: data.len().is_multiple_of(2),
        remote_user: "",
        request_id: "id",
        extra: &[],
        script: params::Script { script_name: "/index.php", path_info: &uri, document_root: "/app" },
    };
    if let Some(pairs) = written(&input) {
        is_safe(&pairs, "/app", "/index.php");
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime")
}

/// It reads the header and not a byte more, or refuses.
pub fn proxy(data: &[u8]) {
    let mut rest = data;
    let ends = runtime().block_on(proxy_protocol::read(&mut rest));
    if let Ok(ends) = ends {
        let header = &data[..data.len() - rest.len()];
        let again = runtime().block_on(proxy_protocol::read(&mut { header }));
        assert_eq!(again.expect("the same bytes"), ends);
    }
}

const SITES: &str = r#"
[upstream.php]
[upstream.php.set.blue]
endpoints = ["127.0.0.1:9000"]
[[site]]
php_root = "/app"
upstream = "php"
scripts = ["/index.php", "/admin/*.php"]
[[site.route]]
path = "/private/*"
respond = { status = 403 }
[[site.route]]
path = '~^/(?<lang>[a-z]{2})/(.*)$'
rewrite = "/$2?lang=$lang"
[[site.route]]
path = "/old/*"
redirect = { to = "/new$uri", status = 301 }
[[site.route]]
path = "/try/*"
try_files = ["$uri", "$uri/", "/index.php?$args"]
"#;

fn sites() -> &'static SiteTable {
    static TABLE: OnceLock<std::sync::Arc<SiteTable>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let main = Source { file: PathBuf::from("fuzz.toml"), text: SITES.to_owned() };
        match config::parse(main, &mut |_| Ok(Vec::new()), &|_| None) {
            Ok(config) => config.sites,
            Err(problems) => panic!("{problems:?}"),
        }
    })
}

/// The script that a target names, perhaps as a last resort.
fn script<'a>(target: &'a Target<'a>) -> Option<&'a Script<'a>> {
    match target {
        Target::Script(script) => Some(script),
        Target::Lookup(lookup) => match &lookup.otherwise {
            Otherwise::Script(script) => Some(script),
            _ => None,
        },
        _ => None,
    }
}

/// Routed as a request of this path is: no segment leads up, and no script runs that is not declared.
fn routed(site: &Site, asked: &Asked<'_>, raw: &str, use_it: impl FnOnce(&Script<'_>)) {
    let Ok(path) = route::normalize(raw) else { return };
    assert!(path.starts_with(b"/") && !path.contains(&0));
    assert!(path.split(|byte| *byte == b'/').all(|segment| segment != b".." && segment != b"."));
    let route = route::route(site, asked, &path);
    let target = route::target(site, route, &path, asked.query, false);
    if let Some(script) = script(&target) {
        let declared = *script.name == *"/index.php"
            || script.name.strip_prefix("/admin/").is_some_and(|rest| rest.ends_with(".php") && !rest.contains('/'));
        assert!(declared, "{:?} runs {:?}", raw, script.name);
        use_it(script);
    }
}

pub fn route(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (path, query) = text.split_once('?').map_or((&*text, None), |(path, query)| (path, Some(query)));
    let Some(site) = route::site(sites(), "example.com") else { return };
    let headers = HeaderMap::new();
    let asked =
        Asked { method: &Method::GET, headers: &headers, preflight: None, query, from: [192, 0, 2, 1].into(), https: false };
    routed(site, &asked, path, |_| ());
    let _ = route::rewritten(path, query);
}

/// A placeholder is filled or named, and nothing else is changed.
pub fn template(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let known = |name: &str| (name == "NAME").then(|| "value \" {{NAME}} \n".to_owned());
    let _ = template::fill(&text, &known);
    let _ = template::fill_config(&text, &known);
    if !text.contains("{{")
        && let Ok(filled) = template::fill(&text, &known)
    {
        assert_eq!(filled.text, text);
    }
}

/// Understood, or refused with the place.
pub fn config(data: &[u8]) {
    let main = Source { file: PathBuf::from("fuzz.toml"), text: String::from_utf8_lossy(data).into_owned() };
    if let Err(problems) = config::parse(main, &mut |_| Ok(Vec::new()), &|_| None) {
        assert!(!problems.is_empty());
        assert!(problems.iter().all(|problem| !problem.message.is_empty()));
    }
}

/// What a client sends, through the HTTP server, the guards, the site and its routes to what FPM would get.
pub fn path(data: &[u8]) {
    let asked = Rc::new(Cell::new(0));
    runtime().block_on(async {
        let (mut client, server) = tokio::io::duplex(data.len().max(1));
        let count = asked.clone();
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            count.set(count.get() + 1);
            async move { Ok::<_, Infallible>(answered(request).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .max_headers(256)
            .serve_connection(hyper_util::rt::TokioIo::new(server), service);
        let talking = async {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let _ = client.write_all(data).await;
            let _ = client.shutdown().await;
            let mut answers = Vec::new();
            let _ = client.read_to_end(&mut answers).await;
        };
        let _ = tokio::join!(connection, talking);
    });
    // A request has at least a method, a target, a version and a line break.
    assert!(asked.get() * 12 <= data.len());
}

async fn answered(request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (parts, body) = request.into_parts();
    let limits = guards::Limits { max_uri_bytes: 16 * 1024, max_header_bytes: 64 * 1024 };
    let host = match guards::check(&parts, &limits) {
        Ok(Passed::Request { host }) => host.into_owned(),
        Ok(Passed::OptionsStar) => return Response::new(Full::default()),
        // As `http::stack`: its body is not read, so nothing behind it is a request.
        Err(error) => {
            let mut response = error.response::<String>().map(|text| Full::new(Bytes::from(text)));
            response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
            return response;
        }
    };
    let length = Limited::new(body, 1 << 20).collect().await.map_or(0, |body| body.to_bytes().len());
    forwarded(&parts, &host, length as u64);
    Response::new(Full::default())
}

fn forwarded(parts: &Parts, host: &str, length: u64) {
    let Some(site) = route::site(sites(), host) else { return };
    let asked = Asked {
        method: &parts.method,
        headers: &parts.headers,
        preflight: None,
        query: parts.uri.query(),
        from: [192, 0, 2, 1].into(),
        https: false,
    };
    routed(site, &asked, parts.uri.path(), |script| {
        let Ok(path_info) = str::from_utf8(script.path_info) else { return };
        let input = params::Input {
            method: &parts.method,
            request_uri: parts.uri.path_and_query().map_or("/", |target| target.as_str()),
            query: script.query.as_deref().unwrap_or(parts.uri.query().unwrap_or_default()),
            version: parts.version,
            headers: &parts.headers,
            host,
            content_length: Some(length),
            remote_addr: IpAddr::from([192, 0, 2, 1]),
            remote_port: 1,
            server_addr: SocketAddr::from(HERE),
            server_port: 80,
            https: false,
            remote_user: "",
            request_id: "id",
            extra: &[],
            script: params::Script { script_name: &script.name, path_info, document_root: "/app" },
        };
        if let Some(pairs) = written(&input) {
            is_safe(&pairs, "/app", &script.name);
        }
    });
}
