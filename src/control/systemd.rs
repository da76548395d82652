//! What systemd is told (sd_notify(3)) where it has started the process: that it listens, how it is, that it lives, that it ends.
//!
//! Ready means that it listens, not that PHP answers: a unit that waits for FPM would be killed and started again for as long as FPM is away, static files and the
//! clear 503 with it. What is missing is in the unit's status line. On a thread of its own, for a datagram waits where nobody reads.

use std::{
    sync::{Arc, OnceLock, Weak},
    thread::{self, Thread},
    time::Duration,
};

use sd_notify::NotifyState;

use super::Control;
use crate::{lifecycle::Phase, upstream::dispatch::now_ms};

const EVERY: Duration = Duration::from_secs(1);

/// Where there is one; woken when the process is asked to end.
static TELLER: OnceLock<Thread> = OnceLock::new();

/// It is asked to end: what follows is not a crash.
pub fn stopping() {
    if let Some(teller) = TELLER.get() {
        teller.unpark();
    }
}

/// From the moment that it listens, to the end of the process. A worker that hangs is not alive: with `WatchdogSec` systemd ends the process then, as the kubelet does by
/// `/livez`. Errors: there is no thread.
pub fn start(control: &Arc<Control>) -> std::io::Result<()> {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return Ok(());
    }
    let control = Arc::downgrade(control);
    let teller = thread::Builder::new().name("systemd".to_owned()).spawn(move || run(&control))?;
    let _ = TELLER.set(teller.thread().clone());
    Ok(())
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd cannot be told");
    }
}

fn run(control: &Weak<Control>) {
    let watchdog = sd_notify::watchdog_enabled();
    let every = watchdog.map_or(EVERY, |limit| EVERY.min(limit / 3));
    tell(&[NotifyState::Ready]);
    let (mut said, mut is_stopping) = (String::new(), false);
    while let Some(control) = control.upgrade() {
        if !is_stopping && control.told().leaving.is_some() {
            is_stopping = true;
            tell(&[NotifyState::Stopping]);
        }
        let status = status(&control);
        if status != said {
            tell(&[NotifyState::Status(&status)]);
            said = status;
        }
        if watchdog.is_some() && control.hung_workers().is_empty() {
            tell(&[NotifyState::Watchdog]);
        }
        drop(control);
        thread::park_timeout(every);
    }
}

/// One line, as `systemctl status` shows it.
fn status(control: &Control) -> String {
    let hung = control.hung_workers();
    let snapshot = control.store.load();
    let without: Vec<String> = snapshot
        .upstreams
        .values()
        .filter(|upstream| !upstream.retired && upstream.active.usable(now_ms()) == 0)
        .map(|upstream| format!("upstream {} has no usable endpoint in set {}", upstream.name, upstream.active.name()))
        .collect();
    let status = match control.phase.get() {
        _ if !hung.is_empty() => format!("no sign of life from workers {hung:?}"),
        Phase::Starting => format!("Starting: {}", control.told().waiting_for.join("; ")),
        Phase::Running if !without.is_empty() => format!("Running, but {}", without.join("; ")),
        phase => format!("{}, connections: {}", phase.name(), control.connections.count()),
    };
    // A line of its own would be an assignment of its own.
    status.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
