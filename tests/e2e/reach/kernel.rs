//! The nodes' kernels as they forward by kube-proxy's rules and a port-mapping plugin's, without weir.

use std::fmt::Write as _;

use weir_cluster::translate;
use weir_nat::{Model, ServicePort};

use super::{
    FAMILIES,
    cluster::{Backend, HOST_PORT, NODE_A, NODE_B, SERVED},
};
use crate::{
    kernel::{family::Family, rules::ruleset},
    site::Site,
};

/// What a model has in a family, without host ports.
fn of_family(model: &Model, family: Family) -> Model {
    let of = |service: &ServicePort| {
        let mut service = service.clone();
        for addresses in [&mut service.cluster_ips, &mut service.external_ips, &mut service.load_balancer_ips] {
            addresses.retain(|address| family.is_of(*address));
        }
        service.endpoints.retain(|endpoint| family.is_of(endpoint.address));
        service.into()
    };
    let services = model.services.iter().filter(|service| service.host_port.is_none()).map(|service| of(service));
    Model { services: services.collect(), ..model.clone() }
}

/// Rules for the host port of a node's pod, as a port-mapping plugin has them: translated where it is asked, masqueraded for the pod itself.
fn host_port_rules(family: Family, pod: Backend) -> String {
    let (ip, loopback) = if family == Family::V4 { ("ip", "127.0.0.0/8") } else { ("ip6", "::1/128") };
    let (address, target) = (family.address(pod.address()), family.socket(pod.address(), SERVED));
    let mut rules = format!("table {ip} ports {{\n");
    for (chain, hook) in [("in", "prerouting"), ("out", "output")] {
        writeln!(rules, "  chain {chain} {{ type nat hook {hook} priority -90;").unwrap();
        for protocol in ["tcp", "udp"] {
            let asked = format!("fib daddr type local {ip} daddr != {loopback} {protocol} dport {HOST_PORT}");
            writeln!(rules, "    {asked} {ip} saddr {address} meta mark set meta mark or 0x2000").unwrap();
            writeln!(rules, "    {asked} dnat to {target}").unwrap();
        }
        rules.push_str("  }\n");
    }
    rules + "  chain after { type nat hook postrouting priority 90; meta mark and 0x2000 == 0x2000 masquerade; }\n}\n"
}

/// Makes the nodes' kernels forward, or takes that away again.
pub fn forwards(site: &Site, does: bool) {
    let (verb, one) = if does { ("add", "1") } else { ("del", "0") };
    for (node, pod, other) in [("node-a", Backend::PodHere, NODE_B), ("node-b", Backend::PodThere, NODE_A)] {
        let set = |key: &str, value: &str| {
            site.lab.run_in(node, &["sysctl", "-q", "-w", &format!("net.{key}={value}")]).unwrap();
        };
        // Its own limit of errors is smaller than the number of datagrams that are refused here.
        set("ipv4.icmp_ratelimit", "0");
        set("ipv6.icmp.ratelimit", "0");
        let full = site.lab.node_name(node);
        let far = if node == "node-a" { "10.1.2.0" } else { "10.1.1.0" };
        for workload in site.cluster.workloads.iter().filter(|one| one.node.as_deref() == Some(&full)) {
            let device = &workload.device;
            set(&format!("ipv4.conf.{device}.proxy_arp"), one);
            // An answer at once, not after a random while.
            set(&format!("ipv4.neigh.{device}.proxy_delay"), "0");
            for address in &workload.addresses {
                site.lab.ip(node, &format!("route {verb} {address} dev {device}")).unwrap();
            }
        }
        for family in FAMILIES {
            site.lab.ip(node, &format!("route {verb} {} via {}", family.net(far), family.address(other))).unwrap();
        }
        if does {
            let loaded = translate::load_strictly(site.config(node))
                .unwrap_or_else(|problems| panic!("{}", problems.render(false)));
            let mut rules = String::new();
            for family in FAMILIES {
                rules += &ruleset(&of_family(&loaded.services, family), family);
                rules += &host_port_rules(family, pod);
            }
            let file = site.write(&format!("{node}.nft"), &rules);
            site.lab.run_in(node, &["nft", "-f", &file.display().to_string()]).unwrap();
        } else {
            site.lab.run_in(node, &["nft", "flush", "ruleset"]).unwrap();
        }
    }
}
