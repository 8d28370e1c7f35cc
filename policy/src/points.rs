//! Point classes: which (address, protocol, port) the rules that name ports cannot tell apart.
//!
//! A point is a protocol and a port. A set of (address, point) pairs is given, for each of its points, by a set of
//! addresses; so which of these sets a pair is in follows from the pair's address class and point alone.

use std::sync::Arc;

use hashbrown::HashMap;

use crate::classes::{Classes, Groups, Target};

/// The classes of pairs of an address class and a point.
#[derive(Debug, Default)]
pub(crate) struct PointClasses {
    pub(crate) classes: Classes,
    /// By [`point_key`]; pairs that are not here are of class 0.
    pub(crate) of_pair: Arc<HashMap<u64, u32>>,
    /// By address class: its points that have a class.
    of_class: Vec<Vec<u32>>,
}

/// An address class with a protocol and port, as one number.
#[inline]
pub(crate) const fn point_key(class: u32, point: u32) -> u64 {
    (class as u64) << 32 | point as u64
}

impl PointClasses {
    /// Takes over the points of the address classes that changed: for each, (point, point set), in any order.
    pub(crate) fn update(&mut self, changed: impl Iterator<Item = (u32, Vec<(u32, u32)>)>) {
        let mut groups = Groups::default();
        let mut joined: Vec<(u64, Target)> = Vec::new();
        let mut signature = Vec::new();
        for (class, mut points) in changed {
            if self.of_class.len() <= class as usize {
                self.of_class.resize(class as usize + 1, Vec::new());
            }
            let before = std::mem::take(&mut self.of_class[class as usize]);
            if before.is_empty() && points.is_empty() {
                continue;
            }
            let of_pair = Arc::make_mut(&mut self.of_pair);
            let left: HashMap<u32, u32> = before
                .into_iter()
                .map(|point| (point, of_pair.remove(&point_key(class, point)).expect("a class for each point")))
                .collect();
            left.values().for_each(|point_class| self.classes.leave(*point_class));
            points.sort_unstable();
            for sets in points.chunk_by(|a, b| a.0 == b.0) {
                let point = sets[0].0;
                signature.clear();
                signature.extend(sets.iter().map(|(_, set)| *set));
                let target = self.classes.target(&mut groups, left.get(&point).copied().unwrap_or(0), &signature);
                self.classes.join(&mut groups, target);
                joined.push((point_key(class, point), target));
                self.of_class[class as usize].push(point);
            }
        }
        let settled = self.classes.settle(groups);
        if !joined.is_empty() {
            Arc::make_mut(&mut self.of_pair).extend(joined.into_iter().map(|(key, target)| match target {
                Target::Class(class) => (key, class),
                Target::Group(group) => (key, settled.of_group[group as usize]),
            }));
        }
    }
}
