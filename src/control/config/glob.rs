//! `*`, which never crosses a `/`: for `include` and for checks of `scripts`.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

/// Whether a path matches a pattern, folder by folder.
pub fn matches(pattern: &str, path: &str) -> bool {
    pattern.split('/').count() == path.split('/').count()
        && pattern.split('/').zip(path.split('/')).all(|(pattern, name)| matches_name(pattern, name))
}

/// One folder or file name. Linear in practice and quadratic at worst: on a mismatch only the last `*` grows.
/// As in a shell a leading `*` takes no hidden name: a mounted ConfigMap keeps its versions in folders `..2026_…`.
fn matches_name(pattern: &str, name: &str) -> bool {
    if pattern.starts_with('*') && name.starts_with('.') {
        return false;
    }
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(byte) if *byte == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    p = at + 1;
                    n = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// The files that a pattern names, in the order of their names. `base` is where a relative pattern begins.
///
/// # Errors
/// A folder before a `*` that cannot be read, or a file that is named without `*` and does not exist.
pub fn files(base: &Path, pattern: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = BTreeSet::from([base.to_owned()]);
    for part in Path::new(pattern).components() {
        let part = part.as_os_str();
        match part.to_str() {
            Some(glob) if glob.contains('*') => {
                let mut next = BTreeSet::new();
                for folder in &found {
                    for entry in fs::read_dir(folder)? {
                        let name = entry?.file_name();
                        if name.to_str().is_some_and(|name| matches_name(glob, name)) {
                            next.insert(folder.join(name));
                        }
                    }
                }
                found = next;
            }
            _ => found = found.into_iter().map(|folder| folder.join(part)).collect(),
        }
    }
    if pattern.contains('*') {
        found.retain(|file| file.is_file());
    } else {
        found.iter().try_for_each(|file| fs::metadata(file).map(drop))?;
    }
    Ok(found.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_never_crosses_a_slash() {
        for (pattern, path) in [
            ("/index.php", "/index.php"),
            ("/*.php", "/a.php"),
            ("/wp-admin/*.php", "/wp-admin/x.php"),
            ("/*/x*y*.php", "/a/x12y3.php"),
            ("/*", "/a"),
            ("/a*b*c", "/aXbXbc"),
        ] {
            assert!(matches(pattern, path), "{pattern} {path}");
        }
        for (pattern, path) in [
            ("/*.php", "/.php"),
            ("/*.php", "/a/b.php"),
            ("/*.php", "/a.php7"),
            ("/index.php", "/index.phpx"),
            ("/a*b", "/ac"),
            ("/*", "/a/"),
        ] {
            assert!(!matches(pattern, path), "{pattern} {path}");
        }
    }
}
