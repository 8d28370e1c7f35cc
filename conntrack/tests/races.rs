//! Two threads at a time, for each race that the table's theory names. What comes out is checked at the end of each
//! round; loom's models (loom.rs) go through the interleavings that a run like this rarely meets.
#![cfg(not(loom))]

use std::{
    net::Ipv4Addr,
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use weir_conntrack::{Attributes, Handle, Hit, Insert, NewConn, Observed, Table, TableConfig, TcpSettings, Timeouts};
use weir_packet::{Direction, FlowKey, Ports, Protocol, Tick};
use weir_sync::{Arc, Domain, Participant, Turn};

const NOW: Tick = Tick(1000);
const FLOWS: u32 = if cfg!(miri) { 50 } else { 30_000 };

fn table(max_entries: u32) -> (Arc<Domain>, Table<Ipv4Addr>) {
    let domain = Domain::new();
    let config =
        TableConfig { max_entries, seed: [0xfeed, 0xbeef], timeouts: Timeouts::default(), tcp: TcpSettings::default() };
    (domain.clone(), Table::new(config, domain))
}

fn key(src: u32, dst: u32, flow: u32) -> FlowKey<Ipv4Addr> {
    FlowKey { src: src.into(), dst: dst.into(), ports: Ports::from_word(flow), protocol: Protocol::UDP }
}

fn conn(original: FlowKey<Ipv4Addr>, reply: FlowKey<Ipv4Addr>, mark: u32) -> NewConn<Ipv4Addr> {
    let attributes = Attributes { device: mark, stamps: [mark; 3], generation: mark, next_hops: [mark; 2], flags: 0 };
    NewConn { original, reply, attributes, first: Observed::default() }
}

/// Runs `each` for every flow on two threads that start together; their results by flow.
fn both<R: Send>(
    (domain, table): (&Arc<Domain>, &Table<Ipv4Addr>),
    each: impl Fn(usize, u32, &mut Handle, &Turn<'_>) -> R + Sync,
) -> Vec<[R; 2]> {
    let start = Barrier::new(2);
    let worker = |number: usize, participant: &mut Participant| -> Vec<R> {
        let mut handle = table.handle();
        start.wait();
        (0..FLOWS).map(|flow| each(number, flow, &mut handle, &participant.enter())).collect()
    };
    let (first, second) = thread::scope(|scope| {
        let other = scope.spawn(|| worker(1, &mut domain.join()));
        (worker(0, &mut domain.join()), other.join().expect("the other worker"))
    });
    first.into_iter().zip(second).map(|(a, b)| [a, b]).collect()
}

fn check_all_found(domain: &Arc<Domain>, table: &Table<Ipv4Addr>) {
    let (mut participant, mut seen) = (domain.join(), 0);
    table.for_each(NOW, |entry| {
        let turn = participant.enter();
        let original = table.lookup(&entry.original, table.hash(&entry.original), NOW, &turn).expect("original");
        let reply = table.lookup(&entry.reply, table.hash(&entry.reply), NOW, &turn).expect("reply");
        assert_eq!((original.conn, Direction::Reply), (reply.conn, reply.direction));
        seen += 1;
    });
    assert_eq!(seen, table.len());
}

/// The DNS A and AAAA race: first packets of one flow on two workers, which pick different backends.
#[test]
fn one_flow_on_two_workers_becomes_one_connection() {
    let (domain, table) = table(2 * FLOWS);
    let results = both((&domain, &table), |worker, flow, handle, turn| {
        table.insert(handle, conn(key(1, 2, flow), key(100 + worker as u32, 1, flow), worker as u32), NOW, turn)
    });
    for (flow, results) in results.into_iter().enumerate() {
        match results {
            [Insert::Inserted(conn), Insert::Exists(hit)] | [Insert::Exists(hit), Insert::Inserted(conn)] => {
                assert_eq!(hit, Hit { conn, direction: Direction::Original });
            }
            other => panic!("flow {flow}: {other:?}"),
        }
    }
    assert_eq!(table.len(), FLOWS as usize);
    check_all_found(&domain, &table);
}

/// The same without NAT: both workers bring the same two keys.
#[test]
fn one_plain_flow_on_two_workers_becomes_one_connection() {
    let (domain, table) = table(2 * FLOWS);
    let results = both((&domain, &table), |_, flow, handle, turn| {
        table.insert(handle, conn(key(1, 2, flow), key(2, 1, flow), flow), NOW, turn)
    });
    for (flow, results) in results.into_iter().enumerate() {
        match results {
            [Insert::Inserted(conn), Insert::Exists(hit)] | [Insert::Exists(hit), Insert::Inserted(conn)] => {
                assert_eq!(hit, Hit { conn, direction: Direction::Original });
            }
            other => panic!("flow {flow}: {other:?}"),
        }
    }
    check_all_found(&domain, &table);
}

/// Two VIPs that share a backend: different original keys, one reply key.
#[test]
fn a_reply_key_is_given_to_one_of_two() {
    let (domain, table) = table(2 * FLOWS);
    let results = both((&domain, &table), |worker, flow, handle, turn| {
        table.insert(handle, conn(key(1, 2 + worker as u32, flow), key(100, 1, flow), 0), NOW, turn)
    });
    for (flow, results) in results.into_iter().enumerate() {
        assert!(
            matches!(
                results,
                [Insert::Inserted(_), Insert::ReplyTaken(_)] | [Insert::ReplyTaken(_), Insert::Inserted(_)]
            ),
            "flow {flow}: {results:?}"
        );
    }
    assert_eq!(table.len(), FLOWS as usize);
    check_all_found(&domain, &table);
}

/// netfilter's "reverse clash": both ends open at once, so that each one's reply key is the other's original key.
#[test]
fn crossing_first_packets_become_one_connection() {
    let (domain, table) = table(2 * FLOWS);
    let results = both((&domain, &table), |worker, flow, handle, turn| {
        let (a, b) = (key(1, 2, flow), key(2, 1, flow));
        table.insert(handle, if worker == 0 { conn(a, b, 0) } else { conn(b, a, 1) }, NOW, turn)
    });
    for (flow, results) in results.into_iter().enumerate() {
        match results {
            [Insert::Inserted(conn), Insert::Exists(hit)] | [Insert::Exists(hit), Insert::Inserted(conn)] => {
                assert_eq!(hit, Hit { conn, direction: Direction::Reply });
            }
            other => panic!("flow {flow}: {other:?}"),
        }
    }
    check_all_found(&domain, &table);
}

/// Insertion against lookup: who finds one direction finds the other, of the same connection.
#[test]
fn both_directions_appear_together() {
    let (domain, table) = table(2 * FLOWS);
    let results = both((&domain, &table), |worker, flow, handle, turn| {
        let (original, reply) = (key(1, 2, flow), key(100, 1, flow));
        if worker == 0 {
            let inserted = table.insert(handle, conn(original, reply, flow), NOW, turn);
            return matches!(inserted, Insert::Inserted(_));
        }
        let keys = if flow % 2 == 0 { [original, reply] } else { [reply, original] };
        let Some(hit) = table.lookup(&keys[0], table.hash(&keys[0]), NOW, turn) else { return true };
        let other = table.lookup(&keys[1], table.hash(&keys[1]), NOW, turn);
        let found = table.conn(hit.conn);
        other == Some(Hit { conn: hit.conn, direction: hit.direction.flip() })
            && (found.original(), found.reply(), found.device()) == (original, reply, flow)
    });
    assert!(results.into_iter().flatten().all(|right| right));
}

/// Two workers remove one connection: one of them does.
#[test]
fn a_connection_is_removed_once() {
    let (domain, table) = table(FLOWS);
    {
        let (mut handle, mut participant) = (table.handle(), domain.join());
        let turn = participant.enter();
        for flow in 0..FLOWS {
            let inserted = table.insert(&mut handle, conn(key(1, 2, flow), key(2, 1, flow), 0), NOW, &turn);
            assert!(matches!(inserted, Insert::Inserted(_)));
        }
    }
    let results = both((&domain, &table), |_, flow, handle, turn| {
        let key = key(1, 2, flow);
        let hit = table.lookup(&key, table.hash(&key), NOW, turn);
        hit.is_some_and(|hit| table.remove(handle, hit.conn, turn))
    });
    assert!(results.iter().all(|[a, b]| a != b));
    assert_eq!((table.len(), table.counts().removed), (0, u64::from(FLOWS)));
}

/// Removal and reuse against a reader: what was found in a turn keeps its keys and attributes until the turn ends,
/// in a table so small that every index is used again at once.
#[test]
fn what_a_turn_has_found_is_not_reused_in_it() {
    let (domain, table) = table(2);
    let (stop, found) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut participant = domain.join();
            while !stop.load(Ordering::Relaxed) {
                let turn = participant.enter();
                for flow in 0..4 {
                    let key = key(1, 2, flow);
                    let Some(hit) = table.lookup(&key, table.hash(&key), NOW, &turn) else { continue };
                    let conn = table.conn(hit.conn);
                    for _ in 0..20 {
                        std::hint::spin_loop();
                        assert_eq!((conn.original(), conn.device()), (key, flow));
                        assert_eq!((conn.stamps(), conn.next_hops()), ([flow; 3], [flow; 2]));
                    }
                    found.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let (mut handle, mut participant) = (table.handle(), domain.join());
        let (mut round, rounds) = (0, if cfg!(miri) { 20 } else { 100_000 });
        while round < rounds || found.load(Ordering::Relaxed) == 0 {
            let turn = participant.enter();
            let flow = round % 4;
            if let Insert::Inserted(conn) =
                table.insert(&mut handle, conn(key(1, 2, flow), key(2, 1, flow), flow), NOW, &turn)
            {
                table.remove(&mut handle, conn, &turn);
            }
            round += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// Everything at once, in a small table; at the end nothing is lost and nothing is left.
#[test]
fn a_long_mix_leaves_nothing_behind() {
    const KEYS: u32 = 40;
    let (domain, table) = table(24);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let lister = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                table.for_each(NOW, |entry| {
                    let mark = entry.attributes.device;
                    assert_eq!(entry.attributes.stamps, [mark; 3], "of one moment: {entry:?}");
                    assert_eq!((entry.original.ports.word(), entry.reply.dst), (mark, entry.original.src));
                });
            }
        });
        let workers: Vec<_> = (0..3u32)
            .map(|worker| {
                let (domain, table) = (&domain, &table);
                scope.spawn(move || {
                    let (mut handle, mut participant) = (table.handle(), domain.join());
                    let mut random = worker * 7919 + 1;
                    for round in 0..if cfg!(miri) { 60 } else { 100_000 } {
                        random ^= random << 13;
                        random ^= random >> 17;
                        random ^= random << 5;
                        let turn = participant.enter();
                        let (flow, other) = (random % KEYS, random / 64 % 3);
                        let original = key(1 + other, 2, flow);
                        match random >> 29 {
                            0..4 => {
                                let new = conn(original, key(100, 1 + other, flow / 2), flow);
                                let _ = table.insert(&mut handle, new, NOW, &turn);
                            }
                            4..6 => {
                                if let Some(hit) = table.lookup(&original, table.hash(&original), NOW, &turn) {
                                    let found = table.conn(hit.conn);
                                    assert_eq!(found.key(hit.direction), original);
                                    found.track(Direction::Reply, &Observed::default(), NOW);
                                    found.change_flags(round as u8, 0);
                                }
                            }
                            6 => {
                                if let Some(hit) = table.lookup(&original, table.hash(&original), NOW, &turn) {
                                    table.remove(&mut handle, hit.conn, &turn);
                                }
                            }
                            // Another clock, to which everything has expired.
                            _ => {
                                table.sweep(&mut handle, Tick(NOW.0 + 3000 * (round % 2)), 8, &turn);
                            }
                        }
                    }
                })
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().expect("a worker"));
        stop.store(true, Ordering::Relaxed);
        lister.join().expect("what it saw was of one moment each");
    });
    check_all_found(&domain, &table);
    let (mut handle, mut participant) = (table.handle(), domain.join());
    let mut listed = Vec::new();
    table.for_each(NOW, |entry| listed.push(entry.original));
    for original in listed {
        let turn = participant.enter();
        let hit = table.lookup(&original, table.hash(&original), NOW, &turn).expect("listed");
        assert!(table.remove(&mut handle, hit.conn, &turn));
    }
    let counts = table.counts();
    assert_eq!((table.len(), counts.inserted), (0, counts.removed));
    // Every index has come back.
    let inserted = (0..2 * 24).filter(|flow| {
        table.sweep(&mut handle, NOW, 0, &participant.enter());
        let new = conn(key(7, 8, *flow), key(8, 7, *flow), *flow);
        matches!(table.insert(&mut handle, new, NOW, &participant.enter()), Insert::Inserted(_))
    });
    assert_eq!(inserted.count(), 24);
}

/// A SYN's answer comes on one worker while another one needs its port: who is answered first stays, who is displaced first was not answered.
#[test]
fn an_answered_connection_is_not_displaced() {
    const ROUNDS: u32 = if cfg!(miri) { 20 } else { 20_000 };
    let (domain, table) = table(ROUNDS + 10);
    let start = Barrier::new(2);
    let (mut kept, mut displaced) = (0, 0);
    let found = |flow: u32, turn: &Turn<'_>| {
        let original = key(1, 2, flow);
        table.lookup(&original, table.hash(&original), NOW, turn).expect("nobody else has removed it").conn
    };
    let mut participant = domain.join();
    let mut handle = table.handle();
    let silent_since = Tick(NOW.0.wrapping_sub(1000));
    for flow in 0..ROUNDS {
        let new = conn(key(1, 2, flow), key(2, 1, flow), flow);
        assert!(matches!(table.insert(&mut handle, new, silent_since, &participant.enter()), Insert::Inserted(_)));
    }
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut participant = domain.join();
            for flow in 0..ROUNDS {
                // As one whose turn began before the other's.
                let turn = participant.enter();
                let id = found(flow, &turn);
                start.wait();
                let _ = table.conn(id).track(Direction::Reply, &Observed::default(), NOW);
                start.wait();
            }
        });
        for flow in 0..ROUNDS {
            let turn = participant.enter();
            let id = found(flow, &turn);
            start.wait();
            let is_displaced = table.remove_expendable(&mut handle, id, false, NOW, &turn);
            start.wait();
            let conn = table.conn(id);
            assert_eq!((conn.is_live(), conn.seen_reply()), (!is_displaced, !is_displaced), "flow {flow}");
            *(if is_displaced { &mut displaced } else { &mut kept }) += 1;
        }
    });
    println!("{kept} were answered first, {displaced} displaced first");
    assert_eq!(table.len(), kept);
}
