//! Tunnel packets of this node's: what one carries, and what a router says about one.

use std::net::Ipv4Addr;

use weir_packet::{
    DropReason, Protocol,
    parse::{self, Parsed, View},
    rewrite,
};

use super::ETHERNET_BYTES;
use crate::{forwarding::Forwarding, frame::Packet, tables::Family};

/// Takes the outer header off an IPIP packet, if its sender is the cluster node that owns the inner source.
pub(super) fn decapsulate(
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

/// Makes an ICMP error about a tunnel packet of this node one about what it carried; `None` where it is no such error.
///
/// Routers between nodes tell the node about its tunnel packets, but only who sent what they carried can mend it.
#[cold]
pub(super) fn error_about_carried<A: Family>(
    packet: &mut Packet,
    view: &View<A>,
    forwarding: &Forwarding,
) -> Option<View<A>> {
    // IPv6 goes into no tunnel.
    let Parsed::V4(view) = A::parsed(*view) else { return None };
    // Of several frames: no router quotes that much (RFC 1812, 4.3.2.3).
    if packet.has_tail() {
        return None;
    }
    let quoted = parse::parse_embedded::<Ipv4Addr>(view.quote(packet.bytes()))?;
    let is_ours = quoted.key.protocol == Protocol::IPIP
        && quoted.key.src == view.key.dst
        && forwarding.is_local(quoted.key.src)
        && forwarding.node_by_address(quoted.key.dst).is_some_and(|node| forwarding.this_node() != Some(node));
    let inner = rewrite::error_about_inner(packet.bytes_mut(), &view, is_ours.then_some(&quoted)?)?;
    packet.set_len(usize::from(inner.end));
    A::of(Parsed::V4(inner))
}
