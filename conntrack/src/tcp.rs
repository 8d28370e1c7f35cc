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
//! # Windows
//! A segment counts only where the one that gets it could take it. What that is, an observer between both ends can bound
//! by what it has seen (van Rooij, "Real Stateful TCP Packet Filtering in IP Filter", SANE 2000). It keeps four numbers
//! of each side:
//!
//! | number | what | moved by the side's own segments | by the other's |
//! |---|---|---|---|
//! | end | the highest sequence number it has sent, plus one | to seq + length | |
//! | max_end | the highest it may send: what the other has offered | | to (s)ack + window |
//! | max_win | the largest window that it has offered | to window, plus what it has SACKed | by what the other sent beyond its max_end |
//! | max_ack | the highest acknowledgment number it has sent | to ack | |
//!
//! A segment of S to R, from seq to end, that acknowledges up to ack, is inside if all of these hold, in sequence space:
//!
//! 1. seq <= S.max_end: it begins in R's window, or at its edge;
//! 2. ack <= R.end: it acknowledges what R has sent;
//! 3. end >= S.end - R.max_win: it is not older than a window;
//! 4. ack >= R.end - max(S.max_win, 66000): it does not acknowledge what it has acknowledged long ago.
//!
//! What fails the first two is invalid. What fails only the others is late, or a retransmission whose acknowledgment was
//! lost: it is let through, for R to answer with the acknowledgment that S waits for, but moves nothing and keeps nothing
//! alive. So is what only fails the first, by less than R's window: some send more than they were offered, and some
//! receivers take it. It moves S.end, for its acknowledgment to pass.
//!
//! Where R understands SACK, S's highest block stands for ack. Windows are scaled if both SYNs said so (RFC 7323, 2.2).
//! A segment may begin at the edge of the window, and a zero window is taken for one of one byte: this lets zero window
//! probes in (RFC 9293, 3.8.6.1). Keepalives (3.8.4), whose seq is end - 1, are inside anyway.
//!
//! A connection that was picked up in the middle has no scales: its windows are recorded as if there were none, and what
//! is outside of them is let through, until a new handshake is seen. With tcp_be_liberal that is so for all connections.
//! Neither saves a RST whose number is below what was acknowledged.
//!
//! # A RST
//! ends an established connection only if its number is exactly the one that the other side expects, or right behind data
//! in flight. One that is inside the window but not exact is let through, and leaves the connection a short time to live:
//! the end that gets it answers with a challenge ACK (RFC 5961, 3.2), which gives the long time back, and a real sender
//! answers that one with a RST that counts. One that is behind is invalid, unless tcp_ignore_invalid_rst is set.
//!
//! # Where this differs from netfilter
//! - A SYN in CLOSE opens a new connection, whoever has sent the RST; netfilter asks for more. The new one is judged anew.
//! - An invalid segment changes nothing, nor does one that is late. netfilter, whose rules may let it through, notes its
//!   numbers where they begin a side's; that it was the last one, if it is a FIN or a RST; and shortens the timeout when
//!   such come from both sides.
//! - What is beyond the window, but not by much, moves a side's end only forward; in netfilter also back.
//! - After a SYN inside a connection only a RST that acknowledges that very SYN is not held against the exact number; in
//!   netfilter none is, so that who sends a SYN first need not know the number.
//! - A repeated SYN without any option stands for a side that has none; netfilter then keeps those of the SYN before.
//!
//! # Ordinary segments
//! Nearly all segments are data and acknowledgments of a connection that is established, was answered and has proved itself.
//! [`TcpLine::follow_ordinary`] moves their numbers in place, and declines the rest, for [`Tcp::step`], which handles every segment. A
//! segment is ordinary if all of these hold:
//!
//! - it has an ACK, no SYN, FIN or RST, no SACK block, and its window is not closed;
//! - both sides were heard, and its sender has acknowledged before;
//! - it is inside, by the four tests above, and also ends in what its sender was offered;
//! - it does not repeat the segment before.
//!
//! Then it leads from ESTABLISHED to ESTABLISHED, and moves the windows, what is noted of the last segment, and the timeout. This says
//! nothing that `step` does not say: a property of the tests below compares both, word by word, and the list with what is taken.
//!
//! # Two workers at once
//! [`Tcp`] is the part that is not in the state word. [`Tcp::step`] computes on a copy of the connection's [`TcpLine`];
//! what has changed is stored back word by word, relaxed, after the state word was changed by compare-and-swap, and before
//! the packet is sent on. An answer comes after that, so it finds all that it answers to. What meets halfway are packets
//! that were under way at the same time: the two directions, or one direction on two workers for a moment, when a flow is
//! steered elsewhere. Words of different moments are then mixed, and one store may hide another.
//!
//! - The numbers of the windows only move forward ([`TcpLine::store`]): one is stored only where it is ahead of what
//!   stands there. `end` moves by compare-and-swap, so that none is ever lost: were it, the acknowledgment would be taken
//!   for one of data that was never sent, and with both directions' lost each side's segments would be refused for what
//!   they acknowledge, for ever. Of the others a smaller one may win. The window is then older than it could be, and
//!   too narrow by what one packet had moved: a segment may be refused that was not to be. It is sent again, from the left
//!   edge, which is inside, and its acknowledgment brings the lost number with it.
//! - A mix of words of different moments is a window between the older and the newer one: each of the four tests asks two
//!   or three words, all of which were true at some time.
//! - A side that was picked up in the middle begins where its first segment is, which may set its `end` back. Nothing is
//!   refused in such a connection for being outside a window.
//! - An ordinary segment's numbers are tested and stored by the same rules, word by word where they stand. `end` moves by compare-and-swap as
//!   ever; of the others a smaller one may win.
//! - Scales, SACK and liberality share one word, which only SYNs change, so that no other packet's store can bring back
//!   the one before.
//! - What begins anew (a SYN repeated with other numbers, a SYN-ACK that agrees with a SYN which was let pass) sets the
//!   words of a side back. Then the packets of the connection before, if they are under way at just that time, may move
//!   numbers in a sequence space that is no more. The next acknowledgment, or the next data, moves them on: forward from
//!   a number that is behind; and one that is ahead is only too generous.
//! - Whether data is unacknowledged, and how the segment before looked, decide about timeouts, exact RSTs and answers to
//!   SYNs. Lost updates there cost what a lost packet would: the next one says it again.
//!
//! SCTP has no windows; its tags are kept in the same line ([`crate::sctp`]).

use weir_packet::Direction;
use weir_sync::atomic::{AtomicU32, Ordering};

use crate::{
    observed::{ACK, FIN, Observed, RST, SYN},
    storage::Zeroable,
    timeouts::{ByClass, TimeoutClass},
};

/// netfilter's settings of TCP tracking, by the names of its sysctls.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TcpSettings {
    /// `nf_conntrack_tcp_be_liberal`: what is outside the window is let through, RSTs behind it aside.
    pub be_liberal: bool,
    /// `nf_conntrack_tcp_ignore_invalid_rst`: a RST behind what was acknowledged is not invalid for that.
    pub ignore_invalid_rst: bool,
    /// `nf_conntrack_tcp_max_retrans`: so many retransmissions in a row shorten the timeout.
    pub max_retransmissions: u8,
}

impl Default for TcpSettings {
    /// The kernel's defaults.
    fn default() -> Self {
        Self { be_liberal: false, ignore_invalid_rst: false, max_retransmissions: 3 }
    }
}

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

/// Whether a segment is a SYN that opens a connection again with the keys of one in that state, or repeats one that is not answered.
pub(crate) fn opens_again(state: TcpState, direction: Direction, segment: &Observed) -> bool {
    let event = Event::of(segment.tcp_flags);
    let leads_to = next(direction, event, state);
    event == Event::Syn && segment.flags_possible() && matches!(leads_to, Next::Reopen | Next::To(SynSent))
}

/// One side's window.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Side {
    /// The highest sequence number that it has sent, plus one.
    end: u32,
    /// The highest sequence number that it may send, plus one.
    max_end: u32,
    /// The largest window that it has offered; 0 until it was heard.
    max_win: u32,
    /// The highest acknowledgment number that it has sent.
    max_ack: u32,
    /// How far its windows are shifted.
    scale: u8,
    /// What its SYN said: [`SCALES`], [`UNDERSTANDS_SACK`]; [`LIBERAL`].
    options: u8,
    /// [`ACK_KNOWN`], [`UNACKNOWLEDGED`].
    progress: u8,
}

/// It has sent a window scale.
const SCALES: u8 = 1;
/// It has said that it understands SACK.
const UNDERSTANDS_SACK: u8 = 2;
/// Its SYN was not seen: nothing can be said of its scale.
const LIBERAL: u8 = 4;

const ACK_KNOWN: u8 = 1;
/// It has sent what the other side has not acknowledged.
const UNACKNOWLEDGED: u8 = 2;
/// In the word of both sides' progress.
const UNACKNOWLEDGED_BY_EITHER: u32 = UNACKNOWLEDGED as u32 * 0x101;

/// The largest window without scale, and some: acknowledgments may be that late at least.
const MIN_ACK_WINDOW: u32 = 66_000;

impl Side {
    /// It begins, by a SYN or a SYN-ACK.
    fn begin(&mut self, segment: &Observed) {
        let (end, options) = (segment.tcp_end(), segment.tcp_options);
        let kept = self.options & LIBERAL;
        let scales = if options.window_scale.is_some() { SCALES } else { 0 };
        let understands_sack = if options.sack_permitted { UNDERSTANDS_SACK } else { 0 };
        *self = Self {
            end,
            max_end: end,
            max_win: u32::from(segment.tcp_window).max(1),
            scale: options.window_scale.unwrap_or(0),
            options: kept | scales | understands_sack,
            max_ack: self.max_ack,
            progress: 0,
        };
    }
}

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
}

impl Last {
    /// Of its last word, what tells one segment from another: window and direction.
    const TELLING: u32 = 0xffff | 1 << 27;

    #[inline(always)]
    const fn words(&self) -> [u32; LAST_WORDS] {
        let Self { seq, ack, end, window, retransmissions, event, direction } = *self;
        let packed = window as u32 | (retransmissions as u32) << 16 | (event as u32) << 24 | (direction as u32) << 27;
        [seq, ack, end, packed]
    }
}

/// What is remembered of the handshake.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Noted {
    /// Both sides have sent a SYN.
    simultaneous: bool,
    /// A SYN was ignored in LAST_ACK: the next ACK may answer it and not the FIN.
    challenge_expected: bool,
    /// What the SYN said that was ignored: [`SCALES`], [`UNDERSTANDS_SACK`].
    options: u8,
    /// And its window scale.
    scale: u8,
}

/// The sequence numbers of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tcp {
    sides: [Side; 2],
    last: Last,
    noted: Noted,
    /// Sides whose numbers do not go on from those before.
    anew: [bool; 2],
}

/// The windows of a connection, in both of which it was heard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Windows {
    /// Of each side, by the direction that it sends in: end, max_end, max_win, max_ack ([`crate::tcp`]).
    pub sides: [[u32; 4]; 2],
    /// How far a side's windows are shifted.
    pub scales: [u8; 2],
    /// Whether what is outside of them passes, of either side: the connection was picked up in the middle, and not begun anew since.
    pub is_liberal: bool,
}

/// Where the numbers of a [`Tcp`], or the tags of an SCTP association, are kept; of other protocols, digests of datagrams.
///
/// | words | what |
/// |---|---|
/// | 0..4, 4..8 | a side's end, max_end, max_win, max_ack |
/// | 8..12 | the segment before |
/// | 12 | scales and options of both sides |
/// | 13 | progress of both sides |
/// | 14 | what is remembered of the handshake |
/// | 15 | where the connection is handed over to, of whatever protocol |
///
/// Of a protocol without connections words 0..8 are [`NOTES`] digests of two words each, and word 8 counts them.
#[derive(Default)]
#[repr(C, align(64))]
pub(crate) struct TcpLine {
    pub(crate) words: [AtomicU32; 16],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<TcpLine>() == 64);

// SAFETY: atomic integers only.
unsafe impl Zeroable for TcpLine {}

/// Words that are used.
const WORDS: usize = 15;
/// Words of a side: end, max_end, max_win, max_ack.
const SIDE_WORDS: usize = 4;
const END: usize = 0;
const MAX_END: usize = 1;
const MAX_WIN: usize = 2;
const MAX_ACK: usize = 3;
/// The words of the segment before.
const LAST: usize = 2 * SIDE_WORDS;
const LAST_WORDS: usize = 4;
/// The word of both sides' scales and options.
const FIXED: usize = 12;
/// The word of both sides' progress.
const PROGRESS: usize = 13;
/// Datagrams of a flow that are remembered.
pub(crate) const NOTES: usize = 4;
/// The word that counts them.
const NOTED: usize = 2 * NOTES;

impl TcpLine {
    /// The numbers, and the words that they were read from.
    #[inline(always)]
    pub(crate) fn load(&self) -> (Tcp, [u32; WORDS]) {
        let words: [u32; WORDS] = std::array::from_fn(|index| self.words[index].load(Ordering::Relaxed));
        (Tcp::of(&words), words)
    }

    /// Whether the sender of a direction may have a segment with that sequence number on its way. Yes, where nothing of it was seen.
    pub(crate) fn may_be_in_flight(&self, direction: Direction, seq: u32) -> bool {
        let (tcp, _) = self.load();
        let (sender, receiver) = (&tcp.sides[direction as usize], &tcp.sides[direction.flip() as usize]);
        let oldest = sender.end.wrapping_sub(receiver.max_win.max(MIN_ACK_WINDOW));
        sender.max_win == 0 || !is_before(seq, oldest) && !is_before(sender.end, seq)
    }

    /// Where the connection is handed over to: no number of TCP's.
    #[inline]
    pub(crate) fn offload_slot(&self) -> &AtomicU32 {
        &self.words[WORDS]
    }

    /// Remembers a digest in the place of the oldest. Of two that are noted at once one may be lost, or both.
    pub(crate) fn note(&self, digest: u64) {
        let count = self.words[NOTED].load(Ordering::Relaxed);
        let at = 2 * (count as usize % NOTES);
        self.words[at].store(digest as u32, Ordering::Relaxed);
        self.words[at + 1].store((digest >> 32) as u32, Ordering::Relaxed);
        self.words[NOTED].store(count.wrapping_add(1), Ordering::Relaxed);
    }

    /// Whether a digest is remembered.
    pub(crate) fn has_note(&self, digest: u64) -> bool {
        let word = |at: usize| u64::from(self.words[at].load(Ordering::Relaxed));
        (0..NOTES).any(|note| word(2 * note) | word(2 * note + 1) << 32 == digest)
    }

    /// The windows, if both sides were heard and have answered, and no SYN was let through just now: what follows one is looked at
    /// with other eyes ([`Tcp::judge_rst`]).
    pub(crate) fn windows(&self) -> Option<Windows> {
        let (tcp, words) = self.load();
        let is_known = |side: &Side| side.max_win != 0 && side.progress & ACK_KNOWN != 0;
        let is_settled = tcp.last.event != Event::Syn && tcp.sides.iter().all(is_known);
        is_settled.then(|| Windows {
            sides: std::array::from_fn(|side| std::array::from_fn(|word| words[side * SIDE_WORDS + word])),
            scales: tcp.sides.map(|side| side.scale),
            is_liberal: tcp.sides.iter().all(|side| side.options & LIBERAL != 0),
        })
    }

    /// Moves the windows forward to `sides`, as if the last of the segments between had come from `last`; the timeout of an established
    /// connection that follows, or `None` where nothing has moved. `are_ahead`: that they are is known.
    pub(crate) fn absorb(
        &self,
        sides: &[[u32; SIDE_WORDS]; 2],
        last: Direction,
        are_ahead: bool,
        settings: &TcpSettings,
        timeouts: &ByClass,
    ) -> Option<TimeoutClass> {
        let (_, old) = self.load();
        let mut new = old;
        for (at, (word, &number)) in new.iter_mut().zip(sides.as_flattened()).enumerate() {
            let place = at % SIDE_WORDS;
            if are_ahead && place != MAX_WIN || is_ahead(place, number, *word) {
                *word = number;
            }
        }
        if new == old {
            return None;
        }
        let mut tcp = Tcp { anew: [are_ahead; 2], ..Tcp::of(&new) };
        for side in 0..2 {
            let is_answered = tcp.sides[1 - side].max_ack == tcp.sides[side].end;
            let progress = &mut tcp.sides[side].progress;
            *progress = *progress & !UNACKNOWLEDGED | if is_answered { 0 } else { UNACKNOWLEDGED };
        }
        let (sender, other) = (&tcp.sides[last as usize], &tcp.sides[last.flip() as usize]);
        tcp.last = Last {
            seq: sender.end,
            ack: sender.max_ack,
            end: sender.end,
            // Not a closed one; which is not known.
            window: other.max_win.clamp(1, u32::from(u16::MAX)) as u16,
            retransmissions: 0,
            event: Event::Ack,
            direction: last,
        };
        self.store(&tcp, &old);
        Some(tcp.timeout(Established, Event::Ack, true, settings, timeouts))
    }

    /// Follows an ordinary segment in place; `false`, and nothing is written, of any other. For an established connection that was answered
    /// and has proved itself. See [the list](self).
    ///
    /// `enter` is asked once, when all else is known, to bring the state word to a timeout class. Where it refuses, nothing is written.
    #[inline(always)]
    pub(crate) fn follow_ordinary(
        &self,
        direction: Direction,
        segment: &Observed,
        settings: &TcpSettings,
        timeouts: &ByClass,
        enter: impl FnOnce(TimeoutClass) -> bool,
    ) -> bool {
        let (seq, ack, end) = (segment.tcp_seq, segment.tcp_ack, segment.tcp_end());
        let is_plain = segment.tcp_flags & (SYN | FIN | RST | ACK) == ACK && segment.tcp_options.sack.is_none();
        if !is_plain || segment.tcp_window == 0 {
            return false;
        }

        let (sending, receiving) = (direction as usize, direction.flip() as usize);
        let word = |index: usize| &self.words[index];
        let load = |index: usize| word(index).load(Ordering::Relaxed);
        let (sender, receiver) = (sending * SIDE_WORDS, receiving * SIDE_WORDS);
        let (sender_end, sender_max_end) = (load(sender + END), load(sender + MAX_END));
        let (sender_max_win, sender_max_ack) = (load(sender + MAX_WIN), load(sender + MAX_ACK));
        let (receiver_end, receiver_max_end) = (load(receiver + END), load(receiver + MAX_END));
        let receiver_max_win = load(receiver + MAX_WIN);
        let progress = load(PROGRESS);

        let is_known =
            sender_max_win != 0 && receiver_max_win != 0 && progress & u32::from(ACK_KNOWN) << (8 * sending) != 0;
        let oldest_end = sender_end.wrapping_sub(receiver_max_win);
        let oldest_ack = receiver_end.wrapping_sub(sender_max_win.max(MIN_ACK_WINDOW));
        // All together: none of them is likely.
        let is_outside = is_before(sender_max_end, seq)
            | is_before(sender_max_end, end)
            | is_before(receiver_end, ack)
            | is_before(end, oldest_end)
            | is_before(ack, oldest_ack);
        if !is_known || is_outside {
            return false;
        }
        let window = segment.tcp_window;
        let last = Last { seq, ack, end, window, retransmissions: 0, event: Event::Ack, direction };
        let new = last.words();
        let difference = (load(LAST) ^ new[0])
            | (load(LAST + 1) ^ new[1])
            | (load(LAST + 2) ^ new[2])
            | (load(LAST + 3) ^ new[3]) & Last::TELLING;
        if difference == 0 {
            return false;
        }

        let sends_more = is_before(sender_end, end);
        let mut progress_after = progress;
        if sends_more {
            progress_after |= u32::from(UNACKNOWLEDGED) << (8 * sending);
        }
        if ack == receiver_end {
            progress_after &= !(u32::from(UNACKNOWLEDGED) << (8 * receiving));
        }
        let is_unacknowledged = progress_after & UNACKNOWLEDGED_BY_EITHER != 0;
        let class = timeout(Established, Event::Ack, true, is_unacknowledged, &last, settings, timeouts);
        if !enter(class) {
            return false;
        }

        if sends_more {
            advance(END, word(sender + END), end);
        }
        let window = u32::from(window) << (load(FIXED) >> (8 * sending) & 0xf);
        if sender_max_win < window {
            word(sender + MAX_WIN).store(window, Ordering::Relaxed);
        }
        if is_before(sender_max_ack, ack) {
            word(sender + MAX_ACK).store(ack, Ordering::Relaxed);
        }
        let offered = ack.wrapping_add(window);
        if offered != receiver_max_end && !is_before(offered, receiver_max_end) {
            word(receiver + MAX_END).store(offered, Ordering::Relaxed);
        }
        for (place, value) in new.into_iter().enumerate() {
            word(LAST + place).store(value, Ordering::Relaxed);
        }
        if progress_after != progress {
            word(PROGRESS).store(progress_after, Ordering::Relaxed);
        }
        true
    }

    /// Takes over all words of another line.
    pub(crate) fn fill_from(&self, other: &Self) {
        for (word, other) in self.words.iter().zip(&other.words) {
            word.store(other.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Stores everything, of a connection that nobody else knows yet.
    pub(crate) fn fill(&self, tcp: &Tcp) {
        self.words.iter().zip(tcp.words()).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
    }

    /// Stores what differs from the words that were loaded; the numbers of the windows forward only, unless their side
    /// begins anew.
    #[inline(always)]
    pub(crate) fn store(&self, tcp: &Tcp, old: &[u32; WORDS]) {
        let new = tcp.words();
        let had_ack = [0, 1].map(|side| old[PROGRESS] >> (8 * side) & u32::from(ACK_KNOWN) != 0);
        for (side, &anew) in tcp.anew.iter().enumerate() {
            for place in 0..SIDE_WORDS {
                let index = side * SIDE_WORDS + place;
                let (word, number) = (&self.words[index], new[index]);
                // A side that begins anew, and its first acknowledgment, go on from nothing.
                let goes_on = !anew && (place != MAX_ACK || had_ack[side]);
                match place {
                    _ if number == old[index] => {}
                    _ if !goes_on => word.store(number, Ordering::Relaxed),
                    END => advance(place, word, number),
                    _ if is_ahead(place, number, word.load(Ordering::Relaxed)) => word.store(number, Ordering::Relaxed),
                    _ => {}
                }
            }
        }
        for index in 2 * SIDE_WORDS..WORDS {
            if new[index] != old[index] {
                self.words[index].store(new[index], Ordering::Relaxed);
            }
        }
    }
}

/// Whether a side's window moves if the number at a place among its words becomes this one: they only move forward.
#[inline(always)]
const fn is_ahead(place: usize, number: u32, current: u32) -> bool {
    match place {
        MAX_WIN => current < number,
        _ => is_before(current, number),
    }
}

/// Moves the word at a place of a side's window forward to `number`, whoever else moves it, unless it is there already.
#[inline]
pub fn advance(place: usize, word: &AtomicU32, number: u32) {
    let mut current = word.load(Ordering::Relaxed);
    while is_ahead(place, number, current) {
        match word.compare_exchange_weak(current, number, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return,
            Err(found) => current = found,
        }
    }
}

/// What a packet does to its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step<S> {
    /// It belongs to the connection, which goes on in that state. With a timeout it keeps it alive for as long; without,
    /// the connection lives as long as it would have without the packet.
    Accept { state: S, timeout: Option<TimeoutClass>, assured: bool },
    /// It is let through, but moves nothing and keeps nothing alive.
    Ignore,
    /// It opens a new connection.
    NewFlow,
    /// It is dropped.
    Invalid,
}

/// What the state word says of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    pub(crate) state: TcpState,
    pub(crate) seen_reply: bool,
    pub(crate) assured: bool,
}

/// What a RST is worth to the one who gets it (RFC 5961 section 3.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rst {
    /// It ends the connection if it is inside the window.
    Counts,
    /// It ends the connection: it answers what was let through, or the connection is ending anyway.
    CountsAnywhere,
    /// It is ahead of what is expected: answered with a challenge ACK, which a real sender answers with one that counts.
    Challenged,
    /// It is behind what is acknowledged.
    Behind,
}

/// Where a segment is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// Inside its sender's window, or taken for that.
    Inside,
    /// Just outside: its receiver may have an answer to it.
    Edge,
    /// Not where its receiver would look at it.
    Outside,
}

/// Whether `a` comes before `b` in sequence space (RFC 9293 section 3.4).
const fn is_before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Tcp {
    #[inline(always)]
    fn of(words: &[u32; WORDS]) -> Self {
        let word = |index: usize| words[index];
        let (packed, fixed, progress, noted) = (word(LAST + 3), word(FIXED), word(PROGRESS), word(14));
        let side = |number: usize| {
            let at = number * SIDE_WORDS;
            let fixed = fixed >> (8 * number);
            Side {
                end: word(at + END),
                max_end: word(at + MAX_END),
                max_win: word(at + MAX_WIN),
                max_ack: word(at + MAX_ACK),
                scale: fixed as u8 & 0xf,
                options: (fixed >> 4) as u8 & 0xf,
                progress: (progress >> (8 * number)) as u8,
            }
        };
        Tcp {
            sides: [side(0), side(1)],
            last: Last {
                seq: word(LAST),
                ack: word(LAST + 1),
                end: word(LAST + 2),
                window: packed as u16,
                retransmissions: (packed >> 16) as u8,
                event: Event::from_number(packed >> 24 & 7),
                direction: if packed >> 27 & 1 == 0 { Direction::Original } else { Direction::Reply },
            },
            noted: Noted {
                simultaneous: noted & 1 != 0,
                challenge_expected: noted & 2 != 0,
                options: (noted >> 8) as u8,
                scale: (noted >> 16) as u8,
            },
            anew: [false; 2],
        }
    }

    #[inline(always)]
    fn words(&self) -> [u32; WORDS] {
        let [
            Side { end: e0, max_end: me0, max_win: w0, max_ack: a0, scale: s0, options: o0, progress: p0 },
            Side { end: e1, max_end: me1, max_win: w1, max_ack: a1, scale: s1, options: o1, progress: p1 },
        ] = self.sides;
        let [seq, ack, end, packed] = self.last.words();
        let Noted { simultaneous, challenge_expected, options, scale } = self.noted;
        let fixed = u32::from(s0 | o0 << 4) | u32::from(s1 | o1 << 4) << 8;
        let progress = u32::from(p0) | u32::from(p1) << 8;
        let noted = u32::from(simultaneous)
            | u32::from(challenge_expected) << 1
            | u32::from(options) << 8
            | u32::from(scale) << 16;
        [e0, me0, w0, a0, e1, me1, w1, a1, seq, ack, end, packed, fixed, progress, noted]
    }

    /// The numbers and the state after a connection's first segment: a SYN, or one picked up in the middle.
    pub(crate) fn open(
        segment: &Observed,
        settings: &TcpSettings,
        timeouts: &ByClass,
    ) -> (Self, TcpState, TimeoutClass) {
        let event = Event::of(segment.tcp_flags);
        let last = Last {
            seq: 0,
            ack: 0,
            end: 0,
            window: 0,
            retransmissions: 0,
            event: Event::Nothing,
            direction: Direction::Original,
        };
        let mut tcp = Self { sides: [Side::default(); 2], last, noted: Noted::default(), anew: [true; 2] };
        tcp.sides[0].begin(segment);
        let state = if event == Event::Syn {
            SynSent
        } else {
            tcp.sides[0].max_end = tcp.sides[0].end.wrapping_add(tcp.sides[0].max_win);
            tcp.sides[0].options = UNDERSTANDS_SACK | LIBERAL;
            tcp.sides[1].options = UNDERSTANDS_SACK | LIBERAL;
            Established
        };
        let place = tcp.place(state, Direction::Original, event, segment, false);
        debug_assert_eq!(place, Place::Inside, "what opens a connection");
        tcp.note(event, Direction::Original);
        let timeout = tcp.timeout(state, event, false, settings, timeouts);
        (tcp, state, timeout)
    }

    /// What `segment` does to a connection. `self` is to be stored if it is accepted or ignored.
    #[inline(always)]
    pub(crate) fn step(
        &mut self,
        standing: Standing,
        direction: Direction,
        segment: &Observed,
        settings: &TcpSettings,
        timeouts: &ByClass,
    ) -> Step<TcpState> {
        if !segment.flags_possible() {
            return Step::Invalid;
        }
        let event = Event::of(segment.tcp_flags);
        let (from, mut to) = match next(direction, event, standing.state) {
            Next::Invalid => return Step::Invalid,
            Next::Reopen => return Step::NewFlow,
            Next::To(state) => (standing.state, state),
            Next::Ignore if self.agrees_with_ignored_syn(direction, event, segment) => {
                self.begin_again(direction);
                (SynSent, SynRecv)
            }
            Next::Ignore => {
                self.note_ignored(standing.state, direction, event, segment);
                return Step::Ignore;
            }
        };
        let mut anywhere = false;
        match to {
            SynSent2 => self.noted.simultaneous = true,
            SynRecv if event == Event::Ack && direction == Direction::Reply && self.noted.simultaneous => {
                to = Established;
            }
            TimeWait if from == LastAck && self.is_challenge_ack(direction, event) => {
                self.noted.challenge_expected = false;
                return Step::Ignore;
            }
            Close if event == Event::Rst => match self.judge_rst(standing, direction, segment, settings) {
                Rst::Counts => {}
                Rst::CountsAnywhere => anywhere = true,
                Rst::Challenged => to = from,
                Rst::Behind => return Step::Invalid,
            },
            _ => {}
        }
        if !anywhere {
            match self.place(standing.state, direction, event, segment, settings.be_liberal) {
                Place::Inside => {}
                Place::Edge => return Step::Ignore,
                Place::Outside => return Step::Invalid,
            }
        }
        self.note(event, direction);
        // Who only repeats SYNs must not keep an entry for ever, with what it was translated to.
        let is_repeated_syn = event == Event::Syn && from == SynSent && !standing.seen_reply;
        let timeout = self.timeout(to, event, standing.seen_reply, settings, timeouts);
        let proves = standing.seen_reply && matches!(from, SynRecv | Established) && to == Established;
        Step::Accept { state: to, timeout: (!is_repeated_syn).then_some(timeout), assured: standing.assured || proves }
    }

    /// Whether the segment is the SYN-ACK of a SYN that was ignored: both ends agree on a new connection, and only
    /// this observer did not know.
    fn agrees_with_ignored_syn(&self, direction: Direction, event: Event, segment: &Observed) -> bool {
        event == Event::SynAck
            && self.last.event == Event::Syn
            && self.last.direction != direction
            && segment.tcp_ack == self.last.end
    }

    /// The side that has sent the ignored SYN begins with it; the other, whose SYN-ACK comes from `direction`, is as if
    /// it had never been heard.
    fn begin_again(&mut self, direction: Direction) {
        let liberal = self.sides[direction as usize].options & LIBERAL;
        self.sides[direction as usize] = Side { options: liberal, ..Side::default() };
        self.sides[direction.flip() as usize] = Side {
            end: self.last.end,
            max_end: self.last.end,
            max_win: u32::from(self.last.window).max(1),
            max_ack: 0,
            scale: self.noted.scale,
            options: self.noted.options,
            progress: 0,
        };
        self.noted.challenge_expected = false;
        self.anew = [true; 2];
    }

    fn note(&mut self, event: Event, direction: Direction) {
        self.last.event = event;
        self.last.direction = direction;
    }

    fn note_ignored(&mut self, from: TcpState, direction: Direction, event: Event, segment: &Observed) {
        self.last = Last {
            seq: segment.tcp_seq,
            end: segment.tcp_end(),
            window: segment.tcp_window,
            event,
            direction,
            ..self.last
        };
        match (event, direction, from) {
            (Event::Syn, Direction::Original, _) => {
                let mut side = Side::default();
                side.begin(segment);
                self.noted = Noted {
                    simultaneous: false,
                    challenge_expected: from == LastAck,
                    options: side.options,
                    scale: side.scale,
                };
            }
            // A RST that answers it will have this number.
            (Event::Ack, Direction::Reply, SynSent) => self.last.ack = segment.tcp_ack,
            _ => {}
        }
    }

    fn is_challenge_ack(&self, direction: Direction, event: Event) -> bool {
        event == Event::Ack
            && self.last.direction != direction
            && self.last.event == Event::Syn
            && self.noted.challenge_expected
    }

    fn judge_rst(
        &self,
        Standing { state, seen_reply, assured }: Standing,
        direction: Direction,
        segment: &Observed,
        settings: &TcpSettings,
    ) -> Rst {
        // The ends may have gone on to another connection already.
        if state.is_ending() {
            return Rst::CountsAnywhere;
        }
        let (last, other) = (&self.last, &self.sides[direction.flip() as usize]);
        let answers_ignored = (seen_reply && last.event == Event::Syn || !assured && last.event == Event::Ack)
            && last.direction != direction
            && segment.tcp_ack == last.end;
        let mut worth = Rst::Counts;
        // One that answers a SYN that was let through is numbered by another connection. Nothing else is: anybody may send a SYN.
        let answers_syn = answers_ignored && last.event == Event::Syn;
        if other.progress & ACK_KNOWN != 0 && !answers_syn {
            let established = state == Established && assured;
            // A RST without ACK is numbered by what it answers; 0 answers a SYN (RFC 9293 section 3.10.7.1).
            if segment.tcp_seq == 0 && !established {
                return Rst::Counts;
            }
            if is_before(segment.tcp_seq, other.max_ack) && !settings.ignore_invalid_rst {
                return Rst::Behind;
            }
            let behind_data = last.event == Event::Ack && last.direction == direction && segment.tcp_seq == last.end;
            if !established || segment.tcp_seq == other.max_ack || behind_data {
                return Rst::Counts;
            }
            worth = Rst::Challenged;
        }
        let answers_challenge = state == SynSent
            && last.event == Event::Ack
            && last.direction == Direction::Reply
            && segment.tcp_seq == last.ack;
        match worth {
            Rst::Counts if answers_ignored || answers_challenge => Rst::CountsAnywhere,
            worth => worth,
        }
    }

    /// Where the segment is, and moves the windows where it is inside. `state` is the connection's before.
    #[inline(always)]
    fn place(
        &mut self,
        state: TcpState,
        direction: Direction,
        event: Event,
        segment: &Observed,
        be_liberal: bool,
    ) -> Place {
        let (sending, receiving) = (direction as usize, direction.flip() as usize);
        let (mut sender, mut receiver) = (self.sides[sending], self.sides[receiving]);
        let (is_syn, has_ack) = (segment.tcp_flags & SYN != 0, segment.tcp_flags & ACK != 0);
        let (mut seq, mut end) = (segment.tcp_seq, segment.tcp_end());
        let mut ack = segment.tcp_ack;
        let mut sack = match segment.tcp_options.sack {
            Some(sack) if receiver.options & UNDERSTANDS_SACK != 0 => sack,
            _ => ack,
        };
        let window = u32::from(segment.tcp_window);

        if sender.max_win == 0 && !is_syn {
            // Its beginning was not seen: it is taken for where it is now.
            sender.end = end;
            sender.max_win = (window << sender.scale).max(1);
            sender.max_end = end.wrapping_add(sender.max_win);
            self.anew[sending] = true;
            if sack == receiver.end.wrapping_add(1) {
                // It probably answers a keepalive, which was one behind.
                receiver.end = sack;
            }
        } else if sender.max_win == 0 || is_syn && is_before(sender.end, end) && matches!(state, SynSent | SynRecv) {
            // A SYN, or one repeated with other numbers.
            let first = sender.max_win == 0;
            sender.begin(segment);
            self.anew[sending] = true;
            let both_scale = sender.options & receiver.options & SCALES != 0;
            if direction == Direction::Reply && !both_scale {
                (sender.scale, receiver.scale) = (0, 0);
            }
            // Simultaneous open: there is nothing yet that it could be compared with.
            if !has_ack && (first || direction == Direction::Reply) {
                self.sides[sending] = sender;
                self.sides[receiving] = receiver;
                return Place::Inside;
            }
        }

        let zero_ack_in_rst = event == Event::Rst && ack == 0;
        if !has_ack || zero_ack_in_rst {
            (ack, sack) = (receiver.end, receiver.end);
        }
        if event == Event::Rst && seq == 0 && state == SynSent {
            (seq, end) = (sender.end, sender.end);
        }
        let oldest_end = sender.end.wrapping_sub(receiver.max_win);
        let oldest_ack = receiver.end.wrapping_sub(sender.max_win.max(MIN_ACK_WINDOW));
        let is_beyond = is_before(sender.max_end, seq);
        let acknowledges_unsent = is_before(receiver.end, sack);
        let is_late = receiver.max_win != 0 && is_before(end, oldest_end) || is_before(sack, oldest_ack);
        if is_beyond || acknowledges_unsent || is_late {
            let excess = end.wrapping_sub(sender.max_end).wrapping_add(1);
            let is_overshoot = is_beyond && excess <= receiver.max_win && !acknowledges_unsent && !is_late;
            if is_overshoot {
                if is_before(sender.end, end) {
                    sender.end = end;
                }
                sender.progress |= UNACKNOWLEDGED;
            }
            let is_liberal = be_liberal || sender.options & LIBERAL != 0;
            if is_overshoot || is_liberal {
                self.sides[sending] = sender;
                self.sides[receiving] = receiver;
            }
            return match () {
                () if is_liberal => Place::Inside,
                () if is_overshoot || !is_beyond && !acknowledges_unsent => Place::Edge,
                () => Place::Outside,
            };
        }

        let window = if is_syn { window } else { window << sender.scale };
        sender.max_win = sender.max_win.max(window.wrapping_add(sack.wrapping_sub(ack)));
        if is_before(sender.end, end) {
            sender.end = end;
            sender.progress |= UNACKNOWLEDGED;
        }
        if has_ack && (sender.progress & ACK_KNOWN == 0 || is_before(sender.max_ack, ack)) {
            sender.max_ack = ack;
            sender.progress |= ACK_KNOWN;
        }
        if receiver.max_win != 0 && is_before(sender.max_end, end) {
            receiver.max_win = receiver.max_win.saturating_add(end.wrapping_sub(sender.max_end));
        }
        let offered = sack.wrapping_add(window);
        if !is_before(offered, receiver.max_end) {
            // A closed window may be probed with one byte.
            receiver.max_end = if window == 0 { offered.wrapping_add(1) } else { offered };
        }
        if ack == receiver.end {
            receiver.progress &= !UNACKNOWLEDGED;
        }
        self.sides[sending] = sender;
        self.sides[receiving] = receiver;

        if event == Event::Ack {
            let window = segment.tcp_window;
            let again = Last { direction, seq, ack, end, window, ..self.last };
            let retransmissions = if again == self.last { self.last.retransmissions.saturating_add(1) } else { 0 };
            self.last = Last { retransmissions, ..again };
        }
        Place::Inside
    }

    /// How long the connection lives from now on.
    #[inline(always)]
    fn timeout(
        &self,
        state: TcpState,
        event: Event,
        seen_reply: bool,
        settings: &TcpSettings,
        timeouts: &ByClass,
    ) -> TimeoutClass {
        let is_unacknowledged = self.sides.iter().any(|side| side.progress & UNACKNOWLEDGED != 0);
        timeout(state, event, seen_reply, is_unacknowledged, &self.last, settings, timeouts)
    }
}

/// How long a connection lives after an event that has brought it to that state. `is_unacknowledged`: a side has sent what the other has not
/// acknowledged yet.
#[inline(always)]
fn timeout(
    state: TcpState,
    event: Event,
    seen_reply: bool,
    is_unacknowledged: bool,
    last: &Last,
    settings: &TcpSettings,
    timeouts: &ByClass,
) -> TimeoutClass {
    // The only answer to a first packet is a refusal: there never was a connection.
    if event == Event::Rst && !seen_reply {
        return TimeoutClass::Ended;
    }
    let shorter = |limit: TimeoutClass, class: TimeoutClass| timeouts.of(limit) < timeouts.of(class);
    let usual = state.timeout_class();
    let is_stuck = last.retransmissions >= settings.max_retransmissions;
    let timeout = if is_stuck && shorter(TimeoutClass::TcpMaxRetrans, usual) {
        TimeoutClass::TcpMaxRetrans
    } else if event == Event::Rst {
        TimeoutClass::TcpClose
    } else if is_unacknowledged && shorter(TimeoutClass::TcpUnacknowledged, usual) {
        TimeoutClass::TcpUnacknowledged
    } else if last.window == 0 && shorter(TimeoutClass::TcpMaxRetrans, usual) {
        TimeoutClass::TcpMaxRetrans
    } else {
        usual
    };
    // Picked up in the middle: until the other side has been heard, five days would be too long.
    if state == Established && !seen_reply && shorter(TimeoutClass::TcpUnacknowledged, timeout) {
        return TimeoutClass::TcpUnacknowledged;
    }
    timeout
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::cell::Cell;

    use proptest::{
        prelude::*,
        test_runner::{Config, TestRunner},
    };
    use weir_packet::options::TcpOptions;

    use super::*;
    use crate::Timeouts;

    /// What an established connection knows, the next segment, and by what it is judged.
    #[derive(Clone, Copy, Debug)]
    struct Case {
        tcp: Tcp,
        direction: Direction,
        segment: Observed,
        settings: TcpSettings,
        timeouts: Timeouts,
    }

    /// How far from where it would be in a quiet connection a number is.
    fn distance() -> impl Strategy<Value = u32> {
        prop_oneof![
            30 => Just(0i32),
            10 => -1500..=0,
            8 => -2..=2,
            4 => -70_000..=70_000,
            1 => any::<i32>(),
            1 => i32::MIN..=i32::MIN + 2,
            1 => i32::MAX - 2..=i32::MAX,
        ]
        .prop_map(|distance| distance as u32)
    }

    fn direction() -> impl Strategy<Value = Direction> {
        prop_oneof![Just(Direction::Original), Just(Direction::Reply)]
    }

    /// The side that has sent up to about `end`, and acknowledged the other up to about `ack`.
    fn side(end: u32, ack: u32) -> impl Strategy<Value = Side> {
        let max_win = prop_oneof![1 => Just(0), 1 => 1..3u32, 8 => 1..100_000u32, 1 => any::<u32>()];
        let offered = prop_oneof![4 => 0..70_000u32, 1 => distance()];
        let scale = prop_oneof![3 => Just(0), 2 => 0..16u8];
        let progress = prop_oneof![6 => Just(ACK_KNOWN), 4 => Just(ACK_KNOWN | UNACKNOWLEDGED), 1 => 0..4u8];
        (distance(), offered, max_win, distance(), scale, 0..8u8, progress).prop_map(
            move |(end_distance, offered, max_win, ack_distance, scale, options, progress)| {
                let end = end.wrapping_add(end_distance);
                let (max_end, max_ack) = (end.wrapping_add(offered), ack.wrapping_add(ack_distance));
                Side { end, max_end, max_win, max_ack, scale, options, progress }
            },
        )
    }

    fn segment(end: u32, ack: u32) -> impl Strategy<Value = Observed> {
        let flags = prop_oneof![12 => Just(ACK), 4 => Just(ACK | 0x08), 1 => Just(ACK | 0xe8), 3 => any::<u8>()];
        let window = prop_oneof![1 => Just(0), 2 => 1..3u16, 9 => any::<u16>()];
        let payload = prop_oneof![4 => Just(0), 8 => 0..1500u32, 2 => 0..70_000u32, 1 => any::<u32>()];
        let sack = prop_oneof![7 => Just(None), 1 => distance().prop_map(Some)];
        let options = (prop::option::weighted(0.1, 0..15u8), prop::bool::weighted(0.1), sack);
        (flags, distance(), distance(), window, payload, options).prop_map(
            move |(tcp_flags, seq, ack_distance, tcp_window, payload_bytes, (window_scale, sack_permitted, sack))| {
                let tcp_ack = ack.wrapping_add(ack_distance);
                let sack = sack.map(|distance| tcp_ack.wrapping_add(distance));
                Observed {
                    tcp_flags,
                    tcp_seq: end.wrapping_add(seq),
                    tcp_ack,
                    tcp_window,
                    payload_bytes,
                    tcp_options: TcpOptions { window_scale, sack_permitted, sack },
                    ..Observed::default()
                }
            },
        )
    }

    fn last(end: u32, ack: u32) -> impl Strategy<Value = Last> {
        (distance(), distance(), 0..1500u32, any::<u16>(), 0..5u8, 0..6u32, direction()).prop_map(
            move |(seq, ack_distance, bytes, window, retransmissions, event, direction)| {
                let seq = end.wrapping_add(seq);
                let ack = ack.wrapping_add(ack_distance);
                let event = Event::from_number(event);
                Last { seq, ack, end: seq.wrapping_add(bytes), window, retransmissions, event, direction }
            },
        )
    }

    /// Perhaps the segment before is the very segment, or one that differs from it in one part.
    fn like_last() -> impl Strategy<Value = Option<u8>> {
        prop_oneof![3 => Just(None), 1 => (0..12u8).prop_map(Some)]
    }

    /// Perhaps what is offered now is so far from what was, which may be half of sequence space.
    fn offered() -> impl Strategy<Value = Option<u32>> {
        prop_oneof![7 => Just(None), 1 => distance().prop_map(Some)]
    }

    fn case() -> impl Strategy<Value = Case> {
        let ends = (any::<u32>(), any::<u32>(), direction());
        let noted = (any::<bool>(), any::<bool>(), 0..4u8, 0..15u8).prop_map(
            |(simultaneous, challenge_expected, options, scale)| Noted {
                simultaneous,
                challenge_expected,
                options,
                scale,
            },
        );
        let settings =
            (any::<bool>(), any::<bool>(), 0..4u8).prop_map(|(be_liberal, ignore_invalid_rst, max_retransmissions)| {
                TcpSettings { be_liberal, ignore_invalid_rst, max_retransmissions }
            });
        let seconds = || prop_oneof![Just(0), 1..4u32, Just(300)];
        let timeouts = (seconds(), seconds(), seconds(), any::<bool>()).prop_map(
            |(tcp_established, tcp_unacknowledged, tcp_max_retrans, is_default)| match is_default {
                true => Timeouts::default(),
                false => Timeouts { tcp_established, tcp_unacknowledged, tcp_max_retrans, ..Timeouts::default() },
            },
        );
        (ends, noted, settings, timeouts, (like_last(), offered())).prop_flat_map(
            |((original, reply, direction), noted, settings, timeouts, (like_last, offered))| {
                let (end, ack) = match direction {
                    Direction::Original => (original, reply),
                    Direction::Reply => (reply, original),
                };
                let sides = (side(original, reply), side(reply, original));
                (sides, segment(end, ack), last(end, ack)).prop_map(move |(sides, segment, mut last)| {
                    let mut sides = <[Side; 2]>::from(sides);
                    if let Some(distance) = offered {
                        let window = u32::from(segment.tcp_window) << sides[direction as usize].scale;
                        let offers = segment.tcp_ack.wrapping_add(window);
                        sides[direction.flip() as usize].max_end = offers.wrapping_add(distance);
                    }
                    if let Some(but) = like_last {
                        last.seq = segment.tcp_seq.wrapping_add((but == 0).into());
                        last.ack = segment.tcp_ack.wrapping_add((but == 1).into());
                        last.end = segment.tcp_end().wrapping_add((but == 2).into());
                        last.window = segment.tcp_window.wrapping_add((but == 3).into());
                        last.direction = if but == 4 { direction.flip() } else { direction };
                    }
                    let tcp = Tcp { sides, last, noted, anew: [false; 2] };
                    Case { tcp, direction, segment, settings, timeouts }
                })
            },
        )
    }

    /// The list of this file's opening comment.
    fn is_ordinary(Case { tcp, direction, segment, .. }: &Case) -> bool {
        let (sender, receiver) = (&tcp.sides[*direction as usize], &tcp.sides[direction.flip() as usize]);
        let (seq, ack, end) = (segment.tcp_seq, segment.tcp_ack, segment.tcp_end());
        let has = |flag| segment.tcp_flags & flag != 0;
        let is_plain = has(ACK) && !has(SYN) && !has(FIN) && !has(RST) && segment.tcp_options.sack.is_none();
        let is_known = sender.max_win != 0 && receiver.max_win != 0 && sender.progress & ACK_KNOWN != 0;
        let latest_ack = receiver.end.wrapping_sub(sender.max_win.max(MIN_ACK_WINDOW));
        let is_inside = !is_before(sender.max_end, seq)
            && !is_before(receiver.end, ack)
            && !is_before(end, sender.end.wrapping_sub(receiver.max_win))
            && !is_before(ack, latest_ack);
        let last = &tcp.last;
        let is_again = (last.seq, last.ack, last.end, last.window, last.direction)
            == (seq, ack, end, segment.tcp_window, *direction);
        is_plain && segment.tcp_window != 0 && is_known && is_inside && !is_before(sender.max_end, end) && !is_again
    }

    const OFFLOAD_SLOT: u32 = 0xfeed_beef;

    fn line_of(tcp: &Tcp) -> TcpLine {
        let line = TcpLine::default();
        line.fill(tcp);
        line.offload_slot().store(OFFLOAD_SLOT, Ordering::Relaxed);
        line
    }

    fn words_of(line: &TcpLine) -> [u32; 16] {
        std::array::from_fn(|index| line.words[index].load(Ordering::Relaxed))
    }

    /// Whether the segment was followed in place: then as [`Tcp::step`] does, word for word; else nothing was written.
    fn follow_both_ways(case: &Case) -> Result<bool, TestCaseError> {
        let Case { tcp, direction, ref segment, ref settings, timeouts } = *case;
        let timeouts = timeouts.by_class();
        let before = words_of(&line_of(&tcp));

        let stepped = line_of(&tcp);
        let (mut loaded, words) = stepped.load();
        prop_assert_eq!(loaded, tcp, "what is generated is what a line can hold");
        let standing = Standing { state: Established, seen_reply: true, assured: true };
        let step = loaded.step(standing, direction, segment, settings, &timeouts);
        stepped.store(&loaded, &words);

        let line = line_of(&tcp);
        let entered = Cell::new(None);
        let enter = |class| {
            assert_eq!(words_of(&line), before, "nothing is moved before");
            entered.replace(Some(class)).is_none()
        };
        let followed = line.follow_ordinary(direction, segment, settings, &timeouts, enter);
        prop_assert_eq!(followed, is_ordinary(case));
        prop_assert_eq!(followed, entered.get().is_some());
        if followed {
            prop_assert_eq!(step, Step::Accept { state: Established, timeout: entered.get(), assured: true });
            prop_assert_eq!(words_of(&line), words_of(&stepped));
        } else {
            prop_assert_eq!(words_of(&line), before);
        }

        let refused = line_of(&tcp);
        prop_assert!(!refused.follow_ordinary(direction, segment, settings, &timeouts, |_| false));
        prop_assert_eq!(words_of(&refused), before);
        Ok(followed)
    }

    #[test]
    fn an_ordinary_segment_moves_what_a_step_moves() {
        let cases = if cfg!(miri) { 30 } else { 20_000 };
        let (followed, all) = (Cell::new(0), Cell::new(0));
        let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
        let result = runner.run(&case(), |case| {
            all.set(all.get() + 1);
            followed.set(followed.get() + u32::from(follow_both_ways(&case)?));
            Ok(())
        });
        result.unwrap_or_else(|failure| panic!("{failure}"));
        println!("{} of {} cases were ordinary", followed.get(), all.get());
        assert!(cfg!(miri) || followed.get() > all.get() / 10, "as a property of refusals it says little");
    }
}
