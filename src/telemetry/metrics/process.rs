//! What the process takes of its machine, under the names that Prometheus' clients have agreed on.

use std::{
    fs,
    sync::OnceLock,
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, getrlimit},
};

/// `None`: not known here (in a sandbox /proc may be out of reach).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    /// Seconds since 1970.
    pub started: Option<f64>,
    /// Seconds.
    pub cpu: Option<f64>,
    /// Bytes.
    pub resident: Option<u64>,
    pub descriptors: Option<u64>,
    pub most_descriptors: Option<u64>,
}

/// proc(5).
impl Usage {
    pub fn now() -> Usage {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // Behind the name, which may have spaces in it, the third field comes first.
        let fields: Vec<u64> = stat
            .rsplit_once(") ")
            .map_or_else(Vec::new, |(_, rest)| rest.split(' ').map(|f| f.trim().parse().unwrap_or(0)).collect());
        let field = |number: usize| fields.get(number - 3).copied();
        let seconds = |ticks: u64| ticks as f64 / clock_ticks_per_second() as f64;
        Usage {
            started: started(field(22).map(seconds)),
            cpu: field(14).zip(field(15)).map(|(user, system)| seconds(user + system)),
            resident: field(24).map(|pages| pages * page_size() as u64),
            // One of them is what the folder is read by.
            descriptors: fs::read_dir("/proc/self/fd").ok().map(|open| (open.count() as u64).saturating_sub(1)),
            most_descriptors: getrlimit(Resource::Nofile).current,
        }
    }
}

/// Worked out once: it is told in seconds since the machine began, whose wall clock may be set meanwhile.
fn started(after_boot: Option<f64>) -> Option<f64> {
    static STARTED: OnceLock<Option<f64>> = OnceLock::new();
    *STARTED.get_or_init(|| {
        let uptime = fs::read_to_string("/proc/uptime").ok()?;
        let uptime: f64 = uptime.split(' ').next()?.parse().ok()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
        Some(now - uptime + after_boot?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_what_it_takes() {
        let before = Usage::now();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let started = before.started.unwrap();
        assert!((now - 3600.0..=now + 1.0).contains(&started), "{started} beside {now}");
        assert!((1 << 20..1 << 34).contains(&before.resident.unwrap()), "{before:?}");
        assert!(before.descriptors.unwrap() >= 3 && before.most_descriptors > before.descriptors, "{before:?}");
        let open: Vec<_> = (0..10).map(|_| fs::File::open("/proc/self/stat").unwrap()).collect();
        assert!(Usage::now().descriptors.unwrap() >= before.descriptors.unwrap() + 10 - 3, "{before:?}, {:?}", Usage::now());
        drop(open);
        assert!(before.cpu.unwrap() >= 0.0);
    }
}
