//! Quiescence: telling when nobody can still be reading what was taken out of a shared structure.
//!
//! # What
//! A [`Domain`] has participants, usually one per worker thread and one per control thread. A participant reads
//! shared structures only inside a [`Turn`], in the dataplane one burst of packets. Whoever unlinks something takes
//! an [`Epoch`] afterwards ([`Domain::retire_epoch`]); once [`Domain::passed`] says so, every turn that could have
//! found it is over, and it may be freed or reused. Outside a turn (asleep, waiting for packets) a participant
//! holds nothing up.
//!
//! This is epoch-based reclamation (Fraser, "Practical lock-freedom", 2004, section 5.2.3) without its limit that
//! the epoch advances only when all have seen it: the epoch counts up with each retirement, and each is compared
//! with the oldest turn under way, as in RCU (McKenney and Slingwine, 1998).
//!
//! # Layout
//! One counter, the epoch, and a fixed array of seats of one padded cache line each. A seat holds 0 while its
//! participant is outside a turn, else the epoch that was current when the turn began. Only its participant writes
//! a seat, so that entering and leaving share no written line with other workers.
//!
//! # Invariants and memory ordering
//! Let R be a reader that found an object X in a turn, and W the one that unlinked X, took the epoch e, and asks
//! whether e has passed.
//!
//! 1. *R entered at an epoch g <= e.* `retire_epoch` is an `AcqRel` increment after the unlinking; a turn that
//!    reads an epoch > e (`Acquire`) therefore happens after the unlinking and cannot find X.
//! 2. *W sees R's seat.* R: store seat, `SeqCst` fence, read X's link. W: unlink, `SeqCst` fence, read the seats
//!    (Dekker's pattern). Of two such fences one comes first: either W reads R's seat or R reads the link as it was
//!    after the unlinking. The same holds for the number of seats in use.
//! 3. *R's last read happens before W's reuse.* Every store to a seat is a `Release` (also that of a later turn),
//!    and W reads seats with `Acquire`.
//!
//! So `passed(e)` needs: each seat is 0 or greater than e. The answer may be remembered: a later turn may still have
//! read an old epoch, so that asking again says no for a while, but what was unlinked it cannot find.
//!
//! # Thread safety
//! Everything is wait-free but [`Domain::join`]. A [`Turn`] borrows its participant exclusively, so turns do not
//! nest; they may be sent and shared, as the fence of 2 happens before whatever another thread does with a turn that
//! it was given.

use crossbeam::utils::CachePadded;

use crate::{
    Arc,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
};

/// A seat's value while its participant is outside a turn. Epochs count from 1.
const OUTSIDE: u64 = 0;

/// Who may take part at the same time: one per worker and a few control threads.
#[cfg(not(loom))]
pub const MAX_PARTICIPANTS: usize = 256;
/// Who may take part at the same time in a model.
#[cfg(loom)]
pub const MAX_PARTICIPANTS: usize = 3;

/// A point in time, before which something was unlinked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Epoch(u64);

#[derive(Debug)]
struct Seat {
    taken: AtomicBool,
    turn: AtomicU64,
}

/// A set of participants and the epochs between them.
#[derive(Debug)]
pub struct Domain {
    epoch: CachePadded<AtomicU64>,
    /// Seats from this one on were never taken.
    seats_used: CachePadded<AtomicUsize>,
    seats: Box<[CachePadded<Seat>]>,
}

impl Domain {
    /// A domain without participants: two padded cache lines, and one for each of [`MAX_PARTICIPANTS`].
    pub fn new() -> Arc<Self> {
        let seat = || CachePadded::new(Seat { taken: AtomicBool::new(false), turn: AtomicU64::new(OUTSIDE) });
        Arc::new(Self {
            epoch: CachePadded::new(AtomicU64::new(OUTSIDE + 1)),
            seats_used: CachePadded::new(AtomicUsize::new(0)),
            seats: (0..MAX_PARTICIPANTS).map(|_| seat()).collect(),
        })
    }

    /// A new participant, outside a turn.
    ///
    /// # Panics
    /// Where [`MAX_PARTICIPANTS`] exist already.
    pub fn join(self: &Arc<Self>) -> Participant {
        let seat = self
            .seats
            .iter()
            .position(|seat| seat.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok())
            .expect("a domain has at most MAX_PARTICIPANTS participants at a time; drop those of threads that ended");
        self.seats_used.fetch_max(seat + 1, Ordering::Relaxed);
        Participant { domain: Arc::clone(self), seat }
    }

    /// Ends an epoch: [`Domain::passed`] of the returned one is true once every turn that was under way is over.
    ///
    /// To be called after unlinking. Costs one shared read-modify-write: take one for all that one turn unlinks.
    pub fn retire_epoch(&self) -> Epoch {
        Epoch(self.epoch.fetch_add(1, Ordering::AcqRel))
    }

    /// Whether every turn is over that was under way when `epoch` ended. A yes holds for good and may be remembered.
    pub fn passed(&self, epoch: Epoch) -> bool {
        fence(Ordering::SeqCst);
        let used = self.seats_used.load(Ordering::Relaxed);
        self.seats[..used].iter().all(|seat| {
            let turn = seat.turn.load(Ordering::Acquire);
            turn == OUTSIDE || turn > epoch.0
        })
    }
}

/// A `Release` store, then a `SeqCst` fence.
///
/// On x86 a locked exchange is both, in a third of the time of the fence's own instruction: no load or store is moved across a locked instruction (Intel, SDM
/// volume 3A, "Memory ordering"; AMD64 volume 2, 7.4.2), so neither the store nor an earlier one is held back behind later loads. That is the processor's promise
/// and not the language's, so the compiler is held to the order by a fence of its own, and loom and miri, which know the language, get the fence.
#[inline]
fn store_and_fence(word: &AtomicU64, value: u64) {
    if cfg!(all(target_arch = "x86_64", not(loom), not(miri))) {
        word.swap(value, Ordering::SeqCst);
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
    } else {
        word.store(value, Ordering::Release);
        fence(Ordering::SeqCst);
    }
}

/// One who reads, usually a thread. Sendable; dropping it frees its seat.
#[derive(Debug)]
pub struct Participant {
    domain: Arc<Domain>,
    seat: usize,
}

impl Participant {
    /// Begins a turn: one fence, no write to a line that others write.
    #[inline]
    pub fn enter(&mut self) -> Turn<'_> {
        let epoch = self.domain.epoch.load(Ordering::Acquire);
        store_and_fence(&self.seat().turn, epoch);
        Turn { participant: self }
    }

    /// The domain that it takes part in.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    #[inline]
    fn seat(&self) -> &Seat {
        &self.domain.seats[self.seat]
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        // A turn that was forgotten instead of dropped has left its epoch behind.
        self.seat().turn.store(OUTSIDE, Ordering::Release);
        self.seat().taken.store(false, Ordering::Release);
    }
}

/// Leave to read what is shared; what it finds is neither freed nor reused before the turn is dropped.
#[derive(Debug)]
#[must_use = "a turn ends where it is dropped"]
pub struct Turn<'p> {
    participant: &'p mut Participant,
}

impl Turn<'_> {
    /// Whether this is a turn of `domain`.
    #[inline]
    pub fn is_of(&self, domain: &Arc<Domain>) -> bool {
        Arc::ptr_eq(&self.participant.domain, domain)
    }
}

impl Drop for Turn<'_> {
    #[inline]
    fn drop(&mut self) {
        self.participant.seat().turn.store(OUTSIDE, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_passes_when_the_turns_of_its_time_are_over() {
        let domain = Domain::new();
        let (mut early, mut late) = (domain.join(), domain.join());
        let turn = early.enter();
        let epoch = domain.retire_epoch();
        assert!(!domain.passed(epoch));
        let later = late.enter();
        assert!(!domain.passed(epoch));
        drop(turn);
        assert!(domain.passed(epoch), "a turn that began after the epoch does not hold it up");
        assert!(!domain.passed(domain.retire_epoch()));
        drop(later);
        assert!(early.enter().is_of(&domain));
        assert!(domain.passed(epoch));
    }

    #[test]
    fn a_participant_outside_a_turn_holds_nothing_up() {
        let domain = Domain::new();
        let asleep = domain.join();
        assert!(domain.passed(domain.retire_epoch()));
        drop(asleep);
        assert!(domain.passed(domain.retire_epoch()));
    }

    #[test]
    fn a_seat_is_free_again_after_a_forgotten_turn() {
        let domain = Domain::new();
        let mut participant = domain.join();
        std::mem::forget(participant.enter());
        let epoch = domain.retire_epoch();
        assert!(!domain.passed(epoch));
        drop(participant);
        assert!(domain.passed(epoch));
        let everyone: Vec<_> = (0..MAX_PARTICIPANTS).map(|_| domain.join()).collect();
        drop(everyone);
        assert!(!domain.join().enter().is_of(&Domain::new()));
    }

    #[test]
    #[should_panic(expected = "MAX_PARTICIPANTS")]
    fn seats_are_bounded() {
        let domain = Domain::new();
        let _everyone: Vec<_> = (0..=MAX_PARTICIPANTS).map(|_| domain.join()).collect();
    }
}
