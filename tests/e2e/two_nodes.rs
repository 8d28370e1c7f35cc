//! Two nodes: tunnels, direct routes, path MTU.

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{DEADLINE, Echo, NodePlan, Site, bulk, connection, two_nodes, weir_binary},
};
use nix::sys::signal::Signal;

const CLUSTER_IP: &str = "10.96.0.10";

fn pods(manifests: &mut Manifests) {
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10"]);
    manifests.pod("node-b", "default/server", "server", &["10.1.2.20"]);
    manifests.service(&ServiceSpec {
        name: "default/web",
        addresses: &[CLUSTER_IP],
        ports: &[("http", "TCP", 80, 8080, 0)],
        backends: &[("10.1.2.20", "node-b")],
        ..ServiceSpec::default()
    });
}

/// Sends traffic of all kinds between the pods; how many IPIP packets and how many bare ones of pods the switch saw meanwhile.
fn traffic(site: &mut Site, servers_from: &str) -> (usize, usize) {
    let mut capture = site.capture("switch", "br0", "ip proto 4 or net 10.1.0.0/16");
    site.pings("default/client", "-c 3 10.1.2.20");
    site.pings("default/server", "-c 3 10.1.1.10");
    let (pod, seen) = site.answered("default/client", &format!("http://{CLUSTER_IP}/"));
    assert_eq!((pod.as_str(), seen.to_string().as_str()), ("default/server", servers_from));
    {
        let _echo = Echo::new(site, "default/server", "0.0.0.0:7");
        let socket = site.udp("default/client", "0.0.0.0:0");
        socket.connect("10.1.2.20:7").unwrap();
        for size in [1, 100, 1400] {
            socket.send(&vec![7; size]).unwrap();
            assert_eq!(socket.recv(&mut [0; 2048]).expect("an answer"), size);
        }
    }
    let (near, far) = connection(site, "default/client", "default/server", "10.1.2.20:5000");
    bulk(&near, &far, 4 << 20);
    bulk(&far, &near, 4 << 20);
    capture.signal(Signal::SIGINT);
    capture.wait(DEADLINE).unwrap();
    let log = capture.log();
    let packets = || log.lines().filter(|line| line.contains(" IP "));
    let tunnelled = packets().filter(|line| line.matches("IP ").count() > 1 || line.contains("ipip")).count();
    (tunnelled, packets().count() - tunnelled)
}

fn mode(ipip: &str) -> (usize, usize) {
    let mut manifests = Manifests::cluster(ipip);
    pods(&mut manifests);
    let mut site = Site::build(&two_nodes(), &manifests.text(), "");
    site.serve("default/server", &[8080]);
    site.start_all();
    let counts = traffic(&mut site, "10.1.1.10");
    site.finish();
    counts
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn pool_mode_always_tunnels_between_nodes_of_one_subnet() {
    let (tunnelled, bare) = mode("Always");
    assert!(tunnelled > 100 && bare == 0, "{tunnelled} tunnelled, {bare} not");
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_bridge_which_has_no_xdp_is_an_uplink_as_any_other() {
    let mut manifests = Manifests::cluster("Always");
    pods(&mut manifests);
    let mut site = Site::build(&two_nodes(), &manifests.text(), "");
    for command in [
        "link add uplink0 type bridge",
        "address flush dev eth0",
        "link set eth0 master uplink0",
        "link set uplink0 up",
        "address add 192.168.10.1/24 dev uplink0",
    ] {
        site.lab.ip("node-a", command).unwrap();
    }
    site.reconfigure("node-a", "name: eth0", "name: uplink0");

    // Who insists on XDP is told.
    let (insisting, plain) = ("role: uplink, require: native", "role: uplink");
    site.reconfigure("node-a", plain, insisting);
    let (binary, config) = (weir_binary().display().to_string(), site.config("node-a").display().to_string());
    let refused = site.lab.output_in("node-a", &[&binary, "run", "-c", &config]).unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("uplink0: its driver has no native XDP"), "{said}");

    site.reconfigure("node-a", insisting, plain);
    site.serve("default/server", &[8080]);
    site.start_all();
    let (tunnelled, bare) = traffic(&mut site, "10.1.1.10");
    assert!(tunnelled > 100 && bare == 0, "{tunnelled} tunnelled, {bare} not");
    let modes = site.status("node-a")["modes"].clone();
    let mode = modes.as_array().unwrap().iter().find(|mode| mode["device"] == "uplink0").expect("its mode");
    assert_eq!((&mode["program"], &mode["mode"]), (&"uplink_take".into(), &"tcx".into()), "{mode}");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn pool_mode_cross_subnet_goes_direct_within_a_subnet() {
    let (tunnelled, bare) = mode("CrossSubnet");
    assert!(tunnelled == 0 && bare > 100, "{tunnelled} tunnelled, {bare} not");
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn pool_mode_never_goes_direct() {
    let (tunnelled, bare) = mode("Never");
    assert!(tunnelled == 0 && bare > 100, "{tunnelled} tunnelled, {bare} not");
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn pool_mode_cross_subnet_tunnels_to_another_subnet_through_a_router() {
    let mut manifests = Manifests::default();
    manifests.node("node-a", &["192.168.10.1"], &["10.1.1.0/24"]);
    manifests.node("node-b", &["192.168.20.2"], &["10.1.2.0/24"]);
    manifests.pool("ipv4", "10.1.0.0/16", "CrossSubnet");
    manifests.namespace("default");
    pods(&mut manifests);
    let nodes =
        [NodePlan::new("node-a", &["192.168.10.1/24"], &[0]), NodePlan::new("node-b", &["192.168.20.2/24"], &[1])];
    let mut site = Site::build(&nodes, &manifests.text(), "");
    site.lab.add_host("router", &["192.168.10.254/24".into(), "192.168.20.254/24".into()], 1).unwrap();
    site.lab.run_in("router", &["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]).unwrap();
    site.lab.ip("node-a", "route add default via 192.168.10.254").unwrap();
    site.lab.ip("node-b", "route add default via 192.168.20.254").unwrap();
    site.serve("default/server", &[8080]);
    site.start_all();
    let (tunnelled, bare) = traffic(&mut site, "10.1.1.10");
    assert!(tunnelled > 100 && bare == 0, "{tunnelled} tunnelled, {bare} not");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_packet_too_big_for_the_tunnel_is_answered_and_tcp_adapts() {
    let mut manifests = Manifests::cluster("Always");
    pods(&mut manifests);
    let mut site = Site::build(&two_nodes(), &manifests.text(), "");
    site.start_all();
    // 1452 + 28 + 20 = 1500: the largest that fits.
    site.pings("default/client", "-c 2 -M do -s 1452 10.1.2.20");
    for (from, to) in [("default/client", "10.1.2.20"), ("default/server", "10.1.1.10")] {
        let (ok, said) = site.ping(from, &format!("-c 1 -M do -s 1472 {to}"));
        let said = said.to_lowercase();
        assert!(!ok && said.contains("mtu") && said.contains("1480"), "{said}");
    }
    assert!(site.drops("node-a", "TooBig") >= 1 && site.drops("node-b", "TooBig") >= 1);
    let (near, far) = connection(&site, "default/client", "default/server", "10.1.2.20:5001");
    bulk(&near, &far, 16 << 20);
    bulk(&far, &near, 16 << 20);
    site.finish();
}
