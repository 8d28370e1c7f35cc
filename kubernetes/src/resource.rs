//! What is watched: kinds by their group, and which objects of them.

use std::borrow::Cow;

use weir_cluster::resources::{
    kubernetes::{HEADLESS_LABEL, PROXY_NAME_LABEL},
    live::LiveKind,
};

/// Objects of one kind, as an API server has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The group; empty for the core's.
    pub group: &'static str,
    /// Its version.
    pub version: String,
    /// Its name in paths.
    pub plural: &'static str,
    /// What these are called, where they are not all of them.
    pub part: Option<&'static str>,
    /// Its kind.
    pub kind: &'static str,
    /// Which of them, by labels.
    pub labels: Cow<'static, str>,
    /// Which of them, by fields, where the server knows these.
    pub fields: &'static str,
}

impl Resource {
    fn new(group: &'static str, version: &str, plural: &'static str, kind: &'static str) -> Self {
        Self { group, version: version.to_owned(), plural, part: None, kind, labels: Cow::Borrowed(""), fields: "" }
    }

    /// By what they are known: no two that are watched have the same.
    pub fn key(&self) -> Key {
        (self.group, self.part.unwrap_or(self.plural))
    }

    /// The path of all of them.
    pub fn path(&self) -> String {
        let Self { group, version, plural, .. } = self;
        if group.is_empty() { format!("/api/{version}/{plural}") } else { format!("/apis/{group}/{version}/{plural}") }
    }

    /// The path of those in a namespace; of all of a kind without, and of all where it is empty.
    pub fn path_in(&self, namespace: &str) -> String {
        if namespace.is_empty() {
            return self.path();
        }
        let all = self.path();
        let (start, plural) = all.rsplit_once('/').expect("a path has a slash");
        format!("{start}/namespaces/{namespace}/{plural}")
    }

    /// "GROUP/VERSION".
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// How it is read.
    ///
    /// # Panics
    /// Never for what is listed here.
    pub fn live(&self) -> LiveKind {
        LiveKind::new(self.group, self.kind).expect("what is watched is read")
    }
}

/// A group, and what is watched of it.
pub type Key = (&'static str, &'static str);

/// Services and slices that are for the proxy of that name, or the one without a name.
fn for_proxy(name: Option<&str>) -> String {
    name.map_or_else(|| format!("!{PROXY_NAME_LABEL}"), |name| format!("{PROXY_NAME_LABEL}={name}"))
}

/// What every cluster has.
pub fn always(proxy_name: Option<&str>) -> Vec<Resource> {
    vec![
        Resource::new("", "v1", "nodes", "Node"),
        Resource::new("", "v1", "namespaces", "Namespace"),
        Resource::new("", "v1", "pods", "Pod"),
        Resource {
            labels: for_proxy(proxy_name).into(),
            fields: "spec.clusterIP!=None",
            ..Resource::new("", "v1", "services", "Service")
        },
        Resource { labels: format!("!{HEADLESS_LABEL}").into(), ..slices() },
        Resource::new("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
    ]
}

fn slices() -> Resource {
    Resource::new("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice")
}

/// What is watched once a policy names a service: no proxy serves these, but they have its endpoints.
pub fn headless_slices() -> Resource {
    Resource { part: Some("endpointslices of headless services"), labels: HEADLESS_LABEL.into(), ..slices() }
}

/// What is watched once a policy asks for it.
pub fn service_accounts() -> Resource {
    Resource::new("", "v1", "serviceaccounts", "ServiceAccount")
}

/// A group that a cluster may have.
pub struct Optional {
    /// Its name.
    pub group: &'static str,
    /// The versions that are read, the best first.
    pub versions: &'static [&'static str],
    /// Its resources with their kinds.
    pub resources: &'static [(&'static str, &'static str)],
    /// The group whose presence makes this one superfluous: it has the same objects.
    pub unless: Option<&'static str>,
}

/// Calico's kinds by their names in paths.
const CALICO: &[(&str, &str)] = &[
    ("ippools", "IPPool"),
    ("globalnetworkpolicies", "GlobalNetworkPolicy"),
    ("networkpolicies", "NetworkPolicy"),
    ("tiers", "Tier"),
    ("globalnetworksets", "GlobalNetworkSet"),
    ("networksets", "NetworkSet"),
    ("hostendpoints", "HostEndpoint"),
    ("profiles", "Profile"),
    ("stagedglobalnetworkpolicies", "StagedGlobalNetworkPolicy"),
    ("stagednetworkpolicies", "StagedNetworkPolicy"),
    ("stagedkubernetesnetworkpolicies", "StagedKubernetesNetworkPolicy"),
    ("felixconfigurations", "FelixConfiguration"),
    ("clusterinformations", CLUSTER_INFORMATION),
    ("blockaffinities", "BlockAffinity"),
    ("ipamblocks", "IPAMBlock"),
];

/// The kind that says whether Calico's datastore may be believed.
pub const CLUSTER_INFORMATION: &str = "ClusterInformation";

/// Groups that a cluster may have.
pub const OPTIONAL: &[Optional] = &[
    Optional {
        group: "networking.k8s.io",
        versions: &["v1"],
        resources: &[("servicecidrs", "ServiceCIDR")],
        unless: None,
    },
    Optional {
        group: "policy.networking.k8s.io",
        versions: &["v1beta1", "v1alpha2"],
        resources: &[("clusternetworkpolicies", "ClusterNetworkPolicy")],
        unless: None,
    },
    Optional { group: "crd.projectcalico.org", versions: &["v1"], resources: CALICO, unless: None },
    Optional {
        group: "projectcalico.org",
        versions: &["v3"],
        resources: CALICO,
        unless: Some("crd.projectcalico.org"),
    },
];

impl Optional {
    /// Whether a resource is one of this group's that a cluster may have.
    pub fn has(&self, resource: &Resource) -> bool {
        self.group == resource.group && self.resources.iter().any(|(plural, _)| *plural == resource.plural)
    }

    /// One of its resources.
    pub fn resource(&self, version: &str, plural: &'static str, kind: &'static str) -> Resource {
        Resource::new(self.group, version, plural, kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_watched_is_read() {
        let optional = OPTIONAL.iter().flat_map(|group| {
            group.resources.iter().map(|(plural, kind)| group.resource(group.versions[0], plural, kind))
        });
        for resource in always(None).into_iter().chain([service_accounts(), headless_slices()]).chain(optional) {
            assert_eq!(resource.live().name(), resource.kind, "{resource:?}");
        }
        let always = always(Some("own"));
        assert_eq!(always[0].path(), "/api/v1/nodes");
        assert_eq!(always[3].labels, "service.kubernetes.io/service-proxy-name=own");
        assert_eq!(always[5].path(), "/apis/networking.k8s.io/v1/networkpolicies");
        assert_eq!((always[0].path_in(""), always[0].api_version()), ("/api/v1/nodes".into(), "v1".into()));
        assert_eq!(always[2].path_in("x"), "/api/v1/namespaces/x/pods");
        assert_eq!(always[5].path_in("x"), "/apis/networking.k8s.io/v1/namespaces/x/networkpolicies");
        assert_eq!(always[5].api_version(), "networking.k8s.io/v1");
    }
}
