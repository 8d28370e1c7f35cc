//! What snapshots, programs and the kernel are told, from what is known.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use weir_cluster::{sockets::Listening, translate::Loaded};
use weir_dataplane::{
    attach::Owned,
    forwarding::{Forwarding, is_link_local, local_workloads},
    frame::IfIndex,
    model::{Device, Links, Neighbor, Node, Role, Route},
    snapshot::Rules,
};
use weir_nat::SnatPorts;
use weir_packet::{Mac, Protocol};

use crate::{
    kernel::{LOOPBACK_SOURCES, RoleRules, View},
    prefixes::Prefixes,
    run::RunError,
};

/// This node's own addresses, link-local ones (the trunk's among them) excepted.
pub(super) fn own_addresses(kernel: &View, roles: &RoleRules) -> Vec<IpAddr> {
    kernel.node_addresses(roles).into_iter().filter(|address| !is_link_local(*address)).collect()
}

/// The devices, routes and neighbours that forwarding is compiled from: the kernel's, weir.yaml's, what workloads told, and the
/// node's own kernel. Devices with an MTU above `max_mtu` are left out, but an uplink that was `known` stays as it was, also where it is
/// gone: the workers know uplinks by their places.
#[expect(clippy::too_many_arguments, reason = "each is a part of what links are assembled from")]
pub(super) fn assemble_links(
    kernel: &View,
    roles: &RoleRules,
    loaded: &Loaded,
    listening: &Listening,
    trunk_mac: Mac,
    learned: &BTreeMap<(IfIndex, IpAddr), Mac>,
    max_mtu: u32,
    known: &[Device],
) -> Links {
    let config = &loaded.config;
    let mut links = kernel.links(roles);
    // Of its own devices the kernel takes care.
    links.devices.retain(|device| device.mtu <= max_mtu || device.role == Role::Kernel);
    let is_there = |known: &&Device| links.devices.iter().any(|device| device.name == known.name);
    let missing: Vec<Device> = known.iter().filter(|known| !is_there(known)).cloned().collect();
    links.devices.extend(missing);
    // Uplinks in the order of weir.yaml: that is the order of the workers' ports.
    let place = |name: &str| config.devices.iter().position(|d| d.name == name).unwrap_or(usize::MAX);
    links.devices.sort_by_key(|device| (device.role != Role::Uplink, place(&device.name), device.index));
    let index_of = |links: &Links, name: &str| links.devices.iter().find(|d| d.name == name).map(|d| d.index);
    for route in &config.routes {
        if let Some(device) = index_of(&links, &route.device) {
            links.routes.push(Route { to: route.to, via: route.via, device, metric: 0 });
        }
    }
    for neighbor in &config.neighbors {
        if let Some(device) = index_of(&links, &neighbor.device) {
            links.neighbors.push(Neighbor { address: neighbor.address, mac: neighbor.mac, device });
        }
    }
    links.loopback_sources = LOOPBACK_SOURCES.to_vec();
    links.complete = true;
    links.listening.clone_from(&listening.tcp);
    for ((device, address), mac) in learned {
        links.neighbors.push(Neighbor { address: *address, mac: *mac, device: *device });
    }
    if !links.devices.iter().any(|d| d.role == Role::Host) {
        // The follower may not have seen the trunk yet that was made a moment ago.
        links.devices.push(Device {
            name: "host".into(),
            index: IfIndex::HOST,
            role: Role::Host,
            mac: trunk_mac,
            mtu: 65535,
            addresses: kernel.node_addresses(roles).into_iter().map(IpNet::from).collect(),
        });
    }
    links
}

/// What the programs take from the node's kernel.
pub(super) fn owned(loaded: &Loaded, rules: &Rules, snat: &SnatPorts, forwarding: &Forwarding) -> Owned {
    let cluster = &loaded.cluster;
    let own = cluster.nodes.iter().filter(|n| n.name == cluster.node_name);
    let mut prefixes: Vec<IpNet> = own.flat_map(Node::ranges).collect();
    // Within this node's pod range a pod more is nothing new.
    let ranges: Prefixes = prefixes.iter().copied().collect();
    let pods = local_workloads(cluster).flat_map(|(_, w)| &w.addresses).filter(|ip| !ranges.hold(**ip));
    prefixes.extend(pods.map(|ip| IpNet::from(*ip)));
    prefixes.extend(rules.services.owned_addresses().map(IpNet::from));
    prefixes.extend(&cluster.service_cidrs);
    // What the node listens on stays its kernel's, so that it is reached without weir too.
    let snat_ports: Vec<_> = snat.ranges().collect();
    let snat = [Protocol::TCP, Protocol::UDP, Protocol::SCTP]
        .into_iter()
        .flat_map(|protocol| snat_ports.iter().map(move |range| (protocol, range.clone())));
    let node_ports = rules.services.node_ports().map(|(protocol, port)| (protocol, port..=port));
    // In an order of its own, so that the same ones are equal.
    prefixes.sort_unstable();
    // Host endpoints rule what the node itself gets: weir takes all but failsafe ports, and punts what their policy allows.
    let governed = forwarding.devices().any(|(_, device)| device.host_endpoint.is_some());
    let all_ports = [Protocol::TCP, Protocol::UDP, Protocol::SCTP].map(|protocol| (protocol, 0..=u16::MAX));
    let all_ports = all_ports.into_iter().filter(|_| governed);
    // Those for some peers only are looked at by weir, which knows the peers.
    let failsafes = cluster.host_settings.failsafe_inbound.iter().filter(|failsafe| failsafe.net.is_none());
    let mut node_addresses = forwarding.local_addresses();
    if governed {
        node_addresses.extend(forwarding.shared_addresses());
    }
    Owned {
        prefixes,
        node_addresses,
        ports: node_ports.chain(snat).chain(all_ports).collect(),
        failsafe_ports: failsafes.map(|failsafe| (failsafe.protocol, failsafe.port)).collect(),
        own_ports: rules.services.own_frontends().to_vec(),
        governed,
    }
}

pub(super) fn role_rules(loaded: &Loaded) -> RoleRules {
    let of_role = |role: Role| loaded.config.devices.iter().filter(move |d| d.role == role).map(|d| d.name.clone());
    let workloads = local_workloads(&loaded.cluster).map(|(_, w)| w.device.clone());
    let ranges = loaded.cluster.nodes.iter().flat_map(Node::ranges);
    let pods = loaded.cluster.pools.iter().map(|pool| pool.cidr).chain(ranges);
    RoleRules::new(of_role(Role::Uplink), workloads.chain(of_role(Role::Workload))).with_pods(pods)
}

/// Whether the uplinks that the router was started with are as it can use them.
pub(super) fn check_running(kernel: &View, roles: &RoleRules, room: u32) -> Result<(), RunError> {
    for name in &roles.uplinks {
        match kernel.link(name) {
            Some(link) if link.mtu > room => {
                return Err(RunError::GrownMtu { device: name.clone(), mtu: link.mtu, room });
            }
            Some(_) => {}
            None => return Err(RunError::NoUplink(name.clone())),
        }
    }
    Ok(())
}
