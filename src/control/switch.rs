//! Which set is active: the annotation, else what the peers serve, else an operator's swap, else the file.
//!
//! A reload does not undo an operator's swap unless `active` itself has changed in the file since.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use super::config::UpstreamConfig;
use crate::upstream::{Upstream, snapshot::ActiveBy};

/// An operator's choice, and what the file said when it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    pub set: String,
    pub by: String,
    pub file_active: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    pub upstreams: BTreeMap<String, Choice>,
    /// What the annotation says and was taken, of upstreams with `active_from`. Not remembered: the cluster does that.
    #[serde(skip)]
    pub annotated: BTreeMap<Arc<str>, Arc<str>>,
    /// What the other replicas served when this one started and could not follow the annotation.
    #[serde(skip)]
    pub peers: BTreeMap<Arc<str>, Arc<str>>,
}

impl Switch {
    /// The set that is to be active, and by whom. `old` keeps nothing alive: the choices do.
    pub fn active(&self, name: &str, file: &UpstreamConfig, old: Option<&Upstream>) -> Option<(Arc<str>, ActiveBy)> {
        if file.active_from.is_some()
            && let Some(set) = self.annotated.get(name).and_then(|set| file.sets.iter().find(|s| s.name == *set))
        {
            return Some((set.name.clone(), ActiveBy::Annotation));
        }
        if file.active_from.is_some()
            && let Some(set) = self.peers.get(name).and_then(|set| file.sets.iter().find(|s| s.name == *set))
        {
            return Some((set.name.clone(), ActiveBy::Peers));
        }
        if let Some(choice) = self.upstreams.get(name)
            && file.active_set().is_some_and(|a| **a == *choice.file_active)
            && let Some(set) = file.sets.iter().find(|s| *s.name == *choice.set)
        {
            return Some((set.name.clone(), ActiveBy::Operator(choice.by.clone())));
        }
        // The same Arc where nothing changed.
        let from_file = file.active_set()?;
        let active = old.map(|o| o.active.name()).filter(|a| *a == from_file).unwrap_or(from_file);
        Some((active.clone(), ActiveBy::File))
    }

    pub fn choose(&mut self, name: &str, set: &str, by: &str, file: &UpstreamConfig) {
        let file_active = file.active_set().map_or_else(String::new, |a| a.to_string());
        self.upstreams.insert(name.to_owned(), Choice { set: set.to_owned(), by: by.to_owned(), file_active });
    }

    /// Choices that the file has overruled, and those of upstreams that are gone, are forgotten.
    pub fn prune(&mut self, upstreams: &BTreeMap<Arc<str>, UpstreamConfig>) {
        for told in [&mut self.annotated, &mut self.peers] {
            told.retain(|name, set| {
                upstreams.get(name).is_some_and(|u| u.active_from.is_some() && u.sets.iter().any(|s| s.name == *set))
            });
        }
        self.upstreams.retain(|name, choice| {
            upstreams.get(name.as_str()).is_some_and(|u| {
                u.active_set().is_some_and(|a| **a == *choice.file_active) && u.sets.iter().any(|s| *s.name == *choice.set)
            })
        });
    }
}
