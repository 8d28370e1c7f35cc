//! What is valid and served, but probably not what its author meant: only `weir check` looks for it, since it takes a look at everything.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use weir_dataplane::model::Cluster;

use crate::{
    config::RouterConfig,
    resources::{
        Base, List, Manifests, Object,
        at::{At, Reporter},
        kubernetes::{EndpointSlice, SERVICE_NAME_LABEL, Service, ServiceSpec},
        object::Readable,
    },
    text::{
        Problems,
        address::{parse_cidr, parse_ip},
        problem::nearest,
        tree::{self, Node},
    },
};

/// Keys whose values are prefixes, in weir.yaml and in the specs of resources. Where host bits mean an address, as in a Calico node's
/// annotation or a device's addresses, they are right.
const PREFIX_KEYS: [&str; 11] = [
    "cidr",
    "except",
    "loadBalancerSourceRanges",
    "nets",
    "nodePortAddresses",
    "notNets",
    "podCIDR",
    "podCIDRs",
    "serviceCIDRs",
    "to",
    "networks",
];

pub(super) fn review(config: &RouterConfig, manifests: &Manifests, cluster: &Cluster, problems: &mut Problems) {
    let owners = Owners::of(config, manifests, cluster);
    let slices = Slices::of(manifests);
    let mut claimed = HashMap::new();
    for object in manifests.services() {
        if let Some(spec) = object.value.spec.as_ref().filter(|spec| spec.type_.as_deref() != Some("ExternalName")) {
            let mut report = object.reporter(problems);
            addresses_of_others(object, spec, &owners, &mut claimed, &mut report);
            open_ways(object, spec, &mut report);
            backends(object, spec, &slices, &mut report);
        }
    }
    dangling_slices(manifests, problems);
    nodes_and_namespaces(manifests, problems);
    ranges_with_nodes(manifests, cluster, problems);
    let mut yaml = Problems::default();
    let file = yaml.share_source(Arc::clone(problems.source(0)));
    for root in tree::read_documents(file, &mut yaml) {
        host_bits(&root, Base { file, offset: 0 }, &mut Reporter::new(problems, "weir.yaml".to_owned()));
    }
    host_bits_of(manifests.services(), problems);
    host_bits_of(manifests.network_policies(), problems);
    host_bits_of(manifests.pools(), problems);
    host_bits_of(manifests.nodes(), problems);
    host_bits_of(manifests.calico_network_policies(), problems);
    host_bits_of(manifests.global_network_policies(), problems);
    host_bits_of(manifests.cluster_network_policies(), problems);
    host_bits_of(manifests.network_sets(), problems);
}

/// Whose an address is.
struct Owners<'m> {
    pods: HashMap<IpAddr, &'m str>,
    nodes: HashMap<IpAddr, &'m str>,
    cluster_ips: HashMap<IpAddr, String>,
    pod_cidrs: &'m [IpNet],
    service_cidrs: &'m [IpNet],
}

impl<'m> Owners<'m> {
    fn of(config: &'m RouterConfig, manifests: &Manifests, cluster: &'m Cluster) -> Self {
        let workloads = cluster.workloads.iter();
        let pods = workloads.flat_map(|pod| pod.addresses.iter().map(|address| (*address, pod.name.as_str())));
        let nodes = cluster.nodes.iter().flat_map(|node| {
            node.internal_ips.iter().chain(&node.other_ips).map(|address| (*address, node.name.as_str()))
        });
        let mut cluster_ips = HashMap::new();
        for object in manifests.services() {
            let Some(spec) = &object.value.spec else { continue };
            let texts = spec.cluster_ips.iter().chain(&spec.cluster_ip);
            for address in texts.filter_map(|text| parse_ip(text).ok()) {
                cluster_ips.insert(address, object.full_name());
            }
        }
        Self {
            pods: pods.collect(),
            nodes: nodes.collect(),
            cluster_ips,
            pod_cidrs: &cluster.pod_cidrs,
            service_cidrs: &config.service_cidrs,
        }
    }

    /// What else an external address of `service` is.
    fn other_use(&self, address: IpAddr, service: &str) -> Option<String> {
        let inside = |nets: &'m [IpNet]| nets.iter().find(|net| net.contains(&address));
        if let Some(pod) = self.pods.get(&address) {
            return Some(format!("the address of pod {pod}, which is not reached at this port any more"));
        }
        if let Some(node) = self.nodes.get(&address) {
            return Some(format!("the address of node {node}, whose own process at this port is not reached any more"));
        }
        if let Some(other) = self.cluster_ips.get(&address) {
            let whose = if other == service { "its own cluster IP" } else { other.as_str() };
            return Some(if other == service {
                format!("{whose} too")
            } else {
                format!("the cluster IP of service {whose}, which wins")
            });
        }
        if let Some(net) = inside(self.pod_cidrs) {
            return Some(format!("inside the pods' range {net}: a pod may get it"));
        }
        inside(self.service_cidrs).map(|net| format!("inside serviceCIDRs {net}: another service may get it"))
    }
}

type Claimed = HashMap<(IpAddr, i32, String), String>;

/// External IPs and load balancer IPs that belong to somebody else.
fn addresses_of_others(
    object: &Object<Service>,
    spec: &ServiceSpec,
    owners: &Owners<'_>,
    claimed: &mut Claimed,
    report: &mut Reporter<'_>,
) {
    let name = object.full_name();
    let external = spec.external_ips.iter().enumerate().map(|(index, text)| {
        (object.at().key("spec").key("externalIPs").item(index), format!("spec.externalIPs[{index}]"), &**text)
    });
    let ingress = object.value.ingress.iter().enumerate();
    let ingress = ingress.filter(|(_, ingress)| ingress.ip_mode.as_deref() != Some("Proxy"));
    let ingress = ingress.filter_map(|(index, ingress)| {
        let at = object.at().key("status").key("loadBalancer").key("ingress").item(index).key("ip");
        Some((at, format!("status.loadBalancer.ingress[{index}].ip"), ingress.ip.as_deref()?))
    });
    for (at, field, text) in external.chain(ingress) {
        let Ok(address) = parse_ip(text.trim()) else { continue };
        if let Some(use_of_it) = owners.other_use(address, &name) {
            let help = "give it an address that nothing else has".to_owned();
            report.warning(at, format_args!("{field}: {address} is {use_of_it}"), help);
            continue;
        }
        for port in spec.ports.iter() {
            let protocol = port.protocol.as_deref().unwrap_or("TCP").to_owned();
            let other = claimed.entry((address, port.port, protocol)).or_insert_with(|| name.clone());
            if *other != name {
                let message = format!("{field}: port {} of {address} is service {other}'s too, which wins", port.port);
                report.warning(at, message, "give one of them another port or address".to_owned());
            }
        }
    }
}

/// Settings that do not keep what they seem to promise.
fn open_ways(object: &Object<Service>, spec: &ServiceSpec, report: &mut Reporter<'_>) {
    let at = object.at().key("spec");
    let is_local = spec.external_traffic_policy.as_deref() == Some("Local");
    if spec.session_affinity.as_deref() == Some("ClientIP") && is_local {
        let help = "use externalTrafficPolicy: Cluster, or a load balancer that keeps clients to nodes".to_owned();
        let message = "spec.sessionAffinity ClientIP with externalTrafficPolicy Local: each node keeps its own clients, \
                       so one that the load balancer sends to another node changes its backend";
        report.warning(at.key("sessionAffinity"), message, help);
    }
    if !spec.load_balancer_source_ranges.is_empty() {
        let ports = spec.ports.iter().filter_map(|port| port.node_port.filter(|port| *port != 0));
        let mut open: Vec<String> = ports.map(|port| format!("node port {port}")).collect();
        open.extend(spec.external_ips.iter().map(|address| format!("external IP {address}")));
        if !open.is_empty() {
            let help =
                "they guard load balancer IPs only; set allocateLoadBalancerNodePorts: false, or guard nodes by policy";
            let message = format!("spec.loadBalancerSourceRanges do not guard {}", open.join(", "));
            report.warning(at.key("loadBalancerSourceRanges"), message, help.to_owned());
        }
    }
}

/// The ports that the slices of each service have: name and protocol.
struct Slices<'m>(HashMap<(&'m str, &'m str), BTreeSet<(&'m str, &'m str)>>);

impl<'m> Slices<'m> {
    fn of(manifests: &'m Manifests) -> Self {
        let mut all: HashMap<_, BTreeSet<_>> = HashMap::new();
        for object in manifests.endpoint_slices() {
            let Some(service) = service_of(object) else { continue };
            all.entry((object.namespace.as_ref(), service)).or_default().extend(slice_ports(object));
        }
        Self(all)
    }
}

/// The service that a slice is of.
fn service_of(object: &Object<EndpointSlice>) -> Option<&str> {
    let name = object.value.labels.service.as_deref()?;
    (!name.is_empty()).then_some(name)
}

fn slice_ports(object: &Object<EndpointSlice>) -> impl Iterator<Item = (&str, &str)> {
    object
        .value
        .ports
        .iter()
        .map(|port| (port.name.as_deref().unwrap_or_default(), port.protocol.as_deref().unwrap_or("TCP")))
}

/// Services that nothing gives backends to, as a whole or for one port.
fn backends(object: &Object<Service>, spec: &ServiceSpec, slices: &Slices<'_>, report: &mut Reporter<'_>) {
    if spec.cluster_ip.as_deref() == Some("None") {
        return;
    }
    let at = object.at();
    let Some(known) = slices.0.get(&(object.namespace.as_ref(), object.name.as_ref())) else {
        let (why, help) = if spec.has_selector {
            (
                "no EndpointSlice belongs to it",
                "add the output of `kubectl get endpointslices -o yaml` to the manifests",
            )
        } else {
            ("it has no selector and no EndpointSlice", "write an EndpointSlice with its label, or a selector")
        };
        let message = format!("{why}: every connection to it is rejected");
        return report.warning(at.key("metadata").key("name"), message, help.to_owned());
    };
    for (index, port) in spec.ports.iter().enumerate() {
        let (name, protocol) = (port.name.as_deref().unwrap_or_default(), port.protocol.as_deref().unwrap_or("TCP"));
        if known.contains(&(name, protocol)) {
            continue;
        }
        let at = at.key("spec").key("ports").item(index);
        let names: Vec<String> = known.iter().map(|(name, protocol)| format!("{name:?} ({protocol})")).collect();
        let help = format!("its slices have {}", if names.is_empty() { "no ports".into() } else { names.join(", ") });
        let message = format!(
            "spec.ports[{index}]: no EndpointSlice of it has the port {name:?} ({protocol}): connections are rejected"
        );
        report.warning(at, message, help);
    }
}

/// Slices that belong to no service, or have ports that it does not have.
fn dangling_slices(manifests: &Manifests, problems: &mut Problems) {
    let services: HashMap<(&str, &str), &Object<Service>> =
        manifests.services().iter().map(|object| ((object.namespace.as_ref(), object.name.as_ref()), object)).collect();
    for object in manifests.endpoint_slices() {
        let Some(name) = service_of(object) else { continue };
        let mut report = object.reporter(problems);
        let at = object.at().key("metadata").key("labels").key(SERVICE_NAME_LABEL);
        let Some(service) = services.get(&(object.namespace.as_ref(), name)) else {
            let of_namespace = services.keys().filter(|(namespace, _)| *namespace == &*object.namespace);
            let help = nearest(name, of_namespace.map(|(_, name)| *name)).map(|known| format!("did you mean {known}?"));
            report.warning(at, format_args!("there is no service {}/{name}", object.namespace), help);
            continue;
        };
        let Some(spec) = &service.value.spec else { continue };
        let ports: Vec<(&str, &str)> = spec
            .ports
            .iter()
            .map(|port| (port.name.as_deref().unwrap_or_default(), port.protocol.as_deref().unwrap_or("TCP")))
            .collect();
        for (index, port) in slice_ports(object).enumerate().filter(|(_, port)| !ports.contains(port)) {
            let at = object.at().key("ports").item(index);
            let help = match nearest(port.0, ports.iter().map(|(name, _)| *name)) {
                Some(known) => format!("did you mean {known}?"),
                None => "its name and protocol are those of one of the service's ports".to_owned(),
            };
            let message = format!("ports[{index}]: {} has no port {:?} ({})", service.subject(), port.0, port.1);
            report.warning(at, message, help);
        }
    }
}

/// Names of nodes and namespaces that do not exist. Where there are no nodes or namespaces at all, they were left out of the manifests.
fn nodes_and_namespaces(manifests: &Manifests, problems: &mut Problems) {
    let nodes: HashSet<&str> = manifests.nodes().iter().map(|node| node.name.as_ref()).collect();
    let check_node = |name: &str, field: &str, at: At<'_>, report: &mut Reporter<'_>| {
        if !nodes.is_empty() && !nodes.contains(name) {
            let help = nearest(name, nodes.iter().copied()).map(|known| format!("did you mean {known}?"));
            report.warning(at, format_args!("{field}: there is no Node {name}"), help);
        }
    };
    for object in manifests.endpoint_slices() {
        let mut seen = HashSet::new();
        let mut report = object.reporter(problems);
        for (index, endpoint) in object.value.endpoints.iter().enumerate() {
            if let Some(name) = endpoint.node_name().filter(|name| seen.insert(*name)) {
                let at = object.at().key("endpoints").item(index).key("nodeName");
                check_node(name, &format!("endpoints[{index}].nodeName"), at, &mut report);
            }
        }
    }
    for object in manifests.pods() {
        if let Some(name) = object.value.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) {
            let at = object.at().key("spec").key("nodeName");
            check_node(name, "spec.nodeName", at, &mut object.reporter(problems));
        }
    }
    let namespaces: HashSet<&str> = manifests.namespaces().iter().map(|namespace| namespace.name.as_ref()).collect();
    if namespaces.is_empty() {
        return;
    }
    fn check<T: Readable>(objects: List<'_, T>, namespaces: &HashSet<&str>, problems: &mut Problems) {
        for object in objects.iter().filter(|object| !namespaces.contains(object.namespace.as_ref())) {
            let help =
                nearest(&object.namespace, namespaces.iter().copied()).map(|known| format!("did you mean {known}?"));
            let message = format!("there is no Namespace {}, so no pod in it is protected", object.namespace);
            object.reporter(problems).warning(object.at().key("metadata").key("namespace"), message, help);
        }
    }
    check(manifests.network_policies(), &namespaces, problems);
    check(manifests.calico_network_policies(), &namespaces, problems);
}

/// Ranges of pods in which nodes have their addresses: who has one is then a matter of luck.
fn ranges_with_nodes(manifests: &Manifests, cluster: &Cluster, problems: &mut Problems) {
    let addresses = cluster.nodes.iter().flat_map(|node| node.internal_ips.iter().map(|ip| (*ip, node.name.as_str())));
    let addresses: Vec<(IpAddr, &str)> = addresses.collect();
    let check = |net: &str, at: At<'_>, field: &str, report: &mut Reporter<'_>| {
        let Ok(net) = parse_cidr(net) else { return };
        if let Some((address, node)) = addresses.iter().find(|(address, _)| net.contains(address)) {
            let help = "give pods a range of their own".to_owned();
            report.warning(at, format_args!("{field}: {net} covers {address}, the address of node {node}"), help);
        }
    };
    for object in manifests.nodes() {
        let Some(spec) = &object.value.spec else { continue };
        for (index, net) in spec.pod_cidrs.iter().enumerate() {
            let at = object.at().key("spec").key("podCIDRs").item(index);
            check(net, at, &format!("spec.podCIDRs[{index}]"), &mut object.reporter(problems));
        }
    }
    for object in manifests.pools() {
        check(
            &object.value.spec.cidr,
            object.at().key("spec").key("cidr"),
            "spec.cidr",
            &mut object.reporter(problems),
        );
    }
}

fn host_bits_of<T: Readable>(objects: List<'_, T>, problems: &mut Problems) {
    for object in objects {
        object.tree(|node| {
            if let Some(spec) = node.get("spec") {
                host_bits(spec, object.base(), &mut object.reporter(problems));
            }
        });
    }
}

/// Prefixes with bits behind their length, below a node.
fn host_bits(node: &Node, base: Base, report: &mut Reporter<'_>) {
    for (key, value) in node.entries().iter().filter(|(_, value)| !value.is_dropped()) {
        if PREFIX_KEYS.contains(&key.text.as_str()) {
            let one = std::iter::once(value).filter(|value| value.as_str().is_some());
            for value in one.chain(value.items()) {
                let text = value.as_str().map(str::trim).unwrap_or_default();
                if let Ok(net) = parse_cidr(text)
                    && net.trunc() != net
                {
                    let help = format!("write {}, or {} for the one address", net.trunc(), IpNet::from(net.addr()));
                    report.warning(
                        At::in_piece(value, base),
                        format_args!("{}: {text} has bits behind its prefix, which do not count", key.text),
                        help,
                    );
                }
            }
        }
        host_bits(value, base, report);
    }
    for item in node.items() {
        host_bits(item, base, report);
    }
}
