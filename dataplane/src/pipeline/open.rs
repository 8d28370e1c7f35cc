//! A new connection: both directions into the table, and a source port where it is translated.

use rand_chacha::rand_core::Rng;
use weir_conntrack::{Attributes, ConnId, Expendable, Handle, Hit, Insert, NewConn, Observed, PRIVILEGED};
use weir_nat::{AllocateError, Attempt};
use weir_packet::{Address, Direction, DropReason, FlowKey, Ports, parse::View};

use super::{Context, Handler, Pipeline};
use crate::{
    counters::Counter,
    decide::{self, Decision},
    driver::Driver,
    forwarding::RouteKind,
    frame::IfIndex,
    next_hops, offload,
    origin::{Arrival, Origin},
    tables::{self, Family},
};

/// How often ports are tried for a connection: once more where another worker came in between when one was to be displaced.
const SNAT_ROUNDS: u32 = 2;

/// A connection that may be displaced for its reply key, and how gladly.
struct Rival<A: Address> {
    worth: Expendable,
    conn: ConnId,
    reply: FlowKey<A>,
}

/// A connection for a packet that had none.
pub(super) struct Opened {
    pub(super) hit: Hit,
    /// Whether this packet opened it, rather than one of another worker.
    pub(super) ours: bool,
}

impl<D: Driver> Handler<'_, D> {
    /// Puts both directions of a new connection into the table. Who loses a race gets the winner's connection.
    ///
    /// Where all tries for a source port find theirs taken, the most expendable of those who hold them is displaced: a flood of SYNs towards
    /// one backend would otherwise keep every port from others for as long as half-open connections live. First it is removed, by a
    /// compare-and-swap that fails if its answer has come meanwhile, then its key is taken as any other, by an insertion that fails if another
    /// worker has been faster; in either case all is tried once more, with other ports. A packet of the displaced that another worker
    /// handles in that same moment still passes, as a late one would.
    pub(super) fn open<A: Family>(
        &mut self,
        decision: &Decision<'_, A>,
        device: IfIndex,
        view: &View<A>,
        segment: &Observed,
        arrival: Arrival,
    ) -> Result<Opened, DropReason> {
        let (context, origin) = (self.context, arrival.origin);
        let snapshot = context.snapshot;
        let forwarding = &*snapshot.forwarding;
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
            next_hops: next_hops::words(
                snapshot,
                &reply,
                [decision.adjacency(), next_hops::of_answers(device, &view.key, forwarding)],
            ),
            flags: flags(origin, decision, context),
        };
        let Pipeline { own, random, counters, .. } = &mut *self.pipeline;
        let handle = &mut A::own(own).handle;
        // A share is kept for the node's own connections, and for its pods' to it, however many others there are. Not for those from
        // outside, whose sources may be made up: such a flood would take the share.
        let to_host = decision.adjacency().is_some_and(|hop| forwarding.adjacency(hop).kind == RouteKind::Host);
        let for_host = origin == Origin::Host || to_host && !origin.is_outside();
        let kept_free = if for_host { 0 } else { tables::share_of(table.capacity()) };
        // Pods may fill the share, but what the node itself has opened makes way for nobody else.
        let is_privileged = origin == Origin::Host;
        if !table.make_room(handle, kept_free, is_privileged, context.now, context.turn) {
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
            match attempt(handle, &mut rival, reply) {
                Attempt::Free(opened) => return Ok(opened),
                Attempt::Failed(reason) => return Err(reason),
                Attempt::Taken if !has_port => return Err(DropReason::SnatExhausted),
                Attempt::Taken => {}
            }
        }
        let wanted = decision.snat.is_some().then_some(wanted);
        for _ in 0..SNAT_ROUNDS {
            let tried = snapshot.snat.allocate(wanted, &mut || random.next_u64(), |port| {
                attempt(handle, &mut rival, with_reply_port(reply, port))
            });
            let opened = match tried {
                Ok(allocated) => Some(allocated.value),
                Err(AllocateError::Failed(reason)) => return Err(reason),
                Err(AllocateError::Exhausted) => {
                    let Some(Rival { conn, reply, .. }) = rival.take() else { break };
                    if !table.remove_expendable(handle, conn, is_privileged, context.now, context.turn) {
                        continue;
                    }
                    counters.add(Counter::SnatDisplaced as usize, 1);
                    match attempt(handle, &mut None, reply) {
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

/// The flags of a new connection.
fn flags<A: Family>(origin: Origin, decision: &Decision<'_, A>, context: &Context<'_>) -> u8 {
    let forwarding = &*context.snapshot.forwarding;
    let leads_to = decision.adjacency().map(|hop| forwarding.adjacency(hop).kind);
    let privilege = if origin == Origin::Host { PRIVILEGED } else { 0 };
    match (origin, leads_to) {
        // What the kernel only forwards has no way in the programs.
        (Origin::Forwarded { .. }, _) => privilege,
        // The programs are where pods are; between uplinks workers are as fast, or faster.
        (Origin::Workload(_), Some(_)) | (_, Some(RouteKind::Workload)) if context.offload.is_some() => {
            privilege | offload::CANDIDATE
        }
        _ => privilege,
    }
}
