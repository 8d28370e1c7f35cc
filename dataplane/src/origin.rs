//! Where a packet came from, which decides what it may do.

use crate::{
    forwarding::{Device, Forwarding, WorkloadId},
    frame::IfIndex,
    host_endpoints::HostEndpointNumber,
    model::Role,
};

/// Where a packet came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// A workload of this node.
    Workload(WorkloadId),
    /// This node's own kernel.
    Host,
    /// An uplink, a tunnel included.
    Uplink,
}

impl Origin {
    /// Where packets that `device` receives come from; `None` for a workload device behind which no known workload is.
    #[inline]
    pub fn of(device: &Device) -> Option<Self> {
        match device.role {
            Role::Uplink => Some(Self::Uplink),
            Role::Host => Some(Self::Host),
            Role::Workload => device.workload.map(Self::Workload),
        }
    }
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
            forwarding.device_by_index(device).and_then(|device| forwarding.device(device).host_endpoint)
        };
        Self { origin, host_endpoint }
    }
}
