//! A route by its longest prefix, as the first packet of a connection asks for it, at 10 to 100,000 routes; perf/rte_lpm.c does the same with
//! DPDK's rte_lpm.
//!
//! Routes are random prefixes of 16 to 28 bits; half of the 4096 addresses are within one of them. Both print the sum over all answers, which
//! tells that they agree. `cargo bench -p weir-benches --bench routes -- [LARGEST [ROUNDS]]`.

use std::{env, hint::black_box, net::Ipv4Addr, time::Instant};

use weir_benches::figures::{Spread, tell};
use weir_dataplane::prefix::PrefixMap;

const ADDRESSES: usize = 4096;
const PASSES: usize = 16;

/// Numbers that are the same in every run, and in perf/rte_lpm.c.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (((self.0 >> 32) * limit) >> 32) as u32
    }
}

fn main() {
    let numbers: Vec<u32> = env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let largest = numbers.first().copied().unwrap_or(100_000);
    let rounds = numbers.get(1).copied().unwrap_or(51).max(1);
    for routes in [10, 100, 1000, 10_000, 100_000].into_iter().filter(|routes| *routes <= largest) {
        measure(routes, rounds);
    }
}

fn measure(routes: u32, rounds: u32) {
    let mut numbers = Numbers(7);
    let entries: Vec<(Ipv4Addr, u8, u32)> = (0..routes)
        .map(|number| {
            let (address, length) = (numbers.below(1 << 32), 16 + numbers.below(13));
            (Ipv4Addr::from_bits(address & (u32::MAX << (32 - length))), length as u8, number + 1)
        })
        .collect();
    let networks: Vec<u32> = entries.iter().map(|(address, ..)| address.to_bits()).collect();
    let map = PrefixMap::compile(entries);
    let addresses: Vec<Ipv4Addr> = (0..ADDRESSES)
        .map(|place| {
            let (anywhere, number, within) = (numbers.below(1 << 32), numbers.below(routes.into()), numbers.below(16));
            Ipv4Addr::from_bits(if place % 2 == 1 { anywhere } else { networks[number as usize] + within })
        })
        .collect();
    let sum: u64 = addresses.iter().filter_map(|address| map.get(*address)).map(|hop| u64::from(*hop)).sum();
    let mut samples: Vec<f64> = (0..rounds)
        .map(|_| {
            let begin = Instant::now();
            for _ in 0..PASSES {
                for address in &addresses {
                    black_box(map.get(black_box(*address)));
                }
            }
            begin.elapsed().as_nanos() as f64 / (PASSES * ADDRESSES) as f64
        })
        .collect();
    let spread = Spread::of(&mut samples);
    println!("weir {routes:>7} routes: {:5.1} ns, answers sum to {sum}", spread.median);
    tell("routes", &routes.to_string(), "weir", "ns", spread);
}
