//! What a worker needs of the devices below it. Implemented by the AF_XDP driver and by the memory driver; the worker loop is
//! generic over it, so that a driver costs no indirect call.

use crate::frame::Packet;

/// One of the worker's own places to receive and send: a (device, queue) pair with its four rings. The trunk is port 0,
/// uplinks follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct PortId(pub u8);

impl PortId {
    /// The trunk: all workloads and the node's own kernel.
    pub const TRUNK: Self = Self(0);
}

/// The rings and frames of one worker.
pub trait Driver {
    /// Number of ports, the trunk included.
    fn ports(&self) -> usize;

    /// Appends up to `limit` received packets to `into`, which has the capacity; the number appended. Keeps the fill ring full.
    fn receive(&mut self, port: PortId, into: &mut Vec<Packet>, limit: usize) -> usize;

    /// Sends `packets` in their order and removes from the list what was sent; what the ring had no room for stays in it.
    ///
    /// `packet.device` is the device that it leaves by: an uplink's own index, or on the trunk a workload's or [`crate::frame::IfIndex::HOST`].
    fn transmit(&mut self, port: PortId, packets: &mut Vec<Packet>);

    /// A packet of no bytes with the usual headroom, to be filled; `None` where no frame is free.
    fn allocate(&mut self) -> Option<Packet>;

    /// Takes back the frames of a packet that goes nowhere.
    fn release(&mut self, packet: Packet);
}
