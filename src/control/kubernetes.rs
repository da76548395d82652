//! EndpointSlices and Services -> what is known of each Service, told to the reconciler at most ten times a second.
//!
//! One watch for the slices of each Service that the configuration names and one for the Service itself, in one namespace only, on the
//! control plane's thread. What was known stays in force while the API server is away, whatever it answers: only a complete list replaces it.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    pin::pin,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use futures_core::Stream;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{
    Api, Resource,
    runtime::watcher::{self, Event, watcher},
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, mpsc},
    task::AbortHandle,
    time::Instant,
};

use super::reconcile::Change;
use crate::model::settings::Kubernetes;

pub mod client;
pub mod events;

use client::said;

/// The workers of each pod of a set's Service.
pub const FPM_WORKERS: &str = "slackwater.dev/fpm-workers";
/// The set that is to be active, on the Service that `active_from` names.
pub const ACTIVE: &str = "slackwater.dev/active";
/// Between two messages to the reconciler: a thousand events a second cost ten snapshots.
const COALESCE: Duration = Duration::from_millis(100);
/// The server ends a watch after so long, and the next one shows whether it is still there.
const WATCH_SECONDS: u32 = 60;
const LONGEST_NAME: usize = 100;
const FIRST_BACK_OFF: Duration = Duration::from_millis(800);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(5);

/// What is known of one Service.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// `None`: never listed yet.
    pub slices: Option<Arc<Vec<EndpointSlice>>>,
    /// `None`: not told yet.
    pub service: Option<Annotations>,
}

/// What a Service says; one that is not there says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Annotations {
    pub workers: Option<u32>,
    pub active: Option<Arc<str>>,
}

/// By Service.
pub type AllKnown = BTreeMap<Arc<str>, Known>;

/// When the API server last answered a question about a Service, and since when it does not.
#[derive(Debug, Default)]
pub struct Contacts(Mutex<HashMap<String, Contact>>);

#[derive(Clone, Debug, Default)]
struct Contact {
    /// By this process's predecessor, as the state file says.
    remembered: Option<SystemTime>,
    answered: Option<Instant>,
    failing: Option<(Instant, String)>,
}

impl Contacts {
    fn change(&self, service: &str, change: impl FnOnce(&mut Contact)) {
        change(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(service.to_owned()).or_default());
    }

    /// How old what is known of the Service is, zero while it is being watched; and why. `None`: nothing was ever known.
    pub fn age(&self, service: &str) -> Option<(Duration, String)> {
        let contacts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let contact = contacts.get(service)?;
        let why = || contact.failing.as_ref().map_or_else(String::new, |(_, why)| why.clone());
        let Some(answered) = contact.answered else {
            return Some((contact.remembered?.elapsed().unwrap_or_default(), why()));
        };
        Some(match &contact.failing {
            Some((since, why)) if *since >= answered => (answered.elapsed(), why.clone()),
            _ => (Duration::ZERO, String::new()),
        })
    }

    /// What is known of the Service is what the state file had at that time.
    pub fn remembered(&self, service: &str, at: SystemTime) {
        self.change(service, |contact| contact.remembered = Some(at));
    }

    /// Why nothing is known, as far as it was said.
    pub fn reason(&self, service: &str) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(service)?.failing.as_ref().map(|(_, why)| why.clone())
    }
}

/// The watches that run now.
pub struct Discovery {
    settings: Kubernetes,
    contacts: Arc<Contacts>,
    known: Rc<RefCell<AllKnown>>,
    changed: Rc<Notify>,
    running: BTreeMap<Arc<str>, AbortHandle>,
    events: mpsc::Sender<events::Said>,
}

impl Discovery {
    pub fn new(settings: Kubernetes, contacts: Arc<Contacts>, changes: mpsc::Sender<Change>) -> Self {
        let (known, changed) = (Rc::<RefCell<AllKnown>>::default(), Rc::new(Notify::new()));
        tokio::task::spawn_local(publish(known.clone(), changed.clone(), changes));
        let events = events::start(settings.clone());
        Discovery { settings, contacts, known, changed, running: BTreeMap::new(), events }
    }

    /// Says something of a Service in an Event; lost where too much is said already.
    pub fn say(&self, said: events::Said) {
        let _ = self.events.try_send(said);
    }

    /// Watches exactly these Services from now on, and of our own the slices.
    pub fn follow(&mut self, services: &BTreeSet<Arc<str>>) {
        self.running.retain(|service, task| {
            let stays = services.contains(service);
            if !stays {
                task.abort();
                self.known.borrow_mut().remove(service);
            }
            stays
        });
        for service in services {
            if !self.running.contains_key(service) {
                let watch = Watch {
                    settings: self.settings.clone(),
                    service: service.clone(),
                    contacts: self.contacts.clone(),
                    known: self.known.clone(),
                    changed: self.changed.clone(),
                };
                self.running.insert(service.clone(), tokio::task::spawn_local(watch.run()).abort_handle());
            }
        }
    }
}

/// The first change is told at once, those that follow it together.
async fn publish(known: Rc<RefCell<AllKnown>>, changed: Rc<Notify>, changes: mpsc::Sender<Change>) {
    loop {
        changed.notified().await;
        let all = known.borrow().clone();
        if changes.send(Change::Discovered(all)).await.is_err() {
            return;
        }
        tokio::time::sleep(COALESCE).await;
    }
}

struct Watch {
    settings: Kubernetes,
    service: Arc<str>,
    contacts: Arc<Contacts>,
    known: Rc<RefCell<AllKnown>>,
    changed: Rc<Notify>,
}

impl Watch {
    async fn run(self) {
        let mut back_off = BackOff::default();
        loop {
            let began = Instant::now();
            let client = match client::heard(&self.settings, &self.service, &self.contacts).await {
                Ok(client) => client,
                Err(why) => {
                    self.failed(&why);
                    back_off.wait().await;
                    continue;
                }
            };
            let slices = self.slices(Api::namespaced(client.clone(), &self.settings.namespace));
            // Of our own Service nothing is asked but who its pods are.
            if self.settings.self_service.as_ref() == Some(&self.service) {
                slices.await;
            } else {
                let service = self.annotations(Api::namespaced(client, &self.settings.namespace));
                tokio::select! {
                    () = slices => {}
                    () = service => {}
                }
            }
            if began.elapsed() > LONGEST_BACK_OFF * 2 {
                back_off = BackOff::default();
            }
            back_off.wait().await;
        }
    }

    fn failed(&self, why: &str) {
        self.contacts.change(&self.service, |contact| {
            if contact.failing.as_ref().is_none_or(|(_, before)| before != why) {
                tracing::warn!(
                    service = &*self.service,
                    namespace = self.settings.namespace,
                    why,
                    "the Kubernetes API cannot be asked; what is known stays in force"
                );
            }
            contact.failing = Some((Instant::now(), why.to_owned()));
        });
    }

    fn update(&self, change: impl FnOnce(&mut Known)) {
        change(self.known.borrow_mut().entry(self.service.clone()).or_default());
        self.changed.notify_one();
    }

    async fn slices(&self, api: Api<EndpointSlice>) {
        let config = watcher::Config::default()
            .labels(&format!("kubernetes.io/service-name={}", self.service))
            .timeout(WATCH_SECONDS)
            .streaming_lists();
        self.mirror(watcher(api, config), |all| {
            let slices = Arc::new(all.values().cloned().collect());
            self.update(|known| known.slices = Some(slices));
        })
        .await;
    }

    async fn annotations(&self, api: Api<Service>) {
        let config =
            watcher::Config::default().fields(&format!("metadata.name={}", self.service)).timeout(WATCH_SECONDS).streaming_lists();
        self.mirror(watcher(api, config), |all| {
            let annotation = |name: &str| all.values().next().and_then(|service| service.meta().annotations.as_ref()?.get(name));
            let told = annotation(FPM_WORKERS);
            let workers = told.and_then(|text| text.parse().ok().filter(|workers| *workers > 0));
            if let (Some(text), None) = (told, workers) {
                tracing::warn!(
                    service = &*self.service,
                    annotation = FPM_WORKERS,
                    value = text,
                    "is not a number above 0 and does not count"
                );
            }
            // No set has a longer name; what is said of an unknown one stays readable.
            let active = annotation(ACTIVE).map(|set| set.trim().chars().take(LONGEST_NAME).collect::<String>().into());
            self.update(|known| known.service = Some(Annotations { workers, active }));
        })
        .await;
    }

    /// Keeps `all` as the server has it, and says so after each change. A list counts when it is complete. Ends when the credentials are
    /// refused: a client believes a token that it has read for a minute, and a new client reads it again.
    async fn mirror<K: Resource + Clone>(
        &self,
        events: impl Stream<Item = watcher::Result<Event<K>>>,
        mut changed: impl FnMut(&BTreeMap<String, K>),
    ) {
        let (mut all, mut list) = (BTreeMap::new(), BTreeMap::new());
        let mut back_off = BackOff::default();
        let mut events = pin!(events);
        let name = |object: &K| object.meta().name.clone().unwrap_or_default();
        while let Some(event) = std::future::poll_fn(|cx| events.as_mut().poll_next(cx)).await {
            match event {
                Ok(Event::Init) => list.clear(),
                Ok(Event::InitApply(object)) => drop(list.insert(name(&object), object)),
                Ok(Event::InitDone) => {
                    all = std::mem::take(&mut list);
                    changed(&all);
                }
                Ok(Event::Apply(object)) => {
                    all.insert(name(&object), object);
                    changed(&all);
                }
                Ok(Event::Delete(object)) => {
                    all.remove(&name(&object));
                    changed(&all);
                }
                Err(error) => {
                    self.failed(&said(&error));
                    back_off.wait().await;
                    if is_unauthorized(&error) {
                        return;
                    }
                    continue;
                }
            }
            back_off = BackOff::default();
        }
    }
}

fn is_unauthorized(error: &watcher::Error) -> bool {
    use watcher::Error as E;
    match error {
        E::InitialListFailed(kube::Error::Api(status))
        | E::WatchStartFailed(kube::Error::Api(status))
        | E::WatchFailed(kube::Error::Api(status)) => status.code == 401,
        E::WatchError(status) => status.code == 401,
        _ => false,
    }
}

/// From 0.8 s to at most 5 s, with jitter, so that replicas do not come back all at once.
struct BackOff(Duration);

impl Default for BackOff {
    fn default() -> Self {
        BackOff(FIRST_BACK_OFF)
    }
}

impl BackOff {
    async fn wait(&mut self) {
        let jitter = self.0.mul_f64(rand::random_range(0.5..1.0));
        self.0 = (self.0 * 2).min(LONGEST_BACK_OFF);
        tokio::time::sleep(jitter).await;
    }
}
