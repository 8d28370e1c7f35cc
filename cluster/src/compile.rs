//! From loaded configuration to the tables of a snapshot; the same for check, trace, replay and run.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use rand_chacha::{ChaCha8Rng, rand_core::Rng};
use weir_conntrack::{Table, TableConfig, TcpSettings, Timeouts};
use weir_dataplane::{
    forwarding::{Forwarding, TooManyNextHops},
    frame::IfIndex,
    model::{Device, Links, Neighbor, Role, Route},
    snapshot::{Rules, Snapshot},
    tables::{Tables, capacity_with_share},
};
use weir_nat::{CompileError as ServicesError, Compiler as ServicesCompiler, NoSnatPorts, SnatPorts};
use weir_packet::Tick;
use weir_policy::{CompileError as PolicyError, Compiler as PolicyCompiler};
use weir_sync::Domain;

use crate::{
    config::{Conntrack, RouterConfig},
    sockets::Listening,
    translate::Loaded,
};

/// Why tables could not be compiled: a size beyond what weir can number, always with what and how many.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// Services.
    #[error("services: {0}")]
    Services(#[from] ServicesError),
    /// Policy.
    #[error("policy: {0}")]
    Policy(#[from] PolicyError),
    /// Source ports.
    #[error("{0}")]
    Snat(#[from] NoSnatPorts),
    /// Forwarding.
    #[error("forwarding: {0}")]
    Forwarding(#[from] TooManyNextHops),
}

/// What compiles one configuration after another, and takes over what did not change.
#[derive(Debug, Default)]
pub struct Compilers {
    services: ServicesCompiler,
    policy: PolicyCompiler,
}

impl Compilers {
    /// Compiles services and policy.
    ///
    /// # Errors
    /// Where a size is beyond what can be compiled.
    pub fn rules(&mut self, loaded: &Loaded) -> Result<Rules, CompileError> {
        let services = self.services.compile(&loaded.services)?;
        let policy = self.policy.compile(&loaded.policy)?;
        Ok(Rules::new(services, policy, &loaded.cluster))
    }
}

/// Compiles everything without a running router's kernel, as far as weir.yaml gives its devices and routes: what `weir check` and `weir trace`
/// go by.
///
/// # Errors
/// Where a size is beyond what can be compiled.
pub fn snapshot(loaded: &Loaded) -> Result<Snapshot, CompileError> {
    let rules = Compilers::default().rules(loaded)?;
    let snat = snat_ports(loaded, &rules, &Listening::default())?;
    let forwarding = Forwarding::compile(&loaded.cluster, &links_of(&loaded.config))?;
    Ok(Snapshot { generation: 1, rules: Arc::new(rules), snat: Arc::new(snat), forwarding: Arc::new(forwarding) })
}

/// The ports that translated connections may have: `snat.portRange` without node ports, health-check node ports, and those that the node
/// listens on.
///
/// # Errors
/// Where none is left.
pub fn snat_ports(loaded: &Loaded, rules: &Rules, listening: &Listening) -> Result<SnatPorts, CompileError> {
    let (first, last) = loaded.config.snat.port_range;
    let node_ports = rules.services.node_ports().map(|(_, port)| port);
    let health_checks = loaded.services.services.iter().filter_map(|service| service.health_check_node_port);
    Ok(SnatPorts::new(first..=last, node_ports.chain(health_checks).chain(listening.ports()))?)
}

/// The devices, routes and neighbours that weir.yaml gives: all that replay has, and what trace knows of them.
pub fn links_of(config: &RouterConfig) -> Links {
    // Made-up indices; 0 is the host's, whether it is named or not.
    let index_of = |name: &str| {
        let position = config.devices.iter().position(|d| d.name == name)?;
        let is_host = config.devices[position].role == Role::Host;
        Some(if is_host { IfIndex::HOST } else { IfIndex(position as u32 + 1) })
    };
    let devices = config.devices.iter().map(|device| Device {
        name: device.name.clone(),
        index: index_of(&device.name).expect("its own name"),
        role: device.role,
        mac: device.mac.unwrap_or_default(),
        mtu: device.mtu.unwrap_or(1500),
        addresses: device.addresses.clone(),
    });
    let routes = config
        .routes
        .iter()
        .filter_map(|route| Some(Route { to: route.to, via: route.via, device: index_of(&route.device)?, metric: 0 }));
    let neighbors = config.neighbors.iter().filter_map(|neighbor| {
        Some(Neighbor { address: neighbor.address, mac: neighbor.mac, device: index_of(&neighbor.device)? })
    });
    Links {
        devices: devices.collect(),
        routes: routes.collect(),
        neighbors: neighbors.collect(),
        loopback_sources: Vec::new(),
        complete: false,
        listening: BTreeSet::new(),
        multipaths: Vec::new(),
        refused: Vec::new(),
    }
}

/// The one among the numbers of weir.yaml's `conntrack` that is no timeout.
const MAX_RETRANSMISSIONS: &str = "nf_conntrack_tcp_max_retrans";

/// The connection timeouts of weir.yaml over netfilter's defaults.
fn timeouts(settings: &Conntrack) -> Timeouts {
    let mut timeouts = Timeouts::default();
    for (sysctl, seconds) in settings.given().into_iter().filter(|(sysctl, _)| *sysctl != MAX_RETRANSMISSIONS) {
        timeouts.set(sysctl, seconds).expect("weir.yaml has the table's timeouts");
    }
    timeouts
}

/// For how many ticks workers follow the fragments of a packet: IPv4, IPv6.
pub fn fragment_lifetimes(settings: &Conntrack) -> [u32; 2] {
    [settings.ipfrag_time, settings.frag6_timeout].map(|seconds| seconds * Tick::PER_SECOND)
}

/// The TCP settings of weir.yaml over netfilter's defaults.
fn tcp_settings(settings: &Conntrack) -> TcpSettings {
    let TcpSettings { max_retransmissions, .. } = TcpSettings::default();
    let given = settings.tcp_max_retrans.map(|times| u8::try_from(times).unwrap_or(u8::MAX));
    TcpSettings {
        be_liberal: settings.tcp_be_liberal,
        ignore_invalid_rst: settings.tcp_ignore_invalid_rst,
        max_retransmissions: given.unwrap_or(max_retransmissions),
    }
}

/// How a connection table is made; its hash is keyed from `random`.
pub fn table_config(settings: &Conntrack, random: &mut ChaCha8Rng) -> TableConfig {
    TableConfig {
        max_entries: capacity_with_share(u32::try_from(settings.max_entries).unwrap_or(u32::MAX)),
        seed: [random.next_u64(), random.next_u64()],
        timeouts: timeouts(settings),
        tcp: tcp_settings(settings),
    }
}

/// Makes the connection tables of both families, in memory.
pub fn tables(settings: &Conntrack, domain: &Arc<Domain>, random: &mut ChaCha8Rng) -> Tables {
    let v4 = Table::new(table_config(settings, random), domain.clone());
    Tables { v4, v6: Table::new(table_config(settings, random), domain.clone()) }
}

/// "address:port", with brackets around an IPv6 address.
pub fn address_port(address: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}
