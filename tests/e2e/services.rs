//! Services: backends, masquerade, rejects, node ports.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    time::{Duration, Instant},
};

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{CLIENT, DEADLINE, Echo, Site, two_nodes},
};

const WEB: &str = "10.96.0.10";
const EMPTY: &str = "10.96.0.11";
const ECHO: &str = "10.96.0.12";
const ALONE: &str = "10.96.0.13";
const NODE_PORT: u16 = 31380;
const LOCAL_NODE_PORT: u16 = 31381;
const NODES: [(&str, &str); 2] = [("node-a", "192.168.10.1"), ("node-b", "192.168.10.2")];

fn site() -> Site {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10"]);
    manifests.pod("node-a", "default/web-1", "web", &["10.1.1.21"]);
    manifests.pod("node-b", "default/web-2", "web", &["10.1.2.21"]);
    manifests.pod("node-b", "default/web-3", "web", &["10.1.2.22"]);
    manifests.service(&ServiceSpec {
        name: "default/web",
        addresses: &[WEB],
        ports: &[("http", "TCP", 80, 8080, NODE_PORT)],
        backends: &[("10.1.1.21", "node-a"), ("10.1.2.21", "node-b"), ("10.1.2.22", "node-b")],
        ..ServiceSpec::default()
    });
    manifests.service(&ServiceSpec {
        name: "default/empty",
        addresses: &[EMPTY],
        ports: &[("tcp", "TCP", 80, 8080, 0), ("udp", "UDP", 53, 53, 0)],
        ..ServiceSpec::default()
    });
    manifests.service(&ServiceSpec {
        name: "default/echo",
        addresses: &[ECHO],
        ports: &[("echo", "UDP", 53, 7, 0)],
        backends: &[("10.1.2.21", "node-b")],
        ..ServiceSpec::default()
    });
    manifests.service(&ServiceSpec {
        name: "default/alone",
        addresses: &[ALONE],
        ports: &[("http", "TCP", 80, 8080, LOCAL_NODE_PORT)],
        local: true,
        backends: &[("10.1.1.21", "node-a")],
    });
    let mut site = Site::build(&two_nodes(), &manifests.text(), "");
    for pod in ["default/web-1", "default/web-2", "default/web-3"] {
        site.serve(pod, &[8080]);
    }
    site.start_all();
    site
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn connections_spread_evenly_over_backends_and_keep_their_source() {
    const REQUESTS: u32 = 900;
    let site = site();
    let url = format!("http://{WEB}/?[1-{REQUESTS}]");
    let text = site.lab.run_in("default/client", &["curl", "-sS", "--max-time", "100", &url]).unwrap();
    let mut count: BTreeMap<&str, u32> = BTreeMap::new();
    for (pod, seen) in text.lines().map(|line| line.split_once(' ').unwrap()) {
        assert_eq!(seen, "10.1.1.10", "{pod} sees the client pod itself");
        *count.entry(pod).or_default() += 1;
    }
    assert_eq!(count.values().sum::<u32>(), REQUESTS, "{count:?}");
    // Five standard deviations of a binomial distribution with p = 1/3.
    let (mean, spread) = (f64::from(REQUESTS) / 3.0, 5.0 * (f64::from(REQUESTS) * 2.0 / 9.0).sqrt());
    assert!(count.len() == 3 && count.values().all(|n| (f64::from(*n) - mean).abs() <= spread), "{count:?}");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn udp_to_a_service_comes_back_from_the_service() {
    let site = site();
    let echo = Echo::new(&site, "default/web-2", "0.0.0.0:7");
    for _ in 0..20 {
        // Connected: an answer from another address than the service's would not be seen.
        let socket = site.udp("default/client", "0.0.0.0:0");
        socket.connect(format!("{ECHO}:53")).unwrap();
        socket.send(b"question").unwrap();
        assert_eq!(socket.recv(&mut [0; 64]).expect("an answer"), 8);
    }
    drop(echo);
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_service_without_backends_rejects_at_once() {
    let site = site();
    for (address, reason) in [(format!("{EMPTY}:80"), "NoBackend"), (format!("{WEB}:81"), "UnpublishedPort")] {
        let begin = Instant::now();
        let output =
            site.lab.output_in("default/client", &["curl", "-s", "--max-time", "20", &format!("http://{address}/")]);
        assert_eq!(output.unwrap().status.code(), Some(7), "{address}: a RST is a failed connect to curl");
        assert!(begin.elapsed() < Duration::from_secs(15), "{address}");
        let refused = site.connect("default/client", &address, DEADLINE).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{address}");
        assert!(site.drops("node-a", reason) >= 2, "{}", site.status("node-a")["counters"]);
    }
    let socket = site.udp("default/client", "0.0.0.0:0");
    socket.connect(format!("{EMPTY}:53")).unwrap();
    socket.send(b"question").unwrap();
    let refused = socket.recv(&mut [0; 64]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "ICMP port unreachable");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_pod_reaches_itself_through_its_own_service() {
    let site = site();
    // Its only backend is the pod itself.
    let (pod, seen) = site.answered("default/web-1", &format!("http://{ALONE}/"));
    assert_eq!((pod.as_str(), seen.to_string().as_str()), ("default/web-1", "192.168.10.1"), "hairpin is masqueraded");
    // One of three.
    let text = site.lab.run_in("default/web-1", &["curl", "-sS", "--max-time", "60", &format!("http://{WEB}/?[1-60]")]);
    let text = text.unwrap();
    assert_eq!(text.lines().count(), 60);
    for pod in ["default/web-1 192.168.10.1", "default/web-2 10.1.1.21", "default/web-3 10.1.1.21"] {
        assert!(text.lines().any(|line| line == pod), "{pod} is missing in {text}");
    }
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_node_port_answers_on_both_nodes_and_is_masqueraded() {
    let site = site();
    for (node, address) in NODES {
        let mut backends = BTreeMap::new();
        for _ in 0..30 {
            let (pod, seen) = site.answered("client", &format!("http://{address}:{NODE_PORT}/"));
            assert_eq!(seen.to_string(), address, "{pod} answered through {node}");
            *backends.entry(pod).or_insert(0) += 1;
        }
        assert_eq!(backends.len(), 3, "{node}: {backends:?}");
    }
    // From a pod: the node's address is as good as the cluster IP.
    site.answered("default/client", &format!("http://192.168.10.2:{NODE_PORT}/"));
    site.answered("default/client", &format!("http://192.168.10.1:{NODE_PORT}/"));
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn external_traffic_policy_local_keeps_the_client_and_drops_elsewhere() {
    let site = site();
    for _ in 0..5 {
        let (pod, seen) = site.answered("client", &format!("http://192.168.10.1:{LOCAL_NODE_PORT}/"));
        assert_eq!((pod.as_str(), seen.to_string().as_str()), ("default/web-1", CLIENT));
    }
    site.unanswered("client", &format!("http://192.168.10.2:{LOCAL_NODE_PORT}/"));
    assert!(site.drops("node-b", "NoLocalBackend") >= 1);
    // Within the cluster the policy does not count.
    let (pod, seen) = site.answered("default/web-2", &format!("http://{ALONE}/"));
    assert_eq!((pod.as_str(), seen.to_string().as_str()), ("default/web-1", "10.1.2.21"));
    site.finish();
}
