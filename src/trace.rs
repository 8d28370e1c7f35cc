//! `weir trace`: what the router would do with the first packet of each flow.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::PathBuf,
    process::ExitCode,
};

use weir_cluster::trace::Tracer;

use crate::common::{ConfigFile, Failed};

/// Say what the router would do with the first packet of each flow, without touching a network.
#[derive(clap::Args)]
#[command(after_help = "One JSON object per line, for example:\n  \
    {\"id\": \"1\", \"src\": \"web/test-pod\", \"dst\": \"10.96.0.10\", \"proto\": \"tcp\", \"dport\": 80}\n\
    src and dst are addresses or namespace/pod; optional: id, sport, dport, icmpType, icmpCode, device.\n\
    Exit status 1 if a line was no valid flow; its answer is {\"id\", \"error\"}.")]
pub struct Args {
    #[command(flatten)]
    config: ConfigFile,
    /// The flows; `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    flows: PathBuf,
    /// Explain each flow step by step instead of printing JSON.
    #[arg(long)]
    text: bool,
}

/// Answers each flow; exit status 1 if one was none.
///
/// # Errors
/// A bad configuration, and what cannot be read or written.
pub fn run(args: &Args) -> Result<ExitCode, Failed> {
    let loaded = args.config.load()?;
    let mut tracer = Tracer::new(&loaded)?;
    let input: Box<dyn Read> = if args.flows.as_os_str() == "-" {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(&args.flows).map_err(|error| format!("{}: {error}", args.flows.display()))?)
    };
    let output = io::BufWriter::new(io::stdout().lock());
    let all_valid = tracer.run(BufReader::new(input), output, args.text)?;
    Ok(if all_valid { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
