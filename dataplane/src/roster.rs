//! Which places of a fixed table are taken: found by hash, in the order in which they were taken, counted by who has them.
//!
//! *Layout.* The places that share a hash bucket are chained, and all that are taken are in one list by age; both are indices in one small array,
//! beside the table itself, so that looking for one to give up touches 8 KB and no entry of the table. Those that are free are chained by the
//! same field. All is allocated once.
//!
//! *Invariants.* (1) A place is either in exactly one bucket's chain and in the list by age, or in the chain of free ones. (2) `counts` are those of the
//! taken ones by owner.

/// Owners that are told apart; more share counts.
pub(crate) const OWNERS: usize = 64;
const _: () = assert!(OWNERS <= u8::MAX as usize);

/// The end of a chain.
const NONE: u16 = u16::MAX;

#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: u32,
    /// The next of its bucket, or the next free one.
    next: u16,
    older: u16,
    newer: u16,
    owner: u8,
    is_taken: bool,
}

/// The places of a table.
#[derive(Debug)]
pub(crate) struct Roster {
    entries: Box<[Entry]>,
    /// The first of each bucket: twice as many as places.
    buckets: Box<[u16]>,
    free: u16,
    oldest: u16,
    newest: u16,
    counts: [u16; OWNERS],
}

impl Roster {
    /// Of so many places, all free.
    pub(crate) fn new(places: usize) -> Self {
        assert!((1..usize::from(NONE)).contains(&places), "a place is 16 bits");
        let unused = Entry { hash: 0, next: NONE, older: NONE, newer: NONE, owner: 0, is_taken: false };
        let mut entries = vec![unused; places].into_boxed_slice();
        for (place, entry) in entries.iter_mut().enumerate().take(places - 1) {
            entry.next = place as u16 + 1;
        }
        let buckets = vec![NONE; 2 * places].into();
        Self { entries, buckets, free: 0, oldest: NONE, newest: NONE, counts: [0; OWNERS] }
    }

    /// The taken place of that hash for which `is_it` holds.
    pub(crate) fn find(&self, hash: u32, is_it: impl Fn(u16) -> bool) -> Option<u16> {
        let mut place = self.buckets[self.bucket(hash)];
        while place != NONE {
            let entry = self.at(place);
            if entry.hash == hash && is_it(place) {
                return Some(place);
            }
            place = entry.next;
        }
        None
    }

    /// Takes a free place for `owner`, below [`OWNERS`]; it is the newest then.
    pub(crate) fn take(&mut self, hash: u32, owner: u8) -> Option<u16> {
        let place = self.free;
        if place == NONE {
            return None;
        }
        self.free = self.at(place).next;
        let bucket = self.bucket(hash);
        let newest = std::mem::replace(&mut self.newest, place);
        *self.at_mut(place) =
            Entry { hash, next: self.buckets[bucket], older: newest, newer: NONE, owner, is_taken: true };
        self.buckets[bucket] = place;
        match newest {
            NONE => self.oldest = place,
            newest => self.at_mut(newest).newer = place,
        }
        self.counts[usize::from(owner)] += 1;
        Some(place)
    }

    /// Frees a place, if it is taken.
    pub(crate) fn release(&mut self, place: u16) {
        let Entry { hash, next, older, newer, owner, is_taken } = *self.at(place);
        if !is_taken {
            return;
        }
        let bucket = self.bucket(hash);
        if self.buckets[bucket] == place {
            self.buckets[bucket] = next;
        } else {
            let mut before = self.buckets[bucket];
            while self.at(before).next != place {
                before = self.at(before).next;
            }
            self.at_mut(before).next = next;
        }
        match older {
            NONE => self.oldest = newer,
            older => self.at_mut(older).newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.at_mut(newer).older = older,
        }
        self.counts[usize::from(owner)] -= 1;
        let free = std::mem::replace(&mut self.free, place);
        *self.at_mut(place) = Entry { next: free, is_taken: false, ..*self.at(place) };
    }

    /// The taken places with their owners, the one first that was taken first.
    pub(crate) fn by_age(&self) -> impl Iterator<Item = (u16, u8)> {
        let follow = |place: u16| (place != NONE).then_some(place);
        std::iter::successors(follow(self.oldest), move |place| follow(self.at(*place).newer))
            .map(|place| (place, self.at(place).owner))
    }

    /// Who has most places, if giving one of them to `owner` leaves him no fewer than that one then has.
    pub(crate) fn gives_to(&self, owner: u8) -> Option<u8> {
        let (most, count) = self.counts.iter().enumerate().max_by_key(|(_, count)| **count)?;
        (*count > self.counts[usize::from(owner)] + 1).then_some(most as u8)
    }

    fn bucket(&self, hash: u32) -> usize {
        hash as usize % self.buckets.len()
    }

    fn at(&self, place: u16) -> &Entry {
        &self.entries[usize::from(place)]
    }

    fn at_mut(&mut self, place: u16) -> &mut Entry {
        &mut self.entries[usize::from(place)]
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::select};

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Take(u32, u8),
        Release(u16),
    }

    proptest! {
        /// Beside a list of what is taken, which is searched from its beginning.
        #[test]
        fn it_is_a_list_by_age(steps in proptest::collection::vec(
            prop_oneof![
                (select(vec![0_u32, 1, 16, 17, 32]), 0..3_u8).prop_map(|(hash, owner)| Step::Take(hash, owner)),
                (0..8_u16).prop_map(Step::Release),
            ],
            0..100,
        )) {
            let mut roster = Roster::new(8);
            let mut list: Vec<(u16, u32, u8)> = Vec::new();
            for step in steps {
                match step {
                    Step::Take(hash, owner) => {
                        let place = roster.take(hash, owner);
                        prop_assert_eq!(place.is_some(), list.len() < 8);
                        if let Some(place) = place {
                            prop_assert!(list.iter().all(|(taken, ..)| *taken != place));
                            list.push((place, hash, owner));
                        }
                    }
                    Step::Release(place) => {
                        roster.release(place);
                        list.retain(|(taken, ..)| *taken != place);
                    }
                }
                let by_age: Vec<_> = list.iter().map(|(place, _, owner)| (*place, *owner)).collect();
                prop_assert_eq!(roster.by_age().collect::<Vec<_>>(), by_age);
                for (place, hash, _) in &list {
                    prop_assert_eq!(roster.find(*hash, |found| found == *place), Some(*place));
                    prop_assert_eq!(roster.find(hash + 1000, |found| found == *place), None);
                }
                for owner in 0..3 {
                    let count = |owner: u8| list.iter().filter(|(.., of)| *of == owner).count();
                    let most = (0..3).map(count).max().unwrap();
                    let gives = roster.gives_to(owner).map(count);
                    prop_assert_eq!(gives, (most > count(owner) + 1).then_some(most));
                }
            }
        }
    }
}
