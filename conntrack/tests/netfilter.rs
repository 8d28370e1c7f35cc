//! The same packets through weir's tracking and through the kernel's: after each, the same verdict, the same state, the
//! same timeout. First the written sequences, then random ones. Where weir decides otherwise, it says why.
//!
//! Needs root; WEIR_SKIP_E2E=1 skips it.
#![cfg(not(loom))]

use std::{
    collections::BTreeMap,
    env,
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use weir_conntrack::{
    Attributes, Handle, Insert, NewConn, Observed, Opening, SctpPacket, SctpState, Table, TableConfig, TcpSettings,
    TcpState, Timeouts, Tracked,
};
use weir_packet::{Direction, FlowKey, Ports, Protocol, Tick, options::TcpOptions, parse::TcpFields};
use weir_sync::{Domain, Participant};

mod kernel;
mod sequences;

use Direction::{Original, Reply};
use kernel::{Kernel, Shown, with_kernel};

const SERVER_PORT: u16 = 80;
/// When a test begins.
const START: Tick = Tick(1000);

/// All different by more than any test takes, and such that both limits are longer than some states' timeouts and shorter
/// than others'.
const UNIT: u32 = 10_000;
const TIMEOUTS: [(&str, u32); 21] = [
    ("nf_conntrack_udp_timeout", UNIT),
    ("nf_conntrack_udp_timeout_stream", 2 * UNIT),
    ("nf_conntrack_icmp_timeout", 3 * UNIT),
    ("nf_conntrack_sctp_timeout_closed", UNIT),
    ("nf_conntrack_sctp_timeout_cookie_wait", 2 * UNIT),
    ("nf_conntrack_sctp_timeout_cookie_echoed", 3 * UNIT),
    ("nf_conntrack_sctp_timeout_established", 4 * UNIT),
    ("nf_conntrack_sctp_timeout_shutdown_sent", 5 * UNIT),
    ("nf_conntrack_sctp_timeout_shutdown_recd", 6 * UNIT),
    ("nf_conntrack_sctp_timeout_shutdown_ack_sent", 7 * UNIT),
    ("nf_conntrack_sctp_timeout_heartbeat_sent", 8 * UNIT),
    ("nf_conntrack_tcp_timeout_syn_sent", UNIT),
    ("nf_conntrack_tcp_timeout_syn_recv", 2 * UNIT),
    ("nf_conntrack_tcp_timeout_established", 12 * UNIT),
    ("nf_conntrack_tcp_timeout_fin_wait", 3 * UNIT),
    ("nf_conntrack_tcp_timeout_close_wait", 9 * UNIT),
    ("nf_conntrack_tcp_timeout_last_ack", 4 * UNIT),
    ("nf_conntrack_tcp_timeout_time_wait", 5 * UNIT),
    ("nf_conntrack_tcp_timeout_close", 6 * UNIT),
    ("nf_conntrack_tcp_timeout_max_retrans", 7 * UNIT),
    ("nf_conntrack_tcp_timeout_unacknowledged", 8 * UNIT),
];

/// weir's side.
struct Weir {
    table: Table<Ipv4Addr>,
    handle: Handle,
    participant: Participant,
    now: Tick,
}

/// What became of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Outcome {
    forwarded: bool,
    shown: Option<Shown>,
}

impl Weir {
    fn new(tcp: TcpSettings) -> Self {
        let mut timeouts = Timeouts::default();
        TIMEOUTS.iter().for_each(|(name, seconds)| timeouts.set(name, *seconds).expect("a known name"));
        let domain = Domain::new();
        let participant = domain.join();
        let config = TableConfig { max_entries: 1 << 16, seed: [1, 2], timeouts, tcp };
        let table = Table::new(config, domain);
        let handle = table.handle();
        Self { table, handle, participant, now: START }
    }

    /// What the dataplane does with a packet: look up, track, or open.
    fn pass(&mut self, key: &FlowKey<Ipv4Addr>, observed: &Observed) -> (Outcome, Option<Tracked>) {
        let Self { table, handle, participant, now } = self;
        let (now, turn) = (*now, participant.enter());
        let hash = table.hash(key);
        let mut tracked = None;
        if let Some(hit) = table.lookup(key, hash, now, &turn) {
            let verdict = table.conn(hit.conn).track(hit.direction, observed, now);
            tracked = Some(verdict);
            if verdict == Tracked::NewFlow {
                assert!(table.remove(handle, hit.conn, &turn));
            }
        }
        let mut forwarded = tracked == Some(Tracked::Accept);
        if matches!(tracked, None | Some(Tracked::NewFlow)) && observed.opening(key) != Opening::Never {
            let new =
                NewConn { original: *key, reply: key.invert(), attributes: Attributes::default(), first: *observed };
            assert!(matches!(table.insert(handle, new, now, &turn), Insert::Inserted(_)));
            forwarded = true;
        }
        let shown = table.lookup(key, hash, now, &turn).map(|hit| {
            let conn = table.conn(hit.conn);
            let is_expired = |units: &u32| conn.is_expired(Tick(now.0 + 100 * UNIT * units));
            Shown {
                state: conn
                    .tcp_state()
                    .map_or_else(|| conn.sctp_state().map_or(0, |state| state as u8), |state| state as u8),
                seen_reply: conn.seen_reply(),
                assured: conn.assured(),
                remaining: UNIT * (0..).find(is_expired).expect("all end"),
            }
        });
        (Outcome { forwarded, shown }, tracked)
    }
}

/// Both, side by side.
struct Pair<'k> {
    weir: Weir,
    kernel: &'k mut Kernel,
}

fn key(direction: Direction, protocol: Protocol, client_port: u16) -> FlowKey<Ipv4Addr> {
    let original = FlowKey {
        src: Ipv4Addr::new(10, 1, 0, 1),
        dst: Ipv4Addr::new(10, 2, 0, 1),
        ports: Ports::new(client_port, SERVER_PORT),
        protocol,
    };
    if direction == Original { original } else { original.invert() }
}

fn tcp_bytes(key: &FlowKey<Ipv4Addr>, segment: &Observed) -> Vec<u8> {
    let TcpOptions { window_scale, sack_permitted, sack } = segment.tcp_options;
    let mut options = Vec::new();
    if segment.tcp_flags & 0x02 != 0 {
        // Every SYN has an MSS.
        options.extend([2, 4, 5, 180]);
        options.extend(window_scale.into_iter().flat_map(|scale| [1, 3, 3, scale]));
        options.extend(if sack_permitted { &[4, 2, 1, 1][..] } else { &[] });
    } else if let Some(edge) = sack {
        options.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 5, 10]);
        options.extend(edge.wrapping_sub(1).to_be_bytes());
        options.extend(edge.to_be_bytes());
    }
    let mut bytes = Vec::new();
    bytes.extend(key.ports.source().to_be_bytes());
    bytes.extend(key.ports.destination().to_be_bytes());
    bytes.extend(segment.tcp_seq.to_be_bytes());
    bytes.extend(segment.tcp_ack.to_be_bytes());
    let header_words = (20 + options.len()) / 4;
    bytes.extend([(header_words as u8) << 4, segment.tcp_flags]);
    bytes.extend(segment.tcp_window.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(&options);
    let fields = TcpFields { flags: segment.tcp_flags, ack: segment.tcp_ack, ..TcpFields::default() };
    assert_eq!(TcpOptions::read(&options, &fields), segment.tcp_options, "the test writes what weir reads");
    bytes.resize(bytes.len() + segment.payload_bytes as usize, 0x5a);
    bytes
}

impl Pair<'_> {
    /// A segment through both; what weir and the kernel made of it, timeouts in whole units.
    fn segment(&mut self, port: u16, direction: Direction, segment: &Observed) -> (Outcome, Outcome, Option<Tracked>) {
        let key = key(direction, Protocol::TCP, port);
        self.packet(&key, direction, port, segment, &tcp_bytes(&key, segment))
    }

    fn packet(
        &mut self,
        key: &FlowKey<Ipv4Addr>,
        direction: Direction,
        port: u16,
        observed: &Observed,
        bytes: &[u8],
    ) -> (Outcome, Outcome, Option<Tracked>) {
        let (ours, tracked) = self.weir.pass(key, observed);
        let forwarded = self.kernel.forwards(direction, key.protocol, bytes);
        let shown = self.kernel.connection(key.protocol, [port, SERVER_PORT]);
        let shown = shown.map(|shown| Shown { remaining: shown.remaining.next_multiple_of(UNIT), ..shown });
        (ours, Outcome { forwarded, shown }, tracked)
    }
}

fn show(direction: Direction, segment: &Observed) -> String {
    let flags: String =
        (0..8).filter(|bit| segment.tcp_flags >> bit & 1 != 0).map(|bit| char::from(b"FSRPAUEC"[bit])).collect();
    let Observed { tcp_seq, tcp_ack, tcp_window, payload_bytes, tcp_options, .. } = segment;
    format!("{direction:?} {flags} seq {tcp_seq} +{payload_bytes} ack {tcp_ack} win {tcp_window} {tcp_options:?}")
}

/// Both sides of a connection, as far as the random segments need them: plausible numbers near the windows.
struct Peers {
    random: ChaCha8Rng,
    /// The next number that each side sends, and the oldest that it has not got acknowledged.
    next: [u32; 2],
    oldest: [u32; 2],
    /// What each side says in its SYN.
    options: [TcpOptions; 2],
}

impl Peers {
    fn new(seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        // Sequence numbers wrap around in one sequence of four.
        let start = |random: &mut ChaCha8Rng| match random.next_u32() % 4 {
            0 => u32::MAX - random.next_u32() % 2000,
            _ => random.next_u32(),
        };
        let next = [start(&mut random), start(&mut random)];
        let options = [0, 1].map(|_| TcpOptions {
            window_scale: (!random.next_u32().is_multiple_of(3))
                .then_some((random.next_u32() % 16) as u8)
                .map(|n| n.min(14)),
            sack_permitted: !random.next_u32().is_multiple_of(3),
            sack: None,
        });
        Self { random, next, oldest: next, options }
    }

    fn below(&mut self, limit: u32) -> u32 {
        self.random.next_u32() % limit
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }

    fn window(&mut self) -> u16 {
        match self.below(8) {
            0 => 0,
            1 => self.below(20) as u16,
            2 => u16::MAX,
            3..6 => 1000,
            _ => self.below(65_536) as u16,
        }
    }

    /// A number near another one: off by little, by about a window, or by very much.
    fn near(&mut self, number: u32) -> u32 {
        let distance = match self.below(5) {
            0 => 1,
            1 => self.below(100),
            2 => self.below(3000),
            3 => 60_000 + self.below(12_000),
            _ => self.random.next_u32(),
        };
        if self.one_in(2) { number.wrapping_add(distance) } else { number.wrapping_sub(distance) }
    }

    fn segment(&mut self, step: usize, direction: Direction) -> Observed {
        let (me, you) = (direction as usize, direction.flip() as usize);
        let tcp_flags = match (step, self.below(60)) {
            (0, 0..50) => sequences::S,
            (1, 0..50) => sequences::SA,
            (2, 0..50) => sequences::A,
            (_, 0..3) => sequences::S,
            (_, 3..5) => sequences::SA,
            (_, 5..9) => sequences::FA,
            (_, 9..12) => sequences::R,
            (_, 12..14) => sequences::RA,
            (_, 14) => self.random.next_u32() as u8,
            (_, 15..35) => sequences::PA,
            _ => sequences::A,
        };
        let (is_syn, is_rst) = (tcp_flags & 0x02 != 0, tcp_flags & 0x04 != 0);
        if is_syn && step > 2 && self.one_in(2) {
            self.next[me] = self.near(self.next[me]);
            self.oldest[me] = self.next[me];
        }
        let payload_bytes = match self.below(6) {
            _ if is_syn || is_rst => 0,
            0 => 1,
            1 => 1448,
            2 => self.below(3000),
            3 if self.one_in(3) => 20_000 + self.below(40_000),
            _ => 0,
        };
        // New data, old data again, a keepalive, anything.
        let tcp_seq = match self.below(20) {
            0 => self.oldest[me],
            1 => self.next[me].wrapping_sub(1),
            2 => self.near(self.next[me]),
            3 if is_rst => 0,
            _ if is_syn && step > 1 => self.oldest[me],
            _ => self.next[me],
        };
        let tcp_ack = match self.below(20) {
            0 => self.oldest[you],
            1 => self.near(self.next[you]),
            2 => 0,
            _ if tcp_flags & 0x10 == 0 => 0,
            _ => self.next[you],
        };
        let tcp_options = match tcp_flags {
            _ if is_syn => self.options[me],
            _ if self.one_in(4) => {
                let edge = if self.one_in(4) { self.near(self.next[you]) } else { self.next[you] };
                let is_beyond = (edge.wrapping_sub(tcp_ack) as i32) > 0;
                TcpOptions { sack: is_beyond.then_some(edge), ..TcpOptions::default() }
            }
            _ => TcpOptions::default(),
        };
        let tcp_window = self.window();
        let segment =
            Observed { tcp_flags, tcp_seq, tcp_ack, tcp_window, tcp_options, payload_bytes, ..Observed::default() };
        let counted = payload_bytes + u32::from(is_syn) + u32::from(tcp_flags & 0x01 != 0);
        let end = tcp_seq.wrapping_add(counted);
        // Usually it arrives. What is far off does not.
        let advance = end.wrapping_sub(self.next[me]);
        if advance < 1 << 20 && !is_rst && !self.one_in(8) {
            self.next[me] = end;
        }
        if tcp_ack == self.next[you] {
            self.oldest[you] = tcp_ack;
        }
        segment
    }
}

/// What both have let through of a sequence, to tell where weir and netfilter part ways on purpose
/// ([`weir_conntrack::tcp`], "Where this differs").
#[derive(Default)]
struct Passed {
    before: Option<Shown>,
    /// By side: whether its windows were noted; where what it has sent ends, and how much of that is acknowledged.
    begun: [bool; 2],
    end: [Option<u32>; 2],
    acknowledged: [Option<u32>; 2],
    /// A SYN has passed inside the connection.
    syn_passed: bool,
    /// Nothing can be said of what is acknowledged: also what is outside passes.
    be_liberal: bool,
}

fn later(a: Option<u32>, b: u32) -> Option<u32> {
    Some(a.filter(|a| (a.wrapping_sub(b) as i32) > 0).unwrap_or(b))
}

impl Passed {
    /// Takes a segment of which the kernel made `kernels`; whether it need not make the same of what follows.
    fn parts(&mut self, direction: Direction, segment: &Observed, ours: Outcome, kernels: Outcome) -> bool {
        let (me, you) = (direction as usize, direction.flip() as usize);
        let before = std::mem::replace(&mut self.before, kernels.shown);
        let state = |shown: Option<Shown>| shown.map_or(0, |shown| shown.state);
        let states = [state(before), state(kernels.shown), state(ours.shown)];
        if states == [TcpState::Close as u8, TcpState::Close as u8, TcpState::SynSent as u8] {
            // A SYN on a closed connection is judged anew, whoever has closed it.
            return true;
        }
        let is_over = |state| [TcpState::TimeWait as u8, TcpState::Close as u8, 0].contains(&state);
        if is_over(states[0]) && !is_over(states[1]) {
            *self = Self { before: kernels.shown, be_liberal: self.be_liberal, ..Self::default() };
            if direction == Reply {
                // They go on alike, but what follows here takes the client for the original side.
                return true;
            }
        }
        let (is_fin, is_syn, is_rst) =
            (segment.tcp_flags & 0x01 != 0, segment.tcp_flags & 0x02 != 0, segment.tcp_flags & 0x04 != 0);
        // Late segments that pass after a SYN leave it the last that counts.
        let is_known = ![0, TcpState::SynSent as u8].contains(&states[0]);
        self.syn_passed |= ours.forwarded && is_known && segment.tcp_flags & 0x12 == 0x02;
        if is_rst && self.syn_passed && ours != kernels {
            // Inexact: netfilter takes it for an answer to the SYN, whatever it acknowledges.
            return true;
        }
        if !ours.forwarded {
            // netfilter notes its numbers, or that it was the last.
            return ours == kernels && (!self.begun[me] || is_syn || is_fin || is_rst);
        }
        let syn_sent = TcpState::SynSent as u8;
        let syn_recv = TcpState::SynRecv as u8;
        let was_late = match direction {
            Reply => (is_syn || is_rst && !self.begun[me]) && states[..2] == [syn_sent; 2],
            Original => is_syn && states[..2] == [syn_recv; 2],
        };
        if was_late {
            // netfilter notes its numbers.
            return true;
        }
        let far_behind = |known: u32| known.wrapping_sub(segment.tcp_ack) as i32 > 60_000;
        if direction == Reply && !self.begun[me] && self.end[you].is_some_and(far_behind) && states[1] != syn_sent {
            // Perhaps it is late, as above.
            return true;
        }
        self.begun[me] |= match direction {
            Original => !is_rst,
            Reply if is_syn => states[1] == syn_recv || states[1] == TcpState::SynSent2 as u8,
            Reply => !is_rst && states[0] != syn_sent,
        };
        let Observed { tcp_seq, tcp_ack, payload_bytes, .. } = *segment;
        let end = tcp_seq.wrapping_add(payload_bytes + u32::from(is_syn) + u32::from(is_fin));
        // What is not known is behind.
        let is_after = |a: u32, b: Option<u32>| b.is_none_or(|b| (a.wrapping_sub(b) as i32) > 0);
        if is_after(tcp_seq, self.acknowledged[me]) && !is_after(end, self.end[me]) && self.end[me] != Some(end) {
            // Sent again, but not from the left edge: if it is beyond the window, netfilter moves the side's end back.
            return true;
        }
        if is_syn && states[..2] == [syn_recv; 2] {
            // Ignored, or not: it cannot be told from here.
            return self.end[me] != Some(end);
        }
        if is_syn && states[..2] == [syn_sent; 2] && !is_after(end, self.end[me]) {
            // Only later numbers begin anew.
            return false;
        }
        if is_syn && [syn_sent, syn_recv].contains(&states[1]) {
            (self.end[me], self.acknowledged[me]) = (Some(end), Some(end));
            if states[1] == syn_recv && states[0] != syn_sent {
                (self.end[you], self.acknowledged[you]) = (Some(tcp_ack), Some(tcp_ack));
            }
        }
        if is_syn {
            return false;
        }
        // Only what is inside for certain counts.
        let is_inside = !is_after(tcp_seq, self.acknowledged[me])
            && self.end[me].is_none_or(|known| !is_after(known, Some(end)))
            && !is_after(tcp_ack, self.end[you]);
        self.end[me] = later(self.end[me], end);
        if segment.tcp_flags & 0x10 != 0 && !is_rst && is_inside && !self.be_liberal {
            self.acknowledged[you] = later(self.acknowledged[you], tcp_ack);
        }
        false
    }
}

/// Random sequences.
fn random_sequences(settings: TcpSettings, sysctls: &[(&str, u32)], seeds: std::ops::Range<u64>) {
    let sysctls = [&TIMEOUTS[..], sysctls].concat();
    with_kernel(&sysctls, |kernel| {
        let mut pair = Pair { weir: Weir::new(settings), kernel };
        let (mut segments, mut parted, mut forwarded) = (0, 0, 0);
        let mut states = [0; 10];
        for seed in seeds {
            let port = 1024 + (seed % 60_000) as u16;
            let mut peers = Peers::new(seed);
            let (mut story, mut passed) = (Vec::new(), Passed { be_liberal: settings.be_liberal, ..Passed::default() });
            for step in 0..24 {
                let direction = match step {
                    0..3 => [Original, Reply, Original][step],
                    _ if peers.one_in(2) => Original,
                    _ => Reply,
                };
                let segment = peers.segment(step, direction);
                story.push(show(direction, &segment));
                let (ours, kernels, _) = pair.segment(port, direction, &segment);
                segments += 1;
                forwarded += u32::from(kernels.forwarded);
                if let Some(shown) = kernels.shown {
                    states[usize::from(shown.state)] += 1;
                }
                if passed.parts(direction, &segment, ours, kernels) {
                    parted += 1;
                    break;
                }
                assert_eq!(ours, kernels, "weir, the kernel: seed {seed}:\n  {}", story.join("\n  "));
            }
        }
        println!("{segments} segments, {forwarded} forwarded, {parted} sequences parted; in states {states:?}");
        assert!(states[1..].iter().all(|count| *count > 30), "no state is left out: {states:?}");
    });
}

#[test]
fn random_sequences_with_the_defaults() {
    let seeds = match env::var("WEIR_NETFILTER_SEED") {
        Ok(seed) => seed.parse().map(|seed: u64| seed..seed + 1).expect("a number"),
        Err(_) => 0..6000,
    };
    random_sequences(TcpSettings::default(), &[], seeds);
}

#[test]
fn random_sequences_with_all_settings_turned() {
    let settings = TcpSettings { be_liberal: true, ignore_invalid_rst: true, max_retransmissions: 1 };
    let sysctls = [
        ("nf_conntrack_tcp_be_liberal", 1),
        ("nf_conntrack_tcp_ignore_invalid_rst", 1),
        ("nf_conntrack_tcp_max_retrans", 1),
    ];
    random_sequences(settings, &sysctls, 0..3000);
}

#[test]
fn written_sequences() {
    with_kernel(&TIMEOUTS, |kernel| {
        let mut pair = Pair { weir: Weir::new(TcpSettings::default()), kernel };
        let mut wrong = Vec::new();
        for (number, sequence) in sequences::all().into_iter().enumerate() {
            let port = 1000 + number as u16;
            let (ours, kernels, _) = pair.segment(port, Original, &sequence.first);
            assert_eq!(ours, kernels, "{}: first segment", sequence.name);
            for (row_number, row) in sequence.rows.iter().enumerate() {
                let (ours, kernels, tracked) = pair.segment(port, row.direction, &row.segment);
                let what = format!("{}: row {row_number}: {}", sequence.name, show(row.direction, &row.segment));
                assert_eq!(tracked, Some(row.verdict), "{what}");
                let agrees = ours == kernels;
                if agrees != row.unlike_netfilter.is_none() {
                    wrong.push(format!("{what}\n  weir   {ours:?}\n  kernel {kernels:?}"));
                }
                if !agrees {
                    break;
                }
            }
        }
        assert!(wrong.is_empty(), "they differ, or agree where they should not:\n{}", wrong.join("\n"));
    });
}

/// A flow of datagrams, or of ICMP's requests of a type and their replies.
struct Flow {
    protocol: Protocol,
    /// The client's port, or the identifier.
    port: u16,
    /// The server's port, or the request's type; a reply's type is the second.
    asked: u16,
    answered: u16,
    /// Before its first packet.
    begun: Instant,
    story: Vec<String>,
}

impl Flow {
    fn new(protocol: Protocol, port: u16, [asked, answered]: [u16; 2]) -> Self {
        Self { protocol, port, asked, answered, begun: Instant::now(), story: Vec::new() }
    }

    /// A packet through both, and what each made of it.
    fn packet(&mut self, pair: &mut Pair<'_>, direction: Direction, payload_bytes: usize) -> [Outcome; 2] {
        let is_icmp = self.protocol == Protocol::ICMP;
        let mut key = key(direction, self.protocol, self.port);
        if is_icmp {
            key.ports = Ports::new(self.port, if direction == Original { self.asked } else { self.answered });
        }
        let [source, destination] = [key.ports.source().to_be_bytes(), key.ports.destination().to_be_bytes()];
        let number = self.story.len() as u8;
        let mut bytes = if is_icmp {
            vec![destination[1], 0, 0, 0, source[0], source[1], 0, number]
        } else {
            let length = (8 + payload_bytes as u16).to_be_bytes();
            [source, destination, length, [0, 0]].concat()
        };
        bytes.resize(8 + payload_bytes, number);
        self.story.push(format!("{direction:?} +{payload_bytes} at {:?}", pair.weir.now));
        let (ours, _) = pair.weir.pass(&key, &Observed::default());
        let forwarded = pair.kernel.forwards(direction, key.protocol, &bytes);
        let shown = pair.kernel.connection(key.protocol, [self.port, self.asked]);
        let shown = shown.map(|shown| Shown { remaining: shown.remaining.next_multiple_of(UNIT), ..shown });
        [ours, Outcome { forwarded, shown }]
    }
}

/// Random flows: each for less than two seconds, which is when netfilter takes those that are answered for streams, and again when these
/// are over. The kernel's clock is the real one: a flow of which this machine cannot say that it was fast enough proves nothing, and another
/// one takes its place.
#[test]
fn random_datagrams_and_echoes() {
    const STREAM_AFTER: Duration = Duration::from_secs(2);
    // Echo, timestamp, information and address mask.
    const REQUESTS: [[u16; 2]; 4] = [[8, 0], [13, 14], [15, 16], [17, 18]];
    with_kernel(&TIMEOUTS, |kernel| {
        let mut pair = Pair { weir: Weir::new(TcpSettings::default()), kernel };
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut below = |limit: usize| random.next_u32() as usize % limit;
        let mut outcomes = BTreeMap::new();
        let mut compare = |flow: &Flow, [ours, kernels]: [Outcome; 2]| {
            assert_eq!(ours, kernels, "weir, the kernel: {} {} {:#?}", flow.protocol, flow.asked, flow.story);
            let shown = kernels.shown.map(|shown| (shown.seen_reply, shown.assured, shown.remaining / UNIT));
            *outcomes.entry((flow.protocol, kernels.forwarded, shown)).or_insert(0) += 1;
        };
        let mut flows = Vec::new();
        let mut port = 1024;
        while flows.len() < 2000 {
            port += 1;
            let mut flow = match below(3) {
                0 => Flow::new(Protocol::ICMP, port, REQUESTS[below(4)]),
                _ => Flow::new(Protocol::UDP, port, [SERVER_PORT, 0]),
            };
            let is_certain = (0..=below(5)).all(|_| {
                let direction = if below(3) == 0 { Reply } else { Original };
                let seen = flow.packet(&mut pair, direction, below(40));
                let is_certain = flow.begun.elapsed() < STREAM_AFTER;
                if is_certain {
                    compare(&flow, seen);
                }
                is_certain
            });
            if is_certain {
                flows.push(flow);
            }
        }
        // More than a tick of whatever length the kernel's are.
        let more = Duration::from_millis(100);
        thread::sleep(STREAM_AFTER + more);
        pair.weir.now = Tick(START.0 + 300);
        for flow in &mut flows {
            for _ in 0..=below(4) {
                let direction = if below(3) == 0 { Reply } else { Original };
                let seen = flow.packet(&mut pair, direction, below(40));
                compare(flow, seen);
            }
        }
        println!("{outcomes:#?}");
        // What netfilter's nf_conntrack_proto_udp.c and nf_conntrack_proto_icmp.c can bring about, and no more.
        let expected = [
            (Protocol::ICMP, false, None),
            (Protocol::ICMP, true, Some((false, false, 3))),
            (Protocol::ICMP, true, Some((true, false, 3))),
            (Protocol::UDP, true, Some((false, false, 1))),
            (Protocol::UDP, true, Some((true, false, 1))),
            (Protocol::UDP, true, Some((true, true, 2))),
        ];
        assert!(outcomes.keys().copied().eq(expected) && outcomes.values().all(|count| *count > 30), "{outcomes:#?}");
    });
}

/// SCTP's chunk types.
const DATA: u8 = 0;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const HEARTBEAT: u8 = 4;
const HEARTBEAT_ACK: u8 = 5;
const ABORT: u8 = 6;
const SHUTDOWN: u8 = 7;
const SHUTDOWN_ACK: u8 = 8;
const ERROR: u8 = 9;
const COOKIE_ECHO: u8 = 10;
const COOKIE_ACK: u8 = 11;
const SHUTDOWN_COMPLETE: u8 = 14;
const EVERY_TYPE: [u8; 13] = [
    DATA,
    INIT,
    INIT_ACK,
    3,
    HEARTBEAT,
    HEARTBEAT_ACK,
    ABORT,
    SHUTDOWN,
    SHUTDOWN_ACK,
    ERROR,
    COOKIE_ECHO,
    COOKIE_ACK,
    SHUTDOWN_COMPLETE,
];

/// A packet of chunks: type, T bit. An INIT or INIT ACK offers `tag`.
fn sctp_bytes(key: &FlowKey<Ipv4Addr>, to_tag: u32, tag: u32, chunks: &[(u8, bool)]) -> Vec<u8> {
    let mut bytes = [key.ports.source().to_be_bytes(), key.ports.destination().to_be_bytes()].concat();
    bytes.extend(to_tag.to_be_bytes());
    bytes.extend([0; 4]);
    for (chunk, t_bit) in chunks {
        let value = match *chunk {
            INIT | INIT_ACK => [&tag.to_be_bytes()[..], &[0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]].concat(),
            DATA => vec![7; 17],
            _ => vec![0; 4],
        };
        bytes.extend([*chunk, u8::from(*t_bit)]);
        bytes.extend((4 + value.len() as u16).to_be_bytes());
        bytes.extend(&value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

#[test]
fn random_sctp() {
    with_kernel(&TIMEOUTS, |kernel| {
        let mut pair = Pair { weir: Weir::new(TcpSettings::default()), kernel };
        let (mut packets, mut forwarded, mut states) = (0, 0, [0; 9]);
        for seed in 0..4000 {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let mut below = |limit: u32| random.next_u32() % limit;
            let port = 1024 + seed as u16;
            // By direction: the tag that the packets that go that way carry.
            let mut tags = [1 + below(3), 11 + below(3)];
            let mut story = Vec::new();
            let mut is_over = false;
            for step in 0..16 {
                let usual = [
                    (Original, INIT),
                    (Reply, INIT_ACK),
                    (Original, COOKIE_ECHO),
                    (Reply, COOKIE_ACK),
                    (Original, DATA),
                    (Reply, 3),
                    (Original, SHUTDOWN),
                    (Reply, SHUTDOWN_ACK),
                    (Original, SHUTDOWN_COMPLETE),
                ];
                let (direction, chunk) = match usual.get(step) {
                    Some(usual) if below(8) != 0 => *usual,
                    _ => (if below(2) == 0 { Original } else { Reply }, EVERY_TYPE[below(13) as usize]),
                };
                let mut chunks = vec![(chunk, below(6) == 0)];
                while below(5) == 0 {
                    chunks.push((EVERY_TYPE[below(13) as usize], below(6) == 0));
                }
                let (here, there) = (direction as usize, direction.flip() as usize);
                let to_tag = match below(16) {
                    0 => below(20),
                    1 => tags[there],
                    2 => 0,
                    _ if chunk == INIT => 0,
                    _ => tags[here],
                };
                let own_tag = if below(5) == 0 { 20 + below(5) } else { tags[there] };
                let key = key(direction, Protocol::SCTP, port);
                let bytes = sctp_bytes(&key, to_tag, own_tag, &chunks);
                let observed = Observed { sctp: SctpPacket::read(&bytes), ..Observed::default() };
                let (ours, kernels, tracked) = pair.packet(&key, direction, port, &observed, &bytes);
                story.push(format!("{direction:?} {chunks:?} tag {to_tag} own {own_tag}: {tracked:?} {ours:?}"));
                packets += 1;
                forwarded += u32::from(kernels.forwarded);
                if let Some(shown) = kernels.shown {
                    states[usize::from(shown.state)] += 1;
                }
                let is_closed = kernels.shown.is_none_or(|shown| shown.state == SctpState::Closed as u8);
                if tracked == Some(Tracked::NewFlow) {
                    // Judged anew: netfilter goes on with the entry that is over.
                    assert!(is_over, "seed {seed}: {story:#?}");
                    break;
                }
                if !ours.forwarded && !kernels.forwarded && chunks.len() > 1 {
                    // Of an invalid packet netfilter keeps what the chunks before have changed.
                    break;
                }
                assert_eq!(ours, kernels, "weir, the kernel: seed {seed}: {story:#?}");
                if chunks.iter().any(|(chunk, _)| [ABORT, SHUTDOWN_COMPLETE].contains(chunk)) && kernels.forwarded {
                    is_over |= is_closed;
                }
                if kernels.forwarded && [INIT, INIT_ACK].contains(&chunk) {
                    tags[there] = own_tag;
                }
            }
        }
        println!("{packets} packets, {forwarded} forwarded; in states {states:?}");
        assert!(states[1..].iter().all(|count| *count > 30), "no state is left out: {states:?}");
    });
}
