//! weir.yaml: the router's own configuration, `RouterConfig` of `weir.dev/v1alpha1`.

use std::{
    fs::File,
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer};
use weir_dataplane::{fragments, frame::MAX_MTU, model::Role, offload::MAX_UDP_PACKETS};
use weir_packet::{Mac, Tick};

use crate::sources::file::{self, Kind, Unread};
use crate::text::{
    address::{parse_cidr, parse_ip},
    problem::{Problems, Severity, nearest},
    source::{Source, Span},
    tree::{self, Node, Value},
    typed,
};

/// weir.yaml. Every key of the contract, with defaults filled in.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct RouterConfig {
    /// `weir.dev/v1alpha1`; may be left out.
    pub api_version: String,
    /// `RouterConfig`; may be left out.
    pub kind: String,
    /// This node's name in the manifests.
    pub node_name: String,
    /// YAML files or folders of them, already relative to the place where weir.yaml is.
    pub manifests: Vec<PathBuf>,
    /// The running cluster whose objects there are besides.
    pub kubernetes: Option<Kubernetes>,
    /// Sources taken as pods by service NAT. `None`: the pools, else the nodes' pod ranges; empty: unknown.
    #[serde(rename = "podCIDRs", deserialize_with = "optional_networks")]
    pub pod_cidrs: Option<Vec<IpNet>>,
    /// Where cluster IPs are allocated.
    #[serde(rename = "serviceCIDRs", deserialize_with = "networks")]
    pub service_cidrs: Vec<IpNet>,
    /// The value of the label service.kubernetes.io/service-proxy-name that services are served by. `None`: those without it.
    pub service_proxy_name: Option<String>,
    /// Masquerade all that goes to a cluster IP.
    pub masquerade_all: bool,
    /// Addresses with node ports; empty: all of the node's.
    #[serde(deserialize_with = "networks")]
    pub node_port_addresses: Vec<IpNet>,
    /// This node's addresses. `None`: Node.status.addresses, and, when running, the devices' own.
    #[serde(deserialize_with = "optional_addresses")]
    pub local_addresses: Option<Vec<IpAddr>>,
    /// Source ports of translated connections.
    pub snat: Snat,
    /// The threads that forward.
    pub workers: Workers,
    /// Devices with a role.
    pub devices: Vec<DeviceConfig>,
    /// Routes besides the kernel's.
    pub routes: Vec<RouteConfig>,
    /// Neighbours besides the kernel's.
    pub neighbors: Vec<NeighborConfig>,
    /// The connection table.
    pub conntrack: Conntrack,
    /// Whether settled flows between pods of this node are handed over to the kernel's programs.
    pub offload: OffloadMode,
    /// Most flows that the kernel may have at once.
    pub offload_max_flows: u32,
    /// After how many packets a UDP flow is handed over that nobody answers.
    pub offload_udp_packets: u8,
    /// Where it is given, this router makes the pods of its node: weir-cni asks it.
    pub cni: Option<Cni>,
    /// What weir says of itself over HTTP.
    pub http: Http,
    /// How weir looks whether what is in force is what it should be.
    pub verify: Verify,
    /// The folder where the objects in force are kept for the next start. `None`: [`RouterConfig::state_folder`].
    pub state: Option<PathBuf>,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: KIND.to_owned(),
            node_name: String::new(),
            manifests: Vec::new(),
            kubernetes: None,
            pod_cidrs: None,
            service_cidrs: Vec::new(),
            service_proxy_name: None,
            masquerade_all: false,
            node_port_addresses: Vec::new(),
            local_addresses: None,
            snat: Snat::default(),
            workers: Workers::default(),
            devices: Vec::new(),
            routes: Vec::new(),
            neighbors: Vec::new(),
            conntrack: Conntrack::default(),
            offload: OffloadMode::Auto,
            offload_max_flows: 65_536,
            offload_udp_packets: 8,
            cni: None,
            http: Http::default(),
            verify: Verify::default(),
            state: None,
        }
    }
}

/// `kubernetes`: how its API server is reached, by one of the first two, and what is written there.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Kubernetes {
    /// A kubeconfig.
    pub kubeconfig: Option<PathBuf>,
    /// As a pod of the cluster, by the account that it runs as.
    pub in_cluster: bool,
    /// The taint of the own Node, by its key, that is taken off once policy is in force.
    pub startup_taint: Option<String>,
    /// The namespace of the Lease by which one node speaks for all.
    pub lease_namespace: String,
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self { kubeconfig: None, in_cluster: false, startup_taint: None, lease_namespace: "kube-system".to_owned() }
    }
}

/// `http`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Http {
    /// Where metrics and probes are answered; `None`: nowhere.
    #[serde(deserialize_with = "listen_address")]
    pub listen: Option<SocketAddr>,
}

impl Default for Http {
    fn default() -> Self {
        Self { listen: Some((Ipv4Addr::LOCALHOST, 9091).into()) }
    }
}

/// `verify`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Verify {
    /// The mean time between two looks that nobody asks for; `None`: there are none.
    #[serde(deserialize_with = "every")]
    pub every: Option<Duration>,
}

impl Default for Verify {
    fn default() -> Self {
        Self { every: Some(Duration::from_secs(6 * 3600)) }
    }
}

/// `cni`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Cni {
    /// The socket where weir-cni asks.
    pub socket: PathBuf,
    /// The folder with what was allocated and made.
    pub state: PathBuf,
    /// Where pods' addresses come from.
    pub ipam: Ipam,
    /// MTU of the pods. `None`: what fits through every uplink, in a tunnel where there may be one.
    pub mtu: Option<u32>,
    /// How long a new pod waits for its object.
    #[serde(deserialize_with = "patience")]
    pub patience: Duration,
    /// For how long an address that a pod gave back is not given to another.
    #[serde(deserialize_with = "cool_down")]
    pub cool_down: Duration,
}

impl Cni {
    /// [`Cni::cool_down`] unless something else is asked for.
    pub const COOL_DOWN: Duration = Duration::from_secs(60);
    /// [`Cni::patience`] unless something else is asked for.
    pub const PATIENCE: Duration = Duration::from_secs(5);
    /// The most that [`Cni::patience`] can be: `weir-cni` waits for the whole ADD, and runtimes wait for it.
    pub const MAX_PATIENCE: Duration = Duration::from_secs(20);
}

impl Default for Cni {
    fn default() -> Self {
        Self {
            socket: "/run/weir/cni.sock".into(),
            state: "/var/lib/weir/cni".into(),
            ipam: Ipam::PodCidr,
            mtu: None,
            patience: Cni::PATIENCE,
            cool_down: Cni::COOL_DOWN,
        }
    }
}

/// Where pods' addresses come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
pub enum Ipam {
    /// This node's Node.spec.podCIDRs.
    #[serde(rename = "podCIDR")]
    PodCidr,
}

/// `snat`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Snat {
    /// First and last source port that weir gives to translated connections.
    #[serde(deserialize_with = "port_range")]
    pub port_range: (u16, u16),
}

impl Default for Snat {
    fn default() -> Self {
        Self { port_range: (10_000, 29_999) }
    }
}

/// `workers`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Workers {
    /// One worker is pinned to each of these cores.
    pub cores: Vec<usize>,
    /// Most packets handled in one turn.
    pub burst: usize,
    /// What an idle worker does.
    pub mode: WorkerMode,
}

impl Default for Workers {
    fn default() -> Self {
        Self { cores: vec![1], burst: MAX_BURST, mode: WorkerMode::Adaptive }
    }
}

/// What an idle worker does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum WorkerMode {
    /// It polls on.
    Busy,
    /// It polls a while, then sleeps until a packet comes.
    Adaptive,
}

/// Whether flows are handed over to the kernel's programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OffloadMode {
    /// Workers carry all packets.
    Off,
    /// What can be handed over is.
    Auto,
}

/// What an uplink must be able to do; otherwise the router does not start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Require {
    /// XDP runs in the driver. Generic mode is never used; without this, packets may be taken at tc.
    Native,
    /// The device writes packets into weir's memory itself.
    ZeroCopy,
}

/// An entry of `devices`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct DeviceConfig {
    /// Its name.
    pub name: String,
    /// Its role.
    #[serde(deserialize_with = "role")]
    pub role: Role,
    /// Its MAC address: read from the kernel, given for replay.
    #[serde(default, deserialize_with = "optional_mac")]
    pub mac: Option<Mac>,
    /// Bytes of the largest IP packet: read from the kernel, given for replay.
    pub mtu: Option<u32>,
    /// Its addresses, which give connected routes: read from the kernel, given for replay.
    #[serde(default, deserialize_with = "cidrs")]
    pub addresses: Vec<IpNet>,
    /// For an uplink: the mode below which the router is not to start.
    #[serde(default)]
    pub require: Option<Require>,
}

/// An entry of `routes`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct RouteConfig {
    /// Destination prefix.
    #[serde(deserialize_with = "network")]
    pub to: IpNet,
    /// Next hop; `None`: the destination is on the link itself.
    #[serde(default, deserialize_with = "optional_address")]
    pub via: Option<IpAddr>,
    /// The device that packets leave by.
    pub device: String,
}

/// An entry of `neighbors`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct NeighborConfig {
    /// Its IP address.
    #[serde(deserialize_with = "address")]
    pub address: IpAddr,
    /// Its MAC address.
    #[serde(deserialize_with = "mac")]
    pub mac: Mac,
    /// The device that it is on.
    pub device: String,
}

/// The fragments of a packet are followed for so long at most: identifications come round.
const MAX_FRAGMENT_SECONDS: u32 = fragments::LIFETIME / Tick::PER_SECOND;

macro_rules! conntrack_settings {
    ($($(#[doc = $doc:literal])+ $field:ident $sysctl:literal,)+) => {
        /// `conntrack`: the size of the connection table and netfilter's settings by their sysctl names, with or
        /// without the prefix `nf_conntrack_` (Linux, Documentation/networking/nf_conntrack-sysctl.rst). Timeouts are
        /// in seconds; `None` is netfilter's default.
        #[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
        #[serde(default)]
        pub struct Conntrack {
            /// Most connections that are tracked at once.
            #[serde(rename = "maxEntries")]
            pub max_entries: usize,
            /// Whether a TCP connection may be picked up mid-stream (towards addresses that no service claims).
            #[serde(alias = "nf_conntrack_tcp_loose", deserialize_with = "switch")]
            pub tcp_loose: bool,
            /// Whether TCP packets outside the window are let through.
            #[serde(alias = "nf_conntrack_tcp_be_liberal", deserialize_with = "switch")]
            pub tcp_be_liberal: bool,
            /// Whether a RST behind what was acknowledged is let through.
            #[serde(alias = "nf_conntrack_tcp_ignore_invalid_rst", deserialize_with = "switch")]
            pub tcp_ignore_invalid_rst: bool,
            /// Seconds for which the fragments of an IPv4 packet are followed (net.ipv4.ipfrag_time, which is netfilter's too).
            #[serde(deserialize_with = "fragment_seconds")]
            pub ipfrag_time: u32,
            /// Seconds for which the fragments of an IPv6 packet are followed.
            #[serde(alias = "nf_conntrack_frag6_timeout", deserialize_with = "fragment_seconds")]
            pub frag6_timeout: u32,
            $($(#[doc = $doc])+ #[serde(alias = $sysctl)] pub $field: Option<u32>,)+
        }

        impl Conntrack {
            /// The settings that are given, by their sysctl names.
            pub fn given(&self) -> Vec<(&'static str, u32)> {
                let all = [$(($sysctl, self.$field),)+];
                all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
            }
        }

        impl Default for Conntrack {
            fn default() -> Self {
                Self {
                    max_entries: 262_144,
                    tcp_loose: true,
                    tcp_be_liberal: false,
                    tcp_ignore_invalid_rst: false,
                    ipfrag_time: MAX_FRAGMENT_SECONDS,
                    frag6_timeout: MAX_FRAGMENT_SECONDS,
                    $($field: None,)+
                }
            }
        }
    };
}

conntrack_settings! {
    /// Protocols without a state machine.
    generic_timeout "nf_conntrack_generic_timeout",
    /// ICMP.
    icmp_timeout "nf_conntrack_icmp_timeout",
    /// ICMPv6.
    icmpv6_timeout "nf_conntrack_icmpv6_timeout",
    /// UDP, seen in one direction.
    udp_timeout "nf_conntrack_udp_timeout",
    /// UDP, seen in both directions.
    udp_timeout_stream "nf_conntrack_udp_timeout_stream",
    /// TCP, a SYN was sent.
    tcp_timeout_syn_sent "nf_conntrack_tcp_timeout_syn_sent",
    /// TCP, a SYN was answered.
    tcp_timeout_syn_recv "nf_conntrack_tcp_timeout_syn_recv",
    /// TCP, established.
    tcp_timeout_established "nf_conntrack_tcp_timeout_established",
    /// TCP, a FIN was sent.
    tcp_timeout_fin_wait "nf_conntrack_tcp_timeout_fin_wait",
    /// TCP, a FIN was answered.
    tcp_timeout_close_wait "nf_conntrack_tcp_timeout_close_wait",
    /// TCP, both sent a FIN.
    tcp_timeout_last_ack "nf_conntrack_tcp_timeout_last_ack",
    /// TCP, closed in order.
    tcp_timeout_time_wait "nf_conntrack_tcp_timeout_time_wait",
    /// TCP, closed by a RST.
    tcp_timeout_close "nf_conntrack_tcp_timeout_close",
    /// TCP, too many retransmissions without an answer.
    tcp_timeout_max_retrans "nf_conntrack_tcp_timeout_max_retrans",
    /// TCP, data that is not acknowledged.
    tcp_timeout_unacknowledged "nf_conntrack_tcp_timeout_unacknowledged",
    /// How many retransmissions without an answer are too many.
    tcp_max_retrans "nf_conntrack_tcp_max_retrans",
    /// SCTP, closed.
    sctp_timeout_closed "nf_conntrack_sctp_timeout_closed",
    /// SCTP, an INIT was answered.
    sctp_timeout_cookie_wait "nf_conntrack_sctp_timeout_cookie_wait",
    /// SCTP, the cookie was sent back.
    sctp_timeout_cookie_echoed "nf_conntrack_sctp_timeout_cookie_echoed",
    /// SCTP, established.
    sctp_timeout_established "nf_conntrack_sctp_timeout_established",
    /// SCTP, a SHUTDOWN was sent.
    sctp_timeout_shutdown_sent "nf_conntrack_sctp_timeout_shutdown_sent",
    /// SCTP, a SHUTDOWN was received.
    sctp_timeout_shutdown_recd "nf_conntrack_sctp_timeout_shutdown_recd",
    /// SCTP, the SHUTDOWN was acknowledged.
    sctp_timeout_shutdown_ack_sent "nf_conntrack_sctp_timeout_shutdown_ack_sent",
    /// SCTP, a HEARTBEAT opened the path.
    sctp_timeout_heartbeat_sent "nf_conntrack_sctp_timeout_heartbeat_sent",
}

const API_VERSION: &str = "weir.dev/v1alpha1";
const KIND: &str = "RouterConfig";
/// Most packets of a burst (the design, "Words").
const MAX_BURST: usize = 64;
/// Longest name of a device: IFNAMSIZ less the final zero.
const MAX_DEVICE_NAME_BYTES: usize = 15;
/// Connections that a table may have at most; the node's own share comes on top.
const MAX_CONNECTIONS: usize = weir_conntrack::MAX_ENTRIES as usize / 2;
/// Flows that the kernel may have at most: 1 GiB.
const MAX_OFFLOADED_FLOWS: u32 = 1 << 22;
/// The smallest MTU that IPv4 allows (RFC 791).
const MIN_MTU: u32 = 68;
/// Longest path of a Unix socket: sockaddr_un's sun_path less the final zero (unix(7)).
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// Beyond a day a cool-down is a mistake of units.
const MAX_COOL_DOWN_SECONDS: u64 = 86_400;

/// How long weir.yaml is waited for while somebody has it open for writing.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

fn read_text(path: &Path) -> Result<String, Unread> {
    let until = Instant::now() + PATIENCE;
    loop {
        let bytes = match file::read(path) {
            Ok((_, bytes)) => bytes,
            Err(Unread::Written) if Instant::now() < until => {
                thread::sleep(PAUSE);
                continue;
            }
            // Who names a pipe on the command line means it.
            Err(Unread::NotRegular(Kind::Fifo)) => {
                let mut bytes = Vec::new();
                File::open(path)?.take(file::MAX_BYTES).read_to_end(&mut bytes)?;
                bytes
            }
            Err(error) => return Err(error),
        };
        return Ok(String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?);
    }
}

impl RouterConfig {
    /// The folder where the objects in force are kept for the next start.
    pub fn state_folder(&self) -> PathBuf {
        // A name is no path.
        self.state.clone().unwrap_or_else(|| Path::new("/var/lib/weir").join(&self.node_name))
    }

    /// Reads weir.yaml. Its text becomes a source of `problems`, and what is wrong is reported there; `None` where it
    /// cannot be read at all. The span is that of each entry of `manifests`.
    pub fn read(path: &Path, problems: &mut Problems) -> Option<(Self, Vec<Span>)> {
        let name = path.display().to_string();
        let file = match read_text(path) {
            Ok(text) => problems.add_source(Source::new(name, text)),
            Err(error) => {
                let file = problems.add_source(Source::new(name, String::new()));
                let help = "give the path of weir.yaml with -c".to_owned();
                problems.error(
                    Span { file, ..Span::default() },
                    format!("cannot read the configuration: {error}"),
                    help,
                );
                return None;
            }
        };
        Self::from_source(file, path.parent().unwrap_or(Path::new("")), problems)
    }

    /// Reads weir.yaml from a source of `problems`; `folder` is what its paths are relative to.
    pub fn from_source(file: u32, folder: &Path, problems: &mut Problems) -> Option<(Self, Vec<Span>)> {
        let errors_before = problems.of(Severity::Error).count();
        let documents = tree::read_documents(file, problems);
        let mut documents = documents.iter();
        let Some(root) = documents.next() else {
            if problems.of(Severity::Error).count() == errors_before {
                let help = "the least is:\nnodeName: NAME\nmanifests: [cluster.yaml]".to_owned();
                problems.error(Span { file, ..Span::default() }, "weir.yaml is empty", help);
            }
            return None;
        };
        for extra in documents {
            problems.error(extra.span, "weir.yaml holds more than one document", "keep the first one only".to_owned());
        }
        let mut config: Self = typed::read(root, "", |_| Severity::Error, problems)?;
        // A value that is left out is as good as no key, but here the key says it.
        if root.entry("cni").is_some_and(|(_, node)| matches!(node.value, Value::Null)) {
            config.cni = Some(Cni::default());
        }
        config.validate(root, problems);
        let entries: Vec<Span> =
            root.get("manifests").map_or(Vec::new(), |list| list.items().map(|entry| entry.span).collect());
        for manifest in &mut config.manifests {
            *manifest = folder.join(&*manifest);
        }
        if let Some(path) = config.kubernetes.as_mut().and_then(|kubernetes| kubernetes.kubeconfig.as_mut()) {
            *path = folder.join(&*path);
        }
        config.state = config.state.map(|state| folder.join(state));
        if let Some(cni) = &mut config.cni {
            cni.socket = folder.join(&cni.socket);
            cni.state = folder.join(&cni.state);
        }
        Some((config, entries))
    }

    fn validate(&self, root: &Node, problems: &mut Problems) {
        let at = |key: &str| root.get(key).map_or(root.span, |node| node.span);
        let items = |key: &str| root.get(key).map_or(Vec::new(), |list| list.items().collect::<Vec<_>>());
        let within = |node: &Node, key: &str| node.get(key).map_or(node.span, |value| value.span);
        if self.api_version != API_VERSION {
            problems.error(
                at("apiVersion"),
                format!("apiVersion {:?} is not known", self.api_version),
                format!("write {API_VERSION}"),
            );
        }
        if self.kind != KIND {
            problems.error(
                at("kind"),
                format!("kind {:?} is not a router's configuration", self.kind),
                format!("write {KIND}"),
            );
        }
        let required = |key: &str| root.entries().iter().all(|(present, _)| present.text != key);
        if self.node_name.is_empty() && (required("nodeName") || root.get("nodeName").is_some()) {
            let help = "add: nodeName: NAME, this node's name in the manifests".to_owned();
            problems.error(at("nodeName"), "nodeName is missing", help);
        } else if self.node_name.contains('/') || self.node_name.contains("..") {
            // Files and folders are named by it.
            let help = "write the name that `kubectl get nodes` shows".to_owned();
            problems.error(at("nodeName"), format!("{:?} is no node's name", self.node_name), help);
        }
        if let Some(Kubernetes { kubeconfig, in_cluster, .. }) = &self.kubernetes
            && kubeconfig.is_some() == *in_cluster
        {
            let help = "write {kubeconfig: PATH} or {inCluster: true}".to_owned();
            problems.error(at("kubernetes"), "kubernetes does not say which API server", help);
        }
        if let Some(Kubernetes { startup_taint, lease_namespace, .. }) = &self.kubernetes {
            // It stands in paths.
            let is_label = |text: &str| {
                !text.is_empty()
                    && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            };
            if !is_label(lease_namespace) {
                let help = "write the name of a namespace, like kube-system".to_owned();
                problems.error(at("kubernetes"), format!("kubernetes.leaseNamespace {lease_namespace:?}"), help);
            }
            if startup_taint.as_ref().is_some_and(|key| key.is_empty() || key.contains([':', '='])) {
                let help = "write the taint's key alone, like example.com/network-not-ready".to_owned();
                problems.error(at("kubernetes"), "kubernetes.startupTaint is no key of a taint", help);
            }
        }
        if required("manifests") && self.kubernetes.is_none() {
            let help = "add: manifests: [cluster.yaml], the files that describe the cluster".to_owned();
            problems.error(root.span, "manifests is missing", help);
        }
        if self.service_proxy_name.as_deref().is_some_and(|name| !is_label_value(name)) {
            let help =
                "write the value that services have in the label service.kubernetes.io/service-proxy-name".to_owned();
            problems.error(at("serviceProxyName"), "serviceProxyName is no value that a label can have", help);
        }
        let workers = root.get("workers").unwrap_or(root);
        if !(1..=MAX_BURST).contains(&self.workers.burst) {
            problems.error(
                within(workers, "burst"),
                format!("workers.burst is {}: a burst is 1 to {MAX_BURST} packets", self.workers.burst),
                None,
            );
        }
        if self.workers.cores.is_empty() && !workers.has_dropped() {
            problems.error(
                within(workers, "cores"),
                "workers.cores is empty",
                "name one core for each worker".to_owned(),
            );
        }
        let cores = workers.get("cores").map_or(Vec::new(), |list| list.items().collect::<Vec<_>>());
        for (index, core) in self.workers.cores.iter().enumerate() {
            if self.workers.cores[..index].contains(core) {
                let span = cores.get(index).map_or(workers.span, |node| node.span);
                let help = "two workers on one core would only take turns".to_owned();
                problems.error(span, format!("core {core} is given twice"), help);
            }
        }
        if !(1..=MAX_OFFLOADED_FLOWS).contains(&self.offload_max_flows) {
            let message = format!(
                "offloadMaxFlows is {}: the kernel may have 1 to {MAX_OFFLOADED_FLOWS} flows, of 256 bytes each and \
                 some 200 more for its keys",
                self.offload_max_flows
            );
            problems.error(at("offloadMaxFlows"), message, "to have none, write offload: off".to_owned());
        }
        if !(1..=MAX_UDP_PACKETS).contains(&self.offload_udp_packets) {
            let message = format!("offloadUdpPackets is {}: 1 to {MAX_UDP_PACKETS} packets", self.offload_udp_packets);
            problems.error(at("offloadUdpPackets"), message, None);
        }
        if self.conntrack.max_entries == 0 {
            let conntrack = root.get("conntrack").unwrap_or(root);
            problems.error(within(conntrack, "maxEntries"), "conntrack.maxEntries is 0: nothing could connect", None);
        }
        if self.conntrack.max_entries > MAX_CONNECTIONS {
            let conntrack = root.get("conntrack").unwrap_or(root);
            let message =
                format!("conntrack.maxEntries is {}: at most {MAX_CONNECTIONS} fit", self.conntrack.max_entries);
            problems.error(within(conntrack, "maxEntries"), message, None);
        }
        for (index, (device, node)) in self.devices.iter().zip(items("devices")).enumerate() {
            let name = &device.name;
            let odd = |byte: u8| byte == b'/' || byte.is_ascii_whitespace();
            if name.is_empty() || name.len() > MAX_DEVICE_NAME_BYTES || name.bytes().any(odd) {
                let help = format!("a device name has 1 to {MAX_DEVICE_NAME_BYTES} bytes without blank and slash");
                problems.error(within(node, "name"), format!("{name:?} cannot be a device's name"), help);
            }
            if self.devices[..index].iter().any(|earlier| earlier.name == *name) {
                problems.error(within(node, "name"), format!("device {name} is given twice"), "keep one".to_owned());
            }
            match device.mtu {
                Some(mtu) if mtu > MAX_MTU => problems.error(
                    within(node, "mtu"),
                    format!("device {name} has an MTU of {mtu}: weir carries at most {MAX_MTU}"),
                    format!("lower it: ip link set {name} mtu {MAX_MTU}"),
                ),
                Some(mtu) if mtu < MIN_MTU => {
                    problems.error(
                        within(node, "mtu"),
                        format!("an MTU of {mtu} is less than IP's least, {MIN_MTU}"),
                        None,
                    );
                }
                _ => {}
            }
        }
        for (net, node) in self.service_cidrs.iter().zip(items("serviceCIDRs")).filter(|(net, _)| net.prefix_len() == 0)
        {
            let help = "write the range that services have addresses of".to_owned();
            problems.error(node.span, format!("serviceCIDRs: {net} is every address, the node's own too"), help);
        }
        if let Some(cni) = &self.cni {
            self.check_cni(cni, root.get("cni").unwrap_or(root), problems);
        }
        for (route, node) in self.routes.iter().zip(items("routes")) {
            if let Some(via) = route.via.filter(|via| via.is_ipv4() != route.to.addr().is_ipv4()) {
                let help = "the next hop must be of the destination's family".to_owned();
                problems.error(within(node, "via"), format!("{via} cannot be the next hop to {}", route.to), help);
            }
            self.check_device_name(&route.device, within(node, "device"), problems);
        }
        for (neighbor, node) in self.neighbors.iter().zip(items("neighbors")) {
            self.check_device_name(&neighbor.device, within(node, "device"), problems);
            if neighbor.mac.is_group() {
                let help = "a neighbour has a MAC address of its own, with an even first byte".to_owned();
                problems.error(within(node, "mac"), format!("{} is a group address", neighbor.mac), help);
            }
        }
    }

    fn check_cni(&self, cni: &Cni, node: &Node, problems: &mut Problems) {
        let within = |key: &str| node.get(key).map_or(node.span, |value| value.span);
        let paths = [("socket", &cni.socket), ("state", &cni.state)];
        for (key, _) in paths.into_iter().filter(|(_, path)| path.as_os_str().is_empty()) {
            problems.error(within(key), format!("cni.{key} is empty"), "leave it out for the default".to_owned());
        }
        if cni.socket.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
            let message = format!("cni.socket is longer than the {MAX_SOCKET_PATH_BYTES} bytes of a socket's path");
            problems.error(within("socket"), message, "choose a shorter one".to_owned());
        }
        if let Some(mtu) = cni.mtu.filter(|mtu| !(MIN_MTU..=MAX_MTU).contains(mtu)) {
            let message = format!("cni.mtu is {mtu}: pods may have {MIN_MTU} to {MAX_MTU}");
            problems.error(within("mtu"), message, "leave it out for what fits through the uplinks".to_owned());
        }
    }

    /// Workload devices need not be listed, and a device may appear later: a warning only.
    fn check_device_name(&self, name: &str, span: Span, problems: &mut Problems) {
        let known = || self.devices.iter().map(|device| device.name.as_str());
        if !self.devices.is_empty() && !name.starts_with("cali") && !known().any(|device| device == name) {
            let help = nearest(name, known()).map(|known| format!("did you mean {known}?"));
            problems.warning(span, format!("no device of this file is called {name}"), help);
        }
    }
}

/// A fault with advice, which [`typed`] takes apart again.
fn advised<E: serde::de::Error>(message: impl std::fmt::Display, help: impl std::fmt::Display) -> E {
    E::custom(format_args!("{message}\n{help}"))
}

struct Address(IpAddr);

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_ip(&text).map(Self).map_err(|error| advised(&error, error.help()))
    }
}

struct Cidr(IpNet);

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_cidr(&text).map(Self).map_err(|error| advised(&error, error.help()))
    }
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IpAddr, D::Error> {
    Ok(Address::deserialize(deserializer)?.0)
}

fn optional_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
    Ok(Some(address(deserializer)?))
}

fn optional_addresses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<IpAddr>>, D::Error> {
    let addresses = Vec::<Address>::deserialize(deserializer)?;
    Ok(Some(addresses.into_iter().map(|address| address.0).collect()))
}

fn cidrs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    Ok(Vec::<Cidr>::deserialize(deserializer)?.into_iter().map(|cidr| cidr.0).collect())
}

fn network<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IpNet, D::Error> {
    Ok(Cidr::deserialize(deserializer)?.0.trunc())
}

fn networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    Ok(cidrs(deserializer)?.into_iter().map(|net| net.trunc()).collect())
}

fn optional_networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<IpNet>>, D::Error> {
    networks(deserializer).map(Some)
}

fn mac<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Mac, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|error| advised(format_args!("{text:?} is not a MAC address"), error))
}

fn optional_mac<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Mac>, D::Error> {
    mac(deserializer).map(Some)
}

fn role<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Role, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Name {
        Uplink,
        Workload,
        Host,
    }
    Ok(match Name::deserialize(deserializer)? {
        Name::Uplink => Role::Uplink,
        Name::Workload => Role::Workload,
        Name::Host => Role::Host,
    })
}

fn port_range<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(u16, u16), D::Error> {
    let text = String::deserialize(deserializer)?;
    let ports = text.split_once('-').and_then(|(first, last)| {
        let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (0 < first && first <= last).then_some((first, last))
    });
    ports.ok_or_else(|| {
        advised(
            format_args!("{text:?} is not a range of ports"),
            "write FIRST-LAST, like 10000-29999, with FIRST from 1 and at most LAST",
        )
    })
}

/// How long a new pod waits for its object. weir-cni waits for the whole ADD, and runtimes wait for it.
fn patience<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    seconds(deserializer, Cni::MAX_PATIENCE.as_secs(), "longer than a runtime waits")
}

/// Where to listen: "ADDRESS:PORT", or "none".
fn listen_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == "none" {
        return Ok(None);
    }
    let address = text.parse().map_err(|_| {
        advised(format_args!("{text:?} is no address with a port"), "write one like 127.0.0.1:9091, or none")
    })?;
    Ok(Some(address))
}

/// For how long an address is not given again.
fn cool_down<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    seconds(deserializer, MAX_COOL_DOWN_SECONDS, "more than a day")
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D, most: u64, excess: &str) -> Result<Duration, D::Error> {
    let seconds = u64::deserialize(deserializer)?;
    if seconds > most {
        return Err(advised(format_args!("{seconds} seconds are {excess}"), format_args!("write 0 to {most}")));
    }
    Ok(Duration::from_secs(seconds))
}

/// "90s", "30m", "6h", or "off".
fn every<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == "off" {
        return Ok(None);
    }
    let units = [('s', 1), ('m', 60), ('h', 3600)];
    let found = units
        .iter()
        .find_map(|(unit, seconds)| text.strip_suffix(*unit)?.parse::<u32>().ok().map(|n| u64::from(n) * seconds));
    match found {
        Some(seconds) if (MIN_VERIFY_SECONDS..=MAX_VERIFY_SECONDS).contains(&seconds) => {
            Ok(Some(Duration::from_secs(seconds)))
        }
        _ => Err(advised(
            format_args!("{text:?} is no time between looks"),
            format_args!("write off, or 1m to 720h, like 6h"),
        )),
    }
}

/// The least and the most time between two verifications.
const MIN_VERIFY_SECONDS: u64 = 60;
const MAX_VERIFY_SECONDS: u64 = 30 * 24 * 3600;

/// A time for which fragments are followed.
fn fragment_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    struct Seconds;

    impl serde::de::Visitor<'_> for Seconds {
        type Value = u32;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "1 to {MAX_FRAGMENT_SECONDS} seconds")
        }

        fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<u32, E> {
            u32::try_from(value)
                .ok()
                .filter(|seconds| (1..=MAX_FRAGMENT_SECONDS).contains(seconds))
                .ok_or_else(|| E::invalid_value(serde::de::Unexpected::Signed(value), &self))
        }
    }
    deserializer.deserialize_any(Seconds)
}

/// A sysctl that is off or on: false or true, 0 or 1.
fn switch<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    struct Switch;

    impl serde::de::Visitor<'_> for Switch {
        type Value = bool;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("0, 1, false or true")
        }

        fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<bool, E> {
            Ok(value)
        }

        fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<bool, E> {
            match value {
                0 => Ok(false),
                1 => Ok(true),
                _ => Err(E::invalid_value(serde::de::Unexpected::Signed(value), &self)),
            }
        }
    }
    deserializer.deserialize_any(Switch)
}

/// Whether a label can have this value, other than none (Kubernetes, "Labels and Selectors": at most 63 letters, digits, "-", "_" and ".").
fn is_label_value(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let ends = text.as_bytes().first().zip(text.as_bytes().last());
    text.len() <= 63
        && text.bytes().all(is_inner)
        && ends.is_some_and(|(first, last)| first.is_ascii_alphanumeric() && last.is_ascii_alphanumeric())
}
