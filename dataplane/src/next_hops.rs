//! A connection's two next hops, and how it keeps them.

use weir_conntrack::ConnRef;
use weir_packet::{Direction, FlowKey, Ports, glance::may_be_forwarded};

use crate::{
    forwarding::{AdjacencyId, Forwarding, Hop, Routed},
    frame::IfIndex,
    snapshot::Snapshot,
};

/// "No next hop" in a connection; adjacencies have smaller numbers ([`crate::forwarding::MAX_ADJACENCIES`]).
const NO_HOP: u16 = u16::MAX;

/// A next hop as a connection keeps it: the adjacency, and the low half of the generation that numbers adjacencies so.
///
/// Two workers whose turns began on both sides of a publication may judge one connection at once and overwrite each other's words, so
/// each word tells by itself whose it is. Half a generation number is enough: the other half would have to pass within one turn.
#[inline]
fn word(generation: u32, adjacency: Option<AdjacencyId>) -> u32 {
    generation << 16 | u32::from(adjacency.map_or(NO_HOP, |a| a.0))
}

/// Both directions' next hops of a connection whose answers have the key `answers`.
///
/// Answers from or to an address that no router may forward, as from a backend with a link-local one, are refused when they are parsed. The
/// straight way does not look for that: it finds no next hop of its generation in such a connection, and the general way asks for it each time.
pub(crate) fn words<A: Routed>(snapshot: &Snapshot, answers: &FlowKey<A>, hops: [Option<AdjacencyId>; 2]) -> [u32; 2] {
    let is_usual = may_be_forwarded(answers.src, answers.dst);
    let generation = if is_usual { snapshot.generation } else { !snapshot.generation };
    hops.map(|adjacency| word(generation, adjacency))
}

/// The next hop of a direction's packets: the connection's own, or, where a worker with other tables wrote it, what these tables say.
#[inline]
pub(crate) fn of<A: Routed>(conn: &ConnRef<'_, A>, direction: Direction, snapshot: &Snapshot) -> Option<AdjacencyId> {
    let word = conn.next_hop(direction);
    if word >> 16 == snapshot.generation & 0xffff {
        let number = word as u16;
        return (number != NO_HOP).then_some(AdjacencyId(number));
    }
    find(conn, direction, &snapshot.forwarding)
}

/// The next hop of a direction's packets by these tables.
pub(crate) fn find<A: Routed>(
    conn: &ConnRef<'_, A>,
    direction: Direction,
    forwarding: &Forwarding,
) -> Option<AdjacencyId> {
    match direction {
        Direction::Original => forwarding.adjacency_of(&translated(conn)),
        Direction::Reply => of_answers(IfIndex(conn.device()), &conn.key(Direction::Original), forwarding),
    }
}

/// The next hop of answers to a flow whose packets come by `device`. What the node's kernel has sent is answered to it, whoever it is that it
/// forwards for.
#[inline]
pub(crate) fn of_answers<A: Routed>(
    device: IfIndex,
    original: &FlowKey<A>,
    forwarding: &Forwarding,
) -> Option<AdjacencyId> {
    if device.is_kernels() { Some(forwarding.host()) } else { forwarding.adjacency_of(&original.invert()) }
}

/// The key of a connection's packets after DNAT and before SNAT, as policy sees them and as they choose from several next hops.
pub(crate) fn translated<A: Routed>(conn: &ConnRef<'_, A>) -> FlowKey<A> {
    let original = conn.key(Direction::Original);
    let mut key = conn.key(Direction::Reply).invert();
    key.src = original.src;
    key.ports = if key.protocol.is_icmp() {
        original.ports
    } else {
        Ports::new(original.ports.source(), key.ports.destination())
    };
    key
}

/// The same for the straight way, if the connection has one by these tables. The number of any other is beyond all that there are.
#[inline(always)]
pub(crate) fn straight<'s, A: Routed>(
    conn: ConnRef<'_, A>,
    direction: Direction,
    snapshot: &'s Snapshot,
) -> Option<&'s Hop> {
    snapshot.forwarding.hop(conn.next_hop(direction) ^ snapshot.generation << 16)
}
