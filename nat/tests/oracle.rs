//! The compiled table against a dull twin that reads the model anew for every packet, line by line as the rules say.

mod common;

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use common::*;
use ipnet::IpNet;
use proptest::{collection::vec, prelude::*, sample::select};
use weir_nat::{
    Affinity, Compiler, Decision, Endpoint, Family, HostAddresses, Model, ServicePort, ServiceTable, Standing,
    Topology, TrafficPolicy, usage,
};
use weir_packet::{DropReason, FlowKey, Ports, Protocol, Tick};

/// What the rules say: the decision, with all backends that may be picked.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    NotAService,
    /// Backends; and whether one that is not the source itself is masqueraded.
    Translate(BTreeSet<(IpAddr, u16)>, bool, String),
    Reject(DropReason, String),
    Drop(DropReason, Option<String>),
}

fn same_family(one: IpAddr, other: IpAddr) -> bool {
    one.is_ipv4() == other.is_ipv4()
}

fn family_nets(nets: &[IpNet], of: IpAddr) -> Vec<IpNet> {
    nets.iter().copied().filter(|net| same_family(net.addr(), of)).collect()
}

fn inside(nets: &[IpNet], address: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(&address))
}

/// Each backend once, as its most usable listing says (rules 2 and 5).
fn once<'a>(model: &'a Model, service: &'a ServicePort, family: IpAddr) -> Vec<&'a Endpoint> {
    let mut once: Vec<&Endpoint> = Vec::new();
    for endpoint in service.endpoints.iter().filter(|endpoint| same_family(endpoint.address, family)) {
        // Ready before terminating before the rest; here before there.
        let worth = |one: &Endpoint| {
            let condition = match (one.ready, one.serving, one.terminating) {
                (true, ..) => 3,
                (false, true, true) => 2,
                (false, true, false) => 1,
                (false, false, _) => 0,
            };
            (condition, one.node_name() == Some(&*model.node_name))
        };
        match once.iter_mut().find(|one| (one.address, one.port) == (endpoint.address, endpoint.port)) {
            Some(listed) if worth(endpoint) > worth(listed) => *listed = endpoint,
            Some(_) => {}
            None => once.push(endpoint),
        }
    }
    once
}

/// The cluster list and the local list (rules 1 to 7).
fn lists<'a>(model: &'a Model, service: &'a ServicePort, family: IpAddr) -> [Vec<&'a Endpoint>; 2] {
    let once = once(model, service, family);
    let or_terminating = |of: &[&'a Endpoint]| -> (Vec<&'a Endpoint>, bool) {
        let ready: Vec<_> = of.iter().copied().filter(|one| one.ready).collect();
        if !ready.is_empty() {
            return (ready, true);
        }
        (of.iter().copied().filter(|one| one.serving && one.terminating).collect(), false)
    };
    let (mut cluster, ready) = or_terminating(&once);
    if ready {
        let named = |hints: &[Arc<str>], name: &str| hints.iter().any(|hint| **hint == *name);
        let all_and_one = |hints: fn(&Endpoint) -> &[Arc<str>], name: &str| {
            cluster.iter().all(|one| !hints(one).is_empty()) && cluster.iter().any(|one| named(hints(one), name))
        };
        if all_and_one(Endpoint::node_hints, &model.node_name) {
            cluster.retain(|one| named(one.node_hints(), &model.node_name));
        } else if let Some(zone) = &model.zone
            && all_and_one(Endpoint::zone_hints, zone)
        {
            cluster.retain(|one| named(one.zone_hints(), zone));
        }
    }
    let here: Vec<_> = once.into_iter().filter(|one| one.node_name() == Some(&*model.node_name)).collect();
    [cluster, or_terminating(&here).0]
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Cluster,
    LoadBalancer,
    External,
    NodePort,
    HostPort,
}

/// Whether a service, or a host port, has frontends of a family.
fn exists(service: &ServicePort, family: IpAddr) -> bool {
    match service.host_port {
        None => service.cluster_ips.iter().any(|&one| same_family(one, family)),
        Some(HostAddresses::Ipv4) if family.is_ipv6() => false,
        Some(HostAddresses::Ipv6) if family.is_ipv4() => false,
        Some(HostAddresses::One(address)) if !same_family(address, family) => false,
        Some(_) => service.endpoints.iter().any(|one| same_family(one.address, family)),
    }
}

/// Who is served at a destination.
fn service_at(model: &Model, protocol: Protocol, dst: IpAddr, port: u16) -> Option<(&ServicePort, Kind)> {
    let open = family_nets(&model.node_port_addresses, dst);
    let local = model.local_addresses.contains(&dst) && !dst.is_loopback() && (open.is_empty() || inside(&open, dst));
    for kind in [Kind::Cluster, Kind::LoadBalancer, Kind::External, Kind::NodePort, Kind::HostPort] {
        for service in &model.services {
            let claims = match kind {
                Kind::Cluster => service.port == port && service.cluster_ips.contains(&dst),
                Kind::LoadBalancer => service.port == port && service.load_balancer_ips.contains(&dst),
                Kind::External => service.port == port && service.external_ips.contains(&dst),
                Kind::NodePort => service.node_port == Some(port) && local,
                Kind::HostPort => match service.host_port {
                    Some(HostAddresses::One(address)) => {
                        let is_own = dst.is_loopback() || model.local_addresses.contains(&dst);
                        service.port == port && address == dst && is_own
                    }
                    Some(_) => service.port == port && model.local_addresses.contains(&dst) && !dst.is_loopback(),
                    None => false,
                },
            };
            if exists(service, dst) && claims && service.protocol == protocol {
                return Some((service, kind));
            }
        }
    }
    None
}

fn judge(model: &Model, protocol: Protocol, src: IpAddr, dst: IpAddr, port: u16) -> Verdict {
    let found = if protocol.has_ports() { service_at(model, protocol, dst, port) } else { None };
    let Some((service, kind)) = found else {
        if let Some(service) = model.services.iter().find(|service| service.cluster_ips.contains(&dst)) {
            return Verdict::Reject(DropReason::UnpublishedPort, service.name.clone());
        }
        if inside(&model.service_cidrs, dst) && !model.local_addresses.contains(&dst) {
            return Verdict::Drop(DropReason::UnallocatedServiceIp, None);
        }
        return Verdict::NotAService;
    };
    let name = service.name.clone();

    let guard = family_nets(&service.source_ranges, dst);
    if kind == Kind::LoadBalancer && !guard.is_empty() && !inside(&guard, src) {
        let node = model.local_addresses.iter().find(|&&address| same_family(address, dst));
        let node_allowed = node.is_some_and(|&node| inside(&guard, node));
        if !(node_allowed && service.load_balancer_ips.contains(&src)) {
            return Verdict::Drop(DropReason::SourceRange, Some(name));
        }
    }

    let [cluster, local] = lists(model, service, dst);
    if cluster.is_empty() {
        return Verdict::Reject(DropReason::NoBackend, name);
    }
    let pods = family_nets(&model.pod_cidrs, dst);
    let from_pod = inside(&pods, src);
    let from_node = !from_pod && (src.is_loopback() || model.local_addresses.contains(&src));
    let (list, masquerade) = match (kind, service.internal_policy, service.external_policy) {
        (Kind::Cluster, internal, _) => {
            let masquerade = model.masquerade_all || (!pods.is_empty() && !from_pod);
            (if internal == TrafficPolicy::Local { local } else { cluster }, masquerade)
        }
        (Kind::HostPort, ..) => (cluster, false),
        (_, _, TrafficPolicy::Cluster) => (cluster, true),
        (_, _, TrafficPolicy::Local) if from_pod || from_node => (cluster, from_node),
        (_, _, TrafficPolicy::Local) => (local, false),
    };
    if list.is_empty() {
        return Verdict::Drop(DropReason::NoLocalBackend, Some(name));
    }
    Verdict::Translate(list.iter().map(|one| (one.address, one.port)).collect(), masquerade, name)
}

/// What has become of a backend that a packet was sent to once, by what would become of that packet now.
fn standing(model: &Model, key: (Protocol, IpAddr, IpAddr, u16), backend: (IpAddr, u16)) -> Standing {
    let (protocol, src, dst, port) = key;
    let is = |one: &Endpoint| (one.address, one.port) == backend;
    let served = service_at(model, protocol, dst, port).map(|(service, _)| service);
    let Some(one) = served.and_then(|service| once(model, service, dst).into_iter().find(|one| is(one))) else {
        let any = model.services.iter().any(|other| other.protocol == protocol && other.endpoints.iter().any(is));
        let any = any || model.unserved.contains(&(protocol, backend.0, backend.1));
        return if any && protocol != Protocol::UDP { Standing::Stays } else { Standing::Gone };
    };
    let list = match judge(model, protocol, src, dst, port) {
        Verdict::Translate(list, ..) => list,
        _ => BTreeSet::new(),
    };
    match (one.ready, one.serving, one.terminating) {
        (false, false, _) if protocol == Protocol::UDP => Standing::Gone,
        // Source ranges say who may open a connection, not where it would come to.
        (false, true, true) if !list.is_empty() && !list.contains(&backend) => Standing::Drains,
        _ => Standing::Stays,
    }
}

/// The decision of the compiled table, in the twin's words; the masquerade of a hairpin pick is checked here.
fn compiled<A: Family>(
    model: &Model,
    table: &ServiceTable,
    key: &FlowKey<A>,
    number: u64,
) -> Result<Verdict, TestCaseError> {
    let name = |service| table.service_name(service).to_owned();
    Ok(match decide(table, key, &mut || number) {
        Decision::NotAService => Verdict::NotAService,
        Decision::Translate { backend, masquerade, candidates, service, slot, choice } => {
            prop_assert!(candidates.contains(&backend));
            let services = table.services::<A>();
            let foreseen =
                services.foresee(key).and_then(|foreseen| services.foresee_backend(foreseen, key.src, number));
            prop_assert_eq!(foreseen, Some(slot), "what is read ahead is what is needed");
            prop_assert_eq!(services.backend(slot), &backend);
            // Rule 26: whatever the next connection's number is, it comes to the same backend.
            prop_assert_eq!(choice.is_some(), model.services[service.0 as usize].affinity.is_some());
            if let Some(choice) = choice {
                let affinity = Affinity::new(1, [0; 2]);
                prop_assert!(affinity.clients().remember(&choice, Tick(0)));
                let again =
                    table.services().decide(key, affinity.clients(), Tick(1), &mut || number.rotate_left(31) | 1 << 40);
                let is_same = matches!(again, Decision::Translate { backend: again, masquerade: too, .. }
                    if (again, too) == (backend, masquerade));
                prop_assert!(is_same, "{:?} again: {:?}", backend, again);
            }
            prop_assert_eq!(table.services::<A>().standing(key, backend.address, backend.port), Standing::Stays);
            // Without its frontend: where any service lists it.
            let mut elsewhere = *key;
            elsewhere.ports = Ports::new(key.ports.source(), 0);
            let without = if key.protocol == Protocol::UDP { Standing::Gone } else { Standing::Stays };
            prop_assert_eq!(table.services::<A>().standing(&elsewhere, backend.address, backend.port), without);
            let list: BTreeSet<_> = candidates.iter().map(|one| (one.address.to_ip(), one.port)).collect();
            prop_assert_eq!(list.len(), candidates.len(), "no backend is listed twice");
            if backend.address == key.src {
                prop_assert!(masquerade, "a hairpin");
                // What another pick would get: the twin's answer cannot be told from this one, so ask for it.
                let other = (0..64).map(|turn| decide(table, key, &mut || turn << 58 | 1 << 57));
                let other = other.filter_map(|decision| match decision {
                    Decision::Translate { backend, masquerade, .. } if backend.address != key.src => Some(masquerade),
                    _ => None,
                });
                match other.last() {
                    Some(masquerade) => Verdict::Translate(list, masquerade, name(service)),
                    None => Verdict::Translate(list, true, name(service)),
                }
            } else {
                Verdict::Translate(list, masquerade, name(service))
            }
        }
        Decision::Reject { reason, service } => Verdict::Reject(reason, name(service.expect("a service rejects"))),
        Decision::Drop { reason, service } => Verdict::Drop(reason, service.map(name)),
    })
}

/// Few addresses, so that everything meets everything.
const PODS: [&str; 4] = ["10.0.0.1", "10.0.0.2", "10.1.0.1", "10.1.0.2"];
const NODES: [&str; 3] = ["192.168.0.2", "192.168.1.2", "127.0.0.1"];
const VIPS: [&str; 5] = ["172.30.0.1", "172.30.0.2", "198.51.100.7", "1.2.3.4", "192.168.0.2"];
const ELSEWHERE: [&str; 3] = ["172.30.0.9", "203.0.113.2", "192.168.0.9"];
const NETS: [&str; 7] =
    ["10.0.0.0/8", "10.1.0.0/16", "192.168.0.0/24", "192.168.1.2/32", "0.0.0.0/1", "203.0.113.0/24", "172.30.0.0/16"];

/// `text` or its IPv6 twin.
fn address(texts: Vec<&'static str>) -> impl Strategy<Value = IpAddr> {
    (select(texts), prop::bool::weighted(0.3))
        .prop_map(|(text, v6)| if v6 { Ipv6Addr::carry(v4(text)) } else { v4(text).into() })
}

fn net() -> impl Strategy<Value = IpNet> {
    (select(NETS.to_vec()), prop::bool::weighted(0.3)).prop_map(|(text, v6)| {
        let net: IpNet = text.parse().expect("a prefix");
        if v6 { Ipv6Addr::carry_net(net) } else { net }
    })
}

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local])
}

fn protocol() -> impl Strategy<Value = Protocol> {
    select(vec![Protocol::TCP, Protocol::TCP, Protocol::UDP, Protocol::SCTP])
}

fn names(names: &'static [&'static str]) -> impl Strategy<Value = Vec<Arc<str>>> {
    vec(select(names), 0..3).prop_map(|names| names.into_iter().map(Arc::from).collect())
}

prop_compose! {
    fn endpoint()(
        address in address(PODS.to_vec()),
        port in select(vec![80, 8080]),
        node_name in select(vec![None, Some("node-a"), Some("node-b")]),
        (ready, serving, terminating) in
            (prop::bool::weighted(0.7), prop::bool::weighted(0.8), prop::bool::weighted(0.5)),
        zone_hints in names(&["zone-a", "zone-b"]),
        node_hints in names(&["node-a", "node-b"]),
    ) -> Endpoint {
        let node_name = node_name.map(Into::into);
        let topology = Some(Arc::new(Topology { node_name, zone_hints, node_hints }));
        Endpoint { address, port, ready, serving, terminating, topology }
    }
}

prop_compose! {
    fn service()(
        protocol in protocol(),
        port in select(vec![80, 81, 3001]),
        cluster_ips in vec(address(VIPS.to_vec()), 0..3),
        node_port in select(vec![None, Some(3001), Some(80)]),
        external_ips in vec(address(VIPS.to_vec()), 0..3),
        load_balancer_ips in vec(address(VIPS.to_vec()), 0..3),
        source_ranges in vec(net(), 0..3),
        (internal_policy, external_policy) in (policy(), policy()),
        endpoints in vec(endpoint(), 0..6),
    ) -> ServicePort {
        ServicePort {
            protocol, port, cluster_ips, node_port, external_ips, load_balancer_ips, source_ranges, internal_policy,
            external_policy, endpoints, ..ServicePort::default()
        }
    }
}

prop_compose! {
    /// Its pod may have addresses of both families.
    fn host_port()(
        protocol in protocol(),
        port in select(vec![80, 81, 3001]),
        host_ip in prop::option::of(address([&NODES[..], &PODS[..], &ELSEWHERE[..], &["0.0.0.0"][..]].concat())),
        anywhere in prop::bool::weighted(0.3),
        endpoints in vec(address(PODS.to_vec()), 0..3),
    ) -> ServicePort {
        // The IPv6 twin of 0.0.0.0 is no unspecified address.
        let host_ip = match host_ip {
            Some(IpAddr::V6(_)) if anywhere => Some(Ipv6Addr::UNSPECIFIED.into()),
            other => other,
        };
        let endpoints = endpoints.into_iter().map(|address| Endpoint { address, ..on("node-a", "10.0.0.1") });
        ServicePort {
            protocol, port, host_port: Some(HostAddresses::of_host_ip(host_ip)), endpoints: endpoints.collect(),
            ..ServicePort::default()
        }
    }
}

prop_compose! {
    fn unserved()(
        protocol in select(vec![Protocol::TCP, Protocol::UDP, Protocol::SCTP]),
        address in address(PODS.to_vec()),
        port in select(vec![80, 8080]),
    ) -> (Protocol, IpAddr, u16) {
        (protocol, address, port)
    }
}

prop_compose! {
    fn model()(
        zone in select(vec![None, Some("zone-a")]),
        pod_cidrs in vec(net(), 0..3),
        masquerade_all in prop::bool::weighted(0.2),
        node_port_addresses in vec(net(), 0..3),
        local_addresses in vec(address(NODES.to_vec()), 0..5),
        service_cidrs in vec(net(), 0..2),
        services in vec((prop_oneof![3 => service(), 1 => host_port()], prop::bool::weighted(0.3)), 0..6),
    ) -> Model {
        let services = services.into_iter().enumerate().map(|(number, (service, sticky))| {
            Arc::new(ServicePort { name: format!("test/service-{number}"), affinity: sticky.then_some(10_800), ..service })
        });
        Model {
            node_name: "node-a".into(), zone: zone.map(str::to_owned), pod_cidrs, masquerade_all, node_port_addresses,
            local_addresses, service_cidrs, unserved: Vec::new(), services: services.collect(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// Every packet of a small world, in both families.
    #[test]
    fn the_table_decides_as_the_rules_say(model in model(), number in (1_u64 << 32)..) {
        let table = ServiceTable::compile(&model).expect("the model compiles");
        decides_as_the_rules_say(&model, &table, number)?;
    }

    /// The same of tables that are made one out of another, and of backends that were there before.
    #[test]
    fn a_table_out_of_another_decides_as_the_rules_say(
        model in model(),
        changes in vec((any::<prop::sample::Index>(), vec(endpoint(), 0..6), vec(unserved(), 0..3)), 1..6),
        number in (1_u64 << 32)..,
    ) {
        let mut model = model;
        let mut compiler = Compiler::default();
        let mut ever = BTreeSet::new();
        for (which, endpoints, mut unserved) in changes {
            let before = compiler.compile(&model).expect("the model compiles");
            ever.extend(model.services.iter().flat_map(|service| &service.endpoints).map(|one| (one.address, one.port)));
            ever.extend(model.unserved.iter().map(|(_, address, port)| (*address, *port)));
            unserved.sort_unstable();
            model.unserved = unserved;
            if !model.services.is_empty() {
                let which = which.index(model.services.len());
                let service = Arc::make_mut(&mut model.services[which]);
                let families = |service: &ServicePort| {
                    [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)].map(|of| exists(service, of))
                };
                let had = families(service);
                service.endpoints = endpoints;
                let table = compiler.compile(&model).expect("the model compiles");
                let is_of_endpoints = had == families(&model.services[which]);
                prop_assert_eq!(table.differs_in_endpoints_only(&before), is_of_endpoints);
            }
            let table = compiler.compile(&model).expect("the model compiles");
            decides_as_the_rules_say(&model, &table, number)?;
            listed_as_the_rules_say::<Ipv4Addr>(&model, &table, &ever)?;
            listed_as_the_rules_say::<Ipv6Addr>(&model, &table, &ever)?;
            let afresh = ServiceTable::compile(&model).expect("the model compiles");
            let backends = |table: &ServiceTable| {
                let v4 = table.services::<Ipv4Addr>().backends().map(|(_, one)| one);
                v4.chain(table.services::<Ipv6Addr>().backends().map(|(_, one)| one)).collect::<Vec<_>>()
            };
            prop_assert_eq!(backends(&table), backends(&afresh));
        }
    }

    /// What is told of backends' use is what the lists have.
    #[test]
    fn usage_is_told_as_lists_are_made(model in model()) {
        for service in &model.services {
            let mut told = [(); 4].map(|()| BTreeSet::new());
            for one in usage(&model, service) {
                let backend = (one.endpoint.address, one.endpoint.port);
                let family = usize::from(backend.0.is_ipv6()) * 2;
                told[family].extend(one.cluster.is_none().then_some(backend));
                told[family + 1].extend(one.local.is_none().then_some(backend));
            }
            let families = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
            let expected = families.into_iter().flat_map(|family| {
                let lists = if exists(service, family) { lists(&model, service, family) } else { [Vec::new(), Vec::new()] };
                lists.map(|list| list.iter().map(|one| (one.address, one.port)).collect::<BTreeSet<_>>())
            });
            prop_assert_eq!(told.to_vec(), expected.collect::<Vec<_>>());
        }
    }

    /// Compilation is a function of the model, and counts what it holds.
    #[test]
    fn the_same_model_gives_the_same_table(model in model()) {
        let tables = [(); 2].map(|()| ServiceTable::compile(&model).expect("the model compiles"));
        let owned = tables.each_ref().map(|table| table.owned_addresses().collect::<BTreeSet<_>>());
        prop_assert_eq!(&owned[0], &owned[1]);
        prop_assert_eq!(tables[0].conflicts(), tables[1].conflicts());
        prop_assert_eq!(tables[0].own_frontends(), tables[1].own_frontends());
        // What the node's own kernel asks for at its own addresses is what the rules serve there.
        for (address, protocol) in model.local_addresses.iter().flat_map(|address| {
            [Protocol::TCP, Protocol::UDP, Protocol::SCTP].map(|protocol| (*address, protocol))
        }) {
            for port in [80, 81, 3001, 22] {
                let is_served = service_at(&model, protocol, address, port).is_some();
                prop_assert_eq!(tables[0].own_frontends().contains(&(address, protocol, port)), is_served);
            }
        }
        prop_assert_eq!(tables[0].memory_bytes(), tables[1].memory_bytes());
        for address in &owned[0] {
            let claimed = model.services.iter().any(|service| {
                let lists = [&service.cluster_ips, &service.external_ips, &service.load_balancer_ips];
                lists.into_iter().any(|list| list.contains(address))
            });
            let cluster_ip = model.services.iter().any(|service| service.cluster_ips.contains(address));
            prop_assert!(claimed && (cluster_ip || !model.local_addresses.contains(address)));
        }
    }
}

/// Compares what is said of every packet of a small world, in both families.
fn decides_as_the_rules_say(model: &Model, table: &ServiceTable, number: u64) -> Result<(), TestCaseError> {
    let texts = || PODS.iter().chain(&NODES).chain(&VIPS).chain(&ELSEWHERE);
    for (src, dst) in texts().flat_map(|src| texts().map(move |dst| (src, dst))) {
        for (protocol, port) in
            [(Protocol::TCP, 80), (Protocol::TCP, 3001), (Protocol::UDP, 80), (Protocol::SCTP, 81), (Protocol::ICMP, 8)]
        {
            let key4 = key::<Ipv4Addr>(protocol, src, dst, port);
            let expected = judge(model, protocol, key4.src.into(), key4.dst.into(), port);
            prop_assert_eq!(compiled(model, table, &key4, number)?, hairpin(expected, key4.src.into()), "{:?}", key4);
            stand::<Ipv4Addr>(model, table, &key4)?;
            let key6 = FlowKey { protocol, ports: Ports::new(40000, port), src: ip::<Ipv6Addr>(src), dst: ip(dst) };
            let expected = judge(model, protocol, key6.src.into(), key6.dst.into(), port);
            prop_assert_eq!(compiled(model, table, &key6, number)?, hairpin(expected, key6.src.into()), "{:?}", key6);
            stand::<Ipv6Addr>(model, table, &key6)?;
        }
    }
    Ok(())
}

/// Compares what is said of backends whose frontend is gone.
fn listed_as_the_rules_say<A: Carried>(
    model: &Model,
    table: &ServiceTable,
    backends: &BTreeSet<(IpAddr, u16)>,
) -> Result<(), TestCaseError> {
    for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
        let gone = key::<A>(protocol, ELSEWHERE[0], "203.0.113.77", 9);
        for &(address, port) in backends {
            let Some(of_family) = A::from_ip(address) else { continue };
            let listings = model.services.iter().filter(|service| service.protocol == protocol);
            let mut listings = listings.flat_map(|service| &service.endpoints).map(|one| (one.address, one.port));
            let is_listed =
                listings.any(|one| one == (address, port)) || model.unserved.contains(&(protocol, address, port));
            let expected = if is_listed && protocol != Protocol::UDP { Standing::Stays } else { Standing::Gone };
            let said = table.services::<A>().standing(&gone, of_family, port);
            prop_assert_eq!(said, expected, "{:?} {}:{}", protocol, address, port);
        }
    }
    Ok(())
}

/// Compares what is said of all backends that there can be.
fn stand<A: Family>(model: &Model, table: &ServiceTable, key: &FlowKey<A>) -> Result<(), TestCaseError> {
    if !key.protocol.has_ports() {
        return Ok(());
    }
    // The ranges are asked before there is a list.
    let mut open = model.clone();
    open.services.iter_mut().for_each(|service| Arc::make_mut(service).source_ranges.clear());
    let (src, dst, port) = (key.src.to_ip(), key.dst.to_ip(), key.ports.destination());
    for (address, backend_port) in
        model.services.iter().flat_map(|service| &service.endpoints).map(|one| (one.address, one.port))
    {
        let Some(of_family) = A::from_ip(address) else { continue };
        let expected = standing(&open, (key.protocol, src, dst, port), (address, backend_port));
        let said = table.services::<A>().standing(key, of_family, backend_port);
        prop_assert_eq!(said, expected, "{:?} {}:{}", key, address, backend_port);
    }
    Ok(())
}

/// Rule 16: where every backend is the source itself, every pick is masqueraded.
fn hairpin(verdict: Verdict, src: IpAddr) -> Verdict {
    match verdict {
        Verdict::Translate(list, masquerade, service) => {
            let only_itself = list.iter().all(|&(address, _)| address == src);
            Verdict::Translate(list, masquerade || only_itself, service)
        }
        other => other,
    }
}
