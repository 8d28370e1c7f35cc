//! Pods that this node's own CNI plugin made, as the runtime's requests tell of them: ahead of what the manifests say.
//!
//! The kubelet writes a pod's addresses into its object only once the pod's network is there, so a new pod's device and addresses come from the
//! request, and its labels, ports and service account from its object. What is asked of an object to be a pod's own is said at
//! [`LocalPod::is_described_by`].

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use weir_packet::Mac;

use super::cluster::{has_ended, is_on_host_network};
use crate::resources::{kubernetes::Pod, meta::MIRRORED_UID};

/// A pod of this node as its CNI plugin made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPod {
    /// "namespace/name".
    pub name: String,
    /// metadata.uid of its object, where the runtime tells it.
    pub uid: Option<String>,
    /// The runtime's name for what holds the pod's network: two pods that have one name one after the other have two.
    pub sandbox: String,
    /// The host's end of its veth pair.
    pub device: String,
    /// The MAC address of the pod's own end.
    pub mac: Mac,
    /// At most one of each family.
    pub addresses: Vec<IpAddr>,
}

impl LocalPod {
    /// Whether an object of this pod's name on this node is this pod's, and not an earlier one's that the manifests still show.
    ///
    /// A uid decides. It goes on doing so when the pod terminates or has ended: its network is there until the runtime takes it away, and so
    /// is what its policy says. Where the runtime tells no uid, the object counts unless its pod has ended.
    pub(super) fn is_described_by(&self, object: &Pod) -> bool {
        // The kubelet knows a static pod by another uid than the object that stands for it, and writes the pod's there.
        let mirrored = object.metadata.annotations.get(MIRRORED_UID);
        let is_it = match (&self.uid, mirrored.or(object.metadata.uid.as_ref())) {
            (Some(own), Some(uid)) => **own == **uid,
            _ => !has_ended(object),
        };
        is_it && !is_on_host_network(object)
    }
}

/// All pods that this node's CNI plugin made, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalPods {
    pods: BTreeMap<String, Arc<LocalPod>>,
}

impl LocalPods {
    /// Adds a pod in the place of an earlier one of its name.
    pub fn insert(&mut self, pod: Arc<LocalPod>) {
        self.pods.insert(pod.name.clone(), pod);
    }

    /// Takes the pod of that name out.
    pub fn remove(&mut self, name: &str) {
        self.pods.remove(name);
    }

    /// The pod of a name.
    pub fn get(&self, name: &str) -> Option<&Arc<LocalPod>> {
        self.pods.get(name)
    }

    /// All, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<LocalPod>> {
        self.pods.values()
    }
}
