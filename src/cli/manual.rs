//! `man` and `completions`: what the arguments say of themselves, for man(1) and for shells.

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use super::fail;

pub fn pages(command: clap::Command, folder: &Path) -> ExitCode {
    let written = std::fs::create_dir_all(folder).and_then(|()| clap_mangen::generate_to(command, folder));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&format!("{}: {error}", folder.display())),
    }
}

pub fn completions(command: &mut clap::Command, shell: clap_complete::Shell) -> ExitCode {
    // Not straight to stdout: a reader that leaves early would be a panic.
    let mut script = Vec::new();
    clap_complete::generate(shell, command, "slackwater", &mut script);
    match io::stdout().write_all(&script) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string()),
    }
}
