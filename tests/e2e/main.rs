//! End to end: clusters in network namespaces, real servers and clients, routers on AF_XDP.
//!
//! Needs root and the packages that `make setup` installs. Ignored, and counted so, only with WEIR_SKIP_E2E=1 (`build.rs` hands that to the
//! compiler, so a change of the variable builds anew). WEIR_E2E_BIN names another `weir` to test, as a release build.
//!
//! Every test ends with [`site::Site::finish`]: routers at rest whose counters balance, no drop that no test expects, a clean end on SIGTERM
//! without a lost frame (debug builds prove that).

mod calico_policy;
mod conntrack;
mod denied;
mod errors;
mod forwarded;
mod fragments;
mod half_truths;
mod hits;
mod host_endpoints;
mod host_ports;
mod hostile;
mod ipv6;
mod jumbo;
mod kernel;
mod lifecycle;
mod load_balancer;
mod manifests;
mod offload;
mod offload_only;
mod one_node;
mod own_node;
mod path_mtu;
mod pods;
mod policy;
mod reach;
mod scale;
mod services;
mod site;
mod storm;
mod two_nodes;
mod verify;
