//! Routes of the node's kernel that are not just a next hop on an uplink: by devices that only the kernel serves, to nowhere, to several next
//! hops.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use crate::packets::{Packet, UDP};
use crate::router::{CLIENT_POD, OTHER_MAC, Router, SERVER_POD, UPLINK, cluster, ip, links, octets, rules};
use weir_dataplane::{
    forwarding::Forwarding,
    frame::IfIndex,
    model::{Device, Links, Multipath, Neighbor, NextHop, Refusal, Refused, Role, Route},
};
use weir_nat::SnatPorts;
use weir_packet::{DropReason, Mac};

const CLIENT: [&str; 2] = ["10.1.1.10", "fd00:1:1::10"];
const NODE: [&str; 2] = ["192.168.10.1", "fd00:10::1"];
const GATEWAY: [&str; 2] = ["192.168.10.100", "fd00:10::100"];
/// A VPN's device and who is behind it.
const VPN: IfIndex = IfIndex(40);
const BEHIND: [&str; 2] = ["10.8.0.2", "fd00:8::2"];
const SECOND_UPLINK: IfIndex = IfIndex(3);
const NAMES: [&str; 2] = ["0.0.0.0/0", "::/0"];

fn datagram(src: IpAddr, dst: IpAddr, ports: [u16; 2]) -> Packet {
    let l4 = [&ports[0].to_be_bytes()[..], &ports[1].to_be_bytes(), &[0, 12, 0, 0, 1, 2, 3, 4]].concat();
    Packet { src, dst, protocol: UDP, ttl: 64, tos: 0, options: 0, l4 }
}

/// The usual devices, a default route, and what `change` makes of them.
fn between(change: impl FnOnce(&mut Links)) -> Links {
    let mut links = links();
    for family in 0..2 {
        let via = Some(ip(GATEWAY[family]));
        links.routes.push(Route { to: NAMES[family].parse().unwrap(), via, device: UPLINK, metric: 0 });
    }
    change(&mut links);
    links
}

fn router(links: &Links) -> Router {
    Router::between(&cluster(), links, rules(Vec::new(), true), SnatPorts::new(10000..=20000, []).unwrap(), 4096)
}

fn with_vpn(links: &mut Links) {
    links.devices.push(Device {
        name: "wg0".into(),
        index: VPN.forwarded(),
        role: Role::Kernel,
        mac: Mac::default(),
        mtu: 1420,
        addresses: vec!["10.8.0.1/24".parse().unwrap(), "fd00:8::1/64".parse().unwrap()],
    });
    for to in ["10.8.0.0/24", "fd00:8::/64"] {
        links.routes.push(Route { to: to.parse().unwrap(), via: None, device: VPN.forwarded(), metric: 0 });
    }
}

#[test]
fn what_another_device_leads_to_is_judged_and_handed_to_the_kernel() {
    for family in 0..2 {
        for straight in [true, false] {
            let router = router(&between(with_vpn));
            let mut router = if straight { router } else { router.without_straight_way() };
            let (pod, far) = (ip(CLIENT[family]), ip(BEHIND[family]));
            for round in 0..3 {
                // As it is, with all hops left to the kernel: though its pool has natOutgoing.
                let asked = datagram(pod, far, [40_000, 53]);
                let sent = router.one(CLIENT_POD, &asked.frame());
                let [(device, frame)] = &sent[..] else { panic!("{sent:?}") };
                assert_eq!((*device, &frame[14..]), (IfIndex::HOST, &asked.bytes()[..]), "{round}");
                let answer = datagram(far, pod, [53, 40_000]);
                let sent = router.one(VPN.forwarded(), &answer.frame());
                let [(device, frame)] = &sent[..] else { panic!("{sent:?}") };
                assert_eq!((*device, &frame[14..]), (CLIENT_POD, &answer.bytes()[..]));
            }
            // The last hop is the kernel's to count, and what is too long its to split.
            let last = Packet { ttl: 1, ..datagram(pod, far, [40_001, 53]) };
            assert_eq!(router.one(CLIENT_POD, &last.frame())[0].0, IfIndex::HOST);
            let totals = router.finish();
            assert_eq!((totals.dropped(), totals.tx), (0, 3));
        }
        // Nothing leaves by an uplink that should not, whatever a policy says.
        let links = between(with_vpn);
        let mut router = Router::between(
            &cluster(),
            &links,
            rules(Vec::new(), false),
            SnatPorts::new(10000..=20000, []).unwrap(),
            64,
        );
        let opened = datagram(ip(BEHIND[family]), ip(CLIENT[family]), [40_000, 53]);
        assert_eq!(router.one(VPN.forwarded(), &opened.frame()), []);
        assert_eq!(router.drops().into_iter().collect::<Vec<_>>(), [(DropReason::PolicyDeniedIngress, 1)]);
    }
}

#[test]
fn routes_to_nowhere_are_obeyed() {
    for family in 0..2 {
        let nets = [["10.66.0.0/16", "10.67.0.0/16", "10.68.0.0/16"], ["fd00:66::/64", "fd00:67::/64", "fd00:68::/64"]];
        let refusals = [Refusal::Blackhole, Refusal::Unreachable, Refusal::Prohibit];
        let links = between(|links| {
            for (to, refusal) in nets[family].into_iter().zip(refusals) {
                links.refused.push(Refused { to: to.parse().unwrap(), refusal, metric: 0 });
            }
            // A more specific one wins.
            let via = Some(ip(GATEWAY[family]));
            let to = ["10.66.1.0/24", "fd00:66::100/120"][family].parse().unwrap();
            links.routes.push(Route { to, via, device: UPLINK, metric: 0 });
        });
        let mut router = router(&links);
        let at = |net: &str| net.split('/').next().unwrap().parse::<IpAddr>().unwrap();
        // RFC 792 and 4443: type and code of what the sender is told.
        let told = [[None, Some((3, 1)), Some((3, 13))], [None, Some((1, 3)), Some((1, 1))]][family];
        let reasons = [DropReason::RouteBlackhole, DropReason::RouteUnreachable, DropReason::RouteProhibited];
        for ((net, expected), reason) in nets[family].into_iter().zip(told).zip(reasons) {
            let sent = router.one(CLIENT_POD, &datagram(ip(CLIENT[family]), at(net), [40_000, 53]).frame());
            let header_bytes = 14 + [20, 40][family];
            let message = sent.first().map(|(device, frame)| (*device, (frame[header_bytes], frame[header_bytes + 1])));
            assert_eq!(message, expected.map(|kind| (CLIENT_POD, kind)), "{net}");
            assert_eq!(router.drops()[&reason], 1);
        }
        let near = ["10.66.1.9", "fd00:66::109"][family];
        let sent = router.one(CLIENT_POD, &datagram(ip(CLIENT[family]), ip(near), [40_000, 53]).frame());
        assert_eq!(sent[0].0, UPLINK);

        // A flow that is under way ends with its route.
        let mut router = self::router(&between(|_| {}));
        let frame = datagram(ip(CLIENT[family]), at(nets[family][0]), [40_000, 53]).frame();
        assert_eq!(router.one(CLIENT_POD, &frame)[0].0, UPLINK);
        let forwarding = Arc::new(Forwarding::compile(&cluster(), &links).unwrap());
        let next = router.next(rules(Vec::new(), true), forwarding);
        router.published.publish(next);
        assert_eq!(router.one(CLIENT_POD, &frame), []);
        assert_eq!(router.drops().into_iter().collect::<Vec<_>>(), [(DropReason::RouteBlackhole, 1)]);
    }
}

/// Two uplinks, and a route by both, with such weights; of those in `down` the kernel says that they are not usable.
fn two_ways(family: usize, weights: &[(IfIndex, u16)]) -> Links {
    between(|links| {
        links.devices.push(Device {
            name: "eth1".into(),
            index: SECOND_UPLINK,
            role: Role::Uplink,
            mac: Mac([2, 0, 0, 0, 0, 20]),
            mtu: 1500,
            addresses: vec!["192.168.20.1/24".parse().unwrap(), "fd00:20::1/64".parse().unwrap()],
        });
        for address in ["192.168.20.100", "fd00:20::100"] {
            links.neighbors.push(Neighbor { address: ip(address), mac: OTHER_MAC, device: SECOND_UPLINK });
        }
        let via = |device: IfIndex| match device {
            UPLINK => GATEWAY[family],
            _ => ["192.168.20.100", "fd00:20::100"][family],
        };
        let hops = weights.iter().map(|(device, weight)| NextHop {
            via: Some(ip(via(*device))),
            device: *device,
            weight: *weight,
        });
        let to = ["10.70.0.0/16", "fd00:70::/64"][family].parse().unwrap();
        links.multipaths.push(Multipath { to, hops: hops.collect(), metric: 0 });
    })
}

fn ways_of_flows(router: &mut Router, family: usize) -> BTreeMap<u16, IfIndex> {
    let far = ip(["10.70.0.9", "fd00:70::9"][family]);
    let frames = |port: u16| datagram(ip(CLIENT[family]), far, [port, 53]).frame();
    (1000..2000)
        .map(|port| {
            let [first, second] = [0, 1].map(|_| router.one(CLIENT_POD, &frames(port))[0].clone());
            assert_eq!(first.0, second.0, "a flow keeps its way");
            // The address of the device that it leaves by, as its pool says.
            let own = match (first.0, family) {
                (UPLINK, _) => NODE[family],
                _ => ["192.168.20.1", "fd00:20::1"][family],
            };
            let source = if family == 0 { 26..30 } else { 22..38 };
            assert_eq!(first.1[source], octets(ip(own)));
            (port, first.0)
        })
        .collect()
}

#[test]
fn all_next_hops_of_a_route_are_used_by_flow_and_weight() {
    for family in 0..2 {
        for (weights, share) in [([1, 1], 500), ([3, 1], 750), ([200, 50], 800)] {
            let hops = [(UPLINK, weights[0]), (SECOND_UPLINK, weights[1])];
            let mut router = Router::between(
                &cluster(),
                &two_ways(family, &hops),
                rules(Vec::new(), true),
                SnatPorts::new(10000..=20000, []).unwrap(),
                4096,
            );
            let ways = ways_of_flows(&mut router, family);
            let first = ways.values().filter(|device| **device == UPLINK).count();
            assert!(first.abs_diff(share) < 60, "{weights:?}: {first}");

            // One goes: only its own flows move.
            let forwarding = Arc::new(Forwarding::compile(&cluster(), &two_ways(family, &hops[..1])).unwrap());
            let next = router.next(rules(Vec::new(), true), forwarding);
            router.published.publish(next);
            let after = ways_of_flows(&mut router, family);
            assert!(after.values().all(|device| *device == UPLINK));
            // It comes back, and so do they.
            let forwarding = Arc::new(Forwarding::compile(&cluster(), &two_ways(family, &hops)).unwrap());
            let next = router.next(rules(Vec::new(), true), forwarding);
            router.published.publish(next);
            assert_eq!(ways_of_flows(&mut router, family), ways);
            router.finish();
        }
    }
}

/// A next hop more takes its share and nothing else: no flow goes from one of the others to another.
#[test]
fn a_next_hop_more_moves_only_what_it_takes() {
    for family in 0..2 {
        let hop = |last: u8| NextHop {
            via: Some(ip(&[format!("192.168.10.{last}"), format!("fd00:10::{last}")][family])),
            device: UPLINK,
            weight: 1,
        };
        let with = |count: u8| {
            between(|links| {
                for last in 10..10 + count {
                    let NextHop { via, .. } = hop(last);
                    let mac = Mac([2, 0, 0, 0, 1, last]);
                    links.neighbors.push(Neighbor { address: via.unwrap(), mac, device: UPLINK });
                }
                let to = ["10.70.0.0/16", "fd00:70::/64"][family].parse().unwrap();
                links.multipaths.push(Multipath { to, hops: (10..10 + count).map(hop).collect(), metric: 0 });
            })
        };
        let taken = |count: u8| -> Vec<u8> {
            let mut router = router(&with(count));
            let far = ip(["10.70.0.9", "fd00:70::9"][family]);
            let ways = (1000..1800).map(|port| {
                router.one(SERVER_POD, &datagram(ip(["10.1.1.20", "fd00:1:1::20"][family]), far, [port, 53]).frame())
            });
            ways.map(|sent| sent[0].1[5]).collect()
        };
        let (four, five) = (taken(4), taken(5));
        let moved = four.iter().zip(&five).filter(|(before, after)| before != after);
        assert!(moved.clone().all(|(_, after)| *after == 14));
        assert!((100..230).contains(&moved.count()));
    }
}
