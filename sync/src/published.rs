//! A published snapshot: immutable, replaced as a whole by one thread, read by all.
//!
//! # What
//! Compiled tables (services, policy, forwarding) are built aside and published; workers load the current one once
//! per turn and see nothing half done. A load is one `Acquire` load, and writes nothing.
//!
//! # Invariants and memory ordering
//! `current` is the address of the value that `writer.current` owns; the value is complete before its address is
//! stored (`Release`, paired with the load's `Acquire`). A value that was replaced stays owned in `writer.replaced`,
//! with an epoch taken after the store, until that epoch has passed: see [`crate::domain`], where "unlinking" is the
//! store. A loaded reference lives no longer than the turn that it was loaded in, and than the [`Published`].
//!
//! # Thread safety
//! Writers exclude each other by a mutex that no reader takes.

use crate::{
    Arc, Domain, Epoch, Mutex, Turn,
    atomic::{AtomicPtr, Ordering},
    lock,
};

/// The current snapshot of a `T`, and those before it that may still be in use.
#[derive(Debug)]
pub struct Published<T> {
    current: AtomicPtr<T>,
    domain: Arc<Domain>,
    writer: Mutex<Writer<T>>,
}

#[derive(Debug)]
struct Writer<T> {
    current: Arc<T>,
    replaced: Vec<(Epoch, Arc<T>)>,
}

impl<T> Published<T> {
    /// Publishes the first snapshot, for participants of `domain`.
    pub fn new(domain: &Arc<Domain>, first: impl Into<Arc<T>>) -> Self {
        let current = first.into();
        Self {
            current: AtomicPtr::new(Arc::as_ptr(&current).cast_mut()),
            domain: Arc::clone(domain),
            writer: Mutex::new(Writer { current, replaced: Vec::new() }),
        }
    }

    /// The current snapshot, for as long as the turn lasts.
    ///
    /// # Panics
    /// Where `turn` is of another domain.
    #[inline]
    pub fn load<'t>(&'t self, turn: &'t Turn<'_>) -> &'t T {
        assert!(turn.is_of(&self.domain), "a snapshot is loaded in a turn of its own domain");
        let current = self.current.load(Ordering::Acquire);
        // SAFETY: the address is that of a value owned by `writer`, which drops it only after it was replaced and an
        // epoch taken after that has passed. This turn was entered before the load, so that epoch does not pass
        // before the turn ends; the reference ends with the borrow of the turn. Dropping `self`, which drops every
        // value, needs the borrow of `self` to have ended. Only shared references to the value exist.
        unsafe { &*current }
    }

    /// Replaces the snapshot, and frees earlier ones that nobody can be reading any more.
    pub fn publish(&self, next: impl Into<Arc<T>>) {
        let next = next.into();
        let mut writer = lock(&self.writer);
        self.current.store(Arc::as_ptr(&next).cast_mut(), Ordering::Release);
        let replaced = std::mem::replace(&mut writer.current, next);
        writer.replaced.push((self.domain.retire_epoch(), replaced));
        self.free(&mut writer);
    }

    /// Frees earlier snapshots that nobody can be reading any more; how many are left.
    pub fn collect(&self) -> usize {
        let mut writer = lock(&self.writer);
        self.free(&mut writer);
        writer.replaced.len()
    }

    /// The current snapshot, to keep beyond a turn. Takes the writers' mutex: not for workers.
    pub fn current(&self) -> Arc<T> {
        Arc::clone(&lock(&self.writer).current)
    }

    fn free(&self, writer: &mut Writer<T>) {
        writer.replaced.retain(|(epoch, _)| !self.domain.passed(*epoch));
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    struct Counted(u64, Arc<AtomicUsize>);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.1.fetch_add(1, SeqCst);
        }
    }

    #[test]
    fn a_snapshot_outlives_the_turns_that_read_it() {
        let (domain, dropped) = (Domain::new(), Arc::new(AtomicUsize::new(0)));
        let published = Published::<Counted>::new(&domain, Counted(1, dropped.clone()));
        let mut reader = domain.join();
        let turn = reader.enter();
        let first = published.load(&turn);
        published.publish(Counted(2, dropped.clone()));
        published.publish(Arc::new(Counted(3, dropped.clone())));
        assert_eq!((first.0, published.load(&turn).0, published.current().0), (1, 3, 3));
        assert_eq!((dropped.load(SeqCst), published.collect()), (0, 2));
        drop(turn);
        assert_eq!(published.collect(), 0);
        assert_eq!(dropped.load(SeqCst), 2);
        drop(published);
        assert_eq!(dropped.load(SeqCst), 3);
    }

    #[test]
    #[should_panic(expected = "its own domain")]
    fn a_turn_of_another_domain_is_refused() {
        let published = Published::<u32>::new(&Domain::new(), 1);
        let mut stranger = Domain::new().join();
        published.load(&stranger.enter());
    }

    #[test]
    fn readers_see_whole_snapshots_while_they_change() {
        let domain = Domain::new();
        let published = Published::<Vec<u64>>::new(&domain, vec![0u64; 8]);
        let rounds = if cfg!(miri) { 50 } else { 20_000 };
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let mut reader = domain.join();
                let published = &published;
                scope.spawn(move || {
                    let mut newest = 0;
                    while newest < rounds {
                        let turn = reader.enter();
                        let snapshot = published.load(&turn);
                        assert!(snapshot.iter().all(|value| *value == snapshot[0]) && snapshot[0] >= newest);
                        newest = snapshot[0];
                    }
                });
            }
            for round in 1..=rounds {
                published.publish(vec![round; 8]);
            }
        });
        assert_eq!(published.collect(), 0);
    }
}
