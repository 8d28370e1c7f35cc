//! The arrays that a table consists of, and where they lie in its memory.
//!
//! A page for the header ([`crate::file`]), then the arrays, each at the start of a page. All references between them
//! are indices, so the bytes mean the same at whatever address, in whatever process.

use weir_packet::Address;
#[cfg(not(loom))]
use weir_sync::Arc;
use weir_sync::atomic::AtomicU32;

#[cfg(not(loom))]
use crate::storage::Memory;
use crate::{
    bucket::Bucket,
    conn,
    storage::{Lines, PAGE_BYTES},
    tcp::TcpLine,
};

/// Where in its memory each part of a table begins, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Layout {
    buckets: usize,
    pub(crate) conns: usize,
    pub(crate) tcp: usize,
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
pub(crate) const USED_AT: usize = 1024;

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
