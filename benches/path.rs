//! What one packet of a connection costs in `process_burst`, in ten cases, on memory rings.
//!
//! *Instructions* are counted by valgrind's callgrind within [`measured_burst`] alone: the difference of 240 and 40 bursts of 64, so that
//! what only the first packets do falls out. They are the same on every run and every machine, so they are what a change is held against
//! (`make instructions`). *Time* is the median of rounds with the pipeline less that of rounds without, which alternate over all cases, so
//! that a noisy machine disturbs all alike. Cycles are of the processor's nominal frequency.
//!
//! Every flow is opened, answered, and old enough to have proved itself before anything is measured. TCP streams move: each segment carries
//! 18 bytes more, within one large window, so none is a retransmission.

use std::{
    env, fs, hint,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    process::{Command, ExitCode},
    sync::Arc,
    time::Instant,
};

use crossbeam::channel::Receiver;
use etherparse::{PacketBuilder, TcpOptionElement};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde_json::{Map, Value, json};
use weir_conntrack::{Table, TableConfig, TcpSettings, Timeouts};
use weir_dataplane::{
    counters::COUNTERS,
    driver::Driver,
    forwarding::Forwarding,
    frame::{IfIndex, Packet},
    memory::MemoryDriver,
    model::{Cluster, Device, Links, Neighbor, Node, Pool, Role, TunnelMode, Workload},
    pipeline::{Context, Event, Pipeline, process_burst},
    snapshot::{Rules, Snapshot},
    tables::Tables,
};
use weir_nat::{Affinity, Endpoint, ServicePort, ServiceTable, SnatPorts};
use weir_packet::{Mac, Protocol, Tick};
use weir_policy::Classifier;
use weir_sync::{Counters, Domain, Participant, Published};

const USAGE: &str = "\
path report [FLOWS] [ROUNDS]      instructions, ns and cycles of every case, as lines and in target/bench-path.json
path instructions FILE            instructions of every case; fails where one has grown by more than 5 % since the file was recorded
path record FILE                  records them
path count CASE FLOWS BURSTS      handles so many bursts of a case, for callgrind
path time CASE FLOWS ROUNDS       ns of a case
path check CASE FLOWS BURSTS      a hash over all bytes that are sent and their devices, for comparing builds";

const BURST: usize = 64;
const FLOWS: u32 = 10_000;
/// Rounds of the report, of [`ROUND_BURSTS`] bursts each: so short that few are interrupted by what else runs on the machine, which then
/// leaves the median alone.
const ROUNDS: usize = 400;
const ROUND_BURSTS: u32 = 16;
/// Flows while instructions are counted: opening them takes most of that time, and the table is as full with few as with many.
const COUNTED_FLOWS: u32 = 1000;
/// Bursts of the two counts whose difference is taken.
const COUNTED_BURSTS: [u32; 2] = [40, 240];
/// What instructions may grow by before somebody has to say so.
const TOLERANCE: f64 = 1.05;

const PODS: u32 = 32;
const FIRST_PORT: u32 = 16_384;
const PAYLOAD: [u8; 18] = [0; 18];
const UPLINK: IfIndex = IfIndex(1);
const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const VETH_MAC: [u8; 6] = [0xee; 6];
const OTHER_NODE: [&str; 2] = ["192.168.10.2", "fd00:10::2"];
const SERVICE: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const REMOTE_POD: [&str; 2] = ["10.1.2.10", "fd00:1:2::10"];
const SERVICE_PORT: u16 = 53;
const BACKEND_PORT: u16 = 5353;

/// Where pods send to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    /// A service, whose backend is on the other node: DNAT, and for IPv4 a tunnel.
    Service,
    /// The pod on the other node itself.
    Remote,
    /// The next pod of this node.
    Local,
}

/// The packets that are measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Requests,
    Answers,
    Both,
}

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    is_ipv6: bool,
    is_tcp: bool,
    target: Target,
    which: Which,
}

const fn case(name: &'static str, is_ipv6: bool, is_tcp: bool, target: Target, which: Which) -> Case {
    Case { name, is_ipv6, is_tcp, target, which }
}

const CASES: [Case; 10] = [
    case("udp-dnat-ipip", false, false, Target::Service, Which::Requests),
    case("tcp-dnat-ipip", false, true, Target::Service, Which::Requests),
    case("answers", false, false, Target::Service, Which::Answers),
    case("both", false, false, Target::Service, Which::Both),
    case("udp-ipip", false, false, Target::Remote, Which::Requests),
    case("udp-pod", false, false, Target::Local, Which::Requests),
    case("tcp-pod", false, true, Target::Local, Which::Requests),
    case("udp6-dnat", true, false, Target::Service, Which::Requests),
    case("tcp6-dnat", true, true, Target::Service, Which::Requests),
    case("udp6-pod", true, false, Target::Local, Which::Requests),
];

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn pod_address(pod: u32, is_ipv6: bool) -> IpAddr {
    if is_ipv6 {
        Ipv6Addr::from_bits(ip_bits("fd00:1:1::") + 10 + u128::from(pod)).into()
    } else {
        Ipv4Addr::new(10, 1, 1, 10 + pod as u8).into()
    }
}

fn ip_bits(text: &str) -> u128 {
    text.parse::<Ipv6Addr>().expect("an address").to_bits()
}

fn pod_device(pod: u32) -> IfIndex {
    IfIndex(2 + pod)
}

fn pod_mac(pod: u32) -> [u8; 6] {
    [2, 0, 0, 0, 1, pod as u8]
}

fn cluster() -> Cluster {
    let node = |name: &str, addresses: [&str; 2], ranges: [&str; 2]| Node {
        name: name.into(),
        internal_ips: addresses.map(ip).into(),
        pod_cidrs: ranges.map(|range| range.parse().expect("a prefix")).into(),
        ..Node::default()
    };
    let local = (0..PODS).map(|pod| Workload {
        name: format!("default/pod-{pod}"),
        node: Some("node-a".into()),
        addresses: vec![pod_address(pod, false), pod_address(pod, true)],
        device: format!("cali{pod}"),
        mac: Some(Mac(pod_mac(pod))),
    });
    let remote = Workload {
        name: "default/remote".into(),
        node: Some("node-b".into()),
        addresses: REMOTE_POD.map(ip).into(),
        device: String::new(),
        mac: None,
    };
    let pool = |cidr: &str, ipip| Pool { cidr: cidr.parse().expect("a prefix"), ipip, nat_outgoing: true };
    Cluster {
        node_name: "node-a".into(),
        nodes: vec![
            node("node-a", ["192.168.10.1", "fd00:10::1"], ["10.1.1.0/24", "fd00:1:1::/64"]),
            node("node-b", OTHER_NODE, ["10.1.2.0/24", "fd00:1:2::/64"]),
        ],
        workloads: local.chain([remote]).collect(),
        pools: vec![pool("10.1.0.0/16", TunnelMode::Always), pool("fd00:1::/32", TunnelMode::Never)],
        pod_cidrs: ["10.1.0.0/16", "fd00:1::/32"].map(|cidr| cidr.parse().expect("a prefix")).into(),
        service_cidrs: ["10.96.0.0/16", "fd00:96::/112"].map(|cidr| cidr.parse().expect("a prefix")).into(),
        ..Cluster::default()
    }
}

fn links() -> Links {
    let uplink = Device {
        name: "eth0".into(),
        index: UPLINK,
        role: Role::Uplink,
        mac: Mac(NODE_MAC),
        mtu: 1500,
        addresses: ["192.168.10.1/24", "fd00:10::1/64"].map(|net| net.parse().expect("a prefix")).into(),
    };
    let pods = (0..PODS).map(|pod| Device {
        name: format!("cali{pod}"),
        index: pod_device(pod),
        role: Role::Workload,
        mac: Mac(VETH_MAC),
        mtu: 1500,
        addresses: Vec::new(),
    });
    let neighbors = OTHER_NODE.map(|address| Neighbor { address: ip(address), mac: Mac(OTHER_MAC), device: UPLINK });
    Links { devices: std::iter::once(uplink).chain(pods).collect(), neighbors: neighbors.into(), ..Links::default() }
}

fn rules(cluster: &Cluster) -> Rules {
    let service = |name: &str, protocol| {
        Arc::new(ServicePort {
            name: name.into(),
            protocol,
            port: SERVICE_PORT,
            cluster_ips: SERVICE.map(ip).into(),
            endpoints: REMOTE_POD
                .map(|address| Endpoint {
                    address: ip(address),
                    port: BACKEND_PORT,
                    node_name: Some("node-b".into()),
                    ready: true,
                    serving: true,
                    terminating: false,
                    zone_hints: Vec::new(),
                    node_hints: Vec::new(),
                })
                .into(),
            ..ServicePort::default()
        })
    };
    let services = ServiceTable::compile(&weir_nat::Model {
        node_name: "node-a".into(),
        pod_cidrs: cluster.pod_cidrs.clone(),
        local_addresses: ["192.168.10.1", "fd00:10::1"].map(ip).into(),
        service_cidrs: cluster.service_cidrs.clone(),
        services: vec![service("default/dns:udp", Protocol::UDP), service("default/dns:tcp", Protocol::TCP)],
        ..weir_nat::Model::default()
    })
    .expect("the services compile");
    let pods = cluster.workloads.iter().take(PODS as usize).map(|pod| weir_policy::model::Endpoint {
        name: pod.name.clone(),
        local: true,
        nets: pod.addresses.iter().map(|address| (*address).into()).collect(),
        profiles: vec!["all".into()],
        ..weir_policy::model::Endpoint::default()
    });
    let allow = || vec![weir_policy::model::Rule::default()];
    let profile = weir_policy::model::Profile { name: "all".into(), ingress: allow(), egress: allow() };
    let policy = Classifier::compile(&weir_policy::model::Model {
        endpoints: pods.map(Arc::new).collect(),
        profiles: vec![Arc::new(profile)],
        tiers: Vec::new(),
    })
    .expect("the policies compile");
    Rules::new(services, policy, cluster)
}

/// A TCP segment's own fields.
#[derive(Clone, Copy)]
struct Segment {
    is_syn: bool,
    ack: Option<u32>,
    seq: u32,
}

/// One direction of a flow: a packet that is sent over and over.
struct Sender {
    device: IfIndex,
    frame: Vec<u8>,
    /// Where a TCP header begins whose sequence number moves.
    moves_at: Option<usize>,
}

impl Sender {
    /// The packet of a flow, from who opened it or back; of TCP one that carries data, or the SYN or ACK that `handshake` says.
    fn new(case: Case, flow: u32, is_answer: bool, handshake: Option<Segment>) -> Self {
        let (pod, port) = (flow % PODS, (FIRST_PORT + flow / PODS) as u16);
        let family = usize::from(case.is_ipv6);
        let other_pod = (pod + 1) % PODS;
        let (to, to_port) = match case.target {
            Target::Service => (ip(SERVICE[family]), SERVICE_PORT),
            Target::Remote => (ip(REMOTE_POD[family]), BACKEND_PORT),
            Target::Local => (pod_address(other_pod, case.is_ipv6), BACKEND_PORT),
        };
        let from = match case.target {
            Target::Local => to,
            Target::Service | Target::Remote => ip(REMOTE_POD[family]),
        };
        let client = pod_address(pod, case.is_ipv6);
        let (device, macs, addresses, ports) = if !is_answer {
            (pod_device(pod), [pod_mac(pod), VETH_MAC], [client, to], [port, to_port])
        } else if case.target == Target::Local {
            (pod_device(other_pod), [pod_mac(other_pod), VETH_MAC], [from, client], [BACKEND_PORT, port])
        } else {
            (UPLINK, [OTHER_MAC, NODE_MAC], [from, client], [BACKEND_PORT, port])
        };
        let link = PacketBuilder::ethernet2(macs[0], macs[1]);
        let network = match addresses {
            [IpAddr::V4(src), IpAddr::V4(dst)] => link.ipv4(src.octets(), dst.octets(), 64),
            [IpAddr::V6(src), IpAddr::V6(dst)] => link.ipv6(src.octets(), dst.octets(), 64),
            _ => unreachable!("both ends are of one family"),
        };
        let mut frame = Vec::new();
        let of_data = Segment { is_syn: false, ack: Some(1001), seq: 1001 };
        let segment = handshake.unwrap_or(of_data);
        let payload = if handshake.is_some() && case.is_tcp { &[][..] } else { &PAYLOAD };
        let written = if case.is_tcp {
            let mut tcp = network.tcp(ports[0], ports[1], segment.seq, u16::MAX);
            if segment.is_syn {
                // The largest window, 1 GiB, for a stream that nobody acknowledges.
                let options = [TcpOptionElement::MaximumSegmentSize(1400), TcpOptionElement::WindowScale(14)];
                tcp = tcp.syn().options(&options).expect("few options");
            }
            if let Some(ack) = segment.ack {
                tcp = tcp.ack(ack);
            }
            tcp.write(&mut frame, payload)
        } else {
            network.udp(ports[0], ports[1]).write(&mut frame, payload)
        };
        written.expect("a vector takes every byte");
        let mut l4 = if case.is_ipv6 { 54 } else { 34 };
        if device == UPLINK && !case.is_ipv6 {
            let mut outer = Vec::new();
            PacketBuilder::ethernet2(OTHER_MAC, NODE_MAC)
                .ipv4([192, 168, 10, 2], [192, 168, 10, 1], 64)
                .write(&mut outer, etherparse::IpNumber::IPV4, &frame[14..])
                .expect("a vector takes every byte");
            frame = outer;
            l4 += 20;
        }
        Self { device, frame, moves_at: (case.is_tcp && handshake.is_none()).then_some(l4) }
    }

    /// Moves a TCP stream on by what the segment carries, with the checksum (RFC 1624).
    #[inline]
    fn advance(&mut self) {
        let Some(l4) = self.moves_at else { return };
        let header = &mut self.frame[l4..l4 + 20];
        let old = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        let new = old.wrapping_add(PAYLOAD.len() as u32);
        let checksum = u16::from_be_bytes([header[16], header[17]]);
        let mut sum = u32::from(!checksum) + (!old >> 16) + (!old & 0xffff) + (new >> 16) + (new & 0xffff);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        header[4..8].copy_from_slice(&new.to_be_bytes());
        header[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
}

/// A worker over memory, whose flows are all open.
struct Bench {
    published: Published<Snapshot>,
    tables: Tables,
    affinity: Affinity,
    participant: Participant,
    pipeline: Pipeline,
    driver: MemoryDriver,
    burst: Vec<Packet>,
    senders: Vec<Sender>,
    next: usize,
    now: Tick,
    _events: Receiver<Event>,
}

impl Bench {
    fn new(case: Case, flows: u32) -> Self {
        assert!((1..=PODS * 32_768).contains(&flows), "1 to {} flows", PODS * 32_768);
        let cluster = cluster();
        let forwarding = Arc::new(Forwarding::compile(&cluster, &links()).expect("few next hops"));
        let rules = Arc::new(rules(&cluster));
        let snat = Arc::new(SnatPorts::new(10_000..=19_999, []).expect("ports are left"));
        let domain = Domain::new();
        let table = |max_entries| TableConfig {
            max_entries,
            seed: [1, 2],
            timeouts: Timeouts::default(),
            tcp: TcpSettings::default(),
        };
        let (many, few) = (flows + flows / 8 + 1024, 16);
        let [v4, v6] = if case.is_ipv6 { [few, many] } else { [many, few] };
        let tables = Tables { v4: Table::new(table(v4), domain.clone()), v6: Table::new(table(v6), domain.clone()) };
        let (events, kept) = crossbeam::channel::bounded(16);
        let counters = Counters::<COUNTERS>::new();
        let pipeline = Pipeline::new(&tables, counters.join(), ChaCha8Rng::seed_from_u64(7), events, BURST, 2);
        let mut bench = Self {
            published: Published::new(&domain, Snapshot { generation: 1, rules, snat, forwarding }),
            participant: domain.join(),
            tables,
            affinity: Affinity::new(1, [1, 2]),
            pipeline,
            driver: MemoryDriver::new(2, 4 * BURST as u32),
            burst: Vec::with_capacity(BURST),
            senders: Vec::new(),
            next: 0,
            now: Tick(1),
            _events: kept,
        };
        bench.open(case, flows);
        let packets = (0..flows).flat_map(|flow| {
            // The other direction's is of another flow: not one whose lines have just been fetched.
            let answered = (flow + flows / 2) % flows;
            let request = (case.which != Which::Answers).then(|| Sender::new(case, flow, false, None));
            let answer = (case.which != Which::Requests).then(|| Sender::new(case, answered, true, None));
            request.into_iter().chain(answer)
        });
        bench.senders = packets.collect();
        bench
    }

    /// Opens every flow, has it answered, and both again after more than two seconds, when a UDP flow is taken for a stream.
    fn open(&mut self, case: Case, flows: u32) {
        let segment = |is_syn, seq, ack| Some(Segment { is_syn, ack, seq });
        let handshake = [
            (false, segment(true, 1000, None)),
            (true, segment(true, 1000, Some(1001))),
            (false, segment(false, 1001, Some(1001))),
            (true, segment(false, 1001, Some(1001))),
        ];
        for (number, (is_answer, segment)) in handshake.into_iter().enumerate() {
            self.now = Tick(1 + 300 * number as u32);
            self.senders = (0..flows).map(|flow| Sender::new(case, flow, is_answer, segment)).collect();
            self.next = 0;
            for _ in 0..flows.div_ceil(BURST as u32) {
                self.round(opening_burst, |_, _| {});
            }
        }
        self.next = 0;
        let (v4, v6) = (self.tables.v4.len(), self.tables.v6.len());
        assert!(v4 + v6 == flows as usize, "every flow is open: {:?}", self.pipeline.totals());
    }

    /// Writes a burst into frames, has it handled, and hands what was sent to `look`.
    fn round(
        &mut self,
        handle: impl FnOnce(&mut Pipeline, &mut MemoryDriver, &mut Vec<Packet>, &Context<'_>),
        mut look: impl FnMut(IfIndex, &[u8]),
    ) {
        let Self { driver, burst, senders, next, .. } = self;
        for _ in 0..BURST {
            let count = senders.len();
            let sender = &mut senders[*next];
            *next = if *next + 1 == count { 0 } else { *next + 1 };
            sender.advance();
            let mut packet = driver.allocate().expect("frames for a burst");
            packet.set_len(sender.frame.len());
            packet.bytes_mut().copy_from_slice(&sender.frame);
            packet.device = sender.device;
            burst.push(packet);
        }
        let turn = self.participant.enter();
        let context = Context::new(self.published.load(&turn), &self.tables, &self.affinity, &turn, self.now);
        handle(&mut self.pipeline, driver, burst, &context);
        self.pipeline.flush(driver);
        driver.drain_sent(|device, bytes| look(device, hint::black_box(bytes)));
    }

    /// ns per packet of one round of bursts, with the pipeline or without.
    fn sample(&mut self, with_pipeline: bool) -> f64 {
        let begin = Instant::now();
        for _ in 0..ROUND_BURSTS {
            if with_pipeline {
                self.round(measured_burst, |_, _| {});
            } else {
                self.round(release, |_, _| {});
            }
        }
        begin.elapsed().as_nanos() as f64 / f64::from(ROUND_BURSTS) / BURST as f64
    }

    fn finish(self) {
        let totals = self.pipeline.totals();
        assert!(totals.dropped() == 0 && totals.punted == 0, "every packet is forwarded: {totals:?}");
    }
}

/// What is measured, by this name.
#[inline(never)]
fn measured_burst(pipeline: &mut Pipeline, driver: &mut MemoryDriver, burst: &mut Vec<Packet>, context: &Context<'_>) {
    process_burst(pipeline, driver, burst, context);
}

/// The same, by a name that is not counted.
#[inline(never)]
fn opening_burst(pipeline: &mut Pipeline, driver: &mut MemoryDriver, burst: &mut Vec<Packet>, context: &Context<'_>) {
    process_burst(pipeline, driver, burst, hint::black_box(context));
}

fn release(_: &mut Pipeline, driver: &mut MemoryDriver, burst: &mut Vec<Packet>, _: &Context<'_>) {
    burst.drain(..).for_each(|packet| driver.release(packet));
}

fn count(case: Case, flows: u32, bursts: u32) {
    let mut bench = Bench::new(case, flows);
    for _ in 0..bursts {
        bench.round(measured_burst, |_, _| {});
    }
    bench.finish();
}

/// A hash (FNV-1a) over what is sent, but a tunnel's identification, which begins at random, and its checksum.
fn check(case: Case, flows: u32, bursts: u32) -> u64 {
    let mut bench = Bench::new(case, flows);
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    for _ in 0..bursts {
        bench.round(measured_burst, |device, bytes| {
            let mut bytes = bytes.to_vec();
            if bytes[12..15] == [8, 0, 0x45] && bytes[23] == Protocol::IPIP.0 {
                bytes[18..20].fill(0);
                bytes[24..26].fill(0);
            }
            add(&device.0.to_be_bytes());
            add(&bytes);
        });
    }
    bench.finish();
    hash
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// ns per packet of each case: medians of rounds in turn.
fn time(cases: &[Case], flows: u32, rounds: usize) -> Vec<f64> {
    let mut benches: Vec<_> = cases.iter().map(|case| (Bench::new(*case, flows), Vec::new(), Vec::new())).collect();
    for _ in 0..rounds {
        for (bench, with, without) in &mut benches {
            // What the other cases have taken out of the caches is brought back first.
            bench.sample(true);
            with.push(bench.sample(true));
            without.push(bench.sample(false));
        }
    }
    let result = benches.iter_mut().map(|(_, with, without)| median(with) - median(without)).collect();
    benches.into_iter().for_each(|(bench, ..)| bench.finish());
    result
}

fn megahertz() -> Option<f64> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    text.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split_once(':')?.1.trim().parse().ok())
}

/// Instructions per packet of a case, counted by callgrind over this very program.
fn instructions(case: Case) -> Result<f64, String> {
    let program = env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
    let collected = |bursts: u32| {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"])
            .arg("--toggle-collect=*measured_burst*")
            .arg(&program)
            .args(["count", case.name, &COUNTED_FLOWS.to_string(), &bursts.to_string()])
            .output()
            .map_err(|error| format!("cannot run valgrind (Debian package valgrind): {error}"))?;
        let text = String::from_utf8_lossy(&output.stderr);
        let count = text.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse::<u64>().ok());
        match count.filter(|count| output.status.success() && *count > 0) {
            Some(count) => Ok(count),
            None => Err(format!("callgrind counted nothing in {}: {}\n{text}", case.name, output.status)),
        }
    };
    let [few, many] = COUNTED_BURSTS;
    let packets = f64::from(many - few) * BURST as f64;
    let (few, many) = (collected(few)?, collected(many)?);
    Ok(((many.saturating_sub(few)) as f64 / packets * 10.0).round() / 10.0)
}

/// The cases and instructions that a file records.
fn recorded(file: &Path) -> Result<Vec<(String, f64)>, String> {
    let text = fs::read_to_string(file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    let read = |line: &str| {
        let (name, count) = line.split_once(char::is_whitespace)?;
        Some((name.to_owned(), count.trim().parse().ok()?))
    };
    lines.map(|line| read(line).ok_or_else(|| format!("{}: not a case and a number: {line}", file.display()))).collect()
}

fn record(file: &Path) -> Result<(), String> {
    let mut text = String::from(
        "# Instructions per packet in process_burst. `make instructions` compares with this, `make record-instructions` writes it.\n",
    );
    for case in CASES {
        let line = format!("{:<14} {:.1}", case.name, instructions(case)?);
        println!("{line}");
        text += &(line + "\n");
    }
    fs::write(file, text).map_err(|error| format!("cannot write {}: {error}", file.display()))
}

/// Prints what has become of every case's instructions since they were recorded. Whether none has grown too much.
fn compare(file: &Path) -> Result<bool, String> {
    let before = recorded(file)?;
    let mut is_good = true;
    for case in CASES {
        let Some((_, before)) = before.iter().find(|(name, _)| name == case.name) else {
            return Err(format!("{} does not record the case {}: make record-instructions", file.display(), case.name));
        };
        let now = instructions(case)?;
        let verdict = if now > before * TOLERANCE {
            is_good = false;
            ", GROWN by more than 5 %"
        } else if now * TOLERANCE < *before {
            ", less by more than 5 %: record it"
        } else {
            ""
        };
        println!("{:<14} {before:7.1} recorded, {now:7.1} now{verdict}", case.name);
    }
    if !is_good {
        eprintln!("packets cost more than {} records; if that is meant: make record-instructions", file.display());
    }
    Ok(is_good)
}

fn report(flows: u32, rounds: usize) -> Result<(), String> {
    let ns = time(&CASES, flows, rounds);
    let mhz = megahertz();
    let mut all = Map::new();
    for (case, ns) in CASES.into_iter().zip(ns) {
        let instructions = instructions(case)?;
        let round = |value: f64| (value * 10.0).round() / 10.0;
        let cycles = mhz.map(|mhz| round(ns * mhz / 1e3));
        let shown = cycles.map_or(String::new(), |cycles| format!(", {cycles:6.1} cycles"));
        println!("{:<14} {instructions:7.1} instructions, {ns:6.1} ns{shown}", case.name);
        all.insert(case.name.into(), json!({ "instructions": instructions, "ns": round(ns), "cycles": cycles }));
    }
    fs::create_dir_all("target").map_err(|error| format!("cannot make target/: {error}"))?;
    let text = serde_json::to_string_pretty(&Value::Object(all)).expect("plain numbers");
    fs::write("target/bench-path.json", text + "\n").map_err(|e| format!("cannot write target/bench-path.json: {e}"))
}

fn run(arguments: &[&str]) -> Result<bool, String> {
    let number = |text: &str| text.parse::<u32>().map_err(|_| format!("not a number: {text}\n{USAGE}"));
    let named = |name: &str| {
        let names = || CASES.map(|case| case.name).join(", ");
        CASES.into_iter().find(|case| case.name == name).ok_or_else(|| format!("no case {name}; there are {}", names()))
    };
    match *arguments {
        ["report", ref rest @ ..] if rest.len() <= 2 => {
            let flows = rest.first().map_or(Ok(FLOWS), |text| number(text))?;
            let rounds = rest.get(1).map_or(Ok(ROUNDS as u32), |text| number(text))?;
            report(flows, rounds.max(1) as usize)?;
        }
        ["instructions", file] => return compare(Path::new(file)),
        ["record", file] => record(Path::new(file))?,
        ["count", case, flows, bursts] => count(named(case)?, number(flows)?, number(bursts)?),
        ["time", case, flows, rounds] => {
            println!("{:.1}", time(&[named(case)?], number(flows)?, number(rounds)?.max(1) as usize)[0]);
        }
        ["check", case, flows, bursts] => println!("{:016x}", check(named(case)?, number(flows)?, number(bursts)?)),
        _ => return Err(USAGE.into()),
    }
    Ok(true)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match run(&arguments.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
