//! Policy that is valid and enforced, but hardly does what its author meant, as what it names is not there. Only `weir check` looks for it.

use std::collections::{BTreeMap, BTreeSet};

use weir_policy::{
    PolicyDirection, Selector,
    model::{Endpoint, EndpointKind, Model, Policy, PortMatch, Rule},
};

use super::{
    labels::{Inherited, Labels, NAMESPACE_LABEL, NAMESPACE_PREFIX},
    selectors::{label_selector, namespaces},
};
use crate::{
    resources::{
        Manifests, Object,
        at::{At, Reporter},
        calico::policy::Rule as CalicoRule,
        object::Readable,
    },
    text::{Problems, Span, problem::nearest},
};

/// Namespaces that every cluster has, and that manifests of applications leave out.
const ALWAYS_THERE: [&str; 4] = ["default", "kube-node-lease", "kube-public", "kube-system"];

pub(in crate::translate) fn lint(manifests: &Manifests, model: &Model, problems: &mut Problems) {
    policies(manifests, model, problems);
    namespace_selectors(manifests, problems);
}

/// Policies that select nothing, and ports by names that nobody has.
fn policies(manifests: &Manifests, model: &Model, problems: &mut Problems) {
    let has_policy = |kind: EndpointKind| matches!(kind, EndpointKind::Workload | EndpointKind::HostEndpoint);
    let endpoints: Vec<&Endpoint> =
        model.endpoints.iter().filter(|endpoint| has_policy(endpoint.kind)).map(|endpoint| &**endpoint).collect();
    let mut places: Vec<(Span, &Policy)> = Vec::new();
    for policy in model.tiers.iter().flat_map(|tier| &tier.policies) {
        places.extend(manifests.place(policy.origin).map(|place| (place, &**policy)));
    }
    places.sort_by_key(|(place, _)| (place.file, place.start));
    if endpoints.is_empty() {
        if let Some((place, _)) = places.first() {
            let message = "no pod is in the manifests, so nobody can tell what policies select and reach \
                           (--assume-pods makes pods of workloads)";
            problems.note(*place, message);
        }
        return;
    }
    let all: BTreeSet<&str> = endpoints.iter().flat_map(|endpoint| names(endpoint)).collect();
    for (place, policy) in places {
        let selected: Vec<&Endpoint> =
            endpoints.iter().filter(|endpoint| policy.selector.matches(&endpoint.labels)).copied().collect();
        if selected.is_empty() && is_of_known_namespace(manifests, policy) {
            let help = "a label or a namespace may be misspelt; or its pods are not in the manifests, as an operator makes them".to_owned();
            problems.warning(place, format!("{} selects no pod", policy.name), help);
        }
        let of_selected: BTreeSet<&str> = selected.iter().flat_map(|endpoint| names(endpoint)).collect();
        for (direction, known, whose) in [
            (PolicyDirection::Ingress, &of_selected, "no pod that it selects has"),
            (PolicyDirection::Egress, &all, "no pod has"),
        ] {
            if selected.is_empty() && direction == PolicyDirection::Ingress {
                continue;
            }
            let mut told = BTreeSet::new();
            for rule in policy.rules(direction).into_iter().flatten() {
                for name in ports_of(rule).filter(|name| !known.contains(name)) {
                    if told.insert((rule.number, name)) {
                        let help = nearest(name, known.iter().copied()).map(|known| format!("did you mean {known}?"));
                        let message = format!(
                            "{}: {} rule {}: {whose} a port called {name:?}",
                            policy.name,
                            direction.name(),
                            rule.number
                        );
                        problems.warning(place, message, help);
                    }
                }
            }
        }
    }
}

/// Whether a policy's namespace is there. If it is not, that is told already.
fn is_of_known_namespace(manifests: &Manifests, policy: &Policy) -> bool {
    let namespace = manifests.get(policy.origin).and_then(|origin| origin.namespace);
    let is_there = |name: String| manifests.namespaces().iter().any(|namespace| *namespace.name == *name);
    manifests.namespaces().is_empty() || namespace.is_none_or(is_there)
}

fn names(endpoint: &Endpoint) -> impl Iterator<Item = &str> {
    endpoint.ports.iter().map(|port| port.name.as_str())
}

/// The named ports of a rule's destination.
fn ports_of(rule: &Rule) -> impl Iterator<Item = &str> {
    let ports = rule.destination.ports.iter().flatten().chain(&rule.destination.not_ports);
    ports.filter_map(|port| match port {
        PortMatch::Named(name) => Some(name.as_str()),
        PortMatch::Range(..) => None,
    })
}

/// Selectors of namespaces that match none.
fn namespace_selectors(manifests: &Manifests, problems: &mut Problems) {
    // Where there are none at all, they were left out.
    if manifests.namespaces().is_empty() {
        return;
    }
    let known = Known::of(manifests);
    for object in manifests.network_policies() {
        let Some(spec) = &object.value.spec else { continue };
        let ingress = spec.ingress.iter().flatten().map(|rule| rule.from.as_deref());
        let egress = spec.egress.iter().flatten().map(|rule| rule.to.as_deref());
        let rules = ingress.enumerate().map(|(index, peers)| ("ingress", index, "from", peers));
        let rules = rules.chain(egress.enumerate().map(|(index, peers)| ("egress", index, "to", peers)));
        for (direction, index, key, peers) in rules {
            for (number, peer) in peers.into_iter().flatten().enumerate() {
                let Some(selector) = &peer.namespace_selector else { continue };
                let at = object.at().key("spec").key(direction).item(index).key(key).item(number);
                let at = at.key("namespaceSelector");
                let field = format!("spec.{direction}[{index}].{key}[{number}].namespaceSelector");
                // What is wrong with it was reported where it was translated.
                let mut unread = Problems::default();
                let mut reporter = Reporter::new(&mut unread, String::new());
                let selector = label_selector(selector, NAMESPACE_PREFIX, at, &field, &mut reporter);
                known.check(&selector, at, &field, &mut object.reporter(problems));
            }
        }
    }
    for object in manifests.calico_network_policies() {
        calico(object, &object.value.spec.ingress, "ingress", &known, problems);
        calico(object, &object.value.spec.egress, "egress", &known, problems);
    }
    for object in manifests.global_network_policies() {
        calico(object, &object.value.spec.ingress, "ingress", &known, problems);
        calico(object, &object.value.spec.egress, "egress", &known, problems);
    }
}

fn calico<T: Readable>(
    object: &Object<T>,
    rules: &[CalicoRule],
    direction: &str,
    known: &Known,
    problems: &mut Problems,
) {
    for (index, rule) in rules.iter().enumerate() {
        for (key, side) in [("source", &rule.source), ("destination", &rule.destination)] {
            let Some(text) = side.namespace_selector.as_ref().filter(|text| !text.is_empty()) else { continue };
            let at = object.at().key("spec").key(direction).item(index).key(key).key("namespaceSelector");
            let field = format!("spec.{direction}[{index}].{key}.namespaceSelector");
            let mut unread = Problems::default();
            let mut reporter = Reporter::new(&mut unread, String::new());
            let selector = namespaces(text, NAMESPACE_PREFIX, at, &field, &mut reporter);
            known.check(&selector, at, &field, &mut object.reporter(problems));
        }
    }
}

/// The labels that things of each namespace inherit, and those of things in none.
struct Known(Vec<Labels>);

impl Known {
    fn of(manifests: &Manifests) -> Self {
        let inherited = Inherited::new(manifests);
        let given = manifests.namespaces().iter().map(|object| &*object.name);
        let mut names: BTreeSet<&str> = given.chain(ALWAYS_THERE).collect();
        names.extend(manifests.pods().iter().map(|pod| &*pod.namespace));
        let labels = names.into_iter().map(|name| inherited.of_network_set(Some(name), &Labels::new()));
        Self(labels.chain([BTreeMap::new()]).collect())
    }

    fn check(&self, selector: &Selector, at: At<'_>, field: &str, report: &mut Reporter<'_>) {
        if self.0.iter().any(|labels| selector.matches(labels)) {
            return;
        }
        let names = self.0.iter().filter_map(|labels| labels.get(NAMESPACE_LABEL)).map(String::as_str);
        let help =
            meant(selector).and_then(|meant| nearest(meant, names)).map(|known| format!("did you mean {known}?"));
        let help = help.unwrap_or_else(|| {
            "a namespace's labels are those of its Namespace, and kubernetes.io/metadata.name".to_owned()
        });
        report.warning(at, format_args!("{field} matches no namespace"), help);
    }
}

/// The one value that a selector asks a label for, which is a namespace's name as a rule.
fn meant(selector: &Selector) -> Option<&str> {
    match selector {
        Selector::Equals(_, value) => Some(value),
        Selector::And(parts) => parts.iter().find_map(meant),
        _ => None,
    }
}
