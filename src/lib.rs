//! The commands: they read arguments, ask the crates below, and print. A file each; what they share is in [`common`].

pub mod bench;
pub mod check;
pub mod common;
pub mod conntrack;
pub mod demo;
pub mod detach;
pub mod ipam;
pub mod policy;
pub mod replay;
pub mod run;
pub mod services;
pub mod status;
pub mod trace;
