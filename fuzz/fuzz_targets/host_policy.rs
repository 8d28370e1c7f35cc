//! `decide` beside the policy rules about host endpoints, over models, changes and packets.
//!
//! The bytes seed the random numbers of the very strategies that the dataplane's test draws from.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

#[path = "../../dataplane/tests/support/host_oracle.rs"]
mod host_oracle;
#[path = "../../dataplane/tests/support/host_world.rs"]
mod host_world;
#[path = "../../policy/tests/oracle/mod.rs"]
mod oracle;
#[allow(dead_code, reason = "a target uses a part of it")]
#[path = "../../policy/tests/world/mod.rs"]
mod world;

fuzz_target!(|bytes: &[u8]| {
    let mut seed = [0; 32];
    seed.iter_mut().zip(bytes).for_each(|(seed, byte)| *seed = *byte);
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(Config { failure_persistence: None, ..Config::default() }, random);
    let Ok(tree) = (host_world::site(), host_world::packets(), host_world::change()).new_tree(&mut runner) else { return };
    let (site, packets, change) = tree.current();
    let changed = change.apply(&site);
    host_world::agree(&site, &packets);
    host_world::agree(&changed, &packets);
    host_world::follow(&site, &changed, &packets);
});
