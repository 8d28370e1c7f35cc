//! What stands for a policy that cannot be read and has no earlier version: it denies what it selects, as far as that can
//! be told, and all that it may select where it cannot.

use weir_policy::{
    Selector,
    model::{Action, Policy, PolicyScope, Rule},
};

use super::{
    PolicyName, kubernetes,
    selectors::{in_namespace, label_selector, pods, pods_of},
    tiers::{ADMIN_TIER, BASELINE_TIER, DEFAULT_TIER},
};
use crate::{
    resources::{
        Denying, Subject,
        at::{At, Reporter},
    },
    text::{Problems, tree::Node},
};

/// The policy and its tier.
pub(super) fn denying(faulty: &Denying) -> (&str, Policy) {
    let policy = PolicyName::of_id(&faulty.id).policy(faulty.origin);
    let namespace = faulty.id.namespace.as_ref();
    match &faulty.subject {
        Subject::Kubernetes { pod_selector } => {
            let own = pod_selector.as_ref().and_then(|selector| {
                let mut problems = Problems::default();
                let nowhere = Node::null();
                let mut report = Reporter::new(&mut problems, String::new());
                let selector = label_selector(selector, "", At::root(&nowhere), "", &mut report);
                (!problems.has_errors()).then_some(selector)
            });
            let policy = Policy {
                order: Some(kubernetes::ORDER),
                selector: Selector::all_of(std::iter::once(pods_of(namespace)).chain(own)),
                // Additive policies deny by being there.
                ingress: Some(Vec::new()),
                egress: Some(Vec::new()),
                ..policy
            };
            (DEFAULT_TIER, policy)
        }
        Subject::Calico { selector, tier, apply_on_forward } => {
            let own = selector.as_ref().and_then(|text| Selector::parse(text).ok());
            let limit = (!namespace.is_empty()).then(|| in_namespace(namespace));
            let policy = Policy {
                selector: Selector::all_of(limit.into_iter().chain(own)),
                scope: if *apply_on_forward { PolicyScope::ApplyOnForward } else { PolicyScope::Normal },
                ..first_and_denying(policy)
            };
            (tier.as_deref().unwrap_or(DEFAULT_TIER), policy)
        }
        Subject::Cluster { is_baseline } => {
            let tier = if *is_baseline { BASELINE_TIER } else { ADMIN_TIER };
            (tier, Policy { selector: pods(), ..first_and_denying(policy) })
        }
    }
}

/// Where rules of other policies may allow, a policy denies by coming first.
fn first_and_denying(policy: Policy) -> Policy {
    let deny = || Some(vec![Rule { number: 1, action: Action::Deny, ..Rule::default() }]);
    Policy { order: Some(f64::NEG_INFINITY), ingress: deny(), egress: deny(), ..policy }
}
