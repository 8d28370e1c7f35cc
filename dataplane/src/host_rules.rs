//! Host endpoints' compiled policy, as a snapshot keeps it; [`crate::host_policy`] asks it.

use std::hash::{DefaultHasher, Hash, Hasher};

use weir_packet::DropReason;
use weir_policy::{Classifier, HostEndpointId, model::HostStage};

use crate::{
    host_endpoints::HostEndpointNumber,
    model::{Cluster, EndpointToHost, HostSettings},
};

/// Host endpoints' compiled policy, and the node's settings.
#[derive(Debug)]
pub struct HostRules {
    /// By number in the cluster.
    pub(crate) endpoints: Vec<Option<HostEndpointId>>,
    pub(crate) settings: HostSettings,
    /// Whether any host endpoint has untracked policy, so that each packet must be asked about.
    has_untracked: bool,
    /// Stands for the settings: 0 for those that deny nothing to nobody.
    pub(crate) stamp: u32,
}

impl HostRules {
    pub(crate) fn new(policy: &Classifier, cluster: &Cluster) -> Self {
        let endpoints: Vec<_> =
            cluster.host_endpoints.iter().map(|endpoint| policy.host_endpoint(&endpoint.name)).collect();
        let settings = cluster.host_settings.clone();
        let says_nothing = endpoints.is_empty() && settings.endpoint_to_host == EndpointToHost::Accept;
        // Not the tables' hash, to which lists are as good as joined and variants as good as equal. This one is the same in every process.
        let mut hasher = DefaultHasher::new();
        settings.hash(&mut hasher);
        let stamp = if says_nothing { 0 } else { hasher.finish() as u32 | 1 };
        let has_untracked =
            endpoints.iter().flatten().any(|endpoint| policy.has_stage(*endpoint, HostStage::Untracked));
        Self { endpoints, settings, has_untracked, stamp }
    }

    /// Whether any host endpoint has untracked policy.
    #[inline]
    pub fn has_untracked(&self) -> bool {
        self.has_untracked
    }

    /// The compiled policy of one.
    ///
    /// # Errors
    /// Where none is compiled yet.
    pub(crate) fn policy(&self, number: HostEndpointNumber) -> Result<HostEndpointId, DropReason> {
        self.endpoints.get(number.0 as usize).copied().flatten().ok_or(DropReason::PolicyNotReady)
    }
}
