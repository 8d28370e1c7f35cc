//! Flows in the kernel: what a program does with a packet is what a worker would have done with it.
//!
//! Two routers with the same tables see the same packets. In one a worker handles them all. In the other they come to the programs first,
//! in the kernel (BPF_PROG_TEST_RUN), with what a keeper has written into their maps; a worker gets what they leave. Both must send the
//! same, byte by byte, and know the same windows afterwards; and the programs must carry what is plain, and nothing else. What they leave,
//! they must leave as it was, and what they know of flows too.
//!
//! Packets come from pods (`workload_send`), from the node's own kernel (`host_send`) and by an uplink, directly and in a tunnel
//! (`uplink_receive`, then `uplink_carry`; or `uplink_take` alone).
//!
//! BPF_PROG_TEST_RUN makes packets with whole checksums only, and, with segments to cut, of no type, which the kernel lets into no tunnel
//! and out of none. So what a sender left to its device (CHECKSUM_PARTIAL), and large packets in tunnels, is left to the end-to-end tests
//! of the offload: all that pods with their CNI's devices send is of that kind.

use crate::node;
use std::{
    cell::Cell,
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, atomic::Ordering},
};

use crate::keys::SharedKeys;
use crate::node::{Namespace, Node, program_info, run_xdp, skipped, xdp_program};
use crate::packets::{IPIP, TCP, UDP};
use crate::router::{CLIENT_POD, GATEWAY_MAC, Router, SERVER_POD, UPLINK, UPLINK_MAC, ip, rules, service};
use crate::segments::{
    ACK, Checksum, Ends, FIN, Gso, MTU, Oddity, Outer, PSH, Place, RST, SYN, Sent, URG, USUAL, cut, ends_of, frame,
    icmp_error, ip_packet, is_inside, mac_of, numbers, oddities, put_into_tunnel, sents, tcp, tunnel_carries,
    tunnelled, udp, without_tunnel_id,
};
use aya::{
    TestRun as _, TestRunOptions,
    programs::{SchedClassifier, Xdp},
};
use crossbeam::channel::Receiver;
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use weir_conntrack::{ConnRef, Identity, OFFLOADED, Windows};
use weir_dataplane::{
    afxdp::trunk::origin,
    attach::{Attachment, Counter, KernelKeys, OffloadMaps, Owned, TrunkSettings, UplinkHook},
    clock::now,
    frame::{IfIndex, LinkType},
    offload::{
        Offload, Request,
        flow::Phase,
        keeper::{Keeper, Keys},
    },
    snapshot::Rules,
};
use weir_nat::SnatPorts;
use weir_packet::{Address, Direction, DropReason, FlowKey, Mac, Ports, Protocol};

// Of both families.
const CLIENT: [&str; 2] = ["10.1.1.10", "fd00:1:1::10"];
const SERVER: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
const REMOTE: [&str; 2] = ["10.1.2.20", "fd00:1:2::20"];
const NODE: [&str; 2] = ["192.168.10.1", "fd00:10::1"];
const OUTSIDE: [&str; 2] = ["192.168.10.100", "fd00:10::100"];
const VIPS: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const FAR_VIPS: [&str; 2] = ["10.96.0.20", "fd00:96::20"];
const NODE_PORT: u16 = 30080;
const SNAT_PORTS: std::ops::RangeInclusive<u16> = 10_000..=20_000;
const SLOTS: u32 = 16;
/// After so many, and the first, an unanswered UDP flow is handed over.
const UDP_PACKETS: u8 = 3;

// --- what is tried

/// Whence and where a flow leads.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Leads {
    /// From the first pod to the second.
    Forth,
    /// From the second to the first.
    Back,
    /// From the first pod to a service, whose backend is the second.
    ToService,
    /// From the second pod to that service, and so to itself.
    ToItself,
    /// From the first pod to one on node b: in a tunnel for IPv4, directly for IPv6. And from there.
    ToRemote,
    FromRemote,
    /// From the first pod to a service, whose backend is on node b.
    ToFarService,
    /// From the first pod to somebody outside of the cluster, for whom it is the node. And from there.
    ToOutside,
    FromOutside,
    /// From outside to a node port, whose backend is the second pod.
    ToNodePort,
    /// From the node to the second pod, and to the service with that pod as its backend; from the first pod to the node.
    FromNode,
    FromNodeToService,
    ToNode,
}

impl Leads {
    const ALL: [Self; 13] = [
        Self::Forth,
        Self::Back,
        Self::ToService,
        Self::ToItself,
        Self::ToRemote,
        Self::FromRemote,
        Self::ToFarService,
        Self::ToOutside,
        Self::FromOutside,
        Self::ToNodePort,
        Self::FromNode,
        Self::FromNodeToService,
        Self::ToNode,
    ];

    /// Source, destination with its port, and the device that the first packet comes by.
    fn ends(self, family: usize) -> (IpAddr, (IpAddr, u16), IfIndex) {
        let (from, to, port, device) = match self {
            Self::Forth => (CLIENT, SERVER, 80, CLIENT_POD),
            Self::Back => (SERVER, CLIENT, 80, SERVER_POD),
            Self::ToService => (CLIENT, VIPS, 53, CLIENT_POD),
            Self::ToItself => (SERVER, VIPS, 53, SERVER_POD),
            Self::ToRemote => (CLIENT, REMOTE, 80, CLIENT_POD),
            Self::FromRemote => (REMOTE, SERVER, 80, UPLINK),
            Self::ToFarService => (CLIENT, FAR_VIPS, 53, CLIENT_POD),
            Self::ToOutside => (CLIENT, OUTSIDE, 80, CLIENT_POD),
            Self::FromOutside => (OUTSIDE, SERVER, 80, UPLINK),
            Self::ToNodePort => (OUTSIDE, NODE, NODE_PORT, UPLINK),
            Self::FromNode => (NODE, SERVER, 80, IfIndex::HOST),
            Self::FromNodeToService => (NODE, VIPS, 53, IfIndex::HOST),
            Self::ToNode => (CLIENT, NODE, 9090, CLIENT_POD),
        };
        (ip(from[family]), (ip(to[family]), port), device)
    }

    /// Whether packets come by the uplink, of either direction.
    fn is_by_uplink(self) -> bool {
        matches!(
            self,
            Self::ToRemote
                | Self::FromRemote
                | Self::ToFarService
                | Self::ToOutside
                | Self::FromOutside
                | Self::ToNodePort
        )
    }

    /// Whether a service claims it: it is not picked up in the middle then.
    fn is_claimed(self) -> bool {
        matches!(
            self,
            Self::ToService | Self::ToItself | Self::ToFarService | Self::ToNodePort | Self::FromNodeToService
        )
    }
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
    let leads = proptest::sample::select(Leads::ALL.to_vec());
    let scale = || proptest::option::of(0..=14u8);
    let isn = || prop_oneof![any::<u32>(), u32::MAX - 3000..=u32::MAX];
    let protocol = prop_oneof![Just(TCP), Just(UDP)];
    (protocol, any::<bool>(), leads, proptest::bool::weighted(0.25), [isn(), isn()], [scale(), scale()]).prop_map(
        |(protocol, is_v6, leads, is_half_seen, isn, scales)| {
            let is_half_seen = is_half_seen && (protocol == UDP || !leads.is_claimed());
            Flow { protocol, is_v6, leads, is_half_seen, isn, scales }
        },
    )
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

/// The programs and their maps, which all cases share.
struct Kernel<'a> {
    attachment: &'a Attachment,
    workload_send: SchedClassifier,
    host_send: SchedClassifier,
    uplink_receive: Xdp,
    uplink_carry: SchedClassifier,
    uplink_take: SchedClassifier,
    offload: Arc<Offload>,
    requests: Receiver<Request>,
    keys: SharedKeys<KernelKeys>,
}

/// What became of a frame that came to the programs.
enum Ran {
    /// It was redirected, so rewritten, by that way of a slot, which counted so many packets and bytes.
    Carried { frame: Vec<u8>, slot: u32, direction: Direction, counted: (u64, u64) },
    /// It is a worker's.
    Left(LinkType),
    /// It is the node's own kernel's.
    Passed,
}

/// All that the programs may change of a slot.
#[derive(Clone, PartialEq, Eq, Debug)]
struct SlotState {
    state: (u32, Phase),
    epoch: u32,
    windows: [[u32; 4]; 2],
    carried: [(u64, u64); 2],
}

impl<'a> Kernel<'a> {
    /// Before the trunk is made: the uplink has the index and the MAC address that the router's tables say.
    fn add_uplink(outside: &Namespace) {
        let (index, there) = (UPLINK.0, &outside.name);
        node::shell(&format!(
            "ip link add eth0 index {index} address {UPLINK_MAC} type veth peer name eth0 netns {there}; ip link set eth0 up"
        ));
    }

    /// So have the pods' devices.
    fn new(attachment: &'a mut Attachment, node: &Node, pods: [&Namespace; 2]) -> Self {
        for (name, index, pod) in [("cali1", CLIENT_POD, pods[0]), ("cali2", SERVER_POD, pods[1])] {
            let (index, mac, there) = (index.0, GATEWAY_MAC, &pod.name);
            node::shell(&format!(
                "ip link add {name} index {index} address {mac} type veth peer name eth0 netns {there}; ip link set {name} up"
            ));
            attachment.adopt_workload(index, name, mac, true).unwrap();
        }
        let owned = Owned {
            prefixes: ["10.1.1.0/24", "fd00:1:1::/64", "10.96.0.0/16", "fd00:96::/112"]
                .map(|text| text.parse().unwrap())
                .into(),
            node_addresses: NODE.map(ip).into(),
            ports: [Protocol::TCP, Protocol::UDP]
                .into_iter()
                .flat_map(|protocol| [(protocol, SNAT_PORTS), (protocol, NODE_PORT..=NODE_PORT)])
                .collect(),
            failsafe_ports: Vec::new(),
            own_ports: Vec::new(),
            governed: false,
        };
        attachment.set_owned(&owned).unwrap();
        let classifier = |pin: &str, name: &'static str| {
            SchedClassifier::from_program_info(program_info(&node.pins.join(pin)), name.into()).unwrap()
        };
        let uplink_tc = format!("uplink_carry_{}", UPLINK.0);
        // One after the other; whoever holds a program can run it.
        attachment.attach_uplink(UPLINK.0, "eth0", Some(UplinkHook::Tc)).unwrap();
        let uplink_take = classifier(&uplink_tc, "uplink_take");
        attachment.attach_uplink(UPLINK.0, "eth0", Some(UplinkHook::Xdp)).unwrap();
        let OffloadMaps { flows, epoch, keys } = attachment.take_offload().expect("there are to be flows");
        let (offload, requests) = Offload::new(flows, epoch, UDP_PACKETS);
        Self {
            attachment,
            workload_send: classifier(&format!("workload_{}", CLIENT_POD.0), "workload_send"),
            host_send: classifier("trunk_host_send", "host_send"),
            uplink_receive: xdp_program(&node.pins.join(format!("uplink_{}", UPLINK.0))),
            uplink_carry: classifier(&uplink_tc, "uplink_carry"),
            uplink_take,
            offload: Arc::new(offload),
            requests,
            keys: SharedKeys(Arc::new(Mutex::new(keys))),
        }
    }

    fn slots(&self) -> Vec<SlotState> {
        let state = |slot| {
            let flow = self.offload.flow(slot).expect("there are so many");
            SlotState {
                state: flow.state(),
                epoch: flow.epoch.load(Ordering::Relaxed),
                windows: flow.windows(),
                carried: [Direction::Original, Direction::Reply].map(|direction| flow.carried(direction)),
            }
        };
        (0..SLOTS).map(state).collect()
    }

    /// Runs the programs on a frame that came by a device, an uplink with these programs.
    fn run(&self, device: IfIndex, hook: UplinkHook, frame: &[u8], gso: Option<Gso>) -> Ran {
        const XDP_DROP: u32 = 1;
        const TC_ACT_UNSPEC: u32 = u32::MAX;
        const TC_ACT_SHOT: u32 = 2;
        const TC_ACT_REDIRECT: u32 = 7;
        let before = self.slots();
        // What the uplink's first program found no socket for, and what it left to the second one.
        let counters = || {
            let counters = self.attachment.counters().unwrap();
            [Counter::UplinkUnclaimedPassed, Counter::UplinkMerged].map(|counter| counters.get(counter))
        };
        let counters_before = if device == UPLINK { counters() } else { [0; 2] };
        let link = if frame[..6] == mac_of(device).0 { LinkType::Host } else { LinkType::Other };
        // No socket is there to take what it would give to a worker. What a device is still to cut was merged behind it.
        if (device, hook) == (UPLINK, UplinkHook::Xdp)
            && cut(frame, gso).iter().any(|frame| run_xdp(&self.uplink_receive, frame, UPLINK.0, 0) == XDP_DROP)
        {
            assert_eq!(self.slots(), before);
            return Ran::Left(link);
        }
        let (program, index) = match device {
            IfIndex::HOST => (&self.host_send, self.attachment.trunk().kernel_end),
            UPLINK if hook == UplinkHook::Tc => (&self.uplink_take, UPLINK.0),
            UPLINK => (&self.uplink_carry, UPLINK.0),
            IfIndex(index) => (&self.workload_send, index),
        };
        // struct __sk_buff, up to gso_size.
        let mut context = [0_u32; 45];
        // What the node itself makes it has not received.
        (context[9], context[10]) = (if device == IfIndex::HOST { 0 } else { index }, index);
        if let Some(gso) = gso {
            context[44] = gso.size.into();
            context[41] = if gso.tells_count { cut(frame, Some(gso)).len() as u32 } else { 0 };
        }
        let run = |context: [u32; 45]| {
            let context = context.map(u32::to_ne_bytes).concat();
            let mut out = vec![0; 4096];
            let result = program.test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                ctx_in: Some(&context),
                ..TestRunOptions::new()
            });
            let result = result.expect("a test run");
            out.truncate(result.data_size_out as usize);
            (out, result.return_value)
        };
        if device == IfIndex::HOST {
            // What its kernel only forwards is never carried, whatever it looks like, and has that on it.
            let mut forwarded = context;
            forwarded[9] = UPLINK.0;
            let (out, action) = run(forwarded);
            let marked = origin(Mac(*out.first_chunk().unwrap()));
            assert_eq!((action, marked), (TC_ACT_UNSPEC, (UPLINK.forwarded(), LinkType::Host)));
            assert_eq!(out[6..], frame[6..]);
            assert_eq!(self.slots(), before);
        }
        let (out, action) = run(context);

        let mut after = self.slots();
        for direction in [Direction::Original, Direction::Reply] {
            let at = direction as usize;
            let Some(slot) = (0..before.len()).find(|slot| after[*slot].carried[at] != before[*slot].carried[at])
            else {
                continue;
            };
            let ((packets, bytes), (packets_before, bytes_before)) =
                (after[slot].carried[at], before[slot].carried[at]);
            // Nothing else has changed, but for this flow's windows.
            (after[slot].carried[at], after[slot].windows) = (before[slot].carried[at], before[slot].windows);
            assert_eq!((after, action), (before, TC_ACT_REDIRECT));
            let counted = (packets - packets_before, bytes - bytes_before);
            return Ran::Carried { frame: out, slot: slot as u32, direction, counted };
        }
        assert_eq!(after, before, "the programs know of flows what they knew before");
        match (device, action) {
            (IfIndex::HOST, TC_ACT_UNSPEC) => {
                assert_eq!(origin(Mac(*out.first_chunk().unwrap())), (IfIndex::HOST, LinkType::Host));
                assert_eq!(out[6..], frame[6..]);
                Ran::Left(LinkType::Host)
            }
            (UPLINK, TC_ACT_UNSPEC) => {
                assert_eq!(out, frame);
                let ([unclaimed, merged], [unclaimed_before, merged_before]) = (counters(), counters_before);
                assert_eq!(merged, merged_before, "a worker's at least, and not the node's kernel's");
                if unclaimed > unclaimed_before { Ran::Left(link) } else { Ran::Passed }
            }
            // Nor is there one for this program.
            (UPLINK, TC_ACT_SHOT) if hook == UplinkHook::Tc => {
                assert_eq!(out, frame);
                Ran::Left(link)
            }
            (_, action) => {
                assert_eq!((action, origin(Mac(*out.first_chunk().unwrap()))), (TC_ACT_REDIRECT, (device, link)));
                assert_eq!(out[6..], frame[6..], "a worker gets it as it came");
                Ran::Left(link)
            }
        }
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
    let all = [(Protocol::TCP, "tcp"), (Protocol::UDP, "udp")].map(|(protocol, name)| {
        [("near", VIPS, SERVER, Some(NODE_PORT)), ("far", FAR_VIPS, REMOTE, None)].map(
            |(place, vips, backends, port)| service(&format!("default/{place}-{name}"), protocol, vips, backends, port),
        )
    });
    let services = all.into_iter().flatten().map(|mut service| {
        if !has_backend {
            service.endpoints.clear();
        }
        service
    });
    rules(services.collect(), is_open)
}

/// A flow of the case.
struct Opened {
    leads: Leads,
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
    kernel: &'k Kernel<'k>,
    /// Which programs are on the uplink.
    hook: UplinkHook,
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
    fn new(kernel: &'k Kernel<'k>, hook: UplinkHook, near: BTreeSet<u32>) -> Self {
        kernel.clear();
        let rules = (true, true);
        let router = || {
            let snat = SnatPorts::new(SNAT_PORTS, []).unwrap();
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
        Self { kernel, hook, whole, split, keeper, graces: 0, carried: 0, rules, next_port: 40_000 }
    }

    /// Sends a frame through both; whether the programs carried it, and what left.
    fn pass(&mut self, device: IfIndex, frame: &[u8], gso: Option<Gso>) -> (bool, Vec<(IfIndex, Vec<u8>)>) {
        let ran = self.kernel.run(device, self.hook, frame, gso);
        let segments = cut(frame, gso);
        let through = |router: &mut Router| -> Vec<(IfIndex, Vec<u8>)> {
            let sent = segments.iter().flat_map(|segment| router.one(device, segment));
            sent.map(|(device, frame)| (device, without_tunnel_id(device, frame))).collect()
        };
        let (is_carried, sent) = match ran {
            Ran::Passed => return (false, Vec::new()),
            Ran::Left(link) => {
                assert_eq!(link, LinkType::Host);
                (false, through(&mut self.split))
            }
            Ran::Carried { frame, slot, direction, counted } => {
                self.carried += 1;
                let bytes = segments.iter().map(|segment| segment.len() as u64 - 14 - tunnel_bytes(segment));
                assert_eq!(counted, (segments.len() as u64, bytes.sum()), "packets and bytes");
                // The kernel does not tell where it was redirected to.
                let way = &self.kernel.offload.flow(slot).unwrap().ways[direction as usize];
                let to = IfIndex(way.device.load(Ordering::Relaxed));
                let sent = cut(&frame, gso).into_iter().map(|frame| (to, without_tunnel_id(to, frame)));
                (true, sent.collect())
            }
        };
        assert_eq!(sent, through(&mut self.whole), "carried: {is_carried}");
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
            let packet = if ends.in_tunnel { tunnelled(&packet, &USUAL, None) } else { packet };
            let (is_carried, _) = self.pass(ends.device, &frame(&packet, mac_of(ends.device), ends.device), None);
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
        let (from, to, device) = flow.leads.ends(family);
        let arrives = [(from, port), to];
        let in_tunnel = flow.leads == Leads::FromRemote && !flow.is_v6;
        // It is not translated; where it is, the first packet tells how.
        let mut ends = [
            Ends { arrives, leaves: arrives, device, in_tunnel },
            Ends { arrives: [arrives[1], arrives[0]], leaves: [arrives[1], arrives[0]], device, in_tunnel: false },
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
            let packet = if ends_now.in_tunnel { tunnelled(&packet, &USUAL, None) } else { packet };
            let (is_carried, sent) =
                self.pass(ends_now.device, &frame(&packet, mac_of(ends_now.device), ends_now.device), None);
            assert!(!is_carried && sent.len() == 1, "{flow:?}: {sent:?}");
            if nth == 0 {
                let (device, left) = &sent[0];
                let inner = tunnel_carries(&left[14..]);
                let [from, to] = ends_of(inner.unwrap_or(&left[14..]));
                ends[0].leaves = [from, to];
                ends[1] = Ends { arrives: [to, from], device: *device, in_tunnel: inner.is_some(), ..ends[1] };
            }
        }
        let identity = known(&mut self.whole, flow.protocol, arrives).expect("it is opened").identity;
        let opened = Opened {
            leads: flow.leads,
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
        // To where the other direction's come from.
        for (way, opposite) in slot.ways.iter().zip(flow.ends.iter().rev()) {
            assert_eq!(way.device.load(Ordering::Relaxed), opposite.device.0);
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
        let is_over = whole.is_none();
        let is_liberal = whole.and_then(|known| known.windows).is_some_and(|windows| windows.is_liberal);
        let (mut sent, mtu) = (sent.clone(), flow.ends[1 - way].mtu());
        let may_be_merged = matches!(oddity, None | Some(Oddity::Ttl(_) | Oddity::UnknownPort | Oddity::OtherDevice));
        if !may_be_merged || ends.in_tunnel || flow.ends[1 - way].in_tunnel {
            sent.gso = None;
        }
        if sent.gso.is_some() && matches!(sent.checksum, Checksum::Fixed(_)) {
            sent.checksum = Checksum::Right;
        }
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
            Some(Oddity::TooBig(by)) => mtu.min(MTU) - header_bytes + usize::from(by),
            _ if let Some(gso) = sent.gso => gso.bytes,
            _ => sent.payload_bytes.min(MTU - header_bytes),
        };
        let payload: Vec<u8> = (0..payload_bytes).map(|at| (at as u8).wrapping_mul(sent.fill)).collect();
        let is_merged = sent.gso.is_some_and(|gso| usize::from(gso.size) < gso.bytes);
        let mut is_outside = false;
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
            let first_and_last = match sent.gso.filter(|_| is_merged) {
                Some(Gso { size, bytes, .. }) => {
                    [u32::from(size), (bytes as u32 - 1) / u32::from(size) * u32::from(size)]
                }
                None if let Some(Oddity::DataOffset(words @ 5..)) = oddity => {
                    // What it calls options is no data.
                    let bytes = (20 + options.len() + payload_bytes).saturating_sub(4 * usize::from(words));
                    [bytes as u32, 0]
                }
                None => [payload_bytes as u32, 0],
            };
            let passes = is_inside(&flow.windows, way, seq, ack, first_and_last) || is_liberal && !is_merged;
            is_outside = !passes;
            tcp(seq, ack, sent.flags, sent.window, &options, &payload)
        } else {
            udp(&payload)
        };
        let mut packet = ip_packet(&ends, flow.protocol, &sent, l4);
        let mut device = ends.device;
        let mut destination = None;
        let mut is_odd = oddity.is_some_and(|oddity| oddity.spoil(&mut packet, flow.protocol));
        match oddity {
            Some(Oddity::OtherDevice) => {
                device = if device == CLIENT_POD { SERVER_POD } else { CLIENT_POD };
            }
            Some(Oddity::OtherMac) => destination = Some(Mac([10, 0, 0, 0, 0, 99])),
            Some(Oddity::IcmpError) => match &flow.got[1 - way] {
                Some(got) => packet = icmp_error(&flow.ends[way], got),
                None => is_odd = false,
            },
            _ => {}
        }
        let largest = sent.gso.map_or(packet.len(), |gso| header_bytes + gso.bytes.min(gso.size.into()));
        is_odd |= largest > mtu && !is_over;
        let outer = if let Some(Oddity::Outer(outer)) = oddity { Some(outer) } else { None };
        if !is_v6 && ends.device == UPLINK {
            is_odd |= put_into_tunnel(&mut packet, ends.in_tunnel, &sent, outer);
        }
        let frame = frame(&packet, destination.unwrap_or(mac_of(device)), device);
        if destination.is_some() {
            let ran = self.kernel.run(device, self.hook, &frame, None);
            assert!(matches!(ran, Ran::Left(LinkType::Other) | Ran::Passed) || device == IfIndex::HOST);
            return;
        }

        let (is_carried, left) = self.pass(device, &frame, sent.gso);
        if is_carried && matches!(sent.place, Place::Edge { .. }) {
            // A whole window at once takes its time, in which the keeper looks.
            self.keeper.look(&self.split.tables);
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
        } else if !is_odd
            && !is_outside
            && left.first().is_some_and(|(_, frame)| is_of_flow(frame, flow.protocol))
            && !matches!(sent.checksum, Checksum::Fixed(_))
        {
            flow.ready = [Some(true), whole.map(|known| known.seen_reply)];
            let left = &left[0].1[14..];
            flow.got[way] = Some(tunnel_carries(left).unwrap_or(left).to_vec());
        } else if whole.is_some_and(|known| known.seen_reply) {
            // What is unusual may settle a flow too.
            flow.ready = flow.ready.map(|ready| ready.filter(|ready| *ready));
        }
        self.agrees(flow);
    }
}

/// Whether a frame has the flow's own packet, and not what its sender is told when its backend is gone: a RST, or an ICMP error.
fn is_of_flow(frame: &[u8], protocol: u8) -> bool {
    let ip = tunnel_carries(&frame[14..]).unwrap_or(&frame[14..]);
    let (found, header_bytes) = if ip[0] >> 4 == 4 { (ip[9], usize::from(ip[0] & 15) * 4) } else { (ip[6], 40) };
    found == protocol && (protocol != TCP || ip[header_bytes + 13] & RST == 0)
}

/// Bytes of a tunnel's header in a frame.
fn tunnel_bytes(frame: &[u8]) -> u64 {
    if frame[14] >> 4 == 4 && frame[23] == IPIP { 20 } else { 0 }
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

/// Runs `work` with the programs attached on a node of its own.
fn with_kernel(work: impl FnOnce(&Kernel<'_>) + Send) {
    if skipped() {
        return;
    }
    let node = Node::new();
    let (pods, outside) = ([Namespace::new(), Namespace::new()], Namespace::new());
    node.run(|| {
        Kernel::add_uplink(&outside);
        let settings = TrunkSettings { flows: Some(SLOTS), ..node.settings() };
        let mut attachment = Attachment::open(settings).expect("the trunk attaches");
        let kernel = Kernel::new(&mut attachment, &node, [&pods[0], &pods[1]]);
        work(&kernel);
        assert_eq!(kernel.attachment.counters().unwrap().get(Counter::OffloadFailed), 0);
    });
}

#[test]
fn a_program_does_what_a_worker_would_have_done() {
    with_kernel(|kernel| {
        let near = proptest::collection::btree_set(prop_oneof![Just(CLIENT_POD.0), Just(SERVER_POD.0)], 0..=2);
        let hook = prop_oneof![Just(UplinkHook::Xdp), Just(UplinkHook::Tc)];
        let cases = (near, hook, proptest::collection::vec(flows(), 3), proptest::collection::vec(steps(), 1..60));
        let mut runner = TestRunner::new(Config { cases: 1000, failure_persistence: None, ..Config::default() });
        let carried = Cell::new(0);
        let result = runner.run(&cases, |(near, hook, flows, steps)| {
            let mut twins = Twins::new(kernel, hook, near);
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
        let counters = kernel.attachment.counters().unwrap();
        assert_eq!(counters.get(Counter::Offloaded), carried.get());
    });
}

/// One flow of every kind, open, with large windows, after a plain packet of each direction, which was carried.
fn each_flow(kernel: &Kernel<'_>, mut work: impl FnMut(&mut Twins<'_>, &mut Opened)) {
    for leads in Leads::ALL {
        let is_by_uplink = |hook: &UplinkHook| *hook == UplinkHook::Xdp || leads.is_by_uplink();
        for hook in [UplinkHook::Xdp, UplinkHook::Tc].into_iter().filter(is_by_uplink) {
            for (is_v6, protocol) in [(false, TCP), (false, UDP), (true, TCP), (true, UDP)] {
                let mut twins = Twins::new(kernel, hook, BTreeSet::new());
                let flow =
                    Flow { protocol, is_v6, leads, is_half_seen: false, isn: [1000, 2000], scales: [Some(0); 2] };
                let mut opened = twins.open(&flow);
                for direction in DIRECTIONS {
                    twins.step(&mut opened, direction, &DATA, None);
                }
                assert_eq!(twins.carried, 2, "{flow:?}");
                work(&mut twins, &mut opened);
                twins.whole.finish();
                twins.split.finish();
            }
        }
    }
}

const DIRECTIONS: [Direction; 2] = [Direction::Original, Direction::Reply];
const DATA: Sent = Sent { payload_bytes: 100, fill: 3, window: u16::MAX, ..USUAL };

#[test]
fn whatever_is_odd_about_a_packet_leaves_it_to_a_worker() {
    let flags = [FIN | ACK, SYN, SYN | ACK, RST, RST | ACK, URG | ACK, 0, PSH].map(Oddity::Flags);
    let outer = [
        Outer::Otherwise,
        Outer::Ttl(1),
        Outer::Options,
        Outer::Fragment,
        Outer::BadChecksum,
        Outer::Length(1),
        Outer::Length(-1),
        Outer::Padding(1),
        Outer::From(1),
        Outer::From(3),
        Outer::From(100),
        Outer::Twice,
    ]
    .map(Oddity::Outer);
    let others = [
        Oddity::Ttl(0),
        Oddity::Ttl(1),
        Oddity::IpOptions,
        Oddity::FirstFragment,
        Oddity::LaterFragment,
        Oddity::BadHeaderChecksum,
        Oddity::Length(1),
        Oddity::Length(-1),
        Oddity::UdpLength(1),
        Oddity::UdpLength(-1),
        Oddity::DataOffset(4),
        Oddity::DataOffset(15),
        Oddity::Padding(1),
        Oddity::TooBig(1),
        Oddity::NoChecksum,
        Oddity::UnknownPort,
        Oddity::OtherDevice,
        Oddity::OtherMac,
        Oddity::IcmpError,
    ];
    with_kernel(|kernel| {
        for oddity in flags.into_iter().chain(outer).chain(others) {
            for direction in DIRECTIONS {
                each_flow(kernel, |twins, flow| twins.step(flow, direction, &DATA, Some(oddity)));
            }
        }
    });
}

#[test]
fn segments_to_be_cut_are_carried_together() {
    with_kernel(|kernel| {
        each_flow(kernel, |twins, flow| {
            for direction in DIRECTIONS {
                // Without their number, too, which a program must find out. The last are more than fits.
                for (size, bytes, tells_count) in
                    [(500, 1600, true), (500, 1500, false), (500, 400, false), (1400, 2900, true), (1490, 1491, true)]
                {
                    let gso = Some(Gso { size, bytes, tells_count });
                    twins.step(flow, direction, &Sent { gso, flags: ACK | PSH, ..DATA }, None);
                }
            }
        });
    });
}

/// A worker gets them one by one: it would drop those that are outside, and only those.
#[test]
fn segments_to_be_cut_are_carried_only_if_each_is_inside_the_window() {
    with_kernel(|kernel| {
        each_flow(kernel, |twins, flow| {
            for direction in DIRECTIONS {
                for place in [
                    Place::Old { by: 501 },
                    Place::Old { by: 500 },
                    Place::Edge { before: 1499 },
                    Place::Edge { before: 1500 },
                    Place::Edge { before: 0 },
                ] {
                    let gso = Some(Gso { size: 500, bytes: 1600, tells_count: true });
                    twins.step(flow, direction, &Sent { gso, place, ..DATA }, None);
                }
            }
        });
    });
}

#[test]
fn congestion_is_told_through_tunnels() {
    with_kernel(|kernel| {
        each_flow(kernel, |twins, flow| {
            for direction in DIRECTIONS {
                for both in 0..16 {
                    let sent = Sent { tos: 0xb8 | both >> 2, outer_tos: 0x60 | both & 3, ..DATA };
                    twins.step(flow, direction, &sent, None);
                }
            }
        });
    });
}

#[test]
fn what_a_publication_denies_is_left_from_then_on_and_nothing_else() {
    with_kernel(|kernel| {
        let mut denied = BTreeSet::new();
        each_flow(kernel, |twins, flow| {
            twins.publish(false, true);
            let stale = || kernel.attachment.counters().unwrap().get(Counter::OffloadStale);
            for direction in DIRECTIONS {
                flow.ready = [None; 2];
                let (carried, before) = (twins.carried, stale());
                twins.step(flow, direction, &DATA, None);
                // A worker would have dropped what a program carries, or the other way round.
                let is_carried = twins.carried > carried;
                let is_denied = twins.whole.drops().contains_key(&DropReason::PolicyDeniedIngress);
                assert_eq!((is_carried, stale() > before), (!is_denied, is_denied), "{:?}", flow.leads);
                if is_denied {
                    denied.insert(flow.leads);
                }
            }
        });
        let into_pods =
            [Leads::Forth, Leads::Back, Leads::ToService, Leads::FromRemote, Leads::FromOutside, Leads::ToNodePort];
        assert_eq!(denied, into_pods.into());
    });
}
