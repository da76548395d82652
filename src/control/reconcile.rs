//! Change -> build -> swap -> outcome: the one task that replaces snapshots. It never waits for a drain; whoever asked does.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::{
    Control,
    build::{self, Before},
    config::{self, Config},
    kubernetes::{ACTIVE, AllKnown, Asked, Discovery, Known},
    rfc3339,
    sandbox::Folders,
    slices::AllFound,
    state::State,
    switch::Switch,
    tls,
};
use crate::{
    lifecycle::{Phase, drain::CutRequest},
    model::{Address, Settings, Site},
    upstream::{
        Endpoint, Snapshot,
        dispatch::now_ms,
        health::Preflight,
        probe::{Probes, Report, Warm},
        store::{InFlight, Task},
    },
};

mod cluster;
mod mismatch;
mod shares;
mod turn;

use cluster::{Peers, remember};
pub use turn::Turn;

/// What a turn that the file asked for is expected to take at most; nothing is cut when it takes longer.
const FILE_TURN_BUDGET: Duration = Duration::from_secs(60);

/// Everything that may lead to another snapshot.
pub enum Change {
    Reload {
        by: &'static str,
        answer: Option<oneshot::Sender<ReloadOutcome>>,
    },
    /// Files of certificates have changed.
    Certificates,
    Swap(SwapOrder, oneshot::Sender<Result<Swap, String>>),
    Endpoint {
        upstream: String,
        address: String,
        disabled: bool,
        answer: oneshot::Sender<Result<String, String>>,
    },
    /// What Kubernetes tells of all Services now.
    Discovered(AllKnown),
    /// What the other replicas serve, by upstream.
    Peers(BTreeMap<String, String>),
    /// What is known is to be written to the state file.
    Remember,
    /// A probe has learned something: waiters may have a slot, the process may be ready.
    Probed,
}

pub struct SwapOrder {
    pub upstream: String,
    pub set: String,
    pub dry_run: bool,
    pub force: bool,
    pub by: String,
    pub budget: Duration,
}

/// What became of a swap so far; the asker waits for the rest.
pub enum Swap {
    /// It would be taken, or the set is active already.
    Nothing(String),
    Turned(Turn),
}

#[derive(Clone, Debug, Serialize)]
pub struct ReloadOutcome {
    pub at: String,
    /// "applied", "unchanged" or "refused".
    pub outcome: &'static str,
    pub reason: String,
    pub generation: u64,
}

/// How the reconciler changes listening sockets: bound first, in use only after the swap.
pub trait Listeners {
    /// Binds what `wanted` has and the present does not.
    fn prepare(&mut self, wanted: &[SocketAddr]) -> std::io::Result<()>;
    /// Takes what was prepared into use, lets go of what is not wanted any more, and applies the caps.
    fn commit(&mut self, settings: &Settings);
    /// Closes what was prepared.
    fn abandon(&mut self);
    /// Log level and access log, as far as a reload may change them.
    fn apply(&mut self, settings: &Settings) -> Result<(), String>;
}

pub struct Reconciler {
    control: Arc<Control>,
    path: PathBuf,
    config: Config,
    switch: Switch,
    listeners: Box<dyn Listeners>,
    probes: Probes,
    /// A probe's report is on its way.
    probed: std::rc::Rc<std::cell::Cell<bool>>,
    /// Sites of earlier configurations by the upstream that only they route to.
    retired: BTreeMap<Arc<str>, Vec<Weak<Site>>>,
    discovery: Option<Discovery>,
    known: AllKnown,
    found: AllFound,
    /// What the state file says that was found; counts until a Service has been listed.
    remembered: AllFound,
    /// What was known has changed since it was written.
    unwritten: bool,
    /// Seconds.
    since_written: u32,
    /// Upstreams whose annotated set is not usable at the start, while it is not known what the peers serve.
    waits_for_peers: Vec<Arc<str>>,
    /// What is not as the configuration has it in the cluster, as it was said last.
    odd: BTreeSet<String>,
    /// Why the annotation of an upstream is not followed, as it was said last.
    refused: BTreeMap<Arc<str>, String>,
    peers: Peers,
    /// Endpoints that a snapshot has dropped: one that comes back before its last request has ended is the same, with its slots.
    dropped: Vec<Weak<Endpoint>>,
}

impl Reconciler {
    /// `warm` makes the request of a preflight.
    pub fn new(
        control: Arc<Control>,
        path: PathBuf,
        config: Config,
        state: State,
        listeners: Box<dyn Listeners>,
        warm: Warm,
    ) -> Self {
        let changes = control.changes.clone();
        // A report that finds the channel full may be lost: another change is about to look at everything.
        // Many at once are one.
        let probed = std::rc::Rc::new(std::cell::Cell::new(false));
        let seen = probed.clone();
        let report: Report = std::rc::Rc::new(move || {
            if !seen.replace(true) && changes.try_send(Change::Probed).is_err() {
                seen.set(false);
            }
        });
        let discovery = config
            .settings
            .kubernetes
            .clone()
            .map(|settings| Discovery::new(settings, control.contacts.clone(), control.changes.clone()));
        let (mut known, mut remembered) = (AllKnown::default(), AllFound::default());
        let here = config.settings.kubernetes.as_ref().map(|k| &*k.namespace);
        if let Some(told) = state.kubernetes.filter(|told| here == Some(&told.namespace)) {
            remembered = told.found();
            for (service, of) in &told.services {
                control.contacts.remembered(service, told.written());
                known.insert(service.clone(), Known { slices: None, service: of.annotations.clone() });
            }
        }
        if discovery.is_some() && config.settings.state.is_some() {
            tokio::task::spawn_local(remember(control.changes.clone()));
        }
        Reconciler {
            control,
            path,
            config,
            switch: state.switch,
            listeners,
            probes: Probes::new(report, warm),
            probed,
            retired: BTreeMap::new(),
            discovery,
            known,
            found: AllFound::default(),
            remembered,
            unwritten: false,
            since_written: 0,
            waits_for_peers: Vec::new(),
            odd: BTreeSet::new(),
            peers: Peers::default(),
            refused: BTreeMap::new(),
            dropped: Vec::new(),
        }
    }

    pub async fn run(mut self, mut changes: mpsc::Receiver<Change>) {
        if !self.remembered.is_empty() {
            self.put_found_in_force();
        }
        self.settled();
        while let Some(change) = changes.recv().await {
            match change {
                Change::Reload { by, answer } => {
                    let outcome = self.reload(by);
                    if let Some(answer) = answer {
                        let _ = answer.send(outcome);
                    }
                }
                Change::Swap(order, answer) => {
                    let _ = answer.send(self.swap(&order));
                }
                Change::Endpoint { upstream, address, disabled, answer } => {
                    let _ = answer.send(self.endpoint(&upstream, &address, disabled));
                }
                Change::Discovered(known) => self.discovered(known),
                Change::Peers(served) => self.peers = Peers::Told(served),
                Change::Certificates => self.renew(),
                Change::Remember => self.remember(),
                Change::Probed => self.probed.set(false),
            }
            self.settled();
        }
    }

    /// After every change: waiters, probes, readiness.
    fn settled(&mut self) {
        self.follow_annotations();
        let snapshot = self.control.store.load_full();
        self.tell_endpoints(&snapshot);
        self.share_endpoints(&snapshot);
        self.tell_of_cluster(&snapshot);
        let services = self.services();
        if let Some(discovery) = &mut self.discovery {
            discovery.follow(&services);
        }
        self.probes.follow(&snapshot);
        for upstream in snapshot.upstreams.values() {
            for set in upstream.sets.values() {
                for endpoint in &set.endpoints {
                    endpoint.serve_queue(&upstream.queue);
                }
            }
            upstream.wake_for_free_slots();
        }
        let now = now_ms();
        let mut missing: Vec<String> = snapshot
            .upstreams
            .values()
            // Pods that are not warm are better than none: their preflight is no reason to stay out of the load balancer.
            .filter(|u| !u.retired && u.active.usable(now) == 0 && !u.active.gave_up())
            .map(|u| {
                let why = self.why_empty(&u.active).map_or_else(String::new, |empty| format!(": {}", empty.why));
                format!("upstream {} has no usable endpoint in set {}{why}", u.name, u.active.name())
            })
            .collect();
        // Before that it is not known which set is the right one.
        for (name, service) in self.config.upstreams.iter().filter_map(|(name, u)| Some((name, u.active_from.as_ref()?))) {
            if self.known.get(service).is_none_or(|known| known.service.is_none()) {
                let why =
                    self.control.contacts.reason(service, Asked::Annotations).map_or_else(String::new, |why| format!(": {why}"));
                missing.push(format!("upstream {name} does not know yet what service {service} says is active{why}"));
            }
        }
        missing.extend(self.asks_peers());
        if missing.is_empty() && self.control.phase.get() == Phase::Starting && self.control.phase.advance(Phase::Running) {
            tracing::info!(generation = snapshot.generation, "ready");
        }
        self.control.told().waiting_for = missing;
    }

    fn build(&self, config: &Config, switch: &Switch) -> Result<Snapshot, String> {
        let retired: BTreeSet<Arc<str>> = self.retired.keys().cloned().collect();
        let snapshot = self.control.store.load();
        let alive: Vec<Arc<Endpoint>> = self.dropped.iter().filter_map(Weak::upgrade).collect();
        let workers = self.control.workers.len();
        build::build(
            config,
            &Before { snapshot: Some(&snapshot), switch, workers, retired: &retired, found: &self.found, alive: &alive },
        )
    }

    fn reload(&mut self, by: &'static str) -> ReloadOutcome {
        let result = self.try_reload();
        let (outcome, reason) = match result {
            Ok(true) => ("applied", String::new()),
            Ok(false) => ("unchanged", "the configuration is the same".to_owned()),
            Err(reason) => {
                self.listeners.abandon();
                ("refused", reason)
            }
        };
        let generation = self.control.store.load().generation;
        match outcome {
            "refused" => tracing::error!(by, generation, reason, "reload refused; the configuration before it goes on"),
            _ => tracing::info!(by, generation, outcome, "reload"),
        }
        self.control.metrics.reload(outcome);
        let outcome = ReloadOutcome { at: rfc3339(SystemTime::now()), outcome, reason, generation };
        {
            let mut told = self.control.told();
            if outcome.outcome != "refused" {
                told.reloaded = Some(SystemTime::now());
            }
            told.reload = Some(outcome.clone());
        }
        self.control.news.notify_one();
        outcome
    }

    /// All or nothing; false where nothing has changed.
    fn try_reload(&mut self) -> Result<bool, String> {
        if self.control.phase.get() >= Phase::Draining {
            return Err("the process is draining".to_owned());
        }
        let config = config::load(&self.path, &|name| std::env::var(name).ok())
            .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))?;
        if config.hash == self.config.hash && config.settings.tls == self.config.settings.tls {
            return Ok(false);
        }
        needs_restart(&self.config.settings, &config.settings)?;
        within_sandbox(self.control.sandbox.as_ref(), &config)?;
        let mut switch = self.switch.clone();
        switch.prune(&config.upstreams);
        self.retire(&config);
        // Beside what the present configuration finds: this one may still be refused.
        self.found.extend(self.find(&config));
        let next = self.build(&config, &switch)?;
        // Nothing is torn down before its successor stands.
        let wanted: Vec<SocketAddr> = config.settings.listen.addresses().collect();
        self.listeners.prepare(&wanted).map_err(|e| e.to_string())?;
        self.listeners.apply(&config.settings)?;
        self.switch = switch;
        let old = std::mem::replace(&mut self.config, config);
        drop(old);
        self.put_in_force(next, "file", FILE_TURN_BUDGET);
        self.listeners.commit(&self.config.settings);
        let mut told = self.control.told();
        told.warnings = self.config.warnings.clone();
        // What is on disk has just been read, certificates among it.
        told.certificates = None;
        Ok(true)
    }

    /// The files of certificates and ticket keys, anew: new connections are served with them, open ones keep what they have.
    fn renew(&mut self) {
        let loaded = match tls::load(&self.config.settings) {
            Ok(loaded) => loaded,
            Err(problems) => {
                let reason = problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
                return self.certificates_refused("the certificates cannot be used; those before them go on", &reason);
            }
        };
        if loaded == self.config.settings.tls {
            if self.control.told().certificates.take().is_some() {
                tracing::info!("the certificates can be used again");
            }
            return self.make_up_for_a_refusal();
        }
        let before = self.config.settings.clone();
        let mut settings = (*before).clone();
        settings.tls = loaded;
        self.config.settings = Arc::new(settings);
        let switch = self.switch.clone();
        match self.build(&self.config, &switch) {
            Ok(next) => {
                self.put_in_force(next, "certificates", FILE_TURN_BUDGET);
                self.control.told().certificates = None;
                self.control.metrics.reload("applied");
                tracing::info!("the certificates have been read anew");
                for warning in self.config.settings.tls.iter().flat_map(|tls| tls::warnings(&tls.certificates, SystemTime::now())) {
                    tracing::warn!("{warning}");
                }
                self.make_up_for_a_refusal();
            }
            Err(reason) => {
                // So that they are tried again when they change again.
                self.config.settings = before;
                self.certificates_refused("the certificates cannot be put in force", &reason);
            }
        }
    }

    /// Said and counted once for each reason: they are looked at once a second as long as they cannot be used.
    fn certificates_refused(&self, what: &'static str, reason: &str) {
        let said = format!("{what}: {reason}");
        if self.control.told().certificates.replace(said.clone()).as_ref() != Some(&said) {
            tracing::error!(reason, "{what}");
            self.control.metrics.reload("refused");
            self.control.news.notify_one();
        }
    }

    /// A reload may have met one file of a certificate without the other. What else it would have changed waits for the next one.
    fn make_up_for_a_refusal(&mut self) {
        let refused = self.control.told().reload.as_ref().is_some_and(|last| last.outcome == "refused");
        let on_disk = || config::load(&self.path, &|name| std::env::var(name).ok());
        if refused && on_disk().is_ok_and(|config| config.hash == self.config.hash) {
            self.reload("certificates");
        }
    }

    /// Upstreams that the file has no more stay while a request may hold a route to them.
    fn retire(&mut self, next: &Config) {
        self.retired.retain(|name, sites| {
            sites.retain(|site| site.strong_count() > 0);
            !sites.is_empty() && !next.upstreams.contains_key(name)
        });
        for name in self.config.upstreams.keys().filter(|name| !next.upstreams.contains_key(*name)) {
            let sites = self.config.all_sites().into_iter().map(Arc::downgrade).collect();
            self.retired.insert(name.clone(), sites);
        }
    }

    fn swap(&mut self, order: &SwapOrder) -> Result<Swap, String> {
        let outcome = self.try_swap(order);
        // A question changes nothing, and wakes nobody.
        if order.dry_run {
            let reason = outcome.as_ref().err();
            tracing::info!(
                upstream = order.upstream,
                set = order.set,
                by = order.by,
                reason,
                "asked whether a swap would be taken"
            );
            return outcome;
        }
        self.control.metrics.swap(match &outcome {
            Ok(Swap::Turned(_)) => "applied",
            Ok(Swap::Nothing(_)) => "unchanged",
            Err(_) => "refused",
        });
        match &outcome {
            Ok(_) => tracing::info!(upstream = order.upstream, set = order.set, by = order.by, "swap"),
            Err(reason) => tracing::warn!(upstream = order.upstream, set = order.set, by = order.by, reason, "swap refused"),
        }
        outcome
    }

    fn try_swap(&mut self, order: &SwapOrder) -> Result<Swap, String> {
        vote(&self.control.store.load(), &order.upstream, &order.set, order.force)?;
        let Some((name, file)) = self.config.upstreams.get_key_value(order.upstream.as_str()) else {
            return Err(format!("upstream {} is being removed", order.upstream));
        };
        let active = self.control.store.load().upstreams.get(name).map(|u| u.active.name().clone());
        if active.as_deref() == Some(order.set.as_str()) {
            return Ok(Swap::Nothing(format!("set {} of upstream {} is active already", order.set, order.upstream)));
        }
        if order.dry_run {
            return Ok(Swap::Nothing(format!("set {} of upstream {} would be taken", order.set, order.upstream)));
        }
        if let Some(service) = &file.active_from
            && self.annotated(service).is_some()
        {
            return Err(format!(
                "the active set of upstream {name} is what service {service} says: kubectl annotate --overwrite service {service} {ACTIVE}={}",
                order.set
            ));
        }
        let mut switch = self.switch.clone();
        switch.choose(&order.upstream, &order.set, &order.by, file);
        switch.annotated.remove(name);
        switch.peers.remove(name);
        let next = self.build(&self.config, &switch)?;
        // Remembered before it is in force: a swap that was answered survives a SIGKILL.
        if let Some(path) = &self.config.settings.state {
            let state = State { switch: switch.clone(), kubernetes: self.to_remember() };
            state.save(path).map_err(|e| {
                format!(
                    "the swap cannot be remembered in {}: {e}; make that folder writable, or change `state` and start anew",
                    path.display()
                )
            })?;
        }
        self.switch = switch;
        let mut turns = self.put_in_force(next, &order.by, order.budget);
        turns.pop().map(Swap::Turned).ok_or_else(|| "the swap changed nothing".to_owned())
    }

    fn endpoint(&mut self, upstream: &str, address: &str, disabled: bool) -> Result<String, String> {
        let address: Address = address.parse()?;
        let snapshot = self.control.store.load();
        let upstream = snapshot.upstreams.get(upstream).ok_or_else(|| no_such("upstream", upstream, snapshot.upstreams.keys()))?;
        let endpoints = || upstream.sets.values().flat_map(|s| &s.endpoints);
        let found = endpoints().find(|e| e.address == address).ok_or_else(|| {
            let known: Vec<_> = endpoints().map(|e| e.address.to_string()).collect();
            format!("upstream {} has no endpoint {address}; it has {}", upstream.name, known.join(", "))
        })?;
        found.set_disabled(disabled);
        if !disabled && found.health().preflight == Preflight::GaveUp {
            found.set_preflight(now_ms(), Preflight::Done, String::new());
        }
        let what = if disabled { "disabled" } else { "enabled" };
        tracing::info!(upstream = &*upstream.name, endpoint = %address, what, "endpoint");
        Ok(format!("endpoint {address} of upstream {} is {what}", upstream.name))
    }
}

fn all_endpoints(snapshot: &Snapshot) -> impl Iterator<Item = &Arc<Endpoint>> {
    snapshot.upstreams.values().flat_map(|u| u.sets.values()).flat_map(|s| &s.endpoints)
}

/// Whether this process would take `set`, and why not. Changes nothing.
pub fn vote(snapshot: &Snapshot, upstream: &str, set: &str, force: bool) -> Result<(), String> {
    let upstream = snapshot.upstreams.get(upstream).ok_or_else(|| no_such("upstream", upstream, snapshot.upstreams.keys()))?;
    let set = upstream.sets.get(set).ok_or_else(|| no_such("set", set, upstream.sets.keys()))?;
    let now = now_ms();
    let (usable, wanted) = (set.usable(now), set.config.min_ready);
    if usable < wanted && !force {
        let first = set.endpoints.iter().map(|e| (e, e.reason(now))).find(|(_, reason)| !reason.is_empty());
        let why = match (&set.config.kubernetes, first) {
            (_, Some((endpoint, reason))) => format!(" ({}: {reason})", endpoint.address),
            (Some(source), None) if set.endpoints.is_empty() => format!(" (service {} has no ready pods)", source.service),
            _ => String::new(),
        };
        return Err(format!(
            "set {} of upstream {} has {usable} usable endpoints of {}, min_ready is {wanted}{why}",
            set.name(),
            upstream.name,
            set.endpoints.len()
        ));
    }
    Ok(())
}

pub fn no_such<'a>(what: &str, name: &str, known: impl Iterator<Item = &'a Arc<str>>) -> String {
    format!("there is no {what} {name}; there is {}", known.map(|k| &**k).collect::<Vec<_>>().join(", "))
}

/// What still holds the Activation `serial`, as far as a client waits for it.
pub async fn in_flight(control: &Control, serial: u64) -> Vec<InFlight> {
    control.workers.ask_all(|answer| Task::InFlight(Some(serial), answer)).await.map_or_else(|_| Vec::new(), |l| l.concat())
}

impl From<InFlight> for CutRequest {
    fn from(request: InFlight) -> Self {
        CutRequest { id: request.id, method: request.method, path: request.path, age_seconds: request.age.as_secs_f64() }
    }
}

/// The sandbox lasts as long as the process.
fn within_sandbox(sandbox: Option<&Folders>, config: &Config) -> Result<(), String> {
    let Some(sandbox) = sandbox else { return Ok(()) };
    let beyond: Vec<String> = Folders::of(config).beyond(sandbox).iter().map(|folder| folder.display().to_string()).collect();
    if beyond.is_empty() { Ok(()) } else { Err(format!("the sandbox was made without {}: needs a restart", beyond.join(", "))) }
}

fn needs_restart(old: &Settings, new: &Settings) -> Result<(), String> {
    let mut keys = Vec::new();
    if old.workers != new.workers {
        keys.push("workers");
    }
    if old.listen.ops != new.listen.ops {
        keys.push("listen.ops");
    }
    if old.listen.admin != new.listen.admin {
        keys.push("listen.admin");
    }
    if old.buffer.files != new.buffer.files {
        keys.push("buffer.files");
    }
    if old.log.format != new.log.format {
        keys.push("log.format");
    }
    if (&old.tracing.endpoint, &old.tracing.service) != (&new.tracing.endpoint, &new.tracing.service) {
        keys.push("tracing.endpoint and tracing.service");
    }
    if old.reload != new.reload {
        keys.push("reload");
    }
    if old.sandbox != new.sandbox {
        keys.push("sandbox");
    }
    if old.state != new.state {
        keys.push("state");
    }
    if old.kubernetes != new.kubernetes {
        keys.push("kubernetes");
    }
    if keys.is_empty() { Ok(()) } else { Err(format!("a change of {} needs a restart", keys.join(", "))) }
}
