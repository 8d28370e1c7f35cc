//! `weir services`: the services of a running router with their backends as the dataplane sees them: which lists a backend is in, why
//! not, and how many connections it got. Host ports of this node's pods stand among them.
//!
//! The router answers on a thread of its own, a line of JSON for each service port.

use std::{
    collections::HashMap,
    fmt::Write as _,
    io::{self, BufWriter, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use weir_cluster::compile::address_port;
use weir_nat::{BackendIdentity, HostAddresses, Model, ServicePort, TrafficPolicy, Usage, WhyNot, usage};

use crate::control::{self, AskError, Request};

/// Which services are asked for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Query {
    /// "namespace", "namespace/name" or "namespace/name:port"; all without.
    pub of: Option<String>,
}

impl Query {
    /// Whether a service port of this name is asked for.
    pub fn matches(&self, name: &str) -> bool {
        let Some(wanted) = &self.of else { return true };
        let service = name.split_once(':').map_or(name, |(service, _)| service);
        let namespace = service.split_once('/').map_or("", |(namespace, _)| namespace);
        [name, service, namespace].contains(&wanted.as_str())
    }
}

/// Answers with the services of `model`, each with its backends' hits.
///
/// # Errors
/// Where the reader went away.
pub fn answer(stream: UnixStream, model: &Model, hits: &HashMap<BackendIdentity, u64>) -> io::Result<()> {
    let mut out = BufWriter::new(stream);
    for service in &model.services {
        writeln!(out, "{}", describe(model, service, hits))?;
    }
    writeln!(out, "{}", json!({"end": true}))?;
    out.flush()
}

/// Asks the router that runs with `config`, and gives each service port of its answer to `show`.
///
/// # Errors
/// Where no router answers, or its answer cannot be read or shown.
pub fn ask(config: &Path, query: &Query, show: impl FnMut(&Value) -> io::Result<()>) -> Result<(), AskError> {
    if control::ask_lines(config, &Request::Services(query.clone()), show)? {
        return Ok(());
    }
    Err(AskError::Broken(io::ErrorKind::UnexpectedEof.into()))
}

/// A service port with its backends.
fn describe(model: &Model, service: &ServicePort, hits: &HashMap<BackendIdentity, u64>) -> Value {
    let policy = |policy: TrafficPolicy| match policy {
        TrafficPolicy::Cluster => "Cluster",
        TrafficPolicy::Local => "Local",
    };
    let all = usage(model, service);
    let why = |why_not: &Option<WhyNot>| why_not.as_ref().map(WhyNot::to_string);
    let mut total = 0;
    let backends: Vec<Value> = all
        .iter()
        .map(|Usage { endpoint, cluster, local }| {
            let identity = BackendIdentity::new(service, endpoint.address, endpoint.port);
            let hits = hits.get(&identity).copied().unwrap_or(0);
            total += hits;
            json!({
                "address": address_port(endpoint.address, endpoint.port),
                "node": endpoint.node_name(),
                "cluster": cluster.is_none(),
                "local": local.is_none(),
                "notCluster": why(cluster),
                "notLocal": why(local),
                "hits": hits,
            })
        })
        .collect();
    json!({
        "service": service.name,
        "proto": service.protocol.to_string().to_lowercase(),
        "port": service.port,
        "clusterIPs": service.cluster_ips,
        "externalIPs": service.external_ips,
        "loadBalancerIPs": service.load_balancer_ips,
        "loadBalancerSourceRanges": service.source_ranges,
        "nodePort": service.node_port,
        "kind": if service.host_port.is_some() { "HostPort" } else { "Service" },
        "hostPort": service.host_port.map(|_| service.port),
        "hostIP": service.host_port.map(host_ip),
        "healthCheckNodePort": service.health_check_node_port,
        "internalTrafficPolicy": policy(service.internal_policy),
        "externalTrafficPolicy": policy(service.external_policy),
        "affinitySeconds": service.affinity,
        "usable": {
            "cluster": all.iter().filter(|one| one.cluster.is_none()).count(),
            "local": all.iter().filter(|one| one.local.is_none()).count(),
        },
        "hits": total,
        "backends": backends,
    })
}

/// The `hostIP` of a host port, in full.
fn host_ip(on: HostAddresses) -> String {
    match on {
        HostAddresses::All => "all addresses of this node".to_owned(),
        HostAddresses::Ipv4 => "0.0.0.0".to_owned(),
        HostAddresses::Ipv6 => "::".to_owned(),
        HostAddresses::One(address) => address.to_string(),
    }
}

/// A service port for a person: a line for itself, and one for each backend.
pub fn text(service: &Value) -> String {
    let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let list = |value: &Value| value.as_array().into_iter().flatten().map(word).collect::<Vec<_>>().join(", ");
    let open = if service["hostPort"].is_null() {
        format!("{}, port {}", list(&service["clusterIPs"]), service["port"])
    } else {
        format!("{}, host port {}", word(&service["hostIP"]), service["hostPort"])
    };
    let mut text = format!("{}  {} {open}", word(&service["service"]), word(&service["proto"]));
    for (key, label) in [
        ("externalIPs", "external IPs"),
        ("loadBalancerIPs", "load balancer IPs"),
        ("loadBalancerSourceRanges", "open to"),
    ] {
        if service[key].as_array().is_some_and(|values| !values.is_empty()) {
            let _ = write!(text, "; {label} {}", list(&service[key]));
        }
    }
    for (key, label, unit) in [
        ("nodePort", "node port", ""),
        ("healthCheckNodePort", "health-check node port", ""),
        ("affinitySeconds", "ClientIP affinity", " s"),
    ] {
        if !service[key].is_null() {
            let _ = write!(text, "; {label} {}{unit}", service[key]);
        }
    }
    let [internal, external] = ["internal", "external"].map(|kind| service[format!("{kind}TrafficPolicy")] == "Local");
    for (kind, is_local) in [("internal", internal), ("external", external)] {
        if is_local {
            let _ = write!(text, "; {kind} traffic policy Local");
        }
    }
    text.push('\n');
    let has_local_policy = internal || external;
    let backends = || service["backends"].as_array().into_iter().flatten();
    let width = |key: &str| backends().map(|backend| node_or_dash(&backend[key]).len()).max().unwrap_or(0);
    let (address_width, node_width) = (width("address"), width("node"));
    for backend in backends() {
        let [not_cluster, not_local] = ["notCluster", "notLocal"].map(|key| word(&backend[key]));
        let used = match (backend["cluster"] == true, backend["local"] == true && has_local_policy) {
            (true, false) if has_local_policy => format!("used, but not by policy Local: {not_local}"),
            (true, _) => "used".to_owned(),
            (false, true) => format!("used by policy Local only: {not_cluster}"),
            (false, false) => format!("not used: {not_cluster}"),
        };
        let (address, node) = (node_or_dash(&backend["address"]), node_or_dash(&backend["node"]));
        let _ = writeln!(
            text,
            "  {address:<address_width$}  {node:<node_width$}  {:>8} connections  {used}",
            backend["hits"].as_u64().unwrap_or(0)
        );
    }
    let usable = |list: &str| service["usable"][list].as_u64().unwrap_or(0);
    if usable("cluster") == 0 {
        text.push_str("  no backend can be used: connections are rejected\n");
    } else if has_local_policy && usable("local") == 0 {
        text.push_str("  no backend is on this node: connections under policy Local are dropped\n");
    }
    text
}

fn node_or_dash(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use weir_nat::{Endpoint, Topology};

    use super::*;

    #[test]
    fn services_are_found_by_namespace_name_and_port() {
        for (of, expected) in [
            (None, true),
            (Some("shop"), true),
            (Some("shop/web"), true),
            (Some("shop/web:http"), true),
            (Some("web"), false),
            (Some("shop/we"), false),
            (Some("shop/web:https"), false),
        ] {
            assert_eq!(Query { of: of.map(str::to_owned) }.matches("shop/web:http"), expected, "{of:?}");
        }
        assert!(Query { of: Some("shop/web".into()) }.matches("shop/web"));
    }

    #[test]
    fn backends_tell_why_they_are_not_used() {
        let endpoint = |address: &str, node: Option<&str>, (ready, serving, terminating)| Endpoint {
            address: address.parse().unwrap(),
            port: 8080,
            ready,
            serving,
            terminating,
            topology: node.map(Topology::on).map(Arc::new),
        };
        let ready = (true, true, false);
        let service = ServicePort {
            name: "shop/web:http".into(),
            protocol: weir_packet::Protocol::TCP,
            port: 80,
            cluster_ips: vec!["10.96.0.1".parse().unwrap()],
            node_port: Some(30080),
            external_policy: TrafficPolicy::Local,
            affinity: Some(600),
            endpoints: vec![
                endpoint("10.1.0.1", Some("here"), ready),
                endpoint("10.1.0.2", Some("there"), ready),
                endpoint("10.1.0.3", None, ready),
                endpoint("10.1.0.4", Some("here"), (false, false, false)),
                endpoint("10.1.0.5", Some("here"), (false, true, true)),
            ],
            ..ServicePort::default()
        };
        let hits = HashMap::from([(BackendIdentity::new(&service, "10.1.0.2".parse().unwrap(), 8080), 7)]);
        let model = Model { node_name: "here".into(), ..Model::default() };
        let value = describe(&model, &service, &hits);
        assert_eq!((&value["usable"], &value["hits"]), (&json!({"cluster": 3, "local": 1}), &json!(7)));
        assert_eq!(
            text(&value),
            "shop/web:http  tcp 10.96.0.1, port 80; node port 30080; ClientIP affinity 600 s; external traffic policy Local\n\
             \x20 10.1.0.1:8080  here          0 connections  used\n\
             \x20 10.1.0.2:8080  there         7 connections  used, but not by policy Local: on there, not on this node\n\
             \x20 10.1.0.3:8080  -             0 connections  used, but not by policy Local: without nodeName, so never local\n\
             \x20 10.1.0.4:8080  here          0 connections  not used: not serving\n\
             \x20 10.1.0.5:8080  here          0 connections  not used: terminating, and others are ready\n"
        );
        let host_port = ServicePort {
            name: "shop/ingress:hostPort/8443".into(),
            protocol: weir_packet::Protocol::UDP,
            port: 8443,
            host_port: Some(HostAddresses::All),
            endpoints: service.endpoints[..1].to_vec(),
            ..ServicePort::default()
        };
        let value = describe(&model, &host_port, &hits);
        assert_eq!(
            text(&value),
            "shop/ingress:hostPort/8443  udp all addresses of this node, host port 8443\n\
             \x20 10.1.0.1:8080  here         0 connections  used\n"
        );
        for (on, told) in [
            (HostAddresses::Ipv4, "0.0.0.0"),
            (HostAddresses::Ipv6, "::"),
            (HostAddresses::One("192.0.2.1".parse().unwrap()), "192.0.2.1"),
        ] {
            let value = describe(&model, &ServicePort { host_port: Some(on), ..host_port.clone() }, &hits);
            assert_eq!((&value["hostIP"], &value["kind"]), (&json!(told), &json!("HostPort")));
        }
        assert_eq!(value["hostPort"], 8443);
        let gone = ServicePort { endpoints: service.endpoints[3..4].to_vec(), ..service };
        assert!(text(&describe(&model, &gone, &hits)).ends_with("no backend can be used: connections are rejected\n"));
    }
}
