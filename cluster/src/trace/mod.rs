//! `weir trace`: what the router would do with the first packet of each flow, without touching a network.
//!
//! Reads one JSON object per line, writes one per line, in the same order (the design, "Contract: commands").

pub mod explain;
pub mod flow;
mod names;

use std::{
    io::{BufRead, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use serde_json::{Value, json};
use weir_dataplane::{
    action_log::{self, Entry},
    decide::{self, Decision, Verdict},
    forwarding::{Encapsulation, RouteKind, Routed},
    host_policy,
    model::{Cluster, Role},
    origin::{Arrival, Origin},
    snapshot::Snapshot,
};
use weir_nat::Affinity;
use weir_packet::{DropReason, FlowKey, Ports, Tick};
use weir_policy::{Judgement, RuleId, RuleOrigin, model::HostStage};

use crate::{
    compile::{self, CompileError, address_port},
    config::RouterConfig,
    trace::{
        explain::Facts,
        flow::{Flow, Port},
        names::Names,
    },
    translate::Loaded,
};

/// The compiled tables that flows are traced through.
pub struct Tracer<'l> {
    loaded: &'l Loaded,
    snapshot: Snapshot,
    cluster: Cluster,
    config: RouterConfig,
    affinity: Affinity,
    random: ChaCha8Rng,
}

impl<'l> Tracer<'l> {
    /// Compiles what `loaded` describes.
    ///
    /// # Errors
    /// Where a size is beyond what can be compiled.
    pub fn new(loaded: &'l Loaded) -> Result<Self, CompileError> {
        Ok(Self {
            loaded,
            snapshot: compile::snapshot(loaded)?,
            cluster: Cluster::clone(&loaded.cluster),
            config: loaded.config.clone(),
            affinity: Affinity::new(Affinity::DEFAULT_CLIENTS, [0; 2]),
            // A trace is a pure function of its input, the picked backends included.
            random: ChaCha8Rng::seed_from_u64(0),
        })
    }

    /// Traces every line of `input`. `Ok(false)`: some line was no valid flow.
    ///
    /// # Errors
    /// Where reading or writing fails.
    pub fn run(&mut self, input: impl BufRead, mut output: impl Write, text: bool) -> std::io::Result<bool> {
        let mut all_valid = true;
        for (number, line) in (1..).zip(input.lines()) {
            let line = line?;
            if line.trim().is_empty() {
                continue;
            }
            match self.trace_line(&line, text) {
                Ok(answer) => writeln!(output, "{answer}")?,
                Err((id, error)) => {
                    all_valid = false;
                    writeln!(output, "{}", json!({"id": id, "error": format!("line {number}: {error}")}))?;
                }
            }
        }
        output.flush()?;
        Ok(all_valid)
    }

    fn trace_line(&mut self, line: &str, text: bool) -> Result<String, (Value, String)> {
        let flow = Flow::read(line)?;
        self.trace(&flow, text).map_err(|error| (flow.id, error))
    }

    fn trace(&mut self, flow: &Flow, text: bool) -> Result<String, String> {
        let names = Names { loaded: self.loaded };
        let (source, destination) = (names.source(flow)?, names.destination(flow)?);
        let mut flow = flow.clone();
        flow.dport = destination.port.map(Port::Number).or(flow.dport);
        let stand_ins: Vec<String> = source.stands_for.into_iter().chain(destination.stands_for).collect();
        for src in &source.addresses {
            for dst in &destination.addresses {
                match (src, dst) {
                    (IpAddr::V4(src), IpAddr::V4(dst)) => {
                        return self.trace_family::<Ipv4Addr>(&flow, *src, *dst, &stand_ins, text);
                    }
                    (IpAddr::V6(src), IpAddr::V6(dst)) => {
                        return self.trace_family::<Ipv6Addr>(&flow, *src, *dst, &stand_ins, text);
                    }
                    _ => {}
                }
            }
        }
        Err(format!("{} and {} have no address of one family", flow.src, flow.dst))
    }

    /// Where a packet comes from, and which host endpoint it meets there. The node's own packet comes from its kernel, also where the flow
    /// names the uplink that it leaves by.
    fn arrival<A: Routed>(&self, flow: &Flow, src: A, dst: A) -> Result<Arrival, String> {
        let forwarding = &self.snapshot.forwarding;
        let endpoints = forwarding.host_endpoints();
        let origin = self.origin(flow, src)?;
        if !origin.is_outside() {
            return Ok(Arrival { origin, host_endpoint: None });
        }
        let host_endpoint = match &flow.device {
            _ if forwarding.is_tunnelled(src) => endpoints.everywhere(),
            _ if origin != Origin::Uplink => endpoints.everywhere(),
            Some(name) => match forwarding.devices().find(|(_, device)| device.name == *name) {
                Some((_, device)) => device.host_endpoint,
                None => endpoints.of_name(name),
            },
            None => match forwarding.device_towards(src) {
                Some(device) => device.host_endpoint,
                None => endpoints.of_address(dst.to_ip()),
            },
        };
        let is_nodes_own = origin == Origin::Uplink && host_endpoint.is_some() && forwarding.is_local(src);
        Ok(Arrival { origin: if is_nodes_own { Origin::Host } else { origin }, host_endpoint })
    }

    fn origin<A: Routed>(&self, flow: &Flow, src: A) -> Result<Origin, String> {
        let forwarding = &self.snapshot.forwarding;
        let Some(name) = &flow.device else {
            return Ok(match forwarding.local_workload(src) {
                Some(workload) => Origin::Workload(workload),
                None if forwarding.is_local(src) => Origin::Host,
                None => Origin::Uplink,
            });
        };
        // What has no address of the node it only forwards.
        let by_kernel = Origin::Host.with_source(src, forwarding);
        if name == "host" {
            return Ok(by_kernel);
        }
        let workload = weir_dataplane::forwarding::local_workloads(&self.cluster).find(|(_, w)| w.device == *name);
        if let Some((id, _)) = workload {
            return Ok(Origin::Workload(id));
        }
        match self.config.devices.iter().find(|d| d.name == *name).map(|d| d.role) {
            Some(Role::Uplink) => Ok(Origin::Uplink),
            Some(Role::Host | Role::Kernel) => Ok(by_kernel),
            Some(Role::Workload) => Err(format!("no pod of this node has the device {name}")),
            // Uplinks need not be configured for a trace.
            None if self.config.devices.iter().all(|d| d.role != Role::Uplink) => Ok(Origin::Uplink),
            None => Err(format!("there is no device {name}")),
        }
    }

    fn trace_family<A: Routed>(
        &mut self,
        flow: &Flow,
        src: A,
        dst: A,
        stand_ins: &[String],
        text: bool,
    ) -> Result<String, String> {
        const ANY_SOURCE_PORT: u16 = 40_000;
        let protocol = flow.protocol;
        let ports = if protocol.is_icmp() {
            let echo = if A::BITS == 32 { 8 } else { 128 };
            let icmp_type = flow.icmp_type.unwrap_or(echo);
            Ports::of_icmp(protocol, icmp_type, flow.icmp_code.unwrap_or(0), flow.sport.unwrap_or(0))
        } else if protocol.has_ports() {
            Ports::new(flow.sport.unwrap_or(ANY_SOURCE_PORT), flow.dport_number())
        } else {
            Ports::default()
        };
        let key = FlowKey { src, dst, ports, protocol };
        let arrival = self.arrival(flow, src, dst)?;
        let random = &mut self.random;
        // No time passes between the flows of a trace.
        let now = Tick(0);
        let decision = decide::decide(&self.snapshot, arrival, &key, &self.affinity, now, &mut || random.next_u64());
        if let Some(choice) = &decision.choice {
            self.affinity.clients().remember(choice, now);
        }
        let mut logged: Vec<Entry> = Vec::new();
        action_log::entries(&self.snapshot, arrival.origin, &key, &decision, |entry| logged.push(entry));
        Ok(if text {
            self.explain(flow, &key, arrival, &decision, &logged, stand_ins)
        } else {
            let mut answer = self.answer(flow, &decision);
            if !logged.is_empty() {
                answer["log"] = logged.iter().map(|entry| self.rule(entry.rule)).collect();
            }
            answer.to_string()
        })
    }

    fn rule(&self, rule: RuleId) -> String {
        self.snapshot.rules.policy.rule_name(rule)
    }

    /// The same, with the file and line of its policy, or of those that deny together.
    fn rule_with_place(&self, rule: RuleId) -> String {
        let places: Vec<String> = match self.snapshot.rules.policy.describe(rule) {
            RuleOrigin::Policy { object, .. } => vec![self.place(object)],
            RuleOrigin::TierEnd { policies, .. } => {
                let all = self.loaded.objects.iter().filter(|origin| policies.contains(&origin.to_string().as_str()));
                all.map(|origin| origin.place()).collect()
            }
            RuleOrigin::Profile { .. } | RuleOrigin::NoProfile | RuleOrigin::Undecided => Vec::new(),
        };
        let rule = self.rule(rule);
        if places.is_empty() { rule } else { format!("{rule} ({})", places.join(", ")) }
    }

    /// "file:line" of an object.
    fn place(&self, object: u32) -> String {
        self.loaded.objects.get(object).map_or_else(String::new, |origin| origin.place())
    }

    fn answer<A: Routed>(&self, flow: &Flow, decision: &Decision<'_, A>) -> Value {
        let services = &self.snapshot.rules.services;
        let (verdict, reason) = match decision.verdict {
            Verdict::Forward => ("forward", None),
            Verdict::Local => ("local", None),
            Verdict::Pass => ("pass", None),
            Verdict::Drop(reason) => ("drop", Some(reason.name())),
            Verdict::Reject(reason) => ("reject", Some(reason.name())),
        };
        let mut backends: Vec<(A, u16)> = decision.candidates.iter().map(|b| (b.address, b.port)).collect();
        backends.sort();
        let word = |judgement: &Option<Judgement>| match judgement {
            None => "none",
            Some(j) if j.allow => "allow",
            Some(_) => "deny",
        };
        let of_host: Vec<Judgement> = decision.host.iter().map(|(_, judgement)| judgement).collect();
        let by = decision.egress.iter().chain(&decision.ingress).chain(&of_host);
        let by: Vec<String> = by.map(|j| self.rule(j.rule)).collect();
        json!({
            "id": flow.id,
            "verdict": verdict,
            "reason": reason,
            "service": decision.service.map(|s| services.service_name(s)),
            "backends": backends.iter().map(|(a, p)| address_port(a.to_ip(), *p)).collect::<Vec<_>>(),
            "backend": decision.backend.map(|(a, p)| address_port(a.to_ip(), p)),
            "masquerade": self.masquerades(decision),
            "policy": {"egress": word(&decision.egress), "ingress": word(&decision.ingress), "by": by},
            "route": self.route(decision),
        })
    }

    /// The service's decision; without a service the pool's (natOutgoing).
    fn masquerades<A: Routed>(&self, decision: &Decision<'_, A>) -> bool {
        decision.masquerade || decision.service.is_none() && decision.snat.is_some()
    }

    fn route<A: Routed>(&self, decision: &Decision<'_, A>) -> Value {
        let forwarding = &self.snapshot.forwarding;
        let Some(adjacency) = decision.adjacency().map(|id| forwarding.adjacency(id)) else {
            return json!({"kind": "none", "device": null, "nextHop": null, "tunnel": null});
        };
        let kind = match adjacency.kind {
            RouteKind::Workload => "workload",
            RouteKind::Direct => "direct",
            RouteKind::Ipip => "ipip",
            RouteKind::Host | RouteKind::Kernel => "host",
        };
        let workload_device = || {
            let id = forwarding.local_workload(decision.translated.dst)?;
            Some(self.cluster.workloads[id.0 as usize].device.clone())
        };
        let device = match adjacency.device {
            Some(id) => Some(forwarding.device(id).name.clone()),
            None if adjacency.kind == RouteKind::Workload => workload_device(),
            None => None,
        };
        let next_hop = match adjacency.kind {
            RouteKind::Host => None,
            _ if adjacency.next_hop.is_unspecified() => Some(decision.translated.dst.to_ip()),
            _ => Some(adjacency.next_hop),
        };
        let tunnel = match adjacency.encapsulation {
            Encapsulation::Ipip { dst, .. } => Some(dst),
            Encapsulation::None => None,
        };
        json!({"kind": kind, "device": device, "nextHop": next_hop, "tunnel": tunnel})
    }

    /// The pod that has an address, and its node, where that is another one.
    fn pod_elsewhere(&self, address: IpAddr) -> Option<(&str, &str)> {
        let pod = self.cluster.workloads.iter().find(|pod| pod.addresses.contains(&address))?;
        let node = pod.node.as_deref().filter(|node| *node != self.cluster.node_name)?;
        Some((&pod.name, node))
    }

    /// The trace for a person, step by step.
    fn explain<A: Routed>(
        &self,
        flow: &Flow,
        key: &FlowKey<A>,
        arrival: Arrival,
        decision: &Decision<'_, A>,
        logged: &[Entry],
        stand_ins: &[String],
    ) -> String {
        let services = &self.snapshot.rules.services;
        let mut lines = vec![format!(
            "{key:?}{}",
            match &flow.id {
                Value::Null => String::new(),
                id => format!("   (id {id})"),
            }
        )];
        let mut step = |name: &str, words: String| lines.push(format!("  {name:<9} {words}"));
        for (number, stand_in) in stand_ins.iter().enumerate() {
            step(if number == 0 { "asked" } else { "" }, stand_in.clone());
        }
        step(
            "from",
            match arrival.origin {
                Origin::Workload(id) => format!("workload {}", self.snapshot.forwarding.workload_name(id)),
                Origin::Host => "this node itself".into(),
                Origin::Forwarded { .. } => "outside, forwarded by this node's kernel".into(),
                Origin::Uplink => "an uplink".into(),
            },
        );
        match decision.service {
            Some(service) => {
                let facts = Facts {
                    model: &self.loaded.services,
                    service: &self.loaded.services.services[service.0 as usize],
                    place: self.place(services.origin(service)),
                    source: key.src.to_ip(),
                    destination: (key.dst.to_ip(), key.ports.destination()),
                    candidates: decision.candidates.len(),
                    picked: decision.backend.map(|(address, port)| (address.to_ip(), port)),
                    remembered: decision.choice.is_some_and(|choice| choice.is_kept()),
                    masquerade: decision.masquerade,
                    refused: match decision.verdict {
                        Verdict::Drop(reason) | Verdict::Reject(reason) => Some(reason),
                        Verdict::Forward | Verdict::Local | Verdict::Pass => None,
                    },
                };
                for (number, line) in facts.lines().into_iter().enumerate() {
                    step(if number == 0 { "service" } else { "" }, line);
                }
            }
            None if matches!(
                decision.verdict,
                Verdict::Drop(DropReason::UnpublishedPort) | Verdict::Reject(DropReason::UnpublishedPort)
            ) =>
            {
                step("service", "a service has this external IP, but none has the port".into());
            }
            None => step("service", "none claims this destination".into()),
        }
        for (name, judgement) in [("egress", &decision.egress), ("ingress", &decision.ingress)] {
            step(
                name,
                match judgement {
                    Some(j) => {
                        format!("{} by {}", if j.allow { "allowed" } else { "denied" }, self.rule_with_place(j.rule))
                    }
                    None => "not judged".into(),
                },
            );
            if judgement.is_none() && matches!(decision.verdict, Verdict::Forward | Verdict::Pass) {
                let end = if name == "egress" { key.src.to_ip() } else { decision.translated.dst.to_ip() };
                if let Some((pod, node)) = self.pod_elsewhere(end) {
                    step("", format!("{node}, the node of {pod}, decides about {name}"));
                }
            }
        }
        for (stage, judgement) in decision.host.iter() {
            let kind = match stage {
                HostStage::Untracked => "untracked",
                HostStage::PreDnat => "before DNAT",
                HostStage::Forwarded => "forwarded",
                HostStage::Local => "to or from the node",
            };
            let verdict = if judgement.allow { "allowed" } else { "denied" };
            step("host", format!("{kind}: {verdict} by {}", self.rule_with_place(judgement.rule)));
        }
        if let Some(port) = host_policy::spared(&self.snapshot, arrival, key, &decision.translated, decision.route) {
            let port = format!("{}/{port}", key.protocol);
            step("host", format!("{port} is a failsafe port: no policy of the host endpoint closes it"));
        }
        if let (Verdict::Drop(DropReason::PolicyDeniedEndpointToHost), Some(object)) =
            (decision.verdict, self.loaded.endpoint_to_host_by)
        {
            let by = self.loaded.objects.get(object).map_or_else(String::new, |origin| origin.to_string());
            let place = self.place(object);
            step("host", format!("from a pod to its own node: denied by {by} ({place}), defaultEndpointToHostAction"));
        }
        for entry in logged {
            step("log", format!("{}: {}", entry.direction.name(), self.rule_with_place(entry.rule)));
        }
        if let Some(address) = decision.snat {
            step("snat", format!("the source becomes {address}"));
        }
        let route = self.route(decision);
        let part = |label: &str, key: &str| match &route[key] {
            Value::String(text) => format!(" {label} {text}"),
            _ => String::new(),
        };
        step(
            "route",
            format!(
                "{}{}{}{}",
                route["kind"].as_str().unwrap_or_default(),
                part("device", "device"),
                part("next hop", "nextHop"),
                part("tunnel to", "tunnel"),
            ),
        );
        step(
            "verdict",
            match decision.verdict {
                Verdict::Forward => "forwarded".into(),
                Verdict::Local => "handed to this node's kernel".into(),
                Verdict::Pass => "passed on: no service claims it, and neither the manifests nor weir.yaml give a route to it (a running \
                                  router has the kernel's routes, too)"
                    .into(),
                Verdict::Drop(reason) => format!("dropped, {reason}: {}", reason.description()),
                Verdict::Reject(reason) => format!("rejected, {reason}: {}", reason.description()),
            },
        );
        lines.join("\n")
    }
}
