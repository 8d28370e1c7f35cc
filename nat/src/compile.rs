//! From the model to the table.

use std::{cmp::Reverse, net::IpAddr, sync::Arc};

use hashbrown::{HashMap, hash_map::Entry};
use thiserror::Error;
use weir_packet::{Address, Protocol};

use crate::{
    Endpoint, HostAddresses, Model, ServicePort,
    listed::Listed,
    ranges::{self, AddressRange},
    table::{
        Backend, Claim, Conflict, Frontend, Kind, Names, Ports, Record, ServiceId, ServiceTable, Services, Target,
    },
};

/// Why a model cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CompileError {
    /// Only protocols with ports can be services.
    #[error("service port {service}: protocol {protocol} has no ports; use TCP, UDP or SCTP")]
    NotAServiceProtocol {
        /// [`ServicePort::name`].
        service: String,
        /// Its protocol.
        protocol: Protocol,
        /// [`ServicePort::origin`].
        origin: u32,
    },
    /// Ports are 1 to 65535.
    #[error("service port {service}: {what} is 0; give it a number from 1 to 65535")]
    ZeroPort {
        /// [`ServicePort::name`].
        service: String,
        /// Which number it is.
        what: &'static str,
        /// [`ServicePort::origin`].
        origin: u32,
    },
    /// The table's numbers have 32 bits.
    #[error("{count} {what} are more than the service table can number ({limit}); serve fewer")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        limit: usize,
    },
}

impl ServiceTable {
    /// Compiles `model`. The same model always gives the same decisions.
    ///
    /// # Errors
    /// Where a service port is impossible, or there are more than the table can number.
    pub fn compile(model: &Model) -> Result<Self, CompileError> {
        check(model)?;
        let mut node_ports = Vec::new();
        let mut own_frontends = Vec::new();
        let mut conflicts = Vec::new();
        let v4 = compile_family(model, &mut node_ports, &mut own_frontends, &mut conflicts);
        let v6 = compile_family(model, &mut node_ports, &mut own_frontends, &mut conflicts);
        node_ports.sort_unstable();
        node_ports.dedup();
        own_frontends.sort_unstable();
        let ports = Ports {
            names: Names::new(model.services.iter().map(|service| service.name.as_str())),
            origins: model.services.iter().map(|service| service.origin).collect(),
            node_ports: node_ports.into_boxed_slice(),
            own_frontends: own_frontends.into_boxed_slice(),
            conflicts: conflicts.into_boxed_slice(),
        };
        Ok(Self { v4, v6, ports: Arc::new(ports) })
    }
}

fn check(model: &Model) -> Result<(), CompileError> {
    let limit =
        |what, count, limit| if count > limit { Err(CompileError::TooMany { what, count, limit }) } else { Ok(()) };
    limit("service ports", model.services.len(), Target::MAX_RECORDS)?;
    limit("endpoints", model.services.iter().map(|service| service.endpoints.len()).sum(), u32::MAX as usize)?;
    let guards = |service: &Arc<ServicePort>| service.source_ranges.len() + service.load_balancer_ips.len();
    limit("load balancer source ranges", model.services.iter().map(guards).sum(), u32::MAX as usize)?;
    model.services.iter().try_for_each(|service| check_port(service))
}

/// Whether a service port is possible.
pub(crate) fn check_port(service: &ServicePort) -> Result<(), CompileError> {
    let (name, origin) = (&service.name, service.origin);
    if !service.protocol.has_ports() {
        let protocol = service.protocol;
        return Err(CompileError::NotAServiceProtocol { service: name.clone(), protocol, origin });
    }
    for (what, zero) in [
        ("port", service.port == 0),
        ("nodePort", service.node_port == Some(0)),
        ("the port of an endpoint", service.endpoints.iter().any(|endpoint| endpoint.port == 0)),
    ] {
        if zero {
            return Err(CompileError::ZeroPort { service: name.clone(), what, origin });
        }
    }
    Ok(())
}

/// The addresses of family `A` among `addresses`.
fn of_family<A: Address>(addresses: &[IpAddr]) -> impl Iterator<Item = A> + '_ {
    addresses.iter().filter_map(|&address| A::from_ip(address))
}

fn compile_family<A: Address>(
    model: &Model,
    node_ports: &mut Vec<(Protocol, u16)>,
    own_frontends: &mut Vec<(IpAddr, Protocol, u16)>,
    conflicts: &mut Vec<Conflict>,
) -> Services<A> {
    let mut locals = of_family(&model.local_addresses).map(AddressRange::of_address).collect();
    ranges::normalize(&mut locals);
    let served: Vec<(ServiceId, &ServicePort)> = (0..)
        .map(ServiceId)
        .zip(model.services.iter().map(|service| &**service))
        .filter(|(_, service)| service.serves(A::BITS == 128))
        .collect();

    let mut backends = Vec::with_capacity(served.iter().map(|(_, service)| service.endpoints.len()).sum());
    let mut guards = Vec::new();
    let mut scratch = Scratch::default();
    let records = served
        .iter()
        .map(|&(id, service)| Record {
            identity: hash_of_service(service),
            service: id,
            segments: scratch.lay_out(model, service, &mut backends),
            guard: add_guard(model, service, &mut guards),
            affinity: service.affinity,
            internal_policy: service.internal_policy,
            external_policy: service.external_policy,
        })
        .collect();

    let frontends = Frontends::compile(model, &served, &locals, node_ports, own_frontends, conflicts);
    Services {
        frontends: frontends.frontends,
        addresses: frontends.addresses,
        records,
        backends: backends.into_boxed_slice(),
        guards: guards.into_boxed_slice(),
        listed: listed(model),
        pods: ranges::of_networks(&model.pod_cidrs),
        locals: locals.into_boxed_slice(),
        service_ranges: ranges::of_networks(&model.service_cidrs),
        masquerade_all: model.masquerade_all,
    }
}

/// All that is listed for TCP and SCTP.
fn listed<A: Address>(model: &Model) -> Listed<A> {
    let keep = || model.services.iter().filter(|service| service.protocol != Protocol::UDP);
    let count = keep().map(|service| service.endpoints.len()).sum::<usize>() + model.unserved.len();
    let mut listed = Listed::with_capacity(count);
    let of_services = keep().flat_map(|service| places_of(service));
    of_services.chain(model.unserved.iter().filter_map(place_of)).for_each(|place| listed.add(place));
    listed.shrink_to_fit();
    listed
}

/// What a service port lists for TCP and SCTP.
pub(crate) fn places_of<A: Address>(service: &ServicePort) -> impl Iterator<Item = Frontend<A>> + '_ {
    let places = service.endpoints.iter().map(|endpoint| (service.protocol, endpoint.address, endpoint.port));
    places.filter_map(|place| place_of(&place))
}

/// A backend of TCP and SCTP of this family.
pub(crate) fn place_of<A: Address>(&(protocol, address, port): &(Protocol, IpAddr, u16)) -> Option<Frontend<A>> {
    Some(Frontend { address: A::from_ip(address)?, port, protocol }).filter(|_| protocol != Protocol::UDP)
}

/// Appends the sources that may use the service's load balancer IPs; an empty run means all.
fn add_guard<A: Address>(model: &Model, service: &ServicePort, guards: &mut Vec<AddressRange<A>>) -> [u32; 2] {
    let start = guards.len() as u32;
    let mut allowed: Vec<_> = service.source_ranges.iter().filter_map(AddressRange::of_network).collect();
    if !allowed.is_empty() {
        ranges::normalize(&mut allowed);
        // A load balancer IP is often a local address too: what the node then sends to it has it as its source.
        let node = of_family(&model.local_addresses).next();
        if node.is_some_and(|node: A| ranges::contains(&allowed, node)) {
            allowed.extend(of_family(&service.load_balancer_ips).map(AddressRange::of_address));
            ranges::normalize(&mut allowed);
        }
        guards.append(&mut allowed);
    }
    [start, guards.len() as u32]
}

/// The two maps of a family, while they are built.
struct Frontends<'a, A> {
    frontends: HashMap<Frontend<A>, Target>,
    addresses: HashMap<A, Claim>,
    served: &'a [(ServiceId, &'a ServicePort)],
    locals: &'a [AddressRange<A>],
    node_ports: &'a mut Vec<(Protocol, u16)>,
    own_frontends: &'a mut Vec<(IpAddr, Protocol, u16)>,
    conflicts: &'a mut Vec<Conflict>,
}

impl<'a, A: Address> Frontends<'a, A> {
    fn compile(
        model: &Model,
        served: &'a [(ServiceId, &'a ServicePort)],
        locals: &'a [AddressRange<A>],
        node_ports: &'a mut Vec<(Protocol, u16)>,
        own_frontends: &'a mut Vec<(IpAddr, Protocol, u16)>,
        conflicts: &'a mut Vec<Conflict>,
    ) -> Self {
        let open_networks = ranges::of_networks::<A>(&model.node_port_addresses);
        let mut own: Vec<A> = of_family::<A>(&model.local_addresses).filter(|address| !address.is_loopback()).collect();
        own.sort_unstable();
        own.dedup();
        let is_open = |address| open_networks.is_empty() || ranges::contains(&open_networks, address);
        let open: Vec<A> = own.iter().copied().filter(|&address| is_open(address)).collect();

        let count = |addresses: &[IpAddr]| of_family::<A>(addresses).count();
        let (mut whole, mut node) = (0, 0);
        for (_, service) in served {
            whole += count(&service.cluster_ips) + count(&service.external_ips) + count(&service.load_balancer_ips);
            node += service.node_port.map_or(0, |_| open.len());
            node += service.host_port.map_or(0, |_| own.len());
        }
        let mut this = Self {
            frontends: HashMap::with_capacity(whole + node),
            addresses: HashMap::with_capacity(whole),
            served,
            locals,
            node_ports,
            own_frontends,
            conflicts,
        };
        // In the order of the kinds: who comes first has the frontend.
        for (record, (_, service)) in served.iter().enumerate() {
            this.add_all(record, Kind::Cluster, service.port, &service.cluster_ips);
        }
        for (record, (_, service)) in served.iter().enumerate() {
            this.add_all(record, Kind::LoadBalancer, service.port, &service.load_balancer_ips);
        }
        for (record, (_, service)) in served.iter().enumerate() {
            this.add_all(record, Kind::External, service.port, &service.external_ips);
        }
        for (record, (_, service)) in served.iter().enumerate() {
            for &address in service.node_port.iter().flat_map(|_| &open) {
                this.add(record, Kind::NodePort, service.node_port.unwrap_or_default(), address);
            }
        }
        for (record, (_, service)) in served.iter().enumerate() {
            match service.host_port {
                None => {}
                // Whoever may create a pod chooses it, so it must be the node's: by any other address it would take what others are sent. A
                // loopback one only where it is asked for, and by the node's own processes only: nobody else can send to one.
                Some(HostAddresses::One(one)) if model.is_own(one) => {
                    this.add_all(record, Kind::HostPort, service.port, &[one]);
                }
                Some(HostAddresses::One(_)) => {}
                Some(_) => own.iter().for_each(|&address| this.add(record, Kind::HostPort, service.port, address)),
            }
        }
        this.frontends.shrink_to_fit();
        this.addresses.shrink_to_fit();
        this
    }

    fn add_all(&mut self, record: usize, kind: Kind, port: u16, addresses: &[IpAddr]) {
        for address in of_family(addresses) {
            self.add(record, kind, port, address);
        }
    }

    fn add(&mut self, record: usize, kind: Kind, port: u16, address: A) {
        let (id, service) = self.served[record];
        match self.frontends.entry(Frontend { address, port, protocol: service.protocol }) {
            Entry::Vacant(vacant) => {
                vacant.insert(Target::new(record, kind));
                if address.is_loopback() || ranges::contains(self.locals, address) {
                    self.own_frontends.push((address.to_ip(), service.protocol, port));
                }
            }
            Entry::Occupied(occupied) => {
                let winner = self.served[occupied.get().record()].0;
                if winner != id {
                    let protocol = service.protocol;
                    self.conflicts.push(Conflict { address: address.to_ip(), protocol, port, winner, loser: id });
                }
            }
        }
        match kind {
            Kind::Cluster => {
                self.addresses.entry(address).or_insert(Claim::Cluster(id));
            }
            Kind::LoadBalancer | Kind::External if !ranges::contains(self.locals, address) => {
                self.addresses.entry(address).or_insert(Claim::External);
            }
            _ if address.is_loopback() => {}
            _ => self.node_ports.push((service.protocol, port)),
        }
    }
}

/// A backend on its way into the table.
#[derive(Clone, Copy)]
pub(crate) struct Candidate<'a, A> {
    address: A,
    port: u16,
    pub(crate) condition: Condition,
    pub(crate) local: bool,
    /// Which of the service's endpoints it is.
    listing: u32,
    pub(crate) endpoint: &'a Endpoint,
}

/// What a backend may be used for; better ones are greater.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Condition {
    Unusable,
    /// Not to be used, but it still serves what it has.
    Serving,
    /// To be used where none is ready.
    Terminating,
    Ready,
}

impl Condition {
    fn of(endpoint: &Endpoint) -> Self {
        match (endpoint.ready, endpoint.serving, endpoint.terminating) {
            // Whether it serves is asked of those only that are not ready: publishNotReadyAddresses gives `ready: true, serving: false`.
            (true, ..) => Self::Ready,
            (false, false, _) => Self::Unusable,
            (false, true, true) => Self::Terminating,
            (false, true, false) => Self::Serving,
        }
    }

    /// The condition that backends of a list must have: ready, or if no backend is, terminating.
    fn required(conditions: impl Iterator<Item = Self>) -> Self {
        conditions.max().filter(|&best| best == Self::Ready).unwrap_or(Self::Terminating)
    }
}

/// What the backends of a service port must be like to be in its lists.
pub(crate) struct Lists<'a> {
    pub(crate) cluster: Condition,
    pub(crate) local: Condition,
    pub(crate) hints: Hints<'a>,
}

impl Lists<'_> {
    fn in_cluster<A>(&self, one: &Candidate<'_, A>) -> bool {
        one.condition == self.cluster && self.hints.admit(one.endpoint)
    }

    fn in_local<A>(&self, one: &Candidate<'_, A>) -> bool {
        one.local && one.condition == self.local
    }
}

/// Reads the backends of a service port that are of family `A` into `candidates`, each once, sorted by address and port.
pub(crate) fn read_candidates<'a, A: Address>(
    model: &'a Model,
    service: &'a ServicePort,
    candidates: &mut Vec<Candidate<'a, A>>,
) -> Lists<'a> {
    candidates.clear();
    candidates.extend((0_u32..).zip(&service.endpoints).filter_map(|(listing, endpoint)| {
        let (address, port, condition) = (A::from_ip(endpoint.address)?, endpoint.port, Condition::of(endpoint));
        let local = endpoint.node_name() == Some(&*model.node_name);
        Some(Candidate { address, port, condition, local, listing, endpoint })
    }));
    // Of one listed twice, as while it moves between slices, the most usable listing is kept, then the first.
    candidates.sort_unstable_by_key(|one| (one.address, one.port, Reverse((one.condition, one.local)), one.listing));
    candidates.dedup_by_key(|one| (one.address, one.port));

    let cluster = Condition::required(candidates.iter().map(|one| one.condition));
    let local = Condition::required(candidates.iter().filter(|one| one.local).map(|one| one.condition));
    let hints = if cluster == Condition::Ready { Hints::of(model, candidates) } else { Hints::Ignored };
    Lists { cluster, local, hints }
}

/// Kept from service to service, so that each does not allocate its own.
pub(crate) struct Scratch<'a, A> {
    candidates: Vec<Candidate<'a, A>>,
    segments: Vec<u8>,
}

impl<A> Default for Scratch<'_, A> {
    fn default() -> Self {
        Self { candidates: Vec::new(), segments: Vec::new() }
    }
}

impl<'a, A: Address> Scratch<'a, A> {
    /// Appends the service's backends in their four segments and returns the segments' bounds.
    pub(crate) fn lay_out(
        &mut self,
        model: &'a Model,
        service: &'a ServicePort,
        backends: &mut Vec<Backend<A>>,
    ) -> [u32; 5] {
        let candidates = &mut self.candidates;
        let lists = read_candidates(model, service, candidates);
        self.segments.clear();
        self.segments.extend(candidates.iter().map(|one| match (lists.in_cluster(one), lists.in_local(one)) {
            (true, false) => 0,
            (true, true) => 1,
            (false, true) => 2,
            (false, false) => 3,
        }));

        let service_hash = hash_of_service(service);
        let mut bounds = [backends.len() as u32; 5];
        for segment in 0..4_u8 {
            let members = candidates.iter().zip(&self.segments).filter(|&(_, &of)| of == segment);
            backends.extend(members.map(|(one, _)| Backend {
                address: one.address,
                port: one.port,
                stamp: stamp(service_hash, one.address, one.port),
                condition: one.condition,
            }));
            bounds[usize::from(segment) + 1] = backends.len() as u32;
        }
        bounds
    }
}

/// The topology hints that filter a cluster list of ready backends.
pub(crate) enum Hints<'a> {
    Ignored,
    Node(&'a str),
    Zone(&'a str),
}

impl<'a> Hints<'a> {
    fn of<A>(model: &'a Model, candidates: &[Candidate<'_, A>]) -> Self {
        let apply = |hints: fn(&Endpoint) -> &[Arc<str>], wanted: &str| {
            let mut named = false;
            let ready = candidates.iter().filter(|one| one.condition == Condition::Ready);
            ready.map(|one| hints(one.endpoint)).all(|hints| {
                named |= name(hints, wanted);
                !hints.is_empty()
            }) && named
        };
        if apply(Endpoint::node_hints, &model.node_name) {
            return Self::Node(&model.node_name);
        }
        match model.zone.as_deref().filter(|zone| !zone.is_empty()) {
            Some(zone) if apply(Endpoint::zone_hints, zone) => Self::Zone(zone),
            _ => Self::Ignored,
        }
    }

    pub(crate) fn admit(&self, endpoint: &Endpoint) -> bool {
        match self {
            Self::Ignored => true,
            Self::Node(wanted) => name(endpoint.node_hints(), wanted),
            Self::Zone(wanted) => name(endpoint.zone_hints(), wanted),
        }
    }
}

/// Whether one of the hints is that.
fn name(hints: &[Arc<str>], wanted: &str) -> bool {
    hints.iter().any(|hint| **hint == *wanted)
}

/// FNV-1a over name and protocol: fixed, so that stamps mean the same in every process.
pub(crate) fn hash_of_service(service: &ServicePort) -> u64 {
    let bytes = service.name.bytes().chain([0, service.protocol.0]);
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn stamp<A: Address>(service_hash: u64, address: A, port: u16) -> u32 {
    let bits = address.to_bits128();
    let mut hash = service_hash;
    for word in [(bits >> 64) as u64, bits as u64, u64::from(port)] {
        hash = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 32;
    }
    (hash as u32).max(1)
}
