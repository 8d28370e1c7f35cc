//! `weir demo --memory`: the scenario over memory rings, without privileges or real traffic.
//!
//! Two routers, a switch between them, and pods that answer a SYN with a SYN-ACK: every packet is made and read with etherparse.

use std::{collections::BTreeMap, net::Ipv4Addr, path::Path, sync::Arc, time::Duration};

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use weir_cluster::translate;
use weir_dataplane::{
    frame::IfIndex,
    model::{Cluster, Device, Links, Neighbor, Role},
};
use weir_lab::LabError;
use weir_node::{memory_router::MemoryRouter, report::counters_json};
use weir_packet::Mac;

use crate::demo::{Checklist, FILES, expected_flows, law};

const NODES: [(&str, Ipv4Addr, Mac); 2] = [
    ("node-a", Ipv4Addr::new(192, 168, 10, 1), Mac([2, 0, 0, 0, 10, 1])),
    ("node-b", Ipv4Addr::new(192, 168, 10, 2), Mac([2, 0, 0, 0, 10, 2])),
];
const CLIENT: (Ipv4Addr, Mac) = (Ipv4Addr::new(192, 168, 10, 100), Mac([2, 0, 0, 0, 10, 100]));
const HOST_END: Mac = Mac([0xee; 6]);
const UPLINK: &str = "eth0";
const NODE_PORT: u16 = 31380;

/// Runs the scenario; how much was not as expected.
///
/// # Errors
/// Where the embedded scenario cannot be loaded.
pub fn run() -> Result<u32, LabError> {
    let mut list = Checklist::default();
    list.section("Building the cluster over memory rings");
    let mut network = Network::build()?;
    println!("  two routers, {} pods, an outside client", network.cluster.workloads.len());

    list.section("Who reaches whom (NetworkPolicy, through cluster IPs)");
    let mut port = 40_000;
    for flow in expected_flows() {
        port += 1;
        let destination = flow.dst.parse().unwrap_or(Ipv4Addr::UNSPECIFIED);
        let seen = if network.connect_from_pod(&flow.src, port, destination, flow.dport)? { "allow" } else { "deny" };
        let line = format!(
            "{:<18} -> {:<15} port {:<5} expected {:<6} seen {seen}",
            flow.src, flow.dst, flow.dport, flow.expect
        );
        list.check(seen == flow.expect, &line);
    }

    list.section("The tunnel");
    let tunnelled = network.tunnelled;
    list.check(tunnelled > 0, &format!("{tunnelled} packets crossed between the nodes in IPIP"));

    list.section(&format!("Node port {NODE_PORT} from the outside client"));
    for (node, (name, address, _)) in NODES.iter().enumerate() {
        let answered = network.connect_from_outside(node, 50_000 + node as u16, *address, NODE_PORT)?;
        list.check(answered, &format!("through {name} ({address})"));
    }

    list.section("Counters: rx + generated = tx + drops + punted + consumed + held");
    for (node, (name, ..)) in NODES.iter().enumerate() {
        let totals = counters_json(&network.routers[node].finish());
        list.check(law(&totals), &format!("{name}: {totals}"));
    }
    Ok(list.failures())
}

/// The routers, and what is between and behind them.
struct Network {
    routers: Vec<MemoryRouter>,
    cluster: Arc<Cluster>,
    /// Node and device of each pod.
    places: BTreeMap<String, (usize, String)>,
    clock: Duration,
    tunnelled: u32,
}

/// A packet that reached a pod or the client.
struct Arrival {
    node: usize,
    device: String,
    bytes: Vec<u8>,
}

impl Network {
    fn build() -> Result<Self, LabError> {
        let folder = tempfile::tempdir().map_err(|source| LabError::File { path: std::env::temp_dir(), source })?;
        for (name, text) in FILES {
            let path = folder.path().join(name);
            std::fs::write(&path, text).map_err(|source| LabError::File { path, source })?;
        }
        let mut routers = Vec::new();
        let mut cluster = Arc::default();
        for (name, ..) in NODES {
            let (router, its_cluster) = router(folder.path(), name)?;
            routers.push(router);
            cluster = its_cluster;
        }
        let place = |workload: &weir_dataplane::model::Workload| {
            let node = NODES.iter().position(|(name, ..)| workload.node.as_deref() == Some(name))?;
            Some((workload.name.clone(), (node, workload.device.clone())))
        };
        let places = cluster.workloads.iter().filter_map(place).collect();
        Ok(Self { routers, cluster, places, clock: Duration::ZERO, tunnelled: 0 })
    }

    /// Sends a frame into a node's device, carries what comes out across the switch, and returns what reached a pod or the client.
    fn send(&mut self, node: usize, device: &str, frame: &[u8]) -> Result<Vec<Arrival>, LabError> {
        let mut arrivals = Vec::new();
        let mut on_the_way = vec![(node, device.to_owned(), frame.to_vec())];
        while let Some((node, device, frame)) = on_the_way.pop() {
            self.clock += Duration::from_micros(50);
            let router = &mut self.routers[node];
            let Some(index) = router.devices().iter().position(|d| d.name == device) else { continue };
            router
                .packet(index, &frame, self.clock)
                .map_err(|e| LabError::Command { command: "weir".into(), message: e.to_string() })?;
            let mut sent = Vec::new();
            router.drain_sent(|device, bytes| sent.push((device.to_owned(), bytes.to_vec())));
            for (device, bytes) in sent {
                let to = NODES.iter().position(|(_, _, mac)| bytes.starts_with(&mac.0));
                match to.filter(|_| device == UPLINK) {
                    Some(other) => {
                        const IPIP: u8 = 4;
                        self.tunnelled += u32::from(bytes.get(23) == Some(&IPIP));
                        on_the_way.push((other, UPLINK.into(), bytes));
                    }
                    None => arrivals.push(Arrival { node, device, bytes }),
                }
            }
        }
        Ok(arrivals)
    }

    /// Opens a TCP connection from a pod; whether the SYN-ACK of whom it called came back.
    fn connect_from_pod(&mut self, pod: &str, port: u16, to: Ipv4Addr, to_port: u16) -> Result<bool, LabError> {
        let Some((node, device)) = self.places.get(pod).cloned() else { return Ok(false) };
        let from = self.cluster.workloads.iter().find(|w| w.name == pod).and_then(|w| match w.addresses.first() {
            Some(std::net::IpAddr::V4(address)) => Some(*address),
            _ => None,
        });
        let Some(from) = from else { return Ok(false) };
        let syn = segment(pod_mac(from), HOST_END, (from, port), (to, to_port), None);
        self.connect(node, &device, &syn, (from, port), (to, to_port))
    }

    /// Opens a TCP connection from the outside client to a node.
    fn connect_from_outside(&mut self, node: usize, port: u16, to: Ipv4Addr, to_port: u16) -> Result<bool, LabError> {
        let syn = segment(CLIENT.1, NODES[node].2, (CLIENT.0, port), (to, to_port), None);
        self.connect(node, UPLINK, &syn, (CLIENT.0, port), (to, to_port))
    }

    fn connect(
        &mut self,
        node: usize,
        device: &str,
        syn: &[u8],
        from: (Ipv4Addr, u16),
        to: (Ipv4Addr, u16),
    ) -> Result<bool, LabError> {
        for arrival in self.send(node, device, syn)? {
            let Some((client, server)) = ends(&arrival.bytes) else { continue };
            let answer = segment(pod_mac(server.0), HOST_END, server, client, Some(1001));
            for back in self.send(arrival.node, &arrival.device, &answer)? {
                if ends(&back.bytes) == Some((to, from)) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

fn router(folder: &Path, name: &str) -> Result<(MemoryRouter, Arc<Cluster>), LabError> {
    let failed = |message: String| LabError::Command { command: format!("the router of {name}"), message };
    let loaded = translate::load_strictly(&folder.join(format!("{name}.yaml"))).map_err(|p| failed(p.render(false)))?;
    let cluster = loaded.cluster.clone();
    let mut links = Links::default();
    let mut add = |name: &str, role, mac, addresses| {
        let index = if role == Role::Host { IfIndex::HOST } else { IfIndex(links.devices.len() as u32 + 1) };
        links.devices.push(Device { name: name.into(), index, role, mac, mtu: 1500, addresses });
        index
    };
    let own = NODES.iter().find(|(node, ..)| *node == name);
    let (_, address, mac) = own.ok_or_else(|| failed("unknown node".into()))?;
    let net = ipnet::Ipv4Net::new(*address, 24).map_err(|e| failed(e.to_string()))?;
    let uplink = add(UPLINK, Role::Uplink, *mac, vec![net.into()]);
    let mut neighbors: Vec<Neighbor> = NODES
        .iter()
        .map(|(_, address, mac)| (*address, *mac))
        .chain([CLIENT])
        .map(|(address, mac)| Neighbor { address: address.into(), mac, device: uplink })
        .collect();
    for workload in cluster.workloads.iter().filter(|w| w.node.as_deref() == Some(name)) {
        let device = add(&workload.device, Role::Workload, HOST_END, Vec::new());
        neighbors.extend(workload.addresses.iter().filter_map(|address| match address {
            std::net::IpAddr::V4(v4) => Some(Neighbor { address: *address, mac: pod_mac(*v4), device }),
            std::net::IpAddr::V6(_) => None,
        }));
    }
    add("host", Role::Host, Mac([6, 0, 0, 0, 0, 1]), Vec::new());
    links.neighbors = neighbors;
    let router = MemoryRouter::new(loaded, links, 1).map_err(|e| failed(e.to_string()))?;
    Ok((router, cluster))
}

fn pod_mac(address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = address.octets();
    Mac([0x0a, 0, a, b, c, d])
}

/// A SYN, or the SYN-ACK that acknowledges `ack`.
fn segment(src_mac: Mac, dst_mac: Mac, src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), ack: Option<u32>) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(src_mac.0, dst_mac.0)
        .ipv4(src.0.octets(), dst.0.octets(), 64)
        .tcp(src.1, dst.1, 1000, 64_240)
        .syn();
    let mut frame = Vec::new();
    let written = match ack {
        Some(number) => builder.ack(number).write(&mut frame, &[]),
        None => builder.write(&mut frame, &[]),
    };
    written.expect("a vector takes every byte");
    frame
}

/// Source and destination of a TCP segment over IPv4.
fn ends(frame: &[u8]) -> Option<((Ipv4Addr, u16), (Ipv4Addr, u16))> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let net = packet.net?;
    let header = net.ipv4_ref()?.header();
    match packet.transport? {
        TransportSlice::Tcp(tcp) => {
            Some(((header.source_addr(), tcp.source_port()), (header.destination_addr(), tcp.destination_port())))
        }
        _ => None,
    }
}
