//! Any operations on the connection table and on its twin of hash maps, in both families.
#![no_main]

use std::net::{Ipv4Addr, Ipv6Addr};

use libfuzzer_sys::fuzz_target;

#[path = "../../conntrack/tests/twin/mod.rs"]
mod twin;

use twin::{Operation, run};

fuzz_target!(|input: (bool, u32, Vec<Operation>)| {
    let (is_ipv6, start, operations) = input;
    if is_ipv6 { run::<Ipv6Addr>(operations, start) } else { run::<Ipv4Addr>(operations, start) }
});
