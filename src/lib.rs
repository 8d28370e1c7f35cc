//! The `weir` command's parts: configuration, translation of resources, control, telemetry.
//!
//! - [`config`]: YAML with positions, diagnostics, and weir.yaml.
//! - [`manifests`]: Kubernetes and Calico resources.
//! - [`translate`]: resources to the plain models that the dataplane compiles its tables from.
//! - [`compile`]: models to tables.
//! - [`prepare`]: a changed configuration made ready beside the running router.
//! - [`check`], [`trace`], [`policy`], [`replay`], [`run`], [`demo`]: the commands of these names. `weir bench` is weir-benches'.
//! - [`services`]: the services of a running router.
//! - `action_log`: the lines that Log rules write.
//! - [`flow`], [`explain`]: what traces are asked, and how they tell of services.
//! - [`control`]: asking a running router; [`report`]: what is printed alike.
//! - [`ipam`]: the addresses of this node's pods.
//! - [`health`]: what load balancers ask of the node.
//! - `pods`: the pods that weir itself makes on its node, as control keeps them.
//! - [`kernel`]: the node's kernel, followed and set up.
//! - [`watch`]: when to reload.
//! - [`lab`]: clusters in network namespaces, for the demo and the end-to-end tests.

mod action_log;
pub mod check;
pub mod compile;
pub mod config;
pub mod connections;
pub mod conntrack;
pub mod control;
pub mod demo;
pub mod explain;
pub mod flow;
pub mod health;
pub mod ipam;
pub mod kernel;
pub mod lab;
mod listener;
pub mod manifests;
pub mod memory_demo;
pub mod memory_router;
mod offload;
mod pods;
pub mod policy;
mod prefixes;
pub mod prepare;
pub mod replay;
pub mod report;
pub mod run;
pub mod services;
mod snat_use;
pub mod trace;
pub mod translate;
mod trouble;
pub mod watch;
