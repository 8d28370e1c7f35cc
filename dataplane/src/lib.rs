//! The dataplane: frames, rings, worker loop, stages, decide, forwarding.
//!
//! A reader follows the fast path through [`worker`] (the loop), [`pipeline`] (a burst, and the stages of a packet's life in their order),
//! weir-packet's `parse` and `rewrite`, and weir-conntrack's table; the first packet of a connection adds [`decide`].
//!
//! No two files name each other: what acts lies above the plain data that it acts on.

pub mod action_log;
pub mod afxdp;
mod allowance;
pub mod attach;
pub mod clock;
pub mod counters;
pub mod decide;
pub mod driver;
pub mod forwarding;
pub mod fragments;
pub mod frame;
pub mod held;
pub mod hits;
pub mod host_endpoints;
pub mod host_policy;
pub mod host_rules;
pub mod memory;
pub mod memory_worker;
mod mix;
pub mod model;
mod next_hops;
pub mod offload;
pub mod origin;
pub mod pipeline;
pub mod prefix;
mod rejudge;
mod roster;
pub mod snapshot;
pub mod tables;
pub mod worker;
