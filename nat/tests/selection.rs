//! Rule 28: selection is uniform over the list.

mod common;

use std::{collections::HashMap, net::Ipv4Addr};

use common::*;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use weir_nat::{Decision, ServiceTable};
use weir_packet::Protocol;

/// Pearson's statistic of `picks` selections among `count` backends.
fn chi_square(count: u16, picks: u32) -> f64 {
    let endpoints = (0..count).map(|number| on("", &format!("10.1.{}.{}", number >> 8, number & 255))).collect();
    let table = ServiceTable::compile(&world(endpoints)).expect("the model compiles");
    let mut random = ChaCha8Rng::seed_from_u64(0x0077_6569_7221 + u64::from(count));
    let mut hits: HashMap<Ipv4Addr, u32> = HashMap::new();
    for _ in 0..picks {
        let key = key::<Ipv4Addr>(Protocol::TCP, POD, CLUSTER_IP, 80);
        match decide(&table, &key, &mut || random.next_u64()) {
            Decision::Translate { backend, .. } => *hits.entry(backend.address).or_default() += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(hits.len(), usize::from(count), "every backend is picked");
    let expected = f64::from(picks) / f64::from(count);
    hits.values().map(|&hits| (f64::from(hits) - expected).powi(2) / expected).sum()
}

#[test]
fn rule_28_selection_is_uniform() {
    // Quantiles of the chi-square distribution with count - 1 degrees of freedom: 0.1% below the first, 0.1% above the
    // second. Too even would be as wrong as too uneven.
    for (count, low, high) in
        [(2, 0.000_001_6, 10.828), (3, 0.002, 13.816), (7, 0.381, 22.458), (10, 1.152, 27.877), (101, 61.918, 149.449)]
    {
        let statistic = chi_square(count, 200_000);
        assert!((low..high).contains(&statistic), "{count} backends: {statistic}");
    }
}
