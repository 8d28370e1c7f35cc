//! How the cases are measured: workers over memory rings, whose flows are all open before anything is.
//!
//! Every flow is opened, answered, and old enough to have proved itself. TCP streams move: each segment carries 18 bytes more, within one
//! large window, so that none is a retransmission (but where workers have the same flows: there one's segments are late by what the other is
//! ahead). A round writes packets into frames, has them handled a burst at a time, and takes what is sent; what writing and taking cost alone
//! is measured in rounds without the pipeline, which alternate with the others, so that a noisy machine disturbs both alike. A figure is the
//! median of the rounds with less that of the rounds without.
//!
//! Several workers have one connection table and a core each. Their rounds begin together, so that none is measured while the others rest.

use std::{
    hint,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use weir_dataplane::{
    driver::Driver,
    frame::{IfIndex, Packet},
    memory::MemoryDriver,
    memory_worker::{MemoryWorker, Room, Shared},
    pipeline::{Context, Pipeline, process_burst},
};
use weir_packet::Tick;

use crate::{
    cases::{Case, MAX_FLOWS, Sender, snapshot},
    figures::Spread,
};

/// Packets of a burst.
pub const BURST: usize = 64;
const ROOM: Room = Room { burst: BURST, ports: 2, frames: 4 * BURST as u32, events: 16 };
/// Bursts of a round of one worker: so short that few are interrupted by what else runs on the machine, which then leaves the median alone.
const ROUND_BURSTS: u32 = 16;
/// And of several workers: so long that it matters little who hears first that a round begins.
const SHARED_ROUND_BURSTS: u32 = 128;

/// Which flows the workers handle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flows {
    /// Each its own, as where a NIC spreads flows over queues.
    Apart,
    /// All of them the same: both directions of a flow, or a trunk's and an uplink's queue, may be different workers'.
    Same,
}

impl Flows {
    /// As results name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Apart => "apart",
            Self::Same => "same",
        }
    }
}

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub enum Length {
    /// So many rounds with the pipeline, and as many without.
    Rounds(usize),
    /// About so long.
    Time(Duration),
}

/// What was measured.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Measurement {
    /// The case.
    pub case: Case,
    /// Flows that the packets belong to, of all workers together.
    pub flows: u32,
    /// Workers at once.
    pub workers: usize,
    /// Which flows each has.
    pub shares: Flows,
    /// Rounds with the pipeline, of all workers together.
    pub rounds: usize,
    /// Nanoseconds per packet and worker; writing and taking packets subtracted.
    pub ns: Spread,
    /// Nanoseconds per packet for writing and taking alone: the median.
    pub overhead_ns: f64,
}

impl Measurement {
    /// Packets a second of all workers together, if packets cost nothing but the pipeline.
    pub fn packets_per_second(&self) -> f64 {
        self.workers as f64 * 1e9 / self.ns.median
    }
}

/// One worker and the packets that it gets.
struct Lane {
    worker: MemoryWorker,
    senders: Vec<Sender>,
    next: usize,
}

impl Lane {
    /// Writes a burst into frames, has it handled, and hands what was sent to `look`.
    fn round(
        &mut self,
        shared: &Shared,
        now: Tick,
        handle: impl FnOnce(&mut Pipeline, &mut MemoryDriver, &mut Vec<Packet>, &Context<'_>),
        mut look: impl FnMut(IfIndex, &[u8]),
    ) {
        let Self { worker, senders, next } = self;
        for _ in 0..BURST {
            let count = senders.len();
            let sender = &mut senders[*next];
            *next = if *next + 1 == count { 0 } else { *next + 1 };
            sender.advance();
            worker.push(sender.device, &sender.frame);
        }
        worker.turn(shared, now, handle);
        worker.driver.drain_sent(|device, bytes| look(device, hint::black_box(bytes)));
    }

    /// ns per packet of one round of bursts, with the pipeline or without.
    fn sample(&mut self, shared: &Shared, now: Tick, bursts: u32, with_pipeline: bool) -> f64 {
        let begin = Instant::now();
        for _ in 0..bursts {
            if with_pipeline {
                self.round(shared, now, measured_burst, |_, _| {});
            } else {
                self.round(shared, now, release, |_, _| {});
            }
        }
        begin.elapsed().as_nanos() as f64 / f64::from(bursts) / BURST as f64
    }
}

/// Workers over memory, whose flows are all open.
pub struct Bench {
    case: Case,
    flows: u32,
    shares: Flows,
    shared: Shared,
    lanes: Vec<Lane>,
    now: Tick,
}

impl Bench {
    /// Opens that many flows of a case.
    ///
    /// # Errors
    /// Where there are too few flows for the workers, or too many, or a packet was not forwarded.
    pub fn new(case: Case, flows: u32, workers: usize, shares: Flows) -> Result<Self, String> {
        if !(workers.max(1)..=MAX_FLOWS as usize).contains(&(flows as usize)) || workers == 0 {
            return Err(format!(
                "{flows} flows and {workers} workers: there must be 1 to {MAX_FLOWS} flows, and one at least for each worker"
            ));
        }
        let shared = Shared::repeatable(snapshot(), case.entries(flows));
        let lane = |number: usize| Lane {
            worker: MemoryWorker::new(&shared, ChaCha8Rng::seed_from_u64(7 + number as u64), ROOM),
            senders: Vec::new(),
            next: 0,
        };
        let lanes = (0..workers).map(lane).collect();
        let mut bench = Self { case, flows, shares, shared, lanes, now: Tick(1) };
        bench.open()?;
        Ok(bench)
    }

    /// Opens every flow, has it answered, and both again after more than two seconds, when a UDP flow is taken for a stream.
    fn open(&mut self) -> Result<(), String> {
        let all: Vec<u32> = (0..self.flows).collect();
        let workers = self.lanes.len();
        for (number, lane) in self.lanes.iter_mut().enumerate() {
            let own: Vec<u32> = all.iter().copied().skip(number).step_by(workers).collect();
            for (step, senders) in self.case.opening(&own).enumerate() {
                self.now = Tick(1 + 300 * step as u32);
                (lane.senders, lane.next) = (senders, 0);
                for _ in 0..own.len().div_ceil(BURST) {
                    lane.round(&self.shared, self.now, opening_burst, |_, _| {});
                }
            }
            lane.senders = self.case.packets(if self.shares == Flows::Same { &all } else { &own });
            // Workers with the same flows are not at the same one at once.
            lane.next = if self.shares == Flows::Same { lane.senders.len() * number / workers } else { 0 };
        }
        let open = self.shared.tables.v4.len() + self.shared.tables.v6.len();
        if open == self.flows as usize {
            Ok(())
        } else {
            Err(format!(
                "only {open} of {} flows were opened: {:?}",
                self.flows,
                self.lanes[0].worker.pipeline.totals()
            ))
        }
    }

    /// Has the first worker handle a burst, and hands what was sent to `look`.
    pub fn burst(&mut self, look: impl FnMut(IfIndex, &[u8])) {
        self.lanes[0].round(&self.shared, self.now, measured_burst, look);
    }

    /// Whether every packet so far was forwarded.
    ///
    /// # Errors
    /// Where one was not: the counters of its worker.
    pub fn all_forwarded(&self) -> Result<(), String> {
        let totals = self.lanes.iter().map(|lane| lane.worker.pipeline.totals());
        match totals.into_iter().find(|totals| totals.dropped() > 0 || totals.punted > 0) {
            Some(totals) => Err(format!("not every packet was forwarded: {totals:?}")),
            None => Ok(()),
        }
    }

    /// Measures all workers at once.
    ///
    /// # Errors
    /// Where a packet was not forwarded.
    pub fn measure(&mut self, length: Length) -> Result<Measurement, String> {
        let workers = self.lanes.len();
        let bursts = if workers == 1 { ROUND_BURSTS } else { SHARED_ROUND_BURSTS };
        // Streams go on in both kinds of rounds.
        let round_packets = 2 * u64::from(bursts) * BURST as u64;
        let fewest = self.lanes.iter().map(|lane| lane.senders.len()).min().unwrap_or(0) as u64;
        let most_rounds = self.case.packets_per_flow().saturating_mul(fewest) / round_packets;
        let (shared, now) = (&self.shared, self.now);
        let (start, is_over) = (Start::default(), AtomicBool::new(false));
        let begin = Instant::now();
        let goes_on = |rounds: usize| {
            let wanted = match length {
                Length::Rounds(wanted) => rounds < wanted.max(1),
                Length::Time(time) => rounds == 0 || begin.elapsed() < time,
            };
            wanted && (rounds as u64) < most_rounds
        };
        let run = |number: usize, lane: &mut Lane| {
            let (mut with, mut without) = (Vec::new(), Vec::new());
            loop {
                if number == 0 && !goes_on(with.len()) {
                    is_over.store(true, Ordering::Relaxed);
                }
                start.wait_for(workers);
                if is_over.load(Ordering::Relaxed) {
                    return (with, without);
                }
                with.push(lane.sample(shared, now, bursts, true));
                start.wait_for(workers);
                without.push(lane.sample(shared, now, bursts, false));
            }
        };
        let cores = core_affinity::get_core_ids().unwrap_or_default();
        let samples: Vec<_> = if let [lane] = &mut self.lanes[..] {
            vec![run(0, lane)]
        } else {
            thread::scope(|scope| {
                let (run, cores) = (&run, &cores);
                let started = self.lanes.iter_mut().enumerate().map(|(number, lane)| {
                    scope.spawn(move || {
                        if let Some(core) = cores.get(number) {
                            core_affinity::set_for_current(*core);
                        }
                        run(number, lane)
                    })
                });
                let started: Vec<_> = started.collect();
                started.into_iter().map(|thread| thread.join().expect("a worker does not panic")).collect()
            })
        };
        self.all_forwarded()?;
        let (mut with, mut without): (Vec<f64>, Vec<f64>) = (Vec::new(), Vec::new());
        samples.into_iter().for_each(|(one, other)| {
            with.extend(one);
            without.extend(other);
        });
        if with.is_empty() {
            return Err(format!("{} flows are too few for a round of this case", self.flows));
        }
        let (ns, overhead_ns) = (Spread::of(&mut with), Spread::of(&mut without).median);
        Ok(Measurement {
            case: self.case,
            flows: self.flows,
            workers,
            shares: self.shares,
            rounds: with.len(),
            ns: ns.less(overhead_ns),
            overhead_ns,
        })
    }
}

/// Where workers wait for each other, again and again, without going to sleep.
#[derive(Default)]
struct Start(AtomicUsize);

impl Start {
    /// Waits until so many are here, this one included.
    fn wait_for(&self, workers: usize) {
        // Acquire and release: what one wrote before it came is seen by the others afterwards.
        let arrived = self.0.fetch_add(1, Ordering::AcqRel);
        let enough = (arrived / workers + 1) * workers;
        let mut spins = 0_u32;
        while self.0.load(Ordering::Acquire) < enough {
            spins += 1;
            // The one that is waited for may need this core.
            if spins.is_multiple_of(1024) { thread::yield_now() } else { hint::spin_loop() }
        }
    }
}

/// What is measured, by this name.
#[inline(never)]
fn measured_burst(pipeline: &mut Pipeline, driver: &mut MemoryDriver, burst: &mut Vec<Packet>, context: &Context<'_>) {
    process_burst(pipeline, driver, burst, context);
}

/// The same, by a name that is not counted.
#[inline(never)]
fn opening_burst(pipeline: &mut Pipeline, driver: &mut MemoryDriver, burst: &mut Vec<Packet>, context: &Context<'_>) {
    process_burst(pipeline, driver, burst, hint::black_box(context));
}

fn release(_: &mut Pipeline, driver: &mut MemoryDriver, burst: &mut Vec<Packet>, _: &Context<'_>) {
    burst.drain(..).for_each(|packet| driver.release(packet));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::CASES;

    #[test]
    fn every_case_forwards_all_of_its_packets_with_one_worker_and_two() {
        for case in CASES {
            for (workers, shares) in [(1, Flows::Apart), (2, Flows::Apart), (2, Flows::Same)] {
                let mut bench = Bench::new(case, 100, workers, shares).unwrap();
                let measured = bench.measure(Length::Rounds(2)).unwrap();
                assert_eq!((measured.workers, measured.rounds), (workers, 2 * workers), "{}", case.name);
                let handled: u64 = bench.lanes.iter().map(|lane| lane.worker.pipeline.totals().rx).sum();
                let bursts = if workers == 1 { ROUND_BURSTS } else { SHARED_ROUND_BURSTS };
                let opening: usize = (0..workers).map(|_| 4 * (100 / workers).div_ceil(BURST) * BURST).sum();
                assert_eq!(handled, (opening + measured.rounds * bursts as usize * BURST) as u64, "{}", case.name);
            }
        }
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        assert!(Bench::new(CASES[0], 0, 1, Flows::Apart).is_err());
        assert!(Bench::new(CASES[0], 1, 2, Flows::Apart).is_err());
        assert!(Bench::new(CASES[0], 1, 0, Flows::Apart).is_err());
        assert!(Bench::new(CASES[0], MAX_FLOWS + 1, 1, Flows::Apart).is_err());
    }

    #[test]
    fn quartiles_and_median() {
        let spread = Spread::of(&mut [9.0, 1.0, 2.0, 3.0, 100.0]);
        assert_eq!(spread, Spread { low: 2.0, median: 3.0, high: 9.0 });
        assert_eq!(Spread::of(&mut [7.0]), Spread { low: 7.0, median: 7.0, high: 7.0 });
    }
}
