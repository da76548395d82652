//! `slackwater check`: is this configuration good, and what does it amount to.

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use super::explain;
use crate::{
    control::{
        config::{self, Config},
        expand,
    },
    http::preflight,
};

/// Exit code 0 where the configuration can be served, 1 with every error on stderr where it cannot.
pub fn run(config: &Path, expand: bool, url: Option<&str>) -> ExitCode {
    let env = |name: &str| std::env::var(name).ok();
    match check(config, expand, url, &env, &mut io::stdout().lock(), &mut io::stderr().lock()) {
        Ok(true) => ExitCode::SUCCESS,
        // Also where the reader of a pipe has left: what it got is not all there is to say.
        Ok(false) | Err(_) => ExitCode::FAILURE,
    }
}

fn check(
    file: &Path,
    expanded: bool,
    url: Option<&str>,
    env: &dyn Fn(&str) -> Option<String>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<bool> {
    let config = match config::load(file, env) {
        Ok(config) => config,
        Err(problems) => {
            for problem in &problems {
                writeln!(err, "{problem}")?;
            }
            return Ok(false);
        }
    };
    for warning in config.warnings_now() {
        writeln!(err, "warning: {warning}")?;
    }
    for (name, upstream) in &config.upstreams {
        for (set, preflight) in upstream.sets.iter().filter_map(|set| Some((set, set.preflight.as_ref()?))) {
            if let Err(why) = preflight::question(&config.sites, name, set, preflight) {
                writeln!(err, "warning: the preflight of set {} of upstream {name} will give up at once: {why}", set.name)?;
            }
        }
    }
    if let Some(url) = url {
        let explained = explain::explain(&config, url);
        match &explained {
            Ok(text) => write!(out, "{text}")?,
            Err(why) => writeln!(err, "{why}")?,
        }
        return Ok(explained.is_ok());
    }
    // A comment before the expansion, so that this can be piped into a file and used as one.
    writeln!(out, "{}{}: ok ({})", if expanded { "# " } else { "" }, file.display(), counts(&config))?;
    if expanded {
        write!(out, "{}", expand::expand(&config))?;
    }
    out.flush()?;
    Ok(true)
}

fn counts(config: &Config) -> String {
    let count = |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
    let sites = config.all_sites();
    let routes = sites.iter().map(|site| site.routes().count()).sum();
    [count(sites.len(), "site"), count(config.upstreams.len(), "upstream"), count(routes, "route")].join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str, expanded: bool) -> (bool, String, String) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("s.toml");
        std::fs::write(&file, text).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let good = check(&file, expanded, None, &|_| None, &mut out, &mut err).unwrap();
        let shown = |bytes| String::from_utf8(bytes).unwrap().replace(&dir.path().display().to_string(), "DIR");
        (good, shown(out), shown(err))
    }

    const GOOD: &str =
        "upstream.php.set.blue.endpoints = [\"127.0.0.1:9000\"]\n[[site]]\nroot = \"/nowhere\"\nupstream = \"php\"\n";

    #[test]
    fn a_good_file_is_counted_and_warned_about() {
        let (good, out, err) = checked(GOOD, false);
        assert!(good);
        assert_eq!(out, "DIR/s.toml: ok (1 site, 1 upstream, 0 routes)\n");
        assert!(err.contains("warning: DIR/s.toml:3:8: `site.root`: /nowhere is not a folder on this machine\n"), "{err}");
    }

    #[test]
    fn expanded_it_is_a_file_again() {
        let (good, out, _) = checked(GOOD, true);
        assert!(good && out.starts_with("# DIR/s.toml: ok ("), "{out}");
        let (good, again, _) = checked(&out, true);
        assert!(good);
        let body = |text: &str| text.lines().skip(2).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(body(&out), body(&again));
    }

    #[test]
    fn every_error_goes_to_stderr_and_nothing_to_stdout() {
        let (good, out, err) = checked("workers = 0\nspeed = 1\n", true);
        assert!(!good);
        assert_eq!(out, "");
        assert!(err.contains("DIR/s.toml:1:11: ") && err.contains("DIR/s.toml:2:1: unknown key `speed`"), "{err}");
    }
}
