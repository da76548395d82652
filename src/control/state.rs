//! The state file: what must survive a restart. An operator's swaps, and what Kubernetes had told last, for a start while its API server is
//! away.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::{
    kubernetes::{AllKnown, Annotations},
    slices::{AllFound, Found, Pod},
    switch::Switch,
};
use crate::model::upstream::{Port, ServicePort};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    #[serde(flatten)]
    pub switch: Switch,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<Remembered>,
}

/// What the Services of one namespace had told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    pub namespace: String,
    /// Seconds since 1970: when the API server had last told it.
    pub written: u64,
    pub services: BTreeMap<Arc<str>, Service>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<Annotations>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Endpoints>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    pub port: PortName,
    /// Addresses, and whether they were ready.
    pub endpoints: BTreeMap<String, bool>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PortName {
    Number(u16),
    Name(String),
}

impl State {
    /// A missing file is an empty one; a broken one is an error.
    pub fn load(path: &Path) -> io::Result<State> {
        match fs::read(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(State::default()),
            Err(e) => Err(e),
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other),
        }
    }

    /// Whole or not at all: a SIGKILL in between leaves what was there.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let temporary = path.with_extension("new");
        let mut file = fs::File::create(&temporary)?;
        file.write_all(&serde_json::to_vec_pretty(self).map_err(io::Error::other)?)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fs::File::open(folder)?.sync_all()
    }
}

impl Remembered {
    /// What is worth to be remembered of what is known now.
    /// `age` is that of the oldest of it: what is old does not get young by being written again.
    pub fn of(namespace: &str, known: &AllKnown, found: &AllFound, age: Duration) -> Self {
        let at = SystemTime::now().checked_sub(age).unwrap_or(UNIX_EPOCH);
        let written = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut services: BTreeMap<Arc<str>, Service> = BTreeMap::new();
        for (name, known) in known {
            services.entry(name.clone()).or_default().annotations = known.service.clone();
        }
        for (ServicePort { service, port }, found) in found {
            let port = match port {
                Port::Name(name) => PortName::Name(name.clone()),
                Port::Number(number) => PortName::Number(*number),
            };
            let endpoints = found.iter().map(|(address, pod)| (address.to_string(), pod.ready)).collect();
            services.entry(service.clone()).or_default().ports.push(Endpoints { port, endpoints });
        }
        Remembered { namespace: namespace.to_owned(), written, services }
    }

    pub fn written(&self) -> SystemTime {
        // A number that no clock has told is as good as none.
        UNIX_EPOCH.checked_add(Duration::from_secs(self.written)).unwrap_or(UNIX_EPOCH)
    }

    pub fn found(&self) -> AllFound {
        let mut all = AllFound::new();
        for (service, told) in &self.services {
            for Endpoints { port, endpoints } in &told.ports {
                let port = match port {
                    PortName::Name(name) => Port::Name(name.clone()),
                    PortName::Number(number) => Port::Number(*number),
                };
                let found: Found = endpoints
                    .iter()
                    .filter_map(|(address, ready)| Some((address.parse().ok()?, Pod { ready: *ready, uid: None })))
                    .collect();
                all.insert(ServicePort { service: service.clone(), port }, found);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::kubernetes::Known;

    #[test]
    fn what_is_remembered_is_what_was_known() {
        let source = |service: &str, port| ServicePort { service: service.into(), port };
        let found = AllFound::from([
            (
                source("php-blue", Port::Name("fpm".into())),
                Found::from([("10.0.0.1:9000".parse().unwrap(), Pod { ready: true, uid: None })]),
            ),
            (source("php-green", Port::Number(9000)), Found::from([("[fd00::1]:9000".parse().unwrap(), Pod::default())])),
        ]);
        let service = Some(Annotations { workers: Some(8), active: Some("green".into()), missing: false });
        let known = AllKnown::from([("php".into(), Known { slices: None, service })]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        assert_eq!(State::load(&path).unwrap(), State::default());
        let state =
            State { switch: Switch::default(), kubernetes: Some(Remembered::of("learning", &known, &found, Duration::ZERO)) };
        state.save(&path).unwrap();
        let again = State::load(&path).unwrap();
        assert_eq!(again, state);
        let remembered = again.kubernetes.unwrap();
        assert_eq!(remembered.found(), found);
        assert_eq!(remembered.services["php"].annotations, known["php"].service);
        assert!(remembered.written().elapsed().unwrap() < Duration::from_secs(60));
        // As versions before wrote it.
        fs::write(&path, r#"{"upstreams":{"php":{"set":"green","by":"uid 0","file_active":"blue"}}}"#).unwrap();
        assert_eq!(State::load(&path).unwrap().switch.upstreams["php"].set, "green");
        fs::write(&path, "{").unwrap();
        assert!(State::load(&path).is_err());
    }
}
