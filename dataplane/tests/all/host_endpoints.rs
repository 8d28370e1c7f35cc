//! Host endpoints' policy on the wire: which packets of an uplink get through, each to where it belongs, and with or without a
//! connection. The law of conservation is asserted after every turn (support/router.rs).

use crate::router;
use std::sync::Arc;

use crate::packets::{Packet, TCP, UDP};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, UPLINK_MAC, cluster, ip, service, tunnelled};
use weir_dataplane::{
    afxdp::trunk,
    frame::{IfIndex, LinkType},
    model::{Cluster, EndpointToHost, HostEndpoint},
    snapshot::Rules,
};
use weir_nat::{ServiceTable, SnatPorts};
use weir_packet::{DropReason, Protocol};
use weir_policy::{
    Classifier, Selector,
    model::{Action, Endpoint, EndpointKind, EntityMatch, Model, Policy, PolicyScope, PortMatch, Profile, Rule, Tier},
};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;

/// Addresses of one family.
#[derive(Clone, Copy)]
struct Addresses {
    node: &'static str,
    outside: &'static str,
    server: &'static str,
    remote: &'static str,
    vip: &'static str,
}

const FAMILIES: [Addresses; 2] = [
    Addresses {
        node: "192.168.10.1",
        outside: "192.168.10.100",
        server: "10.1.1.20",
        remote: "10.1.2.20",
        vip: "10.96.0.10",
    },
    Addresses {
        node: "fd00:10::1",
        outside: "fd00:10::100",
        server: "fd00:1:1::20",
        remote: "fd00:1:2::20",
        vip: "fd00:96::10",
    },
];

/// The cluster with a host endpoint on this interface.
fn governed(interface: &str) -> Cluster {
    let endpoint = HostEndpoint { name: "h".into(), interface: Some(interface.into()), addresses: Vec::new() };
    Cluster { host_endpoints: vec![endpoint], ..cluster() }
}

fn rule(action: Action, protocol: Protocol, port: Option<u16>) -> Rule {
    let ports = port.map(|port| vec![PortMatch::Range(port, port)]);
    let destination = EntityMatch { ports, ..EntityMatch::default() };
    Rule { number: 1, action, protocol: Some(protocol), destination, ..Rule::default() }
}

fn from_port(protocol: Protocol, port: u16) -> Rule {
    let source = EntityMatch { ports: Some(vec![PortMatch::Range(port, port)]), ..EntityMatch::default() };
    Rule { source, ..rule(Action::Allow, protocol, None) }
}

/// A policy of the host endpoint.
fn policy(scope: PolicyScope, ingress: Option<Vec<Rule>>, egress: Option<Vec<Rule>>) -> Policy {
    let selector = Selector::Has("host".into());
    Policy { name: format!("{scope:?}"), selector, scope, ingress, egress, ..Policy::default() }
}

/// Rules of a node with these policies and a service with port 53 whose backend is the server's 5353.
fn rules(cluster: &Cluster, policies: Vec<Policy>) -> Rules {
    let services = ServiceTable::compile(&weir_nat::Model {
        node_name: "a".into(),
        pod_cidrs: cluster.pod_cidrs.clone(),
        local_addresses: ["192.168.10.1", "fd00:10::1"].map(ip).into(),
        services: vec![Arc::new(service(
            "v4",
            Protocol::UDP,
            ["10.96.0.10", "fd00:96::10"],
            ["10.1.1.20", "fd00:1:1::20"],
            None,
        ))]
        .into(),
        ..weir_nat::Model::default()
    })
    .unwrap();
    let mut endpoints: Vec<Arc<Endpoint>> = Vec::new();
    endpoints.extend(cluster.workloads.iter().take(2).map(|workload| {
        Arc::new(Endpoint {
            name: workload.name.clone(),
            local: true,
            nets: workload.addresses.iter().map(|address| (*address).into()).collect(),
            profiles: vec!["all".into()],
            ..Endpoint::default()
        })
    }));
    endpoints.extend(cluster.host_endpoints.iter().map(|endpoint| {
        Arc::new(Endpoint {
            name: endpoint.name.clone(),
            kind: EndpointKind::HostEndpoint,
            local: true,
            labels: [("host".to_owned(), String::new())].into(),
            ..Endpoint::default()
        })
    }));
    let allow = vec![Rule::default()];
    let profile = Profile { name: "all".into(), ingress: allow.clone(), egress: allow };
    let tier =
        Tier { name: "default".into(), policies: policies.into_iter().map(Arc::new).collect(), ..Tier::default() };
    let model = Model { endpoints, tiers: vec![tier], profiles: vec![Arc::new(profile)] };
    Rules::new(services, Classifier::compile(&model).unwrap(), cluster)
}

fn router(cluster: &Cluster, policies: Vec<Policy>) -> Router {
    Router::of(cluster, rules(cluster, policies), SnatPorts::new(10_000..=20_000, []).unwrap(), 64)
}

fn tcp([src, dst]: [&str; 2], [from, to]: [u16; 2], flags: u8) -> Vec<u8> {
    let mut l4 = [from.to_be_bytes(), to.to_be_bytes()].concat();
    l4.extend([0, 0, 0, 100, 0, 0, 0, if flags & ACK != 0 { 1 } else { 0 }]);
    l4.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    Packet { src: ip(src), dst: ip(dst), protocol: TCP, ttl: 64, tos: 0, options: 0, l4 }.frame()
}

fn udp([src, dst]: [&str; 2], [from, to]: [u16; 2]) -> Vec<u8> {
    let l4 = [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 12, 0, 0, 1, 2, 3, 4]].concat();
    Packet { src: ip(src), dst: ip(dst), protocol: UDP, ttl: 64, tos: 0, options: 0, l4 }.frame()
}

/// Where one frame went: the device, the node's kernel, or nowhere for a reason.
fn fate(router: &mut Router, device: IfIndex, frame: &[u8]) -> Result<IfIndex, DropReason> {
    let before = router.drops();
    let sent = router.one(device, frame);
    match sent.as_slice() {
        [(device, _)] => Ok(*device),
        [] => {
            let dropped = router.drops().into_iter().find(|(reason, count)| before.get(reason) != Some(count));
            Err(dropped.expect("a packet ends somewhere").0)
        }
        more => panic!("{} packets for one", more.len()),
    }
}

const DENIED: Result<IfIndex, DropReason> = Err(DropReason::PolicyDeniedHostEndpoint);
const KERNEL: Result<IfIndex, DropReason> = Ok(IfIndex::HOST);

#[test]
fn a_closed_node_keeps_its_failsafe_ports_and_the_answers_to_what_it_asks() {
    for Addresses { node, outside, server, .. } in FAMILIES {
        let mut router = router(&governed("eth0"), Vec::new());
        let to_node = [outside, node];
        assert_eq!(fate(&mut router, UPLINK, &tcp(to_node, [40_000, 8080], SYN)), DENIED);
        assert_eq!(fate(&mut router, UPLINK, &udp(to_node, [40_000, 8080])), DENIED);
        assert_eq!(fate(&mut router, UPLINK, &tcp(to_node, [40_000, 22], SYN)), KERNEL);
        assert_eq!(fate(&mut router, UPLINK, &udp(to_node, [40_000, 68])), KERNEL);
        // The node's own packets left past weir: what opens nothing, and answers from failsafe ports, are let through to it.
        assert_eq!(fate(&mut router, UPLINK, &tcp(to_node, [443, 40_000], SYN_ACK)), KERNEL);
        assert_eq!(fate(&mut router, UPLINK, &tcp(to_node, [443, 40_000], ACK)), KERNEL);
        assert_eq!(fate(&mut router, UPLINK, &udp(to_node, [53, 40_000])), KERNEL);
        // What is forwarded is not the node's.
        assert_eq!(fate(&mut router, UPLINK, &tcp([outside, server], [40_000, 80], SYN)), Ok(SERVER_POD));
        // Nothing of what was for the node made a connection.
        assert_eq!(router.totals().opened, 1);
        router.finish();
    }
}

/// Who the node asks is not forgotten: a policy that denies all before DNAT, as Calico's own guide has it, lets in what opens nothing.
#[test]
fn answers_to_the_node_pass_where_first_packets_do_not_and_what_goes_to_a_listener_is_no_answer() {
    for scope in [PolicyScope::PreDnat, PolicyScope::Normal] {
        for Addresses { node, outside, vip, .. } in FAMILIES {
            let (cluster, to_node) = (governed("eth0"), [outside, node]);
            let open = vec![rule(Action::Allow, Protocol::TCP, Some(9090)), rule(Action::Deny, Protocol::UDP, None)];
            let mut router = router(&cluster, vec![policy(scope, Some(open), None)]);
            assert_eq!(fate(&mut router, UPLINK, &tcp(to_node, [40_000, 9090], SYN)), KERNEL);
            assert_eq!(fate(&mut router, UPLINK, &tcp(to_node, [40_000, 9090], ACK)), KERNEL);
            let closed = vec![rule(Action::Deny, Protocol::TCP, None), rule(Action::Deny, Protocol::UDP, None)];
            router.publish(rules(&cluster, vec![policy(scope, Some(closed), None)]));
            // The connection is cut, as it was opened from outside. Others may be of the node's own making.
            for port in [9090, 9091] {
                assert_eq!(fate(&mut router, UPLINK, &tcp(to_node, [40_000, port], SYN)), DENIED);
            }
            assert_eq!(fate(&mut router, UPLINK, &tcp(to_node, [40_000, 9090], ACK)), DENIED);
            assert_eq!(fate(&mut router, UPLINK, &tcp(to_node, [443, 40_000], SYN_ACK)), KERNEL);
            assert_eq!(fate(&mut router, UPLINK, &tcp(to_node, [443, 40_000], ACK)), KERNEL);
            assert_eq!(fate(&mut router, UPLINK, &udp(to_node, [53, 40_000])), KERNEL);
            assert_eq!(fate(&mut router, UPLINK, &udp(to_node, [54, 40_000])), DENIED);
            // Failsafe ports stay.
            assert_eq!(fate(&mut router, UPLINK, &tcp(to_node, [40_000, 22], ACK)), KERNEL);
            if scope == PolicyScope::PreDnat {
                // What is not the node's own is nobody's answer to it.
                assert_eq!(fate(&mut router, UPLINK, &udp([outside, vip], [53, 53])), DENIED);
                let invalid = Err(DropReason::Invalid);
                assert_eq!(fate(&mut router, UPLINK, &tcp([outside, vip], [443, 40_000], ACK)), invalid);
            }
            router.finish();
        }
    }
}

/// Which address of the node a packet is for makes no difference: groups', broadcast, its routers' anycast, those of its link.
#[test]
fn whatever_address_of_the_node_a_packet_is_for_it_is_judged() {
    // To the kernel by the uplink, as it takes such packets by no other device.
    const BACK: Result<IfIndex, DropReason> = Ok(UPLINK.forwarded());
    let v4 = ["224.0.0.251", "239.1.2.3", "255.255.255.255", "192.168.10.255"];
    let v6 = ["ff02::fb", "ff05::1:3", "fe80::1", "fd00:10::"];
    let open = || vec![policy(PolicyScope::Normal, Some(vec![rule(Action::Allow, Protocol::UDP, Some(5353))]), None)];
    for (outside, addresses) in [("192.168.10.100", v4), ("fd00:10::100", v6), ("fe80::100", v6)] {
        let mut router = router(&governed("eth0"), open());
        router.link_types = vec![LinkType::Multicast];
        if outside.starts_with("fe80") {
            router.link_types = vec![LinkType::Host];
            // Whom the source does not reach is judged all the same.
            assert_eq!(fate(&mut router, UPLINK, &udp([outside, "fd00:10::1"], [40_000, 5354])), DENIED);
        }
        for address in addresses {
            if address == "fe80::1" {
                router.link_types = vec![LinkType::Host];
            }
            let packet = |port| udp([outside, address], [40_000, port]);
            assert_eq!(fate(&mut router, UPLINK, &packet(5353)), BACK, "{outside} {address}");
            assert_eq!(fate(&mut router, UPLINK, &packet(5354)), DENIED, "{outside} {address}");
            // A failsafe port, and an answer of one.
            assert_eq!(fate(&mut router, UPLINK, &packet(68)), BACK, "{outside} {address}");
            assert_eq!(fate(&mut router, UPLINK, &udp([outside, address], [53, 40_000])), BACK, "{outside} {address}");
        }
        assert_eq!(router.totals().opened, 0);
        // It has the uplink's MAC address, from whom the trunk's program knows where it goes; one that has been there comes round no more.
        let mut frame = udp([outside, addresses[0]], [40_000, 5353]);
        let sent = router.one(UPLINK, &frame);
        assert_eq!(sent[0].1[..12], [UPLINK_MAC.0, trunk::target(UPLINK.forwarded()).0].concat());
        assert_eq!(sent[0].1[14..], frame[14..]);
        frame[6..12].copy_from_slice(&trunk::target(UPLINK.forwarded()).0);
        assert_eq!(fate(&mut router, UPLINK, &frame), Err(DropReason::WrongMac));
        router.finish();
    }
    // Who has no address yet asks for one: judged too.
    let mut router = router(&governed("eth0"), open());
    router.link_types = vec![LinkType::Broadcast];
    assert_eq!(fate(&mut router, UPLINK, &udp(["0.0.0.0", "255.255.255.255"], [68, 67])), DENIED);
    assert_eq!(fate(&mut router, UPLINK, &udp(["0.0.0.0", "255.255.255.255"], [68, 5353])), BACK);
    // A pod's is nobody's.
    let pods = udp(["10.1.1.10", "224.0.0.251"], [40_000, 5353]);
    assert_eq!(fate(&mut router, CLIENT_POD, &pods), Err(DropReason::LinkScope));
    router.finish();
    // Where nothing governs the device, all of it is the kernel's.
    let mut router =
        Router::of(&cluster(), rules(&cluster(), Vec::new()), SnatPorts::new(10_000..=20_000, []).unwrap(), 64);
    for address in ["224.0.0.251", "255.255.255.255", "192.168.10.255"] {
        assert_eq!(fate(&mut router, UPLINK, &udp(["192.168.10.100", address], [40_000, 5354])), BACK, "{address}");
    }
    router.finish();
}

#[test]
fn normal_policy_is_for_the_node_alone_and_what_it_allows_is_punted() {
    for Addresses { node, outside, server, .. } in FAMILIES {
        let web = vec![rule(Action::Allow, Protocol::TCP, Some(80))];
        let mut router = router(&governed("eth0"), vec![policy(PolicyScope::Normal, Some(web), None)]);
        assert_eq!(fate(&mut router, UPLINK, &tcp([outside, node], [40_000, 80], SYN)), KERNEL);
        assert_eq!(fate(&mut router, UPLINK, &tcp([outside, node], [40_000, 81], SYN)), DENIED);
        assert_eq!(fate(&mut router, UPLINK, &tcp([outside, server], [40_000, 81], SYN)), Ok(SERVER_POD));
        router.finish();
    }
}

#[test]
fn what_a_host_endpoint_logs_is_told_whether_it_then_decides_or_not() {
    for Addresses { outside, server, vip, .. } in FAMILIES {
        let log = |port| vec![rule(Action::Log, Protocol::UDP, Some(port))];
        let policies = vec![
            policy(PolicyScope::PreDnat, Some(log(53)), None),
            policy(PolicyScope::ApplyOnForward, Some([log(5353), vec![Rule::default()]].concat()), None),
        ];
        let mut router = router(&governed("eth0"), policies);
        assert_eq!(fate(&mut router, UPLINK, &udp([outside, vip], [40_000, 53])), Ok(SERVER_POD));
        let logged = router.logged();
        let seen: Vec<_> = logged
            .iter()
            .map(|one| {
                let policy = &one.rules.policy;
                let name = (policy.endpoint_name(one.entry.endpoint), policy.rule_name(one.entry.rule));
                (name, one.entry.destination, one.entry.judgement.map(|judgement| judgement.allow))
            })
            .collect();
        let before = (("h", "PreDnat rule 1".to_owned()), ip(vip), None);
        let behind = (("h", "ApplyOnForward rule 1".to_owned()), ip(server), Some(true));
        assert_eq!(seen, [before, behind]);
        router.finish();
    }
}

#[test]
fn policy_before_dnat_sees_the_frontend_and_policy_for_what_is_forwarded_the_backend() {
    for Addresses { outside, server, vip, .. } in FAMILIES {
        let deny = |scope, port| {
            let rules = vec![rule(Action::Deny, Protocol::UDP, Some(port)), Rule::default()];
            router(&governed("eth0"), vec![policy(scope, Some(rules), None)])
        };
        for (scope, frontend, backend) in
            [(PolicyScope::PreDnat, DENIED, Ok(SERVER_POD)), (PolicyScope::ApplyOnForward, Ok(SERVER_POD), DENIED)]
        {
            let mut router_of_frontend = deny(scope, 53);
            assert_eq!(
                fate(&mut router_of_frontend, UPLINK, &udp([outside, vip], [40_000, 53])),
                frontend,
                "{scope:?}"
            );
            router_of_frontend.finish();
            let mut router_of_backend = deny(scope, 5353);
            assert_eq!(fate(&mut router_of_backend, UPLINK, &udp([outside, vip], [40_000, 53])), backend, "{scope:?}");
            assert_eq!(
                fate(&mut router_of_backend, UPLINK, &udp([outside, server], [40_000, 5353])),
                DENIED,
                "{scope:?}"
            );
            router_of_backend.finish();
        }
    }
}

#[test]
fn untracked_policy_judges_each_packet_and_makes_no_connection() {
    for Addresses { node, outside, server, .. } in FAMILIES {
        let allow = vec![rule(Action::Allow, Protocol::UDP, Some(7))];
        let answers = vec![from_port(Protocol::UDP, 7)];
        let untracked = policy(PolicyScope::Untracked, Some(allow.clone()), Some(answers));
        let cluster = governed("eth0");
        let mut router = router(&cluster, vec![untracked]);
        assert_eq!(fate(&mut router, UPLINK, &udp([outside, node], [40_000, 7])), KERNEL);
        assert_eq!(fate(&mut router, UPLINK, &udp([outside, server], [40_000, 7])), Ok(SERVER_POD));
        assert_eq!(router.totals().opened, 0);
        // What no rule matches goes on: the node is closed, what is forwarded is tracked.
        assert_eq!(fate(&mut router, UPLINK, &udp([outside, node], [40_000, 8])), DENIED);
        assert_eq!(fate(&mut router, UPLINK, &udp([outside, server], [40_000, 8])), Ok(SERVER_POD));
        assert_eq!(router.totals().opened, 1);
        // Without the way back, nothing comes of it.
        router.publish(rules(&cluster, vec![policy(PolicyScope::Untracked, Some(allow), None)]));
        assert_eq!(fate(&mut router, UPLINK, &udp([outside, node], [40_000, 7])), DENIED);
        // A connection is not asked first: a Deny of untracked policy stops an established one at once.
        let deny = vec![rule(Action::Deny, Protocol::UDP, Some(8))];
        router.publish(rules(&cluster, vec![policy(PolicyScope::Untracked, Some(deny), None)]));
        assert_eq!(fate(&mut router, UPLINK, &udp([outside, server], [40_000, 8])), DENIED);
        router.finish();
    }
}

/// Later fragments have no ports: they go where their first went, to pods too, and whatever connection there is of before.
#[test]
fn untracked_policy_lets_later_fragments_follow_their_first() {
    let piece = |src: &str, dst: &str, id: u8, at: usize, bytes: &[u8], more: bool| {
        let place = (at as u16 / 8) | (u16::from(more) << 13);
        let mut packet = vec![0x45, 0, 0, 20 + bytes.len() as u8, 0, id];
        packet.extend(place.to_be_bytes());
        packet.extend([64, UDP, 0, 0]);
        packet.extend([router::octets(ip(src)), router::octets(ip(dst))].concat());
        let checksum = !router::sum(&packet);
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        [&[0xee; 6][..], &[10, 0, 0, 0, 0, 1, 8, 0], &packet, bytes].concat()
    };
    let Addresses { node, outside, server, vip, .. } = FAMILIES[0];
    let allow = |port| Some(vec![rule(Action::Allow, Protocol::UDP, Some(port))]);
    let cluster = governed("eth0");
    for has_connection in [false, true] {
        let mut router = router(&cluster, Vec::new());
        if has_connection {
            assert_eq!(fate(&mut router, UPLINK, &udp([outside, vip], [40_000, 53])), Ok(SERVER_POD));
            assert_eq!(fate(&mut router, UPLINK, &udp([outside, server], [40_000, 7])), Ok(SERVER_POD));
        }
        let opened = router.totals().opened;
        let untracked = policy(PolicyScope::Untracked, allow(7), Some(vec![from_port(Protocol::UDP, 7)]));
        router.publish(rules(&cluster, vec![untracked]));
        let header = [&40_000_u16.to_be_bytes()[..], &7_u16.to_be_bytes(), &[0, 24, 0, 0], &[1; 8]].concat();
        for (id, dst, expected) in [(1, server, Ok(SERVER_POD)), (2, node, KERNEL)] {
            for in_order in [true, false] {
                let id = 2 * id + u8::from(in_order);
                let (head, tail) =
                    (piece(outside, dst, id, 0, &header, true), piece(outside, dst, id, 16, &[2; 8], false));
                let frames = if in_order { [head, tail] } else { [tail, head] };
                let sent = router.turn(&frames.map(|frame| (UPLINK, frame)));
                let devices: Vec<_> = sent.iter().map(|(device, _)| Ok(*device)).collect();
                assert_eq!(devices, [expected; 2], "to {dst}, in order: {in_order}, connection: {has_connection}");
            }
        }
        assert_eq!(router.totals().opened, opened);
        router.finish();
    }
}

#[test]
fn untracked_policy_leaves_the_straight_way_to_what_does_not_come_by_an_uplink() {
    for Addresses { outside, server, .. } in FAMILIES {
        let untracked = policy(PolicyScope::Untracked, Some(vec![rule(Action::Allow, Protocol::UDP, Some(7))]), None);
        for (policies, straight_from_uplink) in [(vec![untracked], 0), (Vec::new(), 1)] {
            let mut router = router(&governed("eth0"), policies);
            // Padded: shorter ones never go straight.
            let padded = |ends, ports| [&udp(ends, ports)[..], &[0; 60]].concat();
            let there = padded([outside, server], [40_000, 80]);
            let back = padded([server, outside], [80, 40_000]);
            let turns = [(UPLINK, &there, SERVER_POD), (SERVER_POD, &back, UPLINK)];
            for (from, frame, to) in turns {
                assert_eq!(fate(&mut router, from, frame), Ok(to));
            }
            for ((from, frame, to), expected) in turns.into_iter().zip([straight_from_uplink, 1]) {
                let before = router.went_straight();
                assert_eq!(fate(&mut router, from, frame), Ok(to));
                assert_eq!(router.went_straight() - before, expected, "from {from:?}");
            }
            router.finish();
        }
    }
}

#[test]
fn an_established_connection_obeys_a_changed_policy_of_the_host_endpoint_and_no_unrelated_one() {
    for Addresses { outside, server, .. } in FAMILIES {
        let cluster = governed("eth0");
        let open =
            |port| vec![rule(Action::Allow, Protocol::UDP, Some(port)), rule(Action::Allow, Protocol::UDP, Some(80))];
        let forward = |rules| policy(PolicyScope::ApplyOnForward, Some(rules), None);
        let mut router = router(&cluster, vec![forward(open(1))]);
        let (there, back) = (udp([outside, server], [40_000, 80]), udp([server, outside], [80, 40_000]));
        assert_eq!(fate(&mut router, UPLINK, &there), Ok(SERVER_POD));
        assert_eq!(fate(&mut router, SERVER_POD, &back), Ok(UPLINK));
        router.publish(rules(&cluster, vec![forward(open(2))]));
        assert_eq!(fate(&mut router, SERVER_POD, &back), Ok(UPLINK));
        assert_eq!(fate(&mut router, UPLINK, &there), Ok(SERVER_POD));
        router.publish(rules(&cluster, vec![forward(vec![rule(Action::Deny, Protocol::UDP, Some(80))])]));
        assert_eq!(fate(&mut router, UPLINK, &there), DENIED);
        assert_eq!(fate(&mut router, SERVER_POD, &back), DENIED);
        assert_eq!(router.totals().opened, 1);
        router.finish();
    }
}

#[test]
fn an_endpoint_for_all_devices_meets_pods_traffic_and_what_comes_through_tunnels() {
    let deny = || policy(PolicyScope::ApplyOnForward, Some(vec![rule(Action::Deny, Protocol::UDP, None)]), None);
    for (interface, local, through_tunnel) in [("*", DENIED, DENIED), ("eth0", Ok(SERVER_POD), Ok(SERVER_POD))] {
        let mut router = router(&governed(interface), vec![deny()]);
        assert_eq!(fate(&mut router, CLIENT_POD, &udp(["10.1.1.10", "10.1.1.20"], [40_000, 80])), local, "{interface}");
        let inner = udp([FAMILIES[0].remote, FAMILIES[0].server], [40_000, 80]);
        assert_eq!(fate(&mut router, UPLINK, &tunnelled(&inner)), through_tunnel, "{interface}");
        // Of IPv6, which goes into no tunnel, both are the uplink's.
        let direct = udp([FAMILIES[1].remote, FAMILIES[1].server], [40_000, 80]);
        assert_eq!(fate(&mut router, UPLINK, &direct), DENIED, "{interface}");
        router.finish();
    }
}

#[test]
fn who_uses_a_tunnelled_pods_address_without_the_tunnel_comes_to_no_pod() {
    let deny = |scope| policy(scope, Some(vec![rule(Action::Deny, Protocol::UDP, None)]), None);
    let Addresses { node, server, remote, .. } = FAMILIES[0];
    let mut router = router(&governed("eth0"), vec![deny(PolicyScope::ApplyOnForward), deny(PolicyScope::Normal)]);
    // To the node a pod of another node answers like this, so there the uplink's endpoint has its say.
    for (to, denied) in [(node, DENIED), (server, Err(DropReason::SpoofedSource))] {
        let bare = udp([remote, to], [40_000, 80]);
        assert_eq!(fate(&mut router, UPLINK, &bare), denied, "{to}");
        assert!(fate(&mut router, UPLINK, &tunnelled(&bare)).is_ok(), "{to}");
    }
    router.finish();
}

#[test]
fn what_a_pod_sends_to_its_node_is_the_nodes_setting() {
    for (family, client) in FAMILIES.into_iter().zip(["10.1.1.10", "fd00:1:1::10"]) {
        let mut cluster = cluster();
        let frame = tcp([client, family.node], [40_000, 8080], SYN);
        let mut open = router(&cluster, Vec::new());
        assert_eq!(fate(&mut open, CLIENT_POD, &frame), KERNEL);
        open.finish();
        cluster.host_settings.endpoint_to_host = EndpointToHost::Drop;
        let mut closed = router(&cluster, Vec::new());
        let denied = Err(DropReason::PolicyDeniedEndpointToHost);
        assert_eq!(fate(&mut closed, CLIENT_POD, &frame), denied);
        assert_eq!(fate(&mut closed, CLIENT_POD, &tcp([client, family.server], [40_000, 80], SYN)), Ok(SERVER_POD));
        closed.finish();
    }
}

#[test]
fn a_changed_setting_of_the_node_cuts_what_a_pod_has_open_to_it() {
    for (family, client) in FAMILIES.into_iter().zip(["10.1.1.10", "fd00:1:1::10"]) {
        let mut cluster = governed("eth0");
        let mut router = router(&cluster, Vec::new());
        let there = udp([client, family.node], [40_000, 8080]);
        assert_eq!(fate(&mut router, CLIENT_POD, &there), KERNEL);
        assert_eq!(router.totals().opened, 1);
        cluster.host_settings.endpoint_to_host = EndpointToHost::Drop;
        router.publish(rules(&cluster, Vec::new()));
        assert_eq!(fate(&mut router, CLIENT_POD, &there), Err(DropReason::PolicyDeniedEndpointToHost));
        router.finish();
    }
}

#[test]
fn what_the_nodes_kernel_sends_to_other_nodes_pods_is_judged_where_it_opens_something() {
    for Addresses { node, remote, .. } in FAMILIES {
        let deny = vec![rule(Action::Deny, Protocol::TCP, None)];
        // Through a tunnel, an endpoint for all devices is met.
        let mut router = router(&governed("*"), vec![policy(PolicyScope::Normal, None, Some(deny))]);
        assert_eq!(fate(&mut router, IfIndex::HOST, &tcp([node, remote], [40_000, 80], SYN)), DENIED);
        // An answer to who asked past weir.
        assert_eq!(fate(&mut router, IfIndex::HOST, &tcp([node, remote], [10_250, 40_000], SYN_ACK)), Ok(UPLINK));
        router.finish();
    }
}
