//! Models written in IPv4 notation and tried in both families.

// Each test binary uses its own part of this file.
#![allow(dead_code)]

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::{IpNet, Ipv6Net};
use weir_nat::{
    Affinity, Backend, Decision, Endpoint, Family, HostAddresses, Model, ServicePort, ServiceTable, Topology,
    TrafficPolicy,
};
use weir_packet::{DropReason, FlowKey, Ports, Protocol, Tick};

/// A family that a model in IPv4 notation can be carried over to.
pub trait Carried: Family {
    fn carry(address: Ipv4Addr) -> IpAddr;
    fn carry_net(net: IpNet) -> IpNet;
}

impl Carried for Ipv4Addr {
    fn carry(address: Ipv4Addr) -> IpAddr {
        address.into()
    }
    fn carry_net(net: IpNet) -> IpNet {
        net
    }
}

/// `fd00::` and the IPv4 address in the last 32 bits; loopback is `::1`.
impl Carried for Ipv6Addr {
    fn carry(address: Ipv4Addr) -> IpAddr {
        if address.is_loopback() {
            return Ipv6Addr::LOCALHOST.into();
        }
        Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(address.to_bits())).into()
    }
    fn carry_net(net: IpNet) -> IpNet {
        match (net.addr(), Self::carry(Ipv4Addr::from_bits(0))) {
            (IpAddr::V4(address), IpAddr::V6(base)) => {
                let address = Ipv6Addr::from_bits(base.to_bits() | u128::from(address.to_bits()));
                IpNet::V6(Ipv6Net::new(address, 96 + net.prefix_len()).expect("a prefix of at most 128 bits"))
            }
            _ => net,
        }
    }
}

pub fn v4(text: &str) -> Ipv4Addr {
    text.parse().expect("an IPv4 address")
}

pub fn ip<A: Carried>(text: &str) -> A {
    A::from_ip(A::carry(v4(text))).expect("an address of the family")
}

pub fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().expect("a prefix")).collect()
}

pub fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().expect("an address")).collect()
}

/// The model with every IPv4 address and prefix carried over to family `A`; what is IPv6 already stays.
pub fn carried<A: Carried>(model: &Model) -> Model {
    let carry = |address: &mut IpAddr| {
        if let IpAddr::V4(v4) = *address {
            *address = A::carry(v4);
        }
    };
    let mut model = model.clone();
    let carry_nets = |nets: &mut Vec<IpNet>| nets.iter_mut().for_each(|net| *net = A::carry_net(*net));
    carry_nets(&mut model.pod_cidrs);
    carry_nets(&mut model.node_port_addresses);
    carry_nets(&mut model.service_cidrs);
    model.local_addresses.iter_mut().for_each(carry);
    for service in model.services.iter_mut().map(Arc::make_mut) {
        carry_nets(&mut service.source_ranges);
        for list in [&mut service.cluster_ips, &mut service.external_ips, &mut service.load_balancer_ips] {
            list.iter_mut().for_each(carry);
        }
        match &mut service.host_port {
            Some(HostAddresses::One(address)) => carry(address),
            Some(on @ HostAddresses::Ipv4) if A::BITS == 128 => *on = HostAddresses::Ipv6,
            _ => {}
        }
        service.endpoints.iter_mut().for_each(|endpoint| carry(&mut endpoint.address));
    }
    model
}

pub const POD: &str = "10.0.0.2";
pub const NODE: &str = "192.168.0.2";
pub const SECOND_NODE_ADDRESS: &str = "192.168.1.2";
pub const OUTSIDE: &str = "203.0.113.2";
pub const CLUSTER_IP: &str = "172.30.0.41";
pub const EXTERNAL_IP: &str = "198.51.100.7";
pub const LOAD_BALANCER_IP: &str = "1.2.3.4";
pub const SOURCES: [&str; 3] = [POD, NODE, OUTSIDE];
/// Where the service of [`world`] is reached from outside.
pub const EXTERNALS: [(&str, u16); 3] = [(EXTERNAL_IP, 80), (LOAD_BALANCER_IP, 80), (NODE, 3001)];

/// node-a with the service "alpha/web:http" on every kind of address, and these endpoints.
pub fn world(endpoints: Vec<Endpoint>) -> Model {
    Model {
        node_name: "node-a".into(),
        pod_cidrs: nets(&["10.0.0.0/8"]),
        service_cidrs: nets(&["172.30.0.0/16"]),
        local_addresses: ips(&[NODE, SECOND_NODE_ADDRESS, "127.0.0.1"]),
        services: vec![Arc::new(ServicePort {
            name: "alpha/web:http".into(),
            protocol: Protocol::TCP,
            port: 80,
            cluster_ips: ips(&[CLUSTER_IP]),
            node_port: Some(3001),
            external_ips: ips(&[EXTERNAL_IP]),
            load_balancer_ips: ips(&[LOAD_BALANCER_IP]),
            endpoints,
            origin: 9,
            ..ServicePort::default()
        })]
        .into(),
        ..Model::default()
    }
}

/// A service port of a model, to be changed.
pub fn port(model: &mut Model, index: usize) -> &mut ServicePort {
    Arc::make_mut(&mut model.services[index])
}

/// A pod's host port, TCP, on this node.
pub fn host_port(pod: &str, port: u16, on: HostAddresses, address: &str) -> Arc<ServicePort> {
    Arc::new(ServicePort {
        name: format!("{pod}:hostPort/{port}"),
        protocol: Protocol::TCP,
        port,
        host_port: Some(on),
        endpoints: vec![self::on("node-a", address)],
        ..ServicePort::default()
    })
}

/// A ready endpoint on port 8080.
pub fn on(node: &str, address: &str) -> Endpoint {
    Endpoint {
        address: address.parse().expect("an address"),
        port: 8080,
        ready: true,
        serving: true,
        terminating: false,
        topology: (!node.is_empty()).then(|| Arc::new(Topology::on(node))),
    }
}

pub fn terminating(endpoint: Endpoint) -> Endpoint {
    Endpoint { ready: false, serving: true, terminating: true, ..endpoint }
}

pub fn unready(endpoint: Endpoint) -> Endpoint {
    Endpoint { ready: false, serving: false, terminating: false, ..endpoint }
}

pub fn zones(endpoint: Endpoint, zones: &[&str]) -> Endpoint {
    hinted(endpoint, |topology| topology.zone_hints = names(zones))
}

pub fn nodes(endpoint: Endpoint, nodes: &[&str]) -> Endpoint {
    hinted(endpoint, |topology| topology.node_hints = names(nodes))
}

pub fn names(names: &[&str]) -> Vec<Arc<str>> {
    names.iter().copied().map(Arc::from).collect()
}

fn hinted(mut endpoint: Endpoint, change: impl FnOnce(&mut Topology)) -> Endpoint {
    change(Arc::make_mut(endpoint.topology.get_or_insert_default()));
    endpoint
}

pub fn policies(mut model: Model, internal: TrafficPolicy, external: TrafficPolicy) -> Model {
    for service in model.services.iter_mut().map(Arc::make_mut) {
        (service.internal_policy, service.external_policy) = (internal, external);
    }
    model
}

/// A decision without what depends on the pick.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Pass,
    /// "address:port" in IPv4 notation, sorted, and whether a pick that is not the source is masqueraded.
    Forward(Vec<String>, bool),
    Reject(DropReason),
    Drop(DropReason),
}

pub fn forward(backends: &[&str], masquerade: bool) -> Outcome {
    Outcome::Forward(backends.iter().map(|&backend| backend.to_owned()).collect(), masquerade)
}

pub fn key<A: Carried>(protocol: Protocol, src: &str, dst: &str, port: u16) -> FlowKey<A> {
    FlowKey { src: ip(src), dst: ip(dst), ports: Ports::new(40000, port), protocol }
}

fn plain<A: Carried>(backend: &Backend<A>) -> String {
    format!("{}:{}", Ipv4Addr::from_bits(backend.address.to_bits128() as u32), backend.port)
}

/// A decision of whose clients nothing is known.
pub fn decide<'t, A: Family>(
    table: &'t ServiceTable,
    key: &FlowKey<A>,
    random: &mut impl FnMut() -> u64,
) -> Decision<'t, A> {
    table.services::<A>().decide(key, Affinity::new(1, [0; 2]).clients(), Tick(0), random)
}

pub fn outcome<A: Carried>(table: &ServiceTable, key: &FlowKey<A>) -> Outcome {
    match decide(table, key, &mut || 0x1234_5678_9abc_def0) {
        Decision::NotAService => Outcome::Pass,
        Decision::Translate { backend, masquerade, candidates, .. } => {
            assert!(candidates.contains(&backend), "the pick is one of the candidates");
            let mut names: Vec<_> = candidates.iter().map(plain).collect();
            names.sort_unstable();
            Outcome::Forward(names, masquerade)
        }
        Decision::Reject { reason, .. } => Outcome::Reject(reason),
        Decision::Drop { reason, .. } => Outcome::Drop(reason),
    }
}

/// What `model`, carried over to `A`, does with a TCP packet.
pub fn tcp<A: Carried>(model: &Model, src: &str, dst: (&str, u16)) -> Outcome {
    let table = ServiceTable::compile(&carried::<A>(model)).expect("the model compiles");
    outcome(&table, &key::<A>(Protocol::TCP, src, dst.0, dst.1))
}
