use std::process::ExitCode;
#[derive(clap::Args)]
pub struct Options {
    #[arg(long)]
    pub rehearse: bool,
}
pub fn run(_: &Options) -> ExitCode { ExitCode::FAILURE }
