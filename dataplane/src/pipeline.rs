//! What happens to the packets of a burst: parse, admit, track, translate, forward.
//!
//! [`process_burst`] is a plain function of a burst, a [`Context`] (snapshot, tables, clock) and the worker's own [`Pipeline`]
//! (counters, random source, held packets); any driver will do, none is needed to test it. Packets are handled in the order in which they
//! came. Nearly all go the straight way ([`crate::straight`]); what follows here is the general one, which knows every rule.
//!
//! Every packet that comes in ends in exactly one of: transmitted, punted, dropped with a reason, consumed, held
//! (asserted over whole runs, see [`crate::counters`]). What is to be sent is sent by [`Pipeline::flush`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crossbeam::channel::Sender;
use rand_chacha::{ChaCha8Rng, rand_core::Rng};
use weir_conntrack::{
    Attributes, ConnId, ConnRef, Expendable, Handle, Hash, Hit, Insert, NewConn, Observed, Opening, PRIVILEGED,
    SctpPacket, Table, Tracked,
};
use weir_nat::{Affinity, AllocateError, Attempt, Standing};
use weir_packet::{
    Address, Direction, DropReason, FlowKey, Mac, Ports, Protocol, Tick,
    build::{self, IcmpError},
    glance::may_be_forwarded,
    options::TcpOptions,
    parse::{self, Arp, Kind, Parsed, TcpFields, View},
    rewrite,
};
use weir_policy::model::HostStage;
use weir_sync::{Turn, WorkerCounters};

use crate::{
    action_log::{self, ActionLog, Logged},
    allowance::Allowance,
    counters::{COUNTERS, Counter, Totals, drop_index},
    decide::{self, Arrival, Decision, Origin, Verdict},
    driver::{Driver, PortId},
    forwarding::{Adjacency, AdjacencyId, DeviceId, Encapsulation, Forwarding, Route, RouteKind, Routed},
    fragments::{self, Fate, Fragments, Lead, Slot},
    frame::{IfIndex, LinkType, MAX_PACKET_BYTES, ONE_FRAME_BYTES, Packet},
    held::{Held, HeldPacket},
    host_policy,
    offload::{self, Offload, recipe::Stays},
    snapshot::Snapshot,
    straight::{self, Seen},
};

const ETHERNET_BYTES: usize = 14;
const IPIP_HEADER_BYTES: u16 = 20;
/// Calico's gateway address on every workload device.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// "No next hop" in a connection; adjacencies have smaller numbers ([`crate::forwarding::MAX_ADJACENCIES`]).
const NO_HOP: u16 = u16::MAX;
/// The generation of a connection that was taken over from an earlier process and not judged yet; no snapshot has it.
const NO_GENERATION: u32 = 0;
/// Pieces that one packet is split into at most: one of the largest MTU over a small IPv4 one (324).
const MAX_FRAGMENTS: usize = 32;

/// How often ports are tried for a connection: once more where another worker came in between when one was to be displaced.
const SNAT_ROUNDS: u32 = 2;

/// A flow of datagrams that was answered and is silent for so long has no answer outstanding that anybody still waits for, most likely: what
/// comes then is somebody else who has the port now. It is also netfilter's time for what is no stream yet.
const QUIET_TICKS: u32 = (2_000_000_000 / Tick::NS) as u32;

/// Datagrams that may come back whole in an ICMP error: no more is quoted (RFC 4443, 2.4 c).
const MOST_QUOTED_BYTES: usize = 1280;

/// For every so many connections that a table may have there is place for one more, which is kept for the node itself.
const HOST_SHARE: u32 = 64;

/// The capacity of a table in which there is place for `max_entries` connections, and for the node's own when it is full of them.
pub const fn capacity_with_share(max_entries: u32) -> u32 {
    max_entries.saturating_add(max_entries / HOST_SHARE)
}

/// The connection tables of both families.
#[derive(Debug)]
pub struct Tables {
    /// IPv4.
    pub v4: Table<Ipv4Addr>,
    /// IPv6.
    pub v6: Table<Ipv6Addr>,
}

/// A worker's handles on both tables.
#[derive(Debug)]
pub struct Handles {
    v4: Handle,
    v6: Handle,
}

/// An address family with a connection table.
pub trait Family: Routed {
    /// The family's table.
    fn table(tables: &Tables) -> &Table<Self>;
    /// The family's handle.
    fn handle(handles: &mut Handles) -> &mut Handle;
    /// The family's packets in fragments.
    fn fragments(pipeline: &mut Pipeline) -> &mut Fragments<Self>;
    /// The packet that was read, if it is one of this family.
    fn of(parsed: Parsed) -> Option<View<Self>>;
    /// Makes an ICMP error about a tunnel packet of this node one about what it carried; `None` where it is no such error.
    fn about_tunnelled(packet: &mut Packet, view: &View<Self>, forwarding: &Forwarding) -> Option<View<Self>>;
    /// Handles link-scope traffic of a workload.
    fn workload_control<D: Driver>(
        pipeline: &mut Pipeline,
        driver: &mut D,
        packet: Packet,
        view: &View<Self>,
        device: DeviceId,
        context: &Context<'_>,
    );
}

impl Family for Ipv4Addr {
    #[inline]
    fn table(tables: &Tables) -> &Table<Self> {
        &tables.v4
    }
    #[inline]
    fn handle(handles: &mut Handles) -> &mut Handle {
        &mut handles.v4
    }
    #[inline]
    fn fragments(pipeline: &mut Pipeline) -> &mut Fragments<Self> {
        &mut pipeline.fragments4
    }
    fn of(parsed: Parsed) -> Option<View<Self>> {
        if let Parsed::V4(view) = parsed { Some(view) } else { None }
    }
    /// Routers between nodes tell the node about its tunnel packets, but only who sent what they carried can mend it.
    #[cold]
    fn about_tunnelled(packet: &mut Packet, view: &View<Self>, forwarding: &Forwarding) -> Option<View<Self>> {
        // Of several frames: no router quotes that much (RFC 1812, 4.3.2.3).
        if packet.has_tail() {
            return None;
        }
        let quoted = parse::parse_embedded::<Self>(view.quote(packet.bytes()))?;
        let is_ours = quoted.key.protocol == Protocol::IPIP
            && quoted.key.src == view.key.dst
            && forwarding.is_local(quoted.key.src)
            && forwarding.node_by_address(quoted.key.dst).is_some_and(|node| forwarding.this_node() != Some(node));
        let inner = rewrite::error_about_inner(packet.bytes_mut(), view, is_ours.then_some(&quoted)?)?;
        packet.set_len(usize::from(inner.end));
        Some(inner)
    }
    /// IPv4 has ARP for its neighbours; multicast and IGMP end here.
    fn workload_control<D: Driver>(
        pipeline: &mut Pipeline,
        driver: &mut D,
        packet: Packet,
        _view: &View<Self>,
        _device: DeviceId,
        _context: &Context<'_>,
    ) {
        pipeline.end(driver, packet, End::Drop(DropReason::LinkScope));
    }
}

impl Family for Ipv6Addr {
    #[inline]
    fn table(tables: &Tables) -> &Table<Self> {
        &tables.v6
    }
    #[inline]
    fn handle(handles: &mut Handles) -> &mut Handle {
        &mut handles.v6
    }
    #[inline]
    fn fragments(pipeline: &mut Pipeline) -> &mut Fragments<Self> {
        &mut pipeline.fragments6
    }
    fn of(parsed: Parsed) -> Option<View<Self>> {
        if let Parsed::V6(view) = parsed { Some(view) } else { None }
    }
    /// IPv6 goes into no tunnel.
    fn about_tunnelled(_packet: &mut Packet, _view: &View<Self>, _forwarding: &Forwarding) -> Option<View<Self>> {
        None
    }
    fn workload_control<D: Driver>(
        pipeline: &mut Pipeline,
        driver: &mut D,
        packet: Packet,
        view: &View<Self>,
        device: DeviceId,
        context: &Context<'_>,
    ) {
        pipeline.neighbor_solicitation(driver, packet, view, device, context);
    }
}

/// What a burst is judged by.
#[derive(Clone, Copy)]
pub struct Context<'t> {
    /// Services, policy, forwarding.
    pub snapshot: &'t Snapshot,
    /// Connections.
    pub tables: &'t Tables,
    /// Which backends clients had.
    pub affinity: &'t Affinity,
    /// The turn that keeps both alive.
    pub turn: &'t Turn<'t>,
    /// The time.
    pub now: Tick,
    /// Whether a TCP connection may be picked up mid-stream (nf_conntrack_tcp_loose).
    pub tcp_loose: bool,
    /// To whom settled flows are handed over.
    pub offload: Option<&'t Offload>,
}

impl<'t> Context<'t> {
    /// With netfilter's default of `tcp_loose`; flows stay with the workers.
    #[inline]
    pub fn new(
        snapshot: &'t Snapshot,
        tables: &'t Tables,
        affinity: &'t Affinity,
        turn: &'t Turn<'t>,
        now: Tick,
    ) -> Self {
        Self { snapshot, tables, affinity, turn, now, tcp_loose: true, offload: None }
    }
}

/// What a worker asks of, or tells, the control thread.
#[derive(Clone, Debug)]
pub enum Event {
    /// A new connection met a Log rule.
    Logged(Logged),
    /// Packets wait for this neighbour's MAC address.
    Resolve {
        /// The device that it is on.
        device: IfIndex,
        /// Its address.
        address: IpAddr,
    },
    /// A workload whose MAC address was unknown sent a packet.
    Learned {
        /// The workload's device.
        device: IfIndex,
        /// The source address of the packet.
        address: IpAddr,
        /// The source MAC address of the packet.
        mac: Mac,
    },
}

/// How a packet ended. The caller counts it and takes the frame back.
enum End {
    Drop(DropReason),
    Consumed,
}

/// How the last packet ended that was not sent on: what a first fragment's followers must know. Whoever wants to know sets it to `Sent` before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Sent,
    /// By untracked policy, whatever connection there may be.
    Untracked,
    Punted,
    Dropped(DropReason),
}

/// A worker's own state.
#[derive(Debug)]
pub struct Pipeline {
    handles: Handles,
    counters: WorkerCounters<COUNTERS>,
    random: ChaCha8Rng,
    events: Sender<Event>,
    held: Held,
    fragments4: Fragments<Ipv4Addr>,
    fragments6: Fragments<Ipv6Addr>,
    outcome: Outcome,
    tunnel_id: u16,
    generation: u32,
    errors: Allowance,
    resets: Allowance,
    action_log: ActionLog,
    /// What was seen of the packets of a burst.
    seen: Vec<Seen>,
    /// Whether any packet may go straight.
    goes_straight: bool,
    /// Packets that did.
    went_straight: u64,
    egress: Vec<Vec<Packet>>,
    /// Where a packet of several frames is put together for what needs all of its bytes.
    whole: Vec<u8>,
}

impl Pipeline {
    /// The state of one worker. `burst`: packets handled in one turn; `ports`: as the driver's.
    pub fn new(
        tables: &Tables,
        counters: WorkerCounters<COUNTERS>,
        mut random: ChaCha8Rng,
        events: Sender<Event>,
        burst: usize,
        ports: usize,
    ) -> Self {
        Self {
            handles: Handles { v4: tables.v4.handle(), v6: tables.v6.handle() },
            counters,
            fragments4: Fragments::new([random.next_u64(), random.next_u64()]),
            fragments6: Fragments::new([random.next_u64(), random.next_u64()]),
            outcome: Outcome::Sent,
            tunnel_id: random.next_u32() as u16,
            random,
            events,
            held: Held::new(),
            generation: 0,
            errors: Allowance::of_answers(),
            resets: Allowance::of_answers(),
            action_log: ActionLog::new(),
            seen: Vec::with_capacity(burst),
            goes_straight: true,
            went_straight: 0,
            // Every packet of a burst may have been answered, and held packets may be set free with it.
            egress: (0..ports).map(|_| Vec::with_capacity(4 * burst + 512)).collect(),
            whole: Vec::with_capacity(MAX_PACKET_BYTES),
        }
    }

    /// The same, which follows the fragments of a packet for so many ticks (IPv4, IPv6) instead of [`fragments::LIFETIME`], the most.
    #[must_use]
    pub fn with_fragment_lifetimes(mut self, [v4, v6]: [u32; 2]) -> Self {
        self.fragments4.set_lifetime(v4);
        self.fragments6.set_lifetime(v6);
        self
    }

    /// The same, whose packets all go the general way: for holding one way beside the other.
    #[must_use]
    pub fn without_straight_way(mut self) -> Self {
        self.goes_straight = false;
        self
    }

    /// Packets that went the straight way.
    pub fn went_straight(&self) -> u64 {
        self.went_straight
    }

    /// Packets that wait: for a neighbour, or for the first fragment of theirs.
    pub fn held(&self) -> usize {
        self.held.len() + self.fragments4.len() + self.fragments6.len()
    }

    /// This worker's counters.
    pub fn counters(&self) -> &WorkerCounters<COUNTERS> {
        &self.counters
    }

    /// Counts a packet that was longer than a packet can be: received and dropped.
    pub fn count_oversized(&mut self) {
        self.count(Counter::Rx);
        self.counters.add(drop_index(DropReason::Truncated), 1);
    }

    /// What this worker counted.
    pub fn totals(&self) -> Totals {
        Totals::new(&std::array::from_fn(|index| self.counters.get(index)), self.held() as u64)
    }

    /// Sends what the turn made.
    pub fn flush(&mut self, driver: &mut impl Driver) {
        for port in 0..self.egress.len() {
            let packets = &mut self.egress[port];
            if packets.is_empty() {
                continue;
            }
            let count = packets.len();
            let to_host = |packets: &[Packet]| match port {
                0 => packets.iter().filter(|p| p.device == IfIndex::HOST).count(),
                _ => 0,
            };
            let punted = to_host(packets);
            driver.transmit(PortId(port as u8), packets);
            let unsent_punts = to_host(packets);
            let sent_punts = punted - unsent_punts;
            let sent = count - packets.len() - sent_punts;
            self.counters.add(Counter::Punted as usize, sent_punts as u64);
            self.counters.add(Counter::Tx as usize, sent as u64);
            self.counters.add(drop_index(DropReason::TxRingFull), packets.len() as u64);
            for packet in packets.drain(..) {
                driver.release(packet);
            }
        }
    }

    fn count(&mut self, counter: Counter) {
        self.counters.add(counter as usize, 1);
    }

    fn end(&mut self, driver: &mut impl Driver, packet: Packet, end: End) {
        self.outcome = match end {
            End::Drop(reason) => {
                self.counters.add(drop_index(reason), 1);
                Outcome::Dropped(reason)
            }
            End::Consumed => {
                self.count(Counter::Consumed);
                Outcome::Sent
            }
        };
        driver.release(packet);
    }

    /// Drops every packet that still waits.
    pub fn give_up_held(&mut self, driver: &mut impl Driver) {
        self.give_up_fragments::<Ipv4Addr>(driver);
        self.give_up_fragments::<Ipv6Addr>(driver);
        while let Some(held) = self.held.take_if(|_| true) {
            self.end(driver, held.packet, End::Drop(DropReason::NeighborUnresolved));
        }
    }

    fn give_up_fragments<A: Family>(&mut self, driver: &mut impl Driver) {
        while let Some(waiting) = A::fragments(self).give_up() {
            self.end(driver, waiting.packet, End::Drop(DropReason::FragmentOrphan));
        }
    }

    /// Work that needs no packet: held packets whose neighbour is known now, packets and fragments that waited too long, and a share of the
    /// sweep over the tables (`share` connections of each).
    pub fn maintain(&mut self, driver: &mut impl Driver, context: &Context<'_>, share: u32) {
        self.look_after_held(driver, context);
        self.look_after_fragments::<Ipv4Addr, _>(driver, context);
        self.look_after_fragments::<Ipv6Addr, _>(driver, context);
        let Handles { v4, v6 } = &mut self.handles;
        context.tables.v4.sweep(v4, context.now, share, context.turn);
        context.tables.v6.sweep(v6, context.now, share, context.turn);
    }

    fn look_after_held(&mut self, driver: &mut impl Driver, context: &Context<'_>) {
        if self.held.is_empty() {
            self.generation = context.snapshot.generation;
            return;
        }
        if self.generation != context.snapshot.generation {
            self.generation = context.snapshot.generation;
            let forwarding = &context.snapshot.forwarding;
            while let Some(mut held) = self.held.take_if(|h| forwarding.neighbor(h.device, h.next_hop).is_some()) {
                match (forwarding.neighbor(held.device, held.next_hop), forwarding.device_by_index(held.device)) {
                    (Some(mac), Some(device)) => {
                        let device = forwarding.device(device);
                        held.packet.bytes_mut()[..6].copy_from_slice(&mac.0);
                        held.packet.bytes_mut()[6..12].copy_from_slice(&device.mac.0);
                        self.egress[usize::from(device.port.0)].push(held.packet);
                    }
                    _ => self.end(driver, held.packet, End::Drop(DropReason::NeighborUnresolved)),
                }
            }
        }
        while let Some(held) = self.held.take_overdue(context.now) {
            self.end(driver, held.packet, End::Drop(DropReason::NeighborUnresolved));
        }
    }
}

/// Handles all packets of `burst` and leaves it empty. [`Pipeline::flush`] sends what it made.
pub fn process_burst<D: Driver>(
    pipeline: &mut Pipeline,
    driver: &mut D,
    burst: &mut Vec<Packet>,
    context: &Context<'_>,
) {
    pipeline.counters.add(Counter::Rx as usize, burst.len() as u64);
    if !pipeline.goes_straight {
        return burst.drain(..).for_each(|packet| pipeline.admit(driver, packet, context));
    }
    // Taken and put back, so that the packets can be handled with all of the pipeline; no allocation happens.
    let mut seen = std::mem::take(&mut pipeline.seen);
    straight::see(burst, &mut seen, context);
    straight::fetch(&mut seen, context);
    pipeline.went_straight += burst.len() as u64;
    for (mut packet, seen) in burst.drain(..).zip(&seen) {
        match straight::go(&mut packet, seen, &mut pipeline.tunnel_id, context) {
            Some(port) => pipeline.egress[usize::from(port.0)].push(packet),
            None => {
                pipeline.went_straight -= 1;
                pipeline.admit(driver, packet, context);
            }
        }
    }
    seen.clear();
    pipeline.seen = seen;
}

impl Pipeline {
    /// The beginning of the general way: where it came from, parse, tunnel.
    #[inline(never)]
    fn admit<D: Driver>(&mut self, driver: &mut D, mut packet: Packet, context: &Context<'_>) {
        let forwarding = &*context.snapshot.forwarding;
        let Some(device_id) = forwarding.device_by_index(packet.device) else {
            return self.end(driver, packet, End::Drop(DropReason::UnknownDevice));
        };
        let device = forwarding.device(device_id);
        let Some(origin) = Origin::of(device) else {
            return self.end(driver, packet, End::Drop(DropReason::UnknownDevice));
        };
        if packet.link == LinkType::Other {
            return self.end(driver, packet, End::Drop(DropReason::WrongMac));
        }
        let parsed = match parse::parse_start(packet.bytes(), packet.total_bytes()) {
            // To a host port on a loopback address, which only the node's own kernel can ask for.
            Err(DropReason::MartianAddress) if origin == Origin::Host => {
                parse::parse_start_of_own(packet.bytes(), packet.total_bytes())
            }
            parsed => parsed,
        };
        match parsed {
            Ok(Parsed::V4(view)) if view.key.protocol == Protocol::IPIP && origin == Origin::Uplink => {
                match decapsulate(&mut packet, &view, forwarding) {
                    Ok(inner) => self.admit_ip(driver, packet, inner, origin, device_id, context),
                    Err(reason) => self.end(driver, packet, End::Drop(reason)),
                }
            }
            Ok(Parsed::V4(view)) => self.admit_ip(driver, packet, view, origin, device_id, context),
            Ok(Parsed::V6(view)) => self.admit_ip(driver, packet, view, origin, device_id, context),
            Ok(Parsed::Arp(arp)) => self.arp(driver, packet, &arp, origin, device_id, context),
            Ok(Parsed::Other { .. }) if origin == Origin::Uplink => self.punt_frame(packet),
            Ok(Parsed::Other { .. }) => self.end(driver, packet, End::Drop(DropReason::UnknownEtherType)),
            Err(reason) => self.end(driver, packet, End::Drop(reason)),
        }
    }

    fn admit_ip<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        mut packet: Packet,
        view: View<A>,
        origin: Origin,
        device: DeviceId,
        context: &Context<'_>,
    ) {
        let multicast = view.key.dst.is_multicast_or_broadcast();
        if matches!(packet.link, LinkType::Broadcast | LinkType::Multicast) && !multicast {
            return self.end(driver, packet, End::Drop(DropReason::WrongMac));
        }
        if matches!(view.kind, Kind::Control) || multicast {
            return match origin {
                Origin::Uplink => self.punt_frame(packet),
                Origin::Workload(_) => A::workload_control(self, driver, packet, &view, device, context),
                Origin::Host => self.end(driver, packet, End::Drop(DropReason::LinkScope)),
            };
        }
        if view.key.dst.is_bound_to_link() || view.key.src.is_bound_to_link() {
            let for_node = view.key.dst.is_bound_to_link() || context.snapshot.forwarding.is_local(view.key.dst);
            return match origin {
                Origin::Uplink if for_node => self.punt_frame(packet),
                _ => self.end(driver, packet, End::Drop(DropReason::LinkScope)),
            };
        }
        // Ethernet padding is none of the packet's.
        driver.truncate(&mut packet, usize::from(view.end));
        let hash = A::table(context.tables).hash(&view.key);
        self.flow(driver, packet, &view, origin, hash, context);
    }

    /// The connection of the packet, or its first judgement.
    fn flow<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<A>,
        origin: Origin,
        hash: Hash,
        context: &Context<'_>,
    ) {
        if view.kind == Kind::Flow {
            return self.track(driver, packet, view, origin, hash, context);
        }
        if let Err(reason) = decide::check_source(context.snapshot, origin, &view.key) {
            return self.end(driver, packet, End::Drop(reason));
        }
        match view.kind {
            Kind::IcmpError => self.icmp_error(driver, packet, view, origin, context),
            Kind::FirstFragment { .. } | Kind::LaterFragment { .. } => {
                self.part(driver, packet, view, origin, hash, context);
            }
            Kind::Flow | Kind::Control => self.end(driver, packet, End::Drop(DropReason::LinkScope)),
        }
    }

    /// The connection of a packet with a key: whole, or a first fragment.
    #[inline]
    fn track<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<A>,
        origin: Origin,
        hash: Hash,
        context: &Context<'_>,
    ) {
        let snapshot = context.snapshot;
        if snapshot.rules.host.has_untracked() && origin == Origin::Uplink {
            let arrival = Arrival::by(origin, packet.device, packet.through_tunnel, &snapshot.forwarding);
            if host_policy::is_untracked(snapshot, arrival, &view.key) {
                return self.first_packet(driver, packet, view, origin, context);
            }
        }
        let table = A::table(context.tables);
        // Twice at most: what opens a connection where an old one is over, or does not stand any more, opens anew.
        for _ in 0..2 {
            let Some(hit) = table.lookup(&view.key, hash, context.now, context.turn) else { break };
            let conn = table.conn(hit.conn);
            let stale = is_stale(&conn, context.snapshot);
            if (stale || !comes_as_expected(&conn, hit.direction, packet.device, context))
                && let Err(reason) = decide::check_source(context.snapshot, origin, &view.key)
            {
                return self.end(driver, packet, End::Drop(reason));
            }
            if stale {
                let claim = self.claim(driver, &packet, view, &conn, hit.direction, context.now);
                match rejudge(&conn, claim, context) {
                    Rejudged::Keep => {}
                    Rejudged::Drains => note(&packet, view, &conn, hit.direction),
                    Rejudged::Cut(reason) => {
                        // One that is cut stays until it expires: forgotten, its other end's next packet could pick it up mid-stream as a
                        // connection of the opposite direction, which may be allowed, or open a flow in the backend's own name.
                        if reason == DropReason::UnknownDevice {
                            table.remove(A::handle(&mut self.handles), hit.conn, context.turn);
                        }
                        return self.end(driver, packet, End::Drop(reason));
                    }
                    Rejudged::Reset(reason) => {
                        return self.reset(driver, packet, view, &conn, hit.direction, reason, context);
                    }
                    Rejudged::Anew => {
                        table.remove(A::handle(&mut self.handles), hit.conn, context.turn);
                        continue;
                    }
                }
            }
            // What has no states costs no copy of nothing.
            let read;
            let segment = match view.key.protocol {
                Protocol::TCP | Protocol::SCTP => {
                    read = self.observed(driver, &packet, view);
                    &read
                }
                _ => &Observed::NOTHING,
            };
            if may_change_state(&conn, hit.direction, segment) && !self.checksum_ok(driver, &packet, view) {
                // It stays bad, so its receiver drops it.
                return self.established(driver, packet, view, &conn, hit.direction, context);
            }
            match follow(&conn, hit.direction, segment, context) {
                Tracked::Accept => {
                    return self.established(driver, packet, view, &conn, hit.direction, context);
                }
                Tracked::NewFlow => {
                    table.remove(A::handle(&mut self.handles), hit.conn, context.turn);
                }
                Tracked::Invalid => return self.end(driver, packet, End::Drop(DropReason::Invalid)),
            }
        }
        self.first_packet(driver, packet, view, origin, context);
    }

    /// A packet of a known connection: its recipe is the other direction's key.
    #[inline]
    fn established<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<A>,
        conn: &ConnRef<'_, A>,
        direction: Direction,
        context: &Context<'_>,
    ) {
        let to = conn.key(direction.flip()).invert();
        match next_hop(conn, direction, context) {
            Some(adjacency) => self.forward(driver, packet, view, &to, adjacency, context),
            None => self.nowhere(driver, packet, view, to.dst, context),
        }
    }

    /// A segment of a connection whose backend is gone. Both ends are told: its sender by a RST, and where that is the backend, the client
    /// by one made of the very segment, whose number is the one that it expects. The connection stays for as long as one that was reset does,
    /// so that whatever either end sends yet is answered too.
    #[cold]
    #[expect(clippy::too_many_arguments, reason = "what `track` knows of the packet")]
    fn reset<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<A>,
        conn: &ConnRef<'_, A>,
        direction: Direction,
        reason: DropReason,
        context: &Context<'_>,
    ) {
        // A damaged one changes nothing and is no reason to tell anybody.
        if !self.checksum_ok(driver, &packet, view) {
            return self.end(driver, packet, End::Drop(DropReason::Invalid));
        }
        conn.end_soon(context.now);
        if direction == Direction::Reply && self.resets.take(context.now) {
            let to = conn.key(Direction::Original).invert();
            self.generate(driver, &packet, to.dst, context, |out, frame, _| {
                build::tcp_reset_onwards(out, frame, view, &to)
            });
        }
        self.reject(driver, packet, view, reason, context);
    }

    /// A packet of a connection whose other end cannot be reached any more. Its sender is told as that of a first packet is: other nodes
    /// move flows away from a pod that is gone, before its service says so ([`tells_of_end`]).
    #[cold]
    fn nowhere<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<A>,
        destination: A,
        context: &Context<'_>,
    ) {
        let reason = match context.snapshot.forwarding.route(destination) {
            Route::NoSuchPod => DropReason::NoSuchPod,
            Route::Via(_) | Route::None => DropReason::NoRoute,
        };
        self.reject(driver, packet, view, reason, context);
    }

    fn first_packet<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<A>,
        origin: Origin,
        context: &Context<'_>,
    ) {
        let snapshot = context.snapshot;
        let forwarding = &*snapshot.forwarding;
        self.learn(&packet, view, origin, context);
        let arrival = Arrival::by(origin, packet.device, packet.through_tunnel, forwarding);
        let mut decision = self.decide(arrival, &view.key, context);

        if decision.untracked {
            return self.untracked(driver, packet, view, &decision, context);
        }
        let answers = self.answers_node(driver, &packet, view, &decision, context);
        // To the node itself and no service's: the kernel's business, whatever it is.
        if origin == Origin::Uplink && (decision.verdict == Verdict::Local || answers) {
            return self.punt(packet, forwarding);
        }
        let claimed = decision.service.is_some() || snapshot.rules.services.services::<A>().claims(&view.key);
        // What the node's own kernel sends to a remote pod is answered to the node's own address, past weir, as is what it answers a
        // remote pod: half a connection cannot be followed, and the kernel follows the whole of it.
        if origin == Origin::Host
            && (decision.verdict == Verdict::Forward || answers)
            && !claimed
            && decision.snat.is_none()
        {
            match decision.adjacency() {
                Some(hop) if forwarding.adjacency(hop).kind != RouteKind::Workload => {
                    return self.forward(driver, packet, view, &view.key, hop, context);
                }
                _ => {}
            }
        }
        if !self.checksum_ok(driver, &packet, view) {
            return self.end(driver, packet, End::Drop(DropReason::Invalid));
        }
        let segment = self.observed(driver, &packet, view);
        match segment.opening(&view.key) {
            Opening::Opens => {}
            Opening::MidStream if context.tcp_loose && !claimed => {}
            // A frontend on an address of the node has a port that one of the node's own sockets may have had before, or has at another
            // address: of its connections weir knows nothing. What opens nothing is that socket's, or the kernel's to refuse.
            Opening::MidStream | Opening::Never
                if decision.service.is_some()
                    && !matches!(origin, Origin::Workload(_))
                    && (forwarding.is_local(view.key.dst) || view.key.dst.is_loopback()) =>
            {
                return self.punt(packet, forwarding);
            }
            Opening::MidStream | Opening::Never => return self.end(driver, packet, End::Drop(DropReason::Invalid)),
        }
        if let Some(choice) = &decision.choice
            && !context.affinity.clients().remember(choice, context.now)
        {
            // Another worker has chosen for this client since: its choice holds for this connection too.
            decision = self.decide(arrival, &view.key, context);
        }
        match decision.verdict {
            Verdict::Forward | Verdict::Local => {}
            Verdict::Drop(reason) => {
                if reason.is_policy() {
                    self.count_rules(&decision, context);
                    self.log(origin, &view.key, &decision, context);
                }
                return self.end(driver, packet, End::Drop(reason));
            }
            Verdict::Reject(reason) => return self.reject(driver, packet, view, reason, context),
            Verdict::Pass => return self.reject(driver, packet, view, DropReason::NoRoute, context),
        }
        let Some(adjacency) = decision.adjacency() else {
            return self.reject(driver, packet, view, DropReason::NoRoute, context);
        };
        // What does not get any further opens no connection.
        if let Some((error, reason)) = obstacle(view, forwarding.adjacency(adjacency)) {
            return self.answer_error(driver, packet, view, error, reason, context);
        }
        match self.open(&decision, packet.device, view, &segment, arrival, context) {
            Ok(Opened { hit, ours }) => {
                let conn = A::table(context.tables).conn(hit.conn);
                if ours {
                    self.count(Counter::Opened);
                    self.count_rules(&decision, context);
                    self.log(origin, &view.key, &decision, context);
                    if let Some(slot) = decision.slot {
                        context.snapshot.rules.count_backend::<A>(self.counters.number(), slot);
                    }
                }
                // Somebody was faster, with a packet of the same flow: this one is a further packet of that connection.
                if !ours && follow(&conn, hit.direction, &segment, context) == Tracked::Invalid {
                    return self.end(driver, packet, End::Drop(DropReason::Invalid));
                }
                self.established(driver, packet, view, &conn, hit.direction, context);
            }
            Err(reason) => self.end(driver, packet, End::Drop(reason)),
        }
    }

    fn decide<'c, A: Family>(&mut self, arrival: Arrival, key: &FlowKey<A>, context: &Context<'c>) -> Decision<'c, A> {
        let random = &mut || self.random.next_u64();
        decide::decide(context.snapshot, arrival, key, context.affinity, context.now, random)
    }

    /// A packet that untracked policy lets go: nothing is remembered of it, and the next one is judged as it was.
    #[cold]
    fn untracked<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<A>,
        decision: &Decision<'_, A>,
        context: &Context<'_>,
    ) {
        match (decision.verdict, decision.adjacency()) {
            (Verdict::Local, _) => self.punt(packet, &context.snapshot.forwarding),
            (Verdict::Forward, Some(hop)) => {
                self.forward(driver, packet, view, &view.key, hop, context);
                if self.outcome == Outcome::Sent {
                    self.outcome = Outcome::Untracked;
                }
            }
            (Verdict::Drop(reason), _) => self.end(driver, packet, End::Drop(reason)),
            (Verdict::Reject(reason), _) => self.reject(driver, packet, view, reason, context),
            (Verdict::Forward, None) | (Verdict::Pass, _) => {
                self.reject(driver, packet, view, DropReason::NoRoute, context);
            }
        }
    }

    /// Counts a new connection, or one that is denied, for each rule that decided about it.
    fn count_rules<A: Address>(&self, decision: &Decision<'_, A>, context: &Context<'_>) {
        let of_host = decision.host.iter().map(|(_, judgement)| judgement);
        for judgement in [decision.egress, decision.ingress].into_iter().flatten().chain(of_host) {
            context.snapshot.rules.hits.add(self.counters.number(), judgement.rule.0 as usize);
        }
    }

    /// Tells of the Log rules that a new connection, or one that is denied, met.
    fn log<A: Routed>(&mut self, origin: Origin, key: &FlowKey<A>, decision: &Decision<'_, A>, context: &Context<'_>) {
        let Self { action_log, events, .. } = self;
        action_log::entries(context.snapshot, origin, key, decision, |entry| {
            let send = |logged| events.try_send(Event::Logged(logged)).is_ok();
            action_log.tell(entry, &context.snapshot.rules, context.now, send);
        });
    }

    /// Puts both directions of a new connection into the table. Who loses a race gets the winner's connection.
    ///
    /// Where all tries for a source port find theirs taken, the most expendable of those who hold them is displaced: a flood of SYNs towards
    /// one backend would otherwise keep every port from others for as long as half-open connections live. First it is removed, by a
    /// compare-and-swap that fails if its answer has come meanwhile, then its key is taken as any other, by an insertion that fails if another
    /// worker has been faster; in either case all is tried once more, with other ports. A packet of the displaced that another worker
    /// handles in that same moment still passes, as a late one would.
    fn open<A: Family>(
        &mut self,
        decision: &Decision<'_, A>,
        device: IfIndex,
        view: &View<A>,
        segment: &Observed,
        arrival: Arrival,
        context: &Context<'_>,
    ) -> Result<Opened, DropReason> {
        let (snapshot, origin) = (context.snapshot, arrival.origin);
        let table = A::table(context.tables);
        let [source_stamp, destination_stamp] = decide::policy_stamps(snapshot, arrival, &decision.translated);
        let mut reply = decision.translated.invert();
        if let Some(address) = decision.snat {
            reply.dst = address;
        }
        let attributes = Attributes {
            device: device.0,
            stamps: [source_stamp, destination_stamp, decision.backend_stamp],
            generation: snapshot.generation,
            next_hops: hop_words(snapshot, &reply, [decision.adjacency(), adjacency_to(snapshot, view.key.src)]),
            flags: flags(origin, decision, context),
        };
        let Self { handles, random, counters, .. } = self;
        // A share is kept for the node's own connections, and for its pods' to it, however many others there are. Not for those from
        // outside, whose sources may be made up: such a flood would take the share.
        let to_host =
            decision.adjacency().is_some_and(|hop| snapshot.forwarding.adjacency(hop).kind == RouteKind::Host);
        let for_host = origin == Origin::Host || to_host && origin != Origin::Uplink;
        let kept_free = if for_host { 0 } else { table.capacity() as u32 / (HOST_SHARE + 1) };
        // Pods may fill the share, but what the node itself has opened makes way for nobody else.
        let is_privileged = origin == Origin::Host;
        if !table.make_room(A::handle(handles), kept_free, is_privileged, context.now, context.turn) {
            return Err(DropReason::TableFull);
        }
        let mut rival: Option<Rival<A>> = None;
        let attempt = |handle: &mut Handle, rival: &mut Option<Rival<A>>, reply: FlowKey<A>| {
            let new = NewConn { original: view.key, reply, attributes, first: *segment };
            match table.insert(handle, new, context.now, context.turn) {
                Insert::Inserted(conn) => {
                    Attempt::Free(Opened { hit: Hit { conn, direction: Direction::Original }, ours: true })
                }
                Insert::Exists(hit) => Attempt::Free(Opened { hit, ours: false }),
                Insert::ReplyTaken(holder) => {
                    counters.add(Counter::SnatTaken as usize, 1);
                    // Only who got the port by translation or by chance may lose it, not who is spoken to there.
                    if holder.direction == Direction::Reply
                        && let Some(worth) = table.conn(holder.conn).expendable(is_privileged, context.now)
                        && rival.as_ref().is_none_or(|other| worth > other.worth)
                    {
                        *rival = Some(Rival { worth, conn: holder.conn, reply });
                    }
                    Attempt::Taken
                }
                Insert::Full => Attempt::Failed(DropReason::TableFull),
            }
        };

        let wanted = reply_port(&reply);
        let protocol = view.key.protocol;
        let has_port = protocol.has_ports() || protocol.has_identifier(view.key.ports.destination());
        // Without SNAT, and for ICMP (all of which is steered to weir), the sender's own port is as good as any.
        if decision.snat.is_none() || !view.key.protocol.has_ports() {
            match attempt(A::handle(handles), &mut rival, reply) {
                Attempt::Free(opened) => return Ok(opened),
                Attempt::Failed(reason) => return Err(reason),
                Attempt::Taken if !has_port => return Err(DropReason::SnatExhausted),
                Attempt::Taken => {}
            }
        }
        let wanted = decision.snat.is_some().then_some(wanted);
        for _ in 0..SNAT_ROUNDS {
            let tried = snapshot.snat.allocate(wanted, &mut || random.next_u64(), |port| {
                attempt(A::handle(handles), &mut rival, with_reply_port(reply, port))
            });
            let opened = match tried {
                Ok(allocated) => Some(allocated.value),
                Err(AllocateError::Failed(reason)) => return Err(reason),
                Err(AllocateError::Exhausted) => {
                    let Some(Rival { conn, reply, .. }) = rival.take() else { break };
                    if !table.remove_expendable(A::handle(handles), conn, is_privileged, context.now, context.turn) {
                        continue;
                    }
                    counters.add(Counter::SnatDisplaced as usize, 1);
                    match attempt(A::handle(handles), &mut None, reply) {
                        Attempt::Free(opened) => Some(opened),
                        Attempt::Failed(reason) => return Err(reason),
                        Attempt::Taken => None,
                    }
                }
            };
            if let Some(opened) = opened {
                counters.add(Counter::SnatAllocated as usize, u64::from(opened.ours));
                return Ok(opened);
            }
        }
        Err(DropReason::SnatExhausted)
    }

    /// A fragment: the first of its packet takes the way of a whole one, the others follow it or wait for it.
    #[cold]
    fn part<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<A>,
        origin: Origin,
        hash: Hash,
        context: &Context<'_>,
    ) {
        let Some((key, extent)) = fragments::place(view, origin, packet.device) else {
            return self.track(driver, packet, view, origin, hash, context);
        };
        // Before a first that comes too late: what waits must not depend on how often upkeep is done.
        self.look_after_fragments::<A, D>(driver, context);
        let Some(slot) = A::fragments(self).datagram(&key, context.now) else {
            // The node's own are its kernel's to join, unless a connection claims them, which the first one tells.
            return match origin == Origin::Uplink && context.snapshot.forwarding.is_local(view.key.dst) {
                true if view.is_later_fragment() => self.punt(packet, &context.snapshot.forwarding),
                true => self.track(driver, packet, view, origin, hash, context),
                false => self.end(driver, packet, End::Drop(DropReason::FragmentLimit)),
            };
        };
        if let Err(reason) = A::fragments(self).note(slot, extent) {
            self.end(driver, packet, End::Drop(reason));
            return self.settle::<A, D>(driver, slot, context);
        }
        // A packet may be given up before its first fragment comes.
        if view.is_later_fragment() || A::fragments(self).fate(slot) != Fate::Unknown {
            return self.follow(driver, packet, view, slot, context);
        }
        let segment = self.observed(driver, &packet, view);
        self.outcome = Outcome::Sent;
        self.track(driver, packet, view, origin, hash, context);
        let table = A::table(context.tables);
        let fate = match (self.outcome, table.lookup(&view.key, hash, context.now, context.turn)) {
            (Outcome::Dropped(reason), _) => Fate::Drop(reason),
            (Outcome::Untracked, _) => Fate::Untracked,
            (_, Some(hit)) => {
                let to = table.conn(hit.conn).key(hit.direction.flip()).invert();
                Fate::Follow(Lead::new(view.key, to, &segment, extent.end))
            }
            (Outcome::Punted, None) => Fate::Punt,
            (Outcome::Sent, None) => Fate::Pass,
        };
        A::fragments(self).decide(slot, fate);
        self.settle::<A, D>(driver, slot, context);
    }

    /// Lets the fragments go that have waited for their packet's fate, which is known now; forgets the packet if it is complete.
    fn settle<A: Family, D: Driver>(&mut self, driver: &mut D, slot: Slot, context: &Context<'_>) {
        if A::fragments(self).fate(slot) == Fate::Unknown {
            return;
        }
        while let Some(waiting) = A::fragments(self).take_next(slot) {
            self.follow(driver, waiting.packet, &waiting.view, slot, context);
        }
        A::fragments(self).finish(slot);
    }

    /// Sends a later fragment after its first.
    fn follow<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<A>,
        slot: Slot,
        context: &Context<'_>,
    ) {
        let forwarding = &*context.snapshot.forwarding;
        match A::fragments(self).fate(slot) {
            Fate::Unknown => {
                let Err(packet) = A::fragments(self).hold(slot, packet, *view, context.now) else { return };
                // For the node itself: its kernel has more room. Any other packet will not be whole without this fragment.
                if self.is_for_node::<A>(slot, forwarding) {
                    return self.punt(packet, forwarding);
                }
                A::fragments(self).decide(slot, Fate::Drop(DropReason::FragmentOrphan));
                self.end(driver, packet, End::Drop(DropReason::FragmentOrphan));
                return self.settle::<A, D>(driver, slot, context);
            }
            Fate::Follow(lead) => match connection_of(&lead, view, context) {
                Ok((conn, direction)) => {
                    let view = View { key: lead.key, ..*view };
                    self.established(driver, packet, &view, &conn, direction, context);
                }
                Err(reason) => {
                    A::fragments(self).decide(slot, Fate::Drop(reason));
                    self.end(driver, packet, End::Drop(reason));
                }
            },
            Fate::Pass => match adjacency_to(context.snapshot, view.key.dst) {
                Some(hop) if matches!(forwarding.adjacency(hop).kind, RouteKind::Direct | RouteKind::Ipip) => {
                    self.forward(driver, packet, view, &view.key, hop, context);
                }
                _ => self.end(driver, packet, End::Drop(DropReason::NoRoute)),
            },
            Fate::Untracked => match adjacency_to(context.snapshot, view.key.dst) {
                Some(hop) => self.forward(driver, packet, view, &view.key, hop, context),
                None => self.end(driver, packet, End::Drop(DropReason::NoRoute)),
            },
            Fate::Punt => self.punt(packet, forwarding),
            Fate::Drop(reason) => self.end(driver, packet, End::Drop(reason)),
        }
        A::fragments(self).finish(slot);
    }

    /// Whether the packet came by an uplink and is for this node's own address.
    fn is_for_node<A: Family>(&mut self, slot: Slot, forwarding: &Forwarding) -> bool {
        A::fragments(self).uplink_destination(slot).is_some_and(|destination| forwarding.is_local(destination))
    }

    /// Ends the wait of fragments whose first does not come: those for the node itself are its kernel's, which may have it.
    fn look_after_fragments<A: Family, D: Driver>(&mut self, driver: &mut D, context: &Context<'_>) {
        while let Some(slot) = A::fragments(self).overdue(context.now) {
            let is_for_node = self.is_for_node::<A>(slot, &context.snapshot.forwarding);
            let fate = if is_for_node { Fate::Punt } else { Fate::Drop(DropReason::FragmentOrphan) };
            A::fragments(self).decide(slot, fate);
            self.settle::<A, D>(driver, slot, context);
            if is_for_node {
                // Its first, if it comes after all, is judged as any other.
                A::fragments(self).forget(slot);
            }
        }
    }

    /// Tells control the MAC address of a workload that it does not know yet.
    fn learn<A: Family>(&mut self, packet: &Packet, view: &View<A>, origin: Origin, context: &Context<'_>) {
        if matches!(origin, Origin::Workload(_))
            && context.snapshot.forwarding.neighbor(packet.device, view.key.src.to_ip()).is_none()
        {
            self.tell_learned(packet, view.key.src.to_ip());
        }
    }

    fn tell_learned(&mut self, packet: &Packet, address: IpAddr) {
        let mac = Mac(*packet.bytes()[6..].first_chunk().expect("an Ethernet header"));
        if !mac.is_group() {
            // A full channel loses nothing that the next packet does not bring again.
            let _ = self.events.try_send(Event::Learned { device: packet.device, address, mac });
        }
    }

    /// An ICMP error: about a packet of a connection, or nobody's. It keeps no connection alive and ends none (RFC 5508, REQ-3 to 5), but
    /// for one case: see [`tells_of_end`].
    fn icmp_error<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        mut packet: Packet,
        view: &View<A>,
        origin: Origin,
        context: &Context<'_>,
    ) {
        let forwarding = &*context.snapshot.forwarding;
        let table = A::table(context.tables);
        let tunnelled = if origin == Origin::Uplink { A::about_tunnelled(&mut packet, view, forwarding) } else { None };
        let view = tunnelled.as_ref().unwrap_or(view);
        let embedded = parse::parse_embedded::<A>(view.quote(packet.bytes())).filter(|embedded| {
            // Errors go to who sent what they quote; and what a pod was not sent, it has nothing to tell about.
            embedded.key.src == view.key.dst
                && match origin {
                    Origin::Workload(workload) => forwarding.local_workload(embedded.key.dst) == Some(workload),
                    Origin::Host | Origin::Uplink => true,
                }
        });
        let hit = embedded.as_ref().filter(|_| !view.is_redirect()).and_then(|embedded| {
            // The quoted packet went the other way; who sent the error answers it.
            let key = embedded.key.invert();
            table.lookup(&key, table.hash(&key), context.now, context.turn)
        });
        let (Some(embedded), Some(hit)) = (embedded, hit) else {
            return self.unrelated_icmp_error(driver, packet, view, origin, context);
        };
        let conn = table.conn(hit.conn);
        // Of what did not leave the node nobody outside has anything to tell.
        let has_left = |hop| matches!(forwarding.adjacency(hop).kind, RouteKind::Direct | RouteKind::Ipip);
        if origin == Origin::Uplink && !next_hop(&conn, hit.direction.flip(), context).is_some_and(has_left) {
            return self.end(driver, packet, End::Drop(DropReason::UnrelatedIcmpError));
        }
        let drains = match still_stands(&conn, hit.direction, DropReason::UnrelatedIcmpError, context) {
            Ok(drains) => drains,
            Err(reason) => return self.end(driver, packet, End::Drop(reason)),
        };
        if drains
            && tunnelled.is_none()
            && hit.direction == Direction::Reply
            && tells_of_end(&conn, &packet, view, origin, context)
            && self.checksum_ok(driver, &packet, view)
            // Who is second has a datagram of which the first knows nothing: its sender is told.
            && table.remove(A::handle(&mut self.handles), hit.conn, context.turn)
            && let Some(quoted) = returned(&packet, view, &conn)
            && self.checksum_ok(driver, &packet, &quoted)
        {
            return self.send_again(driver, packet, &quoted, &conn, context);
        }
        // The quoted packet may be one that the programs carried.
        if let Some(offload) = context.offload {
            offload.take_windows(&conn, hit.direction.flip());
        }
        if embedded.tcp_seq.is_some_and(|seq| !conn.may_be_in_flight(hit.direction.flip(), seq)) {
            return self.end(driver, packet, End::Drop(DropReason::UnrelatedIcmpError));
        }
        let arrived = conn.key(hit.direction);
        let inner_to = conn.key(hit.direction.flip());
        let to = inner_to.invert();
        // From the end itself, the error takes the address that the other end knows; a router keeps its own. But whatever goes to a
        // backend that knows its client by a masquerade address comes from there (RFC 5508, REQ-5): tunnels let nothing else pass.
        let is_masqueraded = hit.direction == Direction::Original && to.src != arrived.src;
        let outer_src = if view.key.src == arrived.src || is_masqueraded { to.src } else { view.key.src };
        let Some(adjacency) = next_hop(&conn, hit.direction, context) else {
            return self.end(driver, packet, End::Drop(DropReason::NoRoute));
        };
        rewrite::translate_icmp_error(packet.bytes_mut(), view, &embedded, outer_src, to.dst, &inner_to);
        let rewritten = View { key: FlowKey { src: outer_src, dst: to.dst, ..view.key }, ..*view };
        self.forward(driver, packet, &rewritten, &rewritten.key, adjacency, context);
    }

    /// Sends a datagram again that `packet` quotes, as its sender's first packet of a flow: the backend that it was for is no more.
    #[cold]
    fn send_again<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        mut packet: Packet,
        quoted: &View<A>,
        conn: &ConnRef<'_, A>,
        context: &Context<'_>,
    ) {
        let forwarding = &*context.snapshot.forwarding;
        let (original, device) = (conn.key(Direction::Original), IfIndex(conn.device()));
        let origin = forwarding.device_by_index(device).and_then(|id| Origin::of(forwarding.device(id)));
        let front = quoted.l3 - ETHERNET_BYTES as u16;
        let (Some(origin), Some(view)) = (origin, quoted.moved_up(front)) else {
            return self.end(driver, packet, End::Drop(DropReason::UnknownDevice));
        };
        driver.truncate(&mut packet, usize::from(quoted.end));
        packet.shrink_front(front);
        let bytes = packet.bytes_mut();
        // From a group's address nobody's MAC is learned: what came was not its sender's.
        rewrite::set_ethernet(bytes, Mac([0xff; 6]), Mac([0xff; 6]), A::ETHERTYPE);
        if let Err(reason) = rewrite::translate(bytes, &view, &original) {
            return self.end(driver, packet, End::Drop(reason));
        }
        packet.device = device;
        packet.through_tunnel = origin == Origin::Uplink && forwarding.is_tunnelled(original.src);
        self.count(Counter::SentAgain);
        self.first_packet(driver, packet, &View { key: original, ..view }, origin, context);
    }

    /// An ICMP error about no connection, or a redirect.
    fn unrelated_icmp_error<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<A>,
        origin: Origin,
        context: &Context<'_>,
    ) {
        let forwarding = &*context.snapshot.forwarding;
        if origin == Origin::Uplink && forwarding.is_local(view.key.dst) {
            return self.punt(packet, forwarding);
        }
        // Who is redirected is the sender on the router's own link, nobody behind weir (RFC 1812, 5.2.7.2).
        if view.is_redirect() {
            return self.end(driver, packet, End::Drop(DropReason::LinkScope));
        }
        // What the node's kernel answers another node's pod went past weir (see `first_packet`), and so may its errors.
        match adjacency_to(context.snapshot, view.key.dst) {
            Some(hop)
                if origin == Origin::Host
                    && matches!(forwarding.adjacency(hop).kind, RouteKind::Direct | RouteKind::Ipip) =>
            {
                self.forward(driver, packet, view, &view.key, hop, context);
            }
            _ => self.end(driver, packet, End::Drop(DropReason::UnrelatedIcmpError)),
        }
    }

    /// Sends a packet on its way: translate, count its hop, encapsulate, address it.
    fn forward<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        mut packet: Packet,
        view: &View<A>,
        to: &FlowKey<A>,
        adjacency: AdjacencyId,
        context: &Context<'_>,
    ) {
        let forwarding = &*context.snapshot.forwarding;
        let hop = forwarding.adjacency(adjacency);
        if hop.kind == RouteKind::Host {
            if *to != view.key
                && let Err(reason) = rewrite::translate(packet.bytes_mut(), view, to)
            {
                return self.end(driver, packet, End::Drop(reason));
            }
            return self.punt(packet, forwarding);
        }
        // Before anything is rewritten: an ICMP error quotes the packet as its sender knows it.
        if let Some((error, reason)) = obstacle(view, hop) {
            return self.answer_error(driver, packet, view, error, reason, context);
        }
        if *to != view.key
            && let Err(reason) = rewrite::translate(packet.bytes_mut(), view, to)
        {
            return self.end(driver, packet, End::Drop(reason));
        }
        rewrite::decrement_ttl(packet.bytes_mut(), view);
        if is_too_big(view, hop) {
            return self.fragment(driver, packet, to.dst, adjacency, context);
        }
        self.send(driver, packet, to.dst, adjacency, context);
    }

    /// Sends a whole packet to its next hop: tunnel header, Ethernet header, or waits for a MAC address.
    fn send<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        mut packet: Packet,
        destination: A,
        adjacency: AdjacencyId,
        context: &Context<'_>,
    ) {
        let forwarding = &*context.snapshot.forwarding;
        let hop = forwarding.adjacency(adjacency);
        let Some(device_id) = hop.device else {
            return self.end(driver, packet, End::Drop(DropReason::NoRoute));
        };
        let device = forwarding.device(device_id);
        let mut ethertype = A::ETHERTYPE;
        if let Encapsulation::Ipip { src, dst } = hop.encapsulation {
            if !packet.grow_front(IPIP_HEADER_BYTES) {
                return self.end(driver, packet, End::Drop(DropReason::TooBig));
            }
            // Only to tell the fragments of packets apart, which DF forbids (RFC 6864, 4.1): any number will do.
            self.tunnel_id = self.tunnel_id.wrapping_add(1);
            let id = self.tunnel_id;
            let (header, inner) = packet.bytes_mut()[ETHERNET_BYTES..].split_at_mut(usize::from(IPIP_HEADER_BYTES));
            rewrite::write_ipip_header(header, inner, src, dst, id);
            ethertype = Ipv4Addr::ETHERTYPE;
        }
        rewrite::set_ethernet(packet.bytes_mut(), hop.mac.unwrap_or_default(), device.mac, ethertype);
        packet.device = device.index;
        if hop.mac.is_some() {
            self.egress[usize::from(device.port.0)].push(packet);
            return;
        }
        // An unspecified next hop stands for the destination itself, on the link.
        let next_hop = if hop.next_hop.is_unspecified() { destination.to_ip() } else { hop.next_hop };
        if let Some(mac) = forwarding.neighbor(device.index, next_hop) {
            packet.bytes_mut()[..6].copy_from_slice(&mac.0);
            self.egress[usize::from(device.port.0)].push(packet);
            return;
        }
        let held = HeldPacket { packet, device: device.index, next_hop, since: context.now };
        match self.held.push(held) {
            Ok(true) => {
                // A full channel: the packets wait in vain and are counted as unresolved; the next ones ask again.
                let _ = self.events.try_send(Event::Resolve { device: device.index, address: next_hop });
            }
            Ok(false) => {}
            Err(packet) => self.end(driver, packet, End::Drop(DropReason::NeighborUnresolved)),
        }
    }

    /// Splits an IPv4 packet that is longer than the next hop's MTU; the pieces are sent, the packet is consumed.
    fn fragment<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        destination: A,
        adjacency: AdjacencyId,
        context: &Context<'_>,
    ) {
        let mtu = context.snapshot.forwarding.adjacency(adjacency).mtu as usize;
        // Taken and put back: the pieces are made of it while they are allocated.
        let mut buffer = std::mem::take(&mut self.whole);
        let frame = driver.arena().whole(&packet, &mut buffer);
        let Ok(Parsed::V4(view)) = parse::parse_ip(frame, ETHERNET_BYTES, Ipv4Addr::ETHERTYPE) else {
            self.whole = buffer;
            return self.end(driver, packet, End::Drop(DropReason::TooBig));
        };
        // All pieces or none: a receiver that gets a part waits for the rest in vain.
        let mut pieces: [Option<Packet>; MAX_FRAGMENTS] = [const { None }; MAX_FRAGMENTS];
        let mut next = pieces.iter_mut();
        let mut complete = true;
        let made = build::fragment_ipv4(frame, &view, mtu, |header, payload| {
            let piece = next.next().and_then(|place| {
                *place = Some(driver.packet_of(&[&[0; ETHERNET_BYTES], header, payload])?);
                Some(())
            });
            complete &= piece.is_some();
        });
        self.whole = buffer;
        let complete = complete && made > 0;
        for piece in pieces.into_iter().flatten() {
            if complete {
                self.count(Counter::Generated);
                self.send(driver, piece, destination, adjacency, context);
            } else {
                driver.release(piece);
            }
        }
        self.end(driver, packet, if complete { End::Consumed } else { End::Drop(DropReason::NoFrame) });
    }

    /// Hands a packet to the node's kernel.
    fn punt(&mut self, mut packet: Packet, forwarding: &Forwarding) {
        self.outcome = Outcome::Punted;
        if let Some(mac) = forwarding.adjacency(forwarding.host()).mac {
            let bytes = packet.bytes_mut();
            bytes[..6].copy_from_slice(&mac.0);
            bytes[6..12].copy_from_slice(&host_source(mac).0);
            let ethertype: u16 =
                if bytes[ETHERNET_BYTES] >> 4 == 4 { Ipv4Addr::ETHERTYPE } else { Ipv6Addr::ETHERTYPE };
            bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
        }
        self.punt_frame(packet);
    }

    /// Hands a frame to the node's kernel as it is.
    fn punt_frame(&mut self, mut packet: Packet) {
        packet.device = IfIndex::HOST;
        self.egress[usize::from(PortId::TRUNK.0)].push(packet);
    }

    /// ARP: answered for the gateway and the node's addresses on workload devices; the kernel's on uplinks.
    fn arp<D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        arp: &Arp,
        origin: Origin,
        device: DeviceId,
        context: &Context<'_>,
    ) {
        let forwarding = &*context.snapshot.forwarding;
        let workload = match origin {
            Origin::Uplink => return self.punt_frame(packet),
            Origin::Host => return self.end(driver, packet, End::Drop(DropReason::LinkScope)),
            Origin::Workload(workload) => workload,
        };
        // An address probe (RFC 5227) has no sender address; it is nobody's to answer.
        if forwarding.local_workload(arp.sender_ip) != Some(workload) {
            return self.end(driver, packet, End::Drop(DropReason::SpoofedSource));
        }
        if forwarding.neighbor(packet.device, IpAddr::V4(arp.sender_ip)).is_none() {
            self.tell_learned(&packet, IpAddr::V4(arp.sender_ip));
        }
        let ours = arp.target_ip == GATEWAY || forwarding.is_local(arp.target_ip);
        if arp.operation == Arp::REQUEST && ours {
            let mac = forwarding.device(device).mac;
            self.answer_link(driver, packet.device, forwarding, device, |out| build::arp_reply(out, arp, mac));
        }
        self.end(driver, packet, End::Consumed);
    }

    /// Link-scope traffic of a workload: neighbour solicitations for its gateway are answered, all else ends here.
    fn neighbor_solicitation<D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<Ipv6Addr>,
        device_id: DeviceId,
        context: &Context<'_>,
    ) {
        let forwarding = &*context.snapshot.forwarding;
        let device = forwarding.device(device_id);
        // Also from its answer to the kernel, which asked for it on weir's behalf.
        if let Some(workload) = device.workload.filter(|w| forwarding.local_workload(view.key.src) == Some(*w)) {
            self.learn(&packet, view, Origin::Workload(workload), context);
        }
        // Of several frames: no neighbour has so much to tell.
        let target = if packet.has_tail() { None } else { build::solicited_target(packet.bytes(), view) };
        let Some(target) = target else {
            return self.end(driver, packet, End::Drop(DropReason::LinkScope));
        };
        // Without a link-local address of its own, the device answers for any that the pod takes for its gateway.
        let gateway = target.is_unicast_link_local() && device.link_local.is_none_or(|own| own == target);
        if gateway || forwarding.is_local(target) {
            let mac = device.mac;
            self.answer_link(driver, packet.device, forwarding, device_id, |out| {
                build::neighbor_advertisement(out, packet.bytes(), view, mac)
            });
        }
        self.end(driver, packet, End::Consumed);
    }

    /// Sends a link-layer answer back by the device that asked.
    fn answer_link<D: Driver>(
        &mut self,
        driver: &mut D,
        asked_from: IfIndex,
        forwarding: &Forwarding,
        device: DeviceId,
        write: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) {
        let Some(mut answer) = driver.allocate() else { return };
        answer.set_len(ONE_FRAME_BYTES);
        match write(answer.bytes_mut()) {
            Some(length) => {
                answer.set_len(length);
                answer.device = asked_from;
                self.count(Counter::Generated);
                self.egress[usize::from(forwarding.device(device).port.0)].push(answer);
            }
            None => driver.release(answer),
        }
    }

    /// Drops a packet that may not go on, and tells its sender: TCP by a RST, others by an ICMP error.
    fn reject<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<A>,
        reason: DropReason,
        context: &Context<'_>,
    ) {
        let error = match reason {
            DropReason::NoSuchPod => IcmpError::HostUnreachable,
            DropReason::NoRoute => IcmpError::NetUnreachable,
            _ => IcmpError::PortUnreachable,
        };
        if view.key.protocol == Protocol::TCP && error == IcmpError::PortUnreachable {
            if self.resets.take(context.now) {
                self.generate(driver, &packet, view.key.src, context, |out, frame, _| {
                    build::tcp_reset(out, frame, view)
                });
            }
            return self.end(driver, packet, End::Drop(reason));
        }
        self.answer_error(driver, packet, view, error, reason, context);
    }

    /// Drops a packet and sends its sender an ICMP error.
    fn answer_error<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: Packet,
        view: &View<A>,
        error: IcmpError,
        reason: DropReason,
        context: &Context<'_>,
    ) {
        if self.errors.take(context.now) {
            self.generate(driver, &packet, view.key.src, context, |out, frame, source| {
                // The node's own process that asked from a loopback address takes an answer from there only.
                let source = if view.key.src.is_loopback() { Some(view.key.dst) } else { source };
                build::icmp_error(out, frame, view, source?, error)
            });
        }
        self.end(driver, packet, End::Drop(reason));
    }

    /// Answers `packet` by one to `destination`, and routes that there. `write` gets the whole frame that it is an answer to, and
    /// this node's address on the way there.
    fn generate<A: Family, D: Driver>(
        &mut self,
        driver: &mut D,
        packet: &Packet,
        destination: A,
        context: &Context<'_>,
        write: impl FnOnce(&mut [u8], &[u8], Option<A>) -> Option<usize>,
    ) {
        let forwarding = &*context.snapshot.forwarding;
        let Some(adjacency) = adjacency_to(context.snapshot, destination) else { return };
        let Some(mut answer) = driver.allocate() else { return };
        answer.set_len(ONE_FRAME_BYTES);
        let frame = driver.arena().whole(packet, &mut self.whole);
        let Some(length) = write(answer.bytes_mut(), frame, forwarding.address_towards(adjacency)) else {
            return driver.release(answer);
        };
        answer.set_len(length);
        self.count(Counter::Generated);
        if forwarding.adjacency(adjacency).kind == RouteKind::Host {
            self.punt(answer, forwarding);
        } else {
            self.send(driver, answer, destination, adjacency, context);
        }
    }
}

// What needs all bytes of a packet, which may lie in several frames.
impl Pipeline {
    /// Whether the layer-4 checksum is right, or there is none to judge.
    #[inline]
    fn checksum_ok<A: Address>(&mut self, driver: &impl Driver, packet: &Packet, view: &View<A>) -> bool {
        parse::l4_checksum_ok(driver.arena().whole(packet, &mut self.whole), view)
    }

    /// What conntrack needs to know of a packet.
    #[inline]
    fn observed<A: Address>(&mut self, driver: &impl Driver, packet: &Packet, view: &View<A>) -> Observed {
        match view.key.protocol {
            Protocol::TCP => {
                let frame = packet.bytes();
                let tcp = view.tcp(frame);
                let options = TcpOptions::read(view.tcp_options(frame), &tcp);
                Observed {
                    tcp_flags: tcp.flags,
                    tcp_seq: tcp.seq,
                    tcp_ack: tcp.ack,
                    tcp_window: tcp.window,
                    tcp_options: options,
                    payload_bytes: tcp.payload_bytes,
                    ..Observed::default()
                }
            }
            // Its chunks lie anywhere in the packet.
            Protocol::SCTP => {
                let frame = driver.arena().whole(packet, &mut self.whole);
                Observed { sctp: SctpPacket::read(view.l4_slice(frame)), ..Observed::default() }
            }
            _ => Observed::default(),
        }
    }

    /// What a packet may do with its connection, if that does not stand any more. One that is damaged begins nothing.
    #[cold]
    fn claim<A: Family>(
        &mut self,
        driver: &impl Driver,
        packet: &Packet,
        view: &View<A>,
        conn: &ConnRef<'_, A>,
        direction: Direction,
        now: Tick,
    ) -> Claim {
        if !is_connection(view.key.protocol) {
            return match self.checksum_ok(driver, packet, view) {
                true => Claim::of_datagram(conn, direction, now),
                false => Claim::Rides,
            };
        }
        let segment = self.observed(driver, packet, view);
        let opens = match view.key.protocol {
            Protocol::SCTP => segment.sctp.is_init(),
            _ => segment.opening(&view.key) == Opening::Opens,
        };
        if !opens || !self.checksum_ok(driver, packet, view) {
            Claim::Rides
        } else if conn.is_opened_again_by(direction, &segment) {
            Claim::OpensAgain
        } else {
            Claim::Opens
        }
    }

    /// Whether a packet to or from the node itself that a host endpoint's policy for first packets denies may be an answer: to what the
    /// node's kernel asked, or of it to who asked. One half of such a connection passes without weir, so nothing remembers it; but what
    /// opens nothing can only be such an answer, or dies at its receiver. A TCP segment to a port that the node listens on is none: the
    /// kernel asks from other ports. So what is open to the node is cut when a policy forbids it.
    #[inline]
    fn answers_node<A: Family>(
        &mut self,
        driver: &impl Driver,
        packet: &Packet,
        view: &View<A>,
        decision: &Decision<'_, A>,
        context: &Context<'_>,
    ) -> bool {
        let denied = decision.verdict == Verdict::Drop(DropReason::PolicyDeniedHostEndpoint);
        denied && decision.service.is_none() && self.may_answer(driver, packet, view, decision, context)
    }

    #[cold]
    fn may_answer<A: Family>(
        &mut self,
        driver: &impl Driver,
        packet: &Packet,
        view: &View<A>,
        decision: &Decision<'_, A>,
        context: &Context<'_>,
    ) -> bool {
        let (key, forwarding) = (&view.key, &context.snapshot.forwarding);
        match decision.host.denied_at() {
            Some(HostStage::Local) => {}
            // Denied before services were looked at.
            Some(HostStage::PreDnat)
                if forwarding.is_local(key.dst) && !context.snapshot.rules.services.services::<A>().claims(key) => {}
            _ => return false,
        }
        if matches!(self.observed(driver, packet, view).opening(key), Opening::Opens) {
            return host_policy::may_answer_failsafe(context.snapshot, key);
        }
        let is_listened_to = key.protocol == Protocol::TCP
            && forwarding.is_local(key.dst)
            && forwarding.listens(key.ports.destination());
        !is_listened_to
    }
}

/// Takes the outer header off an IPIP packet, if its sender is the cluster node that owns the inner source.
fn decapsulate(
    packet: &mut Packet,
    view: &View<Ipv4Addr>,
    forwarding: &Forwarding,
) -> Result<View<Ipv4Addr>, DropReason> {
    let sender = forwarding.node_by_address(view.key.src).filter(|n| forwarding.this_node() != Some(*n));
    let Some(sender) = sender.filter(|_| forwarding.is_local(view.key.dst)) else {
        return Err(DropReason::TunnelUnknownPeer);
    };
    let inner = parse::inner_of_ipip(packet.bytes(), view)?;
    if forwarding.node_of(inner.key.src) != Some(sender) {
        return Err(DropReason::TunnelForeignSource);
    }
    let tos = rewrite::decapsulated_tos(view.tos, inner.tos).ok_or(DropReason::MalformedHeader)?;
    rewrite::apply_tos(packet.bytes_mut(), &inner, tos);
    let outer_bytes = view.l4 - view.l3;
    // The Ethernet header moves along, so that an answer finds whom the frame came from.
    packet.bytes_mut().copy_within(..ETHERNET_BYTES, usize::from(outer_bytes));
    packet.shrink_front(outer_bytes);
    packet.through_tunnel = true;
    let moved = inner.moved_up(outer_bytes).ok_or(DropReason::TunnelNested)?;
    Ok(View { tos, ..moved })
}

/// The port at the translated source's end: where replies go to.
fn reply_port<A: Address>(reply: &FlowKey<A>) -> u16 {
    if reply.protocol.is_icmp() { reply.ports.source() } else { reply.ports.destination() }
}

/// `reply` with another port (ICMP: identifier) at the translated source's end.
fn with_reply_port<A: Address>(mut reply: FlowKey<A>, port: u16) -> FlowKey<A> {
    reply.ports = if reply.protocol.is_icmp() {
        Ports::new(port, reply.ports.destination())
    } else {
        Ports::new(reply.ports.source(), port)
    };
    reply
}

/// What keeps a packet from going on to `hop`, which its sender is to know.
#[inline]
fn obstacle<A: Address>(view: &View<A>, hop: &Adjacency) -> Option<(IcmpError, DropReason)> {
    if hop.kind == RouteKind::Host {
        None
    } else if view.ttl <= 1 {
        Some((IcmpError::TtlExceeded, DropReason::TtlExpired))
    } else if is_too_big(view, hop) && (view.dont_fragment || A::BITS == 128) {
        Some((IcmpError::TooBig { mtu: hop.mtu }, DropReason::TooBig))
    } else {
        None
    }
}

#[inline]
fn is_too_big<A: Address>(view: &View<A>, hop: &Adjacency) -> bool {
    u32::from(view.end - view.l3) > hop.mtu
}

/// A next hop as a connection keeps it: the adjacency, and the low half of the generation that numbers adjacencies so.
///
/// Two workers whose turns began on both sides of a publication may judge one connection at once and overwrite each other's words, so
/// each word tells by itself whose it is. Half a generation number is enough: the other half would have to pass within one turn.
#[inline]
fn hop_word(generation: u32, adjacency: Option<AdjacencyId>) -> u32 {
    generation << 16 | u32::from(adjacency.map_or(NO_HOP, |a| a.0))
}

/// Both directions' next hops of a connection whose answers have the key `answers`.
///
/// Answers from or to an address that no router may forward, as from a backend with a link-local one, are refused when they are parsed. The
/// straight way does not look for that: it finds no next hop of its generation in such a connection, and the general way asks for it each time.
fn hop_words<A: Family>(snapshot: &Snapshot, answers: &FlowKey<A>, hops: [Option<AdjacencyId>; 2]) -> [u32; 2] {
    let is_usual = may_be_forwarded(answers.src, answers.dst);
    let generation = if is_usual { snapshot.generation } else { !snapshot.generation };
    hops.map(|adjacency| hop_word(generation, adjacency))
}

/// The adjacency of a direction's packets: the connection's own, or, where a worker with other tables wrote it, what these tables say.
#[inline]
fn next_hop<A: Family>(conn: &ConnRef<'_, A>, direction: Direction, context: &Context<'_>) -> Option<AdjacencyId> {
    let word = conn.next_hop(direction);
    if word >> 16 == context.snapshot.generation & 0xffff {
        let number = word as u16;
        return (number != NO_HOP).then_some(AdjacencyId(number));
    }
    adjacency_to(context.snapshot, conn.key(direction.flip()).src)
}

fn adjacency_to<A: Family>(snapshot: &Snapshot, destination: A) -> Option<AdjacencyId> {
    // Who asked from a loopback address is the node itself; no route leads there.
    if destination.is_loopback() {
        return Some(snapshot.forwarding.host());
    }
    match snapshot.forwarding.route(destination) {
        Route::Via(adjacency) => Some(adjacency),
        Route::NoSuchPod | Route::None => None,
    }
}

/// Whether a packet may bring its connection from one state to another: not the data and acknowledgments of an established one, nor
/// what the opener of an unanswered flow repeats. Only for such packets is the layer-4 checksum looked at.
#[inline]
fn may_change_state<A: Family>(conn: &ConnRef<'_, A>, direction: Direction, segment: &Observed) -> bool {
    match conn.protocol() {
        Protocol::TCP => segment.tcp_flags & (TcpFields::SYN | TcpFields::FIN | TcpFields::RST) != 0 || !conn.assured(),
        Protocol::SCTP => !segment.sctp.moves_nothing() || !conn.assured(),
        _ => direction == Direction::Reply && !conn.seen_reply(),
    }
}

/// Follows a packet in its connection, which the programs may have followed meanwhile.
#[inline(always)]
fn follow<A: Family>(
    conn: &ConnRef<'_, A>,
    direction: Direction,
    segment: &Observed,
    context: &Context<'_>,
) -> Tracked {
    let Some(offload) = context.offload else { return conn.track(direction, segment, context.now) };
    offload.take_windows(conn, direction);
    let tracked = conn.track(direction, segment, context.now);
    if tracked == Tracked::Accept {
        offload.consider(conn, direction);
    }
    tracked
}

/// Whether a packet of a connection comes from where its source was found to be when the connection was judged, by these tables: then its
/// source needs no further check. Replies come from the device that the original direction's packets leave by.
#[inline]
fn comes_as_expected<A: Family>(
    conn: &ConnRef<'_, A>,
    direction: Direction,
    device: IfIndex,
    context: &Context<'_>,
) -> bool {
    if direction == Direction::Original {
        return conn.device() == device.0;
    }
    let forwarding = &*context.snapshot.forwarding;
    next_hop(conn, Direction::Original, context).is_some_and(|hop| {
        let leaves_by = forwarding.adjacency(hop).device;
        leaves_by.is_some_and(|id| forwarding.device(id).index == device)
    })
}

/// Whether a connection stands by these tables, for what rides on it: an ICMP error, a later fragment; then whether its backend drains. Why
/// not, where it does not; `anew` where its next packet would open another. It is left as it is to its own packets.
fn still_stands<A: Family>(
    conn: &ConnRef<'_, A>,
    direction: Direction,
    anew: DropReason,
    context: &Context<'_>,
) -> Result<bool, DropReason> {
    if !is_stale(conn, context.snapshot) {
        return Ok(false);
    }
    match rejudge(conn, Claim::of_data(conn.protocol(), direction), context) {
        Rejudged::Keep => Ok(false),
        Rejudged::Drains => Ok(true),
        Rejudged::Cut(reason) | Rejudged::Reset(reason) => Err(reason),
        Rejudged::Anew => Err(anew),
    }
}

/// Whether an ICMP error that travels back along a flow says that the flow's backend, which drains, is no more: its pod's kernel has nobody
/// at the port, or the node that it was on has no such pod. As the first of these comes from the pod's own address, by where its answers
/// come from, no pod can say so of another; no more can anybody outside who could not answer in its name as well.
#[cold]
fn tells_of_end<A: Family>(
    conn: &ConnRef<'_, A>,
    packet: &Packet,
    view: &View<A>,
    origin: Origin,
    context: &Context<'_>,
) -> bool {
    let forwarding = &*context.snapshot.forwarding;
    let (backend, teller) = (conn.key(Direction::Reply).src, view.key.src);
    // What goes to this node itself takes no tunnel.
    let comes_by_tunnel =
        packet.through_tunnel || !forwarding.is_tunnelled(backend) || forwarding.is_local(view.key.dst);
    if !comes_as_expected(conn, Direction::Reply, packet.device, context) || !comes_by_tunnel {
        return false;
    }
    // RFC 792: host unreachable, port unreachable; RFC 4443, 3.1: address unreachable, port unreachable.
    let [host, port] = if A::WORDS == 1 { [(3, 1), (3, 3)] } else { [(1, 3), (1, 4)] };
    let said = view.icmp(packet.bytes());
    if said == Some(port) {
        return teller == backend;
    }
    let node = forwarding.node_by_address(teller);
    said == Some(host) && origin == Origin::Uplink && node.is_some() && node == forwarding.node_of(backend)
}

/// The datagram that an ICMP error about a flow quotes, if all of it is there and it was its opener's indeed: whoever sends the error could
/// speak in the opener's name otherwise.
#[cold]
fn returned<A: Family>(packet: &Packet, view: &View<A>, conn: &ConnRef<'_, A>) -> Option<View<A>> {
    let frame = packet.bytes();
    if packet.has_tail() {
        return None;
    }
    let start = frame.len().min(usize::from(view.end)) - view.quote(frame).len();
    let parsed = parse::parse_ip(&frame[..usize::from(view.end)], start, A::ETHERTYPE);
    let quoted = A::of(parsed.ok()?).filter(|quoted| quoted.kind == Kind::Flow)?;
    let payload = payload(frame, &quoted)?;
    (quoted.key.invert() == conn.key(Direction::Reply) && conn.is_noted(payload)).then_some(quoted)
}

/// Remembers a datagram that goes to a backend that drains, in case that it comes back.
#[cold]
fn note<A: Family>(packet: &Packet, view: &View<A>, conn: &ConnRef<'_, A>, direction: Direction) {
    if direction == Direction::Original
        && view.kind == Kind::Flow
        && view.ip_bytes() as usize <= MOST_QUOTED_BYTES
        && !packet.has_tail()
        && let Some(payload) = payload(packet.bytes(), view)
    {
        conn.note_datagram(payload);
    }
}

/// What a UDP datagram carries: all of it that no translation changes.
fn payload<'f, A: Address>(frame: &'f [u8], view: &View<A>) -> Option<&'f [u8]> {
    const UDP_HEADER_BYTES: usize = 8;
    if view.key.protocol == Protocol::UDP { view.l4_slice(frame).get(UDP_HEADER_BYTES..) } else { None }
}

/// The connection by which a first fragment went, for one of those that follow; why not, where it would not go there any more.
fn connection_of<'t, A: Family>(
    lead: &Lead<A>,
    view: &View<A>,
    context: &Context<'t>,
) -> Result<(ConnRef<'t, A>, Direction), DropReason> {
    let table = A::table(context.tables);
    let hit = table.lookup(&lead.key, table.hash(&lead.key), context.now, context.turn).ok_or(DropReason::Invalid)?;
    let (conn, direction) = (table.conn(hit.conn), hit.direction);
    if conn.key(direction.flip()).invert() != lead.to {
        return Err(DropReason::Invalid);
    }
    still_stands(&conn, direction, DropReason::Invalid, context)?;
    if let Kind::LaterFragment { offset, bytes, more: false, .. } = view.kind
        && let Some(segment) = lead.whole_segment(offset + bytes)
        && follow(&conn, direction, &segment, context) != Tracked::Accept
    {
        return Err(DropReason::Invalid);
    }
    Ok((conn, direction))
}

/// A connection that may be displaced for its reply key, and how gladly.
struct Rival<A: Address> {
    worth: Expendable,
    conn: ConnId,
    reply: FlowKey<A>,
}

/// A connection for a packet that had none.
struct Opened {
    hit: Hit,
    /// Whether this packet opened it, rather than one of another worker.
    ours: bool,
}

/// What a packet may do where its connection does not stand any more, or is over.
///
/// | | a backend or device that is gone | a backend that drains | a service that appeared | a way out that changed | a policy that denies |
/// |---|---|---|---|---|---|
/// | [`Claim::Rides`] | the connection ends (TCP whose backend is gone: RST) | goes on | goes on without it | goes on | cuts it |
/// | [`Claim::Opens`] | opens anew | goes on; datagrams open anew where this node knows that its pod is gone | datagrams open anew | datagrams open anew | cuts it |
/// | [`Claim::Moves`] | opens anew | opens anew | opens anew | opens anew | cuts it |
/// | [`Claim::OpensAgain`] | opens anew | goes on | opens anew | opens anew | opens anew, and is judged as a first packet |
///
/// A masqueraded connection's way out has changed where it would get another source address now. Where the node does not even have the one
/// that it got, that is as if its backend were gone.
///
/// A backend drains ([`Standing::Drains`]) while it terminates and serves, with others to come to. Its process may end at any moment, before
/// anybody tells that it serves no more. A flow of datagrams there is judged again at each packet ([`Rejudged::Drains`]).
///
/// A connection that stands is asked itself: a SYN in the middle of an established or closing one is its receiver's to answer (RFC 5961, 4),
/// one that repeats an unanswered one goes where that went, and one on a connection that is over opens anew ([`Tracked::NewFlow`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Claim {
    /// It only goes on with the connection.
    Rides,
    /// It would open a connection if it had none, but this one is known to both ends; or it is a datagram of who opened the flow.
    Opens,
    /// It is a datagram of who opened a flow that nothing holds to its backend: no stream, and no answer is awaited.
    Moves,
    /// It opens one, as this one is over or was never answered ([`ConnRef::is_opened_again_by`]).
    OpensAgain,
}

impl Claim {
    /// Of a packet in the middle of a flow.
    fn of_data(protocol: Protocol, direction: Direction) -> Self {
        match direction {
            Direction::Original if !is_connection(protocol) => Self::Opens,
            // What still comes from a backend that is gone must not reach the client in the backend's own name.
            _ => Self::Rides,
        }
    }

    /// Of a packet of a flow without connection. A stream (netfilter's ASSURED) may be a session that only its backend knows (QUIC), and so
    /// may what is about to become one: who has got an answer just now may wait for another.
    fn of_datagram<A: Family>(conn: &ConnRef<'_, A>, direction: Direction, now: Tick) -> Self {
        match Self::of_data(conn.protocol(), direction) {
            Self::Opens if !conn.assured() && (!conn.seen_reply() || now.since(conn.last_seen()) >= QUIET_TICKS) => {
                Self::Moves
            }
            other => other,
        }
    }
}

/// Whether both ends of the protocol's flows know when one begins and ends.
fn is_connection(protocol: Protocol) -> bool {
    matches!(protocol, Protocol::TCP | Protocol::SCTP)
}

/// Whether a connection is to be judged by these tables: an earlier generation judged it, or none. Not one that a later generation has judged
/// already, on another worker whose turn began after the next publication: these tables may not even know its backend yet.
#[inline]
fn is_stale<A: Family>(conn: &ConnRef<'_, A>, snapshot: &Snapshot) -> bool {
    let (judged_by, current) = (conn.generation(), snapshot.generation);
    judged_by != current && (judged_by == NO_GENERATION || (judged_by.wrapping_sub(current) as i32) < 0)
}

/// What becomes of a connection that another generation judged.
enum Rejudged {
    /// It goes on.
    Keep,
    /// It goes on, and its next packet is to be judged again: its backend drains.
    Drains,
    /// It ends: a policy denies it now, or what it needs is gone, which nobody can be told.
    Cut(DropReason),
    /// It ends, and both ends are told: its backend, or its address, is gone.
    Reset(DropReason),
    /// It ends, and the packet opens a new one.
    Anew,
}

/// The source MAC address of what is handed to the node's kernel at `mac`: never one of the trunk's own form, which names a device.
pub(crate) fn host_source(Mac([a, b, c, d, e, f]): Mac) -> Mac {
    Mac([a, b, c, d, e, f ^ 1])
}

/// The flags of a new connection.
fn flags<A: Family>(origin: Origin, decision: &Decision<'_, A>, context: &Context<'_>) -> u8 {
    let forwarding = &*context.snapshot.forwarding;
    let leads_to = decision.adjacency().map(|hop| forwarding.adjacency(hop).kind);
    let privilege = if origin == Origin::Host { PRIVILEGED } else { 0 };
    match (origin, leads_to) {
        // The programs are where pods are; between uplinks workers are as fast, or faster.
        (Origin::Workload(_), Some(_)) | (_, Some(RouteKind::Workload)) if context.offload.is_some() => {
            privilege | offload::CANDIDATE
        }
        _ => privilege,
    }
}

/// Judges a connection again, and notes the outcome.
fn rejudge<A: Family>(conn: &ConnRef<'_, A>, claim: Claim, context: &Context<'_>) -> Rejudged {
    let snapshot = context.snapshot;
    let Judged { stamps, translated_to, source, drains, begins_anew } = match judge_again(conn, claim, snapshot) {
        Ok(judged) => judged,
        Err(rejudged) => return rejudged,
    };
    if stamps != conn.stamps()[..2] {
        let [.., backend_stamp] = conn.stamps();
        conn.set_stamps([stamps[0], stamps[1], backend_stamp]);
    }
    let hops = [translated_to, source].map(|destination| adjacency_to(snapshot, destination));
    conn.set_next_hops(hop_words(snapshot, &conn.key(Direction::Reply), hops));
    if drains {
        return Rejudged::Drains;
    }
    if !begins_anew {
        conn.set_generation(snapshot.generation);
    }
    Rejudged::Keep
}

/// Whether a connection goes on by these tables as it is, with nothing to be looked at in each packet; why not. Notes nothing.
pub(crate) fn stands<A: Family>(conn: &ConnRef<'_, A>, snapshot: &Snapshot) -> Result<(), Stays> {
    match judge_again(conn, Claim::of_data(conn.protocol(), Direction::Original), snapshot) {
        Ok(Judged { drains: false, .. }) => Ok(()),
        Ok(Judged { drains: true, .. }) => Err(Stays::Drains),
        Err(_) => Err(Stays::Unsettled),
    }
}

/// What a connection is to remember of its judgement.
struct Judged<A> {
    stamps: [u32; 2],
    translated_to: A,
    source: A,
    drains: bool,
    /// A flow of datagrams goes on only until who opened it sends one, whoever's comes before.
    begins_anew: bool,
}

/// Judges a connection again, by its original key, its device and its stored DNAT; how it ends, if it does.
fn judge_again<A: Family>(conn: &ConnRef<'_, A>, claim: Claim, snapshot: &Snapshot) -> Result<Judged<A>, Rejudged> {
    let forwarding = &*snapshot.forwarding;
    let original = conn.key(Direction::Original);
    let reply = conn.key(Direction::Reply);
    let translated = {
        let mut key = reply.invert();
        key.src = original.src;
        key.ports = if key.protocol.is_icmp() {
            original.ports
        } else {
            Ports::new(original.ports.source(), key.ports.destination())
        };
        key
    };

    let services = snapshot.rules.services.services::<A>();
    // A backend may be the very frontend: then only the stamp tells that a service led there.
    let [.., backend_stamp] = conn.stamps();
    let was_translated = backend_stamp != 0 || (translated.dst, translated.ports) != (original.dst, original.ports);
    let standing = match was_translated {
        true => services.standing(&original, translated.dst, translated.ports.destination()),
        false => Standing::Stays,
    };
    if standing == Standing::Gone {
        return Err(match claim {
            Claim::Opens | Claim::Moves | Claim::OpensAgain => Rejudged::Anew,
            Claim::Rides if original.protocol == Protocol::TCP => Rejudged::Reset(DropReason::BackendGone),
            Claim::Rides => Rejudged::Cut(DropReason::BackendGone),
        });
    }
    // A connection ends with its pod, and both ends know it.
    let drains = standing == Standing::Drains && !is_connection(original.protocol);
    if drains {
        match claim {
            Claim::Moves => return Err(Rejudged::Anew),
            Claim::Opens if forwarding.route(translated.dst) == Route::NoSuchPod => return Err(Rejudged::Anew),
            Claim::Opens | Claim::Rides | Claim::OpensAgain => {}
        }
    }
    // A service appeared at this address. Connections that are known to both ends go on without it.
    let is_taken_over = match claim {
        Claim::Rides => false,
        Claim::Opens => !is_connection(original.protocol),
        Claim::Moves | Claim::OpensAgain => true,
    };
    let mut begins_anew = !was_translated && services.claims(&original);
    if begins_anew && is_taken_over {
        return Err(Rejudged::Anew);
    }

    let device = forwarding.device_by_index(IfIndex(conn.device()));
    let Some(origin) = device.and_then(|id| Origin::of(forwarding.device(id))) else {
        // Who opened it has gone with its device; who has its address now opens anew.
        return Err(match claim {
            Claim::Opens | Claim::Moves | Claim::OpensAgain => Rejudged::Anew,
            Claim::Rides => Rejudged::Cut(DropReason::UnknownDevice),
        });
    };
    let through_tunnel = forwarding.is_tunnelled(original.src);
    let arrival = Arrival::by(origin, IfIndex(conn.device()), through_tunnel, forwarding);
    let stamps = decide::policy_stamps(snapshot, arrival, &translated);
    // Of what an earlier process judged there are no stamps, which is how those of a pod look that has no object yet.
    if (stamps != conn.stamps()[..2] || conn.generation() == NO_GENERATION)
        && let Err(reason) = decide::judge_again(snapshot, arrival, &original, &translated)
    {
        // Another backend may be allowed, or nothing is: what opens is judged as what it is, and counted and logged as such.
        return Err(if claim == Claim::OpensAgain { Rejudged::Anew } else { Rejudged::Cut(reason) });
    }
    if reply.dst != original.src
        && let Some(adjacency) = adjacency_to(snapshot, translated.dst)
        && let source = decide::masquerade_source(forwarding, origin, adjacency)
        && source != Some(reply.dst)
    {
        // The way out is another one, whose link may not bring answers to the address that it had; or the node has not that address any more.
        let is_gone = !forwarding.is_local(reply.dst) && forwarding.loopback_source() != Some(reply.dst);
        match claim {
            Claim::Moves | Claim::OpensAgain => return Err(Rejudged::Anew),
            Claim::Opens if is_gone || !is_connection(original.protocol) => return Err(Rejudged::Anew),
            // Whoever has it now would get the answers.
            Claim::Rides if is_gone => {
                return Err(match original.protocol {
                    Protocol::TCP => Rejudged::Reset(DropReason::AddressGone),
                    _ => Rejudged::Cut(DropReason::AddressGone),
                });
            }
            // Both ends know that address; answers may come by the old way yet.
            Claim::Opens | Claim::Rides => begins_anew = true,
        }
    }
    begins_anew &= !is_connection(original.protocol);
    Ok(Judged { stamps, translated_to: translated.dst, source: original.src, drains, begins_anew })
}
