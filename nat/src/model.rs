//! What the services are compiled from: plain types that a loader fills.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use weir_packet::Protocol;

/// All that service NAT depends on, of both families.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// This node's name, compared with [`Endpoint::node_name`] and [`Endpoint::node_hints`].
    pub node_name: String,
    /// This node's `topology.kubernetes.io/zone`; without one zone hints are ignored.
    pub zone: Option<String>,
    /// Sources taken as pods. A family without an entry is unknown: its pods cannot be told from other sources.
    pub pod_cidrs: Vec<IpNet>,
    /// Masquerade every connection to a cluster IP.
    pub masquerade_all: bool,
    /// Where node ports are open; a family without an entry is open on all local addresses.
    pub node_port_addresses: Vec<IpNet>,
    /// The addresses of this node. The first of each family is "the node's IP" of `loadBalancerSourceRanges`.
    pub local_addresses: Vec<IpAddr>,
    /// The ranges that cluster IPs are allocated from; packets to unallocated addresses in them are dropped.
    pub service_cidrs: Vec<IpNet>,
    /// Backends that slices have for no service port that is served here, sorted: connections that services led there may go on.
    pub unserved: Vec<(Protocol, IpAddr, u16)>,
    /// The service ports, shared so that what did not change is handed over as it is. Where two claim one frontend, the kind of
    /// address decides, then the order here.
    pub services: Vec<Arc<ServicePort>>,
}

/// One port of a service, with its backends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePort {
    /// "namespace/name:port name", or "namespace/name" where the port has no name.
    pub name: String,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// The port on cluster, external and load-balancer IPs; not zero.
    pub port: u16,
    /// The cluster IPs; a service exists in the families that it has a cluster IP of. Empty: not proxied.
    pub cluster_ips: Vec<IpAddr>,
    /// The port on this node's addresses; not zero.
    pub node_port: Option<u16>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// The ingress IPs of `status.loadBalancer` whose ipMode is VIP or unset.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`; a family without an entry is open to all.
    pub source_ranges: Vec<IpNet>,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// ClientIP affinity: its timeout in seconds.
    pub affinity: Option<u32>,
    /// `spec.healthCheckNodePort`, where load balancers ask the node's kernel: not served here, and SNAT must not use it.
    pub health_check_node_port: Option<u16>,
    /// The backends, of all slices; an address and port may be listed more than once.
    pub endpoints: Vec<Endpoint>,
    /// The loader's number of the object that this comes from, for messages; opaque here.
    pub origin: u32,
}

/// Which backends a kind of frontend may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TrafficPolicy {
    /// Those of the whole cluster.
    #[default]
    Cluster,
    /// Those on this node.
    Local,
}

/// One address of an EndpointSlice with the slice's port number; conditions have their defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The backend's address.
    pub address: IpAddr,
    /// The backend's port; not zero.
    pub port: u16,
    /// The node that it is on; without one it is never local.
    pub node_name: Option<String>,
    /// Condition `ready`; unset means true.
    pub ready: bool,
    /// Condition `serving`; unset means true.
    pub serving: bool,
    /// Condition `terminating`; unset means false.
    pub terminating: bool,
    /// `hints.forZones`.
    pub zone_hints: Vec<String>,
    /// `hints.forNodes`.
    pub node_hints: Vec<String>,
}
