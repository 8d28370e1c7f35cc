//! Why a backend is in a list or not, row by row.

mod common;

use common::*;
use weir_nat::{Endpoint, Model, WhyNot, usage};

fn only_serving(endpoint: Endpoint) -> Endpoint {
    Endpoint { ready: false, serving: true, terminating: false, ..endpoint }
}

/// Why not in the cluster list and in the local list, for each of the endpoints.
fn reasons(model: &Model) -> Vec<[Option<WhyNot>; 2]> {
    usage(model, &model.services[0]).into_iter().map(|one| [one.cluster, one.local]).collect()
}

#[test]
fn each_reason() {
    let there = || Some(WhyNot::NotHere("node-b".into()));
    let zone = |endpoints| Model { zone: Some("zone-a".into()), ..world(endpoints) };
    for (name, model, expected) in [
        ("ready", world(vec![on("node-a", "10.1.0.1")]), vec![[None, None]]),
        ("elsewhere", world(vec![on("node-b", "10.1.0.1")]), vec![[None, there()]]),
        ("no node", world(vec![on("", "10.1.0.1")]), vec![[None, Some(WhyNot::NoNode)]]),
        (
            "conditions",
            world(vec![
                unready(on("node-a", "10.1.0.1")),
                only_serving(on("node-a", "10.1.0.2")),
                terminating(on("node-a", "10.1.0.3")),
                on("node-b", "10.1.0.4"),
            ]),
            vec![
                [Some(WhyNot::NotServing), Some(WhyNot::NotServing)],
                [Some(WhyNot::NotReady), Some(WhyNot::NotReady)],
                // The cluster list has a ready one, the local list has none.
                [Some(WhyNot::Terminating), None],
                [None, there()],
            ],
        ),
        (
            "zones",
            zone(vec![
                zones(on("node-b", "10.1.0.1"), &["zone-a"]),
                zones(on("node-a", "10.1.0.2"), &["zone-b", "zone-c"]),
            ]),
            vec![[None, there()], [Some(WhyNot::OtherZones(vec!["zone-b".into(), "zone-c".into()])), None]],
        ),
        (
            "nodes",
            zone(vec![nodes(on("node-b", "10.1.0.1"), &["node-a"]), nodes(on("node-a", "10.1.0.2"), &["node-c"])]),
            vec![[None, there()], [Some(WhyNot::OtherNodes(vec!["node-c".into()])), None]],
        ),
        (
            "one without a hint",
            zone(vec![zones(on("", "10.1.0.1"), &["zone-b"]), on("", "10.1.0.2")]),
            vec![[None, Some(WhyNot::NoNode)], [None, Some(WhyNot::NoNode)]],
        ),
    ] {
        assert_eq!(reasons(&model), expected, "{name}");
    }
}

#[test]
fn only_families_with_a_cluster_ip_and_each_address_once() {
    let v6 = Endpoint { address: "fd00::1".parse().expect("an address"), ..on("", "10.1.0.1") };
    let model = world(vec![unready(on("node-a", "10.1.0.1")), v6, on("node-a", "10.1.0.1")]);
    assert_eq!(reasons(&model), [[None, None]]);
}
