//! Buckets: one cache line with twelve slots and their tags. The protocol is described in [`crate::table`].

use weir_packet::Direction;
use weir_sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::storage::Zeroable;

/// Slots of a bucket. Two in a model, so that a bucket can be full in it.
pub(crate) const SLOTS: usize = if cfg!(loom) { 2 } else { 12 };
/// Tags of one control word.
const TAGS: usize = SLOTS / 2;
/// Where the count of overflowed keys stands in the first control word.
const OVERFLOW_SHIFT: u32 = 48;
/// The most keys that may have overflowed from one bucket.
const OVERFLOW_MAX: u64 = u16::MAX as u64;
/// The bytes of both control words that are tags, as bits.
const SLOT_BITS: u32 = ((1 << TAGS) - 1) * 0x101;

/// Which connection and which of its keys a slot stands for. Zero is an empty slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SlotRef(u32);

impl SlotRef {
    const EMPTY: u32 = 0;
    /// What an empty slot holds.
    pub(crate) const NONE: Self = Self(Self::EMPTY);

    #[inline(always)]
    pub(crate) const fn new(index: u32, direction: Direction) -> Self {
        Self((index + 1) << 1 | direction as u32)
    }

    /// The connection's index and the direction of the key, or nothing for an empty slot.
    #[inline(always)]
    pub(crate) const fn get(self) -> Option<(u32, Direction)> {
        let direction = if self.0 & 1 == 0 { Direction::Original } else { Direction::Reply };
        match self.0 {
            Self::EMPTY => None,
            word => Some(((word >> 1) - 1, direction)),
        }
    }
}

/// One line of the index.
#[derive(Default)]
#[repr(C, align(64))]
pub(crate) struct Bucket {
    /// Six one-byte tags each in the low 48 bits, 0 for an empty slot. The high 16 bits of the first count the keys
    /// whose home is here, but which live in a later bucket of their probe sequence.
    control: [AtomicU64; 2],
    slots: [AtomicU32; SLOTS],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Bucket>() == 64 && align_of::<Bucket>() == 64);

// SAFETY: atomic integers only.
unsafe impl Zeroable for Bucket {}

/// A bit for each tag that equals, at the place of its byte in both control words: 0 to 5, and 8 to 13.
#[inline(always)]
#[cfg(all(target_arch = "x86_64", not(miri)))]
fn equal(control: [u64; 2], tag: u8) -> u32 {
    use std::arch::x86_64::{_mm_cmpeq_epi8, _mm_movemask_epi8, _mm_set_epi64x, _mm_set1_epi8};
    // SAFETY: SSE2 is part of x86-64.
    let equal = unsafe {
        let control = _mm_set_epi64x(control[1] as i64, control[0] as i64);
        _mm_movemask_epi8(_mm_cmpeq_epi8(control, _mm_set1_epi8(tag as i8)))
    };
    equal as u32 & SLOT_BITS
}

/// The same without vectors.
#[inline(always)]
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
fn equal(control: [u64; 2], tag: u8) -> u32 {
    equal_by_bytes(control, tag)
}

/// The same, byte by byte.
#[cfg(any(test, miri, not(target_arch = "x86_64")))]
fn equal_by_bytes(control: [u64; 2], tag: u8) -> u32 {
    let bytes = control.map(u64::to_le_bytes);
    let bit = |(at, byte): (usize, &u8)| u32::from(*byte == tag) << at;
    bytes.as_flattened().iter().enumerate().map(bit).sum::<u32>() & SLOT_BITS
}

/// Where a slot's tag stands in its control word.
const fn tag_shift(slot: usize) -> usize {
    8 * if slot < TAGS { slot } else { slot - TAGS }
}

/// Slots of a bucket with some tag, from the first: their bits as [`equal`] gives them.
#[derive(Clone, Copy)]
pub(crate) struct Matches(u32);

impl Iterator for Matches {
    type Item = usize;

    #[inline(always)]
    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros() as usize;
        self.0 &= self.0 - 1;
        Some(if bit < 8 { bit } else { bit - 8 + TAGS })
    }
}

impl Bucket {
    /// The slots with that tag, and whether keys of this home live elsewhere.
    #[inline(always)]
    pub(crate) fn matches(&self, tag: u8) -> (Matches, bool) {
        let control = [self.control[0].load(Ordering::Acquire), self.control[1].load(Ordering::Acquire)];
        (Matches(equal(control, tag)), control[0] >> OVERFLOW_SHIFT != 0)
    }

    /// What a slot holds.
    #[inline(always)]
    pub(crate) fn slot(&self, slot: usize) -> SlotRef {
        SlotRef(self.slots[slot].load(Ordering::Acquire))
    }

    /// Puts a key into an empty slot, if there is one.
    pub(crate) fn claim(&self, tag: u8, key: SlotRef) -> bool {
        let (empty, _) = self.matches(0);
        for slot in empty {
            // Fails where another has just claimed the slot and not yet set its tag, or has cleared the tag and not
            // yet emptied the slot: until then, tag and slot are the other's.
            let claimed = self.slots[slot].compare_exchange(SlotRef::EMPTY, key.0, Ordering::AcqRel, Ordering::Relaxed);
            if claimed.is_ok() {
                self.control[slot / TAGS].fetch_or(u64::from(tag) << tag_shift(slot), Ordering::AcqRel);
                return true;
            }
        }
        false
    }

    /// Empties the slot that holds a key, if this bucket has it.
    pub(crate) fn release(&self, tag: u8, key: SlotRef) -> bool {
        for slot in self.matches(tag).0 {
            if self.slot(slot) == key {
                // The tag first: a slot that looks empty by its tag is only then claimed when it is empty.
                self.control[slot / TAGS].fetch_and(!(0xff << tag_shift(slot)), Ordering::AcqRel);
                self.slots[slot].store(SlotRef::EMPTY, Ordering::Release);
                return true;
            }
        }
        false
    }

    /// Counts one more key that lives elsewhere; `false` where the count is at its limit.
    pub(crate) fn overflow(&self) -> bool {
        let one_more = |control: u64| {
            (control >> OVERFLOW_SHIFT < OVERFLOW_MAX).then(|| control.wrapping_add(1 << OVERFLOW_SHIFT))
        };
        self.control[0].fetch_update(Ordering::AcqRel, Ordering::Relaxed, one_more).is_ok()
    }

    /// Counts one less key that lives elsewhere.
    pub(crate) fn end_overflow(&self) {
        let before = self.control[0].fetch_sub(1 << OVERFLOW_SHIFT, Ordering::AcqRel);
        debug_assert!(before >> OVERFLOW_SHIFT != 0, "each overflow ends once");
    }

    /// Nothing in it and nothing overflowed.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn is_clear(&self) -> bool {
        self.control.iter().all(|control| control.load(Ordering::Relaxed) == 0)
            && self.slots.iter().all(|slot| slot.load(Ordering::Relaxed) == SlotRef::EMPTY)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn tags_match_exactly() {
        // 0x01 above 0x00 is what a test for a zero byte by subtraction gets wrong.
        let control = [0xffff_8001_0001_7f00, 0x0100_0080_0001_00ff];
        let at = |tag| Matches(equal(control, tag)).collect::<Vec<_>>();
        assert_eq!(at(0x00), [0, 3, 7, 9, 11]);
        assert_eq!(at(0x01), [2, 4, 8]);
        assert_eq!(at(0x7f), [1]);
        assert_eq!(at(0x80), [5, 10]);
        assert_eq!(at(0xff), [6]);
        let mut random = 1u64;
        for _ in 0..if cfg!(miri) { 50 } else { 1000 } {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let control = [random & 0x0303_0303_0303_0303, random.rotate_left(17) & 0x0301_0301_0301_0301];
            assert!((0..4).all(|tag| equal(control, tag) == equal_by_bytes(control, tag)), "{control:x?}");
        }
    }

    #[test]
    fn a_bucket_holds_twelve_keys_and_gives_back_each() {
        let bucket = Bucket::default();
        let key = |i: u32| SlotRef::new(i, if i.is_multiple_of(2) { Direction::Original } else { Direction::Reply });
        for i in 0..SLOTS as u32 {
            assert!(bucket.claim(1 + i as u8 % 3, key(i)));
        }
        assert!(!bucket.claim(9, key(99)));
        assert_eq!(bucket.matches(2).0.collect::<Vec<_>>(), [1, 4, 7, 10]);
        assert_eq!(bucket.slot(7).get(), Some((7, Direction::Reply)));
        assert!(!bucket.release(1, key(7)), "another tag");
        assert!(bucket.overflow() && bucket.matches(2).1);
        assert!(bucket.release(2, key(7)) && !bucket.release(2, key(7)));
        assert_eq!(bucket.slot(7).get(), None);
        assert!(bucket.claim(200, key(7)), "the slot is empty again");
        bucket.end_overflow();
        assert!(!bucket.matches(2).1);
        for i in 0..SLOTS as u32 {
            assert!(bucket.release(if i == 7 { 200 } else { 1 + i as u8 % 3 }, key(i)));
        }
        assert!(bucket.is_clear());
    }

    #[test]
    #[cfg_attr(miri, ignore = "65,535 steps twice, none of them unsafe")]
    fn the_overflow_count_is_bounded() {
        let bucket = Bucket::default();
        assert!((0..OVERFLOW_MAX).all(|_| bucket.overflow()));
        assert!(!bucket.overflow());
        (0..OVERFLOW_MAX).for_each(|_| bucket.end_overflow());
        assert!(bucket.is_clear());
    }
}
