//! The ten cases: packets of established connections through a node with 32 pods, and one service whose backend is on another node.
//!
//! Their definitions are here alone: `weir bench`, `make bench-path`, `make instructions` and `make report` measure the same.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use etherparse::{PacketBuilder, TcpOptionElement};
use weir_dataplane::{
    forwarding::Forwarding,
    frame::IfIndex,
    model::{Cluster, Device, Links, Neighbor, Node, Pool, Role, TunnelMode, Workload},
    snapshot::{Rules, Snapshot},
};
use weir_nat::{Endpoint, ServicePort, ServiceTable, SnatPorts};
use weir_packet::{Mac, Protocol};
use weir_policy::Classifier;

const PODS: u32 = 32;
const FIRST_PORT: u32 = 16_384;
const PAYLOAD: [u8; 18] = [0; 18];
const UPLINK: IfIndex = IfIndex(1);
const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const VETH_MAC: [u8; 6] = [0xee; 6];
const OTHER_NODE: [&str; 2] = ["192.168.10.2", "fd00:10::2"];
const SERVICE: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const REMOTE_POD: [&str; 2] = ["10.1.2.10", "fd00:1:2::10"];
const SERVICE_PORT: u16 = 53;
const BACKEND_PORT: u16 = 5353;

/// Flows to one destination port: source ports of all pods.
const FLOWS_OF_PORT: u32 = PODS * 32_768;
/// Ports of the service and of each server. Cases with up to a million flows use the first.
const PORTS: u16 = 16;
/// The most flows that a case has.
pub const MAX_FLOWS: u32 = FLOWS_OF_PORT * PORTS as u32;
/// Packets that one TCP stream may send: its window of 1 GiB, less what rounds off, is never opened anew.
const MAX_SEGMENTS: u64 = ((1 << 30) - (1 << 20)) / PAYLOAD.len() as u64;

/// Where pods send to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Target {
    /// A service, whose backend is on the other node: DNAT, and for IPv4 a tunnel.
    Service,
    /// The pod on the other node itself.
    Remote,
    /// The next pod of this node.
    Local,
}

/// The packets that are measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Which {
    Requests,
    Answers,
    Both,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Case {
    /// By which it is asked for.
    pub name: &'static str,
    /// What happens to its packets.
    pub description: &'static str,
    is_ipv6: bool,
    is_tcp: bool,
    target: Target,
    which: Which,
}

/// All of them.
pub const CASES: [Case; 10] = [
    Case {
        name: "udp-dnat-ipip",
        description: "IPv4 UDP of a pod to a service: DNAT to a backend on the other node, IPIP",
        is_ipv6: false,
        is_tcp: false,
        target: Target::Service,
        which: Which::Requests,
    },
    Case {
        name: "tcp-dnat-ipip",
        description: "IPv4 TCP of a pod to a service: DNAT, IPIP, windows followed",
        is_ipv6: false,
        is_tcp: true,
        target: Target::Service,
        which: Which::Requests,
    },
    Case {
        name: "answers",
        description: "what comes back of udp-dnat-ipip: out of the tunnel, translated back, to the pod",
        is_ipv6: false,
        is_tcp: false,
        target: Target::Service,
        which: Which::Answers,
    },
    Case {
        name: "both",
        description: "udp-dnat-ipip and answers in turn",
        is_ipv6: false,
        is_tcp: false,
        target: Target::Service,
        which: Which::Both,
    },
    Case {
        name: "udp-ipip",
        description: "IPv4 UDP of a pod to a pod of the other node: IPIP, no translation",
        is_ipv6: false,
        is_tcp: false,
        target: Target::Remote,
        which: Which::Requests,
    },
    Case {
        name: "udp-pod",
        description: "IPv4 UDP from pod to pod of this node",
        is_ipv6: false,
        is_tcp: false,
        target: Target::Local,
        which: Which::Requests,
    },
    Case {
        name: "tcp-pod",
        description: "IPv4 TCP from pod to pod of this node, windows followed",
        is_ipv6: false,
        is_tcp: true,
        target: Target::Local,
        which: Which::Requests,
    },
    Case {
        name: "udp6-dnat",
        description: "IPv6 UDP of a pod to a service: DNAT, direct route",
        is_ipv6: true,
        is_tcp: false,
        target: Target::Service,
        which: Which::Requests,
    },
    Case {
        name: "tcp6-dnat",
        description: "IPv6 TCP of a pod to a service: DNAT, direct route, windows followed",
        is_ipv6: true,
        is_tcp: true,
        target: Target::Service,
        which: Which::Requests,
    },
    Case {
        name: "udp6-pod",
        description: "IPv6 UDP from pod to pod of this node",
        is_ipv6: true,
        is_tcp: false,
        target: Target::Local,
        which: Which::Requests,
    },
];

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn pod_address(pod: u32, is_ipv6: bool) -> IpAddr {
    if is_ipv6 {
        Ipv6Addr::from_bits(ip_bits("fd00:1:1::") + 10 + u128::from(pod)).into()
    } else {
        Ipv4Addr::new(10, 1, 1, 10 + pod as u8).into()
    }
}

fn ip_bits(text: &str) -> u128 {
    text.parse::<Ipv6Addr>().expect("an address").to_bits()
}

fn pod_device(pod: u32) -> IfIndex {
    IfIndex(2 + pod)
}

fn pod_mac(pod: u32) -> [u8; 6] {
    [2, 0, 0, 0, 1, pod as u8]
}

fn cluster() -> Cluster {
    let node = |name: &str, addresses: [&str; 2], ranges: [&str; 2]| Node {
        name: name.into(),
        internal_ips: addresses.map(ip).into(),
        pod_cidrs: ranges.map(|range| range.parse().expect("a prefix")).into(),
        ..Node::default()
    };
    let local = (0..PODS).map(|pod| Workload {
        name: format!("default/pod-{pod}"),
        node: Some("node-a".into()),
        addresses: vec![pod_address(pod, false), pod_address(pod, true)],
        device: format!("cali{pod}"),
        mac: Some(Mac(pod_mac(pod))),
    });
    let remote = Workload {
        name: "default/remote".into(),
        node: Some("node-b".into()),
        addresses: REMOTE_POD.map(ip).into(),
        device: String::new(),
        mac: None,
    };
    let pool = |cidr: &str, ipip| Pool { cidr: cidr.parse().expect("a prefix"), ipip, nat_outgoing: true };
    Cluster {
        node_name: "node-a".into(),
        nodes: vec![
            node("node-a", ["192.168.10.1", "fd00:10::1"], ["10.1.1.0/24", "fd00:1:1::/64"]),
            node("node-b", OTHER_NODE, ["10.1.2.0/24", "fd00:1:2::/64"]),
        ],
        workloads: local.chain([remote]).collect(),
        pools: vec![pool("10.1.0.0/16", TunnelMode::Always), pool("fd00:1::/32", TunnelMode::Never)],
        pod_cidrs: ["10.1.0.0/16", "fd00:1::/32"].map(|cidr| cidr.parse().expect("a prefix")).into(),
        service_cidrs: ["10.96.0.0/16", "fd00:96::/112"].map(|cidr| cidr.parse().expect("a prefix")).into(),
        ..Cluster::default()
    }
}

fn links() -> Links {
    let uplink = Device {
        name: "eth0".into(),
        index: UPLINK,
        role: Role::Uplink,
        mac: Mac(NODE_MAC),
        mtu: 1500,
        addresses: ["192.168.10.1/24", "fd00:10::1/64"].map(|net| net.parse().expect("a prefix")).into(),
    };
    let pods = (0..PODS).map(|pod| Device {
        name: format!("cali{pod}"),
        index: pod_device(pod),
        role: Role::Workload,
        mac: Mac(VETH_MAC),
        mtu: 1500,
        addresses: Vec::new(),
    });
    let neighbors = OTHER_NODE.map(|address| Neighbor { address: ip(address), mac: Mac(OTHER_MAC), device: UPLINK });
    Links { devices: std::iter::once(uplink).chain(pods).collect(), neighbors: neighbors.into(), ..Links::default() }
}

fn rules(cluster: &Cluster) -> Rules {
    let service = |protocol, number: u16| {
        Arc::new(ServicePort {
            name: format!("default/dns:{protocol}-{number}"),
            protocol,
            port: SERVICE_PORT + number,
            cluster_ips: SERVICE.map(ip).into(),
            endpoints: REMOTE_POD
                .map(|address| Endpoint {
                    address: ip(address),
                    port: BACKEND_PORT + number,
                    ready: true,
                    serving: true,
                    terminating: false,
                    topology: Some(Arc::new(weir_nat::Topology::on("node-b"))),
                })
                .into(),
            ..ServicePort::default()
        })
    };
    let protocols = [Protocol::UDP, Protocol::TCP];
    let services = ServiceTable::compile(&weir_nat::Model {
        node_name: "node-a".into(),
        pod_cidrs: cluster.pod_cidrs.clone(),
        local_addresses: ["192.168.10.1", "fd00:10::1"].map(ip).into(),
        service_cidrs: cluster.service_cidrs.clone(),
        services: (0..PORTS).flat_map(|number| protocols.map(|protocol| service(protocol, number))).collect(),
        ..weir_nat::Model::default()
    })
    .expect("the services compile");
    let pods = cluster.workloads.iter().take(PODS as usize).map(|pod| weir_policy::model::Endpoint {
        name: pod.name.clone(),
        local: true,
        nets: pod.addresses.iter().map(|address| (*address).into()).collect(),
        profiles: vec!["all".into()],
        ..weir_policy::model::Endpoint::default()
    });
    let allow = || vec![weir_policy::model::Rule::default()];
    let profile = weir_policy::model::Profile { name: "all".into(), ingress: allow(), egress: allow() };
    let policy = Classifier::compile(&weir_policy::model::Model {
        endpoints: pods.map(Arc::new).collect(),
        profiles: vec![Arc::new(profile)],
        tiers: Vec::new(),
    })
    .expect("the policies compile");
    Rules::new(services, policy, cluster)
}

/// What is in force on the node.
pub(crate) fn snapshot() -> Snapshot {
    let cluster = cluster();
    Snapshot {
        generation: 1,
        rules: Arc::new(rules(&cluster)),
        snat: Arc::new(SnatPorts::new(10_000..=19_999, []).expect("ports are left")),
        forwarding: Arc::new(Forwarding::compile(&cluster, &links()).expect("few next hops")),
    }
}

/// A TCP segment's own fields.
#[derive(Clone, Copy)]
struct Segment {
    is_syn: bool,
    ack: Option<u32>,
    seq: u32,
}

impl Case {
    /// The case of this name.
    ///
    /// # Errors
    /// Where there is none: says which there are.
    pub fn named(name: &str) -> Result<Self, String> {
        let names = || CASES.map(|case| case.name).join(", ");
        CASES.into_iter().find(|case| case.name == name).ok_or_else(|| format!("no case {name}; there are {}", names()))
    }

    /// Room for so many flows in the tables of IPv4 and IPv6.
    pub(crate) fn entries(self, flows: u32) -> [u32; 2] {
        let (many, few) = (flows + flows / 8 + 1024, 16);
        if self.is_ipv6 { [few, many] } else { [many, few] }
    }

    /// Packets that each flow may send.
    pub(crate) fn packets_per_flow(self) -> u64 {
        if self.is_tcp { MAX_SEGMENTS } else { u64::MAX }
    }

    /// The packets that are measured, of these flows.
    pub(crate) fn packets(self, flows: &[u32]) -> Vec<Sender> {
        let packets = flows.iter().enumerate().flat_map(|(place, flow)| {
            // The other direction's is of another flow: not one whose lines have just been fetched.
            let answered = flows[(place + flows.len() / 2) % flows.len()];
            let request = (self.which != Which::Answers).then(|| Sender::new(self, *flow, false, None));
            let answer = (self.which != Which::Requests).then(|| Sender::new(self, answered, true, None));
            request.into_iter().chain(answer)
        });
        packets.collect()
    }

    /// What opens these flows, a step at a time: the first packet of each, its answer, and one each way more.
    pub(crate) fn opening(self, flows: &[u32]) -> impl Iterator<Item = Vec<Sender>> {
        let segment = |is_syn, seq, ack| Some(Segment { is_syn, ack, seq });
        let handshake = [
            (false, segment(true, 1000, None)),
            (true, segment(true, 1000, Some(1001))),
            (false, segment(false, 1001, Some(1001))),
            (true, segment(false, 1001, Some(1001))),
        ];
        handshake.into_iter().map(move |(is_answer, segment)| {
            flows.iter().map(|flow| Sender::new(self, *flow, is_answer, segment)).collect()
        })
    }
}

/// One direction of a flow: a packet that is sent over and over.
pub(crate) struct Sender {
    pub(crate) device: IfIndex,
    pub(crate) frame: Vec<u8>,
    /// Where a TCP header begins whose sequence number moves.
    moves_at: Option<usize>,
}

impl Sender {
    /// The packet of a flow, from who opened it or back; of TCP one that carries data, or the SYN or ACK that `handshake` says.
    fn new(case: Case, flow: u32, is_answer: bool, handshake: Option<Segment>) -> Self {
        let (number, of_port) = ((flow / FLOWS_OF_PORT) as u16, flow % FLOWS_OF_PORT);
        let (pod, port) = (of_port % PODS, (FIRST_PORT + of_port / PODS) as u16);
        let backend_port = BACKEND_PORT + number;
        let family = usize::from(case.is_ipv6);
        let other_pod = (pod + 1) % PODS;
        let (to, to_port) = match case.target {
            Target::Service => (ip(SERVICE[family]), SERVICE_PORT + number),
            Target::Remote => (ip(REMOTE_POD[family]), backend_port),
            Target::Local => (pod_address(other_pod, case.is_ipv6), backend_port),
        };
        let from = match case.target {
            Target::Local => to,
            Target::Service | Target::Remote => ip(REMOTE_POD[family]),
        };
        let client = pod_address(pod, case.is_ipv6);
        let (device, macs, addresses, ports) = if !is_answer {
            (pod_device(pod), [pod_mac(pod), VETH_MAC], [client, to], [port, to_port])
        } else if case.target == Target::Local {
            (pod_device(other_pod), [pod_mac(other_pod), VETH_MAC], [from, client], [backend_port, port])
        } else {
            (UPLINK, [OTHER_MAC, NODE_MAC], [from, client], [backend_port, port])
        };
        let link = PacketBuilder::ethernet2(macs[0], macs[1]);
        let network = match addresses {
            [IpAddr::V4(src), IpAddr::V4(dst)] => link.ipv4(src.octets(), dst.octets(), 64),
            [IpAddr::V6(src), IpAddr::V6(dst)] => link.ipv6(src.octets(), dst.octets(), 64),
            _ => unreachable!("both ends are of one family"),
        };
        let mut frame = Vec::new();
        let of_data = Segment { is_syn: false, ack: Some(1001), seq: 1001 };
        let segment = handshake.unwrap_or(of_data);
        let payload = if handshake.is_some() && case.is_tcp { &[][..] } else { &PAYLOAD };
        let written = if case.is_tcp {
            let mut tcp = network.tcp(ports[0], ports[1], segment.seq, u16::MAX);
            if segment.is_syn {
                // The largest window, 1 GiB, for a stream that nobody acknowledges.
                let options = [TcpOptionElement::MaximumSegmentSize(1400), TcpOptionElement::WindowScale(14)];
                tcp = tcp.syn().options(&options).expect("few options");
            }
            if let Some(ack) = segment.ack {
                tcp = tcp.ack(ack);
            }
            tcp.write(&mut frame, payload)
        } else {
            network.udp(ports[0], ports[1]).write(&mut frame, payload)
        };
        written.expect("a vector takes every byte");
        let mut l4 = if case.is_ipv6 { 54 } else { 34 };
        if device == UPLINK && !case.is_ipv6 {
            let mut outer = Vec::new();
            PacketBuilder::ethernet2(OTHER_MAC, NODE_MAC)
                .ipv4([192, 168, 10, 2], [192, 168, 10, 1], 64)
                .write(&mut outer, etherparse::IpNumber::IPV4, &frame[14..])
                .expect("a vector takes every byte");
            frame = outer;
            l4 += 20;
        }
        Self { device, frame, moves_at: (case.is_tcp && handshake.is_none()).then_some(l4) }
    }

    /// Moves a TCP stream on by what the segment carries, with the checksum (RFC 1624).
    #[inline]
    pub(crate) fn advance(&mut self) {
        let Some(l4) = self.moves_at else { return };
        let header = &mut self.frame[l4..l4 + 20];
        let old = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        let new = old.wrapping_add(PAYLOAD.len() as u32);
        let checksum = u16::from_be_bytes([header[16], header[17]]);
        let mut sum = u32::from(!checksum) + (!old >> 16) + (!old & 0xffff) + (new >> 16) + (new & 0xffff);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        header[4..8].copy_from_slice(&new.to_be_bytes());
        header[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
}
