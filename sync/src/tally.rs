//! Counters by number, as many as a compiled table has: how often each rule, or each backend, was chosen.
//!
//! # What, layout
//! As [`crate::counters`], but the length is known only when a table is compiled, and the counters end with it. Each
//! worker has an array of its own, with room behind it, so that no line is shared between workers.
//!
//! # Invariants and memory ordering
//! Worker `i`, the `i`th that joined its process's [`crate::Counters`], is the only one that writes array `i`, by a
//! relaxed load and a relaxed store: no read-modify-write, so no locked bus cycle. Two threads that wrote one array
//! would lose counts, nothing else. Sums are of no single moment, but do not go down.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::WorkerNumber;

/// `length` counters for each worker. They order nothing, and no model is about them, so they are the standard
/// library's also under loom.
#[derive(Debug, Default)]
pub struct Tally {
    workers: Box<[Box<[AtomicU64]>]>,
    length: usize,
}

/// Counters behind an array that nobody counts in: two lines, as lines are fetched in pairs.
const ROOM: usize = 16;

impl Tally {
    /// `length` counters for each of so many workers, all zero.
    pub fn new(workers: usize, length: usize) -> Self {
        let array = || std::iter::repeat_with(AtomicU64::default).take(length + ROOM).collect();
        Self { workers: std::iter::repeat_with(array).take(workers).collect(), length }
    }

    /// Adds one to a worker's counter. A worker beyond those that the tally was made for, and a counter beyond its
    /// length, is not counted: so a tally of no workers is one that counts nothing.
    #[inline]
    pub fn add(&self, worker: WorkerNumber, index: usize) {
        if let Some(counter) = self.workers.get(worker.0).and_then(|array| array[..self.length].get(index)) {
            counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }

    /// Reads a worker's counter, so that it is near when it is counted in.
    #[inline]
    pub fn foresee(&self, worker: WorkerNumber, index: usize) {
        std::hint::black_box(
            self.workers
                .get(worker.0)
                .and_then(|array| array.get(index))
                .map(|counter| counter.load(Ordering::Relaxed)),
        );
    }

    /// The sums over all workers that are not zero, by ascending index.
    pub fn sums(&self) -> impl Iterator<Item = (usize, u64)> {
        (0..self.length).map(|index| (index, self.sum(index))).filter(|(_, sum)| *sum > 0)
    }

    /// The sum of one counter over all workers; 0 beyond the length.
    pub fn sum(&self, index: usize) -> u64 {
        self.workers
            .iter()
            .filter_map(|array| array[..self.length].get(index))
            .map(|counter| counter.load(Ordering::Relaxed))
            .sum()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::Counters;

    #[test]
    fn sums_are_over_all_workers_and_strangers_count_nowhere() {
        let (counters, tally) = (Counters::<1>::new(), Tally::new(2, 3));
        std::thread::scope(|scope| {
            for times in [100, 10, 1] {
                let worker = counters.join();
                let tally = &tally;
                scope.spawn(move || {
                    for _ in 0..times {
                        tally.add(worker.number(), 2);
                        tally.add(worker.number(), 3);
                    }
                });
            }
        });
        assert_eq!((tally.sums().collect::<Vec<_>>(), tally.sum(0), tally.sum(3)), (vec![(2, 110)], 0, 0));
        Tally::default().add(WorkerNumber(0), 0);
        assert_eq!(Tally::default().sums().count(), 0);
    }
}
