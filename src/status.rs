//! `weir status`: how a running router is.

use std::process::ExitCode;

use weir_node::control::{self, status_text};

use crate::common::{ConfigFile, Failed, Output};

/// Show a running router: modes, workers, counters.
#[derive(clap::Args)]
pub struct Args {
    /// Which router.
    #[command(flatten)]
    pub config: ConfigFile,
    /// How the answer is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub output: Output,
}

/// Asks, and prints the answer.
///
/// # Errors
/// Where no router answers.
pub fn run(args: &Args) -> Result<ExitCode, Failed> {
    let status = control::status(&args.config.config)?;
    print!("{}", if args.output == Output::Json { format!("{status:#}\n") } else { status_text(&status) });
    Ok(ExitCode::SUCCESS)
}
