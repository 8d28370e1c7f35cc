//! A soak: two workers over memory under a mix of everything, for as long as asked; at its end every entry, frame and port is accounted for.
//!
//! What goes on at once: TCP connections of both families through a service, a node port and a masquerade, whose every packet must leave
//! translated as the first was, and which hop between the workers; short UDP flows; echoes; SYN floods that keep the table at its limit;
//! fragments, in any order and incomplete; ICMP errors about all of that; garbage; reloads that change policy and backends; expiry.
//!
//!     cargo run --example soak [-- MINUTES]        (make soak; a debug build, whose assertions are part of it)

use std::{
    collections::BTreeSet,
    error::Error,
    fs,
    net::IpAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use etherparse::{IpFragOffset, IpNumber, Ipv4Header, PacketBuilder, PacketBuilderStep};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use weir_cluster::{
    compile::{self, Compilers},
    translate,
};
use weir_conntrack::Table;
use weir_dataplane::{
    counters::{COUNTERS, Totals},
    driver::Driver,
    forwarding::Forwarding,
    frame::{IfIndex, LinkType, ONE_FRAME_BYTES},
    memory::MemoryDriver,
    model::Links,
    pipeline::{Context, Pipeline, process_burst},
    snapshot::{Rules, Snapshot},
    tables::{Family, Tables},
};
use weir_nat::{Affinity, SnatPorts};
use weir_packet::{Protocol, Tick};
use weir_sync::{Counters, Domain, Participant, Published};

type Failure = Box<dyn Error + Send + Sync>;

const BURST: usize = 64;
const FRAMES: u32 = 2048;
const MAX_ENTRIES: u32 = 16_384;
const WORKERS: usize = 2;
/// TCP connections that must live through all of it.
const CONNECTIONS: usize = 240;
/// About as fast as a processor without other work goes through them.
const ROUNDS_PER_TICK: u32 = 16;
const RELOAD_EVERY: Duration = Duration::from_millis(50);

const CONFIG: &str = r#"
apiVersion: weir.dev/v1alpha1
kind: RouterConfig
nodeName: node-a
manifests: [cluster.yaml]
serviceCIDRs: [10.96.0.0/16, "fd00:96::/112"]
podCIDRs: [10.1.0.0/16, "fd00:1::/32"]
# Fewer ports than the flood would take towards the backend: it displaces itself.
snat: {portRange: 20000-23999}
devices:
- {name: eth0, role: uplink, mac: "02:00:00:00:00:01", mtu: 1500, addresses: [192.168.10.1/24, "fd00:10::1/64"]}
- {name: client0, role: workload, mac: "ee:ee:ee:ee:ee:ee", mtu: 1500}
- {name: server0, role: workload, mac: "ee:ee:ee:ee:ee:ee", mtu: 1500}
routes:
- {to: 0.0.0.0/0, via: 192.168.10.100, device: eth0}
- {to: "::/0", via: "fd00:10::100", device: eth0}
neighbors:
- {address: 192.168.10.100, mac: "02:00:00:00:00:64", device: eth0}
- {address: "fd00:10::100", mac: "02:00:00:00:00:64", device: eth0}
conntrack:
  maxEntries: 16384
  nf_conntrack_udp_timeout: 1
  nf_conntrack_udp_timeout_stream: 2
  nf_conntrack_icmp_timeout: 1
  nf_conntrack_icmpv6_timeout: 1
  nf_conntrack_tcp_timeout_syn_sent: 3
  nf_conntrack_tcp_timeout_syn_recv: 3
"#;

/// The cluster; a reload goes from one variant to the other: another backend, and a policy that denies some of the short flows.
fn manifests(variant: bool) -> String {
    let mut text = String::from(
        r#"
{apiVersion: v1, kind: Node, metadata: {name: node-a}, spec: {podCIDRs: [10.1.1.0/24, "fd00:1:1::/64"]}, status: {addresses: [{type: InternalIP, address: 192.168.10.1}, {type: InternalIP, address: "fd00:10::1"}]}}
---
{apiVersion: projectcalico.org/v3, kind: IPPool, metadata: {name: v4}, spec: {cidr: 10.1.0.0/16, natOutgoing: true}}
---
{apiVersion: projectcalico.org/v3, kind: IPPool, metadata: {name: v6}, spec: {cidr: "fd00:1::/32", natOutgoing: true}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: default}}
---
{apiVersion: projectcalico.org/v3, kind: WorkloadEndpoint, metadata: {namespace: default, name: server}, spec: {node: node-a, orchestrator: k8s, endpoint: eth0, pod: server, workload: server, interfaceName: server0, mac: "0a:00:00:00:00:02", ipNetworks: [10.1.1.20/32, "fd00:1:1::20/128"], profiles: [kns.default]}}
---
{apiVersion: projectcalico.org/v3, kind: WorkloadEndpoint, metadata: {namespace: default, name: client}, spec: {node: node-a, orchestrator: k8s, endpoint: eth0, pod: client, workload: client, interfaceName: client0, mac: "0a:00:00:00:00:01", ipNetworks: [10.1.1.10/32, "fd00:1:1::10/128"], profiles: [kns.default]}}
---
{apiVersion: v1, kind: Pod, metadata: {namespace: default, name: client, labels: {app: client}}, spec: {nodeName: node-a, containers: [{name: c}]}, status: {podIP: 10.1.1.10, podIPs: [{ip: 10.1.1.10}, {ip: "fd00:1:1::10"}]}}
---
{apiVersion: v1, kind: Pod, metadata: {namespace: default, name: server, labels: {app: server}}, spec: {nodeName: node-a, containers: [{name: c}]}, status: {podIP: 10.1.1.20, podIPs: [{ip: 10.1.1.20}, {ip: "fd00:1:1::20"}]}}
---
{apiVersion: v1, kind: Service, metadata: {namespace: default, name: web}, spec: {type: NodePort, clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10, "fd00:96::10"], ports: [{name: tcp, protocol: TCP, port: 80, nodePort: 30080}, {name: udp, protocol: UDP, port: 53, nodePort: 30053}]}}
"#,
    );
    for (family, server, other) in [("IPv4", "10.1.1.20", "10.1.1.10"), ("IPv6", "fd00:1:1::20", "fd00:1:1::10")] {
        let both = if variant { format!("\"{server}\", \"{other}\"") } else { format!("\"{server}\"") };
        for (name, protocol, port, addresses) in
            [("tcp", "TCP", 8080, format!("\"{server}\"")), ("udp", "UDP", 5353, both)]
        {
            text += &format!(
                "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: {family}, metadata: {{namespace: default, \
                 name: web-{name}-{family}, labels: {{kubernetes.io/service-name: web}}}}, endpoints: [{{addresses: [{addresses}]}}], \
                 ports: [{{name: {name}, protocol: {protocol}, port: {port}}}]}}\n"
            );
        }
    }
    if variant {
        text += "---\n{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {namespace: default, name: no-udp}, spec: \
                 {podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress], ingress: [{ports: [{protocol: TCP}]}, \
                 {from: [{podSelector: {}}]}]}}\n";
    }
    text
}

/// What the workers share.
struct Shared {
    domain: Arc<Domain>,
    published: Published<Snapshot>,
    tables: Tables,
    affinity: Affinity,
    devices: Devices,
    stop: AtomicBool,
    begin: Instant,
    /// Rounds that the workers have begun.
    rounds: AtomicU32,
}

impl Shared {
    /// The workers' clock goes on with what they do: on a machine that has little time for them no connection becomes idle for that.
    fn now(&self) -> Tick {
        Tick(1000 + self.rounds.load(Ordering::Relaxed) / ROUNDS_PER_TICK)
    }
}

#[derive(Clone, Copy)]
struct Devices {
    uplink: IfIndex,
    client: IfIndex,
    server: IfIndex,
}

/// A way of a TCP connection.
#[derive(Clone, Copy, Debug)]
struct Way {
    from: Place,
    to: Place,
    opener: &'static str,
    asked: (&'static str, u16),
    /// Where the answering end really is.
    answers: (&'static str, u16),
    /// Whether it sees another address than the opener's.
    is_masqueraded: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Client,
    Server,
    Uplink,
}

const fn way(
    from: Place,
    to: Place,
    opener: &'static str,
    asked: (&'static str, u16),
    answers: (&'static str, u16),
    is_masqueraded: bool,
) -> Way {
    Way { from, to, opener, asked, answers, is_masqueraded }
}

const WAYS: [Way; 6] = [
    way(Place::Client, Place::Server, "10.1.1.10", ("10.96.0.10", 80), ("10.1.1.20", 8080), false),
    way(Place::Client, Place::Server, "fd00:1:1::10", ("fd00:96::10", 80), ("fd00:1:1::20", 8080), false),
    way(Place::Uplink, Place::Server, "192.168.10.100", ("192.168.10.1", 30080), ("10.1.1.20", 8080), true),
    way(Place::Uplink, Place::Server, "fd00:10::100", ("fd00:10::1", 30080), ("fd00:1:1::20", 8080), true),
    way(Place::Client, Place::Uplink, "10.1.1.10", ("172.20.0.1", 443), ("172.20.0.1", 443), true),
    way(Place::Client, Place::Uplink, "fd00:1:1::10", ("fd00:77::1", 443), ("fd00:77::1", 443), true),
];

/// A TCP connection that is never allowed to lose a packet.
struct Connection {
    way: Way,
    port: u16,
    steps: u64,
    /// Next sequence numbers of the opener and of the other.
    next_seq: [u32; 2],
    /// Whom the answering end sees; known after the first packet.
    seen: Option<(IpAddr, u16)>,
    /// The last packet that reached the answering end, for ICMP errors.
    last: Vec<u8>,
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn between(src: IpAddr, dst: IpAddr) -> PacketBuilderStep<etherparse::IpHeaders> {
    let ethernet = PacketBuilder::ethernet2([10, 0, 0, 0, 0, 1], [0xee; 6]);
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ip(etherparse::IpHeaders::Ipv4(
            Ipv4Header { source: src.octets(), destination: dst.octets(), time_to_live: 64, ..Ipv4Header::default() },
            Default::default(),
        )),
        (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), 64),
        _ => unreachable!("both ends have one family"),
    }
}

/// Addresses and ports of a frame that left.
fn ends(frame: &[u8]) -> Option<((IpAddr, u16), (IpAddr, u16))> {
    let parsed = etherparse::SlicedPacket::from_ethernet(frame).ok()?;
    let (src, dst) = match parsed.net.as_ref()? {
        etherparse::NetSlice::Ipv4(v4) => {
            (IpAddr::V4(v4.header().source_addr()), IpAddr::V4(v4.header().destination_addr()))
        }
        etherparse::NetSlice::Ipv6(v6) => {
            (IpAddr::V6(v6.header().source_addr()), IpAddr::V6(v6.header().destination_addr()))
        }
        _ => return None,
    };
    let (sport, dport) = match parsed.transport.as_ref()? {
        etherparse::TransportSlice::Tcp(tcp) => (tcp.source_port(), tcp.destination_port()),
        etherparse::TransportSlice::Udp(udp) => (udp.source_port(), udp.destination_port()),
        _ => return None,
    };
    Some(((src, sport), (dst, dport)))
}

/// One worker, and what it makes up.
struct Worker {
    shared: Arc<Shared>,
    pipeline: Pipeline,
    driver: MemoryDriver,
    participant: Participant,
    random: ChaCha8Rng,
    inbox: Receiver<Connection>,
    peers: Vec<Sender<Connection>>,
    own: Vec<Connection>,
    number: u32,
    /// Packets of connections that arrived as they had to.
    delivered: u64,
    jump: u32,
}

impl Worker {
    fn device(&self, place: Place) -> IfIndex {
        let devices = self.shared.devices;
        match place {
            Place::Client => devices.client,
            Place::Server => devices.server,
            Place::Uplink => devices.uplink,
        }
    }

    fn draw(&mut self, below: u32) -> u32 {
        ((u64::from(self.random.next_u32()) * u64::from(below)) >> 32) as u32
    }

    /// One turn; what left.
    fn turn(&mut self, frames: &[(IfIndex, Vec<u8>)]) -> Vec<(IfIndex, Vec<u8>)> {
        let mut burst = Vec::with_capacity(frames.len());
        for (device, bytes) in frames {
            let mut packet = self.driver.allocate().expect("frames for a burst");
            packet.set_len(bytes.len().min(ONE_FRAME_BYTES));
            packet.bytes_mut().copy_from_slice(&bytes[..bytes.len().min(ONE_FRAME_BYTES)]);
            (packet.device, packet.link) = (*device, LinkType::Host);
            burst.push(packet);
        }
        let turn = self.participant.enter();
        let Shared { published, tables, affinity, .. } = &*self.shared;
        let now = Tick(self.shared.now().0 + self.jump);
        let context = Context { tcp_loose: false, ..Context::new(published.load(&turn), tables, affinity, &turn, now) };
        process_burst(&mut self.pipeline, &mut self.driver, &mut burst, &context);
        self.pipeline.maintain(&mut self.driver, &context, 64);
        self.pipeline.flush(&mut self.driver);
        let mut sent = Vec::new();
        self.driver.drain_sent(|device, bytes| sent.push((device, bytes.to_vec())));
        sent
    }

    fn run(&mut self) -> Result<(), Failure> {
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.shared.rounds.fetch_add(1, Ordering::Relaxed);
            while let Ok(connection) = self.inbox.try_recv() {
                self.own.push(connection);
            }
            for _ in 0..8 {
                self.step()?;
            }
            let frames = match self.draw(8) {
                0..=2 => self.flood(),
                3 => self.short_flows(),
                4 => self.fragments(),
                5 => self.errors(),
                6 => self.garbage(),
                _ => Vec::new(),
            };
            let sent = self.turn(&frames);
            // Some of it is answered: ends swapped, as it left.
            let answers: Vec<_> = sent.iter().filter_map(|(device, frame)| self.answer(*device, frame)).collect();
            self.turn(&answers);
            if self.pipeline.held() > BURST {
                self.pipeline.give_up_held(&mut self.driver);
            }
        }
        Ok(())
    }

    /// The next packet of one of the connections, which then perhaps goes to another worker.
    fn step(&mut self) -> Result<(), Failure> {
        if self.own.is_empty() {
            return Ok(());
        }
        let number = self.draw(self.own.len() as u32) as usize;
        let mut connection = self.own.swap_remove(number);
        let way = connection.way;
        let is_openers = connection.steps.is_multiple_of(2);
        let (from, to) = if is_openers { (way.from, way.to) } else { (way.to, way.from) };
        let opener = (ip(way.opener), connection.port);
        let (asked, answers) = ((ip(way.asked.0), way.asked.1), (ip(way.answers.0), way.answers.1));
        let seen = connection.seen;
        let ((src, sport), (dst, dport)) =
            if is_openers { (opener, asked) } else { (answers, seen.ok_or("an answer before the question")?) };
        let [own_seq, other_seq] =
            if is_openers { connection.next_seq } else { [connection.next_seq[1], connection.next_seq[0]] };
        let tcp = between(src, dst).tcp(sport, dport, own_seq, 65_000);
        let (tcp, payload_bytes) = match connection.steps {
            0 => (tcp.syn(), 0),
            1 => (tcp.syn().ack(other_seq), 0),
            _ => (tcp.ack(other_seq), self.draw(1400) as usize),
        };
        let mut frame = Vec::new();
        tcp.write(&mut frame, &vec![0x5a; payload_bytes])?;
        let sent = self.turn(&[(self.device(from), frame)]);
        let [(device, left)] = &sent[..] else {
            return Err(format!(
                "a packet of {way:?} is lost at step {}: {:?}",
                connection.steps,
                self.pipeline.totals()
            )
            .into());
        };
        let (left_src, left_dst) = ends(left).ok_or("what left cannot be read")?;
        let expected_src = if is_openers { seen.unwrap_or(left_src) } else { asked };
        let expected_dst = if is_openers { answers } else { opener };
        let is_masqueraded = left_src.0 != opener.0;
        if *device != self.device(to)
            || (left_src, left_dst) != (expected_src, expected_dst)
            || is_openers && is_masqueraded != way.is_masqueraded
        {
            return Err(format!("{way:?} step {}: {left_src:?} to {left_dst:?} by {device:?}", connection.steps).into());
        }
        if is_openers {
            connection.seen = Some(left_src);
            connection.last = left[14..].to_vec();
        }
        let counted = u32::from(connection.steps < 2);
        connection.next_seq[usize::from(!is_openers)] = own_seq.wrapping_add(payload_bytes as u32 + counted);
        connection.steps += 1;
        self.delivered += 1;
        if connection.steps > 3 && self.draw(4) == 0 {
            let peer = self.draw(self.peers.len() as u32) as usize;
            self.peers[peer].send(connection)?;
        } else {
            self.own.push(connection);
        }
        Ok(())
    }

    /// A burst of SYNs from made-up sources.
    fn flood(&mut self) -> Vec<(IfIndex, Vec<u8>)> {
        (0..BURST)
            .map(|_| {
                let source = IpAddr::from((0xac15_0000 | self.draw(1 << 16)).to_be_bytes());
                let port = 1 + self.draw(65_000) as u16;
                let (target, dport) = if self.draw(2) == 0 { ("192.168.10.1", 30080) } else { ("10.1.1.20", 8080) };
                let mut frame = Vec::new();
                between(source, ip(target)).tcp(port, dport, 1, 1024).syn().write(&mut frame, &[]).expect("it fits");
                (self.shared.devices.uplink, frame)
            })
            .collect()
    }

    /// Datagrams and echoes of many flows, some of which a policy denies now and then.
    fn short_flows(&mut self) -> Vec<(IfIndex, Vec<u8>)> {
        (0..BURST)
            .map(|_| {
                let port = 1024 + self.draw(60_000) as u16;
                let payload = vec![1; self.draw(600) as usize];
                let (place, src, dst, dport) = match self.draw(5) {
                    0 => (Place::Client, "10.1.1.10", "10.96.0.10", 53),
                    1 => (Place::Client, "fd00:1:1::10", "fd00:96::10", 53),
                    2 => (Place::Uplink, "192.168.10.100", "192.168.10.1", 30053),
                    3 => (Place::Uplink, "fd00:10::100", "fd00:1:1::20", 7),
                    _ => (Place::Server, "10.1.1.20", "172.20.0.9", 123),
                };
                let mut frame = Vec::new();
                let step = between(ip(src), ip(dst));
                let written = match self.draw(4) {
                    0 if src.contains(':') => step.icmpv6_echo_request(port, 1).write(&mut frame, &payload),
                    0 => step.icmpv4_echo_request(port, 1).write(&mut frame, &payload),
                    _ => step.udp(port, dport).write(&mut frame, &payload),
                };
                written.expect("it fits");
                (self.device(place), frame)
            })
            .collect()
    }

    /// Datagrams in three pieces, shuffled, one in eight pieces missing.
    fn fragments(&mut self) -> Vec<(IfIndex, Vec<u8>)> {
        let mut frames = Vec::new();
        for _ in 0..BURST / 4 {
            self.number += 1;
            let mut whole = Vec::new();
            let port = 1024 + self.draw(60_000) as u16;
            let target = if self.draw(2) == 0 { "10.96.0.10" } else { "172.20.0.9" };
            between(ip("10.1.1.10"), ip(target)).udp(port, 53).write(&mut whole, &[3; 592]).expect("it fits");
            for (start, end) in [(0, 200), (200, 400), (400, 600)] {
                let mut header =
                    Ipv4Header::new(end - start, 64, IpNumber::UDP, [10, 1, 1, 10], [0; 4]).expect("it fits");
                header.destination.copy_from_slice(&whole[30..34]);
                (header.identification, header.more_fragments) = (self.number as u16, end < 600);
                header.fragment_offset = IpFragOffset::try_new(start / 8).expect("it fits");
                header.header_checksum = header.calc_header_checksum();
                let mut frame = [&whole[..14], &header.to_bytes()[..]].concat();
                frame.extend(&whole[34 + usize::from(start)..34 + usize::from(end)]);
                if self.draw(8) > 0 {
                    frames.push((self.shared.devices.client, frame));
                }
            }
        }
        for i in (1..frames.len()).rev() {
            frames.swap(i, self.draw(i as u32 + 1) as usize);
        }
        frames
    }

    /// ICMP errors about packets of connections, from the end that got them; half of the quotes cut short.
    fn errors(&mut self) -> Vec<(IfIndex, Vec<u8>)> {
        let mut frames = Vec::new();
        for index in 0..self.own.len().min(BURST) {
            let connection = &self.own[index];
            let (way, Some(seen)) = (connection.way, connection.seen) else { continue };
            let header = if way.opener.contains(':') { 40 } else { 20 };
            let cut = self.draw(2) == 0;
            let connection = &self.own[index];
            let quote = &connection.last[..if cut { header + 8 } else { connection.last.len().min(500) }];
            let mut frame = Vec::new();
            let step = between(ip(way.answers.0), seen.0);
            let written = if way.opener.contains(':') {
                step.icmpv6_raw(2, 0, [0, 0, 5, 0]).write(&mut frame, quote)
            } else {
                step.icmpv4_raw(3, 4, [0, 0, 5, 0]).write(&mut frame, quote)
            };
            written.expect("it fits");
            frames.push((self.device(way.to), frame));
        }
        frames
    }

    /// Frames that nobody should have sent.
    fn garbage(&mut self) -> Vec<(IfIndex, Vec<u8>)> {
        let mut frames = self.short_flows();
        for (_, frame) in &mut frames {
            for _ in 0..3 {
                let at = self.draw(frame.len() as u32) as usize;
                frame[at] = self.draw(256) as u8;
            }
            let length = 1 + self.draw(frame.len() as u32) as usize;
            frame.truncate(length);
        }
        frames
    }

    /// The answer to some of what left; floods get none.
    fn answer(&mut self, device: IfIndex, frame: &[u8]) -> Option<(IfIndex, Vec<u8>)> {
        let ((src, sport), (dst, dport)) = ends(frame)?;
        let is_udp = frame.get(if src.is_ipv4() { 23 } else { 20 }) == Some(&17);
        if !is_udp || device == IfIndex::HOST || self.draw(2) == 0 {
            return None;
        }
        let mut answer = Vec::new();
        between(dst, src).udp(dport, sport).write(&mut answer, &[4; 100]).ok()?;
        Some((device, answer))
    }
}

struct Compiled {
    rules: Arc<Rules>,
    forwarding: Arc<Forwarding>,
}

fn main() -> Result<(), Failure> {
    let minutes: f64 = std::env::args().nth(1).map_or(Ok(30.0), |a| a.parse())?;
    let folder = tempfile::tempdir()?;
    let (variants, snat, tables, domain, links) = prepare(folder.path())?;
    let snapshot = |generation: u32| {
        let Compiled { rules, forwarding } = &variants[generation as usize % 2];
        Snapshot { generation, rules: rules.clone(), snat: snat.clone(), forwarding: forwarding.clone() }
    };
    let index =
        |name: &str| links.devices.iter().find(|d| d.name == name).map(|d| d.index).ok_or("a device is missing");
    let devices = Devices { uplink: index("eth0")?, client: index("client0")?, server: index("server0")? };
    let shared = Arc::new(Shared {
        published: Published::new(&domain, snapshot(1)),
        domain,
        tables,
        affinity: Affinity::new(Affinity::DEFAULT_CLIENTS, [1, 2]),
        devices,
        stop: AtomicBool::new(false),
        begin: Instant::now(),
        rounds: AtomicU32::new(0),
    });

    let counters = Counters::<COUNTERS>::new();
    let (events, _kept) = bounded(16);
    let (senders, inboxes): (Vec<_>, Vec<_>) = (0..WORKERS).map(|_| unbounded()).unzip();
    for i in 0..CONNECTIONS {
        let connection = Connection {
            way: WAYS[i % WAYS.len()],
            port: 40_000 + (i / WAYS.len()) as u16,
            steps: 0,
            next_seq: [i as u32, 7 * i as u32],
            seen: None,
            last: Vec::new(),
        };
        senders[i % WORKERS].send(connection)?;
    }
    let workers: Vec<Worker> = inboxes
        .into_iter()
        .enumerate()
        .map(|(number, inbox)| {
            let random = |salt: u64| ChaCha8Rng::seed_from_u64(number as u64 + 100 * salt);
            let pipeline = Pipeline::new(&shared.tables, counters.join(), random(1), events.clone(), BURST, 2);
            Worker {
                pipeline,
                driver: MemoryDriver::new(2, FRAMES),
                participant: shared.domain.join(),
                random: random(2),
                inbox,
                peers: senders.clone(),
                own: Vec::new(),
                number: 0,
                delivered: 0,
                jump: 0,
                shared: shared.clone(),
            }
        })
        .collect();
    println!("{CONNECTIONS} connections, {WORKERS} workers, {MAX_ENTRIES} entries a family, {minutes} minutes");
    let handles: Vec<_> = workers
        .into_iter()
        .map(|mut worker| {
            thread::spawn(move || {
                let outcome = worker.run();
                worker.shared.stop.store(true, Ordering::Relaxed);
                worker.pipeline.give_up_held(&mut worker.driver);
                outcome.map(|()| worker)
            })
        })
        .collect();

    let (mut generation, mut reported) = (1, Instant::now());
    while shared.begin.elapsed().as_secs_f64() < minutes * 60.0 && !shared.stop.load(Ordering::Relaxed) {
        thread::sleep(RELOAD_EVERY);
        generation += 1;
        shared.published.publish(snapshot(generation));
        if reported.elapsed() >= Duration::from_secs(60) {
            reported = Instant::now();
            report(&shared, &Totals::new(&counters.sums(), 0), generation);
        }
    }
    shared.stop.store(true, Ordering::Relaxed);
    let mut workers = Vec::new();
    for handle in handles {
        workers.push(handle.join().map_err(|_| "a worker panicked")??);
    }
    report(&shared, &Totals::new(&counters.sums(), 0), generation);
    account(&shared, &mut workers, &Totals::new(&counters.sums(), 0), &snat)
}

type Prepared = (Vec<Compiled>, Arc<SnatPorts>, Tables, Arc<Domain>, Links);

/// Everything compiled, as the router does it.
fn prepare(folder: &Path) -> Result<Prepared, Failure> {
    let config = folder.join("weir.yaml");
    fs::write(&config, CONFIG)?;
    let mut compilers = Compilers::default();
    let mut variants = Vec::new();
    let mut loaded = None;
    for variant in [false, true] {
        fs::write(folder.join("cluster.yaml"), manifests(variant))?;
        let now = translate::load_strictly(&config).map_err(|problems| problems.render(false))?;
        let links = compile::links_of(&now.config);
        let rules = Arc::new(compilers.rules(&now)?);
        variants.push(Compiled { rules, forwarding: Arc::new(Forwarding::compile(&now.cluster, &links)?) });
        loaded = Some((now, links));
    }
    let (loaded, links) = loaded.ok_or("no variant")?;
    let snat = Arc::new(compile::snat_ports(&loaded, &variants[0].rules, &Default::default())?);
    let domain = Domain::new();
    let tables = compile::tables(&loaded.config.conntrack, &domain, &mut ChaCha8Rng::seed_from_u64(9));
    Ok((variants, snat, tables, domain, links))
}

fn report(shared: &Shared, totals: &Totals, generation: u32) {
    println!(
        "{:.1} minutes, {} s of the workers' clock: {} packets, {} opened, {} reloads, {} and {} entries, SNAT {} allocated {} taken {} displaced",
        shared.begin.elapsed().as_secs_f64() / 60.0,
        shared.now().0 / Tick::PER_SECOND,
        totals.rx,
        totals.opened,
        generation - 1,
        shared.tables.v4.len(),
        shared.tables.v6.len(),
        totals.snat_allocated,
        totals.snat_taken,
        totals.snat_displaced,
    );
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(what().into()) }
}

/// Where everything went.
fn account(shared: &Shared, workers: &mut [Worker], totals: &Totals, snat: &SnatPorts) -> Result<(), Failure> {
    println!("drops: {:?}", totals.drops);
    let delivered: u64 = workers.iter().map(|w| w.delivered).sum();
    // Connections on their way between workers when these stopped count as well.
    let alive: usize = workers.iter().map(|w| w.own.len() + w.inbox.len()).sum();
    ensure(alive == CONNECTIONS, || format!("{alive} of {CONNECTIONS} connections are left"))?;
    println!("connections: all {alive} live, {delivered} packets of theirs delivered, none lost");

    for worker in workers.iter_mut() {
        let (outstanding, totals) = (worker.driver.outstanding(), worker.pipeline.totals());
        ensure(outstanding == 0, || format!("{outstanding} frames are missing"))?;
        ensure(totals.balance() && totals.held == 0, || format!("the counters do not balance: {totals:?}"))?;
    }
    println!("frames: {FRAMES} of each worker are back; the counters balance");

    let now = shared.now();
    let v4 = account_entries(&shared.tables.v4, now, snat)?;
    let v6 = account_entries(&shared.tables.v6, now, snat)?;
    let inserted = shared.tables.v4.counts().inserted + shared.tables.v6.counts().inserted;
    ensure(inserted == totals.opened, || format!("{inserted} inserted, {} opened", totals.opened))?;
    println!("entries: {v4} IPv4, {v6} IPv6, no two with one key, every translated port in {:?}", snat.range());

    // Ten days later nothing is left, and the whole table can be had again.
    for worker in workers.iter_mut() {
        worker.jump = 86_400_000;
    }
    for _ in 0..2 * (MAX_ENTRIES / 64) {
        for worker in workers.iter_mut() {
            worker.turn(&[]);
        }
    }
    for counts in [shared.tables.v4.counts(), shared.tables.v6.counts()] {
        ensure(counts.inserted == counts.removed, || format!("entries are left after ten days: {counts:?}"))?;
        println!("table: {counts:?}");
    }
    let worker = &mut workers[0];
    let mut opened = 0;
    for number in 0..MAX_ENTRIES - MAX_ENTRIES / 64 {
        let mut frame = Vec::new();
        between(ip("10.1.1.10"), ip("10.1.1.20"))
            .udp(1 + number as u16, 1 + (number >> 15) as u16)
            .write(&mut frame, &[])?;
        opened += worker.turn(&[(worker.shared.devices.client, frame)]).len();
    }
    ensure(opened == (MAX_ENTRIES - MAX_ENTRIES / 64) as usize, || format!("only {opened} entries can be had again"))?;
    ensure(shared.tables.v4.len() == opened, || "the table does not hold what was opened".into())?;
    println!("afterwards: the table is empty, and can be filled again: {opened} entries");
    Ok(())
}

/// No two connections have one key in either direction, and what was translated has a port of weir's; how many there are.
fn account_entries<A: Family + Ord>(table: &Table<A>, now: Tick, snat: &SnatPorts) -> Result<usize, Failure> {
    let mut keys = BTreeSet::new();
    let (mut entries, mut faults) = (0, Vec::new());
    table.for_each(now, |entry| {
        entries += 1;
        for key in [entry.original, entry.reply] {
            if !keys.insert((key.protocol, key.src, key.dst, key.ports)) {
                faults.push(format!("{key:?} is two connections'"));
            }
        }
        let source_changed = entry.reply.dst != entry.original.src;
        if source_changed && entry.original.protocol == Protocol::TCP && !snat.allows(entry.reply.ports.destination()) {
            faults.push(format!("{:?} has a port that is none of weir's", entry.reply));
        }
    });
    let (len, counts) = (table.len() as u64, table.counts());
    ensure(faults.is_empty(), || faults.join("; "))?;
    ensure(counts.inserted - counts.removed == len, || format!("{len} entries, but {counts:?}"))?;
    Ok(entries)
}
