//! `basic_auth`: user and password against a file of Apache's htpasswd, with bcrypt, argon2 or apr1 (RFC 7617).
//!
//! Hashing takes milliseconds by design, and reading a file may take longer: neither runs on a worker. What was right is remembered for a minute, as a
//! keyed hash, so that not every picture of a page costs a bcrypt. A file that changes is seen within a second.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash, RandomState},
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use argon2::{
    Argon2,
    password_hash::{PasswordVerifier, phc::PasswordHash},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderValue, header};
use tokio::{runtime::Handle, sync::Semaphore};

use super::apr1;
use crate::error::{Error, Kind};

const REMEMBERED: Duration = Duration::from_secs(60);
const LOOKED_AT_AGAIN: Duration = Duration::from_secs(1);
/// Right answers, and files, that are remembered; one more forgets all.
const MOST: usize = 10_000;
/// A file of 100,000 users.
const MOST_BYTES: u64 = 16 << 20;
/// How long a password waits to be checked; 429.
const PATIENCE: Duration = Duration::from_secs(5);
/// Hashes under way: what strangers guess must not take all of the pool.
const AT_ONCE: usize = 2;

/// One file as it was.
struct Users {
    looked: Instant,
    version: (SystemTime, u64),
    hashes: Arc<HashMap<String, String>>,
}

/// For the process: files and what was right are the same for all its workers.
struct State {
    files: Mutex<HashMap<PathBuf, Users>>,
    /// Two keyed hashes of file, its version, user and password, and until when they count.
    right: Mutex<HashMap<(u64, u64), Instant>>,
    keys: (RandomState, RandomState),
    permits: Semaphore,
}

static STATE: LazyLock<State> = LazyLock::new(|| State {
    files: Mutex::default(),
    right: Mutex::default(),
    keys: (RandomState::new(), RandomState::new()),
    permits: Semaphore::const_new(AT_ONCE),
});

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remember<K: Eq + Hash, V>(known: &Mutex<HashMap<K, V>>, key: K, value: V) {
    let mut known = lock(known);
    if known.len() >= MOST {
        known.clear();
    }
    known.insert(key, value);
}

/// User and password as they were sent; `None`: none were, or what was is malformed.
pub fn credentials(headers: &HeaderMap) -> Option<(String, String)> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    // Of two PHP would see both: nobody is let in by one of them.
    let value = values.next().filter(|_| values.next().is_none())?.to_str().ok()?;
    let (scheme, encoded) = value.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
    let (user, password) = decoded.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

/// For a 401.
pub fn challenge(realm: &str) -> Option<HeaderValue> {
    let quoted = realm.replace('\\', "\\\\").replace('"', "\\\"");
    HeaderValue::from_str(&format!("Basic realm=\"{quoted}\", charset=\"UTF-8\"")).ok()
}

/// Whether the file has this user with this password.
///
/// # Errors
/// 500 where the file cannot be read: better nobody than everybody.
pub async fn is_right(pool: &Handle, file: &Path, user: String, password: String) -> Result<bool, Error> {
    let broken = |why: String| Error::new(Kind::Internal, format!("basic_auth: {}: {why}", file.display()));
    let path = file.to_owned();
    let users = pool.spawn_blocking(move || users(&path)).await.map_err(|e| broken(e.to_string()))?;
    let (hashes, version) = users.map_err(broken)?;
    let asked = (file, version, &user, &password);
    let key = (STATE.keys.0.hash_one(asked), STATE.keys.1.hash_one(asked));
    if lock(&STATE.right).get(&key).is_some_and(|until| *until > Instant::now()) {
        return Ok(true);
    }
    let Ok(Ok(permit)) = tokio::time::timeout(PATIENCE, STATE.permits.acquire()).await else {
        return Err(Error::new(Kind::TooManyAtOnce, "basic_auth: too many passwords are being checked".to_owned()));
    };
    let right = pool
        .spawn_blocking(move || {
            // It goes with the work, not with the client, who may leave.
            let _permit = permit;
            match hashes.get(&user) {
                Some(hash) => verify(&password, hash),
                // As long as for one who is there: how long it takes does not tell who is.
                None => {
                    if let Some(hash) = hashes.values().next() {
                        verify(&password, hash);
                    }
                    false
                }
            }
        })
        .await
        .map_err(|e| broken(e.to_string()))?;
    if right {
        remember(&STATE.right, key, Instant::now() + REMEMBERED);
    }
    Ok(right)
}

type Read = (Arc<HashMap<String, String>>, (SystemTime, u64));

/// On the pool.
fn users(file: &Path) -> Result<Read, String> {
    if let Some(known) = lock(&STATE.files).get(file)
        && known.looked.elapsed() < LOOKED_AT_AGAIN
    {
        return Ok((known.hashes.clone(), known.version));
    }
    let meta = std::fs::metadata(file).map_err(|e| e.to_string())?;
    if !meta.is_file() || meta.len() > MOST_BYTES {
        return Err(format!("it is no file of at most {} MiB", MOST_BYTES >> 20));
    }
    let version = (meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len());
    let same = lock(&STATE.files).get(file).filter(|known| known.version == version).map(|known| known.hashes.clone());
    let hashes = match same {
        Some(hashes) => hashes,
        // Without the lock: a file system that hangs holds up those alone who need this file.
        None => Arc::new(parse(&std::fs::read_to_string(file).map_err(|e| e.to_string())?)),
    };
    remember(&STATE.files, file.to_owned(), Users { looked: Instant::now(), version, hashes: hashes.clone() });
    Ok((hashes, version))
}

/// `user:hash` a line; what follows a second colon is a comment, as in Nginx, and so is a line that begins with `#`.
fn parse(text: &str) -> HashMap<String, String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .filter_map(|line| {
            let (user, rest) = line.split_once(':')?;
            Some((user.to_owned(), rest.split(':').next().unwrap_or_default().to_owned()))
        })
        .collect()
}

/// Hashes of other kinds are nobody's.
fn verify(password: &str, hash: &str) -> bool {
    if let Some(rest) = hash.strip_prefix("$apr1$") {
        let Some((salt, expected)) = rest.split_once('$') else { return false };
        return is_same(apr1::hash(password.as_bytes(), salt.as_bytes()).as_bytes(), expected.as_bytes());
    }
    if hash.starts_with("$2") {
        return bcrypt::verify(password, hash).unwrap_or(false);
    }
    if hash.starts_with("$argon2") {
        return PasswordHash::new(hash).is_ok_and(|hash| Argon2::default().verify_password(password.as_bytes(), &hash).is_ok());
    }
    false
}

/// In a time that does not depend on where they differ.
fn is_same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(value: &str) -> Option<(String, String)> {
        credentials(&HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap())]))
    }

    #[test]
    fn credentials_are_read_as_rfc_7617_has_them() {
        let right = Some(("Aladdin".to_owned(), "open:sesame".to_owned()));
        let encoded = STANDARD.encode("Aladdin:open:sesame");
        assert_eq!([with(&format!("Basic {encoded}")), with(&format!("bAsIc {encoded}"))], [right.clone(), right]);
        for wrong in ["", "Basic", "Basic !", "Bearer abc", &format!("Basic {}", STANDARD.encode("nocolon"))] {
            assert_eq!(with(wrong), None, "{wrong}");
        }
        assert_eq!(challenge("a \"b\"").unwrap(), "Basic realm=\"a \\\"b\\\"\", charset=\"UTF-8\"");
    }

    #[test]
    fn each_kind_of_hash_knows_its_password_and_no_other() {
        use argon2::password_hash::PasswordHasher;
        let argon = Argon2::default().hash_password(b"secret").unwrap().to_string();
        let apr = format!("$apr1$abcdefgh${}", apr1::hash(b"secret", b"abcdefgh"));
        for hash in [bcrypt::hash("secret", 4).unwrap(), argon, apr] {
            assert!(verify("secret", &hash), "{hash}");
            assert!(!verify("Secret", &hash) && !verify("", &hash), "{hash}");
        }
        for hash in ["", "secret", "{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=", "$apr1$", "$apr1$x", "$2y$", "$argon2id$", "$1$a$b"] {
            assert!(!verify("secret", hash), "{hash}");
        }
    }

    #[test]
    fn comments_and_empty_lines_are_nobody() {
        let users = parse("# users\n\nann:$apr1$x$y:her comment\n bob:$2y$z \nbroken\n");
        let mut names: Vec<_> = users.iter().map(|(user, hash)| format!("{user} {hash}")).collect();
        names.sort();
        assert_eq!(names, ["ann $apr1$x$y", "bob $2y$z"]);
    }
}
