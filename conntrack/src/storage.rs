//! The table's memory: one mapping, zero, and not there before it is touched.
//!
//! # What
//! A table is sized for the worst case, so what it does not use must cost nothing: its memory is one mapping, anonymous or
//! of a file, whose pages the kernel provides at their first use; huge ones where it has them (MADV_HUGEPAGE:
//! Documentation/admin-guide/mm/transhuge.rst; a file must be on a tmpfs that is mounted with `huge=advise`). In a table
//! of a million connections a lookup would otherwise miss the TLB twice.
//!
//! # Layout
//! A page for the header ([`crate::file`]), then the arrays, each at the start of a page. All references between them
//! are indices, so the bytes mean the same at whatever address, in whatever process.
//!
//! Everything stored is an array of atomics, for which all bytes are valid values.

#[cfg(not(loom))]
use std::{fs::File, io, marker::PhantomData, ops::Deref, ptr::NonNull};

#[cfg(not(loom))]
use memmap2::{MmapOptions, MmapRaw};
#[cfg(not(loom))]
use weir_sync::Arc;

use weir_packet::Address;
use weir_sync::atomic::AtomicU32;

use crate::{bucket::Bucket, conn, tcp::TcpLine};

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

/// Where in its memory each part of a table begins, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Layout {
    buckets: usize,
    conns: usize,
    tcp: usize,
    links: usize,
    /// All of it.
    pub(crate) bytes: usize,
    bucket_count: usize,
    conn_count: usize,
    conn_lines: usize,
}

impl Layout {
    /// The layout of a table with so many buckets and connections.
    pub(crate) fn new<A: Address>(bucket_count: u32, conn_count: u32) -> Self {
        let (bucket_count, conn_count) = (bucket_count as usize, conn_count as usize);
        let conn_lines = conn_count * conn::Lines::<A>::COUNT;
        let after = |start: usize, bytes: usize| (start + bytes).next_multiple_of(PAGE_BYTES);
        let buckets = PAGE_BYTES;
        let conns = after(buckets, bucket_count * 64);
        let tcp = after(conns, conn_lines * 64);
        let links = after(tcp, conn_count * 64);
        let bytes = after(links, conn_count * 4);
        Self { buckets, conns, tcp, links, bytes, bucket_count, conn_count, conn_lines }
    }
}

/// The arrays of a table.
pub(crate) struct Arrays {
    pub(crate) buckets: Lines<Bucket>,
    pub(crate) conns: Lines<conn::Line>,
    pub(crate) tcp: Lines<TcpLine>,
    pub(crate) links: Lines<AtomicU32>,
    /// One word: connections from this index on were never used.
    pub(crate) used: Lines<AtomicU32>,
}

/// Where the word of [`Arrays::used`] stands in the header's page, in bytes.
#[cfg(not(loom))]
const USED_AT: usize = 1024;

#[cfg(not(loom))]
impl Arrays {
    /// The arrays in a memory of that layout.
    pub(crate) fn of(memory: &Arc<Memory>, layout: &Layout) -> Self {
        Self {
            buckets: Lines::at(memory, layout.buckets, layout.bucket_count),
            conns: Lines::at(memory, layout.conns, layout.conn_lines),
            tcp: Lines::at(memory, layout.tcp, layout.conn_count),
            links: Lines::at(memory, layout.links, layout.conn_count),
            used: Lines::at(memory, USED_AT, 1),
        }
    }

    /// Arrays of their own, all zero.
    ///
    /// # Panics
    /// Where the memory does not exist.
    pub(crate) fn new(layout: &Layout) -> Self {
        Self::of(&Memory::anonymous(layout.bytes), layout)
    }
}

#[cfg(loom)]
impl Arrays {
    pub(crate) fn new(layout: &Layout) -> Self {
        Self {
            buckets: Lines::new(layout.bucket_count),
            conns: Lines::new(layout.conn_lines),
            tcp: Lines::new(layout.conn_count),
            links: Lines::new(layout.conn_count),
            used: Lines::new(1),
        }
    }
}

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
    fn new(len: usize) -> Self {
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
    use std::net::{Ipv4Addr, Ipv6Addr};

    use weir_sync::atomic::Ordering;

    use super::*;
    use crate::conn::Line;

    #[test]
    fn arrays_are_aligned_apart_and_zero() {
        for layout in [Layout::new::<Ipv4Addr>(11, 100), Layout::new::<Ipv6Addr>(7, 1)] {
            let arrays = Arrays::new(&layout);
            assert!(arrays.conns.iter().all(|line| line.state.load(Ordering::Relaxed) == 0));
            assert_eq!((arrays.conns.as_ptr() as usize % 64, arrays.used.len()), (0, 1));
            let end = |start: *const u8, bytes: usize| start as usize + bytes;
            let starts = [
                end(arrays.buckets.as_ptr().cast(), 0),
                end(arrays.buckets.as_ptr().cast(), 64 * arrays.buckets.len()),
                end(arrays.conns.as_ptr().cast(), 0),
                end(arrays.conns.as_ptr().cast(), 64 * arrays.conns.len()),
                end(arrays.tcp.as_ptr().cast(), 0),
                end(arrays.tcp.as_ptr().cast(), 64 * arrays.tcp.len()),
                end(arrays.links.as_ptr().cast(), 0),
                end(arrays.links.as_ptr().cast(), 4 * arrays.links.len()),
            ];
            assert!(starts.is_sorted() && end(arrays.used.as_ptr().cast(), 4) <= starts[0]);
            assert!(starts[7] <= end(arrays.buckets.as_ptr().cast(), 0) - PAGE_BYTES + layout.bytes);
        }
    }

    #[test]
    fn two_mappings_of_a_file_show_the_same() {
        if cfg!(miri) {
            return;
        }
        let file = tempfile::tempfile().unwrap();
        let layout = Layout::new::<Ipv4Addr>(7, 10);
        file.set_len(layout.bytes as u64).unwrap();
        let memories = [(); 2].map(|()| Memory::of_file(file.try_clone().unwrap()).unwrap());
        let [first, second] = memories.map(|memory| Arrays::of(&memory, &layout));
        first.conns.prefetch(3);
        first.conns[3].state.store(7, Ordering::Relaxed);
        assert_ne!(first.conns.as_ptr(), second.conns.as_ptr());
        assert_eq!(second.conns[3].state.load(Ordering::Relaxed), 7);
    }

    #[test]
    #[should_panic(expected = "lies in its memory")]
    fn an_array_that_does_not_lie_in_its_memory_is_refused() {
        Lines::<Line>::at(&Memory::anonymous(64), 0, 2);
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
        let arrays = Arrays::new(&Layout::new::<Ipv4Addr>(1 << 20, 1 << 22));
        arrays.conns[1 << 21].state.store(1, Ordering::Relaxed);
        assert!(resident() < before + (32 << 20), "600 MiB were asked for, one line was used");
    }
}
