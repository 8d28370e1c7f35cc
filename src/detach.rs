//! `weir detach`: takes off the node what a router attached.

use std::process::ExitCode;

use weir_node::run::{self, RunError};

use crate::common::{ConfigFile, Failed};

/// Take everything off the node that a router attached: programs, maps, the trunk, routes.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigFile,
}

/// Takes everything off, and says what.
///
/// # Errors
/// Where a router still runs, or something cannot be removed.
pub fn run(args: &Args) -> Result<ExitCode, Failed> {
    match run::detach(&args.config.config) {
        Ok(lines) => {
            lines.iter().for_each(|line| println!("{line}"));
            Ok(ExitCode::SUCCESS)
        }
        Err(RunError::Config(problems)) => Err(Failed::config(&problems)),
        Err(error) => Err(error.into()),
    }
}
