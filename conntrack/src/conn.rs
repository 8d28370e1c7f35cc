//! One connection.
//!
//! # Layout
//! A connection is one 64-byte line for IPv4 and two for IPv6. A line holds fourteen 32-bit words and, in the first,
//! the state word. The keys stand where a lookup of either direction and the attributes that every packet asks for
//! share the line with the state; IPv6 has the reply key in its second line.
//!
//! | | IPv4 | IPv6 |
//! |---|---|---|
//! | original key: source, destination, ports | words 0..3 | words 0..9 |
//! | reply key | words 3..6 | words 14..23 |
//! | last seen, device, generation, next hops | words 6..11 | words 9..14 |
//! | stamps | words 11..14 | words 23..26 |
//!
//! Keys are written before a connection is published and then stay; the protocol is in the state word. Attributes are
//! relaxed atomics: each is a value of its own, and none says anything about another.

use std::{
    hash::{BuildHasher, RandomState},
    marker::PhantomData,
};

use weir_packet::{Address, Direction, FlowKey, Ports, Protocol, Tick};
use weir_sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::{
    observed::{Observed, Tracked},
    sctp::{Sctp, SctpState},
    state::{Expendable, Lifecycle, OFFLOADED, State},
    storage::{self, Zeroable},
    tcp::{self, Standing, Step, TcpLine, TcpSettings, TcpState, Windows},
    timeouts::{ByClass, TimeoutClass},
};

/// Words of a line.
const LINE_WORDS: usize = 14;

/// 64 bytes of a connection.
#[derive(Default)]
#[repr(C, align(64))]
pub(crate) struct Line {
    words: [AtomicU32; LINE_WORDS],
    pub(crate) state: AtomicU64,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Line>() == 64 && align_of::<Line>() == 64);

// SAFETY: atomic integers only.
unsafe impl Zeroable for Line {}

/// Attributes, in the order in which they are laid out.
#[derive(Clone, Copy)]
enum Field {
    LastSeen = 0,
    Device = 1,
    Generation = 2,
    NextHops = 3,
    Stamps = 5,
}
/// Attributes up to the stamps.
const HOT: usize = Field::Stamps as usize;

/// What the dataplane keeps with a connection; the table gives it no meaning but to two flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Attributes {
    /// The device that the first packet came from.
    pub device: u32,
    /// Stamps of what judged the connection: source, destination, backend.
    pub stamps: [u32; 3],
    /// The generation of the snapshot that the connection was last judged by.
    pub generation: u32,
    /// Next hops, by direction.
    pub next_hops: [u32; 2],
    /// Bits of the dataplane's choice, but for [`crate::PRIVILEGED`] and [`crate::OFFLOADED`].
    pub flags: u8,
}

/// The lines of one connection.
pub(crate) struct Lines<'t, A> {
    lines: &'t [Line],
    family: PhantomData<A>,
}

impl<A> Clone for Lines<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for Lines<'_, A> {}

impl<'t, A: Address> Lines<'t, A> {
    /// Lines of a connection: 1 for IPv4, 2 for IPv6.
    pub(crate) const COUNT: usize = (2 * (2 * A::WORDS + 1) + HOT + 3).div_ceil(LINE_WORDS);
    /// Words of a key.
    const KEY: usize = 2 * A::WORDS + 1;
    /// Where the reply key starts.
    const REPLY: usize = if Self::COUNT == 1 { Self::KEY } else { LINE_WORDS };

    #[inline(always)]
    pub(crate) fn of(lines: &'t [Line], index: u32) -> Self {
        let start = index as usize * Self::COUNT;
        Self { lines: &lines[start..start + Self::COUNT], family: PhantomData }
    }

    #[inline(always)]
    fn word(self, at: usize) -> &'t AtomicU32 {
        &self.lines[at / LINE_WORDS].words[at % LINE_WORDS]
    }

    #[inline(always)]
    fn attribute(self, field: Field, element: usize) -> &'t AtomicU32 {
        let number = field as usize + element;
        self.word(match Self::COUNT {
            1 => 2 * Self::KEY + number,
            _ if number < HOT => Self::KEY + number,
            _ => Self::REPLY + Self::KEY + number - HOT,
        })
    }

    #[inline(always)]
    pub(crate) fn state(self) -> &'t AtomicU64 {
        &self.lines[0].state
    }

    #[inline(always)]
    pub(crate) fn last_seen(self) -> Tick {
        Tick(self.attribute(Field::LastSeen, 0).load(Ordering::Relaxed))
    }

    #[inline(always)]
    const fn key_start(direction: Direction) -> usize {
        match direction {
            Direction::Original => 0,
            Direction::Reply => Self::REPLY,
        }
    }

    /// The words of a key. All lie in one line, so that where each of them is, is known to the compiler.
    #[inline(always)]
    fn key_words(self, direction: Direction) -> &'t [AtomicU32] {
        match direction {
            Direction::Original => &self.lines[0].words[..Self::KEY],
            Direction::Reply => &self.lines[Self::REPLY / LINE_WORDS].words[Self::REPLY % LINE_WORDS..][..Self::KEY],
        }
    }

    /// Whether the key of that direction is `key`, the protocol aside.
    #[inline(always)]
    pub(crate) fn has_key(self, direction: Direction, key: &FlowKey<A>) -> bool {
        let words = self.key_words(direction);
        let (src, dst) = (key.src.words(), key.dst.words());
        let (src, dst) = (src.as_ref(), dst.as_ref());
        let mut difference = words[2 * A::WORDS].load(Ordering::Relaxed) ^ key.ports.word();
        for i in 0..A::WORDS {
            difference |= words[i].load(Ordering::Relaxed) ^ src[i];
            difference |= words[A::WORDS + i].load(Ordering::Relaxed) ^ dst[i];
        }
        difference == 0
    }

    #[inline(always)]
    pub(crate) fn key(self, direction: Direction, protocol: Protocol) -> FlowKey<A> {
        let words = self.key_words(direction);
        let ports = Ports::from_word(words[2 * A::WORDS].load(Ordering::Relaxed));
        FlowKey { src: read_address(&words[..A::WORDS]), dst: read_address(&words[A::WORDS..]), ports, protocol }
    }

    /// Writes everything but the state word. Only while nobody can find the connection.
    pub(crate) fn fill(self, keys: [&FlowKey<A>; 2], attributes: &Attributes, now: Tick) {
        for (key, direction) in keys.into_iter().zip([Direction::Original, Direction::Reply]) {
            let start = Self::key_start(direction);
            let (src, dst) = (key.src.words(), key.dst.words());
            let words = src.as_ref().iter().chain(dst.as_ref()).copied().chain([key.ports.word()]);
            words.enumerate().for_each(|(i, word)| self.word(start + i).store(word, Ordering::Relaxed));
        }
        let store = |field, element, value| self.attribute(field, element).store(value, Ordering::Relaxed);
        store(Field::LastSeen, 0, now.0);
        store(Field::Device, 0, attributes.device);
        store(Field::Generation, 0, attributes.generation);
        attributes.next_hops.into_iter().enumerate().for_each(|(i, value)| store(Field::NextHops, i, value));
        attributes.stamps.into_iter().enumerate().for_each(|(i, value)| store(Field::Stamps, i, value));
    }

    /// Copies everything but the state word, as a connection that nobody has judged: without generation, policy stamps and
    /// next hops. Only while nobody can find this one.
    pub(crate) fn fill_from(self, other: Lines<'_, A>) {
        for (line, other) in self.lines.iter().zip(other.lines) {
            for (word, other) in line.words.iter().zip(&other.words) {
                word.store(other.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
        let clear = |field, element| self.attribute(field, element).store(0, Ordering::Relaxed);
        clear(Field::Generation, 0);
        (0..2).for_each(|element| clear(Field::NextHops, element));
        (0..2).for_each(|element| clear(Field::Stamps, element));
    }

    fn attributes(self, state: State) -> Attributes {
        let load = |field, element| self.attribute(field, element).load(Ordering::Relaxed);
        Attributes {
            device: load(Field::Device, 0),
            stamps: std::array::from_fn(|i| load(Field::Stamps, i)),
            generation: load(Field::Generation, 0),
            next_hops: std::array::from_fn(|i| load(Field::NextHops, i)),
            flags: state.flags(),
        }
    }
}

/// Reads an address, whose number of words is known to the compiler.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "a row of loads without a loop, which an iterator over two slices is not"
)]
fn read_address<A: Address>(from: &[AtomicU32]) -> A {
    let mut words = A::Words::default();
    for i in 0..A::WORDS {
        words.as_mut()[i] = from[i].load(Ordering::Relaxed);
    }
    A::from_words(words)
}

/// A connection of a table. Good for the turn in which it was found: later, its index may be another's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ConnId(pub(crate) u32);

impl ConnId {
    /// A number below the table's capacity.
    #[inline]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// The connections of a table, and what they are followed by.
pub(crate) struct Conns<A> {
    lines: storage::Lines<Line>,
    tcp: storage::Lines<TcpLine>,
    settings: TcpSettings,
    timeouts: ByClass,
    /// Keys the digests of [`ConnRef::note_datagram`].
    digests: RandomState,
    family: PhantomData<A>,
}

impl<A: Address> Conns<A> {
    pub(crate) fn new(
        lines: storage::Lines<Line>,
        tcp: storage::Lines<TcpLine>,
        settings: TcpSettings,
        timeouts: ByClass,
    ) -> Self {
        Self { lines, tcp, settings, timeouts, digests: RandomState::new(), family: PhantomData }
    }

    #[inline(always)]
    pub(crate) fn prefetch(&self, index: u32, has_tcp_line: bool) {
        let first = index as usize * Lines::<A>::COUNT;
        (first..first + Lines::<A>::COUNT).for_each(|line| self.lines.prefetch(line));
        if has_tcp_line {
            self.tcp.prefetch(index as usize);
        }
    }

    #[inline(always)]
    pub(crate) fn lines(&self, index: u32) -> Lines<'_, A> {
        Lines::of(&self.lines, index)
    }

    /// A digest of something that nobody else can make.
    fn digest(&self, of: impl std::hash::Hash) -> u64 {
        self.digests.hash_one(of)
    }

    #[inline(always)]
    pub(crate) fn tcp_line(&self, index: u32) -> &TcpLine {
        &self.tcp[index as usize]
    }

    /// What a TCP segment is judged by.
    #[inline(always)]
    pub(crate) fn tcp_rules(&self) -> (&TcpSettings, &ByClass) {
        (&self.settings, &self.timeouts)
    }

    #[inline(always)]
    pub(crate) fn timeout_ticks(&self, state: State) -> u32 {
        self.timeouts.ticks(state.timeout_class())
    }

    #[inline(always)]
    pub(crate) fn is_expired(&self, state: State, lines: Lines<'_, A>, now: Tick) -> bool {
        now.since(lines.last_seen()) >= self.timeout_ticks(state)
    }
}

/// A connection of a table, in the turn in which it was looked up or inserted.
///
/// It may be removed meanwhile by another worker. Its words then stay as they are until the turn is over.
pub struct ConnRef<'t, A: Address> {
    conns: &'t Conns<A>,
    id: ConnId,
    lines: Lines<'t, A>,
}

impl<A: Address> Clone for ConnRef<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A: Address> Copy for ConnRef<'_, A> {}

impl<'t, A: Address> ConnRef<'t, A> {
    #[inline(always)]
    pub(crate) fn new(conns: &'t Conns<A>, id: ConnId) -> Self {
        Self { conns, id, lines: conns.lines(id.0) }
    }

    /// Its name in the table.
    #[inline]
    pub fn id(self) -> ConnId {
        self.id
    }

    #[inline(always)]
    fn state(self) -> State {
        State(self.lines.state().load(Ordering::Relaxed))
    }

    /// Whether it is still in the table; an expired one is until it is swept.
    #[inline]
    pub fn is_live(self) -> bool {
        self.state().is_live()
    }

    /// The key of a direction's packets as they arrive.
    #[inline]
    pub fn key(self, direction: Direction) -> FlowKey<A> {
        self.lines.key(direction, self.protocol())
    }

    /// The key of the original direction's packets as they arrive.
    #[inline]
    pub fn original(self) -> FlowKey<A> {
        self.key(Direction::Original)
    }

    /// The key of the reply direction's packets as they arrive. Inverted, it is what the original direction's packets
    /// leave with.
    #[inline]
    pub fn reply(self) -> FlowKey<A> {
        self.key(Direction::Reply)
    }

    /// The key that a direction's packets leave with: the other one, inverted. `protocol` is the connection's, one with ports: who has just
    /// compared a key knows it.
    #[inline(always)]
    pub fn leaves_with(self, direction: Direction, protocol: Protocol) -> FlowKey<A> {
        debug_assert!(protocol == self.protocol() && !protocol.is_icmp());
        let FlowKey { src, dst, ports, protocol } = self.lines.key(direction.flip(), protocol);
        FlowKey { src: dst, dst: src, ports: Ports::new(ports.destination(), ports.source()), protocol }
    }

    /// Whether it is live, has that key in that direction, and has not expired. The state word is read first, as by a lookup: what is live has keys.
    #[inline(always)]
    pub(crate) fn is_expected(self, direction: Direction, key: &FlowKey<A>, now: Tick) -> bool {
        let state = State(self.lines.state().load(Ordering::Acquire));
        state.is_live()
            && state.protocol() == key.protocol
            && self.lines.has_key(direction, key)
            && !self.conns.is_expired(state, self.lines, now)
    }

    /// Its IP protocol.
    #[inline]
    pub fn protocol(self) -> Protocol {
        self.state().protocol()
    }

    /// All attributes.
    pub fn attributes(self) -> Attributes {
        self.lines.attributes(self.state())
    }

    #[inline]
    fn get(self, field: Field, element: usize) -> u32 {
        self.lines.attribute(field, element).load(Ordering::Relaxed)
    }

    #[inline]
    fn set(self, field: Field, element: usize, value: u32) {
        self.lines.attribute(field, element).store(value, Ordering::Relaxed);
    }

    /// Whether a TCP segment with that sequence number may be on its way in a direction: what an ICMP error must be about, which anybody
    /// may send who guesses the ports (RFC 5927, 4.1). A window's worth behind the last is allowed, as errors come late. Yes, where nothing of
    /// that direction was seen.
    pub fn may_be_in_flight(self, direction: Direction, tcp_seq: u32) -> bool {
        self.conns.tcp_line(self.id.0).may_be_in_flight(direction, tcp_seq)
    }

    /// Remembers a datagram of the original direction by what it carries, so that it is known again ([`Self::is_noted`]) where somebody
    /// sends it back. Only the last few of a flow are.
    ///
    /// # Panics
    /// Where the connection's protocol has numbers of its own to be remembered (TCP, SCTP).
    pub fn note_datagram(self, payload: &[u8]) {
        self.conns.tcp_line(self.id.0).note(self.digest(payload));
    }

    /// Whether a datagram with that payload is one of the last that were remembered. Nobody else than who sees the flow's packets can make
    /// one of which this is true: the digests (SipHash-1-3 of 64 bits) have a key of the table's, and the connection's number in them.
    ///
    /// # Panics
    /// As [`Self::note_datagram`].
    pub fn is_noted(self, payload: &[u8]) -> bool {
        self.conns.tcp_line(self.id.0).has_note(self.digest(payload))
    }

    fn digest(self, payload: &[u8]) -> u64 {
        assert!(!matches!(self.protocol(), Protocol::TCP | Protocol::SCTP), "its words have another meaning");
        let Identity { index, incarnation } = self.identity();
        self.conns.digest((index, incarnation, payload))
    }

    /// The device that the first packet came from.
    #[inline]
    pub fn device(self) -> u32 {
        self.get(Field::Device, 0)
    }

    /// The generation of the snapshot that the connection was last judged by.
    #[inline]
    pub fn generation(self) -> u32 {
        self.get(Field::Generation, 0)
    }

    /// Notes by which snapshot the connection was judged again.
    #[inline]
    pub fn set_generation(self, generation: u32) {
        self.set(Field::Generation, 0, generation);
    }

    /// Stamps of what judged the connection: source, destination, backend.
    #[inline]
    pub fn stamps(self) -> [u32; 3] {
        std::array::from_fn(|i| self.get(Field::Stamps, i))
    }

    /// Replaces the stamps, one after the other.
    #[inline]
    pub fn set_stamps(self, stamps: [u32; 3]) {
        stamps.into_iter().enumerate().for_each(|(i, stamp)| self.set(Field::Stamps, i, stamp));
    }

    /// The next hop of a direction's packets.
    #[inline]
    pub fn next_hop(self, direction: Direction) -> u32 {
        self.get(Field::NextHops, direction as usize)
    }

    /// Replaces the next hop of a direction's packets.
    #[inline]
    pub fn set_next_hop(self, direction: Direction, next_hop: u32) {
        self.set(Field::NextHops, direction as usize, next_hop);
    }

    /// Next hops, by direction.
    #[inline]
    pub fn next_hops(self) -> [u32; 2] {
        [self.next_hop(Direction::Original), self.next_hop(Direction::Reply)]
    }

    /// Replaces both next hops, one after the other.
    #[inline]
    pub fn set_next_hops(self, next_hops: [u32; 2]) {
        self.set_next_hop(Direction::Original, next_hops[0]);
        self.set_next_hop(Direction::Reply, next_hops[1]);
    }

    /// Bits of the dataplane's choice.
    #[inline]
    pub fn flags(self) -> u8 {
        self.state().flags()
    }

    /// Sets the bits of `set` and clears those of `clear`; `false`, and nothing is changed, where the connection was removed.
    pub fn change_flags(self, set: u8, clear: u8) -> bool {
        self.update(|state| Some(state.with_flags(state.flags() & !clear | set)))
    }

    /// Which use of its index the connection is.
    #[inline]
    pub fn identity(self) -> Identity {
        Identity { index: self.id.0, incarnation: self.state().incarnation() }
    }

    /// Where the connection is handed over to, as [`Self::set_offload_slot`] noted it: of meaning while it is
    /// [`OFFLOADED`](crate::OFFLOADED).
    #[inline]
    pub fn offload_slot(self) -> u32 {
        self.conns.tcp_line(self.id.0).offload_slot().load(Ordering::Acquire)
    }

    /// Notes where the connection is handed over to. Before it is marked as [`OFFLOADED`](crate::OFFLOADED).
    pub fn set_offload_slot(self, slot: u32) {
        self.conns.tcp_line(self.id.0).offload_slot().store(slot, Ordering::Release);
    }

    /// The windows of an established TCP connection that has proved itself, for somebody else to follow them: `None` of any other, and
    /// where a side was not heard yet, or the last segment was a SYN.
    pub fn windows(self) -> Option<Windows> {
        let state = self.state();
        let is_settled = state.is_live() && state.tcp_state() == Some(TcpState::Established) && state.assured();
        if is_settled { self.conns.tcp_line(self.id.0).windows() } else { None }
    }

    /// Takes over windows that somebody else has followed since ([`Self::windows`]): forward only. `last`: whose segments may have been
    /// the last. The timeout becomes what follows from them; whether they keep the connection alive is said by [`Self::touch`].
    ///
    /// `are_ahead`: they are known to be ahead. By more than half of sequence space, 2 GiB, the numbers alone do not tell that.
    pub fn absorb(self, sides: &[[u32; 4]; 2], last: Direction, are_ahead: bool) {
        let line = self.conns.tcp_line(self.id.0);
        let (settings, timeouts) = self.conns.tcp_rules();
        let Some(timeout) = line.absorb(sides, last, are_ahead, settings, timeouts) else { return };
        self.update(|state| match state.tcp_state() {
            Some(TcpState::Established) => Some(state.in_timeout_class(timeout)),
            _ => None,
        });
    }

    /// When a packet last kept it alive.
    #[inline]
    pub fn last_seen(self) -> Tick {
        self.lines.last_seen()
    }

    /// Keeps it alive; a store only if the tick is another one.
    #[inline]
    pub fn touch(self, now: Tick) {
        let last_seen = self.lines.attribute(Field::LastSeen, 0);
        if last_seen.load(Ordering::Relaxed) != now.0 {
            last_seen.store(now.0, Ordering::Relaxed);
        }
    }

    /// Gives a TCP connection no longer to live than one that was reset has (tcp_timeout_close), from the first time on that this is said.
    /// A segment that is followed gives it its time back. Of other protocols nothing changes.
    pub fn end_soon(self, now: Tick) {
        let (_, timeouts) = self.conns.tcp_rules();
        let closed = TimeoutClass::TcpClose;
        let is_longer =
            |state: State| state.tcp_state().is_some() && timeouts.ticks(state.timeout_class()) > timeouts.of(closed);
        if is_longer(self.state()) {
            // Before: an idle one would be over at once.
            self.touch(now);
            self.update(|state| is_longer(state).then_some(state.in_timeout_class(closed)));
        }
    }

    /// Whether its timeout is over.
    #[inline]
    pub fn is_expired(self, now: Tick) -> bool {
        self.conns.is_expired(self.state(), self.lines, now)
    }

    /// Its life, as listings show it.
    pub fn lifecycle(self) -> Lifecycle {
        self.state().lifecycle()
    }

    /// Its TCP state; none for other protocols.
    pub fn tcp_state(self) -> Option<TcpState> {
        self.state().tcp_state()
    }

    /// Its SCTP state; none for other protocols.
    pub fn sctp_state(self) -> Option<SctpState> {
        self.state().sctp_state()
    }

    /// Whether a packet of the reply direction was seen.
    #[inline]
    pub fn seen_reply(self) -> bool {
        self.state().seen_reply()
    }

    /// Whether it has proved itself (netfilter's ASSURED): TCP and SCTP after their handshake, UDP after two seconds both
    /// ways.
    #[inline]
    pub fn assured(self) -> bool {
        self.state().assured()
    }

    /// Whether it may be displaced by a new connection that finds no other reply key than this one's, and how gladly: the greatest goes
    /// first. `for_privileged`: the new connection is one of the host itself.
    pub fn expendable(self, for_privileged: bool, now: Tick) -> Option<Expendable> {
        self.state().expendable(now.since(self.last_seen()), for_privileged)
    }

    /// Whether a packet of that direction opens a connection by netfilter's rules though this one has its keys: a SYN or INIT where this one
    /// is over, or one that repeats what nobody has answered. While this one goes on as it was, such a repetition is its own. `false` for
    /// what has no connections, whose every packet is like its first.
    pub fn is_opened_again_by(self, direction: Direction, observed: &Observed) -> bool {
        let (state, line) = (self.state(), self.conns.tcp_line(self.id.0));
        match (state.tcp_state(), state.sctp_state()) {
            (Some(state), _) => tcp::opens_again(state, direction, observed),
            (_, Some(state)) => Sctp::load(line).opens_again(state, direction, &observed.sctp),
            (None, None) => false,
        }
    }

    /// Changes the state word where there is something to change; `false`, and nothing is changed, where the connection was removed.
    /// Lost races are run again.
    #[inline]
    fn update(self, change: impl Fn(State) -> Option<State>) -> bool {
        let word = self.lines.state();
        let mut current = self.state();
        while current.is_live() {
            let Some(next) = change(current).filter(|next| *next != current) else { return true };
            match word.compare_exchange_weak(current.0, next.0, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(found) => current = State(found),
            }
        }
        false
    }

    /// Follows a packet of that direction, and keeps the connection alive where it is accepted.
    ///
    /// Not for the packet that a connection was inserted for, which [`Table::insert`] has followed. Of a connection
    /// that another worker has just removed every packet is accepted: it came before.
    #[inline]
    pub fn track(&self, direction: Direction, observed: &Observed, now: Tick) -> Tracked {
        let state = self.state();
        match state.protocol() {
            Protocol::TCP => return self.track_tcp(direction, observed, now),
            Protocol::SCTP => return self.track_sctp(direction, observed, now),
            _ => {}
        }
        if !is_settled(state) {
            self.update(|state| Some(after_datagram(state, direction, now)));
        }
        self.touch(now);
        Tracked::Accept
    }

    /// Follows a datagram as [`Self::track`] does, if it leaves the state word as it is; `false`, and nothing is written, if it would change
    /// that. Of a protocol without states: neither TCP nor SCTP.
    #[inline(always)]
    pub fn track_repeated(self, direction: Direction, now: Tick) -> bool {
        let state = self.state();
        debug_assert!(!matches!(state.protocol(), Protocol::TCP | Protocol::SCTP));
        let repeats = is_settled(state) || after_datagram(state, direction, now) == state;
        if repeats {
            self.touch(now);
        }
        repeats
    }

    /// Follows a segment as [`Self::track`] does, which would accept it, if it is an ordinary one: of an established connection that has proved
    /// itself, acknowledging, and plainly inside both windows ([`crate::tcp`] has the list). `false`, and nothing is written, for any
    /// other.
    ///
    /// It changes nothing of the state word but the timeout.
    #[inline(always)]
    pub fn track_ordinary(self, direction: Direction, segment: &Observed, now: Tick) -> bool {
        let word = self.state();
        if !word.is_settled_tcp() {
            return false;
        }
        // Who has lost a race leaves the segment to the general way, which looks again.
        let enter = |class| {
            let next = word.in_timeout_class(class);
            let exchange =
                |state: &AtomicU64| state.compare_exchange(word.0, next.0, Ordering::AcqRel, Ordering::Relaxed).is_ok();
            next == word || exchange(self.lines.state())
        };
        let (settings, timeouts) = self.conns.tcp_rules();
        let followed = self.conns.tcp_line(self.id.0).follow_ordinary(direction, segment, settings, timeouts, enter);
        if followed {
            self.touch(now);
        }
        followed
    }

    /// Once for each direction: the compiler then knows whose numbers are whose, and keeps them in registers.
    #[inline(never)]
    fn track_tcp(&self, direction: Direction, observed: &Observed, now: Tick) -> Tracked {
        match direction {
            Direction::Original => self.track_segment(Direction::Original, observed, now),
            Direction::Reply => self.track_segment(Direction::Reply, observed, now),
        }
    }

    #[inline(always)]
    fn track_segment(&self, direction: Direction, observed: &Observed, now: Tick) -> Tracked {
        let line = self.conns.tcp_line(self.id.0);
        let (settings, timeouts) = self.conns.tcp_rules();
        let mut word = self.state();
        loop {
            let Some(state) = word.tcp_state().filter(|_| word.is_live()) else { return Tracked::Accept };
            let (mut tcp, words) = line.load();
            let standing = Standing { state, seen_reply: word.seen_reply(), assured: word.assured() };
            let step = tcp.step(standing, direction, observed, settings, timeouts);
            let state = |word: State, state| word.in_tcp_state(state);
            match self.take(word, direction, step, state, now) {
                Ok(Tracked::Accept) => {
                    line.store(&tcp, &words);
                    return Tracked::Accept;
                }
                Ok(tracked) => return tracked,
                Err(found) => word = found,
            }
        }
    }

    #[cold]
    fn track_sctp(&self, direction: Direction, observed: &Observed, now: Tick) -> Tracked {
        let line = self.conns.tcp_line(self.id.0);
        let mut word = self.state();
        loop {
            let Some(state) = word.sctp_state().filter(|_| word.is_live()) else { return Tracked::Accept };
            let before = Sctp::load(line);
            let mut sctp = before;
            let step = sctp.step(Some(state), word.assured(), direction, &observed.sctp);
            let state = |word: State, state| word.in_sctp_state(state);
            match self.take(word, direction, step, state, now) {
                Ok(Tracked::Accept) => {
                    sctp.store(&before, line);
                    return Tracked::Accept;
                }
                Ok(tracked) => return tracked,
                Err(found) => word = found,
            }
        }
    }

    /// Takes a step from `word`, unless the state word has changed since: then it is the error.
    #[inline(always)]
    fn take<S>(
        self,
        word: State,
        direction: Direction,
        step: Step<S>,
        in_state: impl Fn(State, S) -> State,
        now: Tick,
    ) -> Result<Tracked, State> {
        let heard = if direction == Direction::Reply { word.with_reply_seen() } else { word };
        let (next, is_renewed) = match step {
            Step::Accept { state, timeout, assured } => {
                let next = in_state(heard, state);
                let next = timeout.map_or(next, |timeout| next.in_timeout_class(timeout));
                (if assured { next.with_assured() } else { next }, timeout.is_some())
            }
            Step::Ignore => (heard, false),
            Step::NewFlow => return Ok(Tracked::NewFlow),
            Step::Invalid => return Ok(Tracked::Invalid),
        };
        if next != word {
            let exchanged =
                self.lines.state().compare_exchange_weak(word.0, next.0, Ordering::AcqRel, Ordering::Relaxed);
            exchanged.map_err(State)?;
        }
        if is_renewed {
            self.touch(now);
        }
        Ok(Tracked::Accept)
    }
}

/// A UDP flow that is answered is a stream when it still goes on after this time.
const STREAM_TICKS: u32 = (2_000_000_000 / Tick::NS) as u32;

/// Whether no further packet changes the state of a protocol without connections.
#[inline(always)]
fn is_settled(state: State) -> bool {
    state.seen_reply() && (state.assured() || state.protocol() != Protocol::UDP)
}

/// The state after a packet of a protocol without connections.
#[inline]
fn after_datagram(state: State, direction: Direction, now: Tick) -> State {
    let mut next = state;
    if state.protocol() == Protocol::UDP && state.seen_reply() && state.age(now) > STREAM_TICKS {
        next = next.with_assured().in_timeout_class(TimeoutClass::UdpStream);
    }
    if direction == Direction::Reply {
        next = next.with_reply_seen();
    }
    next
}

/// Tells connections of a table apart over their whole lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Identity {
    /// Below the number of connections that there is memory for.
    pub index: u32,
    /// Counts the uses of the index.
    pub incarnation: u16,
}

/// A copy of a connection for listings, of one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry<A: Address> {
    /// Its place in the table, and which use of that place it is: no other connection of the table has both, but for one that comes
    /// 65,536 uses later.
    pub identity: Identity,
    /// The key of the original direction's packets as they arrive.
    pub original: FlowKey<A>,
    /// The key of the reply direction's packets as they arrive.
    pub reply: FlowKey<A>,
    /// What the dataplane keeps with it.
    pub attributes: Attributes,
    /// Its life.
    pub lifecycle: Lifecycle,
    /// Its TCP state; none for other protocols.
    pub tcp_state: Option<TcpState>,
    /// Its SCTP state; none for other protocols.
    pub sctp_state: Option<SctpState>,
    /// Whether it has proved itself.
    pub assured: bool,
    /// When a packet last kept it alive.
    pub last_seen: Tick,
    /// Ticks until it expires, unless a packet comes.
    pub remaining_ticks: u32,
    /// Where it is handed over to, if it is ([`crate::OFFLOADED`]).
    pub offload_slot: Option<u32>,
}

impl<A: Address> Entry<A> {
    /// A copy of the connection with that index, if it is live and not expired. For any thread, in a turn or not.
    pub(crate) fn read(conns: &Conns<A>, index: u32, now: Tick) -> Option<Self> {
        let lines = conns.lines(index);
        loop {
            let state = State(lines.state().load(Ordering::Acquire));
            if !state.is_live() {
                return None;
            }
            let last_seen = lines.last_seen();
            let entry = Self {
                identity: Identity { index, incarnation: state.incarnation() },
                original: lines.key(Direction::Original, state.protocol()),
                reply: lines.key(Direction::Reply, state.protocol()),
                attributes: lines.attributes(state),
                lifecycle: state.lifecycle(),
                tcp_state: state.tcp_state(),
                sctp_state: state.sctp_state(),
                assured: state.assured(),
                last_seen,
                remaining_ticks: conns.timeout_ticks(state).saturating_sub(now.since(last_seen)),
                offload_slot: (state.flags() & OFFLOADED != 0)
                    .then(|| conns.tcp_line(index).offload_slot().load(Ordering::Relaxed)),
            };
            // A sequence lock's reader: words of a later use of the index come with its state word.
            weir_sync::atomic::fence(Ordering::Acquire);
            let after = State(lines.state().load(Ordering::Relaxed));
            if after.is_live() && after.same_incarnation(state) {
                return (entry.remaining_ticks != 0).then_some(entry);
            }
        }
    }
}
