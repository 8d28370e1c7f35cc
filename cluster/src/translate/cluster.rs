//! Nodes, pods and pools.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use ipnet::IpNet;
use sha1::{Digest, Sha1};
use weir_dataplane::model::{Cluster, Node, Pool, TunnelMode, Workload};

use super::{
    LocalPods,
    impossible::{NextHops, is_usable, usable_device, usable_of_pod, usable_range, usable_range_of},
};
use crate::{
    config::RouterConfig,
    resources::{
        Manifests, Object,
        at::{At, Reporter},
        calico::{
            EncapsulationMode, IpPool, WorkloadEndpoint,
            ipam::{BlockAffinity, IpamBlock},
        },
        kubernetes::{KubernetesNode, Name, POD_IP, POD_IPS, Pod, ServiceCidr},
    },
    text::{
        Problems, Span, Topic,
        address::{parse_cidr, parse_ip, parse_network},
        problem::nearest,
    },
};

/// Calico's name for the host's end of a pod's veth pair: "cali" and the first 11 hex digits of the SHA-1 of
/// "namespace.pod".
pub fn workload_device(namespace: &str, pod: &str) -> String {
    let digest = Sha1::digest(format!("{namespace}.{pod}"));
    let hex: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("cali{}", &hex[..11])
}

/// Whether a pod has an end of its own: it is not on the host's network, and it has not ended.
pub(super) fn is_workload(pod: &Pod) -> bool {
    !is_on_host_network(pod) && !has_ended(pod)
}

pub(super) fn is_on_host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false)
}

/// Whether none of its containers will run again.
pub(super) fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// The node that a pod is on.
fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref())
}

/// The object that says what a workload is.
#[derive(Clone, Copy)]
pub(super) enum Described<'m> {
    /// Its Pod.
    Pod(&'m Object<Pod>),
    /// Its WorkloadEndpoint, without a Pod.
    Endpoint,
    /// None yet: a pod that this node's CNI plugin made.
    NotYet,
}

/// The WorkloadEndpoint of each pod, by "namespace/pod".
pub(super) fn endpoints_of_pods(manifests: &Manifests) -> HashMap<String, &Object<WorkloadEndpoint>> {
    let of_pod = |endpoint: &&Object<WorkloadEndpoint>| {
        endpoint.value.spec.orchestrator.as_deref().is_none_or(|orchestrator| orchestrator == "k8s")
    };
    let name = |endpoint: &Object<WorkloadEndpoint>| {
        endpoint.value.spec.pod.as_ref().map(|pod| format!("{}/{pod}", endpoint.namespace))
    };
    let endpoints = manifests.workload_endpoints().iter().filter(of_pod);
    endpoints.filter_map(|endpoint| Some((name(endpoint)?, endpoint))).collect()
}

/// What a WorkloadEndpoint that is no pod's is called.
pub(super) fn endpoint_name(endpoint: &Object<WorkloadEndpoint>) -> String {
    let workload = endpoint.value.spec.pod.as_deref().unwrap_or(&endpoint.name);
    format!("{}/{workload}", endpoint.namespace)
}

/// The cluster, and what describes each of its workloads.
pub(super) fn translate<'m>(
    config: &RouterConfig,
    manifests: &'m Manifests,
    local_pods: &LocalPods,
    problems: &mut Problems,
) -> (Cluster, Vec<Described<'m>>) {
    let mut cluster = Cluster {
        node_name: config.node_name.clone(),
        service_cidrs: config.service_cidrs.clone(),
        local_addresses: config.local_addresses.clone(),
        snat_ports: config.snat.port_range,
        ..Cluster::default()
    };
    let mut next_hops = NextHops::new();
    for object in manifests.service_cidrs() {
        for net in object.made(problems, service_ranges) {
            if !cluster.service_cidrs.contains(net) {
                cluster.service_cidrs.push(*net);
            }
        }
    }
    for object in manifests.nodes() {
        let node = object.made(problems, node).clone();
        // This one is never the one too many.
        if !next_hops.take_node(&node) && node.name != config.node_name {
            let at = object.at().key("metadata").key("name");
            object.reporter(problems).error(at, "it is one node more than weir can number", TOO_MANY.to_owned());
        }
        cluster.nodes.push(node);
    }
    check_node_name(config, manifests, problems);
    pools(manifests, &mut cluster, problems);
    blocks(manifests, &mut cluster, problems);
    let described = Workloads::of(config, manifests, local_pods, &mut cluster, next_hops, problems);
    cluster.pod_cidrs = match &config.pod_cidrs {
        Some(given) => given.clone(),
        None if !cluster.pools.is_empty() => cluster.pools.iter().map(|pool| pool.cidr).collect(),
        None => cluster.nodes.iter().flat_map(Node::ranges).collect(),
    };
    (cluster, described)
}

/// What to do where there are too many nodes and pods.
const TOO_MANY: &str = "nodes, and pods of this node, have 61,439 next hops at most: a node one for each family and one for its tunnel, a pod one for each family";

fn check_node_name(config: &RouterConfig, manifests: &Manifests, problems: &mut Problems) {
    let names = || manifests.nodes().iter().map(|node| node.name.as_ref());
    if !config.node_name.is_empty() && !manifests.nodes().is_empty() && !names().any(|name| name == config.node_name) {
        // weir.yaml is the first file that is read.
        let text = problems.source(0).text();
        let start = text.find(&config.node_name).unwrap_or(0) as u32;
        let span = Span { file: 0, start, end: start + config.node_name.len() as u32 };
        let help = match nearest(&config.node_name, names()) {
            Some(known) => format!("did you mean {known}?"),
            None => format!("the nodes are: {}", names().take(8).collect::<Vec<_>>().join(", ")),
        };
        problems.warning(span, format!("the manifests have no Node {}", config.node_name), help);
    }
}

const IPV4_ADDRESS: &str = "projectcalico.org/IPv4Address";
const IPIP_TUNNEL_ADDRESS: &str = "projectcalico.org/IPv4IPIPTunnelAddr";

fn node(object: &Object<KubernetesNode>, problems: &mut Problems) -> Node {
    let mut report = object.reporter(problems);
    let mut node = Node { name: object.name.to_string(), ..Node::default() };
    let addresses_at = object.at().key("status").key("addresses");
    for (index, address) in object.value.status.addresses.iter().enumerate() {
        let list = match address.type_.as_str() {
            "InternalIP" => &mut node.internal_ips,
            "ExternalIP" => &mut node.other_ips,
            // Names.
            _ => continue,
        };
        let at = addresses_at.item(index).key("address");
        let field = format!("status.addresses[{index}].address");
        list.extend(report.read(at, &field, parse_ip(&address.address)));
    }
    let annotations_at = object.at().key("metadata").key("annotations");
    let annotations = &object.value.metadata.annotations;
    let annotation = |key: &str| annotations.get(key).filter(|value| !value.is_empty());
    if let Some(value) = annotation(IPV4_ADDRESS) {
        match parse_cidr(value).or_else(|error| parse_ip(value).map(IpNet::from).map_err(|_| error)) {
            Ok(IpNet::V4(net)) => node.ipv4_address = Some(net),
            _ => report.error(
                annotations_at.key(IPV4_ADDRESS),
                format_args!("annotation {IPV4_ADDRESS}: {value:?} is not an IPv4 address with its subnet"),
                "write it like 192.0.2.1/24".to_owned(),
            ),
        }
    }
    if let Some(value) = annotation(IPIP_TUNNEL_ADDRESS) {
        match parse_ip(value) {
            Ok(IpAddr::V4(address)) => node.tunnel_address = Some(address),
            _ => report.error(
                annotations_at.key(IPIP_TUNNEL_ADDRESS),
                format_args!("annotation {IPIP_TUNNEL_ADDRESS}: {value:?} is not an IPv4 address"),
                "write it like 192.0.2.1".to_owned(),
            ),
        }
    }
    let spec_at = object.at().key("spec");
    if let Some(spec) = &object.value.spec {
        for (index, cidr) in spec.pod_cidrs.iter().enumerate() {
            let at = spec_at.key("podCIDRs").item(index);
            node.pod_cidrs.extend(pod_network(&mut report, at, &format!("spec.podCIDRs[{index}]"), cidr));
        }
        if let Some(cidr) = &spec.pod_cidr {
            let at = spec_at.key("podCIDR");
            let first = pod_network(&mut report, at, "spec.podCIDR", cidr);
            match (first, node.pod_cidrs.first()) {
                (Some(first), None) => node.pod_cidrs.push(first),
                (Some(first), Some(listed)) if first != *listed => {
                    let help = "make it the first of podCIDRs".to_owned();
                    report.error(at, format_args!("spec.podCIDR {first} is not spec.podCIDRs[0], {listed}"), help);
                }
                _ => {}
            }
        }
    }
    node
}

fn pod_network(report: &mut Reporter<'_>, at: At<'_>, field: &str, text: &str) -> Option<IpNet> {
    let net = report.read(at, field, parse_network(text))?;
    usable_range(report, at, field, net)
}

fn pools(manifests: &Manifests, cluster: &mut Cluster, problems: &mut Problems) {
    for object in manifests.pools() {
        let Some(pool) = pool(object, problems) else { continue };
        let overlaps = |other: &Pool| other.cidr.contains(&pool.cidr) || pool.cidr.contains(&other.cidr);
        if let Some(other) = cluster.pools.iter().find(|other| overlaps(other)) {
            let message = format!("spec.cidr: {} overlaps {} of another pool", pool.cidr, other.cidr);
            let help = "an address must belong to one pool".to_owned();
            object.reporter(problems).error(object.at().key("spec").key("cidr"), message, help);
        }
        cluster.pools.push(pool);
    }
}

fn pool(object: &Object<IpPool>, problems: &mut Problems) -> Option<Pool> {
    let mut report = object.reporter(problems);
    let spec = &object.value.spec;
    let at = object.at().key("spec");
    if let Some(mode) = spec.vxlan_mode.filter(|mode| *mode != EncapsulationMode::Never) {
        report.not_implemented(at.key("vxlanMode"), format_args!("spec.vxlanMode {mode:?}"));
    }
    let cidr = pod_network(&mut report, at.key("cidr"), "spec.cidr", &spec.cidr)?;
    let ipip = match spec.ipip_mode {
        None | Some(EncapsulationMode::Never) => TunnelMode::Never,
        Some(EncapsulationMode::Always) => TunnelMode::Always,
        Some(EncapsulationMode::CrossSubnet) => TunnelMode::CrossSubnet,
    };
    if ipip != TunnelMode::Never && cidr.addr().is_ipv6() {
        let help = "IPIP carries IPv4 only: write ipipMode: Never".to_owned();
        report.error(at.key("ipipMode"), format_args!("spec.ipipMode {ipip:?} of an IPv6 pool"), help);
    }
    Some(Pool { cidr, ipip, nat_outgoing: spec.nat_outgoing.unwrap_or(false) })
}

/// The ranges of a ServiceCIDR. One that is being deleted still has cluster IPs.
fn service_ranges(object: &Object<ServiceCidr>, problems: &mut Problems) -> Vec<IpNet> {
    let mut report = object.reporter(problems);
    let at = object.at().key("spec").key("cidrs");
    let mut ranges = Vec::new();
    for (index, text) in object.value.spec.cidrs.iter().enumerate() {
        let (at, field) = (at.item(index), format!("spec.cidrs[{index}]"));
        let Some(net) = report.read(at, &field, parse_network(text)) else { continue };
        ranges.extend(usable_range_of(&mut report, at, &field, net, "cluster IPs are allocated in"));
    }
    ranges
}

/// Gives nodes the blocks that Calico's IPAM has given them, and the single addresses that they have of others' blocks.
fn blocks(manifests: &Manifests, cluster: &mut Cluster, problems: &mut Problems) {
    let (affinities, all) = (manifests.block_affinities(), manifests.ipam_blocks());
    if affinities.is_empty() && all.is_empty() {
        return;
    }
    let places: HashMap<String, usize> =
        cluster.nodes.iter().enumerate().map(|(place, node)| (node.name.clone(), place)).collect();
    // Of a node that is gone, or not known yet, nobody knows the way.
    let mut give = |node: &str, net: IpNet| {
        if let Some(place) = places.get(node) {
            cluster.nodes[*place].blocks.push(net);
        }
    };
    for object in affinities.iter().filter(|object| object.value.spec.is_confirmed()) {
        if let Some(net) = object.made(problems, block) {
            give(&object.value.spec.node, *net);
        }
    }
    for object in all {
        for (node, address) in object.made(problems, borrowed) {
            give(node, IpNet::from(*address));
        }
    }
}

fn block(object: &Object<BlockAffinity>, problems: &mut Problems) -> Option<IpNet> {
    let at = object.at().key("spec").key("cidr");
    pod_network(&mut object.reporter(problems), at, "spec.cidr", &object.value.spec.cidr)
}

/// The addresses of a block that nodes have borrowed, with whose they are.
fn borrowed(object: &Object<IpamBlock>, problems: &mut Problems) -> Vec<(Name, IpAddr)> {
    let spec = &object.value.spec;
    if spec.borrowed.is_empty() {
        return Vec::new();
    }
    let at = object.at().key("spec").key("cidr");
    let Some(net) = pod_network(&mut object.reporter(problems), at, "spec.cidr", &spec.cidr) else { return Vec::new() };
    let address = |ordinal: u32| match net.network() {
        IpAddr::V4(first) => Some(IpAddr::V4(u32::from(first).checked_add(ordinal)?.into())),
        IpAddr::V6(first) => Some(IpAddr::V6(u128::from(first).checked_add(ordinal.into())?.into())),
    };
    let all = spec.borrowed.iter().filter_map(|(ordinal, node)| Some((node.clone(), address(*ordinal)?)));
    all.filter(|(_, address)| net.contains(address)).collect()
}

/// Workloads as they are gathered, and who owns which address.
struct Workloads<'m, 'c> {
    config: &'c RouterConfig,
    cluster: &'c mut Cluster,
    described: Vec<Described<'m>>,
    owners: HashMap<IpAddr, String>,
    /// Names of those of this node that WorkloadEndpoints alone tell of.
    endpoints: HashSet<String>,
    next_hops: NextHops,
}

impl<'m, 'c> Workloads<'m, 'c> {
    fn of(
        config: &'c RouterConfig,
        manifests: &'m Manifests,
        local_pods: &LocalPods,
        cluster: &'c mut Cluster,
        next_hops: NextHops,
        problems: &mut Problems,
    ) -> Vec<Described<'m>> {
        let (owners, endpoints) = (HashMap::new(), HashSet::new());
        let mut workloads = Self { config, cluster, described: Vec::new(), owners, endpoints, next_hops };
        workloads.add_local_pods(manifests, local_pods);
        workloads.add_pods(manifests, local_pods, problems);
        workloads.add_endpoints(manifests, local_pods, problems);
        workloads.described
    }

    /// First come those that are certain to be there. Their addresses are theirs, whatever objects say.
    fn add_local_pods(&mut self, manifests: &'m Manifests, local_pods: &LocalPods) {
        let node_name = self.cluster.node_name.clone();
        let mut objects: HashMap<&str, &Object<Pod>> = HashMap::new();
        let here = |object: &&Object<Pod>| node_of(&object.value) == Some(node_name.as_str());
        for object in manifests.pods().iter().filter(here) {
            let named = local_pods.get(&object.full_name());
            if let Some(pod) = named.filter(|pod| pod.is_described_by(&object.value)) {
                objects.insert(&pod.name, object);
            }
        }
        for pod in local_pods.iter() {
            self.owners.extend(pod.addresses.iter().map(|address| (*address, pod.name.clone())));
            self.cluster.workloads.push(Workload {
                name: pod.name.clone(),
                node: Some(node_name.clone()),
                addresses: pod.addresses.clone(),
                device: pod.device.clone(),
                mac: Some(pod.mac),
            });
            let object = objects.get(pod.name.as_str());
            self.described.push(object.map_or(Described::NotYet, |object| Described::Pod(object)));
        }
    }

    fn add_pods(&mut self, manifests: &'m Manifests, local_pods: &LocalPods, problems: &mut Problems) {
        let endpoints = endpoints_of_pods(manifests);
        let lost = lost_addresses(manifests, &endpoints);
        let announced = self.announced_addresses(manifests);
        for object in manifests.pods() {
            let facts = object.made(problems, pod);
            let node = node_of(&object.value);
            if !facts.is_workload || self.is_made_here(&facts.name, node, local_pods) {
                continue;
            }
            let endpoint = endpoints.get(&facts.name).copied();
            let device = endpoint.and_then(|endpoint| self.device_of(endpoint, problems));
            let endpoint = endpoint.map(|endpoint| endpoint.made(problems, workload_endpoint));
            let given = endpoint.map(|read| &read.addresses).filter(|addresses| !addresses.is_empty());
            let mut addresses = given.unwrap_or(&facts.addresses).clone();
            if addresses.is_empty() {
                let is_its = |address: &&IpAddr| announced.get(*address) == Some(&object.origin);
                addresses = facts.announced.iter().filter(is_its).copied().collect();
            }
            let mut report = object.reporter(problems);
            if addresses.is_empty() {
                let message = match facts.announced[..] {
                    [] => "it has no address yet and is left out",
                    _ => "it has no address yet, as its annotations name none that can be its alone, and is left out",
                };
                report.note_on(Topic::NoAddress, object.at().key("metadata").key("name"), message);
                continue;
            }
            if facts.is_terminating {
                addresses.retain(|address| !lost.contains(address) && !self.owners.contains_key(address));
                if addresses.is_empty() {
                    continue;
                }
            }
            let device = device.unwrap_or_else(|| facts.device.clone());
            let mac = endpoint.and_then(|read| read.mac);
            let node = node.map(str::to_owned);
            let workload = Workload { name: facts.name.clone(), node, addresses, device, mac };
            self.add(workload, Described::Pod(object), local_pods, object.at().key("status"), &mut report);
        }
    }

    /// Addresses that nothing but annotations tell of, each with the number of its Pod's object.
    ///
    /// Whoever makes a pod can write annotations, so they count for what only that pod's node can have given it: an address in a range of that
    /// node, that no node has and no other pod, however little of it is known. What two pods claim so, neither has.
    fn announced_addresses(&self, manifests: &Manifests) -> HashMap<IpAddr, u32> {
        // What is wrong with them is told where they become workloads.
        let unheard = &mut Problems::default();
        let nodes = &self.cluster.nodes;
        let mut claims: HashMap<IpAddr, Option<u32>> = HashMap::new();
        let mut by_name: HashMap<&str, &Node> = HashMap::new();
        for object in manifests.pods() {
            let facts = object.made(unheard, pod);
            if facts.announced.is_empty() || !facts.is_workload {
                continue;
            }
            if by_name.is_empty() {
                by_name = nodes.iter().map(|node| (node.name.as_str(), node)).collect();
            }
            let Some(node) = node_of(&object.value).and_then(|name| by_name.get(name)) else { continue };
            // Of those on this node the plugin itself tells.
            if node.name == self.cluster.node_name && self.config.cni.is_some() {
                continue;
            }
            for address in &facts.announced {
                if node.ranges().any(|range| range.contains(address)) {
                    let claim = claims.entry(*address).or_insert(Some(object.origin));
                    *claim = claim.filter(|pod| *pod == object.origin);
                }
            }
        }
        if claims.is_empty() {
            return HashMap::new();
        }
        let mut is_anothers = |address: &IpAddr| {
            claims.remove(address);
        };
        self.owners.keys().for_each(&mut is_anothers);
        for node in nodes {
            node.internal_ips.iter().chain(&node.other_ips).for_each(&mut is_anothers);
            node.tunnel_address.iter().for_each(|address| is_anothers(&IpAddr::V4(*address)));
        }
        for object in manifests.pods() {
            let facts = object.made(unheard, pod);
            facts.addresses.iter().filter(|_| facts.is_workload).for_each(&mut is_anothers);
        }
        for endpoint in manifests.workload_endpoints() {
            endpoint.made(unheard, workload_endpoint).addresses.iter().for_each(&mut is_anothers);
        }
        claims.into_iter().filter_map(|(address, claim)| Some((address, claim?))).collect()
    }

    fn add_endpoints(&mut self, manifests: &'m Manifests, local_pods: &LocalPods, problems: &mut Problems) {
        if manifests.workload_endpoints().is_empty() {
            return;
        }
        let pods: HashSet<String> = manifests.pods().iter().map(|object| object.full_name()).collect();
        for object in manifests.workload_endpoints() {
            let name = endpoint_name(object);
            let node = object.value.spec.node.clone();
            if pods.contains(&name) || self.is_made_here(&name, node.as_deref(), local_pods) {
                continue;
            }
            let read = object.made(problems, workload_endpoint);
            let Some(device) = self.device_of(object, problems) else {
                if read.device.is_none() {
                    let help = "write the name of the host's end of its veth pair".to_owned();
                    object.reporter(problems).error(object.at().key("spec"), "spec.interfaceName is missing", help);
                }
                continue;
            };
            let mut report = object.reporter(problems);
            if node.as_deref() == Some(self.cluster.node_name.as_str()) && !self.endpoints.insert(name.clone()) {
                let help = "a pod has one endpoint; give each a pod, or a name, of its own".to_owned();
                report.error(object.at().key("spec"), format_args!("{name} has another endpoint on this node"), help);
                continue;
            }
            let workload = Workload { name, node, addresses: read.addresses.clone(), device, mac: read.mac };
            self.add(workload, Described::Endpoint, local_pods, object.at(), &mut report);
        }
    }

    /// The device that an endpoint of this or of another node names, if it can be a pod's.
    fn device_of(&self, object: &Object<WorkloadEndpoint>, problems: &mut Problems) -> Option<String> {
        let device = object.made(problems, workload_endpoint).device.clone()?;
        let at = object.at().key("spec").key("interfaceName");
        usable_device(&mut object.reporter(problems), at, "spec.interfaceName", device, self.config)
    }

    /// Whether a workload of that name on that node is, or was before, what the CNI plugin has made on this one: no two of a node have one
    /// name at once.
    fn is_made_here(&self, name: &str, node: Option<&str>, local_pods: &LocalPods) -> bool {
        node == Some(self.cluster.node_name.as_str()) && local_pods.get(name).is_some()
    }

    /// Adds a workload that objects tell of, without what the pods have that this node made.
    fn add(
        &mut self,
        mut workload: Workload,
        described: Described<'m>,
        local_pods: &LocalPods,
        at: At<'_>,
        report: &mut Reporter<'_>,
    ) {
        let had_any = !workload.addresses.is_empty();
        workload.addresses.retain(|address| {
            let Some(owner) = self.owners.get(address) else { return true };
            let help = "one of the two is probably gone: take it out".to_owned();
            report.warning(at, format_args!("{address} is the address of {owner} too"), help);
            !local_pods.get(owner).is_some_and(|pod| pod.addresses.contains(address))
        });
        if had_any && workload.addresses.is_empty() {
            return;
        }
        if workload.node.as_ref() == Some(&self.cluster.node_name) && !self.next_hops.take_pod(&workload.addresses) {
            report.error(at, "it is one pod of this node more than weir can number", TOO_MANY.to_owned());
            return;
        }
        self.owners.extend(workload.addresses.iter().map(|address| (*address, workload.name.clone())));
        self.cluster.workloads.push(workload);
        self.described.push(described);
    }
}

/// Addresses of terminating pods that living ones have by now, whichever of Pod and WorkloadEndpoint tells of them.
fn lost_addresses(manifests: &Manifests, endpoints: &HashMap<String, &Object<WorkloadEndpoint>>) -> HashSet<IpAddr> {
    // What is wrong with them is told where they become workloads.
    let unheard = &mut Problems::default();
    let mut of = |terminating: bool| -> HashSet<IpAddr> {
        let mut addresses = HashSet::new();
        for object in manifests.pods().iter().filter(|object| is_terminating(&object.value) == terminating) {
            let facts = object.made(unheard, pod);
            let endpoint =
                endpoints.get(&facts.name).map(|endpoint| &endpoint.made(unheard, workload_endpoint).addresses);
            let given = endpoint.filter(|addresses| !addresses.is_empty()).unwrap_or(&facts.addresses);
            addresses.extend(given.iter().filter(|_| facts.is_workload));
        }
        addresses
    };
    let of_terminating = of(true);
    if of_terminating.is_empty() { of_terminating } else { &of_terminating & &of(false) }
}

/// What forwarding takes from a Pod.
struct PodFacts {
    /// "namespace/name".
    name: String,
    addresses: Vec<IpAddr>,
    /// Those that annotations name, which need not be its own. Empty where its status says any.
    announced: Vec<IpAddr>,
    is_workload: bool,
    is_terminating: bool,
    /// By Calico's rule.
    device: String,
}

fn pod(object: &Object<Pod>, problems: &mut Problems) -> PodFacts {
    PodFacts {
        name: object.full_name(),
        addresses: pod_addresses(object, problems),
        announced: announced_by(&object.value),
        is_workload: is_workload(&object.value),
        is_terminating: is_terminating(&object.value),
        device: workload_device(&object.namespace, &object.name),
    }
}

fn pod_addresses(object: &Object<Pod>, problems: &mut Problems) -> Vec<IpAddr> {
    let mut report = object.reporter(problems);
    let at = object.at().key("status");
    let Some(status) = &object.value.status else { return Vec::new() };
    let is_workload = is_workload(&object.value);
    let mut read = |at: At<'_>, field: &str, text: &str| {
        let address = report.read(at, field, parse_ip(text));
        // One on the host's network has whatever the host has.
        if is_workload { usable_of_pod(&mut report, at, field, address) } else { address }
    };
    let mut addresses: Vec<IpAddr> = Vec::new();
    for (index, entry) in status.pod_ips.iter().enumerate() {
        let at = at.key("podIPs").item(index).key("ip");
        addresses.extend(read(at, &format!("status.podIPs[{index}].ip"), entry));
    }
    if let Some(ip) = status.pod_ip.as_ref().filter(|ip| !ip.is_empty())
        && let Some(address) = read(at.key("podIP"), "status.podIP", ip)
    {
        if addresses.is_empty() {
            addresses.push(address);
        } else if addresses[0] != address {
            let help = "make it the first of podIPs".to_owned();
            report.error(at.key("podIP"), format_args!("status.podIP {address} is not status.podIPs[0]"), help);
        }
    }
    addresses
}

/// The addresses of a pod's annotations; none where any of them is no address of a pod. Nothing is said of that: they are not the pod's own word.
fn announced_by(pod: &Pod) -> Vec<IpAddr> {
    let annotation = |key: &str| pod.metadata.annotations.get(key).filter(|value| !value.is_empty());
    let Some(texts) = annotation(POD_IPS).or_else(|| annotation(POD_IP)) else { return Vec::new() };
    let read = |text: &str| match parse_cidr(text) {
        Ok(net) if net.prefix_len() == net.max_prefix_len() => Some(net.addr()),
        Ok(_) => None,
        Err(_) => parse_ip(text).ok(),
    };
    // A pod has one of each family at most.
    let addresses: Option<Vec<IpAddr>> = texts.split(',').take(3).map(|text| read(text.trim())).collect();
    let is_of_a_pod = |addresses: &Vec<IpAddr>| match addresses[..] {
        [_] => true,
        [one, other] => one.is_ipv4() != other.is_ipv4(),
        _ => false,
    };
    addresses.filter(is_of_a_pod).filter(|all| all.iter().all(|one| is_usable(*one))).unwrap_or_default()
}

/// What forwarding takes from a WorkloadEndpoint.
struct EndpointFacts {
    addresses: Vec<IpAddr>,
    device: Option<String>,
    mac: Option<weir_packet::Mac>,
}

fn workload_endpoint(object: &Object<WorkloadEndpoint>, problems: &mut Problems) -> EndpointFacts {
    let mut report = object.reporter(problems);
    let spec = &object.value.spec;
    let at = object.at().key("spec");
    for (field, is_set) in [
        ("ipNATs", !spec.ip_nats.is_empty()),
        ("allowSpoofedSourcePrefixes", !spec.allow_spoofed_source_prefixes.is_empty()),
        ("qosControls", spec.qos_controls.is_some()),
    ] {
        if is_set {
            report.not_implemented(at.name_of(field), format_args!("spec.{field}"));
        }
    }
    let mut addresses = Vec::new();
    for (index, text) in spec.ip_networks.iter().enumerate() {
        let at = at.key("ipNetworks").item(index);
        let field = format!("spec.ipNetworks[{index}]");
        let net = parse_cidr(text).or_else(|error| parse_ip(text).map(IpNet::from).map_err(|_| error));
        match report.read(at, &field, net) {
            Some(net) if net.prefix_len() == net.max_prefix_len() => {
                addresses.extend(usable_of_pod(&mut report, at, &field, Some(net.addr())));
            }
            Some(net) => {
                let help = format!("write {}", IpNet::from(net.addr()));
                report.error(at, format_args!("{field}: {text:?} is not a single address"), help);
            }
            None => {}
        }
    }
    let mac = spec.mac.as_ref().and_then(|text| match text.parse() {
        Ok(mac) => Some(mac),
        Err(error) => {
            let error: weir_packet::mac::MacParseError = error;
            report.error(at.key("mac"), format_args!("spec.mac: {text:?} is not a MAC address"), error.to_string());
            None
        }
    });
    EndpointFacts { addresses, device: spec.interface_name.clone().filter(|name| !name.is_empty()), mac }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_calicos_names() {
        assert_eq!(workload_device("default", "a1"), "cali5cce677186e");
    }
}
