//! Calico's resources (projectcalico.org/v3, and the same as crd.projectcalico.org/v1).

pub mod host;
pub mod ipam;
pub mod policy;

use std::collections::BTreeMap;

use serde::{Deserialize, de::IgnoredAny};

use super::meta::{IntOrString, Metadata};

/// What all of Calico's resources have.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resource<S> {
    /// The API group and version; an item of a typed list need not say it.
    pub api_version: Option<Unread>,
    /// The kind, likewise.
    pub kind: Option<Unread>,
    /// Labels, annotations.
    #[serde(default)]
    pub metadata: Metadata,
    /// What is wanted.
    pub spec: S,
    /// What is; of no interest.
    pub status: Option<Unread>,
}

/// Where Calico keeps the labels of what it stores as crd.projectcalico.org/v1: in an annotation, as JSON.
const STORED_METADATA: &str = "projectcalico.org/metadata";

impl<S> Resource<S> {
    /// The resource's own labels.
    pub fn labels(&self) -> BTreeMap<String, String> {
        #[derive(Deserialize)]
        struct Stored {
            #[serde(default)]
            labels: BTreeMap<String, String>,
        }
        let mut labels = self.metadata.labels.to_map();
        let stored = self.metadata.annotations.get(STORED_METADATA);
        if let Some(stored) = stored.and_then(|text| serde_json::from_str::<Stored>(text).ok()) {
            labels.extend(stored.labels);
        }
        labels
    }
}

/// A field that is known and means nothing to weir.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unread;

impl<'de> Deserialize<'de> for Unread {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Self)
    }
}

/// An IPPool.
pub type IpPool = Resource<IpPoolSpec>;

/// IPPool's spec.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IpPoolSpec {
    /// The pool's addresses.
    pub cidr: String,
    /// When packets go into IPIP; unset is Never.
    pub ipip_mode: Option<EncapsulationMode>,
    /// When packets go into VXLAN; unset is Never.
    pub vxlan_mode: Option<EncapsulationMode>,
    /// Whether packets to addresses outside all pools are masqueraded; unset is false.
    pub nat_outgoing: Option<bool>,
    /// No new addresses from here; of no interest.
    pub disabled: Option<Unread>,
    /// Allocation; of no interest.
    pub block_size: Option<Unread>,
    /// Allocation; of no interest.
    pub node_selector: Option<Unread>,
    /// Allocation; of no interest.
    pub namespace_selector: Option<Unread>,
    /// Allocation; of no interest.
    pub allowed_uses: Option<Unread>,
    /// Allocation; of no interest.
    pub assignment_mode: Option<Unread>,
    /// BGP; of no interest.
    #[serde(rename = "disableBGPExport")]
    pub disable_bgp_export: Option<Unread>,
}

/// Calico's ipipMode and vxlanMode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
pub enum EncapsulationMode {
    /// Never.
    Never,
    /// To every other node.
    Always,
    /// To nodes of another subnet.
    CrossSubnet,
}

/// A WorkloadEndpoint.
pub type WorkloadEndpoint = Resource<WorkloadEndpointSpec>;

/// WorkloadEndpoint's spec.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadEndpointSpec {
    /// The node that it is on.
    pub node: Option<String>,
    /// "k8s" for pods.
    pub orchestrator: Option<String>,
    /// The pod that it belongs to.
    pub pod: Option<String>,
    /// The name of a workload that is no pod; of no interest.
    pub workload: Option<Unread>,
    /// The device's name inside the workload; of no interest.
    pub endpoint: Option<Unread>,
    /// Of no interest.
    #[serde(rename = "containerID")]
    pub container_id: Option<Unread>,
    /// The service account that it runs as.
    pub service_account_name: Option<String>,
    /// Its addresses, as CIDRs of one address each.
    #[serde(default)]
    pub ip_networks: Vec<String>,
    /// Floating addresses.
    #[serde(rename = "ipNATs", default)]
    pub ip_nats: Vec<Unread>,
    /// Of no interest.
    pub ipv4_gateway: Option<Unread>,
    /// Of no interest.
    pub ipv6_gateway: Option<Unread>,
    /// Its profiles; unset is as good as none.
    #[serde(default)]
    pub profiles: Vec<String>,
    /// The host's end of its veth pair.
    pub interface_name: Option<String>,
    /// Its own MAC address.
    pub mac: Option<String>,
    /// Its named ports.
    #[serde(default)]
    pub ports: Vec<EndpointPort>,
    /// Sources beyond its own addresses that it may send from.
    #[serde(default)]
    pub allow_spoofed_source_prefixes: Vec<Unread>,
    /// Bandwidth and packet rate limits.
    pub qos_controls: Option<Unread>,
}

/// A port of a WorkloadEndpoint or HostEndpoint.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointPort {
    /// Its name.
    pub name: Option<String>,
    /// Its protocol, by name or number.
    pub protocol: Option<IntOrString>,
    /// Its number.
    pub port: u16,
    /// Of no interest.
    pub host_port: Option<Unread>,
    /// Of no interest.
    #[serde(rename = "hostIP")]
    pub host_ip: Option<Unread>,
}
