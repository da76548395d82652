//! `$apr1$` of Apache's htpasswd: a thousand rounds of MD5 (apr_md5.c). Weak, and what most files have.

use md5::{Digest, Md5};

const ITOA64: &[u8; 64] = b"./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// The hash of `password` without its `$apr1$SALT$`. Of the salt eight bytes count.
pub fn hash(password: &[u8], salt: &[u8]) -> String {
    let salt = &salt[..salt.len().min(8)];
    let mut inner = Md5::new();
    for part in [password, salt, password] {
        inner.update(part);
    }
    let inner = inner.finalize();
    let mut outer = Md5::new();
    for part in [password, b"$apr1$", salt] {
        outer.update(part);
    }
    let mut left = password.len();
    while left > 0 {
        let step = left.min(16);
        outer.update(&inner[..step]);
        left -= step;
    }
    let mut bits = password.len();
    while bits > 0 {
        match bits & 1 {
            1 => outer.update([0]),
            _ => outer.update(&password[..1]),
        }
        bits >>= 1;
    }
    let mut last = outer.finalize();
    for round in 0..1_000 {
        let mut next = Md5::new();
        let odd = round % 2 == 1;
        next.update(if odd { password } else { &last[..] });
        if round % 3 != 0 {
            next.update(salt);
        }
        if round % 7 != 0 {
            next.update(password);
        }
        next.update(if odd { &last[..] } else { password });
        last = next.finalize();
    }
    let mut out = String::with_capacity(22);
    let mut put = |mut value: u32, count: usize| {
        for _ in 0..count {
            out.push(char::from(ITOA64[(value & 63) as usize]));
            value >>= 6;
        }
    };
    for (a, b, c) in [(0, 6, 12), (1, 7, 13), (2, 8, 14), (3, 9, 15), (4, 10, 5)] {
        put(u32::from(last[a]) << 16 | u32::from(last[b]) << 8 | u32::from(last[c]), 4);
    }
    put(u32::from(last[11]), 2);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by `openssl passwd -apr1`.
    #[test]
    fn it_is_that_of_apache() {
        for (password, salt, expected) in OPENSSL {
            assert_eq!(hash(password.as_bytes(), salt.as_bytes()), expected, "{password}");
        }
    }

    const OPENSSL: [(&str, &str, &str); 4] = [
        ("password", "lZL6V/ci", "eIMz/iKDkbtys/uU7LEK00"),
        ("", "abcdefgh", "L.PT565ESX4Tp2bqNs7Ie."),
        ("a password that is longer than sixteen bytes", "x", "lWAXPPpTNwmkWhArt/zPh0"),
        ("pässwörd", "12345678", "0NJU6izOW5MGH4BL2C/sK/"),
    ];
}
