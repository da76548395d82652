//! A model of a load balancer of the ELB kind, in what makes a graceful stop hard:
//!
//! - it keeps idle upstream connections and takes the one used last (LIFO), so some stay idle for long;
//! - it never retries;
//! - it learns by a health check of its own, every second, that a target is going, and needs two failures for it;
//! - having taken a target out it goes on sending to it for five seconds more, and only then sends elsewhere.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::gate::wait_for;
use super::http::{self, Connection};
use super::ledger::{Ledger, Outcome, Shape, jitter};

/// What [`LoadBalancer::builder`] collects.
#[derive(Clone, Debug)]
pub struct Builder {
    targets: Vec<SocketAddr>,
    health: Vec<SocketAddr>,
    health_path: String,
    every: Duration,
    fall: usize,
    rise: usize,
    lag: Duration,
    clients: usize,
    shapes: Vec<Shape>,
    pause: Duration,
    timeout: Duration,
    ledger: Ledger,
}

impl Builder {
    /// Another target; requests go round those in service.
    pub fn target(mut self, address: SocketAddr) -> Builder {
        self.targets.push(address);
        self
    }

    /// Default "/healthz" on the traffic port, so `health_path` must be set in the proxy.
    pub fn health_path(mut self, path: &str) -> Builder {
        self.health_path = path.to_owned();
        self
    }

    /// Asks these addresses instead (the ops ports), one for each target in order.
    pub fn health_at(mut self, addresses: Vec<SocketAddr>) -> Builder {
        self.health = addresses;
        self
    }

    /// Default every 1 s; so many failures in a row take a target out, so many successes bring it back: 2 and 2.
    pub fn checks(mut self, every: Duration, fall: usize, rise: usize) -> Builder {
        (self.every, self.fall, self.rise) = (every, fall, rise);
        self
    }

    /// How long it goes on sending to a target that it has taken out. Default 5 s.
    pub fn lag(mut self, lag: Duration) -> Builder {
        self.lag = lag;
        self
    }

    /// Clients in front of it, each with one request at a time. Default 16.
    pub fn clients(mut self, n: usize) -> Builder {
        self.clients = n;
        self
    }

    /// Default [`Shape::mix`].
    pub fn shapes(mut self, shapes: Vec<Shape>) -> Builder {
        self.shapes = shapes;
        self
    }

    /// A client's pause between two requests, varied from half to one and a half: connections go idle. Default 20 ms.
    pub fn pause(mut self, pause: Duration) -> Builder {
        self.pause = pause;
        self
    }

    /// For one request. Default 60 s.
    pub fn timeout(mut self, timeout: Duration) -> Builder {
        self.timeout = timeout;
        self
    }

    pub fn ledger(mut self, ledger: &Ledger) -> Builder {
        self.ledger = ledger.clone();
        self
    }

    pub fn start(self) -> LoadBalancer {
        assert!(self.health.is_empty() || self.health.len() == self.targets.len(), "one health address for each target");
        let targets: Vec<Arc<Target>> = self.targets.iter().map(|address| Arc::new(Target::new(*address))).collect();
        let (stop, stopping) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for (nth, target) in targets.iter().enumerate() {
            let asked = self.health.get(nth).copied().unwrap_or(target.address);
            tasks.spawn(check(self.clone(), Arc::clone(target), asked, stopping.clone()));
        }
        let turn = Arc::new(AtomicUsize::new(0));
        for nth in 0..self.clients {
            tasks.spawn(drive(self.clone(), nth, targets.clone(), Arc::clone(&turn), stopping.clone()));
        }
        LoadBalancer { ledger: self.ledger, targets, stop, tasks }
    }
}

/// Whether a target is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    Serving,
    /// Taken out at this instant, and still sent to.
    Leaving(Instant),
    /// No longer sent to.
    Out,
}

#[derive(Debug)]
struct Target {
    address: SocketAddr,
    service: watch::Sender<Service>,
    idle: Mutex<Vec<Connection<TcpStream>>>,
    checks: watch::Sender<Vec<(Instant, Option<u16>)>>,
}

/// The running balancer. Dropped, it cuts its connections.
#[derive(Debug)]
pub struct LoadBalancer {
    ledger: Ledger,
    targets: Vec<Arc<Target>>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl LoadBalancer {
    /// One target, everything by default.
    pub fn start(target: SocketAddr) -> LoadBalancer {
        LoadBalancer::builder(target).start()
    }

    pub fn builder(target: SocketAddr) -> Builder {
        Builder {
            targets: vec![target],
            health: Vec::new(),
            health_path: "/healthz".to_owned(),
            every: Duration::from_secs(1),
            fall: 2,
            rise: 2,
            lag: Duration::from_secs(5),
            clients: 16,
            shapes: Shape::mix(),
            pause: Duration::from_millis(20),
            timeout: Duration::from_secs(60),
            ledger: Ledger::new(),
        }
    }

    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    pub fn service(&self, target: usize) -> Service {
        *self.targets[target].service.borrow()
    }

    /// All health checks of a target so far: when they ended, and the status if there was an answer.
    pub fn checks(&self, target: usize) -> Vec<(Instant, Option<u16>)> {
        self.targets[target].checks.borrow().clone()
    }

    /// Connections to a target that are open and unused.
    pub fn idle(&self, target: usize) -> usize {
        self.targets[target].idle.lock().expect("nobody panics with the pool").len()
    }

    /// Until a target is no longer sent to.
    pub async fn wait_out(&self, target: usize) {
        wait_for(&self.targets[target].service, &format!("target {target} to be out"), |service| *service == Service::Out).await;
    }

    /// Until a target has been taken out, and is still sent to, or no longer.
    pub async fn wait_leaving(&self, target: usize) {
        let left = |service: &Service| *service != Service::Serving;
        wait_for(&self.targets[target].service, &format!("target {target} to be taken out"), left).await;
    }

    /// Begins no further request, waits for those on their way, and hands over the book.
    pub async fn stop(mut self) -> Ledger {
        self.stop.send_replace(true);
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("the load balancer does not panic");
        }
        self.ledger.clone()
    }
}

impl Target {
    fn new(address: SocketAddr) -> Target {
        let (service, checks) = (watch::Sender::new(Service::Serving), watch::Sender::new(Vec::new()));
        Target { address, service, idle: Mutex::default(), checks }
    }

    /// The connection used last among those not closed meanwhile: a balancer reads FINs as they come.
    fn take(&self) -> Option<Connection<TcpStream>> {
        let mut idle = self.idle.lock().expect("nobody panics with the pool");
        idle.retain(|connection| !connection.peer_has_closed());
        idle.pop()
    }

    fn put(&self, connection: Connection<TcpStream>) {
        self.idle.lock().expect("nobody panics with the pool").push(connection);
    }
}

async fn check(plan: Builder, target: Arc<Target>, asked: SocketAddr, mut stop: watch::Receiver<bool>) {
    let mut ticks = tokio::time::interval(plan.every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut failed, mut passed) = (0, 0);
    loop {
        let leaving = *target.service.borrow();
        let out_at = async {
            match leaving {
                Service::Leaving(since) => tokio::time::sleep_until(since + plan.lag).await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = stop.changed() => return,
            () = out_at => {
                target.service.send_replace(Service::Out);
                target.idle.lock().expect("nobody panics with the pool").clear();
            }
            _ = ticks.tick() => {
                let answer = tokio::time::timeout(plan.every, http::get(asked, &plan.health_path)).await;
                let status = answer.ok().and_then(Result::ok).map(|answer| answer.status);
                target.checks.send_modify(|checks| checks.push((Instant::now(), status)));
                (failed, passed) = if status == Some(200) { (0, passed + 1) } else { (failed + 1, 0) };
                if leaving == Service::Serving && failed >= plan.fall {
                    target.service.send_replace(Service::Leaving(Instant::now()));
                } else if leaving != Service::Serving && passed >= plan.rise {
                    target.service.send_replace(Service::Serving);
                }
            }
        }
    }
}

async fn drive(plan: Builder, nth: usize, targets: Vec<Arc<Target>>, turn: Arc<AtomicUsize>, mut stop: watch::Receiver<bool>) {
    let mut dice = nth as u64;
    let mut shapes = plan.shapes.iter().cycle().skip(nth % plan.shapes.len());
    while !*stop.borrow() {
        let sent_to: Vec<&Arc<Target>> = targets.iter().filter(|target| *target.service.borrow() != Service::Out).collect();
        let chosen = sent_to.get(turn.fetch_add(1, Ordering::Relaxed) % sent_to.len().max(1));
        let pause = if let Some(target) = chosen {
            let mut held = target.take();
            let shape = shapes.next().expect("the shapes go round");
            let outcome = plan.ledger.send(target.address, &mut held, shape, plan.timeout).await;
            if let Some(connection) = held
                && *target.service.borrow() != Service::Out
            {
                target.put(connection);
            }
            match outcome {
                Outcome::Refused => plan.pause.max(Duration::from_millis(10)), // Not to spin while nobody listens.
                _ => jitter(plan.pause, &mut dice),
            }
        } else {
            plan.every // Nobody to send to: look again after the next check.
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stop.changed() => return,
        }
    }
}
