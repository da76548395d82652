//! Files that change by themselves: the configuration where `reload = "watch"`, certificates always. Looked at once a second, for a ConfigMap or Secret is a link that is renamed.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::{Control, reconcile::Change};

const EVERY: Duration = Duration::from_secs(1);

/// What a file is, as far as it can be told without reading it; a ConfigMap or Secret changes it by a renamed link.
type Looks = Vec<Option<(u64, u64, i64, i64, u64)>>;

fn look(files: &[PathBuf]) -> Looks {
    use std::os::unix::fs::MetadataExt;
    files.iter().map(|f| std::fs::metadata(f).map(|m| (m.dev(), m.ino(), m.mtime(), m.mtime_nsec(), m.len())).ok()).collect()
}

/// `reload = "watch"`.
pub async fn files(control: Arc<Control>, path: PathBuf, mut files: Vec<PathBuf>) {
    if !files.contains(&path) {
        files.push(path);
    }
    let mut before = look(&files);
    loop {
        tokio::time::sleep(EVERY).await;
        let now = look(&files);
        if now != before {
            before = now;
            let _ = control.changes.send(Change::Reload { by: "watch", answer: None }).await;
        }
    }
}

/// Certificates, keys and ticket keys, in either mode: whoever renews them does not know of this process.
pub async fn certificates(control: Arc<Control>) {
    let files = || -> Vec<PathBuf> {
        let settings = control.store.load().settings.clone();
        let certificates = settings.certificates.iter().flat_map(|files| [files.certificate.clone(), files.key.clone()]);
        certificates.chain(settings.listen.tls_ticket_keys.iter().cloned()).collect()
    };
    // What has changed between the first reading and this look is read once more; where nothing has, nothing comes of it.
    let mut before = None;
    loop {
        let files = files();
        let now = Some((look(&files), files));
        // What could not be read for want of descriptors can be a second later, though the files are the same.
        if now != before || control.told().certificates.is_some() {
            before = now;
            let _ = control.changes.send(Change::Certificates).await;
        }
        tokio::time::sleep(EVERY).await;
    }
}
