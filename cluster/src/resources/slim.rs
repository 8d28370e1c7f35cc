//! Kubernetes' kinds with what weir reads of them, and no more: a cluster has a hundred thousand of some.
//!
//! An object is read as the whole type first, because what is wrong with any of its fields is to be told, and that is dropped then. Texts
//! that many objects repeat are held once.

use std::{borrow::Cow, net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery, networking::v1::NetworkPolicy},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use serde::de::DeserializeOwned;
use weir_nat::Hints;

use super::{calico::Resource, identity::Names};
use crate::text::{Problems, Severity, address::parse_ip, tree::Node, typed};

/// A text that may be held by many.
pub type Name = Arc<str>;
/// The label that says which service a slice is of.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// What is kept of an object.
pub trait Slim: Sized {
    /// What it is read as.
    type Whole: DeserializeOwned;

    /// What is kept of that.
    fn of(whole: Self::Whole, names: &Names) -> Self;

    /// Drops those parts of a tree that cannot be read, as reading it does, without a word.
    fn drop_faulty(node: &Node) {
        let _: Option<Self::Whole> = typed::read(node, "", |_| Severity::Note, &mut Problems::default());
    }
}

impl<S> Slim for Resource<S>
where
    Self: DeserializeOwned,
{
    type Whole = Self;

    fn of(whole: Self, _: &Names) -> Self {
        whole
    }
}

impl Slim for NetworkPolicy {
    type Whole = Self;

    fn of(mut whole: Self, _: &Names) -> Self {
        whole.metadata = ObjectMeta::default();
        whole
    }
}

/// Labels or annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels(Box<[(Name, Name)]>);

impl Labels {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Name> {
        self.iter().find_map(|(known, value)| (&**known == key).then_some(value))
    }

    /// All, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = &(Name, Name)> {
        self.0.iter()
    }

    /// As a map of its own.
    pub fn to_map(&self) -> std::collections::BTreeMap<String, String> {
        self.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }
}

fn list<T, S>(given: Option<Vec<T>>, keep: impl FnMut(T) -> S) -> Box<[S]> {
    given.into_iter().flatten().map(keep).collect()
}

/// Of an object's metadata.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    /// Its labels.
    pub labels: Labels,
    /// Those annotations that weir reads.
    pub annotations: Labels,
    /// Its uid.
    pub uid: Option<Name>,
    /// When it was made.
    pub creation_timestamp: Option<Time>,
    /// When it shall go.
    pub deletion_timestamp: Option<Time>,
}

impl Metadata {
    /// With the annotations that `is_read` names.
    fn of(whole: ObjectMeta, is_read: impl Fn(&str) -> bool, names: &Names) -> Self {
        let pair = |(key, value): (String, String)| (names.of(&key), names.of(&value));
        Self {
            labels: Labels(whole.labels.into_iter().flatten().map(pair).collect()),
            annotations: Labels(
                whole.annotations.into_iter().flatten().filter(|(key, _)| is_read(key)).map(pair).collect(),
            ),
            uid: whole.uid.map(|uid| uid.into()),
            creation_timestamp: whole.creation_timestamp,
            deletion_timestamp: whole.deletion_timestamp,
        }
    }
}

macro_rules! metadata_only {
    ($($(#[$doc:meta])* $name:ident = $whole:ty;)+) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, Default)]
            pub struct $name {
                /// Of its metadata.
                pub metadata: Metadata,
            }

            impl Slim for $name {
                type Whole = $whole;

                fn of(whole: $whole, names: &Names) -> Self {
                    Self { metadata: Metadata::of(whole.metadata, |_| false, names) }
                }
            }
        )+
    };
}

metadata_only! {
    /// v1 Namespace.
    Namespace = core::Namespace;
    /// v1 ServiceAccount.
    ServiceAccount = core::ServiceAccount;
}

/// v1 Node.
#[derive(Clone, Debug, Default)]
pub struct KubernetesNode {
    /// Of its metadata, with all that is Calico's.
    pub metadata: Metadata,
    /// Its spec.
    pub spec: Option<NodeSpec>,
    /// status.addresses.
    pub addresses: Box<[core::NodeAddress]>,
}

/// Of a Node's spec.
#[derive(Clone, Debug, Default)]
pub struct NodeSpec {
    /// The first range of its pods.
    pub pod_cidr: Option<Name>,
    /// All ranges of its pods.
    pub pod_cidrs: Box<[Name]>,
}

impl Slim for KubernetesNode {
    type Whole = core::Node;

    fn of(whole: core::Node, names: &Names) -> Self {
        Self {
            metadata: Metadata::of(whole.metadata, |key| key.starts_with("projectcalico.org/"), names),
            spec: whole.spec.map(|spec| NodeSpec {
                pod_cidr: spec.pod_cidr.map(|cidr| names.of(&cidr)),
                pod_cidrs: list(spec.pod_cidrs, |cidr| names.of(&cidr)),
            }),
            addresses: whole.status.and_then(|status| status.addresses).unwrap_or_default().into(),
        }
    }
}

/// The annotation of the object that stands for a static pod.
pub const MIRRORED_UID: &str = "kubernetes.io/config.mirror";

/// v1 Pod.
#[derive(Clone, Debug, Default)]
pub struct Pod {
    /// Of its metadata.
    pub metadata: Metadata,
    /// Of its spec.
    pub spec: Option<PodSpec>,
    /// Of its status.
    pub status: Option<PodStatus>,
}

/// Of a Pod's spec.
#[derive(Clone, Debug, Default)]
pub struct PodSpec {
    /// Whether it has the host's network.
    pub host_network: Option<bool>,
    /// The node that it is on.
    pub node_name: Option<Name>,
    /// Its account.
    pub service_account_name: Option<Name>,
    /// The older name of that.
    pub service_account: Option<Name>,
    /// Its containers.
    pub containers: Box<[Container]>,
    /// Those that run before, or beside.
    pub init_containers: Box<[Container]>,
}

/// Of a container.
#[derive(Clone, Debug, Default)]
pub struct Container {
    /// "Always" for an init container that goes on running.
    pub restart_policy: Option<Name>,
    /// Its ports.
    pub ports: Box<[ContainerPort]>,
}

/// A port of a container.
#[derive(Clone, Debug, Default)]
pub struct ContainerPort {
    /// Its name.
    pub name: Option<Name>,
    /// Its protocol; TCP where it is unset.
    pub protocol: Option<Name>,
    /// Its number.
    pub container_port: i32,
    /// The node's port that leads there.
    pub host_port: Option<i32>,
    /// On which of the node's addresses.
    pub host_ip: Option<Name>,
}

/// Of a Pod's status.
#[derive(Clone, Debug, Default)]
pub struct PodStatus {
    /// Whether it runs.
    pub phase: Option<Name>,
    /// Its first address.
    pub pod_ip: Option<Name>,
    /// Its addresses.
    pub pod_ips: Box<[Name]>,
}

impl Slim for Pod {
    type Whole = core::Pod;

    fn of(whole: core::Pod, names: &Names) -> Self {
        let name = |text: Option<String>| text.map(|text| names.of(&text));
        let container = |container: core::Container| Container {
            restart_policy: name(container.restart_policy),
            ports: list(container.ports, |port| ContainerPort {
                name: name(port.name),
                protocol: name(port.protocol),
                container_port: port.container_port,
                host_port: port.host_port,
                host_ip: name(port.host_ip),
            }),
        };
        Self {
            metadata: Metadata::of(whole.metadata, |key| key == MIRRORED_UID, names),
            spec: whole.spec.map(|spec| PodSpec {
                host_network: spec.host_network,
                node_name: name(spec.node_name),
                service_account_name: name(spec.service_account_name),
                service_account: name(spec.service_account),
                containers: list(Some(spec.containers), container),
                init_containers: list(spec.init_containers, container),
            }),
            status: whole.status.map(|status| PodStatus {
                phase: name(status.phase),
                pod_ip: name(status.pod_ip),
                pod_ips: list(status.pod_ips, |entry| names.of(&entry.ip)),
            }),
        }
    }
}

/// v1 Service.
#[derive(Clone, Debug, Default)]
pub struct Service {
    /// Of its spec.
    pub spec: Option<ServiceSpec>,
    /// status.loadBalancer.ingress.
    pub ingress: Box<[Ingress]>,
}

/// Of a Service's spec.
#[derive(Clone, Debug, Default)]
pub struct ServiceSpec {
    /// Its type.
    pub type_: Option<Name>,
    /// Its first address, or "None".
    pub cluster_ip: Option<Name>,
    /// Its addresses.
    pub cluster_ips: Box<[Name]>,
    /// Other addresses that it is served at.
    pub external_ips: Box<[Name]>,
    /// Who may use its load balancer.
    pub load_balancer_source_ranges: Box<[Name]>,
    /// Which backends are for clients outside of the cluster.
    pub external_traffic_policy: Option<Name>,
    /// Which backends are for clients inside.
    pub internal_traffic_policy: Option<Name>,
    /// Where load balancers ask for local backends.
    pub health_check_node_port: Option<i32>,
    /// "ClientIP" or "None".
    pub session_affinity: Option<Name>,
    /// sessionAffinityConfig.clientIP.timeoutSeconds.
    pub affinity_seconds: Option<i32>,
    /// Whether a selector says which pods are its backends.
    pub has_selector: bool,
    /// Its ports.
    pub ports: Box<[ServicePort]>,
}

/// A port of a Service.
#[derive(Clone, Debug, Default)]
pub struct ServicePort {
    /// Its name.
    pub name: Option<Name>,
    /// Its protocol; TCP where it is unset.
    pub protocol: Option<Name>,
    /// Its number.
    pub port: i32,
    /// Its number on nodes.
    pub node_port: Option<i32>,
}

/// An address of a load balancer.
#[derive(Clone, Debug, Default)]
pub struct Ingress {
    /// The address.
    pub ip: Option<Name>,
    /// "VIP" or "Proxy".
    pub ip_mode: Option<Name>,
}

impl Slim for Service {
    type Whole = core::Service;

    fn of(whole: core::Service, names: &Names) -> Self {
        let name = |text: Option<String>| text.map(|text| names.of(&text));
        let all = |texts| list(texts, |text: String| names.of(&text));
        let ingress = whole.status.and_then(|status| status.load_balancer).and_then(|balancer| balancer.ingress);
        Self {
            spec: whole.spec.map(|spec| ServiceSpec {
                type_: name(spec.type_),
                cluster_ip: name(spec.cluster_ip),
                cluster_ips: all(spec.cluster_ips),
                external_ips: all(spec.external_ips),
                load_balancer_source_ranges: all(spec.load_balancer_source_ranges),
                external_traffic_policy: name(spec.external_traffic_policy),
                internal_traffic_policy: name(spec.internal_traffic_policy),
                health_check_node_port: spec.health_check_node_port,
                session_affinity: name(spec.session_affinity),
                affinity_seconds: spec
                    .session_affinity_config
                    .and_then(|config| config.client_ip)
                    .and_then(|client_ip| client_ip.timeout_seconds),
                has_selector: spec.selector.is_some_and(|selector| !selector.is_empty()),
                ports: list(spec.ports, |port| ServicePort {
                    name: name(port.name),
                    protocol: name(port.protocol),
                    port: port.port,
                    node_port: port.node_port,
                }),
            }),
            ingress: list(ingress, |one| Ingress { ip: name(one.ip), ip_mode: name(one.ip_mode) }),
        }
    }
}

/// discovery.k8s.io/v1 EndpointSlice.
#[derive(Clone, Debug)]
pub struct EndpointSlice {
    /// The service that its label says it is of.
    pub service: Option<Name>,
    /// "IPv4", "IPv6" or "FQDN".
    pub address_type: Name,
    /// Its endpoints.
    pub endpoints: Box<[SliceEndpoint]>,
    /// Its ports.
    pub ports: Box<[SlicePort]>,
}

/// An endpoint of a slice.
#[derive(Clone, Debug)]
pub struct SliceEndpoint {
    /// Its addresses.
    pub addresses: Addresses,
    /// The node that it is on.
    pub node_name: Option<Name>,
    /// Condition `ready`.
    pub ready: Option<bool>,
    /// Condition `serving`.
    pub serving: Option<bool>,
    /// Condition `terminating`.
    pub terminating: Option<bool>,
    /// Whom it is meant for.
    pub hints: Option<Box<ForZonesAndNodes>>,
}

/// Whom an endpoint is meant for.
#[derive(Clone, Debug, Default)]
pub struct ForZonesAndNodes {
    /// hints.forZones.
    pub zones: Hints,
    /// hints.forNodes.
    pub nodes: Hints,
}

/// Addresses of an endpoint: nearly always one.
#[derive(Clone, Debug)]
pub enum Addresses {
    /// One.
    One(Address),
    /// None, or several.
    Several(Box<[Address]>),
}

/// An address as it was written.
#[derive(Clone, Debug)]
pub enum Address {
    /// As the address itself is written.
    Ip(IpAddr),
    /// Otherwise, or what is none.
    Text(Box<str>),
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
    fn of(text: String) -> Self {
        match parse_ip(&text) {
            Ok(address) if address.to_string() == text => Self::Ip(address),
            _ => Self::Text(text.into()),
        }
    }

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

/// A port of a slice.
#[derive(Clone, Debug)]
pub struct SlicePort {
    /// Its name.
    pub name: Option<Name>,
    /// Its protocol; TCP where it is unset.
    pub protocol: Option<Name>,
    /// Its number.
    pub port: Option<i32>,
}

impl Slim for EndpointSlice {
    type Whole = discovery::EndpointSlice;

    fn of(whole: discovery::EndpointSlice, names: &Names) -> Self {
        let name = |text: Option<String>| text.map(|text| names.of(&text));
        let endpoint = |endpoint: discovery::Endpoint| {
            let mut addresses: Vec<Address> = endpoint.addresses.into_iter().map(Address::of).collect();
            let conditions = endpoint.conditions.unwrap_or_default();
            let hints = endpoint.hints.map(|hints| ForZonesAndNodes {
                zones: hints.for_zones.into_iter().flatten().map(|zone| names.of(&zone.name)).collect(),
                nodes: hints.for_nodes.into_iter().flatten().map(|node| names.of(&node.name)).collect(),
            });
            SliceEndpoint {
                addresses: match addresses.len() {
                    1 => Addresses::One(addresses.remove(0)),
                    _ => Addresses::Several(addresses.into()),
                },
                node_name: name(endpoint.node_name),
                ready: conditions.ready,
                serving: conditions.serving,
                terminating: conditions.terminating,
                hints: hints.map(Box::new),
            }
        };
        let label = whole.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL));
        Self {
            service: label.map(|service| names.of(service)),
            address_type: names.of(&whole.address_type),
            endpoints: list(whole.endpoints, endpoint),
            ports: list(whole.ports, |port| SlicePort {
                name: name(port.name),
                protocol: name(port.protocol),
                port: port.port,
            }),
        }
    }
}
