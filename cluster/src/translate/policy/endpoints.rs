//! Everything that has labels and addresses: workloads, host endpoints, network sets.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use weir_dataplane::model::Cluster;
use weir_packet::Protocol;
use weir_policy::model::{Endpoint, EndpointKind, NamedPort};

use super::{
    labels::{Inherited, Labels, NAMESPACE_PROFILE, SERVICE_ACCOUNT_PROFILE, Sources},
    rules::network,
};
use crate::{
    config::RouterConfig,
    resources::{
        Content, Manifests, Memo, Object, Same,
        at::{At, Reporter},
        calico::{EndpointPort, WorkloadEndpoint},
        kubernetes::Pod,
        meta::IntOrString,
    },
    text::Problems,
    translate::{
        cluster::{Described, endpoint_name, endpoints_of_pods},
        services::{port_number, protocol},
    },
};

/// The workloads' endpoints of the load before, by the number of their pod, or of their WorkloadEndpoint where they have no pod.
#[derive(Debug, Default)]
pub(in crate::translate) struct Kept {
    sources: Sources,
    endpoints: Memo<u32, Parts, Arc<Endpoint>>,
}

/// What a workload's endpoint is made of, besides what its labels are inherited from.
#[derive(Clone, Debug, PartialEq)]
struct Parts {
    pod: Option<Same<Content<Pod>>>,
    calico: Option<Same<Content<WorkloadEndpoint>>>,
    /// They may be told by others than these two, or be lost to others.
    addresses: Vec<IpAddr>,
    is_local: bool,
}

/// The workloads' endpoints; none of what nothing describes yet.
pub(super) fn workloads(
    manifests: &Manifests,
    inherited: &Inherited<'_>,
    cluster: &Cluster,
    described: &[Described<'_>],
    kept: &mut Kept,
    problems: &mut Problems,
) -> Vec<Arc<Endpoint>> {
    let of_pods = endpoints_of_pods(manifests);
    let others: HashMap<String, &Object<WorkloadEndpoint>> =
        manifests.workload_endpoints().iter().map(|object| (endpoint_name(object), object)).collect();
    kept.endpoints.turn();
    let sources = Inherited::sources(manifests);
    if kept.sources != sources {
        *kept = Kept { sources, ..Kept::default() };
    }
    let mut endpoints = Vec::with_capacity(cluster.workloads.len());
    for (workload, described) in cluster.workloads.iter().zip(described) {
        let pod = match described {
            Described::Pod(pod) => Some(*pod),
            Described::Endpoint => None,
            Described::NotYet => continue,
        };
        let calico = of_pods.get(&workload.name).or_else(|| others.get(&workload.name)).copied();
        let Some(namespace) = pod.map(|pod| &pod.namespace).or(calico.map(|object| &object.namespace)) else {
            continue;
        };
        let pod_ports = pod.map(|pod| pod.made(problems, container_ports));
        let calico_ports = calico.map(|calico| calico.made(problems, workload_endpoint_ports));
        let Some(number) = pod.map(|pod| pod.origin).or(calico.map(|calico| calico.origin)) else { continue };
        let parts = Parts {
            pod: pod.map(|pod| Same(Arc::clone(pod.content()))),
            calico: calico.map(|calico| Same(Arc::clone(calico.content()))),
            addresses: workload.addresses.clone(),
            is_local: workload.node.as_deref() == Some(cluster.node_name.as_str()),
        };
        let make = |_: Option<&_>| {
            let spec = pod.and_then(|pod| pod.value.spec.as_ref());
            let given = spec.and_then(|spec| spec.service_account_name.as_deref().or(spec.service_account.as_deref()));
            let given = given.or_else(|| calico.and_then(|object| object.value.spec.service_account_name.as_deref()));
            let account = given.filter(|name| !name.is_empty()).unwrap_or("default");
            let own = match (pod, calico) {
                (Some(pod), _) => pod.value.metadata.labels.to_map(),
                (None, calico) => calico.map_or_else(Labels::new, |object| object.value.labels()),
            };
            let of_kubernetes = || {
                vec![
                    format!("{NAMESPACE_PROFILE}{namespace}"),
                    format!("{SERVICE_ACCOUNT_PROFILE}{namespace}.{account}"),
                ]
            };
            let profiles = calico.map_or_else(of_kubernetes, |object| object.value.spec.profiles.clone());
            let orchestrator = calico.and_then(|object| object.value.spec.orchestrator.as_deref()).unwrap_or("k8s");
            let endpoint = Arc::new(Endpoint {
                name: workload.name.clone(),
                kind: EndpointKind::Workload,
                local: parts.is_local,
                namespace: Some(namespace.to_string()),
                labels: inherited.of_workload(namespace, account, orchestrator, &profiles, &own),
                nets: parts.addresses.iter().map(|address| IpNet::from(*address)).collect(),
                ports: pod_ports.into_iter().chain(calico_ports).flatten().cloned().collect(),
                profiles,
            });
            (parts.clone(), endpoint)
        };
        endpoints.push(Arc::clone(kept.endpoints.get(number, |known| *known == parts, make)));
    }
    endpoints
}

/// NetworkSets and GlobalNetworkSets.
pub(super) fn network_sets(
    manifests: &Manifests,
    inherited: &Inherited<'_>,
    problems: &mut Problems,
) -> Vec<Arc<Endpoint>> {
    let sets = manifests.network_sets().iter().map(|object| {
        let mut report = object.reporter(problems);
        let at = object.at().key("spec").key("nets");
        let namespace = (!object.namespace.is_empty()).then(|| object.namespace.to_string());
        Arc::new(Endpoint {
            name: if namespace.is_some() { object.full_name() } else { object.name.to_string() },
            kind: EndpointKind::NetworkSet,
            labels: inherited.of_network_set(namespace.as_deref(), &object.value.labels()),
            namespace,
            nets: networks(&object.value.spec.nets, at, "spec.nets", &mut report),
            ..Endpoint::default()
        })
    });
    sets.collect()
}

/// HostEndpoints of all nodes.
pub(super) fn host_endpoints(
    config: &RouterConfig,
    manifests: &Manifests,
    inherited: &Inherited<'_>,
    problems: &mut Problems,
) -> Vec<Arc<Endpoint>> {
    let endpoints = manifests.host_endpoints().iter().map(|object| {
        let mut report = object.reporter(problems);
        let spec = &object.value.spec;
        let nets =
            networks(&spec.expected_ips, object.at().key("spec").key("expectedIPs"), "spec.expectedIPs", &mut report);
        Arc::new(Endpoint {
            name: object.name.to_string(),
            kind: EndpointKind::HostEndpoint,
            local: spec.node.as_deref() == Some(config.node_name.as_str()),
            namespace: None,
            labels: inherited.of_host_endpoint(&spec.profiles, &object.value.labels()),
            nets,
            ports: endpoint_ports(&spec.ports, object.at(), &mut report),
            profiles: spec.profiles.clone(),
        })
    });
    endpoints.collect()
}

fn networks(texts: &[String], at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Vec<IpNet> {
    let read = texts.iter().enumerate();
    read.filter_map(|(index, text)| network(text, at.item(index), &format!("{field}[{index}]"), report)).collect()
}

fn container_ports(object: &Object<Pod>, problems: &mut Problems) -> Vec<NamedPort> {
    let mut report = object.reporter(problems);
    let Some(spec) = &object.value.spec else { return Vec::new() };
    let spec_at = object.at().key("spec");
    let mut ports = Vec::new();
    // Init containers that go on running (sidecars) have ports too.
    for (list, containers) in [("containers", &spec.containers), ("initContainers", &spec.init_containers)] {
        for (index, container) in containers.iter().enumerate() {
            for (number, port) in container.ports.iter().enumerate() {
                let at = spec_at.key(list).item(index).key("ports").item(number);
                let field = format!("spec.{list}[{index}].ports[{number}]");
                let protocol = protocol(port.protocol.as_deref(), at.key("protocol"), &field, &mut report);
                let container_port = format!("{field}.containerPort");
                let port_at = at.key("containerPort");
                let number = port_number(port.container_port, port_at, &container_port, &mut report);
                if let (Some(protocol), Some(port_number), Some(name)) = (protocol, number, &port.name) {
                    ports.push(NamedPort { name: name.to_string(), protocol, port: port_number });
                }
            }
        }
    }
    ports
}

fn workload_endpoint_ports(object: &Object<WorkloadEndpoint>, problems: &mut Problems) -> Vec<NamedPort> {
    endpoint_ports(&object.value.spec.ports, object.at(), &mut object.reporter(problems))
}

/// The named ports of a WorkloadEndpoint or HostEndpoint.
fn endpoint_ports(given: &[EndpointPort], at: At<'_>, report: &mut Reporter<'_>) -> Vec<NamedPort> {
    let at = at.key("spec").key("ports");
    let mut ports = Vec::new();
    for (index, port) in given.iter().enumerate() {
        let protocol = match &port.protocol {
            None => Some(Protocol::TCP),
            Some(IntOrString::Int(number)) => u8::try_from(*number).ok().map(Protocol),
            Some(IntOrString::String(name)) => Protocol::from_name(name),
        };
        match (protocol, &port.name) {
            (Some(protocol), Some(name)) => ports.push(NamedPort { name: name.clone(), protocol, port: port.port }),
            (Some(_), None) => {}
            (None, _) => {
                let help = "write a name like TCP, or a number up to 255".to_owned();
                report.error(
                    at.item(index).key("protocol"),
                    format_args!("spec.ports[{index}].protocol is not known"),
                    help,
                );
            }
        }
    }
    ports
}
