//! `weir trace` line by line: state that lines share, and what it says of lines that are no flows.

use std::fs;

use serde_json::Value;
use weir::{trace::Tracer, translate};

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
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("weir.yaml");
    fs::write(&config, "nodeName: node-a\nmanifests: [cluster.yaml]\n").unwrap();
    fs::write(folder.path().join("cluster.yaml"), CLUSTER).unwrap();
    let loaded = translate::load(&config).unwrap_or_else(|problems| panic!("{}", problems.render(false)));
    let mut output = Vec::new();
    let all_valid = Tracer::new(&loaded).unwrap().run(lines.as_bytes(), &mut output, false).unwrap();
    let answers = String::from_utf8(output).unwrap();
    (all_valid, answers.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
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
