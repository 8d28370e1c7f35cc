//! Kubernetes NetworkPolicy, and what it selects, in the terms of Calico's evaluation.
//!
//! All NetworkPolicies form the tier "default" (Deny at its end), so a pod that one of them selects is isolated in its
//! directions; a pod that none selects reaches its profile `kns.NAMESPACE`, which allows everything.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use ipnet::IpNet;
use k8s_openapi::{
    api::{
        core::v1::Pod,
        networking::v1::{IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};
use weir_dataplane::model::Cluster;
use weir_packet::Protocol;
use weir_policy::{
    Selector,
    model::{
        Endpoint, EndpointKind, EntityMatch, Model, NamedPort, Peer, Policy, PortMatch, Profile, Rule, Tier, TierAction,
    },
};

use super::{
    cluster::{endpoint_name, endpoints_of_pods},
    services::{port_number, protocol},
};
use crate::{
    config::{Problems, RouterConfig, address::parse_network, problem::nearest, tree::Node},
    manifests::{
        Denying, Manifests, Object, ObjectId,
        at::{At, Reporter},
        calico::WorkloadEndpoint,
    },
};

const NAMESPACE_LABEL: &str = "projectcalico.org/namespace";
const ORCHESTRATOR_LABEL: &str = "projectcalico.org/orchestrator";
const SERVICE_ACCOUNT_LABEL: &str = "projectcalico.org/serviceaccount";
/// Prefix of labels that come from the namespace, and from the service account.
const NAMESPACE_PREFIX: &str = "pcns.";
const SERVICE_ACCOUNT_PREFIX: &str = "pcsa.";
const NAME_LABEL: &str = "projectcalico.org/name";
/// The label that the API server gives to every namespace.
const METADATA_NAME_LABEL: &str = "kubernetes.io/metadata.name";
/// Order of the tier "default", and of Kubernetes's policies in it.
const DEFAULT_TIER_ORDER: f64 = 1_000_000.0;
const NETWORK_POLICY_ORDER: f64 = 1000.0;

pub(super) fn translate(
    config: &RouterConfig,
    manifests: &Manifests,
    cluster: &Cluster,
    problems: &mut Problems,
) -> Model {
    let endpoints = endpoints(config, manifests, cluster, problems);
    let profiles = profiles(&endpoints);
    let policies = manifests.network_policies.iter().filter_map(|object| network_policy(object, problems));
    let policies = policies.chain(manifests.denying.iter().map(denying)).map(Arc::new).collect();
    let tier = Tier {
        name: "default".to_owned(),
        order: Some(DEFAULT_TIER_ORDER),
        default_action: TierAction::Deny,
        policies,
    };
    Model { endpoints, tiers: vec![tier], profiles }
}

type Labels = BTreeMap<String, String>;

/// Labels that things inherit.
struct Inherited<'m> {
    namespaces: HashMap<&'m str, &'m ObjectMeta>,
    service_accounts: HashMap<(&'m str, &'m str), &'m ObjectMeta>,
}

impl<'m> Inherited<'m> {
    fn new(manifests: &'m Manifests) -> Self {
        let namespaces = manifests.namespaces.iter().map(|object| (object.name.as_str(), &object.value.metadata));
        let accounts = manifests.service_accounts.iter();
        let accounts =
            accounts.map(|object| ((object.namespace.as_str(), object.name.as_str()), &object.value.metadata));
        Self { namespaces: namespaces.collect(), service_accounts: accounts.collect() }
    }

    /// The labels of a pod: inherited ones first, so that its own win.
    fn labels(&self, namespace: &str, service_account: &str, own: Option<&Labels>) -> Labels {
        let mut labels = Labels::new();
        let metadata_name = (format!("{NAMESPACE_PREFIX}{METADATA_NAME_LABEL}"), namespace.to_owned());
        labels.extend([metadata_name]);
        let namespace_labels = self.namespaces.get(namespace).and_then(|metadata| metadata.labels.as_ref());
        let account = self.service_accounts.get(&(namespace, service_account));
        let account_labels = account.and_then(|metadata| metadata.labels.as_ref());
        for (prefix, name, inherited) in
            [(NAMESPACE_PREFIX, namespace, namespace_labels), (SERVICE_ACCOUNT_PREFIX, service_account, account_labels)]
        {
            let inherited = inherited.into_iter().flatten();
            labels.extend(inherited.map(|(key, value)| (format!("{prefix}{key}"), value.clone())));
            labels.insert(format!("{prefix}{NAME_LABEL}"), name.to_owned());
        }
        labels.extend(own.into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
        labels.insert(NAMESPACE_LABEL.to_owned(), namespace.to_owned());
        labels.insert(ORCHESTRATOR_LABEL.to_owned(), "k8s".to_owned());
        labels.insert(SERVICE_ACCOUNT_LABEL.to_owned(), service_account.to_owned());
        labels
    }
}

fn endpoints(
    config: &RouterConfig,
    manifests: &Manifests,
    cluster: &Cluster,
    problems: &mut Problems,
) -> Vec<Arc<Endpoint>> {
    let inherited = Inherited::new(manifests);
    let pods: HashMap<String, &Object<Pod>> =
        manifests.pods.iter().map(|object| (object.full_name(), object)).collect();
    let of_pods = endpoints_of_pods(manifests);
    let others: HashMap<String, &Object<WorkloadEndpoint>> =
        manifests.workload_endpoints.iter().map(|object| (endpoint_name(object), object)).collect();
    let mut endpoints = Vec::with_capacity(cluster.workloads.len());
    for workload in &cluster.workloads {
        let pod = pods.get(&workload.name);
        let calico = of_pods.get(&workload.name).or_else(|| others.get(&workload.name));
        let Some(namespace) = pod.map(|pod| &pod.namespace).or(calico.map(|object| &object.namespace)) else {
            continue;
        };
        let spec = pod.and_then(|pod| pod.value.spec.as_ref());
        let given = spec.and_then(|spec| spec.service_account_name.as_ref().or(spec.service_account.as_ref()));
        let given = given.or_else(|| calico.and_then(|object| object.value.spec.service_account_name.as_ref()));
        let account = given.map(String::as_str).filter(|name| !name.is_empty()).unwrap_or("default");
        let own = match (pod, calico) {
            (Some(pod), _) => pod.value.metadata.labels.as_ref(),
            (None, calico) => calico.and_then(|object| object.value.metadata.labels.as_ref()),
        };
        let mut ports = pod.map_or(Vec::new(), |pod| container_ports(pod, problems));
        if let Some(calico) = calico {
            ports.extend(endpoint_ports(calico, problems));
        }
        let of_kubernetes = || vec![format!("kns.{namespace}"), format!("ksa.{namespace}.{account}")];
        endpoints.push(Arc::new(Endpoint {
            name: workload.name.clone(),
            kind: EndpointKind::Workload,
            local: workload.node.as_deref() == Some(config.node_name.as_str()),
            namespace: Some(namespace.clone()),
            labels: inherited.labels(namespace, account, own),
            nets: workload.addresses.iter().map(|address| IpNet::from(*address)).collect(),
            ports,
            profiles: calico.map_or_else(of_kubernetes, |object| object.value.spec.profiles.clone()),
        }));
    }
    endpoints
}

/// Kubernetes's own profiles: `kns.NAMESPACE` allows everything, `ksa.NAMESPACE.ACCOUNT` has no rules.
fn profiles(endpoints: &[Arc<Endpoint>]) -> Vec<Arc<Profile>> {
    let names: BTreeSet<&String> = endpoints.iter().flat_map(|endpoint| &endpoint.profiles).collect();
    let allow = || vec![Rule { number: 1, ..Rule::default() }];
    names
        .into_iter()
        .filter_map(|name| match name {
            name if name.starts_with("kns.") => Some(Profile { name: name.clone(), ingress: allow(), egress: allow() }),
            name if name.starts_with("ksa.") => Some(Profile { name: name.clone(), ..Profile::default() }),
            _ => None,
        })
        .map(Arc::new)
        .collect()
}

fn container_ports(object: &Object<Pod>, problems: &mut Problems) -> Vec<NamedPort> {
    let mut report = object.reporter(problems);
    let Some(spec) = &object.value.spec else { return Vec::new() };
    let spec_at = object.at().key("spec");
    let mut ports = Vec::new();
    // Init containers that go on running (sidecars) have ports too.
    let init_containers = spec.init_containers.as_deref().unwrap_or_default();
    for (list, containers) in [("containers", spec.containers.as_slice()), ("initContainers", init_containers)] {
        for (index, container) in containers.iter().enumerate() {
            for (number, port) in container.ports.iter().flatten().enumerate() {
                let at = spec_at.key(list).item(index).key("ports").item(number);
                let field = format!("spec.{list}[{index}].ports[{number}]");
                let protocol = protocol(port.protocol.as_deref(), at.key("protocol"), &field, &mut report);
                let container_port = format!("{field}.containerPort");
                let port_at = at.key("containerPort");
                let number = port_number(port.container_port, port_at, &container_port, &mut report);
                if let (Some(protocol), Some(port_number), Some(name)) = (protocol, number, &port.name) {
                    ports.push(NamedPort { name: name.clone(), protocol, port: port_number });
                }
            }
        }
    }
    ports
}

fn endpoint_ports(object: &Object<WorkloadEndpoint>, problems: &mut Problems) -> Vec<NamedPort> {
    let mut report = object.reporter(problems);
    let at = object.at().key("spec").key("ports");
    let mut ports = Vec::new();
    for (index, port) in object.value.spec.ports.iter().enumerate() {
        let protocol = match &port.protocol {
            None => Some(Protocol::TCP),
            Some(IntOrString::Int(number)) => u8::try_from(*number).ok().map(Protocol),
            Some(IntOrString::String(name)) => Protocol::from_name(name),
        };
        match (protocol, &port.name) {
            (Some(protocol), Some(name)) => ports.push(NamedPort { name: name.clone(), protocol, port: port.port }),
            (Some(_), None) => {}
            (None, _) => {
                let help = "write a name like TCP, or a number up to 255".to_owned();
                report.error(
                    at.item(index).key("protocol"),
                    format_args!("spec.ports[{index}].protocol is not known"),
                    help,
                );
            }
        }
    }
    ports
}

fn network_policy(object: &Object<NetworkPolicy>, problems: &mut Problems) -> Option<Policy> {
    let mut report = object.reporter(problems);
    let at = object.at().key("spec");
    let Some(spec) = &object.value.spec else {
        report.error(object.at(), "spec is missing", "a policy says at least whom it selects: podSelector".to_owned());
        return None;
    };
    let own = spec.pod_selector.clone().unwrap_or_default();
    let own = label_selector(&own, "", at.key("podSelector"), "spec.podSelector", &mut report);
    let ingress = spec.ingress.as_deref().unwrap_or_default();
    let egress = spec.egress.as_deref().unwrap_or_default();
    let ingress = ingress.iter().enumerate().map(|(index, rule)| Sides {
        index,
        direction: Direction::Ingress,
        peers: rule.from.as_deref().unwrap_or_default(),
        ports: rule.ports.as_deref().unwrap_or_default(),
    });
    let egress_rules = egress.iter().enumerate().map(|(index, rule)| Sides {
        index,
        direction: Direction::Egress,
        peers: rule.to.as_deref().unwrap_or_default(),
        ports: rule.ports.as_deref().unwrap_or_default(),
    });
    let namespace = object.namespace.as_str();
    let ingress: Vec<Rule> = ingress.flat_map(|rule| rule.translate(namespace, at, &mut report)).collect();
    let egress_rules: Vec<Rule> = egress_rules.flat_map(|rule| rule.translate(namespace, at, &mut report)).collect();
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
    Some(Policy {
        name: format!("NetworkPolicy/{}", object.full_name()),
        // Calico's own name for it, then its namespace: names are unique within a namespace only.
        sort_name: format!("knp.default.{}/{namespace}", object.name),
        order: Some(NETWORK_POLICY_ORDER),
        selector: Selector::all_of([pods_of(namespace), own]),
        staged: false,
        ingress: governs_ingress.then_some(ingress),
        egress: governs_egress.then_some(egress_rules),
        origin: object.origin,
    })
}

/// What stands for a policy that cannot be read: it selects the same pods, or all of its namespace, and allows nothing.
fn denying(policy: &Denying) -> Policy {
    let ObjectId { namespace, name, .. } = &policy.id;
    let mut problems = Problems::default();
    let node = Node::null();
    let own = policy.pod_selector.as_ref().map(|selector| {
        let mut report = Reporter::new(&mut problems, String::new());
        label_selector(selector, "", At::root(&node), "", &mut report)
    });
    let own = own.filter(|_| !problems.has_errors());
    Policy {
        name: format!("NetworkPolicy/{namespace}/{name}"),
        sort_name: format!("knp.default.{name}/{namespace}"),
        order: Some(NETWORK_POLICY_ORDER),
        selector: Selector::all_of(std::iter::once(pods_of(namespace)).chain(own)),
        staged: false,
        ingress: Some(Vec::new()),
        egress: Some(Vec::new()),
        origin: policy.origin,
    }
}

/// The pods of a namespace.
fn pods_of(namespace: &str) -> Selector {
    Selector::all_of([Selector::Equals(NAMESPACE_LABEL.to_owned(), namespace.to_owned()), pods()])
}

/// All pods, and nothing else that has labels.
fn pods() -> Selector {
    Selector::Equals(ORCHESTRATOR_LABEL.to_owned(), "k8s".to_owned())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Ingress,
    Egress,
}

/// An ingress or egress rule.
struct Sides<'p> {
    index: usize,
    direction: Direction,
    peers: &'p [NetworkPolicyPeer],
    ports: &'p [NetworkPolicyPort],
}

impl Sides<'_> {
    /// One rule for each port entry. A rule whose peers are all at fault gives none, so that it cannot become one for
    /// any peer.
    fn translate(&self, namespace: &str, spec_at: At<'_>, report: &mut Reporter<'_>) -> Vec<Rule> {
        let (direction, peers_key) = match self.direction {
            Direction::Ingress => ("ingress", "from"),
            Direction::Egress => ("egress", "to"),
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
                Direction::Ingress => source.any_of.clone_from(&any_of),
                Direction::Egress => destination.any_of.clone_from(&any_of),
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

/// A Kubernetes label selector; `prefix` stands before the keys of inherited labels. What is at fault selects nothing.
fn label_selector(
    selector: &LabelSelector,
    prefix: &str,
    at: At<'_>,
    field: &str,
    report: &mut Reporter<'_>,
) -> Selector {
    let mut parts = Vec::new();
    for (key, value) in selector.match_labels.iter().flatten() {
        let at = at.key("matchLabels").key(key);
        check_label_value(value, at, &format!("{field}.matchLabels.{key}"), report);
        parts.push(Selector::Equals(format!("{prefix}{key}"), value.clone()));
    }
    for (index, expression) in selector.match_expressions.iter().flatten().enumerate() {
        let at = at.key("matchExpressions").item(index);
        let field = format!("{field}.matchExpressions[{index}]");
        let key = format!("{prefix}{}", expression.key);
        if expression.key.is_empty() {
            report.error(at.key("key"), format_args!("{field}.key is missing"), None);
        }
        let values = expression.values.as_deref().unwrap_or_default();
        for (index, value) in values.iter().enumerate() {
            check_label_value(value, at.key("values").item(index), &format!("{field}.values[{index}]"), report);
        }
        let operator = expression.operator.as_str();
        match operator {
            "In" | "NotIn" if values.is_empty() => {
                let help = "write the values, or use Exists or DoesNotExist".to_owned();
                report.error(at.key("values"), format_args!("{field}: {operator} needs values"), help);
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                let help = "take the values out, or use In or NotIn".to_owned();
                report.error(at.key("values"), format_args!("{field}: {operator} has no values"), help);
            }
            "In" => parts.push(Selector::In(key, values.iter().cloned().collect())),
            "NotIn" => parts.push(Selector::NotIn(key, values.iter().cloned().collect())),
            "Exists" => parts.push(Selector::Has(key)),
            "DoesNotExist" => parts.push(Selector::lacks(key)),
            other => {
                let known = ["In", "NotIn", "Exists", "DoesNotExist"];
                let help = match nearest(other, known) {
                    Some(name) => format!("did you mean {name}?"),
                    None => format!("it is one of {}", known.join(", ")),
                };
                report.error(at.key("operator"), format_args!("{field}.operator: {other:?} is not known"), help);
            }
        }
    }
    Selector::all_of(parts)
}

/// Kubernetes: at most 63 characters, letters and digits at both ends.
fn check_label_value(value: &str, at: At<'_>, field: &str, report: &mut Reporter<'_>) {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let end = |byte: Option<u8>| byte.is_none_or(|byte| byte.is_ascii_alphanumeric());
    let bytes = value.as_bytes();
    if value.len() > 63 || !value.bytes().all(inner) || !end(bytes.first().copied()) || !end(bytes.last().copied()) {
        let help =
            "a label's value has up to 63 letters, digits, '-', '_' and '.', and begins and ends with a letter or \
                    digit"
                .to_owned();
        report.error(at, format_args!("{field}: {value:?} cannot be a label's value"), help);
    }
}
