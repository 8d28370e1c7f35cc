//! The classifier against the linear evaluator, over generated models, edits, endpoints and packets.

mod agreement;
mod oracle;
mod world;

use std::sync::Arc;

use agreement::{agree, classify, follow, number, subjects};
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
        for subject in subjects(&model) {
            let Some(id) = number(&before, subject) else { continue };
            if before.stamp(id) != after.stamp(number(&after, subject).expect("still there")) {
                continue;
            }
            for direction in PolicyDirection::ALL {
                for packet in &packets {
                    let verdict = |classifier| classify(classifier, subject, direction, packet).decided.map(|(allow, _)| allow);
                    prop_assert_eq!(verdict(&before), verdict(&after), "{:?} {:?} {:?}", subject, direction, packet);
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
        for subject in subjects(&model) {
            let stamp = |classifier| number(classifier, subject).map(|id| classifier.stamp(id)).expect("a local endpoint");
            prop_assert_ne!(stamp(&before), 0);
            prop_assert_eq!(stamp(&before), stamp(&after), "{:?}", subject);
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
