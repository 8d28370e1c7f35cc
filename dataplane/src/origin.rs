//! Where a packet came from, which decides what it may do.
//!
//! What comes by the node's kernel is of two kinds. The node's own is what one of its processes (hostNetwork pods among them) made, with an
//! address of the node: only that has the node's privileges. The rest its kernel only forwards, for clients of a VPN, containers of another
//! bridge, whoever asks a port that the kernel translates, a pod that no manifest names yet: that comes from outside, whatever device it came by.
//! The program at the trunk tells which is which ([`crate::afxdp::trunk`]), and the source address.

use weir_packet::DropReason;

use crate::{
    forwarding::{DeviceId, Forwarding, Routed, WorkloadId},
    frame::IfIndex,
    host_endpoints::HostEndpointNumber,
    model::Role,
};

/// Where a packet came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// A workload of this node.
    Workload(WorkloadId),
    /// This node itself.
    Host,
    /// Outside, by way of this node's kernel, which received it by a device of its own and forwards it.
    Forwarded {
        /// That device, [`IfIndex::HOST`] where it is not known.
        by: IfIndex,
    },
    /// Outside, by an uplink, a tunnel included.
    Uplink,
}

impl Origin {
    /// Where packets come from that `device` receives, and the device whose settings count; `None` for a device that is not known, or a
    /// workload's behind which no known workload is.
    ///
    /// What comes by the node's kernel is the node's own only with such a source, see [`Origin::with_source`].
    #[inline]
    pub fn of(device: IfIndex, forwarding: &Forwarding) -> Option<(Self, DeviceId)> {
        if device.is_forwarded() {
            return Some((Self::Forwarded { by: device.received_by() }, forwarding.host_device()));
        }
        let id = forwarding.device_by_index(device)?;
        let known = forwarding.device(id);
        let origin = match known.role {
            Role::Uplink => Self::Uplink,
            Role::Host => Self::Host,
            Role::Workload => Self::Workload(known.workload?),
            Role::Kernel => Self::Forwarded { by: device.received_by() },
        };
        Some((origin, id))
    }

    /// The same for a packet with that source: what has none of the node's addresses is not its own, whoever made it.
    #[inline]
    #[must_use]
    pub fn with_source<A: Routed>(self, source: A, forwarding: &Forwarding) -> Self {
        match self {
            Self::Host if !is_the_nodes(source, forwarding) => Self::Forwarded { by: IfIndex::HOST },
            other => other,
        }
    }

    /// Whether these are one party: packets of a connection that another than its opener sends in its direction open another one.
    pub fn is_as(self, other: Self) -> bool {
        match (self, other) {
            // By another device: the kernel's routing is its own business.
            (Self::Forwarded { .. }, Self::Forwarded { .. }) => true,
            _ => self == other,
        }
    }

    /// Whether a packet may come from there with that source.
    ///
    /// # Errors
    /// Why not.
    #[inline]
    pub fn check_source<A: Routed>(self, source: A, forwarding: &Forwarding) -> Result<(), DropReason> {
        match self {
            Self::Workload(workload) if forwarding.local_workload(source) != Some(workload) => {
                Err(DropReason::SpoofedSource)
            }
            Self::Workload(_) => Ok(()),
            Self::Host if !is_the_nodes(source, forwarding) => Err(DropReason::SpoofedSource),
            Self::Host => Ok(()),
            // Its kernel has translated the source, as what it forwards from outside with such a one it drops itself.
            Self::Forwarded { .. } if forwarding.is_local(source) => Ok(()),
            // Whoever policy takes for a pod must be it, and come from where it is.
            Self::Forwarded { by } if forwarding.is_pods_elsewhere(source, by) => Err(DropReason::SpoofedSource),
            Self::Forwarded { .. } => Ok(()),
            Self::Uplink if forwarding.is_local(source) => Err(DropReason::MartianAddress),
            // Its packets never come from outside (strict reverse path, RFC 3704, 2.2).
            Self::Uplink if forwarding.local_workload(source).is_some() => Err(DropReason::SpoofedSource),
            Self::Uplink => Ok(()),
        }
    }

    /// Whether it has come by the node's kernel.
    #[inline]
    pub fn is_kernels(self) -> bool {
        matches!(self, Self::Host | Self::Forwarded { .. })
    }

    /// Whether it is neither of the node nor of a pod on it.
    #[inline]
    pub fn is_outside(self) -> bool {
        matches!(self, Self::Uplink | Self::Forwarded { .. })
    }

    /// The workload that a packet comes from.
    #[inline]
    pub fn workload(self) -> Option<WorkloadId> {
        if let Self::Workload(workload) = self { Some(workload) } else { None }
    }
}

/// Whether the node itself sends from that address.
#[inline]
fn is_the_nodes<A: Routed>(source: A, forwarding: &Forwarding) -> bool {
    forwarding.is_local(source) || source.is_loopback()
}

/// Where the packets of a connection come from that `device` has opened from `source`; why they may not, where they may not any more.
///
/// # Errors
/// Where the device is gone, or that source does not come from there.
pub fn of_opener<A: Routed>(device: IfIndex, source: A, forwarding: &Forwarding) -> Result<Origin, DropReason> {
    let (origin, _) = Origin::of(device, forwarding).ok_or(DropReason::UnknownDevice)?;
    let origin = origin.with_source(source, forwarding);
    origin.check_source(source, forwarding).map(|()| origin)
}

/// Where a packet came from, with what a host endpoint there has to say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Arrival {
    /// Where it came from.
    pub origin: Origin,
    /// The host endpoint of the uplink or tunnel that it came by, or that the node's own packet leaves by, where that is known otherwise
    /// than by its route.
    pub host_endpoint: Option<HostEndpointNumber>,
}

impl Arrival {
    /// By a device of these tables. What comes through a tunnel arrives by the tunnel's own device, which only a host endpoint for "*"
    /// governs.
    #[inline]
    pub fn by(origin: Origin, device: IfIndex, through_tunnel: bool, forwarding: &Forwarding) -> Self {
        let host_endpoint = if forwarding.host_endpoints().is_empty() {
            None
        } else if through_tunnel {
            forwarding.host_endpoints().everywhere()
        } else {
            forwarding.host_endpoint_at(device)
        };
        Self { origin, host_endpoint }
    }
}
