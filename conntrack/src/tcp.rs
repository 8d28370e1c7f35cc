//! TCP's states, followed from the middle.
//!
//! A router sees the segments of both sides, not always all of them and not always those that arrive. It therefore
//! follows one state for both sides, as netfilter does, whose names are used: RFC 9293's state machine (section
//! 3.3.2) projected on what an observer can know.
//!
//! | state | the observer has seen |
//! |---|---|
//! | SYN_SENT | a SYN (3.5) |
//! | SYN_SENT2 | a SYN from both sides: simultaneous open (3.5, figure 8) |
//! | SYN_RECV | the SYN-ACK |
//! | ESTABLISHED | the ACK of it |
//! | FIN_WAIT | one FIN (3.6) |
//! | CLOSE_WAIT | the ACK of it |
//! | LAST_ACK | the other side's FIN |
//! | TIME_WAIT | the ACK of that one (3.6.1) |
//! | CLOSE | a RST (3.5.3) |
//!
//! A SYN inside a synchronized connection (FIN_WAIT to LAST_ACK too) moves nothing: the other end answers it with a
//! challenge ACK (RFC 5961 section 4.2) if it disagrees, and by its SYN-ACK if it agrees; until then a spoofed SYN
//! must not be able to tear the entry down. In TIME_WAIT and CLOSE it opens a new connection (RFC 9293 section 3.6.1,
//! RFC 6191), which is judged as one.
//!
//! [`Tcp`] is the part that is not in the state word: a plain copy is taken from the connection's [`TcpLine`],
//! [`Tcp::step`] computes on it, and what changed is stored back. Two workers that do so at once may each lose the
//! other's update: values get older, never wrong, and the next segment repairs them.

use weir_packet::Direction;
use weir_sync::atomic::{AtomicU32, Ordering};

use crate::{
    observed::{ACK, FIN, Observed, RST, SYN},
    storage::Zeroable,
    timeouts::TimeoutClass,
};

/// A TCP connection's state, under netfilter's names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum TcpState {
    /// A SYN was seen.
    SynSent = 1,
    /// A SYN-ACK was seen.
    SynRecv = 2,
    /// The SYN-ACK was acknowledged.
    Established = 3,
    /// A FIN was seen.
    FinWait = 4,
    /// The FIN was acknowledged.
    CloseWait = 5,
    /// A FIN of the other side was seen.
    LastAck = 6,
    /// That FIN was acknowledged.
    TimeWait = 7,
    /// A RST was seen.
    Close = 8,
    /// SYNs of both sides were seen.
    SynSent2 = 9,
}

use TcpState::{Close, CloseWait, Established, FinWait, LastAck, SynRecv, SynSent, SynSent2, TimeWait};

impl TcpState {
    /// Every state.
    pub const ALL: [Self; 9] = [SynSent, SynRecv, Established, FinWait, CloseWait, LastAck, TimeWait, Close, SynSent2];

    /// netfilter's name, as `conntrack -L` prints it.
    pub const fn name(self) -> &'static str {
        match self {
            SynSent => "SYN_SENT",
            SynRecv => "SYN_RECV",
            Established => "ESTABLISHED",
            FinWait => "FIN_WAIT",
            CloseWait => "CLOSE_WAIT",
            LastAck => "LAST_ACK",
            TimeWait => "TIME_WAIT",
            Close => "CLOSE",
            SynSent2 => "SYN_SENT2",
        }
    }

    #[inline]
    pub(crate) const fn from_number(number: u8) -> Option<Self> {
        match number {
            1..=9 => Some(Self::ALL[number as usize - 1]),
            _ => None,
        }
    }

    const fn timeout_class(self) -> TimeoutClass {
        match self {
            SynSent | SynSent2 => TimeoutClass::TcpSynSent,
            SynRecv => TimeoutClass::TcpSynRecv,
            Established => TimeoutClass::TcpEstablished,
            FinWait => TimeoutClass::TcpFinWait,
            CloseWait => TimeoutClass::TcpCloseWait,
            LastAck => TimeoutClass::TcpLastAck,
            TimeWait => TimeoutClass::TcpTimeWait,
            Close => TimeoutClass::TcpClose,
        }
    }

    /// Whether one side at least has ended the connection.
    const fn is_ending(self) -> bool {
        matches!(self, FinWait | CloseWait | LastAck | TimeWait | Close)
    }
}

/// What a segment is, by its most telling flag.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Event {
    Nothing = 0,
    Syn = 1,
    SynAck = 2,
    Fin = 3,
    Ack = 4,
    Rst = 5,
}

impl Event {
    const fn of(flags: u8) -> Self {
        match flags {
            flags if flags & RST != 0 => Self::Rst,
            flags if flags & (SYN | ACK) == SYN | ACK => Self::SynAck,
            flags if flags & SYN != 0 => Self::Syn,
            flags if flags & FIN != 0 => Self::Fin,
            flags if flags & ACK != 0 => Self::Ack,
            _ => Self::Nothing,
        }
    }

    const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Syn,
            2 => Self::SynAck,
            3 => Self::Fin,
            4 => Self::Ack,
            5 => Self::Rst,
            _ => Self::Nothing,
        }
    }
}

/// Where a segment leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Next {
    /// To that state, which may be the same.
    To(TcpState),
    /// Over, and about to begin again.
    Reopen,
    /// Nowhere: one of the ends knows better than this observer; let it pass and see what is answered.
    Ignore,
    /// The other end would not take it.
    Invalid,
}

/// The transitions. `from` is the state before.
const fn next(direction: Direction, event: Event, from: TcpState) -> Next {
    use Next::{Ignore, Invalid, Reopen, To};
    match (event, direction, from) {
        // A SYN again, or the other side's: RFC 9293 section 3.5.
        (Event::Syn, Direction::Original, SynSent) => To(SynSent),
        (Event::Syn, Direction::Original, SynSent2) => To(SynSent2),
        (Event::Syn, Direction::Reply, SynSent | SynSent2) => To(SynSent2),
        // Port reuse. From the replying side only after TIME_WAIT: roles may have changed.
        (Event::Syn, Direction::Original, TimeWait | Close) => Reopen,
        (Event::Syn, Direction::Reply, TimeWait) => Reopen,
        // Synchronized: challenge ACK or agreement will tell.
        (Event::Syn, Direction::Original, _) => Ignore,
        (Event::Syn, Direction::Reply, _) => Invalid,

        (Event::SynAck, Direction::Reply, SynSent | SynSent2) => To(SynRecv),
        // Perhaps the answer to a SYN that was ignored, or one repeated.
        (Event::SynAck, Direction::Reply, _) => Ignore,
        // In a simultaneous open both sides send one.
        (Event::SynAck, Direction::Original, SynRecv | SynSent2) => To(SynRecv),
        (Event::SynAck, Direction::Original, _) => Invalid,

        // A FIN counts only on a synchronized connection.
        (Event::Fin, _, SynSent | SynSent2) => Invalid,
        (Event::Fin, _, SynRecv | Established) => To(FinWait),
        // Either repeated or the other side's: the connection goes on to wait for the last ACK.
        (Event::Fin, _, FinWait | CloseWait | LastAck) => To(LastAck),
        (Event::Fin, _, TimeWait | Close) => To(from),

        (Event::Ack, Direction::Original, SynSent | SynSent2) => Invalid,
        (Event::Ack, Direction::Original, SynRecv) => To(Established),
        // Half-open: the end that answers a SYN by an ACK holds an old connection (RFC 9293 section 3.5.1).
        (Event::Ack, Direction::Reply, SynSent | SynSent2) => Ignore,
        (Event::Ack, Direction::Reply, SynRecv) => To(SynRecv),
        (Event::Ack, _, Established) => To(Established),
        (Event::Ack, _, FinWait | CloseWait) => To(CloseWait),
        (Event::Ack, _, LastAck | TimeWait) => To(TimeWait),
        (Event::Ack, _, Close) => To(Close),

        (Event::Rst, _, _) => To(Close),
        (Event::Nothing, _, _) => Invalid,
    }
}

/// One side's sequence numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Side {
    /// The highest sequence number that it has sent, plus one.
    end: u32,
    /// The highest acknowledgment number that it has sent.
    max_ack: u32,
    /// [`END_KNOWN`], [`ACK_KNOWN`], [`UNACKNOWLEDGED`].
    flags: u32,
}

const END_KNOWN: u32 = 1;
const ACK_KNOWN: u32 = 2;
/// It has sent what the other side has not acknowledged.
const UNACKNOWLEDGED: u32 = 4;

/// The segment before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Last {
    seq: u32,
    ack: u32,
    end: u32,
    window: u16,
    /// How often in a row it came.
    retransmissions: u8,
    event: Event,
    direction: Direction,
    /// [`SIMULTANEOUS`], [`CHALLENGE_EXPECTED`].
    flags: u8,
}

/// Both sides have sent a SYN.
const SIMULTANEOUS: u8 = 1;
/// A SYN was ignored in LAST_ACK: the next ACK may answer it and not the FIN.
const CHALLENGE_EXPECTED: u8 = 2;
/// netfilter's default of nf_conntrack_tcp_max_retrans.
const MAX_RETRANSMISSIONS: u8 = 3;

/// The sequence numbers of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tcp {
    sides: [Side; 2],
    last: Last,
}

/// Where the numbers of a [`Tcp`] are kept. Words from 10 on are for the windows.
#[derive(Default)]
#[repr(C, align(64))]
pub(crate) struct TcpLine {
    words: [AtomicU32; 16],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<TcpLine>() == 64);

// SAFETY: atomic integers only.
unsafe impl Zeroable for TcpLine {}

impl TcpLine {
    pub(crate) fn load(&self) -> Tcp {
        let word = |index: usize| self.words[index].load(Ordering::Relaxed);
        let side = |at: usize| Side { end: word(at), max_ack: word(at + 1), flags: word(at + 2) };
        let packed = word(9);
        Tcp {
            sides: [side(0), side(3)],
            last: Last {
                seq: word(6),
                ack: word(7),
                end: word(8),
                window: packed as u16,
                retransmissions: (packed >> 16) as u8,
                event: Event::from_number(packed >> 24 & 7),
                direction: if packed >> 27 & 1 == 0 { Direction::Original } else { Direction::Reply },
                flags: (packed >> 28) as u8,
            },
        }
    }

    /// Takes over all words of another line.
    pub(crate) fn fill_from(&self, other: &Self) {
        for (word, other) in self.words.iter().zip(&other.words) {
            word.store(other.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Stores what differs from `before`, or everything.
    pub(crate) fn store(&self, tcp: &Tcp, before: Option<&Tcp>) {
        let before = before.map(Tcp::words);
        for (index, word) in tcp.words().into_iter().enumerate() {
            if before.is_none_or(|before| before[index] != word) {
                self.words[index].store(word, Ordering::Relaxed);
            }
        }
    }
}

/// What a segment does to its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// It belongs to the connection, which goes on in that state with that timeout.
    Accept { state: TcpState, timeout: TimeoutClass, assured: bool },
    /// It is let through, but moves nothing and keeps nothing alive.
    Ignore,
    /// It opens a new connection.
    NewFlow,
    /// It is dropped.
    Invalid,
}

/// What a RST is worth to the one who gets it (RFC 5961 section 3.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rst {
    /// It has the sequence number that is expected, or may have it: right behind data in flight, or no
    /// acknowledgment is known to compare it with.
    Counts,
    /// It is ahead of what is expected: answered with a challenge ACK, which a real sender answers with one that counts.
    Challenged,
    /// It is behind what is acknowledged.
    Behind,
}

/// Whether `a` comes before `b` in sequence space (RFC 9293 section 3.4).
const fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Tcp {
    fn words(&self) -> [u32; 10] {
        let [Side { end: e0, max_ack: a0, flags: f0 }, Side { end: e1, max_ack: a1, flags: f1 }] = self.sides;
        let Last { seq, ack, end, window, retransmissions, event, direction, flags } = self.last;
        let packed = u32::from(window)
            | u32::from(retransmissions) << 16
            | (event as u32) << 24
            | (direction as u32) << 27
            | u32::from(flags) << 28;
        [e0, a0, f0, e1, a1, f1, seq, ack, end, packed]
    }

    /// The numbers and the state after a connection's first segment: a SYN, or one picked up in the middle.
    pub(crate) fn open(segment: &Observed) -> (Self, TcpState, TimeoutClass) {
        let event = Event::of(segment.tcp_flags);
        let (state, timeout) = match event {
            Event::Syn => (SynSent, TimeoutClass::TcpSynSent),
            // Until the other side has been heard, five days would be too long.
            _ => (Established, TimeoutClass::TcpUnacknowledged),
        };
        let last = Last {
            seq: 0,
            ack: 0,
            end: 0,
            window: 0,
            retransmissions: 0,
            event: Event::Nothing,
            direction: Direction::Original,
            flags: 0,
        };
        let mut tcp = Self { sides: [Side::default(); 2], last };
        tcp.record(Direction::Original, event, segment);
        (tcp, state, timeout)
    }

    /// What `segment` does to a connection in `from`. Changes `self` unless it is invalid or opens a new connection.
    pub(crate) fn step(
        &mut self,
        from: TcpState,
        (seen_reply, assured): (bool, bool),
        direction: Direction,
        segment: &Observed,
    ) -> Step {
        if !segment.flags_possible() {
            return Step::Invalid;
        }
        let event = Event::of(segment.tcp_flags);
        let (from, mut to) = match next(direction, event, from) {
            Next::Invalid => return Step::Invalid,
            Next::Reopen => return Step::NewFlow,
            Next::To(state) => (from, state),
            Next::Ignore if self.agrees_with_ignored_syn(direction, event, segment) => {
                self.sides = [Side::default(); 2];
                self.sides[direction.flip() as usize] = Side { end: self.last.end, max_ack: 0, flags: END_KNOWN };
                self.last.flags = 0;
                (SynSent, SynRecv)
            }
            Next::Ignore => {
                self.note_ignored(from, direction, event, segment);
                return Step::Ignore;
            }
        };
        match to {
            SynSent2 => self.last.flags |= SIMULTANEOUS,
            SynRecv if event == Event::Ack && direction == Direction::Reply && self.last.flags & SIMULTANEOUS != 0 => {
                to = Established;
            }
            TimeWait if from == LastAck && self.is_challenge_ack(direction, event) => {
                self.last.flags &= !CHALLENGE_EXPECTED;
                return Step::Ignore;
            }
            Close if event == Event::Rst && !from.is_ending() => {
                match self.judge_rst(from == Established && assured, direction, segment) {
                    Rst::Counts => {}
                    Rst::Challenged => return Step::Ignore,
                    Rst::Behind => return Step::Invalid,
                }
            }
            _ => {}
        }
        self.record(direction, event, segment);
        let replied = seen_reply || direction == Direction::Reply;
        let timeout = self.timeout(to, event, seen_reply, replied);
        let assured = assured || seen_reply && matches!(from, SynRecv | Established) && to == Established;
        Step::Accept { state: to, timeout, assured }
    }

    /// Whether the segment is the SYN-ACK of a SYN that was ignored: both ends agree on a new connection, and only
    /// this observer did not know.
    fn agrees_with_ignored_syn(&self, direction: Direction, event: Event, segment: &Observed) -> bool {
        event == Event::SynAck
            && self.last.event == Event::Syn
            && self.last.direction != direction
            && segment.tcp_ack == self.last.end
    }

    fn note_ignored(&mut self, from: TcpState, direction: Direction, event: Event, segment: &Observed) {
        let flags = match (event, direction, from) {
            (Event::Syn, Direction::Original, LastAck) => CHALLENGE_EXPECTED,
            (Event::Syn, Direction::Original, _) => 0,
            _ => self.last.flags,
        };
        self.last = Last {
            seq: segment.tcp_seq,
            ack: segment.tcp_ack,
            end: segment.tcp_end(),
            window: segment.tcp_window,
            retransmissions: self.last.retransmissions,
            event,
            direction,
            flags,
        };
    }

    fn is_challenge_ack(&self, direction: Direction, event: Event) -> bool {
        event == Event::Ack
            && self.last.direction != direction
            && self.last.event == Event::Syn
            && self.last.flags & CHALLENGE_EXPECTED != 0
    }

    fn judge_rst(&self, established: bool, direction: Direction, segment: &Observed) -> Rst {
        let other = self.sides[direction.flip() as usize];
        if other.flags & ACK_KNOWN == 0 {
            return Rst::Counts;
        }
        if before(segment.tcp_seq, other.max_ack) {
            return Rst::Behind;
        }
        let behind_data =
            self.last.event == Event::Ack && self.last.direction == direction && segment.tcp_seq == self.last.end;
        if !established || segment.tcp_seq == other.max_ack || behind_data { Rst::Counts } else { Rst::Challenged }
    }

    fn record(&mut self, direction: Direction, event: Event, segment: &Observed) {
        let end = segment.tcp_end();
        let has_ack = segment.tcp_flags & ACK != 0;
        let side = &mut self.sides[direction as usize];
        if side.flags & END_KNOWN == 0 {
            side.end = end;
            side.flags |= END_KNOWN;
        } else if before(side.end, end) {
            side.end = end;
            side.flags |= UNACKNOWLEDGED;
        }
        if has_ack {
            if side.flags & ACK_KNOWN == 0 || before(side.max_ack, segment.tcp_ack) {
                side.max_ack = segment.tcp_ack;
                side.flags |= ACK_KNOWN;
            }
            let other = &mut self.sides[direction.flip() as usize];
            if other.end == segment.tcp_ack {
                other.flags &= !UNACKNOWLEDGED;
            }
        }
        let again = Last {
            event,
            direction,
            seq: segment.tcp_seq,
            ack: segment.tcp_ack,
            end,
            window: segment.tcp_window,
            ..self.last
        };
        let retransmissions = match event {
            Event::Ack if again == self.last => self.last.retransmissions.saturating_add(1),
            Event::Ack => 0,
            _ => self.last.retransmissions,
        };
        self.last = Last { retransmissions, ..again };
    }

    fn timeout(&self, state: TcpState, event: Event, seen_reply: bool, replied: bool) -> TimeoutClass {
        // A limit applies to states that would live longer.
        let long = matches!(state, Established);
        let unacknowledged = self.sides.iter().any(|side| side.flags & UNACKNOWLEDGED != 0);
        match event {
            // The only answer to a first packet is a refusal: there never was a connection.
            Event::Rst if !seen_reply && state == Close => TimeoutClass::Ended,
            Event::Rst if state == Close => TimeoutClass::TcpClose,
            _ if long && self.last.retransmissions >= MAX_RETRANSMISSIONS => TimeoutClass::TcpMaxRetrans,
            _ if long && (unacknowledged || !replied) => TimeoutClass::TcpUnacknowledged,
            _ if long && self.last.window == 0 => TimeoutClass::TcpMaxRetrans,
            _ => state.timeout_class(),
        }
    }
}
