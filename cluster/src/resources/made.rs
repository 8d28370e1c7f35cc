//! What was made of objects, kept for as long as they are unchanged.
//!
//! - [`Made`]: of one object alone. It lies with the object's content, and is made once for all loads that have it.
//! - [`Memo`]: of several objects. It is made again where one of them is another.

use std::{
    any::Any,
    fmt,
    hash::Hash,
    sync::{Arc, OnceLock},
};

use hashbrown::{HashMap, hash_map};

use crate::text::Diagnostic;

/// What was made of one object, one value of each type: a list that only grows.
#[derive(Default)]
pub(super) struct Made {
    first: OnceLock<Box<Link>>,
}

/// A [`Fact`] of some type, in one piece of memory with its link.
struct Link<F: ?Sized = dyn Any + Send + Sync> {
    next: Made,
    fact: F,
}

/// A value that was made, with what there was to say about the object, at places counted from the beginning of its piece of text.
pub(super) struct Fact<F> {
    pub(super) value: F,
    pub(super) findings: Box<[Diagnostic]>,
}

impl Made {
    /// The fact of this type; the first time it is made.
    pub(super) fn get<F: Send + Sync + 'static>(&self, make: impl FnOnce() -> Fact<F>) -> &Fact<F> {
        let mut made = self;
        let mut make = Some(make);
        loop {
            let link = made.first.get_or_init(|| {
                let make = make.take().expect("the list ends once");
                Box::new(Link { next: Self::default(), fact: make() })
            });
            match link.fact.downcast_ref() {
                Some(fact) => return fact,
                None => made = &link.next,
            }
        }
    }
}

impl fmt::Debug for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Made").field("any", &self.first.get().is_some()).finish()
    }
}

/// A shared value as an input of a [`Memo`]: equal only to itself.
#[derive(Debug)]
pub struct Same<T>(pub Arc<T>);

impl<T> Clone for Same<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> PartialEq for Same<T> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Values by key, each with the inputs that it was made of. Values that were not asked for between two calls of [`Memo::turn`] are
/// forgotten.
#[derive(Debug)]
pub struct Memo<K, I, V> {
    kept: HashMap<K, Entry<I, V>>,
    turn: bool,
}

#[derive(Debug)]
struct Entry<I, V> {
    inputs: I,
    value: V,
    /// When it was last asked for: in this turn, or in the one before.
    turn: bool,
}

impl<K, I, V> Default for Memo<K, I, V> {
    fn default() -> Self {
        Self { kept: HashMap::new(), turn: false }
    }
}

impl<K: Eq + Hash, I, V> Memo<K, I, V> {
    /// Begins another pass.
    pub fn turn(&mut self) {
        let turn = self.turn;
        self.kept.retain(|_, entry| entry.turn == turn);
        self.turn = !turn;
    }

    /// The value for `key`: what is kept, if the inputs that it was made of `are_equal` to those of now; else what `make` makes, which gets the
    /// one before.
    pub fn get(&mut self, key: K, are_equal: impl FnOnce(&I) -> bool, make: impl FnOnce(Option<&V>) -> (I, V)) -> &V {
        let turn = self.turn;
        let made = |(inputs, value)| Entry { inputs, value, turn };
        match self.kept.entry(key) {
            hash_map::Entry::Occupied(kept) => {
                let kept = kept.into_mut();
                if are_equal(&kept.inputs) {
                    kept.turn = turn;
                } else {
                    *kept = made(make(Some(&kept.value)));
                }
                &kept.value
            }
            hash_map::Entry::Vacant(free) => &free.insert(made(make(None))).value,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_of_each_type_is_made_once() {
        let made = Made::default();
        let fact = |value| Fact { value, findings: Box::default() };
        assert_eq!(made.get(|| fact(7_u32)).value, 7);
        assert_eq!(made.get(|| Fact { value: "text", findings: Box::default() }).value, "text");
        assert_eq!(made.get::<u32>(|| unreachable!("it is there")).value, 7);
        assert_eq!(made.get::<&str>(|| unreachable!("it is there")).value, "text");
    }

    #[test]
    fn a_memo_keeps_what_has_the_same_inputs_and_forgets_what_nobody_asks_for() {
        let mut memo = Memo::default();
        let (one, other) = (Same(Arc::new(1)), Same(Arc::new(1)));
        let mut made = 0;
        let mut get = |memo: &mut Memo<_, _, _>, key: u8, input: &Same<i32>| {
            let make = |_: Option<&i32>| {
                made += 1;
                (input.clone(), made)
            };
            *memo.get(key, |known| known == input, make)
        };
        assert_eq!([get(&mut memo, 1, &one), get(&mut memo, 2, &one)], [1, 2]);
        memo.turn();
        assert_eq!(get(&mut memo, 1, &one), 1);
        memo.turn();
        // Equal is not the same; and the value for 2 was not asked for.
        assert_eq!([get(&mut memo, 1, &other), get(&mut memo, 2, &one)], [3, 4]);
    }
}
