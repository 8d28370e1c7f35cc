//! Fragments through the whole pipeline, over the memory driver, against a dull model of what must leave.
//!
//! The model keeps lists, knows no connection table, and computes every checksum from scratch.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, ip, octets, rules, service, sum, tunnelled};
use proptest::prelude::*;
use weir_conntrack::TcpState;
use weir_dataplane::{
    fragments::{LIFETIME, PATIENCE},
    frame::IfIndex,
    snapshot::Rules,
};
use weir_nat::SnatPorts;
use weir_packet::{DropReason, Protocol};

/// A router with room for 1024 connections.
fn router() -> Router {
    Router::new(all_rules(true), SnatPorts::new(10000..=20000, [30053]).unwrap(), 1024)
}

fn all_rules(is_open: bool) -> Rules {
    let local = ["10.1.1.20", "fd00:1:1::20"];
    let remote = ["10.1.2.20", "fd00:1:2::20"];
    let services = vec![
        service("default/local", Protocol::UDP, ["10.96.0.10", "fd00:96::10"], local, Some(30053)),
        service("default/remote", Protocol::UDP, ["10.96.0.11", "fd00:96::11"], remote, None),
        service("default/sctp", Protocol::SCTP, ["10.96.0.12", "fd00:96::12"], local, None),
    ];
    rules(services, is_open)
}

/// Protocol and ends of a packet; an echo's identifier is its source port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Ends {
    protocol: u8,
    src: IpAddr,
    dst: IpAddr,
    ports: (u16, u16),
}

const UDP: u8 = 17;
const TCP: u8 = 6;
const SCTP: u8 = 132;

impl Ends {
    fn new(protocol: u8, src: &str, dst: &str, ports: (u16, u16)) -> Self {
        Self { protocol, src: ip(src), dst: ip(dst), ports }
    }

    /// A UDP datagram or an echo request with that payload.
    fn l4(&self, payload: &[u8]) -> Vec<u8> {
        let total = 8 + payload.len();
        let mut pseudo = [octets(self.src), octets(self.dst)].concat();
        pseudo.extend((total as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, self.protocol]);
        let (mut bytes, at) = match self.protocol {
            UDP => {
                let mut header = [self.ports.0.to_be_bytes(), self.ports.1.to_be_bytes()].concat();
                header.extend((total as u16).to_be_bytes());
                (header, 6)
            }
            1 => {
                pseudo.clear();
                (vec![8, 0], 2)
            }
            _ => (vec![128, 0], 2),
        };
        if at == 2 {
            bytes.extend([0, 0]);
            bytes.extend(self.ports.0.to_be_bytes());
            bytes.extend([0, 1]);
        } else {
            bytes.extend([0, 0]);
        }
        bytes.extend(payload);
        let checksum = match !sum(&[pseudo, bytes.clone()].concat()) {
            0 if at == 6 => 0xffff,
            checksum => checksum,
        };
        bytes[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }

    /// The frame of one fragment (or, where it is all of the packet, of the whole one).
    fn frame(&self, id: u32, l4: &[u8], start: usize, end: usize, more: bool) -> Vec<u8> {
        let data = &l4[start..end];
        let is_whole = start == 0 && !more;
        let mut frame = [&[0xee; 6][..], &[10, 0, 0, 0, 0, 1]].concat();
        if self.src.is_ipv4() {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((20 + data.len() as u16).to_be_bytes());
            frame.extend((id as u16).to_be_bytes());
            frame.extend(((start as u16 / 8) | (u16::from(more) << 13)).to_be_bytes());
            frame.extend([64, self.protocol, 0, 0]);
            frame.extend([octets(self.src), octets(self.dst)].concat());
            let checksum = !sum(&frame[14..34]);
            frame[24..26].copy_from_slice(&checksum.to_be_bytes());
        } else {
            let extension = if is_whole { 0 } else { 8 };
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((data.len() as u16 + extension).to_be_bytes());
            frame.extend([if is_whole { self.protocol } else { 44 }, 64]);
            frame.extend([octets(self.src), octets(self.dst)].concat());
            if !is_whole {
                frame.extend([self.protocol, 0]);
                frame.extend((start as u16 | u16::from(more)).to_be_bytes());
                frame.extend(id.to_be_bytes());
            }
        }
        frame.extend(data);
        frame
    }
}

/// A fragment that left.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Part {
    ends: Ends,
    id: u32,
    start: usize,
    more: bool,
    data: Vec<u8>,
}

/// Reads a fragment of who passed a router; the ports are 0. Asserts what every packet that leaves must have.
fn read(packet: &[u8]) -> Part {
    read_with(packet, 63)
}

/// Reads a fragment with that many hops left.
fn read_with(packet: &[u8], hops: u8) -> Part {
    let address = |at: usize, bytes: usize| -> IpAddr {
        match bytes {
            4 => Ipv4Addr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).unwrap()).into(),
            _ => Ipv6Addr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).unwrap()).into(),
        }
    };
    let word = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    if packet[0] >> 4 == 4 {
        assert_eq!((sum(&packet[..20]), usize::from(word(2)), packet[8]), (0xffff, packet.len(), hops));
        let ends = Ends { protocol: packet[9], src: address(12, 4), dst: address(16, 4), ports: (0, 0) };
        let (id, start, more) = (word(4).into(), usize::from(word(6) & 0x1fff) * 8, word(6) & 0x2000 != 0);
        return Part { ends, id, start, more, data: packet[20..].to_vec() };
    }
    assert_eq!((usize::from(word(4)) + 40, packet[6], packet[7]), (packet.len(), 44, hops));
    let ends = Ends { protocol: packet[40], src: address(8, 16), dst: address(24, 16), ports: (0, 0) };
    let id = u32::from_be_bytes(packet[44..48].try_into().unwrap());
    Part { ends, id, start: usize::from(word(42) & 0xfff8), more: word(42) & 1 != 0, data: packet[48..].to_vec() }
}

/// A way through the router.
#[derive(Clone, Copy, Debug)]
struct Way {
    from: IfIndex,
    from_tunnel: bool,
    original: Ends,
    /// As it leaves, but for a source port of weir's choice.
    translated: Ends,
    own_port: bool,
    to: IfIndex,
    to_tunnel: bool,
}

fn ways() -> Vec<Way> {
    let way = |from, original, translated, to| Way {
        from,
        from_tunnel: false,
        original,
        translated,
        own_port: false,
        to,
        to_tunnel: false,
    };
    let mut all = Vec::new();
    for six in [false, true] {
        let pick = |four, or_six| if six { or_six } else { four };
        let client = pick("10.1.1.10", "fd00:1:1::10");
        let server = pick("10.1.1.20", "fd00:1:1::20");
        let remote = pick("10.1.2.20", "fd00:1:2::20");
        let node = pick("192.168.10.1", "fd00:10::1");
        let outside = pick("192.168.10.100", "fd00:10::100");
        let icmp = pick_protocol(six);
        let udp = |src, dst, source, destination| Ends::new(UDP, src, dst, (source, destination));
        let echo = |src, dst| Ends::new(icmp, src, dst, (77, 0));
        let direct = udp(client, server, 1000, 2000);
        all.push(way(CLIENT_POD, direct, direct, SERVER_POD));
        let vip = udp(client, pick("10.96.0.10", "fd00:96::10"), 1001, 53);
        all.push(way(CLIENT_POD, vip, udp(client, server, 1001, 5353), SERVER_POD));
        let vip = udp(client, pick("10.96.0.11", "fd00:96::11"), 1002, 53);
        let tunnel = Way { to_tunnel: !six, ..way(CLIENT_POD, vip, udp(client, remote, 1002, 5353), UPLINK) };
        all.push(tunnel);
        let node_port = udp(outside, node, 1003, 30053);
        let masqueraded = way(UPLINK, node_port, udp(node, server, 0, 5353), SERVER_POD);
        all.push(Way { own_port: true, ..masqueraded });
        all.push(way(CLIENT_POD, echo(client, outside), echo(node, outside), UPLINK));
        let from_remote = way(UPLINK, echo(remote, server), echo(remote, server), SERVER_POD);
        all.push(Way { from_tunnel: !six, ..from_remote });
    }
    all
}

fn pick_protocol(six: bool) -> u8 {
    if six { 58 } else { 1 }
}

/// A fragment as it is sent in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    start: usize,
    end: usize,
    more: bool,
}

/// The dull model of one packet's fragments: what leaves, in which order, and what is dropped, why.
#[derive(Default, Debug)]
struct Model {
    seen: Vec<Piece>,
    held: Vec<Piece>,
    is_dead: bool,
    leaves: Vec<Piece>,
}

impl Model {
    fn arrive(&mut self, piece: Piece, drops: &mut BTreeMap<DropReason, u64>) {
        let mut drop = |reason, count: usize| *drops.entry(reason).or_default() += count as u64;
        let known_end = self.seen.iter().find(|p| !p.more).map(|p| p.end);
        let contradicts = match (known_end, piece.more) {
            (Some(end), true) => piece.end >= end,
            (Some(end), false) => piece.end != end,
            (None, false) => self.seen.iter().any(|p| p.end > piece.end),
            (None, true) => false,
        };
        if self.is_dead {
            return drop(DropReason::FragmentOverlap, 1);
        }
        if self.seen.contains(&piece) {
            return drop(DropReason::FragmentDuplicate, 1);
        }
        if contradicts || self.seen.iter().any(|p| p.start < piece.end && piece.start < p.end) {
            self.is_dead = true;
            drop(DropReason::FragmentOverlap, 1 + self.held.len());
            return self.held.clear();
        }
        self.seen.push(piece);
        let has_first = self.seen.iter().any(|p| p.start == 0);
        if piece.start == 0 {
            self.leaves.push(piece);
            self.leaves.append(&mut self.held);
        } else if has_first {
            self.leaves.push(piece);
        } else {
            self.held.push(piece);
        }
        let bytes: usize = self.seen.iter().map(|p| p.end - p.start).sum();
        if self.seen.iter().any(|p| !p.more && p.end == bytes) {
            // Complete: what comes now is another packet's.
            self.seen.clear();
        }
    }
}

/// One packet, its fragments in the order in which they are sent, with repeated and overlapping ones.
#[derive(Clone, Debug)]
struct Sent {
    way: usize,
    payload_bytes: usize,
    pieces: Vec<Piece>,
}

prop_compose! {
    fn sent()(
        way in 0..12_usize,
        payload_bytes in 100..6000_usize,
        cuts in prop::collection::vec(3..750_usize, 1..20),
        repeated in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
        overlap in prop::option::weighted(0.2, (any::<prop::sample::Index>(), 1..4_usize, any::<bool>())),
        keep in prop::bool::weighted(0.7),
        shuffled in any::<bool>(),
        order in any::<u64>(),
    ) -> Sent {
        let total = payload_bytes + 8;
        let mut bounds: Vec<usize> = cuts.iter().map(|c| c * 8).filter(|c| *c < total).collect();
        bounds.extend([0, total]);
        // No fragment is longer than a device's MTU.
        bounds.extend((1..).map(|i| i * 1400).take_while(|at| *at < total));
        bounds.sort_unstable();
        bounds.dedup();
        // A packet in one piece is none in fragments.
        if bounds.len() == 2 {
            bounds.insert(1, 24);
        }
        let mut pieces: Vec<Piece> =
            bounds.windows(2).map(|w| Piece { start: w[0], end: w[1], more: w[1] < total }).collect();
        for index in repeated {
            pieces.push(*index.get(&pieces));
        }
        if let Some((index, eights, more)) = overlap {
            let victim = *index.get(&pieces);
            let start = victim.start.saturating_sub(8).max(24);
            pieces.push(Piece { start, end: start + eights * 8, more });
        }
        pieces.retain(|p| p.end <= total);
        if shuffled {
            let mut state = order | 1;
            for at in (1..pieces.len()).rev() {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                pieces.swap(at, (state >> 33) as usize % (at + 1));
            }
        }
        if !keep {
            pieces.pop();
        }
        Sent { way, payload_bytes, pieces }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// What leaves is exactly what the model says, byte for byte, in its order; everything else is dropped for the model's
    /// reason; nothing is lost.
    #[test]
    fn what_leaves_joins_to_the_packet_rewritten(
        packets in prop::collection::vec(sent(), 1..5),
        interleaving in prop::collection::vec(any::<prop::sample::Index>(), 0..200),
        burst in 1..20_usize,
        publish_after in prop::option::of(0..100_usize),
    ) {
        let (mut router, ways) = (router(), ways());
        let payloads: Vec<Vec<u8>> = packets
            .iter()
            .enumerate()
            .map(|(number, p)| (0..p.payload_bytes).map(|i| (i * 31 + i / 251 + number) as u8).collect())
            .collect();
        let mut queues: Vec<Vec<Piece>> = packets.iter().map(|p| p.pieces.iter().rev().copied().collect()).collect();
        let mut models: Vec<Model> = packets.iter().map(|_| Model::default()).collect();
        let mut frames = Vec::new();
        let mut drops = BTreeMap::new();
        let mut picks = interleaving.iter();
        while queues.iter().any(|q| !q.is_empty()) {
            let filled: Vec<usize> = (0..queues.len()).filter(|i| !queues[*i].is_empty()).collect();
            let number = picks.next().map_or(filled[0], |index| *index.get(&filled));
            let piece = queues[number].pop().expect("a queue that is not empty");
            models[number].arrive(piece, &mut drops);
            let way = ways[packets[number].way];
            let l4 = way.original.l4(&payloads[number]);
            let frame = way.original.frame(number as u32 + 7, &l4, piece.start, piece.end, piece.more);
            frames.push((way.from, if way.from_tunnel { tunnelled(&frame) } else { frame }));
        }
        let mut sent = Vec::new();
        for (turn, chunk) in frames.chunks(burst).enumerate() {
            if publish_after == Some(turn) {
                router.publish(all_rules(true));
            }
            sent.extend(router.turn(chunk));
        }
        sent.extend(router.wait(PATIENCE + 1));
        for model in &models {
            if !model.held.is_empty() {
                *drops.entry(DropReason::FragmentOrphan).or_default() += model.held.len() as u64;
            }
        }
        // For the node's own address, as every node port is, the kernel gets what waited in vain.
        let mut punted = 0;
        for (number, model) in models.iter().enumerate() {
            if ways[packets[number].way].own_port {
                punted += model.held.len() as u64;
            }
        }
        if punted > 0 {
            let orphans = drops.entry(DropReason::FragmentOrphan).or_default();
            *orphans -= punted;
            if *orphans == 0 {
                drops.remove(&DropReason::FragmentOrphan);
            }
        }
        prop_assert_eq!(router.drops(), drops);
        prop_assert_eq!(router.totals().punted, punted);
        sent.retain(|(device, _)| *device != IfIndex::HOST);

        for (number, model) in models.iter().enumerate() {
            let way = ways[packets[number].way];
            let mut ends = way.translated;
            let mut expected = Vec::new();
            let is_of = |part: &Part| (part.id, part.ends.dst, part.ends.protocol) == (number as u32 + 7, ends.dst, ends.protocol);
            let mut left = Vec::new();
            for (device, frame) in &sent {
                let is_tunnelled = frame[14] >> 4 == 4 && frame[23] == 4;
                let part = read(&frame[if is_tunnelled { 34 } else { 14 }..]);
                if is_of(&part) {
                    prop_assert_eq!((*device, is_tunnelled), (way.to, way.to_tunnel));
                    left.push(part);
                }
            }
            if let (true, Some(first)) = (way.own_port, left.iter().find(|p| p.start == 0)) {
                ends.ports.0 = u16::from_be_bytes([first.data[0], first.data[1]]);
                prop_assert!((10000..=20000).contains(&ends.ports.0));
            }
            let l4 = ends.l4(&payloads[number]);
            // Into the tunnel fits less: such a fragment is split further.
            let room = if way.to_tunnel { 1480 - 20 } else { 1500 - 20 };
            for piece in &model.leaves {
                let step = if piece.end - piece.start <= room { room } else { room / 8 * 8 };
                for start in (piece.start..piece.end).step_by(step) {
                    let end = piece.end.min(start + step);
                    let more = piece.more || end < piece.end;
                    let without_ports = Ends { ports: (0, 0), ..ends };
                    let data = l4[start..end].to_vec();
                    expected.push(Part { ends: without_ports, id: number as u32 + 7, start, more, data });
                }
            }
            prop_assert_eq!(left, expected, "{:?}", way);
        }
        router.finish();
    }
}

/// A UDP datagram of the node's kernel or for it, in three fragments.
fn three(ends: Ends, id: u32) -> [Vec<u8>; 3] {
    let l4 = ends.l4(&[7; 592]);
    [(0, 200, true), (200, 400, true), (400, 600, false)]
        .map(|(start, end, more)| ends.frame(id, &l4, start, end, more))
}

fn to_kernel(sent: &[(IfIndex, Vec<u8>)]) -> usize {
    sent.iter().filter(|(device, _)| *device == IfIndex::HOST).count()
}

#[test]
fn the_nodes_own_fragments_are_its_kernels_in_any_order() {
    for (outside, node) in [("192.168.10.100", "192.168.10.1"), ("fd00:10::100", "fd00:10::1")] {
        let mut router = router();
        let ends = Ends::new(UDP, outside, node, (5000, 2049));
        let [first, middle, last] = three(ends, 1);
        // They wait for the first, which a connection could claim.
        assert_eq!(router.turn(&[(UPLINK, last.clone()), (UPLINK, middle.clone())]), []);
        assert_eq!(router.totals().held, 2);
        let sent = router.one(UPLINK, &first);
        assert_eq!((sent.len(), to_kernel(&sent)), (3, 3));
        for ((_, frame), original) in sent.iter().zip([&first, &last, &middle]) {
            assert_eq!(frame[14..], original[14..], "as they came");
        }
        // Without their first they wait, and are the kernel's all the same.
        let [first, middle, last] = three(ends, 2);
        assert_eq!(router.turn(&[(UPLINK, middle), (UPLINK, last)]), []);
        assert_eq!(router.wait(PATIENCE), []);
        assert_eq!(to_kernel(&router.wait(1)), 2);
        assert_eq!(to_kernel(&router.one(UPLINK, &first)), 1, "so is the first, however late");
        let totals = router.finish();
        assert_eq!((totals.punted, totals.dropped()), (6, 0));
    }
}

#[test]
fn the_kernels_own_fragments_reach_other_nodes_pods_without_a_connection() {
    let mut router = router();
    let ends = Ends::new(UDP, "192.168.10.1", "10.1.2.20", (5000, 6000));
    let [first, middle, last] = three(ends, 1);
    assert_eq!(router.one(IfIndex::HOST, &last), []);
    router.publish(all_rules(true));
    let sent = router.turn(&[(IfIndex::HOST, first), (IfIndex::HOST, middle)]);
    let starts: Vec<usize> = sent.iter().map(|(_, frame)| read_with(&frame[34..], 64).start).collect();
    assert_eq!(starts, [0, 400, 200]);
    assert_eq!(router.tables.v4.len(), 0);
    assert_eq!(router.finish().dropped(), 0);
}

#[test]
fn a_policy_that_cuts_the_connection_cuts_its_later_fragments() {
    let mut router = router();
    let [first, middle, last] = three(Ends::new(UDP, "10.1.1.10", "10.1.1.20", (5000, 6000)), 1);
    assert_eq!(router.turn(&[(CLIENT_POD, first), (CLIENT_POD, middle)]).len(), 2);
    router.publish(all_rules(false));
    assert_eq!(router.one(CLIENT_POD, &last), []);
    assert_eq!(router.drops(), BTreeMap::from([(DropReason::PolicyDeniedIngress, 1)]));
    // Those of a packet whose first is denied share its reason.
    let [first, middle, last] = three(Ends::new(UDP, "10.1.1.10", "10.1.1.20", (5001, 6000)), 2);
    router.turn(&[(CLIENT_POD, middle), (CLIENT_POD, first), (CLIENT_POD, last)]);
    assert_eq!(router.drops(), BTreeMap::from([(DropReason::PolicyDeniedIngress, 4)]));
    router.finish();
}

#[test]
fn a_first_fragment_that_does_not_fit_is_answered_and_its_followers_are_not() {
    let mut router = router();
    let ends = Ends::new(UDP, "10.1.1.10", "10.1.2.20", (5000, 6000));
    let l4 = ends.l4(&[1; 2952]);
    for (start, end, more, answers) in [(0, 1480, true, 1), (1480, 2960, false, 0)] {
        let mut frame = ends.frame(1, &l4, start, end, more);
        frame[20] |= 0x40;
        frame[24..26].fill(0);
        let checksum = !sum(&frame[14..34]);
        frame[24..26].copy_from_slice(&checksum.to_be_bytes());
        let sent = router.one(CLIENT_POD, &frame);
        assert_eq!(sent.len(), answers);
        if let Some((device, answer)) = sent.first() {
            // Fragmentation needed, MTU 1480, quoting the fragment.
            assert_eq!((*device, &answer[34..36], &answer[40..42]), (CLIENT_POD, &[3, 4][..], &[5, 200][..]));
            assert_eq!(answer[42..62], frame[14..34]);
        }
    }
    assert_eq!(router.finish().drops, [(DropReason::TooBig, 2)]);
}

#[test]
fn sctp_with_other_ports_is_dropped_whole_and_with_the_same_ports_passes() {
    for (destination, port, leaves) in [("10.96.0.12", 53, 0), ("10.1.1.20", 5353, 3)] {
        let mut router = router();
        let ends = Ends::new(SCTP, "10.1.1.10", destination, (5000, port));
        let mut l4 = vec![9; 600];
        l4[..2].copy_from_slice(&5000_u16.to_be_bytes());
        l4[2..4].copy_from_slice(&port.to_be_bytes());
        // An INIT chunk, whose verification tag is 0.
        l4[4..8].fill(0);
        l4[12] = 1;
        let frames = [(0, 200, true), (200, 400, true), (400, 600, false)]
            .map(|(start, end, more)| (CLIENT_POD, ends.frame(3, &l4, start, end, more)));
        let sent = router.turn(&frames);
        assert_eq!(sent.len(), leaves, "{:?}", router.totals());
        let dropped = router.finish().drops;
        assert_eq!(dropped, if leaves == 0 { vec![(DropReason::FragmentChecksum, 3)] } else { vec![] });
    }
}

fn tcp(ends: Ends, flags: u8, seq: u32, ack: u32, payload: &[u8]) -> Vec<u8> {
    let mut l4 = [ends.ports.0.to_be_bytes(), ends.ports.1.to_be_bytes()].concat();
    l4.extend(seq.to_be_bytes());
    l4.extend(ack.to_be_bytes());
    l4.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    l4.extend(payload);
    let pseudo_header = [octets(ends.src), octets(ends.dst), vec![0, TCP], (l4.len() as u16).to_be_bytes().to_vec()];
    let checksum = !sum(&[pseudo_header.concat(), l4.clone()].concat());
    l4[16..18].copy_from_slice(&checksum.to_be_bytes());
    l4
}

#[test]
fn tcp_tracking_learns_a_segments_whole_length_from_its_last_fragment() {
    let there = Ends::new(TCP, "10.1.1.10", "10.1.1.20", (5000, 80));
    let back = Ends { src: there.dst, dst: there.src, ports: (80, 5000), ..there };
    let whole = |ends: Ends, flags, seq, ack| {
        let l4 = tcp(ends, flags, seq, ack, &[]);
        ends.frame(0, &l4, 0, l4.len(), false)
    };
    let state = |router: &Router| {
        let mut state = None;
        router.tables.v4.for_each(router.now, |entry| state = entry.tcp_state);
        state
    };
    // A RST counts right behind the data in flight, which no acknowledgment tells of yet; elsewhere it is challenged.
    for (reset_at, after) in [(3101, TcpState::Close), (3102, TcpState::Established)] {
        let mut router = router();
        for (device, frame) in [
            (CLIENT_POD, whole(there, 2, 100, 0)),
            (SERVER_POD, whole(back, 0x12, 900, 101)),
            (CLIENT_POD, whole(there, 0x10, 101, 901)),
        ] {
            assert_eq!(router.one(device, &frame).len(), 1);
        }
        let segment = tcp(there, 0x18, 101, 901, &[5; 3000]);
        for (start, end, more) in [(0, 1000, true), (2000, 3020, false), (1000, 2000, true)] {
            assert_eq!(router.one(CLIENT_POD, &there.frame(8, &segment, start, end, more)).len(), 1);
        }
        assert_eq!(router.one(CLIENT_POD, &whole(there, 4, reset_at, 0)).len(), 1);
        assert_eq!(state(&router), Some(after));
        if after == TcpState::Established {
            // The end of the stream comes in fragments as well; its one FIN is acknowledged with the other side's.
            let segment = tcp(there, 0x19, 3101, 901, &[6; 1500]);
            for (start, end, more) in [(0, 1000, true), (1000, 1520, false)] {
                assert_eq!(router.one(CLIENT_POD, &there.frame(9, &segment, start, end, more)).len(), 1);
            }
            assert_eq!(router.one(SERVER_POD, &whole(back, 0x11, 901, 4602)).len(), 1);
            assert_eq!(state(&router), Some(TcpState::LastAck));
            assert_eq!(router.one(CLIENT_POD, &whole(there, 0x10, 4602, 902)).len(), 1);
            assert_eq!(state(&router), Some(TcpState::TimeWait));
        }
        assert_eq!(router.finish().dropped(), 0);
    }
}

#[test]
fn a_workload_does_not_ride_on_packets_from_elsewhere() {
    let mut router = router();
    // From the uplink, with the client's address and the same identification: two packets, and neither is joined.
    let [first, middle, last] = three(Ends::new(UDP, "10.1.1.10", "10.1.1.20", (5000, 6000)), 1);
    assert_eq!(router.one(CLIENT_POD, &first).len(), 1);
    assert_eq!(router.one(UPLINK, &middle), []);
    assert_eq!(router.one(SERVER_POD, &last), []);
    assert_eq!(router.drops(), BTreeMap::from([(DropReason::SpoofedSource, 2)]));
    assert_eq!(router.one(CLIENT_POD, &middle).len(), 1);
    router.wait(PATIENCE + 1);
    assert_eq!(router.finish().dropped(), 2);
}

#[test]
fn a_packet_is_followed_for_30_seconds() {
    let mut router = router();
    let ends = Ends::new(UDP, "10.1.1.10", "10.1.1.20", (5000, 6000));
    let [first, middle, last] = three(ends, 1);
    assert_eq!(router.one(CLIENT_POD, &first).len(), 1);
    // The connection lives on.
    let l4 = ends.l4(&[0; 20]);
    let keep_alive = ends.frame(99, &l4, 0, l4.len(), false);
    router.wait(LIFETIME / 2);
    assert_eq!(router.one(CLIENT_POD, &keep_alive).len(), 1);
    router.wait(LIFETIME / 2);
    assert_eq!(router.one(CLIENT_POD, &middle).len(), 1);
    router.wait(1);
    assert_eq!(router.one(CLIENT_POD, &last), []);
    assert_eq!(router.totals().held, 1);
    assert_eq!(router.finish().drops, [(DropReason::FragmentOrphan, 1)]);
}

#[test]
fn a_flood_of_pieces_from_one_pod_leaves_room_for_others() {
    let mut router = router();
    let client = Ends::new(UDP, "10.1.1.10", "10.1.1.20", (5000, 6000));
    let server = Ends::new(UDP, "10.1.1.20", "10.1.1.10", (7000, 8000));
    let mut sent = 0;
    for id in 0..5000 {
        let [first, middle, _] = three(client, id);
        let frame = if id % 2 == 0 { first } else { middle };
        sent += router.one(CLIENT_POD, &frame).len();
    }
    let drops = router.drops();
    assert!(sent > 0 && drops[&DropReason::FragmentLimit] > 0 && drops[&DropReason::FragmentOrphan] > 0, "{drops:?}");
    // In order and in reverse.
    let [first, middle, last] = three(server, 1);
    let frames = [first.clone(), middle.clone(), last.clone()].map(|frame| (SERVER_POD, frame));
    assert_eq!(router.turn(&frames).len(), 3);
    let [first, middle, last] = three(server, 2);
    assert_eq!(router.turn(&[(SERVER_POD, last), (SERVER_POD, middle), (SERVER_POD, first)]).len(), 3);
    // The node's own go to its kernel, room or not.
    let mut punted = 0;
    for id in 0..2000 {
        let [first, middle, _] = three(Ends::new(UDP, "192.168.10.100", "192.168.10.1", (5000, 2049)), id);
        punted += to_kernel(&router.turn(&[(UPLINK, first), (UPLINK, middle)]));
    }
    assert_eq!(punted, 4000);
    router.finish();
}
