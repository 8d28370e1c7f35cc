//! Workload devices: adopted when they appear, closed when a pod is made, forgotten when they are gone.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use tracing::{error, info, warn};
use weir_dataplane::{
    attach::AttachError,
    frame::{IfIndex, MAX_MTU},
    model::{Device, Role},
};

use super::{
    Router,
    hands::{Adopted, Hands},
};
use crate::{
    book::{self, Pods},
    kernel::{DeviceTracker, KernelError, Link, RoleRules},
    pods::Ask,
    prepare::Scope,
};

/// How long no pod was made when those that were get their links, and the time between two links: each stops the kernel's work on devices for
/// some 10 ms.
const LINK_QUIET: Duration = Duration::from_secs(1);
const LINK_PAUSE: Duration = Duration::from_millis(50);
/// Devices of the kernel's own that get their two links at once: each takes some 20 ms.
const KERNELS_AT_ONCE: usize = 4;

/// The node's devices, as control deals with them.
pub(super) struct Devices {
    pub(super) roles: RoleRules,
    pub(super) tracker: DeviceTracker,
    /// Adopted workload devices.
    pub(super) adopted: BTreeMap<IfIndex, Adopted>,
    /// Devices of the kernel's own that have programs, by their names.
    pub(super) kernels: BTreeMap<IfIndex, String>,
    /// The largest MTU of a device that there is room for.
    pub(super) max_mtu: u32,
    /// Names and MTUs of those that there is no room for, until it is told of them.
    pub(super) too_large: Vec<(String, u32)>,
    /// When the next of those that were adopted at once gets its link.
    pub(super) link_due: Option<Instant>,
}

impl Router {
    /// Brings attachments up to what the kernel has now. What fails keeps nothing else from being done.
    pub(super) fn follow_devices(&mut self) {
        let own = self.addresses();
        if own != self.own_addresses {
            // Node ports and host ports open on addresses that the node did not have before, and close on those that it has no more.
            self.begin_reload(Scope::LocalPods);
        }
        let all = self.view.all();
        let changes = self.devices.tracker.update(&all, &self.devices.roles);
        for gone in &changes.gone {
            self.learned.retain(|(device, _), _| *device != gone.index);
            if changes.appeared.iter().any(|link| link.index == gone.index) {
                // Another one has its index, or it has another name: its program is attached anew.
                self.devices.adopted.remove(&gone.index);
            } else if self.hands.is_gone(gone.index.0) {
                self.forget(gone.index);
                info!(device = gone.name, "workload device gone");
            } else {
                warn!(
                    device = gone.name,
                    index = gone.index.0,
                    "a device is no workload's any more, by its name or routes; it stays closed"
                );
            }
        }
        self.forget_adopted(&all);
        self.adopt_all(changes.appeared.iter().chain(&changes.altered));
    }

    /// Forgets devices that are gone and were no workloads' by then, or not yet.
    fn forget_adopted(&mut self, all: &[Link]) {
        let followed: BTreeSet<IfIndex> = all.iter().map(|link| link.index).collect();
        // What was adopted a moment ago may not have been followed yet.
        let is_gone = |index: &&IfIndex| !followed.contains(index) && self.hands.is_gone(index.0);
        let gone: Vec<IfIndex> = self.devices.adopted.keys().filter(is_gone).copied().collect();
        for index in gone {
            self.forget(index);
            info!(index = index.0, "a device that was a workload's is gone");
        }
    }

    fn forget(&mut self, index: IfIndex) {
        self.devices.adopted.remove(&index);
        if let Err(error) = self.hands.forget(index.0) {
            self.trouble.note(&error, self.now);
        }
    }

    /// Attaches programs to the devices of the kernel's own that were published, and takes them off those that are none any more.
    pub(super) fn follow_kernel_devices(&mut self) {
        let own = self.links.devices.iter().filter(|device| device.role == Role::Kernel);
        let wanted: BTreeMap<IfIndex, String> =
            own.map(|device| (device.index.received_by(), device.name.clone())).collect();
        let Self { devices: Devices { kernels, .. }, hands, trouble, now, due, .. } = self;
        if *kernels == wanted {
            return;
        }
        // One that became a pod's must not go on as the kernel's; one that is gone leaves its pins.
        let left: Vec<IfIndex> = kernels.keys().filter(|index| !wanted.contains_key(index)).copied().collect();
        for index in left {
            match hands.detach_kernel_device(index.0) {
                Ok(()) => drop(kernels.remove(&index)),
                Err(error) => trouble.note(&error, *now),
            }
        }
        let mut owed: Vec<(IfIndex, String)> =
            wanted.into_iter().filter(|(index, name)| kernels.get(index) != Some(name)).collect();
        let mut is_rest_due = owed.len() > KERNELS_AT_ONCE;
        owed.truncate(KERNELS_AT_ONCE);
        for (index, name) in owed {
            match hands.attach_kernel_device(index.0, &name) {
                Ok(()) => {
                    info!(
                        device = name,
                        index = index.0,
                        "what it receives for ports of this node that are weir's is taken"
                    );
                    kernels.insert(index, name);
                }
                // Gone again already: the next change says so.
                Err(AttachError::DeviceGone { .. }) => is_rest_due = false,
                Err(error) => {
                    is_rest_due = false;
                    error!(device = name, %error, "node ports and host ports are not reached by it");
                    trouble.note(&error, *now);
                }
            }
        }
        // With the next look, as messages wait meanwhile; where something fails, when that is tried again.
        due.changes |= is_rest_due;
    }

    /// Adopts all workload devices that could not be until now.
    pub(super) fn adopt_what_is_left(&mut self) {
        let roles = &self.devices.roles;
        let is_workload = |link: &Link| roles.role(link) == Some(Role::Workload) && link.mac.is_some();
        let workloads: Vec<Link> = self.view.all().into_iter().filter(is_workload).collect();
        self.adopt_all(&workloads);
    }

    /// Attaches workload devices, where what that depends on is not as it was.
    pub(super) fn adopt_all<'l>(&mut self, links: impl IntoIterator<Item = &'l Link>) {
        for link in links {
            match self.adopt(link) {
                // Gone again already: the next change says so.
                Ok(()) | Err(AttachError::DeviceGone { .. }) => {}
                Err(error) => {
                    error!(device = link.name, %error, "the workload cannot be adopted");
                    self.trouble.note(&error, self.now);
                }
            }
        }
    }

    fn adopt(&mut self, link: &Link) -> Result<(), AttachError> {
        // The kernel tells late where the other end is, but those that weir makes are pods'.
        let peer_elsewhere = link.peer_elsewhere || self.pods.as_ref().is_some_and(|pods| pods.own_device(&link.name));
        let facts = Adopted { mac: link.mac, peer_elsewhere, mtu: link.mtu };
        let before = self.devices.adopted.insert(link.index, facts);
        if before == Some(facts) {
            return Ok(());
        }
        // A link costs an RCU grace period, some 10 ms.
        if before.is_none_or(|before| Adopted { mtu: facts.mtu, ..before } != facts) {
            // Where weir makes the pods, one waits for it; what is there at the start has time.
            let at_once = self.serves && self.pods.is_some();
            if at_once {
                self.devices.link_due = Some(self.now + LINK_QUIET);
            }
            if let Err(error) = self.hands.adopt(link.index.0, &link.name, facts, at_once) {
                self.devices.adopted.remove(&link.index);
                return Err(error);
            }
        }
        if link.mtu > self.devices.max_mtu.min(MAX_MTU) {
            self.devices.too_large.push((link.name.clone(), link.mtu));
        } else {
            info!(device = link.name, index = link.index.0, "workload device adopted");
        }
        Ok(())
    }

    /// Tells of devices that are closed for their MTU, once they are: what was published last does not have them.
    pub(super) fn tell_of_too_large(&mut self) {
        let room = self.devices.max_mtu;
        for (device, mtu) in self.devices.too_large.drain(..) {
            if mtu > MAX_MTU {
                error!(device, mtu, "the workload stays closed: weir carries an MTU of at most {MAX_MTU}");
            } else {
                error!(
                    device,
                    mtu,
                    "the workload stays closed: by the devices that it was started with, weir has room for an MTU of at most {room}; start \
                     weir again, or lower the MTU",
                );
            }
        }
    }

    /// Gives a workload that was adopted at once its link.
    pub(super) fn link_next(&mut self) {
        let is_one = self.hands.link_next().unwrap_or_else(|error| {
            error!(%error, "a workload keeps its filter, which serves it but can be removed by others");
            true
        });
        self.devices.link_due = is_one.then(|| self.now + LINK_PAUSE);
    }

    /// Does what the maker of pods asks.
    pub(super) fn asked(&mut self, ask: Ask) {
        self.due.pods = true;
        let Some(book) = self.pods.as_mut().map(Pods::book) else { return };
        let is_new = match ask {
            Ask::Close { device, answer } => return self.hands.ask_for_device(device, answer),
            Ask::Put { pod, patience, answer } => book.put(&pod, patience, answer),
            Ask::Gone { namespace, name, sandbox, answer } => {
                book.gone(&format!("{namespace}/{name}"), &sandbox, answer)
            }
            Ask::Serves { device, answer } => {
                let is_own = |device: &str| self.pods.as_ref().is_some_and(|pods| pods.own_device(device));
                let is_served = |device: &String| is_own(device) && self.is_served(device);
                let _ = answer.send(device.as_ref().is_none_or(is_served));
                return;
            }
        };
        if is_new {
            self.begin_reload(Scope::LocalPods);
        }
    }

    /// Attaches the program to a device that is about to become a pod's, and which may not have been followed yet.
    pub(super) fn close(&mut self, device: &str, link: Result<Option<Link>, KernelError>) -> Result<(), String> {
        let link = link.map_err(|error| error.to_string())?;
        let link = link.ok_or_else(|| format!("there is no device {device} in the router's network namespace"))?;
        let roles = &self.devices.roles;
        if roles.uplinks.contains(device) || roles.trunk.iter().any(|end| end == device) {
            return Err(format!("{device} is no pod's device"));
        }
        let link = Link { peer_elsewhere: true, ..link };
        self.adopt(&link).map_err(|error| error.to_string())
    }

    /// Whether programs and what was published know the device of that name. The device before may still be known by the same name.
    fn is_served(&self, name: &str) -> bool {
        is_served(&*self.hands, &self.devices.adopted, &self.links.devices, name)
    }

    /// Answers for pods that are in force by now.
    pub(super) fn settle_pods(&mut self) {
        let own = self.addresses();
        let Self { pods: Some(pods), loaded, links, devices, hands, .. } = self else { return };
        pods.configure(book::ranges(loaded, links, &own));
        let has_device = |name: &str| is_served(&**hands, &devices.adopted, &links.devices, name);
        if pods.book().settle(&loaded.local_pods, &loaded.undescribed, has_device) {
            self.begin_reload(Scope::LocalPods);
        }
    }

    /// Devices whose other end is in this network namespace too; those of pods that weir makes never are.
    pub(super) fn near_devices(&self) -> BTreeSet<u32> {
        near_devices(&self.view.all(), self.pods.as_ref())
    }
}

/// Devices whose other end is in this network namespace too.
pub(super) fn near_devices(all: &[Link], pods: Option<&Pods>) -> BTreeSet<u32> {
    let is_near = |link: &&Link| !link.peer_elsewhere && !pods.is_some_and(|pods| pods.own_device(&link.name));
    all.iter().filter(is_near).map(|link| link.index.0).collect()
}

fn is_served(hands: &dyn Hands, adopted: &BTreeMap<IfIndex, Adopted>, published: &[Device], name: &str) -> bool {
    hands.index_of(name).map(IfIndex).is_some_and(|index| {
        let is_it = |device: &Device| device.index == index && device.role == Role::Workload;
        adopted.contains_key(&index) && published.iter().any(is_it)
    })
}
