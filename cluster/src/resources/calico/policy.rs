//! Calico's policies, and what they are made of and refer to: tiers, rules, network sets, profiles.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Resource, Unread};
use crate::resources::{
    meta::{IntOrString, LabelSelector},
    network_policy::{NetworkPolicyEgressRule, NetworkPolicyIngressRule},
};

/// A GlobalNetworkPolicy or StagedGlobalNetworkPolicy.
pub type GlobalNetworkPolicy = Resource<GlobalNetworkPolicySpec>;
/// A NetworkPolicy or StagedNetworkPolicy of Calico's.
pub type NetworkPolicy = Resource<NetworkPolicySpec>;
/// A StagedKubernetesNetworkPolicy.
pub type StagedKubernetesNetworkPolicy = Resource<StagedKubernetesNetworkPolicySpec>;
/// A Tier.
pub type Tier = Resource<TierSpec>;
/// A GlobalNetworkSet or NetworkSet.
pub type NetworkSet = Resource<NetworkSetSpec>;
/// A Profile.
pub type Profile = Resource<ProfileSpec>;

/// Whether a policy governs what arrives or what is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
pub enum PolicyType {
    /// What arrives.
    Ingress,
    /// What is sent.
    Egress,
}

/// GlobalNetworkPolicy's spec.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GlobalNetworkPolicySpec {
    /// The tier; unset is "default".
    pub tier: Option<String>,
    /// Lower comes first; unset comes last.
    pub order: Option<f64>,
    /// Rules for what arrives.
    #[serde(default)]
    pub ingress: Vec<Rule>,
    /// Rules for what is sent.
    #[serde(default)]
    pub egress: Vec<Rule>,
    /// The endpoints that it applies to.
    pub selector: Option<String>,
    /// Which directions it governs; unset is by what rules there are.
    #[serde(default)]
    pub types: Vec<PolicyType>,
    /// Not of connections: of each packet, before connections are looked up.
    #[serde(default)]
    pub do_not_track: bool,
    /// Before services are translated.
    #[serde(rename = "preDNAT", default)]
    pub pre_dnat: bool,
    /// Also for what a host endpoint forwards.
    #[serde(default)]
    pub apply_on_forward: bool,
    /// The service accounts of the endpoints that it applies to.
    pub service_account_selector: Option<String>,
    /// The namespaces of the endpoints that it applies to.
    pub namespace_selector: Option<String>,
    /// Of no interest.
    pub performance_hints: Option<Unread>,
    /// What would become of a staged policy; it is shown and not enforced in any case.
    pub staged_action: Option<Unread>,
}

/// NetworkPolicy's spec.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkPolicySpec {
    /// The tier; unset is "default".
    pub tier: Option<String>,
    /// Lower comes first; unset comes last.
    pub order: Option<f64>,
    /// Rules for what arrives.
    #[serde(default)]
    pub ingress: Vec<Rule>,
    /// Rules for what is sent.
    #[serde(default)]
    pub egress: Vec<Rule>,
    /// The endpoints of its namespace that it applies to.
    pub selector: Option<String>,
    /// Which directions it governs; unset is by what rules there are.
    #[serde(default)]
    pub types: Vec<PolicyType>,
    /// The service accounts of the endpoints that it applies to.
    pub service_account_selector: Option<String>,
    /// Of no interest.
    pub performance_hints: Option<Unread>,
    /// What would become of a staged policy; it is shown and not enforced in any case.
    pub staged_action: Option<Unread>,
}

/// StagedKubernetesNetworkPolicy's spec: that of a Kubernetes NetworkPolicy.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StagedKubernetesNetworkPolicySpec {
    /// What would become of it; it is shown and not enforced in any case.
    pub staged_action: Option<Unread>,
    /// The pods of its namespace that it would apply to.
    pub pod_selector: Option<LabelSelector>,
    /// Rules for what arrives.
    pub ingress: Option<Vec<NetworkPolicyIngressRule>>,
    /// Rules for what is sent.
    pub egress: Option<Vec<NetworkPolicyEgressRule>>,
    /// Which directions it would govern.
    pub policy_types: Option<Vec<String>>,
}

/// What a matching rule does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
pub enum Action {
    /// The packet may go.
    Allow,
    /// The packet is dropped.
    Deny,
    /// A line is logged, and the next rule is looked at.
    Log,
    /// The rest of the tier is skipped.
    Pass,
}

/// A rule of a policy or profile.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    /// What it does.
    pub action: Action,
    /// 4 or 6.
    pub ip_version: Option<u8>,
    /// The protocol, by name or number.
    pub protocol: Option<IntOrString>,
    /// Any protocol but this one.
    pub not_protocol: Option<IntOrString>,
    /// ICMP type, or type and code.
    pub icmp: Option<Icmp>,
    /// Any ICMP type, or type and code, but this one.
    #[serde(rename = "notICMP")]
    pub not_icmp: Option<Icmp>,
    /// Where the packet comes from.
    #[serde(default)]
    pub source: EntityRule,
    /// Where the packet goes.
    #[serde(default)]
    pub destination: EntityRule,
    /// HTTP methods and paths.
    pub http: Option<Unread>,
    /// Annotations; of no interest.
    pub metadata: Option<Unread>,
}

/// An ICMP type, or a type and a code.
#[derive(Clone, Debug, Deserialize)]
pub struct Icmp {
    /// The type.
    #[serde(rename = "type")]
    pub icmp_type: Option<u8>,
    /// The code.
    pub code: Option<u8>,
}

/// One side of a rule.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EntityRule {
    /// Its address is in one of these.
    #[serde(default)]
    pub nets: Vec<String>,
    /// Its address is in none of these.
    #[serde(default)]
    pub not_nets: Vec<String>,
    /// Its labels.
    pub selector: Option<String>,
    /// What its labels are not.
    pub not_selector: Option<String>,
    /// Its namespace's labels.
    pub namespace_selector: Option<String>,
    /// Its service account.
    pub service_accounts: Option<ServiceAccounts>,
    /// The service that it is an endpoint of.
    pub services: Option<ServiceMatch>,
    /// Its port is one of these: numbers, ranges "first:last", names.
    #[serde(default)]
    pub ports: Vec<IntOrString>,
    /// Its port is none of these.
    #[serde(default)]
    pub not_ports: Vec<IntOrString>,
}

/// Service accounts by name and by label; both must hold.
#[derive(Clone, Debug, Deserialize)]
pub struct ServiceAccounts {
    /// One of these names.
    #[serde(default)]
    pub names: Vec<String>,
    /// The account's labels.
    pub selector: Option<String>,
}

/// A service.
#[derive(Clone, Debug, Deserialize)]
pub struct ServiceMatch {
    /// Its name.
    pub name: String,
    /// Its namespace; unset in a namespaced policy is the policy's.
    pub namespace: Option<String>,
}

/// Tier's spec.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TierSpec {
    /// Lower comes first; unset comes last.
    pub order: Option<f64>,
    /// What happens to a packet that policies of the tier apply to and none decides; unset is Deny.
    pub default_action: Option<TierAction>,
}

/// A tier's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
pub enum TierAction {
    /// The packet is dropped.
    Deny,
    /// The next tier goes on.
    Pass,
}

/// GlobalNetworkSet's and NetworkSet's spec.
#[derive(Clone, Debug, Deserialize)]
pub struct NetworkSetSpec {
    /// Addresses and CIDRs.
    #[serde(default)]
    pub nets: Vec<String>,
}

/// Profile's spec.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProfileSpec {
    /// Rules for what arrives.
    #[serde(default)]
    pub ingress: Vec<Rule>,
    /// Rules for what is sent.
    #[serde(default)]
    pub egress: Vec<Rule>,
    /// Labels that endpoints with this profile inherit.
    #[serde(default)]
    pub labels_to_apply: BTreeMap<String, String>,
}
