//! What operators should see in `kubectl get events`: said about a Service, at most so many waiting, never waited for.

use std::{sync::Arc, time::Duration};

use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{Api, api::PostParams};
use tokio::sync::mpsc;

use super::client::{self, said};
use crate::model::settings::Kubernetes;

/// Beyond that the newest are lost; the log has them all.
const WAITING: usize = 16;
const LIMIT: Duration = Duration::from_secs(10);
/// Somebody who turns an annotation to and fro must not fill the API server with Events of ours.
const PAUSE: Duration = Duration::from_secs(1);
const COMPONENT: &str = "slackwater";

/// One Event.
#[derive(Debug)]
pub struct Said {
    pub service: Arc<str>,
    pub warning: bool,
    /// One word in CamelCase.
    pub reason: &'static str,
    pub message: String,
}

/// A task that creates them as they come.
pub fn start(settings: Kubernetes) -> mpsc::Sender<Said> {
    let (sender, mut events) = mpsc::channel::<Said>(WAITING);
    tokio::task::spawn_local(async move {
        let mut told = false;
        while let Some(event) = events.recv().await {
            let created = tokio::time::timeout(LIMIT, create(&settings, &event)).await;
            if let Err(why) = created.unwrap_or_else(|_| Err(format!("no answer in {LIMIT:?}"))) {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(why, event.reason, event.message, "an Event cannot be created; it is in the log only");
                }
            } else {
                told = false;
            }
            tokio::time::sleep(PAUSE).await;
        }
    });
    sender
}

async fn create(settings: &Kubernetes, said_of: &Said) -> Result<(), String> {
    let (client, ..) = client::plain(settings).await?;
    let now = Time(Timestamp::now());
    let host = std::env::var("HOSTNAME").ok();
    let event = Event {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}.", said_of.service)),
            namespace: Some(settings.namespace.clone()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            name: Some(said_of.service.to_string()),
            namespace: Some(settings.namespace.clone()),
            ..ObjectReference::default()
        },
        type_: Some(if said_of.warning { "Warning" } else { "Normal" }.to_owned()),
        reason: Some(said_of.reason.to_owned()),
        message: Some(said_of.message.clone()),
        source: Some(EventSource { component: Some(COMPONENT.to_owned()), host: host.clone() }),
        reporting_component: Some(COMPONENT.to_owned()),
        reporting_instance: host,
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        count: Some(1),
        ..Event::default()
    };
    let events: Api<Event> = Api::namespaced(client, &settings.namespace);
    events.create(&PostParams::default(), &event).await.map(drop).map_err(|e| said(&e))
}
