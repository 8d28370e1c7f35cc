//! What manifests do not say until they are applied, made up, so that they can be judged before: `--assume-pods`.
//!
//! Controllers and the API server make pods, addresses and endpoint slices out of manifests as people write them. Here each workload
//! (Deployment, StatefulSet, ...) stands for two pods, on this and on another node; a pod, and a service without a cluster IP, get
//! addresses that nothing else has; and a service with a selector gets endpoint slices, as Kubernetes' own controller would make them.
//! Made-up objects are written as text and read as any other, so that all that follows treats them alike.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    config::RouterConfig,
    resources::{
        Identities, Manifests, Object, ObjectId, Substitute,
        kubernetes::{Pod, SERVICE_NAME_LABEL, Service, ServiceSpec},
        meta::{IntOrString, Name},
    },
    text::{
        Problems, Severity, Source, Topic,
        address::{parse_ip, parse_network},
        tree::{self, Node},
        typed,
    },
};

/// What is taken for given where manifests do not say it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assumptions {
    /// Whether workloads stand for pods, and addresses are made up. Then a folder or a file of manifests does for a weir.yaml, too.
    pub pods: bool,
    /// The namespace of objects that give none; "default" where it is `None`.
    pub namespace: Option<String>,
}

/// What was made up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assumed {
    /// The pods that stand for each workload, by its kind ("Deployment") and "namespace/name".
    pub workloads: BTreeMap<(String, String), Vec<String>>,
    /// How many pods were there without an address, and got one.
    pub pods: usize,
    /// How many services got a cluster IP.
    pub services: usize,
    /// How many services got endpoint slices.
    pub slices: usize,
}

/// What made-up objects stand in, in messages.
const TEXT_NAME: &str = "made up by --assume-pods";
/// This node where there is no weir.yaml, and the other where manifests have none.
const THIS_NODE: &str = "this-node";
const ANOTHER_NODE: &str = "another-node";
/// The ranges of kubeadm's documentation, where weir.yaml, pools and nodes give none.
const PODS: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16);
const SERVICES: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 12);
const NODES: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 255, 0), 24);

/// The group of the Prometheus operator's kinds, whose pods have labels and ports of its own making.
const PROMETHEUS_OPERATOR: &str = "monitoring.coreos.com";
/// Kinds that make pods, with their groups.
const WORKLOADS: [(&str, &str); 11] = [
    ("apps", "Deployment"),
    ("apps", "StatefulSet"),
    ("apps", "DaemonSet"),
    ("apps", "ReplicaSet"),
    ("extensions", "Deployment"),
    ("extensions", "DaemonSet"),
    ("batch", "Job"),
    ("batch", "CronJob"),
    ("", "ReplicationController"),
    (PROMETHEUS_OPERATOR, "Prometheus"),
    (PROMETHEUS_OPERATOR, "Alertmanager"),
];

/// Whether notes on this topic are about objects that [`Assumptions::pods`] makes pods of.
pub fn makes_pods(topic: &Topic) -> bool {
    let Topic::Skipped(kind) = topic else { return false };
    let Some((name, version)) = kind.split_once(" of ") else { return false };
    WORKLOADS.contains(&(version.split_once('/').map_or("", |(group, _)| group), name))
}

/// A weir.yaml for manifests without one: for a folder, and for a file that is not one itself.
pub(super) fn configuration(path: &Path) -> Option<Source> {
    if !path.is_dir() && is_configuration(path) {
        return None;
    }
    let manifests = json!([path.to_str()?]);
    Some(Source::new("weir.yaml, made up by --assume-pods", format!("nodeName: {THIS_NODE}\nmanifests: {manifests}\n")))
}

/// Whether a file is a weir.yaml, or cannot be read at all, which is then told as for one.
fn is_configuration(path: &Path) -> bool {
    let Ok(text) = std::fs::read_to_string(path) else { return true };
    let mut unread = Problems::default();
    let file = unread.add_source(Source::new("", text));
    let documents = tree::read_documents(file, &mut unread);
    documents.first().is_none_or(|first| {
        let kind = first.get("kind").and_then(Node::as_str);
        kind.is_none_or(|kind| kind == "RouterConfig")
    })
}

/// Makes up what is missing, into `manifests`, but for objects in `passed_over`; `sources` are the texts that they were read from.
pub(super) fn assume<'s>(
    sources: impl Iterator<Item = &'s Arc<Source>>,
    config: &RouterConfig,
    identities: &Identities,
    passed_over: &BTreeMap<ObjectId, Substitute>,
    manifests: &mut Manifests,
    problems: &mut Problems,
) -> Assumed {
    let mut assumed = Assumed::default();
    problems.leave_out(makes_pods);
    let workloads = workloads(sources, identities.namespace());
    let another = manifests.nodes().iter().map(|node| &*node.name).find(|name| *name != config.node_name);
    let nodes = [config.node_name.clone(), another.unwrap_or(ANOTHER_NODE).to_owned()];
    let mut addresses = Addresses::new(config, manifests, &nodes);

    let mut text = Documents::default();
    for (index, name) in nodes.iter().enumerate() {
        if !manifests.nodes().iter().any(|node| *node.name == **name) {
            text.add(&addresses.node(name, index));
        }
    }
    let mut names: HashSet<String> = manifests.pods().iter().map(|pod| pod.full_name()).collect();
    for workload in workloads {
        let pods = assumed.workloads.entry((workload.kind.clone(), workload.full_name())).or_default();
        for (index, node) in nodes.iter().enumerate() {
            let short = [format!("{}-{index}", workload.name), format!("{}-{index}-{}", workload.name, workload.kind)];
            let short = short.map(|name| name.to_lowercase());
            let free = short.iter().find(|name| names.insert(format!("{}/{name}", workload.namespace)));
            let Some(name) = free else { continue };
            let Some(address) = addresses.of_pod(index, workload.is_on_host_network()) else { continue };
            text.add(&workload.pod(name, node, address));
            pods.push(format!("{}/{name}", workload.namespace));
        }
    }
    manifests.add_text(text.source(), identities, passed_over, problems);
    let pod = |object: &Object<Pod>| {
        let changed = addressed(object, &nodes[0], &mut addresses)?;
        assumed.pods += 1;
        Some(changed)
    };
    manifests.change_pods(pod);
    let service = |object: &Object<Service>| {
        let is_without = |spec: &&ServiceSpec| {
            let given = spec.cluster_ips.iter().chain(&spec.cluster_ip).any(|ip| !ip.is_empty());
            !given && spec.type_.as_deref() != Some("ExternalName")
        };
        object.value.spec.as_ref().filter(is_without)?;
        let address = addresses.of_service()?;
        assumed.services += 1;
        Some(object.changed(|service| {
            if let Some(spec) = &mut service.spec {
                spec.cluster_ip = Some(address.to_string().into());
            }
        }))
    };
    manifests.change_services(service);
    let slices = slices(manifests, &mut assumed);
    manifests.add_text(slices.source(), identities, passed_over, problems);
    assumed
}

/// Objects as a text of documents.
#[derive(Default)]
struct Documents(String);

impl Documents {
    fn add(&mut self, object: &Value) {
        self.0 += &format!("---\n{object}\n");
    }

    fn source(self) -> Source {
        Source::new(TEXT_NAME, self.0)
    }
}

/// Addresses that nothing has yet.
struct Addresses {
    /// Of pods, on this node and on the other.
    pods: [Range; 2],
    services: Range,
    nodes: Range,
    /// Those of the two nodes.
    of_nodes: [Option<IpAddr>; 2],
    used: HashSet<IpAddr>,
}

/// A range that addresses are taken from, one after the other.
struct Range {
    net: IpNet,
    hosts: Box<dyn Iterator<Item = IpAddr>>,
}

impl Range {
    fn new(net: IpNet) -> Self {
        // The first few are gateways' and the API server's by custom.
        Self { net, hosts: Box::new(net.hosts().skip(if net.max_prefix_len() - net.prefix_len() > 6 { 9 } else { 0 })) }
    }
}

impl Addresses {
    fn new(config: &RouterConfig, manifests: &Manifests, nodes: &[String; 2]) -> Self {
        let pools = manifests.pools().iter().filter_map(|pool| parse_network(&pool.value.spec.cidr).ok());
        let given = config.pod_cidrs.iter().flatten().copied().chain(pools).next();
        let halves = |net: IpNet| match net.subnets(net.prefix_len() + 1) {
            Ok(mut halves) => [halves.next().unwrap_or(net), halves.next().unwrap_or(net)],
            Err(_) => [net, net],
        };
        let halves = halves(given.unwrap_or(PODS.into()));
        let object = |name: &String| manifests.nodes().iter().find(|node| *node.name == **name);
        let range = |index: usize| {
            let spec = object(&nodes[index]).and_then(|node| node.value.spec.as_ref());
            let texts = spec.map(|spec| spec.pod_cidrs.iter().chain(&spec.pod_cidr));
            let own = texts.and_then(|mut texts| texts.find_map(|text| parse_network(text).ok()));
            Range::new(own.unwrap_or(halves[index]))
        };
        let of_node = |index: usize| {
            let mut given = object(&nodes[index]).into_iter().flat_map(|node| &node.value.status.addresses);
            given.find_map(|given| parse_ip(&given.address).ok().filter(|_| given.type_ == "InternalIP"))
        };
        let services = config.service_cidrs.first().copied().unwrap_or(SERVICES.into());
        Self {
            pods: [range(0), range(1)],
            services: Range::new(services),
            nodes: Range::new(NODES.into()),
            of_nodes: [of_node(0), of_node(1)],
            used: used(manifests),
        }
    }

    /// A Node with an address and a range of pods.
    fn node(&mut self, name: &str, index: usize) -> Value {
        let address = Self::take(&mut self.nodes, &mut self.used);
        self.of_nodes[index] = address;
        let range = self.pods[index].net;
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"podCIDRs": [range]},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]},
        })
    }

    fn of_pod(&mut self, index: usize, is_on_host_network: bool) -> Option<IpAddr> {
        if is_on_host_network { self.of_nodes[index] } else { Self::take(&mut self.pods[index], &mut self.used) }
    }

    fn of_service(&mut self) -> Option<IpAddr> {
        Self::take(&mut self.services, &mut self.used)
    }

    fn take(range: &mut Range, used: &mut HashSet<IpAddr>) -> Option<IpAddr> {
        range.hosts.find(|address| used.insert(*address))
    }
}

/// All addresses that manifests give to something.
fn used(manifests: &Manifests) -> HashSet<IpAddr> {
    let mut texts: Vec<&str> = Vec::new();
    for status in manifests.pods().iter().filter_map(|pod| pod.value.status.as_ref()) {
        texts.extend(status.pod_ip.as_deref());
        texts.extend(status.pod_ips.iter().map(|ip| &**ip));
    }
    for node in manifests.nodes() {
        texts.extend(node.value.status.addresses.iter().map(|address| address.address.as_str()));
    }
    for spec in manifests.services().iter().filter_map(|service| service.value.spec.as_ref()) {
        texts.extend(spec.cluster_ips.iter().chain(&spec.cluster_ip).map(|ip| &**ip));
    }
    texts.into_iter().filter_map(|text| parse_ip(text).ok()).collect()
}

/// A workload that makes pods.
struct Workload {
    kind: String,
    namespace: String,
    name: String,
    template: Template,
}

#[derive(Deserialize, Default)]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    labels: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct Written {
    metadata: Metadata,
    spec: WrittenSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenSpec {
    template: Option<Template>,
    job_template: Option<JobTemplate>,
    // Of the Prometheus operator's kinds:
    pod_metadata: Option<Metadata>,
    service_account_name: Option<String>,
    host_network: Option<bool>,
}

#[derive(Deserialize)]
struct JobTemplate {
    spec: JobSpec,
}

#[derive(Deserialize)]
struct JobSpec {
    template: Option<Template>,
}

#[derive(Deserialize)]
struct Template {
    metadata: Option<Metadata>,
    spec: TemplateSpec,
}

impl Template {
    /// As the Prometheus operator makes the pods of a Prometheus or an Alertmanager.
    fn of_operator(kind: &str, name: &str, spec: WrittenSpec) -> Self {
        let WrittenSpec { pod_metadata, service_account_name, host_network, .. } = spec;
        let lower = kind.to_lowercase();
        let mut labels = pod_metadata.and_then(|metadata| metadata.labels).unwrap_or_default();
        for (key, value) in [
            ("app.kubernetes.io/name", lower.as_str()),
            ("app.kubernetes.io/instance", name),
            ("app.kubernetes.io/managed-by", "prometheus-operator"),
            (lower.as_str(), name),
        ] {
            labels.insert(key.to_owned(), value.to_owned());
        }
        let port = |name: &str, container_port: i64, protocol: &str| ContainerPort {
            name: Some(name.to_owned()),
            protocol: Some(protocol.to_owned()),
            container_port,
            host_port: None,
        };
        let ports = match kind {
            "Prometheus" => vec![port("web", 9090, "TCP")],
            _ => vec![port("web", 9093, "TCP"), port("mesh-tcp", 9094, "TCP"), port("mesh-udp", 9094, "UDP")],
        };
        let reloader = vec![port("reloader-web", 8080, "TCP")];
        let container = |name: &str, ports: Vec<ContainerPort>| Container {
            name: Some(name.to_owned()),
            restart_policy: None,
            ports: Some(ports),
        };
        let containers = vec![container(&lower, ports), container("config-reloader", reloader)];
        let metadata = Some(Metadata { labels: Some(labels), ..Metadata::default() });
        Self { metadata, spec: TemplateSpec { containers, init_containers: None, service_account_name, host_network } }
    }
}

/// What of a pod's spec has to do with its network.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TemplateSpec {
    containers: Vec<Container>,
    init_containers: Option<Vec<Container>>,
    service_account_name: Option<String>,
    host_network: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    name: Option<String>,
    restart_policy: Option<String>,
    ports: Option<Vec<ContainerPort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    name: Option<String>,
    protocol: Option<String>,
    container_port: i64,
    host_port: Option<i64>,
}

/// All workloads of some texts.
fn workloads<'s>(sources: impl Iterator<Item = &'s Arc<Source>>, namespace: &str) -> Vec<Workload> {
    let mut found = Vec::new();
    for source in sources {
        // What is wrong with them is none of weir's concern, and what it needs of them is missing then.
        let mut unread = Problems::default();
        let file = unread.share_source(Arc::clone(source));
        for root in tree::read_documents(file, &mut unread) {
            let is_list = root.get("kind").and_then(Node::as_str).is_some_and(|kind| kind.ends_with("List"));
            let items = root.get("items").filter(|_| is_list).map(|items| items.items().collect());
            for node in items.unwrap_or_else(|| vec![&root]) {
                found.extend(Workload::read(node, namespace));
            }
        }
    }
    found
}

impl Workload {
    fn read(node: &Node, namespace: &str) -> Option<Self> {
        let text = |key: &str| node.get(key).and_then(Node::as_str);
        let (version, kind) = (text("apiVersion")?, text("kind")?);
        let group = version.split_once('/').map_or("", |(group, _)| group);
        WORKLOADS.contains(&(group, kind)).then_some(())?;
        let written: Written = typed::read(node, "", |_| Severity::Note, &mut Problems::default())?;
        let Written { metadata, spec } = written;
        let given = metadata.namespace.filter(|given| !given.is_empty());
        let name = metadata.name.filter(|name| !name.is_empty())?;
        let template = if group == PROMETHEUS_OPERATOR {
            Template::of_operator(kind, &name, spec)
        } else {
            spec.template.or_else(|| spec.job_template?.spec.template)?
        };
        let name = if group == PROMETHEUS_OPERATOR { format!("{}-{name}", kind.to_lowercase()) } else { name };
        Some(Self { kind: kind.to_owned(), namespace: given.unwrap_or_else(|| namespace.to_owned()), name, template })
    }

    fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn is_on_host_network(&self) -> bool {
        self.template.spec.host_network == Some(true)
    }

    /// One of its pods, with the labels that its controller adds where they have names that are known before.
    fn pod(&self, name: &str, node: &str, address: IpAddr) -> Value {
        let Template { metadata, spec } = &self.template;
        let mut labels = metadata.as_ref().and_then(|metadata| metadata.labels.clone()).unwrap_or_default();
        match self.kind.as_str() {
            "StatefulSet" => drop(labels.insert("statefulset.kubernetes.io/pod-name".into(), name.into())),
            "Job" => {
                labels.insert("job-name".into(), self.name.clone());
                labels.insert("batch.kubernetes.io/job-name".into(), self.name.clone());
            }
            _ => {}
        }
        let container = |(index, container): (usize, &Container)| {
            let ports = container.ports.iter().flatten().map(|port| {
                let ContainerPort { name, protocol, container_port, host_port } = port;
                let mut value = json!({"containerPort": container_port, "hostPort": host_port});
                value["protocol"] = protocol.as_deref().unwrap_or("TCP").into();
                value["name"] = name.clone().into();
                value
            });
            json!({
                "name": container.name.clone().unwrap_or_else(|| format!("container-{index}")),
                "restartPolicy": container.restart_policy, "ports": ports.collect::<Vec<_>>(),
            })
        };
        let containers: Vec<Value> = spec.containers.iter().enumerate().map(container).collect();
        let inits: Vec<Value> = spec.init_containers.iter().flatten().enumerate().map(container).collect();
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": self.namespace, "labels": labels},
            "spec": {
                "nodeName": node, "serviceAccountName": spec.service_account_name, "hostNetwork": spec.host_network,
                "containers": containers, "initContainers": inits,
            },
            "status": {"phase": "Running", "podIP": address.to_string(), "podIPs": [{"ip": address.to_string()}]},
        })
    }
}

/// A pod that has no address yet, with one, and on this node where it is on none.
fn addressed(object: &Object<Pod>, this_node: &str, addresses: &mut Addresses) -> Option<Object<Pod>> {
    let status = object.value.status.as_ref();
    let is_given = status
        .is_some_and(|status| status.pod_ip.as_ref().is_some_and(|ip| !ip.is_empty()) || !status.pod_ips.is_empty());
    if is_given || super::cluster::has_ended(&object.value) {
        return None;
    }
    let address = addresses.of_pod(0, super::cluster::is_on_host_network(&object.value))?;
    Some(object.changed(|pod| {
        pod.status.get_or_insert_default().pod_ip = Some(address.to_string().into());
        pod.spec.get_or_insert_default().node_name.get_or_insert_with(|| this_node.into());
    }))
}

/// The slices of services that have a selector and none: one for each address family and way in which pods have the ports.
fn slices(manifests: &Manifests, assumed: &mut Assumed) -> Documents {
    let mut text = Documents::default();
    let known: HashSet<(Name, Name)> = manifests
        .endpoint_slices()
        .iter()
        .filter_map(|slice| Some((slice.namespace.clone(), slice.value.labels.service.clone()?)))
        .collect();
    for service in manifests.services() {
        let Some(spec) = applied(service) else { continue };
        let selector = &spec.selector;
        if selector.is_empty()
            || known.contains(&(service.namespace.clone(), service.name.clone()))
            || spec.type_.as_deref() == Some("ExternalName")
        {
            continue;
        }
        let mut alike: BTreeMap<(bool, String), (Value, Vec<Value>)> = BTreeMap::new();
        for pod in
            manifests.pods().iter().filter(|pod| pod.namespace == service.namespace && is_selected(pod, selector))
        {
            let ports: Vec<Value> = spec.ports.iter().filter_map(|port| slice_port(port, pod)).collect();
            let ports = Value::Array(ports);
            let node = pod.value.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
            for address in addresses_of(pod) {
                let (_, endpoints) =
                    alike.entry((address.is_ipv6(), ports.to_string())).or_insert_with(|| (ports.clone(), Vec::new()));
                endpoints.push(json!({"addresses": [address], "nodeName": node, "conditions": {"ready": true}}));
            }
        }
        assumed.slices += 1;
        // Also one without endpoints, as Kubernetes has: then nothing is missing but pods.
        if alike.is_empty() {
            let ports =
                spec.ports.iter().map(|port| json!({"name": port.name, "protocol": port.protocol, "port": null}));
            alike.insert((false, String::new()), (ports.collect(), Vec::new()));
        }
        for (index, ((is_ipv6, _), (ports, endpoints))) in alike.into_iter().enumerate() {
            text.add(&json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "addressType": if is_ipv6 { "IPv6" } else { "IPv4" },
                "metadata": {
                    "name": format!("{}-{index}", service.name), "namespace": &*service.namespace,
                    "labels": {SERVICE_NAME_LABEL: &*service.name},
                },
                "ports": ports, "endpoints": endpoints,
            }));
        }
    }
    text
}

/// What the controller of endpoints reads of a Service.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Applied {
    #[serde(rename = "type")]
    type_: Option<String>,
    selector: BTreeMap<String, String>,
    ports: Vec<AppliedPort>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct AppliedPort {
    name: Option<String>,
    protocol: Option<String>,
    port: i32,
    target_port: Option<IntOrString>,
}

fn applied(service: &Object<Service>) -> Option<Applied> {
    service.tree(|node| typed::read(node.get("spec")?, "", |_| Severity::Note, &mut Problems::default()))?
}

fn is_selected(pod: &Object<Pod>, selector: &BTreeMap<String, String>) -> bool {
    let labels = &pod.value.metadata.labels;
    selector.iter().all(|(key, value)| labels.get(key).is_some_and(|own| **own == **value))
}

fn addresses_of(pod: &Object<Pod>) -> BTreeSet<IpAddr> {
    let Some(status) = &pod.value.status else { return BTreeSet::new() };
    let texts = status.pod_ips.iter().chain(&status.pod_ip);
    texts.filter_map(|text| parse_ip(text).ok()).collect()
}

/// The port of a service at a pod, as a slice has it; `None` where the pod has no port of the name that is meant.
fn slice_port(port: &AppliedPort, pod: &Object<Pod>) -> Option<Value> {
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    let number = match &port.target_port {
        None | Some(IntOrString::Int(0)) => port.port,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(name)) => match name.parse() {
            Ok(number) => number,
            Err(_) => {
                let spec = pod.value.spec.as_ref()?;
                let mut ports = spec.containers.iter().chain(&spec.init_containers).flat_map(|one| &one.ports);
                let named = ports.find(|port| {
                    port.name.as_deref() == Some(name) && port.protocol.as_deref().unwrap_or("TCP") == protocol
                });
                named?.container_port
            }
        },
    };
    Some(json!({"name": port.name.clone().unwrap_or_default(), "protocol": protocol, "port": number}))
}
