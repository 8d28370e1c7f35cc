//! Packets as bytes: views, flow keys, checksums, rewrites, verdicts and drop reasons.
//!
//! Plain data and algorithms; nothing here knows of devices, tables or configuration, and nothing allocates.
//!
//! - [`address`]: one trait, [`Address`], through which IPv4 and IPv6 share every later stage.
//! - [`flow`]: [`FlowKey`], the key of one direction of a connection.
//! - [`parse`]: a frame's headers, checked to be whole and sane.
//! - [`glance`]: a quicker look at what nearly all frames are.
//! - [`options`]: the TCP options that connection tracking follows.
//! - [`checksum`]: RFC 1071 sums and RFC 1624 increments.
//! - [`rewrite`]: addresses, ports and TTL changed in place, tunnel headers.
//! - [`build`]: the packets that a router makes itself: ARP and neighbour answers, RST, ICMP errors.
//! - [`verdict`]: what happens to a packet, and why it was dropped.

pub mod address;
pub mod build;
pub mod checksum;
pub mod flow;
pub mod glance;
pub mod mac;
pub mod options;
pub mod parse;
pub mod rewrite;
pub mod verdict;

pub use address::Address;
pub use flow::{Direction, FlowKey, Ports, Protocol};
pub use mac::Mac;
pub use verdict::{DropReason, Tick};
