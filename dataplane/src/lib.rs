//! The dataplane: frames, rings, worker loop, stages, decide, forwarding.
//!
//! A reader follows the fast path through [`worker`] (the loop), [`pipeline`] (a burst), `straight` (what nearly all packets are), weir-packet's `parse` and `rewrite`, and
//! weir-conntrack's table; the first packet of a connection adds [`decide`].

pub mod action_log;
pub mod afxdp;
mod allowance;
pub mod attach;
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
pub mod memory;
pub mod memory_worker;
mod mix;
pub mod model;
pub mod offload;
pub mod pipeline;
pub mod prefix;
pub mod snapshot;
mod straight;
pub mod worker;
