//! `weir ipam`: which addresses this node's pods have, had, and leak.

use std::{
    io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use weir_node::ipam::explain::{self, Report};

use crate::{
    config::{Problems, RouterConfig},
    control::{self, AskError},
};

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
