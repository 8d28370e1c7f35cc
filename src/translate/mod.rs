//! Resources to the plain models that the lower crates compile their tables from.
//!
//! One pass over each kind: it reads addresses, ports and selectors, refuses what the API server would refuse, and
//! fills the models. What is at fault is reported at its place and left out, so that one run shows everything.

mod cluster;
mod policy;
mod services;
#[cfg(test)]
mod tests;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use crate::{
    config::{Problems, RouterConfig, Severity},
    manifests::{Manifests, Origin},
};

pub use cluster::workload_device;

/// A configuration that was read and translated without an error.
#[derive(Debug)]
pub struct Loaded {
    /// weir.yaml.
    pub config: RouterConfig,
    /// What forwarding is compiled from.
    pub cluster: weir_dataplane::model::Cluster,
    /// What service NAT is compiled from.
    pub services: weir_nat::Model,
    /// What policy is compiled from.
    pub policy: weir_policy::model::Model,
    /// Where objects come from; the models' `origin` is an index.
    pub objects: Vec<Origin>,
    /// How many objects of each kind were read.
    pub counts: std::collections::BTreeMap<&'static str, usize>,
    /// Warnings and notes.
    pub notes: Problems,
    /// The files and folders that were read, weir.yaml first: what to watch.
    pub files: Vec<PathBuf>,
}

impl Loaded {
    /// Adds addresses that the kernel says are this node's, unless weir.yaml gives them with `localAddresses`.
    pub fn add_local_addresses(&mut self, addresses: &[IpAddr]) {
        if self.config.local_addresses.is_none() {
            let known = &mut self.services.local_addresses;
            for address in addresses {
                if !known.contains(address) {
                    known.push(*address);
                }
            }
        }
    }
}

/// Reads weir.yaml and its manifests and translates them.
///
/// # Errors
/// All problems, warnings and notes included, where at least one is an error.
pub fn load(path: &Path) -> Result<Loaded, Problems> {
    let mut problems = Problems::default();
    let Some((config, spans)) = RouterConfig::read(path, &mut problems) else {
        problems.sort();
        return Err(problems);
    };
    let manifests = Manifests::read(&config.manifests, &spans, path, &mut problems);
    translate(config, path, manifests, problems)
}

fn translate(
    config: RouterConfig,
    path: &Path,
    mut manifests: Manifests,
    mut problems: Problems,
) -> Result<Loaded, Problems> {
    let cluster = cluster::translate(&config, &manifests, &mut problems);
    let services = services::translate(&config, &manifests, &cluster, &mut problems);
    let policy = policy::translate(&config, &manifests, &cluster, &mut problems);
    problems.sort();
    if problems.has_errors() {
        return Err(problems);
    }
    debug_assert!(problems.of(Severity::Error).next().is_none());
    let mut files = vec![path.to_owned()];
    files.append(&mut manifests.files);
    let counts = manifests.counts();
    Ok(Loaded { config, cluster, services, policy, objects: manifests.origins, counts, notes: problems, files })
}
