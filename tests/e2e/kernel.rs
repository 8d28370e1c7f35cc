//! The same flows through weir, and through the kernel with nftables rules like kube-proxy's for the same objects: same outcome.
//!
//! One node with local pods, another host that stands for a node with a pod, a client outside. What a socket can see is compared: which
//! backends answer, whom they see, what is refused, what gets no answer.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    thread,
};

use serde_json::{Value, json};
use weir::translate;
use weir_nat::{Model, ServicePort, TrafficPolicy};

use crate::{
    manifests::Manifests,
    site::{DEADLINE, NO_ANSWER_SECONDS, NodePlan, Site},
};

/// Connections of one flow: enough to meet each of three backends but once in millions of runs.
const TRIES: u32 = 40;
/// The mark of connections to be masqueraded.
const MASQUERADE: &str = "0x4000";

/// Where a flow comes from.
const POD: &str = "default/client";
const OUTSIDE: &str = "client";
const NODE: &str = "node-a";
/// The only local backend of its service.
const BACKEND: &str = "default/web-1";

/// Name and address of the backends, with the node that they are on.
const WEB_1: (&str, &str) = ("10.1.1.21", "node-a");
const WEB_2: (&str, &str) = ("10.1.1.22", "node-a");
const REMOTE: (&str, &str) = ("10.1.2.50", "node-b");

/// The family of a run; addresses are written as IPv4 ones and carried over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

/// Prefixes of addresses, in both families.
const CARRIED: [(&str, &str); 7] = [
    ("10.1.1.", "fd00:1:1::"),
    ("10.1.2.", "fd00:1:2::"),
    ("10.96.0.", "fd00:96::"),
    ("192.168.10.", "fd00:10::"),
    ("198.51.100.", "2001:db8:198::"),
    ("203.0.113.", "2001:db8:203::"),
    ("192.0.2.", "2001:db8:192::"),
];

impl Family {
    /// An address.
    fn address(self, text: &str) -> String {
        let carry = |(v4, v6): &(&str, &str)| Some(format!("{v6}{}", text.strip_prefix(v4)?));
        match self {
            Self::V4 => text.to_owned(),
            Self::V6 => CARRIED.iter().find_map(carry).expect("a known prefix"),
        }
    }

    /// The network of the last byte of an address that ends in 0.
    fn net(self, text: &str) -> String {
        match self {
            Self::V4 => format!("{text}/24"),
            Self::V6 => format!("{}/64", self.address(text).strip_suffix('0').expect("a network")),
        }
    }

    /// The length of a prefix that is one address.
    fn whole(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    fn is_of(self, address: IpAddr) -> bool {
        address.is_ipv6() == (self == Self::V6)
    }
}

/// What a flow comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Answered,
    /// Always by the same backend, whichever that is.
    Sticky,
    Refused,
    Dropped,
}

use Kind::{Answered, Dropped, Refused, Sticky};

/// What was seen of a flow.
#[derive(PartialEq, Eq, Debug)]
enum Outcome {
    /// Who answered, and whom they saw.
    Answered(BTreeSet<(String, String)>),
    /// One backend answered all, and saw this.
    Sticky(String),
    Refused,
    Dropped,
}

/// From where, to which address and port, and what the rules say.
const FLOWS: [(&str, &str, Kind); 49] = [
    // All kinds of addresses, policy Cluster.
    (POD, "10.96.0.1:80", Answered),
    (OUTSIDE, "10.96.0.1:80", Answered),
    (NODE, "10.96.0.1:80", Answered),
    (POD, "198.51.100.1:80", Answered),
    (OUTSIDE, "198.51.100.1:80", Answered),
    (NODE, "198.51.100.1:80", Answered),
    (POD, "203.0.113.1:80", Dropped),
    (OUTSIDE, "203.0.113.1:80", Answered),
    (NODE, "203.0.113.1:80", Answered),
    (POD, "192.168.10.1:31501", Answered),
    (OUTSIDE, "192.168.10.1:31501", Answered),
    (BACKEND, "10.96.0.1:80", Answered),
    (BACKEND, "198.51.100.1:80", Answered),
    (BACKEND, "192.168.10.1:31501", Answered),
    // externalTrafficPolicy Local.
    (POD, "10.96.0.2:80", Answered),
    (OUTSIDE, "10.96.0.2:80", Answered),
    (NODE, "10.96.0.2:80", Answered),
    (POD, "198.51.100.2:80", Answered),
    (OUTSIDE, "198.51.100.2:80", Answered),
    (NODE, "198.51.100.2:80", Answered),
    (POD, "203.0.113.2:80", Dropped),
    (OUTSIDE, "203.0.113.2:80", Dropped),
    (POD, "192.168.10.1:31502", Answered),
    (OUTSIDE, "192.168.10.1:31502", Answered),
    (BACKEND, "192.168.10.1:31502", Answered),
    // internalTrafficPolicy Local.
    (POD, "10.96.0.3:80", Answered),
    (OUTSIDE, "10.96.0.3:80", Answered),
    (NODE, "10.96.0.3:80", Answered),
    // Both Local, and no backend here.
    (POD, "10.96.0.4:80", Dropped),
    (OUTSIDE, "10.96.0.4:80", Dropped),
    (POD, "192.168.10.1:31504", Answered),
    (OUTSIDE, "192.168.10.1:31504", Dropped),
    (OUTSIDE, "198.51.100.4:80", Dropped),
    (NODE, "198.51.100.4:80", Answered),
    // No backend at all.
    (POD, "10.96.0.5:80", Refused),
    (OUTSIDE, "10.96.0.5:80", Refused),
    (NODE, "10.96.0.5:80", Refused),
    (POD, "198.51.100.5:80", Refused),
    (OUTSIDE, "198.51.100.5:80", Refused),
    (OUTSIDE, "192.168.10.1:31505", Refused),
    // ClientIP affinity, also across kinds of addresses.
    (POD, "10.96.0.7:80", Sticky),
    (OUTSIDE, "10.96.0.7:80", Sticky),
    (OUTSIDE, "192.168.10.1:31507", Sticky),
    (NODE, "10.96.0.7:80", Sticky),
    // Hairpin, unpublished ports, addresses that no service has.
    (BACKEND, "10.96.0.6:80", Answered),
    (POD, "10.96.0.1:81", Refused),
    (OUTSIDE, "10.96.0.1:81", Refused),
    (POD, "10.96.0.99:80", Dropped),
    (OUTSIDE, "10.96.0.99:80", Dropped),
];

/// A service on port 80 of 10.96.0.`number`, its backends' 8080, with more of its spec.
fn service(
    family: Family,
    manifests: &mut Manifests,
    number: u8,
    more: Value,
    ranges: Option<&str>,
    backends: &[(&str, &str)],
) {
    let name = format!("service-{number}");
    let address = family.address(&format!("10.96.0.{number}"));
    let mut spec = json!({
        "type": "LoadBalancer", "clusterIP": address, "clusterIPs": [address],
        "externalIPs": [family.address(&format!("198.51.100.{number}"))],
        "ports": [{"port": 80, "targetPort": 8080, "nodePort": 31500 + u16::from(number)}],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    let mut status = json!({});
    if let Some(ranges) = ranges {
        spec["loadBalancerSourceRanges"] = json!([family.net(ranges)]);
        status["loadBalancer"] = json!({"ingress": [{"ip": family.address(&format!("203.0.113.{number}"))}]});
    }
    let metadata = json!({"namespace": "default", "name": name});
    manifests.add(json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": status}));
    let endpoint = |(address, node): &(&str, &str)| json!({"addresses": [family.address(address)], "nodeName": node});
    let endpoints: Vec<Value> = backends.iter().map(endpoint).collect();
    manifests.add(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": if family == Family::V4 { "IPv4" } else { "IPv6" },
        "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": name}},
        "endpoints": endpoints, "ports": [{"port": 8080}],
    }));
}

fn site(family: Family) -> Site {
    let mut manifests = Manifests::cluster("Never");
    manifests.pod("node-a", POD, "client", &[&family.address("10.1.1.10")]);
    manifests.pod("node-a", BACKEND, "web", &[&family.address(WEB_1.0)]);
    manifests.pod("node-a", "default/web-2", "web", &[&family.address(WEB_2.0)]);
    let (external, internal) = (json!({"externalTrafficPolicy": "Local"}), json!({"internalTrafficPolicy": "Local"}));
    let both = json!({"externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local"});
    service(family, &mut manifests, 1, json!({}), Some("192.168.10.0"), &[WEB_1, WEB_2, REMOTE]);
    service(family, &mut manifests, 2, external, Some("192.0.2.0"), &[WEB_1, REMOTE]);
    service(family, &mut manifests, 3, internal, None, &[WEB_2, REMOTE]);
    service(family, &mut manifests, 4, both, None, &[REMOTE]);
    service(family, &mut manifests, 5, json!({}), None, &[]);
    service(family, &mut manifests, 6, json!({}), None, &[WEB_1]);
    service(family, &mut manifests, 7, json!({"sessionAffinity": "ClientIP"}), None, &[WEB_1, WEB_2, REMOTE]);
    let node = NodePlan::new("node-a", &["192.168.10.1/24", "fd00:10::1/64"], &[0]);
    let mut site = Site::build(&[node], &manifests.text(), "");
    // The other node is a host that has its pod's address itself.
    let pod = format!("{}/{}", family.address(REMOTE.0), family.whole());
    site.lab.add_host("remote", &["192.168.10.2/24".into(), "fd00:10::2/64".into(), pod], 1).unwrap();
    let (node, client) = (family.address("192.168.10.1"), family.address("192.168.10.100"));
    site.lab.ip("remote", &format!("route add {} via {node}", family.net("10.1.1.0"))).unwrap();
    for net in ["10.96.0.0", "198.51.100.0", "203.0.113.0"] {
        site.lab.ip(OUTSIDE, &format!("route add {} via {node}", family.net(net))).unwrap();
    }
    // The node must have a way to hand these to its output rules; on a real one that is its default route.
    site.lab.ip(NODE, &format!("route add default via {client}")).unwrap();
    for server in [BACKEND, "default/web-2", "remote"] {
        site.serve(server, &[8080]);
    }
    site
}

/// What every flow comes to. A flow that is not to be answered is waited for a second only.
fn outcomes(site: &Site, family: Family) -> Vec<Outcome> {
    let flow = |(from, to, kind): &(&str, &str, Kind)| {
        let limit = if *kind == Dropped { NO_ANSWER_SECONDS } else { DEADLINE.as_secs_f32() }.to_string();
        let (address, port) = to.split_once(':').expect("address and port");
        let to = SocketAddr::new(family.address(address).parse().unwrap(), port.parse().unwrap());
        let url = format!("http://{to}/?[1-{}]", if matches!(kind, Answered | Sticky) { TRIES } else { 1 });
        let output = site.lab.output_in(from, &["curl", "-sS", "--fail", "--max-time", &limit, &url]).unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        match output.status.code() {
            Some(7) => Outcome::Refused,
            Some(28) => Outcome::Dropped,
            Some(0) => {
                let line =
                    |line: &str| line.split_once(' ').map(|(pod, seen)| (pod.to_owned(), seen.trim().to_owned()));
                let seen: BTreeSet<(String, String)> =
                    text.lines().map(|text| line(text).expect("an answer")).collect();
                match (kind, seen.len()) {
                    (Sticky, 1) => Outcome::Sticky(seen.into_iter().next().expect("one").1),
                    _ => Outcome::Answered(seen),
                }
            }
            code => panic!("{from} to {to}: {code:?} {}", String::from_utf8_lossy(&output.stderr)),
        }
    };
    // What waits in vain waits together.
    thread::scope(|scope| {
        let waiting: Vec<_> = FLOWS.iter().map(|one| (one.2 == Dropped).then(|| scope.spawn(|| flow(one)))).collect();
        let each = FLOWS.iter().zip(waiting).map(|(one, waiting)| match waiting {
            Some(waiting) => waiting.join().expect("it is asked to its end"),
            None => flow(one),
        });
        each.collect()
    })
}

/// The backends of a service that the rules may pick from; all of this test's are ready.
fn backends(model: &Model, service: &ServicePort, policy: TrafficPolicy) -> Vec<(IpAddr, u16)> {
    let is_local = |node: &Option<String>| node.as_ref() == Some(&model.node_name);
    let wanted = service.endpoints.iter().filter(|one| policy == TrafficPolicy::Cluster || is_local(&one.node_name));
    wanted.map(|one| (one.address, one.port)).collect()
}

/// Rules for nftables that do what kube-proxy's are documented to do with these services.
fn ruleset(model: &Model, family: Family) -> String {
    let pods: Vec<String> =
        model.pod_cidrs.iter().filter(|net| family.is_of(net.addr())).map(ToString::to_string).collect();
    let pods = format!("{{ {} }}", pods.join(", "));
    let mark = format!("meta mark set meta mark or {MASQUERADE}");
    let (mut chains, mut services, mut node_ports, mut firewall, mut refuse) = Default::default();
    let out = |text: &mut String, line: String| writeln!(text, "    {line}").unwrap();
    let mut cluster_ips = Vec::new();
    for (number, service) in model.services.iter().enumerate() {
        let port = service.port;
        let all = backends(model, service, TrafficPolicy::Cluster);
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
                "ip saddr {address} {mark}; {affinity}meta l4proto tcp dnat to {};",
                SocketAddr::new(*address, *port)
            );
            out(&mut chains, format!("chain backend_{number}_{index} {{ {rules} }}"));
        }
        let pick = |policy: TrafficPolicy| {
            let listed = backends(model, service, policy);
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
        let (cluster, local) = (pick(TrafficPolicy::Cluster), pick(TrafficPolicy::Local));
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
            addresses.push((format!("ip daddr {address} tcp dport {port}"), "internal"));
        }
        for address in service.external_ips.iter().chain(&service.load_balancer_ips) {
            addresses.push((format!("ip daddr {address} tcp dport {port}"), "external"));
        }
        for address in service.load_balancer_ips.iter().filter(|_| !service.source_ranges.is_empty()) {
            let ranges: Vec<String> = service.source_ranges.iter().map(ToString::to_string).collect();
            let ranges = ranges.join(", ");
            out(&mut firewall, format!("ip daddr {address} tcp dport {port} ip saddr != {{ {ranges} }} drop"));
        }
        let node_port = service.node_port.expect("all of this test's have one");
        let at_node = format!("fib daddr type local ip daddr != 127.0.0.0/8 tcp dport {node_port}");
        for (to, chain) in &addresses {
            out(&mut services, format!("{to} goto {chain}_{number}"));
        }
        out(&mut node_ports, format!("{at_node} goto external_{number}"));
        addresses.push((at_node, "external"));
        // Without a backend: refused. With policy Local and none here: dropped, short cuts excepted.
        let has_local = !backends(model, service, TrafficPolicy::Local).is_empty();
        for (to, kind) in &addresses {
            let policy = if *kind == "internal" { service.internal_policy } else { service.external_policy };
            match (all.is_empty(), policy == TrafficPolicy::Local && !has_local) {
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
fn kernel_rules(site: &Site, family: Family, rules: Option<&str>) {
    let (verb, one) = if rules.is_some() { ("add", "1") } else { ("del", "0") };
    let set = |key: &str, value: &str| {
        site.lab.run_in(NODE, &["sysctl", "-q", "-w", &format!("net.{key}={value}")]).unwrap();
    };
    set(if family == Family::V4 { "ipv4.ip_forward" } else { "ipv6.conf.all.forwarding" }, one);
    set("ipv4.conf.all.rp_filter", "0");
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

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn flows_over_ipv4_come_to_the_same_as_with_the_kernel_and_kube_proxys_rules() {
    compare(Family::V4);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn flows_over_ipv6_come_to_the_same_as_with_the_kernel_and_kube_proxys_rules() {
    compare(Family::V6);
}

fn compare(family: Family) {
    let mut site = site(family);
    let loaded = translate::load(site.config(NODE)).unwrap_or_else(|problems| panic!("{}", problems.render(false)));
    kernel_rules(&site, family, Some(&ruleset(&loaded.services, family)));
    let kernel = outcomes(&site, family);
    kernel_rules(&site, family, None);
    site.start_all();
    let weir = outcomes(&site, family);
    let mut differences = String::new();
    for ((flow, kernel), weir) in FLOWS.iter().zip(&kernel).zip(&weir) {
        let is_expected = match flow.2 {
            Answered => matches!(kernel, Outcome::Answered(_)),
            Sticky => matches!(kernel, Outcome::Sticky(_)),
            Refused => *kernel == Outcome::Refused,
            Dropped => *kernel == Outcome::Dropped,
        };
        if kernel != weir || !is_expected {
            writeln!(differences, "{flow:?}\n  kernel {kernel:?}\n  weir   {weir:?}").unwrap();
        }
    }
    assert!(differences.is_empty(), "{differences}");
    site.finish();
}
