//! Why a service does what it does with a packet, in words for `weir trace --text`.

use std::net::IpAddr;

use weir_nat::{Model, ServicePort, TrafficPolicy, usage};
use weir_packet::DropReason;

use crate::compile::address_port;

/// Backends that are named where they are not used; the rest is counted.
const NAMED: usize = 4;

/// What a service made of a packet.
pub struct Facts<'a> {
    /// All services' settings.
    pub model: &'a Model,
    /// The service port; where the port is not published, any of the service.
    pub service: &'a ServicePort,
    /// "file:line" of the Service.
    pub place: String,
    /// The packet's source.
    pub source: IpAddr,
    /// Its destination.
    pub destination: (IpAddr, u16),
    /// How many backends could have been picked.
    pub candidates: usize,
    /// The backend that was picked.
    pub picked: Option<(IpAddr, u16)>,
    /// Whether it is the one that this client had before.
    pub remembered: bool,
    /// Whether the source is replaced.
    pub masquerade: bool,
    /// Why the packet ends here.
    pub refused: Option<DropReason>,
}

/// What kind of address of the service the packet was for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Frontend {
    ClusterIp,
    LoadBalancerIp,
    ExternalIp,
    NodePort,
    HostPort,
}

impl Facts<'_> {
    /// Line by line.
    pub fn lines(&self) -> Vec<String> {
        let frontend = self.frontend();
        let by = match frontend {
            Frontend::ClusterIp => "cluster IP",
            Frontend::LoadBalancerIp => "load balancer IP",
            Frontend::ExternalIp => "external IP",
            Frontend::NodePort => "node port",
            Frontend::HostPort => "host port",
        };
        let mut lines = vec![format!("{} ({}), by its {by}", self.service.name, self.place)];
        match self.refused {
            Some(DropReason::UnpublishedPort) => {
                lines[0] =
                    format!("{} ({}) has the address, but no service has the port", self.service.name, self.place);
                return lines;
            }
            Some(DropReason::SourceRange) => {
                let ranges: Vec<String> = self.service.source_ranges.iter().map(ToString::to_string).collect();
                lines.push(format!("{} is not in loadBalancerSourceRanges: {}", self.source, ranges.join(", ")));
                return lines;
            }
            _ => lines.push(self.list(frontend)),
        }
        lines.extend(self.unused(frontend));
        if let Some((address, port)) = self.picked {
            let how = if frontend == Frontend::HostPort {
                "the pod itself"
            } else if self.remembered {
                "which this client had before (ClientIP affinity)"
            } else {
                "at random"
            };
            lines.push(format!("picked {}, {how}", address_port(address, port)));
            lines.push(self.masquerade_words(frontend));
        }
        lines
    }

    fn frontend(&self) -> Frontend {
        let (address, port) = self.destination;
        let service = self.service;
        if service.host_port.is_some() {
            Frontend::HostPort
        } else if service.cluster_ips.contains(&address) {
            Frontend::ClusterIp
        } else if service.port == port && service.load_balancer_ips.contains(&address) {
            Frontend::LoadBalancerIp
        } else if service.port == port && service.external_ips.contains(&address) {
            Frontend::ExternalIp
        } else {
            Frontend::NodePort
        }
    }

    fn is_from_pod(&self) -> bool {
        self.model.pod_cidrs.iter().any(|net| net.contains(&self.source))
    }

    fn is_from_node(&self) -> bool {
        self.source.is_loopback() || self.model.local_addresses.contains(&self.source)
    }

    /// Which backends could be picked, and why these.
    fn list(&self, frontend: Frontend) -> String {
        if frontend == Frontend::HostPort {
            return "its one backend is the pod".to_owned();
        }
        let count = match self.candidates {
            0 => "no backend can be used".to_owned(),
            1 => "1 usable backend".to_owned(),
            more => format!("{more} usable backends"),
        };
        let policy = match frontend {
            Frontend::ClusterIp => self.service.internal_policy,
            _ => self.service.external_policy,
        };
        let of = match policy {
            TrafficPolicy::Cluster => "of the whole cluster",
            TrafficPolicy::Local if frontend == Frontend::ClusterIp => "on this node: internalTrafficPolicy is Local",
            _ if self.is_from_pod() => "of the whole cluster: externalTrafficPolicy Local does not bind pods",
            _ if self.is_from_node() => {
                "of the whole cluster: externalTrafficPolicy Local does not bind the node itself"
            }
            _ => "on this node: externalTrafficPolicy is Local",
        };
        format!("{count} {of}")
    }

    /// The backends that are not used, with the reason.
    fn unused(&self, frontend: Frontend) -> Vec<String> {
        let is_local = match frontend {
            Frontend::ClusterIp => self.service.internal_policy == TrafficPolicy::Local,
            _ => self.service.external_policy == TrafficPolicy::Local && !self.is_from_pod() && !self.is_from_node(),
        };
        let all = usage(self.model, self.service);
        let is_ipv6 = self.destination.0.is_ipv6();
        let of_family = all.iter().filter(|one| one.endpoint.address.is_ipv6() == is_ipv6);
        let unused: Vec<String> = of_family
            .filter_map(|one| {
                let why_not = if is_local { &one.local } else { &one.cluster };
                let backend = address_port(one.endpoint.address, one.endpoint.port);
                why_not.as_ref().map(|why_not| format!("not used: {backend}: {why_not}"))
            })
            .collect();
        let mut lines: Vec<String> = unused.iter().take(NAMED).cloned().collect();
        if unused.len() > NAMED {
            lines.push(format!("not used: {} more", unused.len() - NAMED));
        }
        lines
    }

    fn masquerade_words(&self, frontend: Frontend) -> String {
        let hairpin = self.picked.is_some_and(|(address, _)| address == self.source);
        let why = match frontend {
            _ if !self.masquerade => return "not masqueraded: the backend sees the source itself".to_owned(),
            Frontend::ClusterIp if self.model.masquerade_all => "masqueradeAll is on",
            Frontend::ClusterIp if !hairpin || !self.is_from_pod() => "the source is outside podCIDRs",
            Frontend::ClusterIp | Frontend::HostPort => "the backend is the source itself",
            _ if self.service.external_policy == TrafficPolicy::Cluster => "externalTrafficPolicy is Cluster",
            _ if hairpin => "the backend is the source itself",
            _ => "the source is this node",
        };
        format!("masqueraded: {why}")
    }
}
