//! What control does to its node.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use weir_cluster::translate::Loaded;
use weir_dataplane::{
    attach::{self, AttachError, Attachment, Owned},
    frame::IfIndex,
    snapshot::Snapshot,
    worker::Shared,
};
use weir_packet::Mac;

use super::{
    inbox::{Message, ask_for_device, look_at_ports},
    verify::ReadMaps,
};
use crate::{
    health::{Check, HealthChecks},
    keeper::Keeper,
    kernel::{Resolver, Wanted},
    offload::Offloader,
};

/// What the adoption of a device depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Adopted {
    pub(super) mac: Option<Mac>,
    pub(super) peer_elsewhere: bool,
    pub(super) mtu: u32,
}

/// What control can do to a node. Nothing here waits for others: what takes long is begun, and its end is a message.
pub(super) trait Hands: Send {
    /// Attaches the program to a workload's device: by a link, or `at_once` by a filter that gets its link later.
    ///
    /// # Errors
    /// Where the kernel refuses.
    fn adopt(&mut self, index: u32, name: &str, facts: Adopted, at_once: bool) -> Result<(), AttachError>;
    /// Gives one that was adopted at once its link; whether there was one.
    ///
    /// # Errors
    /// Where the kernel refuses.
    fn link_next(&mut self) -> Result<bool, AttachError>;
    /// Forgets a device that is gone.
    ///
    /// # Errors
    /// Where a map or a pin cannot be removed.
    fn forget(&mut self, index: u32) -> Result<(), AttachError>;
    /// Attaches the programs to a device of the kernel's own, or renews them.
    ///
    /// # Errors
    /// Where the kernel refuses.
    fn attach_kernel_device(&mut self, index: u32, name: &str) -> Result<(), AttachError>;
    /// Takes them off again; the device may be gone.
    ///
    /// # Errors
    /// Where a pin cannot be removed.
    fn detach_kernel_device(&mut self, index: u32) -> Result<(), AttachError>;
    /// The index of a device of that name.
    fn index_of(&self, name: &str) -> Option<u32>;
    /// Whether no device has that index.
    fn is_gone(&self, index: u32) -> bool;
    /// Tells the programs what they take from the node's kernel.
    ///
    /// # Errors
    /// Where a map refuses.
    fn own(&mut self, owned: &Owned) -> Result<(), AttachError>;
    /// What reads back, on another thread, what the programs were told.
    fn read_maps(&self) -> ReadMaps;
    /// Puts a snapshot in force. `near`: devices whose other end is in this network namespace too.
    fn publish(&mut self, next: Arc<Snapshot>, near: BTreeSet<u32>);
    /// Begins to make the kernel's routes and rules these; the end is [`Message::Plumbed`].
    fn plumb(&mut self, wanted: Wanted);
    /// Has health checks answered.
    fn answer_health(&mut self, checks: BTreeMap<SocketAddr, Check>);
    /// Has what is in force kept for the next start.
    fn keep(&mut self, loaded: &Loaded);
    /// Watches these files.
    fn watch(&mut self, files: Vec<PathBuf>);
    /// Makes the kernel ask for a neighbour.
    fn resolve(&mut self, address: IpAddr, device: IfIndex);
    /// Begins to ask for a device that is to be closed; the end is [`Message::ToClose`].
    fn ask_for_device(&mut self, device: String, answer: oneshot::Sender<Result<(), String>>);
    /// Begins to look which ports the node's sockets have; the end is [`Message::Ports`].
    fn look_at_ports(&mut self, range: (u16, u16), has_host_endpoints: bool, looks_at_all: bool);
    /// For `weir status`.
    fn status(&self) -> Map<String, Value>;
}

/// The node itself.
pub(super) struct RealHands {
    pub(super) attachment: Attachment,
    /// The folder of its pins.
    pub(super) pins: PathBuf,
    pub(super) shared: Arc<Shared>,
    pub(super) offload: Option<Offloader>,
    pub(super) health: HealthChecks,
    pub(super) wanted: watch::Sender<Option<Wanted>>,
    pub(super) files: watch::Sender<Vec<PathBuf>>,
    pub(super) resolver: watch::Receiver<Resolver>,
    pub(super) neighbors: mpsc::Sender<(IpAddr, IfIndex)>,
    pub(super) inbox: mpsc::Sender<Message>,
    /// Modes of the sockets, as the status has them.
    pub(super) sockets: Vec<Value>,
    pub(super) keeper: Option<Keeper>,
}

impl Hands for RealHands {
    fn adopt(&mut self, index: u32, name: &str, facts: Adopted, at_once: bool) -> Result<(), AttachError> {
        let (mac, peer_elsewhere) = (facts.mac.unwrap_or_default(), facts.peer_elsewhere);
        if at_once {
            self.attachment.adopt_workload_at_once(index, name, mac, peer_elsewhere)
        } else {
            self.attachment.adopt_workload(index, name, mac, peer_elsewhere)
        }
    }

    fn link_next(&mut self) -> Result<bool, AttachError> {
        self.attachment.link_next()
    }

    fn forget(&mut self, index: u32) -> Result<(), AttachError> {
        self.attachment.forget_workload(index)
    }

    fn attach_kernel_device(&mut self, index: u32, name: &str) -> Result<(), AttachError> {
        self.attachment.attach_kernel_device(index, name)
    }

    fn detach_kernel_device(&mut self, index: u32) -> Result<(), AttachError> {
        self.attachment.detach_kernel_device(index)
    }

    fn index_of(&self, name: &str) -> Option<u32> {
        attach::index_of(name)
    }

    fn is_gone(&self, index: u32) -> bool {
        attach::is_gone(index)
    }

    fn own(&mut self, owned: &Owned) -> Result<(), AttachError> {
        self.attachment.set_owned(owned)
    }

    fn read_maps(&self) -> ReadMaps {
        let pins = self.pins.clone();
        Box::new(move |owned| attach::wrong_entries(&pins, owned))
    }

    fn publish(&mut self, next: Arc<Snapshot>, near: BTreeSet<u32>) {
        if let Some(offload) = &self.offload {
            offload.prepare(&next, &self.shared.tables, near);
        }
        self.shared.snapshot.publish(next);
    }

    fn plumb(&mut self, wanted: Wanted) {
        self.wanted.send_replace(Some(wanted));
    }

    fn answer_health(&mut self, checks: BTreeMap<SocketAddr, Check>) {
        self.health.follow(checks);
    }

    fn keep(&mut self, loaded: &Loaded) {
        if let Some(keeper) = &self.keeper {
            keeper.offer(loaded);
        }
    }

    fn watch(&mut self, files: Vec<PathBuf>) {
        self.files.send_replace(files);
    }

    fn resolve(&mut self, address: IpAddr, device: IfIndex) {
        // Where there is no room, a worker asks again.
        let _ = self.neighbors.try_send((address, device));
    }

    fn ask_for_device(&mut self, device: String, answer: oneshot::Sender<Result<(), String>>) {
        ask_for_device(self.resolver.borrow().clone(), device, answer, self.inbox.clone());
    }

    fn look_at_ports(&mut self, range: (u16, u16), has_host_endpoints: bool, looks_at_all: bool) {
        look_at_ports(range, has_host_endpoints, looks_at_all, self.inbox.clone());
    }

    fn status(&self) -> Map<String, Value> {
        let programs = self.attachment.modes().into_iter().map(
            |mode| json!({"device": mode.device, "program": mode.program, "mode": mode.mode, "reason": mode.reason}),
        );
        let counted: Map<String, Value> = match self.attachment.counters() {
            Ok(counters) => counters.iter().map(|(counter, n)| (format!("{counter:?}"), n.into())).collect(),
            Err(_) => Map::new(),
        };
        let mut status = Map::new();
        status.insert("modes".into(), programs.chain(self.sockets.iter().cloned()).collect());
        status.insert("offload".into(), self.offload.as_ref().map(Offloader::to_json).into());
        status.insert("healthChecks".into(), self.health.status());
        status.insert("programs".into(), counted.into());
        status.insert("state".into(), self.keeper.as_ref().map(Keeper::to_json).into());
        status
    }
}
