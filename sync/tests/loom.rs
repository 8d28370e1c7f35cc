//! Models of quiescence and published snapshots, run through every interleaving that the memory model allows:
//! `RUSTFLAGS="--cfg loom" cargo test -p weir-sync --release --test loom`.
#![cfg(loom)]

use weir_sync::{
    Arc, Domain, Published,
    atomic::{AtomicBool, AtomicU64, Ordering},
    model, thread,
};

/// A reader that finds a cell linked never sees it reused; reads of its content are ordered before the reuse.
#[test]
fn what_was_unlinked_is_not_reused_under_a_reader() {
    model(|| {
        let domain = Domain::new();
        let linked = Arc::new(AtomicBool::new(true));
        let content = Arc::new(AtomicU64::new(1));
        let reader = {
            let (mut participant, linked, content) = (domain.join(), linked.clone(), content.clone());
            thread::spawn(move || {
                for _ in 0..2 {
                    let _turn = participant.enter();
                    if linked.load(Ordering::Relaxed) {
                        assert_eq!(content.load(Ordering::Relaxed), 1, "reused under a reader");
                    }
                }
            })
        };
        linked.store(false, Ordering::Relaxed);
        let epoch = domain.retire_epoch();
        if domain.passed(epoch) {
            content.store(2, Ordering::Relaxed);
        }
        reader.join().unwrap();
        assert!(domain.passed(epoch));
    });
}

/// A participant that joins while something is being retired is either seen, or does not find it.
#[test]
fn a_late_participant_is_seen_or_finds_nothing() {
    model(|| {
        let domain = Domain::new();
        let linked = Arc::new(AtomicBool::new(true));
        let content = Arc::new(AtomicU64::new(1));
        let reader = {
            let (domain, linked, content) = (domain.clone(), linked.clone(), content.clone());
            thread::spawn(move || {
                let mut participant = domain.join();
                let _turn = participant.enter();
                if linked.load(Ordering::Relaxed) {
                    assert_eq!(content.load(Ordering::Relaxed), 1, "reused under a reader");
                }
            })
        };
        linked.store(false, Ordering::Relaxed);
        if domain.passed(domain.retire_epoch()) {
            content.store(2, Ordering::Relaxed);
        }
        reader.join().unwrap();
    });
}

struct Snapshot {
    freed: Arc<AtomicBool>,
    value: AtomicU64,
}

impl Snapshot {
    fn new(value: u64) -> (Self, Arc<AtomicBool>) {
        let freed = Arc::new(AtomicBool::new(false));
        (Self { freed: freed.clone(), value: AtomicU64::new(value) }, freed)
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        self.freed.store(true, Ordering::Relaxed);
    }
}

/// A loaded snapshot is complete, and not freed before its turn ends.
#[test]
fn a_loaded_snapshot_is_whole_and_alive() {
    model(|| {
        let domain = Domain::new();
        let (first, first_freed) = Snapshot::new(1);
        let (second, second_freed) = Snapshot::new(2);
        let published = Arc::new(Published::new(&domain, first));
        let reader = {
            let (mut participant, published) = (domain.join(), published.clone());
            thread::spawn(move || {
                let turn = participant.enter();
                let snapshot = published.load(&turn);
                let (value, freed) = match snapshot.value.load(Ordering::Relaxed) {
                    1 => (1, &first_freed),
                    value => (value, &second_freed),
                };
                assert!(value == 1 || value == 2);
                assert!(!freed.load(Ordering::Relaxed), "freed under a reader");
            })
        };
        published.publish(second);
        published.collect();
        reader.join().unwrap();
        assert_eq!(published.collect(), 0);
    });
}
