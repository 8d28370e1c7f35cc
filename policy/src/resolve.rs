//! Rules as alternatives: what a packet must be for the rule to match, with what each end must be as numbered parts.
//!
//! A rule becomes one or more alternatives, any of which makes it match, each a conjunction of one condition per field
//! of a [`crate::program::Program`]. A rule has several alternatives only where a list of ports, or of service
//! endpoints, mixes what different fields test (numbers and names); at most four per side. An alternative that no
//! packet can satisfy, whatever endpoints there are, is left out.

use hashbrown::HashMap;
use ipnet::IpNet;
use weir_packet::Protocol;

use crate::{
    RuleId,
    model::{Action, EntityMatch, IcmpMatch, PortMatch, Rule},
    parts::{AddressPart, Parts, PointPart},
    peers::Peers,
    program::{APPLICATION_BITS, NO_PORT, SOURCE_PORT_BITS, application, icmp_selector},
    ranges::Ranges,
    slab::Slab,
};

/// Protocols that have ports.
const WITH_PORTS: [Protocol; 3] = [Protocol::TCP, Protocol::UDP, Protocol::SCTP];
/// The highest application number.
const APPLICATION_MAX: u128 = (1 << APPLICATION_BITS) - 1;
/// The highest source port number.
const SOURCE_PORT_MAX: u128 = (1 << SOURCE_PORT_BITS) - 1;

/// A rule that was resolved.
#[derive(Debug)]
pub(crate) struct ResolvedRule {
    pub(crate) action: Action,
    pub(crate) rule: RuleId,
    pub(crate) ip_version: Option<u8>,
    pub(crate) alternatives: Vec<Alternative>,
}

/// One way to match a rule.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alternative {
    /// Number of a set of applications.
    pub(crate) application: Option<u32>,
    /// Number of a set of source ports.
    pub(crate) source_port: Option<u32>,
    /// Numbers of address parts.
    pub(crate) source: u32,
    pub(crate) destination: u32,
    /// Numbers of point parts.
    pub(crate) source_point: u32,
    pub(crate) destination_point: u32,
}

/// Distinct sets of numbers, with a count of their users.
#[derive(Default)]
pub(crate) struct NumberSets {
    sets: Slab<NumberSet>,
    numbers: HashMap<Ranges, u32>,
}

struct NumberSet {
    set: Ranges,
    fingerprint: u64,
    users: u32,
}

impl NumberSets {
    fn number(&mut self, set: Ranges) -> u32 {
        if let Some(number) = self.numbers.get(&set) {
            self.sets[*number].users += 1;
            return *number;
        }
        let number = self.sets.insert(NumberSet { fingerprint: set.fingerprint(), set: set.clone(), users: 1 });
        self.numbers.insert(set, number);
        number
    }

    fn release(&mut self, number: u32) {
        self.sets[number].users -= 1;
        if self.sets[number].users == 0 {
            let NumberSet { set, .. } = self.sets.remove(number);
            self.numbers.remove(&set);
        }
    }

    pub(crate) fn get(&self, number: u32) -> &Ranges {
        &self.sets[number].set
    }

    /// A hash of the set.
    pub(crate) fn fingerprint(&self, number: u32) -> u64 {
        self.sets[number].fingerprint
    }
}

/// What alternatives refer to.
#[derive(Default)]
pub(crate) struct Resolver {
    pub(crate) applications: NumberSets,
    pub(crate) source_ports: NumberSets,
    pub(crate) parts: Parts,
}

impl Resolver {
    /// To be called before rules are resolved: takes over what `peers` changed.
    pub(crate) fn update(&mut self, peers: &mut Peers) {
        self.applications.sets.recycle();
        self.source_ports.sets.recycle();
        self.parts.update(peers);
    }

    /// The alternatives of a rule, to be given back to [`Resolver::release`].
    pub(crate) fn rule(&mut self, rule: &Rule, peers: &mut Peers) -> Vec<Alternative> {
        let mut alternatives = Vec::new();
        let base = base_applications(rule);
        for destination in sides(&rule.destination) {
            let applications = restrict_to_ports(&base, &destination);
            if applications.is_empty() {
                continue;
            }
            for source in sides(&rule.source) {
                let source_ports = source_ports(&source);
                if source_ports.is_empty() {
                    continue;
                }
                let set =
                    |set: &Ranges, max, sets: &mut NumberSets| (!set.is_all(max)).then(|| sets.number(set.clone()));
                alternatives.push(Alternative {
                    application: set(&applications, APPLICATION_MAX, &mut self.applications),
                    source_port: set(&source_ports, SOURCE_PORT_MAX, &mut self.source_ports),
                    source: self.parts.address(&source.address(), peers),
                    destination: self.parts.address(&destination.address(), peers),
                    source_point: self.parts.point(source.point, peers),
                    destination_point: self.parts.point(destination.point.clone(), peers),
                });
            }
        }
        alternatives
    }

    /// Gives back what [`Resolver::rule`] gave.
    pub(crate) fn release(&mut self, alternatives: &[Alternative]) {
        for alternative in alternatives {
            alternative.application.into_iter().for_each(|set| self.applications.release(set));
            alternative.source_port.into_iter().for_each(|set| self.source_ports.release(set));
            self.parts.release_address(alternative.source);
            self.parts.release_address(alternative.destination);
            self.parts.release_point(alternative.source_point);
            self.parts.release_point(alternative.destination_point);
        }
    }
}

/// One alternative of a rule's source or destination.
struct Side<'rule> {
    entity: &'rule EntityMatch,
    /// Addresses of services without a port.
    service_nets: Option<Vec<IpNet>>,
    point: PointPart,
    ports: Option<Vec<(u16, u16)>>,
    not_ports: Vec<(u16, u16)>,
}

impl Side<'_> {
    fn address(&self) -> AddressPart<'_> {
        AddressPart {
            nets: self.entity.nets.as_deref(),
            not_nets: &self.entity.not_nets,
            selector: self.entity.selector.as_ref(),
            not_selector: self.entity.not_selector.as_ref(),
            any_of: &self.entity.any_of,
            services: self.service_nets.as_deref(),
        }
    }
}

/// The applications that the rule's protocol and ICMP fields admit.
fn base_applications(rule: &Rule) -> Ranges {
    let of_protocol = |protocol: Protocol| {
        Ranges::new(vec![(u128::from(application(protocol, 0)), u128::from(application(protocol, u16::MAX)))])
    };
    let mut all = Ranges::all(APPLICATION_MAX);
    if let Some(protocol) = rule.protocol {
        all = all.intersection(&of_protocol(protocol));
    }
    if let Some(protocol) = rule.not_protocol {
        all = all.difference(&of_protocol(protocol));
    }
    if let Some(icmp) = rule.icmp {
        all = all.intersection(&icmp_applications(icmp));
    }
    if let Some(icmp) = rule.not_icmp {
        all = all.difference(&icmp_applications(icmp));
    }
    all
}

fn icmp_applications(icmp: IcmpMatch) -> Ranges {
    let (low, high) = (icmp.code.unwrap_or(0), icmp.code.unwrap_or(u8::MAX));
    let of_protocol = |protocol| {
        let number = |code| u128::from(application(protocol, icmp_selector(icmp.icmp_type, code)));
        (number(low), number(high))
    };
    Ranges::new(vec![of_protocol(Protocol::ICMP), of_protocol(Protocol::ICMPV6)])
}

/// The applications of `base` whose destination port the side admits.
fn restrict_to_ports(base: &Ranges, destination: &Side<'_>) -> Ranges {
    let with_ports = |ports: &[(u16, u16)]| {
        Ranges::new(
            WITH_PORTS
                .iter()
                .flat_map(|protocol| {
                    ports.iter().map(|(low, high)| (application(*protocol, *low), application(*protocol, *high)))
                })
                .map(|(low, high)| (u128::from(low), u128::from(high)))
                .collect(),
        )
    };
    let admitted = match &destination.ports {
        Some(ports) => base.intersection(&with_ports(ports)),
        None => base.clone(),
    };
    admitted.difference(&with_ports(&destination.not_ports))
}

/// The source port numbers that the side admits.
fn source_ports(source: &Side<'_>) -> Ranges {
    let ports = |ports: &[(u16, u16)]| {
        Ranges::new(ports.iter().map(|(low, high)| (u128::from(*low), u128::from(*high))).collect())
    };
    // Numbers above that of "no port" do not occur; a set that leaves none out is then recognized as such.
    debug_assert!(u128::from(NO_PORT) <= SOURCE_PORT_MAX);
    let admitted = source.ports.as_deref().map_or_else(|| Ranges::all(SOURCE_PORT_MAX), ports);
    admitted.difference(&ports(&source.not_ports))
}

/// The alternatives of one side of a rule.
fn sides(entity: &EntityMatch) -> Vec<Side<'_>> {
    let not_ports = split_ports(&entity.not_ports);
    // Numbers and names, each alone.
    let ports = match &entity.ports {
        None => vec![(None, None)],
        Some(ports) => {
            let (numbers, names) = split_ports(ports);
            let numbers = (!numbers.is_empty()).then_some((Some(numbers), None));
            let names = (!names.is_empty()).then_some((None, Some(names)));
            numbers.into_iter().chain(names).collect()
        }
    };
    // Service endpoints without and with a port, each alone.
    let services = match &entity.endpoint_ports {
        None => vec![(None, None)],
        Some(services) => {
            let nets: Vec<IpNet> = services.iter().filter(|(_, port)| port.is_none()).map(|(net, _)| *net).collect();
            let points: Vec<_> = services.iter().filter_map(|(net, port)| Some((*net, (*port)?))).collect();
            let nets = (!nets.is_empty()).then_some((Some(nets), None));
            let points = (!points.is_empty()).then_some((None, Some(points)));
            nets.into_iter().chain(points).collect()
        }
    };
    let mut sides = Vec::with_capacity(ports.len() * services.len());
    for (numbers, names) in ports {
        for (service_nets, service_points) in &services {
            sides.push(Side {
                entity,
                service_nets: service_nets.clone(),
                point: PointPart {
                    names: names.clone(),
                    not_names: not_ports.1.clone(),
                    services: service_points.clone(),
                },
                ports: numbers.clone(),
                not_ports: not_ports.0.clone(),
            });
        }
    }
    sides
}

/// The numeric and the named entries of a list of ports. A range that ends before it starts is kept, as an empty one.
fn split_ports(ports: &[PortMatch]) -> (Vec<(u16, u16)>, Vec<String>) {
    let (mut numbers, mut names) = (Vec::new(), Vec::new());
    for port in ports {
        match port {
            PortMatch::Range(low, high) => numbers.push((*low, *high)),
            PortMatch::Named(name) => names.push(name.clone()),
        }
    }
    (numbers, names)
}
