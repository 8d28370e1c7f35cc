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
use weir_packet::{
    FlowKey, Ports,
    glance::{guess_opening_ipv4, guess_opening_ipv6},
};
use weir_sync::WorkerNumber;

use super::{context::Context, straight::Seen};
use crate::{frame::Packet, tables::Family};

/// With fewer packets in a burst that have no connection, there is nothing to overlap.
pub(super) const FEWEST: usize = 2;

/// A packet that probably opens a connection.
#[derive(Debug)]
struct Miss<A: Family> {
    /// Its place among those that have none.
    number: usize,
    key: FlowKey<A>,
    frontend: Option<Foreseen>,
    slot: Option<BackendSlot>,
}

/// What was read ahead of a burst.
#[derive(Debug)]
pub(super) struct Ahead {
    v4: Vec<Miss<Ipv4Addr>>,
    v6: Vec<Miss<Ipv6Addr>>,
    /// For each packet that seemed to have no connection, in their order.
    drawn: Vec<Option<u64>>,
    /// How many of them were handled.
    handled: usize,
}

impl Ahead {
    /// For bursts of at most so many packets.
    pub(super) fn new(burst: usize) -> Self {
        let (v4, v6, drawn) = (Vec::with_capacity(burst), Vec::with_capacity(burst), Vec::with_capacity(burst));
        Self { v4, v6, drawn, handled: 0 }
    }

    /// The random number that was drawn for the next packet that seems to have no connection.
    pub(super) fn next(&mut self) -> Option<u64> {
        self.handled += 1;
        self.drawn.get(self.handled - 1).copied().flatten()
    }

    /// Forgets the burst.
    #[inline]
    pub(super) fn clear(&mut self) {
        self.drawn.clear();
        self.handled = 0;
    }

    /// Reads ahead for the packets of a burst that seem to have no connection.
    #[inline(never)]
    pub(super) fn read(
        &mut self,
        burst: &[Packet],
        seen: &[Seen],
        context: &Context<'_>,
        worker: WorkerNumber,
        random: &mut impl FnMut() -> u64,
    ) {
        let Self { v4, v6, drawn, .. } = self;
        for (packet, seen) in burst.iter().zip(seen).filter(|(_, seen)| seen.is_miss()) {
            let number = drawn.len();
            drawn.push(None);
            match seen {
                Seen::V4(header) | Seen::Tunnelled(header, _) => {
                    v4.extend(header.miss().map(|key| Miss::new(number, *key)))
                }
                Seen::V6(header) => v6.extend(header.miss().map(|key| Miss::new(number, *key))),
                // Segments that open a connection are not looked at before.
                Seen::Other => {
                    let start = packet.bytes();
                    v4.extend(guess_opening_ipv4(start).map(|key| Miss::new(number, key)));
                    v6.extend(guess_opening_ipv6(start).map(|key| Miss::new(number, key)));
                }
            }
        }
        read_ahead(v4, drawn, context, worker, random);
        read_ahead(v6, drawn, context, worker, random);
        v4.clear();
        v6.clear();
    }
}

impl<A: Family> Miss<A> {
    fn new(number: usize, key: FlowKey<A>) -> Self {
        Self { number, key, frontend: None, slot: None }
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
    for Miss { number, key, frontend, slot } in &mut *misses {
        if let Some(frontend) = *frontend {
            let random = random();
            drawn[*number] = Some(random);
            *slot = services.foresee_backend(frontend, key.src, random);
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
