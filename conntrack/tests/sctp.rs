//! SCTP associations: after each packet, the verdict, the state, the lifecycle and the timeout. The comparison with the
//! kernel is in `netfilter.rs`.
#![cfg(not(loom))]

use std::net::Ipv4Addr;

use weir_conntrack::{
    Attributes, Insert, Lifecycle, NewConn, Observed, Opening, SctpPacket, SctpState, Table, TableConfig, TcpSettings,
    Timeouts, Tracked, sctp_packet::MAX_CHUNKS, sctp_packet::MAX_EVENTS,
};
use weir_packet::{Direction, FlowKey, Ports, Protocol, Tick};
use weir_sync::Domain;

use Direction::{Original, Reply};
use Tracked::{Accept, Invalid, NewFlow};

const DATA: &[u8] = &[0, 3, 0, 17, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, b'x', 0, 0, 0];
const SACK: &[u8] = &[3, 0, 0, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0];
const HEARTBEAT: &[u8] = &[4, 0, 0, 8, 0, 1, 0, 4];
const HEARTBEAT_ACK: &[u8] = &[5, 0, 0, 8, 0, 1, 0, 4];
const ABORT: &[u8] = &[6, 0, 0, 4];
const ABORT_T: &[u8] = &[6, 1, 0, 4];
const SHUTDOWN: &[u8] = &[7, 0, 0, 8, 0, 0, 0, 1];
const SHUTDOWN_ACK: &[u8] = &[8, 0, 0, 4];
const COOKIE_ECHO: &[u8] = &[10, 0, 0, 6, 1, 2, 0, 0];
const COOKIE_ACK: &[u8] = &[11, 0, 0, 4];
const SHUTDOWN_COMPLETE: &[u8] = &[14, 0, 0, 4];

/// The tags that client and server choose.
const CLIENT: u32 = 0xc11e_4700;
const SERVER: u32 = 0x5e47_e400;

fn init(chunk_type: u8, tag: u32) -> Vec<u8> {
    [&[chunk_type, 0, 0, 20][..], &tag.to_be_bytes(), &[0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]].concat()
}

fn observed(tag: u32, chunks: &[&[u8]]) -> Observed {
    let packet = [&[0x9c, 0x40, 0x0f, 0x1c][..], &tag.to_be_bytes(), &[0; 4], &chunks.concat()].concat();
    Observed { sctp: SctpPacket::read(&packet), ..Observed::default() }
}

fn key() -> FlowKey<Ipv4Addr> {
    FlowKey {
        src: [10, 0, 0, 1].into(),
        dst: [10, 0, 0, 2].into(),
        ports: Ports::new(40000, 3868),
        protocol: Protocol::SCTP,
    }
}

/// Direction, packet, verdict, state and lifecycle after it, and the seconds that it has then; `None` where it does not
/// keep the association alive.
type Row = (Direction, Observed, Tracked, SctpState, &'static str, Option<u32>);

fn run(name: &str, first: &Observed, (state, lifecycle): (SctpState, &str), rows: &[Row]) {
    let domain = Domain::new();
    let mut participant = domain.join();
    let (timeouts, tcp) = (Timeouts::default(), TcpSettings::default());
    let table = Table::<Ipv4Addr>::new(TableConfig { max_entries: 4, seed: [1, 2], timeouts, tcp }, domain);
    let (mut handle, turn) = (table.handle(), participant.enter());
    assert_eq!(first.opening(&key()), Opening::Opens, "{name}");
    let new = NewConn { original: key(), reply: key().invert(), attributes: Attributes::default(), first: *first };
    let Insert::Inserted(id) = table.insert(&mut handle, new, Tick(100), &turn) else { panic!("room for one") };
    let conn = table.conn(id);
    assert_eq!((conn.sctp_state(), conn.lifecycle().name()), (Some(state), lifecycle), "{name}: the first");
    for (number, (direction, packet, verdict, state, lifecycle, seconds)) in rows.iter().enumerate() {
        let now = Tick(200 + 10 * number as u32);
        let before = conn.last_seen();
        let is_unanswered = conn.lifecycle() == Lifecycle::Unreplied && *direction == Original;
        let opens_again = conn.is_opened_again_by(*direction, packet);
        let is_repeated = is_unanswered && conn.sctp_state() == Some(SctpState::Closed) && packet.sctp.is_init();
        assert!(!opens_again || packet.sctp.is_init(), "{name}: row {number}");
        if *verdict == NewFlow || is_repeated {
            assert!(opens_again, "{name}: row {number}");
        }
        if !matches!(conn.sctp_state(), Some(SctpState::Closed)) {
            assert!(!opens_again, "{name}: row {number}");
        }
        let seen = (conn.track(*direction, packet, now), conn.sctp_state(), conn.lifecycle().name());
        assert_eq!(seen, (*verdict, Some(*state), *lifecycle), "{name}: row {number}");
        assert_eq!(conn.last_seen(), if seconds.is_some() { now } else { before }, "{name}: row {number}");
        if let Some(seconds) = seconds {
            let expires = Tick(now.0 + 100 * seconds);
            assert!(conn.is_expired(expires) && !conn.is_expired(Tick(expires.0 - 1)), "{name}: row {number}");
        }
        assert_eq!(conn.tcp_state(), None);
    }
}

fn handshake() -> Vec<Row> {
    vec![
        (Reply, observed(CLIENT, &[&init(2, SERVER)]), Accept, SctpState::CookieWait, "established", Some(3)),
        (Original, observed(SERVER, &[COOKIE_ECHO, DATA]), Accept, SctpState::CookieEchoed, "established", Some(3)),
        (Reply, observed(CLIENT, &[COOKIE_ACK, SACK]), Accept, SctpState::Established, "established", Some(210)),
    ]
}

fn after_handshake(name: &str, rows: &[Row]) {
    let first = observed(0, &[&init(1, CLIENT)]);
    run(name, &first, (SctpState::Closed, "unreplied"), &[&handshake()[..], rows].concat());
}

#[test]
fn from_init_to_shutdown_complete() {
    use SctpState::*;
    after_handshake(
        "the client shuts down",
        &[
            (Original, observed(SERVER, &[DATA]), Accept, Established, "established", Some(210)),
            (Reply, observed(CLIENT, &[SACK]), Accept, Established, "established", Some(210)),
            (Original, observed(SERVER, &[SHUTDOWN]), Accept, ShutdownSent, "closing", Some(3)),
            (Reply, observed(CLIENT, &[SHUTDOWN_ACK]), Accept, ShutdownAckSent, "closing", Some(3)),
            (Original, observed(SERVER, &[SHUTDOWN_COMPLETE]), Accept, Closed, "closed", Some(10)),
            (Original, observed(0, &[&init(1, 77)]), NewFlow, Closed, "closed", None),
        ],
    );
    after_handshake(
        "the server shuts down",
        &[
            (Reply, observed(CLIENT, &[SHUTDOWN]), Accept, ShutdownRecd, "closing", Some(3)),
            (Original, observed(SERVER, &[SHUTDOWN_ACK]), Accept, ShutdownAckSent, "closing", Some(3)),
            (Reply, observed(CLIENT, &[SHUTDOWN_COMPLETE]), Accept, Closed, "closed", Some(10)),
        ],
    );
}

#[test]
fn who_does_not_know_the_tag_changes_nothing() {
    use SctpState::*;
    let wrong =
        |direction, chunks: &[&[u8]]| (direction, observed(0xbad, chunks), Invalid, Established, "established", None);
    let mut rows: Vec<Row> = [DATA, SACK, ABORT, ABORT_T, SHUTDOWN, COOKIE_ECHO, SHUTDOWN_COMPLETE]
        .into_iter()
        .flat_map(|chunk| [wrong(Original, &[chunk]), wrong(Reply, &[chunk])])
        .collect();
    // An INIT has the tag 0.
    rows.push(wrong(Original, &[&init(1, 0xbad)]));
    // The T bit says that the tag is returned, which only the one knows who got it.
    rows.push((Original, observed(SERVER, &[ABORT_T]), Invalid, Established, "established", None));
    rows.push((Original, observed(CLIENT, &[ABORT_T]), Accept, Closed, "closed", Some(10)));
    after_handshake("tags", &rows);
    after_handshake("abort", &[(Reply, observed(CLIENT, &[ABORT]), Accept, Closed, "closed", Some(10))]);
}

#[test]
fn inits_that_are_repeated_do_not_keep_an_entry() {
    use SctpState::*;
    let first = observed(0, &[&init(1, CLIENT)]);
    run(
        "repeated",
        &first,
        (Closed, "unreplied"),
        &[
            (Original, first, Accept, Closed, "unreplied", None),
            (Original, observed(0, &[&init(1, 9)]), Accept, Closed, "unreplied", None),
            (Reply, observed(9, &[&init(2, SERVER)]), Accept, CookieWait, "established", Some(3)),
        ],
    );
    run(
        "refused",
        &first,
        (Closed, "unreplied"),
        &[
            (Reply, observed(CLIENT, &[ABORT]), Accept, Closed, "closed", Some(10)),
            (Original, observed(0, &[&init(1, 9)]), NewFlow, Closed, "closed", None),
        ],
    );
}

#[test]
fn a_heartbeat_opens_a_further_path() {
    use SctpState::*;
    run(
        "a path",
        &observed(SERVER, &[HEARTBEAT]),
        (HeartbeatSent, "unreplied"),
        &[
            (Reply, observed(CLIENT, &[DATA]), Invalid, HeartbeatSent, "unreplied", None),
            (Reply, observed(CLIENT, &[HEARTBEAT_ACK]), Accept, Established, "established", Some(210)),
            (Original, observed(SERVER, &[DATA]), Accept, Established, "established", Some(210)),
        ],
    );
}

#[test]
fn who_may_open_an_association() {
    let opens = |tag, chunks: &[&[u8]]| observed(tag, chunks).opening(&key()) == Opening::Opens;
    assert!(opens(0, &[&init(1, CLIENT)]));
    assert!(opens(SERVER, &[HEARTBEAT]));
    assert!(opens(SERVER, &[SHUTDOWN_ACK]), "out of the blue: a SHUTDOWN COMPLETE answers it");
    assert!(!opens(5, &[&init(1, CLIENT)]), "an INIT has the tag 0");
    for chunk in [DATA, SACK, ABORT, SHUTDOWN, COOKIE_ECHO, COOKIE_ACK, SHUTDOWN_COMPLETE, &init(2, SERVER)[..]] {
        assert!(!opens(SERVER, &[chunk]), "{chunk:?}");
    }
}

#[test]
fn packets_that_no_stack_sends_are_invalid() {
    let invalid = |what: &str, chunks: &[&[u8]]| {
        let packet = observed(SERVER, chunks);
        let row = (Original, packet, Invalid, SctpState::Established, "established", None);
        after_handshake(what, &[row]);
    };
    invalid("no chunk", &[]);
    invalid("a length of 0", &[&[0, 3, 0, 0]]);
    invalid("a length of less than a header", &[DATA, &[0, 3, 0, 3]]);
    invalid("an INIT that is not alone", &[&init(1, 1), DATA]);
    invalid("an INIT that is not first", &[DATA, &init(1, 1)]);
    invalid("half an INIT", &[&init(1, 1)[..16]]);
    invalid("a COOKIE ECHO that is not first", &[DATA, COOKIE_ECHO]);
    invalid("a SHUTDOWN COMPLETE that is not alone", &[SHUTDOWN_COMPLETE, SACK]);
    invalid("more chunks that matter than anyone sends", &[HEARTBEAT; MAX_EVENTS + 1]);
    invalid("more chunks than a frame holds", &[DATA; MAX_CHUNKS + 1]);
    assert_eq!(SctpPacket::read(&[0; 11]), SctpPacket::default(), "half a header");
    after_handshake(
        "as many as a frame holds, the last one cut off",
        &[(
            Original,
            observed(SERVER, &[&[DATA; MAX_CHUNKS - 1].concat(), &DATA[..9]]),
            Accept,
            SctpState::Established,
            "established",
            Some(210),
        )],
    );
}
