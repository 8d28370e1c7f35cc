//! Endpoints by label: which of them selectors pick, and the addresses and named ports that they have.
//!
//! It is kept from one model to the next. An endpoint that comes or goes is offered to the selectors that one of its
//! labels admits, and a new selector looks only at endpoints that one of its labels admits: the same index serves both
//! ways ([`Group`]).

use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use weir_packet::Protocol;

use crate::{
    Selector,
    model::{Endpoint, EndpointKind},
    ranges::{Family, Ranges},
    slab::Slab,
};

/// What is to be picked: endpoints that the first selects and the second does not.
type Wanted = (Selector, Option<Selector>);

/// The endpoints of a model, and the selectors that are asked of them.
#[derive(Default)]
pub(crate) struct Peers {
    endpoints: Slab<Known>,
    by_identity: HashMap<usize, u32>,
    labels: HashMap<String, Label>,
    /// Selections that no label admits endpoints to.
    unlabelled: Vec<u32>,
    /// By name of a port: endpoints that have it, the protocol and the number.
    ports: HashMap<String, Vec<(u32, Protocol, u16)>>,
    selections: Slab<Selection>,
    selection_numbers: HashMap<Arc<Wanted>, u32>,
    changes: Changes,
    update: u64,
}

struct Known {
    endpoint: Arc<Endpoint>,
    /// The update that had it last.
    update: u64,
}

/// What a label admits, with any value and by value.
#[derive(Default)]
struct Label {
    any: Group,
    values: HashMap<String, Group>,
}

/// The endpoints that have a label (and a value), and the selections that only such endpoints can be in; both ascending.
#[derive(Default)]
struct Group {
    endpoints: Vec<u32>,
    selections: Vec<u32>,
}

/// A label, and a value.
type LabelKey<'selector> = (&'selector str, Option<&'selector str>);

struct Selection {
    wanted: Arc<Wanted>,
    /// Where endpoints that it may pick are offered to it: see [`Peers::keys`].
    keys: Option<Vec<(String, Option<String>)>>,
    users: u32,
    /// Ascending.
    picked: Vec<u32>,
    /// By family, made when somebody asks.
    addresses: Option<[Arc<Ranges>; 2]>,
}

/// What a model has changed.
#[derive(Default)]
pub(crate) struct Changes {
    /// Selections that pick others than before, or the same with other addresses.
    pub(crate) selections: HashSet<u32>,
    /// Names of ports that others have than before, or the same with other numbers or addresses.
    pub(crate) ports: HashSet<String>,
}

impl Peers {
    /// Takes over the endpoints of a model, and gives their numbers in that order. An endpoint keeps its number as long
    /// as it stays as it is.
    pub(crate) fn update<'model>(&mut self, endpoints: impl Iterator<Item = &'model Arc<Endpoint>>) -> Vec<u32> {
        self.endpoints.recycle();
        self.selections.recycle();
        self.changes = Changes::default();
        self.update += 1;
        let update = self.update;
        let mut numbers = Vec::new();
        let mut unknown = Vec::new();
        for endpoint in endpoints {
            let known = self.by_identity.get(&identity(endpoint)).copied();
            match known {
                Some(number) => self.endpoints[number].update = update,
                None => unknown.push((numbers.len(), endpoint)),
            }
            numbers.push(known.unwrap_or(u32::MAX));
        }
        let gone = self.endpoints.iter().filter(|(_, known)| known.update != update);
        let mut gone: Vec<(u32, Arc<Endpoint>)> =
            gone.map(|(number, known)| (number, Arc::clone(&known.endpoint))).collect();
        if !unknown.is_empty() {
            let by_name: HashMap<(EndpointKind, &str), u32> =
                gone.iter().map(|(number, endpoint)| ((endpoint.kind, endpoint.name.as_str()), *number)).collect();
            unknown.retain(|(place, endpoint)| {
                let Some(number) = by_name.get(&(endpoint.kind, endpoint.name.as_str())) else { return true };
                let known = &mut self.endpoints[*number];
                if known.update == update || known.endpoint != **endpoint {
                    return true;
                }
                self.by_identity.remove(&identity(&known.endpoint));
                self.by_identity.insert(identity(endpoint), *number);
                *known = Known { endpoint: Arc::clone(endpoint), update };
                numbers[*place] = *number;
                false
            });
            drop(by_name);
            gone.retain(|(number, _)| self.endpoints[*number].update != update);
        }
        for (number, endpoint) in gone {
            self.by_identity.remove(&identity(&endpoint));
            self.endpoints.remove(number);
            self.withdraw(number, &endpoint);
        }
        for (place, endpoint) in unknown {
            // The same one may be there twice.
            let known = self.by_identity.get(&identity(endpoint)).copied();
            numbers[place] = known.unwrap_or_else(|| {
                let number = self.endpoints.insert(Known { endpoint: Arc::clone(endpoint), update });
                self.by_identity.insert(identity(endpoint), number);
                self.offer(number, endpoint);
                number
            });
        }
        numbers
    }

    /// What the last update changed.
    pub(crate) fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// The number of a selection: what `selector` picks and `excluded` does not. To be given back to
    /// [`Peers::release`].
    pub(crate) fn selection(&mut self, selector: &Selector, excluded: Option<&Selector>) -> u32 {
        let wanted = Arc::new((selector.clone(), excluded.cloned()));
        if let Some(number) = self.selection_numbers.get(&wanted) {
            self.selections[*number].users += 1;
            return *number;
        }
        let keys = self.keys(selector);
        let candidates = match &keys {
            None => self.endpoints.iter().map(|(number, _)| number).collect(),
            Some(keys) => {
                let groups = keys.iter().filter_map(|key| self.group(*key));
                let mut all: Vec<u32> = groups.flat_map(|group| &group.endpoints).copied().collect();
                if keys.len() > 1 {
                    all.sort_unstable();
                    all.dedup();
                }
                all
            }
        };
        let mut picked = candidates;
        picked.retain(|number| matches(&wanted, &self.endpoints[*number].endpoint));
        let keys = keys.map(|keys| {
            keys.into_iter().map(|(label, value)| (label.to_owned(), value.map(str::to_owned))).collect::<Vec<_>>()
        });
        let selection = Selection { wanted: Arc::clone(&wanted), keys, users: 1, picked, addresses: None };
        let number = self.selections.insert(selection);
        match &self.selections[number].keys {
            None => self.unlabelled.push(number),
            Some(keys) => {
                for (label, value) in keys {
                    insert(&mut group_of(&mut self.labels, label, value.as_deref()).selections, number);
                }
            }
        }
        self.selection_numbers.insert(wanted, number);
        number
    }

    /// Gives back what [`Peers::selection`] gave.
    pub(crate) fn release(&mut self, number: u32) {
        self.selections[number].users -= 1;
        if self.selections[number].users > 0 {
            return;
        }
        let Selection { wanted, keys, .. } = self.selections.remove(number);
        self.selection_numbers.remove(&wanted);
        match keys {
            None => self.unlabelled.retain(|selection| *selection != number),
            Some(keys) => {
                for (label, value) in &keys {
                    remove(&mut group_of(&mut self.labels, label, value.as_deref()).selections, number);
                    forget_unused(&mut self.labels, label, value.as_deref());
                }
            }
        }
    }

    /// The endpoints of a selection, ascending.
    pub(crate) fn picked(&self, selection: u32) -> &[u32] {
        &self.selections[selection].picked
    }

    /// The addresses of the endpoints of a selection, by family.
    pub(crate) fn addresses(&mut self, selection: u32) -> [Arc<Ranges>; 2] {
        let Selection { picked, addresses, .. } = &mut self.selections[selection];
        let made = addresses.get_or_insert_with(|| addresses_of(&self.endpoints, picked));
        made.clone()
    }

    /// The addresses of these endpoints.
    pub(crate) fn addresses_of(&self, endpoints: &[u32]) -> [Arc<Ranges>; 2] {
        addresses_of(&self.endpoints, endpoints)
    }

    /// The endpoints that call a port by this name, with its protocol and number.
    pub(crate) fn ports(&self, name: &str) -> &[(u32, Protocol, u16)] {
        self.ports.get(name).map_or(&[], Vec::as_slice)
    }

    /// Enters an endpoint, and offers it to selections.
    fn offer(&mut self, number: u32, endpoint: &Endpoint) {
        let mut selections: Vec<u32> = self.unlabelled.clone();
        for (label, value) in &endpoint.labels {
            for value in [None, Some(value.as_str())] {
                let group = group_of(&mut self.labels, label, value);
                insert(&mut group.endpoints, number);
                selections.extend(&group.selections);
            }
        }
        for selection in selections {
            let of_number = &mut self.selections[selection];
            if matches(&of_number.wanted, endpoint) {
                insert(&mut of_number.picked, number);
                of_number.addresses = None;
                self.changes.selections.insert(selection);
            }
        }
        for (name, protocol, port) in named_ports(endpoint) {
            self.ports.entry_ref(name).or_default().push((number, protocol, port));
            self.changes.ports.insert(name.to_owned());
        }
    }

    /// The opposite of [`Peers::offer`].
    fn withdraw(&mut self, number: u32, endpoint: &Endpoint) {
        let mut selections: Vec<u32> = self.unlabelled.clone();
        for (label, value) in &endpoint.labels {
            for value in [None, Some(value.as_str())] {
                let group = group_of(&mut self.labels, label, value);
                remove(&mut group.endpoints, number);
                selections.extend(&group.selections);
                forget_unused(&mut self.labels, label, value);
            }
        }
        for selection in selections {
            let of_number = &mut self.selections[selection];
            if remove(&mut of_number.picked, number) {
                of_number.addresses = None;
                self.changes.selections.insert(selection);
            }
        }
        for (name, ..) in named_ports(endpoint) {
            if let Some(owners) = self.ports.get_mut(name) {
                owners.retain(|(owner, ..)| *owner != number);
            }
            self.changes.ports.insert(name.to_owned());
        }
    }

    fn group(&self, (label, value): LabelKey<'_>) -> Option<&Group> {
        let label = self.labels.get(label)?;
        match value {
            None => Some(&label.any),
            Some(value) => label.values.get(value),
        }
    }

    /// Labels of which everything that `selector` picks has at least one; `None`: there may be things without any. Of
    /// several choices the one that fewest endpoints have.
    fn keys<'selector>(&self, selector: &'selector Selector) -> Option<Vec<LabelKey<'selector>>> {
        let count = |keys: &Vec<LabelKey<'_>>| -> usize {
            keys.iter().filter_map(|key| self.group(*key)).map(|group| group.endpoints.len()).sum()
        };
        match selector {
            Selector::Equals(label, value) => Some(vec![(label, Some(value))]),
            Selector::In(label, values) => Some(values.iter().map(|value| (&**label, Some(&**value))).collect()),
            Selector::Has(label)
            | Selector::Contains(label, _)
            | Selector::StartsWith(label, _)
            | Selector::EndsWith(label, _) => Some(vec![(label, None)]),
            Selector::And(parts) => parts.iter().filter_map(|part| self.keys(part)).min_by_key(count),
            Selector::Or(parts) => Some(parts.iter().map(|part| self.keys(part)).collect::<Option<Vec<_>>>()?.concat()),
            Selector::All | Selector::Global | Selector::NotEquals(..) | Selector::NotIn(..) | Selector::Not(_) => None,
        }
    }
}

/// What an [`Arc`] is told apart by as long as it is kept.
pub(crate) fn identity<T>(value: &Arc<T>) -> usize {
    Arc::as_ptr(value).addr()
}

fn matches((selector, excluded): &Wanted, endpoint: &Endpoint) -> bool {
    let labels = &endpoint.labels;
    selector.matches(labels) && !excluded.as_ref().is_some_and(|excluded| excluded.matches(labels))
}

fn addresses_of(endpoints: &Slab<Known>, numbers: &[u32]) -> [Arc<Ranges>; 2] {
    Family::ALL.map(|family| {
        let nets = numbers.iter().flat_map(|number| &endpoints[*number].endpoint.nets);
        Arc::new(Ranges::of_nets(nets, family))
    })
}

/// The named ports that count: those of network sets do not.
fn named_ports(endpoint: &Endpoint) -> impl Iterator<Item = (&str, Protocol, u16)> {
    let counts = endpoint.kind != EndpointKind::NetworkSet;
    let ports = endpoint.ports.iter().filter(move |port| counts && port.protocol.has_ports());
    ports.map(|port| (port.name.as_str(), port.protocol, port.port))
}

fn group_of<'labels>(
    labels: &'labels mut HashMap<String, Label>,
    label: &str,
    value: Option<&str>,
) -> &'labels mut Group {
    let label = labels.entry_ref(label).or_default();
    match value {
        None => &mut label.any,
        Some(value) => label.values.entry_ref(value).or_default(),
    }
}

/// Forgets a value, and its label, that nothing has any more.
fn forget_unused(labels: &mut HashMap<String, Label>, label: &str, value: Option<&str>) {
    let is_unused = |group: &Group| group.endpoints.is_empty() && group.selections.is_empty();
    let Some(of_label) = labels.get_mut(label) else { return };
    if let Some(value) = value
        && of_label.values.get(value).is_some_and(is_unused)
    {
        of_label.values.remove(value);
    }
    if of_label.values.is_empty() && is_unused(&of_label.any) {
        labels.remove(label);
    }
}

fn insert(ascending: &mut Vec<u32>, number: u32) {
    if let Err(place) = ascending.binary_search(&number) {
        ascending.insert(place, number);
    }
}

/// Says whether it was there.
fn remove(ascending: &mut Vec<u32>, number: u32) -> bool {
    let place = ascending.binary_search(&number);
    if let Ok(place) = place {
        ascending.remove(place);
    }
    place.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(name: &str, labels: &[(&str, &str)]) -> Arc<Endpoint> {
        Arc::new(Endpoint {
            name: name.to_owned(),
            labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            ..Endpoint::default()
        })
    }

    const SELECTORS: [&str; 17] = [
        "",
        "global()",
        "a == 'x'",
        "a != 'x'",
        "a in {'z', 'x'}",
        "a not in {'z', 'x'}",
        "has(a)",
        "!has(a)",
        "a contains 'x'",
        "a starts with 'x'",
        "a ends with 'z'",
        "a == 'x' && b == 'y'",
        "a == 'x' || b == 'y' || has(c)",
        "a == 'x' || b != 'y'",
        "!(a == 'x') && has(a)",
        "a == 'nobody'",
        "nobody == 'x'",
    ];

    /// Selections made before and after endpoints change pick what a scan picks.
    #[test]
    fn the_index_picks_what_a_scan_picks() {
        let first = vec![
            endpoint("0", &[("a", "x"), ("b", "y")]),
            endpoint("1", &[("a", "xx")]),
            endpoint("2", &[("b", "y")]),
            endpoint("3", &[("a", "z"), ("c", "")]),
            endpoint("4", &[]),
        ];
        let mut second = first.clone();
        second[0] = endpoint("0", &[("a", "y")]);
        second[1] = endpoint("1", &[("a", "xx")]);
        second.remove(2);
        second.push(endpoint("5", &[("a", "x"), ("nobody", "x")]));
        let excluded = Selector::parse("c == ''").unwrap();

        let mut peers = Peers::default();
        let mut selections: Vec<(Selector, Option<&Selector>, u32)> = Vec::new();
        for (step, endpoints) in [Vec::new(), first, second, Vec::new()].iter().enumerate() {
            let numbers = peers.update(endpoints.iter());
            for text in SELECTORS {
                let selector = Selector::parse(text).unwrap();
                for excluded in [None, Some(&excluded)] {
                    selections.push((selector.clone(), excluded, peers.selection(&selector, excluded)));
                }
            }
            for (selector, excluded, selection) in &selections {
                let picked = endpoints.iter().zip(&numbers).filter(|(endpoint, _)| {
                    selector.matches(&endpoint.labels)
                        && !excluded.is_some_and(|excluded| excluded.matches(&endpoint.labels))
                });
                let mut picked: Vec<u32> = picked.map(|(_, number)| *number).collect();
                picked.sort_unstable();
                assert_eq!(peers.picked(*selection), picked, "{selector} without {excluded:?} in step {step}");
            }
        }
        for (.., selection) in selections {
            peers.release(selection);
        }
        assert!(peers.labels.is_empty() && peers.unlabelled.is_empty() && peers.selection_numbers.is_empty());
    }

    #[test]
    fn equal_endpoints_keep_their_numbers_and_change_nothing() {
        let mut peers = Peers::default();
        let numbers = peers.update([endpoint("0", &[("a", "x")]), endpoint("1", &[])].iter());
        let selection = peers.selection(&Selector::parse("has(a)").unwrap(), None);
        assert_eq!(peers.update([endpoint("1", &[]), endpoint("0", &[("a", "x")])].iter()), [numbers[1], numbers[0]]);
        assert!(peers.take_changes().selections.is_empty());
        assert_ne!(peers.update([endpoint("0", &[("a", "y")])].iter()), [numbers[0]]);
        assert!(peers.take_changes().selections.contains(&selection));
    }
}
