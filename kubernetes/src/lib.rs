//! A running Kubernetes API server as a source of objects.
//!
//! [`Source`] follows all kinds that weir reads, on a thread of its own, and has them as [`LiveObjects`] for the loader. What is done with one kind is
//! pure ([`follow`]); [`watch`] speaks for it, by way of [`dial`]. Which kinds there are is [`resource`]. What a node says itself is [`speak`].

mod compare;
pub mod dial;
pub mod follow;
mod keep;
pub mod resource;
mod source;
pub mod speak;
pub mod watch;
mod wire;

pub use compare::Unlike;
pub use dial::{Access, Failure, access_of};
pub use source::{KindState, Lister, Settings, Source, State, start_delay};
pub use weir_cluster::resources::live::LiveObjects;
