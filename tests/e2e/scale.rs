//! Many pods, many connections.

use std::{
    io::{Read, Write},
    time::Instant,
};

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{DEADLINE, NodePlan, Site, one_node, two_nodes},
};

const WEB: &str = "10.96.0.10";

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn two_hundred_and_fifty_pods_of_a_node_reach_a_server() {
    const PODS: usize = 250;
    let mut manifests = Manifests::default();
    manifests.node("node-a", &["192.168.10.1"], &["10.1.0.0/23"]);
    manifests.pool("ipv4", "10.1.0.0/16", "Always");
    manifests.namespace("default");
    manifests.pod("node-a", "default/server", "server", &["10.1.0.250"]);
    let names: Vec<String> = (0..PODS).map(|n| format!("default/pod-{n}")).collect();
    let address = |number: usize| format!("10.1.1.{}", number + 2);
    for (number, name) in names.iter().enumerate() {
        manifests.pod("node-a", name, "client", &[&address(number)]);
    }
    manifests.service(&ServiceSpec {
        name: "default/web",
        addresses: &[WEB],
        ports: &[("http", "TCP", 80, 8080, 0)],
        backends: &[("10.1.0.250", "node-a")],
        ..ServiceSpec::default()
    });
    let nodes: Vec<NodePlan> = one_node();
    let begin = Instant::now();
    let mut site = Site::build(&nodes, &manifests.text(), "");
    let built = begin.elapsed();
    site.serve("default/server", &[8080]);
    site.start_all();
    let started = begin.elapsed();
    assert_eq!(site.status("node-a")["workloads"], PODS + 1);
    for (number, name) in names.iter().enumerate() {
        let mut stream = site.connect(name, &format!("{WEB}:80"), DEADLINE).unwrap_or_else(|e| panic!("{name}: {e}"));
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains(&format!("default/server {}\n", address(number))), "{name}: {answer}");
    }
    println!("{PODS} pods: built in {built:?}, adopted by {started:?}, all served by {:?}", begin.elapsed());
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn ten_thousand_connections_lose_nothing() {
    const CLIENTS: [(&str, &str, &str); 4] = [
        ("node-a", "default/client-1", "10.1.1.11"),
        ("node-a", "default/client-2", "10.1.1.12"),
        ("node-b", "default/client-3", "10.1.2.13"),
        ("node-b", "default/client-4", "10.1.2.14"),
    ];
    const EACH: usize = 2500;
    let mut manifests = Manifests::cluster("Always");
    for (node, pod, address) in CLIENTS {
        manifests.pod(node, pod, "client", &[address]);
    }
    manifests.pod("node-a", "default/web-1", "web", &["10.1.1.21"]);
    manifests.pod("node-b", "default/web-2", "web", &["10.1.2.22"]);
    manifests.service(&ServiceSpec {
        name: "default/web",
        addresses: &[WEB],
        ports: &[("http", "TCP", 80, 8080, 0)],
        backends: &[("10.1.1.21", "node-a"), ("10.1.2.22", "node-b")],
        ..ServiceSpec::default()
    });
    let mut site = Site::build(&two_nodes(), &manifests.text(), "");
    site.serve("default/web-1", &[8080]);
    site.serve("default/web-2", &[8080]);
    site.start_all();
    let begin = Instant::now();
    let url = format!("http://{WEB}/?[1-{EACH}]");
    let mut runs: Vec<_> = CLIENTS
        .iter()
        .map(|(_, pod, _)| {
            site.lab.spawn(pod, &format!("curl-{pod}"), &["curl", "-sS", "--fail", "--max-time", "60", &url]).unwrap()
        })
        .collect();
    for (run, (_, pod, address)) in runs.iter_mut().zip(CLIENTS) {
        let status = run.wait(10 * DEADLINE).unwrap();
        let log = run.log();
        assert!(
            status.success(),
            "{pod}: {}",
            log.lines().filter(|l| l.contains("curl")).collect::<Vec<_>>().join("\n")
        );
        assert_eq!(log.lines().filter(|line| line.ends_with(&format!(" {address}"))).count(), EACH, "{pod}");
    }
    println!("{} connections in {:?}", CLIENTS.len() * EACH, begin.elapsed());
    for node in ["node-a", "node-b"] {
        let drops = &site.status(node)["counters"]["drops"];
        // Router solicitations and multicast reports of the pods' own kernels end at weir; nothing else may.
        let others: Vec<_> = drops.as_object().unwrap().iter().filter(|(reason, _)| *reason != "LinkScope").collect();
        assert!(others.is_empty(), "{node}: {others:?}");
        assert!(site.status(node)["connections"]["ipv4"].as_u64().unwrap() >= 2 * EACH as u64);
    }
    site.finish();
}
