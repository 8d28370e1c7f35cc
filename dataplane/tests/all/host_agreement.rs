//! `decide` against the policy rules about host endpoints, asked one after another: generated policies of all kinds, host endpoints,
//! failsafes and settings; packets between the node, its pods, other nodes' pods and the outside, past services.

use crate::host_world::{agree, change, follow, packets, site};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn decide_says_what_the_rules_say((site, packets) in (site(), packets())) {
        agree(&site, &packets);
    }

    #[test]
    fn a_changed_verdict_changes_a_stamp_of_the_connection((site, packets) in (site(), packets()), change in change()) {
        let changed = change.apply(&site);
        agree(&changed, &packets);
        follow(&site, &changed, &packets);
    }
}
