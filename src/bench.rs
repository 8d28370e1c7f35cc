//! `weir bench`: the pipeline on memory rings, measured.

use std::{process::ExitCode, time::Duration};

use weir_benches::command::{self, Cases, Settings};

use crate::common::{Failed, Output};

/// Measure the pipeline on memory rings: packets a second, time and cycles of a packet, in ten cases.
#[derive(clap::Args)]
#[command(after_help = command::help())]
pub struct Args {
    /// Which case, or `all`.
    #[arg(long, value_name = "NAME", default_value = "all")]
    case: Cases,
    /// Flows that the packets belong to, of all workers together.
    #[arg(long, default_value_t = 10_000)]
    flows: u32,
    /// Workers at once, each on a processor of its own.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Seconds to measure for each result.
    #[arg(long, default_value = "1", value_parser = seconds)]
    seconds: Duration,
    /// How results are printed.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    /// The same as --output json.
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

/// Seconds, as an argument.
///
/// # Errors
/// Another text.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let parsed = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    parsed.ok_or_else(|| "expected seconds, like 2.5".into())
}

/// Measures, and prints.
///
/// # Errors
/// Where a case cannot be set up.
pub fn run(args: Args) -> Result<ExitCode, Failed> {
    let Args { case: cases, flows, workers, seconds: time, output, json } = args;
    command::run(&Settings { cases, flows, workers, time }, json || output == Output::Json)?;
    Ok(ExitCode::SUCCESS)
}
