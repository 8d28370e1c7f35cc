//! Lookups that hit and miss, and insertion with removal, at 10 thousand and one million flows; and what it costs to
//! follow a TCP segment once its connection is in the cache.
//!
//! Keys are visited in a random order, so that at one million flows each lookup's lines come from memory. `burst` asks
//! for the lines of 32 lookups ahead, as the dataplane does.

use std::{hint::black_box, net::Ipv4Addr, time::Duration};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use weir_conntrack::{Attributes, Insert, NewConn, Observed, Table, TableConfig, TcpSettings, Timeouts, Tracked};
use weir_packet::{Direction, FlowKey, Ports, Protocol, Tick};
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
            tcp: TcpSettings::default(),
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
                let candidates = hashes.map(|hash| {
                    let candidate = table.candidate(hash, &turn);
                    table.prefetch_candidate(candidate, Protocol::UDP);
                    candidate
                });
                for ((key, hash), candidate) in burst.iter().zip(hashes).zip(candidates) {
                    let expected = table.expected(candidate, key, NOW, &turn).map(|(conn, _)| conn);
                    let looked_up = || table.lookup(key, hash, NOW, &turn).map(|hit| table.conn(hit.conn));
                    if let Some(conn) = expected.or_else(looked_up) {
                        black_box(conn.generation());
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

/// Data in one direction and its acknowledgment in the other, on an established connection.
fn track(criterion: &mut Criterion) {
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    let domain = Domain::new();
    let mut participant = domain.join();
    let config =
        TableConfig { max_entries: 16, seed: [1, 2], timeouts: Timeouts::default(), tcp: TcpSettings::default() };
    let table = Table::<Ipv4Addr>::new(config, domain);
    let mut handle = table.handle();
    let segment = |tcp_flags, tcp_seq, tcp_ack, payload_bytes| Observed {
        tcp_flags,
        tcp_seq,
        tcp_ack,
        tcp_window: 64_240,
        payload_bytes,
        ..Observed::default()
    };
    let turn = participant.enter();
    let new = NewConn { first: segment(SYN, 999, 0, 0), ..new_conn(1, Protocol::TCP) };
    let Insert::Inserted(id) = table.insert(&mut handle, new, NOW, &turn) else { panic!("room for one") };
    let conn = table.conn(id);
    assert_eq!(conn.track(Direction::Reply, &segment(SYN | ACK, 4999, 1000, 0), NOW), Tracked::Accept);
    assert_eq!(conn.track(Direction::Original, &segment(ACK, 1000, 5000, 0), NOW), Tracked::Accept);
    let mut group = criterion.benchmark_group("track");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2)).sample_size(20);
    group.throughput(Throughput::Elements(2));
    let mut seq = 1000u32;
    group.bench_function("TCP data and its ACK", |bencher| {
        bencher.iter(|| {
            let data = black_box(segment(ACK, seq, 5000, 1448));
            assert_eq!(conn.track(Direction::Original, &data, NOW), Tracked::Accept);
            seq = seq.wrapping_add(1448);
            let ack = black_box(segment(ACK, 5000, seq, 0));
            assert_eq!(conn.track(Direction::Reply, &ack, NOW), Tracked::Accept);
        });
    });
    group.finish();
}

criterion_group!(benches, table, track);
criterion_main!(benches);
