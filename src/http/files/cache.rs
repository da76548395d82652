//! What is known of paths for a second: small files whole, and which paths there are not. A change on disk is seen within that second; after it a look
//! at the file's identity keeps the contents, or reads them anew.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use quick_cache::{Equivalent, Weighter, sync::Cache};
use tokio::time::Instant;

use super::{super::route::Step, Labels, lookup::Identity};
use crate::model::{clock, rules::Coding, site::Symlinks};

/// So long an entry answers without a look at the file system.
pub(super) const FRESH: Duration = Duration::from_secs(1);

/// What of an entry is not its key or its contents.
const OVERHEAD: u64 = 256;

/// A question to the file system.
#[derive(Hash, PartialEq, Eq, Debug)]
pub(super) struct Key {
    root: PathBuf,
    symlinks: Symlinks,
    codings: Vec<Coding>,
    steps: Vec<Step>,
}

/// The same, borrowed. Hashes as [`Key`] does: the same fields in the same order.
#[derive(Hash)]
pub(super) struct Question<'a> {
    pub root: &'a Path,
    pub symlinks: &'a Symlinks,
    pub codings: &'a [Coding],
    pub steps: &'a [Step],
}

impl Equivalent<Key> for Question<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        self.root == key.root && *self.symlinks == key.symlinks && self.codings == key.codings && self.steps == key.steps
    }
}

impl Question<'_> {
    pub fn to_key(&self) -> Key {
        let Question { root, symlinks, codings, steps } = self;
        Key { root: root.to_path_buf(), symlinks: (*symlinks).clone(), codings: codings.to_vec(), steps: steps.to_vec() }
    }
}

/// What the file system has answered.
#[derive(Clone, Debug)]
pub(super) enum Known {
    File(Arc<Small>),
    Redirect,
    Script(String),
    Missing,
}

/// A file with its contents.
#[derive(Debug)]
pub(super) struct Small {
    pub identity: Identity,
    /// What names its type.
    pub path: Vec<u8>,
    pub labels: Labels,
    pub coding: Option<Coding>,
    pub contents: Bytes,
    /// It was written so shortly before it was read that the next change may have the same time.
    pub is_racy: bool,
}

#[derive(Clone, Debug)]
struct Entry {
    known: Known,
    looked: Instant,
}

#[derive(Clone)]
struct Weight;

impl Weighter<Key, Entry> for Weight {
    fn weight(&self, key: &Key, entry: &Entry) -> u64 {
        let steps = key.steps.iter().map(|step| match step {
            Step::File(path) | Step::Directory { path, .. } => path.len(),
            Step::Script(name) => name.len(),
        });
        let contents = match &entry.known {
            Known::File(file) => file.contents.len() + file.path.len(),
            _ => 0,
        };
        OVERHEAD + u64::try_from(steps.sum::<usize>() + contents + key.root.as_os_str().len()).unwrap_or(u64::MAX / 2)
    }
}

/// One for the process; bounded by the bytes of its keys and contents.
pub(super) struct Stats(Option<Cache<Key, Entry, Weight>>);

impl Stats {
    /// `bytes`: 0 for none.
    pub fn new(bytes: u64) -> Self {
        // The mean of an entry: it sizes the tables alone.
        let entries = usize::try_from(bytes / 4096).unwrap_or(usize::MAX);
        Stats((bytes > 0).then(|| Cache::with_weighter(entries.max(16), bytes, Weight)))
    }

    /// Of keys and contents together.
    #[cfg(test)]
    pub fn bytes(&self) -> u64 {
        self.0.as_ref().map_or(0, Cache::weight)
    }

    /// `Ok`: it answers. `Err`: nothing does, but perhaps contents that are still right.
    pub fn get(&self, question: &Question<'_>) -> Result<Known, Option<Arc<Small>>> {
        let Some(Entry { known, looked }) = self.0.as_ref().and_then(|cache| cache.get(question)) else { return Err(None) };
        match known {
            known if clock::now().saturating_duration_since(looked) < FRESH => Ok(known),
            Known::File(file) => Err(Some(file)),
            _ => Err(None),
        }
    }

    /// `looked`: when the look began. What changed since is not in `known`.
    pub fn put(&self, key: Key, known: Known, looked: Instant) {
        if let Some(cache) = &self.0 {
            cache.insert(key, Entry { known, looked });
        }
    }
}
