//! The table beside others: lookups that hit and miss, and insertion with removal, at one thousand to ten million connections, by one and
//! two threads, with and without a writer.
//!
//! All get the same keys in the same order. Each connection has two keys, and 64 bytes that a hit reads from; the general maps hold the
//! connection's number under both keys, their connections lie in an array. Their hash is foldhash, which is what they do best with;
//! weir's is keyed anew in each table. weir looks up in bursts of 32 with prefetch, as its dataplane does, and one by one for
//! comparison; the other maps have no such call. DPDK's rte_hash is measured by perf/rte_hash.c with the same keys.
//!
//! Rounds of all alternate, so that a noisy machine disturbs all alike; each figure is the median of its rounds. `cargo bench -p
//! weir-benches --bench tables_beside -- [--largest CONNECTIONS] [--rounds N] [--milliseconds N]`.

use std::{
    hint::black_box,
    net::Ipv4Addr,
    sync::{
        Arc, Barrier, RwLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use weir_benches::figures::{Spread, tell};
use weir_conntrack::{Attributes, Handle, Insert, NewConn, Observed, Table, TableConfig, TcpSettings, Timeouts};
use weir_packet::{FlowKey, Ports, Protocol, Tick};
use weir_sync::{Domain, Participant};

type Key = FlowKey<Ipv4Addr>;
type State = foldhash::fast::RandomState;

const NOW: Tick = Tick(1);
const BURST: usize = 32;
/// Connections that a writer keeps beside the ones that are looked up.
const CHURN: u32 = 1024;
/// Room beside those that are looked up.
const ROOM: u32 = 16 * CHURN;
const SHARDS: usize = 64;

fn keys(client: u32, protocol: Protocol) -> [Key; 2] {
    let original = FlowKey {
        src: Ipv4Addr::from(0x0a00_0000 | client >> 8),
        dst: Ipv4Addr::new(10, 96, 0, 10),
        ports: Ports::new(20_000 + (client & 0xff) as u16, 53),
        protocol,
    };
    [original, FlowKey { src: Ipv4Addr::new(10, 244, 1, 2), ..original.invert() }]
}

/// What a connection is to the general maps.
#[derive(Default)]
#[repr(align(64))]
struct Conn(AtomicU32);

/// A table of connections.
trait Candidate: Send + Sync {
    fn name(&self) -> &'static str;
    /// What a thread works with.
    fn worker(&self) -> Box<dyn Worker + '_>;
}

trait Worker {
    /// Looks keys up, and reads of each connection found; how many were.
    fn look(&mut self, keys: &[Key; BURST]) -> usize;
    fn insert(&mut self, clients: &[u32]);
    fn remove(&mut self, clients: &[u32]);
}

struct Weir {
    table: Table<Ipv4Addr>,
    domain: Arc<Domain>,
    prefetch: bool,
}

struct WeirWorker<'t> {
    weir: &'t Weir,
    handle: Handle,
    participant: Participant,
}

impl Weir {
    fn new(capacity: u32, prefetch: bool) -> Self {
        let domain = Domain::new();
        let config = TableConfig {
            max_entries: capacity + ROOM,
            seed: [3, 5],
            timeouts: Timeouts::default(),
            tcp: TcpSettings::default(),
        };
        Self { table: Table::new(config, domain.clone()), domain, prefetch }
    }
}

impl Candidate for Weir {
    fn name(&self) -> &'static str {
        if self.prefetch { "weir" } else { "weir, one by one" }
    }

    fn worker(&self) -> Box<dyn Worker + '_> {
        Box::new(WeirWorker { weir: self, handle: self.table.handle(), participant: self.domain.join() })
    }
}

impl Worker for WeirWorker<'_> {
    fn look(&mut self, keys: &[Key; BURST]) -> usize {
        let table = &self.weir.table;
        let turn = self.participant.enter();
        let hashes: [_; BURST] = std::array::from_fn(|i| table.hash(&keys[i]));
        if self.weir.prefetch {
            hashes.iter().for_each(|hash| table.prefetch(*hash));
            for hash in hashes {
                table.prefetch_candidate(table.candidate(hash, &turn), Protocol::UDP);
            }
        }
        let hits = keys.iter().zip(hashes).filter_map(|(key, hash)| table.lookup(key, hash, NOW, &turn));
        hits.inspect(|hit| _ = black_box(table.conn(hit.conn).generation())).count()
    }

    fn insert(&mut self, clients: &[u32]) {
        let Self { weir, handle, participant } = self;
        let mut turn = participant.enter();
        for client in clients {
            let [original, reply] = keys(*client, Protocol::UDP);
            let new = NewConn { original, reply, attributes: Attributes::default(), first: Observed::default() };
            while !matches!(weir.table.insert(handle, new, NOW, &turn), Insert::Inserted(_)) {
                // A thread that lost its processor in the middle of a burst holds up what was removed since.
                drop(turn);
                thread::yield_now();
                turn = participant.enter();
            }
        }
    }

    fn remove(&mut self, clients: &[u32]) {
        let Self { weir, handle, participant } = self;
        let (table, turn) = (&weir.table, participant.enter());
        for client in clients {
            let [key, _] = keys(*client, Protocol::UDP);
            let hit = table.lookup(&key, table.hash(&key), NOW, &turn).expect("it was inserted");
            assert!(table.remove(handle, hit.conn, &turn));
        }
        table.sweep(handle, NOW, 0, &turn);
    }
}

/// A general map: three calls.
trait Map: Send + Sync {
    const NAME: &'static str;
    fn with_capacity(capacity: usize) -> Self;
    fn get(&self, key: &Key) -> Option<u32>;
    fn insert(&self, key: Key, conn: u32);
    fn remove(&self, key: &Key);
}

struct General<M> {
    map: M,
    conns: Box<[Conn]>,
}

impl<M: Map> General<M> {
    fn new(capacity: u32) -> Self {
        let conns = (0..capacity + ROOM).map(|_| Conn::default()).collect();
        Self { map: M::with_capacity(2 * (capacity + ROOM) as usize), conns }
    }
}

impl<M: Map> Candidate for General<M> {
    fn name(&self) -> &'static str {
        M::NAME
    }

    fn worker(&self) -> Box<dyn Worker + '_> {
        Box::new(self)
    }
}

impl<M: Map> Worker for &General<M> {
    fn look(&mut self, keys: &[Key; BURST]) -> usize {
        let hits = keys.iter().filter_map(|key| self.map.get(key));
        hits.inspect(|conn| _ = black_box(self.conns[*conn as usize].0.load(Ordering::Relaxed))).count()
    }

    fn insert(&mut self, clients: &[u32]) {
        for client in clients {
            let conn = client % self.conns.len() as u32;
            self.conns[conn as usize].0.store(*client, Ordering::Relaxed);
            for key in keys(*client, Protocol::UDP) {
                self.map.insert(key, conn);
            }
        }
    }

    fn remove(&mut self, clients: &[u32]) {
        clients.iter().flat_map(|client| keys(*client, Protocol::UDP)).for_each(|key| self.map.remove(&key));
    }
}

impl Map for dashmap::DashMap<Key, u32, State> {
    const NAME: &'static str = "DashMap";
    fn with_capacity(capacity: usize) -> Self {
        Self::with_capacity_and_hasher(capacity, State::default())
    }
    fn get(&self, key: &Key) -> Option<u32> {
        self.get(key).map(|conn| *conn)
    }
    fn insert(&self, key: Key, conn: u32) {
        self.insert(key, conn);
    }
    fn remove(&self, key: &Key) {
        self.remove(key);
    }
}

impl Map for papaya::HashMap<Key, u32, State> {
    const NAME: &'static str = "papaya";
    fn with_capacity(capacity: usize) -> Self {
        Self::with_capacity_and_hasher(capacity, State::default())
    }
    fn get(&self, key: &Key) -> Option<u32> {
        self.pin().get(key).copied()
    }
    fn insert(&self, key: Key, conn: u32) {
        self.pin().insert(key, conn);
    }
    fn remove(&self, key: &Key) {
        self.pin().remove(key);
    }
}

impl Map for scc::HashMap<Key, u32, State> {
    const NAME: &'static str = "scc";
    fn with_capacity(capacity: usize) -> Self {
        Self::with_capacity_and_hasher(capacity, State::default())
    }
    fn get(&self, key: &Key) -> Option<u32> {
        self.read_sync(key, |_, conn| *conn)
    }
    fn insert(&self, key: Key, conn: u32) {
        let _ = self.insert_sync(key, conn);
    }
    fn remove(&self, key: &Key) {
        self.remove_sync(key);
    }
}

/// hashbrown in shards, each under its lock.
struct Sharded<L> {
    shards: Box<[L]>,
    state: State,
}

impl<L> Sharded<L> {
    fn shard(&self, key: &Key) -> &L {
        use std::hash::BuildHasher;
        &self.shards[self.state.hash_one(key) as usize >> 32 & (SHARDS - 1)]
    }

    fn made(capacity: usize, lock: impl Fn(HashMap<Key, u32, State>) -> L) -> Self {
        let shard = || lock(HashMap::with_capacity_and_hasher(capacity / SHARDS * 9 / 8, State::default()));
        Self { shards: (0..SHARDS).map(|_| shard()).collect(), state: State::default() }
    }
}

impl Map for Sharded<Mutex<HashMap<Key, u32, State>>> {
    const NAME: &'static str = "hashbrown, parking_lot::Mutex x 64";
    fn with_capacity(capacity: usize) -> Self {
        Self::made(capacity, Mutex::new)
    }
    fn get(&self, key: &Key) -> Option<u32> {
        self.shard(key).lock().get(key).copied()
    }
    fn insert(&self, key: Key, conn: u32) {
        self.shard(&key).lock().insert(key, conn);
    }
    fn remove(&self, key: &Key) {
        self.shard(key).lock().remove(key);
    }
}

impl Map for Sharded<RwLock<HashMap<Key, u32, State>>> {
    const NAME: &'static str = "hashbrown, std RwLock x 64";
    fn with_capacity(capacity: usize) -> Self {
        Self::made(capacity, RwLock::new)
    }
    fn get(&self, key: &Key) -> Option<u32> {
        self.shard(key).read().unwrap().get(key).copied()
    }
    fn insert(&self, key: Key, conn: u32) {
        self.shard(&key).write().unwrap().insert(key, conn);
    }
    fn remove(&self, key: &Key) {
        self.shard(key).write().unwrap().remove(key);
    }
}

/// What threads do.
#[derive(Clone, Copy, PartialEq)]
enum Work {
    Hit,
    Miss,
    /// One connection more, another one less.
    Churn,
}

/// Nanoseconds that each operation of `measured` took, by as many threads as there are of them, while those of `beside` went on.
fn run(
    candidate: &dyn Candidate,
    measured: &[Work],
    beside: &[Work],
    [present, absent]: [&[[Key; BURST]]; 2],
    flows: u32,
    length: Duration,
) -> f64 {
    let stop = AtomicBool::new(false);
    let barrier = Barrier::new(measured.len() + beside.len());
    thread::scope(|scope| {
        let all: Vec<_> = measured.iter().chain(beside).enumerate().collect();
        let threads: Vec<_> = all
            .into_iter()
            .map(|(number, work)| {
                let (stop, barrier) = (&stop, &barrier);
                scope.spawn(move || {
                    let mut worker = candidate.worker();
                    // Threads begin at different places.
                    let place = number * present.len() / 2;
                    let mut bursts = [present, absent].map(|bursts| bursts.iter().cycle().skip(place));
                    let first = flows + number as u32 * CHURN;
                    let own: Vec<u32> = (first..first + CHURN).collect();
                    let mut to_insert = own.chunks_exact(BURST).cycle();
                    let mut to_remove = to_insert.clone();
                    if *work == Work::Churn {
                        to_insert.by_ref().take(own.len() / BURST / 2).for_each(|clients| worker.insert(clients));
                    }
                    barrier.wait();
                    let (begin, mut operations) = (Instant::now(), 0_u64);
                    while !stop.load(Ordering::Relaxed) {
                        match work {
                            Work::Hit => {
                                let found = worker.look(bursts[0].next().expect("a cycle"));
                                assert_eq!(found, BURST);
                                operations += BURST as u64;
                            }
                            Work::Miss => {
                                assert_eq!(worker.look(bursts[1].next().expect("a cycle")), 0);
                                operations += BURST as u64;
                            }
                            Work::Churn => {
                                worker.insert(to_insert.next().expect("a cycle"));
                                worker.remove(to_remove.next().expect("a cycle"));
                                operations += BURST as u64;
                            }
                        }
                        if number == 0 && operations.is_multiple_of(1024) && begin.elapsed() > length {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                    let nanoseconds = begin.elapsed().as_nanos() as f64;
                    if *work == Work::Churn {
                        to_remove.take(own.len() / BURST / 2).for_each(|clients| worker.remove(clients));
                    }
                    nanoseconds / operations as f64
                })
            })
            .collect();
        let taken: Vec<f64> = threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
        let measured = &taken[..measured.len()];
        measured.iter().sum::<f64>() / measured.len() as f64
    })
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let option = |name: &str, default: u64| {
        let value = arguments.iter().position(|a| a == name).and_then(|at| arguments.get(at + 1));
        value.map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} takes a number, not {text}")))
    };
    let largest = option("--largest", 1_000_000) as u32;
    let rounds = option("--rounds", 7) as usize;
    let length = Duration::from_millis(option("--milliseconds", 100));
    let works: [(&str, &[Work], &[Work]); 7] = [
        ("hit", &[Work::Hit], &[]),
        ("miss", &[Work::Miss], &[]),
        ("insert + remove", &[Work::Churn], &[]),
        ("hit, 2 threads", &[Work::Hit, Work::Hit], &[]),
        ("hit beside a writer", &[Work::Hit], &[Work::Churn]),
        ("miss beside a writer", &[Work::Miss], &[Work::Churn]),
        ("insert + remove, 2 threads", &[Work::Churn, Work::Churn], &[]),
    ];
    println!("nanoseconds per operation and thread, medians of {rounds} alternating rounds of {length:?}");
    for flows in [1_000, 10_000, 100_000, 1_000_000, 10_000_000].into_iter().filter(|flows| *flows <= largest) {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut order: Vec<u32> = (0..flows).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, random.next_u32() as usize % (i + 1));
        }
        let bursts = |protocol| -> Vec<[Key; BURST]> {
            order.as_chunks::<BURST>().0.iter().map(|chunk| chunk.map(|client| keys(client, protocol)[0])).collect()
        };
        let (present, absent) = (bursts(Protocol::UDP), bursts(Protocol::SCTP));
        let candidates: Vec<Box<dyn Candidate>> = vec![
            Box::new(Weir::new(flows, true)),
            Box::new(Weir::new(flows, false)),
            Box::new(General::<dashmap::DashMap<Key, u32, State>>::new(flows)),
            Box::new(General::<papaya::HashMap<Key, u32, State>>::new(flows)),
            Box::new(General::<scc::HashMap<Key, u32, State>>::new(flows)),
            Box::new(General::<Sharded<Mutex<HashMap<Key, u32, State>>>>::new(flows)),
            Box::new(General::<Sharded<RwLock<HashMap<Key, u32, State>>>>::new(flows)),
        ];
        for candidate in &candidates {
            let mut worker = candidate.worker();
            order.chunks(BURST).for_each(|clients| worker.insert(clients));
        }
        println!("\n{flows} connections");
        print!("{:<36}", "");
        works.iter().for_each(|(name, ..)| print!("{name:>28}"));
        println!();
        let mut taken = vec![vec![Vec::new(); works.len()]; candidates.len()];
        for _ in 0..rounds {
            for (work, (_, measured, beside)) in works.iter().enumerate() {
                for (number, candidate) in candidates.iter().enumerate() {
                    taken[number][work].push(run(&**candidate, measured, beside, [&present, &absent], flows, length));
                }
            }
        }
        for (candidate, taken) in candidates.iter().zip(&mut taken) {
            print!("{:<36}", candidate.name());
            for (values, (work, ..)) in taken.iter_mut().zip(&works) {
                let spread = Spread::of(values);
                print!("{:>28.1}", spread.median);
                tell("connection table", &format!("{flows} connections, {work}"), candidate.name(), "ns", spread);
            }
            println!();
        }
    }
}
