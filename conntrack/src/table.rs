//! The connection table.
//!
//! # What
//! A map from flow keys to connections, shared by all workers, in which each connection has two keys, original and
//! reply, that appear and disappear together. Of fixed capacity. Lookups take no lock and write nothing. Two workers
//! that insert connections with a key in common end with exactly one of them; neither ever waits for the other.
//!
//! # Layout
//! Four arrays in one mapping, which may be a file's ([`crate::file`]), resident as far as they are used
//! ([`crate::storage`]); all references between them are indices.
//!
//! - *Buckets* ([`crate::bucket`]), one line each: twelve slots of a connection's index and a direction, with a one-byte
//!   tag of the key's hash each. There are so many that a full table fills half of the slots.
//! - *Connections* ([`crate::conn`]), one line for IPv4, two for IPv6.
//! - *TCP* ([`crate::tcp`]), one line per connection, touched by TCP and SCTP only.
//! - *Links* ([`crate::index`]), one word per connection, for chains of free ones.
//!
//! For each IPv4 connection: 64 + 64 * 2 / 6 + 64 + 4 = 153 bytes, and one in 64 of them again, for connections that were
//! removed and may still be read. A UDP hit touches two lines (bucket, connection),
//! TCP three, a miss one.
//!
//! # Where a key lives
//! In one of [`PROBES`] buckets: its home, and others at distances that depend on the hash (double hashing; the number
//! of buckets is prime, so all are different). Nearly all live at home: at full load one home in fifty has keys that do
//! not. A bucket counts them, and a lookup goes on to the others only if its home's count is not zero. The count grows
//! before such a key is put elsewhere, and shrinks after it was taken out.
//!
//! # Insertion: publish, then validate
//! A connection's *state word* ([`crate::state`]) has its phase, and is the only thing that decides what it is:
//!
//! ```text
//! Free / Aborted / Removed ──► Filling ──► Published ──► Live ──► Removed
//!                                             └────────► Aborted
//! ```
//!
//! 1. *Fill.* The inserter owns the index alone. It writes keys and attributes.
//! 2. *Publish.* It puts both keys into buckets, and stores the phase `Published`. From then on the keys do not change
//!    and any thread can do the rest.
//! 3. *Validate* ([`Table::validate`]). After a `SeqCst` fence, look through the probe sequences of both keys for other
//!    connections with either key, in whatever direction:
//!    - one that is `Live` and not expired: abort this one;
//!    - one that is `Published`: the lower index goes first. A higher one is aborted; a lower one is *helped*, that is,
//!      validated by this thread, whereupon it is `Live` or `Aborted`;
//!    - one that is `Filling` is left alone: its own validation comes later and finds this one;
//!    - an expired one is removed.
//!
//!    If none stands in the way: `Published` to `Live`, by compare-and-swap.
//! 4. The inserter looks at the outcome, which it or a helper has brought about. `Aborted`: it takes its keys out, and
//!    begins again; now it usually finds the winner, which the caller then uses.
//!
//! *Both directions appear at one instant*, the change to `Live`: lookups take no other phase.
//!
//! *At most one wins.* Let X and W have a key in common and both become live, X by thread P's compare-and-swap, W by
//! Q's. Each of P and Q read its connection's `Published` (`Acquire`, so all of its keys' publication comes before),
//! then executed its fence, then searched. One fence is first in the order of `SeqCst` fences, say P's. Then Q's search
//! sees X's slots, its overflow counts, and X's phase as `Published` or later. If `Published`: Q aborts X, or helps X,
//! after which it is live or aborted. If live, or if a helper made it so: Q aborts W. If `Aborted`, X never becomes
//! live. If `Removed`, it is live no more. In no case do both live at the same time.
//!
//! *Nobody waits.* A thread that stops at any point holds up none: what it was filling is not looked at, what it had
//! published is validated by whoever meets it. Helping goes to lower indices only, so it ends; its depth is at most the
//! number of workers. Someone always wins: an abort has a live connection or a lower published one for its cause, and
//! of those published at a time with keys in common the lowest is aborted only by a live one.
//!
//! # Removal and reuse
//! `Live` to `Removed` by compare-and-swap: one thread succeeds, takes both keys out of their buckets, and retires the
//! index. It is used again only after every turn of that time is over ([`weir_sync::domain`]). So within a turn
//! - a slot's index that a lookup has read names the same connection until the turn is over, also if the slot has changed
//!   meanwhile (a lookup compares keys, not only tags);
//! - a helper never meets a later use of the index. The state word also counts uses, so that even a compare-and-swap
//!   from an earlier use fails. Listings, which may be slow and must hold nothing up, read outside of turns, and by this
//!   count find out that what they have read is gone.
//!
//! Slots: claimed by compare-and-swap from empty, then the tag is set; released by clearing the tag, then the slot. A
//! slot and its tag thus belong to one thread from claim to tag and from tag to release. A lookup that meets a tag
//! whose slot is empty or another's passes on.
//!
//! # Candidates
//! Who handles many packets in a turn asks the buckets of all of them first, and then the connections. What a bucket said is kept meanwhile, as a
//! [`Candidate`]: the slot that the home had for the tag. [`Table::expected`] takes nothing from it but where to look. The state word and the key are
//! read when it is asked, as a lookup reads them; only the slot was read earlier in the turn. By the above its index still
//! names the connection that it named then:
//! - if that was removed meanwhile, its state word says so, and it is a miss. Its key may be another connection's by now, which stands in
//!   another slot, or under another index in the same: the general lookup finds that;
//! - if it was being inserted, it may be live by now, and is found;
//! - the index is not used again before the turn is over, so neither key, direction, nor anything of the connection changes its meaning.
//!
//! As at most one live connection has a key, what is found so is what a lookup would find. What is not found (another key with that tag comes
//! first, one that does not live at home, one that came later) says nothing.
//!
//! # A full table
//! [`Table::make_room`] keeps it from becoming full: at its limit it removes the connection that is worth least among a
//! few neighbours at a random place. That is netfilter's early drop (nf_conntrack_core.c) with an order: one that is closing
//! or closed; one that has not proved itself (not assured: unreplied, half-open, a short exchange); one that has been idle
//! for [`ACTIVE_TICKS`]; among equals the longest idle. So a flood of first packets displaces itself, and of the flows that
//! carry something none goes. A sample of 16 that misses what a whole scan would find does so again with the
//! fourth power of the share of the rest, since four samples are taken. Connections of the host ([`PRIVILEGED`]) are spared in
//! all but the last: with a flood around, none of them goes, nor does it before its first answer.
//!
//! # Expiry
//! A connection has expired when its last packet is older than the timeout of its class ([`crate::timeouts`]). Lookups
//! take it for a miss at once; sweeping ([`Table::sweep`]), or an insertion that meets it, removes it. A packet that is
//! being tracked in the very tick in which its connection expires may lose it: it came too late by less than a tick.
//!
//! # Thread safety
//! All but creation is by shared reference. What a worker alone may use is its [`Handle`].
//!
//! # References
//! - Fan, Andersen, Kaminsky, "MemC3", NSDI 2013: tags in the bucket, one line per lookup.
//! - Harris, Fraser, Pratt, "A practical multi-word compare-and-swap operation", DISC 2002: publication with helping.
//! - Michael, "High performance dynamic lock-free hash tables and list-based sets", SPAA 2002.

use std::{fmt, sync::OnceLock};

use weir_packet::{Address, Direction, FlowKey, Protocol, Tick};
use weir_sync::{
    Arc, CachePadded, Counters, Domain, Gauge, Turn, WorkerCounters,
    atomic::{AtomicU32, Ordering, fence},
};

use crate::{
    arrays::{Arrays, Layout},
    bucket::{Bucket, SLOTS, SlotRef},
    conn::{self, Attributes, ConnId, ConnRef, Conns, Entry, Identity},
    hash::{Hash, Hasher},
    index::{Indices, Stock},
    observed::Observed,
    sctp::{Sctp, SctpState},
    state::{Lifecycle, OFFLOADED, PRIVILEGED, Phase, State},
    storage::Lines,
    tcp::{Tcp, TcpLine, TcpSettings},
    timeouts::{TimeoutClass, Timeouts},
};

/// Buckets in which a key may live. At full load about one insertion in 10^10 finds all of them full.
pub const PROBES: usize = if cfg!(loom) { 3 } else { 6 };

/// The most connections that a table may have.
pub const MAX_ENTRIES: u32 = 1 << 29;

/// Connections that there is memory for beyond the limit, at least. A flood at the limit removes as many in a turn as it opens, and they
/// are free again only when every worker's turn of that time is over: room for the bursts of milliseconds, for which a worker may lose its
/// core in the middle of a turn. Few under miri, where each access to an array costs as if to all of it.
const SPARE_AT_LEAST: u32 = if cfg!(miri) { 64 } else { 4096 };

/// Connections of a sweep that a worker takes from the shared cursor at a time.
const SWEEP_CHUNK: u32 = 256;

/// Neighbours among which a connection is chosen to make room, and how many such samples are taken at most.
const SAMPLE: u32 = 16;
const SAMPLES: u32 = 4;

/// An established connection with a packet in the last minute is never removed to make room: 6000 ticks of 10 ms.
pub const ACTIVE_TICKS: u32 = 6000;

/// To whom connections may be handed over.
pub trait Offloader: Send + Sync {
    /// Takes back what has that slot. From then on none of its packets passes there. For any thread, and quick.
    fn take_back(&self, slot: u32);
}

/// How a table is made.
#[derive(Clone, Copy, Debug)]
pub struct TableConfig {
    /// Connections that it can hold, from 1 to [`MAX_ENTRIES`]; values outside are taken for the nearest.
    pub max_entries: u32,
    /// Random numbers, to be kept secret: who knows them can choose keys that collide.
    pub seed: [u64; 2],
    /// How long idle connections live.
    pub timeouts: Timeouts,
    /// How strictly TCP is followed.
    pub tcp: TcpSettings,
}

/// A connection that has the key that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hit {
    /// The connection.
    pub conn: ConnId,
    /// Which of its keys it is.
    pub direction: Direction,
}

/// Where a key probably is: what its home bucket had for its tag. Good for the turn in which the bucket was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate(SlotRef);

impl Candidate {
    /// Nowhere.
    pub const NONE: Self = Self(SlotRef::NONE);

    /// Whether it is nowhere: the key is in no connection, most likely.
    #[inline]
    pub fn is_none(self) -> bool {
        self == Self::NONE
    }
}

/// A connection to be inserted.
#[derive(Clone, Copy, Debug)]
pub struct NewConn<A: Address> {
    /// The key of the original direction's packets as they arrive.
    pub original: FlowKey<A>,
    /// The key of the reply direction's packets as they will arrive; of the same protocol.
    pub reply: FlowKey<A>,
    /// What the dataplane keeps with it.
    pub attributes: Attributes,
    /// The packet that opens it. It is followed by the insertion; do not track it again.
    pub first: Observed,
}

/// What came of an insertion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Insert {
    /// It is in the table, both directions.
    Inserted(ConnId),
    /// The original key is a connection's already, perhaps that of a worker who was faster: use that one, and track
    /// the packet in it. Nothing was inserted.
    Exists(Hit),
    /// The reply key is a key of this connection: try another one. Nothing was inserted.
    ReplyTaken(Hit),
    /// There is no room. Nothing was inserted.
    Full,
}

/// Totals since creation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Connections inserted.
    pub inserted: u64,
    /// Connections removed, expired ones too.
    pub removed: u64,
    /// Connections removed because they had expired.
    pub expired: u64,
    /// Insertions that found their original key taken.
    pub existing: u64,
    /// Insertions that found their reply key taken.
    pub reply_taken: u64,
    /// Insertions that lost a race and were begun again.
    pub retried: u64,
    /// Insertions that found no room.
    pub full: u64,
    /// Connections removed to make room: closing or closed.
    pub evicted_closing: u64,
    /// Connections removed to make room that had not proved themselves.
    pub evicted_unproved: u64,
    /// Connections removed to make room that were established, and idle.
    pub evicted_idle: u64,
}

#[derive(Clone, Copy)]
enum Count {
    Inserted,
    Removed,
    Expired,
    Existing,
    ReplyTaken,
    Retried,
    Full,
    EvictedClosing,
    EvictedUnproved,
    EvictedIdle,
}
const COUNTS: usize = Count::EvictedIdle as usize + 1;

/// What one worker needs to change a table. Sendable, not shareable. It belongs to the table that made it.
pub struct Handle {
    stock: Stock,
    counters: WorkerCounters<COUNTS>,
    sweep: std::ops::Range<u32>,
    /// Where the next sample is taken: a xorshift generator (Marsaglia, "Xorshift RNGs", 2003).
    random: u64,
}

impl Handle {
    #[inline]
    fn count(&self, count: Count) {
        self.counters.add(count as usize, 1);
    }

    fn draw(&mut self) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 32) as u32
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

/// The connections of one address family.
pub struct Table<A: Address> {
    buckets: Lines<Bucket>,
    pub(crate) conns: Conns<A>,
    sizes: Sizes,
    /// Connections that were inserted, or are being, and not removed.
    live: Gauge,
    seed: u64,
    hasher: Hasher,
    indices: Arc<Indices>,
    domain: Arc<Domain>,
    counters: Counters<COUNTS>,
    cursor: CachePadded<AtomicU32>,
    offloader: OnceLock<std::sync::Arc<dyn Offloader>>,
}

/// The sizes of a table.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    /// Connections that it may have.
    capacity: u32,
    /// Connections that there is memory for: some more, since those that were removed are not free at once.
    pub(crate) conn_count: u32,
    pub(crate) bucket_count: u32,
    pub(crate) layout: Layout,
}

/// The upper 32 bits of `a * n`: spreads a over 0..n without a division (Lemire, "Fast random integer generation in an
/// interval", 2019).
#[inline(always)]
const fn scale(a: u32, n: u32) -> u32 {
    ((a as u64 * n as u64) >> 32) as u32
}

/// The least prime that is not below `n`.
fn prime_from(n: u32) -> u32 {
    let is_prime =
        |n: u32| n > 1 && (2..).take_while(|d| d * d <= u64::from(n)).all(|d| !u64::from(n).is_multiple_of(d));
    (n..).find(|n| is_prime(*n)).expect("there is a prime between n and 2n")
}

/// The buckets in which a key may live, from its home.
#[derive(Clone, Copy)]
struct Probe {
    bucket: u32,
    step: u32,
    count: u32,
}

impl Probe {
    #[inline(always)]
    fn next(&mut self) {
        let sum = self.bucket + self.step;
        self.bucket = if sum >= self.count { sum - self.count } else { sum };
    }
}

impl<A: Address> Table<A> {
    /// An empty table, whose memory is asked for now and used as connections come.
    ///
    /// # Panics
    /// Where the memory does not exist.
    pub fn new(config: TableConfig, domain: Arc<Domain>) -> Self {
        let sizes = Self::sizes(&config);
        Self::with(config, domain, Arrays::new(&sizes.layout), sizes)
    }

    pub(crate) fn sizes(config: &TableConfig) -> Sizes {
        let capacity = config.max_entries.clamp(1, MAX_ENTRIES);
        let conn_count = if cfg!(loom) { capacity } else { capacity + (capacity / 64).clamp(SPARE_AT_LEAST, 1 << 16) };
        // Two keys each, and twice as many slots as keys. A few buckets at least, for probing to have somewhere to go.
        let bucket_count = if cfg!(loom) { 3 } else { prime_from((4 * capacity).div_ceil(SLOTS as u32).max(7)) };
        Sizes { capacity, conn_count, bucket_count, layout: Layout::new::<A>(bucket_count, conn_count) }
    }

    pub(crate) fn with(config: TableConfig, domain: Arc<Domain>, arrays: Arrays, sizes: Sizes) -> Self {
        Self {
            buckets: arrays.buckets,
            conns: Conns::new(arrays.conns, arrays.tcp, config.tcp, config.timeouts.by_class()),
            sizes,
            live: Gauge::default(),
            seed: config.seed[0],
            hasher: Hasher::new(config.seed),
            indices: Indices::new(arrays.links, arrays.used, Arc::clone(&domain)),
            domain,
            counters: Counters::new(),
            cursor: CachePadded::new(AtomicU32::new(0)),
            offloader: OnceLock::new(),
        }
    }

    /// What one more worker needs to change the table.
    pub fn handle(&self) -> Handle {
        let counters = self.counters.join();
        // Each worker looks elsewhere (splitmix64's step and mixing).
        let mut random = self.seed.wrapping_add((counters.number().0 as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        random = (random ^ random >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        random = (random ^ random >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        // Not zero, from which the generator would never come away.
        Handle { stock: Stock::new(&self.indices), counters, sweep: 0..0, random: (random ^ random >> 31) | 1 }
    }

    /// Connections in the table, with those that have expired and are not swept yet.
    pub fn len(&self) -> usize {
        self.live.get() as usize
    }

    /// Whether there is no connection.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Connections that it can hold.
    pub fn capacity(&self) -> usize {
        self.sizes.capacity as usize
    }

    /// Totals over all workers. Takes a mutex: not for workers.
    pub fn counts(&self) -> Counts {
        let sums = self.counters.sums();
        let sum = |count: Count| sums[count as usize];
        Counts {
            inserted: sum(Count::Inserted),
            removed: sum(Count::Removed),
            expired: sum(Count::Expired),
            existing: sum(Count::Existing),
            reply_taken: sum(Count::ReplyTaken),
            retried: sum(Count::Retried),
            full: sum(Count::Full),
            evicted_closing: sum(Count::EvictedClosing),
            evicted_unproved: sum(Count::EvictedUnproved),
            evicted_idle: sum(Count::EvictedIdle),
        }
    }

    /// Bytes of memory that a full table uses.
    pub fn memory_bytes(&self) -> usize {
        self.sizes.layout.bytes
    }

    /// The hash of a key, for [`Table::prefetch`] and [`Table::lookup`].
    #[inline]
    pub fn hash(&self, key: &FlowKey<A>) -> Hash {
        self.hasher.hash(key)
    }

    /// Asks for the line that a lookup will read first.
    #[inline]
    pub fn prefetch(&self, hash: Hash) {
        self.buckets.prefetch(self.probe(hash).bucket as usize);
    }

    /// What the home bucket has for the tag of a hash: the first slot with it, or none. For use some packets after [`Table::prefetch`], in
    /// the turn in which [`Table::expected`] will be asked.
    #[inline]
    pub fn candidate(&self, hash: Hash, turn: &Turn<'_>) -> Candidate {
        debug_assert!(turn.is_of(&self.domain));
        let bucket = &self.buckets[self.probe(hash).bucket as usize];
        match bucket.matches(Self::tag(hash)).0.next() {
            Some(slot) => Candidate(bucket.slot(slot)),
            None => Candidate::NONE,
        }
    }

    /// Asks for the lines of a candidate that following a packet of that protocol will touch: its keys and state, and TCP's windows. Whether
    /// there is one.
    #[inline]
    pub fn prefetch_candidate(&self, candidate: Candidate, protocol: Protocol) -> bool {
        let Some((index, _)) = candidate.0.get() else { return false };
        self.conns.prefetch(index, protocol == Protocol::TCP);
        true
    }

    /// The candidate's connection, and which of its keys `key` is, if it has that key, is live and has not expired: then what [`Table::lookup`]
    /// finds. None says nothing: ask that.
    ///
    /// `candidate` must be of this table and of this turn.
    #[inline]
    pub fn expected(
        &self,
        candidate: Candidate,
        key: &FlowKey<A>,
        now: Tick,
        turn: &Turn<'_>,
    ) -> Option<(ConnRef<'_, A>, Direction)> {
        debug_assert!(turn.is_of(&self.domain));
        let (index, direction) = candidate.0.get()?;
        let conn = self.conn(ConnId(index));
        conn.is_expected(direction, key, now).then_some((conn, direction))
    }

    /// The connection that has a key in either direction, and has not expired.
    #[inline]
    pub fn lookup(&self, key: &FlowKey<A>, hash: Hash, now: Tick, turn: &Turn<'_>) -> Option<Hit> {
        debug_assert!(turn.is_of(&self.domain));
        self.search(key, hash, |index, direction, lines, state| {
            (state.is_live() && !self.conns.is_expired(state, lines, now))
                .then_some(Hit { conn: ConnId(index), direction })
        })
    }

    /// A connection that was found in this turn.
    #[inline]
    pub fn conn(&self, id: ConnId) -> ConnRef<'_, A> {
        ConnRef::new(&self.conns, id)
    }

    /// Makes room for one more connection at the limit: removes the one of a few that is worth least. `kept_free` connections
    /// are left to others, as the share of the host. Whether there is room now; to be called before an insertion.
    ///
    /// `is_privileged`: it is for a connection of the host itself. Others spare [`PRIVILEGED`] ones as long as there is anything else.
    ///
    /// # Panics
    /// Where `handle` is of another table.
    #[inline]
    pub fn make_room(
        &self,
        handle: &mut Handle,
        kept_free: u32,
        is_privileged: bool,
        now: Tick,
        turn: &Turn<'_>,
    ) -> bool {
        debug_assert!(turn.is_of(&self.domain));
        let limit = self.sizes.capacity - kept_free.min(self.sizes.capacity - 1);
        self.live.get() < limit || self.evict(handle, is_privileged, now)
    }

    #[cold]
    fn evict(&self, handle: &mut Handle, is_privileged: bool, now: Tick) -> bool {
        let used = self.indices.used();
        // Where there are few, all are looked at.
        let sample = if used <= SAMPLES * SAMPLE { used } else { SAMPLE };
        for number in 1..=SAMPLES {
            let spares_privileged = !is_privileged && number < SAMPLES;
            let start = scale(handle.draw(), used);
            let mut least: Option<(Count, u32, u32, State)> = None;
            for offset in 0..sample {
                let index = (start + offset) % used;
                let lines = self.conns.lines(index);
                let state = State(lines.state().load(Ordering::Acquire));
                if !state.is_live() {
                    continue;
                }
                let idle = now.since(lines.last_seen());
                let worth = match state.lifecycle() {
                    _ if idle >= self.conns.timeout_ticks(state) => Count::Expired,
                    Lifecycle::Closed => Count::EvictedClosing,
                    _ if spares_privileged && state.flags() & PRIVILEGED != 0 => continue,
                    Lifecycle::Closing => Count::EvictedClosing,
                    _ if !state.assured() => Count::EvictedUnproved,
                    _ if idle >= ACTIVE_TICKS => Count::EvictedIdle,
                    _ => continue,
                };
                if least.is_none_or(|(kind, longest, ..)| (worth as usize, longest) < (kind as usize, idle)) {
                    least = Some((worth, idle, index, state));
                }
            }
            // Who lost this one to another worker's change takes another sample.
            if let Some((kind, _, index, state)) = least
                && self.remove_from(handle, index, state).is_ok()
            {
                handle.count(kind);
                return true;
            }
        }
        handle.count(Count::Full);
        false
    }

    /// Puts a connection into the table, both directions or neither.
    ///
    /// # Panics
    /// Where `handle` is of another table.
    pub fn insert(&self, handle: &mut Handle, new: NewConn<A>, now: Tick, turn: &Turn<'_>) -> Insert {
        assert!(handle.stock.is_of(&self.indices), "a handle is used with the table that made it");
        debug_assert!(turn.is_of(&self.domain) && new.original.protocol == new.reply.protocol);
        let hashes = [self.hash(&new.original), self.hash(&new.reply)];
        loop {
            if let Some(hit) = self.holder(handle, &new.original, hashes[0], now) {
                handle.count(Count::Existing);
                return Insert::Exists(hit);
            }
            if let Some(holder) = self.holder(handle, &new.reply, hashes[1], now) {
                // Whoever took it since the look above may have taken the original key with it: the same flow, inserted
                // by another worker, or from the other end.
                if let Some(hit) = self.holder(handle, &new.original, hashes[0], now) {
                    handle.count(Count::Existing);
                    return Insert::Exists(hit);
                }
                handle.count(Count::ReplyTaken);
                return Insert::ReplyTaken(holder);
            }
            let Some(index) = self.allocate(handle) else {
                handle.count(Count::Full);
                return Insert::Full;
            };
            let filled = self.fill(index, &new, now);
            if !self.publish(index, filled, [&new.original, &new.reply], hashes) {
                self.give_back(handle, index);
                handle.count(Count::Full);
                return Insert::Full;
            }
            match self.validate(handle, index, now) {
                Phase::Aborted => {
                    self.unlink(index);
                    self.give_back(handle, index);
                    handle.count(Count::Retried);
                }
                // Live; or live and by now removed by another worker, whose packet then came after this one.
                _ => {
                    handle.count(Count::Inserted);
                    return Insert::Inserted(ConnId(index));
                }
            }
        }
    }

    /// Takes a connection that was found in this turn out of the table; `false` if another worker was faster. Its place is free
    /// some turns after the next [`Table::sweep`].
    ///
    /// # Panics
    /// Where `handle` is of another table.
    pub fn remove(&self, handle: &mut Handle, conn: ConnId, turn: &Turn<'_>) -> bool {
        debug_assert!(turn.is_of(&self.domain));
        let word = self.conns.lines(conn.0).state();
        let mut state = State(word.load(Ordering::Relaxed));
        while state.is_live() {
            match self.remove_from(handle, conn.0, state) {
                Ok(()) => return true,
                Err(found) => state = found,
            }
        }
        false
    }

    /// Takes a connection out of the table that was found in this turn, to leave its reply key to another, if it is still one that may be
    /// displaced ([`ConnRef::expendable`]); `false` where it is not, or where another worker was faster. Who changes it at the same time wins.
    ///
    /// # Panics
    /// Where `handle` is of another table.
    pub fn remove_expendable(
        &self,
        handle: &mut Handle,
        conn: ConnId,
        for_privileged: bool,
        now: Tick,
        turn: &Turn<'_>,
    ) -> bool {
        debug_assert!(turn.is_of(&self.domain));
        let lines = self.conns.lines(conn.0);
        let state = State(lines.state().load(Ordering::Acquire));
        state.is_live()
            && state.expendable(now.since(lines.last_seen()), for_privileged).is_some()
            && self.remove_from(handle, conn.0, state).is_ok()
    }

    /// Removes the expired among the next `budget` connections, and makes room of what was removed in earlier turns;
    /// how many expired. To be called once in each turn, and when idle: the workers share one cursor.
    ///
    /// # Panics
    /// Where `handle` is of another table.
    pub fn sweep(&self, handle: &mut Handle, now: Tick, budget: u32, turn: &Turn<'_>) -> usize {
        debug_assert!(turn.is_of(&self.domain));
        let mut swept = 0;
        for _ in 0..budget.min(self.indices.used()) {
            let Some(index) = handle.sweep.next().or_else(|| {
                handle.sweep = self.sweep_chunk();
                handle.sweep.next()
            }) else {
                break;
            };
            let lines = self.conns.lines(index);
            let state = State(lines.state().load(Ordering::Acquire));
            if state.is_live()
                && self.conns.is_expired(state, lines, now)
                && self.remove_from(handle, index, state).is_ok()
            {
                handle.count(Count::Expired);
                swept += 1;
            }
        }
        handle.stock.settle();
        swept
    }

    /// Who is told before a connection is removed that is [`OFFLOADED`]. Once, before any is.
    ///
    /// # Panics
    /// Where there is one already.
    pub fn offload_to(&self, offloader: std::sync::Arc<dyn Offloader>) {
        assert!(self.offloader.set(offloader).is_ok(), "a table hands its connections over to one only");
    }

    /// The connection of that identity, if it is still there; for the turn.
    pub fn identified<'t>(&'t self, identity: Identity, turn: &'t Turn<'_>) -> Option<ConnRef<'t, A>> {
        debug_assert!(turn.is_of(&self.domain));
        if identity.index >= self.indices.used() {
            return None;
        }
        let state = State(self.conns.lines(identity.index).state().load(Ordering::Acquire));
        let is_it = state.is_live() && state.incarnation() == identity.incarnation;
        is_it.then(|| ConnRef::new(&self.conns, ConnId(identity.index)))
    }

    /// Shows every connection that is live and has not expired, each as of one moment; those that come or go meanwhile
    /// perhaps. For any thread, in a turn or, better for long listings, outside of one: it disturbs no worker.
    pub fn for_each(&self, now: Tick, mut show: impl FnMut(&Entry<A>)) {
        (0..self.indices.used())
            .filter_map(|index| Entry::read(&self.conns, index, now))
            .for_each(|entry| show(&entry));
    }

    /// Connections have indices below this number, which only grows.
    pub fn used(&self) -> u32 {
        self.indices.used()
    }

    /// The connection with that index, if it is live and not expired, as of one moment. For any thread, as [`Table::for_each`].
    pub fn entry(&self, index: u32, now: Tick) -> Option<Entry<A>> {
        if index < self.indices.used() { Entry::read(&self.conns, index, now) } else { None }
    }

    /// Takes a connection that was listed out of the table; `false` if it is there no more.
    ///
    /// # Panics
    /// Where `handle` is of another table.
    pub fn remove_listed(&self, handle: &mut Handle, identity: Identity, turn: &Turn<'_>) -> bool {
        debug_assert!(turn.is_of(&self.domain));
        let word = self.conns.lines(identity.index).state();
        let mut state = State(word.load(Ordering::Acquire));
        while state.is_live() && state.incarnation() == identity.incarnation {
            match self.remove_from(handle, identity.index, state) {
                Ok(()) => return true,
                Err(found) => state = found,
            }
        }
        false
    }

    #[inline(always)]
    fn probe(&self, hash: Hash) -> Probe {
        let count = self.sizes.bucket_count;
        let bucket = scale((hash.0 >> 32) as u32, count);
        // Other bits than home's high ones and the tag's low ones, as far as there are others.
        let step = if count == 1 { 0 } else { scale((hash.0 >> 8) as u32, count - 1) + 1 };
        Probe { bucket, step, count }
    }

    /// Never 0, which marks an empty slot.
    #[inline(always)]
    const fn tag(hash: Hash) -> u8 {
        match hash.0 as u8 {
            0 => 1,
            tag => tag,
        }
    }

    /// Shows every connection of whatever phase with that key, until `found` returns something.
    #[inline(always)]
    fn search<R>(
        &self,
        key: &FlowKey<A>,
        hash: Hash,
        mut found: impl FnMut(u32, Direction, conn::Lines<'_, A>, State) -> Option<R>,
    ) -> Option<R> {
        let mut probe = self.probe(hash);
        let tag = Self::tag(hash);
        let mut in_bucket = |bucket: &Bucket| {
            let (slots, overflowed) = bucket.matches(tag);
            for slot in slots {
                let Some((index, direction)) = bucket.slot(slot).get() else { continue };
                let lines = self.conns.lines(index);
                let state = State(lines.state().load(Ordering::Acquire));
                if lines.has_key(direction, key)
                    && state.protocol() == key.protocol
                    && let Some(result) = found(index, direction, lines, state)
                {
                    return (Some(result), overflowed);
                }
            }
            (None, overflowed)
        };
        let (mut result, overflowed) = in_bucket(&self.buckets[probe.bucket as usize]);
        if overflowed && result.is_none() {
            for _ in 1..PROBES {
                probe.next();
                result = in_bucket(&self.buckets[probe.bucket as usize]).0;
                if result.is_some() {
                    break;
                }
            }
        }
        result
    }

    /// The live connection that has a key, after those that are only published were validated and expired ones removed.
    fn holder(&self, handle: &mut Handle, key: &FlowKey<A>, hash: Hash, now: Tick) -> Option<Hit> {
        self.search(key, hash, |index, direction, lines, state| {
            let phase = match state.phase() {
                Phase::Published => self.validate(handle, index, now),
                phase => phase,
            };
            (phase == Phase::Live && self.outlives(handle, index, lines, now))
                .then_some(Hit { conn: ConnId(index), direction })
        })
    }

    /// Whether a live connection stays: it is removed if it has expired.
    fn outlives(&self, handle: &mut Handle, index: u32, lines: conn::Lines<'_, A>, now: Tick) -> bool {
        let mut state = State(lines.state().load(Ordering::Acquire));
        while state.is_live() {
            if !self.conns.is_expired(state, lines, now) {
                return true;
            }
            match self.remove_from(handle, index, state) {
                Ok(()) => {
                    handle.count(Count::Expired);
                    return false;
                }
                Err(found) => state = found,
            }
        }
        false
    }

    /// Writes a connection under an index that nobody else knows.
    fn fill(&self, index: u32, new: &NewConn<A>, now: Tick) -> State {
        let lines = self.conns.lines(index);
        let before = State(lines.state().load(Ordering::Relaxed));
        let mut state = before.filling(new.original.protocol, new.attributes.flags, now);
        lines.state().store(state.0, Ordering::Relaxed);
        // Who reads one of the words that follow outside a turn must find that the state word has changed.
        fence(Ordering::Release);
        lines.fill([&new.original, &new.reply], &new.attributes, now);
        let timeout = match new.original.protocol {
            Protocol::TCP => {
                let (settings, timeouts) = self.conns.tcp_rules();
                let (tcp, tcp_state, timeout) = Tcp::open(&new.first, settings, timeouts);
                self.conns.tcp_line(index).fill(&tcp);
                state = state.in_tcp_state(tcp_state);
                timeout
            }
            Protocol::UDP => TimeoutClass::Udp,
            Protocol::ICMP => TimeoutClass::Icmp,
            Protocol::ICMPV6 => TimeoutClass::Icmpv6,
            Protocol::SCTP => {
                // What may not open one is not to come here; if it does, it is as good as over.
                let (sctp, sctp_state) = Sctp::open(&new.first.sctp).unwrap_or((Sctp::default(), SctpState::Closed));
                sctp.fill(self.conns.tcp_line(index));
                state = state.in_sctp_state(sctp_state);
                sctp_state.timeout_class()
            }
            _ => TimeoutClass::Generic,
        };
        state.in_timeout_class(timeout)
    }

    /// An index for one more connection, if the limit allows it.
    fn allocate(&self, handle: &mut Handle) -> Option<u32> {
        if !self.live.add_below(self.sizes.capacity) {
            return None;
        }
        let index = handle.stock.allocate();
        if index.is_none() {
            self.live.subtract();
        }
        index
    }

    fn give_back(&self, handle: &mut Handle, index: u32) {
        handle.stock.retire(index);
        self.live.subtract();
    }

    /// Takes over a connection of another table, its state with it; `false` if there is no room. Before any worker uses the table.
    #[cfg(not(loom))]
    pub(crate) fn adopt(&self, handle: &mut Handle, from: conn::Lines<'_, A>, tcp: &TcpLine) -> bool {
        let Some(index) = self.allocate(handle) else { return false };
        let state = State(from.state().load(Ordering::Relaxed));
        let lines = self.conns.lines(index);
        lines.fill_from(from);
        self.conns.tcp_line(index).fill_from(tcp);
        let keys = [Direction::Original, Direction::Reply].map(|direction| lines.key(direction, state.protocol()));
        lines.state().store(state.in_phase(Phase::Filling).0, Ordering::Relaxed);
        if !self.publish(index, state, [&keys[0], &keys[1]], keys.map(|key| self.hash(&key))) {
            self.give_back(handle, index);
            return false;
        }
        lines.state().store(state.0, Ordering::Release);
        handle.count(Count::Inserted);
        true
    }

    /// Puts both keys into buckets, and lets others validate; `false`, and nothing put, if there is no room.
    fn publish(&self, index: u32, filled: State, keys: [&FlowKey<A>; 2], hashes: [Hash; 2]) -> bool {
        let [original, reply] = [Direction::Original, Direction::Reply].map(|direction| SlotRef::new(index, direction));
        if !self.place(hashes[0], original) {
            return false;
        }
        // Who talks to themselves from and to one port has one key.
        if keys[0] != keys[1] && !self.place(hashes[1], reply) {
            self.displace(hashes[0], original);
            return false;
        }
        self.conns.lines(index).state().store(filled.in_phase(Phase::Published).0, Ordering::Release);
        true
    }

    /// Brings a published connection to its end, live or aborted, whoever's it is; the phase found at the end.
    fn validate(&self, handle: &mut Handle, index: u32, now: Tick) -> Phase {
        let lines = self.conns.lines(index);
        let word = lines.state();
        let state = State(word.load(Ordering::Acquire));
        if state.phase() != Phase::Published {
            return state.phase();
        }
        fence(Ordering::SeqCst);
        let [original, reply] =
            [Direction::Original, Direction::Reply].map(|direction| lines.key(direction, state.protocol()));
        let taken = self.is_held_by_another(handle, &original, index, now)
            || reply != original && self.is_held_by_another(handle, &reply, index, now);
        let end = state.in_phase(if taken { Phase::Aborted } else { Phase::Live });
        match word.compare_exchange(state.0, end.0, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => end.phase(),
            Err(found) => State(found).phase(),
        }
    }

    /// Whether a live connection other than `index` has a key, after those that stand behind `index` were aborted, and
    /// those that stand before it were brought to their end.
    fn is_held_by_another(&self, handle: &mut Handle, key: &FlowKey<A>, index: u32, now: Tick) -> bool {
        self.search(key, self.hash(key), |rival, _, lines, mut state| {
            if rival == index {
                return None;
            }
            loop {
                match state.phase() {
                    Phase::Live => return self.outlives(handle, rival, lines, now).then_some(()),
                    Phase::Published if rival < index => {
                        self.validate(handle, rival, now);
                        state = State(lines.state().load(Ordering::Acquire));
                    }
                    Phase::Published => {
                        let aborted = state.in_phase(Phase::Aborted);
                        match lines.state().compare_exchange(state.0, aborted.0, Ordering::AcqRel, Ordering::Acquire) {
                            Ok(_) => return None,
                            Err(found) => state = State(found),
                        }
                    }
                    Phase::Free | Phase::Filling | Phase::Aborted | Phase::Removed => return None,
                }
            }
        })
        .is_some()
    }

    /// Ends a live connection in the state `state`, or says in which other state it is.
    fn remove_from(&self, handle: &mut Handle, index: u32, state: State) -> Result<(), State> {
        assert!(handle.stock.is_of(&self.indices), "a handle is used with the table that made it");
        if state.flags() & OFFLOADED != 0
            && let Some(offloader) = self.offloader.get()
        {
            // Before: nobody carries on what is no connection any more. Where the exchange fails, it was taken back for nothing.
            offloader.take_back(self.conns.tcp_line(index).offload_slot().load(Ordering::Acquire));
        }
        let removed = state.in_phase(Phase::Removed);
        let word = self.conns.lines(index).state();
        word.compare_exchange(state.0, removed.0, Ordering::AcqRel, Ordering::Acquire).map_err(State)?;
        self.unlink(index);
        self.give_back(handle, index);
        handle.count(Count::Removed);
        Ok(())
    }

    /// Takes both keys out of their buckets. For the one thread that has ended, or inserted, the connection.
    fn unlink(&self, index: u32) {
        let lines = self.conns.lines(index);
        let protocol = State(lines.state().load(Ordering::Relaxed)).protocol();
        let [original, reply] = [Direction::Original, Direction::Reply].map(|direction| lines.key(direction, protocol));
        self.displace(self.hash(&original), SlotRef::new(index, Direction::Original));
        if reply != original {
            self.displace(self.hash(&reply), SlotRef::new(index, Direction::Reply));
        }
    }

    /// Puts a key into the first bucket that has room; `false` if none has.
    fn place(&self, hash: Hash, key: SlotRef) -> bool {
        let (tag, mut probe) = (Self::tag(hash), self.probe(hash));
        let home = &self.buckets[probe.bucket as usize];
        if home.claim(tag, key) {
            return true;
        }
        if !home.overflow() {
            return false;
        }
        for _ in 1..PROBES {
            probe.next();
            if self.buckets[probe.bucket as usize].claim(tag, key) {
                return true;
            }
        }
        home.end_overflow();
        false
    }

    /// Takes a key out of the bucket that has it.
    fn displace(&self, hash: Hash, key: SlotRef) {
        let (tag, mut probe) = (Self::tag(hash), self.probe(hash));
        let home = &self.buckets[probe.bucket as usize];
        if home.release(tag, key) {
            return;
        }
        for _ in 1..PROBES {
            probe.next();
            if self.buckets[probe.bucket as usize].release(tag, key) {
                home.end_overflow();
                return;
            }
        }
        debug_assert!(false, "a linked connection has its keys in its buckets");
    }

    fn sweep_chunk(&self) -> std::ops::Range<u32> {
        let used = self.indices.used();
        let advance = |start: u32| Some(if start + SWEEP_CHUNK >= used { 0 } else { start + SWEEP_CHUNK });
        let start =
            self.cursor.fetch_update(Ordering::Relaxed, Ordering::Relaxed, advance).unwrap_or_else(|start| start);
        start.min(used)..(start + SWEEP_CHUNK).min(used)
    }
}

impl<A: Address> fmt::Debug for Table<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table")
            .field("capacity", &self.sizes.capacity)
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use weir_packet::Ports;

    use super::*;

    fn config(max_entries: u32) -> TableConfig {
        TableConfig {
            max_entries,
            seed: [0x1234_5678_9abc_def0, 0x0fed_cba9_8765_4321],
            timeouts: Timeouts::default(),
            tcp: TcpSettings::default(),
        }
    }

    fn udp<A: Address>(client: u128, source: u16) -> NewConn<A> {
        let original = FlowKey {
            src: A::from_bits128(client),
            dst: A::from_bits128(0x0a60_0001),
            ports: Ports::new(source, 53),
            protocol: Protocol::UDP,
        };
        NewConn {
            original,
            reply: FlowKey { src: A::from_bits128(0x0af4_0001), ..original.invert() },
            attributes: Attributes::default(),
            first: Observed::default(),
        }
    }

    #[test]
    fn the_last_datagrams_of_a_flow_are_known_again() {
        fn check<A: Address>() {
            let domain = Domain::new();
            let (table, mut participant) = (Table::<A>::new(config(64), domain.clone()), domain.join());
            let mut handle = table.handle();
            let turn = participant.enter();
            let [one, other] = [1, 2].map(|client| {
                let Insert::Inserted(id) = table.insert(&mut handle, udp(client, 1), Tick(0), &turn) else { panic!() };
                table.conn(id)
            });
            let payload = |number: u8| vec![number; 40 + usize::from(number)];
            assert!(!one.is_noted(&payload(0)) && !one.is_noted(&[]));
            for number in 0..10 {
                one.note_datagram(&payload(number));
                let known = (0..10).filter(|of| one.is_noted(&payload(*of))).collect::<Vec<_>>();
                let oldest = (number + 1).saturating_sub(crate::tcp::NOTES as u8);
                assert_eq!(known, (oldest..=number).collect::<Vec<_>>());
                // A part of one, a longer one, and another flow's.
                let last = payload(number);
                assert!(!one.is_noted(&last[1..]) && !one.is_noted(&[&last[..], &[number]].concat()));
                assert!(!other.is_noted(&last));
            }
            // Known for as long as the turn is, also when it was removed; not by the next connection with its number.
            assert!(table.remove(&mut handle, one.id(), &turn) && one.is_noted(&payload(9)));
            drop(turn);
            for source in 2..2000 {
                let turn = participant.enter();
                table.sweep(&mut handle, Tick(0), 64, &turn);
                let Insert::Inserted(id) = table.insert(&mut handle, udp(9, source), Tick(0), &turn) else { panic!() };
                let next = table.conn(id);
                assert!(!next.is_noted(&payload(9)), "{id:?}");
                table.remove(&mut handle, id, &turn);
            }
        }
        check::<Ipv4Addr>();
        check::<Ipv6Addr>();
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks for much memory")]
    fn an_ipv4_connection_costs_at_most_160_bytes() {
        let domain = Domain::new();
        for max_entries in [262_144, 1 << 20] {
            let table = Table::<Ipv4Addr>::new(config(max_entries), domain.clone());
            let bytes = table.memory_bytes() as f64 / f64::from(max_entries);
            assert!(bytes <= 157.0, "{bytes} bytes for each of {max_entries}");
            let table = Table::<Ipv6Addr>::new(config(max_entries), domain.clone());
            let bytes = table.memory_bytes() as f64 / f64::from(max_entries);
            assert!(bytes <= 222.0, "{bytes} bytes for each of {max_entries}");
        }
    }

    #[test]
    fn capacities_are_taken_for_the_nearest_possible() {
        let mut domain = Domain::new().join();
        let table = Table::<Ipv4Addr>::new(config(0), domain.domain().clone());
        let mut handle = table.handle();
        let turn = domain.enter();
        assert!(matches!(table.insert(&mut handle, udp(1, 1), Tick(0), &turn), Insert::Inserted(_)));
        assert_eq!(table.insert(&mut handle, udp(2, 2), Tick(0), &turn), Insert::Full);
        assert_eq!((table.capacity(), table.len(), table.counts().full), (1, 1, 1));
    }

    #[test]
    fn probes_visit_different_buckets() {
        let table = Table::<Ipv4Addr>::new(config(1), Domain::new());
        for i in 0..if cfg!(miri) { 100 } else { 10_000u64 } {
            let mut probe = table.probe(Hash(i.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            let mut seen = 0u64;
            for _ in 0..PROBES {
                assert!(probe.bucket < table.sizes.bucket_count);
                assert_eq!(seen & 1 << probe.bucket, 0);
                seen |= 1 << probe.bucket;
                probe.next();
            }
        }
        assert_eq!((prime_from(7), prime_from(8), prime_from(90), prime_from(349_526)), (7, 11, 97, 349_529));
    }

    /// At full load every connection has its place, lookups find all, and after removal every line is clear.
    fn fills_and_empties<A: Address>() {
        let (count, rounds) = if cfg!(miri) { (40, 1) } else { (20_000, 3) };
        let domain = Domain::new();
        let mut participant = domain.join();
        let table = Table::<A>::new(config(count), domain);
        let mut handle = table.handle();
        let new = |i: u32| udp::<A>(u128::from(i / 60_000), (i % 60_000) as u16);
        for round in 0..rounds {
            let turn = participant.enter();
            for i in 0..count {
                let inserted = table.insert(&mut handle, new(i), Tick(0), &turn);
                assert!(matches!(inserted, Insert::Inserted(_)), "{i} in round {round}: {inserted:?}");
            }
            assert_eq!(table.insert(&mut handle, new(count), Tick(0), &turn), Insert::Full);
            let overflowed = table.buckets.iter().filter(|bucket| bucket.matches(1).1).count();
            assert!(overflowed > 0 || cfg!(miri), "some homes are full");
            let mut expected = 0;
            for i in 0..count {
                let new = new(i);
                let original =
                    table.lookup(&new.original, table.hash(&new.original), Tick(0), &turn).expect("original");
                let reply = table.lookup(&new.reply, table.hash(&new.reply), Tick(0), &turn).expect("reply");
                assert_eq!((original.direction, reply.direction), (Direction::Original, Direction::Reply));
                assert_eq!(original.conn, reply.conn);
                let conn = table.conn(original.conn);
                assert_eq!((conn.original(), conn.reply()), (new.original, new.reply));
                for (key, hit) in [(new.original, original), (new.reply, reply)] {
                    table.prefetch(table.hash(&key));
                    let candidate = table.candidate(table.hash(&key), &turn);
                    table.prefetch_candidate(candidate, key.protocol);
                    if let Some((conn, direction)) = table.expected(candidate, &key, Tick(0), &turn) {
                        assert_eq!((conn.id(), direction), (hit.conn, hit.direction));
                        assert_eq!(conn.leaves_with(direction, key.protocol), conn.key(direction.flip()).invert());
                        expected += 1;
                    }
                }
            }
            // The others: away from home, or behind another key with that tag.
            let of_hundred = 100 * expected / (2 * count);
            assert!((90..100).contains(&of_hundred) || cfg!(miri), "{of_hundred}% were where they were expected");
            for i in 0..count {
                let key = new(i).original;
                let hit = table.lookup(&key, table.hash(&key), Tick(0), &turn).expect("still there");
                assert!(table.remove(&mut handle, hit.conn, &turn) && !table.remove(&mut handle, hit.conn, &turn));
            }
            table.sweep(&mut handle, Tick(0), 0, &turn);
            assert!(table.is_empty() && table.buckets.iter().all(Bucket::is_clear));
        }
    }

    #[test]
    fn fills_and_empties_ipv4() {
        fills_and_empties::<Ipv4Addr>();
    }

    #[test]
    fn fills_and_empties_ipv6() {
        fills_and_empties::<Ipv6Addr>();
    }

    #[test]
    fn an_insertion_without_a_slot_leaves_no_trace() {
        let domain = Domain::new();
        let mut participant = domain.join();
        // Seven buckets for more connections than they have slots for: as if the hash had been broken.
        let mut table = Table::<Ipv4Addr>::new(config(200), domain);
        table.sizes.bucket_count = 7;
        let mut handle = table.handle();
        let turn = participant.enter();
        let results: Vec<_> = (0..60).map(|i| table.insert(&mut handle, udp(1, i), Tick(0), &turn)).collect();
        let inserted: Vec<_> = results
            .iter()
            .filter_map(|result| if let Insert::Inserted(conn) = result { Some(*conn) } else { None })
            .collect();
        assert!(inserted.len() <= 7 * SLOTS / 2 && inserted.len() > 30, "{} fit", inserted.len());
        assert!(results.contains(&Insert::Full) && table.len() == inserted.len());
        inserted.into_iter().for_each(|conn| assert!(table.remove(&mut handle, conn, &turn)));
        assert!(table.buckets.iter().all(Bucket::is_clear));
    }

    /// Who knows the seed can choose keys that all live in the same few buckets: more than fit are refused, others are not, nothing takes
    /// longer than [`PROBES`] buckets. Who does not know it has chosen them in vain.
    #[test]
    #[cfg_attr(miri, ignore = "a search through millions of keys")]
    fn keys_that_collide_fill_their_buckets_and_by_another_seed_do_not_collide() {
        let domain = Domain::new();
        let mut participant = domain.join();
        let table = Table::<Ipv4Addr>::new(config(256), domain.clone());
        let other = Table::<Ipv4Addr>::new(TableConfig { seed: [5, 6], ..config(256) }, domain);
        let place = |table: &Table<Ipv4Addr>, key: &FlowKey<Ipv4Addr>| {
            let hash = table.hash(key);
            let probe = table.probe(hash);
            (probe.bucket, probe.step, Table::<Ipv4Addr>::tag(hash))
        };
        // One home, one way on from there; some have one tag as well.
        let target = place(&table, &udp::<Ipv4Addr>(0, 0).original);
        let colliding: Vec<NewConn<Ipv4Addr>> = (0..=u64::MAX)
            .map(|i| udp::<Ipv4Addr>(u128::from(i >> 16), i as u16))
            .filter(|new| {
                let (bucket, step, _) = place(&table, &new.original);
                (bucket, step) == (target.0, target.1)
            })
            .take(2000)
            .collect();
        let elsewhere: std::collections::BTreeSet<_> =
            colliding.iter().map(|new| place(&other, &new.original)).collect();
        assert!(elsewhere.len() > 1900, "{} places by another seed", elsewhere.len());

        // A turn for each: what was removed, or did not find its place, is free again in later ones.
        let mut handle = table.handle();
        let mut insert = |table: &Table<Ipv4Addr>, handle: &mut Handle, new: NewConn<Ipv4Addr>| {
            let turn = participant.enter();
            table.sweep(handle, Tick(0), 0, &turn);
            assert!(table.make_room(handle, 0, true, Tick(0), &turn));
            table.insert(handle, new, Tick(0), &turn)
        };
        let mut inserted = Vec::new();
        for (i, new) in colliding.iter().enumerate() {
            match insert(&table, &mut handle, *new) {
                Insert::Inserted(_) => inserted.push(i),
                result => assert_eq!(result, Insert::Full),
            }
        }
        // Reply keys of others may have been there first, in a slot or two.
        assert!(inserted.len() <= PROBES * SLOTS && inserted.len() + 12 > PROBES * SLOTS, "{} fit", inserted.len());
        assert_eq!(table.counts().full as usize, 2000 - inserted.len());
        // Others find their place as ever, nearly all: some of them live in the same buckets.
        let others = (0..150).filter(|i| matches!(insert(&table, &mut handle, udp(1 << 31, *i)), Insert::Inserted(_)));
        assert!(others.count() > 145);
        let mut handle = other.handle();
        for new in &colliding {
            assert!(matches!(insert(&other, &mut handle, *new), Insert::Inserted(_)));
        }
        assert_eq!(other.len(), 256);
        let turn = participant.enter();
        for (i, new) in colliding.iter().enumerate() {
            let hit = table.lookup(&new.original, table.hash(&new.original), Tick(0), &turn);
            assert_eq!(hit.is_some(), inserted.contains(&i));
        }
    }

    #[test]
    fn one_key_for_both_directions() {
        let domain = Domain::new();
        let mut participant = domain.join();
        let table = Table::<Ipv4Addr>::new(config(10), domain);
        let mut handle = table.handle();
        let turn = participant.enter();
        let original = FlowKey { dst: Ipv4Addr::from(1), ..udp::<Ipv4Addr>(1, 53).original };
        assert_eq!(original.invert(), original);
        let new = NewConn { original, reply: original, ..udp(1, 53) };
        let Insert::Inserted(conn) = table.insert(&mut handle, new, Tick(0), &turn) else { panic!("room") };
        let hit = Hit { conn, direction: Direction::Original };
        assert_eq!(table.lookup(&original, table.hash(&original), Tick(0), &turn), Some(hit));
        assert_eq!(table.insert(&mut handle, new, Tick(0), &turn), Insert::Exists(hit));
        assert!(table.remove(&mut handle, conn, &turn) && table.buckets.iter().all(Bucket::is_clear));
    }

    #[test]
    #[cfg_attr(miri, ignore = "a thousand connections")]
    fn the_sweep_removes_what_has_expired_and_no_more() {
        let domain = Domain::new();
        let mut participant = domain.join();
        let table = Table::<Ipv4Addr>::new(config(5000), domain);
        let mut handle = table.handle();
        {
            let turn = participant.enter();
            for i in 0..1000 {
                let Insert::Inserted(conn) = table.insert(&mut handle, udp(1, i), Tick(0), &turn) else {
                    panic!("room")
                };
                if i % 4 == 0 {
                    table.conn(conn).touch(Tick(1));
                }
            }
        }
        let mut sweep = |now, budget| table.sweep(&mut handle, now, budget, &participant.enter());
        assert_eq!((0..20).map(|_| sweep(Tick(2999), 100)).sum::<usize>(), 0);
        assert_eq!(sweep(Tick(3000), 100), 75, "a sweep is bounded by its budget");
        assert_eq!((0..19).map(|_| sweep(Tick(3000), 100)).sum::<usize>(), 675);
        assert_eq!((0..20).map(|_| sweep(Tick(3001), 100)).sum::<usize>(), 250);
        assert_eq!((table.len(), table.counts().expired, table.counts().removed), (0, 1000, 1000));
    }

    /// Opens a TCP connection with packets up to its end: 1 SYN, 3 the handshake, 4 a RST too.
    fn tcp_conn(
        table: &Table<Ipv4Addr>,
        handle: &mut Handle,
        number: u16,
        packets: u8,
        now: Tick,
        turn: &Turn<'_>,
    ) -> ConnId {
        let segment = |tcp_flags, tcp_seq, tcp_ack| Observed {
            tcp_flags,
            tcp_seq,
            tcp_ack,
            tcp_window: 1000,
            ..Observed::default()
        };
        let protocol = Protocol::TCP;
        let udp = udp::<Ipv4Addr>(2, number);
        let original = FlowKey { protocol, ..udp.original };
        let new = NewConn { original, reply: FlowKey { protocol, ..udp.reply }, first: segment(2, 10, 0), ..udp };
        let Insert::Inserted(id) = table.insert(handle, new, now, turn) else { panic!("room") };
        let conn = table.conn(id);
        let rest = [
            (Direction::Reply, segment(0x12, 50, 11)),
            (Direction::Original, segment(0x10, 11, 51)),
            (Direction::Original, segment(0x04, 11, 0)),
        ];
        for (direction, segment) in rest.iter().take(usize::from(packets) - 1) {
            assert_eq!(conn.track(*direction, segment, now), crate::Tracked::Accept);
        }
        id
    }

    #[test]
    #[cfg_attr(miri, ignore = "hours: each insertion at the limit looks at many connections")]
    fn a_flood_displaces_what_is_worth_less_and_itself_but_no_active_flow() {
        let domain = Domain::new();
        let mut participant = domain.join();
        let each: u16 = 500;
        let all = 4 * usize::from(each);
        let table = Table::<Ipv4Addr>::new(config(all as u32), domain);
        let mut handle = table.handle();
        let (start, now) = (Tick(0), Tick(ACTIVE_TICKS + 1));
        let mut active = Vec::new();
        let turn = participant.enter();
        for i in 0..each {
            active.push(tcp_conn(&table, &mut handle, i, 3, now, &turn));
            tcp_conn(&table, &mut handle, 1000 + i, 3, start, &turn);
            tcp_conn(&table, &mut handle, 2000 + i, 2, now, &turn);
            tcp_conn(&table, &mut handle, 3000 + i, 4, now, &turn);
        }
        assert_eq!(
            table.insert(&mut handle, udp(9, 9), now, &turn),
            Insert::Full,
            "an insertion never makes room itself"
        );
        drop(turn);
        let mut kinds = [0; 3];
        let flood = 50_000u32;
        for i in 0..flood {
            let turn = participant.enter();
            assert!(table.make_room(&mut handle, 0, true, now, &turn), "flood packet {i}");
            let packet = udp(100 + u128::from(i / 50_000), (i % 50_000) as u16);
            assert!(matches!(table.insert(&mut handle, packet, now, &turn), Insert::Inserted(_)), "flood packet {i}");
            assert_eq!(table.len(), all);
            let counts = table.counts();
            kinds = [counts.evicted_closing, counts.evicted_unproved, counts.evicted_idle];
            if i == 499 {
                assert!(kinds[0] > 400, "closed ones go first: {kinds:?}");
            }
        }
        assert!(kinds[0] == u64::from(each));
        assert_eq!(kinds.iter().sum::<u64>(), u64::from(flood));
        assert!(active.iter().all(|id| table.conn(*id).is_live()), "no active flow is displaced");
        // What proved nothing goes before what did, as long as a sample has some of it.
        assert!(kinds[2] < 50, "{kinds:?}");
    }

    #[test]
    fn the_share_of_the_host_is_left_to_it_and_a_table_of_active_flows_takes_no_more() {
        let domain = Domain::new();
        let mut participant = domain.join();
        let table = Table::<Ipv4Addr>::new(config(100), domain);
        let mut handle = table.handle();
        let turn = participant.enter();
        for i in 0..100 {
            assert_eq!(table.make_room(&mut handle, 10, false, Tick(0), &turn), i < 90, "{i}");
            assert!(table.make_room(&mut handle, 0, true, Tick(0), &turn));
            tcp_conn(&table, &mut handle, i, 3, Tick(0), &turn);
        }
        assert!(!table.make_room(&mut handle, 0, true, Tick(0), &turn));
        assert!(table.counts().full > 0 && table.len() == 100);
        // A minute later one of them may go.
        assert!(table.make_room(&mut handle, 0, true, Tick(ACTIVE_TICKS), &turn));
        assert_eq!((table.counts().evicted_idle, table.len()), (1, 99));
    }

    #[test]
    #[cfg_attr(miri, ignore = "hours: each insertion at the limit looks at many connections")]
    fn a_flood_displaces_nothing_of_the_privileged_before_it_proves_itself() {
        let domain = Domain::new();
        let mut participant = domain.join();
        let (size, spared, flood, more) = (1000, 50, 20_000, 5000);
        let table = Table::<Ipv4Addr>::new(config(size), domain);
        let mut handle = table.handle();
        let privileged = |number| {
            let udp = udp(1, number);
            NewConn { attributes: Attributes { flags: PRIVILEGED, ..udp.attributes }, ..udp }
        };
        let turn = participant.enter();
        // The oldest, and each next to the other.
        for i in 0..spared {
            assert!(matches!(table.insert(&mut handle, privileged(i), Tick(0), &turn), Insert::Inserted(_)));
        }
        drop(turn);
        for i in 0..flood {
            let turn = participant.enter();
            // Also of those who may use the share, as pods that ask for their node.
            assert!(table.make_room(&mut handle, if i % 2 == 0 { 10 } else { 0 }, false, Tick(1), &turn));
            assert!(matches!(table.insert(&mut handle, udp(2, i), Tick(1), &turn), Insert::Inserted(_)));
        }
        let turn = participant.enter();
        let lives = |number| {
            let key = udp::<Ipv4Addr>(1, number).original;
            table.lookup(&key, table.hash(&key), Tick(1), &turn).is_some()
        };
        assert!((0..spared).all(lives));
        drop(turn);
        // Where there is nothing else, they make room too.
        for i in spared..spared + more {
            let turn = participant.enter();
            assert!(table.make_room(&mut handle, 0, true, Tick(2), &turn));
            assert!(matches!(table.insert(&mut handle, privileged(i), Tick(2), &turn), Insert::Inserted(_)));
        }
        let turn = participant.enter();
        assert!(table.make_room(&mut handle, 10, false, Tick(3), &turn));
        assert!(table.len() < size as usize);
    }

    #[test]
    fn what_was_listed_is_removed_but_never_a_later_connection_in_its_place() {
        let domain = Domain::new();
        let mut participant = domain.join();
        let table = Table::<Ipv4Addr>::new(config(1), domain);
        let mut handle = table.handle();
        let mut identities = Vec::new();
        for i in 0..3 {
            let turn = participant.enter();
            assert!(matches!(table.insert(&mut handle, udp(1, i), Tick(0), &turn), Insert::Inserted(_)));
            let mut listed = (0..table.used()).filter_map(|index| table.entry(index, Tick(0)));
            let entry = listed.next().expect("the one connection");
            assert_eq!((entry.original, listed.next()), (udp(1, i).original, None));
            for earlier in &identities {
                assert!(!table.remove_listed(&mut handle, *earlier, &turn) && table.len() == 1, "{earlier:?}");
            }
            assert!(table.remove_listed(&mut handle, entry.identity, &turn));
            assert!(!table.remove_listed(&mut handle, entry.identity, &turn) && table.is_empty());
            identities.push(entry.identity);
        }
        assert_eq!(table.entry(table.used(), Tick(0)), None);
    }

    #[test]
    #[should_panic(expected = "the table that made it")]
    fn a_handle_of_another_table_is_refused() {
        let domain = Domain::new();
        let mut participant = domain.join();
        let tables = [Table::<Ipv4Addr>::new(config(1), domain.clone()), Table::new(config(1), domain)];
        let _ = tables[0].insert(&mut tables[1].handle(), udp(1, 1), Tick(0), &participant.enter());
    }
}
