//! `{{NAME}}` and `{{NAME:-default}}` in the configuration and in specs. Pure: the environment is an argument.
//!
//! NAME is of A-Z, 0-9 and `_`. Anything else in braces is left alone, so that templates of other systems (Helm, Go)
//! pass through. A default ends at the first `}}` and does not cross a line; as in a shell's `${NAME:-default}` it
//! also stands in for a NAME that is set but empty.

/// The text with every placeholder filled, and the way back to the text as it was written.
#[derive(Clone, Debug)]
pub struct Filled {
    pub text: String,
    pub map: Map,
}

/// A placeholder without a default whose NAME the environment does not have. Line and column count from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    pub name: String,
    pub line: usize,
    pub column: usize,
}

/// Why a placeholder of the configuration could not be filled. Line and column count from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfilled {
    pub name: String,
    pub line: usize,
    pub column: usize,
    pub why: Why,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    Missing,
    /// The value could end the TOML string that it is put into.
    BreaksOut,
}

/// Fills placeholders with whatever the environment holds.
///
/// # Errors
/// Every placeholder without a value, in the order of the text.
pub fn fill(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Filled, Vec<Missing>> {
    substitute(text, env, |_| true)
        .map_err(|all| all.into_iter().map(|Unfilled { name, line, column, .. }| Missing { name, line, column }).collect())
}

/// As [`fill`], for TOML: a value may not hold what would end or change the string around it.
///
/// # Errors
/// Every placeholder without a value or with an unsuitable one, in the order of the text.
pub fn fill_config(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Filled, Vec<Unfilled>> {
    // The backslash is refused beside quotes and breaks: as a value's last character it would escape the closing quote.
    substitute(text, env, |value| !value.contains(['"', '\'', '\\', '\n', '\r']))
}

fn substitute(text: &str, env: &dyn Fn(&str) -> Option<String>, fits: impl Fn(&str) -> bool) -> Result<Filled, Vec<Unfilled>> {
    let mut map = Map::new(text);
    let mut filled = String::with_capacity(text.len());
    let mut wrong = Vec::new();
    let mut rest = 0;
    while let Some(found) = next_placeholder(text, rest) {
        map.piece(filled.len(), rest, true);
        filled.push_str(&text[rest..found.start]);
        map.piece(filled.len(), found.start, false);
        let mut refuse = |why| {
            let (line, column) = map.source_place(found.start);
            wrong.push(Unfilled { name: found.name.to_owned(), line, column, why });
        };
        match (env(found.name), found.default) {
            (Some(value), None) => match fits(&value) {
                true => filled.push_str(&value),
                false => refuse(Why::BreaksOut),
            },
            (Some(value), Some(_)) if !value.is_empty() => match fits(&value) {
                true => filled.push_str(&value),
                false => refuse(Why::BreaksOut),
            },
            // A default is the file's own text and means what its author wrote, quotes and all.
            (_, Some(default)) => filled.push_str(default),
            (None, None) => refuse(Why::Missing),
        }
        rest = found.end;
    }
    map.piece(filled.len(), rest, true);
    filled.push_str(&text[rest..]);
    if wrong.is_empty() { Ok(Filled { text: filled, map }) } else { Err(wrong) }
}

struct Placeholder<'t> {
    start: usize,
    end: usize,
    name: &'t str,
    default: Option<&'t str>,
}

fn next_placeholder(text: &str, from: usize) -> Option<Placeholder<'_>> {
    let mut at = from;
    loop {
        let start = at + text.get(at..)?.find("{{")?;
        if let Some(found) = placeholder_at(text, start) {
            return Some(found);
        }
        // One brace on, not two: in `{{{NAME}}}` the placeholder begins at the second.
        at = start + 1;
    }
}

fn placeholder_at(text: &str, start: usize) -> Option<Placeholder<'_>> {
    let inside = text.get(start + 2..)?;
    let length = inside.bytes().take_while(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || *b == b'_').count();
    let (name, after) = inside.split_at(length);
    if name.is_empty() {
        return None;
    }
    if after.starts_with("}}") {
        return Some(Placeholder { start, end: start + 2 + length + 2, name, default: None });
    }
    let default = after.strip_prefix(":-")?;
    let default = &default[..default.find("}}")?];
    if default.contains(['\n', '\r']) {
        return None;
    }
    Some(Placeholder { start, end: start + 2 + length + 2 + default.len() + 2, name, default: Some(default) })
}

/// From a byte offset of the filled text to line and column of the text as written.
#[derive(Clone, Debug)]
pub struct Map {
    source: String,
    /// Where each line begins.
    lines: Vec<usize>,
    /// Offset in the filled text, offset in the source, and whether the two run on side by side from there.
    pieces: Vec<(usize, usize, bool)>,
}

impl Map {
    fn new(source: &str) -> Self {
        let breaks = source.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        Map { source: source.to_owned(), lines: std::iter::once(0).chain(breaks).collect(), pieces: Vec::new() }
    }

    fn piece(&mut self, filled: usize, source: usize, literal: bool) {
        self.pieces.push((filled, source, literal));
    }

    /// Line and column, both from 1, columns in characters. Within a filled-in value it is the placeholder's place.
    pub fn place(&self, offset: usize) -> (usize, usize) {
        let next = self.pieces.partition_point(|(filled, ..)| *filled <= offset);
        let source = match next.checked_sub(1).and_then(|last| self.pieces.get(last)) {
            Some((filled, source, true)) => source + (offset - filled),
            Some((_, source, false)) => *source,
            None => offset,
        };
        self.source_place(source)
    }

    fn source_place(&self, offset: usize) -> (usize, usize) {
        let offset = self.source.floor_char_boundary(offset);
        let line = self.lines.partition_point(|start| *start <= offset);
        let start = line.checked_sub(1).and_then(|last| self.lines.get(last)).copied().unwrap_or(0);
        (line, self.source[start..offset].chars().count() + 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn env(name: &str) -> Option<String> {
        match name {
            "A" => Some("alpha".into()),
            "EMPTY" => Some(String::new()),
            "QUOTE" => Some("x\" = 1".into()),
            "APOSTROPHE" => Some("it's".into()),
            "BREAK" => Some("x\ny".into()),
            "BACKSLASH" => Some("x\\".into()),
            _ => None,
        }
    }

    fn filled(text: &str) -> String {
        fill(text, &env).unwrap().text
    }

    #[test]
    fn fills_names_and_defaults() {
        assert_eq!(filled("a {{A}} b"), "a alpha b");
        assert_eq!(filled("{{NONE:-30}}s"), "30s");
        assert_eq!(filled("{{A:-30}}"), "alpha");
        assert_eq!(filled("[{{NONE:-}}]"), "[]");
        assert_eq!(filled("{{NONE:-a:-b c}}"), "a:-b c");
    }

    #[test]
    fn a_default_stands_in_for_an_empty_value_too() {
        assert_eq!(filled("{{EMPTY:-x}}"), "x");
        assert_eq!(filled("[{{EMPTY}}]"), "[]");
    }

    #[test]
    fn leaves_other_templates_alone() {
        for text in ["{{ A }}", "{{a}}", "{{.Values.x}}", "{A}", "{{A}", "{{A:-", "{{A:-x\n}}", "{{}}", "{{A-B}}", "{{", "${A}"] {
            assert_eq!(filled(text), text);
        }
        assert_eq!(filled("{{{A}}}"), "{alpha}");
    }

    #[test]
    fn lists_every_missing_name_with_its_place() {
        let missing = fill("é {{ONE}}\n{{A}}{{TWO}}\n  {{ONE}}", &env).unwrap_err();
        let places: Vec<_> = missing.iter().map(|m| (m.name.as_str(), m.line, m.column)).collect();
        assert_eq!(places, [("ONE", 1, 3), ("TWO", 2, 6), ("ONE", 3, 3)]);
    }

    #[test]
    fn the_configuration_refuses_values_that_leave_their_string() {
        for name in ["QUOTE", "APOSTROPHE", "BREAK", "BACKSLASH"] {
            let wrong = fill_config(&format!("x\n = \"{{{{{name}}}}}\""), &env).unwrap_err();
            assert_eq!(wrong, [Unfilled { name: name.into(), line: 2, column: 5, why: Why::BreaksOut }]);
            assert!(fill(&format!("{{{{{name}}}}}"), &env).is_ok());
            assert!(fill_config(&format!("{{{{{name}:-x}}}}"), &env).is_err());
        }
        assert_eq!(fill_config("{{NONE:-\"auto\"}}", &env).unwrap().text, "\"auto\"");
        assert_eq!(fill_config("{{NONE}}", &env).unwrap_err()[0].why, Why::Missing);
    }

    #[test]
    fn places_refer_to_the_text_as_written() {
        let filled = fill("x = {{A}} # é {{EMPTY}}z\ny", &env).unwrap();
        assert_eq!(filled.text, "x = alpha # é z\ny");
        let place = |what: &str| filled.map.place(filled.text.find(what).unwrap());
        assert_eq!(place("x"), (1, 1));
        assert_eq!(place("alpha"), (1, 5));
        assert_eq!(place("pha"), (1, 5));
        assert_eq!(place(" #"), (1, 10));
        assert_eq!(place("z"), (1, 24));
        assert_eq!(place("y"), (2, 1));
        assert_eq!(filled.map.place(usize::MAX / 2), (2, 2));
    }

    proptest! {
        #[test]
        fn text_without_placeholders_is_untouched(text in "[^{]*") {
            prop_assert_eq!(fill(&text, &|_| None).unwrap().text, text);
        }

        #[test]
        fn never_panics(text in "([{}]|:-|[A-C_]|\n|é|.){0,60}", at in 0usize..400) {
            if let Ok(filled) = fill(&text, &env) {
                filled.map.place(at);
            }
            let _ = fill_config(&text, &env);
        }

        #[test]
        fn every_place_comes_back(parts in proptest::collection::vec(("[a-zé \n{]{0,8}", "[A-Z0-9_]{1,4}", "[a-zé\n]{0,9}"), 0..12)) {
            let (mut text, mut expected) = (String::new(), String::new());
            // (offset in the filled text, offset in the source) of each character of the literal parts
            let mut pairs = Vec::new();
            let mut values = std::collections::HashMap::new();
            for (literal, name, value) in &parts {
                let literal = format!("{literal}.");
                for (at, _) in literal.char_indices() {
                    pairs.push((expected.len() + at, text.len() + at));
                }
                let value = values.entry(name.clone()).or_insert_with(|| value.clone());
                text += &format!("{literal}{{{{{name}}}}}");
                expected += &format!("{literal}{value}");
            }
            let filled = fill(&text, &|name| values.get(name).cloned()).unwrap();
            prop_assert_eq!(&filled.text, &expected);
            for (there, here) in pairs {
                let before = &text[..here];
                let line = before.matches('\n').count() + 1;
                let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
                prop_assert_eq!(filled.map.place(there), (line, column));
            }
            let missing = fill(&text, &|_| None).err().unwrap_or_default();
            prop_assert_eq!(missing.len(), parts.len());
        }
    }
}
