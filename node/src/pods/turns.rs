//! Requests of one pod or one sandbox take turns, in the order in which they came; others do not wait for each other.
//!
//! The order matters: where a runtime has started again, requests of the one before may still be under way, and what it wants is what it asked for
//! last.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Who works at what, and who waits for it.
#[derive(Default)]
pub struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    held: HashSet<String>,
    /// In the order in which they came.
    waiting: VecDeque<(u64, Vec<String>)>,
    next_ticket: u64,
}

impl State {
    /// Whether somebody holds a key of this ticket, or waits for one and came before.
    fn must_wait(&self, ticket: u64) -> bool {
        let Some(own) = self.waiting.iter().position(|(waiting, _)| *waiting == ticket) else { return false };
        let keys = &self.waiting[own].1;
        let earlier = self.waiting.iter().take(own).flat_map(|(_, keys)| keys);
        keys.iter().any(|key| self.held.contains(key)) || earlier.into_iter().any(|key| keys.contains(key))
    }
}

/// Held while one works.
pub struct Turn<'t> {
    turns: &'t Turns,
    keys: Vec<String>,
}

impl Turns {
    /// Takes all the keys at once, when nobody holds any of them and nobody who came before wants one.
    pub fn take(&self, keys: Vec<String>, limit: Duration) -> Option<Turn<'_>> {
        let mut state = self.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.waiting.push_back((ticket, keys.clone()));
        let must_wait = |state: &mut State| state.must_wait(ticket);
        let (mut state, timeout) =
            self.changed.wait_timeout_while(state, limit, must_wait).unwrap_or_else(PoisonError::into_inner);
        state.waiting.retain(|(waiting, _)| *waiting != ticket);
        if timeout.timed_out() {
            drop(state);
            // Others may have waited for this one only.
            self.changed.notify_all();
            return None;
        }
        state.held.extend(keys.iter().cloned());
        drop(state);
        Some(Turn { turns: self, keys })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }
}

impl Turn<'_> {
    /// Whether it is one of that key too.
    pub fn has(&self, key: &str) -> bool {
        self.keys.iter().any(|own| own == key)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.turns.lock();
        for key in &self.keys {
            state.held.remove(key);
        }
        drop(state);
        self.turns.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn keys(keys: &[&str]) -> Vec<String> {
        keys.iter().map(|key| (*key).to_owned()).collect()
    }

    /// Waits until so many wait.
    fn until_waiting(turns: &Turns, count: usize) {
        while turns.waiting() != count {
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn turns_are_taken_in_the_order_of_arrival() {
        for _ in 0..20 {
            let turns = Turns::default();
            let order = Mutex::new(Vec::new());
            let first = turns.take(keys(&["pod"]), LONG).unwrap();
            thread::scope(|scope| {
                // ADD(A), DEL(A), ADD(B) and more, of one pod.
                for index in 0..6 {
                    let (turns, order) = (&turns, &order);
                    scope.spawn(move || {
                        let mine = if index % 2 == 0 { keys(&["sandbox", "pod"]) } else { keys(&["pod"]) };
                        let _turn = turns.take(mine, LONG).unwrap();
                        order.lock().unwrap().push(index);
                    });
                    until_waiting(turns, index + 1);
                }
                // Another pod's waits for nobody.
                drop(turns.take(keys(&["other"]), Duration::ZERO).unwrap());
                drop(first);
            });
            assert_eq!(order.into_inner().unwrap(), [0, 1, 2, 3, 4, 5]);
        }
    }

    #[test]
    fn who_gives_up_is_in_nobodys_way() {
        let turns = Turns::default();
        let first = turns.take(keys(&["a"]), LONG).unwrap();
        thread::scope(|scope| {
            let gives_up = scope.spawn(|| turns.take(keys(&["a", "b"]), Duration::from_millis(200)).is_none());
            until_waiting(&turns, 1);
            // It came later, and what it wants is free but for the one that waits.
            assert!(turns.take(keys(&["b"]), LONG).is_some());
            assert!(gives_up.join().unwrap());
        });
        assert!(turns.take(keys(&["a"]), Duration::ZERO).is_none());
        drop(first);
        assert!(turns.take(keys(&["a"]), Duration::ZERO).is_some());
        assert_eq!(turns.waiting(), 0);
    }
}
