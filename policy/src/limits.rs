//! How large a model may be.

use thiserror::Error;

use crate::rows::MAX_BITS;

/// The most rules that apply to one workload in one direction. A rule may count several times: see
/// [`crate::model::EntityMatch::ports`].
pub const MAX_RULES_PER_ENDPOINT: usize = MAX_BITS;
/// The most rules of all programs together.
pub const MAX_RULES_IN_PROGRAMS: usize = 1 << 26;
/// The most memberships: address ranges that rules tell apart, each times the sets that it is in. Per family; ports of
/// one program have the same limit.
pub const MAX_MEMBERSHIPS: usize = 1 << 27;
/// The most 64-bit words in the rows of all programs.
pub const MAX_ROW_WORDS: usize = 1 << 28;

/// Why a model cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CompileError {
    /// Two local workloads, or two local host endpoints, have one name.
    #[error("two endpoints of this node are called {name}; give each its own name")]
    DuplicateEndpoint {
        /// Their name.
        name: String,
    },
    /// Too many rules apply to a workload.
    #[error(
        "{rules} rules apply to the {direction} traffic of {endpoint}, and at most {limit} can; have fewer policies select it"
    )]
    TooManyRules {
        /// The workload's name.
        endpoint: String,
        /// "ingress" or "egress".
        direction: &'static str,
        /// How many rules apply.
        rules: usize,
        /// [`MAX_RULES_PER_ENDPOINT`].
        limit: usize,
    },
    /// The rules of all workloads together are too many.
    #[error(
        "the rules of all workloads of this node, each counted once for each different set of policies that it is in, are more than {limit}; have fewer policies select them"
    )]
    TooManyRulesInPrograms {
        /// [`MAX_RULES_IN_PROGRAMS`].
        limit: usize,
    },
    /// The rules tell too many addresses apart.
    #[error(
        "the address sets of all IPv{version} rules have more than {limit} memberships; use fewer or smaller overlapping sets"
    )]
    TooManyAddresses {
        /// 4 or 6.
        version: u8,
        /// [`MAX_MEMBERSHIPS`].
        limit: usize,
    },
    /// One workload's rules take too much memory.
    #[error(
        "the rules for the {direction} traffic of {endpoint} need tables of more than {limit} words; have fewer policies select it"
    )]
    TablesTooLarge {
        /// The workload's name.
        endpoint: String,
        /// "ingress" or "egress".
        direction: &'static str,
        /// [`MAX_MEMBERSHIPS`], or what is left of [`MAX_ROW_WORDS`].
        limit: usize,
    },
}
