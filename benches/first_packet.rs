//! The whole first packet of a connection: parse, service, policy of both ends, SNAT, both keys into the table, and out, at 10 to 50,000
//! services and 10 to 10,000 policy rules, and with many of one and few of the other.
//!
//! Every packet is a TCP SYN of a new flow to a random service. Each service has ten backends: five of 250 pods of this node, five
//! remote pods of its own, reached by IPIP. Three of four packets come from 32 pods of this node, whose egress policy has half of the
//! rules: by label, and one port each. The others come from outside, from CIDRs that ingress policy of the local backends allows, and take an
//! address and port of the node. So of eight packets three are judged twice, four once, and two are masqueraded, at every size.
//!
//! Only [`handle`] is measured. Frames are written before. A pass opens as many flows as the table is made for; after it
//! the time is put behind their timeout, and sweeps take them out, so each pass finds an empty table. It is a small table on purpose: what it
//! costs is the same at every size, and with a larger one the ratio of sizes would be flattered by its cache misses.
//!
//! Sizes take turns, each after passes that only warm the caches, and medians are of bursts, of which other work on the machine interrupts few:
//! Criterion measures one after the other, which a loaded machine makes incomparable. `first_packet SERVICES RULES ROUNDS` does one size
//! alone, for tools that count instructions.

use std::{
    env,
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use etherparse::PacketBuilder;
use ipnet::IpNet;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use weir_benches::figures::{Spread, tell};
use weir_dataplane::{
    forwarding::Forwarding,
    frame::{IfIndex, Packet},
    memory::MemoryDriver,
    memory_worker::{MemoryWorker, Room, Shared},
    model::{Cluster, Device, Links, Neighbor, Node, Pool, Role, TunnelMode, Workload},
    pipeline::{Context, Pipeline, process_burst},
    snapshot::{Rules, Snapshot},
};
use weir_nat::{ServicePort, ServiceTable, SnatPorts};
use weir_packet::{Mac, Protocol, Tick};
use weir_policy::{
    Classifier, Selector,
    model::{Endpoint, EntityMatch, Peer, Policy, PortMatch, Rule, Tier},
};

/// Services, and policy rules of both directions together.
const SIZES: [(u32, u32); 6] = [(10, 10), (1000, 1000), (10_000, 10), (10, 10_000), (10_000, 10_000), (50_000, 10_000)];
const ROUNDS: u32 = 60;
/// Passes of a size's turn before the one that counts, so that most services have been visited in it.
const WARMING_PASSES: u32 = 4;
const BURST: usize = 64;
/// Flows of a pass.
const FLOWS: u32 = 4096;
/// More than a connection lives that was never answered, in ticks.
const LONGER_THAN_TIMEOUTS: u32 = 60_000;

const CLIENTS: u32 = 32;
const SERVERS: u32 = 250;
const REMOTE_NODES: u32 = 99;
const BACKENDS_OF_EACH_KIND: u32 = 5;
const UPLINK: IfIndex = IfIndex(1);
const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const VETH_MAC: [u8; 6] = [0xee; 6];

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn cluster_ip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0xac10_0001 + service)
}

fn client(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a00_0001 + number)
}

fn server(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a00_0101 + number)
}

/// The address of a remote pod, and its node: 1 and so on.
fn remote(number: u32) -> (Ipv4Addr, u32) {
    let node = 1 + number % REMOTE_NODES;
    (Ipv4Addr::from_bits(0x0a00_0001 + (node << 16) + number / REMOTE_NODES), node)
}

fn node_address(node: u32) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 10, 1 + node as u8)
}

fn node_name(node: u32) -> String {
    format!("node-{node}")
}

fn pod_mac(device: IfIndex) -> [u8; 6] {
    [2, 0, 0, 1, (device.0 >> 8) as u8, device.0 as u8]
}

/// The block of the outside clients that the ingress rule of this number allows.
fn outside(rule: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0xc600_0000 + (rule << 8))
}

/// How large a cluster is.
#[derive(Clone, Copy)]
struct Size {
    services: u32,
    /// Rules of each direction.
    rules: u32,
}

impl Size {
    /// Remote pods have the labels of so many applications. One more rule is about the local backends.
    fn applications(self) -> u32 {
        self.rules - 1
    }

    fn port(self, service: u32) -> u16 {
        8000 + (service % self.applications() % 50) as u16
    }

    fn remote_pods(self) -> u32 {
        self.services * BACKENDS_OF_EACH_KIND
    }

    fn service_table(self) -> ServiceTable {
        let service = |number: u32| {
            let endpoint = |address: Ipv4Addr, node: u32| weir_nat::Endpoint {
                address: address.into(),
                port: self.port(number),
                ready: true,
                serving: true,
                terminating: false,
                topology: Some(Arc::new(weir_nat::Topology::on(node_name(node)))),
            };
            let backends = || (0..BACKENDS_OF_EACH_KIND).map(move |index| number * BACKENDS_OF_EACH_KIND + index);
            let here = backends().map(|backend| endpoint(server(backend % SERVERS), 0));
            let elsewhere = backends().map(remote).map(|(address, node)| endpoint(address, node));
            Arc::new(ServicePort {
                name: format!("namespace-{}/service-{number}:http", number % 50),
                protocol: Protocol::TCP,
                port: 80,
                cluster_ips: vec![cluster_ip(number).into()],
                endpoints: here.chain(elsewhere).collect(),
                origin: number,
                ..ServicePort::default()
            })
        };
        ServiceTable::compile(&weir_nat::Model {
            node_name: node_name(0),
            pod_cidrs: vec![net("10.0.0.0/9")],
            local_addresses: vec![node_address(0).into()],
            service_cidrs: vec![net("172.16.0.0/12")],
            services: (0..self.services).map(service).collect(),
            ..weir_nat::Model::default()
        })
        .expect("the services compile")
    }

    fn classifier(self) -> Classifier {
        let pod = |(name, address, application): (String, Ipv4Addr, String), local: bool| {
            Arc::new(Endpoint {
                name,
                local,
                labels: [("app".to_owned(), application)].into(),
                nets: vec![IpNet::from(IpAddr::from(address))],
                ..Endpoint::default()
            })
        };
        let is = |application: &str| Selector::Equals("app".to_owned(), application.to_owned());
        let ports = |first: u16, last: u16| Some(vec![PortMatch::Range(first, last)]);
        let allow = |number: u32, source: Vec<Peer>, destination: Vec<Peer>, ports: Option<Vec<PortMatch>>| Rule {
            number,
            protocol: Some(Protocol::TCP),
            source: EntityMatch { any_of: source, ..EntityMatch::default() },
            destination: EntityMatch { any_of: destination, ports, ..EntityMatch::default() },
            ..Rule::default()
        };
        let to_application = |number: u32| {
            let port = self.port(number);
            allow(number, vec![], vec![Peer::Selector(is(&format!("app-{number}")))], ports(port, port))
        };
        let to_servers = allow(self.rules, vec![], vec![Peer::Selector(is("server"))], ports(8000, 8049));
        let from_outside = |number: u32| {
            let cidr = IpNet::new(outside(number).into(), 24).expect("a length");
            allow(number, vec![Peer::Block { cidr, except: vec![] }], vec![], ports(8000 - (number % 50) as u16, 8049))
        };
        let from_clients = allow(self.rules, vec![Peer::Selector(is("client"))], vec![], ports(8000, 8049));
        let egress = Policy {
            name: "egress".into(),
            selector: is("client"),
            egress: Some((0..self.applications()).map(to_application).chain([to_servers]).collect()),
            ..Policy::default()
        };
        let ingress = Policy {
            name: "ingress".into(),
            selector: is("server"),
            ingress: Some((0..self.applications()).map(from_outside).chain([from_clients]).collect()),
            ..Policy::default()
        };
        let local = local_pods().map(|one| pod(one, true));
        let remote = self.remote().map(|(name, address, _, application)| pod((name, address, application), false));
        let policies = vec![Arc::new(egress), Arc::new(ingress)];
        Classifier::compile(&weir_policy::Model {
            endpoints: local.chain(remote).collect(),
            tiers: vec![Tier { policies, ..Tier::default() }],
            ..weir_policy::Model::default()
        })
        .expect("the policies compile")
    }

    /// Remote pods: name, address, node, application.
    fn remote(self) -> impl Iterator<Item = (String, Ipv4Addr, u32, String)> {
        (0..self.remote_pods()).map(move |number| {
            let (address, node) = remote(number);
            let application = number / BACKENDS_OF_EACH_KIND % self.applications();
            (format!("default/remote-{number}"), address, node, format!("app-{application}"))
        })
    }

    fn cluster(self) -> Cluster {
        let local = local_pods().zip(2..).map(|((name, address, _), index)| Workload {
            device: name.clone(),
            name,
            node: Some(node_name(0)),
            addresses: vec![address.into()],
            mac: Some(Mac(pod_mac(IfIndex(index)))),
        });
        let remote = self.remote().map(|(name, address, node, _)| Workload {
            device: String::new(),
            name,
            node: Some(node_name(node)),
            addresses: vec![address.into()],
            mac: None,
        });
        let node = |number: u32| Node {
            name: node_name(number),
            internal_ips: vec![node_address(number).into()],
            pod_cidrs: vec![net(&format!("10.{number}.0.0/16"))],
            ..Node::default()
        };
        Cluster {
            node_name: node_name(0),
            nodes: (0..=REMOTE_NODES).map(node).collect(),
            workloads: local.chain(remote).collect(),
            pools: vec![Pool { cidr: net("10.0.0.0/9"), ipip: TunnelMode::Always, nat_outgoing: true }],
            pod_cidrs: vec![net("10.0.0.0/9")],
            service_cidrs: vec![net("172.16.0.0/12")],
            ..Cluster::default()
        }
    }
}

/// This node's pods: name, address, application. Clients come first.
fn local_pods() -> impl Iterator<Item = (String, Ipv4Addr, String)> {
    let clients = (0..CLIENTS).map(|number| (format!("default/client-{number}"), client(number), "client".to_owned()));
    clients.chain((0..SERVERS).map(|number| (format!("default/server-{number}"), server(number), "server".to_owned())))
}

fn links() -> Links {
    let uplink = Device {
        name: "eth0".into(),
        index: UPLINK,
        role: Role::Uplink,
        mac: Mac(NODE_MAC),
        mtu: 1500,
        addresses: vec![net("192.168.10.1/24")],
    };
    let pods = local_pods().zip(2..).map(|((name, ..), index)| Device {
        name,
        index: IfIndex(index),
        role: Role::Workload,
        mac: Mac(VETH_MAC),
        mtu: 1500,
        addresses: Vec::new(),
    });
    let neighbors = (1..=REMOTE_NODES).map(|node| Neighbor {
        address: node_address(node).into(),
        mac: Mac([2, 0, 0, 2, 0, node as u8]),
        device: UPLINK,
    });
    Links { devices: std::iter::once(uplink).chain(pods).collect(), neighbors: neighbors.collect(), ..Links::default() }
}

/// A worker over memory, in a cluster of one size.
struct Worker {
    size: Size,
    shared: Shared,
    worker: MemoryWorker,
    frame: Vec<u8>,
    random: ChaCha8Rng,
    flow: u32,
    now: Tick,
}

impl Worker {
    fn new(size: Size) -> Self {
        let cluster = size.cluster();
        let forwarding = Arc::new(Forwarding::compile(&cluster, &links()).expect("few next hops"));
        let rules = Arc::new(Rules::new(size.service_table(), size.classifier(), &cluster).counting(1));
        let snat = Arc::new(SnatPorts::new(10_000..=29_999, []).expect("ports are left"));
        // Some of it is kept for the node itself.
        let entries = [FLOWS + FLOWS / 16, 16];
        let shared = Shared::repeatable(Snapshot { generation: 1, rules, snat, forwarding }, entries);
        Self {
            size,
            worker: MemoryWorker::new(
                &shared,
                ChaCha8Rng::seed_from_u64(7),
                Room { burst: BURST, ports: 2, frames: 4 * BURST as u32, events: 16 },
            ),
            shared,
            frame: Vec::new(),
            random: ChaCha8Rng::seed_from_u64(11),
            flow: 0,
            now: Tick(1),
        }
    }

    /// A number below `limit`.
    fn below(&mut self, limit: u32) -> u32 {
        ((u64::from(self.random.next_u32()) * u64::from(limit)) >> 32) as u32
    }

    /// Writes the first packets of flows that no pass of this age has.
    fn fill(&mut self) {
        while self.worker.burst.len() < BURST {
            let number = self.flow;
            self.flow += 1;
            let service = cluster_ip(self.below(self.size.services));
            let (device, source, macs) = if number.is_multiple_of(4) {
                let block = outside(self.below(self.size.applications()));
                let address = Ipv4Addr::from_bits(block.to_bits() | self.below(256));
                (UPLINK, address, ([2, 0, 0, 3, 0, 1], NODE_MAC))
            } else {
                let pod = number / 4 % CLIENTS;
                let device = IfIndex(2 + pod);
                (device, client(pod), (pod_mac(device), VETH_MAC))
            };
            let port = 1024 + (number % 64_512) as u16;
            self.frame.clear();
            PacketBuilder::ethernet2(macs.0, macs.1)
                .ipv4(source.octets(), service.octets(), 64)
                .tcp(port, 80, 1, 64_000)
                .syn()
                .write(&mut self.frame, &[])
                .expect("a vector takes every byte");
            self.worker.push(device, &self.frame);
        }
    }

    /// Opens [`FLOWS`] connections, tells `sample` how long each burst took, and lets them expire.
    fn pass(&mut self, mut sample: impl FnMut(Duration)) {
        for _ in 0..FLOWS as usize / BURST {
            self.fill();
            self.worker.turn(&self.shared, self.now, |pipeline, driver, burst, context| {
                let begin = Instant::now();
                handle(pipeline, driver, burst, context);
                sample(begin.elapsed());
            });
            self.worker.driver.drain_sent(|_, bytes| {
                black_box(bytes);
            });
        }
        assert_eq!(
            self.shared.tables.v4.len(),
            FLOWS as usize,
            "every packet opens a connection: {:?}",
            self.worker.pipeline.totals()
        );
        self.now = Tick(self.now.0.wrapping_add(LONGER_THAN_TIMEOUTS));
        // What one turn takes out has its place free some turns later.
        for _ in 0..4 {
            self.worker.turn(&self.shared, self.now, |pipeline, driver, _, context| {
                pipeline.maintain(driver, context, u32::MAX);
            });
        }
        assert!(self.shared.tables.v4.is_empty());
    }
}

/// What is measured.
#[inline(never)]
fn handle(pipeline: &mut Pipeline, driver: &mut MemoryDriver, burst: &mut Vec<Packet>, context: &Context<'_>) {
    process_burst(pipeline, driver, burst, context);
    pipeline.flush(driver);
}

fn main() {
    let numbers: Vec<u32> = env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let (sizes, rounds) = match *numbers {
        [services, rules, rounds] => (vec![(services, rules)], rounds),
        _ => (SIZES.to_vec(), ROUNDS),
    };
    let mut workers: Vec<_> = sizes
        .into_iter()
        .map(|(services, rules)| (Worker::new(Size { services, rules: rules / 2 }), Vec::<f64>::new()))
        .collect();
    for _ in 0..rounds {
        for (worker, samples) in &mut workers {
            (0..WARMING_PASSES).for_each(|_| worker.pass(drop));
            worker.pass(|time| samples.push(time.as_nanos() as f64 / BURST as f64));
        }
    }
    println!("ns per new flow, median (lower quartile) of bursts of {BURST}; sizes took turns for {rounds} rounds");
    let mut first = None;
    for (worker, samples) in &mut workers {
        let spread = Spread::of(samples);
        let (median, quartile) = (spread.median, spread.low);
        let (services, rules) = (worker.size.services, 2 * worker.size.rules);
        tell("new flow", &format!("{services} services, {rules} rules"), "weir", "ns", spread);
        let (base_median, base_quartile) = *first.get_or_insert((median, quartile));
        println!(
            "{:>6} services, {:>6} rules: {median:7.1} ({quartile:7.1}), {:.2} ({:.2}) times the first, of {} new flows",
            services,
            rules,
            median / base_median,
            quartile / base_quartile,
            worker.flow,
        );
    }
}
