//! Unix signals as an enum. Nothing here decides what they mean.

use tokio::signal::unix::{SignalKind, signal};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// HUP
    Reload,
    /// TERM and QUIT: Nginx images stop with QUIT.
    Drain,
    /// INT: drain without the lame-duck phase.
    DrainNow,
    /// USR1
    ReopenLogs,
}

/// The signals of this process, one after the other.
pub struct Signals {
    hup: tokio::signal::unix::Signal,
    term: tokio::signal::unix::Signal,
    quit: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
    usr1: tokio::signal::unix::Signal,
}

impl Signals {
    /// From here on none of these signals ends the process by itself.
    pub fn install() -> std::io::Result<Self> {
        Ok(Signals {
            hup: signal(SignalKind::hangup())?,
            term: signal(SignalKind::terminate())?,
            quit: signal(SignalKind::quit())?,
            int: signal(SignalKind::interrupt())?,
            usr1: signal(SignalKind::user_defined1())?,
        })
    }

    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.hup.recv() => Signal::Reload,
            _ = self.term.recv() => Signal::Drain,
            _ = self.quit.recv() => Signal::Drain,
            _ = self.int.recv() => Signal::DrainNow,
            _ = self.usr1.recv() => Signal::ReopenLogs,
        }
    }
}
