//! A snapshot from the text of a configuration, for tests of the data plane alone.

use slackwater::{
    control::{
        build::{self, Before},
        config,
        switch::Switch,
    },
    upstream::Snapshot,
};

/// The first snapshot of `toml`, whose endpoints have as many workers as it says.
pub fn of(toml: &str, workers: usize) -> Snapshot {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("slackwater.toml");
    std::fs::write(&path, toml).unwrap();
    let config = config::load(&path, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}"));
    let before = Before {
        snapshot: None,
        switch: &Switch::default(),
        workers,
        retired: &Default::default(),
        found: &Default::default(),
        alive: &[],
    };
    let snapshot = build::build(&config, &before).unwrap();
    for upstream in snapshot.upstreams.values() {
        for endpoint in upstream.sets.values().flat_map(|set| &set.endpoints) {
            endpoint.set_capacity(upstream.policy.workers_per_endpoint);
        }
    }
    snapshot
}
