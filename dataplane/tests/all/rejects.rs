//! What a sender is told of a packet that is refused, over the whole pipeline and the memory driver.

use crate::router;
use std::{collections::BTreeMap, sync::Arc};

use crate::packets::{Packet, SCTP, TCP, UDP, received};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, ip, rules, service, sum};
use weir_dataplane::{forwarding::Forwarding, frame::IfIndex, model::Links};
use weir_nat::{HostAddresses, ServicePort, SnatPorts};
use weir_packet::{DropReason, Protocol};

const CLIENT: [&str; 2] = ["10.1.1.10", "fd00:1:1::10"];
const NODE: [&str; 2] = ["192.168.10.1", "fd00:10::1"];
const VIP: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
/// What is sent at once of one kind, and what is earned with a tick.
const BURST: usize = 1000;
const PER_TICK: usize = 10;
/// Packets of a turn.
const TURN: usize = 50;

/// A router with services of all protocols that have no backend.
fn router() -> Router {
    let empty = |protocol| ServicePort { endpoints: Vec::new(), ..service("default/none", protocol, VIP, VIP, None) };
    let services = [Protocol::TCP, Protocol::UDP, Protocol::SCTP].map(empty).into();
    Router::new(rules(services, true), SnatPorts::new(10000..=20000, []).unwrap(), 1024)
}

/// A client's first packet to its service: a SYN, a datagram, an INIT chunk (RFC 9260, 3.3.2).
fn first(family: usize, protocol: u8) -> Packet {
    let ports = [&5000_u16.to_be_bytes()[..], &53_u16.to_be_bytes()].concat();
    let rest: &[u8] = match protocol {
        TCP => &[0, 0, 0, 7, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0],
        UDP => &[0, 12, 0, 0, 1, 2, 3, 4],
        SCTP => &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 20, 0xde, 0xad, 0xbe, 0xef, 0, 1, 0, 0, 0, 10, 0, 10, 0, 0, 0, 9],
        _ => panic!("protocol {protocol}"),
    };
    let (src, dst) = (ip(CLIENT[family]), ip(VIP[family]));
    Packet { src, dst, protocol, ttl: 64, tos: 0, options: 0, l4: [&ports, rest].concat() }
}

/// How many packets leave for so many like this one, all at one moment.
fn told(router: &mut Router, packet: &Packet, count: usize) -> usize {
    let turn = vec![(CLIENT_POD, packet.frame()); TURN];
    assert_eq!(count % TURN, 0, "whole turns");
    (0..count / TURN).map(|_| router.turn(&turn).len()).sum()
}

#[test]
fn what_is_not_tcp_is_told_by_port_unreachable_with_what_it_sent() {
    for family in 0..2 {
        for protocol in [UDP, SCTP] {
            let mut router = router();
            let asked = first(family, protocol);
            let sent = router.one(CLIENT_POD, &asked.frame());
            let [(device, frame)] = &sent[..] else { panic!("{sent:?}") };
            assert_eq!(*device, CLIENT_POD);
            let header_bytes = [20, 40][family];
            let (header, message) = frame[14..].split_at(header_bytes);
            let (source, destination) = if family == 0 { (12..16, 16..20) } else { (8..24, 24..40) };
            assert_eq!(header[source], router::octets(ip(NODE[family])));
            assert_eq!(header[destination], router::octets(ip(CLIENT[family])));
            assert_eq!(header[[9, 6][family]], [1, 58][family], "ICMP");
            // Destination unreachable, port (RFC 792; RFC 4443, 3.1), and all of a small packet, as its sender wrote it.
            assert_eq!(message[..2], [[3, 3], [1, 4]][family]);
            assert_eq!(message[4..8], [0; 4]);
            assert_eq!(message[8..], asked.bytes());
            let pseudo = [&header[8..], &(message.len() as u32).to_be_bytes(), &[0, 0, 0, 58]].concat();
            assert_eq!(sum(&[if family == 0 { &[] } else { &pseudo[..] }, message].concat()), 0xffff);
            assert_eq!(router.drops()[&DropReason::NoBackend], 1);
            router.finish();
        }
    }
}

#[test]
fn a_flood_of_one_kind_of_answer_takes_nothing_from_the_other() {
    for family in 0..2 {
        for (flood, other) in [(UDP, TCP), (TCP, UDP), (SCTP, TCP)] {
            let mut router = router();
            let (flood, other) = (first(family, flood), first(family, other));
            assert_eq!(told(&mut router, &flood, BURST + 4 * TURN), BURST);
            assert_eq!(told(&mut router, &other, BURST + 4 * TURN), BURST);
            // Each earns for itself, and no more than it may send at once.
            router.wait(1);
            assert_eq!(told(&mut router, &flood, TURN), PER_TICK);
            assert_eq!(told(&mut router, &other, TURN), PER_TICK);
            router.wait(1_000_000);
            assert_eq!(told(&mut router, &other, BURST + TURN), BURST);
            router.finish();
        }
    }
}

/// What one pod causes takes nothing from another's, and what it is told of TTLs nothing from path MTU discovery.
#[test]
fn a_flood_of_one_pod_takes_nothing_from_the_others() {
    for family in 0..2 {
        let mut router = router();
        let late = Packet { ttl: 1, ..first(family, UDP) };
        let late = Packet { dst: ip(["192.168.10.100", "fd00:10::100"][family]), ..late };
        assert_eq!(told(&mut router, &late, BURST + 4 * TURN), BURST);
        assert_eq!(told(&mut router, &first(family, UDP), TURN), 0, "its share is used up");
        // Larger than what goes by the uplink takes.
        let l4 = [&[0x13, 0x88, 0, 53][..], &1600_u16.to_be_bytes(), &[0; 1594]].concat();
        let long = Packet { ttl: 64, l4, ..late.clone() };
        let mut frame = long.frame();
        if family == 0 {
            // Not to be fragmented.
            frame[20] |= 0x40;
            frame[24..26].fill(0);
            let checksum = !sum(&frame[14..34]);
            frame[24..26].copy_from_slice(&checksum.to_be_bytes());
        }
        let sent = router.one(CLIENT_POD, &frame);
        assert_eq!((sent.len(), sent[0].0), (1, CLIENT_POD), "too big is told");
        let other = Packet { src: ip(["10.1.1.20", "fd00:1:1::20"][family]), ..first(family, UDP) };
        let sent = router.one(SERVER_POD, &other.frame());
        assert_eq!((sent.len(), sent[0].0), (1, SERVER_POD), "another pod is told");
        router.finish();
    }
}

/// What the manifests still say of a pod that is gone makes it no other's.
#[test]
fn a_pod_of_this_node_without_a_device_is_unreachable_where_all_devices_are_known() {
    const SERVER: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
    for (family, server) in SERVER.into_iter().enumerate() {
        for (complete, reason) in [(true, DropReason::NoSuchPod), (false, DropReason::NoRoute)] {
            let mut links = Links { complete, ..router::links() };
            links.devices.retain(|device| device.index != SERVER_POD);
            let (rules, snat) = (rules(Vec::new(), true), SnatPorts::new(10000..=20000, []).unwrap());
            let mut router = Router::between(&router::cluster(), &links, rules, snat, 1024);
            let asked = Packet { dst: ip(server), ..first(family, UDP) };
            let sent = router.one(CLIENT_POD, &asked.frame());
            let told: Vec<IfIndex> = sent.iter().map(|(device, _)| *device).collect();
            assert_eq!(told, [CLIENT_POD], "family {family}, complete: {complete}");
            assert_eq!(router.drops().into_iter().collect::<Vec<_>>(), [(reason, 1)], "complete: {complete}");
            router.finish();
        }
    }
}

/// What a router outside sends here for an external IP ends here: sent back there it would go round in circles.
#[test]
fn what_comes_for_a_port_that_an_external_ip_does_not_have_ends_here() {
    const EXTERNAL: [&str; 2] = ["198.51.100.6", "2001:db8:6::6"];
    const OUTSIDE: [&str; 2] = ["192.168.10.100", "fd00:10::100"];
    for (family, is_load_balancer) in [(0, false), (0, true), (1, false), (1, true)] {
        let mut web = service("default/web", Protocol::TCP, VIP, ["10.1.1.20", "fd00:1:1::20"], None);
        let external = if is_load_balancer { &mut web.load_balancer_ips } else { &mut web.external_ips };
        external.extend(EXTERNAL.map(ip));
        let snat = SnatPorts::new(10000..=20000, []).unwrap();
        let mut router = Router::new(rules(vec![web], true), snat, 1024);
        let (src, dst) = (ip(OUTSIDE[family]), ip(EXTERNAL[family]));
        let from_outside = |packet: Packet| Packet { src, dst, ..packet };
        let ends = |router: &mut Router, packet: &Packet| -> Vec<Packet> {
            let sent = router.one(UPLINK, &packet.frame());
            received(&sent)
                .into_iter()
                .map(|((device, _), bytes)| {
                    assert_eq!(device, UPLINK);
                    let (header_bytes, source, destination) =
                        if family == 0 { (20, 12..16, 16..20) } else { (40, 8..24, 24..40) };
                    assert_eq!(
                        (&bytes[source], &bytes[destination]),
                        (&router::octets(dst)[..], &router::octets(src)[..])
                    );
                    Packet {
                        src: dst,
                        dst: src,
                        protocol: bytes[[9, 6][family]],
                        ttl: 64,
                        tos: 0,
                        options: 0,
                        l4: bytes[header_bytes..].to_vec(),
                    }
                })
                .collect()
        };
        // The port of the service itself goes on.
        assert_eq!(router.one(UPLINK, &from_outside(first(family, TCP)).frame()).len(), 1);
        let mut other = from_outside(first(family, TCP));
        other.l4[2..4].copy_from_slice(&81_u16.to_be_bytes());
        let told = ends(&mut router, &other);
        assert_eq!((told.len(), told[0].l4[13]), (1, 0x14), "RST, ACK");
        assert_eq!(ends(&mut router, &from_outside(first(family, UDP))).len(), 0);
        // A ping, which any code may have.
        for code in [0, 3] {
            let l4 = vec![[8, 128][family], code, 0, 0, 0, 7, 0, 1, 1, 2, 3];
            let ping = Packet { src, dst, protocol: [1, 58][family], ttl: 64, tos: 0, options: 0, l4 };
            let told = ends(&mut router, &ping);
            let [answer] = &told[..] else { panic!("{told:?}") };
            assert_eq!(answer.l4[..2], [[0, 129][family], code]);
            assert_eq!(answer.l4[4..], [0, 7, 0, 1, 1, 2, 3]);
            let pseudo =
                [router::octets(dst), router::octets(src), vec![0, 0, 0, answer.l4.len() as u8, 0, 0, 0, 58]].concat();
            assert_eq!(sum(&[if family == 0 { &[] } else { &pseudo[..] }, &answer.l4[..]].concat()), 0xffff);
        }
        assert_eq!(router.drops(), BTreeMap::from([(DropReason::UnpublishedPort, 4)]));
        router.finish();
    }
}

/// A process of the node itself that asks a host port on a loopback address.
#[test]
fn a_process_on_a_loopback_address_is_told_too() {
    const SERVER: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
    const LOOPBACK: [&str; 2] = ["127.0.0.1", "::1"];
    for family in 0..2 {
        let loopback = ip(LOOPBACK[family]);
        let host_ports = || {
            [Protocol::TCP, Protocol::UDP].map(|protocol| ServicePort {
                cluster_ips: Vec::new(),
                host_port: Some(HostAddresses::One(loopback)),
                ..service("default/web", protocol, VIP, SERVER, None)
            })
        };
        let snat = SnatPorts::new(10000..=20000, []).unwrap();
        let mut router = Router::new(rules(host_ports().into(), true), snat, 1024);
        let asked = |protocol| Packet { src: loopback, dst: loopback, ..first(family, protocol) };
        for protocol in [TCP, UDP] {
            let sent = router.one(IfIndex::HOST, &asked(protocol).frame());
            assert_eq!(sent.iter().map(|(device, _)| *device).collect::<Vec<_>>(), [SERVER_POD], "{protocol}");
        }
        // Its pod was replaced by one that is not there: UDP by ICMP, TCP's next segment by a RST.
        let mut links = Links { complete: true, ..router::links() };
        links.devices.retain(|device| device.index != SERVER_POD);
        let forwarding = Arc::new(Forwarding::compile(&router::cluster(), &links).unwrap());
        let [_, udp] = host_ports();
        let next = router.next(rules(vec![udp], true), forwarding);
        router.published.publish(next);
        let mut segment = asked(TCP);
        segment.l4[13] = 0x10;
        for (packet, expected) in [(segment, TCP), (asked(UDP), [1, 58][family])] {
            let sent = router.one(IfIndex::HOST, &packet.frame());
            let [(device, frame)] = &sent[..] else { panic!("{sent:?}") };
            let (protocol, ends) = if family == 0 { (frame[23], &frame[26..34]) } else { (frame[20], &frame[22..54]) };
            let expected_ends = [router::octets(loopback), router::octets(loopback)].concat();
            assert_eq!((*device, protocol, ends), (IfIndex::HOST, expected, &expected_ends[..]));
        }
        let drops = router.drops().into_iter().collect::<Vec<_>>();
        assert_eq!(drops, [(DropReason::BackendGone, 1), (DropReason::NoSuchPod, 1)]);
        router.finish();
    }
}

/// The node has no address of the family that a pod could answer: nothing goes there in the name of a loopback address.
#[test]
fn a_process_on_a_loopback_address_reaches_no_pod_that_could_not_answer() {
    let loopback = ip("::1");
    let mut cluster = router::cluster();
    cluster.nodes[0].internal_ips.retain(|address| address.is_ipv4());
    let mut links = router::links();
    links.devices[0].addresses.retain(|net| net.addr().is_ipv4());
    let web = ServicePort {
        cluster_ips: Vec::new(),
        host_port: Some(HostAddresses::One(loopback)),
        ..service("default/web", Protocol::UDP, VIP, ["10.1.1.20", "fd00:1:1::20"], None)
    };
    let snat = SnatPorts::new(10000..=20000, []).unwrap();
    let mut router = Router::between(&cluster, &links, rules(vec![web], true), snat, 64);
    let asked = Packet { src: loopback, dst: loopback, ..first(1, UDP) };
    let sent = router.one(IfIndex::HOST, &asked.frame());
    assert_eq!(sent.iter().map(|(device, _)| *device).collect::<Vec<_>>(), [IfIndex::HOST], "it is told");
    assert_eq!(router.drops().into_iter().collect::<Vec<_>>(), [(DropReason::NoRoute, 1)]);
    router.finish();
}
