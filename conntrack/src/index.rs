//! Which connections are free: a shared stack, a stock per worker, and what waits to become free.
//!
//! # What
//! Connections are named by index. An index is *fresh* (never used), *free* (in the shared stack or in a worker's
//! stock), *in use*, or *retired*: taken out of the table in some turn, and free once every turn of that time is over
//! ([`weir_sync::domain`]). Nothing is allocated after creation: chains of indices are linked through one word per
//! connection.
//!
//! # Layout
//! `links[i]` is the next of `i` in whatever chain `i` is in, plus one; 0 ends a chain. The stack's head has the first
//! index plus one in its low half and counts its changes in its high half.
//!
//! # Invariants and memory ordering
//! An index is in one place at a time, and only the owner of that place writes its link: the shared stack (written
//! before it is pushed), or one [`Stock`]. Taking from the stack walks links that others may be changing; if they are,
//! the head was changed too, its count differs, and the compare-and-swap fails (Treiber's stack with a version, which
//! wraps only after 2^32 changes during one such walk). Pushing is a `Release`, taking an `Acquire`; read-modify-writes
//! in between continue the release, so that all links below a head are seen.
//!
//! # Thread safety
//! Lock-free. A mutex keeps what ended workers left retired; it is only tried, never waited for, by others.

use weir_sync::{
    Arc, CachePadded, Domain, Epoch, Mutex,
    atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
};

use crate::storage::Lines;

/// No index, in links and chains.
const NONE: u32 = 0;
/// Chains of one worker that wait for their epochs.
const WAITING: usize = 8;

/// The indices of one table.
pub(crate) struct Indices {
    links: Lines<AtomicU32>,
    free: CachePadded<AtomicU64>,
    /// One word: the first index that was never used.
    fresh: Lines<AtomicU32>,
    capacity: u32,
    /// What a worker takes at a time.
    batch: u32,
    domain: Arc<Domain>,
    left_behind: Mutex<Vec<(Epoch, Chain)>>,
    /// The length of `left_behind`, to be asked without the mutex.
    left_behind_chains: AtomicUsize,
}

/// Indices linked one after the other.
#[derive(Clone, Copy, Default)]
struct Chain {
    first: u32,
    last: u32,
    len: u32,
}

/// One worker's part of the indices.
pub(crate) struct Stock {
    indices: Arc<Indices>,
    free: Chain,
    fresh: std::ops::Range<u32>,
    retired: Chain,
    /// Oldest first.
    waiting: [Option<(Epoch, Chain)>; WAITING],
}

impl Indices {
    /// As many indices as there are links, which are zero, as is the one word of `fresh`.
    pub(crate) fn new(links: Lines<AtomicU32>, fresh: Lines<AtomicU32>, domain: Arc<Domain>) -> Arc<Self> {
        let capacity = links.len() as u32;
        Arc::new(Self {
            links,
            free: CachePadded::new(AtomicU64::new(0)),
            fresh,
            capacity,
            // What workers hold in stock others cannot have: together well below one percent.
            batch: (capacity / 4096).clamp(1, 16),
            domain,
            left_behind: Mutex::new(Vec::new()),
            left_behind_chains: AtomicUsize::new(0),
        })
    }

    /// Indices from this one on were never used.
    #[inline]
    pub(crate) fn used(&self) -> u32 {
        self.fresh[0].load(Ordering::Relaxed)
    }

    fn link(&self, index: u32) -> &AtomicU32 {
        &self.links[index as usize - 1]
    }

    fn push(&self, chain: Chain) {
        if chain.len == 0 {
            return;
        }
        let mut head = self.free.load(Ordering::Relaxed);
        loop {
            self.link(chain.last).store(head as u32, Ordering::Relaxed);
            let next = (head >> 32).wrapping_add(1) << 32 | u64::from(chain.first);
            match self.free.compare_exchange_weak(head, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(current) => head = current,
            }
        }
    }

    /// Up to a batch of free indices.
    fn take(&self) -> Chain {
        let mut head = self.free.load(Ordering::Acquire);
        loop {
            let first = head as u32;
            if first == NONE {
                return Chain::default();
            }
            let mut chain = Chain { first, last: first, len: 1 };
            let mut rest = self.link(first).load(Ordering::Relaxed);
            while chain.len < self.batch && rest != NONE {
                (chain.last, chain.len) = (rest, chain.len + 1);
                rest = self.link(rest).load(Ordering::Relaxed);
            }
            let next = (head >> 32).wrapping_add(1) << 32 | u64::from(rest);
            match self.free.compare_exchange_weak(head, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return chain,
                Err(current) => head = current,
            }
        }
    }

    /// Up to a batch of indices that were never used.
    fn take_fresh(&self) -> std::ops::Range<u32> {
        let more = |fresh: u32| (fresh < self.capacity).then(|| (fresh + self.batch).min(self.capacity));
        match self.fresh[0].fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(start) => start..(start + self.batch).min(self.capacity),
            Err(_) => 0..0,
        }
    }

    /// Frees what ended workers had retired.
    fn adopt(&self) {
        if self.left_behind_chains.load(Ordering::Relaxed) == 0 {
            return;
        }
        if let Ok(mut left_behind) = self.left_behind.try_lock() {
            left_behind.retain(|(epoch, chain)| {
                let passed = self.domain.passed(*epoch);
                if passed {
                    self.push(*chain);
                }
                !passed
            });
            self.left_behind_chains.store(left_behind.len(), Ordering::Relaxed);
        }
    }
}

impl Stock {
    pub(crate) fn new(indices: &Arc<Indices>) -> Self {
        Self {
            indices: Arc::clone(indices),
            free: Chain::default(),
            fresh: 0..0,
            retired: Chain::default(),
            waiting: [None; WAITING],
        }
    }

    /// Whether this is a part of `indices`.
    pub(crate) fn is_of(&self, indices: &Arc<Indices>) -> bool {
        Arc::ptr_eq(&self.indices, indices)
    }

    /// An index that nobody uses, or nothing if all are in use or wait for turns to end.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        // Asking whether turns are over costs a fence, so only once for a batch.
        if self.free.len == 0 {
            self.settle();
        }
        self.next_in_stock().or_else(|| {
            self.indices.adopt();
            self.next_in_stock()
        })
    }

    fn next_in_stock(&mut self) -> Option<u32> {
        if self.free.len == 0 {
            self.free = self.indices.take();
        }
        if self.free.len != 0 {
            let index = self.free.first;
            self.free.first = self.indices.link(index).load(Ordering::Relaxed);
            self.free.len -= 1;
            return Some(index - 1);
        }
        if self.fresh.is_empty() {
            self.fresh = self.indices.take_fresh();
        }
        self.fresh.next()
    }

    /// Gives back an index that was unlinked in this turn.
    pub(crate) fn retire(&mut self, index: u32) {
        let (index, chain) = (index + 1, &mut self.retired);
        self.indices.link(index).store(chain.first, Ordering::Relaxed);
        *chain = Chain { first: index, last: if chain.len == 0 { index } else { chain.last }, len: chain.len + 1 };
    }

    /// Frees what is no longer read, and starts the waiting of what was retired.
    pub(crate) fn settle(&mut self) {
        while let Some((epoch, chain)) = self.waiting[0] {
            if !self.indices.domain.passed(epoch) {
                break;
            }
            self.indices.push(chain);
            self.waiting[0] = None;
            self.waiting.rotate_left(1);
        }
        if self.retired.len != 0 {
            let place = self.waiting.iter().position(Option::is_none).unwrap_or(WAITING - 1);
            let mut chain = std::mem::take(&mut self.retired);
            if let Some((_, newest)) = self.waiting[place] {
                // No room for one more epoch: the newest chain waits again, for a later one. The older ones do not, so
                // that room comes.
                self.indices.link(chain.last).store(newest.first, Ordering::Relaxed);
                chain = Chain { first: chain.first, last: newest.last, len: chain.len + newest.len };
            }
            self.waiting[place] = Some((self.indices.domain.retire_epoch(), chain));
        }
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        self.indices.push(std::mem::take(&mut self.free));
        for index in self.fresh.clone() {
            self.indices.push(Chain { first: index + 1, last: index + 1, len: 1 });
        }
        let mut left: Vec<_> = self.waiting.iter_mut().filter_map(Option::take).collect();
        if self.retired.len != 0 {
            left.push((self.indices.domain.retire_epoch(), self.retired));
        }
        if !left.is_empty() {
            let mut left_behind = self.indices.left_behind.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            left_behind.append(&mut left);
            self.indices.left_behind_chains.store(left_behind.len(), Ordering::Relaxed);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::{collections::HashSet, net::Ipv4Addr};

    use super::*;
    use crate::arrays::{Arrays, Layout};

    fn indices(capacity: u32, domain: Arc<Domain>) -> Arc<Indices> {
        let Arrays { links, used, .. } = Arrays::new(&Layout::new::<Ipv4Addr>(7, capacity));
        Indices::new(links, used, domain)
    }

    #[test]
    fn each_index_is_given_out_once_and_comes_back_after_the_turn() {
        let count = if cfg!(miri) { 200 } else { 10_000 };
        let domain = Domain::new();
        let indices = indices(count, domain.clone());
        let mut participant = domain.join();
        let mut stocks = [Stock::new(&indices), Stock::new(&indices)];
        for round in 0..3 {
            let turn = participant.enter();
            let mut given: Vec<u32> = Vec::new();
            while let Some(index) = stocks[given.len() % 2].allocate() {
                given.push(index);
            }
            // At the end a stock may still hold a batch that the other cannot reach.
            assert!(given.len() > count as usize - 16 && given.iter().all(|index| *index < count), "round {round}");
            assert_eq!(given.iter().collect::<HashSet<_>>().len(), given.len());
            for index in &given {
                stocks[*index as usize % 2].retire(*index);
                if index % 100 < 3 {
                    stocks[*index as usize % 2].settle();
                }
            }
            assert_eq!(stocks[0].allocate().into_iter().chain(stocks[1].allocate()).count(), 0, "still readable");
            drop(turn);
        }
        assert_eq!(indices.used(), count);
    }

    #[test]
    fn a_worker_that_ends_leaves_nothing_behind() {
        let domain = Domain::new();
        let indices = indices(100, domain.clone());
        let mut participant = domain.join();
        let turn = participant.enter();
        let mut ending = Stock::new(&indices);
        let given: Vec<u32> = (0..60).filter_map(|_| ending.allocate()).collect();
        given.iter().take(30).for_each(|index| ending.retire(*index));
        ending.settle();
        given.iter().skip(30).for_each(|index| ending.retire(*index));
        drop(ending);
        let mut other = Stock::new(&indices);
        assert_eq!(std::iter::from_fn(|| other.allocate()).count(), 40);
        drop(turn);
        assert_eq!(std::iter::from_fn(|| other.allocate()).count(), 60);
    }

    #[test]
    fn threads_never_hold_the_same_index() {
        let domain = Domain::new();
        let indices = indices(64, domain.clone());
        let held: Vec<AtomicU32> = (0..64).map(|_| AtomicU32::new(0)).collect();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let (mut stock, mut participant) = (Stock::new(&indices), domain.join());
                    for round in 0..if cfg!(miri) { 100 } else { 50_000 } {
                        let _turn = participant.enter();
                        if let Some(index) = stock.allocate() {
                            assert_eq!(held[index as usize].swap(1, Ordering::AcqRel), 0, "round {round}");
                            held[index as usize].store(0, Ordering::Release);
                            stock.retire(index);
                        }
                    }
                });
            }
        });
    }
}
