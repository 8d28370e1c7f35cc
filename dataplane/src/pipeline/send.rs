//! The last step: tunnel header, Ethernet header, or a wait for the next hop's MAC address.

use std::net::Ipv4Addr;

use weir_packet::{
    Address, DropReason,
    rewrite::{self, IPIP_HEADER_BYTES},
};

use super::{ETHERNET_BYTES, End, Handler};
use crate::{
    driver::Driver,
    forwarding::{AdjacencyId, Encapsulation},
    frame::Packet,
    tables::Family,
};

impl<D: Driver> Handler<'_, D> {
    /// Sends a whole packet to its next hop.
    #[inline]
    pub(super) fn send<A: Family>(
        &mut self,
        packet: &mut Packet,
        destination: A,
        hop: AdjacencyId,
    ) -> Result<End, DropReason> {
        let forwarding = &*self.context.snapshot.forwarding;
        let adjacency = forwarding.adjacency(hop);
        let device = forwarding.device(adjacency.device.ok_or(DropReason::NoRoute)?);
        let mut ethertype = A::ETHERTYPE;
        if let Encapsulation::Ipip { src, dst } = adjacency.encapsulation {
            if !packet.grow_front(IPIP_HEADER_BYTES as u16) {
                return Err(DropReason::TooBig);
            }
            // Only to tell the fragments of packets apart, which DF forbids (RFC 6864, 4.1): any number will do.
            let id = self.pipeline.tunnel_id.wrapping_add(1);
            self.pipeline.tunnel_id = id;
            let (header, inner) = packet.bytes_mut()[ETHERNET_BYTES..].split_at_mut(IPIP_HEADER_BYTES);
            rewrite::write_ipip_header(header, inner, src, dst, id);
            ethertype = Ipv4Addr::ETHERTYPE;
        }
        packet.device = device.index;
        let mac = match adjacency.mac {
            Some(mac) => mac,
            None => {
                // An unspecified next hop stands for the destination itself, on the link.
                let next_hop = match adjacency.next_hop {
                    unspecified if unspecified.is_unspecified() => destination.to_ip(),
                    next_hop => next_hop,
                };
                let known = forwarding.neighbor(device.index, next_hop);
                if known.is_none() && self.pipeline.held.has_room(device.index, next_hop) {
                    rewrite::set_ethernet(packet.bytes_mut(), Default::default(), device.mac, ethertype);
                    return Ok(End::Hold(next_hop));
                }
                known.ok_or(DropReason::NeighborUnresolved)?
            }
        };
        rewrite::set_ethernet(packet.bytes_mut(), mac, device.mac, ethertype);
        Ok(End::Transmit(device.port))
    }

    /// Sends held packets whose neighbour is known now, and gives up those that waited too long.
    pub(super) fn look_after_held(&mut self) {
        let snapshot = self.context.snapshot;
        let (now, forwarding) = (self.context.now, &*snapshot.forwarding);
        // Only a publication tells a MAC address.
        if std::mem::replace(&mut self.pipeline.generation, snapshot.generation) != snapshot.generation {
            while let Some(mut held) =
                self.pipeline.held.take_if(|held| forwarding.neighbor(held.device, held.next_hop).is_some())
            {
                let mac = forwarding.neighbor(held.device, held.next_hop);
                let device = forwarding.device_by_index(held.device).map(|id| forwarding.device(id));
                let ended = match (mac, device) {
                    (Some(mac), Some(device)) => {
                        held.packet.bytes_mut()[..6].copy_from_slice(&mac.0);
                        held.packet.bytes_mut()[6..12].copy_from_slice(&device.mac.0);
                        Ok(End::Transmit(device.port))
                    }
                    _ => Err(DropReason::NeighborUnresolved),
                };
                self.end(held.packet, ended);
            }
        }
        while let Some(held) = self.pipeline.held.take_overdue(now) {
            self.end(held.packet, Err(DropReason::NeighborUnresolved));
        }
    }
}
