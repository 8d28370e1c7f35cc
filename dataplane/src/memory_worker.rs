//! Workers over memory rings, and what they share: what `weir replay`, `weir bench`, benchmarks and tests set up alike.
//!
//! It is the worker loop's turn without devices, waiting and control: see [`crate::worker`] for the one that runs on a node.

use std::sync::Arc;

use crossbeam::channel::Receiver;
use rand_chacha::ChaCha8Rng;
use weir_conntrack::{Table, TableConfig, TcpSettings, Timeouts};
use weir_nat::Affinity;
use weir_packet::Tick;
use weir_sync::{Counters, Domain, Participant, Published};

use crate::{
    counters::COUNTERS,
    driver::Driver,
    frame::{IfIndex, Packet},
    memory::MemoryDriver,
    pipeline::{Context, Event, Pipeline},
    snapshot::Snapshot,
    tables::Tables,
};

/// What the workers of one router share.
#[derive(Debug)]
pub struct Shared {
    /// Who is in a turn.
    pub domain: Arc<Domain>,
    /// What is in force.
    pub published: Arc<Published<Snapshot>>,
    /// The connections.
    pub tables: Arc<Tables>,
    /// Backends that clients keep.
    pub affinity: Affinity,
    /// What happened to packets, of all workers.
    pub counters: Counters<COUNTERS>,
}

impl Shared {
    /// Tables of the same `domain`.
    pub fn new(domain: Arc<Domain>, first: Snapshot, tables: Tables, affinity: Affinity) -> Self {
        Self {
            published: Arc::new(Published::new(&domain, first)),
            domain,
            tables: Arc::new(tables),
            affinity,
            counters: Counters::new(),
        }
    }

    /// With tables for so many connections of IPv4 and IPv6, netfilter's timeouts, and a hash that is the same in each run.
    pub fn repeatable(first: Snapshot, [v4, v6]: [u32; 2]) -> Self {
        let domain = Domain::new();
        let config = |max_entries| TableConfig {
            max_entries,
            seed: [1, 2],
            timeouts: Timeouts::default(),
            tcp: TcpSettings::default(),
        };
        let tables = Tables { v4: Table::new(config(v4), domain.clone()), v6: Table::new(config(v6), domain.clone()) };
        Self::new(domain, first, tables, Affinity::new(64, [1, 2]))
    }
}

/// How much a worker has room for.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Packets of a turn.
    pub burst: usize,
    /// Ports of its driver.
    pub ports: usize,
    /// Frames of its driver.
    pub frames: u32,
    /// Events that wait for whoever takes them; later ones are lost, as on a node.
    pub events: usize,
}

/// One worker: a pipeline, a driver, and its part in the turns.
#[derive(Debug)]
pub struct MemoryWorker {
    /// What handles packets.
    pub pipeline: Pipeline,
    /// Whose frames they are in.
    pub driver: MemoryDriver,
    /// What the next turn handles.
    pub burst: Vec<Packet>,
    /// What it asks of control, or tells it.
    pub events: Receiver<Event>,
    /// By which it takes part in the turns of the domain.
    pub participant: Participant,
}

impl MemoryWorker {
    /// A worker beside those that `shared` has.
    pub fn new(shared: &Shared, random: ChaCha8Rng, room: Room) -> Self {
        let Room { burst, ports, frames, events } = room;
        let (sender, events) = crossbeam::channel::bounded(events);
        Self {
            pipeline: Pipeline::new(&shared.tables, shared.counters.join(), random, sender, burst, ports),
            driver: MemoryDriver::new(ports, frames),
            burst: Vec::with_capacity(burst),
            events,
            participant: shared.domain.join(),
        }
    }

    /// Writes a packet that `device` received into a frame of the next turn's burst.
    ///
    /// # Panics
    /// Where the driver has too few frames.
    #[inline]
    pub fn push(&mut self, device: IfIndex, bytes: &[u8]) {
        let mut packet = self.driver.allocate().expect("frames for a burst");
        packet.set_len(bytes.len());
        packet.bytes_mut().copy_from_slice(bytes);
        packet.device = device;
        self.burst.push(packet);
    }

    /// A turn at this time: `handle` gets the pipeline, the driver, the burst and what is in force, all in the order in which
    /// [`process_burst`](crate::pipeline::process_burst) takes them. What it sends leaves at the end.
    #[inline]
    pub fn turn(
        &mut self,
        shared: &Shared,
        now: Tick,
        handle: impl FnOnce(&mut Pipeline, &mut MemoryDriver, &mut Vec<Packet>, &Context<'_>),
    ) {
        let turn = self.participant.enter();
        let context = Context::new(shared.published.load(&turn), &shared.tables, &shared.affinity, &turn, now);
        handle(&mut self.pipeline, &mut self.driver, &mut self.burst, &context);
        self.pipeline.flush(&mut self.driver);
    }
}
