//! `weir-cni`, the program, against the router's side of pods (weir-node) with a stand-in for control, in network namespaces.
//!
//! Needs root and iproute2. Ignored, and counted so, only with WEIR_SKIP_E2E=1.

mod addresses;
mod at_once;
mod crash;
mod failures;
mod lives;
mod looks;
mod node;
mod refused;
mod restarts;
