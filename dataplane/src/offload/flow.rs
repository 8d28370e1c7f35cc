//! The memory that workers, control and the kernel's programs share: flows that were handed over.
//!
//! The layout is that of `bpf/offload.h`, word for word. Everything is atomic: the programs read and write at any time.
//! What one of them may miss by that is told in [`super`].

use std::{io, ops::Deref, os::fd::AsRawFd, ptr::NonNull};

use memmap2::{MmapOptions, MmapRaw};
use weir_conntrack::{Windows, tcp};
use weir_packet::Direction;
use weir_sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// One direction of a flow; 96 bytes.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Way {
    /// Packets that the programs carried, each segment one.
    pub packets: AtomicU64,
    /// Bytes of those, as they came, from the IP header on.
    pub bytes: AtomicU64,
    /// Index of the device that they go to.
    pub device: AtomicU32,
    /// Destination and source MAC address.
    pub ethernet: [AtomicU8; 12],
    /// Bytes of the largest IP packet that fits.
    pub mtu: AtomicU16,
    /// An [`Exit`](super::recipe::Exit).
    pub exit: AtomicU8,
    /// Whether addresses or ports change.
    pub translates: AtomicU8,
    /// The new ports, as they stand in a packet.
    pub ports: AtomicU32,
    /// By how much the one's complement sum of the addresses grows.
    pub address_difference: AtomicU32,
    /// By how much that of the ports does.
    pub port_difference: AtomicU32,
    /// The outer source of packets that come in a tunnel, as it stands in a packet; 0: of those that come in none.
    pub comes_from: AtomicU32,
    /// The outer addresses of packets that leave in a tunnel; 0: they leave in none.
    pub tunnel: [AtomicU32; 2],
    /// The new addresses, as they stand in a packet; of IPv4 the first word of each.
    pub addresses: [[AtomicU32; 4]; 2],
}

/// A flow; 256 bytes.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Flow {
    /// A serial number, which each use of the slot has another of, and a [`Phase`] in the two lowest bits.
    state: AtomicU32,
    /// The last publication that does not change the verdict on it.
    pub epoch: AtomicU32,
    /// How far the windows are shifted.
    pub scales: [AtomicU8; 2],
    /// Whether windows are looked at.
    pub has_windows: AtomicU8,
    /// Whether what is outside of them passes.
    pub is_liberal: AtomicU8,
    zero: [AtomicU32; 5],
    /// end, max_end, max_win, max_ack of both sides ([`weir_conntrack::tcp`]).
    sides: [[AtomicU32; 4]; 2],
    /// By direction.
    pub ways: [Way; 2],
}

const _: () = assert!(size_of::<Way>() == 96 && size_of::<Flow>() == 256);

/// Where a slot stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Phase {
    /// Its flow was taken back, or it has none.
    Closed = 0,
    /// The programs carry its packets.
    Live = 1,
    /// It is being written, or will be.
    Pending = 2,
}

impl Flow {
    /// The serial number of the slot's use, and its phase.
    #[inline]
    pub fn state(&self) -> (u32, Phase) {
        let state = self.state.load(Ordering::Acquire);
        let phase = match state & 3 {
            1 => Phase::Live,
            2 => Phase::Pending,
            _ => Phase::Closed,
        };
        (state >> 2, phase)
    }

    /// Sets what [`Self::state`] tells.
    pub fn set_state(&self, serial: u32, phase: Phase) {
        self.state.store(serial << 2 | phase as u32, Ordering::Release);
    }

    /// Changes the phase, if it is still `from`; whether it was.
    pub fn change(&self, serial: u32, from: Phase, to: Phase) -> bool {
        let word = |phase: Phase| serial << 2 | phase as u32;
        self.state.compare_exchange(word(from), word(to), Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Begins another use of a slot that waits for it, if it still does; whether it did.
    pub fn begin_anew(&self, serial: u32, next: u32) -> bool {
        let word = |serial: u32| serial << 2 | Phase::Pending as u32;
        self.state.compare_exchange(word(serial), word(next), Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Takes the flow from the programs: a program that begins now does not find it any more.
    pub fn close(&self) {
        self.state.fetch_and(!3, Ordering::AcqRel);
    }

    /// Whether it has windows, and the connection is still the one that they are of.
    #[inline]
    pub fn has_windows(&self) -> bool {
        self.has_windows.load(Ordering::Relaxed) != 0
    }

    /// The connection began anew: the windows say nothing of it.
    pub fn forget_windows(&self) {
        self.has_windows.store(0, Ordering::Relaxed);
    }

    /// The windows, as the programs have moved them.
    #[inline]
    pub fn windows(&self) -> [[u32; 4]; 2] {
        std::array::from_fn(|side| std::array::from_fn(|word| self.sides[side][word].load(Ordering::Relaxed)))
    }

    /// Begins with these windows. Only of a slot that is not live.
    pub fn set_windows(&self, windows: &Windows) {
        for (side, numbers) in self.sides.iter().zip(&windows.sides) {
            side.iter().zip(numbers).for_each(|(word, number)| word.store(*number, Ordering::Relaxed));
        }
        self.scales.iter().zip(windows.scales).for_each(|(word, scale)| word.store(scale, Ordering::Relaxed));
        self.is_liberal.store(windows.is_liberal.into(), Ordering::Relaxed);
    }

    /// Moves the windows forward to what a worker has seen; a program may move them at the same time, further or not so far.
    pub fn advance(&self, sides: &[[u32; 4]; 2]) {
        for (words, numbers) in self.sides.iter().zip(sides) {
            for (place, (word, &number)) in words.iter().zip(numbers).enumerate() {
                tcp::advance(place, word, number);
            }
        }
    }

    /// Packets and bytes that were carried in a direction.
    pub fn carried(&self, direction: Direction) -> (u64, u64) {
        let way = &self.ways[direction as usize];
        (way.packets.load(Ordering::Relaxed), way.bytes.load(Ordering::Relaxed))
    }
}

/// Types that shared memory may hold.
///
/// # Safety
/// The type must consist of atomic integers only, so that any bytes are a valid value and may change at any time, and need no drop.
pub unsafe trait Shared {}

// SAFETY: atomic integers, and arrays and structures of those.
unsafe impl Shared for Flow {}
// SAFETY: an atomic integer.
unsafe impl Shared for AtomicU64 {}

/// An array in memory that a BPF map shares with this process, or, for tests, in memory of this process alone.
pub struct Mapped<T: Shared> {
    start: NonNull<T>,
    count: usize,
    /// Keeps the memory.
    _memory: MmapRaw,
}

// SAFETY: all that is reached through it is atomic, and the memory lives as long as it does.
unsafe impl<T: Shared> Send for Mapped<T> {}
// SAFETY: as above.
unsafe impl<T: Shared> Sync for Mapped<T> {}

impl<T: Shared> Mapped<T> {
    /// The values of an array that was made with `BPF_F_MMAPABLE` (bpf(2); Linux 5.5).
    ///
    /// # Errors
    /// Where the kernel refuses.
    ///
    /// # Panics
    /// Where the map's value is no multiple of 8 bytes: the kernel then puts space between them.
    pub fn of_map(map: impl AsRawFd, count: usize) -> io::Result<Self> {
        assert!(size_of::<T>().is_multiple_of(8));
        let memory = MmapOptions::new().len(count * size_of::<T>()).map_raw(map.as_raw_fd())?;
        Ok(Self::over(memory, count))
    }

    /// Zeroes that no program knows.
    ///
    /// # Errors
    /// Where there is no memory.
    pub fn private(count: usize) -> io::Result<Self> {
        let bytes = (count * size_of::<T>()).max(1);
        Ok(Self::over(MmapOptions::new().len(bytes).map_anon()?.into(), count))
    }

    fn over(memory: MmapRaw, count: usize) -> Self {
        assert!(memory.len() >= count * size_of::<T>() && memory.as_mut_ptr().addr().is_multiple_of(align_of::<T>()));
        let start = NonNull::new(memory.as_mut_ptr().cast()).expect("a mapping does not begin at address 0");
        Self { start, count, _memory: memory }
    }
}

impl<T: Shared> Deref for Mapped<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `over` has checked that so many lie there, aligned; any bytes are valid (`Shared`), change only as atomics do, and
        // stay mapped as long as `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl<T: Shared> std::fmt::Debug for Mapped<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mapped").field("count", &self.count).finish_non_exhaustive()
    }
}

/// Waits until no program runs that ran when this was called.
///
/// # Errors
/// Where the kernel cannot: with `nohz_full` it does not offer this (membarrier(2)).
pub fn wait_for_programs() -> io::Result<()> {
    const GLOBAL: libc::c_long = 1;
    // SAFETY: membarrier(2) takes numbers only.
    match unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
