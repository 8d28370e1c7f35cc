//! `weir verify`: two configurations of the same objects beside each other, the one that came about change by change and one made from nothing.
//!
//! They are compared as they print, one object after the other, so that whatever is another is found, and named. Only the numbers of objects are
//! left out, as these depend on what came before.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    sync::Arc,
};

use weir_dataplane::{
    model::{Cluster, Node, Workload},
    snapshot::Rules,
};
use weir_nat::{Model as Services, SnatPorts};
use weir_packet::{FlowKey, Ports};
use weir_policy::model::{Model as Policy, Policy as OnePolicy, Tier};

/// Characters that are shown of what is in force, and of what it should be.
const SHOWN: usize = 200;

/// Something in force that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// What part of weir has it: "cluster", "services", "policy", ...
    pub part: &'static str,
    /// Which object or entry.
    pub object: String,
    /// What is in force, shortened; empty where nothing is.
    pub in_force: String,
    /// What should be, shortened; empty where nothing should.
    pub wanted: String,
}

impl Difference {
    /// One in that part.
    pub fn new(part: &'static str, object: impl Into<String>, in_force: &str, wanted: &str) -> Self {
        // Where both begin alike, what follows is of interest.
        let chars = in_force.chars().zip(wanted.chars());
        let same = chars.take_while(|(one, other)| one == other).count().saturating_sub(SHOWN / 4);
        let short = |text: &str| {
            let mut shown: String = text.chars().skip(same).take(SHOWN).collect();
            if same > 0 && !shown.is_empty() {
                shown.insert(0, '…');
            }
            shown
        };
        Self { part, object: object.into(), in_force: short(in_force), wanted: short(wanted) }
    }
}

/// What is compared of a configuration.
#[derive(Clone, Copy)]
pub struct Whole<'w> {
    /// What forwarding is compiled from.
    pub cluster: &'w Cluster,
    /// What service NAT is compiled from.
    pub services: &'w Services,
    /// What policy is compiled from.
    pub policy: &'w Policy,
    /// Services and policy, compiled.
    pub rules: &'w Rules,
    /// Source ports.
    pub snat: &'w SnatPorts,
}

/// Everything of one kind, by name. Several may share a name.
type ByName<'w, T> = BTreeMap<String, Vec<&'w T>>;

fn by_name<'w, T>(all: impl Iterator<Item = &'w T>, name: impl Fn(&T) -> String) -> ByName<'w, T> {
    let mut found = ByName::new();
    all.for_each(|one| found.entry(name(one)).or_default().push(one));
    found
}

/// Compares things of one kind, each as `print` has it.
fn compare<T>(
    part: &'static str,
    kind: &str,
    (in_force, wanted): (&ByName<'_, T>, &ByName<'_, T>),
    print: impl Fn(&T) -> String,
    found: &mut Vec<Difference>,
) {
    let names: BTreeSet<&String> = in_force.keys().chain(wanted.keys()).collect();
    for name in names {
        let printed = |all: &ByName<'_, T>| -> Vec<String> {
            let mut lines: Vec<String> = all.get(name).into_iter().flatten().map(|one| print(one)).collect();
            lines.sort();
            lines
        };
        let same = |one: &&T, other: &&T| std::ptr::eq(*one, *other);
        let (one, other) = (in_force.get(name), wanted.get(name));
        if let (Some(one), Some(other)) = (one, other)
            && one.len() == other.len()
            && one.iter().zip(other).all(|(one, other)| same(one, other))
        {
            continue;
        }
        let (is, should) = (printed(in_force), printed(wanted));
        if is != should {
            found.push(Difference::new(part, format!("{kind} {name}"), &is.join("; "), &should.join("; ")));
        }
    }
}

fn compare_one(part: &'static str, what: &str, is: &impl Debug, should: &impl Debug, found: &mut Vec<Difference>) {
    let (is, should) = (format!("{is:?}"), format!("{should:?}"));
    if is != should {
        found.push(Difference::new(part, what, &is, &should));
    }
}

/// What is in force and not as it should be.
pub fn differences(in_force: &Whole<'_>, wanted: &Whole<'_>) -> Vec<Difference> {
    let mut found = Vec::new();
    of_cluster(in_force.cluster, wanted.cluster, &mut found);
    of_services(in_force.services, wanted.services, &mut found);
    of_policy(in_force.policy, wanted.policy, &mut found);
    // What is compiled of other models is another.
    if found.is_empty() {
        of_tables(in_force, wanted, &mut found);
    }
    compare_one("snat", "ports", &ranges(in_force.snat), &ranges(wanted.snat), &mut found);
    found
}

fn ranges(snat: &SnatPorts) -> Vec<std::ops::RangeInclusive<u16>> {
    snat.ranges().collect()
}

fn of_cluster(is: &Cluster, should: &Cluster, found: &mut Vec<Difference>) {
    if std::ptr::eq(is, should) {
        return;
    }
    let name = |node: &Node| node.name.clone();
    let nodes = (by_name(is.nodes.iter(), name), by_name(should.nodes.iter(), name));
    compare("cluster", "node", (&nodes.0, &nodes.1), |one| format!("{one:?}"), found);
    let name = |workload: &Workload| workload.name.clone();
    let workloads = (by_name(is.workloads.iter(), name), by_name(should.workloads.iter(), name));
    compare("cluster", "workload", (&workloads.0, &workloads.1), |one| format!("{one:?}"), found);
    let rest = |cluster: &Cluster| {
        let Cluster {
            node_name,
            pools,
            pod_cidrs,
            service_cidrs,
            local_addresses,
            host_endpoints,
            host_settings,
            snat_ports,
            nodes: _,
            workloads: _,
        } = cluster;
        format!(
            "{node_name} {pools:?} {pod_cidrs:?} {service_cidrs:?} {local_addresses:?} {host_endpoints:?} {host_settings:?} {snat_ports:?}"
        )
    };
    compare_one("cluster", "settings", &rest(is), &rest(should), found);
}

fn of_services(is: &Services, should: &Services, found: &mut Vec<Difference>) {
    if is.services.is(&should.services) {
        return compare_rest(is, should, found);
    }
    fn ports(model: &Services) -> Vec<&weir_nat::ServicePort> {
        model.services.iter().map(Arc::as_ref).collect()
    }
    let (ports_is, ports_should) = (ports(is), ports(should));
    let name = |port: &weir_nat::ServicePort| format!("{} ({})", port.name, port.protocol);
    let named = (by_name(ports_is.iter().copied(), name), by_name(ports_should.iter().copied(), name));
    let before = found.len();
    let print = |port: &weir_nat::ServicePort| format!("{:?}", weir_nat::ServicePort { origin: 0, ..port.clone() });
    compare("services", "service port", (&named.0, &named.1), print, found);
    if found.len() == before {
        // Of two that claim one frontend, the first is served.
        let order = |ports: &[&weir_nat::ServicePort]| ports.iter().map(|port| name(port)).collect::<Vec<_>>();
        compare_one("services", "order of service ports", &order(&ports_is), &order(&ports_should), found);
    }
    compare_rest(is, should, found);
}

fn compare_rest(is: &Services, should: &Services, found: &mut Vec<Difference>) {
    let rest = |model: &Services| Services { services: weir_nat::ServicePorts::default(), ..model.clone() };
    compare_one("services", "settings", &rest(is), &rest(should), found);
}

fn of_policy(is: &Policy, should: &Policy, found: &mut Vec<Difference>) {
    let name = |end: &weir_policy::model::Endpoint| format!("{:?} {}", end.kind, end.name);
    let named =
        (by_name(is.endpoints.iter().map(Arc::as_ref), name), by_name(should.endpoints.iter().map(Arc::as_ref), name));
    compare("policy", "endpoint", (&named.0, &named.1), |end| format!("{end:?}"), found);
    let named = (
        by_name(is.profiles.iter().map(Arc::as_ref), |profile| profile.name.clone()),
        by_name(should.profiles.iter().map(Arc::as_ref), |profile| profile.name.clone()),
    );
    compare("policy", "profile", (&named.0, &named.1), |profile| format!("{profile:?}"), found);
    let tiers = |model: &Policy| -> BTreeMap<String, String> {
        let bare = model.tiers.iter().map(|tier| Tier { policies: Vec::new(), ..tier.clone() });
        bare.map(|tier| (tier.name.clone(), format!("{tier:?}"))).collect()
    };
    compare_one("policy", "tiers", &tiers(is), &tiers(should), found);
    let policies = |model: &Policy| -> Vec<(String, Arc<OnePolicy>)> {
        let of_tier = |tier: &Tier| {
            let name = tier.name.clone();
            tier.policies.iter().map(move |policy| (name.clone(), Arc::clone(policy))).collect::<Vec<_>>()
        };
        model.tiers.iter().flat_map(of_tier).collect()
    };
    let (all_is, all_should) = (policies(is), policies(should));
    let name = |(tier, policy): &(String, Arc<OnePolicy>)| format!("{} of tier {tier}", policy.name);
    let named = (by_name(all_is.iter(), name), by_name(all_should.iter(), name));
    let print = |(_, policy): &(String, Arc<OnePolicy>)| format!("{:?}", OnePolicy { origin: 0, ..(**policy).clone() });
    compare("policy", "policy", (&named.0, &named.1), print, found);
}

/// Workloads of this node whose compiled policy is tried.
const TRIED_ENDPOINTS: usize = 512;
/// Peers that each is tried with.
const TRIED_PEERS: usize = 64;

/// What is compiled, as far as it can be asked: frontends and backends of services, and what policy says to workloads of this node about some peers.
fn of_tables(is: &Whole<'_>, should: &Whole<'_>, found: &mut Vec<Difference>) {
    let (one, other) = (&is.rules.services, &should.rules.services);
    let addresses = |table: &weir_nat::ServiceTable| table.owned_addresses().collect::<BTreeSet<_>>();
    compare_one("compiled services", "addresses", &addresses(one), &addresses(other), found);
    let ports = |table: &weir_nat::ServiceTable| -> BTreeSet<String> {
        table.node_ports().map(|(protocol, port)| format!("{protocol} {port}")).collect()
    };
    compare_one("compiled services", "node ports", &ports(one), &ports(other), found);
    let own = |table: &weir_nat::ServiceTable| -> BTreeSet<String> {
        table.own_frontends().iter().map(|own| format!("{own:?}")).collect()
    };
    compare_one("compiled services", "ports of the node's own", &own(one), &own(other), found);
    for port in should.services.services.iter() {
        for cluster_ip in &port.cluster_ips {
            for end in port.endpoints.iter().filter(|end| end.address.is_ipv4() == cluster_ip.is_ipv4()) {
                let [is, should] = [one, other].map(|table| {
                    let ports = Ports::new(1024, port.port);
                    match (*cluster_ip, end.address) {
                        (std::net::IpAddr::V4(to), std::net::IpAddr::V4(backend)) => table
                            .services::<std::net::Ipv4Addr>()
                            .standing(&FlowKey { src: to, dst: to, protocol: port.protocol, ports }, backend, end.port),
                        (std::net::IpAddr::V6(to), std::net::IpAddr::V6(backend)) => table
                            .services::<std::net::Ipv6Addr>()
                            .standing(&FlowKey { src: to, dst: to, protocol: port.protocol, ports }, backend, end.port),
                        _ => weir_nat::Standing::Gone,
                    }
                });
                if is != should {
                    let object = format!("{} at {cluster_ip}, backend {} port {}", port.name, end.address, end.port);
                    let [is, should] = [is, should].map(|standing| format!("{standing:?}"));
                    found.push(Difference::new("compiled services", object, &is, &should));
                }
            }
        }
    }
    of_programs(is, should, found);
}

fn of_programs(is: &Whole<'_>, should: &Whole<'_>, found: &mut Vec<Difference>) {
    let peers: Vec<std::net::Ipv4Addr> = should
        .cluster
        .workloads
        .iter()
        .flat_map(|one| &one.addresses)
        .filter_map(|one| match one {
            std::net::IpAddr::V4(address) => Some(*address),
            std::net::IpAddr::V6(_) => None,
        })
        .collect();
    let step = peers.len().div_ceil(TRIED_PEERS).max(1);
    let (one, other) = (&is.rules.policy, &should.rules.policy);
    for (end, name) in other.endpoints().take(TRIED_ENDPOINTS) {
        let Some(same) = one.endpoint(name) else {
            found.push(Difference::new("compiled policy", format!("endpoint {name}"), "", name));
            continue;
        };
        for peer in peers.iter().step_by(step) {
            for direction in [weir_policy::PolicyDirection::Ingress, weir_policy::PolicyDirection::Egress] {
                let key = FlowKey {
                    src: *peer,
                    dst: *peer,
                    protocol: weir_packet::Protocol::TCP,
                    ports: Ports::new(40_000, 80),
                };
                let is = one.judge(same, direction, &key);
                let wanted = other.judge(end, direction, &key);
                let (is, wanted) = (
                    (is.allow, one.describe(is.rule).identity()),
                    (wanted.allow, other.describe(wanted.rule).identity()),
                );
                if is != wanted {
                    let object = format!("{name}, {direction:?} with {peer}");
                    found.push(Difference::new("compiled policy", object, &format!("{is:?}"), &format!("{wanted:?}")));
                }
            }
        }
    }
}
