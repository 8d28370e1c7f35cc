//! Flows in the kernel: what a program does with a packet is what a worker would have done with it.
//!
//! Two routers with the same tables see the same packets. In one a worker handles them all. In the other they come to `workload_send`
//! first, in the kernel (BPF_PROG_TEST_RUN), with what a keeper has written into its maps; a worker gets what the program leaves. Both
//! must send the same, byte by byte, and know the same windows afterwards; and the program must carry what is plain, and nothing else.

#[allow(dead_code, reason = "each test uses a part of it")]
#[path = "support/keys.rs"]
mod keys;
#[allow(dead_code, reason = "each test uses a part of it")]
#[path = "support/node.rs"]
mod node;
#[allow(dead_code, reason = "each test uses a part of it")]
#[path = "support/packets.rs"]
mod packets;
#[allow(dead_code, reason = "each test uses a part of it")]
#[path = "support/router.rs"]
mod router;

use std::{
    cell::Cell,
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex},
};

use aya::{TestRun as _, TestRunOptions, programs::SchedClassifier};
use crossbeam::channel::Receiver;
use keys::SharedKeys;
use node::{Namespace, Node, program_info, skipped};
use packets::{Packet, TCP, UDP};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use router::{CLIENT_POD, GATEWAY_MAC, Router, SERVER_POD, ip, octets, rules, service, sum};
use weir_conntrack::{ConnRef, Identity, OFFLOADED, Windows};
use weir_dataplane::{
    afxdp::trunk::origin,
    attach::{Attachment, Counter, KernelKeys, OffloadMaps, TrunkSettings},
    frame::{IfIndex, LinkType},
    offload::{
        Offload, Request,
        flow::Phase,
        keeper::{Keeper, Keys},
    },
    snapshot::Rules,
    worker::now,
};
use weir_nat::SnatPorts;
use weir_packet::{Address, Direction, FlowKey, Mac, Ports, Protocol};

const CLIENT: [&str; 2] = ["10.1.1.10", "fd00:1:1::10"];
const SERVER: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
const VIPS: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const SLOTS: u32 = 16;
/// After so many, and the first, an unanswered UDP flow is handed over.
const UDP_PACKETS: u8 = 3;
const MTU: usize = 1500;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;
const URG: u8 = 32;

// --- what is tried

/// Whom a flow leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leads {
    /// From the first pod to the second.
    Forth,
    /// From the second to the first.
    Back,
    /// From the first pod to a service, whose backend is the second.
    ToService,
    /// From the second pod to that service, and so to itself.
    ToItself,
}

#[derive(Clone, Debug)]
struct Flow {
    protocol: u8,
    is_v6: bool,
    leads: Leads,
    /// TCP: no handshake is seen. UDP: nobody has answered.
    is_half_seen: bool,
    /// Initial sequence numbers, and window scales.
    isn: [u32; 2],
    scales: [Option<u8>; 2],
}

/// What a packet's checksum is.
#[derive(Clone, Copy, Debug)]
enum Checksum {
    Right,
    /// The same, and its payload is such that it is 0 before, or after, the translation; in the IP header the identification is.
    ZeroBefore,
    ZeroAfter,
    /// Of layer 4: this one, whatever is right.
    Fixed(u16),
}

/// Where a segment lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// Inside both windows: so far behind what was sent last, and its acknowledgment behind what it may acknowledge, modulo what is
    /// inside.
    Inside { back: u32, lag: u32 },
    /// The nth of the four tests fails by so much.
    Outside { test: u8, by: u32 },
}

#[derive(Clone, Debug)]
struct Sent {
    payload_bytes: usize,
    fill: u8,
    place: Place,
    window: u16,
    flags: u8,
    /// Words of TCP options: no-operations, but for a timestamp where it fits.
    option_words: usize,
    tos: u8,
    ttl: u8,
    id: u16,
    dont_fragment: bool,
    checksum: Checksum,
}

/// What makes a packet unusual.
#[derive(Clone, Copy, Debug)]
enum Oddity {
    Flags(u8),
    Ttl(u8),
    IpOptions,
    FirstFragment,
    LaterFragment,
    BadHeaderChecksum,
    /// The IP header's length is wrong by so much.
    Length(i8),
    /// UDP's is.
    UdpLength(i8),
    /// TCP's data offset.
    DataOffset(u8),
    Padding(u8),
    TooBig(u16),
    /// UDP over IPv6.
    NoChecksum,
    UnknownPort,
    OtherDevice,
    /// For another MAC address.
    OtherMac,
    /// An ICMP error about the last packet of the other direction.
    IcmpError,
}

#[derive(Clone, Debug)]
enum Step {
    Packet {
        flow: usize,
        direction: Direction,
        sent: Sent,
        oddity: Option<Oddity>,
    },
    /// Both ends of a TCP flow begin anew, with these numbers.
    Handshake {
        flow: usize,
        isn: [u32; 2],
    },
    /// The keeper looks what was carried.
    Look,
    /// New rules: whether pods accept anything, and whether the service has its backend.
    Publish {
        is_open: bool,
        has_backend: bool,
    },
}

fn flows() -> impl Strategy<Value = Flow> {
    let leads = prop_oneof![Just(Leads::Forth), Just(Leads::Back), Just(Leads::ToService), Just(Leads::ToItself)];
    let scale = || proptest::option::of(0..=14u8);
    let isn = || prop_oneof![any::<u32>(), u32::MAX - 3000..=u32::MAX];
    let protocol = prop_oneof![Just(TCP), Just(UDP)];
    (protocol, any::<bool>(), leads, proptest::bool::weighted(0.25), [isn(), isn()], [scale(), scale()]).prop_map(
        |(protocol, is_v6, leads, is_half_seen, isn, scales)| {
            // What a service claims is not picked up in the middle.
            let is_half_seen = is_half_seen && (protocol == UDP || matches!(leads, Leads::Forth | Leads::Back));
            Flow { protocol, is_v6, leads, is_half_seen, isn, scales }
        },
    )
}

fn sents() -> impl Strategy<Value = Sent> {
    let distance = || prop_oneof![3 => Just(0u32), 1 => 0..2000u32, 1 => any::<u32>()];
    let place = prop_oneof![
        12 => (distance(), distance()).prop_map(|(back, lag)| Place::Inside { back, lag }),
        1 => (0..4u8, prop_oneof![Just(0u32), 0..100_000u32]).prop_map(|(test, by)| Place::Outside { test, by }),
    ];
    let checksum = prop_oneof![
        4 => Just(Checksum::Right),
        1 => Just(Checksum::ZeroBefore),
        1 => Just(Checksum::ZeroAfter),
        1 => prop_oneof![Just(0), Just(u16::MAX), any::<u16>()].prop_map(Checksum::Fixed),
    ];
    let payload = prop_oneof![Just(0usize), 0..100usize, 0..MTU, Just(MTU)];
    let flags = prop_oneof![Just(ACK), Just(ACK | PSH), Just(ACK | 0xc0)];
    let window = prop_oneof![Just(0u16), any::<u16>(), Just(u16::MAX)];
    (
        (payload, any::<u8>(), place, window, flags, 0..=10usize),
        (any::<u8>(), 2..=255u8, any::<u16>(), any::<bool>(), checksum),
    )
        .prop_map(
            |((payload_bytes, fill, place, window, flags, option_words), (tos, ttl, id, dont_fragment, checksum))| {
                Sent { payload_bytes, fill, place, window, flags, option_words, tos, ttl, id, dont_fragment, checksum }
            },
        )
}

fn oddities() -> impl Strategy<Value = Oddity> {
    let flags = proptest::sample::select(vec![
        FIN | ACK,
        SYN,
        SYN | ACK,
        RST,
        RST | ACK,
        URG | ACK,
        0,
        PSH,
        FIN,
        FIN | SYN,
        0xff,
    ]);
    prop_oneof![
        2 => flags.prop_map(Oddity::Flags),
        1 => (0..=1u8).prop_map(Oddity::Ttl),
        1 => Just(Oddity::IpOptions),
        1 => Just(Oddity::FirstFragment),
        1 => Just(Oddity::LaterFragment),
        1 => Just(Oddity::BadHeaderChecksum),
        1 => prop_oneof![-20..0i8, 1..20i8].prop_map(Oddity::Length),
        1 => prop_oneof![-20..0i8, 1..20i8].prop_map(Oddity::UdpLength),
        1 => prop_oneof![0..5u8, Just(15u8)].prop_map(Oddity::DataOffset),
        1 => (1..60u8).prop_map(Oddity::Padding),
        1 => (1..100u16).prop_map(Oddity::TooBig),
        1 => Just(Oddity::NoChecksum),
        1 => Just(Oddity::UnknownPort),
        1 => Just(Oddity::OtherDevice),
        1 => Just(Oddity::OtherMac),
        2 => Just(Oddity::IcmpError),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    let direction = prop_oneof![Just(Direction::Original), Just(Direction::Reply)];
    prop_oneof![
        60 => (0..3usize, direction, sents(), proptest::option::weighted(0.2, oddities()))
            .prop_map(|(flow, direction, sent, oddity)| Step::Packet { flow, direction, sent, oddity }),
        1 => (0..3usize, any::<[u32; 2]>()).prop_map(|(flow, isn)| Step::Handshake { flow, isn }),
        3 => Just(Step::Look),
        1 => (proptest::bool::weighted(0.7), proptest::bool::weighted(0.7))
            .prop_map(|(is_open, has_backend)| Step::Publish { is_open, has_backend }),
    ]
}

// --- packets

fn add(a: u16, b: u16) -> u16 {
    let sum = u32::from(a) + u32::from(b);
    (sum + (sum >> 16)) as u16
}

/// The sum over addresses and layer 4.
fn l4_sum(src: IpAddr, dst: IpAddr, protocol: u8, l4: &[u8]) -> u16 {
    let pseudo = [&octets(src)[..], &octets(dst), &(l4.len() as u32).to_be_bytes(), &[0, 0, 0, protocol]].concat();
    add(sum(&pseudo), sum(l4))
}

fn write16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

fn read16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Addresses and ports of a direction's packets: source, destination; as they come, and as they leave.
#[derive(Clone, Copy, Debug)]
struct Ends {
    arrives: [(IpAddr, u16); 2],
    leaves: [(IpAddr, u16); 2],
    device: IfIndex,
}

/// An IP packet of these ends, with layer 4 that begins with ports.
fn ip_packet(ends: &Ends, protocol: u8, sent: &Sent, mut l4: Vec<u8>) -> Vec<u8> {
    let checksum_at = if protocol == TCP { 16 } else { 6 };
    let with_ports = |l4: &[u8], [(_, from), (_, to)]: [(IpAddr, u16); 2]| {
        [&from.to_be_bytes()[..], &to.to_be_bytes(), &l4[4..]].concat()
    };
    write16(&mut l4, checksum_at, 0);
    l4 = with_ports(&l4, ends.arrives);
    let [(src, _), (dst, _)] = ends.arrives;
    // What makes the sum right with a checksum of 0 goes into the last whole word of what is no header, if there is one.
    let spare = (l4.len() & !1).checked_sub(2).filter(|at| *at >= if protocol == TCP { 20 } else { 8 });
    if let Some(at) = spare
        && let Checksum::ZeroBefore | Checksum::ZeroAfter = sent.checksum
    {
        let then = if matches!(sent.checksum, Checksum::ZeroBefore) { ends.arrives } else { ends.leaves };
        let missing = !l4_sum(then[0].0, then[1].0, protocol, &with_ports(&l4, then));
        let word = add(read16(&l4, at), missing);
        write16(&mut l4, at, word);
    }
    let checksum = match sent.checksum {
        Checksum::Fixed(checksum) => checksum,
        _ => match !l4_sum(src, dst, protocol, &l4) {
            0 if protocol == UDP => u16::MAX,
            checksum => checksum,
        },
    };
    // Without one, UDP over IPv6 is not plain.
    let checksum = if protocol == UDP && src.is_ipv6() { checksum.max(1) } else { checksum };
    write16(&mut l4, checksum_at, checksum);
    if src.is_ipv6() {
        let mut header = vec![0x60 | sent.tos >> 4, sent.tos << 4 | sent.fill & 15, sent.id as u8, sent.fill, 0, 0];
        write16(&mut header, 4, l4.len() as u16);
        header.extend([protocol, sent.ttl]);
        return [header, octets(src), octets(dst), l4].concat();
    }
    let header = |ttl: u8, [(src, _), (dst, _)]: [(IpAddr, u16); 2], id: u16| {
        let mut header = vec![0x45, sent.tos, 0, 0, 0, 0, if sent.dont_fragment { 0x40 } else { 0 }, 0, ttl, protocol];
        write16(&mut header, 2, 20 + l4.len() as u16);
        write16(&mut header, 4, id);
        [header, vec![0, 0], octets(src), octets(dst)].concat()
    };
    let id = match sent.checksum {
        Checksum::ZeroBefore => add(sent.id, !sum(&header(sent.ttl, ends.arrives, sent.id))),
        Checksum::ZeroAfter => add(sent.id, !sum(&header(sent.ttl.saturating_sub(1), ends.leaves, sent.id))),
        _ => sent.id,
    };
    let mut header = header(sent.ttl, ends.arrives, id);
    let checksum = !sum(&header);
    write16(&mut header, 10, checksum);
    [header, l4].concat()
}

/// Addresses and ports of a packet without options.
fn ends_of(ip: &[u8]) -> [(IpAddr, u16); 2] {
    let v4 = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&ip[at..at + 4]).unwrap());
    let v6 = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&ip[at..at + 16]).unwrap());
    match ip[0] >> 4 {
        4 => [(v4(12), read16(ip, 20)), (v4(16), read16(ip, 22))],
        _ => [(v6(8), read16(ip, 40)), (v6(24), read16(ip, 42))],
    }
}

fn fix_header_checksum(ip: &mut [u8]) {
    if ip[0] >> 4 == 4 {
        let header_bytes = usize::from(ip[0] & 15) * 4;
        write16(ip, 10, 0);
        let checksum = !sum(&ip[..header_bytes]);
        write16(ip, 10, checksum);
    }
}

/// As a pod sends it to its gateway.
fn frame(ip: &[u8], destination: Mac, device: IfIndex) -> Vec<u8> {
    let source = [10, 0, 0, 0, 0, if device == CLIENT_POD { 1 } else { 2 }];
    let ethertype = if ip[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] };
    [&destination.0[..], &source, &ethertype, ip].concat()
}

fn udp(payload: &[u8]) -> Vec<u8> {
    let mut l4 = vec![0; 8];
    write16(&mut l4, 4, 8 + payload.len() as u16);
    [l4, payload.to_vec()].concat()
}

fn tcp(seq: u32, ack: u32, flags: u8, window: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let header = [&[0; 4][..], &seq.to_be_bytes(), &ack.to_be_bytes(), &[(5 + options.len() as u8 / 4) << 4, flags]];
    [&header.concat()[..], &window.to_be_bytes(), &[0; 4], options, payload].concat()
}

const USUAL: Sent = Sent {
    payload_bytes: 0,
    fill: 0,
    place: Place::Inside { back: 0, lag: 0 },
    window: 1000,
    flags: ACK,
    option_words: 0,
    tos: 0,
    ttl: 64,
    id: 1,
    dont_fragment: true,
    checksum: Checksum::Right,
};

/// The directions and segments of a handshake.
fn handshake([a, b]: [u32; 2], scales: [Option<u8>; 2]) -> [(usize, Vec<u8>); 3] {
    let options = scales.map(|scale| scale.map_or(vec![], |scale| vec![1, 3, 3, scale]));
    let (after_a, after_b) = (a.wrapping_add(1), b.wrapping_add(1));
    [
        (0, tcp(a, 0, SYN, 1000, &options[0], &[])),
        (1, tcp(b, after_a, SYN | ACK, 1000, &options[1], &[])),
        (0, tcp(after_a, after_b, ACK, 1000, &[], &[])),
    ]
}

// --- both routers

/// The program and its maps, which all cases share.
struct Kernel {
    program: SchedClassifier,
    offload: Arc<Offload>,
    requests: Receiver<Request>,
    keys: SharedKeys<KernelKeys>,
}

impl Kernel {
    /// The pods' devices have the indexes and MAC addresses that the router's tables say.
    fn new(attachment: &mut Attachment, node: &Node, pods: [&Namespace; 2]) -> Self {
        for (name, index, pod) in [("cali1", CLIENT_POD, pods[0]), ("cali2", SERVER_POD, pods[1])] {
            let (index, mac, there) = (index.0, GATEWAY_MAC, &pod.name);
            node::shell(&format!(
                "ip link add {name} index {index} address {mac} type veth peer name eth0 netns {there}; ip link set {name} up"
            ));
            attachment.adopt_workload(index, name, mac, true).unwrap();
        }
        let link = node.pins.join(format!("workload_{}", CLIENT_POD.0));
        let program = SchedClassifier::from_program_info(program_info(&link), "workload_send".into()).unwrap();
        let OffloadMaps { flows, epoch, keys } = attachment.take_offload().expect("there are to be flows");
        let (offload, requests) = Offload::new(flows, epoch, UDP_PACKETS);
        Self { program, offload: Arc::new(offload), requests, keys: SharedKeys(Arc::new(Mutex::new(keys))) }
    }

    /// Runs the program on a frame that came by a device; the frame as it is redirected.
    fn run(&self, device: IfIndex, frame: &[u8]) -> Vec<u8> {
        const TC_ACT_REDIRECT: u32 = 7;
        // struct __sk_buff, up to ingress_ifindex and ifindex.
        let context = [0, 0, 0, 0, 0, 0, 0, 0, 0, device.0, device.0].map(u32::to_ne_bytes).concat();
        let mut out = vec![0; 4096];
        let result = self.program.test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        });
        let result = result.expect("a test run");
        assert_eq!(result.return_value, TC_ACT_REDIRECT);
        out.truncate(result.data_size_out as usize);
        out
    }

    /// Nothing is left of the case before.
    fn clear(&self) {
        let mut keys = self.keys.clone();
        for (key, way, serial) in keys.all().unwrap() {
            keys.remove(&key, way, serial);
            self.offload.flow(way >> 1).expect("keys lead to slots").close();
        }
        assert_eq!(self.requests.try_iter().count(), 0);
    }
}

fn case_rules(is_open: bool, has_backend: bool) -> Rules {
    let services = [(Protocol::TCP, "tcp"), (Protocol::UDP, "udp")].map(|(protocol, name)| {
        let mut service = service(&format!("default/{name}"), protocol, VIPS, SERVER, None);
        if !has_backend {
            service.endpoints.clear();
        }
        service
    });
    rules(services.into(), is_open)
}

/// A flow of the case.
struct Opened {
    protocol: u8,
    ends: [Ends; 2],
    /// Whether the program is to carry packets of a direction; `None`: not known, until a worker has seen one.
    ready: [Option<bool>; 2],
    /// Not before the keeper has looked.
    waits: bool,
    /// The last that a side was sent, by the direction in which it went.
    got: [Option<Vec<u8>>; 2],
    identity: Identity,
    /// Windows as the worker of the first router knew them last.
    windows: [[u32; 4]; 2],
}

/// What a router knows of a connection.
#[derive(Debug)]
struct Known {
    windows: Option<Windows>,
    seen_reply: bool,
    identity: Identity,
    slot: Option<u32>,
}

impl Opened {
    /// What a router knows of it, unless it is over. Its packets may be other connections' then.
    fn known(&self, router: &mut Router) -> Option<Known> {
        known(router, self.protocol, self.ends[0].arrives).filter(|known| known.identity == self.identity)
    }
}

/// Of the connection that a packet of these ends has opened.
fn known(router: &mut Router, protocol: u8, [from, to]: [(IpAddr, u16); 2]) -> Option<Known> {
    fn look<A: Address>(conn: ConnRef<'_, A>, direction: Direction) -> Option<Known> {
        let known = Known {
            windows: conn.windows(),
            seen_reply: conn.seen_reply(),
            identity: conn.identity(),
            slot: (conn.flags() & OFFLOADED != 0).then(|| conn.offload_slot()),
        };
        (direction == Direction::Original).then_some(known)
    }
    let (ports, protocol) = (Ports::new(from.1, to.1), Protocol(protocol));
    match (from.0, to.0) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            router.connection::<Ipv4Addr, _>(&FlowKey { src, dst, ports, protocol }, look)?
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            router.connection::<Ipv6Addr, _>(&FlowKey { src, dst, ports, protocol }, look)?
        }
        _ => unreachable!("of one family"),
    }
}

struct Twins<'k> {
    kernel: &'k Kernel,
    /// Workers see all.
    whole: Router,
    /// Workers see what the program leaves.
    split: Router,
    keeper: Keeper,
    graces: u64,
    carried: u64,
    rules: (bool, bool),
    next_port: u16,
}

impl<'k> Twins<'k> {
    fn new(kernel: &'k Kernel, near: BTreeSet<u32>) -> Self {
        kernel.clear();
        let rules = (true, true);
        let router = || {
            let snat = SnatPorts::new(10_000..=20_000, []).unwrap();
            let mut router = Router::new(case_rules(rules.0, rules.1), snat, 1024);
            router.now = now();
            router
        };
        let (whole, mut split) = (router(), router());
        split.offload = Some(kernel.offload.clone());
        for family in [&split.tables.v4 as &dyn HandsOver, &split.tables.v6] {
            family.hand_over_to(kernel.offload.clone());
        }
        let first = split.published.current();
        let keys = Box::new(kernel.keys.clone());
        let mut keeper = Keeper::new(kernel.offload.clone(), SLOTS, keys, &split.domain, first.clone());
        keeper.set_near(near);
        keeper.prepare(&first, &split.tables);
        Self { kernel, whole, split, keeper, graces: 0, carried: 0, rules, next_port: 40_000 }
    }

    /// Sends a frame through both; whether the program carried it, and what left.
    fn pass(&mut self, device: IfIndex, frame: &[u8]) -> (bool, Vec<(IfIndex, Vec<u8>)>) {
        let expected = self.whole.one(device, frame);
        let left = self.kernel.run(device, frame);
        let (by, link) = origin(Mac(*left.first_chunk().expect("an Ethernet header")));
        let is_carried = by == IfIndex::HOST;
        let sent = if is_carried {
            self.carried += 1;
            // Where it was redirected to is not told: see `agrees`.
            vec![(expected.first().expect("the worker drops what the program carries").0, left)]
        } else {
            assert_eq!((by, link), (device, LinkType::Host));
            assert_eq!(left[6..], frame[6..], "a worker gets it as it came");
            self.split.one(by, &left)
        };
        assert_eq!(sent, expected, "carried: {is_carried}");
        self.answer();
        (is_carried, sent)
    }

    fn answer(&mut self) {
        let requests: Vec<Request> = self.kernel.requests.try_iter().collect();
        self.graces += 1;
        self.keeper.answer(&requests, self.graces, &self.split.tables);
    }

    /// Both ends begin anew.
    fn begin_anew(&mut self, flow: &mut Opened, isn: [u32; 2]) {
        for (direction, l4) in handshake(isn, [None; 2]) {
            let ends = &flow.ends[direction];
            let packet = ip_packet(ends, flow.protocol, &USUAL, l4);
            let (is_carried, _) = self.pass(ends.device, &frame(&packet, GATEWAY_MAC, ends.device));
            assert!(!is_carried || direction == 0, "a SYN");
        }
        (flow.ready, flow.waits) = ([None; 2], true);
        self.agrees(flow);
    }

    fn look(&mut self, flows: &mut [Opened]) {
        // What it finds over it leaves to the next look: a program may still have had a packet.
        self.keeper.look(&self.split.tables);
        self.keeper.look(&self.split.tables);
        for flow in flows.iter_mut().filter(|flow| flow.waits) {
            (flow.ready, flow.waits) = ([None; 2], false);
        }
    }

    fn publish(&mut self, is_open: bool, has_backend: bool) {
        self.rules = (is_open, has_backend);
        self.whole.publish(case_rules(is_open, has_backend));
        let forwarding = self.split.forwarding.clone();
        let next = self.split.next(case_rules(is_open, has_backend), forwarding);
        self.keeper.prepare(&next, &self.split.tables);
        self.split.published.publish(next);
    }

    /// Sends the packets that bring a flow to where it is handed over.
    fn open(&mut self, flow: &Flow) -> Opened {
        let family = usize::from(flow.is_v6);
        let port = self.next_port;
        self.next_port += 1;
        let (from, to, device) = match flow.leads {
            Leads::Forth => (CLIENT, (SERVER[family], 80), CLIENT_POD),
            Leads::Back => (SERVER, (CLIENT[family], 80), SERVER_POD),
            Leads::ToService => (CLIENT, (VIPS[family], 53), CLIENT_POD),
            Leads::ToItself => (SERVER, (VIPS[family], 53), SERVER_POD),
        };
        let arrives = [(ip(from[family]), port), (ip(to.0), to.1)];
        // It is not translated; where it is, the first packet tells how.
        let mut ends = [
            Ends { arrives, leaves: arrives, device },
            Ends { arrives: [arrives[1], arrives[0]], leaves: [arrives[1], arrives[0]], device },
        ];
        let [a, b] = flow.isn;
        let acknowledgments = |a: u32, b: u32| {
            let one = move |nth: usize| match nth % 2 {
                0 => (0, tcp(a, b, ACK, 1000, &[], &[])),
                _ => (1, tcp(b, a, ACK, 1000, &[], &[])),
            };
            (0..12).map(one)
        };
        let rows = match (flow.protocol, flow.is_half_seen) {
            (TCP, false) => {
                let (a, b) = (a.wrapping_add(1), b.wrapping_add(1));
                handshake(flow.isn, flow.scales).into_iter().chain(acknowledgments(a, b).skip(1).take(7)).collect()
            }
            (TCP, true) => acknowledgments(a, b).take(10).collect::<Vec<_>>(),
            (_, false) => {
                [(0, udp(&[1, 2])), (1, udp(&[3]))].into_iter().cycle().take(usize::from(1 + UDP_PACKETS)).collect()
            }
            (_, true) => vec![(0, udp(&[1, 2])); usize::from(1 + UDP_PACKETS)],
        };
        for (nth, (direction, l4)) in rows.into_iter().enumerate() {
            let ends_now = &ends[direction];
            let packet = ip_packet(ends_now, flow.protocol, &USUAL, l4);
            let (is_carried, sent) = self.pass(ends_now.device, &frame(&packet, GATEWAY_MAC, ends_now.device));
            assert!(!is_carried && sent.len() == 1, "{sent:?}");
            if nth == 0 {
                let (device, left) = &sent[0];
                let [from, to] = ends_of(&left[14..]);
                ends[0].leaves = [from, to];
                ends[1] = Ends { arrives: [to, from], device: *device, ..ends[1] };
            }
        }
        let identity = known(&mut self.whole, flow.protocol, arrives).expect("it is opened").identity;
        let opened = Opened {
            identity,
            protocol: flow.protocol,
            ends,
            ready: [Some(true), Some(flow.protocol == TCP || !flow.is_half_seen)],
            waits: false,
            got: [None, None],
            windows: [[0; 4]; 2],
        };
        self.agrees(&opened);
        opened
    }

    /// Asserts that slot and table know the same of a flow that is settled.
    fn agrees(&mut self, flow: &Opened) {
        let Some(whole) = flow.known(&mut self.whole) else { return };
        let split = flow.known(&mut self.split).expect("both have it");
        assert_eq!(whole.seen_reply, split.seen_reply);
        if flow.ready[0] != Some(true) {
            return;
        }
        let slot = self.kernel.offload.flow(split.slot.expect("it is handed over")).unwrap();
        assert_eq!(slot.state().1, Phase::Live);
        for (direction, ends) in flow.ends.iter().enumerate() {
            let to = if ends.leaves[1].0 == ip(SERVER[usize::from(ends.leaves[1].0.is_ipv6())]) {
                SERVER_POD
            } else {
                CLIENT_POD
            };
            assert_eq!(slot.ways[direction].device.load(std::sync::atomic::Ordering::Relaxed), to.0);
        }
        if let Some(windows) = whole.windows {
            assert_eq!(slot.windows(), windows.sides, "liberal: {}", windows.is_liberal);
        }
    }

    fn step(&mut self, flow: &mut Opened, direction: Direction, sent: &Sent, oddity: Option<Oddity>) {
        let way = direction as usize;
        let mut ends = flow.ends[way];
        let (whole, is_v6) = (flow.known(&mut self.whole), ends.arrives[0].0.is_ipv6());
        if let Some(windows) = whole.as_ref().and_then(|known| known.windows) {
            flow.windows = windows.sides;
        }
        // A packet to the node itself is never too big.
        let is_over = whole.is_none();
        let is_liberal = whole.and_then(|known| known.windows).is_some_and(|windows| windows.is_liberal);
        let mut sent = sent.clone();
        match oddity {
            Some(Oddity::Flags(flags)) => sent.flags = flags,
            Some(Oddity::Ttl(ttl)) => sent.ttl = ttl,
            Some(Oddity::UnknownPort) => {
                ends.arrives[0].1 = self.next_port;
                self.next_port += 1;
            }
            _ => {}
        }
        let options = match sent.option_words {
            3.. => [&[1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8][..], &vec![1; 4 * sent.option_words - 12]].concat(),
            words => vec![1; 4 * words],
        };
        let header_bytes = if is_v6 { 40 } else { 20 } + if flow.protocol == TCP { 20 + options.len() } else { 8 };
        let payload_bytes = match oddity {
            Some(Oddity::TooBig(by)) => MTU - header_bytes + usize::from(by),
            _ => sent.payload_bytes.min(MTU - header_bytes),
        };
        let payload: Vec<u8> = (0..payload_bytes).map(|at| (at as u8).wrapping_mul(sent.fill)).collect();
        let l4 = if flow.protocol == TCP {
            let (mut seq, ack) = numbers(&flow.windows, way, sent.place, payload_bytes as u32);
            if sent.flags & RST != 0 {
                // Exact, or ahead of all that was sent. Behind the last of several retransmissions a program does not know the place that
                // is exact too.
                let [_, _, _, acknowledged] = flow.windows[1 - way];
                let [end, ..] = flow.windows[way];
                let is_exact = matches!(sent.place, Place::Inside { back: 0, .. });
                seq = if is_exact { acknowledged } else { end.wrapping_add(1) };
            }
            tcp(seq, ack, sent.flags, sent.window, &options, &payload)
        } else {
            udp(&payload)
        };
        let mut packet = ip_packet(&ends, flow.protocol, &sent, l4);
        let mut device = ends.device;
        let mut destination = GATEWAY_MAC;
        let l4_at = if is_v6 { 40 } else { 20 };
        let mut is_odd = oddity.is_some();
        match oddity {
            None | Some(Oddity::Ttl(_) | Oddity::UnknownPort) => {}
            Some(Oddity::TooBig(_)) => is_odd = !is_over,
            Some(Oddity::Flags(_)) => is_odd = flow.protocol == TCP,
            Some(Oddity::IpOptions) if is_v6 => {
                packet.splice(40..40, [flow.protocol, 0, 1, 4, 0, 0, 0, 0]);
                packet[6] = 60;
                let payload_bytes = read16(&packet, 4) + 8;
                write16(&mut packet, 4, payload_bytes);
            }
            Some(Oddity::IpOptions) => {
                packet.splice(20..20, [1; 4]);
                packet[0] = 0x46;
                let total_bytes = read16(&packet, 2) + 4;
                write16(&mut packet, 2, total_bytes);
                fix_header_checksum(&mut packet);
            }
            Some(Oddity::FirstFragment | Oddity::LaterFragment) => {
                let is_first = matches!(oddity, Some(Oddity::FirstFragment));
                packet.resize(l4_at + 64, 7);
                let (offset, more) = if is_first { (0, 1) } else { (64, 0) };
                if is_v6 {
                    packet.splice(40..40, [flow.protocol, 0, 0, offset | more, 0, 0, 0, 9]);
                    packet[6] = 44;
                    write16(&mut packet, 4, 72);
                } else {
                    write16(&mut packet, 2, 84);
                    write16(&mut packet, 4, 9);
                    write16(&mut packet, 6, (u16::from(more) << 13) | (u16::from(offset) / 8));
                    fix_header_checksum(&mut packet);
                }
            }
            Some(Oddity::BadHeaderChecksum) => {
                packet[if is_v6 { 0 } else { 10 }] ^= 0x20;
            }
            Some(Oddity::Length(by)) => {
                let at = if is_v6 { 4 } else { 2 };
                let bytes = read16(&packet, at).saturating_add_signed(by.into());
                write16(&mut packet, at, bytes);
                fix_header_checksum(&mut packet);
            }
            Some(Oddity::UdpLength(by)) if flow.protocol == UDP => {
                let bytes = read16(&packet, l4_at + 4).wrapping_add_signed(by.into());
                write16(&mut packet, l4_at + 4, bytes);
            }
            Some(Oddity::DataOffset(words)) if flow.protocol == TCP => {
                is_odd = words < 5 || l4_at + 60 > packet.len();
                packet[l4_at + 12] = words << 4;
            }
            Some(Oddity::UdpLength(_) | Oddity::DataOffset(_)) => is_odd = false,
            Some(Oddity::Padding(bytes)) => packet.resize(packet.len() + usize::from(bytes), 0),
            Some(Oddity::NoChecksum) => {
                is_odd = flow.protocol == UDP && is_v6;
                if flow.protocol == UDP {
                    write16(&mut packet, l4_at + 6, 0);
                }
            }
            Some(Oddity::OtherDevice) => {
                device = if device == CLIENT_POD { SERVER_POD } else { CLIENT_POD };
            }
            Some(Oddity::OtherMac) => destination = Mac([10, 0, 0, 0, 0, 99]),
            Some(Oddity::IcmpError) => match &flow.got[1 - way] {
                Some(got) => packet = icmp_error(&flow.ends[way], got),
                None => is_odd = false,
            },
        }
        let frame = frame(&packet, destination, device);
        if matches!(oddity, Some(Oddity::OtherMac)) {
            let left = self.kernel.run(device, &frame);
            assert_eq!(origin(Mac(*left.first_chunk().unwrap())), (device, LinkType::Other));
            return;
        }

        let is_outside = flow.protocol == TCP && matches!(sent.place, Place::Outside { .. }) && !is_liberal;
        let slot =
            flow.known(&mut self.split).and_then(|known| known.slot).and_then(|slot| self.kernel.offload.flow(slot));
        let before = slot.map(|slot| slot.carried(direction));
        let (is_carried, left) = self.pass(device, &frame);
        let counted = slot.map(|slot| slot.carried(direction)).zip(before);
        if is_carried && let Some(((packets, bytes), (packets_before, bytes_before))) = counted {
            assert_eq!((packets - packets_before, bytes - bytes_before), (1, packet.len() as u64));
        }
        if is_odd || is_outside {
            assert!(!is_carried, "it is none of the program's");
        } else if let Some(ready) = flow.ready[way] {
            assert_eq!(is_carried, ready, "a plain packet");
        }

        let whole = flow.known(&mut self.whole);
        let is_settled = whole.as_ref().is_some_and(|known| flow.protocol == UDP || known.windows.is_some());
        if !is_settled {
            flow.ready = [whole.is_some().then_some(false); 2];
            flow.waits = true;
        } else if flow.waits {
            flow.ready = [None; 2];
        } else if !is_odd && !is_outside && !left.is_empty() && !matches!(sent.checksum, Checksum::Fixed(_)) {
            flow.ready = [Some(true), whole.map(|known| known.seen_reply)];
            flow.got[way] = Some(left[0].1[14..].to_vec());
        } else if whole.is_some_and(|known| known.seen_reply) {
            // What is unusual may settle a flow too.
            flow.ready = flow.ready.map(|ready| ready.filter(|ready| *ready));
        }
        self.agrees(flow);
    }
}

/// Sequence and acknowledgment number of a segment of `side` in that place.
fn numbers(windows: &[[u32; 4]; 2], side: usize, place: Place, length: u32) -> (u32, u32) {
    let [sent, may_send, offered, _] = windows[side];
    let [answers, _, receives, _] = windows[1 - side];
    let late = offered.max(66_000);
    // What is sent may lie beyond what may be: a segment may end there.
    let beyond = sent.wrapping_sub(may_send);
    let beyond = if (beyond as i32) > 0 { beyond } else { 0 };
    let next = sent.wrapping_sub(beyond);
    match place {
        Place::Inside { back, lag } => {
            let most = receives.saturating_sub(beyond);
            (next.wrapping_sub(back % (most + 1)), answers.wrapping_sub(lag % (late + 1)))
        }
        Place::Outside { test: 0, by } => (may_send.wrapping_add(1 + by), answers),
        Place::Outside { test: 1, by } => (next, answers.wrapping_add(1 + by)),
        Place::Outside { test: 2, by } => (sent.wrapping_sub(receives).wrapping_sub(1 + by + length), answers),
        Place::Outside { by, .. } => (next, answers.wrapping_sub(late).wrapping_sub(1 + by)),
    }
}

/// An error from who gets the other direction's packets, about the packet that it got: too big.
fn icmp_error(ends: &Ends, got: &[u8]) -> Vec<u8> {
    let quote = &got[..got.len().min(60)];
    let is_v6 = ends.arrives[0].0.is_ipv6();
    let (protocol, kind) = if is_v6 { (58, [2, 0]) } else { (1, [3, 4]) };
    let l4 = [&kind[..], &[0, 0, 0, 0, 5, 0], quote].concat();
    let [(src, _), (dst, _)] = ends.arrives;
    Packet { src, dst, protocol, ttl: 64, tos: 0, options: 0, l4 }.bytes()
}

/// A table of either family.
trait HandsOver {
    fn hand_over_to(&self, offload: Arc<Offload>);
}

impl<A: Address> HandsOver for weir_conntrack::Table<A> {
    fn hand_over_to(&self, offload: Arc<Offload>) {
        self.offload_to(offload);
    }
}

#[test]
fn a_program_does_what_a_worker_would_have_done() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let pods = [Namespace::new(), Namespace::new()];
    node.run(|| {
        let settings = TrunkSettings { flows: Some(SLOTS), ..node.settings() };
        let mut attachment = Attachment::open(settings).expect("the trunk attaches");
        let kernel = Kernel::new(&mut attachment, &node, [&pods[0], &pods[1]]);
        let near = proptest::collection::btree_set(prop_oneof![Just(CLIENT_POD.0), Just(SERVER_POD.0)], 0..=2);
        let cases = (near, proptest::collection::vec(flows(), 3), proptest::collection::vec(steps(), 1..60));
        let mut runner = TestRunner::new(Config { cases: 1000, failure_persistence: None, ..Config::default() });
        let carried = Cell::new(0);
        let result = runner.run(&cases, |(near, flows, steps)| {
            let mut twins = Twins::new(&kernel, near);
            let mut opened: Vec<Opened> = flows.iter().map(|flow| twins.open(flow)).collect();
            for step in steps {
                match step {
                    Step::Packet { flow, direction, sent, oddity } => {
                        twins.step(&mut opened[flow], direction, &sent, oddity);
                    }
                    Step::Handshake { flow, isn } if opened[flow].protocol == TCP => {
                        twins.begin_anew(&mut opened[flow], isn);
                    }
                    Step::Handshake { .. } => {}
                    Step::Look => twins.look(&mut opened),
                    Step::Publish { is_open, has_backend } => {
                        if twins.rules != (is_open, has_backend) {
                            opened.iter_mut().for_each(|flow| flow.ready = [None; 2]);
                        }
                        twins.publish(is_open, has_backend);
                    }
                }
            }
            carried.set(carried.get() + twins.carried);
            twins.whole.finish();
            twins.split.finish();
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{error}"));
        let counters = attachment.counters().unwrap();
        assert_eq!(counters.get(Counter::Offloaded), carried.get());
    });
}
