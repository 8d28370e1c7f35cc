//! Kubernetes' kinds with what weir reads of them, and no more: a cluster has a hundred thousand of some.
//!
//! serde skips the rest. What the types of Kubernetes have besides is listed in [`known_besides`], so that a misspelt field can be told from
//! one that weir has no use for.

use std::{borrow::Cow, collections::BTreeMap, net::IpAddr, sync::Arc};

use serde::{Deserialize, Deserializer};
use weir_nat::Topology;

use super::meta::{self, Metadata, maybe_name, name, names};
use crate::text::address::parse_ip;

pub use super::meta::{Labels, MIRRORED_UID, Name, POD_IP, POD_IPS};

/// The label that says which service a slice is of.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// The label of services and slices that says which proxy they are for.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";

/// The label of services and slices that no proxy serves, whatever its value is.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// The fields that a type of Kubernetes has and the struct of that name here has not (Kubernetes' API, v1.33 to v1.37).
pub fn known_besides(name: &str) -> &'static [&'static str] {
    match name {
        "Metadata" => &[
            "deletionGracePeriodSeconds",
            "finalizers",
            "generateName",
            "generation",
            "managedFields",
            "name",
            "namespace",
            "ownerReferences",
            "resourceVersion",
            "selfLink",
        ],
        "KubernetesNode" => &["apiVersion", "kind"],
        "NodeSpec" => &["configSource", "externalID", "podPreemptionPolicy", "providerID", "taints", "unschedulable"],
        "NodeStatus" => &[
            "allocatable",
            "capacity",
            "config",
            "daemonEndpoints",
            "declaredFeatures",
            "features",
            "images",
            "nodeInfo",
            "phase",
            "runtimeHandlers",
            "volumesAttached",
            "volumesInUse",
        ],
        "NodeCondition" => &["lastHeartbeatTime", "lastTransitionTime", "message", "reason"],
        "Namespace" => &["apiVersion", "kind", "spec", "status"],
        "ServiceAccount" => &["apiVersion", "kind", "automountServiceAccountToken", "imagePullSecrets", "secrets"],
        "Pod" => &["apiVersion", "kind"],
        "PodSpec" => &[
            "activeDeadlineSeconds",
            "affinity",
            "automountServiceAccountToken",
            "dnsConfig",
            "dnsPolicy",
            "enableServiceLinks",
            "ephemeralContainers",
            "evictionResponders",
            "hostAliases",
            "hostIPC",
            "hostPID",
            "hostUsers",
            "hostname",
            "hostnameOverride",
            "imagePullSecrets",
            "nodeSelector",
            "os",
            "overhead",
            "preemptionPolicy",
            "priority",
            "priorityClassName",
            "readinessGates",
            "resourceClaims",
            "resources",
            "restartPolicy",
            "runtimeClassName",
            "schedulerName",
            "schedulingGates",
            "schedulingGroup",
            "securityContext",
            "setHostnameAsFQDN",
            "shareProcessNamespace",
            "subdomain",
            "terminationGracePeriodSeconds",
            "tolerations",
            "topologySpreadConstraints",
            "volumes",
        ],
        "Container" => &[
            "args",
            "command",
            "env",
            "envFrom",
            "image",
            "imagePullPolicy",
            "lifecycle",
            "livenessProbe",
            "name",
            "readinessProbe",
            "resizePolicy",
            "resources",
            "restartPolicyRules",
            "securityContext",
            "startupProbe",
            "stdin",
            "stdinOnce",
            "terminationMessagePath",
            "terminationMessagePolicy",
            "tty",
            "volumeDevices",
            "volumeMounts",
            "workingDir",
        ],
        "PodStatus" => &[
            "allocatedResources",
            "conditions",
            "containerStatuses",
            "ephemeralContainerStatuses",
            "extendedResourceClaimStatus",
            "hostIP",
            "hostIPs",
            "initContainerStatuses",
            "message",
            "nodeAllocatableResourceClaimStatuses",
            "nominatedNodeName",
            "observedGeneration",
            "qosClass",
            "reason",
            "resize",
            "resourceClaimStatuses",
            "resources",
            "startTime",
            "volumeHealth",
        ],
        "Service" => &["apiVersion", "kind"],
        "ServiceSpec" => &[
            "allocateLoadBalancerNodePorts",
            "externalName",
            "ipFamilies",
            "ipFamilyPolicy",
            "loadBalancerClass",
            "loadBalancerIP",
            "publishNotReadyAddresses",
            "trafficDistribution",
        ],
        "ServicePort" => &["appProtocol", "targetPort"],
        "ServiceStatus" => &["conditions"],
        "Ingress" => &["hostname", "ports"],
        "EndpointSlice" => &["apiVersion", "kind"],
        "Endpoint" => &["deprecatedTopology", "hostname", "targetRef", "zone"],
        "SlicePort" => &["appProtocol"],
        "NetworkPolicy" => &["apiVersion", "kind", "metadata", "status"],
        "ServiceCidr" => &["apiVersion", "kind", "metadata", "status"],
        _ => &[],
    }
}

/// v1 Namespace.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// Of its metadata.
    pub metadata: Metadata,
}

/// v1 ServiceAccount.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ServiceAccount {
    /// Of its metadata.
    pub metadata: Metadata,
}

/// v1 Node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct KubernetesNode {
    /// Of its metadata, with all that is Calico's.
    pub metadata: Metadata,
    /// Its spec.
    pub spec: Option<NodeSpec>,
    /// Of its status.
    pub status: NodeStatus,
}

/// Of a Node's spec.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    /// The first range of its pods.
    #[serde(rename = "podCIDR", deserialize_with = "maybe_name")]
    pub pod_cidr: Option<Name>,
    /// All ranges of its pods.
    #[serde(rename = "podCIDRs", deserialize_with = "names")]
    pub pod_cidrs: Box<[Name]>,
}

/// An address of a Node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    /// The address.
    pub address: String,
    /// What it is: "InternalIP".
    #[serde(rename = "type")]
    pub type_: String,
}

/// Of a Node's status.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Its addresses.
    pub addresses: Box<[NodeAddress]>,
    /// The status of its condition [`NETWORK_UNAVAILABLE`], if it has one. The kubelet's own conditions change with each heartbeat.
    #[serde(rename = "conditions", deserialize_with = "network_unavailable")]
    pub network_unavailable: Option<Name>,
}

/// The condition by which a node's network says that it is there.
pub const NETWORK_UNAVAILABLE: &str = "NetworkUnavailable";

fn network_unavailable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Name>, D::Error> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct NodeCondition {
        #[serde(rename = "type", deserialize_with = "name")]
        type_: Name,
        #[serde(deserialize_with = "maybe_name")]
        status: Option<Name>,
    }
    let conditions = Option::<Vec<NodeCondition>>::deserialize(deserializer)?;
    let own = conditions.into_iter().flatten().find(|condition| &*condition.type_ == NETWORK_UNAVAILABLE);
    Ok(own.and_then(|condition| condition.status))
}

/// v1 Pod.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(from = "WholePod")]
pub struct Pod {
    /// Of its metadata. Annotations with its addresses are there only while nothing better says them: see [`Pod::awaits_its_addresses`].
    pub metadata: Metadata,
    /// Of its spec.
    pub spec: Option<PodSpec>,
    /// Of its status.
    pub status: Option<PodStatus>,
}

/// A Pod as it stands in its text.
#[derive(Default, Deserialize)]
#[serde(rename = "Pod", default)]
struct WholePod {
    metadata: Metadata,
    spec: Option<PodSpec>,
    status: Option<PodStatus>,
}

impl From<WholePod> for Pod {
    fn from(WholePod { metadata, spec, status }: WholePod) -> Self {
        let mut pod = Self { metadata, spec, status };
        if !pod.awaits_its_addresses() {
            // So that neither they nor what becomes of them later make a pod another one.
            let annotations = std::mem::take(&mut pod.metadata.annotations);
            pod.metadata.annotations = annotations.without(&[POD_IP, POD_IPS]);
        }
        pod
    }
}

impl Pod {
    /// Whether it is on a node, has or gets a network of its own there, and its status does not say its addresses yet: until then its CNI plugin
    /// may, by annotations.
    fn awaits_its_addresses(&self) -> bool {
        let Some(spec) = &self.spec else { return false };
        let is_placed = spec.node_name.as_ref().is_some_and(|node| !node.is_empty()) && spec.host_network != Some(true);
        is_placed
            && self.status.as_ref().is_none_or(|status| {
                status.pod_ips.is_empty()
                    && status.pod_ip.as_ref().is_none_or(|ip| ip.is_empty())
                    && !matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
            })
    }
}

/// Of a Pod's spec.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// Whether it has the host's network.
    pub host_network: Option<bool>,
    /// The node that it is on.
    #[serde(deserialize_with = "maybe_name")]
    pub node_name: Option<Name>,
    /// Its account.
    #[serde(deserialize_with = "maybe_name")]
    pub service_account_name: Option<Name>,
    /// The older name of that.
    #[serde(deserialize_with = "maybe_name")]
    pub service_account: Option<Name>,
    /// Its containers.
    pub containers: Box<[Container]>,
    /// Those that run before, or beside.
    pub init_containers: Box<[Container]>,
}

/// Of a container.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Container {
    /// "Always" for an init container that goes on running.
    #[serde(deserialize_with = "maybe_name")]
    pub restart_policy: Option<Name>,
    /// Its ports.
    pub ports: Box<[ContainerPort]>,
}

/// A port of a container.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    /// Its name.
    #[serde(deserialize_with = "maybe_name")]
    pub name: Option<Name>,
    /// Its protocol; TCP where it is unset.
    #[serde(deserialize_with = "maybe_name")]
    pub protocol: Option<Name>,
    /// Its number.
    pub container_port: i32,
    /// The node's port that leads there.
    pub host_port: Option<i32>,
    /// On which of the node's addresses.
    #[serde(rename = "hostIP", deserialize_with = "maybe_name")]
    pub host_ip: Option<Name>,
}

/// Of a Pod's status.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct PodStatus {
    /// Whether it runs.
    #[serde(deserialize_with = "maybe_name")]
    pub phase: Option<Name>,
    /// Its first address.
    #[serde(rename = "podIP", deserialize_with = "maybe_name")]
    pub pod_ip: Option<Name>,
    /// Its addresses.
    #[serde(rename = "podIPs", deserialize_with = "pod_ips")]
    pub pod_ips: Box<[Name]>,
}

fn pod_ips<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Box<[Name]>, D::Error> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct PodIp {
        #[serde(deserialize_with = "name")]
        ip: Name,
    }
    Ok(Option::<Vec<PodIp>>::deserialize(deserializer)?.into_iter().flatten().map(|one| one.ip).collect())
}

/// v1 Service.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Service {
    /// Whom its labels leave it to.
    #[serde(rename = "metadata", deserialize_with = "for_proxy")]
    pub for_proxy: ForProxy,
    /// Of its spec.
    pub spec: Option<ServiceSpec>,
    /// status.loadBalancer.ingress.
    #[serde(rename = "status", deserialize_with = "ingress")]
    pub ingress: Box<[Ingress]>,
}

/// Of a Service's spec.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// Its type.
    #[serde(rename = "type", deserialize_with = "maybe_name")]
    pub type_: Option<Name>,
    /// Its first address, or "None".
    #[serde(rename = "clusterIP", deserialize_with = "maybe_name")]
    pub cluster_ip: Option<Name>,
    /// Its addresses.
    #[serde(rename = "clusterIPs", deserialize_with = "names")]
    pub cluster_ips: Box<[Name]>,
    /// Other addresses that it is served at.
    #[serde(rename = "externalIPs", deserialize_with = "names")]
    pub external_ips: Box<[Name]>,
    /// Who may use its load balancer.
    #[serde(deserialize_with = "names")]
    pub load_balancer_source_ranges: Box<[Name]>,
    /// Which backends are for clients outside of the cluster.
    #[serde(deserialize_with = "maybe_name")]
    pub external_traffic_policy: Option<Name>,
    /// Which backends are for clients inside.
    #[serde(deserialize_with = "maybe_name")]
    pub internal_traffic_policy: Option<Name>,
    /// Where load balancers ask for local backends.
    pub health_check_node_port: Option<i32>,
    /// "ClientIP" or "None".
    #[serde(deserialize_with = "maybe_name")]
    pub session_affinity: Option<Name>,
    /// sessionAffinityConfig.clientIP.timeoutSeconds.
    #[serde(rename = "sessionAffinityConfig", deserialize_with = "affinity_seconds")]
    pub affinity_seconds: Option<i32>,
    /// Whether a selector says which pods are its backends.
    #[serde(rename = "selector", deserialize_with = "is_not_empty")]
    pub has_selector: bool,
    /// Its ports.
    pub ports: Box<[ServicePort]>,
}

/// A port of a Service.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    /// Its name.
    #[serde(deserialize_with = "maybe_name")]
    pub name: Option<Name>,
    /// Its protocol; TCP where it is unset.
    #[serde(deserialize_with = "maybe_name")]
    pub protocol: Option<Name>,
    /// Its number.
    pub port: i32,
    /// Its number on nodes.
    pub node_port: Option<i32>,
}

/// An address of a load balancer.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ingress {
    /// The address.
    #[serde(deserialize_with = "maybe_name")]
    pub ip: Option<Name>,
    /// "VIP" or "Proxy".
    #[serde(deserialize_with = "maybe_name")]
    pub ip_mode: Option<Name>,
}

/// Which proxy a service or a slice is for, by its labels.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ForProxy {
    name: Option<Name>,
    is_headless: bool,
}

impl ForProxy {
    fn of(labels: &Labels) -> Self {
        Self { name: labels.get(PROXY_NAME_LABEL).cloned(), is_headless: labels.get(HEADLESS_LABEL).is_some() }
    }

    /// The label that leaves it to another than the proxy of that name, or than the one without a name; `None`: it is for that one.
    pub fn left_to_others(&self, own: Option<&str>) -> Option<&'static str> {
        match self.name.as_deref() == own {
            false => Some(PROXY_NAME_LABEL),
            true => self.is_headless.then_some(HEADLESS_LABEL),
        }
    }
}

fn for_proxy<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ForProxy, D::Error> {
    Metadata::deserialize(deserializer).map(|metadata| ForProxy::of(&metadata.labels))
}

fn ingress<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Box<[Ingress]>, D::Error> {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct ServiceStatus {
        load_balancer: Option<LoadBalancerStatus>,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct LoadBalancerStatus {
        ingress: Option<Box<[Ingress]>>,
    }
    let status = Option::<ServiceStatus>::deserialize(deserializer)?;
    let balancer = status.and_then(|status| status.load_balancer);
    Ok(balancer.and_then(|balancer| balancer.ingress).unwrap_or_default())
}

fn affinity_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i32>, D::Error> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct SessionAffinityConfig {
        #[serde(rename = "clientIP")]
        client_ip: Option<ClientIpConfig>,
    }
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct ClientIpConfig {
        timeout_seconds: Option<i32>,
    }
    let config = Option::<SessionAffinityConfig>::deserialize(deserializer)?;
    Ok(config.and_then(|config| config.client_ip).and_then(|client_ip| client_ip.timeout_seconds))
}

fn is_not_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(Option::<BTreeMap<Cow<'de, str>, Cow<'de, str>>>::deserialize(deserializer)?.is_some_and(|map| !map.is_empty()))
}

/// discovery.k8s.io/v1 EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSlice {
    /// What its labels say.
    #[serde(rename = "metadata", deserialize_with = "slice_labels")]
    pub labels: SliceLabels,
    /// "IPv4", "IPv6" or "FQDN".
    #[serde(deserialize_with = "name")]
    pub address_type: Name,
    /// Its endpoints.
    pub endpoints: Box<[SliceEndpoint]>,
    /// Its ports.
    pub ports: Box<[SlicePort]>,
}

/// What the labels of a slice say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SliceLabels {
    /// The service that it is of.
    pub service: Option<Name>,
    /// Whom they leave it to.
    pub for_proxy: ForProxy,
}

fn slice_labels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SliceLabels, D::Error> {
    let Metadata { labels, .. } = Metadata::deserialize(deserializer)?;
    Ok(SliceLabels { service: labels.get(SERVICE_NAME_LABEL).cloned(), for_proxy: ForProxy::of(&labels) })
}

/// An endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(from = "Endpoint")]
pub struct SliceEndpoint {
    /// Its addresses.
    pub addresses: Addresses,
    /// Condition `ready`.
    pub ready: Option<bool>,
    /// Condition `serving`.
    pub serving: Option<bool>,
    /// Condition `terminating`.
    pub terminating: Option<bool>,
    /// Where it is, and whom it is meant for.
    pub topology: Option<Arc<Topology>>,
}

impl SliceEndpoint {
    /// The node that it is on.
    pub fn node_name(&self) -> Option<&str> {
        self.topology.as_ref()?.node_name.as_deref()
    }
}

fn hints<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[Vec<Name>; 2], D::Error> {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct EndpointHints {
        for_zones: Option<Vec<Hint>>,
        for_nodes: Option<Vec<Hint>>,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Hint {
        #[serde(deserialize_with = "name")]
        name: Name,
    }
    let EndpointHints { for_zones, for_nodes } = Option::deserialize(deserializer)?.unwrap_or_default();
    Ok([for_zones, for_nodes].map(|hints| hints.into_iter().flatten().map(|hint| hint.name).collect()))
}

/// An endpoint as it is written.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Endpoint {
    addresses: Addresses,
    conditions: EndpointConditions,
    /// Zones and nodes.
    #[serde(deserialize_with = "hints")]
    hints: [Vec<Name>; 2],
    #[serde(deserialize_with = "maybe_name")]
    node_name: Option<Name>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct EndpointConditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

impl From<Endpoint> for SliceEndpoint {
    fn from(written: Endpoint) -> Self {
        let Endpoint { addresses, conditions, hints: [zone_hints, node_hints], node_name } = written;
        let EndpointConditions { ready, serving, terminating } = conditions;
        let topology = Topology { node_name, zone_hints, node_hints };
        let topology = (topology != Topology::default()).then(|| meta::shared_topology(topology));
        Self { addresses, ready, serving, terminating, topology }
    }
}

/// Addresses of an endpoint: nearly always one.
#[derive(Clone, Debug, PartialEq)]
pub enum Addresses {
    /// One.
    One(Address),
    /// None, or several.
    Several(Box<[Address]>),
}

impl Default for Addresses {
    fn default() -> Self {
        Self::Several(Box::default())
    }
}

impl<'de> Deserialize<'de> for Addresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut addresses = Vec::<Address>::deserialize(deserializer)?;
        Ok(match addresses.len() {
            1 => Self::One(addresses.remove(0)),
            _ => Self::Several(addresses.into()),
        })
    }
}

/// An address as it was written.
#[derive(Clone, Debug, PartialEq)]
pub enum Address {
    /// As the address itself is written.
    Ip(IpAddr),
    /// Otherwise, or what is none.
    Text(Box<str>),
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        Ok(match parse_ip(&text) {
            Ok(address) if address.to_string() == text => Self::Ip(address),
            _ => Self::Text(text.into()),
        })
    }
}

impl Addresses {
    /// All.
    pub fn as_slice(&self) -> &[Address] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Several(several) => several,
        }
    }
}

impl Address {
    /// The text.
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Self::Ip(address) => Cow::Owned(address.to_string()),
            Self::Text(text) => Cow::Borrowed(text),
        }
    }

    /// The address.
    ///
    /// # Errors
    /// As [`parse_ip`].
    pub fn ip(&self) -> Result<IpAddr, crate::text::address::AddressError> {
        match self {
            Self::Ip(address) => Ok(*address),
            Self::Text(text) => parse_ip(text),
        }
    }
}

/// networking.k8s.io/v1 ServiceCIDR.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ServiceCidr {
    /// Its spec.
    pub spec: ServiceCidrSpec,
}

/// Of a ServiceCIDR's spec.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ServiceCidrSpec {
    /// Where cluster IPs are allocated, one of each family.
    #[serde(deserialize_with = "names")]
    pub cidrs: Box<[Name]>,
}

/// A port of a slice.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct SlicePort {
    /// Its name.
    #[serde(deserialize_with = "maybe_name")]
    pub name: Option<Name>,
    /// Its protocol; TCP where it is unset.
    #[serde(deserialize_with = "maybe_name")]
    pub protocol: Option<Name>,
    /// Its number.
    pub port: Option<i32>,
}
