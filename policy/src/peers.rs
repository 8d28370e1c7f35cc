//! Endpoints by label: which of them a selector picks, and the addresses and named ports that they have.

use std::sync::Arc;

use hashbrown::HashMap;
use weir_packet::Protocol;

use crate::{
    Selector,
    model::{Endpoint, EndpointKind},
    ranges::{Family, Ranges},
};

/// The endpoints of a model, indexed so that a selector looks only at those that one of its labels admits.
pub(crate) struct Peers<'model> {
    endpoints: &'model [Arc<Endpoint>],
    /// By label, then value: endpoints that have it, ascending.
    by_value: HashMap<&'model str, HashMap<&'model str, Vec<u32>>>,
    /// By label: endpoints that have it, ascending.
    by_label: HashMap<&'model str, Vec<u32>>,
    /// By name of a port: endpoints that have it, the protocol and the number.
    by_port: HashMap<&'model str, Vec<(u32, Protocol, u16)>>,
}

impl<'model> Peers<'model> {
    pub(crate) fn new(endpoints: &'model [Arc<Endpoint>]) -> Self {
        let mut peers = Self { endpoints, by_value: HashMap::new(), by_label: HashMap::new(), by_port: HashMap::new() };
        for (index, endpoint) in endpoints.iter().enumerate() {
            let index = index as u32;
            for (label, value) in &endpoint.labels {
                peers.by_label.entry(label).or_default().push(index);
                peers.by_value.entry(label).or_default().entry(value.as_str()).or_default().push(index);
            }
            if endpoint.kind != EndpointKind::NetworkSet {
                for port in endpoint.ports.iter().filter(|port| port.protocol.has_ports()) {
                    peers.by_port.entry(&port.name).or_default().push((index, port.protocol, port.port));
                }
            }
        }
        peers
    }

    /// The endpoints that `selector` picks and `excluded` does not, ascending.
    pub(crate) fn picked(&self, selector: &Selector, excluded: Option<&Selector>) -> Vec<u32> {
        let mut picked = self.candidates(selector).unwrap_or_else(|| (0..self.endpoints.len() as u32).collect());
        picked.retain(|index| {
            let labels = &self.endpoints[*index as usize].labels;
            selector.matches(labels) && !excluded.is_some_and(|excluded| excluded.matches(labels))
        });
        picked
    }

    /// The addresses of `family` that these endpoints have.
    pub(crate) fn addresses(&self, endpoints: &[u32], family: Family) -> Ranges {
        Ranges::of_nets(endpoints.iter().flat_map(|index| &self.endpoints[*index as usize].nets), family)
    }

    /// The endpoints that call a port by this name, with its protocol and number.
    pub(crate) fn ports(&self, name: &str) -> &[(u32, Protocol, u16)] {
        self.by_port.get(name).map_or(&[], Vec::as_slice)
    }

    /// A superset of what `selector` picks, ascending; `None`: no better one than all.
    fn candidates(&self, selector: &Selector) -> Option<Vec<u32>> {
        let with_value = |label: &str, value: &str| -> &[u32] {
            self.by_value.get(label).and_then(|values| values.get(value)).map_or(&[], Vec::as_slice)
        };
        match selector {
            Selector::Equals(label, value) => Some(with_value(label, value).to_vec()),
            Selector::In(label, values) => {
                let mut all: Vec<u32> = values.iter().flat_map(|value| with_value(label, value)).copied().collect();
                all.sort_unstable();
                Some(all)
            }
            Selector::Has(label)
            | Selector::Contains(label, _)
            | Selector::StartsWith(label, _)
            | Selector::EndsWith(label, _) => Some(self.by_label.get(label.as_str()).cloned().unwrap_or_default()),
            Selector::And(parts) => parts.iter().filter_map(|part| self.candidates(part)).min_by_key(Vec::len),
            Selector::Or(parts) => {
                let mut all = parts.iter().map(|part| self.candidates(part)).collect::<Option<Vec<_>>>()?.concat();
                all.sort_unstable();
                all.dedup();
                Some(all)
            }
            Selector::All | Selector::Global | Selector::NotEquals(..) | Selector::NotIn(..) | Selector::Not(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(labels: &[(&str, &str)]) -> Arc<Endpoint> {
        Arc::new(Endpoint {
            labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            ..Endpoint::default()
        })
    }

    #[test]
    fn the_index_picks_what_a_scan_picks() {
        let endpoints = [
            endpoint(&[("a", "x"), ("b", "y")]),
            endpoint(&[("a", "xx")]),
            endpoint(&[("b", "y")]),
            endpoint(&[("a", "z"), ("c", "")]),
            endpoint(&[]),
        ];
        let peers = Peers::new(&endpoints);
        for text in [
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
        ] {
            let selector = Selector::parse(text).unwrap();
            let excluded = Selector::parse("c == ''").unwrap();
            let scan = |excluded: Option<&Selector>| -> Vec<u32> {
                (0..5u32)
                    .filter(|index| {
                        let labels = &endpoints[*index as usize].labels;
                        selector.matches(labels) && !excluded.is_some_and(|excluded| excluded.matches(labels))
                    })
                    .collect()
            };
            assert_eq!(peers.picked(&selector, None), scan(None), "{text}");
            assert_eq!(peers.picked(&selector, Some(&excluded)), scan(Some(&excluded)), "{text}");
        }
    }
}
