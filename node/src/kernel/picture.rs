//! The in-memory picture of the kernel's links, addresses, routes and neighbours.
//!
//! # Theory
//!
//! *What.* A plain structure fed with rtnetlink messages, from dumps and from multicast alike; it does no input or
//! output. It keeps what weir uses and nothing else, so a message that changes nothing of it (statistics, a neighbour
//! that goes from REACHABLE to STALE) is no change.
//!
//! *Convergence.* Multicast is subscribed before a dump is read, and its messages are applied after it, in order. A
//! message older than the dump may undo for a moment what the dump says, but the last message about an object always
//! wins, and what had no message since the dump is as the dump says.
//!
//! *What the kernel does not tell.* Then [`Picture::wants_dump`] asks for a new dump:
//! - IPv4 routes vanish without a message when their device goes down or their source address goes (fib_sync_down_dev,
//!   fib_table_flush in net/ipv4);
//! - a route message may mean one of several paths to one prefix (multipath, appended routes), which differs between
//!   IPv4 and IPv6;
//! - a veth's end says nothing when its peer is moved to another namespace: only the leaving peer does
//!   (IFLA_NEW_NETNSID);
//! - a socket's queue that ran over.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use rtnetlink::{
    packet_core::{NLM_F_REPLACE, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressMessage},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteType, RouteVia,
        },
        rule::RuleAttribute,
    },
};
use weir_dataplane::{
    frame::IfIndex,
    model::{Device, Links, Multipath, Neighbor, NextHop, Refusal, Refused, Role, Route},
};
use weir_packet::Mac;

use super::{Changed, TRUNK_HOST, TRUNK_WEIR, host::ROUTE_TABLE};

/// RT_TABLE_DEFAULT (include/uapi/linux/rtnetlink.h): looked up after the main table.
pub(super) const TABLE_DEFAULT: u32 = 253;
/// RT_TABLE_MAIN.
pub(super) const TABLE_MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// A network device as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: IfIndex,
    /// Its name.
    pub name: String,
    /// Its Ethernet address; `None` for devices without one.
    pub mac: Option<Mac>,
    /// Bytes of the largest IP packet that it carries.
    pub mtu: u32,
    /// Administratively up (IFF_UP). AF_XDP cannot bind to a device that is down.
    pub up: bool,
    /// What it is, as "veth" or "bridge"; `None` for most NICs.
    pub kind: Option<String>,
    /// Index of the other end (veth) or the lower device (VLAN), in that one's own namespace.
    pub peer: Option<u32>,
    /// Whether that other end is in another network namespace, which bpf_redirect_peer needs.
    pub peer_elsewhere: bool,
    /// Receive queues.
    pub rx_queues: u32,
    /// Transmit queues.
    pub tx_queues: u32,
    /// Differs between two devices that had the same index one after the other (one that left the namespace and came
    /// back lost its programs).
    pub incarnation: u64,
    /// Of a veth: the addresses that have a route of their own by it, as a pod's have.
    pub leads_to: Vec<IpAddr>,
}

/// How the host's end of a pod's veth pair begins by Calico's naming rule.
const POD_PREFIX: &str = "cali";

impl Link {
    fn is_veth(&self) -> bool {
        self.kind.as_deref() == Some("veth")
    }
}

/// Which devices weir uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleRules {
    /// Names of the uplinks.
    pub uplinks: BTreeSet<String>,
    /// Names of the devices that the manifests give to local workloads.
    pub workloads: BTreeSet<String>,
    /// Where pods' addresses are.
    pub pods: Vec<IpNet>,
    /// Names of the trunk's ends, the kernel's first; they never are uplinks or workloads.
    pub trunk: [String; 2],
}

impl RoleRules {
    /// Rules with the trunk's usual names.
    pub fn new(
        uplinks: impl IntoIterator<Item = impl Into<String>>,
        workloads: impl IntoIterator<Item = impl Into<String>>,
    ) -> Self {
        Self {
            uplinks: uplinks.into_iter().map(Into::into).collect(),
            workloads: workloads.into_iter().map(Into::into).collect(),
            pods: Vec::new(),
            trunk: [TRUNK_HOST.to_owned(), TRUNK_WEIR.to_owned()],
        }
    }

    /// The same, which also know a pod's device by an address within these.
    #[must_use]
    pub fn with_pods(mut self, pods: impl IntoIterator<Item = IpNet>) -> Self {
        self.pods = pods.into_iter().collect();
        self.pods.sort_unstable();
        self.pods.dedup();
        self
    }

    /// The role of a device; none of the trunk's ends.
    ///
    /// A veth that looks like a pod's is one before any manifest says whose: until then, what comes by it must not be taken for what the node's
    /// kernel forwards.
    pub fn role(&self, link: &Link) -> Option<Role> {
        let name = &link.name;
        let is_pods_address = |address: &IpAddr| self.pods.iter().any(|net| net.contains(address));
        let looks_like_pods = || name.starts_with(POD_PREFIX) || link.leads_to.iter().any(is_pods_address);
        if self.trunk.iter().any(|end| end == name) {
            None
        } else if self.uplinks.contains(name) {
            Some(Role::Uplink)
        } else if self.workloads.contains(name) || link.is_veth() && looks_like_pods() {
            Some(Role::Workload)
        } else {
            None
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Address {
    net: IpNet,
    secondary: bool,
}

/// Where a route of one table sits; the kernel keeps at most one route per key, unless some were appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct RouteKey {
    to: IpNet,
    default_table: bool,
    tos: u8,
    metric: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Hop {
    via: Option<IpAddr>,
    device: u32,
    usable: bool,
    /// Share of the flows.
    weight: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Hops(Vec<Hop>),
    /// The same, where the kernel puts something around packets that weir does not know.
    Encapsulating(Vec<Hop>),
    Nowhere(Refusal),
    /// What weir does not take over, by its name.
    Other(&'static str),
}

/// Everything weir knows of the kernel's network state.
#[derive(Debug, Default)]
pub(super) struct Picture {
    links: BTreeMap<u32, Link>,
    addresses: BTreeMap<u32, Vec<Address>>,
    routes: BTreeMap<RouteKey, Vec<Target>>,
    neighbors: BTreeMap<(u32, IpAddr), Mac>,
    /// Rules of policy routing that are neither the kernel's own nor weir's, in words. Only dumps tell.
    rules: BTreeSet<String>,
    incarnations: u64,
    changed: Changed,
    wants_dump: bool,
}

impl Picture {
    /// Whether the messages so far leave something open that only a new dump tells. Asking resets it.
    pub(super) fn wants_dump(&mut self) -> bool {
        std::mem::take(&mut self.wants_dump)
    }

    /// Asks for a new dump.
    pub(super) fn distrust(&mut self) {
        self.wants_dump = true;
    }

    /// What has changed since the last call of [`Picture::take_changed`].
    pub(super) fn changed(&self) -> &Changed {
        &self.changed
    }

    /// What has changed since the last call.
    pub(super) fn take_changed(&mut self) -> Changed {
        std::mem::take(&mut self.changed)
    }

    /// Has these devices from now on, and no others.
    #[cfg(test)]
    pub(super) fn set_links(&mut self, links: impl IntoIterator<Item = Link>) {
        self.links = links.into_iter().map(|link| (link.index.0, link)).collect();
    }

    /// Has this address on the device of that index, whenever there is one.
    #[cfg(test)]
    pub(super) fn set_address(&mut self, index: u32, net: IpNet) {
        self.addresses.insert(index, vec![Address { net, secondary: false }]);
    }

    /// Takes over a picture made of a dump.
    pub(super) fn replace(&mut self, fresh: Picture) {
        let Picture { mut links, addresses, routes, neighbors, rules, .. } = fresh;
        self.changed.routes |= rules != self.rules;
        self.rules = rules;
        for link in links.values_mut() {
            link.incarnation = match self.links.get(&link.index.0) {
                Some(known) if known.kind == link.kind => known.incarnation,
                _ => {
                    self.incarnations += 1;
                    self.incarnations
                }
            };
        }
        self.changed.links |= links != self.links || addresses != self.addresses;
        self.changed.routes |= routes != self.routes;
        self.changed.neighbors |= neighbors != self.neighbors;
        (self.links, self.addresses, self.routes, self.neighbors) = (links, addresses, routes, neighbors);
    }

    /// Applies one message.
    pub(super) fn apply(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) {
        let replaces = message.header.flags & NLM_F_REPLACE != 0;
        match message.payload {
            NetlinkPayload::InnerMessage(inner) => self.apply_inner(inner, replaces),
            NetlinkPayload::Overrun(_) => self.wants_dump = true,
            _ => {}
        }
    }

    /// Applies one message of a dump, or of multicast; `replaces`: it had NLM_F_REPLACE.
    pub(super) fn apply_inner(&mut self, message: RouteNetlinkMessage, replaces: bool) {
        match message {
            RouteNetlinkMessage::NewLink(message) => self.new_link(message),
            RouteNetlinkMessage::DelLink(message) => self.del_link(&message),
            RouteNetlinkMessage::NewAddress(message) => self.new_address(&message),
            RouteNetlinkMessage::DelAddress(message) => self.del_address(&message),
            RouteNetlinkMessage::NewRoute(message) => self.new_route(&message, replaces),
            RouteNetlinkMessage::DelRoute(message) => self.del_route(&message),
            RouteNetlinkMessage::NewNeighbour(message) => self.new_neighbor(&message),
            RouteNetlinkMessage::DelNeighbour(message) => self.del_neighbor(&message),
            _ => {}
        }
    }

    fn new_link(&mut self, message: LinkMessage) {
        // A bridge speaks of its ports with AF_BRIDGE: a port that leaves it is not a device that goes.
        if message.header.interface_family != AddressFamily::Unspec {
            return;
        }
        let index = message.header.index;
        let known = self.links.get(&index);
        let incarnation = known.map_or(self.incarnations + 1, |known| known.incarnation);
        let Some(link) = link_of(message, incarnation) else { return };
        if known == Some(&link) {
            return;
        }
        let went_down = known.is_some_and(|known| known.up) && !link.up;
        self.incarnations = self.incarnations.max(link.incarnation);
        self.links.insert(index, link);
        self.changed.links = true;
        if went_down && self.routes_use(index) {
            self.wants_dump = true;
        }
    }

    fn del_link(&mut self, message: &LinkMessage) {
        if message.header.interface_family != AddressFamily::Unspec {
            return;
        }
        let index = message.header.index;
        // A dump cannot tell that a device left and came back, and the link's own messages are in order, so it goes at
        // once.
        if self.links.remove(&index).is_some() {
            self.changed.links = true;
        }
        self.addresses.remove(&index);
        if self.routes_use(index) {
            self.wants_dump = true;
        }
        let neighbors = self.neighbors.len();
        self.neighbors.retain(|(device, _), _| *device != index);
        self.changed.neighbors |= self.neighbors.len() != neighbors;
        if message.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::NewNetnsId(_))) {
            self.wants_dump = true;
        }
    }

    fn routes_use(&self, device: u32) -> bool {
        self.routes.values().flatten().any(|target| target.hops().iter().any(|hop| hop.device == device))
    }

    fn new_address(&mut self, message: &AddressMessage) {
        let Some((address, usable)) = address_of(message) else { return };
        if !usable {
            return self.remove_address(message.header.index, &address.net);
        }
        let list = self.addresses.entry(message.header.index).or_default();
        match list.iter_mut().find(|known| known.net == address.net) {
            Some(known) if *known == address => return,
            Some(known) => *known = address,
            None => list.push(address),
        }
        // Primary addresses first, each group in the order of the kernel.
        list.sort_by_key(|address| address.secondary);
        self.changed.links = true;
    }

    fn del_address(&mut self, message: &AddressMessage) {
        let Some((address, _)) = address_of(message) else { return };
        self.remove_address(message.header.index, &address.net);
        if address.net.addr().is_ipv4() {
            self.wants_dump = true;
        }
    }

    fn remove_address(&mut self, device: u32, net: &IpNet) {
        let Some(list) = self.addresses.get_mut(&device) else { return };
        let before = list.len();
        list.retain(|known| known.net != *net);
        self.changed.links |= list.len() != before;
        if list.is_empty() {
            self.addresses.remove(&device);
        }
    }

    fn new_route(&mut self, message: &RouteMessage, replaces: bool) {
        let Some((key, target)) = route_of(message) else { return };
        let single = target.hops().len() <= 1;
        match self.routes.entry(key) {
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(vec![target]);
                self.changed.routes = true;
            }
            std::collections::btree_map::Entry::Occupied(mut entry) => {
                if entry.get().as_slice() == std::slice::from_ref(&target) {
                    return;
                }
                if replaces && single && entry.get().len() == 1 {
                    entry.insert(vec![target]);
                    self.changed.routes = true;
                } else {
                    self.wants_dump = true;
                }
            }
        }
    }

    fn del_route(&mut self, message: &RouteMessage) {
        let Some((key, target)) = route_of(message) else { return };
        let Some(known) = self.routes.get(&key) else { return };
        if known.as_slice() == std::slice::from_ref(&target) {
            self.routes.remove(&key);
            self.changed.routes = true;
        } else {
            self.wants_dump = true;
        }
    }

    /// Adds a route of a dump, where several under one key are all there in the kernel's order.
    pub(super) fn dumped_route(&mut self, message: RouteNetlinkMessage) {
        let RouteNetlinkMessage::NewRoute(message) = message else { return };
        let Some((key, target)) = route_of(&message) else { return };
        self.routes.entry(key).or_default().push(target);
    }

    /// Adds a rule of a dump, unless it is one that every node has, or weir's own.
    pub(super) fn dumped_rule(&mut self, message: RouteNetlinkMessage) {
        let RouteNetlinkMessage::NewRule(message) = message else { return };
        let (mut priority, mut table) = (0, u32::from(message.header.table));
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(number) => priority = *number,
                RuleAttribute::Table(number) => table = *number,
                _ => {}
            }
        }
        // FRA_PRIORITY of local, main and default (net/ipv4/fib_rules.c).
        let is_usual = matches!((priority, table), (0, 255) | (32766, TABLE_MAIN) | (32767, TABLE_DEFAULT));
        if !is_usual && table != ROUTE_TABLE {
            let family = if message.header.family == AddressFamily::Inet6 { "IPv6" } else { "IPv4" };
            self.rules.insert(format!("{priority} of {family}, to table {table}"));
        }
    }

    fn new_neighbor(&mut self, message: &NeighbourMessage) {
        let Some(key) = neighbor_key(message) else { return };
        let mac = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok().map(Mac),
            _ => None,
        });
        use NeighbourState::{Delay, Failed, Noarp, Permanent, Probe, Reachable, Stale};
        match (message.header.state, mac) {
            (Reachable | Stale | Delay | Probe | Permanent | Noarp, Some(mac)) => {
                self.changed.neighbors |= self.neighbors.insert(key, mac) != Some(mac);
                self.changed.failed.retain(|failed| *failed != (IfIndex(key.0), key.1));
            }
            (state, _) => {
                self.changed.neighbors |= self.neighbors.remove(&key).is_some();
                if state == Failed {
                    self.failed(key);
                }
            }
        }
    }

    fn del_neighbor(&mut self, message: &NeighbourMessage) {
        let Some(key) = neighbor_key(message) else { return };
        self.changed.neighbors |= self.neighbors.remove(&key).is_some();
        if message.header.state == NeighbourState::Failed {
            self.failed(key);
        }
    }

    fn failed(&mut self, (device, address): (u32, IpAddr)) {
        let failed = (IfIndex(device), address);
        if !self.changed.failed.contains(&failed) {
            self.changed.failed.push(failed);
        }
    }

    /// All devices, by index.
    pub(super) fn all(&self) -> impl Iterator<Item = Link> {
        let mut leads_to: BTreeMap<u32, Vec<IpAddr>> = BTreeMap::new();
        let hosts = self.routes.iter().filter(|(key, _)| key.to.prefix_len() == key.to.max_prefix_len());
        for (key, targets) in hosts {
            for target in targets {
                for hop in target.hops() {
                    leads_to.entry(hop.device).or_default().push(key.to.addr());
                }
            }
        }
        self.links.values().map(move |link| {
            let leads_to = leads_to.remove(&link.index.0).filter(|_| link.is_veth());
            Link { leads_to: leads_to.unwrap_or_default(), ..link.clone() }
        })
    }

    /// The addresses of this node that a remote party could use: no loopback, no link-local IPv6, none of the trunk's.
    pub(super) fn node_addresses(&self, rules: &RoleRules) -> Vec<IpAddr> {
        let mut list: Vec<IpAddr> = self
            .addresses
            .iter()
            .filter(|(device, _)| self.links.get(device).is_some_and(|link| !rules.trunk.contains(&link.name)))
            .flat_map(|(_, addresses)| addresses.iter().map(|address| address.net.addr()))
            .filter(|address| match address {
                IpAddr::V4(address) => !address.is_loopback(),
                IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
            })
            .collect();
        list.sort_unstable();
        list.dedup();
        list
    }

    /// What the dataplane is compiled from.
    pub(super) fn links(&self, rules: &RoleRules) -> Links {
        let mut roles = BTreeMap::new();
        let mut devices = Vec::new();
        let all: Vec<Link> = self.all().collect();
        for link in &all {
            let (Some(role), Some(mac)) = (rules.role(link), link.mac) else { continue };
            roles.insert(link.index.0, role);
            let addresses = self.addresses.get(&link.index.0).map_or(&[][..], Vec::as_slice);
            devices.push(Device {
                name: link.name.clone(),
                index: link.index,
                role,
                mac,
                mtu: link.mtu,
                addresses: addresses.iter().map(|address| address.net).collect(),
            });
        }
        devices.extend(self.host_device(rules, &roles));
        let mut links = Links::default();
        let mut kernels = BTreeSet::new();
        let in_force = self
            .routes
            .iter()
            .filter(|(key, _)| key.tos == 0 && !(key.default_table && self.main_has(key.to)) && !is_link_local(key.to));
        for (key, targets) in in_force {
            let &RouteKey { to, metric, .. } = key;
            let leads = |target: &Target| match target {
                Target::Nowhere(refusal) => Leads::Nowhere(*refusal),
                Target::Other(_) => Leads::Unknown,
                Target::Hops(hops) => self.leads(hops, false, rules, &roles),
                Target::Encapsulating(hops) => self.leads(hops, true, rules, &roles),
            };
            // Those of IPv6 that were appended are one route of several next hops; of IPv4's the first counts that can be used.
            let mut all = targets.iter().map(leads);
            let leads = match to.addr().is_ipv6() {
                true => all.reduce(Leads::and).unwrap_or(Leads::Unknown),
                false => all.find(|leads| !matches!(leads, Leads::Unknown)).unwrap_or(Leads::Unknown),
            };
            match leads {
                Leads::Unknown => {}
                Leads::Nowhere(refusal) => links.refused.push(Refused { to, refusal, metric }),
                Leads::To(mut hops) => {
                    kernels.extend(hops.iter().map(|hop| hop.device).filter(|device| device.is_forwarded()));
                    if let [_] = hops[..] {
                        let NextHop { via, device, .. } = hops.remove(0);
                        links.routes.push(Route { to, via, device, metric });
                    } else {
                        links.multipaths.push(Multipath { to, hops, metric });
                    }
                }
            }
        }
        // Addresses of others tell which host endpoint governs them.
        let others = all.iter().filter(|link| rules.role(link).is_none() && !is_loopback(link));
        let others = others.filter(|link| link.up && self.addresses.contains_key(&link.index.0));
        kernels.extend(others.filter(|link| !rules.trunk.contains(&link.name)).map(|link| link.index.forwarded()));
        for index in kernels {
            let Some(link) = self.links.get(&index.received_by().0) else { continue };
            let addresses = self.addresses.get(&link.index.0).map_or(&[][..], Vec::as_slice);
            devices.push(Device {
                name: link.name.clone(),
                index,
                role: Role::Kernel,
                mac: link.mac.unwrap_or_default(),
                mtu: link.mtu,
                addresses: addresses.iter().map(|address| address.net).collect(),
            });
        }
        let neighbors = self
            .neighbors
            .iter()
            .filter(|((device, _), _)| roles.contains_key(device))
            .map(|(&(device, address), &mac)| Neighbor { address, mac, device: IfIndex(device) })
            .collect();
        Links { devices, neighbors, ..links }
    }

    /// Where those hops of a route lead that can be used. `is_kernels`: only the kernel can send there, by whatever device.
    fn leads(&self, hops: &[Hop], is_kernels: bool, rules: &RoleRules, roles: &BTreeMap<u32, Role>) -> Leads {
        let mut to = Vec::new();
        let mut is_closed = false;
        for hop in hops.iter().filter(|hop| hop.usable) {
            let Some(link) = self.links.get(&hop.device) else { continue };
            if rules.trunk.contains(&link.name) || is_loopback(link) {
                continue;
            }
            let index = match roles.get(&hop.device) {
                Some(Role::Uplink) if !is_kernels => link.index,
                // What a pod's device leads to is a pod's, by whichever manifest says so, and no packet gets there otherwise.
                Some(Role::Workload) => {
                    is_closed = true;
                    continue;
                }
                _ => link.index.forwarded(),
            };
            to.push(NextHop { via: hop.via, device: index, weight: hop.weight });
        }
        match () {
            () if !to.is_empty() => Leads::To(to),
            () if is_closed => Leads::Nowhere(Refusal::Unreachable),
            () => Leads::Unknown,
        }
    }

    /// The node's own kernel as a device: there once the trunk is, with the node's addresses that no uplink or workload
    /// device has.
    fn host_device(&self, rules: &RoleRules, roles: &BTreeMap<u32, Role>) -> Option<Device> {
        let trunk = self.links.values().find(|link| link.name == rules.trunk[0])?;
        let named: BTreeSet<IpAddr> = roles
            .keys()
            .filter_map(|device| self.addresses.get(device))
            .flatten()
            .map(|address| address.net.addr())
            .collect();
        Some(Device {
            name: "host".to_owned(),
            index: IfIndex::HOST,
            role: Role::Host,
            mac: trunk.mac?,
            mtu: trunk.mtu,
            addresses: self.node_addresses(rules).into_iter().filter(|a| !named.contains(a)).map(IpNet::from).collect(),
        })
    }

    fn main_has(&self, to: IpNet) -> bool {
        let from = RouteKey { to, default_table: false, tos: 0, metric: 0 };
        self.routes.range(from..).next().is_some_and(|(key, _)| key.to == to && !key.default_table)
    }

    /// What of the kernel's routes weir does not follow as the kernel does, one line each.
    pub(super) fn notes(&self, rules: &RoleRules) -> Vec<String> {
        let is_trunk = |hop: &Hop| self.links.get(&hop.device).is_some_and(|link| rules.trunk.contains(&link.name));
        let mut notes = Vec::new();
        for (key, targets) in &self.routes {
            let to = key.to;
            match targets.first() {
                Some(Target::Other(kind)) => {
                    notes.push(format!("route to {to}: {kind} routes are not followed by weir"));
                }
                Some(target) if key.tos != 0 && !target.hops().iter().any(is_trunk) => {
                    notes.push(format!("route to {to}: routes with a TOS ({:#x}) are not followed by weir", key.tos));
                }
                _ => {}
            }
        }
        notes.extend(self.rules.iter().map(|rule| format!("rule {rule}: policy routing is not followed by weir")));
        notes
    }
}

/// Where no router forwards to (RFC 4291, 2.5.6).
fn is_link_local(net: IpNet) -> bool {
    matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local())
}

fn is_loopback(link: &Link) -> bool {
    link.name == "lo"
}

/// Where a route leads, as far as weir can follow.
enum Leads {
    To(Vec<NextHop>),
    Nowhere(Refusal),
    Unknown,
}

impl Leads {
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::To(mut hops), Self::To(more)) => {
                hops.extend(more);
                Self::To(hops)
            }
            (Self::Unknown, other) | (Self::Nowhere(_), other @ Self::To(_)) => other,
            (known, _) => known,
        }
    }
}

impl Target {
    fn hops(&self) -> &[Hop] {
        match self {
            Self::Hops(hops) | Self::Encapsulating(hops) => hops,
            Self::Nowhere(_) | Self::Other(_) => &[],
        }
    }
}

/// The device that a message is about; `None` for one without a name.
pub(super) fn link_of(message: LinkMessage, incarnation: u64) -> Option<Link> {
    let mut link = Link {
        index: IfIndex(message.header.index),
        name: String::new(),
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        kind: None,
        peer: None,
        peer_elsewhere: false,
        rx_queues: 1,
        tx_queues: 1,
        incarnation,
        leads_to: Vec::new(),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok().map(Mac),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::NumRxQueues(queues) => link.rx_queues = queues,
            LinkAttribute::NumTxQueues(queues) => link.tx_queues = queues,
            LinkAttribute::Link(peer) => link.peer = Some(peer),
            LinkAttribute::LinkNetNsId(_) => link.peer_elsewhere = true,
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(InfoKind::Other(kind)) => Some(kind),
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn address_of(message: &AddressMessage) -> Option<(Address, bool)> {
    let (mut local, mut address) = (None, None);
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let own = local.or(address)?;
    // On a point-to-point link the prefix is the peer's.
    let net = match address {
        Some(peer) if peer != own => IpNet::from(own),
        _ => IpNet::new(own, message.header.prefix_len).ok()?,
    };
    let unusable = flags.contains(AddressFlags::Dadfailed)
        || (flags.contains(AddressFlags::Tentative) && !flags.contains(AddressFlags::Optimistic));
    // For IPv6 the flag's bit means a temporary address (RFC 8981), which is no worse.
    let secondary = own.is_ipv4() && flags.contains(AddressFlags::Secondary);
    Some((Address { net, secondary }, !unusable))
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

fn gateway_of(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(address) => ip_of(address),
        RouteAttribute::Via(RouteVia::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Via(RouteVia::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// A route of the tables that weir follows, as key and target.
fn route_of(message: &RouteMessage) -> Option<(RouteKey, Target)> {
    let header = &message.header;
    if header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let unspecified = match header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let usable = !header.flags.intersects(RouteFlags::Dead);
    let (mut table, mut to, mut via, mut device, mut metric) = (u32::from(header.table), unspecified, None, None, 0);
    let (mut hops, mut encapsulated) = (None, false);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(address) => to = ip_of(address)?,
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => via = gateway_of(attribute),
            RouteAttribute::EncapType(_) => encapsulated = true,
            RouteAttribute::MultiPath(list) => {
                encapsulated |=
                    list.iter().flat_map(|hop| &hop.attributes).any(|a| matches!(a, RouteAttribute::EncapType(_)));
                hops = Some(
                    list.iter()
                        .map(|hop| Hop {
                            via: hop.attributes.iter().find_map(gateway_of),
                            device: hop.interface_index,
                            usable: !hop.flags.intersects(RouteNextHopFlags::Dead),
                            // The kernel's number is one less.
                            weight: u16::from(hop.hops) + 1,
                        })
                        .collect(),
                );
            }
            _ => {}
        }
    }
    if table != TABLE_MAIN && table != TABLE_DEFAULT {
        return None;
    }
    let to = IpNet::new(to, header.destination_prefix_length).ok()?;
    let key = RouteKey { to, default_table: table == TABLE_DEFAULT, tos: header.tos, metric };
    let target = match (header.kind, hops, device) {
        (RouteType::Unicast, _, _) if header.source_prefix_length != 0 => Target::Other("source-specific"),
        (RouteType::Unicast, Some(hops), _) if encapsulated => Target::Encapsulating(hops),
        (RouteType::Unicast, Some(hops), _) => Target::Hops(hops),
        (RouteType::Unicast, None, Some(device)) => {
            let hops = vec![Hop { via, device, usable, weight: 1 }];
            if encapsulated { Target::Encapsulating(hops) } else { Target::Hops(hops) }
        }
        (RouteType::BlackHole, ..) => Target::Nowhere(Refusal::Blackhole),
        (RouteType::Unreachable, ..) => Target::Nowhere(Refusal::Unreachable),
        (RouteType::Prohibit, ..) => Target::Nowhere(Refusal::Prohibit),
        (RouteType::Throw, ..) => Target::Other("throw"),
        // Local, broadcast, multicast and anycast routes are the kernel's own business.
        _ => return None,
    };
    Some((key, target))
}

fn neighbor_key(message: &NeighbourMessage) -> Option<(u32, IpAddr)> {
    // The bridges' forwarding entries come as AF_BRIDGE.
    if !matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6) {
        return None;
    }
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    })?;
    (!address.is_multicast()).then_some((message.header.ifindex, address))
}

/// What became of the devices with a role since the last look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceChanges {
    /// New ones, also those that went and came back.
    pub appeared: Vec<Link>,
    /// Those that are no more, by what they were.
    pub gone: Vec<Link>,
    /// Those whose description changed (MTU, MAC, up or down), by what they are now.
    pub altered: Vec<Link>,
}

impl DeviceChanges {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.appeared.is_empty() && self.gone.is_empty() && self.altered.is_empty()
    }
}

/// Remembers which devices of one role were there, and tells the difference.
#[derive(Clone, Debug)]
pub struct DeviceTracker {
    role: Role,
    known: BTreeMap<IfIndex, Link>,
}

impl DeviceTracker {
    /// Follows devices of `role` ([`Role::Uplink`] or [`Role::Workload`]); at first it knows none.
    pub fn new(role: Role) -> Self {
        Self { role, known: BTreeMap::new() }
    }

    /// The difference to the last call. A device whose role is new or gone by `rules` counts as appeared or gone.
    pub fn update(&mut self, links: &[Link], rules: &RoleRules) -> DeviceChanges {
        let now: BTreeMap<IfIndex, Link> = links
            .iter()
            .filter(|link| rules.role(link) == Some(self.role) && link.mac.is_some())
            .map(|link| (link.index, link.clone()))
            .collect();
        let mut changes = DeviceChanges::default();
        for (index, link) in &now {
            match self.known.get(index) {
                Some(known) if known == link => {}
                Some(known) if known.incarnation == link.incarnation && known.name == link.name => {
                    changes.altered.push(link.clone());
                }
                Some(known) => {
                    changes.gone.push(known.clone());
                    changes.appeared.push(link.clone());
                }
                None => changes.appeared.push(link.clone()),
            }
        }
        changes
            .gone
            .extend(self.known.iter().filter(|(index, _)| !now.contains_key(index)).map(|(_, link)| link.clone()));
        self.known = now;
        changes
    }
}
