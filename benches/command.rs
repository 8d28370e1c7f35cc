//! `weir bench`: the pipeline on memory rings, established flows of UDP with DNAT and IPIP, one core.
//!
//! Each round writes a burst of packets into frames, handles it, and takes the frames back. What writing and taking back cost alone is
//! measured the same way and subtracted. Rounds with and without the pipeline alternate, so that a noisy machine disturbs both alike.

use std::{
    fmt::Write as _,
    fs, hint,
    net::Ipv4Addr,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use etherparse::PacketBuilder;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde_json::json;
use weir_conntrack::{Table, TableConfig, TcpSettings, Timeouts};
use weir_dataplane::{
    counters::COUNTERS,
    driver::Driver,
    forwarding::Forwarding,
    frame::{IfIndex, Packet},
    memory::MemoryDriver,
    model::{Device, Links, Neighbor, Role},
    pipeline::{Context, Pipeline, Tables, process_burst},
    snapshot::Snapshot,
};
use weir_nat::Affinity;
use weir_packet::{Mac, Tick};
use weir_policy::Compiler;
use weir_sync::{Counters, Domain, Published};

use crate::{compile, kernel::Listening, translate};

const BURST: usize = 64;
const PODS: u32 = 32;
const PORTS_PER_POD: u32 = 32_768;
const FIRST_PORT: u32 = 16_384;
const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// The results of one case.
#[derive(Debug, Clone)]
pub struct Measurement {
    /// Flows that the packets belong to.
    pub flows: u32,
    /// Time per packet, writing and taking back subtracted.
    pub ns_per_packet: f64,
    /// Time per packet for writing and taking back alone.
    pub overhead_ns: f64,
    /// Cycles per packet, by the processor's nominal frequency; `None` where /proc/cpuinfo does not tell.
    pub cycles_per_packet: Option<f64>,
}

/// Runs the benchmark and prints its results.
pub fn run(flows: u32, seconds: f64, as_json: bool) -> ExitCode {
    match measure(flows, Duration::from_secs_f64(seconds.clamp(0.1, 600.0))) {
        Ok(m) if as_json => {
            println!(
                "{}",
                json!({
                    "case": "established IPv4 UDP, DNAT, IPIP, one core", "flows": m.flows, "nsPerPacket": m.ns_per_packet,
                    "cyclesPerPacket": m.cycles_per_packet, "packetsPerSecond": 1e9 / m.ns_per_packet,
                    "overheadNs": m.overhead_ns,
                })
            );
            ExitCode::SUCCESS
        }
        Ok(m) => {
            let cycles = m.cycles_per_packet.map_or(String::new(), |c| format!(", {c:.0} cycles"));
            println!("established IPv4 UDP, DNAT, IPIP, one core, {} flows:", m.flows);
            println!("  {:.1} ns per packet{cycles}, {:.2} Mpps", m.ns_per_packet, 1e3 / m.ns_per_packet);
            println!("  (writing packets into frames and taking frames back: {:.1} ns, subtracted)", m.overhead_ns);
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("weir: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Measures for about `duration`.
///
/// # Errors
/// Where there are too many flows, or the benchmark's own configuration does not load.
pub fn measure(flows: u32, duration: Duration) -> Result<Measurement, String> {
    if flows == 0 || flows > PODS * PORTS_PER_POD {
        return Err(format!("--flows must be 1 to {}", PODS * PORTS_PER_POD));
    }
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    fs::write(folder.path().join("cluster.yaml"), manifests()).map_err(|e| e.to_string())?;
    let config = folder.path().join("weir.yaml");
    fs::write(&config, "nodeName: node-a\nmanifests: [cluster.yaml]\nserviceCIDRs: [10.96.0.0/16]\n")
        .map_err(|e| e.to_string())?;
    let loaded = translate::load(&config).map_err(|problems| problems.render(false))?;

    let links = links(&loaded.cluster);
    let rules = Arc::new(compile::rules(&loaded, &mut Compiler::default()).map_err(|e| e.to_string())?);
    let snat = Arc::new(compile::snat_ports(&loaded, &rules, &Listening::default()).map_err(|e| e.to_string())?);
    let forwarding = Arc::new(Forwarding::compile(&loaded.cluster, &links).map_err(|e| e.to_string())?);
    let domain = Domain::new();
    let published = Published::new(&domain, Snapshot { generation: 1, rules, snat, forwarding });
    let table = || TableConfig {
        max_entries: flows + flows / 8 + 1024,
        seed: [1, 2],
        timeouts: Timeouts::default(),
        tcp: TcpSettings::default(),
    };
    let tables = Tables {
        v4: Table::new(table(), domain.clone()),
        v6: Table::new(TableConfig { max_entries: 16, ..table() }, domain.clone()),
    };
    let affinity = Affinity::new(1, [1, 2]);
    let (events, _kept) = crossbeam::channel::bounded(16);
    let counters = Counters::<COUNTERS>::new();
    let mut pipeline = Pipeline::new(&tables, counters.join(), ChaCha8Rng::seed_from_u64(7), events, BURST, 2);
    let mut driver = MemoryDriver::new(2, 4 * BURST as u32);
    let mut participant = domain.join();
    let packets: Vec<(IfIndex, Vec<u8>)> = (0..flows).map(packet).collect();

    let mut burst = Vec::with_capacity(BURST);
    let mut next = 0;
    let mut round = |with_pipeline: bool| {
        fill(&mut driver, &mut burst, &packets, &mut next);
        let turn = participant.enter();
        let context = Context::new(published.load(&turn), &tables, &affinity, &turn, Tick(1));
        if with_pipeline {
            process_burst(&mut pipeline, &mut driver, &mut burst, &context);
            pipeline.flush(&mut driver);
            driver.drain_sent(|_, bytes| {
                hint::black_box(bytes);
            });
        } else {
            burst.drain(..).for_each(|packet| driver.release(packet));
        }
    };
    // Opens every flow.
    for _ in 0..=flows as usize / BURST {
        round(true);
    }
    let mut with = Vec::new();
    let mut without = Vec::new();
    const ROUNDS: u32 = 256;
    let begin = Instant::now();
    while begin.elapsed() < duration || with.is_empty() {
        for (with_pipeline, samples) in [(true, &mut with), (false, &mut without)] {
            let start = Instant::now();
            for _ in 0..ROUNDS {
                round(with_pipeline);
            }
            samples.push(start.elapsed().as_nanos() as f64 / f64::from(ROUNDS) / BURST as f64);
        }
    }
    let totals = pipeline.totals();
    if totals.dropped() > 0 || tables.v4.len() < flows as usize {
        return Err(format!("the benchmark's packets were not all forwarded: {totals:?}"));
    }
    let overhead_ns = median(&mut without);
    let ns_per_packet = median(&mut with) - overhead_ns;
    Ok(Measurement {
        flows,
        ns_per_packet,
        overhead_ns,
        cycles_per_packet: megahertz().map(|mhz| ns_per_packet * mhz / 1e3),
    })
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn megahertz() -> Option<f64> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    text.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split_once(':')?.1.trim().parse().ok())
}

fn fill(driver: &mut MemoryDriver, burst: &mut Vec<Packet>, packets: &[(IfIndex, Vec<u8>)], next: &mut usize) {
    for _ in 0..BURST {
        let (device, bytes) = &packets[*next];
        *next = if *next + 1 == packets.len() { 0 } else { *next + 1 };
        let mut packet = driver.allocate().expect("frames for a burst");
        packet.set_len(bytes.len());
        packet.bytes_mut().copy_from_slice(bytes);
        packet.device = *device;
        burst.push(packet);
    }
}

fn pod_address(pod: u32) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, 1, 10 + pod as u8)
}

fn packet(flow: u32) -> (IfIndex, Vec<u8>) {
    let (pod, port) = (flow / PORTS_PER_POD, FIRST_PORT + flow % PORTS_PER_POD);
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 1, pod as u8], [0xee; 6])
        .ipv4(pod_address(pod).octets(), VIP.octets(), 64)
        .udp(port as u16, 53);
    let mut frame = Vec::new();
    builder.write(&mut frame, &[0; 18]).expect("a vector takes every byte");
    (IfIndex(pod + 2), frame)
}

fn links(cluster: &weir_dataplane::model::Cluster) -> Links {
    let uplink = Device {
        name: "eth0".into(),
        index: IfIndex(1),
        role: Role::Uplink,
        mac: Mac([2, 0, 0, 0, 0, 1]),
        mtu: 1500,
        addresses: vec!["192.168.10.1/24".parse().expect("a prefix")],
    };
    let workloads = cluster.workloads.iter().filter(|w| w.node.as_deref() == Some("node-a")).enumerate();
    let devices = workloads.map(|(pod, workload)| Device {
        name: workload.device.clone(),
        index: IfIndex(pod as u32 + 2),
        role: Role::Workload,
        mac: Mac([0xee; 6]),
        mtu: 1500,
        addresses: Vec::new(),
    });
    let other = Neighbor {
        address: "192.168.10.2".parse().expect("an address"),
        mac: Mac([2, 0, 0, 0, 0, 2]),
        device: IfIndex(1),
    };
    Links {
        devices: std::iter::once(uplink).chain(devices).collect(),
        routes: Vec::new(),
        neighbors: vec![other],
        ..Links::default()
    }
}

fn manifests() -> String {
    let mut text = String::from(
        "{apiVersion: v1, kind: Node, metadata: {name: node-a}, spec: {podCIDRs: [10.1.1.0/24]}, \
         status: {addresses: [{type: InternalIP, address: 192.168.10.1}]}}\n---\n\
         {apiVersion: v1, kind: Node, metadata: {name: node-b}, spec: {podCIDRs: [10.1.2.0/24]}, \
         status: {addresses: [{type: InternalIP, address: 192.168.10.2}]}}\n---\n\
         {apiVersion: projectcalico.org/v3, kind: IPPool, metadata: {name: pool}, spec: {cidr: 10.1.0.0/16, ipipMode: Always}}\n---\n\
         {apiVersion: v1, kind: Namespace, metadata: {name: default}}\n---\n\
         {apiVersion: v1, kind: Service, metadata: {namespace: default, name: dns}, spec: {clusterIP: 10.96.0.10, \
         clusterIPs: [10.96.0.10], ports: [{name: dns, protocol: UDP, port: 53}]}}\n---\n\
         {apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {namespace: default, name: dns-1, \
         labels: {kubernetes.io/service-name: dns}}, endpoints: [{addresses: [10.1.2.10], nodeName: node-b}], \
         ports: [{name: dns, protocol: UDP, port: 5353}]}\n",
    );
    for pod in 0..PODS {
        let _ = write!(
            text,
            "---\n{{apiVersion: v1, kind: Pod, metadata: {{namespace: default, name: pod-{pod}}}, spec: {{nodeName: node-a, \
             containers: [{{name: c}}]}}, status: {{podIP: {0}, podIPs: [{{ip: {0}}}]}}}}\n",
            pod_address(pod)
        );
    }
    text
}
