//! The tutorial scenarios through `weir trace`: who reaches whom is as their READMEs say.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

fn scenario(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/scenarios").join(name)
}

/// Traces `flows` (JSON lines) on `node` with the given manifests; the answers, in order.
fn trace(node: &str, manifests: &[PathBuf], flows: &str) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("weir.yaml");
    let list: Vec<String> = manifests.iter().map(|m| format!("{:?}", m.display().to_string())).collect();
    fs::write(&config, format!("nodeName: {node}\nmanifests: [{}]\n", list.join(", "))).unwrap();
    let file = folder.path().join("flows.jsonl");
    fs::write(&file, flows).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["trace", "-c"])
        .arg(&config)
        .arg("--flows")
        .arg(&file)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A flow as flows.jsonl has it, without what only the test reads.
fn input_of(line: &str) -> (String, String) {
    let mut flow: Value = serde_json::from_str(line).unwrap();
    let expect = flow.as_object_mut().unwrap().remove("expect").unwrap();
    if let Some(address) = flow["dst"].as_str().and_then(|dst| dst.strip_prefix("ip:")).map(str::to_owned) {
        flow["dst"] = address.into();
    }
    (flow.to_string(), expect.as_str().unwrap().to_owned())
}

/// Every flow of `flows` has its expected verdict, where a denial at either end's node denies.
fn expect_flows(nodes: &[&str], manifests: &[PathBuf], flows: &str) {
    let lines: Vec<(String, String)> = flows.lines().filter(|l| !l.trim().is_empty()).map(input_of).collect();
    let input: String = lines.iter().map(|(flow, _)| format!("{flow}\n")).collect();
    let answers: Vec<Vec<Value>> = nodes.iter().map(|node| trace(node, manifests, &input)).collect();
    for (index, (flow, expect)) in lines.iter().enumerate() {
        let denied = answers.iter().map(|a| &a[index]).find(|a| a["verdict"] == "drop");
        match (expect.as_str(), denied) {
            ("allow", None) => {}
            ("deny", Some(answer)) => assert!(answer["reason"].as_str().unwrap().starts_with("Policy"), "{answer}"),
            _ => panic!("{flow}: expected {expect}, got {:?}", answers.iter().map(|a| &a[index]).collect::<Vec<_>>()),
        }
    }
}

fn nodes_of(cluster: &Path) -> Vec<String> {
    let text = fs::read_to_string(cluster).unwrap();
    let documents = text.split("\n---").filter(|d| d.lines().any(|l| l == "kind: Node"));
    documents.map(|d| d.lines().find_map(|l| l.strip_prefix("  name: ")).unwrap().to_owned()).collect()
}

fn run(name: &str, policies: &str, flows: &str) {
    let folder = scenario(name);
    let cluster = folder.join("cluster.yaml");
    let nodes = nodes_of(&cluster);
    assert!(!nodes.is_empty());
    let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
    expect_flows(&nodes, &[cluster, folder.join(policies)], flows);
}

#[test]
fn three_tier_lets_each_tier_talk_to_its_neighbours() {
    run("three-tier", "policies.yaml", &fs::read_to_string(scenario("three-tier/flows.jsonl")).unwrap());
}

#[test]
fn three_tier_as_published_denies_db_to_was_as_its_policy_says() {
    let flows = fs::read_to_string(scenario("three-tier/flows.jsonl")).unwrap();
    let published: String = flows
        .lines()
        .map(|line| {
            let (flow, _) = input_of(line);
            let flow: Value = serde_json::from_str(&flow).unwrap();
            let from_db_to_was = flow["src"].as_str().unwrap().starts_with("db/") && flow["dport"] == 8080;
            if from_db_to_was { line.replace("\"allow\"", "\"deny\"") + "\n" } else { line.to_owned() + "\n" }
        })
        .collect();
    assert_ne!(published.trim(), flows.trim(), "the scenario has a flow from db to was");
    run("three-tier", "policies-as-published.yaml", &published);
}

#[test]
fn demo_is_three_tiers_on_two_nodes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/demo");
    let flows = fs::read_to_string(folder.join("flows.jsonl")).unwrap();
    expect_flows(&["node-a", "node-b"], &[folder.join("cluster.yaml"), folder.join("policies.yaml")], &flows);
}

fn node_port(cluster: &str, node: &str, flow: &str) -> Value {
    trace(node, &[scenario("webapp-nodeport").join(cluster)], flow).remove(0)
}

fn internal_ip(cluster: &str, node: &str) -> String {
    let text = fs::read_to_string(scenario("webapp-nodeport").join(cluster)).unwrap();
    let document = text
        .split("\n---")
        .find(|d| d.lines().any(|l| l == "kind: Node") && d.lines().any(|l| l.strip_prefix("  name: ") == Some(node)));
    let lines: Vec<&str> = document.unwrap().lines().collect();
    let at = lines.iter().position(|l| l.contains("InternalIP")).unwrap();
    lines[at + 1].split(": ").nth(1).unwrap().to_owned()
}

#[test]
fn node_port_with_policy_cluster_works_on_both_nodes_and_masquerades() {
    for node in ["minikube", "minikube-m02"] {
        let ip = internal_ip("cluster-cluster.yaml", node);
        let flow = format!("{{\"src\": \"203.0.113.9\", \"dst\": \"{ip}\", \"proto\": \"tcp\", \"dport\": 31380}}");
        let answer = node_port("cluster-cluster.yaml", node, &flow);
        assert_eq!(answer["verdict"], "forward", "{answer}");
        assert_eq!(answer["masquerade"], true, "{answer}");
        assert_eq!(answer["backends"].as_array().unwrap().len(), 2, "{answer}");
    }
}

#[test]
fn node_port_with_policy_local_keeps_the_client_and_drops_where_no_backend_is() {
    let flow = |node: &str| {
        let ip = internal_ip("cluster-local.yaml", node);
        format!("{{\"src\": \"203.0.113.9\", \"dst\": \"{ip}\", \"proto\": \"tcp\", \"dport\": 31380}}")
    };
    let answer = node_port("cluster-local.yaml", "minikube", &flow("minikube"));
    assert_eq!((&answer["verdict"], &answer["masquerade"]), (&"forward".into(), &false.into()), "{answer}");
    let answer = node_port("cluster-local.yaml", "minikube-m02", &flow("minikube-m02"));
    assert_eq!((&answer["verdict"], &answer["reason"]), (&"drop".into(), &"NoLocalBackend".into()), "{answer}");
}

#[test]
fn advanced_policy_demo_opens_step_by_step() {
    for step in 0..=3 {
        let flows =
            fs::read_to_string(scenario("advanced-policy-demo").join(format!("step{step}-flows.jsonl"))).unwrap();
        run("advanced-policy-demo", &format!("step{step}-policies.yaml"), &flows);
    }
}
