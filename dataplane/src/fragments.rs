//! Packets that pass in fragments.
//!
//! # Theory
//!
//! *What.* Only the first fragment of a packet has its ports. It takes the way of a whole packet; the others, which find their packet by
//! source, destination, identification and (IPv4) protocol, follow it. [`Fragments`] remembers per packet that is on its way what became
//! of its first fragment ([`Fate`]) and which bytes of it have come; and it keeps, briefly, the fragments that came before their first.
//! Nothing is put together: what leaves are the fragments that came.
//!
//! A fate names the first fragment's key and its translation, not a next hop: a later fragment asks the connection table again, so a
//! policy that cuts the connection cuts its fragments, and a change of the forwarding tables redirects them. A connection that would
//! send it elsewhere than its first went is not followed.
//!
//! *Rules.* A fragment that overlaps another ends its packet: it and all that follow are dropped (RFC 5722; RFC 3128, 2 for why IPv4 needs
//! the same). So does one that contradicts where the packet ends. An exact duplicate is only dropped itself (RFC 8200, 4.5). A packet is
//! forgotten when all of it has passed, as identifications are used again soon (RFC 4963), or after [`LIFETIME`].
//!
//! *Who shares a packet.* Fragments join only where they come from one place: one workload's device, the node's kernel, or any uplink. A
//! workload cannot ride on another's packet.
//!
//! *Layout.* A fixed table, allocated once, whose places a [`Roster`] finds by a hash that is keyed by a random number: whatever the hashes, as many
//! packets are followed as there are places. In a full table a new packet displaces the oldest, if nobody can expect more of that one
//! ([`PATIENCE`]); else the oldest from the place that has most, if that has more than the new one's place; else it is refused. So one
//! workload may have all of the table, and takes nothing from who has less. `WAITING_SHARE` fragments from one place may wait. Waiting
//! fragments are in one list, oldest first.
//!
//! *Invariants.* (1) A fragment waits only for a packet in the table whose fate is [`Fate::Unknown`]; so whoever decides a fate takes the
//! waiting ones out. (2) `datagram.waiting` is the number of them. (3) A packet with waiting fragments is not forgotten.
//!
//! *Threads.* A worker has its own. All fragments of a packet must reach one worker. They do: the kernel's flow hash, by which the trunk
//! and virtual uplinks choose a queue, takes addresses and protocol alone for every fragment, the first included
//! (`__skb_flow_dissect` without FLOW_DISSECTOR_F_PARSE_1ST_FRAG), or the sender's own hash, which fragments inherit
//! (`ip_copy_metadata`); and receive-side scaling hashes fragments by addresses alone. A NIC that takes the first one's
//! ports can be told not to (`ethtool -N DEVICE rx-flow-hash udp4 sd`); until then such a packet's later fragments end as
//! [`DropReason::FragmentOrphan`], never untranslated.

use std::net::{Ipv4Addr, Ipv6Addr};

use weir_conntrack::Observed;
use weir_packet::{
    Address, DropReason, FlowKey, Protocol, Tick,
    parse::{Kind, TcpFields, View},
};

use crate::{
    frame::{IfIndex, Packet},
    origin::Origin,
    roster::{OWNERS, Roster},
};

/// Packets that are followed at once, per worker and family.
const DATAGRAMS: usize = 512;
/// Fragments of one packet: 65,535 bytes over an MTU of 576 are 119.
const PIECES: usize = 128;
/// Fragments that wait for their first, per worker and family.
const WAITING: usize = 128;
/// Fragments from one place that may wait.
const WAITING_SHARE: usize = 96;
/// Fragments of one packet that may wait: all but the first of 65,535 bytes over Ethernet.
const WAITING_PER_DATAGRAM: u8 = 44;
/// How long a packet is followed at most: netfilter's 30 s (net.ipv4.ipfrag_time).
pub const LIFETIME: u32 = (30_000_000_000 / Tick::NS) as u32;
/// How long a fragment waits for its first: reordering is a matter of milliseconds.
pub const PATIENCE: u32 = (1_000_000_000 / Tick::NS) as u32;

/// What the fragments of one packet have in common (RFC 791, 3.2; RFC 8200, 4.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DatagramKey<A: Address> {
    src: A,
    dst: A,
    id: u32,
    /// 0 in IPv6, where the protocols that fragments name may differ.
    protocol: Protocol,
    /// The device of a workload or of the node's kernel; `None`: an uplink.
    from: Option<IfIndex>,
}

impl<A: Address> DatagramKey<A> {
    /// Whose share of the table it is of: uplinks have one, devices one each, as long as their indices do not meet.
    fn owner(&self) -> u8 {
        self.from.map_or(0, |IfIndex(index)| 1 + (index % (OWNERS as u32 - 1)) as u8)
    }
}

/// The part of a packet that a fragment carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Its first byte.
    pub start: u16,
    /// The byte after its last.
    pub end: u16,
    /// Whether the packet goes on after it.
    pub more: bool,
}

/// The packet that a fragment is of, and its place there; `None` for whole packets.
pub fn place<A: Address>(view: &View<A>, origin: Origin, device: IfIndex) -> Option<(DatagramKey<A>, Extent)> {
    let (id, start, bytes, more) = match view.kind {
        Kind::FirstFragment { id, bytes } => (id, 0, bytes, true),
        Kind::LaterFragment { id, offset, bytes, more } => (id, offset, bytes, more),
        Kind::Flow | Kind::IcmpError | Kind::Control => return None,
    };
    let key = DatagramKey {
        src: view.key.src,
        dst: view.key.dst,
        id,
        protocol: if A::WORDS == 1 { view.key.protocol } else { Protocol::default() },
        from: (origin != Origin::Uplink).then_some(device),
    };
    Some((key, Extent { start, end: start + bytes, more }))
}

/// What became of a packet's first fragment, and so becomes of the others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate<A: Address> {
    /// It has not come yet.
    Unknown,
    /// It went by a connection.
    Follow(Lead<A>),
    /// The node's kernel sent it, and it was forwarded without a connection.
    Pass,
    /// Untracked policy let it go, to wherever it goes.
    Untracked,
    /// It was handed to the node's kernel as it was.
    Punt,
    /// It was dropped.
    Drop(DropReason),
}

/// How a first fragment went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lead<A: Address> {
    /// Its key.
    pub key: FlowKey<A>,
    /// The key that it left with.
    pub to: FlowKey<A>,
    /// Its TCP flags, sequence number, acknowledgment number and window.
    tcp: (u8, u32, u32, u16),
    /// Bytes before the TCP payload.
    header_bytes: u16,
}

impl<A: Address> Lead<A> {
    /// Of a first fragment with the key `key` that carries `bytes` of the packet, of which tracking has seen `segment`.
    pub fn new(key: FlowKey<A>, to: FlowKey<A>, segment: &Observed, bytes: u16) -> Self {
        let tcp = (segment.tcp_flags, segment.tcp_seq, segment.tcp_ack, segment.tcp_window);
        Self { key, to, tcp, header_bytes: bytes.saturating_sub(segment.payload_bytes as u16) }
    }

    /// For tracking: the whole TCP segment, once it is known to end at `end`, so that its acknowledgment is not one of data that
    /// nobody sent. `None` where the first fragment told all. It stands as data alone: its FIN, which is counted in its length, has been seen.
    pub fn whole_segment(&self, end: u16) -> Option<Observed> {
        let (flags, tcp_seq, tcp_ack, tcp_window) = self.tcp;
        if self.key.protocol != Protocol::TCP || flags & (TcpFields::SYN | TcpFields::RST) != 0 {
            return None;
        }
        let fin = u32::from(flags & TcpFields::FIN != 0);
        let payload_bytes = u32::from(end.saturating_sub(self.header_bytes)) + fin;
        Some(Observed { tcp_flags: TcpFields::ACK, tcp_seq, tcp_ack, tcp_window, payload_bytes, ..Observed::default() })
    }
}

/// A packet in the table, by its number there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot(u16);

/// A fragment that waits.
#[derive(Debug)]
pub struct Waiting<A: Address> {
    /// The fragment.
    pub packet: Packet,
    /// Its headers.
    pub view: View<A>,
    slot: Slot,
    since: Tick,
}

/// A packet that passes in fragments.
#[derive(Debug)]
struct Datagram<A: Address> {
    key: DatagramKey<A>,
    fate: Fate<A>,
    /// When its first fragment to arrive did.
    since: Tick,
    waiting: u8,
    /// Where the packet ends, if that fragment has come.
    end: Option<u16>,
    /// Bytes of all its fragments that have come.
    seen_bytes: u32,
    piece_count: u8,
    /// Start and end of each fragment that has come, in order; none overlaps another.
    pieces: [(u16, u16); PIECES],
}

// With 512 of each family a worker has 0.7 MB of them.
const _: () = assert!(size_of::<Datagram<Ipv4Addr>>() <= 640 && size_of::<Datagram<Ipv6Addr>>() <= 768);
const _: () = assert!(PIECES <= u8::MAX as usize);

impl<A: Address> Datagram<A> {
    fn unused() -> Self {
        let nobody = A::unspecified();
        Self {
            key: DatagramKey { src: nobody, dst: nobody, id: 0, protocol: Protocol::default(), from: None },
            fate: Fate::Unknown,
            since: Tick::default(),
            waiting: 0,
            end: None,
            seen_bytes: 0,
            piece_count: 0,
            pieces: [(0, 0); PIECES],
        }
    }

    fn begin(&mut self, key: DatagramKey<A>, now: Tick) {
        self.key = key;
        self.fate = Fate::Unknown;
        self.since = now;
        self.waiting = 0;
        self.end = None;
        self.seen_bytes = 0;
        self.piece_count = 0;
    }

    /// Whether it is over, so that a fragment with its key is another packet's.
    fn is_over(&self, now: Tick, lifetime: u32) -> bool {
        self.waiting == 0 && now.since(self.since) > lifetime
    }

    fn note(&mut self, extent: Extent) -> Result<(), DropReason> {
        if let Fate::Drop(reason @ (DropReason::FragmentOverlap | DropReason::FragmentLimit)) = self.fate {
            return Err(reason);
        }
        let Extent { start, end, more } = extent;
        let pieces = &self.pieces[..usize::from(self.piece_count)];
        let at = pieces.partition_point(|piece| piece.0 < start);
        let last_end = pieces.last().map_or(0, |piece| piece.1);
        let fits_the_end = match self.end {
            Some(known) if more => end < known,
            Some(known) => end == known,
            None => more || last_end <= end,
        };
        // The same bytes once as the packet's last ones and once not is no duplicate.
        let is_duplicate = pieces.get(at) == Some(&(start, end)) && (more || self.end.is_some());
        let overlaps = at > 0 && pieces[at - 1].1 > start || pieces.get(at).is_some_and(|next| next.0 < end);
        let error = match () {
            () if !fits_the_end => DropReason::FragmentOverlap,
            () if is_duplicate => return Err(DropReason::FragmentDuplicate),
            () if overlaps => DropReason::FragmentOverlap,
            () if pieces.len() == PIECES => DropReason::FragmentLimit,
            () => {
                self.pieces.copy_within(at..usize::from(self.piece_count), at + 1);
                self.pieces[at] = (start, end);
                self.piece_count += 1;
                self.seen_bytes += u32::from(end - start);
                if !more {
                    self.end = Some(end);
                }
                return Ok(());
            }
        };
        self.fate = Fate::Drop(error);
        Err(error)
    }
}

/// One worker's packets in fragments, of one family.
#[derive(Debug)]
pub struct Fragments<A: Address> {
    datagrams: Box<[Datagram<A>]>,
    roster: Roster,
    waiting: Vec<Waiting<A>>,
    secret: [u64; 2],
    /// How long a packet is followed.
    lifetime: u32,
}

impl<A: Address> Fragments<A> {
    /// An empty table. `secret`: random numbers that key its hash.
    pub fn new(secret: [u64; 2]) -> Self {
        // With as many ones as zeroes, so that also a poor number gives a usable factor.
        const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
        Self {
            datagrams: (0..DATAGRAMS).map(|_| Datagram::unused()).collect(),
            roster: Roster::new(DATAGRAMS),
            waiting: Vec::with_capacity(WAITING),
            secret: [secret[0], secret[1] ^ SPREAD],
            lifetime: LIFETIME,
        }
    }

    /// Follows packets for so many ticks, [`LIFETIME`] at most.
    pub fn set_lifetime(&mut self, ticks: u32) {
        self.lifetime = ticks.min(LIFETIME);
    }

    /// Fragments that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The packet with that key, known already or from now on; `None` where there is no room for one more.
    pub fn datagram(&mut self, key: &DatagramKey<A>, now: Tick) -> Option<Slot> {
        let hash = self.hash(key);
        if let Some(place) = self.roster.find(hash, |place| self.of(Slot(place)).key == *key) {
            if !self.of(Slot(place)).is_over(now, self.lifetime) {
                return Some(Slot(place));
            }
            self.roster.release(place);
        }
        let owner = key.owner();
        let place = match self.roster.take(hash, owner) {
            Some(place) => place,
            None => {
                let least = self.least_expected(owner, now)?;
                self.roster.release(least);
                self.roster.take(hash, owner)?
            }
        };
        self.of_mut(Slot(place)).begin(*key, now);
        Some(Slot(place))
    }

    /// Whom a new packet of `owner` displaces in a full table: the oldest, if nobody can expect more of it, else the oldest of the place that has most.
    fn least_expected(&self, owner: u8, now: Tick) -> Option<u16> {
        let mut idle = self.roster.by_age().filter(|(place, _)| self.of(Slot(*place)).waiting == 0);
        let (oldest, of) = idle.next()?;
        if now.since(self.of(Slot(oldest)).since) > PATIENCE {
            return Some(oldest);
        }
        let largest = self.roster.gives_to(owner)?;
        std::iter::once((oldest, of)).chain(idle).find(|(_, of)| *of == largest).map(|(place, _)| place)
    }

    /// Multiplies the key's words with a secret factor, as the connection table's hash does (weir-conntrack, hash.rs).
    fn hash(&self, key: &DatagramKey<A>) -> u32 {
        let [seed, factor] = self.secret;
        let fold = |a: u64| {
            let product = u128::from(a) * u128::from(factor);
            product as u64 ^ (product >> 64) as u64
        };
        let (src, dst) = (key.src.words(), key.dst.words());
        let ends = src.as_ref().iter().zip(dst.as_ref());
        let mixed = ends.fold(seed, |mixed, (src, dst)| fold(mixed ^ (u64::from(*src) << 32 | u64::from(*dst))));
        (fold(fold(mixed ^ (u64::from(key.id) << 8 | u64::from(key.protocol.0)))) >> 32) as u32
    }

    /// Notes that a fragment has come.
    ///
    /// # Errors
    /// Why it is dropped. Where that is the end of its packet, the fate says so from now on.
    pub fn note(&mut self, slot: Slot, extent: Extent) -> Result<(), DropReason> {
        self.of_mut(slot).note(extent)
    }

    /// What becomes of the packet's fragments.
    pub fn fate(&self, slot: Slot) -> Fate<A> {
        self.of(slot).fate
    }

    /// Says what becomes of the packet's fragments. The caller takes those that wait, if it was unknown ([`Fragments::take_next`]).
    pub fn decide(&mut self, slot: Slot, fate: Fate<A>) {
        self.of_mut(slot).fate = fate;
    }

    /// Where the packet goes, if it came by an uplink.
    pub fn uplink_destination(&self, slot: Slot) -> Option<A> {
        let key = &self.of(slot).key;
        key.from.is_none().then_some(key.dst)
    }

    /// Keeps a fragment until its first has come.
    ///
    /// # Errors
    /// The packet itself, where too many wait.
    pub fn hold(&mut self, slot: Slot, packet: Packet, view: View<A>, now: Tick) -> Result<(), Packet> {
        let from = self.of(slot).key.from;
        let same_place = self.waiting.iter().filter(|w| self.of(w.slot).key.from == from).count();
        let of_datagram = self.of(slot).waiting;
        if of_datagram >= WAITING_PER_DATAGRAM || same_place >= WAITING_SHARE || self.waiting.len() >= WAITING {
            return Err(packet);
        }
        self.of_mut(slot).waiting += 1;
        self.waiting.push(Waiting { packet, view, slot, since: now });
        Ok(())
    }

    /// Removes and returns the longest waiting fragment of a packet.
    pub fn take_next(&mut self, slot: Slot) -> Option<Waiting<A>> {
        if self.of(slot).waiting == 0 {
            return None;
        }
        let index = self.waiting.iter().position(|w| w.slot == slot)?;
        self.of_mut(slot).waiting -= 1;
        Some(self.waiting.remove(index))
    }

    /// A packet of which a fragment has waited too long.
    pub fn overdue(&self, now: Tick) -> Option<Slot> {
        self.waiting.first().filter(|w| now.since(w.since) > PATIENCE).map(|w| w.slot)
    }

    /// Forgets a packet if all of it has passed.
    pub fn finish(&mut self, slot: Slot) {
        let datagram = self.of(slot);
        if datagram.waiting == 0 && datagram.end.is_some_and(|end| u32::from(end) == datagram.seen_bytes) {
            self.roster.release(slot.0);
        }
    }

    /// Forgets a packet, none of whose fragments wait.
    pub fn forget(&mut self, slot: Slot) {
        debug_assert_eq!(self.of(slot).waiting, 0);
        self.roster.release(slot.0);
    }

    /// Removes and returns any waiting fragment: the worker ends.
    pub fn give_up(&mut self) -> Option<Waiting<A>> {
        let slot = self.waiting.first()?.slot;
        self.take_next(slot)
    }

    fn of(&self, slot: Slot) -> &Datagram<A> {
        &self.datagrams[usize::from(slot.0)]
    }

    fn of_mut(&mut self, slot: Slot) -> &mut Datagram<A> {
        &mut self.datagrams[usize::from(slot.0)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Table = Fragments<Ipv4Addr>;
    /// A fragment and what is said of it.
    type Step = (Extent, Result<(), DropReason>);

    fn key(id: u32, from: Option<IfIndex>) -> DatagramKey<Ipv4Addr> {
        let (src, dst) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        DatagramKey { src, dst, id, protocol: Protocol::UDP, from }
    }

    fn part(start: u16, end: u16, more: bool) -> Extent {
        Extent { start, end, more }
    }

    #[test]
    fn what_a_packets_fragments_may_not_do() {
        use DropReason::{FragmentDuplicate as Duplicate, FragmentOverlap as Overlap};
        let rows: [(&str, &[Step]); 11] = [
            ("in order", &[(part(0, 8, true), Ok(())), (part(8, 16, true), Ok(())), (part(16, 17, false), Ok(()))]),
            ("reversed", &[(part(16, 17, false), Ok(())), (part(8, 16, true), Ok(())), (part(0, 8, true), Ok(()))]),
            (
                "a duplicate ends nothing",
                &[(part(8, 16, true), Ok(())), (part(8, 16, true), Err(Duplicate)), (part(16, 24, true), Ok(()))],
            ),
            (
                "an overlap ends all",
                &[(part(8, 24, true), Ok(())), (part(16, 32, true), Err(Overlap)), (part(32, 40, true), Err(Overlap))],
            ),
            ("inside another", &[(part(8, 32, true), Ok(())), (part(16, 24, true), Err(Overlap))]),
            ("around another", &[(part(16, 24, true), Ok(())), (part(8, 32, true), Err(Overlap))]),
            ("two ends", &[(part(8, 16, false), Ok(())), (part(16, 20, false), Err(Overlap))]),
            ("the last, then not", &[(part(8, 16, false), Ok(())), (part(8, 16, true), Err(Overlap))]),
            ("not the last, then the last", &[(part(8, 16, true), Ok(())), (part(8, 16, false), Err(Overlap))]),
            ("past the end", &[(part(8, 16, false), Ok(())), (part(16, 24, true), Err(Overlap))]),
            ("an end before what came", &[(part(16, 24, true), Ok(())), (part(8, 12, false), Err(Overlap))]),
        ];
        for (name, steps) in rows {
            let mut table = Table::new([1, 2]);
            let slot = table.datagram(&key(1, None), Tick(1)).unwrap();
            for (extent, expected) in steps {
                assert_eq!(table.note(slot, *extent), *expected, "{name}: {extent:?}");
            }
        }
    }

    #[test]
    fn a_complete_packet_is_forgotten_and_its_identification_free() {
        let mut table = Table::new([1, 2]);
        let slot = table.datagram(&key(1, None), Tick(1)).unwrap();
        for extent in [part(0, 8, true), part(8, 9, false)] {
            table.finish(slot);
            assert_eq!(table.datagram(&key(1, None), Tick(1)), Some(slot), "not yet");
            table.note(slot, extent).unwrap();
            table.decide(slot, Fate::Pass);
        }
        table.finish(slot);
        let next = table.datagram(&key(1, None), Tick(1)).unwrap();
        assert_eq!(table.fate(next), Fate::Unknown);
        assert_eq!(table.note(next, part(0, 8, true)), Ok(()));
    }

    #[test]
    fn a_packet_has_so_many_fragments_and_no_more() {
        let mut table = Table::new([1, 2]);
        let slot = table.datagram(&key(1, None), Tick(1)).unwrap();
        for piece in (0..PIECES as u16).rev() {
            assert_eq!(table.note(slot, part(piece * 16, piece * 16 + 8, true)), Ok(()));
        }
        for start in [8, 24] {
            assert_eq!(table.note(slot, part(start, start + 8, true)), Err(DropReason::FragmentLimit));
        }
        assert_eq!(table.fate(slot), Fate::Drop(DropReason::FragmentLimit));
    }

    #[test]
    fn as_many_packets_are_followed_as_is_said_whatever_their_hashes() {
        // Many of one source, of many sources, and such as meet in one bucket.
        let of_source = |i: u32| DatagramKey { src: Ipv4Addr::from_bits(0x0a00_0000 + i), ..key(7, None) };
        let by_id: Vec<_> = (0..).map(|id| key(id, None)).take(DATAGRAMS).collect();
        let by_source: Vec<_> = (0..).map(of_source).take(DATAGRAMS).collect();
        let table = Table::new([1, 2]);
        let meets = |key: &DatagramKey<_>| table.hash(key) % (2 * DATAGRAMS as u32) == 7;
        let colliding: Vec<_> = (0..).map(|id| key(id, None)).filter(meets).take(DATAGRAMS).collect();
        for keys in [by_id, by_source, colliding] {
            let mut table = Table::new([1, 2]);
            let slots: Vec<Slot> = keys.iter().map(|key| table.datagram(key, Tick(100)).unwrap()).collect();
            for (key, slot) in keys.iter().zip(&slots) {
                assert_eq!(table.datagram(key, Tick(100)), Some(*slot), "still the same");
            }
            assert_eq!(table.datagram(&key(1 << 30, None), Tick(100)), None, "and not one more");
            // One that has passed makes way.
            table.note(slots[5], part(0, 8, false)).unwrap();
            table.finish(slots[5]);
            assert!(table.datagram(&key(1 << 30, None), Tick(100)).is_some());
            assert_eq!(table.datagram(&keys[5], Tick(100)), None);
        }
    }

    #[test]
    fn who_has_most_gives_to_who_has_less_and_what_is_old_to_anybody() {
        let mut table = Table::new([1, 2]);
        let (pod, other) = (Some(IfIndex(3)), Some(IfIndex(4)));
        let mut ids = 0..;
        let mut add = |table: &mut Table, from, now| table.datagram(&key(ids.next().unwrap(), from), Tick(now));
        let slots: Vec<Slot> = (0..DATAGRAMS).map(|_| add(&mut table, pod, 100).unwrap()).collect();
        assert_eq!(add(&mut table, pod, 100), None, "all is the pod's");
        // Its oldest make way, one after another, until both have as many.
        let taken: Vec<Slot> = std::iter::from_fn(|| add(&mut table, other, 101)).collect();
        assert_eq!(taken, slots[..DATAGRAMS / 2]);
        assert_eq!(add(&mut table, pod, 101), None);
        // The uplinks have a share, too; whoever has most gives.
        let thirds: Vec<Slot> = std::iter::from_fn(|| add(&mut table, None, 101)).collect();
        assert_eq!(thirds.len(), DATAGRAMS / 3);
        // What waits for its first is not displaced; the next oldest is.
        let late = 101 + PATIENCE;
        let (oldest, next) = {
            let mut by_age = table.roster.by_age();
            (by_age.next().unwrap(), by_age.next().unwrap())
        };
        table.of_mut(Slot(oldest.0)).waiting = 1;
        assert_eq!(add(&mut table, other, late), Some(Slot(next.0)));
        table.of_mut(Slot(oldest.0)).waiting = 0;
        assert_eq!(add(&mut table, pod, late), Some(Slot(oldest.0)));
    }

    #[test]
    fn after_its_lifetime_an_identification_is_another_packets() {
        let mut table = Table::new([1, 2]);
        let key = key(1, None);
        let since = |table: &mut Table, now| {
            let slot = table.datagram(&key, Tick(now)).unwrap();
            table.of(slot).since
        };
        assert_eq!(since(&mut table, 101), Tick(101));
        assert_eq!(since(&mut table, 101 + LIFETIME), Tick(101));
        assert_eq!(since(&mut table, 102 + LIFETIME), Tick(102 + LIFETIME));
        table.set_lifetime(500);
        assert_eq!(since(&mut table, 602 + LIFETIME), Tick(102 + LIFETIME));
        assert_eq!(since(&mut table, 603 + LIFETIME), Tick(603 + LIFETIME));
    }

    #[test]
    fn keys_spread_over_all_buckets() {
        const BUCKETS: usize = 64;
        for secret in [[0, 0], [1, 2], [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210]] {
            let table = Table::new(secret);
            let of = |spread: &dyn Fn(u32) -> DatagramKey<Ipv4Addr>| {
                let mut counts = [0_u32; BUCKETS];
                (0..65536).for_each(|i| counts[table.hash(&spread(i)) as usize % BUCKETS] += 1);
                counts
            };
            let by_id = of(&|i| key(i, None));
            let by_source = of(&|i| DatagramKey { src: Ipv4Addr::from_bits(0x0a00_0000 + i), ..key(7, None) });
            // 1,024 each, standard deviation 32.
            for counts in [by_id, by_source] {
                assert!(counts.iter().all(|n| (800..1250).contains(n)), "{counts:?}");
            }
        }
    }
}
