//! The `weir` command.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use weir::{bench, check, conntrack, demo, detach, diff, ipam, policy, replay, run, services, status, trace, verify};

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
    Check(check::Args),
    Trace(trace::Args),
    Replay(replay::Args),
    Run(run::Args),
    Demo(demo::Args),
    Bench(bench::Args),
    Status(status::Args),
    Verify(verify::Args),
    Conntrack(conntrack::Args),
    /// Explain policy: who can reach whom, and what applies to a pod.
    #[command(subcommand)]
    Policy(policy::Command),
    Services(services::Args),
    Diff(diff::Args),
    /// Explain the addresses of the pods that weir makes on this node, with or without a running router.
    #[command(subcommand)]
    Ipam(ipam::Command),
    Detach(detach::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Check(args) => Ok(check::run(&args)),
        Command::Trace(args) => trace::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Demo(args) => Ok(demo::run(&args)),
        Command::Bench(args) => bench::run(args),
        Command::Status(args) => status::run(&args),
        Command::Verify(args) => Ok(verify::run(&args)),
        Command::Conntrack(args) => conntrack::run(&args),
        Command::Policy(command) => policy::run(&command),
        Command::Services(args) => services::run(args),
        Command::Diff(args) => Ok(diff::run(&args)),
        Command::Ipam(command) => ipam::run(&command),
        Command::Detach(args) => detach::run(&args),
    };
    outcome.unwrap_or_else(|failed| {
        eprintln!("weir: {}", failed.message());
        ExitCode::FAILURE
    })
}
