//! How many new connections each policy rule decided about, and how many each backend got, over all snapshots.
//!
//! Workers count in the tallies of the rules that they judge by ([`Rules::hits`]), at the first packet of a connection only. When
//! rules are replaced, some worker may still be in a turn that judges by the old ones; so these are kept, and their counts are moved
//! into the archive when nobody else holds them any more. There, counts are kept by what a rule or backend is, not by its number, so that one
//! that stays keeps its hits through any reload.
//!
//! The archive forgets rules and backends that are gone once it holds twice as many as there are: its memory is bounded by theirs.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use weir_nat::BackendIdentity;
use weir_policy::{RuleId, RuleIdentity};

use crate::snapshot::Rules;

/// Identities that the archive may hold in any case.
const ARCHIVE_FLOOR: usize = 1024;

/// The hits of all rules and backends since the start.
#[derive(Clone, Debug)]
pub struct Hits {
    current: Arc<Rules>,
    /// Rules that were replaced, and that a worker may still judge by.
    replaced: Vec<Arc<Rules>>,
    archive: HashMap<RuleIdentity, u64>,
    backends: HashMap<BackendIdentity, u64>,
}

impl Hits {
    /// Without a hit so far.
    pub fn new(current: Arc<Rules>) -> Self {
        Self { current, replaced: Vec::new(), archive: HashMap::new(), backends: HashMap::new() }
    }

    /// Follows a publication: `current` are the rules from now on. The same rules again change nothing.
    pub fn follow(&mut self, current: &Arc<Rules>) {
        if !Arc::ptr_eq(&self.current, current) {
            self.replaced.push(std::mem::replace(&mut self.current, Arc::clone(current)));
        }
        self.settle();
    }

    /// The hits by rule; rules without any are left out. Of a rule that is gone there may be hits or not.
    pub fn by_rule(&self) -> HashMap<RuleIdentity, u64> {
        let mut hits = self.archive.clone();
        for rules in self.replaced.iter().chain([&self.current]) {
            add(&mut hits, rules);
        }
        hits
    }

    /// The hits by backend; backends without any are left out. Of a backend that is gone there may be hits or not.
    pub fn by_backend(&self) -> HashMap<BackendIdentity, u64> {
        let mut hits = self.backends.clone();
        for rules in self.replaced.iter().chain([&self.current]) {
            add_backends(&mut hits, rules);
        }
        hits
    }

    /// Moves the counts of rules that nobody judges by any more into the archive.
    fn settle(&mut self) {
        let (archive, backends) = (&mut self.archive, &mut self.backends);
        // A snapshot that a worker may be reading holds them, and no new one is made with them.
        self.replaced.retain_mut(|rules| match Arc::get_mut(rules) {
            Some(rules) => {
                add(archive, rules);
                add_backends(backends, rules);
                false
            }
            None => true,
        });
        let policy = &self.current.policy;
        if self.archive.len() > ARCHIVE_FLOOR.max(2 * policy.rule_count()) {
            let identity = |rule| policy.describe(rule).identity();
            let kept: HashMap<RuleIdentity, u64> =
                policy.rules().filter_map(|rule| self.archive.remove_entry(&identity(rule))).collect();
            self.archive = kept;
        }
        let services = &self.current.services;
        let (v4, v6) = (services.services::<Ipv4Addr>(), services.services::<Ipv6Addr>());
        if self.backends.len() > ARCHIVE_FLOOR.max(2 * (v4.slots() + v6.slots())) {
            let current = v4.backends().chain(v6.backends());
            let kept = current.filter_map(|(_, backend)| self.backends.remove_entry(&backend)).collect();
            self.backends = kept;
        }
    }
}

fn add_backends(hits: &mut HashMap<BackendIdentity, u64>, rules: &Rules) {
    for (backend, count) in rules.backend_hits() {
        *hits.entry(backend).or_default() += count;
    }
}

fn add(hits: &mut HashMap<RuleIdentity, u64>, rules: &Rules) {
    for (number, count) in rules.hits.sums() {
        *hits.entry(rules.policy.describe(RuleId(number as u32)).identity()).or_default() += count;
    }
}
