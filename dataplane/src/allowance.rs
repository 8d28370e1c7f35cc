//! How much a worker may do of what must not become a flood: answers to what it refuses, and lines for the log.
//!
//! Errors are rate-limited (RFC 1812, 4.3.2.8; RFC 4443, 2.4 f), so that packets with made-up sources do not make a node send as many.
//! ICMP errors and TCP resets have an allowance each: a flood of one kind takes nothing from the clients that wait for the other.

use weir_packet::Tick;

/// Answers that may be sent at once.
const ANSWERS: u32 = 1000;
/// Answers that are earned with each tick of 10 ms.
const ANSWERS_PER_TICK: u32 = 10;

/// What one worker may still send of one kind.
#[derive(Debug)]
pub(crate) struct Allowance {
    left: u32,
    most: u32,
    per_tick: u32,
    earned_at: Tick,
}

impl Allowance {
    /// So many at once, and so many are earned with each tick.
    pub(crate) fn full(most: u32, per_tick: u32) -> Self {
        Self { left: most, most, per_tick, earned_at: Tick::default() }
    }

    /// That of a kind of answers.
    pub(crate) fn of_answers() -> Self {
        Self::full(ANSWERS, ANSWERS_PER_TICK)
    }

    /// Takes one, if any is left.
    pub(crate) fn take(&mut self, now: Tick) -> bool {
        let earned = now.since(self.earned_at).saturating_mul(self.per_tick);
        if earned > 0 {
            self.left = self.left.saturating_add(earned).min(self.most);
            self.earned_at = now;
        }
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allowance_gives_all_at_once_and_then_what_it_earns() {
        let mut allowance = Allowance::full(3, 2);
        let mut taken = |now| (0..10).filter(|_| allowance.take(Tick(now))).count();
        assert_eq!([taken(100), taken(100), taken(101), taken(200)], [3, 0, 2, 3]);
    }
}
