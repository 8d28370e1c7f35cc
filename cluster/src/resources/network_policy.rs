//! NetworkPolicy (networking.k8s.io/v1).

use serde::Deserialize;

use super::meta::{IntOrString, LabelSelector};

/// A NetworkPolicy.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NetworkPolicy {
    /// What is wanted.
    pub spec: Option<NetworkPolicySpec>,
}

/// NetworkPolicy's spec.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkPolicySpec {
    /// The pods of its namespace that it applies to.
    pub pod_selector: Option<LabelSelector>,
    /// Rules for what arrives.
    pub ingress: Option<Vec<NetworkPolicyIngressRule>>,
    /// Rules for what is sent.
    pub egress: Option<Vec<NetworkPolicyEgressRule>>,
    /// Which directions it governs.
    pub policy_types: Option<Vec<String>>,
}

/// A rule for what arrives.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NetworkPolicyIngressRule {
    /// The senders; none is all.
    pub from: Option<Vec<NetworkPolicyPeer>>,
    /// The ports; none is all.
    pub ports: Option<Vec<NetworkPolicyPort>>,
}

/// A rule for what is sent.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NetworkPolicyEgressRule {
    /// The receivers; none is all.
    pub to: Option<Vec<NetworkPolicyPeer>>,
    /// The ports; none is all.
    pub ports: Option<Vec<NetworkPolicyPort>>,
}

/// A sender or receiver: addresses, or pods.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkPolicyPeer {
    /// Addresses.
    pub ip_block: Option<IPBlock>,
    /// The pods of these namespaces.
    pub namespace_selector: Option<LabelSelector>,
    /// These pods.
    pub pod_selector: Option<LabelSelector>,
}

/// The addresses of a CIDR.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct IPBlock {
    /// The CIDR.
    pub cidr: String,
    /// The parts of it that are not meant.
    pub except: Option<Vec<String>>,
}

/// A port, or a range of ports.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkPolicyPort {
    /// The last of a range.
    pub end_port: Option<i32>,
    /// A port, or the first of a range; any where it is unset.
    pub port: Option<IntOrString>,
    /// Its protocol; TCP where it is unset.
    pub protocol: Option<String>,
}
