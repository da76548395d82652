//! Walks the tree and collects every problem on the way: a wrong value is reported, its default stands in, and
//! reading goes on. What was never asked for is an unknown key.

use std::{cell::RefCell, fmt::Display, net::IpAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;

use super::{
    Problem,
    document::{Kind, Node, Place, Table},
    keys::KEYS,
    unit,
};
use crate::control::template::Map;

/// The longest time that can be written: timers add it to the clock, which must not overflow.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);

static EMPTY: Table = Table { entries: Vec::new() };

/// Problems and warnings so far, and what their places mean.
#[derive(Default)]
pub struct Report {
    pub files: Vec<(PathBuf, Map)>,
    problems: RefCell<Vec<(Place, Problem)>>,
    warnings: RefCell<Vec<(Place, String)>>,
}

impl Report {
    pub fn problem(&self, at: Place, message: impl Display, help: Option<String>) {
        let (file, line, column) = self.locate(at);
        self.problems.borrow_mut().push((at, Problem { file, line, column, message: message.to_string(), help }));
    }

    pub fn warn(&self, at: Place, message: impl Display) {
        self.warnings.borrow_mut().push((at, format!("{}: {message}", self.place(at))));
    }

    /// `file:line:column`.
    pub fn place(&self, at: Place) -> String {
        let (file, line, column) = self.locate(at);
        format!("{}:{line}:{column}", file.display())
    }

    pub fn locate(&self, at: Place) -> (PathBuf, usize, usize) {
        match self.files.get(at.file) {
            Some((file, map)) => {
                let (line, column) = map.place(at.offset);
                (file.clone(), line, column)
            }
            None => (PathBuf::new(), 0, 0),
        }
    }

    /// Problems so far.
    pub fn count(&self) -> usize {
        self.problems.borrow().len()
    }

    /// Problems and warnings in the order of the files.
    pub fn into_parts(self) -> (Vec<Problem>, Vec<String>) {
        (sorted(self.problems), sorted(self.warnings))
    }
}

fn sorted<T>(all: RefCell<Vec<(Place, T)>>) -> Vec<T> {
    let mut all = all.into_inner();
    all.sort_by_key(|(at, _)| *at);
    all.into_iter().map(|(_, item)| item).collect()
}

/// One table of the file.
pub struct Reader<'a> {
    pub report: &'a Report,
    pub at: Place,
    /// As messages name it: `listen`, `upstream.php`; "" for the top.
    path: String,
    /// As `KEYS` names it.
    section: &'static str,
    table: &'a Table,
    asked: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    pub fn new(report: &'a Report, table: &'a Table) -> Self {
        Reader { report, at: Place::default(), path: String::new(), section: "", table, asked: Vec::new() }
    }

    /// A table that stands by itself.
    pub fn of(report: &'a Report, table: &'a Table, section: &'static str) -> Self {
        Reader { section, path: section.to_owned(), ..Reader::new(report, table) }
    }

    pub fn ask(&mut self, key: &'static str) -> Option<Value<'a>> {
        self.asked.push(key);
        let entry = self.table.get(key)?;
        Some(Value { report: self.report, node: &entry.node, path: self.join(key) })
    }

    /// The value of a key, or its default where it is absent or wrong.
    pub fn read<T>(&mut self, key: &'static str, default: T, read: impl FnOnce(&Value<'a>) -> Option<T>) -> T {
        self.ask(key).and_then(|value| read(&value)).unwrap_or(default)
    }

    /// Where a key's value stands, else where the table does.
    pub fn place(&self, key: &str) -> Place {
        self.table.get(key).map_or(self.at, |entry| entry.node.at)
    }

    pub fn has(&self, key: &str) -> bool {
        self.table.get(key).is_some()
    }

    /// A table within; an empty one where it is absent.
    pub fn section(&mut self, key: &'static str, section: &'static str) -> Reader<'a> {
        let (at, path) = (self.at, self.join(key));
        match self.ask(key).and_then(|value| value.reader(section)) {
            Some(reader) => reader,
            None => Reader { report: self.report, at, path, section, table: &EMPTY, asked: Vec::new() },
        }
    }

    /// The tables of `[[key]]`.
    pub fn sections(&mut self, key: &'static str, section: &'static str) -> Vec<Reader<'a>> {
        let Some(value) = self.ask(key) else { return Vec::new() };
        if matches!(value.node.kind, Kind::Table(_)) {
            let brackets = format!("write [[{}]], in double brackets: there can be several", value.path);
            value.wrong::<()>(format!("`{}` is a single table", value.path), brackets);
            return Vec::new();
        }
        value.list(|item| item.reader(section)).unwrap_or_default()
    }

    /// The tables in `[key.NAME]`, in the file's order, with their names.
    pub fn named(&mut self, key: &'static str, section: &'static str) -> Vec<(&'a str, Reader<'a>)> {
        let Some(value) = self.ask(key) else { return Vec::new() };
        let Kind::Table(table) = &value.node.kind else {
            let help = format!("write [{}.NAME]", value.path);
            value.wrong::<()>(format!("`{}` is {}, not a table", value.path, value.node.kind.name()), help);
            return Vec::new();
        };
        let mut readers = Vec::new();
        for entry in &table.entries {
            let path = format!("{}.{}", value.path, entry.key);
            if entry.key.is_empty() || !entry.key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-') {
                let help = "a name is of letters, digits, `-` and `_`".to_owned();
                self.report.problem(entry.at, format!("`{path}`: {:?} is not a name", entry.key), Some(help));
            }
            let inner = Value { report: self.report, node: &entry.node, path };
            if let Some(mut reader) = inner.reader(section) {
                reader.at = entry.at;
                readers.push((entry.key.as_str(), reader));
            }
        }
        readers
    }

    /// Reports what nobody asked for.
    pub fn finish(self) {
        #[cfg(test)]
        {
            // The published list and the code that reads must not drift apart.
            let mut asked = self.asked.clone();
            let keys = KEYS.iter().find(|(section, _)| *section == self.section);
            let mut known = keys.map_or(&[][..], |(_, keys)| *keys).to_vec();
            asked.sort_unstable();
            asked.dedup();
            known.sort_unstable();
            assert_eq!(asked, known, "keys of [{}]", self.section);
        }
        for entry in &self.table.entries {
            let key = entry.key.as_str();
            if self.asked.contains(&key) {
                continue;
            }
            let table = if self.path.is_empty() { "at the top of the file".into() } else { format!("in `{}`", self.path) };
            let help = nearest(key, self.asked.iter().copied())
                .map(|near| format!("did you mean `{near}`?"))
                .or_else(|| from_nginx(key))
                .or_else(|| home(key, self.section));
            self.report.problem(entry.at, format!("unknown key `{key}` {table}"), help);
        }
    }

    fn join(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }
}

/// What somebody writes who has written Nginx's files for years (docs/from-nginx.md).
fn from_nginx(key: &str) -> Option<String> {
    const KNOWN: [(&str, &str); 28] = [
        ("location", "[[site.route]] with `path`"),
        ("server", "[[site]] with `hosts`"),
        ("server_name", "`hosts` of a [[site]]"),
        ("return", "`redirect` or `respond` of a route"),
        ("if", "`when` of a route"),
        ("map", "routes with `when`"),
        ("add_header", "`headers.add`, `set` or `default`"),
        ("alias", "a link below `root`, or another [[site]]"),
        ("autoindex", "nothing: folders are not listed"),
        ("gzip_static", "`precompressed = [\"gzip\"]`"),
        ("brotli_static", "`precompressed = [\"br\"]`"),
        ("proxy_pass", "nothing: there is PHP-FPM behind, and files"),
        ("fastcgi_pass", "`endpoints` of [upstream.NAME.set.SET], and `upstream` of the site"),
        ("fastcgi_param", "`params`"),
        ("fastcgi_read_timeout", "`read_timeout`"),
        ("fastcgi_index", "nothing: `index` and `scripts` say it"),
        ("fastcgi_split_path_info", "nothing: it is so by itself"),
        ("fastcgi_buffering", "nothing; `X-Accel-Buffering: no` in PHP's answer"),
        ("client_max_body_size", "`body_limit`"),
        ("log_format", "`log.access`"),
        ("error_log", "`log.level`"),
        ("set_real_ip_from", "`listen.trusted_proxies`"),
        ("real_ip_header", "`listen.trusted_proxies`"),
        ("auth_basic", "`basic_auth`"),
        ("auth_basic_user_file", "`file` of `basic_auth`"),
        ("limit_req", "`limit`"),
        ("limit_conn", "`limit` with `concurrent`"),
        ("worker_processes", "`workers`"),
    ];
    KNOWN.iter().find(|(theirs, _)| *theirs == key).map(|(_, ours)| format!("Nginx's `{key}` is {ours}"))
}

/// A key that is right, but in the wrong table: TOML gives every key to the last header above it.
fn home(key: &str, here: &str) -> Option<String> {
    let homes: Vec<String> = KEYS
        .iter()
        .filter(|(section, keys)| *section != here && keys.contains(&key))
        .map(|(section, _)| match *section {
            "" => "at the top of the file, before the first [table]".to_owned(),
            "upstream" => "in [upstream.NAME]".to_owned(),
            "set" => "in [upstream.NAME.set.SET]".to_owned(),
            "site" => "in [[site]]".to_owned(),
            "route" => "in [[site.route]]".to_owned(),
            inline @ ("lease" | "queue" | "ping" | "preflight" | "when") => format!("in `{inline} = {{ … }}`"),
            table => format!("in [{table}]"),
        })
        .collect();
    (!homes.is_empty()).then(|| format!("`{key}` belongs {}", homes.join(" or ")))
}

/// The candidate that a slip of the finger would turn into `word`.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Names in the file may be of any length; nothing that long is a slip of a key of ours.
    if word.chars().count() > 64 {
        return None;
    }
    candidates
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= (candidate.chars().count().max(3) / 3).min(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// How many letters to insert, drop, replace or swap with their neighbour (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    let mut last = None;
    for (i, x) in a.chars().enumerate() {
        let mut row = Vec::with_capacity(above.len());
        row.push(i + 1);
        for (j, y) in b.iter().enumerate() {
            let mut best = (above[j] + usize::from(x != *y)).min(above[j + 1] + 1).min(row[j] + 1);
            if j > 0 && i > 0 && last == Some(*y) && b[j - 1] == x {
                best = best.min(before[j - 1] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut above, row);
        last = Some(x);
    }
    above.last().copied().unwrap_or(0)
}

/// One value, with what a message about it needs. Each method answers `None` after it has reported what is wrong.
pub struct Value<'a> {
    pub report: &'a Report,
    pub node: &'a Node,
    pub path: String,
}

impl<'a> Value<'a> {
    pub fn wrong<T>(&self, message: impl Display, help: impl Into<Option<String>>) -> Option<T> {
        self.report.problem(self.node.at, message, help.into());
        None
    }

    /// A value of the right type that cannot be meant.
    pub fn refuse<T>(&self, why: impl Display, help: impl Into<String>) -> Option<T> {
        self.wrong(format!("`{}`: {why}", self.path), help.into())
    }

    fn mistyped<T>(&self, wanted: &str, help: impl Into<Option<String>>) -> Option<T> {
        self.wrong(format!("`{}` is {}, not {wanted}", self.path, self.node.kind.name()), help)
    }

    pub fn text(&self) -> Option<&'a str> {
        match &self.node.kind {
            Kind::Text(text) if text.contains('\0') => self.refuse("holds a NUL byte", "remove it"),
            Kind::Text(text) => Some(text),
            Kind::Integer(number) => self.mistyped("a string", format!("write \"{number}\", in quotes")),
            Kind::Boolean(value) => self.mistyped("a string", format!("write \"{value}\", in quotes")),
            _ => self.mistyped("a string", None),
        }
    }

    pub fn filled_text(&self) -> Option<&'a str> {
        match self.text()? {
            "" => self.wrong(format!("`{}` is empty", self.path), None),
            text => Some(text),
        }
    }

    pub fn boolean(&self) -> Option<bool> {
        match &self.node.kind {
            Kind::Boolean(value) => Some(*value),
            _ => self.mistyped("a boolean", "write true or false".to_owned()),
        }
    }

    pub fn one_of<T: Clone>(&self, choices: &[(&str, T)]) -> Option<T> {
        let words = || choices.iter().map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>().join(" or ");
        let Kind::Text(text) = &self.node.kind else { return self.mistyped("a word", format!("write {}", words())) };
        match choices.iter().find(|(word, _)| word == text) {
            Some((_, choice)) => Some(choice.clone()),
            None => self.refuse(format!("{text:?} is not known"), format!("write {}", words())),
        }
    }

    /// Zero is allowed.
    pub fn duration(&self) -> Option<Duration> {
        const UNITS: &str = "write a whole number and ms, s, m, h or d, as in \"30s\"";
        let text = match &self.node.kind {
            Kind::Text(text) => text,
            Kind::Integer(number) => {
                return self.refuse("a duration needs a unit", format!("write \"{number}s\", if seconds are meant"));
            }
            _ => return self.mistyped("a duration", UNITS.to_owned()),
        };
        match unit::parse_duration(text) {
            Some(duration) if duration <= LONGEST => Some(duration),
            Some(_) => self.refuse(format!("{text:?} is too long"), "the longest is \"365d\""),
            None => match unit::split(text) {
                Some((number, "")) => {
                    self.refuse(format!("{text:?} has no unit"), format!("write \"{number}s\", if seconds are meant"))
                }
                _ => self.refuse(format!("{text:?} is not a duration"), UNITS),
            },
        }
    }

    /// A time-out: zero would mean that nothing is ever done in time.
    pub fn timeout(&self) -> Option<Duration> {
        let duration = self.duration()?;
        if duration.is_zero() {
            return self.refuse("zero is no time at all", "write a duration longer than zero, as in \"30s\"");
        }
        Some(duration)
    }

    /// Zero is `word`.
    pub fn duration_or_zero(&self, word: &str) -> Option<Duration> {
        match &self.node.kind {
            Kind::Text(text) if text == word => Some(Duration::ZERO),
            _ => self.duration(),
        }
    }

    /// A share, from 0 to 100 hundredths.
    pub fn percent(&self) -> Option<u8> {
        let text = match &self.node.kind {
            Kind::Text(text) => text,
            Kind::Integer(number) => {
                return self.refuse("a share is in percent", format!("write \"{number}%\", if percent are meant"));
            }
            _ => return self.mistyped("a share", "write a whole number of percent, as in \"20%\"".to_owned()),
        };
        let number = text.strip_suffix('%').filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
        match number.and_then(|digits| digits.parse::<u8>().ok()) {
            Some(percent @ 0..=100) => Some(percent),
            _ => self.refuse(format!("{text:?} is not a share"), "write a whole number from \"0%\" to \"100%\""),
        }
    }

    /// Bytes, from `min` to `max`.
    pub fn size(&self, min: u64, max: u64) -> Option<u64> {
        const UNITS: &str = "write a whole number and B, KiB, MiB, GiB or TiB, as in \"8MiB\"";
        let text = match &self.node.kind {
            Kind::Text(text) => text,
            Kind::Integer(number) => {
                let meant = number.parse().map_or_else(|_| "8MiB".into(), unit::show_size);
                return self.refuse("a size needs a unit", format!("write \"{meant}\", if bytes are meant"));
            }
            _ => return self.mistyped("a size", UNITS.to_owned()),
        };
        let Some(bytes) = unit::parse_size(text) else {
            return match unit::split(text) {
                Some((number, unit)) if !unit.is_empty() => {
                    let letter = unit.trim_start_matches(' ').chars().next().map(|c| c.to_ascii_uppercase());
                    let help = match letter {
                        Some(letter @ ('K' | 'M' | 'G' | 'T')) => format!("write \"{number}{letter}iB\""),
                        _ => UNITS.to_owned(),
                    };
                    self.refuse(format!("{text:?} is not a size"), help)
                }
                Some((number, _)) => self
                    .refuse(format!("{text:?} has no unit"), format!("write \"{}\", if bytes are meant", unit::show_size(number))),
                None => self.refuse(format!("{text:?} is not a size"), UNITS),
            };
        };
        if bytes < min || bytes > max {
            let allowed = match max {
                u64::MAX => format!("at least \"{}\"", unit::show_size(min)),
                _ => format!("between \"{}\" and \"{}\"", unit::show_size(min), unit::show_size(max)),
            };
            return self.refuse(format!("{text:?} is out of range"), format!("write a size {allowed}"));
        }
        Some(bytes)
    }

    /// As `size`, for what is held in memory.
    pub fn bytes(&self, min: u64, max: u64) -> Option<usize> {
        usize::try_from(self.size(min, max)?).ok()
    }

    /// A whole number from `min` to `max`.
    pub fn count(&self, min: u64, max: u64) -> Option<u64> {
        let number = match &self.node.kind {
            Kind::Integer(number) => number,
            Kind::Text(text) if text.parse::<u64>().is_ok() => {
                return self.mistyped("a number", format!("write {text}, without quotes"));
            }
            _ => return self.mistyped("a whole number", None),
        };
        match number.parse::<u64>() {
            Ok(count) if (min..=max).contains(&count) => Some(count),
            _ => {
                let allowed = match max {
                    u64::MAX => format!("of at least {min}"),
                    _ => format!("from {min} to {max}"),
                };
                self.refuse(format!("{number} is out of range"), format!("write a number {allowed}"))
            }
        }
    }

    pub fn count_u32(&self, min: u64, max: u32) -> Option<u32> {
        u32::try_from(self.count(min, u64::from(max))?).ok()
    }

    /// A number, or the one word that says there is none.
    pub fn count_or(&self, word: &str, min: u64, max: u64) -> Option<Option<u64>> {
        match &self.node.kind {
            Kind::Text(text) if text == word => Some(None),
            Kind::Integer(number) if number.parse() == Ok(0u64) && min > 0 => {
                self.refuse("0 is out of range", format!("write a number of at least {min}, or \"{word}\""))
            }
            Kind::Text(text) if text.parse::<u64>().is_err() => {
                self.refuse(format!("{text:?} is not known"), format!("write a whole number, or \"{word}\""))
            }
            _ => self.count(min, max).map(Some),
        }
    }

    /// Every item that can be read; the others have been reported.
    pub fn list<T>(&self, mut read: impl FnMut(&Value<'a>) -> Option<T>) -> Option<Vec<T>> {
        let Kind::List(items) = &self.node.kind else {
            let help = match &self.node.kind {
                Kind::Text(text) => Some(format!("write [{text:?}]")),
                _ => None,
            };
            return self.mistyped("a list", help);
        };
        let item = |node| Value { report: self.report, node, path: self.path.clone() };
        Some(items.iter().filter_map(|node| read(&item(node))).collect())
    }

    /// Names and strings, in the file's order.
    pub fn entries(&self) -> Option<Vec<(&'a str, Place, Value<'a>)>> {
        let Kind::Table(table) = &self.node.kind else {
            return self.mistyped("a table", "write { NAME = \"value\" }".to_owned());
        };
        let entry = |key: &str, node| Value { report: self.report, node, path: format!("{}.{key}", self.path) };
        Some(table.entries.iter().map(|e| (e.key.as_str(), e.at, entry(&e.key, &e.node))).collect())
    }

    pub fn reader(&self, section: &'static str) -> Option<Reader<'a>> {
        match &self.node.kind {
            Kind::Table(table) => {
                Some(Reader { report: self.report, at: self.node.at, path: self.path.clone(), section, table, asked: Vec::new() })
            }
            _ => self.mistyped("a table", None),
        }
    }

    /// An address with a prefix length, or a single address.
    /// One network or several, separated by commas, or none: a placeholder is one value.
    pub fn networks(&self) -> Option<Vec<IpNet>> {
        match self.text()?.trim() {
            "" => Some(Vec::new()),
            text => text.split(',').map(|text| self.network(text.trim())).collect(),
        }
    }

    fn network(&self, text: &str) -> Option<IpNet> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Some(IpNet::from(address));
        }
        match text.parse::<IpNet>() {
            Ok(network) => {
                if network != network.trunc() {
                    self.report.warn(self.node.at, format!("`{}`: \"{network}\" is taken as \"{}\"", self.path, network.trunc()));
                }
                Some(network.trunc())
            }
            Err(_) => self.refuse(format!("{text:?} is not a network"), "write \"10.0.0.0/8\", \"fd00::/8\" or a single address"),
        }
    }

    /// A path of the URL space or of FPM: begins with `/`, and has no query.
    pub fn url_path(&self) -> Option<&'a str> {
        let text = self.text()?;
        if !text.starts_with('/') {
            return self.refuse(format!("{text:?} does not begin with a slash"), format!("write \"/{text}\""));
        }
        if text.contains(['?', '#']) || text.chars().any(char::is_control) {
            return self
                .refuse(format!("{text:?} is more than a path"), "write the path alone, without query, fragment or line break");
        }
        Some(text)
    }

    /// As `url_path`; empty is none.
    pub fn url_path_or_none(&self) -> Option<Option<String>> {
        match self.text()? {
            "" => Some(None),
            _ => self.url_path().map(|path| Some(path.to_owned())),
        }
    }

    /// An absolute folder without its closing slashes; empty is none.
    pub fn folder(&self) -> Option<Option<String>> {
        let text = self.text()?;
        if text.is_empty() {
            return Some(None);
        }
        if !text.starts_with('/') {
            return self.refuse(format!("{text:?} is not an absolute path"), "write the whole path, beginning with a slash");
        }
        let trimmed = text.trim_end_matches('/');
        Some(Some(if trimmed.is_empty() { "/".to_owned() } else { trimmed.to_owned() }))
    }
}
