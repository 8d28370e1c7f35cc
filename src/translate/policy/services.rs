//! The endpoints behind services, for rules that name a service: all that EndpointSlices list, ready or not.

use std::collections::HashMap;

use ipnet::IpNet;
use weir_packet::Protocol;
use weir_policy::model::ServiceEndpoint;

use crate::{config::address::parse_ip, manifests::Manifests, translate::services::SERVICE_NAME_LABEL};

/// Namespace and name.
type ServiceName<'m> = (&'m str, &'m str);

/// Endpoints by service.
pub(super) struct ServiceEndpoints<'m> {
    endpoints: HashMap<ServiceName<'m>, Vec<(IpNet, Protocol, u16)>>,
    addresses: HashMap<ServiceName<'m>, Vec<IpNet>>,
}

impl<'m> ServiceEndpoints<'m> {
    /// Faults of slices are told where services are translated.
    pub(super) fn new(manifests: &'m Manifests) -> Self {
        let mut services = Self { endpoints: HashMap::new(), addresses: HashMap::new() };
        for object in &manifests.endpoint_slices {
            let slice = &object.value;
            let Some(name) = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL)) else {
                continue;
            };
            let service = (object.namespace.as_str(), name.as_str());
            let texts = slice.endpoints.iter().flatten().flat_map(|endpoint| &endpoint.addresses);
            let addresses: Vec<IpNet> = texts.filter_map(|text| parse_ip(text).ok()).map(IpNet::from).collect();
            let endpoints = services.endpoints.entry(service).or_default();
            for port in slice.ports.iter().flatten() {
                let protocol = Protocol::from_name(port.protocol.as_deref().unwrap_or("TCP"));
                let number = port.port.and_then(|number| u16::try_from(number).ok());
                if let (Some(protocol), Some(number)) = (protocol, number) {
                    endpoints.extend(addresses.iter().map(|address| (*address, protocol, number)));
                }
            }
            services.addresses.entry(service).or_default().extend(addresses);
        }
        services
    }

    /// A service's endpoints, with protocol and port or by their address alone.
    pub(super) fn of(&self, namespace: &str, name: &str, with_ports: bool) -> Vec<ServiceEndpoint> {
        let service = (namespace, name);
        if with_ports {
            let endpoints = self.endpoints.get(&service).into_iter().flatten();
            endpoints.map(|(address, protocol, port)| (*address, Some((*protocol, *port)))).collect()
        } else {
            self.addresses.get(&service).into_iter().flatten().map(|address| (*address, None)).collect()
        }
    }
}
