//! The clock.

use nix::time::{ClockId, clock_gettime};
use weir_packet::Tick;

/// The time by the clock that all processes of a boot share (CLOCK_MONOTONIC), since connections outlive a process.
pub fn now() -> Tick {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every kernel has this clock");
    Tick::from_ns(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}
