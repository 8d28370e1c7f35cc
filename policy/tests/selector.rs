//! The selector language against cases taken from Calico's own tests.

use std::collections::BTreeMap;

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
