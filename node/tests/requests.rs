//! What clients write to the router's socket, at random: requests as they should be, and with something wrong in them.

mod request_text;

use proptest::prelude::*;

/// JSON that is near to requests.
fn near() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        any::<bool>().prop_map(|flag| flag.to_string()),
        (-2i64..70_000).prop_map(|number| number.to_string()),
        prop::sample::select(vec![
            "\"list\"",
            "\"watch\"",
            "\"delete\"",
            "\"count\"",
            "\"10.0.0.0/8\"",
            "\"10.1.1.7\"",
            "\"fd00::/64\"",
            "\"10.0.0.0/33\"",
            "\"\"",
            "\"SYN_SENT\"",
            "\"open\"",
            "\"shop/web\"",
        ])
        .prop_map(str::to_owned),
    ];
    let keys = vec![
        "conntrack",
        "services",
        "status",
        "policyHits",
        "ipam",
        "action",
        "filter",
        "of",
        "proto",
        "src",
        "dst",
        "sport",
        "dport",
        "replySrc",
        "replyDst",
        "address",
        "state",
        "tcpState",
        "dnat",
        "snat",
        "offload",
        "family",
        "fmaily",
        "reply_src",
        "limit",
    ];
    let object = |value: BoxedStrategy<String>| {
        prop::collection::vec((prop::sample::select(keys.clone()), value), 0..4).prop_map(|entries| {
            let entries: Vec<String> = entries.into_iter().map(|(key, value)| format!("\"{key}\":{value}")).collect();
            format!("{{{}}}", entries.join(","))
        })
    };
    let filter = object(leaf.clone().boxed());
    let query = prop_oneof![
        (prop::sample::select(vec!["list", "watch", "delete", "count", "lst"]), filter.clone())
            .prop_map(|(action, filter)| format!("{{\"action\":\"{action}\",\"filter\":{filter}}}")),
        filter,
        leaf,
    ];
    object(query.boxed())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_a_request_says_is_passed_over(line in near()) {
        request_text::check(line.as_bytes());
    }

    #[test]
    fn any_bytes_are_a_request_or_none(line in prop::collection::vec(any::<u8>(), 0..200)) {
        request_text::check(&line);
    }
}

#[test]
fn a_condition_that_is_not_known_is_refused() {
    let delete = |filter: &str| {
        let line = format!(r#"{{"conntrack": {{"action": "delete", "filter": {filter}}}}}"#);
        serde_json::from_str::<weir_node::control::Request>(&line).map_err(|error| error.to_string())
    };
    assert!(delete(r#"{"sport": 53}"#).is_ok());
    assert!(delete(r#"{"sourcePort": 53}"#).unwrap_err().contains("unknown field `sourcePort`"));
    assert!(delete(r#"{"family": 5}"#).unwrap_err().contains("4 nor 6"));
}
