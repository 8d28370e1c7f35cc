//! What rules with the action Log have to tell of a new connection.
//!
//! Nothing is looked for before the connection is opened or a policy has denied it, and nothing at all where no rule logs. A
//! worker writes nothing: an entry is an event for the control thread, of bounded number in time and under way. It carries the
//! rules that it was judged by, since another classifier gives other names to its numbers.

use std::{net::IpAddr, sync::Arc};

use weir_packet::{FlowKey, Ports, Protocol, Tick};
use weir_policy::{EndpointId, Judgement, PolicyDirection, RuleId, model::HostStage};

use crate::{
    allowance::Allowance,
    decide::Decision,
    forwarding::Routed,
    origin::Origin,
    snapshot::{Rules, Snapshot},
};

/// Entries that a worker may tell at once, and per tick of 10 ms.
const BURST: u32 = 100;
const PER_TICK: u32 = 1;

/// A Log rule that a new connection met.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The rule.
    pub rule: RuleId,
    /// The endpoint whose policy has it.
    pub endpoint: EndpointId,
    /// What the connection is to that endpoint.
    pub direction: PolicyDirection,
    /// What the endpoint's policy then said; `None`: a host endpoint's, which left it to what comes after.
    pub judgement: Option<Judgement>,
    /// The source that policy saw.
    pub source: IpAddr,
    /// The destination that policy saw.
    pub destination: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The ports that policy saw.
    pub ports: Ports,
}

/// An entry on its way to the log.
#[derive(Clone, Debug)]
pub struct Logged {
    /// What is to be told.
    pub entry: Entry,
    /// The rules that it was judged by.
    pub rules: Arc<Rules>,
    /// How many entries of the same worker were left out since the last that was told.
    pub suppressed: u32,
}

/// Hands out the Log rules that a packet with this key, which came from `origin`, met on its way to `decision`: of each endpoint
/// that was asked, in the order in which they were, those before the rule that decided.
///
/// What untracked policy lets go opens no connection and has no entries.
#[inline]
pub fn entries<A: Routed>(
    snapshot: &Snapshot,
    origin: Origin,
    key: &FlowKey<A>,
    decision: &Decision<'_, A>,
    each: impl FnMut(Entry),
) {
    if snapshot.rules.policy.has_logs() && !decision.untracked {
        all_entries(snapshot, origin, key, decision, each);
    }
}

#[cold]
fn all_entries<A: Routed>(
    snapshot: &Snapshot,
    origin: Origin,
    key: &FlowKey<A>,
    decision: &Decision<'_, A>,
    mut each: impl FnMut(Entry),
) {
    let Rules { policy, .. } = &*snapshot.rules;
    let mut ask = |endpoint: EndpointId, direction: PolicyDirection, judgement: Option<Judgement>, key: &FlowKey<A>| {
        let FlowKey { src, dst, ports, protocol } = *key;
        let (source, destination) = (src.to_ip(), dst.to_ip());
        for rule in policy.logged(endpoint, direction, key).iter().copied() {
            each(Entry { rule, endpoint, direction, judgement, source, destination, protocol, ports });
        }
    };
    let translated = &decision.translated;
    for asked in decision.host.asked().filter(|asked| asked.stage == HostStage::PreDnat) {
        ask(policy.stage_endpoint(asked.endpoint, asked.stage), asked.direction, asked.judgement, key);
    }
    let source = origin.workload();
    let destination = snapshot.forwarding.local_workload(translated.dst);
    for (workload, direction, judgement) in
        [(source, PolicyDirection::Egress, decision.egress), (destination, PolicyDirection::Ingress, decision.ingress)]
    {
        if let (Some(endpoint), Some(_)) = (workload.and_then(|workload| snapshot.rules.endpoint(workload)), judgement)
        {
            ask(endpoint, direction, judgement, translated);
        }
    }
    let behind = |stage| matches!(stage, HostStage::Forwarded | HostStage::Local);
    for asked in decision.host.asked().filter(|asked| behind(asked.stage)) {
        ask(policy.stage_endpoint(asked.endpoint, asked.stage), asked.direction, asked.judgement, translated);
    }
}

/// A worker's end of the log.
#[derive(Debug)]
pub(crate) struct ActionLog {
    allowance: Allowance,
    suppressed: u32,
}

impl ActionLog {
    pub(crate) fn new() -> Self {
        Self { allowance: Allowance::full(BURST, PER_TICK), suppressed: 0 }
    }

    /// Tells an entry by `send`, which says whether it could, or counts it as left out.
    pub(crate) fn tell(&mut self, entry: Entry, rules: &Arc<Rules>, now: Tick, send: impl FnOnce(Logged) -> bool) {
        let suppressed = self.suppressed;
        let is_told = self.allowance.take(now) && send(Logged { entry, rules: Arc::clone(rules), suppressed });
        self.suppressed = if is_told { 0 } else { suppressed.saturating_add(1) };
    }
}
