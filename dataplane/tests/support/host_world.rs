//! A node with two uplinks, pods, services and host endpoints, in the addresses of the policy crate's small world, so that its generated
//! rules are about them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use proptest::{prelude::*, sample::select};
use weir_dataplane::{
    decide::{self, Decision, Verdict},
    forwarding::{Forwarding, Routed},
    frame::IfIndex,
    model::{
        Cluster, Device, EndpointToHost, Failsafe, HostEndpoint, HostSettings, Links, Neighbor, Node, Pool, Role,
        Route, TunnelMode, Workload,
    },
    origin::{Arrival, Origin},
    snapshot::{Rules, Snapshot},
};
use weir_nat::{Affinity, ServiceTable, SnatPorts};
use weir_packet::{DropReason, FlowKey, Mac, Ports, Protocol, Tick};
use weir_policy::{Classifier, Judgement, model::*};

use crate::{
    host_oracle::{Fate, Place, Said, Site},
    oracle::Packet,
    world::{
        self,
        edit::{Edit, edit},
    },
};

const UPLINKS: [(&str, u32); 2] = [("eth0", 1), ("eth1", 2)];
const PODS: [(&str, u32); 2] = [("ns/pod4", 4), ("ns/pod5", 5)];
/// Pods of the other node: one behind a tunnel, which only IPv4 has, and one behind a direct route.
const TUNNELLED: u32 = 8;
const DIRECT: u32 = 9;
const VIP: u32 = 12;
const ROUTER: u32 = 16;
const OTHER_NODE: u32 = 17;
/// From here on, addresses are beyond the second uplink.
const SECOND: u32 = 24;
const OUTSIDE: u32 = 32;
/// A group, and everybody on the link: in IPv6 the router under its link-local address.
const GROUPS: [u32; 2] = [33, 34];

fn address(is_v6: bool, host: u32) -> IpAddr {
    match (is_v6, host) {
        (false, OUTSIDE) => Ipv4Addr::new(203, 0, 113, 1).into(),
        (true, OUTSIDE) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
        (false, host) if host == GROUPS[0] => Ipv4Addr::new(224, 0, 0, 251).into(),
        (true, host) if host == GROUPS[0] => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb).into(),
        (false, host) if host == GROUPS[1] => Ipv4Addr::BROADCAST.into(),
        (true, host) if host == GROUPS[1] => Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).into(),
        (false, host) => Ipv4Addr::from(0x0a00_0000 + host).into(),
        (true, host) => Ipv6Addr::from((0xfd << 120) + u128::from(host)).into(),
    }
}

fn both(host: u32) -> [IpAddr; 2] {
    [address(false, host), address(true, host)]
}

/// Protocol, addresses and port in front, address and port behind. Those of the node are node ports: of a pod, of another node's, and of
/// the node itself at a port that may be a failsafe.
const SERVICES: [(Protocol, &[u32], u16, u32, u16); 7] = [
    (Protocol::TCP, &[VIP], 80, 4, 8),
    (Protocol::UDP, &[VIP], 80, TUNNELLED, 80),
    (Protocol::TCP, &[VIP], 443, DIRECT, 80),
    (Protocol::TCP, &[1, 2], 81, 5, 80),
    (Protocol::UDP, &[1, 2], 81, DIRECT, 80),
    (Protocol::TCP, &[1, 2], 1024, 1, 443),
    (Protocol::UDP, &[1, 2], 1024, TUNNELLED, 443),
];

/// What is generated.
#[derive(Clone, Debug)]
pub struct World {
    pub model: Model,
    pub settings: HostSettings,
}

/// Where a packet comes from, and the packet.
pub type Sent = (Place, Packet);

/// Where an address is.
fn place(at: IpAddr) -> Place {
    let is = |host: u32| both(host).contains(&at);
    if let Some((name, _)) = PODS.iter().find(|(_, host)| is(*host)) {
        return Place::Pod(name);
    }
    match at {
        _ if UPLINKS.iter().any(|(_, host)| is(*host)) => Place::Node,
        // What is for the link alone is the node's where it comes in.
        _ if GROUPS.iter().any(|host| is(*host)) => Place::Node,
        _ if at == address(false, TUNNELLED) => Place::Tunnel,
        _ if (SECOND..OUTSIDE).any(is) => Place::Uplink("eth1"),
        _ => Place::Uplink("eth0"),
    }
}

fn host_endpoints(model: &Model) -> Vec<HostEndpoint> {
    let of_kind = model.endpoints.iter().filter(|e| e.kind == EndpointKind::HostEndpoint && e.local);
    let made = of_kind.map(|endpoint| {
        let (interface, addresses) = match endpoint.name.as_str() {
            "first" => (Some("eth0"), Vec::new()),
            "second" => (None, both(2).to_vec()),
            "all" => (Some("*"), Vec::new()),
            _ => (Some("eth9"), Vec::new()),
        };
        HostEndpoint { name: endpoint.name.clone(), interface: interface.map(str::to_owned), addresses }
    });
    made.collect()
}

fn cluster(world: &World) -> Cluster {
    let node = |name: &str, host| Node { name: name.into(), internal_ips: both(host).into(), ..Node::default() };
    let workload = |name: &str, node: &str, host, device: &str| Workload {
        name: name.into(),
        node: Some(node.into()),
        addresses: both(host).into(),
        device: device.into(),
        mac: Some(Mac([10, 0, 0, 0, 0, host as u8])),
    };
    let tunnelled = Pool { cidr: address(false, TUNNELLED).into(), ipip: TunnelMode::Always, nat_outgoing: false };
    Cluster {
        node_name: "a".into(),
        nodes: vec![node("a", 1), node("b", OTHER_NODE)],
        workloads: vec![
            workload(PODS[0].0, "a", PODS[0].1, "cali4"),
            workload(PODS[1].0, "a", PODS[1].1, "cali5"),
            workload("ns/tunnelled", "b", TUNNELLED, "cali8"),
            workload("ns/direct", "b", DIRECT, "cali9"),
        ],
        pools: vec![tunnelled],
        host_endpoints: host_endpoints(&world.model),
        host_settings: world.settings.clone(),
        snat_ports: (10_000, 20_000),
        ..Cluster::default()
    }
}

fn device(from: Place) -> IfIndex {
    match from {
        Place::Node => IfIndex::HOST,
        Place::Uplink("eth1") => IfIndex(3),
        Place::Uplink(_) | Place::Tunnel => IfIndex(2),
        Place::Pod(name) if name == PODS[0].0 => IfIndex(4),
        Place::Pod(_) => IfIndex(5),
    }
}

fn links() -> Links {
    let device = |name: &str, index, role, hosts: &[u32]| Device {
        name: name.into(),
        index: IfIndex(index),
        role,
        mac: Mac([2, 0, 0, 0, 0, index as u8]),
        mtu: 1500,
        addresses: hosts.iter().flat_map(|host| both(*host)).map(Into::into).collect(),
    };
    let (first, second) = (IfIndex(2), IfIndex(3));
    let route = |to: &str, via: Option<IpAddr>, device| Route { to: to.parse().unwrap(), via, device, metric: 0 };
    let neighbor = |host: u32, device| both(host).map(|address| Neighbor { address, mac: Mac([8; 6]), device });
    Links {
        devices: vec![
            device("eth0", 2, Role::Uplink, &[1]),
            device("eth1", 3, Role::Uplink, &[2]),
            device("cali4", 4, Role::Workload, &[]),
            device("cali5", 5, Role::Workload, &[]),
        ],
        routes: vec![
            route("10.0.0.16/29", None, first),
            route("fd00::10/125", None, first),
            route("10.0.0.24/29", None, second),
            route("fd00::18/125", None, second),
            route("0.0.0.0/0", Some(address(false, ROUTER)), first),
            route("::/0", Some(address(true, ROUTER)), first),
        ],
        neighbors: [neighbor(ROUTER, first), neighbor(OTHER_NODE, first)].concat(),
        loopback_sources: Vec::new(),
        complete: false,
        listening: Default::default(),
        multipaths: Vec::new(),
        refused: Vec::new(),
    }
}

fn services() -> ServiceTable {
    let service = |(number, (protocol, front, port, behind, target)): (usize, &(Protocol, &[u32], u16, u32, u16))| {
        let endpoint = |address| weir_nat::Endpoint {
            address,
            port: *target,
            ready: true,
            serving: true,
            terminating: false,
            topology: None,
        };
        let is_vip = front.contains(&VIP);
        // A service with a node port has a cluster IP too; to this one nobody sends.
        let unused = [IpAddr::from([10, 9, 0, number as u8]), "fd09::".parse().unwrap()];
        Arc::new(weir_nat::ServicePort {
            name: format!("ns/service{number}"),
            protocol: *protocol,
            port: *port,
            cluster_ips: if is_vip { both(VIP).into() } else { unused.into() },
            node_port: (!is_vip).then_some(*port),
            endpoints: both(*behind).map(endpoint).into(),
            ..weir_nat::ServicePort::default()
        })
    };
    ServiceTable::compile(&weir_nat::Model {
        node_name: "a".into(),
        local_addresses: UPLINKS.iter().flat_map(|(_, host)| both(*host)).collect(),
        services: SERVICES.iter().enumerate().map(service).collect(),
        ..weir_nat::Model::default()
    })
    .unwrap()
}

/// A node and its tables.
struct Tables<'w> {
    world: &'w World,
    cluster: Cluster,
    snapshot: Snapshot,
}

impl<'w> Tables<'w> {
    fn new(world: &'w World) -> Self {
        let cluster = cluster(world);
        let policy = Classifier::compile(&world.model).expect("within the limits");
        let snapshot = Snapshot {
            generation: 1,
            rules: Arc::new(Rules::new(services(), policy, &cluster)),
            snat: Arc::new(SnatPorts::new(10_000..=20_000, []).unwrap()),
            forwarding: Arc::new(Forwarding::compile(&cluster, &links()).unwrap()),
        };
        Self { world, cluster, snapshot }
    }

    fn fate(&self, (from, packet): &Sent) -> Fate {
        let uplinks = UPLINKS.map(|(name, host)| (name, both(host).to_vec()));
        let mut services = Vec::new();
        for (protocol, front, port, behind, target) in SERVICES {
            for front in front {
                let families = both(*front).into_iter().zip(both(behind));
                services.extend(families.map(|(front, behind)| (protocol, front, port, behind, target)));
            }
        }
        let site = Site {
            model: &self.world.model,
            host_endpoints: &self.cluster.host_endpoints,
            settings: &self.world.settings,
            uplinks: &uplinks,
            services: &services,
            cluster_ips: &both(VIP),
        };
        site.fate(*from, packet, place)
    }

    fn arrival(&self, from: Place) -> Arrival {
        let (index, forwarding) = (device(from), &self.snapshot.forwarding);
        let (origin, _) = Origin::of(index, forwarding).expect("a device, and a workload's");
        Arrival::by(origin, index, from == Place::Tunnel, forwarding)
    }

    fn decide<A: Routed>(&self, from: Place, key: &FlowKey<A>) -> Decision<'_, A> {
        decide::decide(&self.snapshot, self.arrival(from), key, &Affinity::new(64, [1, 2]), Tick(1000), &mut || 0)
    }
}

/// Does something with a packet's key.
trait WithKey {
    fn with<A: Routed>(self, key: &FlowKey<A>);
}

fn with_key(packet: &Packet, then: impl WithKey) {
    let (ports, protocol) = (Ports::new(packet.source_port, packet.destination_port), packet.protocol);
    match (packet.source, packet.destination) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => then.with(&FlowKey { src, dst, ports, protocol }),
        (IpAddr::V6(src), IpAddr::V6(dst)) => then.with(&FlowKey { src, dst, ports, protocol }),
        _ => unreachable!("both ends are of one family"),
    }
}

/// That `decide` says what the rules say of each packet, and `judge_again` the same of its connection.
pub fn agree(world: &World, packets: &[Sent]) {
    let tables = Tables::new(world);
    for sent in packets {
        with_key(&sent.1, Agree(&tables, sent));
    }
}

struct Agree<'a>(&'a Tables<'a>, &'a Sent);

impl WithKey for Agree<'_> {
    fn with<A: Routed>(self, key: &FlowKey<A>) {
        let Self(tables, sent) = self;
        let (fate, from) = (tables.fate(sent), sent.0);
        let decision = tables.decide(from, key);
        let policy = &tables.snapshot.rules.policy;
        let asked = decision.host.asked().filter_map(|asked| {
            let Judgement { allow, rule } = asked.judgement?;
            let name = policy.endpoint_name(policy.stage_endpoint(asked.endpoint, asked.stage)).to_owned();
            Some((name, asked.stage, asked.direction, allow, policy.rule_name(rule)))
        });
        let said: Vec<Said> = asked.collect();
        let context = || format!("{sent:?}\n{fate:?}\n{said:?}\n{decision:?}");
        assert!(said.iter().all(|one| fate.said.contains(one)), "{}", context());
        match refusal(&decision) {
            None => {
                assert_eq!(fate.refusals, [], "{}", context());
                assert_eq!(said.len(), fate.said.len(), "{}", context());
                assert_eq!(decision.untracked, fate.untracked, "{}", context());
            }
            Some(reason) => assert!(fate.refusals.contains(&reason), "{}", context()),
        }
        if refusal(&decision).is_none_or(DropReason::is_policy) {
            let again = decide::judge_again(&tables.snapshot, tables.arrival(from), key, &decision.translated);
            assert_eq!(again.err(), refusal(&decision), "{}", context());
        }
    }
}

fn refusal<A: Routed>(decision: &Decision<'_, A>) -> Option<DropReason> {
    match decision.verdict {
        Verdict::Forward | Verdict::Local => None,
        Verdict::Drop(reason) | Verdict::Reject(reason) => Some(reason),
        Verdict::Pass => panic!("there is a default route: {decision:?}"),
    }
}

/// That the stamps of a connection change where policy refuses it now. Untracked policy is asked about each packet from an uplink, whatever
/// the stamps.
pub fn follow(before: &World, after: &World, packets: &[Sent]) {
    let tables = [before, after].map(Tables::new);
    for sent in packets {
        with_key(&sent.1, Follow(&tables, sent));
    }
}

struct Follow<'a>(&'a [Tables<'a>; 2], &'a Sent);

impl WithKey for Follow<'_> {
    fn with<A: Routed>(self, key: &FlowKey<A>) {
        let Self(tables, sent) = self;
        let [before, after] = tables.each_ref().map(|tables| tables.decide(sent.0, key));
        let is_asked_anyway = matches!(sent.0, Place::Uplink(_) | Place::Tunnel)
            && after.host.asked().any(|asked| asked.stage == HostStage::Untracked && asked.judgement.is_some());
        if before.untracked || refusal(&before).is_some() || is_asked_anyway {
            return;
        }
        let [old, new] = tables
            .each_ref()
            .map(|tables| decide::policy_stamps(&tables.snapshot, tables.arrival(sent.0), &before.translated));
        if old == new {
            assert_eq!(refusal(&after), None, "{sent:?}\n{before:?}\n{after:?}");
        }
    }
}

fn failsafes() -> impl Strategy<Value = Vec<Failsafe>> {
    let protocol = select(vec![Protocol::TCP, Protocol::UDP, Protocol::SCTP]);
    let port = select(vec![0u16, 3, 8, 80, 81, 82, 443, 1024, 65535]);
    let net = proptest::option::weighted(0.3, world::net());
    let one = (protocol, port, net).prop_map(|(protocol, port, net)| Failsafe { protocol, port, net });
    proptest::collection::vec(one, 0..4)
}

fn settings() -> impl Strategy<Value = HostSettings> {
    (failsafes(), failsafes(), any::<bool>()).prop_map(|(inbound, outbound, is_open)| HostSettings {
        failsafe_inbound: inbound,
        failsafe_outbound: outbound,
        endpoint_to_host: if is_open { EndpointToHost::Accept } else { EndpointToHost::Drop },
    })
}

/// A change of anything.
#[derive(Clone, Debug)]
pub enum Change {
    Policy(Edit),
    Settings(HostSettings),
}

pub fn change() -> impl Strategy<Value = Change> {
    prop_oneof![4 => edit().prop_map(Change::Policy), 1 => settings().prop_map(Change::Settings)]
}

impl Change {
    pub fn apply(&self, world: &World) -> World {
        let mut changed = world.clone();
        match self {
            Self::Settings(settings) => changed.settings = settings.clone(),
            Self::Policy(edit) => {
                edit.apply(&mut changed.model);
                // The pods stay: without them, nothing would be left to ask about. What else comes to this node has no device.
                let is_pod = |endpoint: &Arc<Endpoint>| PODS.iter().any(|(name, _)| *name == endpoint.name);
                let pods = world.model.endpoints.iter().filter(|endpoint| is_pod(endpoint)).map(|pod| {
                    let changed = changed.model.endpoints.iter().find(|endpoint| endpoint.name == pod.name);
                    let mut pod = Arc::clone(changed.unwrap_or(pod));
                    Arc::make_mut(&mut pod).local = true;
                    pod
                });
                let pods: Vec<Arc<Endpoint>> = pods.collect();
                changed.model.endpoints.retain(|endpoint| !is_pod(endpoint));
                changed.model.endpoints.extend(pods);
            }
        }
        changed
    }
}

pub fn site() -> impl Strategy<Value = World> {
    let scopes =
        select(vec![PolicyScope::Normal, PolicyScope::ApplyOnForward, PolicyScope::PreDnat, PolicyScope::Untracked]);
    let named = proptest::collection::vec(world::endpoint(), PODS.len() + 3);
    let present = proptest::array::uniform3(proptest::bool::weighted(0.7));
    let plain = proptest::collection::vec(any::<bool>(), 16);
    let parts = (world::model(3), named, present, proptest::collection::vec(scopes, 16), plain, settings());
    parts.prop_map(|(mut model, named, present, scopes, plain, settings)| {
        for endpoint in &mut model.endpoints {
            Arc::make_mut(endpoint).local = false;
        }
        let mut named = named.into_iter();
        for (name, host) in PODS {
            let made = named.next().unwrap();
            model.endpoints.push(Arc::new(Endpoint {
                name: name.into(),
                kind: EndpointKind::Workload,
                local: true,
                nets: both(host).map(Into::into).into(),
                profiles: [vec!["open".to_owned()], made.profiles.clone()].concat(),
                ..made
            }));
        }
        for (name, _) in ["first", "second", "all"].iter().zip(present).filter(|(_, is_present)| *is_present) {
            let made = named.next().unwrap();
            let (name, kind) = ((*name).to_owned(), EndpointKind::HostEndpoint);
            model.endpoints.push(Arc::new(Endpoint { name, kind, local: true, ..made }));
        }
        let policies = model.tiers.iter_mut().flat_map(|tier| &mut tier.policies);
        for (policy, scope) in policies.zip(scopes.iter().cycle()) {
            let policy = Arc::make_mut(policy);
            policy.scope = *scope;
            let rules = policy.ingress.iter_mut().flatten().chain(policy.egress.iter_mut().flatten());
            for (rule, _) in rules.zip(plain.iter().cycle()).filter(|(_, is_plain)| **is_plain) {
                // With fewer conditions it meets more packets.
                rule.source = EntityMatch::default();
                rule.destination = EntityMatch { ports: rule.destination.ports.clone(), ..EntityMatch::default() };
            }
        }
        World { model, settings }
    })
}

pub fn packets() -> impl Strategy<Value = Vec<Sent>> {
    let port = || select(vec![0u16, 3, 8, 80, 81, 82, 443, 1024, 65535]);
    let protocol = select(vec![
        Protocol::TCP,
        Protocol::TCP,
        Protocol::UDP,
        Protocol::UDP,
        Protocol::SCTP,
        Protocol::ICMP,
        Protocol(47),
    ]);
    // The node, pods here and there, a service's address, and outside. Nobody has the service's address.
    let source = prop_oneof![select(vec![1, 2, 4, 5, TUNNELLED, DIRECT]), VIP + 1..=OUTSIDE];
    let destination = prop_oneof![select(vec![1, 2, 4, 5, TUNNELLED, DIRECT, VIP, GROUPS[0], GROUPS[1]]), 0..=OUTSIDE];
    let packet = (any::<[bool; 2]>(), source, destination, protocol, port(), port()).prop_map(
        |([is_v6, is_bare], source, destination, protocol, source_port, destination_port)| {
            let (source, destination) = (address(is_v6, source), address(is_v6, destination));
            let from = match place(source) {
                // Somebody on the link makes use of a tunnelled pod's address.
                Place::Tunnel if is_bare => Place::Uplink("eth0"),
                from => from,
            };
            // ICMP's type stands where the destination's port is.
            let (protocol, destination_port) = match (protocol, is_v6) {
                (Protocol::ICMP, true) => (Protocol::ICMPV6, [128, 129, 1][usize::from(destination_port % 3)]),
                (Protocol::ICMP, false) => (Protocol::ICMP, [8, 0, 3][usize::from(destination_port % 3)]),
                (other, _) => (other, destination_port),
            };
            (from, Packet { source, destination, protocol, source_port, destination_port })
        },
    );
    proptest::collection::vec(packet, 60)
}
