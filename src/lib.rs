//! The commands: they read arguments, ask the crates below, and print. A file each; what they share is in [`common`].

pub mod bench;
pub mod check;
pub mod common;
pub mod conntrack;
pub mod demo;
pub mod detach;
pub mod diff;
pub mod ipam;
pub mod policy;
pub mod replay;
pub mod run;
pub mod services;
pub mod status;
pub mod trace;
pub mod verify;

/// Reading manifests allocates millions of small objects on all cores, and a router holds what it read for months: 50,000 services load in 4 s with this
/// one instead of 5.7 with glibc's, in less memory (perf/RESULTS.md). No packet's way allocates.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
