//! What threads share: quiescence, published snapshots, per-worker counters.
//!
//! - [`domain`]: [`Domain`], quiescence: when may what others could still be reading be freed or reused?
//! - [`published`]: [`Published`], an immutable snapshot that one thread replaces and all workers read.
//! - [`counters`]: [`Counters`], numbers that each worker counts alone and anyone sums; [`Gauge`](counters::Gauge), one that all change.
//! - [`tally`]: [`Tally`], the same by number, as many as a compiled table has.
//!
//! This crate is also the only one that names the standard library's atomics, or loom, which takes their place under
//! `--cfg loom` to run a test through every interleaving and every outcome that the memory model allows. Other crates
//! import [`atomic`], [`thread`], [`Arc`] and [`Mutex`] from here.

pub mod counters;
pub mod domain;
pub mod published;
pub mod tally;

pub use counters::{Counters, Gauge, WorkerCounters, WorkerNumber};
pub use crossbeam::utils::CachePadded;
pub use domain::{Domain, Epoch, Participant, Turn};
pub use published::Published;
pub use tally::Tally;

/// Atomics and fences: the standard library's, or loom's.
pub mod atomic {
    #[cfg(loom)]
    pub use loom::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };
    #[cfg(not(loom))]
    pub use std::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };
}

/// Threads: the standard library's, or loom's.
pub mod thread {
    #[cfg(loom)]
    pub use loom::thread::{JoinHandle, spawn, yield_now};
    #[cfg(not(loom))]
    pub use std::thread::{JoinHandle, spawn, yield_now};
}

#[cfg(loom)]
pub use loom::sync::{Mutex, MutexGuard};
#[cfg(not(loom))]
pub use std::sync::{Mutex, MutexGuard};

/// The standard library's, also under loom: what it counts is never what a model is about, and loom's has no
/// unsized values and no [`std::sync::Arc::as_ptr`].
pub use std::sync::Arc;

/// Runs a closure through every interleaving of the threads that it starts.
#[cfg(loom)]
pub fn model(run: impl Fn() + Sync + Send + 'static) {
    loom::model(run);
}

/// The same with at most so many preemptions, for closures of which all interleavings are too many: nearly all faults
/// show with two (Musuvathi and Qadeer, "Iterative context bounding", PLDI 2007). Ends after 15 seconds if that is
/// still too much, or after LOOM_MAX_DURATION seconds. How many executions there were.
#[cfg(loom)]
pub fn model_bounded(preemptions: usize, run: impl Fn() + Sync + Send + 'static) -> usize {
    let executions = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 100_000;
    builder.max_duration.get_or_insert(std::time::Duration::from_secs(15));
    builder.checkpoint_interval = 1000;
    builder.check({
        let executions = Arc::clone(&executions);
        move || {
            executions.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            run();
        }
    });
    executions.load(std::sync::atomic::Ordering::Relaxed)
}

/// Exclusive access to what a mutex protects, also after another holder panicked: what is protected here is never
/// left half changed.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
