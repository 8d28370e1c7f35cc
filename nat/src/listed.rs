//! All that slices list, each with how often.

use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable, hash_table::Entry};
use weir_packet::{Address, Protocol};

use crate::table::Frontend;

/// Destinations, each as often as it is listed. Several services often have the same pods, and one that leaves takes nothing from the others.
#[derive(Clone)]
pub(crate) struct Listed<A> {
    table: HashTable<Place<A>>,
    hasher: DefaultHashBuilder,
}

/// A destination and how often it is listed. The count is where padding would be.
#[derive(Clone, Copy)]
struct Place<A> {
    address: A,
    port: u16,
    protocol: Protocol,
    /// One that has come up to [`MANY`] stays until all is counted anew.
    count: u8,
}

const _: () = assert!(size_of::<Place<std::net::Ipv4Addr>>() == 8, "a cluster has hundreds of thousands");

const MANY: u8 = u8::MAX;

impl<A: Address> Place<A> {
    fn frontend(&self) -> Frontend<A> {
        Frontend { address: self.address, port: self.port, protocol: self.protocol }
    }
}

impl<A: Address> Listed<A> {
    pub(crate) fn with_capacity(count: usize) -> Self {
        Self { table: HashTable::with_capacity(count), hasher: DefaultHashBuilder::default() }
    }

    /// Lists a destination once more.
    pub(crate) fn add(&mut self, place: Frontend<A>) {
        let Self { table, hasher } = self;
        let entry = table.entry(
            hasher.hash_one(place),
            |known| known.frontend() == place,
            |known| hasher.hash_one(known.frontend()),
        );
        match entry {
            Entry::Occupied(known) => {
                let count = &mut known.into_mut().count;
                *count = count.saturating_add(1);
            }
            Entry::Vacant(free) => {
                let Frontend { address, port, protocol } = place;
                free.insert(Place { address, port, protocol, count: 1 });
            }
        }
    }

    /// Lists it once less.
    pub(crate) fn remove(&mut self, place: Frontend<A>) {
        let found = self.table.find_entry(self.hasher.hash_one(place), |known| known.frontend() == place);
        if let Ok(mut known) = found {
            match known.get().count {
                MANY => {}
                0 | 1 => drop(known.remove()),
                _ => known.get_mut().count -= 1,
            }
        }
    }

    /// Whether it is listed.
    #[inline]
    pub(crate) fn has(&self, place: &Frontend<A>) -> bool {
        self.table.find(self.hasher.hash_one(place), |known| known.frontend() == *place).is_some()
    }

    pub(crate) fn shrink_to_fit(&mut self) {
        let Self { table, hasher } = self;
        table.shrink_to_fit(|known| hasher.hash_one(known.frontend()));
    }

    /// Memory that it holds, in bytes.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.table.allocation_size()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn what_several_list_is_there_until_the_last_of_them_leaves() {
        let place = |last| Frontend { address: Ipv4Addr::new(10, 1, 0, last), port: 80, protocol: Protocol::TCP };
        let mut listed = Listed::with_capacity(0);
        (0..2).for_each(|_| listed.add(place(1)));
        listed.add(place(2));
        listed.remove(place(1));
        assert!(listed.has(&place(1)) && listed.has(&place(2)));
        listed.remove(place(1));
        assert!(!listed.has(&place(1)) && listed.has(&place(2)));
        // What was never listed, or not any more, is none's to take.
        listed.remove(place(1));
        listed.add(place(1));
        assert!(listed.has(&place(1)));
        // Nobody counts so far: it stays.
        (0..300).for_each(|_| listed.add(place(3)));
        (0..300).for_each(|_| listed.remove(place(3)));
        assert!(listed.has(&place(3)));
    }
}
