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

/// The workers of each pod of a set's Service.
pub const FPM_WORKERS: &str = "slackwater.dev/fpm-workers";
/// The set that is to be active, on the Service that `active_from` names.
pub const ACTIVE: &str = "slackwater.dev/active";
/// Between two messages to the reconciler: a thousand events a second cost ten snapshots.
const COALESCE: Duration = Duration::from_millis(100);
/// The server ends a watch after so long, and the next one shows whether it is still there.
const WATCH_SECONDS: u32 = 60;
const LONGEST_NAME: usize = 100;
/// Of what a server says of an error.
const LONGEST_REASON: usize = 400;
const MOST_WORKERS: u32 = 10_000;
const FIRST_BACK_OFF: Duration = Duration::from_millis(800);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(5);

/// What is known of one Service.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// `None`: never listed yet.
    pub slices: Option<Arc<[Arc<EndpointSlice>]>>,
    /// `None`: not told yet.
    pub service: Option<Annotations>,
}

impl Known {
    /// The slices, once they have been listed.
    pub fn listed(&self) -> Option<impl Iterator<Item = &EndpointSlice>> {
        Some(self.slices.as_deref()?.iter().map(|slice| &**slice))
    }
}

/// What a Service says; one that is not there says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Annotations {
    pub workers: Option<u32>,
    pub active: Option<Arc<str>>,
    /// There is no such Service.
    #[serde(default)]
    pub missing: bool,
}

/// By Service.
pub type AllKnown = BTreeMap<Arc<str>, Known>;

/// What is asked about a Service, each in a watch of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Asked {
    Slices,
    Annotations,
}

/// When the API server last answered each question, and since when it does not.
#[derive(Debug, Default)]
pub struct Contacts(Mutex<HashMap<(String, Asked), Contact>>);

#[derive(Clone, Debug, Default)]
struct Contact {
    /// By this process's predecessor, as the state file says.
    remembered: Option<SystemTime>,
    /// A list has been complete.
    listed: bool,
    answered: Option<Instant>,
    failing: Option<Failing>,
}

#[derive(Clone, Debug)]
struct Failing {
    first: Instant,
    last: Instant,
    why: String,
}

impl Contact {
    /// A good answer behind the failure ends it.
    fn failing(&self) -> Option<&Failing> {
        self.failing.as_ref().filter(|failing| self.answered.is_none_or(|answered| failing.last >= answered))
    }
}

impl Contacts {
    fn change(&self, service: &str, asked: Asked, change: impl FnOnce(&mut Contact)) {
        change(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry((service.to_owned(), asked)).or_default());
    }

    fn look<T>(&self, service: &str, asked: Asked, look: impl FnOnce(&Contact) -> Option<T>) -> Option<T> {
        look(self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&(service.to_owned(), asked))?)
    }

    /// How old what is known of the Service's pods is, zero while they are being watched. `None`: nothing was ever known.
    pub fn age(&self, service: &str) -> Option<Duration> {
        self.look(service, Asked::Slices, |contact| match (contact.listed, contact.failing()) {
            (true, None) => Some(Duration::ZERO),
            (true, Some(_)) => contact.answered.map(|answered| answered.elapsed()),
            (false, _) => Some(contact.remembered?.elapsed().unwrap_or_default()),
        })
    }

    /// What is known of the Service is what the state file had at that time.
    pub fn remembered(&self, service: &str, at: SystemTime) {
        for asked in [Asked::Slices, Asked::Annotations] {
            self.change(service, asked, |contact| contact.remembered = Some(at));
        }
    }

    /// Why it cannot be asked now.
    pub fn reason(&self, service: &str, asked: Asked) -> Option<String> {
        self.look(service, asked, |contact| Some(contact.failing()?.why.clone()))
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
        // Of our own Service nothing is asked but who its pods are.
        if self.settings.self_service.as_ref() == Some(&self.service) {
            self.keep(Asked::Slices).await;
        } else {
            tokio::join!(self.keep(Asked::Slices), self.keep(Asked::Annotations));
        }
    }

    /// Asks, and begins anew with other credentials where these are refused.
    async fn keep(&self, asked: Asked) {
        let mut back_off = BackOff::default();
        loop {
            let began = Instant::now();
            match client::heard(&self.settings, &self.service, asked, &self.contacts).await {
                Ok((client, server)) => match asked {
                    Asked::Slices => self.slices(Api::namespaced(client, &self.settings.namespace), &server).await,
                    Asked::Annotations => self.annotations(Api::namespaced(client, &self.settings.namespace), &server).await,
                },
                Err(why) => self.failed(asked, why),
            }
            if began.elapsed() > LONGEST_BACK_OFF * 2 {
                back_off = BackOff::default();
            }
            back_off.wait().await;
        }
    }

    /// Said once for each reason.
    fn failed(&self, asked: Asked, why: String) {
        let (service, namespace, now) = (&*self.service, &*self.settings.namespace, Instant::now());
        let why: String = why.chars().take(LONGEST_REASON).collect();
        self.contacts.change(service, asked, |contact| {
            if contact.failing.as_ref().is_none_or(|before| before.why != why) {
                if contact.listed || contact.remembered.is_some() {
                    tracing::warn!(
                        service,
                        namespace,
                        ?asked,
                        why,
                        "the Kubernetes API cannot be asked; what is known stays in force"
                    );
                } else {
                    tracing::error!(
                        service,
                        namespace,
                        ?asked,
                        why,
                        "the Kubernetes API cannot be asked, and nothing is known yet"
                    );
                }
            }
            let first = contact.failing.as_ref().map_or(now, |before| before.first);
            contact.failing = Some(Failing { first, last: now, why });
        });
        // What is said of it elsewhere says so too.
        self.changed.notify_one();
    }

    /// It answers: an event came, or nothing at all has gone wrong since the last good answer.
    fn answers(&self, asked: Asked, listed: bool) {
        let (service, namespace) = (&*self.service, &*self.settings.namespace);
        self.contacts.change(service, asked, |contact| {
            contact.listed |= listed;
            if let Some(failing) = contact.failing.take() {
                let seconds = failing.first.elapsed().as_secs();
                tracing::info!(service, namespace, ?asked, seconds, "the Kubernetes API answers again");
                self.changed.notify_one();
            }
        });
    }

    fn is_quiet_again(&self, asked: Asked) -> bool {
        self.contacts.look(&self.service, asked, |contact| Some(contact.failing.is_some() && contact.failing().is_none()))
            == Some(true)
    }

    fn update(&self, change: impl FnOnce(&mut Known)) {
        change(self.known.borrow_mut().entry(self.service.clone()).or_default());
        self.changed.notify_one();
    }

    async fn slices(&self, api: Api<EndpointSlice>, server: &str) {
        let config = watcher::Config::default()
            .labels(&format!("kubernetes.io/service-name={}", self.service))
            .timeout(WATCH_SECONDS)
            .streaming_lists();
        self.mirror(Asked::Slices, server, watcher(api, config), |all| {
            let slices = all.values().cloned().collect();
            self.update(|known| known.slices = Some(slices));
        })
        .await;
    }

    async fn annotations(&self, api: Api<Service>, server: &str) {
        let config =
            watcher::Config::default().fields(&format!("metadata.name={}", self.service)).timeout(WATCH_SECONDS).streaming_lists();
        let mut bad_before = None;
        self.mirror(Asked::Annotations, server, watcher(api, config), |all| {
            let annotation = |name: &str| all.values().next().and_then(|service| service.meta().annotations.as_ref()?.get(name));
            let told = annotation(FPM_WORKERS);
            let workers = told.and_then(|text| text.parse().ok().filter(|workers| (1..=MOST_WORKERS).contains(workers)));
            let bad = told.filter(|_| workers.is_none()).map(|text| text.chars().take(LONGEST_NAME).collect::<String>());
            // A Service changes for many reasons.
            if let Some(value) = bad.as_ref().filter(|_| bad != bad_before) {
                tracing::warn!(
                    service = &*self.service,
                    annotation = FPM_WORKERS,
                    value,
                    "is not a number from 1 to 10000 and does not count"
                );
            }
            bad_before = bad;
            // No set has a longer name; what is said of an unknown one stays readable.
            let active = annotation(ACTIVE).map(|set| set.trim().chars().take(LONGEST_NAME).collect::<String>().into());
            self.update(|known| known.service = Some(Annotations { workers, active, missing: all.is_empty() }));
        })
        .await;
    }

    /// Keeps `all` as the server has it, and says so after each change. A list counts when it is complete. Ends when the credentials are
    /// refused: a client believes a token that it has read for a minute, and a new client reads it again.
    async fn mirror<K: Resource + Clone>(
        &self,
        asked: Asked,
        server: &str,
        events: impl Stream<Item = watcher::Result<Event<K>>>,
        mut changed: impl FnMut(&BTreeMap<String, Arc<K>>),
    ) {
        let (mut all, mut list) = (BTreeMap::new(), BTreeMap::new());
        let mut back_off = BackOff::default();
        let mut events = pin!(events);
        let name = |object: &K| object.meta().name.clone().unwrap_or_default();
        loop {
            let next = std::future::poll_fn(|cx| events.as_mut().poll_next(cx));
            let event = match tokio::time::timeout(QUIET, next).await {
                Ok(Some(event)) => event,
                Ok(None) => return,
                Err(_) => {
                    if self.is_quiet_again(asked) {
                        self.answers(asked, false);
                    }
                    continue;
                }
            };
            let is_list = matches!(event, Ok(Event::InitDone));
            match event {
                // Not yet an answer: the first is said before anything is asked.
                Ok(Event::Init) => {
                    list.clear();
                    continue;
                }
                Ok(Event::InitApply(object)) => {
                    list.insert(name(&object), Arc::new(object));
                    continue;
                }
                Ok(Event::InitDone) => {
                    all = std::mem::take(&mut list);
                    changed(&all);
                }
                Ok(Event::Apply(object)) => {
                    all.insert(name(&object), Arc::new(object));
                    changed(&all);
                }
                Ok(Event::Delete(object)) => {
                    all.remove(&name(&object));
                    changed(&all);
                }
                Err(error) => {
                    self.failed(asked, format!("{server}: {}", client::said_of_watch(&error)));
                    if is_unauthorized(&error) {
                        return;
                    }
                    back_off.wait().await;
                    continue;
                }
            }
            self.answers(asked, is_list);
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

/// A watch on which nothing happens for so long after an error has got over it.
const QUIET: Duration = Duration::from_secs(2);

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
