//! All that says who may reach whom, in the terms of Calico's evaluation: tiers of policies, then profiles.

mod calico;
mod cluster_network_policy;
mod denying;
mod endpoints;
mod kubernetes;
mod labels;
mod lints;
mod profiles;
mod rules;
mod selectors;
mod services;
mod tiers;

use std::sync::Arc;

use weir_dataplane::model::Cluster;
use weir_policy::model::{Model, Policy};

pub(super) use self::{endpoints::Kept, lints::lint};

use self::{
    cluster_network_policy::Nodes, labels::Inherited, rules::RuleReader, services::ServiceEndpoints, tiers::Tiers,
};
use crate::{
    config::RouterConfig,
    resources::{Content, Manifests, Object, ObjectId, calico::policy::Rule as CalicoRule},
    text::Problems,
    translate::{cluster::Described, impossible::too_many_rules},
};

/// Policy, and whether it depends on the endpoints of services.
pub(super) fn translate(
    config: &RouterConfig,
    manifests: &Manifests,
    cluster: &Cluster,
    described: &[Described<'_>],
    kept: &mut Kept,
    problems: &mut Problems,
) -> (Model, bool) {
    let inherited = Inherited::new(manifests);
    let mut endpoints = endpoints::workloads(manifests, &inherited, cluster, described, kept, problems);
    endpoints.extend(endpoints::host_endpoints(config, manifests, &inherited, problems));
    endpoints.extend(endpoints::network_sets(manifests, &inherited, problems));
    let services = ServiceEndpoints::new(manifests);
    let reader = RuleReader { namespace: None, services: &services };
    let profiles = profiles::profiles(manifests, &endpoints, reader, problems);
    let tiers = tiers(manifests, &services, &Nodes::new(manifests, cluster), problems).into_tiers();
    let model = Model { endpoints, tiers, profiles };
    too_many_rules(&model, manifests, problems);
    let names_services = services.were_asked();
    (model, names_services)
}

fn tiers(manifests: &Manifests, services: &ServiceEndpoints<'_>, nodes: &Nodes<'_>, problems: &mut Problems) -> Tiers {
    let mut tiers = Tiers::new(manifests, problems);
    for object in manifests.network_policies() {
        let make = |object: &_, problems: &mut _| kubernetes::network_policy(object, problems).map(Arc::new);
        if let Some(policy) = object.made(problems, make) {
            tiers.add(tiers::DEFAULT_TIER, Arc::clone(policy));
        }
    }
    for object in manifests.staged_kubernetes_network_policies() {
        let policy = made(object, true, problems, kubernetes::staged_network_policy);
        tiers.add(tiers::DEFAULT_TIER, policy);
    }
    for (kind, objects, staged) in [
        ("GlobalNetworkPolicy", manifests.global_network_policies(), false),
        ("StagedGlobalNetworkPolicy", manifests.staged_global_network_policies(), true),
    ] {
        for object in objects {
            let tier = calico::tier_of(&object.value.spec.tier);
            tiers.check(tier, object.at().key("spec").key("tier"), &mut object.reporter(problems));
            let spec = &object.value.spec;
            let is_alone = !names_services(&spec.ingress) && !names_services(&spec.egress);
            let policy = made(object, is_alone, problems, |object, problems| {
                let name = PolicyName::of(kind, object);
                Policy { staged, ..calico::global_network_policy(object, name, services, problems) }
            });
            tiers.add(tier, policy);
        }
    }
    for (kind, objects, staged) in [
        ("NetworkPolicy", manifests.calico_network_policies(), false),
        ("StagedNetworkPolicy", manifests.staged_network_policies(), true),
    ] {
        for object in objects {
            let tier = calico::tier_of(&object.value.spec.tier);
            tiers.check(tier, object.at().key("spec").key("tier"), &mut object.reporter(problems));
            let spec = &object.value.spec;
            let is_alone = !names_services(&spec.ingress) && !names_services(&spec.egress);
            let policy = made(object, is_alone, problems, |object, problems| {
                let name = PolicyName::of(kind, object);
                Policy { staged, ..calico::network_policy(object, name, services, problems) }
            });
            tiers.add(tier, policy);
        }
    }
    for object in manifests.cluster_network_policies() {
        let make = |object: &_, problems: &mut _| {
            let (tier, policy) = cluster_network_policy::cluster_network_policy(object, nodes, problems);
            (tier, Arc::new(policy))
        };
        let is_alone = !cluster_network_policy::names_nodes(&object.value);
        let (tier, policy) = if is_alone { object.made(problems, make).clone() } else { make(object, problems) };
        tiers.add(tier, policy);
    }
    for faulty in manifests.denying() {
        let (tier, policy) = denying::denying(faulty);
        tiers.add(tier, Arc::new(policy));
    }
    tiers
}

/// A policy: made once where all that it says `is_alone` what its object says, else at each load.
fn made<T>(
    object: &Object<T>,
    is_alone: bool,
    problems: &mut Problems,
    make: impl FnOnce(&Object<T>, &mut Problems) -> Policy,
) -> Arc<Policy> {
    if !is_alone {
        return Arc::new(make(object, problems));
    }
    Arc::clone(object.made(problems, |object, problems| Arc::new(make(object, problems))))
}

/// Whether rules stand for the endpoints of services, which are other objects.
fn names_services(rules: &[CalicoRule]) -> bool {
    rules.iter().any(|rule| [&rule.source, &rule.destination].iter().any(|side| side.services.is_some()))
}

/// What a policy is called.
#[derive(Clone, Copy)]
struct PolicyName<'o> {
    kind: &'static str,
    namespace: &'o str,
    name: &'o str,
}

impl<'o> PolicyName<'o> {
    fn of<T>(kind: &'static str, object: &'o Content<T>) -> Self {
        Self { kind, namespace: &object.namespace, name: &object.name }
    }

    fn of_id(id: &'o ObjectId) -> Self {
        Self { kind: id.kind, namespace: &id.namespace, name: &id.name }
    }

    /// A policy without rules of this name.
    fn policy(self, origin: u32) -> Policy {
        let Self { kind, namespace, name } = self;
        let shown = if namespace.is_empty() { format!("{kind}/{name}") } else { format!("{kind}/{namespace}/{name}") };
        // The name breaks ties of order, in byte order; two of one name are told apart by namespace and kind.
        let sort_name = format!("{name}\0{namespace}\0{kind}");
        Policy { name: shown, sort_name, origin, ..Policy::default() }
    }
}
