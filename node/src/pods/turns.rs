//! Requests of one pod or one sandbox take turns; others do not wait for each other.

use std::{
    collections::HashSet,
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

/// Who works at what.
#[derive(Default)]
pub struct Turns {
    held: Mutex<HashSet<String>>,
    changed: Condvar,
}

/// Held while one works.
pub struct Turn<'t> {
    turns: &'t Turns,
    keys: Vec<String>,
}

impl Turns {
    /// Takes all the keys at once, when nobody holds any of them.
    pub fn take(&self, keys: Vec<String>, limit: Duration) -> Option<Turn<'_>> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let busy = |held: &mut HashSet<String>| keys.iter().any(|key| held.contains(key));
        let (mut held, timeout) =
            self.changed.wait_timeout_while(held, limit, busy).unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            return None;
        }
        held.extend(keys.iter().cloned());
        drop(held);
        Some(Turn { turns: self, keys })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut held = self.turns.held.lock().unwrap_or_else(PoisonError::into_inner);
        for key in &self.keys {
            held.remove(key);
        }
        drop(held);
        self.turns.changed.notify_all();
    }
}
