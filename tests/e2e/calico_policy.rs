//! Calico's policy and ClusterNetworkPolicy on real connections: every kind once, on one node and across nodes, both families; what
//! policy says of node ports, and what is logged.

use std::{io::ErrorKind, net::TcpStream, thread, time::Duration};

use weir_lab::wait_until;

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{CLIENT, DEADLINE, NO_ANSWER_SECONDS, Site, connection, one_node, passes, two_nodes},
};

/// The servers' addresses: on the clients' node and on the other one.
const SERVERS: [&str; 4] = ["10.1.1.20", "10.1.2.20", "[fd00:1:1::20]", "[fd00:1:2::20]"];
const PORT: u16 = 8080;

/// What connections are made: from where, to which address and port, and whether the rules let them through.
type Flow = (&'static str, String, bool);

/// Tries connections all at once, so that those that get no answer cost their waiting only once.
fn expect(site: &Site, what: &str, flows: &[Flow]) {
    // A socket belongs to the namespace that it was made in, so threads may wait for it anywhere.
    let outcomes: Vec<_> = thread::scope(|scope| {
        let tries: Vec<_> = flows
            .iter()
            .map(|(from, to, allowed)| {
                let limit = if *allowed { DEADLINE } else { Duration::from_secs_f32(NO_ANSWER_SECONDS) };
                scope.spawn(move || site.connect(from, to, limit).map(drop).map_err(|error| error.kind()))
            })
            .collect();
        tries.into_iter().map(|one| one.join().unwrap()).collect()
    });
    for ((from, to, allowed), outcome) in flows.iter().zip(outcomes) {
        let expected = if *allowed { Ok(()) } else { Err(ErrorKind::TimedOut) };
        assert_eq!(outcome, expected, "{what}: {from} to {to}");
    }
}

/// Two clients and a server on node-a, another server on node-b. Each has a service account that is named as its app.
fn add_pods(manifests: &mut Manifests) {
    for (pod, app, addresses) in [
        ("default/client", "client", ["10.1.1.10", "fd00:1:1::10"]),
        ("default/friend", "friend", ["10.1.1.11", "fd00:1:1::11"]),
        ("default/near", "server", ["10.1.1.20", "fd00:1:1::20"]),
    ] {
        manifests.pod("node-a", pod, app, &addresses);
        manifests.service_account(app);
    }
    manifests.pod("node-b", "default/far", "server", &["10.1.2.20", "fd00:1:2::20"]);
    manifests.service_account("server");
}

const FIRST_MATCH: &str = "GlobalNetworkPolicy, first match";

/// One policy of each kind. All let the friend reach the servers, and not the client.
const KINDS: [(&str, &str); 12] = [
    (
        FIRST_MATCH,
        r#"
apiVersion: projectcalico.org/v3
kind: StagedGlobalNetworkPolicy
metadata: {name: enforces-nothing}
spec: {order: 1, types: [Ingress, Egress], ingress: [{action: Deny}], egress: [{action: Deny}]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: no-client}
spec:
  selector: app == 'server'
  types: [Ingress]
  ingress:
  - {action: Deny, source: {selector: app == 'client'}}
  - {action: Allow}
"#,
    ),
    (
        "NetworkPolicy, which allows and leaves the rest to the end of its tier",
        r#"
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {namespace: default, name: friends}
spec:
  selector: app == 'server'
  types: [Ingress]
  ingress:
  - {action: Allow, protocol: TCP, source: {selector: app == 'friend'}, destination: {ports: [8080]}}
"#,
    ),
    (
        "GlobalNetworkPolicy on what the sender sends",
        r#"
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: keep-in}
spec:
  selector: app in {'client', 'friend'}
  types: [Egress]
  egress:
  - {action: Allow, destination: {notSelector: app == 'server'}}
  - {action: Pass, destination: {selector: app == 'server'}}
---
apiVersion: projectcalico.org/v3
kind: Tier
metadata: {name: last}
spec: {order: 2000000}
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {namespace: default, name: last.client}
spec:
  tier: last
  selector: app == 'client'
  types: [Egress]
  egress:
  - {action: Deny, protocol: TCP, destination: {ports: ['1:8080']}}
  - {action: Allow}
"#,
    ),
    (
        "Tier before the default one, whose policy would allow all",
        r#"
apiVersion: projectcalico.org/v3
kind: Tier
metadata: {name: security}
spec: {order: 10}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: security.no-client}
spec:
  tier: security
  selector: app == 'server'
  types: [Ingress]
  ingress:
  - {action: Deny, source: {selector: app == 'client'}}
  - {action: Pass}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: allow-all}
spec:
  order: 1
  types: [Ingress]
  ingress: [{action: Allow}]
"#,
    ),
    (
        "NetworkSet",
        r#"
apiVersion: projectcalico.org/v3
kind: NetworkSet
metadata: {namespace: default, name: friends, labels: {set: friends}}
spec: {nets: [10.1.1.11/32, "fd00:1:1::11/128"]}
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {namespace: default, name: set-of-friends}
spec:
  selector: app == 'server'
  types: [Ingress]
  ingress:
  - {action: Allow, source: {selector: set == 'friends'}}
"#,
    ),
    (
        "GlobalNetworkSet",
        r#"
apiVersion: projectcalico.org/v3
kind: GlobalNetworkSet
metadata: {name: blocked, labels: {set: blocked}}
spec: {nets: [10.1.1.10/32, "fd00:1:1::10/128"]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: no-blocked}
spec:
  selector: app == 'server'
  types: [Ingress]
  ingress:
  - {action: Allow, source: {notSelector: set == 'blocked'}}
"#,
    ),
    (
        "ClusterNetworkPolicy, before a NetworkPolicy that allows all",
        r#"
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: no-client}
spec:
  tier: Admin
  priority: 10
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: server}}}}
  ingress:
  - action: Deny
    from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: client}}}}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: default, name: all}
spec: {podSelector: {}, policyTypes: [Ingress], ingress: [{}]}
"#,
    ),
    (
        "ClusterNetworkPolicy of the baseline, for pods that no NetworkPolicy isolates",
        r#"
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: no-client}
spec:
  tier: Baseline
  priority: 10
  subject: {namespaces: {matchLabels: {kubernetes.io/metadata.name: default}}}
  ingress:
  - action: Deny
    from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: client}}}}]
"#,
    ),
    (
        "GlobalNetworkPolicy that names a service's endpoints",
        r#"
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: not-to-the-service}
spec:
  selector: app == 'client'
  types: [Egress]
  egress:
  - {action: Deny, destination: {services: {name: servers, namespace: default}}}
  - {action: Allow}
"#,
    ),
    (
        "service accounts by their names in a rule",
        r#"
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {namespace: default, name: friends-account}
spec:
  selector: app == 'server'
  types: [Ingress]
  ingress:
  - {action: Allow, source: {serviceAccounts: {names: [friend]}}}
"#,
    ),
    (
        "service accounts by their labels, of whom the policy is for and of whom its rule lets in",
        r#"
apiVersion: v1
kind: ServiceAccount
metadata: {namespace: default, name: server, labels: {side: server}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {namespace: default, name: client, labels: {side: client, trusted: "no"}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {namespace: default, name: friend, labels: {side: client, trusted: "yes"}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: trusted-accounts}
spec:
  serviceAccountSelector: side == 'server'
  types: [Ingress]
  ingress:
  - {action: Allow, source: {serviceAccounts: {selector: trusted == 'yes'}}}
"#,
    ),
    (
        "Profile, whose rules count where no policy does",
        r#"
apiVersion: projectcalico.org/v3
kind: Profile
metadata: {name: kns.default}
spec:
  ingress:
  - {action: Deny, source: {selector: app == 'client'}}
  - {action: Allow}
  egress:
  - {action: Allow}
"#,
    ),
];

/// Governs none of the pods that talk.
const UNRELATED: &str = r#"
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: unrelated}
spec: {selector: app == 'nobody', types: [Ingress, Egress]}
"#;

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn each_kind_of_policy_on_one_node_and_across_nodes_in_both_families() {
    let mut manifests = Manifests::cluster("Always");
    add_pods(&mut manifests);
    manifests.service(&ServiceSpec {
        name: "default/servers",
        addresses: &["10.96.0.10", "fd00:96::10"],
        ports: &[("http", "TCP", 80, PORT, 0)],
        backends: &[
            ("10.1.1.20", "node-a"),
            ("10.1.2.20", "node-b"),
            ("fd00:1:1::20", "node-a"),
            ("fd00:1:2::20", "node-b"),
        ],
        ..ServiceSpec::default()
    });
    let mut site = Site::build(&two_nodes(), &manifests.text(), UNRELATED);
    let _listeners = ["default/near", "default/far"].map(|pod| site.listen(pod, &format!("[::]:{PORT}")));
    site.start_all();
    let flows = |client_allowed: bool| -> Vec<Flow> {
        let to = |from, allowed| SERVERS.map(|server| (from, format!("{server}:{PORT}"), allowed));
        [to("default/client", client_allowed), to("default/friend", true)].concat()
    };
    expect(&site, "without policy", &flows(true));

    // Established before any policy: one pair of each family, on one node and across.
    let established = [("default/near", "10.1.1.20"), ("default/far", "[fd00:1:2::20]")].map(|(pod, address)| {
        let to = |port: u16| format!("{address}:{port}");
        let client = connection(&site, "default/client", pod, &to(5000));
        (client, connection(&site, "default/friend", pod, &to(5001)))
    });
    let moment = Duration::from_secs_f32(NO_ANSWER_SECONDS);
    site.set_policies(&UNRELATED.replace("nobody", "nobody-else"));
    for ((near, far), _) in &established {
        assert!(passes(near, far, DEADLINE) && passes(far, near, DEADLINE), "an unrelated change cuts nothing");
    }
    for (kind, policy) in KINDS {
        site.set_policies(&format!("{policy}{UNRELATED}"));
        expect(&site, kind, &flows(false));
        // By who connects alone, whatever the port.
        if kind == FIRST_MATCH {
            for ((near, far), (friend_near, friend_far)) in &established {
                assert!(!passes(near, far, moment), "an established connection is cut");
                assert!(!passes(far, near, moment), "in both directions");
                assert!(passes(friend_near, friend_far, DEADLINE), "an allowed one goes on");
            }
        }
    }
    assert!(site.drops("node-a", "PolicyDeniedIngress") > 0 && site.drops("node-b", "PolicyDeniedIngress") > 0);
    assert!(site.drops("node-a", "PolicyDeniedEgress") > 0, "{}", site.status("node-a")["counters"]);
    site.set_policies("");
    expect(&site, "without policy again", &flows(true));
    site.finish();
}

/// Lets a network in, on a port, and nobody else.
fn only(v4: &str, v6: &str, port: u16) -> String {
    format!(
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{namespace: default, name: only}}
spec:
  podSelector: {{matchLabels: {{app: server}}}}
  policyTypes: [Ingress]
  ingress:
  - from: [{{ipBlock: {{cidr: {v4}}}}}, {{ipBlock: {{cidr: "{v6}"}}}}]
    ports: [{{protocol: TCP, port: {port}}}]
"#
    )
}

/// "Does NodePort traffic bypass policy?" No: the backend's policy decides, by the address and port after DNAT. On the node that
/// the client asks it sees the client itself, even where the packet is masqueraded to an address of that node, whose own processes
/// always reach its pods; a backend on another node is asked by the node.
#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn traffic_to_a_node_port_does_not_bypass_policy() {
    const LOCAL: u16 = 31380;
    const CLUSTER: u16 = 31381;
    const ACROSS: u16 = 31382;
    let mut manifests = Manifests::cluster("Always");
    add_pods(&mut manifests);
    let near = [("10.1.1.20", "node-a"), ("fd00:1:1::20", "node-a")];
    let far = [("10.1.2.20", "node-b"), ("fd00:1:2::20", "node-b")];
    for (name, addresses, node_port, local, backends) in [
        ("default/local", ["10.96.0.10", "fd00:96::10"], LOCAL, true, near),
        ("default/cluster", ["10.96.0.11", "fd00:96::11"], CLUSTER, false, near),
        ("default/across", ["10.96.0.12", "fd00:96::12"], ACROSS, false, far),
    ] {
        let ports = [("http", "TCP", 80, PORT, node_port)];
        manifests.service(&ServiceSpec { name, addresses: &addresses, ports: &ports, local, backends: &backends });
    }
    let mut site = Site::build(&two_nodes(), &manifests.text(), "");
    let _listeners = ["default/near", "default/far"].map(|pod| site.listen(pod, &format!("[::]:{PORT}")));
    site.start_all();
    let flows = |local: bool, cluster: bool, across: bool| -> Vec<Flow> {
        let both = |(port, allowed)| {
            ["192.168.10.1", "[fd00:10::1]"].map(|node| ("client", format!("{node}:{port}"), allowed))
        };
        [(LOCAL, local), (CLUSTER, cluster), (ACROSS, across)].map(both).concat()
    };
    expect(&site, "no policy", &flows(true, true, true));
    let client = only(&format!("{CLIENT}/32"), "fd00:10::100/128", PORT);
    let node = only("192.168.10.1/32", "fd00:10::1/128", PORT);
    for (what, policy, [local, cluster, across]) in [
        ("only the client", client.clone(), [true, true, false]),
        ("only the node", node, [false, false, true]),
        ("the node port instead of the pod's", only("0.0.0.0/0", "::/0", LOCAL), [false; 3]),
        ("only pods", only("10.1.0.0/16", "fd00:1::/32", PORT), [false; 3]),
        ("the client again", client, [true, true, false]),
    ] {
        site.set_policies(&policy);
        expect(&site, what, &flows(local, cluster, across));
    }
    assert!(site.drops("node-a", "PolicyDeniedIngress") > 0, "{}", site.status("node-a")["counters"]);
    assert!(site.drops("node-b", "PolicyDeniedIngress") > 0, "{}", site.status("node-b")["counters"]);
    site.finish();
}

/// One line for each new connection that a Log rule matches, whatever becomes of it, and none for the packets that follow.
#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_rule_that_logs_writes_one_line_for_each_new_connection() {
    let mut manifests = Manifests::cluster("Always");
    add_pods(&mut manifests);
    let policy = r#"
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {namespace: default, name: watched}
spec:
  selector: app == 'server'
  types: [Ingress]
  ingress:
  - {action: Log, protocol: TCP, destination: {ports: ['8080:8081']}}
  - {action: Allow, protocol: TCP, destination: {ports: [8080]}}
"#;
    let mut site = Site::build(&one_node(), &manifests.text(), policy);
    site.start_all();
    for (client, server) in [("10.1.1.10", "10.1.1.20"), ("fd00:1:1::10", "fd00:1:1::20")] {
        let address =
            |port: u16| if server.contains(':') { format!("[{server}]:{port}") } else { format!("{server}:{port}") };
        let lines = |site: &mut Site, source: &TcpStream, port: u16| {
            let own = source.local_addr().unwrap().port();
            let end = format!("src={client} dst={server} proto=tcp sport={own} dport={port}");
            let log = site.router("node-a").log();
            let found = log.lines().filter(|line| line.contains("connection logged") && line.contains(&end));
            found.map(str::to_owned).collect::<Vec<_>>()
        };
        let (near, far) = connection(&site, "default/client", "default/near", &address(PORT));
        for _ in 0..3 {
            assert!(passes(&near, &far, DEADLINE) && passes(&far, &near, DEADLINE));
        }
        let line = wait_until("the line of a connection", DEADLINE, || lines(&mut site, &near, PORT).pop()).unwrap();
        for part in [
            "INFO",
            r#"policy="NetworkPolicy/default/watched""#,
            "rule=1",
            r#"direction="ingress""#,
            r#"verdict="allow""#,
            r#"by="NetworkPolicy/default/watched rule 2""#,
            r#"endpoint="default/near""#,
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
        // The line of a later connection comes behind all of this one's.
        let (later, _far) = connection(&site, "default/client", "default/near", &address(PORT));
        wait_until("the line of the next connection", DEADLINE, || lines(&mut site, &later, PORT).pop()).unwrap();
        assert_eq!(lines(&mut site, &near, PORT).len(), 1, "one line for one connection");
        // What is denied is told too.
        let moment = Duration::from_secs_f32(NO_ANSWER_SECONDS);
        assert!(site.connect("default/client", &address(8081), moment).is_err());
        let denied = format!("src={client} dst={server} proto=tcp");
        let is_told =
            |line: &str| line.contains(&denied) && line.contains(r#"verdict="deny""#) && line.contains("dport=8081");
        let log = || site.router("node-a").log().lines().any(is_told).then_some(());
        wait_until("the line of what was denied", DEADLINE, log).unwrap();
        // A port that the rule does not name is not.
        assert!(site.connect("default/client", &address(8082), moment).is_err());
        assert!(!site.router("node-a").log().contains("dport=8082"));
    }
    site.finish();
}
