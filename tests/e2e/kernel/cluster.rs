//! The node under test, its services, and those around it.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::family::Family;
use crate::{
    manifests::Manifests,
    site::{Echo, NodePlan, Site},
};

/// Where a flow comes from.
pub const POD: &str = "default/client";
pub const OUTSIDE: &str = "client";
pub const NODE: &str = "node-a";
/// A pod that is a backend.
pub const BACKEND: &str = "default/web-1";
/// The other node, with its pod's address; it has a route to cluster IPs by which it is the pod, and else it is itself.
pub const OTHER: &str = "remote";

/// Addresses of the backends, with the node that they are on.
const WEB_1: (&str, &str) = ("10.1.1.21", "node-a");
const WEB_2: (&str, &str) = ("10.1.1.22", "node-a");
const REMOTE: (&str, &str) = ("10.1.2.50", "node-b");
/// Namespaces and addresses of the servers.
const SERVERS: [(&str, &str); 3] = [(BACKEND, WEB_1.0), ("default/web-2", WEB_2.0), (OTHER, REMOTE.0)];

/// The names of a service's ports, and their protocols.
const PROTOCOLS: [&str; 2] = ["TCP", "UDP"];

/// A backend's address and node, and more of its endpoint.
type Backend<'a> = ((&'a str, &'a str), &'a Value);

/// A service on TCP and UDP port 80 of 10.96.0.`number`, its backends' 8080, with more of its spec.
fn service(
    family: Family,
    manifests: &mut Manifests,
    number: u8,
    more: &Value,
    ranges: Option<&str>,
    backends: &[Backend<'_>],
) {
    let name = format!("service-{number}");
    let address = family.address(&format!("10.96.0.{number}"));
    let mut spec = json!({
        "type": "LoadBalancer", "clusterIP": address, "clusterIPs": [address],
        "externalIPs": [family.address(&format!("198.51.100.{number}"))],
        "ports": PROTOCOLS.map(|protocol| {
            json!({"name": protocol, "protocol": protocol, "port": 80, "targetPort": 8080, "nodePort": 31500 + u16::from(number)})
        }),
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    let mut status = json!({});
    if let Some(ranges) = ranges {
        spec["loadBalancerSourceRanges"] = json!([family.net(ranges)]);
        status["loadBalancer"] = json!({"ingress": [{"ip": family.address(&format!("203.0.113.{number}"))}]});
    }
    let metadata = json!({"namespace": "default", "name": name});
    manifests.add(json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": status}));
    let endpoint = |((address, node), more): &Backend<'_>| {
        let mut endpoint = (*more).clone();
        endpoint["addresses"] = json!([family.address(address)]);
        endpoint["nodeName"] = json!(node);
        endpoint
    };
    let endpoints: Vec<Value> = backends.iter().map(endpoint).collect();
    manifests.add(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": if family == Family::V4 { "IPv4" } else { "IPv6" },
        "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": name}},
        "endpoints": endpoints, "ports": PROTOCOLS.map(|protocol| json!({"name": protocol, "protocol": protocol, "port": 8080})),
    }));
}

/// The site, and what answers datagrams in it for as long as it is kept: as nginx does, with its own name and whom it saw.
pub fn site(family: Family) -> (Site, Vec<Echo>) {
    let mut manifests = Manifests::cluster("Never");
    manifests.zone("node-a", "here");
    manifests.pod("node-a", POD, "client", &[&family.address("10.1.1.10")]);
    manifests.pod("node-a", BACKEND, "web", &[&family.address(WEB_1.0)]);
    manifests.pod("node-a", "default/web-2", "web", &[&family.address(WEB_2.0)]);
    services(family, &mut manifests);
    let node = NodePlan::new("node-a", &["192.168.10.1/24", "fd00:10::1/64"], &[0]);
    let mut site = Site::build(&[node], &manifests.text(), "");
    // The other node is a host that has its pod's address itself.
    let pod = format!("{}/{}", family.address(REMOTE.0), family.whole());
    site.lab.add_host(OTHER, &["192.168.10.2/24".into(), "fd00:10::2/64".into(), pod], 1).unwrap();
    let (node, client) = (family.address("192.168.10.1"), family.address("192.168.10.100"));
    site.lab.ip(OTHER, &format!("route add {} via {node}", family.net("10.1.1.0"))).unwrap();
    let as_pod = format!("via {node} src {}", family.address(REMOTE.0));
    site.lab.ip(OTHER, &format!("route add {} {as_pod}", family.net("10.96.0.0"))).unwrap();
    for net in ["10.96.0.0", "198.51.100.0", "203.0.113.0"] {
        site.lab.ip(OUTSIDE, &format!("route add {} via {node}", family.net(net))).unwrap();
    }
    // The node must have a way to hand these to its output rules; on a real one that is its default route.
    site.lab.ip(NODE, &format!("route add default via {client}")).unwrap();
    let mut echoes = Vec::new();
    for (server, address) in SERVERS {
        site.serve(server, &[8080]);
        // Not on any address: the other node's answer would come from its own.
        let address = SocketAddr::new(family.address(address).parse().unwrap(), 8080).to_string();
        echoes.push(Echo::answering(&site, server, &address, move |_, from| {
            format!("{server} {}\n", from.ip()).into_bytes()
        }));
    }
    (site, echoes)
}

fn services(family: Family, manifests: &mut Manifests) {
    let (external, internal) = (json!({"externalTrafficPolicy": "Local"}), json!({"internalTrafficPolicy": "Local"}));
    let both = json!({"externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local"});
    let any = json!({});
    let ends = json!({"conditions": {"ready": false, "serving": true, "terminating": true}});
    let unready = json!({"conditions": {"ready": false, "serving": false}});
    let zones = |zones: &[&str]| {
        let zones: Vec<Value> = zones.iter().map(|zone| json!({"name": zone})).collect();
        json!({"hints": {"forZones": zones}})
    };
    let (here, there, everywhere) = (zones(&["here"]), zones(&["there"]), zones(&["there", "here"]));
    let for_node = |node: &str| json!({"hints": {"forNodes": [{"name": node}]}});
    let (for_a, for_b) = (for_node("node-a"), for_node("node-b"));
    let all: [Backend<'_>; 3] = [(WEB_1, &any), (WEB_2, &any), (REMOTE, &any)];
    let mut add = |number, more: &Value, ranges, backends: &[Backend<'_>]| {
        service(family, manifests, number, more, ranges, backends);
    };
    add(1, &any, Some("192.168.10.0"), &all);
    add(2, &external, Some("192.0.2.0"), &[(WEB_1, &any), (REMOTE, &any)]);
    add(3, &internal, None, &[(WEB_2, &any), (REMOTE, &any)]);
    add(4, &both, None, &[(REMOTE, &any)]);
    add(5, &any, None, &[]);
    add(6, &any, None, &[(WEB_1, &any)]);
    add(7, &json!({"sessionAffinity": "ClientIP"}), None, &all);
    // Hints: of zones, of zones where one backend has none, of nodes and zones.
    add(8, &any, None, &[(WEB_1, &there), (WEB_2, &here), (REMOTE, &everywhere)]);
    add(9, &external, None, &[(WEB_1, &there), (WEB_2, &here), (REMOTE, &any)]);
    add(10, &any, None, &[(WEB_1, &for_a), (REMOTE, &for_b)]);
    // Conditions: what is not ready beside what is, what only still serves, nothing that serves.
    add(11, &any, None, &[(WEB_1, &unready), (WEB_2, &any), (REMOTE, &ends)]);
    add(12, &any, None, &[(WEB_1, &ends), (WEB_2, &unready), (REMOTE, &ends)]);
    add(13, &any, None, &[(WEB_1, &unready), (REMOTE, &unready)]);
    // The node falls back by itself; what still serves elsewhere exists.
    add(14, &external, None, &[(WEB_1, &ends), (REMOTE, &any)]);
    add(15, &external, None, &[(WEB_1, &unready), (REMOTE, &ends)]);
}
