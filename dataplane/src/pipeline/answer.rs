//! Answers: what a sender is told about a packet that may not go on.

use weir_conntrack::ConnRef;
use weir_packet::{
    Direction, DropReason, Protocol,
    build::{self, IcmpError},
    parse::View,
};

use super::Handler;
use crate::{
    allowance::{Cause, Network},
    counters::Counter,
    decide,
    driver::Driver,
    forwarding::AdjacencyId,
    frame::{ONE_FRAME_BYTES, Packet},
    model::Role,
    next_hops,
    tables::Family,
};

// Each returns why the packet is dropped.
impl<D: Driver> Handler<'_, D> {
    /// Tells the sender of a packet that may not go on: TCP by a RST, others by an ICMP error. An external or load balancer IP answers an echo
    /// request itself.
    #[cold]
    pub(super) fn reject<A: Family>(&mut self, packet: &Packet, view: &View<A>, reason: DropReason) -> DropReason {
        let services = self.context.snapshot.rules.services.services::<A>();
        if reason == DropReason::UnpublishedPort
            && decide::is_echo_request(&view.key)
            && services.is_external(view.key.dst)
        {
            let cause = self.cause(packet, view);
            if self.pipeline.echoes.take(cause, self.context.now) {
                self.answer::<A>(packet, self.back_to(packet, view), |out, frame, _| {
                    build::echo_reply(out, frame, view)
                });
            }
            return reason;
        }
        let error = match reason {
            DropReason::NoSuchPod | DropReason::RouteUnreachable => IcmpError::HostUnreachable,
            DropReason::RouteProhibited => IcmpError::AdminProhibited,
            DropReason::NoRoute => IcmpError::NetUnreachable,
            _ => IcmpError::PortUnreachable,
        };
        if view.key.protocol != Protocol::TCP || error != IcmpError::PortUnreachable {
            return self.answer_error(packet, view, error, reason);
        }
        if self.may_reset(packet, view) {
            self.answer::<A>(packet, self.back_to(packet, view), |out, frame, _| build::tcp_reset(out, frame, view));
        }
        reason
    }

    /// Sends the sender of a packet an ICMP error.
    #[cold]
    pub(super) fn answer_error<A: Family>(
        &mut self,
        packet: &Packet,
        view: &View<A>,
        error: IcmpError,
        reason: DropReason,
    ) -> DropReason {
        let (cause, now) = (self.cause(packet, view), self.context.now);
        let shares = match error {
            IcmpError::TooBig { .. } => &mut self.pipeline.too_big,
            _ => &mut self.pipeline.errors,
        };
        if shares.take(cause, now) {
            self.answer::<A>(packet, self.back_to(packet, view), |out, frame, source| {
                // The node's own process that asked from a loopback address takes an answer from there only.
                let source = if view.key.src.is_loopback() { Some(view.key.dst) } else { source };
                build::icmp_error(out, frame, view, source?, error)
            });
        }
        reason
    }

    /// A segment of a connection whose backend is gone. Both ends are told: its sender by a RST, and where that is the backend, the client
    /// by one made of the very segment, whose number is the one that it expects. The connection stays for as long as one that was reset does,
    /// so that whatever either end sends yet is answered too.
    #[cold]
    pub(super) fn reset<A: Family>(
        &mut self,
        packet: &Packet,
        view: &View<A>,
        conn: &ConnRef<'_, A>,
        direction: Direction,
        reason: DropReason,
    ) -> DropReason {
        // A damaged one changes nothing and is no reason to tell anybody.
        if !self.checksum_ok(packet, view) {
            return DropReason::Invalid;
        }
        conn.end_soon(self.context.now);
        if direction == Direction::Reply && self.may_reset(packet, view) {
            let to = conn.key(Direction::Original).invert();
            let answers = next_hops::of(conn, Direction::Reply, self.context.snapshot);
            self.answer::<A>(packet, answers, |out, frame, _| build::tcp_reset_onwards(out, frame, view, &to));
        }
        self.reject(packet, view, reason)
    }

    fn may_reset<A: Family>(&mut self, packet: &Packet, view: &View<A>) -> bool {
        let cause = self.cause(packet, view);
        self.pipeline.resets.take(cause, self.context.now)
    }

    /// Who sent a packet.
    fn cause<A: Family>(&self, packet: &Packet, view: &View<A>) -> Cause {
        let forwarding = &*self.context.snapshot.forwarding;
        match forwarding.device_by_index(packet.device).map(|device| forwarding.device(device).role) {
            Some(Role::Workload) => Cause::Pod(packet.device),
            Some(Role::Host) => Cause::Host,
            Some(Role::Uplink | Role::Kernel) | None => Cause::Outside(Network::of(view.key.src)),
        }
    }

    /// Where the sender of a packet is.
    fn back_to<A: Family>(&self, packet: &Packet, view: &View<A>) -> Option<AdjacencyId> {
        next_hops::of_answers(packet.device, &view.key, &self.context.snapshot.forwarding)
    }

    /// Answers `packet` by one that goes to `hop`. `write` gets the whole frame that it is an answer to, and this node's address on the way
    /// there.
    fn answer<A: Family>(
        &mut self,
        packet: &Packet,
        hop: Option<AdjacencyId>,
        write: impl FnOnce(&mut [u8], &[u8], Option<A>) -> Option<usize>,
    ) {
        let forwarding = &*self.context.snapshot.forwarding;
        let Some(hop) = hop else { return };
        let Some(mut answer) = self.driver.allocate() else { return };
        answer.set_len(ONE_FRAME_BYTES);
        let frame = self.driver.arena().whole(packet, &mut self.pipeline.whole);
        let Some(length) = write(answer.bytes_mut(), frame, forwarding.address_towards(hop)) else {
            return self.driver.release(answer);
        };
        answer.set_len(length);
        self.pipeline.count(Counter::Generated);
        let ended = match forwarding.adjacency(hop).kind {
            kind if kind.is_kernels() => Ok(self.punt(&mut answer)),
            _ => self.send::<A>(&mut answer, hop),
        };
        self.end(answer, ended);
    }
}
