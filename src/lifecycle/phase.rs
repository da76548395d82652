//! Starting, Running, LameDuck, Draining, Aborting, Exited (DESIGN.md, section 6).

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    Starting,
    Running,
    /// The load balancer is told to go elsewhere; everything is still served.
    LameDuck,
    /// No new connections; what is in flight goes on.
    Draining,
    /// The grace period is nearly over: what is left is cut.
    Aborting,
    Exited,
}

impl Phase {
    pub const ALL: [Phase; 6] = [Phase::Starting, Phase::Running, Phase::LameDuck, Phase::Draining, Phase::Aborting, Phase::Exited];

    pub fn name(self) -> &'static str {
        match self {
            Phase::Starting => "Starting",
            Phase::Running => "Running",
            Phase::LameDuck => "LameDuck",
            Phase::Draining => "Draining",
            Phase::Aborting => "Aborting",
            Phase::Exited => "Exited",
        }
    }

    /// From here on an HTTP/1 answer carries `Connection: close`.
    pub fn is_leaving(self) -> bool {
        self >= Phase::LameDuck
    }
}

/// The phase as every thread sees it. It only ever moves forward.
#[derive(Debug)]
pub struct PhaseCell {
    phase: AtomicU8,
    /// In LameDuck: health checks are still answered well (`drain.health_fail_delay`).
    healthy: AtomicBool,
}

impl Default for PhaseCell {
    fn default() -> Self {
        PhaseCell { phase: AtomicU8::new(Phase::Starting as u8), healthy: AtomicBool::new(false) }
    }
}

impl PhaseCell {
    /// What a load balancer's health check is told, on whichever port.
    pub fn is_healthy(&self) -> bool {
        match self.get() {
            Phase::Running => true,
            Phase::LameDuck => self.healthy.load(Ordering::Relaxed),
            _ => false,
        }
    }

    /// Whether the health check is answered well in LameDuck.
    pub fn set_healthy(&self, healthy: bool) {
        self.healthy.store(healthy, Ordering::Relaxed);
    }

    pub fn get(&self) -> Phase {
        Phase::ALL.get(usize::from(self.phase.load(Ordering::Acquire))).copied().unwrap_or(Phase::Exited)
    }

    /// Moves on to `next`; false where the process is already there or further.
    pub fn advance(&self, next: Phase) -> bool {
        self.phase.fetch_max(next as u8, Ordering::AcqRel) < next as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_never_goes_back() {
        let cell = PhaseCell::default();
        assert!(cell.advance(Phase::Draining));
        assert!(!cell.advance(Phase::Running));
        assert_eq!(cell.get(), Phase::Draining);
    }
}
