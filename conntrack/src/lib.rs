//! The lock-free connection table.
//!
//! - [`table`]: [`Table`], lookup, insertion, removal, ageing; its opening comment is the theory of the whole.
//! - [`conn`]: [`ConnRef`], one connection: keys, attributes, tracking.
//! - [`observed`]: [`Observed`], what tracking needs to know of a packet.
//! - [`tcp`]: TCP's states and windows, RFC 9293 as netfilter follows it from the middle.
//! - [`sctp`]: SCTP's states, RFC 9260 as netfilter follows it.
//! - [`timeouts`]: how long an idle connection lives, under netfilter's names.
//! - [`file`](mod@file): a table that outlives its process.
//! - [`hash`]: the keyed hash of flow keys.

// The theory of the structures names their private parts too.
#![allow(rustdoc::private_intra_doc_links)]

mod bucket;
pub mod conn;
#[cfg(not(loom))]
pub mod file;
pub mod hash;
mod index;
pub mod observed;
pub mod sctp;
mod state;
mod storage;
pub mod table;
pub mod tcp;
pub mod timeouts;

pub use conn::{Attributes, ConnRef, Entry, Identity};
pub use hash::Hash;
pub use observed::{Observed, Opening, Tracked};
pub use sctp::{SctpPacket, SctpState};
pub use state::{Expendable, Lifecycle};
pub use table::{
    Candidate, ConnId, Counts, Handle, Hit, Insert, MAX_ENTRIES, NewConn, OFFLOADED, Offloader, PRIVILEGED, Table,
    TableConfig,
};
pub use tcp::{TcpSettings, TcpState, Windows};
pub use timeouts::{Timeouts, UnknownTimeout};
