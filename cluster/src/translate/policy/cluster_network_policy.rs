//! ClusterNetworkPolicy: policies of the tiers before and after that of NetworkPolicies.

use ipnet::IpNet;
use weir_dataplane::model::Cluster;
use weir_packet::Protocol;
use weir_policy::{
    PolicyDirection, Selector,
    model::{Action, EntityMatch, Peer, Policy, PortMatch, Rule},
};

use super::{
    PolicyName,
    labels::{NAMESPACE_LABEL, NAMESPACE_PREFIX},
    rules::network,
    selectors::{label_selector, pods},
    tiers::{ADMIN_TIER, BASELINE_TIER},
};
use crate::{
    resources::{
        Manifests, Object,
        at::{At, Reporter},
        cluster_network_policy::{
            ClusterAction, ClusterNetworkPolicy, ClusterTier, DestinationPort, EgressPeer, EgressRule, NamespacedPods,
            ProtocolMatch,
        },
        meta::LabelSelector,
    },
    text::Problems,
    translate::services::port_number,
};

const MAX_PRIORITY: u16 = 1000;

/// The nodes that egress rules may name.
pub(super) struct Nodes<'m> {
    manifests: &'m Manifests,
    /// In the order of the manifests.
    cluster: &'m Cluster,
}

impl<'m> Nodes<'m> {
    pub(super) fn new(manifests: &'m Manifests, cluster: &'m Cluster) -> Self {
        debug_assert_eq!(manifests.nodes().len(), cluster.nodes.len());
        Self { manifests, cluster }
    }

    /// The IP addresses in status.addresses of the nodes that `selector` selects, which is what the API says that nodes are. A tunnel's
    /// address is none of these.
    fn selected(&self, selector: &Selector) -> Vec<Peer> {
        let nodes = self.manifests.nodes().iter().zip(&self.cluster.nodes);
        let selected = nodes.filter(|(object, _)| selector.matches(&object.value.metadata.labels.to_map()));
        let addresses = selected.flat_map(|(_, node)| node.internal_ips.iter().chain(&node.other_ips));
        addresses.map(|address| Peer::Block { cidr: IpNet::from(*address), except: Vec::new() }).collect()
    }
}

/// Whether a policy says something about nodes, which are other objects.
pub(super) fn names_nodes(policy: &ClusterNetworkPolicy) -> bool {
    policy.spec.egress.iter().flat_map(|rule| &rule.to).any(|peer| peer.nodes.is_some())
}

/// The policy and its tier.
pub(super) fn cluster_network_policy(
    object: &Object<ClusterNetworkPolicy>,
    nodes: &Nodes<'_>,
    problems: &mut Problems,
) -> (&'static str, Policy) {
    let mut report = object.reporter(problems);
    let (spec, at) = (&object.value.spec, object.at().key("spec"));
    if spec.priority > MAX_PRIORITY {
        let message = format_args!("spec.priority: {} is more than {MAX_PRIORITY}", spec.priority);
        report.error(at.key("priority"), message, "lower numbers come first".to_owned());
    }
    let subject_at = at.key("subject");
    let subject = selected(&spec.subject.namespaces, &spec.subject.pods, subject_at, "spec.subject", &mut report);
    if subject.len() != 1 {
        let help = "name namespaces or pods".to_owned();
        report.error(subject_at, "spec.subject is not one of namespaces, pods", help);
    }
    let mut ingress = Vec::new();
    for (index, rule) in spec.ingress.iter().enumerate() {
        let (at, field) = (at.key("ingress").item(index), format!("spec.ingress[{index}]"));
        let mut peers = Vec::new();
        for (number, peer) in rule.from.iter().enumerate() {
            let (at, field) = (at.key("from").item(number), format!("{field}.from[{number}]"));
            let read = selected(&peer.namespaces, &peer.pods, at, &field, &mut report);
            peers.extend(one_of(read, "namespaces, pods", at, &field, &mut report).into_iter().map(Peer::Selector));
        }
        let names_peers = !rule.from.is_empty();
        let rule = RuleParts { index, action: rule.action, names_peers, peers, protocols: &rule.protocols };
        ingress.extend(rule.rules(PolicyDirection::Ingress, at, &field, &mut report));
    }
    let mut egress = Vec::new();
    for (index, rule) in spec.egress.iter().enumerate() {
        let (at, field) = (at.key("egress").item(index), format!("spec.egress[{index}]"));
        let mut peers = Vec::new();
        for (number, peer) in rule.to.iter().enumerate() {
            let (at, field) = (at.key("to").item(number), format!("{field}.to[{number}]"));
            peers.extend(egress_peers(peer, nodes, at, &field, &mut report));
        }
        named_ports_of_addresses(rule, at, &field, &mut report);
        let names_peers = !rule.to.is_empty();
        let rule = RuleParts { index, action: rule.action, names_peers, peers, protocols: &rule.protocols };
        egress.extend(rule.rules(PolicyDirection::Egress, at, &field, &mut report));
    }
    let tier = match spec.tier {
        ClusterTier::Admin => ADMIN_TIER,
        ClusterTier::Baseline => BASELINE_TIER,
    };
    let policy = Policy {
        order: Some(f64::from(spec.priority)),
        selector: subject.into_iter().next().unwrap_or_default(),
        ingress: (!spec.ingress.is_empty()).then_some(ingress),
        egress: (!spec.egress.is_empty()).then_some(egress),
        ..PolicyName::of("ClusterNetworkPolicy", object).policy(object.origin)
    };
    (tier, policy)
}

/// What `namespaces` and `pods` select, each that is given.
fn selected(
    namespaces: &Option<LabelSelector>,
    pods: &Option<NamespacedPods>,
    at: At<'_>,
    field: &str,
    report: &mut Reporter<'_>,
) -> Vec<Selector> {
    let mut select = |selector: &LabelSelector, prefix: &str, at: At<'_>, key: &str| {
        label_selector(selector, prefix, at, &format!("{field}.{key}"), report)
    };
    let all_of = |parts: [Selector; 2]| {
        let known = [Selector::Has(NAMESPACE_LABEL.to_owned()), self::pods()];
        Selector::all_of(known.into_iter().chain(parts))
    };
    let mut selected = Vec::new();
    if let Some(namespaces) = namespaces {
        let namespaces = select(namespaces, NAMESPACE_PREFIX, at.key("namespaces"), "namespaces");
        selected.push(all_of([namespaces, Selector::All]));
    }
    if let Some(pods) = pods {
        let at = at.key("pods");
        let namespaces =
            select(&pods.namespace_selector, NAMESPACE_PREFIX, at.key("namespaceSelector"), "pods.namespaceSelector");
        let own = select(&pods.pod_selector, "", at.key("podSelector"), "pods.podSelector");
        selected.push(all_of([namespaces, own]));
    }
    selected
}

/// A union of which one member is given.
fn one_of<T>(read: Vec<T>, of: &str, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Option<T> {
    let is_one = read.len() == 1;
    if !is_one {
        let help = "give one; make two of it to say either".to_owned();
        report.error(at, format_args!("{field} is not one of: {of}"), help);
    }
    read.into_iter().next().filter(|_| is_one)
}

/// What has addresses and no containers calls no port by a name.
fn named_ports_of_addresses(rule: &EgressRule, at: At<'_>, field: &str, report: &mut Reporter<'_>) {
    let has_addresses = |peer: &EgressPeer| peer.networks.is_some() || peer.nodes.is_some();
    if !rule.to.iter().any(has_addresses) {
        return;
    }
    for (index, _) in rule.protocols.iter().enumerate().filter(|(_, entry)| entry.destination_named_port.is_some()) {
        let at = at.key("protocols").item(index).key("destinationNamedPort");
        let message = format_args!("{field}.protocols[{index}].destinationNamedPort stands beside networks or nodes");
        report.error(at, message, "only pods' ports have names: write a number, or make two rules of it".to_owned());
    }
}

fn egress_peers(peer: &EgressPeer, nodes: &Nodes<'_>, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Vec<Peer> {
    if peer.domain_names.is_some() {
        let help = "weir does not follow DNS: write addresses as networks".to_owned();
        report.error(at.name_of("domainNames"), format_args!("{field}.domainNames is not enforced"), help);
        return Vec::new();
    }
    let mut read: Vec<Vec<Peer>> = selected(&peer.namespaces, &peer.pods, at, field, report)
        .into_iter()
        .map(|selector| vec![Peer::Selector(selector)])
        .collect();
    if let Some(networks) = &peer.networks {
        let at = at.key("networks");
        let cidrs = networks
            .iter()
            .enumerate()
            .filter_map(|(index, text)| network(text, at.item(index), &format!("{field}.networks[{index}]"), report));
        read.push(cidrs.map(|cidr| Peer::Block { cidr, except: Vec::new() }).collect());
    }
    if let Some(selector) = &peer.nodes {
        let selector = label_selector(selector, "", at.key("nodes"), &format!("{field}.nodes"), report);
        read.push(nodes.selected(&selector));
    }
    one_of(read, "namespaces, pods, nodes, networks", at, field, report).unwrap_or_default()
}

/// A rule whose peers are read.
struct RuleParts<'p> {
    index: usize,
    action: ClusterAction,
    names_peers: bool,
    /// May be none: where no node has the labels, say.
    peers: Vec<Peer>,
    protocols: &'p [ProtocolMatch],
}

impl RuleParts<'_> {
    /// One rule for each protocol entry.
    fn rules(self, direction: PolicyDirection, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Vec<Rule> {
        if !self.names_peers {
            let key = if direction == PolicyDirection::Ingress { "from" } else { "to" };
            let help = "name at least one peer; namespaces: {} is all pods".to_owned();
            report.error(at.key(key), format_args!("{field}.{key} names no peer"), help);
        }
        let mut ports = Vec::new();
        for (index, entry) in self.protocols.iter().enumerate() {
            let (at, field) = (at.key("protocols").item(index), format!("{field}.protocols[{index}]"));
            ports.extend(protocol(entry, at, &field, report));
        }
        if ports.is_empty() {
            ports.push((None, None));
        }
        let rule = |(protocol, ports): (Option<Protocol>, Option<Vec<PortMatch>>)| {
            // An empty list of peers would be no condition; an empty list of networks is one that nothing meets.
            let nobody = self.peers.is_empty().then(Vec::new);
            let peers = EntityMatch { any_of: self.peers.clone(), nets: nobody, ..EntityMatch::default() };
            let (source, mut destination) = match direction {
                PolicyDirection::Ingress => (peers, EntityMatch::default()),
                PolicyDirection::Egress => (EntityMatch::default(), peers),
            };
            destination.ports = ports;
            let action = match self.action {
                ClusterAction::Accept => Action::Allow,
                ClusterAction::Deny => Action::Deny,
                ClusterAction::Pass => Action::Pass,
            };
            Rule { number: self.index as u32 + 1, action, protocol, source, destination, ..Rule::default() }
        };
        ports.into_iter().map(rule).collect()
    }
}

type PortsOfRule = (Option<Protocol>, Option<Vec<PortMatch>>);

fn protocol(entry: &ProtocolMatch, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Option<PortsOfRule> {
    let mut read: Vec<PortsOfRule> = Vec::new();
    for (key, protocol, given) in
        [("tcp", Protocol::TCP, &entry.tcp), ("udp", Protocol::UDP, &entry.udp), ("sctp", Protocol::SCTP, &entry.sctp)]
    {
        if let Some(destination) = given {
            let ports = destination.destination_port.as_ref().map(|port| {
                let (at, field) = (at.key(key).key("destinationPort"), format!("{field}.{key}.destinationPort"));
                destination_port(port, at, &field, report).into_iter().collect()
            });
            read.push((Some(protocol), ports));
        }
    }
    if let Some(name) = &entry.destination_named_port {
        // The port's own protocol counts.
        read.push((None, Some(vec![PortMatch::Named(name.clone())])));
    }
    one_of(read, "tcp, udp, sctp, destinationNamedPort", at, field, report)
}

fn destination_port(port: &DestinationPort, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Option<PortMatch> {
    let mut read = Vec::new();
    if let Some(number) = port.number {
        let number = port_number(number, at.key("number"), &format!("{field}.number"), report)?;
        read.push(PortMatch::Range(number, number));
    }
    if let Some(range) = &port.range {
        let at = at.key("range");
        let start = port_number(range.start, at.key("start"), &format!("{field}.range.start"), report)?;
        let end = port_number(range.end, at.key("end"), &format!("{field}.range.end"), report)?;
        if end < start {
            let help = "a range goes up".to_owned();
            report.error(at.key("end"), format_args!("{field}.range: {end} is less than {start}"), help);
        }
        read.push(PortMatch::Range(start, end));
    }
    one_of(read, "number, range", at, field, report)
}
