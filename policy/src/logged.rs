//! The Log rules that a packet meets on its way to the rule that decides.

use std::ops::Deref;

use crate::RuleId;

/// Log rules in the order of evaluation: those that match a packet and stand before what decides about it.
///
/// Bounded, so that what a packet costs does not grow with its rules: those after the first [`Self::MOST`] are left out.
#[derive(Clone, Copy, Debug)]
pub struct LoggedRules {
    rules: [RuleId; Self::MOST],
    count: usize,
}

impl LoggedRules {
    /// The most that are kept.
    pub const MOST: usize = 4;
    /// No rules.
    pub(crate) const NONE: Self = Self { rules: [RuleId(0); Self::MOST], count: 0 };

    /// Keeps one more; whether there is room for another.
    pub(crate) fn add(&mut self, rule: RuleId) -> bool {
        self.rules[self.count] = rule;
        self.count += 1;
        self.count < Self::MOST
    }
}

impl Deref for LoggedRules {
    type Target = [RuleId];

    fn deref(&self) -> &[RuleId] {
        &self.rules[..self.count]
    }
}
