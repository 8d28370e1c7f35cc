//! The matrix of the demo's cluster, with expectations that were read off its policies by hand, and of random clusters, where it agrees
//! with `weir trace`.

use std::{path::Path, process::Command};

use proptest::prelude::*;
use serde_json::{Value, json};
use weir::policy::{grid, svg};
use weir_cluster::{
    policy::{
        groups::{self, Groups},
        matrix::{Answer, Cell, Matrix, Pod, Probe, Question},
    },
    trace::Tracer,
    translate::{self, Loaded},
};
use weir_policy::Judgement;

use crate::random::{self, Cluster};

const DEMO: &str = "configs/demo/node-a.yaml";

/// What `weir policy matrix` prints for the demo.
fn weir(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["policy", "matrix", "-c", DEMO])
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn demo() -> Loaded {
    translate::load_strictly(&Path::new(env!("CARGO_MANIFEST_DIR")).join(DEMO)).unwrap()
}

/// The demo's policies: web > was:8080 > db:3306 and was > web:80, db > was:8080; whatever else leaves or enters one of these namespaces
/// is denied (DNS, which nobody publishes, apart). Nothing selects pods of `default`. Test pods publish nothing and are asked at tcp/80.
#[test]
fn the_demo_as_text() {
    let expected = "\
Who reaches whom: 11 pods, on the ports that each destination publishes (tcp/80 where it publishes none).

                                          1 1
                     1 2 3  4 5 6  7 8  9 0 1
 1 db/db-server-0    . X X  E E E  + X  X X X
 2 db/db-server-1    X . X  E E E  + X  X X X
 3 db/db-test-pod    X X .  E E E  + X  X X X

 4 default/client    I I I  . + +  I I  I I I
 5 default/webapp-1  I I I  + . +  I I  I I I
 6 default/webapp-2  I I I  + + .  I I  I I I

 7 was/was-server-0  + + X  E E E  . X  + + +
 8 was/was-test-pod  + + X  E E E  X .  + + +

 9 web/web-server-0  X X X  E E E  + X  . X X
10 web/web-server-1  X X X  E E E  + X  X . X
11 web/web-test-pod  X X X  E E E  + X  X X .

  +  allowed
  E  denied by the source's egress policy
  I  denied by the destination's ingress policy
  X  denied by both
  .  itself: never denied
";
    assert_eq!(weir(&[]), expected);
    // DNS may leave to any pod of a namespace with labels, which every namespace has; only pods of `default` let it in.
    // Pods are numbered by name: those of `default` are columns only.
    let expected = "\
Who reaches whom: 5 pods, on udp/53.

                    1 2 3  4 5
4 was/was-server-0  + + +  . I
5 was/was-test-pod  + + +  I .

Columns:
1 default/client
2 default/webapp-1
3 default/webapp-2

  +  allowed
  I  denied by the destination's ingress policy
  .  itself: never denied
";
    assert_eq!(weir(&["--from", "was", "--to", "default", "--to", "was", "--ports", "udp/53"]), expected);
}

/// The rule of a demo pod's policy that lets a packet leave to, or enter from, a namespace.
fn rule_by_hand(direction: &str, own: &str, other: &str, port: &str) -> Option<u32> {
    match (direction, own, other, port) {
        ("egress", "web", "was", "tcp/8080") => Some(1),
        ("egress", "was", "web", "tcp/80") => Some(1),
        ("egress", "was", "db", "tcp/3306") => Some(2),
        ("egress", "db", "was", "tcp/8080") => Some(1),
        ("ingress", "web", "was", "tcp/80") => Some(1),
        ("ingress", "was", "web", "tcp/8080") => Some(1),
        ("ingress", "was", "db", "tcp/8080") => Some(2),
        ("ingress", "db", "was", "tcp/3306") => Some(1),
        _ => None,
    }
}

#[test]
fn the_demo_as_json() {
    let value: Value = serde_json::from_str(&weir(&["--output", "json"])).unwrap();
    // Name, node, address and port, by the manifests.
    let pods = [
        ("db/db-server-0", "node-a", "10.1.1.30", "tcp/3306"),
        ("db/db-server-1", "node-b", "10.1.2.30", "tcp/3306"),
        ("db/db-test-pod", "node-a", "10.1.1.35", "tcp/80"),
        ("default/client", "node-a", "10.1.1.194", "tcp/80"),
        ("default/webapp-1", "node-b", "10.1.2.102", "tcp/80"),
        ("default/webapp-2", "node-b", "10.1.2.103", "tcp/80"),
        ("was/was-server-0", "node-b", "10.1.2.20", "tcp/8080"),
        ("was/was-test-pod", "node-b", "10.1.2.25", "tcp/80"),
        ("web/web-server-0", "node-a", "10.1.1.10", "tcp/80"),
        ("web/web-server-1", "node-b", "10.1.2.10", "tcp/80"),
        ("web/web-test-pod", "node-a", "10.1.1.15", "tcp/80"),
    ];
    let judged = |direction: &str, own: &str, other: &str, port: &str| {
        if own == "default" {
            return json!({"verdict": "allow", "by": "profile kns.default", "at": []});
        }
        // Where the policies stand in their file.
        let line = match own {
            "web" => 1,
            "was" => 37,
            _ => 87,
        };
        let at = [format!("configs/demo/policies.yaml:{line}")];
        let policy = format!("NetworkPolicy/{own}/{own}-policy");
        match rule_by_hand(direction, own, other, port) {
            Some(rule) => json!({"verdict": "allow", "by": format!("{policy} rule {rule}"), "at": at}),
            None => json!({"verdict": "deny", "by": format!("default-deny {policy}"), "at": at}),
        }
    };
    let mut flows = Vec::new();
    for (from, ..) in pods {
        for (to, _, _, port) in pods {
            let namespace = |name: &'static str| name.split('/').next().unwrap();
            let egress = judged("egress", namespace(from), namespace(to), port);
            let ingress = judged("ingress", namespace(to), namespace(from), port);
            let verdict = match (egress["verdict"] == "allow", ingress["verdict"] == "allow") {
                (true, true) => "allowed",
                (false, true) => "deniedByEgress",
                (true, false) => "deniedByIngress",
                (false, false) => "deniedByBoth",
            };
            let [verdict, egress, ingress] = match from == to {
                true => [json!("allowed"), Value::Null, Value::Null],
                false => [json!(verdict), egress, ingress],
            };
            flows.push(json!({
                "from": from, "to": to, "port": port, "family": 4,
                "verdict": verdict, "egress": egress, "ingress": ingress,
            }));
        }
    }
    let pods = pods.map(
        |(name, node, address, port)| json!({"name": name, "node": node, "addresses": [address], "ports": [port]}),
    );
    assert_eq!(value["pods"], json!(pods));
    for (flow, expected) in value["flows"].as_array().unwrap().iter().zip(&flows) {
        assert_eq!(flow, expected);
    }
    assert_eq!(value["flows"].as_array().unwrap().len(), flows.len());
}

#[test]
fn the_picture_has_a_cell_with_its_rules_for_each_pair() {
    let loaded = demo();
    let matrix = Matrix::new(&loaded, &Question::default()).unwrap();
    let picture = svg::picture(&matrix, &Groups::single(&matrix));
    assert_eq!(picture.matches("<rect class=\"cell ").count(), 11 * 11);
    assert_eq!(picture.matches("class=\"cell itself\"").count(), 11);
    // 3 x 1 web to was, 2 x 2 was to db, 2 x 3 was to web, 3 x 1 db to was, 3 x 2 within default.
    assert_eq!(picture.matches("class=\"cell allowed\"").count(), 3 + 4 + 6 + 3 + 6);
    let cell = picture.split("<g>").find(|cell| cell.contains("web/web-test-pod &gt; db/db-server-0\n")).unwrap();
    for part in [
        "\ntcp/3306: denied by both\n",
        "egress: default-deny NetworkPolicy/web/web-policy (",
        "policies.yaml:1)\n",
        "ingress: default-deny NetworkPolicy/db/db-policy (",
        "policies.yaml:87)<",
        "class=\"cell both\"",
    ] {
        assert!(cell.contains(part), "{part:?} is not in {cell}");
    }
    // Every element is closed, and no text breaks out of its element.
    for element in ["svg", "title", "style", "g", "text"] {
        let opened =
            picture.matches(&format!("<{element} ")).count() + picture.matches(&format!("<{element}>")).count();
        assert_eq!(opened, picture.matches(&format!("</{element}>")).count(), "{element}");
    }
}

#[test]
fn a_question_about_nobody_is_an_error() {
    let question = Question { to: vec!["web/nobody".parse().unwrap()], ..Question::default() };
    let error = Matrix::new(&demo(), &question).err().unwrap().to_string();
    assert!(error.contains("web/nobody"), "{error}");
    for bad in ["tcp", "tcp/0", "tcp/65536", "icmp/8", "http/80", "80"] {
        assert!(bad.parse::<weir_cluster::policy::matrix::Port>().is_err(), "{bad}");
    }
}

/// What a node's tracer says of a probe: the words for egress and ingress, and what decided.
fn trace(tracer: &mut Tracer, source: &Pod, destination: &Pod, probe: Probe) -> Value {
    let address =
        |pod: &Pod| if probe.version == 4 { pod.v4.unwrap().to_string() } else { pod.v6.unwrap().to_string() };
    let mut proto = probe.port.protocol.to_string();
    if proto == "icmp" && probe.version == 6 {
        proto.push_str("v6");
    }
    let mut flow = json!({"src": address(source), "dst": address(destination), "proto": proto});
    if probe.port.number > 0 {
        flow["dport"] = probe.port.number.into();
    }
    let mut answer = Vec::new();
    assert!(tracer.run(flow.to_string().as_bytes(), &mut answer, false).unwrap());
    serde_json::from_slice::<Value>(&answer).unwrap()["policy"].clone()
}

fn agrees(matrix: &Matrix, tracers: &mut [(&str, Tracer)], pair: (usize, usize), probe: Probe, answer: &Answer) {
    let (source, destination) = (&matrix.pods[pair.0], &matrix.pods[pair.1]);
    let mut on = |node: &Option<String>| {
        let (_, tracer) = tracers.iter_mut().find(|(name, _)| Some(*name) == node.as_deref()).unwrap();
        trace(tracer, source, destination, probe)
    };
    let word = |judgement: &Judgement| if judgement.allow { "allow" } else { "deny" };
    let name = |judgement: &Judgement| matrix.authority(judgement).name.clone();
    let Answer { egress, ingress } = answer;
    let at_source = on(&source.node);
    if pair.0 == pair.1 {
        assert_eq!((&at_source["egress"], &at_source["ingress"]), (&json!("none"), &json!("none")));
        return;
    }
    assert_eq!((&at_source["egress"], &at_source["by"][0]), (&json!(word(egress)), &json!(name(egress))));
    if source.node != destination.node {
        let at_destination = on(&destination.node);
        assert_eq!(at_destination["egress"], "none");
        assert_eq!(
            (&at_destination["ingress"], &at_destination["by"][0]),
            (&json!(word(ingress)), &json!(name(ingress)))
        );
    } else if egress.allow {
        assert_eq!((&at_source["ingress"], &at_source["by"][1]), (&json!(word(ingress)), &json!(name(ingress))));
    }
}

/// Every pair within groups of pods that are drawn together is as the groups' cell says.
fn groups_tell_the_truth(matrix: &Matrix) {
    let alike = Groups::alike(matrix);
    let [rows, columns] = alike.rows_and_columns(matrix);
    for row in &rows {
        for column in &columns {
            let cell = groups::cell(matrix, row, column);
            for source in *row {
                for destination in column.iter().filter(|destination| *destination != source) {
                    assert_eq!(matrix.cell(*source, *destination), cell);
                }
            }
        }
    }
    let drawn = rows.iter().map(|row| row.len()).sum::<usize>();
    assert_eq!(drawn, matrix.sources.len());
    assert!(!grid::text(matrix, &alike, false).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn the_matrix_agrees_with_trace(cluster in random::cluster(), asked in random::ports()) {
        let folder = tempfile::tempdir().unwrap();
        let loaded: Vec<(&str, Loaded)> = cluster.write(folder.path());
        let mut tracers: Vec<(&str, Tracer)> =
            loaded.iter().map(|(node, loaded)| (*node, Tracer::new(loaded).unwrap())).collect();
        let question = Question { ports: asked, ..Question::default() };
        let matrix = Matrix::new(&loaded[0].1, &question).unwrap();
        prop_assert_eq!(matrix.pods.len(), Cluster::PODS);
        for source in matrix.sources.clone() {
            for destination in matrix.destinations.clone() {
                let probes = matrix.probes(destination).iter().zip(matrix.answers(source, destination));
                for (probe, answer) in probes {
                    if let Some(answer) = answer {
                        agrees(&matrix, &mut tracers, (source, destination), *probe, answer);
                    }
                }
                let is_itself = matrix.cell(source, destination) == Cell::Itself;
                prop_assert_eq!(is_itself, source == destination);
            }
        }
        groups_tell_the_truth(&matrix);
    }
}
