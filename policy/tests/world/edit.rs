//! Changes of a model.

use std::{collections::BTreeMap, sync::Arc};

use ipnet::IpNet;
use proptest::{prelude::*, sample::select};
use weir_policy::model::*;

use super::{endpoint, labels, net, order, policy, port_name, rule, rules, tier};

/// One change of a model, as closures cannot be printed.
#[derive(Clone, Debug)]
pub enum Edit {
    Relabel(usize, BTreeMap<String, String>),
    Readdress(usize, Vec<IpNet>),
    RenamePorts(usize, String),
    MoveNode(usize),
    GiveProfiles(usize, Vec<String>),
    AddEndpoint(usize, Endpoint),
    RemoveEndpoint(usize),
    Reverse,
    ReplaceRules(usize, Vec<Rule>),
    ReplaceRule(usize, Box<Rule>),
    Stage(usize),
    Reorder(usize, Option<f64>),
    Renumber(usize, u32),
    AddPolicy(usize, Policy),
    RemovePolicy(usize),
    TierAction(usize, TierAction),
    TierOrder(usize, Option<f64>),
    AddTier(Tier),
    RemoveTier(usize),
    ReplaceProfile(Vec<Rule>),
}

impl Edit {
    pub fn apply(&self, model: &mut Model) {
        fn endpoint(model: &mut Model, index: usize) -> Option<&mut Endpoint> {
            let index = index.checked_rem(model.endpoints.len())?;
            Some(Arc::make_mut(&mut model.endpoints[index]))
        }
        fn policy(model: &mut Model, index: usize) -> Option<&mut Policy> {
            let policies = model.tiers.iter_mut().flat_map(|tier| &mut tier.policies);
            let mut policies: Vec<&mut Arc<Policy>> = policies.collect();
            let index = index.checked_rem(policies.len())?;
            Some(Arc::make_mut(policies.swap_remove(index)))
        }
        fn tier(model: &mut Model, index: usize) -> Option<&mut Tier> {
            let index = index.checked_rem(model.tiers.len())?;
            Some(&mut model.tiers[index])
        }
        // Names that nothing else has.
        let unique = |name: &str, taken: &mut dyn Iterator<Item = &str>| {
            let taken: Vec<String> = taken.map(str::to_owned).collect();
            (0..).map(|number| format!("{name}{number}")).find(|name| !taken.contains(name)).expect("endless")
        };
        match self {
            Self::Relabel(index, labels) => {
                endpoint(model, *index).into_iter().for_each(|one| one.labels.clone_from(labels));
            }
            Self::Readdress(index, nets) => {
                endpoint(model, *index).into_iter().for_each(|one| one.nets.clone_from(nets));
            }
            Self::RenamePorts(index, name) => {
                let ports = endpoint(model, *index).into_iter().flat_map(|one| &mut one.ports);
                ports.for_each(|port| port.name.clone_from(name));
            }
            Self::MoveNode(index) => endpoint(model, *index).into_iter().for_each(|one| one.local = !one.local),
            Self::GiveProfiles(index, profiles) => {
                endpoint(model, *index).into_iter().for_each(|one| one.profiles.clone_from(profiles));
            }
            Self::AddEndpoint(index, endpoint) => {
                let name = unique("ns/e", &mut model.endpoints.iter().map(|endpoint| endpoint.name.as_str()));
                let index = index % (model.endpoints.len() + 1);
                model.endpoints.insert(index, Arc::new(Endpoint { name, ..endpoint.clone() }));
            }
            Self::RemoveEndpoint(index) => {
                if let Some(index) = index.checked_rem(model.endpoints.len()) {
                    model.endpoints.remove(index);
                }
            }
            Self::Reverse => {
                model.endpoints.reverse();
                model.tiers.reverse();
                model.tiers.iter_mut().for_each(|tier| tier.policies.reverse());
                model.profiles.reverse();
            }
            Self::ReplaceRules(index, rules) => {
                if let Some(policy) = policy(model, *index) {
                    policy.ingress = Some(rules.clone());
                    policy.egress = Some(rules.clone());
                }
            }
            Self::ReplaceRule(index, rule) => {
                let rules = policy(model, *index).and_then(|policy| policy.ingress.as_mut());
                let first = rules.and_then(|rules| rules.first_mut());
                first.into_iter().for_each(|first| *first = Rule { number: 1, ..(**rule).clone() });
            }
            Self::Stage(index) => policy(model, *index).into_iter().for_each(|policy| policy.staged = !policy.staged),
            Self::Reorder(index, order) => policy(model, *index).into_iter().for_each(|policy| policy.order = *order),
            Self::Renumber(index, origin) => {
                policy(model, *index).into_iter().for_each(|policy| policy.origin = *origin);
            }
            Self::AddPolicy(index, policy) => {
                let policies = model.tiers.iter().flat_map(|tier| &tier.policies);
                let name = unique("p", &mut policies.map(|policy| policy.sort_name.as_str()));
                let full = format!("NetworkPolicy/ns/{name}");
                let policy = Policy { sort_name: name, name: full, ..policy.clone() };
                tier(model, *index).into_iter().for_each(|tier| tier.policies.push(Arc::new(policy.clone())));
            }
            Self::RemovePolicy(index) => {
                if let Some(tier) = tier(model, *index)
                    && let Some(index) = index.checked_rem(tier.policies.len())
                {
                    tier.policies.remove(index);
                }
            }
            Self::TierAction(index, action) => {
                tier(model, *index).into_iter().for_each(|tier| tier.default_action = *action);
            }
            Self::TierOrder(index, order) => tier(model, *index).into_iter().for_each(|tier| tier.order = *order),
            Self::AddTier(tier) => {
                let name = unique("tier", &mut model.tiers.iter().map(|tier| tier.name.as_str()));
                let mut tier = Tier { name: name.clone(), ..tier.clone() };
                for (number, policy) in tier.policies.iter_mut().enumerate() {
                    let policy = Arc::make_mut(policy);
                    policy.sort_name = format!("{name}.{number}");
                    policy.name = format!("NetworkPolicy/ns/{name}.{number}");
                }
                model.tiers.push(tier);
            }
            Self::RemoveTier(index) => {
                if let Some(index) = index.checked_rem(model.tiers.len()) {
                    model.tiers.remove(index);
                }
            }
            Self::ReplaceProfile(rules) => {
                if let Some(profile) = model.profiles.last_mut() {
                    Arc::make_mut(profile).ingress.clone_from(rules);
                }
            }
        }
    }
}

pub fn edit() -> impl Strategy<Value = Edit> {
    let index = || 0usize..12;
    let profiles = || proptest::collection::vec(select(vec!["open", "odd", "unknown"]).prop_map(str::to_owned), 0..3);
    let nets = || proptest::collection::vec(net(), 0..4);
    let action = || select(vec![TierAction::Deny, TierAction::Pass]);
    let of_endpoints = prop_oneof![
        (index(), labels()).prop_map(|(index, labels)| Edit::Relabel(index, labels)),
        (index(), nets()).prop_map(|(index, nets)| Edit::Readdress(index, nets)),
        (index(), port_name()).prop_map(|(index, name)| Edit::RenamePorts(index, name)),
        index().prop_map(Edit::MoveNode),
        (index(), profiles()).prop_map(|(index, profiles)| Edit::GiveProfiles(index, profiles)),
        (index(), endpoint()).prop_map(|(index, endpoint)| Edit::AddEndpoint(index, endpoint)),
        index().prop_map(Edit::RemoveEndpoint),
        Just(Edit::Reverse),
    ];
    let of_policies = prop_oneof![
        (index(), rules(4)).prop_map(|(index, rules)| Edit::ReplaceRules(index, rules)),
        (index(), rule()).prop_map(|(index, rule)| Edit::ReplaceRule(index, Box::new(rule))),
        index().prop_map(Edit::Stage),
        (index(), order()).prop_map(|(index, order)| Edit::Reorder(index, order)),
        (index(), any::<u32>()).prop_map(|(index, origin)| Edit::Renumber(index, origin)),
        (index(), policy(4)).prop_map(|(index, policy)| Edit::AddPolicy(index, policy)),
        index().prop_map(Edit::RemovePolicy),
        (index(), action()).prop_map(|(index, action)| Edit::TierAction(index, action)),
        (index(), order()).prop_map(|(index, order)| Edit::TierOrder(index, order)),
        tier(4).prop_map(Edit::AddTier),
        index().prop_map(Edit::RemoveTier),
        rules(3).prop_map(Edit::ReplaceProfile),
    ];
    prop_oneof![of_endpoints, of_policies]
}
