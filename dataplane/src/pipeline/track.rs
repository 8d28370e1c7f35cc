//! Tracking: the connection of a packet, and whether it stands by these tables.

use weir_conntrack::{ConnRef, Hash, Observed, Opening, SctpPacket, Tracked};
use weir_nat::Evidence;
use weir_packet::{
    Address, Direction, DropReason, Protocol,
    options::TcpOptions,
    parse::{self, Kind, TcpFields, View},
};

use super::{Context, Course, Handler, Known};
use crate::{
    decide::{self, Verdict},
    driver::Driver,
    frame::{IfIndex, Packet},
    host_policy, next_hops,
    origin::Origin,
    rejudge::{self, Claim, Rejudged},
    tables::Family,
};

/// Datagrams that may come back whole in an ICMP error: no more is quoted (RFC 4443, 2.4 c).
const MOST_QUOTED_BYTES: usize = 1280;

impl<'a, D: Driver> Handler<'a, D> {
    /// The connection of a packet with a key, or its first judgement.
    #[inline]
    pub(super) fn track<A: Family>(
        &mut self,
        packet: &Packet,
        known: Known<'_, A>,
        hash: Hash,
    ) -> Result<Course<'a, A>, DropReason> {
        let Known { view, origin } = known;
        let context = self.context;
        let snapshot = context.snapshot;
        if snapshot.rules.host.has_untracked()
            && origin == Origin::Uplink
            && host_policy::is_untracked(snapshot, known.arrival(packet, &snapshot.forwarding), &view.key)
        {
            return self.first_packet(packet, known);
        }
        let table = A::table(context.tables);
        // Twice at most: what opens a connection where an old one is over, or does not stand any more, opens anew.
        for _ in 0..2 {
            let Some(hit) = table.lookup(&view.key, hash, context.now, context.turn) else { break };
            let (conn, direction) = (table.conn(hit.conn), hit.direction);
            let stale = rejudge::is_stale(&conn, snapshot);
            let is_expected = comes_as_expected(&conn, direction, packet.device, context);
            if stale || !is_expected {
                decide::check_source(snapshot, origin, &view.key)?;
            }
            if !is_expected && direction == Direction::Original && self.is_anothers(known, &conn) {
                self.may_take_over(packet, known)?;
                table.remove(&mut A::own(&mut self.pipeline.own).handle, hit.conn, context.turn);
                break;
            }
            if stale {
                let claim = self.claim(packet, view, &conn, direction);
                match rejudge::rejudge(&conn, claim, snapshot) {
                    Rejudged::Keep => {}
                    Rejudged::Drains => note(packet, view, &conn, direction),
                    // One that is cut stays until it expires: forgotten, its other end's next packet could pick it up mid-stream as a
                    // connection of the opposite direction, which may be allowed, or open a flow in the backend's own name.
                    Rejudged::Cut(reason) => return Err(reason),
                    Rejudged::Gone(reason) => {
                        table.remove(&mut A::own(&mut self.pipeline.own).handle, hit.conn, context.turn);
                        return Err(reason);
                    }
                    Rejudged::Reset(reason) => return Err(self.reset(packet, view, &conn, direction, reason)),
                    Rejudged::Anew => {
                        table.remove(&mut A::own(&mut self.pipeline.own).handle, hit.conn, context.turn);
                        continue;
                    }
                }
            }
            // What has no states costs no copy of nothing.
            let read;
            let segment = match view.key.protocol {
                Protocol::TCP | Protocol::SCTP => {
                    read = self.observed(packet, view);
                    &read
                }
                _ => &Observed::NOTHING,
            };
            let may_change = may_change_state(&conn, direction, segment);
            if may_change && !self.checksum_ok(packet, view) {
                // It stays bad, so its receiver drops it.
                return Ok(Course::Connection(conn, direction));
            }
            let before = Seen::of(&conn);
            match follow(&conn, direction, segment, context) {
                Tracked::Accept => {
                    let now = Seen::of(&conn);
                    if now != before
                        && let Some(evidence) = now.since(before, view.key.protocol, direction)
                    {
                        note_client(&conn, evidence, context);
                    }
                    return Ok(Course::Connection(conn, direction));
                }
                Tracked::NewFlow => {
                    table.remove(&mut A::own(&mut self.pipeline.own).handle, hit.conn, context.turn);
                }
                Tracked::Invalid => return Err(DropReason::Invalid),
            }
        }
        self.first_packet(packet, known)
    }

    /// Whether a packet in the original direction of a connection is of another party than who opened it: then it is a first packet.
    #[cold]
    fn is_anothers<A: Family>(&self, known: Known<'_, A>, conn: &ConnRef<'_, A>) -> bool {
        let forwarding = &*self.context.snapshot.forwarding;
        // If it is not there any more, judging again finds that.
        let opener = Origin::of(IfIndex(conn.device()), forwarding);
        opener.is_some_and(|(opener, _)| !opener.with_source(known.view.key.src, forwarding).is_as(known.origin))
    }

    /// Whether a first packet may go, which has the key of somebody else's connection. What is denied leaves that one as it is.
    #[cold]
    fn may_take_over<A: Family>(&mut self, packet: &Packet, known: Known<'_, A>) -> Result<(), DropReason> {
        let arrival = known.arrival(packet, &self.context.snapshot.forwarding);
        let decision = self.decide(arrival, &known.view.key);
        match decision.verdict {
            Verdict::Forward | Verdict::Local => Ok(()),
            Verdict::Drop(reason) | Verdict::Reject(reason) => {
                if reason.is_policy() {
                    self.tell_of(known.origin, &known.view.key, &decision);
                }
                Err(reason)
            }
            Verdict::Pass => Err(DropReason::NoRoute),
        }
    }

    /// What a packet may do with its connection, if that does not stand any more. One that is damaged begins nothing.
    #[cold]
    fn claim<A: Family>(
        &mut self,
        packet: &Packet,
        view: &View<A>,
        conn: &ConnRef<'_, A>,
        direction: Direction,
    ) -> Claim {
        if !rejudge::is_connection(view.key.protocol) {
            return match self.checksum_ok(packet, view) {
                true => Claim::of_datagram(conn, direction, self.context.now),
                false => Claim::Rides,
            };
        }
        let segment = self.observed(packet, view);
        let opens = match view.key.protocol {
            Protocol::SCTP => segment.sctp.is_init(),
            _ => segment.opening(&view.key) == Opening::Opens,
        };
        if !opens || !self.checksum_ok(packet, view) {
            Claim::Rides
        } else if conn.is_opened_again_by(direction, &segment) {
            Claim::OpensAgain
        } else {
            Claim::Opens
        }
    }

    /// Whether the layer-4 checksum is right, or there is none to judge.
    #[inline]
    pub(super) fn checksum_ok<A: Address>(&mut self, packet: &Packet, view: &View<A>) -> bool {
        parse::l4_checksum_ok(self.driver.arena().whole(packet, &mut self.pipeline.whole), view)
    }

    /// What conntrack needs to know of a packet.
    #[inline]
    pub(super) fn observed<A: Address>(&mut self, packet: &Packet, view: &View<A>) -> Observed {
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
                let frame = self.driver.arena().whole(packet, &mut self.pipeline.whole);
                Observed { sctp: SctpPacket::read(view.l4_slice(frame)), ..Observed::default() }
            }
            _ => Observed::default(),
        }
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
pub(super) fn follow<A: Family>(
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
pub(super) fn comes_as_expected<A: Family>(
    conn: &ConnRef<'_, A>,
    direction: Direction,
    device: IfIndex,
    context: &Context<'_>,
) -> bool {
    if direction == Direction::Original {
        return conn.device() == device.0;
    }
    let forwarding = &*context.snapshot.forwarding;
    next_hops::of(conn, Direction::Original, context.snapshot).is_some_and(|hop| {
        let leaves_by = forwarding.adjacency(hop).device;
        leaves_by.is_some_and(|id| forwarding.device(id).index == device)
    })
}

/// How far a connection has come.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Seen {
    reply: bool,
    assured: bool,
}

impl Seen {
    #[inline]
    fn of<A: Family>(conn: &ConnRef<'_, A>) -> Self {
        Self { reply: conn.seen_reply(), assured: conn.assured() }
    }

    /// What a packet tells of the client that brought its connection from `before` to here.
    fn since(self, before: Self, protocol: Protocol, direction: Direction) -> Option<Evidence> {
        match protocol {
            Protocol::UDP if self.reply && !before.reply => Some(Evidence::Answered),
            // A backend may go on without its client.
            Protocol::UDP => {
                (self.assured && !before.assured && direction == Direction::Original).then_some(Evidence::Returned)
            }
            _ => (self.assured && !before.assured).then_some(Evidence::Proven),
        }
    }
}

/// Notes what was seen of a connection's client, for ClientIP affinity.
#[cold]
fn note_client<A: Family>(conn: &ConnRef<'_, A>, evidence: Evidence, context: &Context<'_>) {
    let (asked, backend) = (conn.key(Direction::Original), conn.key(Direction::Reply));
    if asked.dst != backend.src || asked.ports.destination() != backend.ports.source() {
        let services = context.snapshot.rules.services.services::<A>();
        let backend = (backend.src, backend.ports.source());
        services.note_client(&asked, backend, evidence, context.affinity.clients(), context.now);
    }
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
pub(super) fn payload<'f, A: Address>(frame: &'f [u8], view: &View<A>) -> Option<&'f [u8]> {
    const UDP_HEADER_BYTES: usize = 8;
    if view.key.protocol == Protocol::UDP { view.l4_slice(frame).get(UDP_HEADER_BYTES..) } else { None }
}
