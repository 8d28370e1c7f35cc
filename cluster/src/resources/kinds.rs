//! The kinds of objects that are read, and what an object is that says to be of another one.
//!
//! An apiVersion or a kind with a slip of the pen is no other kind: kubectl refuses such an object ("no matches for kind"), so whoever wrote
//! it finds out, but a folder of manifests has no API server before it. A policy with such a slip is at fault as one is whose rules cannot be
//! read, and denies what it selects.

use super::identity::is_enforced_policy;
use crate::text::{
    Severity,
    problem::{is_near, nearest},
    tree::Node,
};

/// A kind that the contract names.
#[derive(Debug)]
pub(super) struct Kind {
    groups: &'static [&'static str],
    /// The versions that are read, the newest first: they have one schema, and one object may be given in several.
    pub(super) versions: &'static [&'static str],
    pub(super) name: &'static str,
    pub(super) namespaced: bool,
    /// What a field of its spec that weir does not know is: a rule with such a part may let more through than it says. `None` where nearly
    /// all fields are another program's settings, so that only a slip of one that is read is worth a word.
    pub(super) unknown: Option<Severity>,
}

impl Kind {
    /// The group by which its objects are identified.
    pub(super) fn group(&self) -> &'static str {
        self.groups[0]
    }

    pub(super) fn api_version(&self, group: &str) -> String {
        let newest = self.versions[0];
        if group.is_empty() { newest.to_owned() } else { format!("{group}/{newest}") }
    }

    /// Whether a field of its spec that weir does not know is no fault.
    pub(super) fn unknown_is_allowed(&self) -> bool {
        self.unknown != ERROR
    }

    fn is_policy(&self) -> bool {
        is_enforced_policy(self.name)
    }
}

/// The group of Calico's kinds, by which two NetworkPolicies of one name are told apart.
pub(super) const CALICO_GROUP: &str = "projectcalico.org";
const CORE: &[&str] = &[""];
const NETWORKING: &[&str] = &["networking.k8s.io"];
const CALICO: &[&str] = &[CALICO_GROUP, "crd.projectcalico.org"];
const CLUSTER_POLICY: &[&str] = &["policy.networking.k8s.io"];
const V1: &[&str] = &["v1"];
const V3: &[&str] = &["v3"];

const WARNING: Option<Severity> = Some(Severity::Warning);
const ERROR: Option<Severity> = Some(Severity::Error);

const fn kind(
    groups: &'static [&'static str],
    versions: &'static [&'static str],
    name: &'static str,
    namespaced: bool,
    unknown: Option<Severity>,
) -> Kind {
    Kind { groups, versions, name, namespaced, unknown }
}

/// The kinds of the contract (the design, "Contract: the configuration file").
const KINDS: &[Kind] = &[
    kind(CORE, V1, "Node", false, WARNING),
    kind(CORE, V1, "Namespace", false, WARNING),
    kind(CORE, V1, "Pod", true, WARNING),
    kind(CORE, V1, "Service", true, WARNING),
    kind(CORE, V1, "ServiceAccount", true, WARNING),
    kind(&["discovery.k8s.io"], V1, "EndpointSlice", true, WARNING),
    kind(NETWORKING, V1, "NetworkPolicy", true, ERROR),
    kind(NETWORKING, &["v1", "v1beta1"], "ServiceCIDR", false, WARNING),
    kind(CALICO, V3, "IPPool", false, WARNING),
    kind(CALICO, V3, "WorkloadEndpoint", true, WARNING),
    kind(CALICO, V3, "GlobalNetworkPolicy", false, ERROR),
    kind(CALICO, V3, "NetworkPolicy", true, ERROR),
    kind(CALICO, V3, "Tier", false, ERROR),
    kind(CALICO, V3, "GlobalNetworkSet", false, ERROR),
    kind(CALICO, V3, "NetworkSet", true, ERROR),
    kind(CALICO, V3, "HostEndpoint", false, ERROR),
    kind(CALICO, V3, "Profile", false, ERROR),
    kind(CALICO, V3, "StagedGlobalNetworkPolicy", false, ERROR),
    kind(CALICO, V3, "StagedNetworkPolicy", true, ERROR),
    kind(CALICO, V3, "StagedKubernetesNetworkPolicy", true, ERROR),
    kind(CALICO, V3, "FelixConfiguration", false, None),
    kind(CALICO, V3, "ClusterInformation", false, None),
    kind(CALICO, V3, "BlockAffinity", false, None),
    kind(CALICO, V3, "IPAMBlock", false, None),
    kind(CLUSTER_POLICY, &["v1beta1", "v1alpha2"], "ClusterNetworkPolicy", false, ERROR),
];

/// The kind of that name in one of its groups.
pub(super) fn known(group: &str, name: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| kind.name == name && kind.groups.contains(&group))
}

/// The version under which kubectl dumps Calico's kinds.
const CALICO_CRD: (&str, &str) = ("crd.projectcalico.org", "v1");

/// Calico's other kinds: a dump of a healthy cluster has them, and none is a slip of one that is read.
const CALICO_BESIDES: [&str; 15] = [
    "BFDConfiguration",
    "BGPConfiguration",
    "BGPFilter",
    "BGPPeer",
    "CalicoNodeStatus",
    "EgressGatewayPolicy",
    "ExternalNetwork",
    "IPAMConfig",
    "IPAMConfiguration",
    "IPAMHandle",
    "IPReservation",
    "KubeControllersConfiguration",
    "LicenseKey",
    "QoSPolicy",
    "RemoteClusterConfiguration",
];

/// Groups of other systems whose kinds are policy, with these kinds; weir enforces none of it.
const FOREIGN_POLICY: [(&str, &[&str]); 11] = [
    ("policy.networking.k8s.io", &["AdminNetworkPolicy", "BaselineAdminNetworkPolicy"]),
    ("cilium.io", &["CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"]),
    ("crd.antrea.io", &["NetworkPolicy", "ClusterNetworkPolicy"]),
    ("security.antrea.tanzu.vmware.com", &["NetworkPolicy", "ClusterNetworkPolicy"]),
    ("k8s.ovn.org", &["EgressFirewall"]),
    ("network.openshift.io", &["EgressNetworkPolicy"]),
    ("k8s.cni.cncf.io", &["MultiNetworkPolicy"]),
    ("networking.k8s.aws", &["ClusterNetworkPolicy", "ApplicationNetworkPolicy"]),
    ("networking.gke.io", &["FQDNNetworkPolicy"]),
    ("nsx.vmware.com", &["SecurityPolicy"]),
    ("crd.nsx.vmware.com", &["SecurityPolicy"]),
];

/// Kinds that were made a ClusterNetworkPolicy upstream.
const FORERUNNERS: [&str; 2] = ["AdminNetworkPolicy", "BaselineAdminNetworkPolicy"];

/// How many letters of a policy's kind may be wrong. What is further off is a kind of its own.
const SLIP: usize = 3;

/// What an object is, by its apiVersion and kind.
pub(super) enum Recognised {
    /// One of a kind that is read, and the position of its version.
    Known(&'static Kind, u8),
    /// One that is meant as a kind that is read, and is at fault.
    Misnamed(&'static Kind, Slip),
    /// A policy of another system.
    Foreign {
        /// What to do about it.
        help: String,
    },
    /// One that is of no interest, but called nearly as a kind that is read.
    Nearly(&'static str),
    /// One that is of no interest.
    Other,
}

/// Where an object's kind is at fault, and what to write.
pub(super) struct Slip {
    /// Whether it is in `kind`; else in `apiVersion`.
    pub(super) is_in_kind: bool,
    /// What to write.
    pub(super) help: String,
}

/// What `object` is, which says to be a `name` of `api_version`.
pub(super) fn recognise(api_version: &str, name: &str, object: &Node) -> Recognised {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let own_group = || KINDS.iter().filter(|kind| kind.groups.contains(&group));
    if let Some(kind) = own_group().find(|kind| kind.name == name) {
        let known = kind.versions.iter().position(|known| *known == version);
        return match known.or((group, version).eq(&CALICO_CRD).then_some(0)) {
            Some(version) => Recognised::Known(kind, version as u8),
            None => misnamed_version(kind, group),
        };
    }
    if FOREIGN_POLICY.iter().any(|(foreign, kinds)| *foreign == group && kinds.contains(&name)) {
        return foreign(name);
    }
    if CALICO.contains(&group) && CALICO_BESIDES.contains(&name) {
        return Recognised::Other;
    }
    // The kind is right, and the group is not.
    let named = || KINDS.iter().filter(|kind| kind.name == name);
    if let Some(kind) = meant(named(), group, version, object)
        && (kind.is_policy() || is_slip_of(kind, group, version))
    {
        return misnamed_version(kind, kind.group());
    }
    // The kind is not right, and the group at least nearly.
    let near = || KINDS.iter().filter(|kind| kind.is_policy() && is_slip_of_name(kind.name, name));
    if let Some(kind) = meant(near(), group, version, object)
        && (kind.groups.contains(&group) || is_slip_of(kind, group, version))
    {
        let api_version = if kind.groups.contains(&group) { String::new() } else { kind.api_version(kind.group()) };
        let besides = if api_version.is_empty() { api_version } else { format!(", and apiVersion: {api_version}") };
        let help = format!("write kind: {}{besides}", kind.name);
        return Recognised::Misnamed(kind, Slip { is_in_kind: true, help });
    }
    if name.ends_with("NetworkPolicy") && named().next().is_none() {
        return foreign(name);
    }
    match nearest(name, own_group().map(|kind| kind.name)) {
        Some(known) => Recognised::Nearly(known),
        None => Recognised::Other,
    }
}

fn misnamed_version(kind: &'static Kind, group: &str) -> Recognised {
    let help = format!("write apiVersion: {}", kind.api_version(group));
    Recognised::Misnamed(kind, Slip { is_in_kind: false, help })
}

fn foreign(name: &str) -> Recognised {
    let help = if FORERUNNERS.contains(&name) {
        "it became ClusterNetworkPolicy of policy.networking.k8s.io/v1beta1: write that".to_owned()
    } else {
        "what it denies is not denied here: write it as a NetworkPolicy or a ClusterNetworkPolicy too".to_owned()
    };
    Recognised::Foreign { help }
}

/// Whether a group that no kind has, or none at all, is written for one of a kind.
fn is_slip_of(kind: &Kind, group: &str, version: &str) -> bool {
    // "v1" of a kind that the core does not have, "projectcalico.org" without a version, "k8sV1".
    let is_versionless = group.is_empty();
    let written = if is_versionless { version } else { group };
    let is_of_group = |known: &str| known == written || nearest(written, [known]).is_some();
    kind.groups != CORE && (is_versionless || kind.groups.iter().any(|known| is_of_group(known)))
}

/// Whether a kind is written in another case, in the plural, or with a few letters wrong.
fn is_slip_of_name(known: &str, written: &str) -> bool {
    let singular = written.strip_suffix("ies").map(|stem| format!("{stem}y"));
    is_near(singular.as_deref().unwrap_or(written), known, SLIP)
}

/// The kind of several that an object is written for: Calico's policies are told from Kubernetes' by what is in them.
fn meant(
    kinds: impl Iterator<Item = &'static Kind>,
    group: &str,
    version: &str,
    object: &Node,
) -> Option<&'static Kind> {
    let has = |keys: &[&str]| {
        let spec = object.get("spec");
        keys.iter().any(|key| spec.is_some_and(|spec| spec.get(key).is_some()))
    };
    let is_calico = group.contains("calico")
        || version.contains("calico")
        || !has(&["podSelector", "policyTypes"])
            && has(&["selector", "types", "tier", "order", "serviceAccountSelector"]);
    // Among those of one kind, the one of the group that is named.
    let mut kinds: Vec<_> = kinds.collect();
    kinds.sort_by_key(|kind| (!kind.groups.contains(&group), (kind.groups == CALICO) != is_calico));
    kinds.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(api_version: &str, name: &str) -> String {
        match recognise(api_version, name, &Node::null()) {
            Recognised::Known(kind, _) => format!("{} of {}", kind.name, kind.group()),
            Recognised::Misnamed(kind, slip) => {
                format!("no {} of {}: {}", kind.name, kind.group(), if slip.is_in_kind { "kind" } else { "apiVersion" })
            }
            Recognised::Foreign { .. } => "foreign".to_owned(),
            Recognised::Nearly(known) => format!("nearly {known}"),
            Recognised::Other => "other".to_owned(),
        }
    }

    #[test]
    fn a_policy_with_a_slip_is_at_fault_and_one_of_another_system_is_foreign() {
        let kubernetes = "no NetworkPolicy of networking.k8s.io: apiVersion";
        for api_version in [
            "networking.k8s.io",
            "v1",
            "networking.k8s/v1",
            "network.k8s.io/v1",
            "k8sV1",
            "extensions/v1beta1",
            "networking.k8s.io/v1beta1",
            "networking.example/v1",
        ] {
            assert_eq!(seen(api_version, "NetworkPolicy"), kubernetes, "{api_version}");
        }
        for (api_version, name) in [
            ("networking.k8s.io/v1", "NetworkPolicies"),
            ("networking.k8s.io/v1", "networkpolicy"),
            ("networking.k8s.io/v1", "NetwrkPolicy"),
            ("networking.k8s.io/v1", "NetworkPolcies"),
            ("networking.k8s.io", "NetworkPolcy"),
        ] {
            assert_eq!(seen(api_version, name), "no NetworkPolicy of networking.k8s.io: kind", "{api_version} {name}");
        }
        let calico = "no GlobalNetworkPolicy of projectcalico.org: apiVersion";
        for api_version in
            ["projectcalico.org", "projectcalico.org/v1", "projectcalico/v3", "v3", "crd.projectcalico/v1"]
        {
            assert_eq!(seen(api_version, "GlobalNetworkPolicy"), calico, "{api_version}");
        }
        assert_eq!(seen("projectcalico/v3", "NetworkPolicy"), "no NetworkPolicy of projectcalico.org: apiVersion");
        assert_eq!(seen("projectcalico.org", "Tier"), "no Tier of projectcalico.org: apiVersion");
        assert_eq!(seen("v1", "EndpointSlice"), "no EndpointSlice of discovery.k8s.io: apiVersion");
        for (api_version, name) in [
            ("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy"),
            ("policy.networking.k8s.io/v1alpha1", "BaselineAdminNetworkPolicy"),
            ("cilium.io/v2", "CiliumNetworkPolicy"),
            ("cilium.io/v2", "CiliumClusterwideNetworkPolicy"),
            ("crd.antrea.io/v1beta1", "NetworkPolicy"),
            ("crd.antrea.io/v1beta1", "ClusterNetworkPolicy"),
            ("k8s.ovn.org/v1", "EgressFirewall"),
            ("network.openshift.io/v1", "EgressNetworkPolicy"),
            ("k8s.cni.cncf.io/v1beta1", "MultiNetworkPolicy"),
            ("corp.example/v1", "CorpNetworkPolicy"),
        ] {
            assert_eq!(seen(api_version, name), "foreign", "{api_version} {name}");
        }
    }

    #[test]
    fn kinds_of_others_are_of_no_interest() {
        for (api_version, name) in [
            ("serving.knative.dev/v1", "Service"),
            ("kubeflow.org/v1", "Profile"),
            ("apps/v1", "Deployment"),
            ("projectcalico.org/v3", "BGPConfiguration"),
            ("projectcalico.org/v3", "IPAMConfiguration"),
            ("crd.projectcalico.org/v1", "IPAMHandle"),
            ("crd.projectcalico.org/v1", "IPAMConfig"),
            ("cilium.io/v2", "CiliumEndpoint"),
            ("crd.antrea.io/v1beta1", "Tier"),
            ("networking.k8s.io/v1", "Ingress"),
            ("networking.k8s.io/v1", "IngressClass"),
        ] {
            assert_eq!(seen(api_version, name), "other", "{api_version} {name}");
        }
        assert_eq!(seen("projectcalico.org/v3", "HostEndpoints"), "nearly HostEndpoint");
    }
}
