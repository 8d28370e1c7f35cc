//! ICMP errors: about a packet of a connection, or nobody's.

use weir_conntrack::{ConnRef, Hit};
use weir_packet::{
    Direction, DropReason, FlowKey, Mac,
    parse::{self, Kind, View},
    rewrite,
};

use super::{
    Context, Course, ETHERNET_BYTES, End, Handler, Known,
    track::{comes_as_expected, payload},
    tunnel,
};
use crate::{
    counters::Counter,
    decide,
    driver::Driver,
    frame::{IfIndex, Packet},
    next_hops,
    origin::{self, Origin},
    rejudge,
    tables::Family,
};

impl<D: Driver> Handler<'_, D> {
    /// An ICMP error. It keeps no connection alive and ends none (RFC 5508, REQ-3 to 5), but for one case: see [`tells_of_end`].
    #[cold]
    pub(super) fn icmp_error<A: Family>(
        &mut self,
        packet: &mut Packet,
        known: Known<'_, A>,
    ) -> Result<End, DropReason> {
        let Known { view, origin } = known;
        let context = self.context;
        let forwarding = &*context.snapshot.forwarding;
        decide::check_source(context.snapshot, origin, &view.key)?;
        let carried =
            if origin == Origin::Uplink { tunnel::error_about_carried(packet, view, forwarding) } else { None };
        let view = carried.as_ref().unwrap_or(view);
        let table = A::table(context.tables);
        let embedded = parse::parse_embedded::<A>(view.quote(packet.bytes())).filter(|embedded| {
            // Errors go to who sent what they quote; and what a pod was not sent, it has nothing to tell about.
            embedded.key.src == view.key.dst
                && match origin {
                    Origin::Workload(workload) => forwarding.local_workload(embedded.key.dst) == Some(workload),
                    Origin::Host | Origin::Forwarded { .. } | Origin::Uplink => true,
                }
        });
        let hit = embedded.as_ref().filter(|_| !view.is_redirect()).and_then(|embedded| {
            // The quoted packet went the other way; who sent the error answers it.
            let key = embedded.key.invert();
            table.lookup(&key, table.hash(&key), context.now, context.turn)
        });
        let (Some(embedded), Some(Hit { conn, direction })) = (embedded, hit) else {
            let course = unrelated(view, origin, context)?;
            return self.forward(packet, view, &course);
        };
        let (id, conn) = (conn, table.conn(conn));
        // Of what did not leave the node nobody outside has anything to tell.
        let has_left = |hop| forwarding.adjacency(hop).kind.leaves_node();
        if origin == Origin::Uplink && !next_hops::of(&conn, direction.flip(), context.snapshot).is_some_and(has_left) {
            return Err(DropReason::UnrelatedIcmpError);
        }
        let drains = rejudge::still_stands(&conn, direction, DropReason::UnrelatedIcmpError, context.snapshot)?;
        if drains
            && carried.is_none()
            && direction == Direction::Reply
            && tells_of_end(&conn, packet, view, origin, context)
            && self.checksum_ok(packet, view)
            // Who is second has a datagram of which the first knows nothing: its sender is told.
            && table.remove(&mut A::own(&mut self.pipeline.own).handle, id, context.turn)
            && let Some(quoted) = returned(packet, view, &conn)
            && self.checksum_ok(packet, &quoted)
        {
            return self.send_again(packet, &quoted, &conn);
        }
        // The quoted packet may be one that the programs carried.
        if let Some(offload) = context.offload {
            offload.take_windows(&conn, direction.flip());
        }
        if embedded.tcp_seq.is_some_and(|seq| !conn.may_be_in_flight(direction.flip(), seq)) {
            return Err(DropReason::UnrelatedIcmpError);
        }
        let arrived = conn.key(direction);
        let inner_to = conn.key(direction.flip());
        let to = inner_to.invert();
        // From the end itself, the error takes the address that the other end knows; a router keeps its own. But whatever goes to a
        // backend that knows its client by a masquerade address comes from there (RFC 5508, REQ-5): tunnels let nothing else pass.
        let is_masqueraded = direction == Direction::Original && to.src != arrived.src;
        let outer_src = if view.key.src == arrived.src || is_masqueraded { to.src } else { view.key.src };
        let hop = next_hops::of(&conn, direction, context.snapshot).ok_or(DropReason::NoRoute)?;
        rewrite::translate_icmp_error(packet.bytes_mut(), view, &embedded, outer_src, to.dst, &inner_to);
        let rewritten = View { key: FlowKey { src: outer_src, dst: to.dst, ..view.key }, ..*view };
        self.forward_to(packet, &rewritten, &rewritten.key, hop)
    }

    /// Sends a datagram again that `packet` quotes, as its sender's first packet of a flow: the backend that it was for is no more.
    #[cold]
    fn send_again<A: Family>(
        &mut self,
        packet: &mut Packet,
        quoted: &View<A>,
        conn: &ConnRef<'_, A>,
    ) -> Result<End, DropReason> {
        let forwarding = &*self.context.snapshot.forwarding;
        let (original, device) = (conn.key(Direction::Original), IfIndex(conn.device()));
        let origin = origin::of_opener(device, original.src, forwarding).ok();
        let front = quoted.l3 - ETHERNET_BYTES as u16;
        let (Some(origin), Some(view)) = (origin, quoted.moved_up(front)) else {
            return Err(DropReason::UnknownDevice);
        };
        self.driver.truncate(packet, usize::from(quoted.end));
        packet.shrink_front(front);
        let bytes = packet.bytes_mut();
        // From a group's address nobody's MAC is learned: what came was not its sender's.
        rewrite::set_ethernet(bytes, Mac([0xff; 6]), Mac([0xff; 6]), A::ETHERTYPE);
        rewrite::translate(bytes, &view, &original)?;
        packet.device = device;
        packet.through_tunnel = origin == Origin::Uplink && forwarding.is_tunnelled(original.src);
        self.pipeline.count(Counter::SentAgain);
        let view = View { key: original, ..view };
        let course = self.first_packet(packet, Known { view: &view, origin })?;
        self.forward(packet, &view, &course)
    }
}

/// Where an ICMP error about no connection goes, or a redirect.
fn unrelated<'t, A: Family>(
    view: &View<A>,
    origin: Origin,
    context: &Context<'_>,
) -> Result<Course<'t, A>, DropReason> {
    let forwarding = &*context.snapshot.forwarding;
    if origin.is_outside() && forwarding.is_for_node(view.key.dst) {
        return Ok(Course::Punt);
    }
    // Who is redirected is the sender on the router's own link, nobody behind weir (RFC 1812, 5.2.7.2).
    if view.is_redirect() {
        return Err(DropReason::LinkScope);
    }
    // What the node's kernel answers another node's pod went past weir (see `first_packet`), and so may its errors.
    match forwarding.adjacency_to(view.key.dst) {
        Some(hop) if origin.is_kernels() && forwarding.adjacency(hop).kind.leaves_node() => Ok(Course::Pass(hop)),
        _ => Err(DropReason::UnrelatedIcmpError),
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
