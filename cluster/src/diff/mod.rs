//! `weir diff`: what changed objects would do, before anybody applies them.
//!
//! Two loads of the same cluster are compared, one with the changes and one without: who may reach whom ([`policy`]), what services answer
//! ([`services`]), and what is wrong.

pub mod policy;
pub mod services;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use crate::{
    text::{Problems, Severity},
    translate::Loaded,
};

/// What is wrong with one of two loads and not with the other, a line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProblemDiff {
    /// What the change brings.
    pub added: Vec<String>,
    /// What it mends.
    pub removed: Vec<String>,
}

/// Compares what is wrong, errors and warnings. `all` is what [`crate::translate::Loader::reload`] gives beside a load where something is at fault.
pub fn problems(before: (&Loaded, Option<&Problems>), after: (&Loaded, Option<&Problems>)) -> ProblemDiff {
    let lines = |(loaded, all): (&Loaded, Option<&Problems>)| -> BTreeSet<String> {
        let problems = all.unwrap_or(&loaded.notes);
        let of = |severity| problems.of(severity).map(|one| problems.line(one));
        of(Severity::Error).chain(of(Severity::Warning)).collect()
    };
    let (before, after) = (lines(before), lines(after));
    ProblemDiff { added: (&after - &before).into_iter().collect(), removed: (&before - &after).into_iter().collect() }
}
