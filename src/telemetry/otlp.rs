//! Traces to an OpenTelemetry collector, by OTLP over HTTP: on a thread of its own, in batches, and never in a request's way.

use std::{
    sync::{Arc, atomic::AtomicU64},
    thread,
    time::Duration,
};

use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState},
};
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks},
};
use tokio::{runtime::Builder, sync::mpsc, time::Instant};

use super::{
    seldom::Seldom,
    trace::{Finished, Message, Traces, Value},
};
use crate::model::settings::Tracing;

/// Requests that wait for the exporter; more are lost.
const WAITING: usize = 4096;
/// Requests in one delivery, and how long one waits for others.
const BATCH: usize = 512;
const GATHER: Duration = Duration::from_secs(1);
/// How long a collector may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Starts the thread. Errors: no thread, or no client for this address.
pub fn start(settings: &Tracing) -> Result<Traces, String> {
    let (sender, receiver) = mpsc::channel(WAITING);
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(HyperClient::with_default_connector(TIMEOUT, None))
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(format!("{}/v1/traces", settings.endpoint))
        .with_timeout(TIMEOUT)
        .build()
        .map_err(|error| format!("tracing.endpoint {}: {error}", settings.endpoint))?;
    let resource = Resource::builder_empty()
        .with_attributes([
            KeyValue::new("service.name", settings.service.clone()),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        ])
        .build();
    let endpoint = settings.endpoint.clone();
    let runtime = Builder::new_current_thread().enable_all().build().map_err(|error| format!("tracing: {error}"))?;
    thread::Builder::new()
        .name("otlp".to_owned())
        .spawn(move || runtime.block_on(export(receiver, exporter, resource, &endpoint)))
        .map_err(|error| format!("thread otlp: {error}"))?;
    Ok(Traces::new(sender, Arc::<AtomicU64>::default()))
}

async fn export(mut messages: mpsc::Receiver<Message>, mut exporter: SpanExporter, resource: Resource, endpoint: &str) {
    exporter.set_resource(&resource);
    let scope = InstrumentationScope::builder("slackwater").with_version(env!("CARGO_PKG_VERSION")).build();
    let failures = Seldom::default();
    while let Some(first) = messages.recv().await {
        let (mut spans, mut asked) = (Vec::new(), Vec::new());
        let until = Instant::now() + GATHER;
        let mut next = Some(first);
        let mut requests = 0;
        while let Some(message) = next.take() {
            match message {
                Message::Trace(finished) => spans.extend(of(*finished, &scope)),
                Message::Flush(done) => asked.push(done),
            }
            requests += 1;
            // Whoever waits for it waits for no others.
            if requests < BATCH && asked.is_empty() {
                next = tokio::time::timeout_at(until, messages.recv()).await.ok().flatten();
            }
        }
        if !spans.is_empty()
            && let Err(error) = exporter.export(spans).await
            && let Some(unsaid) = failures.may_say()
        {
            tracing::warn!(endpoint, %error, unsaid, "traces could not be delivered and are lost");
        }
        for done in asked {
            let _ = done.send(());
        }
    }
}

/// The request's span, and one below it for each step.
fn of(finished: Finished, scope: &InstrumentationScope) -> Vec<SpanData> {
    let trace = TraceId::from_bytes(finished.place.trace.to_be_bytes());
    let own = SpanId::from_bytes(finished.place.span.to_be_bytes());
    let span = |id, parent, kind, name: std::borrow::Cow<'static, str>, began, ended| SpanData {
        span_context: SpanContext::new(trace, id, TraceFlags::SAMPLED, false, TraceState::default()),
        parent_span_id: parent,
        parent_span_is_remote: parent != own,
        span_kind: kind,
        name,
        start_time: began,
        end_time: ended,
        attributes: Vec::new(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: scope.clone(),
    };
    let parent = finished.parent.map_or(SpanId::INVALID, |parent| SpanId::from_bytes(parent.to_be_bytes()));
    let mut request = span(own, parent, SpanKind::Server, finished.name.into(), finished.began, finished.ended);
    request.attributes = finished
        .attributes
        .into_iter()
        .map(|(name, value)| match value {
            Value::Text(text) => KeyValue::new(name, text),
            Value::Number(number) => KeyValue::new(name, number),
        })
        .collect();
    if finished.failed {
        request.status = Status::error("");
    }
    let steps = finished.steps.into_iter().map(|(name, began, ended)| {
        let id = SpanId::from_bytes(rand::random::<u64>().max(1).to_be_bytes());
        span(id, own, SpanKind::Internal, name.into(), began, ended)
    });
    let mut spans: Vec<SpanData> = steps.collect();
    spans.push(request);
    spans
}
