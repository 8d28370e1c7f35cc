//! Equivalence classes: which numbers a collection of sets cannot tell apart.

use hashbrown::HashMap;

use crate::ranges::Ranges;

/// A partition of the numbers up to a maximum by membership in sets.
///
/// Two numbers are in one class iff they are in the same sets (the class's signature). Class 0 is that of the numbers
/// in no set at all, whether there are any or not.
#[derive(Debug)]
pub(crate) struct Partition {
    /// Where each interval starts, ascending from 0, and its class; neighbours differ in class.
    pub(crate) intervals: Vec<(u128, u32)>,
    /// By class: the numbers of its sets, ascending.
    pub(crate) signatures: Vec<Box<[u32]>>,
}

/// More memberships (sets per class, summed over classes) than are allowed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooManyMemberships;

impl Partition {
    /// Sweeps over the ends of all ranges of `sets`, which may not reach above `max`.
    ///
    /// Costs the sum, over all intervals, of the number of sets that hold there.
    pub(crate) fn new(sets: &[&Ranges], max: u128, limit: usize) -> Result<Self, TooManyMemberships> {
        let mut events = Vec::with_capacity(2 * sets.iter().map(|set| set.len()).sum::<usize>());
        for (set, ranges) in sets.iter().enumerate() {
            for (low, high) in ranges.iter() {
                events.push((low, set as u32));
                if high < max {
                    events.push((high + 1, set as u32));
                }
            }
        }
        events.sort_unstable();

        let mut classes: HashMap<Vec<u32>, u32> = HashMap::new();
        classes.insert(Vec::new(), 0);
        let mut signatures: Vec<Box<[u32]>> = vec![Box::default()];
        let mut intervals = vec![(0, 0)];
        let mut active: Vec<u32> = Vec::new();
        let (mut work, mut next) = (0, 0);
        while next < events.len() {
            let position = events[next].0;
            while next < events.len() && events[next].0 == position {
                // A set's ranges never touch, so at one position it only begins or only ends.
                let set = events[next].1;
                match active.binary_search(&set) {
                    Ok(index) => {
                        active.remove(index);
                    }
                    Err(index) => active.insert(index, set),
                }
                next += 1;
            }
            work += active.len();
            if work > limit {
                return Err(TooManyMemberships);
            }
            let class = *classes.entry_ref(active.as_slice()).or_insert_with(|| {
                signatures.push(active.as_slice().into());
                (signatures.len() - 1) as u32
            });
            match intervals.last_mut() {
                Some(last) if last.0 == position => last.1 = class,
                Some(last) if last.1 == class => {}
                _ => intervals.push((position, class)),
            }
        }
        Ok(Self { intervals, signatures })
    }

    /// By set: the classes that it consists of, ascending.
    pub(crate) fn classes_of_sets(&self, sets: usize) -> Vec<Vec<u32>> {
        let mut classes = vec![Vec::new(); sets];
        for (class, signature) in self.signatures.iter().enumerate() {
            for set in signature {
                classes[*set as usize].push(class as u32);
            }
        }
        classes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn too_much_is_an_error() {
        let sets: Vec<Ranges> = (0..10).map(|start| Ranges::new(vec![(start, 100)])).collect();
        let sets: Vec<&Ranges> = sets.iter().collect();
        assert_eq!(Partition::new(&sets, 100, 20).unwrap_err(), TooManyMemberships);
        assert_eq!(Partition::new(&sets, 100, 55).unwrap().signatures.len(), 11);
    }

    proptest! {
        #[test]
        fn classes_are_membership(
            sets in proptest::collection::vec(proptest::collection::vec((0u128..=60, 0u128..=60), 0..5), 0..6),
        ) {
            let sets: Vec<Ranges> = sets.into_iter().map(Ranges::new).collect();
            let partition = Partition::new(&sets.iter().collect::<Vec<_>>(), 60, 10_000).unwrap();
            for number in 0..=60 {
                let members: Vec<u32> = (0..sets.len() as u32)
                    .filter(|set| sets[*set as usize].iter().any(|(low, high)| (low..=high).contains(&number)))
                    .collect();
                let index = partition.intervals.partition_point(|(start, _)| *start <= number) - 1;
                let class = partition.intervals[index].1;
                prop_assert_eq!(&*partition.signatures[class as usize], &members[..]);
                prop_assert_eq!(class == 0, members.is_empty());
            }
            prop_assert!(partition.intervals.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 != pair[1].1));
            for (set, classes) in partition.classes_of_sets(sets.len()).iter().enumerate() {
                for class in 0..partition.signatures.len() as u32 {
                    prop_assert_eq!(
                        classes.contains(&class),
                        partition.signatures[class as usize].contains(&(set as u32))
                    );
                }
            }
        }
    }
}
