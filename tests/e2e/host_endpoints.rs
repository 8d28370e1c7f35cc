//! A host endpoint on a node's uplink: what its policy says to real clients outside, and what is left when weir dies.

use std::{net::UdpSocket, time::Duration};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::{
    manifests::{Manifests, ServiceSpec},
    own_node::{serve_shell, shell_works},
    site::{CLIENT, DEADLINE, Echo, NO_ANSWER_SECONDS, Site, one_node},
};

const NODE: &str = "192.168.10.1";
const POD: &str = "10.1.1.20";
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
  - {action: Deny, protocol: TCP, source: {nets: [10.1.0.0/16]}, destination: {ports: [9100]}}
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
  - {action: Allow, protocol: TCP, destination: {ports: [9000]}}
  - {action: Allow, protocol: UDP, destination: {ports: [7001, 7003]}}
  - {action: Deny}
"#;

/// Whether a datagram from the client to a port of the node comes back.
fn comes_back(client: &UdpSocket, port: u16, limit: Duration) -> bool {
    client.connect((NODE, port)).unwrap();
    client.set_read_timeout(Some(limit)).unwrap();
    client.send(b"there and back").unwrap();
    client.recv(&mut [0; 64]).is_ok()
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_host_endpoint_guards_the_node_and_what_it_forwards() {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/server", "server", &[POD, "fd00:1:1::20"]);
    for (name, address, port) in
        [("default/open", "10.96.0.10", OPEN_NODE_PORT), ("default/closed", "10.96.0.11", CLOSED_NODE_PORT)]
    {
        manifests.service(&ServiceSpec {
            name,
            addresses: &[address],
            ports: &[("http", "TCP", 80, 8080, port)],
            backends: &[(POD, "node-a")],
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
    site.lab.ip("client", &format!("route add 10.1.1.0/24 via {NODE}")).unwrap();
    site.start_all();
    let url = |address: &str, port: u16| format!("http://{address}:{port}/");

    // The node's own: what its policy allows, and failsafe ports, which no policy names.
    for address in [NODE, "[fd00:10::1]"] {
        site.answered("client", &url(address, 9000));
        site.unanswered("client", &url(address, 9001));
    }
    shell_works(&site);
    // What the node asks is answered.
    site.answered("node-a", &format!("http://{CLIENT}:9100/"));

    // Forwarded: a pod by its address, and by two node ports that differ before DNAT alone.
    site.answered("client", &url(POD, 8080));
    site.unanswered("client", &url(POD, 8081));
    site.answered("client", &url(NODE, OPEN_NODE_PORT));
    site.unanswered("client", &url(NODE, CLOSED_NODE_PORT));
    // What a pod sends out meets policy with the pod's own address, before it is masqueraded.
    site.answered("default/server", &format!("http://{CLIENT}:9101/"));
    site.unanswered("default/server", &format!("http://{CLIENT}:9100/"));
    // The host endpoint of an uplink is not for what pods and the node say to each other.
    site.answered("node-a", &url(POD, 8081));
    site.answered("default/server", &url(NODE, 9001));

    // Untracked policy has the first word: 7000 is allowed by it alone, 7001 denied by it alone, the way back of 7002 is not
    // allowed, 7003 is left to the policy of the node's own.
    {
        let _echoes = [7000, 7001, 7002, 7003].map(|port| Echo::new(&site, "node-a", &format!("{NODE}:{port}")));
        let client = site.udp("client", "0.0.0.0:0");
        let moment = Duration::from_secs_f32(NO_ANSWER_SECONDS);
        for (port, allowed) in [(7000, true), (7001, false), (7002, false), (7003, true)] {
            let limit = if allowed { DEADLINE } else { moment };
            assert_eq!(comes_back(&client, port, limit), allowed, "UDP port {port}");
        }
    }
    assert!(site.drops("node-a", "PolicyDeniedHostEndpoint") >= 7, "{}", site.status("node-a")["counters"]);

    // A change at run time reaches new connections.
    site.set_policies(&POLICIES.replace("[9000]", "[9001]").replace("31381", "31380"));
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
