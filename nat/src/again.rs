//! One table after another.
//!
//! In a large cluster, nearly every change is one of a few endpoints, and several come each second. What endpoints have no part in is then
//! shared with the table before, arrays are copied, which takes a millisecond for ten megabytes, and only the service ports that changed are
//! laid out anew: where they were, if there is room, else at the end. What becomes unused so is bounded, by compiling everything anew.

use std::{cmp::Ordering, sync::Arc};

use weir_packet::Address;

use crate::{
    CompileError, Model, ServicePort,
    compile::{Scratch, check_port, place_of, places_of},
    table::{ServiceId, ServiceTable, Services},
};

/// Of how many service ports one may have changed; where more have, all are compiled.
const MOST_CHANGED: usize = 8;
/// Places without a backend that a table may have, besides half as many as it has backends.
const SPARE: usize = 1024;

/// Compiles models that follow each other.
#[derive(Debug, Default)]
pub struct Compiler {
    last: Option<(Model, Arc<ServiceTable>)>,
}

impl Compiler {
    /// The table of `model`; of the table before, what did not change.
    ///
    /// # Errors
    /// As [`ServiceTable::compile`].
    pub fn compile(&mut self, model: &Model) -> Result<Arc<ServiceTable>, CompileError> {
        let table = match &self.last {
            Some((before, table)) if before.services.is(&model.services) && before == model => {
                return Ok(Arc::clone(table));
            }
            Some((before, table)) => changed(before, model).and_then(|changed| table.with(before, model, &changed)),
            None => None,
        };
        let table = Arc::new(table.map_or_else(|| ServiceTable::compile(model), Ok)?);
        self.last = Some((model.clone(), Arc::clone(&table)));
        Ok(table)
    }
}

/// A service port that has other endpoints than before.
struct Changed<'m> {
    id: ServiceId,
    before: &'m ServicePort,
    after: &'m ServicePort,
}

/// What changed from one model to the next; `None` where that is not endpoints only, and not few.
fn changed<'m>(before: &'m Model, after: &'m Model) -> Option<Vec<Changed<'m>>> {
    let services = &before.services;
    if !before.is_of_same_node(after) || services.len() != after.services.len() {
        return None;
    }
    let pairs = (0..).map(ServiceId).zip(services.iter().zip(&after.services));
    let others = pairs.filter(|(_, (before, after))| !Arc::ptr_eq(before, after));
    let most = services.len().div_ceil(MOST_CHANGED);
    let changed: Vec<Changed<'_>> =
        others.take(most + 1).map(|(id, (before, after))| Changed { id, before, after }).collect();
    let is_of_endpoints = |Changed { before, after, .. }: &Changed<'_>| {
        before.differs_in_endpoints_only(after)
            && [false, true].into_iter().all(|is_ipv6| before.serves(is_ipv6) == after.serves(is_ipv6))
            && check_port(after).is_ok()
    };
    (changed.len() <= most && changed.iter().all(is_of_endpoints)).then_some(changed)
}

impl ServiceTable {
    /// The table of `after`, which differs in some endpoints from `before`, whose table this is. `None` where it is time to compile everything.
    fn with(&self, before: &Model, after: &Model, changed: &[Changed<'_>]) -> Option<Self> {
        let Self { v4, v6, ports } = self;
        Some(Self {
            v4: v4.with(before, after, changed)?,
            v6: v6.with(before, after, changed)?,
            ports: Arc::clone(ports),
        })
    }
}

impl<A: Address> Services<A> {
    fn with(&self, before: &Model, after: &Model, changed: &[Changed<'_>]) -> Option<Self> {
        let more: usize = changed.iter().map(|changed| changed.after.endpoints.len()).sum();
        let mut backends = Vec::with_capacity(self.backends.len() + more);
        backends.extend_from_slice(&self.backends);
        let (mut records, mut listed) = (self.records.clone(), self.listed.clone());
        let mut scratch = Scratch::default();
        let mut laid_out = Vec::new();
        for &Changed { id, before, after: port } in changed {
            places_of(before).for_each(|place| listed.remove(place));
            places_of(port).for_each(|place| listed.add(place));
            let Ok(record) = records.binary_search_by_key(&id, |record| record.service) else { continue };
            laid_out.clear();
            let segments = scratch.lay_out(after, port, &mut laid_out);
            let bounds = &mut records[record].segments;
            let [start, .., end] = bounds.map(|bound| bound as usize);
            let start = if laid_out.len() <= end - start {
                backends[start..start + laid_out.len()].copy_from_slice(&laid_out);
                start
            } else {
                backends.extend_from_slice(&laid_out);
                backends.len() - laid_out.len()
            };
            *bounds = segments.map(|bound| start as u32 + bound);
        }
        difference(&before.unserved, &after.unserved, |place, is_new| {
            if let Some(place) = place_of(place) {
                if is_new { listed.add(place) } else { listed.remove(place) }
            }
        });
        let used: usize = records.iter().map(|record| (record.segments[4] - record.segments[0]) as usize).sum();
        let is_tidy = backends.len() <= used + used / 2 + SPARE && u32::try_from(backends.len()).is_ok();
        is_tidy.then(|| Self {
            frontends: self.frontends.clone(),
            addresses: self.addresses.clone(),
            records,
            backends: backends.into(),
            guards: self.guards.clone(),
            listed,
            pods: self.pods.clone(),
            locals: self.locals.clone(),
            service_ranges: self.service_ranges.clone(),
            masquerade_all: self.masquerade_all,
        })
    }
}

/// Tells of what is in one of two sorted lists and not in the other, as often as it is there more often: whether it is in `after`.
fn difference<T: Ord>(before: &[T], after: &[T], mut tell: impl FnMut(&T, bool)) {
    let (mut before, mut after) = (before.iter().peekable(), after.iter().peekable());
    loop {
        let order = match (before.peek(), after.peek()) {
            (None, None) => return,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(one), Some(other)) => one.cmp(other),
        };
        let gone = before.next_if(|_| order.is_le());
        let come = after.next_if(|_| order.is_ge());
        match (gone, come) {
            (Some(gone), None) => tell(gone, false),
            (None, Some(come)) => tell(come, true),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use weir_packet::Protocol;

    use super::*;
    use crate::Endpoint;

    fn endpoints(count: u32) -> Vec<Endpoint> {
        let endpoint = |number: u32| Endpoint {
            address: Ipv4Addr::from(0x0a01_0000 + number).into(),
            port: 80,
            ready: true,
            serving: true,
            terminating: false,
            topology: None,
        };
        (0..count).map(endpoint).collect()
    }

    fn model() -> Model {
        let port = |number: u8| ServicePort {
            name: format!("x/s{number}"),
            protocol: Protocol::TCP,
            port: 80,
            cluster_ips: vec![IpAddr::from([10, 96, 0, number])],
            endpoints: endpoints(8),
            ..ServicePort::default()
        };
        Model { services: (0..32).map(|number| Arc::new(port(number))).collect(), ..Model::default() }
    }

    fn places(table: &ServiceTable) -> usize {
        table.services::<Ipv4Addr>().slots()
    }

    #[test]
    fn what_shrinks_stays_where_it_is_and_what_grows_moves_to_the_end() {
        let (mut compiler, mut model) = (Compiler::default(), model());
        let first = compiler.compile(&model).unwrap();
        assert_eq!(places(&first), 32 * 8);
        assert!(Arc::ptr_eq(&first, &compiler.compile(&model).unwrap()), "nothing has changed");
        let mut with = |model: &mut Model, count| {
            Arc::make_mut(&mut model.services[3]).endpoints = endpoints(count);
            let table = compiler.compile(model).unwrap();
            assert!(table.differs_in_endpoints_only(&first));
            places(&table)
        };
        assert_eq!(with(&mut model, 2), 32 * 8);
        assert_eq!(with(&mut model, 0), 32 * 8);
        assert_eq!(with(&mut model, 3), 32 * 8 + 3);
        assert_eq!(with(&mut model, 9), 32 * 8 + 3 + 9);
    }

    #[test]
    fn places_that_no_service_has_any_more_are_bounded() {
        let (mut compiler, mut model) = (Compiler::default(), model());
        let mut afresh = 0;
        let mut last = compiler.compile(&model).unwrap();
        for step in 0..3000 {
            let which = step % 32;
            let count = model.services[which].endpoints.len() as u32;
            Arc::make_mut(&mut model.services[which]).endpoints = endpoints(if count == 8 { 7 } else { 8 });
            let table = compiler.compile(&model).unwrap();
            let used = model.services.iter().map(|service| service.endpoints.len()).sum::<usize>();
            assert!(places(&table) <= used * 3 / 2 + SPARE, "{} of {used}", places(&table));
            afresh += usize::from(!table.differs_in_endpoints_only(&last));
            last = table;
        }
        assert!((2..20).contains(&afresh), "{afresh}");
    }

    #[test]
    fn whatever_else_changes_compiles_everything() {
        type Change = fn(&mut Model);
        let changes: [(&str, Change); 6] = [
            ("node", |model| model.node_name = "b".into()),
            ("ports", |model| Arc::make_mut(&mut model.services[0]).port = 81),
            ("name", |model| Arc::make_mut(&mut model.services[0]).name = "x/other".into()),
            ("number", |model| Arc::make_mut(&mut model.services[0]).origin = 7),
            ("gone", |model| drop(model.services.pop())),
            ("most", |model| {
                model.services.iter_mut().take(5).for_each(|port| Arc::make_mut(port).endpoints = endpoints(1));
            }),
        ];
        for (what, change) in changes {
            let (mut compiler, mut model) = (Compiler::default(), model());
            let before = compiler.compile(&model).unwrap();
            change(&mut model);
            let after = compiler.compile(&model).unwrap();
            assert!(!after.differs_in_endpoints_only(&before), "{what}");
        }
        let (mut compiler, mut model) = (Compiler::default(), model());
        compiler.compile(&model).unwrap();
        Arc::make_mut(&mut model.services[0]).endpoints[0].port = 0;
        assert!(matches!(compiler.compile(&model), Err(CompileError::ZeroPort { .. })));
        // And what was good before is so still.
        Arc::make_mut(&mut model.services[0]).endpoints[0].port = 1;
        compiler.compile(&model).unwrap();
    }

    #[test]
    fn differences_count_how_often() {
        let mut told = Vec::new();
        difference(&[1, 1, 2, 4, 4], &[1, 2, 2, 3, 4, 4, 5], |one, is_new| told.push((*one, is_new)));
        assert_eq!(told, [(1, false), (2, true), (3, true), (5, true)]);
    }
}
