//! The labels that things carry: their own, and those of their namespace, service account and profiles.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::resources::{
    Content, List, Manifests, Same,
    calico::policy::Profile,
    kubernetes::{Namespace, ServiceAccount},
    meta::Metadata,
};

pub(super) const NAMESPACE_LABEL: &str = "projectcalico.org/namespace";
pub(super) const ORCHESTRATOR_LABEL: &str = "projectcalico.org/orchestrator";
pub(super) const SERVICE_ACCOUNT_LABEL: &str = "projectcalico.org/serviceaccount";
/// Prefix of labels that come from the namespace, and from the service account.
pub(super) const NAMESPACE_PREFIX: &str = "pcns.";
pub(super) const SERVICE_ACCOUNT_PREFIX: &str = "pcsa.";
const NAME_LABEL: &str = "projectcalico.org/name";
/// The label that the API server gives to every namespace.
const METADATA_NAME_LABEL: &str = "kubernetes.io/metadata.name";
/// Prefix of the profile that stands for a namespace, and of that for "NAMESPACE.ACCOUNT".
pub(super) const NAMESPACE_PROFILE: &str = "kns.";
pub(super) const SERVICE_ACCOUNT_PROFILE: &str = "ksa.";

pub(super) type Labels = BTreeMap<String, String>;

/// The objects that labels are inherited from; equal where none changed, came or went.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Sources {
    namespaces: Vec<Same<Content<Namespace>>>,
    service_accounts: Vec<Same<Content<ServiceAccount>>>,
    profiles: Vec<Same<Content<Profile>>>,
}

/// Labels that things inherit.
pub(super) struct Inherited<'m> {
    namespaces: HashMap<&'m str, &'m Metadata>,
    service_accounts: HashMap<(&'m str, &'m str), &'m Metadata>,
    profiles: HashMap<&'m str, &'m Labels>,
}

impl<'m> Inherited<'m> {
    pub(super) fn new(manifests: &'m Manifests) -> Self {
        let namespaces = manifests.namespaces().iter().map(|object| (object.name.as_ref(), &object.value.metadata));
        let accounts = manifests.service_accounts().iter();
        let accounts =
            accounts.map(|object| ((object.namespace.as_ref(), object.name.as_ref()), &object.value.metadata));
        let profiles = manifests.profiles().iter();
        let profiles = profiles.map(|object| (object.name.as_ref(), &object.value.spec.labels_to_apply));
        Self { namespaces: namespaces.collect(), service_accounts: accounts.collect(), profiles: profiles.collect() }
    }

    /// All that labels are inherited from.
    pub(super) fn sources(manifests: &Manifests) -> Sources {
        fn same<T>(objects: List<'_, T>) -> Vec<Same<Content<T>>> {
            objects.iter().map(|object| Same(Arc::clone(object.content()))).collect()
        }
        Sources {
            namespaces: same(manifests.namespaces()),
            service_accounts: same(manifests.service_accounts()),
            profiles: same(manifests.profiles()),
        }
    }

    /// The labels of a workload: inherited ones first, so that its own win.
    pub(super) fn of_workload(
        &self,
        namespace: &str,
        service_account: &str,
        orchestrator: &str,
        profiles: &[String],
        own: &Labels,
    ) -> Labels {
        let mut labels = Labels::new();
        self.add_namespace(namespace, &mut labels);
        self.add_service_account(namespace, service_account, &mut labels);
        self.add_profiles(profiles, &mut labels);
        labels.extend(own.clone());
        labels.insert(NAMESPACE_LABEL.to_owned(), namespace.to_owned());
        labels.insert(ORCHESTRATOR_LABEL.to_owned(), orchestrator.to_owned());
        labels.insert(SERVICE_ACCOUNT_LABEL.to_owned(), service_account.to_owned());
        labels
    }

    /// The labels of a network set; of one without a namespace, only its own.
    pub(super) fn of_network_set(&self, namespace: Option<&str>, own: &Labels) -> Labels {
        let mut labels = Labels::new();
        if let Some(namespace) = namespace {
            self.add_namespace(namespace, &mut labels);
        }
        labels.extend(own.clone());
        labels.extend(namespace.map(|namespace| (NAMESPACE_LABEL.to_owned(), namespace.to_owned())));
        labels
    }

    /// The labels of a host endpoint, which is in no namespace but may have the profile of one.
    pub(super) fn of_host_endpoint(&self, profiles: &[String], own: &Labels) -> Labels {
        let mut labels = Labels::new();
        self.add_profiles(profiles, &mut labels);
        labels.extend(own.clone());
        labels
    }

    fn add_namespace(&self, namespace: &str, labels: &mut Labels) {
        labels.insert(format!("{NAMESPACE_PREFIX}{METADATA_NAME_LABEL}"), namespace.to_owned());
        add(NAMESPACE_PREFIX, namespace, self.namespaces.get(namespace).copied(), labels);
    }

    fn add_service_account(&self, namespace: &str, name: &str, labels: &mut Labels) {
        add(SERVICE_ACCOUNT_PREFIX, name, self.service_accounts.get(&(namespace, name)).copied(), labels);
    }

    fn add_profiles(&self, profiles: &[String], labels: &mut Labels) {
        for profile in profiles {
            if let Some(given) = self.profiles.get(profile.as_str()) {
                labels.extend((*given).clone());
            } else if let Some(namespace) = profile.strip_prefix(NAMESPACE_PROFILE) {
                self.add_namespace(namespace, labels);
            } else if let Some((namespace, account)) =
                profile.strip_prefix(SERVICE_ACCOUNT_PROFILE).and_then(|account| account.split_once('.'))
            {
                self.add_service_account(namespace, account, labels);
            }
        }
    }
}

fn add(prefix: &str, name: &str, metadata: Option<&Metadata>, labels: &mut Labels) {
    let given = metadata.into_iter().flat_map(|metadata| metadata.labels.iter());
    labels.extend(given.map(|(key, value)| (format!("{prefix}{key}"), value.to_string())));
    labels.insert(format!("{prefix}{NAME_LABEL}"), name.to_owned());
}
