//! The last step: tunnel header, Ethernet header, or a wait for the next hop's MAC address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use weir_packet::{
    Address, DropReason,
    rewrite::{self, IPIP_HEADER_BYTES},
};

use super::{ETHERNET_BYTES, End, Handler};
use crate::{
    driver::Driver,
    forwarding::{Adjacency, AdjacencyId, Encapsulation},
    frame::{IfIndex, Packet},
    held::Room,
    model::Role,
    tables::Family,
};

impl<D: Driver> Handler<'_, D> {
    /// Sends a whole packet to its next hop.
    #[inline]
    pub(super) fn send<A: Family>(&mut self, packet: &mut Packet, hop: AdjacencyId) -> Result<End, DropReason> {
        let forwarding = &*self.context.snapshot.forwarding;
        let adjacency = forwarding.adjacency(hop);
        let device = forwarding.device(adjacency.device.ok_or(DropReason::NoRoute)?);
        let sender = std::mem::replace(&mut packet.device, device.index);
        let mac = adjacency.mac.or_else(|| forwarding.neighbor(device.index, next_hop(packet, adjacency)));
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
        // A tunnel's own packet that only the kernel knows the way of.
        if device.role == Role::Kernel {
            return Ok(self.punt(packet));
        }
        rewrite::set_ethernet(packet.bytes_mut(), mac.unwrap_or_default(), device.mac, ethertype);
        if mac.is_some() {
            Ok(End::Transmit(device.port))
        } else if self.make_room(sender, device.index, next_hop(packet, adjacency)) {
            Ok(End::Hold(hop, sender))
        } else {
            Err(DropReason::NeighborUnresolved)
        }
    }

    /// Whether a packet of that sender may wait for that next hop; one of another sender may have to make way.
    #[cold]
    fn make_room(&mut self, sender: IfIndex, device: IfIndex, next_hop: IpAddr) -> bool {
        match self.pipeline.held.room(sender, device, next_hop) {
            Room::Free => true,
            Room::InPlaceOf(place) => {
                let other = self.pipeline.held.take_out(place);
                self.end(other.packet, Err(DropReason::NeighborUnresolved));
                true
            }
            Room::None => false,
        }
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

/// Whose MAC address a packet to that adjacency needs.
#[cold]
pub(super) fn next_hop(packet: &Packet, adjacency: &Adjacency) -> IpAddr {
    if !adjacency.next_hop.is_unspecified() {
        return adjacency.next_hop;
    }
    // An unspecified next hop stands for the destination itself, on the link, and so in no tunnel.
    let header = &packet.bytes()[ETHERNET_BYTES..];
    match header[0] >> 4 {
        4 => Ipv4Addr::read(&header[16..]).to_ip(),
        _ => Ipv6Addr::read(&header[24..]).to_ip(),
    }
}
