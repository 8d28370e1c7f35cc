//! Longest-prefix match by binary search over disjoint ranges.
//!
//! Only the first packet of a connection asks for a route, so the table is built for small and exact, not for line rate: nested
//! prefixes are flattened at compile time into disjoint ranges, each with the value of its longest prefix. A lookup is one binary
//! search over the ranges' first addresses. n prefixes make at most 2n + 1 ranges.

use std::marker::PhantomData;

use weir_packet::Address;

/// An immutable map from prefixes to values.
#[derive(Debug, Clone)]
pub struct PrefixMap<A, V> {
    /// First address of each range, ascending; the range ends before the next one's first.
    starts: Vec<u128>,
    /// Index into `values`, or `NONE`, per range.
    ranges: Vec<u32>,
    values: Vec<V>,
    family: PhantomData<A>,
}

const NONE: u32 = u32::MAX;

impl<A: Address, V> PrefixMap<A, V> {
    /// Compiles `entries` of (network address, prefix length, value). Host bits are ignored. Of equal prefixes the first counts.
    pub fn compile(entries: impl IntoIterator<Item = (A, u8, V)>) -> Self {
        let mut values = Vec::new();
        let mut prefixes: Vec<(u128, u128, u32)> = Vec::new();
        for (address, length, value) in entries {
            let host_bits = A::BITS - length.min(A::BITS);
            let mask = if host_bits == 128 { u128::MAX } else { (1u128 << host_bits) - 1 };
            let first = address.to_bits128() & !mask;
            prefixes.push((first, first | mask, values.len() as u32));
            values.push(value);
        }
        // By first address, then outer before inner; a stable sort keeps the first of equals first.
        prefixes.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        prefixes.dedup_by(|later, earlier| (later.0, later.1) == (earlier.0, earlier.1));

        let last = if A::BITS == 128 { u128::MAX } else { (1u128 << A::BITS) - 1 };
        let mut map = Self { starts: vec![0], ranges: vec![NONE], values, family: PhantomData };
        // The prefixes that hold the current position, outermost first: (last address, value).
        let mut open: Vec<(u128, u32)> = Vec::new();
        let close_before = |map: &mut Self, open: &mut Vec<(u128, u32)>, position: u128| {
            while let Some(&(end, _)) = open.last().filter(|(end, _)| *end < position) {
                open.pop();
                map.begin(end + 1, open.last().map_or(NONE, |o| o.1));
            }
        };
        for (first, end, value) in prefixes {
            close_before(&mut map, &mut open, first);
            map.begin(first, value);
            open.push((end, value));
        }
        while let Some((end, _)) = open.pop() {
            if end < last {
                map.begin(end + 1, open.last().map_or(NONE, |o| o.1));
            }
        }
        map
    }

    /// From `start` on the value is `value`. Starts come in ascending order; a later word about the same start replaces an earlier one.
    fn begin(&mut self, start: u128, value: u32) {
        if *self.starts.last().expect("never empty") == start {
            *self.ranges.last_mut().expect("never empty") = value;
        } else {
            self.starts.push(start);
            self.ranges.push(value);
        }
    }

    /// The value of the longest prefix that holds `address`.
    #[inline]
    pub fn get(&self, address: A) -> Option<&V> {
        let bits = address.to_bits128();
        let range = self.starts.partition_point(|start| *start <= bits) - 1;
        self.values.get(self.ranges[range] as usize)
    }
}

impl<A: Address, V> Default for PrefixMap<A, V> {
    fn default() -> Self {
        Self::compile([])
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    /// The dull twin: looks at every prefix.
    fn linear<A: Address>(entries: &[(A, u8, u32)], address: A) -> Option<u32> {
        let holds = |network: A, length: u8| {
            let shift = u32::from(A::BITS - length);
            let cut = |a: A| a.to_bits128().checked_shr(shift).unwrap_or(0);
            cut(network) == cut(address)
        };
        let best = entries.iter().filter(|(n, l, _)| holds(*n, *l)).map(|(_, l, _)| *l).max()?;
        entries.iter().find(|(n, l, _)| *l == best && holds(*n, *l)).map(|(_, _, v)| *v)
    }

    fn agree<A: Address>(entries: Vec<(A, u8, u32)>, probes: &[A]) {
        let map = PrefixMap::compile(entries.clone());
        let edges = entries.iter().flat_map(|(n, l, _)| {
            let host = if *l == 0 && A::BITS == 128 { u128::MAX } else { (1u128 << (A::BITS - l)) - 1 };
            let first = n.to_bits128() & !host;
            [first, first.wrapping_sub(1), first | host, (first | host).wrapping_add(1)].map(A::from_bits128)
        });
        for address in edges.chain(probes.iter().copied()) {
            assert_eq!(map.get(address).copied(), linear(&entries, address), "{address}");
        }
    }

    proptest! {
        #[test]
        fn finds_what_a_scan_finds_ipv4(
            entries in prop::collection::vec((0u32..64, 0u8..=32), 0..24),
            probes in prop::collection::vec(any::<u32>(), 8),
        ) {
            // Few distinct networks, spread over the space, so that prefixes nest and touch.
            let entries: Vec<_> = entries.iter().enumerate().map(|(i, (n, l))| (Ipv4Addr::from_bits(n << 26 | n << 3), *l, i as u32)).collect();
            agree(entries, &probes.into_iter().map(Ipv4Addr::from_bits).collect::<Vec<_>>());
        }

        #[test]
        fn finds_what_a_scan_finds_ipv6(
            entries in prop::collection::vec((0u128..16, 0u8..=128), 0..24),
            probes in prop::collection::vec(any::<u128>(), 8),
        ) {
            let entries: Vec<_> = entries.iter().enumerate().map(|(i, (n, l))| (Ipv6Addr::from_bits(n << 124 | n << 60 | n), *l, i as u32)).collect();
            agree(entries, &probes.into_iter().map(Ipv6Addr::from_bits).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_empty_map_finds_nothing_and_a_default_route_everything() {
        assert_eq!(PrefixMap::<Ipv4Addr, u8>::default().get(Ipv4Addr::LOCALHOST), None);
        let map = PrefixMap::compile([(Ipv6Addr::UNSPECIFIED, 0, 'd')]);
        assert_eq!(map.get(Ipv6Addr::from_bits(u128::MAX)), Some(&'d'));
    }
}
