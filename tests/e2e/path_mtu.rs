//! Path MTU discovery through every kind of NAT, with a smaller MTU behind weir: TCP goes on, and a UDP socket that forbids fragments learns.

use std::time::Duration;

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{DEADLINE, Echo, NodePlan, Site, bulk, connection, one_node},
};

/// The path's MTU beyond the router.
const SMALL: u32 = 1300;
const VIP: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const LOCAL_VIP: [&str; 2] = ["10.96.0.11", "fd00:96::11"];
const NODE: [&str; 2] = ["192.168.10.1", "fd00:10::1"];
const SERVER: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
const FAR: [&str; 2] = ["192.168.30.100", "fd00:30::100"];
const NODE_PORT: u16 = 31390;
const LOCAL_NODE_PORT: u16 = 31391;
const BULK: usize = 2 << 20;

/// A UDP socket that forbids fragments (IP_PMTUDISC_DO): asks ever smaller, as its path MTU becomes known, until it is answered; the largest
/// datagram that was answered.
const UDP_CLIENT: &str = r#"
import socket, sys, time
address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
six = ":" in address
level, discover, mtu, headers = (41, 23, 24, 48) if six else (0, 10, 14, 28)
s = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(level, discover, 2)
s.settimeout(0.5)
s.connect((address, port))
end = time.monotonic() + 20
while time.monotonic() < end:
    try:
        s.send(bytes(size))
        if len(s.recv(65536)) == size:
            print(size)
            break
    except TimeoutError:
        pass
    except OSError as error:
        if error.errno != 90:
            raise
        size = min(size, s.getsockopt(level, mtu) - headers)
"#;

/// Answers each datagram with as much as the path takes, without fragments: the answer's sender must learn the path MTU.
const UDP_SERVER: &str = r#"
import socket, sys
port = int(sys.argv[1])
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.setsockopt(0, 10, 2)
s.setsockopt(41, 23, 2)
s.bind(("::", port))
s.settimeout(60)
while True:
    _, peer = s.recvfrom(65536)
    for size in (1452, 1252):
        try:
            s.sendto(bytes(size), peer)
            break
        except OSError as error:
            if error.errno != 90:
                raise
"#;

fn with_port(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

/// A host that forwards, with a route of a smaller MTU to each of these networks.
fn add_router(site: &mut Site, addresses: &[&str], small: &[&str], mtu: u32) {
    let addresses: Vec<String> = addresses.iter().map(|a| (*a).to_owned()).collect();
    site.lab.add_host("router", &addresses, 1).unwrap();
    for key in [
        "net.ipv4.ip_forward=1",
        "net.ipv6.conf.all.forwarding=1",
        // It is on one link with everybody.
        "net.ipv4.conf.all.send_redirects=0",
        "net.ipv4.conf.eth0.send_redirects=0",
    ] {
        let (name, value) = key.split_once('=').unwrap();
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        site.lab.run_in("router", &["sh", "-c", &format!("echo {value} > {path}")]).unwrap();
    }
    for network in small {
        // Before the kernel's own, whose metric is 0 and 256.
        let (family, metric) = if network.contains(':') { ("-6", 1) } else { ("-4", 0) };
        let route = format!("{family} route replace {network} dev eth0 metric {metric} mtu lock {mtu}");
        site.lab.ip("router", &route).unwrap();
    }
}

/// node-a with a client pod and a server pod; far away, behind a router and a smaller MTU, a host.
fn far_site() -> Site {
    let mut manifests = Manifests::cluster("Never");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10", "fd00:1:1::10"]);
    manifests.pod("node-a", "default/server", "web", &SERVER);
    for (name, addresses, local, node_port) in
        [("default/web", &VIP, false, NODE_PORT), ("default/local", &LOCAL_VIP, true, LOCAL_NODE_PORT)]
    {
        manifests.service(&ServiceSpec {
            name,
            addresses,
            ports: &[("tcp", "TCP", 80, 8080, node_port), ("udp", "UDP", 53, 7, node_port)],
            local,
            backends: &[(SERVER[0], "node-a"), (SERVER[1], "node-a")],
        });
    }
    let mut site = Site::build(&one_node(), &manifests.text(), "");
    let near = ["192.168.10.254/24", "fd00:10::254/64"];
    let far = ["192.168.30.254/24", "fd00:30::254/64"];
    add_router(&mut site, &[near, far].concat(), &["192.168.30.0/24", "fd00:30::/64"], SMALL);
    site.lab.add_host("far", &FAR.map(|a| format!("{a}/{}", if a.contains(':') { 64 } else { 24 })), 1).unwrap();
    for (at, four, six) in [("node-a", "192.168.10.254", "fd00:10::254"), ("far", "192.168.30.254", "fd00:30::254")] {
        site.lab.ip(at, &format!("route add default via {four}")).unwrap();
        site.lab.ip(at, &format!("-6 route add default via {six}")).unwrap();
    }
    site
}

/// Runs a UDP client; the largest datagram that was answered.
fn largest_datagram(site: &Site, from: &str, address: &str, port: u16) -> u32 {
    let said = site.lab.run_in(from, &["python3", "-c", UDP_CLIENT, address, &port.to_string(), "1452"]).unwrap();
    said.trim().parse().unwrap_or_else(|_| panic!("{from} to {address} {port}: never answered"))
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn beyond_a_router_with_a_smaller_mtu_through_every_nat() {
    let mut site = far_site();
    site.start_all();
    for family in 0..2 {
        // Downloads: DNAT and masquerade, DNAT alone; an upload of a pod: masquerade. Each learns anew.
        for port in [NODE_PORT, LOCAL_NODE_PORT] {
            let listener = site.listen("default/server", "[::]:8080");
            let to = with_port(NODE[family], port);
            let near = site.connect("far", &to, DEADLINE).unwrap_or_else(|e| panic!("{to}: {e}"));
            let (far, _) = listener.accept().unwrap();
            far.set_write_timeout(Some(DEADLINE)).unwrap();
            bulk(&far, &near, BULK);
            site.lab.ip("default/server", "route flush cache").unwrap();
            site.lab.ip("default/server", "-6 route flush cache").unwrap();
        }
        let (near, far) = connection(&site, "default/client", "far", &with_port(FAR[family], 5001));
        bulk(&near, &far, BULK);
        site.lab.ip("default/client", "route flush cache").unwrap();
        site.lab.ip("default/client", "-6 route flush cache").unwrap();
        let echo = Echo::new(&site, "far", "[::]:7");
        let headers = if family == 0 { 28 } else { 48 };
        assert_eq!(largest_datagram(&site, "default/client", FAR[family], 7), SMALL - headers);
        drop(echo);
    }
    // A server whose answers may not be in fragments.
    let mut server = site.lab.spawn("default/server", "udp-server", &["python3", "-c", UDP_SERVER, "7"]).unwrap();
    for node in NODE {
        for port in [NODE_PORT, LOCAL_NODE_PORT] {
            let socket = site.udp("far", "[::]:0");
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            socket.connect(mapped(node, port)).unwrap();
            // The first answers are too large for the path; then their sender knows.
            let answered = (0..40).any(|_| {
                socket.send(b"question").unwrap();
                socket.recv(&mut [0; 2000]).is_ok_and(|length| length < 1300)
            });
            assert!(answered, "no answer from {node} {port}");
        }
    }
    assert!(server.is_running(), "{}", server.log());
    site.finish();
}

/// An IPv6 socket reaches IPv4 by mapped addresses.
fn mapped(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("[::ffff:{address}]:{port}") }
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_pod_with_a_smaller_mtu_is_reached_through_every_nat() {
    let mut manifests = Manifests::cluster("Never");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10", "fd00:1:1::10"]);
    manifests.pod("node-a", "default/server", "web", &SERVER);
    manifests.service(&ServiceSpec {
        name: "default/web",
        addresses: &VIP,
        ports: &[("udp", "UDP", 53, 7, NODE_PORT)],
        backends: &[(SERVER[0], "node-a"), (SERVER[1], "node-a")],
        ..ServiceSpec::default()
    });
    let mut site = Site::build(&one_node(), &manifests.text(), "");
    let device = site.cluster.workloads.iter().find(|w| w.name == "default/server").unwrap().device.clone();
    site.lab.ip("default/server", &format!("link set eth0 mtu {SMALL}")).unwrap();
    site.lab.ip("node-a", &format!("link set {device} mtu {SMALL}")).unwrap();
    site.start_all();
    let _echo = Echo::new(&site, "default/server", "[::]:7");
    for family in 0..2 {
        let largest = SMALL - if family == 0 { 28 } else { 48 };
        for (from, address, port) in [
            ("default/client", SERVER[family], 7),
            ("default/client", VIP[family], 53),
            ("client", NODE[family], NODE_PORT),
            ("node-a", VIP[family], 53),
            ("node-a", SERVER[family], 7),
        ] {
            assert_eq!(largest_datagram(&site, from, address, port), largest, "{from} to {address} {port}");
        }
    }
    assert!(site.drops("node-a", "TooBig") >= 4);
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_smaller_mtu_between_nodes_is_told_through_the_tunnel() {
    let mut manifests = Manifests::default();
    manifests.node("node-a", &["192.168.10.1"], &["10.1.1.0/24"]);
    manifests.node("node-b", &["192.168.20.2"], &["10.1.2.0/24"]);
    // Answers to what is masqueraded into the tunnel come back by it: routers between nodes know no pods.
    manifests.tunnel_address("node-a", "10.1.1.1");
    manifests.tunnel_address("node-b", "10.1.2.1");
    manifests.pool("ipv4", "10.1.0.0/16", "CrossSubnet");
    manifests.namespace("default");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10"]);
    manifests.pod("node-b", "default/server", "web", &["10.1.2.20"]);
    manifests.service(&ServiceSpec {
        name: "default/web",
        addresses: &VIP[..1],
        ports: &[("tcp", "TCP", 80, 8080, NODE_PORT), ("udp", "UDP", 53, 7, NODE_PORT)],
        backends: &[("10.1.2.20", "node-b")],
        ..ServiceSpec::default()
    });
    let nodes =
        [NodePlan::new("node-a", &["192.168.10.1/24"], &[0]), NodePlan::new("node-b", &["192.168.20.2/24"], &[1])];
    let mut site = Site::build(&nodes, &manifests.text(), "");
    let networks = ["192.168.10.0/24", "192.168.20.0/24"];
    add_router(&mut site, &["192.168.10.254/24", "192.168.20.254/24"], &networks, SMALL);
    site.lab.ip("node-a", "route add default via 192.168.10.254").unwrap();
    site.lab.ip("node-b", "route add default via 192.168.20.254").unwrap();
    site.start_all();
    // Plain, DNAT, and DNAT with masquerade; each way, and each learns anew.
    for (from, address) in
        [("default/client", "10.1.2.20:8080"), ("default/client", "10.96.0.10:80"), ("client", "192.168.10.1:31390")]
    {
        let listener = site.listen("default/server", "0.0.0.0:8080");
        let near = site.connect(from, address, DEADLINE).unwrap_or_else(|e| panic!("{from} to {address}: {e}"));
        let (far, _) = listener.accept().unwrap();
        far.set_read_timeout(Some(DEADLINE)).unwrap();
        far.set_write_timeout(Some(DEADLINE)).unwrap();
        bulk(&near, &far, BULK);
        bulk(&far, &near, BULK);
        for at in [from, "default/server"] {
            site.lab.ip(at, "route flush cache").unwrap();
        }
    }
    let _echo = Echo::new(&site, "default/server", "0.0.0.0:7");
    for (from, address, port) in
        [("default/client", "10.1.2.20", 7), ("default/client", VIP[0], 53), ("client", "192.168.10.1", NODE_PORT)]
    {
        site.lab.ip(from, "route flush cache").unwrap();
        assert_eq!(largest_datagram(&site, from, address, port), SMALL - 20 - 28, "{from} to {address}");
    }
    site.finish();
}
