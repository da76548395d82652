//! Traces as a collector sees them: OTLP over HTTP, read here by hand, apart from the crate that writes it.

mod support;

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use support::{
    gate::{Gate, eventually},
    http::{self as client, Connection},
    process::Slackwater,
    scripted_fpm::{Behaviour, ScriptedFpm},
};

/// A field of a protobuf message, by its number.
enum Field {
    Number(u64),
    Bytes(Vec<u8>),
}

/// <https://protobuf.dev/programming-guides/encoding/>
fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = bytes.split_first().expect("a varint");
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        value
    }
    fn take<'a>(bytes: &mut &'a [u8], length: usize) -> &'a [u8] {
        let (taken, rest) = bytes.split_at(length);
        *bytes = rest;
        taken
    }
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let field = match tag & 7 {
            0 => Field::Number(varint(&mut bytes)),
            1 => Field::Number(u64::from_le_bytes(take(&mut bytes, 8).try_into().unwrap())),
            2 => {
                let length = varint(&mut bytes) as usize;
                Field::Bytes(take(&mut bytes, length).to_vec())
            }
            5 => Field::Number(u32::from_le_bytes(take(&mut bytes, 4).try_into().unwrap()).into()),
            other => panic!("wire type {other}"),
        };
        found.push((tag >> 3, field));
    }
    found
}

fn all(message: &[u8], number: u64) -> Vec<Vec<u8>> {
    let of = |(found, field)| match field {
        Field::Bytes(bytes) if found == number => Some(bytes),
        _ => None,
    };
    fields(message).into_iter().filter_map(of).collect()
}

fn one(message: &[u8], number: u64) -> Vec<u8> {
    all(message, number).pop().unwrap_or_default()
}

fn number(message: &[u8], wanted: u64) -> u64 {
    let of = |(found, field)| match field {
        Field::Number(value) if found == wanted => Some(value),
        _ => None,
    };
    fields(message).into_iter().find_map(of).unwrap_or_default()
}

fn text(message: &[u8], number: u64) -> String {
    String::from_utf8(one(message, number)).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `KeyValue`s, of text or of numbers.
fn attributes(of: Vec<Vec<u8>>) -> Vec<(String, String)> {
    of.iter()
        .map(|pair| {
            let value = one(pair, 2);
            let text = text(&value, 1);
            (self::text(pair, 1), if text.is_empty() { number(&value, 3).to_string() } else { text })
        })
        .collect()
}

#[derive(Clone, Debug)]
struct Span {
    service: String,
    trace: String,
    id: String,
    parent: String,
    name: String,
    kind: u64,
    began: u64,
    ended: u64,
    attributes: Vec<(String, String)>,
    /// 2 is an error.
    status: u64,
}

impl Span {
    fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(found, _)| found == name).map(|(_, value)| &**value)
    }
}

/// opentelemetry/proto/trace/v1/trace.proto.
fn spans(request: &[u8]) -> Vec<Span> {
    let mut found = Vec::new();
    for resource_spans in all(request, 1) {
        let resource = attributes(all(&one(&resource_spans, 1), 1));
        let service = resource.iter().find(|(name, _)| name == "service.name").map(|(_, value)| value.clone()).unwrap_or_default();
        for span in all(&resource_spans, 2).iter().flat_map(|scope| all(scope, 2)) {
            found.push(Span {
                service: service.clone(),
                trace: hex(&one(&span, 1)),
                id: hex(&one(&span, 2)),
                parent: hex(&one(&span, 4)),
                name: text(&span, 5),
                kind: number(&span, 6),
                began: number(&span, 7),
                ended: number(&span, 8),
                attributes: attributes(all(&span, 9)),
                status: number(&one(&span, 15), 3),
            });
        }
    }
    found
}

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

impl Collector {
    async fn start() -> (Collector, SocketAddr) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let collector = Collector::default();
        let took = collector.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let took = took.clone();
                tokio::spawn(async move {
                    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                        let took = took.clone();
                        async move {
                            assert_eq!((request.method().as_str(), request.uri().path()), ("POST", "/v1/traces"));
                            assert_eq!(request.headers()["content-type"], "application/x-protobuf");
                            let body = request.into_body().collect().await.unwrap().to_bytes();
                            took.0.lock().unwrap().extend(spans(&body));
                            Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
                        }
                    });
                    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        (collector, address)
    }

    fn spans(&self) -> Vec<Span> {
        self.0.lock().unwrap().clone()
    }

    /// The spans of the request with this path, once they have come.
    async fn of(&self, path: &str) -> Vec<Span> {
        eventually(&format!("the spans of {path}"), async || {
            let spans = self.spans();
            let request = spans.iter().find(|span| span.attribute("url.path") == Some(path)).ok_or_else(|| format!("{spans:?}"))?;
            Ok(spans.iter().filter(|span| span.trace == request.trace).cloned().collect())
        })
        .await
    }
}

fn toml(fpm: &ScriptedFpm, collector: SocketAddr, sample: &str) -> String {
    format!(
        "workers = 1\n[listen]\nhttp = [\"{{HTTP}}\"]\nops = \"{{OPS}}\"\nadmin = \"{{ADMIN}}\"\ntrusted_proxies = [\"127.0.0.1\"]\n\
         [tracing]\nendpoint = \"http://{collector}\"\nsample = \"{sample}\"\nservice = \"edge\"\n\
         [upstream.php]\nworkers_per_endpoint = 1\n[upstream.php.set.blue]\nendpoints = [\"{}\"]\n\
         [[site]]\nphp_root = \"/app\"\nscripts = [\"/*.php\"]\nupstream = \"php\"\n",
        fpm.address()
    )
}

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// A trusted proxy's trace goes on: each step has a span, and PHP is told this proxy's as its parent.
#[tokio::test(flavor = "multi_thread")]
async fn each_step_has_a_span_and_php_the_parent() {
    let gate = Gate::closed();
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    fpm.on("/held", Behaviour::hello("blue").holds_answer(&gate));
    let (collector, address) = Collector::start().await;
    let mut proxy = Slackwater::start(&(toml(&fpm, address, "0%") + "[drain]\nlame_duck = \"0s\"\n")).await;
    let mut first = Connection::open(proxy.http()).await.unwrap();
    first.send(client::request("GET", "/held.php", &[], b"")).await.unwrap();
    fpm.wait_begun(1).await;
    // The only worker is busy: this one waits.
    let mut second = Connection::open(proxy.http()).await.unwrap();
    let headers = [("traceparent", PARENT), ("tracestate", "vendor=1"), ("Content-Length", "3")];
    second.send(client::request("POST", "/traced.php?secret=1", &headers, b"abc")).await.unwrap();
    eventually("it waits", async || match proxy.metric(&["slackwater_upstream_queue_depth"]).await {
        Some(1.0) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    gate.open();
    assert_eq!(second.read_response("POST").await.unwrap().status, 200);
    let spans = collector.of("/traced.php").await;
    let request = spans.iter().find(|span| span.kind == 2).expect("the request's own");
    assert_eq!((&*request.trace, &*request.parent), ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"));
    assert_eq!((&*request.service, request.status), ("edge", 0));
    assert_eq!(request.attribute("http.response.status_code"), Some("200"));
    assert_eq!(request.attribute("slackwater.set"), Some("blue"));
    assert!(!format!("{request:?}").contains("secret"), "queries are not in traces: {request:?}");
    let mut steps: Vec<&Span> = spans.iter().filter(|span| span.id != request.id).collect();
    steps.sort_by_key(|step| step.began);
    let mut names: Vec<&str> = steps.iter().map(|step| &*step.name).collect();
    names.retain(|name| *name != "connect");
    assert_eq!(names, ["buffer", "queue", "send", "first byte", "body"]);
    for step in &steps {
        assert_eq!(step.parent, request.id);
        assert!(request.began <= step.began && step.began <= step.ended && step.ended <= request.ended, "{step:?} in {request:?}");
    }
    let received = fpm.requests().pop().unwrap();
    assert_eq!(received.param("HTTP_TRACEPARENT"), Some(format!("00-{}-{}-01", request.trace, request.id)));
    assert_eq!(received.param("HTTP_TRACESTATE").as_deref(), Some("vendor=1"));
    // The other one began here, and no percent of those are sampled: PHP is told that too.
    let held = fpm.requests().into_iter().find(|request| request.uri() == "/held.php").unwrap();
    let told = held.param("HTTP_TRACEPARENT").expect("a number all the same");
    assert!(told.ends_with("-00"), "{told}");
    assert!(collector.spans().iter().all(|span| span.trace == request.trace));
    proxy.terminate();
    assert_eq!(proxy.wait_exit(Duration::from_secs(20)).await, 0);
}

/// What fails says so, and what ended just before the process did is delivered.
#[tokio::test(flavor = "multi_thread")]
async fn failures_are_marked_and_the_last_traces_are_delivered() {
    let fpm = ScriptedFpm::start(Behaviour::raw(Vec::new())).await;
    let (collector, address) = Collector::start().await;
    let mut proxy = Slackwater::start(&(toml(&fpm, address, "100%") + "[drain]\nlame_duck = \"0s\"\n")).await;
    assert_eq!(client::get(proxy.http(), "/broken.php").await.unwrap().status, 502);
    proxy.terminate();
    assert_eq!(proxy.wait_exit(Duration::from_secs(20)).await, 0);
    let spans = collector.spans();
    let request =
        spans.iter().find(|span| span.attribute("url.path") == Some("/broken.php")).unwrap_or_else(|| panic!("{spans:?}"));
    assert_eq!((request.status, request.attribute("error.type"), &*request.parent), (2, Some("upstream_closed"), ""));
    assert!(spans.iter().filter(|span| span.name == "connect").count() >= 1, "{spans:?}");
}

/// A collector that takes connections and never answers, or is not there, costs traces and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_does_not_answer_holds_nobody_up() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut proxy = Slackwater::start(&(toml(&fpm, silent.local_addr().unwrap(), "100%") + "[drain]\nlame_duck = \"0s\"\n")).await;
    let mut client = Connection::open(proxy.http()).await.unwrap();
    for _ in 0..6000 {
        assert_eq!(client.get("/a.php").await.unwrap().status, 200);
    }
    let lost = proxy.metric(&["slackwater_traces_lost_total"]).await.unwrap();
    assert!(lost >= 1.0, "{lost} of 6,000 lost, of which 4,096 have room and one delivery is on its way");
    drop(client);
    let began = std::time::Instant::now();
    proxy.terminate();
    assert_eq!(proxy.wait_exit(Duration::from_secs(20)).await, 0);
    println!("{lost} traces lost, ended {:?} after SIGTERM", began.elapsed());
}

#[test]
fn an_endpoint_that_cannot_be_is_refused_with_its_place() {
    for (endpoint, why) in [
        ("https://c:4318", "OTLP over HTTP, without TLS"),
        ("collector", "http://HOST:4318"),
        ("http://c/v1/traces", "without a path"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("site.toml");
        std::fs::write(&file, format!("[tracing]\nendpoint = \"{endpoint}\"\n[[site]]\nroot = \"/\"\n")).unwrap();
        let output =
            std::process::Command::new(env!("CARGO_BIN_EXE_slackwater")).arg("check").arg("--config").arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(":2:12: `tracing.endpoint`") && said.contains(why), "{endpoint}: {said}");
    }
}
