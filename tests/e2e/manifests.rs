//! Manifests written by tests: one JSON document per resource, which is YAML too.

use serde_json::{Value, json};

/// A policy of default/server that lets in nobody but friends.
pub const ONLY_FRIENDS: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: default, name: only-friends}
spec:
  podSelector: {matchLabels: {app: server}}
  policyTypes: [Ingress]
  ingress:
  - from:
    - podSelector: {matchLabels: {app: friend}}
"#;

/// A service port: name, protocol, port, target port, node port (0: none).
pub type PortSpec = (&'static str, &'static str, u16, u16, u16);

/// A Service with its EndpointSlices.
#[derive(Default)]
pub struct ServiceSpec<'a> {
    /// "namespace/name".
    pub name: &'a str,
    /// Cluster IPs, of one or both families.
    pub addresses: &'a [&'a str],
    pub ports: &'a [PortSpec],
    /// externalTrafficPolicy: Local.
    pub local: bool,
    /// Address and node of each ready backend.
    pub backends: &'a [(&'a str, &'a str)],
}

/// A file of manifests.
#[derive(Default)]
pub struct Manifests(Vec<Value>);

impl Manifests {
    /// The nodes and the pool of most tests: node-a and node-b on 192.168.10.0/24, pods in 10.1.0.0/16, IPv6 alike.
    pub fn cluster(ipip: &str) -> Self {
        let mut all = Self::default();
        all.node("node-a", &["192.168.10.1", "fd00:10::1"], &["10.1.1.0/24", "fd00:1:1::/64"]);
        all.node("node-b", &["192.168.10.2", "fd00:10::2"], &["10.1.2.0/24", "fd00:1:2::/64"]);
        all.pool("ipv4", "10.1.0.0/16", ipip);
        all.pool("ipv6", "fd00:1::/32", "Never");
        all.namespace("default");
        all
    }

    pub fn add(&mut self, resource: Value) {
        self.0.push(resource);
    }

    pub fn node(&mut self, name: &str, addresses: &[&str], pod_cidrs: &[&str]) {
        let addresses: Vec<_> = addresses.iter().map(|a| json!({"type": "InternalIP", "address": a})).collect();
        self.add(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "spec": {"podCIDR": pod_cidrs[0], "podCIDRs": pod_cidrs}, "status": {"addresses": addresses},
        }));
    }

    /// Gives a node an address of its own in the tunnel, as Calico does: what it masquerades into the tunnel comes from there.
    pub fn tunnel_address(&mut self, node: &str, address: &str) {
        self.of_node(node)["annotations"] = json!({"projectcalico.org/IPv4IPIPTunnelAddr": address});
    }

    /// Puts a node into a zone.
    pub fn zone(&mut self, node: &str, zone: &str) {
        self.of_node(node)["labels"] = json!({"topology.kubernetes.io/zone": zone});
    }

    /// A node's metadata.
    fn of_node(&mut self, node: &str) -> &mut Value {
        let is_it = |resource: &&mut Value| resource["kind"] == "Node" && resource["metadata"]["name"] == node;
        &mut self.0.iter_mut().find(is_it).expect("a node with that name")["metadata"]
    }

    pub fn pool(&mut self, name: &str, cidr: &str, ipip: &str) {
        self.add(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": name},
            "spec": {"cidr": cidr, "ipipMode": ipip, "vxlanMode": "Never", "natOutgoing": true},
        }));
    }

    pub fn namespace(&mut self, name: &str) {
        self.add(json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}},
        }));
    }

    /// A running pod with the label `app`.
    pub fn pod(&mut self, node: &str, pod: &str, app: &str, addresses: &[&str]) {
        let (namespace, name) = pod.split_once('/').expect("namespace/name");
        let ips: Vec<_> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        self.add(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": namespace, "name": name, "labels": {"app": app}},
            "spec": {"nodeName": node, "containers": [{"name": "c"}]},
            "status": {"phase": "Running", "podIP": addresses[0], "podIPs": ips},
        }));
    }

    /// A pod as it is before it runs, with the label `app`.
    pub fn new_pod(&mut self, node: &str, pod: &str, app: &str, uid: &str) {
        let (namespace, name) = pod.split_once('/').expect("namespace/name");
        self.add(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": namespace, "name": name, "uid": uid, "labels": {"app": app}},
            "spec": {"nodeName": node, "containers": [{"name": "c"}]},
            "status": {"phase": "Pending"},
        }));
    }

    /// Makes a pod's object another one's of its name.
    pub fn replace_uid(&mut self, pod: &str, uid: &str) {
        let (_, name) = pod.split_once('/').expect("namespace/name");
        let is_it = |resource: &&mut Value| resource["kind"] == "Pod" && resource["metadata"]["name"] == name;
        self.0.iter_mut().find(is_it).expect("a pod with that name")["metadata"]["uid"] = uid.into();
    }

    /// Gives the pod that was added last a port of the node: `hostIP` (empty: none), protocol, the node's port and the pod's own.
    pub fn host_port(&mut self, host_ip: &str, protocol: &str, host_port: u16, port: u16) {
        let container = &mut self.0.last_mut().expect("a pod")["spec"]["containers"][0];
        let mut value = json!({"containerPort": port, "hostPort": host_port, "protocol": protocol});
        if !host_ip.is_empty() {
            value["hostIP"] = host_ip.into();
        }
        match container["ports"].as_array_mut() {
            Some(ports) => ports.push(value),
            None => container["ports"] = json!([value]),
        }
    }

    /// Makes the pod that was added last one of its node's own network.
    pub fn host_network(&mut self) {
        self.0.last_mut().expect("a pod")["spec"]["hostNetwork"] = true.into();
    }

    /// Gives the pod that was added last a service account.
    pub fn service_account(&mut self, name: &str) {
        self.0.last_mut().expect("a pod")["spec"]["serviceAccountName"] = name.into();
    }

    pub fn service(&mut self, spec: &ServiceSpec<'_>) {
        let (namespace, name) = spec.name.split_once('/').expect("namespace/name");
        let has_node_port = spec.ports.iter().any(|p| p.4 != 0);
        let ports: Vec<_> = spec
            .ports
            .iter()
            .map(|(name, protocol, port, target, node_port)| {
                let mut value = json!({"name": name, "protocol": protocol, "port": port, "targetPort": target});
                if *node_port != 0 {
                    value["nodePort"] = (*node_port).into();
                }
                value
            })
            .collect();
        let mut service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": namespace, "name": name},
            "spec": {
                "type": if has_node_port { "NodePort" } else { "ClusterIP" },
                "clusterIP": spec.addresses[0], "clusterIPs": spec.addresses, "ports": ports,
            },
        });
        if has_node_port {
            service["spec"]["externalTrafficPolicy"] = if spec.local { "Local" } else { "Cluster" }.into();
        }
        self.add(service);
        let slice_ports: Vec<_> = spec
            .ports
            .iter()
            .map(|(name, protocol, _, target, _)| json!({"name": name, "protocol": protocol, "port": target}))
            .collect();
        for (family, is_v6) in [("IPv4", false), ("IPv6", true)] {
            let endpoints: Vec<_> = spec
                .backends
                .iter()
                .filter(|(address, _)| address.contains(':') == is_v6)
                .map(|(address, node)| json!({"addresses": [address], "nodeName": node, "conditions": {"ready": true}}))
                .collect();
            if endpoints.is_empty() {
                continue;
            }
            self.add(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                "metadata": {
                    "namespace": namespace, "name": format!("{name}-{}", family.to_lowercase()),
                    "labels": {"kubernetes.io/service-name": name},
                },
                "endpoints": endpoints, "ports": slice_ports,
            }));
        }
    }

    /// The file's text.
    pub fn text(&self) -> String {
        self.0.iter().map(|resource| format!("---\n{resource:#}\n")).collect()
    }
}
