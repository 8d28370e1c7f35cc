//! What neighbours on a link ask each other: ARP and neighbour solicitations of workloads, and what control learns by the way.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use weir_packet::{
    Address, DropReason, Mac, build,
    parse::{Arp, View},
};

use super::{End, Event, Handler};
use crate::{
    allowance::Cause,
    counters::Counter,
    driver::Driver,
    forwarding::DeviceId,
    frame::{ONE_FRAME_BYTES, Packet},
    origin::Origin,
};

/// Calico's gateway address on every workload device.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

impl<D: Driver> Handler<'_, D> {
    /// ARP: answered for the gateway and the node's addresses on workload devices; the kernel's on uplinks.
    pub(super) fn arp(
        &mut self,
        packet: &Packet,
        arp: &Arp,
        origin: Origin,
        device: DeviceId,
    ) -> Result<End, DropReason> {
        let forwarding = &*self.context.snapshot.forwarding;
        let workload = match origin {
            Origin::Uplink => return Ok(End::Punt),
            Origin::Host | Origin::Forwarded { .. } => return Err(DropReason::LinkScope),
            Origin::Workload(workload) => workload,
        };
        // An address probe (RFC 5227) has no sender address; it is nobody's to answer.
        if forwarding.local_workload(arp.sender_ip) != Some(workload) {
            return Err(DropReason::SpoofedSource);
        }
        self.learn(packet, IpAddr::V4(arp.sender_ip));
        let ours = arp.target_ip == GATEWAY || forwarding.is_local(arp.target_ip);
        if arp.operation == Arp::REQUEST && ours {
            let mac = forwarding.device(device).mac;
            self.answer_link(packet, device, |out| build::arp_reply(out, arp, mac));
        }
        Ok(End::Consume)
    }

    /// Link-scope traffic of a workload: neighbour solicitations for its gateway are answered, all else ends here.
    pub(super) fn neighbor_solicitation(
        &mut self,
        packet: &Packet,
        view: &View<Ipv6Addr>,
        device_id: DeviceId,
    ) -> Result<End, DropReason> {
        let forwarding = &*self.context.snapshot.forwarding;
        let device = forwarding.device(device_id);
        // Also from its answer to the kernel, which asked for it on weir's behalf.
        if device.workload.is_some_and(|workload| forwarding.local_workload(view.key.src) == Some(workload)) {
            self.learn(packet, view.key.src.to_ip());
        }
        // Of several frames: no neighbour has so much to tell.
        let target = if packet.has_tail() { None } else { build::solicited_target(packet.bytes(), view) };
        let target = target.ok_or(DropReason::LinkScope)?;
        // Without a link-local address of its own, the device answers for any that the pod takes for its gateway.
        let gateway = target.is_unicast_link_local() && device.link_local.is_none_or(|own| own == target);
        if gateway || forwarding.is_local(target) {
            self.answer_link(packet, device_id, |out| {
                build::neighbor_advertisement(out, packet.bytes(), view, device.mac)
            });
        }
        Ok(End::Consume)
    }

    /// Sends a link-layer answer back by the device that asked.
    fn answer_link(&mut self, asked: &Packet, device: DeviceId, write: impl FnOnce(&mut [u8]) -> Option<usize>) {
        let Some(mut answer) = self.driver.allocate() else { return };
        answer.set_len(ONE_FRAME_BYTES);
        let Some(length) = write(answer.bytes_mut()) else { return self.driver.release(answer) };
        answer.set_len(length);
        answer.device = asked.device;
        self.pipeline.count(Counter::Generated);
        let port = self.context.snapshot.forwarding.device(device).port;
        self.end(answer, Ok(End::Transmit(port)));
    }

    /// Tells control the MAC address of a workload that sent a packet from `address`, where it does not know it yet, or knows another. Each that it is
    /// told is a publication, so of a pod whose address changes all the time it hears seldom.
    pub(super) fn learn(&mut self, packet: &Packet, address: IpAddr) {
        let known = self.context.snapshot.forwarding.neighbor(packet.device, address);
        let mac = Mac(*packet.bytes()[6..].first_chunk().expect("an Ethernet header"));
        if known == Some(mac) || mac.is_group() {
            return;
        }
        if known.is_none() || self.pipeline.changes.take(Cause::Pod(packet.device), self.context.now) {
            // A full channel loses nothing that the next packet does not bring again.
            let _ = self.pipeline.events.try_send(Event::Learned { device: packet.device, address, mac });
        }
    }
}
