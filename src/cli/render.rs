//! `slackwater render`: specs with their placeholders filled, as one YAML stream for `kubectl apply -f -`.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use crate::control::template;

/// Files in the order of the arguments; a folder stands for its `*.yaml` and `*.yml`, sorted, not those of its folders.
/// Exit code 1, and nothing on stdout, where a NAME is missing or a file cannot be read: half a stream must never be applied.
pub fn run(paths: &[PathBuf]) -> ExitCode {
    let env = |name: &str| std::env::var(name).ok();
    match stream(paths, &env) {
        Ok(text) => {
            let mut out = io::stdout().lock();
            match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        Err(problems) => {
            let mut err = io::stderr().lock();
            for problem in problems {
                // Nobody is left to be told if stderr is gone too.
                let _ = writeln!(err, "{problem}");
            }
            ExitCode::FAILURE
        }
    }
}

/// # Errors
/// A line for every missing NAME, with `file:line:column`, and for every path that cannot be read.
fn stream(paths: &[PathBuf], env: &dyn Fn(&str) -> Option<String>) -> Result<String, Vec<String>> {
    let mut text = String::new();
    let mut problems = Vec::new();
    if paths.is_empty() {
        problems.push("render: name at least one file or folder".to_owned());
    }
    for path in paths {
        let files = match files(path) {
            Ok(files) => files,
            Err(error) => {
                problems.push(format!("{}: {error}", path.display()));
                continue;
            }
        };
        for file in files {
            match fs::read_to_string(&file) {
                Ok(spec) => match template::fill(&spec, env) {
                    Ok(filled) => append(&mut text, &filled.text),
                    Err(missing) => problems.extend(missing.into_iter().map(|template::Missing { name, line, column }| {
                        format!("{}:{line}:{column}: {name} is not set in the environment", file.display())
                    })),
                },
                Err(error) => problems.push(format!("{}: {error}", file.display())),
            }
        }
    }
    if problems.is_empty() { Ok(text) } else { Err(problems) }
}

fn files(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let file = entry?.path();
        let is_yaml = file.extension().is_some_and(|ending| ending == "yaml" || ending == "yml");
        if is_yaml && file.is_file() {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(io::Error::other("no *.yaml or *.yml in this folder"));
    }
    files.sort();
    Ok(files)
}

fn append(stream: &mut String, spec: &str) {
    // YAML 1.2 takes a byte order mark only at the beginning of a stream or document.
    let spec = spec.trim_start_matches('\u{feff}');
    if !stream.is_empty() && !begins_document(spec) {
        stream.push_str("---\n");
    }
    stream.push_str(spec);
    if !spec.is_empty() && !spec.ends_with('\n') {
        stream.push('\n');
    }
}

/// Whether the text brings its own `---`: a second one would make an empty document.
fn begins_document(spec: &str) -> bool {
    let first = spec.lines().find(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'));
    first.is_some_and(|line| {
        line.starts_with('%') || line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(specs: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in specs {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn env(name: &str) -> Option<String> {
        (name == "IMAGE").then(|| "php:8 \"quoted\"\n".to_owned())
    }

    #[test]
    fn one_stream_in_path_order() {
        let dir = folder(&[("b.yml", "b: {{N:-2}}"), ("a.yaml", "a: 1\n"), ("c.yaml", "# c\n---\nc: {{ go }}\n"), ("d.txt", "no")]);
        let first = dir.path().join("c.yaml");
        let text = stream(&[first, dir.path().to_owned()], &env).unwrap();
        assert_eq!(text, "# c\n---\nc: {{ go }}\n---\na: 1\n---\nb: 2\n# c\n---\nc: {{ go }}\n");
    }

    #[test]
    fn a_value_may_hold_anything() {
        let dir = folder(&[("a.yaml", "a: {{IMAGE}}")]);
        assert_eq!(stream(&[dir.path().to_owned()], &env).unwrap(), "a: php:8 \"quoted\"\n");
    }

    #[test]
    fn every_missing_name_and_unreadable_file_is_listed() {
        let dir = folder(&[("a.yaml", "a: {{IMAGE}}\nb: {{ONE}}\n"), ("b.yaml", "{{TWO}} {{ONE}}")]);
        let paths = [dir.path().to_owned(), dir.path().join("none.yaml")];
        let problems = stream(&paths, &env).unwrap_err().join("\n").replace(&dir.path().display().to_string(), "DIR");
        assert_eq!(
            problems,
            "DIR/a.yaml:2:4: ONE is not set in the environment\nDIR/b.yaml:1:1: TWO is not set in the environment\n\
             DIR/b.yaml:1:9: ONE is not set in the environment\nDIR/none.yaml: No such file or directory (os error 2)"
        );
        assert!(stream(&[], &env).is_err());
        assert!(stream(&[folder(&[]).path().to_owned()], &env).is_err());
    }
}
