//! Host ports of pods from YAML to frontends (rule 22b of the services).

use std::{collections::HashSet, net::IpAddr};

use weir_nat::HostAddresses;
use weir_packet::Protocol;

use super::{WEIR, assert_said, load_with_pods, loaded, policy::trace_lines};
use crate::{
    sockets::Sockets,
    trace::Tracer,
    translate::{Loaded, LocalPod, Room, workload_device},
};

const NODE: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDR: 10.0.0.0/16}\nstatus: {addresses: \
                    [{type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: 2001:db8::1}]}\n";

/// A pod on this node with container ports as given, and more of its metadata, spec and status.
fn pod(name: &str, address: &str, ports: &str, [metadata, spec, status]: [&str; 3]) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: x{metadata}}}\nspec:\n  nodeName: node-a\n{spec}  \
         containers:\n  - name: c\n    ports: [{ports}]\nstatus: {{podIP: '{address}'{status}}}\n"
    )
}

fn plain(name: &str, address: &str, ports: &str) -> String {
    pod(name, address, ports, [""; 3])
}

/// Name, protocol, port, addresses and backends of each host port, in the order of the table.
fn host_ports(loaded: &Loaded) -> Vec<(String, String, u16, HostAddresses, Vec<String>)> {
    let host_ports = loaded.services.services.iter().filter_map(|port| {
        let on = port.host_port?;
        let backends = port.endpoints.iter().map(|one| format!("{} {}", one.address, one.port)).collect();
        assert!(port.cluster_ips.is_empty() && port.endpoints.iter().all(|one| one.ready && one.serving));
        assert!(port.endpoints.iter().all(|one| one.node_name() == Some("node-a")));
        Some((port.name.clone(), port.protocol.to_string(), port.port, on, backends))
    });
    host_ports.collect()
}

fn names(text: &str) -> Vec<String> {
    host_ports(&loaded(WEIR, &(NODE.to_owned() + text))).into_iter().map(|(name, ..)| name).collect()
}

#[test]
fn host_ports_are_frontends_with_the_pod_behind() {
    let sidecar = "  initContainers:\n  - {name: s, restartPolicy: Always, ports: [{containerPort: 9, hostPort: 5009, protocol: SCTP}]}\n  \
                   - {name: once, ports: [{containerPort: 9, hostPort: 5010}]}\n";
    let ports = "{containerPort: 80, hostPort: 8080}, {containerPort: 53, hostPort: 5353, protocol: UDP, hostIP: 0.0.0.0}, \
                 {containerPort: 53, hostPort: 5354, hostIP: '::'}, {containerPort: 81, hostPort: 8080, hostIP: 127.0.0.1, \
                 protocol: UDP}, {containerPort: 82, hostPort: 8081, hostIP: 2001:db8::1}, {containerPort: 83}, \
                 {containerPort: 84, hostPort: 0}";
    let text =
        NODE.to_owned() + &pod("a", "10.0.0.1", ports, ["", sidecar, ", podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]"]);
    let one = |address: &str| HostAddresses::One(address.parse().unwrap());
    let both = |port: u16| vec![format!("10.0.0.1 {port}"), format!("fd00::1 {port}")];
    let expected = [
        ("x/a:hostPort/8080", "tcp", 8080, HostAddresses::All, 80),
        ("x/a:hostPort/0.0.0.0:5353", "udp", 5353, HostAddresses::Ipv4, 53),
        ("x/a:hostPort/[::]:5354", "tcp", 5354, HostAddresses::Ipv6, 53),
        ("x/a:hostPort/127.0.0.1:8080", "udp", 8080, one("127.0.0.1"), 81),
        ("x/a:hostPort/[2001:db8::1]:8081", "tcp", 8081, one("2001:db8::1"), 82),
        ("x/a:hostPort/5009", "sctp", 5009, HostAddresses::All, 9),
    ];
    let expected = expected.map(|(name, protocol, port, on, to)| (name.into(), protocol.into(), port, on, both(to)));
    assert_eq!(host_ports(&loaded(WEIR, &text)), expected);
}

#[test]
fn only_living_pods_of_this_node_with_a_network_of_their_own_have_host_ports() {
    let port = "{containerPort: 80, hostPort: 8080}";
    let named = ["x/a:hostPort/8080".to_owned()];
    assert_eq!(names(&plain("a", "10.0.0.1", port)), named);
    let with = |parts: [&str; 3]| names(&pod("a", "10.0.0.1", port, parts));
    assert_eq!(with(["", "  hostNetwork: true\n", ""]), [""; 0]);
    assert_eq!(with(["", "", ", phase: Succeeded"]), [""; 0]);
    assert_eq!(with(["", "", ", phase: Failed"]), [""; 0]);
    assert_eq!(names(&plain("a", "", port)), [""; 0], "no address yet");
    assert_eq!(names(&plain("a", "10.0.0.1", port).replace("node-a", "node-b")), [""; 0]);
    // One that is on its way out serves to its end.
    assert_eq!(with([", deletionTimestamp: '2026-01-01T00:00:00Z'", "", ""]), named);
    // Where Calico says which address a pod has, that is it.
    let endpoint = "---\napiVersion: projectcalico.org/v3\nkind: WorkloadEndpoint\nmetadata: {name: w, namespace: x}\nspec: {node: \
                    node-a, orchestrator: k8s, pod: a, interfaceName: cali1, ipNetworks: [10.0.0.9/32]}\n";
    let text = NODE.to_owned() + &plain("a", "", port) + endpoint;
    assert_eq!(host_ports(&loaded(WEIR, &text))[0].4, ["10.0.0.9 80"]);
}

#[test]
fn conflicts_are_told_and_the_older_pod_keeps_the_port() {
    let created = |time: &str| format!(", creationTimestamp: '2026-01-01T00:00:0{time}Z'");
    let (old, new) = (created("1"), created("2"));
    let port = "{containerPort: 80, hostPort: 8080}";
    let on_one = "{containerPort: 80, hostPort: 8080, hostIP: 192.0.2.1}";
    let pair = |[a, b]: [&str; 2], ports: &str| {
        pod("a", "10.0.0.1", port, [a, "", ""]) + &pod("b", "10.0.0.2", ports, [b, "", ""])
    };
    assert_eq!(names(&pair([&new, &old], port)), ["x/b:hostPort/8080", "x/a:hostPort/8080"]);
    assert_eq!(names(&pair([&old, &old], port)), ["x/a:hostPort/8080", "x/b:hostPort/8080"]);
    let leaving = old.clone() + ", deletionTimestamp: '2026-01-02T00:00:00Z'";
    assert_eq!(names(&pair([&leaving, &new], port)), ["x/b:hostPort/8080", "x/a:hostPort/8080"]);
    let loaded_pair = loaded(WEIR, &(NODE.to_owned() + &pair([&old, &new], on_one)));
    let unserved: Vec<_> = loaded_pair.unserved_host_ports().into_iter().map(|one| (one.pod, one.port)).collect();
    assert_eq!(unserved, [("x/b".to_owned(), 8080)]);
    let [help, have] = ["[give it another port]", "has it, and keeps it where both would be open"];
    assert_said(
        WEIR,
        &(NODE.to_owned() + &pair([&old, &new], on_one)),
        &[&format!("cluster.yaml:24:43: warning: Pod x/b: hostPort 8080 (tcp) is not served: pod x/a {have} {help}")],
    );
    // Neither of these is in another's way.
    for other in [
        "{containerPort: 80, hostPort: 8080, protocol: UDP}",
        "{containerPort: 80, hostPort: 8081}",
        "{containerPort: 80, hostPort: 8080, hostIP: '::'}",
        "{containerPort: 80, hostPort: 8080, hostIP: 192.0.2.2}",
        "{containerPort: 80, hostPort: 8080, hostIP: 127.0.0.1}",
    ] {
        let first = plain("a", "10.0.0.1", on_one);
        let text = NODE.to_owned() + &first + &plain("b", "10.0.0.2", other);
        assert_eq!(loaded(WEIR, &text).unserved_host_ports(), [], "{other}");
    }
    let loopback = "{containerPort: 80, hostPort: 8080, hostIP: 127.0.0.1}";
    let text = NODE.to_owned() + &plain("a", "10.0.0.1", port) + &plain("b", "10.0.0.2", loopback);
    assert_eq!(loaded(WEIR, &text).unserved_host_ports(), [], "on all addresses is not on loopback");
    // A service's own port is at its own address, which is none of the node's.
    let elsewhere = "---\napiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: x}\nspec: {clusterIP: 10.96.0.1, externalIPs: \
                     [203.0.113.1], ports: [{port: 8080}]}\n";
    let text = NODE.to_owned() + elsewhere + &plain("a", "10.0.0.1", port);
    assert_eq!(loaded(WEIR, &text).unserved_host_ports(), []);
    let on_external = "{containerPort: 80, hostPort: 8080, hostIP: 203.0.113.1}";
    let text = NODE.to_owned() + elsewhere + &plain("a", "10.0.0.1", on_external);
    assert_eq!(loaded(WEIR, &text).unserved_host_ports().len(), 1);
    // Services come first, whatever their kind of address; and failsafe ports are the node's.
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: x}\nspec: {type: NodePort, clusterIP: \
                   10.96.0.1, externalIPs: [192.0.2.1], ports: [{port: 8443, nodePort: 30080}]}\n";
    let ports = "{containerPort: 80, hostPort: 30080}, {containerPort: 80, hostPort: 8443}, {containerPort: 80, hostPort: 22}, \
                 {containerPort: 80, hostPort: 30080, protocol: UDP}, {containerPort: 80, hostPort: 30080, hostIP: '::'}";
    let text = NODE.to_owned() + service + &plain("a", "10.0.0.1", ports);
    let found = loaded(WEIR, &text);
    let unserved = found.unserved_host_ports();
    let unserved: Vec<_> = unserved.iter().map(|one| (one.port, one.why.as_str())).collect();
    let by_service = format!("service x/s {have}");
    let failsafe = "it is a failsafe port, which stays the node's own (FelixConfiguration, failsafeInboundHostPorts)";
    assert_eq!(
        unserved,
        [
            (30080, by_service.as_str()),
            (8443, by_service.as_str()),
            (22, failsafe),
            (30080, "pod x/a has it, and keeps it where both would be open")
        ]
    );
    assert!(host_ports(&found).iter().all(|(_, _, port, ..)| *port != 22));
}

/// The ports that are served, and those that are not, with the reason.
fn settled(
    loaded: &mut Loaded,
    room: Room,
    before: &HashSet<(String, Protocol)>,
    sockets: &[(Protocol, u16, &str)],
) -> (Vec<u16>, Vec<(u16, String)>) {
    let sockets = sockets.iter().map(|(protocol, port, at)| (*protocol, *port, at.parse::<IpAddr>().unwrap()));
    loaded.settle_host_ports(room, before, || Sockets::of(sockets));
    let served = host_ports(loaded).into_iter().map(|(_, _, port, ..)| port).collect();
    (served, loaded.unserved_host_ports().into_iter().map(|one| (one.port, one.why)).collect())
}

const ROOM: Room = Room { snat: (10_000, 29_999), ephemeral: (32_768, 60_999), frontends: 262_144 };

#[test]
fn a_host_port_needs_an_address_of_the_node_that_no_socket_has() {
    let ports = "{containerPort: 80, hostPort: 8080, hostIP: 10.0.0.7}, {containerPort: 80, hostPort: 8081, hostIP: 169.254.169.254}, \
                 {containerPort: 80, hostPort: 8082}, {containerPort: 53, hostPort: 5353, protocol: UDP}, {containerPort: 53, \
                 hostPort: 53, protocol: UDP}, {containerPort: 80, hostPort: 8083, hostIP: 127.0.0.1}";
    let text = NODE.to_owned() + &plain("a", "10.0.0.1", ports);
    let mut found = loaded(WEIR, &text);
    let none = HashSet::new();
    // A resolver on loopback is in nobody's way, nor is a port of another protocol.
    let sockets = [
        (Protocol::UDP, 5353, "::"),
        (Protocol::UDP, 53, "127.0.0.53"),
        (Protocol::UDP, 8082, "0.0.0.0"),
        (Protocol::TCP, 8083, "192.0.2.1"),
    ];
    let elsewhere = |address: &str| format!("its hostIP {address} is no address of this node");
    let in_use = "a connected socket of the node has the port; it is looked at again every 30 s".to_owned();
    let metadata = (8081, elsewhere("169.254.169.254"));
    assert_eq!(
        settled(&mut found, ROOM, &none, &sockets),
        (vec![8082, 53, 8083], vec![(8080, elsewhere("10.0.0.7")), metadata.clone(), (5353, in_use.clone())])
    );
    assert_eq!(found.host_ports_in_use().collect::<Vec<_>>(), [5353]);
    // The node gets one of the addresses, and loses it; the socket goes; one that comes later takes nothing away.
    found.add_local_addresses(&["10.0.0.7".parse().unwrap()]);
    assert_eq!(settled(&mut found, ROOM, &none, &[]), (vec![8080, 8082, 5353, 53, 8083], vec![metadata.clone()]));
    found.add_local_addresses(&[]);
    let before = found.served_host_ports();
    assert_eq!(
        settled(&mut found, ROOM, &before, &[(Protocol::UDP, 5353, "192.0.2.1"), (Protocol::TCP, 8082, "::")]),
        (vec![8082, 5353, 53, 8083], vec![(8080, elsewhere("10.0.0.7")), metadata])
    );
    let message = |port: u16, address: &str| {
        format!(
            "warning: Pod x/a: hostPort {port} (tcp) is served only on an address of this node, and {address} is none: its Node does not have \
             it; a device of the node may [leave hostIP out, or take an address of the node]"
        )
    };
    let [first, second] = [message(8080, "10.0.0.7"), message(8081, "169.254.169.254")];
    assert_said(WEIR, &text, &[&format!("cluster.yaml:14:43: {first}"), &format!("cluster.yaml:14:98: {second}")]);
}

#[test]
fn host_ports_leave_half_of_each_range_and_never_overflow_a_map() {
    let created = |time: &str| format!(", creationTimestamp: '2026-01-01T00:00:0{time}Z'");
    let (old, new) = (created("1"), created("2"));
    let port = |port: u16| format!("{{containerPort: 80, hostPort: {port}}}");
    let both = "{containerPort: 80, hostPort: 10000, protocol: UDP}";
    let ports = |ports: &[u16]| ports.iter().map(|one| port(*one)).collect::<Vec<_>>().join(", ");
    let pods = pod("b", "10.0.0.2", &(ports(&[10_002, 40_000, 80]) + ", " + both), [&new, "", ""])
        + &pod("a", "10.0.0.1", &ports(&[10_000, 10_001, 40_001]), [&old, "", ""]);
    let mut found = loaded(WEIR, &(NODE.to_owned() + &pods));
    let none = HashSet::new();
    let small = Room { snat: (10_000, 10_003), ephemeral: (40_000, 40_001), ..ROOM };
    let half = |of: &str| format!("host ports would have more than half of {of}");
    assert_eq!(
        settled(&mut found, small, &none, &[]),
        (
            vec![10_000, 10_001, 40_001, 80, 10_000],
            vec![(10_002, half("snat.portRange")), (40_000, half("net.ipv4.ip_local_port_range"))]
        )
    );
    // The node has one address of each family, and the pods are of one: as many frontends as there is room for.
    let no_room = || "there is no room for more of them on this node".to_owned();
    let (served, unserved) = settled(&mut found, Room { frontends: 3, ..ROOM }, &none, &[]);
    assert_eq!(served, [10_000, 10_001, 40_001]);
    assert_eq!(unserved, [10_002, 40_000, 80, 10_000].map(|port| (port, no_room())));
}

#[test]
fn faulty_host_ports_are_errors() {
    let ports = "{containerPort: 80, hostPort: 70000}, {containerPort: 80, hostPort: 80, hostIP: somewhere}";
    assert_said(
        WEIR,
        &(NODE.to_owned() + &plain("a", "10.0.0.1", ports)),
        &[
            "cluster.yaml:14:43: error: Pod x/a: spec.containers[0].ports[0].hostPort: 70000 is not a port [a port is a number from 1 \
             to 65535]",
            "cluster.yaml:14:93: error: Pod x/a: spec.containers[0].ports[1].hostIP: \"somewhere\" is not an IP address [write an \
             address like 192.0.2.1 or 2001:db8::1]",
        ],
    );
}

#[test]
fn policy_sees_the_pod_behind_a_host_port() {
    let deny = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: n, namespace: red}\nspec: {podSelector: \
                {matchLabels: {app: h}}, ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]}\n";
    let pod =
        super::policy::pod("red/h", "10.0.0.9", "").replace("containerPort: 80}", "containerPort: 80, hostPort: 8080}");
    let flow = |src: &str, dst: &str, port: u16| {
        format!("{{\"src\": \"{src}\", \"dst\": \"{dst}\", \"proto\": \"tcp\", \"dport\": {port}}}")
    };
    let flows = [
        flow("red/a", "192.0.2.1", 8080),
        flow("red/b", "192.0.2.1", 8080),
        flow("203.0.113.7", "192.0.2.1", 8080),
        flow("192.0.2.1", "192.0.2.1", 8080),
        flow("red/h", "192.0.2.1", 8080),
        flow("red/a", "192.0.2.1", 8081),
    ];
    let answers = trace_lines(&(pod + deny), &flows.each_ref().map(String::as_str));
    let said: Vec<_> = answers
        .iter()
        .map(|answer| {
            let word = |key: &str| answer[key].as_str().unwrap_or("-").to_owned();
            [word("verdict"), word("reason"), word("service"), word("backend"), answer["masquerade"].to_string()]
                .join(" ")
        })
        .collect();
    let served = "red/h:hostPort/8080 10.0.0.9:80";
    assert_eq!(
        said,
        [
            format!("forward - {served} false"),
            format!("drop PolicyDeniedIngress {served} false"),
            format!("drop PolicyDeniedIngress {served} false"),
            format!("forward - {served} false"),
            // A pod that asks for itself.
            format!("forward - {served} true"),
            "local - - - false".to_owned(),
        ]
    );
}

#[test]
fn a_trace_for_a_person_names_the_host_port() {
    let text = NODE.to_owned() + &plain("a", "10.0.0.1", "{containerPort: 80, hostPort: 8080}");
    let loaded = loaded(WEIR, &text);
    let mut output = Vec::new();
    let flow = r#"{"src": "203.0.113.7", "dst": "192.0.2.1", "proto": "tcp", "dport": 8080}"#;
    Tracer::new(&loaded).unwrap().run(flow.as_bytes(), &mut output, true).unwrap();
    let output = String::from_utf8(output).unwrap();
    for part in [
        "x/a:hostPort/8080 (cluster.yaml:7), by its host port\n",
        "its one backend is the pod\n",
        "picked 10.0.0.1:80, the pod itself\n",
        "not masqueraded: the backend sees the source itself\n",
    ] {
        assert!(output.contains(part), "{part}\n{output}");
    }
}

#[test]
fn a_pod_that_weir_made_has_the_host_ports_of_its_own_object_only() {
    let made = LocalPod {
        name: "x/a".into(),
        uid: Some("u1".into()),
        sandbox: "s1".into(),
        device: workload_device("x", "a"),
        mac: "02:00:00:00:00:05".parse().unwrap(),
        addresses: vec!["10.0.0.5".parse().unwrap()],
    };
    for (uid, expected) in [("u0", &[][..]), ("u1", &["x/a:hostPort/8080"])] {
        let object = pod("a", "10.0.0.4", "{containerPort: 80, hostPort: 8080}", [&format!(", uid: {uid}"), "", ""]);
        let loaded = load_with_pods(&(NODE.to_owned() + &object), std::slice::from_ref(&made));
        let served = host_ports(&loaded.unwrap_or_else(|problems| panic!("{problems}")));
        assert_eq!(served.iter().map(|(name, ..)| name.as_str()).collect::<Vec<_>>(), expected, "{uid}");
    }
}
