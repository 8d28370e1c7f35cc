//! `weir trace` line by line: state that lines share, and what it says of lines that are no flows.

use std::fs;

use serde_json::Value;
use weir_cluster::{trace::Tracer, translate};

const CLUSTER: &str = "
apiVersion: v1
kind: Node
metadata: {name: node-a}
spec: {podCIDRs: [10.1.1.0/24, 'fd00:1::/64']}
status: {addresses: [{type: InternalIP, address: 192.168.10.1}, {type: InternalIP, address: 'fd00:10::1'}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: web}
spec:
  type: LoadBalancer
  clusterIPs: [10.96.0.10, 'fd00:96::10']
  externalIPs: [198.51.100.7]
  sessionAffinity: ClientIP
  ports: [{name: http, port: 80, nodePort: 30080}, {name: https, port: 443}]
status: {loadBalancer: {ingress: [{ip: 203.0.113.9}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
addressType: IPv4
metadata: {namespace: shop, name: web-4, labels: {kubernetes.io/service-name: web}}
endpoints: [{addresses: [10.1.1.21]}, {addresses: [10.1.1.22]}, {addresses: [10.1.1.23]}, {addresses: [10.1.1.24]}]
ports: [{name: http, port: 8080}, {name: https, port: 8443}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
addressType: IPv6
metadata: {namespace: shop, name: web-6, labels: {kubernetes.io/service-name: web}}
endpoints: [{addresses: ['fd00:1::21']}, {addresses: ['fd00:1::22']}, {addresses: ['fd00:1::23']}]
ports: [{name: http, port: 8080}, {name: https, port: 8443}]
";

/// Traces these lines; whether all were flows, and the answers.
fn trace(lines: &str) -> (bool, Vec<Value>) {
    trace_in(lines, CLUSTER)
}

fn trace_in(lines: &str, cluster: &str) -> (bool, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("weir.yaml");
    fs::write(&config, "nodeName: node-a\nmanifests: [cluster.yaml]\n").unwrap();
    fs::write(folder.path().join("cluster.yaml"), cluster).unwrap();
    let loaded = translate::load_strictly(&config).unwrap_or_else(|problems| panic!("{}", problems.render(false)));
    let mut output = Vec::new();
    let all_valid = Tracer::new(&loaded).unwrap().run(lines.as_bytes(), &mut output, false).unwrap();
    let answers = String::from_utf8(output).unwrap();
    (all_valid, answers.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

const PODS: &str = "
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: front-7d9f8b6c5d-x2x8k, labels: {app: front}}
spec: {nodeName: node-b, containers: [{name: c, ports: [{name: admin, containerPort: 9000}]}]}
status: {podIP: 10.1.2.5}
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: front-7d9f8b6c5d-zzzzz, labels: {app: front}}
spec: {nodeName: node-a}
status: {podIP: 10.1.1.5}
---
apiVersion: v1
kind: Pod
metadata: {namespace: default, name: store-0}
spec: {nodeName: node-b, containers: [{name: c, ports: [{name: sql, containerPort: 5432}]}]}
status: {podIP: 10.1.2.6}
";

#[test]
fn ends_and_ports_have_names() {
    let cluster = format!("{CLUSTER}{PODS}");
    let flow = |src: &str, dst: &str, more: &str| {
        format!("{{\"src\": \"{src}\", \"dst\": \"{dst}\", \"proto\": \"tcp\"{more}}}\n")
    };
    let by_name = flow("deploy/shop/front", "svc/shop/web", ", \"dport\": \"https\"")
        + &flow("shop/front", "service/shop/web", ", \"dport\": 443")
        + &flow("sts/store", "shop/front-7d9f8b6c5d-x2x8k", ", \"dport\": \"admin\"")
        + &flow("default/store-0", "store", ", \"dport\": \"sql\"")
            .replace("\"store\"", "\"statefulset/default/store\"");
    let by_number = flow("10.1.1.5", "10.96.0.10", ", \"dport\": 443")
        + &flow("10.1.1.5", "10.96.0.10", ", \"dport\": 443")
        + &flow("10.1.2.6", "10.1.2.5", ", \"dport\": 9000")
        + &flow("10.1.2.6", "10.1.2.6", ", \"dport\": 5432");
    let (all_valid, answers) = trace_in(&by_name, &cluster);
    assert!(all_valid, "{answers:#?}");
    assert_eq!(answers, trace_in(&by_number, &cluster).1);

    for (line, error) in [
        (
            flow("shop/frnt", "10.0.0.1", ", \"dport\": 1"),
            "no pod shop/frnt with an address is in the manifests; did you mean shop/front?",
        ),
        (
            flow("shop/web", "10.0.0.1", ", \"dport\": 1"),
            "no pod shop/web with an address is in the manifests; did you mean svc/shop/web?",
        ),
        (
            flow("store-0", "10.0.0.1", ", \"dport\": 1"),
            "\"store-0\" is neither an IP address nor namespace/pod; did you mean \
         default/store-0?",
        ),
        (
            flow("ds/shop/front", "10.0.0.1", ", \"dport\": 1"),
            "no pod of DaemonSet shop/front with an address is in the manifests",
        ),
        (
            flow("svc/shop/web", "10.0.0.1", ", \"dport\": 1"),
            "src: svc/shop/web is a service, and packets come from pods: name a pod \
         or a workload",
        ),
        (
            flow("10.1.1.5", "svc/shop/wbe", ""),
            "no service shop/wbe with a cluster IP is in the manifests; did you mean svc/shop/web?",
        ),
        (flow("10.1.1.5", "svc/web", ""), "no service default/web with a cluster IP is in the manifests"),
        (flow("10.1.1.5", "svc/shop/web", ""), "dport is missing: svc/shop/web has the tcp ports 80, 443"),
        (
            flow("10.1.1.5", "svc/shop/web", ", \"dport\": \"htps\""),
            "svc/shop/web has no tcp port called \"htps\"; did you mean https?",
        ),
        (
            flow("10.1.1.5", "default/store-0", ", \"dport\": \"x\""),
            "default/store-0 has no tcp port called \"x\"; it has sql",
        ),
    ] {
        let (_, answers) = trace_in(&line, &cluster);
        let told = answers[0]["error"].as_str().unwrap_or_else(|| panic!("{line} {answers:?}"));
        let told = told.strip_prefix("line 1: ").unwrap();
        assert!(told.starts_with(error), "{line} {told}");
    }
}

#[test]
fn the_text_tells_who_else_decides() {
    let cluster = format!("{CLUSTER}{PODS}");
    tells(
        r#"{"src": "deploy/shop/front", "dst": "default/store-0", "proto": "tcp", "dport": 5432}"#,
        &cluster,
        &[
            "asked     deploy/shop/front: pod shop/front-7d9f8b6c5d-zzzzz",
            "from      workload shop/front-7d9f8b6c5d-zzzzz",
            "ingress   not judged",
            "node-b, the node of default/store-0, decides about ingress",
        ],
    );
    tells(
        r#"{"src": "default/store-0", "dst": "shop/front-7d9f8b6c5d-zzzzz", "proto": "tcp", "dport": 5432}"#,
        &cluster,
        &["egress    not judged", "node-b, the node of default/store-0, decides about egress"],
    );
    let host = "---
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: node-a-eth0}
spec: {node: node-a, interfaceName: '*', expectedIPs: [192.168.10.1]}
";
    let ssh = |port: u16| {
        format!("{{\"src\": \"198.51.100.9\", \"dst\": \"192.168.10.1\", \"proto\": \"tcp\", \"dport\": {port}}}")
    };
    let spared = "host      tcp/22 is a failsafe port: no policy of the host endpoint closes it";
    tells(&ssh(22), &format!("{CLUSTER}{host}"), &[spared, "verdict   handed to this node's kernel"]);
    assert!(!told(&ssh(23), &format!("{CLUSTER}{host}")).iter().any(|line| line.contains("failsafe")));
    assert!(!told(&ssh(22), CLUSTER).iter().any(|line| line.contains("failsafe")), "no host endpoint governs it");
}

#[test]
fn lines_share_session_affinity_in_their_order() {
    const CLIENTS: usize = 12;
    let mut lines = String::new();
    for client in 0..CLIENTS {
        for (dst, dport) in [
            ("10.96.0.10", 80),
            ("198.51.100.7", 80),
            ("203.0.113.9", 80),
            ("192.168.10.1", 30080),
            ("10.96.0.10", 443),
        ] {
            lines += &format!(
                "{{\"src\": \"172.16.0.{client}\", \"dst\": \"{dst}\", \"proto\": \"tcp\", \"dport\": {dport}}}\n"
            );
        }
        for (dst, dport) in [("fd00:96::10", 80), ("fd00:10::1", 30080)] {
            lines += &format!(
                "{{\"src\": \"2001:db8::{client}\", \"dst\": \"{dst}\", \"proto\": \"tcp\", \"dport\": {dport}}}\n"
            );
        }
    }
    let (all_valid, answers) = trace(&lines);
    assert!(all_valid);
    let mut http = std::collections::BTreeSet::new();
    for of_client in answers.chunks(7) {
        for (answer, count) in of_client.iter().zip([4, 4, 4, 4, 4, 3, 3]) {
            assert_eq!(answer["backends"].as_array().unwrap().len(), count, "all could have been picked: {answer}");
        }
        let backend = |index: usize| of_client[index]["backend"].as_str().unwrap();
        assert!((1..4).all(|index| backend(index) == backend(0)), "{of_client:#?}");
        assert_eq!(backend(5), backend(6));
        assert!(backend(4).ends_with(":8443"), "another service port remembers for itself");
        http.insert(backend(0));
    }
    assert!(http.len() > 1, "clients are not all sent to one: {http:?}");
    assert_eq!(answers, trace(&lines).1, "a trace is a function of its input");
}

/// What `--text` prints of one flow.
fn told(flow: &str, cluster: &str) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("weir.yaml");
    fs::write(&config, "nodeName: node-a\nmanifests: [cluster.yaml]\npodCIDRs: [10.1.0.0/16, 'fd00:1::/64']\n")
        .unwrap();
    fs::write(folder.path().join("cluster.yaml"), cluster).unwrap();
    let loaded = translate::load_strictly(&config).unwrap_or_else(|problems| panic!("{}", problems.render(false)));
    let mut output = Vec::new();
    Tracer::new(&loaded).unwrap().run(flow.as_bytes(), &mut output, true).unwrap();
    let folder = format!("{}/", folder.path().display());
    String::from_utf8(output).unwrap().replace(&folder, "").lines().map(|line| line.trim().to_owned()).collect()
}

#[track_caller]
fn tells(flow: &str, cluster: &str, expected: &[&str]) {
    let lines = told(flow, cluster);
    let mut rest = lines.iter();
    for wanted in expected {
        assert!(rest.any(|line| line == wanted), "{wanted:?} is not there, or not in its place:\n{}", lines.join("\n"));
    }
}

#[test]
fn text_tells_why_and_where_it_stands() {
    let flow = |src: &str, dst: &str, dport: u16| {
        format!("{{\"src\": \"{src}\", \"dst\": \"{dst}\", \"proto\": \"tcp\", \"dport\": {dport}}}\n")
    };
    // The Service begins in the 8th line, behind an empty one.
    tells(
        &flow("172.16.0.1", "203.0.113.9", 80),
        CLUSTER,
        &[
            "service   shop/web:http (cluster.yaml:8), by its load balancer IP",
            "4 usable backends of the whole cluster",
            "masqueraded: externalTrafficPolicy is Cluster",
        ],
    );
    let twice = flow("172.16.0.1", "10.96.0.10", 80).repeat(2);
    let lines = told(&twice, CLUSTER);
    let picks: Vec<_> = lines.iter().filter_map(|line| line.strip_prefix("picked ")?.split_once(", ")).collect();
    assert_eq!([picks[0].1, picks[1].1], ["at random", "which this client had before (ClientIP affinity)"]);
    assert_eq!(picks[0].0, picks[1].0);
    assert!(lines.contains(&"masqueraded: the source is outside podCIDRs".to_owned()), "{lines:#?}");
    tells(
        &flow("10.1.5.5", "10.96.0.10", 81),
        CLUSTER,
        &[
            "service   shop/web:http (cluster.yaml:8) has the address, but no service has the port",
            "verdict   rejected, UnpublishedPort: A packet to an address of a service, at a port that no service publishes there.",
        ],
    );
    // Policy Local, and one backend each that is here, elsewhere, nowhere, and not ready.
    let local = CLUSTER
        .replace("  sessionAffinity: ClientIP\n", "  externalTrafficPolicy: Local\n")
        .replace("{addresses: [10.1.1.21]}", "{addresses: [10.1.1.21], nodeName: node-a}")
        .replace("{addresses: [10.1.1.22]}", "{addresses: [10.1.1.22], nodeName: node-b}")
        .replace("{addresses: [10.1.1.24]}", "{addresses: [10.1.1.24], nodeName: node-a, conditions: {ready: false}}");
    tells(
        &flow("172.16.0.1", "198.51.100.7", 80),
        &local,
        &[
            "service   shop/web:http (cluster.yaml:8), by its external IP",
            "1 usable backend on this node: externalTrafficPolicy is Local",
            "not used: 10.1.1.22:8080: on node-b, not on this node",
            "not used: 10.1.1.23:8080: without nodeName, so never local",
            "not used: 10.1.1.24:8080: not ready",
            "picked 10.1.1.21:8080, at random",
            "not masqueraded: the backend sees the source itself",
        ],
    );
    tells(
        &flow("10.1.5.5", "198.51.100.7", 80),
        &local,
        &[
            "3 usable backends of the whole cluster: externalTrafficPolicy Local does not bind pods",
            "not used: 10.1.1.24:8080: not ready",
            "not masqueraded: the backend sees the source itself",
        ],
    );
    tells(
        &flow("192.168.10.1", "192.168.10.1", 30080),
        &local,
        &[
            "service   shop/web:http (cluster.yaml:8), by its node port",
            "3 usable backends of the whole cluster: externalTrafficPolicy Local does not bind the node itself",
            "masqueraded: the source is this node",
        ],
    );
    tells(
        &flow("172.16.0.1", "172.16.0.9", 80),
        CLUSTER,
        &[
            "service   none claims this destination",
            "verdict   passed on: no service claims it, and neither the manifests nor weir.yaml give a route to it (a running \
         router has the kernel's routes, too)",
        ],
    );
    // Policy: the file and line of the object that decided.
    let policy = "---\napiVersion: v1\nkind: Pod\nmetadata: {namespace: shop, name: web}\nspec: {nodeName: node-a}\n\
                  status: {podIP: 10.1.1.21}\n---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
                  metadata: {namespace: shop, name: open}\nspec: {podSelector: {}, ingress: [{ports: [{port: 8080}]}]}\n";
    let line = CLUSTER.lines().count() + 8;
    let allowed = format!("ingress   allowed by NetworkPolicy/shop/open rule 1 (cluster.yaml:{line})");
    tells(&flow("172.16.0.1", "10.1.1.21", 8080), &format!("{CLUSTER}{policy}"), &[&allowed]);
}

#[test]
fn rules_that_log_are_named() {
    let cluster = format!(
        "{CLUSTER}---\napiVersion: v1\nkind: Pod\nmetadata: {{namespace: shop, name: web}}\nspec: {{nodeName: node-a}}\n\
         status: {{podIP: 10.1.1.21}}\n---\napiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\n\
         metadata: {{name: watch}}\nspec:\n  selector: all()\n  types: [Ingress]\n  ingress:\n  - {{action: Allow, protocol: UDP}}\n  \
         - {{action: Log}}\n  - {{action: Deny}}\n"
    );
    let flow = |proto: &str| {
        format!("{{\"src\": \"172.16.0.1\", \"dst\": \"10.1.1.21\", \"proto\": \"{proto}\", \"dport\": 80}}\n")
    };
    let policy = cluster[..cluster.find("apiVersion: projectcalico").unwrap()].lines().count() + 1;
    let expected = [
        format!("ingress   denied by GlobalNetworkPolicy/watch rule 3 (cluster.yaml:{policy})"),
        format!("log       ingress: GlobalNetworkPolicy/watch rule 2 (cluster.yaml:{policy})"),
    ];
    tells(&flow("tcp"), &cluster, &expected.each_ref().map(String::as_str));
    assert!(told(&flow("udp"), &cluster).iter().all(|line| !line.starts_with("log")));
    let (_, answers) = trace_in(&(flow("tcp") + &flow("udp")), &cluster);
    assert_eq!(answers[0]["log"], serde_json::json!(["GlobalNetworkPolicy/watch rule 2"]));
    assert!(answers[1].get("log").is_none());
}

#[test]
fn lines_that_are_no_flows_are_named_by_their_number() {
    let (all_valid, answers) = trace(
        "{\"id\": 1, \"src\": \"10.1.1.21\", \"dst\": \"10.96.0.10\", \"proto\": \"tcp\", \"dport\": 80}\n\n\
         {\"id\": 2, \"src\": \"10.1.1.21\", \"dst\": \"10.96.0.10\", \"proto\": \"tcp\"}\nnonsense\n",
    );
    assert!(!all_valid);
    assert_eq!(answers[0]["backends"].as_array().map(Vec::len), Some(4));
    let error = |answer: &Value| (answer["id"].clone(), answer["error"].as_str().unwrap().to_owned());
    assert_eq!(error(&answers[1]), (2.into(), "line 3: dport is missing: tcp packets go to a port".into()));
    assert_eq!(error(&answers[2]), (Value::Null, "line 4: this is not JSON from column 2 on".into()));
}

const BLOCKS: &str = "
---
apiVersion: v1
kind: Node
metadata: {name: node-b, annotations: {projectcalico.org/IPv4Address: 192.168.20.2/24}}
spec: {podCIDR: 10.5.0.0/26}
status: {addresses: [{type: InternalIP, address: 192.168.20.2}]}
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: pool}
spec: {cidr: 10.5.0.0/16, ipipMode: Always}
---
apiVersion: crd.projectcalico.org/v1
kind: BlockAffinity
metadata: {name: node-a-10-5-0-0-26}
spec: {cidr: 10.5.0.0/26, node: node-a, state: confirmed, deleted: 'false'}
---
apiVersion: crd.projectcalico.org/v1
kind: BlockAffinity
metadata: {name: node-b-10-5-0-64-26}
spec: {cidr: 10.5.0.64/26, node: node-b, state: confirmed, deleted: 'false'}
---
apiVersion: crd.projectcalico.org/v1
kind: IPAMBlock
metadata: {name: 10-5-0-0-26}
spec: {cidr: 10.5.0.0/26, affinity: 'host:node-a', allocations: [0, 1], attributes: [{secondary: {node: node-a}}, {secondary: {node: node-b}}]}
";

/// A node's range is where Calico's IPAM says, whatever Node.spec.podCIDR says, and a borrowed address is its borrower's.
#[test]
fn blocks_and_borrowed_addresses_are_routes() {
    let flow = |dst: &str| format!("{{\"src\": \"10.5.0.3\", \"dst\": \"{dst}\", \"proto\": \"udp\", \"dport\": 9}}\n");
    let (all_valid, answers) = trace_in(
        &["10.5.0.70", "10.5.0.1", "10.5.0.2", "10.5.0.130"].map(flow).concat(),
        &format!("{CLUSTER}{BLOCKS}"),
    );
    assert!(all_valid, "{answers:#?}");
    let tunnels: Vec<_> = answers.iter().map(|answer| answer["route"]["tunnel"].clone()).collect();
    assert_eq!(tunnels[..2], ["192.168.20.2", "192.168.20.2"], "{answers:#?}");
    assert!(tunnels[2].is_null() && tunnels[3].is_null(), "{answers:#?}");
    assert_eq!(answers[2]["reason"], "NoSuchPod", "{answers:#?}");
}
