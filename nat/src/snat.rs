//! The choice of a source port for a masqueraded connection.
//!
//! The reply key's insertion into the connection table is the allocator: a port is free for a connection if that key is,
//! so one port serves many connections to different destinations, and there is no second record that could
//! disagree with the table. This file only says in which order ports are tried.
//!
//! The order is RFC 6056's algorithm 2 (each try at random) without repetition: a random permutation, so that in whatever
//! pattern the busy ports lie, with a share s of them a search of n tries is in vain with a probability of s^n. An arithmetic progression of random
//! stride would not do: with half of the range busy, one search in a thousand stays in the busy half.
//!
//! With `2^k` the smallest power of two that holds the range, three rounds, each of which can be undone (xor with a key, multiply by an odd
//! constant, xor the upper bits onto the lower ones), permute the numbers below `2^k`; those outside the range or excluded are passed over
//! without a try. So the whole range is reachable, and no port is tried twice. The first try, nearly always the last, costs no rounds: all
//! numbers are shifted (by another xor) so that it is a number of the range, uniform up to the bias of scaling 32 random bits, below 2^-16 of a
//! port's share.

use std::{fmt, ops::RangeInclusive};

use thiserror::Error;

/// The most ports that are tried for one connection.
pub const MAX_TRIES: u32 = 128;

/// The source ports that weir may use for masqueraded connections. Immutable.
pub struct SnatPorts {
    /// A bit per port number, set where the port may be used.
    allowed: Box<[u64; 1024]>,
    first: u16,
    last: u16,
    /// How many ports may be used.
    count: u32,
    /// `2^k - 1`, where `2^k` is the smallest power of two that is not less than the length of the range.
    mask: u32,
}

/// What became of an attempt to use a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt<T, E> {
    /// The reply key is in use: try another port.
    Taken,
    /// The reply key is now ours.
    Free(T),
    /// No port would help, for example because the table is full.
    Failed(E),
}

/// A port that a connection got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocated<T> {
    /// The source port.
    pub port: u16,
    /// What the attempt returned.
    pub value: T,
}

/// Why a connection got no port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AllocateError<E> {
    /// [`MAX_TRIES`] ports, or all that there are, were taken.
    #[error("no free source port towards this destination; a wider snat.portRange or more node addresses would help")]
    Exhausted,
    /// An attempt failed for a reason that another port does not change.
    #[error("the attempt to use a source port failed: {0}")]
    Failed(E),
}

/// The range has no port left that is not excluded.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("snat.portRange {first}-{last} has no port that is not a node port or listened on: choose another range")]
pub struct NoSnatPorts {
    first: u16,
    last: u16,
}

impl SnatPorts {
    /// The ports of `range` without `excluded`: node ports and those that the host listens on.
    ///
    /// # Errors
    /// Where no port is left; port 0 never counts.
    pub fn new(range: RangeInclusive<u16>, excluded: impl IntoIterator<Item = u16>) -> Result<Self, NoSnatPorts> {
        let (first, last) = range.into_inner();
        let mut allowed = Box::new([0_u64; 1024]);
        for port in first.max(1)..=last {
            allowed[usize::from(port >> 6)] |= 1 << (port & 63);
        }
        for port in excluded {
            allowed[usize::from(port >> 6)] &= !(1 << (port & 63));
        }
        let count = allowed.iter().map(|word| word.count_ones()).sum();
        if count == 0 {
            return Err(NoSnatPorts { first, last });
        }
        let mask = (u32::from(last) - u32::from(first) + 1).next_power_of_two() - 1;
        Ok(Self { allowed, first, last, count, mask })
    }

    /// Whether a connection may get `port`.
    #[inline]
    pub fn allows(&self, port: u16) -> bool {
        self.allowed[usize::from(port >> 6)] >> (port & 63) & 1 != 0
    }

    /// The ports that a connection may get, as ranges in order.
    pub fn ranges(&self) -> impl Iterator<Item = RangeInclusive<u16>> + '_ {
        let mut next = Some(self.first);
        let after = move |from: u16, wanted: bool| (from..=self.last).find(|port| self.allows(*port) == wanted);
        std::iter::from_fn(move || {
            let first = after(next?, true)?;
            let end = after(first, false);
            next = end;
            Some(first..=end.map_or(self.last, |end| end - 1))
        })
    }

    /// The whole range, the excluded ports too.
    pub fn range(&self) -> RangeInclusive<u16> {
        self.first..=self.last
    }

    /// How many ports a connection may get.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Memory beside the structure itself, in bytes.
    pub fn memory_bytes(&self) -> usize {
        size_of_val(&*self.allowed)
    }

    /// Tries ports until one is free: first `wanted` (the client's own) where it is allowed, then at random, each at
    /// most once and [`MAX_TRIES`] in all. Draws one random number unless `wanted` ends the search.
    ///
    /// # Errors
    /// [`AllocateError::Exhausted`] where all tries were taken, [`AllocateError::Failed`] as soon as an attempt fails.
    #[inline]
    pub fn allocate<T, E>(
        &self,
        wanted: Option<u16>,
        random: &mut impl FnMut() -> u64,
        mut try_port: impl FnMut(u16) -> Attempt<T, E>,
    ) -> Result<Allocated<T>, AllocateError<E>> {
        let wanted = wanted.filter(|&port| self.allows(port));
        let mut tries = MAX_TRIES.min(self.count);
        if let Some(port) = wanted {
            match try_port(port) {
                Attempt::Free(value) => return Ok(Allocated { port, value }),
                Attempt::Failed(error) => return Err(AllocateError::Failed(error)),
                Attempt::Taken => tries -= 1,
            }
        }
        let seed = random();
        for number in 0..=self.mask {
            if tries == 0 {
                break;
            }
            let Ok(port) = u16::try_from(u32::from(self.first) + self.position(number, seed)) else { continue };
            if !self.allows(port) || wanted == Some(port) {
                continue;
            }
            match try_port(port) {
                Attempt::Free(value) => return Ok(Allocated { port, value }),
                Attempt::Failed(error) => return Err(AllocateError::Failed(error)),
                Attempt::Taken => tries -= 1,
            }
        }
        Err(AllocateError::Exhausted)
    }

    /// Where in the order of a seed the number stands, as a distance from the first port: a permutation of 0 to `mask`, that begins in the range.
    #[inline]
    fn position(&self, number: u32, seed: u64) -> u32 {
        let length = u64::from(self.last - self.first) + 1;
        let start = (((seed >> 32) * length) >> 32) as u32;
        if number == 0 { start } else { start ^ self.scrambled(0, seed) ^ self.scrambled(number, seed) }
    }

    /// A permutation of 0 to `mask` for each seed.
    #[inline]
    fn scrambled(&self, number: u32, seed: u64) -> u32 {
        // 2^32 divided by the golden ratio, to an odd number (Knuth, "The Art of Computer Programming", volume 3, 6.4).
        const SPREAD: u32 = 0x9e37_79b1;
        let half = self.mask.count_ones().div_ceil(2).max(1);
        let round = |number: u32, key: u32| {
            let product = (number ^ key).wrapping_mul(SPREAD) & self.mask;
            product ^ product >> half
        };
        round(round(round(number, seed as u32), (seed >> 16) as u32), 0)
    }
}

impl fmt::Debug for SnatPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnatPorts({}-{}, {} usable)", self.first, self.last, self.count)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use rand_chacha::{
        ChaCha8Rng,
        rand_core::{Rng, SeedableRng},
    };

    use super::*;

    type Tried = Attempt<(), &'static str>;

    fn ports(range: RangeInclusive<u16>, excluded: impl IntoIterator<Item = u16>) -> SnatPorts {
        SnatPorts::new(range, excluded).expect("ports are left")
    }

    #[test]
    fn the_clients_own_port_comes_first_where_it_is_allowed() {
        let ports = ports(10000..=29999, [12345]);
        let mut no_random = || -> u64 { panic!("no random number is needed") };
        let got = ports.allocate(Some(20000), &mut no_random, |_| Attempt::<_, ()>::Free("connection"));
        assert_eq!(got, Ok(Allocated { port: 20000, value: "connection" }));
        // Out of the range, whose replies would never come here; excluded; taken.
        for wanted in [40000, 12345, 20000] {
            let mut tried = Vec::new();
            let got = ports.allocate(Some(wanted), &mut || 0x5555_0000_1234_5678, |port| {
                tried.push(port);
                if port == wanted { Tried::Taken } else { Tried::Free(()) }
            });
            let port = got.expect("a port is free").port;
            assert!(ports.allows(port) && port != wanted);
            assert_eq!(tried.contains(&wanted), wanted == 20000);
        }
    }

    #[test]
    fn exhaustion_is_bounded_and_a_failure_ends_the_search() {
        let wide = ports(10000..=29999, []);
        let mut tried = HashSet::new();
        let got = wide.allocate(Some(10001), &mut || u64::MAX, |port| {
            assert!(tried.insert(port), "{port} is tried twice");
            Tried::Taken
        });
        assert_eq!((got, tried.len()), (Err(AllocateError::Exhausted), MAX_TRIES as usize));
        let mut tries = 0;
        let got = wide.allocate(None, &mut || 77, |_| {
            tries += 1;
            if tries == 3 { Tried::Failed("table full") } else { Tried::Taken }
        });
        assert_eq!((got, tries), (Err(AllocateError::Failed("table full")), 3));
    }

    #[test]
    fn allowed_ports_are_listed_as_ranges() {
        let ranges = |excluded: &[u16]| ports(10..=20, excluded.iter().copied()).ranges().collect::<Vec<_>>();
        assert_eq!(ranges(&[]), [10..=20]);
        assert_eq!(ranges(&[10, 13, 14, 20]), [11..=12, 15..=19]);
        assert_eq!(ranges(&[11, 19]), [10..=10, 12..=18, 20..=20]);
        assert_eq!(ports(0..=65535, [65535]).ranges().collect::<Vec<_>>(), [1..=65534]);
        assert_eq!(ports(65535..=65535, []).ranges().collect::<Vec<_>>(), [65535..=65535]);
    }

    #[test]
    fn ranges_without_a_port_are_refused() {
        for (range, excluded) in [(5..=6, vec![5, 6]), (0..=0, vec![]), (RangeInclusive::new(9, 8), vec![])] {
            let (first, last) = range.clone().into_inner();
            assert_eq!(SnatPorts::new(range, excluded).expect_err("no port is left"), NoSnatPorts { first, last });
        }
        assert_eq!(ports(0..=65535, []).count(), 65535);
    }

    #[test]
    fn starts_are_uniform() {
        // Not a power of two, so that positions outside of the range exist.
        let ports = ports(1000..=1099, []);
        let mut random = ChaCha8Rng::seed_from_u64(6056);
        let mut hits = [0_u32; 100];
        let draws = 200_000;
        for _ in 0..draws {
            let got = ports.allocate(None, &mut || random.next_u64(), |_| Tried::Free(()));
            hits[usize::from(got.expect("a port is free").port - 1000)] += 1;
        }
        let expected = f64::from(draws) / 100.0;
        let statistic: f64 = hits.iter().map(|&hits| (f64::from(hits) - expected).powi(2) / expected).sum();
        // 0.1% and 99.9% quantiles of the chi-square distribution with 99 degrees of freedom.
        assert!((60.0..149.0).contains(&statistic), "{statistic}");
    }

    /// Whatever pattern the busy ports form, each try finds a free one as if it were drawn at random.
    #[test]
    fn no_pattern_of_busy_ports_holds_a_search_up() {
        let ports = ports(10000..=29999, []);
        /// Whether a port is busy.
        type Pattern = fn(u16) -> bool;
        let patterns: [(&str, Pattern, f64); 6] = [
            ("the lower half", |port| port < 20000, 0.5),
            ("the upper half", |port| port >= 20000, 0.5),
            ("the odd ones", |port| port % 2 == 1, 0.5),
            ("all but the last tenth", |port| port < 28000, 0.9),
            ("15 of each 16", |port| port % 16 != 3, 15.0 / 16.0),
            ("blocks of 256", |port| port & 0x100 != 0, 0.5),
        ];
        let mut random = ChaCha8Rng::seed_from_u64(6056);
        for (name, is_busy, share) in patterns {
            let searches = 20_000;
            let (mut tries, mut in_vain) = (0, 0);
            for _ in 0..searches {
                let got = ports.allocate(None, &mut || random.next_u64(), |port| {
                    tries += 1;
                    if is_busy(port) { Tried::Taken } else { Tried::Free(()) }
                });
                in_vain += u32::from(got.is_err());
            }
            let mean = f64::from(tries) / f64::from(searches);
            let expected = 1.0 / (1.0 - share);
            assert!((mean / expected - 1.0).abs() < 0.03, "{name}: {mean} tries, {expected} expected");
            // Of a Poisson distribution with a mean of 5.2 at most ("15 of each 16"), fewer than one in ten thousand is above 15.
            let expected_in_vain = f64::from(searches) * share.powi(MAX_TRIES as i32);
            assert!(f64::from(in_vain) <= 3.0 * expected_in_vain, "{name}: {in_vain} of {searches} in vain");
        }
    }

    #[test]
    fn the_order_is_a_permutation_that_begins_in_the_range() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        for length in (1..=70_u32).chain([127, 128, 129, 1000, 20_000, 65_535]) {
            let ports = ports(1..=length as u16, []);
            for _ in 0..4 {
                let seed = random.next_u64();
                let order: Vec<u32> = (0..=ports.mask).map(|number| ports.position(number, seed)).collect();
                assert!(order[0] < length, "{length} ports, seed {seed:#x}");
                let reached: HashSet<u32> = order.iter().copied().collect();
                assert!(reached.len() == order.len() && reached.iter().all(|position| *position <= ports.mask));
            }
        }
    }

    proptest! {
        /// Every allowed port of a range of at most 128 is tried once, and no other.
        #[test]
        fn small_ranges_are_searched_whole(
            first in 0_u16..=65535,
            length in 0_u16..128,
            excluded in proptest::collection::vec(any::<u16>(), 0..4),
            excluded_offsets in proptest::collection::vec(0_u16..128, 0..100),
            wanted in proptest::option::of(any::<u16>()),
            seed: u64,
        ) {
            let range = first..=first.saturating_add(length);
            let excluded: HashSet<u16> =
                excluded.into_iter().chain(excluded_offsets.iter().map(|offset| first.saturating_add(*offset))).collect();
            let allowed: HashSet<u16> = range.clone().filter(|port| *port != 0 && !excluded.contains(port)).collect();
            match SnatPorts::new(range, excluded) {
                Err(_) => prop_assert!(allowed.is_empty()),
                Ok(ports) => {
                    let mut tried = Vec::new();
                    let got = ports.allocate(wanted, &mut || seed, |port| {
                        tried.push(port);
                        Tried::Taken
                    });
                    prop_assert_eq!(got, Err(AllocateError::Exhausted));
                    prop_assert_eq!(ports.count() as usize, allowed.len());
                    prop_assert_eq!(tried.len(), allowed.len());
                    prop_assert_eq!(tried.into_iter().collect::<HashSet<_>>(), allowed);
                }
            }
        }
    }
}
