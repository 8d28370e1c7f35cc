//! Which class an address belongs to, and a point of it.

use std::sync::Arc;

use hashbrown::HashMap;

use crate::{
    exact::ExactMap,
    points::point_key,
    trie::{Key, RangeMap},
};

/// The peer classes of one address family.
///
/// Classes of single addresses (pods) are found by hash ([`ExactMap`]), all others in a [`RangeMap`] in which the single addresses
/// leave no trace, so it stays as small as the CIDRs that rules name.
#[derive(Debug)]
pub(crate) struct AddressClasses<K> {
    exact: ExactMap<K>,
    ranges: Arc<RangeMap<K>>,
    /// What `ranges` was made from.
    coarse: Vec<(u128, u32)>,
    /// [`crate::points::PointClasses::of_pair`].
    points: Arc<HashMap<u64, u32>>,
}

impl<K: Key> AddressClasses<K> {
    /// From the starts of intervals, ascending from 0, and their classes; shares with `previous` what is the same.
    pub(crate) fn new(intervals: &[(u128, u32)], points: Arc<HashMap<u64, u32>>, previous: Option<&Self>) -> Self {
        let mut exact: Vec<(K, u32)> = Vec::with_capacity(intervals.len());
        let mut coarse: Vec<(u128, u32)> = Vec::new();
        for (index, (start, class)) in intervals.iter().enumerate() {
            let single = intervals.get(index + 1).is_some_and(|(next, _)| *next == start + 1);
            if single {
                exact.push((K::from_number(*start), *class));
            } else if coarse.last().is_none_or(|(_, last)| last != class) {
                coarse.push((if coarse.is_empty() { 0 } else { *start }, *class));
            }
        }
        let ranges = match previous.filter(|previous| previous.coarse == coarse) {
            Some(previous) => Arc::clone(&previous.ranges),
            None => Arc::new(RangeMap::new(&coarse)),
        };
        Self { exact: ExactMap::new(&exact), ranges, coarse, points }
    }

    /// The class of an address.
    #[inline]
    pub(crate) fn class(&self, address: K) -> u32 {
        match self.exact.get(address) {
            Some(class) => class,
            None => self.ranges.get(address),
        }
    }

    /// The class of an address of this class with a point.
    #[inline]
    pub(crate) fn point_class(&self, class: u32, point: u32) -> u32 {
        self.points.get(&point_key(class, point)).copied().unwrap_or(0)
    }

    /// Memory in use.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.exact.memory_bytes() + self.ranges.memory_bytes() + self.points.allocation_size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_addresses_at_the_ends_and_between_ranges() {
        let max = u128::from(u32::MAX);
        let classes = AddressClasses::<u32>::new(&[(0, 1), (1, 2), (50, 3), (51, 4), (max, 5)], Arc::default(), None);
        for (address, class) in [(0, 1), (1, 2), (49, 2), (50, 3), (51, 4), (u32::MAX - 1, 4), (u32::MAX, 5)] {
            assert_eq!(classes.class(address), class, "{address}");
        }
    }
}
