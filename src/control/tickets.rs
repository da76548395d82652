//! Session tickets that every replica can read: the keys are files, as of a mounted Secret (RFC 5077, section 4; RFC 8446, section 4.6.1).
//!
//! A ticket is: the key's name, 16 bytes; a nonce, 12 bytes; the state under AES-256-GCM, with its tag. Key and name are derived from the file, so that any 48 bytes of
//! randomness are good, and a file of Nginx's 80 bytes too.

use std::{
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf, rand,
};
use rustls::server::ProducesTickets;

const NAME: usize = 16;
/// Fewer random bytes than that are a mistake.
const LEAST: usize = 48;
/// So long clients may come back with one, in seconds: as long as a key is the first, by docs/tls.md.
const LIFETIME: u32 = 24 * 3600;

struct Key {
    name: [u8; NAME],
    cipher: LessSafeKey,
}

/// The first key encrypts, all decrypt.
pub struct SharedTickets(Vec<Key>);

impl fmt::Debug for SharedTickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedTickets({} keys)", self.0.len())
    }
}

struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

fn derive(file: &[u8]) -> Option<Key> {
    // Zeros, or another byte for ever, are no secret.
    if file.len() < LEAST || file.iter().all(|byte| Some(byte) == file.first()) {
        return None;
    }
    let secret = hkdf::Salt::new(hkdf::HKDF_SHA256, b"slackwater tickets").extract(file);
    let mut key = [0; 32];
    secret.expand(&[b"key"], Length(key.len())).ok()?.fill(&mut key).ok()?;
    let mut name = [0; NAME];
    secret.expand(&[b"name"], Length(NAME)).ok()?.fill(&mut name).ok()?;
    Some(Key { name, cipher: LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).ok()?) })
}

impl SharedTickets {
    /// `None`: a file is too short, or there is none.
    pub fn new(files: &[&[u8]]) -> Option<Self> {
        let keys = files.iter().map(|file| derive(file)).collect::<Option<Vec<Key>>>()?;
        (!keys.is_empty()).then_some(SharedTickets(keys))
    }
}

impl ProducesTickets for SharedTickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        LIFETIME
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let key = self.0.first()?;
        let mut nonce = [0; NONCE_LEN];
        rand::fill(&mut nonce).ok()?;
        let mut sealed = [&now().to_be_bytes(), plain].concat();
        key.cipher.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(key.name), &mut sealed).ok()?;
        Some([key.name.as_slice(), &nonce, &sealed].concat())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (name, rest) = ticket.split_at_checked(NAME)?;
        let (nonce, sealed) = rest.split_at_checked(NONCE_LEN)?;
        let key = self.0.iter().find(|key| key.name == name)?;
        let mut plain = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(nonce.try_into().ok()?);
        let length = key.cipher.open_in_place(nonce, Aad::from(key.name), &mut plain).ok()?.len();
        plain.truncate(length);
        // The time at which it was made: a key that nobody turns would make tickets for ever.
        let (made, state) = plain.split_at_checked(8)?;
        let age = now().saturating_sub(u64::from_be_bytes(made.try_into().ok()?));
        (age <= u64::from(LIFETIME)).then(|| state.to_vec())
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_replica_reads_them_and_a_turned_key_still_does() {
        let (old, new): ([u8; 80], [u8; 80]) = (std::array::from_fn(|i| i as u8), std::array::from_fn(|i| 200 - i as u8));
        let before = SharedTickets::new(&[&old]).unwrap();
        let ticket = before.encrypt(b"state").unwrap();
        assert_ne!(before.encrypt(b"state").unwrap(), ticket, "a nonce each");
        assert_eq!(SharedTickets::new(&[&old]).unwrap().decrypt(&ticket).as_deref(), Some(b"state".as_slice()));
        let turned = SharedTickets::new(&[&new, &old]).unwrap();
        assert_eq!(turned.decrypt(&ticket).as_deref(), Some(b"state".as_slice()));
        assert_eq!(before.decrypt(&turned.encrypt(b"state").unwrap()), None, "the first key encrypts");
        assert_eq!(SharedTickets::new(&[&new]).unwrap().decrypt(&ticket), None);
        for at in 0..ticket.len() {
            let mut forged = ticket.clone();
            forged[at] ^= 1;
            assert_eq!(before.decrypt(&forged), None, "byte {at}");
            assert_eq!(before.decrypt(&ticket[..at]), None);
        }
        assert!(
            SharedTickets::new(&[&old[..47]]).is_none()
                && SharedTickets::new(&[&[0; 80]]).is_none()
                && SharedTickets::new(&[]).is_none()
        );
    }
}
