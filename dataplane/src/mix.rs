//! A hash for the tables of [`crate::forwarding`]: one multiplication for an address or a number.
//!
//! What these tables hold comes from the cluster's configuration and the kernel, so nobody can fill them with keys that collide, which a
//! keyed hash would be for.

use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};

/// A map with this hash.
pub type HashMap<K, V> = hashbrown::HashMap<K, V, BuildHasherDefault<Mixer>>;
/// A set with this hash.
pub type HashSet<K> = hashbrown::HashSet<K, BuildHasherDefault<Mixer>>;

/// The hash of one value.
pub fn mixed(value: impl Hash) -> u64 {
    BuildHasherDefault::<Mixer>::default().hash_one(value)
}

/// Folds each word of a key into 64 bits by the halves of a 128-bit product, of which hashbrown uses the highest and the lowest.
#[derive(Clone, Copy, Default, Debug)]
pub struct Mixer(u64);

impl Mixer {
    #[inline(always)]
    fn mix(&mut self, word: u64) {
        // An odd number with about as many ones as zeroes: 2^64 divided by the golden ratio.
        let product = u128::from(self.0.rotate_left(29) ^ word ^ 0x51_7c_c1_b7_27_22_0a_95) * 0x9e37_79b9_7f4a_7c15;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }
}

impl Hasher for Mixer {
    #[inline(always)]
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
    }

    #[inline(always)]
    fn write_u8(&mut self, number: u8) {
        self.mix(number.into());
    }

    #[inline(always)]
    fn write_u32(&mut self, number: u32) {
        self.mix(number.into());
    }

    #[inline(always)]
    fn write_u64(&mut self, number: u64) {
        self.mix(number);
    }

    /// Lengths of fixed arrays and numbers of variants say nothing that the rest does not.
    #[inline(always)]
    fn write_usize(&mut self, _number: usize) {}

    #[inline(always)]
    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::{
        hash::{BuildHasher, BuildHasherDefault},
        net::{IpAddr, Ipv4Addr, Ipv6Addr},
    };

    use super::*;

    #[test]
    fn addresses_of_a_cluster_spread_over_high_and_low_bits() {
        let build = BuildHasherDefault::<Mixer>::default();
        let v4 = (0..65_536u32).map(|i| build.hash_one(Ipv4Addr::from(0x0a00_0000 + i)));
        let v6 = (0..65_536u128).map(|i| build.hash_one(Ipv6Addr::from(0xfd00 << 112 | i << 64 | 1)));
        let pairs = (0..65_536u32).map(|i| build.hash_one((i >> 8, IpAddr::from(Ipv4Addr::from(i)))));
        for hashes in [v4.collect::<Vec<_>>(), v6.collect(), pairs.collect()] {
            for shift in [0, 57] {
                let mut counts = [0u32; 128];
                hashes.iter().for_each(|hash| counts[(hash >> shift) as usize & 127] += 1);
                assert!(counts.iter().all(|count| (350..700).contains(count)), "shift {shift}: {counts:?}");
            }
        }
    }
}
