//! `preset`: what a widely used application's own documentation asks of its web server, as a site's defaults and routes.

use std::collections::BTreeMap;

use super::{
    document::{Kind, Table},
    reader::{Reader, Value, nearest},
};

/// In the manner of a `[[site]]`; each says where its application's documentation is.
pub const ALL: [(&str, &str); 6] = [
    ("laravel", include_str!("presets/laravel.toml")),
    ("symfony", include_str!("presets/symfony.toml")),
    ("wordpress", include_str!("presets/wordpress.toml")),
    ("drupal", include_str!("presets/drupal.toml")),
    ("magento", include_str!("presets/magento.toml")),
    ("nextcloud", include_str!("presets/nextcloud.toml")),
];

/// Those that a configuration names, as trees.
pub type Presets = BTreeMap<&'static str, Table>;

/// The names in the sites of `tree`, right or wrong.
pub fn named(tree: &Table) -> Vec<&'static (&'static str, &'static str)> {
    let Some(Kind::List(sites)) = tree.get("site").map(|entry| &entry.node.kind) else { return Vec::new() };
    let names = sites.iter().filter_map(|site| match &site.kind {
        Kind::Table(site) => match &site.get("preset")?.node.kind {
            Kind::Text(name) => Some(name.as_str()),
            _ => None,
        },
        _ => None,
    });
    let names: Vec<&str> = names.collect();
    ALL.iter().filter(|(name, _)| names.contains(name)).collect()
}

/// The preset that a site asks for. `None`: none, or a name that has been reported.
pub fn chosen<'a>(v: &Value<'a>, presets: &'a Presets) -> Option<(&'static str, Reader<'a>)> {
    let text = v.text()?;
    match presets.get_key_value(text) {
        Some((name, table)) => Some((name, Reader::of(v.report, table, "site"))),
        None if text.is_empty() => None,
        None => {
            let help = nearest(text, ALL.iter().map(|(name, _)| *name)).map_or_else(
                || format!("there are {}", ALL.map(|(name, _)| format!("{name:?}")).join(", ")),
                |near| format!("did you mean {near:?}?"),
            );
            v.refuse(format!("there is no preset {text:?}"), help)
        }
    }
}

/// What is not a preset's to say counts as asked for; what is left is unknown.
pub fn finish(mut reader: Reader<'_>) {
    for key in ["hosts", "preset", "root", "php_root", "https_only"] {
        reader.ask(key);
    }
    reader.finish();
}
