//! `weir policy list`: what applies to an endpoint, in the order of evaluation.
//!
//! It is made of the same model that the router compiles, whose tiers and policies know their own order; a selector decides whom each
//! applies to. Hits come from a running router and are joined by what a rule is ([`weir_policy::RuleIdentity`]), since numbers are of one compilation only.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use serde::Serialize;
use weir_policy::{
    PolicyDirection, RuleIdentity, RuleOrigin,
    model::{Action, Endpoint, EndpointKind, HostStage, Policy, Profile, Rule, TierAction},
};

use super::{places::Places, words};
use crate::translate::Loaded;

/// Hits by rule, as a running router counts them.
pub type Hits = HashMap<RuleIdentity, u64>;

/// What applies to one endpoint.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Listing {
    /// "namespace/pod".
    pub endpoint: String,
    /// The node that it is on.
    pub node: Option<String>,
    /// Whether that is this node, which then enforces all this.
    pub local: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// For what arrives.
    pub ingress: Side,
    /// For what it sends.
    pub egress: Side,
}

/// What applies to a host endpoint of this or another node.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostListing {
    /// Its name.
    pub host_endpoint: String,
    /// Whether it is this node's.
    pub local: bool,
    /// Its expected addresses.
    pub addresses: Vec<IpAddr>,
    /// By kind of packet, in the order in which a packet meets them.
    pub stages: Vec<ListedStage>,
}

/// A host endpoint's policy for one kind of packet.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListedStage {
    /// "untracked", "preDNAT", "forwarded" or "local".
    pub stage: &'static str,
    /// For what arrives by it.
    pub ingress: Side,
    /// For what leaves by it.
    pub egress: Side,
}

/// What applies to an endpoint.
#[derive(Serialize)]
#[serde(untagged)]
pub enum Listed {
    /// A workload.
    Workload(Listing),
    /// A host endpoint.
    HostEndpoint(HostListing),
}

/// The policy of one direction.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Side {
    /// Tiers in which some policy applies, in order.
    pub tiers: Vec<ListedTier>,
    /// Whether a packet may come as far as the profiles: not where a tier that applies ends with deny, or where there are none, as in most
    /// stages of a host endpoint, where what is not decided goes on.
    pub profiles_reached: bool,
    /// The endpoint's profiles, in order.
    pub profiles: Vec<ListedPolicy>,
    /// Connections that no profile allowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_profile_hits: Option<u64>,
}

/// A tier in which some policy applies.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListedTier {
    /// Its name.
    pub tier: String,
    /// Its order; none comes last.
    pub order: Option<f64>,
    /// Its policies that apply, in order.
    pub policies: Vec<ListedPolicy>,
    /// What becomes of a packet that none of them decides: "deny", "pass", or "skipped" where all are staged. Untracked policy and policy
    /// before DNAT end with "pass" always.
    pub end: &'static str,
    /// Connections that its end denied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_hits: Option<u64>,
}

/// A policy or profile that applies.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListedPolicy {
    /// Its name.
    pub name: String,
    /// Its order; none comes last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<f64>,
    /// "file:line" of its object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// A staged policy enforces nothing.
    pub staged: bool,
    /// Whom it applies to, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selects: Option<String>,
    /// Its rules, in order.
    pub rules: Vec<ListedRule>,
}

/// A rule.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListedRule {
    /// Its number in its object.
    pub rule: u32,
    /// What it does.
    pub words: String,
    /// Connections that it decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hits: Option<u64>,
}

/// Why there is no listing.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// There is no such endpoint.
    #[error("no endpoint is called {name}{}; `weir policy list` names those of this node", did_you_mean(near))]
    NoSuchEndpoint {
        /// The name.
        name: String,
        /// One that is meant, perhaps.
        near: Option<String>,
    },
}

fn did_you_mean(near: &Option<String>) -> String {
    near.as_ref().map_or(String::new(), |near| format!(" (did you mean {near}?)"))
}

/// The model with what is needed to show it.
pub struct Lister<'l> {
    loaded: &'l Loaded,
    places: Places<'l>,
    /// The first profile of each name.
    profiles: HashMap<&'l str, &'l Profile>,
    hits: Option<&'l Hits>,
}

impl<'l> Lister<'l> {
    /// Over what was loaded, with hits if a router tells them.
    pub fn new(loaded: &'l Loaded, hits: Option<&'l Hits>) -> Self {
        let mut profiles = HashMap::new();
        for profile in &loaded.policy.profiles {
            profiles.entry(profile.name.as_str()).or_insert(&**profile);
        }
        Self { loaded, places: Places::new(loaded), profiles, hits }
    }

    /// What applies to the endpoint of this name.
    ///
    /// # Errors
    /// Where there is none.
    pub fn endpoint(&self, name: &str) -> Result<Listed, ListError> {
        if let Some(endpoint) = self.of_kind(EndpointKind::Workload).find(|endpoint| endpoint.name == name) {
            return Ok(Listed::Workload(self.workload(endpoint)));
        }
        if let Some(endpoint) = self.of_kind(EndpointKind::HostEndpoint).find(|endpoint| endpoint.name == name) {
            return Ok(Listed::HostEndpoint(self.host_endpoint(endpoint)));
        }
        let kinds = [EndpointKind::Workload, EndpointKind::HostEndpoint].into_iter();
        let names = kinds.flat_map(|kind| self.of_kind(kind)).map(|endpoint| endpoint.name.as_str());
        let near = crate::text::problem::nearest(name, names).map(str::to_owned);
        Err(ListError::NoSuchEndpoint { name: name.to_owned(), near })
    }

    fn workload(&self, endpoint: &Endpoint) -> Listing {
        let workload = self.loaded.cluster.workloads.iter().find(|workload| workload.name == endpoint.name);
        Listing {
            endpoint: endpoint.name.clone(),
            node: workload.and_then(|workload| workload.node.clone()),
            local: endpoint.local,
            addresses: endpoint.nets.iter().map(ipnet::IpNet::addr).collect(),
            ingress: self.side(endpoint, PolicyDirection::Ingress, HostStage::Local),
            egress: self.side(endpoint, PolicyDirection::Egress, HostStage::Local),
        }
    }

    fn host_endpoint(&self, endpoint: &Endpoint) -> HostListing {
        let stages = HostStage::ALL.into_iter().map(|stage| ListedStage {
            stage: match stage {
                HostStage::Untracked => "untracked",
                HostStage::PreDnat => "preDNAT",
                HostStage::Forwarded => "forwarded",
                HostStage::Local => "local",
            },
            ingress: self.side(endpoint, PolicyDirection::Ingress, stage),
            egress: self.side(endpoint, PolicyDirection::Egress, stage),
        });
        HostListing {
            host_endpoint: endpoint.name.clone(),
            local: endpoint.local,
            addresses: endpoint.nets.iter().map(ipnet::IpNet::addr).collect(),
            stages: stages.collect(),
        }
    }

    fn of_kind(&self, kind: EndpointKind) -> impl Iterator<Item = &'l Endpoint> + use<'l> {
        let endpoints = self.loaded.policy.endpoints.iter().map(|endpoint| &**endpoint);
        endpoints.filter(move |endpoint| endpoint.kind == kind)
    }

    /// The hits that are known of an endpoint's rules: none of one elsewhere, since rules are counted where they decide.
    fn known(&self, endpoint: &Endpoint) -> Option<&'l Hits> {
        self.hits.filter(|_| endpoint.local)
    }

    fn hits(&self, endpoint: &Endpoint, origin: &RuleOrigin<'_>) -> Option<u64> {
        Some(self.known(endpoint)?.get(&origin.identity()).copied().unwrap_or(0))
    }

    fn side(&self, endpoint: &Endpoint, direction: PolicyDirection, stage: HostStage) -> Side {
        let mut tiers = Vec::new();
        let decides = matches!(stage, HostStage::Forwarded | HostStage::Local);
        let has_profiles = stage == HostStage::Local;
        let mut profiles_reached = has_profiles;
        for tier in self.loaded.policy.ordered_tiers() {
            let ordered = tier.ordered_policies();
            let applying: Vec<&Policy> = ordered
                .into_iter()
                .map(|policy| &**policy)
                .filter(|policy| applies(policy, endpoint, direction, stage))
                .collect();
            if applying.is_empty() {
                continue;
            }
            let enforced: Vec<&str> =
                applying.iter().filter(|policy| !policy.staged).map(|policy| policy.name.as_str()).collect();
            let end = match tier.default_action {
                _ if enforced.is_empty() => "skipped",
                TierAction::Deny if decides => "deny",
                TierAction::Deny | TierAction::Pass => "pass",
            };
            profiles_reached &= end != "deny" || has_way_out(&applying, direction);
            let end_hits = match end {
                "deny" => self.hits(endpoint, &RuleOrigin::TierEnd { tier: &tier.name, policies: enforced }),
                _ => None,
            };
            tiers.push(ListedTier {
                tier: tier.name.clone(),
                order: tier.order,
                policies: applying.iter().map(|policy| self.policy(policy, endpoint, direction)).collect(),
                end,
                end_hits,
            });
        }
        let profiles = endpoint.profiles.iter().filter(|_| has_profiles);
        let profiles = profiles.filter_map(|name| self.profiles.get(name.as_str()));
        Side {
            tiers,
            profiles_reached,
            profiles: profiles.map(|profile| self.profile(profile, endpoint, direction)).collect(),
            no_profile_hits: self.hits(endpoint, &RuleOrigin::NoProfile).filter(|_| has_profiles),
        }
    }

    fn policy(&self, policy: &Policy, endpoint: &Endpoint, direction: PolicyDirection) -> ListedPolicy {
        let rules = policy.rules(direction).unwrap_or_default();
        let origin = |definition| RuleOrigin::Policy {
            name: &policy.name,
            rule: 0,
            direction,
            object: policy.origin,
            definition,
        };
        ListedPolicy {
            name: policy.name.clone(),
            order: policy.order,
            at: self.places.of(policy.origin),
            staged: policy.staged,
            selects: Some(words::selector_in_words(&policy.selector)),
            rules: listed(rules, false, self.known(endpoint).filter(|_| !policy.staged), origin),
        }
    }

    fn profile(&self, profile: &Profile, endpoint: &Endpoint, direction: PolicyDirection) -> ListedPolicy {
        let origin = |definition| RuleOrigin::Profile { name: &profile.name, rule: None, direction, definition };
        ListedPolicy {
            name: profile.name.clone(),
            order: None,
            at: None,
            staged: false,
            selects: None,
            rules: listed(profile.rules(direction), true, self.known(endpoint), origin),
        }
    }

    /// A line for each endpoint of this node.
    pub fn overview(&self) -> Overview {
        let local = self.of_kind(EndpointKind::Workload).filter(|endpoint| endpoint.local);
        let mut lines: Vec<Line> = Vec::new();
        let mut sharing: HashMap<Effective<'_>, Vec<usize>> = HashMap::new();
        for endpoint in local {
            let [ingress, egress] = PolicyDirection::ALL.map(|direction| {
                let tiers = self.loaded.policy.ordered_tiers();
                let policies = tiers.into_iter().flat_map(weir_policy::model::Tier::ordered_policies);
                let policies = policies.filter(|policy| applies(policy, endpoint, direction, HostStage::Local));
                let (mut enforced, mut staged) = (Vec::new(), 0);
                for policy in policies {
                    match policy.staged {
                        true => staged += 1,
                        false => enforced.push(policy.name.as_str()),
                    }
                }
                let counted = Counted { policies: enforced.len(), staged, shared_by: 0 };
                let effective = Effective { direction, policies: enforced, profiles: &endpoint.profiles };
                sharing.entry(effective).or_default().push(lines.len());
                counted
            });
            let addresses = endpoint.nets.iter().map(ipnet::IpNet::addr).collect();
            lines.push(Line { endpoint: endpoint.name.clone(), addresses, ingress, egress });
        }
        let programs = |direction| sharing.keys().filter(|effective| effective.direction == direction).count();
        let [ingress_programs, egress_programs] = PolicyDirection::ALL.map(programs);
        for (Effective { direction, .. }, members) in sharing {
            for member in &members {
                let line = &mut lines[*member];
                let counted = if direction == PolicyDirection::Ingress { &mut line.ingress } else { &mut line.egress };
                counted.shared_by = members.len();
            }
        }
        lines.sort_by(|a, b| a.endpoint.cmp(&b.endpoint));
        let hosts = self.of_kind(EndpointKind::HostEndpoint).filter(|endpoint| endpoint.local);
        let mut host_endpoints: Vec<String> = hosts.map(|endpoint| endpoint.name.clone()).collect();
        host_endpoints.sort();
        Overview { endpoints: lines, host_endpoints, ingress_programs, egress_programs }
    }
}

/// What applies to an endpoint in a direction: endpoints for which that is the same share a program.
#[derive(PartialEq, Eq, Hash)]
struct Effective<'l> {
    direction: PolicyDirection,
    policies: Vec<&'l str>,
    profiles: &'l [String],
}

/// Whether a policy governs this direction of an endpoint, staged or not. A workload's packets are as a host endpoint's local ones.
fn applies(policy: &Policy, endpoint: &Endpoint, direction: PolicyDirection, stage: HostStage) -> bool {
    stage.takes(policy.scope, direction)
        && policy.rules(direction).is_some()
        && policy.selector.matches(&endpoint.labels)
}

/// Whether a rule of a tier passes packets on.
fn has_way_out(policies: &[&Policy], direction: PolicyDirection) -> bool {
    let rules = policies.iter().filter(|policy| !policy.staged).filter_map(|policy| policy.rules(direction)).flatten();
    rules.into_iter().any(|rule| rule.action == Action::Pass)
}

/// Rules, each with its hits if they are known. Of equal rules only the first ever decides, so it has them all.
fn listed<'r>(
    rules: &'r [Rule],
    in_profile: bool,
    hits: Option<&Hits>,
    origin: impl Fn(&'r Rule) -> RuleOrigin<'r>,
) -> Vec<ListedRule> {
    let mut counted: HashSet<RuleIdentity> = HashSet::new();
    words::runs(rules)
        .map(|run| {
            let of_run = hits.map(|hits| {
                let identities = run.iter().map(|rule| origin(rule).identity());
                let new = identities.filter(|identity| counted.insert(*identity));
                new.filter_map(|identity| hits.get(&identity)).sum()
            });
            ListedRule { rule: run[0].number, words: words::rules_in_words(run, in_profile), hits: of_run }
        })
        .collect()
}

/// The endpoints of this node.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    /// By name.
    pub endpoints: Vec<Line>,
    /// Names of the host endpoints.
    pub host_endpoints: Vec<String>,
    /// Sets of policies and profiles for what arrives: each is compiled to one program that its endpoints share.
    pub ingress_programs: usize,
    /// The same for what is sent.
    pub egress_programs: usize,
}

/// An endpoint of this node in a line.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// "namespace/pod".
    pub endpoint: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// For what arrives.
    pub ingress: Counted,
    /// For what it sends.
    pub egress: Counted,
}

/// How many policies apply in a direction.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counted {
    /// Policies in force.
    pub policies: usize,
    /// Staged ones.
    pub staged: usize,
    /// Endpoints of this node that have the same policies and profiles, this one included, and so share its compiled program.
    pub shared_by: usize,
}
