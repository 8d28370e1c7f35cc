//! Network policy compiled to a classifier.
//!
//! A [`Model`] (endpoints with labels and addresses; tiers, policies, rules and profiles) is compiled to a
//! [`Classifier`], which says of the first packet of a connection whether the policy of a local workload allows it,
//! and which rule decided. Nothing here knows YAML, devices or connections.
//!
//! # Theory
//!
//! A packet is a point in a space with a dimension per field, a rule a box in it, and the verdict that of the first box
//! that holds the point. Looking at every rule costs time by the number of rules; instead, each field is looked up
//! alone and answers with the set of rules that its value satisfies, as a bit vector in order of evaluation, and the
//! first bit of the intersection is the verdict (1). Values that satisfy the same rules form one class and share one
//! vector (2); vectors are sparse, with summaries above them, so that the intersection reads few words (3).
//!
//! 1. T. V. Lakshman, D. Stiliadis: High-Speed Policy-based Packet Forwarding Using Efficient Multi-dimensional Range
//!    Matching. SIGCOMM 1998.
//! 2. P. Gupta, N. McKeown: Packet Classification on Multiple Fields. SIGCOMM 1999.
//! 3. F. Baboescu, G. Varghese: Scalable Packet Classification. SIGCOMM 2001.
//!
//! # From rules to tables
//!
//! ```text
//! Model --peers--> sets of addresses --partition--> peer classes, per family  (addresses)
//!   |                                                   |
//!   +--resolve--> parts of rules --plan--> slots -------+--> rows per class, application, port  (program)
//! ```
//!
//! - Selectors are evaluated at compile time: a rule's peer is a set of addresses ([`mod@model`], `peers`, `parts`,
//!   `resolve`).
//! - Addresses that no rule of the node tells apart are one peer class: one lookup per address (`partition`,
//!   `addresses`). Where rules name ports, an address class with a protocol and a port is of a point class (`points`).
//! - Workloads with the same policies and profiles in a direction share a program, one per family. Its rules are one
//!   list of slots: tiers in order with their ends, then profiles; Pass is a jump to a later slot (`plan`, `program`).
//! - A program has rows for the fields that its rules look at; a program whose first rule matches everything, such as
//!   that of a workload without policy, answers without any lookup.
//! - Log rules decide nothing and are in no such program. Where a workload has any, a second program has them as well, up to
//!   the last of them; it is searched only to learn which of them a packet meets (`logged`).
//!
//! # Following changes
//!
//! A [`Compiler`] keeps all that a classifier was made from, each thing under a number that stays while the thing does
//! (`slab`), and makes anew what a change reaches (`compile`). What makes that little are classes whose numbers stay
//! (`classes`): a program that uses no set that gained or lost a class is shared between classifiers as it is.
//!
//! # Cost
//!
//! A verdict takes a hash lookup per address that rules look at, one more where they name its port, a step per factor of
//! 16 of the ranges of addresses and of ports that they tell apart (`steps`), and the intersection (`rows`): constant in the
//! number of policies, rules and members, but for words of the rows in which rules of a 64-rule block match by different
//! fields. With Pass, the intersection is searched again from the next tier on, so at most once per tier.
//!
//! # Where upstream is ambiguous
//!
//! - `selector` with `not_selector` is one selector over each known endpoint, as upstream evaluates it, also where two
//!   endpoints share an address.
//! - A named port is a port of any known endpoint with the packet's address, whichever endpoint of that address the
//!   rule's selector picked.
//! - Numeric ports match TCP, UDP and SCTP only; a rule that excludes ports matches packets without ports.
//! - An ICMP type matches ICMP and ICMPv6 alike where the rule does not say which; a rule that excludes one matches
//!   what is no ICMP.
//! - A profile that an endpoint names and nobody defines has no rules.

mod addresses;
mod classes;
mod classifier;
mod compile;
mod exact;
mod fingerprint;
mod limits;
mod logged;
pub mod model;
mod partition;
mod parts;
mod peers;
mod plan;
mod points;
mod policies;
mod program;
mod ranges;
mod resolve;
mod rows;
pub mod selector;
mod slab;
mod steps;
mod trie;

pub use classifier::{
    Classifier, EndpointId, HostEndpointId, Judgement, PolicyDirection, RuleId, RuleIdentity, RuleOrigin,
};
pub use compile::Compiler;
pub use limits::{CompileError, MAX_MEMBERSHIPS, MAX_ROW_WORDS, MAX_RULES_IN_PROGRAMS, MAX_RULES_PER_ENDPOINT};
pub use logged::LoggedRules;
pub use model::Model;
pub use selector::{Labels, Selector, SelectorError};
