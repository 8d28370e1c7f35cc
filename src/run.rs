//! `weir run`: the router of this node.

use std::process::ExitCode;

use weir_node::run::{self, RunError};

use crate::common::{ConfigFile, Failed};

/// Run the router on this node. Needs root.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigFile,
}

/// Runs the router until a signal ends it.
///
/// # Errors
/// Where it cannot start, or a worker fails.
pub fn run(args: &Args) -> Result<ExitCode, Failed> {
    match run::run(&args.config.config) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(RunError::Config(problems)) => Err(Failed::config(&problems)),
        Err(error) => Err(error.into()),
    }
}
