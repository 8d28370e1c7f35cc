//! What a worker's driver is opened with.

use std::num::NonZeroU32;

use weir_packet::Mac;

use super::{
    error::AfXdpError,
    ring::{MAX_RING_ENTRIES, RingEntries},
    sys::PAGE_BYTES,
};
use crate::frame::{Arena, IfIndex, MAX_FRAMES, MAX_MTU, ONE_FRAME_MTU, frames_of_mtu};

/// Ports have numbers of one byte.
const MAX_PORTS: usize = 256;
/// Bytes before a ring's entries: the kernel's struct xdp_ring with 64-byte cache lines (net/xdp/xsk_queue.h).
const RING_HEADER_BYTES: usize = 320;

/// Entries of the rx and tx rings of a port; powers of two up to [`MAX_RING_ENTRIES`]. A packet takes one for each frame, so a ring
/// holds about as many bytes of long packets as of short ones.
///
/// The fill ring has twice the entries of the rx ring, so that the kernel has frames to receive into while a worker is held up; the
/// completion ring has as many as the tx ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingSizes {
    /// Entries of the rx ring.
    pub rx: u32,
    /// Entries of the tx ring.
    pub tx: u32,
}

impl Default for RingSizes {
    fn default() -> Self {
        Self { rx: 2048, tx: 2048 }
    }
}

impl RingSizes {
    fn fill(self) -> u32 {
        2 * self.rx
    }

    /// Frames that lie in the port's rings at most.
    fn frames(self) -> u32 {
        self.fill() + self.tx
    }
}

/// One queue of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortSettings {
    /// The device's name.
    pub device: String,
    /// The device's index.
    pub index: IfIndex,
    /// The device's MAC address. Not used for the trunk.
    pub mac: Mac,
    /// The queue; the first is 0.
    pub queue: u32,
    /// The sizes of its rings.
    pub sizes: RingSizes,
}

/// All that one worker owns: its queue of the trunk, and its queues of the uplinks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AfXdpSettings {
    /// weir's end of the trunk: port 0.
    pub trunk: PortSettings,
    /// The uplinks: ports 1, 2, and so on, in this order.
    pub uplinks: Vec<PortSettings>,
    /// Frames beyond those that the rings can hold: for the packets in the worker's hands (bursts, and packets that it holds back or makes).
    pub spare_frames: u32,
    /// The largest MTU of these devices. Above [`ONE_FRAME_MTU`] a packet takes several frames and ring entries, which the kernel
    /// must be able to (Linux 6.6).
    pub mtu: u32,
}

impl AfXdpSettings {
    /// Enough spare frames for several bursts and some hundred packets held back, on devices with an MTU of `mtu` at most.
    pub const fn default_spare_frames(mtu: u32) -> u32 {
        1024 * frames_of_mtu(mtu)
    }

    /// Whether packets may take several frames.
    pub fn long_packets(&self) -> bool {
        self.mtu > ONE_FRAME_MTU
    }

    pub(super) fn ports(&self) -> impl Iterator<Item = &PortSettings> {
        std::iter::once(&self.trunk).chain(&self.uplinks)
    }

    /// Frames of the worker's UMEM: with so many, every fill ring can be kept full while every tx ring is full and all spare frames are in use.
    pub fn frames(&self) -> u32 {
        self.ports().fold(self.spare_frames, |sum, port| sum.saturating_add(port.sizes.frames()))
    }

    /// Memory that the driver takes: UMEM, rings, links and free list, in bytes. Nearly all of it is locked. The kernel's own notes come on top,
    /// about 200 bytes for each frame and port.
    pub fn memory_bytes(&self) -> usize {
        let frames = self.frames() as usize;
        let rings: usize = self.ports().map(|port| self.ring_entries(port).bytes()).sum();
        frames * (Arena::BYTES_PER_FRAME + size_of::<u64>()) + rings
    }

    /// The sizes of a port's rings as they are made. libxdp gives the fill and completion rings of all sockets of one UMEM the same sizes,
    /// so those are of the largest port; a smaller one does not use all of its own.
    pub(super) fn ring_entries(&self, port: &PortSettings) -> RingEntries {
        RingEntries {
            fill: self.ports().map(|port| port.sizes.fill()).max().unwrap_or(0),
            completion: self.ports().map(|port| port.sizes.tx).max().unwrap_or(0),
            rx: port.sizes.rx,
            tx: port.sizes.tx,
        }
    }

    /// Frames of the UMEM, after a look at all settings.
    pub(super) fn check(&self) -> Result<NonZeroU32, AfXdpError> {
        if self.uplinks.len() + 1 > MAX_PORTS {
            return Err(AfXdpError::TooManyPorts { ports: self.uplinks.len() + 1 });
        }
        if self.mtu > MAX_MTU {
            return Err(AfXdpError::Mtu { mtu: self.mtu });
        }
        for (number, port) in self.ports().enumerate() {
            // A ring must hold the longest packet whole.
            let least = if self.long_packets() { (MAX_FRAMES as u32).next_power_of_two() } else { 1 };
            for (ring, entries) in [("rx", port.sizes.rx), ("tx", port.sizes.tx)] {
                if !entries.is_power_of_two() || !(least..=MAX_RING_ENTRIES).contains(&entries) {
                    return Err(AfXdpError::RingSize { device: port.device.clone(), ring, entries, least });
                }
            }
            if self.ports().take(number).any(|earlier| earlier.index == port.index && earlier.queue == port.queue) {
                return Err(AfXdpError::QueueTwice { device: port.device.clone(), queue: port.queue });
            }
        }
        // Two rings per port at least, of one entry at least.
        NonZeroU32::new(self.frames()).ok_or(AfXdpError::TooManyPorts { ports: 0 })
    }
}

impl RingEntries {
    /// Memory of the four rings; each begins on a page of its own.
    fn bytes(self) -> usize {
        let ring = |entries: u32, entry_bytes: usize| {
            (RING_HEADER_BYTES + entries as usize * entry_bytes).next_multiple_of(PAGE_BYTES)
        };
        ring(self.fill, 8) + ring(self.completion, 8) + ring(self.rx, 16) + ring(self.tx, 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(device: &str, index: u32, rx: u32, tx: u32) -> PortSettings {
        PortSettings {
            device: device.into(),
            index: IfIndex(index),
            mac: Mac::default(),
            queue: 0,
            sizes: RingSizes { rx, tx },
        }
    }

    #[test]
    fn memory_is_known_before_the_start() {
        let settings = AfXdpSettings {
            trunk: port("weir1", 3, 512, 256),
            uplinks: vec![port("eth0", 2, 64, 64)],
            spare_frames: 128,
            mtu: 1500,
        };
        assert_eq!(settings.check().unwrap().get(), 2 * 512 + 256 + 2 * 64 + 64 + 128);
        let uplink = settings.ring_entries(&settings.uplinks[0]);
        assert_eq!(uplink, RingEntries { fill: 1024, completion: 256, rx: 64, tx: 64 });
        // Trunk: 8,512, 2,368, 8,512 and 4,416 bytes; uplink: 8,512, 2,368, 1,344 and 1,344.
        let ring_pages = (3 + 1 + 3 + 2) + (3 + 1 + 1 + 1);
        assert_eq!(settings.memory_bytes(), 1600 * (2048 + 8 + 8) + ring_pages * 4096);
    }

    #[test]
    fn bad_settings_are_named() {
        let good = AfXdpSettings { trunk: port("weir1", 3, 64, 64), uplinks: vec![], spare_frames: 0, mtu: 1758 };
        assert_eq!(good.check().unwrap().get(), 192);
        let ring = |ring, entries, least| {
            format!("eth0: the {ring} ring cannot have {entries} entries; give a power of two from {least} to 32768")
        };
        for (mtu, uplink, message) in [
            (1758, port("eth0", 2, 100, 64), ring("rx", 100, 1)),
            (1758, port("eth0", 2, 64, 0), ring("tx", 0, 1)),
            (1758, port("eth0", 2, 65536, 64), ring("rx", 65536, 1)),
            (1759, port("eth0", 2, 32, 16), ring("tx", 16, 32)),
            (
                1758,
                port("weir1", 3, 64, 64),
                "queue 0 of weir1 is given twice to one worker; give each queue once".to_owned(),
            ),
            (9217, port("eth0", 2, 64, 64), "the MTU is 9217, but weir carries 9216 at most".to_owned()),
        ] {
            let bad = AfXdpSettings { uplinks: vec![uplink], mtu, ..good.clone() };
            assert_eq!(bad.check().unwrap_err().to_string(), message);
        }
        for (mtu, sizes) in [(1758, 1), (9216, 32)] {
            let least = AfXdpSettings { uplinks: vec![port("eth0", 2, sizes, sizes)], mtu, ..good.clone() };
            assert!(least.check().is_ok(), "{mtu}");
        }
    }
}
