//! A pod's network in the kernel.
//!
//! As Calico makes it, with these choices of weir's:
//!
//! - The pod's neighbours (its gateways) are permanent, where Calico lets the pod ask. Weir's programs take all that a pod sends, ARP too, so
//!   while no router runs nobody would answer, and flows that the kernel carries meanwhile would end with the neighbour.
//! - No proxy_arp, no rp_filter, no route on the host's side: nothing that a pod sends gets as far as the node's IP, and the node's own
//!   kernel reaches pods by `weir0`.
//! - No duplicate address detection at either end: a link of two ends whose addresses weir gives needs none, and a tentative address is one
//!   that a pod's first packets cannot use (RFC 4862, 5.4).
//! - The host end comes up first: then the pod's end finds a carrier as it comes up, and its queue is there at once. The other way round the
//!   kernel does that later, and drops what the pod sends until then.

use std::{
    fs, io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    str::FromStr,
};

use rtnetlink::{
    packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
        link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
    },
};
use weir_cni::wire::{Attachment, GATEWAY_V4, GATEWAY_V6};
use weir_packet::Mac;

use super::{
    HOST_MAC,
    netlink::{Netlink, in_namespace},
};

/// What host ends' names begin with.
const PREFIX: &str = "cali";
/// What weir's aliases begin with.
const ALIAS: &str = "weir-cni";
/// A device's alias is shorter than IFALIASZ, 256 bytes (include/uapi/linux/if.h), the zero that netlink sends behind it included.
const MAX_ALIAS: usize = 254;

/// Why the kernel did not make a pod's network.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No rtnetlink socket.
    #[error("no rtnetlink socket: {0}; weir needs CAP_NET_ADMIN")]
    Open(#[source] io::Error),
    /// The pod's namespace cannot be entered.
    #[error(
        "the pod's network namespace cannot be entered: {0}; weir needs CAP_SYS_ADMIN, and CNI_NETNS must be a network namespace"
    )]
    Namespace(#[source] io::Error),
    /// The namespace is the node's own.
    #[error("CNI_NETNS is the node's own network namespace; a pod of the host's network needs no CNI")]
    OwnNamespace,
    /// The kernel refused something.
    #[error("the kernel refused to {action}: {source}")]
    Refused {
        /// What, to stand after "refused to".
        action: String,
        /// Why.
        source: io::Error,
    },
    /// There is such an interface in the pod already.
    #[error("there is an interface {0} in the pod's namespace already, which weir did not make")]
    Occupied(String),
    /// A sysctl cannot be written.
    #[error("{path}: {source}; weir needs a writable /proc/sys", path = .path.display())]
    Sysctl {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A pod's pair of devices, as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The host end.
    pub device: String,
    /// The pod's end.
    pub interface: String,
    /// MAC address of the pod's end.
    pub mac: Mac,
    /// MTU of both, in bytes.
    pub mtu: u32,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// What the host end says about itself.
    pub alias: Alias,
}

/// What a host end says about itself: enough to find its record again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alias {
    /// Whose it is.
    pub attachment: Attachment,
    /// MAC address of the pod's end.
    pub mac: Mac,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// Namespace and name of the pod, if there is room.
    pub pod: Option<(String, String)>,
}

impl Alias {
    /// As it is written on the device; `None` where not even the addresses find room.
    pub fn text(&self) -> Option<String> {
        let addresses = self.addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",");
        let Attachment { sandbox, interface } = &self.attachment;
        let short = format!("{ALIAS} {sandbox} {interface} {} {addresses}", self.mac);
        let long = self.pod.as_ref().map(|(namespace, name)| format!("{short} {namespace}/{name}"));
        long.into_iter().chain([short]).find(|text| text.len() <= MAX_ALIAS)
    }
}

impl FromStr for Alias {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut words = text.split(' ');
        if words.next() != Some(ALIAS) {
            return Err(());
        }
        let (sandbox, interface) = (words.next().ok_or(())?, words.next().ok_or(())?);
        let attachment = Attachment::new(sandbox, interface).map_err(drop)?;
        let mac = words.next().ok_or(())?.parse().map_err(drop)?;
        let addresses = words.next().ok_or(())?;
        let addresses = addresses.split(',').map(str::parse).collect::<Result<_, _>>().map_err(drop)?;
        let pod = words.next().and_then(|pod| pod.split_once('/')).map(|(n, p)| (n.to_owned(), p.to_owned()));
        Ok(Self { attachment, mac, addresses, pod })
    }
}

/// A host end that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostEnd {
    /// Its name.
    pub name: String,
    /// Whether it is up.
    pub up: bool,
    /// Its MTU, in bytes.
    pub mtu: u32,
    /// What weir wrote on it; `None` on those that weir has not brought up.
    pub alias: Option<Alias>,
}

/// An open network namespace.
pub type Namespace<'n> = &'n fs::File;

/// The kernel, as far as pods are concerned. A trait, so that tests can end at every step.
pub trait Kernel: Send + Sync {
    /// Makes a pair, both ends down, the pod's in its namespace. A host end of that name that is there goes first: the name is this pod's now.
    ///
    /// # Errors
    /// Where it cannot; then there is neither.
    fn create(&self, pair: &Pair, namespace: Namespace<'_>) -> Result<(), KernelError>;
    /// Brings both ends up and gives the pod its addresses and routes.
    ///
    /// # Errors
    /// Where something of it fails; what is done stays.
    fn bring_up(&self, pair: &Pair, namespace: Namespace<'_>) -> Result<(), KernelError>;
    /// Removes a pair by its host end. Whether it was there.
    ///
    /// # Errors
    /// Where it stays.
    fn remove(&self, device: &str) -> Result<bool, KernelError>;
    /// The host end of that name.
    ///
    /// # Errors
    /// Where the kernel does not say.
    fn host_end(&self, device: &str) -> Result<Option<HostEnd>, KernelError>;
    /// All host ends, those that say that they are weir's and have another name by now among them.
    ///
    /// # Errors
    /// Where the kernel does not say.
    fn host_ends(&self) -> Result<Vec<HostEnd>, KernelError>;
    /// What of the pod is not as it should be, in the words of an error; `None` if all is.
    ///
    /// # Errors
    /// Where the kernel does not say.
    fn difference(&self, pair: &Pair, namespace: Namespace<'_>) -> Result<Option<String>, KernelError>;
}

/// The kernel of this node, in the network namespace of the thread that calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct NodeKernel;

impl Kernel for NodeKernel {
    fn create(&self, pair: &Pair, namespace: Namespace<'_>) -> Result<(), KernelError> {
        let mut node = Netlink::open().map_err(KernelError::Open)?;
        let made = match create_pair(&mut node, pair, namespace) {
            Err(error) if is(&error, libc::EEXIST) => {
                if !remove(&mut node, &pair.device)? {
                    return Err(KernelError::Occupied(pair.interface.clone()));
                }
                create_pair(&mut node, pair, namespace)
            }
            other => other,
        };
        match made {
            Err(error) if is(&error, libc::EEXIST) => return Err(KernelError::Occupied(pair.interface.clone())),
            // That is all it says of a descriptor that is no network namespace.
            Err(error) if is(&error, libc::EINVAL) => {
                in_namespace(namespace, || Ok(())).map_err(KernelError::Namespace)?;
                return Err(error);
            }
            other => other?,
        }
        let prepared = host_sysctls(pair).and_then(|()| {
            let interface = pair.interface.as_str();
            let v6 = has_v6(pair);
            let outcome = in_namespace(namespace, || Ok(pod_sysctls(interface, v6)));
            outcome.map_err(KernelError::Namespace)?
        });
        if prepared.is_err() {
            remove(&mut node, &pair.device)?;
        }
        prepared
    }

    fn bring_up(&self, pair: &Pair, namespace: Namespace<'_>) -> Result<(), KernelError> {
        let mut node = Netlink::open().map_err(KernelError::Open)?;
        let mut pod = in_namespace(namespace, Netlink::open).map_err(KernelError::Namespace)?;
        let device = &pair.device;

        let mut up = LinkMessage::default();
        up.header.flags = LinkFlags::Up;
        up.header.change_mask = LinkFlags::Up;
        let mut host_up = up.clone();
        host_up.attributes = vec![LinkAttribute::IfName(device.clone())];
        host_up.attributes.extend(pair.alias.text().map(LinkAttribute::IfAlias));
        change(&mut node, RouteNetlinkMessage::SetLink(host_up), 0, || format!("bring up {device}"))?;

        let interface = &pair.interface;
        let link = link(&mut pod, interface)?.ok_or_else(|| KernelError::Refused {
            action: format!("find {interface} in the pod"),
            source: io::ErrorKind::NotFound.into(),
        })?;
        let index = link.header.index;
        up.header.index = index;
        change(&mut pod, RouteNetlinkMessage::SetLink(up), 0, || format!("bring up {interface} in the pod"))?;
        for address in &pair.addresses {
            let gateway = gateway(address);
            let create = NLM_F_CREATE | NLM_F_EXCL;
            let action = || format!("give {address} to {interface} in the pod");
            change(&mut pod, RouteNetlinkMessage::NewAddress(address_message(index, *address)), create, action)?;
            let action = || format!("set the neighbour {gateway} of the pod");
            let message = RouteNetlinkMessage::NewNeighbour(neighbour_message(index, gateway));
            change(&mut pod, message, NLM_F_CREATE | NLM_F_REPLACE, action)?;
            for route in route_messages(index, gateway) {
                let action = || format!("add the pod's route by {gateway}");
                change(&mut pod, RouteNetlinkMessage::NewRoute(route), create, action)?;
            }
        }
        Ok(())
    }

    fn remove(&self, device: &str) -> Result<bool, KernelError> {
        remove(&mut Netlink::open().map_err(KernelError::Open)?, device)
    }

    fn host_end(&self, device: &str) -> Result<Option<HostEnd>, KernelError> {
        let mut node = Netlink::open().map_err(KernelError::Open)?;
        Ok(link(&mut node, device)?.as_ref().map(host_end))
    }

    fn host_ends(&self) -> Result<Vec<HostEnd>, KernelError> {
        let mut node = Netlink::open().map_err(KernelError::Open)?;
        let list = list(&mut node, RouteNetlinkMessage::GetLink(LinkMessage::default()), "devices")?;
        let links = list.iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) if is_veth(link) => Some(host_end(link)),
            _ => None,
        });
        Ok(links.filter(|end| end.name.starts_with(PREFIX) || end.alias.is_some()).collect())
    }

    fn difference(&self, pair: &Pair, namespace: Namespace<'_>) -> Result<Option<String>, KernelError> {
        let Some(end) = self.host_end(&pair.device)? else {
            return Ok(Some(format!("{} is not there", pair.device)));
        };
        if !end.up {
            return Ok(Some(format!("{} is down", pair.device)));
        }
        let mut pod = in_namespace(namespace, Netlink::open).map_err(KernelError::Namespace)?;
        let interface = &pair.interface;
        let Some(link) = link(&mut pod, interface)? else {
            return Ok(Some(format!("there is no {interface} in the pod")));
        };
        let index = link.header.index;
        let mac = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac),
            _ => None,
        });
        if mac != Some(pair.mac) {
            let mac = mac.map_or("none".into(), |mac| mac.to_string());
            return Ok(Some(format!("{interface} has the MAC address {mac}, not {}", pair.mac)));
        }
        if !link.header.flags.contains(LinkFlags::Up) {
            return Ok(Some(format!("{interface} is down")));
        }
        if !link.attributes.contains(&LinkAttribute::Mtu(pair.mtu)) {
            return Ok(Some(format!("the MTU of {interface} is not {}", pair.mtu)));
        }
        for address in &pair.addresses {
            let mut of_family = AddressMessage::default();
            of_family.header.family = family(*address);
            let there = any(&mut pod, RouteNetlinkMessage::GetAddress(of_family), "the pod's addresses", |message| {
                matches!(message, RouteNetlinkMessage::NewAddress(found)
                    if found.header.index == index && found.attributes.contains(&AddressAttribute::Address(*address)))
            });
            if !there? {
                return Ok(Some(format!("{interface} does not have {address}")));
            }
            let gateway = gateway(address);
            let mut of_family = RouteMessage::default();
            of_family.header.address_family = family(gateway);
            let there = any(&mut pod, RouteNetlinkMessage::GetRoute(of_family), "the pod's routes", |message| {
                matches!(message, RouteNetlinkMessage::NewRoute(found)
                    if found.header.destination_prefix_length == 0
                        && found.attributes.contains(&RouteAttribute::Oif(index))
                        && found.attributes.contains(&RouteAttribute::Gateway(route_address(gateway))))
            });
            if !there? {
                return Ok(Some(format!("the pod has no default route by {gateway}")));
            }
        }
        Ok(None)
    }
}

fn has_v6(pair: &Pair) -> bool {
    pair.addresses.iter().any(IpAddr::is_ipv6)
}

fn gateway(address: &IpAddr) -> IpAddr {
    if address.is_ipv4() { GATEWAY_V4.into() } else { GATEWAY_V6.into() }
}

fn is(error: &KernelError, errno: i32) -> bool {
    matches!(error, KernelError::Refused { source, .. } if source.raw_os_error() == Some(errno))
}

/// Asks for both ends at once: neither is there without the other, and the pod's has its final name where it is made.
fn create_pair(node: &mut Netlink, pair: &Pair, namespace: Namespace<'_>) -> Result<(), KernelError> {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(pair.interface.clone()),
        LinkAttribute::Mtu(pair.mtu),
        LinkAttribute::Address(pair.mac.0.to_vec()),
        LinkAttribute::NetNsFd(namespace.as_fd().as_raw_fd()),
    ];
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(pair.device.clone()),
        LinkAttribute::Mtu(pair.mtu),
        LinkAttribute::Address(HOST_MAC.0.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    let action = || format!("make the pair {} and {} in the pod", pair.device, pair.interface);
    change(node, RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL, action)
}

fn remove(node: &mut Netlink, device: &str) -> Result<bool, KernelError> {
    let Some(link) = link(node, device)? else { return Ok(false) };
    let mut message = LinkMessage::default();
    message.header.index = link.header.index;
    match change(node, RouteNetlinkMessage::DelLink(message), 0, || format!("remove {device}")) {
        // It went with the pod's namespace meanwhile.
        Err(error) if is(&error, libc::ENODEV) => Ok(false),
        other => other.map(|()| true),
    }
}

fn link(netlink: &mut Netlink, name: &str) -> Result<Option<LinkMessage>, KernelError> {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    match netlink.get(RouteNetlinkMessage::GetLink(message)) {
        Ok(Some(RouteNetlinkMessage::NewLink(link))) => Ok(Some(link)),
        Ok(_) => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(source) => Err(KernelError::Refused { action: format!("describe {name}"), source }),
    }
}

fn is_veth(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(info) => info.contains(&LinkInfo::Kind(InfoKind::Veth)),
        _ => false,
    })
}

fn host_end(link: &LinkMessage) -> HostEnd {
    let mut end = HostEnd { name: String::new(), up: link.header.flags.contains(LinkFlags::Up), mtu: 0, alias: None };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => end.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => end.mtu = *mtu,
            LinkAttribute::IfAlias(alias) => end.alias = alias.parse().ok(),
            _ => {}
        }
    }
    end
}

fn address_message(index: u32, address: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = if address.is_ipv4() { 32 } else { 128 };
    message.header.index = index;
    message.header.scope = AddressScope::Universe;
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    if address.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message
}

fn neighbour_message(index: u32, gateway: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(gateway);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    let destination = match gateway {
        IpAddr::V4(gateway) => NeighbourAddress::Inet(gateway),
        IpAddr::V6(gateway) => NeighbourAddress::Inet6(gateway),
    };
    message.attributes =
        vec![NeighbourAttribute::Destination(destination), NeighbourAttribute::LinkLayerAddress(HOST_MAC.0.to_vec())];
    message
}

/// IPv4's gateway has to be reachable by a route of its own; a link-local gateway is on its link by definition.
fn route_messages(index: u32, gateway: IpAddr) -> Vec<RouteMessage> {
    let route = |scope| {
        let mut message = RouteMessage::default();
        message.header.address_family = family(gateway);
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Boot;
        message.header.scope = scope;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![RouteAttribute::Oif(index)];
        message
    };
    let mut routes = Vec::new();
    if gateway.is_ipv4() {
        let mut on_link = route(RouteScope::Link);
        on_link.header.destination_prefix_length = 32;
        on_link.attributes.push(RouteAttribute::Destination(route_address(gateway)));
        routes.push(on_link);
    }
    let mut default = route(RouteScope::Universe);
    default.attributes.push(RouteAttribute::Gateway(route_address(gateway)));
    routes.push(default);
    routes
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

fn change(
    netlink: &mut Netlink,
    message: RouteNetlinkMessage,
    flags: u16,
    action: impl FnOnce() -> String,
) -> Result<(), KernelError> {
    netlink.change(message, flags).map_err(|source| KernelError::Refused { action: action(), source })
}

fn list(
    netlink: &mut Netlink,
    message: RouteNetlinkMessage,
    what: &str,
) -> Result<Vec<RouteNetlinkMessage>, KernelError> {
    netlink.list(&message).map_err(|source| KernelError::Refused { action: format!("list {what}"), source })
}

fn any(
    netlink: &mut Netlink,
    message: RouteNetlinkMessage,
    what: &str,
    is_it: impl Fn(&RouteNetlinkMessage) -> bool,
) -> Result<bool, KernelError> {
    netlink.any(&message, is_it).map_err(|source| KernelError::Refused { action: format!("list {what}"), source })
}

/// On the host's side. A pod without IPv6 needs no IPv6 there: that saves an address, a route and events for each.
fn host_sysctls(pair: &Pair) -> Result<(), KernelError> {
    let v6 = has_v6(pair);
    v6_sysctls(
        &pair.device,
        &[("accept_ra", "0"), ("accept_dad", "0"), ("disable_ipv6", if v6 { "0" } else { "1" })],
        v6,
    )
}

/// In the pod. Without an IPv6 address of weir's, what the runtime or the kernel has set stays.
fn pod_sysctls(interface: &str, v6: bool) -> Result<(), KernelError> {
    if !v6 {
        return Ok(());
    }
    // Some runtimes turn IPv6 off for the whole namespace, the loopback device included.
    for of in ["all", "default", "lo"] {
        v6_sysctls(of, &[("disable_ipv6", "0")], true)?;
    }
    v6_sysctls(interface, &[("accept_ra", "0"), ("accept_dad", "0"), ("disable_ipv6", "0")], true)
}

/// Writes what differs. A kernel without IPv6 has none of these, which matters only where IPv6 is needed.
fn v6_sysctls(of: &str, settings: &[(&str, &str)], needed: bool) -> Result<(), KernelError> {
    let folder = Path::new("/proc/sys/net/ipv6/conf").join(of);
    for (name, value) in settings {
        let path = folder.join(name);
        let written = match fs::read_to_string(&path) {
            Ok(text) if text.trim() == *value => Ok(()),
            Ok(_) => fs::write(&path, value),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !needed => Ok(()),
            Err(error) => Err(error),
        };
        written.map_err(|source| KernelError::Sysctl { path, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alias(sandbox: usize, name: usize) -> Alias {
        Alias {
            attachment: Attachment::new(&"s".repeat(sandbox), "eth0").unwrap(),
            mac: Mac([2, 0, 0, 0, 0, 1]),
            addresses: vec!["10.244.7.1".parse().unwrap(), "fd00:244::7:1".parse().unwrap()],
            pod: Some(("default".into(), "n".repeat(name))),
        }
    }

    #[test]
    fn an_alias_is_read_as_it_was_written_and_leaves_out_what_has_no_room() {
        for name in 1..253 {
            let alias = alias(64, name);
            let text = alias.text().unwrap();
            assert!(text.len() <= MAX_ALIAS);
            let read: Alias = text.parse().unwrap();
            // 9 + 64 + 1 + 4 + 1 + 17 + 1 + 24 + 1 + 8 = 130 characters stand before the name.
            let expected = if name <= MAX_ALIAS - 130 { alias } else { Alias { pod: None, ..alias } };
            assert_eq!(read, expected, "{text}");
        }
        assert_eq!(alias(200, 1).text(), None, "a part of it would be read as something else");
        for other in [
            "",
            "weir-cni",
            "weir-cni a eth0",
            "weir-cni a eth0 02:00:00:00:00:01",
            "weir-cni a eth0 02:00:00:00:00:01 10.0.0.",
            "to the switch",
        ] {
            assert_eq!(other.parse::<Alias>(), Err(()), "{other}");
        }
    }
}
