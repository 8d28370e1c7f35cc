//! Sequences of TCP segments: after each, the verdict, the state, and what is left of the timeout.
#![cfg(not(loom))]

use std::{cell::Cell, net::Ipv4Addr};

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use weir_conntrack::{
    Attributes, ConnRef, Entry, Hit, Insert, Lifecycle, NewConn, Observed, Opening, Table, TableConfig, TcpSettings,
    TcpState, Timeouts, Tracked, Windows,
};
use weir_packet::{Direction, FlowKey, Ports, Protocol, Tick, options::TcpOptions};
use weir_sync::Domain;

mod sequences;

use Direction::{Original, Reply};
use TcpState::*;
use Tracked::{Accept, Invalid};
use sequences::{A, FA, PA, R, S, SA, Sequence, segment};

/// Shows a connection that `first` has opened.
fn open(first: Observed, tcp: TcpSettings, show: impl FnOnce(ConnRef<'_, Ipv4Addr>)) {
    open_in(first, tcp, |_, conn| show(conn));
}

/// The same with its table, in which it has index 0.
fn open_in(first: Observed, tcp: TcpSettings, show: impl FnOnce(&Table<Ipv4Addr>, ConnRef<'_, Ipv4Addr>)) {
    let domain = Domain::new();
    let mut participant = domain.join();
    let config = TableConfig { max_entries: 4, seed: [1, 2], timeouts: Timeouts::default(), tcp };
    let table = Table::<Ipv4Addr>::new(config, domain);
    let (mut handle, turn) = (table.handle(), participant.enter());
    let original = FlowKey {
        src: [10, 0, 0, 1].into(),
        dst: [10, 0, 0, 2].into(),
        ports: Ports::new(40000, 80),
        protocol: Protocol::TCP,
    };
    assert_ne!(first.opening(&original), Opening::Never);
    let new = NewConn { original, reply: original.invert(), attributes: Attributes::default(), first };
    let Insert::Inserted(id) = table.insert(&mut handle, new, Tick(100), &turn) else { panic!("room for one") };
    assert_eq!(id.index(), 0);
    show(&table, table.conn(id));
}

fn seconds(timeout: &str) -> u32 {
    match timeout {
        "ended" => 0,
        name => Timeouts::default().get(&format!("nf_conntrack_tcp_timeout_{name}")).expect("a timeout's name"),
    }
}

/// How a segment is followed.
type Way = fn(ConnRef<'_, Ipv4Addr>, Direction, &Observed, Tick) -> Tracked;

fn general(conn: ConnRef<'_, Ipv4Addr>, direction: Direction, segment: &Observed, now: Tick) -> Tracked {
    conn.track(direction, segment, now)
}

/// As the straight way does: what is not ordinary is left to the general one.
fn ordinary_first(conn: ConnRef<'_, Ipv4Addr>, direction: Direction, segment: &Observed, now: Tick) -> Tracked {
    if conn.track_ordinary(direction, segment, now) { Accept } else { conn.track(direction, segment, now) }
}

fn check(Sequence { name, first, state, rows }: Sequence, follow: Way) {
    open(first, TcpSettings::default(), |conn| {
        assert_eq!(conn.tcp_state(), Some(state), "{name}: first segment");
        for (number, row) in rows.into_iter().enumerate() {
            let now = Tick(200 + 100 * number as u32);
            let before = (conn.last_seen(), conn.is_expired(now));
            let is_unanswered = conn.tcp_state() == Some(SynSent) && row.direction == Original;
            let opens_again = conn.is_opened_again_by(row.direction, &row.segment);
            let verdict = follow(conn, row.direction, &row.segment, now);
            let what = format!("{name}: row {number}, {:?} {:?}", row.direction, row.segment);
            let expected = verdict == Tracked::NewFlow || row.segment.tcp_flags == S && is_unanswered;
            assert_eq!(opens_again, expected, "{what}");
            assert_eq!((verdict, conn.tcp_state()), (row.verdict, Some(row.state)), "{what}");
            match row.timeout {
                None => assert_eq!((conn.last_seen(), conn.is_expired(now)), before, "{what}"),
                Some(timeout) => {
                    assert_eq!(conn.last_seen(), now, "{what}");
                    let seconds = seconds(timeout);
                    let expires = now.0 + seconds * 100;
                    assert!(conn.is_expired(Tick(expires)), "{what}: later than {seconds} s");
                    assert!(seconds == 0 || !conn.is_expired(Tick(expires - 1)), "{what}: before {seconds} s");
                }
            }
        }
    });
}

#[test]
fn every_segment_of_every_sequence() {
    sequences::all().into_iter().for_each(|sequence| check(sequence, general));
}

#[test]
fn every_segment_of_every_sequence_the_ordinary_way_first() {
    sequences::all().into_iter().for_each(|sequence| check(sequence, ordinary_first));
}

/// A bulk transfer with windows scaled or not, over the end of sequence space: all of its segments are ordinary but the first ones.
#[test]
fn data_and_acknowledgments_are_ordinary() {
    for scale in [None, Some(7)] {
        let (client, server) = (u32::MAX - 200_000, u32::MAX - 50_000);
        let mut syns = [segment(S, client, 0, 0), segment(SA, server, client.wrapping_add(1), 0)];
        syns.iter_mut().for_each(|syn| syn.tcp_options.window_scale = scale);
        open(syns[0], TcpSettings::default(), |conn| {
            let now = Tick(100);
            let (mut client, mut server) = (client.wrapping_add(1), server.wrapping_add(1));
            assert!(!conn.track_ordinary(Reply, &syns[1], now), "a SYN-ACK");
            assert_eq!(conn.track(Reply, &syns[1], now), Accept);
            let handshake = segment(A, client, server, 0);
            assert!(!conn.track_ordinary(Original, &handshake, now), "what ends the handshake");
            assert_eq!(conn.track(Original, &handshake, now), Accept);
            for round in 0..500 {
                let now = Tick(101 + round);
                for _ in 0..2 {
                    let data = segment(PA, client, server, 1448);
                    assert!(conn.track_ordinary(Original, &data, now), "round {round}: {data:?}");
                    assert!(!conn.track_ordinary(Original, &data, now), "again");
                    client = client.wrapping_add(1448);
                }
                assert_eq!(conn.last_seen(), now);
                assert!(conn.is_expired(Tick(now.0 + 30_000)), "five minutes while it is not acknowledged");
                let ack = segment(A, server, client, 0);
                assert!(conn.track_ordinary(Reply, &ack, now), "round {round}: {ack:?}");
                assert!(!conn.is_expired(Tick(now.0 + 30_000)), "five days");
                let answer = segment(PA, server, client, 700);
                assert!(conn.track_ordinary(Reply, &answer, now), "round {round}: {answer:?}");
                server = server.wrapping_add(700);
            }
            for unlike in [
                segment(FA, client, server, 0),
                segment(R, client, 0, 0),
                segment(A, client, server.wrapping_add(1), 0),
                segment(A, client.wrapping_add(10_000_000), server, 0),
                Observed { tcp_window: 0, ..segment(A, client, server, 0) },
            ] {
                let before = (conn.windows(), conn.last_seen(), conn.tcp_state());
                assert!(!conn.track_ordinary(Original, &unlike, Tick(9999)), "{unlike:?}");
                assert_eq!((conn.windows(), conn.last_seen(), conn.tcp_state()), before);
            }
            assert_eq!(conn.track(Original, &segment(FA, client, server, 0), Tick(700)), Accept);
            assert!(!conn.track_ordinary(Reply, &segment(PA, server, client, 100), Tick(700)), "not ESTABLISHED");
        });
    }
}

/// A segment near where its side is, and how much later it comes.
#[derive(Clone, Copy, Debug)]
struct Near {
    direction: Direction,
    flags: u8,
    seq: i32,
    ack: i32,
    payload_bytes: u32,
    window: u16,
    has_sack: bool,
    ticks: u32,
}

fn near() -> impl Strategy<Value = Near> {
    let direction = prop_oneof![Just(Original), Just(Reply)];
    let flags = prop_oneof![30 => Just(A), 10 => Just(PA), 1 => Just(S), 1 => Just(FA), 1 => Just(R), 1 => any::<u8>()];
    let distance = || prop_oneof![24 => Just(0), 4 => -1500..=0i32, 2 => -3..=3i32, 1 => -80_000..=80_000i32];
    let payload = prop_oneof![2 => Just(0), 3 => 1..1449u32, 1 => 0..65_000u32];
    let window = prop_oneof![6 => Just(64_240), 3 => 1..2000u16, 1 => Just(0), 1 => any::<u16>()];
    let ticks = prop_oneof![6 => 0..3u32, 2 => 0..1000u32, 1 => 29_000..31_000u32];
    (direction, flags, distance(), distance(), payload, window, prop::bool::weighted(0.05), ticks).prop_map(
        |(direction, flags, seq, ack, payload_bytes, window, has_sack, ticks)| Near {
            direction,
            flags,
            seq,
            ack,
            payload_bytes,
            window,
            has_sack,
            ticks,
        },
    )
}

/// What is to be seen of a connection: the verdict, its windows and its entry in listings, with state, timeout and last packet.
type Seen = (Tracked, Option<Windows>, Option<Entry<Ipv4Addr>>);

/// Follows segments from a handshake on; how many were ordinary.
fn follow_all(steps: &[Near], start: [u32; 2], tcp: TcpSettings, by_ordinary: bool) -> (Vec<Seen>, usize) {
    let (mut seen, mut ordinary) = (Vec::new(), 0);
    let mut ends = start.map(|start| start.wrapping_add(1));
    let options = TcpOptions { window_scale: Some(2), sack_permitted: true, sack: None };
    let syn = Observed { tcp_options: options, ..segment(S, start[0], 0, 0) };
    let syn_ack = Observed { tcp_options: options, ..segment(SA, start[1], ends[0], 0) };
    open_in(syn, tcp, |table, conn| {
        let mut now = Tick(100);
        conn.track(Reply, &syn_ack, now);
        conn.track(Original, &segment(A, ends[0], ends[1], 0), now);
        for near in steps {
            now = Tick(now.0 + near.ticks);
            let (sender, receiver) = (near.direction as usize, near.direction.flip() as usize);
            let seq = ends[sender].wrapping_add_signed(near.seq);
            let ack = ends[receiver].wrapping_add_signed(near.ack);
            let mut segment = Observed { tcp_window: near.window, ..segment(near.flags, seq, ack, near.payload_bytes) };
            segment.tcp_options.sack = near.has_sack.then(|| ack.wrapping_add(1000));
            let is_ordinary = by_ordinary && conn.track_ordinary(near.direction, &segment, now);
            let verdict = if is_ordinary { Accept } else { conn.track(near.direction, &segment, now) };
            ordinary += usize::from(is_ordinary);
            if verdict == Accept && near.seq == 0 && near.payload_bytes < 1449 {
                ends[sender] = seq.wrapping_add(near.payload_bytes);
            }
            seen.push((verdict, conn.windows(), table.entry(0, now)));
        }
    });
    (seen, ordinary)
}

/// Both ways, step by step: same verdicts, windows, states, timeouts.
#[test]
fn ordinary_first_or_not_a_connection_goes_the_same_way() {
    let cases = if cfg!(miri) { 3 } else { 500 };
    let (ordinary, all) = (Cell::new(0), Cell::new(0));
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let start = (any::<u32>(), prop_oneof![Just(u32::MAX - 3000), any::<u32>()]).prop_map(<[u32; 2]>::from);
    let result =
        runner.run(&(prop::collection::vec(near(), 1..80), start, any::<bool>()), |(steps, start, be_liberal)| {
            let tcp = TcpSettings { be_liberal, ..TcpSettings::default() };
            let (expected, _) = follow_all(&steps, start, tcp, false);
            let (seen, count) = follow_all(&steps, start, tcp, true);
            for (number, (seen, expected)) in seen.iter().zip(&expected).enumerate() {
                prop_assert_eq!(seen, expected, "step {}: {:?}", number, steps[number]);
            }
            ordinary.set(ordinary.get() + count);
            all.set(all.get() + steps.len());
            Ok(())
        });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    println!("{} of {} segments were ordinary", ordinary.get(), all.get());
    assert!(cfg!(miri) || ordinary.get() > all.get() / 4);
}

/// Tracks segments after a handshake; the verdicts, and the state at the end.
fn after_handshake(tcp: TcpSettings, rows: &[(Direction, Observed)]) -> (Vec<Tracked>, Option<TcpState>) {
    let mut seen = (Vec::new(), None);
    open(segment(S, 999, 0, 0), tcp, |conn| {
        for (direction, handshake) in [(Reply, segment(SA, 4999, 1000, 0)), (Original, segment(A, 1000, 5000, 0))] {
            assert_eq!(conn.track(direction, &handshake, Tick(100)), Accept);
        }
        seen.0 = rows.iter().map(|(direction, segment)| conn.track(*direction, segment, Tick(100))).collect();
        seen.1 = conn.tcp_state();
    });
    seen
}

/// Of netfilter's table (nf_conntrack_proto_tcp.c) the SYNs: sSS of the original direction, and those after which it looks again.
#[test]
fn which_segments_open_again_in_which_state() {
    let script = [
        (Original, segment(S, 999, 0, 0), SynSent),
        (Reply, segment(SA, 4999, 1000, 0), SynRecv),
        (Original, segment(A, 1000, 5000, 0), Established),
        (Original, segment(FA, 1000, 5000, 0), FinWait),
        (Reply, segment(A, 5000, 1001, 0), CloseWait),
        (Reply, segment(FA, 5000, 1001, 0), LastAck),
        (Original, segment(A, 1001, 5001, 0), TimeWait),
    ];
    let check = |conn: ConnRef<'_, Ipv4Addr>, state| {
        assert_eq!(conn.tcp_state(), Some(state));
        for direction in [Original, Reply] {
            for flags in 0..=u8::MAX {
                let is_syn = flags & (S | A | R | 1) == S;
                let opens = match (direction, state) {
                    (Original, SynSent | TimeWait | Close) => is_syn,
                    (Reply, TimeWait) => is_syn,
                    _ => false,
                };
                for seq in [999, 998, 70_000] {
                    let opened = conn.is_opened_again_by(direction, &segment(flags, seq, 0, 0));
                    assert_eq!(opened, opens, "{direction:?}, flags {flags:#04x} in {state:?}");
                }
            }
        }
    };
    open(script[0].1, TcpSettings::default(), |conn| {
        check(conn, SynSent);
        for (direction, segment, state) in &script[1..] {
            assert_eq!(conn.track(*direction, segment, Tick(100)), Accept);
            check(conn, *state);
        }
        assert_eq!(conn.track(Reply, &segment(R, 5001, 0, 0), Tick(100)), Accept);
        check(conn, Close);
    });
    open(script[0].1, TcpSettings::default(), |conn| {
        assert_eq!(conn.track(Reply, &segment(S, 4999, 0, 0), Tick(100)), Accept);
        check(conn, SynSent2);
    });
}

#[test]
fn liberal_tracking_refuses_only_rsts() {
    let outside = [
        (Original, segment(PA, 900_000, 5000, 10)),
        (Reply, segment(A, 5000, 900_000, 0)),
        (Original, segment(FA, 900_000, 5000, 0)),
    ];
    let strict = after_handshake(TcpSettings::default(), &outside);
    assert_eq!(strict, (vec![Invalid; 3], Some(Established)));
    let liberal = TcpSettings { be_liberal: true, ..TcpSettings::default() };
    assert_eq!(after_handshake(liberal, &outside), (vec![Accept; 3], Some(FinWait)));
    let behind = [(Reply, segment(R, 4999, 0, 0))];
    assert_eq!(after_handshake(liberal, &behind), (vec![Invalid], Some(Established)));
    let impossible = [(Original, segment(0x03, 1000, 5000, 0))];
    assert_eq!(after_handshake(liberal, &impossible), (vec![Invalid], Some(Established)));
}

#[test]
fn a_rst_behind_is_invalid_unless_that_is_ignored() {
    let behind = [(Reply, segment(A, 5000, 1000, 0)), (Reply, segment(R, 4999, 0, 0))];
    assert_eq!(after_handshake(TcpSettings::default(), &behind), (vec![Accept, Invalid], Some(Established)));
    let ignoring = TcpSettings { ignore_invalid_rst: true, ..TcpSettings::default() };
    // It is not exact, so it does not end the connection.
    assert_eq!(after_handshake(ignoring, &behind), (vec![Accept, Accept], Some(Established)));
}

#[test]
fn connections_that_clash() {
    let domain = Domain::new();
    let mut participant = domain.join();
    let (timeouts, tcp) = (Timeouts::default(), TcpSettings::default());
    let table = Table::<Ipv4Addr>::new(TableConfig { max_entries: 4, seed: [1, 2], timeouts, tcp }, domain);
    let (mut handle, turn) = (table.handle(), participant.enter());
    let key = |src: u8, dst: u8| FlowKey {
        src: Ipv4Addr::new(10, 0, 0, src),
        dst: Ipv4Addr::new(10, 0, 0, dst),
        ports: Ports::new(4000, 4000),
        protocol: Protocol::TCP,
    };
    let mut insert = |original: FlowKey<Ipv4Addr>, reply| {
        let new = NewConn { original, reply, attributes: Attributes::default(), first: segment(S, 999, 0, 0) };
        table.insert(&mut handle, new, Tick(0), &turn)
    };
    let Insert::Inserted(id) = insert(key(1, 2), key(2, 1)) else { panic!("room") };
    assert_eq!(insert(key(1, 2), key(2, 1)), Insert::Exists(Hit { conn: id, direction: Original }), "two SYNs at once");
    let from_the_other_side = insert(key(2, 1), key(1, 2));
    assert_eq!(from_the_other_side, Insert::Exists(Hit { conn: id, direction: Reply }), "simultaneous open");
    assert_eq!(table.conn(id).track(Reply, &segment(S, 4999, 0, 0), Tick(0)), Accept);
    assert_eq!(table.conn(id).tcp_state(), Some(SynSent2));
    // Of another client, translated to what is the first one's server.
    assert_eq!(insert(key(3, 9), key(2, 1)), Insert::ReplyTaken(Hit { conn: id, direction: Reply }));
    assert!(matches!(insert(key(3, 9), key(2, 3)), Insert::Inserted(_)));
}

#[test]
fn lifecycles_follow_the_states() {
    open(segment(S, 9, 0, 0), TcpSettings::default(), |conn| {
        let mut seen = vec![(conn.lifecycle().name(), conn.tcp_state().map(TcpState::name), conn.assured())];
        for (direction, flags, seq, ack) in [
            (Reply, SA, 99, 10),
            (Original, A, 10, 100),
            (Reply, PA, 100, 10),
            (Original, FA, 10, 100),
            (Reply, A, 100, 11),
            (Reply, FA, 100, 11),
            (Original, A, 11, 101),
        ] {
            assert_eq!(conn.track(direction, &segment(flags, seq, ack, 0), Tick(0)), Accept);
            seen.push((conn.lifecycle().name(), conn.tcp_state().map(TcpState::name), conn.assured()));
        }
        let expected = [
            ("unreplied", Some("SYN_SENT"), false),
            ("established", Some("SYN_RECV"), false),
            ("established", Some("ESTABLISHED"), true),
            ("established", Some("ESTABLISHED"), true),
            ("closing", Some("FIN_WAIT"), true),
            ("closing", Some("CLOSE_WAIT"), true),
            ("closing", Some("LAST_ACK"), true),
            ("closed", Some("TIME_WAIT"), true),
        ];
        assert_eq!(seen, expected);
        assert_eq!(conn.lifecycle(), Lifecycle::Closed);
    });
}

#[test]
fn what_an_error_may_be_about() {
    open(segment(S, 999, 0, 0), TcpSettings::default(), |conn| {
        // Of the other side nothing is known.
        assert!(conn.may_be_in_flight(Reply, 77));
        assert!(conn.may_be_in_flight(Original, 999) && !conn.may_be_in_flight(Original, 1001));
        assert_eq!(conn.track(Reply, &segment(SA, 4999, 1000, 0), Tick(100)), Accept);
        assert_eq!(conn.track(Original, &segment(A, 1000, 5000, 0), Tick(100)), Accept);
        assert_eq!(conn.track(Original, &segment(PA, 1000, 5000, 500), Tick(100)), Accept);
        let in_flight = |direction, seqs: [u32; 4]| seqs.map(|seq| conn.may_be_in_flight(direction, seq));
        assert_eq!(in_flight(Original, [1000, 1499, 1500, 1501]), [true, true, true, false]);
        assert_eq!(in_flight(Original, [1500_u32.wrapping_sub(66_000), 0, 900, 1 << 31]), [true, true, true, false]);
        assert_eq!(in_flight(Reply, [4999, 5000, 5001, 3_000_000_000]), [true, true, false, false]);
    });
}
