//! ICMP errors through the whole pipeline, over the memory driver: whoever's packet is quoted must recognise it.
//!
//! The model of it is dull: every flow really runs, and what left weir is what the error quotes. So the receiver of the error
//! must find in it what it sent, but for the TTL; all checksums are computed from scratch.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::packets::{IPIP, Packet, SCTP, TCP, UDP, received};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, ip, rules, service, tunnelled};
use proptest::{prelude::*, sample::Index};
use weir_conntrack::Entry;
use weir_dataplane::{frame::IfIndex, snapshot::Rules};
use weir_nat::SnatPorts;
use weir_packet::{Address, DropReason, Protocol};

/// Room for connections: enough for every test here.
const MAX_ENTRIES: u32 = 1024;

const CLIENT: [&str; 2] = ["10.1.1.10", "fd00:1:1::10"];
const SERVER: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
const REMOTE: [&str; 2] = ["10.1.2.20", "fd00:1:2::20"];
const NODE: [&str; 2] = ["192.168.10.1", "fd00:10::1"];
const OTHER_NODE: [&str; 2] = ["192.168.10.2", "fd00:10::2"];
const OUTSIDE: [&str; 2] = ["192.168.10.100", "fd00:10::100"];
const LOCAL_VIP: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const REMOTE_VIP: [&str; 2] = ["10.96.0.11", "fd00:96::11"];
/// A router that no table knows.
const SOME_ROUTER: [&str; 2] = ["172.16.5.9", "fd00:77::9"];
const LOCAL_NODE_PORT: u16 = 30053;
const REMOTE_NODE_PORT: u16 = 30054;

fn router() -> Router {
    let snat = SnatPorts::new(10000..=20000, [LOCAL_NODE_PORT, REMOTE_NODE_PORT]).unwrap();
    Router::new(all_rules(true), snat, MAX_ENTRIES)
}

fn all_rules(is_open: bool) -> Rules {
    let mut services = Vec::new();
    for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
        services.push(service(
            &format!("default/local:{protocol}"),
            protocol,
            LOCAL_VIP,
            SERVER,
            Some(LOCAL_NODE_PORT),
        ));
        services.push(service(
            &format!("default/remote:{protocol}"),
            protocol,
            REMOTE_VIP,
            REMOTE,
            Some(REMOTE_NODE_PORT),
        ));
    }
    rules(services, is_open)
}

/// The layer-4 packets of a conversation, without checksums: whose each is (the opener's: true), by the ports that the opener uses.
fn conversation(protocol: u8, ports: (u16, u16), payload_bytes: usize) -> Vec<(bool, Vec<u8>)> {
    let payload: Vec<u8> = (0..payload_bytes).map(|i| (i * 37 + 11) as u8).collect();
    let with_ports = |is_openers: bool| {
        let (from, to) = if is_openers { ports } else { (ports.1, ports.0) };
        [from.to_be_bytes(), to.to_be_bytes()].concat()
    };
    let data = payload_bytes as u32;
    match protocol {
        TCP => [
            (true, 0x02, 1000, 0, 0),
            (false, 0x12, 5000, 1001, 0),
            (true, 0x10, 1001, 5001, 0),
            (true, 0x18, 1001, 5001, payload_bytes),
            (false, 0x18, 5001, 1001 + data, payload_bytes),
        ]
        .map(|(is_openers, flags, seq, ack, length): (bool, u8, u32, u32, usize)| {
            let mut l4 = with_ports(is_openers);
            l4.extend(seq.to_be_bytes());
            l4.extend(ack.to_be_bytes());
            l4.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
            l4.extend(&payload[..length]);
            (is_openers, l4)
        })
        .to_vec(),
        SCTP => {
            // INIT, INIT ACK, COOKIE ECHO, COOKIE ACK, DATA both ways; each end's packets bear the other's tag.
            const OPENERS_TAG: u32 = 0x0a0b_0c0d;
            const OTHERS_TAG: u32 = 0x1a1b_1c1d;
            let init = |tag: u32| [&tag.to_be_bytes()[..], &[0, 1, 0, 0, 0, 4, 0, 4, 0, 0, 0, 9]].concat();
            let chunk_data = [&[0, 0, 0, 9, 0, 1, 0, 0, 0, 0, 0, 0][..], &payload].concat();
            [
                (true, 0, 1, init(OPENERS_TAG)),
                (false, OPENERS_TAG, 2, init(OTHERS_TAG)),
                (true, OTHERS_TAG, 10, vec![7; 16]),
                (false, OPENERS_TAG, 11, vec![]),
                (true, OTHERS_TAG, 0, chunk_data.clone()),
                (false, OPENERS_TAG, 0, chunk_data),
            ]
            .into_iter()
            .map(|(is_openers, tag, chunk, body): (bool, u32, u8, Vec<u8>)| {
                let mut l4 = with_ports(is_openers);
                l4.extend(tag.to_be_bytes());
                l4.extend([0, 0, 0, 0, chunk, if chunk == 0 { 3 } else { 0 }]);
                l4.extend((4 + body.len() as u16).to_be_bytes());
                l4.extend(&body);
                l4.resize(l4.len().next_multiple_of(4), 0);
                (is_openers, l4)
            })
            .collect()
        }
        UDP => [true, false]
            .map(|is_openers| {
                let mut l4 = with_ports(is_openers);
                l4.extend((8 + payload_bytes as u16).to_be_bytes());
                l4.extend([0, 0]);
                l4.extend(&payload);
                (is_openers, l4)
            })
            .to_vec(),
        icmp => {
            let types = if icmp == 1 { [8, 0] } else { [128, 129] };
            [(true, types[0]), (false, types[1])]
                .map(|(is_openers, icmp_type)| {
                    let mut l4 = vec![icmp_type, 0, 0, 0];
                    l4.extend(ports.0.to_be_bytes());
                    l4.extend([0, 1]);
                    l4.extend(&payload);
                    (is_openers, l4)
                })
                .to_vec()
        }
    }
}

/// A flow through the router: where it comes from and whom it asks for.
#[derive(Clone, Copy, Debug)]
struct Way {
    name: &'static str,
    from: IfIndex,
    from_tunnel: bool,
    src: [&'static str; 2],
    dst: [&'static str; 2],
    port: u16,
    /// Whether a packet without ports can take it.
    portless: bool,
}

const fn way(name: &'static str, from: IfIndex, src: [&'static str; 2], dst: [&'static str; 2], port: u16) -> Way {
    Way { name, from, from_tunnel: false, src, dst, port, portless: false }
}

const WAYS: [Way; 13] = [
    Way { portless: true, ..way("plain", CLIENT_POD, CLIENT, SERVER, 80) },
    Way { portless: true, ..way("to another node", CLIENT_POD, CLIENT, REMOTE, 80) },
    Way { portless: true, from_tunnel: true, ..way("from another node", UPLINK, REMOTE, SERVER, 80) },
    way("DNAT", CLIENT_POD, CLIENT, LOCAL_VIP, 53),
    way("DNAT to another node", CLIENT_POD, CLIENT, REMOTE_VIP, 53),
    Way { portless: true, ..way("natOutgoing", CLIENT_POD, CLIENT, OUTSIDE, 80) },
    way("DNAT and SNAT", UPLINK, OUTSIDE, LOCAL_VIP, 53),
    way("DNAT and SNAT to another node", UPLINK, OUTSIDE, REMOTE_VIP, 53),
    way("node port", UPLINK, OUTSIDE, NODE, LOCAL_NODE_PORT),
    way("node port to another node", UPLINK, OUTSIDE, NODE, REMOTE_NODE_PORT),
    way("hairpin", SERVER_POD, SERVER, LOCAL_VIP, 53),
    way("the node's kernel to a service", IfIndex::HOST, NODE, LOCAL_VIP, 53),
    Way { portless: true, ..way("a pod to its node", CLIENT_POD, CLIENT, NODE, 10250) },
];

/// One direction's last packet: as its sender sent it, and as it left weir.
#[derive(Clone, Debug)]
struct Passed {
    sent: Packet,
    left: Packet,
    /// Where it came from, where it went, each with whether by the tunnel.
    from: (IfIndex, bool),
    to: (IfIndex, bool),
}

impl Router {
    /// Sends a packet in by a device, or by the tunnel; what left.
    fn send(&mut self, (device, by_tunnel): (IfIndex, bool), frame: Vec<u8>) -> Vec<(IfIndex, Vec<u8>)> {
        let frame = if by_tunnel && frame[12] == 8 { tunnelled(&frame) } else { frame };
        self.one(device, &frame)
    }

    /// All that the tables say, but for the time.
    fn entries(&self) -> (Vec<Entry<Ipv4Addr>>, Vec<Entry<Ipv6Addr>>) {
        fn all<A: Address>(table: &weir_conntrack::Table<A>, router: &Router) -> Vec<Entry<A>> {
            let mut entries = Vec::new();
            table.for_each(router.now, |entry| entries.push(Entry { remaining_ticks: 0, ..*entry }));
            entries
        }
        (all(&self.tables.v4, self), all(&self.tables.v6, self))
    }
}

/// Runs a conversation; the last packet of each direction: the opener's, and the other's.
fn converse(
    router: &mut Router,
    way: &Way,
    six: bool,
    protocol: u8,
    payload_bytes: usize,
    options: usize,
) -> [Passed; 2] {
    let family = usize::from(six);
    let from = (way.from, way.from_tunnel && !six);
    let mut last: [Option<Passed>; 2] = [None, None];
    for (is_openers, mut l4) in conversation(protocol, (15000, way.port), payload_bytes) {
        let (src, dst, from) = match &last[0] {
            // Whoever answers, answers what came.
            Some(there) if !is_openers => {
                match protocol {
                    TCP | UDP | SCTP => {
                        let ports = [&there.left.l4[2..4], &there.left.l4[..2]].concat();
                        l4[..4].copy_from_slice(&ports);
                    }
                    _ => l4[4..6].copy_from_slice(&there.left.l4[4..6]),
                }
                (there.left.dst, there.left.src, there.to)
            }
            _ => (ip(way.src[family]), ip(way.dst[family]), from),
        };
        let sent = Packet { src, dst, protocol, ttl: 64, tos: 0, options, l4 };
        let outcome = router.send(from, sent.frame());
        let [(to, bytes)] = received(&outcome)[..] else { panic!("{way:?} {sent:?}: {:?}", router.totals()) };
        let sent = Packet { l4: sent.with_checksum(), ..sent };
        last[usize::from(!is_openers)] = Some(Passed { sent, left: Packet::read(bytes), from, to });
    }
    last.map(|passed| passed.expect("both ends speak"))
}

/// Who tells of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Teller {
    /// The one that it was for.
    Receiver,
    /// A router on its way.
    Router,
}

impl Passed {
    /// Who may have told of it, and with which source address.
    fn tellers(&self) -> Vec<(Teller, IpAddr)> {
        let family = usize::from(self.left.src.is_ipv6());
        let mut tellers = vec![(Teller::Receiver, self.left.dst)];
        match self.to {
            (UPLINK, true) => tellers.push((Teller::Router, ip(OTHER_NODE[family]))),
            (UPLINK, false) => tellers.push((Teller::Router, ip(SOME_ROUTER[family]))),
            _ => {}
        }
        tellers
    }

    /// The source that its sender must see in an error about it. A router keeps its own, but towards a backend that knows
    /// the client by a masquerade address everything comes from there (RFC 5508, REQ-5; a tunnel takes no other source either).
    fn source_seen(&self, (teller, address): (Teller, IpAddr), is_reply: bool) -> IpAddr {
        let is_masqueraded = is_reply && self.sent.dst != self.left.dst;
        if teller == Teller::Receiver || is_masqueraded { self.sent.dst } else { address }
    }
}

/// An ICMP error with a quote.
fn error(src: IpAddr, dst: IpAddr, header: [u8; 6], quote: &[u8]) -> Packet {
    let l4 = [&[header[0], header[1], 0, 0], &header[2..], quote].concat();
    let mut packet = Packet { src, dst, protocol: 0, ttl: 64, tos: 0xc0, options: 0, l4 };
    packet.protocol = packet.icmp();
    packet
}

const ERRORS: [&[(u8, u8)]; 2] = [
    &[(3, 0), (3, 1), (3, 3), (3, 4), (3, 13), (4, 0), (11, 0), (11, 1), (12, 0)],
    &[(1, 0), (1, 3), (1, 4), (1, 6), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1)],
];

/// An error, from those that can be.
#[derive(Clone, Debug)]
struct Case {
    six: bool,
    way: Index,
    protocol: Index,
    payload_bytes: usize,
    options: usize,
    about_reply: bool,
    teller: Index,
    kind: Index,
    rest: [u8; 4],
    /// Bytes of layer 4 that are quoted, at most.
    quoted_bytes: usize,
    has_bad_checksum: bool,
}

prop_compose! {
    fn case()(
        six in any::<bool>(),
        way in any::<Index>(),
        protocol in any::<Index>(),
        payload_bytes in 0..600_usize,
        options in 0..3_usize,
        about_reply in any::<bool>(),
        teller in any::<Index>(),
        kind in any::<Index>(),
        rest in any::<[u8; 4]>(),
        quoted_bytes in prop_oneof![0..8_usize, Just(8), 8..30_usize, 8..700_usize, Just(1000)],
        has_bad_checksum in prop::bool::weighted(0.1),
    ) -> Case {
        Case {
            six, way, protocol, payload_bytes, options, about_reply, teller, kind, rest, quoted_bytes, has_bad_checksum,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6000))]

    #[test]
    fn whoever_is_told_finds_the_packet_that_it_sent(case in case()) {
        let mut router = router();
        let family = usize::from(case.six);
        let way = case.way.get(&WAYS);
        let icmp = if case.six { 58 } else { 1 };
        let protocols = [TCP, UDP, SCTP, icmp];
        let protocol = *case.protocol.get(&protocols[..if way.portless { 4 } else { 3 }]);
        let passed = converse(&mut router, way, case.six, protocol, case.payload_bytes, case.options);
        let passed = &passed[usize::from(case.about_reply)];

        // A while later, so that a refreshed connection is seen.
        router.wait(100);
        let (before, totals) = (router.entries(), router.totals());
        let quoted = passed.left.bytes();
        let header_bytes = quoted.len() - passed.left.l4.len();
        let is_whole_enough = case.quoted_bytes.min(passed.left.l4.len()) >= 8;
        let quote = &quoted[..quoted.len().min(header_bytes + case.quoted_bytes)];
        let (icmp_type, code) = *case.kind.get(ERRORS[family]);
        let [a, b, c, d] = case.rest;
        let header = [icmp_type, code, a, b, c, d];
        let teller = *case.teller.get(&passed.tellers());
        let message = error(teller.1, passed.left.src, header, quote);
        let mut frame = message.frame();
        let checksum_at = frame.len() - message.l4.len() + 2;
        if case.has_bad_checksum {
            frame[checksum_at] ^= 0x55;
        }
        let as_it_came = frame[frame.len() - message.bytes().len()..].to_vec();
        let outcome = router.send(passed.to, frame);
        let outcome = received(&outcome);

        let is_for_node = passed.to.0 == UPLINK && passed.left.src == ip(NODE[family]);
        if !is_whole_enough && is_for_node {
            // Perhaps the kernel can make something of it.
            prop_assert_eq!(outcome, [((IfIndex::HOST, false), &as_it_came[..])]);
        } else if !is_whole_enough {
            prop_assert_eq!(outcome, []);
            prop_assert_eq!(router.drops(), BTreeMap::from([(DropReason::UnrelatedIcmpError, 1)]));
        } else {
            let [(to, bytes)] = outcome[..] else { panic!("{way:?} {teller:?}: {:?}", router.totals()) };
            prop_assert_eq!(to, passed.from, "{:?}", way);
            let mut as_sent = Packet { ttl: passed.left.ttl, ..passed.sent.clone() }.bytes();
            let checksum = passed.left.checksum_place();
            let checksum = header_bytes + checksum.start..header_bytes + checksum.end;
            if checksum.contains(&quote.len()) {
                // A part of a checksum, which nobody can use, stays as it is.
                as_sent[checksum.start..quote.len()].copy_from_slice(&quote[checksum.start..]);
            }
            let source = passed.source_seen(teller, case.about_reply);
            let mut expected = error(source, passed.sent.src, header, &as_sent[..quote.len()]);
            expected.ttl = if [to.0, passed.to.0].contains(&IfIndex::HOST) { 64 } else { 63 };
            let expected = expected.bytes();
            if case.has_bad_checksum {
                let mut bytes = bytes.to_vec();
                let at = bytes.len() - message.l4.len() + 2;
                prop_assert_ne!(&bytes[at..at + 2], &expected[at..at + 2], "a bad checksum was repaired");
                bytes[at..at + 2].copy_from_slice(&expected[at..at + 2]);
                prop_assert_eq!(bytes, expected);
            } else {
                prop_assert_eq!(bytes, expected, "{:?}", way);
            }
        }
        prop_assert_eq!(router.entries(), before, "an error changes no connection");
        let after = router.totals();
        prop_assert_eq!((after.generated, after.opened), (totals.generated, totals.opened));
        router.finish();
    }
}

/// The way with that name.
fn named(name: &str) -> Way {
    *WAYS.iter().find(|way| way.name == name).expect("a way with that name")
}

/// Port (IPv4: host) unreachable.
fn unreachable(six: bool) -> [u8; 6] {
    [if six { 1 } else { 3 }, if six { 4 } else { 3 }, 0, 0, 0, 0]
}

/// What makes a quote another packet's.
type Change = fn(&mut Packet);

#[test]
fn an_error_about_no_packet_that_passed_is_dropped_or_the_nodes_own() {
    for six in [false, true] {
        let family = usize::from(six);
        // About what went to a pod, and about what went out of the cluster from the node's own address.
        for (name, is_for_node) in [("DNAT", false), ("natOutgoing", true)] {
            let changes: [(&str, Change); 4] = [
                ("another source port", |quoted| quoted.l4[1] ^= 1),
                ("another destination port", |quoted| quoted.l4[3] ^= 1),
                ("another protocol", |quoted| quoted.protocol = if quoted.protocol == UDP { TCP } else { UDP }),
                ("another destination", |quoted| quoted.dst = ip(SOME_ROUTER[usize::from(quoted.src.is_ipv6())])),
            ];
            for (what, change) in changes {
                let mut router = router();
                let [there, _] = converse(&mut router, &named(name), six, UDP, 30, 0);
                let mut quoted = there.left.clone();
                change(&mut quoted);
                let message = error(there.left.dst, there.left.src, unreachable(six), &quoted.bytes());
                let outcome = router.send(there.to, message.frame());
                let punted = outcome.iter().filter(|(device, _)| *device == IfIndex::HOST).count();
                assert_eq!((outcome.len(), punted), if is_for_node { (1, 1) } else { (0, 0) }, "{name}: {what}");
                let drops = if is_for_node { vec![] } else { vec![(DropReason::UnrelatedIcmpError, 1)] };
                assert_eq!(router.finish().drops, drops, "{name}: {what}");
            }
        }

        // The packet passed, but the error goes to somebody else, or comes from a pod that did not get it.
        for (from, source, destination) in [
            (SERVER_POD, SERVER[family], REMOTE[family]),
            (CLIENT_POD, CLIENT[family], CLIENT[family]),
            (UPLINK, OUTSIDE[family], SERVER[family]),
        ] {
            let mut router = router();
            let [there, _] = converse(&mut router, &named("DNAT"), six, UDP, 30, 0);
            let message = error(ip(source), ip(destination), unreachable(six), &there.left.bytes());
            assert_eq!(router.send((from, false), message.frame()), []);
            assert_eq!(router.finish().drops, [(DropReason::UnrelatedIcmpError, 1)], "{source} to {destination}");
        }

        // The connection is over: 120 seconds of silence (net.netfilter.nf_conntrack_udp_timeout_stream) and more.
        let mut router = router();
        let [there, _] = converse(&mut router, &named("DNAT"), six, UDP, 30, 0);
        router.wait(13_000);
        let message = error(there.left.dst, there.left.src, unreachable(six), &there.left.bytes());
        assert_eq!(router.send(there.to, message.frame()), []);
        assert_eq!(router.finish().drops, [(DropReason::UnrelatedIcmpError, 1)]);
    }
}

#[test]
fn a_redirect_ends_here_and_one_for_the_node_is_its_kernels() {
    let redirect = [5, 1, 192, 168, 10, 254];
    for (name, from_router, is_for_node) in
        [("plain", false, false), ("to another node", false, false), ("natOutgoing", true, true)]
    {
        let mut router = router();
        let [there, _] = converse(&mut router, &named(name), false, UDP, 30, 0);
        let source = if from_router { ip("192.168.10.254") } else { there.left.dst };
        let message = error(source, there.left.src, redirect, &there.left.bytes());
        let (as_it_came, outcome) = (message.bytes(), router.send(there.to, message.frame()));
        assert_eq!(
            received(&outcome),
            if is_for_node { vec![((IfIndex::HOST, false), &as_it_came[..])] } else { vec![] }
        );
        assert_eq!(router.finish().drops, if is_for_node { vec![] } else { vec![(DropReason::LinkScope, 1)] });
    }
}

#[test]
fn an_error_about_an_error_is_never_made() {
    for six in [false, true] {
        // At its last hop; longer than the tunnel; to nobody.
        let mut router = router();
        let [there, back] = converse(&mut router, &named("DNAT to another node"), six, UDP, 600, 0);
        let mut last_hop = error(there.left.dst, there.left.src, unreachable(six), &there.left.bytes());
        last_hop.ttl = 1;
        assert_eq!(router.send(there.to, last_hop.frame()), []);
        let mut drops = vec![(DropReason::TtlExpired, 1)];
        let mut long = error(back.left.dst, back.left.src, unreachable(six), &back.left.bytes());
        long.l4.resize(1490 - if six { 40 } else { 20 }, 0);
        let outcome = router.send(back.to, long.frame());
        if six {
            assert_eq!(received(&outcome)[0].0, (UPLINK, false), "there is no tunnel for IPv6");
        } else {
            assert_eq!(outcome, []);
            drops.push((DropReason::TooBig, 1));
        }
        // About these errors, from who got them.
        for (quoted, from, source) in [(&last_hop, back.to, back.left.dst), (&long, there.to, there.left.dst)] {
            let about = error(source, quoted.src, unreachable(six), &quoted.bytes());
            assert_eq!(router.send(from, about.frame()), []);
        }
        drops.insert(0, (DropReason::UnrelatedIcmpError, 2));
        let totals = router.finish();
        assert_eq!(totals.drops, drops);
        assert_eq!(totals.generated, 0);
    }
}

#[test]
fn the_kernels_errors_reach_other_nodes_pods_and_outside_as_its_answers_do() {
    for six in [false, true] {
        let family = usize::from(six);
        let mut router = router();
        // A pod of another node asked the kernel directly: weir saw nothing of it.
        let l4 = conversation(UDP, (15000, 123), 30).remove(0).1;
        let asked =
            Packet { src: ip(REMOTE[family]), dst: ip(NODE[family]), protocol: UDP, ttl: 63, tos: 0, options: 0, l4 };
        let message = error(ip(NODE[family]), ip(REMOTE[family]), unreachable(six), &asked.bytes());
        let outcome = router.send((IfIndex::HOST, false), message.frame());
        let forwarded = message.clone();
        assert_eq!(received(&outcome), [((UPLINK, !six), &forwarded.bytes()[..])]);
        // Outside too, whatever address of its own it has: an error about nothing known is never translated.
        let own = ip(["10.1.1.99", "fd00:1:1::99"][family]);
        let message = error(own, ip(OUTSIDE[family]), unreachable(six), &asked.bytes());
        let outcome = router.send((IfIndex::HOST, false), message.frame());
        let forwarded = message.clone();
        assert_eq!(received(&outcome), [((UPLINK, false), &forwarded.bytes()[..])]);
        // But not this node's pods, of which it sees everything.
        let message = error(ip(NODE[family]), ip(SERVER[family]), unreachable(six), &asked.bytes());
        assert_eq!(router.send((IfIndex::HOST, false), message.frame()), []);
        assert_eq!(router.finish().drops, [(DropReason::UnrelatedIcmpError, 1)]);
    }
}

#[test]
fn a_policy_that_cuts_the_connection_cuts_errors_about_it() {
    for six in [false, true] {
        let mut router = router();
        let [there, _] = converse(&mut router, &named("DNAT"), six, UDP, 30, 0);
        router.publish(all_rules(false));
        let before = router.entries();
        let message = error(there.left.dst, there.left.src, unreachable(six), &there.left.bytes());
        assert_eq!(router.send(there.to, message.frame()), []);
        assert_eq!(router.entries(), before);
        assert_eq!(router.finish().drops, [(DropReason::PolicyDeniedIngress, 1)]);
    }
}

#[test]
fn an_error_about_a_tunnel_packet_is_told_to_who_sent_what_it_carried() {
    // Fragmentation needed, with the MTU of the path and without; anything else makes the tunnel's end unreachable (RFC 2003, 4).
    let rows: [([u8; 6], Option<[u8; 6]>); 7] = [
        ([3, 4, 0, 0, 5, 120], Some([3, 4, 0, 0, 5, 100])),
        ([3, 4, 0, 0, 0, 0], Some([3, 4, 0, 0, 0, 0])),
        ([3, 4, 0, 0, 0, 87], None),
        ([3, 0, 0, 0, 0, 0], Some([3, 1, 0, 0, 0, 0])),
        ([11, 0, 0, 0, 0, 0], Some([3, 1, 0, 0, 0, 0])),
        ([11, 1, 0, 0, 0, 0], None),
        ([12, 0, 3, 0, 0, 0], None),
    ];
    let mut told = 0;
    for name in ["to another node", "DNAT to another node", "DNAT and SNAT to another node", "from another node"] {
        for (header, expected) in rows {
            // Not enough of the inner packet; just enough; all of it, and the largest quote.
            for quoted_bytes in [47, 48, 1000] {
                let mut router = router();
                let passed = converse(&mut router, &named(name), false, TCP, 400, 0);
                let passed = passed.iter().find(|passed| passed.to == (UPLINK, true)).expect("one into the tunnel");
                router.wait(100);
                let before = router.entries();
                let inner = passed.left.bytes();
                let [node, other] = [NODE[0], OTHER_NODE[0]].map(ip);
                let tunnel =
                    Packet { src: node, dst: other, protocol: IPIP, ttl: 60, tos: 0, options: 0, l4: inner.clone() };
                let quote = &tunnel.bytes()[..quoted_bytes.min(20 + inner.len())];
                let message = error(ip(SOME_ROUTER[0]), node, header, quote);
                let (as_it_came, outcome) = (message.bytes(), router.send((UPLINK, false), message.frame()));
                let outcome = received(&outcome);
                if let Some(header) = expected.filter(|_| quoted_bytes >= 48) {
                    let as_sent = Packet { ttl: passed.left.ttl, ..passed.sent.clone() }.bytes();
                    let mut message = error(ip(SOME_ROUTER[0]), passed.sent.src, header, &as_sent[..quote.len() - 20]);
                    message.ttl = 63;
                    assert_eq!(outcome, [(passed.from, &message.bytes()[..])], "{name}: {header:?}");
                    told += 1;
                } else {
                    assert_eq!(outcome, [((IfIndex::HOST, false), &as_it_came[..])], "{name}: {header:?}");
                }
                assert_eq!(router.entries(), before);
                assert_eq!(router.finish().dropped(), 0);
            }
        }
    }
    assert_eq!(told, 4 * 4 * 2);
}

#[test]
fn nobody_else_is_told_about_tunnel_packets() {
    let [node, other, outside] = [NODE[0], OTHER_NODE[0], OUTSIDE[0]].map(ip);
    // Not this node's, not to a node, with a bad checksum: the kernel's. About no flow: dropped.
    for (what, quoted_src, quoted_dst, is_bad, port_change, punted) in [
        ("another sender", outside, other, false, 0, 1),
        ("no node", node, outside, false, 0, 1),
        ("itself", node, node, false, 0, 1),
        ("a bad checksum", node, other, true, 0, 1),
        ("no flow", node, other, false, 1, 0),
    ] {
        let mut router = router();
        let [there, _] = converse(&mut router, &named("DNAT to another node"), false, TCP, 400, 0);
        let mut inner = there.left.clone();
        inner.l4[1] ^= port_change;
        let tunnel =
            Packet { src: quoted_src, dst: quoted_dst, protocol: IPIP, ttl: 60, tos: 0, options: 0, l4: inner.bytes() };
        let mut frame = error(ip(SOME_ROUTER[0]), node, [3, 4, 0, 0, 5, 120], &tunnel.bytes()).frame();
        frame[36] ^= u8::from(is_bad);
        let outcome = router.send((UPLINK, false), frame.clone());
        let to_kernel: Vec<&[u8]> = received(&outcome)
            .into_iter()
            .map(|(to, bytes)| {
                assert_eq!(to, (IfIndex::HOST, false), "{what}");
                bytes
            })
            .collect();
        assert_eq!(to_kernel, vec![&frame[14..]; punted], "{what}");
        let dropped = if punted == 0 { vec![(DropReason::UnrelatedIcmpError, 1)] } else { vec![] };
        assert_eq!(router.finish().drops, dropped, "{what}");
    }
}
