//! The ports that workloads publish, with and without names: what a question about reachability means by "its ports".

use std::collections::{BTreeMap, BTreeSet};

use weir_packet::Protocol;

use super::cluster::endpoint_name;
use crate::resources::{Manifests, meta::IntOrString};

/// The ports, by workload. What is at fault was reported where policy reads the same ports.
pub(super) fn published(manifests: &Manifests) -> BTreeMap<String, BTreeSet<(Protocol, u16)>> {
    let mut published: BTreeMap<String, BTreeSet<(Protocol, u16)>> = BTreeMap::new();
    for pod in manifests.pods() {
        let Some(spec) = &pod.value.spec else { continue };
        let containers = spec.containers.iter().chain(&spec.init_containers);
        let ports = containers.flat_map(|container| &container.ports);
        let ports = ports.filter_map(|port| {
            let protocol = Protocol::from_name(port.protocol.as_deref().unwrap_or("TCP"))?;
            Some((protocol, u16::try_from(port.container_port).ok()?))
        });
        published.entry(pod.full_name()).or_default().extend(ports);
    }
    for endpoint in manifests.workload_endpoints() {
        let ports = endpoint.value.spec.ports.iter().filter_map(|port| {
            let protocol = match &port.protocol {
                None => Protocol::TCP,
                Some(IntOrString::Int(number)) => Protocol(u8::try_from(*number).ok()?),
                Some(IntOrString::String(name)) => Protocol::from_name(name)?,
            };
            Some((protocol, port.port))
        });
        published.entry(endpoint_name(endpoint)).or_default().extend(ports);
    }
    published
}
