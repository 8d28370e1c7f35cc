//! `weir policy`: what the policies in force mean, for whoever has to know.
//!
//! - [`grid`]: the matrix as text; [`svg`]: as a picture.
//! - [`page`]: what applies to an endpoint, as text.

pub mod grid;
pub mod page;
pub mod svg;

use std::{
    fs,
    io::{self, BufWriter},
    path::PathBuf,
    process::ExitCode,
};

use weir_cluster::policy::{
    groups::Groups,
    listing::Lister,
    matrix::{self, Pods, Port, Question},
};
use weir_node::control::{self, AskError};

use crate::common::{Cluster, ConfigFile, Failed, Output, Unapplied, as_json, has_colour, written};

/// What is asked about policy.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Show who can reach whom, pods by pods, as text, JSON or a picture. Needs no router and no privileges.
    Matrix(Matrix),
    /// List what applies to an endpoint, in the order of evaluation, with hits per rule where a router runs; without one, all endpoints of this node.
    List(List),
}

/// What `weir policy list` is asked.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    weir policy list                       the endpoints of this node, and how many policies apply to each\n  \
    weir policy list web/frontend-0        tiers, policies and rules of that pod, first to last\n  \
    weir policy list node-a-eth0           the same of a host endpoint, for each kind of packet\n\
    The first rule that matches a packet decides; log goes on, pass skips the rest of its tier. What no rule of a tier decides goes\n\
    by the tier's end. A connection needs the egress of its source and the ingress of its destination (`weir policy matrix`).\n\
    Hits are new connections, and packets that were denied one, that the rule decided on this node since the router started, for\n\
    whichever endpoint; a rule that a reload leaves as it is keeps them. They need a running router, and root.")]
pub struct List {
    /// A pod, namespace/name, or the name of a host endpoint.
    #[arg(value_name = "ENDPOINT")]
    endpoint: Option<String>,
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    cluster: Cluster,
    #[command(flatten)]
    unapplied: Unapplied,
    /// The namespace of objects that give none.
    #[arg(long, value_name = "NS", default_value = "default")]
    default_namespace: String,
    /// How the list is printed.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// What `weir policy matrix` is asked.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    weir policy matrix                                     all pods, on the ports that each destination publishes\n  \
    weir policy matrix --ports tcp/443,icmp                the same ports for every destination\n  \
    weir policy matrix --to db/postgres-0                  who reaches that pod\n  \
    weir policy matrix --from web --svg web.svg            what namespace web reaches, as a picture too\n  \
    weir policy matrix -c deploy/ --assume-pods            the same of plain manifests in a folder, before they are applied\n  \
    weir policy matrix --output json | jq '.flows[] | select(.verdict != \"allowed\")'\n\
    It tells what policies say of a connection to the pod's own address, judged at both ends, whichever nodes they are on:\n\
    the source's egress and the destination's ingress policy, also where the first alone would deny it. What host endpoints rule for\n\
    what nodes forward is left out (`weir trace` has it), as are routes, listeners and services.")]
pub struct Matrix {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    cluster: Cluster,
    #[command(flatten)]
    unapplied: Unapplied,
    /// The namespace of objects that give none.
    #[arg(long, value_name = "NS", default_value = "default")]
    default_namespace: String,
    /// Ports to ask about: tcp/80, udp/53, sctp/5060, icmp (an echo request). Default: those that the containers of each destination
    /// publish, or tcp/80 where they publish none.
    #[arg(long, value_name = "PORT,...", value_delimiter = ',')]
    ports: Vec<Port>,
    /// Only pods of this namespace, as sources and as destinations; may be given several times.
    #[arg(short, long, value_name = "NS", conflicts_with_all = ["from", "to"])]
    namespace: Vec<Pods>,
    /// Only these sources: a namespace, or namespace/pod; may be given several times.
    #[arg(long, value_name = "NS[/POD]")]
    from: Vec<Pods>,
    /// Only these destinations: a namespace, or namespace/pod; may be given several times.
    #[arg(long, value_name = "NS[/POD]")]
    to: Vec<Pods>,
    /// A line for each pod, however many there are. Else pods of a namespace that fare alike share one where there are more than 40 pods.
    #[arg(long)]
    every_pod: bool,
    /// How the matrix is printed; JSON has every pair, port and deciding rule.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    /// Write a picture of it to this file, too.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Asks the configuration, and a running router for hits, and prints.
///
/// # Errors
/// A bad configuration, an endpoint that is not there, and what cannot be written.
pub fn run(command: &Command) -> Result<ExitCode, Failed> {
    let out = &mut BufWriter::new(io::stdout().lock());
    match command {
        Command::Matrix(args) => matrix(args, out)?,
        Command::List(args) => list(args, out)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn matrix(args: &Matrix, out: &mut impl io::Write) -> Result<(), Failed> {
    let loaded = args.config.load(&args.unapplied.assumptions(Some(&args.default_namespace)), &args.cluster)?;
    let both = |pods: &[Pods]| pods.iter().chain(&args.namespace).cloned().collect();
    let question = Question { ports: args.ports.clone(), from: both(&args.from), to: both(&args.to) };
    let matrix = matrix::Matrix::new(&loaded, &question)?;
    let groups = Groups::readable(&matrix, args.every_pod);
    if let Some(file) = &args.svg {
        fs::write(file, svg::picture(&matrix, &groups)).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    written(
        match args.output {
            Output::Json => matrix.write_json(out),
            Output::Text => out.write_all(grid::text(&matrix, &groups, has_colour()).as_bytes()),
        }
        .and_then(|()| out.flush()),
    )
}

fn list(args: &List, out: &mut impl io::Write) -> Result<(), Failed> {
    let loaded = args.config.load(&args.unapplied.assumptions(Some(&args.default_namespace)), &args.cluster)?;
    let json = args.output == Output::Json;
    let Some(endpoint) = &args.endpoint else {
        let overview = Lister::new(&loaded, None).overview();
        let text = if json { as_json(&overview)? } else { page::overview_text(&overview) };
        return written(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
    };
    let hits = match control::policy_hits(&args.config.config) {
        Ok(hits) => Some(hits),
        Err(AskError::NotRunning { path, source }) => {
            eprintln!("weir: hits are not shown: no router answers at {} ({source})", path.display());
            None
        }
        Err(error) => return Err(error.into()),
    };
    let listed = Lister::new(&loaded, hits.as_ref()).endpoint(endpoint)?;
    let text = if json { as_json(&listed)? } else { page::text(&listed) };
    written(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}
