//! What is kept of a pod's network and of addresses that were given back: one small JSON file each, for people too.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weir_cni::wire::{Attachment, Device, Made};

use crate::pods::{HOST_MAC, LocalPod};

/// Layout of the files. Another one is not read.
pub const VERSION: u32 = 1;

/// How far a pod's network is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Begun. Found at a start, it is taken away: nobody was told that it is there.
    Making,
    /// Complete.
    Made,
}

/// A pod's network: a file of the folder `pods`, named by the attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// [`VERSION`]
    pub version: u32,
    /// How far it is.
    pub phase: Phase,
    /// The name of the network configuration that it is of; empty where it is not known any more.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub network: String,
    /// CNI_IFNAME.
    pub interface: String,
    /// The kernel's boot id (/proc/sys/kernel/random/boot_id): no sandbox outlives its boot.
    pub boot: String,
    /// When it was made, in milliseconds since 1970.
    pub since: u64,
    /// MTU of both ends, in bytes.
    pub mtu: u32,
    /// The pod.
    pub pod: LocalPod,
}

impl Record {
    /// What runtimes call it.
    pub fn attachment(&self) -> Attachment {
        Attachment { sandbox: self.pod.sandbox.clone(), interface: self.interface.clone() }
    }

    /// What a runtime is told.
    pub fn made(&self) -> Made {
        Made {
            host: Device { name: self.pod.device.clone(), mac: HOST_MAC.to_string() },
            pod: Device { name: self.interface.clone(), mac: self.pod.mac.to_string() },
            mtu: self.mtu,
            addresses: self.pod.addresses.clone(),
        }
    }
}

/// An address that was given back: a file of the folder `freed`, named by the address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Freed {
    /// [`VERSION`]
    pub version: u32,
    /// When, in milliseconds since 1970.
    pub at: u64,
    /// The pod that had it, as namespace/name.
    pub pod: String,
    /// Its sandbox.
    pub sandbox: String,
}

/// What addresses come from: the file `node`, for whoever explains them while no router runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeFile {
    /// [`VERSION`]
    pub version: u32,
    /// The node's name.
    pub node_name: String,
    /// The boot that it is of.
    pub boot: String,
    /// The inode of the network namespace that the pods' devices are in.
    pub netns: u64,
    /// The node's ranges.
    pub pod_cidrs: Vec<IpNet>,
    /// Addresses of them that are not given.
    pub left_out: Vec<IpAddr>,
    /// For how long an address is not given again, in milliseconds.
    pub cool_down: u64,
}
