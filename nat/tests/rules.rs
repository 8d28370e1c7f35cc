//! The rules of kube-proxy's behaviour, one test each, in both families.

mod common;

use std::net::{Ipv4Addr, Ipv6Addr};

use common::*;
use weir_nat::{
    CompileError, Decision, Endpoint, HostAddresses, Model, ServiceId, ServicePort, ServiceTable, Source, Standing,
    TrafficPolicy,
};
use weir_packet::{DropReason, FlowKey, Ports, Protocol};

use TrafficPolicy::{Cluster, Local};

/// Runs each generic function as a test of IPv4 and of IPv6.
macro_rules! in_both_families {
    ($($name:ident),+ $(,)?) => {
        mod ipv4 { $(#[test] fn $name() { super::$name::<std::net::Ipv4Addr>(); })+ }
        mod ipv6 { $(#[test] fn $name() { super::$name::<std::net::Ipv6Addr>(); })+ }
    };
}

in_both_families! {
    rule_02_each_address_and_port_counts_once,
    rule_02_of_two_listings_the_usable_one_counts,
    rule_03_local_means_this_node_by_name,
    rule_04_ready_backends_or_else_terminating_ones_per_list,
    rule_04_what_is_ready_is_used_whatever_it_serves,
    rule_05_unusable_backends_do_not_exist,
    rule_06_zone_hints_filter_only_if_all_have_them,
    rule_07_node_hints_come_first,
    rule_08_each_kind_of_address_has_its_policy,
    rule_09_pods_and_the_node_short_cut_external_local,
    rule_10_unknown_pods_lose_the_short_cut,
    rule_11_without_backends_everything_is_rejected,
    rule_12_without_local_backends_packets_are_dropped,
    rule_13_masquerade_to_the_cluster_ip,
    rule_14_external_cluster_is_always_masqueraded,
    rule_15_external_local_masquerades_the_node_only,
    rule_16_hairpin_is_decided_after_the_pick,
    rule_17_policies_do_not_change_cluster_ip_masquerade,
    rule_18_source_ranges_guard_load_balancer_ips_only,
    rule_18_source_ranges_are_judged_before_backends,
    rule_19_the_load_balancer_ip_itself_passes_with_the_node,
    rule_22_node_ports_are_open_on_chosen_local_addresses,
    rule_22b_host_ports_are_open_on_the_nodes_addresses,
    rule_22b_only_the_nodes_own_addresses_have_host_ports,
    rule_22b_whose_port_it_is,
    rule_22b_connections_end_with_the_pod,
    rule_24_other_ports_and_unallocated_addresses,
    rule_24_packets_without_ports,
    rule_25_without_cluster_ip_nothing_is_proxied,
    rule_27_protocols_are_told_apart,
    frontends_that_two_services_claim,
    owned_addresses_leave_the_node_its_own,
    connections_keep_backends_that_are_listed,
    a_terminating_backend_drains_where_a_client_would_come_to_another,
    connections_keep_backends_of_slices_that_no_service_serves,
    stamps_survive_recompilation,
}

fn rule_02_each_address_and_port_counts_once<A: Carried>() {
    let second_port = Endpoint { port: 80, ..on("", "10.1.0.1") };
    let model = world(vec![on("", "10.1.0.1"), on("", "10.1.0.2"), on("", "10.1.0.1"), second_port]);
    let all = ["10.1.0.1:80", "10.1.0.1:8080", "10.1.0.2:8080"];
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&all, false));
}

fn rule_02_of_two_listings_the_usable_one_counts<A: Carried>() {
    for order in [[0, 1], [1, 0]] {
        let twice = [unready(on("", "10.1.0.1")), on("", "10.1.0.1")];
        let model = world(order.map(|index| twice[index].clone()).to_vec());
        assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&["10.1.0.1:8080"], false));
    }
}

fn rule_03_local_means_this_node_by_name<A: Carried>() {
    let model = world(vec![on("node-a", "10.1.0.1"), on("node-b", "10.1.0.2"), on("", "10.1.0.3")]);
    let model = policies(model, Local, Cluster);
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&["10.1.0.1:8080"], false));
}

fn rule_04_ready_backends_or_else_terminating_ones_per_list<A: Carried>() {
    let ready_remote = on("node-b", "10.1.0.2");
    let leaving = [terminating(on("node-a", "10.1.0.1")), terminating(on("node-b", "10.1.0.3"))];
    let mixed = world([&leaving[..], &[ready_remote]].concat());
    // The local list has no ready backend though the cluster list has one.
    let model = policies(mixed, Cluster, Local);
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&["10.1.0.2:8080"], false));
    assert_eq!(tcp::<A>(&model, OUTSIDE, (LOAD_BALANCER_IP, 80)), forward(&["10.1.0.1:8080"], false));
    let model = policies(world(leaving.to_vec()), Cluster, Local);
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&["10.1.0.1:8080", "10.1.0.3:8080"], false));
}

/// publishNotReadyAddresses gives `ready: true` of pods that do not serve, and of those that terminate.
fn rule_04_what_is_ready_is_used_whatever_it_serves<A: Carried>() {
    let unserving = Endpoint { serving: false, ..on("node-a", "10.1.0.1") };
    let leaving = Endpoint { serving: false, terminating: true, ..on("node-b", "10.1.0.2") };
    let both = ["10.1.0.1:8080", "10.1.0.2:8080"];
    let model = policies(world(vec![unserving, leaving]), Cluster, Local);
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&both, false));
    assert_eq!(tcp::<A>(&model, OUTSIDE, (LOAD_BALANCER_IP, 80)), forward(&both[..1], false));
}

fn rule_05_unusable_backends_do_not_exist<A: Carried>() {
    let gone = Endpoint { ready: false, serving: false, terminating: true, ..on("node-b", "10.1.0.1") };
    let not_ready = Endpoint { ready: false, serving: true, terminating: false, ..on("node-b", "10.1.0.2") };
    let not_serving = Endpoint { ready: false, serving: false, ..on("node-b", "10.1.0.3") };
    for endpoint in [gone, not_ready, not_serving, unready(on("node-b", "10.1.0.4"))] {
        // With policy Local a backend that counted as existing would make this a drop.
        let model = policies(world(vec![endpoint.clone()]), Local, Local);
        let reject = Outcome::Reject(DropReason::NoBackend);
        assert_eq!(tcp::<A>(&model, OUTSIDE, (CLUSTER_IP, 80)), reject, "{endpoint:?}");
        assert_eq!(tcp::<A>(&model, OUTSIDE, (NODE, 3001)), reject, "{endpoint:?}");
        let model = world(vec![endpoint, on("node-b", "10.1.0.9")]);
        assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&["10.1.0.9:8080"], false));
    }
}

fn rule_06_zone_hints_filter_only_if_all_have_them<A: Carried>() {
    let here = zones(on("node-a", "10.1.0.1"), &["zone-b", "zone-a"]);
    let there = zones(on("node-b", "10.1.0.2"), &["zone-b"]);
    let unhinted = on("node-b", "10.1.0.3");
    let both = ["10.1.0.1:8080", "10.1.0.2:8080"];
    let mut model = world(vec![here.clone(), there.clone()]);
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&both, false), "the node has no zone");
    model.zone = Some(String::new());
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&both, false), "the node has no zone");
    model.zone = Some("zone-a".into());
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&both[..1], false));
    model.zone = Some("zone-c".into());
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&both, false), "none names this zone");

    model.zone = Some("zone-a".into());
    port(&mut model, 0).endpoints.push(unhinted.clone());
    let three = ["10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:8080"];
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&three, false), "one has no hint");
    port(&mut model, 0).endpoints[2] = unready(unhinted);
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&three[..1], false), "only ready ones are asked");
    // Where none is ready, the terminating ones are all used.
    port(&mut model, 0).endpoints = vec![terminating(here), terminating(there)];
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&both, false));
}

fn rule_07_node_hints_come_first<A: Carried>() {
    let hint = |model: &mut Model, index: usize, names: &[&str]| {
        let endpoint = &mut port(model, 0).endpoints[index];
        *endpoint = nodes(endpoint.clone(), names);
    };
    let hinted = |address, node, zone| nodes(zones(on("node-a", address), &[zone]), &[node]);
    let endpoints = vec![hinted("10.1.0.1", "node-a", "zone-b"), hinted("10.1.0.2", "node-b", "zone-a")];
    let mut model = Model { zone: Some("zone-a".into()), ..policies(world(endpoints), Cluster, Local) };
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&["10.1.0.1:8080"], false));
    let both = ["10.1.0.1:8080", "10.1.0.2:8080"];
    assert_eq!(tcp::<A>(&model, OUTSIDE, (NODE, 3001)), forward(&both, false), "the local list has no hints");
    hint(&mut model, 0, &["node-c"]);
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&["10.1.0.2:8080"], false), "then zones");
    hint(&mut model, 1, &[]);
    hint(&mut model, 0, &["node-a"]);
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&["10.1.0.2:8080"], false), "not all have one");
}

fn two_nodes() -> Model {
    world(vec![on("node-a", "10.1.0.1"), on("node-b", "10.1.0.2")])
}
const BOTH: [&str; 2] = ["10.1.0.1:8080", "10.1.0.2:8080"];
const HERE: [&str; 1] = ["10.1.0.1:8080"];

fn rule_08_each_kind_of_address_has_its_policy<A: Carried>() {
    let model = policies(two_nodes(), Local, Cluster);
    for source in SOURCES {
        assert_eq!(tcp::<A>(&model, source, (CLUSTER_IP, 80)), forward(&HERE, source != POD));
        for external in EXTERNALS {
            assert_eq!(tcp::<A>(&model, source, external), forward(&BOTH, true));
        }
    }
    let model = policies(two_nodes(), Cluster, Local);
    for source in SOURCES {
        assert_eq!(tcp::<A>(&model, source, (CLUSTER_IP, 80)), forward(&BOTH, source != POD));
    }
    for external in EXTERNALS {
        assert_eq!(tcp::<A>(&model, OUTSIDE, external), forward(&HERE, false));
    }
}

fn rule_09_pods_and_the_node_short_cut_external_local<A: Carried>() {
    for internal in [Cluster, Local] {
        let model = policies(two_nodes(), internal, Local);
        for external in EXTERNALS {
            assert_eq!(tcp::<A>(&model, POD, external), forward(&BOTH, false));
            assert_eq!(tcp::<A>(&model, NODE, external), forward(&BOTH, true));
            assert_eq!(tcp::<A>(&model, SECOND_NODE_ADDRESS, external), forward(&BOTH, true));
            assert_eq!(tcp::<A>(&model, "127.0.0.1", external), forward(&BOTH, true));
            assert_eq!(tcp::<A>(&model, OUTSIDE, external), forward(&HERE, false));
        }
    }
    // An address of the node inside the pod range, as a tunnel device has, is a pod's.
    let mut model = policies(two_nodes(), Cluster, Local);
    model.local_addresses.push("10.0.7.0".parse().expect("an address"));
    assert_eq!(tcp::<A>(&model, "10.0.7.0", (EXTERNAL_IP, 80)), forward(&BOTH, false));
}

fn rule_10_unknown_pods_lose_the_short_cut<A: Carried>() {
    let model = Model { pod_cidrs: Vec::new(), ..policies(two_nodes(), Cluster, Local) };
    for external in EXTERNALS {
        assert_eq!(tcp::<A>(&model, POD, external), forward(&HERE, false));
        assert_eq!(tcp::<A>(&model, NODE, external), forward(&BOTH, true));
    }
}

fn rule_11_without_backends_everything_is_rejected<A: Carried>() {
    for (internal, external) in [(Cluster, Cluster), (Local, Cluster), (Cluster, Local), (Local, Local)] {
        let model = policies(world(Vec::new()), internal, external);
        for source in SOURCES {
            for destination in EXTERNALS.into_iter().chain([(CLUSTER_IP, 80)]) {
                assert_eq!(tcp::<A>(&model, source, destination), Outcome::Reject(DropReason::NoBackend));
            }
        }
    }
}

fn rule_12_without_local_backends_packets_are_dropped<A: Carried>() {
    let drop = Outcome::Drop(DropReason::NoLocalBackend);
    for remote in [on("node-b", "10.1.0.2"), terminating(on("node-b", "10.1.0.2"))] {
        let model = policies(world(vec![remote]), Local, Local);
        for source in SOURCES {
            assert_eq!(tcp::<A>(&model, source, (CLUSTER_IP, 80)), drop);
        }
        for external in EXTERNALS {
            assert_eq!(tcp::<A>(&model, OUTSIDE, external), drop);
            assert_eq!(tcp::<A>(&model, POD, external), forward(&["10.1.0.2:8080"], false), "the short cut");
        }
    }
}

fn rule_13_masquerade_to_the_cluster_ip<A: Carried>() {
    let known = two_nodes();
    let unknown = Model { pod_cidrs: Vec::new(), ..two_nodes() };
    for source in SOURCES {
        assert_eq!(tcp::<A>(&known, source, (CLUSTER_IP, 80)), forward(&BOTH, source != POD));
        assert_eq!(tcp::<A>(&unknown, source, (CLUSTER_IP, 80)), forward(&BOTH, false));
        for model in [&known, &unknown] {
            let model = Model { masquerade_all: true, ..model.clone() };
            assert_eq!(tcp::<A>(&model, source, (CLUSTER_IP, 80)), forward(&BOTH, true));
        }
    }
}

fn rule_14_external_cluster_is_always_masqueraded<A: Carried>() {
    for pod_cidrs in [nets(&["10.0.0.0/8"]), Vec::new()] {
        for masquerade_all in [false, true] {
            let model = Model { pod_cidrs: pod_cidrs.clone(), masquerade_all, ..two_nodes() };
            for source in SOURCES {
                for external in EXTERNALS {
                    assert_eq!(tcp::<A>(&model, source, external), forward(&BOTH, true));
                }
            }
        }
    }
}

fn rule_15_external_local_masquerades_the_node_only<A: Carried>() {
    for masquerade_all in [false, true] {
        let model = Model { masquerade_all, ..policies(two_nodes(), Cluster, Local) };
        for external in EXTERNALS {
            assert_eq!(tcp::<A>(&model, OUTSIDE, external), forward(&HERE, false));
            assert_eq!(tcp::<A>(&model, POD, external), forward(&BOTH, false));
            assert_eq!(tcp::<A>(&model, NODE, external), forward(&BOTH, true));
        }
    }
}

fn rule_16_hairpin_is_decided_after_the_pick<A: Carried>() {
    for policy in [Cluster, Local] {
        let model = policies(two_nodes(), Cluster, policy);
        let table = ServiceTable::compile(&carried::<A>(&model)).expect("the model compiles");
        for destination in [(CLUSTER_IP, 80), (EXTERNAL_IP, 80)] {
            let key = key::<A>(Protocol::TCP, "10.1.0.1", destination.0, destination.1);
            let mut seen = [false; 2];
            for number in [0, u64::MAX] {
                let decision = decide::<A>(&table, &key, &mut || number);
                let Decision::Translate { backend, masquerade, .. } = decision else { panic!("{decision:?}") };
                let itself = backend.address == key.src;
                let always = destination.0 == EXTERNAL_IP && policy == Cluster;
                assert_eq!(masquerade, itself || always);
                seen[usize::from(itself)] = true;
            }
            assert_eq!(seen, [true; 2], "both backends were picked");
        }
    }
}

fn rule_17_policies_do_not_change_cluster_ip_masquerade<A: Carried>() {
    for internal in [Cluster, Local] {
        for external in [Cluster, Local] {
            let model = policies(two_nodes(), internal, external);
            for source in SOURCES {
                let outcome = tcp::<A>(&model, source, (CLUSTER_IP, 80));
                assert!(matches!(outcome, Outcome::Forward(_, masquerade) if masquerade == (source != POD)));
            }
        }
    }
}

fn rule_18_source_ranges_guard_load_balancer_ips_only<A: Carried>() {
    let mut model = two_nodes();
    port(&mut model, 0).source_ranges = nets(&["203.0.113.128/25", "100.64.0.0/10"]);
    let drop = Outcome::Drop(DropReason::SourceRange);
    for source in SOURCES {
        assert_eq!(tcp::<A>(&model, source, (LOAD_BALANCER_IP, 80)), drop);
        for other in [(NODE, 3001), (EXTERNAL_IP, 80), (CLUSTER_IP, 80)] {
            assert!(matches!(tcp::<A>(&model, source, other), Outcome::Forward(..)));
        }
    }
    for source in ["203.0.113.129", "100.127.255.255"] {
        assert_eq!(tcp::<A>(&model, source, (LOAD_BALANCER_IP, 80)), forward(&BOTH, true));
    }
}

fn rule_18_source_ranges_are_judged_before_backends<A: Carried>() {
    let mut model = world(Vec::new());
    port(&mut model, 0).source_ranges = nets(&["100.64.0.0/10"]);
    assert_eq!(tcp::<A>(&model, OUTSIDE, (LOAD_BALANCER_IP, 80)), Outcome::Drop(DropReason::SourceRange));
    assert_eq!(tcp::<A>(&model, "100.64.0.1", (LOAD_BALANCER_IP, 80)), Outcome::Reject(DropReason::NoBackend));
}

fn rule_19_the_load_balancer_ip_itself_passes_with_the_node<A: Carried>() {
    let mut model = two_nodes();
    port(&mut model, 0).source_ranges = nets(&["192.168.0.0/24"]);
    assert_eq!(tcp::<A>(&model, LOAD_BALANCER_IP, (LOAD_BALANCER_IP, 80)), forward(&BOTH, true));
    assert_eq!(tcp::<A>(&model, NODE, (LOAD_BALANCER_IP, 80)), forward(&BOTH, true));
    port(&mut model, 0).source_ranges = nets(&["192.168.5.0/24"]);
    let drop = Outcome::Drop(DropReason::SourceRange);
    assert_eq!(tcp::<A>(&model, LOAD_BALANCER_IP, (LOAD_BALANCER_IP, 80)), drop);
}

#[test]
fn rule_20_fields_of_another_family_are_ignored() {
    let mut model = world(vec![on("node-a", "10.1.0.1"), on("node-a", "fd00::1")]);
    let service = port(&mut model, 0);
    service.external_ips = ips(&[EXTERNAL_IP, "2001:db8::7"]);
    service.load_balancer_ips = ips(&[LOAD_BALANCER_IP, "2001:db8::8"]);
    service.source_ranges = nets(&["2001:db8::/32"]);
    model.local_addresses.extend(ips(&["2001:db8::1"]));
    // The range of the other family guards nothing.
    assert_eq!(tcp::<Ipv4Addr>(&model, OUTSIDE, (LOAD_BALANCER_IP, 80)), forward(&HERE, true));
    let table = ServiceTable::compile(&model).expect("the model compiles");
    for (address, port) in [("2001:db8::7", 80), ("2001:db8::8", 80), ("2001:db8::1", 3001)] {
        let dst: Ipv6Addr = address.parse().expect("an address");
        let src = "2600::1".parse().expect("an address");
        let key = FlowKey { src, dst, ports: Ports::new(40000, port), protocol: Protocol::TCP };
        assert_eq!(decide::<Ipv6Addr>(&table, &key, &mut || 1 << 62), Decision::NotAService, "{address}");
        assert!(!table.services::<Ipv6Addr>().claims(&key));
    }
}

#[test]
fn rule_27_dual_stack_services_use_backends_of_the_frontends_family() {
    let mut model = world(vec![on("node-a", "10.1.0.1"), on("node-a", "fd00::a01:2")]);
    port(&mut model, 0).cluster_ips = ips(&[CLUSTER_IP, "fd00::ac1e:29"]);
    model.local_addresses.extend(ips(&["fd00::c0a8:2"]));
    let table = ServiceTable::compile(&model).expect("the model compiles");
    for (source, masquerade) in [(POD, false), (OUTSIDE, true)] {
        let key4 = key::<Ipv4Addr>(Protocol::TCP, source, CLUSTER_IP, 80);
        assert_eq!(outcome(&table, &key4), forward(&HERE, masquerade));
        // Only the IPv4 pods are known: what is unknown is judged per family.
        let key6 = FlowKey {
            src: "fd00::99".parse::<Ipv6Addr>().expect("an address"),
            dst: "fd00::ac1e:29".parse().expect("an address"),
            ports: Ports::new(40000, 80),
            protocol: Protocol::TCP,
        };
        assert_eq!(outcome(&table, &key6), forward(&["10.1.0.2:8080"], false));
    }
}

fn rule_22_node_ports_are_open_on_chosen_local_addresses<A: Carried>() {
    let model = two_nodes();
    let served = forward(&BOTH, true);
    for (addresses, first, second) in [
        (&[][..], true, true),
        (&["192.168.0.2/32"][..], true, false),
        (&["192.168.0.0/24", "192.168.1.0/24"][..], true, true),
        (&["0.0.0.0/0"][..], true, true),
        (&["10.0.0.0/8"][..], false, false),
    ] {
        let model = Model { node_port_addresses: nets(addresses), ..model.clone() };
        let expect = |open| if open { served.clone() } else { Outcome::Pass };
        assert_eq!(tcp::<A>(&model, OUTSIDE, (NODE, 3001)), expect(first), "{addresses:?}");
        assert_eq!(tcp::<A>(&model, OUTSIDE, (SECOND_NODE_ADDRESS, 3001)), expect(second), "{addresses:?}");
        assert_eq!(tcp::<A>(&model, "127.0.0.1", ("127.0.0.1", 3001)), Outcome::Pass, "never on loopback");
        assert_eq!(tcp::<A>(&model, OUTSIDE, ("192.168.0.3", 3001)), Outcome::Pass, "another node's");
        assert_eq!(tcp::<A>(&model, OUTSIDE, (NODE, 3002)), Outcome::Pass);
        assert_eq!(tcp::<A>(&model, OUTSIDE, (NODE, 80)), Outcome::Pass, "the service's own port");
        assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 3001)), Outcome::Reject(DropReason::UnpublishedPort));
    }
}

#[test]
fn rule_22_families_are_judged_by_their_own_entries() {
    let mut model = two_nodes();
    model.node_port_addresses = nets(&["192.168.0.2/32"]);
    port(&mut model, 0).cluster_ips = ips(&[CLUSTER_IP, "fd00:172::1"]);
    port(&mut model, 0).endpoints.push(on("", "fd00::1"));
    model.local_addresses.extend(ips(&["2001:db8::2"]));
    let table = ServiceTable::compile(&model).expect("the model compiles");
    let key = FlowKey {
        src: "2600::1".parse::<Ipv6Addr>().expect("an address"),
        dst: "2001:db8::2".parse().expect("an address"),
        ports: Ports::new(40000, 3001),
        protocol: Protocol::TCP,
    };
    assert!(matches!(decide(&table, &key, &mut || 1 << 62), Decision::Translate { masquerade: true, .. }));
}

/// A host port of the pod 10.1.0.1.
fn with_host_port(on: HostAddresses) -> Model {
    let mut model = world(Vec::new());
    model.services = vec![host_port("shop/ingress", 8443, on, "10.1.0.1")].into();
    model
}

fn rule_22b_host_ports_are_open_on_the_nodes_addresses<A: Carried>() {
    let pod = || forward(&["10.1.0.1:8080"], false);
    let one = |address: &str| HostAddresses::One(v4(address).into());
    for (on, first, second) in [
        (HostAddresses::All, true, true),
        (HostAddresses::Ipv4, true, true),
        (one(NODE), true, false),
        (one(SECOND_NODE_ADDRESS), false, true),
        (one("127.0.0.1"), false, false),
    ] {
        // nodePortAddresses are about node ports.
        for node_port_addresses in [nets(&[]), nets(&["10.0.0.0/8"])] {
            let model = Model { node_port_addresses, ..with_host_port(on) };
            let expect = |open| if open { pod() } else { Outcome::Pass };
            for source in SOURCES {
                assert_eq!(tcp::<A>(&model, source, (NODE, 8443)), expect(first), "{on:?} from {source}");
                assert_eq!(tcp::<A>(&model, source, (SECOND_NODE_ADDRESS, 8443)), expect(second), "{on:?}");
                assert_eq!(tcp::<A>(&model, source, (NODE, 8080)), Outcome::Pass, "the container's own port");
                assert_eq!(tcp::<A>(&model, source, ("192.168.0.3", 8443)), Outcome::Pass, "another node's");
            }
            let on_loopback = expect(on == one("127.0.0.1"));
            assert_eq!(tcp::<A>(&model, "127.0.0.1", ("127.0.0.1", 8443)), on_loopback, "{on:?}");
            let table = ServiceTable::compile(&carried::<A>(&model)).expect("the model compiles");
            assert_eq!(outcome(&table, &key::<A>(Protocol::UDP, OUTSIDE, NODE, 8443)), Outcome::Pass);
            let hairpin = decide::<A>(&table, &key(Protocol::TCP, "10.1.0.1", NODE, 8443), &mut || 0);
            let is_masqueraded = matches!(hairpin, Decision::Translate { masquerade: true, .. });
            assert_eq!(is_masqueraded, first, "{on:?}: {hairpin:?}");
            let taken = if on == one("127.0.0.1") { vec![] } else { vec![(Protocol::TCP, 8443)] };
            assert_eq!(table.node_ports().collect::<Vec<_>>(), taken);
            assert_eq!(table.owned_addresses().count(), 0, "the node's own addresses stay its own");
            let own = [(NODE, first), (SECOND_NODE_ADDRESS, second), ("127.0.0.1", on == one("127.0.0.1"))];
            let mut own: Vec<_> =
                own.into_iter().filter(|(_, open)| *open).map(|(at, _)| ip::<A>(at).to_ip()).collect();
            own.sort_unstable();
            assert_eq!(table.own_frontends(), own.iter().map(|at| (*at, Protocol::TCP, 8443)).collect::<Vec<_>>());
        }
    }
    // Of the other family, or of one that the pod has no address of.
    let other = |v6: HostAddresses| ServiceTable::compile(&with_host_port(v6)).expect("the model compiles");
    for on in [HostAddresses::Ipv6, HostAddresses::One("fd00::1".parse().expect("an address"))] {
        assert_eq!(outcome(&other(on), &key::<Ipv4Addr>(Protocol::TCP, OUTSIDE, NODE, 8443)), Outcome::Pass);
    }
    assert_eq!(
        outcome(&other(HostAddresses::All), &key::<Ipv6Addr>(Protocol::TCP, OUTSIDE, NODE, 8443)),
        Outcome::Pass
    );
}

/// Whoever may create a pod writes its `hostIP`: another pod's address, the cloud's metadata service, another node's, anybody's.
fn rule_22b_only_the_nodes_own_addresses_have_host_ports<A: Carried>() {
    for elsewhere in ["10.0.0.7", "10.1.0.1", "169.254.169.254", "192.168.0.3", OUTSIDE] {
        let mut model = with_host_port(HostAddresses::One(v4(elsewhere).into()));
        for source in SOURCES {
            assert_eq!(tcp::<A>(&model, source, (elsewhere, 8443)), Outcome::Pass, "{elsewhere} from {source}");
        }
        let table = ServiceTable::compile(&carried::<A>(&model)).expect("the model compiles");
        assert_eq!((table.node_ports().count(), table.own_frontends().len()), (0, 0), "{elsewhere}");
        assert_eq!(table.owned_addresses().count(), 0, "{elsewhere}");
        // It may become the node's.
        model.local_addresses.push(v4(elsewhere).into());
        assert_eq!(tcp::<A>(&model, OUTSIDE, (elsewhere, 8443)), forward(&["10.1.0.1:8080"], false), "{elsewhere}");
    }
}

fn rule_22b_whose_port_it_is<A: Carried>() {
    // A service's node port comes before host ports, wherever they stand; of two host ports the first has it.
    let mut model = world(vec![on("node-b", "10.66.0.1")]);
    let older = host_port("shop/older", 3001, HostAddresses::All, "10.1.0.1");
    model.services.insert(0, older);
    model.services.push(host_port("shop/older", 8443, HostAddresses::One(v4(NODE).into()), "10.1.0.1"));
    model.services.push(host_port("shop/younger", 8443, HostAddresses::All, "10.1.0.2"));
    assert_eq!(tcp::<A>(&model, OUTSIDE, (NODE, 3001)), forward(&["10.66.0.1:8080"], true));
    assert_eq!(tcp::<A>(&model, OUTSIDE, (NODE, 8443)), forward(&["10.1.0.1:8080"], false));
    assert_eq!(tcp::<A>(&model, OUTSIDE, (SECOND_NODE_ADDRESS, 8443)), forward(&["10.1.0.2:8080"], false));
    let table = ServiceTable::compile(&carried::<A>(&model)).expect("the model compiles");
    let mut lost: Vec<_> = table.conflicts().iter().map(|one| (one.address, one.winner, one.loser)).collect();
    lost.sort_unstable();
    let at = |address, winner, loser| (ip::<A>(address).to_ip(), ServiceId(winner), ServiceId(loser));
    assert_eq!(lost, [at(NODE, 1, 0), at(NODE, 2, 3), at(SECOND_NODE_ADDRESS, 1, 0)]);
    // Where the node port is not open, the host port is.
    model.node_port_addresses = nets(&["192.168.1.2/32"]);
    assert_eq!(tcp::<A>(&model, OUTSIDE, (NODE, 3001)), forward(&["10.1.0.1:8080"], false));
    assert_eq!(tcp::<A>(&model, OUTSIDE, (SECOND_NODE_ADDRESS, 3001)), forward(&["10.66.0.1:8080"], true));
}

#[test]
fn rule_22b_where_host_ports_meet() {
    use HostAddresses::{All, Ipv4, Ipv6, One};
    let one = |text: &str| One(text.parse().expect("an address"));
    let [v4, v6, loopback] = ["192.0.2.1", "2001:db8::1", "127.0.0.1"].map(one);
    for (a, b, meet) in [
        (All, All, true),
        (All, Ipv4, true),
        (Ipv4, Ipv6, false),
        (All, v4, true),
        (Ipv6, v4, false),
        (Ipv6, v6, true),
        (v4, v4, true),
        (v4, one("192.0.2.2"), false),
        (All, loopback, false),
        (loopback, loopback, true),
    ] {
        assert_eq!((a.overlaps(b), b.overlaps(a)), (meet, meet), "{a:?} {b:?}");
    }
    // Sockets of the node: which of them get what comes to a host port there.
    for (on, bound, meet) in [
        (All, "0.0.0.0", true),
        (All, "::", true),
        (All, "192.0.2.9", true),
        (All, "127.0.0.53", false),
        (Ipv4, "::", true),
        (Ipv4, "0.0.0.0", true),
        (Ipv4, "2001:db8::1", false),
        (Ipv6, "0.0.0.0", false),
        (Ipv6, "2001:db8::1", true),
        (v4, "0.0.0.0", true),
        (v4, "::", true),
        (v4, "192.0.2.1", true),
        (v4, "192.0.2.2", false),
        (v4, "2001:db8::1", false),
        (v6, "0.0.0.0", false),
        (loopback, "0.0.0.0", true),
        (loopback, "127.0.0.1", true),
        (loopback, "192.0.2.1", false),
    ] {
        assert_eq!(on.includes_socket_at(bound.parse().expect("an address")), meet, "{on:?} {bound}");
    }
    let of = |text: Option<&str>| HostAddresses::of_host_ip(text.map(|text| text.parse().expect("an address")));
    assert_eq!([of(None), of(Some("0.0.0.0")), of(Some("::")), of(Some("192.0.2.1"))], [All, Ipv4, Ipv6, v4]);
}

fn rule_22b_connections_end_with_the_pod<A: Carried>() {
    let still = |model: &Model, protocol| {
        let table = ServiceTable::compile(&carried::<A>(model)).expect("the model compiles");
        table.services::<A>().standing(&key(protocol, OUTSIDE, NODE, 8443), ip("10.1.0.1"), 8080) == Standing::Stays
    };
    for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
        let mut model = with_host_port(HostAddresses::All);
        port(&mut model, 0).protocol = protocol;
        assert!(still(&model, protocol));
        let mut successor = model.clone();
        successor.services = vec![host_port("shop/next", 8443, HostAddresses::All, "10.1.0.2")].into();
        port(&mut successor, 0).protocol = protocol;
        assert!(!still(&successor, protocol), "another pod has the port");
        model.services.clear();
        assert!(!still(&model, protocol), "nobody has the port");
    }
}

fn rule_24_other_ports_and_unallocated_addresses<A: Carried>() {
    let model = two_nodes();
    for source in SOURCES {
        let reject = Outcome::Reject(DropReason::UnpublishedPort);
        assert_eq!(tcp::<A>(&model, source, (CLUSTER_IP, 81)), reject);
        let drop = Outcome::Drop(DropReason::UnallocatedServiceIp);
        assert_eq!(tcp::<A>(&model, source, ("172.30.0.42", 80)), drop);
        for (address, port) in [("172.31.0.1", 80), (EXTERNAL_IP, 81), (LOAD_BALANCER_IP, 81), ("10.1.0.1", 8080)] {
            assert_eq!(tcp::<A>(&model, source, (address, port)), Outcome::Pass);
        }
    }
    let model = Model { service_cidrs: Vec::new(), ..model };
    assert_eq!(tcp::<A>(&model, POD, ("172.30.0.42", 80)), Outcome::Pass, "the ranges are unknown");
}

fn rule_24_packets_without_ports<A: Carried>() {
    let table = ServiceTable::compile(&carried::<A>(&two_nodes())).expect("the model compiles");
    // The echo type stands where others have the port: it must not match a service on port 8.
    for (protocol, port) in [(A::ICMP, 8), (A::ICMP, 80), (Protocol(47), 0)] {
        let outcome_at = |dst| outcome(&table, &key::<A>(protocol, POD, dst, port));
        assert_eq!(outcome_at(CLUSTER_IP), Outcome::Reject(DropReason::UnpublishedPort));
        assert_eq!(outcome_at("172.30.9.9"), Outcome::Drop(DropReason::UnallocatedServiceIp));
        for address in [EXTERNAL_IP, LOAD_BALANCER_IP, NODE, "10.1.0.1"] {
            assert_eq!(outcome_at(address), Outcome::Pass);
        }
    }
}

fn rule_25_without_cluster_ip_nothing_is_proxied<A: Carried>() {
    let mut model = two_nodes();
    port(&mut model, 0).cluster_ips.clear();
    for destination in EXTERNALS {
        assert_eq!(tcp::<A>(&model, OUTSIDE, destination), Outcome::Pass);
    }
    assert_eq!(ServiceTable::compile(&model).expect("the model compiles").node_ports().count(), 0);
}

fn rule_27_protocols_are_told_apart<A: Carried>() {
    let mut model = world(vec![on("", "10.1.0.1")]);
    for (protocol, backend) in [(Protocol::UDP, "10.1.0.2"), (Protocol::SCTP, "10.1.0.3")] {
        let service = &model.services[0];
        let more = ServicePort { protocol, endpoints: vec![on("", backend)], ..ServicePort::clone(service) };
        model.services.push(more.into());
    }
    let table = ServiceTable::compile(&carried::<A>(&model)).expect("the model compiles");
    for (protocol, backend) in
        [(Protocol::TCP, "10.1.0.1:8080"), (Protocol::UDP, "10.1.0.2:8080"), (Protocol::SCTP, "10.1.0.3:8080")]
    {
        for (address, port) in EXTERNALS {
            assert_eq!(outcome(&table, &key::<A>(protocol, OUTSIDE, address, port)), forward(&[backend], true));
        }
    }
    assert_eq!(
        table.node_ports().collect::<Vec<_>>(),
        [(Protocol::TCP, 3001), (Protocol::UDP, 3001), (Protocol::SCTP, 3001)]
    );
}

fn frontends_that_two_services_claim<A: Carried>() {
    let mut model = two_nodes();
    let other = ServicePort {
        name: "beta/thief".into(),
        cluster_ips: ips(&["172.30.0.99"]),
        external_ips: ips(&[CLUSTER_IP, LOAD_BALANCER_IP, NODE]),
        load_balancer_ips: Vec::new(),
        node_port: Some(80),
        endpoints: vec![on("", "10.66.0.1")],
        ..ServicePort::clone(&model.services[0])
    };
    // The kind of address decides, not the order.
    model.services.insert(0, other.into());
    assert_eq!(tcp::<A>(&model, POD, (CLUSTER_IP, 80)), forward(&BOTH, false));
    assert_eq!(tcp::<A>(&model, POD, (LOAD_BALANCER_IP, 80)), forward(&BOTH, true));
    let table = ServiceTable::compile(&carried::<A>(&model)).expect("the model compiles");
    let lost: Vec<_> = table.conflicts().iter().map(|one| (one.address, one.port, one.winner, one.loser)).collect();
    let (thief, web) = (ServiceId(0), ServiceId(1));
    let lost_at = |address| (ip::<A>(address).to_ip(), 80, web, thief);
    assert_eq!(lost, [lost_at(CLUSTER_IP), lost_at(LOAD_BALANCER_IP)]);
    assert_eq!(table.service_name(thief), "beta/thief");
    assert_eq!(table.service_name(web), "alpha/web:http");
    assert_eq!(table.origin(web), 9);
    // Within a kind the first has it.
    port(&mut model, 1).external_ips = ips(&[NODE]);
    assert_eq!(tcp::<A>(&model, POD, (NODE, 80)), forward(&["10.66.0.1:8080"], true));
}

fn owned_addresses_leave_the_node_its_own<A: Carried>() {
    let mut model = two_nodes();
    // As load balancers of some clouds do it: the address is put on the node's loopback device too.
    model.local_addresses.extend(ips(&[LOAD_BALANCER_IP]));
    let table = ServiceTable::compile(&carried::<A>(&model)).expect("the model compiles");
    let mut owned: Vec<_> = table.owned_addresses().collect();
    owned.sort_unstable();
    assert_eq!(owned, [ip::<A>(CLUSTER_IP).to_ip(), ip::<A>(EXTERNAL_IP).to_ip()]);
    assert_eq!(table.node_ports().collect::<Vec<_>>(), [(Protocol::TCP, 80), (Protocol::TCP, 3001)]);
    let services = table.services::<A>();
    for (address, whole) in
        [(CLUSTER_IP, true), (EXTERNAL_IP, true), (LOAD_BALANCER_IP, false), (NODE, false), (OUTSIDE, false)]
    {
        assert_eq!(services.is_frontend(ip(address)), whole, "{address}");
        assert_eq!(services.claims(&key(Protocol::TCP, POD, address, 22)), whole, "{address}");
    }
    assert!(services.claims(&key(Protocol::TCP, POD, LOAD_BALANCER_IP, 80)));
    assert!(services.claims(&key(Protocol::TCP, POD, NODE, 3001)));
    assert_eq!(services.source(ip(POD)), Source::Pod);
    assert_eq!(services.source(ip(LOAD_BALANCER_IP)), Source::Local);
    assert_eq!(services.source(ip(OUTSIDE)), Source::Other);
}

fn connections_keep_backends_that_are_listed<A: Carried>() {
    let far = zones(on("node-b", "10.1.0.2"), &["zone-b"]);
    let endpoints = vec![
        zones(on("node-a", "10.1.0.1"), &["zone-a"]),
        far,
        terminating(on("node-a", "10.1.0.3")),
        unready(on("node-a", "10.1.0.4")),
    ];
    let mut model = Model { zone: Some("zone-a".into()), ..policies(world(endpoints), Cluster, Local) };
    let udp = ServicePort { protocol: Protocol::UDP, ..ServicePort::clone(&model.services[0]) };
    model.services.push(udp.into());
    let table = ServiceTable::compile(&carried::<A>(&model)).expect("the model compiles");
    for (protocol, kept) in [
        (Protocol::TCP, [true, true, true, true, false]),
        (Protocol::UDP, [true, true, true, false, false]),
        (Protocol::SCTP, [false; 5]),
    ] {
        for (address, kept) in ["10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5"].into_iter().zip(kept) {
            let still = |dst, dport, port| {
                table.services().standing(&key::<A>(protocol, POD, dst, dport), ip(address), port) != Standing::Gone
            };
            assert_eq!(still(CLUSTER_IP, 80, 8080), kept, "{protocol} {address}");
            assert_eq!(still(NODE, 3001, 8080), kept, "{protocol} {address}");
            assert!(!still(CLUSTER_IP, 80, 8081), "another port");
            let is_kept_without = kept && protocol == Protocol::TCP;
            assert_eq!(still("172.30.0.42", 80, 8080), is_kept_without, "{protocol} {address}: the frontend is gone");
            assert!(!still("172.30.0.42", 80, 8081), "another port");
        }
    }
}

fn a_terminating_backend_drains_where_a_client_would_come_to_another<A: Carried>() {
    use Standing::{Drains, Gone, Stays};
    let standing = |endpoints: &[Endpoint], src: &str, (dst, dport): (&str, u16)| {
        [Protocol::TCP, Protocol::UDP].map(|protocol| {
            let mut model = policies(world(endpoints.to_vec()), Cluster, Local);
            port(&mut model, 0).protocol = protocol;
            let table = ServiceTable::compile(&carried::<A>(&model)).expect("the model compiles");
            table.services().standing(&key::<A>(protocol, src, dst, dport), ip("10.1.0.1"), 8080)
        })
    };
    let ends = || terminating(on("node-a", "10.1.0.1"));
    let (here, there) = (on("node-a", "10.1.0.2"), on("node-b", "10.1.0.2"));
    // What comes from outside by policy Local has this node's backends only: without a ready one here it may come to this one.
    for (endpoints, from_pod, from_outside) in [
        (vec![ends(), here.clone()], [Drains; 2], [Drains; 2]),
        (vec![ends(), there.clone()], [Drains; 2], [Stays; 2]),
        (vec![terminating(on("node-b", "10.1.0.1")), here.clone()], [Drains; 2], [Drains; 2]),
        // Outside a new packet would be dropped: there is no backend here.
        (vec![terminating(on("node-b", "10.1.0.1")), there.clone()], [Drains; 2], [Stays; 2]),
        (vec![ends()], [Stays; 2], [Stays; 2]),
        (vec![ends(), terminating(here.clone())], [Stays; 2], [Stays; 2]),
        (vec![ends(), unready(here.clone())], [Stays; 2], [Stays; 2]),
        (vec![on("node-a", "10.1.0.1"), here.clone()], [Stays; 2], [Stays; 2]),
        (vec![unready(on("node-a", "10.1.0.1")), here.clone()], [Stays, Gone], [Stays, Gone]),
        (vec![here.clone()], [Gone; 2], [Gone; 2]),
    ] {
        for (src, to, expected) in
            [(POD, (CLUSTER_IP, 80), from_pod), (POD, (NODE, 3001), from_pod), (OUTSIDE, (NODE, 3001), from_outside)]
        {
            assert_eq!(standing(&endpoints, src, to), expected, "{endpoints:?}: {src} to {to:?}");
        }
    }
}

fn connections_keep_backends_of_slices_that_no_service_serves<A: Carried>() {
    let unserved =
        [(Protocol::TCP, "10.1.0.1", 8080), (Protocol::UDP, "10.1.0.2", 53), (Protocol::SCTP, "10.1.0.3", 9)];
    let unserved: Vec<_> =
        unserved.into_iter().map(|(protocol, at, port)| (protocol, ip::<A>(at).to_ip(), port)).collect();
    let table = ServiceTable::compile(&Model { unserved, ..Model::default() }).expect("the model compiles");
    let still = |protocol, address, port| {
        table.services().standing(&key::<A>(protocol, POD, CLUSTER_IP, 80), ip(address), port) == Standing::Stays
    };
    assert!(still(Protocol::TCP, "10.1.0.1", 8080) && still(Protocol::SCTP, "10.1.0.3", 9));
    assert!(!still(Protocol::UDP, "10.1.0.2", 53), "it follows its service");
    assert!(!still(Protocol::TCP, "10.1.0.1", 8081) && !still(Protocol::SCTP, "10.1.0.1", 8080));
}

fn stamps_survive_recompilation<A: Carried>() {
    let stamps = |model: &Model| -> Vec<(String, u32)> {
        let table = ServiceTable::compile(&carried::<A>(model)).expect("the model compiles");
        let decision = decide::<A>(&table, &key(Protocol::TCP, POD, CLUSTER_IP, 80), &mut || 1 << 62);
        let Decision::Translate { candidates, .. } = decision else { panic!("{decision:?}") };
        candidates.iter().map(|one| (one.address.to_string(), one.stamp)).collect()
    };
    let before = two_nodes();
    let mut after = policies(before.clone(), Cluster, Local);
    port(&mut after, 0).endpoints.insert(0, on("", "10.0.9.9"));
    port(&mut after, 0).endpoints.push(on("", "10.1.0.1"));
    let other = ServicePort { cluster_ips: ips(&["172.30.0.1"]), port: 1, ..ServicePort::clone(&before.services[0]) };
    after.services.insert(0, other.into());
    let (before, after) = (stamps(&before), stamps(&after));
    assert_eq!(before.len(), 2);
    assert_ne!(before[0].1, before[1].1);
    for one in &before {
        assert!(after.contains(one));
        assert_ne!(one.1, 0);
    }
    let mut renamed = two_nodes();
    port(&mut renamed, 0).name = "alpha/web2:http".into();
    assert!(stamps(&renamed).iter().zip(&before).all(|(new, old)| new.0 == old.0 && new.1 != old.1));
}

#[test]
fn impossible_service_ports_are_refused() {
    let refused = |change: fn(&mut ServicePort)| {
        let mut model = two_nodes();
        change(port(&mut model, 0));
        ServiceTable::compile(&model).expect_err("the model is refused")
    };
    let service = || "alpha/web:http".to_owned();
    assert_eq!(
        refused(|service| service.protocol = Protocol::ICMP),
        CompileError::NotAServiceProtocol { service: service(), protocol: Protocol::ICMP, origin: 9 }
    );
    for (change, what) in [
        ((|service| service.port = 0) as fn(&mut ServicePort), "port"),
        (|service| service.node_port = Some(0), "nodePort"),
        (|service| service.endpoints[1].port = 0, "the port of an endpoint"),
    ] {
        assert_eq!(refused(change), CompileError::ZeroPort { service: service(), what, origin: 9 });
    }
}

#[test]
fn memory_is_counted() {
    let empty = ServiceTable::compile(&Model::default()).expect("the model compiles").memory_bytes();
    let mut model = two_nodes();
    let small = ServiceTable::compile(&model).expect("the model compiles").memory_bytes();
    port(&mut model, 0).endpoints.extend((0..=255).map(|last| on("", &format!("10.2.0.{last}"))));
    let large = ServiceTable::compile(&model).expect("the model compiles").memory_bytes();
    assert!(empty < small);
    let each = (large - small) as f64 / 256.0;
    assert!(
        (20.0..32.0).contains(&each),
        "{each} bytes: a backend is 12, and 8 in the set of all, which is half full at least"
    );
}
