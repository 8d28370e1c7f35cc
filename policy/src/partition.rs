//! Equivalence classes: which numbers a collection of sets cannot tell apart.

use crate::{
    classes::{Classes, Groups, Settled, Target, symmetric_difference},
    ranges::Ranges,
};

/// A partition of the numbers up to a maximum by membership in sets.
///
/// Two numbers are in one class iff they are in the same sets. Sets are not kept: a change of them is told as the
/// places where membership changes from one number to the next ([`Partition::toggle`]).
#[derive(Debug)]
pub(crate) struct Partition {
    /// Where each interval starts, ascending from 0, and its class; neighbours differ in class.
    pub(crate) intervals: Vec<(u128, u32)>,
    pub(crate) classes: Classes,
}

/// More memberships (sets per class, summed over intervals) than are allowed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooManyMemberships;

impl Default for Partition {
    fn default() -> Self {
        Self { intervals: vec![(0, 0)], classes: Classes::default() }
    }
}

/// The places, for [`Partition::toggle`], where a set that was `before` and is `after` changes membership. No number is
/// above `max`.
pub(crate) fn toggles(set: u32, before: &Ranges, after: &Ranges, max: u128, out: &mut Vec<(u128, u32)>) {
    let edges = |ranges: &Ranges| {
        let edges = ranges.iter().flat_map(|(low, high)| [Some(low), high.checked_add(1)]);
        edges.flatten().take_while(|edge| *edge <= max).collect::<Vec<_>>()
    };
    let (before, after) = (edges(before), edges(after));
    let (mut old, mut new) = (before.iter().peekable(), after.iter().peekable());
    loop {
        let edge = match (old.peek(), new.peek()) {
            (Some(a), Some(b)) if a == b => {
                old.next();
                new.next();
                continue;
            }
            (Some(a), Some(b)) if a < b => old.next(),
            (_, Some(_)) => new.next(),
            (Some(_), None) => old.next(),
            (None, None) => return,
        };
        out.extend(edge.map(|edge| (*edge, set)));
    }
}

impl Partition {
    /// The partition by these sets, whose numbers are their places, and which do not reach above `max`.
    pub(crate) fn new(sets: &[&Ranges], max: u128, limit: usize) -> Result<Self, TooManyMemberships> {
        let mut partition = Self::default();
        let mut events = Vec::with_capacity(2 * sets.iter().map(|set| set.len()).sum::<usize>());
        for (number, set) in sets.iter().enumerate() {
            toggles(number as u32, &Ranges::default(), set, max, &mut events);
        }
        partition.toggle(events, limit)?;
        Ok(partition)
    }

    /// From each of these places on, membership in the set is the opposite of what it was before; a place that is named
    /// twice for a set counts as not named. After an error the partition is of no use.
    ///
    /// Costs the number of intervals, and the sets of those that change.
    pub(crate) fn toggle(&mut self, mut events: Vec<(u128, u32)>, limit: usize) -> Result<Settled, TooManyMemberships> {
        events.sort_unstable();
        let mut groups = Groups::default();
        let mut pieces: Vec<(u128, Target)> = Vec::with_capacity(self.intervals.len() + events.len());
        let (mut intervals, mut events) = (self.intervals.iter().peekable(), events.iter().peekable());
        let (mut position, mut class, mut memberships) = (0, 0, 0);
        let mut toggled: Vec<u32> = Vec::new();
        let mut signature = Vec::new();
        self.classes.empty();
        loop {
            if let Some((_, of_interval)) = intervals.next_if(|(start, _)| *start == position) {
                class = *of_interval;
            }
            while let Some((_, set)) = events.next_if(|(place, _)| *place == position) {
                match toggled.binary_search(set) {
                    Ok(index) => drop(toggled.remove(index)),
                    Err(index) => toggled.insert(index, *set),
                }
            }
            let target = if toggled.is_empty() {
                Target::Class(class)
            } else {
                symmetric_difference(self.classes.signature(class), &toggled, &mut signature);
                self.classes.target(&mut groups, class, &signature)
            };
            if pieces.last().is_none_or(|(_, last)| *last != target) {
                memberships += self.classes.memberships(&groups, target);
                if memberships > limit {
                    return Err(TooManyMemberships);
                }
                self.classes.join(&mut groups, target);
                pieces.push((position, target));
            }
            position = match (intervals.peek(), events.peek()) {
                (Some((start, _)), Some((place, _))) => *start.min(place),
                (Some((next, _)), None) | (None, Some((next, _))) => *next,
                (None, None) => break,
            };
        }
        let settled = self.classes.settle(groups);
        let class_of = |target| match target {
            Target::Class(class) => class,
            Target::Group(group) => settled.of_group[group as usize],
        };
        self.intervals = pieces.into_iter().map(|(start, target)| (start, class_of(target))).collect();
        Ok(settled)
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
        assert_eq!(Partition::new(&sets, 100, 55).unwrap().intervals.len(), 10);
    }

    /// That classes are membership, and of_set says so too.
    fn check(partition: &Partition, sets: &[Ranges]) -> Result<(), TestCaseError> {
        let Partition { intervals, classes } = partition;
        for number in 0..=60 {
            let members: Vec<u32> = (0..sets.len() as u32)
                .filter(|set| sets[*set as usize].iter().any(|(low, high)| (low..=high).contains(&number)))
                .collect();
            let class = intervals[intervals.partition_point(|(start, _)| *start <= number) - 1].1;
            prop_assert_eq!(classes.signature(class), &members[..]);
            prop_assert_eq!(class == 0, members.is_empty());
        }
        prop_assert!(intervals.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 != pair[1].1));
        let used: Vec<u32> = intervals.iter().map(|(_, class)| *class).collect();
        for set in 0..sets.len() as u32 {
            let mut expected: Vec<u32> =
                used.iter().copied().filter(|class| classes.signature(*class).contains(&set)).collect();
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(classes.of_set(set), expected);
        }
        Ok(())
    }

    fn sets() -> impl Strategy<Value = Vec<Ranges>> {
        let set = proptest::collection::vec((0u128..=60, 0u128..=60), 0..5).prop_map(Ranges::new);
        proptest::collection::vec(set, 6)
    }

    proptest! {
        /// What a user of some sets remembers for each class stays right as long as none of them is named as regrouped.
        #[test]
        fn changes_agree_with_membership_and_name_all_users(steps in proptest::collection::vec(sets(), 1..6)) {
            let mut partition = Partition::default();
            let mut before = vec![Ranges::default(); 6];
            let mut remembered: Vec<Vec<u32>> = vec![Vec::new(); 6];
            for after in steps {
                let mut events = Vec::new();
                for (set, (before, after)) in before.iter().zip(&after).enumerate() {
                    toggles(set as u32, before, after, 60, &mut events);
                }
                partition.toggle(events, 10_000).unwrap();
                check(&partition, &after)?;
                for set in partition.classes.take_regrouped() {
                    remembered[set as usize] = partition.classes.of_set(set).to_vec();
                }
                for (set, remembered) in remembered.iter().enumerate() {
                    for (_, class) in &partition.intervals {
                        prop_assert_eq!(
                            remembered.contains(class),
                            partition.classes.signature(*class).contains(&(set as u32)),
                            "set {} in class {}", set, class
                        );
                    }
                }
                before = after;
            }
        }
    }
}
