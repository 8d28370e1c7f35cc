//! Which lists each backend of a service port is in, and why not.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use weir_packet::Address;

use crate::{
    Endpoint, Model, ServicePort,
    compile::{Candidate, Condition, Hints, Lists, read_candidates},
};

/// Why a list does not have a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WhyNot {
    /// It does not serve.
    NotServing,
    /// It serves what it has, but is not ready and not terminating.
    NotReady,
    /// It is terminating, and the list has ready ones.
    Terminating,
    /// Every ready backend has node hints, some for this node, and these are its own.
    OtherNodes(Vec<Arc<str>>),
    /// Every ready backend has zone hints, some for this zone, and these are its own.
    OtherZones(Vec<Arc<str>>),
    /// Not local: it is on this other node.
    NotHere(Arc<str>),
    /// Not local: it has no `nodeName`.
    NoNode,
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotServing => f.write_str("not serving"),
            Self::NotReady => f.write_str("not ready"),
            Self::Terminating => f.write_str("terminating, and others are ready"),
            Self::OtherNodes(nodes) => write!(f, "hinted to other nodes: {}", nodes.join(", ")),
            Self::OtherZones(zones) => write!(f, "hinted to other zones: {}", zones.join(", ")),
            Self::NotHere(node) => write!(f, "on {node}, not on this node"),
            Self::NoNode => f.write_str("without nodeName, so never local"),
        }
    }
}

/// How a backend is used; `None` is: it is in that list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage<'m> {
    /// The backend.
    pub endpoint: &'m Endpoint,
    /// In the list of the whole cluster.
    pub cluster: Option<WhyNot>,
    /// In the list of this node.
    pub local: Option<WhyNot>,
}

/// Each backend of `service` once, IPv4 before IPv6, by address and port. Of those families only that the service has frontends of.
pub fn usage<'m>(model: &'m Model, service: &'m ServicePort) -> Vec<Usage<'m>> {
    let mut all = Vec::new();
    if service.serves(false) {
        of_family::<Ipv4Addr>(model, service, &mut all);
    }
    if service.serves(true) {
        of_family::<Ipv6Addr>(model, service, &mut all);
    }
    all
}

fn of_family<'m, A: Address>(model: &'m Model, service: &'m ServicePort, all: &mut Vec<Usage<'m>>) {
    let mut candidates: Vec<Candidate<'m, A>> = Vec::new();
    let Lists { cluster, local, hints } = read_candidates(model, service, &mut candidates);
    let unfit = |one: &Candidate<'_, A>, required: Condition| match one.condition {
        condition if condition == required => None,
        Condition::Unusable => Some(WhyNot::NotServing),
        Condition::Serving => Some(WhyNot::NotReady),
        Condition::Terminating | Condition::Ready => Some(WhyNot::Terminating),
    };
    let elsewhere = |endpoint: &Endpoint| match hints {
        _ if hints.admit(endpoint) => None,
        Hints::Node(_) => Some(WhyNot::OtherNodes(endpoint.node_hints().to_vec())),
        Hints::Zone(_) | Hints::Ignored => Some(WhyNot::OtherZones(endpoint.zone_hints().to_vec())),
    };
    let not_local = |one: &Candidate<'_, A>| match one.endpoint.node_name() {
        _ if one.local => None,
        Some(node) => Some(WhyNot::NotHere(node.into())),
        None => Some(WhyNot::NoNode),
    };
    all.extend(candidates.iter().map(|one| Usage {
        endpoint: one.endpoint,
        cluster: unfit(one, cluster).or_else(|| elsewhere(one.endpoint)),
        local: not_local(one).or_else(|| unfit(one, local)),
    }));
}
