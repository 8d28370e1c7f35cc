//! How the node's own kernel reaches pods and services: through `weir0`.
//!
//! # Theory
//!
//! *What.* A routing table of weir's own ([`ROUTE_TABLE`]) holds a route for each pod and service prefix; a rule of
//! fixed priority ([`RULE_PRIORITY`]) per family selects it. Table and rule are found again by their numbers alone, so
//! that whoever comes after a crash can take them away; nothing else in the node's routing is touched.
//!
//! *Order.* The kernel looks up the table `local` first (priority 0), so the node's own addresses are never captured.
//! Weir's table comes next, before `main`. Where a wanted prefix covers a subnet of an uplink, as podCIDRs 10.0.0.0/8
//! on a node in 10.0.0.0/24, that subnet gets a `throw` route, which makes the lookup go on to `main`: the longest
//! prefix wins within the table.
//!
//! *No loop.* The rule is `not from all iif weir0`: what weir punts to the kernel is never routed back into weir.
//! Reverse-path lookups are made as for the node's own packets and do match the rule.
//!
//! *One neighbour.* The routes go through one made-up gateway on `weir0` (onlink) with a permanent neighbour entry, so
//! that ten thousand services need one neighbour and no ARP.
//!
//! *Source.* The routes carry the node's InternalIP as preferred source, if the node has it.
//!
//! *To itself.* What the node's kernel sends to a service whose backend is the node itself (`kubernetes.default` on a
//! control plane node) comes back to it from one of [`LOOPBACK_SOURCES`], which the table routes through `weir0`; were
//! it from the node's own address, the answer would never leave the loopback device. (The idea is Cilium's, which takes
//! 169.254.42.1 so.)
//!
//! *What weir hands to the kernel* on `weir0` may have a source that is the node's own address or an outside
//! one. Hence accept_local, and no strict reverse path filter (net/ipv4/fib_frontend.c, __fib_validate_source); the
//! loose filter passes only on a device that has an address, so `weir0` gets one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use rtnetlink::{
    AddressMessageBuilder, RouteMessageBuilder,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
    },
};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use weir_cluster::sockets::PortSet;
use weir_dataplane::model::{Links, Role};
use weir_packet::Mac;

use super::{KernelError, TRUNK_HOST, follow::routes_of_table, netlink::Requests};

/// Number of weir's routing table: "weir" in ASCII, so that it meets nobody else's.
pub const ROUTE_TABLE: u32 = u32::from_be_bytes(*b"weir");
/// Priority of the rule that selects it: after `local` (0), before `main` (32766) and before the rules that other
/// networking software usually adds (from 99 on).
pub const RULE_PRIORITY: u32 = 77;
/// Marks weir's routes (rtm_protocol), for whoever reads `ip route`; a number that /etc/iproute2/rt_protos gives to
/// nobody.
const ROUTE_PROTOCOL: RouteProtocol = RouteProtocol::Other(b'w');
/// The made-up gateways on `weir0`.
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 119, 1);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x7765, 0x6972);
/// The address of `weir0` itself, which is never used as a source.
const TRUNK_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 119, 2);
/// Addresses that nobody has, reached through `weir0`: the sources of what the node's kernel sends to itself by a service, so that it
/// answers through weir. The IPv6 one is a unique local address (RFC 4193).
pub const LOOPBACK_SOURCES: [IpAddr; 2] =
    [IpAddr::V4(GATEWAY_V4), IpAddr::V6(Ipv6Addr::new(0xfd77, 0x6569, 0x7200, 0x0119, 0, 0, 0, 1))];
/// How many prefixes a line of the report names.
const NAMED_PREFIXES: usize = 8;

/// What does not change while weir runs.
#[derive(Clone, Debug)]
pub struct HostSettings {
    /// The trunk's end in the kernel.
    pub device: String,
    /// Destination MAC address of what the kernel sends to pods and services: that of the trunk's other end.
    pub gateway_mac: Mac,
    /// Names of the uplinks.
    pub uplinks: Vec<String>,
    /// `snat.portRange`: kept away from the kernel's own automatic choice of source ports.
    pub snat_ports: (u16, u16),
    /// File in which is remembered what to take back, such as /run/weir/host.json; it must not outlive the network
    /// namespace, so it belongs on a tmpfs, one file per weir.
    pub record: PathBuf,
}

/// What the kernel shall reach through weir.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Pod and service prefixes (or addresses as full-length prefixes).
    pub through: BTreeSet<IpNet>,
    /// Prefixes that stay with the kernel even where `through` covers them.
    pub except: BTreeSet<IpNet>,
    /// Source address for IPv4: this node's InternalIP.
    pub source_v4: Option<Ipv4Addr>,
    /// Source address for IPv6.
    pub source_v6: Option<Ipv6Addr>,
    /// Ports of the node's addresses that are weir's, kept away from the kernel's own automatic choice: what answers a process of the
    /// node there would be taken for a new connection.
    pub ports: PortSet,
}

impl Wanted {
    /// Routes to `through`, except to the subnets of the uplinks in `links`. `internal_ips` are this node's: the first
    /// of each family is its source. Further exceptions, as the addresses of nodes that lie within a pod prefix, may be
    /// added to [`Wanted::except`].
    pub fn new(links: &Links, through: impl IntoIterator<Item = IpNet>, internal_ips: &[IpAddr]) -> Self {
        let subnets =
            links.devices.iter().filter(|device| device.role == Role::Uplink).flat_map(|device| &device.addresses);
        Self {
            through: through.into_iter().map(|net| net.trunc()).collect(),
            // A full-length prefix is an address of the node's own, which the table `local` has already.
            except: subnets.filter(|net| net.prefix_len() != net.max_prefix_len()).map(IpNet::trunc).collect(),
            source_v4: internal_ips.iter().find_map(|address| match address {
                IpAddr::V4(address) => Some(*address),
                IpAddr::V6(_) => None,
            }),
            source_v6: internal_ips.iter().find_map(|address| match address {
                IpAddr::V6(address) => Some(*address),
                IpAddr::V4(_) => None,
            }),
            ports: PortSet::default(),
        }
    }
}

/// What was done, for the log and for a person.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostReport {
    /// What was changed, one line each; empty if all was as it should be.
    pub changed: Vec<String>,
    /// What is not as it should be and is not weir's to change: what breaks, and the command that mends it.
    pub warnings: Vec<String>,
}

/// What one of weir's routes does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RouteTo {
    /// Through the gateway on the device of this index.
    Trunk { device: u32, source: Option<IpAddr> },
    /// On to the next table.
    Main,
}

/// What is taken back at the end, written to [`HostSettings::record`].
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    /// Ports that weir added to net.ipv4.ip_local_reserved_ports.
    reserved_ports: String,
}

/// The node's kernel side of weir.
pub struct HostPlumbing {
    settings: HostSettings,
    requests: Requests,
    // Ends the socket's task with this.
    _tasks: JoinSet<()>,
}

impl HostPlumbing {
    /// Opens a connection to the kernel; changes nothing yet.
    ///
    /// # Errors
    /// Where there is no rtnetlink socket.
    pub fn new(settings: HostSettings) -> Result<Self, KernelError> {
        let mut tasks = JoinSet::new();
        let requests = Requests::open(&mut tasks)?;
        Ok(Self { settings, requests, _tasks: tasks })
    }

    /// Sets up all of it, once `weir0` is there and up: sysctls, then [`HostPlumbing::reconcile`]. To be called again
    /// at a reload; what is as it should be is left alone.
    ///
    /// # Errors
    /// Where the device is missing, or the kernel or a file refuses.
    pub async fn apply(&mut self, wanted: &Wanted) -> Result<HostReport, KernelError> {
        let mut report = HostReport::default();
        device_index(&self.requests, &self.settings.device).await?.ok_or_else(|| self.no_device())?;
        let v6 = wanted.through.iter().any(|net| net.addr().is_ipv6());
        device_sysctls(&self.settings.device, v6, &mut report)?;
        uplink_warnings(&self.settings.uplinks, &mut report)?;
        let (first, last) = self.settings.snat_ports;
        let ports = PortSet::range(first, last).union(&wanted.ports);
        reserve_ports(&ports, &self.settings.record, &mut report)?;
        let routes = self.reconcile(wanted).await?;
        report.changed.extend(routes.changed);
        report.warnings.extend(routes.warnings);
        Ok(report)
    }

    /// Makes weir's routing table and rules match `wanted`: adds, corrects, removes. To be called whenever prefixes,
    /// uplink subnets or the node's addresses change.
    ///
    /// # Errors
    /// Where the device is missing or down, a prefix has length 0, or the kernel refuses.
    pub async fn reconcile(&self, wanted: &Wanted) -> Result<HostReport, KernelError> {
        if let Some(all) = wanted.through.iter().find(|net| net.prefix_len() == 0) {
            return Err(KernelError::TooWide(*all));
        }
        let mut report = HostReport::default();
        let device = device_index(&self.requests, &self.settings.device).await?.ok_or_else(|| self.no_device())?;
        let own = own_addresses(&self.requests).await?;
        let sources = [wanted.source_v4.map(IpAddr::V4), wanted.source_v6.map(IpAddr::V6)].map(|source| {
            let source = source?;
            if own.contains(&source) {
                return Some(source);
            }
            report.warnings.push(format!(
                "no device of this node has {source}, its InternalIP: the kernel picks the source of its packets to \
                 pods and services itself; correct the Node's status.addresses or add the address"
            ));
            None
        });
        let has_family = |v6: bool| wanted.through.iter().any(|net| net.addr().is_ipv6() == v6);
        let loopback = LOOPBACK_SOURCES.into_iter().filter(|source| has_family(source.is_ipv6())).map(IpNet::from);
        let mut routes: BTreeMap<IpNet, RouteTo> = wanted
            .through
            .iter()
            .copied()
            .chain(loopback)
            .map(|net| {
                let source = sources[usize::from(net.addr().is_ipv6())];
                (net, RouteTo::Trunk { device, source })
            })
            .collect();
        for kept in &wanted.except {
            if wanted.through.contains(kept) {
                report.warnings.push(format!(
                    "{kept} is both a pod or service prefix and this node's own subnet: the kernel keeps it, so the \
                     node itself does not reach pods or services there"
                ));
            }
            if wanted.through.iter().any(|net| net.contains(kept)) {
                routes.insert(*kept, RouteTo::Main);
            }
        }
        let families = [
            (AddressFamily::Inet, routes.keys().any(|net| net.addr().is_ipv4())),
            (AddressFamily::Inet6, routes.keys().any(|net| net.addr().is_ipv6())),
        ];
        for (family, used) in families {
            if used {
                self.gateway(family, device, &mut report).await?;
            }
        }
        self.routes(&routes, &mut report).await?;
        for (family, used) in families {
            rules(&self.requests, family, used.then_some(self.settings.device.as_str()), &mut report).await?;
        }
        Ok(report)
    }

    /// Takes back everything, as `weir detach` does, also what an earlier process left. `device` may be gone already;
    /// its own sysctls are left as they are, they go with it.
    ///
    /// # Errors
    /// Where the kernel or a file refuses.
    pub async fn undo(device: &str, record: &Path) -> Result<HostReport, KernelError> {
        let mut report = HostReport::default();
        let mut tasks = JoinSet::new();
        let requests = Requests::open(&mut tasks)?;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            rules(&requests, family, None, &mut report).await?;
        }
        let mut removed = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            for route in own_routes(&requests, family).await? {
                remove_route(&requests, &route).await?;
                removed.extend(destination(&route));
            }
        }
        report.changed.extend(names("removed", &removed));
        if let Some(index) = device_index(&requests, device).await? {
            for gateway in [IpAddr::V4(GATEWAY_V4), IpAddr::V6(GATEWAY_V6)] {
                let message = RouteNetlinkMessage::DelNeighbour(neighbor(gateway, index, None));
                let action = || format!("remove the neighbour {gateway} of {device}");
                tolerate(requests.change(message, 0, action).await, &[libc::ENOENT, libc::ENXIO, libc::ENETDOWN])?;
            }
            let message = RouteNetlinkMessage::DelAddress(trunk_address(index));
            let action = || format!("remove {TRUNK_ADDRESS} from {device}");
            tolerate(requests.change(message, 0, action).await, &[libc::EADDRNOTAVAIL, libc::ENODEV])?;
        }
        release_ports(record, &mut report)?;
        Ok(report)
    }

    fn no_device(&self) -> KernelError {
        KernelError::NoDevice(self.settings.device.clone())
    }

    /// The gateway's neighbour entry and, for IPv4, the device's address.
    async fn gateway(&self, family: AddressFamily, device: u32, report: &mut HostReport) -> Result<(), KernelError> {
        let name = &self.settings.device;
        let gateway = if family == AddressFamily::Inet { IpAddr::V4(GATEWAY_V4) } else { IpAddr::V6(GATEWAY_V6) };
        if family == AddressFamily::Inet {
            let message = RouteNetlinkMessage::NewAddress(trunk_address(device));
            let action = || format!("give {TRUNK_ADDRESS} to {name}");
            match self.requests.change(message, NLM_F_CREATE | NLM_F_EXCL, action).await {
                Ok(()) => report.changed.push(format!("{name} has the address {TRUNK_ADDRESS}")),
                refused => tolerate(refused, &[libc::EEXIST])?,
            }
        }
        let mac = self.settings.gateway_mac;
        let message = RouteNetlinkMessage::NewNeighbour(neighbor(gateway, device, Some(mac)));
        let action = || format!("add {gateway} as a neighbour on {name}");
        self.requests.change(message, NLM_F_CREATE | NLM_F_REPLACE, action).await
    }

    async fn routes(&self, wanted: &BTreeMap<IpNet, RouteTo>, report: &mut HostReport) -> Result<(), KernelError> {
        let mut there = BTreeSet::new();
        let mut removed = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            for route in own_routes(&self.requests, family).await? {
                let Some(to) = destination(&route) else { continue };
                if wanted.get(&to).is_some_and(|target| *target == target_of(&route)) && there.insert(to) {
                    continue;
                }
                // A route that only changes is replaced below, so that no packet slips through in between.
                if !wanted.contains_key(&to) || there.contains(&to) {
                    remove_route(&self.requests, &route).await?;
                    removed.push(to);
                }
            }
        }
        let mut added = Vec::new();
        for (&to, &target) in wanted.iter().filter(|(to, _)| !there.contains(to)) {
            let message = RouteNetlinkMessage::NewRoute(route(to, target));
            let action = || format!("add a route to {to} through {}", self.settings.device);
            self.requests.change(message, NLM_F_CREATE | NLM_F_REPLACE, action).await?;
            added.push(to);
        }
        report.changed.extend(names("added", &added));
        report.changed.extend(names("removed", &removed));
        Ok(())
    }
}

fn names(what: &str, prefixes: &[IpNet]) -> Option<String> {
    if prefixes.is_empty() {
        return None;
    }
    let mut line = format!("routes {what} in table {ROUTE_TABLE}:");
    for prefix in prefixes.iter().take(NAMED_PREFIXES) {
        let _ = write!(line, " {prefix}");
    }
    if prefixes.len() > NAMED_PREFIXES {
        let _ = write!(line, " and {} more", prefixes.len() - NAMED_PREFIXES);
    }
    Some(line)
}

/// Takes an errno of `expected` for done.
fn tolerate(result: Result<(), KernelError>, expected: &[i32]) -> Result<(), KernelError> {
    match result {
        Err(KernelError::Refused { source, .. }) if source.raw_os_error().is_some_and(|e| expected.contains(&e)) => {
            Ok(())
        }
        other => other,
    }
}

async fn device_index(requests: &Requests, name: &str) -> Result<Option<u32>, KernelError> {
    Ok(requests.link(name).await?.map(|link| link.header.index))
}

/// The node's addresses that can be a source: not the IPv6 ones whose uniqueness is not settled.
async fn own_addresses(requests: &Requests) -> Result<BTreeSet<IpAddr>, KernelError> {
    let list = requests.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()), "addresses", &[]).await?;
    Ok(list
        .into_iter()
        .filter_map(|message| {
            let RouteNetlinkMessage::NewAddress(message) = message else { return None };
            let unsettled = AddressFlags::Tentative | AddressFlags::Dadfailed;
            let (mut local, mut address, mut usable) = (None, None, true);
            for attribute in message.attributes {
                match attribute {
                    AddressAttribute::Local(ip) => local = Some(ip),
                    AddressAttribute::Address(ip) => address = Some(ip),
                    AddressAttribute::Flags(flags) => usable = !flags.intersects(unsettled),
                    _ => {}
                }
            }
            local.or(address).filter(|_| usable)
        })
        .collect())
}

fn trunk_address(device: u32) -> AddressMessage {
    let mut message = AddressMessageBuilder::<Ipv4Addr>::new().index(device).address(TRUNK_ADDRESS, 32).build();
    message.header.scope = AddressScope::Link;
    message
}

fn neighbor(address: IpAddr, device: u32, mac: Option<Mac>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.ifindex = device;
    message.header.state = NeighbourState::Permanent;
    let (family, destination) = match address {
        IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
        IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
    };
    message.header.family = family;
    message.attributes.push(NeighbourAttribute::Destination(destination));
    if let Some(mac) = mac {
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    }
    message
}

fn route(to: IpNet, target: RouteTo) -> RouteMessage {
    let mut builder = RouteMessageBuilder::<IpAddr>::new().table_id(ROUTE_TABLE).protocol(ROUTE_PROTOCOL);
    match target {
        RouteTo::Trunk { device, .. } => builder = builder.output_interface(device).onlink(),
        RouteTo::Main => builder = builder.kind(RouteType::Throw),
    }
    let mut message = builder.build();
    message.header.scope = RouteScope::Universe;
    let (family, destination, gateway) = match to {
        IpNet::V4(net) => (AddressFamily::Inet, RouteAddress::Inet(net.network()), RouteAddress::Inet(GATEWAY_V4)),
        IpNet::V6(net) => (AddressFamily::Inet6, RouteAddress::Inet6(net.network()), RouteAddress::Inet6(GATEWAY_V6)),
    };
    message.header.address_family = family;
    message.header.destination_prefix_length = to.prefix_len();
    message.attributes.push(RouteAttribute::Destination(destination));
    if let RouteTo::Trunk { source, .. } = target {
        message.attributes.push(RouteAttribute::Gateway(gateway));
        message.attributes.extend(source.map(|source| RouteAttribute::PrefSource(source.into())));
    }
    message
}

async fn own_routes(requests: &Requests, family: AddressFamily) -> Result<Vec<RouteMessage>, KernelError> {
    let list = routes_of_table(requests, family, ROUTE_TABLE).await?;
    Ok(list
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })
        .collect())
}

fn destination(route: &RouteMessage) -> Option<IpNet> {
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    });
    let address = address.or(match route.header.address_family {
        AddressFamily::Inet => Some(IpAddr::from([0; 4])),
        AddressFamily::Inet6 => Some(IpAddr::from([0; 16])),
        _ => None,
    })?;
    IpNet::new(address, route.header.destination_prefix_length).ok()
}

/// What a route of the kernel's list does; a foreign form equals nothing that weir wants.
fn target_of(route: &RouteMessage) -> RouteTo {
    if route.header.kind == RouteType::Throw {
        return RouteTo::Main;
    }
    let (mut device, mut source, mut gateway) = (0, None, false);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => device = *index,
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some(IpAddr::V4(*address)),
            RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => source = Some(IpAddr::V6(*address)),
            RouteAttribute::Gateway(address) => {
                gateway = [RouteAddress::Inet(GATEWAY_V4), RouteAddress::Inet6(GATEWAY_V6)].contains(address);
            }
            _ => {}
        }
    }
    // Device 0 exists nowhere.
    RouteTo::Trunk { device: if gateway { device } else { 0 }, source }
}

async fn remove_route(requests: &Requests, route: &RouteMessage) -> Result<(), KernelError> {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: route.header.address_family,
        destination_prefix_length: route.header.destination_prefix_length,
        tos: route.header.tos,
        kind: route.header.kind,
        // RT_SCOPE_NOWHERE stands for any scope in a deletion.
        scope: RouteScope::NoWhere,
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Table(ROUTE_TABLE)];
    message.attributes.extend(
        route
            .attributes
            .iter()
            .filter(|attribute| matches!(attribute, RouteAttribute::Destination(_) | RouteAttribute::Priority(_)))
            .cloned(),
    );
    let action = || format!("remove {:?} from table {ROUTE_TABLE}", destination(route));
    // The kernel removes routes by itself when their device or source address goes.
    tolerate(requests.change(RouteNetlinkMessage::DelRoute(message), 0, action).await, &[libc::ESRCH])
}

fn rule(family: AddressFamily, device: &str) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message.header.action = RuleAction::ToTable;
    message.header.flags = RuleFlags::Invert;
    message.attributes = vec![
        RuleAttribute::Priority(RULE_PRIORITY),
        RuleAttribute::Table(ROUTE_TABLE),
        RuleAttribute::Iifname(device.to_owned()),
    ];
    message
}

/// Makes weir's rule the only one that selects its table, or removes it (`device` is `None`).
async fn rules(
    requests: &Requests,
    family: AddressFamily,
    device: Option<&str>,
    report: &mut HostReport,
) -> Result<(), KernelError> {
    let mut all = RuleMessage::default();
    all.header.family = family;
    let no_family = [libc::EOPNOTSUPP, libc::EAFNOSUPPORT];
    let version = if family == AddressFamily::Inet { "IPv4" } else { "IPv6" };
    let mut there = false;
    for message in requests.dump(RouteNetlinkMessage::GetRule(all), "rules", &no_family).await? {
        let RouteNetlinkMessage::NewRule(known) = message else { continue };
        let has = |attribute: &RuleAttribute| known.attributes.contains(attribute);
        if !has(&RuleAttribute::Table(ROUTE_TABLE)) {
            continue;
        }
        let right = device.is_some_and(|device| {
            has(&RuleAttribute::Priority(RULE_PRIORITY))
                && has(&RuleAttribute::Iifname(device.to_owned()))
                && known.header.flags.contains(RuleFlags::Invert)
                && known.header.src_len == 0
                && known.header.dst_len == 0
        });
        if right && !there {
            there = true;
            continue;
        }
        let action = || format!("remove the {version} rule for table {ROUTE_TABLE}");
        tolerate(requests.change(RouteNetlinkMessage::DelRule(known.clone()), 0, action).await, &[libc::ENOENT])?;
        report.changed.push(format!("{version} rule for table {ROUTE_TABLE} removed"));
    }
    if let Some(device) = device.filter(|_| !there) {
        let action = || format!("add the {version} rule for table {ROUTE_TABLE}");
        let message = RouteNetlinkMessage::NewRule(rule(family, device));
        tolerate(requests.change(message, NLM_F_CREATE | NLM_F_EXCL, action).await, &[libc::EEXIST])?;
        report.changed.push(format!(
            "{version} rule added: priority {RULE_PRIORITY}, all but what comes from {device}: table {ROUTE_TABLE}"
        ));
    }
    Ok(())
}

const RESERVED_PORTS: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

fn read(path: &Path) -> Result<String, KernelError> {
    fs::read_to_string(path).map_err(|source| KernelError::File { path: path.to_owned(), source })
}

/// The reserved ports. The kernel writes such a list into the first read's buffer, as far as it fits, and has nothing for a second one
/// (proc_do_large_bitmap, kernel/sysctl.c), so the buffer is larger than any list.
fn reserved_ports() -> Result<PortSet, KernelError> {
    let path = Path::new(RESERVED_PORTS);
    let mut text = vec![0; 1 << 19];
    let length = fs::File::open(path)
        .and_then(|mut file| file.read(&mut text))
        .map_err(|source| KernelError::File { path: path.to_owned(), source })?;
    read_ports(path, String::from_utf8_lossy(&text[..length]).trim())
}

fn write(path: &Path, text: &str) -> Result<(), KernelError> {
    fs::write(path, text).map_err(|source| KernelError::File { path: path.to_owned(), source })
}

fn ipv4_sysctl(device: &str, name: &str) -> PathBuf {
    Path::new("/proc/sys/net/ipv4/conf").join(device).join(name)
}

/// Sets a sysctl if it differs, and says so.
fn set(path: &Path, value: &str, why: &str, report: &mut HostReport) -> Result<(), KernelError> {
    let before = read(path)?;
    if before.trim() == value {
        return Ok(());
    }
    write(path, value)?;
    report.changed.push(format!("{} set to {value}, was {}: {why}", path.display(), before.trim()));
    Ok(())
}

fn device_sysctls(device: &str, v6: bool, report: &mut HostReport) -> Result<(), KernelError> {
    // The larger of `all` and the device's counts: a strict `all` (1) is only overruled by loose (2).
    let all = read(&ipv4_sysctl("all", "rp_filter"))?;
    let (value, why) = match all.trim() {
        "1" => ("2", "net.ipv4.conf.all.rp_filter is strict; what weir hands over has sources of any kind"),
        _ => ("0", "what weir hands over has sources of any kind"),
    };
    set(&ipv4_sysctl(device, "rp_filter"), value, why, report)?;
    let why = "a connection of this node to a service may end at this node";
    set(&ipv4_sysctl(device, "accept_local"), "1", why, report)?;
    let disabled = Path::new("/proc/sys/net/ipv6/conf").join(device).join("disable_ipv6");
    if v6 && disabled.exists() {
        set(&disabled, "0", "pods or services have IPv6 addresses", report)?;
    }
    Ok(())
}

/// Tells what a strict reverse path filter on an uplink breaks. It is the node's, so weir does not change it.
fn uplink_warnings(uplinks: &[String], report: &mut HostReport) -> Result<(), KernelError> {
    let all = read(&ipv4_sysctl("all", "rp_filter"))?;
    for uplink in uplinks {
        let path = ipv4_sysctl(uplink, "rp_filter");
        let own = match fs::read_to_string(&path) {
            Ok(own) => own,
            // An uplink that is missing is reported by whoever attaches to it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(KernelError::File { path, source }),
        };
        if all.trim().max(own.trim()) == "1" {
            report.warnings.push(format!(
                "the reverse path filter of {uplink} is strict (net.ipv4.conf.{{all,{uplink}}}.rp_filter, the larger \
                 counts): this node reaches pods through {TRUNK_HOST}, so packets that pods of other nodes send to \
                 this node's own addresses (a pod that talks to this kubelet) are dropped by the kernel as they \
                 come in on {uplink}; sysctl -w net.ipv4.conf.{uplink}.rp_filter=2"
            ));
        }
    }
    Ok(())
}

fn read_ports(path: &Path, text: &str) -> Result<PortSet, KernelError> {
    text.parse().map_err(|why| KernelError::Content { path: path.to_owned(), text: text.to_owned(), why })
}

/// What weir added to the reserved ports, by the record.
fn recorded(record: &Path) -> Result<PortSet, KernelError> {
    let text = match fs::read_to_string(record) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(PortSet::default()),
        Err(source) => return Err(KernelError::File { path: record.to_owned(), source }),
    };
    let known: Record = serde_json::from_str(&text).map_err(|error| KernelError::Content {
        path: record.to_owned(),
        text: text.clone(),
        why: format!("{error}; remove the file, and weir's ports from {RESERVED_PORTS}"),
    })?;
    read_ports(record, &known.reserved_ports)
}

fn remember(record: &Path, ports: &PortSet) -> Result<(), KernelError> {
    let failed = |source| KernelError::File { path: record.to_owned(), source };
    let folder = record.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(failed)?;
    // Renamed into place, so that a crash never leaves half a record.
    let file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    serde_json::to_writer(&file, &Record { reserved_ports: ports.to_string() })
        .map_err(|error| failed(error.into()))?;
    file.persist(record).map_err(|error| failed(error.error))?;
    Ok(())
}

/// Adds `ports` to the reserved ones; those that weir added before and no longer wants go.
fn reserve_ports(ports: &PortSet, record: &Path, report: &mut HostReport) -> Result<(), KernelError> {
    let path = Path::new(RESERVED_PORTS);
    let current = reserved_ports()?;
    let ours = recorded(record)?;
    let others = current.minus(&ours);
    let adding = ports.minus(&others);
    let next = others.union(ports);
    if adding != ours {
        // Written ahead: after a crash in between, more is taken back than was added, but only what was weir's or
        // nobody's.
        remember(record, &ours.union(&adding))?;
    }
    if next != current {
        write(path, &format!("{next}\n"))?;
        report.changed.push(format!("{RESERVED_PORTS} set to {next}, was {current}: weir's own ports"));
    }
    if adding != ours {
        remember(record, &adding)?;
    }
    Ok(())
}

fn release_ports(record: &Path, report: &mut HostReport) -> Result<(), KernelError> {
    let ours = recorded(record)?;
    if !ours.is_empty() {
        let path = Path::new(RESERVED_PORTS);
        let current = reserved_ports()?;
        let next = current.minus(&ours);
        if next != current {
            write(path, &format!("{next}\n"))?;
            report.changed.push(format!("{RESERVED_PORTS} set to {next}, was {current}"));
        }
    }
    match fs::remove_file(record) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::File { path: record.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}
