//! Kubernetes NetworkPolicy, and Calico's staged form of it.
//!
//! They are policies of the tier "default" (Deny at its end), so a pod that one of them selects is isolated in its
//! directions; a pod that none selects reaches its profile `kns.NAMESPACE`, which allows everything.

use weir_packet::Protocol;
use weir_policy::{
    PolicyDirection, Selector,
    model::{EntityMatch, Peer, Policy, PortMatch, Rule},
};

use super::{
    PolicyName,
    calico::idle_rules,
    labels::{NAMESPACE_LABEL, NAMESPACE_PREFIX},
    selectors::{label_selector, pods, pods_of},
};
use crate::{
    resources::{
        Object,
        at::{At, Reporter},
        calico::policy::StagedKubernetesNetworkPolicy,
        meta::{IntOrString, LabelSelector},
        network_policy::{IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec},
        object::Readable,
    },
    text::{Problems, address::parse_network, problem::nearest},
    translate::services::{port_number, protocol},
};

/// The order of Kubernetes's policies in the tier "default".
pub(super) const ORDER: f64 = 1000.0;

pub(super) fn network_policy(object: &Object<NetworkPolicy>, problems: &mut Problems) -> Option<Policy> {
    let mut report = object.reporter(problems);
    let Some(spec) = &object.value.spec else {
        report.error(object.at(), "spec is missing", "a policy says at least whom it selects: podSelector".to_owned());
        return None;
    };
    Some(policy(object, spec, PolicyName::of("NetworkPolicy", object), &mut report))
}

pub(super) fn staged_network_policy(object: &Object<StagedKubernetesNetworkPolicy>, problems: &mut Problems) -> Policy {
    let staged = object.value.spec.clone();
    let spec = NetworkPolicySpec {
        pod_selector: staged.pod_selector,
        ingress: staged.ingress,
        egress: staged.egress,
        policy_types: staged.policy_types,
    };
    let name = PolicyName::of("StagedKubernetesNetworkPolicy", object);
    Policy { staged: true, ..policy(object, &spec, name, &mut object.reporter(problems)) }
}

fn policy<T: Readable>(
    object: &Object<T>,
    spec: &NetworkPolicySpec,
    name: PolicyName<'_>,
    report: &mut Reporter<'_>,
) -> Policy {
    let at = object.at().key("spec");
    let own = spec.pod_selector.clone().unwrap_or_default();
    let own = label_selector(&own, "", at.key("podSelector"), "spec.podSelector", report);
    let ingress = spec.ingress.as_deref().unwrap_or_default();
    let egress = spec.egress.as_deref().unwrap_or_default();
    let ingress = ingress.iter().enumerate().map(|(index, rule)| Sides {
        index,
        direction: PolicyDirection::Ingress,
        peers: rule.from.as_deref().unwrap_or_default(),
        ports: rule.ports.as_deref().unwrap_or_default(),
    });
    let egress_rules = egress.iter().enumerate().map(|(index, rule)| Sides {
        index,
        direction: PolicyDirection::Egress,
        peers: rule.to.as_deref().unwrap_or_default(),
        ports: rule.ports.as_deref().unwrap_or_default(),
    });
    let namespace = object.namespace.as_ref();
    let ingress: Vec<Rule> = ingress.flat_map(|rule| rule.translate(namespace, at, report)).collect();
    let egress_rules: Vec<Rule> = egress_rules.flat_map(|rule| rule.translate(namespace, at, report)).collect();
    let (mut governs_ingress, mut governs_egress) = (false, false);
    match spec.policy_types.as_deref() {
        None | Some([]) => (governs_ingress, governs_egress) = (true, !egress.is_empty()),
        Some(types) => {
            for (index, name) in types.iter().enumerate() {
                match name.as_str() {
                    "Ingress" => governs_ingress = true,
                    "Egress" => governs_egress = true,
                    other => {
                        let help = match nearest(other, ["Ingress", "Egress"]) {
                            Some(known) => format!("did you mean {known}?"),
                            None => "it is one of Ingress, Egress".to_owned(),
                        };
                        let at = at.key("policyTypes").item(index);
                        report.error(at, format_args!("spec.policyTypes[{index}]: {other:?} is not known"), help);
                    }
                }
            }
        }
    }
    let has_rules = [
        spec.ingress.as_ref().is_some_and(|rules| !rules.is_empty()),
        spec.egress.as_ref().is_some_and(|rules| !rules.is_empty()),
    ];
    idle_rules(has_rules, [governs_ingress, governs_egress], "policyTypes", at, report);
    Policy {
        order: Some(ORDER),
        selector: Selector::all_of([pods_of(namespace), own]),
        ingress: governs_ingress.then_some(ingress),
        egress: governs_egress.then_some(egress_rules),
        ..name.policy(object.origin)
    }
}

/// An ingress or egress rule.
struct Sides<'p> {
    index: usize,
    direction: PolicyDirection,
    peers: &'p [NetworkPolicyPeer],
    ports: &'p [NetworkPolicyPort],
}

impl Sides<'_> {
    /// One rule for each port entry. A rule whose peers are all at fault gives none, so that it cannot become one for
    /// any peer.
    fn translate(&self, namespace: &str, spec_at: At<'_>, report: &mut Reporter<'_>) -> Vec<Rule> {
        let (direction, peers_key) = match self.direction {
            PolicyDirection::Ingress => ("ingress", "from"),
            PolicyDirection::Egress => ("egress", "to"),
        };
        let at = spec_at.key(direction).item(self.index);
        let field = format!("spec.{direction}[{}]", self.index);
        let mut any_of = Vec::new();
        for (index, peer) in self.peers.iter().enumerate() {
            let field = format!("{field}.{peers_key}[{index}]");
            any_of.extend(self::peer(peer, namespace, at.key(peers_key).item(index), &field, report));
        }
        let mut ports = Vec::new();
        for (index, port) in self.ports.iter().enumerate() {
            let field = format!("{field}.ports[{index}]");
            ports.extend(policy_port(port, at.key("ports").item(index), &field, report));
        }
        if self.peers.is_empty() != any_of.is_empty() || self.ports.is_empty() != ports.is_empty() {
            return Vec::new();
        }
        if ports.is_empty() {
            ports.push((None, None));
        }
        let number = self.index as u32 + 1;
        let rule = |(protocol, ports): (Option<Protocol>, Option<Vec<PortMatch>>)| {
            let mut source = EntityMatch::default();
            let mut destination = EntityMatch { ports, ..EntityMatch::default() };
            match self.direction {
                PolicyDirection::Ingress => source.any_of.clone_from(&any_of),
                PolicyDirection::Egress => destination.any_of.clone_from(&any_of),
            }
            Rule { number, protocol, source, destination, ..Rule::default() }
        };
        ports.into_iter().map(rule).collect()
    }
}

fn peer(peer: &NetworkPolicyPeer, namespace: &str, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Option<Peer> {
    if let Some(block) = &peer.ip_block {
        if peer.pod_selector.is_some() || peer.namespace_selector.is_some() {
            let help = "a peer is an ipBlock or selectors; make two peers of it to allow either".to_owned();
            report.error(at.name_of("ipBlock"), format_args!("{field}: ipBlock stands beside a selector"), help);
            return None;
        }
        return ip_block(block, at.key("ipBlock"), &format!("{field}.ipBlock"), report);
    }
    let pod_at = at.key("podSelector");
    let mut select = |selector: &LabelSelector, prefix: &str, key: &str| {
        label_selector(selector, prefix, at.key(key), &format!("{field}.{key}"), report)
    };
    let pod_selector = peer.pod_selector.as_ref().map(|selector| select(selector, "", "podSelector"));
    let namespace_selector =
        peer.namespace_selector.as_ref().map(|selector| select(selector, NAMESPACE_PREFIX, "namespaceSelector"));
    match (pod_selector, namespace_selector) {
        (None, None) => {
            let help =
                "name podSelector, namespaceSelector or ipBlock; leave the list out to allow any peer".to_owned();
            report.error(pod_at, format_args!("{field} names no peer"), help);
            None
        }
        (Some(pod_selector), None) => Some(Peer::Selector(Selector::all_of([pods_of(namespace), pod_selector]))),
        (pod_selector, Some(namespace_selector)) => {
            let in_a_namespace = Selector::Has(NAMESPACE_LABEL.to_owned());
            let pod_selector = pod_selector.unwrap_or_default();
            Some(Peer::Selector(Selector::all_of([in_a_namespace, pods(), namespace_selector, pod_selector])))
        }
    }
}

fn ip_block(block: &IPBlock, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Option<Peer> {
    if block.cidr.is_empty() {
        report.error(
            at.key("cidr"),
            format_args!("{field}.cidr is missing"),
            "write a CIDR like 192.0.2.0/24".to_owned(),
        );
        return None;
    }
    let cidr = report.read(at.key("cidr"), &format!("{field}.cidr"), parse_network(&block.cidr))?;
    let mut except = Vec::new();
    let mut is_whole = true;
    for (index, text) in block.except.iter().flatten().enumerate() {
        let at = at.key("except").item(index);
        let field = format!("{field}.except[{index}]");
        match report.read(at, &field, parse_network(text)) {
            Some(hole) if cidr.contains(&hole) && hole != cidr => except.push(hole),
            Some(hole) => {
                let help = "an exception is a part of the block".to_owned();
                report.error(at, format_args!("{field}: {hole} is not inside {cidr}"), help);
                is_whole = false;
            }
            None => is_whole = false,
        }
    }
    is_whole.then_some(Peer::Block { cidr, except })
}

type PortsOfRule = (Option<Protocol>, Option<Vec<PortMatch>>);

fn policy_port(port: &NetworkPolicyPort, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Option<PortsOfRule> {
    let protocol = protocol(port.protocol.as_deref(), at.key("protocol"), field, report);
    let end_at = at.key("endPort");
    let ports = match (&port.port, port.end_port) {
        (None, None) => None,
        (None, Some(_)) => {
            let help = "write port: FIRST, the first port of the range".to_owned();
            report.error(end_at, format_args!("{field}.endPort stands without port"), help);
            return None;
        }
        (Some(IntOrString::String(name)), Some(_)) => {
            let help = "write the number of the range's first port".to_owned();
            report.error(end_at, format_args!("{field}.endPort after the named port {name:?}"), help);
            return None;
        }
        (Some(IntOrString::String(name)), None) => {
            let has_letter = name.bytes().any(|byte| byte.is_ascii_lowercase());
            let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
            if !has_letter || name.len() > 15 || !name.bytes().all(known) {
                let help = match name.parse::<u16>() {
                    Ok(number) => format!("remove the quotes: {number}"),
                    Err(_) => "a port's name has up to 15 small letters, digits and dashes".to_owned(),
                };
                report.error(at.key("port"), format_args!("{field}.port: {name:?} cannot be a port's name"), help);
                return None;
            }
            Some(vec![PortMatch::Named(name.clone())])
        }
        (Some(IntOrString::Int(first)), end) => {
            let first = port_number(*first, at.key("port"), &format!("{field}.port"), report);
            let last = match end {
                Some(last) => port_number(last, end_at, &format!("{field}.endPort"), report),
                None => first,
            };
            let (first, last) = (first?, last?);
            if last < first {
                let help = "a range goes up: port is its first, endPort its last".to_owned();
                report.error(end_at, format_args!("{field}.endPort {last} is less than port {first}"), help);
                return None;
            }
            Some(vec![PortMatch::Range(first, last)])
        }
    };
    Some((Some(protocol?), ports))
}
