//! What the classifier is compiled from: endpoints, tiers, policies, rules and profiles as plain data.
//!
//! The shape is that of Calico's evaluation (tiers, then policies, then rules, then profiles); Kubernetes
//! NetworkPolicy and ClusterNetworkPolicy are translated into it by whoever reads the resources. Nothing here knows
//! where an object came from, beyond the names that people are shown.
//!
//! Endpoints, policies and profiles are shared, so that whoever translates resources again can hand over those that did
//! not change as they are.

use std::{cmp::Ordering, collections::BTreeMap, sync::Arc};

use ipnet::IpNet;
use weir_packet::Protocol;

use crate::{PolicyDirection, Selector};

/// All that one compilation sees.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Model {
    /// Everything that has addresses and labels: what policies apply to and what rule selectors pick.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// The tiers, in any order.
    pub tiers: Vec<Tier>,
    /// The profiles that endpoints name.
    pub profiles: Vec<Arc<Profile>>,
}

impl Model {
    /// The tiers in order of evaluation.
    pub fn ordered_tiers(&self) -> Vec<&Tier> {
        let mut tiers: Vec<&Tier> = self.tiers.iter().collect();
        tiers.sort_by(|a, b| {
            let by_order = order_key(a.order).total_cmp(&order_key(b.order));
            a.undefined.cmp(&b.undefined).then(by_order).then_with(|| a.name.cmp(&b.name))
        });
        tiers
    }
}

/// `None` comes last; the two zeros are equal.
fn order_key(order: Option<f64>) -> f64 {
    order.map_or(f64::INFINITY, |order| order + 0.0)
}

/// What an [`Endpoint`] stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EndpointKind {
    /// A pod, or another workload with a device of its own.
    #[default]
    Workload,
    /// An interface of a node, or all of them.
    HostEndpoint,
    /// A NetworkSet or GlobalNetworkSet: a peer of rules only, without ports.
    NetworkSet,
}

/// A thing with labels and addresses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Endpoint {
    /// "namespace/pod", or what the kind's resources are called; unique within the kind.
    pub name: String,
    /// What it stands for.
    pub kind: EndpointKind,
    /// A workload or host endpoint of this node: it gets programs of its own.
    pub local: bool,
    /// Its namespace, if it is in one. For messages: rules limit themselves through labels.
    pub namespace: Option<String>,
    /// Own and inherited labels, merged: also `projectcalico.org/namespace`, `pcns.KEY`, `pcsa.KEY`.
    pub labels: BTreeMap<String, String>,
    /// Its addresses, or a network set's CIDRs. Host bits are ignored.
    pub nets: Vec<IpNet>,
    /// Named ports (container ports).
    pub ports: Vec<NamedPort>,
    /// Names of its profiles, in order.
    pub profiles: Vec<String>,
}

/// A port that rules may call by its name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NamedPort {
    /// The name.
    pub name: String,
    /// The protocol of the port: TCP, UDP or SCTP; others are ignored.
    pub protocol: Protocol,
    /// The port number.
    pub port: u16,
}

/// An ordered group of policies.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tier {
    /// Name: breaks ties of `order`, in byte order.
    pub name: String,
    /// Lower comes first; `None` comes last.
    pub order: Option<f64>,
    /// Policies name it and nobody defines it: it comes after all tiers that somebody does.
    pub undefined: bool,
    /// What happens to a packet that policies of this tier apply to and none decides.
    pub default_action: TierAction,
    /// The policies, in any order.
    pub policies: Vec<Arc<Policy>>,
}

impl Tier {
    /// The policies in order of evaluation, staged ones too, where they would stand.
    pub fn ordered_policies(&self) -> Vec<&Arc<Policy>> {
        let mut policies: Vec<&Arc<Policy>> = self.policies.iter().collect();
        policies.sort_by(|a, b| a.evaluation_order(b));
        policies
    }
}

/// A tier's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TierAction {
    /// The packet is denied.
    #[default]
    Deny,
    /// The next tier goes on.
    Pass,
}

/// A policy: rules for the endpoints that it selects.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policy {
    /// As shown to people: "NetworkPolicy/namespace/name".
    pub name: String,
    /// Breaks ties of `order`, in byte order.
    pub sort_name: String,
    /// Lower comes first; `None` comes last.
    pub order: Option<f64>,
    /// The workloads that it applies to.
    pub selector: Selector,
    /// Which packets of an endpoint it is for.
    pub scope: PolicyScope,
    /// A staged policy enforces nothing.
    pub staged: bool,
    /// Rules for what arrives at the endpoint; `None`: the policy does not govern this direction.
    pub ingress: Option<Vec<Rule>>,
    /// Rules for what the endpoint sends; `None`: the policy does not govern this direction.
    pub egress: Option<Vec<Rule>>,
    /// The number of the object that it came from, for messages; opaque to this crate.
    pub origin: u32,
}

impl Policy {
    /// Which of two policies of a tier comes first.
    pub(crate) fn evaluation_order(&self, other: &Self) -> Ordering {
        let by_order = order_key(self.order).total_cmp(&order_key(other.order));
        by_order.then_with(|| self.sort_name.cmp(&other.sort_name)).then_with(|| self.name.cmp(&other.name))
    }

    /// Whether they differ at most in the object that they came from.
    pub(crate) fn is_equal_but_for_origin(&self, other: &Self) -> bool {
        let Self { name, sort_name, order, selector, scope, staged, ingress, egress, origin: _ } = self;
        *name == other.name
            && *sort_name == other.sort_name
            && *order == other.order
            && *selector == other.selector
            && *scope == other.scope
            && *staged == other.staged
            && *ingress == other.ingress
            && *egress == other.egress
    }

    /// The rules by which it governs a direction, if it does.
    pub fn rules(&self, direction: PolicyDirection) -> Option<&[Rule]> {
        match direction {
            PolicyDirection::Ingress => self.ingress.as_deref(),
            PolicyDirection::Egress => self.egress.as_deref(),
        }
    }
}

/// Which packets of an endpoint a policy is for. Host endpoints have packets of all these kinds, workloads only of those
/// that any policy without a special scope is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PolicyScope {
    /// Packets to or from a workload; at a host endpoint, those to or from the node itself.
    #[default]
    Normal,
    /// As normal, and what a host endpoint forwards.
    ApplyOnForward,
    /// What arrives at a host endpoint, before services are translated. Never a workload's packets.
    PreDnat,
    /// A host endpoint's packets, one by one, before connections are looked up. Never a workload's packets.
    Untracked,
}

/// The kinds of packets that a host endpoint has policy for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostStage {
    /// Each packet, before connections are looked up. What no rule matches goes on to the next stage.
    Untracked = 0,
    /// A connection's first packet, before services are translated. What no rule matches goes on.
    PreDnat = 1,
    /// A first packet that is forwarded. A tier denies at its end; what no tier decides goes on.
    Forwarded = 2,
    /// A first packet to or from the node itself: as a workload's, with tiers' ends and profiles.
    Local = 3,
}

impl HostStage {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Untracked, Self::PreDnat, Self::Forwarded, Self::Local];

    /// Whether a policy of this scope is for these packets, in a direction. Before services, packets only arrive.
    pub fn takes(self, scope: PolicyScope, direction: PolicyDirection) -> bool {
        match self {
            Self::Untracked => scope == PolicyScope::Untracked,
            Self::PreDnat => scope == PolicyScope::PreDnat && direction == PolicyDirection::Ingress,
            Self::Forwarded => scope == PolicyScope::ApplyOnForward,
            Self::Local => matches!(scope, PolicyScope::Normal | PolicyScope::ApplyOnForward),
        }
    }
}

/// Rules for endpoints that no tier decided about.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// The name by which endpoints refer to it.
    pub name: String,
    /// Rules for what arrives at the endpoint.
    pub ingress: Vec<Rule>,
    /// Rules for what the endpoint sends.
    pub egress: Vec<Rule>,
}

impl Profile {
    /// The rules for a direction.
    pub fn rules(&self, direction: PolicyDirection) -> &[Rule] {
        match direction {
            PolicyDirection::Ingress => &self.ingress,
            PolicyDirection::Egress => &self.egress,
        }
    }
}

/// What a matching rule does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Action {
    /// Final: the packet may go.
    #[default]
    Allow,
    /// Final: the packet is dropped.
    Deny,
    /// The rest of the tier is skipped. In a profile: deny.
    Pass,
    /// No effect on the verdict.
    Log,
}

/// A rule matches a packet if every field that is present matches.
///
/// [`Rule::default`] matches, and allows, everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rule {
    /// Its number in its object, for names; several rules that came from one may share it.
    pub number: u32,
    /// What happens to a packet that matches.
    pub action: Action,
    /// 4 or 6: packets of that family only. Any other number matches nothing.
    pub ip_version: Option<u8>,
    /// Packets of this protocol only.
    pub protocol: Option<Protocol>,
    /// Packets of any protocol but this one.
    pub not_protocol: Option<Protocol>,
    /// ICMP or ICMPv6 packets of this type (and code) only.
    pub icmp: Option<IcmpMatch>,
    /// All but ICMP or ICMPv6 packets of this type (and code).
    pub not_icmp: Option<IcmpMatch>,
    /// What the packet's source must be.
    pub source: EntityMatch,
    /// What the packet's destination (after DNAT) must be.
    pub destination: EntityMatch,
}

/// An ICMP type, or a type and a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IcmpMatch {
    /// The type.
    pub icmp_type: u8,
    /// The code; `None` is any.
    pub code: Option<u8>,
}

/// What a packet's source or destination must be: all that is present must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EntityMatch {
    /// The address is in one of these. An empty list, or one without a CIDR of the packet's family, matches nothing.
    pub nets: Option<Vec<IpNet>>,
    /// The address is in none of these. A list that is not empty but has no CIDR of the packet's family matches
    /// nothing.
    pub not_nets: Vec<IpNet>,
    /// The address is of a known endpoint that this selects. Includes the limits by namespace and service account.
    pub selector: Option<Selector>,
    /// The address is of no known endpoint that this selects. Together with `selector`: the address is of a known
    /// endpoint that `selector` selects and this does not.
    pub not_selector: Option<Selector>,
    /// The port is one of these. An empty list matches nothing.
    pub ports: Option<Vec<PortMatch>>,
    /// The port is none of these.
    pub not_ports: Vec<PortMatch>,
    /// The address is of one of these peers (Kubernetes). Empty: no such constraint.
    pub any_of: Vec<Peer>,
    /// The address, and the protocol and port where given, are one of these (services in rules).
    pub endpoint_ports: Option<Vec<ServiceEndpoint>>,
}

/// An address, with the protocol and port at which it serves; without them, the address alone.
pub type ServiceEndpoint = (IpNet, Option<(Protocol, u16)>);

/// One of the alternatives of a Kubernetes rule's `from` or `to`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A known endpoint that this selects.
    Selector(Selector),
    /// An address in `cidr` and in none of `except`, whoever has it.
    Block {
        /// The block. Host bits are ignored.
        cidr: IpNet,
        /// Holes in it.
        except: Vec<IpNet>,
    },
}

/// Ports of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PortMatch {
    /// From the first to the second, both included. Matches packets of TCP, UDP and SCTP.
    Range(u16, u16),
    /// The port that an endpoint with the packet's address calls by this name, with its protocol.
    Named(String),
}
