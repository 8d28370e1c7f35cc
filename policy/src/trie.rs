//! A map from every address to a value that is constant over ranges.
//!
//! A trie that consumes 32 bits of the key at each node, which are looked up in a search tree ([`crate::steps`]): one node for all of
//! IPv4, and for IPv6 as many on each way as the longest boundary there needs, where a range of the first 32 bits
//! without boundaries inside ends the search. A lookup's cost grows by the logarithm of the ranges only.
//!
//! Immutable once built, so shared freely between threads.

use crate::steps::StepMap;

/// An address as a number: what a [`RangeMap`] can be asked for.
pub(crate) trait Key: Copy + Into<u128> {
    /// Bits of the type, a multiple of 32.
    const BITS: u32;
    /// The low bits of a number.
    fn from_number(number: u128) -> Self;
    /// The 32 bits that have `below` bits below them.
    fn word(self, below: u32) -> u32;
}

impl Key for u32 {
    const BITS: u32 = 32;
    #[inline]
    fn from_number(number: u128) -> Self {
        number as u32
    }
    #[inline]
    fn word(self, below: u32) -> u32 {
        self >> below
    }
}

impl Key for u128 {
    const BITS: u32 = 128;
    #[inline]
    fn from_number(number: u128) -> Self {
        number
    }
    #[inline]
    fn word(self, below: u32) -> u32 {
        (self >> below) as u32
    }
}

/// Marks the number of a node among values.
const NODE: u32 = 1 << 31;

/// A map from every number of `K::BITS` bits to a `u32` below 2^31.
#[derive(Debug)]
pub(crate) struct RangeMap<K> {
    /// The root is the last.
    nodes: Box<[StepMap]>,
    key: std::marker::PhantomData<K>,
}

impl<K: Key> RangeMap<K> {
    /// From the starts of ranges, ascending from 0, and their values.
    ///
    /// # Panics
    /// Where `intervals` is empty or does not start at 0.
    pub(crate) fn new(intervals: &[(u128, u32)]) -> Self {
        assert!(intervals.first().is_some_and(|(start, _)| *start == 0), "the first range starts at 0");
        let mut nodes = Vec::new();
        let root = node(&mut nodes, intervals, K::BITS - 32);
        nodes.push(root);
        Self { nodes: nodes.into(), key: std::marker::PhantomData }
    }

    /// The value at `key`.
    #[inline]
    pub(crate) fn get(&self, key: K) -> u32 {
        let (mut node, mut below) = (self.nodes.len() - 1, K::BITS - 32);
        loop {
            let value = self.nodes[node].get(key.word(below));
            if value & NODE == 0 {
                return value;
            }
            node = (value & !NODE) as usize;
            below -= 32;
        }
    }

    /// Memory in use.
    pub(crate) fn memory_bytes(&self) -> usize {
        size_of_val(&*self.nodes) + self.nodes.iter().map(StepMap::memory_bytes).sum::<usize>()
    }
}

/// The node for a block of numbers in which all intervals start but the first, which starts at or before it. Nodes below it are added
/// to `nodes`.
fn node(nodes: &mut Vec<StepMap>, intervals: &[(u128, u32)], below: u32) -> StepMap {
    let word = |(start, _): &(u128, u32)| (start >> below) as u32;
    let mut ranges = vec![(0, intervals[0].1)];
    let mut set = |start: u32, value: u32| match ranges.last_mut() {
        Some(last) if last.0 == start => last.1 = value,
        _ => ranges.push((start, value)),
    };
    let mut begin = 1;
    for of_word in intervals[1..].chunk_by(|a, b| word(a) == word(b)) {
        let (start, end) = (word(&of_word[0]), begin + of_word.len());
        let is_aligned = of_word[0].0 & ((1 << below) - 1) == 0;
        if is_aligned && of_word.len() == 1 {
            set(start, of_word[0].1);
        } else {
            let child = node(nodes, &intervals[begin - usize::from(!is_aligned)..end], below - 32);
            set(start, NODE | nodes.len() as u32);
            nodes.push(child);
            if let Some(after) = start.checked_add(1) {
                set(after, intervals[end - 1].1);
            }
        }
        begin = end;
    }
    StepMap::new(&ranges)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expected(intervals: &[(u128, u32)], number: u128) -> u32 {
        intervals[intervals.partition_point(|(start, _)| *start <= number) - 1].1
    }

    fn check<K: Key>(mut starts: Vec<u128>) {
        starts.push(0);
        starts.sort_unstable();
        starts.dedup();
        let intervals: Vec<(u128, u32)> =
            starts.iter().enumerate().map(|(index, start)| (*start, index as u32 / 2)).collect();
        let map = RangeMap::<K>::new(&intervals);
        let max = if K::BITS == 128 { u128::MAX } else { (1 << K::BITS) - 1 };
        let around =
            |start: &u128| [start.saturating_sub(1), *start, start.saturating_add(1), start.saturating_add(70)];
        for number in starts.iter().flat_map(around).chain([max]) {
            let number = number.min(max);
            assert_eq!(map.get(K::from_number(number)), expected(&intervals, number), "{number:#x}");
        }
    }

    #[test]
    fn one_range_is_one_line() {
        let map = RangeMap::<u128>::new(&[(0, 7)]);
        assert_eq!((map.get(0), map.get(u128::MAX)), (7, 7));
        assert_eq!(map.memory_bytes(), 64 + size_of::<StepMap>());
    }

    #[test]
    fn boundaries_at_the_ends_of_words() {
        let word = 1u128 << 32;
        check::<u128>(vec![1, word - 1, word, word + 1, 2 * word, u128::MAX - word, u128::MAX - word + 1, u128::MAX]);
        check::<u128>(vec![word << 32, (word << 32) + word, u128::MAX << 64, (u128::MAX << 64) + 1]);
        check::<u32>(vec![1, u128::from(u32::MAX)]);
    }

    proptest! {
        /// Shifts make starts that have words, or all but a few bits, in common.
        #[test]
        fn both_widths_agree_with_a_search(
            starts in proptest::collection::vec((any::<u128>(), 0u32..128, 0u32..128), 0..30),
        ) {
            check::<u32>(starts.iter().map(|(start, down, _)| (start >> 96) >> (down % 32)).collect());
            check::<u128>(starts.iter().map(|(start, down, up)| start >> down << up).collect());
        }
    }
}
