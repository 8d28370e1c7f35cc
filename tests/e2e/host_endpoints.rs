//! A host endpoint on a node's uplink: what its policy says to real clients outside, and what is left when weir dies.

use std::{io::Read, net::UdpSocket, time::Duration};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::{
    manifests::{Manifests, ServiceSpec},
    own_node::{serve_shell, shell_works},
    site::{CLIENT, DEADLINE, Echo, NO_ANSWER_SECONDS, Site, connection, one_node, passes},
};

const NODE: &str = "192.168.10.1";
const NODE6: &str = "[fd00:10::1]";
const POD: &str = "10.1.1.20";
const POD6: &str = "[fd00:1:1::20]";
/// Of both families.
const NODES: [&str; 2] = [NODE, NODE6];
const PODS: [&str; 2] = [POD, POD6];
const OPEN_NODE_PORT: u16 = 31380;
const CLOSED_NODE_PORT: u16 = 31381;

/// Each stage allows what the others say nothing of, so that a verdict has one cause. Policy for what is forwarded comes first, then
/// that for the node's own: both also meet the latter.
const POLICIES: &str = r#"
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: untracked}
spec:
  selector: has(uplink)
  doNotTrack: true
  applyOnForward: true
  types: [Ingress, Egress]
  ingress:
  - {action: Allow, protocol: UDP, destination: {ports: [7000, 7002]}}
  - {action: Deny, protocol: UDP, destination: {ports: [7001]}}
  egress:
  - {action: Allow, protocol: UDP, source: {ports: [7000]}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: before-dnat}
spec:
  selector: has(uplink)
  preDNAT: true
  applyOnForward: true
  types: [Ingress]
  ingress:
  - {action: Deny, protocol: TCP, destination: {ports: [31381]}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: forwarded}
spec:
  order: 10
  selector: has(uplink)
  applyOnForward: true
  types: [Ingress]
  ingress:
  - {action: Deny, protocol: TCP, destination: {ports: [8081]}}
  - {action: Allow, protocol: TCP, destination: {ports: [8080]}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: leaving}
spec:
  order: 10
  selector: has(uplink)
  applyOnForward: true
  types: [Egress]
  egress:
  - {action: Deny, protocol: TCP, source: {nets: [10.1.0.0/16, "fd00:1::/32"]}, destination: {ports: [9100]}}
  - {action: Allow}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: nodes-own}
spec:
  order: 20
  selector: has(uplink)
  types: [Ingress]
  ingress:
  - {action: Allow, protocol: TCP, destination: {ports: [9000, 9004]}}
  - {action: Allow, protocol: UDP, destination: {ports: [7001, 7003]}}
  - {action: Deny}
"#;

/// Whether a datagram from the client to a port of the node comes back.
fn comes_back(client: &UdpSocket, node: &str, port: u16, limit: Duration) -> bool {
    client.connect(format!("{node}:{port}")).unwrap();
    client.set_read_timeout(Some(limit)).unwrap();
    client.send(b"there and back").unwrap();
    client.recv(&mut [0; 64]).is_ok()
}

/// The client's routes to pods by their own addresses.
fn route_to_pods(site: &Site) {
    site.lab.ip("client", &format!("route add 10.1.1.0/24 via {NODE}")).unwrap();
    site.lab.ip("client", "-6 route add fd00:1:1::/64 via fd00:10::1").unwrap();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_host_endpoint_guards_the_node_and_what_it_forwards() {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/server", "server", &[POD, "fd00:1:1::20"]);
    for (name, addresses, port) in [
        ("default/open", ["10.96.0.10", "fd00:96::10"], OPEN_NODE_PORT),
        ("default/closed", ["10.96.0.11", "fd00:96::11"], CLOSED_NODE_PORT),
    ] {
        manifests.service(&ServiceSpec {
            name,
            addresses: &addresses,
            ports: &[("http", "TCP", 80, 8080, port)],
            backends: &[(POD, "node-a"), ("fd00:1:1::20", "node-a")],
            ..ServiceSpec::default()
        });
    }
    manifests.add(json!({
        "apiVersion": "projectcalico.org/v3", "kind": "HostEndpoint",
        "metadata": {"name": "uplink-of-a", "labels": {"uplink": "yes"}},
        "spec": {"interfaceName": "eth0", "node": "node-a"},
    }));
    let mut site = Site::build(&one_node(), &manifests.text(), POLICIES);
    serve_shell(&mut site, "node-a");
    site.serve("node-a", &[9000, 9001]);
    site.serve("default/server", &[8080, 8081]);
    site.serve("client", &[9100, 9101]);
    route_to_pods(&site);
    site.start_all();
    let url = |address: &str, port: u16| format!("http://{address}:{port}/");

    // The node's own: what its policy allows, and failsafe ports, which no policy names.
    for address in NODES {
        site.answered("client", &url(address, 9000));
        site.unanswered("client", &url(address, 9001));
    }
    shell_works(&site);
    // What the node asks is answered.
    site.answered("node-a", &format!("http://{CLIENT}:9100/"));

    for (node, pod, client) in [(NODE, POD, CLIENT), (NODE6, POD6, "[fd00:10::100]")] {
        // Forwarded: a pod by its address, and by two node ports that differ before DNAT alone.
        site.answered("client", &url(pod, 8080));
        site.unanswered("client", &url(pod, 8081));
        site.answered("client", &url(node, OPEN_NODE_PORT));
        site.unanswered("client", &url(node, CLOSED_NODE_PORT));
        // What a pod sends out meets policy with the pod's own address, before it is masqueraded.
        site.answered("default/server", &url(client, 9101));
        site.unanswered("default/server", &url(client, 9100));
        // The host endpoint of an uplink is not for what pods and the node say to each other.
        site.answered("node-a", &url(pod, 8081));
        site.answered("default/server", &url(node, 9001));
    }

    // Untracked policy has the first word: 7000 is allowed by it alone, 7001 denied by it alone, the way back of 7002 is not
    // allowed, 7003 is left to the policy of the node's own.
    for (node, any) in [(NODE, "0.0.0.0:0"), (NODE6, "[::]:0")] {
        let _echoes = [7000, 7001, 7002, 7003].map(|port| Echo::new(&site, "node-a", &format!("{node}:{port}")));
        let client = site.udp("client", any);
        let moment = Duration::from_secs_f32(NO_ANSWER_SECONDS);
        for (port, allowed) in [(7000, true), (7001, false), (7002, false), (7003, true)] {
            let limit = if allowed { DEADLINE } else { moment };
            assert_eq!(comes_back(&client, node, port, limit), allowed, "UDP port {port} of {node}");
        }
    }
    assert!(site.drops("node-a", "PolicyDeniedHostEndpoint") >= 7, "{}", site.status("node-a")["counters"]);

    // A change at run time reaches new connections, and cuts what is open to a server of the node; not what the node has asked.
    let listeners = [NODE, NODE6].map(|node| site.listen("node-a", &format!("{node}:9004")));
    let opened = [NODE, NODE6].map(|node| site.connect("client", &format!("{node}:9004"), DEADLINE).unwrap());
    let accepted = listeners.each_ref().map(|listener| listener.accept().unwrap().0);
    let asked =
        [CLIENT, "[fd00:10::100]"].map(|client| connection(&site, "node-a", "client", &format!("{client}:9104")));
    for (near, far) in opened.iter().zip(&accepted) {
        assert!(passes(near, far, DEADLINE));
    }
    site.set_policies(&POLICIES.replace("[9000, 9004]", "[9001]").replace("31381", "31380"));
    for (near, far) in opened.iter().zip(&accepted) {
        assert!(!passes(near, far, Duration::from_secs_f32(NO_ANSWER_SECONDS)), "what is open to the node is cut");
    }
    for (near, far) in &asked {
        assert!(passes(near, far, DEADLINE) && passes(far, near, DEADLINE), "what the node asks goes on");
    }
    site.unanswered("client", &url(NODE, 9000));
    site.answered("client", &url(NODE, 9001));
    site.unanswered("client", &url(NODE, OPEN_NODE_PORT));
    site.answered("client", &url(NODE, CLOSED_NODE_PORT));

    // Dead, it lets nobody in but by failsafe ports.
    let mut router = site.take_router("node-a");
    router.signal(Signal::SIGKILL);
    assert!(!router.wait(DEADLINE).unwrap().success());
    shell_works(&site);
    site.unanswered("client", &url(NODE, 9001));
    site.start("node-a");
    site.answered("client", &url(NODE, 9001));
    site.unanswered("client", &url(NODE, 9000));
    shell_works(&site);
    site.finish();
}

/// For every device, pods' too: 8081 is closed before DNAT, 8082 to what is forwarded. The rest is left to the profile, that lets nobody reach
/// more of the node than 9000. Failsafe ports are others than usual.
const EVERYWHERE: &str = r#"
apiVersion: projectcalico.org/v3
kind: Profile
metadata: {name: nodes-own}
spec:
  ingress:
  - {action: Allow, protocol: TCP, destination: {ports: [9000]}}
  egress:
  - {action: Allow}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: before-dnat}
spec:
  selector: has(everywhere)
  preDNAT: true
  applyOnForward: true
  types: [Ingress]
  ingress:
  - {action: Deny, protocol: TCP, destination: {ports: [8081, 9002]}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: forwarded}
spec:
  selector: has(everywhere)
  applyOnForward: true
  types: [Ingress]
  ingress:
  - {action: Deny, protocol: TCP, destination: {ports: [8082]}}
  - {action: Pass}
---
apiVersion: projectcalico.org/v3
kind: FelixConfiguration
metadata: {name: default}
spec:
  failsafeInboundHostPorts:
  - {protocol: TCP, port: 9002}
  - {protocol: TCP, port: 9003, net: 192.0.2.0/24}
  failsafeOutboundHostPorts: []
  defaultEndpointToHostAction: Drop
"#;

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_host_endpoint_for_all_devices_with_failsafe_ports_of_its_own() {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10", "fd00:1:1::10"]);
    manifests.pod("node-a", "default/server", "server", &[POD, "fd00:1:1::20"]);
    manifests.add(json!({
        "apiVersion": "projectcalico.org/v3", "kind": "HostEndpoint",
        "metadata": {"name": "all-of-a", "labels": {"everywhere": "yes"}},
        "spec": {"interfaceName": "*", "node": "node-a", "profiles": ["nodes-own"]},
    }));
    let mut site = Site::build(&one_node(), &manifests.text(), EVERYWHERE);
    serve_shell(&mut site, "node-a");
    site.serve("node-a", &[9000, 9001, 9002, 9003]);
    site.serve("default/server", &[8080, 8081, 8082]);
    route_to_pods(&site);
    site.start_all();
    let url = |address: &str, port: u16| format!("http://{address}:{port}/");

    // The profile's rules, and the failsafe ports that are configured instead of the usual ones: spared before DNAT too, but one is so for
    // a network only.
    let outcomes = |site: &Site, from: &str, flows: &[(&str, u16, bool)]| {
        for (address, port, is_answered) in flows {
            if *is_answered {
                site.answered(from, &url(address, *port));
            } else {
                site.unanswered(from, &url(address, *port));
            }
        }
    };
    for node in NODES {
        outcomes(&site, "client", &[(node, 9000, true), (node, 9001, false), (node, 9002, true), (node, 9003, false)]);
    }
    site.unanswered("client", &url(NODE, 22));
    for pod in PODS {
        // What is forwarded, from outside and from another pod, meets the same policy, and no profile.
        for from in ["client", "default/client"] {
            outcomes(&site, from, &[(pod, 8080, true), (pod, 8081, false), (pod, 8082, false)]);
        }
        // The node always reaches its pods.
        outcomes(&site, "node-a", &[(pod, 8081, true), (pod, 8082, true)]);
    }
    // What pods send to the node is the setting's alone, failsafe port or not.
    for node in NODES {
        outcomes(&site, "default/client", &[(node, 9000, false), (node, 9002, false)]);
    }
    assert!(site.drops("node-a", "PolicyDeniedEndpointToHost") >= 4, "{}", site.status("node-a")["counters"]);

    // Accepted, they reach every port that policy before DNAT leaves open, whatever the profile says. A connection is cut when
    // it is forbidden again.
    let accept = EVERYWHERE.replace("HostAction: Drop", "HostAction: Accept");
    site.set_policies(&accept);
    for node in NODES {
        outcomes(&site, "default/client", &[(node, 9000, true), (node, 9001, true), (node, 9002, true)]);
    }
    let (near, far) = connection(&site, "default/client", "node-a", &format!("{NODE}:5000"));
    assert!(passes(&near, &far, DEADLINE));
    site.set_policies(EVERYWHERE);
    assert!(!passes(&near, &far, Duration::from_secs_f32(NO_ANSWER_SECONDS)), "a changed setting cuts");
    site.set_policies(&accept);
    // Its bytes are sent again.
    let mut byte = [0];
    (&far).read_exact(&mut byte).unwrap();

    // The usual failsafe ports, where nothing is configured.
    site.set_policies(accept.split("---\napiVersion: projectcalico.org/v3\nkind: FelixConfiguration").next().unwrap());
    shell_works(&site);
    for node in NODES {
        outcomes(&site, "client", &[(node, 9000, true), (node, 9001, false), (node, 9002, false)]);
    }
    site.finish();
}
