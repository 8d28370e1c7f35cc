//! What the services are compiled from: plain types that a loader fills.

use std::{
    net::IpAddr,
    ops::{Deref, DerefMut},
    slice,
    sync::Arc,
};

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
    /// Backends that slices have for no service port that is served here, sorted, each as often as it is listed: connections that services
    /// led there may go on.
    pub unserved: Vec<(Protocol, IpAddr, u16)>,
    /// The service ports. Where two claim one frontend, the kind of address decides, then the order here.
    pub services: ServicePorts,
}

/// Service ports: each is shared, so that what did not change is handed over as it is, and so are all of them, as models that follow each
/// other have the most of them in common. Who changes a list that others have gets one of his own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePorts(Arc<Vec<Arc<ServicePort>>>);

impl ServicePorts {
    /// Whether both are one list.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Deref for ServicePorts {
    type Target = Vec<Arc<ServicePort>>;

    fn deref(&self) -> &Vec<Arc<ServicePort>> {
        &self.0
    }
}

impl DerefMut for ServicePorts {
    fn deref_mut(&mut self) -> &mut Vec<Arc<ServicePort>> {
        Arc::make_mut(&mut self.0)
    }
}

impl From<Vec<Arc<ServicePort>>> for ServicePorts {
    fn from(ports: Vec<Arc<ServicePort>>) -> Self {
        Self(Arc::new(ports))
    }
}

impl FromIterator<Arc<ServicePort>> for ServicePorts {
    fn from_iter<I: IntoIterator<Item = Arc<ServicePort>>>(ports: I) -> Self {
        Vec::from_iter(ports).into()
    }
}

impl<'p> IntoIterator for &'p ServicePorts {
    type Item = &'p Arc<ServicePort>;
    type IntoIter = slice::Iter<'p, Arc<ServicePort>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl Model {
    /// Whether all but the backends and services of both is the same.
    pub fn is_of_same_node(&self, other: &Self) -> bool {
        let Self {
            node_name,
            zone,
            pod_cidrs,
            masquerade_all,
            node_port_addresses,
            local_addresses,
            service_cidrs,
            unserved: _,
            services: _,
        } = self;
        (node_name, zone, masquerade_all) == (&other.node_name, &other.zone, &other.masquerade_all)
            && (pod_cidrs, node_port_addresses) == (&other.pod_cidrs, &other.node_port_addresses)
            && (local_addresses, service_cidrs) == (&other.local_addresses, &other.service_cidrs)
    }

    /// Whether an address is this node's: one of [`Model::local_addresses`], or a loopback one. Only there are host ports open.
    pub fn is_own(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.local_addresses.contains(&address)
    }
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
    /// Not a service's port but the `hostPort` of a pod's container: `port` is open on these addresses of this node, for everybody, and
    /// the one endpoint of each family is the pod. It has no other frontends.
    pub host_port: Option<HostAddresses>,
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

impl ServicePort {
    /// Whether it is another in nothing but its endpoints.
    pub(crate) fn differs_in_endpoints_only(&self, other: &Self) -> bool {
        let Self {
            name,
            protocol,
            port,
            cluster_ips,
            host_port,
            node_port,
            external_ips,
            load_balancer_ips,
            source_ranges,
            internal_policy,
            external_policy,
            affinity,
            health_check_node_port,
            endpoints: _,
            origin,
        } = self;
        // What it is called comes last: it is the longest.
        (
            protocol,
            port,
            host_port,
            node_port,
            internal_policy,
            external_policy,
            affinity,
            health_check_node_port,
            origin,
        ) == (
            &other.protocol,
            &other.port,
            &other.host_port,
            &other.node_port,
            &other.internal_policy,
            &other.external_policy,
            &other.affinity,
            &other.health_check_node_port,
            &other.origin,
        ) && (cluster_ips, external_ips, load_balancer_ips)
            == (&other.cluster_ips, &other.external_ips, &other.load_balancer_ips)
            && (source_ranges, name) == (&other.source_ranges, &other.name)
    }

    /// Whether it has frontends of the family of IPv6, or of IPv4.
    pub(crate) fn serves(&self, is_ipv6: bool) -> bool {
        match self.host_port {
            None => self.cluster_ips.iter().any(|address| address.is_ipv6() == is_ipv6),
            Some(on) => {
                on.has_family(is_ipv6) && self.endpoints.iter().any(|endpoint| endpoint.address.is_ipv6() == is_ipv6)
            }
        }
    }
}

/// Where a host port is open. On a loopback address only if it is that one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostAddresses {
    /// On all addresses of this node.
    All,
    /// On all IPv4 addresses of this node.
    Ipv4,
    /// On all IPv6 addresses of this node.
    Ipv6,
    /// On this one, as long as it is this node's ([`Model::is_own`]).
    One(IpAddr),
}

impl HostAddresses {
    /// What `hostIP` means: an unspecified address stands for its whole family.
    pub fn of_host_ip(host_ip: Option<IpAddr>) -> Self {
        match host_ip {
            None => Self::All,
            Some(address) if !address.is_unspecified() => Self::One(address),
            Some(IpAddr::V4(_)) => Self::Ipv4,
            Some(IpAddr::V6(_)) => Self::Ipv6,
        }
    }

    /// Whether it is open on an address of this node.
    pub fn includes(self, address: IpAddr) -> bool {
        match self {
            Self::One(one) => one == address,
            _ => self.has_family(address.is_ipv6()) && !address.is_loopback(),
        }
    }

    /// Whether a socket that is bound to that address, or to all of a family, may get what comes to it.
    pub fn includes_socket_at(self, bound: IpAddr) -> bool {
        match (self, bound) {
            // One that is bound to :: may get IPv4 as well.
            (Self::One(IpAddr::V4(_)), IpAddr::V6(address)) => address.is_unspecified(),
            (_, IpAddr::V6(address)) if address.is_unspecified() => true,
            (Self::One(one), address) if address.is_unspecified() => one.is_ipv6() == address.is_ipv6(),
            (_, address) if address.is_unspecified() => self.has_family(address.is_ipv6()),
            (_, address) => self.includes(address),
        }
    }

    /// Whether some address of this node may be of both.
    pub fn overlaps(self, other: Self) -> bool {
        match (self, other) {
            (Self::One(address), on) | (on, Self::One(address)) => on.includes(address),
            _ => [false, true].into_iter().any(|is_ipv6| self.has_family(is_ipv6) && other.has_family(is_ipv6)),
        }
    }

    fn has_family(self, is_ipv6: bool) -> bool {
        match self {
            Self::All => true,
            Self::Ipv4 => !is_ipv6,
            Self::Ipv6 => is_ipv6,
            Self::One(address) => address.is_ipv6() == is_ipv6,
        }
    }
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
    /// Condition `ready`; unset means true.
    pub ready: bool,
    /// Condition `serving`; unset means true.
    pub serving: bool,
    /// Condition `terminating`; unset means false.
    pub terminating: bool,
    /// Where it is, and whom it is meant for; many endpoints share it.
    pub topology: Option<Arc<Topology>>,
}

impl Endpoint {
    /// Whether new connections may come to it: where none is ready, those that terminate and still serve do.
    pub fn is_usable(&self) -> bool {
        self.ready || self.serving && self.terminating
    }

    /// The node that it is on; without one it is never local.
    pub fn node_name(&self) -> Option<&str> {
        self.topology.as_ref()?.node_name.as_deref()
    }

    /// The zones that it is meant for.
    pub fn zone_hints(&self) -> &[Arc<str>] {
        self.topology.as_ref().map_or(&[], |topology| &topology.zone_hints)
    }

    /// The nodes that it is meant for.
    pub fn node_hints(&self) -> &[Arc<str>] {
        self.topology.as_ref().map_or(&[], |topology| &topology.node_hints)
    }
}

/// Where an endpoint is, and whom it is meant for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Topology {
    /// `nodeName`.
    pub node_name: Option<Arc<str>>,
    /// `hints.forZones`; those of most endpoints are empty, which means anybody.
    pub zone_hints: Vec<Arc<str>>,
    /// `hints.forNodes`.
    pub node_hints: Vec<Arc<str>>,
}

impl Topology {
    /// On a node, meant for anybody.
    pub fn on(node_name: impl Into<Arc<str>>) -> Self {
        Self { node_name: Some(node_name.into()), ..Self::default() }
    }
}

const _: () = assert!(size_of::<Endpoint>() <= 32, "a cluster has hundreds of thousands");
