//! Source ports of translated connections, through the whole pipeline over the memory driver.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
};

use crate::packets::{Packet, TCP, UDP, received};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, ip, rules, service};
use weir_dataplane::frame::IfIndex;
use weir_nat::SnatPorts;
use weir_packet::{DropReason, Protocol};

const CLIENT: [&str; 2] = ["10.1.1.10", "fd00:1:1::10"];
const SERVER: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
const NODE: [&str; 2] = ["192.168.10.1", "fd00:10::1"];
const OUTSIDE: [&str; 2] = ["192.168.10.100", "fd00:10::100"];
const VIPS: [[&str; 2]; 2] = [["10.96.0.10", "fd00:96::10"], ["10.96.0.11", "fd00:96::11"]];
const NODE_PORTS: [u16; 2] = [30053, 30054];

/// A router with two services on one backend, by UDP and TCP.
fn router(range: RangeInclusive<u16>, excluded: &[u16], max_entries: u32) -> Router {
    let mut services = Vec::new();
    for protocol in [Protocol::UDP, Protocol::TCP] {
        for (vips, node_port) in VIPS.into_iter().zip(NODE_PORTS) {
            services.push(service(&format!("default/{}:{protocol}", vips[0]), protocol, vips, SERVER, Some(node_port)));
        }
    }
    let snat = SnatPorts::new(range, excluded.iter().copied()).unwrap();
    Router::new(rules(services, true), snat, max_entries)
}

fn ports(packet: &Packet) -> (u16, u16) {
    let word = |at: usize| u16::from_be_bytes([packet.l4[at], packet.l4[at + 1]]);
    (word(0), word(2))
}

/// A UDP datagram, or a TCP segment with these flags.
fn packet(protocol: u8, flags: u8, (src, sport): (IpAddr, u16), (dst, dport): (IpAddr, u16)) -> Packet {
    let mut l4 = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
    match protocol {
        UDP => l4.extend([0, 12, 0, 0, 1, 2, 3, 4]),
        _ => l4.extend([0, 0, 0, 9, 0, 0, 0, 10, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]),
    }
    Packet { src, dst, protocol, ttl: 64, tos: 0, options: 0, l4 }
}

/// What opens a flow.
fn opening(protocol: u8, from: (IpAddr, u16), to: (IpAddr, u16)) -> Packet {
    packet(protocol, 0x02, from, to)
}

/// The only packet that leaves for one that comes in, and by which device; none if it is dropped.
fn through(router: &mut Router, device: IfIndex, packet: &Packet) -> Option<(IfIndex, Packet)> {
    let sent = router.one(device, &packet.frame());
    let sent = received(&sent);
    assert!(sent.len() <= 1, "{sent:?}");
    sent.first().map(|((device, _), bytes)| (*device, Packet::read(bytes)))
}

/// Sends the answer to what left, and asserts that the sender of the flow gets it as from whom it asked.
fn answered(router: &mut Router, asked: &Packet, (device, left): &(IfIndex, Packet), back_to: IfIndex) {
    let (sport, dport) = ports(left);
    let answer = packet(left.protocol, 0x12, (left.dst, dport), (left.src, sport));
    let (to, got) = through(router, *device, &answer).expect("the answer passes");
    let (sport, dport) = ports(asked);
    assert_eq!((to, got.src, got.dst, ports(&got)), (back_to, asked.dst, asked.src, (dport, sport)));
}

/// Answers what left, and what TCP's handshake still needs: the flow has proved itself.
fn established(router: &mut Router, asked: &Packet, left: &(IfIndex, Packet), device: IfIndex) {
    answered(router, asked, left, device);
    if asked.protocol == TCP {
        let next = packet(TCP, 0x10, (asked.src, ports(asked).0), (asked.dst, ports(asked).1));
        let (to, got) = through(router, device, &next).expect("it passes");
        assert_eq!((to, got.src, ports(&got)), (left.0, left.1.src, ports(&left.1)));
    }
}

#[test]
fn with_four_ports_the_fifth_flow_to_one_destination_is_dropped_and_no_other() {
    for family in 0..2 {
        for protocol in [UDP, TCP] {
            let mut router = router(20001..=20004, &[], 1024);
            let outside = |last: u16| match ip(OUTSIDE[family]) {
                IpAddr::V4(a) => IpAddr::V4(Ipv4Addr::from(u32::from(a) - u32::from(last))),
                IpAddr::V6(_) => ip("fd00:10::100"),
            };
            // natOutgoing: the node's address towards one service outside.
            let to = (outside(0), 443);
            let mut used = BTreeMap::new();
            for sport in 5000..5004 {
                let asked = opening(protocol, (ip(CLIENT[family]), sport), to);
                let (device, left) = through(&mut router, CLIENT_POD, &asked).expect("a port is free");
                assert_eq!((device, left.src, left.dst, ports(&left).1), (UPLINK, ip(NODE[family]), to.0, to.1));
                assert!((20001..=20004).contains(&ports(&left).0));
                established(&mut router, &asked, &(device, left.clone()), CLIENT_POD);
                assert_eq!(used.insert(ports(&left).0, (asked, (device, left))), None, "two flows share a port");
            }
            for sport in 5004..5010 {
                let asked = opening(protocol, (ip(CLIENT[family]), sport), to);
                assert_eq!(through(&mut router, CLIENT_POD, &asked), None, "nothing leaves untranslated");
            }
            assert_eq!(router.drops(), BTreeMap::from([(DropReason::SnatExhausted, 6)]));
            let totals = router.totals();
            assert_eq!((totals.opened, totals.snat_allocated), (4, 4));
            assert!(totals.snat_taken >= 6 * 4, "each of the six tried each of the four: {totals:?}");
            // Another port of the same destination is another destination.
            let asked = opening(protocol, (ip(CLIENT[family]), 5004), (to.0, 444));
            let left = through(&mut router, CLIENT_POD, &asked).expect("a port is free there");
            used.insert(0, (asked, left));
            for (asked, left) in used.values() {
                answered(&mut router, asked, left, CLIENT_POD);
            }
            router.finish();
        }
    }
}

#[test]
fn a_syn_flood_takes_no_port_from_who_proves_himself() {
    const PORTS: usize = 64;
    for family in 0..2 {
        let mut router = router(20001..=20064, &[], 4096);
        let node_port = (ip(NODE[family]), NODE_PORTS[0]);
        // Spoofed ones, all towards one backend by a node port.
        let spoofed = |number: u16| match ip(OUTSIDE[family]) {
            IpAddr::V4(a) => IpAddr::V4(Ipv4Addr::from(u32::from(a) - 1 - u32::from(number % 60))),
            IpAddr::V6(_) => ip(&format!("fd00:10::{:x}", 0x200 + number % 60)),
        };
        let mut number = 0;
        let mut flood = |router: &mut Router, count| {
            for _ in 0..count {
                number += 1;
                let syn = opening(TCP, (spoofed(number), 1024 + number), node_port);
                assert!(through(router, UPLINK, &syn).is_some(), "one displaces another");
                router.now.0 += 1;
            }
        };
        let mut honest = Vec::new();
        for sport in 0..PORTS as u16 {
            flood(&mut router, 50);
            let asked = opening(TCP, (ip(OUTSIDE[family]), 5000 + sport), node_port);
            let left = through(&mut router, UPLINK, &asked).expect("there is a port for it");
            // More come before it is answered, and when it is half open.
            flood(&mut router, if sport < PORTS as u16 / 2 { 10 } else { 0 });
            established(&mut router, &asked, &left, UPLINK);
            honest.push((asked, left));
        }
        let used: BTreeSet<_> = honest.iter().map(|(_, (_, left))| ports(left).0).collect();
        assert_eq!(used.len(), PORTS);
        assert_eq!(router.totals().dropped(), 0);
        assert!(router.totals().snat_displaced > 1000, "{:?}", router.totals());
        // All ports are of those who have proved themselves: nobody takes any.
        let before = router.totals().snat_displaced;
        for sport in 0..10 {
            let asked = opening(TCP, (ip(OUTSIDE[family]), 6000 + sport), node_port);
            assert_eq!(through(&mut router, UPLINK, &asked), None);
        }
        assert_eq!(router.drops(), BTreeMap::from([(DropReason::SnatExhausted, 10)]));
        for (asked, (device, left)) in &honest {
            let next = packet(TCP, 0x18, (asked.src, ports(asked).0), (asked.dst, ports(asked).1));
            let (to, got) = through(&mut router, UPLINK, &next).expect("it goes on");
            assert_eq!((to, got.src, got.dst, ports(&got)), (*device, left.src, left.dst, ports(left)));
        }
        assert_eq!(router.finish().snat_displaced, before);
    }
}

#[test]
fn a_datagram_keeps_its_port_until_nobody_will_answer() {
    for family in 0..2 {
        let mut router = router(20001..=20004, &[], 1024);
        let to = (ip(OUTSIDE[family]), 443);
        let ask = |router: &mut Router, sport| {
            let asked = opening(UDP, (ip(CLIENT[family]), sport), to);
            through(router, CLIENT_POD, &asked).map(|left| (asked, left))
        };
        let first: Vec<_> = (5000..5004)
            .map(|sport| {
                router.now.0 += 10;
                ask(&mut router, sport).expect("a port is free")
            })
            .collect();
        // The oldest is answered and has its port from now on.
        answered(&mut router, &first[0].0, &first[0].1, CLIENT_POD);
        // Five seconds less a tick after the second was sent, and after.
        router.now.0 += 499 - 20;
        assert!(ask(&mut router, 5100).is_none());
        router.now.0 += 1;
        let (asked, left) = ask(&mut router, 5101).expect("a port is given up");
        assert_eq!(ports(&left.1).0, ports(&first[1].1.1).0, "the one that is silent for the longest time");
        assert!(ask(&mut router, 5102).is_none());
        answered(&mut router, &asked, &left, CLIENT_POD);
        for (asked, left) in [&first[0], &first[2], &first[3]] {
            answered(&mut router, asked, left, CLIENT_POD);
        }
        assert_eq!(router.drops(), BTreeMap::from([(DropReason::SnatExhausted, 2)]));
        assert_eq!(router.finish().snat_displaced, 1);
    }
}

#[test]
fn two_services_with_one_backend_never_share_a_reply() {
    for family in 0..2 {
        for protocol in [UDP, TCP] {
            let client = (ip(CLIENT[family]), 5000);
            let (outside, node) = ((ip(OUTSIDE[family]), 5000), ip(NODE[family]));
            // Not masqueraded; masqueraded, to cluster IPs and node ports; the backend itself, to itself; the node's kernel.
            let vips = VIPS.map(|vip| (ip(vip[family]), 53));
            let node_ports = NODE_PORTS.map(|port| (node, port));
            for (device, from, to) in [
                (CLIENT_POD, client, vips),
                (UPLINK, outside, vips),
                (UPLINK, outside, node_ports),
                (SERVER_POD, (ip(SERVER[family]), 5000), vips),
                (IfIndex::HOST, (node, 5000), vips),
            ] {
                let mut router = router(10000..=20000, &[], 1024);
                let flows = to.map(|to| {
                    let asked = opening(protocol, from, to);
                    let left = through(&mut router, device, &asked).expect("it passes");
                    (asked, left)
                });
                let [first, second] = flows.each_ref().map(|(_, (to, left))| {
                    assert_eq!((*to, left.dst, ports(left).1), (SERVER_POD, ip(SERVER[family]), 5353));
                    (left.src, ports(left).0)
                });
                assert_ne!(first, second, "{from:?} to {to:?}");
                for (asked, left) in &flows {
                    answered(&mut router, asked, left, device);
                }
                // And the second packet of each goes the way of its first.
                for (asked, (to, left)) in &flows {
                    let next = packet(protocol, 0x10, (asked.src, ports(asked).0), (asked.dst, ports(asked).1));
                    let (device, got) = through(&mut router, device, &next).expect("it passes");
                    assert_eq!((device, got.src, got.dst, ports(&got)), (*to, left.src, left.dst, ports(left)));
                }
                // Beside a direct connection to the backend from the same port too.
                if device == CLIENT_POD {
                    let direct = opening(protocol, from, (ip(SERVER[family]), 5353));
                    let left = through(&mut router, device, &direct).expect("it passes");
                    assert_ne!((left.1.src, ports(&left.1).0), first);
                    answered(&mut router, &direct, &left, device);
                }
                assert_eq!(router.finish().dropped(), 0);
            }
        }
    }
}

#[test]
fn the_clients_port_is_kept_where_replies_to_it_come_to_weir() {
    for family in 0..2 {
        let mut router = router(10000..=20000, &[15001], 1024);
        let to = (ip(OUTSIDE[family]), 443);
        // In the range; out of it, where a reply would be the kernel's; excluded.
        for (sport, is_kept) in [(15000, true), (9999, false), (40000, false), (15001, false)] {
            let asked = opening(UDP, (ip(CLIENT[family]), sport), to);
            let left = through(&mut router, CLIENT_POD, &asked).expect("a port is free");
            assert_eq!(ports(&left.1).0 == sport, is_kept, "{sport}");
            assert!((10000..=20000).contains(&ports(&left.1).0) && ports(&left.1).0 != 15001);
            answered(&mut router, &asked, &left, CLIENT_POD);
        }
        // Another pod's connection from the same port to the same place has to take another.
        let asked = opening(UDP, (ip(SERVER[family]), 15000), to);
        let left = through(&mut router, SERVER_POD, &asked).expect("a port is free");
        assert_ne!(ports(&left.1).0, 15000);
        answered(&mut router, &asked, &left, SERVER_POD);
        let totals = router.finish();
        assert_eq!((totals.dropped(), totals.snat_allocated, totals.snat_taken), (0, 5, 1));
    }
}

#[test]
fn two_pods_with_one_icmp_identifier_each_get_their_replies() {
    // Echo, timestamp, information, address mask; ICMPv6's echo.
    for (family, request, reply) in [(0, 8, 0), (0, 13, 14), (0, 15, 16), (0, 17, 18), (1, 128, 129)] {
        let mut router = router(10000..=20000, &[], 1024);
        let icmp = |icmp_type, id: [u8; 2], src, dst| {
            let l4 = vec![icmp_type, 0, 0, 0, id[0], id[1], 0, 1, 9, 9, 9, 9];
            Packet { src, dst, protocol: if family == 0 { 1 } else { 58 }, ttl: 64, tos: 0, options: 0, l4 }
        };
        let (outside, node) = (ip(OUTSIDE[family]), ip(NODE[family]));
        let pods = [(CLIENT_POD, ip(CLIENT[family])), (SERVER_POD, ip(SERVER[family]))];
        let asked = pods.map(|(device, pod)| {
            let (to, left) = through(&mut router, device, &icmp(request, [0, 7], pod, outside)).expect("it passes");
            assert_eq!((to, left.src, left.dst, left.l4[0]), (UPLINK, node, outside, request));
            [left.l4[4], left.l4[5]]
        });
        assert_ne!(asked[0], asked[1], "type {request}");
        for ((device, pod), id) in pods.into_iter().zip(asked) {
            let (to, got) = through(&mut router, UPLINK, &icmp(reply, id, outside, node)).expect("it passes");
            assert_eq!((to, got.src, got.dst, got.l4[0], &got.l4[4..6]), (device, outside, pod, reply, &[0, 7][..]));
        }
        assert_eq!(router.finish().dropped(), 0);
    }
}

#[test]
fn node_ports_and_ports_that_the_node_listens_on_are_never_chosen() {
    let listened = [30061, 30063];
    let excluded: Vec<u16> = NODE_PORTS.into_iter().chain(listened).collect();
    let mut router = router(30050..=30065, &excluded, 1024);
    let mut used = BTreeSet::new();
    // From every port of the range itself too, so that keeping the client's own is no way around.
    for sport in (30050..=30065).chain(1000..1016) {
        let asked = opening(UDP, (ip(CLIENT[0]), sport), (ip(OUTSIDE[0]), 443));
        if let Some((_, left)) = through(&mut router, CLIENT_POD, &asked) {
            assert!(used.insert(ports(&left).0), "two flows share a port");
        }
    }
    let allowed: BTreeSet<u16> = (30050..=30065).filter(|port| !excluded.contains(port)).collect();
    assert_eq!(used, allowed);
    assert_eq!(router.finish().drops, [(DropReason::SnatExhausted, 32 - 12)]);
}

#[test]
fn one_address_serves_many_more_flows_than_it_has_ports() {
    const FLOWS: u32 = 200_000;
    const DESTINATIONS: u32 = 50;
    let mut router = router(10000..=19999, &[], 1 << 18);
    let outside = |number: u32| IpAddr::V4(Ipv4Addr::from(0xac14_0001 + number));
    // Every reply key, whole: whose flow it is.
    let mut reply_keys = HashMap::new();
    let mut number = 0;
    while number < FLOWS {
        let frames: Vec<(IfIndex, Vec<u8>)> = (number..number + 64)
            .map(|flow| {
                // 4000 flows to each destination, of 20 pods' worth of source ports.
                let sport = 1024 + (flow / DESTINATIONS) as u16;
                let from = (ip(if flow % 2 == 0 { CLIENT[0] } else { SERVER[0] }), sport);
                let device = if flow % 2 == 0 { CLIENT_POD } else { SERVER_POD };
                (device, opening(UDP, from, (outside(flow % DESTINATIONS), 443)).frame())
            })
            .collect();
        for (offset, (_, bytes)) in received(&router.turn(&frames)).into_iter().enumerate() {
            let source = (bytes[12..16].to_vec(), [bytes[20], bytes[21]]);
            assert_eq!(source.0, [192, 168, 10, 1], "it leaves translated");
            let key = (source, bytes[16..20].to_vec());
            assert_eq!(reply_keys.insert(key, number + offset as u32), None, "two flows share a reply key");
        }
        number += 64;
    }
    assert_eq!((reply_keys.len(), router.tables.v4.len()), (FLOWS as usize, FLOWS as usize));
    let totals = router.finish();
    assert_eq!((totals.snat_allocated, totals.dropped()), (u64::from(FLOWS), 0));
    // With 40% of the ports in use towards each destination at the end, 1 - ln(0.6) / 0.4 - 2 = 0.28 tries a flow were in vain.
    let in_vain = totals.snat_taken as f64 / f64::from(FLOWS);
    assert!((0.2..0.36).contains(&in_vain), "{in_vain}");
}

/// A pod that claims another pod's address, or one of nobody: the node lends its own address to neither, and keeps no port for them.
#[test]
fn what_a_pod_sends_in_anothers_name_is_not_masqueraded_out() {
    for (family, outside) in OUTSIDE.into_iter().enumerate() {
        for protocol in [UDP, TCP] {
            let mut router = router(20001..=20004, &[], 1024);
            for claimed in
                [["10.1.1.20", "fd00:1:1::20"], ["10.1.1.77", "fd00:1:1::77"], ["10.1.2.20", "fd00:1:2::20"], NODE]
            {
                let asked = opening(protocol, (ip(claimed[family]), 5000), (ip(outside), 443));
                assert_eq!(through(&mut router, CLIENT_POD, &asked), None, "{}", claimed[family]);
            }
            assert_eq!(router.drops(), BTreeMap::from([(DropReason::SpoofedSource, 4)]));
            let totals = router.totals();
            assert_eq!((totals.opened, totals.snat_allocated), (0, 0));
            // Nor is a flow that the other has: it stays his.
            let (own, to) = ((ip(CLIENT[family]), 5000), (ip(outside), 443));
            let asked = opening(protocol, own, to);
            let left = through(&mut router, CLIENT_POD, &asked).expect("its own");
            established(&mut router, &asked, &left, CLIENT_POD);
            let next = packet(protocol, 0x10, own, to);
            assert_eq!(through(&mut router, SERVER_POD, &next), None, "by another's device");
            assert_eq!(through(&mut router, CLIENT_POD, &next).map(|(_, got)| got.src), Some(ip(NODE[family])));
            assert_eq!(router.drops(), BTreeMap::from([(DropReason::SpoofedSource, 5)]));
            router.finish();
        }
    }
}
