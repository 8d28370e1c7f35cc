//! A worker over memory, in a small cluster, for tests that drive the whole pipeline.
//!
//! Node a is the router under test, with two pods; node b has a third pod, over a tunnel for IPv4 and a direct route for IPv6; others are
//! outside of the cluster, on the uplink's link.

use std::{collections::BTreeMap, net::IpAddr, ops::Deref, sync::Arc};

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use weir_conntrack::ConnRef;
use weir_dataplane::{
    action_log::Logged,
    counters::Totals,
    driver::Driver,
    forwarding::Forwarding,
    frame::{IfIndex, LinkType, MAX_FRAMES, ONE_FRAME_BYTES, Packet, frames_of_mtu},
    memory_worker::{MemoryWorker, Room, Shared},
    model::{Cluster, Device, Links, Neighbor, Node, Pool, Role, Route, TunnelMode, Workload},
    offload::Offload,
    pipeline::{Context, Event, process_burst},
    snapshot::{Rules, Snapshot},
    tables::Family,
};
use weir_nat::{ServiceTable, SnatPorts};
use weir_packet::{Direction, DropReason, FlowKey, Mac, Protocol, Tick};
use weir_policy::Classifier;

pub const UPLINK: IfIndex = IfIndex(2);
pub const CLIENT_POD: IfIndex = IfIndex(11);
pub const SERVER_POD: IfIndex = IfIndex(12);
pub const GATEWAY_MAC: Mac = Mac([0xee; 6]);
pub const UPLINK_MAC: Mac = Mac([2, 0, 0, 0, 0, 10]);
pub const OTHER_MAC: Mac = Mac([2, 0, 0, 0, 0, 11]);

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub fn cluster() -> Cluster {
    let node = |name: &str, addresses: [&str; 2], ranges: [&str; 2]| Node {
        name: name.into(),
        internal_ips: addresses.map(ip).into(),
        pod_cidrs: ranges.map(|r| r.parse().unwrap()).into(),
        ..Node::default()
    };
    let workload = |name: &str, node: &str, addresses: [&str; 2], device: &str, last: u8| Workload {
        name: name.into(),
        node: Some(node.into()),
        addresses: addresses.map(ip).into(),
        device: device.into(),
        mac: Some(Mac([10, 0, 0, 0, 0, last])),
    };
    let pool = |cidr: &str, ipip| Pool { cidr: cidr.parse().unwrap(), ipip, nat_outgoing: true };
    Cluster {
        node_name: "a".into(),
        nodes: vec![
            node("a", ["192.168.10.1", "fd00:10::1"], ["10.1.1.0/24", "fd00:1:1::/64"]),
            node("b", ["192.168.10.2", "fd00:10::2"], ["10.1.2.0/24", "fd00:1:2::/64"]),
        ],
        workloads: vec![
            workload("default/client", "a", ["10.1.1.10", "fd00:1:1::10"], "cali1", 1),
            workload("default/server", "a", ["10.1.1.20", "fd00:1:1::20"], "cali2", 2),
            workload("default/remote", "b", ["10.1.2.20", "fd00:1:2::20"], "cali3", 3),
        ],
        pools: vec![pool("10.1.0.0/16", TunnelMode::Always), pool("fd00:1::/32", TunnelMode::Never)],
        pod_cidrs: vec!["10.1.0.0/16".parse().unwrap(), "fd00:1::/32".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        snat_ports: (10000, 20000),
        ..Cluster::default()
    }
}

pub fn links() -> Links {
    let device = |name: &str, index, role, mac, addresses: &[&str]| Device {
        name: name.into(),
        index,
        role,
        mac,
        mtu: 1500,
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
    };
    let neighbor = |address: &str| Neighbor { address: ip(address), mac: OTHER_MAC, device: UPLINK };
    Links {
        devices: vec![
            device("eth0", UPLINK, Role::Uplink, UPLINK_MAC, &["192.168.10.1/24", "fd00:10::1/64"]),
            device("cali1", CLIENT_POD, Role::Workload, GATEWAY_MAC, &[]),
            device("cali2", SERVER_POD, Role::Workload, GATEWAY_MAC, &[]),
        ],
        routes: vec![Route {
            to: "172.20.0.0/16".parse().unwrap(),
            via: Some(ip("192.168.10.100")),
            device: UPLINK,
            metric: 0,
        }],
        loopback_sources: Vec::new(),
        complete: false,
        listening: [9090].into(),
        neighbors: ["192.168.10.2", "192.168.10.100", "fd00:10::2", "fd00:10::100"].map(neighbor).into(),
        multipaths: Vec::new(),
        refused: Vec::new(),
    }
}

/// A service with one port: 53, and 5353 at its backends.
pub fn service(
    name: &str,
    protocol: Protocol,
    vips: [&str; 2],
    backends: [&str; 2],
    node_port: Option<u16>,
) -> weir_nat::ServicePort {
    weir_nat::ServicePort {
        name: name.into(),
        protocol,
        port: 53,
        cluster_ips: vips.map(ip).into(),
        node_port,
        endpoints: backends
            .iter()
            .map(|address| weir_nat::Endpoint {
                address: ip(address),
                port: 5353,
                ready: true,
                serving: true,
                terminating: false,
                topology: None,
            })
            .collect(),
        ..weir_nat::ServicePort::default()
    }
}

/// These services, and a policy that allows all, or nothing into pods.
pub fn rules(services: Vec<weir_nat::ServicePort>, is_open: bool) -> Rules {
    tiered(services, Vec::new(), is_open)
}

/// These services and tiers, and, for what they do not decide, a policy that allows all, or nothing into pods.
pub fn tiered(services: Vec<weir_nat::ServicePort>, tiers: Vec<weir_policy::model::Tier>, is_open: bool) -> Rules {
    let services = ServiceTable::compile(&weir_nat::Model {
        node_name: "a".into(),
        pod_cidrs: cluster().pod_cidrs,
        local_addresses: ["192.168.10.1", "fd00:10::1"].map(ip).into(),
        service_cidrs: cluster().service_cidrs,
        services: services.into_iter().map(Arc::new).collect(),
        ..weir_nat::Model::default()
    })
    .unwrap();
    let cluster = cluster();
    let endpoints = cluster.workloads.iter().take(2).map(|w| weir_policy::model::Endpoint {
        name: w.name.clone(),
        local: true,
        nets: w.addresses.iter().map(|a| (*a).into()).collect(),
        profiles: vec!["all".into()],
        ..weir_policy::model::Endpoint::default()
    });
    let allow = vec![weir_policy::model::Rule::default()];
    let profile = weir_policy::model::Profile {
        name: "all".into(),
        ingress: if is_open { allow.clone() } else { Vec::new() },
        egress: allow,
    };
    let policy = Classifier::compile(&weir_policy::model::Model {
        endpoints: endpoints.map(Arc::new).collect(),
        profiles: vec![Arc::new(profile)],
        tiers,
    })
    .unwrap();
    Rules::new(services, policy, &cluster)
}

/// A worker over memory.
pub struct Router {
    shared: Shared,
    worker: MemoryWorker,
    /// Of each worker.
    room: Room,
    snat: Arc<SnatPorts>,
    pub forwarding: Arc<Forwarding>,
    generation: u32,
    pub now: Tick,
    /// To whom it hands flows over.
    pub offload: Option<Arc<Offload>>,
    /// Bytes of an arriving packet in each of its frames, over and over.
    pub frame_bytes: Vec<usize>,
    /// How the packets of a turn were addressed at the link layer, over and over.
    pub link_types: Vec<LinkType>,
}

impl Deref for Router {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Router {
    /// With room for so many connections of each family.
    pub fn new(rules: Rules, snat: SnatPorts, max_entries: u32) -> Self {
        Self::of(&cluster(), rules, snat, max_entries)
    }

    /// In another cluster.
    pub fn of(cluster: &Cluster, rules: Rules, snat: SnatPorts, max_entries: u32) -> Self {
        Self::between(cluster, &links(), rules, snat, max_entries)
    }

    /// In another cluster, with other devices.
    pub fn between(cluster: &Cluster, links: &Links, rules: Rules, snat: SnatPorts, max_entries: u32) -> Self {
        let largest = links.devices.iter().map(|device| device.mtu).max();
        let forwarding = Arc::new(Forwarding::compile(cluster, links).unwrap());
        let snat = Arc::new(snat);
        let snapshot =
            Snapshot { generation: 1, rules: Arc::new(rules), snat: snat.clone(), forwarding: forwarding.clone() };
        let shared = Shared::repeatable(snapshot, [max_entries; 2]);
        let frames = 1024 * frames_of_mtu(largest.unwrap_or(1500));
        let room = Room { burst: 64, ports: 3, frames, events: 64 };
        Self {
            worker: MemoryWorker::new(&shared, ChaCha8Rng::seed_from_u64(3), room),
            room,
            shared,
            snat,
            forwarding,
            generation: 1,
            now: Tick(1000),
            offload: None,
            frame_bytes: vec![ONE_FRAME_BYTES],
            link_types: vec![LinkType::Host],
        }
    }

    /// The same, whose worker handles every packet the general way.
    pub fn without_straight_way(self) -> Self {
        let worker = MemoryWorker { pipeline: self.worker.pipeline.without_straight_way(), ..self.worker };
        Self { worker, ..self }
    }

    /// Packets that went the straight way.
    pub fn went_straight(&self) -> u64 {
        self.worker.pipeline.went_straight()
    }

    pub fn publish(&mut self, rules: Rules) {
        let next = self.next(rules, self.forwarding.clone());
        self.shared.published.publish(next);
    }

    /// What is to be published next.
    pub fn next(&mut self, rules: Rules, forwarding: Arc<Forwarding>) -> Arc<Snapshot> {
        self.generation += 1;
        self.forwarding = forwarding.clone();
        let snat = self.snat.clone();
        Arc::new(Snapshot { generation: self.generation, rules: Arc::new(rules), snat, forwarding })
    }

    /// Looks at the connection that has this key for a direction, if there is one.
    pub fn connection<A: Family, R>(
        &mut self,
        key: &FlowKey<A>,
        look: impl FnOnce(ConnRef<'_, A>, Direction) -> R,
    ) -> Option<R> {
        let (turn, table) = (self.worker.participant.enter(), A::table(&self.shared.tables));
        let hit = table.lookup(key, table.hash(key), self.now, &turn)?;
        Some(look(table.conn(hit.conn), hit.direction))
    }

    /// The rules in force.
    pub fn rules(&self) -> Arc<Rules> {
        self.published.current().rules.clone()
    }

    /// Frees what is published no more.
    pub fn collect(&self) {
        assert_eq!(self.published.collect(), 0, "nobody is in a turn");
    }

    /// Another worker takes the turns from now on. The one so far holds nothing.
    pub fn change_worker(&mut self) {
        assert_eq!((self.worker.pipeline.held(), self.worker.events.len()), (0, 0));
        self.worker = MemoryWorker::new(&self.shared, ChaCha8Rng::seed_from_u64(4), self.room);
    }

    fn packet(&mut self, bytes: &[u8]) -> Packet {
        let mut sizes = self.frame_bytes.iter().cycle();
        let (first, mut rest) = bytes.split_at(bytes.len().min(*sizes.next().expect("a size")));
        let mut packet = self.worker.driver.packet_of(&[first]).expect("frames for a burst");
        for size in sizes {
            if rest.is_empty() {
                break;
            }
            let (next, later) = rest.split_at(rest.len().min(*size));
            let next = self.worker.driver.packet_of(&[next]).expect("frames for a burst");
            let (segment, _) = self.worker.driver.arena().split(next);
            self.worker.driver.arena_mut().append(&mut packet, segment);
            rest = later;
        }
        packet
    }

    /// One turn with these frames; what was sent.
    pub fn turn(&mut self, frames: &[(IfIndex, Vec<u8>)]) -> Vec<(IfIndex, Vec<u8>)> {
        self.turn_by(None, frames)
    }

    /// The same, in a turn that began when that snapshot was in force, or `None`: by the one that is now.
    pub fn turn_by(&mut self, snapshot: Option<&Snapshot>, frames: &[(IfIndex, Vec<u8>)]) -> Vec<(IfIndex, Vec<u8>)> {
        for (number, (device, bytes)) in frames.iter().enumerate() {
            let mut packet = self.packet(bytes);
            (packet.device, packet.link) = (*device, self.link_types[number % self.link_types.len()]);
            self.worker.burst.push(packet);
        }
        let offload = self.offload.as_deref();
        self.worker.turn(&self.shared, self.now, |pipeline, driver, burst, context| {
            let context = Context { offload, snapshot: snapshot.unwrap_or(context.snapshot), ..*context };
            process_burst(pipeline, driver, burst, &context);
            pipeline.maintain(driver, &context, 32);
        });
        let mut sent = Vec::new();
        self.worker.driver.drain_sent(|device, bytes| sent.push((device, bytes.to_vec())));
        let totals = self.totals();
        assert!(totals.balance(), "{totals:?}");
        let held = totals.held;
        assert!(
            (held..=MAX_FRAMES as u64 * held).contains(&u64::from(self.worker.driver.outstanding())),
            "frames for each held packet"
        );
        sent
    }

    pub fn one(&mut self, device: IfIndex, frame: &[u8]) -> Vec<(IfIndex, Vec<u8>)> {
        self.turn(&[(device, frame.to_vec())])
    }

    pub fn wait(&mut self, ticks: u32) -> Vec<(IfIndex, Vec<u8>)> {
        self.now = Tick(self.now.0 + ticks);
        self.turn(&[])
    }

    /// What rules logged since this was asked last.
    pub fn logged(&self) -> Vec<Logged> {
        let logged = |event| match event {
            Event::Logged(logged) => Some(logged),
            Event::Resolve { .. } | Event::Learned { .. } => None,
        };
        self.worker.events.try_iter().filter_map(logged).collect()
    }

    /// What MAC addresses were asked for since this was asked last.
    pub fn asked(&self) -> Vec<(IfIndex, IpAddr)> {
        let asked = |event| match event {
            Event::Resolve { device, address } => Some((device, address)),
            Event::Logged(_) | Event::Learned { .. } => None,
        };
        self.worker.events.try_iter().filter_map(asked).collect()
    }

    /// Whose MAC addresses were told since this was asked last.
    pub fn learned(&self) -> Vec<(IfIndex, IpAddr)> {
        let learned = |event| match event {
            Event::Learned { device, address, .. } => Some((device, address)),
            Event::Logged(_) | Event::Resolve { .. } => None,
        };
        self.worker.events.try_iter().filter_map(learned).collect()
    }

    pub fn totals(&self) -> Totals {
        self.worker.pipeline.totals()
    }

    pub fn drops(&self) -> BTreeMap<DropReason, u64> {
        self.totals().drops.into_iter().collect()
    }

    /// Ends the worker: nothing is held any more, no frame is missing.
    pub fn finish(mut self) -> Totals {
        self.worker.pipeline.give_up_held(&mut self.worker.driver);
        assert_eq!(self.worker.driver.outstanding(), 0);
        let totals = self.totals();
        assert!(totals.balance() && totals.held == 0, "{totals:?}");
        totals
    }
}

/// The ones' complement sum, two bytes at a time.
pub fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// Puts a frame's IPv4 packet into a tunnel packet from node b.
pub fn tunnelled(frame: &[u8]) -> Vec<u8> {
    let mut outer = [&frame[..14], &[0x45, 0]].concat();
    outer.extend((frame.len() as u16 - 14 + 20).to_be_bytes());
    outer.extend([0, 0, 0x40, 0, 64, 4, 0, 0, 192, 168, 10, 2, 192, 168, 10, 1]);
    let checksum = !sum(&outer[14..34]);
    outer[24..26].copy_from_slice(&checksum.to_be_bytes());
    [&outer, &frame[14..]].concat()
}
