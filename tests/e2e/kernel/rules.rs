//! Rules for nftables that do what kube-proxy's do, and the node's kernel as it forwards by them.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use weir_nat::{Endpoint, Model, ServicePort, TrafficPolicy};
use weir_packet::Protocol;

use super::{cluster::NODE, family::Family};
use crate::site::Site;

/// The mark of connections to be masqueraded.
const MASQUERADE: &str = "0x4000";

/// The backends of a service that the rules may pick from: ready ones, or else those that still serve; of ready ones those that hints
/// keep for this node, or else for its zone.
fn backends(model: &Model, service: &ServicePort, policy: TrafficPolicy) -> Vec<(IpAddr, u16)> {
    let is_cluster = policy == TrafficPolicy::Cluster;
    let is_local = |one: &Endpoint| one.node_name() == Some(&*model.node_name);
    let listed = || service.endpoints.iter().filter(|one| is_cluster || is_local(one));
    let mut picked: Vec<&Endpoint> = listed().filter(|one| one.ready).collect();
    if picked.is_empty() {
        picked = listed().filter(|one| one.serving && one.terminating).collect();
    } else if is_cluster {
        let hinted = |hints: fn(&Endpoint) -> &[Arc<str>], own: Option<&String>| -> Option<Vec<&Endpoint>> {
            let of_own = picked
                .iter()
                .copied()
                .filter(|one| own.is_some_and(|own| hints(one).iter().any(|hint| **hint == **own)));
            let of_own: Vec<&Endpoint> = of_own.collect();
            (picked.iter().all(|one| !hints(one).is_empty()) && !of_own.is_empty()).then_some(of_own)
        };
        picked = hinted(Endpoint::node_hints, Some(&model.node_name))
            .or_else(|| hinted(Endpoint::zone_hints, model.zone.as_ref()))
            .unwrap_or(picked);
    }
    picked.iter().map(|one| (one.address, one.port)).collect()
}

/// Rules for nftables that do what kube-proxy's are documented to do with these services.
pub fn ruleset(model: &Model, family: Family) -> String {
    let pods: Vec<String> =
        model.pod_cidrs.iter().filter(|net| family.is_of(net.addr())).map(ToString::to_string).collect();
    let pods = format!("{{ {} }}", pods.join(", "));
    let mark = format!("meta mark set meta mark or {MASQUERADE}");
    let (mut chains, mut services, mut node_ports, mut firewall, mut refuse) = Default::default();
    let out = |text: &mut String, line: String| writeln!(text, "    {line}").unwrap();
    let mut cluster_ips = Vec::new();
    for (number, service) in model.services.iter().enumerate() {
        let port = service.port;
        let protocol = if service.protocol == Protocol::UDP { "udp" } else { "tcp" };
        let of = |policy| backends(model, service, policy);
        let (of_cluster, of_node) = (of(TrafficPolicy::Cluster), of(TrafficPolicy::Local));
        // Where nothing local is ready, those of the node need not be among those of the cluster.
        let more = of_node.iter().filter(|one| !of_cluster.contains(one));
        let all: Vec<(IpAddr, u16)> = of_cluster.iter().chain(more).copied().collect();
        // A chain and a set for each backend; the sets hold the clients with affinity.
        for (index, (address, port)) in all.iter().enumerate() {
            out(
                &mut chains,
                format!("set clients_{number}_{index} {{ type ipv4_addr; flags dynamic, timeout; timeout 3h; }}"),
            );
            let affinity = match service.affinity {
                Some(_) => format!("update @clients_{number}_{index} {{ ip saddr }}; "),
                None => String::new(),
            };
            let rules = format!(
                "ip saddr {address} {mark}; {affinity}meta l4proto {protocol} dnat to {};",
                SocketAddr::new(*address, *port)
            );
            out(&mut chains, format!("chain backend_{number}_{index} {{ {rules} }}"));
        }
        let pick = |listed: &[(IpAddr, u16)]| {
            let indices: Vec<usize> = (0..all.len()).filter(|index| listed.contains(&all[*index])).collect();
            let mut rules = String::new();
            if service.affinity.is_some() {
                for index in &indices {
                    write!(rules, "ip saddr @clients_{number}_{index} goto backend_{number}_{index}; ").unwrap();
                }
            }
            let jumps: Vec<String> = indices
                .iter()
                .enumerate()
                .map(|(turn, index)| format!("{turn} : goto backend_{number}_{index}"))
                .collect();
            if !jumps.is_empty() {
                write!(rules, "numgen random mod {} vmap {{ {} }};", jumps.len(), jumps.join(", ")).unwrap();
            }
            rules
        };
        let (cluster, local) = (pick(&of_cluster), pick(&of_node));
        out(&mut chains, format!("chain cluster_{number} {{ {cluster} }}"));
        out(&mut chains, format!("chain local_{number} {{ {local} }}"));
        let list = |policy| if policy == TrafficPolicy::Local { "local" } else { "cluster" };
        let internal = if model.masquerade_all { mark.clone() } else { format!("ip saddr != {pods} {mark}") };
        out(
            &mut chains,
            format!("chain internal_{number} {{ {internal}; goto {}_{number}; }}", list(service.internal_policy)),
        );
        let external = match service.external_policy {
            TrafficPolicy::Cluster => format!("{mark}; goto cluster_{number};"),
            TrafficPolicy::Local => format!(
                "ip saddr {pods} goto cluster_{number}; fib saddr type local {mark}; \
                 fib saddr type local goto cluster_{number}; goto local_{number};"
            ),
        };
        out(&mut chains, format!("chain external_{number} {{ {external} }}"));

        let mut addresses = Vec::new();
        for address in &service.cluster_ips {
            cluster_ips.push(address.to_string());
            addresses.push((format!("ip daddr {address} {protocol} dport {port}"), "internal"));
        }
        for address in service.external_ips.iter().chain(&service.load_balancer_ips) {
            addresses.push((format!("ip daddr {address} {protocol} dport {port}"), "external"));
        }
        for address in service.load_balancer_ips.iter().filter(|_| !service.source_ranges.is_empty()) {
            let ranges: Vec<String> = service.source_ranges.iter().map(ToString::to_string).collect();
            let ranges = ranges.join(", ");
            out(&mut firewall, format!("ip daddr {address} {protocol} dport {port} ip saddr != {{ {ranges} }} drop"));
        }
        let node_port = service.node_port.expect("all of this test's have one");
        let at_node = format!("fib daddr type local ip daddr != 127.0.0.0/8 {protocol} dport {node_port}");
        for (to, chain) in &addresses {
            out(&mut services, format!("{to} goto {chain}_{number}"));
        }
        out(&mut node_ports, format!("{at_node} goto external_{number}"));
        addresses.push((at_node, "external"));
        // Without a backend: refused. With policy Local and none here: dropped, short cuts excepted.
        for (to, kind) in &addresses {
            let policy = if *kind == "internal" { service.internal_policy } else { service.external_policy };
            match (all.is_empty(), policy == TrafficPolicy::Local && of_node.is_empty()) {
                (true, _) => out(&mut refuse, format!("{to} reject")),
                (false, true) if *kind == "internal" => out(&mut refuse, format!("{to} drop")),
                (false, true) => out(&mut refuse, format!("{to} ip saddr != {pods} fib saddr type != local drop")),
                (false, false) => {}
            }
        }
    }
    out(&mut refuse, format!("ip daddr {{ {} }} reject", cluster_ips.join(", ")));
    for net in model.service_cidrs.iter().filter(|net| family.is_of(net.addr())) {
        out(&mut refuse, format!("ip daddr {net} drop"));
    }
    let hook = |name: &str, kind: &str, hook: &str, priority: i32, rules: &str| {
        format!("  chain {name} {{\n    type {kind} hook {hook} priority {priority};\n{rules}  }}\n")
    };
    let check = "    ct state new jump refuse\n";
    let guard = "    ct state new jump firewall\n";
    let translate = "    jump services\n    jump node_ports\n";
    let masquerade = format!("    meta mark and {MASQUERADE} == {MASQUERADE} masquerade\n");
    let rules = [
        "table ip kube {\n".to_owned(),
        chains,
        format!("  chain services {{\n{services}  }}\n  chain node_ports {{\n{node_ports}  }}\n"),
        format!("  chain firewall {{\n{firewall}  }}\n  chain refuse {{\n{refuse}  }}\n"),
        hook("guard_in", "filter", "prerouting", -110, guard),
        hook("guard_out", "filter", "output", -110, guard),
        hook("translate_in", "nat", "prerouting", -100, translate),
        hook("translate_out", "nat", "output", -100, translate),
        hook("check_in", "filter", "input", 0, check),
        hook("check_forward", "filter", "forward", 0, check),
        hook("check_out", "filter", "output", 0, check),
        hook("masquerade_out", "nat", "postrouting", 100, &masquerade),
        "}\n".to_owned(),
    ]
    .concat();
    let carried = [
        ("ip saddr", "ip6 saddr"),
        ("ip daddr", "ip6 daddr"),
        ("table ip ", "table ip6 "),
        ("ipv4_addr", "ipv6_addr"),
        ("127.0.0.0/8", "::1/128"),
    ];
    match family {
        Family::V4 => rules,
        Family::V6 => carried.iter().fold(rules, |rules, (v4, v6)| rules.replace(v4, v6)),
    }
}

/// Makes the node's kernel forward by these rules, or takes them away again.
pub fn kernel_rules(site: &Site, family: Family, rules: Option<&str>) {
    let (verb, one) = if rules.is_some() { ("add", "1") } else { ("del", "0") };
    let set = |key: &str, value: &str| {
        site.lab.run_in(NODE, &["sysctl", "-q", "-w", &format!("net.{key}={value}")]).unwrap();
    };
    set(if family == Family::V4 { "ipv4.ip_forward" } else { "ipv6.conf.all.forwarding" }, one);
    set("ipv4.conf.all.rp_filter", "0");
    // Its own limit of errors is smaller than the number of datagrams that are refused here.
    set("ipv4.icmp_ratelimit", "0");
    set("ipv6.icmp.ratelimit", "0");
    for workload in site.cluster.workloads.iter().filter(|one| one.node.as_deref() == Some(&site.cluster.node_name)) {
        let device = &workload.device;
        set(&format!("ipv4.conf.{device}.rp_filter"), "0");
        set(&format!("ipv4.conf.{device}.proxy_arp"), one);
        // An answer at once, not after a random while.
        set(&format!("ipv4.neigh.{device}.proxy_delay"), "0");
        site.lab.ip(NODE, &format!("route {verb} {}/{} dev {device}", workload.addresses[0], family.whole())).unwrap();
    }
    site.lab
        .ip(NODE, &format!("route {verb} {} via {}", family.net("10.1.2.0"), family.address("192.168.10.2")))
        .unwrap();
    match rules {
        Some(rules) => {
            let file = site.write("kube.nft", rules);
            site.lab.run_in(NODE, &["nft", "-f", &file.display().to_string()]).unwrap();
        }
        None => drop(site.lab.run_in(NODE, &["nft", "flush", "ruleset"]).unwrap()),
    }
}
