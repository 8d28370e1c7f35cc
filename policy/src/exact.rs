//! A map from single addresses to values, for many of them.
//!
//! A hash table whose buckets are cache lines: each has places for 8 IPv4 or 3 IPv6 addresses with their values, of which three
//! quarters are taken. An address is in its own bucket or, where that was full, in one after it; a bucket with a free place ends
//! the search, so most lookups read one line, also of what is not there. All places of a bucket are compared, without a
//! branch by which of them it is. Immutable once built, so shared freely between threads.

use crate::trie::Key;

/// The first words of the keys in all places, then the second ones, and so on; then the values, each with 1 added. A place is free
/// where that is 0. Places are taken in order.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Bucket([u32; 16]);

const _: () = assert!(size_of::<Bucket>() == 64);

/// Words of a key.
const fn words<K: Key>() -> usize {
    K::BITS as usize / 32
}

/// Places in a bucket.
const fn places<K: Key>() -> usize {
    16 / (words::<K>() + 1)
}

impl Bucket {
    #[inline]
    fn get<K: Key>(&self, key: K) -> Option<u32> {
        let mut found = 0;
        for place in 0..places::<K>() {
            let mut is_same = true;
            for word in 0..words::<K>() {
                is_same &= self.0[word * places::<K>() + place] == key.word(32 * word as u32);
            }
            found |= if is_same { self.0[words::<K>() * places::<K>() + place] } else { 0 };
        }
        found.checked_sub(1)
    }

    #[inline]
    fn is_full<K: Key>(&self) -> bool {
        self.0[(words::<K>() + 1) * places::<K>() - 1] != 0
    }

    /// Takes the first free place; there must be one.
    fn insert<K: Key>(&mut self, key: K, value: u32) {
        let (words, places) = (words::<K>(), places::<K>());
        let place = (0..places).find(|place| self.0[words * places + place] == 0).expect("a free place");
        (0..words).for_each(|word| self.0[word * places + place] = key.word(32 * word as u32));
        self.0[words * places + place] = value + 1;
    }
}

/// A map from some addresses to values below `u32::MAX`.
#[derive(Debug)]
pub(crate) struct ExactMap<K> {
    buckets: Box<[Bucket]>,
    key: std::marker::PhantomData<K>,
}

impl<K: Key> ExactMap<K> {
    /// From addresses, each named once, and their values.
    pub(crate) fn new(entries: &[(K, u32)]) -> Self {
        let count = (4 * entries.len()).div_ceil(3 * places::<K>());
        let mut map = Self { buckets: vec![Bucket([0; 16]); count].into(), key: std::marker::PhantomData };
        for (key, value) in entries {
            let mut at = map.own_bucket(*key);
            while map.buckets[at].is_full::<K>() {
                at = map.after(at);
            }
            map.buckets[at].insert(*key, *value);
        }
        map
    }

    /// The value of `key`, if it has one.
    #[inline]
    pub(crate) fn get(&self, key: K) -> Option<u32> {
        if self.buckets.is_empty() {
            return None;
        }
        let mut at = self.own_bucket(key);
        loop {
            let bucket = &self.buckets[at];
            let found = bucket.get(key);
            if found.is_some() || !bucket.is_full::<K>() {
                return found;
            }
            at = self.after(at);
        }
    }

    /// Folds a product so that its middle, which all bits of the key have a part in, says which bucket, as a share of all.
    #[inline]
    fn own_bucket(&self, key: K) -> usize {
        let number: u128 = key.into();
        let (low, high) = (number as u64 ^ 0x243f_6a88_85a3_08d3, (number >> 64) as u64 ^ 0x1319_8a2e_0370_7345);
        let product = u128::from(low) * u128::from(high);
        let mixed = (product ^ product >> 64) as u32;
        ((u64::from(mixed) * self.buckets.len() as u64) >> 32) as usize
    }

    #[inline]
    fn after(&self, at: usize) -> usize {
        if at + 1 == self.buckets.len() { 0 } else { at + 1 }
    }

    /// Memory in use.
    pub(crate) fn memory_bytes(&self) -> usize {
        size_of_val(&*self.buckets)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn check<K: Key + std::fmt::Debug>(entries: &HashMap<u128, u32>) {
        let list: Vec<(K, u32)> = entries.iter().map(|(key, value)| (K::from_number(*key), *value)).collect();
        let map = ExactMap::new(&list);
        for key in entries.keys().flat_map(|key| [*key, key ^ 1, key ^ 1 << (K::BITS - 1)]).chain([0]) {
            assert_eq!(map.get(K::from_number(key)), entries.get(&key).copied(), "{key:#x} of {}", list.len());
        }
    }

    proptest! {
        #[test]
        fn it_agrees_with_another_map(
            keys in proptest::collection::vec(any::<(u128, u32)>(), 0..300), first in any::<u32>(), step in 0u32..3000,
        ) {
            let narrow = keys.iter().map(|(key, value)| (key >> 96, value % 100));
            // As addresses are given out.
            let given = (0..500).map(|number| (u128::from(first.wrapping_add(number * step)), number));
            check::<u32>(&narrow.clone().collect());
            check::<u32>(&given.clone().collect());
            check::<u128>(&keys.iter().copied().map(|(key, value)| (key, value % 100)).collect());
            check::<u128>(&given.map(|(key, value)| (0xfd00 << 112 | key, value)).chain(narrow).collect());
        }
    }

    #[test]
    fn most_addresses_given_out_in_order_are_in_their_own_bucket() {
        for step in [1u32, 2, 16, 256, 65536 + 256] {
            let entries: Vec<(u32, u32)> =
                (0..40_000).map(|number| (0x0a00_0000 + number * step % (1 << 24), number)).collect();
            let map = ExactMap::new(&entries);
            let own = entries.iter().filter(|(key, _)| map.buckets[map.own_bucket(*key)].get(*key).is_some()).count();
            assert!(own > 36_000, "{own} with steps of {step}");
        }
    }
}
