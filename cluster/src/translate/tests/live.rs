//! What a text says, said once more by a running cluster: the same models, and the same of what is wrong.

use std::collections::BTreeSet;

use serde_json::{Value as Json, json};

use super::*;
use crate::{
    resources::{
        Identities,
        live::{Live, LiveKind, Reader, Set},
    },
    text::tree::{self, Node, Value},
};

/// A tree as an API server would write it.
fn to_json(node: &Node) -> Json {
    match &node.value {
        Value::Null => Json::Null,
        Value::Bool(value) => json!(value),
        Value::Integer(value) => i64::try_from(*value).map_or(Json::Null, |value| json!(value)),
        Value::Float(value) => json!(value),
        Value::String(text) => json!(text),
        Value::List(items) => items.iter().map(to_json).collect(),
        Value::Map(entries) => {
            Json::Object(entries.iter().map(|(key, value)| (key.text.clone(), to_json(value))).collect())
        }
    }
}

fn kind_is_served(group: &str, version: &str) -> bool {
    matches!((group, version), ("" | "discovery.k8s.io" | "networking.k8s.io" | "crd.projectcalico.org", "v1"))
        || matches!((group, version), ("projectcalico.org", "v3") | ("policy.networking.k8s.io", "v1beta1"))
}

/// The objects of a text as an API server gives them; `None` where it would have none such.
fn objects_of(text: &str) -> Option<Vec<Json>> {
    let mut problems = Problems::default();
    let file = problems.add_source(Source::new("", text.to_owned()));
    let documents = tree::read_documents(file, &mut problems);
    let mut seen = BTreeSet::new();
    let mut objects = Vec::new();
    for mut object in documents.iter().map(to_json) {
        let text = |pointer: &str| object.pointer(pointer).and_then(Json::as_str).unwrap_or_default().to_owned();
        let (version, kind, name) = (text("/apiVersion"), text("/kind"), text("/metadata/name"));
        let (group, version) = version.split_once('/').unwrap_or(("", &version));
        let known = LiveKind::new(group, &kind).filter(|_| kind_is_served(group, version))?;
        let mut namespace = text("/metadata/namespace");
        if known.is_namespaced() && namespace.is_empty() {
            namespace = "default".to_owned();
            object.pointer_mut("/metadata")?.as_object_mut()?.insert("namespace".to_owned(), json!(namespace));
        }
        if name.is_empty() || !seen.insert((group.to_owned(), kind, namespace, name)) {
            return None;
        }
        objects.push(object);
    }
    problems.diagnostics().is_empty().then_some(objects)
}

/// Reads objects as a running cluster's.
pub(super) fn read_live(objects: &[Json], identities: &Identities) -> Vec<Set> {
    let reader = Reader::new(identities);
    let mut sets: Vec<Set> = Vec::new();
    for object in objects {
        let version = object["apiVersion"].as_str().unwrap();
        let kind =
            LiveKind::new(version.split_once('/').map_or("", |(group, _)| group), object["kind"].as_str().unwrap());
        let kind = kind.unwrap();
        let read: Live = reader.read(kind, &object.to_string()).unwrap();
        let known = sets.iter().position(|set| set.kind() == kind);
        let set = known.unwrap_or_else(|| {
            sets.push(Set::new(&reader, kind));
            sets.len() - 1
        });
        sets[set].put(Arc::new(read));
    }
    sets
}

fn from_live(config: &Arc<RouterConfig>, objects: &[Json], pods: &Arc<LocalPods>) -> Result<Loaded, Problems> {
    let mut sets = tree::on_reader_thread(|| read_live(objects, &Identities::default())).unwrap();
    let mut problems = Problems::default();
    problems.add_source(Source::new("weir.yaml", String::new()));
    let pieces: Vec<_> = sets.iter_mut().flat_map(Set::pieces).collect();
    let numbered: Vec<_> =
        pieces.iter().map(|pieces| (problems.share_source(Arc::clone(pieces.source())), pieces)).collect();
    let manifests = Manifests::of(numbered.iter().copied(), &BTreeMap::new(), &mut Chunks::default(), &mut problems);
    translate(Arc::clone(config), &Arc::new(manifests), pods, &mut Kept::default(), false, problems)
}

/// What was made, whatever the order of objects, and without their numbers and places.
fn made(outcome: &Result<Loaded, Problems>) -> (String, BTreeSet<String>) {
    let (problems, loaded) = match outcome {
        Ok(loaded) => (&loaded.notes, Some(loaded)),
        Err(problems) => (problems, None),
    };
    // What a later look says of a part that the reading has dropped already is told of texts alone.
    // Which of two that collide is told depends on their order.
    let said = problems.of(Severity::Error).map(|error| &error.message).filter(|message| !message.ends_with("'s too"));
    let said = said.cloned().collect();
    let Some(loaded) = loaded else { return (String::new(), said) };
    let mut services: Vec<String> = Vec::new();
    for service in &loaded.services.services {
        let mut service = (**service).clone();
        service.origin = 0;
        services.push(format!("{service:?}"));
    }
    services.sort();
    let mut workloads: Vec<String> =
        loaded.cluster.workloads.iter().map(|workload| format!("{} {:?}", workload.name, workload.addresses)).collect();
    workloads.sort();
    let mut policies = Vec::new();
    for policy in loaded.policy.tiers.iter().flat_map(|tier| &tier.policies) {
        policies.push(format!("{} {:?} {:?} {:?}", policy.name, policy.selector, policy.ingress, policy.egress));
    }
    policies.sort();
    (format!("{services:#?}\n{workloads:#?}\n{policies:#?}\n{:?}", loaded.counts), said)
}

/// Panics where a text's objects would mean something else if they came from a running cluster.
pub(super) fn compare(
    config: &Arc<RouterConfig>,
    text: &str,
    pods: &Arc<LocalPods>,
    of_text: &Result<Loaded, Problems>,
) {
    let is_whole = text.ends_with('\n');
    let Some(objects) = is_whole.then(|| objects_of(text)).flatten() else { return };
    let of_cluster = from_live(config, &objects, pods);
    let ((files, said), (cluster, said_live)) = (made(of_text), made(&of_cluster));
    assert_eq!(files, cluster, "{text}");
    if let Some(missing) = said_live.difference(&said).next() {
        panic!("only of the cluster: {missing}\nof the text: {said:#?}");
    }
    assert_eq!(of_text.is_ok(), of_cluster.is_ok(), "{said:?} {said_live:?}");
}

#[test]
fn a_place_is_an_object_with_its_version_and_a_field() {
    let objects = json!([
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "x", "resourceVersion": "7"},
         "spec": {"clusterIP": "10.96.0.300", "ports": [{"port": 80}]}},
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
         "metadata": {"name": "p", "namespace": "x", "resourceVersion": "4711"},
         "spec": {"podSelector": {}, "ingress": [{}, {"from": [{"ipBlok": {"cidr": "10.0.0.0/8"}}]}]}},
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
         "metadata": {"name": "q", "namespace": "x", "resourceVersion": "4712"},
         "spec": {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}]}},
    ]);
    let mut problems = Problems::default();
    let file = problems.add_source(Source::new("weir.yaml", WEIR.to_owned()));
    let (config, _) = RouterConfig::from_source(file, Path::new(""), &mut problems).unwrap();
    let problems = from_live(&Arc::new(config), objects.as_array().unwrap(), &Arc::default()).unwrap_err();
    let _ = problems.render(true);
    let lines: Vec<String> = problems.of(Severity::Error).map(|error| problems.line(error)).collect();
    let places: Vec<&str> = lines.iter().map(|line| line.split(": ").next().unwrap()).collect();
    let expected = [
        "Service/x/web (resourceVersion 7) spec.clusterIP",
        "NetworkPolicy/x/p (resourceVersion 4711) spec.ingress[1].from[0].ipBlok",
        "NetworkPolicy/x/q (resourceVersion 4712) spec.ingress[0].from[0].ipBlock.cidr",
    ];
    let places: BTreeSet<&str> = places.into_iter().collect();
    assert_eq!(places, BTreeSet::from(expected), "{lines:#?}");
}

#[test]
fn what_weir_does_not_read_makes_nothing_new_and_a_change_makes_one_bucket() {
    let reader = Reader::new(&Identities::default());
    let kind = LiveKind::new("", "Pod").unwrap();
    let pod = |name: usize, version: u32, address: &str| {
        let json = json!({"metadata": {"name": format!("p{name}"), "namespace": "x", "resourceVersion": version.to_string(),
            "managedFields": [version]}, "spec": {"nodeName": "a"}, "status": {"podIP": address,
            "conditions": [{"lastProbeTime": version}]}});
        Arc::new(reader.read(kind, &json.to_string()).unwrap())
    };
    assert!(pod(1, 1, "10.0.0.1").is_same(&pod(1, 2, "10.0.0.1")));
    assert!(!pod(1, 1, "10.0.0.1").is_same(&pod(1, 2, "10.0.0.2")));
    assert!(!pod(1, 1, "10.0.0.1").is_same(&pod(2, 1, "10.0.0.1")));
    let mut set = Set::new(&reader, kind);
    (0..1000).for_each(|name| set.put(pod(name, 1, "10.0.0.1")));
    let before = set.pieces();
    assert!(before.len() >= 10 && set.iter().count() == 1000 && set.len() == 1000);
    set.put(pod(7, 2, "10.0.0.9"));
    let after = set.pieces();
    let others = before.iter().zip(&after).filter(|(before, after)| !Arc::ptr_eq(before, after));
    assert_eq!((before.len(), others.count()), (after.len(), 1));
    let policy = LiveKind::new("networking.k8s.io", "NetworkPolicy").unwrap();
    let read = |version: &str, port: u16| {
        let json = json!({"metadata": {"name": "p", "resourceVersion": version}, "spec": {"ingress": [{"ports": [{"port": port}]}]}});
        tree::on_reader_thread(|| reader.read(policy, &json.to_string())).unwrap().unwrap()
    };
    assert!(read("1", 80).is_same(&read("2", 80)) && !read("1", 80).is_same(&read("2", 81)));
    set.remove(&pod(7, 2, "10.0.0.9").id().clone());
    assert_eq!(set.len(), 999);
}

#[test]
fn policies_that_calico_stores_with_their_tier_are_called_without_it() {
    let reader = Reader::new(&Identities::default());
    for (group, kind, stored, name) in [
        ("crd.projectcalico.org", "GlobalNetworkPolicy", "default.foo", "foo"),
        ("crd.projectcalico.org", "GlobalNetworkPolicy", "other.foo", "other.foo"),
        ("crd.projectcalico.org", "Tier", "default.foo", "default.foo"),
        ("projectcalico.org", "GlobalNetworkPolicy", "default.foo", "default.foo"),
    ] {
        let json = json!({"metadata": {"name": stored}, "spec": {}}).to_string();
        let kind = LiveKind::new(group, kind).unwrap();
        let read = tree::on_reader_thread(|| reader.read(kind, &json)).unwrap().unwrap();
        assert_eq!(&*read.id().name, name, "{group}");
    }
}

#[test]
fn what_is_no_object_is_an_error_and_what_is_deep_is_no_panic() {
    let reader = Reader::new(&Identities::default());
    let kind = LiveKind::new("networking.k8s.io", "NetworkPolicy").unwrap();
    for json in
        ["", "[]", "{}", "null", r#"{"metadata":{}}"#, r#"{"metadata":{"name":""}}"#, r#"{"metadata":{"name":5}}"#]
    {
        assert!(reader.read(kind, json).is_err(), "{json}");
    }
    let deep = format!(r#"{{"metadata":{{"name":"a"}},"spec":{}{}}}"#, "[".repeat(5000), "]".repeat(5000));
    assert!(reader.read(kind, &deep).is_err());
    let deep = format!(r#"{{"metadata":{{"name":"a"}},"spec":{}{}}}"#, "[".repeat(100), "]".repeat(100));
    let read = tree::on_reader_thread(|| reader.read(kind, &deep)).unwrap();
    assert!(read.is_ok());
}
