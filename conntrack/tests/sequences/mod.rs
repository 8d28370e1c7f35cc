//! Sequences of TCP segments, with what is to become of each. They are checked alone and against the kernel.

use weir_conntrack::{Observed, TcpState, Tracked};
use weir_packet::{Direction, options::TcpOptions};

use Direction::{Original, Reply};
use TcpState::*;
use Tracked::{Accept, Invalid, NewFlow};

pub const S: u8 = 0x02;
pub const SA: u8 = 0x12;
pub const A: u8 = 0x10;
pub const PA: u8 = 0x18;
pub const FA: u8 = 0x11;
pub const R: u8 = 0x04;
pub const RA: u8 = 0x14;

/// A sequence: the segment that opens the connection, and those after it.
pub struct Sequence {
    pub name: &'static str,
    pub first: Observed,
    #[allow(dead_code, reason = "the kernel says it in the other test")]
    pub state: TcpState,
    pub rows: Vec<Row>,
}

/// A segment after the first, and what is to become of it.
pub struct Row {
    pub direction: Direction,
    pub segment: Observed,
    pub verdict: Tracked,
    #[allow(dead_code, reason = "the kernel says it in the other test")]
    pub state: TcpState,
    /// The timeout that the connection has from then on; `None` where the segment does not keep it alive.
    #[allow(dead_code, reason = "the kernel says it in the other test")]
    pub timeout: Option<&'static str>,
    /// Where netfilter decides otherwise on purpose: why weir does not.
    pub unlike_netfilter: Option<&'static str>,
}

impl Row {
    pub fn window(mut self, window: u16) -> Self {
        self.segment.tcp_window = window;
        self
    }

    pub fn sack(mut self, right_edge: u32) -> Self {
        self.segment.tcp_options.sack = Some(right_edge);
        self
    }

    pub fn options(mut self, window_scale: Option<u8>, sack_permitted: bool) -> Self {
        self.segment.tcp_options = TcpOptions { window_scale, sack_permitted, sack: None };
        self
    }

    pub fn unlike_netfilter(mut self, why: &'static str) -> Self {
        self.unlike_netfilter = Some(why);
        self
    }
}

/// A window of 64240, no options.
pub fn segment(tcp_flags: u8, tcp_seq: u32, tcp_ack: u32, payload_bytes: u32) -> Observed {
    Observed { tcp_flags, tcp_seq, tcp_ack, tcp_window: 64240, payload_bytes, ..Observed::default() }
}

fn row(
    direction: Direction,
    (flags, seq, ack, payload): (u8, u32, u32, u32),
    verdict: Tracked,
    state: TcpState,
    timeout: Option<&'static str>,
) -> Row {
    Row { direction, segment: segment(flags, seq, ack, payload), verdict, state, timeout, unlike_netfilter: None }
}

/// Accepted, in a state, with that state's timeout.
fn goes(direction: Direction, segment: (u8, u32, u32, u32), state: TcpState) -> Row {
    let timeout = match state {
        SynSent | SynSent2 => "syn_sent",
        SynRecv => "syn_recv",
        Established => "established",
        FinWait => "fin_wait",
        CloseWait => "close_wait",
        LastAck => "last_ack",
        TimeWait => "time_wait",
        Close => "close",
    };
    row(direction, segment, Accept, state, Some(timeout))
}

/// Accepted, while data is not acknowledged.
fn unacknowledged(direction: Direction, segment: (u8, u32, u32, u32)) -> Row {
    row(direction, segment, Accept, Established, Some("unacknowledged"))
}

/// Let through without consequence.
fn passes(direction: Direction, segment: (u8, u32, u32, u32), state: TcpState) -> Row {
    row(direction, segment, Accept, state, None)
}

/// Refused.
fn invalid(direction: Direction, segment: (u8, u32, u32, u32), state: TcpState) -> Row {
    row(direction, segment, Invalid, state, None)
}

/// Opens a new connection; the state is that of the one before.
fn reopens(direction: Direction, segment: (u8, u32, u32, u32), state: TcpState) -> Row {
    row(direction, segment, NewFlow, state, None)
}

fn sequence(name: &'static str, first: Observed, state: TcpState, rows: impl IntoIterator<Item = Row>) -> Sequence {
    Sequence { name, first, state, rows: rows.into_iter().collect() }
}

/// After a SYN 999.
fn after_syn(name: &'static str, rows: impl IntoIterator<Item = Row>) -> Sequence {
    sequence(name, segment(S, 999, 0, 0), SynSent, rows)
}

/// After a handshake without options: the client's numbers from 1000, the server's from 5000.
fn after_handshake(name: &'static str, rows: impl IntoIterator<Item = Row>) -> Sequence {
    let handshake = [goes(Reply, (SA, 4999, 1000, 0), SynRecv), goes(Original, (A, 1000, 5000, 0), Established)];
    after_syn(name, handshake.into_iter().chain(rows))
}

/// As [`after_handshake`], with those options in SYN and SYN-ACK, and small windows in the SYNs.
fn after_handshake_with(
    name: &'static str,
    [client, server]: [(Option<u8>, bool); 2],
    rows: impl IntoIterator<Item = Row>,
) -> Sequence {
    let mut first = segment(S, 999, 0, 0);
    first.tcp_window = 1000;
    first.tcp_options = TcpOptions { window_scale: client.0, sack_permitted: client.1, sack: None };
    let handshake = [
        goes(Reply, (SA, 4999, 1000, 0), SynRecv).options(server.0, server.1).window(1000),
        goes(Original, (A, 1000, 5000, 0), Established).window(1000),
    ];
    sequence(name, first, SynSent, handshake.into_iter().chain(rows))
}

/// Every sequence.
pub fn all() -> Vec<Sequence> {
    [opening(), closing(), syns(), rsts(), flags(), windows(), sacks(), picked_up(), timeouts()]
        .into_iter()
        .flatten()
        .collect()
}

fn opening() -> Vec<Sequence> {
    vec![
        after_syn(
            "SYN repeated, SYN-ACK repeated",
            [
                passes(Original, (S, 999, 0, 0), SynSent),
                passes(Original, (S, 2999, 0, 0), SynSent),
                goes(Reply, (SA, 4999, 3000, 0), SynRecv),
                passes(Reply, (SA, 4999, 3000, 0), SynRecv),
                goes(Original, (A, 3000, 5000, 0), Established),
            ],
        ),
        after_syn(
            "before the SYN-ACK nothing else",
            [
                invalid(Original, (A, 1000, 5000, 0), SynSent),
                invalid(Original, (FA, 1000, 5000, 0), SynSent),
                invalid(Original, (SA, 1000, 5000, 0), SynSent),
                invalid(Reply, (FA, 5000, 1000, 0), SynSent),
            ],
        ),
        after_syn(
            "simultaneous open",
            [
                passes(Reply, (S, 4999, 0, 0), SynSent2),
                goes(Original, (SA, 999, 5000, 0), SynRecv),
                passes(Reply, (SA, 4999, 1000, 0), SynRecv),
                goes(Reply, (A, 5000, 1000, 0), Established),
            ],
        ),
        after_syn("refused: gone at once", [row(Reply, (RA, 0, 1000, 0), Accept, Close, Some("ended"))]),
        after_syn(
            "a refusal of something else",
            [invalid(Reply, (RA, 0, 5000, 0), SynSent), goes(Reply, (SA, 4999, 1000, 0), SynRecv)],
        ),
        after_syn("the client gives up: gone at once", [row(Original, (R, 1000, 0, 0), Accept, Close, Some("ended"))]),
        after_syn(
            "SYN-ACK of another SYN",
            [
                invalid(Reply, (SA, 4999, 2000, 0), SynSent),
                goes(Reply, (SA, 14_999, 1000, 0), SynRecv),
                goes(Original, (A, 1000, 15_000, 0), Established),
            ],
        ),
        after_syn(
            "SYN-ACK of an old SYN, then the right one with a lower number",
            [
                invalid(Reply, (SA, 145_824_453, 643_160_523, 0), SynSent),
                goes(Reply, (SA, 4999, 1000, 0), SynRecv).unlike_netfilter("notes the numbers of an invalid segment"),
                goes(Original, (A, 1000, 5000, 0), Established),
            ],
        ),
        after_syn(
            "half-open: the server answers for an old connection, the client resets that, and begins again",
            [
                passes(Reply, (A, 700_000, 300_000, 0), SynSent),
                row(Original, (R, 300_000, 0, 0), Accept, Close, Some("close")),
                reopens(Original, (S, 999, 0, 0), Close),
            ],
        ),
    ]
}

fn closing() -> Vec<Sequence> {
    vec![
        after_handshake(
            "data, then both close",
            [
                unacknowledged(Original, (PA, 1000, 5000, 100)),
                goes(Reply, (A, 5000, 1100, 0), Established),
                goes(Original, (FA, 1100, 5000, 0), FinWait),
                goes(Reply, (A, 5000, 1101, 0), CloseWait),
                goes(Reply, (PA, 5000, 1101, 10), CloseWait),
                goes(Reply, (FA, 5010, 1101, 0), LastAck),
                goes(Original, (A, 1101, 5011, 0), TimeWait),
                goes(Reply, (FA, 5010, 1101, 0), TimeWait),
                goes(Original, (A, 1101, 5011, 0), TimeWait),
            ],
        ),
        after_handshake(
            "the server closes first",
            [
                goes(Reply, (FA, 5000, 1000, 0), FinWait),
                goes(Original, (A, 1000, 5001, 0), CloseWait),
                goes(Original, (FA, 1000, 5001, 0), LastAck),
                goes(Reply, (A, 5001, 1001, 0), TimeWait),
            ],
        ),
        after_handshake(
            "both close at once",
            [
                goes(Original, (FA, 1000, 5000, 0), FinWait),
                goes(Reply, (FA, 5000, 1000, 0), LastAck),
                goes(Original, (A, 1001, 5001, 0), TimeWait),
            ],
        ),
        after_handshake(
            "a client that comes back from TIME_WAIT",
            [
                goes(Original, (FA, 1000, 5000, 0), FinWait),
                goes(Reply, (FA, 5000, 1001, 0), LastAck),
                goes(Original, (A, 1001, 5001, 0), TimeWait),
                reopens(Original, (S, 70_000, 0, 0), TimeWait),
            ],
        ),
        after_handshake(
            "roles that change after TIME_WAIT",
            [
                goes(Original, (FA, 1000, 5000, 0), FinWait),
                goes(Reply, (FA, 5000, 1001, 0), LastAck),
                goes(Original, (A, 1001, 5001, 0), TimeWait),
                reopens(Reply, (S, 70_000, 0, 0), TimeWait),
            ],
        ),
        after_handshake(
            "a RST of either side ends what is ending, wherever its number is",
            [
                goes(Original, (FA, 1000, 5000, 0), FinWait),
                goes(Reply, (R, 400_000, 0, 0), Close),
                goes(Original, (R, 1001, 0, 0), Close),
                reopens(Original, (S, 70_000, 0, 0), Close),
            ],
        ),
    ]
}

fn syns() -> Vec<Sequence> {
    vec![
        after_handshake(
            "a SYN in a connection, answered by a challenge ACK",
            [
                passes(Original, (S, 70_000, 0, 0), Established),
                goes(Reply, (A, 5000, 1000, 0), Established),
                invalid(Reply, (S, 70_000, 0, 0), Established),
            ],
        ),
        after_handshake(
            "a SYN in a connection, its challenge ACK, the RST that answers that, and the SYN again",
            [
                passes(Original, (S, 70_000, 0, 0), Established),
                goes(Reply, (A, 5000, 1000, 0), Established),
                goes(Original, (R, 1000, 0, 0), Close),
                reopens(Original, (S, 70_000, 0, 0), Close),
            ],
        ),
        after_handshake(
            "a SYN in a connection, answered by a RST: the server knows nothing of it",
            [passes(Original, (S, 70_000, 0, 0), Established), goes(Reply, (RA, 0, 70_001, 0), Close)],
        ),
        after_handshake(
            "a SYN in a connection, answered by a SYN-ACK: both ends have begun anew",
            [
                passes(Original, (S, 70_000, 0, 0), Established),
                goes(Reply, (SA, 90_000, 70_001, 0), SynRecv),
                goes(Original, (A, 70_001, 90_001, 0), Established),
                unacknowledged(Original, (PA, 70_001, 90_001, 1000)),
                goes(Reply, (A, 90_001, 71_001, 0), Established),
                passes(Original, (A, 1000, 5000, 0), Established),
            ],
        ),
        after_handshake(
            "an old SYN-ACK is not an answer",
            [passes(Original, (S, 70_000, 0, 0), Established), passes(Reply, (SA, 90_000, 60_000, 0), Established)],
        ),
        after_handshake(
            "in LAST_ACK its challenge ACK is not taken for the last one",
            [
                goes(Original, (FA, 1000, 5000, 0), FinWait),
                goes(Reply, (FA, 5000, 1001, 0), LastAck),
                passes(Original, (S, 70_000, 0, 0), LastAck),
                passes(Reply, (A, 5001, 1001, 0), LastAck),
                goes(Original, (A, 1001, 5001, 0), TimeWait),
            ],
        ),
        after_handshake(
            "a SYN in FIN_WAIT, which the server takes",
            [
                goes(Original, (FA, 1000, 5000, 0), FinWait),
                passes(Original, (S, 70_000, 0, 0), FinWait),
                goes(Reply, (SA, 90_000, 70_001, 0), SynRecv),
                goes(Original, (A, 70_001, 90_001, 0), Established),
            ],
        ),
        after_handshake(
            "a client that comes back after the server's RST",
            [
                goes(Reply, (R, 5000, 0, 0), Close),
                reopens(Original, (S, 70_000, 0, 0), Close)
                    .unlike_netfilter("the design: a SYN on a closed connection is judged anew, whoever has closed it"),
            ],
        ),
        after_handshake(
            "a client that comes back after its own RST",
            [goes(Original, (R, 1000, 0, 0), Close), reopens(Original, (S, 70_000, 0, 0), Close)],
        ),
    ]
}

const ANY_SYN: &str =
    "after a SYN each RST in the window counts; anybody may send a SYN, and then need not know the number";

fn rsts() -> Vec<Sequence> {
    vec![
        after_handshake(
            "a RST with the exact number",
            [goes(Reply, (R, 5000, 0, 0), Close), goes(Original, (PA, 1000, 5000, 5), Close)],
        ),
        after_handshake(
            "a RST ahead: passes, the challenge ACK gives the time back, and the answer to it counts",
            [
                // The replying side makes the connection assured.
                goes(Reply, (A, 5000, 1000, 0), Established),
                row(Reply, (R, 5500, 0, 0), Accept, Established, Some("close")),
                unacknowledged(Original, (A, 1000, 5000, 0)),
                goes(Reply, (R, 5000, 0, 0), Close),
            ],
        ),
        after_handshake(
            "a RST behind",
            [invalid(Reply, (R, 4999, 0, 0), Established), invalid(Original, (R, 900, 0, 0), Established)],
        ),
        after_handshake(
            "a RST beyond the window",
            [
                passes(Reply, (R, 5000 + 64_241, 0, 0), Established),
                invalid(Original, (RA, 900_000, 5000, 0), Established),
                row(Original, (R, 1000 + 64_240, 0, 0), Accept, Established, Some("close")),
            ],
        ),
        after_handshake(
            "a RST that acknowledges what was never sent",
            [invalid(Reply, (RA, 5000, 2000, 0), Established)],
        ),
        after_handshake(
            "a RST right behind data in flight",
            [unacknowledged(Reply, (PA, 5000, 1000, 50)), goes(Reply, (R, 5050, 0, 0), Close)],
        ),
        after_handshake(
            "a RST ahead of acknowledged data is exact only at the acknowledgment",
            [
                unacknowledged(Reply, (PA, 5000, 1000, 50)),
                goes(Original, (A, 1000, 5050, 0), Established),
                row(Reply, (R, 5051, 0, 0), Accept, Established, Some("close")),
                invalid(Reply, (R, 5049, 0, 0), Established),
                goes(Reply, (R, 5050, 0, 0), Close),
            ],
        ),
        after_handshake(
            "a SYN does not make a RST of its own side count that is not exact",
            [
                goes(Reply, (A, 5000, 1000, 0), Established),
                passes(Original, (S, 70_000, 0, 0), Established),
                row(Original, (R, 1500, 0, 0), Accept, Established, Some("close")).unlike_netfilter(ANY_SYN),
            ],
        ),
        after_handshake(
            "nor one of the other side that does not answer it",
            [
                goes(Reply, (A, 5000, 1000, 0), Established),
                passes(Original, (S, 70_000, 0, 0), Established),
                row(Reply, (R, 5500, 0, 0), Accept, Established, Some("close")).unlike_netfilter(ANY_SYN),
            ],
        ),
        after_handshake(
            "nor one that is behind",
            [
                goes(Reply, (A, 5000, 1000, 0), Established),
                passes(Original, (S, 70_000, 0, 0), Established),
                invalid(Original, (R, 999, 0, 0), Established).unlike_netfilter(ANY_SYN),
            ],
        ),
        after_handshake(
            "an exact one counts after a SYN too",
            [
                goes(Reply, (A, 5000, 1000, 0), Established),
                passes(Original, (S, 70_000, 0, 0), Established),
                goes(Original, (R, 1000, 0, 0), Close),
            ],
        ),
        after_handshake(
            "a RST with ACK and zero acknowledgment number, of a broken stack",
            [goes(Reply, (RA, 5000, 0, 0), Close)],
        ),
    ]
}

fn flags() -> Vec<Sequence> {
    let impossible = [0, 0x01, 0x03, 0x06, 0x07, 0x08, 0x20, 0x29, 0x3f, 0xff];
    let both = impossible.into_iter().flat_map(|flags| [Original, Reply].map(|direction| (flags, direction)));
    vec![
        after_handshake(
            "impossible flags",
            both.map(|(flags, direction)| invalid(direction, (flags, 1000, 5000, 0), Established)),
        ),
        after_handshake("ECE and CWR are no part of it", [goes(Original, (A | 0xc0, 1000, 5000, 0), Established)]),
    ]
}

fn windows() -> Vec<Sequence> {
    const WINDOW: u32 = 64_240;
    vec![
        after_handshake(
            "the right edge",
            [
                invalid(Original, (PA, 1000 + 2 * WINDOW, 5000, 10), Established),
                unacknowledged(Original, (PA, 1000 + WINDOW, 5000, 10)),
            ],
        ),
        after_handshake(
            "more than was offered, less than twice: it passes, and so does its acknowledgment",
            [
                passes(Original, (PA, 1000 + WINDOW + 1, 5000, 10), Established),
                goes(Reply, (A, 5000, 1000 + WINDOW + 11, 0), Established),
            ],
        ),
        after_handshake(
            "the left edge",
            [
                unacknowledged(Original, (PA, 1000, 5000, 1000)),
                goes(Reply, (A, 5000, 2000, 0), Established),
                passes(Original, (A, 1999u32.wrapping_sub(WINDOW), 5000, 0), Established),
                goes(Original, (A, 2000u32.wrapping_sub(WINDOW), 5000, 0), Established),
            ],
        ),
        after_handshake(
            "an acknowledgment of what was never sent",
            [
                invalid(Reply, (A, 5000, 1001, 0), Established),
                unacknowledged(Original, (PA, 1000, 5000, 1)),
                goes(Reply, (A, 5000, 1001, 0), Established),
            ],
        ),
        after_handshake(
            "an acknowledgment that is late, and one that is too late",
            [
                goes(Reply, (A, 5000, 1000, 0), Established),
                goes(Reply, (A, 5000, 1000u32.wrapping_sub(66_000), 0), Established),
                passes(Reply, (A, 5000, 1000u32.wrapping_sub(66_001), 0), Established),
            ],
        ),
        after_handshake(
            "ACK loss: data goes on, and the acknowledgment of all of it comes at the end",
            [
                unacknowledged(Original, (PA, 1000, 5000, 20_000)),
                unacknowledged(Original, (PA, 21_000, 5000, 20_000)),
                unacknowledged(Original, (PA, 41_000, 5000, 20_000)),
                goes(Reply, (A, 5000, 61_000, 0), Established),
                unacknowledged(Original, (PA, 61_000, 5000, 20_000)),
                // The lost one comes late after all.
                unacknowledged(Reply, (A, 5000, 21_000, 0)),
                goes(Reply, (A, 5000, 81_000, 0), Established),
            ],
        ),
        after_handshake(
            "retransmission after the ACK was lost behind this observer",
            [
                unacknowledged(Original, (PA, 1000, 5000, 100)),
                goes(Reply, (A, 5000, 1100, 0), Established),
                goes(Original, (PA, 1000, 5000, 100), Established),
                goes(Reply, (A, 5000, 1100, 0), Established),
            ],
        ),
        after_handshake(
            "what an invalid segment says does not count",
            [
                // Were its number or its window taken, the next two would be inside.
                invalid(Original, (PA, 200_000, 5000, 100), Established),
                invalid(Reply, (A, 5000, 200_100, 0), Established),
                invalid(Original, (PA, 200_100, 5000, 100), Established),
            ],
        ),
        after_handshake(
            "a closed window, its probe, and its opening",
            [
                row(Reply, (A, 5000, 1000, 0), Accept, Established, Some("max_retrans")).window(0),
                // One byte, which is beyond what was offered.
                row(Original, (A, 1000, 5000, 1), Accept, Established, Some("unacknowledged")),
                row(Reply, (A, 5000, 1000, 0), Accept, Established, Some("unacknowledged")).window(0),
                goes(Reply, (A, 5000, 1001, 0), Established),
                unacknowledged(Original, (A, 1001, 5000, 1000)),
            ],
        ),
        after_handshake(
            "keepalives: without data one number behind, with one byte of it, and the answer",
            [
                goes(Original, (A, 999, 5000, 0), Established),
                goes(Reply, (A, 5000, 1000, 0), Established),
                goes(Original, (A, 999, 5000, 1), Established),
                goes(Reply, (A, 5000, 1000, 0), Established),
                goes(Reply, (A, 4999, 1000, 0), Established),
            ],
        ),
        sequence(
            "sequence numbers that wrap around",
            segment(S, u32::MAX - 10, 0, 0),
            SynSent,
            [
                goes(Reply, (SA, u32::MAX, u32::MAX - 9, 0), SynRecv),
                goes(Original, (A, u32::MAX - 9, 0, 0), Established),
                unacknowledged(Original, (PA, u32::MAX - 9, 0, 1000)),
                goes(Reply, (A, 0, 990, 0), Established),
                unacknowledged(Original, (PA, 990, 0, 100)),
                goes(Reply, (A, 0, 1090, 0), Established),
                goes(Original, (PA, u32::MAX - 9, 0, 100), Established),
                passes(Original, (A, u32::MAX - 70_000, 0, 0), Established),
                row(Reply, (R, 1, 0, 0), Accept, Established, Some("close")),
                invalid(Reply, (R, u32::MAX, 0, 0), Established),
                goes(Reply, (R, 0, 1090, 0), Close),
            ],
        ),
        after_handshake_with(
            "a window scale of both sides",
            [(Some(7), false), (Some(4), false)],
            [
                // 1000 << 7 of the client's third segment, unlike its SYN's 1000.
                unacknowledged(Reply, (PA, 5000, 1000, 50_000)).window(10),
                unacknowledged(Reply, (PA, 5000 + 128_000, 1000, 10)).window(10),
                passes(Reply, (PA, 5000 + 128_001, 1000, 10), Established).window(10),
                invalid(Reply, (PA, 5000 + 2 * 128_000, 1000, 10), Established).window(10),
                // The server's SYN-ACK is not scaled.
                unacknowledged(Original, (PA, 1000 + 1000, 55_000, 10)),
                passes(Original, (PA, 1000 + 1011, 55_000, 10), Established),
            ],
        ),
        after_handshake_with(
            "a window scale of one side counts for none",
            [(Some(7), false), (None, false)],
            [
                unacknowledged(Reply, (PA, 5000 + 1000, 1000, 10)),
                passes(Reply, (PA, 5000 + 1001 + 10, 1000, 10), Established),
                invalid(Reply, (PA, 5000 + 3000, 1000, 10), Established),
            ],
        ),
        sequence(
            "a window scale in the SYN that was ignored, and in its SYN-ACK",
            segment(S, 999, 0, 0),
            SynSent,
            [
                goes(Reply, (SA, 4999, 1000, 0), SynRecv),
                goes(Original, (A, 1000, 5000, 0), Established),
                passes(Original, (S, 69_999, 0, 0), Established).options(Some(5), true).window(1000),
                goes(Reply, (SA, 89_999, 70_000, 0), SynRecv).options(Some(3), true).window(1000),
                goes(Original, (A, 70_000, 90_000, 0), Established).window(1000),
                unacknowledged(Reply, (PA, 90_000 + 32_000, 70_000, 10)),
                passes(Reply, (PA, 90_000 + 32_011, 70_000, 10), Established),
                invalid(Reply, (PA, 90_000 + 65_000, 70_000, 10), Established),
            ],
        ),
    ]
}

fn sacks() -> Vec<Sequence> {
    let sack = [(None, true), (None, true)];
    vec![
        after_handshake_with(
            "a SACK opens the window from its edge",
            sack,
            [
                unacknowledged(Original, (A, 1000, 5000, 500)),
                unacknowledged(Original, (A, 1500, 5000, 500)),
                // The first 500 are lost behind this observer.
                unacknowledged(Reply, (A, 5000, 1000, 0)).sack(2000).window(1000),
                unacknowledged(Original, (A, 3000, 5000, 10)),
                passes(Original, (A, 3011, 5000, 10), Established),
            ],
        ),
        after_handshake_with(
            "a SACK of what was never sent",
            sack,
            [
                unacknowledged(Original, (A, 1000, 5000, 500)),
                invalid(Reply, (A, 5000, 1000, 0), Established).sack(1501),
                unacknowledged(Reply, (A, 5000, 1000, 0)).sack(1500),
            ],
        ),
        after_handshake_with(
            "a SACK that the other side does not understand says nothing",
            [(None, false), (None, true)],
            [
                unacknowledged(Original, (A, 1000, 5000, 500)),
                unacknowledged(Reply, (A, 5000, 1000, 0)).sack(9999).window(1000),
                passes(Original, (A, 2001, 5000, 10), Established),
            ],
        ),
        after_handshake_with(
            "an acknowledgment far behind its SACK",
            sack,
            [
                unacknowledged(Original, (A, 1000, 5000, 60_000)),
                unacknowledged(Original, (A, 2000, 5000, 60_000)),
                unacknowledged(Reply, (A, 5000, 1000, 0)).sack(62_000),
            ],
        ),
    ]
}

fn picked_up() -> Vec<Sequence> {
    vec![
        sequence(
            "picked up in the middle",
            segment(A, 1000, 5000, 10),
            Established,
            [
                unacknowledged(Original, (PA, 1010, 5000, 10)),
                unacknowledged(Reply, (A, 5000, 1020, 0)),
                row(Reply, (A, 5000, 1020, 0), Accept, Established, Some("max_retrans")),
                unacknowledged(Original, (PA, 1020, 5000, 100)),
                goes(Reply, (A, 5000, 1120, 0), Established),
            ],
        ),
        sequence(
            "picked up in the middle, nothing is outside a window: there may be a scale",
            segment(A, 1000, 5000, 10),
            Established,
            [
                unacknowledged(Reply, (A, 5000, 1010, 0)).window(10),
                goes(Original, (PA, 501_010, 5000, 100), Established),
                goes(Reply, (A, 5000, 501_110, 0), Established).window(10),
                // Nothing is known to compare it with.
                goes(Reply, (R, 4999, 0, 0), Close),
            ],
        ),
        sequence(
            "picked up at a keepalive",
            segment(A, 999, 5000, 0),
            Established,
            [unacknowledged(Reply, (A, 5000, 1000, 0)), goes(Original, (A, 1000, 5000, 0), Established)],
        ),
        sequence(
            "picked up, until a new handshake is seen",
            segment(A, 1000, 5000, 0),
            Established,
            [
                passes(Original, (S, 69_999, 0, 0), Established),
                goes(Reply, (SA, 89_999, 70_000, 0), SynRecv),
                goes(Original, (A, 70_000, 90_000, 0), Established),
                invalid(Original, (A, 570_000, 90_000, 0), Established),
            ],
        ),
    ]
}

fn timeouts() -> Vec<Sequence> {
    let again = |timeout| row(Original, (A, 1000, 5000, 0), Accept, Established, Some(timeout));
    vec![
        after_handshake(
            "retransmissions, until something else comes",
            [
                again("established"),
                again("established"),
                again("max_retrans"),
                again("max_retrans"),
                goes(Reply, (A, 5000, 1000, 0), Established),
            ],
        ),
        after_handshake(
            "a closed window",
            [row(Reply, (A, 5000, 1000, 0), Accept, Established, Some("max_retrans")).window(0)],
        ),
    ]
}
