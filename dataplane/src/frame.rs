//! Frames, and packets made of them.
//!
//! # Theory
//!
//! *What.* An [`Arena`] is one region of memory cut into chunks of [`FRAME_BYTES`]; for AF_XDP it is the UMEM, for the
//! memory driver a heap block. A [`Frame`] is the exclusive right to one chunk. It is move-only: whoever holds it may
//! read and write the chunk, nobody else can. The kernel holds the frames that lie in its rings.
//!
//! A [`Packet`] has one frame, which begins with all of its headers, and, where it is longer than a frame holds, a *tail* of further ones.
//! A packet is moved several times on its way, and nearly all have no tail. So the packet knows only the first chunk of its tail and the
//! tail's bytes; how the tail goes on stands in the arena, in a link for each chunk.
//!
//! *Invariants.* (1) For each chunk of an arena there is at most one right: a `Frame`, or a place in the tail of one packet. (2) A
//! `Frame` or a tail never outlives its arena's memory: drivers own their arena and all frames come back before it goes
//! ([`Arena::outstanding`]). (3) An arena and its frames stay on one thread at a time; a worker owns both. (4) The link of a chunk means
//! something only while it is in a tail. A tail has no empty part, and a packet no more than [`MAX_FRAMES`] frames.
//!
//! *Proof.* Frames are made by [`Arena::take`], and end in [`Arena::give_back`]. [`Arena::append`] makes one a tail's, and [`Arena::pop`]
//! a frame again. A tail is read through its packet and its arena together, so nobody writes to it or takes it apart meanwhile. Debug
//! builds keep a ledger with the state of each chunk: whoever takes one twice or gives one back twice panics, and so does who drops a
//! frame or a tail without giving it back.
//!
//! *Layout.* A received packet begins [`HEADROOM_BYTES`] into its chunk (XDP_PACKET_HEADROOM), so 256 bytes in front of it
//! are free: [`Packet::grow_front`] moves the packet's start for tunnel headers, without a copy.

use std::ptr::NonNull;

/// Bytes of one frame: half a page, the smallest chunk that a UMEM can have.
pub const FRAME_BYTES: usize = 2048;
/// Free bytes in front of a received packet (XDP_PACKET_HEADROOM, include/uapi/linux/bpf.h).
pub const HEADROOM_BYTES: usize = 256;
/// The longest packet that one frame holds, Ethernet header included.
pub const ONE_FRAME_BYTES: usize = FRAME_BYTES - HEADROOM_BYTES;
/// The largest device MTU that one frame can carry: room for the Ethernet header and one tunnel header remains.
pub const ONE_FRAME_MTU: u32 = (ONE_FRAME_BYTES - 14 - 20) as u32;
/// The frames of one packet: what the kernel makes a packet of that is sent (MAX_SKB_FRAGS + 1, xsk_build_skb of net/xdp/xsk.c).
pub const MAX_FRAMES: usize = 18;
/// The longest packet, Ethernet header included.
pub const MAX_PACKET_BYTES: usize = MAX_FRAMES * ONE_FRAME_BYTES;
/// The largest device MTU: what switches carry as jumbo frames.
pub const MAX_MTU: u32 = 9216;

const _: () = assert!(MAX_PACKET_BYTES <= u16::MAX as usize);

/// Frames that a packet of a device with this MTU takes, a VLAN tag included.
pub const fn frames_of_mtu(mtu: u32) -> u32 {
    (mtu + 14 + 4).div_ceil(ONE_FRAME_BYTES as u32)
}

/// The exclusive right to one chunk of an [`Arena`].
#[derive(Debug)]
pub struct Frame {
    chunk: NonNull<u8>,
}

// SAFETY: a Frame is the only handle to its chunk (invariant 1), so moving it to another thread moves the access with it.
unsafe impl Send for Frame {}

impl Frame {
    #[inline]
    fn bytes(&self) -> &[u8; FRAME_BYTES] {
        // SAFETY: the chunk is valid for FRAME_BYTES while the arena lives (invariant 2), always initialised (arenas are zeroed
        // memory), and only this Frame gives access to it (invariant 1).
        unsafe { self.chunk.cast().as_ref() }
    }

    #[inline]
    fn bytes_mut(&mut self) -> &mut [u8; FRAME_BYTES] {
        // SAFETY: as in `bytes`; `&mut self` makes the access exclusive.
        unsafe { self.chunk.cast().as_mut() }
    }
}

#[cfg(debug_assertions)]
impl Drop for Frame {
    fn drop(&mut self) {
        // A panic while panicking would hide the first one.
        assert!(std::thread::panicking(), "a frame was dropped without being given back to its arena");
    }
}

/// The frames of a packet behind its first one: the exclusive right to their chunks.
#[derive(Debug)]
pub struct Tail {
    first: NonNull<u8>,
}

#[cfg(debug_assertions)]
impl Drop for Tail {
    fn drop(&mut self) {
        assert!(std::thread::panicking(), "a tail was dropped without being given back to its arena");
    }
}

/// The part of a packet that a chunk of its tail holds, and the number of the tail's next chunk.
#[derive(Clone, Copy, Debug)]
struct Link {
    next: u32,
    start: u16,
    len: u16,
}

/// In place of a chunk's number: there is none.
const NONE: u32 = u32::MAX;

/// Who has the right to a chunk.
#[cfg(debug_assertions)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Holder {
    Nobody,
    Frame,
    Tail,
}

/// A region of memory cut into frames.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    frames: u32,
    outstanding: u32,
    links: Box<[Link]>,
    #[cfg(debug_assertions)]
    holders: Vec<Holder>,
}

// SAFETY: the arena's memory is reached only through it and its frames, which are all exclusive handles.
unsafe impl Send for Arena {}

impl Arena {
    /// Memory of a frame, with its link.
    pub const BYTES_PER_FRAME: usize = FRAME_BYTES + size_of::<Link>();

    /// An arena over foreign memory, as a UMEM's.
    ///
    /// # Safety
    /// `base` must be valid, initialised memory of `frames * FRAME_BYTES` bytes, reached through nothing but this arena
    /// and (for chunks whose frame was given back) the kernel, for as long as the arena or a frame of it is used.
    pub unsafe fn over(base: NonNull<u8>, frames: u32) -> Self {
        Self {
            base,
            frames,
            outstanding: 0,
            links: vec![Link { next: NONE, start: 0, len: 0 }; frames as usize].into(),
            #[cfg(debug_assertions)]
            holders: vec![Holder::Nobody; frames as usize],
        }
    }

    /// Number of frames in the arena.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// Frames that were taken and not given back, those of tails included.
    pub fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// Takes the frame whose chunk holds byte `offset` of the arena.
    ///
    /// # Panics
    /// Where `offset` lies outside the arena; in debug builds also where the frame is taken already.
    ///
    /// # Safety
    /// The caller must own the chunk: it was never taken, or was given back and has left the kernel's rings since.
    #[inline]
    pub unsafe fn take(&mut self, offset: u64) -> Frame {
        let index = (offset / FRAME_BYTES as u64) as usize;
        assert!(index < self.frames as usize, "offset {offset} lies outside the arena of {} frames", self.frames);
        #[cfg(debug_assertions)]
        {
            assert_eq!(self.holders[index], Holder::Nobody, "frame {index} was taken twice");
            self.holders[index] = Holder::Frame;
        }
        self.outstanding += 1;
        // SAFETY: index < frames, so the chunk lies within the arena's memory.
        Frame { chunk: unsafe { self.base.add(index * FRAME_BYTES) } }
    }

    /// Ends the right to `frame`; the offset of its chunk from the arena's start.
    #[inline]
    pub fn give_back(&mut self, frame: Frame) -> u64 {
        let offset = frame.chunk.as_ptr() as usize - self.base.as_ptr() as usize;
        #[cfg(debug_assertions)]
        {
            let index = offset / FRAME_BYTES;
            assert_eq!(self.holders[index], Holder::Frame, "frame {index} was given back twice");
            self.holders[index] = Holder::Nobody;
        }
        self.outstanding -= 1;
        std::mem::forget(frame);
        offset as u64
    }

    /// The number of a chunk of this arena.
    fn number(&self, chunk: NonNull<u8>) -> u32 {
        let offset = (chunk.as_ptr() as usize).wrapping_sub(self.base.as_ptr() as usize);
        let number = offset / FRAME_BYTES;
        assert!(number < self.frames as usize, "a packet's frames are of the arena that it is asked for in");
        number as u32
    }

    fn chunk(&self, number: u32) -> NonNull<u8> {
        assert!(number < self.frames);
        // SAFETY: the chunk lies within the arena's memory.
        unsafe { self.base.add(number as usize * FRAME_BYTES) }
    }

    /// The numbers of the chunks in a packet's tail.
    fn numbers(&self, packet: &Packet) -> impl Iterator<Item = u32> {
        // The numbers mean something in the packet's own arena only.
        let _ = self.number(packet.frame.chunk);
        std::iter::successors(packet.has_tail().then_some(packet.tail), |number| {
            let next = self.links[*number as usize].next;
            (next != NONE).then_some(next)
        })
    }

    /// The frames of a packet.
    pub fn frames_of(&self, packet: &Packet) -> usize {
        1 + self.numbers(packet).count()
    }

    /// Adds a segment at the end of a packet.
    ///
    /// # Panics
    /// Where the segment is empty, or the packet has [`MAX_FRAMES`] frames already.
    pub fn append(&mut self, packet: &mut Packet, segment: Segment) {
        let Segment { frame, start, len } = segment;
        assert!(len > 0 && usize::from(start) + usize::from(len) <= FRAME_BYTES, "a segment lies within its frame");
        let number = self.number(frame.chunk);
        let (count, last) = self.numbers(packet).fold((1, NONE), |(count, _), number| (count + 1, number));
        assert!(count < MAX_FRAMES, "a packet has {MAX_FRAMES} frames at most");
        #[cfg(debug_assertions)]
        {
            assert_eq!(self.holders[number as usize], Holder::Frame, "frame {number} is no frame");
            self.holders[number as usize] = Holder::Tail;
        }
        std::mem::forget(frame);
        self.links[number as usize] = Link { next: NONE, start, len };
        match last {
            NONE => packet.tail = number,
            last => self.links[last as usize].next = number,
        }
        packet.tail_bytes += len;
    }

    /// The bytes of a packet behind its first frame, frame by frame.
    pub fn tail<'a>(&'a self, packet: &'a Packet) -> impl Iterator<Item = &'a [u8]> {
        self.numbers(packet).map(|number| {
            let Link { start, len, .. } = self.links[number as usize];
            // SAFETY: the part lies within its chunk (`append`), which is initialised memory. The chunk is in this packet's tail and in
            // nothing else (invariant 1), and both borrows keep it there, where nobody writes.
            unsafe {
                let begin = self.chunk(number).add(usize::from(start));
                std::slice::from_raw_parts(begin.as_ptr(), usize::from(len))
            }
        })
    }

    /// All bytes of a packet, in `buffer` where they are not in one frame.
    #[inline]
    pub fn whole<'a>(&self, packet: &'a Packet, buffer: &'a mut Vec<u8>) -> &'a [u8] {
        if packet.has_tail() {
            self.gather(packet, buffer);
            return buffer;
        }
        packet.bytes()
    }

    #[cold]
    fn gather(&self, packet: &Packet, buffer: &mut Vec<u8>) {
        buffer.clear();
        buffer.extend_from_slice(packet.bytes());
        self.tail(packet).for_each(|part| buffer.extend_from_slice(part));
    }

    /// Takes a packet apart: what its first frame holds, and its tail.
    #[inline]
    pub fn split(&self, packet: Packet) -> (Segment, Option<Tail>) {
        let tail = if packet.has_tail() { self.tail_of(&packet) } else { None };
        let Packet { frame, start, len, .. } = packet;
        (Segment { frame, start, len }, tail)
    }

    #[cold]
    fn tail_of(&self, packet: &Packet) -> Option<Tail> {
        self.numbers(packet).next().map(|first| Tail { first: self.chunk(first) })
    }

    /// Takes the first frame off a tail.
    pub fn pop(&mut self, tail: Tail) -> (Segment, Option<Tail>) {
        let number = self.number(tail.first);
        let frame = Frame { chunk: tail.first };
        std::mem::forget(tail);
        #[cfg(debug_assertions)]
        {
            assert_eq!(self.holders[number as usize], Holder::Tail, "frame {number} is in no tail");
            self.holders[number as usize] = Holder::Frame;
        }
        let Link { next, start, len } = self.links[number as usize];
        let rest = (next != NONE).then(|| Tail { first: self.chunk(next) });
        (Segment { frame, start, len }, rest)
    }

    /// Cuts a packet off after `bytes` bytes; the frames that it needs no more.
    ///
    /// # Panics
    /// Where the packet is shorter.
    #[cold]
    pub fn cut(&mut self, packet: &mut Packet, bytes: usize) -> Option<Tail> {
        assert!(bytes <= packet.total_bytes(), "a packet of {} bytes is cut after {bytes}", packet.total_bytes());
        let first_bytes = packet.bytes().len().min(bytes);
        let mut rest = bytes - first_bytes;
        let mut cut = if packet.has_tail() { packet.tail } else { NONE };
        packet.len = first_bytes as u16;
        packet.tail_bytes = rest as u16;
        while rest > 0 {
            let link = &mut self.links[cut as usize];
            link.len = rest.min(usize::from(link.len)) as u16;
            rest -= usize::from(link.len);
            cut = if rest > 0 { link.next } else { std::mem::replace(&mut link.next, NONE) };
        }
        (cut != NONE).then(|| Tail { first: self.chunk(cut) })
    }
}

/// How a frame was addressed at the link layer, as the kernel's `pkt_type`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkType {
    /// To the device's own MAC address.
    Host,
    /// To ff:ff:ff:ff:ff:ff.
    Broadcast,
    /// To a group address.
    Multicast,
    /// To somebody else's MAC address.
    Other,
}

/// The kernel's index of a device; 0, which no device has, stands for the node's own kernel.
///
/// What the node's kernel only forwards has come by a device of its own, which weir does not serve, or by an uplink and then past weir: that
/// is the device's index with the highest bit set, as indices are positive ints. Without an index, the device is not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct IfIndex(pub u32);

impl IfIndex {
    /// The node's own kernel, behind the trunk: what a process of the node sends.
    pub const HOST: Self = Self(0);
    const FORWARDED: u32 = 1 << 31;
    /// What the node's kernel forwards, from nobody knows where.
    pub const FORWARDED_BY_UNKNOWN: Self = Self(Self::FORWARDED);

    /// What the node's kernel forwards and has received by this device.
    #[inline]
    #[must_use]
    pub const fn forwarded(self) -> Self {
        Self(self.0 | Self::FORWARDED)
    }

    /// Whether it stands for what the node's kernel forwards.
    #[inline]
    pub const fn is_forwarded(self) -> bool {
        self.0 & Self::FORWARDED != 0
    }

    /// Whether what comes from there has come by the node's kernel, its own or forwarded, and what goes there goes to the kernel.
    #[inline]
    pub const fn is_kernels(self) -> bool {
        self.0 == 0 || self.is_forwarded()
    }

    /// The device itself, of what is forwarded.
    #[inline]
    #[must_use]
    pub const fn received_by(self) -> Self {
        Self(self.0 & !Self::FORWARDED)
    }
}

/// A part of a packet: `len` bytes from `start` in one frame.
#[derive(Debug)]
pub struct Segment {
    /// The frame.
    pub frame: Frame,
    /// First byte of the packet within the frame.
    pub start: u16,
    /// Bytes of the packet within the frame.
    pub len: u16,
}

/// A packet: a frame, and further ones behind it where it is longer than one holds.
///
/// Three words, without anything to drop in a release build: it is moved several times on its way.
#[derive(Debug)]
pub struct Packet {
    frame: Frame,
    start: u16,
    len: u16,
    /// The number of the tail's first chunk, where there is a tail.
    tail: u32,
    tail_bytes: u16,
    /// The device that it came from; the driver sets it.
    pub device: IfIndex,
    /// How it was addressed at the link layer; the driver sets it.
    pub link: LinkType,
    /// Whether it came in a tunnel packet, which is taken off.
    pub through_tunnel: bool,
}

const _: () = assert!(size_of::<Packet>() == 24 && (cfg!(debug_assertions) || !std::mem::needs_drop::<Packet>()));

impl Packet {
    /// A packet of that part of a frame.
    ///
    /// # Panics
    /// Where the segment does not lie within its frame.
    #[inline]
    pub fn new(segment: Segment, device: IfIndex, link: LinkType) -> Self {
        assert!(
            usize::from(segment.start) + usize::from(segment.len) <= FRAME_BYTES,
            "a segment lies within its frame"
        );
        let Segment { frame, start, len } = segment;
        Self { frame, start, len, tail: 0, tail_bytes: 0, device, link, through_tunnel: false }
    }

    /// Its bytes in its first frame, from the Ethernet header on: all of them, if it has no tail.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        let start = usize::from(self.start);
        &self.frame.bytes()[start..start + usize::from(self.len)]
    }

    /// Its bytes in its first frame, writable.
    #[inline]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let start = usize::from(self.start);
        &mut self.frame.bytes_mut()[start..start + usize::from(self.len)]
    }

    /// Whether it goes on in further frames.
    #[inline]
    pub fn has_tail(&self) -> bool {
        self.tail_bytes != 0
    }

    /// Number of its bytes, those of its tail included.
    #[inline]
    pub fn total_bytes(&self) -> usize {
        usize::from(self.len) + usize::from(self.tail_bytes)
    }

    /// Adds `count` bytes in front, with whatever the frame holds there. False, and no change, where the frame has no such room.
    #[inline]
    #[must_use]
    pub fn grow_front(&mut self, count: u16) -> bool {
        if self.start < count {
            return false;
        }
        self.start -= count;
        self.len += count;
        true
    }

    /// Removes `count` bytes from the front.
    ///
    /// # Panics
    /// Where its first frame holds less of it.
    #[inline]
    pub fn shrink_front(&mut self, count: u16) {
        self.len = self.len.checked_sub(count).expect("the packet is longer than what is cut off");
        self.start += count;
    }

    /// Bytes that its first frame has free in front of it.
    #[inline(always)]
    pub fn headroom(&self) -> u16 {
        self.start
    }

    /// Puts `new` bytes in place of its first `old` ones, before `rest` bytes that follow them: its first frame ends there, unless it goes
    /// on in a tail. What the new bytes are is whatever the frame holds there.
    ///
    /// As [`Self::shrink_front`], [`Self::set_len`] and [`Self::grow_front`], at once.
    ///
    /// # Panics
    /// Where its first frame has fewer than `old` bytes, or too few in front of it for the new ones.
    #[inline(always)]
    pub fn replace_front(&mut self, old: u16, new: u16, rest: u16) {
        let behind = self.len.checked_sub(old).expect("the packet is longer than what is cut off");
        self.start = (self.start + old).checked_sub(new).expect("the frame has room in front of the packet");
        self.len = new + rest.min(behind);
    }

    /// Makes a packet without a tail `len` bytes long: cut at the end, or grown into what the frame holds there.
    ///
    /// # Panics
    /// Where the frame has no such room, or the packet has a tail ([`Arena::cut`]).
    #[inline]
    pub fn set_len(&mut self, len: usize) {
        assert!(!self.has_tail(), "a packet with a tail is cut by its arena");
        assert!(usize::from(self.start) + len <= FRAME_BYTES, "a packet of {len} bytes does not fit its frame");
        self.len = len as u16;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_arena<R>(frames: u32, run: impl FnOnce(&mut Arena) -> R) -> R {
        let mut memory = vec![0u8; frames as usize * FRAME_BYTES];
        let base = NonNull::new(memory.as_mut_ptr()).unwrap();
        // SAFETY: `memory` outlives the arena and is not touched otherwise.
        let mut arena = unsafe { Arena::over(base, frames) };
        let result = run(&mut arena);
        drop(memory);
        result
    }

    #[test]
    fn a_packet_moves_its_start_within_the_headroom_only() {
        with_arena(2, |arena| {
            // SAFETY: nobody has taken chunk 1.
            let frame = unsafe { arena.take(FRAME_BYTES as u64 + 300) };
            let mut packet =
                Packet::new(Segment { frame, start: HEADROOM_BYTES as u16, len: 4 }, IfIndex(7), LinkType::Host);
            packet.bytes_mut().copy_from_slice(b"abcd");
            assert!(packet.grow_front(20));
            assert_eq!(packet.bytes().len(), 24);
            assert!(!packet.grow_front(237));
            packet.shrink_front(21);
            assert_eq!(packet.bytes(), b"bcd");
            packet.set_len(1);
            assert_eq!(packet.bytes(), b"b");
            assert_eq!(arena.outstanding(), 1);
            let (segment, tail) = arena.split(packet);
            assert!(tail.is_none());
            assert_eq!(arena.give_back(segment.frame), FRAME_BYTES as u64);
            assert_eq!(arena.outstanding(), 0);
        });
    }

    /// [`Packet::replace_front`] is the three others.
    #[test]
    fn the_front_is_replaced_at_once() {
        for (old, new, rest) in [(14, 14, 46), (14, 34, 46), (34, 14, 26), (14, 14, 30), (14, 34, 0), (34, 34, 20)] {
            with_arena(2, |arena| {
                let [mut at_once, mut in_steps] =
                    [0, 1].map(|number| Packet::new(segment(arena, number, 256, 60, 0), IfIndex(7), LinkType::Host));
                at_once.replace_front(old, new, rest);
                in_steps.shrink_front(old);
                in_steps.set_len(rest.into());
                assert!(in_steps.grow_front(new));
                assert_eq!((at_once.start, at_once.len), (in_steps.start, in_steps.len), "{old} {new} {rest}");
                for packet in [at_once, in_steps] {
                    let (segment, _) = arena.split(packet);
                    arena.give_back(segment.frame);
                }
            });
        }
        with_arena(5, |arena| {
            let mut packet = chain(arena);
            let before = whole(arena, &packet);
            packet.replace_front(14, 34, 1929);
            assert_eq!(whole(arena, &packet)[34..], before[14..], "its tail stays");
            let (first, tail) = arena.split(packet);
            give_back(arena, tail);
            arena.give_back(first.frame);
        });
    }

    /// A frame with `len` bytes that count up from `first`, `start` bytes into its chunk.
    fn segment(arena: &mut Arena, number: u64, start: u16, len: u16, first: u8) -> Segment {
        // SAFETY: the tests take each chunk once.
        let mut frame = unsafe { arena.take(number * FRAME_BYTES as u64) };
        for (place, byte) in frame.bytes_mut()[usize::from(start)..].iter_mut().take(len.into()).enumerate() {
            *byte = first.wrapping_add(place as u8);
        }
        Segment { frame, start, len }
    }

    fn whole(arena: &Arena, packet: &Packet) -> Vec<u8> {
        arena.whole(packet, &mut Vec::new()).to_vec()
    }

    /// Gives all frames of a tail back; their numbers.
    fn give_back(arena: &mut Arena, mut tail: Option<Tail>) -> Vec<u64> {
        let mut numbers = Vec::new();
        while let Some(rest) = tail {
            let (segment, next) = arena.pop(rest);
            numbers.push(arena.give_back(segment.frame) / FRAME_BYTES as u64);
            tail = next;
        }
        numbers
    }

    /// A packet of 100 bytes in chunk 3, 1792 in chunk 0, 1 in chunk 4 and 50 in chunk 1.
    fn chain(arena: &mut Arena) -> Packet {
        let first = segment(arena, 3, 256, 100, 0);
        let mut packet = Packet::new(first, IfIndex(7), LinkType::Host);
        for (number, start, len) in [(0, 256, 1792), (4, 2047, 1), (1, 0, 50)] {
            let next = segment(arena, number, start, len, packet.total_bytes() as u8);
            arena.append(&mut packet, next);
        }
        packet
    }

    #[test]
    fn a_tail_is_read_in_order_and_given_back_whole() {
        with_arena(5, |arena| {
            let mut packet = chain(arena);
            let bytes: Vec<u8> = (0..1943).map(|place| place as u8).collect();
            assert_eq!((packet.total_bytes(), arena.frames_of(&packet)), (1943, 4));
            assert_eq!(whole(arena, &packet), bytes);
            // The front moves as that of any packet.
            packet.shrink_front(10);
            assert_eq!(whole(arena, &packet), bytes[10..]);
            assert!(packet.grow_front(10));
            assert_eq!((whole(arena, &packet), packet.total_bytes()), (bytes, 1943));
            let (first, tail) = arena.split(packet);
            assert_eq!(arena.outstanding(), 4);
            assert_eq!(give_back(arena, tail), [0, 4, 1]);
            arena.give_back(first.frame);
            assert_eq!(arena.outstanding(), 0);
        });
    }

    #[test]
    fn a_cut_frees_what_lies_behind_it() {
        let cases: [(usize, &[u64]); 8] = [
            (1943, &[]),
            (1894, &[]),
            (1893, &[1]),
            (1892, &[4, 1]),
            (101, &[4, 1]),
            (100, &[0, 4, 1]),
            (99, &[0, 4, 1]),
            (0, &[0, 4, 1]),
        ];
        for (bytes, freed) in cases {
            with_arena(5, |arena| {
                let mut packet = chain(arena);
                let before = whole(arena, &packet);
                let tail = arena.cut(&mut packet, bytes);
                assert_eq!(give_back(arena, tail), freed, "{bytes}");
                assert_eq!(whole(arena, &packet), before[..bytes]);
                assert_eq!(packet.total_bytes(), bytes);
                // What is left can be appended to again.
                if bytes > 100 && !freed.is_empty() {
                    let more = segment(arena, freed[0], 9, 3, 77);
                    arena.append(&mut packet, more);
                    assert_eq!(whole(arena, &packet), [&before[..bytes], &[77, 78, 79]].concat());
                }
                let (first, tail) = arena.split(packet);
                give_back(arena, tail);
                arena.give_back(first.frame);
                assert_eq!(arena.outstanding(), 0);
            });
        }
    }

    #[test]
    #[should_panic(expected = "18 frames at most")]
    fn a_packet_has_no_more_frames_than_the_kernel_takes() {
        with_arena(19, |arena| {
            let first = segment(arena, 0, 0, 1, 0);
            let mut packet = Packet::new(first, IfIndex(7), LinkType::Host);
            for number in 1..19 {
                let next = segment(arena, number, 0, 1, 0);
                arena.append(&mut packet, next);
            }
        });
    }

    #[test]
    #[should_panic(expected = "of the arena")]
    fn a_tail_is_not_looked_for_in_another_arena() {
        with_arena(5, |arena| {
            let packet = std::mem::ManuallyDrop::new(chain(arena));
            with_arena(5, |other| other.tail(&packet).count());
        });
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "without being given back")]
    fn a_lost_tail_is_found() {
        with_arena(5, |arena| {
            let packet = chain(arena);
            let (first, tail) = arena.split(packet);
            arena.give_back(first.frame);
            drop(tail);
        });
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "taken twice")]
    fn a_frame_of_a_tail_is_taken() {
        with_arena(5, |arena| {
            let _kept = std::mem::ManuallyDrop::new(chain(arena));
            // SAFETY: wrong on purpose: it panics before a Frame exists beside the tail.
            let _ = unsafe { arena.take(0) };
        });
    }

    #[test]
    fn jumbo_packets_take_some_frames() {
        assert_eq!([1500, ONE_FRAME_MTU, 9000, MAX_MTU].map(frames_of_mtu), [1, 1, 6, 6]);
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "taken twice")]
    fn taking_a_frame_twice_is_found() {
        with_arena(1, |arena| {
            // SAFETY: nobody has taken chunk 0; the second take is the bug that the ledger finds.
            let _kept = std::mem::ManuallyDrop::new(unsafe { arena.take(0) });
            // SAFETY: wrong on purpose: it panics before a second Frame exists.
            let _ = unsafe { arena.take(0) };
        });
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "without being given back")]
    fn a_lost_frame_is_found() {
        with_arena(1, |arena| {
            // SAFETY: nobody has taken chunk 0.
            drop(unsafe { arena.take(0) });
        });
    }
}
