//! What the loader of files and the watch of them tell each other: what is to be looked at again though nothing happens to it, and that an
//! operator has asked for a reload.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{sync::Notify, time::Instant};

/// Shared by a [`super::watch::Watch`] and a loader; clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Revisit(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    awaited: Mutex<Awaited>,
    changed: Notify,
    believes: AtomicBool,
}

/// What is to be looked at again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Awaited {
    /// Files that were not read as somebody was writing them: as soon as one is closed.
    pub written: Vec<PathBuf>,
    /// When to read again in any case.
    pub at: Option<Instant>,
}

impl Revisit {
    /// Says what is to be looked at again, instead of what was said before.
    pub fn set(&self, awaited: Awaited) {
        *self.0.awaited.lock().unwrap_or_else(PoisonError::into_inner) = awaited;
        self.0.changed.notify_one();
    }

    /// The same where it is still `before` that is said.
    pub fn replace(&self, before: &Awaited, awaited: Awaited) {
        let mut said = self.0.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        if *said == *before {
            *said = awaited;
        }
    }

    /// What is to be looked at again.
    pub fn awaited(&self) -> Awaited {
        self.0.awaited.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until something else is to be looked at again. Cancel-safe.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// From now on the next reading believes what it finds, also where that is nothing.
    pub fn believe(&self) {
        self.0.believes.store(true, Ordering::Release);
    }

    /// Whether to believe what is found, this time.
    pub fn takes_belief(&self) -> bool {
        self.0.believes.swap(false, Ordering::AcqRel)
    }
}
