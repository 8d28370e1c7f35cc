//! The tests of this crate: one program, as each would take longer to link than its tests to run.

#[path = "../support/host_oracle.rs"]
mod host_oracle;
#[path = "../support/host_world.rs"]
mod host_world;
#[path = "../support/keys.rs"]
mod keys;
#[path = "../support/node.rs"]
mod node;
#[path = "../../../policy/tests/oracle/mod.rs"]
mod oracle;
#[path = "../support/packets.rs"]
mod packets;
#[path = "../support/router.rs"]
mod router;
#[path = "../support/segments.rs"]
mod segments;
#[path = "../support/veth.rs"]
mod veth;
#[allow(dead_code, reason = "the policy crate's own tests use the rest")]
#[path = "../../../policy/tests/world/mod.rs"]
mod world;

mod action_log;
mod affinity;
mod afxdp;
mod attach;
mod begins_anew;
mod checksums;
mod floods;
mod fragments;
mod hits;
mod host_agreement;
mod host_endpoints;
mod icmp_errors;
mod kernel_routes;
mod long_packets;
mod neighbors;
mod offload;
mod offload_keeper;
mod origins;
mod rejects;
mod service_changes;
mod snat;
mod two_ways;
mod worker;
