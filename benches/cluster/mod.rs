//! A cluster as Kubernetes makes them, of any size, for benchmarks of compilation.
//!
//! Pods of ten applications per namespace, each with an IPv4 and an IPv6 address; one in eleven is on this node. Each
//! namespace has the policies that most have (deny by default, name service, monitoring), then policies of its
//! applications: from applications of the same namespace, from other namespaces, to CIDRs with holes, to named ports. A
//! tier above them is the administrator's.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use weir_packet::Protocol;
use weir_policy::{Selector, model::*};

/// Numbers that are the same in every run.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn below(&mut self, limit: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(limit)) as u32
    }
}

pub const APPLICATIONS: u32 = 10;
const NAMESPACE: &str = "projectcalico.org/namespace";
const ORCHESTRATOR: &str = "projectcalico.org/orchestrator";

fn equals(label: &str, value: impl Into<String>) -> Selector {
    Selector::Equals(label.to_owned(), value.into())
}

fn pods_of(namespace: u32) -> Selector {
    Selector::all_of([equals(NAMESPACE, format!("ns{namespace}")), equals(ORCHESTRATOR, "k8s")])
}

fn application(namespace: u32, application: u32) -> Selector {
    Selector::all_of([pods_of(namespace), equals("app", format!("app{application}"))])
}

/// The pod of this number, of an application of its namespace.
pub fn pod(number: u32, namespace: u32, application: u32) -> Arc<Endpoint> {
    let labels = [
        ("app", format!("app{application}")),
        ("tier", ["front", "back", "store"][application as usize % 3].to_owned()),
        ("pod-template-hash", format!("{:x}", (namespace * APPLICATIONS + application) * 2_654_435)),
        (NAMESPACE, format!("ns{namespace}")),
        (ORCHESTRATOR, "k8s".to_owned()),
        ("projectcalico.org/serviceaccount", "default".to_owned()),
        ("pcns.kubernetes.io/metadata.name", format!("ns{namespace}")),
        ("pcns.team", format!("team{}", namespace % 20)),
    ];
    let v4 = Ipv4Addr::from(0x0a80_0000 + number);
    let v6 = Ipv6Addr::from((0xfd00_0080 << 96) + u128::from(number));
    Arc::new(Endpoint {
        name: format!("ns{namespace}/pod{number}"),
        local: number.is_multiple_of(11),
        namespace: Some(format!("ns{namespace}")),
        labels: labels.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<BTreeMap<_, _>>(),
        nets: vec![IpNet::from(std::net::IpAddr::from(v4)), IpNet::from(std::net::IpAddr::from(v6))],
        ports: vec![NamedPort {
            name: "http".to_owned(),
            protocol: Protocol::TCP,
            port: 8080 + (application % 3) as u16,
        }],
        profiles: vec![format!("kns.ns{namespace}")],
        ..Endpoint::default()
    })
}

fn from(peers: Vec<Peer>, protocol: Protocol, port: PortMatch) -> Rule {
    Rule {
        number: 1,
        protocol: Some(protocol),
        source: EntityMatch { any_of: peers, ..EntityMatch::default() },
        destination: EntityMatch { ports: Some(vec![port]), ..EntityMatch::default() },
        ..Rule::default()
    }
}

fn to(peers: Vec<Peer>, protocol: Protocol, port: PortMatch) -> Rule {
    Rule {
        number: 1,
        protocol: Some(protocol),
        destination: EntityMatch { any_of: peers, ports: Some(vec![port]), ..EntityMatch::default() },
        ..Rule::default()
    }
}

fn port(number: u32) -> PortMatch {
    PortMatch::Range(number as u16, number as u16)
}

/// The policy of this number in its namespace.
pub fn policy(numbers: &mut Numbers, namespace: u32, number: u32) -> Arc<Policy> {
    let name = format!("p{number}");
    let base = Policy {
        name: format!("NetworkPolicy/ns{namespace}/{name}"),
        sort_name: format!("knp.default.{name}/ns{namespace}"),
        order: Some(1000.0),
        ..Policy::default()
    };
    let monitoring = || Peer::Selector(equals(NAMESPACE, "ns0"));
    Arc::new(match number {
        0 => Policy { selector: pods_of(namespace), ingress: Some(vec![]), egress: Some(vec![]), ..base },
        1 => {
            let names = vec![Peer::Selector(application(0, 0))];
            let rules = vec![to(names.clone(), Protocol::UDP, port(53)), to(names, Protocol::TCP, port(53))];
            Policy { selector: pods_of(namespace), egress: Some(rules), ..base }
        }
        2 => Policy {
            selector: pods_of(namespace),
            ingress: Some(vec![from(vec![monitoring()], Protocol::TCP, port(9090))]),
            ..base
        },
        _ => {
            let target = application(namespace, number % APPLICATIONS);
            let peer = numbers.below(APPLICATIONS);
            let same = Peer::Selector(application(namespace, peer));
            let other = Peer::Selector(application(numbers.below(200), peer));
            let block = |numbers: &mut Numbers| Peer::Block {
                cidr: IpNet::new(Ipv4Addr::from(0xc000_0000 + (numbers.below(5000) << 12)).into(), 20).unwrap(),
                except: vec![IpNet::new(Ipv4Addr::from(0xc000_0100 + (numbers.below(5000) << 12)).into(), 24).unwrap()],
            };
            let named = PortMatch::Named("http".to_owned());
            let ports = 8000 + numbers.below(50);
            match number % 4 {
                0 => {
                    let rules = vec![
                        from(vec![same], Protocol::TCP, port(ports)),
                        from(vec![other], Protocol::TCP, port(ports)),
                    ];
                    Policy { selector: target, ingress: Some(rules), ..base }
                }
                1 => {
                    let team = equals("pcns.team", format!("team{}", numbers.below(20)));
                    let team = Selector::all_of([equals(ORCHESTRATOR, "k8s"), team]);
                    let rules = vec![
                        from(vec![Peer::Selector(team)], Protocol::TCP, named),
                        from(vec![same], Protocol::TCP, port(ports)),
                    ];
                    Policy { selector: target, ingress: Some(rules), ..base }
                }
                2 => {
                    let rules = vec![
                        to(vec![block(numbers)], Protocol::TCP, port(443)),
                        to(vec![same, other], Protocol::TCP, named),
                    ];
                    Policy { selector: target, egress: Some(rules), ..base }
                }
                _ => {
                    let tier = Selector::all_of([pods_of(namespace), equals("tier", "back")]);
                    let ingress = vec![from(vec![block(numbers)], Protocol::TCP, port(ports))];
                    let egress = vec![
                        to(vec![Peer::Selector(tier)], Protocol::TCP, PortMatch::Range(8000, 8099)),
                        to(vec![Peer::Selector(equals(ORCHESTRATOR, "k8s"))], Protocol::UDP, port(ports)),
                    ];
                    Policy { selector: target, ingress: Some(ingress), egress: Some(egress), ..base }
                }
            }
        }
    })
}

/// `pods` pods in `namespaces` namespaces with `policies` policies.
pub fn cluster(namespaces: u32, pods: u32, policies: u32) -> Model {
    let mut numbers = Numbers(3);
    let endpoints =
        (0..pods).map(|number| pod(number, number % namespaces, number / namespaces % APPLICATIONS)).collect();
    let of_namespaces =
        (0..policies).map(|number| policy(&mut numbers, number % namespaces, number / namespaces)).collect();
    let metadata = Rule {
        number: 1,
        action: Action::Deny,
        destination: EntityMatch { nets: Some(vec!["169.254.169.254/32".parse().unwrap()]), ..EntityMatch::default() },
        ..Rule::default()
    };
    let nodes = Rule {
        number: 1,
        source: EntityMatch { nets: Some(vec!["172.18.0.0/16".parse().unwrap()]), ..EntityMatch::default() },
        ..Rule::default()
    };
    let pass = Rule { number: 2, action: Action::Pass, ..Rule::default() };
    let security = Policy {
        name: "GlobalNetworkPolicy/security".to_owned(),
        sort_name: "security".to_owned(),
        order: Some(1.0),
        selector: equals(ORCHESTRATOR, "k8s"),
        ingress: Some(vec![nodes, pass.clone()]),
        egress: Some(vec![metadata, pass]),
        ..Policy::default()
    };
    let tier =
        |name: &str, order, policies| Tier { name: name.to_owned(), order: Some(order), policies, ..Tier::default() };
    let profile = |namespace| {
        Arc::new(Profile {
            name: format!("kns.ns{namespace}"),
            ingress: vec![Rule::default()],
            egress: vec![Rule::default()],
        })
    };
    Model {
        endpoints,
        tiers: vec![tier("security", 100.0, vec![Arc::new(security)]), tier("default", 1e6, of_namespaces)],
        profiles: (0..namespaces).map(profile).collect(),
    }
}
