//! What no object can be given, though it reads well: addresses that have a meaning of their own, and more objects than weir can number.
//!
//! A router's kernel or tables would refuse it later, when nobody can tell any more which object was to blame. So it is an error of that
//! object here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use weir_dataplane::{
    forwarding::MAX_ADJACENCIES,
    model::{Node, Role},
};
use weir_policy::{MAX_RULES_PER_ENDPOINT, model::Model};

use crate::{
    config::RouterConfig,
    resources::{
        Manifests,
        at::{At, Reporter},
    },
    text::Problems,
};

/// Addresses that no pod and no service has (the IANA special-purpose registries; the API server refuses them for endpoints and external
/// IPs), with what they are.
const SPECIAL_V4: [(Ipv4Net, &str); 5] = [
    (v4([0, 0, 0, 0], 8), "unspecified addresses"),
    (v4([127, 0, 0, 0], 8), "loopback addresses"),
    (v4([169, 254, 0, 0], 16), LINK_LOCAL),
    (v4([224, 0, 0, 0], 4), "multicast addresses"),
    (v4([255, 255, 255, 255], 32), "the broadcast address"),
];
const SPECIAL_V6: [(Ipv6Net, &str); 5] = [
    (v6(0, 0, 128), "the unspecified address"),
    (v6(0, 1, 128), "the loopback address"),
    (v6(0xfe80, 0, 10), LINK_LOCAL),
    (v6(0xff00, 0, 8), "multicast addresses"),
    (Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96), "IPv4 addresses in IPv6 form"),
];
const LINK_LOCAL: &str = "link-local addresses";

const fn v4([a, b, c, d]: [u8; 4], length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length)
}

const fn v6(first: u16, last: u16, length: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, last), length)
}

fn special() -> impl Iterator<Item = (IpNet, &'static str)> {
    let v4 = SPECIAL_V4.iter().map(|(net, what)| (IpNet::V4(*net), *what));
    v4.chain(SPECIAL_V6.iter().map(|(net, what)| (IpNet::V6(*net), *what)))
}

/// Whether [`usable`] would have nothing to say, for those who ask about very many addresses.
pub(super) fn is_usable(address: IpAddr) -> bool {
    !special().any(|(net, _)| net.contains(&address))
}

/// The address of a pod or a service, unless it cannot be one, which is reported.
pub(super) fn usable(report: &mut Reporter<'_>, at: At<'_>, field: &str, address: Option<IpAddr>) -> Option<IpAddr> {
    let address = address?;
    let Some((net, what)) = special().find(|(net, _)| net.contains(&address)) else { return Some(address) };
    let help = "write an address that packets on a network can have".to_owned();
    report.error(at, format_args!("{field}: {address} is of {net}, {what}"), help);
    None
}

/// As [`usable`], for addresses that may be link-local: a load balancer on the link may have them.
pub(super) fn usable_on_link(
    report: &mut Reporter<'_>,
    at: At<'_>,
    field: &str,
    address: Option<IpAddr>,
) -> Option<IpAddr> {
    let is_link_local = |address: &IpAddr| special().any(|(net, what)| what == LINK_LOCAL && net.contains(address));
    match address.filter(is_link_local) {
        Some(address) => Some(address),
        None => usable(report, at, field, address),
    }
}

/// As [`usable`], for addresses of pods. Those may be link-local or multicast addresses: that makes little sense, but upstream's own tests of policy
/// have such pods, and it harms nobody.
pub(super) fn usable_of_pod(
    report: &mut Reporter<'_>,
    at: At<'_>,
    field: &str,
    address: Option<IpAddr>,
) -> Option<IpAddr> {
    match address.filter(IpAddr::is_multicast) {
        Some(address) => Some(address),
        None => usable_on_link(report, at, field, address),
    }
}

/// The range that pods have addresses of, unless it cannot be one, which is reported. Weir takes it from the node's kernel, which must keep
/// its own ways.
pub(super) fn usable_range(report: &mut Reporter<'_>, at: At<'_>, field: &str, net: IpNet) -> Option<IpNet> {
    usable_range_of(report, at, field, net, "pods have addresses of")
}

/// As [`usable_range`], of what else the range is of.
pub(super) fn usable_range_of(
    report: &mut Reporter<'_>,
    at: At<'_>,
    field: &str,
    net: IpNet,
    what_for: &str,
) -> Option<IpNet> {
    let help = format!("write the range that {what_for}");
    if net.prefix_len() == 0 {
        report.error(at, format_args!("{field}: {net} is every address, the nodes' own too"), help);
        return None;
    }
    if let Some((special, what)) = special().find(|(other, _)| other.contains(&net) || net.contains(other)) {
        report.error(at, format_args!("{field}: {net} overlaps {special}, {what}"), help);
        return None;
    }
    Some(net)
}

/// How many next hops may still be given out. Those of gateways and neighbours are known to a running router only.
pub(super) struct NextHops {
    left: usize,
}

impl NextHops {
    const FOR_GATEWAYS_AND_NEIGHBOURS: usize = 4096;

    pub(super) fn new() -> Self {
        Self { left: MAX_ADJACENCIES - Self::FOR_GATEWAYS_AND_NEIGHBOURS }
    }

    /// Takes those of a node: one by each family, and its tunnel. `false` where they are all gone.
    pub(super) fn take_node(&mut self, node: &Node) -> bool {
        let has = |is_ipv6: bool| node.internal_ips.iter().any(|ip| ip.is_ipv6() == is_ipv6);
        self.take(2 * usize::from(node.ipv4_address.is_some() || has(false)) + usize::from(has(true)))
    }

    /// Takes those of a pod of this node: one by each family. `false` where they are all gone.
    pub(super) fn take_pod(&mut self, addresses: &[IpAddr]) -> bool {
        let has = |is_ipv6: bool| addresses.iter().any(|ip| ip.is_ipv6() == is_ipv6);
        self.take(usize::from(has(false)) + usize::from(has(true)))
    }

    fn take(&mut self, count: usize) -> bool {
        let left = self.left.checked_sub(count);
        self.left = left.unwrap_or(self.left);
        left.is_some()
    }
}

/// Devices that are never a pod's, besides those of weir.yaml: the node's loopback, and weir's own.
const NOT_OF_PODS: [&str; 3] = ["lo", "weir0", "weir1"];
/// The longest name that a device has (IFNAMSIZ without its zero).
const MAX_DEVICE_NAME: usize = 15;

/// The name of the host's end of a pod's veth pair, unless it cannot be one (dev_valid_name of the kernel), which is reported. What weir
/// takes for a pod's device, it takes all packets from.
pub(super) fn usable_device(
    report: &mut Reporter<'_>,
    at: At<'_>,
    field: &str,
    name: String,
    config: &RouterConfig,
) -> Option<String> {
    let is_valid = name.len() <= MAX_DEVICE_NAME
        && ![".", ".."].contains(&name.as_str())
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
    let help = "write the name of the host's end of its veth pair".to_owned();
    if !is_valid {
        report.error(at, format_args!("{field}: {name:?} is no name that a device can have"), help);
        return None;
    }
    let is_of_node = |device: &str| config.devices.iter().any(|d| d.name == device && d.role != Role::Workload);
    if NOT_OF_PODS.contains(&name.as_str()) || is_of_node(&name) {
        report.error(at, format_args!("{field}: {name} is the node's own device"), help);
        return None;
    }
    Some(name)
}

/// Reports policies that no workload could have, as they alone have more rules than one can have.
pub(super) fn too_many_rules(model: &Model, manifests: &Manifests, problems: &mut Problems) {
    for policy in model.tiers.iter().flat_map(|tier| &tier.policies) {
        for (direction, rules) in [("ingress", &policy.ingress), ("egress", &policy.egress)] {
            let count = rules.as_ref().map_or(0, Vec::len);
            if count <= MAX_RULES_PER_ENDPOINT {
                continue;
            }
            if let Some(place) = manifests.place(policy.origin) {
                let message = format!(
                    "{}: {count} {direction} rules are more than the {MAX_RULES_PER_ENDPOINT} that a workload can have",
                    policy.name
                );
                problems.error(place, message, "give rules several peers or ports each".to_owned());
            }
        }
    }
}
