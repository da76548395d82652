//! Passive ejection and what probes say -> usable or not. Pure: time is milliseconds that the caller gives.

/// Failures in a row before an endpoint is left alone for a while.
const FALL: u32 = 2;
const FIRST_EJECTION_MS: u64 = 1_000;
const LONGEST_EJECTION_MS: u64 = 30_000;

/// What is known of an endpoint's health.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Failures of users' requests in a row.
    pub failures: u32,
    /// Not offered before then, unless nothing else is there.
    pub ejected_until_ms: u64,
    pub probe: Probe,
    pub preflight: Preflight,
}

/// Whether the pod has yet to show that it is warm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preflight {
    /// It has, or nobody asks for it.
    #[default]
    Done,
    /// No user's request before it is done: not even as a last resort.
    Asking,
    /// A last resort from here on.
    GaveUp,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Probe {
    /// Nothing asks it: usable until it fails.
    #[default]
    None,
    /// To be asked before its first request.
    Pending,
    Up {
        misses: u32,
    },
    Down {
        hits: u32,
    },
}

impl Health {
    pub fn is_usable(&self, now_ms: u64) -> bool {
        self.ejected_until_ms <= now_ms && matches!(self.probe, Probe::None | Probe::Up { .. }) && self.preflight == Preflight::Done
    }

    /// A connection could not be made, or broke before an answer.
    pub fn failed(&mut self, now_ms: u64) {
        self.failures = self.failures.saturating_add(1);
        if self.failures >= FALL {
            let back_off = FIRST_EJECTION_MS << (self.failures - FALL).min(8);
            self.ejected_until_ms = now_ms + back_off.min(LONGEST_EJECTION_MS);
        }
    }

    pub fn succeeded(&mut self) {
        self.failures = 0;
        self.ejected_until_ms = 0;
    }

    /// A probe answered (`good`) or did not; `fall` and `rise` in a row turn it.
    pub fn probed(&mut self, good: bool, fall: u32, rise: u32) {
        self.probe = match (self.probe, good) {
            (Probe::None | Probe::Pending, true) => Probe::Up { misses: 0 },
            (Probe::None | Probe::Pending, false) => Probe::Down { hits: 0 },
            (Probe::Up { .. }, true) => Probe::Up { misses: 0 },
            // Users' requests have failed already: one more failure does not make it usable when its ejection is over.
            (Probe::Up { misses }, false) if misses + 1 >= fall || self.failures >= FALL => Probe::Down { hits: 0 },
            (Probe::Up { misses }, false) => Probe::Up { misses: misses + 1 },
            (Probe::Down { hits }, true) if hits + 1 >= rise => Probe::Up { misses: 0 },
            (Probe::Down { hits }, true) => Probe::Down { hits: hits + 1 },
            (Probe::Down { .. }, false) => Probe::Down { hits: 0 },
        };
        if good {
            self.succeeded();
        }
    }

    /// Nothing asks it any more: what was asked last is forgotten, failures of users' requests are not.
    pub fn not_probed(&mut self) {
        self.probe = Probe::None;
    }

    pub fn reason(&self, now_ms: u64) -> &'static str {
        match self.probe {
            _ if self.preflight == Preflight::Asking => "in preflight",
            _ if self.preflight == Preflight::GaveUp => "preflight gave up",
            Probe::Pending => "not asked yet",
            Probe::Down { .. } => "probe failed",
            _ if self.ejected_until_ms > now_ms => "ejected after failures",
            _ => "",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_failures_eject_and_the_back_off_grows_to_a_bound() {
        let mut health = Health::default();
        health.failed(0);
        assert!(health.is_usable(0));
        health.failed(0);
        assert!(!health.is_usable(999));
        assert!(health.is_usable(1_000));
        for _ in 0..40 {
            health.failed(0);
        }
        assert_eq!(health.ejected_until_ms, LONGEST_EJECTION_MS);
        health.succeeded();
        assert!(health.is_usable(0));
    }

    #[test]
    fn a_probe_turns_only_after_fall_and_rise() {
        let mut health = Health { probe: Probe::Pending, ..Health::default() };
        assert!(!health.is_usable(0));
        health.probed(true, 2, 2);
        assert!(health.is_usable(0));
        health.probed(false, 2, 2);
        assert!(health.is_usable(0));
        health.probed(false, 2, 2);
        assert!(!health.is_usable(0));
        health.probed(true, 2, 2);
        assert!(!health.is_usable(0));
        health.probed(true, 2, 2);
        assert!(health.is_usable(0));
    }
}
