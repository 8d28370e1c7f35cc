//! The classifier against the linear evaluator, over generated models, edits, endpoints and packets.

mod agreement;
mod oracle;
mod world;

use std::sync::Arc;

use agreement::{agree, classify, follow, locals};
use proptest::prelude::*;
use weir_policy::{Classifier, PolicyDirection, Selector};
use world::{edit::edit, model, packets, tier};

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn verdict_and_deciding_rule_are_those_of_the_linear_evaluator((model, packets) in (model(5), packets())) {
        agree(&Classifier::compile(&model).expect("within the limits"), &model, &packets);
    }

    /// Verdicts differ only if stamps do, whatever changes.
    #[test]
    fn a_changed_verdict_changes_the_stamp((mut model, packets) in (model(5), packets()), edit in edit()) {
        let before = Classifier::compile(&model).expect("within the limits");
        edit.apply(&mut model);
        let after = Classifier::compile(&model).expect("within the limits");
        agree(&after, &model, &packets);
        for endpoint in locals(&model) {
            let Some(id) = before.endpoint(&endpoint.name) else { continue };
            if before.stamp(id) != after.stamp(after.endpoint(&endpoint.name).expect("still there")) {
                continue;
            }
            for direction in PolicyDirection::ALL {
                for packet in &packets {
                    let verdict = |classifier| classify(classifier, &endpoint.name, direction, packet).allow;
                    prop_assert_eq!(verdict(&before), verdict(&after), "{} {:?} {:?}", &endpoint.name, direction, packet);
                }
            }
        }
    }

    /// The order in which objects are listed, and objects that have nothing to do with an endpoint, change no stamp.
    #[test]
    fn an_unrelated_change_keeps_the_stamp(mut model in model(5), tier in tier(5)) {
        let before = Classifier::compile(&model).expect("within the limits");
        model.endpoints.reverse();
        model.tiers.reverse();
        model.tiers.iter_mut().for_each(|tier| tier.policies.reverse());
        model.profiles.reverse();
        let mut unrelated = tier;
        for (index, policy) in unrelated.policies.iter_mut().enumerate() {
            let policy = Arc::make_mut(policy);
            policy.selector = Selector::parse("a == 'nobody'").unwrap();
            policy.name = format!("NetworkPolicy/ns/unrelated{index}");
        }
        model.tiers.push(unrelated);
        let after = Classifier::compile(&model).expect("within the limits");
        for (id, name) in before.endpoints() {
            prop_assert_ne!(before.stamp(id), 0);
            prop_assert_eq!(before.stamp(id), after.stamp(after.endpoint(name).expect("still there")), "{}", name);
        }
    }
}

proptest! {
    /// A compiler that follows edits says what a fresh one says, and what the rules say, after each of them.
    #[test]
    fn following_edits_is_compiling_anew(
        (model, packets) in (model(5), packets()),
        edits in proptest::collection::vec((edit(), any::<bool>()), 1..12),
    ) {
        follow(model, &packets, &edits);
    }
}

proptest! {
    // Programs of hundreds of rules, whose rows have more than one word.
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn large_programs_agree_too((model, packets) in (model(80), packets())) {
        agree(&Classifier::compile(&model).expect("within the limits"), &model, &packets);
    }
}
