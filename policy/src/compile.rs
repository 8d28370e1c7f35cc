//! From a [`Model`] to a [`Classifier`], and from its next state to the next classifier.
//!
//! 1. Endpoints, tiers, policies and profiles that did not change keep their numbers; selectors are asked about the
//!    endpoints that came or went ([`crate::peers`], [`crate::policies`]).
//! 2. Each local workload gets the list of policies that apply to it: the policies and profiles of a direction are what
//!    its program is known by. The rules of policies and profiles in use are resolved to numbered parts
//!    ([`crate::resolve`], [`crate::parts`]).
//! 3. The changes of the parts' sets move addresses from class to class ([`crate::partition`]).
//! 4. A program is made where it is new, where its plan changed, or where its sets have other classes; where those are few, and the
//!    program is of the size of most, only their rows are made again. Other programs are shared with the classifier before
//!    ([`crate::plan`], [`crate::program`]).

use std::sync::Arc;

use hashbrown::HashMap;

use crate::{
    Classifier, CompileError, EndpointId, PolicyDirection, RuleId,
    addresses::AddressClasses,
    classifier::{HostEndpointId, LocalEndpoint, Origin, Size, UNDECIDED},
    fingerprint::Fingerprint,
    limits::{MAX_MEMBERSHIPS, MAX_ROW_WORDS, MAX_RULES_IN_PROGRAMS, MAX_RULES_PER_ENDPOINT},
    model::{Action, Endpoint, EndpointKind, HostStage, Model, TierAction},
    parts::FamilySets,
    peers::Peers,
    plan::{Conditions, Plan, PlannedSlot, Purpose, fingerprint},
    policies::Policies,
    program::{Outcome, Program, ProgramBuilder, ProgramTooLarge, Test},
    ranges::Family,
    resolve::{ResolvedRule, Resolver},
    slab::Slab,
};

impl Classifier {
    /// Compiles a model, once.
    ///
    /// # Errors
    /// [`CompileError`] where the model breaks a limit; there is no slower form to fall back to.
    pub fn compile(model: &Model) -> Result<Self, CompileError> {
        Compiler::default().compile(model)
    }
}

/// Compiles the states of a model, one after the other.
///
/// The result is what [`Classifier::compile`] gives, but for the numbers of rules; what it takes depends on what changed
/// since the state before. Endpoints, policies and profiles that are the same [`Arc`] as before are known to be the same
/// without being looked at; equal ones are found to be, at the price of a comparison.
#[derive(Default)]
pub struct Compiler {
    peers: Peers,
    /// The local workloads and host endpoints, as what policies are selected by.
    workloads: Peers,
    policies: Policies,
    resolver: Resolver,
    programs: HashMap<Arc<Effective>, Programs>,
    ends: Ends,
    v4: Option<Arc<AddressClasses<u32>>>,
    v6: Option<Arc<AddressClasses<u128>>>,
    update: u64,
    /// Lent to programs that are made.
    scratch: Vec<u64>,
}

/// Where more classes than this changed, programs are made anew.
const MAX_PATCHED_CLASSES: usize = 16;

/// The policies and profiles that govern a workload in one direction: what makes its program.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Effective {
    direction: PolicyDirection,
    /// Which packets they are for; a workload's are as a host endpoint's local ones.
    stage: HostStage,
    /// Numbers of policies, in the order of evaluation.
    policies: Vec<u32>,
    /// Numbers of profiles, in order.
    profiles: Vec<u32>,
}

/// What gets programs: a workload, or a host endpoint's stage.
struct Owner<'model> {
    endpoint: &'model Arc<Endpoint>,
    /// Among what policies are selected by.
    number: u32,
    stage: HostStage,
}

/// The programs of an [`Effective`], by family.
struct Programs {
    families: [Planned; 2],
    /// Those that log; `None` where no rule of the family does.
    logging: [Option<Planned>; 2],
    /// The parts that its rules name, of both kinds.
    address_parts: Vec<u32>,
    point_parts: Vec<u32>,
    /// The tiers' ends that it has: the policies of each.
    ends: Vec<Arc<[u32]>>,
    /// The update that needed it last.
    update: u64,
}

/// A program and what it was made from.
struct Planned {
    slots: Vec<PlannedSlot>,
    fingerprint: u64,
    /// And the words of its rows; `None`: it has to be made.
    program: Option<(Arc<Program>, usize)>,
}

impl Planned {
    /// The program is that of before where the slots are.
    fn new(slots: Vec<PlannedSlot>, family: Family, before: Option<Self>, resolver: &Resolver) -> Self {
        let program = before.filter(|before| before.slots == slots).and_then(|before| before.program);
        Self { program, fingerprint: fingerprint(&slots, resolver, family), slots }
    }

    /// # Panics
    /// Where the program has not been made.
    fn program(&self) -> Arc<Program> {
        Arc::clone(&self.program.as_ref().expect("a program was made for each plan").0)
    }
}

/// The rules that stand for the ends of tiers, by the policies that apply, and the update that needed each last.
#[derive(Default)]
struct Ends(HashMap<Arc<[u32]>, (RuleId, u64)>);

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiler").field("update", &self.update).finish_non_exhaustive()
    }
}

impl Compiler {
    /// Compiles a model; quickly where it is much like the one before.
    ///
    /// # Errors
    /// [`CompileError`] where the model breaks a limit; there is no slower form to fall back to. The next model is then
    /// compiled as the first was.
    pub fn compile(&mut self, model: &Model) -> Result<Classifier, CompileError> {
        let mut compiler = std::mem::take(self);
        let classifier = compiler.follow(model)?;
        *self = compiler;
        Ok(classifier)
    }

    fn follow(&mut self, model: &Model) -> Result<Classifier, CompileError> {
        self.update += 1;
        let of_kind =
            |kind: EndpointKind| model.endpoints.iter().filter(move |endpoint| endpoint.local && endpoint.kind == kind);
        let workloads: Vec<&Arc<Endpoint>> = of_kind(EndpointKind::Workload).collect();
        let hosts: Vec<&Arc<Endpoint>> = of_kind(EndpointKind::HostEndpoint).collect();
        let by_name = numbers_by_name(&workloads, |place| EndpointId(place as u32))?;
        let first_stage = |place: usize| HostEndpointId((workloads.len() + HostStage::ALL.len() * place) as u32);
        let host_endpoints = numbers_by_name(&hosts, first_stage)?;
        self.peers.update(model.endpoints.iter());
        let numbers = self.workloads.update(workloads.iter().chain(&hosts).copied());
        let (of_workloads, of_hosts) = numbers.split_at(workloads.len());
        let mut owners: Vec<Owner<'_>> = Vec::with_capacity(workloads.len() + HostStage::ALL.len() * hosts.len());
        for (endpoint, number) in workloads.iter().copied().zip(of_workloads.iter().copied()) {
            owners.push(Owner { endpoint, number, stage: HostStage::Local });
        }
        for (endpoint, number) in hosts.iter().copied().zip(of_hosts.iter().copied()) {
            owners.extend(HostStage::ALL.map(|stage| Owner { endpoint, number, stage }));
        }
        self.resolver.update(&mut self.peers);
        self.policies.update(model, &mut self.workloads, &mut self.resolver);

        let effective = self.effective(&owners);
        for effective in effective.iter().flatten() {
            let (peers, resolver) = (&mut self.peers, &mut self.resolver);
            for policy in &effective.policies {
                self.policies.need_policy(*policy, effective.direction, resolver, peers);
            }
            for profile in &effective.profiles {
                self.policies.need_profile(*profile, effective.direction, resolver, peers);
            }
        }
        self.policies.release_unneeded(&mut self.resolver);
        self.resolver.parts.settle(&mut self.peers).map_err(|(family, _)| CompileError::TooManyAddresses {
            version: family.version(),
            limit: MAX_MEMBERSHIPS,
        })?;

        let mut size = Size::default();
        let mut limits = Limits { rules: MAX_RULES_IN_PROGRAMS, words: MAX_ROW_WORDS };
        let regrouped = self.resolver.parts.families.each_mut().map(Regrouped::take);
        let mut endpoints = Vec::with_capacity(owners.len());
        for (Owner { endpoint, .. }, effective) in owners.iter().zip(&effective) {
            for effective in effective {
                self.refresh(effective, &regrouped, &mut limits, &mut size, &endpoint.name)?;
            }
            let of_directions = effective.each_ref().map(|effective| &self.programs[effective]);
            let mut stamp = Fingerprint::new(0);
            // What is logged changes no verdict.
            let planned = of_directions.iter().flat_map(|programs| &programs.families);
            planned.for_each(|planned| stamp.add(planned.fingerprint));
            let stamp = (stamp.value() ^ (stamp.value() >> 32)) as u32;
            endpoints.push(LocalEndpoint {
                name: endpoint.name.clone(),
                programs: of_directions.map(|programs| programs.families.each_ref().map(Planned::program)),
                logging: of_directions
                    .map(|programs| programs.logging.each_ref().map(|planned| planned.as_ref().map(Planned::program))),
                stamp: stamp.max(1),
            });
        }
        self.programs.retain(|_, programs| programs.update == self.update);
        self.ends.release_unneeded(self.update, &mut self.policies.origins);

        let [v4, v6] = &self.resolver.parts.families;
        let (v4, v6) = (v4.address_classes(self.v4.take()), v6.address_classes(self.v6.take()));
        (self.v4, self.v6) = (Some(Arc::clone(&v4)), Some(Arc::clone(&v6)));
        Ok(Classifier {
            v4,
            v6,
            has_logs: endpoints.iter().any(LocalEndpoint::has_logs),
            endpoints,
            by_name,
            host_endpoints,
            origins: self.policies.origins.map_all(Origin::clone),
            names: self.policies.names(),
            size,
        })
    }

    /// By owner and direction: the policies and profiles that apply.
    fn effective(&self, owners: &[Owner<'_>]) -> Vec<[Arc<Effective>; 2]> {
        let highest = owners.iter().map(|owner| owner.number as usize + 1).max().unwrap_or(0);
        let mut owners_of: Vec<Vec<u32>> = vec![Vec::new(); highest];
        for (owner, Owner { number, .. }) in owners.iter().enumerate() {
            owners_of[*number as usize].push(owner as u32);
        }
        let mut applied: Vec<[Vec<u32>; 2]> = vec![Default::default(); owners.len()];
        for (number, policy, selected) in self.policies.in_order(&self.workloads) {
            let owners_selected = selected.iter().flat_map(|selected| &owners_of[*selected as usize]);
            for owner in owners_selected {
                let stage = owners[*owner as usize].stage;
                for direction in PolicyDirection::ALL {
                    if stage.takes(policy.scope, direction) && policy.rules(direction).is_some() {
                        applied[*owner as usize][direction as usize].push(number);
                    }
                }
            }
        }
        let of_owner = |(owner, applied): (&Owner<'_>, [Vec<u32>; 2])| {
            let stage = owner.stage;
            let profiles: Vec<u32> = match stage {
                HostStage::Local => {
                    owner.endpoint.profiles.iter().filter_map(|name| self.policies.profile(name)).collect()
                }
                HostStage::Untracked | HostStage::PreDnat | HostStage::Forwarded => Vec::new(),
            };
            let mut applied = applied.into_iter();
            PolicyDirection::ALL.map(|direction| {
                let policies = applied.next().unwrap_or_default();
                let effective = Effective { direction, stage, policies, profiles: profiles.clone() };
                match self.programs.get_key_value(&effective) {
                    Some((known, _)) => Arc::clone(known),
                    None => Arc::new(effective),
                }
            })
        };
        owners.iter().zip(applied).map(of_owner).collect()
    }

    /// Makes the programs of `effective` what they must be now, and counts them, once in each update.
    fn refresh(
        &mut self,
        effective: &Arc<Effective>,
        regrouped: &[Regrouped; 2],
        limits: &mut Limits,
        size: &mut Size,
        endpoint: &str,
    ) -> Result<(), CompileError> {
        if self.programs.get(effective).is_some_and(|known| known.update == self.update) {
            return Ok(());
        }
        let parts = &self.resolver.parts;
        let plan_stays = |known: &Programs| {
            !known.address_parts.iter().any(|part| parts.address_changed(*part))
                && !known.point_parts.iter().any(|part| parts.point_changed(*part))
        };
        let mut programs = match self.programs.remove(effective) {
            Some(known) if plan_stays(&known) => known,
            known => self.plan(effective, known),
        };
        programs.update = self.update;
        programs.ends.iter().for_each(|policies| self.ends.keep(policies, self.update));
        let verdicts = Family::ALL.into_iter().zip(regrouped).zip(&mut programs.families);
        let logging = Family::ALL.into_iter().zip(regrouped).zip(&mut programs.logging);
        let logging = logging.filter_map(|(of_family, planned)| Some((of_family, planned.as_mut()?)));
        for ((family, regrouped), planned) in verdicts.chain(logging) {
            let direction = effective.direction.name();
            if planned.program.is_none() || regrouped.concerns(&planned.slots) {
                let before = planned.program.as_ref();
                let reclassed = before.and_then(|(program, _)| self.reclassed(program, planned, family, regrouped));
                planned.program = Some(match reclassed {
                    Some(program) => program,
                    None => self.program(&planned.slots, family, endpoint, direction)?,
                });
            }
            let (program, words) = planned.program.as_ref().expect("it was just made");
            limits.rules = limits
                .rules
                .checked_sub(planned.slots.len())
                .ok_or(CompileError::TooManyRulesInPrograms { limit: MAX_RULES_IN_PROGRAMS })?;
            limits.words = limits.words.checked_sub(*words).ok_or_else(|| CompileError::TablesTooLarge {
                endpoint: endpoint.to_owned(),
                direction,
                limit: limits.words,
            })?;
            size.programs += 1;
            size.program_bytes += program.memory_bytes();
        }
        self.programs.insert(Arc::clone(effective), programs);
        Ok(())
    }

    /// Plans the programs of `effective`; they are those of before where the plans are.
    fn plan(&mut self, effective: &Effective, before: Option<Programs>) -> Programs {
        let mut ends = Vec::new();
        let (mut verdicts_before, mut logging_before) = match before {
            Some(before) => (before.families.map(Some), before.logging),
            None => Default::default(),
        };
        let families = Family::ALL.map(|family| {
            let slots = self.slots(effective, family, Purpose::Verdict, &mut ends);
            Planned::new(slots, family, verdicts_before[family as usize].take(), &self.resolver)
        });
        let has_logs = self.rules(effective).any(|rule| rule.action == Action::Log);
        let logging = Family::ALL.map(|family| {
            let slots = has_logs.then(|| self.slots(effective, family, Purpose::Logging, &mut ends))?;
            let before = logging_before[family as usize].take();
            (!slots.is_empty()).then(|| Planned::new(slots, family, before, &self.resolver))
        });
        ends.sort_unstable();
        ends.dedup();
        let alternatives = || self.rules(effective).flat_map(|rule| &rule.alternatives);
        let distinct = |mut parts: Vec<u32>| {
            parts.sort_unstable();
            parts.dedup();
            parts
        };
        Programs {
            families,
            logging,
            address_parts: distinct(alternatives().flat_map(|one| [one.source, one.destination]).collect()),
            point_parts: distinct(alternatives().flat_map(|one| [one.source_point, one.destination_point]).collect()),
            ends,
            update: self.update,
        }
    }

    /// All rules of `effective`.
    fn rules(&self, effective: &Effective) -> impl Iterator<Item = &ResolvedRule> {
        let direction = effective.direction;
        let of_policies =
            effective.policies.iter().flat_map(move |policy| self.policies.policy_rules(*policy, direction));
        let of_profiles =
            effective.profiles.iter().flat_map(move |profile| self.policies.profile_rules(*profile, direction));
        of_policies.chain(of_profiles)
    }

    /// The slots of a program, in order: what each tier, then the profiles, do with a packet. Adds the tiers' ends that it has
    /// to `ends`.
    fn slots(
        &mut self,
        effective: &Effective,
        family: Family,
        purpose: Purpose,
        ends: &mut Vec<Arc<[u32]>>,
    ) -> Vec<PlannedSlot> {
        let direction = effective.direction;
        let mut plan = Plan::new(&self.resolver, family, purpose);
        let tier_of = |policy: u32| self.policies.tier(policy);
        let by_tier: Vec<&[u32]> = effective.policies.chunk_by(|a, b| tier_of(*a) == tier_of(*b)).collect();
        for policies in by_tier {
            plan.begin_stage();
            for policy in policies {
                for rule in self.policies.policy_rules(*policy, direction) {
                    plan.add(rule, false);
                }
            }
            let tier = self.policies.tier(policies[0]);
            let decides = matches!(effective.stage, HostStage::Forwarded | HostStage::Local);
            if decides && !plan.is_closed() && self.policies.default_action(tier) == TierAction::Deny {
                let (policies, rule) = self.ends.of_tier(tier, policies, &mut self.policies.origins);
                plan.push(Outcome::Deny, rule, Conditions::NONE);
                ends.push(policies);
            }
            if plan.end_stage() {
                return plan.finish();
            }
        }
        plan.begin_stage();
        for profile in &effective.profiles {
            for rule in self.policies.profile_rules(*profile, direction) {
                plan.add(rule, true);
            }
        }
        match effective.stage {
            HostStage::Local => plan.push(Outcome::Deny, Policies::NO_PROFILE, Conditions::NONE),
            HostStage::Untracked | HostStage::PreDnat | HostStage::Forwarded => {
                plan.push(Outcome::Allow, UNDECIDED, Conditions::NONE);
            }
        }
        plan.finish()
    }

    /// The program of these slots, and the words that its rows take.
    fn program(
        &mut self,
        slots: &[PlannedSlot],
        family: Family,
        endpoint: &str,
        direction: &'static str,
    ) -> Result<(Arc<Program>, usize), CompileError> {
        if slots.len() > MAX_RULES_PER_ENDPOINT {
            return Err(CompileError::TooManyRules {
                endpoint: endpoint.to_owned(),
                direction,
                rules: slots.len(),
                limit: MAX_RULES_PER_ENDPOINT,
            });
        }
        let (program, words) = self.tables(slots, family).map_err(|ProgramTooLarge| CompileError::TablesTooLarge {
            endpoint: endpoint.to_owned(),
            direction,
            limit: MAX_MEMBERSHIPS,
        })?;
        Ok((Arc::new(program), words))
    }

    /// The program made from that of before the classes changed, and the words of its rows, where that is less work.
    fn reclassed(
        &self,
        program: &Program,
        planned: &Planned,
        family: Family,
        regrouped: &Regrouped,
    ) -> Option<(Arc<Program>, usize)> {
        let Regrouped { address_classes, point_classes, .. } = regrouped;
        if address_classes.len() + point_classes.len() > MAX_PATCHED_CLASSES {
            return None;
        }
        let sets = &self.resolver.parts.families[family as usize];
        let (addresses, points) = (&sets.partition.classes, &sets.point_classes.classes);
        let tests = |field: fn(&Conditions) -> Test| -> Vec<Test> {
            planned.slots.iter().map(|planned| field(&planned.conditions)).collect()
        };
        let (program, words) = program.reclassed([
            (tests(|conditions| conditions.source), addresses, address_classes),
            (tests(|conditions| conditions.destination), addresses, address_classes),
            (tests(|conditions| conditions.source_point), points, point_classes),
            (tests(|conditions| conditions.destination_point), points, point_classes),
        ])?;
        Some((Arc::new(program), words))
    }

    fn tables(&mut self, slots: &[PlannedSlot], family: Family) -> Result<(Program, usize), ProgramTooLarge> {
        let FamilySets { partition, point_classes, .. } = &self.resolver.parts.families[family as usize];
        let slots_only = slots.iter().map(|planned| planned.slot).collect();
        let mut builder = ProgramBuilder::new(slots_only, MAX_MEMBERSHIPS, &mut self.scratch);
        let tests = |field: fn(&Conditions) -> Test| -> Vec<Test> {
            slots.iter().map(|planned| field(&planned.conditions)).collect()
        };
        let sets = |field: fn(&Conditions) -> Option<u32>| -> Vec<Option<u32>> {
            slots.iter().map(|planned| field(&planned.conditions)).collect()
        };
        builder.source_classes(&tests(|conditions| conditions.source), &partition.classes)?;
        builder.destination_classes(&tests(|conditions| conditions.destination), &partition.classes)?;
        builder.source_points(&tests(|conditions| conditions.source_point), &point_classes.classes)?;
        builder.destination_points(&tests(|conditions| conditions.destination_point), &point_classes.classes)?;
        builder.applications(&sets(|conditions| conditions.application), |set| self.resolver.applications.get(set))?;
        builder.source_ports(&sets(|conditions| conditions.source_port), |set| self.resolver.source_ports.get(set))?;
        Ok(builder.finish())
    }
}

/// The numbers of local workloads by name.
fn numbers_by_name<N>(
    locals: &[&Arc<Endpoint>],
    number: impl Fn(usize) -> N,
) -> Result<HashMap<String, N>, CompileError> {
    let mut by_name = HashMap::with_capacity(locals.len());
    for (place, endpoint) in locals.iter().enumerate() {
        if by_name.insert(endpoint.name.clone(), number(place)).is_some() {
            return Err(CompileError::DuplicateEndpoint { name: endpoint.name.clone() });
        }
    }
    Ok(by_name)
}

impl Ends {
    /// The end of a tier in which these policies, at least one, apply. To be kept with [`Ends::keep`].
    fn of_tier(&mut self, tier: u32, policies: &[u32], origins: &mut Slab<Origin>) -> (Arc<[u32]>, RuleId) {
        if let Some((policies, (rule, _))) = self.0.get_key_value(policies) {
            return (Arc::clone(policies), *rule);
        }
        let policies = Arc::<[u32]>::from(policies);
        let rule = RuleId(origins.insert(Origin::TierEnd { tier, policies: Arc::clone(&policies) }));
        self.0.insert(Arc::clone(&policies), (rule, 0));
        (policies, rule)
    }

    fn keep(&mut self, policies: &[u32], update: u64) {
        let (_, needed) = self.0.get_mut(policies).expect("the end of a program in use");
        *needed = update;
    }

    fn release_unneeded(&mut self, update: u64, origins: &mut Slab<Origin>) {
        for (_, (rule, _)) in self.0.extract_if(|_, (_, needed)| *needed != update) {
            origins.remove(rule.0);
        }
    }
}

/// Sets of one family whose users have to be made anew, by number.
struct Regrouped {
    addresses: Vec<bool>,
    points: Vec<bool>,
    any: bool,
    /// The classes that sets were regrouped by.
    address_classes: Vec<u32>,
    point_classes: Vec<u32>,
}

impl Regrouped {
    /// Takes the marks that classes have made since the last update.
    fn take(family: &mut FamilySets) -> Self {
        let marks = |sets: Vec<u32>| {
            let mut marks = vec![false; sets.iter().max().map_or(0, |highest| *highest as usize + 1)];
            sets.into_iter().for_each(|set| marks[set as usize] = true);
            marks
        };
        let addresses = marks(family.partition.classes.take_regrouped());
        let points = marks(family.point_classes.classes.take_regrouped());
        Self {
            any: !addresses.is_empty() || !points.is_empty(),
            addresses,
            points,
            address_classes: family.partition.classes.take_signed_anew(),
            point_classes: family.point_classes.classes.take_signed_anew(),
        }
    }

    /// Whether a program with these slots has to be made anew.
    fn concerns(&self, slots: &[PlannedSlot]) -> bool {
        let is_marked = |marks: &[bool], test| match test {
            Test::Any => false,
            Test::In(set) | Test::NotIn(set) => marks.get(set as usize).copied().unwrap_or(false),
        };
        self.any
            && slots.iter().any(|PlannedSlot { conditions, .. }| {
                is_marked(&self.addresses, conditions.source)
                    || is_marked(&self.addresses, conditions.destination)
                    || is_marked(&self.points, conditions.source_point)
                    || is_marked(&self.points, conditions.destination_point)
            })
    }
}

/// What all programs may still take.
struct Limits {
    rules: usize,
    words: usize,
}
