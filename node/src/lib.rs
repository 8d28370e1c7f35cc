//! The router of a node.
//!
//! - [`run`]: the router from its start to its end; `router`: control, which decides what is in force. [`prepare`]: a changed configuration made ready beside the running router.
//! - [`kernel`]: the node's kernel, followed and set up.
//! - [`pods`]: pods made and taken away, and their addresses ([`ipam`]); `book`: those pods as control keeps them.
//! - [`control`]: asking a running router; [`conntrack`], [`services`]: answers of many lines; [`report`]: what is told alike.
//! - `keeper`: the objects in force kept for the next start.
//! - `programming`: how long a change of endpoints takes to be in force.
//! - [`connections`]: where the connection tables are. [`health`]: what load balancers ask of the node. `web`: what
//!   weir says of itself over HTTP, `metrics` in it.
//! - [`memory_router`]: the same pipeline over memory rings, for replays.

mod action_log;
mod book;
pub mod connections;
pub mod conntrack;
pub mod control;
pub mod health;
mod http;
pub mod ipam;
mod keeper;
pub mod kernel;
mod listener;
pub mod memory_router;
mod metrics;
mod offload;
pub mod pods;
mod prefixes;
pub mod prepare;
mod programming;
pub mod report;
mod router;
pub mod run;
pub mod services;
mod snat_use;
mod trouble;
mod web;
