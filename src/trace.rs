//! `weir trace`: what the router would do with the first packet of each flow.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::PathBuf,
    process::ExitCode,
};

use weir_cluster::trace::Tracer;

use crate::common::{Cluster, ConfigFile, Failed, Unapplied};

/// Say what the router would do with the first packet of each flow, without touching a network.
#[derive(clap::Args)]
#[command(after_help = "One JSON object per line, for example:\n  \
    {\"id\": \"1\", \"src\": \"web/test-pod\", \"dst\": \"10.96.0.10\", \"proto\": \"tcp\", \"dport\": 80}\n\
    src and dst are addresses or namespace/pod; optional: id, sport, dport, icmpType, icmpCode, device.\n\
    They may also be workloads, whose first pod is meant (deploy/shop/web, or shop/web), and dst a service: svc/shop/web. dport may be\n\
    the name that the service or the pod has for it, and is not needed for a service with one port of the protocol.\n\
    Exit status 1 if a line was no valid flow; its answer is {\"id\", \"error\"}.")]
pub struct Args {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    cluster: Cluster,
    #[command(flatten)]
    unapplied: Unapplied,
    /// The namespace of objects that give none.
    #[arg(short, long, value_name = "NS", default_value = "default")]
    namespace: String,
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
    let loaded = args.config.load(&args.unapplied.assumptions(Some(&args.namespace)), &args.cluster)?;
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
