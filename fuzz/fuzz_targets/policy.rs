//! The policy classifier beside the linear evaluator, over models, their edits and packets.
//!
//! The bytes seed the random numbers of the very strategies that the policy crate's tests draw from.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

#[allow(dead_code, reason = "a target uses a part of it")]
#[path = "../../policy/tests/agreement/mod.rs"]
mod agreement;
#[allow(dead_code, reason = "a target uses a part of it")]
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
    let edits = proptest::collection::vec((world::edit::edit(), any::<bool>()), 0..6);
    let Ok(tree) = (world::model(4), edits, world::packets()).new_tree(&mut runner) else { return };
    let (model, edits, packets) = tree.current();
    agreement::follow(model, &packets, &edits);
});
