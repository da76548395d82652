//! The file that turns a maintenance on and off.

use std::{io, sync::atomic::Ordering};

use tokio::runtime::Handle;

use crate::model::rules::Flag;

/// So old may what is known of the file be.
const FRESH_MS: u64 = 1000;

/// As of a second ago at most. One request a second looks, off the worker; the others take what is known.
pub async fn is_on(flag: &Flag, pool: &Handle) -> bool {
    // 0 is for "never".
    let now = u64::try_from(flag.since.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
    let looked = flag.looked.load(Ordering::Acquire);
    let is_old = looked == 0 || now.saturating_sub(looked) >= FRESH_MS;
    if !is_old || flag.looked.compare_exchange(looked, now, Ordering::AcqRel, Ordering::Acquire).is_err() {
        return flag.on.load(Ordering::Acquire);
    }
    let path = flag.file.clone();
    let found = pool.spawn_blocking(move || std::fs::metadata(path)).await.map_err(io::Error::other).flatten();
    let file = flag.file.display();
    let on = match found {
        Ok(_) => true,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => false,
        // Nobody can tell: it stays as it is.
        Err(error) => {
            tracing::warn!(%file, at = flag.at, %error, "the file of a maintenance cannot be looked for");
            flag.on.load(Ordering::Acquire)
        }
    };
    if flag.on.swap(on, Ordering::AcqRel) != on {
        match on {
            true => tracing::info!(%file, at = flag.at, "maintenance on"),
            false => tracing::info!(%file, at = flag.at, "maintenance off"),
        }
    }
    on
}
