//! ClusterNetworkPolicy (policy.networking.k8s.io/v1beta1, and v1alpha2, which has the same schema).

use serde::Deserialize;

use super::{
    calico::{Resource, Unread},
    meta::LabelSelector,
};

/// A ClusterNetworkPolicy.
pub type ClusterNetworkPolicy = Resource<ClusterNetworkPolicySpec>;

/// ClusterNetworkPolicy's spec.
#[derive(Clone, Debug, Deserialize)]
pub struct ClusterNetworkPolicySpec {
    /// Before or after NetworkPolicies.
    pub tier: ClusterTier,
    /// Lower comes first.
    pub priority: u16,
    /// The pods that it applies to.
    pub subject: PodSelection,
    /// Rules for what arrives.
    #[serde(default)]
    pub ingress: Vec<IngressRule>,
    /// Rules for what is sent.
    #[serde(default)]
    pub egress: Vec<EgressRule>,
}

/// Where a ClusterNetworkPolicy stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
pub enum ClusterTier {
    /// Before all NetworkPolicies.
    Admin,
    /// After all NetworkPolicies.
    Baseline,
}

/// What a matching rule does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
pub enum ClusterAction {
    /// The packet may go.
    Accept,
    /// The packet is dropped.
    Deny,
    /// The rest of the tier is skipped.
    Pass,
}

/// Pods by namespace, or by namespace and label.
#[derive(Clone, Debug, Deserialize)]
pub struct PodSelection {
    /// All pods of these namespaces.
    pub namespaces: Option<LabelSelector>,
    /// These pods.
    pub pods: Option<NamespacedPods>,
}

/// Pods by the labels of their namespace and by their own.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamespacedPods {
    /// Their namespaces.
    #[serde(default)]
    pub namespace_selector: LabelSelector,
    /// Their own labels.
    #[serde(default)]
    pub pod_selector: LabelSelector,
}

/// A rule for what arrives.
#[derive(Clone, Debug, Deserialize)]
pub struct IngressRule {
    /// A name; of no interest.
    pub name: Option<Unread>,
    /// What it does.
    pub action: ClusterAction,
    /// The senders.
    #[serde(default)]
    pub from: Vec<PodSelection>,
    /// Protocols and ports; none is all.
    #[serde(default)]
    pub protocols: Vec<ProtocolMatch>,
}

/// A rule for what is sent.
#[derive(Clone, Debug, Deserialize)]
pub struct EgressRule {
    /// A name; of no interest.
    pub name: Option<Unread>,
    /// What it does.
    pub action: ClusterAction,
    /// The receivers.
    #[serde(default)]
    pub to: Vec<EgressPeer>,
    /// Protocols and ports; none is all.
    #[serde(default)]
    pub protocols: Vec<ProtocolMatch>,
}

/// A receiver: one of these.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressPeer {
    /// All pods of these namespaces.
    pub namespaces: Option<LabelSelector>,
    /// These pods.
    pub pods: Option<NamespacedPods>,
    /// The addresses of the nodes with these labels.
    pub nodes: Option<LabelSelector>,
    /// Addresses in these CIDRs.
    pub networks: Option<Vec<String>>,
    /// What these names stand for.
    pub domain_names: Option<Unread>,
}

/// A protocol, with or without its port: one of these.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProtocolMatch {
    /// TCP.
    pub tcp: Option<Destination>,
    /// UDP.
    pub udp: Option<Destination>,
    /// SCTP.
    pub sctp: Option<Destination>,
    /// A port that the receiver calls by this name, whatever its protocol.
    pub destination_named_port: Option<String>,
}

/// Where a protocol's packets go.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Destination {
    /// The port; unset is any.
    pub destination_port: Option<DestinationPort>,
}

/// A port or a range of ports.
#[derive(Clone, Debug, Deserialize)]
pub struct DestinationPort {
    /// The port.
    pub number: Option<i32>,
    /// The range.
    pub range: Option<PortRange>,
}

/// Ports from the first to the last.
#[derive(Clone, Debug, Deserialize)]
pub struct PortRange {
    /// The first.
    pub start: i32,
    /// The last.
    pub end: i32,
}
