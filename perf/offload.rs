//! What the kernel carries for weir beside what it forwards by itself: flow offload off and auto, plain forwarding, forwarding with
//! kube-proxy's iptables rules; on one node, and between two through a tunnel. All take turns in one run, on the same pods and
//! devices: ratios of pairs are what counts; absolute figures of a shared machine are not.
//!
//! TCP by iperf3, one stream and eight, both ways, at MTU 1500 and 9000; round trips of UDP; UDP packets of 64
//! bytes, and what one costs; requests of wrk to nginx. Client and sender have core 0, server and echo core 1.
//!
//!     cargo run --release --example offload [-- ROUNDS [SECONDS [ROWS]]]
//!
//! With ROWS, a part of a name ("8 streams"), only rows of TCP with such names are measured, on one node at an MTU of 1500, and kube-proxy is left out.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{Ipv4Addr, UdpSocket},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use weir_benches::figures::{Spread, tell};
use weir_lab::{INTERRUPTED, Lab, LabError, Process, check_interrupted, wait_until};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A pod.
#[derive(PartialEq, Eq)]
struct Pod {
    node: &'static str,
    name: &'static str,
    address: &'static str,
    /// Its device in the node.
    device: &'static str,
    /// Its service's number; none: it has no server.
    service: Option<u16>,
}

/// Nodes, their addresses, and the core of a router's worker.
const NODES: [(&str, &str, usize); 2] = [("node-a", "192.168.10.1", 1), ("node-b", "192.168.10.2", 0)];
const CLIENT: Pod =
    Pod { node: "node-a", name: "default/client", address: "10.1.1.10", device: "client0", service: None };
// Their services are in the middle of all, since kube-proxy's rules are a list.
const NEAR: Pod =
    Pod { node: "node-a", name: "default/near", address: "10.1.1.20", device: "near0", service: Some(SERVICES / 2) };
const FAR: Pod =
    Pod { node: "node-b", name: "default/far", address: "10.1.2.20", device: "far0", service: Some(SERVICES / 2 + 1) };
const PODS: [&Pod; 3] = [&CLIENT, &NEAR, &FAR];
/// Services of the cluster.
const SERVICES: u16 = 1000;
/// Ports of a service and of its pod: nginx, iperf3, the echo.
const PORTS: [(&str, u16); 3] = [("TCP", HTTP), ("TCP", IPERF), ("UDP", ECHO)];
const HTTP: u16 = 80;
const IPERF: u16 = 5201;
const ECHO: u16 = 5353;
/// What clouds and clusters with jumbo frames have.
const JUMBO_MTU: u32 = 9000;
/// What the largest tunnel header takes, VXLAN's; the pods' MTU leaves room for it, whichever tunnel there is.
const TUNNEL_BYTES: u32 = 50;
/// UDP payload of a 64-byte frame, with the frame check sequence that a veth does not have.
const PAYLOAD_BYTES: usize = 18;
/// Round trips measured, if there is time.
const ROUND_TRIPS: usize = 20_000;
/// The client's core, and the server's.
const CORES: (usize, usize) = (0, 1);
/// Where a thing is to be ready.
const LIMIT: Duration = Duration::from_secs(20);

const TCP: [(&str, &[&str]); 4] = [
    ("TCP out, 1 stream, Gbit/s", &["-P1"]),
    ("TCP out, 8 streams, Gbit/s", &["-P8"]),
    ("TCP in, 1 stream, Gbit/s", &["-P1", "-R"]),
    ("TCP in, 8 streams, Gbit/s", &["-P8", "-R"]),
];
const P50: &str = "round trip p50, us";
const P99: &str = "round trip p99, us";
const PACKETS: &str = "64-byte packets, Mpps";
const CPU: &str = "CPU per packet, ns";
const CPU_OF_PATH: &str = "CPU per packet beyond sending it, ns";
const KEPT: &str = "requests/s, connections kept";
const NEW: &str = "requests/s, a connection each";

/// Who forwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    /// weir, without flow offload.
    Off,
    /// weir, with flow offload.
    Auto,
    /// The node's kernel, through its tunnel between nodes.
    Kernel,
    /// The same without the tunnel.
    Direct,
    /// The kernel, through its tunnel, with kube-proxy's rules.
    KubeProxy,
}

/// What a column of figures is of.
struct Way {
    title: &'static str,
    mode: Mode,
    /// Whether the service's address is asked, or the pod's.
    by_service: bool,
}

const WAYS: [Way; 6] = [
    Way { title: "off, ClusterIP", mode: Mode::Off, by_service: true },
    Way { title: "auto, ClusterIP", mode: Mode::Auto, by_service: true },
    Way { title: "auto, pod", mode: Mode::Auto, by_service: false },
    Way { title: PLAIN, mode: Mode::Kernel, by_service: false },
    Way { title: "kernel untunnelled, pod", mode: Mode::Direct, by_service: false },
    Way { title: KUBE_PROXY, mode: Mode::KubeProxy, by_service: true },
];
const PLAIN: &str = "kernel, pod";
const KUBE_PROXY: &str = "kube-proxy, ClusterIP";

/// Where the server is, and the MTU of the wire.
struct Setting {
    server: &'static Pod,
    mtu: u32,
}

impl Setting {
    fn is_tunnelled(&self) -> bool {
        *self.server == FAR
    }

    fn pod_mtu(&self) -> u32 {
        if self.is_tunnelled() { self.mtu - TUNNEL_BYTES } else { self.mtu }
    }

    fn nodes(&self) -> &'static [(&'static str, &'static str, usize)] {
        if self.is_tunnelled() { &NODES } else { &NODES[..1] }
    }

    fn modes(&self) -> Vec<Mode> {
        let mut modes = vec![Mode::Off, Mode::Auto, Mode::Kernel, Mode::KubeProxy];
        if self.is_tunnelled() {
            modes.push(Mode::Direct);
        }
        modes
    }

    fn title(&self) -> String {
        let place = if self.is_tunnelled() { "Two nodes" } else { "One node" };
        format!("{place}, MTU {}, of pods {}", self.mtu, self.pod_mtu())
    }
}

/// Figures by measure and way, one of each round.
type Figures = BTreeMap<(&'static str, &'static str), Vec<f64>>;

fn main() -> Result<(), Failure> {
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, &INTERRUPTED)?;
    }
    let mut arguments = std::env::args().skip(1);
    let rounds: usize = arguments.next().map_or(Ok(5), |a| a.parse())?;
    let seconds: u32 = arguments.next().map_or(Ok(1), |a| a.parse())?;
    let rows = arguments.next();
    let mut bench = Bench::new(seconds, rows)?;
    let settings = [(&NEAR, 1500), (&NEAR, JUMBO_MTU), (&FAR, 1500), (&FAR, JUMBO_MTU)]
        .map(|(server, mtu)| Setting { server, mtu });
    let settings = if bench.rows.is_some() { &settings[..1] } else { &settings };
    let mut figures: Vec<Figures> = settings.iter().map(|_| Figures::new()).collect();
    for round in 0..rounds {
        for (setting, figures) in settings.iter().zip(&mut figures) {
            bench.round(setting, round, figures)?;
            eprintln!("round {} of {rounds}: {}, load {}", round + 1, setting.title(), load()?);
        }
    }
    println!(
        "Medians of {rounds} rounds of {seconds} s; in brackets medians of the rounds' ratios, to `{PLAIN}` and to `{KUBE_PROXY}`."
    );
    println!("Tunnel of the kernel: {}. Load: {}", bench.tunnel, load()?);
    for (setting, figures) in settings.iter().zip(&figures) {
        tell_all(&setting.title(), figures);
        println!("\n{}\n\n{}", setting.title(), table(figures));
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Tells the report every figure, and its ratios to those of the kernel in the same round.
fn tell_all(title: &str, figures: &Figures) {
    for way in &WAYS {
        for ((measure, of_way), values) in figures {
            if *of_way != way.title {
                continue;
            }
            tell(&format!("offload: {title}"), measure, way.title, "", Spread::of(&mut values.clone()));
            for base in [PLAIN, KUBE_PROXY] {
                let of_base = &figures[&(*measure, base)];
                let mut ratios: Vec<f64> = values.iter().zip(of_base).map(|(value, base)| value / base).collect();
                tell(&format!("offload, ratio to {base}: {title}"), measure, way.title, "", Spread::of(&mut ratios));
            }
        }
    }
}

/// A table in Markdown, a column for each way.
fn table(figures: &Figures) -> String {
    let ways: Vec<&str> =
        WAYS.iter().map(|way| way.title).filter(|way| figures.keys().any(|(_, of)| of == way)).collect();
    let mut text = format!("| | {} |\n|---|{}\n", ways.join(" | "), "---|".repeat(ways.len()));
    let measures = TCP.iter().map(|tcp| tcp.0).chain([P50, P99, PACKETS, CPU, CPU_OF_PATH, KEPT, NEW]);
    for measure in measures.filter(|measure| figures.contains_key(&(*measure, PLAIN))) {
        text += &format!("| {measure} |");
        for way in &ways {
            let of_way = &figures[&(measure, *way)];
            let ratio = |base: &'static str| {
                let base = figures.get(&(measure, base))?;
                let ratio = median(of_way.iter().zip(base).map(|(value, base)| value / base).collect());
                Some(format!("{ratio:.2}"))
            };
            let value = median(of_way.clone());
            let digits = if value < 100.0 { 2 } else { 0 };
            let ratios: Vec<_> = [PLAIN, KUBE_PROXY].into_iter().filter_map(ratio).collect();
            text += &format!(" {value:.digits$} ({}) |", ratios.join(", "));
        }
        text += "\n";
    }
    text
}

fn load() -> Result<String, Failure> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').take(3).collect::<Vec<_>>().join(" "))
}

/// The service's address.
fn cluster_ip(service: u16) -> String {
    let [high, low] = service.to_be_bytes();
    format!("10.96.{}.{low}", high + 1)
}

/// All services: number, backend, protocols and ports.
fn services() -> impl Iterator<Item = (u16, String, &'static [(&'static str, u16)])> {
    (0..SERVICES).map(|number| match PODS.iter().find(|pod| pod.service == Some(number)) {
        Some(pod) => (number, pod.address.into(), &PORTS[..]),
        None => (number, format!("10.1.3.{}", number % 250 + 1), &PORTS[..1]),
    })
}

fn manifests(lab: &Lab) -> String {
    let mut text = String::from(
        "{apiVersion: v1, kind: Namespace, metadata: {name: default}}\n---\n\
         {apiVersion: projectcalico.org/v3, kind: IPPool, metadata: {name: pods}, \
         spec: {cidr: 10.1.0.0/16, ipipMode: Always, vxlanMode: Never, natOutgoing: true}}\n",
    );
    for (number, (node, address, _)) in NODES.iter().enumerate() {
        text += &format!(
            "---\n{{apiVersion: v1, kind: Node, metadata: {{name: {}}}, spec: {{podCIDRs: [10.1.{}.0/24]}}, \
             status: {{addresses: [{{type: InternalIP, address: {address}}}]}}}}\n",
            lab.node_name(node),
            number + 1
        );
    }
    for Pod { node, name, address, device, .. } in PODS {
        let name = name.rsplit('/').next().unwrap_or(name);
        let node = lab.node_name(node);
        text += &format!(
            "---\n{{apiVersion: v1, kind: Pod, metadata: {{namespace: default, name: {name}}}, spec: {{nodeName: {node}, \
             containers: [{{name: c}}]}}, status: {{podIP: {address}, podIPs: [{{ip: {address}}}]}}}}\n---\n\
             {{apiVersion: projectcalico.org/v3, kind: WorkloadEndpoint, metadata: {{namespace: default, name: {name}}}, \
             spec: {{node: {node}, pod: {name}, orchestrator: k8s, endpoint: eth0, interfaceName: {device}, profiles: [kns.default], ipNetworks: [{address}/32]}}}}\n"
        );
    }
    for (number, backend, ports) in services() {
        let ports: Vec<String> = ports
            .iter()
            .map(|(protocol, port)| format!("{{name: p{port}, protocol: {protocol}, port: {port}}}"))
            .collect();
        let ports = ports.join(", ");
        let address = cluster_ip(number);
        text += &format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{namespace: default, name: s{number}}}, \
             spec: {{type: ClusterIP, clusterIP: {address}, clusterIPs: [{address}], ports: [{ports}]}}}}\n---\n\
             {{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {{namespace: default, \
             name: s{number}, labels: {{kubernetes.io/service-name: s{number}}}}}, \
             endpoints: [{{addresses: [{backend}], conditions: {{ready: true}}}}], ports: [{ports}]}}\n"
        );
    }
    text
}

/// The rules of kube-proxy for these services, as iptables-restore reads them: same chains, same matches, same order.
fn kube_proxy_rules() -> String {
    let (mut chains, mut portals, mut rules) = (String::new(), String::new(), String::new());
    for (number, backend, ports) in services() {
        let address = cluster_ip(number);
        for (protocol, port) in ports {
            let protocol = protocol.to_lowercase();
            let comment = format!("-m comment --comment \"default/s{number}:p{port}");
            let (service, endpoint) =
                (format!("KUBE-SVC-{number:08}{port:08}"), format!("KUBE-SEP-{number:08}{port:08}"));
            let to_service =
                format!("-d {address}/32 -p {protocol} {comment} cluster IP\" -m {protocol} --dport {port}");
            chains += &format!(":{service} - [0:0]\n:{endpoint} - [0:0]\n");
            portals += &format!("-A KUBE-SERVICES {to_service} -j {service}\n");
            rules += &format!(
                "-A {service} ! -s 10.1.0.0/16 {to_service} -j KUBE-MARK-MASQ\n\
                 -A {service} {comment} -> {backend}:{port}\" -j {endpoint}\n\
                 -A {endpoint} -s {backend}/32 {comment}\" -j KUBE-MARK-MASQ\n\
                 -A {endpoint} -p {protocol} {comment}\" -m {protocol} -j DNAT --to-destination {backend}:{port}\n"
            );
        }
    }
    format!(
        "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n{chains}\
         -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully\n\
         {portals}{rules}\
         -A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n\
         COMMIT\n\
         *filter\n:KUBE-SERVICES - [0:0]\n:KUBE-EXTERNAL-SERVICES - [0:0]\n:KUBE-FORWARD - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n\
         -A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL\n\
         -A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD\n\
         -A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         COMMIT\n"
    )
}

/// The devices, and who is measured on them.
struct Bench {
    routers: Vec<(&'static str, Process)>,
    lab: Lab,
    /// The tunnel that this kernel has.
    tunnel: &'static str,
    seconds: u32,
    /// Part of the names of the rows that alone are measured.
    rows: Option<String>,
}

impl Bench {
    fn new(seconds: u32, rows: Option<String>) -> Result<Self, Failure> {
        let weir = std::env::current_exe()?.parent().and_then(|p| p.parent()).ok_or("no target folder")?.join("weir");
        let mut lab = Lab::new(&weir)?;
        lab.add_switch()?;
        for (node, address, _) in NODES {
            lab.add_node(node, &[format!("{address}/24")], 1)?;
            // As every NIC has it, also without an XDP program.
            lab.run_in(node, &["ethtool", "-K", "eth0", "gro", "on"])?;
        }
        for pod in PODS {
            lab.add_pod(pod.node, pod.name, pod.device, &[pod.address.parse()?])?;
            // The plain kernel would need a default route for its proxy ARP.
            lab.ip(pod.name, "neigh replace 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent")?;
            if pod.service.is_some() {
                serve(&mut lab, pod)?;
            }
        }
        fs::write(lab.folder().join("cluster.yaml"), manifests(&lab))?;
        fs::write(lab.folder().join("kube-proxy.rules"), kube_proxy_rules())?;
        for (node, _, core) in NODES {
            for offload in ["Off", "Auto"] {
                fs::write(
                    lab.folder().join(format!("{node}-{offload}.yaml")),
                    format!(
                        "nodeName: {}\nmanifests: [cluster.yaml]\nserviceCIDRs: [10.96.0.0/16]\n\
                         workers: {{cores: [{core}]}}\noffload: {}\ndevices: [{{name: eth0, role: uplink}}]\n",
                        lab.node_name(node),
                        offload.to_lowercase()
                    ),
                )?;
            }
        }
        let has_ipip = lab.ip("switch", "link add try type ipip local 192.0.2.1 remote 192.0.2.2").is_ok();
        if has_ipip {
            lab.ip("switch", "link delete try")?;
        }
        Ok(Self { routers: Vec::new(), lab, tunnel: if has_ipip { "ipip" } else { "vxlan" }, seconds, rows })
    }

    /// Every way once. Which comes first changes from round to round.
    fn round(&mut self, setting: &Setting, round: usize, figures: &mut Figures) -> Result<(), Failure> {
        self.set_mtu(setting)?;
        let mut modes = setting.modes();
        let rows = self.rows.clone();
        modes.retain(|mode| rows.is_none() || *mode != Mode::KubeProxy);
        let first = round % modes.len();
        modes.rotate_left(first);
        let is_full = setting.mtu == 1500 && rows.is_none();
        let sending = if is_full { self.sending()? } else { 0.0 };
        for mode in modes {
            self.enter(mode, setting)?;
            for way in WAYS.iter().filter(|way| way.mode == mode) {
                let target = match setting.server.service {
                    Some(service) if way.by_service => cluster_ip(service),
                    _ => setting.server.address.to_owned(),
                };
                wait_until(&format!("an answer by {}", way.title), LIMIT, || echoed(&self.lab, &target).ok())?;
                let mut note = |measure, value| figures.entry((measure, way.title)).or_default().push(value);
                for (measure, arguments) in
                    TCP.into_iter().filter(|(name, _)| rows.as_ref().is_none_or(|rows| name.contains(rows.as_str())))
                {
                    note(measure, self.tcp(way, &target, arguments)?);
                }
                if !is_full {
                    continue;
                }
                let (p50, p99) = self.round_trips(&target)?;
                note(P50, p50);
                note(P99, p99);
                let (rate, cpu) = self.flood(&target, setting.server.name, "eth0", setting.server.name)?;
                note(PACKETS, rate / 1e6);
                note(CPU, cpu);
                note(CPU_OF_PATH, cpu - sending);
                note(KEPT, self.requests(&target, "Connection: keep-alive")?);
                note(NEW, self.requests(&target, "Connection: close")?);
            }
            self.leave(mode, setting)?;
        }
        Ok(())
    }

    fn set_mtu(&self, setting: &Setting) -> Result<(), Failure> {
        let mtu = setting.mtu;
        self.shell(
            "switch",
            &format!("for port in $(ip -o link show master br0 | sed 's/^[0-9]*: //; s/@.*//'); do ip link set $port mtu {mtu}; done; ip link set br0 mtu {mtu}"),
        )?;
        for (node, ..) in NODES {
            self.lab.ip(node, &format!("link set eth0 mtu {mtu}"))?;
        }
        let mtu = setting.pod_mtu();
        for pod in PODS {
            self.lab.ip(pod.node, &format!("link set {} mtu {mtu}", pod.device))?;
            self.lab.ip(pod.name, &format!("link set eth0 mtu {mtu}"))?;
        }
        Ok(())
    }

    fn shell(&self, at: &str, script: &str) -> Result<String, LabError> {
        self.lab.run_in(at, &["sh", "-ec", script])
    }

    fn config(&self, node: &str, mode: Mode) -> String {
        self.lab.folder().join(format!("{node}-{mode:?}.yaml")).display().to_string()
    }

    /// Lets `mode` forward from now on.
    fn enter(&mut self, mode: Mode, setting: &Setting) -> Result<(), Failure> {
        for (number, (node, address, _)) in setting.nodes().iter().enumerate() {
            if matches!(mode, Mode::Off | Mode::Auto) {
                let router = self.lab.start_router(node, PathBuf::from(self.config(node, mode)).as_path())?;
                self.routers.push((node, router));
                continue;
            }
            let mut script = String::from("echo 1 > /proc/sys/net/ipv4/ip_forward\n");
            for pod in PODS.iter().filter(|pod| pod.node == *node) {
                script += &format!("ip route add {}/32 dev {} proto 99\n", pod.address, pod.device);
            }
            if setting.is_tunnelled() {
                let (other, (_, peer, _)) = (2 - number, NODES[1 - number]);
                let room = setting.pod_mtu();
                script += &match (mode, self.tunnel) {
                    (Mode::Direct, _) => format!("ip route add 10.1.{other}.0/24 via {peer} proto 99\n"),
                    (_, "ipip") => format!(
                        "ip link add tunnel type ipip local {address} remote {peer}\n\
                         ip link set tunnel mtu {room} up\n\
                         ip route add 10.1.{other}.0/24 dev tunnel proto 99\n"
                    ),
                    _ => format!(
                        "ip link add tunnel address 02:00:00:00:00:0{number} type vxlan id 1 dstport 4789 local {address} \
                         remote {peer} dev eth0 nolearning\n\
                         ip link set tunnel mtu {room} up\n\
                         ip neigh add {peer} lladdr 02:00:00:00:00:0{} dev tunnel nud permanent\n\
                         ip route add 10.1.{other}.0/24 via {peer} dev tunnel onlink proto 99\n",
                        1 - number
                    ),
                };
            }
            if mode == Mode::KubeProxy {
                let rules = self.lab.folder().join("kube-proxy.rules");
                script += &format!("iptables-nft-restore --noflush {}\n", rules.display());
            }
            self.shell(node, &script)?;
        }
        Ok(())
    }

    /// Takes away what [`Self::enter`] has made.
    fn leave(&mut self, mode: Mode, setting: &Setting) -> Result<(), Failure> {
        for (node, mut router) in std::mem::take(&mut self.routers) {
            let config = self.config(node, mode);
            let status: Value =
                serde_json::from_str(&self.lab.weir(node, &["status", "-c", &config, "--output", "json"])?)?;
            let carried = status["programs"]["Offloaded"].as_u64().unwrap_or(0);
            if (carried > 0) != (mode == Mode::Auto) {
                return Err(format!("offload {mode:?}, but {carried} frames were carried: {status:#}").into());
            }
            router.signal(nix::sys::signal::Signal::SIGTERM);
            router.wait(LIMIT)?;
            self.lab.weir(node, &["detach", "-c", &config])?;
        }
        if !matches!(mode, Mode::Off | Mode::Auto) {
            for (node, ..) in setting.nodes() {
                self.shell(
                    node,
                    "nft flush ruleset; ip route flush proto 99; ip link delete tunnel 2>/dev/null || true; \
                     echo 0 > /proc/sys/net/ipv4/ip_forward",
                )?;
            }
        }
        Ok(())
    }

    /// Runs a client to its end, which comes.
    fn client(&self, arguments: &[&str]) -> Result<String, LabError> {
        check_interrupted()?;
        let limit = (self.seconds + 15).to_string();
        self.lab.run_in(CLIENT.name, &[&["timeout", limit.as_str()], arguments].concat())
    }

    /// Gbit/s.
    fn tcp(&self, way: &Way, target: &str, arguments: &[&str]) -> Result<f64, Failure> {
        let (time, cores) = (self.seconds.to_string(), format!("{},{}", CORES.0, CORES.1));
        let mut report = Value::Null;
        // With too little of the processor it sometimes sees nothing arrive and has no rate.
        for _ in 0..3 {
            let text =
                self.client(&[&["iperf3", "-J", "-c", target, "-t", &time, "-A", &cores], arguments].concat())?;
            report = serde_json::from_str(&text)?;
            if let Some(rate) = report["end"]["sum_received"]["bits_per_second"].as_f64() {
                return Ok(rate / 1e9);
            }
            eprintln!("once more: iperf3 reports no rate for {}: {}", way.title, report["end"]);
        }
        Err(format!("iperf3 to {target} reports no rate: {report:#}").into())
    }

    /// Requests per second.
    fn requests(&self, target: &str, header: &str) -> Result<f64, Failure> {
        let (time, core, url) =
            (format!("-d{}s", self.seconds), CORES.0.to_string(), format!("http://{target}:{HTTP}/"));
        let text = self.client(&["taskset", "-c", &core, "wrk", "-t1", "-c16", &time, "-H", header, &url])?;
        let rate = text.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
        Ok(rate.ok_or("wrk reports no rate")?.trim().parse()?)
    }

    /// Median and 99th percentile, in microseconds.
    fn round_trips(&self, target: &str) -> Result<(f64, f64), Failure> {
        check_interrupted()?;
        let (target, limit) = (target.to_owned(), Duration::from_secs(2 * u64::from(self.seconds)));
        let mut times = in_namespace(&self.lab, CLIENT.name, CORES.0, move || {
            let socket = asking(&target)?;
            let begin = Instant::now();
            let mut times = Vec::with_capacity(ROUND_TRIPS);
            while times.len() < ROUND_TRIPS && begin.elapsed() < limit {
                let sent = Instant::now();
                exchange(&socket)?;
                times.push(sent.elapsed().as_secs_f64() * 1e6);
            }
            Ok(times)
        })?
        .join()
        .map_err(|_| "the client panicked")??;
        times.sort_by(f64::total_cmp);
        Ok((times[times.len() / 2], times[times.len() * 99 / 100]))
    }

    /// CPU per packet of sending alone: the first device discards them.
    fn sending(&mut self) -> Result<f64, Failure> {
        // Any mode does to get the flow going.
        let setting = Setting { server: &NEAR, mtu: 1500 };
        self.enter(Mode::Kernel, &setting)?;
        let (_, cpu) = self.flood(NEAR.address, CLIENT.node, CLIENT.device, CLIENT.name)?;
        self.leave(Mode::Kernel, &setting)?;
        Ok(cpu)
    }

    /// Sends small packets of one flow, which are discarded at a device of a namespace: how many a second came and went at eth0 of the pod
    /// `counted`, and nanoseconds of CPU for each, the sender's included.
    fn flood(&self, target: &str, at: &str, device: &str, counted: &str) -> Result<(f64, f64), Failure> {
        check_interrupted()?;
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (go, may_go) = std::sync::mpsc::channel();
        let (target, stopped) = (target.to_owned(), stop.clone());
        let sender = in_namespace(&self.lab, CLIENT.name, CORES.0, move || {
            let socket = asking(&target)?;
            ready.send(())?;
            may_go.recv()?;
            while !stopped.load(Ordering::Relaxed) {
                // Refused while a queue is full: the next call tries again.
                let _ = socket.send(&[0; PAYLOAD_BYTES]);
            }
            Ok(())
        })?;
        let measured = (|| -> Result<(f64, f64), Failure> {
            is_ready.recv()?;
            let chain = format!("{{ type filter hook ingress device {device} priority 0; policy drop; }}");
            self.lab.run_in(at, &["nft", &format!("add table netdev sink; add chain netdev sink discard {chain}")])?;
            go.send(())?;
            thread::sleep(Duration::from_millis(200));
            let (packets, begin, cpu) = (self.packets(counted)?, Instant::now(), cpu_seconds()?);
            thread::sleep(Duration::from_secs(self.seconds.into()));
            let (cpu, elapsed, packets) = (cpu_seconds()? - cpu, begin.elapsed(), self.packets(counted)? - packets);
            self.lab.run_in(at, &["nft", "delete table netdev sink"])?;
            Ok((packets as f64 / elapsed.as_secs_f64(), cpu * 1e9 / packets as f64))
        })();
        stop.store(true, Ordering::Relaxed);
        drop(go);
        sender.join().map_err(|_| "the sender panicked")??;
        measured
    }

    /// Packets that eth0 of a pod has received and sent.
    fn packets(&self, pod: &str) -> Result<u64, Failure> {
        let text = self.lab.run_in(pod, &["cat", "/proc/self/net/dev"])?;
        let line = text.lines().find_map(|l| l.trim().strip_prefix("eth0:")).ok_or("the pod has no eth0")?;
        let numbers: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        Ok(numbers[1] + numbers[9])
    }
}

/// Runs `work` on a thread in a namespace of the lab, pinned to a core.
fn in_namespace<T: Send + 'static>(
    lab: &Lab,
    name: &str,
    core: usize,
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<thread::JoinHandle<Result<T, Failure>>, Failure> {
    let namespace = fs::File::open(format!("/run/netns/{}", lab.namespace_name(name)))?;
    Ok(thread::spawn(move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        core_affinity::set_for_current(core_affinity::CoreId { id: core });
        work()
    }))
}

/// Starts nginx, iperf3 and an echo in a pod, which run until the end.
fn serve(lab: &mut Lab, pod: &Pod) -> Result<(), Failure> {
    let folder = lab.folder().join(format!("nginx-{}", pod.device));
    fs::create_dir(&folder)?;
    let at = folder.display().to_string();
    let config = format!(
        "daemon off; pid {at}/pid; error_log stderr; worker_processes 1; worker_cpu_affinity {:b};\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n  access_log off; keepalive_requests 100000000; client_body_temp_path {at}; proxy_temp_path {at};\n  \
         fastcgi_temp_path {at}; uwsgi_temp_path {at}; scgi_temp_path {at};\n  \
         server {{ listen {HTTP}; default_type text/plain; location / {{ return 200 \"{}\\n\"; }} }}\n}}\n",
        1 << CORES.1,
        pod.name
    );
    let file = folder.join("nginx.conf");
    fs::write(&file, config)?;
    let file = file.display().to_string();
    lab.keep(pod.name, &format!("nginx {}", pod.device), &["nginx", "-p", &at, "-e", "stderr", "-c", &file])?;
    lab.keep(pod.name, &format!("iperf3 {}", pod.device), &["iperf3", "-s"])?;
    // Its thread ends with the process.
    in_namespace(lab, pod.name, CORES.1, || -> Result<(), Failure> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ECHO))?;
        let mut data = [0; 2048];
        loop {
            let (length, from) = socket.recv_from(&mut data)?;
            // Where no one forwards at the moment, the answer is lost.
            let _ = socket.send_to(&data[..length], from);
        }
    })?;
    Ok(())
}

/// A socket of the client, whose flow to an echo is no longer new.
fn asking(target: &str) -> Result<UdpSocket, Failure> {
    let socket = UdpSocket::bind((CLIENT.address, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.connect((target, ECHO))?;
    for _ in 0..200 {
        exchange(&socket)?;
    }
    Ok(socket)
}

fn exchange(socket: &UdpSocket) -> Result<(), Failure> {
    let mut data = [0; PAYLOAD_BYTES];
    socket.send(&data)?;
    socket.recv(&mut data).map_err(|error| format!("no answer from the echo: {error}"))?;
    Ok(())
}

/// Whether an echo answers the client.
fn echoed(lab: &Lab, target: &str) -> Result<(), Failure> {
    let target = target.to_owned();
    in_namespace(lab, CLIENT.name, CORES.0, move || asking(&target).map(drop))?
        .join()
        .map_err(|_| "the client panicked")?
}

/// Seconds for which the CPUs have worked, interrupts included, but not for processes that are none of ours.
fn cpu_seconds() -> Result<f64, Failure> {
    /// Of all times in /proc, whatever the kernel's own clock.
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = fs::read_to_string("/proc/stat")?;
    let all: Vec<u64> = stat.split_whitespace().skip(1).map_while(|word| word.parse().ok()).collect();
    let [user, nice, system, _, _, irq, softirq] = all[..7] else { unreachable!("seven were taken") };
    let mut processes = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // One that has just ended has none.
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((_, rest)) = stat.rsplit_once(')') else { continue };
        let words: Vec<&str> = rest.split_whitespace().collect();
        // Its own time and that of children that it has waited for: what the end of a process moves from one to the other.
        let ticks: u64 = words[11..15].iter().filter_map(|word| word.parse::<u64>().ok()).sum();
        processes.insert(id, (words[1].parse::<u32>()?, ticks));
    }
    // The kernel's threads have the parent 2.
    let mut ours = BTreeSet::from([2, std::process::id()]);
    loop {
        let more: Vec<u32> = processes
            .iter()
            .filter(|(id, (parent, _))| ours.contains(parent) && !ours.contains(id))
            .map(|p| *p.0)
            .collect();
        if more.is_empty() {
            break;
        }
        ours.extend(more);
    }
    let others: u64 = processes.iter().filter(|(id, _)| !ours.contains(id)).map(|(_, (_, ticks))| ticks).sum();
    Ok(((user + nice + system + irq + softirq) - others) as f64 / TICKS_PER_SECOND)
}
