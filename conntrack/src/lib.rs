//! The lock-free connection table.
//!
//! - [`table`]: [`Table`], lookup, insertion, removal, ageing; its opening comment is the theory of the whole.
//! - [`conn`]: [`ConnRef`], one connection: keys, attributes, tracking.
//! - [`observed`]: [`Observed`], what tracking needs to know of a packet; of SCTP [`sctp_packet`].
//! - [`opening`]: whether a packet may open a connection.
//! - [`tcp`]: TCP's states and windows, RFC 9293 as netfilter follows it from the middle.
//! - [`sctp`]: SCTP's states, RFC 9260 as netfilter follows it.
//! - [`timeouts`]: how long an idle connection lives, under netfilter's names.
//! - [`file`](mod@file): a table that outlives its process.
//! - [`hash`]: the keyed hash of flow keys.
//!
//! No two files name each other: plain data lies below what acts on it.

// The theory of the structures names their private parts too.
#![allow(rustdoc::private_intra_doc_links)]

mod arrays;
mod bucket;
pub mod conn;
#[cfg(not(loom))]
pub mod file;
pub mod hash;
mod index;
pub mod observed;
pub mod opening;
#[cfg(not(loom))]
mod saved;
pub mod sctp;
pub mod sctp_packet;
mod state;
mod storage;
pub mod table;
pub mod tcp;
pub mod timeouts;

pub use conn::{Attributes, ConnId, ConnRef, Entry, Identity};
pub use hash::Hash;
pub use observed::{Observed, Tracked};
pub use opening::Opening;
pub use sctp::SctpState;
pub use sctp_packet::SctpPacket;
pub use state::{Expendable, Lifecycle, OFFLOADED, PRIVILEGED};
pub use table::{Candidate, Counts, Handle, Hit, Insert, MAX_ENTRIES, NewConn, Offloader, Table, TableConfig};
pub use tcp::{TcpSettings, TcpState, Windows};
pub use timeouts::{Timeouts, UnknownTimeout};
