//! The compiled policy of a node, and the questions that the dataplane asks of it.

use std::{fmt, hash::Hash, sync::Arc};

use hashbrown::HashMap;
use weir_packet::{Address, FlowKey};

use crate::{
    LoggedRules,
    addresses::AddressClasses,
    fingerprint::Fingerprint,
    model::{HostStage, Policy, Profile, Rule},
    program::{Facts, Outcome, Program},
};

/// Which of an endpoint's two policies: for what it sends, or for what arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PolicyDirection {
    /// What arrives: the endpoint is the destination.
    Ingress = 0,
    /// What it sends: the endpoint is the source.
    Egress = 1,
}

impl PolicyDirection {
    /// Both, in the order of their numbers.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// "ingress" or "egress".
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// The number of a local workload in one [`Classifier`]; another classifier has other numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId(pub u32);

/// The number of a host endpoint of this node in one [`Classifier`]; another classifier has other numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostEndpointId(pub u32);

/// The rule of what a host endpoint's stage leaves to what comes after.
pub(crate) const UNDECIDED: RuleId = RuleId(1);

/// The number of a rule, or of another reason for a verdict, in one [`Classifier`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId(pub u32);

/// A verdict and what decided it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Judgement {
    /// Whether the packet may go.
    pub allow: bool,
    /// What decided: see [`Classifier::describe`].
    pub rule: RuleId,
}

/// What a [`RuleId`] stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuleOrigin<'classifier> {
    /// A rule of a policy.
    Policy {
        /// The policy's name.
        name: &'classifier str,
        /// [`crate::model::Rule::number`].
        rule: u32,
        /// Of which of its lists.
        direction: PolicyDirection,
        /// [`crate::model::Policy::origin`].
        object: u32,
        /// The rule itself.
        definition: &'classifier Rule,
    },
    /// The end of a tier that denies: policies of it apply, and none of their rules decided.
    TierEnd {
        /// The tier's name.
        tier: &'classifier str,
        /// The names of the policies that apply, in order.
        policies: Vec<&'classifier str>,
    },
    /// A rule of a profile.
    Profile {
        /// The profile's name.
        name: &'classifier str,
        /// [`crate::model::Rule::number`], where the profile has several rules.
        rule: Option<u32>,
        /// Of which of its lists.
        direction: PolicyDirection,
        /// The rule itself.
        definition: &'classifier Rule,
    },
    /// No tier decided, and no rule of a profile matched: denied.
    NoProfile,
    /// No rule of a host endpoint's stage matched: what comes after decides.
    Undecided,
}

/// A rule, or another reason for a verdict, wherever and whenever it is compiled: what hits are kept by.
///
/// Equal for equal rules of one policy or profile and direction, wherever they stand in their list; a changed rule is
/// another. Only the first of several equal ones ever decides. The same in all processes of one build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleIdentity(pub u64);

impl RuleOrigin<'_> {
    /// What it is, apart from its number.
    pub fn identity(&self) -> RuleIdentity {
        let mut identity = Fingerprint::new(0);
        let unnumbered = |rule: &Rule| Rule { number: 0, ..rule.clone() };
        match self {
            Self::Policy { name, direction, definition, .. } => {
                ("policy", name, direction, unnumbered(definition)).hash(&mut identity);
            }
            Self::Profile { name, direction, definition, .. } => {
                ("profile", name, direction, unnumbered(definition)).hash(&mut identity);
            }
            Self::TierEnd { tier, policies } => ("tier", tier, policies).hash(&mut identity),
            Self::NoProfile => "no profile".hash(&mut identity),
            Self::Undecided => "undecided".hash(&mut identity),
        }
        RuleIdentity(identity.value())
    }
}

/// How many policies the name of a tier's end lists.
const NAMED_POLICIES: usize = 8;

impl fmt::Display for RuleOrigin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy { name, rule, .. } => write!(f, "{name} rule {rule}"),
            Self::TierEnd { policies, .. } => {
                let named = &policies[..policies.len().min(NAMED_POLICIES)];
                write!(f, "default-deny {}", named.join(", "))?;
                match policies.len() - named.len() {
                    0 => Ok(()),
                    more => write!(f, " and {more} more"),
                }
            }
            Self::Profile { name, rule: None, .. } => write!(f, "profile {name}"),
            Self::Profile { name, rule: Some(rule), .. } => write!(f, "profile {name} rule {rule}"),
            Self::NoProfile => f.write_str("default-deny without a matching profile"),
            Self::Undecided => f.write_str("no policy of the host endpoint"),
        }
    }
}

/// [`RuleOrigin`] by numbers; a rule by its place in its list.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    Policy { policy: u32, rule: u32, direction: PolicyDirection },
    TierEnd { tier: u32, policies: Arc<[u32]> },
    Profile { profile: u32, rule: u32, direction: PolicyDirection },
    NoProfile,
    Undecided,
}

/// What has names, by number.
#[derive(Debug)]
pub(crate) struct Names {
    pub(crate) policies: Box<[Option<Arc<Policy>>]>,
    pub(crate) tiers: Box<[Option<Box<str>>]>,
    pub(crate) profiles: Box<[Option<Arc<Profile>>]>,
}

impl Names {
    fn policy(&self, number: u32) -> &Policy {
        self.policies[number as usize].as_ref().expect("a rule's policy")
    }
}

/// A local workload's part, or that of a host endpoint's stage.
#[derive(Debug)]
pub(crate) struct LocalEndpoint {
    pub(crate) name: String,
    /// Programs by direction and family.
    pub(crate) programs: [[Arc<Program>; 2]; 2],
    pub(crate) stamp: u32,
    /// Programs that log, by direction and family.
    pub(crate) logging: [[Option<Arc<Program>>; 2]; 2],
}

impl LocalEndpoint {
    pub(crate) fn has_logs(&self) -> bool {
        self.logging.as_flattened().iter().any(Option::is_some)
    }
}

/// The compiled policy of a node's workloads.
///
/// Made by a [`crate::Compiler`], immutable since, and so shared freely between threads.
#[derive(Debug)]
pub struct Classifier {
    pub(crate) v4: Arc<AddressClasses<u32>>,
    pub(crate) v6: Arc<AddressClasses<u128>>,
    /// Workloads, then each host endpoint's stages in order.
    pub(crate) endpoints: Vec<LocalEndpoint>,
    /// Whether any of them has a program that logs.
    pub(crate) has_logs: bool,
    /// Workloads.
    pub(crate) by_name: HashMap<String, EndpointId>,
    /// Host endpoints, by the number of their first stage.
    pub(crate) host_endpoints: HashMap<String, HostEndpointId>,
    pub(crate) origins: Box<[Option<Origin>]>,
    pub(crate) names: Names,
    pub(crate) size: Size,
}

/// How large a classifier is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Size {
    pub(crate) programs: usize,
    pub(crate) program_bytes: usize,
}

impl Classifier {
    /// The local workload of this name.
    pub fn endpoint(&self, name: &str) -> Option<EndpointId> {
        self.by_name.get(name).copied()
    }

    /// The local workloads and their names, by number.
    pub fn endpoints(&self) -> impl ExactSizeIterator<Item = (EndpointId, &str)> {
        let workloads = &self.endpoints[..self.by_name.len()];
        workloads.iter().enumerate().map(|(index, endpoint)| (EndpointId(index as u32), endpoint.name.as_str()))
    }

    /// The host endpoint of this node with this name.
    pub fn host_endpoint(&self, name: &str) -> Option<HostEndpointId> {
        self.host_endpoints.get(name).copied()
    }

    /// What a host endpoint's policy for `direction` says of a packet at a stage; `None`: nothing, the next stage goes on.
    /// `key` is as for [`Self::judge`], before DNAT where the stage is before services.
    ///
    /// # Panics
    /// Where `endpoint` is of another classifier that had more endpoints.
    #[inline]
    pub fn judge_host<A: Address>(
        &self,
        endpoint: HostEndpointId,
        stage: HostStage,
        direction: PolicyDirection,
        key: &FlowKey<A>,
    ) -> Option<Judgement> {
        let judgement = self.judge(self.stage_endpoint(endpoint, stage), direction, key);
        (judgement.rule != UNDECIDED).then_some(judgement)
    }

    /// Whether a host endpoint's policy says anything at a stage: of most it says nothing, and then they need not be asked.
    ///
    /// # Panics
    /// Where `endpoint` is of another classifier that had more endpoints.
    pub fn has_stage(&self, endpoint: HostEndpointId, stage: HostStage) -> bool {
        let programs = &self.endpoints[self.stage_endpoint(endpoint, stage).0 as usize].programs;
        programs.as_flattened().iter().any(|program| program.only().is_none_or(|slot| slot.rule != UNDECIDED))
    }

    /// As [`Self::stamp`], for all of a host endpoint's stages.
    ///
    /// # Panics
    /// Where `endpoint` is of another classifier that had more endpoints.
    pub fn host_stamp(&self, endpoint: HostEndpointId) -> u32 {
        let mut stamp = Fingerprint::new(0);
        for stage in HostStage::ALL {
            stamp.add(u64::from(self.stamp(self.stage_endpoint(endpoint, stage))));
        }
        ((stamp.value() ^ (stamp.value() >> 32)) as u32).max(1)
    }

    /// What the endpoint's policy for `direction` says of the first packet of a connection.
    ///
    /// `key` is the original direction's, after DNAT and before SNAT; of an ICMP packet it has type and code
    /// ([`weir_packet::Ports::of_icmp`]). Protocols other than TCP, UDP, SCTP and ICMP have no ports that rules could match.
    ///
    /// Whether a packet from an endpoint to itself is judged at all is for the caller to decide: policy leaves that
    /// undefined, and weir allows it.
    ///
    /// # Panics
    /// Where `endpoint` is of another classifier that had more endpoints.
    #[inline]
    pub fn judge<A: Address>(&self, endpoint: EndpointId, direction: PolicyDirection, key: &FlowKey<A>) -> Judgement {
        let family = usize::from(A::WORDS != 1);
        let program = &self.endpoints[endpoint.0 as usize].programs[direction as usize][family];
        let (facts, source, destination) = (Facts::new(key), key.src.to_bits128(), key.dst.to_bits128());
        let slot = if A::WORDS == 1 {
            program.judge(facts, &self.v4, source as u32, destination as u32)
        } else {
            program.judge(facts, &self.v6, source, destination)
        };
        Judgement { allow: slot.outcome == Outcome::Allow, rule: slot.rule }
    }

    /// What an address is to policy: two of one class are judged alike wherever one of them stands, port by port. A [`crate::Compiler`] keeps a
    /// class's number for as long as rules look at it alike.
    pub fn address_class<A: Address>(&self, address: A) -> u32 {
        let bits = address.to_bits128();
        if A::WORDS == 1 { self.v4.class(bits as u32) } else { self.v6.class(bits) }
    }

    /// What judges an endpoint's packets of a direction in the family of `A`: two with the same number judge alike, also in another classifier of
    /// the same [`crate::Compiler`], as long as both are there.
    ///
    /// # Panics
    /// Where `endpoint` is of another classifier that had more endpoints.
    pub fn program_number<A: Address>(&self, endpoint: EndpointId, direction: PolicyDirection) -> usize {
        let family = usize::from(A::WORDS != 1);
        Arc::as_ptr(&self.endpoints[endpoint.0 as usize].programs[direction as usize][family]) as usize
    }

    /// Looks an address up as [`Self::judge`] will, so that what that reads is near when it does. For the addresses of several packets one
    /// after the other, before any of them is judged.
    #[inline]
    pub fn foresee<A: Address>(&self, address: A) {
        let bits = address.to_bits128();
        std::hint::black_box(if A::WORDS == 1 { self.v4.class(bits as u32) } else { self.v6.class(bits) });
    }

    /// Whether any endpoint has Log rules; without any, [`Self::logged`] need not be asked.
    #[inline]
    pub fn has_logs(&self) -> bool {
        self.has_logs
    }

    /// What a host endpoint's stage is judged as.
    #[inline]
    pub fn stage_endpoint(&self, endpoint: HostEndpointId, stage: HostStage) -> EndpointId {
        EndpointId(endpoint.0 + stage as u32)
    }

    /// The name of a local workload, or of the host endpoint of a stage ([`Self::stage_endpoint`]).
    ///
    /// # Panics
    /// Where `endpoint` is of another classifier that had more endpoints.
    pub fn endpoint_name(&self, endpoint: EndpointId) -> &str {
        &self.endpoints[endpoint.0 as usize].name
    }

    /// The Log rules that a packet meets: those that match it and are evaluated before what [`Self::judge`] names. All is as
    /// there. A Log rule behind a Pass in its tier, or behind what decides, is none of them.
    ///
    /// # Panics
    /// Where `endpoint` is of another classifier that had more endpoints.
    pub fn logged<A: Address>(
        &self,
        endpoint: EndpointId,
        direction: PolicyDirection,
        key: &FlowKey<A>,
    ) -> LoggedRules {
        let family = usize::from(A::WORDS != 1);
        let Some(program) = &self.endpoints[endpoint.0 as usize].logging[direction as usize][family] else {
            return LoggedRules::NONE;
        };
        let (facts, source, destination) = (Facts::new(key), key.src.to_bits128(), key.dst.to_bits128());
        if A::WORDS == 1 {
            program.logged(facts, &self.v4, source as u32, destination as u32)
        } else {
            program.logged(facts, &self.v6, source, destination)
        }
    }

    /// A number, never 0, that stands for all that this endpoint's verdicts depend on.
    ///
    /// It is the same in any compilation, in any process, whose verdicts for this endpoint are the same for the same
    /// reasons, and changes (but for one chance in 2^32) when a rule that applies to the endpoint, or an address or
    /// named port that such a rule refers to, changes. Names and numbers of rules have no part in it.
    ///
    /// # Panics
    /// Where `endpoint` is of another classifier that had more endpoints.
    pub fn stamp(&self, endpoint: EndpointId) -> u32 {
        self.endpoints[endpoint.0 as usize].stamp
    }

    /// What a rule's number stands for.
    ///
    /// # Panics
    /// Where `rule` is not one of [`Classifier::rules`].
    pub fn describe(&self, rule: RuleId) -> RuleOrigin<'_> {
        match self.origins[rule.0 as usize].as_ref().expect("a rule of this classifier") {
            Origin::Policy { policy, rule, direction } => {
                let policy = self.names.policy(*policy);
                let definition = &policy.rules(*direction).expect("a list with this rule")[*rule as usize];
                RuleOrigin::Policy {
                    name: &policy.name,
                    rule: definition.number,
                    direction: *direction,
                    object: policy.origin,
                    definition,
                }
            }
            Origin::TierEnd { tier, policies } => RuleOrigin::TierEnd {
                tier: self.names.tiers[*tier as usize].as_ref().expect("a tier with policies"),
                policies: policies.iter().map(|policy| self.names.policy(*policy).name.as_str()).collect(),
            },
            Origin::Profile { profile, rule, direction } => {
                let profile = self.names.profiles[*profile as usize].as_ref().expect("a rule's profile");
                let rules = profile.rules(*direction);
                let definition = &rules[*rule as usize];
                RuleOrigin::Profile {
                    name: &profile.name,
                    rule: (rules.len() > 1).then_some(definition.number),
                    direction: *direction,
                    definition,
                }
            }
            Origin::NoProfile => RuleOrigin::NoProfile,
            Origin::Undecided => RuleOrigin::Undecided,
        }
    }

    /// What decided, for people: "NetworkPolicy/ns/name rule 2", "default-deny NetworkPolicy/ns/name" (the policies
    /// that isolated the endpoint), "profile kns.ns".
    ///
    /// # Panics
    /// Where `rule` is not one of [`Classifier::rules`].
    pub fn rule_name(&self, rule: RuleId) -> String {
        self.describe(rule).to_string()
    }

    /// Numbers of rules are below this. After changes, not all of them are in use.
    pub fn rule_count(&self) -> usize {
        self.origins.len()
    }

    /// The rules, ascending by number.
    pub fn rules(&self) -> impl Iterator<Item = RuleId> {
        self.origins.iter().zip(0..).filter(|(origin, _)| origin.is_some()).map(|(_, number)| RuleId(number))
    }

    /// How many programs there are: workloads with the same policies share theirs. Two families each, and as many more where
    /// rules log.
    pub fn program_count(&self) -> usize {
        self.size.programs
    }

    /// Memory that verdicts are looked up in; names are not counted.
    pub fn memory_bytes(&self) -> usize {
        self.v4.memory_bytes() + self.v6.memory_bytes() + self.size.program_bytes + size_of_val(&*self.endpoints)
    }
}
