//! What a cluster wants of a node's router, made plain.
//!
//! Objects come in at the top and plain models leave at the bottom; each module knows only those above it:
//!
//! - [`text`]: YAML whose values know where they stand, and diagnostics that show the place.
//! - [`config`]: the router's own configuration, weir.yaml.
//! - [`resources`]: Kubernetes and Calico objects, each with its place.
//! - [`sources`]: where objects come from, and when to look again.
//! - [`sockets`]: the ports that the node itself uses, which services must leave to it.
//! - [`translate`]: objects to the models that the crates below compile their tables from, and what is wrong with them.
//! - [`compile`]: models to tables.
//! - [`trace`], [`policy`]: what these tables mean, asked without a router. [`diff`]: what a change makes of that. [`verify`]: whether what
//!   is in force is what it should be.

pub mod compile;
pub mod config;
pub mod diff;
pub mod policy;
pub mod resources;
pub mod sockets;
pub mod sources;
pub mod text;
pub mod trace;
pub mod translate;
pub mod verify;
