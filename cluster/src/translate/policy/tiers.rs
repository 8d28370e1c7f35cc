//! Tiers: the built-in ones, the manifests' own, and those that only policies name.

use std::{collections::BTreeMap, sync::Arc};

use weir_policy::model::{Policy, Tier, TierAction};

use crate::{
    resources::{
        Manifests, Object,
        at::{At, Reporter},
        calico::policy,
    },
    text::Problems,
};

/// The tier of Kubernetes's NetworkPolicies, and of policies that name none.
pub(super) const DEFAULT_TIER: &str = "default";
/// The tiers of ClusterNetworkPolicies.
pub(super) const ADMIN_TIER: &str = "kube-admin";
pub(super) const BASELINE_TIER: &str = "kube-baseline";

const BUILT_IN: [(&str, f64, TierAction); 3] = [
    (DEFAULT_TIER, 1_000_000.0, TierAction::Deny),
    (ADMIN_TIER, 1000.0, TierAction::Pass),
    (BASELINE_TIER, 10_000_000.0, TierAction::Pass),
];

/// Tiers by name, with the policies that were put into them.
pub(super) struct Tiers {
    tiers: BTreeMap<String, Tier>,
}

impl Tiers {
    pub(super) fn new(manifests: &Manifests, problems: &mut Problems) -> Self {
        let mut tiers = Self { tiers: BTreeMap::new() };
        for (name, order, default_action) in BUILT_IN {
            tiers.define(name, Some(order), default_action);
        }
        for object in manifests.tiers() {
            if let Some(built_in) = BUILT_IN.iter().find(|(name, ..)| **name == *object.name) {
                check_built_in(object, built_in, problems);
                continue;
            }
            let spec = &object.value.spec;
            tiers.define(&object.name, spec.order, spec.default_action.map_or(TierAction::Deny, action));
        }
        tiers
    }

    fn define(&mut self, name: &str, order: Option<f64>, default_action: TierAction) {
        let name = name.to_owned();
        self.tiers.insert(name.clone(), Tier { name, order, default_action, ..Tier::default() });
    }

    /// Puts a policy into a tier. One that nobody defines comes after all others and denies at its end.
    pub(super) fn add(&mut self, tier: &str, policy: Arc<Policy>) {
        let undefined = || Tier { name: tier.to_owned(), undefined: true, ..Tier::default() };
        self.tiers.entry(tier.to_owned()).or_insert_with(undefined).policies.push(policy);
    }

    /// Says where a policy names a tier that nobody defines.
    pub(super) fn check(&self, tier: &str, at: At<'_>, report: &mut Reporter<'_>) {
        if self.tiers.get(tier).is_none_or(|tier| tier.undefined) {
            let help = "define it, or correct its name".to_owned();
            report.warning(at, format_args!("no Tier {tier} is defined: it comes after all others"), help);
        }
    }

    pub(super) fn into_tiers(self) -> Vec<Tier> {
        self.tiers.into_values().filter(|tier| !tier.policies.is_empty() || tier.name == DEFAULT_TIER).collect()
    }
}

fn action(given: policy::TierAction) -> TierAction {
    match given {
        policy::TierAction::Pass => TierAction::Pass,
        policy::TierAction::Deny => TierAction::Deny,
    }
}

/// A manifest may write a built-in tier out, or leave parts of it out. With another order or end it would be another tier: with Pass at the end
/// of "default" no NetworkPolicy would isolate anything.
fn check_built_in(object: &Object<policy::Tier>, built_in: &(&str, f64, TierAction), problems: &mut Problems) {
    let (name, order, default_action) = *built_in;
    let (spec, at) = (&object.value.spec, object.at().key("spec"));
    let mut report = object.reporter(problems);
    let help = |what: &str| format!("the tier {name} is built in: leave {what} out, or make a tier of another name");
    if spec.order.is_some_and(|given| given != order) {
        let message = format_args!("spec.order of the tier {name} is {order}");
        report.error(at.key("order"), message, help("order"));
    }
    if spec.default_action.is_some_and(|given| action(given) != default_action) {
        let message = format_args!("spec.defaultAction of the tier {name} is {default_action:?}");
        report.error(at.key("defaultAction"), message, help("defaultAction"));
    }
}
