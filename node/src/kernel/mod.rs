//! The node's own kernel: what weir learns from it, and what weir sets up in it.
//!
//! - [`KernelState`] follows links, addresses, routes and neighbours over rtnetlink and renders them as the dataplane's
//!   [`Links`](weir_dataplane::model::Links); [`Resolver`] makes the kernel resolve a neighbour.
//! - [`HostPlumbing`] makes the kernel reach pods and services through `weir0`: routes in a table of weir's own, the
//!   rule that selects it, and the few sysctls that this needs. All of it can be taken back.
//!
//! Everything here acts on the network namespace of the thread that calls, runs on a tokio runtime (current-thread is
//! enough) and never on a worker's core.

mod follow;
mod host;
mod netlink;
mod picture;

use std::{io, path::PathBuf};

pub use follow::{Changed, FollowSettings, KernelState, Resolver, View};
pub use host::{HostPlumbing, HostReport, HostSettings, LOOPBACK_SOURCES, ROUTE_TABLE, RULE_PRIORITY, Wanted};
pub use picture::{DeviceChanges, DeviceTracker, Link, RoleRules};

/// The trunk's end in the kernel.
pub const TRUNK_HOST: &str = "weir0";
/// The trunk's end with weir's AF_XDP sockets.
pub const TRUNK_WEIR: &str = "weir1";

/// Why the kernel could not be asked or set up.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No rtnetlink socket.
    #[error("no rtnetlink socket: {0}; weir needs CAP_NET_ADMIN and a kernel with CONFIG_NETLINK")]
    Open(#[source] io::Error),
    /// The kernel answered a request with an error.
    #[error("the kernel refused to {action}: {source}")]
    Refused {
        /// What it was asked for, to stand after "refused to".
        action: String,
        /// Its errno.
        source: io::Error,
    },
    /// The socket's task ended: the kernel closed it, or the runtime is shutting down.
    #[error("the rtnetlink connection ended; weir cannot follow routes and devices any more, restart it")]
    Closed,
    /// A list cannot be read whole because it keeps changing.
    #[error("the kernel's list of {what} changed during each of {attempts} readings; try again")]
    Unstable {
        /// Which list.
        what: &'static str,
        /// How often it was read.
        attempts: u32,
    },
    /// A device that must be there is not.
    #[error("there is no device {0} in this network namespace; is the trunk set up?")]
    NoDevice(String),
    /// A wanted route would take everything.
    #[error("{0} as a pod or service prefix would take the node's whole traffic; give its real prefix")]
    TooWide(ipnet::IpNet),
    /// A sysctl or a file of weir's cannot be read or written.
    #[error("{path}: {source}", path = .path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A sysctl or a file of weir's holds what weir cannot read.
    #[error("{path} holds {text:?}: {why}", path = .path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// What it holds.
        text: String,
        /// What is wrong with it.
        why: String,
    },
}
