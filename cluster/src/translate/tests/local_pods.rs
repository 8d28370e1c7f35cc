//! Pods that the node's own CNI plugin made, beside what objects say.

use weir_dataplane::model::Workload;

use super::*;
use crate::trace::Tracer;

const NODE: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDRs: [10.1.0.0/24]}\n---\napiVersion: v1\nkind: \
     Node\nmetadata: {name: node-b}\nspec: {podCIDRs: [10.1.1.0/24]}\nstatus: {addresses: [{type: InternalIP, address: \
     192.0.2.2}]}\n";

/// x/web-0 with the address 10.1.0.5.
fn web_0(uid: Option<&str>) -> LocalPod {
    LocalPod {
        name: "x/web-0".into(),
        uid: uid.map(str::to_owned),
        sandbox: "s1".into(),
        device: workload_device("x", "web-0"),
        mac: "02:00:00:00:00:05".parse().unwrap(),
        addresses: vec!["10.1.0.5".parse().unwrap()],
    }
}

/// A pod's object: what is added to its metadata and its spec, and its status.
fn object(name: &str, node: &str, metadata: &str, spec: &str, status: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: x, labels: {{app: web}}{metadata}}}\nspec: {{nodeName: \
         {node}, containers: [{{name: c, ports: [{{name: http, containerPort: 8080}}]}}]{spec}}}\nstatus: {{{status}}}\n"
    )
}

fn named<'l>(loaded: &'l Loaded, name: &str) -> Vec<&'l Workload> {
    loaded.cluster.workloads.iter().filter(|workload| workload.name == name).collect()
}

/// Name, "local", and networks of the policy endpoints of pods.
fn endpoints(loaded: &Loaded) -> Vec<String> {
    let text = |endpoint: &Arc<weir_policy::model::Endpoint>| {
        let nets: Vec<String> = endpoint.nets.iter().map(ToString::to_string).collect();
        format!("{} {} {}", endpoint.name, if endpoint.local { "local" } else { "remote" }, nets.join(","))
    };
    loaded.policy.endpoints.iter().map(text).collect()
}

#[test]
fn an_object_is_a_pods_own_by_its_uid() {
    let local = "x/web-0 local 10.1.0.5/32";
    let (running, old) = ("phase: Running, podIP: 10.1.0.5", "podIP: 10.1.0.77");
    let terminating = ", uid: u1, deletionTimestamp: '2026-01-01T00:00:00Z'";
    let mirror = ", uid: other, annotations: {kubernetes.io/config.mirror: u1}";
    let a = "node-a";
    for (case, uid, text, described) in [
        ("no object", Some("u1"), String::new(), false),
        ("no status yet", Some("u1"), object("web-0", a, ", uid: u1", "", ""), true),
        ("with its address", Some("u1"), object("web-0", a, ", uid: u1", "", running), true),
        ("an earlier sandbox's address", Some("u1"), object("web-0", a, ", uid: u1", "", old), true),
        ("of the pod before", Some("u1"), object("web-0", a, ", uid: u0", "", old), false),
        ("terminating", Some("u1"), object("web-0", a, terminating, "", running), true),
        ("ended", Some("u1"), object("web-0", a, ", uid: u1", "", "phase: Succeeded"), true),
        ("a static pod's", Some("u1"), object("web-0", a, mirror, "", ""), true),
        ("another static pod's", Some("u2"), object("web-0", a, mirror, "", ""), false),
        ("without a uid", Some("u1"), object("web-0", a, "", "", ""), true),
        ("no uid is known", None, object("web-0", a, ", uid: u9", "", old), true),
        ("no uid is known, ended", None, object("web-0", a, ", uid: u9", "", "phase: Failed, podIP: 10.1.0.5"), false),
        ("on the host", None, object("web-0", a, ", uid: u1", ", hostNetwork: true", ""), false),
        ("another pod", Some("u1"), object("web-1", a, ", uid: u1", "", ""), false),
    ] {
        let loaded =
            load_with_pods(&format!("{NODE}{text}"), &[web_0(uid)]).unwrap_or_else(|problems| panic!("{problems}"));
        let [workload] = named(&loaded, "x/web-0")[..] else { panic!("{case}: {:?}", loaded.cluster.workloads) };
        let pod = web_0(uid);
        assert_eq!(
            (&workload.addresses, &workload.device, workload.mac),
            (&pod.addresses, &pod.device, Some(pod.mac)),
            "{case}"
        );
        assert_eq!(workload.node.as_deref(), Some("node-a"), "{case}");
        let expected = if described { vec![local.to_owned()] } else { Vec::new() };
        assert_eq!(endpoints(&loaded), expected, "{case}");
        assert_eq!(loaded.undescribed.contains("x/web-0"), !described, "{case}");
        if described {
            let endpoint = &loaded.policy.endpoints[0];
            assert_eq!(endpoint.labels["app"], "web", "{case}");
            assert_eq!((endpoint.ports[0].name.as_str(), endpoint.ports[0].port), ("http", 8080), "{case}");
        }
    }
}

#[test]
fn a_pod_of_the_same_name_on_another_node_is_another() {
    let elsewhere = object("web-0", "node-b", ", uid: u2", "", "podIP: 10.1.1.9");
    for uid in [Some("u1"), None] {
        let loaded = load_with_pods(&format!("{NODE}{elsewhere}"), &[web_0(uid)]).unwrap();
        let nodes: Vec<_> = named(&loaded, "x/web-0").into_iter().map(|w| w.node.as_deref().unwrap()).collect();
        assert_eq!(nodes, ["node-a", "node-b"]);
        assert_eq!(endpoints(&loaded), ["x/web-0 remote 10.1.1.9/32"]);
        assert!(loaded.undescribed.contains("x/web-0"));
    }
}

#[test]
fn addresses_are_those_of_pods_that_are_there() {
    let terminating = ", deletionTimestamp: '2026-01-01T00:00:00Z'";
    let text = [
        NODE,
        // It had web-0's address before.
        &object("old", "node-a", terminating, "", "podIP: 10.1.0.5"),
        &object("done", "node-a", "", "", "phase: Succeeded, podIP: 10.1.0.5"),
        // It is there, but cannot be right.
        &object("wrong", "node-b", "", "", "podIP: 10.1.0.5, podIPs: [{ip: 10.1.0.5}, {ip: 'fd00::1'}]"),
        // It still has what it had; of the other it is told before the pod that has it now.
        &object("leaving", "node-b", terminating, "", "podIP: 10.1.1.1"),
        &object("left", "node-b", terminating, "", "podIP: 10.1.1.2"),
        &object("new", "node-b", "", "", "podIP: 10.1.1.2"),
    ]
    .concat();
    let loaded = load_with_pods(&text, &[web_0(None)]).unwrap();
    let owners: Vec<String> =
        loaded.cluster.workloads.iter().map(|w| format!("{} {:?}", w.name, w.addresses)).collect();
    assert_eq!(owners, ["x/web-0 [10.1.0.5]", "x/wrong [fd00::1]", "x/leaving [10.1.1.1]", "x/new [10.1.1.2]"]);
    assert_eq!(
        lines_of(&Ok(loaded)),
        [
            "cluster.yaml:28:1: warning: Pod x/wrong: 10.1.0.5 is the address of x/web-0 too [one of the two is probably \
          gone: take it out]"
        ]
    );
}

#[test]
fn a_workload_endpoint_gives_no_other_device_or_address_to_such_a_pod() {
    let endpoint = "---\napiVersion: projectcalico.org/v3\nkind: WorkloadEndpoint\nmetadata: {name: e, namespace: x}\nspec: {node: \
                    node-a, pod: web-0, orchestrator: k8s, interfaceName: cali0, ipNetworks: [10.1.0.6/32], profiles: [kns.x]}\n";
    let without = load_with_pods(&format!("{NODE}{endpoint}"), &[web_0(None)]).unwrap();
    let with = object("web-0", "node-a", "", "", "") + endpoint;
    let with = load_with_pods(&format!("{NODE}{with}"), &[web_0(None)]).unwrap();
    for (loaded, known) in [(without, &[][..]), (with, &["x/web-0 local 10.1.0.5/32"])] {
        let [workload] = &loaded.cluster.workloads[..] else { panic!("{:?}", loaded.cluster.workloads) };
        assert_eq!((&workload.device, &workload.addresses), (&web_0(None).device, &web_0(None).addresses));
        assert_eq!(endpoints(&loaded), known);
    }
}

/// Nothing is known of the pod but where it is: all that has it at an end is denied, whatever policy there is, and it can be nobody else.
#[test]
fn a_pod_without_an_object_is_denied_in_both_directions() {
    let peer = object("peer", "node-a", "", "", "podIP: 10.1.0.6");
    let mut all = web_0(Some("u1"));
    all.addresses = vec!["10.1.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
    let nodes = NODE.replacen("---", "status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}\n---", 1);
    let weir_knows =
        |object: &str| load_with_pods(&format!("{nodes}{object}{peer}"), std::slice::from_ref(&all)).unwrap();
    let verdict = |loaded: &Loaded, flow: &str| {
        let mut answer = Vec::new();
        Tracer::new(loaded).unwrap().run(flow.as_bytes(), &mut answer, false).unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
        format!("{} {}", answer["verdict"].as_str().unwrap_or("?"), answer["reason"].as_str().unwrap_or("-"))
    };
    let device = &all.device;
    let flows = [
        (r#"{"id":1,"src":"10.1.0.5","dst":"10.1.0.6","proto":"tcp","dport":80}"#.to_owned(), "forward -"),
        (r#"{"id":2,"src":"10.1.0.6","dst":"10.1.0.5","proto":"tcp","dport":80}"#.to_owned(), "forward -"),
        (r#"{"id":3,"src":"10.1.1.7","dst":"10.1.0.5","proto":"udp","dport":53}"#.to_owned(), "forward -"),
        (r#"{"id":4,"src":"10.1.0.5","dst":"198.51.100.1","proto":"udp","dport":53}"#.to_owned(), "pass -"),
        (
            format!(r#"{{"id":5,"src":"10.1.0.9","dst":"10.1.0.6","proto":"udp","dport":53,"device":"{device}"}}"#),
            "drop SpoofedSource",
        ),
    ];
    let (without, with) = (weir_knows(""), weir_knows(&object("web-0", "node-a", ", uid: u1", "", "")));
    for (flow, described) in flows {
        assert_eq!(verdict(&with, &flow), described, "{flow}");
        let denied = if described.starts_with("drop") { described } else { "drop PolicyNotReady" };
        assert_eq!(verdict(&without, &flow), denied, "{flow}");
    }
    // The node itself always reaches its pods.
    let from_node = r#"{"id":6,"src":"192.0.2.1","dst":"10.1.0.5","proto":"tcp","dport":80,"device":"host"}"#;
    assert_eq!(verdict(&without, from_node), "forward -");
}
