//! The `weir` command.

use std::{
    fs::{self, File},
    io::{self, BufReader, IsTerminal, Read},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use weir::{
    check,
    config::Problems,
    conntrack::{Action, Query},
    control::{self, AskError},
    ipam,
    policy::{
        grid,
        groups::Groups,
        listing::Lister,
        matrix::{Matrix, Pods, Port, Question},
        page, svg,
    },
    replay, trace, translate,
};

/// A userspace packet router for Kubernetes nodes: services, network policy and forwarding on AF_XDP.
///
/// Weir reads the manifests that you already have and does what kube-proxy and Calico's Felix do on a node, without iptables.
/// Start with `weir check -c weir.yaml`, ask `weir trace` what would happen to a flow, then `weir run`.
#[derive(Parser)]
#[command(name = "weir", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Load and compile the configuration and all manifests; print every problem as file:line:column.
    Check(Check),
    /// Say what the router would do with the first packet of each flow, without touching a network.
    Trace(Trace),
    /// Run the whole dataplane over packet captures instead of devices, without privileges.
    Replay(Replay),
    /// Run the router on this node. Needs root.
    Run(Run),
    /// Build a small cluster of network namespaces, run the router in it, send real traffic, and check what happens. Needs root.
    Demo(Demo),
    /// Measure the pipeline on memory rings: packets a second, time and cycles of a packet, in ten cases.
    Bench(Bench),
    /// Show a running router: modes, workers, counters.
    Status(Ask),
    /// List, count, delete or watch the connections of a running router.
    Conntrack(Conntrack),
    /// Explain policy: who can reach whom, and what applies to a pod.
    #[command(subcommand)]
    Policy(Policy),
    /// List the services and backends of a running router: which are used, why not, and how many connections each got.
    Services(Services),
    /// Explain the addresses of the pods that weir makes on this node, with or without a running router.
    #[command(subcommand)]
    Ipam(Ipam),
    /// Take everything off the node that a router attached: programs, maps, the trunk, routes.
    Detach(Detach),
}

#[derive(Args)]
struct ConfigFile {
    /// The router's configuration file.
    #[arg(short, long, value_name = "FILE", default_value = "weir.yaml")]
    config: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For a person.
    Text,
    /// For a program.
    Json,
}

#[derive(Args)]
struct Check {
    #[command(flatten)]
    config: ConfigFile,
    /// How problems are printed.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Args)]
#[command(after_help = "One JSON object per line, for example:\n  \
    {\"id\": \"1\", \"src\": \"web/test-pod\", \"dst\": \"10.96.0.10\", \"proto\": \"tcp\", \"dport\": 80}\n\
    src and dst are addresses or namespace/pod; optional: id, sport, dport, icmpType, icmpCode, device.\n\
    Exit status 1 if a line was no valid flow; its answer is {\"id\", \"error\"}.")]
struct Trace {
    #[command(flatten)]
    config: ConfigFile,
    /// The flows; `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    flows: PathBuf,
    /// Explain each flow step by step instead of printing JSON.
    #[arg(long)]
    text: bool,
}

#[derive(Args)]
struct Replay {
    #[command(flatten)]
    config: ConfigFile,
    /// A device and the capture of what it receives (classic Ethernet pcap); may be given several times.
    #[arg(long = "in", value_name = "DEVICE=FILE", required = true, value_parser = device_and_file)]
    inputs: Vec<(String, PathBuf)>,
    /// The folder for DEVICE.pcap, counters.json and conntrack.json.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Seed of the random source: the same inputs and seed give the same bytes.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Change to another configuration, at a time after the first packet; may be given several times.
    #[arg(long, value_name = "SECONDS=FILE", value_parser = seconds_and_file)]
    config_at: Vec<(Duration, PathBuf)>,
}

#[derive(Args)]
struct Run {
    #[command(flatten)]
    config: ConfigFile,
}

#[derive(Args)]
struct Demo {
    /// Run the scenario over memory rings: needs no privileges, sends no real traffic.
    #[arg(long)]
    memory: bool,
}

#[derive(Args)]
#[command(after_help = weir_benches::command::help())]
struct Bench {
    /// Which case, or `all`.
    #[arg(long, value_name = "NAME", default_value = "all")]
    case: weir_benches::command::Cases,
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

#[derive(Args)]
struct Ask {
    #[command(flatten)]
    config: ConfigFile,
    /// How the answer is printed.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    weir conntrack --dst 10.96.0.10 --dport 80        connections to a service\n  \
    weir conntrack count --state unreplied            how many wait for an answer\n  \
    weir conntrack delete --reply-src 10.1.2.20       forget those to a backend\n  \
    weir conntrack watch --proto udp --output json    what happens, a line for each event\n\
    Lines are as `conntrack -L` prints them: protocol, its number, seconds left, state, both directions.")]
struct Conntrack {
    /// What to do with the connections that the filters name.
    #[arg(value_enum, default_value = "list")]
    action: Action,
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    filter: weir::conntrack::Filter,
    /// With delete, without a filter: all of them.
    #[arg(long)]
    all: bool,
    /// How connections are printed; JSON is a list, or with watch an object per line.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Subcommand)]
enum Policy {
    /// Show who can reach whom, pods by pods, as text, JSON or a picture. Needs no router and no privileges.
    Matrix(PolicyMatrix),
    /// List what applies to an endpoint, in the order of evaluation, with hits per rule where a router runs; without one, all endpoints of this node.
    List(PolicyList),
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    weir policy list                       the endpoints of this node, and how many policies apply to each\n  \
    weir policy list web/frontend-0        tiers, policies and rules of that pod, first to last\n  \
    weir policy list node-a-eth0           the same of a host endpoint, for each kind of packet\n\
    The first rule that matches a packet decides; log goes on, pass skips the rest of its tier. What no rule of a tier decides goes\n\
    by the tier's end. A connection needs the egress of its source and the ingress of its destination (`weir policy matrix`).\n\
    Hits are new connections, and packets that were denied one, that the rule decided on this node since the router started, for\n\
    whichever endpoint; a rule that a reload leaves as it is keeps them. They need a running router, and root.")]
struct PolicyList {
    /// A pod, namespace/name, or the name of a host endpoint.
    #[arg(value_name = "ENDPOINT")]
    endpoint: Option<String>,
    #[command(flatten)]
    config: ConfigFile,
    /// How the list is printed.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    weir policy matrix                                     all pods, on the ports that each destination publishes\n  \
    weir policy matrix --ports tcp/443,icmp                the same ports for every destination\n  \
    weir policy matrix --to db/postgres-0                  who reaches that pod\n  \
    weir policy matrix --from web --svg web.svg            what namespace web reaches, as a picture too\n  \
    weir policy matrix --output json | jq '.flows[] | select(.verdict != \"allowed\")'\n\
    It tells what policies say of a connection to the pod's own address, judged at both ends, whichever nodes they are on:\n\
    the source's egress and the destination's ingress policy, also where the first alone would deny it. What host endpoints rule for\n\
    what nodes forward is left out (`weir trace` has it), as are routes, listeners and services.")]
struct PolicyMatrix {
    #[command(flatten)]
    config: ConfigFile,
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

#[derive(Args)]
struct Services {
    /// Only those of a namespace, or one service, or one port of it.
    #[arg(value_name = "NAMESPACE[/NAME[:PORT]]")]
    of: Option<String>,
    #[command(flatten)]
    config: ConfigFile,
    /// How services are printed; JSON is a list.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Subcommand)]
enum Ipam {
    /// Show the ranges, and each address that a pod has or had.
    Show(Ask),
    /// List what keeps an address from being given, or lets it be given twice; exit status 1 if there is anything.
    Check(Ask),
}

#[derive(Args)]
struct Detach {
    #[command(flatten)]
    config: ConfigFile,
}

fn device_and_file(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((device, file)) if !device.is_empty() && !file.is_empty() => Ok((device.into(), file.into())),
        _ => Err("expected DEVICE=FILE, like eth0=in.pcap".into()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let parsed = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    parsed.ok_or_else(|| "expected seconds, like 2.5".into())
}

fn seconds_and_file(text: &str) -> Result<(Duration, PathBuf), String> {
    let parsed = text.split_once('=').and_then(|(at, file)| Some((seconds(at).ok()?, file)));
    let parsed = parsed.filter(|(_, file)| !file.is_empty());
    parsed.map(|(at, file)| (at, file.into())).ok_or_else(|| "expected SECONDS=FILE, like 2.5=other.yaml".into())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let failed = |message: &dyn std::fmt::Display| {
        eprintln!("weir: {message}");
        ExitCode::FAILURE
    };
    match cli.command {
        Command::Check(args) => check::run(
            &args.config.config,
            if args.output == Output::Json { check::Output::Json } else { check::Output::Text },
        ),
        Command::Trace(args) => match run_trace(&args) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(message) => failed(&message),
        },
        Command::Replay(args) => {
            let settings = replay::Settings {
                config: args.config.config,
                inputs: args.inputs,
                out: args.out,
                seed: args.seed,
                reloads: args.config_at,
            };
            match replay::run(&settings) {
                Ok(outcome) => {
                    for faults in &outcome.faults {
                        let shown = faults.render(io::stderr().is_terminal());
                        eprintln!("weir: objects are faulty, and their last good versions stay:\n{shown}");
                    }
                    eprintln!("{}; see {}", weir::report::counters_text(&outcome.totals), settings.out.display());
                    ExitCode::SUCCESS
                }
                Err(replay::ReplayError::Config(problems)) => failed(&rendered(&problems)),
                Err(error) => failed(&error),
            }
        }
        Command::Run(args) => match weir::run::run(&args.config.config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(weir::run::RunError::Config(problems)) => failed(&rendered(&problems)),
            Err(error) => failed(&error),
        },
        Command::Demo(args) => weir::demo::run(args.memory),
        Command::Bench(args) => {
            let settings = weir_benches::command::Settings {
                cases: args.case,
                flows: args.flows,
                workers: args.workers,
                time: args.seconds,
            };
            match weir_benches::command::run(&settings, args.json || args.output == Output::Json) {
                Ok(()) => ExitCode::SUCCESS,
                Err(message) => failed(&message),
            }
        }
        Command::Status(args) => match weir::control::status(&args.config.config) {
            Ok(status) => {
                let text = weir::control::status_text(&status);
                print!("{}", if args.output == Output::Json { format!("{status:#}\n") } else { text });
                ExitCode::SUCCESS
            }
            Err(error) => failed(&error),
        },
        Command::Conntrack(args) => match run_conntrack(&args, &mut io::BufWriter::new(io::stdout().lock())) {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => failed(&message),
        },
        Command::Policy(Policy::Matrix(args)) => {
            match run_matrix(&args, &mut io::BufWriter::new(io::stdout().lock())) {
                Ok(()) => ExitCode::SUCCESS,
                Err(message) => failed(&message),
            }
        }
        Command::Policy(Policy::List(args)) => match run_list(&args, &mut io::BufWriter::new(io::stdout().lock())) {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => failed(&message),
        },
        Command::Services(args) => match run_services(args, &mut io::BufWriter::new(io::stdout().lock())) {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => failed(&message),
        },
        Command::Ipam(command) => match run_ipam(&command, &mut io::BufWriter::new(io::stdout().lock())) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(message) => failed(&message),
        },
        Command::Detach(args) => match weir::run::detach(&args.config.config) {
            Ok(lines) => {
                lines.iter().for_each(|line| println!("{line}"));
                ExitCode::SUCCESS
            }
            Err(weir::run::RunError::Config(problems)) => failed(&rendered(&problems)),
            Err(error) => failed(&error),
        },
    }
}

fn rendered(problems: &Problems) -> String {
    format!("the configuration has errors\n{}", problems.render(io::stderr().is_terminal()))
}

fn run_trace(args: &Trace) -> Result<bool, String> {
    let loaded = translate::load(&args.config.config).map_err(|problems| rendered(&problems))?;
    let mut tracer = trace::Tracer::new(&loaded).map_err(|e| e.to_string())?;
    let input: Box<dyn Read> = if args.flows.as_os_str() == "-" {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(&args.flows).map_err(|e| format!("{}: {e}", args.flows.display()))?)
    };
    let output = io::BufWriter::new(io::stdout().lock());
    tracer.run(BufReader::new(input), output, args.text).map_err(|e| e.to_string())
}

fn run_matrix(args: &PolicyMatrix, out: &mut impl io::Write) -> Result<(), String> {
    let loaded = translate::load(&args.config.config).map_err(|problems| rendered(&problems))?;
    let both = |pods: &[Pods]| pods.iter().chain(&args.namespace).cloned().collect();
    let question = Question { ports: args.ports.clone(), from: both(&args.from), to: both(&args.to) };
    let matrix = Matrix::new(&loaded, &question).map_err(|e| e.to_string())?;
    let groups = Groups::readable(&matrix, args.every_pod);
    if let Some(file) = &args.svg {
        fs::write(file, svg::picture(&matrix, &groups)).map_err(|e| format!("{}: {e}", file.display()))?;
    }
    let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    written(
        match args.output {
            Output::Json => matrix.write_json(out),
            Output::Text => out.write_all(grid::text(&matrix, &groups, colour).as_bytes()),
        }
        .and_then(|()| out.flush()),
    )
}

fn run_list(args: &PolicyList, out: &mut impl io::Write) -> Result<(), String> {
    let loaded = translate::load(&args.config.config).map_err(|problems| rendered(&problems))?;
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
        Err(error) => return Err(error.to_string()),
    };
    let listed = Lister::new(&loaded, hits.as_ref()).endpoint(endpoint).map_err(|e| e.to_string())?;
    let text = if json { as_json(&listed)? } else { page::text(&listed) };
    written(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

fn as_json(value: &impl serde::Serialize) -> Result<String, String> {
    serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(|e| e.to_string())
}

/// Who reads no more, as `head`, has what they wanted.
fn written(result: io::Result<()>) -> Result<(), String> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.to_string()),
        _ => Ok(()),
    }
}

fn run_services(args: Services, out: &mut impl io::Write) -> Result<(), String> {
    let query = weir::services::Query { of: args.of };
    let mut services = Vec::new();
    weir::services::ask(&args.config.config, &query, |service| {
        services.push(service.clone());
        Ok(())
    })
    .map_err(|error| error.to_string())?;
    if let (Some(of), true) = (&query.of, services.is_empty()) {
        return Err(format!(
            "no service that is served is {of}; expected NAMESPACE, NAMESPACE/NAME or NAMESPACE/NAME:PORT"
        ));
    }
    let printed = match args.output {
        Output::Json => writeln!(out, "{:#}", serde_json::Value::from(services)),
        Output::Text => services.iter().try_for_each(|service| write!(out, "{}", weir::services::text(service))),
    };
    written(printed.and_then(|()| out.flush()))
}

/// Whether there is nothing to complain of.
fn run_ipam(command: &Ipam, out: &mut impl io::Write) -> Result<bool, String> {
    let (Ipam::Show(args) | Ipam::Check(args)) = command;
    let report = ipam::report(&args.config.config).map_err(|error| error.to_string())?;
    let text = match (command, args.output) {
        (_, Output::Json) => as_json(&report)?,
        (Ipam::Show(_), Output::Text) => report.text(ipam::now_ms()),
        (Ipam::Check(_), Output::Text) => report.leaks_text(),
    };
    written(out.write_all(text.as_bytes()).and_then(|()| out.flush()))?;
    Ok(matches!(command, Ipam::Show(_)) || report.leaks.is_empty())
}

fn run_conntrack(args: &Conntrack, out: &mut impl io::Write) -> Result<(), String> {
    let action = args.action;
    if action == Action::Delete && args.filter.is_empty() != args.all {
        return Err("delete needs either filters, or --all to remove every connection".into());
    }
    let query = Query { action, filter: args.filter.clone() };
    let json = args.output == Output::Json;
    let mut shown = 0_u64;
    let result = weir::conntrack::ask(&args.config.config, &query, |value| {
        shown += 1;
        match action {
            Action::List if json => write!(out, "{}{value}", if shown == 1 { "[\n" } else { ",\n" }),
            Action::List => writeln!(out, "{}", weir::conntrack::text_line(value)),
            Action::Count if !json => writeln!(out, "{}", value["count"]),
            Action::Delete if !json => writeln!(out, "{} deleted", value["deleted"]),
            Action::Count | Action::Delete => writeln!(out, "{value}"),
            // Whoever waits for events waits for the line.
            Action::Watch if value["watching"] == true => Ok(()),
            Action::Watch if json => writeln!(out, "{value}").and_then(|()| out.flush()),
            Action::Watch => writeln!(out, "{}", weir::conntrack::text_line(value)).and_then(|()| out.flush()),
        }
    });
    let end = match (action, json, shown) {
        (Action::List, true, 0) => "[]\n",
        (Action::List, true, _) => "\n]\n",
        _ => "",
    };
    let written = result.map_err(|error| match error {
        AskError::Broken(source) if source.kind() == io::ErrorKind::BrokenPipe => None,
        error => Some(error.to_string()),
    });
    match written.and_then(|()| write!(out, "{end}").and_then(|()| out.flush()).map_err(|e| Some(e.to_string()))) {
        // Who reads no more, as `head`, has what they wanted.
        Ok(()) | Err(None) => Ok(()),
        Err(Some(message)) => Err(message),
    }
}
