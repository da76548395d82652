//! From a path to an open descriptor. Everything is decided on what was opened, never on a name looked at before.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, open, openat2},
    io::Errno,
};

use super::super::route::{Index, Step};
use crate::model::{rules::Coding, site::Symlinks};

/// An open regular file and what fstat says of it.
pub(super) struct Opened {
    pub file: File,
    pub identity: Identity,
}

/// Two that are equal have the same contents: whoever writes to a file or puts another in its place changes the time of its inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    pub size: u64,
    /// Seconds since 1970.
    pub modified: i64,
    changed: (i64, i64),
}

impl Identity {
    /// Whether another change could have the same times: file systems keep them by the tick, some by the second. As git has it for its index.
    pub fn is_racy(&self, now: SystemTime) -> bool {
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        self.changed.0 >= now.saturating_sub(2)
    }

    fn of(metadata: &fs::Metadata) -> Self {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: metadata.mtime(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

pub(super) enum Found {
    /// `path` names what was found, for its type.
    File {
        file: Opened,
        path: Vec<u8>,
        coding: Option<Coding>,
    },
    /// A directory, asked for without its `/`.
    Redirect,
    Script(String),
    Missing,
    Forbidden,
}

enum Entry {
    File(Opened),
    Directory,
    Missing,
    Forbidden,
}

/// `codings`: of a file the first that lies beside it is taken instead.
pub(super) fn find(root: &Path, symlinks: &Symlinks, steps: &[Step], codings: &[Coding]) -> io::Result<Found> {
    let found = find_plain(root, symlinks, steps)?;
    let Found::File { file, path, .. } = &found else { return Ok(found) };
    for coding in codings {
        let mut beside = path.clone();
        beside.extend_from_slice(coding.ending().as_bytes());
        // One that is older than its original was made of another.
        if let Ok(Entry::File(coded)) = entry(root, symlinks, &beside)
            && coded.identity.modified >= file.identity.modified
        {
            return Ok(Found::File { file: coded, path: path.clone(), coding: Some(*coding) });
        }
    }
    Ok(found)
}

fn find_plain(root: &Path, symlinks: &Symlinks, steps: &[Step]) -> io::Result<Found> {
    // "$uri" that is not there saves asking for "$uri/".
    let mut missing = None;
    for step in steps {
        match step {
            Step::File(path) => match entry(root, symlinks, path)? {
                Entry::File(file) => return Ok(Found::File { file, path: path.clone(), coding: None }),
                Entry::Forbidden => return Ok(Found::Forbidden),
                Entry::Missing => missing = Some(path),
                Entry::Directory => {}
            },
            // A script that we may not read is there: FPM may.
            Step::Script(name) => {
                if matches!(entry(root, symlinks, name.as_bytes())?, Entry::File(_) | Entry::Forbidden) {
                    return Ok(Found::Script(name.clone()));
                }
            }
            Step::Directory { path, .. } if missing == Some(path) => {}
            Step::Directory { path, index } => {
                if let Some(found) = find_index(root, symlinks, path, index)? {
                    return Ok(found);
                }
            }
        }
    }
    Ok(Found::Missing)
}

pub(super) fn is_file(root: &Path, symlinks: &Symlinks, path: &[u8]) -> io::Result<bool> {
    Ok(matches!(entry(root, symlinks, path)?, Entry::File(_) | Entry::Forbidden))
}

fn find_index(root: &Path, symlinks: &Symlinks, path: &[u8], index: &[Index]) -> io::Result<Option<Found>> {
    let with_slash = path.ends_with(b"/");
    for candidate in index {
        let found = match candidate {
            Index::File(name) => {
                let mut full = path.to_vec();
                if !with_slash {
                    full.push(b'/');
                }
                full.extend_from_slice(name.as_bytes());
                match entry(root, symlinks, &full)? {
                    Entry::File(file) => Some(Found::File { file, path: full, coding: None }),
                    Entry::Forbidden => Some(Found::Forbidden),
                    Entry::Directory | Entry::Missing => None,
                }
            }
            Index::Script { name, must_exist } => {
                let there = if *must_exist {
                    is_file(root, symlinks, name.as_bytes())?
                } else {
                    with_slash || matches!(entry(root, symlinks, path)?, Entry::Directory)
                };
                there.then(|| Found::Script(name.clone()))
            }
        };
        match found {
            None => {}
            Some(Found::Forbidden) => return Ok(Some(Found::Forbidden)),
            Some(_) if !with_slash => return Ok(Some(Found::Redirect)),
            found => return Ok(found),
        }
    }
    Ok(None)
}

fn entry(root: &Path, symlinks: &Symlinks, path: &[u8]) -> io::Result<Entry> {
    // The normalizer lets no `..` through; this file does not rely on it.
    if path.contains(&0) || path.split(|byte| *byte == b'/').any(|segment| segment == b"..") {
        return Ok(Entry::Missing);
    }
    let relative: &[u8] = match path.iter().position(|byte| *byte != b'/') {
        Some(start) => path.get(start..).unwrap_or_default(),
        None => b".",
    };
    let file: File = match open_below(root, symlinks, Path::new(OsStr::from_bytes(relative))) {
        Ok(Some(file)) => file.into(),
        Ok(None) => return Ok(Entry::Missing),
        // ENXIO: a socket, or a device without a driver.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG | Errno::LOOP | Errno::NXIO | Errno::NODEV) => {
            return Ok(Entry::Missing);
        }
        Err(Errno::ACCESS | Errno::PERM) => return Ok(Entry::Forbidden),
        Err(error) => return Err(error.into()),
    };
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Ok(Entry::Directory);
    }
    // A FIFO or a device has no end.
    if !metadata.is_file() {
        return Ok(Entry::Missing);
    }
    Ok(Entry::File(Opened { identity: Identity::of(&metadata), file }))
}

/// `None`: it is there, but a symbolic link leads to it that the site does not follow.
fn open_below(root: &Path, symlinks: &Symlinks, relative: &Path) -> Result<Option<OwnedFd>, Errno> {
    // NONBLOCK: open(2) of a FIFO waits for a writer otherwise.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let folders: &[PathBuf] = match symlinks {
        Symlinks::Follow => return open(root.join(relative), flags, Mode::empty()).map(Some),
        Symlinks::Within => &[],
        Symlinks::Folders(folders) => folders,
    };
    let directory = open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    match openat2(&directory, relative, flags, Mode::empty(), resolve) {
        Ok(file) => return Ok(Some(file)),
        // XDEV: a link to somewhere else or an absolute one, perhaps to a place that is allowed. AGAIN: a rename in
        // between. The rest: a kernel before 5.6, or a container runtime that does not know the call.
        Err(Errno::XDEV | Errno::AGAIN | Errno::NOSYS | Errno::PERM | Errno::INVAL) => {}
        Err(error) => return Err(error),
    }
    let file = open(root.join(relative), flags, Mode::empty())?;
    // Where the descriptor we hold really leads: no link turned afterwards changes that. Without /proc: refused.
    let Ok(real) = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) else { return Ok(None) };
    let allowed = |folder: &Path| fs::canonicalize(folder).is_ok_and(|folder| real.starts_with(folder));
    let is_allowed = allowed(root) || folders.iter().any(|folder| allowed(folder));
    Ok(is_allowed.then_some(file))
}
