//! What one burst is judged by: services, policy and forwarding of one moment.
//!
//! Services and policy are compiled from the manifests ([`Rules`]), forwarding also from the kernel's devices, routes and
//! neighbours. A change of neighbours publishes a new snapshot that shares the same `Rules`: nothing is compiled twice.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use weir_nat::{BackendIdentity, BackendSlot, ServiceTable, SnatPorts};
use weir_packet::Address;
use weir_policy::{Classifier, EndpointId};
use weir_sync::{Tally, WorkerNumber};

use crate::{
    forwarding::{Forwarding, WorkloadId, local_workloads},
    host_rules::HostRules,
    model::Cluster,
};

/// The compiled services and policies.
#[derive(Debug)]
pub struct Rules {
    /// Services.
    pub services: Arc<ServiceTable>,
    /// Policies.
    pub policy: Classifier,
    /// New connections by the policy rule that decided about them ([`weir_policy::RuleId`]).
    pub hits: Tally,
    /// New connections by the backend that they came to, IPv4 and IPv6.
    backend_hits: [Tally; 2],
    /// Host endpoints.
    pub host: HostRules,
    endpoints: Vec<Option<EndpointId>>,
}

impl Rules {
    /// Joins compiled services and policy with the workloads of `cluster`. Nothing is counted: see [`Self::counting`].
    pub fn new(services: impl Into<Arc<ServiceTable>>, policy: Classifier, cluster: &Cluster) -> Self {
        let mut endpoints = vec![None; cluster.workloads.len()];
        for (id, workload) in local_workloads(cluster) {
            endpoints[id.0 as usize] = policy.endpoint(&workload.name);
        }
        let host = HostRules::new(&policy, cluster);
        let services = services.into();
        Self { services, policy, hits: Tally::default(), backend_hits: Default::default(), host, endpoints }
    }

    /// The same, with counters for so many workers.
    pub fn counting(mut self, workers: usize) -> Self {
        self.hits = Tally::new(workers, self.policy.rule_count());
        let slots = [self.services.services::<Ipv4Addr>().slots(), self.services.services::<Ipv6Addr>().slots()];
        self.backend_hits = slots.map(|slots| Tally::new(workers, slots));
        self
    }

    /// Counts a new connection for the backend that it comes to.
    #[inline]
    pub fn count_backend<A: Address>(&self, worker: WorkerNumber, slot: BackendSlot) {
        self.backend_hits[usize::from(A::BITS == 128)].add(worker, slot.0 as usize);
    }

    /// Reads that count, so that it is near when it is counted in.
    #[inline]
    pub(crate) fn foresee_backend<A: Address>(&self, worker: WorkerNumber, slot: BackendSlot) {
        self.backend_hits[usize::from(A::BITS == 128)].foresee(worker, slot.0 as usize);
    }

    /// New connections of each backend that had any.
    pub fn backend_hits(&self) -> impl Iterator<Item = (BackendIdentity, u64)> + '_ {
        let [v4, v6] = &self.backend_hits;
        let v4 = self.services.services::<Ipv4Addr>().backends().map(move |(slot, one)| (one, v4.sum(slot.0 as usize)));
        let v6 = self.services.services::<Ipv6Addr>().backends().map(move |(slot, one)| (one, v6.sum(slot.0 as usize)));
        v4.chain(v6).filter(|(_, hits)| *hits > 0)
    }

    /// The policy endpoint of a workload of this node; `None`: none is compiled yet, and the workload is closed.
    #[inline]
    pub fn endpoint(&self, workload: WorkloadId) -> Option<EndpointId> {
        self.endpoints.get(workload.0 as usize).copied().flatten()
    }
}

/// Services, policy and forwarding of one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// Counts publications; connections remember the one that judged them last. Never 0.
    pub generation: u32,
    /// Services and policy.
    pub rules: Arc<Rules>,
    /// Source ports for translated connections.
    pub snat: Arc<SnatPorts>,
    /// Forwarding; compiled from the same cluster as `rules`.
    pub forwarding: Arc<Forwarding>,
}
