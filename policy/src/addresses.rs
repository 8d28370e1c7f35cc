//! Which class an address belongs to.

use hashbrown::HashMap;

use crate::trie::{Key, RangeMap};

/// The peer classes of one address family.
///
/// Classes of single addresses (pods) are found by hash, all others in a [`RangeMap`] in which the single addresses
/// leave no trace, so it stays as small as the CIDRs that rules name.
#[derive(Debug)]
pub(crate) struct AddressClasses<K> {
    exact: HashMap<K, u32>,
    ranges: RangeMap<K>,
}

impl<K: Key> AddressClasses<K> {
    /// From the starts of intervals, ascending from 0, and their classes, over `bits`-bit addresses.
    pub(crate) fn new(intervals: &[(u128, u32)], bits: u32) -> Self {
        let mut exact = HashMap::new();
        let mut coarse: Vec<(u128, u32)> = Vec::new();
        for (index, (start, class)) in intervals.iter().enumerate() {
            let single = intervals.get(index + 1).is_some_and(|(next, _)| *next == start + 1);
            if single {
                exact.insert(K::from_number(*start), *class);
            } else if coarse.last().is_none_or(|(_, last)| last != class) {
                coarse.push((if coarse.is_empty() { 0 } else { *start }, *class));
            }
        }
        exact.shrink_to_fit();
        Self { exact, ranges: RangeMap::new(&coarse, bits) }
    }

    /// The class of an address.
    #[inline]
    pub(crate) fn class(&self, address: K) -> u32 {
        match self.exact.get(&address) {
            Some(class) => *class,
            None => self.ranges.get(address),
        }
    }

    /// Memory in use.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.exact.allocation_size() + self.ranges.memory_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_addresses_at_the_ends_and_between_ranges() {
        let max = u128::from(u32::MAX);
        let classes = AddressClasses::<u32>::new(&[(0, 1), (1, 2), (50, 3), (51, 4), (max, 5)], 32);
        for (address, class) in [(0, 1), (1, 2), (49, 2), (50, 3), (51, 4), (u32::MAX - 1, 4), (u32::MAX, 5)] {
            assert_eq!(classes.class(address), class, "{address}");
        }
    }
}
