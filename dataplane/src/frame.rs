//! Frames, and packets made of them.
//!
//! # Theory
//!
//! *What.* An [`Arena`] is one region of memory cut into chunks of [`FRAME_BYTES`]; for AF_XDP it is the UMEM, for the
//! memory driver a heap block. A [`Frame`] is the exclusive right to one chunk. It is move-only: whoever holds it may
//! read and write the chunk, nobody else can. The kernel holds the frames that lie in its rings.
//!
//! *Invariants.* (1) For each chunk of an arena at most one `Frame` exists. (2) A `Frame` never outlives its arena's
//! memory: drivers own their arena and all frames come back before it goes ([`Arena::outstanding`]). (3) An arena and its frames stay
//! on one thread at a time; a worker owns both.
//!
//! *Proof.* Frames are made only by [`Arena::take`] and end only in [`Arena::give_back`]. Debug builds keep a ledger with
//! one flag per chunk: taking a frame twice or giving one back twice panics, and so does dropping a frame without giving it back.
//!
//! *Layout.* A received packet begins [`HEADROOM_BYTES`] into its chunk (XDP_PACKET_HEADROOM), so 256 bytes in front of it
//! are free: [`Packet::grow_front`] moves the packet's start for tunnel headers, without a copy.

use std::ptr::NonNull;

/// Bytes of one frame: half a page, the smallest chunk that a UMEM can have.
pub const FRAME_BYTES: usize = 2048;
/// Free bytes in front of a received packet (XDP_PACKET_HEADROOM, include/uapi/linux/bpf.h).
pub const HEADROOM_BYTES: usize = 256;
/// The longest packet that one frame holds, Ethernet header included.
pub const MAX_PACKET_BYTES: usize = FRAME_BYTES - HEADROOM_BYTES;
/// The largest device MTU that one frame can carry: room for the Ethernet header and one tunnel header remains.
pub const MAX_MTU: u32 = (MAX_PACKET_BYTES - 14 - 20) as u32;

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

/// A region of memory cut into frames.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    frames: u32,
    outstanding: u32,
    #[cfg(debug_assertions)]
    taken: Vec<bool>,
}

// SAFETY: the arena's memory is reached only through it and its frames, which are all exclusive handles.
unsafe impl Send for Arena {}

impl Arena {
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
            #[cfg(debug_assertions)]
            taken: vec![false; frames as usize],
        }
    }

    /// Number of frames in the arena.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// Frames that were taken and not given back.
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
            assert!(!self.taken[index], "frame {index} was taken twice");
            self.taken[index] = true;
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
            assert!(self.taken[index], "frame {index} was given back twice");
            self.taken[index] = false;
        }
        self.outstanding -= 1;
        std::mem::forget(frame);
        offset as u64
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
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct IfIndex(pub u32);

impl IfIndex {
    /// The node's own kernel, behind the trunk.
    pub const HOST: Self = Self(0);
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

/// A packet, in one frame.
///
/// Three words, without anything to drop in a release build: it is moved several times on its way.
#[derive(Debug)]
pub struct Packet {
    segment: Segment,
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
        Self { segment, device, link, through_tunnel: false }
    }

    /// Its bytes, from the Ethernet header on.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        let start = usize::from(self.segment.start);
        &self.segment.frame.bytes()[start..start + usize::from(self.segment.len)]
    }

    /// Its bytes, writable.
    #[inline]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let start = usize::from(self.segment.start);
        &mut self.segment.frame.bytes_mut()[start..start + usize::from(self.segment.len)]
    }

    /// Adds `count` bytes in front, with whatever the frame holds there. False, and no change, where the frame has no such room.
    #[inline]
    #[must_use]
    pub fn grow_front(&mut self, count: u16) -> bool {
        if self.segment.start < count {
            return false;
        }
        self.segment.start -= count;
        self.segment.len += count;
        true
    }

    /// Removes `count` bytes from the front.
    ///
    /// # Panics
    /// Where the packet is shorter.
    #[inline]
    pub fn shrink_front(&mut self, count: u16) {
        self.segment.len = self.segment.len.checked_sub(count).expect("the packet is longer than what is cut off");
        self.segment.start += count;
    }

    /// Makes the packet `len` bytes long: cut at the end, or grown into what the frame holds there.
    ///
    /// # Panics
    /// Where the frame has no such room.
    #[inline]
    pub fn set_len(&mut self, len: usize) {
        assert!(usize::from(self.segment.start) + len <= FRAME_BYTES, "a packet of {len} bytes does not fit its frame");
        self.segment.len = len as u16;
    }

    /// Its part of a frame, to give that back.
    #[inline]
    pub fn into_segment(self) -> Segment {
        self.segment
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
            assert_eq!(arena.give_back(packet.into_segment().frame), FRAME_BYTES as u64);
            assert_eq!(arena.outstanding(), 0);
        });
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
