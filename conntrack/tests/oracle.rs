//! Sequences of operations on the table and on a dull twin of hash maps; after each, everything is compared.
#![cfg(not(loom))]

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

mod twin;

use twin::{KEYS, Operation, PROTOCOLS, run};

fn operation() -> impl Strategy<Value = Operation> {
    let (key, protocol) = (0..KEYS, 0..PROTOCOLS.len() as u8);
    prop_oneof![
        4 => (key.clone(), key.clone(), protocol.clone(), any::<u32>())
            .prop_map(|(original, reply, protocol, mark)| Operation::Insert { original, reply, protocol, mark }),
        3 => (key.clone(), protocol.clone(), any::<bool>())
            .prop_map(|(key, protocol, repeated_first)| Operation::Track { key, protocol, repeated_first }),
        1 => (key.clone(), protocol.clone()).prop_map(|(key, protocol)| Operation::Remove { key, protocol }),
        1 => (key.clone(), protocol.clone(), any::<bool>())
            .prop_map(|(key, protocol, for_privileged)| Operation::Displace { key, protocol, for_privileged }),
        1 => (key, protocol, any::<u32>()).prop_map(|(key, protocol, mark)| Operation::Judge { key, protocol, mark }),
        3 => prop_oneof![1..600u16, 2900..3100u16, 11_900..12_100u16].prop_map(|ticks| Operation::Pass { ticks }),
        1 => Just(Operation::Sweep),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 300 }))]

    #[test]
    fn the_table_does_what_its_twin_does_ipv4(
        operations in prop::collection::vec(operation(), 1..120),
        start in prop_oneof![Just(0), Just(u32::MAX - 20_000), any::<u32>()],
    ) {
        run::<Ipv4Addr>(operations, start);
    }

    #[test]
    fn the_table_does_what_its_twin_does_ipv6(
        operations in prop::collection::vec(operation(), 1..120),
        start in prop_oneof![Just(0), Just(u32::MAX - 20_000), any::<u32>()],
    ) {
        run::<Ipv6Addr>(operations, start);
    }
}
