//! What the stages work with that is not theirs: the tables of a turn, and the channel to control.

use std::net::IpAddr;

use weir_nat::Affinity;
use weir_packet::{Mac, Tick};
use weir_sync::Turn;

use crate::{action_log::Logged, frame::IfIndex, offload::Offload, snapshot::Snapshot, tables::Tables};

/// What a burst is judged by.
#[derive(Clone, Copy)]
pub struct Context<'t> {
    /// Services, policy, forwarding.
    pub snapshot: &'t Snapshot,
    /// Connections.
    pub tables: &'t Tables,
    /// Which backends clients had.
    pub affinity: &'t Affinity,
    /// The turn that keeps both alive.
    pub turn: &'t Turn<'t>,
    /// The time.
    pub now: Tick,
    /// Whether a TCP connection may be picked up mid-stream (nf_conntrack_tcp_loose).
    pub tcp_loose: bool,
    /// To whom settled flows are handed over.
    pub offload: Option<&'t Offload>,
}

impl<'t> Context<'t> {
    /// With netfilter's default of `tcp_loose`; flows stay with the workers.
    #[inline]
    pub fn new(
        snapshot: &'t Snapshot,
        tables: &'t Tables,
        affinity: &'t Affinity,
        turn: &'t Turn<'t>,
        now: Tick,
    ) -> Self {
        Self { snapshot, tables, affinity, turn, now, tcp_loose: true, offload: None }
    }
}

/// What a worker asks of, or tells, the control thread.
#[derive(Clone, Debug)]
pub enum Event {
    /// A new connection met a Log rule.
    Logged(Logged),
    /// Packets wait for this neighbour's MAC address.
    Resolve {
        /// The device that it is on.
        device: IfIndex,
        /// Its address.
        address: IpAddr,
    },
    /// A workload whose MAC address was unknown sent a packet.
    Learned {
        /// The workload's device.
        device: IfIndex,
        /// The source address of the packet.
        address: IpAddr,
        /// The source MAC address of the packet.
        mac: Mac,
    },
}
