//! Listening sockets, and how many connections and files there may be.

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use tokio::sync::mpsc;

use crate::{
    control::{Control, reconcile::Listeners},
    edge::listener::{self, Caps, Command},
    http::spill::Buffers,
    model::Settings,
    telemetry::{access_log::AccessLog, sink::Target, tracing::Log},
};

/// Kept for listeners, logs, FPM and files when "auto" shares out file descriptors.
const SPARE_DESCRIPTORS: usize = 64;
/// What "auto" gives at most: each connection may have a head of 81 KiB on its way.
const AUTO_CONNECTIONS: usize = 16 * 1024;
/// One in so many descriptors may be a spill file's.
pub(super) const SPILL_PART: usize = 8;

/// The reconciler's hand on sockets, logs and budgets.
pub(super) struct Listening {
    pub commands: mpsc::Sender<Command>,
    pub current: BTreeSet<SocketAddr>,
    pub prepared: Vec<std::net::TcpListener>,
    pub log: Arc<Log>,
    pub access: AccessLog,
    pub buffers: Buffers,
    pub control: Arc<Control>,
}

impl Listeners for Listening {
    fn prepare(&mut self, wanted: &[SocketAddr]) -> io::Result<()> {
        self.prepared =
            wanted.iter().filter(|a| !self.current.contains(a)).map(|a| listener::bind(*a)).collect::<io::Result<Vec<_>>>()?;
        Ok(())
    }

    fn commit(&mut self, settings: &Settings) {
        let keep: Vec<SocketAddr> = settings.listen.addresses().collect();
        self.current = keep.iter().copied().collect();
        let add = std::mem::take(&mut self.prepared);
        let caps = caps(settings);
        self.control.connections_max.store(caps.connections, Ordering::Relaxed);
        for command in [Command::Caps(caps), Command::Listen { keep, add }] {
            if self.commands.try_send(command).is_err() {
                tracing::error!("the acceptor does not take commands");
            }
        }
        self.buffers.memory.set_limit(settings.buffer.total);
        self.buffers.disk.set_limit(settings.buffer.disk);
    }

    fn abandon(&mut self) {
        self.prepared.clear();
    }

    fn apply(&mut self, settings: &Settings) -> Result<(), String> {
        self.access
            .set_target(Target::from(&*settings.log.access_file))
            .map_err(|e| format!("access_file {}: {e}", settings.log.access_file))?;
        self.access.set_format(&settings.log);
        self.log.set_level(&settings.log.level)
    }
}

pub(super) fn caps(settings: &Settings) -> Caps {
    let listen = &settings.listen;
    Caps {
        connections: listen.max_connections.unwrap_or_else(connections_by_descriptors),
        per_address: listen.max_connections_per_address,
        trusted: listen.trusted_proxies.clone(),
        tls: listen.https.clone(),
    }
}

/// As many as the process may have.
pub(super) fn descriptors() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.and_then(|n| usize::try_from(n).ok()).unwrap_or(1 << 20)
}

/// A shell's soft limit is there for programs that use select(2).
pub(super) fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// A client and a connection to FPM for each, and some to spare.
fn connections_by_descriptors() -> usize {
    let limit = descriptors();
    ((limit - limit / SPILL_PART).saturating_sub(SPARE_DESCRIPTORS) / 2).clamp(16, AUTO_CONNECTIONS)
}

/// Mode 0600 from its first moment: bound under a name of its own, then renamed. A socket that nobody answers on is replaced.
pub(super) fn bind_admin(path: &Path) -> Result<std::os::unix::net::UnixListener, String> {
    let open = || -> io::Result<std::os::unix::net::UnixListener> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process answers there"));
        }
        let temporary = path.with_extension(format!("{}.new", std::process::id()));
        let _ = std::fs::remove_file(&temporary);
        let listener = std::os::unix::net::UnixListener::bind(&temporary)?;
        std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&temporary, path)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    open().map_err(|e| {
        let help = match e.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound | io::ErrorKind::ReadOnlyFilesystem => {
                "\n  help: start as a user who may write there, or write  admin = \"/tmp/slackwater.sock\"  in [listen]"
            }
            io::ErrorKind::AddrInUse => {
                "\n  help: another Slackwater runs with this listen.admin: end it, or write another path in [listen]"
            }
            _ => "",
        };
        format!("listen.admin {}: {e}{help}", path.display())
    })
}
