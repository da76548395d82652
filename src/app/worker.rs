//! One worker: its dispatcher, its connections, what other threads ask of it, and its sign of life.

use std::{
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::mpsc;

use crate::{
    control::Control,
    edge::{
        connection::{self, Shared},
        listener::{self, Accepted, Caps, Command, Counts, Permit, Sink},
        registry,
    },
    error::Error,
    http::{
        files::Files,
        inflight::{self, Sinks},
        spill::Buffers,
        stack::{self, Worker},
    },
    lifecycle::{Phase, PhaseCell},
    model::Peer,
    telemetry::{access_log::AccessLog, metrics::Metrics, trace::Traces},
    upstream::{Dispatcher, Store, dispatch::now_ms, store::Task},
};

const HEARTBEAT_EVERY: Duration = Duration::from_millis(100);
/// The reason in `slackwater_shed_total`.
pub(super) const IDLE_CONNECTION: &str = "idle_connection";

/// What every worker is given.
pub(super) struct Parts {
    pub store: Arc<Store>,
    pub phase: Arc<PhaseCell>,
    pub buffers: Buffers,
    pub access: AccessLog,
    pub metrics: Arc<Metrics>,
    pub files: Files,
    pub heartbeats: Arc<[AtomicU64]>,
    pub control: Arc<Control>,
    pub counts: Arc<Counts>,
    pub traces: Option<Traces>,
}

pub(super) type Acceptor = (mpsc::Receiver<Command>, Arc<Counts>, Caps);

pub(super) async fn run(
    index: usize,
    parts: Arc<Parts>,
    tasks: mpsc::Receiver<Task>,
    mut connections: mpsc::Receiver<Accepted>,
    accept: Option<Acceptor>,
) {
    let dispatcher = Rc::new(Dispatcher::new(index, parts.store.clone(), parts.control.workers.clone()));
    let shard = parts.metrics.shard(index);
    let sinks = Rc::new(Sinks {
        registry: inflight::Registry::default(),
        access: parts.access.writer(),
        metrics: shard.clone(),
        phase: parts.phase.clone(),
        drained: parts.control.drained.clone(),
        traces: parts.traces.clone(),
    });
    let worker = Worker::new(dispatcher.clone(), parts.phase.clone(), parts.buffers.clone(), parts.files.clone(), sinks.clone());
    let registry = Rc::new(registry::Registry::default());
    let shared = Rc::new(Shared {
        phase: parts.phase.clone(),
        registry: registry.clone(),
        settings: {
            let store = parts.store.clone();
            Box::new(move || store.load().settings.clone())
        },
        refused: {
            let sinks = sinks.clone();
            Box::new(move |peer: &Peer, error: &Error| sinks.refused(peer, error))
        },
        counts: parts.counts.clone(),
    });
    tokio::task::spawn_local(dispatcher.clone().sweep());
    tokio::task::spawn_local(do_tasks(tasks, dispatcher, registry.clone(), sinks.clone()));
    tokio::task::spawn_local({
        let parts = parts.clone();
        async move {
            loop {
                if let Some(beat) = parts.heartbeats.get(index) {
                    beat.store(now_ms(), Ordering::Relaxed);
                }
                sinks.access.tick();
                // In the drain each has its `quiet`.
                let wanted = if parts.phase.get() < Phase::Draining { parts.counts.wanted() } else { 0 };
                if wanted > 0 {
                    let closed = registry.close_idle(wanted);
                    parts.counts.gave_up(closed);
                    (0..closed).for_each(|_| sinks.metrics.shed(IDLE_CONNECTION));
                }
                tokio::time::sleep(HEARTBEAT_EVERY).await;
            }
        }
    });

    let serve = Rc::new(move |stream, peer: Peer, permit: Permit| {
        let (worker, shared, shard) = (worker.clone(), shared.clone(), shard.clone());
        let service = move |peer: Peer| tower::service_fn(move |request| stack::serve(worker.clone(), peer, request));
        tokio::task::spawn_local(async move {
            let _counted = (permit, shard.connection());
            connection::serve(shared, stream, peer, service).await;
        });
    });
    if let Some((commands, counts, caps)) = accept {
        let serve = serve.clone();
        let here = Sink::Here(Box::new(move |stream, peer, permit| serve(stream, peer, permit)));
        tokio::task::spawn_local(listener::accept(commands, counts, caps, here));
    }
    while let Some(Accepted { stream, peer, permit }) = connections.recv().await {
        match tokio::net::TcpStream::from_std(stream) {
            Ok(stream) => serve(stream, peer, permit),
            Err(error) => tracing::error!(%error, "a connection cannot be taken over"),
        }
    }
    // Where the worker accepts by itself nobody sends here; it lives as long as the process.
    std::future::pending::<()>().await;
}

/// What other threads ask of this worker.
async fn do_tasks(
    mut tasks: mpsc::Receiver<Task>,
    dispatcher: Rc<Dispatcher>,
    connections: Rc<registry::Registry>,
    sinks: Rc<Sinks>,
) {
    while let Some(task) = tasks.recv().await {
        match task {
            Task::Barrier(answer) => drop(answer.send(())),
            Task::Unpark(endpoint) => drop(dispatcher.unpark(endpoint)),
            Task::UnparkAll(endpoint) => dispatcher.unpark_all(endpoint),
            Task::InFlight(activation, answer) => drop(answer.send(sinks.registry.list(activation))),
            Task::Phase => connections.wake_all(),
            Task::Flush(answer) => {
                sinks.access.tick();
                let _ = answer.send(());
            }
            Task::Cut(answer) => {
                let _ = answer.send(sinks.registry.list(None));
                sinks.registry.mark_cut();
                connections.abort_busy();
            }
        }
    }
}
