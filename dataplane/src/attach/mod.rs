//! The kernel's side of weir: the trunk, the XDP and tc programs, their links and maps.
//!
//! # Theory
//!
//! *What.* Small programs (`bpf/`) bring packets to the workers' AF_XDP sockets and back:
//!
//! | program | on | does |
//! |---|---|---|
//! | `workload_send` | tc ingress of each workload's host end | carries what was handed over ([`crate::offload`]); of the rest writes the device's index into the destination MAC, redirects to weir0 |
//! | `trunk_receive` | XDP of weir1 | gives everything to the socket of its queue |
//! | `trunk_deliver` | tc ingress of weir0 | gives what weir sends to the device in the source MAC, else to the node's kernel |
//! | `host_send` | tc egress of weir0 | carries what was handed over of what the node sends to pods; of the rest writes into the destination MAC whether the node made it or only forwards it |
//! | `loopback_send` | tc egress of lo | redirects what the node's processes send to node ports and host ports of the node itself to weir0 |
//! | `device_take` | tc ingress of each device of the kernel's own that has addresses | redirects what is for node ports and host ports of the node to weir0, as forwarded by it |
//! | `answer_send` | tc egress of these and of uplinks | redirects answers of the node's servers to what weir has translated to weir0 (bpf/node.h) |
//! | `uplink_receive` | XDP of each uplink | gives what weir owns to the socket of its queue, leaves the rest to the kernel |
//! | `uplink_carry` | tc ingress of each uplink, where flows are handed over | gives packets of such flows, which `uplink_receive` leaves to the kernel's GRO, to their pods |
//! | `uplink_take` | tc ingress of an uplink, in place of both ([`UplinkHook::Tc`]) | carries what was handed over; gives the rest of what weir owns to the sockets of the trunk, as `workload_send` does |
//!
//! *Encoding.* A frame that a worker receives on the trunk has the destination MAC `02:TT:II:II:II:II` if a workload
//! sent it: TT is the kernel's `pkt_type` (0 to this device, 1 broadcast, 2 multicast, 3 to somebody else), II the
//! device's index, big endian; its source MAC is the workload's. Index 0 says: made by the node itself; the highest bit set, with the index
//! of a device: received by it and only forwarded by the node's kernel. A frame that a worker sends on the trunk has the source MAC `02:00:II:II:II:II`
//! and the workload's MAC as destination, and leaves with the host end's MAC as source. Index 0, or any source MAC that
//! does not begin with `02:00`, means the node's own kernel; `02:01`, that its answers come back by weir0. [`crate::afxdp::trunk`] is this paragraph as code. Both
//! ends of the trunk have MACs that begin with 06. `tcpdump -i weir0` sees all these frames.
//!
//! *Pins.* All links and maps are pinned in the pin folder. (1) When the process ends, however it ends, everything
//! stays attached and only the sockets go: pods are closed, owned traffic is dropped, the rest of the node's traffic
//! passes. (2) The next process adopts maps with their contents and replaces the programs in their links, without a
//! packet between old and new. (3) [`detach`] takes all off. Pins are named by device index, so a pin folder belongs to
//! one network namespace; it remembers which, and a lock keeps a second process out.
//!
//! *At once.* A tc link costs an RCU grace period under the kernel's lock for devices: some 10 ms, in which no other device changes, and all
//! of that in series where many pods come at once. A classic tc filter costs none, but others can remove it or come before it. So
//! a new workload may get its program as a filter first ([`Attachment::adopt_workload_at_once`]) and its link when there is time
//! ([`Attachment::link_next`]); the filter goes once the link is there. A filter lies on the device itself, so it stays when the process
//! ends; the next one gives the device its link.
//!
//! *Namespaces.* Everything here acts in the network namespace of the calling thread: use an [`Attachment`] from
//! threads of one namespace only. `ip netns exec` gives a process a mount namespace of its own, in which pins would die
//! with the process: enter with `nsenter --net=/run/netns/NAME`. A container needs the machine's /sys/fs/bpf mounted
//! into it for the same reason.
//!
//! *Limits.* MTUs up to [`crate::frame::MAX_MTU`]. The XDP programs are loaded as ones that know packets of several
//! buffers (`xdp.frags`): all headers lie in the first, which is all that they read. Others are refused where the MTU is
//! larger than a buffer (on a veth 3506). XDP does not see a VLAN tag that the NIC has taken off, so the NIC is told not to (tags.rs). A veth does
//! what its other end does: a VLAN device there must have `txvlan off` on the end that it lies on, or the uplink be taken at tc.
//!
//! # References
//! Linux: net/core/filter.c (bpf_redirect_peer), drivers/net/veth.c, net/xdp/xskmap.c, kernel/bpf/tcx.c.

mod counters;
mod error;
mod filter;
mod maps;
mod offload;
mod own_devices;
mod owned;
mod pins;
mod tags;
mod tools;
mod trunk;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, MapError, PerCpuArray, XskMap},
    programs::{Program, ProgramError, SchedClassifier, TcAttachType, Xdp},
    util::KernelVersion,
};
use nix::{
    errno::Errno,
    net::if_::{if_indextoname, if_nametoindex},
};
use tracing::{info, warn};
use weir_packet::Mac;

pub use self::{
    counters::{Counter, Counters},
    error::AttachError,
    maps::MAX_OWN_PORTS,
    offload::{KernelKeys, OffloadMaps},
    owned::{Owned, WrongEntry, wrong_entries},
    trunk::{KERNEL_END, KERNEL_END_MAC, ROUTER_END, ROUTER_END_MAC, Trunk},
};
use self::{
    error::map_error,
    maps::{MAX_WORKLOADS, WorkloadEntry},
    owned::OwnedMaps,
    pins::Pins,
    tags::LeftTags,
    trunk::Link,
};
use crate::frame::MAX_MTU;

const TRUNK_RECEIVE: &str = "trunk_receive";
const TRUNK_DELIVER: &str = "trunk_deliver";
const WORKLOAD_SEND: &str = "workload_send";
const HOST_SEND: &str = "host_send";
const LOOPBACK_SEND: &str = "loopback_send";
/// The name of the loopback device is the same everywhere.
const LOOPBACK: &str = "lo";
/// Kinds of devices that hand an XDP program on to those below them, where it gets the queues of each of them, and no socket is the master's.
const MASTERS: [&str; 2] = ["bond", "team"];
const UPLINK_RECEIVE: &str = "uplink_receive";
const UPLINK_CARRY: &str = "uplink_carry";
const UPLINK_TAKE: &str = "uplink_take";

/// How the trunk is to be, and where the pins are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrunkSettings {
    /// Queues of the trunk: one per worker.
    pub queues: u32,
    /// MTU of the trunk in bytes: the largest of the workloads' and the uplinks'.
    pub mtu: u32,
    /// Flows that the kernel may have at a time, if any.
    pub flows: Option<u32>,
    /// The pin folder, on a BPF file system; below /sys/fs/bpf it is mounted where it is not.
    pub pin_dir: PathBuf,
}

/// A device with AF_XDP sockets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SocketDevice {
    /// [`ROUTER_END`].
    Trunk,
    /// An attached uplink by its index.
    Uplink(u32),
}

/// Where what weir owns is taken from an uplink.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UplinkHook {
    /// In the driver, before the kernel makes a packet of a frame. The fastest way to workers.
    Xdp,
    /// Where the kernel has received the packet; it goes to the workers by the trunk. Any Ethernet device can do that, and one that copies
    /// each packet for XDP's sake (a veth) carries flows in the kernel faster so.
    Tc,
}

/// How a program is attached, and why so.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModeReport {
    /// The device's name.
    pub device: String,
    /// The program.
    pub program: &'static str,
    /// The mode, a word.
    pub mode: &'static str,
    /// Why this one.
    pub reason: String,
}

/// What [`detach`] has removed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DetachReport {
    /// Names of the pins, which were links and maps.
    pub pins: Vec<String>,
    /// Names of the devices.
    pub devices: Vec<&'static str>,
}

impl DetachReport {
    /// Whether there was nothing to remove.
    pub fn is_empty(&self) -> bool {
        self.pins.is_empty() && self.devices.is_empty()
    }
}

/// weir's hold on the kernel. Dropping it leaves all in place but the lock: see the module's theory.
pub struct Attachment {
    pins: Pins,
    trunk: Trunk,
    /// Keeps `workload_send` loaded for workloads to come.
    trunk_object: Ebpf,
    trunk_sockets: XskMap<MapData>,
    workload_map: HashMap<MapData, u32, WorkloadEntry>,
    workloads: BTreeMap<u32, Workload>,
    /// Those that have a filter and no link yet.
    unlinked: BTreeSet<u32>,
    uplinks: BTreeMap<u32, Uplink>,
    kernel_devices: BTreeMap<u32, ModeReport>,
    owned: OwnedMaps,
    counters: PerCpuArray<MapData, u64>,
    offload: Option<OffloadMaps>,
    flows: Option<u32>,
    notes: Vec<String>,
    modes: Vec<ModeReport>,
}

struct Workload {
    name: String,
    peer_elsewhere: bool,
}

struct Uplink {
    /// None: they are the trunk's.
    sockets: Option<XskMap<MapData>>,
    mode: ModeReport,
}

/// How an uplink is to be taken.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Plan {
    Xdp,
    /// By XDP if that can be, else at tc.
    Try,
    /// At tc, for that reason.
    Tc(Cow<'static, str>),
    /// Not as it is wanted: XDP would run in the devices below such a one.
    Refuse(&'static str),
}

/// How an uplink of that kind (as rtnetlink names it; physical ones have none) is to be taken, `wanted` so or as is best. `carries`: whether the
/// kernel carries flows.
fn plan(wanted: Option<UplinkHook>, kind: &str, carries: bool) -> Plan {
    let master = MASTERS.into_iter().find(|master| *master == kind);
    match (wanted, master) {
        (Some(UplinkHook::Xdp), Some(master)) => Plan::Refuse(master),
        (_, Some(master)) => {
            Plan::Tc(format!("a {master} runs XDP in the devices below it, which have other queues").into())
        }
        (Some(UplinkHook::Xdp), None) => Plan::Xdp,
        (Some(UplinkHook::Tc), None) => Plan::Tc("so it is wanted".into()),
        (None, None) if kind == "veth" && carries => {
            Plan::Tc("for XDP a veth copies each packet, also of the flows that the kernel carries".into())
        }
        (None, None) => Plan::Try,
    }
}

impl Attachment {
    /// Makes or adopts the trunk, and attaches its programs. What an earlier process has left attached goes on working
    /// until it is adopted or forgotten: [`Attachment::pinned_workloads`] and [`Attachment::pinned_uplinks`] tell what
    /// that is; devices that are gone are forgotten here.
    ///
    /// # Errors
    /// Where the kernel is too old, the pin folder is not usable or in use, a device or program is refused, or native
    /// XDP is not to be had. What was made until then stays, closed, for the next try or [`detach`].
    pub fn open(settings: TrunkSettings) -> Result<Self, AttachError> {
        check_kernel()?;
        let pins = Pins::open(&settings.pin_dir)?;
        pins.check_namespace()?;
        let trunk = Trunk::ensure(settings.queues, settings.mtu)?;

        let mut notes = Vec::new();
        let mut flows = settings.flows;
        let mut object = maps::load_trunk(&pins, trunk.kernel_end, trunk.mtu, flows)?;
        if let (Some(_), Err(error)) = (flows, classifier(&mut object, WORKLOAD_SEND)) {
            // Workers can carry everything.
            notes.push(format!("no flow is handed over: {}", error::chain(&error)));
            flows = None;
            object = maps::load_trunk(&pins, trunk.kernel_end, trunk.mtu, flows)?;
        }
        let mut identity: Array<_, u64> = maps::take(&mut object, "identity")?;
        identity.set(0, pins::namespace()?, 0).map_err(map_error("identity"))?;

        pins::attach_xdp(
            xdp(&mut object, TRUNK_RECEIVE)?,
            TRUNK_RECEIVE,
            trunk.router_end,
            ROUTER_END,
            &pins.trunk_receive(),
        )?;
        pins::attach_tcx(
            classifier(&mut object, TRUNK_DELIVER)?,
            TRUNK_DELIVER,
            KERNEL_END,
            TcAttachType::Ingress,
            &pins.trunk_deliver(),
        )?;
        pins::attach_tcx(
            classifier(&mut object, HOST_SEND)?,
            HOST_SEND,
            KERNEL_END,
            TcAttachType::Egress,
            &pins.host_send(),
        )?;
        pins::attach_tcx(
            classifier(&mut object, LOOPBACK_SEND)?,
            LOOPBACK_SEND,
            LOOPBACK,
            TcAttachType::Egress,
            &pins.loopback_send(),
        )?;
        // Loaded now, so that it is refused now, not at the first workload.
        classifier(&mut object, WORKLOAD_SEND)?;
        trunk.set_up()?;
        let modes = vec![
            native(ROUTER_END, TRUNK_RECEIVE, &existing(ROUTER_END, trunk.router_end)?)?,
            ModeReport {
                device: KERNEL_END.to_owned(),
                program: TRUNK_DELIVER,
                mode: "tcx",
                reason: "a tc link that can be pinned, first of the device's ingress programs".to_owned(),
            },
            ModeReport {
                device: KERNEL_END.to_owned(),
                program: "-",
                mode: "no-offload",
                reason: "transmit checksum, segmentation and VLAN offload are off: XDP on weir1 sees whole frames only"
                    .to_owned(),
            },
            ModeReport {
                device: LOOPBACK.to_owned(),
                program: LOOPBACK_SEND,
                mode: "tcx",
                reason: "what the node sends to node ports and host ports of its own leaves by no route".to_owned(),
            },
        ];

        let mut attachment = Self {
            trunk,
            trunk_sockets: maps::take_sockets(&mut object)?,
            workload_map: maps::take(&mut object, "workloads")?,
            workloads: BTreeMap::new(),
            unlinked: BTreeSet::new(),
            uplinks: BTreeMap::new(),
            kernel_devices: BTreeMap::new(),
            owned: OwnedMaps::take(&mut object)?,
            counters: maps::take(&mut object, "counters")?,
            offload: flows.map(|flows| OffloadMaps::take(&mut object, flows, &pins)).transpose()?,
            flows,
            notes,
            trunk_object: object,
            modes,
            pins,
        };
        attachment.forget_gone()?;
        Ok(attachment)
    }

    /// The trunk.
    pub fn trunk(&self) -> Trunk {
        self.trunk
    }

    /// Redirects what a workload sends into the trunk, and lets weir send to it. Adopting again checks and renews: the
    /// program is the current one and the link alive afterwards.
    ///
    /// `mac` is that of the host end, the device itself: the source of what the workload gets. `peer_elsewhere` tells
    /// whether the pod's end lies in another network namespace, as a pod's does.
    ///
    /// # Errors
    /// Where the device is gone, the kernel refuses the link, or there are too many workloads. A device that had a link before keeps it, as it
    /// was.
    pub fn adopt_workload(
        &mut self,
        index: u32,
        name: &str,
        mac: Mac,
        peer_elsewhere: bool,
    ) -> Result<(), AttachError> {
        self.take_in(index, name, mac, peer_elsewhere, |attachment| attachment.link(index, name))
    }

    /// The same without the wait for a link, which [`Attachment::link_next`] makes up for: the workload is served and closed all
    /// the same. Where the kernel has no such filters, it gets its link now.
    ///
    /// # Errors
    /// Those of [`Attachment::adopt_workload`].
    pub fn adopt_workload_at_once(
        &mut self,
        index: u32,
        name: &str,
        mac: Mac,
        peer_elsewhere: bool,
    ) -> Result<(), AttachError> {
        if self.workloads.contains_key(&index) && !self.unlinked.contains(&index) {
            return self.adopt_workload(index, name, mac, peer_elsewhere);
        }
        self.take_in(index, name, mac, peer_elsewhere, |attachment| {
            let program = classifier(&mut attachment.trunk_object, WORKLOAD_SEND)?;
            match filter::add(program, WORKLOAD_SEND, name) {
                Ok(()) => attachment.unlinked.insert(index),
                Err(error) => {
                    info!(device = name, %error, "no filter, so it takes a link's time");
                    return attachment.link(index, name);
                }
            };
            Ok(())
        })
    }

    /// Gives a link to one of the workloads that were adopted at once. False: there is none left.
    ///
    /// # Errors
    /// Where the kernel refuses the link: the workload stays with its filter.
    pub fn link_next(&mut self) -> Result<bool, AttachError> {
        let Some(index) = self.unlinked.pop_first() else { return Ok(false) };
        let Some(name) = self.workloads.get(&index).map(|workload| workload.name.clone()) else { return Ok(true) };
        match self.link(index, &name) {
            // It went meanwhile.
            Ok(()) | Err(AttachError::DeviceGone { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Enters a workload and attaches its program.
    fn take_in(
        &mut self,
        index: u32,
        name: &str,
        mac: Mac,
        peer_elsewhere: bool,
        attach: impl FnOnce(&mut Self) -> Result<(), AttachError>,
    ) -> Result<(), AttachError> {
        let gone = || AttachError::DeviceGone { name: name.to_owned(), index };
        if index_of(name) != Some(index) {
            return Err(gone());
        }
        let [a, b, c, d, e, f] = mac.0;
        let entry: WorkloadEntry = [a, b, c, d, e, f, peer_elsewhere.into(), 0];
        let full = |error: MapError| match &error {
            MapError::SyscallError(call) if call.io_error.raw_os_error() == Some(Errno::E2BIG as i32) => {
                let max = MAX_WORKLOADS as usize;
                AttachError::TooMany { what: "workloads", count: max + 1, max }
            }
            _ => map_error("workloads")(error),
        };
        let was_closed = self.workloads.contains_key(&index) || self.pins.workload(index).exists();
        self.workload_map.insert(index, entry, 0).map_err(full)?;
        let attached = attach(self);
        // The kernel finds the device by its name: it must have been the same one.
        if attached.is_err() || index_of(name) != Some(index) {
            // What closed the device before goes on doing so.
            if !was_closed || is_gone(index) {
                self.forget_workload(index)?;
            }
            return attached.and(Err(gone()));
        }
        self.workloads.insert(index, Workload { name: name.to_owned(), peer_elsewhere });
        Ok(())
    }

    /// Attaches a workload's program by a link, and takes a filter off that does the same.
    fn link(&mut self, index: u32, name: &str) -> Result<(), AttachError> {
        let is_there = || index_of(name) == Some(index);
        let pin = self.pins.workload(index);
        let was_pinned = pin.exists();
        if is_there() {
            let program = classifier(&mut self.trunk_object, WORKLOAD_SEND)?;
            pins::attach_tcx(program, WORKLOAD_SEND, name, TcAttachType::Ingress, &pin)?;
        }
        if !is_there() {
            // A link from before is this device's, by whatever name.
            if !was_pinned || is_gone(index) {
                pins::unpin_link(&pin)?;
            }
            return Err(AttachError::DeviceGone { name: name.to_owned(), index });
        }
        self.unlinked.remove(&index);
        if let Err(error) = filter::remove(name) {
            warn!(%error, "it does no harm behind the link");
        }
        Ok(())
    }

    /// Takes a workload's programs and entry away; the device may be gone, or never have been adopted. If it still
    /// exists, what it sends goes to the node's kernel from now on, so forget only devices that are gone or no
    /// workloads.
    ///
    /// # Errors
    /// Where a pin or the map's entry cannot be removed.
    pub fn forget_workload(&mut self, index: u32) -> Result<(), AttachError> {
        self.workloads.remove(&index);
        self.unlinked.remove(&index);
        match self.workload_map.remove(&index) {
            Err(error) if !is_missing(&error) => return Err(map_error("workloads")(error)),
            _ => {}
        }
        pins::unpin_link(&self.pins.workload(index))?;
        name_of(index).map_or(Ok(()), |name| filter::remove(&name))
    }

    /// Indexes of all workload devices that have a link, adopted by this process or left by an earlier one.
    ///
    /// # Errors
    /// Where the pin folder cannot be read.
    pub fn pinned_workloads(&self) -> Result<Vec<u32>, AttachError> {
        self.pins.workloads()
    }

    /// Attaches an uplink's programs, or renews them, at `hook`, else where they do best: in the driver, if it runs XDP and does not
    /// copy each packet for that while flows are to be carried in the kernel. Tell [`Attachment::set_owned`] first. For XDP, the device is told
    /// to leave VLAN tags in the frames.
    ///
    /// # Errors
    /// Where the device is gone, is no Ethernet device, has an MTU above [`MAX_MTU`] or a foreign XDP program; where `hook` is
    /// [`UplinkHook::Xdp`], also where it has no native XDP, takes VLAN tags off whatever it is told, or is made of other devices.
    pub fn attach_uplink(
        &mut self,
        index: u32,
        name: &str,
        hook: Option<UplinkHook>,
    ) -> Result<UplinkHook, AttachError> {
        let link = existing(name, index)?;
        if link.mtu > MAX_MTU {
            return Err(AttachError::Mtu { device: name.to_owned(), mtu: link.mtu });
        }
        if !link.is_ethernet {
            return Err(AttachError::NotEthernet { device: name.to_owned() });
        }
        let hook = self.attach_uplink_at(index, name, &link, hook)?;
        // Whatever it was before.
        self.detach_kernel_device(index)?;
        self.attach_answers(index, name)?;
        Ok(hook)
    }

    fn attach_uplink_at(
        &mut self,
        index: u32,
        name: &str,
        link: &Link,
        hook: Option<UplinkHook>,
    ) -> Result<UplinkHook, AttachError> {
        match plan(hook, &link.kind, self.flows.is_some()) {
            Plan::Xdp => self.attach_uplink_xdp(index, name),
            Plan::Tc(reason) => self.attach_uplink_tc(index, name, &reason),
            Plan::Refuse(master) => Err(AttachError::RunsInSlaves { device: name.to_owned(), master }),
            Plan::Try => match self.attach_uplink_xdp(index, name) {
                Err(AttachError::NoNativeMode { .. }) => {
                    self.attach_uplink_tc(index, name, "its driver has no XDP of its own; generic mode is never used")
                }
                Err(AttachError::TakesTagsOff { .. }) => {
                    let reason = "it takes VLAN tags off before XDP could see them, and cannot be told not to (rxvlan)";
                    self.attach_uplink_tc(index, name, reason)
                }
                result => result,
            },
        }
    }

    fn attach_uplink_xdp(&mut self, index: u32, name: &str) -> Result<UplinkHook, AttachError> {
        let leaves_tags = tags::leave_in_frames(name)?;
        let sockets = self.pins.uplink_sockets(index);
        let mut object = maps::load_uplink(&self.pins, &sockets, self.trunk.kernel_end, self.flows)?;
        // The one that carries is there before the other lets flows pass to it. It may come in place of one that takes.
        if self.flows.is_some() {
            let program = classifier(&mut object, UPLINK_CARRY)?;
            pins::attach_tcx(program, UPLINK_CARRY, name, TcAttachType::Ingress, &self.pins.uplink_tc(index))?;
        }
        let program = xdp(&mut object, UPLINK_RECEIVE)?;
        pins::attach_xdp(program, UPLINK_RECEIVE, index, name, &self.pins.uplink_xdp(index))?;
        let mut mode = native(name, UPLINK_RECEIVE, &existing(name, index)?)?;
        if leaves_tags == LeftTags::Now {
            mode.reason.push_str("; it leaves VLAN tags in the frames now, where XDP sees them (rxvlan off)");
        }
        if self.flows.is_none() {
            pins::unpin_link(&self.pins.uplink_tc(index))?;
        }
        self.uplinks.insert(index, Uplink { sockets: Some(maps::take_sockets(&mut object)?), mode });
        Ok(UplinkHook::Xdp)
    }

    fn attach_uplink_tc(&mut self, index: u32, name: &str, reason: &str) -> Result<UplinkHook, AttachError> {
        let sockets = self.pins.trunk_sockets();
        let mut object = maps::load_uplink(&self.pins, &sockets, self.trunk.kernel_end, self.flows)?;
        let program = classifier(&mut object, UPLINK_TAKE)?;
        pins::attach_tcx(program, UPLINK_TAKE, name, TcAttachType::Ingress, &self.pins.uplink_tc(index))?;
        pins::unpin_link(&self.pins.uplink_xdp(index))?;
        pins::unpin_map(&self.pins.uplink_sockets(index))?;
        let mode = ModeReport { device: name.to_owned(), program: UPLINK_TAKE, mode: "tcx", reason: reason.to_owned() };
        self.uplinks.insert(index, Uplink { sockets: None, mode });
        Ok(UplinkHook::Tc)
    }

    /// Takes the program off an uplink, attached by this process or left by an earlier one; the device may be gone.
    ///
    /// # Errors
    /// Where a pin cannot be removed.
    pub fn detach_uplink(&mut self, index: u32) -> Result<(), AttachError> {
        self.uplinks.remove(&index);
        pins::unpin_link(&self.pins.uplink_xdp(index))?;
        pins::unpin_link(&self.pins.uplink_tc(index))?;
        pins::unpin_link(&self.pins.uplink_answer(index))?;
        pins::unpin_map(&self.pins.uplink_sockets(index))
    }

    /// Indexes of all uplinks that have a link, attached by this process or left by an earlier one.
    ///
    /// # Errors
    /// Where the pin folder cannot be read.
    pub fn pinned_uplinks(&self) -> Result<Vec<u32>, AttachError> {
        self.pins.uplinks()
    }

    /// Gives a queue's packets to an AF_XDP socket, which must be bound to that device and queue. When the socket is
    /// closed, the kernel ends that by itself. What is taken from an uplink at [`UplinkHook::Tc`] comes by the trunk's.
    ///
    /// # Errors
    /// Where the uplink is not attached, the device has no such queue, or the file descriptor is no AF_XDP socket.
    pub fn register_socket(
        &mut self,
        device: SocketDevice,
        queue: u32,
        socket: BorrowedFd<'_>,
    ) -> Result<(), AttachError> {
        let sockets = match device {
            SocketDevice::Trunk => &mut self.trunk_sockets,
            SocketDevice::Uplink(index) => {
                match &mut self.uplinks.get_mut(&index).ok_or(AttachError::NoUplink(index))?.sockets {
                    Some(sockets) => sockets,
                    None => return Ok(()),
                }
            }
        };
        sockets.set(queue, socket, 0).map_err(map_error("sockets"))
    }

    /// Tells the programs what weir owns. What was owned and stays so is owned at every moment between.
    ///
    /// # Errors
    /// Where something does not fit, or a map cannot be written.
    pub fn set_owned(&mut self, owned: &Owned) -> Result<(), AttachError> {
        self.owned.set(owned)
    }

    /// What the programs have counted.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn counters(&self) -> Result<Counters, AttachError> {
        Counters::read(&self.counters)
    }

    /// What could not be had, and why.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The maps of flows in the kernel, once, where there are to be any.
    pub fn take_offload(&mut self) -> Option<OffloadMaps> {
        self.offload.take()
    }

    /// How the programs are attached and why: the trunk's, the uplinks', the kernel's own devices', and those workloads that are not served the
    /// fastest way.
    pub fn modes(&self) -> Vec<ModeReport> {
        let slow = self.workloads.values().filter(|workload| !workload.peer_elsewhere).map(|workload| ModeReport {
            device: workload.name.clone(),
            program: TRUNK_DELIVER,
            mode: "redirect",
            reason: "its peer is not in another network namespace, as bpf_redirect_peer demands".to_owned(),
        });
        let uplinks = self.uplinks.values().map(|uplink| uplink.mode.clone());
        let kernels = self.kernel_devices.values().cloned();
        self.modes.iter().cloned().chain(uplinks).chain(kernels).chain(slow).collect()
    }

    /// Forgets what an earlier process left on devices that do not exist any longer.
    fn forget_gone(&mut self) -> Result<(), AttachError> {
        for index in self.pins.workloads()?.into_iter().filter(|index| is_gone(*index)) {
            self.forget_workload(index)?;
            info!(index, "forgot a workload device that is gone");
        }
        for index in self.pins.uplinks()?.into_iter().filter(|index| is_gone(*index)) {
            self.detach_uplink(index)?;
            warn!(index, "forgot an uplink that is gone");
        }
        self.forget_kernel_devices()?;
        let entries: Vec<u32> = self.workload_map.keys().collect::<Result<_, _>>().map_err(map_error("workloads"))?;
        for index in entries.into_iter().filter(|index| is_gone(*index)) {
            self.forget_workload(index)?;
        }
        Ok(())
    }
}

/// Takes weir off the node of the calling thread's network namespace: links, maps, pins and the trunk. Doing so again
/// does nothing.
///
/// # Errors
/// Where a router still runs, or something cannot be removed.
pub fn detach(pin_dir: &Path) -> Result<DetachReport, AttachError> {
    let mut report = DetachReport::default();
    if let Some(pins) = Pins::existing(pin_dir)? {
        pins.check_namespace()?;
        report.pins = pins.remove_all()?;
        match fs::remove_dir(pin_dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(AttachError::Pin { path: pin_dir.to_owned(), source });
            }
            _ => {}
        }
    }
    filter::remove_all()?;
    report.devices = trunk::remove()?;
    Ok(report)
}

/// The index of a device of the calling thread's network namespace.
pub fn index_of(name: &str) -> Option<u32> {
    if_nametoindex(name).ok()
}

/// The name of the device with that index.
fn name_of(index: u32) -> Option<String> {
    // nix 0.31 takes the null pointer for success.
    if_indextoname(index).ok()?.into_string().ok().filter(|name| !name.is_empty())
}

/// Whether no device of the calling thread's network namespace has that index. Any other error is no proof of that, and
/// taking a link off a device that lives would open it.
pub fn is_gone(index: u32) -> bool {
    match if_indextoname(index) {
        // nix 0.31 takes the null pointer for success.
        Ok(name) => name.is_empty(),
        Err(errno) => matches!(errno, Errno::ENXIO | Errno::ENODEV),
    }
}

fn check_kernel() -> Result<(), AttachError> {
    let oldest = KernelVersion::new(6, 6, 0);
    match KernelVersion::current() {
        Ok(version) if version < oldest => {
            let code = version.code();
            Err(AttachError::KernelTooOld { version: format!("{}.{}", code >> 16, code >> 8 & 0xff) })
        }
        // A version that cannot be read is no reason to give up: an old kernel refuses the links.
        _ => Ok(()),
    }
}

/// The device of that name, which must have that index.
fn existing(name: &str, index: u32) -> Result<Link, AttachError> {
    let found = trunk::link(name)?.filter(|link| link.index == index);
    found.ok_or_else(|| AttachError::DeviceGone { name: name.to_owned(), index })
}

/// The report of a program that was attached in native mode; the kernel must agree.
fn native(device: &str, program: &'static str, link: &Link) -> Result<ModeReport, AttachError> {
    if !link.native_xdp {
        return Err(AttachError::NoNativeMode { device: device.to_owned() });
    }
    Ok(ModeReport {
        device: device.to_owned(),
        program,
        mode: "native",
        reason: "the driver runs XDP itself; generic mode is never used".to_owned(),
    })
}

/// A program of a loaded object, given to the kernel at its first use.
fn xdp<'a>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Xdp, AttachError> {
    let program: &mut Xdp = program(object, name).try_into().map_err(refused(name))?;
    loaded(program.load(), name)?;
    Ok(program)
}

fn classifier<'a>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, AttachError> {
    let program: &mut SchedClassifier = program(object, name).try_into().map_err(refused(name))?;
    loaded(program.load(), name)?;
    Ok(program)
}

fn program<'a>(object: &'a mut Ebpf, name: &str) -> &'a mut Program {
    object.program_mut(name).expect("the objects carry the programs that they were built with")
}

fn loaded(result: Result<(), ProgramError>, name: &'static str) -> Result<(), AttachError> {
    match result {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(error) => Err(refused(name)(error)),
    }
}

fn refused(object: &'static str) -> impl Fn(ProgramError) -> AttachError {
    move |source| AttachError::Load { object, source: Box::new(source.into()) }
}

fn is_missing(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(call) => call.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xdp_is_for_devices_whose_queues_are_their_own() {
        let is_tc = |plan: &Plan, why: &str| matches!(plan, Plan::Tc(reason) if reason.contains(why));
        for carries in [false, true] {
            for master in MASTERS {
                for wanted in [None, Some(UplinkHook::Tc)] {
                    let plan = plan(wanted, master, carries);
                    assert!(is_tc(&plan, "the devices below it") && is_tc(&plan, master), "{plan:?}");
                }
                assert_eq!(plan(Some(UplinkHook::Xdp), master, carries), Plan::Refuse(master));
            }
            for kind in ["", "veth", "vlan", "bridge", "bonding"] {
                assert_eq!(plan(Some(UplinkHook::Xdp), kind, carries), Plan::Xdp);
                assert!(is_tc(&plan(Some(UplinkHook::Tc), kind, carries), "wanted"));
                let best = plan(None, kind, carries);
                assert!(if kind == "veth" && carries { is_tc(&best, "copies") } else { best == Plan::Try }, "{kind}");
            }
        }
    }
}
