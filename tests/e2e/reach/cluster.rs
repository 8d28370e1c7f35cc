//! Two nodes, those who ask, what is asked, and who answers.

use serde_json::json;

use crate::{
    kernel::family::Family,
    manifests::Manifests,
    site::{Echo, Site, two_nodes},
};

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Who {
    PodHere,
    PodThere,
    /// A process of the node, as a hostNetwork pod's are.
    Node,
    /// The same of the other node.
    NodeThere,
    /// By the uplink.
    Outside,
    /// By a device of node-a that is no uplink.
    Behind,
    /// The pod that is the backend of services here.
    Itself,
}

impl Who {
    pub const ALL: [Self; 7] =
        [Self::PodHere, Self::PodThere, Self::Node, Self::NodeThere, Self::Outside, Self::Behind, Self::Itself];

    pub fn namespace(self) -> &'static str {
        match self {
            Self::PodHere => "default/client-a",
            Self::PodThere => "default/client-b",
            Self::Node => "node-a",
            Self::NodeThere => "node-b",
            Self::Outside => "client",
            Self::Behind => "behind",
            Self::Itself => Backend::PodHere.namespace(),
        }
    }

    pub fn address(self) -> &'static str {
        match self {
            Self::PodHere => "10.1.1.10",
            Self::PodThere => "10.1.2.10",
            Self::Node => NODE_A,
            Self::NodeThere => NODE_B,
            Self::Outside => OUTSIDE,
            Self::Behind => BEHIND,
            Self::Itself => Backend::PodHere.address(),
        }
    }

    /// The node that sees its packets for a service first.
    pub fn asks(self) -> &'static str {
        match self {
            Self::PodThere | Self::NodeThere => "node-b",
            _ => "node-a",
        }
    }

    /// Whether he gets any backend where policy is Local and he asks an address of that node: its pods and itself. Pods of other nodes do too,
    /// but their answers miss the node, so that nothing comes of it.
    pub fn has_short_cut(self, asked: &str) -> bool {
        match self {
            Self::PodHere | Self::Itself | Self::Node => asked == "node-a",
            Self::PodThere | Self::NodeThere => asked == "node-b",
            Self::Outside | Self::Behind => false,
        }
    }
}

/// What is asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum What {
    ClusterIp,
    NodePortHere,
    NodePortThere,
    /// A node port at the address of a device that is no uplink.
    NodePortBehind,
    LoadBalancer,
    External,
    /// An external IP that is an address of node-a.
    ExternalOwn,
    HostPort,
    /// The backend's own address.
    Pod,
}

/// Who answers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Backend {
    PodHere,
    PodThere,
    NodeHere,
    NodeThere,
}

impl Backend {
    pub const ALL: [Self; 4] = [Self::PodHere, Self::PodThere, Self::NodeHere, Self::NodeThere];

    pub fn namespace(self) -> &'static str {
        match self {
            Self::PodHere => "default/server-a",
            Self::PodThere => "default/server-b",
            Self::NodeHere => "node-a",
            Self::NodeThere => "node-b",
        }
    }

    pub fn node(self) -> &'static str {
        match self {
            Self::PodHere | Self::NodeHere => "node-a",
            Self::PodThere | Self::NodeThere => "node-b",
        }
    }

    pub fn address(self) -> &'static str {
        match self {
            Self::PodHere => "10.1.1.20",
            Self::PodThere => "10.1.2.20",
            Self::NodeHere => NODE_A,
            Self::NodeThere => NODE_B,
        }
    }

    pub fn is_pod(self) -> bool {
        matches!(self, Self::PodHere | Self::PodThere)
    }
}

pub const NODE_A: &str = "192.168.10.1";
pub const NODE_B: &str = "192.168.10.2";
/// The address of node-a's device that is no uplink, and who is behind it.
pub const GATEWAY: &str = "10.8.0.1";
const OUTSIDE: &str = crate::site::CLIENT;
const BEHIND: &str = "10.8.0.2";
const CLUSTER_IP: &str = "10.96.0.";
const LOAD_BALANCER: &str = "203.0.113.1";
const EXTERNAL: &str = "198.51.100.1";
/// Where servers listen.
pub const SERVED: u16 = 8080;
/// The host port of pods.
pub const HOST_PORT: u16 = 7001;

/// Who has an address.
pub fn name_of(address: &str) -> String {
    match address {
        "10.1.1.10" => "client-a",
        "10.1.2.10" => "client-b",
        "10.1.1.20" => "server-a",
        "10.1.2.20" => "server-b",
        // Which of its addresses the kernel masquerades with where a device has none is chance.
        NODE_A | GATEWAY => "node-a",
        NODE_B => "node-b",
        BEHIND => "behind",
        OUTSIDE => "client",
        "169.254.119.1" | "fd77:6569:7200:119::1" => "weir",
        other => other,
    }
    .to_owned()
}

/// The number of a service.
fn number(backend: Backend, is_local: bool) -> u16 {
    1 + backend as u16 * 2 + u16::from(is_local)
}

/// What there is to ask, with its backend, and whether traffic policies are Local.
pub fn rows() -> Vec<(What, Backend, bool)> {
    const ALL: [What; 9] = [
        What::ClusterIp,
        What::NodePortHere,
        What::NodePortThere,
        What::NodePortBehind,
        What::LoadBalancer,
        What::External,
        What::ExternalOwn,
        What::HostPort,
        What::Pod,
    ];
    let of_what = |what: What| {
        let backends = Backend::ALL.into_iter().filter(move |backend| what != What::HostPort || backend.is_pod());
        backends.flat_map(move |backend| [false, true].map(|is_local| (what, backend, is_local)))
    };
    // Where no service is asked, there is no policy of one.
    let has_policy = |what: What| !matches!(what, What::HostPort | What::Pod);
    ALL.into_iter().flat_map(of_what).filter(|(what, _, is_local)| !is_local || has_policy(*what)).collect()
}

/// Address and port of what is asked.
pub fn address(what: What, backend: Backend, is_local: bool) -> (&'static str, u16) {
    const CLUSTER_IPS: [&str; 8] =
        ["10.96.0.1", "10.96.0.2", "10.96.0.3", "10.96.0.4", "10.96.0.5", "10.96.0.6", "10.96.0.7", "10.96.0.8"];
    let number = number(backend, is_local);
    match what {
        What::ClusterIp => (CLUSTER_IPS[usize::from(number) - 1], 8000 + number),
        What::NodePortHere => (NODE_A, 31600 + number),
        What::NodePortThere => (NODE_B, 31600 + number),
        What::NodePortBehind => (GATEWAY, 31600 + number),
        What::LoadBalancer => (LOAD_BALANCER, 8000 + number),
        What::External => (EXTERNAL, 8000 + number),
        What::ExternalOwn => (NODE_A, 8000 + number),
        What::HostPort if backend.node() == "node-a" => (NODE_A, HOST_PORT),
        What::HostPort => (NODE_B, HOST_PORT),
        What::Pod => (backend.address(), SERVED),
    }
}

fn service(manifests: &mut Manifests, backend: Backend, is_local: bool) {
    const PROTOCOLS: [&str; 2] = ["TCP", "UDP"];
    let number = number(backend, is_local);
    let name = format!("service-{number}");
    let policy = if is_local { "Local" } else { "Cluster" };
    let both = |address: &str| [Family::V4, Family::V6].map(|family| family.address(address));
    let addresses = both(&format!("{CLUSTER_IP}{number}"));
    let external = [both(EXTERNAL), both(NODE_A)].concat();
    let metadata = json!({"namespace": "default", "name": name});
    manifests.add(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {
            "type": "LoadBalancer", "clusterIP": addresses[0], "clusterIPs": addresses, "ipFamilyPolicy": "RequireDualStack",
            "internalTrafficPolicy": policy, "externalTrafficPolicy": policy,
            "externalIPs": external,
            "ports": PROTOCOLS.map(|protocol| json!({
                "name": protocol, "protocol": protocol, "port": 8000 + number, "targetPort": SERVED, "nodePort": 31600 + number,
            })),
        },
        "status": {"loadBalancer": {"ingress": both(LOAD_BALANCER).map(|ip| json!({"ip": ip}))}},
    }));
    for (family, kind) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
        manifests.add(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": kind,
            "metadata": {
                "namespace": "default", "name": format!("{name}-{}", kind.to_lowercase()),
                "labels": {"kubernetes.io/service-name": name},
            },
            "endpoints": [{
                "addresses": [family.address(backend.address())], "nodeName": backend.node(), "conditions": {"ready": true},
            }],
            "ports": PROTOCOLS.map(|protocol| json!({"name": protocol, "protocol": protocol, "port": SERVED})),
        }));
    }
}

/// The objects. No pool: what the kernel does with pods' sources outside of services is its operator's business.
fn manifests() -> Manifests {
    let both = |address: &str| [Family::V4, Family::V6].map(|family| family.address(address));
    let mut all = Manifests::default();
    for (node, address, number) in [("node-a", NODE_A, 1), ("node-b", NODE_B, 2)] {
        let nets = [format!("10.1.{number}.0/24"), format!("fd00:1:{number}::/64")];
        all.node(node, &both(address).each_ref().map(String::as_str), &nets.each_ref().map(String::as_str));
    }
    all.namespace("default");
    for (node, pod, address) in [
        ("node-a", Who::PodHere.namespace(), Who::PodHere.address()),
        ("node-b", Who::PodThere.namespace(), Who::PodThere.address()),
        ("node-a", Backend::PodHere.namespace(), Backend::PodHere.address()),
        ("node-b", Backend::PodThere.namespace(), Backend::PodThere.address()),
    ] {
        all.pod(node, pod, "any", &both(address).each_ref().map(String::as_str));
        if pod.contains("server") {
            all.host_port("", "TCP", HOST_PORT, SERVED);
            all.host_port("", "UDP", HOST_PORT, SERVED);
        }
    }
    for (node, address) in [("node-a", NODE_A), ("node-b", NODE_B)] {
        all.pod(node, &format!("default/of-{node}"), "any", &both(address).each_ref().map(String::as_str));
        all.host_network();
    }
    for backend in Backend::ALL {
        for is_local in [false, true] {
            service(&mut all, backend, is_local);
        }
    }
    all
}

/// The site, and what answers datagrams in it for as long as it is kept.
pub fn site() -> (Site, Vec<Echo>) {
    let mut site = Site::build(&two_nodes(), &manifests().text(), "");
    for node in ["node-a", "node-b"] {
        for setting in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
            site.lab.run_in(node, &["sysctl", "-qw", setting]).unwrap();
        }
    }
    site.lab.add_namespace("behind").unwrap();
    let namespace = site.lab.namespace_name("behind");
    site.lab.ip("node-a", &format!("link add third0 type veth peer name eth0 netns {namespace}")).unwrap();
    site.lab.ip("node-a", "link set third0 up").unwrap();
    site.lab.ip("behind", "link set eth0 up").unwrap();
    for (family, length, nodad) in [(Family::V4, 24, ""), (Family::V6, 64, " nodad")] {
        let of = |address: &str| family.address(address);
        site.lab.ip("node-a", &format!("address add {}/{length} dev third0{nodad}", of(GATEWAY))).unwrap();
        site.lab.ip("behind", &format!("address add {}/{length} dev eth0{nodad}", of(BEHIND))).unwrap();
        site.lab.ip("behind", &format!("route add default via {}", of(GATEWAY))).unwrap();
        // As on a real node, what nobody else claims has a way to go.
        for node in ["node-a", "node-b"] {
            site.lab.ip(node, &format!("route add default via {}", of(OUTSIDE))).unwrap();
        }
        site.lab.ip("node-b", &format!("route add {} via {}", family.net("10.8.0.0"), of(NODE_A))).unwrap();
        for (net, node) in [
            ("10.1.1.0", NODE_A),
            ("10.1.2.0", NODE_B),
            ("10.8.0.0", NODE_A),
            ("10.96.0.0", NODE_A),
            ("198.51.100.0", NODE_A),
            ("203.0.113.0", NODE_A),
        ] {
            site.lab.ip("client", &format!("route add {} via {}", family.net(net), of(node))).unwrap();
        }
    }
    let mut echoes = Vec::new();
    for backend in Backend::ALL {
        site.serve(backend.namespace(), &[SERVED]);
        for family in [Family::V4, Family::V6] {
            let address = family.socket(backend.address(), SERVED).to_string();
            echoes.push(Echo::answering(&site, backend.namespace(), &address, move |_, from| {
                format!("{} {}\n", backend.namespace(), from.ip()).into_bytes()
            }));
        }
    }
    (site, echoes)
}
