//! Host endpoints from YAML to verdicts, rule by rule (the numbers are those of the policy rules).

use super::{
    WEIR, assert_said, loaded,
    policy::{assert_flows, calico, cluster, trace_lines},
};
use crate::text::Severity;

/// The node's own address, as the cluster of these tests has it.
const NODE: &str = "192.0.2.1";
/// Somebody outside.
const OTHER: &str = "198.51.100.7";

fn host_endpoint(interface: &str, profiles: &str) -> String {
    calico(
        "HostEndpoint h",
        &format!("{{node: node-a, interfaceName: '{interface}', expectedIPs: [{NODE}], profiles: [{profiles}]}}"),
    )
    .replace("{name: h}", "{name: h, labels: {host: 'yes'}}")
}

/// A policy for the host endpoint.
fn policy(name: &str, spec: &str) -> String {
    calico(&format!("GlobalNetworkPolicy {name}"), &format!("{{selector: has(host), {spec}}}"))
}

fn felix(spec: &str) -> String {
    calico("FelixConfiguration default", spec)
}

/// A service with an external address whose backend is red/a on another port.
const SERVICE: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: red}\nspec: {clusterIP: \
                       10.96.0.1, externalIPs: [203.0.113.80], ports: [{port: 8080, targetPort: 80}]}\n---\n\
                       apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1, namespace: red, labels: \
                       {kubernetes.io/service-name: web}}\naddressType: IPv4\nendpoints: [{addresses: [10.0.0.1], nodeName: \
                       node-a}]\nports: [{port: 80}]\n";

/// Flows with NODE and OTHER written out.
#[track_caller]
fn assert_host(objects: &str, flows: &[&str]) {
    let flows: Vec<String> = flows.iter().map(|flow| flow.replace("NODE", NODE).replace("OTHER", OTHER)).collect();
    assert_flows(objects, &flows.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn rule_11_before_dnat_policy_sees_the_frontend_and_others_the_backend() {
    let deny = |port: u16| {
        let rule = format!("{{action: Deny, protocol: TCP, destination: {{ports: [{port}]}}}}");
        host_endpoint("eth0", "")
            + SERVICE
            + &policy("p", &format!("preDNAT: true, applyOnForward: true, ingress: [{rule}]"))
    };
    assert_host(&deny(8080), &["-OTHER > 203.0.113.80 tcp:8080", "+OTHER > red/a tcp:80"]);
    assert_host(&deny(80), &["+OTHER > 203.0.113.80 tcp:8080", "-OTHER > red/a tcp:80"]);
    let forward = |port: u16| {
        let rules = format!("{{action: Deny, protocol: TCP, destination: {{ports: [{port}]}}}}, {{action: Allow}}");
        host_endpoint("eth0", "") + SERVICE + &policy("p", &format!("applyOnForward: true, ingress: [{rules}]"))
    };
    assert_host(&forward(80), &["-OTHER > 203.0.113.80 tcp:8080"]);
    assert_host(&forward(8080), &["+OTHER > 203.0.113.80 tcp:8080"]);
}

#[test]
fn rule_12_the_node_reaches_its_own_pods_whatever_policy_says() {
    let deny = "ingress: [{action: Deny}], egress: [{action: Deny}]";
    let everything = host_endpoint("*", "")
        + &policy("p", &format!("applyOnForward: true, {deny}"))
        + &calico("GlobalNetworkPolicy q", &format!("{{selector: has(app), {deny}}}"));
    assert_host(&everything, &["+NODE > red/a tcp:80", "-NODE > OTHER tcp:80", "-red/b > red/a tcp:80"]);
}

#[test]
fn rule_13_what_pods_send_to_their_node_is_the_nodes_setting_and_before_dnat_policys() {
    let deny = host_endpoint("*", "") + &policy("p", "ingress: [{action: Deny}], egress: [{action: Deny}]");
    assert_host("", &["+red/a > NODE tcp:80"]);
    assert_host(&deny, &["+red/a > NODE tcp:80", "-OTHER > NODE tcp:80"]);
    assert_host(&felix("{}"), &["-red/a > NODE tcp:80"]);
    assert_host(&felix("{defaultEndpointToHostAction: Return}"), &["+red/a > NODE tcp:80"]);
    assert_host(&(deny.clone() + &felix("{defaultEndpointToHostAction: ACCEPT}")), &["+red/a > NODE tcp:80"]);
    let allow = host_endpoint("*", "projectcalico-default-allow") + &felix("{defaultEndpointToHostAction: Drop}");
    assert_host(&allow, &["-red/a > NODE tcp:80", "+red/a > blue/a tcp:80", "+OTHER > NODE tcp:80"]);
    let before_dnat = deny + &policy("q", "preDNAT: true, applyOnForward: true, ingress: [{action: Deny}]");
    assert_host(&before_dnat, &["-red/a > NODE tcp:80"]);
    // The pod's own policy comes first, and a node's own configuration goes over the default one, field by field.
    let own = felix("{defaultEndpointToHostAction: Drop}")
        + &calico("FelixConfiguration node.node-a", "{defaultEndpointToHostAction: Accept}")
        + &calico("FelixConfiguration node.node-b", "{defaultEndpointToHostAction: Drop}");
    assert_host(&own, &["+red/a > NODE tcp:80"]);
    let isolated = calico("GlobalNetworkPolicy e", "{selector: app == 'a', types: [Egress]}");
    assert_host(&isolated, &["-red/a > NODE tcp:80", "+red/b > NODE tcp:80"]);
}

#[test]
fn rule_14_what_links_live_by_passes_and_tunnels_of_pods_do_not() {
    let deny = calico("GlobalNetworkPolicy d", "{types: [Ingress, Egress]}");
    let pods = super::policy::pod("red/six", "fd00::6", "") + &super::policy::pod("red/seven", "fd00::7", "");
    let answers = super::policy::trace_lines(
        &(deny + &pods),
        &[
            r#"{"src":"red/six","dst":"red/seven","proto":"icmpv6","icmpType":135}"#,
            r#"{"src":"red/six","dst":"red/seven","proto":"icmpv6","icmpType":128}"#,
            r#"{"src":"red/six","dst":"red/seven","proto":"icmpv6","icmpType":134}"#,
            r#"{"src":"red/a","dst":"blue/a","proto":4}"#,
            r#"{"src":"red/a","dst":"blue/a","proto":"udp","dport":4789}"#,
        ],
    );
    let reasons: Vec<_> = answers.iter().map(|answer| answer["reason"].as_str()).collect();
    let (denied, tunnel) = (Some("PolicyDeniedEgress"), Some("WorkloadTunnel"));
    assert_eq!(reasons, [None, denied, denied, tunnel, tunnel]);
}

#[test]
fn rule_27_untracked_and_before_dnat_policy_have_the_last_word_where_they_match_and_go_on_where_not() {
    let untracked = |ingress: &str, egress: &str| {
        let normal = policy("normal", "order: 9, ingress: [{action: Deny}]");
        let spec =
            format!("order: 1, doNotTrack: true, applyOnForward: true, ingress: [{ingress}], egress: [{egress}]");
        host_endpoint("eth0", "") + &normal + &policy("u", &spec)
    };
    let tcp = "{action: Allow, protocol: TCP}";
    assert_host(&untracked(tcp, tcp), &["+OTHER > NODE tcp:80", "-OTHER > NODE udp:80"]);
    // Untracked traffic needs both directions.
    assert_host(&untracked(tcp, "{action: Deny}"), &["-OTHER > NODE tcp:80"]);
    assert_host(&untracked(tcp, ""), &["-OTHER > NODE tcp:80"]);
    assert_host(
        &untracked("{action: Deny, protocol: TCP}", ""),
        &["-OTHER > NODE tcp:80", "-OTHER > red/a tcp:80", "+OTHER > red/a udp:53"],
    );
    // It does not excuse pods' policy.
    let isolated = calico("GlobalNetworkPolicy i", "{selector: has(app), types: [Ingress]}");
    assert_host(&(untracked(tcp, tcp) + &isolated), &["-OTHER > red/a tcp:80"]);

    let before_dnat = |ingress: &str| {
        let normal = policy("normal", "order: 9, applyOnForward: true, ingress: [{action: Deny}]");
        host_endpoint("eth0", "")
            + &normal
            + &policy("b", &format!("order: 1, preDNAT: true, applyOnForward: true, ingress: [{ingress}]"))
    };
    assert_host(
        &before_dnat(tcp),
        &["+OTHER > NODE tcp:80", "+OTHER > red/a tcp:80", "-OTHER > NODE udp:80", "-OTHER > red/a udp:53"],
    );
    assert_host(&(before_dnat(tcp) + &isolated), &["-OTHER > red/a tcp:80"]);
    // A Pass leaves the tier, and after the last one the next stage goes on.
    assert_host(&before_dnat("{action: Pass}"), &["-OTHER > NODE tcp:80"]);
}

#[test]
fn rule_28_without_policy_and_profile_the_node_is_closed_and_what_it_forwards_is_not() {
    let bare = host_endpoint("eth0", "");
    assert_host(
        &bare,
        &["-OTHER > NODE tcp:80", "-NODE > OTHER tcp:80", "+OTHER > red/a tcp:80", "+red/a > OTHER tcp:80"],
    );
    assert_host(
        &host_endpoint("eth0", "projectcalico-default-allow"),
        &["+OTHER > NODE tcp:80", "+NODE > OTHER tcp:80"],
    );
    // Normal policy never touches what is forwarded.
    let normal = bare.clone() + &policy("p", "ingress: [{action: Deny}], egress: [{action: Deny}]");
    assert_host(&normal, &["+OTHER > red/a tcp:80", "+red/a > OTHER tcp:80"]);
    // Policy for what is forwarded is for the node's own too, and its tier ends.
    let web = "{action: Allow, protocol: TCP, destination: {ports: [80]}}";
    let forward = bare.clone() + &policy("p", &format!("applyOnForward: true, ingress: [{web}]"));
    assert_host(
        &forward,
        &[
            "+OTHER > NODE tcp:80",
            "-OTHER > NODE tcp:81",
            "+OTHER > red/a tcp:80",
            "-OTHER > red/a tcp:81",
            "+red/a > OTHER tcp:81",
        ],
    );
    let passed = bare + &policy("p", "applyOnForward: true, ingress: [{action: Pass}]");
    assert_host(&passed, &["+OTHER > red/a tcp:81", "-OTHER > NODE tcp:81"]);
}

#[test]
fn rule_29_failsafe_ports_stay_open_unless_they_are_taken_away() {
    let closed = host_endpoint("eth0", "")
        + &policy("p", "applyOnForward: true, ingress: [{action: Deny}], egress: [{action: Deny}]");
    assert_host(
        &closed,
        &[
            "+OTHER > NODE tcp:22",
            "-OTHER > NODE udp:22",
            "+OTHER > NODE udp:68",
            "-NODE > OTHER tcp:22",
            "+NODE > OTHER udp:53",
            "+NODE > OTHER tcp:6443",
        ],
    );
    // They are the node's: what it forwards has none.
    assert_host(&closed, &["-OTHER > red/a tcp:22"]);
    let none = felix("{failsafeInboundHostPorts: [], failsafeOutboundHostPorts: []}");
    assert_host(&(closed.clone() + &none), &["-OTHER > NODE tcp:22", "-NODE > OTHER udp:53"]);
    let some = felix("{failsafeInboundHostPorts: [{protocol: udp, port: 7, net: 198.51.100.0/24}, {port: 8}]}");
    assert_host(
        &(closed + &some),
        &[
            "+OTHER > NODE udp:7",
            "-192.0.2.99 > NODE udp:7",
            "+OTHER > NODE tcp:8",
            "-OTHER > NODE tcp:22",
            "+NODE > OTHER udp:53",
        ],
    );
}

#[test]
fn rule_30_an_endpoint_for_every_device_meets_pods_traffic_and_special_policies_never_select_pods() {
    let forward = |interface: &str, rules: &str| {
        host_endpoint(interface, "") + &policy("p", &format!("applyOnForward: true, {rules}"))
    };
    assert_host(
        &forward("*", "ingress: [{action: Deny}]"),
        &["-red/a > red/b tcp:80", "-red/a > OTHER tcp:80", "-OTHER > red/a tcp:80"],
    );
    assert_host(&forward("*", "egress: [{action: Deny}]"), &["-red/a > red/b tcp:80", "-OTHER > red/a tcp:80"]);
    assert_host(
        &forward("eth0", "ingress: [{action: Deny}]"),
        &["+red/a > red/b tcp:80", "+red/a > OTHER tcp:80", "-OTHER > red/a tcp:80"],
    );
    let before_dnat = "preDNAT: true, applyOnForward: true, ingress: [{action: Deny}]";
    assert_host(&(host_endpoint("*", "") + &policy("p", before_dnat)), &["-red/a > red/b tcp:80"]);
    let untracked = "doNotTrack: true, applyOnForward: true, ingress: [{action: Deny}]";
    for special in [before_dnat, untracked] {
        assert_host(
            &calico("GlobalNetworkPolicy p", &format!("{{selector: all(), {special}}}")),
            &["+red/a > red/b tcp:80"],
        );
    }
}

#[test]
fn a_felix_configuration_that_does_not_say_drops_and_says_so() {
    let of = |name: &str, spec: &str| calico(&format!("FelixConfiguration {name}"), spec);
    let rest = "bpfEnabled: false, healthPort: 9099, logSeverityScreen: Info, floatingIPs: Disabled";
    let silent = of("default", &format!("{{{rest}}}"));
    assert_said(
        WEIR,
        silent.strip_prefix("---\n").unwrap(),
        &[
            "cluster.yaml:4:1: warning: FelixConfiguration default: spec.defaultEndpointToHostAction is not given, which means Drop: \
             pods do not reach their own node [write defaultEndpointToHostAction: Accept, which Calico's manifests and operator give to \
             calico-node by the environment variable FELIX_DEFAULTENDPOINTTOHOSTACTION, or Drop if that is meant]",
        ],
    );
    // The node's own may say what the default does not, and the other way round.
    let says = "{defaultEndpointToHostAction: Accept}";
    for (objects, flow) in [
        (silent.clone(), "-red/a > NODE tcp:80"),
        (silent.clone() + &of("node.node-a", says), "+red/a > NODE tcp:80"),
        (of("default", says) + &of("node.node-a", "{}"), "+red/a > NODE tcp:80"),
        (silent.clone() + &of("node.node-b", says), "-red/a > NODE tcp:80"),
    ] {
        assert_host(&objects, &[flow]);
        let loaded = loaded(WEIR, &(cluster() + &objects));
        assert_eq!(loaded.notes.of(Severity::Warning).count(), usize::from(flow.starts_with('-')), "{}", loaded.notes);
    }
    // A slip of a setting that counts is told; the many others are Felix's own.
    assert_said(
        WEIR,
        of("default", "{defaultEndpointToHostActon: Accept, defaultEndpointToHostAction: Accept}")
            .strip_prefix("---\n")
            .unwrap(),
        &[
            "cluster.yaml:4:8: warning: FelixConfiguration default: unknown field spec.defaultEndpointToHostActon [did you mean \
             defaultEndpointToHostAction?]",
        ],
    );
    let loaded = loaded(WEIR, &(cluster() + &silent));
    let by = loaded.endpoint_to_host_by.and_then(|object| loaded.objects.get(object)).unwrap();
    assert_eq!(by.to_string(), "FelixConfiguration/default");
}

#[test]
fn rule_29_answers_of_failsafe_ports_pass_untracked_policy() {
    let deny = "doNotTrack: true, applyOnForward: true, types: [Ingress, Egress], ingress: [{action: Allow, protocol: UDP, destination: \
                {ports: [9000]}}, {action: Deny}], egress: [{action: Allow, protocol: UDP, source: {ports: [9000]}}, {action: Deny}]";
    let objects = host_endpoint("eth0", "") + SERVICE + &policy("p", deny);
    let verdict = |sport: u16, proto: &str, dport: u16, dst: &str| {
        let flow = format!(
            "{{\"src\": \"{OTHER}\", \"dst\": \"{dst}\", \"proto\": \"{proto}\", \"sport\": {sport}, \"dport\": {dport}}}"
        );
        trace_lines(&objects, &[&flow])[0]["verdict"].as_str().unwrap().to_owned()
    };
    assert_eq!(verdict(2379, "tcp", 40_000, NODE), "local", "etcd answers");
    assert_eq!(verdict(53, "udp", 40_000, NODE), "local", "DNS answers");
    assert_eq!(verdict(40_000, "tcp", 22, NODE), "local", "SSH");
    assert_eq!(verdict(53, "tcp", 40_000, NODE), "drop", "53 is for UDP");
    assert_eq!(verdict(40_000, "tcp", 80, NODE), "drop");
    assert_eq!(verdict(40_000, "udp", 9000, NODE), "local");
    assert_eq!(verdict(2379, "tcp", 80, "10.0.0.1"), "drop", "what is forwarded is no answer to the node");
    // A service's port is none that the node asks from.
    let before_dnat = "preDNAT: true, applyOnForward: true, ingress: [{action: Deny}]";
    let objects = host_endpoint("eth0", "projectcalico-default-allow") + SERVICE + &policy("p", before_dnat);
    let to = |dst: &str, dport: u16| {
        let flow = format!(
            "{{\"src\": \"{OTHER}\", \"dst\": \"{dst}\", \"proto\": \"tcp\", \"sport\": 2379, \"dport\": {dport}}}"
        );
        trace_lines(&objects, &[&flow])[0]["verdict"].as_str().unwrap().to_owned()
    };
    assert_eq!((to(NODE, 40_000).as_str(), to("203.0.113.80", 8080).as_str()), ("local", "drop"));
}

#[test]
fn an_interface_name_is_one_devices_or_all() {
    for name in ["eth*", "eth0/1", "a-name-that-is-too-long"] {
        let said = crate::translate::tests::said(WEIR, &(cluster() + &host_endpoint(name, "")));
        let wanted = format!("spec.interfaceName: {name:?} is no device's name");
        assert!(said.iter().any(|line| line.contains("error") && line.contains(&wanted)), "{said:?}");
    }
}

#[test]
fn faults_of_host_objects() {
    assert_said(
        WEIR,
        "apiVersion: projectcalico.org/v3\nkind: HostEndpoint\nmetadata: {name: h}\nspec: {node: node-b}\n---\n\
         apiVersion: projectcalico.org/v3\nkind: FelixConfiguration\nmetadata: {name: default}\nspec:\n  bpfEnabled: true\n  \
         defaultEndpointToHostAction: Dropp\n  failsafeInboundHostPorts: [{protocol: icmp, port: 1}]\n",
        &[
            "cluster.yaml:4:1: error: HostEndpoint h: neither spec.interfaceName nor spec.expectedIPs tells which device it \
             is [write interfaceName, \"*\" for all devices, or expectedIPs]",
            "cluster.yaml:11:32: error: FelixConfiguration default: spec.defaultEndpointToHostAction: \"Dropp\" is none of: \
             Drop, Accept, Return [did you mean Drop?]",
            "cluster.yaml:12:41: error: FelixConfiguration default: spec.failsafeInboundHostPorts[0].protocol: \"icmp\" has \
             no ports [write TCP, UDP or SCTP]",
        ],
    );
    let notes = &loaded(WEIR, host_endpoint("eth0", "").strip_prefix("---\n").unwrap()).notes;
    assert!(notes.diagnostics().iter().any(|note| note.message.contains("traced and not enforced")));
}
