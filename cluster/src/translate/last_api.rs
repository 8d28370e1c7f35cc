//! The last backends of default/kubernetes, the cluster's own API.
//!
//! The API server takes its own endpoint out while it restarts, a list of objects may lose its slice or the service itself, and a router may start in that
//! moment. Who asks the API by its service could then not hear of a new backend. So this service has backends as long as weir has
//! ever heard of any: those of each port that it had last are kept, in memory and beside the texts that are in force
//! ([`crate::sources::keep`]), until others come.

use std::{net::IpAddr, path::Path, sync::Arc};

use serde::{Deserialize, Serialize};
use weir_nat::{Endpoint, Model, ServicePort, Topology};
use weir_packet::Protocol;

use super::impossible::is_usable;
use crate::sources::{
    file::{self, Unread},
    keep::{API_NAME, KeepError, is_absent, write_whole},
};

/// Its namespace and name.
pub(super) const API: (&str, &str) = ("default", "kubernetes");
/// Backends and ports that are kept, at most: clusters have one port, and a few API servers.
const MOST: usize = 100;
/// In place of an object's number: there is none any more.
const NO_OBJECT: u32 = u32::MAX;

/// What default/kubernetes had last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastApi {
    ports: Vec<Port>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Port {
    name: String,
    protocol: u8,
    port: u16,
    cluster_ips: Vec<IpAddr>,
    /// Not empty.
    backends: Vec<Backend>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Backend {
    address: IpAddr,
    port: u16,
    node: Option<String>,
}

impl LastApi {
    /// As it is kept in a folder; `None` where nothing is.
    ///
    /// # Errors
    /// Where the file is not to be used; it stays until there is something to be kept.
    pub fn read(folder: &Path) -> Result<Option<Self>, KeepError> {
        let path = folder.join(API_NAME);
        match file::read(&path) {
            Ok((_, bytes)) => match serde_json::from_slice::<Self>(&bytes) {
                Ok(api) => Ok(Some(api.checked())),
                Err(_) => Err(KeepError::Malformed { path, why: "it holds no backends of the API" }),
            },
            Err(Unread::System(error)) if is_absent(&error) => Ok(None),
            Err(why) => Err(KeepError::Bad { path, why }),
        }
    }

    /// Keeps it in a folder, unless nothing is known of it; whether anything was to be written.
    ///
    /// # Errors
    /// Where it cannot be written; what was kept before stays.
    pub fn write(&self, folder: &Path) -> Result<bool, KeepError> {
        let path = folder.join(API_NAME);
        if self.is_empty() || Self::read(folder).is_ok_and(|kept| kept.as_ref() == Some(self)) {
            return Ok(false);
        }
        let bytes = serde_json::to_vec(self).map_err(|error| KeepError::System {
            what: "cannot write down",
            path: path.clone(),
            source: error.into(),
        })?;
        write_whole(folder, &path, &bytes).map(|()| true)
    }

    /// What it has in a model.
    pub fn of(model: &Model) -> Self {
        let is_api = |port: &&Arc<ServicePort>| port.host_port.is_none() && is_api(&port.name);
        let ports = model.services.iter().filter(is_api).map(|port| Port {
            name: port.name.clone(),
            protocol: port.protocol.0,
            port: port.port,
            cluster_ips: port.cluster_ips.clone(),
            backends: port.endpoints.iter().filter(|one| one.is_usable()).take(MOST).map(Backend::of).collect(),
        });
        Self { ports: ports.filter(|port| !port.backends.is_empty()).take(MOST).collect() }
    }

    /// Whether nothing is known of it.
    pub fn is_empty(&self) -> bool {
        self.ports.is_empty()
    }

    /// Without what no table could live with, as a file may say anything.
    fn checked(mut self) -> Self {
        self.ports.truncate(MOST);
        self.ports.retain_mut(|port| {
            port.backends.truncate(MOST);
            port.backends.retain(|backend| is_usable(backend.address) && backend.port != 0);
            port.cluster_ips.truncate(2);
            let protocol = Protocol(port.protocol);
            let has_ports = [Protocol::TCP, Protocol::UDP, Protocol::SCTP].contains(&protocol) && port.port != 0;
            let is_there = !port.cluster_ips.is_empty() && port.cluster_ips.iter().all(|address| is_usable(*address));
            has_ports && is_there && is_api(&port.name) && !port.backends.is_empty()
        });
        let mut fronts = Vec::new();
        self.ports.retain(|port| {
            let mut all = port.cluster_ips.iter().map(|address| (*address, port.protocol, port.port));
            let is_first = !all.clone().any(|front| fronts.contains(&front));
            fronts.extend(all.by_ref().filter(|_| is_first));
            is_first
        });
        self
    }

    /// Gives those of its ports that have no usable backend any more those that they had.
    pub(super) fn fill(&self, ports: &mut [Arc<ServicePort>]) {
        for port in ports.iter_mut().filter(|port| !port.endpoints.iter().any(Endpoint::is_usable)) {
            let is_it = |last: &&Port| (&last.name, last.protocol) == (&port.name, port.protocol.0);
            if let Some(last) = self.ports.iter().find(is_it) {
                Arc::make_mut(port).endpoints = last.backends.iter().map(Backend::endpoint).collect();
            }
        }
    }

    /// The service as it was, where its object is gone: on its cluster IPs, if nobody else has them.
    pub(super) fn service_ports(&self, is_taken: impl Fn(&IpAddr) -> bool) -> impl Iterator<Item = Arc<ServicePort>> {
        let free = self.ports.iter().filter(move |port| !port.cluster_ips.iter().any(&is_taken));
        free.map(|port| {
            Arc::new(ServicePort {
                name: port.name.clone(),
                protocol: Protocol(port.protocol),
                port: port.port,
                cluster_ips: port.cluster_ips.clone(),
                endpoints: port.backends.iter().map(Backend::endpoint).collect(),
                origin: NO_OBJECT,
                ..ServicePort::default()
            })
        })
    }
}

impl Backend {
    fn of(endpoint: &Endpoint) -> Self {
        Self { address: endpoint.address, port: endpoint.port, node: endpoint.node_name().map(str::to_owned) }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint {
            address: self.address,
            port: self.port,
            ready: true,
            serving: true,
            terminating: false,
            topology: self.node.as_deref().map(Topology::on).map(Arc::new),
        }
    }
}

/// Whether a service port of that name is one of it.
fn is_api(name: &str) -> bool {
    let service = name.split_once(':').map_or(name, |(service, _)| service);
    service.split_once('/') == Some(API)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_kept_until_there_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("lib/state");
        let api = |address: &str| LastApi {
            ports: vec![Port {
                name: "default/kubernetes:https".into(),
                protocol: 6,
                port: 443,
                cluster_ips: vec!["10.96.0.1".parse().unwrap()],
                backends: vec![Backend { address: address.parse().unwrap(), port: 6443, node: Some("a".into()) }],
            }],
        };
        assert_eq!(LastApi::read(&state).unwrap(), None);
        assert!(!LastApi::default().write(&state).unwrap() && !state.exists(), "nothing is known");
        assert!(api("192.0.2.1").write(&state).unwrap() && !api("192.0.2.1").write(&state).unwrap());
        assert!(!LastApi::default().write(&state).unwrap());
        assert_eq!(LastApi::read(&state).unwrap(), Some(api("192.0.2.1")));
        std::fs::write(state.join(API_NAME), "{").unwrap();
        assert!(LastApi::read(&state).unwrap_err().to_string().ends_with("it holds no backends of the API"));
        assert!(api("192.0.2.2").write(&state).unwrap());
        assert_eq!(LastApi::read(&state).unwrap(), Some(api("192.0.2.2")));
        assert!(crate::sources::keep::Kept::remove(&state).unwrap() && !state.exists());
    }

    #[test]
    fn what_a_file_says_is_served_only_if_it_can_be() {
        let backend = |address: &str, port| Backend { address: address.parse().unwrap(), port, node: None };
        let port = |name: &str, protocol, port, ip: &str, backends: Vec<Backend>| Port {
            name: name.into(),
            protocol,
            port,
            cluster_ips: vec![ip.parse().unwrap()],
            backends,
        };
        let good = || port("default/kubernetes:https", 6, 443, "10.96.0.1", vec![backend("192.0.2.1", 6443)]);
        let mixed = Port {
            backends: vec![backend("0.0.0.0", 1), backend("192.0.2.1", 6443), backend("192.0.2.2", 0)],
            ..good()
        };
        let bad = [
            Port { name: "default/kubernetes2".into(), ..good() },
            Port { name: "other/kubernetes:https".into(), ..good() },
            Port { protocol: 1, ..good() },
            Port { port: 0, ..good() },
            Port { cluster_ips: Vec::new(), ..good() },
            Port { cluster_ips: vec!["127.0.0.1".parse().unwrap()], ..good() },
            Port { backends: vec![backend("224.0.0.1", 6443)], ..good() },
        ];
        // The second has the frontend of the first.
        let read = LastApi { ports: [bad.to_vec(), vec![mixed, good()]].concat() };
        let json = serde_json::to_string(&read).unwrap();
        let read: LastApi = serde_json::from_str(&json).unwrap();
        assert_eq!(read.checked(), LastApi { ports: vec![good()] });
    }
}
