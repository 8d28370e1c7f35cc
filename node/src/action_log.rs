//! The line that a rule with the action Log writes for a new connection (docs/OPERATIONS.md, "Rules that log").

use tracing::info;
use weir_dataplane::action_log::Logged;
use weir_policy::RuleOrigin;

/// Writes the line.
pub fn write(Logged { entry, rules, suppressed }: &Logged) {
    let policy = &rules.policy;
    let (name, number) = match policy.describe(entry.rule) {
        RuleOrigin::Policy { name, rule, .. } => (name.to_owned(), Some(rule)),
        RuleOrigin::Profile { name, rule, .. } => (format!("profile {name}"), rule),
        other => (other.to_string(), None),
    };
    let verdict = match entry.judgement {
        Some(judgement) if judgement.allow => "allow",
        Some(_) => "deny",
        None => "none",
    };
    let (source_port, destination_port) = (entry.ports.source(), entry.ports.destination());
    let ports = entry.protocol.has_ports().then_some((source_port, destination_port));
    let icmp = entry.protocol.is_icmp().then(|| entry.ports.icmp(entry.protocol));
    info!(
        policy = name,
        rule = number,
        direction = entry.direction.name(),
        verdict,
        by = entry.judgement.map(|judgement| policy.rule_name(judgement.rule)),
        endpoint = policy.endpoint_name(entry.endpoint),
        src = %entry.source,
        dst = %entry.destination,
        proto = %entry.protocol,
        sport = ports.map(|(source, _)| source),
        dport = ports.map(|(_, destination)| destination),
        icmp_type = icmp.map(|(icmp_type, _)| icmp_type),
        icmp_code = icmp.map(|(_, code)| code),
        suppressed = (*suppressed > 0).then_some(*suppressed),
        "connection logged"
    );
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Write},
        net::Ipv4Addr,
        sync::{Arc, Mutex},
    };

    use weir_dataplane::action_log::Entry;
    use weir_packet::{FlowKey, Ports, Protocol};
    use weir_policy::PolicyDirection;

    use super::*;
    use weir_cluster::{compile, translate};

    const CLUSTER: &str = "
apiVersion: v1
kind: Node
metadata: {name: node-a}
spec: {podCIDRs: [10.1.1.0/24]}
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: web}
spec: {nodeName: node-a}
status: {podIP: 10.1.1.21}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: watch}
spec: {selector: all(), types: [Ingress], ingress: [{action: Log}, {action: Deny}]}
";

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_names_the_rule_the_verdict_and_the_connection() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("weir.yaml");
        std::fs::write(&config, "nodeName: node-a\nmanifests: [cluster.yaml]\n").unwrap();
        std::fs::write(folder.path().join("cluster.yaml"), CLUSTER).unwrap();
        let loaded = translate::load_strictly(&config).unwrap_or_else(|problems| panic!("{}", problems.render(false)));
        let rules = Arc::new(compile::Compilers::default().rules(&loaded).unwrap());
        let (endpoint, direction) = (rules.policy.endpoint("shop/web").unwrap(), PolicyDirection::Ingress);
        let [src, dst] = [[10, 1, 1, 9], [10, 1, 1, 21]].map(Ipv4Addr::from);
        let line = |protocol, ports, suppressed| {
            let key = FlowKey { src, dst, ports, protocol };
            let entry = Entry {
                rule: rules.policy.logged(endpoint, direction, &key)[0],
                endpoint,
                direction,
                judgement: Some(rules.policy.judge(endpoint, direction, &key)),
                source: src.into(),
                destination: dst.into(),
                protocol,
                ports,
            };
            let written = Written::default();
            let writer = written.clone();
            let subscriber = tracing_subscriber::fmt()
                .with_writer(move || writer.clone())
                .with_ansi(false)
                .with_target(false)
                .without_time()
                .finish();
            tracing::subscriber::with_default(subscriber, || {
                write(&Logged { entry, rules: Arc::clone(&rules), suppressed });
            });
            let bytes = written.0.lock().unwrap().clone();
            String::from_utf8(bytes).unwrap()
        };
        let begin = " INFO connection logged policy=\"GlobalNetworkPolicy/watch\" rule=1 direction=\"ingress\" verdict=\"deny\" \
                     by=\"GlobalNetworkPolicy/watch rule 2\" endpoint=\"shop/web\" src=10.1.1.9 dst=10.1.1.21";
        assert_eq!(
            line(Protocol::TCP, Ports::new(4000, 80), 7),
            format!("{begin} proto=tcp sport=4000 dport=80 suppressed=7\n")
        );
        assert_eq!(line(Protocol::ICMP, Ports::new(99, 8), 0), format!("{begin} proto=icmp icmp_type=8 icmp_code=0\n"));
    }
}
