//! The command line, one command a file.

use std::{path::PathBuf, process::ExitCode};

use clap::{CommandFactory, Parser, Subcommand};

use crate::control::{api::SwapRequest, config::Config};

pub mod check;
pub mod demo;
pub mod explain;
mod fleet;
mod manual;
pub mod order;
pub mod render;

const CONFIG: &str = "config/slackwater.toml";

#[derive(Parser)]
#[command(
    name = "slackwater",
    version,
    about = "An edge proxy for PHP-FPM: blue/green swaps, drains and reloads without a dropped request",
    after_long_help = "Exit codes: 0; 1 refused, or the configuration has errors; 2 arguments that are not known; 3 the process has ended and had to cut requests; 4 a \
                       thread of it has died.\n\nSignals to `serve`: HUP reloads, TERM and QUIT drain, INT drains at once, USR1 opens the access log anew."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run
    Serve(ConfigFile),
    /// Validate the configuration; print every error with file:line:column
    Check {
        #[command(flatten)]
        config: ConfigFile,
        /// Print everything that is in force, defaults included
        #[arg(long)]
        expand: bool,
        /// Say which site and route take this request, and what would answer it
        #[arg(long, conflicts_with = "expand", value_name = "http://HOST/PATH")]
        url: Option<String>,
    },
    /// Fill {{NAME}} placeholders in specs from the environment
    Render {
        #[arg(required = true)]
        paths: Vec<PathBuf>,
    },
    /// As SIGHUP, but waits and prints the outcome
    Reload(Admin),
    /// Turn an upstream's traffic to another set: of this process, or where kubernetes.self_service and active_from are set of all replicas
    Swap {
        /// As in [upstream.NAME]
        upstream: String,
        /// As in [upstream.NAME.set.SET]: the one that is to get the traffic
        set: String,
        /// Return when the old set has drained, and print the receipt
        #[arg(long)]
        wait: bool,
        /// How long --wait waits, as "60s"
        #[arg(long, default_value = "60s", value_parser = duration)]
        timeout: std::time::Duration,
        /// Only say whether the swap would be taken
        #[arg(long)]
        dry_run: bool,
        /// Also where fewer endpoints are usable than min_ready
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        admin: Admin,
    },
    /// Phase, generation, upstreams, sets, endpoints, queue, drains
    Status {
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        admin: Admin,
    },
    /// Take an endpoint out of service, or back
    Endpoint {
        #[arg(value_parser = ["disable", "enable"])]
        action: String,
        /// As in [upstream.NAME]
        upstream: String,
        /// As `slackwater status` shows it
        address: String,
        #[command(flatten)]
        admin: Admin,
    },
    /// As SIGTERM, and shows progress
    Drain(Admin),
    /// A blue and a green PHP-FPM pool and the proxy before them, on loopback
    Demo(demo::Options),
    /// Write the manual's pages, slackwater.1 and one for each command, into a folder as /usr/local/share/man/man1
    Man { folder: PathBuf },
    /// Print what completes this command in a shell, to be sourced by it
    Completions { shell: clap_complete::Shell },
}

#[derive(clap::Args)]
struct ConfigFile {
    /// Else $SLACKWATER_CONFIG, else config/slackwater.toml
    #[arg(long, env = "SLACKWATER_CONFIG", default_value = CONFIG)]
    config: PathBuf,
}

#[derive(clap::Args)]
pub struct Admin {
    /// The admin socket of the running process; else the configuration's listen.admin
    #[arg(long)]
    admin: Option<PathBuf>,
    #[arg(long, env = "SLACKWATER_CONFIG", default_value = CONFIG)]
    config: PathBuf,
}

impl Admin {
    fn socket(&self) -> Result<PathBuf, String> {
        match &self.admin {
            Some(path) => Ok(path.clone()),
            None => match self.load() {
                Ok(config) => Ok(config.settings.listen.admin.clone()),
                // The very moment at which an operator wants to know how the process is.
                Err(reason) => match self.told_socket() {
                    Some(path) => {
                        say(&format!(
                            "the configuration has errors (see slackwater check); the process at {} is asked",
                            path.display()
                        ));
                        Ok(path)
                    }
                    None => Err(reason),
                },
            },
        }
    }

    /// `listen.admin` of a file that is TOML, whatever else is wrong with it.
    fn told_socket(&self) -> Option<PathBuf> {
        let file: toml::Table = std::fs::read_to_string(&self.config).ok()?.parse().ok()?;
        let told = file.get("listen").and_then(|listen| listen.get("admin"));
        let path = told.map_or(crate::control::config::DEFAULT_ADMIN, |told| told.as_str().unwrap_or_default());
        (!path.contains("{{")).then(|| PathBuf::from(path)).filter(|path| path.exists())
    }

    fn load(&self) -> Result<Config, String> {
        crate::control::config::load(&self.config, &|name| std::env::var(name).ok()).map_err(|problems| {
            let list: Vec<String> = problems.iter().map(ToString::to_string).collect();
            format!("{}\nname the admin socket with --admin PATH, or mend the configuration", list.join("\n"))
        })
    }
}

fn duration(text: &str) -> Result<std::time::Duration, String> {
    crate::control::config::unit::parse_duration(text).ok_or_else(|| format!("`{text}` is not a duration; write \"60s\""))
}

pub fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve(file) => match crate::app::run(&file.config) {
            Ok(code) => ExitCode::from(code),
            Err(reason) => fail(&reason),
        },
        Command::Check { config, expand, url } => check::run(&config.config, expand, url.as_deref()),
        Command::Render { paths } => render::run(&paths),
        Command::Reload(admin) => order::run(admin.socket(), order::Order::Reload),
        Command::Swap { upstream, set, wait, timeout, dry_run, force, admin } => {
            let timeout_seconds = timeout.as_secs_f64();
            let order = SwapRequest { upstream, set, wait, timeout_seconds, dry_run, force };
            swap(&admin, order)
        }
        Command::Status { json, admin } => order::run(admin.socket(), order::Order::Status { json }),
        Command::Endpoint { action, upstream, address, admin } => {
            let order = crate::control::api::EndpointRequest { upstream, address, disabled: action == "disable" };
            order::run(admin.socket(), order::Order::Endpoint(order))
        }
        Command::Drain(admin) => order::run(admin.socket(), order::Order::Drain),
        Command::Demo(options) => demo::run(&options),
        Command::Man { folder } => manual::pages(Arguments::command(), &folder),
        Command::Completions { shell } => manual::completions(&mut Arguments::command(), shell),
    }
}

/// One process where its socket is named, else all replicas where the configuration says that they share an annotation.
fn swap(admin: &Admin, order: SwapRequest) -> ExitCode {
    if let Some(socket) = &admin.admin {
        return order::run(Ok(socket.clone()), order::Order::Swap(order));
    }
    let config = match admin.load() {
        Ok(config) => config,
        Err(reason) => return fail(&reason),
    };
    match fleet::Fleet::of(&config, &order.upstream) {
        Some(fleet) => fleet::run(&fleet, &order),
        None => order::run(Ok(config.settings.listen.admin.clone()), order::Order::Swap(order)),
    }
}

/// On a runtime of this thread.
fn block_on<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default());
    runtime.map_err(|error| error.to_string())?.block_on(work)
}

fn fail(reason: &str) -> ExitCode {
    say(reason);
    ExitCode::FAILURE
}

/// What others have said may be in it, and must not steer a terminal.
fn say(reason: &str) {
    let plain: String = reason.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    eprintln!("slackwater: {plain}");
}
