//! What the node's kernel only forwards: clients of a VPN, containers of a bridge, ports that the kernel translates, pods that nobody has named.

use std::{thread, time::Duration};

use serde_json::Value;
use weir_cluster::translate::workload_device;
use weir_lab::wait_until;

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{CLIENT, DEADLINE, Echo, Site, bulk, connection, one_node, two_nodes},
};

/// Nobody but the node itself gets in.
const CLOSED: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: default, name: closed}
spec:
  podSelector: {matchLabels: {app: closed}}
  policyTypes: [Ingress]
"#;
const OPEN_POD: [&str; 2] = ["10.1.1.20", "[fd00:1:1::20]"];
const CLOSED_POD: [&str; 2] = ["10.1.1.21", "[fd00:1:1::21]"];
const VPN: [&str; 2] = ["10.8.0.2", "fd00:8::2"];
const CONTAINER: &str = "172.17.0.2";
const WEB: &str = "10.96.0.10";
const LOCAL_PORT: u16 = 31390;
/// Of the closed pod.
const SHUT: &str = "10.96.0.11";
const SHUT_PORT: u16 = 31391;

fn manifests() -> Manifests {
    let mut manifests = Manifests::cluster("Never");
    manifests.pod("node-a", "default/open", "open", &["10.1.1.20", "fd00:1:1::20"]);
    manifests.pod("node-a", "default/closed", "closed", &["10.1.1.21", "fd00:1:1::21"]);
    manifests.service(&ServiceSpec {
        name: "default/web",
        addresses: &[WEB],
        ports: &[("http", "TCP", 80, 8080, LOCAL_PORT)],
        local: true,
        backends: &[("10.1.1.20", "node-a")],
    });
    manifests.service(&ServiceSpec {
        name: "default/shut",
        addresses: &[SHUT],
        ports: &[("http", "TCP", 80, 8080, SHUT_PORT)],
        local: true,
        backends: &[("10.1.1.21", "node-a")],
    });
    manifests
}

/// A namespace behind a device of node-a that is no uplink.
pub fn add_behind(site: &mut Site, name: &str, device: &str, gateway: &[&str], addresses: &[&str]) {
    site.lab.add_namespace(name).unwrap();
    let namespace = site.lab.namespace_name(name);
    site.lab.ip("node-a", &format!("link add {device} type veth peer name eth0 netns {namespace}")).unwrap();
    site.lab.ip("node-a", &format!("link set {device} up")).unwrap();
    site.lab.ip(name, "link set eth0 up").unwrap();
    for (own, gateway) in addresses.iter().zip(gateway) {
        let (bits, nodad, family) = if own.contains(':') { (64, " nodad", "-6 ") } else { (24, "", "") };
        site.lab.ip(name, &format!("address add {own}/{bits} dev eth0{nodad}")).unwrap();
        site.lab.ip("node-a", &format!("address add {gateway}/{bits} dev {device}{nodad}")).unwrap();
        site.lab.ip(name, &format!("{family}route add default via {gateway}")).unwrap();
    }
}

/// node-a forwards, as nodes of clusters do, and has a VPN's client and a container of a bridge behind it.
fn site() -> Site {
    let mut site = Site::build(&one_node(), &manifests().text(), CLOSED);
    for setting in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
        site.lab.run_in("node-a", &["sysctl", "-qw", setting]).unwrap();
    }
    add_behind(&mut site, "vpn", "vpn0", &["10.8.0.1", "fd00:8::1"], &VPN);
    site.lab.ip("node-a", "link add docker0 type bridge").unwrap();
    site.lab.ip("node-a", "link set docker0 up").unwrap();
    add_behind(&mut site, "container", "veth1", &[], &[]);
    site.lab.ip("node-a", "link set veth1 master docker0").unwrap();
    site.lab.ip("node-a", "address add 172.17.0.1/24 dev docker0").unwrap();
    site.lab.ip("container", &format!("address add {CONTAINER}/24 dev eth0")).unwrap();
    site.lab.ip("container", "route add default via 172.17.0.1").unwrap();
    site.serve("default/open", &[8080]);
    site.serve("default/closed", &[8080]);
    site
}

/// What `weir trace` says of a packet to a pod that node-a's kernel sends on.
fn traced(site: &Site, src: &str, dst: &str) -> Value {
    let flow =
        format!(r#"{{"id": 1, "src": "{src}", "dst": "{dst}", "proto": "tcp", "dport": 8080, "device": "host"}}"#);
    site.trace("node-a", &flow).remove(0)
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn what_the_nodes_kernel_forwards_meets_ingress_policy() {
    let mut site = site();
    site.start_all();
    let from = [("vpn", VPN[0], 0), ("vpn", VPN[1], 1), ("container", CONTAINER, 0)];
    for (who, address, family) in from {
        let (by, seen) = site.answered(who, &format!("http://{}:8080/", OPEN_POD[family]));
        assert_eq!(
            (by.as_str(), seen.to_string().as_str()),
            ("default/open", address),
            "answers go back by the kernel"
        );
        site.unanswered(who, &format!("http://{}:8080/", CLOSED_POD[family]));
        let bare = |pod: &str| pod.trim_matches(['[', ']']).to_owned();
        assert_eq!(traced(&site, address, &bare(CLOSED_POD[family]))["reason"], "PolicyDeniedIngress");
        assert_eq!(traced(&site, address, &bare(OPEN_POD[family]))["verdict"], "forward");
    }
    // The node's own processes are not asked.
    for pod in CLOSED_POD {
        site.answered("node-a", &format!("http://{pod}:8080/"));
    }
    assert_eq!(traced(&site, "192.168.10.1", "10.1.1.21")["verdict"], "forward");

    // A service, with what it says of sources; and by a port of the node.
    for url in [format!("http://{WEB}/"), format!("http://10.8.0.1:{LOCAL_PORT}/")] {
        site.answered("node-a", &url.replace("10.8.0.1", "192.168.10.1"));
        site.answered("vpn", &url);
    }
    // Policy is asked of them too.
    for url in [format!("http://{SHUT}/"), format!("http://10.8.0.1:{SHUT_PORT}/")] {
        site.answered("node-a", &url);
        site.unanswered("vpn", &url);
        site.unanswered("container", &url);
    }
    // Much at once.
    let (near, far) = connection(&site, "vpn", "default/open", "10.1.1.20:5000");
    bulk(&near, &far, 4 << 20);
    bulk(&far, &near, 4 << 20);
    // And from a pod to who is behind that device, which has a route of the kernel by it.
    let (near, far) = connection(&site, "default/open", "vpn", &format!("{}:5001", VPN[0]));
    bulk(&near, &far, 1 << 20);
    bulk(&far, &near, 1 << 20);

    // With the node's own address, as the kernel masquerades.
    let masquerade = "iptables -t nat -A POSTROUTING -s 172.17.0.0/24 -j MASQUERADE";
    site.lab.run_in("node-a", &masquerade.split(' ').collect::<Vec<_>>()).unwrap();
    site.answered("container", &format!("http://{}:8080/", OPEN_POD[0]));
    site.unanswered("container", &format!("http://{}:8080/", CLOSED_POD[0]));

    // A port of the node that its kernel translates, as a portmap plugin has it.
    for (port, pod) in [("7001", OPEN_POD[0]), ("7002", CLOSED_POD[0])] {
        let translate =
            format!("iptables -t nat -A PREROUTING -i eth0 -p tcp --dport {port} -j DNAT --to-destination {pod}:8080");
        site.lab.run_in("node-a", &translate.split(' ').collect::<Vec<_>>()).unwrap();
    }
    let (by, seen) = site.answered("client", "http://192.168.10.1:7001/");
    assert_eq!((by.as_str(), seen.to_string().as_str()), ("default/open", CLIENT));
    site.unanswered("client", "http://192.168.10.1:7002/");

    // What the node's routes forbid goes nowhere, by the default uplink neither.
    site.lab.ip("node-a", "route add blackhole 10.66.0.0/16").unwrap();
    let sender = site.udp("default/open", "0.0.0.0:0");
    let is_forbidden = || {
        sender.send_to(b"into the hole", "10.66.0.9:9").unwrap();
        (site.drops("node-a", "RouteBlackhole") > 0).then_some(())
    };
    wait_until("the blackhole", DEADLINE, is_forbidden).unwrap();

    // With a pod's address nobody gets anywhere.
    site.lab.ip("vpn", "address add 10.1.1.21/32 dev eth0").unwrap();
    let (answered, said) = site.ping("vpn", "-c 2 -I 10.1.1.21 10.1.1.20");
    assert!(!answered, "{said}");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn between_a_pod_and_its_node_no_ttl_is_lost() {
    let mut site = site();
    site.start_all();
    site.pings("node-a", "-c 3 -t 1 10.1.1.20");
    site.pings("default/open", "-c 3 -t 1 192.168.10.1");
    site.pings("node-a", "-c 3 -t 1 fd00:1:1::20");
    // Established flows too, whoever carries them.
    let _echo = Echo::new(&site, "default/open", "0.0.0.0:7");
    let socket = site.udp("node-a", "0.0.0.0:0");
    socket.set_ttl(1).unwrap();
    socket.connect("10.1.1.20:7").unwrap();
    for _ in 0..300 {
        socket.send(b"one hop").unwrap();
        assert_eq!(socket.recv(&mut [0; 64]).expect("an answer"), 7);
    }
    site.finish();
}

/// A pod whose sandbox is there before any manifest has its name: nothing that it sends gets anywhere, by the node's kernel neither.
#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_pod_that_nobody_has_named_is_closed() {
    const PORT: u16 = 99;
    let targets = [("default/open", "10.1.1.20"), ("client", CLIENT), ("vpn", VPN[0]), ("node-a", "192.168.10.1")];
    let mut site = site();
    site.start_all();
    let listeners = targets.map(|(at, _)| {
        let socket = site.udp(at, &format!("0.0.0.0:{PORT}"));
        socket.set_nonblocking(true).unwrap();
        socket
    });
    // By Calico's name, and by another with a route for the pod's address.
    let named = workload_device("default", "named");
    for (pod, device, address) in
        [("default/named", named.as_str(), "10.1.1.50"), ("default/routed", "tap0000000000b", "10.1.1.51")]
    {
        site.lab.add_pod("node-a", pod, device, &[address.parse().unwrap()]).unwrap();
        site.lab.ip("node-a", &format!("route add {address}/32 dev {device}")).unwrap();
        // As Calico sets devices up: the kernel would forward.
        site.lab.run_in("node-a", &["sysctl", "-qw", &format!("net.ipv4.conf.{device}.proxy_arp=1")]).unwrap();
        let gateway = "neighbour replace 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent";
        site.lab.ip(pod, gateway).unwrap();
        wait_until("that its device is closed", DEADLINE, || site.router_log("node-a").contains(device).then_some(()))
            .unwrap();
        let before = site.drops("node-a", "UnknownDevice");
        let sender = site.udp(pod, "0.0.0.0:0");
        for (_, target) in targets {
            sender.send_to(b"let me in", (target, PORT)).unwrap();
        }
        let all_dropped = || (site.drops("node-a", "UnknownDevice") >= before + 4).then_some(());
        wait_until("that nothing goes anywhere", DEADLINE, all_dropped).unwrap();
        thread::sleep(Duration::from_millis(300));
        for (listener, (at, _)) in listeners.iter().zip(targets) {
            assert!(listener.recv(&mut [0; 64]).is_err(), "{at} got something from {pod}");
        }
    }
    // Named, it is a pod as any other.
    let mut manifests = manifests();
    manifests.pod("node-a", "default/named", "open", &["10.1.1.50"]);
    site.set_cluster(&manifests.text());
    let sender = site.udp("default/named", "0.0.0.0:0");
    for (listener, (at, target)) in listeners.iter().zip(targets) {
        let arrives = || {
            sender.send_to(b"now", (target, PORT)).unwrap();
            listener.recv(&mut [0; 64]).ok()
        };
        wait_until(&format!("what a known pod sends to {at}"), DEADLINE, arrives).unwrap();
    }
    site.finish();
}

/// Two nodes: pods of the other one may not be spoken for.
#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn who_is_behind_the_kernel_speaks_for_no_pod_elsewhere() {
    let mut manifests = manifests();
    manifests.pod("node-b", "default/far", "far", &["10.1.2.20"]);
    let mut site = Site::build(&two_nodes(), &manifests.text(), "");
    site.lab.run_in("node-a", &["sysctl", "-qw", "net.ipv4.ip_forward=1"]).unwrap();
    add_behind(&mut site, "vpn", "vpn0", &["10.8.0.1"], &[VPN[0]]);
    site.lab.ip("vpn", "address add 10.1.2.20/32 dev eth0").unwrap();
    site.lab
        .run_in("node-a", &["sysctl", "-qw", "net.ipv4.conf.vpn0.rp_filter=0", "net.ipv4.conf.all.rp_filter=0"])
        .unwrap();
    site.start_all();
    let server = site.udp("default/open", "0.0.0.0:9");
    server.set_nonblocking(true).unwrap();
    let socket = site.udp("vpn", "10.1.2.20:0");
    socket.connect("10.1.1.20:9").unwrap();
    let before = site.drops("node-a", "SpoofedSource");
    socket.send(b"from the far pod").unwrap();
    wait_until("the drop", DEADLINE, || (site.drops("node-a", "SpoofedSource") > before).then_some(())).unwrap();
    assert!(server.recv(&mut [0; 64]).is_err(), "nothing came");
    // In its own name it is heard, and the pod itself too.
    let _echo = Echo::new(&site, "default/open", "0.0.0.0:7");
    for (from, own) in [("vpn", "10.8.0.2:0"), ("default/far", "10.1.2.20:0")] {
        let socket = site.udp(from, own);
        socket.connect("10.1.1.20:7").unwrap();
        socket.send(b"hello").unwrap();
        assert_eq!(socket.recv(&mut [0; 64]).expect("an answer"), 5, "{from}");
    }
    site.finish();
}
