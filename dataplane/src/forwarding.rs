//! Forwarding tables: where an address is, and how to get there.
//!
//! Compiled from [`Cluster`] and [`Links`] whenever one of them changes; immutable afterwards. The first packet of a connection
//! asks [`Forwarding::route`] once per direction and stores the answer, an [`AdjacencyId`], in the connection; later packets
//! only index the adjacency array. Ids are valid within one generation: a connection judged in another generation asks again.
//!
//! Who owns a destination (the design, "Life of a packet"): an address of this node itself; a pod by its addresses;
//! a node by its pod ranges; a kernel route.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use weir_packet::{
    Address, FlowKey, Mac,
    glance::{TunnelEnds, may_be_forwarded},
    rewrite::{IPIP_HEADER_BYTES, LinkHeaders},
};

use crate::{
    driver::PortId,
    frame::IfIndex,
    host_endpoints::{HostEndpointNumber, HostEndpoints},
    mix::{HashMap, HashSet, mixed},
    model::{self, Cluster, Links, Refusal, Role, TunnelMode},
    prefix::PrefixMap,
};

/// Index of a device in [`Forwarding`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct DeviceId(pub u32);

/// Index of an adjacency in [`Forwarding`]; 16 bits, so that a connection keeps both directions' and their generation in one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct AdjacencyId(pub u16);

/// Index of a workload in the [`Cluster`] that this was compiled from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct WorkloadId(pub u32);

/// Index of a node in the [`Cluster`] that this was compiled from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct NodeId(pub u32);

/// A device, as the pipeline needs it.
#[derive(Debug, Clone)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// The kernel's index.
    pub index: IfIndex,
    /// Its role.
    pub role: Role,
    /// Where it is reached.
    pub port: PortId,
    /// Its MAC address.
    pub mac: Mac,
    /// Bytes of the largest IP packet that it carries.
    pub mtu: u32,
    /// The workload behind it.
    pub workload: Option<WorkloadId>,
    /// The host endpoint that governs it, of an uplink.
    pub host_endpoint: Option<HostEndpointNumber>,
    /// Its IPv6 link-local address.
    pub link_local: Option<Ipv6Addr>,
    address4: Option<Ipv4Addr>,
    address6: Option<Ipv6Addr>,
}

/// What is put around a packet on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encapsulation {
    /// Nothing.
    None,
    /// An IPv4 header (RFC 2003).
    Ipip {
        /// This node's address.
        src: Ipv4Addr,
        /// The other node's address.
        dst: Ipv4Addr,
    },
}

/// A resolved next step: device, MAC address, tunnel.
#[derive(Debug, Clone)]
pub struct Adjacency {
    /// The device it leaves by; `None` where the manifests alone (a trace without devices) do not tell.
    pub device: Option<DeviceId>,
    /// The next hop's IP address on that device.
    pub next_hop: IpAddr,
    /// The next hop's MAC address; `None` while it is not resolved.
    pub mac: Option<Mac>,
    /// Tunnel.
    pub encapsulation: Encapsulation,
    /// Bytes of the largest IP packet that fits, a tunnel's header already taken off.
    pub mtu: u32,
    /// What kind of route this is.
    pub kind: RouteKind,
}

/// An adjacency as the straight way needs it: all in one line, as far as IPIP goes ([`crate::pipeline`], straight.rs).
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct Hop {
    /// The device that packets leave by. [`Hop::NO_DEVICE`] where nothing that comes from it is admitted, or there is none.
    pub device: IfIndex,
    /// Bytes of the largest IP packet that goes straight there; 0 where none does: to the node's kernel, and where a MAC address is not known.
    pub fits_bytes: u32,
    /// Where the device is reached.
    pub port: PortId,
    /// Whether what comes back by the same device in the same tunnel, from an address that leads here, is the tunnel's own node's: what the
    /// general way finds out by three lookups.
    pub is_peer_known: bool,
    /// The headers that a packet gets.
    pub headers: LinkHeaders,
}

const _: () = assert!(size_of::<Hop>() == 128 && std::mem::offset_of!(Hop, headers) + 4 + 14 + 20 <= 64);

impl Hop {
    /// The index of no device.
    pub const NO_DEVICE: IfIndex = IfIndex(u32::MAX);
}

/// The kinds of route, as traces name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RouteKind {
    /// To a workload of this node.
    Workload,
    /// Over an uplink.
    Direct,
    /// Over an uplink, in an IPIP tunnel.
    Ipip,
    /// To this node's own kernel.
    Host,
    /// By a device that only the node's kernel serves: it gets the packet, and forwards it.
    Kernel,
}

impl RouteKind {
    /// Whether the node's kernel gets the packet, to have it or to forward it.
    #[inline]
    pub fn is_kernels(self) -> bool {
        matches!(self, Self::Host | Self::Kernel)
    }

    /// Whether it leads away from this node and what is on it.
    #[inline]
    pub fn leaves_node(self) -> bool {
        matches!(self, Self::Direct | Self::Ipip | Self::Kernel)
    }
}

/// The source MAC address of what is handed to the node's kernel at `mac`: never one of the trunk's own form, which names a device.
pub(crate) fn host_source(Mac([a, b, c, d, e, f]): Mac) -> Mac {
    Mac([a, b, c, d, e, f ^ 1])
}

/// Where a destination is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// There.
    Via(AdjacencyId),
    /// An address of this node's own pod range that no pod has, or a pod's of this node that has no device (any more).
    NoSuchPod,
    /// A route of the node's kernel forbids it.
    Refused(Refusal),
    /// Nowhere that weir knows.
    None,
}

impl Route {
    /// The next hop there.
    #[inline]
    pub fn adjacency(self) -> Option<AdjacencyId> {
        if let Self::Via(adjacency) = self { Some(adjacency) } else { None }
    }
}

/// What a route, or a node's address, comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    One(AdjacencyId),
    /// These of [`Forwarding::choices`].
    Several {
        first: u32,
        count: u32,
    },
    Refused(Refusal),
}

/// One of several next hops, and a number of its own, which stays as it is whatever the others are.
#[derive(Debug, Clone, Copy)]
struct Choice {
    own: u64,
    adjacency: AdjacencyId,
}

/// Next hops of one route that flows choose from, at most: weights beyond are only kept in proportion.
const MOST_CHOICES: u32 = 64;

/// What tells flows apart where a route has several next hops.
fn flow_hash<A: Address>(flow: &FlowKey<A>) -> u64 {
    mixed((flow.src.to_ip(), flow.dst.to_ip(), flow.ports.word(), flow.protocol.0))
}

/// Who owns a pod's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Local(WorkloadId),
    Node(NodeId),
    OwnRange,
}

/// The tables of one address family.
#[derive(Debug)]
pub struct Family<A: Address> {
    local: HashSet<A>,
    /// Those of `local` that the node shares with others: its networks' broadcast addresses, and the anycast address of routers.
    shared: HashSet<A>,
    pods: HashMap<A, Owner>,
    ranges: PrefixMap<A, Owner>,
    routes: PrefixMap<A, Way>,
    pools: PrefixMap<A, PoolFacts>,
    /// Adjacency towards each workload of this node, by workload.
    workloads: HashMap<u32, AdjacencyId>,
    /// Adjacency towards each other node, by node: with the tunnel, and without.
    tunnels: HashMap<u32, Way>,
    nodes: HashMap<u32, Way>,
    /// Addresses of nodes, tunnels' included, to recognise senders of tunnel packets.
    node_addresses: HashMap<A, NodeId>,
    internal: Option<A>,
    tunnel: Option<A>,
    loopback_source: Option<A>,
}

#[derive(Debug, Clone, Copy)]
struct PoolFacts {
    ipip: TunnelMode,
    nat_outgoing: bool,
}

/// The forwarding tables of one moment.
#[derive(Debug)]
pub struct Forwarding {
    devices: Vec<Device>,
    by_index: HashMap<IfIndex, DeviceId>,
    neighbors: HashMap<(IfIndex, IpAddr), Mac>,
    adjacencies: Vec<Adjacency>,
    choices: Vec<Choice>,
    /// One for each adjacency.
    hops: Vec<Hop>,
    host: AdjacencyId,
    host_device: DeviceId,
    this_node: Option<NodeId>,
    same_subnet: Vec<bool>,
    v4: Family<Ipv4Addr>,
    v6: Family<Ipv6Addr>,
    cluster_workloads: Vec<String>,
    host_endpoints: HostEndpoints,
    listening: BTreeSet<u16>,
    knows_all_devices: bool,
}

/// Next hops that one node can have: pods of its own, other nodes (twice: directly and by tunnel), gateways and neighbours.
pub const MAX_ADJACENCIES: usize = u16::MAX as usize;

/// There are more next hops than a connection can number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{count} next hops (pods of this node, nodes, gateways, neighbours) are more than the {MAX_ADJACENCIES} that weir can number"
)]
pub struct TooManyNextHops {
    /// How many there are.
    pub count: usize,
}

/// Picks the tables of an address family; implemented by IPv4 and IPv6 addresses only.
pub trait Routed: weir_nat::Family {
    /// The tables of this family.
    fn family(forwarding: &Forwarding) -> &Family<Self>;
    /// The device's address of this family, link-local ones excepted.
    fn device_address(device: &Device) -> Option<Self>;
}

impl Routed for Ipv4Addr {
    #[inline]
    fn family(forwarding: &Forwarding) -> &Family<Self> {
        &forwarding.v4
    }
    fn device_address(device: &Device) -> Option<Self> {
        device.address4
    }
}

impl Routed for Ipv6Addr {
    #[inline]
    fn family(forwarding: &Forwarding) -> &Family<Self> {
        &forwarding.v6
    }
    fn device_address(device: &Device) -> Option<Self> {
        device.address6
    }
}

impl Forwarding {
    /// Compiles the tables. Uplinks become ports 1, 2, ... in the order of `links.devices`.
    ///
    /// # Errors
    /// Where there are more next hops than a connection can number.
    pub fn compile(cluster: &Cluster, links: &Links) -> Result<Self, TooManyNextHops> {
        let forwarding = Compiler::new(cluster, links).finish();
        match forwarding.adjacencies.len() {
            count if count > MAX_ADJACENCIES => Err(TooManyNextHops { count }),
            _ => Ok(forwarding),
        }
    }

    /// The device with the kernel's index `index`.
    #[inline]
    pub fn device_by_index(&self, index: IfIndex) -> Option<DeviceId> {
        self.by_index.get(&index).copied()
    }

    /// A device by its id.
    #[inline]
    pub fn device(&self, id: DeviceId) -> &Device {
        &self.devices[id.0 as usize]
    }

    /// The host endpoint that governs a device, one of the kernel's own and one that nothing is known of too.
    pub(crate) fn host_endpoint_at(&self, device: IfIndex) -> Option<HostEndpointNumber> {
        let known = self.by_index.get(&device);
        let known = known
            .or_else(|| self.by_index.get(&device.received_by()).filter(|id| self.device(**id).role == Role::Uplink));
        match known {
            Some(id) => self.device(*id).host_endpoint,
            None if device.is_forwarded() => self.host_endpoints.everywhere(),
            None => None,
        }
    }

    /// The MAC address of `address` on a device.
    pub fn neighbor(&self, device: IfIndex, address: IpAddr) -> Option<Mac> {
        self.neighbors.get(&(device, address)).copied()
    }

    /// All devices.
    pub fn devices(&self) -> impl Iterator<Item = (DeviceId, &Device)> {
        self.devices.iter().enumerate().map(|(i, d)| (DeviceId(i as u32), d))
    }

    /// An adjacency by its id.
    #[inline]
    pub fn adjacency(&self, id: AdjacencyId) -> &Adjacency {
        &self.adjacencies[id.0 as usize]
    }

    /// The adjacency of that number for the straight way; `None` where there is none.
    #[inline(always)]
    pub(crate) fn hop(&self, number: u32) -> Option<&Hop> {
        self.hops.get(number as usize)
    }

    /// The node's own kernel as a device.
    #[inline]
    pub fn host_device(&self) -> DeviceId {
        self.host_device
    }

    /// The way to this node's own kernel.
    #[inline]
    pub fn host(&self) -> AdjacencyId {
        self.host
    }

    /// "namespace/name" of a workload.
    pub fn workload_name(&self, id: WorkloadId) -> &str {
        &self.cluster_workloads[id.0 as usize]
    }

    /// This node's host endpoints.
    #[inline]
    pub fn host_endpoints(&self) -> &HostEndpoints {
        &self.host_endpoints
    }

    /// Whether the node is known to listen on a TCP port ([`Links::listening`]).
    pub fn listens(&self, port: u16) -> bool {
        self.listening.contains(&port)
    }

    /// Whether `address` is one of this node's own.
    #[inline]
    pub fn is_local<A: Routed>(&self, address: A) -> bool {
        A::family(self).local.contains(&address)
    }

    /// Whether `address` is one of this node's that it shares with its neighbours: a broadcast or anycast address of a network that it is in.
    #[inline]
    pub fn is_shared<A: Routed>(&self, address: A) -> bool {
        A::family(self).shared.contains(&address)
    }

    /// Whether what comes by an uplink for `address` is for the node itself: one of its own, a group's, or one that is good on a link only.
    #[inline]
    pub fn is_for_node<A: Routed>(&self, address: A) -> bool {
        self.is_local(address) || address.ends_at_link()
    }

    /// The workload of this node that has `address`.
    #[inline]
    pub fn local_workload<A: Routed>(&self, address: A) -> Option<WorkloadId> {
        match A::family(self).pods.get(&address) {
            Some(Owner::Local(workload)) => Some(*workload),
            _ => None,
        }
    }

    /// Whether `address` is a pod's, and packets of that pod do not come by the device `by` of the node's kernel: it is on this node, or another
    /// way leads there.
    pub(crate) fn is_pods_elsewhere<A: Routed>(&self, address: A, by: IfIndex) -> bool {
        let family = A::family(self);
        match family.pods.get(&address).or_else(|| family.ranges.get(address)) {
            Some(Owner::Local(_)) => true,
            // It has come past weir, for an address of the node.
            Some(Owner::Node(_)) => !self.adjacency_to(address).is_some_and(|hop| {
                let Adjacency { device, encapsulation, .. } = *self.adjacency(hop);
                let leads_by = device.map(|id| self.device(id).index.received_by());
                encapsulation == Encapsulation::None && by != IfIndex::HOST && leads_by == Some(by)
            }),
            // Nobody has it.
            Some(Owner::OwnRange) | None => false,
        }
    }

    /// The cluster node that `address` belongs to: a pod's node, a node's pod range, or a node's own address.
    pub fn node_of<A: Routed>(&self, address: A) -> Option<NodeId> {
        let family = A::family(self);
        if let Some(node) = family.node_addresses.get(&address) {
            return Some(*node);
        }
        match family.pods.get(&address).or_else(|| family.ranges.get(address))? {
            Owner::Node(node) => Some(*node),
            Owner::Local(_) | Owner::OwnRange => self.this_node,
        }
    }

    /// The node that has `address` as its own.
    pub fn node_by_address<A: Routed>(&self, address: A) -> Option<NodeId> {
        A::family(self).node_addresses.get(&address).copied()
    }

    /// This node.
    pub fn this_node(&self) -> Option<NodeId> {
        self.this_node
    }

    /// Whether what leaves for `destination` from `source` by an uplink is to be masqueraded for its pool's sake (natOutgoing).
    pub fn nat_outgoing<A: Routed>(&self, source: A, destination: A) -> bool {
        let pools = &A::family(self).pools;
        pools.get(source).is_some_and(|pool| pool.nat_outgoing) && pools.get(destination).is_none()
    }

    /// The tunnel to an address of that node's pods, where its pool wants one.
    fn tunnel<A: Routed>(&self, node: NodeId, address: A) -> Option<&Way> {
        let family = A::family(self);
        let is_wanted = match family.pools.get(address).map_or(TunnelMode::Never, |pool| pool.ipip) {
            TunnelMode::Never => false,
            TunnelMode::Always => true,
            TunnelMode::CrossSubnet => !self.same_subnet[node.0 as usize],
        };
        if is_wanted { family.tunnels.get(&node.0) } else { None }
    }

    /// Whether `source` is of another node's pods, whose packets to pods come in that node's tunnel: outside of it, anybody may claim to be one.
    pub fn is_behind_tunnel<A: Routed>(&self, source: A) -> bool {
        let family = A::family(self);
        if family.tunnels.is_empty() {
            return false;
        }
        match family.pods.get(&source).or_else(|| family.ranges.get(source)) {
            Some(Owner::Node(node)) => self.tunnel(*node, source).is_some(),
            _ => false,
        }
    }

    /// Whether `address` is one of this node's own that others reach without a tunnel.
    pub fn is_direct<A: Routed>(&self, address: A) -> bool {
        let family = A::family(self);
        family.local.contains(&address) && family.pools.get(address).is_none()
    }

    /// Where `destination` is; of several next hops the first.
    pub fn route<A: Routed>(&self, destination: A) -> Route {
        self.find(destination, None)
    }

    /// Where the destination of a flow is, by its own of several next hops.
    pub fn route_of<A: Routed>(&self, flow: &FlowKey<A>) -> Route {
        self.find(flow.dst, Some(flow))
    }

    fn find<A: Routed>(&self, destination: A, flow: Option<&FlowKey<A>>) -> Route {
        let family = A::family(self);
        if family.local.contains(&destination) {
            return Route::Via(self.host);
        }
        let via = |way: Option<&Way>| match way {
            Some(Way::One(id)) => Route::Via(*id),
            Some(Way::Several { first, count }) => Route::Via(self.choose(*first, *count, flow)),
            Some(Way::Refused(refusal)) => Route::Refused(*refusal),
            None => Route::None,
        };
        match family.pods.get(&destination).or_else(|| family.ranges.get(destination)) {
            Some(Owner::Local(workload)) => match family.workloads.get(&workload.0) {
                Some(id) => Route::Via(*id),
                None if self.knows_all_devices => Route::NoSuchPod,
                None => Route::None,
            },
            Some(Owner::OwnRange) => Route::NoSuchPod,
            Some(Owner::Node(node)) => {
                let chosen = self.tunnel(*node, destination);
                via(chosen.or_else(|| family.nodes.get(&node.0)).or_else(|| family.routes.get(destination)))
            }
            None => via(family.routes.get(destination)),
        }
    }

    /// One of several next hops. Each flow has an order of preference of its own, so that a next hop that goes takes only its own flows along
    /// (highest random weight: Thaler and Ravishankar, 1998).
    #[cold]
    fn choose<A: Routed>(&self, first: u32, count: u32, flow: Option<&FlowKey<A>>) -> AdjacencyId {
        let choices = &self.choices[first as usize..][..count as usize];
        let hash = flow.map(flow_hash);
        let best = hash.and_then(|hash| choices.iter().max_by_key(|choice| mixed((hash, choice.own))));
        best.unwrap_or(&choices[0]).adjacency
    }

    /// The next hop of a flow's packets.
    pub(crate) fn adjacency_of<A: Routed>(&self, flow: &FlowKey<A>) -> Option<AdjacencyId> {
        if flow.dst.is_loopback() { Some(self.host) } else { self.route_of(flow).adjacency() }
    }

    /// The next hop of packets to `destination`.
    pub(crate) fn adjacency_to<A: Routed>(&self, destination: A) -> Option<AdjacencyId> {
        // Who asked from a loopback address is the node itself; no route leads there.
        if destination.is_loopback() { Some(self.host) } else { self.route(destination).adjacency() }
    }

    /// Looks up who has an address as [`Self::route`] will, so that what that reads is near when it does.
    #[inline]
    pub(crate) fn foresee<A: Routed>(&self, destination: A) {
        std::hint::black_box(A::family(self).pods.get(&destination));
    }

    /// The device by which packets to `destination` leave.
    pub fn device_towards<A: Routed>(&self, destination: A) -> Option<&Device> {
        let adjacency = self.adjacency(self.route(destination).adjacency()?);
        adjacency.device.map(|device| self.device(device))
    }

    /// Whether packets to `address`, and so from it, go through a tunnel.
    pub fn is_tunnelled<A: Routed>(&self, address: A) -> bool {
        matches!(self.route(address), Route::Via(id) if self.adjacency(id).kind == RouteKind::Ipip)
    }

    /// This node's address for packets that leave by `adjacency`: the device's own, else the node's InternalIP.
    pub fn address_towards<A: Routed>(&self, adjacency: AdjacencyId) -> Option<A> {
        let family = A::family(self);
        let adjacency = self.adjacency(adjacency);
        adjacency.device.and_then(|d| A::device_address(self.device(d))).or(family.internal)
    }

    /// The address that masqueraded packets take that leave by `adjacency`: into a tunnel the node's tunnel address, else
    /// [`Forwarding::address_towards`].
    pub fn masquerade_address<A: Routed>(&self, adjacency: AdjacencyId) -> Option<A> {
        if self.adjacency(adjacency).encapsulation == Encapsulation::None {
            self.address_towards(adjacency)
        } else {
            let family = A::family(self);
            family.tunnel.or(family.internal)
        }
    }

    /// The source of what the node's kernel sends to itself by a service ([`Links::loopback_sources`]).
    pub fn loopback_source<A: Routed>(&self) -> Option<A> {
        let family = A::family(self);
        family.loopback_source.or(family.internal)
    }

    fn hop_of(&self, adjacency: &Adjacency) -> Hop {
        let device = adjacency.device.map(|id| self.device(id));
        let mac = adjacency.mac.filter(|_| adjacency.kind != RouteKind::Host);
        let own_mac = device.map_or_else(Mac::default, |device| device.mac);
        let (headers, largest) = match adjacency.encapsulation {
            Encapsulation::None => {
                let is_ipv4 = adjacency.next_hop.is_ipv4();
                let ethertype = if is_ipv4 { Ipv4Addr::ETHERTYPE } else { Ipv6Addr::ETHERTYPE };
                (LinkHeaders::ethernet(mac.unwrap_or_default(), own_mac, ethertype), u16::MAX)
            }
            Encapsulation::Ipip { src, dst } => {
                let headers = LinkHeaders::ipip(mac.unwrap_or_default(), own_mac, TunnelEnds { src, dst });
                (headers, u16::MAX - IPIP_HEADER_BYTES as u16)
            }
        };
        // As `Origin` has it: of a pod's device behind which no known pod is, nothing is admitted.
        let admitted = device.filter(|device| device.role != Role::Workload || device.workload.is_some());
        Hop {
            device: admitted.map_or(Hop::NO_DEVICE, |device| device.index),
            fits_bytes: if mac.is_some() && admitted.is_some() { adjacency.mtu.min(largest.into()) } else { 0 },
            port: device.map_or(PortId::TRUNK, |device| device.port),
            is_peer_known: headers.ends().is_some_and(|ends| {
                let is_uplink = admitted.is_some_and(|device| device.role == Role::Uplink);
                is_uplink && self.is_local(ends.src) && may_be_forwarded(ends.dst, ends.src)
            }),
            headers,
        }
    }

    /// The tunnels that do not tell by themselves whose packets come out of them: their node shares its address with another, or pod
    /// addresses that lead to it are another node's own.
    fn unknown_peers(&self) -> Vec<AdjacencyId> {
        let family = &self.v4;
        let tunnels = |node: &u32| -> Vec<AdjacencyId> {
            match family.tunnels.get(node) {
                Some(Way::One(id)) => vec![*id],
                Some(Way::Several { first, count }) => {
                    let choices = &self.choices[*first as usize..][..*count as usize];
                    choices.iter().map(|choice| choice.adjacency).collect()
                }
                Some(Way::Refused(_)) | None => Vec::new(),
            }
        };
        let all = family.tunnels.keys().flat_map(|node| tunnels(node).into_iter().map(|id| (*node, id)));
        let shared = all.filter(|(node, id)| match self.adjacency(*id).encapsulation {
            Encapsulation::Ipip { dst, .. } => self.node_by_address(dst) != Some(NodeId(*node)),
            Encapsulation::None => true,
        });
        let foreign = family.node_addresses.iter().filter_map(|(address, node)| {
            match family.pods.get(address).or_else(|| family.ranges.get(*address))? {
                Owner::Node(owner) if owner != node => Some(tunnels(&owner.0)),
                _ => None,
            }
        });
        shared.map(|(_, id)| id).chain(foreign.flatten()).collect()
    }

    /// This node's own addresses, both families, sorted.
    pub fn local_addresses(&self) -> Vec<IpAddr> {
        let own_v4 = self.v4.local.difference(&self.v4.shared).map(|a| a.to_ip());
        let own_v6 = self.v6.local.difference(&self.v6.shared).map(|a| a.to_ip());
        sorted(own_v4.chain(own_v6))
    }

    /// Those that it shares ([`Self::is_shared`]), both families, sorted.
    pub fn shared_addresses(&self) -> Vec<IpAddr> {
        sorted(self.v4.shared.iter().map(|a| a.to_ip()).chain(self.v6.shared.iter().map(|a| a.to_ip())))
    }
}

fn sorted(addresses: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = addresses.collect();
    all.sort_unstable();
    all
}

struct Compiler<'a> {
    cluster: &'a Cluster,
    links: &'a Links,
    this_node: Option<NodeId>,
    devices: Vec<Device>,
    by_index: HashMap<IfIndex, DeviceId>,
    neighbors: HashMap<(IfIndex, IpAddr), Mac>,
    adjacencies: Vec<Adjacency>,
    choices: Vec<Choice>,
    known: HashMap<(Option<DeviceId>, IpAddr, Encapsulation), AdjacencyId>,
    same_subnet: Vec<bool>,
    host_endpoints: HostEndpoints,
}

/// In place of a device that nothing is known of.
const NO_DEVICE: DeviceId = DeviceId(u32::MAX);

/// Where a route leads.
#[derive(Debug)]
enum Leads<A> {
    /// To one of these: next hop (`None`: the destination itself), device, weight.
    To(Vec<(Option<A>, DeviceId, u16)>),
    Nowhere(Refusal),
}

impl<A> Leads<A> {
    fn by(via: Option<A>, device: DeviceId) -> Self {
        Self::To(vec![(via, device, 1)])
    }
}

impl<'a> Compiler<'a> {
    fn new(cluster: &'a Cluster, links: &'a Links) -> Self {
        let this_node = cluster.nodes.iter().position(|n| n.name == cluster.node_name).map(|i| NodeId(i as u32));
        let internal = this_node.map(|n| cluster.nodes[n.0 as usize].internal_ips.clone()).unwrap_or_default();
        let by_device: HashMap<&str, WorkloadId> =
            local_workloads(cluster).map(|(id, w)| (w.device.as_str(), id)).collect();

        let host_endpoints = HostEndpoints::new(cluster);
        let mut next_uplink = 1;
        let mut devices: Vec<Device> = links
            .devices
            .iter()
            .map(|d| {
                let port = match d.role {
                    Role::Uplink => {
                        next_uplink += 1;
                        PortId(next_uplink - 1)
                    }
                    Role::Workload | Role::Host | Role::Kernel => PortId::TRUNK,
                };
                Device {
                    name: d.name.clone(),
                    index: d.index,
                    role: d.role,
                    port,
                    mac: d.mac,
                    mtu: d.mtu,
                    workload: by_device.get(d.name.as_str()).copied().filter(|_| d.role == Role::Workload),
                    host_endpoint: match d.role {
                        Role::Uplink | Role::Kernel => host_endpoints.of_device(d),
                        Role::Workload | Role::Host => None,
                    },
                    link_local: d.addresses.iter().find_map(|n| match n.addr() {
                        IpAddr::V6(a) if a.is_unicast_link_local() => Some(a),
                        _ => None,
                    }),
                    address4: first_address(d, &internal),
                    address6: first_address(d, &internal),
                }
            })
            .collect();
        if !devices.iter().any(|d| d.role == Role::Host) {
            // The node's kernel is always there, whether or not the configuration names it.
            devices.push(Device {
                name: "host".into(),
                index: IfIndex::HOST,
                role: Role::Host,
                port: PortId::TRUNK,
                mac: Mac::default(),
                mtu: 65535,
                workload: None,
                host_endpoint: None,
                link_local: None,
                address4: None,
                address6: None,
            });
        }
        let by_index = devices.iter().enumerate().map(|(i, d)| (d.index, DeviceId(i as u32))).collect();
        let mut neighbors: HashMap<(IfIndex, IpAddr), Mac> = HashMap::default();
        for device in &devices {
            let Some(workload) = device.workload.map(|w| &cluster.workloads[w.0 as usize]) else { continue };
            let Some(mac) = workload.mac else { continue };
            neighbors.extend(workload.addresses.iter().map(|ip| ((device.index, *ip), mac)));
        }
        neighbors.extend(links.neighbors.iter().map(|n| ((n.device, n.address), n.mac)));
        Self {
            cluster,
            links,
            this_node,
            devices,
            by_index,
            neighbors,
            adjacencies: Vec::new(),
            choices: Vec::new(),
            known: HashMap::default(),
            same_subnet: Vec::new(),
            host_endpoints,
        }
    }

    fn finish(mut self) -> Forwarding {
        let host_device = self.devices.iter().position(|d| d.role == Role::Host).expect("there always is one");
        let host_mac = self.devices[host_device].mac;
        let host_device = DeviceId(host_device as u32);
        let host = AdjacencyId(0);
        self.adjacencies.push(Adjacency {
            device: Some(host_device),
            next_hop: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            mac: Some(host_mac),
            encapsulation: Encapsulation::None,
            // The kernel takes what the uplink or pod could send; the frame bounds it.
            mtu: 65535,
            kind: RouteKind::Host,
        });
        self.same_subnet = (0..self.cluster.nodes.len()).map(|n| self.in_own_subnet(&self.cluster.nodes[n])).collect();
        let v4 = self.family::<Ipv4Addr>();
        let v6 = self.family::<Ipv6Addr>();
        let mut forwarding = Forwarding {
            devices: self.devices,
            by_index: self.by_index,
            neighbors: self.neighbors,
            adjacencies: self.adjacencies,
            choices: self.choices,
            hops: Vec::new(),
            host,
            host_device,
            this_node: self.this_node,
            same_subnet: self.same_subnet,
            v4,
            v6,
            cluster_workloads: self.cluster.workloads.iter().map(|w| w.name.clone()).collect(),
            host_endpoints: self.host_endpoints,
            listening: self.links.listening.clone(),
            knows_all_devices: self.links.complete,
        };
        forwarding.hops = forwarding.adjacencies.iter().map(|adjacency| forwarding.hop_of(adjacency)).collect();
        for id in forwarding.unknown_peers() {
            forwarding.hops[usize::from(id.0)].is_peer_known = false;
        }
        forwarding
    }

    /// CrossSubnet's question: is the node's address within this node's subnet (its annotation's prefix, else an uplink's)?
    fn in_own_subnet(&self, node: &model::Node) -> bool {
        let Some(address) = direct_address::<Ipv4Addr>(node) else { return false };
        if let Some(own) = self.this_node.and_then(|n| self.cluster.nodes[n.0 as usize].ipv4_address) {
            return own.contains(&address);
        }
        self.links
            .devices
            .iter()
            .filter(|d| d.role == Role::Uplink)
            .flat_map(|d| &d.addresses)
            .any(|net| net.contains(&IpAddr::V4(address)))
    }

    fn only_uplink(&self) -> Option<DeviceId> {
        let mut uplinks = (0..).zip(&self.devices).filter(|(_, d)| d.role == Role::Uplink).map(|(i, _)| DeviceId(i));
        uplinks.next().filter(|_| uplinks.next().is_none())
    }

    fn adjacency(&mut self, device: Option<DeviceId>, next_hop: IpAddr, encapsulation: Encapsulation) -> AdjacencyId {
        if let Some(id) = self.known.get(&(device, next_hop, encapsulation)) {
            return *id;
        }
        let (mtu, mac, role) = match device.map(|d| &self.devices[d.0 as usize]) {
            Some(d) => (d.mtu, self.neighbors.get(&(d.index, next_hop)).copied(), Some(d.role)),
            None => (u32::MAX, None, None),
        };
        let (mtu, kind) = match encapsulation {
            // The kernel splits what is too long, or tells.
            Encapsulation::None if role == Some(Role::Kernel) => (u32::from(u16::MAX), RouteKind::Kernel),
            Encapsulation::Ipip { .. } => (mtu.saturating_sub(20), RouteKind::Ipip),
            Encapsulation::None if role == Some(Role::Workload) => (mtu, RouteKind::Workload),
            Encapsulation::None => (mtu, RouteKind::Direct),
        };
        let id = AdjacencyId(self.adjacencies.len() as u16);
        self.adjacencies.push(Adjacency { device, next_hop, mac, encapsulation, mtu, kind });
        self.known.insert((device, next_hop, encapsulation), id);
        id
    }

    /// What a route comes to, for what is for `itself` where it is on the link.
    fn way<A: Routed>(&mut self, leads: &Leads<A>, itself: A, encapsulation: Encapsulation) -> Way {
        let to = match leads {
            Leads::Nowhere(refusal) => return Way::Refused(*refusal),
            Leads::To(to) => to,
        };
        let all: u32 = to.iter().map(|(.., weight)| u32::from(*weight).max(1)).sum();
        let first = self.choices.len();
        for (via, device, weight) in to {
            let device = Some(*device).filter(|device| *device != NO_DEVICE);
            // The kernel knows who is next on its own devices.
            let is_kernels = device.is_some_and(|id| self.devices[id.0 as usize].role == Role::Kernel);
            let hop = if is_kernels { A::unspecified() } else { via.unwrap_or(itself) };
            let adjacency = self.adjacency(device, hop.to_ip(), encapsulation);
            if let [_] = to[..] {
                return Way::One(adjacency);
            }
            let (weight, index) = (u32::from(*weight).max(1), device.map(|id| self.devices[id.0 as usize].index.0));
            let share = if all > MOST_CHOICES { (weight * MOST_CHOICES).div_ceil(all) } else { weight };
            self.choices.extend((0..share).map(|number| {
                let own = (index, via.map(|via| via.to_ip()), number);
                Choice { own: mixed(own), adjacency }
            }));
        }
        match self.choices.len() - first {
            // None of its devices is known.
            0 => Way::Refused(Refusal::Unreachable),
            count => Way::Several { first: first as u32, count: count as u32 },
        }
    }

    fn family<A: Routed>(&mut self) -> Family<A> {
        let cluster = self.cluster;
        let own = self.this_node.map(|n| &cluster.nodes[n.0 as usize]);

        let mut local: HashSet<A> = HashSet::default();
        let node_ips = own.into_iter().flat_map(|n| n.internal_ips.iter().chain(&n.other_ips));
        match &cluster.local_addresses {
            Some(given) => local.extend(given.iter().filter_map(|ip| A::from_ip(*ip))),
            None => local.extend(node_ips.filter_map(|ip| A::from_ip(*ip))),
        }
        let tunnel = own.and_then(|n| n.tunnel_address).and_then(|a| A::from_ip(IpAddr::V4(a)));
        local.extend(tunnel);
        local.extend(own.and_then(|n| n.ipv4_address).and_then(|net| A::from_ip(IpAddr::V4(net.addr()))));
        for device in self.links.devices.iter().filter(|d| d.role != Role::Workload) {
            local.extend(device.addresses.iter().filter_map(|net| A::from_ip(net.addr())));
        }

        // Next hops: connected prefixes and routes, the longest prefix first, the lowest metric among equals.
        let mut hops: Vec<(A, u8, u32, Leads<A>)> = Vec::new();
        for device in &self.links.devices {
            let id = self.by_index[&device.index];
            if device.role == Role::Uplink {
                hops.extend(device.addresses.iter().filter_map(|net| {
                    Some((A::from_ip(net.network())?, net.prefix_len(), 0, Leads::by(None, id)))
                        .filter(|_| !is_link_local(net.addr()))
                }));
            }
        }
        for route in &self.links.routes {
            let (Some(to), Some(id)) = (A::from_ip(route.to.network()), self.by_index.get(&route.device)) else {
                continue;
            };
            let via = match route.via {
                Some(ip) => match A::from_ip(ip) {
                    Some(via) => Some(via),
                    None => continue,
                },
                None => None,
            };
            hops.push((to, route.to.prefix_len(), route.metric, Leads::by(via, *id)));
        }
        for route in &self.links.multipaths {
            let Some(to) = A::from_ip(route.to.network()) else { continue };
            let known = route.hops.iter().filter_map(|hop| {
                let via = match hop.via {
                    Some(ip) => Some(A::from_ip(ip)?),
                    None => None,
                };
                Some((via, *self.by_index.get(&hop.device)?, hop.weight))
            });
            hops.push((to, route.to.prefix_len(), route.metric, Leads::To(known.collect())));
        }
        for route in &self.links.refused {
            let Some(to) = A::from_ip(route.to.network()) else { continue };
            hops.push((to, route.to.prefix_len(), route.metric, Leads::Nowhere(route.refusal)));
        }
        hops.sort_by_key(|h| h.2);
        let hop_map = PrefixMap::compile(hops.iter().map(|h| (h.0, h.1, &h.3)));

        let mut node_addresses: HashMap<A, NodeId> = HashMap::default();
        for (index, node) in cluster.nodes.iter().enumerate() {
            let annotated = node.ipv4_address.map(|net| IpAddr::V4(net.addr()));
            let tunnel = node.tunnel_address.map(IpAddr::V4);
            for ip in node.internal_ips.iter().copied().chain(annotated).chain(tunnel) {
                node_addresses.extend(A::from_ip(ip).map(|a| (a, NodeId(index as u32))));
            }
        }

        let mut nodes: HashMap<u32, Way> = HashMap::default();
        let mut tunnels: HashMap<u32, Way> = HashMap::default();
        let own_outer = own.and_then(direct_address::<Ipv4Addr>);
        for (index, node) in cluster.nodes.iter().enumerate() {
            if self.this_node == Some(NodeId(index as u32)) {
                continue;
            }
            let Some(address) = direct_address::<A>(node) else { continue };
            let unknown = Leads::To(vec![(Some(address), self.only_uplink().unwrap_or(NO_DEVICE), 1)]);
            let leads = match hop_map.get(address) {
                Some(leads) => *leads,
                // Where nothing is known of links (a trace, whose devices' addresses only the kernel knows), the node itself is the next hop.
                None if hops.is_empty() => &unknown,
                None => continue,
            };
            nodes.insert(index as u32, self.way(leads, address, Encapsulation::None));
            if let (Some(src), IpAddr::V4(dst)) = (own_outer, address.to_ip()) {
                tunnels.insert(index as u32, self.way(leads, address, Encapsulation::Ipip { src, dst }));
            }
        }

        // Direct destinations on a link get an adjacency each; known neighbours and nodes are enough: others are made on demand
        // through the prefix's own entry, whose next hop is the destination itself.
        let mut routes: Vec<(A, u8, Way)> = Vec::new();
        for ((device, address), _) in self.neighbors.clone() {
            let (Some(address), Some(id)) = (A::from_ip(address), self.by_index.get(&device).copied()) else {
                continue;
            };
            if self.devices[id.0 as usize].role != Role::Uplink {
                continue;
            }
            if let Some(Leads::To(to)) = hop_map.get(address)
                && matches!(to[..], [(None, on, _)] if on == id)
            {
                let adjacency = self.adjacency(Some(id), address.to_ip(), Encapsulation::None);
                routes.push((address, A::BITS, Way::One(adjacency)));
            }
        }
        for (to, length, _, leads) in &hops {
            // `unspecified` as next hop stands for "the destination itself": it is on the link and not resolved yet.
            routes.push((*to, *length, self.way(leads, A::unspecified(), Encapsulation::None)));
        }

        let mut pods: HashMap<A, Owner> = HashMap::default();
        let mut workloads: HashMap<u32, AdjacencyId> = HashMap::default();
        let device_by_name: HashMap<String, DeviceId> =
            self.devices.iter().enumerate().map(|(i, d)| (d.name.clone(), DeviceId(i as u32))).collect();
        for (index, workload) in cluster.workloads.iter().enumerate() {
            let Some(node) = &workload.node else { continue };
            let addresses = workload.addresses.iter().filter_map(|ip| A::from_ip(*ip));
            if *node == cluster.node_name {
                let id = WorkloadId(index as u32);
                let device = device_by_name.get(&workload.device).copied();
                for (position, address) in addresses.enumerate() {
                    pods.insert(address, Owner::Local(id));
                    let may_be_unknown =
                        || !self.links.complete && !self.links.devices.iter().any(|d| d.role == Role::Workload);
                    if position == 0 && (device.is_some() || may_be_unknown()) {
                        let adjacency = self.adjacency(device, address.to_ip(), Encapsulation::None);
                        self.adjacencies[adjacency.0 as usize].kind = RouteKind::Workload;
                        workloads.insert(index as u32, adjacency);
                    }
                }
            } else if let Some(node) = cluster.nodes.iter().position(|n| n.name == *node) {
                pods.extend(addresses.map(|a| (a, Owner::Node(NodeId(node as u32)))));
            }
        }
        // Of two equal ranges the first counts. Where there are blocks, they are where addresses come from.
        let this_node = self.this_node;
        let of_nodes = |ranges: fn(&model::Node) -> &[IpNet]| {
            cluster.nodes.iter().enumerate().flat_map(move |(index, node)| {
                let owner = match this_node {
                    Some(NodeId(own)) if own == index as u32 => Owner::OwnRange,
                    _ => Owner::Node(NodeId(index as u32)),
                };
                ranges(node).iter().filter_map(move |net| Some((A::from_ip(net.network())?, net.prefix_len(), owner)))
            })
        };
        let ranges = of_nodes(|node| &node.blocks).chain(of_nodes(|node| &node.pod_cidrs));

        let networks = self.links.devices.iter().filter(|d| d.role != Role::Workload).flat_map(|d| &d.addresses);
        let shared = networks.filter_map(shared_address).filter_map(A::from_ip);
        let shared: HashSet<A> = shared.filter(|a| !local.contains(a) && !pods.contains_key(a)).collect();
        local.extend(&shared);

        Family {
            local,
            shared,
            pods,
            ranges: PrefixMap::compile(ranges),
            routes: PrefixMap::compile(routes),
            pools: PrefixMap::compile(cluster.pools.iter().filter_map(|pool| {
                let facts = PoolFacts { ipip: pool.ipip, nat_outgoing: pool.nat_outgoing };
                Some((A::from_ip(pool.cidr.network())?, pool.cidr.prefix_len(), facts))
            })),
            workloads,
            tunnels,
            nodes,
            node_addresses,
            internal: own.and_then(|n| n.internal_ips.iter().find_map(|ip| A::from_ip(*ip))),
            tunnel,
            loopback_source: self.links.loopback_sources.iter().find_map(|ip| A::from_ip(*ip)),
        }
    }
}

/// The workloads of this node, with their ids.
pub fn local_workloads(cluster: &Cluster) -> impl Iterator<Item = (WorkloadId, &model::Workload)> {
    let here = |w: &&model::Workload| w.node.as_deref() == Some(cluster.node_name.as_str());
    cluster.workloads.iter().enumerate().map(|(i, w)| (WorkloadId(i as u32), w)).filter(move |(_, w)| here(w))
}

/// The address under which other nodes reach `node`: its Calico annotation, else its first InternalIP.
fn direct_address<A: Address>(node: &model::Node) -> Option<A> {
    let annotated = node.ipv4_address.and_then(|net| A::from_ip(IpAddr::V4(net.addr())));
    annotated.or_else(|| node.internal_ips.iter().find_map(|ip| A::from_ip(*ip)))
}

/// The address that all who are in a network share, as Linux has it: its broadcast address (RFC 1812, 5.3.5), or that of its routers (RFC 4291,
/// 2.6.1). Networks of two (RFC 3021, RFC 6164) and single addresses have none.
fn shared_address(network: &IpNet) -> Option<IpAddr> {
    match network {
        IpNet::V4(net) if net.prefix_len() < 31 => Some(net.broadcast().into()),
        IpNet::V6(net) if net.prefix_len() < 127 && !net.addr().is_unicast_link_local() => Some(net.network().into()),
        IpNet::V4(_) | IpNet::V6(_) => None,
    }
}

/// Whether an address is good on one link only.
pub fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

/// The device's address that the node is known by, else its first.
fn first_address<A: Address>(device: &model::Device, internal: &[IpAddr]) -> Option<A> {
    let usable = || device.addresses.iter().map(IpNet::addr).filter(|ip| !is_link_local(*ip));
    usable().filter(|ip| internal.contains(ip)).find_map(A::from_ip).or_else(|| usable().find_map(A::from_ip))
}
