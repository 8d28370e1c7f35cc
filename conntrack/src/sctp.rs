//! SCTP's states, followed from the middle.
//!
//! As with TCP ([`crate::tcp`]), one state stands for both sides, under netfilter's names: RFC 9260's association, as far
//! as its chunks tell.
//!
//! | state | the observer has seen |
//! |---|---|
//! | CLOSED | an INIT; or what ends an association: ABORT, SHUTDOWN COMPLETE (RFC 9260, 9) |
//! | COOKIE_WAIT | the INIT ACK (5.1) |
//! | COOKIE_ECHOED | the COOKIE ECHO |
//! | ESTABLISHED | the COOKIE ACK |
//! | SHUTDOWN_SENT, SHUTDOWN_RECD | a SHUTDOWN of the original side, of the replying side (9.2) |
//! | SHUTDOWN_ACK_SENT | the SHUTDOWN ACK |
//! | HEARTBEAT_SENT | a HEARTBEAT first: a further path of an association that began elsewhere (5.4) |
//!
//! What stands for TCP's windows is the *verification tag* (8.5): each side chooses one and tells it in its INIT or INIT
//! ACK; each packet to it carries it. Who does not see an association's packets does not know it, so that a packet with
//! another tag is invalid: nobody else can abort or hold what goes on. The chunks to which section 8.5.1 gives other rules
//! have them here.
//!
//! # Where this differs from netfilter
//! - An INIT on an association that is over opens a new connection, which is judged anew; netfilter goes on with the entry.
//! - An invalid packet changes nothing, also where chunks before the one that makes it invalid are in order.
//! - A packet of more than [`MAX_CHUNKS`](crate::sctp_packet::MAX_CHUNKS) chunks, or [`MAX_EVENTS`](crate::sctp_packet::MAX_EVENTS) of those that matter, is invalid; no stack sends one.
//!   A chunk that is shorter than its own header is, too.
//!
//! # Two workers at once
//! Tags and flags are relaxed atomics, stored after the state word was changed by compare-and-swap. A tag changes with
//! INIT, INIT ACK, and the first HEARTBEAT of a path, before which the other side does not send: a packet that comes
//! between is an old one.

use weir_packet::Direction;
use weir_sync::atomic::Ordering;

use crate::{
    sctp_packet::{Event, SctpPacket},
    tcp::{Step, TcpLine},
    timeouts::TimeoutClass,
};

/// An SCTP association's state, under netfilter's names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum SctpState {
    /// An INIT was seen, or the end.
    Closed = 1,
    /// The INIT was answered.
    CookieWait = 2,
    /// The cookie was echoed.
    CookieEchoed = 3,
    /// The cookie was acknowledged.
    Established = 4,
    /// The original side shuts down.
    ShutdownSent = 5,
    /// The replying side shuts down.
    ShutdownRecd = 6,
    /// The shutdown was acknowledged.
    ShutdownAckSent = 7,
    /// Only a heartbeat was seen.
    HeartbeatSent = 8,
}

use SctpState::{
    Closed, CookieEchoed, CookieWait, Established, HeartbeatSent, ShutdownAckSent, ShutdownRecd, ShutdownSent,
};

impl SctpState {
    /// Every state.
    pub const ALL: [Self; 8] =
        [Closed, CookieWait, CookieEchoed, Established, ShutdownSent, ShutdownRecd, ShutdownAckSent, HeartbeatSent];

    /// netfilter's name, as `conntrack -L` prints it.
    pub const fn name(self) -> &'static str {
        match self {
            Closed => "CLOSED",
            CookieWait => "COOKIE_WAIT",
            CookieEchoed => "COOKIE_ECHOED",
            Established => "ESTABLISHED",
            ShutdownSent => "SHUTDOWN_SENT",
            ShutdownRecd => "SHUTDOWN_RECD",
            ShutdownAckSent => "SHUTDOWN_ACK_SENT",
            HeartbeatSent => "HEARTBEAT_SENT",
        }
    }

    #[inline]
    pub(crate) const fn from_number(number: u8) -> Option<Self> {
        match number {
            1..=8 => Some(Self::ALL[number as usize - 1]),
            _ => None,
        }
    }

    pub(crate) const fn timeout_class(self) -> TimeoutClass {
        match self {
            Closed => TimeoutClass::SctpClosed,
            CookieWait => TimeoutClass::SctpCookieWait,
            CookieEchoed => TimeoutClass::SctpCookieEchoed,
            Established => TimeoutClass::SctpEstablished,
            ShutdownSent => TimeoutClass::SctpShutdownSent,
            ShutdownRecd => TimeoutClass::SctpShutdownRecd,
            ShutdownAckSent => TimeoutClass::SctpShutdownAckSent,
            HeartbeatSent => TimeoutClass::SctpHeartbeatSent,
        }
    }
}

/// The tags of an association.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Sctp {
    /// By direction: the tag of the packets that go that way; 0 while it is not known.
    tags: [u32; 2],
    /// By direction: an INIT came from there, and no COOKIE ACK since.
    offers: [bool; 2],
    /// The direction of a HEARTBEAT whose tag was another one: the answer to it may show that the tags have changed.
    doubtful: Option<Direction>,
    /// An ABORT or SHUTDOWN COMPLETE was seen.
    is_over: bool,
}

impl Sctp {
    const WORDS: usize = 3;

    fn words(&self) -> [u32; Self::WORDS] {
        let doubtful = self.doubtful.map_or(0, |direction| 1 + direction as u32);
        let offers = u32::from(self.offers[0]) | u32::from(self.offers[1]) << 1;
        [self.tags[0], self.tags[1], doubtful | offers << 2 | u32::from(self.is_over) << 4]
    }

    pub(crate) fn load(line: &TcpLine) -> Self {
        let [original, reply, flags] = std::array::from_fn(|index| line.words[index].load(Ordering::Relaxed));
        let doubtful = match flags & 3 {
            1 => Some(Direction::Original),
            2 => Some(Direction::Reply),
            _ => None,
        };
        let bit = |number: u32| flags >> number & 1 != 0;
        Self { tags: [original, reply], offers: [bit(2), bit(3)], doubtful, is_over: bit(4) }
    }

    /// Stores everything, of a connection that nobody else knows yet.
    pub(crate) fn fill(&self, line: &TcpLine) {
        line.words.iter().zip(self.words()).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
    }

    /// Stores what differs from `before`.
    pub(crate) fn store(&self, before: &Self, line: &TcpLine) {
        for ((word, new), old) in line.words.iter().zip(self.words()).zip(before.words()) {
            if new != old {
                word.store(new, Ordering::Relaxed);
            }
        }
    }

    /// The tags and the state after an association's first packet, if it can be one.
    pub(crate) fn open(packet: &SctpPacket) -> Option<(Self, SctpState)> {
        // What belongs to an association that is known, and what nobody answers (RFC 9260, 8.4).
        let is_later = |event| matches!(event, Event::Abort { .. } | Event::ShutdownComplete { .. } | Event::CookieAck);
        if packet.has_others || packet.has(is_later) {
            return None;
        }
        let mut sctp = Self::default();
        for event in packet.events() {
            match event {
                Event::Init => sctp.tags[Direction::Reply as usize] = packet.initiate_tag,
                Event::Heartbeat => sctp.tags[Direction::Original as usize] = packet.tag,
                // Out of the blue: the SHUTDOWN COMPLETE or ABORT that answers it returns its tag (RFC 9260, 8.4).
                Event::ShutdownAck => sctp.tags[Direction::Reply as usize] = packet.tag,
                _ => {}
            }
        }
        match sctp.step(None, false, Direction::Original, packet) {
            Step::Accept { state, .. } => Some((sctp, state)),
            _ => None,
        }
    }

    /// Whether `packet` is an INIT that opens an association again with the keys of this one, which is in `state`, or repeats one that is
    /// not answered.
    pub(crate) fn opens_again(&self, state: SctpState, direction: Direction, packet: &SctpPacket) -> bool {
        packet.is_init() && state == Closed && (self.is_over || direction == Direction::Original)
    }

    /// What `packet` does to an association in `state`; `None` before the first. `self` is to be stored if it is accepted.
    pub(crate) fn step(
        &mut self,
        state: Option<SctpState>,
        assured: bool,
        direction: Direction,
        packet: &SctpPacket,
    ) -> Step<SctpState> {
        if !packet.is_valid {
            return Step::Invalid;
        }
        let (here, there) = (direction as usize, direction.flip() as usize);
        let has_own_rule = |event| !matches!(event, Event::InitAck | Event::Shutdown | Event::Error | Event::CookieAck);
        if !packet.has(has_own_rule) && packet.tag != self.tags[here] {
            return Step::Invalid;
        }
        let (mut current, mut is_renewed, mut is_assured) = (state, true, assured);
        for event in packet.events() {
            let is_tag_right = match event {
                Event::Init if packet.tag == 0 && self.is_over && current == Some(Closed) => return Step::NewFlow,
                Event::Init => packet.tag == 0,
                // Both sides have begun (RFC 9260, 5.2): an INIT ACK that was held up must not replace the tag that they
                // have agreed on meanwhile.
                Event::InitAck => {
                    let is_new = self.tags[there] != packet.initiate_tag;
                    let is_unasked = !self.offers[there] && self.tags[there] != 0;
                    !(is_new && (is_unasked || self.offers == [true; 2]))
                }
                Event::Abort { returns_tag } | Event::ShutdownComplete { returns_tag } => {
                    packet.tag == self.tags[if returns_tag { there } else { here }]
                }
                Event::CookieEcho => packet.tag == self.tags[here],
                Event::Heartbeat | Event::HeartbeatAck if self.tags[here] == 0 => {
                    self.tags[here] = packet.tag;
                    true
                }
                Event::Heartbeat | Event::HeartbeatAck if packet.tag == self.tags[here] => {
                    self.doubtful = None;
                    true
                }
                // Perhaps a restart that was not seen, on another path: it is let through, and its answer decides.
                Event::Heartbeat if !packet.has_data && is_renewed => {
                    self.doubtful = Some(direction);
                    is_renewed = false;
                    continue;
                }
                Event::HeartbeatAck if !packet.has_data && is_renewed && self.doubtful == Some(direction.flip()) => {
                    self.doubtful = None;
                    self.tags[here] = packet.tag;
                    self.tags[there] = 0;
                    true
                }
                Event::Heartbeat | Event::HeartbeatAck => false,
                _ => true,
            };
            let Some(next) = next(direction, event, current).filter(|_| is_tag_right) else { return Step::Invalid };
            match event {
                Event::Init | Event::InitAck => {
                    // One that is repeated, or late, offers nothing.
                    if event == Event::Init && (current.is_none() || self.tags[there] != packet.initiate_tag) {
                        self.offers[there] &= !self.offers[here];
                        self.offers[here] = true;
                    }
                    self.tags[there] = packet.initiate_tag;
                    // Who only repeats INITs must not keep an entry for ever, with what it was translated to.
                    is_renewed &= (current, next) != (Some(Closed), Closed);
                }
                Event::CookieAck => self.offers = [false; 2],
                Event::Abort { .. } | Event::ShutdownComplete { .. } => self.is_over |= next == Closed,
                _ => {}
            }
            is_assured |= next == Established && current != Some(Established);
            current = Some(next);
        }
        match current {
            Some(state) => {
                Step::Accept { state, timeout: is_renewed.then(|| state.timeout_class()), assured: is_assured }
            }
            None => Step::Invalid,
        }
    }
}

/// Where a chunk leads; `None`: nowhere, it is invalid there.
const fn next(direction: Direction, event: Event, from: Option<SctpState>) -> Option<SctpState> {
    use Direction::{Original, Reply};
    Some(match (direction, event, from) {
        (Original, Event::ShutdownAck, None | Some(HeartbeatSent)) => ShutdownAckSent,
        (Original, Event::Heartbeat, None) => HeartbeatSent,
        (Original, _, None) => Closed,
        (Reply, _, None) => return None,

        (_, Event::Heartbeat, Some(HeartbeatSent)) => HeartbeatSent,
        (Original, Event::HeartbeatAck, Some(HeartbeatSent)) => HeartbeatSent,
        (Reply, Event::HeartbeatAck, Some(HeartbeatSent)) => Established,
        (Original, Event::Init, Some(HeartbeatSent)) => CookieWait,
        (Original, _, Some(HeartbeatSent)) => Closed,
        (Reply, _, Some(HeartbeatSent)) => return None,

        (_, Event::Abort { .. }, Some(_)) => Closed,
        // Between the SHUTDOWNs an INIT means that one side has begun anew (RFC 9260, 5.2.2).
        (Original, Event::Init, Some(ShutdownSent | ShutdownRecd)) => Closed,
        (Reply, Event::InitAck, Some(Closed)) => CookieWait,
        // From either side: both may have begun.
        (_, Event::CookieEcho, Some(CookieWait)) => CookieEchoed,
        (_, Event::CookieAck, Some(CookieEchoed)) => Established,
        // A stale cookie.
        (Reply, Event::Error, Some(CookieEchoed)) => Closed,
        (Original, Event::Shutdown, Some(Established)) => ShutdownSent,
        (Reply, Event::Shutdown, Some(Established)) => ShutdownRecd,
        (_, Event::ShutdownAck, Some(ShutdownSent | ShutdownRecd)) => ShutdownAckSent,
        (_, Event::ShutdownComplete { .. }, Some(ShutdownAckSent)) => Closed,
        (_, _, Some(state)) => state,
    })
}
