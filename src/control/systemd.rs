//! What systemd is told (sd_notify(3)) where it has started the process: that it listens, how it is, that it lives, that it ends.
//!
//! Ready means that it listens, not that PHP answers: a unit that waits for FPM would be killed and started again for as long as FPM is away, static files and the
//! clear 503 with it. What is missing is in the unit's status line.

use std::{sync::Arc, time::Duration};

use sd_notify::NotifyState;

use super::Control;
use crate::lifecycle::Phase;

const EVERY: Duration = Duration::from_secs(1);

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd cannot be told");
    }
}

/// It is asked to end: what follows is not a crash.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// From the moment that it listens, as long as the control plane runs. A worker that hangs is not alive: with `WatchdogSec` systemd ends the process then, as the kubelet does by
/// `/livez`.
pub async fn run(control: Arc<Control>) {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return;
    }
    let watchdog = sd_notify::watchdog_enabled();
    let every = watchdog.map_or(EVERY, |limit| EVERY.min(limit / 3));
    tell(&[NotifyState::Ready]);
    let mut said = String::new();
    loop {
        let hung = control.hung_workers();
        let status = match control.phase.get() {
            _ if !hung.is_empty() => format!("no sign of life from workers {hung:?}"),
            Phase::Starting => format!("Starting: {}", control.told().waiting_for.join("; ")),
            phase => format!("{}, {} connections", phase.name(), control.connections.count()),
        };
        // A line of its own would be an assignment of its own.
        let status: String = status.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        if status != said {
            tell(&[NotifyState::Status(&status)]);
            said = status;
        }
        if watchdog.is_some() && hung.is_empty() {
            tell(&[NotifyState::Watchdog]);
        }
        tokio::time::sleep(every).await;
    }
}
