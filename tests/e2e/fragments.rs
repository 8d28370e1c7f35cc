//! Packets larger than every link: in fragments through pods, services, node ports, tunnels and the node itself, over two workers each.

use std::net::UdpSocket;

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{Echo, NodePlan, Site, pattern},
};

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const NODES: [[&str; 2]; 2] = [["192.168.10.1", "fd00:10::1"], ["192.168.10.2", "fd00:10::2"]];
const LOCAL: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
const REMOTE: [&str; 2] = ["10.1.2.20", "fd00:1:2::20"];
const OUTSIDE: [&str; 2] = [crate::site::CLIENT, "fd00:10::100"];
const NODE_PORT: u16 = 31053;
/// Six fragments; into a tunnel eleven.
const BYTES: usize = 8000;

fn site() -> Site {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10", "fd00:1:1::10"]);
    manifests.pod("node-a", "default/local", "echo", &LOCAL);
    manifests.pod("node-b", "default/remote", "echo", &REMOTE);
    manifests.service(&ServiceSpec {
        name: "default/echo",
        addresses: &VIPS,
        ports: &[("echo", "UDP", 53, 7, NODE_PORT)],
        backends: &[(LOCAL[0], "node-a"), (REMOTE[0], "node-b"), (LOCAL[1], "node-a"), (REMOTE[1], "node-b")],
        ..ServiceSpec::default()
    });
    let nodes = [("node-a", NODES[0]), ("node-b", NODES[1])]
        .map(|(name, [four, six])| NodePlan::new(name, &[&format!("{four}/24"), &format!("{six}/64")], &[0, 1]));
    let mut site = Site::build(&nodes, &manifests.text(), "");
    site.start_all();
    site
}

fn with_port(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

/// One datagram there and back, byte for byte.
fn exchange(socket: &UdpSocket, what: &str) {
    let (mut sent, mut received) = (vec![0; BYTES], vec![0; BYTES + 1]);
    pattern(usize::from(socket.local_addr().unwrap().port()), &mut sent);
    socket.send(&sent).unwrap();
    let length = socket.recv(&mut received).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(received[..length] == sent, "{what}: {length} bytes, and not those that were sent");
}

/// So many clients, each with a port of its own, so that both workers get some.
fn echoed(site: &Site, from: &str, address: &str, port: u16) {
    let to = with_port(address, port);
    for _ in 0..10 {
        let socket = site.udp(from, if address.contains(':') { "[::]:0" } else { "0.0.0.0:0" });
        socket.connect(&to).unwrap();
        exchange(&socket, &format!("{from} to {to}"));
        exchange(&socket, &format!("{from} to {to} again"));
    }
}

fn finish(site: Site) {
    for node in ["node-a", "node-b"] {
        let counters = site.status(node)["counters"].clone();
        let drops = counters["drops"].as_object().unwrap();
        assert!(drops.iter().all(|(reason, n)| !reason.starts_with("Fragment") || *n == 0), "{node}: {counters}");
    }
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn datagrams_of_8000_bytes_reach_pods_services_and_node_ports() {
    let site = site();
    // Each takes both families.
    let _echoes = ["default/local", "default/remote"].map(|pod| Echo::new(&site, pod, "[::]:7"));
    for family in [0, 1] {
        echoed(&site, "default/client", LOCAL[family], 7);
        echoed(&site, "default/client", REMOTE[family], 7);
        echoed(&site, "default/client", VIPS[family], 53);
        // Through its own service it meets itself now and then: hairpin.
        echoed(&site, "default/local", VIPS[family], 53);
        for node in NODES {
            echoed(&site, "client", node[family], NODE_PORT);
        }
        // The node's own kernel.
        for from in ["node-a", "node-b"] {
            echoed(&site, from, LOCAL[family], 7);
            echoed(&site, from, REMOTE[family], 7);
            echoed(&site, from, VIPS[family], 53);
        }
    }
    finish(site);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn large_pings_pass_in_every_direction() {
    let site = site();
    for family in [0, 1] {
        // To pods here and there, to both nodes themselves, and out of the pools, masqueraded.
        for to in [LOCAL[family], REMOTE[family], NODES[0][family], NODES[1][family], OUTSIDE[family]] {
            site.pings("default/client", &format!("-c 5 -s 4000 {to}"));
        }
        site.pings("default/remote", &format!("-c 5 -s 4000 {}", LOCAL[family]));
        // The node's own kernel, and to it from outside.
        for to in [LOCAL[family], REMOTE[family], NODES[1][family], OUTSIDE[family]] {
            site.pings("node-a", &format!("-c 5 -s 4000 {to}"));
        }
        site.pings("client", &format!("-c 5 -s 4000 {}", NODES[0][family]));
    }
    finish(site);
}
