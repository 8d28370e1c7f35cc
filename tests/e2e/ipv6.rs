//! IPv6, and both families side by side.

use std::io::ErrorKind;

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{DEADLINE, Echo, Site, bulk, connection, two_nodes},
};

const WEB: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const EMPTY: [&str; 2] = ["10.96.0.11", "fd00:96::11"];
const NODE_PORT: u16 = 31390;
const NODES: [&str; 2] = ["fd00:10::1", "fd00:10::2"];

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn dual_stack_pods_services_and_node_ports() {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10", "fd00:1:1::10"]);
    manifests.pod("node-a", "default/local", "web", &["10.1.1.20", "fd00:1:1::20"]);
    manifests.pod("node-b", "default/remote", "web", &["10.1.2.20", "fd00:1:2::20"]);
    manifests.service(&ServiceSpec {
        name: "default/web",
        addresses: &WEB,
        ports: &[("http", "TCP", 80, 8080, NODE_PORT), ("echo", "UDP", 53, 7, 0)],
        backends: &[
            ("10.1.1.20", "node-a"),
            ("10.1.2.20", "node-b"),
            ("fd00:1:1::20", "node-a"),
            ("fd00:1:2::20", "node-b"),
        ],
        ..ServiceSpec::default()
    });
    manifests.service(&ServiceSpec {
        name: "default/empty",
        addresses: &EMPTY,
        ports: &[("tcp", "TCP", 80, 8080, 0), ("udp", "UDP", 53, 53, 0)],
        ..ServiceSpec::default()
    });
    let mut site = Site::build(&two_nodes(), &manifests.text(), "");
    let pods = ["default/local", "default/remote"];
    for pod in pods {
        site.serve(pod, &[8080]);
    }
    site.start_all();

    for address in ["fd00:1:1::20", "fd00:1:2::20"] {
        site.pings("default/client", &format!("-c 3 {address}"));
        // 1452 and 8 and 40 are 1500: no tunnel for IPv6.
        site.pings("default/client", &format!("-c 2 -M do -s 1452 {address}"));
    }
    // The pod has found its gateway's MAC address by neighbour discovery.
    let gateway = site.lab.run_in("default/client", &["ip", "-6", "neighbour", "show", "fe80::ecee:eeff:feee:eeee"]);
    let gateway = gateway.unwrap();
    assert!(gateway.contains("lladdr ee:ee:ee:ee:ee:ee"), "{gateway}");

    let (near, far) = connection(&site, "default/client", "default/remote", "[fd00:1:2::20]:5000");
    bulk(&near, &far, 4 << 20);
    bulk(&far, &near, 4 << 20);

    for (url, own) in [(format!("http://{}/", WEB[0]), "10.1.1.10"), (format!("http://[{}]/", WEB[1]), "fd00:1:1::10")]
    {
        let mut by = Vec::new();
        for _ in 0..40 {
            let (pod, seen) = site.answered("default/client", &url);
            assert_eq!(seen.to_string(), own, "{url}");
            by.push(pod);
        }
        assert!(pods.iter().all(|pod| by.iter().any(|p| p == pod)), "{url}: {by:?}");
    }
    {
        let _echoes = [Echo::new(&site, "default/local", "[::]:7"), Echo::new(&site, "default/remote", "[::]:7")];
        for _ in 0..10 {
            let socket = site.udp("default/client", "[::]:0");
            socket.connect(format!("[{}]:53", WEB[1])).unwrap();
            socket.send(&[5; 1000]).unwrap();
            assert_eq!(socket.recv(&mut [0; 2000]).expect("an answer"), 1000);
        }
    }
    // Hairpin: a pod through its own service, so often that it meets itself.
    let mut met = false;
    for _ in 0..40 {
        let (pod, seen) = site.answered("default/local", &format!("http://[{}]/", WEB[1]));
        assert_eq!(seen.to_string(), if pod == "default/local" { NODES[0] } else { "fd00:1:1::20" });
        met |= pod == "default/local";
    }
    assert!(met);
    let refused = site.connect("default/client", &format!("[{}]:80", EMPTY[1]), DEADLINE).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let socket = site.udp("default/client", "[::]:0");
    socket.connect(format!("[{}]:53", EMPTY[1])).unwrap();
    socket.send(b"question").unwrap();
    assert_eq!(socket.recv(&mut [0; 64]).unwrap_err().kind(), ErrorKind::ConnectionRefused);

    // Node ports, the node's kernel, and pods to nodes.
    for node in NODES {
        let (_, seen) = site.answered("client", &format!("http://[{node}]:{NODE_PORT}/"));
        assert_eq!(seen.to_string(), node);
        site.pings("default/client", &format!("-c 2 {node}"));
        site.pings("client", &format!("-c 2 {node}"));
    }
    for pod in ["fd00:1:1::20", "fd00:1:2::20"] {
        let (_, seen) = site.answered("node-a", &format!("http://[{pod}]:8080/"));
        assert_eq!(seen.to_string(), NODES[0]);
    }
    site.answered("node-b", &format!("http://[{}]/", WEB[1]));
    // Out of the pools: masqueraded.
    site.serve("client", &[8081]);
    let (_, seen) = site.answered("default/client", "http://[fd00:10::100]:8081/");
    assert_eq!(seen.to_string(), NODES[0]);
    site.finish();
}
