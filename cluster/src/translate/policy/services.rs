//! The endpoints behind services, for rules that name a service: all that EndpointSlices list, ready or not, whichever proxy serves them or none.

use std::{cell::OnceCell, collections::HashMap, sync::Arc};

use ipnet::IpNet;
use weir_packet::Protocol;
use weir_policy::model::ServiceEndpoint;

use crate::resources::{Content, List, Manifests, kubernetes::EndpointSlice};

/// Endpoints by service. Nothing is looked at before a rule names a service.
pub(super) struct ServiceEndpoints<'m> {
    slices: List<'m, EndpointSlice>,
    /// By "namespace/service".
    by_service: OnceCell<HashMap<String, Vec<Arc<Content<EndpointSlice>>>>>,
}

impl<'m> ServiceEndpoints<'m> {
    /// Faults of slices are told where services are translated.
    pub(super) fn new(manifests: &'m Manifests) -> Self {
        Self { slices: manifests.endpoint_slices(), by_service: OnceCell::new() }
    }

    /// Whether a rule names a service.
    pub(super) fn were_asked(&self) -> bool {
        self.by_service.get().is_some()
    }

    fn slices_of(&self, namespace: &str, name: &str) -> impl Iterator<Item = &EndpointSlice> {
        let by_service = self.by_service.get_or_init(|| {
            let mut by_service: HashMap<String, Vec<Arc<Content<EndpointSlice>>>> = HashMap::new();
            for object in self.slices {
                if let Some(name) = &object.value.labels.service {
                    by_service
                        .entry(format!("{}/{name}", object.namespace))
                        .or_default()
                        .push(Arc::clone(object.content()));
                }
            }
            by_service
        });
        by_service.get(&format!("{namespace}/{name}")).into_iter().flatten().map(|slice| &slice.value)
    }

    /// A service's endpoints, with protocol and port or by their address alone.
    pub(super) fn of(&self, namespace: &str, name: &str, with_ports: bool) -> Vec<ServiceEndpoint> {
        let mut endpoints = Vec::new();
        for slice in self.slices_of(namespace, name) {
            let texts = slice.endpoints.iter().flat_map(|endpoint| endpoint.addresses.as_slice());
            let addresses: Vec<IpNet> = texts.filter_map(|text| text.ip().ok()).map(IpNet::from).collect();
            if !with_ports {
                endpoints.extend(addresses.iter().map(|address| (*address, None)));
                continue;
            }
            for port in slice.ports.iter() {
                let protocol = Protocol::from_name(port.protocol.as_deref().unwrap_or("TCP"));
                let number = port.port.and_then(|number| u16::try_from(number).ok());
                if let (Some(protocol), Some(number)) = (protocol, number) {
                    endpoints.extend(addresses.iter().map(|address| (*address, Some((protocol, number)))));
                }
            }
        }
        endpoints
    }
}
