//! The configuration file -> a validated `Config`; every error at once, each with its place in the file as written.
//!
//! `parse` is pure; `load` reads the files and looks whether the folders they name are there. The way through the
//! folder: `document` makes a tree of the text and merges includes, `reader` walks it and collects what is wrong,
//! `settings`, `upstreams`, `sites` and `routes` say what each key means and what its default is.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use crate::{
    control::{
        template::{self, Why},
        tls,
    },
    model::{
        Settings, Site, SiteTable,
        upstream::{Policy, SetConfig},
    },
};

mod document;
mod glob;
pub mod keys;
pub mod presets;
mod reader;
mod routes;
pub mod rules;
mod settings;
mod sites;
#[cfg(test)]
mod tests;
mod texts;
pub mod unit;
mod upstreams;

use document::Place;
use presets::Presets;
use reader::{Reader, Report, Value};

/// `listen.admin` where the file does not have it.
pub const DEFAULT_ADMIN: &str = "/run/slackwater/admin.sock";

/// What the files say, checked and complete.
#[derive(Debug)]
pub struct Config {
    pub settings: Arc<Settings>,
    pub upstreams: BTreeMap<Arc<str>, UpstreamConfig>,
    pub sites: Arc<SiteTable>,
    /// `file:line:column: message`, in the files' order.
    pub warnings: Vec<String>,
    /// FNV-1a over the filled texts, 16 hex digits: the same on every replica that has the same configuration.
    pub hash: String,
    /// The main file, then the included ones in the order in which they were read.
    pub files: Vec<PathBuf>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamConfig {
    pub policy: Policy,
    /// As written; `None`: empty. Always the name of one of the sets.
    pub active: Option<Arc<str>>,
    /// The Service whose annotation names the active set.
    pub active_from: Option<Arc<str>>,
    /// In the file's order; at least one.
    pub sets: Vec<SetConfig>,
}

impl UpstreamConfig {
    /// The set that the file makes active: `active`, else the only one; where an annotation decides, the first until it is known.
    pub fn active_set(&self) -> Option<&Arc<str>> {
        match (&self.active, self.sets.as_slice()) {
            (Some(active), _) => Some(active),
            (None, [only]) => Some(&only.name),
            (None, [first, ..]) if self.active_from.is_some() => Some(&first.name),
            (None, _) => None,
        }
    }
}

impl Config {
    /// What the files say, and how it stands with the certificates now.
    pub fn warnings_now(&self) -> Vec<String> {
        let certificates = self.settings.tls.iter().flat_map(|tls| tls::warnings(&tls.certificates, SystemTime::now()));
        self.warnings.iter().cloned().chain(certificates).collect()
    }

    /// Every site once: those with hosts by name, then the default.
    pub fn all_sites(&self) -> Vec<&Arc<Site>> {
        let mut sites: Vec<&Arc<Site>> = Vec::new();
        for site in self.sites.exact.values().chain(self.sites.wildcard.iter().map(|(_, site)| site)) {
            if !sites.iter().any(|other| Arc::ptr_eq(other, site)) {
                sites.push(site);
            }
        }
        sites.sort_by(|a, b| a.name.cmp(&b.name));
        sites.extend(&self.sites.default);
        sites
    }
}

/// One error of the configuration. Line and column count from 1; line 0: the file as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub file: PathBuf,
    pub line: usize,
    pub column: usize,
    pub message: String,
    pub help: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file.display(), self.message)?,
            line => write!(f, "{}:{line}:{}: {}", self.file.display(), self.column, self.message)?,
        }
        match &self.help {
            Some(help) => write!(f, "\n  help: {help}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Problem {}

/// A file as it was written.
#[derive(Clone, Debug)]
pub struct Source {
    pub file: PathBuf,
    pub text: String,
}

/// A folder that the configuration names, and where it does.
struct Folder {
    at: Place,
    place: String,
    key: String,
    path: PathBuf,
}

impl Folder {
    fn new(report: &Report, at: Place, key: &str, path: &Path) -> Self {
        Folder { at, place: report.place(at), key: key.to_owned(), path: path.to_owned() }
    }
}

/// Reads the file and what it includes.
///
/// # Errors
/// Every problem of every file, in order. Where a placeholder has no value or the TOML does not parse, only that.
pub fn load(path: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, Vec<Problem>> {
    let text = fs::read_to_string(path).map_err(|error| {
        let message = format!("cannot be read: {error}");
        let help = Some("name the file with --config FILE or in SLACKWATER_CONFIG".to_owned());
        vec![Problem { file: path.to_owned(), line: 0, column: 0, message, help }]
    })?;
    let base = path.parent().unwrap_or(Path::new("")).to_owned();
    let base = if base.as_os_str().is_empty() { PathBuf::from(".") } else { base };
    let mut read: BTreeSet<PathBuf> = fs::canonicalize(path).into_iter().collect();
    let include = &mut |pattern: &str| {
        let mut sources = Vec::new();
        for file in glob::files(&base, pattern).map_err(|error| error.to_string())? {
            // Overlapping patterns, or "*.toml" beside the main file, name a file more than once; it is read once.
            let same = fs::canonicalize(&file).unwrap_or_else(|_| file.clone());
            if read.insert(same) {
                let text = fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
                let file = file.strip_prefix("./").map(Path::to_owned).unwrap_or(file);
                sources.push(Source { file, text });
            }
        }
        Ok(sources)
    };
    let (mut config, folders) = parse_all(Source { file: path.to_owned(), text }, include, env)?;

    let mut settings = (*config.settings).clone();
    settings.tls = tls::load(&settings)?;
    config.settings = Arc::new(settings);

    // What is on disk is only worth a warning: `check` may run where the release is not.
    for Folder { place, key, path, .. } in &folders {
        if !path.is_dir() {
            let message = format!("{place}: `{key}`: {} is not a folder on this machine", path.display());
            config.warnings.push(message);
        } else if key == settings::SPILL && is_in_memory(path) {
            let message = format!("{place}: `{key}`: {} is a memory file system: what spills there is not spilt", path.display());
            config.warnings.push(message);
        }
    }
    Ok(config)
}

/// Whether a folder is on tmpfs or ramfs; false where /proc does not tell.
fn is_in_memory(folder: &Path) -> bool {
    let (Ok(folder), Ok(mounts)) = (fs::canonicalize(folder), fs::read_to_string("/proc/self/mounts")) else {
        return false;
    };
    let fields = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        // proc(5): a space in a mount point is written \040.
        Some((fields.next()?.replace("\\040", " "), fields.next()?))
    });
    // The longest mount point that holds the folder; of several mounts on one point the last is seen.
    let mount = fields.filter(|(point, _)| folder.starts_with(point)).max_by_key(|(point, _)| point.len());
    mount.is_some_and(|(_, kind)| matches!(kind, "tmpfs" | "ramfs"))
}

/// As `load`, from texts. `include` answers a pattern of the key `include` with the files that it names.
///
/// # Errors
/// As `load`.
pub fn parse(
    main: Source,
    include: &mut dyn FnMut(&str) -> Result<Vec<Source>, String>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Config, Vec<Problem>> {
    parse_all(main, include, env).map(|(config, _)| config)
}

fn parse_all(
    main: Source,
    include: &mut dyn FnMut(&str) -> Result<Vec<Source>, String>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<(Config, Vec<Folder>), Vec<Problem>> {
    let mut texts = Texts::default();
    let Some(mut tree) = texts.add(main, env) else { return Err(texts.wrong) };

    // Included files first, so that one walk sees everything and reports in one go.
    let includes = includes(&texts.report, &tree, include);
    let mut trees: Vec<document::Table> = Vec::new();
    for source in includes {
        trees.extend(texts.add(source, env));
    }
    if !texts.wrong.is_empty() {
        return Err(texts.wrong);
    }
    let mut twice = Vec::new();
    for mut included in trees {
        if let Some(entry) = included.get("include") {
            let help = "list every file in the main file's `include`".to_owned();
            texts.report.problem(entry.at, "`include` stands in the main file only", Some(help));
        }
        included.entries.retain(|entry| entry.key != "include");
        document::merge(&mut tree, included, &mut twice);
    }
    let files = texts.report.files.iter().map(|(file, _)| file.clone()).collect();
    // They are part of the hash: another version may have others.
    let named = presets::named(&tree).into_iter();
    let presets: Presets = named
        .filter_map(|(name, text)| {
            Some((*name, texts.add(Source { file: PathBuf::from(format!("preset {name}")), text: (*text).to_owned() }, env)?))
        })
        .collect();
    let Texts { report, mut hash, .. } = texts;
    for document::Twice { path, first, second } in twice {
        let help = format!("it stands at {} already; keep one of them", report.place(first));
        report.problem(second, format!("`{path}` is set a second time"), Some(help));
    }

    let mut folders = Vec::new();
    let mut top = Reader::new(&report, &tree);
    let settings = settings::read(&mut top, env, &mut folders);
    let upstreams =
        upstreams::read(&mut top, &settings.drain, tree.get("drain").is_some(), settings.kubernetes.is_some(), &mut folders);
    let around = sites::Around {
        upstreams: &upstreams,
        drain: &settings.drain,
        presets: &presets,
        has_trusted: !settings.listen.trusted_proxies.is_empty(),
        has_tls: !settings.listen.https.is_empty(),
    };
    let sites = sites::read(&mut top, &around, &mut folders);
    top.finish();

    // The environment decides here too, though no text has the placeholder.
    let has_grace = match tree.get("drain").map(|entry| &entry.node.kind) {
        Some(document::Kind::Table(drain)) => drain.get("grace").is_some(),
        _ => false,
    };
    if !has_grace {
        hash.add(settings::default_grace(env).unwrap_or_default().as_bytes());
    }
    folders.sort_by_key(|folder| folder.at);
    let (problems, warnings) = report.into_parts();
    if !problems.is_empty() {
        return Err(problems);
    }
    let hash = format!("{:016x}", hash.0);
    Ok((Config { settings: Arc::new(settings), upstreams, sites: Arc::new(sites), warnings, hash, files }, folders))
}

/// The files read so far; `wrong` is what keeps one from being a tree at all.
#[derive(Default)]
struct Texts {
    report: Report,
    hash: Hash,
    wrong: Vec<Problem>,
}

impl Texts {
    fn add(&mut self, source: Source, env: &dyn Fn(&str) -> Option<String>) -> Option<document::Table> {
        let Source { file, text } = source;
        let filled = match template::fill_config(&text, env) {
            Ok(filled) => filled,
            Err(all) => {
                self.wrong.extend(all.into_iter().map(|unfilled| unfilled_problem(&file, unfilled)));
                return None;
            }
        };
        self.hash.add(filled.text.as_bytes());
        let parsed = document::parse(self.report.files.len(), &filled.text);
        match parsed {
            Ok(tree) => {
                self.report.files.push((file, filled.map));
                Some(tree)
            }
            Err(document::Syntax { offset, message, help }) => {
                let (line, column) = filled.map.place(offset);
                self.wrong.push(Problem { file, line, column, message, help });
                None
            }
        }
    }
}

fn unfilled_problem(file: &Path, unfilled: template::Unfilled) -> Problem {
    let template::Unfilled { name, line, column, why } = unfilled;
    let (message, help) = match why {
        Why::Missing => {
            (format!("{name} is not set in the environment"), format!("set it, or give it a default: {{{{{name}:-value}}}}"))
        }
        Why::BreaksOut => (
            format!("the environment's {name} holds a quote, a backslash or a line break"),
            "such a value could change the lines around it; write it into the file itself".to_owned(),
        ),
    };
    Problem { file: file.to_owned(), line, column, message, help: Some(help) }
}

fn includes(report: &Report, tree: &document::Table, include: &mut dyn FnMut(&str) -> Result<Vec<Source>, String>) -> Vec<Source> {
    let Some(entry) = tree.get("include") else { return Vec::new() };
    let value = Value { report, node: &entry.node, path: "include".to_owned() };
    let sources = value.list(|value| match include(value.filled_text()?) {
        Ok(sources) => Some(sources),
        Err(error) => value.refuse(error, "patterns are relative to this file; * does not cross a slash"),
    });
    sources.unwrap_or_default().into_iter().flatten().collect()
}

/// FNV-1a, 64 bits. Std's hasher may differ from one Rust to the next, and this only has to tell files apart.
struct Hash(u64);

impl Default for Hash {
    fn default() -> Self {
        Hash(0xcbf2_9ce4_8422_2325)
    }
}

impl Hash {
    fn add(&mut self, bytes: &[u8]) {
        // A byte that no UTF-8 text has ends each text: "a" and "b" are not "ab".
        for byte in bytes.iter().chain(&[0xff]) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}
