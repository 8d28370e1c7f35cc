//! A small world, in which sets overlap and packets meet rules: models, their edits and packets for generated tests.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use proptest::{
    prelude::*,
    sample::select,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use weir_packet::Protocol;
use weir_policy::{Selector, model::*};

use crate::oracle::Packet;

pub mod edit;

/// A value of a strategy whose random numbers these bytes seed, for fuzz targets; `None` where it refuses to make one of them.
#[allow(dead_code, reason = "the fuzz targets use it")]
pub fn drawn<S: Strategy>(strategy: S, bytes: &[u8]) -> Option<S::Value> {
    let mut seed = [0; 32];
    seed.iter_mut().zip(bytes).for_each(|(seed, byte)| *seed = *byte);
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(Config { failure_persistence: None, ..Config::default() }, random);
    strategy.new_tree(&mut runner).ok().map(|tree| tree.current())
}

pub fn net() -> impl Strategy<Value = IpNet> {
    let v4 = (0u32..32, select(vec![0u8, 8, 27, 28, 29, 30, 31, 32, 32, 32]))
        .prop_map(|(host, length)| IpNet::new(Ipv4Addr::from(0x0a00_0000 + host).into(), length).unwrap());
    let v6 = (0u128..32, select(vec![0u8, 123, 124, 126, 127, 128, 128]))
        .prop_map(|(host, length)| IpNet::new(Ipv6Addr::from((0xfd << 120) + host).into(), length).unwrap());
    prop_oneof![3 => v4, 1 => v6]
}

fn protocol() -> impl Strategy<Value = Protocol> {
    let all =
        [Protocol::TCP, Protocol::TCP, Protocol::UDP, Protocol::SCTP, Protocol::ICMP, Protocol::ICMPV6, Protocol(47)];
    select(all.to_vec())
}

fn port() -> impl Strategy<Value = u16> {
    select(vec![0u16, 3, 8, 80, 81, 82, 443, 1024, 65535])
}

pub fn port_name() -> impl Strategy<Value = String> {
    select(vec!["http", "dns", "other"]).prop_map(str::to_owned)
}

fn selector() -> impl Strategy<Value = Selector> {
    select(vec![
        "all()",
        "a == 'x'",
        "a != 'x'",
        "a in {'x', 'y'}",
        "a not in {'x'}",
        "has(b)",
        "!has(b)",
        "b starts with 'x' && a == 'y'",
        "a == 'x' || b == 'y'",
        "a == 'nobody'",
    ])
    .prop_map(|text| Selector::parse(text).unwrap())
}

pub fn labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    let value = || proptest::option::of(select(vec!["x", "y", "xy"]));
    (value(), value()).prop_map(|(a, b)| {
        let pairs = [("a", a), ("b", b)];
        pairs.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned()))).collect()
    })
}

pub fn endpoint() -> impl Strategy<Value = Endpoint> {
    let kind = select(vec![
        EndpointKind::Workload,
        EndpointKind::Workload,
        EndpointKind::HostEndpoint,
        EndpointKind::NetworkSet,
    ]);
    let ports = proptest::collection::vec(
        (port_name(), protocol(), port()).prop_map(|(name, protocol, port)| NamedPort { name, protocol, port }),
        0..4,
    );
    let profiles = proptest::collection::vec(select(vec!["open", "odd", "unknown"]).prop_map(str::to_owned), 0..3);
    (kind, any::<bool>(), labels(), proptest::collection::vec(net(), 0..4), ports, profiles).prop_map(
        |(kind, local, labels, nets, ports, profiles)| Endpoint {
            name: String::new(),
            kind,
            local,
            namespace: None,
            labels,
            nets,
            ports,
            profiles,
        },
    )
}

fn port_match() -> impl Strategy<Value = PortMatch> {
    prop_oneof![
        (port(), port()).prop_map(|(low, high)| PortMatch::Range(low, high)),
        port().prop_map(|port| PortMatch::Range(port, port)),
        port_name().prop_map(PortMatch::Named),
    ]
}

fn peer() -> impl Strategy<Value = Peer> {
    prop_oneof![
        selector().prop_map(Peer::Selector),
        (net(), proptest::collection::vec(net(), 0..3)).prop_map(|(cidr, except)| Peer::Block { cidr, except }),
    ]
}

/// Mostly absent, else what `some` gives.
fn rarely<T: std::fmt::Debug + Clone>(weight: f64, some: impl Strategy<Value = T>) -> impl Strategy<Value = Option<T>> {
    proptest::option::weighted(weight, some)
}

fn entity() -> impl Strategy<Value = EntityMatch> {
    use proptest::collection::vec;
    let service = (net(), proptest::option::of((protocol(), port())));
    let service = service.prop_filter("services have ports only where the protocol does", |(_, point)| {
        point.is_none_or(|(protocol, _)| protocol.has_ports())
    });
    (
        rarely(0.2, vec(net(), 0..4)),
        rarely(0.15, vec(net(), 0..3)),
        rarely(0.25, selector()),
        rarely(0.15, selector()),
        rarely(0.25, vec(port_match(), 0..4)),
        rarely(0.15, vec(port_match(), 0..3)),
        rarely(0.25, vec(peer(), 0..4)),
        rarely(0.1, vec(service, 0..4)),
    )
        .prop_map(|(nets, not_nets, selector, not_selector, ports, not_ports, any_of, endpoint_ports)| {
            EntityMatch {
                nets,
                not_nets: not_nets.unwrap_or_default(),
                selector,
                not_selector,
                ports,
                not_ports: not_ports.unwrap_or_default(),
                any_of: any_of.unwrap_or_default(),
                endpoint_ports,
            }
        })
}

pub fn rule() -> impl Strategy<Value = Rule> {
    let action = select(vec![Action::Allow, Action::Allow, Action::Deny, Action::Pass, Action::Log]);
    let icmp = || {
        (select(vec![0u8, 3, 8, 128]), proptest::option::of(select(vec![0u8, 3])))
            .prop_map(|(icmp_type, code)| IcmpMatch { icmp_type, code })
    };
    (
        action,
        rarely(0.1, select(vec![4u8, 6])),
        rarely(0.4, protocol()),
        rarely(0.1, protocol()),
        rarely(0.1, icmp()),
        rarely(0.1, icmp()),
        entity(),
        entity(),
    )
        .prop_map(|(action, ip_version, protocol, not_protocol, icmp, not_icmp, source, destination)| Rule {
            number: 0,
            action,
            ip_version,
            protocol,
            not_protocol,
            icmp,
            not_icmp,
            source,
            destination,
        })
}

/// Up to `most` rules, numbered.
pub fn rules(most: usize) -> impl Strategy<Value = Vec<Rule>> {
    proptest::collection::vec(rule(), 0..=most).prop_map(|mut rules| {
        rules.iter_mut().enumerate().for_each(|(index, rule)| rule.number = index as u32 + 1);
        rules
    })
}

pub fn order() -> impl Strategy<Value = Option<f64>> {
    proptest::option::of(select(vec![-1.5, -0.0, 0.0, 10.0]))
}

pub fn policy(most_rules: usize) -> impl Strategy<Value = Policy> {
    let list = move || proptest::option::weighted(0.8, rules(most_rules));
    let scope = select(vec![
        PolicyScope::Normal,
        PolicyScope::Normal,
        PolicyScope::Normal,
        PolicyScope::ApplyOnForward,
        PolicyScope::PreDnat,
        PolicyScope::Untracked,
    ]);
    (order(), selector(), scope, proptest::bool::weighted(0.1), list(), list()).prop_map(
        |(order, selector, scope, staged, ingress, egress)| Policy {
            order,
            selector,
            scope,
            staged,
            ingress,
            egress,
            ..Policy::default()
        },
    )
}

pub fn tier(most_rules: usize) -> impl Strategy<Value = Tier> {
    let action = select(vec![TierAction::Deny, TierAction::Pass]);
    let policies = proptest::collection::vec(policy(most_rules), 0..4);
    (order(), proptest::bool::weighted(0.1), action, policies).prop_map(
        |(order, undefined, default_action, policies)| {
            let policies = policies.into_iter().map(Arc::new).collect();
            Tier { name: String::new(), order, undefined, default_action, policies }
        },
    )
}

pub fn model(most_rules: usize) -> impl Strategy<Value = Model> {
    let open = Profile { name: "open".to_owned(), ingress: vec![Rule::default()], egress: vec![Rule::default()] };
    let odd = (rules(3), rules(3)).prop_map(|(ingress, egress)| Profile { name: "odd".to_owned(), ingress, egress });
    (proptest::collection::vec(endpoint(), 1..10), proptest::collection::vec(tier(most_rules), 0..4), odd).prop_map(
        move |(mut endpoints, mut tiers, odd)| {
            endpoints[0].local = true;
            endpoints[0].kind = EndpointKind::Workload;
            for (index, endpoint) in endpoints.iter_mut().enumerate() {
                endpoint.name = format!("ns/e{index}");
            }
            for (index, tier) in tiers.iter_mut().enumerate() {
                tier.name = format!("tier{index}");
                for (number, policy) in tier.policies.iter_mut().enumerate() {
                    let policy = Arc::make_mut(policy);
                    policy.sort_name = format!("p{index}.{number}");
                    policy.name = format!("NetworkPolicy/ns/p{index}.{number}");
                }
            }
            let endpoints = endpoints.into_iter().map(Arc::new).collect();
            Model { endpoints, tiers, profiles: vec![Arc::new(open.clone()), Arc::new(odd)] }
        },
    )
}

pub fn packets() -> impl Strategy<Value = Vec<Packet>> {
    let packet = (any::<bool>(), 0u32..34, 0u32..34, protocol(), port(), port()).prop_map(
        |(v6, source, destination, protocol, source_port, destination_port)| {
            let address = |host: u32| -> IpAddr {
                match (v6, host) {
                    // Far outside.
                    (false, 33) => Ipv4Addr::new(203, 0, 113, 1).into(),
                    (true, 33) => Ipv6Addr::UNSPECIFIED.into(),
                    (false, host) => Ipv4Addr::from(0x0a00_0000 + host).into(),
                    (true, host) => Ipv6Addr::from((0xfd << 120) + u128::from(host)).into(),
                }
            };
            let (source, destination) = (address(source), address(destination));
            // Of a message with an identifier the upper byte is the code, which is rarely another than 0.
            let destination_port = match protocol {
                Protocol::ICMP | Protocol::ICMPV6 => destination_port & 0xff | (source_port % 3) << 8,
                _ => destination_port,
            };
            Packet { source, destination, protocol, source_port, destination_port }
        },
    );
    proptest::collection::vec(packet, 40)
}
