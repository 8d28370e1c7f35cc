//! Packets that wait for their next hop's MAC address.
//!
//! Whole but for the Ethernet destination; a few per next hop, and bounded in number and time (RFC 1122, 2.3.2.2: keep at least one). Where
//! there is no room, who has more packets waiting than the sender of the next one loses his oldest: nobody takes the place from the others.

use std::net::IpAddr;

use weir_packet::Tick;

use crate::frame::{IfIndex, Packet};

/// Packets that may wait for one next hop: more than the 45 fragments of a datagram of 64 KiB (the kernel holds 212,992 bytes, some 100
/// packets; net.ipv4.neigh.*.unres_qlen_bytes).
const PER_NEXT_HOP: usize = 64;
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
    /// The device that it came by.
    pub sender: IfIndex,
    /// The device that it leaves by.
    pub device: IfIndex,
    /// Whose MAC address is missing.
    pub next_hop: IpAddr,
    /// Since when.
    pub since: Tick,
}

/// Whether there is room for one more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Room {
    /// There is.
    Free,
    /// Once that one is taken out, whose sender has more than his share.
    InPlaceOf(usize),
    /// There is not.
    None,
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

    /// Whether one more packet of that sender may wait for that next hop.
    pub fn room(&self, sender: IfIndex, device: IfIndex, next_hop: IpAddr) -> Room {
        let is_for = |waiting: &Waiting| (waiting.held.device, waiting.held.next_hop) == (device, next_hop);
        if self.waiting_for(device, next_hop).count() >= PER_NEXT_HOP {
            self.in_place_of_another(sender, is_for)
        } else if self.packets.len() >= CAPACITY {
            self.in_place_of_another(sender, |_| true)
        } else {
            Room::Free
        }
    }

    /// Among some of the packets: the oldest of the sender who has most of them, if that are more than one more of `sender` would be.
    #[cold]
    fn in_place_of_another(&self, sender: IfIndex, is_among: impl Fn(&Waiting) -> bool) -> Room {
        // Senders meet in a count where there are many; then one of them may lose a place to the other.
        const COUNTS: usize = 256;
        let count_of = |IfIndex(device): IfIndex| device as usize % COUNTS;
        let mut counts = [0_u16; COUNTS];
        for waiting in self.packets.iter().filter(|waiting| is_among(waiting)) {
            counts[count_of(waiting.held.sender)] += 1;
        }
        let most = counts.iter().copied().max().unwrap_or(0);
        if most <= counts[count_of(sender)] + 1 {
            return Room::None;
        }
        let is_his = |waiting: &Waiting| is_among(waiting) && counts[count_of(waiting.held.sender)] == most;
        self.packets.iter().position(is_his).map_or(Room::None, Room::InPlaceOf)
    }

    /// Takes the packet out that [`Room::InPlaceOf`] names.
    pub fn take_out(&mut self, place: usize) -> HeldPacket {
        self.packets.remove(place).held
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
