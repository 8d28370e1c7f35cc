//! The straight way beside the general one: the same packets through two workers, one of which never goes straight. What leaves, byte by byte
//! and in its order, what is counted, what is listed, and what is asked of others must be equal after each turn.

use std::{
    cell::Cell,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use proptest::{
    prelude::*,
    sample::select,
    test_runner::{Config, TestRunner},
};
use weir_conntrack::Entry;
use weir_dataplane::{
    forwarding::Forwarding,
    frame::{IfIndex, LinkType},
    model::{Cluster, Device, Links, Role, Route},
    offload::{Offload, flow::Mapped},
    snapshot::Rules,
    tables::Family,
};
use weir_nat::SnatPorts;
use weir_packet::{DropReason, Mac, Protocol, Tick};

use crate::packets::{IPIP, Packet, TCP, UDP, received};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, cluster, ip, links, rules, service, sum};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;
const URG: u8 = 32;
const MTU: usize = 1500;

/// Who opens a connection, from where, and to whom, of IPv4 and IPv6.
struct Path {
    device: IfIndex,
    is_tunnelled: bool,
    src: [&'static str; 2],
    dst: [&'static str; 2],
    port: u16,
}

const fn path(device: IfIndex, src: [&'static str; 2], dst: [&'static str; 2], port: u16) -> Path {
    Path { device, is_tunnelled: false, src, dst, port }
}

const CLIENT: [&str; 2] = ["10.1.1.10", "fd00:1:1::10"];
const SERVER: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
const REMOTE: [&str; 2] = ["10.1.2.20", "fd00:1:2::20"];
const NODE: [&str; 2] = ["192.168.10.1", "fd00:10::1"];
const OUTSIDE: [&str; 2] = ["192.168.10.100", "fd00:10::100"];
/// Services with a backend here, on the other node, and on a link-local address, of which IPv6 forwards nothing.
const LOCAL_SERVICE: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const REMOTE_SERVICE: [&str; 2] = ["10.96.0.11", "fd00:96::11"];
const LINK_SERVICE: [&str; 2] = ["10.96.0.12", "fd00:96::12"];
const NODE_PORT: u16 = 30053;

const PATHS: [Path; 13] = [
    path(CLIENT_POD, CLIENT, LOCAL_SERVICE, 53),
    path(CLIENT_POD, CLIENT, REMOTE_SERVICE, 53),
    path(CLIENT_POD, CLIENT, SERVER, 80),
    path(CLIENT_POD, CLIENT, REMOTE, 80),
    // Masquerades.
    path(CLIENT_POD, CLIENT, OUTSIDE, 80),
    path(UPLINK, OUTSIDE, NODE, NODE_PORT),
    path(SERVER_POD, SERVER, LOCAL_SERVICE, 53),
    Path { device: UPLINK, is_tunnelled: true, src: REMOTE, dst: SERVER, port: 80 },
    Path { device: UPLINK, is_tunnelled: true, src: REMOTE, dst: LOCAL_SERVICE, port: 53 },
    // The node's own kernel on either side.
    path(IfIndex::HOST, NODE, SERVER, 80),
    path(IfIndex::HOST, NODE, REMOTE_SERVICE, 53),
    path(CLIENT_POD, CLIENT, NODE, 9090),
    path(CLIENT_POD, CLIENT, LINK_SERVICE, 53),
];

/// What is odd about a packet.
#[derive(Clone, Debug)]
enum Odd {
    Ttl(u8),
    /// Of the packet, and of the tunnel's header.
    Tos(u8, u8),
    Flags(u8),
    /// Added to TCP's numbers.
    Seq(i32),
    Ack(i32),
    Window(u16),
    /// TCP options, padded.
    Options(Vec<u8>),
    /// Words of IPv4 options, or an extension header.
    IpOptions(usize),
    Payload(usize),
    Checksum(u16),
    UdpLength(u16),
    /// An IPv4 header's flags and offset, with a right checksum.
    Fragment(u16),
    /// A byte behind the Ethernet header; the IPv4 header's checksum may be made right again.
    Byte {
        at: usize,
        value: u8,
        is_mended: bool,
    },
    Device(IfIndex),
    /// The ends of the tunnel: last bytes of the nodes' addresses.
    Ends(u8, u8),
    /// Of the tunnel's header: a byte, and the checksum made right.
    Outer {
        at: usize,
        value: u8,
    },
    /// In a tunnel, or not, where it should be otherwise.
    Tunnel,
    Padding(usize),
    Cut(usize),
    EtherType(u16),
}

fn odd() -> impl Strategy<Value = Odd> {
    let devices = [UPLINK, CLIENT_POD, SERVER_POD, IfIndex::HOST, IfIndex(99), IfIndex(u32::MAX)];
    let options: [&[u8]; 5] = [
        &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
        &[1, 1, 5, 10, 0, 0, 0x90, 0, 0, 0, 0x9f, 0],
        &[1, 1, 1, 0],
        &[3, 3, 7, 1],
        &[5, 90, 1, 1],
    ];
    // Around the MTU, with and without a tunnel, and over several frames.
    let lengths = [0, 1, 4, 11, 12, 17, 18, 19].into_iter().chain(MTU - 90..MTU - 10).collect::<Vec<_>>();
    prop_oneof![
        4 => select(vec![0, 1, 2, 3, 255]).prop_map(Odd::Ttl),
        4 => (any::<u8>(), any::<u8>()).prop_map(|(inner, outer)| Odd::Tos(inner, outer)),
        2 => select(vec![SYN, SYN | ACK, FIN | ACK, RST, RST | ACK, 0, ACK | URG, PSH, SYN | FIN, ACK | 0xc0]).prop_map(Odd::Flags),
        4 => select(vec![-1, 1, -18, 18, -1000, 1000, -70_000, 70_000, i32::MIN, i32::MAX]).prop_map(Odd::Seq),
        4 => select(vec![-1, 1, -18, 18, -1000, 1000, -70_000, 70_000, i32::MIN, i32::MAX]).prop_map(Odd::Ack),
        3 => select(vec![0, 1, 17, 18, 1000, 65535]).prop_map(Odd::Window),
        4 => select(options.map(<[u8]>::to_vec).to_vec()).prop_map(Odd::Options),
        3 => (1..4_usize).prop_map(Odd::IpOptions),
        8 => select(lengths).prop_map(Odd::Payload),
        3 => prop_oneof![Just(0), Just(0xffff), any::<u16>()].prop_map(Odd::Checksum),
        2 => select(vec![0, 7, 8, 9, 25, 26, 27, 65535]).prop_map(Odd::UdpLength),
        3 => select(vec![0x2000, 0x0001, 0x2001, 0x8000, 0x4000, 0]).prop_map(Odd::Fragment),
        6 => (0..100_usize, any::<u8>(), any::<bool>()).prop_map(|(at, value, is_mended)| Odd::Byte { at, value, is_mended }),
        4 => select(devices.to_vec()).prop_map(Odd::Device),
        3 => (select(vec![1, 2, 3, 100]), select(vec![1, 2, 3])).prop_map(|(from, to)| Odd::Ends(from, to)),
        3 => (0..20_usize, any::<u8>()).prop_map(|(at, value)| Odd::Outer { at, value }),
        2 => Just(Odd::Tunnel),
        4 => (1..60_usize).prop_map(Odd::Padding),
        3 => (0..100_usize).prop_map(Odd::Cut),
        1 => select(vec![0x0800, 0x86dd, 0x0806, 0x8100]).prop_map(Odd::EtherType),
    ]
}

/// A packet of a flow.
#[derive(Clone, Debug)]
struct Arrival {
    flow: usize,
    is_answer: bool,
    payload_bytes: usize,
    odd: Vec<Odd>,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let odd =
        prop_oneof![12 => Just(Vec::new()), 3 => prop::collection::vec(odd(), 1), 1 => prop::collection::vec(odd(), 2)];
    let payload = prop_oneof![4 => Just(18_usize), 2 => 0..40_usize, 1 => 0..1400_usize];
    (0..FLOWS, any::<bool>(), payload, odd).prop_map(|(flow, is_answer, payload_bytes, odd)| Arrival {
        flow,
        is_answer,
        payload_bytes,
        odd,
    })
}

#[derive(Clone, Debug)]
enum Step {
    Burst(Vec<Arrival>),
    Wait(u32),
    /// A flow begins again, from another sequence number.
    Open(usize),
    Publish {
        rules: usize,
        ways: usize,
    },
    /// Where packets are cut into frames.
    Frames(Vec<usize>),
    Links(Vec<LinkType>),
}

fn step() -> impl Strategy<Value = Step> {
    let frames = [&[54, 1792][..], &[60, 1, 1792], &[73, 9, 1792], &[74, 1000], &[80, 1792], &[34, 1792], &[1400]];
    let frames = prop_oneof![1 => Just(vec![1792]), 1 => select(frames.map(<[usize]>::to_vec).to_vec())];
    let mixed =
        vec![LinkType::Host, LinkType::Host, LinkType::Broadcast, LinkType::Host, LinkType::Other, LinkType::Multicast];
    let link_types = prop_oneof![2 => Just(vec![LinkType::Host]), 1 => Just(mixed)];
    // Most of what is published is what there was.
    let rules = prop_oneof![6 => Just(0), 1 => Just(1), 1 => Just(2), 1 => Just(3)];
    let ways = prop_oneof![6 => Just(0), 1 => Just(1), 1 => Just(2), 1 => Just(3), 1 => Just(4), 1 => Just(5)];
    prop_oneof![
        14 => prop::collection::vec(arrival(), 1..64).prop_map(Step::Burst),
        4 => select(vec![1, 1, 50, 50, 150, 300, 300, 3000, 13_000, 70_000]).prop_map(Step::Wait),
        4 => (0..FLOWS).prop_map(Step::Open),
        2 => (rules, ways).prop_map(|(rules, ways)| Step::Publish { rules, ways }),
        1 => frames.prop_map(Step::Frames),
        1 => link_types.prop_map(Step::Links),
    ]
}

/// Each path with TCP and UDP, IPv4 and IPv6, and the IPv4 ones of both protocols once more.
const FLOWS: usize = PATHS.len() * 6;

/// Who talks, as far as it is known.
struct Flow {
    path: usize,
    is_ipv6: bool,
    protocol: u8,
    port: u16,
    /// The next sequence number of either side.
    seq: [u32; 2],
    /// How the first packet arrived at the other end: where, and as what.
    arrived: Option<((IfIndex, bool), Packet)>,
}

impl Flow {
    fn all() -> Vec<Self> {
        (0..FLOWS)
            .map(|number| {
                let kind = number / PATHS.len();
                Self {
                    path: number % PATHS.len(),
                    is_ipv6: kind % 3 == 2,
                    protocol: if kind < 3 { TCP } else { UDP },
                    port: 40_000 + number as u16,
                    seq: [0; 2],
                    arrived: None,
                }
            })
            .collect()
    }

    fn path(&self) -> &'static Path {
        &PATHS[self.path]
    }

    /// A packet of a direction with these flags: where it arrives, and whether it is in a tunnel.
    fn packet(&self, is_answer: bool, flags: u8, payload_bytes: usize) -> ((IfIndex, bool), Packet) {
        let family = usize::from(self.is_ipv6);
        let path = self.path();
        let (from, src, dst, ports) = match &self.arrived {
            Some((place, packet)) if is_answer => {
                let port = |at: usize| u16::from_be_bytes([packet.l4[at], packet.l4[at + 1]]);
                (*place, packet.dst, packet.src, [port(2), port(0)])
            }
            _ if is_answer => ((UPLINK, false), ip(path.dst[family]), ip(path.src[family]), [path.port, self.port]),
            // IPv6 goes into no tunnel.
            _ => {
                let is_tunnelled = path.is_tunnelled && !self.is_ipv6;
                ((path.device, is_tunnelled), ip(path.src[family]), ip(path.dst[family]), [self.port, path.port])
            }
        };
        let mut l4 = ports.map(u16::to_be_bytes).concat();
        if self.protocol == TCP {
            let (seq, ack) = (self.seq[usize::from(is_answer)], self.seq[usize::from(!is_answer)]);
            l4.extend([seq.to_be_bytes(), if flags & ACK == 0 { [0; 4] } else { ack.to_be_bytes() }].concat());
            let window_scale: &[u8] = if flags & SYN == 0 { &[] } else { &[3, 3, 2, 1, 4, 2, 1, 1] };
            l4.extend([0x50 + 4 * window_scale.len() as u8, flags, 0x20, 0, 0, 0, 0, 0]);
            l4.extend(window_scale);
        } else {
            l4.extend((8 + payload_bytes as u16).to_be_bytes());
            l4.extend([0, 0]);
        }
        l4.extend((0..payload_bytes).map(|place| place as u8));
        (from, Packet { src, dst, protocol: self.protocol, ttl: 64, tos: 0, options: 0, l4 })
    }
}

fn mend(header: &mut [u8]) {
    header[10..12].fill(0);
    let checksum = !sum(header);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
}

/// Makes the checksum of a frame's IPv4 header at `l3` right, if it has one.
fn mend_at(frame: &mut [u8], l3: usize) {
    let header_bytes = frame.get(l3).map_or(0, |byte| usize::from(byte & 15) * 4);
    if let Some(header) = frame.get_mut(l3..l3 + header_bytes)
        && header_bytes >= 20
    {
        mend(header);
    }
}

fn in_tunnel(frame: &[u8], tos: u8, ends: (u8, u8)) -> Vec<u8> {
    let mut outer = vec![0x45, tos];
    outer.extend((frame.len() as u16 + 6).to_be_bytes());
    outer.extend([0, 9, 0x40, 0, 64, IPIP, 0, 0, 192, 168, 10, ends.0, 192, 168, 10, ends.1]);
    mend(&mut outer);
    [&frame[..12], &[8, 0], &outer, &frame[14..]].concat()
}

/// The frame of an arrival, which moves its flow on.
fn frame(flow: &mut Flow, arrival: &Arrival) -> (IfIndex, Vec<u8>) {
    let payload = arrival.odd.iter().find_map(|odd| if let Odd::Payload(bytes) = odd { Some(*bytes) } else { None });
    let payload_bytes = payload.unwrap_or(arrival.payload_bytes);
    let ((mut device, mut is_tunnelled), mut packet) = flow.packet(arrival.is_answer, ACK | PSH, payload_bytes);
    let (mut outer_tos, mut ends) = (0, (2, 1));
    let mut checksum = None;
    let mut moves = true;
    for odd in &arrival.odd {
        let tcp = (flow.protocol == TCP).then_some(&mut packet.l4);
        match (odd, tcp) {
            (Odd::Ttl(ttl), _) => packet.ttl = *ttl,
            (Odd::Tos(inner, outer), _) => (packet.tos, outer_tos) = (*inner, *outer),
            (Odd::IpOptions(words), _) => packet.options = *words,
            (Odd::Checksum(wrong), _) => checksum = Some(*wrong),
            (Odd::UdpLength(bytes), None) => packet.l4[4..6].copy_from_slice(&bytes.to_be_bytes()),
            (Odd::Device(other), _) => device = *other,
            (Odd::Ends(from, to), _) => ends = (*from, *to),
            (Odd::Tunnel, _) => is_tunnelled = !is_tunnelled && !flow.is_ipv6,
            (Odd::Flags(flags), Some(l4)) => (l4[13], moves) = (*flags, false),
            (Odd::Seq(by) | Odd::Ack(by), Some(l4)) => {
                let at = if matches!(odd, Odd::Seq(_)) { 4 } else { 8 };
                let number = u32::from_be_bytes(*l4[at..].first_chunk().unwrap()).wrapping_add_signed(*by);
                l4[at..at + 4].copy_from_slice(&number.to_be_bytes());
                moves = false;
            }
            (Odd::Window(window), Some(l4)) => l4[14..16].copy_from_slice(&window.to_be_bytes()),
            (Odd::Options(options), Some(l4)) if l4[12] == 0x50 => {
                l4[12] += 4 * options.len() as u8;
                l4.splice(20..20, options.iter().copied());
            }
            _ => {}
        }
    }
    if moves {
        let side = usize::from(arrival.is_answer);
        flow.seq[side] = flow.seq[side].wrapping_add(payload_bytes as u32);
    }
    let mut frame = packet.frame();
    if let Some(wrong) = checksum {
        let place = packet.checksum_place();
        let l4 = frame.len() - packet.l4.len();
        frame[l4 + place.start..l4 + place.end].copy_from_slice(&wrong.to_be_bytes());
    }
    let after = |frame: &mut Vec<u8>, is_outer: bool| {
        for odd in &arrival.odd {
            match odd {
                Odd::Fragment(word) if !is_outer && !flow.is_ipv6 && frame.len() >= 22 => {
                    frame[20..22].copy_from_slice(&word.to_be_bytes());
                    mend_at(frame, 14);
                }
                Odd::Byte { at, value, is_mended } if !is_outer && frame.len() > 14 => {
                    let at = 14 + at % (frame.len() - 14);
                    frame[at] = *value;
                    if *is_mended && !flow.is_ipv6 {
                        mend_at(frame, 14);
                    }
                }
                Odd::Outer { at, value } if is_outer && frame.len() > 14 + at => {
                    frame[14 + at] = *value;
                    mend_at(frame, 14);
                }
                Odd::Padding(bytes) if is_outer != is_tunnelled => {}
                Odd::Padding(bytes) => frame.extend(vec![0xaa; *bytes]),
                Odd::Cut(bytes) if is_outer == is_tunnelled => frame.truncate(frame.len() - bytes % frame.len()),
                Odd::EtherType(number) if is_outer == is_tunnelled && frame.len() >= 14 => {
                    frame[12..14].copy_from_slice(&number.to_be_bytes());
                }
                _ => {}
            }
        }
    };
    after(&mut frame, false);
    if is_tunnelled {
        frame = in_tunnel(&frame, outer_tos, ends);
        after(&mut frame, true);
    }
    (device, frame)
}

fn services(which: &[usize]) -> Vec<weir_nat::ServicePort> {
    let all = [
        ("local", LOCAL_SERVICE, SERVER, Some(NODE_PORT)),
        ("remote", REMOTE_SERVICE, REMOTE, None),
        ("link", LINK_SERVICE, ["169.254.7.7", "fe80::7"], None),
    ];
    let ports = which.iter().flat_map(|number| {
        let (name, vips, backends, node_port) = all[*number];
        [Protocol::TCP, Protocol::UDP]
            .map(|protocol| service(&format!("default/{name}:{protocol}"), protocol, vips, backends, node_port))
    });
    ports.collect()
}

/// Rules that are published in turn.
fn some_rules(which: usize) -> Rules {
    match which {
        0 => rules(services(&[0, 1, 2]), true),
        1 => rules(services(&[0, 1, 2]), false),
        2 => rules(services(&[0]), true),
        _ => rules(Vec::new(), true),
    }
}

/// Nodes, devices and neighbours that are published in turn.
fn ways(which: usize) -> (Cluster, Links) {
    let (mut cluster, mut links) = (cluster(), links());
    links.devices.push(Device {
        name: "weir0".into(),
        index: IfIndex::HOST,
        role: Role::Host,
        mac: Mac([6, 0, 0, 0, 0, 1]),
        mtu: MTU as u32,
        addresses: Vec::new(),
    });
    // What leads to a backend that may not answer.
    links.routes.push(Route {
        to: "fe80::/64".parse().expect("a prefix"),
        via: Some(ip("fd00:10::100")),
        device: UPLINK,
        metric: 0,
    });
    match which {
        0 => {}
        // Nobody's MAC address is known.
        1 => {
            links.neighbors.clear();
            cluster.workloads.iter_mut().for_each(|workload| workload.mac = None);
        }
        2 => links.devices.iter_mut().for_each(|device| device.mtu = 1400),
        // Another node has the same address, and one has an address of node b's pods.
        3 => {
            let twin =
                weir_dataplane::model::Node { name: "twin".into(), pod_cidrs: Vec::new(), ..cluster.nodes[1].clone() };
            cluster.nodes.push(twin);
        }
        4 => cluster.nodes.push(weir_dataplane::model::Node {
            name: "c".into(),
            internal_ips: vec![ip("192.168.10.3")],
            tunnel_address: Some(Ipv4Addr::new(10, 1, 2, 20)),
            ..weir_dataplane::model::Node::default()
        }),
        // The server pod's device is gone.
        _ => links.devices.retain(|device| device.index != SERVER_POD),
    }
    (cluster, links)
}

fn worker() -> Router {
    let (cluster, links) = ways(0);
    let snat = SnatPorts::new(10_000..=10_999, [NODE_PORT]).expect("ports");
    let mut router = Router::between(&cluster, &links, some_rules(0), snat, 256);
    let (flows, epoch) = (Mapped::private(64).expect("memory"), Mapped::private(1).expect("memory"));
    let (offload, requests) = Offload::new(flows, epoch, 200);
    // What is asked of the keeper is not answered; the connections' flags tell that it was asked.
    std::mem::forget(requests);
    router.offload = Some(Arc::new(offload));
    router
}

fn listing<A: Family>(router: &Router) -> Vec<Entry<A>> {
    let mut entries = Vec::new();
    A::table(&router.tables).for_each(router.now, |entry| entries.push(*entry));
    entries
}

/// Both workers, and who sends to them.
struct Both {
    straight: Router,
    general: Router,
    flows: Vec<Flow>,
    /// Packets of bursts, those that open flows aside.
    received: u64,
}

impl Both {
    fn new() -> Self {
        let mut both =
            Self { straight: worker(), general: worker().without_straight_way(), flows: Flow::all(), received: 0 };
        for flow in 0..FLOWS {
            both.open(flow);
        }
        both
    }

    /// One turn of both, after which they must be alike.
    fn turn(&mut self, frames: &[(IfIndex, Vec<u8>)]) -> Vec<(IfIndex, Vec<u8>)> {
        let sent = self.straight.turn(frames);
        let expected = self.general.turn(frames);
        assert_eq!(sent.len(), expected.len());
        for (number, (sent, expected)) in sent.iter().zip(&expected).enumerate() {
            assert_eq!(sent, expected, "packet {number}");
        }
        assert_eq!(self.straight.totals(), self.general.totals());
        assert_eq!(listing::<Ipv4Addr>(&self.straight), listing::<Ipv4Addr>(&self.general));
        assert_eq!(listing::<Ipv6Addr>(&self.straight), listing::<Ipv6Addr>(&self.general));
        assert_eq!(self.straight.tables.v4.counts(), self.general.tables.v4.counts());
        assert_eq!(self.straight.tables.v6.counts(), self.general.tables.v6.counts());
        sent
    }

    /// Opens a flow: its first packets, each in a turn of its own, so that it is seen how they arrive.
    fn open(&mut self, number: usize) {
        let flow = &mut self.flows[number];
        flow.seq = flow.seq.map(|seq| seq.wrapping_add(0x0123_4567));
        flow.arrived = None;
        let is_tcp = flow.protocol == TCP;
        let one = |both: &mut Self, is_answer: bool, flags: u8| {
            let ((device, is_tunnelled), packet) = both.flows[number].packet(is_answer, flags, 0);
            let frame = packet.frame();
            let frame = if is_tunnelled { in_tunnel(&frame, 0, (2, 1)) } else { frame };
            let sent = both.turn(&[(device, frame)]);
            if flags & SYN != 0 || !is_tcp {
                both.flows[number].seq[usize::from(is_answer)] += u32::from(is_tcp);
            }
            sent
        };
        let sent = one(self, false, SYN);
        if let [(place, bytes)] = received(&sent)[..]
            && bytes[if bytes[0] >> 4 == 4 { 9 } else { 6 }] == self.flows[number].protocol
        {
            self.flows[number].arrived = Some((place, Packet::read(bytes)));
        }
        one(self, true, SYN | ACK);
        one(self, false, ACK);
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Burst(arrivals) => {
                let frames: Vec<_> = arrivals.iter().map(|one| frame(&mut self.flows[one.flow], one)).collect();
                self.received += frames.len() as u64;
                self.turn(&frames);
            }
            Step::Wait(ticks) => {
                for router in [&mut self.straight, &mut self.general] {
                    router.now = Tick(router.now.0 + ticks);
                }
                self.turn(&[]);
            }
            // And some others with it, as many come to their ends.
            Step::Open(flow) => (0..8).for_each(|number| self.open((flow + 11 * number) % FLOWS)),
            Step::Publish { rules, ways: which } => {
                let (cluster, links) = ways(*which);
                for router in [&mut self.straight, &mut self.general] {
                    let forwarding = Arc::new(Forwarding::compile(&cluster, &links).expect("few next hops"));
                    let next = router.next(some_rules(*rules), forwarding);
                    router.published.publish(next);
                }
            }
            Step::Frames(bytes) => {
                for router in [&mut self.straight, &mut self.general] {
                    router.frame_bytes.clone_from(bytes);
                }
            }
            Step::Links(types) => {
                for router in [&mut self.straight, &mut self.general] {
                    router.link_types.clone_from(types);
                }
            }
        }
    }
}

/// Over random bursts with everything odd in them, publications and time in between. A good share must go straight, or nothing was shown.
#[test]
fn both_ways_are_one() {
    let mut runner = TestRunner::new(Config { cases: 300, failure_persistence: None, ..Config::default() });
    let (straight, received) = (Cell::new(0), Cell::new(0));
    runner
        .run(&prop::collection::vec(step(), 1..40), |steps| {
            let mut both = Both::new();
            steps.iter().for_each(|step| both.step(step));
            straight.set(straight.get() + both.straight.went_straight());
            received.set(received.get() + both.received);
            prop_assert_eq!(both.general.went_straight(), 0);
            let [one, other] = [both.straight, both.general].map(Router::finish);
            prop_assert_eq!(one, other);
            Ok(())
        })
        .unwrap();
    let (straight, received) = (straight.get(), received.get());
    println!("{straight} of {received} packets went straight");
    assert!(straight * 4 >= received, "only {straight} of {received} packets went straight");
}

/// Every path's plain packets go straight in both directions, but for those that end at the node's kernel or may not.
#[test]
fn plain_packets_go_straight() {
    let mut both = Both::new();
    // A UDP flow's packets change its state until it is old enough; and a TCP flow's timeout changes with its first data.
    both.step(&Step::Wait(300));
    let data =
        |flow: usize| [false, true].map(|is_answer| Arrival { flow, is_answer, payload_bytes: 30, odd: Vec::new() });
    for _ in 0..2 {
        (0..FLOWS).for_each(|flow| both.step(&Step::Burst(data(flow).to_vec())));
    }
    let mut others = Vec::new();
    for flow in 0..FLOWS {
        let before = (both.straight.went_straight(), both.straight.drops());
        both.step(&Step::Burst(data(flow).to_vec()));
        let straight = both.straight.went_straight() - before.0;
        let Flow { path, is_ipv6, protocol, .. } = both.flows[flow];
        let expected = match (path, is_ipv6) {
            // One way ends at the node's kernel.
            (9..=11, _) => 1,
            // A backend on a link.
            (12, _) => continue,
            _ => 2,
        };
        if straight != expected {
            others.push((path, is_ipv6, protocol, straight));
        }
        assert_eq!(both.straight.drops(), before.1, "path {path}");
    }
    // Two flows of one bucket have the same tag once in 128, and then one of them is looked up; every path has several flows.
    assert!(others.len() <= 1, "{others:?}");
}

/// Answers from an address that no router forwards are refused when they are parsed; who is asked there goes the general way.
#[test]
fn answers_from_a_link_local_backend_do_not_pass() {
    let mut both = Both::new();
    let link = |flow: &Flow| PATHS[flow.path].dst == LINK_SERVICE && flow.is_ipv6;
    for flow in (0..FLOWS).filter(|flow| link(&both.flows[*flow])).collect::<Vec<_>>() {
        assert!(both.flows[flow].arrived.is_some(), "it is asked");
        for is_answer in [false, true, false, true] {
            let before = (both.straight.went_straight(), both.straight.totals().tx);
            both.step(&Step::Burst(vec![Arrival { flow, is_answer, payload_bytes: 30, odd: Vec::new() }]));
            assert_eq!(both.straight.went_straight(), before.0);
            assert_eq!(both.straight.totals().tx - before.1, u64::from(!is_answer && both.flows[flow].protocol == UDP));
        }
    }
}

/// What comes from somewhere else is never taken for the connection's own.
#[test]
fn spoofed_packets_do_not_go_straight() {
    let mut both = Both::new();
    both.step(&Step::Wait(300));
    let arrival = |flow, is_answer, odd: Option<Odd>| Arrival {
        flow,
        is_answer,
        payload_bytes: 30,
        odd: odd.into_iter().collect(),
    };
    let udp = 3 * PATHS.len();
    for (path, is_answer, odd, reason) in [
        (0, false, Odd::Device(SERVER_POD), DropReason::SpoofedSource),
        (0, true, Odd::Device(UPLINK), DropReason::SpoofedSource),
        // Out of a tunnel of a node that does not own the source, that is none, and for another node.
        (7, false, Odd::Ends(100, 1), DropReason::TunnelUnknownPeer),
        (7, false, Odd::Ends(2, 3), DropReason::TunnelUnknownPeer),
        (3, true, Odd::Ends(1, 1), DropReason::TunnelUnknownPeer),
    ] {
        for _ in 0..2 {
            both.step(&Step::Burst(vec![arrival(udp + path, false, None), arrival(udp + path, true, None)]));
        }
        let before = (both.straight.went_straight(), both.straight.drops().get(&reason).copied().unwrap_or(0));
        both.step(&Step::Burst(vec![arrival(udp + path, is_answer, Some(odd.clone()))]));
        assert_eq!(both.straight.went_straight(), before.0, "{odd:?}");
        assert_eq!(both.straight.drops().get(&reason), Some(&(before.1 + 1)), "{odd:?}: {:?}", both.straight.drops());
    }
}
