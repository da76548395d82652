//! TOML as a tree in which every key and value knows its file and place, and the merging of several files.

use toml::de::{DeTable, DeValue};

/// A byte offset in the filled text of one of the files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub file: usize,
    pub offset: usize,
}

#[derive(Debug)]
pub struct Node {
    pub at: Place,
    pub kind: Kind,
}

#[derive(Debug)]
pub enum Kind {
    Text(String),
    /// As written; counts and their limits are the reader's.
    Integer(String),
    Float,
    Boolean(bool),
    Datetime,
    List(Vec<Node>),
    Table(Table),
}

impl Kind {
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Text(_) => "a string",
            Kind::Integer(_) => "a number",
            Kind::Float => "a number with a fraction",
            Kind::Boolean(_) => "a boolean",
            Kind::Datetime => "a date",
            Kind::List(_) => "a list",
            Kind::Table(_) => "a table",
        }
    }
}

/// In the order of the file: the TOML crate's own map sorts by name, and the order of sets and params means something.
#[derive(Debug, Default)]
pub struct Table {
    pub entries: Vec<Entry>,
}

#[derive(Debug)]
pub struct Entry {
    pub key: String,
    pub at: Place,
    pub node: Node,
}

impl Table {
    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }
}

/// A syntax error: where, what, and what would help.
pub struct Syntax {
    pub offset: usize,
    pub message: String,
    pub help: Option<String>,
}

/// One file's text as a tree.
///
/// # Errors
/// The first syntax error; what follows one is guesswork.
pub fn parse(file: usize, text: &str) -> Result<Table, Syntax> {
    match DeTable::parse(text) {
        Ok(table) => Ok(convert_table(file, table.into_inner())),
        Err(error) => {
            let help =
                error.message().contains("escape").then(|| "in single quotes a backslash stands for itself: '~\\.php$'".to_owned());
            let offset = error.span().map_or(0, |span| span.start);
            Err(Syntax { offset, message: format!("not valid TOML: {}", error.message()), help })
        }
    }
}

fn convert_table(file: usize, table: DeTable<'_>) -> Table {
    let mut entries: Vec<Entry> = table
        .into_iter()
        .map(|(key, value)| {
            let at = Place { file, offset: key.span().start };
            let mut node = convert(file, value.span().start, value.into_inner());
            if matches!(node.kind, Kind::Table(_)) && node.at.offset < at.offset {
                // A table's span begins at its bracket or brace; the name says more.
                node.at = at;
            }
            Entry { key: key.into_inner().into_owned(), at, node }
        })
        .collect();
    entries.sort_by_key(|entry| entry.at);
    Table { entries }
}

fn convert(file: usize, offset: usize, value: DeValue<'_>) -> Node {
    let kind = match value {
        DeValue::String(text) => Kind::Text(text.into_owned()),
        DeValue::Integer(number) => {
            let value = i128::from_str_radix(number.as_str(), number.radix());
            Kind::Integer(value.map_or_else(|_| number.to_string(), |value| value.to_string()))
        }
        DeValue::Float(_) => Kind::Float,
        DeValue::Boolean(value) => Kind::Boolean(value),
        DeValue::Datetime(_) => Kind::Datetime,
        DeValue::Array(items) => {
            Kind::List(items.into_iter().map(|item| convert(file, item.span().start, item.into_inner())).collect())
        }
        DeValue::Table(table) => Kind::Table(convert_table(file, table)),
    };
    Node { at: Place { file, offset }, kind }
}

/// The same key in two files.
pub struct Twice {
    pub path: String,
    pub first: Place,
    pub second: Place,
}

/// Adds another file's keys: `[listen]` and its like, upstreams and their sets merge key by key, `[[site]]` adds up.
/// Anything else that is in both files is reported, and the first one stays.
pub fn merge(into: &mut Table, from: Table, twice: &mut Vec<Twice>) {
    merge_at(into, from, "", twice);
}

fn merge_at(into: &mut Table, from: Table, path: &str, twice: &mut Vec<Twice>) {
    for entry in from.entries {
        let full = if path.is_empty() { entry.key.clone() } else { format!("{path}.{}", entry.key) };
        let Some(mine) = into.entries.iter_mut().find(|mine| mine.key == entry.key) else {
            into.entries.push(entry);
            continue;
        };
        match (&mut mine.node.kind, entry.node.kind) {
            (Kind::Table(mine), Kind::Table(theirs)) if is_shared(&full) => merge_at(mine, theirs, &full, twice),
            (Kind::List(mine), Kind::List(theirs)) if full == "site" => mine.extend(theirs),
            _ => twice.push(Twice { path: full, first: mine.at, second: entry.at }),
        }
    }
}

/// Whether a table may be spread over files. A set may not: half a set in another file is hard to find.
fn is_shared(path: &str) -> bool {
    let parts: Vec<&str> = path.split('.').collect();
    matches!(
        parts.as_slice(),
        ["listen" | "buffer" | "log" | "tracing" | "drain" | "upstream"] | ["upstream", _] | ["upstream", _, "set"]
    )
}
