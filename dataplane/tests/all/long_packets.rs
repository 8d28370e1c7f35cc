//! Packets that lie in several frames, through the whole pipeline: what becomes of them does not depend on how they are cut.
//!
//! Two routers get the same packets. In one each lies in as few frames as can be, which for the short ones is one; in the other they are
//! cut at random. What they send and count must be the same, and every whole packet that leaves must be right to who reads it without weir.

use std::collections::BTreeMap;

use crate::packets::{IPIP, Packet, SCTP, TCP, UDP, received};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, cluster, ip, links, rules, service, sum, tunnelled};
use proptest::prelude::*;
use weir_dataplane::frame::{IfIndex, MAX_MTU};
use weir_nat::SnatPorts;
use weir_packet::{DropReason, Protocol};

/// A router on links with this MTU, but for the server pod's with a smaller one.
fn router(mtu: u32, servers_mtu: u32) -> Router {
    let mut links = links();
    for device in &mut links.devices {
        device.mtu = if device.index == SERVER_POD { servers_mtu } else { mtu };
    }
    let services = [("udp", Protocol::UDP, 0), ("tcp", Protocol::TCP, 2), ("sctp", Protocol::SCTP, 4)];
    let services = services.into_iter().flat_map(|(name, protocol, last)| {
        let at = |last: u32| [format!("10.96.0.{}", 10 + last), format!("fd00:96::{}", 10 + last)];
        let (local, remote) = (at(last), at(last + 1));
        let vips = |addresses: &[String; 2]| [addresses[0].clone(), addresses[1].clone()];
        [
            (format!("default/{name}-local"), vips(&local), ["10.1.1.20", "fd00:1:1::20"], Some(30053)),
            (format!("default/{name}-remote"), vips(&remote), ["10.1.2.20", "fd00:1:2::20"], None),
        ]
        .map(|(name, vips, backends, port)| service(&name, protocol, [&vips[0], &vips[1]], backends, port))
    });
    let snat = SnatPorts::new(10000..=20000, [30053]).unwrap();
    Router::between(&cluster(), &links, rules(services.collect(), true), snat, 1024)
}

/// Where a packet goes, and so what becomes of it.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// DNAT to the server pod.
    Local,
    /// DNAT to the other node: IPIP, or directly.
    Remote,
    /// From outside to a node port: DNAT, SNAT.
    NodePort,
    /// Out of a tunnel (IPv4) to the server pod.
    Inward,
    /// Masqueraded.
    Outward,
    /// To the node's own kernel.
    Punted,
    /// To a neighbour that nobody knows.
    Held,
    /// With a source that is not the pod's.
    Spoofed,
}

const WAYS: [Way; 8] =
    [Way::Local, Way::Remote, Way::NodePort, Way::Inward, Way::Outward, Way::Punted, Way::Held, Way::Spoofed];

#[derive(Clone, Debug)]
struct Step {
    way: Way,
    protocol: u8,
    is_v6: bool,
    ports: u16,
    payload_bytes: usize,
    /// Whether it may be fragmented, where it is IPv4.
    may_fragment: bool,
    /// The size of the fragments that it comes in, if it does.
    fragments: Option<usize>,
    ttl: u8,
    padding: usize,
    has_options: bool,
    is_damaged: bool,
    /// What was sent last comes back, quoted by an ICMP error, instead.
    is_error: bool,
}

fn step(payload: std::ops::Range<usize>) -> impl Strategy<Value = Step> {
    let what = (prop::sample::select(WAYS.to_vec()), prop::sample::select(vec![UDP, UDP, TCP, SCTP, 1]));
    let how = (any::<bool>(), 0..3_u16, payload, any::<bool>(), prop::option::weighted(0.2, 64..1500_usize));
    let rare = prop::bool::weighted;
    let odd = (prop_oneof![9 => Just(64_u8), 1 => Just(1)], 0..40_usize, rare(0.2), rare(0.1), rare(0.1));
    (what, how, odd).prop_map(|((way, protocol), (is_v6, ports, payload_bytes, may_fragment, fragments), odd)| {
        let (ttl, padding, has_options, is_damaged, is_error) = odd;
        Step {
            way,
            protocol,
            is_v6,
            ports,
            payload_bytes,
            may_fragment,
            fragments,
            ttl,
            padding,
            has_options,
            is_damaged,
            is_error,
        }
    })
}

impl Step {
    /// The frames that arrive, and by which device.
    fn frames(&self, sent: Option<&Vec<u8>>) -> Vec<(IfIndex, Vec<u8>)> {
        if let Some(sent) = sent.filter(|_| self.is_error) {
            return vec![(UPLINK, self.error_about(sent))];
        }
        let family = usize::from(self.is_v6);
        let protocol = if self.protocol == 1 && self.is_v6 { 58 } else { self.protocol };
        let vip = |last: u32| {
            let last = last
                + if self.protocol == TCP {
                    12
                } else if self.protocol == SCTP {
                    14
                } else {
                    10
                };
            [format!("10.96.0.{last}"), format!("fd00:96::{last}")][family].clone()
        };
        let one = |addresses: [&str; 2]| addresses[family].to_owned();
        let (client, outside) = (one(["10.1.1.10", "fd00:1:1::10"]), one(["172.20.0.9", "fd00:20::9"]));
        let node = one(["192.168.10.1", "fd00:10::1"]);
        let (device, src, dst, port) = match self.way {
            Way::Local => (CLIENT_POD, client, vip(0), 53),
            Way::Remote => (CLIENT_POD, client, vip(1), 53),
            Way::NodePort => (UPLINK, outside, node, 30053),
            Way::Inward => (UPLINK, one(["10.1.2.20", "fd00:1:2::20"]), one(["10.1.1.20", "fd00:1:1::20"]), 7),
            Way::Outward => (CLIENT_POD, client, outside, 7),
            Way::Punted => (UPLINK, outside, node, 7),
            Way::Held => (CLIENT_POD, client, one(["192.168.10.77", "fd00:10::77"]), 7),
            Way::Spoofed => (CLIENT_POD, outside, one(["10.1.1.20", "fd00:1:1::20"]), 7),
        };
        let packet = Packet {
            src: ip(&src),
            dst: ip(&dst),
            protocol,
            ttl: self.ttl,
            tos: 0,
            options: usize::from(self.has_options) * 2,
            l4: self.l4(protocol, port),
        };
        let mut frame = packet.frame();
        if self.is_damaged {
            *frame.last_mut().unwrap() ^= 1;
        }
        if !self.is_v6 && self.may_fragment {
            frame[20] = 0;
            write_header_checksum(&mut frame);
        }
        let mut frames = match self.fragments {
            Some(size) if !self.is_v6 && self.may_fragment => fragments(&frame, size),
            _ => vec![frame],
        };
        for frame in &mut frames {
            if matches!(self.way, Way::Inward) && !self.is_v6 {
                *frame = tunnelled(frame);
            }
            frame.resize(frame.len() + self.padding, 0xdd);
        }
        frames.into_iter().map(|frame| (device, frame)).collect()
    }

    fn l4(&self, protocol: u8, port: u16) -> Vec<u8> {
        let (ports, bytes) = (1000 + self.ports, self.payload_bytes);
        let mut l4 = [ports.to_be_bytes(), port.to_be_bytes()].concat();
        match protocol {
            UDP => l4.extend([(8 + bytes as u16).to_be_bytes(), [0, 0]].concat()),
            TCP => l4.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]),
            // An INIT, whose parameters are the payload.
            SCTP => {
                l4.extend([0; 8]);
                l4.extend([1, 0]);
                l4.extend((20 + bytes as u16).to_be_bytes());
                l4.extend([0, 0, 0, 9, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 3]);
            }
            _ => l4 = [&[if protocol == 1 { 8 } else { 128 }, 0, 0, 0][..], &ports.to_be_bytes(), &[0, 1]].concat(),
        }
        l4.extend((0..bytes).map(|at| (at / 3) as u8));
        l4
    }

    /// What a router would say, or one that quotes all it can, about a frame that was sent.
    fn error_about(&self, sent: &[u8]) -> Vec<u8> {
        let quoted = &sent[14..];
        let is_v6 = quoted[0] >> 4 == 6;
        // One that quotes more of a tunnel packet than a frame holds is about nobody's packet: no router does.
        let most = if !is_v6 && quoted[9] == IPIP { 100 } else { 64 + self.payload_bytes };
        let quoted = &quoted[..quoted.len().min(most)];
        let source = if is_v6 {
            std::net::Ipv6Addr::from(*sent[14 + 8..].first_chunk::<16>().unwrap()).into()
        } else {
            std::net::Ipv4Addr::from(*sent[14 + 12..].first_chunk::<4>().unwrap()).into()
        };
        let kind: &[u8] = if is_v6 { &[1, 4] } else { &[3, 3] };
        Packet {
            src: ip(if is_v6 { "fd00:20::1" } else { "172.20.0.1" }),
            dst: source,
            protocol: if is_v6 { 58 } else { 1 },
            ttl: 64,
            tos: 0,
            options: 0,
            l4: [kind, &[0; 6], quoted].concat(),
        }
        .frame()
    }
}

fn write_header_checksum(frame: &mut [u8]) {
    let header_bytes = usize::from(frame[14] & 15) * 4;
    frame[24..26].fill(0);
    let checksum = !sum(&frame[14..14 + header_bytes]);
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
}

/// An IPv4 packet's fragments with this much payload.
fn fragments(frame: &[u8], payload_bytes: usize) -> Vec<Vec<u8>> {
    let (header, payload) = frame.split_at(14 + usize::from(frame[14] & 15) * 4);
    let size = payload_bytes / 8 * 8;
    let count = payload.len().div_ceil(size);
    let part = |(number, data): (usize, &[u8])| {
        let mut part = [header, data].concat();
        let more = if number + 1 < count { 0x2000 } else { 0 };
        part[16..18].copy_from_slice(&((header.len() - 14 + data.len()) as u16).to_be_bytes());
        part[20..22].copy_from_slice(&((number * size / 8) as u16 | more).to_be_bytes());
        write_header_checksum(&mut part);
        part
    };
    payload.chunks(size).enumerate().map(part).collect()
}

/// Sends the steps through both routers; what the pipeline dropped.
fn agree(mut plain: Router, mut cut: Router, steps: &[Step]) -> BTreeMap<DropReason, u64> {
    let mut last: Option<Vec<u8>> = None;
    for step in steps {
        let frames = step.frames(last.as_ref());
        let sent = plain.turn(&frames);
        let other = cut.turn(&frames);
        assert!(sent == other, "{step:?}: {:?} and {:?}", lengths(&sent), lengths(&other));
        assert_eq!(plain.drops(), cut.drops(), "{step:?}");
        for ((device, is_tunnelled), packet) in received(&sent) {
            let is_fragment = packet[0] >> 4 == 4 && (packet[6] & 0x3f, packet[7]) != (0, 0);
            if !is_fragment && !step.is_damaged && !step.is_error {
                let mut packet = packet.to_vec();
                if packet[0] >> 4 == 4 && packet[6] == 0 {
                    // The reader knows packets that must not be fragmented.
                    packet[6] = 0x40;
                    packet[10..12].fill(0);
                    let checksum = !sum(&packet[..usize::from(packet[0] & 15) * 4]);
                    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
                    packet[4..6].copy_from_slice(&[0x12, 0x34]);
                }
                if !is_tunnelled && device != IfIndex::HOST && packet[4..6] == [0x12, 0x34] || packet[0] >> 4 == 6 {
                    let _ = Packet::read(&packet);
                }
            }
        }
        last = sent.into_iter().map(|(_, frame)| frame).rfind(|frame| frame.len() > 60).or(last);
    }
    let drops = plain.drops();
    assert_eq!(plain.finish().tx, cut.finish().tx);
    drops
}

fn lengths(sent: &[(IfIndex, Vec<u8>)]) -> Vec<(IfIndex, usize)> {
    sent.iter().map(|(device, frame)| (*device, frame.len())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Short packets: in one frame, and cut anywhere behind their headers.
    #[test]
    fn a_cut_packet_is_what_a_packet_in_one_frame_is(
        steps in prop::collection::vec(step(0..1650), 1..12),
        first in 170..700_usize, sizes in prop::collection::vec(105..800_usize, 1..6), servers_mtu in 576..1500_u32,
    ) {
        let mut cut = router(1700, servers_mtu);
        cut.frame_bytes = [vec![first], sizes].concat();
        agree(router(1700, servers_mtu), cut, &steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Jumbo packets, to devices that carry them, and to one that carries less.
    #[test]
    fn a_jumbo_packet_does_not_care_where_it_is_cut(
        steps in prop::collection::vec(step(0..9150), 1..8),
        sizes in prop::collection::vec(600..1792_usize, 1..6), servers_mtu in 1280..MAX_MTU,
    ) {
        let mut cut = router(MAX_MTU, servers_mtu);
        cut.frame_bytes = sizes;
        agree(router(MAX_MTU, servers_mtu), cut, &steps);
    }
}

/// A step without anything odd.
fn plain(way: Way, protocol: u8, payload_bytes: usize) -> Step {
    Step {
        way,
        protocol,
        is_v6: false,
        ports: 0,
        payload_bytes,
        may_fragment: false,
        fragments: None,
        ttl: 64,
        padding: 0,
        has_options: false,
        is_damaged: false,
        is_error: false,
    }
}

/// One turn with a step alone; the lengths of what left, and what was dropped.
fn alone(step: &Step, servers_mtu: u32) -> (Vec<(IfIndex, usize)>, Vec<DropReason>) {
    let mut router = router(9000, servers_mtu);
    let sent = router.turn(&step.frames(None));
    let drops = router.drops().into_iter().filter(|(_, count)| *count > 0).map(|(reason, _)| reason).collect();
    router.finish();
    (lengths(&sent), drops)
}

#[test]
fn jumbo_packets_take_every_way() {
    for is_v6 in [false, true] {
        let headers = 14 + if is_v6 { 40 } else { 20 } + 8;
        let frame = headers + 8800;
        for (way, expected) in [
            (Way::Local, vec![(SERVER_POD, frame)]),
            (Way::Remote, vec![(UPLINK, frame + if is_v6 { 0 } else { 20 })]),
            (Way::NodePort, vec![(SERVER_POD, frame)]),
            (Way::Inward, vec![(SERVER_POD, frame)]),
            (Way::Outward, vec![(UPLINK, frame)]),
            (Way::Punted, vec![(IfIndex::HOST, frame)]),
            (Way::Held, vec![]),
            (Way::Spoofed, vec![]),
        ] {
            if is_v6 && matches!(way, Way::Outward) {
                continue;
            }
            let step = Step { is_v6, padding: 30, ..plain(way, UDP, 8800) };
            let (sent, drops) = alone(&step, 9000);
            assert_eq!(sent, expected, "{way:?} {is_v6}");
            let spoofed = [DropReason::SpoofedSource];
            assert_eq!(drops, if matches!(way, Way::Spoofed) { &spoofed[..] } else { &[] }, "{way:?} {is_v6}");
        }
    }
}

#[test]
fn a_jumbo_packet_to_a_smaller_link_is_split_or_refused() {
    let (sent, drops) = alone(&plain(Way::Local, UDP, 8900), 1500);
    assert_eq!((sent, drops), (vec![(CLIENT_POD, 14 + 576)], vec![DropReason::TooBig]), "fragmentation needed");
    // 8908 bytes of UDP: six times 1480, and 28.
    let (sent, drops) = alone(&Step { may_fragment: true, ..plain(Way::Local, UDP, 8900) }, 1500);
    let pieces = [vec![(SERVER_POD, 1514); 6], vec![(SERVER_POD, 62)]].concat();
    assert_eq!((sent, drops), (pieces, vec![]));
    // Pieces that take several frames themselves.
    let (sent, drops) = alone(&Step { may_fragment: true, ..plain(Way::Local, UDP, 8900) }, 5000);
    assert_eq!((sent, drops), (vec![(SERVER_POD, 14 + 20 + 4976), (SERVER_POD, 14 + 20 + 3932)], vec![]));
    let (sent, drops) = alone(&Step { is_v6: true, ..plain(Way::Local, UDP, 8900) }, 1500);
    assert_eq!((sent, drops), (vec![(CLIENT_POD, 14 + 1280)], vec![DropReason::TooBig]), "packet too big");
}

#[test]
fn a_damaged_jumbo_packet_opens_no_connection() {
    for protocol in [UDP, TCP, SCTP] {
        let damaged = Step { is_damaged: true, ..plain(Way::Local, protocol, 8800) };
        assert_eq!(alone(&damaged, 9000), (vec![], vec![DropReason::Invalid]), "{protocol}");
    }
}
