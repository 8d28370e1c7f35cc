//! How packets on the trunk say whose they are.
//!
//! A trunk is one veth pair for all workloads. The tc programs at its kernel end put a workload's device index into the MAC address that
//! has no other use there: on the way to weir the destination, on the way back the source (the workload's side of a veth has one
//! destination only, and the tc programs write the MAC addresses that the workload expects).
//!
//! | direction | field | bytes |
//! |---|---|---|
//! | to weir | destination MAC | 0x02, pkt_type (0 host, 1 broadcast, 2 multicast, 3 other), device index as big-endian u32 |
//! | from weir | source MAC | 0x02, 0, device index as big-endian u32 |
//! | from weir, translated for a server of the node | source MAC | 0x02, 1, 0 |
//!
//! Index 0 is the node itself: a process of its network namespace made the packet. With the highest bit set the index is that of the device
//! by which the node's kernel has received what it only forwards ([`IfIndex::forwarded`]). What comes with another destination has met no
//! program, so nobody knows who made it. From weir such an index hands a packet to the kernel as one that it has received by that device,
//! an uplink. The trunk's own MAC addresses do not begin with 0x02, so that the two cannot be confused.

use weir_packet::Mac;

use crate::frame::{IfIndex, LinkType};

/// First byte of an address that carries a device index: locally administered, unicast.
const MARK: u8 = 0x02;

/// Whose packet has this destination MAC address, and how it was addressed on the workload's own device.
#[inline]
pub fn origin(destination: Mac) -> (IfIndex, LinkType) {
    let [MARK, packet_type @ 0..=3, a, b, c, d] = destination.0 else {
        return (IfIndex::FORWARDED_BY_UNKNOWN, LinkType::Host);
    };
    let link = match packet_type {
        0 => LinkType::Host,
        1 => LinkType::Broadcast,
        2 => LinkType::Multicast,
        _ => LinkType::Other,
    };
    (IfIndex(u32::from_be_bytes([a, b, c, d])), link)
}

/// The source MAC address that sends a packet to this workload's device.
#[inline]
pub fn target(device: IfIndex) -> Mac {
    let [a, b, c, d] = device.0.to_be_bytes();
    Mac([MARK, 0, a, b, c, d])
}

/// The source MAC address of what weir has translated for a server of the node, whose answers then come back by the trunk: the programs
/// remember who asked (`bpf/node.h`).
pub const ANSWERED: Mac = Mac([MARK, 1, 0, 0, 0, 0]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_destination_tells_device_and_link_type() {
        for (name, destination, expected) in [
            ("host", [2, 0, 0, 0, 0, 7], (IfIndex(7), LinkType::Host)),
            ("broadcast", [2, 1, 0, 0, 1, 0], (IfIndex(256), LinkType::Broadcast)),
            ("multicast", [2, 2, 1, 2, 3, 4], (IfIndex(0x0102_0304), LinkType::Multicast)),
            ("other", [2, 3, 0xff, 0xff, 0xff, 0xff], (IfIndex(u32::MAX), LinkType::Other)),
            ("the node itself", [2, 0, 0, 0, 0, 0], (IfIndex::HOST, LinkType::Host)),
            ("forwarded", [2, 0, 0x80, 0, 0, 7], (IfIndex(7).forwarded(), LinkType::Host)),
            ("no packet type", [2, 4, 0, 0, 0, 7], (IfIndex::FORWARDED_BY_UNKNOWN, LinkType::Host)),
            ("no mark", [6, 0, 0, 0, 0, 7], (IfIndex::FORWARDED_BY_UNKNOWN, LinkType::Host)),
            ("no mark, broadcast", [0xff; 6], (IfIndex::FORWARDED_BY_UNKNOWN, LinkType::Host)),
        ] {
            assert_eq!(origin(Mac(destination)), expected, "{name}");
        }
    }

    #[test]
    fn the_source_names_the_device() {
        assert_eq!(target(IfIndex(0x0102_0304)), Mac([2, 0, 1, 2, 3, 4]));
        assert!(!target(IfIndex(u32::MAX)).is_group());
    }
}
