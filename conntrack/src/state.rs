//! The state word: all of a connection that changes as one.

use weir_packet::{Protocol, Tick};

use crate::{sctp::SctpState, tcp::TcpState, timeouts::TimeoutClass};

/// One of two bits of [`crate::Attributes::flags`] that the table knows: a connection of those for whom a share is kept. Until it is over, it is
/// removed to make room for another only where that has it too, or where the samples show nothing else.
pub const PRIVILEGED: u8 = 1 << 7;

/// The other: a connection that was handed over to somebody else ([`crate::ConnRef::offload_slot`]), who is told to give it back before it is
/// removed.
pub const OFFLOADED: u8 = 1 << 6;

/// Where a connection stands between two uses of its index. See [`crate::table`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Never used.
    Free = 0,
    /// Being filled by one thread, which alone writes it.
    Filling = 1,
    /// Both keys are in the index and may be read; not yet validated. Any thread may validate it.
    Published = 2,
    /// A connection: found by lookups.
    Live = 3,
    /// Lost its validation against another connection with one of its keys.
    Aborted = 4,
    /// Was live.
    Removed = 5,
}

/// The life of a connection, as listings show it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Lifecycle {
    /// No packet has come back yet.
    Unreplied,
    /// Packets were seen in both directions.
    Established,
    /// A TCP connection of which one side or both have sent a FIN; an SCTP association that is being shut down.
    Closing,
    /// A TCP connection (TIME_WAIT, CLOSE) or an SCTP association that is over, and whatever ended before its timeout.
    Closed,
}

impl Lifecycle {
    /// Its word in listings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unreplied => "unreplied",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Closed => "closed",
        }
    }
}

/// How gladly a connection makes way for a new one that needs its reply key.
///
/// One that is over makes way. So does one of TCP or SCTP that has not proved itself, at any age: should its answer come yet, the new
/// connection's sequence numbers (or tags) do not fit it. One of another protocol does, if nobody has answered and nobody will, which is
/// said after [`ANSWER_TICKS`] of silence: an answer that comes yet is the new connection's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Expendable {
    is_over: bool,
    idle_ticks: u32,
}

/// Who asks by datagrams has asked again, or given up, by then: resolvers after five seconds (resolv.conf(5), `timeout`).
pub const ANSWER_TICKS: u32 = (5_000_000_000 / Tick::NS) as u32;

/// One 64-bit word, changed by compare-and-swap only.
///
/// | bits | what |
/// |---|---|
/// | 0..3 | [`Phase`] |
/// | 3..8 | [`TimeoutClass`] |
/// | 8..12 | [`TcpState`] or [`SctpState`], 0 for other protocols |
/// | 12 | a reply was seen |
/// | 13 | assured: netfilter's word for a connection that has proved itself |
/// | 14..32 | tick of creation, modulo 2^18 (44 minutes): asked only while a UDP flow is young |
/// | 32..40 | flags of the dataplane |
/// | 40..48 | protocol |
/// | 48..64 | incarnation: counts the uses of the index, so that a word of an earlier use is never equal |
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct State(pub(crate) u64);

const SEEN_REPLY: u64 = 1 << 12;
const ASSURED: u64 = 1 << 13;
const CREATED_SHIFT: u32 = 14;
const CREATED_MASK: u32 = (1 << 18) - 1;
const FLAGS_SHIFT: u32 = 32;
const PROTOCOL_SHIFT: u32 = 40;
const INCARNATION_SHIFT: u32 = 48;

impl State {
    /// The first word of the next use of an index.
    pub(crate) fn filling(self, protocol: Protocol, flags: u8, now: Tick) -> Self {
        let incarnation = (self.0 >> INCARNATION_SHIFT).wrapping_add(1) << INCARNATION_SHIFT;
        Self(
            incarnation
                | u64::from(protocol.0) << PROTOCOL_SHIFT
                | u64::from(flags) << FLAGS_SHIFT
                | u64::from(now.0 & CREATED_MASK) << CREATED_SHIFT
                | Phase::Filling as u64,
        )
    }

    #[inline(always)]
    const fn with(self, shift: u32, bits: u32, value: u64) -> Self {
        let mask = ((1 << bits) - 1) << shift;
        Self(self.0 & !mask | value << shift)
    }

    #[inline(always)]
    pub(crate) const fn phase(self) -> Phase {
        match self.0 & 7 {
            0 => Phase::Free,
            1 => Phase::Filling,
            2 => Phase::Published,
            3 => Phase::Live,
            4 => Phase::Aborted,
            _ => Phase::Removed,
        }
    }

    #[inline(always)]
    pub(crate) const fn is_live(self) -> bool {
        self.0 & 7 == Phase::Live as u64
    }

    #[inline(always)]
    pub(crate) const fn in_phase(self, phase: Phase) -> Self {
        self.with(0, 3, phase as u64)
    }

    #[inline(always)]
    pub(crate) const fn timeout_class(self) -> u8 {
        (self.0 >> 3) as u8 & 0x1f
    }

    #[inline(always)]
    pub(crate) const fn in_timeout_class(self, class: TimeoutClass) -> Self {
        self.with(3, 5, class as u64)
    }

    /// Whether a connection that is idle for so long may be displaced, and how gladly.
    pub(crate) fn expendable(self, idle_ticks: u32, for_privileged: bool) -> Option<Expendable> {
        let is_over = self.lifecycle() == Lifecycle::Closed;
        let is_unproved = match self.protocol() {
            Protocol::TCP | Protocol::SCTP => !self.assured(),
            _ => !self.seen_reply() && idle_ticks >= ANSWER_TICKS,
        };
        let is_spared = self.flags() & PRIVILEGED != 0 && !for_privileged && !is_over;
        ((is_over || is_unproved) && !is_spared).then_some(Expendable { is_over, idle_ticks })
    }

    #[inline(always)]
    pub(crate) const fn tcp_state(self) -> Option<TcpState> {
        match self.protocol() {
            Protocol::TCP => TcpState::from_number((self.0 >> 8) as u8 & 0xf),
            _ => None,
        }
    }

    #[inline(always)]
    pub(crate) const fn sctp_state(self) -> Option<SctpState> {
        match self.protocol() {
            Protocol::SCTP => SctpState::from_number((self.0 >> 8) as u8 & 0xf),
            _ => None,
        }
    }

    #[inline(always)]
    pub(crate) const fn in_sctp_state(self, state: SctpState) -> Self {
        self.with(8, 4, state as u64)
    }

    #[inline(always)]
    pub(crate) const fn in_tcp_state(self, state: TcpState) -> Self {
        self.with(8, 4, state as u64)
    }

    #[inline(always)]
    pub(crate) const fn seen_reply(self) -> bool {
        self.0 & SEEN_REPLY != 0
    }

    #[inline(always)]
    pub(crate) const fn with_reply_seen(self) -> Self {
        Self(self.0 | SEEN_REPLY)
    }

    #[inline(always)]
    pub(crate) const fn assured(self) -> bool {
        self.0 & ASSURED != 0
    }

    #[inline(always)]
    pub(crate) const fn with_assured(self) -> Self {
        Self(self.0 | ASSURED)
    }

    /// Whether it is of a live TCP connection that is established, was answered and has proved itself.
    #[inline(always)]
    pub(crate) const fn is_settled_tcp(self) -> bool {
        let settled = Self(SEEN_REPLY | ASSURED).in_phase(Phase::Live).in_tcp_state(TcpState::Established).with(
            PROTOCOL_SHIFT,
            8,
            Protocol::TCP.0 as u64,
        );
        let fields = Self(SEEN_REPLY | ASSURED).with(0, 3, 7).with(8, 4, 0xf).with(PROTOCOL_SHIFT, 8, 0xff);
        self.0 & fields.0 == settled.0
    }

    /// Ticks since creation, modulo 2^18.
    #[inline(always)]
    pub(crate) const fn age(self, now: Tick) -> u32 {
        now.0.wrapping_sub((self.0 >> CREATED_SHIFT) as u32) & CREATED_MASK
    }

    #[inline(always)]
    pub(crate) const fn flags(self) -> u8 {
        (self.0 >> FLAGS_SHIFT) as u8
    }

    #[inline(always)]
    pub(crate) const fn with_flags(self, flags: u8) -> Self {
        self.with(FLAGS_SHIFT, 8, flags as u64)
    }

    #[inline(always)]
    pub(crate) const fn protocol(self) -> Protocol {
        Protocol((self.0 >> PROTOCOL_SHIFT) as u8)
    }

    /// Whether both words are of the same use of an index.
    #[inline(always)]
    pub(crate) const fn same_incarnation(self, other: Self) -> bool {
        self.0 >> INCARNATION_SHIFT == other.0 >> INCARNATION_SHIFT
    }

    /// Which use of its index the word is of.
    #[inline(always)]
    pub(crate) const fn incarnation(self) -> u16 {
        (self.0 >> INCARNATION_SHIFT) as u16
    }

    pub(crate) const fn lifecycle(self) -> Lifecycle {
        if self.timeout_class() == TimeoutClass::Ended as u8 {
            return Lifecycle::Closed;
        }
        match (self.tcp_state(), self.sctp_state()) {
            (Some(TcpState::FinWait | TcpState::CloseWait | TcpState::LastAck), _) => Lifecycle::Closing,
            (Some(TcpState::TimeWait | TcpState::Close), _) => Lifecycle::Closed,
            (_, Some(SctpState::ShutdownSent | SctpState::ShutdownRecd | SctpState::ShutdownAckSent)) => {
                Lifecycle::Closing
            }
            // An association whose INIT is not answered yet is as closed as one that was aborted.
            (_, Some(SctpState::Closed)) if self.seen_reply() => Lifecycle::Closed,
            _ if self.seen_reply() => Lifecycle::Established,
            _ => Lifecycle::Unreplied,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_overlap() {
        let first = State(u64::MAX).filling(Protocol::TCP, 0xa5, Tick(u32::MAX));
        assert_eq!((first.phase(), first.protocol(), first.flags()), (Phase::Filling, Protocol::TCP, 0xa5));
        assert_eq!((first.age(Tick(9)), first.timeout_class(), first.tcp_state()), (10, 0, None));
        assert!(!first.seen_reply() && !first.assured() && !first.same_incarnation(State(u64::MAX)));
        let last = first
            .in_phase(Phase::Live)
            .in_tcp_state(TcpState::SynSent2)
            .in_timeout_class(TimeoutClass::SctpHeartbeatSent)
            .with_flags(0x5a)
            .with_reply_seen();
        assert!(last.is_live() && last.seen_reply() && !last.assured() && last.with_assured().assured());
        assert_eq!(last.tcp_state(), Some(TcpState::SynSent2));
        assert_eq!(last.timeout_class(), TimeoutClass::SctpHeartbeatSent as u8);
        assert_eq!((last.flags(), last.protocol(), last.age(Tick(9))), (0x5a, Protocol::TCP, 10));
        assert!(last.same_incarnation(first));
        let again = last.filling(Protocol::UDP, 0, Tick(0));
        assert!(!again.same_incarnation(last) && again.tcp_state().is_none() && again.age(Tick(3)) == 3);
    }
}
