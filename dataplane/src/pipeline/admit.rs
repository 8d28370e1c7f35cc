//! Admission: where a packet came from, its headers, and whether it is to be routed.

use weir_packet::{
    Address, DropReason, Protocol,
    parse::{self, Kind, Parsed, View},
};

use super::{Admitted, End, Handler, tunnel};
use crate::{
    driver::Driver,
    forwarding::Forwarding,
    frame::{IfIndex, LinkType, Packet},
    origin::{Arrival, Origin},
    tables::Family,
};

/// How far a packet may go.
enum Scope {
    /// Anywhere.
    Routed,
    /// No further than its link: between a pod and its gateway.
    Pod,
    /// No further than its link, where it is the node's own kernel's.
    Kernel,
}

impl<D: Driver> Handler<'_, D> {
    /// The beginning of the general way.
    #[inline]
    pub(super) fn admit(&mut self, packet: &mut Packet) -> Result<Admitted, DropReason> {
        let forwarding = &*self.context.snapshot.forwarding;
        let (origin, device) = Origin::of(packet.device, forwarding).ok_or(DropReason::UnknownDevice)?;
        if packet.link == LinkType::Other {
            return Err(DropReason::WrongMac);
        }
        let parsed = match parse::parse_start(packet.bytes(), packet.total_bytes()) {
            // To a host port on a loopback address, which only the node's own kernel can ask for.
            Err(DropReason::MartianAddress) if origin == Origin::Host => {
                parse::parse_start_of_own(packet.bytes(), packet.total_bytes())
            }
            parsed => parsed,
        };
        match parsed {
            Ok(Parsed::V4(mut view)) => {
                if view.key.protocol == Protocol::IPIP && origin == Origin::Uplink {
                    view = tunnel::decapsulate(packet, &view, forwarding)?;
                }
                match scope(packet, &view, origin, forwarding)? {
                    Scope::Routed => {}
                    Scope::Kernel => return self.hand_over(packet, &view).map(Admitted::End),
                    // IPv4 has ARP for its neighbours; multicast and IGMP end here.
                    Scope::Pod => return Err(DropReason::LinkScope),
                }
                self.cut_padding(packet, &view);
                Ok(Admitted::V4(view, settle(packet, origin, view.key.src, forwarding)))
            }
            Ok(Parsed::V6(view)) => {
                match scope(packet, &view, origin, forwarding)? {
                    Scope::Routed => {}
                    Scope::Kernel => return self.hand_over(packet, &view).map(Admitted::End),
                    Scope::Pod => return self.neighbor_solicitation(packet, &view, device).map(Admitted::End),
                }
                self.cut_padding(packet, &view);
                Ok(Admitted::V6(view, settle(packet, origin, view.key.src, forwarding)))
            }
            Ok(Parsed::Arp(arp)) => self.arp(packet, &arp, origin, device).map(Admitted::End),
            Ok(Parsed::Other { .. }) if origin == Origin::Uplink => Ok(Admitted::End(End::Punt)),
            Ok(Parsed::Other { .. }) => Err(DropReason::UnknownEtherType),
            Err(reason) => Err(reason),
        }
    }

    /// Ethernet padding is none of the packet's.
    #[inline]
    fn cut_padding<A: Address>(&mut self, packet: &mut Packet, view: &View<A>) {
        self.driver.truncate(packet, usize::from(view.end));
    }
}

/// Where a packet came from, now that its source is known.
#[inline]
fn settle<A: Family>(packet: &mut Packet, origin: Origin, source: A, forwarding: &Forwarding) -> Origin {
    let settled = origin.with_source(source, forwarding);
    if settled != origin {
        packet.device = IfIndex::FORWARDED_BY_UNKNOWN;
    }
    settled
}

#[inline]
fn scope<A: Family>(
    packet: &Packet,
    view: &View<A>,
    origin: Origin,
    forwarding: &Forwarding,
) -> Result<Scope, DropReason> {
    let multicast = view.key.dst.is_multicast_or_broadcast();
    // What comes to the node itself is looked at when it opens a connection: what its pods answer to the node comes like this.
    if origin == Origin::Uplink
        && !packet.through_tunnel
        && forwarding.is_behind_tunnel(view.key.src)
        && !forwarding.is_direct(view.key.dst)
    {
        return Err(DropReason::SpoofedSource);
    }
    if matches!(packet.link, LinkType::Broadcast | LinkType::Multicast)
        && !multicast
        && !forwarding.is_shared(view.key.dst)
    {
        return Err(DropReason::WrongMac);
    }
    // Where a host endpoint governs, what is for the node is judged whatever address of the node it is for; but not what links live by.
    let is_governed = || Arrival::by(origin, packet.device, packet.through_tunnel, forwarding).host_endpoint.is_some();
    if matches!(view.kind, Kind::Control) || multicast {
        return match origin {
            Origin::Uplink if !matches!(view.kind, Kind::Control) && is_governed() => Ok(Scope::Routed),
            Origin::Uplink => Ok(Scope::Kernel),
            Origin::Workload(_) => Ok(Scope::Pod),
            Origin::Host | Origin::Forwarded { .. } => Err(DropReason::LinkScope),
        };
    }
    if view.key.dst.is_bound_to_link() || view.key.src.is_bound_to_link() {
        return match origin == Origin::Uplink && forwarding.is_for_node(view.key.dst) {
            true if is_governed() => Ok(Scope::Routed),
            true => Ok(Scope::Kernel),
            false => Err(DropReason::LinkScope),
        };
    }
    Ok(Scope::Routed)
}
