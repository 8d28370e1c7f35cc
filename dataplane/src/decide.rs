//! The verdict on the first packet of a connection.
//!
//! [`decide`] sees a flow key, where it came from, the tables of a snapshot, which backends clients had, and the time; no packet, no clock. The running dataplane,
//! `weir replay` and `weir trace` call this same function, so a trace tells what the router does.

use weir_nat::{Affinity, Backend, BackendSlot, Choice, Decision as ServiceDecision, ServiceId};
use weir_packet::{Address, DropReason, FlowKey, Ports, Protocol, Tick};
use weir_policy::{Judgement, PolicyDirection};

use crate::{
    forwarding::{AdjacencyId, Forwarding, Route, RouteKind, Routed, WorkloadId},
    host_policy::{self, Before, HostJudgements},
    model::Refusal,
    origin::{Arrival, Origin},
    snapshot::Snapshot,
};

/// What happens to the first packet of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It is forwarded.
    Forward,
    /// It goes to this node's kernel; no service claims it.
    Local,
    /// No service claims it and there is no route.
    Pass,
    /// It is dropped.
    Drop(DropReason),
    /// It is dropped and its sender is told.
    Reject(DropReason),
}

/// A verdict with all that led to it.
#[derive(Debug, Clone)]
pub struct Decision<'s, A: Address> {
    /// The verdict.
    pub verdict: Verdict,
    /// The key after DNAT, before SNAT.
    pub translated: FlowKey<A>,
    /// The service that claims the packet.
    pub service: Option<ServiceId>,
    /// Every backend that could have been picked.
    pub candidates: &'s [Backend<A>],
    /// The backend that was picked.
    pub backend: Option<(A, u16)>,
    /// That backend's number in the service table.
    pub slot: Option<BackendSlot>,
    /// That backend's stamp; 0 without one.
    pub backend_stamp: u32,
    /// What is to be remembered of the pick ([`Clients::remember`](weir_nat::Clients::remember)), once the packet turns out to open a
    /// connection, whatever the verdict on it is.
    pub choice: Option<Choice<A>>,
    /// Whether the service's rules masquerade the connection.
    pub masquerade: bool,
    /// The source address that the packet takes, for a service's sake or its pool's.
    pub snat: Option<A>,
    /// What the source workload's policies say.
    pub egress: Option<Judgement>,
    /// What the destination workload's policies say.
    pub ingress: Option<Judgement>,
    /// What host endpoints' policies say.
    pub host: HostJudgements,
    /// Whether untracked policy lets the packet go, so that no connection is made of it.
    pub untracked: bool,
    /// Where the packet goes.
    pub route: Route,
}

impl<A: Address> Decision<'_, A> {
    /// The adjacency of a packet that is forwarded.
    pub fn adjacency(&self) -> Option<AdjacencyId> {
        self.route.adjacency()
    }
}

/// Judges the first packet of a connection.
pub fn decide<'s, A: Routed>(
    snapshot: &'s Snapshot,
    arrival: Arrival,
    key: &FlowKey<A>,
    affinity: &Affinity,
    now: Tick,
    random: &mut impl FnMut() -> u64,
) -> Decision<'s, A> {
    let forwarding = &snapshot.forwarding;
    let from = arrival.origin;
    let mut decision = Decision {
        verdict: Verdict::Forward,
        translated: *key,
        service: None,
        candidates: &[],
        backend: None,
        slot: None,
        backend_stamp: 0,
        choice: None,
        masquerade: false,
        snat: None,
        egress: None,
        ingress: None,
        host: HostJudgements::default(),
        untracked: false,
        route: Route::None,
    };

    if let Err(reason) = check_source(snapshot, from, key).and_then(|()| check_link(snapshot, from, key)) {
        decision.verdict = Verdict::Drop(reason);
        return decision;
    }

    let before = match host_policy::before_services(snapshot, arrival, key, &mut decision.host) {
        Ok(before) => before,
        Err(reason) => {
            decision.verdict = Verdict::Drop(reason);
            return decision;
        }
    };
    decision.untracked = before == Before::Untracked;
    let service = match before {
        // Services need connections.
        Before::Untracked => ServiceDecision::NotAService,
        Before::Nothing | Before::Allowed => {
            snapshot.rules.services.services::<A>().decide(key, affinity.clients(), now, random)
        }
    };
    match service {
        // The router that sent it here would get it back, again and again until its TTL ends.
        ServiceDecision::NotAService
            if from == Origin::Uplink
                && before != Before::Untracked
                && snapshot.rules.services.services::<A>().is_external(key.dst) =>
        {
            decision.verdict = match key.protocol {
                Protocol::TCP => Verdict::Reject(DropReason::UnpublishedPort),
                _ if is_echo_request(key) => Verdict::Reject(DropReason::UnpublishedPort),
                _ => Verdict::Drop(DropReason::UnpublishedPort),
            };
            return decision;
        }
        ServiceDecision::NotAService => {}
        ServiceDecision::Translate { backend, masquerade, candidates, service, slot, choice } => {
            decision.choice = choice;
            decision.slot = Some(slot);
            decision.service = Some(service);
            decision.candidates = candidates;
            decision.backend = Some((backend.address, backend.port));
            decision.backend_stamp = backend.stamp;
            decision.masquerade = masquerade;
            decision.translated.dst = backend.address;
            decision.translated.ports = Ports::new(key.ports.source(), backend.port);
        }
        ServiceDecision::Reject { reason, service } => {
            decision.service = service;
            decision.verdict = Verdict::Reject(reason);
            return decision;
        }
        ServiceDecision::Drop { reason, service } => {
            decision.service = service;
            decision.verdict = Verdict::Drop(reason);
            return decision;
        }
    }

    decision.route = route(forwarding, key, &decision.translated);
    let judged =
        judge(snapshot, from, &decision.translated, &mut decision.egress, &mut decision.ingress).and_then(|own| {
            match own {
                OwnPolicy::Exempt => Ok(()),
                OwnPolicy::Allows => {
                    let (translated, route) = (&decision.translated, decision.route);
                    host_policy::after_services(snapshot, arrival, translated, route, before, &mut decision.host)
                }
            }
        });
    if let Err(reason) = judged {
        decision.verdict = Verdict::Drop(reason);
        return decision;
    }

    let claimed = decision.service.is_some();
    match decision.route {
        Route::NoSuchPod => decision.verdict = Verdict::Reject(DropReason::NoSuchPod),
        Route::Refused(refusal) => decision.verdict = refused(refusal),
        Route::None if !claimed => decision.verdict = Verdict::Pass,
        Route::None => {}
        Route::Via(adjacency) => {
            let kind = forwarding.adjacency(adjacency).kind;
            if kind == RouteKind::Host && !claimed {
                decision.verdict = Verdict::Local;
            }
            let leaves = kind.leaves_node();
            // A reply to the node's own port would never reach weir: what the kernel sends to a service takes a port of weir's. Nor would one to
            // whoever the kernel forwards for, unless it comes from a pod of this node or from the node itself.
            let own_port = claimed
                && match from {
                    Origin::Host => true,
                    Origin::Forwarded { .. } => !matches!(kind, RouteKind::Workload | RouteKind::Host),
                    Origin::Workload(_) | Origin::Uplink => false,
                };
            // What ends at the node itself does not leave it, and keeps its source, as with netfilter: the programs bring the answers.
            let masquerade = decision.masquerade && (kind != RouteKind::Host || from == Origin::Host);
            // What the kernel forwards keeps its source: answers to an address of the node that come by its devices do not come to weir.
            let outgoing = leaves
                && kind != RouteKind::Kernel
                && forwarding.nat_outgoing(decision.translated.src, decision.translated.dst);
            if !decision.untracked && (masquerade || own_port || outgoing) {
                decision.snat = masquerade_source(forwarding, from, adjacency);
                // No pod takes anything from ::1, and no answer to it leaves the pod.
                if decision.snat.is_none() && key.src.is_loopback() {
                    decision.verdict = Verdict::Reject(DropReason::NoRoute);
                }
            }
        }
    }
    decision
}

/// What becomes of a packet whose route leads nowhere, as Linux has it.
fn refused(refusal: Refusal) -> Verdict {
    if refusal.is_silent() { Verdict::Drop(refusal.reason()) } else { Verdict::Reject(refusal.reason()) }
}

/// Whether it asks for an echo (RFC 792, RFC 4443), which an address of the node's services gives.
pub fn is_echo_request<A: Routed>(key: &FlowKey<A>) -> bool {
    matches!((key.protocol, key.ports.icmp(key.protocol).0), (Protocol::ICMP, 8) | (Protocol::ICMPV6, 128))
}

/// The source that a masqueraded connection from there takes if it leaves by that adjacency.
pub(crate) fn masquerade_source<A: Routed>(forwarding: &Forwarding, from: Origin, adjacency: AdjacencyId) -> Option<A> {
    match (from, forwarding.adjacency(adjacency).kind) {
        (Origin::Host | Origin::Forwarded { .. }, RouteKind::Host) => forwarding.loopback_source(),
        // One that the kernel routes through weir; it may masquerade it once more.
        (_, RouteKind::Kernel) => forwarding.loopback_source(),
        _ => forwarding.masquerade_address(adjacency),
    }
}

/// Whether the packet may come from there with that source, and may be carried at all.
///
/// # Errors
/// Why not.
pub fn check_source<A: Routed>(snapshot: &Snapshot, from: Origin, key: &FlowKey<A>) -> Result<(), DropReason> {
    const VXLAN_PORT: u16 = 4789;
    from.check_source(key.src, &snapshot.forwarding)?;
    let is_tunnel = || {
        matches!(key.protocol, Protocol::IPIP | Protocol::IPV6)
            || key.protocol == Protocol::UDP && key.ports.destination() == VXLAN_PORT
    };
    if from.workload().is_some() && is_tunnel() { Err(DropReason::WorkloadTunnel) } else { Ok(()) }
}

/// Where a packet goes that may ([`check_link`]): for its link alone, to the node.
fn route<A: Routed>(forwarding: &Forwarding, key: &FlowKey<A>, translated: &FlowKey<A>) -> Route {
    if key.dst.ends_at_link() { Route::Via(forwarding.host()) } else { forwarding.route_of(translated) }
}

/// Whether a packet may go where it goes, if it is not to leave its link: by an uplink to the node itself, and nowhere else.
fn check_link<A: Routed>(snapshot: &Snapshot, from: Origin, key: &FlowKey<A>) -> Result<(), DropReason> {
    if !key.dst.ends_at_link() && !key.src.is_bound_to_link() {
        return Ok(());
    }
    let is_for_node = from == Origin::Uplink && snapshot.forwarding.is_for_node(key.dst);
    if is_for_node { Ok(()) } else { Err(DropReason::LinkScope) }
}

/// What the pods' own policies say of a packet that they do not deny.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum OwnPolicy {
    /// It may go.
    Allows,
    /// It may go, and no other policy is about it: a pod that talks to itself, or what links live by.
    Exempt,
}

/// Judges `translated` (after DNAT, before SNAT) by the policies of both ends: the source's egress, then the destination's ingress.
fn judge<A: Routed>(
    snapshot: &Snapshot,
    from: Origin,
    translated: &FlowKey<A>,
    egress: &mut Option<Judgement>,
    ingress: &mut Option<Judgement>,
) -> Result<OwnPolicy, DropReason> {
    let rules = &snapshot.rules;
    let destination = snapshot.forwarding.local_workload(translated.dst);
    if is_link_protocol(translated) {
        return Ok(OwnPolicy::Exempt);
    }
    if let Origin::Workload(source) = from {
        if destination == Some(source) {
            return Ok(OwnPolicy::Exempt);
        }
        let endpoint = rules.endpoint(source).ok_or(DropReason::PolicyNotReady)?;
        let judgement = rules.policy.judge(endpoint, PolicyDirection::Egress, translated);
        let allow = judgement.allow;
        *egress = Some(judgement);
        if !allow {
            return Err(DropReason::PolicyDeniedEgress);
        }
    }
    // The node's own processes always reach its pods (POLICY 12).
    if let (Some(destination), true) = (destination, from != Origin::Host) {
        let endpoint = rules.endpoint(destination).ok_or(DropReason::PolicyNotReady)?;
        let judgement = rules.policy.judge(endpoint, PolicyDirection::Ingress, translated);
        let allow = judgement.allow;
        *ingress = Some(judgement);
        if !allow {
            return Err(DropReason::PolicyDeniedIngress);
        }
    }
    Ok(OwnPolicy::Allows)
}

/// Multicast listeners and neighbour discovery (ICMPv6 130-133, 135, 136), without which IPv6 has no links: no policy of a pod or host
/// endpoint is about them.
fn is_link_protocol<A: Routed>(key: &FlowKey<A>) -> bool {
    key.protocol == Protocol::ICMPV6 && matches!(key.ports.destination(), 130..=133 | 135 | 136)
}

/// Judges an established connection again, by its original key and its stored DNAT.
///
/// # Errors
/// Where a policy denies it now.
pub fn judge_again<A: Routed>(
    snapshot: &Snapshot,
    arrival: Arrival,
    original: &FlowKey<A>,
    translated: &FlowKey<A>,
) -> Result<(), DropReason> {
    let mut host = HostJudgements::default();
    let before = host_policy::before_services(snapshot, arrival, original, &mut host)?;
    match judge(snapshot, arrival.origin, translated, &mut None, &mut None)? {
        OwnPolicy::Exempt => Ok(()),
        OwnPolicy::Allows => {
            let route = route(&snapshot.forwarding, original, translated);
            host_policy::after_services(snapshot, arrival, translated, route, before, &mut host)
        }
    }
}

/// The stamps of both ends' policies, as a connection keeps them: source, destination; 0 for an end that no policy is about.
pub fn policy_stamps<A: Routed>(snapshot: &Snapshot, arrival: Arrival, translated: &FlowKey<A>) -> [u32; 2] {
    let stamp = |workload: Option<WorkloadId>| {
        workload.and_then(|w| snapshot.rules.endpoint(w)).map_or(0, |endpoint| snapshot.rules.policy.stamp(endpoint))
    };
    let source = arrival.origin.workload();
    let [host_source, host_destination] = host_policy::stamps(snapshot, arrival, translated);
    [stamp(source) ^ host_source, stamp(snapshot.forwarding.local_workload(translated.dst)) ^ host_destination]
}
