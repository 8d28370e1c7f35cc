//! Host endpoints as the policy rules say it, one question after another: the dull twin of `decide`.
//!
//! It reads only the policy model and plain facts about the node, and finds everything by scanning. Numbers in comments are those of
//! the policy rules.

use std::net::IpAddr;

use weir_dataplane::model::{EndpointToHost, Failsafe, HostEndpoint, HostSettings};
use weir_packet::{DropReason, Protocol};
use weir_policy::{PolicyDirection, model::*};

use crate::oracle::{self, Judged, Packet};

/// Where a packet comes from or goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// By this uplink, without a tunnel.
    Uplink(&'static str),
    /// Through a tunnel over an uplink.
    Tunnel,
    /// A pod of this node.
    Pod(&'static str),
    /// The node's own kernel.
    Node,
}

/// A node.
#[derive(Debug)]
pub struct Site<'m> {
    pub model: &'m Model,
    pub host_endpoints: &'m [HostEndpoint],
    pub settings: &'m HostSettings,
    /// Addresses of each uplink, and of pods; what is in no list is beyond some uplink.
    pub uplinks: &'m [(&'static str, Vec<IpAddr>)],
    /// Services: protocol, address and port in front, address and port behind.
    pub services: &'m [(Protocol, IpAddr, u16, IpAddr, u16)],
    /// Addresses that are services' and nobody else's.
    pub cluster_ips: &'m [IpAddr],
}

/// What becomes of a packet that opens a connection.
#[derive(Debug, PartialEq)]
pub struct Fate {
    /// Everything that refuses it.
    pub refusals: Vec<DropReason>,
    /// Whether it passes without a connection, and so without services.
    pub untracked: bool,
    /// Each verdict of a host endpoint's policy: the endpoint, the stage, the direction, whether the packet may go, by what.
    pub said: Vec<Said>,
}

pub type Said = (String, HostStage, PolicyDirection, bool, String);

impl Site<'_> {
    /// 30: an endpoint for an interface, by its name or an address of it, else the one for all.
    fn host_endpoint(&self, uplink: Option<&str>) -> Option<&Endpoint> {
        let mut named: Vec<&HostEndpoint> = self.host_endpoints.iter().collect();
        named.sort_by(|a, b| a.name.cmp(&b.name));
        let of_uplink = |one: &&&HostEndpoint| match (uplink, one.interface.as_deref()) {
            (Some(uplink), Some(interface)) => uplink == interface,
            (Some(uplink), None) => {
                let (_, addresses) = self.uplinks.iter().find(|(name, _)| *name == uplink).unwrap();
                one.addresses.iter().any(|address| addresses.contains(address))
            }
            (None, _) => false,
        };
        let for_all = |one: &&&HostEndpoint| one.interface.as_deref() == Some("*");
        let found = named.iter().find(of_uplink).or_else(|| named.iter().find(for_all))?;
        let of_model = self.model.endpoints.iter().map(|endpoint| &**endpoint);
        Some(of_model.filter(|e| e.kind == EndpointKind::HostEndpoint).find(|e| e.name == found.name).unwrap())
    }

    /// The host endpoint that a packet meets where it comes in or goes out. The node's own kernel is no interface.
    fn met(&self, place: Place) -> Option<&Endpoint> {
        match place {
            Place::Uplink(name) => self.host_endpoint(Some(name)),
            Place::Tunnel | Place::Pod(_) => self.host_endpoint(None),
            Place::Node => None,
        }
    }

    fn judge(
        &self,
        endpoint: &Endpoint,
        stage: HostStage,
        direction: PolicyDirection,
        packet: &Packet,
        fate: &mut Fate,
    ) -> Option<bool> {
        let Judged { decided, .. } = oracle::judge(self.model, endpoint, stage, direction, packet);
        let (allow, by) = decided?;
        fate.said.push((endpoint.name.clone(), stage, direction, allow, by));
        if !allow {
            fate.refusals.push(DropReason::PolicyDeniedHostEndpoint);
        }
        Some(allow)
    }

    /// 27: the answer to an untracked packet, in the other direction.
    fn way_back(&self, endpoint: &Endpoint, direction: PolicyDirection, packet: &Packet, fate: &mut Fate) {
        if self.judge(endpoint, HostStage::Untracked, direction, &reverse(packet), fate).is_none() {
            fate.refusals.push(DropReason::PolicyDeniedHostEndpoint);
        }
    }

    fn pod_allows(&self, name: &str, direction: PolicyDirection, packet: &Packet) -> bool {
        let of_model = self.model.endpoints.iter().map(|endpoint| &**endpoint);
        let pod = of_model.filter(|e| e.kind == EndpointKind::Workload).find(|e| e.name == name).unwrap();
        oracle::judge(self.model, pod, HostStage::Local, direction, packet).decided.unwrap().0
    }

    /// What becomes of the first packet of a connection from `from`; `place` says where an address is.
    pub fn fate(&self, from: Place, packet: &Packet, place: impl Fn(IpAddr) -> Place) -> Fate {
        let mut fate = Fate { refusals: Vec::new(), untracked: false, said: Vec::new() };
        let entry = self.met(from);
        let aim = place(packet.destination);
        // No router passes such packets on (RFC 1812, 5.3.5; RFC 4291, 2.5.6), so only who comes by a link can mean the node by them.
        let is_of_link = match packet.destination {
            IpAddr::V4(to) => to.is_multicast() || to.is_broadcast(),
            IpAddr::V6(to) => to.is_multicast() || to.is_unicast_link_local(),
        };
        if is_of_link && matches!(from, Place::Node | Place::Pod(_)) {
            fate.refusals.push(DropReason::LinkScope);
            return fate;
        }
        // Failsafe ports are the node's own (29), before services as behind them.
        let inbound_failsafe = |packet: &Packet| {
            from != Place::Node
                && place(packet.destination) == Place::Node
                && is_failsafe(&self.settings.failsafe_inbound, packet, packet.source)
        };
        let outbound_failsafe = |packet: &Packet| {
            from == Place::Node && is_failsafe(&self.settings.failsafe_outbound, packet, packet.destination)
        };

        // 29: answers come from such ports, of others to the node and of the node to others.
        let answers_node = |packet: &Packet| {
            from != Place::Node
                && place(packet.destination) == Place::Node
                && comes_from(&self.settings.failsafe_outbound, packet, packet.source)
        };
        let node_answers = |packet: &Packet| {
            from == Place::Node && comes_from(&self.settings.failsafe_inbound, packet, packet.destination)
        };

        // 27: whether an Allow was final for the endpoint that the packet came in by, or goes out by.
        let (mut entry_done, mut exit_done) = (false, false);

        // 27: untracked policy, each packet, before services (11). A pod's packets do not meet it (30).
        if let Some(entry) = entry
            && !matches!(from, Place::Pod(_))
            && !inbound_failsafe(packet)
            && !answers_node(packet)
            && let Some(allow) = self.judge(entry, HostStage::Untracked, PolicyDirection::Ingress, packet, &mut fate)
            && allow
        {
            (entry_done, fate.untracked) = (true, true);
            // Both directions must be allowed: of the node's own there is one policy for both.
            if aim == Place::Node {
                self.way_back(entry, PolicyDirection::Egress, packet, &mut fate);
            }
        }
        if from == Place::Node
            && let Some(exit) = self.met(aim)
            && !matches!(aim, Place::Pod(_))
            && !outbound_failsafe(packet)
            && !node_answers(packet)
            && let Some(allow) = self.judge(exit, HostStage::Untracked, PolicyDirection::Egress, packet, &mut fate)
            && allow
        {
            (exit_done, fate.untracked) = (true, true);
            self.way_back(exit, PolicyDirection::Ingress, packet, &mut fate);
        }

        // 27, 11: policy before DNAT, of what arrives.
        if let Some(entry) = entry
            && !entry_done
            && !inbound_failsafe(packet)
            && !(answers_node(packet) && self.backend(packet).is_none())
            && let Some(true) = self.judge(entry, HostStage::PreDnat, PolicyDirection::Ingress, packet, &mut fate)
        {
            entry_done = true;
        }

        // 11: everything else sees what is behind the service.
        let mut behind = *packet;
        if !fate.untracked
            && let Some((address, port)) = self.backend(packet)
        {
            (behind.destination, behind.destination_port) = (address, port);
        } else if !fate.untracked && self.cluster_ips.contains(&packet.destination) {
            fate.refusals.push(DropReason::UnpublishedPort);
            return fate;
        }
        let to = place(behind.destination);

        // 2, 27: no Allow of a host endpoint excuses the pods' policies. 12: the node reaches its pods, whatever policy says.
        if let (Place::Pod(source), Place::Pod(destination)) = (from, to)
            && source == destination
        {
            return fate;
        }
        if let (Place::Node, Place::Pod(_)) = (from, to) {
            return fate;
        }
        if let Place::Pod(source) = from
            && !self.pod_allows(source, PolicyDirection::Egress, &behind)
        {
            fate.refusals.push(DropReason::PolicyDeniedEgress);
        }
        if let Place::Pod(destination) = to
            && !self.pod_allows(destination, PolicyDirection::Ingress, &behind)
        {
            fate.refusals.push(DropReason::PolicyDeniedIngress);
        }

        match (from, to) {
            (Place::Node, Place::Node) => {}
            // 13: the action decides instead of normal policy.
            (Place::Pod(_), Place::Node) => {
                if self.settings.endpoint_to_host == EndpointToHost::Drop {
                    fate.refusals.push(DropReason::PolicyDeniedEndpointToHost);
                }
            }
            // 28: to the node: normal policy and profiles; nothing that applies denies.
            (_, Place::Node) => {
                if let Some(entry) = entry
                    && !entry_done
                    && !inbound_failsafe(&behind)
                    && !answers_node(&behind)
                {
                    self.judge(entry, HostStage::Local, PolicyDirection::Ingress, &behind, &mut fate);
                }
            }
            (Place::Node, _) => {
                if let Some(exit) = self.met(to)
                    && !exit_done
                    && !outbound_failsafe(&behind)
                    && !node_answers(&behind)
                {
                    self.judge(exit, HostStage::Local, PolicyDirection::Egress, &behind, &mut fate);
                }
            }
            // 28: forwarded: applyOnForward policy where it comes in and where it goes out; nothing that applies allows.
            (_, _) => {
                if let Some(entry) = entry
                    && !entry_done
                {
                    self.judge(entry, HostStage::Forwarded, PolicyDirection::Ingress, &behind, &mut fate);
                }
                if let Some(exit) = self.met(to) {
                    self.judge(exit, HostStage::Forwarded, PolicyDirection::Egress, &behind, &mut fate);
                }
            }
        }
        fate
    }

    fn backend(&self, packet: &Packet) -> Option<(IpAddr, u16)> {
        let front = (packet.protocol, packet.destination, packet.destination_port);
        let found = self.services.iter().find(|(protocol, address, port, ..)| (*protocol, *address, *port) == front);
        found.map(|(.., address, port)| (*address, *port))
    }
}

/// 29, of an answer.
fn comes_from(ports: &[Failsafe], packet: &Packet, peer: IpAddr) -> bool {
    is_failsafe(ports, &Packet { destination_port: packet.source_port, ..*packet }, peer)
}

/// 29.
fn is_failsafe(ports: &[Failsafe], packet: &Packet, peer: IpAddr) -> bool {
    ports.iter().any(|one| {
        one.protocol == packet.protocol
            && one.port == packet.destination_port
            && one.net.is_none_or(|net| net.contains(&peer))
    })
}

/// The packet that answers this one.
fn reverse(packet: &Packet) -> Packet {
    let (source, destination) = (packet.destination, packet.source);
    let echo = [(1, 8, 0), (1, 0, 8), (58, 128, 129), (58, 129, 128)];
    let kind =
        |(protocol, kind, _): &&(u8, u16, u16)| (*protocol, *kind) == (packet.protocol.0, packet.destination_port);
    match packet.protocol.0 {
        1 | 58 => {
            let destination_port = echo.iter().find(kind).map_or(packet.destination_port, |(.., answer)| *answer);
            Packet { source, destination, destination_port, ..*packet }
        }
        protocol => Packet {
            source,
            destination,
            protocol: Protocol(protocol),
            source_port: packet.destination_port,
            destination_port: packet.source_port,
        },
    }
}
