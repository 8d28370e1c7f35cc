//! Sets of addresses as sorted, disjoint ranges: membership is one binary search in contiguous memory.

use ipnet::IpNet;
use weir_packet::Address;

/// The addresses from `first` to `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct AddressRange<A> {
    first: A,
    last: A,
}

impl<A: Address> AddressRange<A> {
    /// The addresses of `network`, if it is of this family.
    pub(crate) fn of_network(network: &IpNet) -> Option<Self> {
        Some(Self { first: A::from_ip(network.network())?, last: A::from_ip(network.broadcast())? })
    }

    /// `address` alone.
    pub(crate) fn of_address(address: A) -> Self {
        Self { first: address, last: address }
    }
}

/// Sorts `ranges` and merges those that overlap or touch, as [`contains`] needs them.
pub(crate) fn normalize<A: Address>(ranges: &mut Vec<AddressRange<A>>) {
    ranges.sort_unstable();
    ranges.dedup_by(|next, kept| {
        let touches = next.first.to_bits128() <= kept.last.to_bits128().saturating_add(1);
        if touches {
            kept.last = kept.last.max(next.last);
        }
        touches
    });
}

/// Whether `address` is in `ranges`, which are normalized.
#[inline]
pub(crate) fn contains<A: Address>(ranges: &[AddressRange<A>], address: A) -> bool {
    let after = ranges.partition_point(|range| range.first <= address);
    after > 0 && address <= ranges[after - 1].last
}

/// The normalized ranges of the networks of this family.
pub(crate) fn of_networks<A: Address>(networks: &[IpNet]) -> Box<[AddressRange<A>]> {
    let mut ranges = networks.iter().filter_map(AddressRange::of_network).collect();
    normalize(&mut ranges);
    ranges.into_boxed_slice()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().expect("a prefix")).collect()
    }

    #[test]
    fn neighbours_and_duplicates_merge() {
        let ranges =
            of_networks::<Ipv4Addr>(&nets(&["10.0.1.0/24", "10.0.0.0/24", "10.0.0.128/25", "10.0.3.0/24", "fd00::/8"]));
        assert_eq!(ranges.len(), 2);
        for (address, inside) in [
            ("9.255.255.255", false),
            ("10.0.0.0", true),
            ("10.0.1.255", true),
            ("10.0.2.0", false),
            ("10.0.2.255", false),
            ("10.0.3.0", true),
            ("10.0.3.255", true),
            ("10.0.4.0", false),
        ] {
            assert_eq!(contains(&ranges, address.parse().expect("an address")), inside, "{address}");
        }
    }

    #[test]
    fn host_bits_are_ignored_and_edges_of_the_space_hold() {
        let all = of_networks::<Ipv6Addr>(&nets(&["::/0", "fd00::1/64"]));
        assert_eq!(all.len(), 1);
        assert!(contains(&all, Ipv6Addr::UNSPECIFIED) && contains(&all, Ipv6Addr::from_bits(u128::MAX)));
        let one = of_networks::<Ipv4Addr>(&nets(&["255.255.255.255/32", "10.0.0.7/24"]));
        assert!(contains(&one, Ipv4Addr::BROADCAST) && contains(&one, Ipv4Addr::new(10, 0, 0, 1)));
        assert!(!contains::<Ipv4Addr>(&[], Ipv4Addr::BROADCAST));
    }
}
