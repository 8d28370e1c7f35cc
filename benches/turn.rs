//! What a turn of a worker costs, by the number of packets that it finds: on memory rings that make and take the packets themselves.
//!
//! Short bursts are what a worker sees that is faster than who sends to it, and then all that a turn does once (clock, memory fence, sweep of the
//! tables, looks at rings) is paid by few packets. The packets are UDP from pod to pod, of one connection; the table has [`FLOWS`] of them. What the rings cost is
//! measured in alternation, without a worker, and subtracted. Medians.

use std::{
    hint::black_box,
    io,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use etherparse::PacketBuilder;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use weir_conntrack::{Table, TableConfig, TcpSettings, Timeouts};
use weir_dataplane::{
    counters::COUNTERS,
    driver::{Driver, PortId},
    forwarding::Forwarding,
    frame::{Arena, Frame, LinkType, Packet},
    memory::MemoryDriver,
    pipeline::Pipeline,
    snapshot::Snapshot,
    tables::Tables,
    worker::{Device, Mode, Shared, Worker},
};
use weir_nat::{Affinity, SnatPorts};
use weir_sync::{Counters, Domain, Published};

#[allow(dead_code, reason = "only its cluster is used")]
#[path = "../dataplane/tests/support/router.rs"]
mod router;

const BURST: usize = 64;
const BURSTS: [usize; 8] = [0, 1, 2, 4, 8, 16, 32, BURST];
/// The trunk and an uplink.
const PORTS: usize = 2;
const FLOWS: u16 = 10_000;
const MAX_ENTRIES: u32 = 262_144;
const ROUNDS: usize = 200;
/// Turns of a round: so few that not many rounds are interrupted.
const TURNS: usize = 500;

/// Rings whose other side sends the same packet again and again, `burst` of them at each look.
struct Source {
    memory: MemoryDriver,
    frame: Vec<u8>,
    burst: usize,
}

impl Driver for Source {
    fn ports(&self) -> usize {
        PORTS
    }

    fn receive(&mut self, port: PortId, into: &mut Vec<Packet>, limit: usize) -> usize {
        let count = if port == PortId::TRUNK { self.burst.min(limit) } else { 0 };
        for _ in 0..count {
            let mut packet = self.memory.allocate().expect("a turn gives back what it took");
            packet.set_len(self.frame.len());
            packet.bytes_mut().copy_from_slice(&self.frame);
            (packet.device, packet.link) = (router::CLIENT_POD, LinkType::Host);
            into.push(packet);
        }
        count
    }

    fn transmit(&mut self, _port: PortId, packets: &mut Vec<Packet>) {
        packets.drain(..).for_each(|packet| self.memory.release(black_box(packet)));
    }

    fn allocate(&mut self) -> Option<Packet> {
        self.memory.allocate()
    }

    fn arena(&self) -> &Arena {
        self.memory.arena()
    }

    fn arena_mut(&mut self) -> &mut Arena {
        self.memory.arena_mut()
    }

    fn free(&mut self, frame: Frame) {
        self.memory.free(frame);
    }
}

impl Device for Source {
    fn sleep(&mut self, _limit: Duration) {}

    fn check(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn source() -> Source {
    Source { memory: MemoryDriver::new(PORTS, 1024), frame: frame(1), burst: 1 }
}

fn frame(source_port: u16) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([10, 0, 0, 0, 0, 1], router::GATEWAY_MAC.0)
        .ipv4([10, 1, 1, 10], [10, 1, 1, 20], 64)
        .udp(source_port, 9)
        .write(&mut frame, &[0; 18])
        .expect("a vector takes every byte");
    frame
}

fn worker() -> Worker<Source> {
    let domain = Domain::new();
    let forwarding = Forwarding::compile(&router::cluster(), &router::links()).expect("the cluster is valid");
    let snapshot = Snapshot {
        generation: 1,
        rules: Arc::new(router::rules(Vec::new(), true)),
        snat: Arc::new(SnatPorts::new(10_000..=20_000, []).expect("a range")),
        forwarding: Arc::new(forwarding),
    };
    let table = || TableConfig {
        max_entries: MAX_ENTRIES,
        seed: [1, 2],
        timeouts: Timeouts::default(),
        tcp: TcpSettings::default(),
    };
    let shared = Arc::new(Shared {
        snapshot: Published::new(&domain, snapshot),
        tables: Tables { v4: Table::new(table(), domain.clone()), v6: Table::new(table(), domain.clone()) },
        affinity: Affinity::new(64, [1, 2]),
        tcp_loose: true,
        offload: None,
        stop: AtomicBool::new(false),
    });
    let (events, _) = crossbeam::channel::bounded(64);
    let counters = Counters::<COUNTERS>::new();
    let random = ChaCha8Rng::seed_from_u64(3);
    let pipeline = Pipeline::new(&shared.tables, counters.join(), random, events, BURST, PORTS);
    let participant = domain.join();
    let mut worker = Worker::new(source(), pipeline, participant, shared.clone(), BURST, Mode::Busy);
    for flow in (1..=FLOWS).rev() {
        worker.driver_mut().frame = frame(flow);
        worker.turn();
    }
    assert_eq!(shared.tables.v4.len(), usize::from(FLOWS), "every flow is let through and followed");
    worker
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Nanoseconds of one call.
fn time(mut work: impl FnMut()) -> f64 {
    let begin = Instant::now();
    (0..TURNS).for_each(|_| work());
    begin.elapsed().as_nanos() as f64 / TURNS as f64
}

fn main() {
    // `cargo test` runs benches to see that they work.
    let rounds = if std::env::args().any(|argument| argument == "--bench") { ROUNDS } else { 1 };
    let (mut worker, mut rings) = (worker(), source());
    let mut burst = Vec::with_capacity(BURST);
    let mut samples = BURSTS.map(|_| Vec::new());
    for _ in 0..rounds {
        for (packets, samples) in BURSTS.into_iter().zip(&mut samples) {
            (worker.driver_mut().burst, rings.burst) = (packets, packets);
            let of_turn = time(|| {
                worker.turn();
            });
            let of_rings = time(|| {
                for port in 0..PORTS {
                    rings.receive(PortId(port as u8), &mut burst, BURST);
                }
                rings.transmit(PortId::TRUNK, &mut burst);
            });
            samples.push(of_turn - of_rings);
        }
    }
    println!("packets  ns per turn  ns per packet");
    for (packets, samples) in BURSTS.into_iter().zip(samples) {
        let turn = median(samples);
        let each = if packets > 0 { format!("{:.0}", turn / packets as f64) } else { String::new() };
        println!("{packets:7}  {turn:11.0}  {each:>13}");
    }
}
