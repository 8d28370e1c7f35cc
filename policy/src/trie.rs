//! A map from every number of a domain to a value that is constant over ranges.
//!
//! A poptrie without direct pointing (Asai and Ohara, "Poptrie: A Compressed Trie with Population Count for Fast and
//! Scalable Software IP Routing Table Lookup", SIGCOMM 2015): each node consumes six bits of the key. A 64-bit word
//! says which of the 64 slots have a child; another marks where a run of equal leaves starts; population counts below
//! the slot index children and leaves, which lie one after another. A node is 24 bytes, and a lookup visits at most
//! ceil(bits / 6) of them, however many ranges there are: 6 for an IPv4 address, 22 for an IPv6 address (as deep as the
//! longest boundary on the way needs).
//!
//! Leaves hold values for ranges, not prefixes, so no prefix expansion happens outside: the builder takes the sorted
//! starts of the ranges. Immutable once built, so shared freely between threads.

use std::ops::Shl;

/// What a [`RangeMap`] can be asked for.
pub(crate) trait Key: Copy + Eq + std::hash::Hash + Shl<u32, Output = Self> {
    /// Bits of the type.
    const BITS: u32;
    /// The low bits of a number.
    fn from_number(number: u128) -> Self;
    /// The highest six bits.
    fn top_six(self) -> u32;
}

impl Key for u32 {
    const BITS: u32 = 32;
    #[inline]
    fn from_number(number: u128) -> Self {
        number as u32
    }
    #[inline]
    fn top_six(self) -> u32 {
        self >> 26
    }
}

impl Key for u128 {
    const BITS: u32 = 128;
    #[inline]
    fn from_number(number: u128) -> Self {
        number
    }
    #[inline]
    fn top_six(self) -> u32 {
        (self >> 122) as u32
    }
}

/// 64 slots, each a child or a leaf.
#[derive(Clone, Copy, Debug, Default)]
struct Node {
    /// The slots that have a child.
    children: u64,
    /// The leaf slots whose value differs from that of the leaf slot before.
    runs: u64,
    /// Index of the first child.
    first_child: u32,
    /// Index of the value of the first run.
    first_leaf: u32,
}

const _: () = assert!(size_of::<Node>() == 24);

/// A map from every number of at most `K::BITS` bits to a `u32`.
#[derive(Debug)]
pub(crate) struct RangeMap<K> {
    nodes: Box<[Node]>,
    leaves: Box<[u32]>,
    /// How far a key is shifted so that its highest bit is the highest of `K`.
    shift: u32,
    key: std::marker::PhantomData<K>,
}

impl<K: Key> RangeMap<K> {
    /// A map of `bits`-bit numbers from the starts of ranges, ascending from 0, and their values.
    ///
    /// # Panics
    /// Where `intervals` is empty or does not start at 0, or `bits` is more than the key has.
    pub(crate) fn new(intervals: &[(u128, u32)], bits: u32) -> Self {
        assert!(intervals.first().is_some_and(|(start, _)| *start == 0), "the first range starts at 0");
        assert!((1..=K::BITS).contains(&bits), "{bits} bits in a key of {}", K::BITS);
        let mut builder = Builder { intervals, nodes: vec![Node::default()], leaves: Vec::new() };
        builder.fill(0, 0, bits, 0);
        Self {
            nodes: builder.nodes.into(),
            leaves: builder.leaves.into(),
            shift: K::BITS - bits,
            key: std::marker::PhantomData,
        }
    }

    /// The value at `key`.
    #[inline]
    pub(crate) fn get(&self, key: K) -> u32 {
        let mut key = key << self.shift;
        let mut node = &self.nodes[0];
        loop {
            let slot = 1u64 << key.top_six();
            let below = slot - 1;
            if node.children & slot != 0 {
                node = &self.nodes[node.first_child as usize + (node.children & below).count_ones() as usize];
                key = key << 6;
            } else {
                let run = (node.runs & (below | slot)).count_ones() as usize;
                return self.leaves[node.first_leaf as usize + run - 1];
            }
        }
    }

    /// Memory in use.
    pub(crate) fn memory_bytes(&self) -> usize {
        size_of_val(&*self.nodes) + size_of_val(&*self.leaves)
    }
}

struct Builder<'ranges> {
    intervals: &'ranges [(u128, u32)],
    nodes: Vec<Node>,
    leaves: Vec<u32>,
}

impl Builder<'_> {
    /// Fills `node`, which covers the `bits`-bit block of numbers from `base`; `index` is that of the interval of `base`.
    fn fill(&mut self, node: usize, base: u128, bits: u32, mut index: usize) {
        let (mut children, mut count) = ([(0, 0); 64], 0);
        let mut built = Node { first_leaf: self.leaves.len() as u32, ..Node::default() };
        for slot in 0..64u32 {
            let (low, size_bits) = if bits >= 6 {
                (base + (u128::from(slot) << (bits - 6)), bits - 6)
            } else {
                // The last bits of the key: several slots stand for one number.
                (base + u128::from(slot >> (6 - bits)), 0)
            };
            let high = low + ((1u128 << size_bits) - 1);
            let starts_by =
                |index: usize, number: u128| self.intervals.get(index).is_some_and(|(start, _)| *start <= number);
            if starts_by(index + 1, low) {
                index += 1;
            }
            if starts_by(index + 1, high) {
                built.children |= 1 << slot;
                children[count] = (low, index);
                count += 1;
                index += self.intervals[index + 1..].partition_point(|(start, _)| *start <= high);
            } else {
                let value = self.intervals[index].1;
                if built.runs == 0 || self.leaves.last() != Some(&value) {
                    built.runs |= 1 << slot;
                    self.leaves.push(value);
                }
            }
        }
        built.first_child = self.nodes.len() as u32;
        self.nodes.resize(self.nodes.len() + count, Node::default());
        self.nodes[node] = built;
        for (place, (low, index)) in children[..count].iter().copied().enumerate() {
            self.fill(built.first_child as usize + place, low, bits - 6, index);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expected(intervals: &[(u128, u32)], number: u128) -> u32 {
        intervals[intervals.partition_point(|(start, _)| *start <= number) - 1].1
    }

    fn check<K: Key>(starts: &[u128], bits: u32) {
        let mut starts = starts.to_vec();
        starts.push(0);
        starts.sort_unstable();
        starts.dedup();
        let intervals: Vec<(u128, u32)> =
            starts.iter().enumerate().map(|(index, start)| (*start, index as u32 / 2)).collect();
        let map = RangeMap::<K>::new(&intervals, bits);
        let max = if bits == 128 { u128::MAX } else { (1 << bits) - 1 };
        for number in starts.iter().flat_map(|start| [start.saturating_sub(1), *start, start + 1, start + 70]) {
            let number = number.min(max);
            assert_eq!(map.get(K::from_number(number)), expected(&intervals, number), "{number:#x} of {bits} bits");
        }
        assert_eq!(map.get(K::from_number(max)), expected(&intervals, max));
    }

    #[test]
    fn one_range_is_one_node() {
        let map = RangeMap::<u128>::new(&[(0, 7)], 128);
        assert_eq!((map.get(0), map.get(u128::MAX), map.memory_bytes()), (7, 7, 28));
    }

    proptest! {
        #[test]
        fn every_width_agrees_with_a_search(starts in proptest::collection::vec(any::<u128>(), 0..30)) {
            for bits in [1u32, 5, 6, 16, 17, 24, 32] {
                check::<u32>(&starts.iter().map(|start| start >> (128 - bits)).collect::<Vec<_>>(), bits);
            }
            for bits in [32u32, 127, 128] {
                let starts: Vec<u128> = starts.iter().map(|start| (start >> (128 - bits)).min(u128::MAX - 70)).collect();
                check::<u128>(&starts, bits);
            }
        }
    }
}
