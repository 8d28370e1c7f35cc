//! Calico's policies: GlobalNetworkPolicy, NetworkPolicy, and their staged forms.

use weir_policy::{
    PolicyDirection, Selector,
    model::{Policy, PolicyScope, Rule},
};

use super::{
    PolicyName,
    labels::{NAMESPACE_LABEL, NAMESPACE_PREFIX, SERVICE_ACCOUNT_LABEL, SERVICE_ACCOUNT_PREFIX},
    rules::{self, RuleReader},
    selectors::{expression, in_namespace, inherited},
    services::ServiceEndpoints,
    tiers::DEFAULT_TIER,
};
use crate::{
    resources::{
        Object,
        at::{At, Reporter},
        calico::policy::{GlobalNetworkPolicy, NetworkPolicy, PolicyType},
    },
    text::Problems,
};

/// The tier that a policy names.
pub(super) fn tier_of(given: &Option<String>) -> &str {
    given.as_deref().filter(|name| !name.is_empty()).unwrap_or(DEFAULT_TIER)
}

pub(super) fn network_policy(
    object: &Object<NetworkPolicy>,
    name: PolicyName<'_>,
    services: &ServiceEndpoints<'_>,
    problems: &mut Problems,
) -> Policy {
    let mut report = object.reporter(problems);
    let (spec, at) = (&object.value.spec, object.at().key("spec"));
    let reader = RuleReader { namespace: Some(&object.namespace), services };
    let selectors = [
        Some(in_namespace(&object.namespace)),
        own_selector(&spec.selector, at, &mut report),
        service_account_selector(&spec.service_account_selector, at, &mut report),
    ];
    let ingress = rules::rules(&spec.ingress, PolicyDirection::Ingress, reader, at, &mut report);
    let egress = rules::rules(&spec.egress, PolicyDirection::Egress, reader, at, &mut report);
    let has_rules = [!spec.ingress.is_empty(), !spec.egress.is_empty()];
    let (ingress, egress) = governed(&spec.types, ingress, egress);
    idle_rules(has_rules, [ingress.is_some(), egress.is_some()], "types", at, &mut report);
    Policy {
        order: spec.order,
        selector: Selector::all_of(selectors.into_iter().flatten()),
        ingress,
        egress,
        ..name.policy(object.origin)
    }
}

pub(super) fn global_network_policy(
    object: &Object<GlobalNetworkPolicy>,
    name: PolicyName<'_>,
    services: &ServiceEndpoints<'_>,
    problems: &mut Problems,
) -> Policy {
    let mut report = object.reporter(problems);
    let (spec, at) = (&object.value.spec, object.at().key("spec"));
    let reader = RuleReader { namespace: None, services };
    let namespace_selector = given(&spec.namespace_selector).map(|text| {
        let at = at.key("namespaceSelector");
        inherited(text, NAMESPACE_PREFIX, NAMESPACE_LABEL, at, "spec.namespaceSelector", &mut report)
    });
    let selectors = [
        namespace_selector,
        own_selector(&spec.selector, at, &mut report),
        service_account_selector(&spec.service_account_selector, at, &mut report),
    ];
    let ingress = rules::rules(&spec.ingress, PolicyDirection::Ingress, reader, at, &mut report);
    let egress = rules::rules(&spec.egress, PolicyDirection::Egress, reader, at, &mut report);
    let has_rules = [!spec.ingress.is_empty(), !spec.egress.is_empty()];
    let (ingress, egress) = governed(&spec.types, ingress, egress);
    idle_rules(has_rules, [ingress.is_some(), egress.is_some()], "types", at, &mut report);
    Policy {
        order: spec.order,
        selector: Selector::all_of(selectors.into_iter().flatten()),
        scope: scope(object, egress.is_some(), &mut report),
        ingress,
        egress,
        ..name.policy(object.origin)
    }
}

fn scope(object: &Object<GlobalNetworkPolicy>, has_egress: bool, report: &mut Reporter<'_>) -> PolicyScope {
    let (spec, at) = (&object.value.spec, object.at().key("spec"));
    if spec.do_not_track && spec.pre_dnat {
        let help = "make two policies of it".to_owned();
        report.error(at.name_of("preDNAT"), "spec.preDNAT stands beside spec.doNotTrack", help);
    }
    for (key, is_set) in [("doNotTrack", spec.do_not_track), ("preDNAT", spec.pre_dnat)] {
        if is_set && !spec.apply_on_forward {
            let help = "such a policy meets forwarded packets too: write applyOnForward: true".to_owned();
            report.error(at.name_of(key), format_args!("spec.{key} needs spec.applyOnForward"), help);
        }
    }
    if spec.pre_dnat && has_egress {
        let help =
            "services are translated where packets arrive: leave egress rules and the type Egress out".to_owned();
        report.error(at.name_of("preDNAT"), "spec.preDNAT of a policy that governs egress", help);
    }
    match (spec.do_not_track, spec.pre_dnat, spec.apply_on_forward) {
        (true, ..) => PolicyScope::Untracked,
        (_, true, _) => PolicyScope::PreDnat,
        (.., true) => PolicyScope::ApplyOnForward,
        _ => PolicyScope::Normal,
    }
}

/// Warns of ingress and egress rules that mean nothing, as the policy does not govern their direction, by the field that names the directions.
pub(super) fn idle_rules(has_rules: [bool; 2], governs: [bool; 2], types: &str, at: At<'_>, report: &mut Reporter<'_>) {
    for (direction, (key, name)) in [("ingress", "Ingress"), ("egress", "Egress")].into_iter().enumerate() {
        if has_rules[direction] && !governs[direction] {
            let help = format!("add {name} to {types}, or take the rules out");
            let message = format_args!("spec.{key} has rules, and spec.{types} has no {name}: they mean nothing");
            report.warning(at.name_of(key), message, help);
        }
    }
}

fn given(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}

fn own_selector(text: &Option<String>, at: At<'_>, report: &mut Reporter<'_>) -> Option<Selector> {
    given(text).map(|text| expression(text, at.key("selector"), "spec.selector", report))
}

fn service_account_selector(text: &Option<String>, at: At<'_>, report: &mut Reporter<'_>) -> Option<Selector> {
    given(text).map(|text| {
        let (at, field) = (at.key("serviceAccountSelector"), "spec.serviceAccountSelector");
        inherited(text, SERVICE_ACCOUNT_PREFIX, SERVICE_ACCOUNT_LABEL, at, field, report)
    })
}

/// The rules of the directions that a policy governs. Without types: egress where there are egress rules, ingress where
/// there are ingress rules or none at all (not as Kubernetes's policies).
fn governed(types: &[PolicyType], ingress: Vec<Rule>, egress: Vec<Rule>) -> (Option<Vec<Rule>>, Option<Vec<Rule>>) {
    let (governs_ingress, governs_egress) = if types.is_empty() {
        (!ingress.is_empty() || egress.is_empty(), !egress.is_empty())
    } else {
        (types.contains(&PolicyType::Ingress), types.contains(&PolicyType::Egress))
    };
    (governs_ingress.then_some(ingress), governs_egress.then_some(egress))
}
