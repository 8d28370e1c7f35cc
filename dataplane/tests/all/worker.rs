//! The worker's loop over memory rings: what it does by time, with traffic and without, and what is left when it stops.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::packets::{Packet as Sent, UDP};
use crate::router::{CLIENT_POD, cluster, ip, links, rules};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use weir_conntrack::{Table, TableConfig, TcpSettings, Timeouts};
use weir_dataplane::{
    counters::{COUNTERS, Counter, drop_index},
    driver::{Driver, PortId},
    forwarding::Forwarding,
    frame::{Arena, Frame, LinkType, Packet},
    memory::MemoryDriver,
    pipeline::{Event, Pipeline},
    snapshot::Snapshot,
    tables::Tables,
    worker::{Device, Mode, Shared, Worker},
};
use weir_nat::{Affinity, SnatPorts};
use weir_packet::DropReason;
use weir_sync::{Counters, Domain, Published};

const GATEWAY: &str = "192.168.10.100";
const BEHIND_GATEWAY: &str = "172.20.0.1";
const SERVER: &str = "10.1.1.20";

/// What a test and the rings of its worker share.
#[derive(Default)]
struct Line {
    arriving: Mutex<VecDeque<Vec<u8>>>,
    is_broken: AtomicBool,
}

/// Memory rings that a test puts packets into while the worker runs.
struct Rings {
    memory: MemoryDriver,
    line: Arc<Line>,
}

impl Driver for Rings {
    fn ports(&self) -> usize {
        self.memory.ports()
    }

    fn receive(&mut self, port: PortId, into: &mut Vec<Packet>, limit: usize) -> usize {
        if port == PortId::TRUNK {
            for frame in self.line.arriving.lock().unwrap().drain(..) {
                self.memory.inject(port, CLIENT_POD, LinkType::Host, &frame).unwrap();
            }
        }
        self.memory.receive(port, into, limit)
    }

    fn transmit(&mut self, port: PortId, packets: &mut Vec<Packet>) {
        self.memory.transmit(port, packets);
        self.memory.drain_sent(|_, _| ());
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

impl Device for Rings {
    /// As AF_XDP's: a packet ends it.
    fn sleep(&mut self, limit: Duration) {
        let begin = Instant::now();
        while begin.elapsed() < limit && self.line.arriving.lock().unwrap().is_empty() {
            thread::sleep(Duration::from_micros(100));
        }
    }

    fn check(&mut self) -> io::Result<()> {
        if self.line.is_broken.load(Ordering::Relaxed) { Err(io::Error::other("broken")) } else { Ok(()) }
    }
}

/// A router with one worker, whose neighbours are unknown at first.
struct World {
    shared: Arc<Shared>,
    counters: Counters<COUNTERS>,
    line: Arc<Line>,
    /// Kept, so that the worker can ask.
    _events: crossbeam::channel::Receiver<Event>,
}

fn snapshot(generation: u32, knows_neighbors: bool) -> Snapshot {
    let mut links = links();
    if !knows_neighbors {
        links.neighbors.clear();
    }
    Snapshot {
        generation,
        rules: Arc::new(rules(Vec::new(), true)),
        snat: Arc::new(SnatPorts::new(10_000..=20_000, []).unwrap()),
        forwarding: Arc::new(Forwarding::compile(&cluster(), &links).unwrap()),
    }
}

impl World {
    /// UDP is forgotten after a second.
    fn new(mode: Mode) -> (Self, Worker<Rings>) {
        let domain = Domain::new();
        let table = || TableConfig {
            max_entries: 4096,
            seed: [1, 2],
            timeouts: Timeouts { udp: 1, ..Timeouts::default() },
            tcp: TcpSettings::default(),
        };
        let shared = Arc::new(Shared {
            snapshot: Published::new(&domain, snapshot(1, false)),
            tables: Tables { v4: Table::new(table(), domain.clone()), v6: Table::new(table(), domain.clone()) },
            affinity: Affinity::new(64, [1, 2]),
            tcp_loose: true,
            offload: None,
            stop: AtomicBool::new(false),
        });
        let (events, receiver) = crossbeam::channel::bounded(64);
        let counters = Counters::<COUNTERS>::new();
        let pipeline = Pipeline::new(&shared.tables, counters.join(), ChaCha8Rng::seed_from_u64(3), events, 64, 2);
        let line = Arc::new(Line::default());
        let rings = Rings { memory: MemoryDriver::new(2, 1024), line: line.clone() };
        let worker = Worker::new(rings, pipeline, domain.join(), shared.clone(), 64, mode);
        (Self { shared, counters, line, _events: receiver }, worker)
    }

    fn arrive(&self, to: &str, source_port: u16) {
        let l4 = [&source_port.to_be_bytes()[..], &[0, 53, 0, 12, 0, 0], b"word"].concat();
        let frame = Sent { src: ip("10.1.1.10"), dst: ip(to), protocol: UDP, ttl: 64, tos: 0, options: 0, l4 }.frame();
        self.line.arriving.lock().unwrap().push_back(frame);
    }

    fn count(&self, index: usize) -> u64 {
        self.counters.sum(index)
    }

    /// How long it takes until `holds`.
    fn until(&self, what: &str, limit: Duration, mut holds: impl FnMut() -> bool) -> Duration {
        let begin = Instant::now();
        while !holds() {
            assert!(begin.elapsed() < limit, "{what} within {limit:?}");
            thread::sleep(Duration::from_millis(1));
        }
        begin.elapsed()
    }
}

/// Runs the worker beside `test`, stops it, and looks that nothing is left of it.
fn run(mode: Mode, test: impl FnOnce(&World)) {
    let (world, mut worker) = World::new(mode);
    /// Stops the worker where the test panics, too.
    struct Stop(Arc<Shared>);
    impl Drop for Stop {
        fn drop(&mut self) {
            self.0.stop.store(true, Ordering::Relaxed);
        }
    }
    thread::scope(|scope| {
        let worker = scope.spawn(move || {
            let result = worker.run();
            (worker, result)
        });
        let stop = Stop(world.shared.clone());
        test(&world);
        drop(stop);
        let (mut worker, result) = worker.join().expect("the worker does not panic");
        result.expect("nothing is broken");
        assert_eq!(worker.driver_mut().memory.outstanding(), 0, "every frame is back");
    });
    let sums = world.counters.sums();
    assert!(weir_dataplane::counters::Totals::new(&sums, 0).balance(), "{sums:?}");
}

/// The timeout of a second, the four of a round of the sweep, and a machine with other work.
const EXPIRY: Duration = Duration::from_secs(8);

#[test]
fn connections_expire_without_traffic() {
    for mode in [Mode::Busy, Mode::Adaptive] {
        run(mode, |world| {
            for port in 0..1000 {
                world.arrive(SERVER, 20_000 + port);
            }
            world.until("all are followed", EXPIRY, || world.shared.tables.v4.len() == 1000);
            world.until("all are forgotten", EXPIRY, || world.shared.tables.v4.is_empty());
        });
    }
}

#[test]
fn connections_expire_beside_traffic() {
    run(Mode::Adaptive, |world| {
        for port in 0..1000 {
            world.arrive(SERVER, 20_000 + port);
        }
        world.until("all are followed", EXPIRY, || world.shared.tables.v4.len() == 1000);
        world.until("all but the one in use are forgotten", EXPIRY, || {
            world.arrive(SERVER, 9);
            world.shared.tables.v4.len() == 1
        });
    });
}

#[test]
fn a_held_packet_leaves_soon_after_its_neighbour_is_known() {
    for mode in [Mode::Busy, Mode::Adaptive] {
        run(mode, |world| {
            world.arrive(BEHIND_GATEWAY, 20_000);
            world.until("it has come", EXPIRY, || world.count(Counter::Rx as usize) == 1);
            thread::sleep(Duration::from_millis(50));
            assert_eq!(world.count(Counter::Tx as usize), 0, "{GATEWAY} is unknown");
            world.shared.snapshot.publish(snapshot(2, true));
            // A sleeping worker would take up to 100 ms.
            let took = world.until("it leaves", EXPIRY, || world.count(Counter::Tx as usize) == 1);
            assert!(took < Duration::from_millis(50), "{took:?}");
        });
    }
}

#[test]
fn a_held_packet_is_given_up_without_traffic() {
    run(Mode::Adaptive, |world| {
        world.arrive(BEHIND_GATEWAY, 20_000);
        let dropped = || world.count(drop_index(DropReason::NeighborUnresolved)) == 1;
        let took = world.until("it is given up", Duration::from_secs(8), dropped);
        assert!(took > Duration::from_millis(2900), "{took:?}");
    });
}

#[test]
fn a_worker_that_is_stopped_gives_up_what_it_holds() {
    run(Mode::Adaptive, |world| {
        world.arrive(BEHIND_GATEWAY, 20_000);
        world.until("it has come", EXPIRY, || world.count(Counter::Rx as usize) == 1);
    });
}

#[test]
fn a_device_that_fails_ends_the_worker() {
    for mode in [Mode::Busy, Mode::Adaptive] {
        let (world, mut worker) = World::new(mode);
        world.line.is_broken.store(true, Ordering::Relaxed);
        assert_eq!(worker.run().unwrap_err().to_string(), "broken");
    }
}
