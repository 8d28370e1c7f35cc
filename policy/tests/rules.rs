//! The rules of Kubernetes and Calico policy, one test each or nearly so; names begin with the rule's number.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use weir_packet::{FlowKey, Ports, Protocol};
use weir_policy::{Classifier, CompileError, PolicyDirection, RuleIdentity, RuleOrigin, Selector, model::*};

const TCP: Protocol = Protocol::TCP;
const UDP: Protocol = Protocol::UDP;

fn selector(text: &str) -> Selector {
    Selector::parse(text).unwrap()
}

fn pod(name: &str, address: &str, labels: &[(&str, &str)], ports: &[(&str, Protocol, u16)]) -> Arc<Endpoint> {
    let namespace = name.split('/').next().unwrap();
    let own = [("projectcalico.org/namespace", namespace)];
    Arc::new(Endpoint {
        name: name.to_owned(),
        local: true,
        namespace: Some(namespace.to_owned()),
        labels: own.iter().chain(labels).map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        nets: vec![address.parse().unwrap()],
        ports: ports
            .iter()
            .map(|(name, protocol, port)| NamedPort { name: (*name).to_owned(), protocol: *protocol, port: *port })
            .collect(),
        profiles: vec![format!("kns.{namespace}")],
        ..Endpoint::default()
    })
}

fn endpoint_of(model: &mut Model, index: usize) -> &mut Endpoint {
    Arc::make_mut(&mut model.endpoints[index])
}

/// The first policy of the first tier.
fn policy_of(model: &mut Model) -> &mut Policy {
    Arc::make_mut(&mut model.tiers[0].policies[0])
}

/// Two pods of `red`, one of `blue`, with profiles that allow all, and no policy.
fn cluster() -> Model {
    let profile = |namespace| {
        Arc::new(Profile {
            name: format!("kns.{namespace}"),
            ingress: vec![Rule::default()],
            egress: vec![Rule::default()],
        })
    };
    Model {
        endpoints: vec![
            pod("red/a", "10.0.0.1/32", &[("app", "a")], &[("web", TCP, 8080), ("dns", UDP, 53)]),
            pod("red/b", "10.0.0.2/32", &[("app", "b")], &[("web", TCP, 9090)]),
            pod("blue/c", "10.0.1.3/32", &[("app", "c")], &[]),
        ],
        tiers: vec![Tier { name: "default".to_owned(), order: Some(1e6), ..Tier::default() }],
        profiles: vec![profile("red"), profile("blue")],
    }
}

fn policy(name: &str, order: impl Into<Option<f64>>, selects: &str) -> Policy {
    Policy {
        name: format!("NetworkPolicy/red/{name}"),
        sort_name: name.to_owned(),
        order: order.into(),
        selector: selector(selects),
        ..Policy::default()
    }
}

fn ingress(policy: Policy, rules: Vec<Rule>) -> Policy {
    Policy { ingress: Some(numbered(rules)), ..policy }
}

fn egress(policy: Policy, rules: Vec<Rule>) -> Policy {
    Policy { egress: Some(numbered(rules)), ..policy }
}

fn numbered(mut rules: Vec<Rule>) -> Vec<Rule> {
    rules.iter_mut().zip(1..).for_each(|(rule, number)| rule.number = number);
    rules
}

fn with(policies: Vec<Policy>) -> Model {
    let mut model = cluster();
    model.tiers[0].policies = policies.into_iter().map(Arc::new).collect();
    model
}

fn from(peers: Vec<Peer>) -> EntityMatch {
    EntityMatch { any_of: peers, ..EntityMatch::default() }
}

fn to_port(protocol: Protocol, port: PortMatch) -> Rule {
    let destination = EntityMatch { ports: Some(vec![port]), ..EntityMatch::default() };
    Rule { protocol: Some(protocol), destination, ..Rule::default() }
}

fn rule(action: Action, protocol: Option<Protocol>) -> Rule {
    Rule { action, protocol, ..Rule::default() }
}

/// A policy's name for `endpoint`, and whether it allows.
fn judge(
    model: &Model,
    endpoint: &str,
    direction: PolicyDirection,
    (source, destination): (&str, &str),
    protocol: Protocol,
    port: u16,
) -> (bool, String) {
    let classifier = Classifier::compile(model).unwrap();
    let id = classifier.endpoint(endpoint).unwrap();
    let ports = Ports::new(40000, port);
    let judgement = match (source.parse().unwrap(), destination.parse().unwrap()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            classifier.judge(id, direction, &FlowKey::<Ipv4Addr> { src, dst, ports, protocol })
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            classifier.judge(id, direction, &FlowKey::<Ipv6Addr> { src, dst, ports, protocol })
        }
        _ => panic!("mixed families"),
    };
    (judgement.allow, classifier.rule_name(judgement.rule))
}

const A: &str = "10.0.0.1";
const B: &str = "10.0.0.2";
const C: &str = "10.0.1.3";
const OUTSIDE: &str = "203.0.113.9";

/// What arrives at red/a by TCP.
fn arrives(model: &Model, source: &str, port: u16) -> bool {
    judge(model, "red/a", PolicyDirection::Ingress, (source, A), TCP, port).0
}

fn assert_arrives(model: &Model, cases: &[(&str, u16, bool)]) {
    for (source, port, expected) in cases {
        assert_eq!(arrives(model, source, *port), *expected, "{source} to port {port}");
    }
}

#[test]
fn rule_1_only_selected_pods_are_isolated_and_only_in_the_policys_directions() {
    let model = with(vec![ingress(policy("deny", 1000.0, "app == 'a'"), vec![])]);
    let verdict = |pod, direction, ends| judge(&model, pod, direction, ends, TCP, 80);
    assert_eq!(
        verdict("red/a", PolicyDirection::Ingress, (B, A)),
        (false, "default-deny NetworkPolicy/red/deny".to_owned())
    );
    assert_eq!(verdict("red/a", PolicyDirection::Egress, (A, B)), (true, "profile kns.red".to_owned()));
    assert_eq!(verdict("red/b", PolicyDirection::Ingress, (A, B)), (true, "profile kns.red".to_owned()));
}

#[test]
fn rule_1_policies_are_additive() {
    let allow = |name, peer| {
        let rule = Rule { source: from(vec![Peer::Selector(selector(peer))]), ..Rule::default() };
        ingress(policy(name, 1000.0, "app == 'a'"), vec![rule])
    };
    let model = with(vec![allow("from-b", "app == 'b'"), allow("from-c", "app == 'c'")]);
    assert_arrives(&model, &[(B, 80, true), (C, 80, true), (OUTSIDE, 80, false)]);
    let denied = judge(&model, "red/a", PolicyDirection::Ingress, (OUTSIDE, A), TCP, 80);
    assert_eq!(denied.1, "default-deny NetworkPolicy/red/from-b, NetworkPolicy/red/from-c");
    let allowed = judge(&model, "red/a", PolicyDirection::Ingress, (C, A), TCP, 80);
    assert_eq!(allowed.1, "NetworkPolicy/red/from-c rule 1");
}

#[test]
fn rule_4_an_empty_rule_allows_everybody_and_everything() {
    let model = with(vec![ingress(policy("open", 1000.0, "app == 'a'"), vec![Rule::default()])]);
    assert_arrives(&model, &[(B, 80, true), (OUTSIDE, 1, true)]);
    for protocol in [UDP, Protocol::SCTP, Protocol::ICMP, Protocol(47)] {
        assert!(judge(&model, "red/a", PolicyDirection::Ingress, (OUTSIDE, A), protocol, 0).0);
    }
}

#[test]
fn rule_5_peers_are_alternatives_and_selectors_never_pick_strangers() {
    let rule = Rule {
        source: from(vec![
            Peer::Selector(selector("projectcalico.org/namespace == 'red' && app == 'b'")),
            Peer::Selector(selector("projectcalico.org/namespace == 'blue'")),
        ]),
        ..Rule::default()
    };
    let model = with(vec![ingress(policy("p", 1000.0, "app == 'a'"), vec![rule])]);
    assert_arrives(&model, &[(B, 80, true), (C, 80, true), (A, 80, false), (OUTSIDE, 80, false)]);
    let everybody = Rule { source: from(vec![Peer::Selector(Selector::All)]), ..Rule::default() };
    let model = with(vec![ingress(policy("p", 1000.0, "app == 'a'"), vec![everybody])]);
    assert_arrives(&model, &[(B, 80, true), (C, 80, true), (OUTSIDE, 80, false)]);
}

#[test]
fn rule_6_a_block_matches_pods_too_and_others_may_allow_what_it_excepts() {
    let block = |cidr: &str, except: &[&str]| Peer::Block {
        cidr: cidr.parse().unwrap(),
        except: except.iter().map(|net| net.parse().unwrap()).collect(),
    };
    let rule = |peers| Rule { source: from(peers), ..Rule::default() };
    let model = with(vec![ingress(
        policy("p", 1000.0, "app == 'a'"),
        vec![rule(vec![block("10.0.0.77/16", &["10.0.1.0/24"])])],
    )]);
    assert_arrives(&model, &[(B, 80, true), (C, 80, false), ("10.0.200.1", 80, true), (OUTSIDE, 80, false)]);
    let mut both = model.clone();
    both.tiers[0]
        .policies
        .push(Arc::new(ingress(policy("q", 1000.0, "app == 'a'"), vec![rule(vec![block("10.0.1.3/32", &[])])])));
    assert_arrives(&both, &[(C, 80, true), ("10.0.1.4", 80, false)]);
}

#[test]
fn rule_7_ports_are_of_their_protocol_and_ranges_include_both_ends() {
    let model = with(vec![ingress(
        policy("p", 1000.0, "app == 'a'"),
        vec![to_port(TCP, PortMatch::Range(80, 90)), rule(Action::Allow, Some(UDP))],
    )]);
    assert_arrives(&model, &[(B, 79, false), (B, 80, true), (B, 90, true), (B, 91, false)]);
    let by = |protocol| judge(&model, "red/a", PolicyDirection::Ingress, (B, A), protocol, 80).0;
    assert!(by(UDP) && !by(Protocol::SCTP) && !by(Protocol::ICMP));
    let sctp = with(vec![ingress(policy("p", 1000.0, "app == 'a'"), vec![rule(Action::Allow, Some(Protocol::SCTP))])]);
    assert_arrives(&sctp, &[(B, 80, false)]);
}

#[test]
fn rule_8_named_ports_are_the_destinations_with_name_and_protocol() {
    let web = |protocol| to_port(protocol, PortMatch::Named("web".to_owned()));
    let model = with(vec![egress(policy("p", 1000.0, "app == 'c'"), vec![web(TCP)])]);
    let sends = |model: &Model, destination, protocol, port| {
        judge(model, "blue/c", PolicyDirection::Egress, (C, destination), protocol, port).0
    };
    assert!(sends(&model, A, TCP, 8080) && !sends(&model, A, TCP, 9090));
    assert!(sends(&model, B, TCP, 9090) && !sends(&model, B, TCP, 8080));
    assert!(!sends(&model, A, UDP, 8080) && !sends(&model, OUTSIDE, TCP, 8080));
    let dns_by_tcp = to_port(TCP, PortMatch::Named("dns".to_owned()));
    let unknown = to_port(TCP, PortMatch::Named("nobody".to_owned()));
    let none = with(vec![egress(policy("p", 1000.0, "app == 'c'"), vec![dns_by_tcp, unknown])]);
    assert!(!sends(&none, A, TCP, 53) && !sends(&none, A, UDP, 53));
    let at_home = with(vec![ingress(policy("p", 1000.0, "app == 'a'"), vec![web(TCP)])]);
    assert_arrives(&at_home, &[(C, 8080, true), (C, 9090, false)]);
}

#[test]
fn rules_15_and_16_order_tiers_and_policies_and_put_unset_last() {
    let deny = |name, order: Option<f64>| ingress(policy(name, order, "app == 'a'"), vec![rule(Action::Deny, None)]);
    let allow = |name, order: Option<f64>| ingress(policy(name, order, "app == 'a'"), vec![rule(Action::Allow, None)]);
    assert_arrives(&with(vec![deny("a", None), allow("b", Some(1e9))]), &[(B, 80, true)]);
    assert_arrives(&with(vec![allow("b", Some(1.0)), deny("a", Some(1.0))]), &[(B, 80, false)]);
    assert_arrives(&with(vec![allow("A", Some(-0.0)), deny("a", Some(0.0))]), &[(B, 80, true)]);
    let mut model = with(vec![deny("p", Some(1.0))]);
    let tier = |name: &str, order, policies| Tier { name: name.to_owned(), order, policies, ..Tier::default() };
    model.tiers.push(tier("last", None, vec![Arc::new(deny("x", None))]));
    model.tiers.push(tier("zzz", Some(1e6), vec![Arc::new(allow("y", None))]));
    assert_arrives(&model, &[(B, 80, false)]);
    model.tiers[2].name = "aaa".to_owned();
    assert_arrives(&model, &[(B, 80, true)]);
}

#[test]
fn rule_17_log_continues_and_pass_skips_the_rest_of_the_tier() {
    let first = vec![rule(Action::Log, None), rule(Action::Pass, Some(TCP)), rule(Action::Deny, None)];
    let mut model = with(vec![ingress(policy("p", 1.0, "app == 'a'"), first)]);
    assert_eq!(judge(&model, "red/a", PolicyDirection::Ingress, (B, A), TCP, 80), (true, "profile kns.red".to_owned()));
    assert_eq!(
        judge(&model, "red/a", PolicyDirection::Ingress, (B, A), UDP, 80),
        (false, "NetworkPolicy/red/p rule 3".to_owned())
    );
    let later = ingress(policy("later", 1.0, "app == 'a'"), vec![to_port(TCP, PortMatch::Range(80, 80))]);
    model.tiers.push(Tier { name: "later".to_owned(), policies: vec![Arc::new(later)], ..Tier::default() });
    assert_arrives(&model, &[(B, 80, true), (B, 81, false)]);
}

/// The rules that log what arrives at red/a from red/b.
fn logged(model: &Model, protocol: Protocol, port: u16) -> Vec<String> {
    let classifier = Classifier::compile(model).unwrap();
    let [src, dst] = [B, A].map(|address| address.parse::<Ipv4Addr>().unwrap());
    let key = FlowKey { src, dst, ports: Ports::new(1000, port), protocol };
    let rules = classifier.logged(classifier.endpoint("red/a").unwrap(), PolicyDirection::Ingress, &key);
    rules.iter().map(|rule| classifier.rule_name(*rule)).collect()
}

#[test]
fn rule_17_what_is_logged_comes_before_what_decides_and_behind_no_pass() {
    let log = |protocol| rule(Action::Log, protocol);
    let mixed = EntityMatch {
        ports: Some(vec![PortMatch::Named("web".to_owned()), PortMatch::Range(8080, 8080)]),
        ..EntityMatch::default()
    };
    let web = Rule { destination: mixed, ..rule(Action::Log, Some(TCP)) };
    let first = vec![log(None), web, rule(Action::Pass, Some(TCP)), log(None), rule(Action::Deny, None), log(None)];
    let mut model = with(vec![
        ingress(policy("p", 1.0, "app == 'a'"), first),
        ingress(policy("skipped", 2.0, "app == 'a'"), vec![log(None)]),
    ]);
    let later = ingress(
        policy("later", 1.0, "app == 'a'"),
        vec![log(None), log(None), log(None), to_port(TCP, PortMatch::Range(80, 80)), log(None)],
    );
    model.tiers.push(Tier { name: "later".to_owned(), policies: vec![Arc::new(later)], ..Tier::default() });
    let names =
        |rules: &[&str]| -> Vec<String> { rules.iter().map(|rule| format!("NetworkPolicy/red/{rule}")).collect() };
    assert_eq!(logged(&model, UDP, 80), names(&["p rule 1", "p rule 4"]));
    assert_eq!(logged(&model, TCP, 80), names(&["p rule 1", "later rule 1", "later rule 2", "later rule 3"]));
    // A rule that matches in two ways is logged once; the fifth is left out.
    let of_web = ["p rule 1", "p rule 2", "later rule 1", "later rule 2"];
    assert_eq!(logged(&model, TCP, 8080), names(&of_web));
}

#[test]
fn what_is_logged_changes_no_stamp() {
    let of = |rules| with(vec![ingress(policy("p", 1.0, "app == 'a'"), rules)]);
    let [plain, logging] =
        [of(vec![rule(Action::Allow, None)]), of(vec![rule(Action::Log, None), rule(Action::Allow, None)])];
    let [plain, logging] = [plain, logging].map(|model| Classifier::compile(&model).unwrap());
    let stamp = |classifier: &Classifier| classifier.stamp(classifier.endpoint("red/a").unwrap());
    assert_eq!(stamp(&plain), stamp(&logging));
    assert_eq!([plain.has_logs(), logging.has_logs()], [false, true]);
}

#[test]
fn rule_18_a_tier_denies_at_its_end_only_what_an_enforced_policy_of_that_direction_applies_to() {
    let mut model = with(vec![
        egress(policy("egress-only", 1.0, "app == 'a'"), vec![]),
        ingress(policy("others", 1.0, "app == 'b'"), vec![]),
    ]);
    assert_arrives(&model, &[(B, 80, true)]);
    model.tiers[0]
        .policies
        .push(Arc::new(ingress(policy("no-rule-matches", 2.0, "app == 'a'"), vec![rule(Action::Allow, Some(UDP))])));
    assert_arrives(&model, &[(B, 80, false)]);
    model.tiers[0].default_action = TierAction::Pass;
    assert_arrives(&model, &[(B, 80, true)]);
}

#[test]
fn rule_19_profiles_in_order_pass_denies_and_nothing_denies() {
    let mut model = cluster();
    endpoint_of(&mut model, 0).profiles = vec!["first".to_owned(), "kns.red".to_owned()];
    let rules = vec![rule(Action::Log, None), rule(Action::Pass, Some(UDP))];
    model.profiles.push(Arc::new(Profile { name: "first".to_owned(), ingress: numbered(rules), egress: vec![] }));
    assert_arrives(&model, &[(B, 80, true)]);
    let by_udp = judge(&model, "red/a", PolicyDirection::Ingress, (B, A), UDP, 80);
    assert_eq!(by_udp, (false, "profile first rule 2".to_owned()));
    endpoint_of(&mut model, 0).profiles.clear();
    assert_arrives(&model, &[(B, 80, false)]);
}

#[test]
fn rule_20_staged_policies_enforce_nothing() {
    let staged = Policy { staged: true, ..ingress(policy("p", 1.0, "app == 'a'"), vec![rule(Action::Deny, None)]) };
    assert_arrives(&with(vec![staged]), &[(B, 80, true)]);
}

#[test]
fn rule_22_empty_positive_sets_match_nothing_and_negated_pairs_are_wholes() {
    let nets = |nets: &[&str]| nets.iter().map(|net| net.parse().unwrap()).collect::<Vec<_>>();
    let source = |source| with(vec![ingress(policy("p", 1.0, "app == 'a'"), vec![Rule { source, ..Rule::default() }])]);
    let model = source(EntityMatch { nets: Some(vec![]), ..EntityMatch::default() });
    assert_arrives(&model, &[(B, 80, false)]);
    let model = source(EntityMatch {
        nets: Some(nets(&["10.0.0.0/16"])),
        not_nets: nets(&["10.0.1.99/24"]),
        ..EntityMatch::default()
    });
    assert_arrives(&model, &[(B, 80, true), (C, 80, false), (OUTSIDE, 80, false)]);
    let icmp = Rule {
        protocol: Some(Protocol::ICMP),
        not_icmp: Some(IcmpMatch { icmp_type: 3, code: Some(1) }),
        ..Rule::default()
    };
    let classifier = Classifier::compile(&with(vec![ingress(policy("p", 1.0, "app == 'a'"), vec![icmp])])).unwrap();
    for (icmp_type, code, expected) in [(8, 77, true), (3, 0, true), (3, 1, false), (4, 1, true)] {
        let (src, dst) = (Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 1));
        let key = FlowKey { src, dst, ports: Ports::new(code, icmp_type), protocol: Protocol::ICMP };
        let endpoint = classifier.endpoint("red/a").unwrap();
        assert_eq!(classifier.judge(endpoint, PolicyDirection::Ingress, &key).allow, expected, "{icmp_type}/{code}");
    }
}

#[test]
fn rule_23_lists_without_a_cidr_of_the_packets_family_match_nothing() {
    let mut model = with(vec![ingress(
        policy("p", 1.0, "app == 'a'"),
        vec![Rule {
            source: EntityMatch { not_nets: vec!["10.0.1.0/24".parse().unwrap()], ..EntityMatch::default() },
            ..Rule::default()
        }],
    )]);
    let v6 = |model: &Model| judge(model, "red/a", PolicyDirection::Ingress, ("fd00::2", "fd00::1"), TCP, 80).0;
    assert_arrives(&model, &[(B, 80, true), (C, 80, false)]);
    assert!(!v6(&model));
    let set = |model: &mut Model, change: &dyn Fn(&mut Rule)| {
        change(&mut policy_of(model).ingress.as_mut().unwrap()[0]);
    };
    set(&mut model, &|rule| rule.source.not_nets = vec!["0.0.0.0/0".parse().unwrap()]);
    assert_arrives(&model, &[(B, 80, false), (OUTSIDE, 80, false)]);
    set(&mut model, &|rule| *rule = Rule { ip_version: Some(6), ..Rule::default() });
    assert_arrives(&model, &[(B, 80, false)]);
    assert!(v6(&model));
}

#[test]
fn rule_24_ports_are_numbers_or_names_and_source_names_are_the_sources() {
    let ports = |names: &[&str], numbers: &[u16]| {
        let names = names.iter().map(|name| PortMatch::Named((*name).to_owned()));
        names.chain(numbers.iter().map(|port| PortMatch::Range(*port, *port))).collect::<Vec<_>>()
    };
    let mixed = EntityMatch { ports: Some(ports(&["web"], &[443])), ..EntityMatch::default() };
    let model = with(vec![ingress(
        policy("p", 1.0, "app == 'a'"),
        vec![Rule { protocol: Some(TCP), destination: mixed.clone(), ..Rule::default() }],
    )]);
    assert_arrives(&model, &[(B, 8080, true), (B, 443, true), (B, 9090, false)]);
    let not = EntityMatch { not_ports: ports(&["web"], &[443]), ..EntityMatch::default() };
    let model = with(vec![ingress(
        policy("p", 1.0, "app == 'a'"),
        vec![Rule { protocol: Some(TCP), destination: not, ..Rule::default() }],
    )]);
    assert_arrives(&model, &[(B, 8080, false), (B, 443, false), (B, 9090, true)]);

    let by_source = Rule { source: mixed, ..Rule::default() };
    let model = with(vec![ingress(policy("p", 1.0, "app == 'a'"), vec![by_source])]);
    let classifier = Classifier::compile(&model).unwrap();
    let (dst, protocol) = (Ipv4Addr::new(10, 0, 0, 1), TCP);
    for (source, port, expected) in [(B, 9090, true), (B, 8080, false), (B, 443, true), (C, 9090, false)] {
        let key = FlowKey { src: source.parse::<Ipv4Addr>().unwrap(), dst, ports: Ports::new(port, 1), protocol };
        let verdict = classifier.judge(classifier.endpoint("red/a").unwrap(), PolicyDirection::Ingress, &key);
        assert_eq!(verdict.allow, expected, "{source}:{port}");
    }
}

#[test]
fn rule_25_selectors_pick_known_things_of_every_kind_and_not_selector_lets_strangers_through() {
    let mut model = with(vec![ingress(
        policy("p", 1.0, "app == 'a'"),
        vec![Rule {
            source: EntityMatch { selector: Some(selector("!has(app)")), ..EntityMatch::default() },
            ..Rule::default()
        }],
    )]);
    for (name, kind, net) in
        [("set", EndpointKind::NetworkSet, "203.0.113.0/24"), ("node", EndpointKind::HostEndpoint, "172.18.0.2/32")]
    {
        let endpoint =
            Endpoint { name: name.to_owned(), kind, nets: vec![net.parse().unwrap()], ..Endpoint::default() };
        model.endpoints.push(Arc::new(endpoint));
    }
    assert_arrives(&model, &[(OUTSIDE, 80, true), ("172.18.0.2", 80, true), ("8.8.8.8", 80, false), (B, 80, false)]);
    let source = &mut policy_of(&mut model).ingress.as_mut().unwrap()[0].source;
    *source = EntityMatch { not_selector: Some(selector("app == 'b'")), ..EntityMatch::default() };
    assert_arrives(&model, &[("8.8.8.8", 80, true), (C, 80, true), (B, 80, false)]);
}

#[test]
fn rule_26_services_match_address_protocol_and_port_together() {
    let services = Some(vec![
        ("10.0.0.1/32".parse().unwrap(), Some((TCP, 8080))),
        ("10.0.0.2/32".parse().unwrap(), Some((TCP, 9090))),
    ]);
    let destination = EntityMatch { endpoint_ports: services, ..EntityMatch::default() };
    let model = with(vec![egress(policy("p", 1.0, "app == 'c'"), vec![Rule { destination, ..Rule::default() }])]);
    for (destination, protocol, port, expected) in [
        (A, TCP, 8080, true),
        (A, TCP, 9090, false),
        (B, TCP, 9090, true),
        (A, UDP, 8080, false),
        (OUTSIDE, TCP, 8080, false),
    ] {
        let verdict = judge(&model, "blue/c", PolicyDirection::Egress, (C, destination), protocol, port);
        assert_eq!(verdict.0, expected, "{destination}:{port}");
    }
}

#[test]
fn workloads_with_the_same_policies_share_their_programs() {
    let mut model = with(vec![ingress(policy("p", 1000.0, "projectcalico.org/namespace == 'red'"), vec![])]);
    let before = Classifier::compile(&model).unwrap();
    for index in 0..100 {
        model.endpoints.push(pod(&format!("red/more{index}"), &format!("10.0.9.{index}/32"), &[], &[]));
    }
    let after = Classifier::compile(&model).unwrap();
    assert_eq!(before.program_count(), after.program_count());
    assert_eq!(after.endpoints().len(), 103);
}

#[test]
fn stamps_follow_members_of_peers_and_nothing_else() {
    let peer = Rule { source: from(vec![Peer::Selector(selector("app == 'b'"))]), ..Rule::default() };
    let mut model = with(vec![ingress(policy("p", 1000.0, "app == 'a'"), vec![peer])]);
    let stamps = |model: &Model| {
        let classifier = Classifier::compile(model).unwrap();
        ["red/a", "red/b"].map(|name| classifier.stamp(classifier.endpoint(name).unwrap()))
    };
    let first = stamps(&model);
    model.endpoints.push(pod("blue/stranger", "10.0.1.9/32", &[("app", "z")], &[]));
    policy_of(&mut model).name = "renamed".to_owned();
    assert_eq!(stamps(&model), first);
    model.endpoints.push(pod("red/b2", "10.0.0.22/32", &[("app", "b")], &[]));
    let second = stamps(&model);
    assert_ne!(second[0], first[0]);
    assert_eq!(second[1], first[1]);
    model.endpoints.pop();
    assert_eq!(stamps(&model), first);
}

#[test]
fn stamps_cover_every_field_of_a_rule() {
    let stamp = |model: &Model| {
        let classifier = Classifier::compile(model).unwrap();
        classifier.stamp(classifier.endpoint("red/a").unwrap())
    };
    let nets = || vec!["10.0.0.0/30".parse().unwrap()];
    let icmp = Some(IcmpMatch { icmp_type: 8, code: None });
    let web = || vec![PortMatch::Named("web".to_owned())];
    let http = || vec![PortMatch::Range(80, 80)];
    let entities = [
        EntityMatch { nets: Some(nets()), ..EntityMatch::default() },
        EntityMatch { not_nets: nets(), ..EntityMatch::default() },
        EntityMatch { ports: Some(http()), ..EntityMatch::default() },
        EntityMatch { not_ports: http(), ..EntityMatch::default() },
        EntityMatch { ports: Some(web()), ..EntityMatch::default() },
        EntityMatch { not_ports: web(), ..EntityMatch::default() },
    ];
    let mut rules = vec![
        rule(Action::Allow, None),
        rule(Action::Deny, None),
        rule(Action::Pass, Some(TCP)),
        rule(Action::Allow, Some(TCP)),
        Rule { not_protocol: Some(TCP), ..Rule::default() },
        Rule { ip_version: Some(4), ..Rule::default() },
        Rule { icmp, ..Rule::default() },
        Rule { not_icmp: icmp, ..Rule::default() },
    ];
    for entity in entities {
        rules.push(Rule { source: entity.clone(), ..Rule::default() });
        rules.push(Rule { destination: entity, ..Rule::default() });
    }
    let count = rules.len();
    let models = rules.into_iter().map(|rule| with(vec![ingress(policy("p", 1000.0, "app == 'a'"), vec![rule])]));
    let stamps: std::collections::BTreeSet<u32> = models.map(|model| stamp(&model)).collect();
    assert_eq!(stamps.len(), count);

    let named = to_port(TCP, PortMatch::Named("web".to_owned()));
    let mut model = with(vec![ingress(policy("p", 1000.0, "app == 'a'"), vec![named])]);
    let before = stamp(&model);
    endpoint_of(&mut model, 0).ports[0].port = 8081;
    assert_ne!(stamp(&model), before);
}

#[test]
fn a_stage_that_allows_has_another_stamp_than_one_that_leaves_the_packet_to_the_next() {
    let stamp = |rules: Vec<Rule>| {
        let mut model =
            with(vec![ingress(Policy { scope: PolicyScope::PreDnat, ..policy("p", None, "all()") }, rules)]);
        let host = Endpoint { name: "h".into(), kind: EndpointKind::HostEndpoint, local: true, ..Endpoint::default() };
        model.endpoints.push(Arc::new(host));
        let classifier = Classifier::compile(&model).unwrap();
        classifier.host_stamp(classifier.host_endpoint("h").unwrap())
    };
    assert_ne!(stamp(vec![rule(Action::Allow, None)]), stamp(Vec::new()));
    assert_ne!(stamp(vec![rule(Action::Deny, None)]), stamp(Vec::new()));
}

#[test]
fn deciding_rules_are_described() {
    let mut open = ingress(policy("p", 1000.0, "app == 'a'"), vec![rule(Action::Allow, Some(TCP))]);
    open.origin = 77;
    let classifier = Classifier::compile(&with(vec![open])).unwrap();
    let key = |protocol| FlowKey {
        src: Ipv4Addr::new(10, 0, 0, 2),
        dst: Ipv4Addr::new(10, 0, 0, 1),
        ports: Ports::new(1, 2),
        protocol,
    };
    let endpoint = classifier.endpoint("red/a").unwrap();
    let describe =
        |protocol| classifier.describe(classifier.judge(endpoint, PolicyDirection::Ingress, &key(protocol)).rule);
    let direction = PolicyDirection::Ingress;
    let definition = &Rule { number: 1, ..rule(Action::Allow, Some(TCP)) };
    assert_eq!(
        describe(TCP),
        RuleOrigin::Policy { name: "NetworkPolicy/red/p", rule: 1, direction, object: 77, definition }
    );
    assert_eq!(describe(UDP), RuleOrigin::TierEnd { tier: "default", policies: vec!["NetworkPolicy/red/p"] });
}

/// What hits are kept by: a rule is the same wherever it stands in its policy, and another when it or its policy changes.
#[test]
fn a_rules_identity_is_what_it_says_and_where() {
    let [first, second] = [TCP, UDP].map(|protocol| rule(Action::Allow, Some(protocol)));
    let numbered = |number, rule: &Rule| Rule { number, ..rule.clone() };
    let identities = |name: &str, rules: Vec<Rule>| {
        let classifier = Classifier::compile(&with(vec![ingress(policy(name, 1000.0, "app == 'a'"), rules)])).unwrap();
        let all: BTreeMap<String, RuleIdentity> = classifier
            .rules()
            .map(|rule| classifier.describe(rule))
            .map(|origin| (origin.to_string(), origin.identity()))
            .collect();
        all
    };
    let before = identities("p", vec![numbered(1, &first), numbered(2, &second)]);
    let after =
        identities("p", vec![numbered(1, &second), numbered(2, &rule(Action::Deny, None)), numbered(3, &first)]);
    let (one, two, three) = ("NetworkPolicy/red/p rule 1", "NetworkPolicy/red/p rule 2", "NetworkPolicy/red/p rule 3");
    assert_eq!((before[one], before[two]), (after[three], after[one]));
    let mut different = BTreeSet::new();
    different.extend(before.values().chain(after.values()).copied());
    different.extend(identities("q", vec![numbered(1, &first)]).values().copied());
    // The end without a profile, two profiles' rules, three of p and its end; then q's, and its end.
    assert_eq!(different.len(), before.len() + 1 + 2, "{before:?} {after:?}");
}

#[test]
fn only_local_workloads_get_programs() {
    let mut model = cluster();
    endpoint_of(&mut model, 1).local = false;
    endpoint_of(&mut model, 2).kind = EndpointKind::HostEndpoint;
    let classifier = Classifier::compile(&model).unwrap();
    assert!(classifier.endpoint("red/a").is_some());
    assert_eq!((classifier.endpoint("red/b"), classifier.endpoint("blue/c")), (None, None));
}

#[test]
fn what_cannot_be_compiled_is_an_error_that_names_the_limit() {
    let mut model = cluster();
    endpoint_of(&mut model, 1).name = "red/a".to_owned();
    let error = Classifier::compile(&model).unwrap_err();
    assert_eq!(error, CompileError::DuplicateEndpoint { name: "red/a".to_owned() });

    let net = |index: u32| ipnet::IpNet::new(Ipv4Addr::from(0x1400_0000 + 2 * index).into(), 32).unwrap();
    let rules = (0..262_144)
        .map(|index| {
            let source = EntityMatch { nets: Some(vec![net(index)]), ..EntityMatch::default() };
            Rule { source, ..Rule::default() }
        })
        .collect();
    let model = with(vec![ingress(policy("p", 1.0, "app == 'a'"), rules)]);
    let error = Classifier::compile(&model).unwrap_err();
    assert_eq!(
        error,
        CompileError::TooManyRules {
            endpoint: "red/a".to_owned(),
            direction: "ingress",
            rules: 262_145,
            limit: weir_policy::MAX_RULES_PER_ENDPOINT
        }
    );
    assert!(error.to_string().contains("262144"), "{error}");
}
