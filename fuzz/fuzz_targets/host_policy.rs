//! `decide` beside the policy rules about host endpoints, over models, changes and packets.
//!
//! The bytes seed the random numbers of the very strategies that the dataplane's test draws from.
#![no_main]

use libfuzzer_sys::fuzz_target;

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
    let strategies = (host_world::site(), host_world::packets(), host_world::change());
    let Some((site, packets, change)) = world::drawn(strategies, bytes) else { return };
    let changed = change.apply(&site);
    host_world::agree(&site, &packets);
    host_world::agree(&changed, &packets);
    host_world::follow(&site, &changed, &packets);
});
