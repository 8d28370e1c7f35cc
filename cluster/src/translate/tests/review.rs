//! What `weir check` warns of: valid, but probably not meant so.

use super::*;

/// A small cluster in which nothing is odd, from line 1 on.
const CLUSTER: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Node
metadata: {name: node-a}
spec: {podCIDRs: [10.1.1.0/24]}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: one}
spec: {nodeName: node-a}
status: {podIP: 10.1.1.5}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
addressType: IPv4
metadata: {namespace: shop, name: web-1, labels: {kubernetes.io/service-name: web}}
endpoints: [{addresses: [10.1.1.5], nodeName: node-a}]
ports: [{name: http, port: 8080}]
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: web}
";
const WEIR: &str = "nodeName: node-a\nmanifests: [cluster.yaml]\nserviceCIDRs: [10.96.0.0/16]\n";

/// What is said about the cluster with this spec of its service, and more documents.
#[track_caller]
fn warned(spec: &str, more: &str, expected: &[(&str, &str)]) {
    let text = format!("{CLUSTER}{spec}\n{more}");
    assert_eq!(said(WEIR, &text), Vec::<String>::new(), "only a review says it");
    let said = lines_of(&read_texts(WEIR, &text, true));
    let expected: Vec<String> =
        expected.iter().map(|(subject, message)| format!("warning: {subject}: {message}")).collect();
    let without_place: Vec<&str> = said.iter().map(|line| line.split_once(": ").unwrap().1).collect();
    assert!(without_place == expected, "said:\n{}\nexpected:\n{}", said.join("\n"), expected.join("\n"));
}

const PLAIN: &str = "spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}";

#[test]
fn nothing_is_said_of_what_is_right() {
    warned(PLAIN, "", &[]);
}

#[test]
fn external_addresses_that_are_somebody_elses() {
    let spec =
        |ip: &str| format!("spec: {{clusterIP: 10.96.0.1, externalIPs: [{ip}], ports: [{{name: http, port: 80}}]}}");
    let help = "[give it an address that nothing else has]";
    for (ip, what) in [
        ("10.1.1.5", "the address of pod shop/one, which is not reached at this port any more"),
        ("192.168.0.1", "the address of node node-a, whose own process at this port is not reached any more"),
        ("10.1.1.77", "inside the pods' range 10.1.1.0/24: a pod may get it"),
        ("10.96.0.1", "its own cluster IP too"),
        ("10.96.0.9", "inside serviceCIDRs 10.96.0.0/16: another service may get it"),
    ] {
        let message = format!("spec.externalIPs[0]: {ip} is {what} {help}");
        warned(&spec(ip), "", &[("Service shop/web", &message)]);
    }
    let other = "---\napiVersion: v1\nkind: Service\nmetadata: {namespace: shop, name: other}\n\
                 spec: {type: LoadBalancer, clusterIP: 10.96.0.2, ports: [{port: 80}]}\n\
                 status: {loadBalancer: {ingress: [{ip: 198.51.100.1}, {ip: 10.96.0.1}]}}\n---\n\
                 apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
                 metadata: {namespace: shop, name: other-1, labels: {kubernetes.io/service-name: other}}\n\
                 endpoints: []\nports: [{port: 8080}]\n";
    warned(
        &spec("198.51.100.1"),
        other,
        &[
            (
                "Service shop/other",
                "status.loadBalancer.ingress[0].ip: port 80 of 198.51.100.1 is service shop/web's too, which wins [give \
                 one of them another port or address]",
            ),
            (
                "Service shop/other",
                "status.loadBalancer.ingress[1].ip: 10.96.0.1 is the cluster IP of service shop/web, which wins [give it \
                 an address that nothing else has]",
            ),
        ],
    );
}

#[test]
fn settings_that_promise_more_than_they_keep() {
    warned(
        "spec: {type: LoadBalancer, clusterIP: 10.96.0.1, externalTrafficPolicy: Local, sessionAffinity: ClientIP, \
         loadBalancerSourceRanges: [203.0.113.0/24], externalIPs: [198.51.100.1], ports: [{name: http, port: 80, nodePort: 30080}]}",
        "",
        &[
            (
                "Service shop/web",
                "spec.sessionAffinity ClientIP with externalTrafficPolicy Local: each node keeps its own clients, so one \
                 that the load balancer sends to another node changes its backend [use externalTrafficPolicy: Cluster, or \
                 a load balancer that keeps clients to nodes]",
            ),
            (
                "Service shop/web",
                "spec.loadBalancerSourceRanges do not guard node port 30080, external IP 198.51.100.1 [they guard load \
                 balancer IPs only; set allocateLoadBalancerNodePorts: false, or guard nodes by policy]",
            ),
        ],
    );
}

#[test]
fn references_that_dangle() {
    let slice = |service: &str, node: &str, port: &str| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
             metadata: {{namespace: shop, name: more, labels: {{kubernetes.io/service-name: {service}}}}}\n\
             endpoints: [{{addresses: [10.1.1.6], nodeName: {node}}}]\nports: [{{name: {port}, port: 8080}}]\n"
        )
    };
    let subject = "EndpointSlice shop/more";
    warned(PLAIN, &slice("wed", "node-a", "http"), &[(subject, "there is no service shop/wed [did you mean web?]")]);
    warned(
        PLAIN,
        &slice("web", "node-b", "http"),
        &[(subject, "endpoints[0].nodeName: there is no Node node-b [did you mean node-a?]")],
    );
    warned(
        PLAIN,
        &slice("web", "node-a", "htp"),
        &[(subject, "ports[0]: Service shop/web has no port \"htp\" (TCP) [did you mean http?]")],
    );
    warned(
        "spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}, {name: dns, protocol: UDP, port: 53}]}",
        "",
        &[(
            "Service shop/web",
            "spec.ports[1]: no EndpointSlice of it has the port \"dns\" (UDP): connections are rejected [its slices have \
             \"http\" (TCP)]",
        )],
    );
    let service = |selector: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: shop, name: lone}}\n\
             spec: {{clusterIP: 10.96.0.2, ports: [{{port: 80}}]{selector}}}\n"
        )
    };
    warned(
        PLAIN,
        &service(""),
        &[(
            "Service shop/lone",
            "it has no selector and no EndpointSlice: every connection to it is rejected [write an EndpointSlice with its \
         label, or a selector]",
        )],
    );
    warned(
        PLAIN,
        &service(", selector: {app: x}"),
        &[(
            "Service shop/lone",
            "no EndpointSlice belongs to it: every connection to it is rejected [add the output of `kubectl get \
         endpointslices -o yaml` to the manifests]",
        )],
    );
    let pod = "---\napiVersion: v1\nkind: Pod\nmetadata: {namespace: shop, name: two}\nspec: {nodeName: node-x}\n\
               status: {podIP: 10.1.1.8}\n";
    warned(PLAIN, pod, &[("Pod shop/two", "spec.nodeName: there is no Node node-x [did you mean node-a?]")]);
    let policy = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {namespace: shp, name: p}\n\
                  spec: {podSelector: {}}\n";
    warned(
        PLAIN,
        policy,
        &[("NetworkPolicy shp/p", "there is no Namespace shp, so no pod in it is protected [did you mean shop?]")],
    );
}

#[test]
fn bits_behind_a_prefix() {
    let policy = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {namespace: shop, name: p}\n\
                  spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.7/24, except: [203.0.113.9/32]}}]}]}\n";
    warned(
        PLAIN,
        policy,
        &[(
            "NetworkPolicy shop/p",
            "cidr: 203.0.113.7/24 has bits behind its prefix, which do not count [write 203.0.113.0/24, or 203.0.113.7/32 for \
         the one address]",
        )],
    );
    let weir = WEIR.replace("10.96.0.0/16", "10.96.0.1/16");
    assert_eq!(
        lines_of(&read_texts(&weir, &format!("{CLUSTER}{PLAIN}"), true)),
        [
            "weir.yaml:3:16: warning: weir.yaml: serviceCIDRs: 10.96.0.1/16 has bits behind its prefix, which do not count \
             [write 10.96.0.0/16, or 10.96.0.1/32 for the one address]"
        ]
    );
}
