//! The table's memory: 64-byte lines, zero, and not there before they are touched.
//!
//! A table is sized for the worst case, so what it does not use must cost nothing: all arrays come zeroed from the
//! allocator, which for large ones maps pages that the kernel provides at their first use. An allocation whose
//! alignment is above the allocator's own (16 bytes) would be cleared by hand, and so be resident at once; a few
//! bytes more are therefore asked for, and the first aligned line in them is where the array starts.
//!
//! Everything stored is an array of atomics, for which all zeroes is a valid value.

#[cfg(not(loom))]
use std::{marker::PhantomData, ops::Deref, ptr::NonNull};

#[cfg(not(loom))]
use weir_sync::atomic::AtomicU64;

/// Values whose all-zero bytes are their [`Default`].
///
/// # Safety
/// All bytes zero must be a valid value, the type must consist of atomics only (so that shared memory may change
/// under it), and need no drop.
pub(crate) unsafe trait Zeroable: Default {}

// SAFETY: an atomic integer has the representation of the integer, for which zero is valid.
unsafe impl Zeroable for weir_sync::atomic::AtomicU32 {}

/// A fixed array of zeroed values, whose pages the kernel provides when they are touched.
#[cfg(not(loom))]
pub(crate) struct Lines<T> {
    first: NonNull<T>,
    len: usize,
    /// What `first` points into, as it came from the allocator.
    words: NonNull<[AtomicU64]>,
    _owned: PhantomData<Box<[T]>>,
}

#[cfg(not(loom))]
impl<T: Zeroable> Lines<T> {
    const ALIGNED: () = assert!(align_of::<T>() <= 64 && !std::mem::needs_drop::<T>());

    /// `len` zeroed values.
    pub(crate) fn new(len: usize) -> Self {
        let () = Self::ALIGNED;
        let bytes = len.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(64)).expect("a table in memory");
        // SAFETY: zero is a valid value of an atomic integer.
        let words = unsafe { Box::<[AtomicU64]>::new_zeroed_slice(bytes.div_ceil(8)).assume_init() };
        let words = NonNull::from(Box::leak(words));
        let start = words.cast::<u8>();
        // SAFETY: aligning to at most 64 moves by less than 64 bytes, which were allocated on top.
        let first = unsafe { start.add(start.align_offset(64)) }.cast::<T>();
        Self { first, len, words, _owned: PhantomData }
    }

    /// Brings a value's line towards the processor's first cache.
    #[inline(always)]
    pub(crate) fn prefetch(&self, index: usize) {
        debug_assert!(index < self.len);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE is part of x86-64; prefetching has no effect but on caches, whatever the address.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(self.first.as_ptr().wrapping_add(index).cast());
        }
    }
}

#[cfg(not(loom))]
impl<T> Deref for Lines<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `first` is aligned and starts `len` values of zeroed memory, valid by `Zeroable`, that lives as
        // long as `self`; all access is through shared references to atomics.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

#[cfg(not(loom))]
impl<T> Drop for Lines<T> {
    fn drop(&mut self) {
        // SAFETY: `words` is what `Box::leak` returned, given back once; values of `T` need no drop.
        drop(unsafe { Box::from_raw(self.words.as_ptr()) });
    }
}

// SAFETY: `Lines` owns its memory like a `Box<[T]>`.
#[cfg(not(loom))]
unsafe impl<T: Send> Send for Lines<T> {}
// SAFETY: as above; shared access is to `&[T]` only.
#[cfg(not(loom))]
unsafe impl<T: Sync> Sync for Lines<T> {}

/// Loom's atomics are objects of its own, made one by one.
#[cfg(loom)]
pub(crate) struct Lines<T>(Box<[T]>);

#[cfg(loom)]
impl<T: Zeroable> Lines<T> {
    pub(crate) fn new(len: usize) -> Self {
        Self((0..len).map(|_| T::default()).collect())
    }

    pub(crate) fn prefetch(&self, _index: usize) {}
}

#[cfg(loom)]
impl<T> std::ops::Deref for Lines<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use weir_sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::{bucket::Bucket, conn::Line};

    #[test]
    fn lines_are_aligned_zero_and_all_there() {
        let lines = Lines::<Line>::new(3);
        assert_eq!((lines.len(), lines.as_ptr() as usize % 64), (3, 0));
        assert!(lines.iter().all(|line| line.state.load(Ordering::Relaxed) == 0));
        lines[2].state.store(7, Ordering::Relaxed);
        lines.prefetch(2);
        assert_eq!(lines[2].state.load(Ordering::Relaxed), 7);
        assert_eq!(Lines::<Bucket>::new(5).as_ptr() as usize % 64, 0);
        assert_eq!(Lines::<AtomicU32>::new(0).len(), 0);
    }

    #[test]
    fn memory_that_is_not_touched_is_not_resident() {
        if cfg!(miri) {
            return;
        }
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").expect("statm");
            statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("resident pages") * 4096
        };
        let before = resident();
        let lines = Lines::<Line>::new(1 << 22);
        lines[1 << 21].state.store(1, Ordering::Relaxed);
        assert!(resident() < before + (32 << 20), "256 MiB were asked for, one line was used");
    }
}
