//! A map from small numbers to values that are constant over ranges, for few ranges.
//!
//! A search tree of 16 keys per node, as wide as a cache line: of the starts in a node, those that are not above the key
//! are counted, all at once, which is where to go on. One level holds 16 ranges, two 256, three 4096; most programs
//! tell fewer than 16 applications apart. Compared with a trie of the same numbers (see [`crate::trie`]) a lookup takes
//! a step where that takes four that wait for each other.

/// Keys per node.
const WIDTH: usize = 16;
/// A start above all keys.
const NEVER: i32 = i32::MAX;

/// Starts of ranges, ascending.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Node([i32; WIDTH]);

impl Node {
    /// How many starts are not above `key`.
    #[inline]
    fn count(&self, key: i32) -> usize {
        self.0.iter().map(|start| i32::from(*start <= key)).sum::<i32>() as usize
    }
}

/// A map from every number of at most 30 bits to a `u32`.
#[derive(Debug)]
pub(crate) struct StepMap {
    /// Level by level from the root. The last level has all starts; each other one the first start of each node of the
    /// level below.
    nodes: Box<[Node]>,
    /// Where each level begins.
    levels: Box<[u32]>,
    /// By range.
    values: Box<[u32]>,
}

impl StepMap {
    /// From the starts of ranges, ascending from 0, and their values.
    ///
    /// # Panics
    /// Where `intervals` is empty or does not start at 0.
    pub(crate) fn new(intervals: &[(u128, u32)]) -> Self {
        assert!(intervals.first().is_some_and(|(start, _)| *start == 0), "the first range starts at 0");
        let mut starts: Vec<i32> = intervals.iter().map(|(start, _)| *start as i32).collect();
        let mut upwards: Vec<Vec<Node>> = Vec::new();
        loop {
            let nodes: Vec<Node> = starts
                .chunks(WIDTH)
                .map(|starts| {
                    let mut node = Node([NEVER; WIDTH]);
                    node.0[..starts.len()].copy_from_slice(starts);
                    node
                })
                .collect();
            starts = nodes.iter().map(|node| node.0[0]).collect();
            upwards.push(nodes);
            if starts.len() == 1 {
                break;
            }
        }
        let mut nodes = Vec::new();
        let mut levels = Vec::new();
        for level in upwards.into_iter().rev() {
            levels.push(nodes.len() as u32);
            nodes.extend(level);
        }
        let values = intervals.iter().map(|(_, value)| *value).collect();
        Self { nodes: nodes.into(), levels: levels.into(), values }
    }

    /// The value at `key`.
    #[inline]
    pub(crate) fn get(&self, key: u32) -> u32 {
        let mut place = 0;
        for level in &self.levels {
            // The first start of what was found before is not above the key, so the count is at least 1.
            place = WIDTH * place + self.nodes[*level as usize + place].count(key as i32) - 1;
        }
        self.values[place]
    }

    /// Memory in use.
    pub(crate) fn memory_bytes(&self) -> usize {
        size_of_val(&*self.nodes) + size_of_val(&*self.levels) + size_of_val(&*self.values)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(starts: &[u32]) {
        let mut starts = starts.to_vec();
        starts.push(0);
        starts.sort_unstable();
        starts.dedup();
        let intervals: Vec<(u128, u32)> = starts.iter().map(|start| (u128::from(*start), start ^ 7)).collect();
        let map = StepMap::new(&intervals);
        for key in starts.iter().flat_map(|start| [start.saturating_sub(1), *start, start + 1]).chain([(1 << 30) - 1]) {
            let start = starts[starts.partition_point(|start| *start <= key) - 1];
            assert_eq!(map.get(key), start ^ 7, "{key}");
        }
    }

    #[test]
    fn every_number_of_levels_and_full_nodes() {
        for count in [1u32, 2, 15, 16, 17, 255, 256, 257, 4096, 4097] {
            check(&(0..count).map(|number| 3 * number).collect::<Vec<_>>());
        }
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_search(starts in proptest::collection::vec(0u32..(1 << 24), 0..600)) {
            check(&starts);
        }
    }
}
