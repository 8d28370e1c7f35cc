//! Plain facts that forwarding is compiled from: the cluster's nodes, pods and pools as the manifests give them, and the
//! devices, routes and neighbours as the kernel (or, for replay, the configuration) gives them.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::{IpNet, Ipv4Net};
use weir_packet::{DropReason, Mac, Protocol};

use crate::frame::IfIndex;

/// What the manifests and weir.yaml say about the cluster, as far as forwarding needs it.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// This node's name.
    pub node_name: String,
    /// All nodes, this one included.
    pub nodes: Vec<Node>,
    /// All pods and other workloads that have addresses and are not on the host's network.
    pub workloads: Vec<Workload>,
    /// Address pools.
    pub pools: Vec<Pool>,
    /// `podCIDRs` of weir.yaml; by default the pools', else the nodes' pod ranges.
    pub pod_cidrs: Vec<IpNet>,
    /// `serviceCIDRs` of weir.yaml, and the ServiceCIDRs.
    pub service_cidrs: Vec<IpNet>,
    /// `localAddresses` of weir.yaml, if given.
    pub local_addresses: Option<Vec<IpAddr>>,
    /// This node's host endpoints.
    pub host_endpoints: Vec<HostEndpoint>,
    /// What the node's agent is told about the node itself.
    pub host_settings: HostSettings,
    /// First and last source port that weir gives to translated connections (`snat.portRange`).
    pub snat_ports: (u16, u16),
}

/// A node of the cluster.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Node.status.addresses of type InternalIP, in their order.
    pub internal_ips: Vec<IpAddr>,
    /// Other node addresses (ExternalIP).
    pub other_ips: Vec<IpAddr>,
    /// Annotation projectcalico.org/IPv4Address, with the node's subnet as prefix.
    pub ipv4_address: Option<Ipv4Net>,
    /// Annotation projectcalico.org/IPv4IPIPTunnelAddr.
    pub tunnel_address: Option<Ipv4Addr>,
    /// Node.spec.podCIDRs.
    pub pod_cidrs: Vec<IpNet>,
    /// What Calico's IPAM has given the node: its blocks, and single addresses of others'.
    pub blocks: Vec<IpNet>,
}

impl Node {
    /// All ranges of its pods.
    pub fn ranges(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.blocks.iter().chain(&self.pod_cidrs).copied()
    }
}

/// A pod, or another workload with a device of its own.
#[derive(Clone, Debug)]
pub struct Workload {
    /// "namespace/name".
    pub name: String,
    /// The node that it runs on.
    pub node: Option<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Name of the host's end of its veth pair.
    pub device: String,
    /// Its own MAC address, where its WorkloadEndpoint tells.
    pub mac: Option<Mac>,
}

/// A host endpoint of this node (Calico's HostEndpoint).
#[derive(Clone, Debug)]
pub struct HostEndpoint {
    /// Its name, by which its policy is found.
    pub name: String,
    /// Its device, or "*" for all; `None`: the device that has one of its addresses.
    pub interface: Option<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// Settings of the node (Calico's FelixConfiguration).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostSettings {
    /// Ports of the node that host endpoints' policy never closes.
    pub failsafe_inbound: Vec<Failsafe>,
    /// Ports of others that host endpoints' policy never closes to the node.
    pub failsafe_outbound: Vec<Failsafe>,
    /// What becomes of what a pod sends to the node itself, once its own policy allows it.
    pub endpoint_to_host: EndpointToHost,
}

impl Default for HostSettings {
    /// Calico's, as its manifests install it.
    fn default() -> Self {
        let ports = |tcp: &[u16], udp: &[u16]| {
            let one = |protocol: Protocol, port: u16| Failsafe { protocol, port, net: None };
            let tcp = tcp.iter().map(|port| one(Protocol::TCP, *port));
            tcp.chain(udp.iter().map(|port| one(Protocol::UDP, *port))).collect()
        };
        Self {
            failsafe_inbound: ports(&[22, 179, 2379, 2380, 5473, 6443, 6666, 6667], &[68]),
            failsafe_outbound: ports(&[179, 2379, 2380, 5473, 6443, 6666, 6667], &[53, 67]),
            endpoint_to_host: EndpointToHost::Accept,
        }
    }
}

/// A failsafe port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Failsafe {
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// The destination port.
    pub port: u16,
    /// Only for peers in this network.
    pub net: Option<IpNet>,
}

/// DefaultEndpointToHostAction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EndpointToHost {
    /// It goes to the node's kernel, whose own rules may say more.
    #[default]
    Accept,
    /// It is dropped.
    Drop,
}

/// When packets to other nodes go into a tunnel (Calico's ipipMode).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TunnelMode {
    /// Direct routes only.
    #[default]
    Never,
    /// To every other node.
    Always,
    /// To nodes of another subnet.
    CrossSubnet,
}

/// An address pool (Calico's IPPool).
#[derive(Clone, Debug)]
pub struct Pool {
    /// Its addresses.
    pub cidr: IpNet,
    /// IPIP towards addresses of this pool on other nodes.
    pub ipip: TunnelMode,
    /// Whether packets from this pool to an address in no pool are masqueraded.
    pub nat_outgoing: bool,
}

/// What a device is to weir.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// A NIC of the node.
    Uplink,
    /// The host's end of a pod's veth pair.
    Workload,
    /// The node's own kernel.
    Host,
    /// Another device of the node, which only its kernel serves: a VPN's, a bridge. Its index is that of what comes by it
    /// ([`IfIndex::forwarded`]).
    Kernel,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// The kernel's index; in replay a made-up one that is unique.
    pub index: IfIndex,
    /// Its role.
    pub role: Role,
    /// Its own MAC address.
    pub mac: Mac,
    /// Bytes of the largest IP packet that it carries.
    pub mtu: u32,
    /// Its addresses; their prefixes are connected routes.
    pub addresses: Vec<IpNet>,
}

/// A route of the kernel or of weir.yaml.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination prefix.
    pub to: IpNet,
    /// Next hop; `None`: the destination is on the link itself.
    pub via: Option<IpAddr>,
    /// The device it leaves by.
    pub device: IfIndex,
    /// Lower is preferred among routes to one prefix.
    pub metric: u32,
}

/// One of the next hops of a route that has several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// As [`Route::via`].
    pub via: Option<IpAddr>,
    /// As [`Route::device`].
    pub device: IfIndex,
    /// Its share of the flows, as a part of all weights.
    pub weight: u16,
}

/// A route with several next hops: each flow takes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Multipath {
    /// As [`Route::to`].
    pub to: IpNet,
    /// Two at least.
    pub hops: Vec<NextHop>,
    /// As [`Route::metric`].
    pub metric: u32,
}

/// What a route does that leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Drops what takes it.
    Blackhole,
    /// Tells the sender that the host is unreachable.
    Unreachable,
    /// Tells the sender that a filter is in the way.
    Prohibit,
}

impl Refusal {
    /// Whether the sender hears nothing of it.
    pub fn is_silent(self) -> bool {
        self == Self::Blackhole
    }

    /// Why what takes such a route is dropped.
    pub fn reason(self) -> DropReason {
        match self {
            Self::Blackhole => DropReason::RouteBlackhole,
            Self::Unreachable => DropReason::RouteUnreachable,
            Self::Prohibit => DropReason::RouteProhibited,
        }
    }
}

/// A route that leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// As [`Route::to`].
    pub to: IpNet,
    /// What it does.
    pub refusal: Refusal,
    /// As [`Route::metric`].
    pub metric: u32,
}

/// A neighbour: the MAC address of an IP address on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbor {
    /// Its IP address.
    pub address: IpAddr,
    /// Its MAC address.
    pub mac: Mac,
    /// The device that it is on.
    pub device: IfIndex,
}

/// Devices, routes and neighbours of this node at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Links {
    /// Devices with a role.
    pub devices: Vec<Device>,
    /// Routes over uplinks and over devices that only the node's kernel serves, connected ones included where the kernel lists them.
    pub routes: Vec<Route>,
    /// Those of several next hops.
    pub multipaths: Vec<Multipath>,
    /// Those that lead nowhere.
    pub refused: Vec<Refused>,
    /// Usable neighbours.
    pub neighbors: Vec<Neighbor>,
    /// Sources, at most one of each family, for what the node's kernel sends to a service whose backend is the node itself: addresses that
    /// it answers through weir. To an address of its own it would answer over its loopback device. Where there is none (replay),
    /// the node's own address is taken.
    pub loopback_sources: Vec<IpAddr>,
    /// TCP ports that sockets of the node listen on, where host endpoints' policy asks for them.
    pub listening: BTreeSet<u16>,
    /// Whether these devices are all that there are: a pod of this node whose device is not among them is not there.
    pub complete: bool,
}
