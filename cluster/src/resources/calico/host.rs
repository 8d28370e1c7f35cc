//! Calico's resources about nodes: host endpoints, and the settings of its per-node agent as far as they are policy.

use serde::Deserialize;

use super::{EndpointPort, Resource};

/// A HostEndpoint.
pub type HostEndpoint = Resource<HostEndpointSpec>;
/// A FelixConfiguration.
pub type FelixConfiguration = Resource<FelixConfigurationSpec>;

/// HostEndpoint's spec.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostEndpointSpec {
    /// The node that it is on.
    pub node: Option<String>,
    /// The device, or "*" for all.
    pub interface_name: Option<String>,
    /// Its addresses; without an interface name they tell which device it is.
    #[serde(rename = "expectedIPs", default)]
    pub expected_ips: Vec<String>,
    /// Its profiles.
    #[serde(default)]
    pub profiles: Vec<String>,
    /// Its named ports.
    #[serde(default)]
    pub ports: Vec<EndpointPort>,
}

/// FelixConfiguration's spec, without the many settings that mean nothing to weir.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FelixConfigurationSpec {
    /// Ports of the node that stay reachable whatever policy says; an empty list is none.
    pub failsafe_inbound_host_ports: Option<Vec<FailsafePort>>,
    /// Ports that stay reachable from the node whatever policy says; an empty list is none.
    pub failsafe_outbound_host_ports: Option<Vec<FailsafePort>>,
    /// What happens to what a pod sends to its own node, once its egress policy allows it.
    pub default_endpoint_to_host_action: Option<String>,
}

/// A failsafe port.
#[derive(Clone, Debug, Deserialize)]
pub struct FailsafePort {
    /// TCP or UDP; unset is TCP.
    pub protocol: Option<String>,
    /// The port.
    pub port: u16,
    /// Only for peers in this CIDR; unset is any.
    pub net: Option<String>,
}
