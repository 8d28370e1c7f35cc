//! `hostPort` of this node's pods: frontends on the node's addresses that stand beside services.
//!
//! Where two claim the same address, protocol and port, services come before pods (the table has them in that order, as
//! kube-proxy's rules stand before those of the CNI's portmap), and of two pods one that is not terminating, then the older one.

use std::{
    cell::OnceCell,
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use weir_dataplane::{forwarding::local_workloads, model::Cluster};
use weir_nat::{Endpoint, HostAddresses, Model, ServicePort, Topology};
use weir_packet::Protocol;

use super::{Loaded, LocalPods, cluster::is_workload, services::port_number};
use crate::{
    config::RouterConfig,
    resources::{
        Manifests, Object,
        at::At,
        kubernetes::{Container, Pod, PodSpec},
        meta::Time,
    },
    sockets::Sockets,
    text::{Problems, address::parse_ip},
};

/// A host port that is not served, or not on all its addresses, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unserved {
    /// "namespace/pod".
    pub pod: String,
    /// The protocol.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
    /// Why, as a sentence.
    pub why: String,
}

/// Host ports that pods of this node ask for, those first who keep theirs where there is not room for all.
#[derive(Clone, Debug, Default)]
pub(super) struct HostPorts {
    asked: Vec<Arc<ServicePort>>,
    /// Of those which another has already.
    contested: Vec<Unserved>,
    /// Why the others are not served.
    refused: Vec<(Arc<ServicePort>, Why)>,
}

/// Why a host port is not served at all.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Why {
    /// Its hostIP is none of this node's addresses.
    Elsewhere(IpAddr),
    /// A connected socket of the node has it.
    InUse,
    /// It would leave too little.
    TooMany(&'static str),
}

/// What host ports must leave to the node.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// `snat.portRange`.
    pub snat: (u16, u16),
    /// net.ipv4.ip_local_port_range: from these the kernel gives source ports.
    pub ephemeral: (u16, u16),
    /// Frontends that a family may have on the node's own addresses.
    pub frontends: usize,
}

impl HostPorts {
    /// Puts all into `model`, which has the services only, as if nothing were in their way but each other.
    pub(super) fn serve_all(&self, model: &mut Model) {
        if !self.asked.is_empty() {
            model.services.extend(self.asked.iter().cloned());
        }
    }

    /// Puts into `model`, which has the services only, those that can be served, and keeps why not of the others. `before`: those that are
    /// served already, which a socket that came later does not take the port from. `sockets` is asked once at most, and not if there is no
    /// host port that is new.
    ///
    /// Whoever may create a pod asks for as many as he likes. So they leave half of each range of ports to the node, and there is room for all
    /// that are served.
    fn settle(
        &mut self,
        model: &mut Model,
        room: Room,
        before: &HashSet<(String, Protocol)>,
        sockets: impl FnOnce() -> Sockets,
    ) {
        self.refused.clear();
        if self.asked.is_empty() {
            return;
        }
        let (sockets, mut ask) = (OnceCell::new(), Some(sockets));
        let half = |(first, last): (u16, u16)| (first..=last).len() / 2;
        let ranges = [(room.snat, "snat.portRange"), (room.ephemeral, "net.ipv4.ip_local_port_range")];
        let mut in_range = [BTreeSet::new(), BTreeSet::new()];
        let own_of = |is_ipv6: bool| model.local_addresses.iter().filter(|one| one.is_ipv6() == is_ipv6).count().max(1);
        let node_ports = model.services.iter().filter(|service| service.node_port.is_some()).count();
        let of_services = |is_ipv6: bool| {
            let on_own = |service: &Arc<ServicePort>| {
                let addresses =
                    service.external_ips.iter().chain(&service.load_balancer_ips).chain(&service.cluster_ips);
                addresses.filter(|one| one.is_ipv6() == is_ipv6 && model.is_own(**one)).count()
            };
            node_ports * own_of(is_ipv6) + model.services.iter().map(on_own).sum::<usize>()
        };
        let mut frontends = [of_services(false), of_services(true)];
        let own = [own_of(false), own_of(true)];
        let mut served = Vec::new();
        for asked in &self.asked {
            let on = asked.host_port.expect("a host port");
            if let HostAddresses::One(address) = on
                && !model.is_own(address)
            {
                self.refused.push((Arc::clone(asked), Why::Elsewhere(address)));
                continue;
            }
            let is_within = |(first, last): (u16, u16)| (first..=last).contains(&asked.port);
            let full = ranges.iter().zip(&in_range).find(|((range, _), taken)| {
                is_within(*range) && !taken.contains(&asked.port) && taken.len() >= half(*range)
            });
            let more: [usize; 2] = std::array::from_fn(|family| match on {
                HostAddresses::One(address) => usize::from(usize::from(address.is_ipv6()) == family),
                HostAddresses::All => own[family],
                HostAddresses::Ipv4 => own[family] * (1 - family),
                HostAddresses::Ipv6 => own[family] * family,
            });
            let has_room = (0..2).all(|family| frontends[family] + more[family] <= room.frontends);
            let too_many = match full {
                Some(((_, name), _)) => Some(*name),
                None if !has_room => Some("the programs' map"),
                None => None,
            };
            if let Some(what) = too_many {
                self.refused.push((Arc::clone(asked), Why::TooMany(what)));
                continue;
            }
            for ((range, _), taken) in ranges.iter().zip(&mut in_range) {
                if is_within(*range) {
                    taken.insert(asked.port);
                }
            }
            (0..2).for_each(|family| frontends[family] += more[family]);
            let is_served = before.contains(&(asked.name.clone(), asked.protocol));
            let mut read = || ask.take().map(|ask| ask()).unwrap_or_default();
            if !is_served
                && sockets.get_or_init(&mut read).any(asked.protocol, asked.port, |at| on.includes_socket_at(at))
            {
                self.refused.push((Arc::clone(asked), Why::InUse));
                continue;
            }
            served.push(Arc::clone(asked));
        }
        model.services.extend(served);
    }

    /// Those of which something is not served.
    fn unserved(&self) -> Vec<Unserved> {
        let refused = self.refused.iter().map(|(port, why)| Unserved {
            pod: port.name.split(":hostPort/").next().unwrap_or_default().to_owned(),
            protocol: port.protocol,
            port: port.port,
            why: match why {
                Why::Elsewhere(address) => format!("its hostIP {address} is no address of this node"),
                Why::InUse => {
                    "a connected socket of the node has the port; it is looked at again every 30 s".to_owned()
                }
                Why::TooMany("the programs' map") => "there is no room for more of them on this node".to_owned(),
                Why::TooMany(range) => format!("host ports would have more than half of {range}"),
            },
        });
        self.contested.iter().cloned().chain(refused).collect()
    }
}

impl Loaded {
    /// Settles which host ports are served by what is known of the node now: its addresses, and what its sockets have. Those that are served
    /// `before` keep their ports. Until it is called, all are that are on the node's addresses.
    pub fn settle_host_ports(
        &mut self,
        room: Room,
        before: &HashSet<(String, Protocol)>,
        sockets: impl FnOnce() -> Sockets,
    ) {
        // They are at the end, and nobody who shares the list is bothered where there is none.
        let is_service = |service: &Arc<ServicePort>| service.host_port.is_none();
        let services = self.services.services.iter().rposition(is_service).map_or(0, |last| last + 1);
        if services < self.services.services.len() {
            self.services.services.truncate(services);
        }
        self.host_ports.settle(&mut self.services, room, before, sockets);
    }

    /// The host ports that are served, by name.
    pub fn served_host_ports(&self) -> HashSet<(String, Protocol)> {
        let served = self.services.services.iter().filter(|service| service.host_port.is_some());
        served.map(|service| (service.name.clone(), service.protocol)).collect()
    }

    /// Host ports that are not served, or not on all their addresses.
    pub fn unserved_host_ports(&self) -> Vec<Unserved> {
        self.host_ports.unserved()
    }

    /// Whether a host port that waited for a socket of the node to go need not any more.
    pub fn has_freed_host_ports(&self, sockets: &Sockets) -> bool {
        let mut in_use = self.host_ports.refused.iter().filter(|(_, why)| *why == Why::InUse);
        in_use.any(|(port, _)| {
            let on = port.host_port.expect("a host port");
            !sockets.any(port.protocol, port.port, |at| on.includes_socket_at(at))
        })
    }

    /// The ports that wait for a socket of the node to go.
    pub fn host_ports_in_use(&self) -> impl Iterator<Item = u16> + '_ {
        self.host_ports.refused.iter().filter(|(_, why)| *why == Why::InUse).map(|(port, _)| port.port)
    }
}

/// What a pod asks for.
struct Asked {
    ports: Vec<HostPort>,
    /// Whether it is on its way out.
    terminating: bool,
    created: Option<Time>,
}

/// One port of a container.
struct HostPort {
    /// Its place: the list of containers, the container, the port.
    place: (&'static str, usize, usize),
    protocol: Protocol,
    port: u16,
    container_port: u16,
    host_ip: Option<IpAddr>,
}

impl HostPort {
    fn at<'o>(&self, object: &'o Object<Pod>) -> At<'o> {
        let (list, container, number) = self.place;
        let port = object.at().key("spec").key(list).item(container).key("ports").item(number);
        port.key("hostPort")
    }

    /// Where on the node's addresses.
    fn on(&self) -> HostAddresses {
        HostAddresses::of_host_ip(self.host_ip)
    }

    /// "namespace/pod:hostPort/PORT", with the address in front of the port where it is given: no service port is called so.
    fn name(&self, object: &Object<Pod>) -> String {
        let pod = object.full_name();
        match self.host_ip {
            None => format!("{pod}:hostPort/{}", self.port),
            Some(IpAddr::V4(address)) => format!("{pod}:hostPort/{address}:{}", self.port),
            Some(IpAddr::V6(address)) => format!("{pod}:hostPort/[{address}]:{}", self.port),
        }
    }
}

/// The host ports of this node's pods beside the services of `model`.
pub(super) fn translate(
    config: &RouterConfig,
    manifests: &Manifests,
    local_pods: &LocalPods,
    cluster: &Cluster,
    model: &Model,
    problems: &mut Problems,
) -> HostPorts {
    let addresses: HashMap<&str, &[IpAddr]> =
        local_workloads(cluster).map(|(_, workload)| (workload.name.as_str(), workload.addresses.as_slice())).collect();
    let mut pods = Vec::new();
    for object in manifests.pods() {
        let is_here = |spec: &PodSpec| spec.node_name.as_deref() == Some(config.node_name.as_str());
        if !object.value.spec.as_ref().is_some_and(is_here) || !is_workload(&object.value) {
            continue;
        }
        let name = object.full_name();
        // An earlier pod's of that name asks for nothing any more.
        if local_pods.get(&name).is_some_and(|pod| !pod.is_described_by(&object.value)) {
            continue;
        }
        let asked = object.made(problems, asked);
        // One without an address has nothing to be sent to yet, or any more.
        if let Some(addresses) = addresses.get(name.as_str()).filter(|_| !asked.ports.is_empty()) {
            pods.push((asked, name, *addresses, object));
        }
    }
    pods.sort_by(|(a, a_name, ..), (b, b_name, ..)| {
        (a.terminating, &a.created, a_name).cmp(&(b.terminating, &b.created, b_name))
    });

    let mut host_ports = HostPorts::default();
    if pods.is_empty() {
        return host_ports;
    }
    let mut taken = Taken::of_services(model);
    for (asked, name, addresses, object) in pods {
        for port in &asked.ports {
            let is_failsafe = is_failsafe(port, cluster);
            let why = match taken.by(port) {
                _ if is_failsafe => Some(FAILSAFE.to_owned()),
                other => other.map(|other| format!("{other} has it, and keeps it where both would be open")),
            };
            if let Some(why) = why {
                let message = format!("hostPort {} ({}) is not served: {why}", port.port, port.protocol);
                object.reporter(problems).warning(port.at(object), message, "give it another port".to_owned());
                host_ports.contested.push(Unserved {
                    pod: name.clone(),
                    protocol: port.protocol,
                    port: port.port,
                    why,
                });
            }
            if is_failsafe {
                continue;
            }
            let is_elsewhere = matches!(port.on(), HostAddresses::One(address) if !model.is_own(address));
            if let (true, Some(address)) = (is_elsewhere, port.host_ip) {
                let unless = match config.local_addresses {
                    Some(_) => "weir.yaml does not have it among localAddresses",
                    None => "its Node does not have it; a device of the node may",
                };
                let message = format!(
                    "hostPort {} ({}) is served only on an address of this node, and {address} is none: {unless}",
                    port.port, port.protocol
                );
                object.reporter(problems).warning(
                    port.at(object),
                    message,
                    "leave hostIP out, or take an address of the node".to_owned(),
                );
            }
            taken.add(port, &name, is_elsewhere);
            host_ports.asked.push(Arc::new(ServicePort {
                name: port.name(object),
                protocol: port.protocol,
                port: port.port,
                host_port: Some(port.on()),
                endpoints: addresses.iter().map(|address| endpoint(*address, port.container_port, config)).collect(),
                origin: object.origin,
                ..ServicePort::default()
            }));
        }
    }
    host_ports
}

fn endpoint(address: IpAddr, port: u16, config: &RouterConfig) -> Endpoint {
    Endpoint {
        address,
        port,
        ready: true,
        serving: true,
        terminating: false,
        topology: Some(Arc::new(Topology::on(config.node_name.as_str()))),
    }
}

const FAILSAFE: &str =
    "it is a failsafe port, which stays the node's own (FelixConfiguration, failsafeInboundHostPorts)";

/// Failsafe ports of the node's own addresses are its kernel's, whoever asks.
fn is_failsafe(port: &HostPort, cluster: &Cluster) -> bool {
    let failsafes = cluster.host_settings.failsafe_inbound.iter().filter(|failsafe| failsafe.net.is_none());
    failsafes.map(|failsafe| (failsafe.protocol, failsafe.port)).any(|failsafe| failsafe == (port.protocol, port.port))
}

/// Who has which ports of the node already.
#[derive(Default)]
struct Taken {
    by: HashMap<(Protocol, u16), Vec<Claim>>,
}

struct Claim {
    on: HostAddresses,
    /// The address is none of this node's, as far as is known: only who names it meets it.
    is_elsewhere: bool,
    owner: String,
}

impl Claim {
    fn meets(&self, on: HostAddresses) -> bool {
        if self.is_elsewhere { self.on == on } else { self.on.overlaps(on) }
    }
}

impl Taken {
    fn of_services(model: &Model) -> Self {
        let mut taken = Self::default();
        for service in &model.services {
            let mut add = |port: u16, on: HostAddresses, is_elsewhere: bool| {
                let claim = Claim { on, is_elsewhere, owner: format!("service {}", service.name) };
                taken.by.entry((service.protocol, port)).or_default().push(claim);
            };
            for address in service.external_ips.iter().chain(&service.load_balancer_ips).chain(&service.cluster_ips) {
                add(service.port, HostAddresses::One(*address), !model.local_addresses.contains(address));
            }
            for is_ipv6 in [false, true] {
                let Some(node_port) = service.node_port else { continue };
                if service.cluster_ips.iter().any(|address| address.is_ipv6() == is_ipv6) {
                    add(node_port, if is_ipv6 { HostAddresses::Ipv6 } else { HostAddresses::Ipv4 }, false);
                }
            }
        }
        taken
    }

    fn by(&self, port: &HostPort) -> Option<&str> {
        let claims = self.by.get(&(port.protocol, port.port))?;
        claims.iter().find(|claim| claim.meets(port.on())).map(|claim| claim.owner.as_str())
    }

    fn add(&mut self, port: &HostPort, pod: &str, is_elsewhere: bool) {
        let claim = Claim { on: port.on(), is_elsewhere, owner: format!("pod {pod}") };
        self.by.entry((port.protocol, port.port)).or_default().push(claim);
    }
}

fn asked(object: &Object<Pod>, problems: &mut Problems) -> Asked {
    let metadata = &object.value.metadata;
    let mut asked = Asked {
        ports: Vec::new(),
        terminating: metadata.deletion_timestamp.is_some(),
        created: metadata.creation_timestamp,
    };
    let Some(spec) = &object.value.spec else { return asked };
    let mut report = object.reporter(problems);
    // Init containers that go on running (sidecars) serve too.
    let is_sidecar = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let containers = spec.containers.iter().enumerate().map(|(index, container)| ("containers", index, container));
    let init = spec.init_containers.iter().enumerate().filter(|(_, container)| is_sidecar(container));
    for (list, index, container) in containers.chain(init.map(|(index, one)| ("initContainers", index, one))) {
        for (number, port) in container.ports.iter().enumerate() {
            let at = object.at().key("spec").key(list).item(index).key("ports").item(number);
            let field = format!("spec.{list}[{index}].ports[{number}]");
            let Some(host_port) = port.host_port.filter(|port| *port != 0) else { continue };
            let host_port = port_number(host_port, at.key("hostPort"), &format!("{field}.hostPort"), &mut report);
            let host_ip = match port.host_ip.as_deref().filter(|text| !text.is_empty()) {
                None => Some(None),
                Some(text) => report.read(at.key("hostIP"), &format!("{field}.hostIP"), parse_ip(text)).map(Some),
            };
            // What is wrong with these is told where policy reads the ports.
            let protocol = Protocol::from_name(port.protocol.as_deref().unwrap_or("TCP")).filter(|p| p.has_ports());
            let container_port = u16::try_from(port.container_port).ok().filter(|port| *port != 0);
            if let (Some(port), Some(host_ip), Some(protocol), Some(container_port)) =
                (host_port, host_ip, protocol, container_port)
            {
                let place = (list, index, number);
                asked.ports.push(HostPort { place, protocol, port, container_port, host_ip });
            }
        }
    }
    asked
}
