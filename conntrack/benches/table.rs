//! Lookups that hit and miss, and insertion with removal, at 10 thousand and one million flows.
//!
//! Keys are visited in a random order, so that at one million flows each lookup's lines come from memory. `burst` asks
//! for the lines of 32 lookups ahead, as the dataplane does.

use std::{hint::black_box, net::Ipv4Addr, time::Duration};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use weir_conntrack::{Attributes, Insert, NewConn, Observed, Table, TableConfig, Timeouts};
use weir_packet::{FlowKey, Ports, Protocol, Tick};
use weir_sync::Domain;

const NOW: Tick = Tick(1);
const BURST: usize = 32;

fn new_conn(client: u32, protocol: Protocol) -> NewConn<Ipv4Addr> {
    let original = FlowKey {
        src: Ipv4Addr::from(0x0a00_0000 | client >> 8),
        dst: Ipv4Addr::new(10, 96, 0, 10),
        ports: Ports::new(20_000 + (client & 0xff) as u16, 53),
        protocol,
    };
    let reply = FlowKey { src: Ipv4Addr::new(10, 244, 1, 2), ..original.invert() };
    NewConn { original, reply, attributes: Attributes::default(), first: Observed::default() }
}

fn shuffled(flows: u32, random: &mut ChaCha8Rng) -> Vec<u32> {
    let mut order: Vec<u32> = (0..flows).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, random.next_u32() as usize % (i + 1));
    }
    order
}

fn table(criterion: &mut Criterion) {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for flows in [10_000u32, 1_000_000] {
        let domain = Domain::new();
        let mut participant = domain.join();
        let config = TableConfig {
            max_entries: flows + flows / 8,
            seed: [random.next_u64(), random.next_u64()],
            timeouts: Timeouts::default(),
        };
        let table = Table::<Ipv4Addr>::new(config, domain);
        let mut handle = table.handle();
        for client in shuffled(flows, &mut random) {
            let inserted = table.insert(&mut handle, new_conn(client, Protocol::UDP), NOW, &participant.enter());
            assert!(matches!(inserted, Insert::Inserted(_)));
        }
        let keys = |protocol, random: &mut ChaCha8Rng| -> Vec<_> {
            shuffled(flows, random).into_iter().map(|client| new_conn(client, protocol).original).collect()
        };
        let (present, absent) = (keys(Protocol::UDP, &mut random), keys(Protocol::SCTP, &mut random));

        let mut group = criterion.benchmark_group("table");
        group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2)).sample_size(20);
        group.throughput(Throughput::Elements(BURST as u64));
        for (name, keys) in [("hit", &present), ("miss", &absent)] {
            let mut bursts = keys.chunks_exact(BURST).cycle();
            group.bench_with_input(BenchmarkId::new(name, flows), &(), |bencher, ()| {
                bencher.iter(|| {
                    let turn = participant.enter();
                    let burst = bursts.next().expect("an endless cycle");
                    burst.iter().filter_map(|key| table.lookup(key, table.hash(key), NOW, &turn)).for_each(|hit| {
                        black_box(table.conn(hit.conn).generation());
                    });
                });
            });
        }
        let mut bursts = present.chunks_exact(BURST).cycle();
        group.bench_with_input(BenchmarkId::new("hit, burst", flows), &(), |bencher, ()| {
            bencher.iter(|| {
                let turn = participant.enter();
                let burst = bursts.next().expect("an endless cycle");
                let hashes: [_; BURST] = std::array::from_fn(|i| table.hash(&burst[i]));
                hashes.iter().for_each(|hash| table.prefetch(*hash));
                hashes.iter().for_each(|hash| table.prefetch_conn(*hash));
                for (key, hash) in burst.iter().zip(hashes) {
                    if let Some(hit) = table.lookup(key, hash, NOW, &turn) {
                        black_box(table.conn(hit.conn).generation());
                    }
                }
            });
        });
        group.throughput(Throughput::Elements(1));
        let mut client = 0u32;
        group.bench_with_input(BenchmarkId::new("insert and remove", flows), &(), |bencher, ()| {
            bencher.iter_batched(
                || {
                    client = client.wrapping_add(7919);
                    new_conn(client & 0x007f_ffff | 0x0080_0000, Protocol::UDP)
                },
                |new| {
                    let turn = participant.enter();
                    match table.insert(&mut handle, new, NOW, &turn) {
                        Insert::Inserted(conn) => assert!(table.remove(&mut handle, conn, &turn)),
                        other => panic!("{other:?}"),
                    }
                },
                BatchSize::SmallInput,
            );
        });
        group.finish();
    }
}

criterion_group!(benches, table);
criterion_main!(benches);
