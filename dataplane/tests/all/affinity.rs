//! ClientIP affinity through the whole pipeline over the memory driver: which packets are remembered.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::packets::{Packet, TCP, UDP, received};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, ip, rules, service};
use weir_dataplane::snapshot::Rules;
use weir_nat::SnatPorts;
use weir_packet::{DropReason, Protocol};

const OUTSIDE: [&str; 2] = ["192.168.10.100", "fd00:10::100"];
const VIP: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const NODE: [&str; 2] = ["192.168.10.1", "fd00:10::1"];
/// Two pods of this node in each family.
const BACKENDS: [[&str; 2]; 2] = [["10.1.1.10", "fd00:1:1::10"], ["10.1.1.20", "fd00:1:1::20"]];
const NODE_PORT: u16 = 30053;
const SECOND: u32 = 100;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// One service on both pods, whose clients are remembered for ten seconds.
fn services(is_open: bool) -> Rules {
    let mut web = service("default/web", Protocol::TCP, VIP, BACKENDS[0], Some(NODE_PORT));
    web.endpoints.extend(service("", Protocol::TCP, VIP, BACKENDS[1], None).endpoints);
    web.affinity = Some(10);
    rules(vec![web], is_open)
}

fn router(is_open: bool) -> Router {
    Router::new(services(is_open), SnatPorts::new(10_000..=20_000, []).unwrap(), 1000)
}

fn segment(flags: u8, family: usize, sport: u16, (dst, dport): (&str, u16)) -> Vec<u8> {
    let mut l4 = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
    l4.extend([0, 0, 0, 9, 0, 0, 0, 10, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    Packet { src: ip(OUTSIDE[family]), dst: ip(dst), protocol: TCP, ttl: 64, tos: 0, options: 0, l4 }.frame()
}

/// The backend that a packet from outside was sent on to.
fn reached(router: &mut Router, frame: &[u8]) -> Option<IpAddr> {
    let sent = router.one(UPLINK, frame);
    let sent = received(&sent);
    assert!(sent.len() <= 1);
    sent.first().map(|(_, bytes)| Packet::read(bytes).dst)
}

fn remembered(router: &Router) -> [usize; 2] {
    let (affinity, now) = (&router.affinity, router.now);
    [affinity.clients::<Ipv4Addr>().count(now), affinity.clients::<Ipv6Addr>().count(now)]
}

#[test]
fn all_connections_of_a_client_come_to_one_backend_until_it_is_gone() {
    for family in [0, 1] {
        let mut router = router(true);
        let frontends = [(VIP[family], 53), (NODE[family], NODE_PORT)];
        let mut seen = BTreeSet::new();
        for sport in 40_000..40_020 {
            let frame = segment(SYN, family, sport, frontends[usize::from(sport % 2)]);
            seen.insert(reached(&mut router, &frame).expect("a backend"));
        }
        assert_eq!(seen.len(), 1, "{seen:?}");
        let first = *seen.first().expect("one");
        // A reload that leaves it in place, then one that takes it away.
        router.publish(services(true));
        router.affinity.forget_gone(&services(true).services);
        assert_eq!(reached(&mut router, &segment(SYN, family, 40_100, frontends[0])), Some(first));
        let other = BACKENDS.into_iter().find(|one| ip(one[family]) != first).expect("the other one");
        let without = || {
            let mut web = service("default/web", Protocol::TCP, VIP, other, Some(NODE_PORT));
            web.affinity = Some(10);
            rules(vec![web], true)
        };
        router.publish(without());
        router.affinity.forget_gone(&without().services);
        assert_eq!(remembered(&router), [0, 0]);
        assert_eq!(reached(&mut router, &segment(SYN, family, 40_101, frontends[1])), Some(ip(other[family])));
        router.finish();
    }
}

#[test]
fn only_what_opens_a_connection_restarts_the_time() {
    for family in [0, 1] {
        let mut router = router(true);
        let expected = |is_remembered: usize| if family == 0 { [is_remembered, 0] } else { [0, is_remembered] };
        // Mid-stream, towards a service: nobody's.
        assert_eq!(reached(&mut router, &segment(ACK, family, 41_000, (VIP[family], 53))), None);
        assert_eq!((remembered(&router), router.drops()[&DropReason::Invalid]), (expected(0), 1));
        reached(&mut router, &segment(SYN, family, 41_001, (VIP[family], 53))).expect("a backend");
        assert_eq!(remembered(&router), expected(1));
        router.wait(9 * SECOND);
        // Neither that again, nor a connection's own packets.
        reached(&mut router, &segment(ACK, family, 41_000, (VIP[family], 53)));
        reached(&mut router, &segment(SYN, family, 41_001, (VIP[family], 53)));
        router.wait(SECOND);
        assert_eq!(remembered(&router), expected(0));
        router.finish();
    }
}

/// As with kube-proxy, where a connection is translated before policy sees it.
#[test]
fn a_connection_that_policy_denies_counts() {
    let mut router = router(false);
    assert_eq!(reached(&mut router, &segment(SYN, 0, 42_000, (VIP[0], 53))), None);
    assert_eq!((remembered(&router), router.drops()[&DropReason::PolicyDeniedIngress]), ([1, 0], 1));
    router.finish();
}

/// A segment from one address and port to another.
fn between(flags: u8, (src, sport): (IpAddr, u16), (dst, dport): (IpAddr, u16), [seq, ack]: [u32; 2]) -> Vec<u8> {
    let mut l4 = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
    l4.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
    l4.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    Packet { src, dst, protocol: TCP, ttl: 64, tos: 0, options: 0, l4 }.frame()
}

/// Many more senders of SYNs than may be remembered, all made up: clients that have finished a handshake stay with their backends, so that the
/// place of nobody real is taken. Without a handshake it is.
#[test]
fn made_up_clients_take_no_place_from_those_that_have_shaken_hands() {
    const CLIENTS: u16 = 40;
    const MADE_UP: u32 = 400_000;
    for shakes_hands in [true, false] {
        let mut router = router(true);
        let frontend = (ip(VIP[0]), 53);
        let client = |number: u16| IpAddr::from([172, 20, 0, number as u8]);
        let open = |router: &mut Router, number: u16, sport: u16| {
            // After the flood the table is full of what is younger, and a SYN may find no place at once.
            let sent = (sport..sport + 200).find_map(|sport| {
                let sent = router.one(UPLINK, &between(SYN, (client(number), sport), frontend, [9, 0]));
                (!sent.is_empty()).then_some(sent)
            });
            let sent = sent.unwrap_or_else(|| panic!("client {number}: {:?}", router.drops()));
            let packet = Packet::read(received(&sent)[0].1);
            let port = |at: usize| u16::from_be_bytes([packet.l4[at], packet.l4[at + 1]]);
            ((packet.src, port(0)), (packet.dst, port(2)))
        };
        let had: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (seen, backend) = open(&mut router, number, 40_000);
                if shakes_hands {
                    let device = if backend.0 == ip(BACKENDS[0][0]) { CLIENT_POD } else { SERVER_POD };
                    assert_eq!(router.one(device, &between(SYN | ACK, backend, seen, [100, 10])).len(), 1);
                    let ack = between(ACK, (client(number), 40_000), frontend, [10, 101]);
                    assert_eq!(router.one(UPLINK, &ack).len(), 1);
                }
                backend.0
            })
            .collect();
        let mut frames = Vec::new();
        for made_up in 0..MADE_UP {
            let source = (IpAddr::from((0xac15_0000 + made_up).to_be_bytes()), 50_000);
            frames.push((UPLINK, between(SYN, source, frontend, [9, 0])));
            if frames.len() == 64 {
                router.turn(&frames);
                frames.clear();
            }
        }
        let has: Vec<_> = (0..CLIENTS).map(|number| open(&mut router, number, 41_000).1.0).collect();
        assert_eq!(has == had, shakes_hands, "{had:?}, now {has:?}");
        router.finish();
    }
}

fn datagram((src, sport): (IpAddr, u16), (dst, dport): (IpAddr, u16)) -> Vec<u8> {
    let l4 = [&sport.to_be_bytes()[..], &dport.to_be_bytes(), &[0, 12, 0, 0, 1, 2, 3, 4]].concat();
    Packet { src, dst, protocol: UDP, ttl: 64, tos: 0, options: 0, l4 }.frame()
}

/// Many more senders of datagrams than may be remembered, all made up, and answered by the backends: clients that came back after an answer, by a second
/// flow or in a stream, stay with theirs. Without that, or if only the backend goes on, they do not.
#[test]
fn made_up_senders_of_datagrams_take_no_place_from_clients_that_came_back() {
    const CLIENTS: u16 = 40;
    const MADE_UP: u32 = 200_000;
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Comes {
        Again,
        InAStream,
        Once,
        OnlyTheBackendDoes,
    }
    for comes in [Comes::Again, Comes::InAStream, Comes::Once, Comes::OnlyTheBackendDoes] {
        let mut dns = service("default/dns", Protocol::UDP, VIP, BACKENDS[0], None);
        dns.endpoints.extend(service("", Protocol::UDP, VIP, BACKENDS[1], None).endpoints);
        dns.affinity = Some(10_000);
        let snat = SnatPorts::new(10_000..=20_000, []).unwrap();
        let mut router = Router::new(rules(vec![dns], true), snat, 1000);
        let frontend = (ip(VIP[0]), 53);
        // The client's address and port, as the backend sees them; the backend.
        let ask = |router: &mut Router, client: (IpAddr, u16)| {
            let sent = router.one(UPLINK, &datagram(client, frontend));
            let packet = Packet::read(received(&sent).first().unwrap_or_else(|| panic!("{:?}", router.drops())).1);
            let port = |at: usize| u16::from_be_bytes([packet.l4[at], packet.l4[at + 1]]);
            ((packet.src, port(0)), (packet.dst, port(2)))
        };
        let answer = |router: &mut Router, (seen, backend): ((IpAddr, u16), (IpAddr, u16))| {
            let device = if backend.0 == ip(BACKENDS[0][0]) { CLIENT_POD } else { SERVER_POD };
            assert_eq!(router.one(device, &datagram(backend, seen)).len(), 1);
        };
        let client = |number: u16, sport: u16| (IpAddr::from([172, 20, 0, number as u8]), sport);
        let had: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let asked = ask(&mut router, client(number, 40_000));
                answer(&mut router, asked);
                asked
            })
            .collect();
        router.wait(3 * SECOND);
        for (number, asked) in (0..CLIENTS).zip(&had) {
            match comes {
                Comes::Again => _ = ask(&mut router, client(number, 40_001)),
                Comes::InAStream => _ = ask(&mut router, client(number, 40_000)),
                Comes::OnlyTheBackendDoes => answer(&mut router, *asked),
                Comes::Once => {}
            }
        }
        let mut frames = Vec::new();
        for made_up in 0..MADE_UP {
            let source = (IpAddr::from((0xac15_0000 + made_up).to_be_bytes()), 50_000);
            frames.push((UPLINK, datagram(source, frontend)));
            if frames.len() == 64 {
                let sent = router.turn(&frames);
                frames.clear();
                // They answer all.
                let back = |(device, bytes): &(_, Vec<u8>)| {
                    let packet = Packet::read(&bytes[14..]);
                    (*device, datagram((packet.dst, 5353), (packet.src, 50_000)))
                };
                router.turn(&sent.iter().map(back).collect::<Vec<_>>());
            }
        }
        // What would be displaced by nobody has no place in the full table.
        router.wait(200 * SECOND);
        let has: Vec<_> = (0..CLIENTS).map(|number| ask(&mut router, client(number, 41_000)).1.0).collect();
        let had: Vec<_> = had.into_iter().map(|(_, backend)| backend.0).collect();
        assert_eq!(has == had, matches!(comes, Comes::Again | Comes::InAStream), "{comes:?}: {had:?}, now {has:?}");
        router.finish();
    }
}
