//! From a [`Model`] to a [`Classifier`].
//!
//! 1. Tiers and policies are put in order, and each local workload gets the list of policies that apply to it.
//! 2. The rules of every policy and profile that is used are resolved, once, to conditions on numbered sets.
//! 3. The address sets of each family are made into classes: addresses that no rule tells apart.
//! 4. Workloads with the same policies and profiles in a direction share a program; each program's rules are laid out
//!    in one list of slots, and its rows are made.

use std::{rc::Rc, sync::Arc};

use hashbrown::{HashMap, HashSet};
use thiserror::Error;

use crate::{
    Classifier, EndpointId, PolicyDirection, RuleId, Selector,
    addresses::AddressClasses,
    classifier::{LocalEndpoint, Names, Origin},
    fingerprint::Fingerprint,
    model::{Action, EndpointKind, Model, Policy, PolicyScope, Rule, Tier, TierAction},
    partition::Partition,
    peers::Peers,
    program::{Outcome, Program, ProgramBuilder, ProgramTooLarge, Slot, Test, point_key},
    ranges::{Family, Ranges},
    resolve::{Conditions, FamilySets, Resolver, SetFingerprints},
    rows::MAX_BITS,
};

/// The most rules that apply to one workload in one direction. A rule may count several times: see
/// [`crate::model::EntityMatch::ports`].
pub const MAX_RULES_PER_ENDPOINT: usize = MAX_BITS;
/// The most rules of all programs together.
pub const MAX_RULES_IN_PROGRAMS: usize = 1 << 26;
/// The most memberships: address ranges that rules tell apart, each times the sets that it is in. Per family; ports of
/// one program have the same limit.
pub const MAX_MEMBERSHIPS: usize = 1 << 27;
/// The most 64-bit words in the rows of all programs.
pub const MAX_ROW_WORDS: usize = 1 << 28;

/// Why a model cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CompileError {
    /// Two local workloads have one name.
    #[error("two workloads of this node are called {name}; give each its own name")]
    DuplicateEndpoint {
        /// Their name.
        name: String,
    },
    /// Too many rules apply to a workload.
    #[error(
        "{rules} rules apply to the {direction} traffic of {endpoint}, and at most {limit} can; have fewer policies select it"
    )]
    TooManyRules {
        /// The workload's name.
        endpoint: String,
        /// "ingress" or "egress".
        direction: &'static str,
        /// How many rules apply.
        rules: usize,
        /// [`MAX_RULES_PER_ENDPOINT`].
        limit: usize,
    },
    /// The rules of all workloads together are too many.
    #[error(
        "the rules of all workloads of this node, each counted once for each different set of policies that it is in, are more than {limit}; have fewer policies select them"
    )]
    TooManyRulesInPrograms {
        /// [`MAX_RULES_IN_PROGRAMS`].
        limit: usize,
    },
    /// The rules tell too many addresses apart.
    #[error(
        "the address sets of all IPv{version} rules have more than {limit} memberships; use fewer or smaller overlapping sets"
    )]
    TooManyAddresses {
        /// 4 or 6.
        version: u8,
        /// [`MAX_MEMBERSHIPS`].
        limit: usize,
    },
    /// One workload's rules take too much memory.
    #[error(
        "the rules for the {direction} traffic of {endpoint} need tables of more than {limit} words; have fewer policies select it"
    )]
    TablesTooLarge {
        /// The workload's name.
        endpoint: String,
        /// "ingress" or "egress".
        direction: &'static str,
        /// [`MAX_MEMBERSHIPS`], or what is left of [`MAX_ROW_WORDS`].
        limit: usize,
    },
}

/// A rule that was resolved.
struct ResolvedRule {
    action: Action,
    rule: RuleId,
    /// By family.
    alternatives: [Vec<Conditions>; 2],
}

/// The policies and profiles that govern a workload in one direction: what makes its program.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Effective {
    direction: PolicyDirection,
    /// Numbers of policies, in the order of evaluation.
    policies: Vec<u32>,
    /// Numbers of profiles, in order.
    profiles: Vec<u32>,
}

/// A slot before its rows are made.
struct PlannedSlot {
    slot: Slot,
    conditions: Conditions,
}

impl Classifier {
    /// Compiles a model.
    ///
    /// # Errors
    /// [`CompileError`] where the model breaks a limit; there is no slower form to fall back to.
    pub fn compile(model: &Model) -> Result<Self, CompileError> {
        Compiler::new(model).compile()
    }
}

struct Compiler<'model> {
    model: &'model Model,
    /// In order of evaluation.
    tiers: Vec<&'model Tier>,
    /// The tier's number and the policy, in order of evaluation.
    policies: Vec<(u32, &'model Arc<Policy>)>,
    /// The first profile of each name.
    profiles: HashMap<&'model str, u32>,
    /// By rule. The first denies when no profile decides.
    origins: Vec<Origin>,
    /// The ends of a tier, by the policies that apply.
    tier_ends: HashMap<Arc<[u32]>, RuleId>,
}

impl<'model> Compiler<'model> {
    fn new(model: &'model Model) -> Self {
        let tiers = model.ordered_tiers();
        let enforced = |tier: &'model Tier| tier.ordered_policies().into_iter().filter(|policy| !policy.staged);
        let policies = tiers
            .iter()
            .enumerate()
            .flat_map(|(number, tier)| enforced(tier).map(move |policy| (number as u32, policy)))
            .collect();
        let mut profiles = HashMap::new();
        for (number, profile) in model.profiles.iter().enumerate() {
            profiles.entry(profile.name.as_str()).or_insert(number as u32);
        }
        Self { model, tiers, policies, profiles, origins: vec![Origin::NoProfile], tier_ends: HashMap::new() }
    }

    fn compile(mut self) -> Result<Classifier, CompileError> {
        let peers = Peers::new(&self.model.endpoints);
        let (locals, by_name) = self.locals()?;
        let applied = self.applied(&peers, &locals);

        let mut numbers: HashMap<Rc<Effective>, u32> = HashMap::new();
        // The effective policies, and the first workload that has them.
        let mut effective: Vec<(Rc<Effective>, u32)> = Vec::new();
        let mut of_endpoint: Vec<[u32; 2]> = Vec::with_capacity(locals.len());
        for (local, policies) in locals.iter().zip(&applied) {
            let endpoint = &self.model.endpoints[*local as usize];
            let profiles: Vec<u32> =
                endpoint.profiles.iter().filter_map(|name| self.profiles.get(name.as_str()).copied()).collect();
            of_endpoint.push(PolicyDirection::ALL.map(|direction| {
                let policies = policies
                    .iter()
                    .copied()
                    .filter(|policy| self.policies[*policy as usize].1.rules(direction).is_some());
                let wanted = Effective { direction, policies: policies.collect(), profiles: profiles.clone() };
                if let Some(number) = numbers.get(&wanted) {
                    return *number;
                }
                let (number, wanted) = (effective.len() as u32, Rc::new(wanted));
                numbers.insert(Rc::clone(&wanted), number);
                effective.push((wanted, *local));
                number
            }));
        }
        drop(numbers);

        let mut resolver = Resolver::new(&peers);
        let mut policy_rules: HashMap<(PolicyDirection, u32), Vec<ResolvedRule>> = HashMap::new();
        let mut profile_rules: HashMap<(PolicyDirection, u32), Vec<ResolvedRule>> = HashMap::new();
        for (effective, _) in &effective {
            let direction = effective.direction;
            for policy in &effective.policies {
                policy_rules.entry((direction, *policy)).or_insert_with(|| {
                    let rules = self.policies[*policy as usize].1.rules(direction).unwrap_or_default();
                    resolve(rules, &mut resolver, &mut self.origins, |rule| Origin::Policy {
                        policy: *policy,
                        rule,
                        direction,
                    })
                });
            }
            for profile in &effective.profiles {
                profile_rules.entry((direction, *profile)).or_insert_with(|| {
                    let rules = self.model.profiles[*profile as usize].rules(direction);
                    resolve(rules, &mut resolver, &mut self.origins, |rule| Origin::Profile {
                        profile: *profile,
                        rule,
                        direction,
                    })
                });
            }
        }

        let hashes = resolver.set_fingerprints();
        let partitions = [
            partition_addresses(&resolver.families[0], Family::V4)?,
            partition_addresses(&resolver.families[1], Family::V6)?,
        ];
        let classes_of_sets: [Vec<Vec<u32>>; 2] =
            [0, 1].map(|family| partitions[family].classes_of_sets(resolver.families[family].addresses.iter().len()));

        let mut programs = Vec::with_capacity(2 * effective.len());
        let mut fingerprints = Vec::with_capacity(2 * effective.len());
        let mut limits = Limits { rules: MAX_RULES_IN_PROGRAMS, words: MAX_ROW_WORDS };
        for (effective, endpoint) in &effective {
            for family in Family::ALL {
                let slots = self.plan(effective, family, &policy_rules, &profile_rules);
                let endpoint = &self.model.endpoints[*endpoint as usize].name;
                fingerprints.push(fingerprint(&slots, &resolver, &hashes, family));
                let tables = Tables { resolver: &resolver, classes_of_sets: &classes_of_sets[family as usize], family };
                programs.push(tables.program(slots, &mut limits, endpoint, effective.direction)?);
            }
        }

        let endpoints = locals
            .iter()
            .zip(of_endpoint)
            .map(|(local, programs)| {
                let mut stamp = Fingerprint::new(0);
                let programs = programs.map(|number| [2 * number, 2 * number + 1]);
                programs.iter().flatten().for_each(|program| stamp.add(fingerprints[*program as usize]));
                let stamp = (stamp.value() ^ (stamp.value() >> 32)) as u32;
                LocalEndpoint {
                    name: self.model.endpoints[*local as usize].name.clone(),
                    programs,
                    stamp: stamp.max(1),
                }
            })
            .collect();
        Ok(Classifier {
            v4: AddressClasses::new(&partitions[0].intervals, Family::V4.bits()),
            v6: AddressClasses::new(&partitions[1].intervals, Family::V6.bits()),
            programs,
            endpoints,
            by_name,
            names: Names {
                policies: self.policies.iter().map(|(_, policy)| Arc::clone(policy)).collect(),
                tiers: self.tiers.iter().map(|tier| tier.name.as_str().into()).collect(),
                profiles: self.model.profiles.iter().map(Arc::clone).collect(),
            },
            origins: self.origins,
        })
    }

    /// The local workloads, and their numbers by name.
    fn locals(&self) -> Result<(Vec<u32>, HashMap<String, EndpointId>), CompileError> {
        let mut locals = Vec::new();
        let mut by_name = HashMap::new();
        for (index, endpoint) in self.model.endpoints.iter().enumerate() {
            if endpoint.local && endpoint.kind == EndpointKind::Workload {
                if by_name.insert(endpoint.name.clone(), EndpointId(locals.len() as u32)).is_some() {
                    return Err(CompileError::DuplicateEndpoint { name: endpoint.name.clone() });
                }
                locals.push(index as u32);
            }
        }
        Ok((locals, by_name))
    }

    /// By local workload: the policies that select it, in order of evaluation.
    fn applied(&self, peers: &Peers<'model>, locals: &[u32]) -> Vec<Vec<u32>> {
        let mut applied = vec![Vec::new(); locals.len()];
        let local_of: HashMap<u32, u32> =
            locals.iter().enumerate().map(|(local, index)| (*index, local as u32)).collect();
        let mut selected: HashMap<&Selector, Vec<u32>> = HashMap::new();
        for (number, (_, policy)) in self.policies.iter().enumerate() {
            if matches!(policy.scope, PolicyScope::PreDnat | PolicyScope::Untracked) {
                continue;
            }
            let locals = selected.entry(&policy.selector).or_insert_with(|| {
                let picked = peers.picked(&policy.selector, None);
                picked.iter().filter_map(|index| local_of.get(index).copied()).collect()
            });
            locals.iter().for_each(|local| applied[*local as usize].push(number as u32));
        }
        applied
    }

    /// The slots of a program, in order: what each tier, then the profiles, do with a packet.
    fn plan(
        &mut self,
        effective: &Effective,
        family: Family,
        policy_rules: &HashMap<(PolicyDirection, u32), Vec<ResolvedRule>>,
        profile_rules: &HashMap<(PolicyDirection, u32), Vec<ResolvedRule>>,
    ) -> Vec<PlannedSlot> {
        let direction = effective.direction;
        let mut plan = Plan::default();
        let tier_of = |policy: u32| self.policies[policy as usize].0;
        let by_tier: Vec<&[u32]> = effective.policies.chunk_by(|a, b| tier_of(*a) == tier_of(*b)).collect();
        for policies in by_tier {
            plan.begin_stage();
            for policy in policies {
                for rule in &policy_rules[&(direction, *policy)] {
                    plan.add(rule, family, false);
                }
            }
            let tier = self.policies[policies[0] as usize].0;
            if !plan.closed && self.tiers[tier as usize].default_action == TierAction::Deny {
                let rule = self.tier_end(tier, policies);
                plan.push(Outcome::Deny, rule, Conditions::NONE);
            }
            if plan.end_stage() {
                return plan.slots;
            }
        }
        plan.begin_stage();
        for profile in &effective.profiles {
            for rule in &profile_rules[&(direction, *profile)] {
                plan.add(rule, family, true);
            }
        }
        plan.push(Outcome::Deny, RuleId(0), Conditions::NONE);
        plan.slots
    }

    /// The rule that stands for the end of a tier in which these policies, at least one, apply.
    fn tier_end(&mut self, tier: u32, policies: &[u32]) -> RuleId {
        if let Some(rule) = self.tier_ends.get(policies) {
            return *rule;
        }
        let (rule, policies) = (RuleId(self.origins.len() as u32), Arc::<[u32]>::from(policies));
        self.origins.push(Origin::TierEnd { tier, policies: Arc::clone(&policies) });
        self.tier_ends.insert(policies, rule);
        rule
    }
}

fn resolve<'model>(
    rules: &'model [Rule],
    resolver: &mut Resolver<'_, 'model>,
    origins: &mut Vec<Origin>,
    origin: impl Fn(u32) -> Origin,
) -> Vec<ResolvedRule> {
    let mut resolved = Vec::with_capacity(rules.len());
    for (position, rule) in rules.iter().enumerate() {
        origins.push(origin(position as u32));
        resolved.push(ResolvedRule {
            action: rule.action,
            rule: RuleId((origins.len() - 1) as u32),
            alternatives: resolver.rule(rule),
        });
    }
    resolved
}

fn partition_addresses(sets: &FamilySets, family: Family) -> Result<Partition, CompileError> {
    let sets: Vec<&Ranges> = sets.addresses.iter().collect();
    Partition::new(&sets, family.max(), MAX_MEMBERSHIPS)
        .map_err(|_| CompileError::TooManyAddresses { version: family.version(), limit: MAX_MEMBERSHIPS })
}

/// The slots laid out so far. A stage is a tier, or the profiles: what a Pass skips the rest of.
#[derive(Default)]
struct Plan {
    slots: Vec<PlannedSlot>,
    /// Conditions that the stage has had: the same again can never be the first to match.
    seen: HashSet<Conditions>,
    /// Slots of the stage that continue at its end.
    passes: Vec<usize>,
    /// Whether a slot of the stage matches everything, so that nothing after it is reached.
    closed: bool,
}

impl Plan {
    fn begin_stage(&mut self) {
        self.seen.clear();
        self.closed = false;
    }

    /// Adds what a rule does. In a profile Pass denies.
    fn add(&mut self, rule: &ResolvedRule, family: Family, profile: bool) {
        for conditions in &rule.alternatives[family as usize] {
            let outcome = match rule.action {
                Action::Log => return,
                Action::Allow => Outcome::Allow,
                Action::Deny => Outcome::Deny,
                Action::Pass if profile => Outcome::Deny,
                // The end of the stage is not known yet.
                Action::Pass => Outcome::Continue(u32::MAX),
            };
            self.push(outcome, rule.rule, *conditions);
        }
    }

    fn push(&mut self, outcome: Outcome, rule: RuleId, conditions: Conditions) {
        if self.closed || !self.seen.insert(conditions) {
            return;
        }
        self.closed = conditions == Conditions::NONE;
        if matches!(outcome, Outcome::Continue(_)) {
            self.passes.push(self.slots.len());
        }
        self.slots.push(PlannedSlot { slot: Slot { outcome, rule }, conditions });
    }

    /// Says whether no packet gets beyond this stage.
    fn end_stage(&mut self) -> bool {
        let end = self.slots.len() as u32;
        let passed = !self.passes.is_empty();
        for pass in self.passes.drain(..) {
            self.slots[pass].slot.outcome = Outcome::Continue(end);
        }
        self.closed && !passed
    }
}

/// A number that programs with equal slots share, in every process; the rules' names have no part in it.
fn fingerprint(slots: &[PlannedSlot], resolver: &Resolver<'_, '_>, hashes: &SetFingerprints, family: Family) -> u64 {
    let mut fingerprint = Fingerprint::new(slots.len() as u64);
    for planned in slots {
        fingerprint.add(match planned.slot.outcome {
            Outcome::Allow => 0,
            Outcome::Deny => 1,
            Outcome::Continue(next) => 2 + u64::from(next),
        });
        fingerprint.add(resolver.fingerprint(&planned.conditions, hashes, family));
    }
    fingerprint.value()
}

/// What all programs may still take.
struct Limits {
    rules: usize,
    words: usize,
}

/// What the programs of one family are made from.
struct Tables<'all, 'peers, 'model> {
    resolver: &'all Resolver<'peers, 'model>,
    classes_of_sets: &'all [Vec<u32>],
    family: Family,
}

impl Tables<'_, '_, '_> {
    fn program(
        &self,
        slots: Vec<PlannedSlot>,
        limits: &mut Limits,
        endpoint: &str,
        direction: PolicyDirection,
    ) -> Result<Program, CompileError> {
        if slots.len() > MAX_RULES_PER_ENDPOINT {
            return Err(CompileError::TooManyRules {
                endpoint: endpoint.to_owned(),
                direction: direction.name(),
                rules: slots.len(),
                limit: MAX_RULES_PER_ENDPOINT,
            });
        }
        limits.rules = limits
            .rules
            .checked_sub(slots.len())
            .ok_or(CompileError::TooManyRulesInPrograms { limit: MAX_RULES_IN_PROGRAMS })?;
        let too_large =
            |limit| CompileError::TablesTooLarge { endpoint: endpoint.to_owned(), direction: direction.name(), limit };
        let (program, words) = self.rows(slots).map_err(|ProgramTooLarge| too_large(MAX_MEMBERSHIPS))?;
        limits.words = limits.words.checked_sub(words).ok_or_else(|| too_large(limits.words))?;
        Ok(program)
    }

    /// The program, and the words that its rows take.
    fn rows(&self, slots: Vec<PlannedSlot>) -> Result<(Program, usize), ProgramTooLarge> {
        let conditions: Vec<Conditions> = slots.iter().map(|planned| planned.conditions).collect();
        let slots = slots.iter().map(|planned| planned.slot).collect();
        let mut builder = ProgramBuilder::new(slots, MAX_MEMBERSHIPS);
        let tests = |field: fn(&Conditions) -> Test| conditions.iter().map(field).collect::<Vec<_>>();
        let sets = |field: fn(&Conditions) -> Option<u32>| conditions.iter().map(field).collect::<Vec<_>>();

        let classes_of = |set: u32| self.classes_of_sets[set as usize].as_slice();
        builder.source_classes(&tests(|conditions| conditions.source), classes_of)?;
        builder.destination_classes(&tests(|conditions| conditions.destination), classes_of)?;

        let points = &self.resolver.families[self.family as usize].points;
        let keys_of = |set: u32, keys: &mut Vec<u64>| {
            for (point, addresses) in points.get(set) {
                keys.extend(classes_of(*addresses).iter().map(|class| point_key(*class, *point)));
            }
        };
        builder.source_points(&tests(|conditions| conditions.source_point), keys_of)?;
        builder.destination_points(&tests(|conditions| conditions.destination_point), keys_of)?;

        let applications = sets(|conditions| conditions.application);
        builder.applications(&applications, |set| self.resolver.applications.get(set))?;
        let source_ports = sets(|conditions| conditions.source_port);
        builder.source_ports(&source_ports, |set| self.resolver.source_ports.get(set))?;
        Ok(builder.finish())
    }
}
