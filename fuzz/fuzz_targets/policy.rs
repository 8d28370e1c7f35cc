//! The policy classifier beside the linear evaluator, over models, their edits and packets.
//!
//! The bytes seed the random numbers of the very strategies that the policy crate's tests draw from.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proptest::prelude::any;

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
    let edits = proptest::collection::vec((world::edit::edit(), any::<bool>()), 0..6);
    let strategies = (world::model(4), edits, world::packets());
    let Some((model, edits, packets)) = world::drawn(strategies, bytes) else { return };
    agreement::follow(model, &packets, &edits);
});
