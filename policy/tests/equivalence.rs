//! The classifier against the linear evaluator, over generated models, endpoints and packets.

mod oracle;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use oracle::Packet;
use proptest::{prelude::*, sample::select};
use weir_packet::{FlowKey, Ports, Protocol};
use weir_policy::{Classifier, Compiler, Judgement, PolicyDirection, Selector, model::*};

// A small world, in which sets overlap and packets meet rules.

fn net() -> impl Strategy<Value = IpNet> {
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

fn port_name() -> impl Strategy<Value = String> {
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

fn labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    let value = || proptest::option::of(select(vec!["x", "y", "xy"]));
    (value(), value()).prop_map(|(a, b)| {
        let pairs = [("a", a), ("b", b)];
        pairs.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned()))).collect()
    })
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
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

fn rule() -> impl Strategy<Value = Rule> {
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
fn rules(most: usize) -> impl Strategy<Value = Vec<Rule>> {
    proptest::collection::vec(rule(), 0..=most).prop_map(|mut rules| {
        rules.iter_mut().enumerate().for_each(|(index, rule)| rule.number = index as u32 + 1);
        rules
    })
}

fn order() -> impl Strategy<Value = Option<f64>> {
    proptest::option::of(select(vec![-1.5, -0.0, 0.0, 10.0]))
}

fn policy(most_rules: usize) -> impl Strategy<Value = Policy> {
    let list = move || proptest::option::weighted(0.8, rules(most_rules));
    (order(), selector(), proptest::bool::weighted(0.1), list(), list()).prop_map(
        |(order, selector, staged, ingress, egress)| Policy {
            order,
            selector,
            staged,
            ingress,
            egress,
            ..Policy::default()
        },
    )
}

fn tier(most_rules: usize) -> impl Strategy<Value = Tier> {
    let action = select(vec![TierAction::Deny, TierAction::Pass]);
    (order(), action, proptest::collection::vec(policy(most_rules), 0..4)).prop_map(
        |(order, default_action, policies)| {
            let policies = policies.into_iter().map(Arc::new).collect();
            Tier { name: String::new(), order, undefined: false, default_action, policies }
        },
    )
}

fn model(most_rules: usize) -> impl Strategy<Value = Model> {
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

fn packets() -> impl Strategy<Value = Vec<Packet>> {
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
            Packet { source, destination, protocol, source_port, destination_port }
        },
    );
    proptest::collection::vec(packet, 40)
}

fn classify(classifier: &Classifier, endpoint: &str, direction: PolicyDirection, packet: &Packet) -> Judgement {
    let endpoint = classifier.endpoint(endpoint).expect("a local workload");
    let ports = Ports::new(packet.source_port, packet.destination_port);
    let protocol = packet.protocol;
    match (packet.source, packet.destination) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            classifier.judge(endpoint, direction, &FlowKey { src, dst, ports, protocol })
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            classifier.judge(endpoint, direction, &FlowKey { src, dst, ports, protocol })
        }
        _ => unreachable!("both ends are of one family"),
    }
}

fn locals(model: &Model) -> impl Iterator<Item = &Endpoint> {
    model
        .endpoints
        .iter()
        .map(|endpoint| &**endpoint)
        .filter(|endpoint| endpoint.local && endpoint.kind == EndpointKind::Workload)
}

fn agree(model: &Model, packets: &[Packet]) -> Result<(), TestCaseError> {
    agrees(&Classifier::compile(model).expect("within the limits"), model, packets)
}

/// That a classifier says what the linear evaluator says of the model.
fn agrees(classifier: &Classifier, model: &Model, packets: &[Packet]) -> Result<(), TestCaseError> {
    for endpoint in locals(model) {
        for direction in PolicyDirection::ALL {
            for packet in packets {
                let judgement = classify(classifier, &endpoint.name, direction, packet);
                let seen = (judgement.allow, classifier.rule_name(judgement.rule));
                let expected = oracle::judge(model, endpoint, direction, packet);
                prop_assert_eq!(seen, expected, "{} {:?} {:?}", &endpoint.name, direction, packet);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn verdict_and_deciding_rule_are_those_of_the_linear_evaluator((model, packets) in (model(5), packets())) {
        agree(&model, &packets)?;
    }

    /// Verdicts differ only if stamps do, whatever changes.
    #[test]
    fn a_changed_verdict_changes_the_stamp((mut model, packets) in (model(5), packets()), edit in edit()) {
        let before = Classifier::compile(&model).expect("within the limits");
        edit.apply(&mut model);
        let after = Classifier::compile(&model).expect("within the limits");
        agree(&model, &packets)?;
        for endpoint in locals(&model) {
            let Some(id) = before.endpoint(&endpoint.name) else { continue };
            if before.stamp(id) != after.stamp(after.endpoint(&endpoint.name).expect("still there")) {
                continue;
            }
            for direction in PolicyDirection::ALL {
                for packet in &packets {
                    let verdict = |classifier| classify(classifier, &endpoint.name, direction, packet).allow;
                    prop_assert_eq!(verdict(&before), verdict(&after), "{} {:?} {:?}", &endpoint.name, direction, packet);
                }
            }
        }
    }

    /// The order in which objects are listed, and objects that have nothing to do with an endpoint, change no stamp.
    #[test]
    fn an_unrelated_change_keeps_the_stamp(mut model in model(5), tier in tier(5)) {
        let before = Classifier::compile(&model).expect("within the limits");
        model.endpoints.reverse();
        model.tiers.reverse();
        model.tiers.iter_mut().for_each(|tier| tier.policies.reverse());
        model.profiles.reverse();
        let mut unrelated = tier;
        for (index, policy) in unrelated.policies.iter_mut().enumerate() {
            let policy = Arc::make_mut(policy);
            policy.selector = Selector::parse("a == 'nobody'").unwrap();
            policy.name = format!("NetworkPolicy/ns/unrelated{index}");
        }
        model.tiers.push(unrelated);
        let after = Classifier::compile(&model).expect("within the limits");
        for (id, name) in before.endpoints() {
            prop_assert_ne!(before.stamp(id), 0);
            prop_assert_eq!(before.stamp(id), after.stamp(after.endpoint(name).expect("still there")), "{}", name);
        }
    }
}

proptest! {
    /// A compiler that follows edits says what a fresh one says, and what the rules say, after each of them.
    #[test]
    fn following_edits_is_compiling_anew(
        (mut model, packets) in (model(5), packets()),
        edits in proptest::collection::vec((edit(), any::<bool>()), 1..12),
    ) {
        let mut compiler = Compiler::default();
        compiler.compile(&model).expect("within the limits");
        for (edit, remade) in edits {
            edit.apply(&mut model);
            if remade {
                // As whoever shares nothing would hand it over.
                model.endpoints.iter_mut().for_each(|endpoint| *endpoint = Arc::new((**endpoint).clone()));
                let policies = model.tiers.iter_mut().flat_map(|tier| &mut tier.policies);
                policies.for_each(|policy| *policy = Arc::new((**policy).clone()));
                model.profiles.iter_mut().for_each(|profile| *profile = Arc::new((**profile).clone()));
            }
            let followed = compiler.compile(&model).expect("within the limits");
            let fresh = Classifier::compile(&model).expect("within the limits");
            agrees(&followed, &model, &packets)?;
            prop_assert_eq!(followed.program_count(), fresh.program_count());
            prop_assert_eq!(followed.rules().count(), fresh.rules().count());
            prop_assert!(followed.endpoints().eq(fresh.endpoints()));
            for (id, name) in fresh.endpoints() {
                prop_assert_eq!(followed.stamp(id), fresh.stamp(id), "{}", name);
            }
        }
    }
}

proptest! {
    // Programs of hundreds of rules, whose rows have more than one word.
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn large_programs_agree_too((model, packets) in (model(80), packets())) {
        agree(&model, &packets)?;
    }
}

/// One change of a model, as closures cannot be printed.
#[derive(Clone, Debug)]
enum Edit {
    Relabel(usize, BTreeMap<String, String>),
    Readdress(usize, Vec<IpNet>),
    RenamePorts(usize, String),
    MoveNode(usize),
    GiveProfiles(usize, Vec<String>),
    AddEndpoint(usize, Endpoint),
    RemoveEndpoint(usize),
    Reverse,
    ReplaceRules(usize, Vec<Rule>),
    ReplaceRule(usize, Box<Rule>),
    Stage(usize),
    Reorder(usize, Option<f64>),
    Renumber(usize, u32),
    AddPolicy(usize, Policy),
    RemovePolicy(usize),
    TierAction(usize, TierAction),
    TierOrder(usize, Option<f64>),
    AddTier(Tier),
    RemoveTier(usize),
    ReplaceProfile(Vec<Rule>),
}

impl Edit {
    fn apply(&self, model: &mut Model) {
        fn endpoint(model: &mut Model, index: usize) -> Option<&mut Endpoint> {
            let index = index.checked_rem(model.endpoints.len())?;
            Some(Arc::make_mut(&mut model.endpoints[index]))
        }
        fn policy(model: &mut Model, index: usize) -> Option<&mut Policy> {
            let policies = model.tiers.iter_mut().flat_map(|tier| &mut tier.policies);
            let mut policies: Vec<&mut Arc<Policy>> = policies.collect();
            let index = index.checked_rem(policies.len())?;
            Some(Arc::make_mut(policies.swap_remove(index)))
        }
        fn tier(model: &mut Model, index: usize) -> Option<&mut Tier> {
            let index = index.checked_rem(model.tiers.len())?;
            Some(&mut model.tiers[index])
        }
        // Names that nothing else has.
        let unique = |name: &str, taken: &mut dyn Iterator<Item = &str>| {
            let taken: Vec<String> = taken.map(str::to_owned).collect();
            (0..).map(|number| format!("{name}{number}")).find(|name| !taken.contains(name)).expect("endless")
        };
        match self {
            Self::Relabel(index, labels) => {
                endpoint(model, *index).into_iter().for_each(|one| one.labels.clone_from(labels));
            }
            Self::Readdress(index, nets) => {
                endpoint(model, *index).into_iter().for_each(|one| one.nets.clone_from(nets));
            }
            Self::RenamePorts(index, name) => {
                let ports = endpoint(model, *index).into_iter().flat_map(|one| &mut one.ports);
                ports.for_each(|port| port.name.clone_from(name));
            }
            Self::MoveNode(index) => endpoint(model, *index).into_iter().for_each(|one| one.local = !one.local),
            Self::GiveProfiles(index, profiles) => {
                endpoint(model, *index).into_iter().for_each(|one| one.profiles.clone_from(profiles));
            }
            Self::AddEndpoint(index, endpoint) => {
                let name = unique("ns/e", &mut model.endpoints.iter().map(|endpoint| endpoint.name.as_str()));
                let index = index % (model.endpoints.len() + 1);
                model.endpoints.insert(index, Arc::new(Endpoint { name, ..endpoint.clone() }));
            }
            Self::RemoveEndpoint(index) => {
                if let Some(index) = index.checked_rem(model.endpoints.len()) {
                    model.endpoints.remove(index);
                }
            }
            Self::Reverse => {
                model.endpoints.reverse();
                model.tiers.reverse();
                model.tiers.iter_mut().for_each(|tier| tier.policies.reverse());
                model.profiles.reverse();
            }
            Self::ReplaceRules(index, rules) => {
                if let Some(policy) = policy(model, *index) {
                    policy.ingress = Some(rules.clone());
                    policy.egress = Some(rules.clone());
                }
            }
            Self::ReplaceRule(index, rule) => {
                let rules = policy(model, *index).and_then(|policy| policy.ingress.as_mut());
                let first = rules.and_then(|rules| rules.first_mut());
                first.into_iter().for_each(|first| *first = Rule { number: 1, ..(**rule).clone() });
            }
            Self::Stage(index) => policy(model, *index).into_iter().for_each(|policy| policy.staged = !policy.staged),
            Self::Reorder(index, order) => policy(model, *index).into_iter().for_each(|policy| policy.order = *order),
            Self::Renumber(index, origin) => {
                policy(model, *index).into_iter().for_each(|policy| policy.origin = *origin);
            }
            Self::AddPolicy(index, policy) => {
                let policies = model.tiers.iter().flat_map(|tier| &tier.policies);
                let name = unique("p", &mut policies.map(|policy| policy.sort_name.as_str()));
                let full = format!("NetworkPolicy/ns/{name}");
                let policy = Policy { sort_name: name, name: full, ..policy.clone() };
                tier(model, *index).into_iter().for_each(|tier| tier.policies.push(Arc::new(policy.clone())));
            }
            Self::RemovePolicy(index) => {
                if let Some(tier) = tier(model, *index)
                    && let Some(index) = index.checked_rem(tier.policies.len())
                {
                    tier.policies.remove(index);
                }
            }
            Self::TierAction(index, action) => {
                tier(model, *index).into_iter().for_each(|tier| tier.default_action = *action);
            }
            Self::TierOrder(index, order) => tier(model, *index).into_iter().for_each(|tier| tier.order = *order),
            Self::AddTier(tier) => {
                let name = unique("tier", &mut model.tiers.iter().map(|tier| tier.name.as_str()));
                let mut tier = Tier { name: name.clone(), ..tier.clone() };
                for (number, policy) in tier.policies.iter_mut().enumerate() {
                    let policy = Arc::make_mut(policy);
                    policy.sort_name = format!("{name}.{number}");
                    policy.name = format!("NetworkPolicy/ns/{name}.{number}");
                }
                model.tiers.push(tier);
            }
            Self::RemoveTier(index) => {
                if let Some(index) = index.checked_rem(model.tiers.len()) {
                    model.tiers.remove(index);
                }
            }
            Self::ReplaceProfile(rules) => {
                if let Some(profile) = model.profiles.last_mut() {
                    Arc::make_mut(profile).ingress.clone_from(rules);
                }
            }
        }
    }
}

fn edit() -> impl Strategy<Value = Edit> {
    let index = || 0usize..12;
    let profiles = || proptest::collection::vec(select(vec!["open", "odd", "unknown"]).prop_map(str::to_owned), 0..3);
    let nets = || proptest::collection::vec(net(), 0..4);
    let action = || select(vec![TierAction::Deny, TierAction::Pass]);
    let of_endpoints = prop_oneof![
        (index(), labels()).prop_map(|(index, labels)| Edit::Relabel(index, labels)),
        (index(), nets()).prop_map(|(index, nets)| Edit::Readdress(index, nets)),
        (index(), port_name()).prop_map(|(index, name)| Edit::RenamePorts(index, name)),
        index().prop_map(Edit::MoveNode),
        (index(), profiles()).prop_map(|(index, profiles)| Edit::GiveProfiles(index, profiles)),
        (index(), endpoint()).prop_map(|(index, endpoint)| Edit::AddEndpoint(index, endpoint)),
        index().prop_map(Edit::RemoveEndpoint),
        Just(Edit::Reverse),
    ];
    let of_policies = prop_oneof![
        (index(), rules(4)).prop_map(|(index, rules)| Edit::ReplaceRules(index, rules)),
        (index(), rule()).prop_map(|(index, rule)| Edit::ReplaceRule(index, Box::new(rule))),
        index().prop_map(Edit::Stage),
        (index(), order()).prop_map(|(index, order)| Edit::Reorder(index, order)),
        (index(), any::<u32>()).prop_map(|(index, origin)| Edit::Renumber(index, origin)),
        (index(), policy(4)).prop_map(|(index, policy)| Edit::AddPolicy(index, policy)),
        index().prop_map(Edit::RemovePolicy),
        (index(), action()).prop_map(|(index, action)| Edit::TierAction(index, action)),
        (index(), order()).prop_map(|(index, order)| Edit::TierOrder(index, order)),
        tier(4).prop_map(Edit::AddTier),
        index().prop_map(Edit::RemoveTier),
        rules(3).prop_map(Edit::ReplaceProfile),
    ];
    prop_oneof![of_endpoints, of_policies]
}
