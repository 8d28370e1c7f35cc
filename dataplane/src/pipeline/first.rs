//! The first packet of a connection: what the tables say of it, and what is told of that.

use rand_chacha::rand_core::Rng;
use weir_conntrack::{Opening, Tracked};
use weir_packet::{DropReason, FlowKey, Protocol, parse::View};
use weir_policy::model::HostStage;

use super::{Course, Event, Handler, Known, Pipeline, forward::obstacle, open::Opened, track::follow};
use crate::{
    action_log,
    counters::Counter,
    decide::{self, Decision, Verdict},
    driver::Driver,
    forwarding::RouteKind,
    frame::Packet,
    host_policy,
    origin::{Arrival, Origin},
    tables::Family,
};

impl<'a, D: Driver> Handler<'a, D> {
    /// A packet without a connection.
    pub(super) fn first_packet<A: Family>(
        &mut self,
        packet: &Packet,
        known: Known<'_, A>,
    ) -> Result<Course<'a, A>, DropReason> {
        let Known { view, origin } = known;
        let context = self.context;
        let snapshot = context.snapshot;
        let forwarding = &*snapshot.forwarding;
        // Not of an address that it made up: each would be a publication.
        if matches!(origin, Origin::Workload(workload) if forwarding.local_workload(view.key.src) == Some(workload)) {
            self.learn(packet, view.key.src.to_ip());
        }
        let services = snapshot.rules.services.services::<A>();
        let segment = self.observed(packet, view);
        let opens = match segment.opening(&view.key) {
            Opening::Opens => true,
            Opening::MidStream => context.tcp_loose && !services.claims(&view.key),
            Opening::Never => false,
        };
        // What opens nothing is only let go by untracked policy, or by what is known of the node's own.
        let may_pass = match origin {
            Origin::Workload(_) => false,
            Origin::Uplink => snapshot.rules.host.has_untracked() || forwarding.is_for_node(view.key.dst),
            Origin::Host | Origin::Forwarded { .. } => true,
        };
        if !opens && !may_pass {
            return Err(DropReason::Invalid);
        }
        let arrival = known.arrival(packet, forwarding);
        let mut decision = self.decide(arrival, &view.key);

        if decision.untracked {
            return self.untracked(packet, view, &decision);
        }
        let answers = self.answers_node(packet, view, &decision);
        // To the node itself and no service's: the kernel's business, whatever it is.
        if origin.is_outside() && (decision.verdict == Verdict::Local || answers) {
            return Ok(Course::Punt);
        }
        // Of a pod of another node, which asks a node port under that node's address, if its pool is masqueraded, and pods through a tunnel.
        if origin == Origin::Uplink
            && !packet.through_tunnel
            && decision.service.is_some()
            && forwarding.is_behind_tunnel(view.key.src)
            && forwarding.nat_outgoing(view.key.src, view.key.dst)
        {
            return Err(DropReason::SpoofedSource);
        }
        let claimed = decision.service.is_some() || services.claims(&view.key);
        // What the node's own kernel sends to a remote pod is answered to the node's own address, or to whom it forwards for, past weir, as is
        // what it answers a remote pod: half a connection cannot be followed, and the kernel follows the whole of it.
        if origin.is_kernels()
            && (decision.verdict == Verdict::Forward || answers)
            && !claimed
            && decision.snat.is_none()
            && let Some(hop) = decision.adjacency()
            && forwarding.adjacency(hop).kind != RouteKind::Workload
        {
            return Ok(Course::Pass(hop));
        }
        if !self.checksum_ok(packet, view) {
            return Err(DropReason::Invalid);
        }
        if !opens {
            // A frontend on an address of the node has a port that one of the node's own sockets may have had before, or has at another
            // address: of its connections weir knows nothing. What opens nothing is that socket's, or the kernel's to refuse.
            let is_nodes = forwarding.is_local(view.key.dst) || view.key.dst.is_loopback();
            return if decision.service.is_some() && is_nodes { Ok(Course::Punt) } else { Err(DropReason::Invalid) };
        }
        if let Some(choice) = &decision.choice
            && !context.affinity.clients().remember(choice, context.now)
        {
            // Another worker has chosen for this client since: its choice holds for this connection too.
            decision = self.decide(arrival, &view.key);
        }
        match decision.verdict {
            Verdict::Forward | Verdict::Local => {}
            Verdict::Drop(reason) => {
                if reason.is_policy() {
                    self.tell_of(origin, &view.key, &decision);
                }
                return Err(reason);
            }
            Verdict::Reject(reason) => return Err(self.reject(packet, view, reason)),
            Verdict::Pass => return Err(self.reject(packet, view, DropReason::NoRoute)),
        }
        let Some(hop) = decision.adjacency() else {
            return Err(self.reject(packet, view, DropReason::NoRoute));
        };
        // What does not get any further opens no connection.
        if let Some((error, reason)) = obstacle(view, packet.device, forwarding.adjacency(hop)) {
            return Err(self.answer_error(packet, view, error, reason));
        }
        let Opened { hit, ours } = self.open(&decision, packet.device, view, &segment, arrival)?;
        let conn = A::table(context.tables).conn(hit.conn);
        if ours {
            self.pipeline.count(Counter::Opened);
            self.tell_of(origin, &view.key, &decision);
            if let Some(slot) = decision.slot {
                snapshot.rules.count_backend::<A>(self.pipeline.counters.number(), slot);
            }
        } else if follow(&conn, hit.direction, &segment, context) == Tracked::Invalid {
            // Somebody was faster, with a packet of the same flow: this one is a further packet of that connection.
            return Err(DropReason::Invalid);
        }
        Ok(Course::Connection(conn, hit.direction))
    }

    pub(super) fn decide<A: Family>(&mut self, arrival: Arrival, key: &FlowKey<A>) -> Decision<'a, A> {
        let context = self.context;
        let Pipeline { drawn, choices, .. } = &mut *self.pipeline;
        let random = &mut || drawn.take().unwrap_or_else(|| choices.next_u64());
        decide::decide(context.snapshot, arrival, key, context.affinity, context.now, random)
    }

    /// A packet that untracked policy lets go: nothing is remembered of it, and the next one is judged as it was.
    #[cold]
    fn untracked<A: Family>(
        &mut self,
        packet: &Packet,
        view: &View<A>,
        decision: &Decision<'_, A>,
    ) -> Result<Course<'a, A>, DropReason> {
        match (decision.verdict, decision.adjacency()) {
            (Verdict::Local, _) => Ok(Course::Punt),
            (Verdict::Forward, Some(hop)) => Ok(Course::Untracked(hop)),
            (Verdict::Drop(reason), _) => Err(reason),
            (Verdict::Reject(reason), _) => Err(self.reject(packet, view, reason)),
            (Verdict::Forward, None) | (Verdict::Pass, _) => Err(self.reject(packet, view, DropReason::NoRoute)),
        }
    }

    /// Counts a new connection, or one that is denied, for each rule that decided about it, and tells of the Log rules that it met.
    pub(super) fn tell_of<A: Family>(&mut self, origin: Origin, key: &FlowKey<A>, decision: &Decision<'_, A>) {
        let context = self.context;
        let rules = &context.snapshot.rules;
        let of_host = decision.host.iter().map(|(_, judgement)| judgement);
        for judgement in [decision.egress, decision.ingress].into_iter().flatten().chain(of_host) {
            rules.hits.add(self.pipeline.counters.number(), judgement.rule.0 as usize);
        }
        action_log::entries(context.snapshot, origin, key, decision, |entry| {
            let send = |logged| self.pipeline.events.try_send(Event::Logged(logged)).is_ok();
            self.pipeline.action_log.tell(entry, rules, context.now, send);
        });
    }

    /// Whether a packet to or from the node itself that a host endpoint's policy for first packets denies may be an answer: to what the
    /// node's kernel asked, or of it to who asked. One half of such a connection passes without weir, so nothing remembers it; but what
    /// opens nothing can only be such an answer, or dies at its receiver. A TCP segment to a port that the node listens on is none: the
    /// kernel asks from other ports. So what is open to the node is cut when a policy forbids it.
    #[inline]
    fn answers_node<A: Family>(&mut self, packet: &Packet, view: &View<A>, decision: &Decision<'_, A>) -> bool {
        let denied = decision.verdict == Verdict::Drop(DropReason::PolicyDeniedHostEndpoint);
        denied && decision.service.is_none() && self.may_answer(packet, view, decision)
    }

    #[cold]
    fn may_answer<A: Family>(&mut self, packet: &Packet, view: &View<A>, decision: &Decision<'_, A>) -> bool {
        let (key, snapshot) = (&view.key, self.context.snapshot);
        let forwarding = &snapshot.forwarding;
        match decision.host.denied_at() {
            Some(HostStage::Local) => {}
            // Denied before services were looked at.
            Some(HostStage::PreDnat)
                if forwarding.is_for_node(key.dst) && !snapshot.rules.services.services::<A>().claims(key) => {}
            _ => return false,
        }
        if matches!(self.observed(packet, view).opening(key), Opening::Opens) {
            return host_policy::may_answer_failsafe(snapshot, key);
        }
        let is_listened_to = key.protocol == Protocol::TCP
            && forwarding.is_for_node(key.dst)
            && forwarding.listens(key.ports.destination());
        !is_listened_to
    }
}
