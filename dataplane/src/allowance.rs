//! How much a worker may do of what must not become a flood: answers to what it refuses, and lines for the log.
//!
//! Errors are rate-limited (RFC 1812, 4.3.2.8; RFC 4443, 2.4 f), so that packets with made-up sources do not make a node send as many.
//! TCP resets, ICMP errors, and among these those that path MTU discovery waits for have an allowance each: a flood of one kind takes nothing
//! from the clients that wait for another. And who causes answers has a share of his own ([`Shares`]), so that no pod silences the others, and
//! nobody outside all others there.
//!
//! Outside, a source does not prove who sent it, but the answer goes there: so each network has a share (/24, and /56 as providers give to a
//! site), that of networks whose hashes meet. The hash is keyed, so that nobody can choose whom to meet. Who makes up sources of all networks
//! empties all shares; but they are refilled each for itself, and together they bound what a worker sends.

use weir_packet::{Address, Tick};

use crate::{frame::IfIndex, mix::mixed};

/// Answers of a share that may be sent at once.
const ANSWERS: u32 = 1000;
/// Answers that a share earns with each tick of 10 ms.
const ANSWERS_PER_TICK: u32 = 10;
/// Shares that pods have. More pods than that meet in some of them; their devices' indices follow one another, so not before.
const PODS: usize = 256;
/// Shares that networks outside have.
const NETWORKS: usize = 256;
/// Answers to one of them that may be sent at once; of all together a worker sends 25,600 a second at most.
const ANSWERS_OUTSIDE: u32 = 100;
const ANSWERS_OUTSIDE_PER_TICK: u32 = 1;
/// MAC addresses of a pod that are told at once where others were known, and the ticks that each more takes.
const CHANGES: u32 = 4;
const TICKS_PER_CHANGE: u32 = 100;

/// What one worker may still send of one kind.
#[derive(Clone, Debug)]
pub(crate) struct Allowance {
    left: u32,
    most: u32,
    per_earning: u32,
    earning_ticks: u32,
    earned_at: Tick,
}

impl Allowance {
    /// So many at once, and so many are earned with each tick.
    pub(crate) fn full(most: u32, per_tick: u32) -> Self {
        Self { left: most, most, per_earning: per_tick, earning_ticks: 1, earned_at: Tick::default() }
    }

    /// So many at once, and one is earned in so many ticks.
    fn seldom(most: u32, earning_ticks: u32) -> Self {
        Self { earning_ticks, ..Self::full(most, 1) }
    }

    /// Takes one, if any is left.
    pub(crate) fn take(&mut self, now: Tick) -> bool {
        let earned = (now.since(self.earned_at) / self.earning_ticks).saturating_mul(self.per_earning);
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
    /// Somebody outside, in that network.
    Outside(Network),
    /// The node itself.
    Host,
    /// The pod behind that device.
    Pod(IfIndex),
}

/// A network outside, as far as sources tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Network(u128);

impl Network {
    /// That of an address.
    pub(crate) fn of<A: Address>(source: A) -> Self {
        let host_bits = if A::WORDS == 1 { 8 } else { 128 - 56 };
        Self(source.to_bits128() >> host_bits)
    }
}

/// What one worker may still send of one kind of answers, by who causes them.
#[derive(Debug)]
pub(crate) struct Shares {
    secret: u64,
    outside: Box<[Allowance]>,
    host: Allowance,
    pods: Box<[Allowance]>,
}

impl Shares {
    /// Those of a kind of answers. `secret`: a random number, which decides which networks outside have one together.
    pub(crate) fn of_answers(secret: u64) -> Self {
        let share = Allowance::full(ANSWERS, ANSWERS_PER_TICK);
        let outside = Allowance::full(ANSWERS_OUTSIDE, ANSWERS_OUTSIDE_PER_TICK);
        Self { secret, outside: vec![outside; NETWORKS].into(), host: share.clone(), pods: vec![share; PODS].into() }
    }

    /// Those of news of pods' MAC addresses.
    pub(crate) fn of_changes() -> Self {
        let share = Allowance::seldom(CHANGES, TICKS_PER_CHANGE);
        Self { secret: 0, outside: [share.clone()].into(), host: share.clone(), pods: vec![share; PODS].into() }
    }

    /// Takes one of the share of who causes it, if any is left there.
    pub(crate) fn take(&mut self, cause: Cause, now: Tick) -> bool {
        let share = match cause {
            Cause::Outside(Network(network)) => {
                let hash = mixed((self.secret, network as u64, (network >> 64) as u64));
                &mut self.outside[(hash >> 32) as usize % self.outside.len()]
            }
            Cause::Host => &mut self.host,
            Cause::Pod(IfIndex(device)) => &mut self.pods[device as usize % PODS],
        };
        share.take(now)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    #[test]
    fn an_allowance_gives_all_at_once_and_then_what_it_earns() {
        let mut allowance = Allowance::full(3, 2);
        let mut taken = |now| (0..10).filter(|_| allowance.take(Tick(now))).count();
        assert_eq!([taken(100), taken(100), taken(101), taken(200)], [3, 0, 2, 3]);
        let mut allowance = Allowance::seldom(2, 50);
        let mut taken = |now| (0..10).filter(|_| allowance.take(Tick(now))).count();
        assert_eq!([taken(100), taken(149), taken(150), taken(199), taken(1000)], [2, 0, 1, 0, 2]);
    }

    #[test]
    fn nobody_takes_from_the_share_of_another() {
        let mut shares = Shares::of_answers(1);
        let mut taken = |cause| (0..5000).filter(|_| shares.take(cause, Tick(100))).count();
        let [pod, other] = [7, 8].map(|index| Cause::Pod(IfIndex(index)));
        assert_eq!([taken(pod), taken(pod), taken(other)], [1000, 0, 1000]);
        let outside = |address: &str| match address.parse().unwrap() {
            IpAddr::V4(address) => Cause::Outside(Network::of(address)),
            IpAddr::V6(address) => Cause::Outside(Network::of(address)),
        };
        assert_eq!([taken(outside("192.0.2.1")), taken(Cause::Host), taken(outside("192.0.2.200"))], [100, 1000, 0]);
        assert_eq!([taken(outside("192.0.3.1")), taken(outside("2001:db8:0:1::1"))], [100, 100]);
        assert_eq!(taken(outside("2001:db8:0:ff::1")), 0, "the same site");
        assert_eq!(taken(outside("2001:db8:0:100::1")), 100);
    }

    /// Whom a flood from everywhere meets is not the flood's choice, and no share serves more than its part.
    #[test]
    fn networks_spread_over_all_shares() {
        for secret in [0, 1, u64::MAX] {
            let mut shares = Shares::of_answers(secret);
            let mut taken = 0;
            for network in 0..65_536_u32 {
                let cause = Cause::Outside(Network::of(Ipv4Addr::from_bits(network << 8 | 1)));
                taken += usize::from(shares.take(cause, Tick(100)));
            }
            let most = NETWORKS * ANSWERS_OUTSIDE as usize;
            assert!(taken == most, "{taken} of {most}, as 256 networks meet in each");
        }
    }
}
