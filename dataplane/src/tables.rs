//! What there is once for each address family: a connection table, and what a worker has of its own beside it.

use std::net::{Ipv4Addr, Ipv6Addr};

use weir_conntrack::{Handle, Table};
use weir_packet::parse::{Parsed, View};

use crate::{forwarding::Routed, fragments::Fragments};

/// For every so many connections that a table may have there is place for one more, which is kept for the node itself.
const HOST_SHARE: u32 = 64;

/// The capacity of a table in which there is place for `max_entries` connections, and for the node's own when it is full of them.
pub const fn capacity_with_share(max_entries: u32) -> u32 {
    max_entries.saturating_add(max_entries / HOST_SHARE)
}

/// Of a table with that capacity, the places that are kept for the node's own connections.
pub(crate) const fn share_of(capacity: usize) -> u32 {
    capacity as u32 / (HOST_SHARE + 1)
}

/// The connection tables of both families.
#[derive(Debug)]
pub struct Tables {
    /// IPv4.
    pub v4: Table<Ipv4Addr>,
    /// IPv6.
    pub v6: Table<Ipv6Addr>,
}

/// What a worker has of its own of a family.
#[derive(Debug)]
pub struct Own<A: Family> {
    /// Its handle on the table.
    pub(crate) handle: Handle,
    /// Packets that pass in fragments.
    pub(crate) fragments: Fragments<A>,
}

/// The same of both families.
#[derive(Debug)]
pub struct Both {
    pub(crate) v4: Own<Ipv4Addr>,
    pub(crate) v6: Own<Ipv6Addr>,
}

impl Both {
    /// `random` keys the hashes of fragments.
    pub(crate) fn new(tables: &Tables, random: &mut impl FnMut() -> u64) -> Self {
        Self {
            v4: Own { handle: tables.v4.handle(), fragments: Fragments::new([random(), random()]) },
            v6: Own { handle: tables.v6.handle(), fragments: Fragments::new([random(), random()]) },
        }
    }
}

/// Picks what is of an address family; implemented by IPv4 and IPv6 addresses only.
pub trait Family: Routed {
    /// The family's table.
    fn table(tables: &Tables) -> &Table<Self>;
    /// What a worker has of the family.
    fn own(both: &mut Both) -> &mut Own<Self>;
    /// The packet that was read, if it is one of this family.
    fn of(parsed: Parsed) -> Option<View<Self>>;
    /// The reverse.
    fn parsed(view: View<Self>) -> Parsed;
}

impl Family for Ipv4Addr {
    #[inline]
    fn table(tables: &Tables) -> &Table<Self> {
        &tables.v4
    }
    #[inline]
    fn own(both: &mut Both) -> &mut Own<Self> {
        &mut both.v4
    }
    #[inline]
    fn of(parsed: Parsed) -> Option<View<Self>> {
        if let Parsed::V4(view) = parsed { Some(view) } else { None }
    }
    #[inline]
    fn parsed(view: View<Self>) -> Parsed {
        Parsed::V4(view)
    }
}

impl Family for Ipv6Addr {
    #[inline]
    fn table(tables: &Tables) -> &Table<Self> {
        &tables.v6
    }
    #[inline]
    fn own(both: &mut Both) -> &mut Own<Self> {
        &mut both.v6
    }
    #[inline]
    fn of(parsed: Parsed) -> Option<View<Self>> {
        if let Parsed::V6(view) = parsed { Some(view) } else { None }
    }
    #[inline]
    fn parsed(view: View<Self>) -> Parsed {
        Parsed::V6(view)
    }
}
