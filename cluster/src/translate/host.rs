//! The node itself: its host endpoints, and what Calico's configuration of its agent says of it.

use std::net::IpAddr;

use weir_dataplane::model::{Cluster, EndpointToHost, Failsafe, HostEndpoint, HostSettings};
use weir_packet::Protocol;

use crate::{
    config::RouterConfig,
    resources::{
        Manifests, Object,
        at::{At, Reporter},
        calico::host::{self, FailsafePort, FelixConfiguration},
    },
    text::{
        Problems,
        address::{parse_ip, parse_network},
        problem::nearest,
    },
};

/// Fills in what the manifests say of this node. The number of the object by which DefaultEndpointToHostAction is what it is.
pub(super) fn translate(
    config: &RouterConfig,
    manifests: &Manifests,
    cluster: &mut Cluster,
    problems: &mut Problems,
) -> Option<u32> {
    for object in manifests.host_endpoints() {
        let endpoint = host_endpoint(object, problems);
        if object.value.spec.node.as_deref() == Some(config.node_name.as_str()) {
            object.reporter(problems).warning(object.at().key("spec"), UNSEEN, UNSEEN_HELP.to_owned());
            cluster.host_endpoints.push(endpoint);
        }
    }
    let (settings, decided_by) = host_settings(config, manifests, problems);
    cluster.host_settings = settings;
    decided_by
}

const UNSEEN: &str = "what the node itself sends by an uplink is not seen there, so egress rules for it are traced and not \
                      enforced";
const UNSEEN_HELP: &str =
    "what the node sends to pods and services by weir is; for the rest use the node's own firewall";

fn host_endpoint(object: &Object<host::HostEndpoint>, problems: &mut Problems) -> HostEndpoint {
    let mut report = object.reporter(problems);
    let (spec, at) = (&object.value.spec, object.at().key("spec"));
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    if given(&spec.node).is_none() {
        report.error(at, "spec.node is missing", "write the name of the node that it is on".to_owned());
    }
    let interface = given(&spec.interface_name);
    if interface.is_none() && spec.expected_ips.is_empty() {
        let help = "write interfaceName, \"*\" for all devices, or expectedIPs".to_owned();
        report.error(at, "neither spec.interfaceName nor spec.expectedIPs tells which device it is", help);
    }
    if let Some(name) = interface.as_ref().filter(|name| !(*name == "*" || is_device_name(name))) {
        let help = "write the name of one device, or \"*\" for all".to_owned();
        report.error(at.key("interfaceName"), format_args!("spec.interfaceName: {name:?} is no device's name"), help);
    }
    // Faults are told where its addresses are read as a peer's.
    let addresses: Vec<IpAddr> = spec.expected_ips.iter().filter_map(|text| parse_ip(text).ok()).collect();
    HostEndpoint { name: object.name.to_string(), interface, addresses }
}

/// Whether a device can be called so, as Calico's API has it.
fn is_device_name(name: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    (1..=15).contains(&name.len()) && name.bytes().all(known)
}

/// Calico's defaults, over which "default" goes, over which the node's own "node.NAME" goes, field by field.
fn host_settings(config: &RouterConfig, manifests: &Manifests, problems: &mut Problems) -> (HostSettings, Option<u32>) {
    let mut settings = HostSettings::default();
    let own = format!("node.{}", config.node_name);
    let of_name = |name: &str| manifests.felix_configurations().iter().find(|object| &*object.name == name);
    let given = [of_name("default"), of_name(&own)].into_iter().flatten();
    let mut decided_by = None;
    for object in given.clone() {
        if decided_by.is_none() {
            // Calico's manifests install Accept; where somebody configures and does not say, Calico's own default is Drop.
            settings.endpoint_to_host = EndpointToHost::Drop;
        }
        let says = apply(object, &mut settings, problems);
        decided_by = if says { Some((object, true)) } else { decided_by.or(Some((object, false))) };
    }
    if let Some((object, false)) = decided_by {
        let help = "write defaultEndpointToHostAction: Accept, which Calico's manifests and operator give to calico-node by the environment \
                    variable FELIX_DEFAULTENDPOINTTOHOSTACTION, or Drop if that is meant";
        let message =
            "spec.defaultEndpointToHostAction is not given, which means Drop: pods do not reach their own node";
        object.reporter(problems).warning(object.at().key("spec"), message, help.to_owned());
    }
    (settings, decided_by.map(|(object, _)| object.origin))
}

/// Whether it says what DefaultEndpointToHostAction is.
fn apply(object: &Object<FelixConfiguration>, settings: &mut HostSettings, problems: &mut Problems) -> bool {
    let mut report = object.reporter(problems);
    let (spec, at) = (&object.value.spec, object.at().key("spec"));
    let mut failsafes = |given: &Option<Vec<FailsafePort>>, key: &str, ports: &mut Vec<Failsafe>| {
        let Some(given) = given else { return };
        let read = given.iter().enumerate().filter_map(|(index, port)| {
            failsafe(port, at.key(key).item(index), &format!("spec.{key}[{index}]"), &mut report)
        });
        *ports = read.collect();
    };
    failsafes(&spec.failsafe_inbound_host_ports, "failsafeInboundHostPorts", &mut settings.failsafe_inbound);
    failsafes(&spec.failsafe_outbound_host_ports, "failsafeOutboundHostPorts", &mut settings.failsafe_outbound);
    let Some(action) = &spec.default_endpoint_to_host_action else { return false };
    settings.endpoint_to_host = match action.to_ascii_lowercase().as_str() {
        "drop" => EndpointToHost::Drop,
        "accept" => EndpointToHost::Accept,
        // Weir hands such a packet to the node's kernel, whose rules then say more.
        "return" => EndpointToHost::Accept,
        "" => return false,
        _ => {
            let known = ["Drop", "Accept", "Return"];
            let help = nearest(action, known).map(|name| format!("did you mean {name}?"));
            let field = "spec.defaultEndpointToHostAction";
            let message = format_args!("{field}: {action:?} is none of: {}", known.join(", "));
            report.error(at.key("defaultEndpointToHostAction"), message, help);
            EndpointToHost::Drop
        }
    };
    true
}

fn failsafe(port: &FailsafePort, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Option<Failsafe> {
    let given = port.protocol.as_deref().filter(|name| !name.is_empty()).unwrap_or("TCP");
    let protocol = Protocol::from_name(given).filter(|protocol| protocol.has_ports());
    if protocol.is_none() {
        let help = "write TCP, UDP or SCTP".to_owned();
        report.error(at.key("protocol"), format_args!("{field}.protocol: {given:?} has no ports"), help);
    }
    let net = port.net.as_ref().filter(|text| !text.is_empty());
    let net = match net {
        Some(text) => Some(report.read(at.key("net"), &format!("{field}.net"), parse_network(text))?),
        None => None,
    };
    Some(Failsafe { protocol: protocol?, port: port.port, net })
}
