//! `weir ipam`: which addresses this node's pods have, had, and leak.

use std::{
    io::{self, BufWriter, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use weir_cluster::{config::RouterConfig, text::Problems};
use weir_node::{
    control::{self, AskError},
    ipam::explain::{self, Report},
};

use crate::{
    common::{Failed, Output, as_json, written},
    status,
};

/// What is asked about addresses.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Show the ranges, and each address that a pod has or had.
    Show(status::Args),
    /// List what keeps an address from being given, or lets it be given twice; exit status 1 if there is anything.
    Check(status::Args),
}

/// Asks, and prints; exit status 1 where `check` finds anything.
///
/// # Errors
/// Where neither a router nor its files can be asked.
pub fn run(command: &Command) -> Result<ExitCode, Failed> {
    let out = &mut BufWriter::new(io::stdout().lock());
    let (Command::Show(args) | Command::Check(args)) = command;
    let report = report(&args.config.config)?;
    let text = match (command, args.output) {
        (_, Output::Json) => as_json(&report)?,
        (Command::Show(_), Output::Text) => report.text(now_ms()),
        (Command::Check(_), Output::Text) => report.leaks_text(),
    };
    written(out.write_all(text.as_bytes()).and_then(|()| out.flush()))?;
    let all_well = matches!(command, Command::Show(_)) || report.leaks.is_empty();
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum IpamError {
    /// weir.yaml is bad.
    #[error("{0}")]
    Config(String),
    /// Weir makes no pods on this node.
    #[error("{0} has no section cni: weir makes no pods on this node, and has given no addresses")]
    NoCni(PathBuf),
    /// A router that runs does not say it.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// Without a router, the folder says it.
    #[error("{path}: {source}", path = .path.display())]
    State {
        /// The folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// What there is to say, by the router that runs with `config`, else by the files that it left.
///
/// # Errors
/// Where neither can be asked.
pub fn report(config: &Path) -> Result<Report, IpamError> {
    let mut problems = Problems::default();
    let Some((read, _)) = RouterConfig::read(config, &mut problems).filter(|_| !problems.has_errors()) else {
        return Err(IpamError::Config(format!("the configuration has errors\n{}", problems.render(false))));
    };
    let cni = read.cni.ok_or_else(|| IpamError::NoCni(config.to_owned()))?;
    match control::ipam(config) {
        Err(AskError::NotRunning { .. }) => {
            explain::explain(&cni.state, now_ms()).map_err(|source| IpamError::State { path: cni.state, source })
        }
        answer => Ok(answer?),
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
