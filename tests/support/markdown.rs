//! Pages of the documentation, as far as tests look into them.

use std::collections::BTreeSet;

/// As GitHub makes them of headings.
fn anchor(heading: &str) -> String {
    let text: String = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_')).collect();
    text.trim().to_lowercase().replace(' ', "-")
}

/// Those of a page.
pub fn anchors(page: &str) -> BTreeSet<String> {
    let mut in_block = false;
    let mut found = BTreeSet::new();
    for line in page.lines() {
        in_block ^= line.trim_start().starts_with("```");
        if !in_block && line.starts_with('#') {
            found.insert(anchor(line.trim_start_matches('#')));
        }
    }
    found
}
