//! Who may use whom: the layers rule of CONTRIBUTING.md, checked on the source.
//!
//! Reads `src/**/*.rs` without comments, literals and `#[cfg(test)]` items, and looks at every path that begins at the root of the
//! crate: `crate::a::b`, `crate::{a, b::{c, d}}`, and `super::` chains that reach the root.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A module and what of this crate it may use besides itself: whole modules, or a path below one.
const RULES: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("model", &[]),
    ("lifecycle", &[]),
    ("telemetry", &["model"]),
    ("fastcgi", &["error", "model", "telemetry"]),
    // `lifecycle::drain` is the guard that an Activation holds.
    ("upstream", &["fastcgi", "error", "model", "telemetry", "lifecycle::drain"]),
    ("http", &["upstream", "fastcgi", "lifecycle", "error", "model", "telemetry"]),
    ("edge", &["lifecycle", "error", "model", "telemetry"]),
    ("control", &["upstream", "lifecycle", "error", "model", "telemetry"]),
    ("app", EVERYTHING),
    ("cli", EVERYTHING),
];

const EVERYTHING: &[&str] =
    &["error", "model", "lifecycle", "telemetry", "fastcgi", "upstream", "http", "edge", "control", "app", "cli"];

#[test]
fn every_import_is_allowed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    files.sort();
    let mut wrong = Vec::new();
    let mut imports = 0;
    for file in &files {
        let inside = file.strip_prefix(&root).expect("below src");
        let Some(modules) = modules(inside) else { continue };
        let text = fs::read_to_string(file).expect("source is UTF-8");
        for import in imports_of(&text, modules.len()) {
            imports += 1;
            if let Err(rule) = judge(&modules[0], &import.path) {
                wrong.push(format!("src/{}:{}: crate::{}: {rule}", inside.display(), import.line, import.path));
            }
        }
    }
    assert!(files.len() > 20 && imports > 50, "{} files and {imports} imports: the scan has lost its way", files.len());
    assert!(wrong.is_empty(), "imports against the layers rule:\n{}", wrong.join("\n"));
}

#[test]
fn every_module_has_a_rule() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    for file in files {
        let inside = file.strip_prefix(&root).expect("below src");
        if let Some(modules) = modules(inside) {
            assert!(
                rule_of(&modules[0]).is_some(),
                "src/{}: module {} has no rule in tests/layers.rs",
                inside.display(),
                modules[0]
            );
        }
    }
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// `http/route/scripts.rs` is `http::route::scripts`. `None`: the roots of the crates, and files of tests.
fn modules(inside: &Path) -> Option<Vec<String>> {
    let mut names: Vec<String> = inside.with_extension("").iter().map(|name| name.to_string_lossy().into_owned()).collect();
    if names.last().is_some_and(|name| name == "mod") {
        names.pop();
    }
    let skipped = names.is_empty() || names.last()? == "tests" || names.len() == 1 && ["lib", "main"].contains(&names[0].as_str());
    if skipped { None } else { Some(names) }
}

fn rule_of(module: &str) -> Option<&'static [&'static str]> {
    RULES.iter().find(|(name, _)| *name == module).map(|(_, allowed)| *allowed)
}

/// The error is the rule that `path` breaks.
fn judge(module: &str, path: &str) -> Result<(), String> {
    let below = |parent: &str| path == parent || path.strip_prefix(parent).is_some_and(|rest| rest.starts_with("::"));
    let allowed = rule_of(module).unwrap_or(&[]);
    if below(module) || allowed.iter().copied().any(below) {
        return Ok(());
    }
    let may = if allowed.is_empty() { "outside crates only".to_owned() } else { allowed.join(", ") };
    Err(format!("{module} may use {may}"))
}

#[derive(Debug, PartialEq)]
struct Import {
    line: usize,
    /// From the root of the crate.
    path: String,
}

/// `depth`: how many modules the file lies below the root.
fn imports_of(text: &str, depth: usize) -> Vec<Import> {
    let code = without_tests(without_comments_and_literals(text));
    let mut imports = Vec::new();
    let mut at = 0;
    while at < code.len() {
        if !is_word(code[at]) {
            at += 1;
            continue;
        }
        let (start, word) = (at, word_at(&code, at));
        at += word.len();
        let begins_path = !preceded_by_colons(&code, start);
        let rest = match word.as_str() {
            "crate" if begins_path => after_colons(&code, at),
            "super" if begins_path => past_supers(&code, at, depth),
            _ => None,
        };
        if let Some(rest) = rest {
            let line = code[..start].iter().filter(|c| **c == '\n').count() + 1;
            let mut paths = Vec::new();
            tree(&code, rest, "", &mut paths);
            // A chain of `super` in a module inside the file ends elsewhere: only what is a module's name counts.
            paths.retain(|path| word == "crate" || rule_of(path.split("::").next().unwrap_or_default()).is_some());
            imports.extend(paths.into_iter().map(|path| Import { line, path }));
        }
    }
    imports
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn word_at(code: &[char], at: usize) -> String {
    code[at..].iter().take_while(|c| is_word(**c)).collect()
}

fn skip_space(code: &[char], mut at: usize) -> usize {
    while code.get(at).is_some_and(|c| c.is_whitespace()) {
        at += 1;
    }
    at
}

fn preceded_by_colons(code: &[char], start: usize) -> bool {
    let before: Vec<char> = code[..start].iter().rev().filter(|c| !c.is_whitespace()).take(2).copied().collect();
    before == [':', ':']
}

/// Behind `::`, where that is what follows.
fn after_colons(code: &[char], at: usize) -> Option<usize> {
    let at = skip_space(code, at);
    (code.get(at) == Some(&':') && code.get(at + 1) == Some(&':')).then(|| skip_space(code, at + 2))
}

/// Behind a chain of `super::`, the first of which ends at `at`, if it leads to the root.
fn past_supers(code: &[char], at: usize, depth: usize) -> Option<usize> {
    let (mut count, mut at) = (1, after_colons(code, at)?);
    while word_at(code, at) == "super" {
        at = after_colons(code, at + "super".len())?;
        count += 1;
    }
    (count == depth).then_some(at)
}

/// Notes every path of a tree as in `a::{b, c::d}`, and gives where it ends.
fn tree(code: &[char], at: usize, prefix: &str, paths: &mut Vec<String>) -> usize {
    let mut at = skip_space(code, at);
    if code.get(at) == Some(&'{') {
        at += 1;
        loop {
            at = skip_space(code, at);
            match code.get(at) {
                None => return at,
                Some('}') => return at + 1,
                Some(c) if is_word(*c) || *c == '{' => {
                    at = tree(code, at, prefix, paths);
                    // `as name`
                    while code.get(at).is_some_and(|c| *c != ',' && *c != '}') {
                        at += 1;
                    }
                }
                // A comma, a star.
                Some(_) => at += 1,
            }
        }
    }
    let word = word_at(code, at);
    if word.is_empty() || word == "self" {
        if !prefix.is_empty() {
            paths.push(prefix.to_owned());
        }
        return at + word.len();
    }
    at += word.len();
    let path = if prefix.is_empty() { word } else { format!("{prefix}::{word}") };
    match after_colons(code, at) {
        Some(next) => tree(code, next, &path, paths),
        None => {
            paths.push(path);
            at
        }
    }
}

/// Comments, strings and characters become spaces; lines stay where they are.
fn without_comments_and_literals(text: &str) -> Vec<char> {
    let chars: Vec<char> = text.chars().collect();
    let mut out = chars.clone();
    let is = |at: usize, c: char| chars.get(at) == Some(&c);
    let mut at = 0;
    while at < chars.len() {
        let end = match chars[at] {
            '/' if is(at + 1, '/') => chars[at..].iter().position(|c| *c == '\n').map_or(chars.len(), |n| at + n),
            '/' if is(at + 1, '*') => end_of_block_comment(&chars, at),
            '"' => end_of_string(&chars, at),
            'r' if (is(at + 1, '"') || is(at + 1, '#')) && !follows_word(&chars, at) => match end_of_raw_string(&chars, at) {
                Some(end) => end,
                // r#type
                None => at + 1,
            },
            '\'' => match end_of_char(&chars, at) {
                Some(end) => end,
                // A lifetime.
                None => at + 1,
            },
            _ => {
                at += 1;
                continue;
            }
        };
        let end = end.min(chars.len());
        for c in &mut out[at..end] {
            if *c != '\n' {
                *c = ' ';
            }
        }
        at = end;
    }
    out
}

/// Whether the `r` at `at` is the end of a longer word; `br` and `cr` begin literals too.
fn follows_word(chars: &[char], at: usize) -> bool {
    let before = |n: usize| at.checked_sub(n).and_then(|i| chars.get(i)).copied().filter(|c| is_word(*c));
    match before(1) {
        None => false,
        Some('b' | 'c') => before(2).is_some(),
        Some(_) => true,
    }
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let (mut depth, mut at) = (1, start + 2);
    while at < chars.len() && depth > 0 {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    at
}

fn end_of_string(chars: &[char], start: usize) -> usize {
    let mut at = start + 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

fn end_of_raw_string(chars: &[char], start: usize) -> Option<usize> {
    let hashes = chars[start + 1..].iter().take_while(|c| **c == '#').count();
    let open = start + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let mut at = open + 1;
    while at < chars.len() {
        if chars[at] == '"' && chars[at + 1..].iter().take_while(|c| **c == '#').count() >= hashes {
            return Some(at + 1 + hashes);
        }
        at += 1;
    }
    Some(at)
}

fn end_of_char(chars: &[char], start: usize) -> Option<usize> {
    match (chars.get(start + 1)?, chars.get(start + 2)) {
        // The character behind the backslash may be a quote itself.
        ('\\', _) => chars.get(start + 3..)?.iter().position(|c| *c == '\'').map(|n| start + 3 + n + 1),
        (_, Some('\'')) => Some(start + 3),
        _ => None,
    }
}

/// Every item under `#[cfg(test)]` becomes spaces, up to its `;` or its closing brace.
fn without_tests(mut code: Vec<char>) -> Vec<char> {
    let mark: Vec<char> = "#[cfg(test)]".chars().collect();
    let mut at = 0;
    while at + mark.len() <= code.len() {
        if code[at..at + mark.len()] != mark[..] {
            at += 1;
            continue;
        }
        let (mut end, mut depth) = (at + mark.len(), 0_usize);
        while end < code.len() {
            match code[end] {
                '{' | '(' | '[' => depth += 1,
                '}' | ')' | ']' => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 && code[end] == '}' {
                        break;
                    }
                }
                ';' if depth == 0 => break,
                _ => {}
            }
            end += 1;
        }
        let end = (end + 1).min(code.len());
        for c in &mut code[at..end] {
            if *c != '\n' {
                *c = ' ';
            }
        }
        at = end;
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str, depth: usize) -> Vec<(usize, String)> {
        imports_of(text, depth).into_iter().map(|import| (import.line, import.path)).collect()
    }

    #[test]
    fn paths_groups_and_nested_groups() {
        let text = "use crate::model::Peer;\nuse crate::{\n    error::{Error, Kind as K},\n    lifecycle::drain::{self, Guard},\n    http,\n};\nfn f(a: crate::edge::Io) {}";
        let paths: Vec<String> = found(text, 1).into_iter().map(|(_, path)| path).collect();
        let want =
            ["model::Peer", "error::Error", "error::Kind", "lifecycle::drain", "lifecycle::drain::Guard", "http", "edge::Io"];
        assert_eq!(paths, want);
        assert_eq!(found(text, 1).last().map(|(line, _)| *line), Some(7));
    }

    #[test]
    fn comments_literals_and_tests_do_not_count() {
        let text = r##"
            // crate::a
            /* crate::b /* crate::c */ crate::d */
            const A: &str = "crate::e \" crate::f";
            const B: &str = r#"crate::g " crate::h"#;
            const C: (char, char, &'static str) = ('"', '\'', "crate::i");
            #[cfg(test)]
            mod tests { use crate::j; fn f() { { crate::k(); } } }
            #[cfg(test)]
            mod more;
            use crate::seen;
        "##;
        assert_eq!(found(text, 1), [(11, "seen".to_owned())]);
    }

    #[test]
    fn a_chain_of_super_may_lead_to_the_root() {
        assert_eq!(found("use super::super::control::api;", 2), [(1, "control::api".to_owned())]);
        assert!(found("use super::super::route::Index;", 3).is_empty());
        assert!(found("use super::control;", 2).is_empty());
    }

    #[test]
    fn rules_are_judged_by_whole_names() {
        assert_eq!(judge("http", "upstream::Store"), Ok(()));
        assert_eq!(judge("upstream", "lifecycle::drain::Guard"), Ok(()));
        assert!(judge("upstream", "lifecycle::Phase").is_err());
        assert!(judge("upstream", "lifecycle::drainage").is_err());
        assert_eq!(judge("error", "model::Peer"), Err("error may use outside crates only".to_owned()));
        assert!(judge("http", "control::api").is_err());
    }
}
