//! `weir verify`: whether what a running router has in force is what it should be.

use std::process::ExitCode;

use serde_json::Value;
use weir_node::control;

use crate::common::{ConfigFile, DIFFERENT, ERROR, Output, SAME};

/// Ask a running router to read everything afresh, and to compare it with what is in force; what is not as it should be is named and mended.
#[derive(clap::Args)]
#[command(
    after_help = "Files are read and objects translated and compiled from nothing, beside the running router, and the maps of its programs\n\
    are read back from the kernel. A difference counts only if it persists, so that changes meanwhile are none.\n\
    Exit status: 0 no difference, 1 some (which the router mends), 2 it cannot be told."
)]
pub struct Args {
    /// Which router.
    #[command(flatten)]
    pub config: ConfigFile,
    /// How the answer is printed.
    #[arg(long, value_enum, default_value = "text")]
    pub output: Output,
    /// The same as --output json.
    #[arg(long)]
    pub json: bool,
}

/// Asks, and prints the answer.
pub fn run(args: &Args) -> ExitCode {
    let answer = match control::verify(&args.config.config) {
        Ok(answer) => answer,
        Err(error) => {
            eprintln!("weir: {error}");
            return ExitCode::from(ERROR);
        }
    };
    let is_json = args.json || args.output == Output::Json;
    print!("{}", if is_json { format!("{answer:#}\n") } else { to_text(&answer) });
    ExitCode::from(match answer["count"].as_u64() {
        None => ERROR,
        Some(0) => SAME,
        Some(_) => DIFFERENT,
    })
}

fn to_text(answer: &Value) -> String {
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let took = &answer["tookMs"];
    if let Some(problem) = answer["problem"].as_str() {
        return format!("It cannot be told: {problem} (after {took} ms)\n");
    }
    let (count, told) = (answer["count"].as_u64().unwrap_or_default(), answer["differences"].as_array());
    if count == 0 {
        return format!("What is in force is what it should be (looked at in {took} ms).\n");
    }
    let mut text = format!("{count} differences, {} mended (in {took} ms):\n", answer["mended"]);
    for one in told.into_iter().flatten() {
        let [part, object, is, should] = ["part", "object", "inForce", "wanted"].map(|key| word(&one[key]));
        let or_nothing = |text: String| if text.is_empty() { "nothing".to_owned() } else { text };
        let outcome = if one["mended"] == true { "mended" } else { "not mended" };
        text += &format!(
            "  {part}: {object} ({outcome})\n    in force: {}\n    wanted:   {}\n",
            or_nothing(is),
            or_nothing(should)
        );
    }
    let more = count - told.map_or(0, Vec::len) as u64;
    if more > 0 { text + &format!("  and {more} more\n") } else { text }
}
