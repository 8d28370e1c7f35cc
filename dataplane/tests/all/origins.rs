//! Who sent a packet that comes by the node's kernel, and what that lets it do.

use std::{net::IpAddr, sync::Arc};

use crate::packets::{Packet, TCP, UDP};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, cluster, ip, links, rules, service};
use proptest::prelude::*;
use weir_dataplane::{
    afxdp::trunk::{self, ANSWERED},
    forwarding::Forwarding,
    frame::IfIndex,
    model::{Device, Role},
    snapshot::Rules,
};
use weir_nat::SnatPorts;
use weir_packet::{DropReason, Mac, Protocol};

const NODE: [&str; 2] = ["192.168.10.1", "fd00:10::1"];
const OTHER_NODE: [&str; 2] = ["192.168.10.2", "fd00:10::2"];
const CLIENT: [&str; 2] = ["10.1.1.10", "fd00:1:1::10"];
const SERVER: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
/// Of this node's range, and no pod that is known.
const UNNAMED: [&str; 2] = ["10.1.1.77", "fd00:1:1::77"];
const REMOTE: [&str; 2] = ["10.1.2.20", "fd00:1:2::20"];
const CONTAINER: [&str; 2] = ["172.17.0.2", "fd00:17::2"];
const VIP: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const FAR_VIP: [&str; 2] = ["10.96.0.11", "fd00:96::11"];
/// A bridge, or a VPN's device.
const OTHER_DEVICE: IfIndex = IfIndex(30);

const SYN: u8 = 2;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;

fn some_rules(is_open: bool) -> Rules {
    let services =
        [(VIP, SERVER), (FAR_VIP, REMOTE)].map(|(vips, to)| service("default/s", Protocol::UDP, vips, to, None));
    rules(services.into(), is_open)
}

fn router(is_open: bool) -> Router {
    Router::new(some_rules(is_open), SnatPorts::new(10000..=20000, []).unwrap(), 1024)
}

fn packet(protocol: u8, src: IpAddr, dst: IpAddr, [from, to]: [u16; 2], rest: &[u8]) -> Packet {
    let l4 = [&from.to_be_bytes()[..], &to.to_be_bytes(), rest].concat();
    Packet { src, dst, protocol, ttl: 64, tos: 0, options: 0, l4 }
}

fn datagram(src: &str, dst: &str, ports: [u16; 2]) -> Packet {
    packet(UDP, ip(src), ip(dst), ports, &[0, 12, 0, 0, 1, 2, 3, 4])
}

/// Of a connection that who has the higher port opens with number 100, and the other with 500.
fn segment(src: &str, dst: &str, ports: [u16; 2], flags: u8) -> Packet {
    let is_opener = ports[0] > ports[1];
    let number = |is_opener: bool, is_syn: bool| if is_opener { 100 } else { 500_u32 } + u32::from(!is_syn);
    let ack = if flags & ACK == 0 { 0 } else { number(!is_opener, false) };
    let rest = [
        &number(is_opener, flags & SYN != 0).to_be_bytes()[..],
        &ack.to_be_bytes(),
        &[0x50, flags, 0xff, 0xff, 0, 0, 0, 0],
    ];
    packet(TCP, ip(src), ip(dst), ports, &rest.concat())
}

/// Where a packet goes, or why it does not.
fn fate(router: &mut Router, device: IfIndex, packet: &Packet) -> Result<(IfIndex, Packet), DropReason> {
    let before = router.drops();
    let sent = router.one(device, &packet.frame());
    let dropped = router.drops().into_iter().find(|(reason, count)| before.get(reason) != Some(count));
    match (&sent[..], dropped) {
        ([(device, frame)], None) => Ok((*device, Packet::read(&frame[14..]))),
        (_, Some((reason, _))) => Err(reason),
        _ => panic!("{sent:?}"),
    }
}

fn goes(router: &mut Router, device: IfIndex, packet: &Packet) -> Result<IfIndex, DropReason> {
    fate(router, device, packet).map(|(device, _)| device)
}

#[test]
fn only_what_the_node_made_with_its_own_address_is_the_nodes_own() {
    use DropReason::{PolicyDeniedIngress, SpoofedSource};
    let forwarded = OTHER_DEVICE.forwarded();
    let unknown = IfIndex::FORWARDED_BY_UNKNOWN;
    for family in 0..2 {
        for (what, device, src, expected) in [
            ("a process of the node", IfIndex::HOST, NODE, Ok(SERVER_POD)),
            ("a process with a made-up address", IfIndex::HOST, CONTAINER, Err(PolicyDeniedIngress)),
            ("a process with a pod's address", IfIndex::HOST, CLIENT, Err(SpoofedSource)),
            ("a container", forwarded, CONTAINER, Err(PolicyDeniedIngress)),
            ("nobody knows who", unknown, CONTAINER, Err(PolicyDeniedIngress)),
            ("who the kernel masquerades", forwarded, NODE, Err(PolicyDeniedIngress)),
            ("another node, past weir", UPLINK.forwarded(), OTHER_NODE, Err(PolicyDeniedIngress)),
            ("a pod of this node", forwarded, CLIENT, Err(SpoofedSource)),
            ("the very pod", SERVER_POD.forwarded(), SERVER, Err(SpoofedSource)),
            ("a pod that nobody named", IfIndex(31).forwarded(), UNNAMED, Err(PolicyDeniedIngress)),
            ("a pod of another node", forwarded, REMOTE, Err(SpoofedSource)),
            ("a pod of another node, from nobody knows where", unknown, REMOTE, Err(SpoofedSource)),
        ] {
            let mut router = router(false);
            let asked = segment(src[family], SERVER[family], [40_000, 80], SYN);
            assert_eq!(goes(&mut router, device, &asked), expected, "{what}, family {family}");
            router.finish();
        }
    }
    // Past weir, for a port of the node that its kernel translates: by the device that leads there, in no tunnel.
    for (family, expected) in [(0, SpoofedSource), (1, PolicyDeniedIngress)] {
        let mut router = router(false);
        let asked = segment(REMOTE[family], SERVER[family], [40_000, 80], SYN);
        assert_eq!(goes(&mut router, UPLINK.forwarded(), &asked), Err(expected), "family {family}");
        router.finish();
    }
}

#[test]
fn what_is_forwarded_is_answered_to_the_kernel() {
    for family in 0..2 {
        // 172.20.0.0/16 has a route by the uplink, and a default route there is in IPv6 none.
        for client in [["172.20.0.9", "fd00:10::100"], CONTAINER] {
            let (client, server) = (client[family], SERVER[family]);
            for straight in [true, false] {
                let router = router(true);
                let mut router = if straight { router } else { router.without_straight_way() };
                let device = OTHER_DEVICE.forwarded();
                let (to, seen) = fate(&mut router, device, &segment(client, server, [40_000, 80], SYN)).unwrap();
                assert_eq!((to, seen.src, seen.ttl), (SERVER_POD, ip(client), 64), "its kernel has counted the hop");
                let back = segment(server, client, [80, 40_000], SYN_ACK);
                let (to, seen) = fate(&mut router, SERVER_POD, &back).unwrap();
                assert_eq!((to, seen.dst, seen.ttl), (IfIndex::HOST, ip(client), 64));
                // A refused one too.
                let refused = segment(client, VIP[family], [40_000, 99], SYN);
                let sent = router.one(device, &refused.frame());
                assert_eq!(sent.iter().map(|(device, _)| *device).collect::<Vec<_>>(), [IfIndex::HOST]);
                router.finish();
            }
        }
        // By a service: to a pod of this node as it is, and to another's with a port of weir's, so that the answer comes by weir.
        let mut router = router(true);
        let device = OTHER_DEVICE.forwarded();
        for (vip, backend, leaves_by) in [(VIP, SERVER, SERVER_POD), (FAR_VIP, REMOTE, UPLINK)] {
            let asked = datagram(CONTAINER[family], vip[family], [40_000, 53]);
            let sent = router.one(device, &asked.frame());
            let [(to, frame)] = &sent[..] else { panic!("{sent:?}") };
            assert_eq!(*to, leaves_by);
            let outer = usize::from(family == 0 && leaves_by == UPLINK) * 20;
            let seen = Packet::read(&frame[14 + outer..]);
            assert_eq!(seen.dst, ip(backend[family]));
            assert_ne!(seen.src, ip(CONTAINER[family]), "from outside of the pods' ranges it is masqueraded");
            if leaves_by == SERVER_POD {
                let ports = [5353, u16::from_be_bytes([seen.l4[0], seen.l4[1]])];
                let answer = packet(UDP, seen.dst, seen.src, ports, &[0, 12, 0, 0, 1, 2, 3, 4]);
                let (to, seen) = fate(&mut router, SERVER_POD, &answer).unwrap();
                assert_eq!((to, seen.src, seen.dst), (IfIndex::HOST, ip(vip[family]), ip(CONTAINER[family])));
            }
        }
        router.finish();
    }
}

#[test]
fn a_server_of_the_node_sees_who_asked_a_service_and_its_answers_are_awaited() {
    const OUTSIDE: [&str; 2] = ["192.168.10.100", "fd00:10::100"];
    for family in 0..2 {
        // What the node's routes bring to weir anyway needs no mark.
        for (device, client, is_marked) in [
            (UPLINK, OUTSIDE, true),
            (OTHER_DEVICE.forwarded(), CONTAINER, true),
            (CLIENT_POD, CLIENT, false),
            (IfIndex::HOST, NODE, false),
        ] {
            let (client, node, vip) = (client[family], NODE[family], VIP[family]);
            let services = vec![service("default/s", Protocol::UDP, VIP, NODE, Some(31_000))];
            let mut router = Router::new(rules(services, true), SnatPorts::new(10000..=20000, []).unwrap(), 1024);
            // By the cluster IP, which others than pods are masqueraded by, and by the node port, which all are: not what stays here.
            for (number, (asked, port)) in [(vip, 53), (node, 31_000)].into_iter().enumerate() {
                let from = 40_000 + number as u16;
                // The second packet is one of a connection.
                for _ in 0..2 {
                    let sent = router.one(device, &datagram(client, asked, [from, port]).frame());
                    let [(to, frame)] = &sent[..] else { panic!("{sent:?}") };
                    let seen = Packet::read(&frame[14..]);
                    assert_eq!((*to, seen.dst), (IfIndex::HOST, ip(node)), "{client} to {asked}");
                    assert_eq!(frame[6..12] == ANSWERED.0, is_marked, "{client} to {asked}");
                    if device == IfIndex::HOST {
                        continue;
                    }
                    assert_eq!(seen.src, ip(client));
                    let answer = datagram(node, client, [5353, from]);
                    let (to, seen) = fate(&mut router, IfIndex::HOST, &answer).unwrap();
                    let back = if device.is_forwarded() { IfIndex::HOST } else { device };
                    assert_eq!((to, seen.src, seen.dst), (back, ip(asked), ip(client)));
                    assert_eq!(seen.l4[..2], port.to_be_bytes());
                }
            }
            // What it answers without a connection goes as it is.
            if device == UPLINK {
                let stray = datagram(node, client, [5353, 50_000]);
                let (to, seen) = fate(&mut router, IfIndex::HOST, &stray).unwrap();
                assert_eq!((to, seen.src), (UPLINK, ip(node)));
            }
            router.finish();
        }
    }
}

#[test]
fn a_connection_belongs_to_who_opened_it() {
    for family in 0..2 {
        // The node opens with an address and a port; then somebody outside sends with the same.
        let ends = |flags| segment(NODE[family], SERVER[family], [40_000, 80], flags);
        let mut router = router(true);
        assert_eq!(goes(&mut router, IfIndex::HOST, &ends(SYN)), Ok(SERVER_POD));
        let back = segment(SERVER[family], NODE[family], [80, 40_000], SYN_ACK);
        assert_eq!(goes(&mut router, SERVER_POD, &back), Ok(IfIndex::HOST));
        router.publish(some_rules(false));
        router.turn(&[]);
        assert_eq!(goes(&mut router, IfIndex::HOST, &ends(ACK)), Ok(SERVER_POD), "the node's own");
        let masqueraded = OTHER_DEVICE.forwarded();
        assert_eq!(goes(&mut router, masqueraded, &ends(ACK)), Err(DropReason::PolicyDeniedIngress));
        assert_eq!(goes(&mut router, masqueraded, &ends(SYN)), Err(DropReason::PolicyDeniedIngress));
        assert_eq!(goes(&mut router, UPLINK, &ends(ACK)), Err(DropReason::MartianAddress));
        assert_eq!(goes(&mut router, IfIndex::HOST, &ends(ACK)), Ok(SERVER_POD), "and its connection stands");
        router.finish();

        // Somebody outside, by the node's kernel and then by the uplink.
        let ends = |flags| segment("172.20.0.9", "10.1.1.20", [40_000, 80], flags);
        let mut router = self::router(true);
        assert_eq!(goes(&mut router, OTHER_DEVICE.forwarded(), &ends(SYN)), Ok(SERVER_POD));
        let back = segment("10.1.1.20", "172.20.0.9", [80, 40_000], SYN_ACK);
        assert_eq!(goes(&mut router, SERVER_POD, &back), Ok(IfIndex::HOST));
        assert_eq!(goes(&mut router, IfIndex(33).forwarded(), &ends(ACK)), Ok(SERVER_POD), "the kernel's own routing");
        assert_eq!(goes(&mut router, UPLINK, &ends(SYN)), Ok(SERVER_POD), "a new connection");
        assert_eq!(goes(&mut router, SERVER_POD, &back), Ok(UPLINK));
        router.finish();
    }
}

/// A pod that sends before anybody has named it comes by the node's kernel. Then it is named, and has a policy.
#[test]
fn what_a_pod_opened_before_it_was_known_is_judged_again() {
    let mut unknown = cluster();
    unknown.workloads.remove(0);
    let mut links_before = links();
    links_before.devices.retain(|device| device.index != CLIENT_POD);
    for family in 0..2 {
        for is_open in [true, false] {
            for who_speaks_next in [CLIENT_POD, SERVER_POD] {
                let snat = SnatPorts::new(10000..=20000, []).unwrap();
                let mut router = Router::between(&unknown, &links_before, some_rules(true), snat, 1024);
                let forth = |flags| segment(CLIENT[family], SERVER[family], [40_000, 80], flags);
                let back = |flags| segment(SERVER[family], CLIENT[family], [80, 40_000], flags);
                let by_kernel = CLIENT_POD.forwarded();
                assert_eq!(goes(&mut router, by_kernel, &forth(SYN)), Ok(SERVER_POD));
                assert_eq!(goes(&mut router, SERVER_POD, &back(SYN_ACK)), Ok(IfIndex::HOST));
                let forwarding = Arc::new(Forwarding::compile(&cluster(), &links()).unwrap());
                let next = router.next(some_rules(is_open), forwarding);
                router.published.publish(next);
                if who_speaks_next == SERVER_POD {
                    assert_eq!(goes(&mut router, SERVER_POD, &back(ACK)), Err(DropReason::SpoofedSource), "it went");
                }
                // A first packet in the middle of a stream.
                let expected = if is_open { Ok(SERVER_POD) } else { Err(DropReason::PolicyDeniedIngress) };
                assert_eq!(goes(&mut router, CLIENT_POD, &forth(ACK)), expected, "family {family}");
                assert_eq!(goes(&mut router, by_kernel, &forth(ACK)), Err(DropReason::SpoofedSource));
                let expected = if is_open { Ok(CLIENT_POD) } else { Err(DropReason::SpoofedSource) };
                if is_open {
                    assert_eq!(goes(&mut router, SERVER_POD, &back(ACK)), expected);
                }
                router.finish();
            }
        }
    }
}

#[test]
fn between_a_pod_and_its_node_no_router_is_passed() {
    for family in 0..2 {
        for straight in [true, false] {
            let router = router(true);
            let mut router = if straight { router } else { router.without_straight_way() };
            for ttl in [1, 2, 64] {
                let ports = [40_000 + u16::from(ttl), 179];
                let with = |packet: Packet| Packet { ttl, ..packet };
                for flags in [SYN, ACK, ACK] {
                    let own = with(segment(NODE[family], SERVER[family], ports, flags));
                    let (to, seen) = fate(&mut router, IfIndex::HOST, &own).unwrap();
                    assert_eq!((to, seen.ttl), (SERVER_POD, ttl));
                    let answer = with(segment(SERVER[family], NODE[family], [ports[1], ports[0]], flags | ACK));
                    let (to, seen) = fate(&mut router, SERVER_POD, &answer).unwrap();
                    assert_eq!((to, seen.ttl), (IfIndex::HOST, ttl));
                }
            }
            // From pod to pod it is one.
            let near = segment(CLIENT[family], SERVER[family], [40_000, 80], SYN);
            assert_eq!(fate(&mut router, CLIENT_POD, &near).unwrap().1.ttl, 63);
            let last = Packet { ttl: 1, ..near };
            assert_eq!(goes(&mut router, CLIENT_POD, &last), Err(DropReason::TtlExpired));
            router.finish();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Pods let nothing in: whatever is said by the node's kernel, and in whatever order, only the node itself is heard, and who answers it.
    #[test]
    fn no_payload_of_a_denied_pair_reaches_a_pod(sent in prop::collection::vec(
        (0..8_usize, 0..6_usize, 0..5_usize, prop::sample::select(vec![SYN, ACK, SYN_ACK, 0x11, 0x14]), 0..2_usize, any::<bool>()),
        1..60,
    )) {
        let mut router = router(false);
        for (by, src, dst, flags, family, is_tcp) in sent {
            let devices = [
                IfIndex::HOST, OTHER_DEVICE.forwarded(), UPLINK.forwarded(), IfIndex::FORWARDED_BY_UNKNOWN, SERVER_POD.forwarded(),
                UPLINK, CLIENT_POD, SERVER_POD,
            ];
            let device = devices[by];
            let src = [NODE, CLIENT, SERVER, UNNAMED, REMOTE, CONTAINER][src][family];
            let dst = [SERVER, CLIENT, VIP, NODE, REMOTE][dst][family];
            // Of the uplink and of pods what is no answer is denied as ever: other tests.
            let packet = match is_tcp {
                true => segment(src, dst, [40_000, 80], flags),
                false => datagram(src, dst, [40_000, 53]),
            };
            let is_by_node = device == IfIndex::HOST && packet.src == ip(NODE[family]);
            for (to, frame) in router.one(device, &packet.frame()) {
                let (protocol, l4, source) = match family {
                    0 => (frame[23], 34, &frame[26..30]),
                    _ => (frame[20], 54, &frame[22..38]),
                };
                // What a pod is told of its own packets.
                let is_told = protocol == 1 || protocol == 58 || protocol == TCP && frame[l4 + 13] & 4 != 0;
                // Or says to itself, by its service too.
                let is_itself = device == to && [SERVER, CLIENT, VIP, NODE].iter().any(|own| source == crate::router::octets(ip(own[family])));
                let is_let_in = is_by_node || device == to && (is_told || is_itself);
                prop_assert!(is_let_in || to != SERVER_POD && to != CLIENT_POD, "{packet:?} from {device:?} reaches {to:?}");
            }
        }
        router.finish();
    }
}

/// Frames of the trunk name a pod's device in their source: what somebody outside sends with such a MAC address must not go into that pod.
#[test]
fn what_is_handed_to_the_kernel_has_none_of_its_senders_macs() {
    const OUTSIDE: [&str; 2] = ["192.168.10.100", "fd00:10::100"];
    let mac = Mac([6, 1, 2, 3, 4, 5]);
    let mut links = links();
    links.devices.push(Device {
        name: "host".into(),
        index: IfIndex::HOST,
        role: Role::Host,
        mac,
        mtu: 65535,
        addresses: Vec::new(),
    });
    for family in 0..2 {
        let snat = SnatPorts::new(10000..=20000, []).unwrap();
        let mut router = Router::between(&cluster(), &links, some_rules(true), snat, 64);
        let to_pod = trunk::target(SERVER_POD);
        let echo = [[8, 128][family], 0, 0, 0, 0, 1, 0, 1];
        let packets = [
            datagram(OUTSIDE[family], NODE[family], [5000, 80]),
            segment(OUTSIDE[family], NODE[family], [5000, 80], SYN),
            Packet { l4: echo.to_vec(), protocol: [1, 58][family], ..datagram(OUTSIDE[family], NODE[family], [0, 0]) },
        ];
        for packet in packets {
            let mut frame = packet.frame();
            frame[..6].copy_from_slice(&to_pod.0);
            frame[6..12].copy_from_slice(&to_pod.0);
            let sent = router.one(UPLINK, &frame);
            let [(device, sent)] = &sent[..] else { panic!("{packet:?}: {:?}", router.drops()) };
            assert_eq!((*device, &sent[..6], &sent[6..12]), (IfIndex::HOST, &mac.0[..], &[6, 1, 2, 3, 4, 4][..]));
            assert_eq!(sent[14..], frame[14..], "and is as it was");
        }
        router.finish();
    }
}
