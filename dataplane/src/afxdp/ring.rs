//! The four rings of a socket.
//!
//! # Theory
//!
//! *What.* A ring is an array of entries, a power of two of them, between one producer and one consumer. Of each of the
//! four one side is ours and the other the kernel's: we produce into [`FillRing`] (chunks to receive into) and [`TxRing`], and consume
//! [`RxRing`] and [`CompletionRing`] (chunks that were sent). All are thin faces of one private [`Ring`].
//!
//! *Layout.* (XDP_MMAP_OFFSETS) a u32 producer index, a u32 consumer index, a u32 of flags, the entries: u64 addresses in
//! fill and completion rings, `xdp_desc` (address, length, options) in rx and tx rings. Addresses count from the UMEM's start.
//! Indices run freely through all of u32; an entry's place is its index modulo the ring's size.
//!
//! *Invariants.* (1) 0 <= producer - consumer <= size. (2) Entries in [consumer, producer) belong to the consumer, the others to
//! the producer. (3) Each side writes its own index only. (4) Every chunk is in one place: a [`Chunk`] is
//! move-only, pushing it ends it, and the kernel hands out each chunk once that it was given.
//!
//! *Memory ordering.* An index is published with a release store after its entries were written or read, and the other side's is
//! loaded with acquire before the entries are. The other side's index is cached, and loaded again only where the cached one says that
//! there is not enough, so that a turn costs one shared load. Flags are a hint, read relaxed: they are read again in each turn.
//!
//! *Thread safety.* One thread at a time; the kernel is the other party. The indices are core's atomics, not weir-sync's: they lie in the
//! kernel's memory, where loom's cannot.
//!
//! *References.* Documentation/networking/af_xdp.rst; net/xdp/xsk_queue.h describes the same protocol from the kernel's side.

use core::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, Release},
};
use std::{io, os::fd::BorrowedFd, ptr::NonNull};

use super::{
    chunk::Chunk,
    sys::{Mapping, PAGE_BYTES, RingKind, RingOffsets, SocketOffsets},
};
use crate::frame::FRAME_BYTES;

/// The largest rx or tx ring: a slip in a configuration must not ask for gigabytes.
pub const MAX_RING_ENTRIES: u32 = 1 << 15;

/// One ring seen from one of its sides.
#[derive(Debug)]
struct Ring<T> {
    producer: NonNull<u32>,
    consumer: NonNull<u32>,
    flags: NonNull<u32>,
    entries: NonNull<T>,
    size: u32,
    /// Our own index including what is not published yet, and the other side's as last loaded.
    cached_producer: u32,
    cached_consumer: u32,
}

// SAFETY: the pointers are to a mapping of the process; whoever owns the Ring is its side's only user.
unsafe impl<T: Send> Send for Ring<T> {}

impl<T: Copy> Ring<T> {
    /// The ring of `size` entries in the memory at `base`, from its current indices on.
    ///
    /// # Safety
    /// `base` is aligned for T and u32, and valid for the parts of the ring at `offsets`, for as long as the ring is used. Nobody
    /// else uses this side of it, and whoever uses the other side keeps the invariants of the module.
    unsafe fn over(base: NonNull<u8>, offsets: RingOffsets, size: u32) -> Self {
        assert!(size.is_power_of_two(), "a ring has a power of two of entries");
        // SAFETY: the caller says that the parts lie within valid memory.
        let (producer, consumer, flags, entries) = unsafe {
            (
                base.add(offsets.producer).cast(),
                base.add(offsets.consumer).cast(),
                base.add(offsets.flags).cast(),
                base.add(offsets.entries).cast(),
            )
        };
        let mut ring = Self { producer, consumer, flags, entries, size, cached_producer: 0, cached_consumer: 0 };
        ring.cached_producer = ring.shared(ring.producer).load(Acquire);
        ring.cached_consumer = ring.shared(ring.consumer).load(Acquire);
        ring
    }

    #[inline]
    fn shared(&self, index: NonNull<u32>) -> &AtomicU32 {
        // SAFETY: `over` was given valid, aligned memory, and all parties access indices and flags atomically.
        unsafe { AtomicU32::from_ptr(index.as_ptr()) }
    }

    #[inline]
    fn entry(&self, index: u32) -> NonNull<T> {
        // SAFETY: the masked index is less than the size of the ring's array.
        unsafe { self.entries.add((index & (self.size - 1)) as usize) }
    }

    /// As producer: how many entries can be written, at least `wanted` if there are so many.
    #[inline]
    fn free_slots(&mut self, wanted: u32) -> u32 {
        let free = self.size - self.cached_producer.wrapping_sub(self.cached_consumer);
        if free >= wanted {
            return free;
        }
        self.cached_consumer = self.shared(self.consumer).load(Acquire);
        self.size - self.cached_producer.wrapping_sub(self.cached_consumer)
    }

    /// As producer: writes the next entry, which the other side sees after [`Self::publish`]. `free_slots` has said that
    /// there is room.
    #[inline]
    fn write(&mut self, entry: T) {
        debug_assert!(self.cached_producer.wrapping_sub(self.cached_consumer) < self.size, "the ring is full");
        // SAFETY: the entry's memory is valid, and belongs to the producer (invariant 2).
        unsafe { self.entry(self.cached_producer).write(entry) };
        self.cached_producer = self.cached_producer.wrapping_add(1);
    }

    #[inline]
    fn publish(&mut self) {
        self.shared(self.producer).store(self.cached_producer, Release);
    }

    /// As consumer: how many entries can be read, at most `limit`.
    #[inline]
    fn available(&mut self, limit: u32) -> u32 {
        let ready = self.cached_producer.wrapping_sub(self.cached_consumer);
        if ready >= limit {
            return limit;
        }
        self.cached_producer = self.shared(self.producer).load(Acquire);
        self.cached_producer.wrapping_sub(self.cached_consumer).min(limit)
    }

    /// As consumer: the next entry; the other side gets its place back after [`Self::release`]. `available` has said that there is one.
    #[inline]
    fn read(&mut self) -> T {
        debug_assert_ne!(self.cached_producer, self.cached_consumer, "the ring is empty");
        // SAFETY: the entry's memory is valid, was written before its index was published, and belongs to the consumer (invariant 2).
        let entry = unsafe { self.entry(self.cached_consumer).read() };
        self.cached_consumer = self.cached_consumer.wrapping_add(1);
        entry
    }

    /// As consumer: the entry that is read after `ahead` others. `available` has said that there is one.
    #[inline]
    fn peek(&self, ahead: u32) -> T {
        let index = self.cached_consumer.wrapping_add(ahead);
        debug_assert!(self.cached_producer.wrapping_sub(index).wrapping_sub(1) < self.size, "the entry is not there");
        // SAFETY: as in `read`.
        unsafe { self.entry(index).read() }
    }

    #[inline]
    fn release(&mut self) {
        self.shared(self.consumer).store(self.cached_consumer, Release);
    }

    /// Entries that lie in the ring now, whoever asks.
    fn lying(&self) -> u32 {
        let consumer = self.shared(self.consumer).load(Acquire);
        self.shared(self.producer).load(Acquire).wrapping_sub(consumer)
    }

    #[inline]
    fn needs_wakeup(&self) -> bool {
        self.shared(self.flags).load(Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// Bytes of the mapping of a ring with `size` entries.
fn mapping_bytes<T>(offsets: RingOffsets, size: u32) -> usize {
    offsets.entries + size as usize * size_of::<T>()
}

/// Maps one ring of a socket.
///
/// # Safety
/// `size` is the size that the socket's ring of this kind was made with, and nobody else uses our side of it.
unsafe fn map<T: Copy>(
    socket: BorrowedFd<'_>,
    offsets: &SocketOffsets,
    kind: RingKind,
    size: u32,
) -> io::Result<(Ring<T>, Mapping)> {
    let offsets = offsets.ring(kind);
    let memory = Mapping::of_ring(socket, kind, mapping_bytes::<T>(offsets, size))?;
    // SAFETY: the mapping holds the ring that the kernel describes by `offsets`, and lives beside it; the caller vouches for the rest.
    let ring = unsafe { Ring::over(memory.base(), offsets, size) };
    Ok((ring, memory))
}

/// The rings of one socket.
#[derive(Debug)]
pub(super) struct Rings {
    pub fill: FillRing,
    pub completion: CompletionRing,
    pub rx: RxRing,
    pub tx: TxRing,
}

/// Entries of each ring of a socket; powers of two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RingEntries {
    pub fill: u32,
    pub completion: u32,
    pub rx: u32,
    pub tx: u32,
}

impl Rings {
    /// The rings of a bound socket.
    ///
    /// # Safety
    /// The socket's rings were made with these numbers of entries, nobody else produces or consumes on our side, and every chunk
    /// that is pushed belongs to the socket's UMEM.
    pub unsafe fn of(socket: BorrowedFd<'_>, entries: RingEntries) -> io::Result<Self> {
        let offsets = SocketOffsets::of(socket)?;
        // SAFETY: the caller vouches for sizes and exclusiveness of all four.
        unsafe {
            let (ring, memory) = map(socket, &offsets, RingKind::Fill, entries.fill)?;
            let fill = FillRing { ring, memory };
            let (ring, memory) = map(socket, &offsets, RingKind::Completion, entries.completion)?;
            let completion = CompletionRing { ring, memory };
            let (ring, memory) = map(socket, &offsets, RingKind::Rx, entries.rx)?;
            let rx = RxRing { ring, memory };
            let (ring, memory) = map(socket, &offsets, RingKind::Tx, entries.tx)?;
            let tx = TxRing { ring, memory };
            Ok(Self { fill, completion, rx, tx })
        }
    }

    /// Chunks that the kernel holds to receive into, or has filled and we have not looked at. Each fill entry comes back as one rx
    /// entry, and both indices began at 0, so it is the difference of ours.
    #[inline]
    pub fn receiving(&self) -> u32 {
        self.fill.ring.cached_producer.wrapping_sub(self.rx.ring.cached_consumer)
    }

    /// Chunks that were pushed to be sent, and whose completion we have not seen.
    #[inline]
    pub fn sending(&self) -> u32 {
        self.tx.ring.cached_producer.wrapping_sub(self.completion.ring.cached_consumer)
    }

    /// Chunks that lie in one of the rings, as their indices say. When no packet is underway in the kernel it is
    /// `receiving + sending`.
    pub fn lying(&self) -> u32 {
        self.fill.ring.lying() + self.rx.ring.lying() + self.tx.ring.lying() + self.completion.ring.lying()
    }

    /// Bytes of ring memory, each ring in whole pages.
    pub fn mapped_bytes(&self) -> usize {
        [&self.fill.memory, &self.completion.memory, &self.rx.memory, &self.tx.memory]
            .iter()
            .map(|memory| memory.bytes().next_multiple_of(PAGE_BYTES))
            .sum()
    }
}

/// Chunks for the kernel to receive into: ours to produce.
#[derive(Debug)]
pub(super) struct FillRing {
    ring: Ring<u64>,
    memory: Mapping,
}

impl FillRing {
    /// Moves up to `count` chunks from the end of `free` into the ring; how many there were, and were room for.
    #[inline]
    pub fn fill(&mut self, free: &mut Vec<Chunk>, count: u32) -> u32 {
        let count = count.min(free.len() as u32);
        let count = self.ring.free_slots(count).min(count);
        if count == 0 {
            return 0;
        }
        for chunk in free.drain(free.len() - count as usize..) {
            self.ring.write(chunk.into_address());
        }
        self.ring.publish();
        count
    }

    /// Whether the driver sleeps and looks at the ring only when it is woken.
    #[inline]
    pub fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

/// Chunks whose packets were sent: ours to consume.
#[derive(Debug)]
pub(super) struct CompletionRing {
    ring: Ring<u64>,
    memory: Mapping,
}

impl CompletionRing {
    /// Moves all sent chunks to the end of `free`; how many there were.
    #[inline]
    pub fn drain(&mut self, free: &mut Vec<Chunk>) -> u32 {
        let count = self.ring.available(self.ring.size);
        if count == 0 {
            return 0;
        }
        for _ in 0..count {
            let address = self.ring.read();
            // SAFETY: the kernel is done with it, and names each chunk once that we have pushed to the tx ring (invariant 4).
            free.push(unsafe { Chunk::at(address) });
        }
        self.ring.release();
        count
    }
}

/// What was received into a chunk, a packet or a part of one: `len` bytes from `start`.
#[derive(Debug)]
pub(super) struct Received {
    pub chunk: Chunk,
    pub start: u16,
    pub len: u16,
}

/// Received packets, each of one descriptor, or of several that lie one after the other: ours to consume.
#[derive(Debug)]
pub(super) struct RxRing {
    ring: Ring<libc::xdp_desc>,
    memory: Mapping,
}

impl RxRing {
    /// Hands up to `limit` received packets, which have one descriptor each, to `each`; how many.
    #[inline]
    pub fn receive(&mut self, limit: u32, mut each: impl FnMut(Received)) -> u32 {
        let count = self.ring.available(limit);
        if count == 0 {
            return 0;
        }
        for _ in 0..count {
            each(self.read());
        }
        self.ring.release();
        count
    }

    /// How many descriptors the next packet has; 0 where not all of it has come.
    #[inline]
    pub fn next_packet(&mut self) -> u32 {
        let mut count = 1;
        while self.ring.available(count) == count {
            if self.ring.peek(count - 1).options & libc::XDP_PKT_CONTD == 0 {
                return count;
            }
            count += 1;
        }
        0
    }

    /// The next descriptor's; [`Self::next_packet`] has said that there is one. The kernel gets its place back after [`Self::release`].
    #[inline]
    pub fn read(&mut self) -> Received {
        let descriptor = self.ring.read();
        // SAFETY: the kernel is done with it, and names each chunk once that we have pushed to the fill ring (invariant 4).
        let chunk = unsafe { Chunk::at(descriptor.addr) };
        let start = (descriptor.addr % FRAME_BYTES as u64) as u16;
        Received { chunk, start, len: descriptor.len as u16 }
    }

    #[inline]
    pub fn release(&mut self) {
        self.ring.release();
    }
}

/// Packets to be sent: ours to produce.
#[derive(Debug)]
pub(super) struct TxRing {
    ring: Ring<libc::xdp_desc>,
    memory: Mapping,
}

impl TxRing {
    /// How many of `wanted` descriptors the ring has room for.
    #[inline]
    pub fn room(&mut self, wanted: u32) -> u32 {
        self.ring.free_slots(wanted).min(wanted)
    }

    /// Adds a packet's next part, `len` bytes from `start` in `chunk`, after which there may be `more`; the kernel sees it after
    /// [`Self::publish`], and no packet may be cut in two by that. [`Self::room`] has said that it fits.
    #[inline]
    pub fn push(&mut self, chunk: Chunk, start: u16, len: u16, more: bool) {
        // The kernel skips an invalid descriptor without completing it: its chunk would be lost.
        debug_assert!(
            len > 0 && usize::from(start) + usize::from(len) <= FRAME_BYTES,
            "a descriptor lies within its chunk"
        );
        let addr = chunk.into_address() + u64::from(start);
        let options = if more { libc::XDP_PKT_CONTD } else { 0 };
        self.ring.write(libc::xdp_desc { addr, len: u32::from(len), options });
    }

    #[inline]
    pub fn publish(&mut self) {
        self.ring.publish();
    }

    /// Published descriptors that the kernel has not taken yet.
    #[inline]
    pub fn untaken(&mut self) -> u32 {
        self.ring.size - self.ring.free_slots(self.ring.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFSETS: RingOffsets = RingOffsets { producer: 0, consumer: 64, flags: 128, entries: 192 };

    /// Our side's and the kernel's side of one ring whose indices both stand at `first`.
    fn both_sides<T: Copy>(size: u32, first: u32) -> (Ring<T>, Ring<T>, Mapping) {
        let memory = Mapping::anonymous(mapping_bytes::<T>(OFFSETS, size)).unwrap();
        for offset in [OFFSETS.producer, OFFSETS.consumer] {
            // SAFETY: the offsets lie within the mapping, which nobody else knows yet.
            unsafe { memory.base().add(offset).cast::<u32>().write(first) };
        }
        // SAFETY: the tests keep the memory as long as the rings, and use each side from one thread.
        let [ours, kernels] = [(), ()].map(|()| unsafe { Ring::over(memory.base(), OFFSETS, size) });
        (ours, kernels, memory)
    }

    /// The chunks with these numbers.
    fn chunks(numbers: std::ops::Range<u64>) -> Vec<Chunk> {
        // SAFETY: no memory stands behind the chunks of these tests.
        numbers.map(|number| unsafe { Chunk::at(number * FRAME_BYTES as u64) }).collect()
    }

    fn addresses(chunks: Vec<Chunk>) -> Vec<u64> {
        chunks.into_iter().map(Chunk::into_address).collect()
    }

    /// Indices that are about to overflow must change nothing.
    const FIRST_INDICES: [u32; 3] = [0, 5, u32::MAX - 2];

    #[test]
    fn the_kernel_sees_entries_once_they_are_published() {
        for first in FIRST_INDICES {
            let (mut ours, mut kernels, _memory) = both_sides::<u64>(4, first);
            assert_eq!(ours.free_slots(4), 4);
            ours.write(10);
            ours.write(20);
            assert_eq!(kernels.available(8), 0, "not published");
            ours.publish();
            assert_eq!((kernels.available(1), kernels.available(8)), (1, 2));
            assert_eq!((kernels.read(), kernels.read()), (10, 20));
            assert_eq!((ours.free_slots(4), ours.lying()), (2, 2), "read, but not released");
            kernels.release();
            assert_eq!((ours.free_slots(4), ours.lying()), (4, 0));
        }
    }

    #[test]
    fn a_ring_holds_as_many_entries_as_it_has() {
        for first in FIRST_INDICES {
            let (mut ours, mut kernels, _memory) = both_sides::<u64>(4, first);
            for value in 0..4 {
                assert_eq!(ours.free_slots(1), 4 - value as u32);
                ours.write(value);
            }
            ours.publish();
            assert_eq!(ours.free_slots(1), 0);
            let read: Vec<u64> = (0..kernels.available(9)).map(|_| kernels.read()).collect();
            assert_eq!(read, [0, 1, 2, 3]);
        }
    }

    #[test]
    fn a_ring_is_taken_over_where_it_stands() {
        let (mut ours, mut kernels, memory) = both_sides::<u64>(4, 7);
        ours.write(1);
        ours.publish();
        assert_eq!(kernels.available(1), 1);
        // SAFETY: `ours` is not used from here on.
        let mut successor = unsafe { Ring::<u64>::over(memory.base(), OFFSETS, 4) };
        assert_eq!(successor.free_slots(4), 3);
        successor.write(2);
        successor.publish();
        assert_eq!((kernels.available(4), kernels.read(), kernels.read()), (2, 1, 2));
    }

    #[test]
    fn filling_takes_from_the_end_what_there_is_and_fits() {
        let (ring, mut kernels, memory) = both_sides::<u64>(4, u32::MAX);
        let mut fill = FillRing { ring, memory };
        let mut free = chunks(0..6);
        assert_eq!(fill.fill(&mut free, 3), 3);
        assert_eq!(fill.fill(&mut free, 3), 1, "one place was left");
        assert_eq!(fill.fill(&mut free, 3), 0);
        assert_eq!(addresses(free), [0, 2048]);
        let read: Vec<u64> = (0..kernels.available(9)).map(|_| kernels.read()).collect();
        assert_eq!(read, [3 * 2048, 4 * 2048, 5 * 2048, 2 * 2048]);
        kernels.release();
        assert_eq!(fill.fill(&mut chunks(6..7), 3), 1, "no more than there are");
    }

    #[test]
    fn completions_name_chunks_whatever_address_was_sent() {
        let (mut kernels, ring, memory) = both_sides::<u64>(4, u32::MAX);
        let mut completion = CompletionRing { ring, memory };
        let mut free = chunks(0..1);
        assert_eq!(completion.drain(&mut free), 0);
        for address in [2048 + 236, 3 * 2048 + 256] {
            kernels.write(address);
        }
        kernels.publish();
        assert_eq!(completion.drain(&mut free), 2);
        assert_eq!(addresses(free), [0, 2048, 3 * 2048]);
        assert_eq!(kernels.free_slots(4), 4);
    }

    #[test]
    fn received_packets_are_split_into_chunk_and_start() {
        let (mut kernels, ring, memory) = both_sides::<libc::xdp_desc>(4, u32::MAX);
        let mut rx = RxRing { ring, memory };
        for number in 1..=3 {
            kernels.write(libc::xdp_desc { addr: number * 2048 + 256, len: 60 + number as u32, options: 0 });
        }
        kernels.publish();
        let mut seen = Vec::new();
        let mut receive = |limit| rx.receive(limit, |r| seen.push((r.chunk.into_address(), r.start, r.len)));
        assert_eq!((receive(2), receive(2), receive(2)), (2, 1, 0));
        assert_eq!(seen, [(2048, 256, 61), (4096, 256, 62), (6144, 256, 63)]);
        assert_eq!(kernels.free_slots(4), 4);
    }

    #[test]
    fn packets_are_sent_from_any_place_in_their_chunk() {
        let (ring, mut kernels, memory) = both_sides::<libc::xdp_desc>(2, u32::MAX);
        let mut tx = TxRing { ring, memory };
        let mut packets = chunks(4..6);
        assert_eq!(tx.room(1), 1);
        tx.push(packets.pop().unwrap(), 236, 1514, false);
        tx.push(packets.pop().unwrap(), 0, 2048, false);
        assert_eq!(tx.room(1), 0);
        tx.publish();
        assert_eq!(tx.untaken(), 2);
        assert_eq!(kernels.available(4), 2);
        let sent = [kernels.read(), kernels.read()].map(|d| (d.addr, d.len, d.options));
        assert_eq!(sent, [(5 * 2048 + 236, 1514, 0), (4 * 2048, 2048, 0)]);
        kernels.release();
        assert_eq!((tx.room(1), tx.room(9)), (1, 2));
        assert_eq!(tx.untaken(), 0);
    }

    #[test]
    fn a_packet_of_several_descriptors_is_received_when_all_have_come() {
        for first in FIRST_INDICES {
            let (mut kernels, ring, memory) = both_sides::<libc::xdp_desc>(8, first);
            let mut rx = RxRing { ring, memory };
            let mut came = |number: u64, options| {
                kernels.write(libc::xdp_desc { addr: number * 2048 + 256, len: number as u32, options });
                kernels.publish();
            };
            assert_eq!(rx.next_packet(), 0);
            came(1, libc::XDP_PKT_CONTD);
            assert_eq!(rx.next_packet(), 0);
            came(2, libc::XDP_PKT_CONTD);
            came(3, 0);
            came(4, 0);
            came(5, libc::XDP_PKT_CONTD);
            assert_eq!(rx.next_packet(), 3);
            assert_eq!([rx.read(), rx.read(), rx.read()].map(|part| part.len), [1, 2, 3]);
            assert_eq!((rx.next_packet(), rx.read().len, rx.next_packet()), (1, 4, 0));
            came(6, 0);
            assert_eq!(rx.next_packet(), 2);
            rx.release();
            assert_eq!(kernels.free_slots(8), 6, "the last packet was not read");
        }
    }

    #[test]
    fn all_but_the_last_descriptor_say_that_the_packet_goes_on() {
        let (ring, mut kernels, memory) = both_sides::<libc::xdp_desc>(4, u32::MAX);
        let mut tx = TxRing { ring, memory };
        assert_eq!(tx.room(9), 4);
        for (chunk, more) in chunks(0..3).into_iter().zip([true, false, false]) {
            tx.push(chunk, 256, 60, more);
        }
        tx.publish();
        assert_eq!(kernels.available(4), 3);
        assert_eq!([kernels.read(), kernels.read(), kernels.read()].map(|d| d.options), [libc::XDP_PKT_CONTD, 0, 0]);
    }

    #[test]
    fn the_wakeup_flag_is_seen() {
        let (ring, _kernels, memory) = both_sides::<u64>(2, 0);
        let flags = memory.base();
        let fill = FillRing { ring, memory };
        assert!(!fill.needs_wakeup());
        // SAFETY: the flags lie within the mapping, and are accessed atomically by both.
        unsafe { AtomicU32::from_ptr(flags.add(OFFSETS.flags).cast().as_ptr()) }.store(1, Relaxed);
        assert!(fill.needs_wakeup());
    }

    /// Two threads, as we and the kernel are: every entry arrives once, whole and in order. What miri checks is the ordering: without the
    /// release and acquire pair it reports a data race on the entries.
    #[test]
    fn entries_cross_between_threads_whole_and_in_order() {
        let (mut ours, mut kernels, _memory) = both_sides::<libc::xdp_desc>(8, u32::MAX - 20);
        let count: u64 = if cfg!(miri) { 100 } else { 200_000 };
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut next = 0;
                while next < count {
                    let room = u64::from(ours.free_slots(3)).min(count - next);
                    for _ in 0..room {
                        ours.write(libc::xdp_desc { addr: next, len: !next as u32, options: next as u32 });
                        next += 1;
                    }
                    ours.publish();
                    if room == 0 {
                        std::thread::yield_now();
                    }
                }
            });
            let mut expected = 0;
            while expected < count {
                let ready = kernels.available(5);
                for _ in 0..ready {
                    let entry = kernels.read();
                    assert_eq!((entry.addr, entry.len, entry.options), (expected, !expected as u32, expected as u32));
                    expected += 1;
                }
                kernels.release();
                if ready == 0 {
                    std::thread::yield_now();
                }
            }
        });
    }
}
