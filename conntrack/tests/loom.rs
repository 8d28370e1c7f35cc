//! Models of the table, run through every interleaving that the memory model allows, up to a bound on preemptions:
//! `RUSTFLAGS="--cfg loom" cargo test -p weir-conntrack --test loom`.
//!
//! Under loom a table has three buckets of two slots, and a domain three participants.
#![cfg(loom)]

use std::{
    net::Ipv4Addr,
    // Not loom's: they count over all executions of a model.
    sync::{
        Arc as StdArc,
        atomic::{AtomicUsize, Ordering},
    },
};

use weir_conntrack::{
    Attributes, Candidate, ConnId, ConnRef, Handle, Hit, Insert, NewConn, Observed, Table, TableConfig, TcpSettings,
    Timeouts, Tracked,
};
use weir_packet::{Direction, FlowKey, Ports, Protocol, Tick};
use weir_sync::{Arc, Domain, Turn, model_bounded, thread};

const NOW: Tick = Tick(1000);

type V4 = Table<Ipv4Addr>;

fn table(max_entries: u32) -> (Arc<Domain>, Arc<V4>) {
    let domain = Domain::new();
    let config = TableConfig { max_entries, seed: [1, 2], timeouts: Timeouts::default(), tcp: TcpSettings::default() };
    (domain.clone(), Arc::new(Table::new(config, domain)))
}

fn key(src: u32, dst: u32) -> FlowKey<Ipv4Addr> {
    FlowKey { src: src.into(), dst: dst.into(), ports: Ports::new(5, 6), protocol: Protocol::UDP }
}

fn conn(original: FlowKey<Ipv4Addr>, reply: FlowKey<Ipv4Addr>) -> NewConn<Ipv4Addr> {
    let device = u32::from(original.src);
    let attributes = Attributes { device, ..Attributes::default() };
    NewConn { original, reply, attributes, first: Observed::default() }
}

/// Goes through a model, and says how large it was.
fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let executions = model_bounded(preemptions, model);
    println!("{executions} executions");
    assert!(executions > 5, "a model of a race has many executions");
}

/// Runs one action on each of two threads, each with a handle and a turn of its own.
fn two<R: Send + 'static>(
    domain: &Arc<Domain>,
    table: &Arc<V4>,
    first: impl FnOnce(&V4, &mut Handle, &Turn<'_>) -> R,
    second: impl FnOnce(&V4, &mut Handle, &Turn<'_>) -> R + Send + 'static,
) -> [R; 2] {
    let other = {
        let (mut participant, mut handle, table) = (domain.join(), table.handle(), table.clone());
        thread::spawn(move || second(&table, &mut handle, &participant.enter()))
    };
    let (mut participant, mut handle) = (domain.join(), table.handle());
    let result = first(table, &mut handle, &participant.enter());
    [result, other.join().unwrap()]
}

/// Removes, and ends the turn as a worker does: what was removed is free once that turn, and those of others, are over.
fn remove(table: &V4, handle: &mut Handle, conn: ConnId, turn: &Turn<'_>) -> bool {
    let removed = table.remove(handle, conn, turn);
    table.sweep(handle, NOW, 0, turn);
    removed
}

fn lookup(table: &V4, key: FlowKey<Ipv4Addr>, turn: &Turn<'_>) -> Option<Hit> {
    table.lookup(&key, table.hash(&key), NOW, turn)
}

fn holder_of(domain: &Arc<Domain>, table: &V4, key: FlowKey<Ipv4Addr>) -> Option<Hit> {
    lookup(table, key, &domain.join().enter())
}

/// Fills so many slots with connections that have one key for both directions.
fn occupy(domain: &Arc<Domain>, table: &V4, slots: u32) {
    let (mut participant, mut handle) = (domain.join(), table.handle());
    for host in 100..100 + slots {
        let one = FlowKey { ports: Ports::new(5, 5), ..key(host, host) };
        let inserted = table.insert(&mut handle, conn(one, one), NOW, &participant.enter());
        assert!(matches!(inserted, Insert::Inserted(_)), "{inserted:?}");
    }
}

/// One flow, two workers, different backends: one connection, and the loser is told which.
#[test]
fn insertion_race_of_one_flow() {
    explore(2, || {
        let (domain, table) = table(3);
        let insert = |backend| {
            move |table: &V4, handle: &mut Handle, turn: &Turn<'_>| {
                table.insert(handle, conn(key(1, 2), key(backend, 1)), NOW, turn)
            }
        };
        let (winner, hit) = match two(&domain, &table, insert(10), insert(11)) {
            [Insert::Inserted(conn), Insert::Exists(hit)] | [Insert::Exists(hit), Insert::Inserted(conn)] => {
                (conn, hit)
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(hit, Hit { conn: winner, direction: Direction::Original });
        assert_eq!(holder_of(&domain, &table, key(1, 2)), Some(hit));
        let replies = [10, 11].map(|backend| holder_of(&domain, &table, key(backend, 1)));
        let reply = Some(Hit { conn: winner, direction: Direction::Reply });
        assert!(replies == [reply, None] || replies == [None, reply], "{replies:?}");
        assert_eq!(table.len(), 1);
    });
}

/// The same where homes are full, so that keys go elsewhere, and the first connection takes the last slots: then the
/// second one finds it, or no room.
#[test]
fn insertion_race_in_full_buckets() {
    explore(2, || {
        let (domain, table) = table(6);
        occupy(&domain, &table, 3);
        let insert = |backend| {
            move |table: &V4, handle: &mut Handle, turn: &Turn<'_>| {
                table.insert(handle, conn(key(1, 2), key(backend, 1)), NOW, turn)
            }
        };
        let results = two(&domain, &table, insert(10), insert(11));
        let held = holder_of(&domain, &table, key(1, 2));
        let replies = [10, 11].map(|backend| holder_of(&domain, &table, key(backend, 1)).map(|hit| hit.conn));
        match results {
            [Insert::Inserted(conn), Insert::Exists(Hit { conn: found, .. })]
            | [Insert::Exists(Hit { conn: found, .. }), Insert::Inserted(conn)] => {
                assert_eq!((found, held.map(|hit| hit.conn)), (conn, Some(conn)));
                assert!(replies == [Some(conn), None] || replies == [None, Some(conn)]);
            }
            [Insert::Inserted(conn), Insert::Full] | [Insert::Full, Insert::Inserted(conn)] => {
                assert_eq!(held.map(|hit| hit.conn), Some(conn));
                assert!(replies == [Some(conn), None] || replies == [None, Some(conn)]);
            }
            [Insert::Full, Insert::Full] => assert_eq!((held, replies), (None, [None, None])),
            other => panic!("{other:?}"),
        }
    });
}

/// Two originals whose replies would be the same: one gets it.
#[test]
fn insertion_race_for_one_reply_key() {
    explore(2, || {
        let (domain, table) = table(3);
        let insert = |frontend| {
            move |table: &V4, handle: &mut Handle, turn: &Turn<'_>| {
                table.insert(handle, conn(key(1, frontend), key(10, 1)), NOW, turn)
            }
        };
        let results = two(&domain, &table, insert(2), insert(3));
        assert!(
            matches!(
                results,
                [Insert::Inserted(_), Insert::ReplyTaken(_)] | [Insert::ReplyTaken(_), Insert::Inserted(_)]
            ),
            "{results:?}"
        );
        assert_eq!(table.len(), 1);
    });
}

/// Both ends open at once: each one's reply key is the other's original key.
#[test]
fn insertion_race_of_crossing_flows() {
    explore(2, || {
        let (domain, table) = table(3);
        let insert = |from, to| {
            move |table: &V4, handle: &mut Handle, turn: &Turn<'_>| {
                table.insert(handle, conn(key(from, to), key(to, from)), NOW, turn)
            }
        };
        match two(&domain, &table, insert(1, 2), insert(2, 1)) {
            [Insert::Inserted(conn), Insert::Exists(hit)] | [Insert::Exists(hit), Insert::Inserted(conn)] => {
                assert_eq!(hit, Hit { conn, direction: Direction::Reply });
            }
            other => panic!("{other:?}"),
        }
    });
}

/// Insertion against lookup: both directions at one instant.
#[test]
fn insertion_and_lookup() {
    explore(5, || {
        let (domain, table) = table(2);
        let results = two(
            &domain,
            &table,
            |table, handle, turn| {
                matches!(table.insert(handle, conn(key(1, 2), key(10, 1)), NOW, turn), Insert::Inserted(_))
            },
            |table, _, turn| {
                let Some(hit) = lookup(table, key(10, 1), turn) else { return true };
                let found = table.conn(hit.conn);
                let keys = (found.original(), found.reply(), found.device());
                let original = lookup(table, key(1, 2), turn);
                keys == (key(1, 2), key(10, 1), 1)
                    && original == Some(Hit { conn: hit.conn, direction: Direction::Original })
            },
        );
        assert_eq!(results, [true, true]);
    });
}

/// The same for a connection whose keys take the last slots, far from their homes.
#[test]
fn insertion_and_lookup_in_full_buckets() {
    explore(3, || {
        let (domain, table) = table(5);
        occupy(&domain, &table, 4);
        let results = two(
            &domain,
            &table,
            |table, handle, turn| {
                matches!(table.insert(handle, conn(key(1, 2), key(10, 1)), NOW, turn), Insert::Inserted(_))
            },
            |table, _, turn| {
                let Some(hit) = lookup(table, key(10, 1), turn) else { return true };
                lookup(table, key(1, 2), turn) == Some(Hit { conn: hit.conn, direction: Direction::Original })
            },
        );
        assert_eq!(results, [true, true]);
        assert!([key(1, 2), key(10, 1)].iter().all(|key| holder_of(&domain, &table, *key).is_some()));
    });
}

/// Removal of keys that are not at home, against the lookup of others that are not.
#[test]
fn removal_and_lookup_in_full_buckets() {
    explore(3, || {
        let (domain, table) = table(5);
        occupy(&domain, &table, 2);
        let [stays, goes] = [1, 3].map(|src| {
            let (mut participant, mut handle) = (domain.join(), table.handle());
            match table.insert(&mut handle, conn(key(src, 2), key(10, src)), NOW, &participant.enter()) {
                Insert::Inserted(id) => id,
                other => panic!("{other:?}"),
            }
        });
        let results = two(
            &domain,
            &table,
            |table, handle, turn| remove(table, handle, goes, turn),
            move |table, _, turn| {
                let all = [(key(1, 2), Direction::Original), (key(10, 1), Direction::Reply)];
                all.into_iter().all(|(key, direction)| lookup(table, key, turn) == Some(Hit { conn: stays, direction }))
            },
        );
        assert_eq!(results, [true, true]);
        assert!([key(3, 2), key(10, 3)].iter().all(|key| holder_of(&domain, &table, *key).is_none()));
    });
}

/// Insertion against the removal of the connection that holds its key: it finds it or takes its place.
#[test]
fn insertion_and_removal() {
    explore(3, || {
        let (domain, table) = table(3);
        let old = {
            let (mut handle, mut participant) = (table.handle(), domain.join());
            let Insert::Inserted(old) =
                table.insert(&mut handle, conn(key(1, 2), key(10, 1)), NOW, &participant.enter())
            else {
                panic!("room")
            };
            old
        };
        let [inserted, _] = two(
            &domain,
            &table,
            |table, handle, turn| Some(table.insert(handle, conn(key(1, 2), key(11, 1)), NOW, turn)),
            move |table, handle, turn| {
                assert!(table.remove(handle, old, turn));
                None
            },
        );
        let original = holder_of(&domain, &table, key(1, 2));
        match inserted {
            Some(Insert::Exists(hit)) => assert_eq!((hit.conn, original), (old, None)),
            Some(Insert::Inserted(new)) => assert_eq!(original.map(|hit| hit.conn), Some(new)),
            other => panic!("{other:?}"),
        }
        assert_eq!(holder_of(&domain, &table, key(10, 1)), None);
    });
}

/// Two removals of one connection: one of them does it, and the bucket is clear.
#[test]
fn removal_race() {
    explore(5, || {
        let (domain, table) = table(2);
        let id = {
            let (mut handle, mut participant) = (table.handle(), domain.join());
            match table.insert(&mut handle, conn(key(1, 2), key(2, 1)), NOW, &participant.enter()) {
                Insert::Inserted(id) => id,
                other => panic!("{other:?}"),
            }
        };
        let remove = move |table: &V4, handle: &mut Handle, turn: &Turn<'_>| table.remove(handle, id, turn);
        let [first, second] = two(&domain, &table, remove, remove);
        assert!(first != second);
        assert_eq!(holder_of(&domain, &table, key(1, 2)), None);
    });
}

/// Removal and reuse of the only index against a reader: it sees the one connection or the other, never a mixture, and
/// what it has found stays as it is while its turn lasts.
#[test]
fn removal_reuse_and_reader() {
    explore(3, || {
        let (domain, table) = table(1);
        let (mut handle, mut participant) = (table.handle(), domain.join());
        let insert = |handle: &mut Handle, turn: &Turn<'_>, src| match table.insert(
            handle,
            conn(key(src, 2), key(2, src)),
            NOW,
            turn,
        ) {
            Insert::Inserted(id) => Some(id),
            Insert::Full => None,
            other => panic!("{other:?}"),
        };
        let old = insert(&mut handle, &participant.enter(), 1).unwrap();
        let reader = {
            let (mut participant, table) = (domain.join(), table.clone());
            thread::spawn(move || {
                let turn = participant.enter();
                for src in [1, 3] {
                    if let Some(hit) = lookup(&table, key(src, 2), &turn) {
                        let found = table.conn(hit.conn);
                        assert_eq!((found.original(), found.device()), (key(src, 2), src));
                        assert_eq!(found.reply(), key(2, src));
                    }
                }
            })
        };
        assert!(table.remove(&mut handle, old, &participant.enter()));
        let new = insert(&mut handle, &participant.enter(), 3);
        reader.join().unwrap();
        if new.is_none() {
            // The reader was in its way.
            assert!(insert(&mut handle, &participant.enter(), 3).is_some());
        }
        assert_eq!(lookup(&table, key(1, 2), &participant.enter()), None);
        assert!(lookup(&table, key(3, 2), &participant.enter()).is_some());
    });
}

/// A listing outside of turns, while the only index is removed and reused: each entry is of one connection.
#[test]
fn listing_and_reuse() {
    explore(1, || {
        let (domain, table) = table(1);
        let (mut handle, mut participant) = (table.handle(), domain.join());
        let insert =
            |handle: &mut Handle, turn: &Turn<'_>, src| table.insert(handle, conn(key(src, 2), key(2, src)), NOW, turn);
        let Insert::Inserted(old) = insert(&mut handle, &participant.enter(), 1) else { panic!("room") };
        let lister = {
            let table = table.clone();
            thread::spawn(move || {
                table.for_each(NOW, |entry| {
                    let src = entry.attributes.device;
                    assert_eq!((entry.original, entry.reply), (key(src, 2), key(2, src)));
                });
            })
        };
        assert!(remove(&table, &mut handle, old, &participant.enter()));
        assert!(matches!(insert(&mut handle, &participant.enter(), 3), Insert::Inserted(ConnId { .. })));
        lister.join().unwrap();
    });
}

/// Candidates against removal, and reuse of the only index: asked for its own key or for another, a candidate is never another key's connection.
#[test]
fn candidate_and_reuse() {
    static FOUND: AtomicUsize = AtomicUsize::new(0);
    static GONE: AtomicUsize = AtomicUsize::new(0);
    explore(3, || {
        let (domain, table) = table(1);
        let (mut handle, mut participant) = (table.handle(), domain.join());
        let insert =
            |handle: &mut Handle, turn: &Turn<'_>, src| table.insert(handle, conn(key(src, 2), key(2, src)), NOW, turn);
        let Insert::Inserted(old) = insert(&mut handle, &participant.enter(), 1) else { panic!("room") };
        let reader = {
            let (mut participant, table) = (domain.join(), table.clone());
            thread::spawn(move || {
                let turn = participant.enter();
                let keys = [1, 3].map(|src| key(src, 2));
                let candidates = keys.map(|key| table.candidate(table.hash(&key), &turn));
                for (candidate, own) in candidates.into_iter().zip(keys) {
                    let found = keys.map(|key| table.expected(candidate, &key, NOW, &turn).map(|hit| (key, hit)));
                    for (key, (conn, direction)) in found.into_iter().flatten() {
                        let src = u32::from(key.src);
                        assert_eq!((conn.original(), conn.device(), direction), (key, src, Direction::Original));
                        let leaves_with = conn.leaves_with(direction, Protocol::UDP);
                        assert_eq!(leaves_with, conn.reply().invert());
                        FOUND.fetch_add(1, Ordering::Relaxed);
                    }
                    let is_gone = candidate != Candidate::NONE && lookup(&table, own, &turn).is_none();
                    GONE.fetch_add(is_gone.into(), Ordering::Relaxed);
                }
            })
        };
        assert!(remove(&table, &mut handle, old, &participant.enter()));
        // Full while the reader is in its way.
        let inserted = insert(&mut handle, &participant.enter(), 3);
        assert!(matches!(inserted, Insert::Inserted(_) | Insert::Full), "{inserted:?}");
        reader.join().unwrap();
    });
    assert!(FOUND.load(Ordering::Relaxed) > 0 && GONE.load(Ordering::Relaxed) > 0);
}

/// A candidate of a connection that is just being inserted: not before all of it is there.
#[test]
fn candidate_and_insertion() {
    static FOUND: AtomicUsize = AtomicUsize::new(0);
    explore(3, || {
        let (domain, table) = table(2);
        let results = two(
            &domain,
            &table,
            |table, handle, turn| {
                matches!(table.insert(handle, conn(key(1, 2), key(10, 1)), NOW, turn), Insert::Inserted(_))
            },
            |table, _, turn| {
                let candidate = table.candidate(table.hash(&key(10, 1)), turn);
                let Some((found, direction)) = table.expected(candidate, &key(10, 1), NOW, turn) else { return true };
                FOUND.fetch_add(1, Ordering::Relaxed);
                let keys = (found.original(), found.leaves_with(direction, Protocol::UDP), found.device());
                let original = lookup(table, key(1, 2), turn);
                keys == (key(1, 2), key(1, 2).invert(), 1)
                    && original == Some(Hit { conn: found.id(), direction: Direction::Original })
            },
        );
        assert_eq!(results, [true, true]);
    });
    assert!(FOUND.load(Ordering::Relaxed) > 0);
}

/// How a segment is followed; whether it was an ordinary one.
type Way = fn(ConnRef<'_, Ipv4Addr>, Direction, &Observed) -> (Tracked, bool);

fn general(conn: ConnRef<'_, Ipv4Addr>, direction: Direction, segment: &Observed) -> (Tracked, bool) {
    (conn.track(direction, segment, NOW), false)
}

fn ordinary_first(conn: ConnRef<'_, Ipv4Addr>, direction: Direction, segment: &Observed) -> (Tracked, bool) {
    match conn.track_ordinary(direction, segment, NOW) {
        true => (Tracked::Accept, true),
        false => general(conn, direction, segment),
    }
}

fn segment(tcp_flags: u8, tcp_seq: u32, tcp_ack: u32, payload_bytes: u32) -> Observed {
    Observed { tcp_flags, tcp_seq, tcp_ack, tcp_window: 64_240, payload_bytes, ..Observed::default() }
}

/// A connection whose sides begin at 1000 and 5000, after its handshake.
fn established(domain: &Arc<Domain>, table: &V4) -> ConnId {
    let tcp = |key: FlowKey<Ipv4Addr>| FlowKey { protocol: Protocol::TCP, ..key };
    let (mut participant, mut handle) = (domain.join(), table.handle());
    let new = NewConn { first: segment(0x02, 999, 0, 0), ..conn(tcp(key(1, 2)), tcp(key(2, 1))) };
    let Insert::Inserted(id) = table.insert(&mut handle, new, NOW, &participant.enter()) else { panic!("room") };
    let conn = table.conn(id);
    assert_eq!(conn.track(Direction::Reply, &segment(0x12, 4999, 1000, 0), NOW), Tracked::Accept);
    assert_eq!(conn.track(Direction::Original, &segment(0x10, 1000, 5000, 0), NOW), Tracked::Accept);
    id
}

/// Data of one direction on two workers at once: whichever comes first, an acknowledgment of all of it is inside the window.
fn windows_of_two_workers(ways: [Way; 2]) -> usize {
    let ordinary = StdArc::new(AtomicUsize::new(0));
    let counter = ordinary.clone();
    explore(2, move || {
        let (domain, table) = table(1);
        let id = established(&domain, &table);
        let data = |seq, way: Way| {
            let counter = counter.clone();
            move |table: &V4, _: &mut Handle, _: &Turn<'_>| {
                let (tracked, ordinary) = way(table.conn(id), Direction::Original, &segment(0x10, seq, 5000, 100));
                counter.fetch_add(ordinary.into(), Ordering::Relaxed);
                tracked
            }
        };
        let results = two(&domain, &table, data(1000, ways[0]), data(1100, ways[1]));
        assert_eq!(results, [Tracked::Accept; 2]);
        let conn = table.conn(id);
        let [sent, _] = conn.windows().expect("an established connection's").sides;
        assert_eq!(sent[0], 1200, "no end of data is lost");
        assert_eq!(conn.track(Direction::Reply, &segment(0x10, 5000, 1200, 0), NOW), Tracked::Accept);
        assert_eq!(conn.track(Direction::Original, &segment(0x10, 1200, 5000, 100), NOW), Tracked::Accept);
    });
    ordinary.load(Ordering::Relaxed)
}

#[test]
fn windows_of_two_workers_the_general_way() {
    windows_of_two_workers([general, general]);
}

#[test]
fn windows_of_two_workers_the_ordinary_way() {
    assert!(windows_of_two_workers([ordinary_first, ordinary_first]) > 0);
}

#[test]
fn windows_of_two_workers_each_in_another_way() {
    assert!(windows_of_two_workers([general, ordinary_first]) > 0);
}

/// Both directions at once, data against the acknowledgment of the data before: nothing of either is lost.
#[test]
fn both_directions_the_ordinary_way() {
    explore(2, || {
        let (domain, table) = table(1);
        let id = established(&domain, &table);
        let first = segment(0x10, 1000, 5000, 100);
        assert_eq!(ordinary_first(table.conn(id), Direction::Original, &first), (Tracked::Accept, true));
        let follow = |direction, observed: Observed| {
            move |table: &V4, _: &mut Handle, _: &Turn<'_>| ordinary_first(table.conn(id), direction, &observed).0
        };
        let data = follow(Direction::Original, segment(0x10, 1100, 5000, 100));
        let answer = follow(Direction::Reply, segment(0x10, 5000, 1100, 50));
        assert_eq!(two(&domain, &table, data, answer), [Tracked::Accept; 2]);
        let conn = table.conn(id);
        let [original, reply] = conn.windows().expect("an established connection's").sides;
        assert_eq!([original[0], reply[0], reply[3]], [1200, 5050, 1100]);
        assert_eq!(original[1], 1100 + 64_240, "what the answer has offered");
        assert_eq!(conn.track(Direction::Reply, &segment(0x10, 5050, 1200, 0), NOW), Tracked::Accept);
    });
}

/// An ordinary segment changes a connection's timeout, while another worker removes it: it stays removed.
#[test]
fn ordinary_segment_and_removal() {
    static ORDINARY: AtomicUsize = AtomicUsize::new(0);
    static DECLINED: AtomicUsize = AtomicUsize::new(0);
    explore(3, || {
        let (domain, table) = table(1);
        let id = established(&domain, &table);
        let [ordinary, removed] = two(
            &domain,
            &table,
            move |table, _, _| {
                let data = segment(0x10, 1000, 5000, 100);
                table.conn(id).track_ordinary(Direction::Original, &data, NOW)
            },
            move |table, handle, turn| table.remove(handle, id, turn),
        );
        assert!(removed && !table.conn(id).is_live() && table.is_empty());
        if ordinary { &ORDINARY } else { &DECLINED }.fetch_add(1, Ordering::Relaxed);
    });
    assert!(ORDINARY.load(Ordering::Relaxed) > 0 && DECLINED.load(Ordering::Relaxed) > 0);
}
