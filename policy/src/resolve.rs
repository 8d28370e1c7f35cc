//! Rules as conditions on sets of numbers: selectors become addresses, named ports become (address, protocol, port).
//!
//! A rule becomes one or more alternatives, any of which makes it match, each a conjunction of one condition per field
//! of a [`crate::program::Program`]. A rule has several alternatives only where a list of ports, or of service
//! endpoints, mixes what different fields test (numbers and names); at most four per side. An alternative that no
//! packet can satisfy is left out.
//!
//! Conditions name sets by number, and equal sets have one number, so equal conditions are equal values.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::Hash,
    rc::Rc,
};

use hashbrown::HashMap;
use ipnet::IpNet;
use weir_packet::Protocol;

use crate::{
    Selector,
    fingerprint::Fingerprint,
    model::{EntityMatch, IcmpMatch, Peer, PortMatch, Rule},
    peers::Peers,
    program::{APPLICATION_BITS, NO_PORT, SOURCE_PORT_BITS, Test, application, icmp_selector},
    ranges::{Family, Ranges},
};

/// Protocols that have ports.
const WITH_PORTS: [Protocol; 3] = [Protocol::TCP, Protocol::UDP, Protocol::SCTP];
/// The highest application number.
const APPLICATION_MAX: u128 = (1 << APPLICATION_BITS) - 1;
/// The highest source port number.
const SOURCE_PORT_MAX: u128 = (1 << SOURCE_PORT_BITS) - 1;

/// What one alternative of a rule asks of a packet of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Conditions {
    /// Number of a set of applications.
    pub(crate) application: Option<u32>,
    /// Number of a set of source ports.
    pub(crate) source_port: Option<u32>,
    /// On address sets of the family.
    pub(crate) source: Test,
    /// On address sets of the family.
    pub(crate) destination: Test,
    /// On point sets of the family.
    pub(crate) source_point: Test,
    /// On point sets of the family.
    pub(crate) destination_point: Test,
}

impl Conditions {
    /// No conditions.
    pub(crate) const NONE: Self = Self {
        application: None,
        source_port: None,
        source: Test::Any,
        destination: Test::Any,
        source_point: Test::Any,
        destination_point: Test::Any,
    };
}

/// Distinct values by number.
pub(crate) struct Interner<T> {
    values: Vec<Rc<T>>,
    numbers: HashMap<Rc<T>, u32>,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self { values: Vec::new(), numbers: HashMap::new() }
    }
}

impl<T: Eq + Hash> Interner<T> {
    fn number(&mut self, value: T) -> u32 {
        if let Some(number) = self.numbers.get(&value) {
            return *number;
        }
        let (number, value) = (self.values.len() as u32, Rc::new(value));
        self.values.push(Rc::clone(&value));
        self.numbers.insert(value, number);
        number
    }

    pub(crate) fn get(&self, number: u32) -> &T {
        &self.values[number as usize]
    }

    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = &T> {
        self.values.iter().map(|value| &**value)
    }
}

/// A set of (protocol and port, number of an address set), ascending: who has that port.
pub(crate) type Points = Vec<(u32, u32)>;

/// The sets of one family.
#[derive(Default)]
pub(crate) struct FamilySets {
    /// Sets of addresses.
    pub(crate) addresses: Interner<Ranges>,
    /// Sets of addresses with protocol and port.
    pub(crate) points: Interner<Points>,
}

/// What an address must be, apart from its port.
#[derive(Clone, PartialEq, Eq, Hash)]
struct AddressPart<'model> {
    nets: Option<&'model [IpNet]>,
    not_nets: &'model [IpNet],
    selector: Option<&'model Selector>,
    not_selector: Option<&'model Selector>,
    any_of: &'model [Peer],
    services: Option<Vec<IpNet>>,
}

/// What address, protocol and port together must be.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
struct PointPart<'model> {
    names: Option<Vec<&'model str>>,
    not_names: Vec<&'model str>,
    services: Option<Vec<(IpNet, (Protocol, u16))>>,
}

/// One alternative of a rule's source or destination.
struct Side<'model> {
    address: AddressPart<'model>,
    point: PointPart<'model>,
    ports: Option<Vec<(u16, u16)>>,
    not_ports: Vec<(u16, u16)>,
}

/// A test for each family; `None`: nothing passes it.
type Tests = [Option<Test>; 2];

/// Turns rules into conditions and collects the sets that they name.
pub(crate) struct Resolver<'peers, 'model> {
    peers: &'peers Peers<'model>,
    /// Sets of applications.
    pub(crate) applications: Interner<Ranges>,
    /// Sets of source ports.
    pub(crate) source_ports: Interner<Ranges>,
    /// By family.
    pub(crate) families: [FamilySets; 2],
    selected: HashMap<(&'model Selector, Option<&'model Selector>), [Rc<Ranges>; 2]>,
    address_tests: HashMap<AddressPart<'model>, Tests>,
    point_tests: HashMap<PointPart<'model>, Tests>,
}

impl<'peers, 'model> Resolver<'peers, 'model> {
    pub(crate) fn new(peers: &'peers Peers<'model>) -> Self {
        Self {
            peers,
            applications: Interner::default(),
            source_ports: Interner::default(),
            families: Default::default(),
            selected: HashMap::new(),
            address_tests: HashMap::new(),
            point_tests: HashMap::new(),
        }
    }

    /// The alternatives of `rule`, by family.
    pub(crate) fn rule(&mut self, rule: &'model Rule) -> [Vec<Conditions>; 2] {
        let mut alternatives = [Vec::new(), Vec::new()];
        let base = base_applications(rule);
        for destination in sides(&rule.destination) {
            let applications = restrict_to_ports(&base, &destination);
            let Some(application) = number_of(applications, APPLICATION_MAX, &mut self.applications) else {
                continue;
            };
            let destination_tests = self.address_tests(&destination.address);
            let destination_points = self.point_tests(&destination.point);
            for source in sides(&rule.source) {
                let Some(source_port) = number_of(source_ports(&source), SOURCE_PORT_MAX, &mut self.source_ports)
                else {
                    continue;
                };
                let source_tests = self.address_tests(&source.address);
                let source_points = self.point_tests(&source.point);
                for family in Family::ALL {
                    if rule.ip_version.is_some_and(|version| version != family.version()) {
                        continue;
                    }
                    let of_family = family as usize;
                    if let (Some(source), Some(destination), Some(source_point), Some(destination_point)) = (
                        source_tests[of_family],
                        destination_tests[of_family],
                        source_points[of_family],
                        destination_points[of_family],
                    ) {
                        alternatives[of_family].push(Conditions {
                            application,
                            source_port,
                            source,
                            destination,
                            source_point,
                            destination_point,
                        });
                    }
                }
            }
        }
        alternatives
    }

    fn address_tests(&mut self, part: &AddressPart<'model>) -> Tests {
        if let Some(tests) = self.address_tests.get(part) {
            return *tests;
        }
        let tests = Family::ALL.map(|family| self.address_test(part, family));
        self.address_tests.insert(part.clone(), tests);
        tests
    }

    fn address_test(&mut self, part: &AddressPart<'model>, family: Family) -> Option<Test> {
        let mut wanted: Option<Ranges> = None;
        let mut want =
            |set: &Ranges| wanted = Some(wanted.as_ref().map_or_else(|| set.clone(), |all| all.intersection(set)));
        if let Some(nets) = part.nets {
            want(&Ranges::of_nets(nets, family));
        }
        if let Some(nets) = &part.services {
            want(&Ranges::of_nets(nets, family));
        }
        if let Some(selector) = part.selector {
            want(&self.selected(selector, part.not_selector)[family as usize]);
        }
        if !part.any_of.is_empty() {
            want(&self.any_of(part.any_of, family));
        }
        let mut unwanted = Ranges::default();
        if !part.not_nets.is_empty() {
            unwanted = Ranges::of_nets(part.not_nets, family);
            if unwanted.is_empty() {
                return None;
            }
        }
        if let (None, Some(selector)) = (part.selector, part.not_selector) {
            let selected = &self.selected(selector, None)[family as usize];
            unwanted = Ranges::new(unwanted.iter().chain(selected.iter()).collect());
        }

        let sets = &mut self.families[family as usize].addresses;
        match wanted.map(|wanted| wanted.difference(&unwanted)) {
            Some(set) if set.is_empty() => None,
            Some(set) if set.is_all(family.max()) => Some(Test::Any),
            Some(set) => Some(Test::In(sets.number(set))),
            None if unwanted.is_empty() => Some(Test::Any),
            None if unwanted.is_all(family.max()) => None,
            None => Some(Test::NotIn(sets.number(unwanted))),
        }
    }

    /// The addresses of the known endpoints that `selector` picks and `excluded` does not, by family.
    fn selected(&mut self, selector: &'model Selector, excluded: Option<&'model Selector>) -> [Rc<Ranges>; 2] {
        self.selected
            .entry((selector, excluded))
            .or_insert_with(|| {
                let picked = self.peers.picked(selector, excluded);
                Family::ALL.map(|family| Rc::new(self.peers.addresses(&picked, family)))
            })
            .clone()
    }

    fn any_of(&mut self, any_of: &'model [Peer], family: Family) -> Ranges {
        let mut union = Vec::new();
        for peer in any_of {
            match peer {
                Peer::Selector(selector) => union.extend(self.selected(selector, None)[family as usize].iter()),
                Peer::Block { cidr, except } => {
                    let block = Ranges::of_nets([cidr], family).difference(&Ranges::of_nets(except, family));
                    union.extend(block.iter());
                }
            }
        }
        Ranges::new(union)
    }

    fn point_tests(&mut self, part: &PointPart<'model>) -> Tests {
        if let Some(tests) = self.point_tests.get(part) {
            return *tests;
        }
        let tests = Family::ALL.map(|family| self.point_test(part, family));
        self.point_tests.insert(part.clone(), tests);
        tests
    }

    fn point_test(&mut self, part: &PointPart<'model>, family: Family) -> Option<Test> {
        let mut wanted = part.names.as_ref().map(|names| self.named(names, family));
        if let Some(services) = &part.services {
            let mut ranges: BTreeMap<u32, Vec<(u128, u128)>> = BTreeMap::new();
            for (net, (protocol, port)) in services {
                ranges.entry(application(*protocol, *port)).or_default().extend(family.range(net));
            }
            let services: BTreeMap<u32, Ranges> =
                ranges.into_iter().map(|(point, ranges)| (point, Ranges::new(ranges))).collect();
            wanted = Some(match wanted {
                None => services,
                Some(named) => named
                    .into_iter()
                    .filter_map(|(point, set)| Some((point, set.intersection(services.get(&point)?))))
                    .collect(),
            });
        }
        let unwanted = self.named(&part.not_names, family);
        let (points, negated) = match wanted {
            None => (unwanted, true),
            Some(mut wanted) => {
                for (point, set) in &mut wanted {
                    if let Some(unwanted) = unwanted.get(point) {
                        *set = set.difference(unwanted);
                    }
                }
                (wanted, false)
            }
        };
        let sets = &mut self.families[family as usize];
        let points: Points = points
            .into_iter()
            .filter(|(_, set)| !set.is_empty())
            .map(|(point, set)| (point, sets.addresses.number(set)))
            .collect();
        match (points.is_empty(), negated) {
            (true, true) => Some(Test::Any),
            (true, false) => None,
            (false, true) => Some(Test::NotIn(sets.points.number(points))),
            (false, false) => Some(Test::In(sets.points.number(points))),
        }
    }

    /// By protocol and port: the addresses of the endpoints that call it by one of these names.
    fn named(&self, names: &[&str], family: Family) -> BTreeMap<u32, Ranges> {
        let mut owners: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for (endpoint, protocol, port) in names.iter().flat_map(|name| self.peers.ports(name)) {
            owners.entry(application(*protocol, *port)).or_default().insert(*endpoint);
        }
        let addresses = |owners: BTreeSet<u32>| self.peers.addresses(&owners.into_iter().collect::<Vec<_>>(), family);
        owners.into_iter().map(|(point, owners)| (point, addresses(owners))).collect()
    }

    /// A number that equal conditions on equal sets share, in every process.
    pub(crate) fn fingerprint(&self, conditions: &Conditions, hashes: &SetFingerprints, family: Family) -> u64 {
        let hashes_of = &hashes.families[family as usize];
        let test = |test: Test, hashes: &[u64]| match test {
            Test::Any => [0, 0],
            Test::In(set) => [1, hashes[set as usize]],
            Test::NotIn(set) => [2, hashes[set as usize]],
        };
        let mut fingerprint = Fingerprint::new(0);
        for words in [
            conditions.application.map_or([0, 0], |set| [1, hashes.applications[set as usize]]),
            conditions.source_port.map_or([0, 0], |set| [1, hashes.source_ports[set as usize]]),
            test(conditions.source, &hashes_of.0),
            test(conditions.destination, &hashes_of.0),
            test(conditions.source_point, &hashes_of.1),
            test(conditions.destination_point, &hashes_of.1),
        ] {
            words.into_iter().for_each(|word| fingerprint.add(word));
        }
        fingerprint.value()
    }

    /// The fingerprints of all sets collected so far.
    pub(crate) fn set_fingerprints(&self) -> SetFingerprints {
        let of = |sets: &Interner<Ranges>| sets.iter().map(Ranges::fingerprint).collect::<Vec<_>>();
        SetFingerprints {
            applications: of(&self.applications),
            source_ports: of(&self.source_ports),
            families: [0, 1].map(|family| {
                let sets: &FamilySets = &self.families[family];
                let addresses = of(&sets.addresses);
                let points = sets.points.iter().map(|points| {
                    let mut fingerprint = Fingerprint::new(points.len() as u64);
                    for (point, set) in points {
                        fingerprint.add(u64::from(*point));
                        fingerprint.add(addresses[*set as usize]);
                    }
                    fingerprint.value()
                });
                let points = points.collect();
                (addresses, points)
            }),
        }
    }
}

/// Fingerprints by number of set.
pub(crate) struct SetFingerprints {
    applications: Vec<u64>,
    source_ports: Vec<u64>,
    /// Address sets and point sets.
    families: [(Vec<u64>, Vec<u64>); 2],
}

/// The number of a set of values; `None`: no value is in it, `Some(None)`: every value is.
fn number_of(set: Ranges, max: u128, sets: &mut Interner<Ranges>) -> Option<Option<u32>> {
    if set.is_empty() {
        None
    } else if set.is_all(max) {
        Some(None)
    } else {
        Some(Some(sets.number(set)))
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
                address: AddressPart {
                    nets: entity.nets.as_deref(),
                    not_nets: &entity.not_nets,
                    selector: entity.selector.as_ref(),
                    not_selector: entity.not_selector.as_ref(),
                    any_of: &entity.any_of,
                    services: service_nets.clone(),
                },
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
fn split_ports(ports: &[PortMatch]) -> (Vec<(u16, u16)>, Vec<&str>) {
    let (mut numbers, mut names) = (Vec::new(), Vec::new());
    for port in ports {
        match port {
            PortMatch::Range(low, high) => numbers.push((*low, *high)),
            PortMatch::Named(name) => names.push(name.as_str()),
        }
    }
    (numbers, names)
}
