//! Sequences of TCP segments: after each, the verdict, the state, and what is left of the timeout.
#![cfg(not(loom))]

use std::net::Ipv4Addr;

use weir_conntrack::{
    Attributes, Insert, Lifecycle, NewConn, Observed, Opening, Table, TableConfig, TcpState, Timeouts, Tracked,
};
use weir_packet::{Direction, FlowKey, Ports, Protocol, Tick};
use weir_sync::Domain;

use Direction::{Original, Reply};
use TcpState::*;
use Tracked::{Accept, Invalid, NewFlow};

const S: u8 = 0x02;
const SA: u8 = 0x12;
const A: u8 = 0x10;
const PA: u8 = 0x18;
const FA: u8 = 0x11;
const R: u8 = 0x04;
const RA: u8 = 0x14;

/// A segment after the first, and what is to become of it.
struct Row {
    direction: Direction,
    segment: Observed,
    verdict: Tracked,
    state: TcpState,
    /// Seconds until the connection expires; `None` where the segment does not keep it alive.
    seconds: Option<u32>,
}

fn segment(tcp_flags: u8, tcp_seq: u32, tcp_ack: u32, payload_bytes: u32) -> Observed {
    Observed { tcp_flags, tcp_seq, tcp_ack, tcp_window: 64240, payload_bytes }
}

fn row(
    direction: Direction,
    (flags, seq, ack, payload): (u8, u32, u32, u32),
    verdict: Tracked,
    state: TcpState,
    seconds: Option<u32>,
) -> Row {
    Row { direction, segment: segment(flags, seq, ack, payload), verdict, state, seconds }
}

/// The handshake after the SYN 999, with the server's numbers from 4999.
fn handshake() -> Vec<Row> {
    vec![
        row(Reply, (SA, 4999, 1000, 0), Accept, SynRecv, Some(60)),
        row(Original, (A, 1000, 5000, 0), Accept, Established, Some(432_000)),
    ]
}

fn run(name: &str, first: Observed, first_state: TcpState, rows: impl IntoIterator<Item = Row>) {
    let domain = Domain::new();
    let mut participant = domain.join();
    let config = TableConfig { max_entries: 4, seed: [1, 2], timeouts: Timeouts::default() };
    let table = Table::<Ipv4Addr>::new(config, domain);
    let (mut handle, turn) = (table.handle(), participant.enter());
    let original = FlowKey {
        src: [10, 0, 0, 1].into(),
        dst: [10, 0, 0, 2].into(),
        ports: Ports::new(40000, 80),
        protocol: Protocol::TCP,
    };
    assert_ne!(first.opening(&original), Opening::Never, "{name}");
    let new = NewConn { original, reply: original.invert(), attributes: Attributes::default(), first };
    let Insert::Inserted(id) = table.insert(&mut handle, new, Tick(100), &turn) else { panic!("room for one") };
    let conn = table.conn(id);
    assert_eq!(conn.tcp_state(), Some(first_state), "{name}: first segment");
    for (number, row) in rows.into_iter().enumerate() {
        let now = Tick(200 + 100 * number as u32);
        let before = (conn.last_seen(), conn.is_expired(now));
        let verdict = conn.track(row.direction, &row.segment, now);
        let what = format!("{name}: row {number}, {:?} {:?}", row.direction, row.segment);
        assert_eq!((verdict, conn.tcp_state()), (row.verdict, Some(row.state)), "{what}");
        match row.seconds {
            None => assert_eq!((conn.last_seen(), conn.is_expired(now)), before, "{what}"),
            Some(seconds) => {
                assert_eq!(conn.last_seen(), now, "{what}");
                let expires = now.0 + seconds * 100;
                assert!(conn.is_expired(Tick(expires)), "{what}: later than {seconds} s");
                assert!(seconds == 0 || !conn.is_expired(Tick(expires - 1)), "{what}: before {seconds} s");
            }
        }
    }
}

fn after_handshake(name: &str, rows: impl IntoIterator<Item = Row>) {
    run(name, segment(S, 999, 0, 0), SynSent, handshake().into_iter().chain(rows));
}

#[test]
fn from_syn_to_time_wait() {
    after_handshake(
        "data, then both close",
        [
            row(Original, (PA, 1000, 5000, 100), Accept, Established, Some(300)),
            row(Reply, (A, 5000, 1100, 0), Accept, Established, Some(432_000)),
            row(Original, (FA, 1100, 5000, 0), Accept, FinWait, Some(120)),
            row(Reply, (A, 5000, 1101, 0), Accept, CloseWait, Some(60)),
            row(Reply, (PA, 5000, 1101, 10), Accept, CloseWait, Some(60)),
            row(Reply, (FA, 5010, 1101, 0), Accept, LastAck, Some(30)),
            row(Original, (A, 1101, 5011, 0), Accept, TimeWait, Some(120)),
            row(Reply, (FA, 5010, 1101, 0), Accept, TimeWait, Some(120)),
            row(Original, (S, 9000, 0, 0), NewFlow, TimeWait, None),
            row(Reply, (S, 9000, 0, 0), NewFlow, TimeWait, None),
        ],
    );
    after_handshake(
        "the server closes first",
        [
            row(Reply, (FA, 5000, 1000, 0), Accept, FinWait, Some(120)),
            row(Original, (A, 1000, 5001, 0), Accept, CloseWait, Some(60)),
            row(Original, (FA, 1000, 5001, 0), Accept, LastAck, Some(30)),
            row(Reply, (A, 5001, 1001, 0), Accept, TimeWait, Some(120)),
        ],
    );
    after_handshake(
        "both close at once",
        [
            row(Original, (FA, 1000, 5000, 0), Accept, FinWait, Some(120)),
            row(Reply, (FA, 5000, 1000, 0), Accept, LastAck, Some(30)),
            row(Original, (A, 1001, 5001, 0), Accept, TimeWait, Some(120)),
        ],
    );
}

#[test]
fn opening() {
    run(
        "SYN repeated, SYN-ACK repeated",
        segment(S, 999, 0, 0),
        SynSent,
        [
            row(Original, (S, 999, 0, 0), Accept, SynSent, Some(120)),
            row(Original, (S, 2999, 0, 0), Accept, SynSent, Some(120)),
            row(Reply, (SA, 4999, 3000, 0), Accept, SynRecv, Some(60)),
            row(Reply, (SA, 4999, 3000, 0), Accept, SynRecv, None),
            row(Original, (A, 3000, 5000, 0), Accept, Established, Some(432_000)),
        ],
    );
    run(
        "before the SYN-ACK nothing else",
        segment(S, 999, 0, 0),
        SynSent,
        [
            row(Original, (A, 1000, 5000, 0), Invalid, SynSent, None),
            row(Original, (FA, 1000, 5000, 0), Invalid, SynSent, None),
            row(Original, (SA, 1000, 5000, 0), Invalid, SynSent, None),
            row(Reply, (FA, 5000, 1000, 0), Invalid, SynSent, None),
        ],
    );
    run(
        "simultaneous open",
        segment(S, 999, 0, 0),
        SynSent,
        [
            row(Reply, (S, 4999, 0, 0), Accept, SynSent2, Some(120)),
            row(Original, (SA, 999, 5000, 0), Accept, SynRecv, Some(60)),
            row(Reply, (SA, 4999, 1000, 0), Accept, SynRecv, None),
            row(Reply, (A, 5000, 1000, 0), Accept, Established, Some(432_000)),
        ],
    );
    run(
        "refused: gone at once",
        segment(S, 999, 0, 0),
        SynSent,
        [row(Reply, (RA, 0, 1000, 0), Accept, Close, Some(0))],
    );
    run(
        "picked up in the middle",
        segment(A, 1000, 5000, 10),
        Established,
        [
            row(Original, (PA, 1010, 5000, 10), Accept, Established, Some(300)),
            row(Reply, (A, 5000, 1020, 0), Accept, Established, Some(432_000)),
        ],
    );
}

#[test]
fn impossible_flags_are_invalid_in_every_direction() {
    for flags in [0, 0x01, 0x03, 0x06, 0x07, 0x08, 0x20, 0x29, 0x3f, 0xff] {
        for direction in [Original, Reply] {
            after_handshake("flags", [row(direction, (flags, 1000, 5000, 0), Invalid, Established, None)]);
        }
    }
    after_handshake(
        "ECE and CWR are no part of it",
        [row(Original, (PA | 0xc0, 1000, 5000, 0), Accept, Established, Some(432_000))],
    );
}

#[test]
fn a_syn_inside_a_connection_moves_nothing() {
    after_handshake(
        "answered by a challenge ACK",
        [
            row(Original, (S, 70_000, 0, 0), Accept, Established, None),
            row(Reply, (A, 5000, 1000, 0), Accept, Established, Some(432_000)),
            row(Reply, (S, 70_000, 0, 0), Invalid, Established, None),
        ],
    );
    after_handshake(
        "answered by a SYN-ACK: both ends have begun anew",
        [
            row(Original, (S, 70_000, 0, 0), Accept, Established, None),
            row(Reply, (SA, 90_000, 70_001, 0), Accept, SynRecv, Some(60)),
            row(Original, (A, 70_001, 90_001, 0), Accept, Established, Some(432_000)),
        ],
    );
    after_handshake(
        "an old SYN-ACK is not an answer",
        [
            row(Original, (S, 70_000, 0, 0), Accept, Established, None),
            row(Reply, (SA, 90_000, 60_000, 0), Accept, Established, None),
        ],
    );
    after_handshake(
        "in LAST_ACK its challenge ACK is not taken for the last one",
        [
            row(Original, (FA, 1000, 5000, 0), Accept, FinWait, Some(120)),
            row(Reply, (FA, 5000, 1001, 0), Accept, LastAck, Some(30)),
            row(Original, (S, 70_000, 0, 0), Accept, LastAck, None),
            row(Reply, (A, 5001, 1001, 0), Accept, LastAck, None),
            row(Original, (A, 1001, 5001, 0), Accept, TimeWait, Some(120)),
        ],
    );
}

#[test]
fn a_rst_counts_only_at_the_expected_number() {
    after_handshake(
        "exact",
        [
            row(Reply, (R, 5000, 0, 0), Accept, Close, Some(10)),
            row(Original, (PA, 1000, 5000, 5), Accept, Close, Some(10)),
            row(Original, (S, 70_000, 0, 0), NewFlow, Close, None),
        ],
    );
    after_handshake(
        "ahead: passes, and the other end will say",
        [
            // A first segment of the replying side makes the connection assured.
            row(Reply, (A, 5000, 1000, 0), Accept, Established, Some(432_000)),
            row(Reply, (R, 5500, 0, 0), Accept, Established, None),
            row(Original, (A, 1000, 5000, 0), Accept, Established, Some(432_000)),
            row(Reply, (R, 5000, 0, 0), Accept, Close, Some(10)),
        ],
    );
    after_handshake(
        "behind",
        [
            row(Reply, (R, 4999, 0, 0), Invalid, Established, None),
            row(Original, (R, 900, 0, 0), Invalid, Established, None),
        ],
    );
    after_handshake(
        "right behind data in flight",
        [
            row(Reply, (PA, 5000, 1000, 50), Accept, Established, Some(300)),
            row(Reply, (R, 5050, 0, 0), Accept, Close, Some(10)),
        ],
    );
}

#[test]
fn an_established_connection_that_gets_nowhere_lives_shorter() {
    let again = |seconds| row(Original, (A, 1000, 5000, 0), Accept, Established, Some(seconds));
    after_handshake("retransmissions", [again(432_000), again(432_000), again(300), again(300)]);
    let mut closed = row(Reply, (A, 5000, 1000, 0), Accept, Established, Some(300));
    closed.segment.tcp_window = 0;
    after_handshake("closed window", [closed]);
}

#[test]
fn lifecycles_follow_the_states() {
    let domain = Domain::new();
    let mut participant = domain.join();
    let config = TableConfig { max_entries: 4, seed: [1, 2], timeouts: Timeouts::default() };
    let table = Table::<Ipv4Addr>::new(config, domain);
    let (mut handle, turn) = (table.handle(), participant.enter());
    let original = FlowKey {
        src: [10, 0, 0, 1].into(),
        dst: [10, 0, 0, 2].into(),
        ports: Ports::new(40000, 80),
        protocol: Protocol::TCP,
    };
    let new =
        NewConn { original, reply: original.invert(), attributes: Attributes::default(), first: segment(S, 9, 0, 0) };
    let Insert::Inserted(id) = table.insert(&mut handle, new, Tick(0), &turn) else { panic!("room for one") };
    let conn = table.conn(id);
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
}
