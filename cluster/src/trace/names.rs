//! What a flow's ends and port may be called instead of by numbers: pods, workloads, services, and names of ports.

use std::{collections::BTreeSet, net::IpAddr};

use weir_dataplane::model::Workload;
use weir_nat::ServicePort;
use weir_packet::Protocol;

use super::flow::{Flow, Port, service_of};
use crate::{text::problem::nearest, translate::Loaded};

/// Kinds of workloads, by the words that kubectl takes for them.
const KINDS: [(&str, &[&str]); 7] = [
    ("Deployment", &["deploy", "deployment", "deployments"]),
    ("StatefulSet", &["sts", "statefulset", "statefulsets"]),
    ("DaemonSet", &["ds", "daemonset", "daemonsets"]),
    ("ReplicaSet", &["rs", "replicaset", "replicasets"]),
    ("Job", &["job", "jobs"]),
    ("CronJob", &["cj", "cronjob", "cronjobs"]),
    ("ReplicationController", &["rc", "replicationcontroller", "replicationcontrollers"]),
];

/// An end of a flow.
pub(super) struct End {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// What stands for a name that is not its own: "pod shop/web-0".
    pub stands_for: Option<String>,
    /// The port, where the flow names one or leaves it to the service.
    pub port: Option<u16>,
}

impl End {
    fn plain(addresses: Vec<IpAddr>) -> Self {
        Self { addresses, stands_for: None, port: None }
    }
}

/// The names of a loaded configuration.
pub(super) struct Names<'l> {
    pub loaded: &'l Loaded,
}

impl Names<'_> {
    /// The end that a flow comes from.
    ///
    /// # Errors
    /// A name that nothing has, with one that it may stand for.
    pub fn source(&self, flow: &Flow) -> Result<End, String> {
        if service_of(&flow.src).is_some() && !self.is_pod(&flow.src) {
            return Err(format!(
                "src: {} is a service, and packets come from pods: name a pod or a workload",
                flow.src
            ));
        }
        self.end(&flow.src)
    }

    /// The end that a flow goes to, with its port.
    ///
    /// # Errors
    /// As [`Names::source`], and a port that it does not have.
    pub fn destination(&self, flow: &Flow) -> Result<End, String> {
        if let Some(service) = service_of(&flow.dst).filter(|_| !self.is_pod(&flow.dst)) {
            return self.service(&self.with_namespace(service), flow);
        }
        let end = self.end(&flow.dst)?;
        let Some(Port::Name(name)) = &flow.dport else { return Ok(end) };
        let pod = self
            .loaded
            .policy
            .endpoints
            .iter()
            .find(|endpoint| endpoint.nets.iter().any(|net| end.addresses.contains(&net.addr())));
        let ports = pod.map(|pod| pod.ports.as_slice()).unwrap_or_default();
        let ports = ports.iter().filter(|port| port.protocol == flow.protocol);
        match ports.clone().find(|port| port.name == *name) {
            Some(port) => Ok(End { port: Some(port.port), ..end }),
            None => Err(no_port(&flow.dst, flow.protocol, name, ports.map(|port| port.name.clone()).collect())),
        }
    }

    fn end(&self, text: &str) -> Result<End, String> {
        if let Ok(address) = text.parse() {
            return Ok(End::plain(vec![address]));
        }
        if let Some(pod) = self.pods().find(|pod| pod.name == text) {
            return Ok(End::plain(pod.addresses.clone()));
        }
        let (word, rest) = text.split_once('/').unwrap_or(("", text));
        let kind = KINDS.iter().find(|(_, words)| words.contains(&word.to_ascii_lowercase().as_str()));
        let of_kind = kind.map(|(kind, _)| (Some(*kind), self.with_namespace(rest)));
        let of_any = text.contains('/').then(|| (None, text.to_owned()));
        for (kind, name) in of_kind.into_iter().chain(of_any) {
            if let Some(pod) = self.pod_of(kind, &name) {
                let stands_for = Some(format!("{text}: pod {}", pod.name));
                return Ok(End { addresses: pod.addresses.clone(), stands_for, port: None });
            }
        }
        if ["po", "pod", "pods"].contains(&word) && rest.contains('/') {
            return self.end(rest);
        }
        Err(self.unknown(text, kind.map(|(kind, _)| *kind), rest))
    }

    fn unknown(&self, text: &str, kind: Option<&str>, rest: &str) -> String {
        let pods: Vec<&str> = self.pods().map(|pod| pod.name.as_str()).collect();
        let services = self.service_names();
        let suggest = |name: &str| {
            let known = pods.iter().copied().chain(pods.iter().filter_map(|pod| workload_of(pod)));
            let near = nearest(name, known).map(str::to_owned);
            let service = || nearest(name, services.iter().map(String::as_str)).map(|near| format!("svc/{near}"));
            let exact = services.contains(name).then(|| format!("svc/{name}"));
            let near = exact.or(near).or_else(service);
            near.map_or_else(String::new, |near| format!("; did you mean {near}?"))
        };
        match kind {
            Some(kind) => {
                let name = self.with_namespace(rest);
                format!("no pod of {kind} {name} with an address is in the manifests{}", suggest(&name))
            }
            None if text.contains('/') => format!("no pod {text} with an address is in the manifests{}", suggest(text)),
            None => {
                let in_some = pods.iter().find(|pod| pod.split_once('/').is_some_and(|(_, short)| short == text));
                let help = in_some.map_or_else(String::new, |pod| format!("; did you mean {pod}?"));
                format!("{text:?} is neither an IP address nor namespace/pod{help}")
            }
        }
    }

    /// "namespace/name"; a name alone is of the namespace that objects without one are in.
    fn with_namespace(&self, name: &str) -> String {
        if name.contains('/') { name.to_owned() } else { format!("{}/{name}", self.loaded.namespace) }
    }

    fn is_pod(&self, name: &str) -> bool {
        self.pods().any(|pod| pod.name == name)
    }

    fn pods(&self) -> impl Iterator<Item = &Workload> + Clone {
        self.loaded.cluster.workloads.iter().filter(|pod| !pod.addresses.is_empty())
    }

    /// The pod that stands for a workload: the first on this node, else the first.
    fn pod_of(&self, kind: Option<&str>, name: &str) -> Option<&Workload> {
        let assumed = self.loaded.assumed.iter().flat_map(|assumed| &assumed.workloads);
        let assumed = assumed.filter(|((of, full), _)| full == name && kind.is_none_or(|kind| kind == of));
        let assumed: BTreeSet<&str> = assumed.flat_map(|(_, pods)| pods).map(String::as_str).collect();
        let is_its = |pod: &&Workload| {
            assumed.contains(pod.name.as_str()) || assumed.is_empty() && is_name_of_pod_of(&pod.name, kind, name)
        };
        let mut pods: Vec<&Workload> = self.pods().filter(is_its).collect();
        pods.sort_by_key(|pod| (pod.node.as_deref() != Some(&self.loaded.cluster.node_name), &pod.name));
        pods.first().copied()
    }

    fn service(&self, name: &str, flow: &Flow) -> Result<End, String> {
        let all = self.loaded.services.services.iter().filter(|port| port.host_port.is_none());
        let ports: Vec<&ServicePort> = all.map(|port| &**port).filter(|port| name_of(port).0 == name).collect();
        let Some(first) = ports.first() else {
            let known = self.service_names();
            let near = nearest(name, known.iter().map(String::as_str));
            let help = near.map_or_else(String::new, |near| format!("; did you mean svc/{near}?"));
            return Err(format!("no service {name} with a cluster IP is in the manifests{help}"));
        };
        let end = End::plain(first.cluster_ips.clone());
        let of_protocol = ports.iter().filter(|port| port.protocol == flow.protocol);
        match &flow.dport {
            Some(Port::Number(_)) => Ok(end),
            Some(Port::Name(wanted)) => match of_protocol.clone().find(|port| name_of(port).1 == wanted) {
                Some(port) => Ok(End { port: Some(port.port), ..end }),
                None => {
                    let names = of_protocol.map(|port| name_of(port).1.to_owned()).collect();
                    Err(no_port(&flow.dst, flow.protocol, wanted, names))
                }
            },
            None if !flow.protocol.has_ports() => Ok(end),
            None => match of_protocol.clone().map(|port| port.port).collect::<Vec<_>>().as_slice() {
                [port] => Ok(End { port: Some(*port), ..end }),
                [] => Err(format!("{} has no {} port", flow.dst, flow.protocol)),
                several => {
                    let several: Vec<String> = several.iter().map(u16::to_string).collect();
                    Err(format!(
                        "dport is missing: {} has the {} ports {}",
                        flow.dst,
                        flow.protocol,
                        several.join(", ")
                    ))
                }
            },
        }
    }

    fn service_names(&self) -> BTreeSet<String> {
        let ports = self.loaded.services.services.iter().filter(|port| port.host_port.is_none());
        ports.map(|port| name_of(port).0.to_owned()).collect()
    }
}

/// "namespace/name" and the port's name, which is empty where the only port has none.
fn name_of(port: &ServicePort) -> (&str, &str) {
    port.name.split_once(':').unwrap_or((&port.name, ""))
}

fn no_port(of: &str, protocol: Protocol, name: &str, mut known: Vec<String>) -> String {
    known.retain(|known| !known.is_empty());
    let help = match nearest(name, known.iter().map(String::as_str)) {
        Some(near) => format!("; did you mean {near}?"),
        None if known.is_empty() => String::new(),
        None => format!("; it has {}", known.join(", ")),
    };
    format!("{of} has no {protocol} port called {name:?}{help}")
}

/// The workload that a pod is probably of, by what controllers add to its name: see [`is_name_of_pod_of`].
fn workload_of(pod: &str) -> Option<&str> {
    let (one, _) = pod.rsplit_once('-').filter(|(one, _)| is_name_of_pod_of(pod, None, one))?;
    let two =
        one.rsplit_once('-').filter(|(_, hash)| hash.len() >= 8 && hash.bytes().any(|byte| byte.is_ascii_digit()));
    Some(two.map_or(one, |(two, _)| two))
}

/// Whether a pod is called as the controller of that kind calls its pods: the workload's name, then a number or random letters, for a
/// Deployment's and a CronJob's with one more part in between.
fn is_name_of_pod_of(pod: &str, kind: Option<&str>, workload: &str) -> bool {
    let Some(rest) = pod.strip_prefix(workload).and_then(|rest| rest.strip_prefix('-')) else { return false };
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let is_random =
        |part: &str| part.len() == 5 && part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let is_hash = |part: &str| {
        (1..=10).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    let one = || is_random(rest);
    let two = || rest.split_once('-').is_some_and(|(first, second)| is_hash(first) && is_random(second));
    match kind {
        Some("Deployment" | "CronJob") => two(),
        Some("StatefulSet") => is_number(rest),
        Some(_) => one(),
        None => one() || two() || is_number(rest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_known_by_their_pods_names() {
        for (pod, workload) in [
            ("x/web-7d9f8b6c5d-x2x8k", Some("x/web")),
            ("x/web-admin-0", Some("x/web-admin")),
            ("x/agent-x2x8k", Some("x/agent")),
            ("x/web", None),
            ("x/web-server", None),
        ] {
            assert_eq!(workload_of(pod), workload, "{pod}");
        }
    }

    #[test]
    fn pods_are_known_by_their_workloads_names() {
        for (pod, kind, workload, expected) in [
            ("x/web-7d9f8b6c5d-x2x8k", Some("Deployment"), "x/web", true),
            ("x/web-7d9f8b6c5d-x2x8k", None, "x/web", true),
            ("x/web-7d9f8b6c5d-x2x8k", Some("StatefulSet"), "x/web", false),
            ("x/web-admin-7d9f8b6c5d-x2x8k", None, "x/web", false),
            ("x/web-0", Some("StatefulSet"), "x/web", true),
            ("x/web-0", Some("Deployment"), "x/web", false),
            ("x/agent-x2x8k", Some("DaemonSet"), "x/agent", true),
            ("x/agent-x2x8", Some("DaemonSet"), "x/agent", false),
            ("x/backup-29012345-x2x8k", Some("CronJob"), "x/backup", true),
            ("x/web", None, "x/web", false),
            ("x/web-", None, "x/web", false),
        ] {
            assert_eq!(is_name_of_pod_of(pod, kind, workload), expected, "{pod} of {kind:?} {workload}");
        }
    }
}
