//! Hits per policy rule: the first packet of a connection counts, once for each end's rule that decided; reloads and workers add up.

use crate::packets;
use crate::router;
use std::{collections::BTreeMap, sync::Arc};

use crate::packets::{Packet, TCP, UDP};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, ip, tiered, tunnelled};
use weir_dataplane::{hits::Hits, snapshot::Rules};
use weir_nat::SnatPorts;
use weir_packet::Protocol;
use weir_policy::{
    Selector,
    model::{EntityMatch, Policy, PortMatch, Rule, Tier},
};

const CLIENT: &str = "10.1.1.10";
const SERVER: &str = "10.1.1.20";
const REMOTE: &str = "10.1.2.20";
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;

fn web() -> Rule {
    let destination = EntityMatch { ports: Some(vec![PortMatch::Range(80, 80)]), ..EntityMatch::default() };
    Rule { protocol: Some(Protocol::TCP), destination, ..Rule::default() }
}

fn dns() -> Rule {
    Rule { protocol: Some(Protocol::UDP), ..Rule::default() }
}

/// The tier "default" with a policy that isolates every pod and lets in what these rules allow.
fn rules(allowed: Vec<Rule>) -> Rules {
    let numbered = allowed.into_iter().zip(1..).map(|(rule, number)| Rule { number, ..rule });
    let policy =
        Policy { name: "p".into(), selector: Selector::All, ingress: Some(numbered.collect()), ..Policy::default() };
    let tier = Tier { name: "default".into(), policies: vec![Arc::new(policy)], ..Tier::default() };
    tiered(Vec::new(), vec![tier], true).counting(2)
}

fn router(rules: Rules) -> Router {
    Router::new(rules, SnatPorts::new(10_000..=20_000, []).unwrap(), 64)
}

fn tcp([src, dst]: [&str; 2], [from, to]: [u16; 2], flags: u8, [seq, ack]: [u32; 2]) -> Vec<u8> {
    let mut l4 = [from.to_be_bytes(), to.to_be_bytes()].concat();
    l4.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
    l4.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    Packet { src: ip(src), dst: ip(dst), protocol: TCP, ttl: 64, tos: 0, options: 0, l4 }.frame()
}

fn udp([src, dst]: [&str; 2], [from, to]: [u16; 2]) -> Vec<u8> {
    let l4 = [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 12, 0, 0, 1, 2, 3, 4]].concat();
    Packet { src: ip(src), dst: ip(dst), protocol: UDP, ttl: 64, tos: 0, options: 0, l4 }.frame()
}

/// By the names that rules have in `rules`.
fn named(hits: &Hits, rules: &Rules) -> BTreeMap<String, u64> {
    let hits = hits.by_rule();
    let origins = rules.policy.rules().map(|rule| rules.policy.describe(rule));
    origins.filter_map(|origin| Some((origin.to_string(), *hits.get(&origin.identity())?))).collect()
}

fn expect(counts: &[(&str, u64)]) -> BTreeMap<String, u64> {
    counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

#[test]
fn a_connection_counts_once_for_each_rule_that_decided() {
    let mut router = router(rules(vec![web(), dns()]));
    let hits = Hits::new(router.rules());
    let (there, back) = ([CLIENT, SERVER], [SERVER, CLIENT]);
    for port in [1000, 1001] {
        router.one(CLIENT_POD, &tcp(there, [port, 80], SYN, [1, 0]));
        router.one(SERVER_POD, &tcp(back, [80, port], SYN_ACK, [7, 2]));
        for _ in 0..3 {
            router.one(CLIENT_POD, &tcp(there, [port, 80], ACK, [2, 8]));
        }
    }
    // All of one burst: the first opens, the others find it.
    let burst = udp(there, [1000, 53]);
    router.turn(&[(CLIENT_POD, burst.clone()), (CLIENT_POD, burst.clone()), (CLIENT_POD, burst)]);
    router.one(SERVER_POD, &udp(back, [53, 1000]));
    // A denied connection is none: each of its packets is judged, and counts.
    for _ in 0..3 {
        router.one(CLIENT_POD, &tcp(there, [1000, 443], SYN, [1, 0]));
    }
    // From another node: its source's egress is judged there.
    router.one(UPLINK, &tunnelled(&udp([REMOTE, SERVER], [1000, 53])));
    // What opens nothing, whoever would allow it.
    router.one(CLIENT_POD, &tcp(there, [1002, 80], RST, [1, 0]));
    // To itself: nobody judges.
    router.one(CLIENT_POD, &udp([CLIENT, CLIENT], [1000, 53]));
    let expected = [("p rule 1", 2), ("p rule 2", 2), ("default-deny p", 3), ("profile all", 2 + 1 + 3)];
    assert_eq!(named(&hits, &router.rules()), expect(&expected));
}

#[test]
fn hits_survive_reloads_and_workers_add_up() {
    let mut router = router(rules(vec![web(), dns()]));
    let mut hits = Hits::new(router.rules());
    let ping = |router: &mut Router, port| drop(router.one(CLIENT_POD, &udp([CLIENT, SERVER], [port, 53])));
    ping(&mut router, 1);
    router.change_worker();
    ping(&mut router, 2);
    assert_eq!(named(&hits, &router.rules()), expect(&[("p rule 2", 2), ("profile all", 2)]));

    // Another rule comes first now; the worker may still be judging by the old rules.
    router.publish(rules(vec![dns(), web()]));
    hits.follow(&router.rules());
    ping(&mut router, 3);
    let added_up = expect(&[("p rule 1", 3), ("profile all", 3)]);
    assert_eq!(named(&hits, &router.rules()), added_up);
    // Now it is not.
    router.collect();
    hits.follow(&router.rules());
    assert_eq!(named(&hits, &router.rules()), added_up);

    // A changed rule begins anew, also where it has an old one's number; what is not changed goes on.
    let narrower = Rule { ip_version: Some(4), ..dns() };
    router.publish(rules(vec![narrower]));
    hits.follow(&router.rules());
    ping(&mut router, 4);
    assert_eq!(named(&hits, &router.rules()), expect(&[("p rule 1", 1), ("profile all", 4)]));
}

#[test]
fn rules_that_are_gone_are_forgotten_in_the_end() {
    let mut router = router(rules(vec![dns()]));
    let mut hits = Hits::new(router.rules());
    let of_port = |port| {
        let destination = EntityMatch { ports: Some(vec![PortMatch::Range(port, port)]), ..EntityMatch::default() };
        Rule { protocol: Some(Protocol::UDP), destination, ..Rule::default() }
    };
    for port in 1..=2000 {
        router.publish(rules(vec![of_port(port)]));
        router.collect();
        hits.follow(&router.rules());
        router.one(CLIENT_POD, &udp([CLIENT, SERVER], [1, port]));
        router.wait(20_000);
    }
    assert_eq!(named(&hits, &router.rules()), expect(&[("p rule 1", 1), ("profile all", 2000)]));
    assert!(hits.by_rule().len() < 1030, "{}", hits.by_rule().len());
}

#[test]
fn backends_count_the_connections_that_they_get() {
    let vips = ["10.96.0.10", "fd00:96::10"];
    let backends = [["10.1.1.10", "fd00:1:1::10"], ["10.1.1.20", "fd00:1:1::20"]];
    let with = |backends: &[[&'static str; 2]]| {
        let mut dns = router::service("default/dns", Protocol::UDP, vips, backends[0], None);
        for more in &backends[1..] {
            dns.endpoints.extend(router::service("", Protocol::UDP, vips, *more, None).endpoints);
        }
        tiered(vec![dns], Vec::new(), true).counting(2)
    };
    let counts = |hits: &Hits| -> BTreeMap<String, u64> {
        hits.by_backend().into_iter().map(|(backend, count)| (backend.address.to_string(), count)).collect()
    };
    let mut router = router(with(&backends));
    let mut hits = Hits::new(router.rules());
    let mut expected: BTreeMap<String, u64> = BTreeMap::new();
    let mut ask = |router: &mut Router, port: u16, family: usize| {
        let from = [["192.168.10.100", "fd00:10::100"][family], vips[family]];
        let sent = router.one(UPLINK, &udp(from, [port, 53]));
        let sent = packets::received(&sent);
        *expected.entry(Packet::read(sent[0].1).dst.to_string()).or_default() += 1;
        // A further packet of the same flow is no connection.
        router.one(UPLINK, &udp(from, [port, 53]));
        expected.clone()
    };
    for port in 1000..1020 {
        let expected = ask(&mut router, port, usize::from(port % 3 == 0));
        assert_eq!(counts(&hits), expected);
    }
    router.change_worker();
    // The first backend goes: the other keeps its count, wherever it stands in the table now. Then it comes back.
    for (port, backends) in [(2000, &backends[1..]), (2001, &backends[..])] {
        router.publish(with(backends));
        router.collect();
        hits.follow(&router.rules());
        for family in [0, 1] {
            let expected = ask(&mut router, port, family);
            assert_eq!(counts(&hits), expected);
        }
    }
    assert_eq!(counts(&hits).len(), 4, "both backends in both families had some");
}
