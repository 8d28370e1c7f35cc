//! Services compiled to a lookup table: backend selection, masquerade decision, SNAT port choice.
//!
//! [`Model`] is what the configuration says, in plain types. [`ServiceTable::compile`] turns it into an immutable table
//! that is part of a snapshot, and [`Compiler`] one after another, with what endpoints have changed; [`Services::decide`] answers, for the first packet of a connection, what kube-proxy would
//! do with it. [`Affinity`] remembers which backend a client had. [`SnatPorts`] chooses the source port of a masqueraded connection. None of them knows the
//! connection table, policy, or where the model came from.

mod affinity;
mod again;
mod compile;
mod listed;
mod model;
mod ranges;
mod snat;
mod table;
mod usage;

pub use affinity::{Affinity, Choice, Clients, Evidence, MAX_AFFINITY_SECONDS};
pub use again::Compiler;
pub use compile::CompileError;
pub use model::{Endpoint, HostAddresses, Model, ServicePort, ServicePorts, Topology, TrafficPolicy};
pub use snat::{AllocateError, Allocated, Attempt, MAX_TRIES, NoSnatPorts, SnatPorts};
pub use table::{
    Backend, BackendIdentity, BackendSlot, Conflict, Decision, Family, Foreseen, ServiceId, ServiceTable, Services,
    Source, Standing,
};
pub use usage::{Usage, WhyNot, usage};
