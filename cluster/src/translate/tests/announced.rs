//! Addresses that nothing but a pod's annotations tell of, and who may not have one by them.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::*;
use crate::trace::Tracer;

const NODES: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDRs: [10.1.0.0/24]}\nstatus: {addresses: [{type: \
     InternalIP, address: 192.0.2.1}]}\n---\napiVersion: v1\nkind: Node\nmetadata: {name: node-b, annotations: \
     {projectcalico.org/IPv4IPIPTunnelAddr: 10.1.1.1}}\nspec: {podCIDRs: [10.1.1.0/24, 'fd00:1::/64']}\nstatus: {addresses: [{type: \
     InternalIP, address: 192.0.2.2}]}\n---\napiVersion: v1\nkind: Node\nmetadata: {name: node-c}\nspec: {podCIDRs: [10.1.2.0/24]}\n";

/// A pod whose annotation names addresses; more of its spec, and its status.
fn announced(name: &str, node: &str, addresses: &str, spec: &str, status: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: x, labels: {{app: {name}}}, annotations: \
         {{cni.projectcalico.org/podIP: '', cni.projectcalico.org/podIPs: '{addresses}'}}}}\nspec: {{nodeName: '{node}'{spec}}}\nstatus: \
         {{{status}}}\n"
    )
}

fn with_status(name: &str, node: &str, address: &str, rest: &str) -> String {
    announced(name, node, "", "", &format!("podIP: {address}{rest}"))
}

/// "pod address,address" of all workloads, ordered.
fn workloads(loaded: &Loaded) -> Vec<String> {
    let text = |addresses: &[IpAddr]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let named = |name: &str| name.strip_prefix("x/").unwrap().to_owned();
    let all = loaded.cluster.workloads.iter();
    let mut all: Vec<String> =
        all.map(|workload| format!("{} {}", named(&workload.name), text(&workload.addresses))).collect();
    all.sort();
    all
}

#[test]
fn an_annotation_counts_for_what_only_that_pods_node_can_have_given_it() {
    let p = |addresses: &str| announced("p", "node-b", addresses, "", "");
    let terminating = with_status("q", "node-b", "10.1.1.5", "")
        .replace("namespace: x", "namespace: x, deletionTimestamp: '2026-01-01T00:00:00Z'");
    let endpoint = "---\napiVersion: projectcalico.org/v3\nkind: WorkloadEndpoint\nmetadata: {name: w, namespace: x}\nspec: {orchestrator: \
                    other, workload: w, node: node-b, interfaceName: cali1, ipNetworks: [10.1.1.5/32]}\n";
    let first = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: x, annotations: {cni.projectcalico.org/podIP: 10.1.1.6/32}}\n\
                 spec: {nodeName: node-b}\n";
    for (case, text, expected) in [
        ("as Calico writes it", p("10.1.1.5/32"), &["p 10.1.1.5"][..]),
        ("of both families", p("10.1.1.5/32,fd00:1::5/128"), &["p 10.1.1.5,fd00:1::5"]),
        ("the first alone", first.to_owned(), &["p 10.1.1.6"]),
        ("without a length", p("10.1.1.5"), &["p 10.1.1.5"]),
        ("a range", p("10.1.1.4/31"), &[]),
        ("a third", p("10.1.1.5/32,fd00:1::5/128,10.1.1.6/32"), &[]),
        ("two of one family", p("10.1.1.5/32,10.1.1.6/32"), &[]),
        ("no address", p("10.1.1.5/32,here"), &[]),
        ("taken back", p(""), &[]),
        ("of another node's range", p("10.1.2.5/32"), &[]),
        ("of no node's range", p("10.9.9.9/32"), &[]),
        ("one of the two is another node's", p("10.1.2.5/32,fd00:1::5/128"), &["p fd00:1::5"]),
        ("the node's tunnel address", p("10.1.1.1/32"), &[]),
        ("on no node", announced("p", "", "10.1.1.5/32", "", ""), &[]),
        ("on a node that nobody knows", announced("p", "node-z", "10.1.1.5/32", "", ""), &[]),
        ("on the host's network", announced("p", "node-b", "10.1.1.5/32", ", hostNetwork: true", ""), &[]),
        ("ended", announced("p", "node-b", "10.1.1.5/32", "", "phase: Succeeded"), &[]),
        ("its status says another", announced("p", "node-b", "10.1.1.5/32", "", "podIP: 10.1.1.7"), &["p 10.1.1.7"]),
        (
            "its status says another in the list",
            announced("p", "node-b", "10.1.1.5/32", "", "podIPs: [{ip: 10.1.1.7}]"),
            &["p 10.1.1.7"],
        ),
        ("another's by status", p("10.1.1.5/32") + &with_status("q", "node-b", "10.1.1.5", ""), &["q 10.1.1.5"]),
        (
            "another's that stands behind",
            with_status("a", "node-b", "10.1.1.5", "") + &p("10.1.1.5/32"),
            &["a 10.1.1.5"],
        ),
        ("another's that goes", p("10.1.1.5/32") + &terminating, &["q 10.1.1.5"]),
        ("another's on another node", p("10.1.1.5/32") + &with_status("q", "node-c", "10.1.1.5", ""), &["q 10.1.1.5"]),
        (
            "another's that has ended",
            p("10.1.1.5/32") + &with_status("q", "node-b", "10.1.1.5", ", phase: Failed"),
            &["p 10.1.1.5"],
        ),
        ("an endpoint's of Calico", p("10.1.1.5/32") + endpoint, &["w 10.1.1.5"]),
        ("claimed twice", p("10.1.1.5/32") + &announced("q", "node-b", "10.1.1.5/32", "", ""), &[]),
        (
            "claimed from a node that cannot give it",
            p("10.1.1.5/32") + &announced("q", "node-c", "10.1.1.5/32", "", ""),
            &["p 10.1.1.5"],
        ),
        ("on this node", announced("p", "node-a", "10.1.0.5/32", "", ""), &["p 10.1.0.5"]),
    ] {
        let loaded =
            load_texts(WEIR, &format!("{NODES}{text}")).unwrap_or_else(|problems| panic!("{case}: {problems}"));
        assert_eq!(workloads(&loaded), expected, "{case}");
        assert_eq!(loaded.notes.of(Severity::Warning).count(), 0, "{case}: {}", loaded.notes);
    }
}

#[test]
fn of_pods_that_weir_makes_itself_it_believes_itself_alone() {
    let weir = "nodeName: node-a\nmanifests: [cluster.yaml]\ncni: {}\n";
    let text = NODES.to_owned()
        + &announced("here", "node-a", "10.1.0.5/32", "", "")
        + &announced("there", "node-b", "10.1.1.5/32", "", "");
    assert_eq!(workloads(&loaded(weir, &text)), ["there 10.1.1.5"]);
    // Whoever claims what it has made has nothing of it.
    let made = LocalPod {
        name: "x/made".into(),
        uid: None,
        sandbox: "s".into(),
        device: "cali1".into(),
        mac: "02:00:00:00:00:05".parse().unwrap(),
        addresses: vec!["10.1.0.5".parse().unwrap()],
    };
    let loaded = load_with_pods(&text, &[made]).unwrap_or_else(|problems| panic!("{problems}"));
    assert_eq!(workloads(&loaded), ["made 10.1.0.5", "there 10.1.1.5"]);
}

/// Random pods with true and false annotations, beside what the rules say one by one.
#[test]
fn no_annotation_takes_an_address_from_another() {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut counted = 0;
    for round in 0..300 {
        let mut below = |bound: u32| random.next_u32() % bound;
        let mut text = NODES.to_owned();
        // Name, node, announced, by status.
        let mut pods: Vec<(String, u32, Option<String>, Option<String>)> = Vec::new();
        for number in 0..below(7) {
            let node = below(3);
            let address = |below: &mut dyn FnMut(u32) -> u32| format!("10.1.{}.{}", below(3), 5 + below(2));
            let by_status = (below(3) == 0).then(|| address(&mut below));
            let by_annotation = (below(4) > 0).then(|| address(&mut below));
            let name = format!("p{number}");
            let status = by_status.as_ref().map_or_else(String::new, |address| format!("podIP: {address}"));
            let node_name = format!("node-{}", ["a", "b", "c"][node as usize]);
            text += &announced(&name, &node_name, by_annotation.as_deref().unwrap_or_default(), "", &status);
            pods.push((name, node, by_annotation, by_status));
        }
        let mut expected = BTreeSet::new();
        for (name, node, by_annotation, by_status) in &pods {
            let others = || pods.iter().filter(|other| other.0 != *name);
            let in_range = |address: &str, node: u32| address.starts_with(&format!("10.1.{node}."));
            if let Some(address) = by_status {
                expected.insert(format!("{name} {address}"));
            } else if let Some(address) = by_annotation
                && in_range(address, *node)
                && !others().any(|other| other.3.as_ref() == Some(address))
                && !others()
                    .any(|other| other.3.is_none() && other.2.as_ref() == Some(address) && in_range(address, other.1))
            {
                counted += 1;
                expected.insert(format!("{name} {address}"));
            }
        }
        let loaded = load_texts(WEIR, &text).unwrap_or_else(|problems| panic!("{problems}"));
        let found: BTreeSet<String> = workloads(&loaded).into_iter().collect();
        assert_eq!(found, expected, "round {round}:\n{text}");
    }
    assert!(counted > 100, "{counted} annotations counted");
}

/// What the policy of this node's pod says of one that is known by its annotation only.
#[test]
fn policy_knows_a_remote_pod_by_its_annotation() {
    let policy = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: n, namespace: x}\nspec:\n  podSelector: \
                  {matchLabels: {app: server}}\n  policyTypes: [Ingress, Egress]\n  ingress: [{from: [{podSelector: {matchLabels: {app: \
                  client}}}]}]\n  egress: [{to: [{podSelector: {matchLabels: {app: client}}}]}]\n";
    let server = with_status("server", "node-a", "10.1.0.9", "");
    let verdicts = |clients: &str| {
        let loaded = loaded(WEIR, &format!("{NODES}{server}{clients}{policy}"));
        let flows = [("10.1.1.5", "x/server"), ("x/server", "10.1.1.5")];
        flows.map(|(src, dst)| {
            let line = json!({"src": src, "dst": dst, "proto": "tcp", "dport": 80}).to_string();
            let mut output = Vec::new();
            assert!(Tracer::new(&loaded).unwrap().run(line.as_bytes(), &mut output, false).unwrap());
            let answer: Value = serde_json::from_slice(&output).unwrap();
            let verdict = answer["verdict"].as_str().unwrap().to_owned();
            assert!(verdict != "drop" || answer["reason"].as_str().unwrap().starts_with("Policy"), "{answer}");
            verdict != "drop"
        })
    };
    let client = announced("client", "node-b", "10.1.1.5/32", "", "");
    assert_eq!(verdicts(""), [false, false]);
    assert_eq!(verdicts(&client), [true, true]);
    // Somebody who may make pods in that namespace cannot pass for the client from another node, nor from where another pod is.
    assert_eq!(verdicts(&announced("client", "node-c", "10.1.1.5/32", "", "")), [false, false]);
    assert_eq!(verdicts(&(client + &with_status("other", "node-b", "10.1.1.5", ""))), [false, false]);
}
