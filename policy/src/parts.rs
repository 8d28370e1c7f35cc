//! What rules ask of one end of a packet, as sets of addresses and of points.
//!
//! A part is one end's addresses (CIDRs, selectors), or its address, protocol and port together (named ports, service
//! endpoints). Equal parts of different rules are one. For each family a part is a [`Test`] of membership in at most
//! one set; when endpoints change, the sets of the parts that look at them are made again, and rules go on naming the
//! parts.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::Hash,
    sync::Arc,
};

use hashbrown::{Equivalent, HashMap};
use ipnet::IpNet;
use weir_packet::Protocol;

use crate::{
    Selector,
    addresses::AddressClasses,
    fingerprint::Fingerprint,
    limits::MAX_MEMBERSHIPS,
    model::Peer,
    partition::{Partition, TooManyMemberships, toggles},
    peers::Peers,
    points::PointClasses,
    program::{Test, application},
    ranges::{Family, Ranges},
    slab::Slab,
    trie::Key,
};

/// What an address must be, apart from its port.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct AddressPart<'rule> {
    pub(crate) nets: Option<&'rule [IpNet]>,
    pub(crate) not_nets: &'rule [IpNet],
    pub(crate) selector: Option<&'rule Selector>,
    pub(crate) not_selector: Option<&'rule Selector>,
    pub(crate) any_of: &'rule [Peer],
    pub(crate) services: Option<&'rule [IpNet]>,
}

impl AddressPart<'_> {
    /// No condition.
    pub(crate) const ANY: Self =
        Self { nets: None, not_nets: &[], selector: None, not_selector: None, any_of: &[], services: None };
}

/// [`AddressPart`], kept. The fields are in the same order, so that both have one hash.
#[derive(PartialEq, Eq, Hash)]
struct OwnAddressPart {
    nets: Option<Vec<IpNet>>,
    not_nets: Vec<IpNet>,
    selector: Option<Selector>,
    not_selector: Option<Selector>,
    any_of: Vec<Peer>,
    services: Option<Vec<IpNet>>,
}

impl OwnAddressPart {
    fn new(part: &AddressPart<'_>) -> Self {
        Self {
            nets: part.nets.map(<[_]>::to_vec),
            not_nets: part.not_nets.to_vec(),
            selector: part.selector.cloned(),
            not_selector: part.not_selector.cloned(),
            any_of: part.any_of.to_vec(),
            services: part.services.map(<[_]>::to_vec),
        }
    }

    fn view(&self) -> AddressPart<'_> {
        AddressPart {
            nets: self.nets.as_deref(),
            not_nets: &self.not_nets,
            selector: self.selector.as_ref(),
            not_selector: self.not_selector.as_ref(),
            any_of: &self.any_of,
            services: self.services.as_deref(),
        }
    }
}

impl Equivalent<Arc<OwnAddressPart>> for AddressPart<'_> {
    fn equivalent(&self, own: &Arc<OwnAddressPart>) -> bool {
        *self == own.view()
    }
}

/// What address, protocol and port together must be.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct PointPart {
    pub(crate) names: Option<Vec<String>>,
    pub(crate) not_names: Vec<String>,
    pub(crate) services: Option<Vec<(IpNet, (Protocol, u16))>>,
}

/// The number of the part that is no condition, of both kinds.
pub(crate) const ANY: u32 = 0;

/// A test for each family; `None`: nothing passes it.
type Tests = [Option<Test>; 2];

struct Known<D> {
    definition: Arc<D>,
    users: u32,
    tests: Tests,
    /// Selections of its selectors, in the order in which it names them.
    selections: Vec<u32>,
    /// Whether the last update changed its tests or what is in their sets.
    changed: bool,
}

/// A set of addresses of one family, as parts name it.
struct AddressSet {
    ranges: Arc<Ranges>,
    fingerprint: u64,
    /// The point, and the set of points that it is a part of.
    of_points: Option<(u32, u32)>,
}

/// A set of addresses with points of one family.
struct PointSet {
    /// By point: the set of addresses.
    addresses: BTreeMap<u32, u32>,
    fingerprint: u64,
}

/// The sets of one family, and the classes that they make.
pub(crate) struct FamilySets {
    family: Family,
    addresses: Slab<AddressSet>,
    points: Slab<PointSet>,
    pub(crate) partition: Partition,
    pub(crate) point_classes: PointClasses,
    toggles: Vec<(u128, u32)>,
    /// Whether a set was changed since somebody asked.
    changed: bool,
    /// Whether the last update moved anything from class to class.
    moved: bool,
}

/// All parts of the rules in use.
pub(crate) struct Parts {
    addresses: Slab<Known<OwnAddressPart>>,
    address_numbers: HashMap<Arc<OwnAddressPart>, u32>,
    points: Slab<Known<PointPart>>,
    point_numbers: HashMap<Arc<PointPart>, u32>,
    /// By family.
    pub(crate) families: [FamilySets; 2],
}

impl Default for Parts {
    fn default() -> Self {
        let mut parts = Self {
            addresses: Slab::default(),
            address_numbers: HashMap::new(),
            points: Slab::default(),
            point_numbers: HashMap::new(),
            families: Family::ALL.map(FamilySets::new),
        };
        let tests = [Some(Test::Any); 2];
        let definition = Arc::new(OwnAddressPart::new(&AddressPart::ANY));
        let any = Known { definition: Arc::clone(&definition), users: 1, tests, selections: vec![], changed: false };
        parts.address_numbers.insert(definition, parts.addresses.insert(any));
        let definition = Arc::<PointPart>::default();
        let any = Known { definition: Arc::clone(&definition), users: 1, tests, selections: vec![], changed: false };
        parts.point_numbers.insert(definition, parts.points.insert(any));
        parts
    }
}

impl Parts {
    /// The number of a part, for [`Parts::release_address`] to be given back.
    pub(crate) fn address(&mut self, part: &AddressPart<'_>, peers: &mut Peers) -> u32 {
        if *part == AddressPart::ANY {
            return ANY;
        }
        if let Some(number) = self.address_numbers.get(part) {
            self.addresses[*number].users += 1;
            return *number;
        }
        let definition = Arc::new(OwnAddressPart::new(part));
        let of_peers = part.any_of.iter().filter_map(|peer| match peer {
            Peer::Selector(selector) => Some((selector, None)),
            Peer::Block { .. } => None,
        });
        let of_selectors = match (part.selector, part.not_selector) {
            (Some(selector), excluded) => Some((selector, excluded)),
            (None, Some(excluded)) => Some((excluded, None)),
            (None, None) => None,
        };
        let selections = of_selectors.into_iter().chain(of_peers);
        let selections = selections.map(|(selector, excluded)| peers.selection(selector, excluded)).collect();
        let mut known =
            Known { definition: Arc::clone(&definition), users: 1, tests: [None; 2], selections, changed: true };
        known.make(&mut self.families, peers);
        let number = self.addresses.insert(known);
        self.address_numbers.insert(definition, number);
        number
    }

    /// The number of a part, for [`Parts::release_point`] to be given back.
    pub(crate) fn point(&mut self, part: PointPart, peers: &Peers) -> u32 {
        if let Some(number) = self.point_numbers.get(&part) {
            if *number != ANY {
                self.points[*number].users += 1;
            }
            return *number;
        }
        let definition = Arc::new(part);
        let mut known = Known {
            definition: Arc::clone(&definition),
            users: 1,
            tests: [None; 2],
            selections: vec![],
            changed: true,
        };
        known.make(&mut self.families, peers);
        let number = self.points.insert(known);
        self.point_numbers.insert(definition, number);
        number
    }

    pub(crate) fn release_address(&mut self, number: u32) {
        if number != ANY {
            self.addresses[number].users -= 1;
        }
    }

    pub(crate) fn release_point(&mut self, number: u32) {
        if number != ANY {
            self.points[number].users -= 1;
        }
    }

    pub(crate) fn address_test(&self, part: u32, family: Family) -> Option<Test> {
        self.addresses[part].tests[family as usize]
    }

    pub(crate) fn point_test(&self, part: u32, family: Family) -> Option<Test> {
        self.points[part].tests[family as usize]
    }

    /// Whether the last update changed what the part tests.
    pub(crate) fn address_changed(&self, part: u32) -> bool {
        self.addresses[part].changed
    }

    /// As [`Parts::address_changed`].
    pub(crate) fn point_changed(&self, part: u32) -> bool {
        self.points[part].changed
    }

    /// Makes the parts that look at changed endpoints again. To be called before new parts are named.
    pub(crate) fn update(&mut self, peers: &mut Peers) {
        self.addresses.recycle();
        self.points.recycle();
        for family in &mut self.families {
            family.addresses.recycle();
            family.points.recycle();
        }
        let changes = peers.take_changes();
        for (_, known) in self.addresses.iter_mut() {
            known.changed = false;
            if known.selections.iter().any(|selection| changes.selections.contains(selection)) {
                known.make(&mut self.families, peers);
            }
        }
        for (_, known) in self.points.iter_mut() {
            known.changed = false;
            let PointPart { names, not_names, .. } = &*known.definition;
            if names.iter().flatten().chain(not_names).any(|name| changes.ports.contains(name)) {
                known.make(&mut self.families, peers);
            }
        }
    }

    /// Drops the parts that no rule has any more, and takes over all changes of sets into classes.
    pub(crate) fn settle(&mut self, peers: &mut Peers) -> Result<(), (Family, TooManyMemberships)> {
        let unused = |(number, users): (u32, u32)| (users == 0).then_some(number);
        let parts: Vec<u32> = self.addresses.iter().map(|(n, known)| (n, known.users)).filter_map(unused).collect();
        for number in parts {
            let known = self.addresses.remove(number);
            self.address_numbers.remove(&known.definition);
            known.selections.iter().for_each(|selection| peers.release(*selection));
            for (family, test) in self.families.iter_mut().zip(known.tests) {
                family.replace_addresses(set_of(test), None, None);
            }
        }
        let parts: Vec<u32> = self.points.iter().map(|(n, known)| (n, known.users)).filter_map(unused).collect();
        for number in parts {
            let known = self.points.remove(number);
            self.point_numbers.remove(&known.definition);
            for (family, test) in self.families.iter_mut().zip(known.tests) {
                family.replace_points(set_of(test), BTreeMap::new());
            }
        }
        for family in &mut self.families {
            family.settle().map_err(|error| (family.family, error))?;
        }
        Ok(())
    }
}

impl Known<OwnAddressPart> {
    /// Makes the tests by the endpoints that there are now; the sets come into the place of those that it had.
    fn make(&mut self, families: &mut [FamilySets; 2], peers: &mut Peers) {
        let part = self.definition.view();
        let mut selections = self.selections.iter();
        let of_selectors = (part.selector.is_some() || part.not_selector.is_some())
            .then(|| peers.addresses(*selections.next().expect("a selection for the selectors")));
        let of_peers: Vec<[Arc<Ranges>; 2]> = selections.map(|selection| peers.addresses(*selection)).collect();
        let tests = Family::ALL.map(|family| {
            let mut wanted: Option<Arc<Ranges>> = None;
            let mut want = |set: Arc<Ranges>| {
                wanted = Some(match wanted.take() {
                    None => set,
                    Some(all) => Arc::new(all.intersection(&set)),
                });
            };
            if let Some(nets) = part.nets {
                want(Arc::new(Ranges::of_nets(nets, family)));
            }
            if let Some(nets) = part.services {
                want(Arc::new(Ranges::of_nets(nets, family)));
            }
            let of_selectors = of_selectors.as_ref().map(|addresses| &addresses[family as usize]);
            if let (Some(_), Some(selected)) = (part.selector, of_selectors) {
                want(Arc::clone(selected));
            }
            if !part.any_of.is_empty() {
                want(any_of(part.any_of, &of_peers, family));
            }
            let mut unwanted = Ranges::of_nets(part.not_nets, family);
            // A list without a CIDR of the family is not one that excludes nothing.
            let nothing_passes = !part.not_nets.is_empty() && unwanted.is_empty();
            if let (None, Some(selected)) = (part.selector, of_selectors) {
                unwanted = Ranges::new(unwanted.iter().chain(selected.iter()).collect());
            }
            let (set, negated) = match wanted {
                Some(set) if unwanted.is_empty() => (set, false),
                Some(set) => (Arc::new(set.difference(&unwanted)), false),
                None => (Arc::new(unwanted), true),
            };
            let is_empty = set.is_empty();
            let is_set = !nothing_passes && !is_empty && !set.is_all(family.max());
            let before = set_of(self.tests[family as usize]);
            let sets = &mut families[family as usize];
            match sets.replace_addresses(before, is_set.then_some(set), None) {
                Some(number) if negated => Some(Test::NotIn(number)),
                Some(number) => Some(Test::In(number)),
                None => (!nothing_passes && is_empty == negated).then_some(Test::Any),
            }
        });
        self.changed = take_changed(families) | (tests != self.tests);
        self.tests = tests;
    }
}

/// The addresses of any of these peers; `of_selectors` are those of the selectors among them, in order.
fn any_of(peers: &[Peer], of_selectors: &[[Arc<Ranges>; 2]], family: Family) -> Arc<Ranges> {
    if let ([_], [selected]) = (peers, of_selectors) {
        return Arc::clone(&selected[family as usize]);
    }
    let mut union: Vec<(u128, u128)> =
        of_selectors.iter().flat_map(|selected| selected[family as usize].iter()).collect();
    for peer in peers {
        if let Peer::Block { cidr, except } = peer {
            let block = Ranges::of_nets([cidr], family).difference(&Ranges::of_nets(except, family));
            union.extend(block.iter());
        }
    }
    Arc::new(Ranges::new(union))
}

impl Known<PointPart> {
    /// As for an address part.
    fn make(&mut self, families: &mut [FamilySets; 2], peers: &Peers) {
        let PointPart { names, not_names, services } = &*self.definition;
        let named = names.as_ref().map(|names| named(names, peers));
        let not_named = self::named(not_names, peers);
        let tests = Family::ALL.map(|family| {
            let of_family = |addresses: &BTreeMap<u32, [Arc<Ranges>; 2]>| -> BTreeMap<u32, Arc<Ranges>> {
                addresses.iter().map(|(point, sets)| (*point, Arc::clone(&sets[family as usize]))).collect()
            };
            let mut wanted = named.as_ref().map(of_family);
            if let Some(services) = services {
                let mut ranges: BTreeMap<u32, Vec<(u128, u128)>> = BTreeMap::new();
                for (net, (protocol, port)) in services {
                    ranges.entry(application(*protocol, *port)).or_default().extend(family.range(net));
                }
                let of_point = |(point, ranges)| {
                    let set = Ranges::new(ranges);
                    match &wanted {
                        None => Some((point, Arc::new(set))),
                        Some(named) => Some((point, Arc::new(set.intersection(named.get(&point)?)))),
                    }
                };
                wanted = Some(ranges.into_iter().filter_map(of_point).collect());
            }
            let unwanted = of_family(&not_named);
            let (mut points, negated) = match wanted {
                None => (unwanted, true),
                Some(mut wanted) => {
                    for (point, set) in &mut wanted {
                        if let Some(unwanted) = unwanted.get(point) {
                            *set = Arc::new(set.difference(unwanted));
                        }
                    }
                    (wanted, false)
                }
            };
            points.retain(|_, set| !set.is_empty());
            let before = set_of(self.tests[family as usize]);
            match families[family as usize].replace_points(before, points) {
                Some(number) if negated => Some(Test::NotIn(number)),
                Some(number) => Some(Test::In(number)),
                None => negated.then_some(Test::Any),
            }
        });
        self.changed = take_changed(families) | (tests != self.tests);
        self.tests = tests;
    }
}

/// By protocol and port: the addresses of the endpoints that call it by one of these names.
fn named(names: &[String], peers: &Peers) -> BTreeMap<u32, [Arc<Ranges>; 2]> {
    let mut owners: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for (endpoint, protocol, port) in names.iter().flat_map(|name| peers.ports(name)) {
        owners.entry(application(*protocol, *port)).or_default().insert(*endpoint);
    }
    let addresses = |owners: BTreeSet<u32>| peers.addresses_of(&owners.into_iter().collect::<Vec<_>>());
    owners.into_iter().map(|(point, owners)| (point, addresses(owners))).collect()
}

fn set_of(test: Option<Test>) -> Option<u32> {
    match test {
        Some(Test::In(set) | Test::NotIn(set)) => Some(set),
        Some(Test::Any) | None => None,
    }
}

fn take_changed(families: &mut [FamilySets; 2]) -> bool {
    families.iter_mut().fold(false, |changed, family| changed | std::mem::take(&mut family.changed))
}

impl FamilySets {
    fn new(family: Family) -> Self {
        Self {
            family,
            addresses: Slab::default(),
            points: Slab::default(),
            partition: Partition::default(),
            point_classes: PointClasses::default(),
            toggles: Vec::new(),
            changed: false,
            moved: true,
        }
    }

    /// A hash of what is in a set of addresses.
    pub(crate) fn address_fingerprint(&self, set: u32) -> u64 {
        self.addresses[set].fingerprint
    }

    /// A hash of what is in a set of points.
    pub(crate) fn point_fingerprint(&self, set: u32) -> u64 {
        self.points[set].fingerprint
    }

    /// Puts a set into the place of one, makes one, or takes one away.
    fn replace_addresses(
        &mut self,
        before: Option<u32>,
        after: Option<Arc<Ranges>>,
        of_points: Option<(u32, u32)>,
    ) -> Option<u32> {
        let (max, nothing) = (self.family.max(), Ranges::default());
        match (before, after) {
            (None, None) => None,
            (Some(number), Some(ranges)) => {
                let set = &mut self.addresses[number];
                if set.ranges != ranges {
                    toggles(number, &set.ranges, &ranges, max, &mut self.toggles);
                    (set.fingerprint, set.ranges) = (ranges.fingerprint(), ranges);
                    self.changed = true;
                }
                Some(number)
            }
            (None, Some(ranges)) => {
                self.changed = true;
                let set = AddressSet { fingerprint: ranges.fingerprint(), ranges: Arc::clone(&ranges), of_points };
                let number = self.addresses.insert(set);
                toggles(number, &nothing, &ranges, max, &mut self.toggles);
                Some(number)
            }
            (Some(number), None) => {
                self.changed = true;
                let set = self.addresses.remove(number);
                toggles(number, &set.ranges, &nothing, max, &mut self.toggles);
                None
            }
        }
    }

    /// As [`FamilySets::replace_addresses`]; `after` has no empty set, and is empty where there is to be none.
    fn replace_points(&mut self, before: Option<u32>, mut after: BTreeMap<u32, Arc<Ranges>>) -> Option<u32> {
        let number = match (before, after.is_empty()) {
            (None, true) => return None,
            (None, false) => self.points.insert(PointSet { addresses: BTreeMap::new(), fingerprint: 0 }),
            (Some(number), _) => number,
        };
        let mut addresses = std::mem::take(&mut self.points[number].addresses);
        for point in addresses.keys().chain(after.keys()).copied().collect::<BTreeSet<_>>() {
            let set = addresses.get(&point).copied();
            match self.replace_addresses(set, after.remove(&point), Some((point, number))) {
                Some(set) => drop(addresses.insert(point, set)),
                None => drop(addresses.remove(&point)),
            }
        }
        if addresses.is_empty() {
            self.points.remove(number);
            return None;
        }
        let mut fingerprint = Fingerprint::new(addresses.len() as u64);
        for (point, set) in &addresses {
            fingerprint.add(u64::from(*point));
            fingerprint.add(self.addresses[*set].fingerprint);
        }
        self.points[number] = PointSet { addresses, fingerprint: fingerprint.value() };
        Some(number)
    }

    /// Where to find the classes of addresses and points; `before` itself, or what of it is the same, is shared.
    pub(crate) fn address_classes<K: Key>(&self, before: Option<Arc<AddressClasses<K>>>) -> Arc<AddressClasses<K>> {
        match before {
            Some(before) if !self.moved => before,
            before => {
                let points = Arc::clone(&self.point_classes.of_pair);
                let before = before.as_deref();
                Arc::new(AddressClasses::new(&self.partition.intervals, points, before))
            }
        }
    }

    /// Takes over all changes of sets into classes.
    fn settle(&mut self) -> Result<(), TooManyMemberships> {
        self.moved = !self.toggles.is_empty();
        if !self.moved {
            return Ok(());
        }
        let settled = self.partition.toggle(std::mem::take(&mut self.toggles), MAX_MEMBERSHIPS)?;
        let (classes, addresses) = (&self.partition.classes, &self.addresses);
        let points_of = |class: u32| -> Vec<(u32, u32)> {
            classes.signature(class).iter().filter_map(|set| addresses[*set].of_points).collect()
        };
        let changed = settled.changed.iter().map(|class| (*class, points_of(*class)));
        self.point_classes.update(changed.chain(settled.vacated.iter().map(|class| (*class, Vec::new()))));
        Ok(())
    }
}
