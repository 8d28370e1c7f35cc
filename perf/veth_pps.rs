//! Packets per second through veth: weir beside a bare AF_XDP forwarder and the node's kernel, on the same devices, alternating in one run.
//!
//! Two pods on one node. One sends small UDP packets as fast as its kernel can (UDP_SEGMENT: many packets a call); the other
//! counts what arrives and drops it (nftables, raw hook). The bare forwarder uses the same trunk, programs and rings as weir and does
//! nothing but set the target device: the difference is weir's own work. weir is measured on both of its paths: `offload: off`, where
//! a worker handles every packet, and `auto`, where the kernel's programs carry the flow; the programs' counters must say that it was that one.
//! The kernel forwards by its own routes, without any rule. Ratios of medians are what counts; absolute figures of a shared machine are not.
//!
//!     cargo run --release --example veth_pps [-- ROUNDS [SECONDS]]

use std::{
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;
use weir_benches::figures::{Spread, tell};
use weir_dataplane::{
    afxdp::{AfXdp, AfXdpSettings, PortSettings, RingSizes},
    attach::{self, Attachment, SocketDevice, TrunkSettings},
    driver::{Driver, PortId},
    frame::IfIndex,
};
use weir_lab::{Lab, wait_until};
use weir_packet::Mac;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const SENDER: (&str, &str, &str) = ("default/sender", "10.1.1.10", "sender0");
const SINK: (&str, &str, &str) = ("default/sink", "10.1.1.11", "sink0");
/// UDP payload of a 64-byte frame, with the frame check sequence that a veth does not have.
const PAYLOAD_BYTES: usize = 18;
/// Packets per send call.
const SEGMENTS: usize = 64;
/// Where a flow is to have begun.
const LIMIT: Duration = Duration::from_secs(20);
/// Who forwards, in the order of each round.
const NAMES: [&str; 4] = ["weir, worker", "weir, offload", "bare forwarder", "kernel"];
/// The sender's core, and the forwarder's.
const CORES: (usize, usize) = (0, 1);

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let rounds: usize = arguments.next().map_or(Ok(7), |a| a.parse())?;
    let seconds: f64 = arguments.next().map_or(Ok(2.0), |a| a.parse())?;
    let weir = std::env::current_exe()?.parent().and_then(|p| p.parent()).ok_or("no target folder")?.join("weir");
    let mut lab = Lab::new(&weir)?;
    lab.add_switch()?;
    lab.add_node("node", &["192.168.10.1/24".into()], 1)?;
    for (pod, address, device) in [SENDER, SINK] {
        lab.add_pod("node", pod, device, &[address.parse::<IpAddr>()?])?;
    }
    // A prerouting hook at raw priority sees every packet and none goes on.
    lab.run_in(SINK.0, &["nft", "add table inet sink; add chain inet sink discard { type filter hook prerouting priority raw; policy drop; }"])?;
    let paths = [("off", configuration(&lab, "off")?), ("auto", configuration(&lab, "auto")?)];

    let mut rates: [Vec<f64>; 4] = Default::default();
    for round in 0..rounds {
        for (number, (offload, config)) in paths.iter().enumerate() {
            rates[number].push(through_weir(&lab, config, offload, seconds)?);
        }
        let forwarder = Forwarder::start(&lab)?;
        rates[2].push(measure(&lab, seconds)?);
        forwarder.stop(&lab)?;
        rates[3].push(through_kernel(&lab, seconds)?);
        let shown = NAMES.iter().zip(&rates).map(|(name, rates)| format!("{name} {:.3} Mpps", rates[round] / 1e6));
        println!("round {}: {}", round + 1, shown.collect::<Vec<_>>().join(", "));
    }
    println!("medians of {rounds} alternating rounds of {seconds} s, and of each round's ratio to the bare forwarder:");
    let bare = rates[2].clone();
    for (name, rates) in NAMES.iter().zip(&rates) {
        let mpps = Spread::of(&mut rates.iter().map(|rate| rate / 1e6).collect::<Vec<_>>());
        let ratio = Spread::of(&mut rates.iter().zip(&bare).map(|(rate, bare)| rate / bare).collect::<Vec<_>>());
        println!("{name}: {:.3} Mpps, {:.3}", mpps.median, ratio.median);
        tell("veth", name, "rate", "Mpps", mpps);
        tell("veth, ratio to the bare forwarder in the same round", name, "ratio", "", ratio);
    }
    Ok(())
}

/// Packets per second through the node's own kernel, once its routes are there.
fn through_kernel(lab: &Lab, seconds: f64) -> Result<f64, Failure> {
    // Pods ask for the gateway's MAC, which nobody answers for: the bare forwarder has told them.
    let shell = |script: &str| lab.run_in("node", &["sh", "-ec", script]);
    for (_, address, device) in [SENDER, SINK] {
        shell(&format!("ip route add {address}/32 dev {device} proto 99"))?;
    }
    shell("echo 1 > /proc/sys/net/ipv4/ip_forward")?;
    let rate = measure(lab, seconds);
    shell("echo 0 > /proc/sys/net/ipv4/ip_forward; ip route flush proto 99")?;
    rate
}

/// Packets per second through weir, by the path that was asked for.
fn through_weir(lab: &Lab, config: &Path, offload: &str, seconds: f64) -> Result<f64, Failure> {
    let config = config.display().to_string();
    let mut router = lab.start_router("node", config.as_ref())?;
    let rate = measure(lab, seconds)?;
    let status: Value = serde_json::from_str(&lab.weir("node", &["status", "-c", &config, "--output", "json"])?)?;
    let carried = status["programs"]["Offloaded"].as_u64().unwrap_or(0);
    // At its begin a flow is a worker's in any case.
    let as_asked = if offload == "auto" { carried as f64 > rate * seconds / 2.0 } else { carried == 0 };
    if rate < 1000.0 || !as_asked {
        return Err(format!(
            "offload {offload}: {rate:.0} packets a second, {carried} carried by the programs:\n{status:#}"
        )
        .into());
    }
    router.signal(nix::sys::signal::Signal::SIGTERM);
    router.wait(Duration::from_secs(5))?;
    lab.weir("node", &["detach", "-c", &config])?;
    Ok(rate)
}

fn configuration(lab: &Lab, offload: &str) -> Result<PathBuf, Failure> {
    let node = lab.node_name("node");
    let mut manifests = format!(
        "{{apiVersion: v1, kind: Node, metadata: {{name: {node}}}, spec: {{podCIDRs: [10.1.1.0/24]}}, \
         status: {{addresses: [{{type: InternalIP, address: 192.168.10.1}}]}}}}\n---\n\
         {{apiVersion: v1, kind: Namespace, metadata: {{name: default}}}}\n"
    );
    for (pod, address, device) in [SENDER, SINK] {
        let name = pod.rsplit('/').next().unwrap_or(pod);
        manifests += &format!(
            "---\n{{apiVersion: v1, kind: Pod, metadata: {{namespace: default, name: {name}}}, spec: {{nodeName: {node}, \
             containers: [{{name: c}}]}}, status: {{podIP: {address}, podIPs: [{{ip: {address}}}]}}}}\n---\n\
             {{apiVersion: projectcalico.org/v3, kind: WorkloadEndpoint, metadata: {{namespace: default, name: {name}}}, \
             spec: {{node: {node}, pod: {name}, orchestrator: k8s, endpoint: eth0, interfaceName: {device}, profiles: [kns.default], ipNetworks: [{address}/32]}}}}\n"
        );
    }
    fs::write(lab.folder().join("cluster.yaml"), manifests)?;
    let config = lab.folder().join(format!("{offload}.yaml"));
    fs::write(
        &config,
        format!(
            "nodeName: {node}\nmanifests: [cluster.yaml]\nworkers: {{cores: [{}], mode: busy}}\noffload: {offload}\n",
            CORES.1
        ),
    )?;
    Ok(config)
}

/// Runs `work` on a thread in a namespace of the lab, pinned to a core.
fn in_namespace<T: Send + 'static>(
    lab: &Lab,
    name: &str,
    core: usize,
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> thread::JoinHandle<Result<T, Failure>> {
    let path = format!("/run/netns/{}", lab.namespace_name(name));
    thread::spawn(move || {
        nix::sched::setns(fs::File::open(path)?, nix::sched::CloneFlags::CLONE_NEWNET)?;
        core_affinity::set_for_current(core_affinity::CoreId { id: core });
        work()
    })
}

/// Packets per second that arrive at the sink.
fn measure(lab: &Lab, seconds: f64) -> Result<f64, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let sender = in_namespace(lab, SENDER.0, CORES.0, move || {
        let socket = UdpSocket::bind((SENDER.1, 0))?;
        socket.connect(SocketAddr::new(SINK.1.parse()?, 9))?;
        setsockopt(&socket, sockopt::UdpGsoSegment, &(PAYLOAD_BYTES as i32))?;
        let data = [0; PAYLOAD_BYTES * SEGMENTS];
        while !stopped.load(Ordering::Relaxed) {
            // Refused while a queue is full: the next call tries again.
            let _ = socket.send(&data);
        }
        Ok(())
    });
    // The sink's MAC address has to be found first, and on a busy machine that takes its time; then a flow has half a second to settle.
    let before = received(lab)?;
    wait_until("the first thousand packets", LIMIT, || received(lab).ok().filter(|now| now - before > 1000))?;
    thread::sleep(Duration::from_millis(500));
    let (begin, first) = (Instant::now(), received(lab)?);
    thread::sleep(Duration::from_secs_f64(seconds));
    let (elapsed, last) = (begin.elapsed(), received(lab)?);
    stop.store(true, Ordering::Relaxed);
    sender.join().map_err(|_| "the sender panicked")??;
    Ok((last - first) as f64 / elapsed.as_secs_f64())
}

fn received(lab: &Lab) -> Result<u64, Failure> {
    let text = lab.run_in(SINK.0, &["cat", "/proc/self/net/dev"])?;
    let line = text.lines().find_map(|l| l.trim().strip_prefix("eth0:")).ok_or("the sink has no eth0")?;
    Ok(line.split_whitespace().nth(1).ok_or("no packet count")?.parse()?)
}

/// Receives on the trunk, sets the target device, sends. Nothing else.
struct Forwarder {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Result<(), Failure>>,
    pins: PathBuf,
}

impl Forwarder {
    fn start(lab: &Lab) -> Result<Self, Failure> {
        let pins = weir_node::run::pin_folder(&lab.node_name("node"));
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, pin_dir) = (stop.clone(), pins.clone());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = in_namespace(lab, "node", CORES.1, move || {
            let mut attachment = Attachment::open(TrunkSettings { queues: 1, mtu: 1500, flows: None, pin_dir })?;
            let mut index_of = |device: &str| -> Result<IfIndex, Failure> {
                let index = nix::net::if_::if_nametoindex(device)?;
                attachment.adopt_workload(index, device, Mac([0xee; 6]), true)?;
                Ok(IfIndex(index))
            };
            let (sender, sink) = (index_of(SENDER.2)?, index_of(SINK.2)?);
            let mut driver = AfXdp::open(&AfXdpSettings {
                trunk: PortSettings {
                    device: "weir1".into(),
                    index: IfIndex(attachment.trunk().router_end),
                    mac: Mac::default(),
                    queue: 0,
                    sizes: RingSizes::default(),
                },
                uplinks: Vec::new(),
                spare_frames: AfXdpSettings::default_spare_frames(1500),
                mtu: 1500,
            })?;
            attachment.register_socket(SocketDevice::Trunk, 0, driver.socket(PortId::TRUNK))?;
            ready.send(())?;
            let mut burst = Vec::with_capacity(64);
            while !stopped.load(Ordering::Relaxed) {
                if driver.receive(PortId::TRUNK, &mut burst, 64) == 0 {
                    std::hint::spin_loop();
                    continue;
                }
                for packet in &mut burst {
                    packet.device = if packet.device == sender { sink } else { sender };
                }
                driver.transmit(PortId::TRUNK, &mut burst);
                burst.drain(..).for_each(|packet| driver.release(packet));
            }
            Ok(())
        });
        // The sender end is gone where the thread failed; its error comes from the join.
        if is_ready.recv().is_err() {
            return Err(match thread.join() {
                Ok(Err(error)) => error,
                _ => "the bare forwarder did not start".into(),
            });
        }
        // ARP for the gateway is weir's to answer; a bare forwarder has nobody who does.
        for pod in [SENDER.0, SINK.0] {
            lab.ip(pod, "neigh replace 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent")?;
        }
        Ok(Self { stop, thread, pins })
    }

    fn stop(self, lab: &Lab) -> Result<(), Failure> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| "the bare forwarder panicked")??;
        let pins = self.pins;
        in_namespace(lab, "node", CORES.1, move || Ok(attach::detach(&pins)?))
            .join()
            .map_err(|_| "detach panicked")??;
        Ok(())
    }
}
