//! First packets, read ahead: what judging them will need is fetched for all of a burst at a time.
//!
//! # Theory
//! At ten thousand services some ten cache lines that a random first packet needs are in no cache near the core: the frontend's slot, its record,
//! the backend, who has the backend's address, that address's policy class, counters. A packet waits for each before it knows which is the next.
//! But the packets of a burst do not wait for each other. So each step is made for all packets of the burst before the next one is: the processor
//! then waits for several of them at once.
//!
//! *Invariant.* Nothing is decided here, and nothing that is found here is used but one random number for each packet, which
//! [`decide`](crate::decide::decide) then draws first: so it comes to the same backend, unless the client is bound to another. Leaving this
//! out changes nothing but the time that packets take.

use std::net::{Ipv4Addr, Ipv6Addr};

use weir_nat::{BackendSlot, Foreseen};
use weir_packet::{FlowKey, Ports};
use weir_sync::WorkerNumber;

use super::{context::Context, straight::Seen};
use crate::tables::Family;

/// With fewer packets in a burst that have no connection, there is nothing to overlap.
pub(crate) const FEWEST: usize = 2;

/// A packet that probably opens a connection.
#[derive(Debug)]
struct Miss<A: Family> {
    place: usize,
    key: FlowKey<A>,
    frontend: Option<Foreseen>,
    slot: Option<BackendSlot>,
}

/// What was read ahead of a burst.
#[derive(Debug)]
pub(crate) struct Ahead {
    v4: Vec<Miss<Ipv4Addr>>,
    v6: Vec<Miss<Ipv6Addr>>,
    /// By place in the burst.
    drawn: Vec<Option<u64>>,
}

impl Ahead {
    /// For bursts of at most so many packets.
    pub(crate) fn new(burst: usize) -> Self {
        Self { v4: Vec::with_capacity(burst), v6: Vec::with_capacity(burst), drawn: Vec::with_capacity(burst) }
    }

    /// The random number that was drawn for the packet at this place.
    #[inline]
    pub(crate) fn drawn(&self, place: usize) -> Option<u64> {
        self.drawn.get(place).copied().flatten()
    }

    /// Forgets the burst.
    #[inline]
    pub(crate) fn clear(&mut self) {
        self.drawn.clear();
    }

    /// Reads ahead for the packets of a burst that have no connection.
    pub(crate) fn read(
        &mut self,
        seen: &[Seen],
        context: &Context<'_>,
        worker: WorkerNumber,
        random: &mut impl FnMut() -> u64,
    ) {
        let Self { v4, v6, drawn } = self;
        for (place, seen) in seen.iter().enumerate() {
            match seen {
                Seen::V4(header) | Seen::Tunnelled(header, _) if header.has_no_connection() => {
                    v4.push(Miss::new(place, *header.key()));
                }
                Seen::V6(header) if header.has_no_connection() => v6.push(Miss::new(place, *header.key())),
                Seen::Opening4(key) => v4.push(Miss::new(place, *key)),
                Seen::Opening6(key) => v6.push(Miss::new(place, *key)),
                Seen::V4(_) | Seen::Tunnelled(..) | Seen::V6(_) | Seen::Other => {}
            }
        }
        drawn.resize(seen.len(), None);
        read_ahead(v4, drawn, context, worker, random);
        read_ahead(v6, drawn, context, worker, random);
        v4.clear();
        v6.clear();
    }
}

impl<A: Family> Miss<A> {
    fn new(place: usize, key: FlowKey<A>) -> Self {
        Self { place, key, frontend: None, slot: None }
    }
}

fn read_ahead<A: Family>(
    misses: &mut [Miss<A>],
    drawn: &mut [Option<u64>],
    context: &Context<'_>,
    worker: WorkerNumber,
    random: &mut impl FnMut() -> u64,
) {
    let (rules, forwarding) = (&context.snapshot.rules, &context.snapshot.forwarding);
    let (services, table) = (rules.services.services::<A>(), A::table(context.tables));
    for miss in &mut *misses {
        table.prefetch(table.hash(&miss.key));
        miss.frontend = services.foresee(&miss.key);
    }
    for Miss { place, key, frontend, slot } in &mut *misses {
        if let Some(frontend) = *frontend {
            let number = random();
            drawn[*place] = Some(number);
            *slot = services.foresee_backend(frontend, key.src, number);
        }
    }
    for Miss { key, slot, .. } in &mut *misses {
        if let Some(slot) = *slot {
            rules.foresee_backend::<A>(worker, slot);
            let backend = services.backend(slot);
            (key.dst, key.ports) = (backend.address, Ports::new(key.ports.source(), backend.port));
        }
    }
    for miss in &*misses {
        table.prefetch(table.hash(&miss.key.invert()));
        forwarding.foresee(miss.key.dst);
    }
    for miss in &*misses {
        rules.policy.foresee(miss.key.dst);
    }
}
