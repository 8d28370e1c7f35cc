//! A hash of compiled content that is the same in every process and every build.

use std::hash::Hasher;

/// Folds 64-bit words, in order, into one.
///
/// Each step is a bijection of the state for a given word (the finalizer of SplitMix64: Steele, Lea, Flood,
/// "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), so no word can erase what came before it. It is not
/// meant to resist somebody who looks for collisions.
pub(crate) struct Fingerprint(u64);

impl Fingerprint {
    pub(crate) fn new(seed: u64) -> Self {
        let mut fingerprint = Self(0x9e37_79b9_7f4a_7c15);
        fingerprint.add(seed);
        fingerprint
    }

    pub(crate) fn add(&mut self, word: u64) {
        let mut state = self.0.rotate_left(23).wrapping_add(0x9e37_79b9_7f4a_7c15) ^ word;
        state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.0 = state ^ (state >> 31);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0
    }
}

/// So that whole values can be folded. How a value gives itself to a hasher may differ between compilers.
impl Hasher for Fingerprint {
    fn write(&mut self, bytes: &[u8]) {
        self.add(bytes.len() as u64);
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.add(u64::from_le_bytes(word));
        }
    }

    fn finish(&self) -> u64 {
        self.value()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(words: &[u64]) -> u64 {
        let mut fingerprint = Fingerprint::new(0);
        words.iter().for_each(|word| fingerprint.add(*word));
        fingerprint.value()
    }

    #[test]
    fn order_length_and_zeros_count() {
        let values = [of(&[]), of(&[0]), of(&[0, 0]), of(&[1, 2]), of(&[2, 1])];
        for (index, value) in values.iter().enumerate() {
            assert!(!values[..index].contains(value));
        }
    }

    /// Connections keep stamps across restarts, so the function may not change silently.
    #[test]
    fn it_never_changes() {
        assert_eq!(of(&[1, 2, 3]), 15_918_698_786_011_599_426);
    }
}
