//! The table's memory: one mapping, zero, and not there before it is touched.
//!
//! # What
//! A table is sized for the worst case, so what it does not use should cost nothing: its memory is one mapping whose pages the
//! kernel provides at their first use. Not so where it is a file: a full tmpfs would then be a SIGBUS, so all pages are
//! provided at once ([`Memory::populate`]). They are huge ones where the kernel has them (MADV_HUGEPAGE:
//! Documentation/admin-guide/mm/transhuge.rst; a file must be on a tmpfs that is mounted with `huge=advise`). In a table
//! of a million connections a lookup would otherwise miss the TLB twice.
//!
//! Everything stored is an array of atomics, for which all bytes are valid values.

#[cfg(not(loom))]
use std::{fs::File, io, marker::PhantomData, ops::Deref, ptr::NonNull};

#[cfg(not(loom))]
use memmap2::{MmapOptions, MmapRaw};
#[cfg(not(loom))]
use weir_sync::Arc;

use weir_sync::atomic::AtomicU32;

/// Values that all bytes make valid, and whose zero bytes are their [`Default`].
///
/// # Safety
/// Any bytes must be a valid value, zeroes the default one; the type must consist of atomics only (so that shared memory
/// may change under it), be aligned to at most 64 bytes, and need no drop.
pub(crate) unsafe trait Zeroable: Default {}

// SAFETY: an atomic integer has the representation of the integer, for which any bytes are valid.
unsafe impl Zeroable for AtomicU32 {}
// SAFETY: as above.
unsafe impl Zeroable for weir_sync::atomic::AtomicU64 {}

/// Bytes of the header, and what the arrays are aligned to.
pub(crate) const PAGE_BYTES: usize = 4096;

/// A mapping.
#[cfg(not(loom))]
pub(crate) struct Memory {
    map: MmapRaw,
    /// Keeps the file's lock.
    _file: Option<File>,
}

#[cfg(not(loom))]
impl Memory {
    /// Zeroes that belong to this process alone.
    ///
    /// # Panics
    /// Where the memory does not exist.
    pub(crate) fn anonymous(bytes: usize) -> Arc<Self> {
        let map = MmapOptions::new().len(bytes).map_anon().expect("memory for a connection table");
        Self::new(map.into(), None)
    }

    /// The whole of a file, shared with whoever else maps it.
    pub(crate) fn of_file(file: File) -> io::Result<Arc<Self>> {
        let map = MmapRaw::map_raw(&file)?;
        Ok(Self::new(map, Some(file)))
    }

    /// Provides all pages now, as writing to each would.
    ///
    /// # Errors
    /// EFAULT where there are not enough, instead of the SIGBUS (madvise(2)).
    pub(crate) fn populate(&self) -> io::Result<()> {
        self.map.advise(memmap2::Advice::PopulateWrite)
    }

    fn new(map: MmapRaw, file: Option<File>) -> Arc<Self> {
        // A kernel without huge pages refuses; small ones do as well. Miri has no such call.
        if !cfg!(miri) {
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Arc::new(Self { map, _file: file })
    }
}

/// A fixed array in a memory.
#[cfg(not(loom))]
pub(crate) struct Lines<T> {
    first: NonNull<T>,
    len: usize,
    /// Keeps what `first` points into.
    _memory: Arc<Memory>,
    _values: PhantomData<T>,
}

#[cfg(not(loom))]
impl<T> Clone for Lines<T> {
    /// The same values.
    fn clone(&self) -> Self {
        Self { _memory: Arc::clone(&self._memory), ..*self }
    }
}

#[cfg(not(loom))]
impl<T: Zeroable> Lines<T> {
    const ALIGNED: () = assert!(align_of::<T>() <= 64 && !std::mem::needs_drop::<T>());

    /// `len` values that begin `offset` bytes into the memory.
    ///
    /// # Panics
    /// Where they do not lie in it, or not aligned.
    pub(crate) fn at(memory: &Arc<Memory>, offset: usize, len: usize) -> Self {
        let () = Self::ALIGNED;
        let bytes = len.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(offset)).expect("no overflow");
        assert!(bytes <= memory.map.len() && offset.is_multiple_of(64), "an array lies in its memory, aligned");
        // SAFETY: `offset` is within the mapping, as was just asserted.
        let first = unsafe { memory.map.as_mut_ptr().add(offset) }.cast::<T>();
        let first = NonNull::new(first).expect("a mapping is not at address 0");
        Self { first, len, _memory: Arc::clone(memory), _values: PhantomData }
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
        // SAFETY: `first` is aligned (a page's start plus a multiple of 64) and starts `len` values inside a mapping that lives
        // as long as `self`; any bytes are valid by `Zeroable`, and all access, other processes' too, is to atomics.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

// SAFETY: `Lines` owns a part of its mapping like an `Arc<[T]>`.
#[cfg(not(loom))]
unsafe impl<T: Send + Sync> Send for Lines<T> {}
// SAFETY: as above; shared access is to `&[T]` only.
#[cfg(not(loom))]
unsafe impl<T: Send + Sync> Sync for Lines<T> {}

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
