//! The order in which a program's rules are tried, and what each asks of a packet.

use hashbrown::HashSet;

use crate::{
    RuleId,
    classifier::UNDECIDED,
    fingerprint::Fingerprint,
    model::Action,
    parts::FamilySets,
    policies::Policies,
    program::{Outcome, Slot, Test},
    ranges::Family,
    resolve::{ResolvedRule, Resolver},
};

/// What one alternative of a rule asks of a packet of one family: sets by number.
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

    /// A number that equal conditions on equal sets share, in every process.
    fn fingerprint(&self, resolver: &Resolver, sets: &FamilySets) -> u64 {
        let address = |test| match test {
            Test::Any => [0, 0],
            Test::In(set) => [1, sets.address_fingerprint(set)],
            Test::NotIn(set) => [2, sets.address_fingerprint(set)],
        };
        let point = |test| match test {
            Test::Any => [0, 0],
            Test::In(set) => [1, sets.point_fingerprint(set)],
            Test::NotIn(set) => [2, sets.point_fingerprint(set)],
        };
        let mut fingerprint = Fingerprint::new(0);
        for words in [
            self.application.map_or([0, 0], |set| [1, resolver.applications.fingerprint(set)]),
            self.source_port.map_or([0, 0], |set| [1, resolver.source_ports.fingerprint(set)]),
            address(self.source),
            address(self.destination),
            point(self.source_point),
            point(self.destination_point),
        ] {
            words.into_iter().for_each(|word| fingerprint.add(word));
        }
        fingerprint.value()
    }
}

/// What a program is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// What decides: Log rules are left out.
    Verdict,
    /// Which Log rules match before.
    Logging,
}

/// A slot before its rows are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlannedSlot {
    pub(crate) slot: Slot,
    pub(crate) conditions: Conditions,
}

/// The slots laid out so far. A stage is a tier, or the profiles: what a Pass skips the rest of.
pub(crate) struct Plan<'all> {
    resolver: &'all Resolver,
    family: Family,
    purpose: Purpose,
    slots: Vec<PlannedSlot>,
    /// Conditions that the stage has had, Log rules' excepted: the same again can never be the first to match.
    seen: HashSet<Conditions>,
    /// Slots of the stage that continue at its end.
    passes: Vec<usize>,
    /// Whether a slot of the stage matches everything, so that nothing after it is reached.
    closed: bool,
}

impl<'all> Plan<'all> {
    pub(crate) fn new(resolver: &'all Resolver, family: Family, purpose: Purpose) -> Self {
        let (slots, seen, passes) = (Vec::new(), HashSet::new(), Vec::new());
        Self { resolver, family, purpose, slots, seen, passes, closed: false }
    }

    pub(crate) fn begin_stage(&mut self) {
        self.seen.clear();
        self.closed = false;
    }

    /// Whether nothing after what the stage has is reached.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Adds what a rule does. In a profile Pass denies.
    pub(crate) fn add(&mut self, rule: &ResolvedRule, profile: bool) {
        let is_log = rule.action == Action::Log;
        if rule.ip_version.is_some_and(|version| version != self.family.version())
            || is_log && self.purpose == Purpose::Verdict
        {
            return;
        }
        let begin = self.slots.len();
        let parts = &self.resolver.parts;
        for alternative in &rule.alternatives {
            let (Some(source), Some(destination), Some(source_point), Some(destination_point)) = (
                parts.address_test(alternative.source, self.family),
                parts.address_test(alternative.destination, self.family),
                parts.point_test(alternative.source_point, self.family),
                parts.point_test(alternative.destination_point, self.family),
            ) else {
                continue;
            };
            let (application, source_port) = (alternative.application, alternative.source_port);
            let conditions =
                Conditions { application, source_port, source, destination, source_point, destination_point };
            let outcome = match rule.action {
                // The end of the rule is not known yet.
                Action::Log => Outcome::Log(u32::MAX),
                Action::Allow => Outcome::Allow,
                Action::Deny => Outcome::Deny,
                Action::Pass if profile => Outcome::Deny,
                // The end of the stage is not known yet.
                Action::Pass => Outcome::Continue(u32::MAX),
            };
            self.push(outcome, rule.rule, conditions);
        }
        if is_log {
            // Its other alternatives would only log it again.
            let end = self.slots.len() as u32;
            self.slots[begin..].iter_mut().for_each(|planned| planned.slot.outcome = Outcome::Log(end));
        }
    }

    pub(crate) fn push(&mut self, outcome: Outcome, rule: RuleId, conditions: Conditions) {
        if self.closed || self.seen.contains(&conditions) {
            return;
        }
        if !matches!(outcome, Outcome::Log(_)) {
            self.seen.insert(conditions);
            self.closed = conditions == Conditions::NONE;
        }
        if matches!(outcome, Outcome::Continue(_)) {
            self.passes.push(self.slots.len());
        }
        self.slots.push(PlannedSlot { slot: Slot { outcome, rule }, conditions });
    }

    /// Says whether no packet gets beyond this stage.
    pub(crate) fn end_stage(&mut self) -> bool {
        let end = self.slots.len() as u32;
        let passed = !self.passes.is_empty();
        for pass in self.passes.drain(..) {
            self.slots[pass].slot.outcome = Outcome::Continue(end);
        }
        self.closed && !passed
    }

    /// The slots; to log with, only up to the last Log rule, and none without any.
    pub(crate) fn finish(mut self) -> Vec<PlannedSlot> {
        if self.purpose == Purpose::Logging {
            let is_log = |planned: &PlannedSlot| matches!(planned.slot.outcome, Outcome::Log(_));
            let end = self.slots.iter().rposition(is_log).map_or(0, |last| last + 1);
            self.slots.truncate(end);
            for planned in &mut self.slots {
                if let Outcome::Continue(next) = &mut planned.slot.outcome {
                    *next = (*next).min(end as u32);
                }
            }
            if end > 0 {
                // Whatever decides behind, nothing more is logged.
                let slot = Slot { outcome: Outcome::Deny, rule: Policies::NO_PROFILE };
                self.slots.push(PlannedSlot { slot, conditions: Conditions::NONE });
            }
        }
        self.slots
    }
}

/// A number that programs with equal slots share, in every process; the rules' names have no part in it.
pub(crate) fn fingerprint(slots: &[PlannedSlot], resolver: &Resolver, family: Family) -> u64 {
    let sets = &resolver.parts.families[family as usize];
    let mut fingerprint = Fingerprint::new(slots.len() as u64);
    for planned in slots {
        fingerprint.add(match planned.slot.outcome {
            // What a stage leaves to those after it, where an Allow would be the last word.
            Outcome::Allow if planned.slot.rule == UNDECIDED => u64::MAX,
            Outcome::Allow => 0,
            Outcome::Deny => 1,
            Outcome::Continue(next) | Outcome::Log(next) => 2 + u64::from(next),
        });
        fingerprint.add(planned.conditions.fingerprint(resolver, sets));
    }
    fingerprint.value()
}
