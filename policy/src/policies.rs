//! The policies and profiles of a model, kept from one model to the next, and their rules as far as a workload needs them.
//!
//! A policy has a number as long as it stays as it is in a tier that stays as it is, wherever it stands in the order of
//! evaluation; so whatever is made from policies by number is known to be the same while the numbers are.

use std::sync::Arc;

use hashbrown::HashMap;

use crate::{
    PolicyDirection, RuleId,
    classifier::{Names, Origin, UNDECIDED},
    model::{Model, Policy, Profile, Rule, Tier, TierAction},
    peers::{Peers, identity},
    resolve::{ResolvedRule, Resolver},
    slab::Slab,
};

/// See the module's description.
pub(crate) struct Policies {
    tiers: Slab<KnownTier>,
    policies: Slab<KnownPolicy>,
    /// By identity and tier.
    policy_numbers: HashMap<(usize, u32), u32>,
    profiles: Slab<KnownProfile>,
    profile_numbers: HashMap<usize, u32>,
    /// The first profile of each name.
    profiles_by_name: HashMap<String, u32>,
    /// The policies that enforce anything, in order of evaluation.
    order: Vec<u32>,
    /// What rules stand for, by number.
    pub(crate) origins: Slab<Origin>,
    update: u64,
}

struct KnownTier {
    name: Box<str>,
    default_action: TierAction,
    /// Its place in the order of evaluation.
    place: u32,
    update: u64,
}

struct KnownPolicy {
    policy: Arc<Policy>,
    tier: u32,
    /// The workloads that it applies to.
    selection: u32,
    /// Its place in the model, which tells apart what has one order and one name.
    place: u32,
    update: u64,
    rules: RulesByDirection,
}

struct KnownProfile {
    profile: Arc<Profile>,
    update: u64,
    rules: RulesByDirection,
}

/// The resolved rules of those directions in which a program needs them, and the update that needed them last.
type RulesByDirection = [Option<(Vec<ResolvedRule>, u64)>; 2];

impl Default for Policies {
    fn default() -> Self {
        let mut origins = Slab::default();
        assert_eq!(origins.insert(Origin::NoProfile), Self::NO_PROFILE.0);
        assert_eq!(origins.insert(Origin::Undecided), UNDECIDED.0);
        Self {
            tiers: Slab::default(),
            policies: Slab::default(),
            policy_numbers: HashMap::new(),
            profiles: Slab::default(),
            profile_numbers: HashMap::new(),
            profiles_by_name: HashMap::new(),
            order: Vec::new(),
            origins,
            update: 0,
        }
    }
}

impl Policies {
    /// The rule that denies when no profile decides.
    pub(crate) const NO_PROFILE: RuleId = RuleId(0);

    /// Takes over the tiers, policies and profiles of a model. `workloads` are what policies are selected by.
    pub(crate) fn update(&mut self, model: &Model, workloads: &mut Peers, resolver: &mut Resolver) {
        self.tiers.recycle();
        self.policies.recycle();
        self.profiles.recycle();
        self.origins.recycle();
        self.update += 1;
        let mut unknown = Vec::new();
        let mut place = 0;
        for (number, tier) in self.take_tiers(model) {
            for policy in tier.policies.iter().filter(|policy| !policy.staged) {
                place += 1;
                match self.policy_numbers.get(&(identity(policy), number)) {
                    Some(known) => {
                        let known = &mut self.policies[*known];
                        (known.place, known.update) = (place, self.update);
                    }
                    None => unknown.push((number, policy, place)),
                }
            }
        }
        if !unknown.is_empty() {
            self.adopt_equal(&mut unknown);
        }
        for (tier, policy, place) in unknown {
            // The same one may be there twice.
            if !self.policy_numbers.contains_key(&(identity(policy), tier)) {
                let selection = workloads.selection(&policy.selector, None);
                let (policy, update) = (Arc::clone(policy), self.update);
                let key = (identity(&policy), tier);
                let known = KnownPolicy { policy, tier, selection, place, update, rules: Default::default() };
                let number = self.policies.insert(known);
                self.policy_numbers.insert(key, number);
                self.order.push(number);
            }
        }
        let gone = self.policies.iter().filter(|(_, known)| known.update != self.update);
        for number in gone.map(|(number, _)| number).collect::<Vec<_>>() {
            let known = self.policies.remove(number);
            self.policy_numbers.remove(&(identity(&known.policy), known.tier));
            workloads.release(known.selection);
            known.rules.into_iter().flatten().for_each(|(rules, _)| release(&rules, resolver, &mut self.origins));
        }
        self.order.retain(|number| self.policies.get(*number).is_some());
        let (tiers, policies) = (&self.tiers, &self.policies);
        self.order.sort_by(|a, b| {
            let (a, b) = (&policies[*a], &policies[*b]);
            let by_tier = tiers[a.tier].place.cmp(&tiers[b.tier].place);
            by_tier.then_with(|| a.policy.evaluation_order(&b.policy)).then(a.place.cmp(&b.place))
        });
        self.take_profiles(model, resolver);
    }
}

impl Policies {
    /// The numbers of the model's tiers, in order of evaluation.
    fn take_tiers<'model>(&mut self, model: &'model Model) -> Vec<(u32, &'model Tier)> {
        let mut tiers = Vec::new();
        for (place, tier) in model.ordered_tiers().into_iter().enumerate() {
            let update = self.update;
            let same = |known: &KnownTier| {
                known.update != update && *known.name == *tier.name && known.default_action == tier.default_action
            };
            let known = self.tiers.iter().find(|(_, known)| same(known)).map(|(number, _)| number);
            let number = known.unwrap_or_else(|| {
                let name = tier.name.as_str().into();
                self.tiers.insert(KnownTier { name, default_action: tier.default_action, place: 0, update })
            });
            let known = &mut self.tiers[number];
            (known.place, known.update) = (place as u32, update);
            tiers.push((number, tier));
        }
        let gone = self.tiers.iter().filter(|(_, known)| known.update != self.update);
        for number in gone.map(|(number, _)| number).collect::<Vec<_>>() {
            self.tiers.remove(number);
        }
        tiers
    }

    /// Takes policies that are those of before, but were made anew, out of `unknown`.
    fn adopt_equal(&mut self, unknown: &mut Vec<(u32, &Arc<Policy>, u32)>) {
        let gone: Vec<(u32, u32, Arc<Policy>)> = self
            .policies
            .iter()
            .filter(|(_, known)| known.update != self.update)
            .map(|(number, known)| (number, known.tier, Arc::clone(&known.policy)))
            .collect();
        let by_name: HashMap<(u32, &str), u32> =
            gone.iter().map(|(number, tier, policy)| ((*tier, policy.name.as_str()), *number)).collect();
        unknown.retain(|(tier, policy, place)| {
            let Some(number) = by_name.get(&(*tier, policy.name.as_str())) else { return true };
            let known = &mut self.policies[*number];
            if known.update == self.update || !known.policy.is_equal_but_for_origin(policy) {
                return true;
            }
            self.policy_numbers.remove(&(identity(&known.policy), *tier));
            self.policy_numbers.insert((identity(policy), *tier), *number);
            known.policy = Arc::clone(policy);
            (known.place, known.update) = (*place, self.update);
            false
        });
    }

    fn take_profiles(&mut self, model: &Model, resolver: &mut Resolver) {
        self.profiles_by_name.clear();
        for profile in &model.profiles {
            if self.profiles_by_name.contains_key(&profile.name) {
                continue;
            }
            let known = self.profile_numbers.get(&identity(profile)).copied();
            let number = known.unwrap_or_else(|| {
                let rules = Default::default();
                let known = KnownProfile { profile: Arc::clone(profile), update: self.update, rules };
                let number = self.profiles.insert(known);
                self.profile_numbers.insert(identity(profile), number);
                number
            });
            self.profiles[number].update = self.update;
            self.profiles_by_name.insert(profile.name.clone(), number);
        }
        let gone = self.profiles.iter().filter(|(_, known)| known.update != self.update);
        for number in gone.map(|(number, _)| number).collect::<Vec<_>>() {
            let known = self.profiles.remove(number);
            self.profile_numbers.remove(&identity(&known.profile));
            known.rules.into_iter().flatten().for_each(|(rules, _)| release(&rules, resolver, &mut self.origins));
        }
    }

    /// The policies that enforce anything, in order of evaluation, with the workloads that each applies to.
    pub(crate) fn in_order<'all>(
        &'all self,
        workloads: &'all Peers,
    ) -> impl Iterator<Item = (u32, &'all Policy, &'all [u32])> {
        self.order.iter().map(|number| {
            let known = &self.policies[*number];
            (*number, &*known.policy, workloads.picked(known.selection))
        })
    }

    /// The tier of a policy.
    pub(crate) fn tier(&self, policy: u32) -> u32 {
        self.policies[policy].tier
    }

    pub(crate) fn default_action(&self, tier: u32) -> TierAction {
        self.tiers[tier].default_action
    }

    /// The number of the profile of this name, if there is one.
    pub(crate) fn profile(&self, name: &str) -> Option<u32> {
        self.profiles_by_name.get(name).copied()
    }

    /// Resolves the rules of a policy for a direction, unless they are.
    pub(crate) fn need_policy(
        &mut self,
        policy: u32,
        direction: PolicyDirection,
        resolver: &mut Resolver,
        peers: &mut Peers,
    ) {
        let known = &mut self.policies[policy];
        let rules = known.policy.rules(direction).unwrap_or_default();
        let origin = |rule| Origin::Policy { policy, rule, direction };
        let (_, needed) = known.rules[direction as usize]
            .get_or_insert_with(|| (resolve(rules, resolver, peers, &mut self.origins, origin), 0));
        *needed = self.update;
    }

    /// As [`Policies::need_policy`].
    pub(crate) fn need_profile(
        &mut self,
        profile: u32,
        direction: PolicyDirection,
        resolver: &mut Resolver,
        peers: &mut Peers,
    ) {
        let known = &mut self.profiles[profile];
        let rules = known.profile.rules(direction);
        let origin = |rule| Origin::Profile { profile, rule, direction };
        let (_, needed) = known.rules[direction as usize]
            .get_or_insert_with(|| (resolve(rules, resolver, peers, &mut self.origins, origin), 0));
        *needed = self.update;
    }

    /// Gives up the rules that were needed before, but not since the last update.
    pub(crate) fn release_unneeded(&mut self, resolver: &mut Resolver) {
        let of_policies = self.policies.iter_mut().map(|(_, known)| &mut known.rules);
        let of_profiles = self.profiles.iter_mut().map(|(_, known)| &mut known.rules);
        for rules in of_policies.chain(of_profiles).flatten() {
            if let Some((unneeded, _)) = rules.take_if(|(_, update)| *update != self.update) {
                release(&unneeded, resolver, &mut self.origins);
            }
        }
    }

    /// The rules of a policy, after [`Policies::need_policy`].
    pub(crate) fn policy_rules(&self, policy: u32, direction: PolicyDirection) -> &[ResolvedRule] {
        self.policies[policy].rules[direction as usize].as_ref().map_or(&[], |(rules, _)| rules)
    }

    /// The rules of a profile, after [`Policies::need_profile`].
    pub(crate) fn profile_rules(&self, profile: u32, direction: PolicyDirection) -> &[ResolvedRule] {
        self.profiles[profile].rules[direction as usize].as_ref().map_or(&[], |(rules, _)| rules)
    }

    /// What [`Origin`]s refer to.
    pub(crate) fn names(&self) -> Names {
        Names {
            policies: self.policies.map_all(|known| Arc::clone(&known.policy)),
            tiers: self.tiers.map_all(|known| known.name.clone()),
            profiles: self.profiles.map_all(|known| Arc::clone(&known.profile)),
        }
    }
}

fn resolve(
    rules: &[Rule],
    resolver: &mut Resolver,
    peers: &mut Peers,
    origins: &mut Slab<Origin>,
    origin: impl Fn(u32) -> Origin,
) -> Vec<ResolvedRule> {
    let resolved = rules.iter().zip(0..).map(|(rule, place)| ResolvedRule {
        action: rule.action,
        rule: RuleId(origins.insert(origin(place))),
        ip_version: rule.ip_version,
        alternatives: resolver.rule(rule, peers),
    });
    resolved.collect()
}

fn release(rules: &[ResolvedRule], resolver: &mut Resolver, origins: &mut Slab<Origin>) {
    for rule in rules {
        resolver.release(&rule.alternatives);
        origins.remove(rule.rule.0);
    }
}
