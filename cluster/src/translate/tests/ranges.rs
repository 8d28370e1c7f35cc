//! Where addresses come from: ServiceCIDRs, and what Calico's IPAM has given to nodes. Whom services are left to.

use super::*;

const NODES: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDR: 10.244.0.0/24}\n---\napiVersion: v1\nkind: Node\n\
                     metadata: {name: node-b}\nspec: {podCIDR: 10.244.1.0/24}\n";

fn object(version: &str, kind: &str, name: &str, spec: &str) -> String {
    format!("---\napiVersion: {version}\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n")
}

fn affinity(name: &str, spec: &str) -> String {
    object("crd.projectcalico.org/v1", "BlockAffinity", name, spec)
}

#[test]
fn service_cidrs_come_from_weir_yaml_and_from_their_objects() {
    let cidr = |name: &str, spec: &str| object("networking.k8s.io/v1", "ServiceCIDR", name, spec);
    let cluster = cidr("kubernetes", "{cidrs: [10.96.0.0/12, 'fd00:96::/112']}")
        + &cidr("more", "{cidrs: [10.112.0.0/16]}")
        + &object("networking.k8s.io/v1beta1", "ServiceCIDR", "kubernetes", "{cidrs: [10.96.0.0/12]}");
    let loaded = loaded(&format!("{WEIR}serviceCIDRs: [10.112.0.0/16]\n"), &cluster);
    let expected = ["10.112.0.0/16", "10.96.0.0/12", "fd00:96::/112"];
    for ranges in [&loaded.cluster.service_cidrs, &loaded.services.service_cidrs] {
        assert_eq!(ranges.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
    }
    assert_said(
        WEIR,
        &cidr("bad", "{cidrs: [0.0.0.0/0, 10.96.0.0]}"),
        &[
            "cluster.yaml:5:16: error: ServiceCIDR bad: spec.cidrs[0]: 0.0.0.0/0 is every address, the nodes' own too [write the \
             range that cluster IPs are allocated in]",
            "cluster.yaml:5:27: error: ServiceCIDR bad: spec.cidrs[1]: \"10.96.0.0\" is an address, not a CIDR [write 10.96.0.0/32 for this one \
             address]",
        ],
    );
}

#[test]
fn confirmed_blocks_and_borrowed_addresses_are_their_nodes() {
    let cluster = NODES.to_owned()
        + &affinity("a", "{cidr: 10.10.0.0/26, node: node-a, state: confirmed, deleted: 'false'}")
        + &affinity("b", "{cidr: 10.10.0.64/26, node: node-b, state: confirmed}")
        + &affinity("c", "{cidr: 10.10.0.128/26, node: node-b, state: pending}")
        + &affinity("d", "{cidr: 10.10.0.192/26, node: gone, state: confirmed}")
        + &affinity("e", "{cidr: 'fd00:10::/122', node: node-b, state: confirmed}")
        + &object(
            "crd.projectcalico.org/v1",
            "IPAMBlock",
            "10-10-0-0-26",
            "{cidr: 10.10.0.0/26, affinity: 'host:node-a', allocations: [null, 0, 1, 1], attributes: [{secondary: {node: node-a}}, \
             {secondary: {node: node-b}}]}",
        );
    let loaded = loaded(WEIR, &cluster);
    let of = |index: usize| loaded.cluster.nodes[index].blocks.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(of(0), ["10.10.0.0/26"]);
    assert_eq!(of(1), ["10.10.0.64/26", "fd00:10::/122", "10.10.0.2/32", "10.10.0.3/32"]);
    // Without a pool, these are the addresses of pods.
    assert_eq!(loaded.cluster.pod_cidrs.len(), 7);
    assert_said(
        WEIR,
        &(NODES.to_owned() + &affinity("x", "{cidr: 0.0.0.0/0, node: node-b, state: confirmed}")),
        &[
            "cluster.yaml:14:14: error: BlockAffinity x: spec.cidr: 0.0.0.0/0 is every address, the nodes' own too [write the range that pods \
           have addresses of]",
        ],
    );
    // What is not in force is not looked at.
    assert_said(WEIR, &(NODES.to_owned() + &affinity("x", "{cidr: nonsense, node: node-b, state: pending}")), &[]);
}

const WEB: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: x, labels: {LABEL}}\nspec: {clusterIP: 10.96.0.10, ports: \
                   [{port: 80}]}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1, namespace: x, labels: \
                   {kubernetes.io/service-name: web, SLICE}}\naddressType: IPv4\nendpoints: [{addresses: [192.0.2.1]}]\nports: [{port: 8080}]\n";

#[test]
fn services_are_served_for_the_proxy_that_their_label_names() {
    let named = "service.kubernetes.io/service-proxy-name: own";
    let headless = "service.kubernetes.io/headless: ''";
    for (label, slice, own, expected) in [
        ("", "", None, Some(1)),
        ("", "", Some("own"), None),
        (named, named, None, None),
        (named, named, Some("own"), Some(1)),
        (named, named, Some("other"), None),
        // The service is served, and its slice is another's.
        ("", named, None, Some(0)),
        (named, "", Some("own"), Some(0)),
        (headless, headless, None, None),
        ("", headless, None, Some(0)),
    ] {
        let weir = format!("{WEIR}{}", own.map_or(String::new(), |own| format!("serviceProxyName: {own}\n")));
        let loaded = loaded(&weir, &WEB.replace("LABEL", label).replace("SLICE", slice));
        let found = loaded.services.services.first().map(|service| service.endpoints.len());
        assert_eq!(found, expected, "{label:?} {slice:?} {own:?}");
    }
    let bad = format!("{WEIR}serviceProxyName: not/one\n");
    let line = said(&bad, "").concat();
    assert!(line.contains("serviceProxyName is no value that a label can have"), "{line}");
}

#[test]
fn a_rule_that_names_a_service_means_its_endpoints_also_where_no_proxy_serves_it() {
    let policy = "---\napiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nmetadata: {name: p, namespace: x}\nspec: {types: [Egress], egress: \
                  [{action: Deny, destination: {services: {name: web}}}, {action: Allow}]}\n";
    for label in ["", "service.kubernetes.io/headless: ''", "service.kubernetes.io/service-proxy-name: other"] {
        let loaded = loaded(WEIR, &(WEB.replace("LABEL", label).replace("SLICE", label) + policy));
        let text = format!("{:?}", loaded.policy);
        assert!(text.contains("192.0.2.1"), "{label:?}: {text}");
    }
}
