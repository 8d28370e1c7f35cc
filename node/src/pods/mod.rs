//! Pods of this node, made and taken away as container runtimes ask by `weir-cni`.
//!
//! # Theory
//!
//! *What is made.* What Calico makes: a veth pair whose host end has Calico's name for the pod ([`device_name`]) and the MAC address
//! ee:ee:ee:ee:ee:ee, full-length addresses on the pod's end, a default route by 169.254.1.1 and by the host end's link-local address
//! ([`kernel`]).
//!
//! *Closed first.* Both ends are made down, the pod's directly in its namespace. Control attaches weir's program ([`Ask::Close`]) before
//! either comes up, and publishes what knows the pod ([`Ask::Put`]) before the runtime gets its answer, so before a process of
//! the pod runs.
//!
//! *Whose name it is.* A device's name belongs to the pod, and pods of one name follow each other (StatefulSets). A new sandbox of a pod takes
//! name and place; the record of the old one goes at that moment, so its DEL, which may come later, finds nothing to do.
//!
//! *What is kept.* A record per sandbox ([`crate::ipam::record`]). It is there before the device, so there is no device of weir's without
//! one, wherever the process ends; and it is on the disk before the answer. What it says lies in the device's alias as well, so
//! devices explain themselves when the folder is lost. At a start, records and devices are put in agreement ([`keeper`]): a half-made pod, a
//! device that went with its namespace, a sandbox of an earlier boot all give their addresses back.
//!
//! *Threads.* One accepts, one more for each request that is worked at. Requests of one pod or one sandbox wait for each other; others do
//! not, but for the kernel's own lock. None of them is control's, and none is a worker.

mod control;
pub mod keeper;
pub mod kernel;
mod netlink;
mod server;
mod turns;

use std::{fmt, io, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha1::{Digest, Sha1};
use tokio::sync::{mpsc, oneshot};
use weir_kubernetes::speak::Speaker;
use weir_packet::Mac;

pub use self::kernel::KernelError;
use self::{keeper::Keeper, server::Server};

/// The MAC address of every host end, as Calico sets it.
pub const HOST_MAC: Mac = Mac([0xee; 6]);

/// A pod's network as weir made it on this node; one per sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalPod {
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID, where the runtime says it (K8S_POD_UID).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// CNI_CONTAINERID.
    pub sandbox: String,
    /// The inode of its network namespace, as `lsns` shows it, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<u64>,
    /// The host end, see [`device_name`].
    pub device: String,
    /// MAC address of the pod's own end: where weir sends to.
    #[serde(serialize_with = "mac_to_text", deserialize_with = "mac_from_text")]
    pub mac: Mac,
    /// One per family, the pod's first family first.
    pub addresses: Vec<IpAddr>,
}

impl fmt::Display for LocalPod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

fn mac_to_text<S: Serializer>(mac: &Mac, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(mac)
}

fn mac_from_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Mac, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
    text.parse().map_err(serde::de::Error::custom)
}

/// The name of a pod's host end by Calico's rule: "cali" and the first 11 hex digits of SHA-1 of "namespace.name".
pub fn device_name(namespace: &str, name: &str) -> String {
    let digest = Sha1::digest(format!("{namespace}.{name}"));
    let hex: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("cali{}", &hex[..11])
}

/// What the pod side asks of control. Each is answered by its oneshot; control dropping the sender means that the router ends.
#[derive(Debug)]
pub enum Ask {
    /// The pair exists, both ends down. Attach weir's program to it, then answer: from then on it is closed.
    Close {
        /// The host end.
        device: String,
        /// What is wrong where it cannot be closed: then it is taken away.
        answer: oneshot::Sender<Result<(), String>>,
    },
    /// The pod is made, its device is up. It replaces any earlier pod of that namespace and name.
    ///
    /// Answered when snapshot and programs that know its device, MAC and addresses are published and policy is in force: with
    /// the pod's object if that is known within `patience`, else as default deny until the object comes.
    Put {
        /// The pod.
        pod: LocalPod,
        /// How long to wait for its object.
        patience: Duration,
        /// How it is in force.
        answer: oneshot::Sender<InForce>,
    },
    /// The sandbox is being taken away. Nothing happens to a pod of that name that another sandbox has by now.
    Gone {
        /// The pod's namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// The sandbox.
        sandbox: String,
        /// When nothing is sent there any more.
        answer: oneshot::Sender<()>,
    },
    /// Whether a pod is served by its device; without one, whether control is there.
    Serves {
        /// The host end.
        device: Option<String>,
        /// Whether it is adopted and in force.
        answer: oneshot::Sender<bool>,
    },
}

/// How a pod is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InForce {
    /// With its labels and ports.
    WithObject,
    /// Nothing passes until its object comes.
    DeniedUntilObject,
    /// It is not, for this reason: it is taken away again.
    Refused(String),
}

/// What of weir.yaml's `cni` section, and of the node, the pod side needs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This node's name.
    pub node_name: String,
    /// Where `weir-cni` asks; the queue of DELs is beside it.
    pub socket: PathBuf,
    /// The state folder.
    pub state: PathBuf,
    /// For how long an address that was given back is not given again.
    pub cool_down: Duration,
    /// How long an ADD waits for the pod's object.
    pub patience: Duration,
}

/// What can change while the router runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeRanges {
    /// Node.spec.podCIDRs.
    pub pod_cidrs: Vec<IpNet>,
    /// MTU of new pods, in bytes.
    pub mtu: u32,
    /// Addresses that no pod gets: the node's own, and those of pods that another plugin made.
    pub left_out: Vec<IpAddr>,
}

/// Why pods cannot be made at all.
#[derive(Debug, thiserror::Error)]
pub enum PodsError {
    /// The state folder.
    #[error("the state folder {path}: {source}; cni.state in weir.yaml names it", path = .path.display())]
    State {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another router has it.
    #[error("another router uses the state folder {path}: end it, or give this one a folder of its own (cni.state)", path = .path.display())]
    Locked {
        /// Which.
        path: PathBuf,
    },
    /// The socket.
    #[error("the socket {path}: {source}; cni.socket in weir.yaml names it", path = .path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel does not answer.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Something of the machine.
    #[error("{what}: {source}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The pods of this node. Dropping it ends the server; pods stay as they are.
pub struct Pods {
    keeper: Arc<Keeper>,
    _server: Server,
}

impl Pods {
    /// Puts what is kept and what is there in agreement, works off the queue of DELs, and begins to serve. Acts on the network namespace of
    /// the calling thread. Blocks while it does; asks nothing of control until [`Pods::kept`] can be called.
    ///
    /// # Errors
    /// Where the state folder, the socket or the kernel cannot be used.
    pub fn start(settings: Settings, asks: mpsc::Sender<Ask>) -> Result<Self, PodsError> {
        let socket = settings.socket.clone();
        let keeper = Arc::new(Keeper::open(settings, asks)?);
        let server = Server::start(&socket, keeper.clone())?;
        Ok(Self { keeper, _server: server })
    }

    /// The pods that there are, of this process and of those before it, ordered by namespace and name.
    pub fn kept(&self) -> Vec<LocalPod> {
        self.keeper.pods()
    }

    /// By whom pods' addresses are said to the cluster from now on.
    pub fn speak_by(&self, speaker: Arc<Speaker>) {
        self.keeper.speak_by(speaker);
    }

    /// From where addresses come from now on; until it is called first, an ADD is told to try again. Returns whether anything changed.
    pub fn configure(&self, ranges: NodeRanges) -> bool {
        self.keeper.configure(ranges)
    }

    /// For `weir status`: how many pods and addresses there are, what was done, what went wrong last.
    pub fn status(&self) -> serde_json::Value {
        self.keeper.status()
    }

    /// What `weir ipam` shows, see [`crate::ipam::explain`].
    ///
    /// # Errors
    /// Where the state folder cannot be read.
    pub fn explain(&self) -> io::Result<crate::ipam::explain::Report> {
        self.keeper.explain()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_calico_names_them() {
        // printf default.nginx-0 | sha1sum | cut -c1-11
        assert_eq!(device_name("default", "nginx-0"), "calic048fd9a750");
    }
}
