//! What host endpoints say of a connection's first packet, and what the node says of what its pods send to it.
//!
//! A packet meets the host endpoint of the device that it arrives by: untracked policy, policy before DNAT, and, once its service is
//! known, policy for what is forwarded or for what is the node's own. What is forwarded meets that of the device that it leaves by as
//! well. Pods' devices are governed by a host endpoint for "*" alone, and what they send to the node itself by
//! DefaultEndpointToHostAction instead of its normal policy.
//!
//! Failsafe ports are spared by each kind of policy, with the port that this kind sees: the frontend's before services, the backend's
//! behind them. They are the node's own: what is forwarded has none. So are answers that come from such a port, or of one, as a rule past
//! any connection that weir knows of.
//!
//! An Allow of untracked policy or of policy before DNAT is the last word of that host endpoint, not of the pods' own policy.

use ipnet::IpNet;
use weir_packet::{DropReason, FlowKey, Protocol};
use weir_policy::{HostEndpointId, Judgement, PolicyDirection, model::HostStage};

use crate::{
    forwarding::{Forwarding, Route, RouteKind, Routed},
    host_endpoints::HostEndpointNumber,
    model::{EndpointToHost, Failsafe},
    origin::{Arrival, Origin},
    snapshot::Snapshot,
};

/// A stage of a host endpoint that was asked about a packet.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// The host endpoint.
    pub endpoint: HostEndpointId,
    /// Its stage.
    pub stage: HostStage,
    /// Which of its two policies.
    pub direction: PolicyDirection,
    /// What it said; `None`: nothing.
    pub judgement: Option<Judgement>,
}

/// What host endpoints said of a packet, in order.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostJudgements {
    asked: [Option<Asked>; Self::MOST],
}

impl HostJudgements {
    /// Untracked policy of both directions, policy before DNAT, policy for what is forwarded at both ends.
    const MOST: usize = 5;

    fn add(&mut self, asked: Asked) {
        if let Some(place) = self.asked.iter_mut().find(|place| place.is_none()) {
            *place = Some(asked);
        }
    }

    /// All that were asked, whether they said something or not.
    pub fn asked(&self) -> impl Iterator<Item = &Asked> {
        self.asked.iter().flatten()
    }

    /// All that was said.
    pub fn iter(&self) -> impl Iterator<Item = (HostStage, Judgement)> + '_ {
        self.asked().filter_map(|asked| Some((asked.stage, asked.judgement?)))
    }

    /// The stage that denied the packet.
    pub fn denied_at(&self) -> Option<HostStage> {
        self.iter().find(|(_, judgement)| !judgement.allow).map(|(stage, _)| stage)
    }
}

/// What was said before services were looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Before {
    /// Nothing: later stages go on.
    Nothing,
    /// The packet may go, as far as this host endpoint is concerned.
    Allowed,
    /// The packet may go, and no connection is made of it.
    Untracked,
}

/// Failsafe ports, untracked policy and policy before DNAT.
///
/// # Errors
/// Where a policy denies the packet.
#[inline]
pub fn before_services<A: Routed>(
    snapshot: &Snapshot,
    arrival: Arrival,
    key: &FlowKey<A>,
    host: &mut HostJudgements,
) -> Result<Before, DropReason> {
    if snapshot.forwarding.host_endpoints().is_empty() {
        Ok(Before::Nothing)
    } else {
        before(snapshot, arrival, key, host)
    }
}

#[cold]
fn before<A: Routed>(
    snapshot: &Snapshot,
    arrival: Arrival,
    key: &FlowKey<A>,
    host: &mut HostJudgements,
) -> Result<Before, DropReason> {
    let asking = Asking { snapshot, host };
    let (number, direction) = match arrival.origin {
        Origin::Host => (leaving(snapshot, arrival, key, snapshot.forwarding.route_of(key)), PolicyDirection::Egress),
        Origin::Uplink | Origin::Forwarded { .. } | Origin::Workload(_) => {
            (arriving(&snapshot.forwarding, arrival), PolicyDirection::Ingress)
        }
    };
    let Some(number) = number else { return Ok(Before::Nothing) };
    let is_for_host = snapshot.forwarding.is_for_node(key.dst);
    if is_failsafe(snapshot, direction, key) {
        return Ok(Before::Nothing);
    }
    let endpoint = snapshot.rules.host.policy(number)?;
    let answers = answered_failsafe(snapshot, direction, key).is_some();
    if !matches!(arrival.origin, Origin::Workload(_))
        && !answers
        && asking.untracked(endpoint, direction, key, arrival.origin == Origin::Host || is_for_host)?
    {
        return Ok(Before::Untracked);
    }
    // A service's port is none that the node asks from.
    if answers && !snapshot.rules.services.services::<A>().claims(key) {
        return Ok(Before::Nothing);
    }
    let asking = Asking { snapshot, host };
    if direction == PolicyDirection::Ingress && asking.ask(endpoint, HostStage::PreDnat, direction, key)?.is_some() {
        return Ok(Before::Allowed);
    }
    Ok(Before::Nothing)
}

/// Whether untracked policy says anything of a packet from an uplink, whatever connection it may belong to.
#[cold]
pub fn is_untracked<A: Routed>(snapshot: &Snapshot, arrival: Arrival, key: &FlowKey<A>) -> bool {
    let rules = &snapshot.rules;
    let endpoint = arriving(&snapshot.forwarding, arrival).and_then(|number| rules.host.policy(number).ok());
    endpoint.is_some_and(|endpoint| {
        let judged = rules.policy.judge_host(endpoint, HostStage::Untracked, PolicyDirection::Ingress, key);
        judged.is_some() && !is_spared(snapshot, PolicyDirection::Ingress, key)
    })
}

/// Whether a packet to the node itself, or from it, has a port that no policy closes.
fn is_failsafe<A: Routed>(snapshot: &Snapshot, direction: PolicyDirection, key: &FlowKey<A>) -> bool {
    let settings = &snapshot.rules.host.settings;
    let (failsafes, peer) = match direction {
        PolicyDirection::Ingress if !snapshot.forwarding.is_for_node(key.dst) => return false,
        PolicyDirection::Ingress => (&settings.failsafe_inbound, key.src),
        PolicyDirection::Egress => (&settings.failsafe_outbound, key.dst),
    };
    failsafes.iter().any(|failsafe| failsafe.takes(key.protocol, key.ports.destination(), peer.to_ip()))
}

/// The failsafe port of which a packet to the node itself, or from it, may be an answer: one that the node asked, or one of its own. No
/// connection of weir's tells of it, as the node's own packets leave past weir.
fn answered_failsafe<A: Routed>(snapshot: &Snapshot, direction: PolicyDirection, key: &FlowKey<A>) -> Option<u16> {
    let settings = &snapshot.rules.host.settings;
    let (failsafes, peer) = match direction {
        PolicyDirection::Ingress if !snapshot.forwarding.is_for_node(key.dst) => return None,
        PolicyDirection::Ingress => (&settings.failsafe_outbound, key.src),
        PolicyDirection::Egress => (&settings.failsafe_inbound, key.dst),
    };
    // The kernel asks from ports that nobody listens on.
    let is_listened_to = direction == PolicyDirection::Ingress
        && key.protocol == Protocol::TCP
        && snapshot.forwarding.listens(key.ports.destination());
    if is_listened_to {
        return None;
    }
    let port = key.ports.source();
    failsafes.iter().any(|failsafe| failsafe.takes(key.protocol, port, peer.to_ip())).then_some(port)
}

/// Whether a failsafe port spares a packet, or one that it may answer.
fn is_spared<A: Routed>(snapshot: &Snapshot, direction: PolicyDirection, key: &FlowKey<A>) -> bool {
    is_failsafe(snapshot, direction, key) || answered_failsafe(snapshot, direction, key).is_some()
}

/// The failsafe port that spares a packet what a host endpoint's policy might have said of it; for explanations. `translated` is after DNAT.
pub fn spared<A: Routed>(
    snapshot: &Snapshot,
    arrival: Arrival,
    key: &FlowKey<A>,
    translated: &FlowKey<A>,
    route: Route,
) -> Option<u16> {
    let (endpoint, direction) = match arrival.origin {
        Origin::Uplink | Origin::Forwarded { .. } => {
            (arriving(&snapshot.forwarding, arrival), PolicyDirection::Ingress)
        }
        Origin::Host => (leaving(snapshot, arrival, translated, route), PolicyDirection::Egress),
        Origin::Workload(_) => return None,
    };
    endpoint?;
    let opened = [key, translated].into_iter().find(|key| is_failsafe(snapshot, direction, key));
    opened.map(|key| key.ports.destination()).or_else(|| answered_failsafe(snapshot, direction, translated))
}

/// Whether a packet for the node itself may be an answer to what a failsafe port lets it ask.
#[cold]
pub fn may_answer_failsafe<A: Routed>(snapshot: &Snapshot, key: &FlowKey<A>) -> bool {
    answered_failsafe(snapshot, PolicyDirection::Ingress, key).is_some()
}

/// Policy for what is forwarded, or for what is the node's own, and DefaultEndpointToHostAction; `translated` is after DNAT.
///
/// # Errors
/// Where one of these denies the packet.
#[inline]
pub fn after_services<A: Routed>(
    snapshot: &Snapshot,
    arrival: Arrival,
    translated: &FlowKey<A>,
    route: Route,
    before: Before,
    host: &mut HostJudgements,
) -> Result<(), DropReason> {
    if snapshot.rules.host.stamp == 0 { Ok(()) } else { after(snapshot, arrival, translated, route, before, host) }
}

#[cold]
fn after<A: Routed>(
    snapshot: &Snapshot,
    arrival: Arrival,
    key: &FlowKey<A>,
    route: Route,
    before: Before,
    host: &mut HostJudgements,
) -> Result<(), DropReason> {
    let forwarding = &*snapshot.forwarding;
    let rules = &snapshot.rules.host;
    let mut ask = |number: Option<HostEndpointNumber>, stage: HostStage, direction: PolicyDirection| {
        let Some(number) = number else { return Ok(()) };
        if stage == HostStage::Local && is_spared(snapshot, direction, key) {
            return Ok(());
        }
        let asking = Asking { snapshot, host: &mut *host };
        asking.ask(rules.policy(number)?, stage, direction, key).map(|_| ())
    };
    let is_for_host = kind_of(forwarding, route) == Some(RouteKind::Host);
    match arrival.origin {
        Origin::Workload(_) if is_for_host => match rules.settings.endpoint_to_host {
            EndpointToHost::Accept => Ok(()),
            EndpointToHost::Drop => Err(DropReason::PolicyDeniedEndpointToHost),
        },
        Origin::Uplink | Origin::Forwarded { .. } if is_for_host && before == Before::Nothing => {
            ask(arriving(forwarding, arrival), HostStage::Local, PolicyDirection::Ingress)
        }
        Origin::Uplink | Origin::Forwarded { .. } | Origin::Host if is_for_host => Ok(()),
        Origin::Host if before == Before::Nothing => {
            ask(leaving(snapshot, arrival, key, route), HostStage::Local, PolicyDirection::Egress)
        }
        Origin::Host => Ok(()),
        Origin::Uplink | Origin::Forwarded { .. } | Origin::Workload(_) => {
            if before == Before::Nothing {
                ask(arriving(forwarding, arrival), HostStage::Forwarded, PolicyDirection::Ingress)?;
            }
            ask(leaving(snapshot, arrival, key, route), HostStage::Forwarded, PolicyDirection::Egress)
        }
    }
}

/// Numbers that stand for what the source's and the destination's side of the host say of a connection; 0 where they say nothing.
#[inline]
pub fn stamps<A: Routed>(snapshot: &Snapshot, arrival: Arrival, translated: &FlowKey<A>) -> [u32; 2] {
    if snapshot.rules.host.stamp == 0 { [0, 0] } else { stamps_of_both(snapshot, arrival, translated) }
}

#[cold]
fn stamps_of_both<A: Routed>(snapshot: &Snapshot, arrival: Arrival, translated: &FlowKey<A>) -> [u32; 2] {
    let rules = &snapshot.rules;
    let stamp = |number: Option<HostEndpointNumber>| {
        let endpoint = number.and_then(|number| rules.host.policy(number).ok());
        endpoint.map_or(0, |endpoint| rules.policy.host_stamp(endpoint))
    };
    let route = snapshot.forwarding.route_of(translated);
    let source = match arrival.origin {
        // Untracked policy saw the frontend, and so perhaps another device than the one that the backend is behind.
        Origin::Host => {
            let all = (0..rules.host.endpoints.len() as u32).map(HostEndpointNumber);
            all.fold(0, |all: u32, number| all.rotate_left(1) ^ stamp(Some(number)))
        }
        Origin::Uplink | Origin::Forwarded { .. } | Origin::Workload(_) => {
            stamp(arriving(&snapshot.forwarding, arrival))
        }
    };
    [rules.host.stamp.rotate_left(7) ^ source, stamp(leaving(snapshot, arrival, translated, route))]
}

/// A host endpoint being asked.
struct Asking<'s, 'h> {
    snapshot: &'s Snapshot,
    host: &'h mut HostJudgements,
}

impl Asking<'_, '_> {
    fn ask<A: Routed>(
        self,
        endpoint: HostEndpointId,
        stage: HostStage,
        direction: PolicyDirection,
        key: &FlowKey<A>,
    ) -> Result<Option<Judgement>, DropReason> {
        let judgement = self.snapshot.rules.policy.judge_host(endpoint, stage, direction, key);
        self.host.add(Asked { endpoint, stage, direction, judgement });
        if judgement.is_some_and(|judgement| !judgement.allow) {
            return Err(DropReason::PolicyDeniedHostEndpoint);
        }
        Ok(judgement)
    }

    /// Whether untracked policy lets the packet go. Nothing remembers it, so of what is the node's own the answer must be let go by
    /// the same policy, else nothing comes of it.
    fn untracked<A: Routed>(
        self,
        endpoint: HostEndpointId,
        direction: PolicyDirection,
        key: &FlowKey<A>,
        is_nodes_own: bool,
    ) -> Result<bool, DropReason> {
        let Self { snapshot, host } = self;
        let asked = Asking { snapshot, host: &mut *host }.ask(endpoint, HostStage::Untracked, direction, key)?;
        if asked.is_none() {
            return Ok(false);
        }
        if is_nodes_own {
            let back = match direction {
                PolicyDirection::Ingress => PolicyDirection::Egress,
                PolicyDirection::Egress => PolicyDirection::Ingress,
            };
            let answer = Asking { snapshot, host }.ask(endpoint, HostStage::Untracked, back, &key.invert())?;
            if answer.is_none() {
                return Err(DropReason::PolicyDeniedHostEndpoint);
            }
        }
        Ok(true)
    }
}

/// The host endpoint of the device that a packet arrives by. Only one for "*" governs pods' devices.
fn arriving(forwarding: &Forwarding, arrival: Arrival) -> Option<HostEndpointNumber> {
    match arrival.origin {
        Origin::Host => None,
        Origin::Workload(_) => forwarding.host_endpoints().everywhere(),
        Origin::Uplink | Origin::Forwarded { .. } => arrival.host_endpoint,
    }
}

/// The host endpoint of the device that a packet leaves by; of the node's own towards its pods none, which always reach them.
fn leaving<A: Routed>(
    snapshot: &Snapshot,
    arrival: Arrival,
    key: &FlowKey<A>,
    route: Route,
) -> Option<HostEndpointNumber> {
    let forwarding = &*snapshot.forwarding;
    let endpoints = forwarding.host_endpoints();
    let of_unknown_device = || leaves_by(arrival).or_else(|| endpoints.of_address(key.src.to_ip()));
    match (route, kind_of(forwarding, route)) {
        (Route::NoSuchPod | Route::Refused(_), _) | (_, Some(RouteKind::Host)) => None,
        (_, Some(RouteKind::Workload)) if arrival.origin == Origin::Host => None,
        (_, Some(RouteKind::Workload | RouteKind::Ipip)) => endpoints.everywhere(),
        (Route::Via(adjacency), _) => match forwarding.adjacency(adjacency).device {
            Some(device) => forwarding.device(device).host_endpoint,
            None => of_unknown_device(),
        },
        (Route::None, _) => of_unknown_device(),
    }
}

/// The host endpoint of the device that the node's own packet leaves by, where whoever asks knows it.
fn leaves_by(arrival: Arrival) -> Option<HostEndpointNumber> {
    arrival.host_endpoint.filter(|_| arrival.origin == Origin::Host)
}

fn kind_of(forwarding: &Forwarding, route: Route) -> Option<RouteKind> {
    route.adjacency().map(|adjacency| forwarding.adjacency(adjacency).kind)
}

impl Failsafe {
    fn takes(&self, protocol: Protocol, port: u16, peer: std::net::IpAddr) -> bool {
        self.protocol == protocol && self.port == port && self.net.is_none_or(|net: IpNet| net.contains(&peer))
    }
}
