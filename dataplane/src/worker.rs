//! The worker: a pinned thread that turns.
//!
//! A turn: receive a burst from each port, process it, transmit what it made, do a share of the upkeep. A look at the ports that finds nothing,
//! while no upkeep is due, is no turn: it reads the rings and nothing else.
//!
//! # What a turn costs without packets
//! A worker that is faster than who sends to it finds few packets at each look, so what is done once in a turn is paid by few of them.
//! - *The time* counts in ticks of 10 ms, so a turn reads the kernel's coarse clock, which is a load; the precise one takes the processor's
//!   counter, which costs more than a packet's lookup where a hypervisor has its hand in it. Only idle workers read that.
//! - *The memory fence* of entering a turn, only once something has come.
//! - *The sweep* of the tables by time ([`Sweep`]): so many connections for each tick that has passed, however many turns there were.
//!
//! # An idle worker
//! It spins for a while and then sleeps until a socket has a packet (adaptive mode), or spins for ever (busy mode). How long it spins depends on
//! what that has brought ([`Spin`]).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use weir_nat::Affinity;
use weir_packet::Tick;
use weir_sync::{Participant, Published};

use crate::{
    afxdp::AfXdp,
    clock::{coarse_now, now, now_ns},
    driver::{Driver, PortId},
    frame::Packet,
    offload::Offload,
    pipeline::{Context, Pipeline, process_burst},
    snapshot::Snapshot,
    tables::Tables,
};

/// Connections of each table that one turn looks at, at most, to remove the expired: it is a packet's delay.
const SWEEP_SHARE: u32 = 64;
/// In so many ticks a worker looks at every connection: 4 s. Until then an expired one keeps its place, but nobody finds it any more.
const SWEEP_ROUND: u32 = 4 * Tick::PER_SECOND;
/// Longest sleep: held packets and expired connections are looked after that often without traffic, and so are the devices.
const MAX_SLEEP: Duration = Duration::from_millis(100);
/// The same while packets are held: a neighbour may have been found.
const HELD_SLEEP: Duration = Duration::from_millis(1);

/// What the workers of one process share.
#[derive(Debug)]
pub struct Shared {
    /// Services, policy, forwarding.
    pub snapshot: Published<Snapshot>,
    /// Connections.
    pub tables: Tables,
    /// Which backends clients had.
    pub affinity: Affinity,
    /// Whether a TCP connection may be picked up mid-stream.
    pub tcp_loose: bool,
    /// To whom settled flows are handed over.
    pub offload: Option<Arc<Offload>>,
    /// Set to end all workers.
    pub stop: AtomicBool,
}

/// Whether an idle worker sleeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// It spins.
    Busy,
    /// It spins a while, then sleeps.
    Adaptive,
}

/// A driver that can wait for packets and that can fail.
pub trait Device: Driver {
    /// Waits until a port may have received something, or `limit` has passed.
    fn sleep(&mut self, limit: Duration);

    /// Looks after the devices.
    ///
    /// # Errors
    /// Where one failed for good.
    fn check(&mut self) -> std::io::Result<()>;
}

impl Device for AfXdp {
    fn sleep(&mut self, limit: Duration) {
        AfXdp::sleep(self, limit);
    }

    fn check(&mut self) -> std::io::Result<()> {
        AfXdp::check(self);
        self.fault().map_or(Ok(()), |fault| Err(std::io::Error::other(fault)))
    }
}

/// The sweep over the tables, spread over time: with each tick a worker owes a look at a part of the connections, and pays in turns.
///
/// *Bound.* A worker that makes `t` turns a second looks at each connection once in 4 s, or in `capacity / (64 t)` seconds if that is
/// more; several workers share the work, so it is sooner then. With bursts of 64 packets at a million a second `t` is 15,600, and the bound 4 s up to
/// four million connections. Without traffic a worker pays all that it owes at least every [`MAX_SLEEP`].
#[derive(Debug)]
struct Sweep {
    capacity: u32,
    last: Tick,
    owed: u32,
}

impl Sweep {
    fn new(capacity: usize, now: Tick) -> Self {
        Self { capacity: u32::try_from(capacity).unwrap_or(u32::MAX), last: now, owed: 0 }
    }

    /// Notes the time.
    #[inline]
    fn note(&mut self, now: Tick) {
        let passed = now.since(self.last);
        if passed > 0 {
            self.last = now;
            let due = (u64::from(self.capacity) * u64::from(passed)).div_ceil(u64::from(SWEEP_ROUND));
            self.owed = (u64::from(self.owed) + due).min(u64::from(self.capacity)) as u32;
        }
    }

    /// What the next turn has to look at.
    #[inline]
    fn take_share(&mut self) -> u32 {
        let share = self.owed.min(SWEEP_SHARE);
        self.owed -= share;
        share
    }
}

/// How long an idle worker spins before it sleeps, in nanoseconds.
///
/// A packet that comes while it spins is handled some microseconds earlier than one that has to wake it; but the time is taken from whoever shares the
/// processor: pods, and the kernel that carries offloaded flows, whose first packets visit the worker now and then. So it spins long where packets
/// came soon, and not at all where they come one by one.
#[derive(Debug)]
struct Spin {
    limit_ns: u64,
}

impl Spin {
    const MOST_NS: u64 = 200_000;
    const LEAST_NS: u64 = 12_500;

    /// A packet came after so long without any, by which the worker slept.
    fn learn(&mut self, idle_ns: u64) {
        self.limit_ns = if idle_ns < Self::MOST_NS {
            (2 * self.limit_ns).clamp(Self::LEAST_NS, Self::MOST_NS)
        } else if self.limit_ns > Self::LEAST_NS {
            self.limit_ns / 2
        } else {
            0
        };
    }
}

/// One worker.
pub struct Worker<D> {
    driver: D,
    pipeline: Pipeline,
    participant: Participant,
    shared: Arc<Shared>,
    burst: Vec<Packet>,
    burst_limit: usize,
    mode: Mode,
    sweep: Sweep,
    spin: Spin,
}

impl<D: Device> Worker<D> {
    /// A worker over `driver`; `burst_limit` packets are handled in one turn.
    pub fn new(
        driver: D,
        pipeline: Pipeline,
        participant: Participant,
        shared: Arc<Shared>,
        burst_limit: usize,
        mode: Mode,
    ) -> Self {
        let capacity = shared.tables.v4.capacity().max(shared.tables.v6.capacity());
        Self {
            driver,
            pipeline,
            participant,
            shared,
            burst: Vec::with_capacity(burst_limit),
            burst_limit,
            mode,
            sweep: Sweep::new(capacity, now()),
            spin: Spin { limit_ns: Spin::MOST_NS },
        }
    }

    /// Turns until `stop` is set.
    ///
    /// # Errors
    /// Where a device fails for good.
    pub fn run(&mut self) -> std::io::Result<()> {
        let mut checked_ns = now_ns();
        // Since when nothing has come, and whether the worker slept meanwhile.
        let (mut idle_since_ns, mut slept) = (None, false);
        while !self.shared.stop.load(Ordering::Relaxed) {
            if self.turn() > 0 {
                if let (true, Some(since)) = (slept, idle_since_ns) {
                    self.spin.learn(now_ns() - since);
                }
                (idle_since_ns, slept) = (None, false);
                continue;
            }
            std::hint::spin_loop();
            if self.sweep.owed > 0 {
                continue;
            }
            let now_ns = now_ns();
            self.sweep.note(Tick::from_ns(now_ns));
            if now_ns - checked_ns >= MAX_SLEEP.as_nanos() as u64 {
                checked_ns = now_ns;
                self.driver.check()?;
            }
            let idle_ns = now_ns - *idle_since_ns.get_or_insert(now_ns);
            if self.mode == Mode::Adaptive && idle_ns >= self.spin.limit_ns {
                slept = true;
                // Outside a turn: nobody waits for a sleeping worker.
                self.driver.sleep(if self.pipeline.held() > 0 { HELD_SLEEP } else { MAX_SLEEP });
            }
        }
        self.pipeline.give_up_held(&mut self.driver);
        Ok(())
    }

    /// What it receives from and sends by.
    pub fn driver_mut(&mut self) -> &mut D {
        &mut self.driver
    }

    /// One turn, if anything has come or is due; the number of packets handled.
    pub fn turn(&mut self) -> usize {
        let Self { driver, pipeline, participant, shared, burst, burst_limit, sweep, .. } = self;
        let mut found = receive(driver, 0, burst, *burst_limit);
        if found.is_none() && sweep.owed == 0 && pipeline.held() == 0 {
            return 0;
        }
        let turn = participant.enter();
        let now = coarse_now();
        let context = Context {
            tcp_loose: shared.tcp_loose,
            offload: shared.offload.as_deref(),
            ..Context::new(shared.snapshot.load(&turn), &shared.tables, &shared.affinity, &turn, now)
        };
        let mut handled = 0;
        while let Some(port) = found {
            handled += burst.len();
            process_burst(pipeline, driver, burst, &context);
            found = receive(driver, port + 1, burst, *burst_limit);
        }
        sweep.note(now);
        pipeline.maintain(driver, &context, sweep.take_share());
        pipeline.flush(driver);
        handled
    }
}

/// Receives from the first port that has something, from this one on; which it is.
#[inline]
fn receive(driver: &mut impl Driver, from: usize, burst: &mut Vec<Packet>, limit: usize) -> Option<usize> {
    (from..driver.ports()).find(|port| driver.receive(PortId(*port as u8), burst, limit) > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_round_takes_its_time_however_many_turns_there_are() {
        for capacity in [1, 64, 4096, 266_240, 1_000_000] {
            let begin = Tick(u32::MAX - 100);
            // 1,600 turns a second are enough for a hundred thousand connections; 100,000 turns look at no more.
            for turns_a_tick in [16, 1000] {
                let mut sweep = Sweep::new(capacity, begin);
                assert_eq!(sweep.take_share(), 0, "nothing is owed at the start");
                let mut looked_at = 0;
                for tick in 1..=SWEEP_ROUND {
                    for _ in 0..turns_a_tick {
                        sweep.note(Tick(begin.0.wrapping_add(tick)));
                        looked_at += sweep.take_share();
                    }
                }
                let due = (capacity as u32).min(turns_a_tick * SWEEP_SHARE * SWEEP_ROUND);
                assert!((due..=due + SWEEP_ROUND).contains(&looked_at), "{capacity}, {turns_a_tick}: {looked_at}");
            }
        }
    }

    #[test]
    fn after_a_long_sleep_no_more_is_owed_than_there_is() {
        let mut sweep = Sweep::new(1000, Tick(5));
        sweep.note(Tick(1_000_000));
        let shares: Vec<u32> = std::iter::repeat_with(|| sweep.take_share()).take_while(|share| *share > 0).collect();
        assert_eq!((shares.iter().sum::<u32>(), shares.iter().max()), (1000, Some(&SWEEP_SHARE)));
        // The coarse clock may be a tick behind the precise one.
        sweep.note(Tick(999_999));
        assert_eq!((sweep.owed, sweep.last), (0, Tick(1_000_000)));
    }

    #[test]
    fn spinning_follows_what_it_brings() {
        let mut spin = Spin { limit_ns: Spin::MOST_NS };
        let mut learn = |idle_us: u64| {
            spin.learn(idle_us * 1000);
            spin.limit_ns
        };
        assert_eq!([1000; 6].map(&mut learn), [100_000, 50_000, 25_000, 12_500, 0, 0], "lonely packets");
        assert_eq!([150; 6].map(&mut learn), [12_500, 25_000, 50_000, 100_000, 200_000, 200_000], "close ones");
    }
}
