//! A map from 32-bit numbers to values that are constant over ranges.
//!
//! A search tree whose nodes are as wide as a cache line: of the ends of ranges in a node, those below the key are counted,
//! all at once, which is where to go on. An inner node has 16 ends, a leaf 8 and the values of those ranges, so 8 ranges are
//! found in one line, 128 in two, 2048 in three, 32,768 in four. Compared with a trie of the same numbers, which visits a node for
//! every six bits, a lookup takes fewer steps that wait for each other, and a range takes 8 bytes. The last end on each level is
//! left out, since no key is above it, and the places that are not used never count.

/// Ends per inner node.
const WIDTH: usize = 16;
/// Ranges per leaf.
const LEAF_WIDTH: usize = 8;
/// An end that no key is above.
const NEVER: i32 = i32::MAX;

/// How many of three ends are below the key.
#[inline]
fn count(ends: [i32; 3], key: i32) -> usize {
    ends.into_iter().map(|end| usize::from(end < key)).sum()
}

/// Ends of what is under its children, ascending.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Inner([i32; WIDTH]);

/// Ends of ranges, ascending, and their values.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Leaf {
    ends: [i32; LEAF_WIDTH],
    values: [u32; LEAF_WIDTH],
}

const _: () = assert!(size_of::<Inner>() == 64 && size_of::<Leaf>() == 64);

/// A map from every 32-bit number to a `u32`.
#[derive(Clone, Debug)]
pub(crate) struct StepMap {
    /// Level by level from the root; none where there is one leaf.
    inner: Box<[Inner]>,
    /// Where each level begins.
    levels: Box<[u32]>,
    leaves: Box<[Leaf]>,
}

/// Numbers in the order of signed ones, which processors compare many of at once.
#[inline]
const fn signed(number: u32) -> i32 {
    (number ^ 1 << 31) as i32
}

impl StepMap {
    /// From the starts of ranges, ascending from 0, and their values.
    ///
    /// # Panics
    /// Where `ranges` is empty or does not start at 0.
    pub(crate) fn new(ranges: &[(u32, u32)]) -> Self {
        assert!(ranges.first().is_some_and(|(start, _)| *start == 0), "the first range starts at 0");
        let mut ends: Vec<i32> = ranges[1..].iter().map(|(start, _)| signed(start - 1)).collect();
        ends.push(NEVER);
        let leaf = |(ends_of, ranges): (&[i32], &[(u32, u32)])| {
            let mut leaf = Leaf { ends: [NEVER; LEAF_WIDTH], values: [0; LEAF_WIDTH] };
            leaf.ends[..ends_of.len()].copy_from_slice(ends_of);
            leaf.values.iter_mut().zip(ranges).for_each(|(value, (_, of_range))| *value = *of_range);
            leaf
        };
        let leaves: Box<[Leaf]> = ends.chunks(LEAF_WIDTH).zip(ranges.chunks(LEAF_WIDTH)).map(leaf).collect();
        ends = leaves.iter().map(|leaf| leaf.ends[LEAF_WIDTH - 1]).collect();
        let mut upwards: Vec<Vec<Inner>> = Vec::new();
        while ends.len() > 1 {
            let nodes: Vec<Inner> = ends
                .chunks(WIDTH)
                .map(|ends| {
                    let mut node = Inner([NEVER; WIDTH]);
                    node.0[..ends.len()].copy_from_slice(ends);
                    node
                })
                .collect();
            ends = nodes.iter().map(|node| node.0[WIDTH - 1]).collect();
            upwards.push(nodes);
        }
        let mut inner = Vec::new();
        let mut levels = Vec::new();
        for level in upwards.into_iter().rev() {
            levels.push(inner.len() as u32);
            inner.extend(level);
        }
        Self { inner: inner.into(), levels: levels.into(), leaves }
    }

    /// The value at `key`.
    #[inline(always)]
    pub(crate) fn get(&self, key: u32) -> u32 {
        let key = signed(key);
        let mut place = 0;
        for level in &self.levels {
            let ends = &self.inner[*level as usize + place].0;
            let four = 4 * count([ends[3], ends[7], ends[11]], key);
            place = WIDTH * place + four + count([ends[four], ends[four + 1], ends[four + 2]], key);
        }
        let leaf = &self.leaves[place];
        let four = 4 * usize::from(leaf.ends[3] < key);
        leaf.values[four + count([leaf.ends[four], leaf.ends[four + 1], leaf.ends[four + 2]], key)]
    }

    /// Memory in use.
    pub(crate) fn memory_bytes(&self) -> usize {
        size_of_val(&*self.inner) + size_of_val(&*self.levels) + size_of_val(&*self.leaves)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(mut starts: Vec<u32>) {
        starts.push(0);
        starts.sort_unstable();
        starts.dedup();
        let ranges: Vec<(u32, u32)> = starts.iter().map(|start| (*start, start ^ 7)).collect();
        let map = StepMap::new(&ranges);
        let around = starts.iter().flat_map(|start| [start.saturating_sub(1), *start, start.saturating_add(1)]);
        for key in around.chain([(1 << 31) - 1, 1 << 31, u32::MAX]) {
            let start = starts[starts.partition_point(|start| *start <= key) - 1];
            assert_eq!(map.get(key), start ^ 7, "{key}");
        }
    }

    #[test]
    fn every_number_of_levels_and_full_nodes() {
        for count in [1u32, 2, 7, 8, 9, 127, 128, 129, 2047, 2048, 2049, 32768, 32769] {
            check((0..count).map(|number| 3 * number).collect());
            check((0..count).map(|number| u32::MAX - 3 * number).collect());
        }
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_search(starts in proptest::collection::vec(any::<u32>(), 0..600), shift in 0u32..32) {
            check(starts.into_iter().map(|start| start >> shift).collect());
        }
    }
}
