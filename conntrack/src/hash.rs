//! The keyed hash of flow keys.
//!
//! # What
//! Words of the key are mixed with secret words and multiplied to 128 bits, whose halves are folded together: two
//! multiplications for IPv4, four for IPv6. The secrets come from a random seed, so that which keys share a bucket
//! cannot be computed by who chooses the keys.
//!
//! # Why it holds
//! A folded product (Wang Yi's wyhash, 2019, made the construction known) depends on all bits of both factors, unless
//! one factor is zero, for which a key word would have to equal a secret one. Every result goes through a second
//! product with other secrets, so that keys that differ in few low bits (ports of a scan) do not end in neighbouring
//! buckets. It is no cryptographic function; it never leaves the process, and an attacker sees at most timing.

use weir_packet::{Address, FlowKey};

/// The hash of a flow key in one table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hash(pub(crate) u64);

/// The secret of one table.
pub(crate) struct Hasher {
    secret: [u64; 4],
}

/// The halves of the 128-bit product, folded.
#[inline(always)]
const fn fold(a: u64, b: u64) -> u64 {
    let product = a as u128 * b as u128;
    product as u64 ^ (product >> 64) as u64
}

impl Hasher {
    pub(crate) fn new(seed: [u64; 2]) -> Self {
        // Odd constants with about as many ones as zeroes, so that also a poor seed gives usable factors.
        const SPREAD: [u64; 4] =
            [0x9e37_79b9_7f4a_7c15, 0xd1b5_4a32_d192_ed03, 0xabc9_8388_fb8f_ac03, 0x8cb9_2ba7_2f3d_8dd7];
        let mut state = seed[0];
        let secret = std::array::from_fn(|i| {
            state = fold(state ^ SPREAD[i], seed[1] ^ SPREAD[(i + 1) % 4]).wrapping_add(seed[i % 2]);
            state ^ SPREAD[(i + 2) % 4]
        });
        Self { secret }
    }

    #[inline(always)]
    pub(crate) fn hash<A: Address>(&self, key: &FlowKey<A>) -> Hash {
        let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        let [s0, s1, s2, s3] = self.secret;
        let (src, dst) = (key.src.words(), key.dst.words());
        let (src, dst) = (src.as_ref(), dst.as_ref());
        let rest = pair(key.ports.word(), u32::from(key.protocol.0));
        let mixed = if A::WORDS == 1 {
            fold(pair(src[0], dst[0]) ^ s0, rest ^ s1)
        } else {
            let ends = fold(pair(src[0], src[1]) ^ s0, pair(src[2], src[3]) ^ s1);
            let ends = ends.rotate_left(23) ^ fold(pair(dst[0], dst[1]) ^ s2, pair(dst[2], dst[3]) ^ s3);
            fold(ends ^ s1, rest ^ s2)
        };
        Hash(fold(mixed ^ s2, mixed.rotate_left(32) ^ s3))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::{
        collections::HashSet,
        net::{Ipv4Addr, Ipv6Addr},
    };

    use weir_packet::{Ports, Protocol};

    use super::*;

    /// Chi-squared of `hashes` over 1,024 bins by their high and by their low bits; expected 1,023, deviation 45.
    fn spread(hashes: &[u64]) -> [f64; 2] {
        [54, 0].map(|shift| {
            let mut bins = [0u32; 1024];
            hashes.iter().for_each(|hash| bins[(hash >> shift) as usize % 1024] += 1);
            let expected = hashes.len() as f64 / 1024.0;
            bins.iter().map(|n| (f64::from(*n) - expected).powi(2) / expected).sum()
        })
    }

    #[test]
    fn structured_keys_spread_evenly_with_any_seed() {
        // Arithmetic alone, and too much of it for an interpreter.
        if cfg!(miri) {
            return;
        }
        for seed in [[0, 0], [1, 2], [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210]] {
            let hasher = Hasher::new(seed);
            let v4 = |src: u32, ports: Ports| {
                let key =
                    FlowKey { src: Ipv4Addr::from(src), dst: [10, 96, 0, 1].into(), ports, protocol: Protocol::TCP };
                hasher.hash(&key).0
            };
            let v6 = |src: u128, ports: Ports| {
                let dst = Ipv6Addr::from(0xfd00 << 112 | 1);
                hasher.hash(&FlowKey { src: Ipv6Addr::from(src), dst, ports, protocol: Protocol::UDP }).0
            };
            let ports = |i: u32| Ports::new(i as u16, 80);
            let sets: [Vec<u64>; 4] = [
                (0..65536).map(|i| v4(0x0a00_0001, ports(i))).collect(),
                (0..65536).map(|i| v4(0x0a00_0000 + i, ports(40000))).collect(),
                (0..65536).map(|i| v6(0xfd << 120, ports(i))).collect(),
                (0..65536u32).map(|i| v6((0xfd << 120) | u128::from(i), ports(40000))).collect(),
            ];
            for hashes in sets {
                assert_eq!(hashes.iter().collect::<HashSet<_>>().len(), 65536);
                for chi_squared in spread(&hashes) {
                    assert!((750.0..1300.0).contains(&chi_squared), "chi-squared {chi_squared} with seed {seed:x?}");
                }
            }
        }
    }

    #[test]
    fn every_part_of_the_key_and_of_the_seed_counts() {
        let key = FlowKey {
            src: Ipv6Addr::LOCALHOST,
            dst: Ipv6Addr::UNSPECIFIED,
            ports: Ports::new(1, 2),
            protocol: Protocol::TCP,
        };
        let of = |seed, key: &FlowKey<Ipv6Addr>| Hasher::new(seed).hash(key).0;
        let base = of([1, 2], &key);
        let mut seen = HashSet::from([base]);
        for bit in 0..128 {
            assert!(seen.insert(of([1, 2], &FlowKey { src: Ipv6Addr::from(key.src.to_bits() ^ 1 << bit), ..key })));
            assert!(seen.insert(of([1, 2], &FlowKey { dst: Ipv6Addr::from(key.dst.to_bits() ^ 1 << bit), ..key })));
        }
        assert!(seen.insert(of([1, 2], &FlowKey { protocol: Protocol::UDP, ..key })));
        assert!(seen.insert(of([1, 2], &FlowKey { ports: Ports::new(2, 1), ..key })));
        assert!(seen.insert(of([1, 3], &key)));
        assert!(seen.insert(of([2, 2], &key)));
    }
}
