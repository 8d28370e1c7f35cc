//! Profiles: the manifests' own, and those that Kubernetes and Calico imply.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use weir_policy::{
    PolicyDirection,
    model::{Endpoint, Profile, Rule},
};

use super::{
    labels::{NAMESPACE_PROFILE, SERVICE_ACCOUNT_PROFILE},
    rules::{RuleReader, rules},
};
use crate::{resources::Manifests, text::Problems};

/// Calico's profile of the host endpoints that it makes itself: allows everything.
const DEFAULT_ALLOW: &str = "projectcalico-default-allow";

/// The profiles of the manifests, then those that endpoints name and nobody defines: `kns.NAMESPACE` allows everything,
/// `ksa.NAMESPACE.ACCOUNT` has no rules.
pub(super) fn profiles(
    manifests: &Manifests,
    endpoints: &[Arc<Endpoint>],
    reader: RuleReader<'_>,
    problems: &mut Problems,
) -> Vec<Arc<Profile>> {
    let mut profiles = Vec::new();
    for object in manifests.profiles() {
        let mut report = object.reporter(problems);
        let (spec, at) = (&object.value.spec, object.at().key("spec"));
        profiles.push(Arc::new(Profile {
            name: object.name.to_string(),
            ingress: rules(&spec.ingress, PolicyDirection::Ingress, reader, at, &mut report),
            egress: rules(&spec.egress, PolicyDirection::Egress, reader, at, &mut report),
        }));
    }
    let defined: HashSet<&str> = manifests.profiles().iter().map(|object| object.name.as_ref()).collect();
    let names: BTreeSet<&String> = endpoints.iter().flat_map(|endpoint| &endpoint.profiles).collect();
    let allow = || vec![Rule { number: 1, ..Rule::default() }];
    for name in names.into_iter().filter(|name| !defined.contains(name.as_str())) {
        if name.starts_with(NAMESPACE_PROFILE) || name == DEFAULT_ALLOW {
            profiles.push(Arc::new(Profile { name: name.clone(), ingress: allow(), egress: allow() }));
        } else if name.starts_with(SERVICE_ACCOUNT_PROFILE) {
            profiles.push(Arc::new(Profile { name: name.clone(), ..Profile::default() }));
        }
    }
    profiles
}
