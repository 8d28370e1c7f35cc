//! The selector language against cases taken from Calico's own tests, and what holds for any text.

mod selector_text;

use std::collections::BTreeMap;

use proptest::{prelude::*, sample::select};
use serde_json::Value;
use weir_policy::Selector;

#[test]
fn shared_cases_agree() {
    let mut count = 0;
    for line in include_str!("selector_cases.jsonl").lines().filter(|line| !line.trim().is_empty()) {
        let case: Value = serde_json::from_str(line).expect("a case per line");
        let text = case["selector"].as_str().expect("selector");
        let parsed = Selector::parse(text);
        match &case["expect"] {
            Value::Bool(expected) => {
                let labels: BTreeMap<String, String> = case["labels"]
                    .as_object()
                    .expect("labels")
                    .iter()
                    .map(|(key, value)| (key.clone(), value.as_str().expect("label value").to_owned()))
                    .collect();
                let selector = parsed.unwrap_or_else(|error| panic!("{text}: {error}"));
                assert_eq!(selector.matches(&labels), *expected, "{text} on {labels:?}");
            }
            _ => assert!(parsed.is_err(), "{text} is no selector, but parsed as {parsed:?}"),
        }
        count += 1;
    }
    assert!(count >= 59, "only {count} cases were read");
}

/// Texts that are often selectors, or nearly.
fn text() -> impl Strategy<Value = String> {
    let tokens = [
        "a", "b/c.d", "in", "has", "contains", "has(", "all()", "global()", "==", "!=", "not", "in", "starts", "with",
        "ends", "contains", "{", "}", "'x'", "\"it's\"", "'\"'", "''", ",", "(", ")", "!", "&&", "||", " ", "\t", "=",
        "&", "é",
    ];
    let loose = proptest::collection::vec(select(tokens.to_vec()), 0..30).prop_map(|tokens| tokens.concat());
    let test = select(vec![
        "a == 'x'",
        "b != \"it's\"",
        "c in {'y', 'x',}",
        "c notin {}",
        "has(d)",
        "in contains ''",
        "e starts with '\"'",
        "f endswith 'z'",
        "all()",
        "global()",
    ]);
    let whole = test.prop_map(str::to_owned).prop_recursive(6, 40, 4, |inner| {
        let join = |operator: &'static str| move |parts: Vec<String>| parts.join(operator);
        prop_oneof![
            proptest::collection::vec(inner.clone(), 1..4).prop_map(join(" && ")),
            proptest::collection::vec(inner.clone(), 1..4).prop_map(join("||")),
            inner.clone().prop_map(|inner| format!("({inner})")),
            inner.clone().prop_map(|inner| format!("!{inner}")),
            inner.prop_map(|inner| format!("! !({inner})")),
        ]
    });
    prop_oneof![whole, loose, any::<String>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn what_is_shown_of_a_selector_is_the_same_one_again(text in text()) {
        selector_text::check(&text);
    }
}

/// The deepest parentheses that are allowed, around every kind of part: showing it adds none.
#[test]
fn the_deepest_selector_is_shown_too() {
    for inner in ["has(a) && (has(b) || has(c))", "(has(a) && has(b)) && has(c)", "!(!has(a))"] {
        let text = format!("{}{inner}{}", "(has(z) || ".repeat(127), ")".repeat(127));
        assert!(Selector::parse(&text).is_ok());
        selector_text::check(&text);
    }
}
