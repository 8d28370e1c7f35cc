//! How much a worker may do of what must not become a flood: answers to what it refuses, and lines for the log.
//!
//! Errors are rate-limited (RFC 1812, 4.3.2.8; RFC 4443, 2.4 f), so that packets with made-up sources do not make a node send as many.
//! TCP resets, ICMP errors, and among these those that path MTU discovery waits for have an allowance each: a flood of one kind takes nothing
//! from the clients that wait for another. And who causes answers has a share of his own ([`Shares`]), so that no pod silences the others.

use weir_packet::Tick;

use crate::frame::IfIndex;

/// Answers of a share that may be sent at once.
const ANSWERS: u32 = 1000;
/// Answers that a share earns with each tick of 10 ms.
const ANSWERS_PER_TICK: u32 = 10;
/// Shares that pods have. More pods than that meet in some of them; their devices' indices follow one another, so not before.
const PODS: usize = 256;

/// What one worker may still send of one kind.
#[derive(Clone, Debug)]
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

/// Who causes an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cause {
    /// Somebody outside: who, a source does not prove.
    Outside,
    /// The node itself.
    Host,
    /// The pod behind that device.
    Pod(IfIndex),
}

/// What one worker may still send of one kind of answers, by who causes them.
#[derive(Debug)]
pub(crate) struct Shares {
    outside: Allowance,
    host: Allowance,
    pods: Box<[Allowance]>,
}

impl Shares {
    /// That of a kind of answers.
    pub(crate) fn of_answers() -> Self {
        let share = Allowance::full(ANSWERS, ANSWERS_PER_TICK);
        Self { outside: share.clone(), host: share.clone(), pods: vec![share; PODS].into() }
    }

    /// Takes one of the share of who causes it, if any is left there.
    pub(crate) fn take(&mut self, cause: Cause, now: Tick) -> bool {
        let share = match cause {
            Cause::Outside => &mut self.outside,
            Cause::Host => &mut self.host,
            Cause::Pod(IfIndex(device)) => &mut self.pods[device as usize % PODS],
        };
        share.take(now)
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

    #[test]
    fn nobody_takes_from_the_share_of_another() {
        let mut shares = Shares::of_answers();
        let mut taken = |cause| (0..5000).filter(|_| shares.take(cause, Tick(100))).count();
        let [pod, other] = [7, 8].map(|index| Cause::Pod(IfIndex(index)));
        assert_eq!([taken(pod), taken(pod), taken(other)], [1000, 0, 1000]);
        assert_eq!([taken(Cause::Outside), taken(Cause::Host), taken(Cause::Outside)], [1000, 1000, 0]);
    }
}
