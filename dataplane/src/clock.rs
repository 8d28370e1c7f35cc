//! The time.

use nix::time::{ClockId, clock_gettime};
use weir_packet::Tick;

/// The time by the clock that all processes of a boot share (CLOCK_MONOTONIC), since connections outlive a process.
pub fn now() -> Tick {
    Tick::from_ns(now_ns())
}

/// The same in nanoseconds.
#[inline]
pub fn now_ns() -> u64 {
    read(ClockId::CLOCK_MONOTONIC)
}

/// The same clock as of the kernel's last timer interrupt, at most one of its ticks ago.
#[inline]
pub fn coarse_now() -> Tick {
    Tick::from_ns(read(ClockId::CLOCK_MONOTONIC_COARSE))
}

#[inline]
fn read(clock: ClockId) -> u64 {
    let time = clock_gettime(clock).expect("every kernel has this clock");
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}
