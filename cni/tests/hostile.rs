//! Whatever the environment and standard input hold, a run of the plugin ends with an answer of the specification.

use std::{ffi::OsString, os::unix::ffi::OsStringExt};

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use weir_cni::plugin;

/// Any JSON, of the kinds that fields have and of others.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,20}".prop_map(Value::from),
        prop::sample::select(vec![
            "1.1.0",
            "0.3.1",
            "tcp",
            "10.244.0.1/32",
            "eth0",
            "/nowhere/cni.sock",
            "\0",
            "../.."
        ])
        .prop_map(Value::from),
    ];
    let key = prop::sample::select(vec![
        "portMappings",
        "hostPort",
        "containerPort",
        "protocol",
        "hostIP",
        "ips",
        "address",
        "interfaces",
        "name",
        "mac",
        "containerID",
        "ifname",
        "\0",
    ]);
    leaf.prop_recursive(4, 32, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..4)
                .prop_map(|pairs| Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())),
        ]
    })
}

/// A configuration of which some fields are anything.
fn config() -> impl Strategy<Value = Vec<u8>> {
    let field = prop::sample::select(vec![
        "cniVersion",
        "name",
        "type",
        "socket",
        "dns",
        "ipam",
        "ipMasq",
        "runtimeConfig",
        "prevResult",
        "capabilities",
        "cni.dev/valid-attachments",
        "args",
    ]);
    let spoilt = prop::collection::vec((field, value()), 0..5).prop_map(|fields| {
        let mut config = json!({"cniVersion": "1.1.0", "name": "weir", "socket": "/nowhere/weir/cni.sock"});
        config
            .as_object_mut()
            .unwrap()
            .extend(fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<Map<_, _>>());
        config.to_string().into_bytes()
    });
    prop_oneof![4 => spoilt, 1 => value().prop_map(|value| value.to_string().into_bytes()), 1 => any::<Vec<u8>>()]
}

/// Variables that are right, any bytes, or missing.
fn environment() -> impl Strategy<Value = Vec<(&'static str, Option<OsString>)>> {
    let variable = |name: &'static str, good: &'static str| {
        let bytes = prop::collection::vec(1..=255u8, 0..300).prop_map(|bytes| Some(OsString::from_vec(bytes)));
        prop_oneof![6 => Just(Some(OsString::from(good))), 1 => Just(None), 1 => bytes]
            .prop_map(move |value| (name, value))
    };
    // No DEL with a socket that may be anywhere: it would be kept beside it.
    let command = prop::sample::select(vec!["ADD", "CHECK", "STATUS", "GC", "VERSION", "NONE"]);
    (
        command,
        variable("CNI_CONTAINERID", "0123abcd"),
        variable("CNI_IFNAME", "eth0"),
        variable("CNI_NETNS", "/proc/self/ns/net"),
        variable("CNI_ARGS", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0"),
    )
        .prop_map(|(command, a, b, c, d)| vec![("CNI_COMMAND", Some(command.into())), a, b, c, d])
}

proptest! {
    #[test]
    fn every_run_ends_with_an_answer_of_the_specification(environment in environment(), input in config()) {
        let lookup = |name: &str| environment.iter().find(|(key, _)| *key == name).and_then(|(_, value)| value.clone());
        let (answer, success) = plugin::run(&lookup, input.as_slice());
        if success {
            // Nobody listens anywhere, so that is all that can go well.
            prop_assert!(answer.is_some_and(|answer| answer["supportedVersions"].is_array()));
            return Ok(());
        }
        let answer = answer.expect("an error says what is wrong");
        prop_assert!(answer["cniVersion"].is_string(), "{}", answer);
        prop_assert!(answer["msg"].as_str().is_some_and(|text| !text.is_empty()), "{}", answer);
        let code = answer["code"].as_u64().unwrap();
        prop_assert!([1, 2, 4, 5, 6, 7, 11, 50].contains(&code), "{}", answer);
        prop_assert!(answer.to_string().len() < 2000, "{}", answer);
    }
}
