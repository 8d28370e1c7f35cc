//! The CNI plugin of weir, and what it and the router on its node say to each other.
//!
//! The plugin knows the CNI specification (<https://www.cni.dev/docs/spec/>, 1.1.0) and nothing about networks: it reads its
//! environment and its standard input ([`invocation`], [`config`]), opens the pod's network namespace, hands the request and the
//! namespace's descriptor to the router ([`wire`], [`client`]), and writes the answer in the form of the version that was asked
//! for ([`result`]). So the router needs neither the host's process ids nor its mounts. A DEL that no router takes is kept in a folder
//! ([`queue`]).

pub mod client;
pub mod config;
pub mod error;
pub mod invocation;
pub mod plugin;
pub mod queue;
pub mod result;
pub mod version;
pub mod wire;

pub use error::CniError;
pub use version::Version;
