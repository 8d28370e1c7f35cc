//! Calico's and cluster network policy from YAML to verdicts, rule by rule (the numbers are those of the policy rules).

use serde_json::{Value, json};

use super::{Loaded, WEIR, assert_said, loaded};
use crate::trace::Tracer;

/// Two namespaces with pods on this node and an unknown sender, as every test here has them.
const CLUSTER: &str = "
apiVersion: v1
kind: Node
metadata: {name: node-a}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
---
{apiVersion: v1, kind: Namespace, metadata: {name: red, labels: {team: r}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: blue, labels: {team: b}}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: builder, namespace: red, labels: {role: build}}}
";

pub(super) fn pod(name: &str, address: &str, rest: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap();
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
         spec: {{nodeName: node-a, {rest} containers: [{{name: c, ports: [{{name: web, containerPort: 80}}, {{name: \
         dns, containerPort: 53, protocol: UDP}}]}}]}}\nstatus: {{podIP: '{address}'}}\n"
    )
}

pub(super) fn cluster() -> String {
    CLUSTER.to_owned()
        + &pod("red/a", "10.0.0.1", "serviceAccountName: builder,")
        + &pod("red/b", "10.0.0.2", "")
        + &pod("blue/a", "10.0.1.1", "")
        + &pod("blue/b", "10.0.1.2", "")
}

/// An object of Calico's: `kind name` or `kind namespace/name`.
pub(super) fn calico(what: &str, spec: &str) -> String {
    let (kind, name) = what.split_once(' ').unwrap();
    let metadata = match name.split_once('/') {
        Some((namespace, name)) => format!("{{name: {name}, namespace: {namespace}}}"),
        None => format!("{{name: {name}}}"),
    };
    format!("---\napiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {metadata}\nspec: {spec}\n")
}

/// What becomes of flows, "SOURCE > DESTINATION PROTOCOL[:PORT]", in the cluster with these policies.
fn trace(policies: &str, flows: &[&str]) -> Vec<Value> {
    let loaded = loaded(WEIR, &(cluster() + policies));
    let mut input = String::new();
    for flow in flows {
        let words: Vec<&str> = flow.split([' ', ':']).collect();
        let [src, ">", dst, proto, rest @ ..] = words.as_slice() else { panic!("{flow}") };
        let mut line = json!({"src": src, "dst": dst, "proto": proto});
        match (*proto, rest) {
            ("icmp", [kind, code]) => {
                line["icmpType"] = json!(kind.parse::<u8>().unwrap());
                line["icmpCode"] = json!(code.parse::<u8>().unwrap());
            }
            (_, [port]) => line["dport"] = json!(port.parse::<u16>().unwrap()),
            (_, []) => {}
            _ => panic!("{flow}"),
        }
        input += &format!("{line}\n");
    }
    run(&loaded, &input)
}

/// What becomes of flows in a trace's own form.
pub(super) fn trace_lines(policies: &str, flows: &[&str]) -> Vec<Value> {
    run(&loaded(WEIR, &(cluster() + policies)), &flows.join("\n"))
}

fn run(loaded: &Loaded, input: &str) -> Vec<Value> {
    let mut output = Vec::new();
    let all_valid = Tracer::new(loaded).unwrap().run(input.as_bytes(), &mut output, false).unwrap();
    assert!(all_valid, "{}", String::from_utf8_lossy(&output));
    String::from_utf8(output).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Checks which of the flows pass: those that begin with '+', and those that begin with '-' must be denied by policy.
#[track_caller]
pub(super) fn assert_flows(policies: &str, flows: &[&str]) {
    let bare: Vec<&str> = flows.iter().map(|flow| &flow[1..]).collect();
    for (flow, answer) in flows.iter().zip(trace(policies, &bare)) {
        let passes = ["forward", "local", "pass"].contains(&answer["verdict"].as_str().unwrap());
        let by_policy = answer["reason"].as_str().is_some_and(|reason| reason.starts_with("Policy"));
        assert!(passes || by_policy, "{flow}: {answer}");
        assert_eq!(passes, flow.starts_with('+'), "{flow}: {answer}\n{policies}");
    }
}

#[test]
fn rule_15_built_in_tiers_have_their_places_and_undefined_ones_come_last() {
    let deny = |name: &str, tier: &str| {
        calico(&format!("GlobalNetworkPolicy {name}"), &format!("{{tier: {tier}, ingress: [{{action: Deny}}]}}"))
    };
    let allow = |name: &str, tier: &str| {
        calico(&format!("GlobalNetworkPolicy {name}"), &format!("{{tier: {tier}, ingress: [{{action: Allow}}]}}"))
    };
    let flow = |passes: bool| [if passes { "+blue/a > red/a tcp:80" } else { "-blue/a > red/a tcp:80" }];
    assert_flows(&(allow("z", "kube-admin") + &deny("a", "default")), &flow(true));
    assert_flows(&(allow("z", "default") + &deny("a", "kube-baseline")), &flow(true));
    let tier = |name: &str, spec: &str| calico(&format!("Tier {name}"), spec);
    // Unset order comes last, and a tier that nobody defines after that, whatever its name.
    let last = tier("last", "{}") + &allow("y", "last");
    assert_flows(&(last.clone() + &deny("x", "kube-baseline")), &flow(false));
    assert_flows(&(last + &deny("x", "aaa")), &flow(true));
    // A tier's default action is Deny where it does not say; kube-admin's is Pass.
    let inert = |tier: &str| {
        calico("GlobalNetworkPolicy i", &format!("{{tier: {tier}, ingress: [{{action: Allow, protocol: UDP}}]}}"))
    };
    assert_flows(&(tier("t", "{order: 1}") + &inert("t")), &flow(false));
    assert_flows(&(tier("t", "{order: 1, defaultAction: Pass}") + &inert("t")), &flow(true));
    assert_flows(&inert("kube-admin"), &flow(true));
    assert_flows(&inert("unknown"), &flow(false));
}

#[test]
fn rule_16_kubernetes_policies_stand_at_order_1000_and_ties_are_broken_by_name() {
    let kubernetes = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: m, namespace: red}\n\
                      spec: {podSelector: {}, ingress: [{}]}\n";
    let deny = |name: &str, order: &str| {
        let spec = format!("{{{order} ingress: [{{action: Deny}}]}}");
        kubernetes.to_owned() + &calico(&format!("GlobalNetworkPolicy {name}"), &spec)
    };
    assert_flows(&deny("n", "order: 999.5,"), &["-blue/a > red/a tcp:80"]);
    assert_flows(&deny("n", "order: 1000.5,"), &["+blue/a > red/a tcp:80"]);
    assert_flows(&deny("n", "order: 1000,"), &["+blue/a > red/a tcp:80"]);
    assert_flows(&deny("b", "order: 1000,"), &["-blue/a > red/a tcp:80"]);
    assert_flows(&deny("b", ""), &["+blue/a > red/a tcp:80"]);
}

#[test]
fn rule_17_log_goes_on_and_pass_leaves_the_tier() {
    let pass = calico("GlobalNetworkPolicy p", "{order: 1, ingress: [{action: Log}, {action: Pass}]}");
    let deny = calico("GlobalNetworkPolicy q", "{order: 2, ingress: [{action: Deny}]}");
    assert_flows(&(pass + &deny), &["+blue/a > red/a tcp:80"]);
}

#[test]
fn rule_19_a_workload_endpoints_profiles_are_the_manifests_own_or_kubernetess() {
    let endpoint = |profiles: &str| {
        calico(
            "WorkloadEndpoint red/w",
            &format!("{{node: node-a, orchestrator: k8s, pod: b, interfaceName: calib, profiles: [{profiles}]}}"),
        )
    };
    let profile = calico(
        "Profile tcp-only",
        "{ingress: [{action: Pass, protocol: UDP}, {action: Allow}], egress: [{action: Allow, protocol: TCP}]}",
    );
    let flows = |marks: [char; 3]| {
        let [a, b, c] = marks;
        [format!("{a}blue/a > red/b tcp:80"), format!("{b}blue/a > red/b udp:53"), format!("{c}red/b > blue/a udp:53")]
    };
    for (profiles, marks) in [
        ("tcp-only", ['+', '-', '-']),
        ("kns.red", ['+', '+', '+']),
        ("", ['-', '-', '-']),
        ("unknown", ['-', '-', '-']),
        ("ksa.red.default, tcp-only", ['+', '-', '-']),
        ("projectcalico-default-allow", ['+', '+', '+']),
    ] {
        let flows = flows(marks);
        assert_flows(&(profile.clone() + &endpoint(profiles)), &flows.each_ref().map(String::as_str));
    }
}

#[test]
fn rule_20_staged_policies_enforce_nothing() {
    let staged = calico("StagedGlobalNetworkPolicy s", "{stagedAction: Set, ingress: [{action: Deny}]}")
        + &calico("StagedNetworkPolicy red/s", "{ingress: [{action: Deny}]}")
        + &calico("StagedKubernetesNetworkPolicy red/s", "{podSelector: {}, policyTypes: [Ingress]}");
    assert_flows(&staged, &["+blue/a > red/a tcp:80"]);
    let loaded = loaded(WEIR, &(cluster() + &staged));
    let policies = loaded.policy.tiers.iter().flat_map(|tier| &tier.policies);
    let mut names: Vec<&str> = policies.filter(|policy| policy.staged).map(|policy| policy.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        ["StagedGlobalNetworkPolicy/s", "StagedKubernetesNetworkPolicy/red/s", "StagedNetworkPolicy/red/s"]
    );
}

#[test]
fn rule_21_types_follow_from_the_rules_that_there_are() {
    let directions = |spec: &str| {
        let loaded = loaded(WEIR, &(cluster() + &calico("NetworkPolicy red/p", spec)));
        let policy = loaded.policy.tiers.iter().flat_map(|tier| &tier.policies).next().unwrap();
        (policy.ingress.as_ref().map(Vec::len), policy.egress.as_ref().map(Vec::len))
    };
    assert_eq!(directions("{}"), (Some(0), None));
    assert_eq!(directions("{types: []}"), (Some(0), None));
    assert_eq!(directions("{ingress: [{action: Allow}]}"), (Some(1), None));
    assert_eq!(directions("{egress: [{action: Allow}]}"), (None, Some(1)));
    assert_eq!(directions("{ingress: [{action: Allow}], egress: [{action: Allow}]}"), (Some(1), Some(1)));
    assert_eq!(directions("{types: [Egress], ingress: [{action: Allow}]}"), (None, Some(0)));
}

#[test]
fn rule_22_protocols_icmp_and_negations_are_all_asked_for() {
    let allow = |rule: &str| {
        calico("NetworkPolicy red/p", &format!("{{selector: app == 'a', ingress: [{{action: Allow, {rule}}}]}}"))
    };
    for (rule, flows) in [
        ("protocol: 47", &["+blue/a > red/a 47", "-blue/a > red/a tcp:80"][..]),
        ("protocol: icmp", &["+blue/a > red/a icmp", "-blue/a > red/a tcp:80"]),
        ("notProtocol: TCP", &["-blue/a > red/a tcp:80", "+blue/a > red/a udp:80", "+blue/a > red/a 47"]),
        (
            "protocol: ICMP, icmp: {type: 3}",
            &["+blue/a > red/a icmp:3:1", "+blue/a > red/a icmp:3:9", "-blue/a > red/a icmp:8:0"],
        ),
        ("protocol: ICMP, icmp: {type: 3, code: 1}", &["+blue/a > red/a icmp:3:1", "-blue/a > red/a icmp:3:9"]),
        (
            "protocol: ICMP, notICMP: {type: 3, code: 1}",
            &["-blue/a > red/a icmp:3:1", "+blue/a > red/a icmp:3:9", "+blue/a > red/a icmp:8:0"],
        ),
        ("source: {nets: [10.0.1.77/24]}", &["+blue/a > red/a tcp:80", "-red/b > red/a tcp:80"]),
        ("source: {nets: [10.0.1.1]}", &["+blue/a > red/a tcp:80", "-blue/b > red/a tcp:80"]),
        ("source: {nets: [10.0.0.0/8], notNets: [10.0.1.1/32]}", &["-blue/a > red/a tcp:80", "+blue/b > red/a tcp:80"]),
        ("protocol: ICMP, icmp: {type: 8, code: 0}", &["+blue/a > red/a icmp:8:0", "-blue/a > red/a icmp:8:1"]),
        ("protocol: ICMP, notICMP: {type: 8, code: 0}", &["-blue/a > red/a icmp:8:0", "+blue/a > red/a icmp:8:1"]),
        ("ipVersion: 6", &["-blue/a > red/a tcp:80"]),
        (
            "protocol: TCP, destination: {ports: [80, '90:91', '100']}",
            &["+blue/a > red/a tcp:80", "+blue/a > red/a tcp:91", "-blue/a > red/a tcp:92", "+blue/a > red/a tcp:100"],
        ),
        ("destination: {ports: [dns]}", &["+blue/a > red/a udp:53", "-blue/a > red/a tcp:53"]),
        (
            "protocol: TCP, destination: {notPorts: [web, 443]}",
            &["-blue/a > red/a tcp:80", "-blue/a > red/a tcp:443", "+blue/a > red/a tcp:81"],
        ),
    ] {
        assert_flows(&allow(rule), flows);
    }
}

#[test]
fn rule_25_what_a_rules_selectors_pick_and_how_namespaces_limit_them() {
    let sets = calico("GlobalNetworkSet g", "{nets: [203.0.113.0/24]}")
        .replace("{name: g}", "{name: g, labels: {app: a}}")
        + &calico("NetworkSet red/s", "{nets: [198.51.100.9]}").replace("{name: s,", "{name: s, labels: {app: a},");
    let in_policy = |kind: &str, source: &str| {
        let spec = format!("{{selector: app == 'b', ingress: [{{action: Allow, source: {{{source}}}}}]}}");
        sets.clone() + &calico(kind, &spec)
    };
    // Sender by sender: a pod of the namespace, one of another, each kind of set, somebody unknown.
    let flows = |marks: &str| {
        let senders = ["red/a", "blue/a", "203.0.113.7", "198.51.100.9", "192.0.2.77"];
        let mark = |(mark, sender): (char, &str)| format!("{mark}{sender} > red/b tcp:80");
        marks.chars().zip(senders).map(mark).collect::<Vec<_>>()
    };
    for (source, namespaced, global) in [
        ("selector: app == 'a'", "+--+-", "++++-"),
        ("selector: all()", "+--+-", "++++-"),
        ("selector: '!has(x)'", "+--+-", "++++-"),
        ("notSelector: app == 'a'", "-----", "----+"),
        ("notSelector: has(nobody)", "+--+-", "+++++"),
        ("selector: app == 'a', namespaceSelector: team == 'b'", "-+---", "-+---"),
        ("namespaceSelector: all()", "++-+-", "++-+-"),
        ("namespaceSelector: global()", "--+--", "--+--"),
        ("namespaceSelector: team != 'r'", "-++--", "-++--"),
        ("namespaceSelector: projectcalico.org/name == 'blue'", "-+---", "-+---"),
        ("serviceAccounts: {names: [builder]}", "+----", "+----"),
        ("serviceAccounts: {selector: role == 'build'}", "+----", "+----"),
        ("serviceAccounts: {names: [default]}, namespaceSelector: all()", "-+---", "-+---"),
        ("serviceAccounts: {names: [default], selector: role == 'build'}", "-----", "-----"),
        ("serviceAccounts: {}", "+++++", "+++++"),
        ("nets: [10.0.1.0/24]", "-+---", "-+---"),
    ] {
        for (kind, marks) in [("NetworkPolicy red/p", namespaced), ("GlobalNetworkPolicy p", global)] {
            let flows = flows(marks);
            assert_flows(&in_policy(kind, source), &flows.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
}

#[test]
fn rule_25_whom_a_policy_applies_to() {
    let deny = |spec: &str| calico("GlobalNetworkPolicy p", &format!("{{{spec} types: [Ingress]}}"));
    let flows = |marks: &str| {
        let mark = |(mark, pod): (char, &str)| format!("{mark}192.0.2.77 > {pod} tcp:80");
        marks.chars().zip(["red/a", "red/b", "blue/a"]).map(mark).collect::<Vec<_>>()
    };
    for (spec, marks) in [
        ("", "---"),
        ("selector: app == 'a',", "-+-"),
        ("namespaceSelector: team == 'r',", "--+"),
        ("namespaceSelector: team == 'r', selector: app == 'a',", "-++"),
        ("serviceAccountSelector: role == 'build',", "-++"),
        ("namespaceSelector: all(), serviceAccountSelector: all(),", "---"),
    ] {
        let flows = flows(marks);
        assert_flows(&deny(spec), &flows.iter().map(String::as_str).collect::<Vec<_>>());
    }
    let namespaced = calico("NetworkPolicy red/p", "{serviceAccountSelector: role == 'build', types: [Ingress]}");
    let flows = flows("-++");
    assert_flows(&namespaced, &flows.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn rule_26_services_are_their_slices_endpoints() {
    let slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1, namespace: blue, \
                 labels: {kubernetes.io/service-name: web}}\naddressType: IPv4\nendpoints: [{addresses: [10.0.1.1], \
                 conditions: {ready: false}}]\nports: [{port: 80}]\n";
    let egress = calico(
        "NetworkPolicy red/p",
        "{egress: [{action: Allow, destination: {services: {name: web, namespace: blue}}}]}",
    );
    assert_flows(
        &(slice.to_owned() + &egress),
        &["+red/a > blue/a tcp:80", "-red/a > blue/a tcp:81", "-red/a > blue/a udp:80", "-red/a > blue/b tcp:80"],
    );
    let ingress = calico(
        "NetworkPolicy blue/p",
        "{selector: app == 'b', ingress: [{action: Allow, source: {services: {name: web}}}]}",
    );
    assert_flows(&(slice.to_owned() + &ingress), &["+blue/a > blue/b tcp:9", "-red/a > blue/b tcp:80"]);
}

#[test]
fn rule_31_cluster_network_policies_stand_before_and_after_network_policies() {
    let cluster_policy = |name: &str, spec: &str| {
        format!(
            "---\napiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: {name}}}\nspec: {spec}\n"
        )
    };
    let isolate = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: m, namespace: red}\n\
                   spec: {podSelector: {matchLabels: {app: b}}}\n";
    let from_blue = "from: [{namespaces: {matchLabels: {team: b}}}]";
    let admin = |priority: u16, action: &str, rest: &str| {
        let rule = format!("{{action: {action}, {from_blue}{rest}}}");
        let spec = format!("{{tier: Admin, priority: {priority}, subject: {{namespaces: {{}}}}, ingress: [{rule}]}}");
        cluster_policy(&format!("p{priority}-{}", action.to_lowercase()), &spec)
    };
    let accept = isolate.to_owned() + &admin(5, "Accept", "");
    assert_flows(&accept, &["+blue/a > red/b tcp:80", "-red/a > red/b tcp:80"]);
    // Lower priorities come first.
    assert_flows(
        &(admin(7, "Accept", "") + &admin(5, "Deny", "")),
        &["-blue/a > red/a tcp:80", "+red/b > red/a tcp:80"],
    );
    assert_flows(&(isolate.to_owned() + &admin(4, "Pass", "") + &admin(5, "Accept", "")), &["-blue/a > red/b tcp:80"]);
    for (protocols, flows) in [
        (
            ", protocols: [{tcp: {destinationPort: {number: 80}}}]",
            ["-blue/a > red/a tcp:80", "+blue/a > red/a tcp:81", "+blue/a > red/a udp:80"],
        ),
        (
            ", protocols: [{tcp: {destinationPort: {range: {start: 79, end: 80}}}}]",
            ["-blue/a > red/a tcp:79", "+blue/a > red/a tcp:81", "+blue/a > red/a udp:80"],
        ),
        (", protocols: [{udp: {}}]", ["+blue/a > red/a tcp:80", "-blue/a > red/a udp:1", "+blue/a > red/a sctp:80"]),
        (
            ", protocols: [{destinationNamedPort: dns}]",
            ["+blue/a > red/a tcp:53", "-blue/a > red/a udp:53", "+blue/a > red/a udp:80"],
        ),
    ] {
        assert_flows(&admin(1, "Deny", protocols), &flows);
    }
    let baseline = cluster_policy(
        "b",
        "{tier: Baseline, priority: 1, subject: {pods: {namespaceSelector: {}, podSelector: {}}}, egress: [{action: Deny, to: [{networks: [10.0.0.0/24, 'fd00::/8']}, {pods: {namespaceSelector: {matchLabels: {team: b}}, podSelector: {matchLabels: {app: a}}}}]}]}",
    );
    assert_flows(
        &baseline,
        &["-blue/b > red/a tcp:80", "-red/a > blue/a tcp:80", "+red/a > blue/b tcp:80", "+blue/b > 192.0.2.77 tcp:80"],
    );
    let open = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: o, namespace: blue}\nspec: \
                {podSelector: {}, policyTypes: [Egress], egress: [{}]}\n";
    assert_flows(&(baseline + open), &["+blue/b > red/a tcp:80", "-red/a > blue/a tcp:80"]);
}

/// A ClusterNetworkPolicy for all pods of red, with these egress rules.
fn cluster_policy(version: &str, egress: &str) -> String {
    format!(
        "---\napiVersion: policy.networking.k8s.io/{version}\nkind: ClusterNetworkPolicy\nmetadata: {{name: p}}\nspec: {{tier: Admin, \
         priority: 1, subject: {{namespaces: {{matchLabels: {{team: r}}}}}}, egress: [{egress}]}}\n"
    )
}

/// Nodes beside node-a, which has no labels.
const MORE_NODES: &str = "---\napiVersion: v1\nkind: Node\nmetadata: {name: node-b, labels: {disk: ssd, os: linux}, annotations: \
                          {projectcalico.org/IPv4IPIPTunnelAddr: 10.2.0.1}}\nstatus: {addresses: [{type: InternalIP, address: \
                          192.0.2.2}, {type: ExternalIP, address: 203.0.113.2}, {type: Hostname, address: node-b}]}\n---\napiVersion: \
                          v1\nkind: Node\nmetadata: {name: node-c, labels: {os: linux}}\nstatus: {addresses: [{type: InternalIP, address: \
                          192.0.2.3}]}\n";

#[test]
fn rule_31_nodes_are_peers_by_their_labels() {
    let with = |egress: &str| MORE_NODES.to_owned() + &cluster_policy("v1beta1", egress);
    assert_flows(
        &with("{action: Deny, to: [{nodes: {matchLabels: {os: linux}}}]}"),
        &[
            "+red/a > 192.0.2.1 tcp:80",
            "-red/a > 192.0.2.2 tcp:80",
            "-red/a > 203.0.113.2 tcp:80",
            "-red/a > 192.0.2.3 udp:53",
            // Only what status.addresses has.
            "+red/a > 10.2.0.1 tcp:80",
            "+red/a > 192.0.2.77 tcp:80",
            "+red/a > blue/a tcp:80",
            "+blue/a > 192.0.2.2 tcp:80",
        ],
    );
    let expression = "{action: Deny, to: [{nodes: {matchExpressions: [{key: disk, operator: DoesNotExist}]}}], protocols: [{tcp: \
                      {destinationPort: {number: 80}}}]}";
    assert_flows(
        &with(expression),
        &[
            "-red/a > 192.0.2.1 tcp:80",
            "+red/a > 192.0.2.1 tcp:81",
            "+red/a > 192.0.2.2 tcp:80",
            "-red/a > 192.0.2.3 tcp:80",
        ],
    );
    // An empty selector is all nodes; one that no node meets is nobody, not everybody.
    let all = with("{action: Deny, to: [{nodes: {}}]}");
    assert_flows(&all, &["-red/a > 192.0.2.1 tcp:80", "-red/a > 192.0.2.3 tcp:80", "+red/a > 192.0.2.77 tcp:80"]);
    let none = "{action: Deny, to: [{nodes: {matchLabels: {os: plan9}}}]}";
    assert_flows(&with(none), &["+red/a > 192.0.2.2 tcp:80", "+red/a > blue/a tcp:80"]);
    // The conformance suite's own: some nodes' port, another's way to the next tier, no other.
    let suite = "{action: Accept, to: [{nodes: {matchLabels: {os: linux}}}], protocols: [{tcp: {destinationPort: {number: 80}}}]}, \
                 {action: Pass, to: [{nodes: {matchLabels: {os: linux}}}], protocols: [{udp: {destinationPort: {number: 53}}}]}, \
                 {action: Deny, to: [{namespaces: {matchLabels: {team: b}}}, {nodes: {matchLabels: {os: linux}}}, {networks: \
                 [0.0.0.0/0]}]}";
    assert_flows(
        &with(suite),
        &[
            "+red/a > 192.0.2.2 tcp:80",
            "+red/a > 192.0.2.3 udp:53",
            "-red/a > 192.0.2.2 tcp:81",
            "-red/a > 192.0.2.3 udp:54",
            "-red/a > blue/a tcp:80",
        ],
    );
}

#[test]
fn rule_31_both_versions_of_a_cluster_network_policy_are_one_object() {
    let deny = "{action: Deny, to: [{networks: [192.0.2.64/26]}]}";
    let accept = "{action: Accept, to: [{networks: [192.0.2.64/26]}]}";
    let flow = |passes: bool| [if passes { "+red/a > 192.0.2.77 tcp:80" } else { "-red/a > 192.0.2.77 tcp:80" }];
    for version in ["v1alpha2", "v1beta1"] {
        assert_flows(&cluster_policy(version, deny), &flow(false));
    }
    // The newer one counts, wherever it stands, also where the older is at fault.
    for old in [accept, "{action: Perhaps}"] {
        let [old, new] = [cluster_policy("v1alpha2", old), cluster_policy("v1beta1", deny)];
        for text in [old.clone() + &new, new.clone() + &old] {
            let loaded = loaded(WEIR, &(cluster() + &text));
            assert_eq!(loaded.counts["ClusterNetworkPolicy"], 1);
            assert_flows(&text, &flow(false));
        }
    }
    let twice = cluster_policy("v1alpha2", accept) + &cluster_policy("v1beta1", deny);
    assert_said(
        WEIR,
        twice.strip_prefix("---\n").unwrap(),
        &["cluster.yaml:3:18: note: ClusterNetworkPolicy p: its v1alpha2 is passed over, as its v1beta1 is here too"],
    );
    let again = cluster_policy("v1beta1", accept) + &cluster_policy("v1beta1", deny);
    assert_said(
        WEIR,
        again.strip_prefix("---\n").unwrap(),
        &[
            "cluster.yaml:8:18: error: ClusterNetworkPolicy p is defined twice [the other is at cluster.yaml:3:18; keep one]",
        ],
    );
    assert_said(
        WEIR,
        cluster_policy("v1", deny).strip_prefix("---\n").unwrap(),
        &[
            "cluster.yaml:1:13: error: ClusterNetworkPolicy of policy.networking.k8s.io/v1 is not read [write apiVersion: \
             policy.networking.k8s.io/v1beta1]",
        ],
    );
}

/// What is said of a policy of red in the cluster, without its place.
fn said_of(spec: &str) -> Vec<String> {
    let said = crate::translate::tests::said(WEIR, &(cluster() + &calico("NetworkPolicy red/p", spec)));
    said.iter().map(|line| line.splitn(4, ':').nth(3).unwrap().trim().to_owned()).collect()
}

#[test]
fn what_cannot_hold_together_is_at_fault() {
    for (rule, wanted) in [
        ("protocol: TCP, icmp: {type: 8}", "icmp stands beside the protocol tcp"),
        ("protocol: UDP, notICMP: {type: 8}", "notICMP stands beside the protocol udp"),
        ("protocol: ICMP, ipVersion: 6", "protocol is of IPv4, and ipVersion is not"),
        ("protocol: ICMPv6, ipVersion: 4", "protocol is of IPv6, and ipVersion is not"),
        ("notProtocol: ICMPv6, ipVersion: 4", "notProtocol is of IPv6, and ipVersion is not"),
        ("protocol: ICMP, source: {nets: ['fd00::/8']}", "source.nets[0]: fd00::/8 in a rule for IPv4"),
        ("ipVersion: 6, source: {nets: [10.0.0.0/8]}", "source.nets[0]: 10.0.0.0/8 in a rule for IPv6"),
        ("ipVersion: 4, source: {notNets: ['fd00::1']}", "source.notNets[0]: fd00::1/128 in a rule for IPv4"),
        ("source: {notNets: [10.0.0.0/8, 0.0.0.0/0]}", "source.notNets[1]: 0.0.0.0/0 leaves no address"),
        ("destination: {notNets: ['::/0']}", "destination.notNets[0]: ::/0 leaves no address"),
        ("source: {services: {name: web}, selector: a == 'b'}", "source.services stands beside selector"),
        ("source: {services: {name: web}, nets: [10.0.0.0/8]}", "source.services stands beside nets"),
        (
            "source: {services: {name: web}, namespaceSelector: all()}",
            "source.services stands beside namespaceSelector",
        ),
        (
            "source: {services: {name: web}, serviceAccounts: {names: [a]}}",
            "source.services stands beside serviceAccounts",
        ),
    ] {
        let said = said_of(&format!("{{ingress: [{{action: Allow, {rule}}}]}}"));
        let message = format!("error: NetworkPolicy red/p: spec.ingress[0].{wanted}");
        assert!(said.len() == 1 && said[0].starts_with(&message), "{rule}: {said:?}");
    }
    for rule in [
        "protocol: ICMP, ipVersion: 4, source: {nets: [10.0.0.0/8]}",
        "protocol: ICMPv6, icmp: {type: 128}, source: {nets: ['fd00::/8']}",
        "icmp: {type: 8}",
        "source: {nets: [10.0.0.0/8, 'fd00::/8'], notNets: [10.0.0.0/9]}",
        "source: {nets: [0.0.0.0/0]}",
        "source: {services: {name: web}}",
    ] {
        assert_eq!(said_of(&format!("{{ingress: [{{action: Allow, {rule}}}]}}")), Vec::<String>::new(), "{rule}");
    }
}

#[test]
fn rules_of_a_direction_that_a_policy_does_not_govern_are_warned_of() {
    let said = said_of("{types: [Ingress], egress: [{action: Allow}]}");
    let wanted = "warning: NetworkPolicy red/p: spec.egress has rules, and spec.types has no Egress: they mean nothing [add Egress to \
                  types, or take the rules out]";
    assert_eq!(said, [wanted]);
    assert_eq!(said_of("{types: [Egress], ingress: [{action: Allow}], egress: []}").len(), 1);
    for fine in
        ["{egress: [{action: Allow}]}", "{types: [Ingress, Egress], egress: [{action: Allow}]}", "{types: [Egress]}"]
    {
        assert_eq!(said_of(fine), Vec::<String>::new(), "{fine}");
    }
    let kubernetes = |spec: &str| {
        let object = format!(
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: red}}\nspec: {spec}\n"
        );
        crate::translate::tests::said(WEIR, &(cluster() + &object)).len()
    };
    assert_eq!(kubernetes("{podSelector: {}, policyTypes: [Ingress], egress: [{}]}"), 1);
    assert_eq!(kubernetes("{podSelector: {}, policyTypes: [Egress], ingress: [{}], egress: [{}]}"), 1);
    assert_eq!(kubernetes("{podSelector: {}, policyTypes: [Egress], ingress: [], egress: [{}]}"), 0);
    assert_eq!(kubernetes("{podSelector: {}, egress: [{}]}"), 0);
}

#[test]
fn a_policy_of_what_is_in_no_namespace_selects_no_pod() {
    let spec = "{namespaceSelector: global(), ingress: [{action: Deny}]}";
    let policy = calico("GlobalNetworkPolicy p", spec);
    assert_flows(&policy, &["+blue/a > red/a tcp:80"]);
    assert_flows(&policy.replace("global()", "all()"), &["-blue/a > red/a tcp:80"]);
    let said = crate::translate::tests::said(WEIR, &(cluster() + &policy));
    assert!(said.len() == 1 && said[0].contains("spec.namespaceSelector: global() selects no pod here"), "{said:?}");
}

#[test]
fn rule_15_no_manifest_changes_a_built_in_tier() {
    let baseline = calico("Tier kube-baseline", "{order: 10000000, defaultAction: Pass}");
    let written_out = calico("Tier default", "{order: 1000000, defaultAction: Deny}") + &baseline;
    let left_out = calico("Tier default", "{}") + &calico("Tier kube-admin", "{}");
    let isolates = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: red}\nspec: {podSelector: \
                    {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: b}}}]}]}\n";
    let deny = calico("GlobalNetworkPolicy p", "{tier: kube-baseline, ingress: [{action: Deny}]}");
    for tiers in [String::new(), written_out, left_out] {
        assert_flows(
            &(tiers + isolates + &deny),
            &["+blue/a > red/a tcp:80", "-red/b > red/a tcp:80", "-red/a > blue/a tcp:80"],
        );
    }
    for (name, spec, wanted) in [
        ("default", "{defaultAction: Pass}", "spec.defaultAction of the tier default is Deny"),
        ("default", "{order: 5}", "spec.order of the tier default is 1000000"),
        ("kube-admin", "{defaultAction: Deny}", "spec.defaultAction of the tier kube-admin is Pass"),
        ("kube-baseline", "{order: 1}", "spec.order of the tier kube-baseline is 10000000"),
    ] {
        let said = crate::translate::tests::said(WEIR, &(cluster() + &calico(&format!("Tier {name}"), spec)));
        assert!(said.len() == 1 && said[0].contains(wanted) && said[0].contains(": error: "), "{said:?}");
    }
}

#[test]
fn faults_of_cluster_network_policies() {
    let said = |egress: &str, expected: &[&str]| {
        assert_said(WEIR, cluster_policy("v1beta1", egress).strip_prefix("---\n").unwrap(), expected);
    };
    said(
        "{action: Accept, to: [{domainNames: [example.org]}]}",
        &[
            "cluster.yaml:4:115: error: ClusterNetworkPolicy p: spec.egress[0].to[0].domainNames is not enforced [weir does not follow \
             DNS: write addresses as networks]",
        ],
    );
    said(
        "{action: Deny, to: [{nodes: {}, networks: [10.0.0.0/8]}]}",
        &[
            "cluster.yaml:4:112: error: ClusterNetworkPolicy p: spec.egress[0].to[0] is not one of: namespaces, pods, nodes, networks \
             [give one; make two of it to say either]",
        ],
    );
    said(
        "{action: Deny, to: [{nodes: {}}], protocols: [{destinationNamedPort: web}]}",
        &[
            "cluster.yaml:4:161: error: ClusterNetworkPolicy p: spec.egress[0].protocols[0].destinationNamedPort stands beside networks \
             or nodes [only pods' ports have names: write a number, or make two rules of it]",
        ],
    );
    said(
        "{action: Deny, to: []}",
        &[
            "cluster.yaml:4:107: error: ClusterNetworkPolicy p: spec.egress[0].to names no peer [name at least one peer; namespaces: {} \
             is all pods]",
        ],
    );
}

#[test]
fn two_policies_of_one_name_are_told_apart_by_their_groups() {
    let kubernetes = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: red}\n\
                      spec: {podSelector: {}, ingress: [{}]}\n";
    assert_flows(
        &(kubernetes.to_owned() + &calico("NetworkPolicy red/p", "{order: 1, ingress: [{action: Deny}]}")),
        &["-blue/a > red/a tcp:80"],
    );
}

#[test]
fn stored_objects_have_their_labels_in_an_annotation() {
    let set = "---\napiVersion: crd.projectcalico.org/v1\nkind: GlobalNetworkSet\nmetadata:\n  name: g\n  annotations:\n    \
               projectcalico.org/metadata: '{\"labels\":{\"app\":\"office\"}}'\nspec: {nets: [203.0.113.0/24]}\n";
    let policy = calico("GlobalNetworkPolicy p", "{ingress: [{action: Allow, source: {selector: app == 'office'}}]}");
    assert_flows(&(set.to_owned() + &policy), &["+203.0.113.7 > red/a tcp:80", "-192.0.2.77 > red/a tcp:80"]);
}

#[test]
fn faults_of_calico_policies() {
    let cases: &[(&str, &[&str])] = &[
        (
            "{ingress: [{action: Allow, http: {methods: [GET]}}]}",
            &[
                "cluster.yaml:4:34: error: GlobalNetworkPolicy p: spec.ingress[0].http: HTTP requests are seen by a proxy \
               only, and weir is none [match on protocol and ports, or keep a proxy in front of the workload]",
            ],
        ),
        (
            "{selector: a=='b', ingres: [], egress: [{action: allow, protocol: 6}]}",
            &[
                "cluster.yaml:4:26: error: GlobalNetworkPolicy p: unknown field spec.ingres [did you mean ingress?]",
                "cluster.yaml:4:56: error: GlobalNetworkPolicy p: spec.egress[0].action: \"allow\" is none of: Allow, \
                 Deny, Log, Pass [did you mean Allow?]",
            ],
        ),
        (
            "{selector: a = 'b', namespaceSelector: 'c ==', tier: nowhere}",
            &[
                "cluster.yaml:4:18: error: GlobalNetworkPolicy p: spec.selector: expected ==, !=, in, not in, contains, \
                 starts with or ends with after the label a (at character 3)",
                "cluster.yaml:4:46: error: GlobalNetworkPolicy p: spec.namespaceSelector: expected a string in ' or \" (at \
                 character 5)",
                "cluster.yaml:4:60: warning: GlobalNetworkPolicy p: no Tier nowhere is defined: it comes after all others \
                 [define it, or correct its name]",
            ],
        ),
        (
            "{ingress: [{action: Allow, destination: {ports: [80, '9:8', 'a b', 0]}}]}",
            &[
                "cluster.yaml:4:48: error: GlobalNetworkPolicy p: spec.ingress[0].destination.ports: only TCP, UDP and SCTP \
                 have ports [write protocol: TCP, UDP or SCTP]",
                "cluster.yaml:4:60: error: GlobalNetworkPolicy p: spec.ingress[0].destination.ports[1]: \"9:8\" ends before \
                 it begins [write a number, a range like \"8000:8080\", or a port's name]",
                "cluster.yaml:4:67: error: GlobalNetworkPolicy p: spec.ingress[0].destination.ports[2]: \"a b\" cannot be a \
                 port's name [write a number, a range like \"8000:8080\", or a port's name]",
                "cluster.yaml:4:74: error: GlobalNetworkPolicy p: spec.ingress[0].destination.ports[3]: \"0\" is not a port \
                 from 1 to 65535 [write a number, a range like \"8000:8080\", or a port's name]",
            ],
        ),
        (
            "{ingress: [{action: Deny, protocol: TPC, ipVersion: 5, icmp: {code: 1}, destination: {services: {name: w}}}]}",
            &[
                "cluster.yaml:4:43: error: GlobalNetworkPolicy p: spec.ingress[0].protocol is not known [write TCP, UDP, \
                 SCTP, ICMP, ICMPv6, UDPLite, or a number up to 255]",
                "cluster.yaml:4:59: error: GlobalNetworkPolicy p: spec.ingress[0].ipVersion: 5 is no IP version [write 4 or \
                 6]",
                "cluster.yaml:4:75: error: GlobalNetworkPolicy p: spec.ingress[0].icmp.code stands without type [a code \
                 means something with its type only: write type]",
                "cluster.yaml:4:93: error: GlobalNetworkPolicy p: spec.ingress[0].destination.services cannot stand on this \
                 side [a service is the source of an ingress rule or the destination of an egress rule]",
            ],
        ),
        (
            "{doNotTrack: true, preDNAT: true, egress: [{action: Allow}]}",
            &[
                "cluster.yaml:4:8: error: GlobalNetworkPolicy p: spec.doNotTrack needs spec.applyOnForward [such a policy \
                 meets forwarded packets too: write applyOnForward: true]",
                "cluster.yaml:4:26: error: GlobalNetworkPolicy p: spec.preDNAT stands beside spec.doNotTrack [make two \
                 policies of it]",
                "cluster.yaml:4:26: error: GlobalNetworkPolicy p: spec.preDNAT needs spec.applyOnForward [such a policy \
                 meets forwarded packets too: write applyOnForward: true]",
                "cluster.yaml:4:26: error: GlobalNetworkPolicy p: spec.preDNAT of a policy that governs egress [services are \
                 translated where packets arrive: leave egress rules and the type Egress out]",
            ],
        ),
    ];
    for (spec, expected) in cases {
        let policy = calico("GlobalNetworkPolicy p", spec);
        assert_said(WEIR, policy.strip_prefix("---\n").unwrap(), expected);
    }
}
