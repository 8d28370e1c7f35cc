//! Rules that log: an entry for each new connection that meets them, and no more of them than the control thread can take.

use std::sync::Arc;

use crate::packets::{Packet, UDP};
use crate::router::{CLIENT_POD, Router, SERVER_POD, ip, service, tiered};
use weir_dataplane::snapshot::Rules;
use weir_nat::SnatPorts;
use weir_packet::Protocol;
use weir_policy::{
    Selector,
    model::{Action, EntityMatch, Policy, PortMatch, Rule, Tier},
};

const CLIENT: &str = "10.1.1.10";
const SERVER: &str = "10.1.1.20";
const VIP: &str = "10.96.0.10";

/// Every pod has egress rules: Log, Allow; and ingress rules: Log what comes to 5353, Deny what comes to 5354, Log, Allow.
fn rules() -> Rules {
    let rule = |action, port: Option<u16>| {
        let ports = port.map(|port| vec![PortMatch::Range(port, port)]);
        let protocol = port.map(|_| Protocol::UDP);
        Rule { action, protocol, destination: EntityMatch { ports, ..EntityMatch::default() }, ..Rule::default() }
    };
    let numbered =
        |rules: Vec<Rule>| rules.into_iter().zip(1..).map(|(rule, number)| Rule { number, ..rule }).collect();
    let ingress = vec![
        rule(Action::Log, Some(5353)),
        rule(Action::Deny, Some(5354)),
        rule(Action::Log, None),
        rule(Action::Allow, None),
    ];
    let egress = vec![rule(Action::Log, None), rule(Action::Allow, None)];
    let policy = Policy {
        name: "p".into(),
        selector: Selector::All,
        ingress: Some(numbered(ingress)),
        egress: Some(numbered(egress)),
        ..Policy::default()
    };
    let tier = Tier { name: "default".into(), policies: vec![Arc::new(policy)], ..Tier::default() };
    let dns = service("default/dns", Protocol::UDP, [VIP, "fd00:96::10"], [SERVER, "fd00:1:1::20"], None);
    tiered(vec![dns], vec![tier], true).counting(1)
}

fn router() -> Router {
    Router::new(rules(), SnatPorts::new(10_000..=20_000, []).unwrap(), 1024)
}

fn udp([src, dst]: [&str; 2], [from, to]: [u16; 2]) -> Vec<u8> {
    let l4 = [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 12, 0, 0, 1, 2, 3, 4]].concat();
    Packet { src: ip(src), dst: ip(dst), protocol: UDP, ttl: 64, tos: 0, options: 0, l4 }.frame()
}

/// What was logged since the last look, in words.
fn told(router: &Router) -> Vec<String> {
    let word = |one: &weir_dataplane::action_log::Logged| {
        let (entry, policy) = (one.entry, &one.rules.policy);
        let verdict = if entry.judgement.expect("a pod's policy decides").allow { "allow" } else { "deny" };
        let ends = format!("{} {}:{}", entry.source, entry.destination, entry.ports.destination());
        let (name, direction) = (policy.endpoint_name(entry.endpoint), entry.direction.name());
        format!("{name} {direction} {}: {verdict} {ends}", policy.rule_name(entry.rule))
    };
    router.logged().iter().map(word).collect()
}

#[test]
fn a_new_connection_is_told_once_for_each_log_rule_before_what_decides() {
    let mut router = router();
    // Policy sees the backend.
    let opened = [
        "default/client egress p rule 1: allow 10.1.1.10 10.1.1.20:5353",
        "default/server ingress p rule 1: allow 10.1.1.10 10.1.1.20:5353",
        "default/server ingress p rule 3: allow 10.1.1.10 10.1.1.20:5353",
    ];
    router.one(CLIENT_POD, &udp([CLIENT, VIP], [1000, 53]));
    assert_eq!(told(&router), opened);
    router.one(CLIENT_POD, &udp([CLIENT, VIP], [1000, 53]));
    router.one(SERVER_POD, &udp([SERVER, CLIENT], [5353, 1000]));
    assert!(told(&router).is_empty(), "no new connection");
    // What is denied is told with its verdict; the Log rule behind is not reached.
    router.one(CLIENT_POD, &udp([CLIENT, SERVER], [1000, 5354]));
    assert_eq!(told(&router), ["default/client egress p rule 1: allow 10.1.1.10 10.1.1.20:5354"]);
    router.finish();
}

#[test]
fn what_is_too_much_is_counted_and_the_next_entry_says_how_much() {
    let mut router = router();
    let mut told = 0;
    // Each has two entries, at both ends; all come in one moment.
    for port in 1000..1075 {
        router.one(CLIENT_POD, &udp([CLIENT, SERVER], [port, 7]));
        let logged = router.logged();
        assert!(logged.iter().all(|one| one.suppressed == 0));
        told += logged.len();
    }
    assert_eq!((told, router.totals().opened), (100, 75), "connections do not suffer");
    router.wait(2);
    router.one(CLIENT_POD, &udp([CLIENT, SERVER], [2000, 7]));
    let suppressed: Vec<u32> = router.logged().iter().map(|one| one.suppressed).collect();
    assert_eq!(suppressed, [50, 0]);
    // The test's channel has room for 64.
    router.wait(1000);
    for port in 3000..3040 {
        router.one(CLIENT_POD, &udp([CLIENT, SERVER], [port, 7]));
    }
    assert_eq!(router.logged().len(), 64);
    router.wait(1000);
    router.one(CLIENT_POD, &udp([CLIENT, SERVER], [4000, 7]));
    assert_eq!(router.logged()[0].suppressed, 16);
    router.finish();
}
