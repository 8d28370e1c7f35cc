//! What services answer otherwise.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
};

use weir_nat::{Model, ServicePort, TrafficPolicy};

/// A port of a service that is another, or is new, or goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceChange {
    /// "namespace/name:port name".
    pub name: String,
    /// The protocol, in lower case.
    pub protocol: String,
    /// What becomes of it.
    pub what: What,
}

/// What becomes of a service's port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// It is new.
    Added,
    /// It goes.
    Removed,
    /// It is another.
    Changed {
        /// Fields with what they are before and after.
        fields: Vec<(&'static str, String, String)>,
        /// Backends that new connections come to after the change only.
        backends_added: Vec<String>,
        /// Backends that new connections came to before only.
        backends_removed: Vec<String>,
        /// How many there are after it.
        backends: usize,
    },
}

/// Compares services, as the node that was loaded for serves them.
pub fn services(before: &Model, after: &Model) -> Vec<ServiceChange> {
    let by_name = |model: &Model| {
        let all = model.services.iter().filter(|port| port.host_port.is_none());
        let named = all.map(|port| ((port.name.clone(), port.protocol.to_string()), std::sync::Arc::clone(port)));
        named.collect::<BTreeMap<_, _>>()
    };
    let (before, after) = (by_name(before), by_name(after));
    let keys: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let changes = keys.into_iter().filter_map(|key| {
        let what = match (before.get(key), after.get(key)) {
            (None, _) => What::Added,
            (_, None) => What::Removed,
            (Some(before), Some(after)) => changed(before, after)?,
        };
        Some(ServiceChange { name: key.0.clone(), protocol: key.1.to_lowercase(), what })
    });
    changes.collect()
}

/// Where new connections come to: kube-proxy's choice, what is ready, else what serves while it terminates.
fn backends(port: &ServicePort) -> BTreeSet<String> {
    let ready = || port.endpoints.iter().filter(|endpoint| endpoint.ready);
    let usable: Vec<_> = match ready().next() {
        Some(_) => ready().collect(),
        None => port.endpoints.iter().filter(|endpoint| endpoint.is_usable()).collect(),
    };
    usable.into_iter().map(|endpoint| std::net::SocketAddr::new(endpoint.address, endpoint.port).to_string()).collect()
}

fn changed(before: &ServicePort, after: &ServicePort) -> Option<What> {
    let policy = |policy: TrafficPolicy| format!("{policy:?}");
    let fields = [
        ("port", before.port.to_string(), after.port.to_string()),
        ("clusterIPs", list(&before.cluster_ips), list(&after.cluster_ips)),
        ("nodePort", maybe(before.node_port), maybe(after.node_port)),
        ("externalIPs", list(&before.external_ips), list(&after.external_ips)),
        ("load balancer's addresses", list(&before.load_balancer_ips), list(&after.load_balancer_ips)),
        ("loadBalancerSourceRanges", list(&before.source_ranges), list(&after.source_ranges)),
        ("internalTrafficPolicy", policy(before.internal_policy), policy(after.internal_policy)),
        ("externalTrafficPolicy", policy(before.external_policy), policy(after.external_policy)),
        ("affinity by client, in seconds", maybe(before.affinity), maybe(after.affinity)),
        ("healthCheckNodePort", maybe(before.health_check_node_port), maybe(after.health_check_node_port)),
    ];
    let fields: Vec<_> = fields.into_iter().filter(|(_, before, after)| before != after).collect();
    let (were, are) = (backends(before), backends(after));
    if fields.is_empty() && were == are {
        return None;
    }
    Some(What::Changed {
        fields,
        backends_added: (&are - &were).into_iter().collect(),
        backends_removed: (&were - &are).into_iter().collect(),
        backends: are.len(),
    })
}

fn list<T: Display>(all: &[T]) -> String {
    if all.is_empty() { NONE.to_owned() } else { all.iter().map(T::to_string).collect::<Vec<_>>().join(", ") }
}

fn maybe<T: Display>(one: Option<T>) -> String {
    one.map_or(NONE.to_owned(), |one| one.to_string())
}

const NONE: &str = "none";
