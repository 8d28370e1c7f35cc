//! Counters that cost a worker what a plain variable costs.
//!
//! # What, layout
//! Each worker has a padded array of `N` numbers of its own ([`WorkerCounters`]); [`Counters`] knows all of them
//! and sums. Numbers only grow. The numbers of a worker that has ended stay in the sums; its array is the next one's who joins, so that there
//! are never more of them than there were workers at a time.
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
    workers: Mutex<Workers<N>>,
}

#[derive(Debug)]
struct Workers<const N: usize> {
    arrays: Vec<Arc<Array<N>>>,
    /// What those have counted whose array another one has.
    ended: [u64; N],
}

impl<const N: usize> Counters<N> {
    /// Counters without a worker.
    pub fn new() -> Self {
        Self { workers: Mutex::new(Workers { arrays: Vec::new(), ended: [0; N] }) }
    }

    /// The counters of one more worker, all zero.
    pub fn join(&self) -> WorkerCounters<N> {
        let mut workers = lock(&self.workers);
        let Workers { arrays, ended } = &mut *workers;
        for (number, array) in arrays.iter_mut().enumerate() {
            // Nobody else has it any more, so what its worker wrote is seen here.
            if let Some(left) = Arc::get_mut(array) {
                for (sum, counter) in ended.iter_mut().zip(left.iter()) {
                    *sum = sum.wrapping_add(counter.load(Ordering::Relaxed));
                    counter.store(0, Ordering::Relaxed);
                }
                return WorkerCounters::new(array, number);
            }
        }
        let array = Arc::new(CachePadded::new(std::array::from_fn(|_| AtomicU64::new(0))));
        let counters = WorkerCounters::new(&array, arrays.len());
        arrays.push(array);
        counters
    }

    /// The sum of one counter over all workers.
    ///
    /// # Panics
    /// Where `index` is not below `N`.
    pub fn sum(&self, index: usize) -> u64 {
        let workers = lock(&self.workers);
        let counted = workers.arrays.iter().map(|array| array[index].load(Ordering::Relaxed)).sum::<u64>();
        counted.wrapping_add(workers.ended[index])
    }

    /// The sum of each counter over all workers.
    pub fn sums(&self) -> [u64; N] {
        let workers = lock(&self.workers);
        std::array::from_fn(|index| {
            let counted = workers.arrays.iter().map(|array| array[index].load(Ordering::Relaxed)).sum::<u64>();
            counted.wrapping_add(workers.ended[index])
        })
    }

    /// Each worker's counters, by their numbers.
    pub fn per_worker(&self) -> Vec<[u64; N]> {
        let read = |array: &Arc<Array<N>>| std::array::from_fn(|index| array[index].load(Ordering::Relaxed));
        lock(&self.workers).arrays.iter().map(read).collect()
    }
}

impl<const N: usize> Default for Counters<N> {
    fn default() -> Self {
        Self::new()
    }
}

/// A worker's number among those of one [`Counters`]: the smallest, from 0, that none of the others has.
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
    fn new(array: &Arc<Array<N>>, number: usize) -> Self {
        Self { array: Arc::clone(array), number: WorkerNumber(number), _one_thread: PhantomData }
    }

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
        let workers = [1, 10].map(|step| (step, counters.join()));
        std::thread::scope(|scope| {
            for (step, worker) in workers {
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
        // However many come and go, there is one array more at most, and nothing is lost.
        let stays = counters.join();
        for _ in 0..1000 {
            let comes = counters.join();
            assert_eq!((stays.number(), comes.number(), comes.get(1)), (WorkerNumber(0), WorkerNumber(1), 0));
            comes.add(1, 1);
        }
        assert_eq!((counters.sum(1), counters.sums(), counters.per_worker().len()), (2100, [0, 2100], 2));
    }
}
