//! What can go wrong between weir and the kernel, and what to do about it.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};
use thiserror::Error;
use weir_packet::Protocol;

use crate::frame::MAX_MTU;

/// Why attaching to the kernel, or detaching, failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AttachError {
    /// tcx came with Linux 6.6.
    #[error("weir needs Linux 6.6 or later (tcx links); this kernel is {version}")]
    KernelTooOld {
        /// Its version, as "major.minor".
        version: String,
    },
    /// The trunk's number of queues.
    #[error("the trunk can have 1 to {max} queues, one per worker, not {queues}")]
    Queues {
        /// What was asked for.
        queues: u32,
        /// The largest possible number.
        max: u32,
    },
    /// The MTU is larger than weir carries, or too small for IPv6.
    #[error("{device}: the MTU is {mtu}, but must be 1280 to {MAX_MTU}")]
    Mtu {
        /// The device.
        device: String,
        /// Its MTU in bytes.
        mtu: u32,
    },
    /// Mounting the BPF file system failed.
    #[error("cannot mount the bpf file system at {path}: {source} (root is needed)")]
    MountBpf {
        /// Where.
        path: &'static str,
        /// Why.
        source: nix::Error,
    },
    /// The mount would go with this process, and the pins with the mount.
    #[error(
        "no bpf file system at {path}, and this process has a mount namespace of its own, as under `ip netns exec`: \
         what is pinned would go with it. Enter the network namespace alone: nsenter --net=/run/netns/NAME weir ..."
    )]
    PrivateMounts {
        /// Where it is missing.
        path: &'static str,
    },
    /// The pin folder is an ordinary folder.
    #[error(
        "{path} is not on a bpf file system: choose a folder below /sys/fs/bpf, or mount one (mount -t bpf bpf FOLDER)"
    )]
    NotBpf {
        /// The pin folder.
        path: PathBuf,
    },
    /// Another process holds the pin folder's lock.
    #[error("another weir process uses {path}: stop it first, or give each router a pin folder of its own")]
    InUse {
        /// The pin folder.
        path: PathBuf,
    },
    /// The pins belong to a router of another network namespace.
    #[error("{path} belongs to a router in another network namespace: give each router a pin folder of its own")]
    OtherNamespace {
        /// The pin folder.
        path: PathBuf,
    },
    /// A file or folder of the pin folder could not be made, read or removed.
    #[error("{path}: {source}")]
    Pin {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A tool could not be started.
    #[error("cannot run `{tool}`: {source} (Debian package: {package})")]
    Tool {
        /// Its name.
        tool: &'static str,
        /// The package that has it.
        package: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A tool failed.
    #[error("`{command}`: {message}")]
    ToolFailed {
        /// The whole command.
        command: String,
        /// What it said, or what is wrong with that.
        message: String,
    },
    /// A device has the trunk's name and is not the trunk.
    #[error("the device {name} is not weir's ({why}): rename or delete it")]
    ForeignDevice {
        /// Its name.
        name: &'static str,
        /// How it differs.
        why: String,
    },
    /// A device is not, or no longer, there.
    #[error("no device {name} with index {index} in this network namespace")]
    DeviceGone {
        /// Its name.
        name: String,
        /// Its index.
        index: u32,
    },
    /// A kernel setting could not be read or written.
    #[error("{path}: {source}")]
    Sysctl {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An object was refused.
    #[error("the kernel refuses weir's {object} programs: {}", chain(source))]
    Load {
        /// "trunk" or "uplink".
        object: &'static str,
        /// Why.
        source: Box<EbpfError>,
    },
    /// A map was pinned by a weir with another layout.
    #[error("the pinned map {path} is of another version of weir: run `weir detach` first")]
    Layout {
        /// Its pin.
        path: PathBuf,
    },
    /// The device's driver can run XDP in generic mode only, or not at all.
    #[error(
        "{device}: its driver has no native XDP, and generic mode is never used: use another device (or driver), or take \
         `require` off: without it weir takes packets after the kernel has received them"
    )]
    NoNativeMode {
        /// The device.
        device: String,
    },
    /// Each queue that the other end sends by must have one that XDP receives from.
    #[error(
        "{device} has fewer receive queues than its other end has transmit queues, so it takes no XDP program: `ethtool -L {device} rx N`, \
         or fewer at the other end (`ethtool -L PEER tx N`)"
    )]
    FewerQueues {
        /// The device, a veth.
        device: String,
    },
    /// XDP on a device that is made of others runs in those.
    #[error(
        "{device} is a {master}, which runs XDP in the devices below it: take `require` off: without it weir takes packets after the \
         kernel has received them by {device}"
    )]
    RunsInSlaves {
        /// The device.
        device: String,
        /// What it is.
        master: &'static str,
    },
    /// The device takes VLAN tags off its frames, also after it was told not to.
    #[error(
        "{device} takes VLAN tags off before XDP could see them ({feature} stays on), so the packets of a VLAN would be taken for its own: \
         take `require` off: without it weir takes packets after the kernel has received them"
    )]
    TakesTagsOff {
        /// The device.
        device: String,
        /// The feature, as `ethtool -k` names it.
        feature: &'static str,
    },
    /// A device without Ethernet headers.
    #[error("{device} is no Ethernet device: weir's uplinks have MAC addresses")]
    NotEthernet {
        /// The device.
        device: String,
    },
    /// There is a program on the device already.
    #[error("{device} has an XDP program of somebody else: take it off (ip link set dev {device} xdp off)")]
    Occupied {
        /// The device.
        device: String,
    },
    /// Another reason why a program could not be attached.
    #[error("cannot attach {program} to {device}: {}", chain(source))]
    Attach {
        /// The program.
        program: &'static str,
        /// The device.
        device: String,
        /// Why.
        source: Box<ProgramError>,
    },
    /// A tc filter stays.
    #[error("cannot remove weir's tc filter from {device}: {source} (tc filter del dev {device} ingress)")]
    Filter {
        /// The device.
        device: String,
        /// Why.
        source: io::Error,
    },
    /// A map could not be read or written.
    #[error("the map {name}: {}", chain(source))]
    Map {
        /// Its name.
        name: &'static str,
        /// Why.
        source: Box<MapError>,
    },
    /// More entries than a map holds.
    #[error("{count} {what}: there is room for {max}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there would be.
        count: usize,
        /// How many there can be.
        max: usize,
    },
    /// Ports of a protocol that has none.
    #[error("protocol {0} has no ports that can be owned: only TCP, UDP and SCTP have")]
    Portless(Protocol),
    /// A socket for a device that is not attached.
    #[error("device {0} is not an attached uplink")]
    NoUplink(u32),
}

/// An error and its causes on one line: aya's own texts leave the cause out.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// Names the map in an error.
pub(super) fn map_error(name: &'static str) -> impl Fn(MapError) -> AttachError {
    move |source| AttachError::Map { name, source: Box::new(source) }
}
