//! Devices with an MTU of 9000: packets that lie in several frames.

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{Echo, Site, bulk, connection, two_nodes},
};

const VIP: &str = "10.96.0.10";
const NEAR_VIP: &str = "10.96.0.11";
const NEAR: &str = "10.1.1.20";
const SMALL: &str = "10.1.1.30";
const FAR: &str = "10.1.2.20";
const JUMBO: u32 = 9000;
/// What a ping has around its payload.
const HEADERS: u32 = 28;

/// Both nodes, their link and their pods with the large MTU, but for one pod.
fn build() -> Site {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10", "fd00:1:1::10"]);
    manifests.pod("node-a", "default/near", "near", &[NEAR, "fd00:1:1::20"]);
    manifests.pod("node-a", "default/small", "small", &[SMALL]);
    manifests.pod("node-b", "default/far", "far", &[FAR, "fd00:1:2::20"]);
    for (name, address, backend, node) in
        [("default/far", VIP, FAR, "node-b"), ("default/near", NEAR_VIP, NEAR, "node-a")]
    {
        manifests.service(&ServiceSpec {
            name,
            addresses: &[address],
            ports: &[("tcp", "TCP", 80, 8080, 0), ("udp", "UDP", 53, 7, 0)],
            backends: &[(backend, node)],
            ..ServiceSpec::default()
        });
    }
    let site = Site::build(&two_nodes(), &manifests.text(), "");
    let bridge = format!(
        "for port in $(ip -o link show master br0 | sed 's/^[0-9]*: //; s/@.*//'); do ip link set $port mtu {JUMBO}; done; \
         ip link set br0 mtu {JUMBO}"
    );
    site.lab.run_in("switch", &["sh", "-c", &bridge]).unwrap();
    for host in ["node-a", "node-b", "client"] {
        site.lab.ip(host, &format!("link set eth0 mtu {JUMBO}")).unwrap();
    }
    for (pod, node) in [("default/client", "node-a"), ("default/near", "node-a"), ("default/far", "node-b")] {
        let device = site.cluster.workloads.iter().find(|w| w.name == pod).unwrap().device.clone();
        site.lab.ip(node, &format!("link set {device} mtu {JUMBO}")).unwrap();
        site.lab.ip(pod, &format!("link set eth0 mtu {JUMBO}")).unwrap();
    }
    site
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn jumbo_packets_pass_on_one_node_and_through_the_tunnel() {
    let mut site = build();
    site.start_all();
    let largest = JUMBO - HEADERS;
    site.pings("default/client", &format!("-c 3 -M do -s {largest} {NEAR}"));
    site.pings("node-a", &format!("-c 3 -M do -s {largest} {NEAR}"));
    site.pings("default/client", &format!("-c 3 -M do -s {} fd00:1:1::20", largest - 20));
    site.pings("default/client", &format!("-c 3 -M do -s {} fd00:1:2::20", largest - 20));
    // The tunnel's header takes 20 bytes.
    site.pings("default/client", &format!("-c 3 -M do -s {} {FAR}", largest - 20));
    let (ok, said) = site.ping("default/client", &format!("-c 1 -M do -s {largest} {FAR}"));
    assert!(!ok && said.to_lowercase().contains("mtu") && said.contains("8980"), "{said}");

    // Around what one, two, ... frames hold.
    let _echo = Echo::new(&site, "default/far", "0.0.0.0:7");
    let socket = site.udp("default/client", "0.0.0.0:0");
    socket.connect((VIP, 53)).unwrap();
    let mut buffer = [0; 65536];
    // Beyond 8952 bytes the sender itself sends fragments, which are jumbo packets themselves.
    for size in (1700..9000).step_by(97).chain([1750, 3542, 8951, 8952, 20_000, 60_000]) {
        let sent: Vec<u8> = (0..size).map(|at: usize| (at / 5) as u8).collect();
        socket.send(&sent).unwrap();
        let bytes = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{size} bytes: {error}"));
        assert!(buffer[..bytes] == sent, "{size} bytes come back as {bytes}, or others");
    }

    for (to, vip) in [("default/near", NEAR_VIP), ("default/far", VIP)] {
        let listener = site.listen(to, "0.0.0.0:8080");
        let near = site.connect("default/client", &format!("{vip}:80"), crate::site::DEADLINE).unwrap();
        let (far, _) = listener.accept().unwrap();
        bulk(&near, &far, 24 << 20);
        bulk(&far, &near, 24 << 20);
    }
    // With what has not so much room.
    let (near, far) = connection(&site, "default/client", "default/small", &format!("{SMALL}:5000"));
    bulk(&near, &far, 4 << 20);
    bulk(&far, &near, 4 << 20);
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_jumbo_packet_to_a_smaller_mtu_is_answered_or_split() {
    let mut site = build();
    site.start_all();
    let (ok, said) = site.ping("default/client", &format!("-c 1 -M do -s 8000 {SMALL}"));
    assert!(!ok && said.to_lowercase().contains("mtu") && said.contains("1500"), "{said}");
    assert!(site.drops("node-a", "TooBig") >= 1);
    // Its MAC address is known before fragments come for it by the dozen.
    site.pings("default/client", &format!("-c 1 {SMALL}"));
    // What is learned of the MTU is forgotten, so that whole jumbo packets come, which may be split.
    site.lab.ip("default/client", "route flush cache").unwrap();
    site.pings("default/client", &format!("-c 3 -M dont -s 8000 {SMALL}"));
    site.finish();
}
