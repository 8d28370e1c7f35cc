//! What happens to the packets of a burst: parse, admit, track, translate, forward.
//!
//! [`process_burst`] is a plain function of a burst, a [`Context`] (snapshot, tables, clock) and the worker's own [`Pipeline`]
//! (counters, random source, held packets); any driver will do, none is needed to test it. Packets are handled in the order in which they
//! came. Nearly all go the straight way (straight.rs); the others, and those that it refuses, go the general one, which knows every rule. What
//! first packets need is read ahead for all of a burst (ahead.rs).
//!
//! # The stages of the general way
//! In the order of a packet's life; each is a file:
//!
//! | stage | what is found out | file |
//! |---|---|---|
//! | admit | where the packet came from, its headers, whether it is to be routed | admit.rs |
//! | link | what neighbours ask: ARP, neighbour solicitations | link.rs |
//! | tunnel | what a tunnel packet carries | tunnel.rs |
//! | fragments | which packet a fragment is of, and how that one's first went | fragments.rs |
//! | track | the connection, and whether it stands by these tables ([`crate::rejudge`]) | track.rs |
//! | first | what the tables say of a packet without one ([`crate::decide`]) | first.rs |
//! | open | the new connection, and a source port where it is translated | open.rs |
//! | ICMP errors | the connection that one is about | icmp.rs |
//! | forward | translate, count the hop, split | forward.rs |
//! | send | tunnel and link headers, or wait for a MAC address | send.rs |
//! | answer | what a sender is told about a packet that may not go on | answer.rs |
//!
//! A stage looks at a packet, may rewrite it, and returns: first where it goes ([`Course`]), in the end how it ends ([`End`]), or why it is
//! dropped. Here alone packets are moved to where they end, but for fragments that wait for their first. Every packet that comes in ends in
//! exactly one of: transmitted, punted, dropped with a reason, consumed, held (asserted over whole runs, see [`crate::counters`]). What is
//! to be sent is sent by [`Pipeline::flush`].

mod admit;
mod ahead;
mod answer;
mod context;
mod first;
mod forward;
mod fragments;
mod icmp;
mod link;
mod open;
mod send;
mod straight;
mod track;
mod tunnel;

use std::net::{Ipv4Addr, Ipv6Addr};

use crossbeam::channel::Sender;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use weir_conntrack::ConnRef;
use weir_packet::{
    Direction, DropReason,
    parse::{Kind, View},
};
use weir_sync::WorkerCounters;

pub use self::context::{Context, Event};
use self::{ahead::Ahead, straight::Seen};
use crate::{
    action_log::ActionLog,
    afxdp::trunk,
    allowance::Shares,
    counters::{COUNTERS, Counter, Totals, drop_index},
    driver::{Driver, PortId},
    forwarding::{AdjacencyId, Forwarding, host_source},
    frame::{IfIndex, MAX_PACKET_BYTES, Packet},
    held::{Held, HeldPacket},
    origin::{Arrival, Origin},
    tables::{Both, Family, Tables},
};

const ETHERNET_BYTES: usize = 14;

/// Handles all packets of `burst` and leaves it empty. [`Pipeline::flush`] sends what it made.
pub fn process_burst<D: Driver>(
    pipeline: &mut Pipeline,
    driver: &mut D,
    burst: &mut Vec<Packet>,
    context: &Context<'_>,
) {
    pipeline.counters.add(Counter::Rx as usize, burst.len() as u64);
    if !pipeline.goes_straight {
        let mut handler = Handler { pipeline, driver, context };
        return burst.drain(..).for_each(|packet| handler.handle(packet));
    }
    // Taken and put back, so that the packets can be handled with all of the pipeline; no allocation happens.
    let mut seen = std::mem::take(&mut pipeline.seen);
    straight::see(burst, &mut seen, context);
    if straight::fetch(&mut seen, context) >= ahead::FEWEST {
        let Pipeline { ahead, counters, choices, .. } = &mut *pipeline;
        ahead.read(burst, &seen, context, counters.number(), &mut || choices.next_u64());
    }
    pipeline.went_straight += burst.len() as u64;
    for (mut packet, seen) in burst.drain(..).zip(&seen) {
        match straight::go(&mut packet, seen, &mut pipeline.tunnel_id, context) {
            Some(port) => pipeline.egress[usize::from(port.0)].push(packet),
            None => {
                pipeline.went_straight -= 1;
                pipeline.drawn = if seen.is_miss() { pipeline.ahead.next() } else { None };
                Handler { pipeline: &mut *pipeline, driver: &mut *driver, context }.handle(packet);
            }
        }
    }
    pipeline.drawn = None;
    pipeline.ahead.clear();
    seen.clear();
    pipeline.seen = seen;
}

/// Who handles a packet the general way: the stages are its methods.
struct Handler<'a, D> {
    pipeline: &'a mut Pipeline,
    driver: &'a mut D,
    context: &'a Context<'a>,
}

/// What is known of the packet that is handled.
#[derive(Clone, Copy)]
struct Known<'v, A: Family> {
    view: &'v View<A>,
    origin: Origin,
}

impl<A: Family> Known<'_, A> {
    fn arrival(&self, packet: &Packet, forwarding: &Forwarding) -> Arrival {
        Arrival::by(self.origin, packet.device, packet.through_tunnel, forwarding)
    }
}

/// What a packet is found to be when it is admitted.
enum Admitted {
    /// One to be routed.
    V4(View<Ipv4Addr>, Origin),
    V6(View<Ipv6Addr>, Origin),
    /// Another, which ends here.
    End(End),
}

/// Where a packet goes, and so its later fragments.
enum Course<'t, A: Family> {
    /// On in a direction of its connection.
    Connection(ConnRef<'t, A>, Direction),
    /// To that hop: untracked policy lets it go, whatever connection there may be.
    Untracked(AdjacencyId),
    /// To that hop: the node's kernel, which sent it, follows the connection that weir sees one half of.
    Pass(AdjacencyId),
    /// To the node's kernel, as it is.
    Punt,
}

/// How a packet ends that is not dropped.
#[derive(Clone, Copy)]
enum End {
    /// It is transmitted by that port to the device that it names.
    Transmit(PortId),
    /// The node's kernel gets the frame.
    Punt,
    /// The same of what weir has translated for a server of the node: its answers are to come back, by whatever device they would leave.
    Serve,
    /// It gets it by the device that it came by: what it is for is there on that link only.
    Return,
    /// It is answered, or something is sent in its place.
    Consume,
    /// It waits for the MAC address of that next hop. It came by that device.
    Hold(AdjacencyId, IfIndex),
}

// It comes back from stage to stage in a register.
const _: () = assert!(size_of::<Result<End, DropReason>>() <= 8);

impl<D: Driver> Handler<'_, D> {
    /// The general way of one packet.
    #[inline(never)]
    fn handle(&mut self, mut packet: Packet) {
        match self.admit(&mut packet) {
            Ok(Admitted::V4(view, origin)) => self.route(packet, Known { view: &view, origin }),
            Ok(Admitted::V6(view, origin)) => self.route(packet, Known { view: &view, origin }),
            Ok(Admitted::End(end)) => self.end(packet, Ok(end)),
            Err(reason) => self.end(packet, Err(reason)),
        }
    }

    /// Of a packet that is to be routed.
    fn route<A: Family>(&mut self, mut packet: Packet, known: Known<'_, A>) {
        let ended = match known.view.kind {
            Kind::Flow => self.track_and_forward(&mut packet, known),
            Kind::IcmpError => self.icmp_error(&mut packet, known),
            Kind::FirstFragment { .. } | Kind::LaterFragment { .. } => return self.fragment(packet, known),
            Kind::Control => Err(DropReason::LinkScope),
        };
        self.end(packet, ended);
    }

    /// Of a packet with a key: whole, or a first fragment.
    #[inline]
    fn track_and_forward<A: Family>(&mut self, packet: &mut Packet, known: Known<'_, A>) -> Result<End, DropReason> {
        let hash = A::table(self.context.tables).hash(&known.view.key);
        let course = self.track(packet, known, hash)?;
        self.forward(packet, known.view, &course)
    }

    /// Moves a packet to where it ends.
    #[inline]
    fn end(&mut self, packet: Packet, ended: Result<End, DropReason>) {
        match ended {
            Ok(End::Transmit(port)) => self.pipeline.egress[usize::from(port.0)].push(packet),
            other => self.end_otherwise(packet, other),
        }
    }

    #[inline(never)]
    fn end_otherwise(&mut self, mut packet: Packet, ended: Result<End, DropReason>) {
        let Self { pipeline, driver, context } = self;
        match ended {
            Ok(End::Transmit(port)) => pipeline.egress[usize::from(port.0)].push(packet),
            Ok(end @ (End::Punt | End::Serve)) => {
                packet.device = IfIndex::HOST;
                // On the trunk the source says whose the packet is: its sender's own might name a workload.
                let forwarding = &*context.snapshot.forwarding;
                if let Some(mac) = forwarding.adjacency(forwarding.host()).mac {
                    let source = if matches!(end, End::Serve) { trunk::ANSWERED } else { host_source(mac) };
                    packet.bytes_mut()[..6].copy_from_slice(&mac.0);
                    packet.bytes_mut()[6..12].copy_from_slice(&source.0);
                }
                pipeline.egress[usize::from(PortId::TRUNK.0)].push(packet);
            }
            Ok(End::Return) => {
                // Of what came by the trunk, the destination's MAC is one of the trunk's own form by now.
                let forwarding = &*context.snapshot.forwarding;
                let own = forwarding.device_by_index(packet.device).map(|id| forwarding.device(id).mac);
                packet.device = packet.device.forwarded();
                let (source, bytes) = (trunk::target(packet.device), packet.bytes_mut());
                bytes[..6].copy_from_slice(&own.unwrap_or_default().0);
                bytes[6..12].copy_from_slice(&source.0);
                pipeline.egress[usize::from(PortId::TRUNK.0)].push(packet);
            }
            Ok(End::Consume) => {
                pipeline.count(Counter::Consumed);
                driver.release(packet);
            }
            Ok(End::Hold(hop, sender)) => {
                let (device, next_hop) =
                    (packet.device, send::next_hop(&packet, context.snapshot.forwarding.adjacency(hop)));
                if pipeline.held.push(HeldPacket { packet, sender, device, next_hop, since: context.now }) {
                    // A full channel: the packets wait in vain and are counted as unresolved; the next ones ask again.
                    let _ = pipeline.events.try_send(Event::Resolve { device, address: next_hop });
                }
            }
            Err(reason) => pipeline.drop(*driver, packet, reason),
        }
    }
}

/// A worker's own state.
#[derive(Debug)]
pub struct Pipeline {
    own: Both,
    counters: WorkerCounters<COUNTERS>,
    /// For ports.
    random: ChaCha8Rng,
    /// For backends. Numbers that are drawn ahead and not used change no port.
    choices: ChaCha8Rng,
    events: Sender<Event>,
    held: Held,
    tunnel_id: u16,
    generation: u32,
    /// Of ICMP errors; of those that path MTU discovery waits for, and of TCP resets.
    errors: Shares,
    too_big: Shares,
    /// Echo replies of addresses that no device has.
    echoes: Shares,
    resets: Shares,
    /// MAC addresses of pods that are others than were known.
    changes: Shares,
    action_log: ActionLog,
    /// What was seen of the packets of a burst.
    seen: Vec<Seen>,
    ahead: Ahead,
    /// The random number that was drawn ahead for the packet that is handled.
    drawn: Option<u64>,
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
        // Of a stream of their own: they change nothing of what ports and backends are drawn.
        let mut secrets = random.clone();
        secrets.set_stream(1);
        Self {
            own: Both::new(tables, &mut || random.next_u64()),
            counters,
            tunnel_id: random.next_u32() as u16,
            choices: ChaCha8Rng::from_rng(&mut random),
            random,
            events,
            held: Held::new(),
            generation: 0,
            errors: Shares::of_answers(secrets.next_u64()),
            too_big: Shares::of_answers(secrets.next_u64()),
            echoes: Shares::of_answers(secrets.next_u64()),
            resets: Shares::of_answers(secrets.next_u64()),
            changes: Shares::of_changes(),
            action_log: ActionLog::new(),
            seen: Vec::with_capacity(burst),
            ahead: Ahead::new(burst),
            drawn: None,
            goes_straight: true,
            went_straight: 0,
            // Every packet of a burst may have been answered, and held packets may be set free with it.
            egress: (0..ports).map(|_| Vec::with_capacity(4 * burst + 512)).collect(),
            whole: Vec::with_capacity(MAX_PACKET_BYTES),
        }
    }

    /// The same, which follows the fragments of a packet for so many ticks (IPv4, IPv6) instead of [`crate::fragments::LIFETIME`], the most.
    #[must_use]
    pub fn with_fragment_lifetimes(mut self, [v4, v6]: [u32; 2]) -> Self {
        self.own.v4.fragments.set_lifetime(v4);
        self.own.v6.fragments.set_lifetime(v6);
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
        self.held.len() + self.own.v4.fragments.len() + self.own.v6.fragments.len()
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
                0 => packets.iter().filter(|p| p.device.is_kernels()).count(),
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

    fn drop(&mut self, driver: &mut impl Driver, packet: Packet, reason: DropReason) {
        self.counters.add(drop_index(reason), 1);
        driver.release(packet);
    }

    /// Drops every packet that still waits.
    pub fn give_up_held(&mut self, driver: &mut impl Driver) {
        self.give_up_fragments::<Ipv4Addr>(driver);
        self.give_up_fragments::<Ipv6Addr>(driver);
        while let Some(held) = self.held.take_if(|_| true) {
            self.drop(driver, held.packet, DropReason::NeighborUnresolved);
        }
    }

    fn give_up_fragments<A: Family>(&mut self, driver: &mut impl Driver) {
        while let Some(waiting) = A::own(&mut self.own).fragments.give_up() {
            self.drop(driver, waiting.packet, DropReason::FragmentOrphan);
        }
    }

    /// Work that needs no packet: held packets whose neighbour is known now, packets and fragments that waited too long, and a share of the
    /// sweep over the tables (`share` connections of each).
    pub fn maintain(&mut self, driver: &mut impl Driver, context: &Context<'_>, share: u32) {
        let mut handler = Handler { pipeline: self, driver, context };
        handler.look_after_held();
        handler.look_after_fragments::<Ipv4Addr>();
        handler.look_after_fragments::<Ipv6Addr>();
        let Both { v4, v6 } = &mut self.own;
        context.tables.v4.sweep(&mut v4.handle, context.now, share, context.turn);
        context.tables.v6.sweep(&mut v6.handle, context.now, share, context.turn);
    }
}
