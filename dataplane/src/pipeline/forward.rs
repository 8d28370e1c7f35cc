//! Forwarding: translate, count the hop, split; or hand over to the node's kernel.

use std::net::{Ipv4Addr, Ipv6Addr};

use weir_packet::{
    Address, Direction, DropReason, FlowKey,
    build::{self, IcmpError},
    parse::{self, Parsed, View},
    rewrite,
};

use super::{Course, ETHERNET_BYTES, End, Handler};
use crate::{
    afxdp::trunk,
    counters::Counter,
    driver::Driver,
    forwarding::{Adjacency, AdjacencyId, Route, RouteKind},
    frame::{IfIndex, Packet},
    next_hops,
    tables::Family,
};

/// Pieces that one packet is split into at most: one of the largest MTU over a small IPv4 one (324).
const MAX_FRAGMENTS: usize = 32;

impl<D: Driver> Handler<'_, D> {
    /// Sends a packet on its course.
    #[inline]
    pub(super) fn forward<A: Family>(
        &mut self,
        packet: &mut Packet,
        view: &View<A>,
        course: &Course<'_, A>,
    ) -> Result<End, DropReason> {
        match *course {
            // The recipe of a connection's packet is the other direction's key.
            Course::Connection(ref conn, direction) => {
                let to = conn.key(direction.flip()).invert();
                match next_hops::of(conn, direction, self.context.snapshot) {
                    Some(hop) => match self.forward_to(packet, view, &to, hop)? {
                        End::Punt if direction == Direction::Original && self.is_served(packet, view, &to, hop) => {
                            Ok(End::Serve)
                        }
                        end => Ok(end),
                    },
                    None => Err(self.nowhere(packet, view, to.dst)),
                }
            }
            Course::Untracked(hop) | Course::Pass(hop) => self.forward_to(packet, view, &view.key, hop),
            Course::Punt => self.hand_over(packet, view),
        }
    }

    /// Whether the node's kernel gets a packet for one of its servers that was sent to a service, and would answer it past weir: not one from a
    /// pod or from the node itself, which have sources that weir's routes lead to.
    fn is_served<A: Family>(&self, packet: &Packet, view: &View<A>, to: &FlowKey<A>, hop: AdjacencyId) -> bool {
        let forwarding = &*self.context.snapshot.forwarding;
        (to.dst, to.ports) != (view.key.dst, view.key.ports)
            && packet.device != IfIndex::HOST
            && forwarding.adjacency(hop).kind == RouteKind::Host
            && forwarding.local_workload(to.src).is_none()
    }

    /// A packet of a connection whose other end cannot be reached any more. Its sender is told as that of a first packet is: other nodes
    /// move flows away from a pod that is gone, before its service says so (`tells_of_end`).
    #[cold]
    fn nowhere<A: Family>(&mut self, packet: &Packet, view: &View<A>, destination: A) -> DropReason {
        let reason = match self.context.snapshot.forwarding.route(destination) {
            Route::NoSuchPod => DropReason::NoSuchPod,
            Route::Refused(refusal) if refusal.is_silent() => return refusal.reason(),
            Route::Refused(refusal) => refusal.reason(),
            Route::Via(_) | Route::None => DropReason::NoRoute,
        };
        self.reject(packet, view, reason)
    }

    /// Sends a packet on to `hop`, translated.
    #[inline]
    pub(super) fn forward_to<A: Family>(
        &mut self,
        packet: &mut Packet,
        view: &View<A>,
        to: &FlowKey<A>,
        hop: AdjacencyId,
    ) -> Result<End, DropReason> {
        let adjacency = self.context.snapshot.forwarding.adjacency(hop);
        // Before anything is rewritten: an ICMP error quotes the packet as its sender knows it.
        if let Some((error, reason)) = obstacle(view, packet.device, adjacency) {
            return Err(self.answer_error(packet, view, error, reason));
        }
        if *to != view.key {
            rewrite::translate(packet.bytes_mut(), view, to)?;
        }
        if adjacency.kind.is_kernels() {
            return Ok(self.punt(packet));
        }
        let hops = hops_from(packet.device);
        rewrite::decrement_ttl(packet.bytes_mut(), view, hops);
        if is_too_big(view, adjacency) {
            return self.split::<A>(packet, hop);
        }
        self.send::<A>(packet, hop)
    }

    /// Splits an IPv4 packet that is longer than the next hop's MTU; the pieces are sent, the packet is consumed.
    #[cold]
    fn split<A: Family>(&mut self, packet: &Packet, hop: AdjacencyId) -> Result<End, DropReason> {
        let mtu = self.context.snapshot.forwarding.adjacency(hop).mtu as usize;
        let frame = self.driver.arena().whole(packet, &mut self.pipeline.whole);
        let Ok(Parsed::V4(view)) = parse::parse_ip(frame, ETHERNET_BYTES, Ipv4Addr::ETHERTYPE) else {
            return Err(DropReason::TooBig);
        };
        // All pieces or none: a receiver that gets a part waits for the rest in vain.
        let mut pieces: [Option<Packet>; MAX_FRAGMENTS] = [const { None }; MAX_FRAGMENTS];
        let mut next = pieces.iter_mut();
        let mut complete = true;
        let made = build::fragment_ipv4(frame, &view, mtu, |header, payload| {
            let piece = next.next().and_then(|place| {
                *place = Some(self.driver.packet_of(&[&[0; ETHERNET_BYTES], header, payload])?);
                Some(())
            });
            complete &= piece.is_some();
        });
        let complete = complete && made > 0;
        for mut piece in pieces.into_iter().flatten() {
            if complete {
                self.pipeline.count(Counter::Generated);
                let ended = self.send::<A>(&mut piece, hop);
                self.end(piece, ended);
            } else {
                self.driver.release(piece);
            }
        }
        if complete { Ok(End::Consume) } else { Err(DropReason::NoFrame) }
    }

    /// Hands a packet for the node to its kernel: where that takes it.
    pub(super) fn hand_over<A: Family>(&mut self, packet: &mut Packet, view: &View<A>) -> Result<End, DropReason> {
        let forwarding = &*self.context.snapshot.forwarding;
        let FlowKey { src, dst, .. } = view.key;
        let is_of_link = dst.ends_at_link() || src.is_bound_to_link() || forwarding.is_shared(dst);
        if !is_of_link || packet.through_tunnel || packet.device.is_kernels() {
            return Ok(self.punt(packet));
        }
        // The program there has let it come a second time: without an end.
        let is_back = packet.bytes()[6..12] == trunk::target(packet.device.forwarded()).0;
        if is_back { Err(DropReason::WrongMac) } else { Ok(End::Return) }
    }

    /// Hands a packet, which may be one that weir has made, to the node's kernel.
    pub(super) fn punt(&mut self, packet: &mut Packet) -> End {
        let is_ipv4 = packet.bytes()[ETHERNET_BYTES] >> 4 == 4;
        let ethertype = if is_ipv4 { Ipv4Addr::ETHERTYPE } else { Ipv6Addr::ETHERTYPE };
        packet.bytes_mut()[12..ETHERNET_BYTES].copy_from_slice(&ethertype.to_be_bytes());
        End::Punt
    }
}

/// How many routers a packet passes here that came by `device`: none that comes by the node's kernel, which made it or has counted itself.
#[inline(always)]
pub(super) fn hops_from(device: IfIndex) -> u8 {
    u8::from(!device.is_kernels())
}

/// What keeps a packet that came by `device` from going on to `hop`, which its sender is to know.
#[inline]
pub(super) fn obstacle<A: Address>(
    view: &View<A>,
    device: IfIndex,
    hop: &Adjacency,
) -> Option<(IcmpError, DropReason)> {
    if hop.kind.is_kernels() {
        None
    } else if view.ttl <= hops_from(device) {
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
