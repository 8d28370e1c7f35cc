//! How much a worker may answer to what it refuses.
//!
//! Errors are rate-limited (RFC 1812, 4.3.2.8; RFC 4443, 2.4 f), so that packets with made-up sources do not make a node send as many.
//! ICMP errors and TCP resets have an allowance each: a flood of one kind takes nothing from the clients that wait for the other.

use weir_packet::Tick;

/// What may be sent at once.
const BURST: u32 = 1000;
/// What is earned with each tick of 10 ms.
const PER_TICK: u32 = 10;

/// What one worker may still send of one kind.
#[derive(Debug)]
pub(crate) struct Allowance {
    left: u32,
    earned_at: Tick,
}

impl Allowance {
    pub(crate) fn full() -> Self {
        Self { left: BURST, earned_at: Tick::default() }
    }

    /// Takes one, if any is left.
    pub(crate) fn take(&mut self, now: Tick) -> bool {
        let earned = now.since(self.earned_at).saturating_mul(PER_TICK);
        if earned > 0 {
            self.left = self.left.saturating_add(earned).min(BURST);
            self.earned_at = now;
        }
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}
