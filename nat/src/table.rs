//! The compiled services and what they say about the first packet of a connection.
//!
//! # Layout
//! Each family has its own half, [`Services`]. Immutable arrays and hash maps:
//!
//! - `frontends`: (address, protocol, port) to the number of a record and the kind of address. One probe answers hit and
//!   miss, whatever the number of services. Node ports are there once per local address that they are open on: a node
//!   has few addresses, and a packet to a node port costs what one to a cluster IP does.
//! - `addresses`: the addresses that services claim as a whole. Probed after a miss only: a cluster IP's other ports are
//!   rejected.
//! - `records`: one per service port, in the order of their ids: policies, guard, and where its backends are.
//! - `backends`: all backends of a service port are contiguous, in four segments, each sorted by address and port:
//!
//!   ```text
//!   segments[0]        [1]               [2]        [3]        [4]
//!        | cluster only | cluster, local  | local only | unused  |
//!        '------- cluster list ----------'
//!                       '--------- local list --------'
//!   ```
//!
//!   Any two lists can be laid out so: both are slices, and no backend is stored twice. The unused ones (of another zone,
//!   terminating beside ready ones, not ready) are kept for [`Services::standing`].
//!   A table that was made out of another ([`Compiler`](crate::Compiler)) has places that no record has, left by service ports that had more
//!   backends, or that moved to the end as they got more.
//! - `listed`: every backend of TCP and SCTP. Asked for connections whose frontend is gone, or leads to others now.
//! - `guards`: the source ranges of load balancer addresses, a normalized run of ranges per record.
//!
//! # Invariants
//! Segment bounds never decrease and lie within `backends`. The cluster list is empty only if no backend of the service is
//! usable anywhere, so the local list is then empty too.
//!
//! # Selection
//! Lemire, "Fast Random Integer Generation in an Interval" (2019): the high half of a 64x64-bit product, with
//! rejection of the few low halves that would favour some backends.
//!
//! Nothing is written after compilation: the table is shared between threads as it is.

use std::{
    fmt,
    hash::{Hash, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Range,
    sync::Arc,
};

use hashbrown::HashMap;
use weir_packet::{Address, DropReason, FlowKey, Protocol, Tick};

use crate::{
    ServicePort, TrafficPolicy,
    affinity::{Affinity, Choice, Clients, Evidence},
    compile::{Condition, hash_of_service},
    listed::Listed,
    ranges::{self, AddressRange},
};

/// A service port: its index in [`Model::services`](crate::Model::services).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceId(pub u32);

/// A backend of a service port: its index in its family's half of one table, below [`Services::slots`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendSlot(pub u32);

/// A backend of a service port, the same in every table and process: what hits are kept by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendIdentity {
    /// A hash of the service port's name and protocol.
    pub service: u64,
    /// The backend's address.
    pub address: IpAddr,
    /// The backend's port.
    pub port: u16,
}

impl BackendIdentity {
    /// Of a backend of `service`.
    pub fn new(service: &ServicePort, address: IpAddr, port: u16) -> Self {
        Self { service: hash_of_service(service), address, port }
    }
}

/// A frontend that was looked up ahead of the decision about a packet to it.
#[derive(Clone, Copy, Debug)]
pub struct Foreseen(Target);

/// What service NAT takes the sender of a packet for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Inside the known pod CIDRs; comes before [`Source::Local`].
    Pod,
    /// An address of this node, loopback included.
    Local,
    /// Anything else; pods too, where the pod CIDRs are unknown.
    Other,
}

/// A pod's address and port that a connection may be sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Backend<A> {
    /// The backend's address.
    pub address: A,
    /// Identifies this backend of this service port: made from name, protocol, address and port alone, so it is equal in
    /// every table that has the backend, also in another process. Never zero.
    pub stamp: u32,
    /// The backend's port, host order.
    pub port: u16,
    /// What it may be used for.
    pub(crate) condition: Condition,
}

const _: () = assert!(size_of::<Backend<Ipv4Addr>>() == 12 && size_of::<Backend<Ipv6Addr>>() == 24);

/// What services say about the first packet of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision<'a, A> {
    /// No service claims it.
    NotAService,
    /// DNAT to `backend`.
    Translate {
        /// The one that was picked.
        backend: Backend<A>,
        /// Whether the source must be replaced too.
        masquerade: bool,
        /// All that could have been picked, sorted by address and port within each of two runs.
        candidates: &'a [Backend<A>],
        /// The service port.
        service: ServiceId,
        /// The backend's number in its family's half of the table.
        slot: BackendSlot,
        /// To be remembered once the packet turns out to open a connection, where the service port has ClientIP affinity.
        choice: Option<Choice<A>>,
    },
    /// Dropped and answered: TCP by a RST, others by ICMP port unreachable.
    Reject {
        /// [`DropReason::NoBackend`] or [`DropReason::UnpublishedPort`].
        reason: DropReason,
        /// The service port without backends; or, of an unpublished port, the first one that has the cluster IP.
        service: Option<ServiceId>,
    },
    /// Dropped in silence.
    Drop {
        /// [`DropReason::NoLocalBackend`], [`DropReason::SourceRange`] or [`DropReason::UnallocatedServiceIp`].
        reason: DropReason,
        /// The service port, where there is one.
        service: Option<ServiceId>,
    },
}

/// What has become of the backend of a connection from before a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is a backend as before.
    Stays,
    /// It terminates and serves what it has, while a connection that opened now would come to another: it is about to go.
    Drains,
    /// It is no backend for this connection any more.
    Gone,
}

/// Two service ports that claim one frontend; only the winner is served there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The contested address.
    pub address: IpAddr,
    /// The contested protocol.
    pub protocol: Protocol,
    /// The contested port.
    pub port: u16,
    /// Who is served.
    pub winner: ServiceId,
    /// Who is not.
    pub loser: ServiceId,
}

/// A destination: one that a service is reached by, or a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Frontend<A> {
    pub(crate) address: A,
    pub(crate) port: u16,
    pub(crate) protocol: Protocol,
}

impl<A: Address> Frontend<A> {
    #[inline]
    fn of(key: &FlowKey<A>) -> Self {
        Self { address: key.dst, port: key.ports.destination(), protocol: key.protocol }
    }
}

/// Feeds the hasher whole words: derived hashing would feed it slices with their lengths.
impl<A: Address> Hash for Frontend<A> {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        let rest = u64::from(self.port) << 8 | u64::from(self.protocol.0);
        if A::WORDS == 1 {
            state.write_u64((self.address.to_bits128() as u64) << 24 | rest);
        } else {
            state.write_u128(self.address.to_bits128());
            state.write_u64(rest);
        }
    }
}

/// The kind of address that a frontend is. Where several services claim one, the lower kind wins.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Kind {
    Cluster,
    LoadBalancer,
    External,
    NodePort,
    HostPort,
}

/// A record's number and the kind of address, in one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Target(u32);

impl Target {
    /// The most records that a target can tell apart.
    pub(crate) const MAX_RECORDS: usize = 1 << 29;

    pub(crate) fn new(record: usize, kind: Kind) -> Self {
        Self((record as u32) << 3 | kind as u32)
    }

    #[inline]
    pub(crate) fn record(self) -> usize {
        (self.0 >> 3) as usize
    }

    #[inline]
    pub(crate) fn kind(self) -> Kind {
        match self.0 & 7 {
            0 => Kind::Cluster,
            1 => Kind::LoadBalancer,
            2 => Kind::External,
            3 => Kind::NodePort,
            _ => Kind::HostPort,
        }
    }
}

/// How a service claims an address as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Claim {
    /// The cluster IP of this service port and perhaps of others.
    Cluster(ServiceId),
    /// An external or load balancer IP that is not also an address of this node.
    External,
}

/// A service port in one family. Aligned so that it is one cache line: most of those that are 56 bytes apart would lie in two.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(crate) struct Record {
    /// Tells this service port from others in every table and process: a hash of its name and protocol.
    pub(crate) identity: u64,
    pub(crate) service: ServiceId,
    /// Bounds in `backends`; see the theory above.
    pub(crate) segments: [u32; 5],
    /// Bounds in `guards`; equal where load balancer addresses are open to all.
    pub(crate) guard: [u32; 2],
    /// Timeout of ClientIP affinity in seconds.
    pub(crate) affinity: Option<u32>,
    pub(crate) internal_policy: TrafficPolicy,
    pub(crate) external_policy: TrafficPolicy,
}

const _: () = assert!(size_of::<Record>() == 64, "a record fits a cache line");

/// The compiled services of one family. Immutable.
pub struct Services<A> {
    pub(crate) frontends: HashMap<Frontend<A>, Target>,
    pub(crate) addresses: HashMap<A, Claim>,
    pub(crate) records: Box<[Record]>,
    pub(crate) backends: Box<[Backend<A>]>,
    pub(crate) guards: Box<[AddressRange<A>]>,
    /// All that is listed for TCP and SCTP, of whatever service.
    pub(crate) listed: Listed<A>,
    pub(crate) pods: Box<[AddressRange<A>]>,
    pub(crate) locals: Box<[AddressRange<A>]>,
    pub(crate) service_ranges: Box<[AddressRange<A>]>,
    pub(crate) masquerade_all: bool,
}

impl<A: Address> Services<A> {
    /// What to do with the first packet of the connection `key`.
    ///
    /// `random` is called once where a backend is picked, and again with a probability below the number of backends in
    /// 2^64. Whether the packet may open a connection is the caller's business, and so is to
    /// [remember](Clients::remember) the choice that was made.
    #[inline]
    pub fn decide(
        &self,
        key: &FlowKey<A>,
        clients: &Clients<A>,
        now: Tick,
        random: &mut impl FnMut() -> u64,
    ) -> Decision<'_, A> {
        let Some(target) = self.target(key) else { return self.without_frontend(key.dst) };
        let record = &self.records[target.record()];
        let service = Some(record.service);

        if target.kind() == Kind::LoadBalancer && !self.passes_guard(record, key.src) {
            return Decision::Drop { reason: DropReason::SourceRange, service };
        }
        let cluster = self.list(record, TrafficPolicy::Cluster);
        if cluster.is_empty() {
            return Decision::Reject { reason: DropReason::NoBackend, service };
        }
        let (policy, masquerade) = self.policy(target, record, key.src);
        let candidates = self.list(record, policy);
        if candidates.is_empty() {
            return Decision::Drop { reason: DropReason::NoLocalBackend, service };
        }
        let first = record.segments[segments_of(policy).start] as usize;
        let mut pick = || first + pick(candidates.len(), random);
        let (slot, before) = match record.affinity {
            None => (pick(), None),
            Some(_) => {
                let before = clients.find(record, key.src, now);
                let again = before.and_then(|before| self.find(record, segments_of(policy), before));
                (again.unwrap_or_else(pick), before)
            }
        };
        let backend = self.backends[slot];
        Decision::Translate {
            backend,
            masquerade: masquerade || backend.address == key.src,
            candidates,
            service: record.service,
            slot: BackendSlot(slot as u32),
            choice: record
                .affinity
                .map(|timeout| Choice::new(record, timeout, key.src, (backend.address, backend.port), before)),
        }
    }

    /// Notes what was seen of the client of the connection `key`, as its opener sends it, with that backend: nobody of whom less was seen takes its
    /// place in what `clients` remember.
    pub fn note_client(
        &self,
        key: &FlowKey<A>,
        backend: (A, u16),
        evidence: Evidence,
        clients: &Clients<A>,
        now: Tick,
    ) {
        let Some(record) = self.target(key).map(|target| &self.records[target.record()]) else { return };
        if let Some(timeout_seconds) = record.affinity {
            clients.note((record.identity, timeout_seconds), key.src, backend, evidence, now);
        }
    }

    /// The frontend of a first packet, ahead of [`Services::decide`].
    ///
    /// Whoever decides about several packets at once looks ahead for all of them, and each step for all of them before the next: what
    /// the steps read, which nothing else has read lately, is then fetched for several packets at a time. Nothing follows from it: what is
    /// decided is decided by `decide`.
    #[inline]
    pub fn foresee(&self, key: &FlowKey<A>) -> Option<Foreseen> {
        self.target(key).map(Foreseen)
    }

    /// The backend that [`Services::decide`] comes to, if `drawn` is its first random number and the client is bound to none.
    #[inline]
    pub fn foresee_backend(&self, Foreseen(target): Foreseen, client: A, drawn: u64) -> Option<BackendSlot> {
        let record = &self.records[target.record()];
        let (policy, _) = self.policy(target, record, client);
        let count = self.list(record, policy).len();
        // Short of the rare draw that is repeated.
        let index = (u128::from(drawn) * count as u128) >> 64;
        (count > 0).then(|| BackendSlot(record.segments[segments_of(policy).start] + index as u32))
    }

    /// The address and port of a backend.
    ///
    /// # Panics
    /// Where `slot` is of another table that had more backends.
    #[inline]
    pub fn backend(&self, slot: BackendSlot) -> &Backend<A> {
        &self.backends[slot.0 as usize]
    }

    /// What service NAT takes `address` for as a source.
    #[inline]
    pub fn source(&self, address: A) -> Source {
        if ranges::contains(&self.pods, address) {
            Source::Pod
        } else if address.is_loopback() || ranges::contains(&self.locals, address) {
            Source::Local
        } else {
            Source::Other
        }
    }

    /// Whether a service claims `address` as a whole: it is a cluster IP, or an external or load balancer IP that is not
    /// also an address of this node. Of the node's own addresses services claim single ports: see
    /// [`Services::claims`].
    #[inline]
    pub fn is_frontend(&self, address: A) -> bool {
        self.addresses.contains_key(&address)
    }

    /// Whether a service claims the destination of `key`: its address as a whole, or this port of it.
    #[inline]
    pub fn claims(&self, key: &FlowKey<A>) -> bool {
        self.is_frontend(key.dst) || self.target(key).is_some()
    }

    /// Whether the address is an external or load balancer IP, and none of this node's own.
    #[inline]
    pub fn is_external(&self, address: A) -> bool {
        matches!(self.addresses.get(&address), Some(Claim::External))
    }

    /// Whether a service is reached at this destination and port.
    pub fn is_served(&self, key: &FlowKey<A>) -> bool {
        self.target(key).is_some()
    }

    /// What has become of the backend of a connection from before a change: `frontend` is its original key, `backend` and `port`
    /// what it was sent to.
    ///
    /// TCP and SCTP keep a backend that is in any slice, whatever its conditions: it may finish what it has, also when the
    /// frontend is gone that the connection came by. UDP, which any backend can go on with, keeps one only while it serves
    /// (terminating or not) the service that is at the frontend.
    pub fn standing(&self, frontend: &FlowKey<A>, backend: A, port: u16) -> Standing {
        let protocol = frontend.protocol;
        let found = self.target(frontend).and_then(|target| {
            let record = &self.records[target.record()];
            Some((target, record, self.find(record, 0..4, (backend, port))?))
        });
        let Some((target, record, slot)) = found else {
            let is_listed = self.listed.has(&Frontend { address: backend, port, protocol });
            return if is_listed { Standing::Stays } else { Standing::Gone };
        };
        match self.backends[slot].condition {
            Condition::Unusable if protocol == Protocol::UDP => Standing::Gone,
            // Where none is ready it is in the list itself, for clients of policy Local perhaps when there are ready ones elsewhere.
            Condition::Terminating => {
                let (policy, _) = self.policy(target, record, frontend.src);
                let is_chosen_from = self.find(record, segments_of(policy), (backend, port)).is_some();
                let has_others = !self.list(record, policy).is_empty();
                if has_others && !is_chosen_from { Standing::Drains } else { Standing::Stays }
            }
            Condition::Unusable | Condition::Serving | Condition::Ready => Standing::Stays,
        }
    }

    /// Whether any list of a service port has this backend.
    pub(crate) fn is_usable(&self, record: &Record, backend: A, port: u16) -> bool {
        self.find(record, 0..3, (backend, port)).is_some()
    }

    /// The service ports with ClientIP affinity, by their identities.
    pub(crate) fn records_with_affinity(&self) -> impl Iterator<Item = (u64, &Record)> {
        self.records.iter().filter(|record| record.affinity.is_some()).map(|record| (record.identity, record))
    }

    /// How many backends there are, each counted for every service port that has it.
    pub fn slots(&self) -> usize {
        self.backends.len()
    }

    /// Every backend of every service port.
    pub fn backends(&self) -> impl Iterator<Item = (BackendSlot, BackendIdentity)> + '_ {
        self.records.iter().flat_map(move |record| {
            let [start, .., end] = record.segments;
            (start..end).map(move |slot| {
                let Backend { address, port, .. } = self.backends[slot as usize];
                (BackendSlot(slot), BackendIdentity { service: record.identity, address: address.to_ip(), port })
            })
        })
    }

    /// The addresses that services claim as a whole, as [`Services::is_frontend`] says. In no order.
    pub fn owned_addresses(&self) -> impl Iterator<Item = A> + '_ {
        self.addresses.keys().copied()
    }

    /// Memory that this half holds, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.frontends.allocation_size()
            + self.addresses.allocation_size()
            + self.listed.memory_bytes()
            + size_of_val(&*self.records)
            + size_of_val(&*self.backends)
            + size_of_val(&*self.guards)
            + size_of_val(&*self.pods)
            + size_of_val(&*self.locals)
            + size_of_val(&*self.service_ranges)
    }

    #[inline]
    fn target(&self, key: &FlowKey<A>) -> Option<Target> {
        // An ICMP key has its identifier and type where others have ports.
        if !key.protocol.has_ports() {
            return None;
        }
        self.frontends.get(&Frontend::of(key)).copied()
    }

    /// From which list of a service port a client picks, and whether it is masqueraded for what it asked.
    #[inline]
    fn policy(&self, target: Target, record: &Record, client: A) -> (TrafficPolicy, bool) {
        match target.kind() {
            Kind::Cluster => (record.internal_policy, self.masquerades_to_cluster_ip(client)),
            // Its one backend is on this node, by which the answers come back.
            Kind::HostPort => (TrafficPolicy::Cluster, false),
            _ if record.external_policy == TrafficPolicy::Cluster => (TrafficPolicy::Cluster, true),
            _ => match self.source(client) {
                Source::Pod => (TrafficPolicy::Cluster, false),
                Source::Local => (TrafficPolicy::Cluster, true),
                Source::Other => (TrafficPolicy::Local, false),
            },
        }
    }

    #[inline]
    fn list(&self, record: &Record, policy: TrafficPolicy) -> &[Backend<A>] {
        let Range { start, end } = segments_of(policy);
        &self.backends[record.segments[start] as usize..record.segments[end] as usize]
    }

    /// The index of a backend in some of the segments of a service port.
    fn find(&self, record: &Record, segments: Range<usize>, (address, port): (A, u16)) -> Option<usize> {
        record.segments[segments.start..=segments.end].windows(2).find_map(|bounds| {
            let start = bounds[0] as usize;
            let segment = &self.backends[start..bounds[1] as usize];
            let index = segment.binary_search_by_key(&(address, port), |listed| (listed.address, listed.port));
            index.ok().map(|index| start + index)
        })
    }

    #[inline]
    fn passes_guard(&self, record: &Record, source: A) -> bool {
        let [start, end] = record.guard;
        start == end || ranges::contains(&self.guards[start as usize..end as usize], source)
    }

    #[inline]
    fn masquerades_to_cluster_ip(&self, source: A) -> bool {
        self.masquerade_all || (!self.pods.is_empty() && !ranges::contains(&self.pods, source))
    }

    /// The decision for a destination of which no service publishes the protocol and port.
    #[inline]
    fn without_frontend(&self, destination: A) -> Decision<'_, A> {
        if let Some(Claim::Cluster(service)) = self.addresses.get(&destination) {
            return Decision::Reject { reason: DropReason::UnpublishedPort, service: Some(*service) };
        }
        if ranges::contains(&self.service_ranges, destination) && !ranges::contains(&self.locals, destination) {
            return Decision::Drop { reason: DropReason::UnallocatedServiceIp, service: None };
        }
        Decision::NotAService
    }
}

impl<A: Address> fmt::Debug for Services<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Services")
            .field("frontends", &self.frontends.len())
            .field("records", &self.records.len())
            .field("backends", &self.backends.len())
            .finish_non_exhaustive()
    }
}

/// The segments that make a list.
#[inline]
fn segments_of(policy: TrafficPolicy) -> Range<usize> {
    match policy {
        TrafficPolicy::Cluster => 0..2,
        TrafficPolicy::Local => 1..3,
    }
}

/// A uniform index below `count`, which is not zero.
#[inline]
fn pick(count: usize, random: &mut impl FnMut() -> u64) -> usize {
    let count = count as u64;
    let mut product = u128::from(random()) * u128::from(count);
    if (product as u64) < count {
        product = pick_again(product, count, random);
    }
    (product >> 64) as usize
}

/// Reached with probability `count / 2^64`: only there the exact bound, and so a division, is needed.
#[cold]
fn pick_again(mut product: u128, count: u64, random: &mut impl FnMut() -> u64) -> u128 {
    let biased_below = count.wrapping_neg() % count;
    while (product as u64) < biased_below {
        product = u128::from(random()) * u128::from(count);
    }
    product
}

/// The compiled services of both families, part of a snapshot. Immutable.
#[derive(Debug)]
pub struct ServiceTable {
    pub(crate) v4: Services<Ipv4Addr>,
    pub(crate) v6: Services<Ipv6Addr>,
    /// What endpoints have no part in.
    pub(crate) ports: Arc<Ports>,
}

/// What a table knows of service ports besides their endpoints, of both families.
#[derive(Debug)]
pub(crate) struct Ports {
    pub(crate) names: Names,
    pub(crate) origins: Box<[u32]>,
    pub(crate) node_ports: Box<[(Protocol, u16)]>,
    pub(crate) own_frontends: Box<[(IpAddr, Protocol, u16)]>,
    pub(crate) conflicts: Box<[Conflict]>,
}

/// A family that a [`ServiceTable`] and an [`Affinity`] have a half of: lets a stage that is generic over the address find its half.
pub trait Family: Address {
    /// This family's half of `table`.
    fn services(table: &ServiceTable) -> &Services<Self>;
    /// This family's half of `affinity`.
    fn clients(affinity: &Affinity) -> &Clients<Self>;
}

impl Family for Ipv4Addr {
    #[inline]
    fn services(table: &ServiceTable) -> &Services<Self> {
        &table.v4
    }
    #[inline]
    fn clients(affinity: &Affinity) -> &Clients<Self> {
        &affinity.v4
    }
}

impl Family for Ipv6Addr {
    #[inline]
    fn services(table: &ServiceTable) -> &Services<Self> {
        &table.v6
    }
    #[inline]
    fn clients(affinity: &Affinity) -> &Clients<Self> {
        &affinity.v6
    }
}

impl ServiceTable {
    /// The half of family `A`.
    #[inline]
    pub fn services<A: Family>(&self) -> &Services<A> {
        A::services(self)
    }

    /// "namespace/name:port name" of a service port.
    ///
    /// # Panics
    /// Where `service` comes from a table with more services.
    pub fn service_name(&self, service: ServiceId) -> &str {
        self.ports.names.get(service.0 as usize)
    }

    /// [`ServicePort::origin`](crate::ServicePort::origin) of a service port.
    ///
    /// # Panics
    /// Where `service` comes from a table with more services.
    pub fn origin(&self, service: ServiceId) -> u32 {
        self.ports.origins[service.0 as usize]
    }

    /// The addresses that the XDP program takes whole: cluster IPs, and the external and load balancer IPs that are not
    /// also addresses of this node (a service must not take the rest of the node's traffic with it). In no order.
    pub fn owned_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let v4 = self.v4.owned_addresses().map(IpAddr::V4);
        v4.chain(self.v6.owned_addresses().map(IpAddr::V6))
    }

    /// The ports that services and host ports have on this node's own addresses, sorted: node ports, host ports, and the ports of
    /// external and load balancer IPs that are addresses of this node. SNAT must not use them.
    pub fn node_ports(&self) -> impl Iterator<Item = (Protocol, u16)> + '_ {
        self.ports.node_ports.iter().copied()
    }

    /// The frontends on addresses of this node, loopback ones among them, sorted: what the node's own kernel must not keep to itself.
    pub fn own_frontends(&self) -> &[(IpAddr, Protocol, u16)] {
        &self.ports.own_frontends
    }

    /// Whether another table differs in endpoints only: whatever else is asked of one, the other says the same.
    pub fn differs_in_endpoints_only(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.ports, &other.ports)
    }

    /// The frontends that more than one service port claims.
    pub fn conflicts(&self) -> &[Conflict] {
        &self.ports.conflicts
    }

    /// Memory that the table holds, in bytes.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.v4.memory_bytes()
            + self.v6.memory_bytes()
            + self.ports.names.memory_bytes()
            + size_of_val(&*self.ports.origins)
            + size_of_val(&*self.ports.node_ports)
            + size_of_val(&*self.ports.own_frontends)
            + size_of_val(&*self.ports.conflicts)
    }
}

/// Many names in one allocation.
#[derive(Debug)]
pub(crate) struct Names {
    text: Box<str>,
    ends: Box<[usize]>,
}

impl Names {
    pub(crate) fn new<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let mut text = String::new();
        let ends = names
            .map(|name| {
                text.push_str(name);
                text.len()
            })
            .collect();
        Self { text: text.into_boxed_str(), ends }
    }

    fn get(&self, index: usize) -> &str {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[start..self.ends[index]]
    }

    fn memory_bytes(&self) -> usize {
        self.text.len() + size_of_val(&*self.ends)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_pack_record_and_kind() {
        for kind in [Kind::Cluster, Kind::LoadBalancer, Kind::External, Kind::NodePort, Kind::HostPort] {
            for record in [0, 1, 77, Target::MAX_RECORDS - 1] {
                let target = Target::new(record, kind);
                assert_eq!((target.record(), target.kind()), (record, kind));
            }
        }
    }

    #[test]
    fn picks_reject_exactly_the_biased_numbers() {
        // 2^64 = 3 * q + 1: the one low half below 1 is that of the number 0, which must be drawn again.
        let mut numbers = [0, 0, u64::MAX].into_iter();
        assert_eq!(pick(3, &mut || numbers.next().expect("a number is left")), 2);
        assert_eq!(numbers.next(), None);
        // A power of two divides 2^64: nothing is drawn twice.
        let mut numbers = [0, u64::MAX].into_iter();
        assert_eq!(pick(4, &mut || numbers.next().expect("a number is left")), 0);
        assert_eq!(numbers.len(), 1);
        assert_eq!(pick(1, &mut || 0x0123_4567_89ab_cdef), 0);
    }
}
