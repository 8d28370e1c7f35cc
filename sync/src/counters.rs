//! Counters that cost a worker what a plain variable costs.
//!
//! # What, layout
//! Each worker has a padded array of `N` numbers of its own ([`WorkerCounters`]); [`Counters`] knows all of them
//! and sums. Numbers only grow. The numbers of a worker that has ended stay in the sums.
//!
//! # Invariants and memory ordering
//! Only its owner writes an array, by a relaxed load and a relaxed store (no read-modify-write, so no locked bus
//! cycle); [`WorkerCounters`] is therefore not `Sync`. Sums are of no single moment, but each number is one that the
//! counter had, and two sums of one counter, one after the other, do not go down.

use std::{cell::Cell, marker::PhantomData};

use crossbeam::utils::CachePadded;

use crate::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
    lock,
};

type Array<const N: usize> = CachePadded<[AtomicU64; N]>;

/// `N` counters, each the sum over workers.
#[derive(Debug)]
pub struct Counters<const N: usize> {
    workers: Mutex<Vec<Arc<Array<N>>>>,
}

impl<const N: usize> Counters<N> {
    /// Counters without a worker.
    pub fn new() -> Self {
        Self { workers: Mutex::new(Vec::new()) }
    }

    /// The counters of one more worker, all zero.
    pub fn join(&self) -> WorkerCounters<N> {
        let array = Arc::new(CachePadded::new(std::array::from_fn(|_| AtomicU64::new(0))));
        let mut workers = lock(&self.workers);
        workers.push(Arc::clone(&array));
        WorkerCounters { array, number: WorkerNumber(workers.len() - 1), _one_thread: PhantomData }
    }

    /// The sum of one counter over all workers.
    ///
    /// # Panics
    /// Where `index` is not below `N`.
    pub fn sum(&self, index: usize) -> u64 {
        lock(&self.workers).iter().map(|array| array[index].load(Ordering::Relaxed)).sum()
    }

    /// The sum of each counter over all workers.
    pub fn sums(&self) -> [u64; N] {
        let workers = lock(&self.workers);
        std::array::from_fn(|index| workers.iter().map(|array| array[index].load(Ordering::Relaxed)).sum())
    }

    /// Each worker's counters, in the order in which they joined.
    pub fn per_worker(&self) -> Vec<[u64; N]> {
        let read = |array: &Arc<Array<N>>| std::array::from_fn(|index| array[index].load(Ordering::Relaxed));
        lock(&self.workers).iter().map(read).collect()
    }
}

impl<const N: usize> Default for Counters<N> {
    fn default() -> Self {
        Self::new()
    }
}

/// A worker's number among those of one [`Counters`], from 0 in the order in which they joined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WorkerNumber(pub usize);

/// One worker's counters. Sendable, not shareable.
#[derive(Debug)]
pub struct WorkerCounters<const N: usize> {
    array: Arc<Array<N>>,
    number: WorkerNumber,
    _one_thread: PhantomData<Cell<()>>,
}

impl<const N: usize> WorkerCounters<N> {
    /// Adds `n` to a counter.
    ///
    /// # Panics
    /// Where `index` is not below `N`.
    #[inline]
    pub fn add(&self, index: usize, n: u64) {
        let counter = &self.array[index];
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// This worker's number.
    #[inline]
    pub fn number(&self) -> WorkerNumber {
        self.number
    }

    /// This worker's part of a counter.
    ///
    /// # Panics
    /// Where `index` is not below `N`.
    #[inline]
    pub fn get(&self, index: usize) -> u64 {
        self.array[index].load(Ordering::Relaxed)
    }
}

/// A number that all workers change, exact and on one shared line: for what happens once per connection, not per packet.
/// It orders nothing, and no model is about it, so it is the standard library's also under loom.
#[derive(Debug, Default)]
pub struct Gauge(CachePadded<std::sync::atomic::AtomicU32>);

impl Gauge {
    /// Adds one unless the number has reached `limit`; whether it did.
    #[inline]
    pub fn add_below(&self, limit: u32) -> bool {
        if self.0.fetch_add(1, Ordering::Relaxed) < limit {
            return true;
        }
        self.0.fetch_sub(1, Ordering::Relaxed);
        false
    }

    /// Takes one away.
    #[inline]
    pub fn subtract(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// The number.
    #[inline]
    pub fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_gauge_stops_at_its_limit() {
        let gauge = Gauge::default();
        assert_eq!([gauge.add_below(2), gauge.add_below(2), gauge.add_below(2)], [true, true, false]);
        gauge.subtract();
        assert_eq!((gauge.get(), gauge.add_below(2), gauge.get()), (1, true, 2));
    }

    #[test]
    fn sums_are_over_all_workers_also_those_that_ended() {
        let counters = Counters::<2>::new();
        std::thread::scope(|scope| {
            for step in [1, 10] {
                let worker = counters.join();
                scope.spawn(move || {
                    for _ in 0..100 {
                        worker.add(1, step);
                    }
                    assert_eq!((worker.get(0), worker.get(1)), (0, 100 * step));
                });
            }
        });
        assert_eq!((counters.sum(0), counters.sum(1), counters.sums()), (0, 1100, [0, 1100]));
        assert_eq!(counters.per_worker(), vec![[0, 100], [0, 1000]]);
    }
}
