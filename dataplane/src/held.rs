//! Packets that wait for their next hop's MAC address.
//!
//! Whole but for the Ethernet destination; a few per next hop, and bounded in number and time (RFC 1122, 2.3.2.2: keep at least one).

use std::net::IpAddr;

use weir_packet::Tick;

use crate::frame::{IfIndex, Packet};

/// Packets that may wait for one next hop.
const PER_NEXT_HOP: usize = 16;
/// Packets that may wait in all, per worker.
const CAPACITY: usize = 256;
/// How long a packet waits: 3 s, as long as the kernel tries (three solicitations, one second apart; net.ipv4.neigh.*.mcast_solicit).
pub const PATIENCE: u32 = (3_000_000_000 / Tick::NS) as u32;
/// How long nobody asks again for a next hop (net.ipv4.neigh.*.retrans_time_ms). While the kernel still tries, asking again costs nothing.
const ASK_AGAIN: u32 = (1_000_000_000 / Tick::NS) as u32;

/// A packet that waits.
#[derive(Debug)]
pub struct HeldPacket {
    /// The packet.
    pub packet: Packet,
    /// The device that it leaves by.
    pub device: IfIndex,
    /// Whose MAC address is missing.
    pub next_hop: IpAddr,
    /// Since when.
    pub since: Tick,
}

#[derive(Debug)]
struct Waiting {
    held: HeldPacket,
    /// Whether its next hop was asked for when it came.
    asked: bool,
}

/// A worker's waiting packets, oldest first.
#[derive(Debug)]
pub struct Held {
    packets: Vec<Waiting>,
}

impl Held {
    /// Room for all that may wait, allocated once.
    pub fn new() -> Self {
        Self { packets: Vec::with_capacity(CAPACITY) }
    }

    /// Number of waiting packets.
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Whether one more packet may wait for that next hop.
    pub fn has_room(&self, device: IfIndex, next_hop: IpAddr) -> bool {
        self.packets.len() < CAPACITY && self.waiting_for(device, next_hop).count() < PER_NEXT_HOP
    }

    /// Keeps `held`, for which there is room. Whether somebody must ask for its next hop: nobody has in the last second.
    ///
    /// A question can be lost, and a steady flow has always a packet that waits: that one waits is no reason not to ask.
    pub fn push(&mut self, held: HeldPacket) -> bool {
        let asked = self
            .waiting_for(held.device, held.next_hop)
            .any(|other| other.asked && held.since.since(other.held.since) <= ASK_AGAIN);
        self.packets.push(Waiting { held, asked: !asked });
        !asked
    }

    fn waiting_for(&self, device: IfIndex, next_hop: IpAddr) -> impl Iterator<Item = &Waiting> {
        self.packets.iter().filter(move |waiting| (waiting.held.device, waiting.held.next_hop) == (device, next_hop))
    }

    /// Removes and returns the oldest packet, where it has waited too long ([`PATIENCE`]).
    pub fn take_overdue(&mut self, now: Tick) -> Option<HeldPacket> {
        let oldest = &self.packets.first()?.held;
        (now.since(oldest.since) > PATIENCE).then(|| self.packets.remove(0).held)
    }

    /// Removes and returns the first packet for which `take` says so.
    pub fn take_if(&mut self, take: impl Fn(&HeldPacket) -> bool) -> Option<HeldPacket> {
        let index = self.packets.iter().position(|waiting| take(&waiting.held))?;
        Some(self.packets.remove(index).held)
    }
}

impl Default for Held {
    fn default() -> Self {
        Self::new()
    }
}
